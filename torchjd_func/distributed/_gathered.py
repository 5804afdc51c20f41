"""One loss for each example of a batch that is spread over processes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torchjd_func import _check
from torchjd_func.differentiate._instancewise import InstanceWise
from torchjd_func.differentiate._layerwise import Ranks
from torchjd_func.distributed import _collectives, _handshake
from torchjd_func.distributed._collectives import Group
from torchjd_func.distributed._mean import total


def gathered(objective: InstanceWise, group: Group = None, *, check: bool = True) -> InstanceWise:
    r"""Count the losses of the examples of all processes, each of which has a part of the batch.

    With $b_r$ examples on process $r$ there are $m = \sum_r b_r$ losses, process by process. The
    Gramian `(m, m)`, the losses `(m,)` and the gradients are those of one process with the whole
    batch, and the same on each process; the rule is a plain one, such as `jd.upgrad()`, with the
    same state on all:

        objective = jd.distributed.gathered(jd.instancewise(losses))
        step = jd.grad_and_value(objective, jd.upgrad())
        grads, losses, state = step(state, params, x, y, size=len(x))

    `size` may be left out where batches have one length. Of longer ones the first `size` examples
    count, and the others are absent: so batches that are filled up to one length compile. Batches
    of several lengths, 0 among them, are filled up before they run, and what was added is left out
    of all results; not in a compiled function, for which another length is an error.

    The Jacobian does not travel. Each process multiplies its `b` rows with all `m`, layer by layer:
    it is sent the other processes' inputs of a layer and the gradients by its outputs, or the rows
    for this layer if these are fewer numbers, as it is for layers without a rule (see
    `jd.explain_gramian`). At the end `(b, m)` of the Gramian are gathered, each process pulls the
    weights of its own examples back, and the gradients are added up. Numbers that a process hands
    to collectives, with `n_l` parameters in layer `l`, and `p_l` inputs and `q_l` outputs of an
    example, at all positions: $\sum_l b \min(p_l + q_l, n_l) + b m + b + n$. Compare the Jacobian,
    $b n$, that `jd.distributed.across_workers` deals out for an objective of any kind.

    Args:
        objective: Of `jd.instancewise` or `jd.per_example`; called by itself it returns the losses
            of this process, as before. Where the data decide, processes may use parameters in
            different ways, not in a compiled function; rows of these travel, and not factors.
        group: The processes; by default all.
        check: Whether each call compares, by a small all-gather, the lengths of the batches and
            whether there is `present` or `size`, and the state, and by a small all-reduce how
            parameters are used; at the start, parameters. Without it all batches must have one
            length, and operations must be the same.

    Returns:
        The objective for `jd.gramian`, `jd.gramian_vjp`, `jd.cross_gramian`, `jd.grad`,
        `jd.double_sampling`, their variants, and `jd.init_state`, on all processes. `aux` stays
        that of the process. Rows of other processes are nowhere, so that `jd.jac`, other methods
        than `"layerwise"`, and rules that need the rows raise.

    Raises:
        TypeError: If `objective` is not instance-wise.
        ValueError: From transforms, on all processes, if these have batches of different lengths
            and no `size`. Or if rows are asked for.
        RuntimeError: If another process has ended, or does not come within the time-out of the
            group, naming this process and the collective.

    Example:
        >>> import torch, torchjd_func as jd, torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> losses = jd.instancewise(lambda w, x: (x @ w).square())
        >>> jd.gramian(jd.distributed.gathered(losses))(torch.ones(2), torch.eye(2))
        tensor([[4., 0.],
                [0., 4.]])
        >>> dist.destroy_process_group()
    """
    if not isinstance(objective, InstanceWise):
        remedy = "Declare it with jd.instancewise or jd.per_example, or use across_workers."
        name, got = "the objective of `gathered`", _check.describe(objective)
        _check.fail(TypeError, name, "be instance-wise", got, remedy)
    _collectives.valid(group)
    _check.flag("check", check)
    ranks = Ranks(
        partial(_collectives.size, group),
        partial(_collectives.rank, group),
        partial(_collectives.all_gather, group=group),
        partial(total, group=group),
        partial(_handshake.numbers_of_all, groups=(group,)) if check else None,
        agree=partial(_handshake.agreed, groups=(group,), check=check),
        differ=partial(_handshake.differing, groups=(group,)) if check else None,
    )
    return replace(objective, ranks=ranks)
