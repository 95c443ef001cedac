"""A run folder with its data and nets, loaded when a stage needs them."""

from collections.abc import Callable
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

import resconv
from resconv import data as datasets
from resconv import nets
from resconv.data import Augment, BatchLoader, ImageData, choose_augment
from resconv.errors import ModelError, RunError, printable
from resconv.failures import is_out_of_memory
from resconv.files import write_atomic
from resconv.latency.table import LatencyTable
from resconv.planning.plan import Plan
from resconv.surgery.provenance import carry_on, provenance_of
from resconv.train import RECIPES, Ranks, Recipe, choose_precision
from resconv.train.precision import Precision

from .config import Config
from .fingerprint import fingerprint
from .folder import RunFolder

__all__ = ["INT8_FILES", "LATENCY", "Run", "Say", "load_state", "save_state"]

Say = Callable[[str], None]
LATENCY = "latency.json"
INT8_FILES = ("model-int8.onnx", "model-pixels-int8.onnx")
_BATCHES_TO_FIT = 8


class Run:
    """A run folder with its data and nets, loaded when a stage needs them."""

    def __init__(
        self,
        folder: RunFolder,
        say: Say | None = print,
        ranks: Ranks | None = None,
        config: Config | None = None,
        *,
        trust_source: bool = False,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.folder, self.trust_source = folder, trust_source
        self._say = say if self.ranks.leads else None
        self.config = folder.config() if config is None else config
        # While a run is checked, the folder may be missing, or hold what was tried before.
        self.owns_folder = config is None
        self.is_checked = False
        self.latency: LatencyTable | None = None  # measured before the folder was this run's
        self._data: ImageData | None = None
        self._fingerprint: dict[str, str] | None = None
        self.bound = ""  # what the checkpoints of the stage that runs are bound to

    @property
    def fingerprint(self) -> dict[str, str]:
        """What tells these images and labels from others (see fingerprint.py)."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.data)
        return self._fingerprint

    @property
    def speaks(self) -> bool:
        """Whether this process tells the user anything."""
        return self._say is not None

    def say(self, text: str) -> None:
        """Tell the user, once where there are several processes."""
        if self._say is not None:
            self._say(printable(text))

    @property
    def data(self) -> ImageData:
        if self._data is None:
            asked, net = self.config.data, self.config.net
            own = nets.own_preprocessing(net.model) if net.is_pretrained else None
            self._data = datasets.load(
                asked.source,
                holdout=asked.holdout,
                limit=asked.limit,
                channels=asked.channels,
                image_size=asked.image_size,
                crop_fraction=asked.crop_fraction,
                interpolation=asked.interpolation,
                mean=asked.mean,
                std=asked.std,
                num_classes=asked.num_classes,
                preprocessing=own,
            )
        return self._data

    @property
    def augment(self) -> Augment:
        """How training images are changed at random."""
        asked = self.config.data
        return choose_augment(self.data, asked.augment, asked.mirror)

    @property
    def devices(self) -> int | str:
        asked = self.config.training.devices
        return "auto" if asked is None else asked

    @cached_property
    def precision(self) -> Precision:
        return choose_precision(self.config.training.precision)

    def use(self, config: Config) -> None:
        """Go on with other settings, before anything was made with these."""
        if config != self.config:
            self.config, self._data, self._fingerprint = config, None, None

    def keep_latency(self, table: LatencyTable) -> None:
        """Write the measured latency into the folder, or hold it until there is one."""
        if self.owns_folder:
            self.folder.claim((LATENCY,))
            table.save(self.folder / LATENCY)
            self.latency = None
        else:
            self.latency = table

    def warn(self, stage: str, text: str) -> None:
        """Say what the user should know of the stage, and keep it for the report."""
        self.say(f"Warning: {text}")
        if self.ranks.leads:
            said = self.folder.metrics().warnings
            texts = list(dict.fromkeys([*said.get(stage, []), text]))
            self.folder.add_metrics(warnings={**said, stage: texts})

    def create(self) -> nn.Module:
        """Build the net for this data, with random weights from the seed.

        Raises:
            TrustError: the run's folder alone names code of the user's own to build it with.
            DataError: its inputs or outputs do not fit the data.
        """
        nets.require_trusted_source(
            self.config.net.model, self.folder.path, trusted=self.trust_source
        )
        torch.manual_seed(self.config.training.seed)
        data = self.data
        model = build(self.config.net.model, data)
        carry_on(
            model,
            provenance_of(model),
            preprocessing=data.preprocessing,
            class_names=data.class_names,
        )
        return model

    def example(self, size: int = 1) -> Tensor:
        data = self.data
        side = data.image_size
        generator = torch.Generator().manual_seed(0)
        return torch.randn(size, data.channels, side, side, generator=generator)

    def dense(self) -> nn.Module:
        model = self.create()
        load_state(model, self.folder / "dense.safetensors")
        return model.eval()

    def converted(self, net: nn.Module, start: str) -> nn.Module:
        """Return the net in training form, with the run's kinds of units.

        Convs in the place of segments start fitted to some training images, the same ones every time.
        """
        units = self.config.target.units
        batches = None
        if units == "all" or "segments" in units:
            data, seed = self.data, self.config.training.seed
            batches = islice(
                BatchLoader(data.train, 64, data.preprocessing, shuffle=True, seed=seed),
                _BATCHES_TO_FIT,
            )
        return resconv.convert(net, self.example(2), units=units, start=start, batches=batches)

    def gated(self) -> nn.Module:
        """Return the net as sparse training left it."""
        model = self.converted(self.dense(), "keep")
        load_state(model, self.folder / "gated.safetensors")
        return model.eval()

    def plan(self) -> Plan:
        return Plan.load(self.folder / "plan.json")

    def recipe(self, epochs: int, lr: float, ema: float | None = None) -> Recipe:
        training = self.config.training
        return Recipe(
            epochs,
            **RECIPES[self.config.recipe],
            lr=lr,
            batch_size=training.batch_size,
            seed=training.seed,
            distill=training.distill_share,
            mix=training.mix,
            augment=self.augment,
            ema=ema,
        )


def build(name: str, data: ImageData) -> nn.Module:
    """Build the named net for the data's classes and channels, and check that it fits."""
    if nets.runs_user_code(name):
        model = _build_user_net(name, data)
    else:
        kwargs: dict[str, Any] = {"num_classes": data.num_classes}
        if data.channels != 3:
            kwargs["in_channels"] = data.channels
        model = nets.create(name, **kwargs)
    first = next(
        (m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)), None
    )
    if first is not None:
        datasets.check_fit(data, first.in_channels, data.num_classes)
    side = data.image_size
    model.eval()
    try:
        with torch.no_grad():
            out = model(torch.zeros(1, data.channels, side, side))
    except resconv.ResConvError:
        raise
    except Exception as error:  # of a zoo's or the user's forward
        if is_out_of_memory(error):
            raise
        raise RunError(
            f"{name} does not run on images of {data.channels}x{side}x{side} "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}). "
            "Choose another size with --image-size."
        ) from error
    if not isinstance(out, Tensor) or out.ndim != 2:
        raise RunError(
            f"{name} returns no (N, classes) tensor; it cannot be trained as a classifier."
        )
    datasets.check_fit(data, data.channels, out.shape[1])
    return model.train()


def _build_user_net(name: str, data: ImageData) -> nn.Module:
    try:
        return nets.create(name, num_classes=data.num_classes)
    except ModelError as error:
        if "num_classes" not in str(error):
            raise
        return nets.create(name)


def load_state(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise RunError(f"{path} is missing: the stage before was not finished.")
    try:
        model.load_state_dict(load_file(path))
    except Exception as error:  # safetensors' and torch's, for a damaged file
        raise RunError(
            f"{path} cannot be used ({type(error).__name__}: {str(error)[:160]}). Start anew with "
            "--fresh."
        ) from error


def save_state(model: nn.Module, path: Path) -> None:
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    # Not by save_file, whose errors are not the system's.
    write_atomic(path, lambda temporary: _write(temporary, save(state)))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
