"""Two and four processes compute what one does, and so does any number that goes on from another's checkpoint."""

import json
from dataclasses import asdict

import pytest
import torch
from jobs import run
from parity_worker import Case

# float64 takes the plain torch references of every block; float32 their fused kernels
BOUND = {"float64": (20, 1e-9), "float32": (3, 1e-6)}
BEGUN = 2  # steps before the checkpoint
# world -> processes (0: no torchrun), parallel.data
WORLDS = {"one": (0, "none"), "fsdp1": (0, "fsdp"), "fsdp2": (2, "fsdp"), "ddp2": (2, "ddp"), "fsdp4": (4, "fsdp")}
BEGINNINGS = ("one", "fsdp2", "fsdp4", "ddp2")
# how a step is done, from the beginning: processes, parallel.data, parallel.recompute
KINDS = [
    (2, "fsdp", "none"),
    (2, "ddp", "none"),
    (2, "fsdp", "full"),
    (4, "hsdp", "selective"),
    (0, "fsdp", "selective"),
]


def run_all(folder, ranks, cases):
    """Starts one job for many cases: most of a short job is its start."""
    if ranks == 0:
        return [case.run() for case in cases]
    plan = folder / f"cases-{ranks}.json"
    plan.write_text(json.dumps([asdict(case) for case in cases]))
    job = run(ranks, "parity_worker.py", plan, cwd=folder)
    assert job.returncode == 0, job.stderr[-3000:]
    return [json.loads(open(case.out).read()) for case in cases]  # noqa: PTH123


def assert_same(one, many, bound, first=0):
    for a, b in zip(one["steps"][first:], many["steps"], strict=True):
        assert b == pytest.approx(a, rel=bound)
    assert one["weights"].keys() == many["weights"].keys()
    for name, weights in one["weights"].items():
        a, b = torch.tensor(weights), torch.tensor(many["weights"][name])
        # by their norm: AdamW divides a gradient near zero by its own size, so one such weight shows its rounding
        assert (a - b).norm() <= 10 * bound * a.norm() + bound, name


def one(folder, dtype, steps):
    return Case(str(folder / "one.json"), dtype=dtype, steps=steps).run()


def test_fsdp_on_two_processes(tmp_path):
    steps, bound = 5, BOUND["float64"][1]
    (found,) = run_all(tmp_path, 2, [Case(str(tmp_path / "two.json"), "fsdp", steps=steps)])
    assert_same(one(tmp_path, "float64", steps), found, bound)


# a process of pytest-xdist takes a whole dtype, whose fixtures are most of the work
@pytest.fixture(scope="module", params=[pytest.param(d, marks=pytest.mark.xdist_group(d)) for d in BOUND])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def reference(dtype, tmp_path_factory):
    """One process: from the beginning, and over the checkpoint."""
    folder, (steps, _) = tmp_path_factory.mktemp("reference"), BOUND[dtype]
    return one(folder, dtype, steps), one(folder, dtype, BEGUN + steps)


@pytest.fixture(scope="module")
def begun(dtype, tmp_path_factory):
    """Every kind of step, and a checkpoint after `BEGUN` steps of each of `BEGINNINGS`: {kind or world: result}."""
    folder, found = tmp_path_factory.mktemp("begun"), {}
    for ranks in (0, 2, 4):
        cases = {
            kind: Case(str(folder / f"{'-'.join(map(str, kind))}.json"), *kind[1:], dtype, BOUND[dtype][0])
            for kind in KINDS
            if kind[0] == ranks
        }
        for world in BEGINNINGS:
            if WORLDS[world][0] == ranks:
                files = {"out": str(folder / f"{world}.json"), "save": str(folder / world)}
                cases[world] = Case(kind=WORLDS[world][1], dtype=dtype, steps=BEGUN, **files)
        found |= zip(cases, run_all(folder, ranks, list(cases.values())), strict=True)
    return folder, found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_every_kind(reference, begun, dtype, kind):
    assert_same(reference[0], begun[1][kind], BOUND[dtype][1])


@pytest.fixture(scope="module")
def continued(dtype, begun, tmp_path_factory):
    """Each beginning continued in each world: {(beginning, world): result}."""
    folder, found = tmp_path_factory.mktemp("continued"), {}
    for ranks in (0, 2, 4):
        worlds = [world for world in WORLDS if WORLDS[world][0] == ranks]
        pairs = {(beginning, world): WORLDS[world][1] for beginning in BEGINNINGS for world in worlds}
        cases = [
            Case(str(folder / f"{a}-{b}.json"), kind, "none", dtype, BOUND[dtype][0], load=str(begun[0] / a))
            for (a, b), kind in pairs.items()
        ]
        found |= zip(pairs, run_all(folder, ranks, cases), strict=True)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_after_resharding(reference, continued, dtype, beginning, world):
    """1 <-> 2 <-> 4 processes, FSDP <-> DDP: what follows the checkpoint is what one process computes undisturbed."""
    assert_same(reference[1], continued[beginning, world], BOUND[dtype][1], first=BEGUN)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_blocks_keep_their_hidden_states_when_sharded(tmp_path):
    """Preflight proves every boundary's gradient in the worker; the graphs show that there was something to compile."""
    case = Case(str(tmp_path / "two.json"), "fsdp", "full", "float32", 3, "blocks")
    plain, (compiled,) = one(tmp_path, "float32", 3), run_all(tmp_path, 2, [case])
    assert compiled["graphs"] >= 4 and plain["graphs"] == 0  # four families, four graphs at least
    assert_same(plain, compiled, 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_teardowns(tmp_path):
    """A process that has loaded a checkpoint into sharded tensors may abort at its exit, if they still live then."""
    begun, continued = tmp_path / "begun.json", tmp_path / "continued.json"
    files = {"out": str(begun), "save": str(tmp_path / "saved")}
    run_all(tmp_path, 2, [Case(kind="fsdp", steps=1, **files)])
    case = Case(str(continued), "fsdp", steps=1, load=str(tmp_path / "saved"))
    (tmp_path / "case.json").write_text(json.dumps(asdict(case)))
    job = run(0, "teardown_worker.py", tmp_path / "case.json", 20, cwd=tmp_path)
    assert job.returncode == 0, job.stderr[-3000:]
    assert json.loads(job.stdout) == [[0, 0]] * 20, job.stderr[-3000:]
    assert len(json.loads(continued.read_text())["steps"]) == 1
