"""Weights that trainers push to vLLM: θ at every step, never θ', and none while the second pass runs.

vLLM itself does not run without a GPU. TRL's side of it does: here its own code walks the weights and hands them over, and
the stand-ins below, with the interface of TRL's client and of vLLM's ``LLM``, keep what they are given and generate by it.
"""

import importlib.util
import os
import queue
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from trainers import (
    AT_THETA,
    PLAIN,
    REAL,
    assert_same,
    at_theta,
    build,
    dataset,
    llama,
    own_figures,
    penalties,
    tokenizer,
    weights,
)
from transformers import TrainerCallback

from gradreg_optim import attach

pytestmark = at_theta

SHARED = importlib.util.find_spec("trl.generation") is not None
"""Whether vLLM is one module's concern (trl 1.16), or each trainer's (0.27)."""
WORDS = 4
"""Words in every completion."""


class Engine:
    """A model of its own that only pushes change; ``pushes`` holds its weights after each of them."""

    def __init__(self):
        self.model, self.pushes, self.generations = llama(seed=5), [], 0
        self.received = {}

    def update(self, name, weight):
        self.received[name] = weight.detach().clone()

    def reset_prefix_cache(self):
        """The last call of a push."""
        self.pushes.append(self.received)
        self.model.load_state_dict(self.received)
        self.received = {}

    def complete(self, prompt_ids, count):
        """Completions of one prompt, with their log-probabilities."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(self.generations)
            self.generations += 1
            prompts = torch.tensor([prompt_ids] * count)
            ids = self.model.generate(prompts, max_new_tokens=WORDS, min_new_tokens=WORDS, do_sample=True)
            log_p = self.model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        start = prompts.shape[1]
        return ids[:, start:].tolist(), log_p[:, start - 1 :].tolist()


def ids_of(prompt):
    """A prompt as either generation of TRL sends it."""
    if isinstance(prompt, dict):
        return prompt["prompt_token_ids"]
    return tokenizer()(prompt)["input_ids"] if isinstance(prompt, str) else prompt


def nested(log_p):
    """Log-probabilities as the server of either generation sends them: trl 1.16 asks for those of several tokens."""
    return [[value] for value in log_p] if SHARED else log_p


class Client:
    """In the place of ``trl``'s VLLMClient, which talks to a server."""

    engine = None

    def __init__(self, **_):
        Client.engine = Engine()

    def init_communicator(self, device):
        pass

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_param(self, name, weight):
        self.engine.update(name, weight)

    def update_named_params(self, metadata, weights):
        for (announced, _, shape), (name, weight) in zip(metadata, weights, strict=True):
            assert (announced, shape) == (name, list(weight.shape))
            self.engine.update(name, weight)

    def reset_prefix_cache(self):
        self.engine.reset_prefix_cache()

    def generate(self, prompts, n, **_):
        prompt_ids = [ids_of(prompt) for prompt in prompts]
        completions = [self.engine.complete(ids, n) for ids in prompt_ids]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [ids for found, _ in completions for ids in found],
            "logprobs": [nested(values) for _, found in completions for values in found],
        }


class LLM:
    """In the place of vLLM's, which shares the trainer's process."""

    engine = None

    def __init__(self, **_):
        LLM.engine = Engine()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)  # meant for vLLM: the next trainer would start torch.distributed by them
        runner = SimpleNamespace(model=self)
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=executor)

    def load_weights(self, weights):
        for name, weight in weights:
            self.engine.update(name, weight)

    def reset_prefix_cache(self):
        self.engine.reset_prefix_cache()

    def generate(self, prompts, sampling_params=None, use_tqdm=False):
        outputs = []
        for prompt in prompts:
            (ids,), (log_p,) = self.engine.complete(ids_of(prompt), 1)
            logprobs = [{i: SimpleNamespace(logprob=p, rank=1)} for i, p in zip(ids, log_p, strict=True)]
            completion = SimpleNamespace(token_ids=ids, logprobs=logprobs)
            outputs.append(SimpleNamespace(prompt_token_ids=ids_of(prompt), outputs=[completion]))
        return outputs


MODES = {"server": Client, "colocate": LLM}


@pytest.fixture
def engine_of(monkeypatch):
    """Puts the stand-ins where TRL has imported vLLM; returns the engine that a trainer of that mode has built."""
    names = ["trl.generation.vllm_generation"] if SHARED else ["trl.trainer.grpo_trainer", "trl.trainer.rloo_trainer"]
    for module in map(importlib.import_module, names):
        monkeypatch.setattr(module, "is_vllm_available", lambda *_, **__: True)
        monkeypatch.setattr(module, "VLLMClient", Client)
        monkeypatch.setattr(module, "LLM", LLM, raising=False)
        monkeypatch.setattr(module, "SamplingParams", SimpleNamespace, raising=False)
        monkeypatch.setattr(module, "vllm", SimpleNamespace(__version__="0.11.0"), raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    yield lambda mode: MODES[mode].engine
    assert not torch.distributed.is_initialized()


class Watch(TrainerCallback):
    """The weights at the beginning of each step, and in each forward of a training loss; the pushes before it."""

    def __init__(self, trainer, engine):
        self.trainer, self.engine, self.starts, self.losses = trainer, engine, [], []
        compute_loss = trainer.compute_loss

        def watched(model, *args, **kwargs):
            if torch.is_grad_enabled():
                self.losses.append((weights(trainer.model), len(engine.pushes)))
            return compute_loss(model, *args, **kwargs)

        trainer.compute_loss = watched
        trainer.add_callback(self)

    def on_step_begin(self, *_, **__):
        self.starts.append(weights(self.trainer.model))


def by_place(completions, **_):
    """A reward that tells any two completions apart, or there would be no gradient."""
    return [float(place) for place in range(len(completions))]


def trained(kind, mode, folder, engine_of, **arguments):
    vllm = {"use_vllm": True, "vllm_mode": mode, "max_completion_length": WORDS}
    trainer = build(kind, folder, reward=by_place, **vllm, **arguments)
    watch = Watch(trainer, engine_of(mode))
    trainer.train()
    return trainer, watch


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_engine_gets_the_weights_between_steps(kind, mode, accumulation, tmp_path, engine_of):
    """One push a step, of the weights that the step begins with, before anything else; the second pass pushes nothing."""
    settings = {"gradient_accumulation_steps": accumulation}
    trainer, watch = trained(kind, mode, tmp_path, engine_of, wrapped=REAL, **settings)
    engine = watch.engine
    assert len(engine.pushes) == len(watch.starts) == 3
    for push, start in zip(engine.pushes, watch.starts, strict=True):
        assert_same(push, start)
    window = 2 * accumulation
    again = len(watch.losses) - 3 * window  # where the loss is found not to be the integral of its gradient
    assert again in (0, accumulation)
    for i, (seen, pushes) in enumerate(watch.losses):
        step, position = divmod(max(i - again, 0), window) if i >= window + again else (0, i)
        assert pushes == step + 1
        assert same(seen, watch.starts[step]) == (position < accumulation)  # then at θ', which would be another push
    assert min(penalties(trainer, "penalty_ratio")) > 0
    plain, _ = trained(kind, mode, tmp_path, engine_of, **settings)
    assert engine_of(mode).generations == engine.generations  # as many completions as without a penalty
    assert not same(weights(plain.model), weights(trainer.model))


@pytest.mark.parametrize("mode", MODES)
def test_engine_samples_from_theta(mode, tmp_path, engine_of):
    """GRPO finds no difference between the engine's log-probabilities and the trainer's own."""
    trainer, _ = trained("grpo", mode, tmp_path, engine_of, wrapped=REAL)
    key = "sampling/sampling_logp_difference/max"
    differences = [entry[key] for entry in trainer.state.log_history if key in entry]
    assert len(differences) == 3
    assert max(differences) < 1e-5  # float32, in batches of another shape


# AsyncGRPO: its rollouts come from another process, which is given the weights after every step.


class Rollouts:
    """In the place of the process that asks a vLLM server for completions: a queue that is full from the beginning."""

    def __init__(self):
        from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        numbers = numpy.random.default_rng(0)
        mask = numpy.array([0] * 4 + [1] * 5)
        for i in range(64):
            ids, old = numbers.integers(3, 24, 9), -3.0 * mask.astype("float32")
            self.rollout_buffer.put(RolloutSample([], [], ids, mask, old, (-1.0) ** i, 0, i // 2, {}))

    def start(self):
        pass

    def stop(self):
        pass

    def update_model_version(self, model_version):
        pass

    def check_health(self, stale_after_s):
        pass


class Transfer:
    """In the place of the client that streams weights to the server: keeps them."""

    def __init__(self):
        self.pushes = []

    def send_weights(self, iterator):
        self.pushes.append({name: weight.detach().clone() for name, weight in iterator})

    def init_weight_transfer(self):
        pass

    pause = resume = destroy = init_weight_transfer


def attention(query, key, value, starts_q, starts_k, *_, softmax_scale, **__):
    """In the place of FlashAttention 3: sequences end to end, the last queries of each see all of its keys."""
    outputs = []
    for i in range(len(starts_q) - 1):
        q = query[starts_q[i] : starts_q[i + 1]].transpose(0, 1)
        k, v = (x[starts_k[i] : starts_k[i + 1]].transpose(0, 1) for x in (key, value))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=softmax_scale).transpose(0, 1))
    return torch.cat(outputs)


ASYNC = "trl.experimental.async_grpo"
has_async = importlib.util.find_spec(ASYNC) is not None


# The trainer adds two callbacks of one class.
@pytest.mark.filterwarnings("ignore:You are adding a .*StepIntervalCallback")
@pytest.mark.skipif(not has_async, reason="this version of TRL has none")
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["AsyncGRPOTrainer"])
def test_asynchronous(name, accumulation, tmp_path, monkeypatch):
    """At θ itself the run is the plain one bit for bit; with a penalty, θ is sent: at first and after a step."""
    module = importlib.import_module(ASYNC)
    kernel = SimpleNamespace(flash_attn_varlen_func=attention)
    monkeypatch.setattr(importlib.import_module(f"{ASYNC}.packing"), "_flash_attn", lambda: kernel)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "none")
    llama().save_pretrained(tmp_path)
    runs = []
    for settings in (None, AT_THETA, REAL):
        transfer = Transfer()
        trainer = getattr(module, name)(
            model=str(tmp_path),
            args=module.AsyncGRPOConfig(
                **{**PLAIN, "output_dir": str(tmp_path), "token_budget": 64, "gradient_accumulation_steps": accumulation}
            ),
            reward_funcs=by_place,
            train_dataset=dataset("grpo"),
            processing_class=tokenizer(),
            rollout_worker=Rollouts(),
            weight_transfer=transfer,
        )
        if settings is not None:
            attach(trainer, **settings)
        watch = Watch(trainer, transfer)
        trainer.train()
        runs.append((trainer, watch))
    (plain, _), (at_theta, _), (real, watch) = runs
    clocks = ("perf/",)
    figures = [
        [{key: value for key, value in entry.items() if not key.startswith(clocks)} for entry in own_figures(trainer)]
        for trainer in (plain, at_theta)
    ]
    assert figures[0] == figures[1]
    assert_same(weights(at_theta.model), weights(plain.model))
    assert min(penalties(real, "penalty_ratio")) > 0
    assert not same(weights(real.model), weights(plain.model))
    pushes = watch.engine.pushes
    assert len(pushes) == 1 + len(watch.starts) == 4
    for push, at in zip(pushes, [*watch.starts, weights(real.model)], strict=True):
        assert_same({key: at[key] for key in push}, push)
    window = 2 * accumulation
    for i, (seen, count) in enumerate(watch.losses):
        assert count == 1 + i // window
        assert same(seen, watch.starts[i // window]) == (i % window < accumulation)
