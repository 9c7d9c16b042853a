"""Faults of the training loop, the gate and what a resumed run brings back."""

from __future__ import annotations

import train
from losses.gate import TokenGate
from tests.mutants.mutant import Mutant
from tests.mutants.patching import Rewrite
from training.lifecycle import Run
from training.optimizer import split_by_decay
from training.saving import Saver

ORACLE = "tests/training/test_step_oracle.py::test_every_step_has_the_gradients_of_the_plain_formula"
RESUME = "tests/test_train_exactness.py::test_resume_is_exact"
IDS = "SequenceContext.from_document_ids(batch.document_ids[rows])"
SELECT = "triples.select(rows) if triples is not None else None"
GIVEN = "torch.full((), stp_weight, device=machine.device) if stp_weight else None"
WEIGHT = "gate.weight(state.tokens)"
CONSUMED = "return self.full_weight * self.fraction(consumed_tokens)"


def loop(old: str, new: str) -> tuple[Rewrite, ...]:
    return (Rewrite(train.train_in, old, new),)


def gate(new: str) -> tuple[Rewrite, ...]:
    return (Rewrite(TokenGate.weight, CONSUMED, new),)


def restored(change: str) -> tuple[Rewrite, ...]:
    """What comes back from a checkpoint, changed."""
    stored = 'self.checkpoints.load(path, self._tensors())["run"]'
    return (Rewrite(Saver.restore, stored, "{**" + stored + f", {change}}}"),)


MUTANTS = (
    Mutant(
        "document ids of another row",
        "the context is made from the ids of the row before",
        loop(IDS, IDS.replace("[rows]", "[rows.roll(1)]")),
        ORACLE,
    ),
    Mutant(
        "document ids off by one",
        "documents begin one token late",
        loop(IDS, IDS.replace("[rows])", "[rows].roll(1, 1))")),
        ORACLE,
    ),
    Mutant(
        "no document ids",
        "every row is taken for one document",
        loop(IDS, "SequenceContext.single_documents(batch.document_ids[rows])"),
        ORACLE,
    ),
    Mutant(
        "triples of another row",
        "a micro-batch gets its rows' triples in another order",
        loop(SELECT, SELECT.replace("(rows)", "(rows.flip(0))")),
        ORACLE,
    ),
    Mutant(
        "term added after backward",
        "the total is logged, the LM loss is differentiated",
        loop("loss.total.backward()", "loss.lm.backward()"),
        ORACLE,
    ),
    Mutant(
        "term left out under accumulation",
        "only in the first micro-batch the term has a weight",
        loop(GIVEN, GIVEN.replace("if stp_weight else", "if stp_weight and number == 0 else")),
        ORACLE,
    ),
    Mutant(
        "divisor of the micro-batch",
        "each micro-batch divides by its own triples, so the term grows with accumulation",
        loop("stp_divisor=stp_divisor", "stp_divisor=None"),
        ORACLE,
    ),
    Mutant(
        "gate counts steps",
        "the gate is given the number of steps",
        loop(WEIGHT, "gate.weight(state.step)"),
        "never live",
    ),
    Mutant(
        "gate counts a micro-batch",
        "of a step's tokens only one micro-batch's reach the gate",
        loop(WEIGHT, "gate.weight(state.tokens // config.train.accumulation)"),
        ORACLE,
    ),
    Mutant(
        "gate counts a local rank",
        "the tokens of one of two ranks are recorded as consumed",
        loop("stp_weight, accepted, loss_tokens)", "stp_weight, accepted, loss_tokens // 2)"),
        ORACLE,
    ),
    Mutant(
        "gate counts padding",
        "tokens are counted whether they bear loss or not",
        loop(WEIGHT, "gate.weight(state.step * batch.tokens.numel())"),
        ORACLE,
    ),
    Mutant(
        "gate never opens",
        "the ramp is clipped to 0",
        (Rewrite(TokenGate.fraction, "self.ramp_tokens, 0.0), 1.0)", "self.ramp_tokens, 0.0), 0.0)"),),
        "never live",
    ),
    Mutant(
        "weight read once",
        "the weight of the first step is kept",
        gate(f'return self.__dict__.setdefault("kept", {CONSUMED[7:]})'),
        "never live",
    ),
    Mutant(
        "weight kept at the opening",
        "the first weight above zero is kept: the ramp stands still",
        gate(f'weight = {CONSUMED[7:]}\n    return weight and self.__dict__.setdefault("kept", weight)'),
        ORACLE,
    ),
    Mutant(
        "gate lost on resume",
        "the gate counts the tokens since this process began",
        loop(WEIGHT, 'gate.weight(state.tokens - run.__dict__.setdefault("began", state.tokens))'),
        RESUME,
    ),
    Mutant(
        "step lost on resume",
        "steps, and with them triples and data, begin at zero after a resume",
        restored('"step": 0'),
        RESUME,
    ),
    Mutant(
        "frozen block",
        "the parameters of a block do not require grad",
        loop("model.train()", "model.train().blocks[1].requires_grad_(False)"),
        "block_parameters",
    ),
    Mutant(
        "a family left out of the optimizer",
        "the parameters of the R block are in no group",
        (Rewrite(split_by_decay, "if not parameter.requires_grad:", 'if name.startswith("blocks.3."):'),),
        ORACLE,
    ),
    Mutant(
        "live tokens claimed while closed",
        "the receipt's interval begins before the gate opens",
        (Rewrite(Run.record, "if stp_weight != 0 and accepted and", "if accepted and"),),
        "tests/training/test_live_evidence.py::test_the_receipt_lists_the_tokens_of_open_steps_and_no_others",
    ),
)
