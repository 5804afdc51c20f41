"""Parameters and buffers that have no numbers are refused: torch multiplies by what is there."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.func import functional_call

import torchjd_func as jd
from tests import workers


class Net(torch.nn.Module):
    """A net whose first and last weight may be one, and that may multiply by a buffer."""

    def __init__(self, tied, turned):
        super().__init__()
        self.first, self.last = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)
        self.turned = turned
        if tied:
            self.last.weight = self.first.weight
        self.register_buffer("turn", torch.eye(3), persistent=False)

    def forward(self, x):
        x = x @ self.turn if self.turned else x
        return self.last(self.first(x).tanh())


def problem(tied, turned, whole):
    """Return losses of a copy without numbers, and parameters."""
    torch.manual_seed(0)
    net = Net(tied, turned)
    skeleton = copy.deepcopy(net).to("meta")
    buffers = dict(net.named_buffers()) if whole else {}
    params = {name: p.detach() for name, p in net.named_parameters()}
    if whole and tied:
        skeleton.last.weight = skeleton.first.weight

    def each(params, x):
        return functional_call(skeleton, (params, buffers), (x,)).square().sum(1)

    return each, params


WAYS = ("means", "each", "rows")


def step(way, tied, turned, whole):
    """Differentiate by sharded parameters."""
    each, params = problem(tied, turned, whole)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = {name: distribute_tensor(p, mesh, [Shard(0)]) for name, p in params.items()}
    x = torch.ones(2, 3)
    if way == "rows":
        return jd.jac(jd.distributed.sharded(lambda p, x: each(p, x).mean()))(params, x)
    fn = jd.instancewise(each) if way == "each" else lambda p, x: [each(p, x).mean()] * 2
    return jd.grad(jd.distributed.sharded(fn), jd.upgrad())(None, params, x)


@pytest.mark.parametrize(("tied", "turned"), [(True, False), (False, True)])
@pytest.mark.parametrize("way", WAYS)
def test_sharded_objectives_refuse_what_has_no_numbers(way, tied, turned):
    workers.run(2, step, way, tied, turned, True)
    for failure in workers.outcomes(2, step, way, tied, turned, False):
        assert failure.kind == "ValueError"
        assert "use no parameter or buffer on the device 'meta'" in failure.message
        assert "tie_weights()" in failure.message


@pytest.mark.parametrize(("tied", "turned"), [(True, False), (False, True)])
def test_init_state_refuses_what_has_no_numbers(tied, turned):
    each, params = problem(tied, turned, True)
    jd.init_state(jd.upgrad(), each, params, torch.ones(2, 3))
    each, params = problem(tied, turned, False)
    with pytest.raises(ValueError, match="tie_weights"):
        jd.init_state(jd.upgrad(), each, params, torch.ones(2, 3))
