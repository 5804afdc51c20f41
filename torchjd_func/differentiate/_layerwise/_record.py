"""Run an objective inside `torch.func.vjp`, watched."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from torchjd_func import _tree
from torchjd_func.differentiate._layerwise._decide import Decider
from torchjd_func.differentiate._layerwise._disturbed import Disturbed, Swap
from torchjd_func.differentiate._layerwise._draws import States
from torchjd_func.differentiate._layerwise._followed import Followed
from torchjd_func.differentiate._layerwise._graph import STRAY, Replay, reaches
from torchjd_func.differentiate._layerwise._operations import Operations
from torchjd_func.differentiate._layerwise._order import Order
from torchjd_func.differentiate._layerwise._plan import Layout, Plan, Step
from torchjd_func.differentiate._layerwise._spelled import Spelled
from torchjd_func.differentiate._layerwise._trace import Trace, Use
from torchjd_func.differentiate._pullback import reached, replaced, tracked_inside


class Returned(NamedTuple):
    """What an objective returned."""

    losses: list[Tensor]  # as they came
    outputs: Any  # what is differentiated
    aux: list[Tensor]


Call = Callable[..., Callable[[], Returned]]  # (leaves, *example) -> what reads what it returned


class Batch(NamedTuple):
    """The loss of one example, and how to map it over a batch."""

    fn: Callable[..., Any]
    places: tuple[int, ...]  # the arguments that are mapped over, or shared as they are
    args: tuple[Any, ...]
    dims: tuple[Any, ...]
    randomness: str

    def fill(self, args: tuple[Any, ...], example: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments of one example."""
        return tuple(replaced(args, self.places, example))

    def map(self, fn: Callable[..., Any], fixed: tuple[Any, ...], dims: tuple[Any, ...]) -> Any:
        """Map `fn(*fixed, *example)` over the batch."""
        rest = tuple(self.dims[place] for place in self.places)
        given = [self.args[place] for place in self.places]
        return vmap(fn, in_dims=(*dims, *rest), randomness=self.randomness)(*fixed, *given)


class Problem(NamedTuple):
    """An objective at one point.

    Attributes:
        call: `(leaves, *example) -> reader`, called as `reader()` where nobody watches.
        leaves: The parameters.
        layout: How it treats examples; how many lie along axes is seen when it is planned.
        inputs: All tensors among the arguments.
        batch: What to map over, for an objective of one example.
        larger: How many examples there are, the call and the inputs with one more, in ways that
            may fit the arguments.
        noisy: The call and the inputs with other data; nothing where that makes no difference.
        check: Whether a plan must prove itself.
        names: Of the parameters.
        generators: The states that random generators had before operations were handed these;
            filled as it runs.
    """

    call: Call
    leaves: Sequence[Tensor]
    layout: Layout
    inputs: Sequence[Tensor]
    batch: Batch | None = None
    larger: Callable[[], Iterator[tuple[int, Call, Sequence[Tensor]]]] = lambda: iter(())
    noisy: Callable[[Callable[[Tensor], Tensor]], Sequence[tuple[Call, Sequence[Tensor]]]] = (
        lambda change: ()
    )
    check: bool = False
    names: Sequence[str] = ()
    generators: States | None = None


class Recorded(NamedTuple):
    """One run of an objective."""

    outputs: Any
    aux: list[Tensor]
    plan: Plan
    uses: list[Use]
    values: list[Tensor]  # parameter leaves, then constants
    pull: Callable[[Any, bool, Sequence[int]], tuple[list[Tensor], list[Tensor]]]
    mode: Trace
    connected: set[int]  # the leaves that autograd reaches, but for uses
    dependent: bool  # whether some output depends on a use or a leaf


def record(
    problem: Problem,
    plan: Plan | None = None,
    other: Operations | None = None,
    *,
    noisy: int = 0,
    swap: Swap | None = None,
) -> Recorded:
    """Run the objective, and keep what the pullback and the forms need.

    Args:
        problem: The objective.
        plan: What operations become; `None` to decide it, without perturbations.
        other: The operations of a run with another batch.
        noisy: What gets noise, where autograd's graph is at hand, as of `Disturbed`.
        swap: As of `Disturbed`, too.

    Returns:
        The run. `pull(cotangents, uses, leaves)` gives gradients by the outputs of uses, if wanted,
        and by leaves.
    """
    call, leaves, layout, inputs, batch, *_ = problem
    layout = layout if plan is None else plan.layout
    compiling = torch.compiler.is_compiling()
    watched = not compiling or plan is None or len(plan.opaque) < len(leaves)
    frozen = [leaf.view_as(leaf) for leaf in leaves]
    steps = [] if plan is None else [step for step in plan.steps if step.use]
    front = () if batch is None else (layout.size,)
    blanks = [partial(_blank, step, front) for step in steps]
    hidden = compiling or batch is not None  # whether the graph of autograd is out of reach
    zeros = [blank() for blank in blanks] if hidden else []
    outer = frozen if compiling and torch._C._are_functorch_transforms_active() else []
    modes: list[Trace] = []
    inner: list[Any] = []
    dependent: list[bool] = []

    def run(perturbations: list[Tensor], primals: list[Tensor], *args: Any) -> Any:
        """Return outputs; constants, arrays of all uses and auxiliary tensors."""
        # In graphs, what torch.func is handed does not say that it is traced (torch 2.13)
        handles = [x.view_as(x) for x in primals] if compiling else primals
        seen = inputs if batch is None else _tree.tensors(args)
        if compiling:
            assert plan is not None
            mode = Replay(handles, Followed(seen, plan), plan, perturbations, outer)
        else:
            shifts = perturbations if hidden else None
            mode = _watcher(problem, plan, other, handles, seen, shifts, noisy, swap)
        modes.append(mode)
        with mode if watched else Spelled(), _uncompiled(compiling):
            read = call(handles, *args)
        losses, outputs, aux = read()
        if watched:
            mode.finish(losses)
        arrays = [x for use in mode.uses for x in use.arrays]
        return outputs, [*mode.constants, *arrays, *aux]

    def mapped(perturbations: list[Tensor], primals: list[Tensor]) -> Any:
        if batch is None:
            out = run(perturbations, primals)
        else:
            out = batch.map(tracked_inside(run), (perturbations, primals), (0, None))
        uses = perturbations if hidden else modes[0].edges
        outs = _tree.leaves(out[0])
        inner.append((outs, uses, primals))
        dependent.append(any([x.requires_grad for x in outs]))
        return out

    with _differentiated(compiling):
        result: Any = torch.func.vjp(mapped, zeros, frozen, has_aux=True)
    outputs, pullback, rest = result
    mode = modes[0]
    followed = compiling and watched and not mode.changed
    if plan is not None and followed and reaches(pullback, outputs, plan.opaque):
        mode.changed.append(STRAY)
    rest = iter(rest)
    constants = [next(rest) for _ in mode.constants]
    kept = [use._replace(arrays=[next(rest) for _ in use.arrays]) for use in mode.uses]
    aux = list(rest)

    connected = set() if compiling else reached(inner[0][0], inner[0][2], mode.around)
    mode.around.clear()  # they hold what autograd has saved
    values = [*frozen, *constants]
    if compiling:
        pull = partial(_pull_compiled, pullback)
    else:
        outs, perturbed, handles = inner[0]
        pull = partial(_pull, outs, (perturbed, blanks), (handles, frozen))
    planned = Plan(layout, (), (), {}, ()) if plan is None else plan
    return Recorded(outputs, aux, planned, kept, values, pull, mode, connected, dependent[0])


def _watcher(
    problem: Problem,
    plan: Plan | None,
    other: Operations | None,
    handles: Sequence[Tensor],
    seen: Sequence[Tensor],
    perturbations: Sequence[Tensor] | None,
    noisy: int,
    swap: Swap | None,
) -> Trace:
    """Return what watches a run that is not compiled."""
    layout = problem.layout if plan is None else plan.layout
    size = layout.size if layout.kind == "batched" else 0
    planned = plan is not None
    operations = Operations(seen, size, other, problem.generators, planned=planned)
    if plan is None:
        order = None if other is None else Order(operations, seen)
        return Decider(handles, layout, operations, order)
    if swap is not None and perturbations is None:
        return Disturbed(handles, layout, operations, plan, noisy, swap)
    return Trace(handles, layout, operations, plan, perturbations)


def _uncompiled(compiling: bool) -> AbstractContextManager[object]:
    """Let functions that were compiled by themselves run as they are."""
    if compiling or "torch._dynamo" not in sys.modules:
        return nullcontext()
    # It hides what they do, and would compile what watches them (torch 2.13).
    return torch.compiler.set_stance("force_eager")


def _differentiated(compiling: bool = False) -> AbstractContextManager[object]:
    """Leave inference mode, where tensors do not know what was written to them."""
    if compiling or not torch.is_inference_mode_enabled():
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    return stack


def _blank(step: Step, front: tuple[int, ...]) -> Tensor:
    """Return zeros like what a use returns, without memory."""
    zero = torch.zeros((), dtype=step.dtype, device=step.device)
    return zero.expand((*front, *step.shape))


def _pull_compiled(
    pullback: Callable[[Any], Any], cotangent: Any, uses: bool, wanted: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Pull a cotangent back; the compiler drops what is not wanted."""
    by_uses, by_leaves = pullback(cotangent)
    return by_uses, [by_leaves[leaf] for leaf in wanted]


def _pull(
    outs: list[Tensor],
    perturbed: tuple[Sequence[Any], Sequence[Callable[[], Tensor]]],
    handles: tuple[Sequence[Tensor], Sequence[Tensor]],
    cotangent: Any,
    uses: bool,
    wanted: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """Pull a cotangent back to what is wanted alone.

    Args:
        outs: The losses.
        perturbed: The outputs of uses, or their places, and how to make zeros of their shapes.
        handles: The parameters, as they were handed on, and as they are.
        cotangent: Of the losses.
        uses: Whether gradients by `perturbed` are wanted.
        wanted: The leaves by which gradients are wanted.

    Returns:
        Both gradients.
    """
    first = list(zip(*perturbed, strict=True)) if uses else []
    rest = [(handles[0][leaf], partial(torch.zeros_like, handles[1][leaf])) for leaf in wanted]
    places, blanks = zip(*first, *rest, strict=True) if first or rest else ((), ())
    grads = _gradients(outs, places, _tree.leaves(cotangent))
    pairs = zip(blanks, grads, strict=True)
    full = [blank() if grad is None else grad for blank, grad in pairs]
    return full[: len(first)], full[len(first) :]


def _gradients(
    outs: list[Tensor], places: Sequence[Any], cotangents: list[Tensor]
) -> Sequence[Tensor | None]:
    """Return gradients by places, `None` where the outputs do not depend on one."""
    pairs = [(x, grad) for x, grad in zip(outs, cotangents, strict=True) if x.requires_grad]
    if not pairs or not places:
        return [None] * len(places)
    heads, grads = zip(*pairs, strict=True)
    with _differentiated():
        options = {"retain_graph": True, "create_graph": torch.is_grad_enabled()}
        return torch.autograd.grad(heads, places, grads, allow_unused=True, **options)
