"""RunConfig: one YAML file plus dotted overrides -> typed, validated dataclasses, before anything is built."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.config import DataConfig
from errors import InputError, nearest, require, require_choice, require_number
from losses.objective import STPConfig
from model.hybrid import ModelConfig
from model.pattern import parse_pattern
from training.checkpoint import CheckpointConfig
from training.distributed import ParallelConfig, processes, require_processes
from training.health import HealthConfig
from training.metrics import WandbConfig
from training.optimizer import OptimizerConfig
from training.schedule import ScheduleConfig


@dataclass
class TrainConfig:
    # The budget: loss-bearing tokens over the whole run (labels that count, each once).
    tokens: int = 1_500_000
    # Rows of data.sequence_length tokens per optimizer step, over all ranks and micro-batches.
    batch_rows: int = 8
    # batch_rows is split into this many micro-batches, whose gradients add up before one update.
    accumulation: int = 1
    # none: eager; blocks: torch.compile each block.
    compile: str = "none"
    # Steps between two progress and metrics lines, and between two expensive measurements (gradient ratios).
    log_every: int = 10
    probe_every: int = 100
    # Steps between two measurements of curvature, rank and norms per block family, on the first rows of a step.
    curvature_every: int = 50
    # A step whose loss or gradient is not finite is skipped and counted; this many in a row stop the run.
    max_skipped_steps: int = 5

    def validate(self, path: str = "train") -> None:
        for name in ("tokens", "batch_rows", "accumulation", "log_every", "probe_every", "curvature_every"):
            require_number(f"{path}.{name}", getattr(self, name), 1)
        require_number(f"{path}.max_skipped_steps", self.max_skipped_steps, 1)
        require(
            self.batch_rows % self.accumulation == 0,
            f"{path}.accumulation",
            f"{self.batch_rows} rows do not split into {self.accumulation} equal micro-batches",
        )
        require_choice(f"{path}.compile", self.compile, ["none", "blocks"])


@dataclass
class ValidationConfig:
    # Share of the token budget between two validations; the last step always validates.
    every_fraction: float = 0.2
    # Held-out rows per validation, at most.
    rows: int = 128
    # A sample of this many tokens is printed with every validation; 0 = none.
    sample_tokens: int = 120
    sample_prompt: str = "def "
    sample_temperature: float = 0.7

    def validate(self, path: str = "validation") -> None:
        require_number(f"{path}.every_fraction", self.every_fraction, 0.0, 1.0, exclusive=True)
        require_number(f"{path}.rows", self.rows, 1)
        require_number(f"{path}.sample_tokens", self.sample_tokens, 0)
        require_number(f"{path}.sample_temperature", self.sample_temperature, 0.0)


@dataclass
class RunConfig:
    """A whole run. `validate` raises InputError naming the key; nothing is built before it has passed."""

    # Name of the run folder under runs/; null = config name and time.
    run_id: str | None = None
    # auto: continue the newest unfinished run of this very config, else start; never: start; or a run id.
    resume: str = "auto"
    # A run id or checkpoint folder whose weights to start from (data, gate and optimizer are new).
    init_from: str | None = None
    seed: int = 0
    # auto | cpu | cuda
    device: str = "auto"
    # auto: bf16 autocast where the device has it, else fp32; or bf16 | fp32. Weights and optimizer stay fp32.
    precision: str = "auto"
    # Torch threads; null = all cores.
    threads: int | None = None
    # default, or tuned: glibc keeps freed memory, which saves page faults on tensors above 32 MB.
    malloc: str = "default"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stp: STPConfig = field(default_factory=STPConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def validate(self) -> list[str]:
        """Returns warnings; raises InputError for what cannot work."""
        require_choice("device", self.device, ["auto", "cpu", "cuda"])
        require_choice("precision", self.precision, ["auto", "bf16", "fp32"])
        require_choice("malloc", self.malloc, ["default", "tuned"])
        require_number("seed", self.seed, 0)
        require(self.threads is None or self.threads > 0, "threads", f"expected at least 1, got {self.threads}")
        if self.run_id is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,127}", self.run_id):
            raise InputError(f"run_id: expected a plain folder name (letters, digits, _ . + = -), got {self.run_id!r}")
        pattern = parse_pattern(self.model.pattern, self.model.depth)
        for section in (
            "model",
            "data",
            "train",
            "optimizer",
            "schedule",
            "validation",
            "checkpoint",
            "parallel",
            "health",
            "wandb",
        ):
            getattr(self, section).validate(section)
        self.require_ranks(processes())
        warnings = list(pattern.warnings)
        warnings += self.stp.validate("stp", pattern.letters, self.train.tokens, self.data.sequence_length)
        return warnings

    def require_ranks(self, ranks: int) -> None:
        """Raises InputError unless so many processes can share this run."""
        require_processes(self.parallel, ranks)
        rows, parts = self.train.batch_rows, self.train.accumulation
        problem = f"{rows} rows do not split over {ranks} ranks and {parts} micro-batches"
        require(rows % (ranks * parts) == 0, "train.batch_rows", f"{problem}; expected a multiple of {ranks * parts}")

    @property
    def sha256(self) -> str:
        """Identity of the experiment: everything but the run's name and how it was started."""
        return config_sha256(dataclasses.asdict(self))

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(self)))


def _is_manner(key: str, value: Any) -> bool:
    """How and where a run is done, not what: its name, its processes and its micro-batches. May change on a resume."""
    if key == "parallel.gather" and value != "fp32":
        return False  # rounded weights make another run
    return key in ("run_id", "resume", "train.accumulation") or key.startswith("parallel.")


def config_sha256(merged: dict[str, Any]) -> str:
    """Of a merged config as plain values (also one read back from a run folder's config.yaml)."""
    return hashlib.sha256(json.dumps(_identity(merged), sort_keys=True).encode()).hexdigest()


def _identity(merged: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in _flatten(merged) if not _is_manner(key, value)}


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads a YAML file, merges `a.b=value` overrides over it, and returns it typed (not yet validated).

    Raises InputError: no such file, not YAML, unknown key (with the nearest valid one), wrong type.
    """
    path = Path(path)
    if not path.is_file():
        siblings = [str(p) for p in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
        raise InputError(f"{path}: no such config file{nearest(str(path), siblings)}")
    try:
        from_file = OmegaConf.load(path)
    except Exception as error:  # the YAML parser raises many kinds
        raise InputError(f"{path}: not a YAML file: {_one_line(error)}") from None
    if not isinstance(from_file, DictConfig):
        raise InputError(f"{path}: expected keys and values at the top level")
    _check_keys(from_file, RunConfig, str(path))
    return merge(from_file, overrides, str(path))


def merge(base: DictConfig | RunConfig, overrides: Iterable[str], source: str = "config") -> RunConfig:
    """Applies dotted overrides to a base config. Raises InputError like `load_config`."""
    overrides = list(overrides)
    for item in overrides:
        if "=" not in item:
            raise InputError(f"{item}: expected an override of the form key=value")
        _check_path(item.split("=", 1)[0])
    try:
        from_dots = OmegaConf.from_dotlist(overrides)
    except Exception as error:
        raise InputError(f"{' '.join(overrides)}: not valid overrides: {_one_line(error)}") from None
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), base, from_dots)
        return cast(RunConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or source
        raise InputError(f"{key}: {_one_line(error)}") from None


def differing_keys(a: RunConfig, b: RunConfig) -> list[str]:
    """Dotted keys of the identity whose values differ."""
    one, other = _identity(dataclasses.asdict(a)), _identity(dataclasses.asdict(b))
    return [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _schema(config: type) -> dict[str, type | None]:
    """Field name -> the nested dataclass, or None for a leaf."""
    instance = config()
    children = ((f.name, getattr(instance, f.name)) for f in fields(config))
    return {name: type(child) if is_dataclass(child) else None for name, child in children}


def _check_keys(tree: DictConfig, config: type, source: str, prefix: str = "") -> None:
    schema = _schema(config)
    for key in tree:
        full = f"{prefix}{key!s}"
        if key not in schema:
            raise InputError(f"{source}: unknown key {full}{_nearest_key(full)}")
        nested = schema[str(key)]
        if nested is not None:
            try:
                child = tree[key]
            except OmegaConfBaseException as error:  # an interpolation that leads nowhere
                raise InputError(f"{source}: {full}: {_one_line(error)}") from None
            if not isinstance(child, DictConfig):
                raise InputError(f"{source}: {full}: expected keys below it, got {child!r}")
            _check_keys(child, nested, source, f"{full}.")


def _check_path(path: str) -> None:
    """Raises InputError unless a dotted path names a leaf (or an entry of a mapping leaf)."""
    node: type | None = RunConfig
    for part in path.split("."):
        if node is None:
            return  # below a leaf: the type check of the merge judges it
        schema = _schema(node)
        if part not in schema:
            raise InputError(f"unknown key {path}{_nearest_key(path)}")
        node = schema[part]
    if node is not None:
        raise InputError(f"{path}: is a section, not a value; its keys are {', '.join(_schema(node))}")


def _all_keys(config: type = RunConfig, prefix: str = "") -> Iterator[str]:
    for name, nested in _schema(config).items():
        if nested is None:
            yield f"{prefix}{name}"
        else:
            yield from _all_keys(nested, f"{prefix}{name}.")


def _nearest_key(key: str) -> str:
    """The nearest valid key: by its whole path, or by its last part alone when that was misplaced."""
    keys = list(_all_keys())
    same_leaf = [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return f" (did you mean {same_leaf[0]!r}?)" if len(same_leaf) == 1 else nearest(key, keys)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
