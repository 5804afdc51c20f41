"""The way in for loops of `loss.backward()`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchjd_func import _check, _names, _tree
from torchjd_func._lift import statistic_like
from torchjd_func._shares import Part, Size, order, same
from torchjd_func._types import Aggregator, Scalarizer
from torchjd_func.differentiate._detach import detached
from torchjd_func.differentiate._outside import check_state
from torchjd_func.interop import _heads, _targets
from torchjd_func.interop._autograd import combined, rows
from torchjd_func.interop._heads import Grads, Split
from torchjd_func.interop._losses import Batch, batch_of
from torchjd_func.interop._optimizers import like_parameter
from torchjd_func.interop._scaler import kept_if_finite, unscaled

PyTree = Any
State = Any


def backward_(
    losses: PyTree,
    target: PyTree,
    rule: Aggregator | Scalarizer,
    state: State = None,
    *,
    features: PyTree = None,
    key: Tensor | None = None,
    present: Any = None,
    size: Size = None,
    retain_graph: bool = False,
    chunk_size: int | None = 1,
    where: Callable[[str], bool] | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> State:
    """Add the update direction of a rule to `.grad`, in the place of `loss.backward()`.

        losses = [criterion_a(model(x), y_a), criterion_b(model(x), y_b)]
        state = jd.interop.backward_(losses, model, jd.upgrad(), state)
        optimizer.step()

    For losses of plain autograd, and so for what `torch.func` cannot see: activation checkpointing
    (`use_reentrant=False`), hooks, `torch.autocast`, packed sequences, the kernels of cuDNN,
    custom functions and kernels, inner `torch.autograd.grad`. Rules and numbers are `jd.grad`'s.

    It costs `m` backward passes, and holds `m` gradients at once. A Scalarizer, and an Aggregator
    that looks at no gradient (`jd.mean`, `jd.rlw`), cost one pass. The functional way compiles,
    takes losses of single examples at about the price of one pass (`jd.instancewise`), and maps.

    It adds to `.grad`; directions of parts of a batch do not add up to its own: add their losses,
    and call it once. Hooks run once for each pass, those after accumulation not at all; sparse
    gradients are made dense. A compiled model needs `torch._functorch.config.donated_buffer=False`.

    Args:
        losses: Tensor or pytree of tensors that require a gradient, `m` numbers in all.
        target: What is trained: a module, a tree of modules such as `(trunk, {"a": head})`, or of
            parameters; what requires no gradient, or no loss depends on, is left alone. A warning
            names others that losses depend on, unless `retain_graph` leaves them to another pass.
        rule: An Aggregator, such as `jd.upgrad()`, or a Scalarizer. One whose state is trained
            (`uw`, `imtl_l`) needs no more than `scalarizer(losses, state)[0].backward()`.
        state: What the previous call returned; `None` at the first.
        features: Tensor or tree of tensors through which losses depend on shared parameters: the
            rule sees the gradients of these alone, and heads get the plain gradients of their own
            losses, as in `jd.multitask`. A Scalarizer, which has one loss, ignores it.
        key: `(2,)`, from `jd.random.key`, for the first state of a random method.
        present: Which losses this batch has, a tree of bools like the losses, or `(m,)`; others are
            not differentiated. Parameters of these alone keep their `.grad`, mostly `None`; zeros
            if it is a tensor, which is read, and so waited for.
        size: How many examples this process has, for a rule of `jd.distributed`: losses are means
            over them, and parts of a batch are weighed by it. With 0 they may hold anything.
        retain_graph: Whether the graph of the losses is kept for another pass.
        chunk_size: How many rows to compute in a pass, `None` for all. More than 1 fails with
            checkpointing, custom functions and hooks on saved tensors, and is no faster on CPUs.
        where: As for `jd.grad`: the weights come from these parameters, in one more pass.
        scaler: Of `torch.amp`, with losses that are NOT scaled. The rule sees true gradients,
            `.grad` is what `scaler.unscale_` and `scaler.step` expect; where one is not finite, the
            step is skipped and the state stays. Of losses scaled by hand rules see scaled ones:
            right where they are homogeneous of degree 1 and use no losses nor past.

    Returns:
        The next state, detached.

    Raises:
        TypeError: If `rule`, or a leaf of `losses` or `target`, is of another type.
        ValueError: If a present loss depends on nothing in `target`, or goes around `features`, or
            `target` holds nothing to train, or is wrapped for several processes.

    Example:
        >>> import torch, torchjd_func as jd
        >>> w = torch.zeros(2, requires_grad=True)
        >>> state = jd.interop.backward_([w[0] + w[1], w[0] - 2 * w[1]], w, jd.upgrad())
        >>> w.grad
        tensor([ 1.3500, -0.4500])
    """
    _check_options(rule, chunk_size, where, scaler, size)
    target = _targets.listed(target)
    tree = _targets.trainable(target)
    part = Part(size, None, same("parameters", tree) if state is None else {}, order(losses))
    rule = rule if rule.processes is None else rule.processes.of_part(part)
    batch = batch_of(losses, rule.name, present, scaler, empty=size is not None and not size)
    with torch.no_grad(), torch.autocast(batch.vector.device.type, enabled=False):
        parts = _parts(features, batch, target, tree, rule, part)
        _check.inside_target([x.shape for x in _left(parts, tree, retain_graph)])
        step = _Step(batch, parts, where, chunk_size, retain_graph)
        before = _first(step, rule, key) if state is None else _given(state)
        grads, after = _way(rule, where)(step, rule, before)
        if batch.scale is not None:
            grads, after = kept_if_finite(grads, after, before)
        _accumulate(grads, batch.zeros or rule.processes is not None)
    return after


def _parts(
    features: PyTree,
    batch: Batch,
    target: PyTree,
    tree: PyTree,
    rule: Aggregator | Scalarizer,
    part: Part,
) -> Split:
    """Tell what losses share from their heads, if there are features."""
    if features is None or isinstance(rule, Scalarizer):
        return _heads.no_heads(batch, tree)
    return _heads.split(features, batch, target, tree, _factors(rule, batch, part))


def _left(parts: Split, tree: PyTree, retain_graph: bool) -> list[nn.Parameter]:
    """Return the parameters that losses depend on, and that neither this nor a next pass trains."""
    if retain_graph:
        return []
    known = {id(param) for param in _tree.leaves(tree)}
    left = [x for place, x in parts.sources.items() if place not in known]
    return [x for x in left if isinstance(x, nn.Parameter)]


def _factors(rule: Aggregator, batch: Batch, part: Part) -> Tensor | None:
    """Return factors of losses that make means over the processes that have them, if needed."""
    if rule.processes is None or (batch.present is None and part.size is None):
        return None
    return rule.processes.factors(batch.vector, batch.present)


def _check_options(rule: Any, chunk_size: int | None, where: Any, scaler: Any, size: Any) -> None:
    """Check the rule, and what goes with it."""
    _check.rule(rule, (Aggregator, Scalarizer))
    _check.chunk_size(chunk_size)
    _check.where(where)
    _check.size(size, rule.processes is not None)
    if where is not None:
        _check.combinable("where", rule, (Aggregator,))
        _check.weighting_present("where", rule.name, rule.weighting)
    _check.unscaled(rule.name, scaler is not None and rule.processes is not None)


class _Step(NamedTuple):
    """What one call differentiates, and how."""

    batch: Batch
    parts: Split
    where: Callable[[str], bool] | None
    chunk_size: int | None
    retain: bool

    def params(self) -> list[Tensor]:
        """Return the shared parameters."""
        return _tree.leaves(self.parts.shared)

    def jac(self) -> PyTree:
        """Return a placeholder for the Jacobian."""
        m = len(self.batch.vector)
        return _tree.map(lambda p: _tree.placeholder(p, (m, *p.shape)), self.parts.shared)


def _given(state: State) -> State:
    """Return a state without its past; warn if it is to be trained."""
    values = detached(state)
    check_state(state, values)
    return values


def _first(step: _Step, rule: Aggregator | Scalarizer, key: Tensor | None) -> State:
    """Return the first state; options by name are those of the losses."""
    _names.check_names(rule, list(dict.fromkeys(step.batch.paths)))
    like = step.batch.vector if isinstance(rule, Scalarizer) else step.jac()
    return rule.init(like, key=key)


def _way(rule: Aggregator | Scalarizer, where: Any) -> Any:
    """Return how a rule gets its gradients: in one pass, if it looks at none to weigh them."""
    if isinstance(rule, Scalarizer):
        return _scalarized
    if rule.partition is None and rule.weighting is not None and rule.weighting.needs == "size":
        return _weighted
    return _aggregated if where is None else _partial


def _scalarized(step: _Step, rule: Scalarizer, state: State) -> tuple[Grads, State]:
    """Differentiate the one loss: first by the losses, then those."""
    with torch.enable_grad():
        vector = step.batch.vector.clone().requires_grad_()
        loss, state = rule(vector, state, present=step.batch.present)
        (weights,) = torch.autograd.grad(loss, vector)
    grads = _in_one_pass(step, weights)
    return _averaged(rule, grads), detached(state)


def _weighted(step: _Step, rule: Aggregator, state: State) -> tuple[Grads, State]:
    """Differentiate the sum of the losses, weighted."""
    weighting, batch = rule.weighting, step.batch
    assert weighting is not None
    options = {"losses": batch.vector, "present": batch.present}
    weights, state = weighting(statistic_like(step.jac()), state, **options)
    return _in_one_pass(step, weights) + step.parts.heads, state


def _in_one_pass(step: _Step, weights: Tensor) -> Grads:
    """Pull weights of the losses back."""
    params, parts = step.params(), step.parts
    grads = combined(parts.pulls, weights, params, step.retain)
    return list(zip(params, grads, strict=True))


def _aggregated(step: _Step, rule: Aggregator, state: State) -> tuple[Grads, State]:
    """Differentiate the losses one by one, and aggregate their gradients."""
    batch, parts, params = step.batch, step.parts, step.params()
    found, full, factor = _rows(step, params, step.retain)
    _, rebuild = _tree.flatten(parts.shared)
    options = {"losses": batch.vector, "present": batch.present}
    direction, state = rule(rebuild(full), state, **options)
    reached = [leaf is not None or rule.processes is not None for leaf in found]
    pairs = zip(_tree.leaves(direction), reached, strict=True)
    grads = _times([grad if kept else None for grad, kept in pairs], factor)
    return [*zip(params, grads, strict=True), *_averaged(rule, parts.heads)], state


def _partial(step: _Step, rule: Aggregator, state: State) -> tuple[Grads, State]:
    """Weigh losses by their gradients for some parameters, and differentiate that for all."""
    batch, where, weighting = step.batch, step.where, rule.weighting
    assert where is not None
    assert weighting is not None
    paths, params = _tree.paths(step.parts.shared), step.params()
    chosen = [i for i, path in enumerate(paths) if where(path)]
    _check.some_named("where", chosen, paths)
    _, full, factor = _rows(step, [params[i] for i in chosen], True)
    options = {"losses": batch.vector, "present": batch.present}
    weights, state = weighting(_tree.gramian(full), state, **options)
    grads = [grad for _, grad in _in_one_pass(step, weights)]
    if factor is not None and batch.scale is not None:
        grads = _times(grads, factor / batch.scale)  # 1, or not a number
    return [*zip(params, grads, strict=True), *step.parts.heads], state


def _rows(
    step: _Step, params: list[Tensor], retain: bool
) -> tuple[list[Tensor | None], list[Tensor], Tensor | None]:
    """Return the Jacobian by parameter, then with zeros for `None`, and what scales it again."""
    m, scale = len(step.batch.vector), step.batch.scale
    found = rows(step.parts.pulls, params, m, step.chunk_size, retain)
    pairs = zip(params, found, strict=True)
    full = [_tree.placeholder(p, (m, *p.shape)) if leaf is None else leaf for p, leaf in pairs]
    return (found, full, None) if scale is None else (found, *unscaled(full, scale))


def _times(grads: list[Tensor | None], factor: Tensor | None) -> list[Tensor | None]:
    """Return gradients times a number, if there is one."""
    if factor is None:
        return grads
    return [None if grad is None else grad * factor for grad in grads]


def _averaged(rule: Aggregator | Scalarizer, grads: Grads) -> Grads:
    """Return the mean over processes, all of which have to come to it, if the rule spans some."""
    if rule.processes is None:
        return grads
    full = [torch.zeros_like(param) if grad is None else grad for param, grad in grads]
    means = rule.processes.average(full)
    return [(param, mean) for (param, _), mean in zip(grads, means, strict=True)]


def _accumulate(grads: Grads, zeros: bool) -> None:
    """Add to `.grad`, as `backward` does, what no one else holds."""
    for param, grad in grads:
        if grad is None and not zeros:
            continue
        grad = param.new_zeros(()) if grad is None else grad
        if param.grad is None or param.grad.layout != torch.strided:
            own = like_parameter(param, grad)
            param.grad = own if param.grad is None else own.add_(param.grad)
        else:
            param.grad.add_(grad)
