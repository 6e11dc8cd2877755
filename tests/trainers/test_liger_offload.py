"""Losses that bring their own gradients (Liger) and activations that leave the device: both passes go through them.

trl 0.27 trains GRPO and DPO on Liger's fused losses; trl 1 has none, and its ``use_liger_kernel`` only exchanges a model's
layers for kernels that need a GPU. Liger's losses themselves run on a CPU: they are taken where liger-kernel is installed
(it comes with Triton, hence in no extra), and a stand-in of GRPO's with the same interface everywhere.

TRL's activation offloading asks for an accelerator; here it is told that the CPU is one, which trl 0.27, with its list of
devices, does not believe.
"""

import functools
import importlib.util
import sys
from types import ModuleType

import pytest
import torch
import transformers.trainer
import trl
from test_trainer_update import LOSSES, completion_log_probabilities, distance, formula, norm, trained
from trainers import OF_MICRO_BATCHES, REAL, assert_same, build, penalties, weights

OLD = trl.__version__ < "1"
FUSED = {"grpo": "LigerFusedLinearGRPOLoss", "dpo": "LigerFusedLinearDPOLoss"}
NO_KERNELS = dict.fromkeys(("rope", "rms_norm", "swiglu", "cross_entropy", "fused_linear_cross_entropy"), False)


class Fused(torch.autograd.Function):
    """The gradients are taken in forward, as Liger does; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, ids, mask, advantages):
        with torch.enable_grad():
            hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            log_p = (hidden @ weight.T).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
            ratio = (log_p - log_p.detach()).exp()
            loss = -(ratio * advantages[:, None] * mask).sum() / mask.sum()
        ctx.save_for_backward(*torch.autograd.grad(loss, (hidden, weight)))
        return loss.detach()

    @staticmethod
    def backward(ctx, gradient):
        return *(gradient * own for own in ctx.saved_tensors), None, None, None


class FusedGRPOLoss:
    """In the place of Liger's ``LigerFusedLinearGRPOLoss``."""

    calls = 0

    def __init__(self, **_):
        type(self).calls = 0

    def __call__(self, _input, lin_weight, selected_token_ids, attention_mask, advantages, **_):
        type(self).calls += 1
        loss = Fused.apply(_input, lin_weight, selected_token_ids, attention_mask, advantages)
        return loss, [torch.zeros(1)]


@pytest.fixture
def stand_in(monkeypatch):
    """liger-kernel, as far as GRPO looks at it."""
    liger = ModuleType("liger_kernel.transformers")
    liger._apply_liger_kernel_to_instance = lambda model, **_: None
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    module = sys.modules["trl.trainer.grpo_trainer"]
    for owner in (module, transformers.trainer):
        monkeypatch.setattr(owner, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(module, FUSED["grpo"], FusedGRPOLoss, raising=False)


def grpo_liger_loss(model, window):
    """Liger's normalisation: the mean over a micro-batch's tokens, then over micro-batches."""
    losses = []
    for inputs in window:
        log_p, mask = completion_log_probabilities(model, inputs)
        losses.append(-(log_p * mask * inputs["advantages"][:, None]).sum() / mask.sum())
    return [loss / len(losses) for loss in losses]


def regularized_by_the_formula(kind, folder, monkeypatch, accumulation):
    monkeypatch.setitem(LOSSES, "grpo", grpo_liger_loss)
    liger = {"use_liger_kernel": True, "liger_kernel_config": NO_KERNELS}
    trainer, spy, steps = trained(kind, folder, gradient_accumulation_steps=accumulation, **liger)
    assert len(spy.inputs) == 2 * accumulation
    expected, g1 = formula(kind, trainer.model, steps.weights[0], spy.inputs[:accumulation], **REAL)
    assert distance(expected, g1) > 0.02 * norm(g1)
    # Float32 gradients err by some 1e-6 of their norm, which the difference multiplies by γ/ε = 5.
    assert distance(steps.update(0), expected) < 2e-5 * norm(expected)


no_liger_losses = pytest.mark.skipif(not OLD, reason="trl 1 has no Liger losses")
not_installed = pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")


@no_liger_losses
@pytest.mark.parametrize("accumulation", [1, 2])
def test_loss_of_ligers_interface(accumulation, tmp_path, monkeypatch, stand_in):
    """A loss that computes its gradients in forward is repeated at θ' like any other; the update is the formula."""
    regularized_by_the_formula("grpo", tmp_path, monkeypatch, accumulation)
    assert FusedGRPOLoss.calls == 2 * accumulation + 1  # and once to see that the first loss repeats


@no_liger_losses
@not_installed
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile looks at non-leaves
@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ligers_own_losses(kind, accumulation, tmp_path, monkeypatch):
    """The same with Liger's own."""
    regularized_by_the_formula(kind, tmp_path, monkeypatch, accumulation)


# Activation offloading.


class Offloading:
    """Lets TRL offload activations from the CPU to the CPU, with or without a stream of its own; keeps count of them."""

    def __init__(self, monkeypatch):
        self.streams, self.contexts, self.monkeypatch = False, [], monkeypatch
        for name in ("sft", "dpo"):
            module = sys.modules[f"trl.trainer.{name}_trainer"]
            if hasattr(module, "get_act_offloading_ctx_manager"):
                manager = functools.partial(self.manager, module.get_act_offloading_ctx_manager)
                monkeypatch.setattr(module, "get_act_offloading_ctx_manager", manager)
        # What the streams of CPUs lack of those of devices.
        monkeypatch.setattr(torch.cpu.Stream, "synchronize", lambda stream: None, raising=False)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)

    def manager(self, original, model):
        with self.monkeypatch.context() as patch:
            patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
            context = original(model=model, use_pin_memory=False, use_streams=self.streams, min_offload_size=1)
        context.packed, context.stashed = [], []
        pack, unpack = context.pack_hook, context.unpack_hook

        def counted_pack(activation):
            key = pack(activation)
            context.packed.append(bool(context.tracker[key][1]))  # whether it left its device
            return key

        def counted_unpack(key):
            activation = unpack(key)
            if self.streams:
                context.stashed.append(len(context.bwd_tensor_stash))  # activations that are back and not yet freed
            return activation

        context.pack_hook, context.unpack_hook = counted_pack, counted_unpack
        self.contexts.append(context)
        return context

    def train(self, kind, folder, **arguments):
        trainer = build(kind, folder, **arguments)
        trainer.train()
        return trainer


@pytest.fixture
def offloading(monkeypatch):
    return Offloading(monkeypatch)


any_device = pytest.mark.skipif(OLD, reason="trl 0.27 offloads activations of devices that it knows by name")


@any_device
@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_activations_are_offloaded_in_both_passes(kind, accumulation, tmp_path, offloading):
    """The weights are those without offloading, bit for bit, and the second pass offloads as much as the first."""
    settings = {"gradient_accumulation_steps": accumulation}
    kept = offloading.train(kind, tmp_path, wrapped=OF_MICRO_BATCHES, **settings)
    assert offloading.contexts == []
    offloaded = offloading.train(kind, tmp_path, wrapped=OF_MICRO_BATCHES, activation_offloading=True, **settings)
    offloading.train(kind, tmp_path, activation_offloading=True, **settings)
    assert_same(weights(offloaded.model), weights(kept.model))
    assert penalties(offloaded, "penalty_ratio") == penalties(kept, "penalty_ratio")
    regularized, plain = ((len(context.packed), sum(context.packed)) for context in offloading.contexts)
    assert min(plain) > 0
    assert regularized == tuple(2 * count for count in plain)


@any_device
@pytest.mark.parametrize("accumulation", [1, 2])
def test_activations_that_come_back_are_freed_in_both_passes(accumulation, tmp_path, offloading):
    """No more of them are on the device at once than in plain training."""
    offloading.streams = True
    settings = {"gradient_accumulation_steps": accumulation, "activation_offloading": True, "max_steps": 1}
    offloading.train("sft", tmp_path, **settings)
    offloading.train("sft", tmp_path, wrapped=OF_MICRO_BATCHES, **settings)
    plain, regularized = offloading.contexts
    assert len(regularized.stashed) == 2 * len(plain.stashed)
    assert max(regularized.stashed) == max(plain.stashed)
