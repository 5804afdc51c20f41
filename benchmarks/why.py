"""Draw what conflict does: two losses, and the steps of the mean and of UPGrad.

python -m benchmarks.why    # writes benchmarks/results/why.png
"""

from __future__ import annotations

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import torchjd_func as jd
from benchmarks._form import RESULTS
from benchmarks._picture import STYLE

RULES = {"UPGrad": jd.upgrad(), "mean": jd.mean()}
COLORS = ["#0072B2", "#D55E00"]  # as `jd.plot.cone` has them
START, STEPS, RATE = torch.tensor([0.75, 1.0]), 600, 0.02


def losses(x: Tensor) -> Tensor:
    """Return a flat bowl around (0, 1), and a steep valley along a line through (1, 0)."""
    flat = (x - x.new_tensor([0.0, 1.0])).square().sum()
    turned = x.new_tensor([[0.8, 0.6], [-0.6, 0.8]]) @ (x - x.new_tensor([1.0, 0.0]))
    return torch.stack([flat, (x.new_tensor([0.3, 3.0]) * turned.square()).sum()])


def descend(rule: jd.Aggregator) -> Tensor:
    """Return the losses along plain gradient descent, `(steps, 2)`."""
    points, gradient = [START], jd.grad(losses, rule)
    for _ in range(STEPS):
        points.append(points[-1] - RATE * gradient(None, points[-1])[0])
    return torch.stack([losses(point) for point in points])


def draw_losses(axis: Axes) -> None:
    """Draw both losses from the same start; where the first is worse than there is shaded."""
    for (name, rule), color in zip(RULES.items(), COLORS, strict=True):
        jd.plot.trajectories(descend(rule), label=name, color=color, ax=axis)
    first = float(losses(START)[0])
    axis.axvspan(first, axis.get_xlim()[1], color="0.5", alpha=0.12, linewidth=0)
    axis.annotate(
        "loss 1 is worse\nthan at the start", (first, 1.85), (70, 0), textcoords="offset points"
    )
    axis.set(xlabel="loss 1", ylabel="loss 2", title="the losses, from circle to star")


def main() -> None:
    """Draw the gradients at the start beside the losses that follow."""
    jac = jd.jac(losses)(START)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        cone, path = figure.subplots(1, 2)
        jd.plot.cone(jac, {name: rule(jac)[0] for name, rule in RULES.items()}, ax=cone)
        cone.set(xlim=(-5, 5), ylim=(-1, 6), title="two gradients, at the start")
        cone.legend(loc="lower left", fontsize="small")
        draw_losses(path)
        figure.savefig(RESULTS / "why.png", dpi=130, facecolor="white")


if __name__ == "__main__":
    main()
