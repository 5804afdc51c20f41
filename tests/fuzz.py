"""Public functions on drawn arguments: errors of another form, mutations, global generators.

python -m tests.fuzz --n 3000 --seed 0

Most arguments are tensors and trees of all shapes, dtypes and layouts, some are values of wrong
types (`tests/wrong.py`). A call has to return, or to raise an error that says what must hold, what
came and what to do; in both cases it leaves its arguments and the global generators alone.
"""

from __future__ import annotations

import argparse
import random
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import torchjd_func as jd
from tests import fuzz_steps, registry, scalarizer_registry, wrong
from torchjd_func import _tree
from torchjd_func.testing._compare import assert_trees_close, clone
from torchjd_func.testing._contract import _generators, _same_generators

DTYPES = [torch.float64] * 4 + [torch.float32] * 2 + [torch.float16, torch.bfloat16]
ODD_DTYPES = [torch.int64, torch.bool, torch.complex64]


@dataclass
class Draw:
    """A source of arguments."""

    source: random.Random
    generator: torch.Generator
    m: int = 0

    def tensor(self, *shape: int) -> torch.Tensor:
        """Return a tensor of some dtype, layout and scale."""
        base = torch.randn(shape, dtype=torch.float64, generator=self.generator)
        base = base * 10.0 ** self.source.choice([0, 0, 0, -6, 6])
        if self.source.random() < 0.1:
            base = base * self.source.choice([0.0, torch.inf, torch.nan])
        if self.source.random() < 0.2 and shape:  # every second column, or the transpose of one
            base = torch.stack([base, base], -1)[..., 0]
        dtype = self.source.choice(DTYPES if self.source.random() < 0.9 else ODD_DTYPES)
        device = "meta" if self.source.random() < 0.02 else "cpu"
        return base.to(device, dtype)

    def size(self, low: int = 1, high: int = 5) -> int:
        """Return a size, sometimes 0."""
        return 0 if self.source.random() < 0.04 else self.source.randint(low, high)

    def near(self, m: int) -> int:
        """Return a size that is mostly `m`."""
        return m if self.source.random() < 0.93 else self.size()

    def jac(self) -> Any:
        """Return a matrix or a tree, `(m, ...)`."""
        if self.source.random() < 0.5:
            return self.tensor(self.m, self.size())
        leaf = self.tensor(self.near(self.m), self.size(), 2)
        rest = {"b": leaf, "a": [self.tensor(self.m, self.size()), None]}
        return rest if self.source.random() < 0.95 else {}

    def vector(self) -> Any:
        """Return `(m,)`."""
        return self.tensor(self.near(self.m))

    def positive(self) -> Any:
        """Return positive numbers `(m,)`."""
        values = self.vector()
        return values if values.dtype == torch.bool else values.abs()

    def losses(self) -> Any:
        """Return losses as a vector or as a tree."""
        if self.source.random() < 0.5:
            return self.positive()
        return {"b": self.tensor(), "a": self.positive()[: max(self.m - 1, 0)]}

    def gramian(self) -> Any:
        """Return `(m, m)`, positive semidefinite or not."""
        rows = self.tensor(self.m, self.size())
        if rows.dtype == torch.bool or self.source.random() < 0.1:
            return self.tensor(self.m, self.near(self.m))
        return rows @ rows.mT

    def present(self) -> Any:
        """Return a mask, or none."""
        if self.source.random() < 0.6:
            return None
        return torch.rand(self.near(self.m), generator=self.generator) < 0.6

    def flags(self) -> Any:
        """Return a bool, or one for each."""
        return self.source.choice([True, False, [True] * self.near(self.m)])

    def key(self) -> Any:
        """Return a key."""
        return jd.random.key(self.source.randint(0, 9))

    def shape(self) -> Any:
        """Return a shape."""
        return self.source.choice([(), (self.size(),), (2, self.size())])

    def number(self) -> Any:
        """Return a positive number."""
        return self.source.choice([0.5, 1.0, 2, torch.tensor(0.7)])

    def count(self) -> Any:
        """Return a small number."""
        return self.source.randint(0, 4)

    def dtype(self) -> Any:
        """Return a dtype."""
        return self.source.choice(DTYPES + ODD_DTYPES)

    def observation(self) -> Any:
        """Return what one aggregation saw, some of it left out."""
        jac = torch.randn(max(self.m, 1), 3, generator=self.generator)
        jac = jac.to(self.source.choice(DTYPES)) * self.source.choice([0.0, 1.0, 1e-6])
        weights = torch.full_like(jac[:, 0], 1 / len(jac))
        parts = [jac @ jac.mT, weights, jac[:, 0].abs()]
        gramian, weights, losses = (x if self.source.random() < 0.9 else None for x in parts)
        return jd.Observation(gramian, weights, losses, jac, jac.mean(0))


FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[str, ...], dict[str, str]]] = {
    "linalg.nnqp": (jd.linalg.nnqp, ("gramian", "vector"), {}),
    "linalg.dual_cone_projection": (
        jd.linalg.dual_cone_projection,
        ("gramian", "positive"),
        {},
    ),
    "linalg.min_norm_point": (jd.linalg.min_norm_point, ("gramian",), {}),
    "linalg.orthant_root": (jd.linalg.orthant_root, ("gramian", "number"), {}),
    "linalg.project_simplex": (jd.linalg.project_simplex, ("vector",), {}),
    "metrics.delta_m": (jd.metrics.delta_m, ("vector", "vector", "flags"), {}),
    "metrics.delta_p": (jd.metrics.delta_p, ("vector", "vector", "flags"), {}),
    "metrics.mean_rank": (jd.metrics.mean_rank, ("gramian", "flags"), {}),
    "metrics.hypervolume": (jd.metrics.hypervolume, ("gramian", "vector"), {}),
    "metrics.pairwise_cosine": (jd.metrics.pairwise_cosine, ("gramian",), {}),
    "metrics.stationarity_gap": (jd.metrics.stationarity_gap, ("gramian",), {}),
    "random.key": (jd.random.key, ("count",), {}),
    "random.split": (jd.random.split, ("key", "count"), {}),
    "random.fold_in": (jd.random.fold_in, ("key", "count"), {}),
    "random.bits": (jd.random.bits, ("key", "shape"), {}),
    "random.uniform": (jd.random.uniform, ("key", "shape"), {"dtype": "dtype"}),
    "random.normal": (jd.random.normal, ("key", "shape"), {"dtype": "dtype"}),
    "random.permutation": (jd.random.permutation, ("key", "count"), {}),
    **{
        f"measures.{name}": (getattr(jd.measures, name), ("observation",), {})
        for name in jd.measures.__all__
    },
}


@dataclass
class Call:
    """A call, and what it is given."""

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def shown(self) -> str:
        """Return the call in one line."""
        parts = [*map(_shown, self.args), *(f"{k}={_shown(v)}" for k, v in self.kwargs.items())]
        return f"{self.name}({', '.join(parts)})"


def _shown(value: Any) -> str:
    shapes = _tree.map(
        lambda leaf: (
            f"{tuple(leaf.shape)} {str(leaf.dtype)[6:]}" if isinstance(leaf, torch.Tensor) else leaf
        ),
        value,
    )
    return " ".join(str(shapes).split())[:160]


def _rule(draw: Draw) -> Call:
    """Draw a call of a method, or of its weighting, with all arguments."""
    name = draw.source.choice(list(registry.METHODS))
    method = registry.METHODS[name]
    losses = draw.positive() if method.needs_losses or draw.source.random() < 0.3 else None
    key = draw.key() if method.random == (draw.source.random() < 0.97) else None

    def call(statistic: Any, losses: Any, present: Any, key: Any) -> Any:
        rule = method.make(draw.m)
        used = rule.weighting if weigh and rule.weighting is not None else rule
        state = used.init(statistic, key=key)
        out, state = used(statistic, state, losses=losses, present=present)
        return out, used(statistic, state, losses=losses, present=present)

    weigh = method.weighted and draw.source.random() < 0.3
    statistic = draw.gramian() if weigh else draw.jac()
    return Call(name, call, (statistic, losses, draw.present(), key))


def _scalarizer(draw: Draw) -> Call:
    """Draw a call of a scalarizer."""
    name = draw.source.choice(list(scalarizer_registry.METHODS))
    method = scalarizer_registry.METHODS[name]

    def call(losses: Any, present: Any, key: Any) -> Any:
        rule = method.make(draw.m)
        state = rule.init(losses, key=key)
        out, state = rule(losses, state, present=present)
        return out, rule(losses, method.observe(rule, losses, state))

    key = draw.key() if method.random else None
    return Call(f"scalarizers.{name}", call, (draw.losses(), draw.present(), key))


def _function(draw: Draw) -> Call:
    """Draw a call of a plain function."""
    name = draw.source.choice(list(FUNCTIONS))
    fn, kinds, options = FUNCTIONS[name]
    args = tuple(getattr(draw, kind)() for kind in kinds)
    chosen = {k: getattr(draw, kind)() for k, kind in options.items()}
    return Call(name, fn, args, {k: v for k, v in chosen.items() if draw.source.random() < 0.5})


def _option(draw: Draw) -> Call:
    """Draw an option of a factory, which is then used."""
    name, option = draw.source.choice(wrong.OPTIONS)
    factory = wrong.FACTORIES[name]
    required = wrong.required(factory)

    def call(value: Any) -> Any:
        return wrong.use(factory(**required | {option: value}))

    kind = draw.source.choice(["vector", "number", "flags", "positive", "gramian", "count"])
    return Call(f"{name}[{option}]", call, (getattr(draw, kind)(),))


def _step(draw: Draw) -> Call:
    """Draw a call of a transform, or of anything else that is no rule."""
    return Call(*fuzz_steps.draw_arguments(draw))


KINDS = (_rule, _rule, _scalarizer, _function, _function, _option, _step, _step, _step)


def draw_call(seed: int) -> Call:
    """Draw a call; of one in five, an argument of another type."""
    source = random.Random(seed)
    draw = Draw(source, torch.Generator().manual_seed(seed))
    draw.m = draw.size()
    call = source.choice(KINDS)(draw)
    drawn = call.name.startswith("measures") or call.name in fuzz_steps.CALLS
    if source.random() < 0.2 and not drawn:  # measures are called by us
        place = source.randrange(len(call.args))
        value = wrong.VALUES[source.choice(list(wrong.VALUES))]
        if call.name.endswith(("[f]", "[labels]")) and callable(
            value
        ):  # what it raises is not ours
            return call
        call.args = (*call.args[:place], value, *call.args[place + 1 :])
    return call


def fault(call: Call) -> str | None:
    """Return what is wrong with what a call does, if anything."""
    given = (call.args, call.kwargs)
    before, generators, raw = clone(given), _generators(), None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The Gramian of an instance-wise objective")  # and slower
        warnings.filterwarnings(
            "ignore", "Losses .* are constants"
        )  # of the argument that is drawn
        try:
            call.fn(*call.args, **call.kwargs)
        except Exception as error:
            fine = isinstance(error, ValueError | TypeError) and wrong.HOUSE.match(str(error))
            raw = None if fine else f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    if raw:
        return raw
    if not _same_generators(generators):
        return "moves a global generator"
    return _mutation(given, before)


def _mutation(after: Any, before: Any) -> str | None:
    pairs = zip(_tree.leaves(after), _tree.leaves(before), strict=True)
    for leaf, old in pairs:
        if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
            try:
                assert_trees_close(leaf.to_dense(), old.to_dense(), rtol=0, atol=0)
            except AssertionError:
                return "changes an argument"
    return None


def faults(
    n: int, seed: int, draw: Callable[[int], Call] = draw_call
) -> list[tuple[int, str, str]]:
    """Return seeds, calls and faults of `n` calls."""
    seeds = range(seed * 1_000_000, seed * 1_000_000 + n)
    calls = [(at, draw(at)) for at in seeds]
    return [(at, call.shown(), text) for at, call in calls if (text := fault(call))]


def main(about: str | None, faults: Callable[[int, int], list[tuple[int, str, str]]]) -> None:
    """Print the faults, and how many there are of each kind."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--n", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = faults(options.n, options.seed)
    for at, call, text in found:
        print(f"{at}: {call}\n    {text}")
    kinds = Counter(text.split(":")[0] for _, _, text in found)
    print(f"{len(found)} faults in {options.n} calls: {dict(kinds)}")


if __name__ == "__main__":
    main(__doc__, faults)
