"""The run folder: which stages are done, and the files they left."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, TypeVar

from resconv.errors import RunError
from resconv.files import write_text
from resconv.json_files import read_json

from .config import Config
from .metrics import Metrics

__all__ = ["FROM_PRUNE", "RunFolder"]

_STAGES = "stages.json"
T = TypeVar("T")
# What is done anew where the plan, or what is done with it, changes.
FROM_PRUNE = ("prune", "finetune", "export", "measure", "report")


class RunFolder:
    """A folder with ``config.json``, ``metrics.json``, the networks and the logs of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path

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

        Raises:
            RunError: it holds another run, or things that are no run.
        """
        folder = cls(path)
        if path.is_file():
            raise RunError(f"{path} is a file. Choose another --out.")
        if path.is_dir() and any(path.iterdir()):
            if not (path / "config.json").is_file():
                raise RunError(f"{path} holds files but no run. Choose another --out.")
            if fresh:
                shutil.rmtree(path)
            elif not folder.is_bare():
                there = folder.config()
                if differences := there.differences(config):
                    raise RunError(
                        f"{path} holds a run with other settings ({'; '.join(differences)}). "
                        "Choose another --out, or add --fresh to start anew."
                    )
                if there.differences(config, late=True):
                    folder.unmark(FROM_PRUNE)
        path.mkdir(parents=True, exist_ok=True)
        folder.write_json("config.json", config.to_dict())
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open an existing run.

        Raises:
            RunError: there is none.
        """
        if not (path / "config.json").is_file():
            why = "it does not exist" if not path.exists() else "it has no config.json"
            raise RunError(
                f"{path} is no run folder: {why}. Make one with `resconv compress ... --out {path}`."
            )
        return cls(path)

    def is_bare(self) -> bool:
        """Return whether a run was begun here but refused before it made anything."""
        return {p.name for p in self.path.iterdir()} <= {"config.json", _STAGES} and not self.done()

    def config(self) -> Config:
        return self.read_json("config.json", Config)

    def read_json(self, name: str, kind: type[T]) -> T:
        """Return what a file of the run holds, checked to be a ``kind``.

        Raises:
            RunError: it is missing, or damaged; the file and the field are named.
        """
        if not os.path.lexists(self.path / name):
            raise RunError(f"{self.path} has no {name}. Run the stage before it first.")
        return read_json(self.path / name, kind, RunError)

    def write_json(self, name: str, content: Any) -> None:
        write_text(self.path / name, json.dumps(content, indent=2) + "\n")

    def metrics(self) -> dict[str, Any]:
        if not os.path.lexists(self.path / "metrics.json"):
            return {}
        try:
            return dict(self.read_json("metrics.json", Metrics))
        except RunError as error:
            raise RunError(
                f"{error} Mend it, or delete the file: it holds figures alone, and `resconv prune "
                f"{self.path}` and `resconv measure {self.path}` write theirs anew."
            ) from error

    def add_metrics(self, **values: Any) -> None:
        self.write_json("metrics.json", {**self.metrics(), **values})

    def done(self) -> list[str]:
        if not os.path.lexists(self.path / _STAGES):
            return []
        try:
            return self.read_json(_STAGES, list[str])
        except RunError as error:
            raise RunError(
                f'{error} It is a list of the stages that are done, such as ["dense", "sparse"]: '
                "write it anew."
            ) from error

    def mark(self, stage: str) -> None:
        self.write_json(_STAGES, [*[s for s in self.done() if s != stage], stage])

    def unmark(self, stages: tuple[str, ...]) -> None:
        self.write_json(_STAGES, [s for s in self.done() if s not in stages])
