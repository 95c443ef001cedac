"""What a run starts from: random weights, a dense net that is given, or pretrained weights."""

from dataclasses import dataclass

from msgspec.structs import replace
from torch import nn

from resconv import nets
from resconv.errors import ModelError, RunError

from .config import Config
from .job import Run

__all__ = ["Start", "is_trained_first", "load_start", "settled"]


@dataclass(frozen=True)
class Start:
    """What a net was begun with.

    Attributes:
        origin: where the weights are from, in words; None where they are random.
        new_head: what the weights' own head was left out of, since it tells other classes apart.
    """

    origin: str | None = None
    new_head: tuple[str, ...] = ()

    def words(self, num_classes: int) -> str:
        """Say what was loaded."""
        if not self.new_head:
            return f"Weights of {self.origin} loaded."
        return (
            f"Weights of {self.origin} loaded, without the head of other classes ({', '.join(self.new_head)}): "
            f"a new one tells {num_classes} apart."
        )


def load_start(run: Run, model: nn.Module) -> Start:
    """Load what the run starts from into the net, which was built for its data.

    Raises:
        ModelError: weights are missing, do not fit, or cannot be fetched.
        RunError: the net follows its own outputs while its head is random.
    """
    config = run.config
    asked = config.net
    if not asked.is_pretrained:
        if asked.weights is None:
            return Start()
        nets.load_weights(model, asked.weights)
        return Start(asked.weights)
    left_out = nets.load_pretrained(model, asked.model, asked.weights)
    if left_out and config.training.distill and config.training.epochs == 0:
        raise RunError(
            f"distill=True with epochs=0: the pretrained weights are of other classes ({', '.join(left_out)} "
            "differ), so there is no trained dense net to learn from. Give it epochs."
        )
    return Start(asked.weights or asked.model, left_out)


def is_trained_first(config: Config, start: Start) -> bool:
    """Whether dense training comes before sparse training."""
    epochs = config.training.epochs
    if start.origin is None or start.new_head:
        return epochs != 0
    # A head that fits is a dense net; pretrained, it is trained on where that is asked for.
    return config.net.is_pretrained and bool(epochs)


def settled(run: Run) -> Config:
    """Return the run's settings with ``pretrained`` decided, where a file of weights is given and nothing else said.

    Pretrained are weights that fit a zoo's net with its own head, and weights whose head tells other
    classes apart than the data has.
    """
    config = run.config
    weights = config.net.weights
    if weights is None or config.net.pretrained is not None:
        return config
    foreign = replace(config, net=replace(config.net, pretrained=True))
    if nets.fits_own_head(config.net.model, weights):
        return foreign
    model = run.create()
    try:
        nets.load_weights(model, weights)
    except ModelError as error:
        try:
            nets.load_weights(model, weights, new_head=True)
        except ModelError:
            raise error from None
        return foreign
    return config
