"""The modules of a net in words: what is saved of them, and where a net that was built is another."""

from torch import fx, nn

__all__ = ["describe_modules", "differing_modules"]

# What a layer is configured by. A list of our own: torch's repr of a layer changes now and then.
_SETTINGS = (
    *("in_channels", "out_channels", "in_features", "out_features", "num_features"),
    *("num_groups", "normalized_shape", "kernel_size", "stride", "padding", "output_padding"),
    *("dilation", "groups", "padding_mode", "eps", "affine", "negative_slope", "inplace"),
    *("ceil_mode", "count_include_pad", "output_size", "mode", "scale_factor", "align_corners"),
    *("approximate", "alpha", "min_val", "max_val", "p", "dim", "upscale_factor"),
    *("start_dim", "end_dim", "num_parameters"),
)


def describe_modules(model: nn.Module) -> dict[str, str]:
    """Return ``{path: type and settings}`` of every module.

    A torch layer is written ``Conv2d(kernel_size=(3, 3), ...)``; a class of another library with
    its module's name, which says something to a reader but is not compared: libraries move classes.
    """
    return {path: _describe_module(m) for path, m in model.named_modules()}


def _describe_module(module: nn.Module) -> str:
    kind = type(module)
    name = kind.__name__
    if isinstance(module, nn.Identity):  # with what attributes it is, is no setting of the net
        return "Identity()"
    if isinstance(module, fx.GraphModule):
        name = "torch.fx.GraphModule"
    elif not kind.__module__.startswith("torch.nn."):
        name = f"{kind.__module__}.{name}"
    settings = []
    for key in _SETTINGS:
        value = module.__dict__.get(key)
        items = value if isinstance(value, tuple | list) else (value,)
        if value is not None and all(isinstance(i, bool | int | float | str) for i in items):
            settings.append(f"{key}={tuple(value) if isinstance(value, list) else value!r}")
    return f"{name}({', '.join(settings)})"


def differing_modules(saved: dict[str, str], built: dict[str, str]) -> list[str]:
    """Return, in words, where two descriptions of a net differ."""
    faults = [f"{p or 'the net'} is not there" for p in saved if p not in built]
    faults += [f"{p or 'the net'} was not saved" for p in built if p not in saved]
    for path, text in saved.items():
        if path in built and _compared(text) != _compared(built[path]):
            faults.append(f"{path or 'the net'} is {built[path]}, saved was {text[:200]}")
    return faults


def _compared(text: str) -> str:
    name, bracket, settings = text.partition("(")
    return bracket + settings if "." in name else text
