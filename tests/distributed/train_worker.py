"""train.py with a mishap: torchrun ... train_worker.py MISHAP train-arguments...

none; stop:N = this job is asked to stop after step N; cut:R = on rank R the collector detaches what it collects;
other:R = rank R was given another config; code:R = rank R runs other code; dead:R = on rank R the embedding's state is
detached for STP after 25 calls; alone:R = rank R alone meets bad input after its second step.
"""

import os
import signal
import sys

import train
from errors import InputError
from losses.objective import Objective
from model.hybrid import HybridLM, HybridOutput
from training import environment
from training.lifecycle import Run


def stop_after(step):
    record = Run.record

    def recorded(self, state, *rest):
        record(self, state, *rest)
        if state.step == step and self.world.rank == self.world.size - 1:  # one rank is told, all must stop
            os.kill(os.getpid(), signal.SIGTERM)

    Run.record = recorded


def alone_on(rank):
    record = Run.record

    def recorded(self, state, *rest):
        record(self, state, *rest)
        if state.step == 2 and self.world.rank == rank:
            raise InputError("texts: a file\nof this machine alone")

    Run.record = recorded


def cut_on(rank):
    if int(os.environ.get("RANK", "0")) != rank:
        return

    honest = HybridLM.forward

    def forward(self, tokens, context):
        output = honest(self, tokens, context)
        return HybridOutput([state.detach() for state in output.hidden_states], output.final)

    HybridLM.forward = forward


def dead_on(rank):
    if int(os.environ.get("RANK", "0")) != rank:
        return

    honest, calls = Objective.measure, []

    def measure(self, hidden_states, final, triples, join=None):
        calls.append(1)
        if len(calls) > 25:
            return honest(self, [hidden_states[0].detach(), *hidden_states[1:]], final, triples)
        return honest(self, hidden_states, final, triples, join)

    Objective.measure = measure


if __name__ == "__main__":
    mishap, _, argument = sys.argv.pop(1).partition(":")
    if mishap == "stop":
        stop_after(int(argument))
    elif mishap == "cut":
        cut_on(int(argument))
    elif mishap == "alone":
        alone_on(int(argument))
    elif mishap == "dead":
        dead_on(int(argument))
    elif mishap == "code" and os.environ.get("RANK") == argument:
        environment.code_sha256 = lambda: "an older checkout"
    elif mishap == "other" and os.environ.get("RANK") == argument:
        sys.argv.append("seed=5")
    train.exit_with(train.main)
