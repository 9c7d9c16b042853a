"""A grid file: base config + named arms x axes x seeds -> cells, every one of them validated before any starts."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from errors import InputError, nearest, require, require_choice
from scripts.ablate.checks import check_answers, check_axes, check_different, check_metrics, check_pairs, check_run_ids
from scripts.ablate.expression import Expression
from scripts.ablate.space import Search, Trial, read_search, require_whole
from training.config import RunConfig, load_config

GRIDS = Path("ablations")
KEYS = (
    "base",
    "overrides",
    "baseline",
    "arms",
    "axes",
    "seeds",
    "filters",
    "evaluate",
    "metrics",
    "checkpoints",
    "question",
    "search",
)
NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,63}"


@dataclass(frozen=True)
class Evaluation:
    """What is measured after a run, beside the receipt. answers: none, or a split whose prompts are answered."""

    answers: str = "none"
    limit: int | None = None
    # Held-out rows for the cheap curvature and collapse numbers.
    curvature_rows: int = 8


@dataclass(frozen=True)
class Cell:
    """One run of a grid. point: axis name -> value. overrides: everything that is merged over the base."""

    arm: str
    seed: int
    point: dict[str, Any]
    overrides: tuple[str, ...]
    config: RunConfig = field(repr=False, compare=False)

    @property
    def run_id(self) -> str:
        parts = [self.arm, *(f"{name}={value}" for name, value in self.point.items()), f"s{self.seed}"]
        return "-".join(re.sub(r"[^A-Za-z0-9_.+=-]+", "_", part) for part in parts)

    @property
    def names(self) -> dict[str, Any]:
        """What a filter may ask for."""
        return {"arm": self.arm, "seed": self.seed, **self.point}

    @property
    def sha256(self) -> str:
        return self.config.sha256


@dataclass(frozen=True)
class Grid:
    """name: of its folder. metrics: column -> higher | lower (is better); the first one decides.

    search: what is searched, if anything; each trial so far is an arm of its own.
    """

    name: str
    path: Path
    question: str
    base: str
    baseline: str
    arms: tuple[str, ...]
    axes: dict[str, str]
    evaluate: Evaluation
    metrics: dict[str, str]
    checkpoints: str
    cells: tuple[Cell, ...]
    search: Search | None = None

    @property
    def folder(self) -> Path:
        return GRIDS / self.name

    def select(self, filters: Iterable[str]) -> Grid:
        """Only the cells for which every expression holds. Raises InputError if none is left."""
        cells = self.cells
        for text in filters:
            keep = Expression(text)
            cells = tuple(cell for cell in cells if keep(cell.names))
            require(bool(cells), "--filter", f"{text!r} leaves none of the {len(self.cells)} runs of {self.path}")
        return dataclasses.replace(self, cells=cells)


def load_grid(
    path: str | Path,
    threads: int | None = None,
    trials: Iterable[Trial] = (),
    configs: dict[tuple[str, ...], RunConfig] | None = None,
) -> Grid:
    """Reads and expands a grid file and validates every run of it. threads: of each run; None: what the config says.
    trials: of its search, so far. configs: those read by an earlier call (by their overrides), and a place for more.

    Seeds are the outermost loop: whatever part of a grid is finished is as balanced as can be. Raises InputError.
    """
    path = Path(path)
    content = _read(path)
    arms: dict[str, dict[str, Any]] = {str(arm): dict(values or {}) for arm, values in content["arms"].items()}
    evaluate = _evaluation(content.get("evaluate") or {}, path)
    metrics = _metrics(content.get("metrics") or {"val_bits_per_byte": "lower"}, path)
    common = dict(content.get("overrides") or {})
    if threads is not None:
        common["threads"] = threads
    configs = {} if configs is None else configs  # read once for all seeds

    def config_of(settings: Mapping[str, Any]) -> RunConfig:
        return _config(str(content["base"]), _overrides({**common, **settings}), configs)

    search = read_search(content, evaluate.answers, metrics, path, config_of)
    for trial in trials:
        require(trial.name not in arms or arms[trial.name] == trial.values, f"{path}: arms", f"{trial.name} is taken")
        arms[trial.name] = dict(trial.values)
    for arm in arms:
        require(bool(re.fullmatch(NAME, arm)), f"{path}: arms", f"expected a plain name, got {arm!r}")
    baseline = str(next(iter(arms)) if content.get("baseline") is None else content["baseline"])
    require_choice(f"{path}: baseline", baseline, arms)
    seeds = list(content["seeds"])
    for seed in seeds:
        require_whole(f"{path}: seeds", seed, 0)
    require(len(set(seeds)) == len(seeds), f"{path}: seeds", f"one is given twice in {seeds}")
    axes = _axes(content.get("axes") or {}, path)
    check_axes(arms, (key for key, _ in axes.values()), path)
    keep = [Expression(text, f"{path}: filters") for text in content.get("filters") or []]
    cells = []
    for seed in seeds:
        for values in product(*(values for _, values in axes.values())):
            point = dict(zip(axes, values))
            for arm, changes in arms.items():
                if not all(expression({"arm": arm, "seed": seed, **point}) for expression in keep):
                    continue
                settings = {**common, **changes, **{axes[name][0]: value for name, value in point.items()}}
                cells.append(_cell(path, str(content["base"]), arm, seed, point, settings, configs))
    require(bool(cells), f"{path}: filters", "leave none of the runs")
    grid = Grid(
        path.stem,
        path,
        str(content.get("question") or ""),
        str(content["base"]),
        baseline,
        tuple(arms),
        {name: key for name, (key, _) in axes.items()},
        evaluate,
        metrics,
        str("keep" if content.get("checkpoints") is None else content["checkpoints"]),
        tuple(cells),
        search,
    )
    require_choice(f"{path}: checkpoints", grid.checkpoints, ["keep", "remove"])
    check_run_ids(grid)
    check_pairs(grid)
    check_different(grid)
    check_answers(grid)
    check_metrics(grid)
    return grid


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        siblings = [str(p) for p in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
        raise InputError(f"{path}: no such grid file{nearest(str(path), siblings)}")
    try:
        loaded = OmegaConf.load(path)
        content = OmegaConf.to_container(loaded, resolve=True)
    except Exception as error:  # the YAML parser raises many kinds
        raise InputError(f"{path}: not a YAML file: {str(error).partition(chr(10))[0]}") from None
    if not isinstance(loaded, DictConfig) or not isinstance(content, dict):
        raise InputError(f"{path}: expected keys and values at the top level")
    for key in map(str, content):
        require(key in KEYS, f"{path}", f"unknown key {key}{nearest(key, KEYS)}; expected {', '.join(KEYS)}")
    for key, kind, what in (
        ("base", str, "the path of a config"),
        ("arms", dict, "a name for each arm, and its overrides below it"),
        ("seeds", list, "a list of whole numbers"),
    ):
        require(bool(content.get(key)), f"{path}", f"{key} is missing; expected {what}")
        require(isinstance(content[key], kind), f"{path}: {key}", f"expected {what}, got {content[key]!r}")
    for key in ("overrides", "axes", "evaluate", "metrics", "search"):
        value = content.get(key)
        require(value is None or isinstance(value, dict), f"{path}: {key}", f"expected keys and values, got {value!r}")
    filters = content.get("filters")
    fine = filters is None or (isinstance(filters, list) and all(isinstance(text, str) for text in filters))
    require(fine, f"{path}: filters", f"expected a list of expressions, got {filters!r}")
    for arm, values in content["arms"].items():
        fine = values is None or isinstance(values, dict)
        require(fine, f"{path}: arm {arm}", f"expected dotted overrides (key: value), got {values!r}")
    return {str(key): value for key, value in content.items()}


def _axes(axes: Mapping[str, Any], path: Path) -> dict[str, tuple[str, list[Any]]]:
    """Short name (the key's last part) -> (dotted key, values)."""
    found: dict[str, tuple[str, list[Any]]] = {}
    for key, values in axes.items():
        name = str(key).rsplit(".", 1)[-1]
        require(
            isinstance(values, list) and bool(values),
            f"{path}: axes.{key}",
            f"expected a list of values, got {values!r}",
        )
        require(
            len({str(value) for value in values}) == len(values),
            f"{path}: axes.{key}",
            f"a value is given twice in {values}",
        )
        require(name not in found and name not in ("arm", "seed"), f"{path}: axes.{key}", f"the name {name} is taken")
        found[name] = (str(key), values)
    return found


def _cell(
    path: Path,
    base: str,
    arm: str,
    seed: int,
    point: dict[str, Any],
    settings: Mapping[str, Any],
    configs: dict[tuple[str, ...], RunConfig],
) -> Cell:
    where = f"{path}: arm {arm}"
    for key in ("seed", "run_id", "resume"):
        require(key not in settings, where, f"{key} is the grid's own; take it out")
    overrides = _overrides(settings)
    try:
        config = copy.deepcopy(_config(base, overrides, configs))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    config.seed = seed
    return Cell(arm, seed, point, (*overrides, f"seed={seed}"), config)


def _config(base: str, overrides: tuple[str, ...], configs: dict[tuple[str, ...], RunConfig]) -> RunConfig:
    """Validated, and kept in `configs`."""
    if overrides not in configs:
        config = load_config(base, overrides)
        config.validate()
        configs[overrides] = config
    return configs[overrides]


def _overrides(settings: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{key}={_text(value)}" for key, value in settings.items())


def _text(value: Any) -> str:
    """As an override: what YAML would write on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_text(item) for item in value) + "]"
    return str(value)


def _evaluation(given: Mapping[str, Any], path: Path) -> Evaluation:
    known = [f.name for f in dataclasses.fields(Evaluation)]
    for key in given:
        require_choice(f"{path}: evaluate", str(key), known)
    evaluation = Evaluation(**{str(key): value for key, value in given.items()})
    require_choice(f"{path}: evaluate.answers", str(evaluation.answers), ["none", "validation", "test", "train"])
    if evaluation.limit is not None:
        require_whole(f"{path}: evaluate.limit", evaluation.limit, 1)
    require_whole(f"{path}: evaluate.curvature_rows", evaluation.curvature_rows, 0)
    return evaluation


def _metrics(given: Mapping[str, Any], path: Path) -> dict[str, str]:
    for name, direction in given.items():
        require_choice(f"{path}: metrics.{name}", str(direction), ["higher", "lower"])
    return {str(name): str(direction) for name, direction in given.items()}
