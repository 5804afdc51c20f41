"""Hypervolume as one loss: of a single point, and in a random direction.

R. Zhang, D. Golovin, Random Hypervolume Scalarizations for Provable Multi-Objective Black Box
Optimization, ICML 2020, arXiv:2006.04655. I. Albuquerque et al., Multi-objective training of
Generative Adversarial Networks with multiple discriminators, ICML 2019, arXiv:1901.08680.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from torchjd_func import _check
from torchjd_func._names import Vector
from torchjd_func._present import only
from torchjd_func._types import Scalarizer
from torchjd_func.random import normal, split
from torchjd_func.scalarization._common import (
    Number,
    Numbers,
    count,
    entries,
    number,
    optional,
    pure,
)

TRANSFORMS = ("power", "root", "log")


class HypervolumeState(NamedTuple):
    """State of `hypervolume` in random directions."""

    key: Tensor  # (2,) int64


def _log(
    losses: Tensor, *, reference: Vector | None, slack: Number, present: Tensor | None = None
) -> Tensor:
    """Take minus the logarithm of the volume between the losses and the reference."""
    nadir = number(slack, losses) * only(present, losses.detach(), -torch.inf).amax()
    corner = nadir if reference is None else entries("reference", reference, losses, 0.0)
    return -only(present, corner - losses, 1.0).log().sum()


def _init(losses: Tensor, key: Tensor | None) -> HypervolumeState:
    """Keep the key."""
    return HypervolumeState(_check.key_present("hypervolume", key))


def _update(
    losses: Tensor,
    state: HypervolumeState,
    *,
    reference: Vector,
    variant: str,
    transform: str,
    present: Tensor | None = None,
) -> tuple[Tensor, HypervolumeState]:
    """Draw a direction from the positive part of the unit sphere."""
    _check.state_type("hypervolume", state, HypervolumeState)
    next_key, draw = split(state.key)
    size = normal(draw, losses.shape, dtype=losses.dtype).abs()
    direction = size / vector_norm(only(present, size))
    options = {"reference": reference, "direction": direction, "transform": transform}
    loss = _in_direction(losses, variant=variant, present=present, **options)
    return loss, HypervolumeState(next_key)


def _in_direction(
    losses: Tensor,
    *,
    reference: Vector,
    variant: str,
    direction: Vector,
    transform: str,
    present: Tensor | None = None,
) -> Tensor:
    """Measure how far the losses are inside the reference, in one direction."""
    m, along = count(losses, present), entries("direction", direction, losses, 1.0)
    inward = (entries("reference", reference, losses, 0.0) - losses) / along
    depth = only(present, inward, torch.inf).amin()
    inside = ~(depth <= 0)  # not-a-number stays
    safe = torch.where(inside, depth, 1.0)
    if transform == "log":
        return torch.where(inside, -m * safe.log(), torch.inf)
    return torch.where(inside, -(safe**m) if transform == "power" else -safe, 0.0)


def hypervolume(
    reference: Numbers | None = None,
    *,
    variant: str = "log",
    slack: Number = 1.1,
    direction: Numbers | None = None,
    transform: str = "power",
) -> Scalarizer:
    r"""Enlarge the volume that the losses dominate below a reference point.

    `variant="log"`: the volume of the single point,

    $$s = -\sum_i \log(r_i - L_i), \qquad \frac{\partial s}{\partial L_i} = \frac1{r_i - L_i},$$

    with $r_i = \delta \max_j L_j$, a constant, unless a reference is given: the worst weighs most.

    `variant="random"`: its length in a direction $\lambda$, drawn for every call from the positive
    part of the unit sphere,

    $$s = -\min_i \Big(\frac{(r_i - L_i)_+}{\lambda_i}\Big)^m, \qquad
    \frac{\partial s}{\partial L_i} = \frac{m}{\lambda_i}
    \Big(\frac{r_i - L_i}{\lambda_i}\Big)^{m-1} \text{ at the smallest, 0 elsewhere.}$$

    Its expectation is minus the volume over $\pi^{m/2} / (2^m \Gamma(m/2 + 1))$, also for sets of
    points. Outside of the reference `s` is zero (infinite for `transform="log"`) and so is its
    gradient. The state holds the key.

    Args:
        reference: `r`, `(m,)`, above all losses; needed by `"random"`. A tensor may be vmapped.
        variant: `"log"` or `"random"`.
        slack: $\delta$, above 1, for positive losses. A tensor may be vmapped.
        direction: $\lambda$, `(m,)`, positive: fixed instead of drawn, so that no key is needed.
        transform: Of the `"random"` variant: `"power"`, as above; its `"root"` of order `m`; or
            minus the logarithm of $-s$, `"log"`.

    Returns:
        The Scalarizer; `init` of `"random"` needs a key, unless the direction is fixed.

    Raises:
        ValueError: If an option is unknown or out of range, or `"random"` has no reference.

    Differs from other implementations:
        Signs are for descent; the first paper maximises.

    References:
        I. Albuquerque, J. Monteiro, T. Doan, B. Considine, T. Falk, I. Mitliagkas, Multi-objective
        training of Generative Adversarial Networks with multiple discriminators, ICML 2019,
        https://arxiv.org/abs/1901.08680. R. Zhang, D. Golovin, Random Hypervolume Scalarizations
        for Provable Multi-Objective Black Box Optimization, ICML 2020,
        https://arxiv.org/abs/2006.04655

    Example:
        >>> import torch, torchjd_func as jd
        >>> jd.scalarizers.hypervolume([2.0, 4.0])(torch.tensor([0.5, 3.0]))[0]
        tensor(-0.4055)
    """
    _check.choice("variant", variant, ("log", "random"))
    _check.choice("transform", transform, TRANSFORMS)
    corner = optional("reference", reference)
    if variant == "log":
        delta = _check.interval("slack", slack, 1, open_low=True)
        return pure("hypervolume", partial(_log, reference=corner, slack=delta))
    if corner is None:
        raise ValueError(
            "`reference` must be given to variant='random', got None. "
            "Pass a point above all losses, such as 1.1 times the first of them."
        )
    options = {"reference": corner, "variant": variant, "transform": transform}
    fixed = optional("direction", direction, low=0)
    if fixed is None:
        return Scalarizer("hypervolume", _init, partial(_update, **options))
    return pure("hypervolume", partial(_in_direction, direction=fixed, **options))
