"""A group of checks for the runner in ``benchmarks/cost/gpu_checks.py``: one of each outcome."""

import os
from contextlib import nullcontext

from benchmarks.cost.gpu_checks import Skip, expect


def right(device):
    return str(device)


def wrong(device):
    expect(device.type == "cuda", "a weight | moved")


def crash(_device):
    print("a last word", flush=True)
    os._exit(3)


def absent(_device):
    raise Skip("a package is not installed here")


def surroundings(_device):
    return nullcontext()


CHECKS = {"right": right, "wrong": wrong, "crash": crash, "absent": absent}
