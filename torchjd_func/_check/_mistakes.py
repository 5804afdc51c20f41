"""What torch says of common mistakes in an objective, and what to do about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor

from torchjd_func._check._messages import describe, fail, in_style


def explain(error: Exception, paths: Sequence[str], leaves: Sequence[Any]) -> NoReturn:
    """Raise an error that says what to do, if the mistake is a known one; else the error itself."""
    text = str(error)
    if in_style(text):
        raise error
    named = list(zip(paths, leaves, strict=True))
    for path, leaf in named:
        if type(leaf).__module__ == "numpy":
            rule, remedy = "hold tensors", "Convert arrays first: torch.as_tensor(x)."
            _say(error, "the arguments of the objective", rule, f"an array at {path!r}", remedy)
    tensors = [(path, leaf) for path, leaf in named if isinstance(leaf, Tensor)]
    if "device" in text or "meta" in text:
        _differ(error, tensors, "be on one device", "device", "Move them: x.to(device).")
    if "dtype" in text or "scalar type" in text or "to have the same type" in text:
        floating = [(path, leaf) for path, leaf in tensors if leaf.is_floating_point()]
        remedy = "Convert the batch: x.to(torch.float32), or use jd.cast_floating."
        _differ(error, floating, "have one floating-point dtype", "dtype", remedy)
    seen = f"{text} {_modules(error)}"
    for signs, rule, remedy in _KNOWN:
        if any(sign in seen for sign in signs):
            _say(error, "the objective", rule, f"{text.strip().splitlines()[0]!r}", remedy)
    raise error


def not_nested(tensors: Sequence[Tensor]) -> None:
    """Check that no tensor is nested."""
    if any(x.is_nested for x in tensors):
        fail(ValueError, "the objective", _NESTED_RULE, "one", _NESTED_REMEDY)


def not_written(name: str) -> NoReturn:
    """Raise since an operation writes to a tensor that was there before."""
    fail(ValueError, "the objective", _WRITTEN_RULE, f"`{name}` with `out`", _WRITTEN_REMEDY)


def _modules(error: Exception) -> str:
    """Return the modules that an error came through."""
    names, trace = [], error.__traceback__
    while trace is not None:
        names.append(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    return " ".join(names)


def numbered(operation: Any, tensors: Sequence[Tensor]) -> NoReturn:
    """Raise since an operation was given a tensor without numbers."""
    shape = next(describe(x) for x in tensors if x.is_meta)
    name = getattr(operation, "__name__", "an operation")
    rule = "use no parameter or buffer on the device 'meta', which has no numbers"
    remedy = (
        "Pass all parameters and buffers that the copy of the module needs: to('meta') unties "
        "weights (call tie_weights() on the copy, or tie them by hand), and buffers are not among "
        "named_parameters(): functional_call(copy, (params, buffers), (x,))."
    )
    fail(ValueError, "the objective", rule, f"{shape} in `{name}`", remedy)


def unmapped(error: Exception) -> NoReturn:
    """Raise an error that says how to pull back without vmap, which fails."""
    rule = "be made of operations whose backward passes torch can map over losses"
    remedy = "Pass chunk_size=1, which takes one backward pass after the other."
    _say(error, "the objective", rule, f"{str(error).strip().splitlines()[0]!r}", remedy)


def attribute(module: str, name: str, known: Sequence[str]) -> NoReturn:
    """Raise the error of a name that is not there, with those that are spelled alike."""
    text = f"module {module!r} has no attribute {name!r}"
    near = [path.replace(module, "jd") for path in known if _letters(path) == _letters(name)]
    if not near:
        raise AttributeError(text)
    # A name of its own keeps Python from adding a guess.
    raise AttributeError(f"{text}. Did you mean {' or '.join(near)}?", name="", obj=module)


def _letters(path: str) -> str:
    """Return the last name of a path in small letters, without underscores."""
    return path.rpartition(".")[2].replace("_", "").lower()


def _differ(
    error: Exception, tensors: Sequence[tuple[str, Any]], rule: str, attribute: str, remedy: str
) -> None:
    """Raise if some tensors differ in an attribute."""
    first: dict[Any, str] = {}
    for path, leaf in tensors:
        first.setdefault(getattr(leaf, attribute), f"{describe(leaf)} on {leaf.device} at {path!r}")
    if len(first) > 1:
        _say(error, "the arguments of the objective", rule, " and ".join(first.values()), remedy)


def _say(error: Exception, name: str, rule: str, got: str, remedy: str) -> NoReturn:
    """Raise the kind of an error, in the style of the library."""
    try:
        fail(TypeError if isinstance(error, TypeError) else ValueError, name, rule, got, remedy)
    except (TypeError, ValueError) as said:
        raise said from error


_NESTED_RULE = "use no nested tensors, which torch.func does not differentiate"
_NESTED_REMEDY = (
    "Pad and mask sequences, or pass nt.values() and nt.offsets(), and sum over parts by index_add."
)
_WRITTEN_RULE = "not overwrite parameters, arguments or what it closes over"
_WRITTEN_REMEDY = (
    "Write w = w + 1 for w += 1; buffers of a module come back from jd.functionalize's apply."
)
_KNOWN = (
    (("torch.nested", "NestedIntNode", "NestedTensor"), _NESTED_RULE, _NESTED_REMEDY),
    (
        ("torch.distributions.dirichlet",),
        "draw no sample of Dirichlet or Beta that is differentiated, whose torch.autograd.Function "
        "has no setup_context",
        "Draw g = torch.distributions.Gamma(concentration, torch.ones_like(concentration))"
        ".rsample(), and divide: g / g.sum(-1, keepdim=True).",
    ),
    (
        ("_local_tensor", "'FSDPParam' object", "mixed torch.Tensor and DTensor"),
        "not call a module whose parameters are sharded, nor use such parameters as constants",
        "Pass dict(model.named_parameters()) to an objective of jd.distributed.sharded, and call a "
        "copy of the module that fully_shard has not touched: functional_call(copy, params, (x,)).",
    ),
    (
        ("must override the setup_context",),
        "use no torch.autograd.Function without setup_context, as modules do that fully_shard or "
        "parallelize_module has touched",
        "Of such a module call a copy that neither has touched, in an objective of "
        "jd.distributed.sharded; for a Function of your own write setup_context, or compute losses "
        "by plain autograd and call jd.interop.backward_(losses, model, rule).",
    ),
    (
        ("reparametrizing",),
        "call modules with the parameters and buffers that they had for jd.functionalize",
        "Where a module makes some in its first forward pass, run it once before jd.functionalize.",
    ),
    (
        ("saved tensor hooks",),
        "not save tensors by hooks, as torch.utils.checkpoint does",
        "Compute losses by plain autograd and call jd.interop.backward_(losses, model, rule), or "
        "leave checkpoints out and use jd.accumulate or chunk_size.",
    ),
    (
        ("TransformType", "_higher_order_ops"),
        "use no torch.cond, and no other control flow that torch.func does not differentiate",
        "Decide by Python's if, or choose with torch.where; write loops in Python.",
    ),
    (
        ("TorchScript (most recent call last):\nRuntimeError: Cannot access data pointer",),
        "call no functions of torch.jit.script on CUDA, which torch fuses there and torch.func "
        "cannot look into",
        "Set the environment variable PYTORCH_JIT=0 before Python starts: they run as Python.",
    ),
    (
        ("convert all Tensors to FakeTensors",),
        "use no torch.func.linearize, which takes what others differentiate for constants",
        "Write torch.func.jvp(f, (x,), (v,)).",
    ),
    (
        ("have storage", "device type tensor to numpy"),
        "not read the memory of tensors, as x.numpy() and packed sequences do",
        "Make arrays outside, convert with x.tolist(), and pad and mask sequences.",
    ),
    (
        ("do not have strides",),
        "be handed no sparse tensors but those of the layout torch.sparse_coo",
        "Pass x.to_sparse() with chunk_size=1, or x.to_dense(), or call "
        "jd.interop.backward_(losses, model, rule) on losses of plain autograd.",
    ),
    (
        ("does not have vmap support",),
        "apply functions of one's own that torch.func can differentiate",
        "Write forward(*inputs) and setup_context(ctx, inputs, output), and a vmap or "
        "generate_vmap_rule = True.",
    ),
    (
        (
            "'tuple' and 'Tensor'",
            "'Tensor' and 'tuple'",
            "must be Tensor, not tuple",
            "'tuple' object",
        ),
        "take tensors out of tuples",
        "What apply of jd.functionalize returns is (outputs, buffers): write "
        "outputs, buffers = apply(params, buffers, x), or apply(params, buffers, x)[0].",
    ),
    (
        ("backward() called inside",),
        "return losses, and differentiate nothing by itself",
        "Leave loss.backward() out: what jd.grad returns gives the gradients of all losses.",
    ),
    (
        ("requires_grad_()", "retain_grad()", "does not require grad"),
        "take inner gradients by torch.func",
        "Write torch.func.grad(inner)(x) for x.requires_grad_() and torch.autograd.grad, or call "
        "jd.interop.backward_(losses, model, rule) on losses of plain autograd.",
    ),
    (
        ("more than 1 value per channel", "batch_norm", "running_mean", "num_batches_tracked"),
        "normalise without the rest of the batch, and without overwriting statistics",
        "Use model.eval() or GroupNorm; for BatchNorm in training, an objective of the whole batch "
        "without jd.per_example or jd.instancewise, and jd.functionalize, which returns buffers.",
    ),
    (
        ("of size [0]",),
        "be given at least one example",
        "Leave the step out where a batch is empty.",
    ),
    (
        ("atching rule", "not yet support", "X.is_contiguous", "for Sparse tensors"),
        "be made of operations that torch can map over examples",
        "Write it over a whole batch and use jd.instancewise, or replace the operation.",
    ),
    (
        ("random operation",),
        "draw no random numbers where it is mapped, unless it is said how",
        "Pass randomness='different' to jd.per_example or jd.ensemble.each, or draw from keys of "
        "jd.random; models are stacked by jd.ensemble.stack.",
    ),
    (
        ("data-dependent", "vmap over calling"),
        "not decide by the values of examples where it is mapped over them",
        "Choose with torch.where, or write it over a whole batch and use jd.instancewise.",
    ),
    (
        ("vmap(", "vmap:"),
        "be mapped over an axis of examples that all batched arguments have, of one length",
        "Name it for each argument in `in_dims`; None stands for an argument that is shared.",
    ),
    (
        ("in-place", "inplace", "mutate a captured", "match the broadcast shape", "`.data`"),
        _WRITTEN_RULE,
        _WRITTEN_REMEDY,
    ),
    (
        ("required positional argument",),
        "be given all its arguments",
        "What jd.grad returns takes the state first: step(None, params, x) at the first call.",
    ),
)
