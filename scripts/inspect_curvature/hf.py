"""Hugging Face causal LMs in a local folder as subjects: safetensors only, no code of the folder is ever run."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from analysis.hf_models import layer_families
from analysis.measure import MeasureSettings
from data.corpora import InstalledPython
from data.documents import find_files, read_file
from errors import InputError
from scripts.inspect_curvature.job import Job, check_comparable
from scripts.inspect_curvature.pieces import Pieces, from_tokens
from scripts.inspect_curvature.subject import Subject

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def hf_job(arguments: argparse.Namespace, device: torch.device, command: str) -> Job:
    """Raises InputError: no transformers, no model folder, weights that are no safetensors, an unknown architecture."""
    folder = Path(arguments.hf)
    config = _config(folder)
    pieces, notes = _pieces(folder, config, arguments)
    subject = hf_subject(folder, device)
    for other in map(Path, arguments.compare):
        vocab_size = _text(_config(other)).vocab_size
        check_comparable(subject, other.resolve().name, vocab_size, _tokenizer_sha256(other))
    return Job(
        subject=subject,
        twin=partial(hf_twin, folder, device, arguments.seed),
        pieces=pieces,
        settings=MeasureSettings(arguments.seed, subject.window),
        skip_first=arguments.skip_first,
        comparisons=tuple(partial(hf_subject, Path(name), device) for name in arguments.compare),
        notes=tuple(notes),
        command=command,
    )


def hf_subject(folder: Path, device: torch.device) -> Subject:
    """The weights of a folder, in float32 whatever they are stored in."""
    import transformers

    config = _config(folder)
    _require_safetensors(folder)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:  # transformers raises many kinds on foreign or damaged folders
        raise InputError(f"--hf: {folder} cannot be loaded: {_one_line(error)}") from None
    return _subject(model, config, folder.resolve().name, _tokenizer_sha256(folder), device)


def hf_twin(folder: Path, device: torch.device, seed: int) -> Subject:
    """The same architecture with the weights that transformers initialises it with."""
    import transformers

    config = _config(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return _subject(model, config, f"{folder.resolve().name}, untrained", _tokenizer_sha256(folder), device)


def _subject(model: Any, config: Any, name: str, tokenizer_sha256: str | None, device: torch.device) -> Subject:
    letters = layer_families(_text(config))
    base = model.base_model.to(device).eval()
    layers = find_layers(base, len(letters))
    return Subject(
        name=name,
        letters=letters,
        d_model=_text(config).hidden_size,
        vocab_size=_text(config).vocab_size,
        forward=partial(hf_states, base, layers, device),
        tokenizer_sha256=tokenizer_sha256,
    )


@torch.no_grad()
def hf_states(
    base: nn.Module, layers: nn.ModuleList, device: torch.device, tokens: Tensor, lengths: Tensor
) -> list[Tensor]:
    """The model's own hidden states: input of the first layer, output of every layer, and after the final norm.

    transformers replaces the last layer's output by the normed one, so layers are listened to. Rows are padded at the
    end, which a causal model does not see.
    """
    found: list[Tensor] = []
    hooks: list[Any] = [layers[0].register_forward_pre_hook(partial(_keep_input, found), with_kwargs=True)]
    hooks += [layer.register_forward_hook(partial(_keep_output, found)) for layer in layers]
    try:
        output = base(input_ids=tokens.to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if len(found) != len(layers) + 1:
        raise InputError(f"--hf: expected the states of {len(layers)} layers, {len(found) - 1} came")
    return [*found, output.last_hidden_state]


def find_layers(base: nn.Module, n_layers: int) -> nn.ModuleList:
    """The list of decoder layers: the outermost ModuleList of that length. Raises InputError if there is none."""
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise InputError(f"--hf: {type(base).__name__} has no list of {n_layers} layers that its config speaks of")


def _keep_input(found: list[Tensor], module: nn.Module, args: tuple, kwargs: dict) -> None:
    found.append((args[0] if args else kwargs["hidden_states"]).detach())


def _keep_output(found: list[Tensor], module: nn.Module, args: tuple, output: Any) -> None:
    found.append((output[0] if isinstance(output, tuple) else output).detach())


def _pieces(folder: Path, config: Any, arguments: argparse.Namespace) -> tuple[Pieces, list[str]]:
    text_config = _text(config)
    longest = min(arguments.tokens, getattr(text_config, "max_position_embeddings", None) or arguments.tokens)
    shape = (text_config.vocab_size, longest, arguments.documents)
    notes = [f"pieces are cut to {longest} tokens, the model's longest"] if longest < arguments.tokens else []
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        note = "NO TOKENIZER in the folder: rows of random token ids were measured, which says nothing about text"
        generator = np.random.default_rng(arguments.seed)
        rows = [generator.integers(0, shape[0], longest) for _ in range(arguments.documents)]
        return from_tokens(rows, "rows of random tokens", None, *shape), [*notes, note]
    tokenizer = _tokenizer(folder)
    if arguments.data:
        paths = find_files(tuple(arguments.data), "--data")
        texts, source = [document.text for path in paths for document in read_file(path)], ", ".join(arguments.data)
    else:
        texts, source = [document.text for document in InstalledPython().documents()], "installed Python files"
        notes.append("the text is the Python source on this machine, which the model may have been trained on")
        texts = [texts[i * len(texts) // arguments.documents] for i in range(min(arguments.documents, len(texts)))]
        texts = [text[: 16 * longest] for text in texts]
    encoded = [np.array(tokenizer(text)["input_ids"], np.int64) for text in texts]
    largest = max((int(ids.max()) for ids in encoded if len(ids)), default=0)
    if largest >= shape[0]:
        raise InputError(f"--hf: the tokenizer gives id {largest}, the model has {shape[0]}: not of the same model")
    decode: Callable[[list[int]], str] = tokenizer.decode
    return from_tokens(encoded, f"documents of {source}", decode, *shape, _tokenizer_sha256(folder)), notes


def _require_safetensors(folder: Path) -> None:
    """transformers unpickles (restrictedly) whatever file an index names, even where only safetensors are wanted."""
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"--hf: {folder} has no *.safetensors; other formats are not read (pickles can run code)")
    for index in folder.glob("*.safetensors.index.json"):
        try:
            names = {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(f"--hf: {index} is not readable") from None
        foreign = sorted(name for name in names if not name.endswith(".safetensors"))
        if foreign:
            raise InputError(f"--hf: {index} names {foreign[0]}; only *.safetensors are read (pickles can run code)")


def _tokenizer(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"--hf: the tokenizer of {folder} cannot be loaded: {_one_line(error)}") from None


def _tokenizer_sha256(folder: Path) -> str | None:
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            return hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return None


def _config(folder: Path) -> Any:
    if importlib.util.find_spec("transformers") is None:
        raise InputError("--hf: needs the transformers package: .venv/bin/pip install transformers torch==2.13.0")
    import transformers

    if not folder.is_dir():
        raise InputError(f"--hf: {folder}: no such folder (names on a hub are not looked up: give a local folder)")
    if not (folder / "config.json").is_file():
        hint = "; it is a run: leave --hf out" if (folder / "config.yaml").is_file() else ""
        raise InputError(f"--hf: {folder} is no model folder (no config.json){hint}")
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"--hf: {folder}/config.json is not readable: {_one_line(error)}") from None


def _text(config: Any) -> Any:
    """The language model's part of a config that may have several."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
