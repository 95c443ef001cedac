"""Errors and warnings in the words of the command line."""

import re
import tempfile
import traceback
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from resconv.failures import in_words
from resconv.run.settings import settings

__all__ = ["as_options", "show_error"]

# What messages call a setting, and its option; two come from elsewhere than the settings of a run.
_OPTIONS = {s.name: s.option for s in settings()} | {
    "batch": "--latency-batch",
    "tolerance": "--tolerance",
    "trust_source": "--trust-source",
}
_FLAGS = (*(s.name for s in settings() if s.is_flag), "trust_source")
_VALUED = tuple(n for n in _OPTIONS if n not in _FLAGS)
# What a user of the command line types where one of Python calls something.
_CALLS = {"resconv.units(model, example_inputs)": "resconv inspect"}
_NOT_IN_A_CALL = r"(?<!\w\()(?<![\w.-])"
_FLAG = re.compile(rf"{_NOT_IN_A_CALL}({'|'.join(_FLAGS)})=(True|False)\b")
_VALUE = re.compile(rf"{_NOT_IN_A_CALL}({'|'.join(_VALUED)})=('[^']*'|-?\w+(?:[.-]\w+)*%?)")
# In a list of settings that differ.
_SETTING = re.compile(rf"\b({'|'.join((*_FLAGS, *_VALUED))}): (?=[^;]* there, )")
# Names of several words are settings wherever they stand; "limit" or "model" may be just a word.
_BARE = re.compile(
    rf"(?<![\w.'-])({'|'.join(n for n in (*_FLAGS, *_VALUED) if '_' in n)})(?![\w='(]|\.\w)"
)


def as_options(text: str) -> str:
    """Return a message with Python's keywords (``sparse_epochs=3``) as options (``--sparse-epochs 3``).

    What stands in a call (``Budget(macs=0.5)``) is left alone.
    """

    def flag(found: re.Match[str]) -> str:
        option = _OPTIONS[found[1]]
        return option if found[2] == "True" else option.replace("--", "--no-", 1)

    for call, same in _CALLS.items():
        text = text.replace(call, same)
    text = _FLAG.sub(flag, text)
    text = _VALUE.sub(
        lambda found: f"{_OPTIONS[found[1]]} {found[2].strip(chr(39)) or repr('')}", text
    )
    text = _SETTING.sub(lambda found: f"{_OPTIONS[found[1]]}: ", text)
    text = _BARE.sub(lambda found: _OPTIONS[found[1]], text)
    return re.sub(r"(--[\w-]+ \S+) \(\1\)", r"\1", text)  # a hint that names both


def show_error(error: Exception) -> int:
    """Print what a user can do about the error, and return the exit status.

    That is 2 for a user's mistake or want, 1 for what nobody foresaw, whose details go to a file.
    """
    known = in_words(error)
    if known is not None:
        text, status = as_options(str(known)), 2
    else:
        first = (str(error).splitlines() or [""])[0][:300]
        text, status = (
            f"Unexpected: {type(error).__name__}: {first}\nThe details are in {_keep(error)}. Please "
            "report them, with the command; finished stages of a run are kept, and the same command "
            "goes on after them.",
            1,
        )
    Console(stderr=True).print(Panel(escape(text), title="resconv", border_style="red"))
    return status


def _keep(error: Exception) -> Path:
    with tempfile.NamedTemporaryFile(
        "w", prefix="resconv-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.writelines(traceback.format_exception(error))
    return Path(file.name)
