"""Every scalarizer, how to make it for m objectives, and what it claims.

A name is an exported factory, with the options in brackets when one factory is listed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import torchjd_func as jd
from torchjd_func import scalarizers as sc


@dataclass(frozen=True)
class Method(jd.testing.Case):
    """A scalarizer and its claims; the claims are tested, and counter-examples to the others.

    Factories are given `m`, or which objectives there are of more. `differentiable` says that the
    gradient is that of the value: no part of it is held constant.
    """

    convex: bool = False  # the gradient is a convex combination: non-negative, sum 1
    learned: bool = False  # the state is trained by the user, and handed on as it is
    finite_at_zero: bool = True  # value and gradient are finite where all losses are zero

    def among(self, rows):
        return self.make(rows)


Objectives = int | Sequence[int]


def _rows(objectives: Objectives) -> Tensor:
    """Return which objectives there are."""
    rows = range(objectives) if isinstance(objectives, int) else objectives
    return torch.tensor(rows, dtype=torch.float64)


def weights(objectives: Objectives) -> Tensor:
    """A different positive weight for each objective; those of four sum to 1."""
    return (_rows(objectives) + 1) / 10


def below(objectives: Objectives) -> Tensor:
    """An ideal point below the losses of `losses`."""
    return -0.3 + _rows(objectives) / 6


def above(objectives: Objectives) -> Tensor:
    """A reference point above the losses of `losses`."""
    return 40.0 + 20.0 * _rows(objectives) / 3


def kinds(objectives: Objectives) -> list[str]:
    """A task of regression, and others of classification."""
    return ["classification" if row else "regression" for row in _rows(objectives)]


def losses(m: int = 4) -> Tensor:
    """Positive losses without ties."""
    return torch.tensor([0.5, 3.0, 1.2, 2.0, 0.7], dtype=torch.float64)[:m]


LA, LB = [0.5, 3.0], [1.0, 2.0, 4.0]
WA, WB = [0.25, 0.75], [0.2, 0.3, 0.5]  # the losses and weights of the published examples

METHODS: dict[str, Method] = {
    "mean": Method(lambda m: sc.mean(), convex=True, equivariant=True, degree=1.0),
    "sum": Method(lambda m: sc.sum(), equivariant=True, degree=1.0),
    "constant": Method(lambda m: sc.constant(2 * weights(m)), degree=1.0),
    "random": Method(lambda m: sc.random(), convex=True, degree=1.0, random=True),
    "geometric_mean": Method(lambda m: sc.geometric_mean(), equivariant=True, degree=1.0),
    "log_sum": Method(lambda m: sc.log_sum(), equivariant=True, finite_at_zero=False),
    "log_sum[offset]": Method(lambda m: sc.log_sum(1.0), equivariant=True),
    "uw": Method(lambda m: sc.uw(), equivariant=True, degree=1.0, learned=True),
    "uw[kinds, start]": Method(lambda m: sc.uw(kinds(m), start=-0.5), learned=True),
    "imtl_l": Method(lambda m: sc.imtl_l(), equivariant=True, degree=1.0, learned=True),
    "dwa": Method(lambda m: sc.dwa(), equivariant=True, degree=1.0, observes="nothing"),
    "famo": Method(
        lambda m: sc.famo(), differentiable=False, convex=True, equivariant=True, observes="losses"
    ),
    "famo[sgd, min_losses]": Method(
        lambda m: sc.famo(optimizer="sgd", min_losses=-weights(m)),
        differentiable=False,
        convex=True,
        observes="losses",
    ),
    "tchebycheff": Method(lambda m: sc.tchebycheff(), equivariant=True, degree=1.0),
    "tchebycheff[weights, reference]": Method(lambda m: sc.tchebycheff(weights(m), below(m))),
    "tchebycheff[divide, absolute]": Method(
        lambda m: sc.tchebycheff(weights(m), below(m) + 1, convention="divide", absolute=True)
    ),
    "augmented_tchebycheff": Method(
        lambda m: sc.augmented_tchebycheff(), equivariant=True, degree=1.0
    ),
    "augmented_tchebycheff[weights, reference]": Method(
        lambda m: sc.augmented_tchebycheff(weights(m), below(m))
    ),
    "augmented_tchebycheff[unweighted]": Method(
        lambda m: sc.augmented_tchebycheff(weights(m), augmentation="unweighted"), degree=1.0
    ),
    "stch": Method(lambda m: sc.stch(), equivariant=True),
    "stch[weights, reference]": Method(lambda m: sc.stch(1.0, weights(m), below(m))),
    "stch[nadir]": Method(lambda m: sc.stch(1.0, nadir=above(m))),
    "cosmos": Method(lambda m: sc.cosmos(weights(m), 2.0)),
    "pbi": Method(lambda m: sc.pbi(), equivariant=True, degree=1.0),
    "pbi[weights, reference]": Method(lambda m: sc.pbi(weights(m), below(m), theta=1.0)),
    "p_norm": Method(lambda m: sc.p_norm(), equivariant=True, degree=1.0),
    "p_norm[1]": Method(lambda m: sc.p_norm(1.0, weights(m)), convex=True, degree=1.0),
    "p_norm[weights, reference]": Method(lambda m: sc.p_norm(4.0, weights(m), below(m))),
    "power_mean[-1]": Method(
        lambda m: sc.power_mean(-1.0), equivariant=True, degree=1.0, finite_at_zero=False
    ),
    "power_mean[0, weights]": Method(
        lambda m: sc.power_mean(0.0, weights(m)), degree=1.0, finite_at_zero=False
    ),
    "power_mean[3]": Method(
        lambda m: sc.power_mean(3.0), equivariant=True, degree=1.0, finite_at_zero=False
    ),
    "softmax": Method(lambda m: sc.softmax(), equivariant=True),
    "softmax[detached]": Method(
        lambda m: sc.softmax(variant="detached"),
        differentiable=False,
        convex=True,
        equivariant=True,
    ),
    "softmax[log_sum_exp]": Method(
        lambda m: sc.softmax(variant="log_sum_exp"), convex=True, equivariant=True
    ),
    "softmax[log_mean_exp]": Method(
        lambda m: sc.softmax(-2.0, variant="log_mean_exp"), convex=True, equivariant=True
    ),
    "cvar": Method(lambda m: sc.cvar(0.4), convex=True, equivariant=True, degree=1.0),
    "cvar[k]": Method(lambda m: sc.cvar(k=1), convex=True, equivariant=True, degree=1.0),
    "group_dro": Method(
        lambda m: sc.group_dro(0.3), differentiable=False, convex=True, equivariant=True
    ),
    "hypervolume": Method(
        lambda m: sc.hypervolume(), differentiable=False, equivariant=True, finite_at_zero=False
    ),
    "hypervolume[reference]": Method(lambda m: sc.hypervolume(above(m))),
    "hypervolume[random]": Method(
        lambda m: sc.hypervolume(above(m), variant="random"), random=True
    ),
    "hypervolume[direction]": Method(
        lambda m: sc.hypervolume(above(m), variant="random", direction=weights(m), transform="root")
    ),
    "hypervolume[random, log]": Method(
        lambda m: sc.hypervolume(above(m), variant="random", transform="log"), random=True
    ),
}


def exported(name: str) -> str:
    """Return the factory's name of a registry entry."""
    return name.split("[")[0]


def key_for(method: Method, seed: int = 0) -> Tensor | None:
    """Return a key if the method draws random numbers."""
    return method.key(seed)


def fresh(method: Method, values, m: int, seed: int = 0):
    """Return the scalarizer and an initial state."""
    scalarizer = method.make(m)
    return scalarizer, scalarizer.init(values, key=key_for(method, seed))


def observe(method: Method, scalarizer: jd.Scalarizer, values, state):
    """Observe as the method wants it, if it does."""
    return method.observe(scalarizer, values, state)


def experienced(method: Method, values: Tensor, seed: int = 0):
    """Return the scalarizer and a state after three calls, with observations."""
    scalarizer, state = fresh(method, values, len(values), seed)
    for step in range(3):
        factors = torch.linspace(1.0, 0.8, len(values), dtype=values.dtype) ** step
        _, state = scalarizer(values * factors, state)
        state = observe(method, scalarizer, values * factors * 0.95, state)
    return scalarizer, state


def gradient(scalarizer: jd.Scalarizer, values, state):
    """Return the derivative of the loss by the losses."""
    return torch.func.grad(lambda values: scalarizer(values, state)[0])(values)


def draws(n: int, m: int) -> torch.Tensor:
    """Draw `n` positive vectors, from small to large."""
    return jd.random.normal(jd.random.key(m), (n, m), dtype=torch.float64).exp()


def vec(values) -> torch.Tensor:
    """Return a float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


def assert_close(got, want, atol: float = 6e-9) -> None:
    """Compare to the digits that were published."""
    torch.testing.assert_close(got, vec(want), rtol=0, atol=atol)


L = losses(4)
MATRIX = torch.tensor(
    [[1.0, -2.0, 0.5], [0.0, 1.0, 3.0], [-1.0, 0.5, 0.2], [2.0, 2.0, -1.0]], dtype=torch.float64
)


def affine(x):
    """Four losses that are `L` at the origin, with the Jacobian `MATRIX`."""
    return MATRIX.to(x.dtype) @ x + L.to(x.dtype)
