"""Noise for the run of a proof: where a coefficient is zero, nothing tells what it multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Number
from typing import Any

from torch import Tensor

from torchjd_func.differentiate._layerwise._decide import common_depth, depth
from torchjd_func.differentiate._layerwise._functions import is_in_place, may_write, name_of, named
from torchjd_func.differentiate._layerwise._gates import answered, differ, opened, unwritten
from torchjd_func.differentiate._layerwise._local import IN_PLACE
from torchjd_func.differentiate._layerwise._noise import near
from torchjd_func.differentiate._layerwise._operations import Operation, Operations, python_number
from torchjd_func.differentiate._layerwise._plan import Layout, Plan
from torchjd_func.differentiate._layerwise._sources import instances_in, substitute, tensors_in
from torchjd_func.differentiate._layerwise._trace import Trace

_LARGE = 2**20


class Swap:
    """Puts others in the place of data, wherever it comes from, and of constants.

    Args:
        change: What becomes of constants, the same of the same.
        pairs: The tensors among the arguments, and what came in their place.
    """

    def __init__(
        self, change: Callable[[Tensor], Tensor], pairs: Iterable[tuple[Tensor, Tensor]]
    ) -> None:
        self.change = change
        self.known = dict(pairs)

    def __call__(self, x: Tensor) -> Tensor:
        """Return what stands for a tensor; large ones take long, and hold no coefficients."""
        if x not in self.known:
            self.known[x] = self.change(x) if x.numel() <= _LARGE else x
        return self.known[x]


class Disturbed(Trace):
    """Watches a run as planned, and adds a little noise.

    Args:
        handles: The parameters, as they are handed to the objective.
        layout: How the objective treats examples.
        operations: Numbers tensors.
        plan: What operations become.
        noisy: 1 if the outputs of uses get noise; besides, 2 if numbers that the code names or
            makes do as well, 3 if thresholds let something through, 4 if flags are turned over,
            5 if other integers are, 6 if integers are made of other numbers.
        swap: What takes the place of data and constants.
    """

    def __init__(
        self,
        handles: Sequence[Tensor],
        layout: Layout,
        operations: Operations,
        plan: Plan,
        noisy: int,
        swap: Swap,
    ) -> None:
        super().__init__(handles, layout, operations, plan)
        self.doubts = plan.doubts
        self.noisy = noisy
        self.swap = swap
        self.depth = common_depth([*handles, *operations.known])

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one operation, on other data, constants and numbers, and past thresholds."""
        args, kwargs = substitute((args, kwargs), self.swapped)
        given = self.operations.begin(func, args, kwargs)
        constant = self.noisy == 2 and not given and instances_in(float, args)
        # A schedule may change them, and they may be zero at first: plans do not say what they are.
        if self.noisy == 2:
            args, kwargs = self.elsewhere(func, given, args, kwargs)
        elif self.noisy in (4, 5) and any(x.requires_grad for x in given):
            args, kwargs = substitute((args, kwargs), self.turned)
        place, operation = len(self.operations.names) - 1, Operation(func, args, kwargs, given)
        gated = self.noisy == 3 and place in self.doubts.bounds
        if self.on_sources(given):
            out = self.on_parameters(func, args, kwargs, given)
        elif gated and may_write(func, args, kwargs):
            return self.opened_in_place(operation)
        else:
            out = self.run(func, *args, **kwargs)
        if constant and isinstance(out, Tensor) and out.is_floating_point():
            out = _elsewhere(out)
        derived = any(x in self.sources for x in tensors_in(out))  # of parameters, without examples
        if gated and not derived:
            out = self.opened(operation, out)
        elif self.noisy == 6 and place in self.doubts.answers and not is_in_place(func):
            out = answered(self.run, operation, out)
        self.operations.end(out, given)
        return out

    def turned(self, x: Any) -> Any:
        """Return 0 for another integer, and 1 for 0, if it is one for all examples."""
        turns = self.doubts.flags if self.noisy == 4 else self.doubts.choices
        if not isinstance(x, Tensor) or self.operations.number(x) not in turns:
            return x
        return (x == 0).to(x.dtype)

    def swapped(self, x: Any) -> Any:
        """Return what takes the place of an argument, if it is data or a constant."""
        if not isinstance(x, Tensor) or (x not in self.swap.known and not self.is_constant(x)):
            return x
        return self.swap(x)

    def is_constant(self, x: Tensor) -> bool:
        """Say whether a tensor came from without."""
        made = self.operations.number(x) is not None or x in self.sources or x.requires_grad
        return not made and depth(x) <= self.depth

    def elsewhere(
        self, func: Callable[..., Any], given: list[Tensor], args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Return other numbers, and tensors made of such, where they meet what is traced."""
        if is_in_place(func):
            alone = IN_PLACE.get(name_of(func))
            if alone is None:
                return args, kwargs
            (_, *rest), kwargs = self.elsewhere(alone, given, args, kwargs)
            return (args[0], *rest), kwargs  # it writes where it wrote
        if any(x.requires_grad for x in given):
            args, kwargs = substitute((args, kwargs), self.nearby)
        if func in _ARITHMETIC and any(x.is_floating_point() for x in given):
            return _renumbered((args, kwargs), whole=True)
        if not self.operations.loosened or self.on_sources(given):
            return args, kwargs  # a form is for the numbers that it was found with
        others = _renumbered((args, kwargs), whole=False)
        before = Operation(func, args, kwargs, given)
        after = before._replace(args=others[0], kwargs=others[1])
        return others if differ(before, after) else (args, kwargs)

    def opened(self, operation: Operation, out: Any) -> Any:
        """Return what an operation returns with its gates open."""
        traced = [x for x in operation.given if x.requires_grad and x not in self.sources]
        return opened(self.run, operation, out, list(dict.fromkeys(traced)))

    def opened_in_place(self, operation: Operation) -> Any:
        """Run an operation that may write to its first argument, and write with its gates open."""
        given, written = operation.given, unwritten(operation)
        out = self.run(written.func, *written.args, **written.kwargs)
        more = self.opened(unwritten(operation), out)
        out = self.run(Tensor.copy_, given[0], more) if out is written.given[0] else more
        self.operations.end(out, given)
        return out

    def nearby(self, x: Any) -> Any:
        """Return another number for a tensor of one, and noise in others that may change."""
        if not isinstance(x, Tensor) or x.requires_grad or not x.is_floating_point():
            return x
        number = self.operations.number(x)
        if number is not None and number not in self.doubts.data:
            return x
        return _elsewhere(x) if x.numel() == 1 else near(x)

    def on_parameters(
        self, func: Callable[..., Any], args: Any, kwargs: Any, given: list[Tensor]
    ) -> Any:
        """Run an operation with parameters as planned, and add noise to what a use returns."""
        count = len(self.uses)
        out = super().on_parameters(func, args, kwargs, given)
        return near(out) if len(self.uses) > count else out


def _elsewhere(x: Any) -> Any:
    """Return other numbers."""
    return 1.1 * x + 0.1


def _renumbered(tree: Any, *, whole: bool) -> Any:
    """Return arguments with other numbers, integers among them or not."""
    if isinstance(tree, Number) and not isinstance(tree, bool):
        tree = python_number(tree)
        return _elsewhere(tree) if whole or not isinstance(tree, int) else tree
    if type(tree) is dict:
        return {name: _renumbered(part, whole=whole) for name, part in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_renumbered(part, whole=whole) for part in tree)
    return tree


_ARITHMETIC = named(
    "add sub subtract mul multiply div divide true_divide rsub lerp __radd__ __rsub__ __rmul__"
)
