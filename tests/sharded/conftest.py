"""Ranks that all tests of this folder share: to start processes takes longer than most tests."""

from pathlib import Path

import pytest
from distributed import World


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Keep this folder on one process of pytest-xdist (--dist loadgroup), which holds the ranks."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("ranks"))


def _shared(size):
    @pytest.fixture(scope="session")
    def ranks():
        world = World(size)  # which starts them when it first runs something
        yield world
        world.close()

    return ranks


pair, trio, quad = map(_shared, (2, 3, 4))


@pytest.fixture
def world(request, pair, trio, quad):
    """The ranks of a test that is parametrized by their number."""
    return {2: pair, 3: trio, 4: quad}[request.param]
