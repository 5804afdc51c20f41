"""What several processes have to agree on."""

from __future__ import annotations

from typing import Any, NoReturn

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


def same_on_ranks(path: str, rank: int, first: str, other: str) -> None:
    """Check that a rank has what the first one has."""
    if first != other:
        got = f"{first} on rank 0 and {other} on rank {rank}"
        remedy = "Give each rank the same model, losses, key and size of batch."
        fail(ValueError, f"`{path}`", "be the same on all ranks", got, remedy)


def not_a_weighting(combinator: str, value: Any) -> NoReturn:
    """Say why a weighting cannot be run on Gramians of parts of the batch."""
    rule = (
        "be given the whole rule, since the Gramian of the mean Jacobian is not the mean of the "
        "ranks' Gramians: products of rows of different ranks are missing in it"
    )
    remedy = "Pass the Aggregator, e.g. jd.upgrad(), or jd.weighted(weighting)."
    fail(ValueError, f"`{combinator}`", rule, repr(value), remedy)
