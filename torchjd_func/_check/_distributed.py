"""What several processes have to agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torchjd_func._check._messages import fail


def process_group(joined: bool) -> None:
    """Check that this process has joined a group."""
    if not joined:
        remedy = "Start with torchrun, and call torch.distributed.init_process_group()."
        fail(RuntimeError, "this process", "be in a process group", "none", remedy)


def member(joined: bool) -> None:
    """Check that this process is one of the group."""
    if not joined:
        remedy = "Call it on the processes of the group alone, or pass the group of this one."
        fail(RuntimeError, "this process", "be in `group`", "another group's", remedy)


def collective(name: str, rank: int, world: int, error: Exception) -> NoReturn:
    """Say which collective failed, and where."""
    rule, got = f"reach all {world} ranks", f"an error on rank {rank}: {error}"
    remedy = "If another rank has ended, or did not come to this collective, see its own output."
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


def rows_are_here(here: bool) -> None:
    """Check that nobody asks for rows of a Jacobian that are on other ranks."""
    if not here:
        name, rule = "the Jacobian of a gathered objective", "not be asked for"
        got = "a request for its rows, those of other ranks among them"
        remedy = "Use route='auto' and a rule that has a weighting, or what was gathered."
        fail(ValueError, name, rule, got, remedy)


def same_batches(sizes: Sequence[int]) -> None:
    """Check that all ranks have as many examples."""
    if len(set(sizes)) > 1:
        name, rule = "the batches of a gathered objective", "have one size on all ranks"
        fail(ValueError, name, rule, list(sizes), "Drop or share out the last examples.")


def not_gathered(option: str, gathered: bool) -> None:
    """Check that an option is given an objective whose losses are all here."""
    if gathered:
        rule, remedy = "be used with an objective of one rank", "Leave out jd.distributed.gathered."
        fail(TypeError, f"`{option}`", rule, "one of jd.distributed.gathered", remedy)


def one_mesh(meshes: Sequence[Any]) -> None:
    """Check that there are sharded parameters, all of them on one mesh."""
    if not meshes or any(mesh != meshes[0] for mesh in meshes):
        rule, got = "be DTensors on one mesh", f"{len(set(map(str, meshes)))} meshes"
        remedy = "Pass the parameters of a model after fully_shard(model, mesh=mesh)."
        fail(ValueError, "the parameters of a sharded objective", rule, got, remedy)


def placements(value: Any, known: bool) -> None:
    """Check that a parameter is sharded in a way that columns can be told apart in."""
    if not known:
        name, rule = "the placements of a sharded parameter", "be Shard or Replicate"
        fail(ValueError, name, rule, value, "Call its .redistribute(placements=[...]) first.")


def shards_route(route: str) -> None:
    """Check that the gradients of a sharded objective are asked for row by row."""
    if route not in ("auto", "jacobian"):
        rule, remedy = "be 'auto' or 'jacobian' for a sharded objective", "Set chunk_size."
        fail(ValueError, "`route`", rule, repr(route), remedy)
