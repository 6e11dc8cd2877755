"""Every test starts from the same random numbers and precision, whoever ran before it."""

import contextlib
import os
import random

import hypothesis
import numpy
import pytest
import torch

# derandomize: the same examples in every run; no database, so that nothing is left behind on disk.
hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    max_examples=25,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")

# Triton decides on its first import whether its interpreter is going to run kernels: torch.compile must not be first.
# `make gpu` sets TRITON_INTERPRET=0, because the interpreter runs no kernel on a GPU.
with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ImportError):
    patch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "1"))
    import triton.language  # noqa: F401


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # transformers 4.57 leaves it behind


def pytest_collection_modifyitems(items):
    """With ``--dist loadgroup`` each test goes to the next free worker; what shares a fixture of its file stays together."""
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.values()  # doctests have none
        if not item.get_closest_marker("xdist_group") and any(f[-1].scope == "module" for f in fixtures):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
