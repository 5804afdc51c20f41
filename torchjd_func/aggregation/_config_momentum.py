"""M-ConFIG: ConFIG on the momenta of the gradients, one of which is renewed at a time.

Q. Liu, M. Chu, N. Thuerey, ConFIG: Towards Conflict-free Training of Physics Informed Neural
Networks, ICLR 2025, arXiv:2408.11104, algorithm 1.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchjd_func import _check, _present, _tree
from torchjd_func._numbers import Numbers
from torchjd_func._types import Aggregator, PyTree
from torchjd_func.aggregation._config import config


class ConfigMomentumState(NamedTuple):
    """Momenta of the gradients, and moments of the direction; in float32 or better."""

    step: Tensor  # () int64, calls so far
    visits: Tensor  # (m,) int64, how often each row was read
    updates: Tensor  # () int64, calls that gave a direction
    momenta: PyTree  # (m, ...)
    first: PyTree  # (...), of the direction, biased towards 0 like a momentum
    second: PyTree  # (...), of the gradients that would have had this first moment


def _init(jac: PyTree, key: Tensor | None) -> ConfigMomentumState:
    """Start from zeros."""
    first_leaf = _tree.leaves(jac)[0]
    return ConfigMomentumState(
        step=first_leaf.new_zeros((), dtype=torch.int64),
        visits=first_leaf.new_zeros(first_leaf.shape[:1], dtype=torch.int64),
        updates=first_leaf.new_zeros((), dtype=torch.int64),
        momenta=_tree.map(lambda leaf: leaf.new_zeros(leaf.shape, dtype=_wide(leaf)), jac),
        first=_tree.map(lambda leaf: leaf.new_zeros(leaf.shape[1:], dtype=_wide(leaf)), jac),
        second=_tree.map(
            lambda leaf: leaf.new_zeros(leaf.shape[1:], dtype=_tree.accumulation_dtype(leaf.dtype)),
            jac,
        ),
    )


def _update(
    jac: PyTree,
    state: ConfigMomentumState,
    losses: Tensor | None,
    *,
    direction: Aggregator,
    visit: str,
    beta_1: float | Tensor,
    beta_2: float | Tensor,
    eps: float,
    present: Tensor | None = None,
) -> tuple[PyTree, ConfigMomentumState]:
    """Renew momenta, combine them by ConFIG, divide by the root of the second moment."""
    _check_state(state, jac)
    read = _rows_to_read(state, visit, present)
    visits = state.visits + read.to(torch.int64)
    ready = _present.only(present, visits > 0, True).all()
    updates = state.updates + ready.to(torch.int64)

    momenta = _tree.map(partial(_renew, read=read, beta=beta_1), state.momenta, jac)
    unbiased = _tree.map(partial(_unbias, count=visits, beta=beta_1), momenta)
    combined, _ = direction(unbiased, present=present)

    shrunk = _tree.map(lambda d: d * (1 - _power(beta_1, updates)).to(d.real.dtype), combined)
    implied = _tree.map(lambda new, old: (new - beta_1 * old) / (1 - beta_1), shrunk, state.first)
    second = _tree.map(
        lambda old, h: beta_2 * old + (1 - beta_2) * h.abs().square(), state.second, implied
    )
    spread = _tree.map(partial(_unbias, count=updates, beta=beta_2), second)
    grads = _tree.map(partial(_scaled, ready=ready, eps=eps), jac, combined, spread)
    first = _tree.map(partial(torch.where, ready), shrunk, state.first)
    second = _tree.map(partial(torch.where, ready), second, state.second)
    return grads, ConfigMomentumState(state.step + 1, visits, updates, momenta, first, second)


def _rows_to_read(state: ConfigMomentumState, visit: str, present: Tensor | None) -> Tensor:
    """Say which rows are read, `(m,)`: all that are there, or one of them in turn."""
    row = torch.arange(len(state.visits), device=state.visits.device)
    if present is not None:
        row = torch.where(present, present.cumsum(0) - 1, -1)
    cyclic = visit == "cyclic"
    return row == state.step % _present.count(present, row) if cyclic else row >= 0


def _wide(leaf: Tensor) -> torch.dtype:
    """Return the dtype of a moment of a leaf."""
    return torch.promote_types(leaf.dtype, torch.float32)


def _power(beta: float | Tensor, count: Tensor) -> Tensor:
    """Return `beta` to the power of a counter, in float64."""
    return (beta.double() if isinstance(beta, Tensor) else beta) ** count.double()


def _renew(momentum: Tensor, leaf: Tensor, *, read: Tensor, beta: float | Tensor) -> Tensor:
    """Move the momenta of the rows that are read towards the gradients."""
    moved = beta * momentum + (1 - beta) * leaf.to(momentum.dtype)
    return torch.where(_tree.per_row(read, leaf), moved, momentum)


def _unbias(moment: Tensor, *, count: Tensor, beta: float | Tensor) -> Tensor:
    """Divide a moment by the total weight of what it averages."""
    weight = 1 - _power(beta, count)
    safe = torch.where(count > 0, torch.where(count > 0, weight, 1.0), 1.0)
    return moment / _tree.per_row(safe.to(moment.real.dtype), moment)


def _scaled(leaf: Tensor, d: Tensor, spread: Tensor, *, ready: Tensor, eps: float) -> Tensor:
    """Divide the direction by the root of its second moment; where that is 0, so is `d`."""
    usable = ready & (spread != 0)
    safe = torch.where(usable, spread, 1.0)
    root = safe / safe.sqrt()  # not-a-number if it overflowed
    divisor = torch.where(usable, root + eps, eps or 1.0)
    return torch.where(ready, d / divisor, 0 * d).to(leaf.dtype)  # what is not finite stays so


def _check_state(state: ConfigMomentumState, jac: PyTree) -> None:
    """Check that the state belongs to Jacobians of these shapes."""
    _check.state_type("config_momentum", state, ConfigMomentumState)
    pairs = zip(_tree.leaves(state.momenta), _tree.leaves(jac), strict=True)
    for momentum, leaf in pairs:
        _check.state("config_momentum", "momenta", momentum, leaf.shape)


def config_momentum(
    beta_1: float | Tensor = 0.9,
    beta_2: float | Tensor = 0.999,
    *,
    eps: float = 1e-8,
    visit: str = "cyclic",
    preference: Numbers | None = None,
    length: str = "projection",
    rtol: float | None = None,
) -> Aggregator:
    r"""Step in the ConFIG direction of the gradients' momenta, at the cost of one gradient a step.

    Row $i = t \bmod m$ is read at call $t$, and with `k` the number of calls that gave a direction
    $$m_i \leftarrow \beta_1 m_i + (1 - \beta_1) g_i, \qquad
    \hat m_j = \frac{m_j}{1 - \beta_1^{t_j}}, \qquad d = \mathrm{ConFIG}(\hat m),$$
    $$f_k = (1 - \beta_1^k) d, \qquad h = \frac{f_k - \beta_1 f_{k-1}}{1 - \beta_1}, \qquad
    s \leftarrow \beta_2 s + (1 - \beta_2) h^2, \qquad
    \frac{d}{\sqrt{s / (1 - \beta_2^k)} + \epsilon}.$$

    The result is zero until each row has been read once, and is then of the size of Adam's: use
    it with plain gradient descent. The state holds the momenta, as large as the Jacobian, the two
    moments, and counters.

    Only row `state.step % m` of the Jacobian is read, whatever the others hold. So differentiate
    that one loss, and give its gradient expanded to `(m, ...)`, which takes no memory. With
    `jd.grad` all rows are computed: use `visit="all"` there.

    Args:
        beta_1: Decay of the momenta of the gradients. A tensor may be vmapped.
        beta_2: Decay of the second moment. A tensor may be vmapped.
        eps: Added to the root of the second moment.
        visit: `"cyclic"`, one row at each call, in turn; `"all"`, every row at every call.
        preference: As for `jd.config`.
        length: As for `jd.config`.
        rtol: As for `jd.config`.

    Returns:
        The Aggregator. It needs the rows: there is no weighting on the Gramian.

    Raises:
        ValueError: If an option is unknown or out of range.

    Differs from other implementations:
        The authors' operator is handed the number of the row; here the state counts.

    References:
        Q. Liu, M. Chu, N. Thuerey, ConFIG: Towards Conflict-free Training of Physics Informed
        Neural Networks, ICLR 2025, https://arxiv.org/abs/2408.11104

    Example:
        >>> import torch, torchjd_func as jd
        >>> rows = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> aggregator = jd.config_momentum()
        >>> state = aggregator.init(rows)
        >>> for row in rows:  # the gradient of one loss at a time
        ...     grads, state = aggregator(row.expand(2, 3), state)
        >>> grads.round(decimals=3)
        tensor([1., 1., 1.])
    """
    _check.choice("visit", visit, ("cyclic", "all"))
    options = {
        "direction": config(preference, length=length, rtol=rtol),
        "visit": visit,
        "beta_1": _check.interval("beta_1", beta_1, 0, 1, open_high=True),
        "beta_2": _check.interval("beta_2", beta_2, 0, 1, open_high=True),
        "eps": _check.interval("eps", eps, 0),
    }
    return Aggregator("config_momentum", _init, partial(_update, **options))
