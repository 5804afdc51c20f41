"""Bad input gets an error that names the argument and says what to do: one table."""

# Wrong types are the point here.
# pyright: reportArgumentType=false, reportOptionalCall=false

import copy
import sys
import warnings
from functools import partial

import pytest
import torch
import torch.distributed.fsdp
import torch.utils.checkpoint
from torch import nn

import torchjd_func as jd
from tests.matrices import A
from torchjd_func import _tree

PARAMS = {"w": torch.ones(3)}
X = torch.ones(4, 3)


def fused(params, x):
    """Fail as a function of `torch.jit.script` does on CUDA (seen in torch 2.11)."""
    raise RuntimeError(
        "The following operation failed in the TorchScript interpreter.\n"
        "Traceback of TorchScript (most recent call last):\n"
        "RuntimeError: Cannot access data pointer of Tensor that doesn't have storage\n"
    )


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([X[:1], X[1:]], layout=torch.jagged)


def strided() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([X[:1], X])


class OldForm(torch.autograd.Function):
    """An identity that `torch.func` does not take."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        return grads[0]


BATCH_NORM = nn.BatchNorm1d(3)
BUFFERS = jd.functionalize(BATCH_NORM)[2]
G = A @ A.mT


def losses(params, x):
    return x @ params["w"]


NORMAL = jd.functionalize(nn.LayerNorm(3))[1], X


def applied(params, x):
    """Return outputs and buffers."""
    return jd.functionalize(nn.LayerNorm(3))[0](params, {}, x)


def model_call(params=None, buffers=None):
    apply, good_params, good_buffers = jd.functionalize(nn.BatchNorm1d(3))
    return apply(
        good_params if params is None else params,
        good_buffers if buffers is None else buffers,
        X,
    )


def waits(params, x, size=None, *, present=None):
    """Take keywords that a transformed function keeps for itself."""
    return losses(params, x)


class Waiting:
    """An objective with such a keyword is a method."""

    def losses(self, params, present=None):
        return losses(params, X)


def of_two_optimizers():
    """An optimizer for matrices, and gradients for all."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.Muon([model.weight])
    grads = {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
    return partial(jd.interop.assign_grads_, model, grads, optimizer=optimizer)


def hooked(register="register_full_backward_hook"):
    model = nn.Sequential(nn.Linear(1, 1))
    getattr(model[0], register)(lambda *args: None)
    return model


def hooked_parameter(register):
    model = nn.Linear(1, 1)
    getattr(model.weight, register)(lambda *args: None)
    return model


def by_rows():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.eye(2).to_sparse_csr()


def kept_view(view):
    model = nn.Linear(2, 2)
    model.kept = view(model.weight)
    return model


def distributed(kind=nn.parallel.DistributedDataParallel):
    """A module whose class is the wrapper, without a process group."""
    if not issubclass(kind, nn.Module):
        kind = type("FSDPLinear", (kind, nn.Linear), {})
        model = object.__new__(kind)
        nn.Linear.__init__(model, 1, 1)
        return model
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    return model


def shared_weight():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    return first, {"a": second}


def kept_in_a_list():
    model = nn.Linear(2, 2)
    model.kept = [model.weight]
    return model


def kept_in_a_closure():
    model = nn.Linear(2, 2)
    weight = model.weight
    model.activation = lambda x: x * weight.sum()
    return model


class MakesABuffer(nn.Module):
    """Keeps what it is given first."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("first", None)

    def forward(self, x):
        self.first = x if self.first is None else self.first
        return self.weight * (x - self.first)


def buffer_of_the_first_pass():
    """Train a module that has a buffer more after its first forward pass."""
    apply, params, buffers = jd.functionalize(MakesABuffer())
    step = jd.grad(lambda p, x: apply(p, buffers, x)[0].square().mean(0), jd.upgrad())
    for _ in range(2):
        step(None, params, X)


def compiled_inside():
    model = nn.Sequential(nn.Linear(1, 1))
    model[0].compile(backend="eager")
    return model


HEADS = {"a": lambda p, z, batch: z.sum()}
MULTITASK = jd.multitask(lambda w, x: x @ w, HEADS)
NEEDS_KEY = jd.weighted(
    jd.Weighting(
        "needs_key",
        lambda statistic, key: (jd_key("needs_key", key),),
        lambda statistic, state, losses: (statistic[0], state),
    )
)


def jd_key(name, key):
    from torchjd_func import _check

    return _check.key_present(name, key)


CASES = {
    # shapes
    "gramian not square": (lambda: jd.upgrad().weighting(A), ValueError, "Gramian"),
    "gramian batched": (lambda: jd.mgda().weighting(G.expand(2, 2, 2)), ValueError, "vmap"),
    "gramian a tree": (lambda: jd.mgda().weighting({"a": G}), TypeError, "aggregator"),
    "gramian of ints": (lambda: jd.mgda().weighting(G.long()), TypeError, "float"),
    "jacobian empty": (lambda: jd.mean()({}), ValueError, "empty pytree"),
    "jacobian uneven": (lambda: jd.mean()([A, A[:1]]), ValueError, "leading dimension"),
    "jacobian of ints": (lambda: jd.mean()(A.long()), TypeError, "floating-point"),
    "jacobian a number": (lambda: jd.mean()({"x": 3.0}), TypeError, "floating-point"),
    "losses of another length": (
        lambda: jd.mgda("loss")(A, losses=torch.ones(3)),
        ValueError,
        "losses",
    ),
    "losses missing": (lambda: jd.mgda("loss")(A), ValueError, r"losses=\.\.\."),
    # preferences
    "preference 2-D": (lambda: jd.upgrad(torch.eye(2)), ValueError, "preference.*vmap"),
    "preference 0-D": (lambda: jd.dualproj(torch.tensor(1.0)), ValueError, "preference.*1-D"),
    "preference of another length": (lambda: jd.upgrad([1.0])(A), ValueError, "preference"),
    "preference negative": (lambda: jd.upgrad([1.0, -1.0]), ValueError, r"preference.*\[0, inf\)"),
    "preference negative by name": (lambda: jd.epo({"a": -1.0}), ValueError, "preference.*-1"),
    "preference of another length by name": (
        lambda: jd.upgrad({"a": 1.0})(A),
        ValueError,
        "preference.*2 objectives",
    ),
    "preference of other names": (
        lambda: jd.scalarizers.cosmos({"a": 1.0}, 1.0)({"b": torch.ones(())}),
        ValueError,
        r"weights.*name the losses \['b'\], got \['a'\]",
    ),
    "leak above 1": (lambda: jd.graddrop([2.0]), ValueError, r"leak.*\[0, 1\]"),
    "weights 2-D": (lambda: jd.constant([[1.0, 2.0]]), ValueError, "weights"),
    "weights of another length": (lambda: jd.constant([1.0])(A), ValueError, "weights"),
    # options
    "unknown solver": (lambda: jd.upgrad(solver="nope"), ValueError, "solver.*quadprog"),
    "unknown normalization": (lambda: jd.mgda("l3"), ValueError, "normalization.*'l2'"),
    "unknown route": (lambda: jd.gramian(losses, route="x"), ValueError, "route.*product"),
    "chunk_size 0": (lambda: jd.jac(losses, chunk_size=0), ValueError, "chunk_size"),
    "chunk_size a float": (lambda: jd.grad(losses, jd.mean(), chunk_size=2.0), ValueError, "int"),
    "randomness": (lambda: jd.per_example(losses, randomness="x"), ValueError, "randomness"),
    # keys and states
    "missing key": (lambda: NEEDS_KEY.init(A), ValueError, r"key.*jd\.random\.key"),
    "missing key of an aggregator for TorchJD": (
        lambda: jd.interop.torchjd_aggregator(jd.pcgrad())(A),
        ValueError,
        r"`key`.*jd\.random\.key.*torchjd_aggregator",
    ),
    "missing key at the first call": (lambda: NEEDS_KEY(A), ValueError, "key"),
    "key of floats": (lambda: jd.random.split(torch.ones(2)), ValueError, r"jd\.random\.key"),
    "key a number": (lambda: jd.random.bits(0), ValueError, r"jd\.random\.key"),
    "batch of keys": (
        lambda: jd.random.bits(jd.random.split(jd.random.key(0), 3)),
        ValueError,
        "vmap",
    ),
    "state of another method": (lambda: jd.mean()(A, (1,)), ValueError, "state"),
    # objectives
    "integer losses": (
        lambda: jd.jac(lambda p: p["w"].long())(PARAMS),
        TypeError,
        "losses.*floating",
    ),
    "losses a number": (lambda: jd.jac(lambda p: 1.0)(PARAMS), TypeError, "losses.*has_aux"),
    "losses missing entirely": (lambda: jd.jac(lambda p: {})(PARAMS), ValueError, "losses"),
    "losses empty": (lambda: jd.jac(lambda p: p["w"][:0])(PARAMS), ValueError, "losses"),
    "params without leaves": (lambda: jd.jac(losses)({}, X), ValueError, "argument 0.*argnums"),
    "state and params swapped": (
        lambda: jd.grad(losses, jd.mean())(PARAMS, None, X),
        ValueError,
        r"argument 0.*the state first: step\(state, params, x\)",
    ),
    "params of ints": (
        lambda: jd.jac(losses)({"w": torch.ones(3).long()}, X),
        TypeError,
        "argument 0.*'w'",
    ),
    "params a number": (
        lambda: jd.grad(losses, jd.mean())(None, {"w": 1.0}, X),
        TypeError,
        "argument 0.*'w'",
    ),
    "params to init_state": (
        lambda: jd.init_state(jd.mean(), lambda p: torch.ones(2), {"w": 3}),
        TypeError,
        "'w'",
    ),
    "argnums out of range": (lambda: jd.jac(losses, 2)(PARAMS, X), ValueError, "argnums"),
    "argnums a name": (lambda: jd.jac(losses, "w")(PARAMS, X), TypeError, "argnums"),
    "argnums twice": (lambda: jd.jac(losses, (0, 0))(PARAMS, X), ValueError, "argnums"),
    "argnums none": (lambda: jd.jac(losses, ())(PARAMS, X), ValueError, "argnums"),
    "aux missing": (lambda: jd.jac(losses, has_aux=True)(PARAMS, X), TypeError, "has_aux"),
    "objective a module": (
        lambda: jd.grad_and_value(nn.Linear(3, 2), jd.upgrad()),
        TypeError,
        r"`fn` must be a function.*got the module Linear.*jd\.functionalize\(model\)",
    ),
    "objective a module to init_state": (
        lambda: jd.init_state(jd.upgrad(), nn.Linear(3, 2), X),
        TypeError,
        r"`fn`.*the module Linear.*apply\(params, buffers, x\)",
    ),
    "rule is the factory": (lambda: jd.grad(losses, jd.upgrad), TypeError, r"jd\.upgrad\(\)"),
    "rule is a weighting": (
        lambda: jd.grad(losses, jd.upgrad().weighting),
        TypeError,
        r"jd\.weighted",
    ),
    "weights to the pullback": (
        lambda: jd.gramian_vjp(losses, PARAMS, X)[2](torch.ones(3)),
        ValueError,
        "weights",
    ),
    "instance losses reduced": (
        lambda: jd.jac(jd.instancewise(lambda p, x: losses(p, x).mean()))(PARAMS, X),
        ValueError,
        r"\(b,\)",
    ),
    "cross-gramian without batches": (
        lambda: jd.cross_gramian(losses)(PARAMS, X),
        ValueError,
        "batch_1, batch_2",
    ),
    "two batches of another method": (
        lambda: jd.double_sampling(losses, jd.upgrad().weighting),
        ValueError,
        "cross-Gramian.*modo",
    ),
    "two batches of an aggregator": (
        lambda: jd.double_sampling(losses, jd.mean()),
        TypeError,
        r"jd\.Weighting.*modo",
    ),
    "a batch not in a tuple": (
        lambda: jd.double_sampling(losses, jd.modo())(None, PARAMS, (X,), X),
        TypeError,
        r"batch_1.*\(x_1,\)",
    ),
    "batches of other sizes": (
        lambda: jd.double_sampling(losses, jd.modo())(None, PARAMS, (X,), (X[:2],)),
        ValueError,
        r"as many losses.*\[4, 2\]",
    ),
    "microbatches of instance losses": (
        lambda: jd.accumulate(jd.instancewise(losses), 2),
        TypeError,
        r"accumulate.*jd\.gramian",
    ),
    "microbatches that do not divide": (
        lambda: jd.jac(jd.accumulate(losses, 3))(PARAMS, X),
        ValueError,
        "divisible by n=3",
    ),
    "microbatches of a number": (
        lambda: jd.jac(jd.accumulate(losses, 2))(PARAMS, 1.0),
        TypeError,
        "batch.*in_dims",
    ),
    "microbatches of too few arguments": (
        lambda: jd.jac(jd.accumulate(losses, 2, (None, 0, 0)))(PARAMS, X),
        ValueError,
        "in_dims.*2 arguments",
    ),
    "microbatches none": (lambda: jd.accumulate(losses, 0), ValueError, "`n`"),
    "microbatches with other aux": (
        lambda: jd.jac(jd.accumulate(losses, 2), has_aux=True)(PARAMS, X),
        ValueError,
        "has_aux",
    ),
    "loss scale 0": (lambda: jd.loss_scale.init(0.0), ValueError, "scale"),
    "loss scale a number": (
        lambda: jd.loss_scale.scaled(losses, 8.0),
        ValueError,
        "LossScaleState",
    ),
    "loss scale keeps another tree": (
        lambda: jd.loss_scale.keep(jd.loss_scale.init(), PARAMS, [X]),
        ValueError,
        "new.*structure",
    ),
    "cast to ints": (lambda: jd.cast_floating(losses, torch.int8), ValueError, "dtype.*bfloat16"),
    "cast to a name": (lambda: jd.cast_floating(losses, "half"), ValueError, "dtype"),
    "where as a list of names": (
        lambda: jd.grad(losses, jd.upgrad(), where=["w"])(None, PARAMS, X),  # type: ignore
        TypeError,
        r"where.*got list.*lambda path:",
    ),
    "where names nothing": (
        lambda: jd.grad(losses, jd.upgrad(), where=lambda path: path == "v")(None, PARAMS, X),
        ValueError,
        r"where.*none of \['w'\]",
    ),
    "where of a method of rows": (
        lambda: jd.grad(losses, jd.trimmed_mean(1), where=bool),
        ValueError,
        "where.*trimmed_mean.*weighting",
    ),
    "where of a scalarizer": (
        lambda: jd.grad(losses, jd.scalarizers.mean(), where=bool),
        TypeError,
        r"where.*jd\.Aggregator",
    ),
    "features without tasks": (
        lambda: jd.grad(losses, jd.upgrad(), where=jd.features)(None, PARAMS, X),
        ValueError,
        r"jd\.features.*jd\.multitask.*'w'",
    ),
    "features of a Gramian": (
        lambda: jd.gramian(MULTITASK, where=jd.features)((PARAMS["w"], {"a": {}}), X),
        ValueError,
        r"jd\.features.*jd\.grad",
    ),
    "features of a pullback": (
        lambda: jd.gramian_vjp(MULTITASK, (PARAMS["w"], {"a": {}}), X, where=jd.features),
        ValueError,
        r"jd\.features.*jd\.grad",
    ),
    "features of ints": (
        lambda: jd.jac(jd.multitask(lambda w, x: x.argmax(1), HEADS))((PARAMS["w"], {"a": {}}), X),
        TypeError,
        "features.*auxiliary",
    ),
    "features none": (
        lambda: jd.jac(jd.multitask(lambda w, x: {}, HEADS))((PARAMS["w"], {"a": {}}), X),
        ValueError,
        "features.*trunk",
    ),
    "a parameter shared and of a head": (
        lambda: jd.jac(MULTITASK)((PARAMS["w"], {"a": PARAMS["w"]}), X),
        ValueError,
        "not be shared.*at 'a'",
    ),
    "a frozen trunk": (
        lambda: jd.grad(MULTITASK, jd.upgrad())(None, ({}, {"a": PARAMS}), X),
        ValueError,
        r"shared parameters.*got none.*frozen trunk.*before jd\.functionalize",
    ),
    "a frozen trunk to init_state": (
        lambda: jd.init_state(jd.upgrad(), MULTITASK, ({}, {"a": PARAMS}), X),
        ValueError,
        "shared parameters.*got none.*frozen trunk",
    ),
    "state and params of multitask swapped": (
        lambda: jd.grad(MULTITASK, jd.upgrad())((PARAMS["w"], {"a": {}}), None, X),
        ValueError,
        "params.*after the state",
    ),
    "heads scaled by a method of rows": (
        lambda: jd.grad(
            jd.multitask(lambda w, x: x @ w, HEADS, scale_heads=True), jd.trimmed_mean(0)
        )(None, (PARAMS["w"], {"a": {}}), X),
        ValueError,
        "scale_heads.*weigh",
    ),
    "no heads": (lambda: jd.multitask(losses, {}), ValueError, "heads"),
    "heads without names": (lambda: jd.multitask(losses, [losses]), TypeError, "heads.*dict.*list"),
    "no buffers": (
        lambda: model_call(buffers=X),
        TypeError,
        r"buffers.*dict.*shape.*apply\(params, buffers, x\)",
    ),
    "no state": (
        lambda: jd.grad(losses, jd.upgrad())(PARAMS),
        ValueError,
        "argnums.*jd.grad takes the state",
    ),
    "one batch for a method of two": (
        lambda: jd.grad(losses, jd.modo()),
        TypeError,
        "rule.*jd.double_sampling",
    ),
    "weights of no group": (
        lambda: jd.grad(
            losses, jd.monitored(jd.grouped(jd.upgrad(), str), {"w": jd.measures.weights})
        )(None, PARAMS, X),
        ValueError,
        "observation.weights.*watch each group",
    ),
    "unknown head": (
        lambda: jd.jac(MULTITASK)((PARAMS["w"], {"b": {}}), X),
        ValueError,
        r"head_params.*'b'.*'a'",
    ),
    "argnums of multitask": (
        lambda: jd.jac(MULTITASK, 1)((PARAMS["w"], {"a": {}}), X),
        ValueError,
        "argnums",
    ),
    "params of multitask": (lambda: jd.jac(MULTITASK)(PARAMS, X), ValueError, "shared"),
    "has_aux of multitask": (
        lambda: jd.jac(MULTITASK, has_aux=True)((PARAMS["w"], {"a": {}}), X),
        ValueError,
        "has_aux",
    ),
    "a keyword of the step is one of the objective": (
        lambda: jd.grad(waits, jd.upgrad())(None, PARAMS, X, present=torch.ones(4).bool()),
        ValueError,
        "the objective must have no argument of the name 'present'.*Rename it",
    ),
    "a keyword of the step is one of a bound objective": (
        lambda: jd.grad(partial(waits, x=X), jd.upgrad())(None, PARAMS, size=4),
        ValueError,
        "no argument of the name 'size'.*by its position",
    ),
    "a keyword of the step is one of examples": (
        lambda: jd.gramian(jd.per_example(waits))(PARAMS, X, present=torch.ones(4).bool()),
        ValueError,
        "no argument of the name 'present'",
    ),
    "a keyword of the step is one of a method": (
        lambda: jd.jac(Waiting().losses)(PARAMS, present=torch.ones(4).bool()),
        ValueError,
        "no argument of the name 'present'",
    ),
    "an objective that differentiates": (
        lambda: jd.jac(lambda p, x: losses(p, x).sum().backward())(PARAMS, X),
        ValueError,
        r"return losses, and differentiate nothing.*Leave loss\.backward\(\) out",
    ),
    "parameters that are an iterator": (
        lambda: jd.jac(losses)(iter([X]), X),
        TypeError,
        r"argument 0 must.*got list_iterator.*jd\.functionalize",
    ),
    "outputs with buffers, subtracted": (
        lambda: jd.jac(lambda p, x: applied(p, x) - x)(*NORMAL),
        TypeError,
        r"take tensors out of tuples.*\(outputs, buffers\).*apply\(params, buffers, x\)\[0\]",
    ),
    "outputs with buffers, in a loss": (
        lambda: jd.jac(lambda p, x: nn.functional.mse_loss(x, applied(p, x)))(*NORMAL),
        (TypeError, AttributeError, ValueError),
        "take tensors out of tuples",
    ),
    "outputs with buffers, called upon": (
        lambda: jd.jac(lambda p, x: applied(p, x).mean())(*NORMAL),
        (TypeError, AttributeError, ValueError),
        "take tensors out of tuples",
    ),
    "labels of groups in a word": (
        lambda: jd.grouped(jd.upgrad(), "layer"),
        TypeError,
        r"`labels` must be a function.*got 'layer'\. Pass jd\.by_layer",
    ),
    "a measure that is a number": (
        lambda: jd.monitored(jd.upgrad(), {"one": lambda seen: 1.0}).init(A),
        TypeError,
        r"`measures\['one'\]` must return a tensor, got float",
    ),
    "an array for a Jacobian": (
        lambda: jd.upgrad()(A.cpu().numpy()),
        TypeError,
        r"Jacobian.*got ndarray.*torch\.as_tensor",
    ),
    # arguments and mistakes that torch has words for
    "has_aux forgotten": (
        lambda: jd.jac(lambda p, b, x: (losses(p, x), b))(PARAMS, BUFFERS, X),
        TypeError,
        "num_batches_tracked.*floating-point.*int64.*has_aux=True",
    ),
    "an array for a batch": (
        lambda: jd.jac(losses)(PARAMS, X.cpu().numpy()),
        TypeError,
        r"hold tensors, got an array at '0\.1'.*torch\.as_tensor",
    ),
    "a batch in another precision": (
        lambda: jd.grad(losses, jd.upgrad())(None, PARAMS, X.double()),
        ValueError,
        r"one floating-point dtype.*float32 on \S+ at '0\.0\.w'.*float64 .*x\.to\(torch\.float32\)",
    ),
    "a batch in another precision, layer by layer": (
        lambda: jd.gramian(jd.instancewise(losses))(PARAMS, X.double()),
        ValueError,
        r"one floating-point dtype.*float64 .*x\.to\(torch\.float32\)",
    ),
    "a batch on another device": (
        lambda: jd.jac(losses)(PARAMS, torch.empty(4, 3, device="meta")),
        ValueError,
        r"one device.*meta at '0\.1'.*x\.to\(device\)",
    ),
    "parameters overwritten": (
        lambda: jd.jac(lambda p, x: x @ p["w"].add_(1))(PARAMS, X),
        ValueError,
        r"not overwrite.*w = w \+ 1",
    ),
    "buffers overwritten": (
        lambda: jd.jac(lambda p, x: BATCH_NORM(x) @ p["w"])(PARAMS, X),
        ValueError,
        r"not overwrite.*jd\.functionalize",
    ),
    "batch statistics of one example": (
        lambda: jd.gramian(
            jd.per_example(lambda p, x: nn.BatchNorm1d(3)(x[None]).sum() * p["w"].sum())
        )(PARAMS, X),
        ValueError,
        r"rest of the batch.*GroupNorm",
    ),
    "checkpoints": (
        lambda: jd.grad(
            lambda p, x: torch.utils.checkpoint.checkpoint(losses, p, x, use_reentrant=False),
            jd.upgrad(),
        )(None, PARAMS, X),
        ValueError,
        r"torch\.utils\.checkpoint.*jd\.interop\.backward_",
    ),
    "sparse data by rows": (
        lambda: jd.gramian(lambda w, x: torch.sparse.mm(x, w).sum(1))(torch.eye(2), by_rows()),
        ValueError,
        r"torch\.sparse_coo.*Sparse CSR.*x\.to_sparse\(\) with chunk_size=1",
    ),
    "sparse data of examples by rows": (
        lambda: jd.gramian(jd.instancewise(lambda w, x: (x @ w).sum(1)))(torch.eye(2), by_rows()),
        ValueError,
        r"torch\.sparse_coo.*Sparse CSR",
    ),
    "a buffer that a forward pass makes": (
        buffer_of_the_first_pass,
        ValueError,
        r"must call modules with.*reparametrizing.*run it once before jd\.functionalize",
    ),
    "arrays of NumPy inside": (
        lambda: jd.jac(lambda p, x: losses(p, x) * float((x * 2).numpy().sum()))(PARAMS, X),
        (ValueError, TypeError),  # on the CPU and on a GPU
        r"not read the memory.*x\.tolist\(\)",
    ),
    "functions that TorchScript fuses on CUDA": (
        lambda: jd.jac(fused)(PARAMS, X),
        ValueError,
        r"torch\.jit\.script on CUDA.*PYTORCH_JIT=0",
    ),
    "a function of an old form": (
        lambda: jd.jac(lambda p, x: OldForm.apply(losses(p, x)))(PARAMS, X),
        ValueError,
        "no torch.autograd.Function without setup_context.*jd.interop.backward_",
    ),
    "samples of Dirichlet": (
        lambda: jd.jac(lambda p, x: torch.distributions.Dirichlet(p["w"].exp()).rsample().sum())(
            PARAMS, X
        ),
        ValueError,
        r"no sample of Dirichlet or Beta.*Gamma.*g / g\.sum",
    ),
    "nested tensors of examples": (
        lambda: jd.gramian(jd.instancewise(lambda p, nt: losses(p, nt.values())))(PARAMS, nested()),
        ValueError,
        r"no nested tensors.*Pad and mask",
    ),
    "nested tensors by strides": (
        lambda: jd.gramian(jd.instancewise(losses))(PARAMS, strided()),
        ValueError,
        r"no nested tensors.*Pad and mask",
    ),
    "nested tensors inside": (
        lambda: jd.jac(lambda p, x: losses(p, x) + (nested() * p["w"].sum()).values().sum())(
            PARAMS, X
        ),
        ValueError,
        r"no nested tensors.*Pad and mask",
    ),
    "arguments that are written to by `out`": (
        lambda: jd.gramian(jd.instancewise(lambda p, x: losses(p, torch.add(x, 1, out=x))))(
            PARAMS, X.clone()
        ),
        ValueError,
        r"not overwrite.*`add` with `out`",
    ),
    "gradients of plain autograd inside": (
        lambda: jd.jac(lambda p, x: losses(p, (x * 1).requires_grad_()))(PARAMS, X),
        ValueError,
        r"inner gradients by torch\.func.*torch\.func\.grad",
    ),
    "gradients by an argument that requires one": (
        lambda: jd.jac(lambda p, x: torch.autograd.grad(losses(p, x).sum(), x)[0].sum())(
            PARAMS, X.clone().requires_grad_()
        ),
        ValueError,
        r"inner gradients by torch\.func, got 'One of the differentiated Tensors.*backward_",
    ),
    "random numbers for each example": (
        lambda: jd.gramian(jd.per_example(lambda p, x: torch.rand_like(x).sum() * p["w"].sum()))(
            PARAMS, X
        ),
        ValueError,
        "Pass randomness='different'",
    ),
    "decisions by examples": (
        lambda: jd.gramian(
            jd.per_example(lambda p, x: p["w"].sum() if x.sum() > 0 else p["w"].exp().sum())
        )(PARAMS, X),
        ValueError,
        "not decide by the values.*torch.where",
    ),
    "state left out": (
        lambda: jd.grad(losses, jd.upgrad())(PARAMS, X),
        TypeError,
        r"all its arguments.*the state first: step\(None, params, x\)",
    ),
    "present of other names": (
        lambda: jd.jac(lambda p, x: {"a": losses(p, x).mean()})(PARAMS, X, present={"b": True}),
        ValueError,
        "`present` must be a bool tensor, or a tree of bools",
    ),
    "present of another length": (
        lambda: jd.jac(losses)(PARAMS, X, present=torch.ones(3, dtype=torch.bool)),
        ValueError,
        "`present`.*4 bools",
    ),
    "present of tasks by other names": (
        lambda: jd.jac(MULTITASK)((PARAMS["w"], {"a": {}}), X, present={"b": True}),
        ValueError,
        r"`present`.*unknown \['b'\]",
    ),
    "carried without aux": (
        lambda: jd.accumulate(losses, 2, carry_aux=1),
        ValueError,
        "carry_aux.*has_aux=True",
    ),
    "losses on another device": (
        lambda: jd.mgda("loss")(A, losses=torch.empty(2, device="meta")),
        ValueError,
        r"the losses given to `mgda`.*be on one device, got meta and \S+\. Move",
    ),
    "preferences without numbers": (
        lambda: jd.sets.pareto_mtl(torch.empty(2, 2, device="meta")),
        TypeError,
        r"`preferences` must be a tensor of shape \(k, m\), got a meta tensor",
    ),
    "a Jacobian on two devices": (
        lambda: jd.upgrad()({"a": A, "b": torch.empty(2, 1, device="meta")}),
        ValueError,
        "the Jacobian given to `upgrad` must be on one device",
    ),
    "an explanation of a model without numbers": (
        lambda: jd.explain_gramian(losses, {"w": torch.empty(3, device="meta")}, X),
        ValueError,
        "the arguments of the objective must be on one device",
    ),
    "a model without numbers": (
        lambda: jd.grad(losses, jd.upgrad())(None, {"w": torch.empty(3, device="meta")}, X),
        ValueError,
        "the arguments of the objective must be on one device",
    ),
    "heads of ints": (
        lambda: jd.jac(MULTITASK)((PARAMS["w"], {"a": torch.ones(2).long()}), X),
        TypeError,
        "the parameters of the heads.*floating-point.*part of the batch",
    ),
    "has_aux a name": (lambda: jd.jac(losses, has_aux="yes")(PARAMS, X), TypeError, "has_aux"),
    "where a list": (lambda: jd.jac(losses, where=["w"])(PARAMS, X), TypeError, "where.*function"),
    "in_dims a number": (lambda: jd.per_example(losses, 0), TypeError, r"in_dims.*\(None, 0\)"),
    "in_dims of nothing": (
        lambda: jd.jac(jd.per_example(losses, (None, None)))(PARAMS, X),
        ValueError,
        "in_dims.*not all None",
    ),
    "in_dims of no dimension": (
        lambda: jd.jac(jd.accumulate(losses, 2, (None, 2)))(PARAMS, X),
        ValueError,
        "in_dims.*name a dimension",
    ),
    "no examples": (
        lambda: jd.gramian(jd.per_example(losses))(PARAMS, X[:0]),
        ValueError,
        "`losses` must hold at least one number",
    ),
    "microbatches with text beside": (
        lambda: jd.accumulate(lambda p, x: (losses(p, x), "a"), 2, has_aux=True)(PARAMS, X),
        TypeError,
        "`aux` must hold tensors only, got str",
    ),
    "gradients that are numbers": (
        lambda: jd.loss_scale.update(jd.loss_scale.init(), {"w": 1.0}),
        TypeError,
        "`grads`.*floating-point.*jd.grad",
    ),
    "a growth that shrinks": (
        lambda: jd.loss_scale.update(jd.loss_scale.init(), PARAMS, growth=0.5),
        ValueError,
        "growth",
    ),
    # solvers
    "linear program of other sizes": (
        lambda: jd.linalg.linear_program(A[0], A.mT, A[0]),
        ValueError,
        r"shapes \(\.\.\., n\), \(\.\.\., k, n\)",
    ),
    "more equations than unknowns": (
        lambda: jd.linalg.linear_program(A[:, 0], A.mT, A[0]),
        ValueError,
        "n_free <= k <= n",
    ),
    "a power for each of other problems": (
        lambda: jd.linalg.orthant_root(G, torch.ones(2)),
        ValueError,
        r"`alpha` must have the leading dimensions \(\) of `gramian`",
    ),
    "nnqp not square": (lambda: jd.linalg.nnqp(A, A[0]), ValueError, "matrix"),
    "nnqp of another length": (lambda: jd.linalg.nnqp(G, A[0]), ValueError, "vector"),
    "nnqp of ints": (lambda: jd.linalg.nnqp(G.long(), A[0]), TypeError, "matrix"),
    "simplex of ints": (lambda: jd.linalg.project_simplex(torch.ones(2).long()), TypeError, "y"),
    # modules
    "no module": (lambda: jd.functionalize(3), TypeError, "`model`.*be a module, got int"),
    "a parameter of two modules": (
        lambda: jd.functionalize(shared_weight()),
        ValueError,
        "share no parameters.*'weight' of '1.a' in '0'.*Make one module",
    ),
    "a parameter in a list too": (
        lambda: jd.functionalize(kept_in_a_list()),
        ValueError,
        r"`model\.weight`.*'kept'.*self\.<name>",
    ),
    "a parameter in a closure too": (
        lambda: jd.functionalize(kept_in_a_closure()),
        ValueError,
        r"`model\.weight`.*'activation'",
    ),
    "a view of a parameter": (
        lambda: jd.functionalize(kept_view(lambda weight: weight[:1])),
        ValueError,
        r"`model\.weight`.*a view of it in 'kept'.*self\.<name>",
    ),
    "views of a parameter in a tuple": (
        lambda: jd.functionalize(kept_view(lambda weight: weight.chunk(2))),
        ValueError,
        r"`model\.weight`.*a view of it in 'kept'",
    ),
    "a hook of a parameter": (
        lambda: jd.functionalize(hooked_parameter("register_hook")),
        ValueError,
        r"`model\.weight` must have no hooks.*grads\[name\] \* mask.*backward_",
    ),
    "a hook of a parameter that takes a step": (
        lambda: jd.functionalize(hooked_parameter("register_post_accumulate_grad_hook")),
        ValueError,
        r"`model\.weight` must have no hooks",
    ),
    "sharded": (
        lambda: jd.functionalize(distributed(torch.distributed.fsdp.FSDPModule)),
        ValueError,
        r"sharded over processes.*jd\.distributed\.sharded",
    ),
    "sparse embedding": (
        lambda: jd.functionalize(nn.Sequential(nn.Embedding(2, 2, sparse=True))),
        ValueError,
        r"`model\.0` must have dense gradients.*Embedding.*without sparse",
    ),
    "sparse embedding bag": (
        lambda: jd.functionalize(nn.EmbeddingBag(2, 2, sparse=True)),
        ValueError,
        r"`model` must have dense gradients.*EmbeddingBag",
    ),
    "embedding that overwrites its weight": (
        lambda: jd.functionalize(nn.Embedding(2, 2, max_norm=1.0)),
        ValueError,
        "max_norm=None.*Normalise",
    ),
    "backward hook": (
        lambda: jd.functionalize(hooked()),
        ValueError,
        r"`model\.0`.*hooks.*jd\.jac",
    ),
    "backward pre-hook": (
        lambda: jd.functionalize(hooked("register_full_backward_pre_hook")),
        ValueError,
        "Remove the hooks",
    ),
    "wrapped for several devices": (
        lambda: jd.functionalize(nn.Sequential(nn.DataParallel(nn.Linear(1, 1)))),
        ValueError,
        r"`model\.0`.*DataParallel.*model\.module",
    ),
    "wrapped for several processes": (
        lambda: jd.functionalize(distributed()),
        ValueError,
        r"DistributedDataParallel.*jd\.distributed\.data_parallel",
    ),
    "compiled": (
        lambda: jd.functionalize(torch.compile(nn.Linear(1, 1))),
        ValueError,
        "original module",
    ),
    "compiled in place": (
        lambda: jd.functionalize(compiled_inside()),
        ValueError,
        r"`model\.0`.*compile the step",
    ),
    "lazy": (lambda: jd.functionalize(nn.LazyLinear(2)), ValueError, "Run the model once"),
    "unknown parameter": (lambda: model_call(params={"nope": X}), ValueError, "params.*nope"),
    "missing parameter": (lambda: model_call(params={}), ValueError, "params.*bias"),
    "unknown buffer": (lambda: model_call(buffers={"nope": X}), ValueError, "buffers.*nope"),
    "grads of unknown names": (
        lambda: jd.interop.assign_grads_(nn.Linear(1, 1), {"nope": X}),
        ValueError,
        "grads.*nope",
    ),
    "grads of another shape": (
        lambda: jd.interop.assign_grads_(nn.Linear(1, 1), {"bias": X}),
        ValueError,
        "grads.*bias",
    ),
    "grads in a list": (
        lambda: jd.interop.assign_grads_(nn.Linear(1, 1), [X]),
        TypeError,
        "`grads` must be a dict by name",
    ),
    "a saved state that is None": (
        lambda: jd.interop.load_state_dict(jd.mgda(), None),
        ValueError,
        r"`saved` must be made by jd\.interop\.state_dict, got None\.",
    ),
    "a saved state of another kind": (
        lambda: jd.interop.load_state_dict(jd.mgda(), {"weights": X}),
        ValueError,
        "`saved`.*got another dict",
    ),
    "a saved state that is a tensor": (
        lambda: jd.interop.load_state_dict(jd.mgda(), X),
        ValueError,
        r"`saved`.*got a tensor.*state_dict\(rule, state\)",
    ),
    "a target for gradients": (
        lambda: jd.interop.assign_grads_({"bias": X}, nn.Linear(1, 1)),
        ValueError,
        r"`grads` must have the structure of the target, got Linear for dict\. Pass what",
    ),
    "grads by name for parameters in a row": (
        lambda: jd.interop.assign_grads_(nn.Linear(1, 1).parameters(), {"bias": X}),
        ValueError,
        r"got dict for tuple.*that is the module itself, as in assign_grads_\(model, grads\)",
    ),
    "grads for one of two optimizers": (
        lambda: of_two_optimizers()(),
        ValueError,
        r"at 'bias' must be a parameter of `optimizer`.*Of several optimizers give each",
    ),
    "grads of another structure": (
        lambda: jd.interop.assign_grads_(PARAMS, [X]),
        ValueError,
        "grads.*structure",
    ),
}


@pytest.fixture(autouse=True)
def on_device(device, monkeypatch):
    """Bring what the table names to a device, and make there what it makes."""
    here = sys.modules[__name__]
    for name, value in {"PARAMS": PARAMS, "X": X, "BUFFERS": BUFFERS, "A": A, "G": G}.items():
        monkeypatch.setattr(here, name, _tree.map(lambda leaf: leaf.to(device), value))
    monkeypatch.setattr(here, "BATCH_NORM", copy.deepcopy(BATCH_NORM).to(device))
    with torch.device(device):
        yield


@pytest.mark.parametrize(("call", "kind", "message"), CASES.values(), ids=CASES.keys())
def test_error_names_the_argument_and_the_remedy(call, kind, message):
    with pytest.raises(kind, match=message) as caught:
        call()
    text = str(caught.value)
    assert "must" in text
    assert text.count(". ") >= 1, "a rule, then a remedy"
    assert text.endswith(".")


@pytest.mark.filterwarnings("ignore")  # torch's own, of a graph
def test_linearize_inside_is_refused():
    def linearized(params, x):
        out, along = torch.func.linearize(lambda h: h.sin().sum(1), x @ params)
        return out + along(x)

    with pytest.raises(ValueError, match=r"no torch\.func\.linearize.*torch\.func\.jvp"):
        jd.gramian(jd.instancewise(linearized))(torch.eye(2), torch.ones(3, 2))


MAKERS = {
    "instancewise": jd.instancewise,
    "per_example": jd.per_example,
    "multitask": lambda fn: jd.multitask(fn, HEADS),
    "a head": lambda fn: jd.multitask(losses, {"a": fn}),
    "accumulate": lambda fn: jd.accumulate(fn, 2),
    "cast_floating": lambda fn: jd.cast_floating(fn, torch.bfloat16),
    "scaled": lambda fn: jd.loss_scale.scaled(fn, jd.loss_scale.init()),
    "sharded": jd.distributed.sharded,
    "grad": lambda fn: jd.grad(fn, jd.mean()),
    "jac": lambda fn: jd.jac(fn)(PARAMS, X),
    "gramian": lambda fn: jd.gramian(fn)(PARAMS, X),
}
NO_OBJECTIVES = {
    "a module": lambda: nn.Linear(3, 1),
    "a rule": jd.upgrad,
    "losses": lambda: X,
    "nothing": lambda: None,
}


@pytest.mark.parametrize("given", NO_OBJECTIVES)
@pytest.mark.parametrize("maker", MAKERS)
def test_what_is_no_objective_is_refused_where_it_is_given(maker, given):
    with pytest.raises(TypeError, match="`fn` must be a function of parameters and a batch"):
        MAKERS[maker](NO_OBJECTIVES[given]())


def test_keywords_of_the_step_may_be_passed_to_an_objective_by_their_place():
    flags = torch.tensor([True, False, True, True])
    want = jd.jac(losses)(PARAMS, X, present=flags)
    got = jd.jac(lambda p, x, present: losses(p, x))(PARAMS, X, flags, present=flags)
    torch.testing.assert_close(got, want)


def test_a_failed_assignment_changes_nothing():
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="grads"):
        jd.interop.assign_grads_(model, {"bias": torch.ones(1), "weight": torch.ones(3)})
    assert model.bias.grad is None


def test_errors_also_come_from_inside_vmap():
    with pytest.raises(ValueError, match="preference"):
        torch.func.vmap(lambda b: jd.upgrad(b)(A)[0])(torch.ones(4, 3))
