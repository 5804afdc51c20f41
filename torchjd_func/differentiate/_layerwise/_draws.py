"""The states of random generators while an objective is watched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Draws(NamedTuple):
    """The states of random generators, so that a run is repeated with the same draws."""

    states: list[tuple[Any, Tensor]]

    def restore(self) -> None:
        """Set the generators back."""
        for home, state in self.states:
            home.set_rng_state(state)

    def again(self) -> Draws:
        """Return the states that the same generators have now."""
        return Draws([(home, home.get_rng_state()) for home, _ in self.states])

    def differ(self, other: Draws) -> bool:
        """Say whether numbers were drawn between the two."""
        pairs = zip(self.states, other.states, strict=True)
        return any(not torch.equal(a[1], b[1]) for a, b in pairs)


def draws(tensors: Sequence[Tensor]) -> Draws:
    """Return the states of the generators of all devices that are used."""
    kinds = {x.device.type for x in tensors} - {"cpu", "meta"}
    homes = [torch, *(torch.get_device_module(kind) for kind in sorted(kinds))]
    return Draws([(home, home.get_rng_state()) for home in homes])
