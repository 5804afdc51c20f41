"""Auxiliary outputs that are objects: their tensors are those of no transform."""

import dataclasses
from collections import OrderedDict

import pytest
import torch
from torch.func import debug_unwrap

import torchjd_func as jd

PARAMS, X = torch.ones(2), torch.eye(2)


@dataclasses.dataclass
class Output:
    scores: torch.Tensor
    more: object = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    scores: torch.Tensor


class Results(OrderedDict):
    """What models return: a dict of which optree does not know the type."""


class Cache:
    """An object that holds a list, and itself."""

    def __init__(self, scores):
        self.layers = [scores]
        self.owner = self


def normal(scores):
    return torch.distributions.Normal(scores, torch.ones(2), validate_args=False)


OBJECTS = {
    "dataclass": (lambda y: Output(y, {"next": [y + 1]}), lambda o: [o.scores, o.more["next"][0]]),
    "frozen": (Frozen, lambda o: [o.scores]),
    "mapping": (lambda y: Results(scores=y), lambda o: [o["scores"]]),
    "cache": (Cache, lambda o: o.layers),
    "distribution": (normal, lambda o: [o.mean, o.sample()]),
    "in a tree": (lambda y: {"first": (Output(y),)}, lambda o: [o["first"][0].scores]),
}
VERBS = {
    "gramian": lambda fn: jd.gramian_and_value(fn, has_aux=True)(PARAMS, X)[1][1],
    "jac": lambda fn: jd.jac_and_value(fn, has_aux=True)(PARAMS, X)[1][1],
    "grad": lambda fn: jd.grad_and_value(fn, jd.mean(), has_aux=True)(None, PARAMS, X)[1][1],
    "scalarizer": lambda fn: jd.grad_and_value(fn, jd.scalarizers.mean(), has_aux=True)(
        (), PARAMS, X
    )[1][1],
    "vjp": lambda fn: jd.gramian_vjp(fn, PARAMS, X, has_aux=True)[-1],
}


@pytest.mark.parametrize("structure", [lambda fn: fn, jd.instancewise], ids=["plain", "examples"])
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", OBJECTS)
def test_tensors_of_objects_come_out_as_values(kind, verb, structure):
    make, tensors = OBJECTS[kind]
    aux = VERBS[verb](structure(lambda params, x: ((x @ params).square(), make(x @ params))))
    found = tensors(aux)
    assert found and all(debug_unwrap(x, recurse=False) is x for x in found)
    assert not any(x.requires_grad for x in found)
    if kind != "distribution":
        torch.testing.assert_close(found[0], torch.ones(2))


def test_objects_of_the_user_are_copied():
    kept = Output(torch.zeros(2))

    def objective(params, x):
        return (x @ params).square(), kept

    aux = VERBS["gramian"](objective)
    assert aux is not kept and aux.more is None
    torch.testing.assert_close(aux.scores, kept.scores)


def test_objects_without_tensors_are_the_same():
    kept = Output("text")  # pyright: ignore[reportArgumentType]
    assert VERBS["jac"](lambda params, x: ((x @ params).square(), kept)) is kept


def test_compiled():
    def objective(params, x):
        return (x @ params).square(), Output(x @ params)

    compiled = torch.compile(
        jd.gramian_and_value(objective, has_aux=True), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(PARAMS, X)[1][1].scores, torch.ones(2))
