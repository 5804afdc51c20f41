"""What objectives are given and return, and the names of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _tree
from torchjd_func._check._messages import describe, differentiable, fail, one_device


def params(name: str, paths: Sequence[str], leaves: Sequence[Any]) -> None:
    """Check that `leaves` can be differentiated."""
    if not leaves:
        remedy = "Check `argnums`, or pass the parameters of jd.functionalize."
        fail(ValueError, name, "hold at least one floating-point tensor", "an empty pytree", remedy)
    differentiable(name, paths, leaves, "Pass what is not differentiated as another argument.")


def losses(paths: Sequence[str], leaves: Sequence[Any], some: bool = True) -> None:
    """Check that what an objective returned can be differentiated."""
    if some and not any(not isinstance(leaf, Tensor) or leaf.numel() > 0 for leaf in leaves):
        remedy = "Return a tensor, or a pytree of tensors, from the objective."
        fail(ValueError, "`losses`", "hold at least one number", "none", remedy)
    for path, leaf in zip(paths, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            remedy = "With an auxiliary output, return (losses, aux) and pass has_aux=True."
            got = f"{describe(leaf)} at {path!r}"
            fail(TypeError, "`losses`", "be tensors", got, remedy)
        if not leaf.is_floating_point():
            name, got = f"`losses` at {path!r}", str(leaf.dtype)
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


def unproven(names: Sequence[str], operations: Sequence[str]) -> str:
    """Return the warning that a loss depends on more than its own example, or seems to."""
    pairs = ", ".join(f"{name!r} ({where})" for name, where in zip(names, operations, strict=True))
    return (
        f"The Gramian of an instance-wise objective is not the sum over uses of {pairs}: losses "
        "depend on other examples, or these operations are used in an unknown way. Their rows are "
        "computed by one backward pass for each loss, which is right and slower. "
        "jd.check_instancewise tells which examples are mixed; jd.explain_gramian shows the cost."
    )


def unplanned_graph(reason: str) -> str:
    """Return the warning that a compiled function costs a backward pass for each loss."""
    return (
        f"An instance-wise objective is compiled without a plan that was proven: {reason}. So its "
        "rows cost one backward pass for each loss. Call the function, or jd.init_state, once with "
        "the same objective and shapes before compiling."
    )


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


def dependent(tracked: bool) -> None:
    """Check that some loss depends on what is differentiated."""
    if not tracked:
        rule, got = "depend on the differentiated argument", "losses that are constants of it"
        remedy = (
            "Call apply(params, ...) of jd.functionalize, or functional_call(model, params, ...), "
            "not model(...), and detach nothing on the way."
        )
        fail(ValueError, "`losses`", rule, got, remedy)


def one_for_each_example(losses: Any, several: bool = False) -> None:
    """Check the losses of an instance-wise objective, of which an example may have several."""
    if not (isinstance(losses, Tensor) and losses.ndim in (1, 1 + several)):
        name, remedy = "`losses` of an instance-wise objective", "Return one for each example."
        rule = "have shape (b,) or (b, k)" if several else "have shape (b,)"
        fail(ValueError, name, rule, describe(losses), remedy)


def one_loss(loss: Any) -> None:
    """Check the loss of one example."""
    if not (isinstance(loss, Tensor) and loss.ndim == 0):
        remedy = "Return one loss of one example; jd.instancewise takes k for each, (b, k)."
        fail(ValueError, "the loss of `jd.per_example`", "have shape ()", describe(loss), remedy)


def like_losses(present: Any, fits: bool) -> None:
    """Check that flags are a tensor, or have the structure of the losses."""
    if not fits:
        rule, got = "be a bool tensor, or a tree of bools like the losses", describe(present)
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


def disjoint(shared: Sequence[Tensor], paths: Sequence[str], heads: Sequence[Tensor]) -> None:
    """Check that no parameter is both shared and of a head."""
    places = {_place(leaf) for leaf in shared} - {None}
    for path, leaf in zip(paths, heads, strict=True):
        if any(leaf is other for other in shared) or _place(leaf) in places:
            name, rule = "the parameters of the heads", "not be shared parameters as well"
            remedy = "Let the trunk return what the head needs of it as another feature."
            fail(ValueError, name, rule, f"the same tensor at {path!r}", remedy)


def _place(leaf: Tensor) -> tuple[int, int] | None:
    """Return where a tensor lies in memory, or `None` where that is not known or is nowhere."""
    if torch.compiler.is_compiling() or not leaf.numel():
        return None
    try:
        return leaf.data_ptr(), leaf.numel()
    except RuntimeError:  # a tensor under torch.func.vmap has no memory of its own
        return None


def features(paths: Sequence[str], leaves: Sequence[Any]) -> None:
    """Check that the shared features can be differentiated."""
    if not leaves:
        remedy = "Return a tensor, or a pytree of tensors, from the trunk."
        fail(ValueError, "the features", "hold at least one tensor", "an empty pytree", remedy)
    remedy = "Return other tensors as the auxiliary output, or take them from the batch."
    differentiable("the features", paths, leaves, remedy)


def head_weights(weights: Tensor | None) -> Tensor:
    """Return the weights that are to scale the gradients of the heads."""
    if weights is None:
        rule, got = "be False for a method without a weighting", "True"
        fail(ValueError, "`scale_heads`", rule, got, "Use a method that weighs the gradients.")
    return weights


def multitask_params(value: Any, heads: Any) -> tuple[Any, Any]:
    """Return shared and head parameters of a multi-task objective."""
    if not isinstance(value, tuple) or len(value) != 2:
        name, rule = "`params` of a multi-task objective", "be (shared, {name: head_params})"
        fail(ValueError, name, rule, describe(value), "Pass a pair.")
    names("head_params", value[1], heads)
    paths, leaves = _tree.paths(value[1]), _tree.leaves(value[1])
    remedy = "Pass what is not differentiated as a part of the batch."
    differentiable("the parameters of the heads", paths, leaves, remedy)
    return value


def heads(value: Any) -> None:
    """Check that there are heads by name."""
    if not isinstance(value, Mapping):
        fail(TypeError, "`heads`", "be a dict", type(value).__name__, "Pass {name: head}.")
    if not value:
        fail(ValueError, "`heads`", "have at least one task", "none", "Pass {name: head}.")


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


def same_structure(name: str, same: bool) -> None:
    """Check that two pytrees were found to have one structure."""
    if not same:
        remedy = "Pass the pytree that jd.grad returned for these parameters."
        fail(ValueError, f"`{name}`", "have the structure of the parameters", "another", remedy)


def same_shape(name: str, path: str, got: Tensor, want: Tensor) -> None:
    """Check that a leaf has the shape of its counterpart."""
    if got.shape != want.shape:
        rule = f"have shape {tuple(want.shape)} at {path!r}"
        remedy = "Pass what belongs to these parameters and losses."
        fail(ValueError, f"`{name}`", rule, tuple(got.shape), remedy)
