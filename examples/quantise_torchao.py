"""A compact net in 8 bits with torchao: convs and linear layers, calibrated on training images."""

import torch
from compact import compact_digits
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86


@torch.no_grad()
def quantise(net: nn.Module, calibration: Tensor) -> nn.Module:
    """Return the net with weights and activations in 8 bits; ``net`` is left as it was.

    What comes back has integer weights and runs anywhere; ``torch.compile`` turns it into x86's
    integer kernels.
    """
    batch = torch.export.Dim("batch", min=2, max=4096)
    shapes = ({0: batch},)
    traced = torch.export.export(net, (calibration[:2],), dynamic_shapes=shapes).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(traced, quantizer)
    for images in calibration.split(64):
        prepared(images)
    return convert_pt2e(prepared)


@torch.no_grad()
def main(epochs: tuple[int, int] = (8, 12), macs: float = 0.5) -> dict[str, float]:
    with torch.enable_grad():
        net, calibration, held_out = compact_digits(epochs, macs)
    images, labels = held_out.tensors
    small = quantise(net, calibration[:512])
    before, after = net(images).argmax(1), small(images).argmax(1)
    integer = [b for b in small.buffers() if b.dtype == torch.int8]
    return {
        "float32": (before == labels).float().mean().item(),
        "int8": (after == labels).float().mean().item(),
        "agreement": (before == after).float().mean().item(),
        "int8_tensors": len(integer),
        "layers": sum(isinstance(m, nn.Conv2d | nn.Linear) for m in net.modules()),
    }


if __name__ == "__main__":
    print(main())
