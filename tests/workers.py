"""Processes that run a function as the ranks of one gloo group, on this machine.

    outcomes = workers.run(4, fn, *args)    # fn of a module, called as fn(*args) on each rank

The processes of a world size are started once and serve all cases; `workers.crew` starts some that
a test may kill. They find each other by a file, talk over loopback on ports that the system picks,
and end when the tests do.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

PATIENCE = 300.0  # seconds for one case
# One process imports torch, and all workers are forks of it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.conftest", "torchjd_func.distributed", "torch._dynamo"])


class Failure(NamedTuple):
    """What a rank raised, in place of a result."""

    kind: str  # the name of the class
    message: str
    trace: str


class Crew:
    """The processes of one group."""

    def __init__(self, world: int, timeout: float = PATIENCE):
        self.folder = tempfile.TemporaryDirectory(prefix="workers")
        store = os.path.join(self.folder.name, "store")
        pairs = [CONTEXT.Pipe() for _ in range(world)]
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [
            CONTEXT.Process(target=_serve, args=(theirs, store, rank, world, timeout), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process, (_, theirs) in zip(self.processes, pairs, strict=True):
            process.start()
            theirs.close()

    def outcomes(self, fn: Callable[..., Any], *args: Any, patience: float = PATIENCE) -> list[Any]:
        """Return the result of each rank, or its `Failure`; of a rank that is gone, `None`."""
        self.send(fn, *args)
        return self.receive(patience)

    def send(self, fn: Callable[..., Any], *args: Any) -> None:
        """Start a case on all ranks."""
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((fn, args)))

    def receive(self, patience: float = PATIENCE) -> list[Any]:
        """Wait for all ranks."""
        end = time.monotonic() + patience
        return [self.answer(rank, end - time.monotonic()) for rank in range(len(self.pipes))]

    def answer(self, rank: int, patience: float = PATIENCE) -> Any:
        """Wait for one rank."""
        if not self.pipes[rank].poll(max(0.0, patience)):
            self.close()
            raise TimeoutError(f"rank {rank} of {len(self.pipes)} did not answer in time")
        with contextlib.suppress(EOFError, ConnectionResetError):
            return pickle.loads(self.pipes[rank].recv_bytes())

    def kill(self, rank: int) -> None:
        """End a process, without giving it notice."""
        self.processes[rank].kill()
        self.processes[rank].join()

    def close(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.folder.cleanup()


@contextlib.contextmanager
def crew(world: int, timeout: float = PATIENCE) -> Generator[Crew]:
    """Start a group for one test; `timeout` in seconds is that of its collectives."""
    own = Crew(world, timeout)
    try:
        yield own
    finally:
        own.close()


def outcomes(world: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Return the result of each rank, or its `Failure`."""
    try:
        return _shared(world).outcomes(fn, *args)
    except TimeoutError:
        _shared.cache_clear()  # for the next test, another crew
        raise


def run(world: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Return the result of each rank; fail if one has none."""
    results = outcomes(world, fn, *args)
    for rank, result in enumerate(results):
        trace = result.trace if isinstance(result, Failure) else ""
        assert not trace, f"rank {rank} of {world}:\n{trace}"
    return results


@functools.cache
def _shared(world: int) -> Crew:
    """Start the group that all cases of one world size share."""
    own = Crew(world)
    atexit.register(own.close)
    return own


def _serve(pipe: Connection, store: str, rank: int, world: int, timeout: float) -> None:
    """Join the group, and answer until the pipe is closed."""
    import torch
    import torch.distributed as dist

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tests end this process
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    limit = datetime.timedelta(seconds=timeout)
    file = f"file://{store}"
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=world, timeout=limit)
    with contextlib.suppress(EOFError):
        while True:
            fn, args = pickle.loads(pipe.recv_bytes())
            pipe.send_bytes(pickle.dumps(_attempt(fn, args)))


def _attempt(fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Return what `fn` returns, or how it failed."""
    try:
        return fn(*args)
    except Exception as error:
        return Failure(type(error).__name__, str(error), traceback.format_exc())
