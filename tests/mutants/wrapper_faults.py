"""Faults of what is put around the model: FSDP2 (here a world of one process) and activation recomputation."""

from __future__ import annotations

from tests.mutants.collector_faults import ALL
from tests.mutants.mutant import Mutant
from tests.mutants.patching import Replace, Rewrite
from training import distributed
from training.recompute import Recompute

SHARDED = ("parallel.data=fsdp",)
POLICY = "MixedPrecisionPolicy(cast_forward_inputs=False)"
CHECKPOINTED = "return checkpoint(self.forward, *arguments,"


def detached_outputs(honest):
    """Outputs leave the wrapper detached and with a gradient of their own, as from a stage in another process."""

    def shard(model, *arguments, **named):
        honest(model, *arguments, **named)
        model.blocks[1].register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_())

    return shard


def cloned_list(honest):
    """The root wrapper hands out copies of what the loop collected, as a cast of a whole output tree makes them."""

    def shard(model, *arguments, **named):
        honest(model, *arguments, **named)

        def copies(module, inputs, output):
            output.hidden_states = [h.detach().clone() for h in output.hidden_states]
            return output

        model.register_forward_hook(copies)

    return shard


MUTANTS = (
    Mutant(
        "FSDP2 casts the stream",
        "fully_shard with output_dtype: block outputs in bfloat16",
        (Rewrite(distributed.shard, POLICY, POLICY.replace(")", ", output_dtype=torch.bfloat16)")),),
        "collector",
        (*SHARDED, "precision=bf16", "stp.boundaries=[1,2,3,4]"),
    ),
    Mutant(
        "FSDP2 wrapper copies the list",
        "the root's post-forward hook hands out detached copies of the states",
        (Replace(distributed, "shard", cloned_list),),
        "collector",
        (*SHARDED, *ALL),
    ),
    Mutant(
        "FSDP2 wrapper cuts the stream",
        "one block's output is a tensor of its own, as from another process",
        (Replace(distributed, "shard", detached_outputs),),
        "stream_below",
        SHARDED,
    ),
    Mutant(
        "recomputation cuts the stream",
        "a recomputed block works on a copy of its input that leads nowhere",
        (
            Rewrite(
                Recompute.__call__,
                CHECKPOINTED,
                "arguments = (arguments[0].detach().requires_grad_(), *arguments[1:])\n    " + CHECKPOINTED,
            ),
        ),
        "stream_below",
        ("parallel.recompute=full",),
    ),
)
