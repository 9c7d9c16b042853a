"""Saving and loading: every bit comes back, and a failed save costs nothing but itself."""

import json
import os
import resource
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from errors import InputError
from training import checkpoint as checkpoint_module
from training.checkpoint import CheckpointConfig, Checkpointer
from training.checkpoint_folder import load_checkpoint, step_of
from training.distributed import ParallelConfig, World
from training.optimizer import OptimizerConfig, build_optimizer, optimizer_tensors


class Tied(nn.Module):
    """Tied head, a buffer like the experts' selection bias, an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("selection_bias", torch.randn(4))
        self.register_buffer("count", torch.tensor(7))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embedding(tokens)).tanh())


def make(seed: int, steps: int = 0) -> tuple[Tied, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Tied()
    optimizer = build_optimizer(model, OptimizerConfig())
    train(model, optimizer, range(steps))
    return model, optimizer


def train(model: Tied, optimizer: torch.optim.AdamW, steps: range) -> list[float]:
    losses = []
    for step in steps:
        tokens = torch.randint(0, 11, (5, 7), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.selection_bias += 0.1 * loss.detach()
        model.count += 1
        losses.append(loss.item())
    return losses


def tree(model: Tied, optimizer: torch.optim.AdamW) -> dict:
    return {"model": model.state_dict(), "optimizer": optimizer_tensors(model, optimizer)}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def checkpointer(tmp_path, mode: str = "sync", **config) -> tuple[Checkpointer, list[str]]:
    messages: list[str] = []
    return Checkpointer(tmp_path / "checkpoints", CheckpointConfig(mode=mode, **config), messages.append), messages


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_training_goes_on_exactly_as_if_never_interrupted(tmp_path, mode):
    model, optimizer = make(0, steps=3)
    keeper, messages = checkpointer(tmp_path, mode)
    assert keeper.save(3, tree(model, optimizer), {"tokens": 105}) is None
    undisturbed = train(model, optimizer, range(3, 9))  # async: the copy must not see these steps
    assert keeper.wait() is None and messages == []

    model2, optimizer2 = make(1)
    path = keeper.latest_valid()
    assert keeper.load(path, tree(model2, optimizer2)) == {"tokens": 105} and step_of(path) == 3
    assert model2.count.item() == 10
    assert [float(state["step"]) for state in optimizer2.state.values()] == [3.0] * 3
    assert train(model2, optimizer2, range(3, 9)) == undisturbed
    for name, tensor in model.state_dict().items():
        assert bits(tensor) == bits(model2.state_dict()[name]), name


def test_every_dtype_shape_and_special_value_bit_for_bit(tmp_path):
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int64]
    tensors = {str(dtype): (torch.randn(3, 5) * 50).to(dtype) for dtype in dtypes}
    tensors["flags"] = torch.tensor([True, False])
    tensors["special"] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    tensors["payload"] = torch.tensor([0x7FC12345, 0x7F812345], dtype=torch.int32).view(torch.float32)
    tensors["scalar"], tensors["empty"] = torch.tensor(0.1), torch.zeros(0, 4)
    tensors["transposed"] = torch.randn(4, 6).t()
    buffer = torch.randn(20)
    tensors["left"], tensors["right"] = buffer[:10], buffer[5:]  # two views that overlap
    keeper, _ = checkpointer(tmp_path)
    assert keeper.save(1, {"x": tensors}, {}) is None
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    keeper.load(keeper.latest_valid(), {"x": into})
    for name, tensor in tensors.items():
        assert into[name].dtype == tensor.dtype and bits(into[name]) == bits(tensor), name


def test_state_floats_come_back_exactly(tmp_path):
    keeper, _ = checkpointer(tmp_path)
    state = {"best": 0.1 + 0.2, "worst": float("inf"), "tokens": 2**62, "live": [[0, 5]], "text": "é\n"}
    keeper.save(1, {"x": {"a": torch.ones(1)}}, state)
    assert keeper.load(keeper.latest_valid(), {"x": {"a": torch.zeros(1)}}) == state


def test_a_tied_tensor_is_stored_once(tmp_path):
    model, _ = make(0)
    keeper, _ = checkpointer(tmp_path)
    keeper.save(1, {"model": model.state_dict()}, {})
    (shard,) = (keeper.latest_valid() / "tensors").iterdir()
    with safe_open(shard, "pt") as stored:
        assert set(stored.keys()) == {f"model.{name}" for name in model.state_dict()} - {"model.head.weight"}


def test_weights_alone(tmp_path):
    model, optimizer = make(0, steps=2)
    keeper, _ = checkpointer(tmp_path)
    keeper.save(2, tree(model, optimizer), {})
    other, _ = make(1)
    load_checkpoint(keeper.latest_valid(), {"model": other.state_dict()})
    assert bits(other.body.weight) == bits(model.body.weight)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t["model"].pop("count"), "model.count that the model here lacks"),
        (lambda t: t["model"].update(body2=torch.ones(1)), "no tensor model.body2"),
        (
            lambda t: t["model"].update(count=torch.tensor(0.0)),
            "model.count is [] int64, the model here has [] float32",
        ),
        (lambda t: t["model"].update(selection_bias=torch.zeros(5)), "[4] float32, the model here has [5] float32"),
    ],
)
def test_another_model_is_refused_and_nothing_is_filled(tmp_path, change, named):
    model, optimizer = make(0, steps=1)
    keeper, _ = checkpointer(tmp_path)
    keeper.save(1, tree(model, optimizer), {})
    other, other_optimizer = make(1)
    into = tree(other, other_optimizer)
    change(into)
    before = bits(other.body.weight)
    with pytest.raises(InputError) as caught:
        keeper.load(keeper.latest_valid(), into)
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert bits(other.body.weight) == before


def test_what_cannot_be_saved_is_a_bug_and_says_so(tmp_path):
    keeper, _ = checkpointer(tmp_path)
    with pytest.raises(TypeError, match=r"model\.lr: expected a tensor, got float"):
        keeper.save(1, {"model": {"lr": 0.1}}, {})
    with pytest.raises(TypeError):
        keeper.save(1, {}, {"x": object()})
    assert keeper.paths() == []


def test_retention(tmp_path):
    keeper, _ = checkpointer(tmp_path, keep_last=2, keep_every=30)
    for step in range(10, 80, 10):
        assert keeper.save(step, {"x": {"a": torch.full((2,), float(step))}}, {}) is None
    assert [step_of(path) for path in keeper.paths()] == [70, 60, 30]
    assert [(saved.step, saved.state) for saved in keeper.saved] == [(30, {}), (60, {}), (70, {})]


def test_a_damaged_one_does_not_count_as_kept(tmp_path):
    keeper, _ = checkpointer(tmp_path, keep_last=2)
    for step in (1, 2, 3):
        keeper.save(step, {"x": {"a": torch.ones(2)}}, {})
    (keeper.paths()[0] / "state.json").unlink()
    keeper.save(4, {"x": {"a": torch.ones(2)}}, {})
    assert [step_of(path) for path in keeper.paths()] == [4, 3, 2], "3 is damaged: 4 and 2 are the two sound ones"


def test_a_step_saved_again_replaces_nothing(tmp_path):
    keeper, _ = checkpointer(tmp_path)
    keeper.save(5, {"x": {"a": torch.ones(2)}}, {"n": 1})
    keeper.save(5, {"x": {"a": torch.ones(2)}}, {"n": 2})
    assert len(keeper.paths()) == 1, "twice in one process is once"
    again, _ = checkpointer(tmp_path)
    again.save(5, {"x": {"a": torch.ones(2)}}, {"n": 3})
    assert [path.name for path in again.paths()] == ["step-00000005-2", "step-00000005"]
    assert again.load(again.latest_valid(), {}) == {"n": 3}


def test_full_disk_while_saving_keeps_the_last_good_one_and_the_run(tmp_path):
    """A file size limit stands in for a full disk: the write of the tensors fails half way, for real."""
    keeper, messages = checkpointer(tmp_path)
    assert keeper.save(1, {"x": {"a": torch.ones(1000)}}, {"n": 1}) is None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        error = keeper.save(2, {"x": {"a": torch.ones(1000)}}, {"n": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error is not None and error.startswith("checkpoint of step 2 was not saved: ") and "\n" not in error
    assert messages == [error]
    assert [path.name for path in keeper.folder.iterdir()] == ["step-00000001"], "no temporary folder is left"
    assert keeper.load(keeper.latest_valid(), {}) == {"n": 1}
    assert keeper.save(3, {"x": {"a": torch.ones(1000)}}, {"n": 3}) is None
    assert keeper.load(keeper.latest_valid(), {}) == {"n": 3}


def test_a_folder_that_cannot_be_written_is_an_error_message(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    keeper, _ = checkpointer(tmp_path)
    assert "was not saved" in keeper.save(1, {"x": {"a": torch.ones(1)}}, {})
    assert keeper.latest_valid() is None


def test_async_error_comes_with_the_next_call_and_the_run_goes_on(tmp_path, monkeypatch):
    keeper, messages = checkpointer(tmp_path, "async")
    working = checkpoint_module.write_manifest
    monkeypatch.setattr(checkpoint_module, "write_manifest", lambda *_: (_ for _ in ()).throw(OSError("disk on fire")))
    assert keeper.save(1, {"x": {"a": torch.ones(1)}}, {}) is None
    assert keeper.wait() == messages[0] == "checkpoint of step 1 was not saved: disk on fire"
    keeper.save(2, {"x": {"a": torch.ones(1)}}, {})
    keeper._thread.join()
    monkeypatch.setattr(checkpoint_module, "write_manifest", working)
    assert "step 2 was not saved" in keeper.save(3, {"x": {"a": torch.ones(1)}}, {})
    assert keeper.wait() is None and [step_of(path) for path in keeper.paths()] == [3]


def test_the_writing_thread_belongs_to_the_gpu_of_the_process(tmp_path, monkeypatch):
    bound = []
    name = lambda: threading.current_thread().name  # noqa: E731
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: bound.append((name(), device.index)))
    world = World(ParallelConfig(), torch.device("cuda", 3), 0, 1, None)
    keeper = Checkpointer(tmp_path, world=world)
    keeper.save(1, {"a": torch.ones(1)}, {})
    assert keeper.wait() is None and bound == [("checkpoint-1", 3)]


def test_async_returns_before_the_disk_is_done(tmp_path, monkeypatch):
    gate = threading.Event()
    original = checkpoint_module.write_tensors
    monkeypatch.setattr(checkpoint_module, "write_tensors", lambda *a: (gate.wait(5), original(*a)))
    keeper, _ = checkpointer(tmp_path, "async")
    keeper.save(1, {"x": {"a": torch.ones(1)}}, {})
    assert keeper.paths() == []
    # where other ranks may be gone, a process that ends leaves it behind
    assert keeper.wait(0.01) == "checkpoint-1: not finished in 0.01 s" and keeper.is_writing
    assert [thread.daemon for thread in threading.enumerate() if thread.name == "checkpoint-1"] == [True]
    gate.set()
    keeper.wait()
    assert len(keeper.paths()) == 1 and keeper.saved[0].step == 1


def test_what_a_killed_process_left_is_removed_by_the_next_save_only(tmp_path):
    keeper, _ = checkpointer(tmp_path)
    for name in (".saving-00000007", ".deleting-step-00000001"):
        (keeper.folder / name).mkdir(parents=True)
        (keeper.folder / name / "half").write_text("x")
    assert keeper.latest_valid() is None and len(list(keeper.folder.iterdir())) == 2, "looking removes nothing"
    keeper.save(7, {"x": {"a": torch.ones(1)}}, {})
    assert [path.name for path in keeper.folder.iterdir()] == ["step-00000007"]


def test_the_manifest_names_every_file(tmp_path):
    keeper, _ = checkpointer(tmp_path)
    keeper.save(1, {"x": {"a": torch.ones(1)}}, {})
    manifest = json.loads((keeper.paths()[0] / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["state.json", "tensors/shard-00001-model-00001-of-00001.safetensors"]


def test_everything_reaches_the_disk_before_the_name_and_then_the_name(tmp_path, monkeypatch):
    """A power cut after `rename` must find every byte: each file and folder is fsynced before it, the parent after."""
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename
    where = tmp_path / "checkpoints"

    def recording_fsync(descriptor):
        events.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def recording_rename(self, target):
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "rename", recording_rename)
    keeper, _ = checkpointer(tmp_path)
    keeper.save(1, {"x": {"a": torch.ones(1)}}, {})
    before, after = events[: events.index("rename")], events[events.index("rename") :]
    there = where / ".saving-00000001"
    wanted = [there / "state.json", there / "tensors", there, there / "manifest.json"]
    wanted.append(there / "tensors" / "shard-00001-model-00001-of-00001.safetensors")
    assert {str(path) for path in wanted} <= set(before)
    assert before.index(str(there / "manifest.json")) < before.index(str(there))
    assert str(where) in after


def test_cadence():
    assert [step for step in range(0, 13) if Checkpointer("x", CheckpointConfig(every_steps=4)).due(step)] == [4, 8, 12]
    assert not Checkpointer("x", CheckpointConfig(every_steps=0)).due(4)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"keep_last": 1}, "checkpoint.keep_last"),
        ({"every_steps": -1}, "checkpoint.every_steps"),
        ({"keep_every": -3}, "checkpoint.keep_every"),
        ({"mode": "asynch"}, "checkpoint.mode"),
    ],
)
def test_bad_config_names_its_key(values, key):
    with pytest.raises(InputError, match=f"^{key}: "):
        CheckpointConfig(**values).validate()
