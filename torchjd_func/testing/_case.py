"""A rule under test: how it is made, what it claims, and what it is tried on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchjd_func import _tree, random
from torchjd_func._lift import weighted
from torchjd_func._types import Aggregator, PyTree, Scalarizer, State, Weighting
from torchjd_func.differentiate import grad_and_value
from torchjd_func.testing._matrices import as_tree, matrix

Rule = Weighting | Aggregator | Scalarizer
LOSSES = (0.5, 3.0, 1.2, 2.0, 0.7, 1.6, 0.9, 2.5)
N = 6


@dataclass(frozen=True)
class Case:
    """A rule under test. What is not claimed is not tested, but for what every rule promises.

    Attributes:
        make: `m -> rule`.
        m: The only number of objectives that the rule is made for; `None` if any.
        subset: `rows -> rule`, for a rule with a number for each objective: the rule for some of
            the objectives, with their numbers. Without it, `make` is called with how many.
        min_m: The smallest number of objectives; fewer are an error.
        random: Whether `init` needs a key.
        needs_losses: Whether an Aggregator needs `losses=`.
        observes: What `observe` of a Scalarizer is given: `"losses"`, or `"nothing"`.
        differentiable: Whether derivatives agree with differences almost everywhere: no part of the
            result is held constant.
        keeps_direction: Whether one objective alone is descended along its gradient.
        present: Whether the rule takes `present=`.
        drops_non_finite: Whether a row that is not finite is left out, and not seen in the result.
        equivariant: The order of the objectives does not matter.
        degree: At a fresh state, gradients (or losses) that are s times as long give a result that
            is `s**degree` times as long; `None` if there is no such degree.
        non_conflicting: The direction has no negative product with a gradient.
        linear_under_scaling: The direction is linear in the scales of the gradients.
        weighted: The direction is a combination of the gradients.
        device: Where the problems are.
    """

    make: Callable[..., Any]
    m: int | None = None
    subset: Callable[[Sequence[int]], Any] | None = None
    min_m: int = 1
    random: bool = False
    needs_losses: bool = False
    observes: str = ""
    differentiable: bool = True
    keeps_direction: bool = True
    present: bool = True
    drops_non_finite: bool = False
    equivariant: bool = False
    degree: float | None = None
    non_conflicting: bool = False
    linear_under_scaling: bool = False
    weighted: bool = False
    device: torch.device | str = "cpu"

    def rule(self, m: int | None = None) -> Aggregator | Scalarizer:
        """Return the rule for `m` objectives; a Weighting as the Aggregator that it makes."""
        return lifted(self.make(self.size if m is None else m))

    def among(self, rows: Sequence[int]) -> Aggregator | Scalarizer:
        """Return the rule for some of the objectives."""
        return lifted(self.make(len(rows)) if self.subset is None else self.subset(rows))

    @property
    def size(self) -> int:
        """How many objectives the rule is tried on."""
        return max(3, self.min_m) if self.m is None else self.m

    @property
    def scalar(self) -> bool:
        """Whether the rule is given losses, and not a Jacobian."""
        return isinstance(self.rule(), Scalarizer)

    @property
    def name(self) -> str:
        """The name of the rule."""
        return self.rule().name

    def key(self, seed: int = 0) -> Tensor | None:
        """Return a key if the rule draws random numbers."""
        return random.key(seed, device=self.device) if self.random else None

    def losses(self, m: int) -> Tensor | None:
        """Return positive losses if the rule needs them beside the Jacobian."""
        if not self.needs_losses:
            return None
        return torch.linspace(0.5, 2.0, m, dtype=torch.float64, device=self.device)

    def sample(self, m: int | None = None, kind: str = "gaussian", seed: int = 3) -> Tensor:
        """Return what the rule is given: a matrix `(m, 6)` that conflicts, or losses `(m,)`."""
        m = self.size if m is None else m
        if self.scalar:
            repeated = (LOSSES * (m // len(LOSSES) + 1))[:m]
            return torch.tensor(repeated, dtype=torch.float64, device=self.device)
        return matrix(kind, m, N, seed, self.device)

    def tree(self, x: Tensor) -> PyTree:
        """Cut a sample into a pytree."""
        half = len(x) // 2
        return {"z": [x[half:]], "a": x[:half].reshape(1, -1)} if self.scalar else as_tree(x)

    def init(self, rule: Aggregator | Scalarizer, x: PyTree, seed: int = 0) -> State:
        """Return an initial state."""
        return rule.init(x, key=self.key(seed))

    def start(self, x: PyTree, m: int | None = None) -> tuple[Aggregator | Scalarizer, State]:
        """Return the rule and an initial state."""
        rule = self.rule(m)
        return rule, self.init(rule, x)

    def step(
        self,
        rule: Aggregator | Scalarizer,
        x: PyTree,
        state: State,
        losses: Tensor | None = None,
        present: Tensor | None = None,
    ) -> tuple[Any, State]:
        """Return the direction, or the loss and its derivative, and the next state."""
        if isinstance(rule, Scalarizer):
            loss, after = rule(x, state, present=present)
            value = torch.func.grad(lambda x: rule(x, state, present=present)[0])
            return (loss, value(x)), after
        losses = self.losses(_tree.leading_size(x)) if losses is None else losses
        return rule(x, state, losses=losses, present=present)

    def observe(self, rule: Any, x: PyTree, state: State) -> State:
        """Observe as the rule wants it, if it does."""
        if getattr(rule, "observe", None) is None:
            return state
        return rule.observe(x if self.observes == "losses" else None, state)

    def after(self, rule: Any, x: PyTree, state: State, n: int = 3) -> State:
        """Return the state after `n` calls."""
        for _ in range(n):
            _, state = self.step(rule, x, state)
            state = self.observe(rule, x, state)
        return state

    def objective(self) -> tuple[Tensor, Tensor]:
        """Return matrix and offset of an affine objective with the sample at 0."""
        if self.scalar:
            return matrix("gaussian", self.size, N, 3, self.device), self.sample()
        jac, losses = self.sample(), self.losses(self.size)
        return jac, torch.ones_like(jac[:, 0]) if losses is None else losses

    def training_step(self, rule: Any) -> Callable[..., Any]:
        """Return `(state, x) -> (x, losses, state)`: one step on the affine objective."""
        jac, offset = self.objective()
        gradient = grad_and_value(lambda x: jac @ x + offset, rule)

        def step(state: State, x: Tensor) -> tuple[Tensor, Tensor, State]:
            grads, losses, state = gradient(state, x)
            x = x - 1e-3 * grads
            return x, losses, self.observe(rule, jac @ x + offset, state)

        return step


def lifted(rule: Any) -> Any:
    """Return a rule; a Weighting as the Aggregator that it makes."""
    return weighted(rule) if isinstance(rule, Weighting) else rule
