"""Plans: hardware, communication and time by hand, and what has to hold between settings."""

import io
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from rich.console import Console

from errors import InputError
from scripts.plan.tables import show
from training.config import load_config
from training.plan import GIB, make_plan
from training.plan_cost import Assumptions, Communication, Flops, communication, step_time
from training.plan_hardware import GPUS, Cluster

SCALE = Path(__file__).parents[2] / "configs/scale"
H100 = "h100-80gb"


def cluster(gpus, per_node=8, gbit=400.0, gpu=H100):
    return Cluster.of(gpu, gpus, per_node, gbit)


@cache
def planned(name, gpus, gpu=H100, kind=None, recompute=None, overrides=()):
    return make_plan(load_config(SCALE / f"{name}.yaml", overrides), cluster(gpus, gpu=gpu), None, kind, recompute)


def test_an_unknown_gpu_names_the_nearest():
    with pytest.raises(InputError, match=r"did you mean 'h100-80gb'\?") as error:
        cluster(8, gpu="h100-80g")
    assert "\n" not in str(error.value) and error.value.exit_code == 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(gpus=12), "12 GPUs do not fill nodes of 8; nearest is 16"),
        (dict(gpus=0), "--gpus"),
        (dict(gpus=8, per_node=0), "--gpus-per-node"),
        (dict(gpus=8, gbit=0.0), "--network-gbit"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        cluster(**arguments)


def test_data_sheets_are_plausible():
    for name, gpu in GPUS.items():
        nominal = float(name.rsplit("-", 1)[1].removesuffix("gb"))
        assert name == gpu.name and 0.9 * nominal < gpu.memory_gib <= nominal and gpu.source
        assert 50 < gpu.tflops < 5000 and 100 < gpu.memory_gbps < 20000


def test_a_ring_by_hand():
    node = cluster(8)
    # 8 ranks in a node: 7/8 of the bytes over a link of 450 GB/s
    assert node.ring_seconds(8e9, 8, 1.0) == pytest.approx(7 / 450)
    # 16 ranks in two nodes: 15/16 of the bytes through eight cards of 50 GB/s at a node's edge, slower than inside
    assert cluster(16).ring_seconds(16e9, 16, 1.0) == pytest.approx(15 / 400)
    assert node.ring_seconds(8e9, 8, 0.5) == pytest.approx(14 / 450) and node.ring_seconds(1e9, 1, 1.0) == 0
    assert cluster(16).exchange_seconds(2e9, 2, 1.0) == pytest.approx(1 / 50)


def sent(shards, gpus, micro_batches=1, weight_bytes=4):
    return communication(1000, 200, shards, micro_batches, cluster(gpus), 1.0, weight_bytes)


def test_communication_by_hand():
    assert sent(1, 1) == Communication(0.0, 0.0, 0.0)
    # fsdp on 8: blocks gathered twice, the root once, gradients once, float32, 7/8 of it leaves a rank
    fsdp = sent(8, 8)
    assert (fsdp.gather_bytes, fsdp.reduce_bytes) == (4 * 1800 * 7 / 8, 4 * 1000 * 7 / 8)
    # blocks' weights rounded to two bytes, the root's and all gradients not
    rounded = sent(8, 8, weight_bytes=2)
    assert (rounded.gather_bytes, rounded.reduce_bytes) == ((2 * 1600 + 4 * 200) * 7 / 8, fsdp.reduce_bytes)
    # ddp: an all-reduce of everything
    ddp = sent(1, 8)
    assert (ddp.gather_bytes, ddp.reduce_bytes) == (0, 2 * 4 * 1000 * 7 / 8)
    # hsdp on two nodes: fsdp inside each, and an all-reduce of the shard between them
    hsdp = sent(8, 16)
    assert hsdp.gather_bytes == fsdp.gather_bytes
    assert hsdp.reduce_bytes == fsdp.reduce_bytes + 2 * (4 * 1000 / 8) / 2
    assert sent(8, 8, micro_batches=3).total_bytes == 3 * fsdp.total_bytes


def test_a_step_by_hand():
    flops = Flops(forward=10**9, executed=4e9)
    time = step_time(flops, 1000, 10**9, Communication(0, 0, 0.5), cluster(8), mfu=0.5)
    assert time.compute == pytest.approx(4e12 / (0.5 * 989.4e12))
    assert time.update == pytest.approx(28 / 3350)
    assert time.overlapped == 0.5 + time.update and time.serial == time.compute + 0.5 + time.update


def test_the_large_one_fits_on_64_gpus_sharded_and_not_copied():
    plan = planned("nam56r_4b", 64)
    fits = {(e.setting.kind, e.setting.recompute): e.fits for e in plan.estimates}
    assert plan.parameters == 4_680_401_792 and plan.chosen.fits and plan.chosen.setting.kind == "fsdp"
    assert not any(fits["ddp", kind] for kind in ("none", "selective", "full")) and fits["fsdp", "full"]
    assert plan.checkpoint_bytes == 12 * plan.parameters
    assert plan.tokens_per_step == 256 * 4096 and plan.steps == 89_646
    for estimate in plan.estimates:
        assert estimate.setting.micro_rows * estimate.setting.micro_batches * 64 == 256
        assert estimate.needed_gib == pytest.approx(1.05 * estimate.memory.total / GIB + 3)
        assert estimate.fits == (estimate.needed_gib <= 79.1)


def test_the_plan_in_the_documentation_is_what_the_planner_prints():
    """Every figure of it, to the last digit. After a change: paste what the command above it prints."""
    console = Console(width=80, file=io.StringIO())
    show(planned("nam56r_4b", 64), console)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    printed = "\n".join(lines).partition("settings on")[2].partition("\n- Memory:")[0]
    documented = (
        (SCALE.parents[1] / "docs/scaling.md").read_text().partition("```\nsettings on")[2].partition("\n```")[0]
    )
    assert documented == printed


def test_what_needs_most_decides_whether_it_fits():
    """Preflight's two whole rows, twice, do not fit without recomputation, however small the micro-batch."""
    found = {(e.setting.kind, e.setting.recompute): e for e in planned("nam56r_4b", 64).estimates}
    for kind in ("fsdp", "hsdp"):
        assert not found[kind, "none"].fits and found[kind, "none"].memory.during == "preflight"
        assert found[kind, "none"].setting.micro_rows == 1
    assert found["fsdp", "selective"].memory.during == "step"
    without = planned("nam56r_4b", 64, kind="fsdp", recompute="none", overrides=("stp.weight=0",))
    assert without.chosen.fits and {e.memory.during for e in without.estimates} == {"step"}


def test_the_config_says_what_is_looked_at_unless_asked_otherwise():
    overrides = ("parallel.data=hsdp", "parallel.recompute=full", "train.batch_rows=64")
    assert vars(planned("hybrid_150m", 64, overrides=overrides).chosen.setting).items() >= {
        ("kind", "hsdp"),
        ("recompute", "full"),
    }
    assert planned("hybrid_150m", 64, kind="fsdp", overrides=overrides).chosen.setting.kind == "fsdp"


def test_weights_are_whole_in_ddp_and_cut_otherwise():
    plan = planned("nam56r_4b", 64)
    weights = {e.setting.kind: e.memory.weights for e in plan.estimates}
    assert weights["ddp"] == 4 * plan.parameters
    assert weights["fsdp"] * 64 == pytest.approx(weights["ddp"], rel=1e-6)
    assert weights["hsdp"] * 8 == pytest.approx(weights["ddp"], rel=1e-6)


def test_one_gpu_is_one_process():
    plan = planned("hybrid_150m", 1)
    assert {e.setting.kind for e in plan.estimates} == {"none"} and plan.chosen.fits
    assert plan.chosen.sent.total_bytes == 0 and plan.chosen.memory.gathered == 0
    with pytest.raises(InputError, match="--data"):
        make_plan(load_config(SCALE / "hybrid_1b.yaml"), cluster(8), None, "none")


def test_a_smaller_card_takes_smaller_micro_batches():
    large, small = (planned("hybrid_150m", 1, gpu=gpu, recompute="none") for gpu in (H100, "l4-24gb"))
    assert small.chosen.setting.micro_rows < large.chosen.setting.micro_rows and small.chosen.fits
    assert small.chosen.days > large.chosen.days


def test_a_higher_assumed_share_is_a_faster_plan():
    config = load_config(SCALE / "hybrid_150m.yaml", ["train.batch_rows=1", "model.pattern=E"])
    slow, fast = (make_plan(config, cluster(1), Assumptions(mfu=mfu)) for mfu in (0.2, 0.4))
    assert slow.chosen.time.compute == pytest.approx(2 * fast.chosen.time.compute)
    with pytest.raises(InputError, match="--mfu"):
        make_plan(config, cluster(1), Assumptions(mfu=0.0))


def test_recomputing_costs_time_and_saves_memory():
    config = load_config(SCALE / "hybrid_150m.yaml", ["train.batch_rows=4"])
    none, _, full = make_plan(config, cluster(1)).estimates
    assert none.setting.micro_rows == full.setting.micro_rows == 4
    assert full.memory.total < none.memory.total and full.time.compute > none.time.compute


def test_rows_have_to_split_over_the_gpus():
    with pytest.raises(InputError, match=r"train.batch_rows: 64 rows do not split over 48 GPUs; nearest is 48"):
        planned("hybrid_150m", 48)


def test_other_precisions_are_refused():
    config = replace(load_config(SCALE / "hybrid_150m.yaml"), precision="fp32")
    with pytest.raises(InputError, match="precision"):
        make_plan(config, cluster(1))


def test_groups_of_ranks_have_to_go_round():
    config = load_config(SCALE / "nam56r_4b.yaml", ["parallel.data=hsdp", "parallel.shard_ranks=6"])
    line = "parallel.shard_ranks: 64 ranks do not split into groups of 6; nearest is 4"
    with pytest.raises(InputError, match=line):
        config.require_ranks(64)
    with pytest.raises(InputError, match=line):
        make_plan(config, cluster(64))
    config.require_ranks(1)  # a look at the config from the launching process
