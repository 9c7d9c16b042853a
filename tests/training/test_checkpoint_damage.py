"""Damage of every kind to every file is noticed and named, and no byte of a checkpoint is ever unpickled."""

import json
import pickle
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch

from errors import InputError
from training.checkpoint import CheckpointConfig, Checkpointer
from training.checkpoint_folder import load_checkpoint
from training.manifest import damages, write_manifest

FILES = ["manifest.json", "state.json", "tensors/shard-00001-model-00001-of-00001.safetensors"]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "checkpoints"
    keeper = Checkpointer(folder, CheckpointConfig(mode="sync"), lambda _: None)
    for step in (1, 2):
        keeper.save(step, {"model": {"a": torch.full((64,), float(step))}}, {"n": step})
    return folder


@pytest.fixture
def damaged(pristine, tmp_path):
    """A copy with a messenger; its newest checkpoint is to be damaged by the test."""
    shutil.copytree(pristine, tmp_path / "checkpoints")
    messages: list[str] = []
    keeper = Checkpointer(tmp_path / "checkpoints", message=messages.append)
    return keeper, tmp_path / "checkpoints" / "step-00000002", messages


def falls_back(keeper, messages, named):
    """The older one is found, the damaged one is named with the file at fault, and loading it is refused."""
    path = keeper.latest_valid()
    assert path is not None and path.name == "step-00000001"
    assert len(messages) == 1 and "step-00000002" in messages[0] and named in messages[0] and "\n" not in messages[0]
    into = {"model": {"a": torch.zeros(64)}}
    with pytest.raises(InputError, match="step-00000002"):
        keeper.load(keeper.folder / "step-00000002", into)
    assert into["model"]["a"].eq(0).all()
    assert keeper.load(path, into) == {"n": 1} and into["model"]["a"].eq(1).all()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["deleted", "empty", "truncated", "longer", "zeroed"])
def test_one_file(damaged, name, how):
    keeper, path, messages = damaged
    file = path / name
    data = file.read_bytes()
    if how == "deleted":
        file.unlink()
    else:
        changed = {
            "empty": b"",
            "truncated": data[:-1],
            "longer": data + b"\n",
            "zeroed": bytes(len(data)),
        }
        file.write_bytes(changed[how])
    falls_back(keeper, messages, name)


@pytest.mark.parametrize("name", FILES)
def test_every_single_bit(pristine, tmp_path, name):
    """One at a time: all bits of the state, about 150 spread over each of the others, over all bit positions."""
    shutil.copytree(pristine / "step-00000002", tmp_path / "step-00000002")
    file = tmp_path / "step-00000002" / name
    data = file.read_bytes()
    positions = range(0, 8 * len(data), max(1, 8 * len(data) // 150 | 1))
    for position in positions:
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        file.write_bytes(flipped)
        found = damages(tmp_path / "step-00000002")
        assert found and found[0].startswith((name, "manifest.json")), position
    file.write_bytes(data)
    assert damages(tmp_path / "step-00000002") == []


def test_a_foreign_file_is_damage(damaged):
    keeper, path, messages = damaged
    shutil.copy(path / FILES[2], path / "tensors" / "shard-00002-model-00001-of-00001.safetensors")
    falls_back(keeper, messages, "shard-00002-model-00001-of-00001.safetensors: not in the manifest")


def test_a_checkpoint_under_another_steps_name(damaged):
    keeper, path, messages = damaged
    path.rename(path.with_name("step-00000009"))
    assert keeper.latest_valid().name == "step-00000001" and "another step" in messages[0]


def test_all_damaged(damaged):
    keeper, path, messages = damaged
    (path / "state.json").unlink()
    (path.with_name("step-00000001") / "manifest.json").unlink()
    assert keeper.latest_valid() is None and len(messages) == 2


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the payload ran')",))


@pytest.mark.parametrize("name", [*FILES, "tensors/.metadata", ".metadata", "tensors/evil.safetensors"])
@pytest.mark.parametrize("manifest", ["left", "rewritten"])
def test_a_pickle_in_any_file_never_runs(damaged, name, manifest):
    keeper, path, _ = damaged
    with pytest.raises(SystemExit, match="payload ran"):
        pickle.loads(pickle.dumps(Payload()))  # it is armed
    (path / name).write_bytes(pickle.dumps(Payload()))
    if manifest == "rewritten" and name != "manifest.json":
        write_manifest(path, 2)
        assert damages(path) == [], "the attacker's manifest fits"
    refused = name in FILES or manifest == "left" or name.endswith(".safetensors")
    into = {"model": {"a": torch.zeros(64)}}
    if refused:
        assert keeper.latest_valid().name == "step-00000001"
        with pytest.raises(InputError):
            load_checkpoint(path, into)
    else:
        assert load_checkpoint(path, into) == {"n": 2} and into["model"]["a"].eq(2).all()


def test_a_shard_of_another_rank_that_is_not_there_fails_the_save(damaged):
    """As where the ranks' folders are not one: a manifest of what happens to be there would call it whole."""
    _, path, _ = damaged
    known = {"tensors/shard-00002-model-00001.safetensors": {"bytes": 8, "sha256": "0" * 64}}
    with pytest.raises(OSError, match="written by another rank"):
        write_manifest(path, 2, known)


def test_a_torch_save_file_in_place_of_the_tensors_never_runs(damaged):
    keeper, path, messages = damaged
    torch.save({"a": Payload()}, path / FILES[2])
    write_manifest(path, 2)
    falls_back(keeper, messages, "")


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{}", '{"state": 3}', '{"state": null}', "\xff", "NaN"])
def test_a_state_that_is_none_behind_a_rewritten_manifest(damaged, text):
    keeper, path, messages = damaged
    (path / "state.json").write_text(text)
    write_manifest(path, 2)
    falls_back(keeper, messages, "state.json")


@pytest.mark.parametrize("files", [[], {"state.json": 3}, {"state.json": {}}, {"../../secret": {"bytes": 1}}, None])
def test_a_manifest_of_nonsense(damaged, files):
    keeper, path, messages = damaged
    import hashlib

    from training.durable import canonical_json

    content = {"format": 1, "step": 2, "files": files}
    content["self_sha256"] = hashlib.sha256(canonical_json(content)).hexdigest()
    (path / "manifest.json").write_bytes(canonical_json(content))
    falls_back(keeper, messages, "")


KILLER = """
    import os, signal, sys
    from pathlib import Path
    import torch
    import torch.distributed.checkpoint
    from training.checkpoint import CheckpointConfig, Checkpointer
    from training.checkpoint_folder import step_of
    from training.manifest import damages
    torch.set_num_threads(1)
    folder = sys.argv[1]
    countdown = [10**9]

    def tick(*_):
        countdown[0] -= 1
        if countdown[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"):
            if arguments and folder in os.fspath(arguments[0] if not isinstance(arguments[0], int) else ""):
                tick()

    sys.addaudithook(hook)
    fsync = os.fsync
    os.fsync = lambda descriptor: (tick(), fsync(descriptor), tick())[1]

    def save(step):
        keeper = Checkpointer(folder, CheckpointConfig(mode="sync", keep_last=2), lambda _: None)
        return keeper.save(step, {"x": {"a": torch.full((5,), float(step))}}, {"n": step})

    assert save(1) is None and save(2) is None
    newest, kills = 2, 0
    while True:
        child = os.fork()
        if child == 0:
            countdown[0] = kills
            error = save(newest + 1)
            os._exit(0 if error is None else 3)
        _, status = os.waitpid(child, 0)
        said = []
        keeper = Checkpointer(folder, message=said.append)
        path = keeper.latest_valid()
        assert said == [], said
        assert step_of(path) in (newest, newest + 1), (kills, path)
        into = {"x": {"a": torch.zeros(5)}}
        step = keeper.load(path, into)["n"]
        assert step == step_of(path) and into["x"]["a"].eq(float(step)).all()
        assert len(keeper.paths()) >= 2 and not any(damages(path) for path in keeper.paths())
        newest = step
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        kills += 1
    print("kills", kills)
"""


def test_sigkill_at_every_moment_of_a_save(tmp_path):
    """Before every file system call of a save, and after every fsync, the process is killed for real."""
    command = [sys.executable, "-c", textwrap.dedent(KILLER), str(tmp_path / "checkpoints")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 20


def test_loading_opens_no_unpickler(pristine):
    """The interpreter's own audit events, over a whole save and load."""
    script = """
        import sys, torch
        from training.checkpoint import CheckpointConfig, Checkpointer
        import torch.distributed.checkpoint
        seen = []
        sys.addaudithook(lambda event, _: seen.append(event) if event.startswith(("pickle.", "marshal.")) else None)
        into = {"model": {"a": torch.zeros(64)}}
        keeper = Checkpointer(sys.argv[1])
        print(keeper.load(keeper.latest_valid(), into)["n"], [e for e in seen if e.startswith("pickle")])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(pristine)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "2 []", done.stderr


def test_the_manifest_is_json_that_people_can_read(pristine):
    manifest = json.loads((pristine / "step-00000002" / "manifest.json").read_text())
    assert manifest["step"] == 2 and set(manifest["files"]) == set(FILES[1:])
