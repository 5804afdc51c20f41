"""What several processes have to agree on."""

from __future__ import annotations

from typing import NoReturn

from torchjd_func._check._messages import fail


def process_group(joined: bool) -> None:
    """Check that this process has joined a group."""
    if not joined:
        remedy = "Start with torchrun, and call torch.distributed.init_process_group()."
        fail(RuntimeError, "this process", "be in a process group", "none", remedy)


def collective(name: str, rank: int, world: int, error: Exception) -> NoReturn:
    """Say which collective failed, and where."""
    rule, got = f"reach all {world} ranks", f"an error on rank {rank}: {error}"
    remedy = "Another rank has ended, or did not come to this collective: see its own output."
    fail(RuntimeError, f"`{name}`", rule, got, remedy)
