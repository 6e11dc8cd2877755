"""Try the installed wheel in an environment that holds torch alone."""

import sys
from importlib import metadata, resources
from pathlib import Path

import torch

import gradreg_optim
from gradreg_optim import GradRegOptimizer

STRENGTH, EPS, LR = 1e-2, 1e-3, 0.1


def check_contents() -> None:
    """The package comes from the wheel, is typed, carries its license, the command and nothing else."""
    installed = Path(gradreg_optim.__file__)
    assert installed.is_relative_to(sys.prefix), f"imported from {installed}, not from the wheel"
    assert resources.files(gradreg_optim).joinpath("py.typed").is_file(), "py.typed is not in the wheel"

    files = metadata.files("gradreg_optim") or []
    assert any(file.name == "LICENSE" for file in files), "LICENSE is not in the wheel"
    command = {file for file in files if file.stem == "gradreg" and file.parent.name in ("bin", "Scripts")}
    assert command, "the command gradreg is not in the wheel"
    strangers = {
        file.parts[0] for file in set(files) - command if not file.parts[0].startswith("gradreg_optim")
    }
    assert not strangers, f"the wheel also installs {sorted(strangers)}"


def check_imports() -> None:
    """Importing the package needs torch alone."""
    foreign = {"transformers", "trl", "accelerate", "deepspeed"} & set(sys.modules)
    assert not foreign, f"`import gradreg_optim` imported {sorted(foreign)}"


def check_step() -> None:
    """On a quadratic the forward difference is exact: one step has a closed form, with any base optimizer."""
    for base in (torch.optim.SGD, torch.optim.AdamW):
        torch.manual_seed(0)
        inputs = torch.randn(8, 4, dtype=torch.float64)
        layer = torch.nn.Linear(4, 3, bias=False, dtype=torch.float64)
        optimizer = GradRegOptimizer(
            base(layer.parameters(), lr=LR), strength=STRENGTH, eps=EPS, g1_clip=None, g2_clip=None
        )

        def closure(layer=layer, inputs=inputs, optimizer=optimizer):
            optimizer.zero_grad()
            loss = 0.5 * layer(inputs).square().sum() / len(inputs)  # ½ tr(W A Wᵀ) with A = XᵀX/n
            loss.backward()
            return loss

        # The expected step: the bare base optimizer, given g1 + γ·g1·A in place of its gradient.
        hessian = inputs.T @ inputs / len(inputs)
        expected = layer.weight.detach().clone().requires_grad_()
        g1 = expected.detach() @ hessian
        expected.grad = g1 + STRENGTH * g1 @ hessian
        base([expected], lr=LR).step()

        optimizer.step(closure)
        # rtol: the rounding of a float64 gradient difference, divided by eps.
        torch.testing.assert_close(layer.weight, expected, rtol=1e-10, atol=1e-12)


if __name__ == "__main__":
    check_imports()
    check_contents()
    check_step()
    version = metadata.version("gradreg_optim")
    print(f"gradreg_optim {version} works from its wheel with torch {torch.__version__}")
