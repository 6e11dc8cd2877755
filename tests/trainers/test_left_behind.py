"""What a loss leaves behind is what it leaves behind in a plain training, wherever it keeps it: counted once, not twice."""

import collections
import itertools
import random
import sys
import types
import warnings
from typing import ClassVar

import numpy
import pytest
import torch
from torch import nn
from trainers import AT_THETA, REAL, assert_same, build, llama, weights
from trl import SFTTrainer

from gradreg_optim import attach
from gradreg_optim.trainers import snapshot


class Meter:
    """Counts, in an attribute, a container of its own and an array."""

    def __init__(self):
        self.count, self.values, self.histogram = 0, [], numpy.zeros(2)

    def update(self, value):
        self.count += 1
        self.values.append(float(value))
        self.histogram[self.count % 2] += 1

    def read(self):
        return self.count, self.values, self.histogram.tolist()


class Slotted:
    """Keeps its count in a slot."""

    __slots__ = ("count",)

    def __init__(self):
        self.count = 0

    def update(self, _value):
        self.count += 1

    def read(self):
        return self.count


class MeanMetric:
    """A mean as ms-swift's metrics keep it: numbers in attributes, made by the dictionary that holds them."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.state, self.count = 0.0, 0

    def update(self, state):
        self.state += float(state)
        self.count += 1

    def compute(self):
        return {"value": self.state / self.count}

    def read(self):
        return self.compute(), self.count


class Statistics(nn.Module):
    """A module with a buffer and a plain tensor that it moves in place, and a number that it replaces."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.total, self.calls = torch.zeros(()), 0

    def update(self, value):
        self.mean.mul_(0.9).add_(0.1 * value)
        self.total += value
        self.calls += 1

    def read(self):
        return self.mean.item(), self.total.item(), self.calls


class Counts:
    """Containers and numbers of the standard library, and generators: one method for each."""

    def __init__(self):
        self.counter, self.queue, self.names = collections.Counter(), collections.deque(maxlen=3), set()
        self.space, self.nested = types.SimpleNamespace(n=0), {"a": [{"n": 0}]}
        self.default, self.pair = collections.defaultdict(MeanMetric), (Meter(), [0])
        self.random, self.numpy, self.torch = random.Random(3), numpy.random.default_rng(3), torch.Generator().manual_seed(3)

    def update(self, value):
        self.counter["n"] += 1
        self.queue.append(len(self.queue))
        self.names.add(str(self.counter["n"]))
        self.space.n += 1
        self.nested["a"][0]["n"] += 1
        self.nested["a"].append({"n": 0})
        self.default["loss"].update(value)
        self.pair[0].update(value)
        self.pair[1][0] += 1

    def draw(self):
        return self.random.random(), self.numpy.random(), torch.rand((), generator=self.torch).item()

    def read(self):
        plain = (
            dict(self.counter),
            list(self.queue),
            sorted(self.names),
            self.space.n,
            self.nested,
            self.default["loss"].read(),
        )
        return plain, self.pair[0].read(), self.pair[1], self.draw()


class Keeping(SFTTrainer):
    """Updates what was put on it in every loss, and lets what it draws there change the loss."""

    shared: ClassVar[list] = []
    meters = ()

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        for meter in self.meters:
            meter.update(loss.detach())
        if not hasattr(self, "first"):
            self.first = loss.detach()
        self.latest = loss.detach()
        self.shared.append(len(self.shared))
        if not hasattr(self.state, "tokens"):
            self.state.tokens = {"total": torch.zeros(()), "n": 0}
        self.state.tokens["total"] += inputs["input_ids"].numel()
        self.state.tokens["n"] += 1
        factor = 1 + sum(self.meters[-1].draw()) / 10 if hasattr(self.meters[-1], "draw") else 1
        return loss * factor * (1 + len(self.shared) / 100) * (1 + self.first / 100)


def torchmetrics():
    metrics = pytest.importorskip("torchmetrics", reason="comes with lightning")

    class Mean(metrics.MeanMetric):
        def read(self):
            return self.compute().item(), self.update_count

    return Mean()


METERS = {
    "object": Meter,
    "slots": Slotted,
    "ms-swift": MeanMetric,
    "module": Statistics,
    "containers": Counts,
    "torchmetrics": torchmetrics,
}


def trained(folder, meters, *, wrapped=None, settings=None, place=lambda trainer, meters: None, **arguments):
    Keeping.shared = []
    trainer = build("sft", folder, wrapped=wrapped, trainer_class=Keeping, gradient_accumulation_steps=2, **arguments)
    trainer.meters = meters
    place(trainer, meters)
    if settings is not None:
        attach(trainer, **settings)
    trainer.train()
    left = [meter.read() for meter in meters], Keeping.shared, trainer.latest, trainer.first, trainer.state.tokens
    return left, weights(trainer.model), trainer


@pytest.mark.parametrize("make", METERS.values(), ids=METERS)
@pytest.mark.parametrize("settings", [{}, {"method": "central"}, {"every": 2}], ids=["forward", "central", "every"])
def test_what_a_loss_counts_is_counted_once(make, settings, tmp_path):
    """Objects, containers, arrays, tensors and generators on the trainer, its class and its state, and their influence."""
    plain, expected, _ = trained(tmp_path, [make()])
    left, found, trainer = trained(tmp_path, [meter := make()], wrapped=AT_THETA | settings)
    assert str(left) == str(plain)
    if "method" not in settings:  # which does not end at θ itself
        assert_same(found, expected)
    assert len(Keeping.shared) == 6
    assert trainer.meters[0] is meter  # the very object, which others may hold


def Elsewhere(meter):
    """A sequence of one meter that hides it from whoever looks through attributes: a class, which nobody looks into."""
    return type("Meters", (type,), {"__iter__": lambda _: iter([meter]), "__getitem__": lambda *_: meter})("Hiding", (), {})


@pytest.mark.parametrize(
    "place",
    [
        lambda trainer, meters: setattr(trainer.model, "meter", meters[0]),
        lambda trainer, meters: setattr(trainer.model.model.layers[0], "meter", meters[0]),
        lambda trainer, meters: setattr(trainer, "meters_by_name", {"train": {"loss": [meters[0]]}}),
    ],
    ids=["model", "layer", "dictionary"],
)
def test_wherever_it_is_kept(place, tmp_path):
    """In the model, in one of its layers, or deep in a dictionary."""
    results = []
    for wrapped in (None, REAL):
        meter = Meter()
        trained(tmp_path, Elsewhere(meter), wrapped=wrapped, place=place)
        results.append(meter.count)
    assert results == [6, 6]


class Counting(nn.Module):
    """A layer that counts its calls, in a number and in a list."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls, self.sizes = inner, 0, []

    def forward(self, *args, **kwargs):
        self.calls += 1
        self.sizes.append(args[0].numel())
        return self.inner(*args, **kwargs)


def test_attributes_of_the_models_modules(tmp_path):
    """What layers note in their forward is noted once."""
    results = []
    for wrapped in (None, AT_THETA):
        model = llama()
        model.model.layers[0].mlp = Counting(model.model.layers[0].mlp)
        trained(tmp_path, [Meter()], wrapped=wrapped, model=model)
        results.append((model.model.layers[0].mlp.calls, model.model.layers[0].mlp.sizes))
    assert results[0] == results[1]
    assert results[0][0] == 6


class Drawing(nn.Module):
    """A layer whose mask comes from a generator of its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.random = inner, torch.Generator().manual_seed(3)

    def forward(self, *args, **kwargs):
        output = self.inner(*args, **kwargs)
        return output * torch.rand(output.shape, generator=self.random)


def test_generators_of_the_models_modules(tmp_path):
    """The second pass draws what the first one drew, and the generator goes on from there."""
    results = []
    for wrapped in (None, AT_THETA):
        model = llama()
        layer = model.model.layers[0]
        layer.mlp = Drawing(layer.mlp)
        _, found, _ = trained(tmp_path, [Meter()], wrapped=wrapped, model=model)
        results.append({**found, "random": layer.mlp.random.get_state()})
    assert_same(*results)


def test_a_snapshot_costs_little_a_module(tmp_path):
    """It is taken for each micro-batch: three calls for each module, and fewer than three hundred for all the rest."""
    trainer, calls = build("sft", tmp_path, wrapped=REAL, model=llama(num_hidden_layers=30)), []
    snapshot.Snapshot(trainer)
    sys.setprofile(lambda _frame, event, _argument: calls.append(event) if event == "call" else None)
    try:
        snapshot.Snapshot(trainer)
    finally:
        sys.setprofile(None)
    assert len(calls) < 3 * len(list(trainer.model.modules())) + 300


def test_large_state_is_named_once(tmp_path, monkeypatch):
    """What is too large for copies is named, if the loss changes it, and only then, and once; what is expanded never is."""
    monkeypatch.setattr(snapshot, "LARGE", 100)

    class Large(Keeping):
        def compute_loss(self, *args, **kwargs):
            self.moved += 1
            self.counted += 1
            return super().compute_loss(*args, **kwargs)

    trainer = build("sft", tmp_path, wrapped=REAL, trainer_class=Large)
    trainer.meters, trainer.still, trainer.spread = [Meter()], torch.zeros(101), torch.ones(()).expand(5)
    trainer.moved, trainer.counted, trainer.table = torch.zeros(101), numpy.zeros(5000), numpy.zeros(5000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    named = [
        str(warning.message).split(" has more than")[0] for warning in caught if "no copy is kept" in str(warning.message)
    ]
    assert named == ["Large: moved", "Large: counted"]


def test_nothing_large_is_copied(tmp_path, monkeypatch):
    """Neither models, datasets nor optimizers are cloned: the tensors of a snapshot are those that the loss could move."""
    trainer = build("sft", tmp_path, wrapped=REAL, trainer_class=Keeping, model=llama(tie_word_embeddings=False))
    trainer.meters, cloned, clone = [Meter()], [], torch.Tensor.clone
    trainer.reference = llama(seed=1)
    owned = {
        id(tensor)
        for model in (trainer.model, trainer.reference)
        for tensor in itertools.chain(model.parameters(), model.buffers())
        if tensor.numel() > 8
    }

    def spy(tensor, *args, **kwargs):
        cloned.append(id(tensor))
        return clone(tensor, *args, **kwargs)

    trainer.train()
    monkeypatch.setattr(torch.Tensor, "clone", spy)
    snapshot.Snapshot(trainer)
    assert not owned & set(cloned)
    assert len(cloned) < 20
