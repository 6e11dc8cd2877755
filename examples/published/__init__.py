"""The published experiments: GRPO against a learned reward model and an LLM judge, and evaluation."""

import sys
from importlib.util import find_spec

for _package in ("trl", "matplotlib", "rich", "tqdm"):
    if find_spec(_package) is None:
        sys.exit(f"The package {_package!r} is not installed. The examples need pip install -e '.[demo]'")
