"""What `tests/fuzz.py` calls beside rules: transforms, loops, sets, ensembles, pictures.

The parameters of each function below are drawn by the methods of `Steps` of the same names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import torchjd_func as jd
from tests import wrong
from torchjd_func import _tree

RULES: dict[str, Callable[[], Any]] = {
    "upgrad": jd.upgrad,
    "mgda": jd.mgda,
    "mean": jd.mean,
    "gradvac": jd.gradvac,
    "graddrop": jd.graddrop,
    "moco": jd.moco,
    "clipped_mean": lambda: jd.clipped_mean(1.0),
    "by_layer": lambda: jd.grouped(jd.smoothed(jd.cagrad()), jd.by_layer),
    "monitored": lambda: jd.monitored(jd.dualproj(), {"weights": jd.measures.weights}),
    "famo": jd.scalarizers.famo,
    "stch": jd.scalarizers.stch,
}
ROUTES = ("auto", "jacobian", "layerwise", "product")


def _real(x: Tensor) -> Tensor:
    """Return a tensor of any dtype in float64."""
    return (x.abs() if x.is_complex() else x).double()


def _size(params: Any) -> Tensor:
    """Return a number that depends on all parameters, whatever else is among them."""
    return sum((_real(leaf).sum() for leaf in _tree.tensors(params)), torch.zeros(()).double())


def plain(params: Any, x: Tensor) -> Any:
    """Return two losses of a batch."""
    size = _size(params)
    return {"b": size.square() * _real(x).mean(), "a": size.sin()}


def in_examples(params: Any, x: Tensor) -> Tensor:
    """Return a loss for each example."""
    return (_real(x)[..., None].flatten(1).sum(1) * _size(params)).square()


def with_buffers(params: Any, x: Tensor) -> Any:
    """Return losses and what else comes back."""
    return plain(params, x), {"step": torch.zeros((), dtype=torch.int64), "name": "aux"}


OBJECTIVES: dict[str, Any] = {
    "plain": plain,
    "aux": with_buffers,
    "instancewise": jd.instancewise(in_examples),
    "per_example": jd.per_example(lambda params, x: (_real(x).sum() * _size(params)).square()),
    "accumulate": jd.accumulate(plain, 2),
    "cast": jd.cast_floating(plain, torch.bfloat16),
    "scaled": jd.loss_scale.scaled(plain, jd.loss_scale.init()),
    "multitask": jd.multitask(
        lambda shared, x: _size(shared) * _real(x).mean().reshape(1),
        {"a": lambda p, z, x: z.square().sum(), "b": lambda p, z, x: z.sin().sum() * _size(p)},
    ),
}


def _linear(dtype: torch.dtype = torch.float32) -> Any:
    """Return a module, whose numbers come from no global generator."""
    with torch.random.fork_rng(devices=()):
        return nn.Linear(3, 2, dtype=dtype)


class Steps:
    """Arguments of steps, from the draws of `tests/fuzz.py`."""

    def __init__(self, draw: Any):
        self.draw, self.choice, self.chance = draw, draw.source.choice, draw.source.random
        self.name = self.choice(list(OBJECTIVES))

    def objective(self) -> Any:
        """Return a function of parameters and a batch."""
        return OBJECTIVES[self.name]

    def rule(self) -> Any:
        """Return a rule."""
        return RULES[self.choice(list(RULES))]()

    def params(self) -> Any:
        """Return parameters, which fit the objective mostly."""
        leaf = lambda: self.draw.tensor(self.draw.size(), 2)  # ruff: ignore[lambda-assignment]
        flat = self.choice(
            [leaf(), {"b": leaf(), "a": [leaf(), self.draw.tensor()]}, {"w": leaf()}]
        )
        tasks = (self.name == "multitask") == (self.chance() < 0.9)
        return (flat, {"a": {}, "b": self.draw.tensor()}) if tasks else flat

    def x(self) -> Any:
        """Return a batch."""
        return self.draw.tensor(self.choice([2, 4, self.draw.size()]), self.draw.size())

    def present(self) -> Any:
        """Return which losses there are."""
        if self.chance() < 0.7:
            return None
        flags = [True, False, torch.tensor(self.chance() < 0.5)]
        return self.choice(
            [{"a": self.choice(flags), "b": True}, torch.tensor([True, False]), [True, False]]
        )

    def route(self) -> Any:
        """Return a route."""
        return self.choice(ROUTES)

    def chunk_size(self) -> Any:
        """Return a number of rows, or none."""
        return self.choice([None, 1, 2, 100])

    def where(self) -> Any:
        """Return a predicate, or none."""
        return self.choice([None, None, None, jd.features, bool, lambda path: path.startswith("a")])

    def has_aux(self) -> Any:
        """Return a bool, mostly the right one."""
        return (self.name == "aux") == (self.chance() < 0.95)

    def argnums(self) -> Any:
        """Return positions."""
        return self.choice([0, 0, 0, 0, (0,), 1, (0, 1), -1, 2])

    def key(self) -> Any:
        """Return a key."""
        return jd.random.key(3)

    def size(self) -> Any:
        """Return nothing, or a number of examples."""
        return None if self.chance() < 0.95 else 2

    def n(self) -> Any:
        """Return a number of parts."""
        return self.choice([1, 2, 2, 3])

    def dtype(self) -> Any:
        """Return a dtype."""
        return self.draw.dtype()

    def in_dims(self) -> Any:
        """Return which arguments are batched."""
        return self.choice([None, None, (None, 0), (None, 1), (0,), (None, None)])

    def tree(self) -> Any:
        """Return a tree of tensors."""
        return self.draw.jac()

    def trees(self) -> Any:
        """Return a list of trees, mostly alike."""
        first = self.draw.jac()
        others = [first, _tree.map(torch.clone, first), self.draw.jac()]
        return [first, *(others[i] for i in range(self.draw.source.randint(0, 2)))]

    def shared(self) -> Any:
        """Return positions of arguments that all members share."""
        return self.choice([(), 0, 1, (1,), (0, 1), 2])

    def number(self) -> Any:
        """Return a positive number."""
        return self.draw.number()

    def jacs(self) -> Any:
        """Return Jacobians of three models."""
        leaf = lambda: self.draw.tensor(3, self.draw.m, 2)  # ruff: ignore[lambda-assignment]
        return leaf() if self.chance() < 0.5 else {"a": leaf(), "b": [leaf()]}

    def losses(self) -> Any:
        """Return losses of three models."""
        return self.draw.tensor(3, self.draw.near(self.draw.m))

    def points(self) -> Any:
        """Return points in the plane."""
        return self.draw.tensor(self.draw.size(), 2)

    def matrix(self) -> Any:
        """Return a matrix."""
        return self.draw.tensor(self.draw.m, self.choice([2, 2, 3]))

    def gramian(self) -> Any:
        """Return a Gramian."""
        return self.draw.gramian()

    def vector(self) -> Any:
        """Return a vector."""
        return self.draw.vector()

    def names(self) -> Any:
        """Return names."""
        return self.choice([None, [f"task {i}" for i in range(self.draw.m)]])


def _jac(objective, argnums, has_aux, chunk_size, where, params, x, present, size):
    options = {"has_aux": has_aux, "chunk_size": chunk_size, "where": where}
    return jd.jac_and_value(objective, argnums, **options)(params, x, present=present, size=size)


def _gramian(objective, argnums, has_aux, route, chunk_size, where, params, x, present):
    options = {"has_aux": has_aux, "route": route, "chunk_size": chunk_size, "where": where}
    return jd.gramian_and_value(objective, argnums, **options)(params, x, present=present)


def _row_norms(objective, argnums, has_aux, route, chunk_size, where, params, x):
    options = {"has_aux": has_aux, "route": route, "chunk_size": chunk_size, "where": where}
    return jd.row_norms(objective, argnums, **options)(params, x)


def _gramian_vjp(objective, argnums, has_aux, route, chunk_size, params, x, vector):
    options = {"has_aux": has_aux, "route": route, "chunk_size": chunk_size}
    losses, gramian, pull = jd.gramian_vjp(objective, params, x, argnums=argnums, **options)[:3]
    return losses, gramian, pull(vector)


def _cross_gramian(objective, argnums, route, chunk_size, params, x):
    transformed = jd.cross_gramian(objective, argnums, route=route, chunk_size=chunk_size)
    return transformed(params, (x,), (x,))


def _grad(objective, rule, argnums, has_aux, route, chunk_size, where, params, x, present, key):
    state = jd.init_state(rule, objective, params, x, key=key, argnums=argnums, has_aux=has_aux)
    options = {"has_aux": has_aux, "route": route, "chunk_size": chunk_size, "where": where}
    step = jd.grad_and_value(objective, rule, argnums, **options)
    return step(state, params, x, present=present)


def _double_sampling(objective, route, chunk_size, params, x):
    rule = jd.modo()
    step = jd.double_sampling(objective, rule, route=route, chunk_size=chunk_size)
    return step(jd.init_state(rule, objective, params, x), params, (x,), (x,))


def _explain_gramian(objective, params, x, argnums, has_aux):
    return repr(jd.explain_gramian(objective, params, x, argnums=argnums, has_aux=has_aux))


def _check_instancewise(objective, params, x, argnums, has_aux):
    return jd.check_instancewise(objective, params, x, argnums=argnums, has_aux=has_aux)


def _accumulate(objective, n, in_dims, has_aux, chunk_size, rule, params, x, key):
    parts = jd.accumulate(objective, n, in_dims, has_aux=has_aux, chunk_size=chunk_size)
    state = jd.init_state(rule, parts, params, x, key=key, has_aux=has_aux)
    return jd.grad(parts, rule, has_aux=has_aux)(state, params, x)


def _cast_floating(objective, dtype, params, x, has_aux):
    return jd.jac(jd.cast_floating(objective, dtype), has_aux=has_aux)(params, x)


def _instancewise(in_dims, route, params, x):
    return jd.gramian(jd.instancewise(in_examples, in_dims), route=route)(params, x)


def _per_example(in_dims, route, params, x):
    fn = jd.per_example(lambda p, x: (_real(x).sum() * _size(p)).square(), in_dims)
    return jd.gramian(fn, route=route)(params, x)


def _multitask(params, x, rule, key, route):
    objective = OBJECTIVES["multitask"]
    return jd.grad(objective, rule, route=route)(
        jd.init_state(rule, objective, params, x, key=key), params, x
    )


def _backward(rule, x, present, key, chunk_size, where):
    model = _linear(torch.float64)
    out = model(torch.ones(4, 3, dtype=torch.float64))
    losses = {"a": out[:, 0].square().mean(), "b": out[:, 1].sum() * _real(x).sum()}
    options = {"present": present, "key": key, "chunk_size": chunk_size, "where": where}
    return jd.interop.backward_(losses, model, rule, None, **options)


def _losses_to_backward(tree, rule, key):
    return jd.interop.backward_(tree, _linear(), rule, key=key)


def _target_of_backward(tree, rule, key):
    model = _linear()
    return jd.interop.backward_(model(torch.ones(4, 3)).mean(0), [model, tree], rule, key=key)


def _assign_grads(tree):
    model = _linear()
    jd.interop.assign_grads_(model, {"weight": tree})


def _assign_grads_by_name(tree):
    jd.interop.assign_grads_(_linear(), tree)


def _assign_grads_to(tree):
    jd.interop.assign_grads_(tree, tree)


def _state_dict(rule, tree, key):
    state = rule.init(tree, key=key) if hasattr(rule, "init") else None
    return jd.interop.load_state_dict(rule, jd.interop.state_dict(rule, state))


def _state_of_another(rule, tree):
    return jd.interop.state_dict(rule, tree)


def _saved_of_another(rule, tree):
    return jd.interop.load_state_dict(rule, tree)


def _read_measures(tree, names):
    rule = RULES["monitored"]()
    return jd.read_measures(rule(tree)[1], names=names)


def _functionalize(tree):
    return jd.functionalize(tree)


def _apply(params, tree, x):
    return jd.functionalize(nn.BatchNorm1d(3))[0](params, tree, x)


def _loss_scale(number, tree):
    state = jd.loss_scale.update(jd.loss_scale.init(2.0), tree, growth=number)
    return jd.loss_scale.keep(state, tree, tree)


def _keep(tree, trees):
    return jd.loss_scale.keep(jd.loss_scale.init(), trees[0], trees[-1])


def _stack(trees):
    return jd.ensemble.stack(trees)


def _unstack(tree):
    return jd.ensemble.unstack(tree)


def _each(shared, chunk_size, tree, vector):
    run = jd.ensemble.each(
        lambda a, b: [leaf.sum() for leaf in _tree.tensors((a, b))], shared, chunk_size=chunk_size
    )
    return run(tree, vector)


def _ensemble_init(key, n):
    return jd.ensemble.init(lambda key: {"w": jd.random.normal(key, (2,))}, key, n)


def _moo_svgd(jacs, losses):
    return jd.sets.moo_svgd()(jacs, None, losses=losses)


def _hypervolume_gradient(jacs, losses, vector):
    return jd.sets.hypervolume_gradient(vector)(jacs, None, losses=losses)


def _pareto_mtl(jacs, losses, matrix):
    return jd.sets.pareto_mtl(matrix)(jacs, None, losses=losses)


def _linear_program(vector, matrix, n):
    return jd.linalg.linear_program(vector, matrix, vector, n_free=n)


def _orthant_root(gramian, vector, n):
    return jd.linalg.orthant_root(gramian, vector, max_iter=n)


def _front(points, vector, names):
    return _drawn(jd.plot.front, points, vector, names=names)


def _cone(matrix, vector):
    return _drawn(jd.plot.cone, matrix, {"mean": vector})


def _conflict_matrix(gramian, names):
    return _drawn(jd.plot.conflict_matrix, gramian, names)


def _trajectories(points):
    return _drawn(jd.plot.trajectories, points)


def _drawn(fn: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Draw on axes that are closed again."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots()
    try:
        fn(*args, ax=axis, **options)
    finally:
        pyplot.close(figure)


CALLS: dict[str, Callable[..., Any]] = {
    name.removeprefix("_"): fn
    for name, fn in list(globals().items())
    if inspect.isfunction(fn)
    and name not in ("_real", "_size", "_drawn", "_linear")
    and name[0] == "_"
}


def draw_arguments(draw: Any) -> tuple[str, Callable[..., Any], tuple[Any, ...]]:
    """Draw a call; of one in four, an argument of another type."""
    steps, name = Steps(draw), draw.source.choice(list(CALLS))
    kinds = list(inspect.signature(CALLS[name]).parameters)
    given = {kind: getattr(steps, kind)() for kind in kinds}
    replaceable = [kind for kind in kinds if kind not in ("objective", "x", "trees")]
    if replaceable and draw.source.random() < 0.25:  # a batch is the objective's own business
        kind = draw.source.choice(replaceable)
        value = wrong.VALUES[draw.source.choice(list(wrong.VALUES))]
        if not (kind == "where" and callable(value)):  # what it raises is not ours
            given[kind] = value
    return name, CALLS[name], tuple(given.values())
