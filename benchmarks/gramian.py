"""Time instance-wise Gramians and steps against one plain backward, and the object-oriented peer.

    OMP_NUM_THREADS=1 python -m benchmarks.gramian [--quick] [--models mlp cnn transformer wide]

Gramians of b losses, one for each example: layer by layer, from the whole Jacobian, and by the
peer's `autogram.Engine` and `autojac.jac`. Whole UPGrad steps to gradients, and their `weights`
alone, beside the gradients of the mean loss (`plain`: forward and backward). One thread; minima of
interleaved repeats in one process; the peak of the bytes that a call makes; errors against float64
rows. A dash: a repeat may take longer than 10 s (8 times that of half the examples), or a
Jacobian more than 0.2 GB.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import itertools
import json
import math
import pathlib
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torchjd.aggregation as peer
from torch import Tensor, nn
from torch.nn import functional as F
from torchjd.autogram import Engine
from torchjd.autojac import jac as autojac

import torchjd_func as jd
from benchmarks import _memory, _picture

RESULTS = pathlib.Path(__file__).parent / "results"
Routes = dict[str, Callable[[], Any]]
CLASSES, WORDS = 10, 1000
ROUNDS, SECONDS = (5, 20), 2.0  # fewest and most repeats, and time for each case
SHORT = 0.2  # seconds up to which calls are repeated at once, as in training
SLOW, LARGE = 10.0, 2 * 10**8  # seconds for one repeat and bytes of a Jacobian that are too many
SMALL = 8  # examples that the errors are measured on


class Size(NamedTuple):
    """How large a case is."""

    b: int  # examples
    d: int = 512  # features of hidden layers
    t: int = 1  # tokens


class Case(NamedTuple):
    """A model at one size, and one batch."""

    name: str
    size: Size
    net: nn.Module
    watched: nn.Module  # the same, with the hooks of the peer's engine
    x: Tensor
    y: Tensor


class Block(nn.Module):
    """One layer of a transformer, normalised first."""

    def __init__(self, d: int, heads: int = 4):
        """Draw the parameters."""
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.pack, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        """Return the features `(b, t, d)` of all tokens."""
        packed = self.pack(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Classifies sequences of tokens by the mean of their features."""

    def __init__(self, d: int, t: int, layers: int = 4):
        """Draw the parameters."""
        super().__init__()
        self.embedding, self.places = nn.Embedding(WORDS, d), nn.Parameter(torch.zeros(t, d))
        self.blocks = nn.Sequential(*(Block(d) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the classes, `(b, CLASSES)`."""
        return self.head(self.blocks(self.embedding(x) + self.places).mean(1))


def mlp(size: Size, p: int = 784) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a network of three layers, and the shape of an example."""
    widths = (p, size.d, size.d, CLASSES)
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]), (p,)


def cnn(size: Size) -> tuple[nn.Module, tuple[int, ...]]:
    """Return three convolutions and a linear layer, for images of 32 by 32."""
    layers: list[nn.Module] = []
    for p, q in ((3, 32), (32, 64)):
        layers += [nn.Conv2d(p, q, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4096, CLASSES)]
    return nn.Sequential(*layers), (3, 32, 32)


MODELS: dict[str, Callable[[Size], tuple[nn.Module, tuple[int, ...]]]] = {
    "mlp": mlp,
    "cnn": cnn,
    "transformer": lambda size: (Transformer(size.d, size.t), (size.t,)),
    "wide": lambda size: mlp(size, size.d),
}
SIZES = {
    "mlp": [Size(b) for b in (32, 64, 128, 256, 512)],
    "cnn": [Size(b, 64) for b in (32, 64, 128, 256)],
    "transformer": [Size(b, 256, t) for t in (16, 64) for b in (16, 32)],
    "wide": [Size(64, d) for d in (512, 1024, 2048)],
}
QUICK = {"mlp": [Size(32), Size(64)], "cnn": [Size(32, 64)], "transformer": [Size(16, 256, 16)]}
LONG = ("compiled", "step_compiled", "jacobian", "autojac")  # not in a quick run
COMPILED = {"mlp": Size(64), "cnn": Size(64, 64)}
TITLES = {
    "mlp": ("MLP 784-512-512-10", "b", "examples b"),
    "cnn": ("CNN, three convolutions", "b", "examples b"),
    "transformer": ("transformer, 4 layers, d = 256", "tokens", "tokens b T"),
    "wide": ("MLP d-d-d-10, b = 64", "d", "features d"),
}
GRAMIANS = ("plain", "layerwise", "compiled", "jacobian", "autogram", "autojac")
STEPS = ("plain", "step", "weights", "step_compiled", "step_torchjd")


def case(name: str, size: Size) -> Case:
    """Return a model with a random batch."""
    torch.manual_seed(0)
    net, shape = MODELS[name](size)
    x = torch.randn(size.b, *shape)
    if name == "transformer":
        x = torch.randint(WORDS, (size.b, *shape))
    return Case(name, size, net, copy.deepcopy(net), x, torch.randint(CLASSES, (size.b,)))


def gramians(given: Case, engine: Engine) -> Routes:
    """Return the ways to the Gramian of the losses, by name."""
    objective, params = functional(given)
    flat = list(given.net.parameters())

    def jacobian() -> Tensor:
        """Build the peer's Jacobian, and multiply."""
        rows = [rows.flatten(1) for rows in autojac(losses(given.net, given), flat)]
        return torch.stack([matrix @ matrix.T for matrix in rows]).sum(0)

    by_layer = jd.gramian(objective, method="layerwise")
    whole = jd.gramian(objective, method="jacobian")
    routes: Routes = {
        "plain": lambda: torch.autograd.grad(losses(given.net, given).mean(), flat),
        "layerwise": lambda: by_layer(params, given.x, given.y),
        "autogram": lambda: engine.compute_gramian(losses(given.watched, given)),
    }
    if given.size == COMPILED.get(given.name):
        compiled = torch.compile(by_layer, fullgraph=True)
        routes["compiled"] = lambda: compiled(params, given.x, given.y)
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
    if given.size == COMPILED.get(given.name):
        compiled = torch.compile(step, fullgraph=True)
        routes["step_compiled"] = lambda: compiled(None, params, given.x, given.y)
    return routes


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


def minima(routes: Routes) -> dict[str, float]:
    """Return the shortest time of each route, in seconds, interleaved; without the slow ones."""
    first = {name: seconds(route) for name, route in routes.items()}  # not counted: warms up
    kept = [name for name in routes if first[name] < SLOW or "compiled" in name]
    best, spent, rounds = dict.fromkeys(kept, math.inf), 0.0, 0
    while rounds < ROUNDS[0] or (spent < SECONDS and rounds < ROUNDS[1]):
        for name in kept if rounds % 2 else reversed(kept):  # not always after the same one
            taken = [seconds(routes[name]) for _ in range(3 if best[name] < SHORT else 1)]
            best[name], spent = min(best[name], *taken), spent + sum(taken)
        rounds += 1
    return best


def seconds(route: Callable[[], Any]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    route()
    return time.perf_counter() - start


def measure(name: str, size: Size, hopeless: set[str]) -> dict[str, Any]:
    """Time all routes of one case, but those that are hopeless; with the memory they take.

    Args:
        name: Which model.
        size: How large.
        hopeless: The routes to leave out; gains those that are too slow for the next size.

    Returns:
        The size, times in ms and peaks in MB.
    """
    given = case(name, size)
    engine = Engine(given.watched, batch_dim=0)
    routes = gramians(given, engine) | steps(given, engine)
    routes = {key: fn for key, fn in routes.items() if key not in hopeless}
    times = minima(routes)
    known = [*given.net.parameters(), *given.watched.parameters(), given.x, given.y]
    eager = [key for key in times if "compiled" not in key]
    peaks = {key: _memory.peak(lambda *_, fn=routes[key]: fn(), *known) for key in eager}
    hopeless |= {key for key in routes if times.get(key, SLOW) > SLOW / 8}  # at twice the examples
    row: dict[str, Any] = {"model": name, **size._asdict(), "tokens": size.b * size.t}
    row |= {f"{key}_ms": 1e3 * value for key, value in times.items()}
    return row | {f"{key}_mb": value / 1e6 for key, value in peaks.items()}


def error(name: str, size: Size) -> dict[str, Any]:
    """Return the relative errors of float32 Gramians of a few examples, against float64 rows."""
    given = case(name, size._replace(b=SMALL))
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
    gaps = {key: float((value - expected).norm() / expected.norm()) for key, value in found.items()}
    return {"model": name, **given.size._asdict()} | gaps


def exponent(rows: list[dict[str, Any]], key: str, by: str) -> float:
    """Fit `a` in `time ~ size^a`."""
    points = [(row[by], row[key]) for row in rows if key in row]
    if len({x for x, _ in points}) < 2:
        return math.nan
    logs = np.log(np.array(points))
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the fitted exponents of each route, of b, T and d."""
    ranges = {
        "b": ("mlp", lambda row: True),
        "b (CNN)": ("cnn", lambda row: True),
        "T": ("transformer", lambda row: row["b"] == 32),
        "d": ("wide", lambda row: True),
    }
    found = []
    for label, (model, keep) in ranges.items():
        own = [row for row in rows if row["model"] == model and keep(row)]
        keys = dict.fromkeys((*GRAMIANS, *STEPS))
        by = label[0].lower()
        found.append({"size": label} | {key: exponent(own, f"{key}_ms", by) for key in keys})
    return found


def table(rows: list[dict[str, Any]], head: Sequence[str], lead: int) -> str:
    """Return rows of cells as Markdown, the first `lead` columns as they are."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = list(row.values())
        shown = [*map(str, cells[:lead]), *map(digits, cells[lead:])]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def digits(value: float) -> str:
    """Return three digits of a number; a dash for none."""
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def label(row: dict[str, Any]) -> str:
    """Return the size of a case."""
    tokens = f", T = {row['t']}" if row["model"] == "transformer" else ""
    return f"b = {row['b']}{tokens}" + (f", d = {row['d']}" if row["model"] == "wide" else "")


def report(rows: list[dict[str, Any]]) -> str:
    """Return times, ratios and peaks as Markdown."""
    parts = []
    for routes, ours, others in ((GRAMIANS, "layerwise", "autogram"), (STEPS, "step", STEPS[-1])):
        head = ["model", "size", *(f"{key}, ms" for key in routes)]
        head += ["x plain", f"faster than {others}"]
        parts.append(table([_times(row, routes, ours, others) for row in rows], head, 2))
    routes = [key for key in dict.fromkeys((*GRAMIANS, *STEPS)) if "compiled" not in key]
    head = ["model", "size", *(f"{key}, MB" for key in routes), "layerwise x plain", "step x plain"]
    parts.append(table([_peaks(row, routes) for row in rows], head, 2))
    return "\n\n".join(parts)


def _times(row: dict[str, Any], routes: Sequence[str], ours: str, others: str) -> dict[str, Any]:
    """Return the cells of one row of times."""
    cells = {"model": row["model"], "size": label(row)}
    cells |= {key: row.get(f"{key}_ms", math.nan) for key in routes}
    cells["ratio"] = cells[ours] / cells["plain"]
    return cells | {"faster": cells[others] / cells[ours]}


def _peaks(row: dict[str, Any], routes: Sequence[str]) -> dict[str, Any]:
    """Return the cells of one row of peaks."""
    cells = {"model": row["model"], "size": label(row)}
    cells |= {key: row.get(f"{key}_mb", math.nan) for key in routes}
    ratios = {f"{key}_ratio": cells[key] / cells["plain"] for key in ("layerwise", "step")}
    return cells | ratios


def machine() -> dict[str, Any]:
    """Return where and when this is measured."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchjd")}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": today, **versions, "machine": platform.machine(), "threads": 1}


def run(name: str, sizes: list[Size], without: set[str]) -> dict[str, Any]:
    """Measure all cases of one model, and say how far it is."""
    rows, errors, hopeless = [], [error(name, sizes[0])], set(without)
    for size in sizes:
        rows.append(measure(name, size, hopeless))
        print(f"{name}, {label(rows[-1])}: {_progress(rows[-1])}", flush=True)
    return {"machine": {name: machine()}, "rows": rows, "errors": errors}


def merge(found: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """Write what is found of one model to a file, beside what it has of others."""
    (name,) = found["machine"]
    old = json.loads(path.read_text()) if path.exists() else {"machine": {}, "rows": []}
    both: dict[str, Any] = {"machine": old["machine"] | found["machine"]}
    for key in ("rows", "errors"):
        kept = [row for row in old.get(key, []) if row["model"] != name] + found[key]
        both[key] = sorted(kept, key=lambda row: list(MODELS).index(row["model"]))
    both["growth"] = growth(both["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(both, indent=1) + "\n")
    return both


def _progress(row: dict[str, Any]) -> str:
    """Return the times of a row in one line."""
    return ", ".join(f"{key[:-3]} {digits(row[key])}" for key in row if key.endswith("_ms")) + " ms"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables, save all numbers and the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gramian", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--quick", action="store_true", help="few sizes, in about a minute")
    parser.add_argument("--out", type=pathlib.Path, help="default: results, or temporary if quick")
    options = parser.parse_args(arguments)
    folder = pathlib.Path(tempfile.gettempdir()) if options.quick else RESULTS
    out = options.out or folder / "gramian.json"
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="There is a performance drop")  # the peer, under vmap
    sizes, without = (QUICK if options.quick else SIZES), set[str](LONG if options.quick else ())
    found: dict[str, Any] = {}
    for name in [name for name in options.models if name in sizes]:
        found = merge(run(name, sizes[name], without), out)
    print(f"\n{report(found['rows'])}\n\nRelative error, b = {SMALL}:\n")
    print(*found["errors"], "\nExponents of growth:\n", sep="\n")
    print(table(found["growth"], list(found["growth"][0]), 1))
    picture = out.with_suffix(".png")
    print(f"\nPicture: {_picture.panels(found['rows'], TITLES, (GRAMIANS, STEPS), picture)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
