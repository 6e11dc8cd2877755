"""The structure of the package: imports that point one way, short files, shallow classes, settings in one place."""

import ast
import inspect
import pathlib
import re
import sys

import pytest
import torch
from problems import closure_of, regression

import gradreg_optim
from gradreg_optim import GradRegOptimizer
from gradreg_optim.wrapping.settings import SETTINGS

PACKAGE = pathlib.Path(gradreg_optim.__file__).parent
FILES = {
    ".".join(("gradreg_optim", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}
LAYERS = ("core", "drivers", "wrapping", "optimizer", "config", "zero", "trainers", "integrations")
"""From the bottom upwards; ``drivers`` and ``wrapping`` do not import each other."""
FOREIGN = {"deepspeed": {"zero"}, "transformers": {"trainers"}, "trl": {"trainers"}, "accelerate": {"trainers"}}
STACKS = {"axolotl": "axolotl", "llamafactory": "llama_factory", "swift": "ms_swift", "verl": "verl"}
"""The file in ``integrations`` that alone imports each stack."""


def imported(module):
    """Every module that an import statement of ``module`` names, also for types and inside functions."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


EDGES = {module: (imported(module) & set(FILES)) - {"gradreg_optim", module} for module in FILES}


def layer(module):
    return module.split(".")[1] if "." in module else ""


def test_no_import_circle():
    """No module is reached again from its own imports."""

    def reached(module):
        seen, todo = set(), [module]
        while todo:
            new = EDGES[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    assert [module for module in FILES if module in reached(module)] == []
    assert any(len(targets) > 5 for targets in EDGES.values())  # a search that finds nothing would pass


def test_imports_point_one_way():
    """The core knows nothing of what is around it, and so on upwards."""
    layers = {module: layer(module) for module in FILES if layer(module) in LAYERS}
    upwards = [
        (module, target)
        for module, own in layers.items()
        for target in EDGES[module]
        if target in layers and LAYERS.index(layers[target]) > LAYERS.index(own)
    ]
    assert upwards == []
    assert [m for m, own in layers.items() if own == "wrapping" for target in EDGES[m] if layer(target) == "drivers"] == []


@pytest.mark.parametrize("library", FOREIGN)
def test_foreign_libraries_stay_in_their_folder(library):
    """DeepSpeed in zero/, Transformers, TRL and Accelerate in trainers/: what else is imported needs torch alone."""
    users = {layer(module) for module in FILES if any(name.split(".")[0] == library for name in imported(module))}
    assert users <= FOREIGN[library] | {"integrations"}


@pytest.mark.parametrize("stack", STACKS)
def test_a_stack_has_one_file(stack):
    """Each plugin stands on its own stack, names the version it was run with, and is short."""
    name = f"gradreg_optim.integrations.{STACKS[stack]}"
    users = [module for module in FILES if any(found.split(".")[0] == stack for found in imported(module))]
    assert users == [name]
    text = FILES[name].read_text(encoding="utf-8")
    assert re.match(r'"""[\w-]+: .* Run with [\w-]+ \d+\.\d+\.\d+', text)
    assert len(text.splitlines()) < 100


def test_files_are_short():
    """No file is longer than 300 lines."""
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in FILES.items()}
    assert {module: length for module, length in lengths.items() if length > 300} == {}


def test_classes_are_shallow():
    """Own classes inherit at most three levels deep."""
    bases = {
        node.name: [ast.unparse(base).split(".")[-1] for base in node.bases]
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }

    def depth(name):
        return 1 + max((depth(base) for base in bases[name] if base in bases), default=0)

    assert {name: depth(name) for name in bases if depth(name) > 3} == {}


def test_a_plain_step_enters_few_files():
    """Whoever reads what a float32 step does opens twelve files; the first two steps check the closure as well."""
    model, loss = regression(dtype=torch.float32)
    optimizer = GradRegOptimizer(torch.optim.AdamW(model.parameters()))
    closure, entered = closure_of(optimizer, loss), set()
    for _ in range(2):
        optimizer.step(closure)

    def note(frame, event, _argument):
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            entered.add(pathlib.Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix())

    sys.setprofile(note)
    try:
        optimizer.step(closure)
    finally:
        sys.setprofile(None)
    assert len(entered) <= 12, sorted(entered)


@pytest.mark.parametrize("engine", ["plain", "zero"])
def test_signatures_are_the_list_of_settings(engine):
    """The signatures that a user reads name every setting with its default; the engine leaves out what it decides itself."""
    cls, missing = GradRegOptimizer, set()
    if engine == "zero":
        pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
        cls, missing = gradreg_optim.ZeroGradRegOptimizer, {"rounding"}
    parameters = inspect.signature(cls).parameters
    for setting in SETTINGS:
        if setting.name not in missing:
            assert parameters[setting.name].default == setting.default, setting.name
    others = {"self", "optimizer", "engine", "exclude", "model", "scaler"}
    assert set(parameters) - others == {setting.name for setting in SETTINGS} - missing
