"""The run folder: which stages are done, and the files they left."""

import json
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from resconv.errors import ResConvError, RunError
from resconv.files import OURS, digest, sweep, write_text
from resconv.json_files import Upgrades, read_json, to_json, to_plain
from resconv.train.checkpoints import CHECKPOINT_FILES

from . import exchange
from .config import Config
from .lock import locked
from .mark import MARK, Mark, Record
from .metrics import HISTORY_UPGRADES, METRICS_VERSION, History, Metrics

__all__ = ["RunFolder", "from_prune", "log_files"]

_STAGES = "stages.json"
_CONFIG = "config.json"
_METRICS = "metrics.json"
_SCALES = "scales.json"
_LATENCY = "latency.json"
# Written before anything was trained.
_FIRST = (_CONFIG, _STAGES, _METRICS, _LATENCY)
# The metrics that every stage adds to.
_COMMON = {"seconds", "warnings"}
_TRAINED = ("dense", "sparse", "finetune", "control")
T = TypeVar("T")
# Settings by their names, in groups; without those in older versions.
_Value = bool | int | float | str | list[float] | None
_Content = dict[str, _Value | dict[str, _Value]]


class RunFolder:
    """A folder with ``config.json``, ``metrics.json``, the networks and the logs of a run.

    What makes it a run folder is its mark (see mark.py). It names the files that are the run's;
    others in the folder are never changed or deleted, nor is anything behind a link.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.added: set[str] = set()  # the metrics of the stage that runs

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @classmethod
    def begin(cls, path: Path, config: Config, *, fresh: bool = False) -> "RunFolder":
        """Make the folder, or open it again when it holds a run of the same configuration.

        Settings under which nothing was made yet (a wrong path in them, say) give way to the new ones.
        So do those of finetuning: then what was trained before it stays, and pruning is done anew.

        With ``fresh``, where there is an earlier run, what comes back lies inside the folder, for
        :func:`exchange.complete` to put in its place when nothing more can be refused.

        Raises:
            RunError: it holds another run, or things that are no run, or it is in use.
        """
        cls.refuse(path, config, fresh=fresh)
        folder = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = error.strerror or str(error)
            raise RunError(f"{path} cannot be made: {why}. Choose another --out.") from error
        with folder.locked():
            exchange.go_on(path)
            folder.sweep()
            if folder.is_marked() and not folder.is_bare():
                if fresh:
                    new = cls(exchange.make_room(path))
                    new._start(config)
                    return new
                folder._refuse_others(config)
                if folder.config().differences(config, late=True):
                    folder.undo(from_prune(folder.done()))
            elif folder.is_marked() and not folder.holds(config):
                folder.remove((_METRICS, _LATENCY))  # of other settings
            folder._start(config)
        return folder

    @classmethod
    def refuse(cls, path: Path, config: Config, *, fresh: bool = False) -> None:
        """Refuse a folder that :meth:`begin` could not take, before anything is written.

        Raises:
            RunError: it cannot be made or written, is in use, or holds another run, or things that
                are no run.
        """
        _refuse_place(path)
        folder = cls(path)
        folder._refuse_foreign()
        if not folder.is_marked() or exchange.is_under_way(path):
            return
        with folder.locked():
            if not fresh and not folder.is_bare():
                folder._refuse_others(config)

    def _refuse_others(self, config: Config) -> None:
        if differences := self.config().differences(config):
            dense = self.path / "dense.safetensors"
            kept = f" (with --weights {dense} its dense net is taken along)"
            raise RunError(
                f"{self.path} holds a run with other settings ({'; '.join(differences)}). Choose "
                f"another --out{kept if dense.is_file() else ''}, or add --fresh to start anew."
            )

    def holds(self, config: Config) -> bool:
        """Return whether the folder was begun with these settings."""
        try:
            return self.is_marked() and not self.config().differences(config)
        except RunError:  # a damaged config.json
            return False

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open an existing run.

        Raises:
            RunError: there is none.
        """
        folder = cls(path)
        for name in (_CONFIG, MARK):
            if not (path / name).is_file():
                why = "it does not exist" if not path.exists() else f"it has no {name}"
                raise RunError(
                    f"{path} is no run folder: {why}. Make one with `resconv compress ... --out {path}`."
                )
        folder._refuse_links()
        return folder

    def _start(self, config: Config) -> None:
        if not self.is_marked():
            Mark.new().write(self.path)
        self.claim((_CONFIG, _STAGES, _METRICS, *(n for s in _TRAINED for n in log_files(s))))
        self.write_json(_CONFIG, config.content())

    def _refuse_foreign(self) -> None:
        path = self.path
        if path.is_symlink() and not path.exists():
            raise RunError(f"{path} is a link to nothing. Choose another --out.")
        if not path.is_dir():
            return
        if not self.is_marked() and not exchange.is_under_way(path):
            others = sorted(p.name for p in path.iterdir() if not p.name.startswith(OURS))
            if others:
                raise RunError(
                    f"{path} holds files but no run of resconv ({', '.join(others[:3])}"
                    f"{', ...' if len(others) > 3 else ''}; no {MARK}). They were not touched. "
                    "Choose another --out."
                )
        self._refuse_links()

    def _refuse_links(self) -> None:
        for place in (self.logs, *(self.logs / s for s in _TRAINED)):
            if place.is_symlink():
                raise RunError(
                    f"{place} is a link: what a run writes and deletes lies in its own folder. Remove "
                    "the link, or choose another --out."
                )

    def locked(self) -> AbstractContextManager[None]:
        """Own the folder for the time of a block (see lock.py)."""
        return locked(self.path)

    def sweep(self) -> None:
        """Remove what a killed process left half written."""
        for place in (self.path, self.logs, *(self.logs / s for s in _TRAINED)):
            sweep(place)

    def is_marked(self) -> bool:
        return (self.path / MARK).is_file()

    def mark(self) -> Mark:
        return Mark.read(self.path)

    def is_bare(self) -> bool:
        """Return whether a run was begun here but failed before an epoch of training was over."""
        mark = self.mark()
        made = (n for n in mark.files if n not in _FIRST and os.path.lexists(self.path / n))
        return not mark.stages and not any(made)

    def claim(self, names: Iterable[str]) -> None:
        """Note what is to be written, before it is.

        Raises:
            RunError: a file of that name is there which is not the run's.
        """
        mark = self.mark()
        new = [n for n in names if n not in mark.files]
        for name in new:
            if os.path.lexists(self.path / name):
                raise RunError(
                    f"{self.path / name} is not of this run, which would write over it. Move it "
                    "away, or choose another --out."
                )
        if new:
            mark.files += new
            mark.write(self.path)

    def remove(self, names: Iterable[str]) -> None:
        """Delete those of the named files that the run wrote; what lies behind a link stays."""
        own = set(self.mark().files)
        for name in names:
            path = self.path / name
            parents = list(path.parents)[: len(Path(name).parts) - 1]
            if name in own and not any(p.is_symlink() for p in parents):
                path.unlink(missing_ok=True)

    def config(self) -> Config:
        content = self.read_json(_CONFIG, _Content)
        try:
            return Config.from_content(content)
        except ResConvError as error:
            raise RunError(f"{self.path / _CONFIG}: {error}") from error

    def read_json(self, name: str, kind: type[T], upgrades: Upgrades | None = None) -> T:
        """Return what a file of the run holds, checked to be a ``kind``.

        Raises:
            RunError: it is missing, or damaged; the file and the field are named.
        """
        if not os.path.lexists(self.path / name):
            raise RunError(f"{self.path} has no {name}. Run the stage before it first.")
        return read_json(self.path / name, kind, RunError, upgrades)

    def write_json(self, name: str, content: Any) -> None:
        write_text(self.path / name, json.dumps(content, indent=2) + "\n")

    def history(self) -> History:
        return self.read_json(_SCALES, History, HISTORY_UPGRADES)

    def write_history(self, history: History) -> None:
        write_text(self.path / _SCALES, to_json(history, len(HISTORY_UPGRADES) + 1))

    def metrics(self) -> Metrics:
        if not os.path.lexists(self.path / _METRICS):
            return Metrics()
        try:
            return self.read_json(_METRICS, Metrics, upgrades=())
        except RunError as error:
            raise RunError(
                f"{error} Mend it, or delete the file: it holds figures alone, and `resconv prune "
                f"{self.path}` and `resconv measure {self.path}` write theirs anew."
            ) from error

    def add_metrics(self, **values: Any) -> None:
        self.added |= values.keys()
        self._write_metrics({**to_plain(self.metrics()), **values})

    def _write_metrics(self, values: dict[str, Any]) -> None:
        metrics = msgspec.convert(to_plain(values), Metrics)
        write_text(self.path / _METRICS, to_json(metrics, METRICS_VERSION))

    def done(self) -> list[str]:
        return list(self.mark().stages) if self.is_marked() else []

    def digests(self, names: Iterable[str]) -> dict[str, str]:
        """Return the SHA-256 of those of the named files that are there."""
        return {n: digest(self.path / n) for n in names if (self.path / n).is_file()}

    def finish(self, stage: str, record: Record) -> None:
        """Note that a stage is done, and what it read and wrote."""
        mark = self.mark()
        mark.stages.pop(stage, None)
        mark.stages[stage] = record
        mark.write(self.path)
        self.write_json(_STAGES, list(mark.stages))

    def amend(self, stage: str, wrote: Iterable[str], metrics: Iterable[str]) -> None:
        """Note what was written beside what a done stage left, so that it goes where that goes."""
        mark = self.mark()
        record = mark.stages[stage]
        mark.stages[stage] = msgspec.structs.replace(
            record,
            wrote=record.wrote | self.digests(wrote),
            metrics=sorted({*record.metrics, *metrics}),
        )
        mark.write(self.path)

    def forget_warnings(self, stages: Iterable[str]) -> None:
        """Drop what was said of stages that are about to be run."""
        gone, said = set(stages), self.metrics().warnings
        if gone & said.keys():
            self.add_metrics(warnings={s: texts for s, texts in said.items() if s not in gone})

    def undo(self, stages: Iterable[str], keep: Iterable[str] = ()) -> None:
        """Take back stages: what they alone wrote is deleted, and their metrics are struck out.

        Files in ``keep`` stay until they are written anew.
        """
        mark = self.mark()
        gone = [mark.stages.pop(s) for s in stages if s in mark.stages]
        if not gone:
            return
        mark.write(self.path)  # first: a stage that is not done may have files, but not otherwise
        self.write_json(_STAGES, list(mark.stages))
        left = mark.stages.values()
        kept = {*keep, *(n for r in left for n in (*r.wrote, *r.read))}
        self.remove(n for r in gone for n in r.wrote if n not in kept)
        counted = _COMMON.union(*(r.metrics for r in left))
        struck = {k for r in gone for k in r.metrics} - counted
        known = to_plain(self.metrics())
        self._write_metrics({k: v for k, v in known.items() if k not in struck})


def from_prune(done: list[str]) -> list[str]:
    """Return those of the done stages that depend on what is pruned and how that is trained on."""
    return [s for s in done if s not in ("dense", "sparse", "plan")]


def log_files(stage: str) -> tuple[str, ...]:
    """Return what a stage's training leaves below the run folder."""
    return tuple(f"logs/{stage}/{name}" for name in (*CHECKPOINT_FILES, "metrics.csv"))


def _refuse_place(path: Path) -> None:
    """Refuse a path where no folder can be made, or into which nothing can be written."""
    try:
        there = next(p for p in (path, *path.absolute().parents) if p.exists())
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}. Choose another --out.") from error
    if not there.is_dir():
        below = "" if there == path else f", and {path} would lie below it"
        raise RunError(f"{there} is a file{below}. Choose another --out.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RunError(f"{there} cannot be written ({path} was asked for). Choose another --out.")
