"""One self-contained page about a run, and the card of its net."""

from .card import write_card
from .gathering import nets_of
from .html import write_report

__all__ = ["nets_of", "write_card", "write_report"]
