"""Time aggregation tensor by tensor against the object-oriented peer's loop over tensors.

    OMP_NUM_THREADS=1 python -m benchmarks.grouping [--layers 75] [--objectives 4] [--width 32]

A residual network of linear layers, two tensors each. The peer calls `jac_to_grad` on each tensor,
with an aggregator for each, as its documentation shows; `jd.grouped` solves for all tensors in one
call. One thread; minima of interleaved repeats in one process; both give the same gradients. Last,
the weights of many small groups alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torchjd.aggregation as peer
from torch import Tensor
from torch.func import vmap
from torchjd.autojac import backward, jac_to_grad

import torchjd_func as jd
from benchmarks._form import DEVICES, Benchmark, Cell, Routes, Row, compiled, main, minima, table

PAIRS: dict[str, tuple[Callable[[], jd.Aggregator], Callable[[], Any]]] = {
    "upgrad": (jd.upgrad, peer.UPGrad),
    "mgda": (jd.mgda, peer.MGDA),
    "gradvac": (jd.gradvac, peer.GradVac),
}
BATCH, N_GROUPS = 32, 200


def cells(
    methods: Sequence[str], layers: int, width: int, objectives: int, seconds: float, device: str
) -> list[Cell]:
    """Return the methods on one network, and many groups."""
    sizes = (layers, width, objectives, seconds, device)
    own = [(name, partial(measure, name, *sizes)) for name in methods]
    return [*own, ("groups", partial(groups, seconds, device))]


def losses(params: dict[str, Tensor], batch: Tensor, m: int) -> Tensor:
    """Return `m` losses of a residual network that do not agree."""
    hidden = batch
    for layer in range(len(params) // 2):
        update = torch.nn.functional.linear(hidden, params[f"{layer}.weight"])
        hidden = hidden + 0.1 * torch.tanh(update + params[f"{layer}.bias"])
    targets = torch.linspace(-1, 1, m, device=batch.device).unsqueeze(-1)
    return (hidden[:, :m].T - targets).square().mean(-1)


def network(layers: int, width: int, device: str, seed: int = 0) -> dict[str, Tensor]:
    """Return random parameters."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (width, width), "bias": (width,)}
    return {
        f"{layer}.{kind}": torch.randn(shape, generator=generator).to(device) / width**0.5
        for layer in range(layers)
        for kind, shape in shapes.items()
    }


def peer_loop(make: Callable[[], Any], params: list[Tensor]) -> Callable[[], None]:
    """Return the loop over tensors, given that each holds its Jacobian."""
    aggregators = [make() for _ in params]

    def loop() -> None:
        """Aggregate tensor by tensor."""
        for param, aggregator in zip(params, aggregators, strict=True):
            param.grad = None
            jac_to_grad([param], aggregator, retain_jac=True)

    return loop


def measure(
    name: str, layers: int, width: int, m: int, seconds: float, device: str
) -> Iterator[Row]:
    """Time the aggregation alone, and whole steps, eager and compiled."""
    make, make_peer = PAIRS[name]
    params = network(layers, width, device)
    batch = torch.randn(BATCH, width, generator=torch.Generator().manual_seed(1)).to(device)
    theirs = {key: value.clone().requires_grad_() for key, value in params.items()}
    flat = list(theirs.values())
    rule = jd.grouped(make(), jd.by_tensor)

    def objective(values: dict[str, Tensor]) -> Tensor:
        """Return the losses on the batch."""
        return losses(values, batch, m)

    state = jd.init_state(rule, objective, params, key=jd.random.key(0))
    jac = jd.jac(objective)(params)
    loop = peer_loop(make_peer, flat)

    def peer_step() -> None:
        """Differentiate, then aggregate tensor by tensor."""
        for param in flat:
            vars(param).pop("jac", None)
        backward(losses(theirs, batch, m))
        loop()

    step = jd.grad(objective, rule)
    peer_step()
    cases = {
        "aggregation": (partial(rule, jac, state), loop),
        "aggregation, compiled": (partial(compiled(rule, device), jac, state), loop),
        "step": (partial(step, state, params), peer_step),
        "step, compiled": (partial(compiled(step, device), state, params), peer_step),
    }
    for case, (ours, other) in cases.items():
        yield row(name, case, {"ours": ours, "torchjd": other}, seconds)


def groups(seconds: float, device: str) -> Iterator[Row]:
    """Time UPGrad for many groups of 8 objectives: one call, and one of the peer for each."""
    jacobians = torch.randn(N_GROUPS, 8, 32, generator=torch.Generator().manual_seed(0))
    jacobians = jacobians.to(device)
    gramians, other = jacobians @ jacobians.mT, peer.UPGradWeighting()
    weighting = jd.upgrad().weighting
    assert weighting is not None
    together = vmap(weighting)
    routes = {
        "ours": lambda: together(gramians),
        "torchjd": lambda: [other(gramian) for gramian in gramians],
    }
    yield row("upgrad", f"weights, {N_GROUPS} groups of 8", routes, seconds)


def row(name: str, case: str, routes: Routes, seconds: float) -> Row:
    """Return the times of one case."""
    times = {f"{key}_ms": 1e3 * value for key, value in minima(routes, seconds).items()}
    return {"method": name, "case": case} | times


def report(rows: list[Row]) -> str:
    """Return times and ratios as Markdown."""
    head = ["method", "what", "TorchJD, ms", "here, ms", "times faster"]
    lines = []
    for row in rows:
        ours, theirs = row["ours_ms"], row["torchjd_ms"]
        lines.append([f"`{row['method']}`", row["case"], theirs, ours, theirs / ours])
    return table(head, lines)


BENCHMARK = Benchmark(
    name="grouping",
    about=__doc__,
    cells=cells,
    report=report,
    full={
        "methods": tuple(PAIRS),
        "layers": 75,
        "width": 32,
        "objectives": 4,
        "seconds": 3.0,
        "device": "cpu",
    },
    quick={"methods": ("upgrad",), "layers": 10, "seconds": 0.5},
    choices={"methods": PAIRS, "device": DEVICES},
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
