"""What importing the package brings, and what it does not."""

import importlib.util
import subprocess
import sys

import pytest

import gradreg_optim

FOREIGN = ("transformers", "trl", "accelerate", "deepspeed", "datasets", "peft", "pytorch_optimizer")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_needs_torch_alone():
    """A fresh process that imports the package, and takes a step, has loaded no other library."""
    step = (
        "import sys, torch, gradreg_optim\n"
        "w = torch.nn.Parameter(torch.ones(2))\n"
        "optimizer = gradreg_optim.GradRegOptimizer(torch.optim.SGD([w], lr=0.1))\n"
        "def closure():\n"
        "    optimizer.zero_grad()\n"
        "    loss = w.square().sum()\n"
        "    loss.backward()\n"
        "    return loss\n"
        "optimizer.step(closure)\n"
        f"print(sorted(set({FOREIGN!r}) & set(sys.modules)))\n"
    )
    assert run(step).strip() == "[]"


LIBRARIES = {
    "GradRegCallback": "transformers",
    "attach": "transformers",
    "detach": "transformers",
    "ZeroGradRegOptimizer": "deepspeed",
}


@pytest.mark.parametrize("name", sorted({"GradReg", "GradRegConfig", "GradRegOptimizer", "Point", "reweighted", *LIBRARIES}))
def test_public_names(name):
    """Every promised name is there, those of trainers and engines loaded when they are first used."""
    assert name in gradreg_optim.__all__
    if name in LIBRARIES and importlib.util.find_spec(LIBRARIES[name]) is None:
        pytest.skip(f"{name} needs {LIBRARIES[name]}, which is not installed")
    assert getattr(gradreg_optim, name).__name__ == name


def test_unknown_names_are_attribute_errors():
    """hasattr and from-imports behave as on any module."""
    assert not hasattr(gradreg_optim, "no_such_name")


MISSING = [*((name, library) for name, library in LIBRARIES.items()), ("attach", "accelerate")]


@pytest.mark.parametrize(("name", "library"), MISSING)
def test_a_missing_package_names_its_extra(name, library):
    """If a library is not installed, the error names the extra that has it, and the rest works."""
    script = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {library!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import gradreg_optim
assert gradreg_optim.GradRegOptimizer and gradreg_optim.GradReg
try:
    gradreg_optim.{name}
except ImportError as error:
    print(error)
"""
    extra = "deepspeed" if library == "deepspeed" else "trl"
    message = run(script)
    assert f"gradreg_optim.{name} needs packages that are missing" in message
    assert message.endswith(f"pip install 'gradreg_optim[{extra}]'.\n")
