"""The structure of the package: imports that point one way, short files, shallow classes, settings in one place."""

import ast
import inspect
import itertools
import pathlib
import re
import sys
import warnings

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
LAYERS = ("core", "passes", "wrapping", "optimizer", "config", "zero", "trainers", "integrations")
"""From the bottom upwards."""
FOREIGN = {
    "deepspeed": {"zero"},
    "transformers": {"trainers"},
    "trl": {"trainers"},
    "accelerate": {"trainers"},
}
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
    """No file is longer than 400 lines, and no line wider than 110 columns; it has at most 4664 statements (aim: 4000)."""
    lines = {module: path.read_text(encoding="utf-8").splitlines() for module, path in FILES.items()}
    assert {module: len(found) for module, found in lines.items() if len(found) > 400} == {}
    wide = {
        f"{module}:{number}" for module, found in lines.items() for number, line in enumerate(found, 1) if len(line) > 110
    }
    assert sorted(wide) == []
    assert sum(isinstance(node, ast.stmt) for tree in TREES.values() for node in ast.walk(tree)) <= 4664


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


def switches(step):
    """How often, during ``step()``, a function of the package is called after one of another file."""
    visited = []

    def note(frame, event, _argument):
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            visited.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return sum(a != b for a, b in itertools.pairwise(visited))


@pytest.mark.parametrize(("dtype", "steps", "most"), [(torch.float32, 2, 89), (torch.bfloat16, 0, 200)], ids=str)
def test_a_step_switches_file_seldom(dtype, steps, most):
    """Who reads along turns the page no more often than today; the aim is 60 and 150."""
    model, loss = regression(dtype=dtype)
    optimizer = GradRegOptimizer(torch.optim.AdamW(model.parameters()), strength=0.1)
    closure = closure_of(optimizer, loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the self-check of a network this small
        for _ in range(steps):
            optimizer.step(closure)
        assert 10 < switches(lambda: optimizer.step(closure)) <= most


def test_the_signature_is_the_list_of_settings():
    """The signature that a user reads names every setting with its default."""
    parameters = inspect.signature(GradRegOptimizer).parameters
    for setting in SETTINGS:
        assert parameters[setting.name].default == setting.default, setting.name
    others = {"self", "optimizer", "exclude", "model", "scaler", "unknown"}
    assert set(parameters) - others == {setting.name for setting in SETTINGS}
