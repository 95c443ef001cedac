"""The parts in loops of other people: accelerate, fastai's Learner, speechbrain's Brain.

Each trains a small net on digits until the target is met, with accumulated gradients where the loop
has them, keeps the zeros in an average of the weights, and prunes what is left.
"""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import resconv

EXAMPLES = Path(__file__).parents[1] / "examples"
MACS, EPOCHS = 0.6, 6


@pytest.fixture
def digits(monkeypatch):
    """A net, its gated copy and batches of 128 images."""
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("digits")
    torch.manual_seed(0)
    images, labels = module.digits()[0][:128]
    net = module.Net(8, 3)
    gated = resconv.convert(net, images[:2]).train()
    batches = DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=16)
    return net, gated, batches


def assert_arrived(gated, sparsifier, net, images):
    """The steps were counted right, the target is met, and the pruned net is the gated one."""
    outcome = sparsifier.finish()
    assert outcome.met
    assert outcome.step == sparsifier.total_steps
    assert outcome.removed
    compact = resconv.prune(gated.eval())
    assert resconv.verify(gated, compact)
    share = resconv.profile(compact, images).macs / resconv.profile(net, images).macs
    assert share <= MACS


def test_accelerate(digits):
    accelerate = pytest.importorskip("accelerate")
    net, gated, batches = digits
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(gated.parameters(), lr=1e-2)
    gated, optimizer, loader = accelerator.prepare(gated, optimizer, batches)
    steps = EPOCHS * len(loader) // 2
    sparsifier = resconv.Sparsifier(gated, macs=MACS, total_steps=steps)
    sparsifier.attach(optimizer)
    average = torch.optim.swa_utils.AveragedModel(gated)
    for _ in range(EPOCHS):
        for images, labels in loader:
            with accelerator.accumulate(gated):
                loss = nn.functional.cross_entropy(gated(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            average.update_parameters(gated)
            resconv.copy_zeros(gated, average.module)
    averaged = average.module.eval()
    images = next(iter(batches))[0]
    assert_arrived(accelerator.unwrap_model(gated), sparsifier, net, images[:1])
    assert resconv.verify(averaged, resconv.prune(averaged))


def test_fastai(digits, tmp_path):
    pytest.importorskip("fastai.callback.schedule")  # gives the Learner fit_one_cycle
    from fastai.callback.core import Callback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    net, gated, batches = digits

    class Sparse(Callback):
        def before_fit(self):
            steps = self.n_epoch * len(self.dls.train)
            self.sparsifier = resconv.Sparsifier(gated, macs=MACS, total_steps=steps)
            self.sparsifier.attach(self.opt)

    callback = Sparse()
    learner = Learner(
        DataLoaders(batches, batches, device=torch.device("cpu")),
        gated,
        nn.CrossEntropyLoss(),
        opt_func=lambda params, **k: OptimWrapper(params, torch.optim.AdamW, **k),
        lr=1e-2,
        path=tmp_path,
        cbs=[callback],
    )
    with learner.no_logging():
        learner.fit_one_cycle(EPOCHS)
    assert_arrived(gated, callback.sparsifier, net, next(iter(batches))[0][:1])


def test_fastais_own_optimizer_is_refused(digits):
    pytest.importorskip("fastai")
    from fastai.optimizer import Adam

    _, gated, _ = digits
    sparsifier = resconv.Sparsifier(gated, macs=MACS, total_steps=50)
    with pytest.raises(resconv.ResConvError, match=r"Attach the Sparsifier to a torch\.optim"):
        sparsifier.attach(Adam(list(gated.parameters()), lr=1e-2))


def test_speechbrain(digits):
    core = pytest.importorskip("speechbrain.core")
    net, gated, batches = digits

    class Digits(core.Brain):
        def compute_forward(self, batch, stage):
            return self.modules.net(batch[0])

        def compute_objectives(self, predictions, batch, stage):
            return nn.functional.cross_entropy(predictions, batch[1])

        def on_fit_start(self):
            super().on_fit_start()
            steps = EPOCHS * len(batches)
            self.sparsifier = resconv.Sparsifier(gated, macs=MACS, total_steps=steps)
            self.sparsifier.attach(self.optimizer)

    brain = Digits(
        modules={"net": gated},
        opt_class=lambda params: torch.optim.AdamW(params, lr=1e-2),
        run_opts={"device": "cpu"},
    )
    brain.fit(range(EPOCHS), batches, progressbar=False)
    assert_arrived(gated, brain.sparsifier, net, next(iter(batches))[0][:1])


def test_without_the_sparsifier_nothing_arrives(digits):
    _, gated, batches = digits
    optimizer = torch.optim.AdamW(gated.parameters(), lr=1e-2)
    for images, labels in batches:
        nn.functional.cross_entropy(gated(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(resconv.ResConvError, match="No scale is exactly 0"):
        resconv.prune(gated.eval())
