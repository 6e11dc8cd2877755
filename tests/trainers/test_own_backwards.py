"""Losses and training steps that differentiate by themselves: right, or refused before anything is trained."""

import pytest
import torch
from torch.nn import functional as F
from trainers import AT_THETA, REAL, assert_same, at_theta, build, llama, weights
from trl import SFTTrainer

pytestmark = at_theta


class Auxiliary(SFTTrainer):
    """Adds the gradient of another term after the ordinary step."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        (sum(parameter.square().sum() for parameter in model.parameters()) * 0.05).backward()
        return loss


class Before(SFTTrainer):
    """Adds it before, by the function of torch."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        torch.autograd.backward([parameter.square().sum() for parameter in model.parameters()])
        return super().training_step(model, inputs, num_items_in_batch)


class FastGradient(SFTTrainer):
    """FGM: a second loss on embeddings that are moved along their gradient."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        copies = dict(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        embeddings = model.get_input_embeddings().weight
        before = embeddings.detach().clone()
        with torch.no_grad():
            embeddings += 0.1 * embeddings.grad / embeddings.grad.norm()
        self.compute_loss(model, self._prepare_inputs(copies)).backward()
        with torch.no_grad():
            embeddings.copy_(before)
        return loss


class OneParameter(SFTTrainer):
    """Adds the gradient of one parameter, which is the loss itself."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        norm = model.model.norm.weight
        norm.backward(torch.ones_like(norm))
        return loss


@pytest.mark.filterwarnings("ignore:.*none has the penalty:UserWarning")  # a warm-up that lasts for all of it
@pytest.mark.parametrize("trainer_class", [Auxiliary, Before, FastGradient, OneParameter])
def test_a_backward_of_ones_own_is_refused(trainer_class, tmp_path):
    """The second pass would lack that gradient: an error, before it is added to any; without a penalty nothing is wrong."""
    trainer = build("sft", tmp_path, wrapped=REAL, trainer_class=trainer_class, gradient_accumulation_steps=2)
    before, backward = weights(trainer.model), torch.autograd.backward
    with pytest.raises(
        RuntimeError, match=r"training_step ran a backward besides compute_loss's.*optimizer.step\(closure\)"
    ):
        trainer.train()
    if trainer_class is not FastGradient:  # whose own change of the embeddings the error interrupts
        assert_same(weights(trainer.model), before)
    assert torch.autograd.backward is backward
    results = []
    for wrapped in (None, {"strength": 0.0}, {"strength": 1.0, "warmup_steps": 9}):
        trainer = build("sft", tmp_path, wrapped=wrapped, trainer_class=trainer_class, gradient_accumulation_steps=2)
        trainer.train()
        results.append(weights(trainer.model))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


class Elsewhere(SFTTrainer):
    """Trains a network of its own with the outputs of the model, and asks for gradients of inputs."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not hasattr(self, "critic"):
            self.critic = torch.nn.Linear(16, 1)
            self.critic_optimizer = torch.optim.SGD(self.critic.parameters(), lr=0.1)
        with torch.no_grad():
            hidden = model.get_input_embeddings()(inputs["input_ids"])
        self.critic(hidden).square().mean().backward()
        self.critic_optimizer.step()
        self.critic_optimizer.zero_grad()
        embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"]).logits.sum().backward(inputs=[embedded])
        assert embedded.grad is not None
        return super().training_step(model, inputs, num_items_in_batch)


class Virtual(SFTTrainer):
    """Virtual adversarial training: a step on embeddings along a gradient that the loss takes itself."""

    def step_along(self, loss, embedded):
        (gradient,) = torch.autograd.grad(loss, embedded)
        return gradient

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        arguments = {"attention_mask": inputs["attention_mask"], "labels": inputs["labels"]}
        embed = model.get_input_embeddings()
        embedded = embed(inputs["input_ids"]).detach().requires_grad_()
        gradient = self.step_along(model(inputs_embeds=embedded, **arguments).loss, embedded)
        moved = embed(inputs["input_ids"]) + 0.1 * gradient / gradient.norm()
        return model(inputs_embeds=moved, **arguments).loss


class VirtualByBackward(Virtual):
    """The same, by a backward that reaches weights as well, whose gradients are put back."""

    def step_along(self, loss, embedded):
        before = [parameter.grad for parameter in self.model.parameters()]
        for parameter in self.model.parameters():
            parameter.grad = None
        loss.backward()
        for parameter, gradient in zip(self.model.parameters(), before, strict=True):
            parameter.grad = gradient
        return embedded.grad


class Looking(SFTTrainer):
    """SMART: a term that is there only where gradients are wanted."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not torch.is_grad_enabled():
            return loss
        arguments = {"attention_mask": inputs["attention_mask"]}
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        logits = model(inputs_embeds=embedded, **arguments).logits
        noise = (torch.randn_like(embedded) * 1e-2).requires_grad_()
        for _ in range(2):
            noisy = model(inputs_embeds=embedded.detach() + noise, **arguments).logits
            distance = F.kl_div(noisy.log_softmax(-1), logits.detach().softmax(-1), reduction="batchmean")
            (gradient,) = torch.autograd.grad(distance, noise)
            noise = (noise + 1e-2 * gradient / gradient.norm()).detach().requires_grad_()
        noisy = model(inputs_embeds=embedded + noise.detach(), **arguments).logits
        return loss + F.kl_div(noisy.log_softmax(-1), logits.softmax(-1), reduction="batchmean")


class Added(SFTTrainer):
    """Adds the gradient of another term inside the loss, where the second pass repeats it."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        (sum(parameter.square().sum() for parameter in model.parameters()) * 0.05).backward()
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("trainer_class", [Elsewhere, Virtual, VirtualByBackward, Looking, Added])
def test_losses_that_differentiate_train(trainer_class, tmp_path):
    """With the second pass at θ itself they end where plain training ends, dropout included: the check left no trace."""
    results = []
    for wrapped in (None, {**AT_THETA, "norm_of": "step"}, REAL):  # which adds gradients up in the plain order
        trainer = build(
            "sft",
            tmp_path,
            model=llama(attention_dropout=0.1),
            wrapped=wrapped,
            trainer_class=trainer_class,
            gradient_accumulation_steps=2,
        )
        trainer.train()
        results.append((weights(trainer.model), {"random": torch.get_rng_state()}))
    assert_same(results[1][0], results[0][0])
    assert_same(results[1][1], results[0][1])
    assert not torch.equal(results[2][0]["model.norm.weight"], results[0][0]["model.norm.weight"])


class Unrepeatable(Virtual):
    """Differentiates, and counts where nobody looks."""

    count = staticmethod(lambda: None)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.count.__dict__["value"] = self.count.__dict__.get("value", 0) + 1
        return loss * self.count.__dict__["value"]


def test_one_that_cannot_be_repeated_is_refused_still(tmp_path):
    """The check with gradients enabled compares losses as well."""
    trainer = build("sft", tmp_path, wrapped=REAL, trainer_class=Unrepeatable)
    with pytest.raises(RuntimeError, match="Unrepeatable: the first loss was"):
        trainer.train()


class Broken(SFTTrainer):
    """Raises when it is computed a second time."""

    calls = staticmethod(lambda: None)

    def compute_loss(self, *args, **kwargs):
        if getattr(self.calls, "made", False):
            raise ZeroDivisionError("a fault of its own")
        self.calls.__dict__["made"] = True
        return super().compute_loss(*args, **kwargs)


def test_an_error_of_the_repeated_loss_is_the_users(tmp_path):
    """A loss that fails when it is repeated, with gradients enabled too, raises its own error."""
    with pytest.raises(ZeroDivisionError, match="a fault of its own"):
        build("sft", tmp_path, wrapped=REAL, trainer_class=Broken).train()
