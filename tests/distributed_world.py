"""A few processes on gloo that run functions side by side, for the tests of longattn.distributed."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 400.0  # seconds, for a machine that is busy or stopped for a while


# Loaded once, by the process that the others are forked from.
PRELOADED = (
    "longattn.distributed",
    "longattn.training",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
)


class World:
    """Processes that share a process group; started once, for many calls. A context manager that ends them.

    Args:
        size: how many.
        timeout: of the group, in seconds.
    """

    def __init__(self, size: int, timeout: float = PATIENCE) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            store = Path(self._folder.name) / "store"
            process = context.Process(target=_serve, args=(rank, size, str(store), timeout, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(rank, *args) on every rank: what each returned.

        Raises:
            AssertionError: it raised on some rank; the tracebacks are in the message.
        """
        answers = self.outcomes(function, *args)
        faults = [f"rank {rank}: {answer}" for rank, (good, answer) in enumerate(answers) if not good]
        assert not faults, "\n".join(faults)
        return [answer for _, answer in answers]

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        """As `run`, but with the ranks' failures: (True, what it returned), or (False, a traceback, or "ended")."""
        for pipe in self._pipes:
            pipe.send((function, args))
        found: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + PATIENCE
        while len(found) < self.size:
            open_pipes = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in found}
            ready = wait(list(open_pipes), timeout=max(0.0, deadline - time.monotonic()))
            assert ready, f"no answer from ranks {sorted(open_pipes.values())} within {PATIENCE} s"
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    found[open_pipes[pipe]] = pipe.recv()
                except EOFError:
                    found[open_pipes[pipe]] = (False, "ended")
        return [found[rank] for rank in range(self.size)]


def _serve(rank: int, size: int, store: str, timeout: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            os._exit(0)  # no farewell between processes, some of which may be gone
        try:
            torch.manual_seed(0)
            pipe.send((True, function(rank, *args)))
        except BaseException:  # noqa: B036 - whatever it was, the test shall say it
            pipe.send((False, traceback.format_exc()))
