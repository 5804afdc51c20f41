"""What the tests of golden numbers share."""

import torch
from torch import Tensor

import torchjd_func as jd


def close(got: Tensor, want, digits: int = 7) -> None:
    """Compare with published digits."""
    expected = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0.6 * 10.0**-digits)


def rows(*values) -> Tensor:
    """Make a matrix from its rows."""
    return torch.tensor(values, dtype=torch.float64)


def weights_of(aggregator: jd.Aggregator, jac: Tensor, losses=None) -> Tensor:
    """Return the weights of a first call."""
    assert aggregator.weighting is not None
    given_losses = None if losses is None else torch.tensor(losses, dtype=torch.float64)
    return aggregator.weighting(jac @ jac.mT, losses=given_losses)[0]


def direction_of(aggregator: jd.Aggregator, jac: Tensor, losses=None) -> Tensor:
    """Return the direction of a first call."""
    return jac.mT @ weights_of(aggregator, jac, losses)


def sequence(weighting: jd.Weighting, statistics: list[Tensor]) -> list[Tensor]:
    """Return the weights of successive calls."""
    state, found = weighting.init(statistics[0]), []
    for statistic in statistics:
        weights, state = weighting(statistic, state)
        found.append(weights)
    return found
