"""One loss for each example of a batch that is spread over ranks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from torchjd_func import _check
from torchjd_func.differentiate._instancewise import InstanceWise
from torchjd_func.differentiate._layerwise import Ranks
from torchjd_func.distributed import _collectives
from torchjd_func.distributed._collectives import Group
from torchjd_func.distributed._mean import total


def gathered(objective: InstanceWise, group: Group = None) -> InstanceWise:
    r"""Count the losses of the examples of all ranks, each of which has a part of the batch.

    With `b` examples on each of `W` ranks there are $m = W b$ losses, rank by rank. The Gramian
    `(m, m)`, the losses `(m,)` and the gradients are those of one process with the whole batch, and
    the same on each rank; the rule is a plain one, such as `jd.upgrad()`, with the same state on
    all:

        objective = jd.distributed.gathered(jd.instancewise(losses))
        grads, losses, state = jd.grad_and_value(objective, jd.upgrad())(state, params, x, y)

    The Jacobian does not travel. Each rank multiplies its `b` rows with all `m`, layer by layer:
    it is sent the other ranks' inputs of a layer and the gradients by its outputs, or the rows for
    this layer if these are fewer numbers, as it is for layers without a rule (see
    `jd.explain_gramian`). At the end `(b, m)` of the Gramian are gathered, each rank pulls the
    weights of its own examples back, and the gradients are added up. Numbers that a rank hands to
    collectives, with `n_l` parameters in layer `l`, and `p_l` inputs and `q_l` outputs of an
    example, at all positions: $\sum_l b \min(p_l + q_l, n_l) + b m + b + n$. Compare the Jacobian,
    $b n$, that `jd.distributed.across_workers` deals out for an objective of any kind.

    Args:
        objective: Of `jd.instancewise` or `jd.per_example`; called by itself it returns the losses
            of this rank, as before. All ranks use the same operations on the same parameters.
        group: The ranks; by default all.

    Returns:
        The objective for `jd.gramian`, `jd.gramian_vjp`, `jd.cross_gramian`, `jd.grad`,
        `jd.double_sampling`, their variants, and `jd.init_state`. `aux` stays that of the rank.
        Rows of other ranks are nowhere, so that `jd.jac`, other methods than `"layerwise"`, rules
        that need the rows, scalarizers and `jd.loss_scale` raise.

    Raises:
        TypeError: If `objective` is not instance-wise.
        ValueError: From transforms, on all ranks, if these have batches of different sizes; not in
            a compiled function, whose sizes are fixed. Or if rows are asked for.
        RuntimeError: If another rank has ended, naming this rank and the collective.

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
    ranks = Ranks(
        partial(_collectives.size, group),
        partial(_collectives.rank, group),
        partial(_collectives.all_gather, group=group),
        partial(total, group=group),
        partial(_check_size, group=group),
    )
    return replace(objective, ranks=ranks)


def _check_size(losses: Tensor, group: Group) -> None:
    """Check that all ranks have as many losses, before anything else is exchanged."""
    if not torch.compiler.is_compiling():
        here = torch.tensor(losses.shape, device=losses.device)
        _check.same_batches(_collectives.all_gather(here, group).tolist())
