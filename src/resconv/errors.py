"""Every error meant for a user: each states the fact, the numbers and the next step."""

from typing import Any

__all__ = [
    "BudgetError",
    "ConversionError",
    "DataError",
    "ExportError",
    "FusionError",
    "LoadError",
    "MissingExtraError",
    "ModelError",
    "PlanError",
    "PruneError",
    "ResConvError",
    "ResConvWarning",
    "RunError",
    "SaveError",
    "TraceError",
    "TrustError",
    "VerificationError",
    "printable",
]


def printable(text: str) -> str:
    r"""Return the text with every character that a terminal would obey written as an escape.

    A name read from a file or a folder may hold control characters (which clear a screen or
    pretend to be a prompt) or lone surrogates (which cannot be written at all). Line breaks stay.

    >>> printable("layer\x1b[2J")
    'layer\\x1b[2J'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


class ResConvError(Exception):
    """Base of every error that resconv raises for a user's mistake or an impossible request.

    Its text is :func:`printable`, whatever the names in it are.

    Example:
        >>> try:
        ...     resconv.prune(net)
        ... except resconv.ResConvError as error:
        ...     print(error)
        Sequential is not a converted model. Call resconv.convert(model, example_inputs) first.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class ResConvWarning(UserWarning):
    """What a user should know of a result that is no error: a target that was missed, say."""


class TraceError(ResConvError):
    """One forward pass of the model could not be recorded."""


class ConversionError(ResConvError):
    """The model has nothing to convert, or converting it would change its outputs."""


class BudgetError(ResConvError):
    """A budget is malformed, or cannot be reached with the removable units there are."""


class PlanError(ResConvError):
    """A plan is malformed, or names what the model does not have."""


class PruneError(ResConvError):
    """A plan fits the model's names, but carrying it out would not give the promised net."""


class FusionError(ResConvError):
    """A ResConv has no ordinary convolution that equals it as it stands."""


class VerificationError(ResConvError):
    """Two networks that must agree do not."""


class LoadError(ResConvError):
    """A saved network is missing, changed, truncated or from a newer format."""


class TrustError(LoadError):
    """A file leads to code that runs only with the user's word, which was not given."""


class SaveError(ResConvError):
    """A network cannot be saved as it stands, or the folder cannot be written."""


class ExportError(ResConvError):
    """The network could not be written in the asked format."""


class ModelError(ResConvError):
    """A model's name, factory or weights cannot be used."""


class DataError(ResConvError):
    """A dataset is missing, unreadable or does not fit the model."""


class RunError(ResConvError):
    """A run folder is missing a stage, or belongs to another configuration."""


class MissingExtraError(ResConvError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'resconv[{extra}]'"
        )
        self._given = (package, extra, purpose)

    def __reduce__(self) -> Any:
        # By default an exception is made anew from its text, which is not what this one is made of.
        return MissingExtraError, self._given
