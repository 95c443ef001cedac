"""The run folder: which stages are done, and the files they left."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resconv.errors import RunError
from resconv.files import write_text

from .config import Config

__all__ = ["FROM_PRUNE", "RunFolder"]

_STAGES = "stages.json"
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
        cls.refuse(path, config, fresh=fresh)
        folder = cls(path)
        if path.is_dir() and any(path.iterdir()):
            if fresh:
                shutil.rmtree(path)
            elif folder.is_bare():
                if not folder.holds(config):
                    folder.clear()
            elif folder.config().differences(config, late=True):
                folder.unmark(FROM_PRUNE)
        path.mkdir(parents=True, exist_ok=True)
        folder.write_json("config.json", config.to_dict())
        return folder

    @classmethod
    def refuse(cls, path: Path, config: Config, *, fresh: bool = False) -> None:
        """Refuse a folder that :meth:`begin` could not take; nothing is written.

        Raises:
            RunError: it cannot be made or written, holds another run, or things that are no run.
        """
        _check_place(path)
        folder = cls(path)
        if not path.is_dir() or not any(path.iterdir()):
            return
        if not (path / "config.json").is_file():
            raise RunError(f"{path} holds files but no run. Choose another --out.")
        if fresh or folder.is_bare():
            return
        if differences := folder.config().differences(config):
            dense = path / "dense.safetensors"
            kept = f" (with --weights {dense} its dense net is taken along)"
            raise RunError(
                f"{path} holds a run with other settings ({'; '.join(differences)}). Choose another "
                f"--out{kept if dense.is_file() else ''}, or add --fresh to start anew."
            )

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
        """Return whether a run was begun here but failed before an epoch of training was over."""
        return not self.done() and not any(self.logs.glob("*/*.ckpt"))

    def holds(self, config: Config) -> bool:
        """Return whether the folder was begun with these settings."""
        if not (self.path / "config.json").is_file():
            return False
        try:
            return not self.config().differences(config)
        except RunError:
            return False

    def clear(self) -> None:
        """Take away what a bare run measured and logged for other settings."""
        for path in self.path.iterdir():
            if path.name == self.logs.name:
                shutil.rmtree(path)
            elif path.name in ("latency.json", "metrics.json"):
                path.unlink()

    def config(self) -> Config:
        return Config.from_dict(self.read_json("config.json"))

    def read_json(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RunError(f"{self.path} has no {name}. Run the stage before it first.") from error
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / name} cannot be read: {error}.") from error

    def write_json(self, name: str, content: Any) -> None:
        write_text(self.path / name, json.dumps(content, indent=2) + "\n")

    def metrics(self) -> dict[str, Any]:
        found = self.read_json("metrics.json") if (self.path / "metrics.json").is_file() else {}
        if not isinstance(found, dict):
            raise RunError(f"{self.path / 'metrics.json'} holds no metrics.")
        return found

    def add_metrics(self, **values: Any) -> None:
        self.write_json("metrics.json", {**self.metrics(), **values})

    def forget_warnings(self, stages: Sequence[str]) -> None:
        """Drop what was said of stages that are about to be run."""
        said = self.metrics().get("warnings")
        if said:
            self.add_metrics(warnings={s: texts for s, texts in said.items() if s not in stages})

    def done(self) -> list[str]:
        found = self.read_json(_STAGES) if (self.path / _STAGES).is_file() else []
        return [s for s in found if isinstance(s, str)] if isinstance(found, list) else []

    def mark(self, stage: str) -> None:
        self.write_json(_STAGES, [*[s for s in self.done() if s != stage], stage])

    def unmark(self, stages: tuple[str, ...]) -> None:
        self.write_json(_STAGES, [s for s in self.done() if s not in stages])


def _check_place(path: Path) -> None:
    """Refuse a path where no folder can be made, or into which nothing can be written."""
    try:
        there = next(p for p in (path, *path.absolute().parents) if p.exists())
    except OSError as error:
        raise RunError(f"--out {path}: {error.strerror}. Choose another --out.") from error
    if not there.is_dir():
        what = f"{path} is a file" if there == path else f"{there} is a file, not a folder"
        raise RunError(f"{what}. Choose another --out.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RunError(f"{there} cannot be written ({path} was asked for). Choose another --out.")
