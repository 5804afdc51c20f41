"""Recurrent layers are right, and have factors: they are spelled out step by step."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchjd_func as jd
from tests.programs import by_loops
from torchjd_func.differentiate._layerwise import _recurrent

D, H, B, T = 4, 3, 5, 6
KINDS: dict[str, nn.Module] = {
    "lstm": nn.LSTM(D, H, batch_first=True),
    "lstm, time first": nn.LSTM(D, H),
    "lstm, two layers both ways": nn.LSTM(D, H, 2, bidirectional=True, batch_first=True),
    "lstm, projected": nn.LSTM(D, H, 2, proj_size=2, bidirectional=True),
    "lstm without biases, projected": nn.LSTM(D, H, bias=False, proj_size=2, batch_first=True),
    "gru": nn.GRU(D, H, batch_first=True),
    "gru, two layers both ways": nn.GRU(D, H, 2, bidirectional=True),
    "gru without biases": nn.GRU(D, H, bias=False),
    "tanh": nn.RNN(D, H, 2),
    "relu, both ways": nn.RNN(D, H, nonlinearity="relu", bidirectional=True, batch_first=True),
    "dropout": nn.LSTM(D, H, 3, dropout=0.4, batch_first=True),
    "dropout, not training": nn.GRU(D, H, 2, dropout=0.4).eval(),
}
CELLS: dict[str, Any] = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "tanh": nn.RNNCell}


def end(states: Any) -> Tensor:
    """Return something of all states at the end, `(layers, b)`."""
    parts = states if isinstance(states, tuple) else (states,)
    return sum(part.sin().sum(-1) for part in parts)  # type: ignore[return-value]


class Tagger(nn.Module):
    """A recurrent layer, and its states at the end."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return a number for each example."""
        first = self.layer.batch_first
        outputs, states = self.layer(x if first else x.transpose(0, 1))
        return outputs.cos().sum((1 if first else 0, 2)) + end(states).sum(0)


class Steps(nn.Module):
    """A cell in a loop."""

    def __init__(self, kind: Any, bias: bool = True) -> None:
        super().__init__()
        self.cell = kind(D, H, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return a number for each example."""
        states = None
        for part in x.unbind(1):
            states = self.cell(part, states)
        return end(states)


def check(net: nn.Module, x: Tensor) -> None:
    """Hold Gramians and pullbacks against loops, for several batches."""
    apply, params, buffers = jd.functionalize(net.double())
    names = list(params)

    def fn(values: list[Tensor], x: Tensor) -> Tensor:
        return apply(dict(zip(names, values, strict=True)), buffers, x)[0]

    values, objective = list(params.values()), jd.instancewise(fn)
    for batch in (x, x[:2], 3 * x):
        torch.manual_seed(0)
        rows = by_loops(fn, values, batch)
        torch.manual_seed(0)
        _, gramian, vjp_fn = jd.gramian_vjp(objective, values, batch)
        torch.testing.assert_close(gramian, rows @ rows.T, rtol=1e-9, atol=1e-11)
        weights = torch.linspace(-1, 2, len(rows), dtype=rows.dtype)
        flat = torch.cat([grad.flatten() for grad in vjp_fn(weights)])
        torch.testing.assert_close(flat, weights @ rows, rtol=1e-9, atol=1e-11)
    report = jd.explain_gramian(objective, values, x)
    assert [line.path for line in report.leaves if line.contraction == "m backward passes"] == []


def features(*shape: int) -> Tensor:
    """Return inputs."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", KINDS)
def test_layers(name):
    check(Tagger(KINDS[name]), features(B, T, D))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_cells(name, bias):
    check(Steps(CELLS[name], bias), features(B, T, D))


@pytest.mark.parametrize("name", CELLS)
def test_cells_in_graphs(name):
    apply, params, buffers = jd.functionalize(Steps(CELLS[name]).double())
    gramian = jd.gramian(jd.instancewise(lambda params, x: apply(params, buffers, x)[0]))
    x = features(B, 3, D)
    expected = gramian(params, x)
    torch._dynamo.reset()
    compiled = torch.compile(gramian, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(params, x), expected, rtol=1e-9, atol=1e-11)


def test_states_that_come_with_the_examples():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.start = nn.LSTM(D, H, batch_first=True), nn.Linear(D, H)

        def forward(self, x: Tensor) -> Tensor:
            start = self.start(x[:, 0])[None]
            outputs, states = self.layer(x, (start, 2 * start))
            return outputs.sum((1, 2)) + end(states)[0]

    check(Decoder(), features(B, T, D))


def test_a_frozen_layer_stays_as_it_is(monkeypatch):
    layer, w = nn.LSTM(D, H, batch_first=True).double(), features(D, D)
    monkeypatch.setattr(torch, "unbind", None)

    def fn(params: list[Tensor], x: Tensor) -> Tensor:
        given = {name: value.detach() for name, value in layer.named_parameters()}
        return torch.func.functional_call(layer, given, (x @ params[0],))[0].sum((1, 2))

    x = features(B, T, D)
    rows = by_loops(fn, [w], x)
    gramian = jd.gramian(jd.instancewise(fn))([w], x)
    torch.testing.assert_close(gramian, rows @ rows.T, rtol=1e-9, atol=1e-11)


def test_a_state_to_start_from_that_is_trained():
    layer, start = nn.GRU(D, H, batch_first=True).double(), features(1, 1, H)
    names = [name for name, _ in layer.named_parameters()]

    def fn(params: list[Tensor], x: Tensor) -> Tensor:
        given = dict(zip(names, params[1:], strict=True))
        args = x, params[0].expand(-1, len(x), -1).contiguous()
        return torch.func.functional_call(layer, given, args)[0].sin().sum((1, 2))

    params = [start, *(value.detach() for value in layer.parameters())]
    x = features(B, T, D)
    rows = by_loops(fn, params, x)
    gramian = jd.gramian(jd.instancewise(fn))(params, x)
    torch.testing.assert_close(gramian, rows @ rows.T, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["lstm", "gru", "tanh"])
def test_one_sequence_at_a_time(name):
    layer = KINDS[name].double()
    params = {name: value.detach() for name, value in layer.named_parameters()}
    x, names = features(B, T, D), list(params)

    def loss(values: list[Tensor], x: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        outputs, states = torch.func.functional_call(layer, given, (x,))
        return outputs.cos().sum() + end(states).sum()

    values = list(params.values())
    rows = by_loops(lambda p, x: torch.stack([loss(p, one) for one in x]), values, x)
    gramian = jd.gramian(jd.per_example(loss, in_dims=(None, 0)))(values, x)
    torch.testing.assert_close(gramian, rows @ rows.T, rtol=1e-9, atol=1e-11)


def test_derivatives_of_gramians():
    apply, params, buffers = jd.functionalize(Tagger(nn.GRU(D, H, batch_first=True)).double())
    x = features(3, 4, D)

    def length(route: str, params: Any) -> Tensor:
        objective = jd.instancewise(lambda params, x: apply(params, buffers, x)[0])
        return jd.gramian(objective, route=route)(params, x).sum()

    first, second = (
        torch.func.grad(lambda p, route=route: length(route, p))(params)
        for route in ("layerwise", "jacobian")
    )
    for name in params:
        torch.testing.assert_close(first[name], second[name], rtol=1e-8, atol=1e-10)


@contextmanager
def gpu() -> Generator[list[str]]:
    """Let recurrent modules believe that they run on cuDNN, and note what is spelled out."""
    spelled: list[str] = []

    def spy(apply: Any, name: str, args: Any) -> Any:
        spelled.append(name)
        return recurrent(apply, name, args)

    recurrent = _recurrent.recurrent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_recurrent, "recurrent", spy)
        patch.setattr(Tensor, "is_cuda", True)
        patch.setattr(torch.backends.cudnn, "is_acceptable", lambda x: True)
        patch.setattr(torch, "_use_cudnn_rnn_flatten_weight", lambda: True)
        patch.setattr(torch.backends.cudnn.rnn, "get_cudnn_mode", lambda mode: 0)
        yield spelled
    assert spelled


def on_numbers(net: nn.Module) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return a module as a function of a list of parameters, and these."""
    names = [name for name, _ in net.named_parameters()]

    def fn(values: list[Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x,))

    return fn, [value.detach() for value in net.parameters()]


@pytest.mark.parametrize("route", ["layerwise", "jacobian"])
@pytest.mark.parametrize("name", ["lstm, projected", "gru", "tanh"])
def test_on_a_gpu_gradients_of_cudnn_are_not_mapped(name, route):
    fn, values = on_numbers(Tagger(KINDS[name]).double())
    x = features(B, T, D)
    rows = by_loops(fn, values, x)
    objective = jd.instancewise(fn)
    with gpu():
        gramian = jd.gramian(objective, route=route)(values, x)
        report = jd.explain_gramian(objective, values, x)
    torch.testing.assert_close(gramian, rows @ rows.T, rtol=1e-9, atol=1e-11)
    assert not [line for line in report.leaves if line.contraction == "m backward passes"]
    with gpu():
        jac = jd.jac(fn)(values, x)
    torch.testing.assert_close(torch.cat([each.flatten(1) for each in jac], 1), rows)


@pytest.mark.parametrize("route", ["layerwise", "jacobian"])
def test_a_frozen_layer_on_a_gpu(route):
    layer, w = nn.LSTM(D, H, batch_first=True).double().requires_grad_(False), features(D, D)

    def fn(params: list[Tensor], x: Tensor) -> Tensor:
        return layer(x @ params[0])[0].sin().sum((1, 2))

    x = features(B, T, D)
    rows = by_loops(fn, [w], x)
    with gpu():
        gramian = jd.gramian(jd.instancewise(fn), route=route)([w], x)
    torch.testing.assert_close(gramian, rows @ rows.T, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("route", ["layerwise", "jacobian"])
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_autocast_on_a_gpu_casts_states_and_weights(name, route):
    fn, values = on_numbers(Tagger(KINDS[name]).float())
    x = features(B, T, D).float()
    rows = by_loops(fn, values, x)
    with gpu(), torch.autocast("cpu", dtype=torch.bfloat16):
        gramian = jd.gramian(jd.instancewise(fn), route=route)(values, x)
    error = torch.linalg.norm(gramian - rows @ rows.T) / torch.linalg.norm(rows @ rows.T)
    assert 1e-5 < error < 0.03


def test_addresses_of_what_is_followed_are_compared_and_not_read():
    def fn(w: Tensor, x: Tensor) -> Tensor:
        assert w.data_ptr() == w.view(-1).data_ptr() != x.data_ptr()
        with pytest.raises(TypeError):
            int(w.data_ptr())
        return x @ w

    jd.jac(fn)(torch.ones(3), torch.ones(2, 3))
