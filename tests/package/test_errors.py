"""Every error message of the core, in one table: each names the value, the rule and the remedy."""

import ast
import math
import pathlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from problems import closure_of, regression
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.fsdp._flat_param import FlatParamHandle

import gradreg_optim
from gradreg_optim import GradReg, GradRegConfig, GradRegOptimizer, reweighted
from gradreg_optim.core.foreign import NoSecondGradient
from gradreg_optim.core.tensors import device_mesh
from gradreg_optim.wrapping.refusals import check_engines

# Files that need torch alone; those for trainers and DeepSpeed have tests, and messages, of their own.
ROOT = pathlib.Path(gradreg_optim.__file__).parent
CORE = [
    *(path for folder in ("core", "wrapping") for path in sorted((ROOT / folder).rglob("*.py"))),
    *(ROOT / name for name in ("by_name.py", "config.py", "optimizer.py", "passes.py", "reweighting.py")),
]


def sgd(**group):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], **group}], lr=0.1)


def named():
    return torch.optim.SGD(regression()[0].named_parameters(), lr=0.1)


def stepped(**settings):
    model, loss = regression()
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **settings)
    optimizer.step(closure_of(optimizer, loss))


def sparse():
    embedding = nn.Embedding(3, 2, sparse=True)
    optimizer = GradRegOptimizer(torch.optim.SGD(embedding.parameters(), lr=0.1))
    optimizer.step(closure_of(optimizer, lambda: embedding(torch.tensor([0])).sum()))


def no_second_gradient():
    model, loss = regression()
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    closure = closure_of(optimizer, loss)
    optimizer.step(lambda: closure() if closure.calls == 0 else None)


def leave_out_everything():
    optimizer = GradRegOptimizer(named())
    optimizer.leave_out(optimizer.param_groups[0]["params"])


def leave_out_of_nothing():
    optimizer = GradRegOptimizer(named(), exclude="none")
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.requires_grad_(False)
    optimizer.leave_out([])


def step_without_anything():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = GradRegOptimizer(torch.optim.SGD([("w", weight)], lr=0.1), exclude="w")
    optimizer.step(lambda: weight.square().sum().backward())


def drawn_at_each_call():
    model, _ = regression()
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    generator = torch.Generator().manual_seed(0)
    inputs = lambda: torch.randn(8, 4, dtype=torch.float64, generator=generator)  # noqa: E731
    optimizer.step(closure_of(optimizer, lambda: model(inputs()).square().mean()))


def replaced_in_a_further_pass():
    w, v = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
    optimizer = GradRegOptimizer(torch.optim.SGD([w, v], lr=0.1), check_every=0)
    closure = closure_of(optimizer, lambda: (w - 2 * v).square().sum())

    def tying():
        value = closure()
        if closure.calls == 2:
            w.data = v.data
        return value

    optimizer.step(tying)


def a_closure_that_computes_after_passes():
    model, loss = regression()
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), check_every=0)
    for _ in optimizer.passes():
        optimizer.zero_grad()
        loss().backward()
    optimizer.step(closure_of(optimizer, loss))


def one_of_two():
    model, loss = regression()
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), check_every=0)
    for _ in optimizer.passes(micro_batches=2):
        optimizer.zero_grad()
        loss().backward()
    return optimizer


def changed(optimizer):
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad.mul_(0.5)
    return optimizer


def in_shared_memory():
    model, loss = regression()
    model.share_memory()
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.step(closure_of(optimizer, loss))


def uncleared():
    model, loss = regression()
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    loss().backward()
    optimizer.step(lambda: loss().backward())


def stepped_in_the_loop():
    model, loss = regression()
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in optimizer.passes():
        closure_of(optimizer, loss)()
        optimizer.step()


def uncleared_in_the_loop():
    model, loss = regression()
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    loss().backward()
    for _ in optimizer.passes():
        loss().backward()


def stepping_in_the_backward():
    model, loss = regression()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.step(closure_of(optimizer, loss))


def refilled_in_place():
    optimizer, static = GradRegOptimizer(sgd()), torch.ones(1)
    weight = optimizer.param_groups[0]["params"][0]
    optimizer.step(lambda: setattr(weight, "grad", static.copy_(weight.detach())))


def unscaled_in_a_pass():
    model, loss = regression()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler)
    closure = closure_of(optimizer, loss, scaler.scale)
    optimizer.step(lambda: (closure(), scaler.unscale_(optimizer)))


def stepped_by_a_foreign_scaler():
    model, loss = regression()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in optimizer.passes():
        closure_of(optimizer, loss, scaler.scale)()
    scaler.step(optimizer)


def on_the_meta_device():
    layer = nn.Linear(2, 1, device="meta")
    optimizer = GradRegOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1))
    optimizer.step(lambda: None)


def shards_of_fsdp1():
    class Handle(FlatParamHandle):
        uses_sharded_strategy = True

        def __init__(self, flat):
            self.flat_param = flat

    weight = nn.Parameter(torch.ones(1))
    weight._fsdp_flattened = True
    handle = Handle(weight)
    check_engines([{"params": [weight]}])
    return handle


def compressed_by_power_sgd():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        model, loss = regression()
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel.register_comm_hook(PowerSGDState(None), powerSGD_hook)
        optimizer = GradRegOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
        optimizer.step(closure_of(optimizer, loss))
    finally:
        dist.destroy_process_group()


def late_group(**keys):
    optimizer = GradRegOptimizer(sgd())
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], **keys})


class LayerWiseDummyOptimizer(torch.optim.SGD):
    """Named like what Transformers puts in the place of layerwise GaLore."""


def two_meshes():
    device_mesh([SimpleNamespace(device_mesh="one"), SimpleNamespace(device_mesh="another")])


@dataclass
class Case:
    provoke: Callable[[], object]
    error: type[Exception]
    value: str
    rule: str
    remedy: str


def setting(name, value, rule, remedy):
    """The rule of one number, through the optimizer."""
    return Case(lambda: GradRegOptimizer(sgd(), **{name: value}), ValueError, f"{name}={value!r}", rule, remedy)


CASES = {
    "a deleted setting": Case(
        lambda: GradRegOptimizer(sgd(), fraction=0.5),
        TypeError,
        "'fraction'",
        "no setting any more",
        "every=k with k times the strength",
    ),
    "a deleted method": setting("method", "exact", "must be one of ('forward', 'central')", "central two"),
    "a parameter that a further pass replaces": Case(
        replaced_in_a_further_pass,
        RuntimeError,
        "A parameter of shape (1,)",
        "is not what it was before the further passes",
        "write them after step()",
    ),
    "a closure after passes": Case(
        a_closure_that_computes_after_passes,
        RuntimeError,
        "step(closure) after a loop over passes()",
        "the closure changed the combined gradient",
        "in one of the two",
    ),
    "memory that processes share": Case(
        in_shared_memory,
        RuntimeError,
        "The parameters are in memory that processes share",
        "what they write while this one is there is lost",
        "Give each process a copy of its own",
    ),
    "every": setting("every", 0, "must be an integer >= 1", "k each k-th one"),
    "a step within the loop": Case(
        stepped_in_the_loop,
        RuntimeError,
        "step() was called before the passes of this step ended",
        ".grad does not hold the combined gradient",
        "Let the loop over optimizer.passes() run to its end, and call step() after it",
    ),
    "a loop that clears nothing": Case(
        uncleared_in_the_loop,
        RuntimeError,
        "added to gradients from before it was called",
        "its second call would lack them",
        "Clear gradients in",
    ),
    "strength": setting("strength", -1.0, "must be 'auto' or a finite number >= 0", "0 switches the penalty off"),
    "strength, NaN": setting("strength", math.nan, "must be 'auto' or a finite number >= 0", "auto finds it in ten steps"),
    "eps": setting("eps", 0.0, "must be None or a finite number > 0", "published value is 1e-3"),
    "eps, infinite": setting("eps", math.inf, "must be None or a finite number > 0", "published value is 1e-3"),
    "radius": setting("radius", -0.1, "must be None, 'auto' or a finite number > 0", "Leave it out to use eps"),
    "warmup_steps": setting("warmup_steps", 1.5, "must be an integer >= 0", "optimizer steps without the penalty"),
    "schedule": setting("schedule", "exponential", "one of ('constant', 'linear', 'cosine')", "callable of the step"),
    "schedule_steps": setting("schedule_steps", 0, "must be None or an integer > 0", "over which the strength rises"),
    "g1_clip": setting("g1_clip", 0.0, "must be None or a number > 0", "None switches the clip off"),
    "g2_clip": setting("g2_clip", "10", "must be None or a number > 0", "None switches the clip off"),
    "max_penalty_ratio": setting(
        "max_penalty_ratio", -1, "must be None or a number > 0", "None leaves the penalty unbounded"
    ),
    "eps and radius": Case(
        lambda: GradRegOptimizer(sgd(), eps=1e-3, radius=0.02),
        ValueError,
        "eps=0.001 and radius=0.02",
        "both set the length of the same step",
        "Give eps (a multiple of the gradient) or radius (the length itself), not both",
    ),
    "a flag": Case(
        lambda: GradRegConfig(grad_reg_strength=-1.0),
        ValueError,
        "strength=-1.0",
        "must be 'auto' or a finite number >= 0",
        "0 switches the penalty off",
    ),
    "a group's own setting": Case(
        lambda: GradRegOptimizer(sgd(gradreg_radius=-1.0)),
        ValueError,
        "radius=-1.0",
        "must be None, 'auto' or a finite number > 0",
        "Leave it out to use eps",
    ),
    "exclude": Case(
        lambda: GradRegOptimizer(named(), exclude=("0.", "")),
        ValueError,
        "exclude=('0.', '')",
        "every pattern must be a non-empty string",
        "exclude=('embed', 'lm_head')",
    ),
    "exclude without names": Case(
        lambda: GradRegOptimizer(sgd(), exclude="embed"),
        ValueError,
        "exclude=('embed',)",
        "parameter names are not known",
        "Pass model=<the module>, or build the optimizer on model.named_parameters()",
    ),
    "exclude without a match": Case(
        lambda: GradRegOptimizer(named(), exclude=("0.", "embed")),
        ValueError,
        "'embed' is part of no parameter name",
        "a pattern has to match",
        "Names look like '0.weight', '0.bias', '2.weight'",
    ),
    "everything left out": Case(
        leave_out_everything,
        ValueError,
        "Every trainable parameter of the optimizer is excluded",
        "nothing is left to regularize",
        "Pass exclude='none'",
    ),
    "nothing to train": Case(
        leave_out_of_nothing,
        ValueError,
        "The optimizer has no trainable parameter",
        "nothing would be trained",
        "Build it on parameters with requires_grad=True",
    ),
    "exclude that matches everything": Case(
        step_without_anything,
        ValueError,
        "exclude=('w',)",
        "matches every parameter of the optimizer: nothing is left to regularize",
        "Pass patterns that match fewer",
    ),
    "a loss that draws its data": Case(
        drawn_at_each_call,
        RuntimeError,
        "The loss is not a function of the weights: it was ",
        "repeated at the same weights, from the same random numbers and buffers",
        "Draw the batch before the closure",
    ),
    "a schedule's factor": Case(
        lambda: stepped(schedule=lambda step: -0.5),
        ValueError,
        "schedule(0) returned -0.5",
        "a factor on the strength must be a finite number >= 0",
        "Correct the callable",
    ),
    "a schedule without a length": Case(
        lambda: stepped(schedule="cosine"),
        ValueError,
        "schedule_steps is None",
        "schedule 'cosine' must know over how many steps it rises",
        "Pass schedule_steps=<int>",
    ),
    "no optimizer": Case(
        lambda: GradRegOptimizer(torch.optim.SGD),
        TypeError,
        "optimizer=<class 'torch.optim.sgd.SGD'> is a type",
        "an instance of torch.optim.Optimizer is wrapped",
        "Pass, for example, torch.optim.AdamW(model.parameters())",
    ),
    "an optimizer of DeepSpeed's": Case(
        lambda: GradRegOptimizer(type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero"})()),
        TypeError,
        "is a DeepSpeedZeroOptimizer",
        "The engine holds the parameters by now",
        "use ZeroGradRegOptimizer(engine)",
    ),
    "wrapped twice": Case(
        lambda: GradRegOptimizer(GradRegOptimizer(sgd())),
        ValueError,
        "optimizer is a GradRegOptimizer already",
        "one wrapper regularizes",
        "Pass the optimizer inside it",
    ),
    "LBFGS": Case(
        lambda: GradRegOptimizer(torch.optim.LBFGS([nn.Parameter(torch.ones(1))])),
        ValueError,
        "optimizer=LBFGS",
        "its step needs a closure, or makes the gradient by itself",
        "Use an optimizer that steps on gradients, such as AdamW or SGD",
    ),
    "a sparse gradient": Case(
        sparse,
        ValueError,
        "a parameter of shape (3, 2) has layout torch.sparse_coo",
        "only dense gradients are regularized",
        "Use sparse=False, or leave the parameter out with exclude=",
    ),
    "step without a closure": Case(
        lambda: GradRegOptimizer(sgd()).step(),
        RuntimeError,
        "step() was called without a closure",
        "needs the loss at a second point",
        "Pass a closure that clears the gradients, runs forward and backward and returns the loss, or run "
        "both in `for _ in optimizer.passes():` before step()",
    ),
    "no second gradient": Case(
        no_second_gradient,
        NoSecondGradient,
        "The second call of the closure left no gradient",
        "the first one did",
        "Let the closure clear the gradients and run forward and backward each time",
    ),
    "resample": setting("resample", "draw", "must be None or one of ('reuse', 'sequence')", "reuse is the published choice"),
    "norm_of": setting("norm_of", "batch", "must be None or one of ('step', 'micro_batch')", "keeps the penalty"),
    "micro_batches": Case(
        lambda: GradRegOptimizer(sgd()).passes(micro_batches=0),
        ValueError,
        "micro_batches=0",
        "must be an integer >= 1",
        "the number of loops over passes() before step()",
    ),
    "micro_batches and the norm of the step": Case(
        lambda: GradRegOptimizer(sgd(), norm_of="step").passes(micro_batches=2),
        ValueError,
        "micro_batches=2 and norm_of='step'",
        "needs all of it in each pass",
        "or leave norm_of out",
    ),
    "micro_batches that change": Case(
        lambda: one_of_two().passes(micro_batches=3),
        ValueError,
        "micro_batches=3 after 1 of 2",
        "their number holds for a whole step",
        "zero_grad() to begin the step again",
    ),
    "a sum of micro-batches that was changed": Case(
        lambda: changed(one_of_two()).passes(micro_batches=2),
        RuntimeError,
        "after 1 of 2 micro-batches",
        ".grad held their sum",
        "clip after the last loop",
    ),
    "a step before all micro-batches": Case(
        lambda: one_of_two().step(),
        RuntimeError,
        "after 1 of 2 micro-batches",
        "Loop over optimizer.passes(micro_batches=n) once for each",
        "for a last step of fewer, pass their number",
    ),
    "resample without a trainer": Case(
        lambda: stepped(resample="sequence"),
        RuntimeError,
        "resample='sequence'",
        "this step got a closure or a loop over passes(), which decides itself",
        "Use gradreg_optim.reweighted there, and leave resample out",
    ),
    "resample in a loop": Case(
        lambda: GradRegOptimizer(sgd(), resample="sequence").passes(),
        RuntimeError,
        "resample='sequence'",
        "completions are reweighted in the losses of trainers",
        "leave resample out",
    ),
    "no first pass": Case(
        lambda: reweighted(torch.ones(2, 3), torch.ones(2, 3), None),
        ValueError,
        "log_p=(2, 3), mask=(2, 3), first=None",
        "each has to be (completions, tokens), of the same completions",
        "Keep first = log_p.detach() of the pass at Point.THETA",
    ),
    "method": setting(
        "method",
        "backward",
        "must be one of ('forward', 'central')",
        "which is as good as double backward was",
    ),
    "rounding": setting("rounding", "up", "must be one of ('nearest', 'stochastic')", "smaller than their spacing"),
    "check_every": setting("check_every", -1, "must be None or an integer >= 0", "0 makes none"),
    "shrink": setting("shrink", 0.5, "must be True or False", "scales the penalty by its share of signal"),
    "a closure that clears nothing": Case(
        uncleared,
        RuntimeError,
        "The closure added to gradients from before it was called",
        "its second call would lack them",
        "Clear gradients in the closure and run all micro-batches of the step in it",
    ),
    "an optimizer that steps in the backward": Case(
        stepping_in_the_backward,
        RuntimeError,
        "The first backward has used up its gradients",
        "Nothing is left to combine a second gradient with",
        "Remove these hooks",
    ),
    "an optimizer known to step in the backward": Case(
        lambda: GradRegOptimizer(LayerWiseDummyOptimizer([nn.Parameter(torch.ones(1))])),
        ValueError,
        "optimizer=LayerWiseDummyOptimizer",
        "it takes its steps in the backward",
        "Use one that steps when it is called",
    ),
    "gradients that are refilled": Case(
        refilled_in_place,
        RuntimeError,
        "The last pass wrote its gradients into the memory of those of the first pass",
        "which are lost",
        "Give every pass gradients of its own",
    ),
    "unscaled in a pass": Case(
        unscaled_in_a_pass,
        RuntimeError,
        "scaler.unscale_(optimizer) was called within a pass",
        "all gradients of a step need one scale",
        "after the loop call scaler.unscale_(optimizer), clip, optimizer.step() and scaler.update()",
    ),
    "a scaler that nobody was told of": Case(
        stepped_by_a_foreign_scaler,
        RuntimeError,
        "scaler.step(optimizer)",
        "took scaled gradients for gradients",
        "Pass GradRegOptimizer(..., scaler=scaler)",
    ),
    "no scaler": Case(
        lambda: GradRegOptimizer(sgd(), scaler=True),
        TypeError,
        "scaler=True is a bool",
        "losses are scaled by a torch.amp.GradScaler",
        "Pass the one that your closure calls scale() of",
    ),
    "no module": Case(
        lambda: GradRegOptimizer(sgd(), model={}),
        TypeError,
        "model=<dict> is a dict",
        "a torch.nn.Module",
        "Pass the module",
    ),
    "the meta device": Case(
        on_the_meta_device,
        RuntimeError,
        "2 of 2 parameters are on the meta device",
        "without values nothing moves",
        "Load the weights",
    ),
    "FSDP1": Case(
        shards_of_fsdp1,
        ValueError,
        "shards of FSDP1",
        "norms would be those of this rank's shards alone",
        "Use FSDP2",
    ),
    "PowerSGD": Case(
        compressed_by_power_sgd,
        ValueError,
        "the communication hook PowerSGD",
        "adds what it lost to the next ones",
        "with fp16_compress_hook or bf16_compress_hook",
    ),
    "a key that is none": Case(
        lambda: late_group(gradreg_stength=0.1),
        ValueError,
        "'gradreg_stength' in a parameter group",
        "it would have no effect",
        "Did you mean 'gradreg_strength'?",
    ),
    "a group of its own method": Case(
        lambda: late_group(gradreg_method="central"),
        ValueError,
        "gradreg_method='central' in one parameter group and 'forward' in the first",
        "it holds for the whole optimizer",
        "Give it to the optimizer",
    ),
    "a name of nothing": Case(
        lambda: GradReg([], "torch.optim.AdamX"),
        ImportError,
        "base_optimizer='torch.optim.AdamX'",
        "must be the full name of an installed optimizer",
        "Write, for example, 'torch.optim.AdamW'",
    ),
    "a name of no optimizer": Case(
        lambda: GradReg([], "torch.nn.Linear"),
        TypeError,
        "base_optimizer='torch.nn.Linear'",
        "must be the full name of the optimizer inside, or its class",
        "Write, for example, base_optimizer='torch.optim.AdamW'",
    ),
    "gradreg that is no mapping": Case(
        lambda: GradReg([], gradreg=0.1),
        TypeError,
        "gradreg=0.1 is a float",
        "must be a mapping",
        "gradreg={'strength': 0.3}",
    ),
    "a text for a switch in gradreg": Case(
        lambda: GradReg([], gradreg={"published": "false"}),
        ValueError,
        "published='false'",
        "must be true or false",
        "Write no text",
    ),
    "a misspelt name in gradreg": Case(
        lambda: GradReg([], gradreg={"strenght": 0.1}),
        TypeError,
        "'strenght'",
        "unexpected setting",
        "Did you mean 'strength'?",
    ),
    "a setting beside gradreg": Case(
        lambda: GradReg([], strength=0.1, lr=0.1),
        TypeError,
        "strength=0.1",
        "is no argument of AdamW",
        "gradreg={'strength': 0.1}",
    ),
    "two device meshes": Case(
        two_meshes,
        ValueError,
        "2 device meshes",
        "norms are summed over one",
        "Shard all parameters that are regularized over the same mesh",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_message_names_value_rule_and_remedy(case):
    """Whoever reads it knows what was wrong, what is right, and what to do."""
    with pytest.raises(case.error) as caught:
        case.provoke()
    message = str(caught.value)
    assert case.value in message
    assert case.rule in message
    assert case.remedy in message
    assert type(caught.value) is case.error  # no subclass that happens to match


def raise_statements():
    """File and lines of every error that the core raises itself, AttributeErrors of missing attributes aside."""
    found = {}
    for path in CORE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and node.exc is not None and "AttributeError" not in ast.dump(node.exc):
                found[path, node.lineno] = range(node.lineno, node.end_lineno + 1)
    return found


def test_the_table_is_complete():
    """Every raise statement of the core is provoked by some row; a new one without a row fails here."""
    reached = set()
    for case in CASES.values():
        with pytest.raises(case.error) as caught:
            case.provoke()
        frames = traceback.extract_tb(caught.value.__traceback__)
        reached |= {(pathlib.Path(frame.filename), frame.lineno) for frame in frames}
    statements = raise_statements()
    missed = [
        f"{path.relative_to(ROOT)}:{lineno}"
        for (path, lineno), lines in statements.items()
        if not any((path, line) in reached for line in lines)
    ]
    assert missed == []
    assert len({path for path, _ in statements}) > 5  # a search that finds nothing would pass


def test_a_refused_optimizer_is_left_as_it_was():
    """What cannot be wrapped is refused before its groups are touched."""
    inner = named()
    before = inner.state_dict()
    with pytest.raises(ValueError, match="embed"):
        GradRegOptimizer(inner, exclude="embed")
    assert inner.state_dict() == before
    lbfgs = torch.optim.LBFGS([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="LBFGS"):
        GradRegOptimizer(lbfgs)
    assert not any("gradreg" in key for key in lbfgs.param_groups[0])
