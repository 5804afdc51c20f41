"""One thread for each worker: the problems are small, and workers share the cores."""

import contextlib
import gc
import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import pytest
import torch
from torch.autograd import forward_ad

if not torch.cuda.is_available():  # read when a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


def pytest_collection_modifyitems(items):
    """Run notebooks first: one that is left to the end keeps a worker when others have none."""
    items.sort(key=lambda item: item.path.suffix != ".ipynb")


def pytest_collection_finish():
    """Leave what is there before the first test to no collection: it took a tenth of all time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(params=DEVICES)
def device(request):
    """Each device that there is."""
    return request.param


@pytest.fixture(autouse=True)
def no_forward_level_is_left():
    """Leave the level of forward derivatives that Dynamo left where it refused a program."""
    yield
    with contextlib.suppress(RuntimeError):  # there is none
        torch._C._exit_dual_level(level=0)  # pyright: ignore
        forward_ad._current_level = -1
