"""Show how a Gramian is computed layer by layer, and whether examples are independent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from torchjd_func import _check, _tree
from torchjd_func.differentiate._instancewise import InstanceWise
from torchjd_func.differentiate._layered import Observed, observe
from torchjd_func.differentiate._layerwise import (
    Layers,
    Recorded,
    layers,
    leaf_costs,
    name_of,
    rule_names,
    spread,
)
from torchjd_func.differentiate._objective import as_objective
from torchjd_func.differentiate._pullback import basis
from torchjd_func.differentiate._request import Request
from torchjd_func.differentiate._verb import check_devices


class LeafPlan(NamedTuple):
    """How one parameter's share of the Gramian is computed."""

    path: str
    shape: tuple[int, ...]
    rule: str  # the operations that use it, or why there is no rule
    contraction: str  # "factors", "rows", "m backward passes" or "none"
    size: int  # bytes held while it is computed


@dataclass(frozen=True, eq=False, slots=True)
class Explanation:
    """A table with one line for each parameter; `str` prints it."""

    leaves: tuple[LeafPlan, ...]
    m: int  # how many losses there are
    auto: str  # the route that `route="auto"` takes

    def __str__(self) -> str:
        """Return what is asked of the routes, and the table."""
        title = f'{self.m} losses; route="auto" is "{self.auto}", and "layerwise" goes so:'
        head = ("parameter", "shape", "rule", "contraction", "kB")
        lines = [
            (
                x.path,
                "x".join(map(str, x.shape)) or "-",
                x.rule,
                x.contraction,
                f"{x.size / 1e3:.1f}",
            )
            for x in self.leaves
        ]
        widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
        rows = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (head, *lines)
        ]
        return "\n".join([title, *rows])


def explain_gramian(
    fn: Callable[..., Any],
    *args: Any,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
) -> Explanation:
    """Say for each parameter how `route="layerwise"` computes its share of the Gramian.

    The objective runs once, forward and backward. Look for lines that say `m backward passes`:
    an unsupported operation uses the parameter there, at the cost of one backward pass a loss.

    Args:
        fn: The objective, as for `jd.gramian`.
        *args: Its arguments, such as parameters and a batch.
        argnums: As for `jd.gramian`.
        has_aux: As for `jd.gramian`.

    Returns:
        The explanation: `leaves` has the lines, `str` gives a table. `rule` names the operations
        that a parameter goes through; `contraction` says whether factors of the rows are multiplied
        or the rows themselves, whichever costs less; kB is what is held for this parameter alone.
        `auto` is what `route="auto"` takes.

    Example:
        >>> import torch, torchjd_func as jd
        >>> objective = jd.instancewise(lambda w, x: torch.nn.functional.linear(x, w).sum(1))
        >>> print(jd.explain_gramian(objective, torch.ones(3, 2), torch.ones(4, 2)))
        4 losses; route="auto" is "layerwise", and "layerwise" goes so:
        parameter  shape  rule    contraction  kB
                   3x2    linear  rows         0.1
    """
    objective = as_objective(fn)
    check_devices(args)
    seen = observe(objective, Request(argnums, has_aux, args=args))
    found = _layers(seen)
    paths, leaves = seen.bound.paths, seen.bound.leaves
    lines = [
        LeafPlan(path, tuple(leaf.shape), *_line(seen.recorded, found, place))
        for place, (path, leaf) in enumerate(zip(paths, leaves, strict=True))
    ]
    auto = "layerwise" if isinstance(objective, InstanceWise) else "jacobian"
    return Explanation(tuple(lines), len(seen.vector), auto)


def check_instancewise(
    fn: Callable[..., Any],
    *args: Any,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    n_examples: int = 3,
) -> None:
    """Check that loss i of an instance-wise objective depends on example i alone.

    The losses of a few examples are differentiated by every activation: those of other examples
    must not move them. It costs one forward and `n_examples` backward passes, and reads values;
    call it once, before training. Dropout is no obstacle.

    Args:
        fn: An objective of `jd.instancewise` or `jd.per_example`.
        *args: Its arguments, such as parameters and a batch.
        argnums: As for `jd.gramian`.
        has_aux: As for `jd.gramian`.
        n_examples: How many losses to look at, spread over the batch.

    Raises:
        TypeError: If `fn` is not declared instance-wise.
        ValueError: If a loss depends on other examples; it names the operations and parameters
            behind which that shows.

    Example:
        >>> import torch, torchjd_func as jd
        >>> objective = jd.instancewise(lambda w, x: (x @ w).softmax(0))
        >>> jd.check_instancewise(objective, torch.ones(2), torch.ones(4, 2))
        Traceback (most recent call last):
        ValueError: `losses` of an instance-wise objective must depend on their own example alone, \
got gradients of other examples behind matmul (parameter ''). Use an objective without \
jd.instancewise, or remove what mixes examples, such as normalisation over the batch.
    """
    if not isinstance(fn, InstanceWise):
        remedy = "Declare it with jd.instancewise or jd.per_example."
        _check.fail(TypeError, "`fn`", "be instance-wise", _check.describe(fn), remedy)
    _check.integer("n_examples", n_examples)
    for leaf in _tree.tensors(args):
        if leaf.is_meta:
            got, remedy = _check.describe(leaf), "Check on a device with memory."
            _check.fail(ValueError, "the arguments of the objective", "hold numbers", got, remedy)
    seen = observe(as_objective(fn), Request(argnums, has_aux, args=args), check=False)
    recorded, m = seen.recorded, seen.vector.shape[0]
    chosen = torch.linspace(0, m - 1, min(n_examples, m), device=seen.vector.device).long()
    found = _layers(seen)
    pulled = [recorded.pull(row, True, ())[0] for row in basis(seen.vector)[chosen]]
    by_uses = [torch.stack(grads) for grads in zip(*pulled, strict=True)]
    paths = seen.bound.paths
    guilty = [
        f"{name_of(recorded.uses[use].step.func)} (parameter {paths[leaf]!r})"
        for leaf, pieces in sorted(found.pieces.items())
        for use in {piece.use for piece in pieces}
        if _strays(recorded, use, by_uses[use], chosen // found.each)
    ]
    if guilty:
        name, rule = "`losses` of an instance-wise objective", "depend on their own example alone"
        got = "gradients of other examples behind " + ", ".join(guilty[:4])
        remedy = (
            "Use an objective without jd.instancewise, or remove what mixes examples, such as "
            "normalisation over the batch."
        )
        _check.fail(ValueError, name, rule, got, remedy)


def _layers(seen: Observed) -> Layers:
    """Pull back what the route would pull back."""
    shared = seen.recorded.plan.layout.kind == "shared"
    eye = basis(seen.vector)
    cotangents = eye if shared else torch.ones_like(seen.vector)
    return layers(seen.recorded, cotangents, lambda: eye, seen.vector.shape[0])


def _line(recorded: Recorded, found: Layers, leaf: int) -> tuple[str, str, int]:
    """Return rule, contraction and bytes of one leaf."""
    if leaf in found.rows:
        rows, reasons = found.rows[leaf], recorded.plan.reasons
        rule = reasons.get(leaf, "used where torch differentiates")
        return rule, "m backward passes", rows.numel() * rows.element_size()
    if leaf not in found.pieces:
        return "not used", "none", 0
    return (rule_names(found, leaf), *leaf_costs(found, leaf))


def _strays(recorded: Recorded, use: int, grads: Tensor, chosen: Tensor) -> bool:
    """Say whether losses of chosen examples move the output of a use for others, `(k, ...)`."""
    step, layout = recorded.uses[use].step, recorded.plan.layout
    apart = vmap(lambda grad: spread(grad, step.axis, layout))(grads)[..., None].flatten(2)
    own = torch.arange(apart.shape[1], device=apart.device) == chosen[:, None]
    others = torch.where(own[..., None], 0, apart).abs().max()
    return bool(others > torch.finfo(apart.dtype).eps ** 0.5 * apart.abs().max())
