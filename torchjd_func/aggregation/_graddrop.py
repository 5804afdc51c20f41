"""GradDrop: gradient sign dropout.

Z. Chen, J. Ngiam, Y. Huang, T. Luong, H. Kretzschmar, Y. Chai, D. Anguelov, Just Pick a Sign,
NeurIPS 2020, arXiv:2010.06808.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _names, _tree, random
from torchjd_func._names import Vector
from torchjd_func._numbers import Numbers
from torchjd_func._types import Aggregator, PyTree
from torchjd_func.aggregation._rows import by_columns


class GradDropState(NamedTuple):
    """The source of the next signs."""

    key: Tensor  # (2,) int64


def _init(jac: PyTree, key: Tensor | None) -> GradDropState:
    """Keep the key."""
    return GradDropState(_check.key_present("graddrop", key))


def _update(
    jac: PyTree,
    state: GradDropState,
    losses: Tensor | None,
    *,
    leak: Vector | None,
    f: Callable[[Tensor], Tensor] | None,
    present: Tensor | None = None,
) -> tuple[PyTree, GradDropState]:
    """Draw one number for each column, and pick its sign with it; rows of zeros add nothing."""
    _check.state_type("graddrop", state, GradDropState)
    next_key, draw = random.split(state.key)
    leaves, rebuild = _tree.flatten(jac)
    rows = [_tree.rows(leaf) for leaf in leaves]
    sizes = [part.shape[1] for part in rows]
    # One draw over all columns, in every dtype the same: the cut into leaves does not matter.
    uniforms = random.uniform(draw, (builtins.sum(sizes),)).split(sizes)
    pick = partial(_pick_sign, leak=leak, f=f)
    kept = [by_columns(pick, *pair) for pair in zip(rows, uniforms, strict=True)]
    grads = [_tree.row_like(*pair) for pair in zip(kept, leaves, strict=True)]
    return rebuild(grads), GradDropState(next_key)


def _pick_sign(
    rows: Tensor, uniform: Tensor, *, leak: Vector | None, f: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Add up, in each column, the entries of one sign, and the leak of the others."""
    positive, negative = rows.clamp(min=0), rows.clamp(max=0)
    ups, downs = positive.sum(dim=0), negative.sum(dim=0)
    total = ups - downs
    purity = ups / total.clamp(min=torch.finfo(total.dtype).tiny)  # of nothing 0, and adds 0
    up = (purity if f is None else f(purity)) > uniform
    if leak is not None:
        leak = _names.entries("leak", leak, rows)
        ups, downs = (leak @ rows + (1 - leak) @ signed for signed in (positive, negative))
    return torch.where(total < torch.inf, torch.where(up, ups, downs), torch.nan)


def graddrop(
    leak: Numbers | None = None,
    *,
    f: Callable[[Tensor], Tensor] | None = None,
) -> Aggregator:
    r"""Keep, in each coordinate, only the gradients of one sign, drawn at random.

    $$P_k = \frac12 \Big(1 + \frac{\sum_i J_{ik}}{\sum_i |J_{ik}|}\Big), \qquad
    d_k = \sum_i \big(\ell_i + (1 - \ell_i) M_{ik}\big) J_{ik},$$

    where $M_{ik}$ is 1 if $J_{ik}$ has the sign that was drawn: positive if $f(P_k) > U_k$, with
    $U_k$ uniform on $[0, 1)$, else negative. In expectation (with the identity for `f` and one leak
    for all) this is the sum of the gradients. It needs their rows, and may conflict with all of
    them. The state holds the key; `init` needs one. The draw depends on the position of a
    coordinate among all, in leaf order.

    Args:
        leak: `(m,)`, a tensor or list in the order of the losses (of a dict: of their sorted
            names), or a dict by these names, in `[0, 1]`: the share of each gradient that always
            passes. 0 (the default) is full dropout, 1 is the sum.
        f: Increasing function on `[0, 1]`, symmetric about 1/2; the identity by default.

    Returns:
        The Aggregator, without weighting.

    Raises:
        ValueError: If `leak` is not 1-D, not of the number of objectives, or not in `[0, 1]`, or
            there is no key.

    Differs from other implementations:
        The paper and LibMTL drop gradients of activations, with a sign factor; this, like TorchJD,
        takes any Jacobian.
        A column without gradient gives 0, in TorchJD 0/0; a draw equal to `f(P)` picks the negative
        sign, in TorchJD neither.
        Others average instead of adding, or give `leak` the opposite meaning.

    References:
        Z. Chen et al., Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign
        Dropout, NeurIPS 2020, https://arxiv.org/abs/2010.06808

    Example:
        >>> import torch, torchjd_func as jd
        >>> jac = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> rule = jd.graddrop()
        >>> rule(jac, rule.init(jac, key=jd.random.key(0)))[0]
        tensor([-4.,  2.,  2.])
    """
    _check.function("f", f)
    shares = None if leak is None else _check.per_loss("leak", leak, low=0, high=1)
    return Aggregator("graddrop", _init, partial(_update, leak=shares, f=f))
