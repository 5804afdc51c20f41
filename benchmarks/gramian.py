"""Time instance-wise Gramians and steps against one plain backward, and the object-oriented peer.

    OMP_NUM_THREADS=1 python -m benchmarks.gramian [--quick] [--models mlp cnn transformer wide]

Gramians of b losses, one for each example: layer by layer, from the whole Jacobian, and by the
peer's `autogram.Engine` and `autojac.jac`. Whole UPGrad steps to gradients, and their `weights`
alone, beside the gradients of the mean loss (`plain`: forward and backward). One thread; minima of
interleaved repeats in one process; the peak of the bytes that a call makes; errors against float64
rows. On a device (`--device cuda`) everything is also compiled into CUDA graphs, and memory is not
measured. A dash: a repeat may take longer than 10 s (8 times that of half the examples), or a
Jacobian more than 0.2 GB.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torchjd.aggregation as peer
from torch import Tensor, nn
from torch.nn import functional as F
from torchjd.autogram import Engine
from torchjd.autojac import jac as autojac

import torchjd_func as jd
from benchmarks import _memory, _picture
from benchmarks._form import DEVICES, Benchmark, Cell, Row, compiled, exponent, main, minima, table
from benchmarks._networks import CLASSES, MODELS, WORDS, Size

Routes = dict[str, Callable[[], Any]]
SLOW, LARGE = 10.0, 2 * 10**8  # seconds for one repeat and bytes of a Jacobian that are too many
SMALL = 8  # examples that the errors are measured on


class Case(NamedTuple):
    """A model at one size, and one batch."""

    name: str
    size: Size
    net: nn.Module
    watched: nn.Module  # the same, with the hooks of the peer's engine
    x: Tensor
    y: Tensor


SIZES = {
    "mlp": [Size(b) for b in (32, 64, 128, 256, 512)],
    "cnn": [Size(b, 64) for b in (32, 64, 128, 256)],
    "transformer": [Size(b, 256, t) for t in (16, 64) for b in (16, 32)],
    "wide": [Size(64, d) for d in (512, 1024, 2048)],
}
ON_DEVICE = {
    "mlp": [Size(64)],
    "cnn": [Size(256, 64)],
    "transformer": [Size(16, 256, 64), Size(32, 512, 128)],
}
QUICK = {"mlp": [Size(32), Size(64)], "cnn": [Size(32, 64)], "transformer": [Size(16, 256, 16)]}
LONG = ("compiled", "step_compiled", "jacobian", "autojac")  # not in a quick run
COMPILED = {"mlp": Size(64), "cnn": Size(64, 64)}
TITLES = {
    "mlp": ("MLP 784-512-512-10", "b", "examples b"),
    "cnn": ("CNN", "b", "examples b"),
    "transformer": ("transformer", "tokens", "tokens b T"),
    "wide": ("MLP d-d-d-10, b = 64", "d", "features d"),
}
GRAMIANS = ("plain", "layerwise", "compiled", "jacobian", "autogram", "autojac")
GRAPHS = ("plain_graph", "layerwise_graph", "step_graph")
STEPS = ("plain", "step", "weights", "step_compiled", "step_torchjd")


def case(name: str, size: Size, device: str) -> Case:
    """Return a model with a random batch."""
    torch.manual_seed(0)
    net, shape = MODELS[name](size)
    x = torch.randn(size.b, *shape)
    if name == "transformer":
        x = torch.randint(WORDS, (size.b, *shape))
    net, y = net.to(device), torch.randint(CLASSES, (size.b,))
    return Case(name, size, net, copy.deepcopy(net), x.to(device), y.to(device))


def gramians(given: Case, engine: Engine) -> Routes:
    """Return the ways to the Gramian of the losses, by name."""
    objective, params = functional(given)
    flat = list(given.net.parameters())

    def jacobian() -> Tensor:
        """Build the peer's Jacobian, and multiply."""
        rows = [rows.flatten(1) for rows in autojac(losses(given.net, given), flat)]
        return torch.stack([matrix @ matrix.T for matrix in rows]).sum(0)

    by_layer = jd.gramian(objective, route="layerwise")
    whole = jd.gramian(objective, route="jacobian")
    routes: Routes = {
        "plain": lambda: torch.autograd.grad(losses(given.net, given).mean(), flat),
        "layerwise": lambda: by_layer(params, given.x, given.y),
        "autogram": lambda: engine.compute_gramian(losses(given.watched, given)),
    }
    if given.size == COMPILED.get(given.name) and not given.x.is_cuda:
        routes["compiled"] = partial(compiled(by_layer), params, given.x, given.y)
    if given.size.b * sum(4 * param.numel() for param in flat) <= LARGE:
        routes |= {"jacobian": lambda: whole(params, given.x, given.y), "autojac": jacobian}
    return routes


def steps(given: Case, engine: Engine) -> Routes:
    """Return the ways to an UPGrad direction, by name."""
    objective, params = functional(given)
    step, ours = jd.grad(objective, jd.upgrad()), jd.upgrad().weighting
    matrix = jd.gramian(objective)(params, given.x, given.y)
    assert ours is not None
    weighting = peer.UPGradWeighting()

    def theirs() -> None:
        """Weigh the losses by the Gramian, and differentiate once more."""
        given.watched.zero_grad()
        values = losses(given.watched, given)
        values.backward(weighting(engine.compute_gramian(values)))

    routes: Routes = {
        "step": lambda: step(None, params, given.x, given.y),
        "weights": lambda: ours(matrix),
        "step_torchjd": theirs,
    }
    if given.size == COMPILED.get(given.name) and not given.x.is_cuda:
        routes["step_compiled"] = partial(compiled(step), None, params, given.x, given.y)
    return routes


def graphs(given: Case) -> Routes:
    """Return the gradient of the mean loss, the Gramian and the step, in CUDA graphs."""
    objective, params = functional(given)
    mean = torch.func.grad(lambda params, x, y: objective(params, x, y).mean())
    step = jd.grad(objective, jd.upgrad())
    batch = params, given.x, given.y
    jd.init_state(jd.upgrad(), objective, *batch)  # plans; graphs replay it
    return {
        "plain_graph": partial(compiled(mean, "cuda"), *batch),
        "layerwise_graph": partial(compiled(jd.gramian(objective), "cuda"), *batch),
        "step_graph": partial(compiled(partial(step, None), "cuda"), *batch),
    }


def functional(given: Case) -> tuple[Any, dict[str, Tensor]]:
    """Return the objective and the parameters."""
    params = {key: value.detach() for key, value in given.net.named_parameters()}

    def fn(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Return one loss for each example."""
        scores = torch.func.functional_call(given.net, params, (x,))
        return F.cross_entropy(scores, y, reduction="none")

    return jd.instancewise(fn), params


def losses(net: nn.Module, given: Case) -> Tensor:
    """Return one loss for each example."""
    return F.cross_entropy(net(given.x), given.y, reduction="none")


def measure(
    name: str, size: Size, hopeless: set[str], seconds: float, device: str
) -> Iterator[Row]:
    """Time all routes of one case, but those that are hopeless; with the memory they take.

    Args:
        name: Which model.
        size: How large.
        hopeless: The routes to leave out; gains those that are too slow for the next size.
        seconds: How long to repeat.
        device: Where.

    Yields:
        The size, times in ms and peaks in MB.
    """
    given = case(name, size, device)
    engine = Engine(given.watched, batch_dim=0)
    routes = gramians(given, engine) | steps(given, engine)
    if device != "cpu":
        routes |= graphs(given)
    routes = {key: fn for key, fn in routes.items() if key not in hopeless}
    times = minima(routes, seconds, SLOW)
    known = [*given.net.parameters(), *given.watched.parameters(), given.x, given.y]
    eager = [key for key in times if "compiled" not in key and device == "cpu"]
    peaks = {key: _memory.peak(lambda *_, fn=routes[key]: fn(), *known) for key in eager}
    hopeless |= {key for key in routes if times.get(key, SLOW) > SLOW / 8}  # at twice the examples
    row: Row = {"model": name, **size._asdict(), "tokens": size.b * size.t}
    row |= {f"{key}_ms": 1e3 * value for key, value in times.items()}
    yield row | {f"{key}_mb": value / 1e6 for key, value in peaks.items()}


def error(name: str, size: Size, device: str) -> Iterator[Row]:
    """Measure the relative errors of float32 Gramians of a few examples, against float64 rows."""
    given = case(name, size._replace(b=SMALL), device)
    x, y = (part.unsqueeze(1) for part in (given.x, given.y))
    x = x.double() if x.is_floating_point() else x
    exact = given._replace(net=copy.deepcopy(given.net).double())
    flat = list(exact.net.parameters())
    grads = [
        torch.autograd.grad(losses(exact.net, exact._replace(x=x[i], y=y[i])).sum(), flat)
        for i in range(SMALL)
    ]
    rows = torch.stack([torch.cat([part.flatten() for part in row]) for row in grads])
    expected = rows @ rows.T
    routes = gramians(given, Engine(given.watched, batch_dim=0))
    found = {key: fn() for key, fn in routes.items() if key != "plain"}
    gaps = {
        f"{key}_error": float((value - expected).norm() / expected.norm())
        for key, value in found.items()
    }
    yield {"model": name, **given.size._asdict()} | gaps


def growth(rows: list[Row]) -> str:
    """Return the fitted exponents of each route, of b, T and d."""
    ranges = {
        "b": ("mlp", lambda row: True),
        "b (CNN)": ("cnn", lambda row: True),
        "T": ("transformer", lambda row: row["b"] == 32),
        "d": ("wide", lambda row: True),
    }
    keys, lines = dict.fromkeys((*GRAMIANS, *STEPS)), []
    for label, (model, keep) in ranges.items():
        own, by = [row for row in rows if row["model"] == model and keep(row)], label[0].lower()
        lines.append([label, *(exponent(own, by, f"{key}_ms") for key in keys)])
    return table(["size", *keys], lines)


def label(row: dict[str, Any]) -> str:
    """Return the size of a case."""
    tokens = f", T = {row['t']}" if row["model"] == "transformer" else ""
    return f"b = {row['b']}{tokens}" + (f", d = {row['d']}" if row["model"] == "wide" else "")


def report(rows: list[Row]) -> str:
    """Return times, ratios, peaks, errors and growth as Markdown."""
    timed = [row for row in rows if "plain_ms" in row]
    eager = [key for key in dict.fromkeys((*GRAMIANS, *STEPS)) if "compiled" not in key]
    parts = [
        _table(timed, GRAMIANS, "ms", (("layerwise", "plain"), ("autogram", "layerwise"))),
        _table(timed, STEPS, "ms", (("step", "plain"), ("step_torchjd", "step"))),
        _table(timed, eager, "mb", (("layerwise", "plain"), ("step", "plain"))),
        _table([row for row in rows if row not in timed], GRAMIANS[1:], "error", ()),
    ]
    if any("plain_graph_ms" in row for row in timed):
        ratios = (("layerwise_graph", "plain_graph"), ("step_graph", "plain_graph"))
        parts.append(_table(timed, GRAPHS, "ms", ratios))
    return "\n\n".join([*parts, f"Exponents of growth:\n\n{growth(timed)}"])


def _table(
    rows: list[Row], routes: Sequence[str], unit: str, ratios: Sequence[tuple[str, str]]
) -> str:
    """Return one quantity of each case, by route, and ratios between routes."""
    head = [*(f"{key}, {unit}" for key in routes), *(f"{x} / {y}" for x, y in ratios)]
    lines = []
    for row in rows:
        found = {key: row.get(f"{key}_{unit}", math.nan) for key in routes}
        shares = [found[x] / found[y] for x, y in ratios]
        lines.append([row["model"], label(row), *found.values(), *shares])
    return table(["model", "size", *head], lines)


def cells(models: Sequence[str], few: bool, seconds: float, device: str) -> list[Cell]:
    """Return the models at all their sizes."""
    warnings.filterwarnings("ignore", message="There is a performance drop")  # the peer, under vmap
    sizes, found = QUICK if few else SIZES if device == "cpu" else ON_DEVICE, list[Cell]()
    hopeless = defaultdict[str, set[str]](lambda: set(LONG if few else ()))
    for name in [name for name in models if name in sizes]:
        found.append((f"{name}, errors", partial(error, name, sizes[name][0], device)))
        for size in sizes[name]:
            title = f"{name}, {label({'model': name, **size._asdict()})}"
            found.append((title, partial(measure, name, size, hopeless[name], seconds, device)))
    return found


BENCHMARK = Benchmark(
    name="gramian",
    about=__doc__,
    cells=cells,
    report=report,
    full={"models": tuple(MODELS), "few": False, "seconds": 2.0, "device": "cpu"},
    quick={"few": True, "seconds": 1.0},
    choices={"models": MODELS, "device": DEVICES},
    draw=partial(_picture.panels, titles=TITLES, groups={"Gramian": GRAMIANS, "step": STEPS}),
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
