"""Rules of a few lines that are told which objectives there are."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import torchjd_func as jd
from torchjd_func import _tree


class ShortState(NamedTuple):
    """State of the rule below."""

    lengths: Tensor  # (m,), running mean of the squared lengths
    step: Tensor  # ()


def _init(statistic, key):
    """Start from zeros."""
    zero = statistic.new_zeros(statistic.shape[0], dtype=torch.float64)
    return ShortState(zero, statistic.new_zeros((), dtype=torch.int64))


def _update(statistic, state, losses, *, present=None):
    """Weigh by the inverse of the running length, and by the losses, with sum 1."""
    here = torch.ones_like(state.lengths, dtype=torch.bool) if present is None else present
    lengths = 0.5 * state.lengths + statistic.diagonal() + (statistic.sum(-1) / here.sum()).abs()
    weights = torch.where(here, losses / (1 + lengths), 0)
    kept = torch.where(here, lengths, state.lengths)
    return weights / weights.sum(), ShortState(kept, state.step + 1)


def _rows(jac, state, losses, *, present=None):
    """Take the signs of a mean that counts the present rows."""
    weights, state = _update(_tree.gramian(jac), state, losses, present=present)
    return _tree.map(torch.sign, _tree.weighted_sum(jac, weights)), state


def _columns(jac, state, losses, *, present=None):
    """Take the largest entry of each column of the present rows."""

    def largest(leaf):
        if present is not None:
            leaf = torch.where(_tree.per_row(present, leaf), leaf, -torch.inf)
        return leaf.amax(0)

    return _tree.map(largest, jac), state


def _equal(statistic, *, present=None):
    """Weigh the present rows alike."""
    here = torch.ones(len(statistic), dtype=torch.bool) if present is None else present
    return here.to(statistic.dtype) / here.sum()


SHORT = jd.weighted(jd.Weighting("short", _init, _update))
ROWS = jd.Aggregator("rows", lambda jac, key: _init(_tree.matrix(_tree.leaves(jac)[0]), key), _rows)
COLUMNS = replace(
    jd.Aggregator("columns", lambda jac, key: (), _columns), columnwise=True
)  # counts each column alone
SIZE = jd.weighted(jd.stateless("size", _equal, needs="size"))
