"""BatchNorms into the convs before them: the form to deploy."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.candidates import owner_of, why_untouchable
from ..analysis.graph import Ref
from ..analysis.input_spec import ExampleInputs
from ..analysis.inputs import evaluating, unwrap
from ..analysis.layers import norm_after
from ..analysis.recorder import record
from ..errors import FusionError
from ..nn.algebra import fold_norm
from .copying import copy_model
from .edit_kinds import Children, Conv, Drop, Edit, Geometry
from .edits import apply_edits, droppable, indexed_containers
from .provenance import carry_on, provenance_of

__all__ = ["Fused", "conv_edit", "fill_convs", "fold_norms"]


def conv_edit(path: str, conv: Any, bias: bool) -> Conv:
    return Conv(
        path,
        f"Conv{len(conv.kernel_size)}d",  # type: ignore[arg-type]
        Geometry(
            in_channels=conv.in_channels,
            out_channels=conv.out_channels,
            kernel_size=conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            padding_mode=conv.padding_mode,
            bias=bias,
        ),
    )


@dataclass(frozen=True)
class Fused:
    """What a new conv holds, and the layers whose place it takes."""

    weight: Tensor
    bias: Tensor | None
    conv: nn.Module
    norm: nn.Module | None


def fill_convs(model: nn.Module, kernels: dict[str, Fused]) -> None:
    """Copy kernels and biases into the named convs, each rounded once to its own type.

    The new conv lies in memory as the old one did, and what was frozen stays so.
    """
    with torch.no_grad():
        for path, fused in kernels.items():
            conv: Any = model.get_submodule(path)
            old: Any = fused.conv
            conv.training = old.training
            # Memory that is channels-last keeps its strides.
            conv.weight.data = torch.empty_like(old.weight)
            conv.weight.copy_(fused.weight.to(conv.weight))
            conv.weight.requires_grad_(old.weight.requires_grad)
            if fused.bias is not None:
                conv.bias.copy_(fused.bias.to(conv.bias))
                shifts = (old.bias, None if fused.norm is None else fused.norm.bias)
                given = [b.requires_grad for b in shifts if isinstance(b, Tensor)]
                conv.bias.requires_grad_(any(given) if given else old.weight.requires_grad)


@torch.inference_mode(False)
def fold_norms(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Return a copy with every BatchNorm that alone reads a conv folded into that conv."""
    model = copy_model(unwrap(model), FusionError)
    with indexed_containers() as indexed:
        graph = record(model, example_inputs)
    edits: list[Edit] = []
    kernels: dict[str, Fused] = {}
    for node in graph.nodes:
        if node.op != "convolution" or node.args[6] or not isinstance(node.args[1], Ref):
            continue
        param = graph.values[node.args[1].value].param
        if param is None:
            continue
        path = owner_of(param)
        conv: Any = model.get_submodule(path)
        if type(conv) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            continue
        if why_untouchable(model, graph, path) is not None:
            continue
        norm, children, _ = norm_after(model, graph, node)
        if norm is None:
            continue
        bn = model.get_submodule(norm)
        with evaluating(bn):
            kernels[path] = Fused(*fold_norm(conv.weight, conv.bias, bn), conv, bn)
        edits.append(conv_edit(path, conv, True))
        edits.append(Children(norm, tuple(children)))
        left = [n for n in children if not isinstance(bn.get_submodule(n), nn.Identity)]
        if not left and droppable(model, graph, norm, indexed):
            edits.append(Drop(norm))
    model = apply_edits(model, edits)
    fill_convs(model, kernels)
    before = provenance_of(model)
    inputs = None if before.inputs is not None else ExampleInputs.of(example_inputs)
    carry_on(model, before, edits=edits, inputs=inputs)
    return model
