"""Is a stack with its plugin the optimizer in a loop by hand? Runs in the environment of the stack.

    python -m benchmarks.stacks.compare ms_swift

Two steps of two micro-batches by the stack, from ``examples/<stack>``; then from the same weights, on the
batches that the stack made, by a loop over ``GradRegOptimizer.passes()``, with a loss that is written here.
Without clipping and weight decay. Prints the largest difference of two weights, and of those to training
without the penalty.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradreg_optim import GradRegOptimizer

STEPS, MICRO_BATCHES = 2, 2
PLAIN = {"max_grad_norm": 0, "weight_decay": 0}
EXCLUDE = ("embed_tokens", "lm_head")
"""What trainers leave out by themselves; else the settings are the defaults, as in the examples."""
OF_STEP = ("verl",)
"""Stacks whose passes are over the whole step; elsewhere the norm is that of each micro-batch."""

INPUTS = ("input_ids", "attention_mask", "position_ids", "labels")

Batch = dict[str, Tensor]


def recorded(train: Callable[[], Any]) -> tuple[nn.Module, nn.Module, list[Batch]]:
    """The model before ``train()`` and after it, and the micro-batches of its trainer."""
    from transformers import Trainer

    before: list[nn.Module] = []
    after: list[nn.Module] = []
    batches: list[Batch] = []
    original = Trainer.get_batch_samples

    def get_batch_samples(self: Any, *args: Any) -> Any:
        if not before:
            after.append(self.accelerator.unwrap_model(self.model))
            before.append(copy.deepcopy(after[0]))
        samples, count = original(self, *args)
        batches.extend({name: batch[name].clone() for name in INPUTS if name in batch} for batch in samples)
        return samples, count

    Trainer.get_batch_samples = get_batch_samples  # type: ignore[method-assign]
    try:
        train()
    finally:
        Trainer.get_batch_samples = original  # type: ignore[method-assign]
    return before[0], after[0], batches


def by_hand(model: nn.Module, batches: list[Batch], strength: float | str, stack: str) -> nn.Module:
    """``model`` after the same steps by hand; the loss of a step is the mean over its tokens."""
    model = copy.deepcopy(model).train()
    adamw = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=BETAS.get(stack, (0.9, 0.999)), weight_decay=0.0
    )
    optimizer = GradRegOptimizer(adamw, strength=strength, exclude=EXCLUDE, model=model)
    for step in range(STEPS):
        window = batches[step * MICRO_BATCHES : (step + 1) * MICRO_BATCHES]
        counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in window]
        targets = [len(window) * count if stack in MEANS_OF_MEANS else sum(counts) for count in counts]
        pairs = list(zip(window, targets, strict=True))
        for together in [pairs] if stack in OF_STEP else [[pair] for pair in pairs]:
            for _ in optimizer.passes(micro_batches=len(pairs) // len(together)):
                optimizer.zero_grad()
                for batch, count in together:
                    inputs = {name: value for name, value in batch.items() if name != "labels"}
                    logits = model(**inputs).logits[:, :-1].flatten(0, 1).float()
                    loss = cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum") / count
                    loss.backward()
        optimizer.step()
    return model


def ms_swift() -> None:
    from swift.cli.main import parse_yaml_args
    from swift.pipelines import sft_main

    arguments = ["examples/ms_swift/sft.yaml"]
    parse_yaml_args(arguments)
    sft_main([*arguments, *(text for name, value in PLAIN.items() for text in (f"--{name}", str(value)))])


def llama_factory() -> None:
    from gradreg_optim.integrations.llama_factory import main

    sys.argv[1:] = ["examples/llama_factory/sft.yaml", *(f"{name}={value}" for name, value in PLAIN.items())]
    main()


def axolotl() -> None:
    from axolotl.cli.train import do_cli

    do_cli("examples/axolotl/sft.yaml", **PLAIN)


def verl() -> tuple[nn.Module, nn.Module, list[Batch]]:
    """In one process; each batch is recorded before the engine makes micro-batches of it."""
    from transformers import AutoModelForCausalLM
    from verl.trainer import sft_trainer
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    states: list[dict[str, Tensor]] = []
    batches: list[Batch] = []
    original = FSDPEngine.train_batch

    def train_batch(self: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        states[1:] = []
        states.append(_whole(self.module)) if not states else None
        for ids, mask in zip(data["input_ids"].unbind(), data["loss_mask"].unbind(), strict=True):
            batches.append(
                {"input_ids": ids[None].clone(), "labels": torch.where(mask.bool(), ids, -100)[None]}
            )
        try:
            return original(self, data, *args, **kwargs)
        finally:
            states.append(_whole(self.module))

    FSDPEngine.train_batch = train_batch
    plain = ["optim.clip_grad=1e9", "optim.weight_decay=0", "data.train_batch_size=2"]
    sys.argv[1:] = ["--config-path", os.path.abspath("examples/verl"), "--config-name", "sft", *plain]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29581")
    try:
        sft_trainer.main()
    finally:
        FSDPEngine.train_batch = original
    models = [AutoModelForCausalLM.from_pretrained("runs/tiny/model", dtype=torch.float32) for _ in states]
    for model, state in zip(models, states, strict=True):
        model.load_state_dict(state)
    return models[0], models[1], batches


def _whole(module: nn.Module) -> dict[str, Tensor]:
    """The state of a sharded module, as whole tensors of its own."""
    state = module.state_dict()
    return {
        name: getattr(value, "full_tensor", lambda value=value: value)().clone()
        for name, value in state.items()
    }


BETAS = {"ms_swift": (0.9, 0.95)}
"""Defaults that are not AdamW's."""
MEANS_OF_MEANS = ("axolotl",)
"""Axolotl weights micro-batches alike if the model inside does not take the number of tokens."""


def difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


def main(stack: str) -> None:
    before, after, batches = verl() if stack == "verl" else recorded(globals()[stack])
    assert len(batches) == STEPS * MICRO_BATCHES, len(batches)
    penalized, plain = (by_hand(before, batches, strength, stack) for strength in ("auto", 0.0))
    result = {
        "difference": difference(after, penalized),
        "penalty": difference(after, plain),
        "moved": difference(after, before),
    }
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
