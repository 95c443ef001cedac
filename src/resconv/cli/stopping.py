"""Ctrl-C: what the user can count on afterwards."""

from typing import Any

import typer
from typer.core import TyperCommand

__all__ = ["STOPPED", "Resumable", "Stoppable"]

STOPPED = 130


class Stoppable(TyperCommand):
    """A command that Ctrl-C ends with a sentence and status 130; Typer would only say "Aborted"."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo(f"\n{self.farewell(ctx)}", err=True)
            raise typer.Exit(STOPPED) from None

    def farewell(self, ctx: Any) -> str:
        """Return what to say."""
        return "Stopped."


class Resumable(Stoppable):
    """A command that goes on where it was stopped."""

    def farewell(self, ctx: Any) -> str:
        again = (
            "The same command, without --fresh," if ctx.params.get("fresh") else "The same command"
        )
        return f"Stopped. {again} goes on from the last whole epoch."
