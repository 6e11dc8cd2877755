"""Every test starts from the same random numbers, whoever ran before it."""

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


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
