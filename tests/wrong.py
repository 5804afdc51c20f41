"""Values of wrong types, the form of an error, and every option of every factory."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import torchjd_func as jd
from torchjd_func import _tree, aggregation, combinators

M = 5
JAC = torch.tensor([[2.0, 0, 1], [-1, 1, 1], [1, 2, -3], [0, -1, 1], [1, 1, 1]]).double()
LOSSES = torch.linspace(0.5, 2.0, M, dtype=torch.float64)

HOUSE = re.compile(r"^.+ must .+, got .+\. [A-Z].+\.$", re.DOTALL)

VALUES: dict[str, Any] = {
    "a string": "0.5",
    "bytes": b"1",
    "None": None,
    "an object": object(),
    "a class": dict,
    "an empty list": [],
    "a list of strings": ["a"] * M,
    "a ragged list": [[1.0], [1.0, 2.0]],
    "a list of None": [None] * M,
    "a list of lists": [[1.0] * M],
    "a list of another length": [1.0, 2.0],
    "a list": [0.1, 0.2, 0.3, 0.4, 0.5],
    "a tuple of ints": (1, 2, 3, 4, 5),
    "a set": {1.0, 2.0},
    "a dict": {"a": 1.0, "b": 2.0},
    "a negative number": -3.5,
    "a large number": 1e9,
    "an int": 2,
    "a bool": True,
    "not a number": math.nan,
    "infinity": math.inf,
    "a complex number": 1j,
    "a numpy number": np.float32(0.5),
    "a numpy int": np.int64(1),
    "a numpy array": np.linspace(0.1, 0.5, M),
    "a numpy array of strings": np.array(["a"] * M),
    "a 0-d tensor": torch.tensor(0.5),
    "a tensor of ints": torch.ones(M, dtype=torch.int64),
    "a tensor of bools": torch.ones(M, dtype=torch.bool),
    "a 0-d tensor of bools": torch.tensor(True),
    "a complex tensor": torch.ones(M, dtype=torch.complex64),
    "a 0-d complex tensor": torch.tensor(1j),
    "a sparse tensor": torch.ones(M).to_sparse(),
    "a matrix": torch.ones(M, M),
    "an empty tensor": torch.ones(0),
    "a function": lambda *args: args[0],
    "a rule": jd.mean(),
    "a factory": jd.mean,
}
CALLED = ("labels", "f")  # options that are functions: what they raise is not ours

REQUIRED: dict[str, Any] = {
    "weights": [1.0] * M,
    "preference": [1.0] * M,
    "preferences": torch.eye(M)[:3],
    "trim_number": 1,
    "max_norm": 1.0,
    "n_byzantine": 1,
    "p": 2.0,
    "lambda_": 0.5,
    "rule": jd.upgrad(),
    "aggregator": jd.upgrad(),
    "labels": jd.together,
    "measures": {"weights": jd.measures.weights},
    "k": 2,
    "reference": torch.full((M,), 9.0),
    "scores": [1.0] * M,
}

FACTORIES: dict[str, Callable[..., Any]] = {
    f"{space.__name__.removeprefix('torchjd_func.')}.{name}": getattr(space, name)
    for space in (aggregation, combinators, jd.scalarizers, jd.sets)
    for name in space.__all__
    if inspect.isfunction(getattr(space, name))
}


def required(factory: Callable[..., Any]) -> dict[str, Any]:
    """Return good values of the options that have no default."""
    parameters = inspect.signature(factory).parameters.values()
    return {p.name: REQUIRED[p.name] for p in parameters if p.default is p.empty}


OPTIONS = [
    (name, option) for name, f in FACTORIES.items() for option in inspect.signature(f).parameters
]


def use(rule: Any) -> Any:
    """Call a rule on a small problem; of a set of models, on three of them."""
    key = jd.random.key(0)
    if isinstance(rule, jd.Scalarizer):
        return rule(LOSSES, rule.init(LOSSES, key=key))[0]
    if isinstance(rule, jd.Weighting):
        gramian = JAC @ JAC.mT
        return rule(gramian, rule.init(gramian, key=key), losses=LOSSES)[0]
    if isinstance(rule, jd.Aggregator):
        return rule(JAC, rule.init(JAC, key=key), losses=LOSSES)[0]
    jacs, losses = torch.stack([JAC, 2 * JAC, -JAC]), torch.stack([LOSSES] * 3)
    return rule(jacs, None, losses=losses)[0]


def complaint(call: Callable[[], Any], *words: str) -> str | None:
    """Return what is wrong with how a call fails, if it fails; `None` if nothing."""
    try:
        out = call()
    except Exception as error:
        text = f"{type(error).__name__}: {str(error)[:200]}"
        if not isinstance(error, ValueError | TypeError) or not HOUSE.match(str(error)):
            return text
        named = not words or any(word in str(error) for word in words)
        return None if named else f"does not name {words}: {text}"
    leaves = _tree.leaves(out)
    good = all(isinstance(leaf, torch.Tensor) and not leaf.is_meta for leaf in leaves)
    return None if good else f"returns {out}"


def option_complaint(name: str, option: str, value: Any) -> str | None:
    """Return what is wrong with how a factory takes a value: not at all, or so that it works."""
    factory = FACTORIES[name]
    try:
        rule = factory(**required(factory) | {option: value})
    except Exception as error:
        raised = error  # `error` ends with the block

        def again() -> None:
            raise raised

        return complaint(again, option, name.split(".")[-1])
    return None if option in CALLED and callable(value) else complaint(lambda: use(rule))


RULES = (
    "mean",
    "upgrad",
    "mgda[loss]",
    "gradvac",
    "graddrop",
    "moco",
    "db_mtl",
    "gradnorm",
    "config_momentum[all]",
    "krum",
    "sdmgrad",
    "grouped[gradvac]",
    "every[gradnorm]",
    "monitored[every[rlw]]",
    "smoothed[upgrad]",
)
SCALARIZERS = ("mean", "uw", "famo", "dwa", "random", "stch", "hypervolume[random]")
ARGUMENTS = ("jac", "gramian", "losses", "present", "state", "key")


def called(rule: Any, argument: str, value: Any) -> Any:
    """Call a rule, or its `init`, with one wrong argument."""
    key = jd.random.key(0)
    if isinstance(rule, jd.Scalarizer):
        if argument == "key":
            return rule.init(LOSSES, key=value)
        if argument in ("jac", "losses"):
            return rule(value, rule.init(LOSSES, key=key))[0]
        state = rule.init(LOSSES, key=key)
        return rule(LOSSES, value if argument == "state" else state, **_if(argument, value))[0]
    if argument == "key":
        return rule.init(JAC, key=value)
    state = rule.init(JAC, key=key)
    if argument == "gramian" and rule.weighting is not None:
        return rule.weighting(value, state, losses=LOSSES)[0]
    if argument in ("jac", "gramian"):
        return rule(value, state, losses=LOSSES)[0]
    return rule(
        JAC, value if argument == "state" else state, **{"losses": LOSSES} | _if(argument, value)
    )[0]


def _if(argument: str, value: Any) -> dict[str, Any]:
    return {argument: value} if argument in ("losses", "present") else {}
