"""Parameters that are sharded over processes (FSDP2), each of which has a part of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func._shares import Shares, Size, shares_of
from torchjd_func._types import Aggregator, PyTree, State
from torchjd_func.differentiate._instancewise import InstanceWise
from torchjd_func.differentiate._layerwise import Ranks
from torchjd_func.differentiate._linearized import Contraction
from torchjd_func.differentiate._objective import Plain, as_objective
from torchjd_func.differentiate._sharded import Parts, Sharded
from torchjd_func.distributed import _handshake, _mesh
from torchjd_func.distributed._mesh import Place


def sharded(objective: Callable[..., Any], *, check: bool = True) -> Sharded:
    r"""Differentiate an objective by parameters that are sharded, such as those of FSDP2.

    Parameters are `DTensor`s, as after `torch.distributed.fsdp.fully_shard`, after
    `parallelize_module` for tensor parallelism, or both, of any placements `Shard` and `Replicate`
    on one mesh, of one or more dimensions. Losses are means over the part
    of the batch that a process has, and the rule is a plain one:

        objective = jd.distributed.sharded(losses)  # losses(params, *part_of_batch), whole params
        params = dict(model.named_parameters())  # DTensors
        step = jd.grad_and_value(objective, jd.upgrad())
        grads, losses, state = step(state, params, x, y, size=len(x))

    All is as in one process with the whole batch; gradients have the placements of the parameters.
    `size` and `present` are as for `jd.distributed.data_parallel`. Whole parameters are there
    during the forward and the backward pass of a process, and at the end of the latter `chunk_size`
    whole rows (by default `m`), which are scattered leaf by leaf: of the Jacobian a process keeps
    `m n / W` numbers. It contracts them, and `(m, m)` is added up over processes, replicas counted
    once: `(m + 1) n' + m^2 + m` numbers that a process hands to collectives, with `n'` the sum over
    leaves of their numbers, rounded up to parts of one length; with replicas, all-reduces of the
    parts more. The step compiles with `fullgraph=True`.

    For an objective of `jd.instancewise` the losses are those of the examples of all processes, as
    for `jd.distributed.gathered`: activations travel, and rows are nowhere.

    `objective` calls a module without hooks: `torch.func.functional_call(skeleton, params, (x,))`
    with a copy that `fully_shard` has not touched, on the device `"meta"` say. What that copy needs
    and is not passed has no numbers there, and is an error: buffers, and weights that `.to("meta")`
    has untied.

    Args:
        objective: `fn(params, *args)` of whole parameters, as plain tensors, and of the part of the
            batch: a plain function, or one of `jd.instancewise` or `jd.per_example`. To accumulate,
            wrap the result: `jd.accumulate(jd.distributed.sharded(fn), n)`.
        check: As for `jd.distributed.data_parallel`.

    Returns:
        The objective for `jd.jac` (rows as `DTensor`s), `jd.gramian`, `jd.gramian_vjp`, `jd.grad`,
        their variants and `jd.init_state`, with `route="auto"` or `"jacobian"`. Losses are means
        over processes; `aux` stays that of the process. `jd.trimmed_mean` works on the columns of a
        process; for other rules that need the rows, these are gathered on each, in the state too.

    Raises:
        TypeError: If `objective` has another structure, such as that of `jd.multitask`.
        ValueError: From transforms, if a parameter is placed in another way, on several meshes, or
            none is a `DTensor`; if another route is asked for; or, on all processes, if these
            differ in the number of losses, the lengths of their batches without `size`, or options.
        RuntimeError: If this process is outside the mesh; or another has ended, or does not come
            within the time-out of the group, naming this process and the collective.

    Example:
        >>> import torch, torchjd_func as jd, torch.distributed as dist
        >>> from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> w = distribute_tensor(torch.ones(2), init_device_mesh("cpu", (1,)), [Shard(0)])
        >>> objective = jd.distributed.sharded(lambda w: (w.sum(), w[0] - 2 * w[1]))
        >>> jd.grad(objective, jd.upgrad())(None, w)[0].to_local()
        tensor([ 1.3500, -0.4500])
        >>> dist.destroy_process_group()
    """
    _check.flag("check", check)
    inner = as_objective(objective)
    alone = isinstance(inner, InstanceWise) and inner.ranks is None
    if not (alone or isinstance(inner, Plain)):
        remedy = "Wrap the sharded objective: jd.accumulate(jd.distributed.sharded(fn), n)."
        name = "the objective of `jd.distributed.sharded`"
        rule = "be a plain function, or one of jd.instancewise or jd.per_example"
        _check.fail(TypeError, name, rule, repr(objective), remedy)
    return Sharded(inner, partial(_parts, check=check), _gathered, _mesh.whole_like)


def _parts(leaves: list[Tensor], check: bool) -> Parts:
    """Return what this process keeps, and how it works with the others."""
    return _parts_at(_mesh.places_of(leaves), [_mesh.is_sharded(leaf) for leaf in leaves], check)


def _parts_at(places: list[Place], kept: list[bool], check: bool) -> Parts:
    """Return what this process keeps of leaves at some places."""

    def some(chosen: Sequence[int]) -> Parts:
        """Return the same for some of the leaves."""
        return _parts_at([places[i] for i in chosen], [kept[i] for i in chosen], check)

    mesh = places[0].mesh
    return Parts(
        partial(_mesh.scatter, places=places),
        partial(_mesh.wrap, places=places, kept=kept),
        partial(_mean, mesh=mesh),
        partial(_shares, mesh=mesh),
        partial(_agree, mesh=mesh, check=check),
        _ranks(places, check),
        partial(_contract, places=places),
        partial(_by_rows, places=places),
        some,
    )


def _gathered(leaves: list[Tensor]) -> list[Tensor]:
    """Return the leaves, whole."""
    return _mesh.each(
        _mesh.gather, [_mesh.local(leaf.detach()) for leaf in leaves], _mesh.places_of(leaves)
    )


def _mean(losses: Tensor, mesh: Any) -> Tensor:
    """Return the mean over all processes of a mesh."""
    return _mesh.total(losses.detach() / mesh.size(), mesh)


def _shares(losses: Tensor, present: Tensor | None, size: Size, *, mesh: Any) -> Shares:
    """Return what this process has of each loss."""
    return shares_of(losses, present, size, mesh.size(), partial(_mesh.total, mesh=mesh))


def _ranks(places: list[Place], check: bool) -> Ranks:
    """Return who has the other examples, counted in the order of the mesh."""
    mesh = places[0].mesh
    groups = _mesh.groups(mesh)
    return Ranks(
        mesh.size,
        partial(_mesh.number, mesh),
        partial(_mesh.all_of, mesh=mesh),
        partial(_mesh.scatter_sums, places=places),
        partial(_handshake.numbers_of_all, groups=groups) if check else None,
        agree=partial(_handshake.agreed, groups=groups, check=check),
        differ=partial(_handshake.differing, groups=groups) if check else None,
    )


def _agree(step: PyTree, *, mesh: Any, check: bool) -> _handshake.Agreed:
    """Check that a step is the same on all processes of a mesh."""
    named = {"rule": "jd.distributed.sharded", **step}
    return _handshake.agreed(named, _mesh.groups(mesh), check)


def _contract(
    route: Contraction, groups: _tree.Groups, places: list[Place]
) -> tuple[Tensor, Callable[[Tensor], PyTree]]:
    """Add up what processes contract of their parts; leaves with as many copies are a group."""
    copies = [_mesh.copies(place) for place in places]
    split = [
        (owner, tuple(i for i in group if copies[i] == count), count)
        for owner, group in enumerate(groups)
        for count in sorted({copies[i] for i in group})
    ]
    matrices, pullback = route(tuple(leaves for _, leaves, _ in split))
    shares = torch.stack([x / count for x, (_, _, count) in zip(matrices, split, strict=True)])
    owners = torch.tensor([owner for owner, _, _ in split], device=shares.device)
    sums = shares.new_zeros(len(groups), *shares.shape[1:]).index_add(0, owners, shares)
    return _mesh.total(sums, places[0].mesh), lambda weights: pullback(weights[owners])


def _by_rows(rule: Aggregator, places: list[Place]) -> Callable[..., tuple[PyTree, Any]]:
    """Return a rule that needs the rows, for rows that are spread over processes."""
    return partial(_aggregate, rule=rule, places=places)


def _aggregate(
    jac: PyTree,
    state: State,
    *,
    losses: Tensor,
    rule: Aggregator,
    places: list[Place],
    present: Tensor | None = None,
) -> tuple[PyTree, State]:
    """Aggregate the columns of this process, if the rule takes columns; else whole rows."""
    flat, rebuild = _tree.flatten(jac)
    rows = [_mesh.local(leaf) for leaf in flat]
    if rule.columnwise:
        grads, state = rule(rows, state, losses=losses, present=present)
    else:
        whole = _mesh.each(_mesh.gather, rows, places)
        grads, state = rule(rebuild(whole), state, losses=losses, present=present)
        grads = _mesh.each(_mesh.own_part, _tree.leaves(grads), places)
    return rebuild(_mesh.wrap(grads, places, [_mesh.is_sharded(leaf) for leaf in flat])), state
