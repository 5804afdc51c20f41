"""Every kernel is launched where its numbers are, whichever device is the current one."""

import ast
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import torchjd_func

pytest.importorskip("triton", reason="Triton is installed with CUDA builds of torch")

from torchjd_func._kernels import surgery

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = sorted((Path(torchjd_func.__file__).parent / "_kernels").glob("[a-z]*.py"))


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_all_launches_go_one_way(path):
    functions = [node for node in ast.parse(path.read_text()).body if hasattr(node, "name")]
    launching = {
        function.name
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    }
    assert launching == ({"start"} if path.stem == "pivoting" else set())


def test_the_device_of_the_numbers_becomes_the_current_one(monkeypatch):
    numbers = []

    def device_of(x):
        numbers.append(x)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    gramians = torch.eye(2, dtype=torch.float64, device=DEVICE).unsqueeze(0)
    surgery.project_kernel(gramians, torch.tensor([[[1], [0]]], device=DEVICE))
    assert len(numbers) == 1 and numbers[0] is gramians
