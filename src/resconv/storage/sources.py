"""Which nets of the zoos are built from a file that anyone may have written.

What keeps a hostile file harmless is that only nets of resconv, timm and torchvision are built from
it, with keywords that are plain settings.
"""

import re

from ..surgery.provenance import Source

__all__ = ["check_source"]

# Words of a keyword by which a factory fetches, reads or runs something ...
_FETCHING = re.compile(
    r"(^|_)(pretrained|weights?|checkpoint|ckpt|url|path|file|filename|dir|directory|cache|hub|download"
    r"|cfg|config|overlay|filter|fn)(_|$)"
)
# ... but for these, which are numbers and words for how a layer is made.
_HARMLESS = re.compile(
    r"(^|_)(drop_path(_rates?|_prob)?|weight_init|init_weights?|weight_standardization|filter_sizes?"
    r"|pretrained_window_sizes?|attention_bias_cache)$"
)
# How large a number may be, by what the keyword counts; the first that fits.
_MOST = (
    (re.compile(r"class"), 10**6),
    (re.compile(r"depth|repeat|block|layer|stage|mult|expan|ratio|scale|head"), 512),
    (re.compile(r"window|kernel|stride|dilat|patch|reduction|group"), 64),
    (re.compile(r""), 2**14),  # widths, and sides of images
)


def check_source(source: Source) -> str | None:
    """Return why a zoo's net must not be built with these keywords, or None.

    A factory of timm or torchvision is other people's code with hundreds of keywords; those that
    fetch weights, read files or name code are refused by their looks. Such a net can still be
    loaded: give it as ``model=``.
    """
    if source.name.startswith("hf-hub:"):
        return "it would be fetched over the network"
    todo = list(source.kwargs.items())
    while todo:
        key, value = todo.pop()
        word = key.lower()
        if _FETCHING.search(word) and not _HARMLESS.search(word):
            return f"the keyword {key[:60]!r} can make its factory fetch or read something"
        if isinstance(value, list):
            todo += [(key, v) for v in value]  # depths and widths
        elif isinstance(value, str):
            if len(value) > 100 or any(c in value for c in "/\\:"):
                return f"{key}={value[:60]!r} is no setting of a net"
        elif isinstance(value, int | float):
            if abs(value) > next(most for pattern, most in _MOST if pattern.search(word)):
                return f"{key}={value} is unbelievable"
        elif value is not None:
            return f"{key}= holds an object"
    return None
