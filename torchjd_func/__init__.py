"""Functional, JAX-style training with several losses, on torch.func."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torchjd_func import (
    _check,
    ensemble,
    interop,
    linalg,
    loss_scale,
    measures,
    metrics,
    random,
    scalarizers,
    sets,
)
from torchjd_func._functionalize import functionalize
from torchjd_func._lift import stateless, weighted
from torchjd_func._types import Aggregator, Observation, Scalarizer, Weighting
from torchjd_func.aggregation import (
    aligned_mtl,
    cagrad,
    clipped_mean,
    config,
    config_momentum,
    constant,
    db_mtl,
    dualproj,
    epo,
    excess_mtl,
    fairgrad,
    ferero,
    geometric_median,
    graddrop,
    gradnorm,
    gradvac,
    imtl_g,
    krum,
    mean,
    mgda,
    moco,
    modo,
    nash_mtl,
    pcd,
    pcgrad,
    pivrg,
    pmgda,
    rlw,
    sam_gs,
    sdmgrad,
    sum,
    trimmed_mean,
    upgrad,
)
from torchjd_func.combinators import every, grouped, log_losses, monitored, smoothed
from torchjd_func.combinators._labels import by_layer, by_network, by_tensor, together
from torchjd_func.combinators._monitored import read_measures
from torchjd_func.differentiate import (
    accumulate,
    cast_floating,
    check_instancewise,
    cross_gramian,
    double_sampling,
    explain_gramian,
    features,
    grad,
    grad_and_value,
    gramian,
    gramian_and_value,
    gramian_vjp,
    init_state,
    instancewise,
    jac,
    jac_and_value,
    multitask,
    per_example,
    row_norms,
)

if TYPE_CHECKING:
    from torchjd_func import distributed, plot, testing

__version__ = "0.2.0"

__all__ = [
    "Aggregator",
    "Observation",
    "Scalarizer",
    "Weighting",
    "accumulate",
    "aligned_mtl",
    "by_layer",
    "by_network",
    "by_tensor",
    "cagrad",
    "cast_floating",
    "check_instancewise",
    "clipped_mean",
    "config",
    "config_momentum",
    "constant",
    "cross_gramian",
    "db_mtl",
    "distributed",
    "double_sampling",
    "dualproj",
    "ensemble",
    "epo",
    "every",
    "excess_mtl",
    "explain_gramian",
    "fairgrad",
    "features",
    "ferero",
    "functionalize",
    "geometric_median",
    "grad",
    "grad_and_value",
    "graddrop",
    "gradnorm",
    "gradvac",
    "gramian",
    "gramian_and_value",
    "gramian_vjp",
    "grouped",
    "imtl_g",
    "init_state",
    "instancewise",
    "interop",
    "jac",
    "jac_and_value",
    "krum",
    "linalg",
    "log_losses",
    "loss_scale",
    "mean",
    "measures",
    "metrics",
    "mgda",
    "moco",
    "modo",
    "monitored",
    "multitask",
    "nash_mtl",
    "pcd",
    "pcgrad",
    "per_example",
    "pivrg",
    "plot",
    "pmgda",
    "random",
    "read_measures",
    "rlw",
    "row_norms",
    "sam_gs",
    "scalarizers",
    "sdmgrad",
    "sets",
    "smoothed",
    "stateless",
    "sum",
    "testing",
    "together",
    "trimmed_mean",
    "upgrad",
    "weighted",
]


def __dir__() -> list[str]:
    """Return the public names, those of late imports among them."""
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    """Import at their first use the parts that most programs do without."""
    if name in ("distributed", "plot", "testing"):
        return import_module(f"torchjd_func.{name}")
    spaces = (ensemble, interop, linalg, measures, metrics, random, scalarizers, sets)
    inner = [f"{space.__name__}.{public}" for space in spaces for public in space.__all__]
    _check.attribute("torchjd_func", name, [*(f"torchjd_func.{x}" for x in __all__), *inner])
