"""The states of random generators while an objective is watched."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_SEED = 5
States = dict[torch.Generator, Tensor]


class Draws(NamedTuple):
    """The states of random generators, so that a run is repeated with the same draws."""

    states: list[tuple[str, Tensor]]  # by the type of a device
    own: States  # of generators that operations were handed
    host: tuple[Any, Any] | None = None  # Python's and NumPy's, which take long to read

    def restore(self) -> None:
        """Set the generators back."""
        for kind, state in self.states:
            _home(kind).set_rng_state(state)
        for generator, state in self.own.items():
            generator.set_state(state)
        if self.host is not None:
            random.setstate(self.host[0])
            np.random.set_state(self.host[1])

    def with_host(self) -> Draws:
        """Return the same, and the states that the generators of Python and NumPy have now."""
        return self._replace(host=(random.getstate(), np.random.get_state()))

    def host_drew(self) -> bool:
        """Say whether the generators of Python or NumPy drew numbers since."""
        return pickle.dumps(self.host) != pickle.dumps(self.with_host().host)

    def again(self) -> Draws:
        """Return the states that the same generators have now."""
        states = [(kind, _home(kind).get_rng_state()) for kind, _ in self.states]
        return Draws(states, {generator: generator.get_state() for generator in self.own})

    def others(self) -> Draws:
        """Return states for other draws."""
        states = [(kind, _other(torch.device(kind))) for kind, _ in self.states]
        own = {generator: _other(generator.device) for generator in self.own}
        return Draws(states, own, self.host)

    def differ(self, other: Draws) -> bool:
        """Say whether numbers were drawn between the two."""
        states = zip(self.states, other.states, strict=True)
        own = zip(self.own.items(), other.own.items(), strict=True)
        return any(not torch.equal(a[1], b[1]) for a, b in (*states, *own))


def draws(tensors: Sequence[Tensor], own: States | None = None) -> Draws:
    """Return the states of the generators of all devices that are used, and of others."""
    kinds = sorted({"cpu", *(x.device.type for x in tensors)} - {"meta"})
    return Draws(
        [(kind, _home(kind).get_rng_state()) for kind in kinds], {} if own is None else own
    )


def _other(device: torch.device) -> Tensor:
    """Return the state of a generator that is seeded."""
    return torch.Generator(device).manual_seed(_SEED).get_state()


def _home(kind: str) -> Any:
    """Return the module that has the generator of a type of device."""
    return torch if kind == "cpu" else torch.get_device_module(kind)
