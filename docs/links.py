"""For the site: files of the repository that pages link to are named, since they are no pages."""

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with ``[text](../file)`` as text, and the file's name behind it."""

    def named(link: re.Match[str]) -> str:
        text, path = link[1], link[2]
        return f"`{path}`" if text.endswith(path) else f"{text} (`{path}`)"

    return _OUTSIDE.sub(named, markdown)
