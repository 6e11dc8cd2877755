"""Which training stacks work? Runs the example of each, and the comparison with a loop by hand, and writes
the table.

    make stacks                                     # builds the environments first
    python -m benchmarks.stacks verl                # one of them again; today's result keeps the others

Each stack has an environment ``.venv-stacks/<stack>``. It *works* if its example ends without an error and
:mod:`benchmarks.stacks.compare` finds the weights of a loop by hand up to the rounding of float32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common.results import ROOT, stamp, todays, write_both
from benchmarks.common.tables import markdown_table

ENVIRONMENTS = ROOT / ".venv-stacks"
VERL = ["--config-path", str(ROOT / "examples/verl"), "--config-name", "sft"]
COMMANDS = {
    "ms_swift": ["swift", "sft", "examples/ms_swift/sft.yaml"],
    "llama_factory": [
        "python",
        "-m",
        "gradreg_optim.integrations.llama_factory",
        "examples/llama_factory/sft.yaml",
    ],
    "axolotl": ["axolotl", "train", "examples/axolotl/sft.yaml", "--launcher", "python"],
    "verl": ["torchrun", "--nproc_per_node", "2", "-m", "verl.trainer.sft_trainer", *VERL],
}
"""The examples: what their README says, in the environment of the stack."""
RAN = {
    "ms_swift": "SFT",
    "llama_factory": "SFT",
    "axolotl": "SFT",
    "verl": "SFT trainer, FSDP2 engine; the example on two ranks, on a stand-in for verl's device",
}
PACKAGES = {"ms_swift": "ms-swift", "llama_factory": "llamafactory", "axolotl": "axolotl", "verl": "verl"}
LIBRARIES = ("torch", "transformers", "trl", "accelerate")
TOLERANCE = 1e-6
"""Of a weight, which two steps of AdamW at a learning rate of 1e-3 move by 2e-3: some roundings of float32,
which Adam's division by √v magnifies where a gradient is about 0."""
LEGEND = f"""Two steps of two micro-batches of a model of 60,000 parameters, in float32 on a CPU, with default
settings. Difference: the largest of any weight between the stack with its plugin and a loop over
`GradRegOptimizer.passes()` written by hand in one process, from the same weights on the same batches; at most
{TOLERANCE:.0e}. Penalty: the largest difference between the stack and the same steps without penalty."""


def surroundings(stack: str) -> dict[str, str]:
    """Environment variables for a stack: nothing is downloaded, and its own programs are found first."""
    path = [str(ROOT), str(ROOT / "benchmarks/stacks/stand_ins")] if stack == "llama_factory" else [str(ROOT)]
    more = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    if stack == "verl":
        more |= {
            "VERL_USE_EXTERNAL_MODULES": "examples.verl.cpu",
            "VERL_PLATFORM": "cpu",
            "VERL_ENGINE_DEVICE": "cuda",
        }
    programs = f"{ENVIRONMENTS / stack / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **more, "PATH": programs, "PYTHONPATH": os.pathsep.join(path)}


def called(stack: str, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command of the stack's environment at the root of the repository."""
    program = str(ENVIRONMENTS / stack / "bin" / command[0])
    environment = surroundings(stack)
    settings: dict[str, Any] = {"capture_output": True, "text": True, "check": False}
    return subprocess.run([program, *command[1:]], cwd=ROOT, env=environment, **settings)


def versions(stack: str) -> dict[str, str]:
    names = (PACKAGES[stack], *LIBRARIES)
    code = f"import json; from importlib.metadata import distributions as d; names = {names!r}; "
    code += "print(json.dumps({x.name: x.version for x in d() if x.name.replace('_', '-') in names}))"
    found: dict[str, str] = json.loads(called(stack, ["python", "-c", code]).stdout)
    return {name.replace("_", "-"): version for name, version in found.items()}


def run(stack: str) -> dict[str, Any]:
    """What came of a stack's example and comparison."""
    example = called(stack, COMMANDS[stack])
    comparison = called(stack, ["python", "-m", "benchmarks.stacks.compare", stack])
    for ended in (example, comparison):
        if ended.returncode:
            print(ended.stdout[-3000:], ended.stderr[-6000:], sep="\n", file=sys.stderr)
    lines = [line for line in comparison.stdout.splitlines() if line.startswith("RESULT ")]
    found = json.loads(lines[-1].removeprefix("RESULT ")) if lines and not comparison.returncode else {}
    return {"versions": versions(stack), "example": not example.returncode, **found}


def works(row: dict[str, Any]) -> bool:
    return bool(row["example"] and row.get("difference", 1.0) <= TOLERANCE < row["penalty"])


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """One row for each stack."""
    head = ["stack", "with", "ran", "example ends well", "difference", "penalty"]
    lines = []
    for stack, name in PACKAGES.items():
        if stack not in rows:
            lines.append([name, "–", "nothing: its source was read", "–", "–", "–"])
            continue
        row = rows[stack]
        others = ", ".join(
            f"{library} {version}" for library, version in row["versions"].items() if library != name
        )
        figures = [f"{row[figure]:.1e}" if figure in row else "–" for figure in ("difference", "penalty")]
        mark = "✓" if row["example"] else "**no**"
        lines.append([f"{name} {row['versions'].get(name, '?')}", others, RAN[stack], mark, *figures])
    return markdown_table(head, lines)


def written(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Write today's result with ``rows``, and those that it has of other stacks; return all."""
    result: Path = todays("stacks")
    if result.with_suffix(".json").exists():
        rows = {**json.loads(result.with_suffix(".json").read_text(encoding="utf-8"))["stacks"], **rows}
    record = stamp()
    origin = f"{record['date']}, commit {record['commit']}, `make stacks`."
    text = "\n\n".join(["# Training stacks", LEGEND, "\n".join(table(rows)), origin])
    write_both(result, {**record, "stacks": rows}, text + "\n")
    return rows


def main(argv: list[str]) -> None:
    """Run the stacks, and write the result.

    Raises:
        SystemExit: a stack fails.
    """
    parser = argparse.ArgumentParser("python -m benchmarks.stacks", description=__doc__.splitlines()[0])
    parser.add_argument("stacks", nargs="*", choices=[*COMMANDS, []], help="default: all")
    stacks = parser.parse_args(argv).stacks or list(COMMANDS)
    called(stacks[0], ["python", "-m", "examples.tiny", "runs/tiny"])
    rows = written({stack: run(stack) for stack in stacks})
    print("\n".join(table(rows)))
    if not all(map(works, rows.values())):
        sys.exit("Some stack fails.")


if __name__ == "__main__":
    main(sys.argv[1:])
