"""The laws of the surgery, on networks nobody wrote: each holds, or the refusal is clean."""

import tempfile

import hypothesis
import torch
from hypothesis import given
from hypothesis import strategies as st

import resconv
from resconv.nn.gates import zeroed
from resconv.planning.costs import ledger
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
            if gate.control is not None:
                gate.control.fill_(draw(size) * (draw(special) or 1))


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
    order = data.draw(st.permutations(names))
    remove = order[: data.draw(st.integers(1, len(names)))]
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

    costs = ledger(gated, x)
    # Branches whose scale is 0 go as well when the net is fused.
    zeros = [n for n, g in resconv.gates(gated).items() if g.control is None and not g.scale.item()]
    gone = {*plan.remove, *zeros}
    assert resconv.profile(compact, x).macs == costs.macs - costs.saving(gone).macs
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
