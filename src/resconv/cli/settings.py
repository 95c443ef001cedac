"""The options that say what a run is, for every command that begins one: made from its settings."""

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from resconv.errors import RunError
from resconv.json_files import read_json
from resconv.run.config import Config
from resconv.run.settings import Setting, settings

__all__ = ["takes_config"]


def takes_config(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, whose first parameter is the ``Config``, the options that make one.

    Typer reads a command's options from its signature, so that is where they are added.
    """
    shown = {_parameter_name(s): s for s in settings() if not s.limits.hidden}
    own = list(inspect.signature(command).parameters.values())[1:]

    @wraps(command)
    def call(**given: Any) -> None:
        del given[_CONFIG_FILE.name]  # its settings came as the options' defaults
        values = {s.name: _read(s, given.pop(name)) for name, s in shown.items()}
        command(Config.of(**values), **given)

    # What must be given comes first.
    every = sorted(
        [*map(_parameter, shown.values()), *own, _CONFIG_FILE],
        key=lambda p: p.default is not p.empty,
    )
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=p.KEYWORD_ONLY) for p in every]
    )
    call.__annotations__ = {p.name: p.annotation for p in every}
    return call


def _use_file(context: typer.Context, path: Path | None) -> Path | None:
    """Let the settings of a file be the defaults of the options."""
    if path is None:
        return None
    config = Config.from_content(read_json(path, dict[str, Any], RunError))
    context.default_map = {
        _parameter_name(s): _written(s.of(config))
        for s in settings()
        if not s.limits.hidden and s.of(config) is not None
    }
    return path


def _written(value: Any) -> Any:
    """Return a setting's value as it is typed."""
    if isinstance(value, bool):
        return value
    return ",".join(map(repr, value)) if isinstance(value, tuple | list) else str(value)


_CONFIG_FILE = inspect.Parameter(
    "config_file",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None,
        typer.Option(
            "--config",
            callback=_use_file,
            is_eager=True,
            help="Take the settings of this file (a run's config.json); options given here win.",
        ),
    ],
)


def _parameter_name(setting: Setting) -> str:
    return setting.option.removeprefix("--").replace("-", "_")


def _parameter(setting: Setting) -> inspect.Parameter:
    """Return the setting as Typer wants it; choices are text here, and checked by the setting."""
    kind: Any = setting.type
    if setting.limits.read is not None:
        kind = str | None if setting.default is None else str
    elif setting.choices:
        kind = type(setting.choices[0])
        kind = kind | None if setting.default is None else kind
    flag = setting.option
    if setting.is_flag:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    option = typer.Option(flag, help=setting.help, rich_help_panel=_panel(setting))
    return inspect.Parameter(
        _parameter_name(setting),
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if setting.default is ... else setting.default,
        annotation=Annotated[kind, option],
    )


def _panel(setting: Setting) -> str | None:
    return None if setting.default is ... else setting.group.capitalize()


def _read(setting: Setting, value: Any) -> Any:
    read = setting.limits.read
    return value if read is None or value is None else read(value, setting.option)
