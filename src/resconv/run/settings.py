"""Every setting of a run, defined once: its type, default, help and limits.

From these come the options of the command line, the check of a setting wherever it is from, and
``config.json`` (see config.py). No torch is imported: ``resconv --help`` waits for this.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from resconv.errors import BudgetError, RunError
from resconv.preprocessing import Interpolation

__all__ = [
    "GROUPS",
    "Data",
    "Deployment",
    "Net",
    "Setting",
    "Target",
    "Training",
    "amount",
    "kinds",
    "settings",
]


@dataclass(frozen=True)
class Limits:
    """What a setting is checked and shown by, beside its type.

    Attributes:
        least, most, above, below: bounds of a number, which is finite; a None is always allowed.
        words: what is allowed, where a bound or a choice does not say it well.
        option: the option's name on the command line, where it is not the field's.
        name: the setting's name where all stand in one list, where it is not the field's.
        read: makes the value of what is typed; the option then takes text.
        bears: "training" and planning; "finetuning" alone; "nothing" that comes out of the run.
        hidden: for Python alone.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    words: str | None = None
    option: str | None = None
    name: str | None = None
    read: Callable[[str, str], Any] | None = None
    bears: Literal["training", "finetuning", "nothing"] = "training"
    hidden: bool = False


def about(text: str, **limits: Any) -> msgspec.Meta:
    """Describe a setting: its help, and its :class:`Limits`."""
    return msgspec.Meta(description=text, extra={"limits": Limits(**limits)})


_KINDS = ("layers", "blocks", "summands", "segments", "gates")


def kinds(text: str, option: str) -> str:
    """Read kinds of units, with commas between them, or "all"."""
    asked = [name.strip() for name in text.split(",")]
    if text != "all" and not set(asked) <= set(_KINDS):
        raise RunError(
            f"{option} {text}: choose among {', '.join(_KINDS)} (several with commas between), or all."
        )
    return text


def amount(text: str, option: str) -> float | int:
    """Read a fraction (0.5, 50%) or an absolute number (40000000, 40M)."""
    fault = BudgetError(
        f"{option} {text}: give a fraction above 0 and up to 1 (0.5 or 50%), or a whole number from 1 up "
        "(40000000 or 40M)."
    )
    units = {"%": 0.01, "k": 1e3, "m": 1e6, "g": 1e9}
    raw = text.strip().lower().replace("_", "").replace(",", "")
    try:
        if raw and raw[-1] in units:
            value = float(raw[:-1]) * units[raw[-1]]
            is_fraction = raw[-1] == "%"
        else:
            value = float(raw)
            # 1e7 is a number, and 1 the whole net.
            is_fraction = "." in raw or value <= 1
    except ValueError:
        raise fault from None
    if not (0 < value <= 1 if is_fraction else 1 <= value < math.inf):
        raise fault
    return value if is_fraction else round(value)


def share(text: str, option: str) -> float:
    """Read a fraction (0.5, 50%)."""
    value = amount(text, option)
    if 0 < value < 1:
        return value
    raise BudgetError(
        f"{option} {text}: a share of the dense net's latency lies between 0 and 1 (0.5 or 50%). "
        f"For milliseconds give --latency-ms."
    )


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Read numbers with commas between them (0.485,0.456,0.406)."""
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise RunError(
            f"{option} {text}: give one number a channel, with commas between them (0.485,0.456,0.406)."
        ) from None


class _Group(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one kind."""


class Net(_Group, frozen=True, kw_only=True):
    """The net."""

    model: Annotated[
        str,
        about(
            "resnet20, timm:NAME, torchvision:NAME (with .TAG: those weights), hf-hub:OWNER/NAME or "
            "package.module:factory."
        ),
    ]
    weights: Annotated[
        str | None, about("Trained weights (.safetensors, .pt); else it is trained.")
    ] = None
    pretrained: Annotated[
        bool | None,
        about(
            "Start from weights of the net's zoo, or with --weights from those; default: where --model names "
            "weights, or those of --weights are of other classes."
        ),
    ] = None

    @property
    def is_pretrained(self) -> bool:
        """Whether the weights are pretrained on other data, and the zoo knows how its images were prepared."""
        if self.pretrained is not None:
            return self.pretrained
        zoo, _, name = self.model.partition(":")
        return zoo == "hf-hub" or (zoo in ("timm", "torchvision") and "." in name)


class Data(_Group, frozen=True, kw_only=True):
    """The images, how they become the net's inputs, and how they are changed at random in training."""

    source: Annotated[
        str,
        about(
            "digits, cifar10, cifar100, folder:PATH, parquet:PATH or hf:NAME (a dataset of the hub).",
            name="data",
        ),
    ]
    image_size: Annotated[int | None, about("Side of the images in pixels.", least=1)] = None
    crop_fraction: Annotated[
        float | None,
        about(
            "Share of the shorter side in the central crop; default: 0.875 from 160 pixels up, else 1.",
            above=0,
            most=1,
            words="a share above 0 and up to 1",
        ),
    ] = None
    interpolation: Annotated[
        Interpolation | None, about("nearest, bilinear or bicubic; default: bilinear.")
    ] = None
    mean: Annotated[
        tuple[float, ...] | None,
        about(
            "Of each channel, pixels in 0..1: 0.485,0.456,0.406; default: a pretrained net's own, else measured.",
            read=numbers,
        ),
    ] = None
    std: Annotated[
        tuple[float, ...] | None,
        about("Standard deviation of each channel, likewise.", read=numbers),
    ] = None
    channels: Annotated[
        Literal[1, 3] | None,
        about("1 (grey) or 3 (RGB).", words="images are grey (1) or RGB (3)"),
    ] = None
    num_classes: Annotated[
        int | None,
        about(
            "Classes, where the data does not name them and may lack images of the last.", least=2
        ),
    ] = None
    augment: Annotated[
        Literal["shift", "crop", "none"] | None,
        about("Random changes: shift, crop or none; default: shift up to 64 pixels, above crop."),
    ] = None
    mirror: Annotated[
        bool | None,
        about("Mirror half of the images in training; default: yes, but not characters."),
    ] = None
    holdout: Annotated[
        float,
        about(
            "Validate on this share of the training images, in place of a val split.",
            least=0,
            below=1,
            words="a share from 0 to below 1",
        ),
    ] = 0.0
    limit: Annotated[int | None, about("Use this many images of each split.", least=1)] = None


class Target(_Group, frozen=True, kw_only=True):
    """How large or slow the compact net may be, and what may go."""

    macs: Annotated[
        float | int | None, about("Target for the MACs: 0.5, 50% or 20M.", read=amount)
    ] = None
    num_params: Annotated[
        float | int | None,
        about("Target for the parameters: 0.5, 50% or 200k.", option="params", read=amount),
    ] = None
    latency_ms: Annotated[
        float | None, about("Target for one forward pass on this machine, in ms.")
    ] = None
    latency: Annotated[
        float | None, about("The same as a share of the dense net's: 0.5 or 50%.", read=share)
    ] = None
    units: Annotated[
        str,
        about(
            "What may go: layers, blocks, summands, segments, gates (several with commas between), or "
            "all.",
            read=kinds,
        ),
    ] = "layers,blocks"
    recalibrate: Annotated[
        bool | None,
        about(
            "Recompute the BatchNorm statistics after pruning; default: only if a removed unit's scale "
            "was not 0."
        ),
    ] = None


class Deployment(_Group, frozen=True, kw_only=True):
    """How the compact net is to be run: what a latency is measured with."""

    runtime: Annotated[str, about("What the latency is measured in: torch or onnxruntime.")] = (
        "torch"
    )
    batch: Annotated[
        int, about("Batch size of the latency measurement.", name="latency_batch", least=1)
    ] = 1
    threads: Annotated[
        int | None,
        about("Threads of the latency measurement; default: as many as torch uses.", least=1),
    ] = None


class Training(_Group, frozen=True, kw_only=True):
    """How it is trained."""

    epochs: Annotated[
        int | None,
        about("Epochs of dense training; 0: sparse training from random weights.", least=0),
    ] = None
    sparse_epochs: Annotated[int | None, about("Epochs of sparse training.", least=1)] = None
    finetune_epochs: Annotated[
        int | None, about("Epochs of finetuning, after pruning.", least=0, bears="finetuning")
    ] = None
    distill: Annotated[bool, about("Distill: learn from the outputs of the dense net, too.")] = (
        False
    )
    distill_share: Annotated[
        float,
        about(
            "With --distill: the share of the loss that compares with the dense net.",
            above=0,
            most=1,
            words="a share above 0, up to 1",
        ),
    ] = 0.5
    hints: Annotated[bool, about("With --distill: compare features between units, too.")] = False
    mix: Annotated[
        Literal["mixup", "cutmix"] | None,
        about("Blend pairs of images and their labels: mixup or cutmix."),
    ] = None
    ema: Annotated[
        float | None,
        about(
            "Average the weights over sparse training and finetuning, with this decay: 0.999; default: no average.",
            above=0,
            below=1,
            words="a decay above 0 and below 1",
        ),
    ] = None
    recipe: Annotated[
        Literal["transfer", "scratch"] | None,
        about(
            "transfer (AdamW, smoothed labels) or scratch (SGD); default: transfer with pretrained weights."
        ),
    ] = None
    lr: Annotated[
        float | None,
        about("Peak learning rate of dense training; default: 0.1, of transfer 0.001.", above=0),
    ] = None
    sparse_lr: Annotated[
        float | None,
        about(
            "Peak learning rate of sparse training; default: half of --lr, or --lr with --epochs 0.",
            above=0,
        ),
    ] = None
    finetune_lr: Annotated[
        float | None,
        about(
            "Peak learning rate of finetuning; default: half of that of sparse training.",
            above=0,
            bears="finetuning",
        ),
    ] = None
    batch_size: Annotated[int, about("Images per training step.", least=1)] = 128
    control: Annotated[
        bool,
        about(
            "Train the dense net on, too, for as many epochs as sparse training and finetuning have.",
            bears="nothing",
        ),
    ] = False
    seed: Annotated[int, about("Seed of all random numbers.", least=0, below=2**32)] = 0
    precision: Annotated[
        Literal["auto", "32-true", "bf16-mixed", "16-mixed"],
        about("auto, 32-true, bf16-mixed or 16-mixed."),
    ] = "auto"
    devices: Annotated[
        int | None,
        about(
            "Processes that train: GPUs, or CPU processes; default: every GPU, else one process.",
            bears="nothing",
        ),
    ] = None
    cuda_graphs: Annotated[
        bool,
        about(
            "Record the training step on the GPU: faster for small nets whose forward does the same "
            "operations every time.",
            bears="nothing",
        ),
    ] = False
    progress: Annotated[bool, about("Show a bar.", bears="nothing", hidden=True)] = True


GROUPS: dict[str, Any] = {
    "net": Net,
    "data": Data,
    "target": Target,
    "deployment": Deployment,
    "training": Training,
}


@dataclass(frozen=True)
class Setting:
    """One setting: where it stands in a :class:`Config`, what it is, and its help."""

    group: str
    field: str
    type: Any
    default: Any
    help: str
    limits: Limits

    @property
    def name(self) -> str:
        return self.limits.name or self.field

    @property
    def option(self) -> str:
        return "--" + (self.limits.option or self.name).replace("_", "-")

    @property
    def choices(self) -> tuple[Any, ...]:
        literals = [t for t in (self.type, *get_args(self.type)) if get_origin(t) is Literal]
        return tuple(c for t in literals for c in get_args(t))

    @property
    def is_flag(self) -> bool:
        return bool in (self.type, *get_args(self.type))

    def of(self, config: Any) -> Any:
        """Return its value in a Config."""
        return getattr(getattr(config, self.group), self.field)

    def faults(self, value: Any) -> Iterator[str]:
        """Say in words what the value may not be."""
        limits, choices = self.limits, self.choices
        if choices and value is not None and value not in choices:
            yield self._fault(value, f"choose one of {', '.join(map(str, choices))}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            # A comparison with NaN is false.
            if not limits.above < value < math.inf:
                above = f"above {limits.above:g}, and " if limits.above > -math.inf else ""
                yield self._fault(value, f"it must be {above}finite")
            elif not value >= limits.least:
                yield self._fault(value, f"at least {limits.least}")
            elif not value <= limits.most:
                yield self._fault(value, f"at most {limits.most}")
            elif not value < limits.below:
                yield self._fault(value, f"below {limits.below}")

    def _fault(self, value: Any, words: str) -> str:
        return f"{self.name}={value!r}: {self.limits.words or words}"


_settings: list[Setting] = []


def settings() -> list[Setting]:
    """Return all settings, in the order of the options."""
    if not _settings:
        _settings.extend(_find_settings())
    return _settings


def _find_settings() -> Iterator[Setting]:
    for group, kind in GROUPS.items():
        hints = get_type_hints(kind, include_extras=True)
        for field in msgspec.structs.fields(kind):
            base, meta = get_args(hints[field.name])
            default = ... if field.default is msgspec.NODEFAULT else field.default
            limits = meta.extra["limits"]
            yield Setting(group, field.name, base, default, meta.description, limits)
