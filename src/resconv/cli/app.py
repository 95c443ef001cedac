"""The commands of ``resconv``, one thin file each."""

import os
import sys
import traceback
from typing import Annotated, Any

import typer

from . import (
    compare,
    compress,
    doctor,
    evaluate,
    export,
    inspect,
    measure,
    predict,
    prune,
    push,
    train,
    verify,
)
from .stopping import STOPPED

__all__ = ["app", "run_app"]

_STATUSES = (
    "Exit status: 0 done; 1 an unforeseen error, whose details are in a file; 2 a mistake that the message says "
    "how to mend; 130 or 143 stopped by Ctrl-C or SIGTERM."
)
app = typer.Typer(
    name="resconv",
    help="Make trained convolutional networks shallower: whole layers go, outputs are checked.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_STATUSES,
    pretty_exceptions_enable=False,
)
_COMMANDS = (
    compress,
    inspect,
    train,
    prune,
    export,
    measure,
    compare,
    verify,
    predict,
    evaluate,
    push,
    doctor,
)
for module in _COMMANDS:
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
    try:
        application()
    except KeyboardInterrupt:
        return STOPPED
    except SystemExit as stop:
        _leave(None)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        return _show(_leave(error) or error)
    _leave(None)
    return 0


# Made here, for there may be no memory to make it when it is needed.
_NO_MEMORY = (
    b"resconv: There is not enough memory. Ask for less: a smaller --batch-size or --image-size, or fewer "
    b"images (--limit 1000). Finished stages of a run are kept.\n"
)


def _show(error: Exception) -> int:
    """Show the error and return the exit status, even where no memory is left to show it with."""
    traceback.clear_frames(error.__traceback__)  # which may hold what filled the memory
    try:
        from .messages import show_error  # which loads torch

        return show_error(error)
    except Exception as other:
        if not isinstance(error, MemoryError) and not isinstance(other, MemoryError):
            raise
        os.write(2, _NO_MEMORY)
        return 2


def _leave(error: Exception | None) -> Any:
    """Tell the other processes of a launcher, where there are any: then their module is loaded."""
    ranks = sys.modules.get("resconv.train.ranks")
    return error if ranks is None else ranks.leave(error)
