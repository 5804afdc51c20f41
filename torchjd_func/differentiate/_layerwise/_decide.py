"""Decide what an operation on parameters becomes, from what is seen of it in one run.

A structure is used only where it is known to hold. Whatever else becomes of a parameter is left to
autograd, which is right about everything, one backward pass for each loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchjd_func._host import version_of
from torchjd_func.differentiate._layerwise import _local, _moves, _rules
from torchjd_func.differentiate._layerwise._draws import draws
from torchjd_func.differentiate._layerwise._functions import (
    READERS,
    attribute_of,
    is_getter,
    is_torchs_own,
    name_of,
)
from torchjd_func.differentiate._layerwise._gates import unwritten
from torchjd_func.differentiate._layerwise._operations import Operation, Operations
from torchjd_func.differentiate._layerwise._order import Order
from torchjd_func.differentiate._layerwise._plan import LOST, Layout, Step
from torchjd_func.differentiate._layerwise._rule import bind, fits
from torchjd_func.differentiate._layerwise._sources import Source, numbers_in, tensors_in
from torchjd_func.differentiate._layerwise._trace import Trace

# The place of a use, its leaves, and what must not be overwritten until it is differentiated
Kept = tuple[int, set[int], list[tuple[Tensor, int]]]


class Decider(Trace):
    """Watches a run without a plan, and decides from what it sees there.

    Args:
        handles: The parameters, as they are handed to the objective.
        layout: How the objective treats examples.
        operations: Numbers tensors, and knows where their examples lie.
        order: Knows which operations may change the order of examples.
    """

    def __init__(
        self,
        handles: Sequence[Tensor],
        layout: Layout,
        operations: Operations,
        order: Order | None,
    ) -> None:
        super().__init__(handles, layout, operations)
        self.order = order
        self.depth = common_depth([*handles, *operations.known])
        self.kept: list[Kept] = []
        self.views: list[tuple[int, Tensor, int]] = []  # uses, their outputs, and versions of these
        self.denied: set[int] = set()
        self.dtypes: set[torch.dtype] = set()
        self.reasons: dict[int, str] = {}

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one operation, and see in which precision."""
        run = super().apply if self.order is None else self.compared
        out = run(func, *args, **kwargs)
        self.dtypes.update([x.dtype for x in tensors_in(out) if self.traced(x)])
        return out

    def compared(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one operation, and see whether it may change the order of examples."""
        assert self.order is not None
        given = self.operations.begin(func, args, kwargs)
        operation = Operation(func, args, kwargs, given)
        copies, before = self.order.copies(operation), unwritten(operation)
        if self.on_sources(given):
            out = self.on_parameters(func, args, kwargs, given)
        else:
            out = self.run(func, *args, **kwargs)
        self.operations.end(out, given)
        self.order.hold(operation, copies, out, before)
        self.order.compare(operation, out)
        return out

    def on_parameters(
        self, func: Callable[..., Any], args: Any, kwargs: Any, given: list[Tensor]
    ) -> Any:
        """Run an operation with parameters, and decide what it becomes."""
        return decide(self, Operation(func, args, kwargs, given))

    def finish(self, outputs: list[Tensor]) -> None:
        """Deny the uses whose arguments were overwritten after them; see which outputs were."""
        super().finish(outputs)
        if self.order is not None:
            self.order.close(outputs)
        for place, leaves, versions in self.kept:
            if any(version_of(x) != version for x, version in versions):
                self.deny(name_of(self.steps[place].func), leaves)
        for place, out, version in self.views:
            if version_of(out) != version:
                self.steps[place] = self.steps[place]._replace(copied=True)

    def deny(self, name: str, leaves: set[int]) -> None:
        """Let leaves have rows by autograd."""
        self.denied |= leaves
        self.explain(name, leaves)

    def explain(self, name: str, leaves: set[int]) -> None:
        """Note the first operation without a known form."""
        self.reasons |= {leaf: f"no rule for {name}" for leaf in leaves - set(self.reasons)}


def decide(trace: Decider, operation: Operation) -> Any:
    """Run an operation, and decide what it becomes when it runs again."""
    func, args, kwargs, given = operation
    made = tuple([x in trace.sources for x in given])
    sources = [trace.sources[x] for x in given if x in trace.sources]
    leaves = {leaf for source in sources for leaf in source.leaves}
    step = Step(func, leaves=tuple(leaves), made=made, place=len(trace.operations.names) - 1)
    seen = torch.is_grad_enabled() and not is_nested(trace, given)
    if seen and may_derive(trace, operation, sources):
        step, out = derived(trace, step, operation)
    elif seen and may_be_use(func, trace.layout.kind == "batched"):
        step, out = used(trace, step, operation)
    else:
        out = trace.run(func, *args, **kwargs)
    if not (tensors_in(out) or func in READERS or is_getter(func)):
        trace.deny(display_name(func), leaves)
    if seen and not (step.use or step.derives) and may_move(trace, operation, out):
        step, out = moved(trace, step, operation, out)
    parts = tensors_in(out)
    if parts:
        trace.steps.append(step)
    if any(map(trace.traced, parts)) and not (step.use or step.derives):
        trace.explain(display_name(func), leaves)
    return out


def derived(trace: Decider, step: Step, operation: Operation) -> tuple[Step, Any]:
    """Run an operation, and see whether its output can be made again at will from the same.

    It can unless random numbers were drawn, or something was written to.

    Returns:
        What becomes of the operation, and its output.
    """
    func, args, kwargs, given = operation
    repeats = repeatable(given)
    out = trace.run(func, *args, **kwargs)
    parts = tensors_in(out)
    again = repeats()
    plain = isinstance(out, Tensor) or (isinstance(out, (list, tuple)) and len(parts) == len(out))
    if not (again and parts and plain) or any(part is x for part in parts for x in given):
        return step, out
    axis = trace.operations.axis_next(out)
    alone = all(x in trace.sources for x in given) or not is_nested(trace, parts)
    derives = tuple(map(trace.traced, parts))
    if any(derives) and alone and (axis is None or (axis == 0 and func is Tensor.expand)):
        step = step._replace(derives=derives, axis=axis)
        trace.derived(step, args, kwargs, out)
    return step, out


def repeatable(given: Sequence[Tensor]) -> Callable[[], bool]:
    """Return what says, after an operation, whether it drew no numbers and wrote to nothing."""
    before, versions = draws(given), list(map(version_of, given))

    def repeats() -> bool:
        """Look again."""
        return not before.differ(before.again()) and versions == list(map(version_of, given))

    return repeats


def used(trace: Decider, step: Step, operation: Operation) -> tuple[Step, Any]:
    """Run an operation, and see whether its output's gradient tells that of its parameters."""
    func, args, kwargs, given = operation
    # Without a rule it runs again for its rows, and must do the same.
    repeats = repeatable(given) if _rules.rule_of(func) is None else lambda: True
    out = trace.run(func, *args, **kwargs)
    plain = isinstance(out, Tensor) and trace.traced(out) and not is_nested(trace, [out])
    if not (repeats() and plain and recognises(trace, operation, out)):
        trace.deny(display_name(func), set(step.leaves))
        return step, out
    numbers = () if func in _local.ELEMENTWISE else numbers_in((args, kwargs))
    return use(trace, step, given, out)._replace(numbers=numbers), out


def moved(trace: Decider, step: Step, operation: Operation, out: Tensor) -> tuple[Step, Any]:
    """See whether an operation did no more than move entries of a parameter, and run it as such."""
    func, args, kwargs, given = operation
    parameter = next(x for x in given if x in trace.sources)
    expanded, axis = trace.sources[parameter].expanded, trace.operations.axis_next(out)
    assert axis is not None
    moves = _moves.moves((func, args, kwargs), parameter, expanded, axis, trace.layout.size)
    if not moves:
        return step, out
    out = trace.run(func, *args, **kwargs)
    numbers = numbers_in((args, kwargs))
    return use(trace, step, given, out)._replace(moves=moves, numbers=numbers), out


def is_nested(trace: Decider, tensors: Sequence[Tensor]) -> bool:
    """Say whether some tensor belongs to a transform within the objective, such as vmap."""
    return any(depth(x) > trace.depth for x in tensors)


def may_be_use(func: Callable[..., Any], batched: bool) -> bool:
    """Say whether an operation has a known form, if its arguments fit."""
    return _rules.rule_of(func) is not None or _local.may_be_local(func, batched)


def may_derive(trace: Decider, operation: Operation, sources: list[Source]) -> bool:
    """Say whether the output may be a function of parameters and constants alone."""
    constant = [x for x in operation.given if x not in trace.sources]
    if any(s.expanded for s in sources):
        return False
    if constant and (trace.layout.kind != "batched" or any(trace.traced(x) for x in constant)):
        return False
    alone = all(trace.operations.axis(x) is None for x in constant)
    return alone and is_torchs_own(operation.func)


def may_move(trace: Decider, operation: Operation, out: Any) -> bool:
    """Say whether the output may be entries of one parameter, some for each example."""
    func, _, _, given = operation
    if trace.layout.kind != "batched" or not isinstance(out, Tensor):
        return False
    if not is_torchs_own(func) or _rules.rule_of(func) is not None:
        return False
    alone = len({id(x) for x in given if x in trace.sources}) == 1
    real = alone and out.is_floating_point() and trace.traced(out) and not is_nested(trace, [out])
    seen = trace.operations.axis_next(out) not in (None, LOST)
    return real and seen


def recognises(trace: Decider, operation: Operation, out: Tensor) -> bool:
    """Say whether the gradient of the parameters is known from the output's."""
    func, batched = operation.func, trace.layout.kind == "batched"
    axis = trace.operations.axis_next(out) if batched else 0
    if out.is_complex() or axis is None or axis is LOST:
        return False
    if not all(x.numel() for x in operation.given):
        return False
    args, kwargs, arrays = trace.mark(operation.args, operation.kwargs)
    axes = [trace.operations.axis(x) for x in arrays]
    if batched and LOST in axes:
        return False
    pairs = [(x, trace.sources[x]) for x in operation.given if x in trace.sources]
    rule = _rules.rule_of(func)
    if rule is not None:
        arguments = bind(rule, args, kwargs)
        shapes = {id(source): tuple(x.shape) for x, source in pairs}
        named = {n: shapes[id(s)] for n, s in arguments.items() if isinstance(s, Source)}
        return fits(rule, arguments, arrays, axes, axis if batched else None, named)
    if not batched:
        return True
    places = list(zip(arrays, axes, strict=True))
    return _local.is_local(func, (args, kwargs), pairs, places, axis, out)


def use(trace: Decider, step: Step, given: list[Tensor], out: Tensor) -> Step:
    """Return the step of a recognised operation, what it is applied to being kept."""
    versions = [(x, version_of(x)) for x in given]
    trace.kept.append((len(trace.steps), set(step.leaves), versions))
    if out._is_view():
        trace.views.append((len(trace.steps), out, version_of(out)))
    batched = trace.layout.kind == "batched"
    axis = trace.operations.axis_next(out) if batched else 0
    arrays = [x for x in given if x not in trace.sources]
    trace.ended(out, arrays)
    axes = tuple(trace.operations.axis(x) for x in arrays) if batched else (None,) * len(arrays)
    shape = tuple(out.shape)
    return step._replace(
        use=True, axis=axis, axes=axes, shape=shape, dtype=out.dtype, device=out.device
    )


def display_name(func: Callable[..., Any]) -> str:
    """Return the name of an operation, also of a getter such as `.T`."""
    return attribute_of(func) or name_of(func)


def common_depth(tensors: Sequence[Tensor]) -> int:
    """Return how many transforms of torch.func what is made of all these tensors is in."""
    dense = [x for x in tensors if x.layout == torch.strided]
    return depth(sum(x.new_zeros((), dtype=torch.float32, device="cpu") for x in dense))


def depth(x: Any) -> int:
    """Return how many transforms of torch.func a tensor is in."""
    inner = torch.func.debug_unwrap(x, recurse=False)
    return 0 if inner is x else 1 + depth(inner)
