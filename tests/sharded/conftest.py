"""Ranks that the tests of a file share: to start processes takes longer than most tests."""

import pytest
from distributed import World


@pytest.fixture(scope="module")
def pair():
    started = World(2)
    yield started
    started.close()
