"""VGG-16 with BatchNorm for 32x32 images: thirteen 3x3 convs and one linear layer."""

from torch import Tensor, nn

from resconv.errors import ModelError

__all__ = ["VGG", "vgg16_bn"]

# Channels of each conv; "M" is a 2x2 max pool.
_VGG16: tuple[int | str, ...] = (
    *(64, 64, "M", 128, 128, "M", 256, 256, 256, "M"),
    *(512, 512, 512, "M", 512, 512, 512),
)
_MIN_SIZE = 16  # four pools


class VGG(nn.Module):
    """The convs of VGG-16, each with BatchNorm and ReLU, a global average pool and one linear.

    Shape: (N, in_channels, H, W) -> (N, num_classes); H and W from 16 up.

    Raises:
        ModelError: on a forward pass of images smaller than 16x16.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for item in _VGG16:
            if isinstance(item, int):
                layers += [
                    nn.Conv2d(channels, item, 3, padding=1, bias=False),
                    nn.BatchNorm2d(item),
                    nn.ReLU(),
                ]
                channels = item
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # A hook, not a line of forward: tracers of forward see no data-dependent branch.
        self.register_forward_pre_hook(_check_size)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.flatten(self.pool(self.features(x))))
        return logits


def _check_size(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    height, width = inputs[0].shape[-2:]
    if min(height, width) < _MIN_SIZE:
        raise ModelError(
            f"vgg16_bn needs images of at least {_MIN_SIZE}x{_MIN_SIZE}, these are "
            f"{height}x{width}: four 2x2 pools leave no pixel. Resize the images "
            f"(image_size={_MIN_SIZE}), or use a resnet, which takes any size from 4x4."
        )


def vgg16_bn(num_classes: int = 10, in_channels: int = 3) -> VGG:
    """Return a VGG-16 with BatchNorm: 14.7 M parameters, 313 M MACs at 3x32x32."""
    return VGG(num_classes, in_channels)
