"""Ordinary training raises no alarm: warnings are errors here, and ``loss_check`` stays near 1."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradreg_optim import GradRegOptimizer

STEPS = 40


def perceptron(*more):
    return nn.Sequential(nn.Linear(20, 32), nn.Tanh(), *more, nn.Linear(32, 5))


def tied():
    """Its two embeddings are one parameter."""
    model = nn.Sequential(nn.Embedding(11, 16), nn.Flatten(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 11, bias=False))
    model[4].weight = model[0].weight
    return model


def convolutions():
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 5)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(160, 5),
    )


def attention():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.Linear(20, 32), nn.Unflatten(1, (4, 8)), layer, nn.Flatten(), nn.Linear(32, 5))


MODELS = {
    "plain": perceptron,
    "ReLU": lambda: nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5)),
    "dropout": lambda: perceptron(nn.Dropout(0.2)),
    "BatchNorm": lambda: perceptron(nn.BatchNorm1d(32)),
    "spectral norm": lambda: perceptron(nn.utils.parametrizations.spectral_norm(nn.Linear(32, 32))),
    "convolutions": convolutions,
    "attention": attention,
    "tied weights": tied,
}


def inputs_of(name, number):
    generator = torch.Generator().manual_seed(number)
    if name == "tied weights":
        return torch.randint(11, (32, 2), generator=generator), torch.randint(11, (32,), generator=generator)
    return torch.randn(32, 20, generator=generator), torch.randint(5, (32,), generator=generator)


def sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, weight_decay=0.1, momentum=0.9)


PRECISIONS = ["float64", "float32", "bfloat16 autocast", "bfloat16"]


def train(
    name,
    precision,
    *,
    steps=STEPS,
    scale=1.0,
    make=torch.optim.AdamW,
    batches=8,
    scaler=None,
    clip=None,
    **settings,
):
    torch.manual_seed(0)
    model = MODELS[name]()
    if precision in ("float64", "bfloat16"):
        model = model.to(getattr(torch, precision))
    optimizer = GradRegOptimizer(make(model.parameters(), lr=1e-3), model=model, scaler=scaler, **settings)
    checks, losses = [], []
    for step in range(steps):
        x, y = inputs_of(name, step % batches)
        x = x.to(next(model.parameters()).dtype) if x.is_floating_point() else x
        for _ in optimizer.passes():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16 autocast"):
                loss = scale * F.cross_entropy(model(x).float() if precision != "float64" else model(x), y)
            (loss if scaler is None else scaler.scale(loss)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if scaler is not None:
            scaler.update()
        losses.append(loss.item())
        if "loss_check" in optimizer.metrics:
            checks.append(float(optimizer.metrics["loss_check"]))
    return optimizer, checks, losses


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_silence(name, precision):
    """All kinds of layers, in every precision."""
    optimizer, checks, _ = train(name, precision, strength=0.5)
    assert float(optimizer.metrics["skipped"]) == 0
    if precision.startswith("float"):
        assert len(checks) == STEPS
        assert max(abs(check - 1) for check in checks) < 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": 1e-6, "strength": 5e5, "radius": 5e-3},
        {"scale": 1e3, "strength": 0.05},
        {"method": "central"},
        {"make": sgd},
        {"radius": "auto"},
        {"clip": 0.05},
        {"every": 4, "warmup_steps": 3},
        {"g1_clip": 0.1, "g2_clip": 0.1},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_silence_with_settings(settings):
    """Small and large losses, weight decay, clips after the passes, and so on."""
    train("dropout", "float32", **{"strength": 0.5, **settings})


# Under bfloat16 autocast the self-check of the last steps is told, in which nothing but rounding is left of the gradient.
@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_silence_until_solved(precision):
    """The same batch until it is learnt by heart, and gradients vanish."""
    _, _, losses = train(
        "plain",
        precision,
        steps=600,
        batches=1,
        strength=0.5,
        make=lambda p, lr: torch.optim.AdamW(p, lr=1e-2),
    )
    assert losses[-1] < 0.05


def test_silence_under_a_scaler():
    """Both losses are divided by the scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    _, checks, _ = train("plain", "float32", scaler=scaler, strength=0.5)
    assert len(checks) == STEPS
    assert max(abs(check - 1) for check in checks) < 0.1
