"""Real processes for distributed tests: one group of ranks over gloo, shared by many cases, each with a hard timeout."""

from __future__ import annotations

import os
import pathlib
import secrets
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection as pipes
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

CASE_TIMEOUT = 840.0
"""Seconds after which a case counts as hung, and its processes are killed: before pytest's own timeout in setup.cfg."""
COLLECTIVE_TIMEOUT = 600.0
"""Seconds that a rank waits for the others in a collective: the first ones may wait for a compiler."""


class World:
    """``size`` processes that run the same function and hand back what each rank returned.

    A case that raises on any rank raises here, with that rank's traceback; so does one that hangs, or whose
    process dies. The processes then end, for their connections may be broken; the next case starts new ones.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranks: list[tuple[Any, Any]] = []

    def _start(self) -> None:
        self._port = port = free_port()
        context = mp.get_context("spawn")
        for rank in range(self.size):
            here, there = context.Pipe()
            process: Any = context.Process(daemon=True, target=_serve, args=(there, rank, self.size, port))
            process.start()
            there.close()
            self._ranks.append((process, here))

    def run(self, case: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """``case(*args, **kwargs)`` on every rank; ``case`` is a function at the top level of a module."""
        if not self._ranks:
            self._start()
        for _, connection in self._ranks:
            connection.send((case, args, kwargs))
        deadline = time.monotonic() + CASE_TIMEOUT
        answers = [self._answer(rank, deadline) for rank in range(self.size)]
        failures = [f"rank {rank} {how}:\n{what}" for rank, (how, what) in enumerate(answers) if how != "returned"]
        if failures:
            self.close()
            raise AssertionError("\n".join(failures))
        return [what for _, what in answers]

    def _answer(self, rank: int, deadline: float) -> Any:
        """What ``rank`` sends; without an answer by the deadline, or soon after the death of any rank, why there is none."""
        connection, sentinels = self._ranks[rank][1], [process.sentinel for process, _ in self._ranks]
        ready = pipes.wait([connection, *sentinels], max(0.0, deadline - time.monotonic()))
        if connection not in ready and not connection.poll(5.0 if ready else 0.0):
            return ("gave no answer", "a process ended" if ready else "it hangs")
        try:
            return connection.recv()
        except EOFError:
            return ("died", "the process ended")

    def close(self) -> None:
        """End the processes."""
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        if self._ranks:
            remove_shared_memory(self._port)
        self._ranks = []


def free_port() -> int:
    """A port below those that the system gives to outgoing connections, one of which could take it before it is used."""
    while True:
        port = 20_000 + secrets.randbelow(9_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def remove_shared_memory(port: int) -> None:
    """Remove what DeepSpeed's CPU communication leaves of processes that met at ``port``: 70 MB a rank, in memory."""
    for left in pathlib.Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        left.unlink(missing_ok=True)


def _serve(connection: Any, rank: int, size: int, port: int) -> None:
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
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT)
    dist.distributed_c10d.default_pg_timeout = timeout  # of groups that DeepSpeed makes
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timeout)
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
