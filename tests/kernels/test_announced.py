"""What compilers are told of opaque operations is what these return: shapes, dtypes and strides."""

from typing import Any

import pytest
import torch

import torchjd_func as jd
from tests.kernels.test_batches import DEVICE, DTYPE, K, gramians, numbers, orders
from torchjd_func import _host, _threefry
from torchjd_func.aggregation import _cagrad_search, _surgery
from torchjd_func.linalg import _dense, _eigh, _linear_program, _orthant, _search

pytestmark = [
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]
LARGE = _eigh.LARGEST + 1  # fits no kernel


def problem(m):
    """Return a linear program, whose feasible set is a simplex."""
    return numbers(K, m), torch.ones(K, 1, m, dtype=DTYPE), torch.ones(K, 1, dtype=DTYPE), 0


def search(m):
    """Return what CAGrad searches with."""
    return (
        gramians(m),
        torch.full((K, m), 1 / m, dtype=DTYPE),
        gramians(m).mean(1),
        numbers(K),
        1e-9,
    )


def root(m):
    """Return what is looked for in the orthant."""
    return gramians(m), numbers(K, 1), numbers(K, m), 1e-12, 30


TABLE = {
    "eigh": (_eigh._IN_KERNEL, lambda: (gramians(3),)),
    "eigh, large": (_eigh._ON_HOST, lambda: (gramians(LARGE),)),
    "inverse": (_dense.invert, lambda: (gramians(3),)),
    "nnqp": (_search.search, lambda: (gramians(3), numbers(K, 3), 1e-11, "auto")),
    "nnqp, large": (_search.search, lambda: (gramians(130), numbers(K, 130), 1e-11, "auto")),
    "vertex": (_linear_program.lp_vertex, lambda: problem(3)),
    "cagrad": (_cagrad_search._IN_KERNEL, lambda: search(3)),
    "cagrad, large": (_cagrad_search._ON_HOST, lambda: search(130)),
    "root": (_orthant._IN_KERNEL, lambda: root(3)),
    "root, large": (_orthant._ON_HOST, lambda: root(130)),
    "pcgrad": (_surgery._pcgrad, lambda: (gramians(3), orders(3))),
    "gradvac": (_surgery._gradvac, lambda: (gramians(3), numbers(K, 3, 3) - 1, orders(3), 1e-14)),
    "bits": (_threefry.words, lambda: (jd.random.key(0), 1, 5, 0)),
    "wide bits": (_threefry.words, lambda: (jd.random.key(0), 1, 5, 53)),
}


@pytest.mark.parametrize("name", TABLE)
def test_what_is_announced_comes(name):
    operation, arguments = TABLE[name]
    given = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments()]
    torch.library.opcheck(operation, tuple(given), test_utils=("test_schema", "test_faketensor"))


def test_strides_of_a_library_are_not_passed_on():
    def turned(x: torch.Tensor) -> torch.Tensor:
        return (x + 1).mT

    operation: Any = _host.operation("turned", turned, lambda x: x.new_empty(x.mT.shape))
    given = (torch.rand(2, 3, device=DEVICE),)
    torch.library.opcheck(operation, given, test_utils="test_faketensor")
    assert operation(*given).is_contiguous()
