"""Follow parameters through one run of an objective.

The run is ordinary: autograd differentiates whatever the objective does, and is right about hooks,
modes, writes by index and functions of one's own. Beside it, operations whose derivative by
parameters has a known form are taken out, and gradients by their outputs are wanted instead: by the
places of these in the graph of autograd, or by zeros that are added to them, where that graph is
out of reach (compiled, mapped). A parameter that autograd reaches on another way than through such
uses has rows by autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torchjd_func._host import version_of
from torchjd_func.differentiate._layerwise import _attention, _recurrent, _rules
from torchjd_func.differentiate._layerwise._functions import attribute_of, is_getter, name_of
from torchjd_func.differentiate._layerwise._local import IN_PLACE
from torchjd_func.differentiate._layerwise._operations import Operations
from torchjd_func.differentiate._layerwise._plan import Layout, Plan, Step
from torchjd_func.differentiate._layerwise._sources import (
    Place,
    Source,
    derive,
    numbers_in,
    of_constant,
    of_leaf,
    pick,
    substitute,
    tensors_in,
)
from torchjd_func.differentiate._layerwise._spelled import spelled


class Use(NamedTuple):
    """One recognised operation: its arguments, with sources for parameters, places for the rest."""

    step: Step
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    arrays: list[Tensor]  # what lies at the places


class Trace(TorchFunctionMode):
    """Watches one run, and does as planned.

    Args:
        handles: The parameters, as they are handed to the objective.
        layout: How the objective treats examples.
        operations: Numbers tensors, and knows where their examples lie.
        plan: What operations become, where that is decided.
        perturbations: Zeros to add to the outputs of uses; `None` to note their places.
    """

    def __init__(
        self,
        handles: Sequence[Tensor],
        layout: Layout,
        operations: Operations,
        plan: Plan | None = None,
        perturbations: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.operations = operations
        self.plan = plan
        self.perturbations = perturbations
        self.count = len(handles)
        self.constants: list[Tensor] = []
        self.sources: dict[Tensor, Source] = {}
        self.versions: dict[Tensor, int] = {}  # of what has a source
        self.ids: set[int] = set()
        for leaf, handle in enumerate(handles):
            self.note(handle, of_leaf(leaf))
        self.around: dict[Any, list[Any]] = {}  # the nodes where uses end, with those before them
        self.steps: list[Step] = []
        self.uses: list[Use] = []
        self.edges: list[GradientEdge] = []  # the outputs of uses
        self.changed: list[str] = []  # the operations that are not as planned
        self.checked = 0  # how many operations were held against the plan

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation, and remember it if it uses parameters."""
        if is_getter(func):
            value = func(*args)
            if not isinstance(value, Tensor):  # such as a shape
                return value
        kwargs = kwargs or {}
        if func is F.batch_norm:
            _rules.check_batch_norm(self.layout.kind, args, kwargs)
        if func is F.multi_head_attention_forward:
            named = _attention.arguments(args, kwargs)
            if _attention.is_plain(named):
                return _attention.attention(self.apply, named)
        name = str(name_of(func))  # in graphs only then a text (torch 2.13)
        if _recurrent.is_plain(name, args, kwargs):
            return _recurrent.recurrent(self.apply, name, args)
        alone = IN_PLACE.get(name)
        if alone is not None and self.may_write_parameters(*args, **kwargs):
            # What a use was applied to must stay, to be differentiated
            out = self.apply(alone, self.apply(Tensor.clone, args[0]), *args[1:], **kwargs)
            return self.apply(Tensor.copy_, args[0], out)
        return self.apply(func, *args, **kwargs)

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one operation; in few steps, which a compiler traces."""
        given = self.operations.begin(func, args, kwargs)
        if self.on_sources(given):
            out = self.on_parameters(func, args, kwargs, given)
        else:
            out = self.run(func, *args, **kwargs)
        self.operations.end(out, given)
        return out

    def on_sources(self, given: list[Tensor]) -> bool:
        """Say whether some tensor is made of parameters."""
        if self.ids.isdisjoint(map(id, given)):  # most, and fast
            return False
        return any([x in self.sources and self.source(x) is not None for x in given])

    def may_write_parameters(self, target: Tensor, *args: Any, **kwargs: Any) -> bool:
        """Say whether something made of parameters may go into another tensor, in place."""
        given = tensors_in((args, kwargs))
        real = all([x.is_floating_point() for x in (target, *given)])
        # Alike with another batch: what all examples share is smaller, whatever it is made of
        alone, size = self.layout.kind != "batched", target.numel()
        return real and any([self.traced(x) and (alone or x.numel() < size) for x in given])

    def note(self, x: Tensor, source: Source) -> None:
        """Note what a tensor is made of."""
        self.sources[x] = source
        self.versions[x] = version_of(x)
        self.ids.add(id(x))

    def source(self, x: Tensor) -> Source | None:
        """Return what a tensor is made of, unless it was written to since."""
        found = self.sources.get(x)
        if found is not None and self.versions[x] != version_of(x):
            del self.sources[x]
            return None
        return found

    def traced(self, x: Tensor) -> bool:
        """Say whether autograd traces a tensor back to parameters."""
        return x.requires_grad or self.mapped(x).requires_grad

    def run(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run an operation in a form that torch differentiates right."""
        return spelled(func, self.layout.kind != "batched")(*args, **kwargs)

    def on_parameters(
        self, func: Callable[..., Any], args: Any, kwargs: Any, given: list[Tensor]
    ) -> Any:
        """Run an operation with parameters as planned."""
        step = self.next_step(func, given)
        if step is None:
            out = self.run(func, *args, **kwargs)
            if tensors_in(out):
                self.changed.append(name_of(func))
            return out
        step = step if step.func is func else step._replace(func=func)
        self.steps.append(step)
        if not step.use:
            out = self.run(func, *args, **kwargs)
            if step.derives:
                self.derived(step, args, kwargs, out)
            return out
        out = self.run(func, *self.alias(args), **self.alias(kwargs))
        out = out.clone() if step.copied else out
        lost = self.perturbations is None and not out.requires_grad
        other = out.shape != step.shape or out.dtype != step.dtype
        if other or lost or not _has(step.numbers, args, kwargs):
            self.changed.append(name_of(func))
            return out
        self.uses.append(Use(step, *self.mark(args, kwargs)))
        self.ended(out, self.uses[-1].arrays)
        if self.perturbations is not None:
            return out + self.perturbations[len(self.uses) - 1]
        self.edges.append(get_gradient_edge(out))
        return out

    def next_step(self, func: Callable[..., Any], given: Sequence[Tensor]) -> Step | None:
        """Return what the plan makes of the operation here, if the run is the same up to it."""
        assert self.plan is not None
        place, since, done = len(self.steps), self.checked, self.operations.steps
        step = self.plan.steps[place] if place < len(self.plan.steps) else Step(len)
        if step.place != len(self.operations.names) - 1:  # it returns no tensors, or is another one
            return None
        if attribute_of(step.func) != attribute_of(func):
            return None
        self.checked = len(done)
        same = self.plan.operations[since : len(done)] == tuple(done[since:])
        return step if same and not self.changed else None

    def alias(self, tree: Any) -> Any:
        """Return arguments of a use as they are: autograd is not asked for what is behind them."""
        return tree

    def ended(self, out: Tensor, arrays: Sequence[Tensor]) -> None:
        """Note the way past a use: what comes to its parameters by another is no use of theirs."""
        self.around[self.mapped(out).grad_fn] = [self.mapped(x).grad_fn for x in arrays]

    def mapped(self, x: Tensor) -> Tensor:
        """Return the examples that a tensor is one of, if `vmap` hides them."""
        if self.layout.kind != "vmapped":
            return x
        inner = torch.func.debug_unwrap(x, recurse=False)
        return inner if inner.ndim > x.ndim else x

    def mark(self, args: Any, kwargs: Any) -> tuple[Any, Any, list[Tensor]]:
        """Return the arguments with sources and places for tensors, and the tensors there."""
        arrays: list[Tensor] = []

        def replace(x: Tensor) -> Any:
            if x in self.sources:
                return self.sources[x]
            arrays.append(x)
            return Place(len(arrays) - 1)

        return (*substitute((args, kwargs), replace), arrays)

    def derived(self, step: Step, args: Any, kwargs: Any, out: Any) -> None:
        """Remember a function of parameters and constants alone."""

        def replace(x: Tensor) -> Source:
            if x in self.sources:
                return self.sources[x]
            self.constants.append(x)
            return of_constant(self.count + len(self.constants) - 1)

        given = substitute((args, kwargs), replace)
        source = derive(step.func, given[0], given[1], expanded=step.axis == 0)
        parts = [out] if isinstance(out, Tensor) else list(out)
        for index, part in enumerate(parts):
            if step.derives[index]:
                self.note(part, source if part is out else pick(source, index))

    def finish(self, outputs: list[Tensor]) -> None:
        """Note what the run returns."""
        self.operations.close(outputs)


def _has(numbers: tuple[float, ...], args: Any, kwargs: Any) -> bool:
    """Say whether an operation has the numbers that its form is for, if it depends on any."""
    if not numbers:
        return True
    found = numbers_in((args, kwargs))
    # A compiler does not hand defaults on, as functions of torch do (torch 2.13).
    return set(found).issubset(numbers) if torch.compiler.is_compiling() else found == numbers
