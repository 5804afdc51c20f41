"""Time the weights of each method against the object-oriented peer, over the number of objectives.

    OMP_NUM_THREADS=1 python -m benchmarks.methods [--sizes 2 4 8 ...] [--methods upgrad ...]

Gaussian gradients in 4 m dimensions, one thread; minima of interleaved repeats in one process.
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
from tqdm import tqdm

import torchjd_func as jd

RESULTS = pathlib.Path(__file__).parent / "results"
PAIRS: dict[str, tuple[Callable[[], jd.Aggregator], Callable[[], Any]]] = {
    "mean": (jd.mean, peer.MeanWeighting),
    "upgrad": (jd.upgrad, peer.UPGradWeighting),
    "dualproj": (jd.dualproj, peer.DualProjWeighting),
    "mgda": (jd.mgda, peer.MGDAWeighting),
    "pcgrad": (jd.pcgrad, peer.PCGradWeighting),
    "imtl_g": (jd.imtl_g, peer.IMTLGWeighting),
    "aligned_mtl": (jd.aligned_mtl, peer.AlignedMTLWeighting),
}
SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
N_GRAMIANS, SECONDS = 3, 1.0  # distinct inputs, and time for each pair and size


def minima(ours: Callable[[Any], Any], theirs: Callable[[Any], Any], inputs: list[Any]) -> Any:
    """Return the shortest mean time over the inputs of each function, in seconds, interleaved."""
    best, spent = [float("inf"), float("inf")], 0.0
    while spent < SECONDS or best[0] == float("inf"):
        for index, fn in enumerate((ours, theirs)):
            start = time.perf_counter()
            for value in inputs:
                fn(value)
            elapsed = time.perf_counter() - start
            best[index] = min(best[index], elapsed / len(inputs))
            spent += elapsed
    return best


def measure(name: str, m: int) -> dict[str, Any]:
    """Time one method at one size."""
    generator = torch.Generator().manual_seed(m)
    jacobians = [torch.randn(m, 4 * m, generator=generator) for _ in range(N_GRAMIANS)]
    gramians = [jac @ jac.mT for jac in jacobians]
    make, make_peer = PAIRS[name]
    rule, other = make(), make_peer()
    weighting = rule.weighting
    assert weighting is not None
    state = weighting.init(gramians[0], key=jd.random.key(0))
    ours, theirs = minima(lambda g: weighting(g, state), other, gramians)
    return {"method": name, "m": m, "ours_ms": 1e3 * ours, "torchjd_ms": 1e3 * theirs}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the ratios, TorchJD's time over ours, as Markdown."""
    sizes = sorted({row["m"] for row in rows})
    lines = ["| method | " + " | ".join(f"m = {m}" for m in sizes) + " |"]
    lines.append("|---" * (len(sizes) + 1) + "|")
    for name in dict.fromkeys(row["method"] for row in rows):
        ratios = {r["m"]: r["torchjd_ms"] / r["ours_ms"] for r in rows if r["method"] == name}
        lines.append(f"| `{name}` | " + " | ".join(f"{ratios[m]:.2g}" for m in sizes) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table of ratios, save all numbers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--methods", nargs="+", default=list(PAIRS), choices=PAIRS)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "methods.json")
    options = parser.parse_args(arguments)
    if min(options.sizes) < 2:
        parser.error(f"argument --sizes: must be at least 2, got {min(options.sizes)}")
    torch.set_num_threads(1)
    work = [(name, m) for name in options.methods for m in options.sizes]
    rows = [measure(name, m) for name, m in tqdm(work, unit="cell")]
    print(f"TorchJD's time divided by ours, torch {torch.__version__}, {platform.machine()}:\n")
    print(table(rows))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
