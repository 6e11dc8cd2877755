"""Real processes for distributed tests: one group of ranks over gloo, shared by many cases, each with a hard timeout."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

CASE_TIMEOUT = 240.0
"""Seconds after which a case counts as hung, and its processes are killed: the first ones wait for a compiler."""


class World:
    """``size`` processes that run the same function and hand back what each rank returned.

    A case that raises on any rank raises here, with that rank's traceback. A case that hangs, or leaves a rank that no
    longer answers, ends all processes; the next case starts new ones.
    """

    def __init__(self, size: int, collective_timeout: float = 60.0) -> None:
        self.size = size
        self._collective_timeout = collective_timeout
        self._ranks: list[tuple[Any, Any]] = []

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = mp.get_context("spawn")
        for rank in range(self.size):
            here, there = context.Pipe()
            process: Any = context.Process(
                daemon=True, target=_serve, args=(there, rank, self.size, port, self._collective_timeout)
            )
            process.start()
            there.close()
            self._ranks.append((process, here))

    def run(self, case: Callable[..., Any], *args: Any, timeout: float = CASE_TIMEOUT, **kwargs: Any) -> list[Any]:
        """``case(*args, **kwargs)`` on every rank; ``case`` is a function at the top level of a module."""
        if not self._ranks:
            self._start()
        for _, connection in self._ranks:
            connection.send((case, args, kwargs))
        answers: list[Any] = []
        for _, connection in self._ranks:
            try:
                answered = connection.poll(timeout)
                answers.append(connection.recv() if answered else ("hung", f"no answer within {timeout} s"))
            except EOFError:
                answers.append(("died", "the process ended"))
            if answers[-1][0] in ("hung", "died"):
                timeout = 1.0
        failures = [f"rank {rank} {how}:\n{what}" for rank, (how, what) in enumerate(answers) if how != "returned"]
        if failures:
            if not all(how == "raised" for how, _ in answers):  # else all are waiting for the next case
                self.close()
            raise AssertionError("\n".join(failures))
        return [what for _, what in answers]

    def close(self) -> None:
        """End the processes."""
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        self._ranks = []


def _serve(connection: Any, rank: int, size: int, port: int, collective_timeout: float) -> None:
    """One rank: run what arrives until the other end closes."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "LOCAL_SIZE": str(size),
        "WORLD_SIZE": str(size),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    dist.distributed_c10d.default_pg_timeout = timedelta(seconds=collective_timeout)  # of groups that DeepSpeed makes
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=collective_timeout))
    while True:
        try:
            case, args, kwargs = connection.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = ("returned", case(*args, **kwargs))
        except BaseException:
            answer = ("raised", traceback.format_exc())
        connection.send(answer)
