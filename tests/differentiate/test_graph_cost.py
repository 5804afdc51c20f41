"""A compiled step costs what an eager one does: one backward pass through each layer."""

from collections import Counter

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import torchjd_func as jd
from benchmarks._networks import CLASSES, WORDS, Transformer
from benchmarks._public_models import build
from torchjd_func.differentiate._layerwise import Settled

ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def counted(step, args):
    """Return how often the graph of a step calls each operation, and its result."""
    calls = Counter()

    def backend(graph, inputs):
        def lowered(graph, inputs):
            names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            calls.update(name.split(".")[-2] if "." in name else name for name in names)
            return graph.forward

        from torch._dynamo.backends.common import aot_autograd

        return aot_autograd(fw_compiler=lowered)(graph, inputs)

    torch._dynamo.reset()
    return torch.compile(step, fullgraph=True, backend=backend)(*args), calls


@pytest.mark.parametrize("first", ["init_state", "eager call"])
def test_attention_is_differentiated_once_a_layer(first):
    torch.manual_seed(0)
    net = Transformer(16, 5, layers=2)
    params = {name: value.detach() for name, value in net.named_parameters()}
    x, y = torch.randint(0, WORDS, (3, 5)), torch.randint(0, CLASSES, (3,))
    scale = torch.rand(())  # closed over

    def losses(params, x, y):
        scores = torch.func.functional_call(net, params, (x,)) * scale
        return F.cross_entropy(scores, y, reduction="none")

    objective = jd.instancewise(losses)
    gramian = jd.gramian(objective)
    if first == "init_state":
        jd.init_state(jd.upgrad(), objective, params, x, y)
    else:
        gramian(params, x, y)
    found, calls = counted(gramian, (params, x, y))
    torch.testing.assert_close(found, gramian(params, x, y), rtol=1e-4, atol=1e-6)
    assert calls[ATTENTION] == 2
    assert calls[f"{ATTENTION}_backward"] == 2


def test_attention_of_a_public_model_is_differentiated_once_a_layer():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    losses, params, batch = build("GPT2LMHeadModel", transformers)
    objective = jd.instancewise(losses)
    gramian = jd.gramian(objective)
    jd.init_state(jd.upgrad(), objective, params, *batch)
    found, calls = counted(gramian, (params, *batch))
    torch.testing.assert_close(found, gramian(params, *batch), rtol=1e-9, atol=1e-12)
    assert calls[ATTENTION] == 2
    assert calls[f"{ATTENTION}_backward"] == 2


def test_a_graph_is_of_the_plan_that_it_was_compiled_for():
    params, x = {"w": torch.rand(3, 3)}, torch.rand(4, 3)
    objective = jd.instancewise(lambda params, x: (x @ params["w"]).tanh().sum(1))
    jd.gramian(objective)(params, x)
    (known,) = objective.plans.values()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(jd.gramian(objective), backend=counter, fullgraph=True)
    compiled(params, x)
    compiled(params, x)
    assert counter.frame_count == 1
    known[0] = known[0]._replace(settled=Settled(known[0]))
    compiled(params, x)
    assert counter.frame_count == 2


def test_graphs_of_several_objectives_in_one_process():
    """Numbers of plans that differ from graph to graph are constants of each."""
    params, x = {name: torch.rand(3, 3) for name in "abc"}, torch.rand(4, 3)
    torch._dynamo.reset()
    for order in ("abc", "cab", "ccb", "ba"):

        def fn(params, x, order=order):
            for name in order:
                x = (x @ params[name]).tanh() + params["c"][0]
            return x.sum(1)

        gramian = jd.gramian(jd.instancewise(fn))
        expected = gramian(params, x)
        compiled = torch.compile(gramian, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(params, x), expected)


@pytest.mark.parametrize("attribute", ["T", "mT", "H"])
def test_a_graph_says_which_attributes_a_compiler_hides(attribute):
    w, x = torch.rand(3, 3).double(), torch.rand(4, 3).double()
    gramian = jd.gramian(
        jd.instancewise(lambda params, x: (x @ getattr(params[0], attribute)).sum(1))
    )
    expected = gramian([w], x)
    torch._dynamo.reset()
    compiled = torch.compile(gramian, fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match=r"such as `\.T` \(write `\.t\(\)`\)"):
        torch.testing.assert_close(compiled([w], x), expected)
