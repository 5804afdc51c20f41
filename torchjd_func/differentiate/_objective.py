"""What transforms ask of objectives, and objectives without a structure of their own.

An objective knows how to linearize itself, and a combinator asks what it wraps to do so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from torchjd_func import _check, _tree
from torchjd_func.differentiate._autocast import as_called
from torchjd_func.differentiate._linearized import Jacobian, Leaves, Linearized, Seen, split_aux
from torchjd_func.differentiate._mask import all_absent, masked
from torchjd_func.differentiate._pullback import basis, call, pull_rows, scaled, vjp_aux, vjp_nested
from torchjd_func.differentiate._request import Request, bind, chosen

PyTree = Any
Function = Callable[..., Any]


class Objective(Protocol):
    """A function of parameters and a batch that returns losses."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the losses (and `aux`, if there is one)."""
        ...

    def linearize(self, request: Request) -> Linearized:
        """Run once, and keep what is needed to pull weights back."""
        ...

    def wrap(self, change: Callable[[Function], Function]) -> Function:
        """Return the objective of changed functions, with the same structure."""
        ...

    def rows_like(self, primals: PyTree, m: int) -> PyTree:
        """Return placeholders for the rows that a rule is given, of `m` losses of this process."""
        ...

    def plan(self, request: Request) -> None:
        """Find out before the first call what is worth remembering; it changes no result."""
        ...

    @property
    def spans_processes(self) -> bool:
        """Whether losses or parameters are those of several processes."""
        ...


def as_objective(fn: Function | Objective) -> Any:
    """Return an objective that can linearize itself."""
    if hasattr(fn, "linearize"):
        return fn
    _check.objective(fn)
    return Plain(fn)


def shown(fn: Any) -> str:
    """Return the name of a function, or how an objective shows itself."""
    return getattr(fn, "__name__", repr(fn))


def rows_like(primals: PyTree, m: int) -> PyTree:
    """Return placeholders for the rows of all leaves."""
    _check.params("the differentiated argument", _tree.paths(primals), _tree.leaves(primals))
    return _tree.map(lambda leaf: _tree.placeholder(leaf, (m, *leaf.shape)), primals)


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Plain:
    """An objective of which nothing is known."""

    fn: Function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)

    def linearize(self, request: Request) -> Linearized:
        """Pull back through the whole function."""
        if request.route == "layerwise":
            return linearize_by_layers(self, request)
        return linearize_whole(self.fn, request)

    def wrap(self, change: Callable[[Function], Function]) -> Function:
        return change(self.fn)

    def rows_like(self, primals: PyTree, m: int) -> PyTree:
        """Return placeholders for the rows of all leaves."""
        return rows_like(primals, m)

    def plan(self, request: Request) -> None:
        """Remember nothing."""

    @property
    def spans_processes(self) -> bool:
        return False

    def __repr__(self) -> str:
        return shown(self.fn)


def linearize_by_layers(fn: Objective, request: Request) -> Linearized:
    """Keep what each use of a parameter was applied to."""
    # Here, since layers know instance-wise objectives, and these know this module.
    from torchjd_func.differentiate._layered import linearize_layers

    return linearize_layers(fn, request)


def plan_by_layers(fn: Objective, request: Request) -> None:
    """Find out how a run goes, layer by layer."""
    from torchjd_func.differentiate._layered import plan_layers

    plan_layers(fn, request)


def linearize_whole(
    fn: Function, request: Request, check: Callable[[PyTree], None] | None = None
) -> Linearized:
    """Run the objective once under `torch.func.vjp`."""
    bound = bind(request)
    where = None if request.alone else request.where
    places = None if where is None else chosen(where, bound.paths)

    def run(leaves: list[Tensor]) -> tuple[Tensor, tuple[PyTree, PyTree, Any]]:
        return _evaluate(fn, request, bound.fill(leaves), check)

    def jacobian(vector: Tensor, pull: Callable[[Tensor], list[Tensor]]) -> Jacobian:
        return by_pullback(scaled(pull, request.scale), vector, request.chunk_size)

    if places is None or request.route == "product":
        vector, pull, out = vjp_aux(run, bound.leaves)
        seen = None if places is None else Seen(places)
    else:
        vector, pull, out, rows = vjp_nested(
            run, bound.leaves, places, lambda vector, pull: jacobian(vector, pull).rows()
        )
        seen = Seen(places, rows)
    losses, aux, present = out
    return Linearized(
        losses=losses,
        aux=aux,
        vector=vector,
        present=present,
        leaves=Leaves(bound.paths, bound.rebuild),
        jacobian=jacobian(vector, pull),
        seen=seen,
    )


def by_pullback(
    pullback: Callable[[Tensor], list[Tensor]], vector: Tensor, chunk_size: int | None
) -> Jacobian:
    """Return the Jacobian whose rows are the pullbacks of unit cotangents."""
    return Jacobian(pullback, lambda: pull_rows(pullback, basis(vector), chunk_size))


def _evaluate(
    fn: Function,
    request: Request,
    args: tuple[Any, ...],
    check: Callable[[PyTree], None] | None,
) -> tuple[Tensor, tuple[PyTree, PyTree, Any]]:
    """Return the losses as one vector; losses, aux and which there are."""
    with as_called(request.autocast):
        losses, aux = split_aux(call(fn, args, request.kwargs), request.has_aux)
    if check is not None:
        check(losses)
    vector, present = masked(losses, request.present)
    # Inside torch.func.vjp, also where the losses depend on tensors of plain autograd.
    _check.dependent(vector.requires_grad or all_absent(request.present))
    tracked = [leaf.requires_grad for leaf in _tree.leaves(losses)]
    stepping = not request.alone and request.where is None and request.present is None
    if stepping and not all(tracked):
        _check.each_dependent(_tree.paths(losses), tracked)
    return vector, (losses, aux, present)
