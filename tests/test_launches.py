"""How many kernels a rule launches on a CUDA device, and that it waits for none; without one."""

import pytest
import torch
from torch import nn

import torchjd_func as jd
from tests.launches import count, counted
from tests.registry import METHODS, exported
from torchjd_func._pack import pack
from torchjd_func.aggregation._cagrad_search import find
from torchjd_func.differentiate._layerwise import gramians
from torchjd_func.differentiate._layerwise._convolutions import conv_weight
from torchjd_func.differentiate._layerwise._forms import cross
from torchjd_func.differentiate._request import Request
from torchjd_func.differentiate._verb import linearize
from torchjd_func.linalg import _interior
from torchjd_func.linalg._eigh import eigh

MOST = 40
# From a Gramian, or from the rows of one leaf, for six objectives.
FEW = {
    "upgrad": 12,
    "upgrad[preference]": 12,
    "mean": 4,
    "sum": 4,
    "constant": 4,
    "trimmed_mean": 2,
}
MORE = {
    # Closed forms: each operation on `(m,)` is a launch, and compiled they are one kernel.
    "cagrad": (68, "two candidates and the mean, measured on the rows"),
    "imtl_g": (66, "two pseudo-inverses, of the rows and of the unit rows, and their rounding"),
    "config": (58, "lengths, and what is rounding"),
    "config_momentum": (123, "moments of each leaf"),
    "pcd": (85, "an average, a quadratic program and a length"),
    "sdmgrad": (68, "eigenvalues, a shift and a min-norm point"),
    "sdmgrad[pgd]": (420, "twenty projections on the simplex"),
    "sdmgrad[reference]": (460, "twenty projections on the simplex"),
    "gradnorm": (70, "rates, targets and weights of each objective"),
    "excess_mtl": (45, "sums of squares, risks and weights"),
    "ferero": (60, "losses, a slack and a quadratic program"),
    "sam_gs": (85, "lengths, similarities and two ways"),
    "log_losses": (90, "a rule on other rows"),
    "moco": (45, "a projection on the simplex"),
    "db_mtl": (45, "averages and lengths of each leaf"),
    "mgda": (45, "normalisations of the rows"),
    "smoothed[every[rlw]]": (50, "three rules in one another"),
    "grouped": (50, "mapped, so that nothing is known to be plain"),
    "every[gradnorm]": (90, "two states"),
    "monitored": (95, "its measures"),
    # Eager these two take there and back to the host; in a graph that is captured:
    "geometric_median": (1600, "twenty steps of Newton"),
}
WAITS = {"epo", "pmgda"}  # for the linear program


def limit(name):
    """Return how many launches a method may take."""
    if name in FEW:
        return FEW[name]
    return MORE.get(name, MORE.get(exported(name), (MOST, "")))[0]


@pytest.mark.parametrize("weights", [True, False], ids=["gramian", "rows"])
@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_held_to_its_count(name, weights):
    method = METHODS[name]
    if weights and method.make(6).weighting is None:
        return
    counter = count(method, 6, weights=weights)
    if exported(name) in WAITS:
        assert counter.waits
        return
    assert not counter.waits
    assert 0 <= counter.launches <= limit(name), counter.names


def test_float32_statistics_cost_two_casts():
    few, more = (
        count(METHODS["upgrad"], 6, weights=True, dtype=dtype).launches
        for dtype in (torch.float64, torch.float32)
    )
    assert more <= few + 2


def test_the_number_of_objectives_does_not_count():
    for name in ("upgrad", "pcgrad", "gradvac", "cagrad", "nash_mtl", "imtl_g"):
        few, many = (count(METHODS[name], m, weights=True).launches for m in (3, 60))
        assert few == many


def test_the_batch_does_not_count_in_the_gramian_of_a_convolution():
    counts = []
    for e in (4, 256):
        with counted() as counter:
            images = torch.empty(e, 32, 16, 16, device="cuda")
            form = conv_weight({"input": images, "padding": 1}, images, (32, 32, 3, 3))
            assert cross(form, form).shape == (e, e)
        counts.append(counter.launches)
    assert counts[0] == counts[1] <= 12


def encoder(depth):
    """Return what is recorded of a transformer with one loss for each example, and its leaves."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    net = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    apply, params, buffers = jd.functionalize(net)
    objective = jd.instancewise(lambda p, x: apply(p, buffers, x)[0].square().mean((1, 2)))
    options = Request()
    linear = linearize(objective, (params, torch.randn(4, 5, 16)), {}, options)
    return linear.jacobian.layers, range(len(params))


def test_layers_of_one_shape_share_their_products():
    found = {}
    for depth in (4, 10):
        layers, leaves = encoder(depth)
        tensors, rebuild = pack(layers)
        with counted() as counter:
            there = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in tensors]
            assert gramians(rebuild(there), [leaves]).shape == (1, 4, 4)
        assert not counter.waits
        products = sum(name in ("mm", "bmm") for name in counter.names)
        found[depth] = products, counter.launches
    assert found[4][0] == found[10][0] <= 12
    # Of each layer of 12 leaves: 8 sums over positions, and 2 normalisations.
    assert found[10][1] - found[4][1] <= 6 * 14


@pytest.mark.parametrize(
    ("most", "call", "name"),
    [
        (64, eigh, "eigh"),
        (128, lambda x: find(x, x[0], x[0], x[0, 0], 1e-11), "cagrad"),
    ],
    ids=["eigh", "cagrad"],
)
def test_only_what_waits_is_left_out_of_cuda_graphs(most, call, name):
    for m, suffix in ((most, ""), (most + 1, "_waits")):
        with counted() as counter:
            call(torch.empty(m, m, device="cuda", dtype=torch.float64))
        assert counter.names[-1] == name + suffix
        operation = getattr(torch.ops.torchjd_func, name + suffix).default
        assert (torch.Tag.cudagraph_unsafe in operation.tags) == bool(suffix)
    assert torch.Tag.cudagraph_unsafe in torch.ops.torchjd_func.lp_vertex.default.tags


def test_problems_too_large_for_a_kernel_do_not_wait():
    counts = []
    for m in (130, 300):
        with counted() as counter:
            matrix = torch.empty(1, m, m, device="cuda", dtype=torch.float64)
            _interior.minimise(matrix, matrix[0], 1e-11)
        assert not counter.waits
        counts.append(counter.launches)
    assert counts[0] == counts[1] <= 50 * _interior.STEPS + 400
