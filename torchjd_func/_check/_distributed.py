"""What several processes have to agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor

from torchjd_func._check._messages import describe, fail


def process_group(joined: bool) -> None:
    """Check that this process has joined a group."""
    if not joined:
        remedy = "Start with torchrun, and call torch.distributed.init_process_group()."
        fail(RuntimeError, "this process", "be in a process group", "none", remedy)


def group(value: Any, known: bool) -> None:
    """Check that a value is a group of processes."""
    if not known:
        rule, remedy = (
            "be a process group, or None",
            "Pass what torch.distributed.new_group returns.",
        )
        fail(TypeError, "`group`", rule, describe(value), remedy)


def member(joined: bool) -> None:
    """Check that this process is one of the group."""
    if not joined:
        remedy = "Call it on the processes of the group alone, or pass the group of this one."
        fail(RuntimeError, "this process", "be in `group`", "another group's", remedy)


def collective(name: str, process: int, world: int, error: Exception) -> NoReturn:
    """Say which collective failed, and where."""
    rule, got = f"reach all {world} processes", f"an error on process {process}: {error}"
    remedy = (
        "If another process has ended, or did not come to this collective (it left out a step, or "
        "called another function), see its own output."
    )
    fail(RuntimeError, f"`{name}`", rule, got, remedy)


_REMEDIES = {
    "operations": (
        "Give each process the same parameters; call it eager where these are used in other ways."
    ),
    "order": "Give parameters and losses names, in dicts, which are sorted, or one order.",
    "rule options": "Make the rule with the same options on each process.",
    "names": "Give each process the same losses, in dicts, which are sorted, or in one order.",
    "state": (
        "Start all processes with the same key, or from the same checkpoint, or send them the "
        "state of one: torch.distributed.broadcast(leaf, 0)."
    ),
    "parameters": (
        "Start all processes from the same seed or checkpoint, or send them the parameters of one: "
        "torch.distributed.broadcast(p.data, 0) for all of them."
    ),
    "present": "Pass `present` on all processes, or on none.",
    "size": "Pass `size`, the number of examples, on all processes, or on none.",
    "batch": (
        "Pass size=len(x), the number of examples, on each process; the same number if batches of "
        "another length count alike."
    ),
}


def same_everywhere(path: str, process: int, first: str, other: str) -> None:
    """Check that a process has what the first one has."""
    if first != other:
        got = f"{first} on process 0 and {other} on process {process}"
        same = "Give each process the same model, losses, key and size of batch."
        remedy = _REMEDIES.get(path.partition(".")[0], same)
        fail(ValueError, f"`{path}`", "be the same on all processes", got, remedy)


def spans_once(rule: bool, objective: Any) -> None:
    """Check that not both, a rule and an objective, work over processes."""
    if rule and objective.spans_processes:
        name, remedy = f"the rule for {objective!r}", "Pass the rule itself, such as jd.upgrad()."
        fail(ValueError, name, "be that of one process", "one of jd.distributed", remedy)


def not_over_examples(rule: bool, objective: Any) -> None:
    """Check that no rule averages the losses of single examples over processes."""
    if rule:
        fail(
            ValueError,
            f"the rule for {objective!r}",
            "be that of one process, since example i of one process is not that of another",
            "one of jd.distributed",
            "Pass the rule itself, and jd.distributed.gathered(objective), which counts the "
            "examples of all processes.",
        )


def not_sharded(paths: Sequence[str], leaves: Sequence[Any]) -> None:
    """Check that no parameter of an objective of one process is sharded."""
    for path, leaf in zip(paths, leaves, strict=True):
        if type(leaf) is not Tensor and any(k.__name__ == "DTensor" for k in type(leaf).__mro__):
            name, rule = f"the parameter {path!r}", "be whole for an objective of one process"
            remedy = (
                "Wrap the objective: jd.distributed.sharded(fn), where fn calls a copy of the "
                "module that fully_shard has not touched, with the parameters that it is given."
            )
            fail(ValueError, name, rule, "a DTensor, of which each process has a part", remedy)


def not_a_weighting(combinator: str, value: Any) -> NoReturn:
    """Say why a weighting cannot be run on Gramians of parts of the batch."""
    rule = (
        "be given the whole rule, since the Gramian of the mean Jacobian is not the mean of the "
        "processes' Gramians: products of rows of different processes are missing in it"
    )
    remedy = "Pass the Aggregator, e.g. jd.upgrad(), or jd.weighted(weighting)."
    fail(ValueError, f"`{combinator}`", rule, repr(value), remedy)


def rows_are_here(here: bool) -> None:
    """Check that nobody asks for rows of a Jacobian that are on other processes."""
    if not here:
        name, rule = "the Jacobian of a gathered objective", "not be asked for"
        got = "a request for its rows, those of other processes among them"
        remedy = "Use route='auto' and a rule that has a weighting, or what was gathered."
        fail(ValueError, name, rule, got, remedy)


def at_most(sizes: Sequence[Sequence[int]]) -> None:
    """Check that no process has more examples than are in its batch."""
    for process, (length, size) in enumerate(sizes):
        if size > length:
            rule, got = f"be at most {length}, the examples of the batch", f"{size} on process"
            remedy = "Pass the number of examples of this process, e.g. len(x)."
            fail(ValueError, "`size`", rule, f"{got} {process}", remedy)


def one_mesh(meshes: Sequence[Any]) -> None:
    """Check that there are sharded parameters, all of them on one mesh."""
    if not meshes or any(mesh != meshes[0] for mesh in meshes):
        rule, got = "be DTensors on one mesh", f"{len(set(map(str, meshes)))} meshes"
        remedy = (
            "Pass the parameters of a model after fully_shard(model, mesh=mesh); where "
            "parallelize_module took some of its layers, let it take all."
        )
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
