"""The states of random generators while an objective is watched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_SEED = 5


class Draws(NamedTuple):
    """The states of random generators, so that a run is repeated with the same draws."""

    states: list[tuple[str, Tensor]]  # by the type of a device

    def restore(self) -> None:
        """Set the generators back."""
        for kind, state in self.states:
            _home(kind).set_rng_state(state)

    def again(self) -> Draws:
        """Return the states that the same generators have now."""
        return Draws([(kind, _home(kind).get_rng_state()) for kind, _ in self.states])

    def others(self) -> Draws:
        """Return states for other draws."""
        fresh = [(kind, torch.Generator(kind).manual_seed(_SEED)) for kind, _ in self.states]
        return Draws([(kind, generator.get_state()) for kind, generator in fresh])

    def differ(self, other: Draws) -> bool:
        """Say whether numbers were drawn between the two."""
        pairs = zip(self.states, other.states, strict=True)
        return any(not torch.equal(a[1], b[1]) for a, b in pairs)


def draws(tensors: Sequence[Tensor]) -> Draws:
    """Return the states of the generators of all devices that are used."""
    kinds = sorted({"cpu", *(x.device.type for x in tensors)} - {"meta"})
    return Draws([(kind, _home(kind).get_rng_state()) for kind in kinds])


def _home(kind: str) -> Any:
    """Return the module that has the generator of a type of device."""
    return torch if kind == "cpu" else torch.get_device_module(kind)
