"""Random generators: a run is repeated with the same draws, and is seen to draw."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Draws(NamedTuple):
    """The states of the generators of devices."""

    states: list[tuple[Any, Tensor]]

    def restore(self) -> None:
        """Set the generators back."""
        for home, state in self.states:
            home.set_rng_state(state)

    def untouched(self) -> bool:
        """Say whether nothing was drawn since."""
        return all(torch.equal(home.get_rng_state(), state) for home, state in self.states)


def draws(tensors: Iterable[Tensor]) -> Draws:
    """Return the states of the generators of all devices that tensors are on."""
    kinds = {x.device.type for x in tensors} - {"cpu", "meta"}
    homes = [torch, *(torch.get_device_module(kind) for kind in sorted(kinds))]
    return Draws([(home, home.get_rng_state()) for home in homes])
