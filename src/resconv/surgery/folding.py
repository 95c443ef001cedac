"""BatchNorms into the convs before them: the form to deploy."""

from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.candidates import owner_of, why_untouchable
from ..analysis.graph import Ref
from ..analysis.inputs import unwrap
from ..analysis.layers import norm_after
from ..analysis.recorder import record
from ..errors import FusionError
from ..nn.algebra import fold_norm
from .copying import copy_model
from .edits import CONV_GEOMETRY, apply_edits, droppable, indexed_containers

__all__ = ["conv_edit", "fill_convs", "fold_norms"]


def conv_edit(path: str, conv: nn.Module, bias: bool) -> dict[str, Any]:
    kinds = {nn.Conv1d: "Conv1d", nn.Conv2d: "Conv2d", nn.Conv3d: "Conv3d"}
    name = next(n for k, n in kinds.items() if isinstance(conv, k))
    args = {
        key: list(value) if isinstance(value := getattr(conv, key), tuple) else value
        for key in CONV_GEOMETRY
    }
    return {"op": "conv", "path": path, "type": name, "args": {**args, "bias": bias}}


def fill_convs(model: nn.Module, kernels: dict[str, tuple[Tensor, Tensor | None]]) -> None:
    """Copy kernels and biases into the named convs, each rounded once to its own type."""
    with torch.no_grad():
        for path, (weight, bias) in kernels.items():
            conv = model.get_submodule(path)
            assert isinstance(conv.weight, Tensor)
            conv.weight.copy_(weight.to(conv.weight))
            if bias is not None:
                assert isinstance(conv.bias, Tensor)
                conv.bias.copy_(bias.to(conv.bias))


@torch.inference_mode(False)
def fold_norms(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Return a copy with every BatchNorm that alone reads a conv folded into that conv."""
    model = copy_model(unwrap(model), FusionError)
    with indexed_containers() as indexed:
        graph = record(model, example_inputs)
    edits: list[dict[str, Any]] = []
    kernels: dict[str, tuple[Tensor, Tensor | None]] = {}
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
        modes = bn.training
        bn.eval()
        kernels[path] = fold_norm(conv.weight, conv.bias, bn)
        bn.train(modes)
        edits.append(conv_edit(path, conv, True))
        edits.append({"op": "children", "path": norm, "names": list(children)})
        left = [n for n in children if not isinstance(bn.get_submodule(n), nn.Identity)]
        if not left and droppable(model, graph, norm, indexed):
            edits.append({"op": "drop", "path": norm})
    model = apply_edits(model, edits)
    fill_convs(model, kernels)
    before = getattr(model, "resconv_record", None)
    source = getattr(model, "resconv_source", None)
    model.resconv_record = {  # type: ignore[assignment]
        "source": (before or {}).get("source") or source,
        "edits": [*((before or {}).get("edits") or []), *edits],
    }
    return model
