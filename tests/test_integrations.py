"""The training loops of others: every example arrives at its target, callbacks resume exactly."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import resconv
from resconv import nets

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _examples(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


def example(name, package=None):
    if package is not None:
        pytest.importorskip(package)
    return importlib.import_module(name)


@pytest.mark.parametrize(
    ("name", "package", "epochs", "macs"),
    [
        ("own_loop", None, (3, 5, 1), 0.5),
        ("lightning_callback", "lightning", (3, 5), 0.5),
        ("huggingface", "transformers", (3, 5), 0.6),
        ("timm_train", "timm", (3, 4), 0.75),
    ],
)
def test_example_arrives_at_its_target(name, package, epochs, macs, capsys):
    # main() itself verifies that the pruned net equals the gated one without naming a plan, which
    # holds only where every planned scale is exactly 0.
    result = example(name, package).main(epochs=epochs, macs=macs)
    assert result["macs"] <= macs
    assert result["compact"] > 0.8
    assert result["dense"] > 0.8


def test_without_the_callback_the_example_fails():
    module = example("lightning_callback", "lightning")
    module.SparsityCallback = lambda budget: __import__("lightning").pytorch.Callback()
    try:
        with pytest.raises(resconv.ResConvError):
            module.main(epochs=(1, 1))
    finally:
        del sys.modules["lightning_callback"]


def small():
    """A converted net with 4 units' worth of blocks, and two batches of digits in a fixed order."""
    digits = example("digits")
    torch.manual_seed(0)
    images, labels = digits.digits()[0][:64]
    gated = resconv.convert(digits.Net(8, 3), images[:2]).train()
    return gated, TensorDataset(images, labels)


def assert_same(a, b):
    assert resconv.gates(a)
    ours, theirs = a.state_dict(), b.state_dict()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-6, msg=key)


# Few epochs in which the units go one after the other; the run is stopped where some are fading.
BUDGET, EPOCHS, STOP = resconv.Budget(macs=0.4), 20, 5


def fit_lightning(folder, *, resume=None, callbacks=True, strength=None, **options):
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    from resconv.integrations.lightning import SparsityCallback

    gated, data = small()
    sparsity = SparsityCallback(BUDGET) if strength is None else SparsityCallback(strength=strength)
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=STOP + 1)
    trainer = lightning.Trainer(
        **{"max_epochs": EPOCHS, "accelerator": "cpu", "logger": False} | options,
        callbacks=[keep, sparsity] if callbacks else [keep],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = example("lightning_callback").Classifier(gated, 0.01)
    trainer.fit(module, DataLoader(data, batch_size=32), ckpt_path=resume)
    return gated, sparsity.sparsifier, trainer


def test_lightning_resumes_exactly(tmp_path):
    pytest.importorskip("lightning")
    whole, first, trainer = fit_lightning(tmp_path / "a")
    assert trainer.callback_metrics["macs"] == pytest.approx(first.history[-1].macs)
    assert first.history[-1].macs <= 0.4
    stored = tmp_path / "a" / f"epoch={STOP}.ckpt"
    saved = torch.load(stored, weights_only=True)["callbacks"]["SparsityCallback"]["sparsifier"]
    assert saved["fading"]  # in the middle of it
    resumed, second, _ = fit_lightning(tmp_path / "b", resume=stored)
    assert_same(resumed, whole)
    assert second.removed == first.removed
    # Negative control: without the callback's state the resumed run goes another way.
    content = torch.load(stored, weights_only=True)
    content["callbacks"]["SparsityCallback"] = {}
    torch.save(content, tmp_path / "bare.ckpt")
    _, bare, _ = fit_lightning(tmp_path / "c", resume=tmp_path / "bare.ckpt")
    assert bare.state_dict()["step"] < second.state_dict()["step"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_lightning_in_other_precisions(tmp_path, precision):
    pytest.importorskip("lightning")
    gated, sparsifier, _ = fit_lightning(tmp_path, precision=precision)
    assert sparsifier.history[-1].macs <= 0.4
    assert all(g.scale.dtype == torch.float32 for g in resconv.gates(gated).values())


@pytest.mark.parametrize("strength", [0.0, 1e-3])
def test_lightning_logs_macs_under_pressure_alone(tmp_path, strength):
    pytest.importorskip("lightning")
    _, _, trainer = fit_lightning(tmp_path, strength=strength, max_epochs=1)
    assert ("macs" in trainer.callback_metrics) == (strength > 0)


def test_lightning_refusals(tmp_path):
    lightning = pytest.importorskip("lightning")
    from resconv.integrations.lightning import SparsityCallback

    module = example("lightning_callback")
    gated, data = small()

    def fit(net, **options):
        trainer = lightning.Trainer(
            **{"max_epochs": 2, "accelerator": "cpu", "logger": False} | options,
            callbacks=[SparsityCallback(BUDGET)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(net, DataLoader(data, batch_size=32))

    with pytest.raises(resconv.ResConvError, match="holds no converted net"):
        fit(module.Classifier(example("digits").Net(8, 1), 0.01))
    with pytest.raises(resconv.ResConvError, match="at least 20"):
        fit(module.Classifier(gated, 0.01))
    double = module.Classifier(gated, 0.01)
    double.ema = resconv.convert(example("digits").Net(8, 1), data.tensors[0][:2])
    with pytest.raises(resconv.ResConvError, match=r"2 converted nets \(net, ema\)"):
        fit(double)

    class Endless(module.Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    with pytest.raises(resconv.ResConvError, match="does not know how many steps"):
        fit(Endless(gated, 0.01), max_epochs=-1)
    with pytest.warns(UserWarning, match="in eval mode"), pytest.raises(resconv.ResConvError):
        fit(module.Classifier(gated.eval(), 0.01))


def train_huggingface(folder, *, resume=None, callback=True, **options):
    from transformers import Trainer, TrainingArguments

    from resconv.integrations.huggingface import SparsityCallback

    module = example("huggingface")
    torch.manual_seed(0)
    images, labels = example("digits").digits()[0][:64]
    gated = resconv.convert(module.build(), {"pixel_values": images[:2]}).train()
    sparsity = SparsityCallback(resconv.Budget(macs=0.6))
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=32,
        learning_rate=0.003,
        save_strategy="steps",
        save_steps=2 * (STOP + 1),
        logging_strategy="epoch",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(
        gated,
        arguments,
        train_dataset=module.Images(TensorDataset(images, labels)),
        callbacks=[sparsity] if callback else [],
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    active = [c for c in trainer.callback_handler.callbacks if isinstance(c, SparsityCallback)]
    return gated, active[0].sparsifier if active else None, trainer


def test_huggingface_resumes_exactly(tmp_path):
    pytest.importorskip("transformers")
    whole, first, trainer = train_huggingface(tmp_path / "a")
    assert first.history[-1].macs <= 0.6
    assert trainer.state.log_history[-2]["macs"] == pytest.approx(first.history[-1].macs)
    stored = tmp_path / "a" / f"checkpoint-{2 * (STOP + 1)}"
    for options in ({}, {"restore_callback_states_from_checkpoint": True}):
        resumed, second, _ = train_huggingface(tmp_path / "b", resume=stored, **options)
        assert_same(resumed, whole)
        assert second.removed == first.removed
    train_huggingface(tmp_path / "c", callback=False, max_steps=20)
    with pytest.raises(resconv.ResConvError, match="written without the SparsityCallback"):
        train_huggingface(tmp_path / "c", resume=tmp_path / "c" / "checkpoint-20")


def test_average_takes_over_zeros():
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    gated, _ = small()
    ema = AveragedModel(gated, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ema.update_parameters(gated)
    name, gate = next(iter(resconv.gates(gated).items()))
    with torch.no_grad():
        gate.scale.zero_()
    ema.update_parameters(gated)  # the second is the first that averages
    mine = resconv.gates(ema.module)
    assert mine[name].scale.item() > 0  # an average alone does not get there
    others = {n: g.scale.item() for n, g in mine.items() if n != name}
    resconv.copy_zeros(gated, ema)
    assert mine[name].scale.item() == 0
    assert others == {n: g.scale.item() for n, g in mine.items() if n != name}
    with pytest.raises(resconv.ResConvError, match="has no unit named"):
        resconv.copy_zeros(gated, nets.create("resnet20"))
    with pytest.raises(resconv.ResConvError, match="no gates"):
        resconv.copy_zeros(nets.create("resnet20"), gated)


def test_distilling():
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    # Equal, and equal up to a constant: the same probabilities.
    assert resconv.recovery.distillation_loss(logits, logits + 3).item() == pytest.approx(
        0, abs=1e-12
    )
    loss = resconv.recovery.distillation_loss(logits, teacher, temperature=2.0)
    p, q = (torch.softmax(t / 2, 1) for t in (teacher, logits))
    torch.testing.assert_close(loss, 4 * (p * (p.log() - q.log())).sum(1).mean())
    loss.backward()
    assert teacher.grad is None
    # T^2 keeps the gradient's size: at a high temperature it is that of half the squared distance
    # of the centred logits, mean over classes.
    hot = logits.detach().clone().requires_grad_()
    resconv.recovery.distillation_loss(hot, teacher, temperature=1e4).backward()
    apart = (hot - teacher).detach()
    wanted = (apart - apart.mean(1, keepdim=True)) / (6 * 5)
    torch.testing.assert_close(hot.grad, wanted, rtol=1e-2, atol=1e-4)
    half = resconv.recovery.distillation_loss(
        logits.detach().bfloat16(), teacher.detach().bfloat16()
    )
    assert half.dtype == torch.float32
    # Per pixel, too.
    a, b = torch.randn(2, 2, 5, 3, 3)
    flat = [t.permute(0, 2, 3, 1).reshape(-1, 5) for t in (a, b)]
    torch.testing.assert_close(
        resconv.recovery.distillation_loss(a, b), resconv.recovery.distillation_loss(*flat)
    )
    with pytest.raises(resconv.ResConvError, match=r"\(6, 5\).*\(6, 4\)"):
        resconv.recovery.distillation_loss(logits, teacher[:, :4])
    with pytest.raises(resconv.ResConvError, match="temperature"):
        resconv.recovery.distillation_loss(logits, teacher, temperature=0)


def test_the_code_of_the_page_runs():
    pytest.importorskip("lightning")
    page = (EXAMPLES.parent / "docs" / "training.md").read_text()
    pieces = page.split("```python\n")[1:]
    code = "\n".join(piece.partition("```")[0] for piece in pieces)
    scope = {}
    exec(compile(code, "docs/training.md", "exec"), scope)
    assert code.count("resconv.verify(") == 2
    assert code.count("assert ") == 2
    assert not resconv.gates(scope["compact"])
