"""Rules on the gradients of the logarithms of the losses.

S. Chennupati et al. (geometric loss strategy, arXiv:1904.08492) and B. Lin et al. (DB-MTL,
arXiv:2308.12029) train on logarithms; here for any rule.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from torchjd_func import _check, _present, _tree
from torchjd_func._types import Aggregator, PyTree, State, Weighting
from torchjd_func.aggregation._rows import slope_of_log
from torchjd_func.combinators._through_weighting import Rule, through_weighting


def _update(
    statistic: Tensor,
    state: State,
    losses: Tensor | None,
    *,
    inner: Weighting,
    present: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Weigh scaled rows; what multiplies them multiplies their weights."""
    scale = _scale(_name(inner), losses)
    seen = statistic
    if inner.needs != "size":
        seen = (statistic * (scale.unsqueeze(-1) * scale)).to(statistic.dtype)
    weights, state = _present.update(inner, seen, state, losses, present=present)
    return weights * scale, state


def _update_rows(
    jac: PyTree,
    state: State,
    losses: Tensor | None,
    *,
    inner: Aggregator,
    present: Tensor | None = None,
) -> tuple[PyTree, State]:
    """Aggregate scaled rows."""
    scale = _scale(_name(inner), losses)
    scaled = _tree.map(lambda leaf: leaf * _tree.per_row(scale, leaf).to(leaf.real.dtype), jac)
    return _present.update(inner, scaled, state, losses, present=present)


def _scale(name: str, losses: Tensor | None) -> Tensor:
    """Return what multiplies each row."""
    values = _check.losses_present(name, losses)
    return slope_of_log(values)


def _name(inner: Weighting | Aggregator) -> str:
    """Return the name of the combination."""
    return f"log_losses({inner.name})"


def _wrap(inner: Weighting) -> Weighting:
    """Return the Weighting of scaled rows."""
    update = partial(_update, inner=inner)
    return Weighting(_name(inner), inner.init_fn, update, inner.needs, inner.widen, inner.robust)


def log_losses(rule: Rule) -> Rule:
    r"""Give a rule the gradients of the logarithms of the losses.

    $$\nabla \log L_i = g_i / L_i,$$

    so that what counts is how much a loss changes relative to its value, and a loss that is
    multiplied by a constant changes nothing. `jd.log_losses(jd.mean())` descends on the geometric
    mean of the losses; with a rule that never conflicts no loss gets worse either. Losses have to
    be positive: where one is not, the result is not-a-number. In `jd.multitask` the heads keep the
    gradients of their own losses. The state is that of `rule`.

    Args:
        rule: A Weighting, or an Aggregator.

    Returns:
        A rule of the type of `rule`, that needs `losses=`.

    Raises:
        TypeError: If `rule` is neither a Weighting nor an Aggregator.
        ValueError: If losses are missing.

    Differs from other implementations:
        `jd.db_mtl` and the authors of MTLlib, who offer it for MGDA, CAGrad and IMTL-G, add 1e-8 to
        the losses.

    References:
        B. Lin et al., Dual-Balancing for Multi-Task Learning, 2023,
        https://arxiv.org/abs/2308.12029. S. Chennupati, G. Sistu, S. Yogamani, S. Rawashdeh,
        MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task
        Learning, 2019, https://arxiv.org/abs/1904.08492

    Example:
        >>> import torch, torchjd_func as jd
        >>> rows, losses = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([1.0, 2.0])
        >>> jd.log_losses(jd.mean())(rows, losses=losses)[0]
        tensor([1.0000, 0.7500])
    """
    _check.combinable("log_losses", rule, (Weighting, Aggregator))
    if isinstance(rule, Weighting) or rule.weighting is not None:
        return through_weighting("log_losses", rule, _wrap)
    update = partial(_update_rows, inner=rule)
    return Aggregator(_name(rule), rule.init_fn, update, columnwise=rule.columnwise)
