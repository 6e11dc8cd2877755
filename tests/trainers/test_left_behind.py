"""What a loss counts on its trainer it counts once, as in a plain training, although it runs twice."""

import collections
import itertools
import sys

import numpy
import pytest
import torch
from torch import nn
from trainers import AT_THETA, REAL, assert_same, build, llama, weights
from trl import SFTTrainer

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
    """Containers of the standard library, and metrics inside them: one method for each."""

    def __init__(self):
        self.counter, self.queue, self.names = collections.Counter(), collections.deque(maxlen=3), set()
        self.nested, self.default, self.pair = {"a": [{"n": 0}]}, collections.defaultdict(MeanMetric), (Meter(), [0])
        self.nested["self"] = self.nested

    def update(self, value):
        self.counter["n"] += 1
        self.queue.append(len(self.queue))
        self.names.add(str(self.counter["n"]))
        self.nested["a"][0]["n"] += 1
        self.nested["self"]["a"].append({"n": 0})
        self.default["loss"].update(value)
        self.pair[0].update(value)
        self.pair[1][0] += 1

    def read(self):
        numbers = dict(self.counter), list(self.queue), sorted(self.names), self.nested["a"], self.pair[1]
        return numbers, self.default["loss"].read(), self.pair[0].read()


class Keeping(SFTTrainer):
    """Updates what was put on it in every loss, and lets what it counts there change the loss."""

    meters = ()

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        for meter in self.meters:
            meter.update(loss.detach())
        if not hasattr(self, "first"):
            self.first = loss.detach()
        self.latest = loss.detach()
        self.count += 1
        if not hasattr(self.state, "tokens"):
            self.state.tokens = {"total": torch.zeros(()), "n": 0}
        self.state.tokens["total"] += inputs["input_ids"].numel()
        self.state.tokens["n"] += 1
        return loss * (1 + self.count / 100) * (1 + self.first / 100)


def torchmetrics():
    metrics = pytest.importorskip("torchmetrics", reason="comes with lightning")

    class Mean(metrics.MeanMetric):
        def read(self):
            return self.compute().item(), self.update_count

    return Mean()


METERS = {
    "object": Meter,
    "ms-swift": MeanMetric,
    "module": Statistics,
    "containers": Counts,
    "torchmetrics": torchmetrics,
}


def trained(folder, meters, *, wrapped=None, **arguments):
    trainer = build("sft", folder, wrapped=wrapped, trainer_class=Keeping, gradient_accumulation_steps=2, **arguments)
    trainer.meters, trainer.count = meters, 0
    trainer.train()
    left = [meter.read() for meter in meters], trainer.count, trainer.latest, trainer.first, trainer.state.tokens
    return left, weights(trainer.model), trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What each kind of meter holds after a plain training, and the weights there."""
    return trained(tmp_path_factory.mktemp("plain"), [make() for make in METERS.values()])


@pytest.mark.parametrize("settings", [{}, {"method": "central"}, {"every": 2}], ids=["forward", "central", "every"])
def test_what_a_loss_counts_is_counted_once(settings, plain, tmp_path):
    """Objects, containers, arrays and tensors on the trainer and its state, and their influence."""
    meters = [make() for make in METERS.values()]
    left, found, trainer = trained(tmp_path, list(meters), wrapped=AT_THETA | settings)
    assert str(left) == str(plain[0])
    if "method" not in settings:  # which does not end at θ itself
        assert_same(found, plain[1])
    assert all(one is other for one, other in zip(trainer.meters, meters, strict=True))  # others may hold them


class Nested(Keeping):
    """Reaches its metric through a list of a dictionary of a dictionary."""

    def compute_loss(self, *args, **kwargs):
        self.by_name["train"]["loss"][0].update(0.0)
        return super().compute_loss(*args, **kwargs)


def test_deep_in_containers(tmp_path):
    """A metric is found inside containers."""
    trainer = build("sft", tmp_path, wrapped=REAL, trainer_class=Nested)
    trainer.by_name, trainer.count = {"train": {"loss": [meter := Meter()]}}, 0
    trainer.train()
    assert meter.read()[0] == 3


class Counting(nn.Module):
    """A layer that counts its calls."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.inner(*args, **kwargs)


def test_attributes_of_the_models_modules(tmp_path):
    """What layers note in their forward is noted once."""
    results = []
    for wrapped in (None, AT_THETA):
        model = llama()
        model.model.layers[0].mlp = Counting(model.model.layers[0].mlp)
        trained(tmp_path, [Meter()], wrapped=wrapped, model=model)
        results.append(model.model.layers[0].mlp.calls)
    assert results == [6, 6]


def test_a_snapshot_does_not_depend_on_the_size_of_the_model(tmp_path):
    """It is taken for each micro-batch, and looks at no module."""
    calls = []
    for layers in (1, 30):
        trainer, before = build("sft", tmp_path, wrapped=REAL, model=llama(num_hidden_layers=layers)), len(calls)
        sys.setprofile(lambda _frame, event, _argument: calls.append(event) if event == "call" else None)
        try:
            snapshot.state_of(trainer)
        finally:
            sys.setprofile(None)
        assert len(calls) - before < 1000


def test_nothing_large_is_copied(tmp_path, monkeypatch):
    """Neither models, datasets nor optimizers are cloned, nor what has too many elements."""
    monkeypatch.setattr(snapshot, "LARGE", 100)
    trainer = build("sft", tmp_path, wrapped=REAL, trainer_class=Keeping, model=llama(tie_word_embeddings=False))
    trainer.meters, cloned, clone = [Meter()], [], torch.Tensor.clone
    trainer.reference, trainer.count, trainer.bank = llama(seed=1), 0, torch.zeros(101)
    owned = {
        id(tensor)
        for model in (trainer.model, trainer.reference)
        for tensor in itertools.chain(model.parameters(), model.buffers())
        if tensor.numel() > 8
    } | {id(trainer.bank)}

    def spy(tensor, *args, **kwargs):
        cloned.append(id(tensor))
        return clone(tensor, *args, **kwargs)

    trainer.train()
    monkeypatch.setattr(torch.Tensor, "clone", spy)
    snapshot.state_of(trainer)
    assert not owned & set(cloned)
    assert len(cloned) < 20
