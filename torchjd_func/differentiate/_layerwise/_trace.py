"""Follow parameters through one run of an objective.

The run is ordinary: autograd differentiates whatever the objective does, and is right about hooks,
modes, writes by index and functions of one's own. Beside it, operations whose derivative by
parameters has a known form are taken out: their parameters come as aliases, which end what autograd
traces, and their outputs are perturbed by zeros, whose gradients are wanted instead. A parameter
that autograd reaches on another way than through such aliases has rows by autograd, all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torchjd_func.differentiate._layerwise import _attention, _local, _rules, _sources
from torchjd_func.differentiate._layerwise._functions import is_getter, name_of, named
from torchjd_func.differentiate._layerwise._operations import Operations
from torchjd_func.differentiate._layerwise._plan import LOST, Layout, Plan, Step
from torchjd_func.differentiate._layerwise._sources import Place, Source, tensors_in


class Use(NamedTuple):
    """One recognised operation: its arguments, with sources for parameters, places for the rest."""

    step: Step
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    arrays: list[Tensor]  # what lies at the places


class Kept(NamedTuple):
    """What must not be overwritten until a use is differentiated."""

    place: int
    leaves: set[int]
    versions: list[tuple[Tensor, int]]


class Trace(TorchFunctionMode):
    """Watches one run, and decides from what it sees there.

    Args:
        handles: The parameters, as they are handed to the objective.
        layout: How the objective treats examples.
        operations: Numbers tensors, and knows where their examples lie.
        plan: What operations become; `None` to decide it.
        perturbations: Zeros to add to the outputs of uses.
    """

    def __init__(
        self,
        handles: Sequence[Tensor],
        layout: Layout,
        operations: Operations,
        plan: Plan | None = None,
        perturbations: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        self.layout = layout
        self.operations = operations
        self.plan = plan
        self.perturbations = perturbations
        self.count = len(handles)
        self.constants: list[Tensor] = []
        self.sources = {handle: _sources.of_leaf(i) for i, handle in enumerate(handles)}
        self.versions = {handle: version_of(handle) for handle in handles}
        self.compiling = torch.compiler.is_compiling()
        self.depth = 0
        if plan is None and not self.compiling:
            self.depth = common_depth([*handles, *operations.known])
        self.aliases: set[Any] = set()  # nodes of autograd where uses begin
        self.steps: list[Step] = []
        self.uses: list[Use] = []
        self.kept: list[Kept] = []
        self.fresh: dict[Tensor, None] = {}  # in graphs: tensors that are views of none
        self.denied: set[int] = set()
        self.reasons: dict[int, str] = {}
        self.changed = False  # whether the run is not as planned

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation, and remember it if it uses parameters."""
        if name_of(func) == "unflatten":  # the method cannot be traced (torch 2.13)
            func = torch.unflatten
        return self.apply(func, *args, **(kwargs or {}))

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one operation."""
        if func is F.batch_norm:
            _rules.check_batch_norm(self.layout.kind, args, kwargs)
        if func is F.multi_head_attention_forward:
            spelled = _attention.arguments(args, kwargs)
            if _attention.is_plain(spelled):
                return _attention.attention(self.apply, spelled)
        given = self.operations.begin(func, args, kwargs)
        if self.plan is None and self.compiling:
            self.deny_hidden(given)
            self.deny_overwritten(func, args, kwargs)
        if any([x in self.sources and self.source(x) is not None for x in given]):
            out = self.on_parameters(func, args, kwargs, given)
        else:
            out = self.run(func, *args, **kwargs)
        if self.compiling:
            given = [x for x in given if x not in self.sources]
        self.operations.end(out, given)
        if self.compiling and func not in _VIEWS:
            self.fresh.update(dict.fromkeys(tensors_in(out)))
        return out

    def deny_hidden(self, tensors: Sequence[Tensor]) -> None:
        """Trust nothing if a compiler hid an operation, such as `.T`, that uses parameters."""
        for x in tensors:
            unknown = x not in self.sources and self.operations.number(x) is None
            if unknown and (x.is_floating_point() or x.is_complex()) and self.traced(x):
                self.denied |= set(range(self.count))

    def deny_overwritten(self, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Trust no use whose arguments a graph overwrites later, through whatever view."""
        in_place = kwargs.get("inplace") or _IN_PLACE.fullmatch(name_of(func))
        if in_place and args and isinstance(args[0], Tensor):
            for _, leaves, versions in self.kept:
                if any(x is args[0] or args[0] not in self.fresh for x, _ in versions):
                    self.deny(func, leaves)

    def source(self, x: Tensor) -> Source | None:
        """Return what a tensor is made of, unless it was written to since."""
        found = self.sources.get(x)
        if found is not None and self.versions[x] != version_of(x):
            del self.sources[x]
            return None
        return found

    def traced(self, x: Tensor) -> bool:
        """Say whether autograd traces a tensor back to parameters."""
        if x.requires_grad or self.layout.kind != "vmapped":
            return x.requires_grad
        if self.compiling:
            return True
        inner = torch.func.debug_unwrap(x, recurse=False)
        return inner.ndim > x.ndim and inner.requires_grad  # vmap hides it

    def run(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run an operation, spelled out if it will be mapped over and torch cannot."""
        return _attention.spelled(func, self.layout.kind != "batched")(*args, **kwargs)

    def on_parameters(
        self, func: Callable[..., Any], args: Any, kwargs: Any, given: list[Tensor]
    ) -> Any:
        """Run an operation with parameters: as planned, or decide what it is."""
        if self.plan is None:
            return self.decide(func, args, kwargs, given)
        place = len(self.steps)
        step = self.plan.steps[place] if place < len(self.plan.steps) else Step(len)
        if name_of(step.func) != name_of(func) or self.changed:
            out = self.run(func, *args, **kwargs)
            self.changed |= bool(tensors_in(out))
            return out
        step = step._replace(func=func)
        self.steps.append(step)
        if not step.use:
            out = self.run(func, *args, **kwargs)
            if step.derives:
                self.derived(step, args, kwargs, out)
            return out
        out = self.run(func, *self.alias(args), **self.alias(kwargs))
        if out.shape != step.shape:
            self.changed = True
            return out
        self.uses.append(Use(step, *self.mark(args, kwargs)))
        return out + self.perturbations[len(self.uses) - 1]

    def decide(self, func: Callable[..., Any], args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """Run an operation, and decide what it becomes when it runs again."""
        pairs = [(x, self.sources[x]) for x in given if x in self.sources]
        sources = [source for _, source in pairs]
        leaves = {leaf for source in sources for leaf in source.leaves}
        hidden = [leaf for s in sources if _sources.has_getter(s) for leaf in s.leaves]
        visible = not all(map(_sources.has_getter, sources))
        step = Step(func, leaves=tuple(leaves), hidden=tuple(hidden), visible=visible)
        nested = self.is_nested(given)
        if not nested and self.derives(func, given, sources):
            out = self.run(func, *args, **kwargs)
            axis = self.operations.axis_next(out)
            if axis is None or (axis == 0 and func is Tensor.expand):
                step = step._replace(derives=True, axis=axis)
                self.derived(step, args, kwargs, out)
        elif not nested and self.may_be_use(func):
            out = self.run(func, *self.alias(args), **self.alias(kwargs))
            fits = isinstance(out, Tensor) and self.traced(out) and not self.too_deep(out)
            if fits and self.recognises(func, args, kwargs, given, out):
                step = self.use(step, given, out)
                versions = [(x, version_of(x)) for x in given]
                self.kept.append(Kept(len(self.steps), leaves, versions))
            else:
                self.deny(func, leaves)
        else:
            out = self.run(func, *args, **kwargs)
            reads = func in _READERS or is_getter(func)
            if self.compiling if tensors_in(out) else not reads:
                self.deny(func, leaves)
        if tensors_in(out):
            self.steps.append(step)
            if not (step.use or step.derives):
                self.explain(func, leaves)
        return out

    def deny(self, func: Callable[..., Any], leaves: set[int]) -> None:
        """Let leaves have rows by autograd."""
        self.denied |= leaves
        self.explain(func, leaves)

    def explain(self, func: Callable[..., Any], leaves: set[int]) -> None:
        """Note the first operation without a known form."""
        name = getattr(func.__self__, "__name__", "") if is_getter(func) else name_of(func)
        self.reasons |= {leaf: f"no rule for {name}" for leaf in leaves - set(self.reasons)}

    def is_nested(self, tensors: Sequence[Tensor]) -> bool:
        """Say whether a transform within the objective, such as vmap, renames its tensors."""
        if self.compiling:
            return any(x not in self.sources and self.operations.number(x) is None for x in tensors)
        return any(depth(x) > self.depth for x in tensors)

    def too_deep(self, out: Tensor) -> bool:
        """Say whether an output belongs to a transform within the objective."""
        return not self.compiling and depth(out) > self.depth

    def may_be_use(self, func: Callable[..., Any]) -> bool:
        """Say whether an operation has a known form, if its arguments fit."""
        if not torch.is_grad_enabled():
            return False
        if _rules.rule_of(func) is not None:
            return True
        kinds = _local.is_deterministic if self.layout.kind != "batched" else _local.may_be_local
        return kinds(func)

    def derives(self, func: Callable[..., Any], given: list[Tensor], sources: list[Source]) -> bool:
        """Say whether the output is a function of parameters alone, to be made again at will."""
        constant = [x for x in given if x not in self.sources]
        if any(s.expanded for s in sources) or not torch.is_grad_enabled():
            return False
        if constant and (self.layout.kind != "batched" or any(self.traced(x) for x in constant)):
            return False
        alone = all(self.operations.axis(x) is None for x in constant)
        return alone and _local.is_deterministic(func)

    def recognises(
        self, func: Callable[..., Any], args: Any, kwargs: Any, given: list[Tensor], out: Tensor
    ) -> bool:
        """Say whether the gradient of the parameters is known from the output's."""
        axis = self.operations.axis_next(out) if self.layout.kind == "batched" else 0
        if out.is_complex() or axis is None or axis is LOST:
            return False
        args, kwargs, arrays = self.mark(args, kwargs)
        axes = [self.operations.axis(x) for x in arrays]
        if self.layout.kind == "batched" and LOST in axes:
            return False
        pairs = [(x, self.sources[x]) for x in given if x in self.sources]
        rule = _rules.rule_of(func)
        if rule is not None:
            arguments = _rules.bind(rule, args, kwargs)
            shapes = {id(source): tuple(x.shape) for x, source in pairs}
            named = {n: shapes[id(s)] for n, s in arguments.items() if isinstance(s, Source)}
            visible = axis if self.layout.kind == "batched" else None
            return _rules.fits(rule, arguments, arrays, axes, visible, named)
        if self.layout.kind != "batched":
            return True
        return _local.is_local(func, (args, kwargs), pairs, list(zip(arrays, axes)), axis, out)

    def use(self, step: Step, given: list[Tensor], out: Tensor) -> Step:
        """Return the step of a recognised operation."""
        batched = self.layout.kind == "batched"
        axis = self.operations.axis_next(out) if batched else 0
        arrays = [x for x in given if x not in self.sources]
        axes = tuple(self.operations.axis(x) for x in arrays) if batched else (None,) * len(arrays)
        shape = tuple(out.shape)
        return step._replace(
            use=True, axis=axis, axes=axes, shape=shape, dtype=out.dtype, device=out.device
        )

    def alias(self, tree: Any) -> Any:
        """Return arguments with aliases for parameters, where autograd need not go on."""
        if self.compiling:
            return tree

        def replace(x: Any) -> Any:
            if not isinstance(x, Tensor) or x not in self.sources or not x.requires_grad:
                return x
            alias = x.view_as(x)
            self.aliases.add(alias.grad_fn)
            return alias

        return _sources.substitute(tree, replace)

    def mark(self, args: Any, kwargs: Any) -> tuple[Any, Any, list[Tensor]]:
        """Return the arguments with sources and places for tensors, and the tensors there."""
        arrays: list[Tensor] = []

        def replace(x: Tensor) -> Any:
            if x in self.sources:
                return self.sources[x]
            arrays.append(x)
            return Place(len(arrays) - 1)

        return (*_sources.substitute((args, kwargs), replace), arrays)

    def derived(self, step: Step, args: Any, kwargs: Any, out: Any) -> None:
        """Remember a function of parameters and constants alone."""

        def replace(x: Tensor) -> Source:
            if x in self.sources:
                return self.sources[x]
            self.constants.append(x)
            return _sources.of_constant(self.count + len(self.constants) - 1)

        given = _sources.substitute((args, kwargs), replace)
        source = _sources.derive(step.func, given[0], given[1], expanded=step.axis == 0)
        parts = [out] if isinstance(out, Tensor) else list(out)
        for index, part in enumerate(parts):
            if self.traced(part) or (self.plan is not None and self.compiling):
                self.sources[part] = source if part is out else _sources.pick(source, index)
                self.versions[part] = version_of(part)

    def finish(self, outputs: list[Tensor]) -> None:
        """Deny the uses whose arguments were overwritten after them."""
        if self.plan is None and self.compiling:
            self.deny_hidden(outputs)
            for x in outputs:
                self.deny(Tensor.add, set(self.sources[x].leaves if x in self.sources else ()))
        for place, leaves, versions in self.kept:
            if any(version_of(x) != version for x, version in versions):
                self.deny(self.steps[place].func, leaves)


_READERS = named(
    "size dim ndimension numel nelement stride storage_offset is_floating_point is_complex "
    "is_contiguous element_size get_device data_ptr item tolist __len__ __bool__ __format__ __repr__ "
    "__hash__ is_same_size equal allclose"
)
_IN_PLACE = re.compile(r"[a-z0-9]\w*[^_]_|__setitem__|__i(add|sub|mul|div|truediv|pow)__")
_VIEWS = _sources.ENTRYWISE | named("chunk split unbind narrow select __getitem__ expand diagonal")


def version_of(x: Tensor) -> int:
    """Return how often a tensor was written to; graphs are told by the names of operations."""
    return 0 if torch.compiler.is_compiling() else x._version


def common_depth(tensors: Sequence[Tensor]) -> int:
    """Return how many transforms of torch.func what is made of all these tensors is in."""
    return depth(sum(x.new_zeros((), dtype=torch.float32, device="cpu") for x in tensors))


def depth(x: Any) -> int:
    """Return how many transforms of torch.func a tensor is in."""
    inner = torch.func.debug_unwrap(x, recurse=False)
    return 0 if inner is x else 1 + depth(inner)
