"""Small random networks for the property tests: a recipe of plain data, and the module it makes."""

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

__all__ = ["RandomNet", "recipes"]

CONV = {1: nn.Conv1d, 2: nn.Conv2d}
BATCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
SIZE = 8

ACTS = ("relu", "relu_", "relu6", "leaky", "silu", "gelu", "hardtanh", "none", "none")
NORMS = ("batch", "batch", "batch", "plain_batch", "group", "none", "none")
POOLS = ("max", "avg", "up", "blur")
FUNCTIONS = (
    "relu",
    "relu_",
    "clamp",
    "drop",
    "double",
    "shift",
    "clone",
    "half_channels",
    "sigmoid",
)

small = st.integers(0, 7)


def convs(channels=("same", "same", "same", "other"), stride=(1, 1, 1, 2)):
    return st.fixed_dictionaries(
        {
            "channels": st.sampled_from(channels),
            "kernel": st.sampled_from((1, 3, 3, 5)),
            "dilation": st.sampled_from((1, 1, 2)),
            "stride": st.sampled_from(stride),
            "groups": st.sampled_from((1, 1, 2, 4)),
            "bias": st.booleans(),
            "mode": st.sampled_from(("zeros", "zeros", "reflect", "circular")),
            "norm": st.sampled_from(NORMS),
            "act": st.sampled_from(ACTS),
        }
    )


same = convs(("same",), (1,))
steps = st.one_of(
    st.tuples(st.just("conv"), small, convs()),
    st.tuples(st.just("conv"), small, same),
    st.tuples(st.just("chain"), small, st.lists(same, min_size=1, max_size=3)),
    st.tuples(
        st.just("residual"),
        small,
        st.lists(same, min_size=1, max_size=3),
        st.sampled_from(("x+y", "y+x", "y+=x", "scaled")),
        st.sampled_from(ACTS),
    ),
    st.tuples(st.just("again"), small, small),
    st.tuples(st.just("add"), small, small, st.booleans()),
    st.tuples(st.just("mul"), small, small),
    st.tuples(st.just("cat"), small, small),
    st.tuples(st.just("pool"), small, st.sampled_from(POOLS)),
    st.tuples(st.just("call"), small, st.sampled_from(FUNCTIONS)),
    st.tuples(st.just("gate"), small),
)


def recipes():
    return st.fixed_dictionaries(
        {
            "dims": st.sampled_from((1, 2, 2)),
            "width": st.sampled_from((4, 8)),
            "stem": convs(("other",), (1,)),
            "steps": st.lists(steps, min_size=2, max_size=7),
            "head": st.sampled_from(("pool", "flat", "map", "two")),
        }
    )


def activation(name):
    makers = {
        "relu": nn.ReLU,
        "relu_": lambda: nn.ReLU(inplace=True),
        "relu6": nn.ReLU6,
        "leaky": lambda: nn.LeakyReLU(0.1),
        "silu": nn.SiLU,
        "gelu": nn.GELU,
        "hardtanh": lambda: nn.Hardtanh(-0.5, 1.0),
        "none": nn.Identity,
    }
    return makers[name]()


def layers(dims, c_in, c_out, spec):
    """conv, norm and activation as the recipe says; the size is kept but for the stride."""
    groups = spec["groups"] if c_in % spec["groups"] == c_out % spec["groups"] == 0 else 1
    kernel, dilation = spec["kernel"], spec["dilation"]
    padding = dilation * (kernel - 1) // 2
    # torch's reflection is bounded by the size.
    mode = spec["mode"] if padding < 2 else "zeros"
    conv = CONV[dims](
        c_in,
        c_out,
        kernel,
        spec["stride"],
        padding,
        dilation,
        groups,
        bias=spec["bias"],
        padding_mode=mode,
    )
    norm = {
        "batch": lambda: BATCH[dims](c_out),
        "plain_batch": lambda: BATCH[dims](c_out, affine=False),
        "group": lambda: nn.GroupNorm(1, c_out),
        "none": nn.Identity,
    }[spec["norm"]]()
    return nn.Sequential(conv, norm, activation(spec["act"]))


class Residual(nn.Module):
    def __init__(self, dims, width, specs, how, act):
        super().__init__()
        self.body = nn.ModuleList(layers(dims, width, width, s) for s in specs)
        self.how = how
        if how == "scaled":
            self.layer_scale = nn.Parameter(torch.rand(width, *[1] * dims) + 0.5)
        self.act = activation(act)

    def forward(self, x):
        y = x
        for layer in self.body:
            y = layer(y)
        if self.how == "x+y":
            y = x + y
        elif self.how == "y+x":
            y = y + x
        elif self.how == "scaled":
            y = x + y * self.layer_scale
        else:
            y += x
        return self.act(y)


class SqueezeExcite(nn.Module):
    def __init__(self, dims, width):
        super().__init__()
        self.conv = CONV[dims](width, width, 1)
        self.axes = tuple(range(2, 2 + dims))

    def forward(self, x):
        return x * torch.sigmoid(self.conv(x.mean(self.axes, keepdim=True)))


class RandomNet(nn.Module):
    """Runs the recipe's steps; every step reads values made before and makes one more."""

    def __init__(self, recipe):
        super().__init__()
        dims, width = recipe["dims"], recipe["width"]
        self.dims = dims
        self.stem = layers(dims, 3, width, recipe["stem"])
        self.parts = nn.ModuleDict()
        self.program = []
        shapes = [(width, SIZE)]
        made = []  # (name, channels) of convs that keep the shape, to be called again
        for i, step in enumerate(recipe["steps"]):
            name, source = f"s{i}", step[1] % len(shapes)
            channels, size = shapes[source]
            new = (channels, size)
            kind, extra = step[0], None
            if kind == "conv":
                spec = step[2]
                out = channels if spec["channels"] == "same" else channels + 4
                self.parts[name] = layers(dims, channels, out, spec)
                new = (out, -(-size // spec["stride"]))
                if new == (channels, size):
                    made.append((name, channels))
            elif kind == "chain":
                specs = [s | {"channels": "same"} for s in step[2]]
                self.parts[name] = nn.Sequential(
                    *(layers(dims, channels, channels, s) for s in specs)
                )
                made.append((name, channels))
            elif kind == "residual":
                self.parts[name] = Residual(dims, channels, *step[2:])
            elif kind == "gate":
                self.parts[name] = SqueezeExcite(dims, channels)
            elif kind == "again":
                fitting = [n for n, c in made if c == channels]
                if not fitting:
                    continue
                extra = fitting[step[2] % len(fitting)]
            elif kind in ("add", "mul"):
                partners = [
                    j for j, s in enumerate(shapes) if s == new and (kind == "add" or j != source)
                ]
                if not partners:
                    continue
                extra = (partners[step[2] % len(partners)], len(step) > 3 and step[3])
            elif kind == "cat":
                partners = [j for j, s in enumerate(shapes) if s[1] == size]
                extra = partners[step[2] % len(partners)]
                new = (channels + shapes[extra][0], size)
            elif kind == "pool":
                extra = step[2]
                if extra == "up":
                    new = (channels, 2 * size)
                if size > 16 or new[0] > 32:
                    continue
            elif kind == "call":
                extra = step[2]
                if extra == "half_channels":
                    new = (channels // 2, size)
                if new[0] < 4:
                    continue
            if new[0] > 40:
                self.parts.pop(name) if name in self.parts else None
                continue
            self.program.append((kind, name, source, extra))
            shapes.append(new)
        self.head = recipe["head"]
        last = shapes[-1]
        if self.head == "flat":
            self.fc = nn.Linear(last[0] * last[1] ** dims, 3)
        elif self.head in ("pool", "two"):
            self.fc = nn.Linear(last[0], 3)

    def forward(self, x):
        values = [self.stem(x)]
        for kind, name, source, extra in self.program:
            v = values[source]
            if kind in ("conv", "chain", "residual", "gate"):
                new = self.parts[name](v)
            elif kind == "again":
                new = self.parts[extra](v)
            elif kind == "add":
                new = v + values[extra[0]] if extra[1] else values[extra[0]] + v
            elif kind == "mul":
                new = v * values[extra[0]]
            elif kind == "cat":
                new = torch.cat([v, values[extra]], 1)
            elif kind == "pool":
                new = self.pool(v, extra)
            else:
                new = self.call(v, extra)
            values.append(new)
        y = values[-1]
        if self.head == "map":
            return y
        if self.head == "flat":
            return self.fc(y.flatten(1))
        out = self.fc(y.mean(tuple(range(2, 2 + self.dims))))
        return {"out": out, "first": values[0]} if self.head == "two" else out

    def pool(self, v, how):
        one = self.dims == 1
        if how == "max":
            return (F.max_pool1d if one else F.max_pool2d)(v, 3, 1, 1)
        if how == "avg":
            return (F.avg_pool1d if one else F.avg_pool2d)(v, 3, 1, 1)
        if how == "up":
            return F.interpolate(v, scale_factor=2, mode="nearest")
        kernel = torch.ones(v.shape[1], 1, *[1] * self.dims, dtype=v.dtype) * 0.5
        return (F.conv1d if one else F.conv2d)(v, kernel, groups=v.shape[1])

    def call(self, v, how):
        if how == "relu_":
            return v.clone().relu_()
        if how == "half_channels":
            return v[:, : v.shape[1] // 2]
        functions = {
            "relu": F.relu,
            "clamp": lambda t: t.clamp(-1.0, 0.5),
            "drop": lambda t: F.dropout(t, 0.3, training=False),
            "double": lambda t: t * 2,
            "shift": lambda t: t + 0.25,
            "clone": lambda t: t.clone(),
            "sigmoid": torch.sigmoid,
        }
        return functions[how](v)
