"""Heads whose losses train the trunk not at all, or not the heads themselves, are named."""

import re
import warnings

import pytest
import torch
from torch import nn

import torchjd_func as jd

TRUNK, HEADS = nn.Linear(10, 8), {"a": nn.Linear(8, 1), "b": nn.Linear(8, 1)}
APPLY, PARAMS, _ = jd.functionalize((TRUNK, HEADS))
X = torch.randn(16, 10, generator=torch.Generator().manual_seed(0))


def trunk(params, x):
    return APPLY[0](params, {}, x)[0].tanh()


def head(name):
    return lambda params, z, x: (APPLY[1][name](params, {}, z)[0] - 1).square().mean()


def loose(params, z, x):
    return head("b")(params, z.detach(), x)


def idle(params, z, x):
    return (HEADS["b"](z) - 1).square().mean()


def constant(params, z, x):
    return HEADS["b"](z.detach()).square().mean()


CASES = {
    "the trunk": (loose, r"heads \['b'\] are constants of the features"),
    "itself": (idle, r"heads \['b'\] are constants of the parameters"),
    "nothing": (constant, r"Losses \['b'\] are constants of the differentiated"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("route", ["auto", "layerwise"])
def test_a_head_that_does_not_train_is_named(case, route):
    wrong, text = CASES[case]
    objective = jd.multitask(trunk, {"a": head("a"), "b": wrong})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jd.grad(objective, jd.mgda(), route=route)(None, PARAMS, X)
    texts = [str(warning.message) for warning in caught]
    modules = [found for found in texts if "not differentiated" in found]
    assert len(modules) == (wrong is not loose)
    (rest,) = [found for found in texts if found not in modules]
    assert re.search(text, rest)


@pytest.mark.parametrize("present", [None, {"a": True, "b": False}])
def test_heads_that_train_are_not(present):
    plain = {"a": head("a"), "b": lambda params, z, x: z.square().mean()}
    params = (PARAMS[0], PARAMS[1] | {"b": {}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jd.grad(jd.multitask(trunk, {name: head(name) for name in HEADS}), jd.upgrad())(
            None, PARAMS, X, present=present
        )
        jd.jac(jd.multitask(trunk, plain))(params, X)
