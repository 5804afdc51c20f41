"""What objectives are given and return, and the names of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from torchjd_func import _tree
from torchjd_func._check._messages import at, describe, differentiable, fail, one_device


def objective(value: Any) -> None:
    """Check that an objective can be called, and is no module, which would train the data."""
    if isinstance(value, nn.Module):
        rule = "be a function of parameters and a batch that returns losses"
        fail(TypeError, "`fn`", rule, f"the module {type(value).__name__}", _FUNCTIONALIZE)
    if not callable(value) or hasattr(value, "update_fn"):
        remedy = "Pass the objective, then its arguments."
        fail(TypeError, "`fn`", "be a function of parameters and a batch", describe(value), remedy)


def reserved(fn: Any, name: str, n_args: int) -> None:
    """Check that a keyword that transforms take is no argument that the objective waits for."""
    inner = fn
    while not hasattr(inner, "__code__"):
        if isinstance(inner, partial):
            n_args += len(inner.args)
            inner = None if name in inner.keywords else inner.func
        else:
            example = getattr(inner, "example", None)
            inner = getattr(inner, "fn", None) if example is None else example.fn
        if inner is None:
            return
    code, bound = inner.__code__, hasattr(inner, "__self__")
    by_place = code.co_varnames[: code.co_argcount][bound:]
    by_name = code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount]
    if name in by_name or name in by_place[n_args:]:
        rule = f"have no argument of the name {name!r}, which what jd.grad returns takes itself"
        fail(ValueError, "the objective", rule, "one", "Rename it, or pass it by its position.")


def params(name: str, paths: Sequence[str], leaves: Sequence[Any]) -> None:
    """Check that `leaves` can be differentiated."""
    if not leaves:
        remedy = (
            "Check `argnums`, or pass the parameters of jd.functionalize, which are those that "
            "require a gradient; a step takes the state first: step(state, params, x)."
        )
        fail(ValueError, name, "hold at least one floating-point tensor", "an empty pytree", remedy)
    modules = any(isinstance(leaf, nn.Module | Iterator) for leaf in leaves)
    differentiable(name, paths, leaves, _FUNCTIONALIZE if modules else _ARGUMENTS)


_FUNCTIONALIZE = (
    "Write apply, params, buffers = jd.functionalize(model); differentiate by params, and call "
    "apply(params, buffers, x) in the objective."
)
_ARGUMENTS = (
    "Pass what is not differentiated as another argument; a function made with a rule takes the "
    "state first: step(state, params, x)."
)


def losses(paths: Sequence[str], leaves: Sequence[Any], some: bool = True) -> None:
    """Check that what an objective returned can be differentiated."""
    if some and not any(not isinstance(leaf, Tensor) or leaf.numel() > 0 for leaf in leaves):
        remedy = (
            "Return a tensor, or a pytree of tensors, from the objective, and leave the step out "
            "where a batch is empty."
        )
        fail(ValueError, "`losses`", "hold at least one number", "none", remedy)
    for path, leaf in zip(paths, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            remedy = (
                "Return a tensor, or leave the loss out, also by `present`; with an auxiliary "
                "output, return (losses, aux) and pass has_aux=True."
            )
            fail(TypeError, at("losses", path), "be a tensor", describe(leaf), remedy)
        if not leaf.is_floating_point():
            name, got = at("losses", path), str(leaf.dtype)
            remedy = (
                "Pass has_aux=True if the objective returns (losses, aux), such as buffers; else "
                "convert it with .float()."
            )
            fail(TypeError, name, "be floating-point", got, remedy)
        differentiable("`losses`", [path], [leaf], "Return dense tensors.")
    one_device("`losses`", leaves)


def aux_pair(out: Any) -> tuple[Any, Any]:
    """Return the `(losses, aux)` of an objective with an auxiliary output."""
    if not isinstance(out, tuple) or len(out) != 2:
        rule, remedy = "return (losses, aux) when has_aux=True", "Return a pair, or drop has_aux."
        fail(TypeError, "`fn`", rule, describe(out), remedy)
    return out


def same_aux(maker: str, asked: bool, made: bool) -> None:
    """Check that a transform and the objective agree on the auxiliary output."""
    if asked != made:
        remedy = f"Pass has_aux=True both to {maker} and to what differentiates, or to neither."
        fail(ValueError, "`has_aux`", f"be {made}, as in {maker}", asked, remedy)


def two_batches(args: tuple[Any, ...]) -> tuple[list[Any], tuple[Any, ...], tuple[Any, ...]]:
    """Return leading arguments and the two batches that follow them."""
    *leading, batch_1, batch_2 = args if len(args) >= 3 else (None, None)
    if not leading or not isinstance(batch_1, tuple) or not isinstance(batch_2, tuple):
        rule = "be the last two arguments, each a tuple of arguments of the objective"
        got = [type(arg).__name__ for arg in args]
        fail(ValueError, "`batch_1, batch_2`", rule, got, "Call f(params, (x_1,), (x_2,)).")
    return leading, batch_1, batch_2


def batches(values: Sequence[Any]) -> None:
    """Check that each batch is a tuple of arguments of the objective."""
    for value in values:
        if not isinstance(value, tuple):
            rule, remedy = "each be a tuple of arguments", "Call f(state, params, (x_1,), (x_2,))."
            fail(TypeError, "`batch_1, batch_2, batch_3`", rule, describe(value), remedy)


def same_losses(sizes: Sequence[int]) -> None:
    """Check that all batches have as many losses."""
    if len(set(sizes)) > 1:
        rule, remedy = "have as many losses in each batch", "Make the batches of one size."
        fail(ValueError, "`fn`", rule, list(sizes), remedy)


def not_instancewise(name: str, fn: Any, kind: type) -> None:
    """Check that the losses of an objective are not one for each example."""
    if isinstance(fn, kind):
        rule, remedy = "be given losses that are means", "Use jd.gramian on the whole batch."
        fail(TypeError, f"`{name}`", rule, repr(fn), remedy)


def carry_aux(position: Any, has_aux: bool) -> None:
    """Check that there is an auxiliary output to hand on."""
    if position is not None and not (isinstance(position, int) and position >= 0 and has_aux):
        rule, got = "be the position of an argument, with has_aux=True", f"{position}, {has_aux=}"
        remedy = "Return (losses, buffers), and name the position of the buffers."
        fail(ValueError, "`carry_aux`", rule, got, remedy)


def one_for_each_example(losses: Any, several: bool = False) -> None:
    """Check the losses of an instance-wise objective, of which an example may have several."""
    if not (isinstance(losses, Tensor) and losses.ndim in (1, 1 + several)):
        name, remedy = "`losses` of an instance-wise objective", "Return one for each example."
        rule = "have shape (b,) or (b, k)" if several else "have shape (b,)"
        fail(ValueError, name, rule, describe(losses), remedy)


def as_many_losses(m: int, size: int, several: int) -> None:
    """Check that each example has as many of m losses as it has in a batch larger by one."""
    if m != size * several:
        name, rule = "an instance-wise objective", "return as many losses for each example"
        got = f"{m} of {size} examples, and {several * (size + 1)} of {size + 1}"
        remedy = (
            "Outputs (b, 1) less targets (b,) are (b, b): bring both to one shape, as by squeeze."
        )
        fail(ValueError, name, rule, got, remedy)


def one_loss(loss: Any) -> None:
    """Check the loss of one example."""
    if not (isinstance(loss, Tensor) and loss.ndim == 0):
        remedy = "Return one loss of one example; jd.instancewise takes k for each, (b, k)."
        fail(ValueError, "the loss of `jd.per_example`", "have shape ()", describe(loss), remedy)


def like_losses(present: Any, losses: Any, fits: bool) -> None:
    """Check that flags are a tensor, or have the structure of the losses."""
    if not fits:
        rule = f"be a bool tensor, or a tree of bools like the losses, {_tree.paths(losses)}"
        got = _tree.paths(present) if isinstance(present, Mapping) else describe(present)
        remedy = "Give a bool for each loss, with the names that the objective returns."
        fail(ValueError, "`present`", rule, got, remedy)


def size(value: Any, spans: bool) -> None:
    """Check how many examples this process says that it has."""
    if value is None:
        return
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    counts = isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex()
    if not (whole or counts):
        got = describe(value) if isinstance(value, Tensor) else repr(value)
        remedy = "Pass the number of examples of this process, e.g. len(x)."
        fail(ValueError, "`size`", "be an int of at least 0, or a 0-d tensor", got, remedy)
    if not spans:
        rule = "be left out where neither the rule nor the objective spans processes"
        remedy = "Wrap the rule in jd.distributed.data_parallel, or leave `size` out."
        fail(ValueError, "`size`", rule, value, remedy)


def not_features(used: bool, got: str) -> None:
    """Check that weights are not asked for by features where there are none."""
    if used:
        name, rule = "`where=jd.features`", "be used in jd.grad, for an objective of jd.multitask"
        remedy = "Pass a predicate of paths: lambda path: path.startswith('encoder')."
        fail(ValueError, name, rule, got, remedy)


def some_named(option: str, chosen: Sequence[int], paths: Sequence[str]) -> None:
    """Check that a predicate of paths is true of some."""
    if not chosen:
        got, remedy = f"none of {list(paths)}", "It is given paths such as 'encoder.0.weight'."
        fail(ValueError, f"`{option}`", "be true of the path of some parameter", got, remedy)


def in_dims(value: Any, n_args: int | None = None) -> None:
    """Check that dimensions are a tuple, and one, or `None`, for each argument."""
    if not isinstance(value, tuple):
        remedy = "Pass e.g. (None, 0) for parameters and a batch."
        fail(TypeError, "`in_dims`", "be a tuple or None", describe(value), remedy)
    if n_args is not None and (len(value) != n_args or all(dim is None for dim in value)):
        rule = f"have one entry for each of the {n_args} arguments, not all None"
        fail(ValueError, "`in_dims`", rule, value, "None stands for an argument that is shared.")


def divisible(leaf: Any, dim: int, n: int) -> None:
    """Check that a tensor can be cut into `n` equal parts."""
    name, remedy = "the batch", "Name what is not split in `in_dims`, with None."
    if not isinstance(leaf, Tensor) or leaf.ndim == 0:
        fail(TypeError, name, f"hold tensors with a dimension {dim}", describe(leaf), remedy)
    if not isinstance(dim, int) or not -leaf.ndim <= dim < leaf.ndim:
        rule = "name a dimension of what is split, or be None"
        fail(ValueError, "`in_dims`", rule, f"{dim!r} of {describe(leaf)}", remedy)
    if leaf.shape[dim] % n:
        fail(ValueError, name, f"be divisible by n={n}", describe(leaf), "Choose another n.")


def names(kind: str, given: Any, expected: Iterable[str], *, partly: bool = False) -> None:
    """Check that there is a mapping, by these names, or by some of them."""
    if not isinstance(given, Mapping):
        remedy = "Pass it by name, and all arguments, as in apply(params, buffers, x)."
        fail(TypeError, f"`{kind}`", "be a dict by name", describe(given), remedy)
    missing = [] if partly else sorted(set(expected) - set(given), key=str)
    unknown = sorted(set(given) - set(expected), key=str)
    if unknown or missing:
        got = f"unknown {unknown} and missing {missing}"
        remedy = "Keep the names of the pytree it was made from."
        fail(ValueError, f"`{kind}`", "have exactly the expected names", got, remedy)


def unique_names(name: str, names: Sequence[str]) -> None:
    """Check that no two leaves have the same name."""
    twice = sorted({path for path in names if list(names).count(path) > 1})
    if twice:
        remedy = "Use keys without dots in the pytree."
        fail(ValueError, f"`{name}`", "have one leaf of each name", f"{twice} twice", remedy)


def tensors(name: str, paths: Sequence[str], leaves: Sequence[Any]) -> None:
    """Check that all leaves are tensors."""
    for path, leaf in zip(paths, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            got = f"{describe(leaf)} at {path!r}"
            fail(TypeError, f"`{name}`", "hold tensors only", got, "Convert it, or leave it out.")


def same_structure(name: str, of: str, same: bool) -> None:
    """Check that two pytrees were found to have one structure."""
    if not same:
        remedy = "Pass what came out of a step, and what went in, in the same order."
        fail(ValueError, f"`{name}`", f"have the structure of `{of}`", "another", remedy)


def same_shape(name: str, path: str, got: Tensor, want: Tensor) -> None:
    """Check that a leaf has the shape of its counterpart."""
    if got.shape != want.shape:
        rule = f"have shape {tuple(want.shape)} at {path!r}"
        remedy = "Pass what belongs to these parameters and losses."
        fail(ValueError, f"`{name}`", rule, tuple(got.shape), remedy)
