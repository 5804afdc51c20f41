"""Time aggregation tensor by tensor against the object-oriented peer's loop over tensors.

    OMP_NUM_THREADS=1 python -m benchmarks.grouping [--layers 75] [--objectives 4] [--width 32]

A residual network of linear layers, two tensors each. The peer calls `jac_to_grad` on each tensor,
with an aggregator for each, as its documentation shows; `jd.grouped` solves for all tensors in one
call. One thread; minima of interleaved repeats in one process; both give the same gradients.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchjd.aggregation as peer
from torch import Tensor
from torchjd.autojac import backward, jac_to_grad
from tqdm import tqdm

import torchjd_func as jd

RESULTS = pathlib.Path(__file__).parent / "results"
PAIRS: dict[str, tuple[Callable[[], jd.Aggregator], Callable[[], Any]]] = {
    "upgrad": (jd.upgrad, peer.UPGrad),
    "mgda": (jd.mgda, peer.MGDA),
    "gradvac": (jd.gradvac, peer.GradVac),
}
BATCH, SECONDS = 32, 3.0  # examples, and time for each case


def losses(params: dict[str, Tensor], batch: Tensor, m: int) -> Tensor:
    """Return `m` losses of a residual network that do not agree."""
    hidden = batch
    for layer in range(len(params) // 2):
        update = torch.nn.functional.linear(hidden, params[f"{layer}.weight"])
        hidden = hidden + 0.1 * torch.tanh(update + params[f"{layer}.bias"])
    targets = torch.linspace(-1, 1, m).unsqueeze(-1)
    return (hidden[:, :m].T - targets).square().mean(-1)


def network(layers: int, width: int, seed: int = 0) -> dict[str, Tensor]:
    """Return random parameters."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (width, width), "bias": (width,)}
    return {
        f"{layer}.{kind}": torch.randn(shape, generator=generator) / width**0.5
        for layer in range(layers)
        for kind, shape in shapes.items()
    }


def peer_loop(make: Callable[[], Any], params: list[Tensor]) -> Callable[[Any], None]:
    """Return the loop over tensors, given that each holds its Jacobian."""
    aggregators = [make() for _ in params]

    def loop(_: Any) -> None:
        """Aggregate tensor by tensor."""
        for param, aggregator in zip(params, aggregators, strict=True):
            param.grad = None
            jac_to_grad([param], aggregator, retain_jac=True)

    return loop


def measure(name: str, layers: int, width: int, m: int) -> list[dict[str, Any]]:
    """Time the aggregation alone, and whole steps, eager and compiled."""
    make, make_peer = PAIRS[name]
    params = network(layers, width)
    batch = torch.randn(BATCH, width, generator=torch.Generator().manual_seed(1))
    theirs = {key: value.clone().requires_grad_() for key, value in params.items()}
    flat = list(theirs.values())
    rule = jd.grouped(make(), jd.by_tensor)

    def objective(values: dict[str, Tensor]) -> Tensor:
        """Return the losses on the batch."""
        return losses(values, batch, m)

    state = jd.init_state(rule, objective, params, key=jd.random.key(0))
    jac = jd.jac(objective)(params)
    loop = peer_loop(make_peer, flat)

    def peer_step(_: Any) -> None:
        """Differentiate, then aggregate tensor by tensor."""
        for param in flat:
            vars(param).pop("jac", None)
        backward(losses(theirs, batch, m))
        loop(None)

    step = jd.grad(objective, rule)
    peer_step(None)
    cases = {
        "aggregation": (rule, (jac, state), loop),
        "aggregation, compiled": (_compiled(rule), (jac, state), loop),
        "step": (step, (state, params), peer_step),
        "step, compiled": (_compiled(step), (state, params), peer_step),
    }
    return [_row(name, case, *parts) for case, parts in cases.items()]


def _compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as one graph."""
    return torch.compile(lambda *args: fn(*args), fullgraph=True)


def _row(
    name: str, case: str, fn: Callable[..., Any], args: tuple[Any, ...], loop: Callable[[Any], None]
) -> dict[str, Any]:
    """Return the times of one case, after a first call of each."""
    fn(*args)
    ours, theirs = _minima(lambda: fn(*args), lambda: loop(None))
    return {"method": name, "case": case, "ours_ms": 1e3 * ours, "torchjd_ms": 1e3 * theirs}


def _minima(*functions: Callable[[], Any]) -> list[float]:
    """Return the shortest time of each function, in seconds, interleaved."""
    best, spent = [float("inf")] * len(functions), 0.0
    while spent < SECONDS or float("inf") in best:
        for index, fn in enumerate(functions):
            start = time.perf_counter()
            fn()
            elapsed = time.perf_counter() - start
            best[index], spent = min(best[index], elapsed), spent + elapsed
    return best


def table(rows: list[dict[str, Any]]) -> str:
    """Return times and ratios as Markdown."""
    lines = ["| method | what | TorchJD, ms | here, ms | times faster |", "|---" * 5 + "|"]
    for row in rows:
        ours, theirs = row["ours_ms"], row["torchjd_ms"]
        cells = (f"`{row['method']}`", row["case"], f"{theirs:.3g}", f"{ours:.3g}")
        lines.append(f"| {' | '.join(cells)} | {theirs / ours:.3g} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, save all numbers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grouping", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--layers", type=int, default=75)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--objectives", type=int, default=4)
    parser.add_argument("--methods", nargs="+", default=list(PAIRS), choices=PAIRS)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "grouping.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sizes = (options.layers, options.width, options.objectives)
    rows = [row for name in tqdm(options.methods) for row in measure(name, *sizes)]
    shape = f"{2 * options.layers} tensors, m = {options.objectives}, width {options.width}"
    print(f"{shape}, torch {torch.__version__}, {platform.machine()}:\n\n{table(rows)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
