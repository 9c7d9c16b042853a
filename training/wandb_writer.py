"""wandb as a second writer: imported on use, never trusted. Whatever it raises is reported once and ends only it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol


class WandbSettings(Protocol):
    """What this module reads of training.metrics.WandbConfig."""

    mode: str
    project: str
    entity: str | None
    name: str | None
    tags: list[str]


class WandbWriter:
    """A wandb run with a fixed id, so that a resumed run continues the same one.

    The history follows metrics.jsonl exactly. offline: a new folder gets the whole history by `replay`, and the
    folders of earlier starts (a prefix of it, plus steps that were lost) are removed. online: the server's run is
    resumed and gets what it lacks; it ignores what it has.
    """

    def __init__(
        self,
        folder: Path,
        run_id: str,
        config: WandbSettings,
        run_config: dict[str, Any],
        message: Callable[[str], None],
    ) -> None:
        self.message = message
        self._run: Any = None
        try:
            import wandb

            mode: Any = config.mode
            earlier = list((folder / "wandb").glob("offline-run-*")) if config.mode == "offline" else []
            self._run = wandb.init(
                mode=mode,
                project=config.project,
                entity=config.entity,
                name=config.name or run_id,
                tags=list(config.tags) or None,
                id=run_id,
                resume="allow" if config.mode == "online" else None,
                dir=str(folder),
                config=run_config,
                settings=wandb.Settings(console="off", silent=True, init_timeout=60, x_disable_stats=True),
            )
            self._run.define_metric("*", step_metric="step")
            mine = Path(str(getattr(self._run, "dir", ""))).parent.name  # of the same second: the same name
            for path in earlier:
                if path.name != mine:
                    shutil.rmtree(path, ignore_errors=True)
        except (Exception, SystemExit) as error:
            self._fail(error)

    @property
    def alive(self) -> bool:
        return self._run is not None

    def replay(self, records: Iterable[dict[str, Any]]) -> None:
        """Gives wandb the records that it lacks; those of steps that it has are skipped."""
        if self._run is None:
            return
        try:
            known = int(getattr(self._run, "starting_step", 0) or 0)
        except (TypeError, ValueError):
            known = 0
        for record in records:
            if record["step"] >= known:
                self.log(record)

    def log(self, record: dict[str, Any]) -> None:
        if self._run is None:
            return
        try:
            self._run.log({name: value for name, value in record.items() if value is not None}, step=record["step"])
        except (Exception, SystemExit) as error:
            self._fail(error)

    def finish(self, summary: dict[str, Any]) -> None:
        if self._run is None:
            return
        try:
            self._run.summary.update(summary)
            self._run.finish()
        except (Exception, SystemExit) as error:
            self._fail(error)
        self._run = None

    def _fail(self, error: BaseException) -> None:
        text = (str(error).strip().splitlines() or [""])[0]
        run, self._run = self._run, None
        with contextlib.suppress(Exception):  # a bell in a broken tower: the run goes on whatever happens here
            self.message(f"wandb: {type(error).__name__}: {text}; the run goes on with metrics.jsonl alone")
        with contextlib.suppress(Exception, SystemExit):
            if run is not None:
                run.finish(exit_code=1)
