"""Replay a plan in a graph, if what is compiled does what the plan was made for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _tree
from torchjd_func.differentiate._layerwise._followed import Followed
from torchjd_func.differentiate._layerwise._plan import Plan, Step
from torchjd_func.differentiate._layerwise._sources import Source, build, substitute
from torchjd_func.differentiate._layerwise._trace import Trace


class Replay(Trace):
    """Watches a run that is compiled, and does as planned.

    Args:
        handles: The parameters, as they are handed to the objective.
        followed: Holds the operations against the plan.
        plan: What operations become.
        perturbations: Zeros to add to the outputs of uses.
        frozen: The parameters for uses, if a derivative or transform is watching from without.
    """

    operations: Followed

    def __init__(
        self,
        handles: Sequence[Tensor],
        followed: Followed,
        plan: Plan,
        perturbations: Sequence[Tensor],
        frozen: Sequence[Tensor],
    ) -> None:
        super().__init__(handles, plan.layout, followed, plan, perturbations)
        self.handles = handles
        self.frozen = frozen
        self.changed = followed.changed

    def on_sources(self, given: list[Tensor]) -> bool:
        """Say whether parameters are used, where the plan says so."""
        return self.operations.places[-1] in self.operations.planned

    def may_write_parameters(self, target: Tensor, *args: Any, **kwargs: Any) -> bool:
        """Say whether the plan copies what an operation in place gives: no graph sees past vmap."""
        return not self.changed and self.operations.copies()

    def next_step(self, func: Callable[..., Any], given: Sequence[Tensor]) -> Step | None:
        """Return what the plan makes of the operation here, if it is applied to the same leaves."""
        step = self.operations.planned.pop(self.operations.places[-1])
        if self.changed:
            return None
        for x, made in zip(given, step.made, strict=True):
            if not made:  # or no more, as it was written to: a graph shows no versions
                self.sources.pop(x, None)
        sources = [self.sources[x] for x in given if x in self.sources]
        leaves = {leaf for source in sources for leaf in source.leaves}
        same = len(sources) == sum(step.made) and sorted(leaves) == sorted(step.leaves)
        traced = any(step.derives) and any([self.traced(x) for x in given if x not in self.sources])
        return step if same and not traced else None

    def note(self, x: Tensor, source: Source) -> None:
        """Note what a tensor is made of; where a graph writes to it otherwise, a plan says."""
        self.sources[x] = source

    def alias(self, tree: Any) -> Any:
        """Return the arguments, constants but for leaves with rows by autograd."""
        assert self.plan is not None
        opaque = self.plan.opaque

        def replace(x: Any) -> Any:
            if not isinstance(x, Tensor) or x not in self.sources:
                return x
            source = self.sources[x]
            by_autograd = [leaf in opaque for leaf in source.leaves]
            if all(by_autograd):
                return x
            if not (any(by_autograd) or self.frozen):
                return x.detach()  # which has no derivative at any level of torch.func
            fixed = self.frozen or [handle.detach() for handle in self.handles]
            pairs = enumerate(zip(self.handles, fixed, strict=True))
            values = [own if leaf in opaque else other for leaf, (own, other) in pairs]
            return build(source, [*values, *self.constants])

        return substitute(tree, replace)

    def ended(self, out: Tensor, arrays: Sequence[Tensor]) -> None:
        """Do nothing: a graph shows no nodes of autograd."""


def reaches(pullback: Callable[[Any], Any], outputs: Any, opaque: Sequence[int]) -> bool:
    """Say in a graph whether outputs depend on leaves that have rules otherwise than by uses.

    Uses take leaves as constants. So what still depends on one took another way, which a compiler
    may hide. A gradient that is there depends on the cotangent, and one that is not does not.

    Args:
        pullback: Of the outputs, to the outputs of uses and to all leaves.
        outputs: The losses.
        opaque: The leaves that have none.

    Returns:
        Whether they do.
    """
    seen: list[bool] = []

    def pulled(cotangent: Any) -> Any:
        by_leaves = pullback(cotangent)[1]
        rest = [x for leaf, x in enumerate(by_leaves) if leaf not in opaque]
        seen.append(any([x.requires_grad for x in rest]))
        return cotangent

    torch.func.vjp(pulled, _tree.map(torch.ones_like, outputs))
    return seen[0]


STRAY = "an operation on other parameters (perhaps hidden by the compiler, as `.T` is)"
