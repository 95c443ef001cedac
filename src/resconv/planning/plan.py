"""Which units go: the plan, made by choose.py or written by hand."""

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import force_setattr
from torch import nn

from ..analysis.inputs import unwrap
from ..errors import PlanError
from ..files import write_text
from ..json_files import checked, load_json, read_bounded, to_json, upgraded, version_in
from ..nn.gates import gates
from ..tables import html_table, text_table

__all__ = ["Plan", "why_not_now"]


_VERSION = 1  # of the file; one without a number is of this version, too


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The units to remove; JSON in and out.

    ``macs`` and ``num_params`` (at batch size 1, norms unfolded) say what is expected before and
    after; they are None in a plan written by hand. Where the budget limits the latency,
    ``latency_ms_predicted`` is what the measured table says of the net that is left, and
    ``latency_ms_after`` what that net, finished, took; ``latency_ms_before`` is the dense net's in
    the same rounds.

    Example:
        >>> resconv.Plan(("3",), macs_before=36_000, macs_after=27_000)
        Plan: remove 1 unit: 3
              before   after  change
        MACs  36,000  27,000  -25.0%
        >>> resconv.Plan.from_json('{"remove": ["3"]}').remove
        ('3',)
    """

    remove: tuple[str, ...] = ()
    macs_before: int | None = None
    macs_after: int | None = None
    num_params_before: int | None = None
    num_params_after: int | None = None
    scales: dict[str, float] = {}
    latency_ms_before: float | None = None
    latency_ms_predicted: float | None = None
    latency_ms_after: float | None = None

    def __post_init__(self) -> None:
        names: Any = self.remove
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise PlanError(f"remove={names!r}: give a list of unit names.")
        names = tuple(names)
        if not all(isinstance(n, str) for n in names):
            raise PlanError(f"remove={names!r}: every entry is a unit's name.")
        twice = sorted(n for n, times in Counter(names).items() if times > 1)
        if twice:
            raise PlanError(f"The plan names {', '.join(map(repr, twice))} more than once.")
        force_setattr(self, "remove", names)

    def __repr__(self) -> str:
        return text_table(*self._table())

    def _repr_html_(self) -> str:
        return html_table(*self._table())

    def _table(self) -> tuple[str, list[str], list[list[object]]]:
        """Return title, header and rows of what a reader wants to know."""
        number = len(self.remove)
        title = f"Plan: remove {number} unit{'' if number == 1 else 's'}"
        rows: list[list[object]] = [
            [what, before, after, _change(before, after)]
            for what, before, after in (
                ("MACs", self.macs_before, self.macs_after),
                ("parameters", self.num_params_before, self.num_params_after),
                ("latency (ms)", self.latency_ms_before, self.latency_ms_after),
            )
            if before is not None or after is not None
        ]
        if not rows:
            return title, ["unit"], [[n] for n in self.remove]
        names = f": {', '.join(self.remove)}" if self.remove else ""
        return title + names, ["", "before", "after", "change"], rows

    def to_json(self) -> str:
        return to_json(self, _VERSION)

    @classmethod
    def from_json(cls, text: str | bytes, place: str = "The plan") -> "Plan":
        """Read a plan; ``place`` names it in errors.

        Raises:
            PlanError: no JSON, of a newer version, or no plan; the fault is named.
        """
        content = load_json(text, place, PlanError)
        if isinstance(content, dict) and "remove" not in content:
            raise PlanError(f"{place} is damaged: the whole has no 'remove'.")
        version = version_in(content, _VERSION, place, PlanError)
        return checked(upgraded(content, version, ()), cls, place, PlanError)

    def save(self, path: str | Path) -> None:
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        return cls.from_json(read_bounded(Path(path), PlanError), str(path))


def _change(before: float | None, after: float | None) -> str:
    return f"{after / before - 1:+.1%}" if before and after is not None else ""


def why_not_now(model: nn.Module, name: str) -> str | None:
    """Return why a converted unit cannot go as its parameters stand, or None."""
    gate = gates(unwrap(model))[name]
    if not math.isfinite(gate.scale.item()):
        return f"its scale is {gate.scale.item():g}: training diverged"
    if gate.control is not None:
        p = gate.control.item()
        if p == 0 or not math.isfinite(p):
            return f"its control is {p:g}, so nothing would pass through"
    return None
