"""One self-contained page about a run."""

from .gathering import nets_of
from .html import write_report

__all__ = ["nets_of", "write_report"]
