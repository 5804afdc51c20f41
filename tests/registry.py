"""Every method, how to make it for m objectives, and what it claims. Contracts run over this.

A name is an exported factory, with the options in brackets when one factory is listed twice. A
factory that is exported and not listed fails `test_public_api.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import torchjd_func as jd


@dataclass(frozen=True)
class Method(jd.testing.Case):
    """An aggregator and its claims; the claims are tested, and counter-examples to the others.

    Factories are given `m`, or which objectives there are of more.
    """

    weighted: bool = True
    equivariant: bool = True
    degree: float | None = 1.0
    unique: bool = True  # d is determined; False: only if rows are independent
    cost: str = ""  # growth of the solve with m

    def among(self, rows):
        return self.make(rows)


def _preference(objectives: int | Sequence[int]) -> Tensor:
    """A preference with a different number for each objective."""
    rows = range(objectives) if isinstance(objectives, int) else objectives
    return (torch.tensor(rows, dtype=torch.float64) + 1) / 6


def _ones(objectives: int | Sequence[int]) -> list[float]:
    """A preference for all objectives alike."""
    return [1.0] * (objectives if isinstance(objectives, int) else len(objectives))


MEASURES = {
    "weights": jd.measures.weights,
    "cosine": jd.measures.cosine_to_mean,
    "gap": jd.measures.stationarity_gap,
}

METHODS: dict[str, Method] = {
    "mean": Method(lambda m: jd.mean(), linear_under_scaling=True, cost="m"),
    "sum": Method(lambda m: jd.sum(), linear_under_scaling=True, cost="m"),
    "constant": Method(
        lambda m: jd.constant(_preference(m)),
        linear_under_scaling=True,
        equivariant=False,
        cost="m",
    ),
    "upgrad": Method(
        lambda m: jd.upgrad(), non_conflicting=True, linear_under_scaling=True, cost="m^4"
    ),
    "upgrad[preference]": Method(
        lambda m: jd.upgrad(_preference(m)),
        non_conflicting=True,
        linear_under_scaling=True,
        equivariant=False,
        cost="m^4",
    ),
    "dualproj": Method(lambda m: jd.dualproj(), non_conflicting=True, cost="m^3"),
    "dualproj[preference]": Method(
        lambda m: jd.dualproj(_preference(m)),
        non_conflicting=True,
        equivariant=False,
        cost="m^3",
    ),
    "mgda": Method(lambda m: jd.mgda(), non_conflicting=True, cost="m^3"),
    "mgda[l2]": Method(
        lambda m: jd.mgda("l2"), linear_under_scaling=True, unique=False, cost="m^3"
    ),
    "mgda[l2, normalized]": Method(
        lambda m: jd.mgda("l2", apply_to="normalized"),
        non_conflicting=True,
        degree=0.0,
        cost="m^3",
    ),
    "mgda[loss]": Method(lambda m: jd.mgda("loss"), needs_losses=True, unique=False, cost="m^3"),
    "mgda[loss+]": Method(
        lambda m: jd.mgda("loss+"),
        linear_under_scaling=True,
        needs_losses=True,
        unique=False,
        cost="m^3",
    ),
    "cagrad": Method(lambda m: jd.cagrad(), cost="m^3"),
    "cagrad[1+c^2]": Method(lambda m: jd.cagrad(0.4, rescale="1+c^2"), cost="m^3"),
    "cagrad[preference]": Method(
        lambda m: jd.cagrad(preference=_preference(m)), equivariant=False, cost="m^3"
    ),
    "cagrad[2]": Method(lambda m: jd.cagrad(2.0), non_conflicting=True, cost="m^3"),
    "pcgrad": Method(
        lambda m: jd.pcgrad(),
        linear_under_scaling=True,
        equivariant=False,
        random=True,
        cost="m^3",
    ),
    "pcgrad[mean]": Method(
        lambda m: jd.pcgrad(reduction="mean"),
        linear_under_scaling=True,
        equivariant=False,
        random=True,
        cost="m^3",
    ),
    "gradvac": Method(
        lambda m: jd.gradvac(),
        linear_under_scaling=True,
        equivariant=False,
        random=True,
        cost="m^4",
    ),
    "imtl_g": Method(lambda m: jd.imtl_g(), unique=False, cost="m^3"),
    "imtl_g[safe]": Method(lambda m: jd.imtl_g(safe=True), unique=False, cost="m^3"),
    "aligned_mtl": Method(lambda m: jd.aligned_mtl(), unique=False, cost="m^3"),
    "aligned_mtl[preference, median]": Method(
        lambda m: jd.aligned_mtl(_preference(m), "median"),
        equivariant=False,
        unique=False,
        cost="m^3",
    ),
    "aligned_mtl[rmse]": Method(lambda m: jd.aligned_mtl(scale="rmse"), unique=False, cost="m^3"),
    "config": Method(lambda m: jd.config(), linear_under_scaling=True, cost="m^3"),
    "config[preference]": Method(
        lambda m: jd.config(_preference(m)),
        linear_under_scaling=True,
        equivariant=False,
        cost="m^3",
    ),
    "config[min]": Method(lambda m: jd.config(length="min"), cost="m^3"),
    "config_momentum[all]": Method(
        lambda m: jd.config_momentum(visit="all"),
        weighted=False,
        degree=None,
        keeps_direction=False,
        cost="m^3",
    ),
    "nash_mtl": Method(lambda m: jd.nash_mtl(), non_conflicting=True, degree=0.0, cost="m^3"),
    "nash_mtl[max_norm]": Method(
        lambda m: jd.nash_mtl(max_norm=1.0), non_conflicting=True, degree=0.0, cost="m^3"
    ),
    "nash_mtl[update_every]": Method(lambda m: jd.nash_mtl(update_every=2), degree=0.0, cost="m^3"),
    "fairgrad": Method(lambda m: jd.fairgrad(), non_conflicting=True, degree=0.0, cost="m^3"),
    "fairgrad[alpha=0.5]": Method(
        lambda m: jd.fairgrad(0.5), non_conflicting=True, degree=1 / 3, cost="m^3"
    ),
    "fairgrad[alpha=2]": Method(
        lambda m: jd.fairgrad(2.0), non_conflicting=True, degree=-1 / 3, cost="m^3"
    ),
    "nash_mtl[preference]": Method(
        lambda m: jd.nash_mtl(preference=_preference(m)),
        non_conflicting=True,
        equivariant=False,
        degree=0.0,
        cost="m^3",
    ),
    "fairgrad[preference]": Method(
        lambda m: jd.fairgrad(2.0, preference=_preference(m)),
        non_conflicting=True,
        equivariant=False,
        degree=-1 / 3,
        cost="m^3",
    ),
    "pivrg": Method(
        lambda m: jd.pivrg(20 * _preference(m)),
        non_conflicting=True,
        equivariant=False,
        degree=-1 / 3,
        cost="m^3",
    ),
    "pcd": Method(lambda m: jd.pcd(), equivariant=False, degree=None, cost="m^3"),
    "pcd[eps=0]": Method(lambda m: jd.pcd(eps=0.0), equivariant=False, cost="m^3"),
    "epo": Method(
        lambda m: jd.epo(_ones(m)), needs_losses=True, unique=False, cost="m^3 to C(2m+1, m+2)"
    ),
    "epo[preference]": Method(
        lambda m: jd.epo(_preference(m)),
        needs_losses=True,
        equivariant=False,
        unique=False,
        cost="m^3 to C(2m+1, m+2)",
    ),
    "pmgda": Method(
        lambda m: jd.pmgda(_ones(m)),
        needs_losses=True,
        degree=None,
        unique=False,
        cost="m^3 to C(2m+2, m+1)",
    ),
    "pmgda[preference]": Method(
        lambda m: jd.pmgda(_preference(m)),
        needs_losses=True,
        equivariant=False,
        degree=None,
        unique=False,
        cost="m^3 to C(2m+2, m+1)",
    ),
    "ferero": Method(
        lambda m: jd.ferero(_preference(m), 0.01),
        needs_losses=True,
        equivariant=False,
        degree=None,
        cost="m^2",
    ),
    # Weightings of a cross-Gramian, on the Gramian of one batch, where it is symmetric.
    "modo": Method(lambda m: jd.weighted(jd.modo()), degree=None, cost="m^2"),
    "sdmgrad": Method(lambda m: jd.weighted(jd.sdmgrad()), cost="m^3"),
    "sdmgrad[preference]": Method(
        lambda m: jd.weighted(jd.sdmgrad(preference=_preference(m))), equivariant=False, cost="m^3"
    ),
    "sdmgrad[pgd]": Method(lambda m: jd.weighted(jd.sdmgrad(solver="pgd")), cost="m^3"),
    "sdmgrad[reference]": Method(
        lambda m: jd.weighted(jd.sdmgrad(solver="reference")), degree=None, cost="m^2"
    ),
    "rlw": Method(
        lambda m: jd.rlw(), linear_under_scaling=True, equivariant=False, random=True, cost="m"
    ),
    "krum": Method(lambda m: jd.krum(1), min_m=5, cost="m^2"),
    "krum[n_selected, distances]": Method(
        lambda m: jd.krum(1, 2, squared=False), min_m=5, cost="m^2"
    ),
    "geometric_median": Method(lambda m: jd.geometric_median(), cost="m^3"),
    "geometric_median[preference]": Method(
        lambda m: jd.geometric_median(_preference(m)), equivariant=False, cost="m^3"
    ),
    "graddrop": Method(lambda m: jd.graddrop(), weighted=False, random=True, cost="m n"),
    "graddrop[leak]": Method(
        lambda m: jd.graddrop(_preference(m).clamp(max=1)),
        weighted=False,
        equivariant=False,
        random=True,
        cost="m n",
    ),
    "clipped_mean": Method(lambda m: jd.clipped_mean(2.0), degree=None, cost="m"),
    "trimmed_mean": Method(
        lambda m: jd.trimmed_mean(1),
        weighted=False,
        drops_non_finite=True,
        min_m=3,
        cost="n m log m",
    ),
    "excess_mtl": Method(lambda m: jd.excess_mtl(), cost="m n"),
    "excess_mtl[warm-up]": Method(
        lambda m: jd.excess_mtl(0.1, n_warmup_steps=2, eps=1e-7), cost="m n"
    ),
    "moco": Method(lambda m: jd.moco(), degree=None, cost="m^2 n"),
    "moco[softmax, prescale]": Method(
        lambda m: jd.moco(simplex="softmax", prescale=True),
        degree=0.0,
        needs_losses=True,
        cost="m^2 n",
    ),
    "db_mtl": Method(lambda m: jd.db_mtl(), degree=None, needs_losses=True, cost="m n"),
    "db_mtl[eps=0]": Method(lambda m: jd.db_mtl(eps=0.0), needs_losses=True, cost="m n"),
    "sam_gs": Method(
        lambda m: jd.sam_gs(), weighted=False, degree=None, keeps_direction=False, cost="m n"
    ),
    "sam_gs[equal]": Method(
        lambda m: jd.sam_gs(1.0), weighted=False, degree=None, keeps_direction=False, cost="m n"
    ),
    "gradnorm": Method(
        lambda m: jd.gradnorm(), linear_under_scaling=True, needs_losses=True, cost="m"
    ),
    "gradnorm[softmax]": Method(
        lambda m: jd.gradnorm(parametrization="softmax"),
        linear_under_scaling=True,
        needs_losses=True,
        cost="m",
    ),
    "smoothed[upgrad]": Method(
        lambda m: jd.smoothed(jd.upgrad()), linear_under_scaling=True, cost="m^4"
    ),
    "smoothed[mgda, initial_weights]": Method(
        lambda m: jd.smoothed(jd.mgda(), initial_weights=_preference(m)),
        equivariant=False,
        cost="m^3",
    ),
    "smoothed[every[rlw]]": Method(
        lambda m: jd.smoothed(jd.every(jd.rlw(), 2), 0.5),
        linear_under_scaling=True,
        equivariant=False,
        random=True,
        cost="m",
    ),
    "grouped[upgrad]": Method(
        lambda m: jd.grouped(jd.upgrad(), jd.together),
        non_conflicting=True,
        linear_under_scaling=True,
        cost="m^4",
    ),
    "grouped[gradvac]": Method(
        lambda m: jd.grouped({"all": jd.gradvac()}, jd.together),
        linear_under_scaling=True,
        equivariant=False,
        random=True,
        cost="m^4",
    ),
    "grouped[moco]": Method(
        lambda m: jd.grouped(jd.moco(), jd.together), degree=None, cost="m^2 n"
    ),
    "log_losses[upgrad]": Method(
        lambda m: jd.log_losses(jd.upgrad()),
        non_conflicting=True,
        linear_under_scaling=True,
        needs_losses=True,
        cost="m^4",
    ),
    "log_losses[sam_gs]": Method(
        lambda m: jd.log_losses(jd.sam_gs()),
        weighted=False,
        keeps_direction=False,
        needs_losses=True,
        degree=None,
        cost="m n",
    ),
    "every[upgrad]": Method(
        lambda m: jd.every(jd.upgrad(), 2), linear_under_scaling=True, cost="m^4"
    ),
    "every[gradnorm]": Method(
        lambda m: jd.every(jd.gradnorm(), 2),
        linear_under_scaling=True,
        needs_losses=True,
        cost="m",
    ),
    "monitored[upgrad]": Method(
        lambda m: jd.monitored(jd.upgrad(), MEASURES),
        non_conflicting=True,
        linear_under_scaling=True,
        cost="m^4",
    ),
    "monitored[every[rlw]]": Method(
        lambda m: jd.monitored(jd.every(jd.rlw(), 2), MEASURES),
        linear_under_scaling=True,
        equivariant=False,
        random=True,
        cost="m",
    ),
    "monitored[trimmed_mean]": Method(
        lambda m: jd.monitored(jd.trimmed_mean(1), {"cosine": jd.measures.cosine_to_mean}),
        weighted=False,
        drops_non_finite=True,
        min_m=3,
        cost="m n",
    ),
}


def exported(name: str) -> str:
    """Return the factory's name of a registry entry."""
    return name.split("[")[0]


def key_for(method: Method, seed: int = 0) -> Tensor | None:
    """Return a key if the method draws random numbers."""
    return method.key(seed)


def losses_for(method: Method, m: int) -> Tensor | None:
    """Return positive losses if the method needs them."""
    return method.losses(m)


def fresh(method: Method, jac, m: int, seed: int = 0):
    """Return the aggregator and an initial state."""
    aggregator = method.make(m)
    return aggregator, aggregator.init(jac, key=key_for(method, seed))


def run(
    method: Method,
    jac,
    m: int,
    *,
    seed: int = 0,
    losses: Tensor | None = None,
    before: Tensor | None = None,
):
    """Aggregate once, from a fresh state or from the one that three calls `before` left behind."""
    aggregator, state = fresh(method, jac, m, seed)
    losses = losses_for(method, m) if losses is None else losses
    for past in () if before is None else (before, before, before):
        _, state = aggregator(past, state, losses=losses)
    return aggregator(jac, state, losses=losses)[0]
