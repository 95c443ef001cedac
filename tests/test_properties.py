"""The laws of the surgery, on networks nobody wrote: each holds, or the refusal is clean."""

import tempfile

import hypothesis
import torch
from hypothesis import given
from hypothesis import strategies as st

import resconv
from resconv.analysis.candidates import compatible
from resconv.nn.gates import Segment, zeroed
from resconv.planning.costs import cost_model
from resconv.surgery.verification import relative_error

from .helpers import randomise
from .random_nets import SIZE, RandomNet, recipes

TOLERANCE = 1e-9


def build(recipe, seed):
    torch.manual_seed(seed)
    model = randomise(RandomNet(recipe).double(), seed)
    x = torch.randn(2, 3, *[SIZE] * recipe["dims"], dtype=torch.float64)
    return model, x


def outputs(model, x):
    with torch.no_grad():
        return model(x)


def set_scalars(gated, draw):
    """Scales and controls in [0.5, 1.5], some of them negative, some scales 0."""
    special = st.sampled_from((1, 1, 1, 1, 1, 1, -1, 0))
    size = st.sampled_from((0.5, 0.8, 1.0, 1.3, 1.5))
    with torch.no_grad():
        for gate in resconv.gates(gated).values():
            gate.scale.fill_(draw(size) * draw(special))
            if isinstance(gate, Segment):
                # In a net to be shipped it is there whole or not at all; anything else works, too.
                gate.scale.fill_(draw(st.sampled_from((1, 1, 1, 0, 0.7))))
                fill_left(gate, draw(st.integers(0, 99)))
            if gate.control is not None:
                gate.control.fill_(draw(size) * (draw(special) or 1))


def fill_left(gate, seed):
    """Give what a segment leaves numbers that are not those of a fresh layer, nor zero."""
    gen = torch.Generator().manual_seed(seed)
    for name, t in gate.left.state_dict().items():
        if t.is_floating_point():
            some = torch.randn(t.shape, generator=gen, dtype=t.dtype)
            t.copy_(some.abs() + 0.5 if name.endswith("running_var") else 0.5 * some)


def assert_close(a, b, what):
    error = relative_error(a, b)
    assert error <= TOLERANCE, f"{what}: {error:.2e}"


def refused(when, error, *reasons):
    """A refusal is clean when it is one of ours, about something that is known to be impossible."""
    assert any(reason in str(error) for reason in reasons), error
    hypothesis.event(f"{when}: {type(error).__name__}: {str(error).split(':')[0][:40]}")


@given(
    recipes(),
    st.integers(0, 2**16),
    st.sampled_from(("layers", "blocks", "summands", "segments", "gates", "all", "all", "all")),
    st.sampled_from(("keep", "identity")),
    st.data(),
)
def test_laws_hold_on_random_nets(recipe, seed, units, start, data):
    model, x = build(recipe, seed)
    before = outputs(model, x)
    try:
        gated = resconv.convert(model, x, units=units, start=start)
    except resconv.ResConvError as error:
        return refused("first", error, "Nothing to convert")
    if start == "keep":
        assert_close(outputs(gated, x), before, "convert")
    set_scalars(gated, data.draw)
    names = list(resconv.gates(gated))
    costs = cost_model(gated, x)
    order = compatible(data.draw(st.permutations(names)), costs.excluded)
    remove = order[: data.draw(st.integers(1, len(order)))]
    plan = resconv.Plan(tuple(remove))
    with zeroed(gated, plan.remove):
        promised = outputs(gated, x)
    whole = outputs(gated, x)
    try:
        compact = resconv.prune(gated, plan)
    except resconv.ResConvError as error:
        return refused("prune", error, "has to be rewritten", "writes in place into")
    assert_close(outputs(gated, x), whole, "the argument is left as it was")
    assert_close(outputs(compact, x), promised, "prune")
    assert not resconv.gates(compact)

    # What has no control and a scale of 0 goes as well when the net is fused.
    every = resconv.gates(gated)
    zeros = [n for n, g in every.items() if g.control is None and not g.scale.item()]
    gone = compatible((*plan.remove, *(n for n in zeros if n not in remove)), costs.excluded)
    macs, left = resconv.profile(compact, x).macs, costs.left(gone).macs
    if any(kind.startswith("summand") for kind in costs.kinds.values()):
        assert macs <= left  # two readers that go may leave a third thing that nobody reads
    else:
        assert macs == left
    assert_close(outputs(resconv.fuse(gated), x), whole, "fuse")
    assert_close(outputs(resconv.fuse(compact, x, fold_norms=True), x), promised, "fold")

    cut = data.draw(st.integers(1, len(remove)))
    half = resconv.prune(gated, resconv.Plan(tuple(remove[:cut])), fuse=False)
    left = [n for n in remove[cut:] if n in resconv.gates(half)]
    assert set(resconv.gates(half)) <= set(names) - set(remove[:cut])
    twice = resconv.prune(half, resconv.Plan(tuple(left))) if left else resconv.fuse(half)
    assert_close(outputs(twice, x), promised, "prune twice")

    with tempfile.TemporaryDirectory() as folder:
        resconv.save(compact, folder, plan=plan, example_inputs=x)
        back = resconv.load(folder, model=model)
    assert_close(outputs(back, x), promised, "load")
    try:
        again = resconv.convert(compact, x, units="all")
    except resconv.ResConvError as error:
        return refused("again", error, "Nothing to convert")
    assert_close(outputs(again, x), promised, "convert again")
    return None
