"""Bad input of every kind: commands, fuzzed configs, fuzzed files. Each ends in one line, none in a traceback."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from data.prepared import open_prepared
from data.shards import Shard
from data.stream import TrainStream
from data.tokenizer import Tokenizer, recorded_sha256
from errors import InputError
from scripts.chaos.damage import STOPPED
from scripts.chaos.mishaps import refused_cleanly
from scripts.chaos.place import CONFIG, REFERENCE, Place, Tally
from scripts.chaos.zygote import Zygote
from scripts.launch.collect import verify_run
from training.checkpoint import Checkpointer
from training.checkpoint_folder import load_checkpoint
from training.config import load_config
from training.receipt import read_receipt

CONFIGS, COMMANDS = "fuzzed configs", "bad commands"
FUZZED_DATA, FUZZED_CHECKPOINT = "fuzzed data and tokenizer files (collect)", "fuzzed checkpoint files"
COMMAND_LINES = (
    "stp.wieght=1",
    "model.pattern=AXER",
    "model.pattern=",
    "model.depth=0",
    "model.d_model=-4",
    "model.moe.top_k=99",
    "data.path=nowhere/*.txt",
    "data.sequence_length=2",
    "data.tokenizer.vocab_size=900000",
    "data.tokenizer.vocab_size=3",
    "data.tokenizer.path=tiny.yaml",
    "stp.weight=nan",
    "stp.boundaries=[77]",
    "stp.gate.start_tokens=99999999",
    "train.batch_rows=0",
    "train.tokens=many",
    "optimizer.learning_rate=inf",
    "init_from=nothing",
    "init_from=tiny.yaml",
    "resume=nothing",
    "run_id=../escape",
    "run_id=undisturbed",
    "health.outliers=perhaps",
    "checkpoint.keep_last=1",
    "device=abacus",
    "validation.every_fraction=0",
    "wandb.mode=sometimes",
    "no_equals_sign",
    "=5",
    "train=7",
)


def fuzz_configs(tally: Tally, examples: int, seed_number: int, folder: Path) -> None:
    """YAML files made of known and unknown keys with values of every kind; half of them broken as text."""
    path = folder / "fuzzed.yaml"
    seen = 0

    # no database, no shrinking: a failure is reported as it is, and the same seed makes the same examples
    @seed(seed_number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(_config_texts(), st.lists(_overrides(), max_size=2))
    def one(text: str, overrides: list[str]) -> None:
        nonlocal seen
        seen += 1
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
        problem = _outcome(lambda: load_config(path, overrides).validate())
        tally.add("input", CONFIGS, problem is None, f"{text!r} {overrides}: {problem}")

    one()
    if seen < examples:  # hypothesis stops early only where it has run out of different examples
        tally.failures.append(f"{CONFIGS}: only {seen} of {examples} were tried")


def _outcome(attempt: Callable[[], object]) -> str | None:
    """None: it was accepted, or refused by an InputError of one line."""
    try:
        attempt()
    except InputError as error:
        text = str(error)
        return None if text.strip() and "\n" not in text else f"message of several lines: {text!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _config_texts() -> st.SearchStrategy[str]:
    import yaml

    leaves = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["AMER", "all", "final", "family:R", "1e400", "0x7f", "${seed}", "${oc.env:HOME}", "!!python"]),
    )
    values = st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    )
    base = yaml.safe_load(CONFIG)
    sections = {name: sorted(value) for name, value in base.items() if isinstance(value, dict)}
    names = st.sampled_from(sorted({*sections, "seed", "device", "resume", "run_id", "threads", "wandb"}))

    @st.composite
    def texts(draw: st.DrawFn) -> str:
        tree = yaml.safe_load(CONFIG)
        for _ in range(draw(st.integers(1, 3))):
            section = draw(names)
            keys = sections.get(section)
            if keys and isinstance(tree.get(section), dict) and draw(st.booleans()):
                tree[section][draw(st.sampled_from(keys) | st.text(max_size=6))] = draw(values)
            else:
                tree[section] = draw(values)
        text = yaml.safe_dump(tree, allow_unicode=True)
        if draw(st.booleans()):
            at, length = draw(st.integers(0, len(text))), draw(st.integers(0, 12))
            text = text[:at] + draw(st.text(max_size=6)) + text[at + length :]
        return text

    return texts()


def _overrides() -> st.SearchStrategy[str]:
    keys = st.sampled_from(["stp.weight", "model.pattern", "train.tokens", "stp.boundaries", "data.mixture", "a.b", ""])
    texts = st.text(st.characters(codec="utf-8"), max_size=10)
    return st.builds(lambda key, value: f"{key}={value}", keys, texts)


def bad_commands(place: Place, zygote: Zygote, tally: Tally, number: int) -> None:
    """Whole starts with one thing wrong: exit code 2, one line, no new folder of that run (others make theirs)."""
    for override in COMMAND_LINES[:number]:
        named = override.startswith(("run_id=", "resume="))
        name = Path(override.partition("=")[2]).name if named else "bad"
        before = _folders_of(place, name)
        code, said = zygote.start_bare(*([override] if named else ["run_id=bad", override]))
        clean = refused_cleanly(code, "\n".join(line for line in said.splitlines() if not line.startswith("data:")))
        left = _folders_of(place, name) != before
        tally.add("input", COMMANDS, clean and not left, f"{override}: {code}, left a folder: {left}: {said[-300:]}")
        place.clean("bad")


def _folders_of(place: Place, name: str) -> set[Path]:
    """What is called like a run, or like something half-made for it, under runs/ or beside it."""
    return {path for folder in (place.runs, place.folder) for path in folder.glob(f"*{name}*")}


def fuzz_files(place: Place, tally: Tally, rounds: int, seed_number: int) -> None:
    """Damaged bytes in shards, tokenizer, manifest and checkpoint: readers refuse them in one line or read on, but a
    checkpoint's damage is noticed before it is loaded, and the data's by `launch collect`."""
    receipt = read_receipt(place.runs / REFERENCE)
    data = place.folder / receipt["data"]["folder"]
    receipt["data"]["folder"] = str(data)  # collect reads it relative to where it is called
    checkpoint = max((place.runs / STOPPED / "checkpoints").glob("step-*"))
    chance = random.Random(seed_number)
    files = sorted(path for path in data.rglob("*") if path.is_file() and path.suffix != ".sha256")
    for _ in range(rounds):
        for file in [*files, *sorted(path for path in checkpoint.rglob("*") if path.is_file())]:
            kept = file.read_bytes()
            broken = next(_broken(kept, chance))
            file.write_bytes(broken)
            try:
                words = f"{file.name}, {len(broken)} of {len(kept)} bytes"
                group = FUZZED_DATA if data in file.parents else FUZZED_CHECKPOINT
                tally.add("input", group, (problem := _open_all(file, data)) is None, f"{words}: {problem}")
                if group == FUZZED_DATA:
                    noticed = any(check.ok is False for check in verify_run(place.runs / REFERENCE, receipt))
                else:
                    found = Checkpointer(checkpoint.parent, message=lambda _: None).latest_valid()
                    noticed = found is not None and found.name != checkpoint.name
                tally.add("damage", group, noticed, f"{words}: no hash noticed")
            finally:
                file.write_bytes(kept)


def _open_all(file: Path, data: Path) -> str | None:
    """Opens a broken file as a run would, without looking at hashes first where the reader can be reached alone."""
    if file.suffix in (".bin", ".idx"):
        return _outcome(lambda: _read_shard(file.with_suffix(""))) or _outcome(lambda: _read_stream(data))
    if file.suffix == ".model":
        recorded = _outcome(lambda: Tokenizer.load(file, recorded_sha256(file)))
        return recorded or _outcome(lambda: Tokenizer.load(file))
    if data in file.parents:
        return _outcome(lambda: _read_stream(data))
    checkpoint = file.parent if file.parent.name.startswith("step-") else file.parent.parent
    into = {"model": {"embedding.weight": torch.zeros(300, 32)}}
    return _outcome(lambda: load_checkpoint(checkpoint, into)) or _outcome(
        lambda: Checkpointer(checkpoint.parent, message=lambda _: None).latest_valid()
    )


def _read_shard(prefix: Path) -> None:
    shard = Shard(prefix)
    shard.document_starts(0, shard.n_tokens)
    np.asarray(shard.tokens[: min(64, shard.n_tokens)]).sum()


def _read_stream(data: Path) -> None:
    stream = TrainStream(open_prepared(data), 48, 4)
    for step in range(3):
        stream.batch(step)


def _broken(data: bytes, chance: random.Random) -> Iterator[bytes]:
    """One way of being broken: cut, longer, zeroed, shuffled, some bits, some bytes near the beginning."""
    while True:
        kind = chance.randrange(6)
        broken = bytearray(data)
        if kind == 0:
            broken = broken[: chance.randrange(len(data))]
        elif kind == 1:
            broken += chance.randbytes(chance.randint(1, 40))
        elif kind == 2:
            start = chance.randrange(len(data))
            broken[start : start + 64] = bytes(len(broken[start : start + 64]))
        elif kind == 3:
            broken[: len(data) // 2], broken[len(data) // 2 :] = broken[len(data) // 2 :], broken[: len(data) // 2]
        else:
            for _ in range(chance.randint(1, 5)):
                broken[chance.randrange(min(len(data), 64 if kind == 5 else len(data)))] ^= 1 << chance.randrange(8)
        if bytes(broken) != data:
            yield bytes(broken)
