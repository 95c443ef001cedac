"""The commands of ``resconv``, one thin file each."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from . import compress, export, inspect, measure, prune, train, verify

__all__ = ["app", "run_app"]

app = typer.Typer(
    name="resconv",
    help="Make trained convolutional networks shallower: whole layers go, outputs are checked.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (compress, inspect, train, prune, export, measure, verify):
    module.register(app)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"resconv {version('resconv')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def run_app(application: typer.Typer) -> int:
    """Run the application and return its exit status."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    from resconv.errors import ResConvError

    console = Console(stderr=True)
    try:
        application()
    except ResConvError as error:
        console.print(Panel(escape(str(error)), title="resconv", border_style="red"))
        return 2
    except KeyboardInterrupt:
        console.print("\nStopped. The same command goes on from here.")
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0
