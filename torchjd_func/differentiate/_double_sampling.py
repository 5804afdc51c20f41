"""Weights from two independent batches, the parameters' step from these or from a third."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchjd_func import _check, _tree
from torchjd_func._precision import full_precision
from torchjd_func._types import Weighting
from torchjd_func.differentiate._detach import detached
from torchjd_func.differentiate._linearized import assemble
from torchjd_func.differentiate._outside import check_inside
from torchjd_func.differentiate._request import Request
from torchjd_func.differentiate._routes import contract_cross, pullback_of_all, validate
from torchjd_func.differentiate._verb import linearize

PyTree = Any


def double_sampling(
    fn: Callable[..., Any],
    weighting: Weighting,
    *,
    has_aux: bool = False,
    route: str = "auto",
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    r"""Transform an objective into one step of a method that samples independent batches.

    $$w = \mathcal W(J_1 J_2^\top), \qquad
    d = \tfrac12 (J_1 + J_2)^\top w \;\text{ or, with a third batch, }\; d = J_3^\top w.$$

    $J_1 J_2^\top$ is an unbiased estimate of the Gramian of all data, which $J_1 J_1^\top$ is not.
    Each batch costs one forward pass.

    Args:
        fn: Objective `fn(params, *batch)`, with as many losses in each batch.
        weighting: `jd.modo()`, `jd.sdmgrad()`, or another Weighting of a cross-Gramian.
        has_aux: As for `jd.jac`.
        route: As for `jd.gramian`.
        chunk_size: As for `jd.gramian`.

    Returns:
        `f(state, params, batch_1, batch_2, batch_3=None, present=None, size=None, **kwargs) ->
        (grads, losses, state)`; each batch is a tuple of arguments of `fn`, keyword arguments are
        as for `jd.jac`. `state` comes from `jd.init_state(weighting, fn, params, *batch)`, or is
        `None` at the first call. `losses` are those that `grads` belong to: the mean of two
        batches, or of the third. With aux, `(grads, (losses, aux), state)` with one `aux` for each
        batch, as a tuple.

    Raises:
        TypeError: If `weighting` is not a Weighting.
        ValueError: If it needs the Gramian of one batch, or a batch is not a tuple.

    References:
        L. Chen, H. Fernando, Y. Ying, T. Chen, Three-Way Trade-Off in Multi-Objective Learning:
        Optimization, Generalization and Conflict-Avoidance, NeurIPS 2023 and JMLR 25, 2024,
        https://arxiv.org/abs/2305.20057
        P. Xiao, H. Ban, K. Ji, Direction-oriented Multi-objective Learning: Simple and Provable
        Stochastic Algorithms, NeurIPS 2023, https://arxiv.org/abs/2305.18409

    Example:
        >>> import torch, torchjd_func as jd
        >>> step = jd.double_sampling(lambda w, x: (w - x).square(), jd.modo(gamma=0.01))
        >>> batch_1, batch_2 = (torch.tensor([3.0, 1.0]),), (torch.tensor([1.0, 1.0]),)
        >>> grads, losses, state = step(None, torch.zeros(2), batch_1, batch_2)
        >>> grads, losses
        (tensor([-1.9200, -1.0400]), tensor([5., 1.]))
    """
    _check.two_batch_weighting(weighting, Weighting)
    validate(route, chunk_size)

    def step(
        state: Any,
        params: PyTree,
        batch_1: tuple[Any, ...],
        batch_2: tuple[Any, ...],
        /,
        batch_3: tuple[Any, ...] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any, Any]:
        """Return the update direction, the losses (and aux) and the next state."""
        batches = (batch_1, batch_2) if batch_3 is None else (batch_1, batch_2, batch_3)
        _check.batches(batches)
        routes = (route, route, "jacobian")  # the third is pulled back only once
        linears = [
            linearize(fn, (params, *batch), kwargs, Request(0, has_aux, route, chunk_size), state)
            for batch, route in zip(batches, routes, strict=False)
        ]
        check_inside(linears[0].losses)
        _check.same_losses([linear.vector.shape[0] for linear in linears])
        seen = (linears[0].vector + linears[1].vector) / 2
        present, followed = linears[0].present, linears if batch_3 is None else linears[2:]
        with full_precision():
            statistic = contract_cross(linears[0], linears[1], route, chunk_size)
            weights, state = weighting(statistic, detached(state), losses=seen, present=present)
            grads = _tree.mean(
                [assemble(linear, pullback_of_all(linear)(weights), weights) for linear in followed]
            )
        losses = _tree.mean([linear.losses for linear in followed])
        out = (losses, tuple(linear.aux for linear in linears)) if has_aux else losses
        return detached((grads, out, state))

    return step
