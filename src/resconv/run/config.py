"""What a run is asked to do: its settings (see settings.py) in groups, and what follows from them."""

from typing import Any, TypeVar

import msgspec

from resconv.errors import BudgetError, RunError
from resconv.planning.budget import Budget

from .settings import (
    GROUPS,
    Data,
    Deployment,
    Net,
    Setting,
    Target,
    Training,
    kinds,
    settings,
)

__all__ = ["Config", "Data", "Deployment", "Net", "Target", "Training"]

_VERSION = 2
_EPOCHS = {"digits": (12, 10, 0)}
_DEFAULT_EPOCHS = (30, 20, 10)
_RATES = {"scratch": 0.1, "transfer": 1e-3}
T = TypeVar("T")


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of a run; JSON in ``config.json``. None means: the default for the data.

    Example:
        >>> from resconv.run.config import Config, Data, Net, Target
        >>> config = Config(net=Net(model="resnet20"), data=Data(source="digits"), target=Target(macs=0.5))
        >>> config == Config.of(model="resnet20", data="digits", macs=0.5)
        True
    """

    net: Net
    data: Data
    target: Target = Target()
    training: Training = Training()
    deployment: Deployment = Deployment()
    version: int = _VERSION

    def __post_init__(self) -> None:
        faults = [fault for setting in settings() for fault in setting.faults(setting.of(self))]
        if faults:
            raise RunError("; ".join(faults) + ".")
        for name, kind in GROUPS.items():  # made by hand, their types were not looked at
            _converted(msgspec.to_builtins(getattr(self, name)), kind, name)
        kinds(self.target.units, "units")
        training = self.training
        if self.from_random and training.distill:
            raise RunError(
                "distill=True with epochs=0: there is no dense net to learn from. Give its weights, or "
                "more epochs to train it."
            )
        if training.hints and not training.distill:
            raise RunError(
                "hints=True is about what the dense net shows as a teacher: add distill=True."
            )
        asked = [
            f"{s.name}={s.of(self)!r}"
            for s in settings()
            if s.group == "deployment" and s.of(self) != s.default
        ]
        if asked and self.target.latency is None and self.target.latency_ms is None:
            raise BudgetError(
                f"{' and '.join(asked)} says how a latency is measured, but no latency is limited; add "
                "latency_ms=8 or latency=0.5."
            )
        if self.has_target():
            self._budget()

    @classmethod
    def of(cls, /, **values: Any) -> "Config":
        """Make one of settings by their names, without their groups: ``Config.of(model=..., data=...)``.

        Raises:
            RunError: a name is unknown or missing, or a value is of another type.
            ResConvError: values make no sense.
        """
        known = {s.name: s for s in settings()}
        if unknown := [n for n in values if n not in known]:
            raise RunError(f"There is no setting {', '.join(map(repr, unknown[:6]))}.")
        groups: dict[str, Any] = {"net": {}, "data": {}}
        for name, value in values.items():
            groups.setdefault(known[name].group, {})[known[name].field] = value
        return cls.from_content(groups)

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> "Config":
        """Make one of what ``config.json`` holds, also of an older version (without groups).

        Raises:
            RunError: it holds something else, or is of a newer version.
            ResConvError: values make no sense.
        """
        if "net" not in content and "model" in content:  # of version 1
            defaults = {"devices": "auto", "lr": 0.1}  # which were written down
            old = {k: v for k, v in content.items() if k not in defaults or defaults[k] != v}
            if old.get("units") == "all":
                old["units"] = "layers,blocks"  # there were no other kinds
            return cls.of(**old)
        version = content.get("version", _VERSION)
        if isinstance(version, int) and version > _VERSION:
            raise RunError(f"of version {version}, and this resconv reads {_VERSION}.")
        faults = [
            fault
            for s in settings()
            if s.choices and isinstance(group := content.get(s.group), dict)
            for fault in s.faults(group.get(s.field))
        ]
        if faults:
            raise RunError("; ".join(faults) + ".")
        return _converted(content, cls)

    def content(self) -> dict[str, Any]:
        """Return what ``config.json`` holds of it."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found

    def values(self) -> dict[str, Any]:
        """Return the settings by their names, without their groups."""
        return {s.name: s.of(self) for s in settings()}

    @property
    def from_random(self) -> bool:
        """Whether sparse training starts from random weights, with no dense net before it."""
        net = self.net
        return net.weights is None and not net.is_pretrained and self.training.epochs == 0

    @property
    def recipe(self) -> str:
        """How it is trained: ``transfer`` or ``scratch``."""
        return self.training.recipe or ("transfer" if self.net.is_pretrained else "scratch")

    def dense_rate(self) -> float:
        """Return the peak learning rate of dense training."""
        asked = self.training.lr
        return _RATES[self.recipe] if asked is None else asked

    def sparse_rate(self) -> float:
        """Return the peak learning rate of sparse training."""
        training = self.training
        if training.sparse_lr is not None:
            return training.sparse_lr
        return self.dense_rate() if self.from_random else self.dense_rate() / 2

    def finetune_rate(self) -> float:
        """Return the peak learning rate of finetuning."""
        asked = self.training.finetune_lr
        return self.sparse_rate() / 2 if asked is None else asked

    def has_target(self) -> bool:
        target = self.target
        limits = (target.macs, target.num_params, target.latency_ms, target.latency)
        return any(v is not None for v in limits)

    def _budget(self) -> Budget:
        return Budget(
            macs=self.target.macs,
            num_params=self.target.num_params,
            latency_ms=self.target.latency_ms,
            latency=self.target.latency,
            runtime=self.deployment.runtime,
            batch=self.deployment.batch,
            threads=self.deployment.threads,
        )

    def budget(self) -> Budget:
        """Return the target.

        Raises:
            RunError: none was given.
        """
        if not self.has_target():
            raise RunError(
                "Nothing is asked for: give --macs 0.5 (half the MACs), --params 0.5, "
                "--latency-ms 8 or --latency 0.5 (of the dense net's)."
            )
        return self._budget()

    def stage_epochs(self) -> tuple[int, int, int]:
        """Return the epochs of dense, sparse and finetuning."""
        default = _EPOCHS.get(self.data.source, _DEFAULT_EPOCHS)
        training = self.training
        asked = (training.epochs, training.sparse_epochs, training.finetune_epochs)
        dense, sparse, fine = (d if a is None else a for a, d in zip(asked, default, strict=True))
        return dense, sparse, fine

    def bearing(self) -> dict[str, Any]:
        """Return the settings that bear on training and planning, as JSON has them."""
        found = {s.name: self._value(s) for s in settings() if s.limits.bears == "training"}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

    def differences(self, other: "Config", *, late: bool = False) -> list[str]:
        """Return in words which settings differ that bear on training and planning.

        With ``late``, those that finetuning alone depends on.
        """
        bears = "finetuning" if late else "training"
        return [
            f"{s.name}: {self._value(s)!r} there, {other._value(s)!r} now"
            for s in settings()
            if s.limits.bears == bears and self._value(s) != other._value(s)
        ]

    def _value(self, setting: Setting) -> Any:
        """Return a setting as it bears on a run; older ones wrote the rate down that is now the default."""
        return self.dense_rate() if setting.name == "lr" else setting.of(self)


def _converted(content: Any, kind: type[T], place: str = "") -> T:
    """Return the content as a ``kind``, by the types of its fields."""
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        fault, _, field = str(error).partition(" - at ")
        inside = field.strip("`").removeprefix("$").removeprefix(".")
        where = ".".join(part for part in (place, inside) if part) or "the whole"
        raise RunError(f"{where}: {fault[0].lower()}{fault[1:]}.") from None
