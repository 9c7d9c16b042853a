"""Faults of the STP term: which triples, which angle, and what of it gets into the total."""

from __future__ import annotations

from losses import controls, geometry, joined, triples
from losses.joined import GradientJoin
from losses.objective import Objective
from losses.stp import stp_terms
from losses.stp_kernel import CosineSums
from tests.mutants.mutant import Mutant
from tests.mutants.patching import Rewrite

TOTAL = "total = lm + stp_weight * stp"
STATE = "hidden_states[int(boundary)]"
MEASURED = "self.measure(output.hidden_states, output.final, triples, join)"
DOT = "(first * second).sum(-1))"


# Objective keeps no count of its calls, so the faults that come later in a run keep one on the instance.
LATER = '(self.__dict__.__setitem__("calls", self.__dict__.get("calls", 0) + 1) or self.calls > 14)'


def call(old: str, new: str) -> tuple[Rewrite, ...]:
    return (Rewrite(Objective.__call__, old, new),)


def select(new: str) -> tuple[Rewrite, ...]:
    return (Rewrite(Objective.select, STATE, new),)


def read(state: str) -> tuple[Rewrite, ...]:
    """What the term reads of state h, the i-th selected one; `late`: some steps after the gate has opened."""
    chosen = "self.select(hidden_states, final)"
    return (
        Rewrite(Objective.measure, chosen, f"(lambda late, s: [{state} for i, h in enumerate(s)])({LATER}, {chosen})"),
    )


MUTANTS = (
    Mutant("term times zero", "total = lm + weight * stp * 0", call(TOTAL, f"{TOTAL} * 0"), "total"),
    Mutant("term detached", "total = lm + weight * stp.detach()", call(TOTAL, f"{TOTAL}.detach()"), "total"),
    Mutant("term halved", "the mean over boundaries is taken twice", call(TOTAL, f"{TOTAL} / 2"), "total"),
    Mutant(
        "a boundary left out of the mean",
        "the last boundary is not in the term",
        call("stp = per_boundary.mean()", "stp = per_boundary[:-1].mean()"),
        "total",
    ),
    Mutant(
        "measured without gradient",
        "the term is computed under no_grad also while the gate is open",
        call("torch.is_grad_enabled() and stp_weight is not None", "False"),
        "total",
    ),
    Mutant(
        "a boundary detached by the objective",
        "boundary 2 is read detached",
        read("h.detach() if i == 2 else h"),
        "state_gradient",
    ),
    Mutant(
        "last state for every boundary",
        "the objective reads hidden_states[-1]",
        select("hidden_states[-1]"),
        "blocks_above",
    ),
    Mutant(
        "the state below read",
        "the objective reads hidden_states[boundary - 1]",
        select("hidden_states[max(int(boundary) - 1, 0)]"),
        "state_gradient",
    ),
    Mutant(
        "joined rows lost",
        "in a plain backward, and only there, STP's row gradients are dropped",
        (Rewrite(GradientJoin.give, "self._pending[index] = adder", "pass"),),
        "total",
    ),
    Mutant(
        "joined where no gradient arrives from",
        "rows join at one boundary less than they are read from",
        (Rewrite(GradientJoin._arrive, "if adder is None or", "if adder is None or index == 1 or"),),
        "total",
    ),
    Mutant(
        "shared gradients edited in place",
        "a gradient that others hold is taken for one's own",
        (Rewrite(joined.is_owned, "return names <=", "return True or names <="),),
        "tests/losses/test_joined_holders.py::test_a_residual_sum_whose_inputs_share_a_gradient",
    ),
    Mutant(
        "cosine over the wrong axis",
        "the dot product is summed over spans instead of channels (with normalised states: no fast kernel)",
        (Rewrite(geometry.one_minus_cosine, DOT, "(first * second).sum(-2).mean(-1, keepdim=True))"),),
        "tests/losses/test_stp.py::test_straight_lines_cost_nothing",
        ("stp.normalize=rms",),
    ),
    Mutant(
        "kernel and formula differ",
        "the fast kernel is given its three points in another order",
        (Rewrite(CosineSums.forward, "= points.contiguous(),", "= points.roll(1, 0),"),),
        "total",
    ),
    Mutant(
        "other displacement",
        "h_t - h_s in place of h_t - h_r",
        (Rewrite(geometry._displacements, "return t - r, r - s", "return t - s, r - s"),),
        "total",
    ),
    Mutant(
        "duplicates by a clamp",
        "offsets 0, 1, 2 are clamped to 1, so that r = t",
        (Rewrite(triples._sorted_offset, "torch.arange(3, device=bits.device)", "torch.arange(3).clamp_max(1)"),),
        "triples_of_a_layout",
        ("stp.sampler=sorted_offset",),
    ),
    Mutant(
        "gaps of zero",
        "an anchor's gap may be 0, so that s = r",
        (Rewrite(triples._gap, "return 1 + bits", "return bits"),),
        "triples_inside_documents",
    ),
    Mutant(
        "triples across documents",
        "triples are drawn over the whole row",
        (Rewrite(triples.draw, "content_of(document_ids, mask)", "content_of(torch.zeros_like(document_ids), mask)"),),
        "triples_inside_documents",
    ),
    Mutant(
        "padding counted",
        "triples are drawn over padding as if it were a document",
        (Rewrite(triples.content_of, "keep = document_ids >= 0", "keep = document_ids >= -1"),),
        "triples_of_a_layout",
    ),
    Mutant(
        "divisor counts what is not valid",
        "rows without room for a triple count in the divisor",
        (Rewrite(geometry.triple_weights, "valid.to(torch.float32)", "torch.ones_like(valid, dtype=torch.float32)"),),
        "triples_of_a_layout",
    ),
    Mutant(
        "same triples at every step",
        "the step is not in the key of the draw",
        (Rewrite(Objective.draw, "step=step", "step=0"),),
        "triples_repeatable",
    ),
    Mutant(
        "generator lost on resume",
        "the draw counts its own calls instead of the run's steps",
        (
            Rewrite(
                Objective.draw,
                "step=step",
                'step=self.__dict__.__setitem__("drawn", self.__dict__.get("drawn", -1) + 1) or self.drawn',
            ),
        ),
        "triples_repeatable",
    ),
    Mutant(
        "triples by place in the batch",
        "rows are numbered within the micro-batch or rank",
        (Rewrite(Objective.draw, "row_ids=row_ids", "row_ids=torch.arange(len(row_ids))"),),
        "triples_repeatable",
    ),
    Mutant(
        "placebo that acts",
        "the control `detached` does not detach",
        (Rewrite(stp_terms, "states = [h.detach() for h in states]", "states = list(states)"),),
        "control_sends_nothing",
        ("stp.variant=detached",),
    ),
    Mutant(
        "noise that is STP",
        "the control `gradient_noise` sends STP's own gradient",
        (Rewrite(stp_terms, 'if variant == "gradient_noise" and triples.key is not None:', "if False:"),),
        "control_as_declared",
        ("stp.variant=gradient_noise",),
    ),
    Mutant(
        "noise of one size",
        "every token gets noise of norm 1, whatever STP would send",
        (Rewrite(controls.noise_like, "sums.square().sum(-1, keepdim=True).sqrt() *", "1.0 *"),),
        "control_as_declared",
        ("stp.variant=gradient_noise",),
    ),
    Mutant(
        "the same noise at every step",
        "what noise is drawn from does not follow the step",
        (Rewrite(triples.sample, "mix(bits[:, 0, 0] ^ GAMMA)", "mix(bits[:, 0, 0] * 0)"),),
        "tests/losses/test_acting_variants.py::test_noise_follows_seed_step_and_row_and_no_generator",
        ("stp.variant=gradient_noise",),
    ),
    Mutant(
        "a penalty that straightens",
        "the control `norm_penalty` adds up the two neighbouring displacements",
        (Rewrite(controls.relative_spread, "(rows - rows.mean(1, keepdim=True))", "rows.diff(dim=1)"),),
        "control_as_declared",
        ("stp.variant=norm_penalty",),
    ),
    Mutant(
        "dies while the gate is open",
        "after some steps one boundary is read detached",
        read("h.detach() if late and i == 3 else h"),
        "evidence",
    ),
    Mutant(
        "weight lost while the gate is open",
        "after some steps the term is multiplied by zero",
        call(TOTAL, f"{TOTAL} * (not {LATER})"),
        "evidence",
    ),
)
