"""The default exclusion finds embeddings and heads as modules, whatever they are called, and nothing else."""

import pytest
import torch
import transformers
from trainers import AT_THETA, PLAIN, REAL, Spy, assert_same, at_theta, llama, own_figures, penalties, weights

from gradreg_optim import GradRegCallback, GradRegConfig, GradRegOptimizer, attach
from gradreg_optim.trainers.exclusion import added_exclusion

pytestmark = at_theta

SIZES = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"vocab_size": 24, "n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
T5 = {"vocab_size": 24, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=3, **SIZES))


def gpt2(kind):
    return kind(transformers.GPT2Config(**GPT2))


def t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))


class ValueHead(torch.nn.Module):
    """A model with a value head beside it, as PPO uses."""

    def __init__(self):
        super().__init__()
        self.pretrained_model = llama()
        self.v_head = torch.nn.Linear(16, 1)


def lora():
    peft = pytest.importorskip("peft", reason="LoRA comes with peft")
    settings = {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    return peft.get_peft_model(bert(), peft.LoraConfig(**settings))


MODELS = {
    "llama": (llama, ["lm_head.weight", "model.embed_tokens.weight"]),
    "llama tied": (lambda: llama(tie_word_embeddings=True), ["model.embed_tokens.weight"]),
    "gpt2": (lambda: gpt2(transformers.GPT2LMHeadModel), ["transformer.wte.weight"]),
    "gpt2 scores": (
        lambda: gpt2(transformers.GPT2ForSequenceClassification),
        ["score.weight", "transformer.wte.weight"],
    ),
    "bert": (bert, ["bert.embeddings.word_embeddings.weight", "classifier.bias", "classifier.weight"]),
    "t5": (t5, ["shared.weight"]),
    "value head": (
        ValueHead,
        ["pretrained_model.lm_head.weight", "pretrained_model.model.embed_tokens.weight", "v_head.bias", "v_head.weight"],
    ),
    "compiled": (
        lambda: torch.compile(llama()),
        ["_orig_mod.lm_head.weight", "_orig_mod.model.embed_tokens.weight"],
    ),
    "no model of theirs": (lambda: torch.nn.Linear(2, 2), []),
}


@pytest.mark.parametrize(("build", "names"), MODELS.values(), ids=MODELS)
def test_embeddings_and_heads_are_found(build, names):
    """Exactly the input and output embeddings and the heads: BERT's attention outputs and GPT-2's positions stay in."""
    model = build()
    found = {id(parameter) for parameter in added_exclusion((), model)}
    assert sorted(name for name, parameter in model.named_parameters() if id(parameter) in found) == names


def test_saved_head_of_an_adapted_model_is_found():
    """With LoRA the trained copy of the head is left out, and every adapter stays in."""
    model = lora()
    found = {id(parameter) for parameter in added_exclusion((), model)}
    trained = {name: id(parameter) in found for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name: "classifier" in name for name in trained}
    assert sorted(set(trained.values())) == [False, True]


class Classified(torch.utils.data.Dataset):
    """Sentences of eight tokens and their class, for the plain Trainer; or a sentence and its answer, for Seq2SeqTrainer."""

    def __init__(self, answers):
        numbers = torch.Generator().manual_seed(0)
        self.rows = torch.randint(2, 24, (16, 8), generator=numbers)
        self.labels = torch.randint(2, 24, (16, 5), generator=numbers) if answers else self.rows.sum(1) % 3

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row, label = self.rows[index], self.labels[index]
        item = {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": label}
        # Label smoothing takes the labels away, from which T5 would make the inputs of its decoder.
        return {**item, "decoder_input_ids": label.roll(1)} if label.dim() else item


TRAINERS = {
    "classifier": (transformers.Trainer, transformers.TrainingArguments, bert),
    "seq2seq": (transformers.Seq2SeqTrainer, transformers.Seq2SeqTrainingArguments, t5),
}


def train(kind, folder, settings, **arguments):
    trainer_class, arguments_class, build = TRAINERS[kind]
    torch.manual_seed(3)
    data = Classified(answers=kind == "seq2seq")
    trainer = trainer_class(
        model_init=build,
        args=arguments_class(output_dir=str(folder), **{**PLAIN, "optim": "sgd", **arguments}),
        train_dataset=data,
        eval_dataset=data,
    )
    if settings is not None:
        attach(trainer, **settings)
    return trainer


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("arguments", [{}, {"label_smoothing_factor": 0.1}], ids=["", "smoothed"])
def test_trainers_of_transformers(kind, arguments, tmp_path):
    """With the second pass at θ both trainers train plainly bit for bit, dropout and labels popped by the loss included."""
    results = []
    for settings in (None, AT_THETA, REAL):
        trainer = train(kind, tmp_path, settings, gradient_accumulation_steps=2, eval_strategy="epoch", **arguments)
        trainer.train()
        results.append((weights(trainer.model), own_figures(trainer)))
    plain, at_theta, real = results
    assert_same(at_theta[0], plain[0])
    assert at_theta[1] == plain[1]
    assert real[1][0]["loss"] == plain[1][0]["loss"]
    assert real[1][0]["grad_norm"] != plain[1][0]["grad_norm"]


def test_model_made_anew_is_wrapped_anew(tmp_path):
    """A second train() with ``model_init`` creates model and optimizer again; both trainings are regularized."""
    trainer = train("classifier", tmp_path, REAL)
    spy, models = Spy(trainer), []
    for _ in range(2):
        trainer.train()
        models.append(weights(trainer.model))
        assert len(penalties(trainer, "penalty_ratio")) == 3
        optimizer = trainer._gradreg_attachment.optimizer
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
            id(p) for p in trainer.model.parameters()
        }
        assert optimizer._model is trainer.model
    assert len(spy.losses) == 2 * 2 * 3
    assert_same(*models)


class Unfreeze(transformers.TrainerCallback):
    """Gives frozen parameters to the optimizer before the second step, to the wrapper or to the optimizer inside it."""

    def __init__(self, names, on):
        self.names, self.on = names, on

    def on_step_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **_):
        if state.global_step == 1:
            parameters = [parameter.requires_grad_() for name, parameter in model.named_parameters() if name in self.names]
            wrapper = optimizer.optimizer
            {"wrapper": optimizer, "base": wrapper.optimizer}[self.on].add_param_group({"params": parameters})
            lr_scheduler.base_lrs.append(0.1)
            lr_scheduler.lr_lambdas.append(lr_scheduler.lr_lambdas[0])


LATE = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]


@pytest.mark.parametrize("on", ["wrapper", "base"])
@pytest.mark.parametrize(
    ("exclude", "expected"), [((), [0, 2]), ("none", []), ("norm", [0, 1, 2])], ids=["default", "nothing", "pattern"]
)
@pytest.mark.parametrize("how", ["optimizers", "attach"])
def test_parameters_unfrozen_later_are_left_out_as_well(how, exclude, expected, on, tmp_path):
    """The default, and the user's pattern beside it, hold for a group that a callback adds in training."""
    model = llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in LATE)
    base = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    settings = {"strength": 0.1, "exclude": exclude, "model": model}
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(tmp_path), **PLAIN),
        train_dataset=[{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 16,
        optimizers=(GradRegOptimizer(base, **settings) if how == "optimizers" else base, None),
        callbacks=[Unfreeze(LATE, on)],
    )
    if how == "attach":
        attach(trainer, **settings)
    trainer.train()
    groups = trainer._gradreg_attachment.optimizer.param_groups
    assert [len(group["params"]) for group in groups][1] == len(LATE)
    assert groups[1]["gradreg_excluded"] == expected


class Creating(transformers.Trainer):
    """Makes the wrapper in ``create_optimizer``."""

    def create_optimizer(self, *_):
        if self.optimizer is None:
            self.optimizer = GradRegOptimizer(torch.optim.SGD(self.model.parameters(), lr=0.1), **self.settings)
        return self.optimizer


def given(model, settings, make):
    return make(optimizers=(GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **settings), None))


def attached(_model, settings, make):
    attach(trainer := make(), **settings)
    return trainer


def configured(_model, settings, make):
    patterns = settings["exclude"]
    config = GradRegConfig(grad_reg_strength=0.1, grad_reg_exclude=[patterns] if isinstance(patterns, str) else None)
    attach(trainer := make(), config)
    return trainer


def called(_model, settings, make):
    return make(callbacks=[GradRegCallback(**settings)])


def creating(_model, settings, make):
    trainer = make(Creating)
    trainer.settings = settings
    return trainer


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [((), {"embed_tokens", "lm_head"}), ("norm", {"embed_tokens", "lm_head", "norm"}), ("none", set())],
    ids=["default", "pattern", "nothing"],
)
@pytest.mark.parametrize("way", [given, attached, configured, called, creating])
def test_patterns_are_added_to_the_default(way, exclude, expected, tmp_path):
    """However the penalty came, and in a second training too."""
    model = llama()

    def make(trainer_class=transformers.Trainer, **more):
        arguments = transformers.TrainingArguments(output_dir=str(tmp_path), **PLAIN | {"max_steps": 1})
        data = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 16
        return trainer_class(model=model, args=arguments, train_dataset=data, **more)

    trainer = way(model, {"strength": 0.1, "exclude": exclude, "model": model}, make)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for _ in range(2):
        trainer.train()
        groups = trainer._gradreg_attachment.optimizer.param_groups
        left_out = [names[id(group["params"][i])] for group in groups for i in group["gradreg_excluded"]]
        parts = {part for name in left_out for part in ("embed_tokens", "lm_head", "norm") if part in name}
        assert parts == expected
        assert len(left_out) == {0: 0, 2: 2, 3: 7}[len(expected)]  # five norms in two layers
