"""Run an objective twice: once to plan, once to record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from torchjd_func import _tree
from torchjd_func.differentiate._layerwise._record import PlanChanged, Record
from torchjd_func.differentiate._layerwise._scout import Scout
from torchjd_func.differentiate._layerwise._watch import Layout, Plan, Use

Call = Callable[[Sequence[Tensor]], tuple[Any, list[Tensor]]]


class Batch(NamedTuple):
    """The loss of one example, and how to map it over a batch."""

    fn: Callable[..., Any]
    places: tuple[int, ...]  # the arguments that are mapped over, or shared as they are
    args: tuple[Any, ...]
    dims: tuple[Any, ...]
    randomness: str

    def fill(self, args: tuple[Any, ...], example: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments of one example."""
        one = dict(zip(self.places, example, strict=True))
        return tuple(one.get(place, arg) for place, arg in enumerate(args))

    def map(self, fn: Callable[..., Any], fixed: tuple[Any, ...], dims: tuple[Any, ...]) -> Any:
        """Map `fn(*fixed, *example)` over the batch."""
        rest = tuple(self.dims[place] for place in self.places)
        given = [self.args[place] for place in self.places]
        return vmap(fn, in_dims=(*dims, *rest), randomness=self.randomness)(*fixed, *given)


class Recorded(NamedTuple):
    """One run of an objective."""

    outputs: Any
    aux: list[Tensor]
    plan: Plan
    uses: list[Use]
    values: list[Tensor]  # parameter leaves, then constants
    traced: tuple[int, ...]  # the leaves that the pullback knows
    pullback: Callable[[Any], tuple[list[Tensor], list[Tensor]]]  # by outputs, by traced leaves


def scout(
    call: Call,
    leaves: Sequence[Tensor],
    layout: Layout,
    examples: Sequence[Tensor],
    inputs: Sequence[Tensor],
    batch: Batch | None,
) -> Plan:
    """Run the objective once for its shapes."""
    handles = _alias(leaves)
    found: list[Plan] = []

    def run(*args: Any) -> list[Tensor]:
        """Watch one run."""
        mode = Scout(handles, layout, examples, _tree.tensors(args) if batch else inputs)
        with torch.no_grad(), mode:
            outputs, _ = call(handles, *args)
        found.append(mode.plan(outputs))
        return _tree.leaves(outputs)

    if batch is None:
        run()
    else:
        batch.map(run, (), ())
    return found[0]


def record(call: Call, leaves: Sequence[Tensor], plan: Plan, batch: Batch | None) -> Recorded:
    """Run the objective as planned, and keep what the pullback and the rules need."""
    frozen = _alias(leaves)
    traced = tuple(range(len(frozen)) if plan.blind else sorted(plan.opaque))
    uses: list[list[Use]] = []

    def run(perturbations: list[Tensor], primals: list[Tensor], *args: Any) -> Any:
        """Return outputs, auxiliary tensors, arrays of all uses, and constants."""
        handles = list(frozen)
        for leaf, primal in zip(traced, primals, strict=True):
            handles[leaf] = primal
        if plan.blind:
            uses.append([])
            outputs, aux = call(handles, *args)
            return outputs, (aux, [], [])
        mode = Record(handles, plan, perturbations)
        with mode:
            outputs, aux = call(handles, *args)
        if mode.place != len(plan.steps):
            raise PlanChanged
        uses.append(mode.uses)
        return outputs, (aux, [use.arrays for use in mode.uses], mode.constants)

    def mapped(perturbations: list[Tensor], primals: list[Tensor]) -> Any:
        """Run over all examples."""
        if batch is None:
            return run(perturbations, primals)
        return batch.map(run, (perturbations, primals), (0, None))

    steps = [step for step in plan.steps if step.use and not plan.blind]
    front = () if batch is None else (plan.layout.size,)
    zeros = [_zeros(step, (*front, *step.shape)) for step in steps]
    primals = [frozen[leaf].view_as(frozen[leaf]) for leaf in traced]
    result: Any = torch.func.vjp(mapped, zeros, primals, has_aux=True)
    outputs, pullback, (aux, arrays, constants) = result
    kept = [use._replace(arrays=found) for use, found in zip(uses[0], arrays, strict=True)]
    return Recorded(outputs, aux, plan, kept, [*frozen, *constants], traced, pullback)


def _alias(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return the same tensors as distinct objects, also where one is given twice."""
    return [leaf.view_as(leaf) for leaf in leaves]


def _zeros(step: Any, shape: tuple[int, ...]) -> Tensor:
    """Return zeros without memory."""
    return torch.zeros((), dtype=step.dtype, device=step.device).expand(shape)
