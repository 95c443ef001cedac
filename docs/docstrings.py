"""For the site: docstrings in the words that its reader of docstrings knows."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([^`]+)`")


class Docstrings(griffe.Extension):
    """Reads ``Example:`` as a section, and roles as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = _ROLE.sub(r"`\1`", text)
