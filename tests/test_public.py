"""What ``resconv`` offers, and that nothing heavy is loaded before it is needed."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import resconv

SOURCE = Path(resconv.__file__)


def test_the_two_lists_of_public_names_agree():
    typed = {
        alias.asname: node.module
        for node in ast.walk(ast.parse(SOURCE.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert typed == resconv._HOME_OF
    assert dir(resconv) == sorted(typed)


@pytest.mark.parametrize("name", dir(resconv))
def test_a_public_name_is_what_its_home_has(name):
    home = importlib.import_module("resconv." + resconv._HOME_OF[name])
    assert getattr(resconv, name) is getattr(home, name)


def test_no_module_is_shadowed_by_a_name():
    """``import resconv.x as x`` gives a module, wherever there is a file or folder x."""
    for path in SOURCE.parent.rglob("*.py"):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        if parts[-1] in ("__init__", "__main__"):
            continue
        try:
            parent = importlib.import_module(".".join(("resconv", *parts[:-1])))
        except resconv.errors.MissingExtraError:  # a folder for the users of another package
            assert parts[0] == "integrations"
            continue
        module = importlib.import_module(".".join(("resconv", *parts)))
        assert getattr(parent, parts[-1]) is module, parts


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        resconv.nothing  # noqa: B018
    assert not hasattr(resconv, "_nothing")


@pytest.mark.parametrize("args", [["--help"], ["compress", "--help"], ["inspect", "--help"]])
def test_help_loads_nothing_heavy(args):
    """Neither torch nor numpy is imported to print a help text; running a command does load it."""
    code = (
        "import sys; sys.argv = ['resconv', *sys.argv[1:]]\n"
        "from resconv.cli.app import app, run_app\n"
        "status = run_app(app)\n"
        "print('LOADED', sorted({'torch', 'numpy', 'lightning'} & set(sys.modules)), status)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=True
    ).stdout
    assert "LOADED [] 0" in out
    control = "import resconv, sys; resconv.convert; print('LOADED', 'torch' in sys.modules)"
    made = subprocess.run([sys.executable, "-c", control], capture_output=True, text=True)
    assert "LOADED True" in made.stdout
