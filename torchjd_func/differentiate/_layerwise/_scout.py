"""The first run of an objective: decide what becomes of each operation, from shapes alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchjd_func import _check
from torchjd_func.differentiate._layerwise import _axes, _local, _rules
from torchjd_func.differentiate._layerwise._functions import named
from torchjd_func.differentiate._layerwise._sources import ENTRYWISE, Place, Source, tensors_in
from torchjd_func.differentiate._layerwise._watch import Axis, Layout, Plan, Step, Watch


class Scout(Watch):
    """The first run: decides what becomes of each operation, from shapes alone."""

    def __init__(
        self,
        handles: Sequence[Tensor],
        layout: Layout,
        examples: Sequence[Tensor],
        inputs: Sequence[Tensor],
    ) -> None:
        super().__init__(handles, layout)
        self.axes: dict[Tensor, Axis] = {
            x: 0 for x in examples if x.ndim and x.shape[0] == layout.size
        }
        self.steps: list[Step] = []
        self.opaque: set[int] = set()
        self.reasons: dict[int, str] = {}
        self.roots: dict[Tensor, Tensor] = {}  # views -> what they are views of
        self.kept: dict[Tensor, set[int]] = {}  # arguments of uses -> the leaves used there
        self.blind = False
        self.known: dict[Tensor, None] = dict.fromkeys((*handles, *inputs))
        self.depth = 0
        if not torch.compiler.is_compiling():
            self.depth = max(_depth(x) for x in (*handles, *inputs))

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one operation, and know its outputs again."""
        if func is not F.batch_norm:  # whose running statistics are not made of parameters
            self.inspect(tensors_in((args, kwargs)))
        self.overwrite(func, args, kwargs)
        out = super().apply(func, *args, **kwargs)
        self.known.update(dict.fromkeys(tensors_in(out)))
        if func in _VIEWS:
            for x in tensors_in(out):
                self.roots[x] = self.root(args[0])
        return out

    def root(self, x: Tensor) -> Tensor:
        """Return the tensor that `x` is a view of, or `x` itself."""
        return self.roots.get(x, x)

    def overwrite(self, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Trust no rule whose arguments are overwritten later, by an operation in place."""
        name = getattr(func, "__name__", "")
        if args and (kwargs.get("inplace") or _IN_PLACE.fullmatch(name)):
            self.opaque |= self.kept.get(self.root(args[0]), set())

    def inspect(self, given: Sequence[Tensor]) -> None:
        """Look for tensors that may be made of parameters, unseen.

        Transforms within the objective rename what they are given. A compiler also hides some
        operations, such as `.T`, and both look like constants then.
        """
        for x in given:
            if x in self.known or not (x.is_floating_point() or x.is_complex()):
                continue
            if torch.compiler.is_compiling():
                self.blind = True
            else:
                self.opaque |= self.leaves_behind(x)

    def leaves_behind(self, x: Tensor) -> set[int]:
        """Return the leaves that a renamed tensor is made of."""
        inner = torch.func.debug_unwrap(x, recurse=False)
        if inner is x:
            return set()
        return set(
            self.sources[inner].leaves if inner in self.sources else self.leaves_behind(inner)
        )

    def other(self, func: Callable[..., Any], args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """Follow the examples; draw no random numbers."""
        out = _local.run_quietly(self.run, func, args, kwargs)
        self.follow(func, args, kwargs, given, out)
        return out

    def check_batch_norm(self, args: Any, kwargs: Any) -> None:
        """Refuse normalisation over examples that are declared independent."""
        given = _rules.bind(_rules.RULES[F.batch_norm], args, kwargs)
        if self.layout.kind == "batched" and (
            given.get("training") or given["running_mean"] is None
        ):
            rule = "treat each example by itself"
            remedy = "Use `model.eval()`, GroupNorm, or leave `jd.instancewise` away."
            got = "batch normalisation in training mode, which mixes examples"
            _check.fail(ValueError, "an instance-wise objective", rule, got, remedy)

    def follow(
        self, func: Callable[..., Any], args: Any, kwargs: Any, given: list[Tensor], out: Any
    ) -> None:
        """Note where the examples of each output lie."""
        known = [(x, self.axes[x]) for x in given if x in self.axes]
        if self.layout.kind == "batched" and known:
            for part in tensors_in(out):
                axis = _axes.follow(func, known, args, kwargs, part, self.layout.size)
                self.axes[part] = axis

    def on_parameters(
        self, func: Callable[..., Any], args: Any, kwargs: Any, given: list[Tensor]
    ) -> Any:
        """Decide what becomes of the operation."""
        out = _local.run_quietly(self.run, func, args, kwargs)
        if not tensors_in(out):
            return out
        sources = [self.sources[x] for x in given if x in self.sources]
        leaves = {leaf for source in sources for leaf in source.leaves}
        self.follow(func, args, kwargs, given, out)
        if self.is_nested((*given, *tensors_in(out))):
            step = self.without_rule(func, leaves)
        elif self.derives(func, given, sources):
            step = Step(func, use=False, derives=True)
            self.derived(func, args, kwargs, out)
        elif isinstance(out, Tensor) and self.recognises(func, args, kwargs, given, out):
            step = self.use(func, given, out)
            for x in given:
                self.kept.setdefault(self.root(x), set()).update(leaves)
        else:
            step = self.without_rule(func, leaves)
        self.steps.append(step)
        return out

    def without_rule(self, func: Callable[..., Any], leaves: set[int]) -> Step:
        """Note that parameters are used in a way without a rule."""
        self.opaque |= leaves
        self.reasons |= {leaf: getattr(func, "__name__", repr(func)) for leaf in leaves}
        return Step(func, use=False, derives=False)

    def is_nested(self, tensors: Sequence[Tensor]) -> bool:
        """Say whether a transform within the objective, such as vmap, renames its tensors."""
        if torch.compiler.is_compiling():  # `inspect` notices
            return False
        return any(_depth(x) > self.depth for x in tensors)

    def derives(self, func: Callable[..., Any], given: list[Tensor], sources: list[Source]) -> bool:
        """Say whether the output is a function of parameters alone, to be made again at will."""
        constant = [x for x in given if x not in self.sources]
        if any(x in self.axes for x in constant) or any(s.expanded for s in sources):
            return False
        alone = not constant or self.layout.kind == "batched"
        return alone and _local.is_deterministic(func)

    def recognises(
        self,
        func: Callable[..., Any],
        args: Any,
        kwargs: Any,
        given: list[Tensor],
        out: Tensor,
    ) -> bool:
        """Say whether the gradient of the parameters is known from the output's."""
        args, kwargs, arrays = self.mark(args, kwargs)
        if out.is_complex() or not out.is_floating_point():
            return False
        if func in _rules.RULES:
            return self.fits(_rules.RULES[func], args, kwargs, arrays, out)
        if self.layout.kind != "batched":
            return _local.is_deterministic(func)
        carried = [self.axes[x] for x in given if x in self.axes]
        axis = self.axes.get(out)
        if axis is None or None in carried:
            return False
        found = [(x, self.sources[x]) for x in given if x in self.sources]
        return _local.is_local(func, args, kwargs, found, axis, out)

    def fits(
        self, rule: _rules.Rule, args: Any, kwargs: Any, arrays: list[Tensor], out: Tensor
    ) -> bool:
        """Say whether an operation is used as its rule expects."""
        arguments = _rules.bind(rule, args, kwargs)
        for name, value in arguments.items():
            if isinstance(value, Source) and (name not in rule.forms or value.expanded):
                return False
        if not _rules.supported(rule, arguments):
            return False
        if self.layout.kind != "batched":
            return True
        axis = self.axes.get(out)
        places = [arguments[name] for name in rule.batched]
        carriers = [arrays[place.number] for place in places if isinstance(place, Place)]
        if axis is None or any(self.axes.get(x) is None for x in carriers):
            return False
        return axis == 0 or rule.anywhere

    def use(self, func: Callable[..., Any], given: list[Tensor], out: Tensor) -> Step:
        """Return the step of a recognised operation."""
        axis = self.axes.get(out, 0)
        arrays = [x for x in given if x not in self.sources]
        axes = tuple(self.axis_of(x, axis, out) for x in arrays)
        return Step(func, True, False, axis, axes, out.shape, out.dtype, out.device)

    def axis_of(self, x: Tensor, axis: Axis, out: Tensor) -> Axis:
        """Return where the examples of an array lie; a constant may have a part for each, too."""
        if x in self.axes or axis is None:
            return self.axes.get(x)
        same = x.ndim == out.ndim > axis and x.shape[axis] == out.shape[axis] > 1
        return axis if same else None

    def plan(self, outputs: Any) -> Plan:
        """Return what was found, once the objective has run."""
        self.inspect(tensors_in(outputs))
        for x in tensors_in(outputs):
            self.opaque |= set(self.sources[x].leaves if x in self.sources else ())
        while True:  # what is made of a leaf without a rule has none either
            joined = [set(s.leaves) for s in self.sources.values()]
            mixed = [group for group in joined if self.opaque.intersection(group)]
            grown = self.opaque.union(*mixed)
            if grown == self.opaque:
                return Plan(
                    self.layout, tuple(self.steps), frozenset(self.opaque), self.blind, self.reasons
                )
            self.opaque = grown


_IN_PLACE = re.compile(r"[a-z0-9]\w*[^_]_|__setitem__|__i(add|sub|mul|div|truediv|pow)__")
_VIEWS = ENTRYWISE | named("chunk split unbind narrow select __getitem__ expand diagonal")


def _depth(x: Tensor) -> int:
    """Return how many transforms of torch.func a tensor is in."""
    inner = torch.func.debug_unwrap(x, recurse=False)
    return 0 if inner is x else 1 + _depth(inner)
