"""The second run of an objective: perturb what the plan names, and keep its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torchjd_func.differentiate._layerwise._sources import tensors_in
from torchjd_func.differentiate._layerwise._watch import Plan, Use, Watch


class Record(Watch):
    """The second run: perturbs what the plan names, and keeps its arguments."""

    def __init__(
        self,
        handles: Sequence[Tensor],
        plan: Plan,
        perturbations: Sequence[Tensor],
    ) -> None:
        super().__init__(handles, plan.layout)
        self.plan = plan
        self.perturbations = perturbations
        self.place = 0
        self.uses: list[Use] = []

    def on_parameters(
        self, func: Callable[..., Any], args: Any, kwargs: Any, given: list[Tensor]
    ) -> Any:
        """Do as the plan says."""
        step = self.plan.steps[self.place] if self.place < len(self.plan.steps) else None
        if step is None or step.func != func:  # getters such as `.T` are equal, not the same
            out = func(*args, **kwargs)
            if tensors_in(out):
                raise PlanChanged
            return out
        self.place += 1
        if not step.use:
            out = func(*args, **kwargs)
            if step.derives:
                self.derived(func, args, kwargs, out)
            return out
        out = self.run(func, *args, **kwargs)
        if out.shape != step.shape:
            raise PlanChanged
        self.uses.append(Use(step, *self.mark(args, kwargs)))
        return out + self.perturbations[len(self.uses) - 1]


class PlanChanged(Exception):
    """The objective did not run as it did the first time."""
