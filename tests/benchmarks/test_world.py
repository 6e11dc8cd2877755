"""The processes that other tests run on: a failure on one rank is told, and the next case starts afresh."""

import os

import pytest
import torch
import torch.distributed as dist
from distributed import World


def total():
    value = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(value)
    return float(value)


def wrong_on_one_rank(how):
    if dist.get_rank() == 1:
        if how == "dies":
            os._exit(1)
        raise KeyError(how)
    return total() if how == "dies" else "fine"


HOW = {"raises": "(?s)rank 1 raised.*KeyError", "dies": r"rank 1 (died|gave no answer)"}


def test_one_rank_fails():
    """The others, whose collective will not end, are not waited for; the next case starts new processes."""
    world = World(2)
    try:
        for how, words in HOW.items():
            with pytest.raises(AssertionError, match=words) as failure:
                world.run(wrong_on_one_rank, how)
            assert "it hangs" not in str(failure.value)
        assert world.run(total) == [3.0, 3.0]
    finally:
        world.close()
