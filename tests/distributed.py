"""Real processes for distributed tests: one group of ranks over gloo, shared by many cases, each with a hard timeout."""

from __future__ import annotations

import faulthandler
import os
import pathlib
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

CASE_TIMEOUT = 480.0
"""Seconds after which a case counts as hung, and its processes are killed: the first ones wait for a compiler."""
COLLECTIVE_TIMEOUT = 180.0
"""Seconds that a rank waits for the others in a collective: a machine shared with others may stall one for a minute."""


class World:
    """``size`` processes that run the same function and hand back what each rank returned.

    A case that raises on any rank raises here, with that rank's traceback and, if it was slow, where it stood halfway to
    the timeout of a collective. The processes then end, for their connections may be broken; the next case starts new ones.
    """

    def __init__(self, size: int, collective_timeout: float = COLLECTIVE_TIMEOUT) -> None:
        self.size = size
        self._collective_timeout = collective_timeout
        self._ranks: list[tuple[Any, Any]] = []

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = port = free.getsockname()[1]
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
            self.close()
            raise AssertionError("\n".join(failures))
        return [what for _, what in answers]

    def close(self) -> None:
        """End the processes."""
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        if self._ranks:
            remove_shared_memory(self._port)
        self._ranks = []


def remove_shared_memory(port: int) -> None:
    """Remove what DeepSpeed's CPU communication leaves of processes that met at ``port``: 70 MB a rank, in memory."""
    for left in pathlib.Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        left.unlink(missing_ok=True)


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
        with tempfile.TemporaryFile("w+") as halfway:
            faulthandler.dump_traceback_later(collective_timeout / 2, file=halfway)
            try:
                answer = ("returned", case(*args, **kwargs))
            except BaseException:
                halfway.seek(0)
                answer = ("raised", traceback.format_exc() + halfway.read())
            faulthandler.cancel_dump_traceback_later()
        connection.send(answer)
