"""Buffers in a trainer: the second pass of a window starts where the first one did, and they move once a step."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from gradreg_optim import GradRegOptimizer

SETTINGS = {"strength": 0.01, "eps": 1e-3, "g1_clip": None, "g2_clip": None}
WINDOW = [slice(0, 4), slice(4, 8)]  # the micro-batches of one step


class Running(nn.Module):
    """Divides by a running mean square, kept by writes through ``.data``."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.zeros(6))

    def forward(self, x):
        self.scale.data.mul_(0.5).add_(x.detach().square().mean(0), alpha=0.5)
        return x / (1 + self.scale)


class Initialized(nn.Module):
    """Scales by weights that the first forward sets from its batch, as ActNorm does."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("is_ready", torch.tensor(False))

    def forward(self, x):
        if not self.is_ready:
            with torch.no_grad():
                self.scale.copy_(1 / x.std(0))
                self.is_ready.fill_(True)
        return x * self.scale


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), layer(), nn.Linear(6, 2)).double()

    def forward(self, x, labels):
        return {"loss": (self.layers(x) - labels).square().mean()}


class InOrder(Trainer):
    def _get_train_sampler(self, *_args):
        return SequentialSampler(self.train_dataset)


def passes_of(model, shift, data, window):
    """The gradient of the mean loss of a window, and the copy of the model it was taken on."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, along in zip(other.parameters(), shift, strict=False):
            parameter += along
    loss = sum(other(data[0][part], data[1][part])["loss"] for part in window) / len(window)
    return torch.autograd.grad(loss, list(other.parameters())), other


@pytest.mark.parametrize(
    "layer",
    [Running, lambda: nn.BatchNorm1d(6), lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), Initialized],
    ids=["running", "BatchNorm", "spectral_norm", "weights set by the first forward"],
)  # fmt: skip
@pytest.mark.parametrize("norm_of", ["step", "micro_batch"])
def test_both_passes_of_a_window_start_from_the_same_buffers(layer, norm_of, tmp_path):
    """Over two micro-batches a step, all in one norm or each in its own."""
    model = Model(layer)
    data = torch.randn(16, 4).double(), torch.randn(16, 2).double()
    twin = copy.deepcopy(model)
    if layer is Initialized:
        twin(data[0][:4], data[1][:4])
    for step in range(2):
        window = [tensor[8 * step : 8 * step + 8] for tensor in data]
        after, combined = twin, []
        for parts in [WINDOW] if norm_of == "step" else [[part] for part in WINDOW]:
            before = after
            g1, after = passes_of(before, [], window, parts)
            g2, _ = passes_of(before, [1e-3 * g for g in g1], window, parts)
            combined.append([a + 10 * (b - a) for a, b in zip(g1, g2, strict=True)])
        with torch.no_grad():
            for parameter, *gradients in zip(after.parameters(), *combined, strict=True):
                parameter -= 0.1 * sum(gradients) / len(gradients)
        twin = after

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2, use_cpu=True,
        max_grad_norm=0, lr_scheduler_type="constant", report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"x": x, "labels": y} for x, y in zip(*data, strict=True)]
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), norm_of=norm_of, **SETTINGS)
    InOrder(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
    # g2 − g1 rounds before it is divided by eps
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), rtol=1e-9, atol=1e-10)
