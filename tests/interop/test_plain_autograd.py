"""What `torch.func` cannot see, and `backward_` can, against loops of `torch.autograd.grad`."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import torchjd_func as jd
from tests.helpers import assert_trees_close
from torchjd_func import _tree

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(n_outputs=3) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, n_outputs)).double()


def by_hand(losses, params, rule):
    """Return the direction of a rule on rows of plain autograd, one after the other."""
    params = list(params)
    rows = [
        torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True) for loss in losses
    ]
    full = [
        [
            torch.zeros_like(p) if g is None else g.to_dense()
            for p, g in zip(params, row, strict=True)
        ]
        for row in rows
    ]
    return rule([torch.stack(leaves) for leaves in zip(*full, strict=True)])[0]


def check(make_losses, module, rule=None, rtol=1e-12):
    """Compare `.grad` with that by hand, on two runs of the forward pass."""
    rule = rule or jd.upgrad()
    want = by_hand(make_losses(), module.parameters(), rule)
    jd.interop.backward_(make_losses(), module, rule)
    got = [param.grad for param in module.parameters()]
    assert_trees_close(got, want, rtol=rtol)


def test_activation_checkpointing():
    model, calls = network(), []
    model[0].register_forward_hook(lambda *_: calls.append(1))

    def make_losses():
        hidden = checkpoint(model[:2], X, use_reentrant=False)
        return (model[2](hidden) - 1).square().mean(0).unbind()

    want = by_hand(model_losses(model), model.parameters(), jd.upgrad())
    calls.clear()
    jd.interop.backward_(make_losses(), model, jd.upgrad())
    assert_trees_close([p.grad for p in model.parameters()], want, rtol=1e-12)
    assert len(calls) > 1, "recomputed"


def model_losses(model):
    """Return three losses."""
    return (model(X) - 1).square().mean(0).unbind()


@pytest.mark.parametrize("rule", [jd.upgrad(), jd.mean(), jd.scalarizers.mean()], ids=repr)
def test_reentrant_checkpointing_hides_parameters_and_is_refused(rule):
    model = network()
    hidden = checkpoint(model[:2], X.clone().requires_grad_(), use_reentrant=True)
    losses = (model[2](hidden) - 1).square().mean(0).unbind()
    with pytest.raises(ValueError, match=r"`losses` must not be computed.*use_reentrant=False"):
        jd.interop.backward_(losses, model, rule)


def test_hooks_on_modules_and_tensors_run_once_for_each_pass():
    model, seen = network(), []
    model[1].register_full_backward_hook(lambda module, ins, outs: seen.append("module"))
    model[0].weight.register_hook(lambda grad: seen.append("tensor"))
    model[0].weight.register_post_accumulate_grad_hook(lambda param: seen.append("accumulated"))
    jd.interop.backward_(model_losses(model), model, jd.upgrad())
    assert sorted(seen) == ["module"] * 3 + ["tensor"] * 3


def test_hooks_that_change_gradients_are_respected():
    model = network()
    model[1].register_full_backward_hook(lambda module, ins, outs: (2 * ins[0],))
    check(lambda: model_losses(model), model)


def test_hooks_on_saved_tensors():
    model = network()

    def make_losses():
        with torch.autograd.graph.save_on_cpu():
            return model_losses(model)

    check(make_losses, model)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_around_the_forward_pass(inside):
    model, x = network().float(), X.float()
    rule = jd.upgrad()

    def call(act):
        with torch.autocast("cpu", torch.bfloat16):
            losses = (model(x).float() - 1).square().mean(0).unbind()
            if inside:
                return act(losses)
        return act(losses)

    want = by_hand(call(lambda losses: losses), model.parameters(), rule)
    call(lambda losses: jd.interop.backward_(losses, model, rule))
    assert all(param.grad.dtype == torch.float32 for param in model.parameters())
    assert_trees_close([p.grad for p in model.parameters()], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences(kind):
    torch.manual_seed(0)
    model = kind(4, 3, num_layers=2).double()
    x = torch.randn(5, 2, 4).double()

    def make_losses():
        packed = pack_padded_sequence(x, torch.tensor([5, 3]))
        return (model(packed)[0].data - 1).square().mean(0).unbind()

    check(make_losses, model)


class Cube(torch.autograd.Function):
    """A custom function of the old style, without `setup_context`."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad_outputs[0]


def test_custom_functions_without_setup_context():
    model = network()
    check(lambda: Cube.apply(model(X)).mean(0).unbind(), model)


def test_gradients_inside_of_a_physics_loss():
    model = network(1)

    def make_losses():
        x = X.clone().requires_grad_()
        u = model(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (ddu,) = torch.autograd.grad(du[:, 0].sum(), x, create_graph=True)
        residual = (ddu[:, 0] + du[:, 1] - u[:, 0]).square().mean()
        return {"residual": residual, "boundary": (u[:2] - 1).square().mean()}

    want = by_hand(
        [make_losses()[k] for k in ("boundary", "residual")], model.parameters(), jd.upgrad()
    )
    jd.interop.backward_(make_losses(), model, jd.upgrad())
    assert_trees_close([p.grad for p in model.parameters()], want, rtol=1e-12)


def test_sparse_gradients_are_made_dense():
    torch.manual_seed(0)
    table: Any = nn.Embedding(7, 3, sparse=True).double()
    batch = torch.tensor([1, 2, 2, 5])
    for rule in (jd.upgrad(), jd.mean()):
        table.zero_grad()
        check(lambda: (table(batch) - 1).square().mean(0).unbind(), table, rule)
        assert not table.weight.grad.is_sparse


@pytest.mark.parametrize("present", [None, torch.tensor([False, False])], ids=["all", "none"])
def test_a_sparse_gradient_is_added_to(present):
    table: Any = nn.Embedding(7, 3, sparse=True).double()
    table(torch.tensor([1, 1])).sum().backward()
    assert table.weight.grad.is_sparse
    before = table.weight.grad.to_dense()

    def losses():
        return (table(torch.tensor([1, 2])) - 1).square().sum(1)

    (added,) = by_hand(losses(), table.parameters(), jd.upgrad())
    jd.interop.backward_(losses(), table, jd.upgrad(), present=present)
    want = before + (added if present is None else 0)
    torch.testing.assert_close(table.weight.grad, want)


def test_buffers_move_once_as_in_any_forward_pass():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    jd.interop.backward_(model_losses(model), model, jd.upgrad())
    assert model[1].num_batches_tracked == 1


def test_dropout_draws_once():
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 3)).double()
    torch.manual_seed(0)
    losses = model_losses(model)
    want = by_hand(losses, model.parameters(), jd.upgrad())
    jd.interop.backward_(losses, model, jd.upgrad())
    assert_trees_close([p.grad for p in model.parameters()], want, rtol=1e-12)


def scaled_training(rule, overflow, n_steps=4):
    """Return the parameters of a float16 loop with a scaler, the state, and which steps counted."""
    model = network().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    state, scales, states = None, [], []
    for i in range(n_steps):
        with torch.autocast("cpu", torch.float16):
            losses = (model(X.float()).float() - 1).square().mean(0)
        losses = losses * torch.tensor([torch.inf if i == overflow else 1.0, 1.0, 1.0])
        state = jd.interop.backward_(losses, model, rule, state, scaler=scaler)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        states.append(state)
    return [param.detach() for param in model.parameters()], states, scales


SCALED = {
    "upgrad": jd.upgrad,
    "momentum": jd.moco,
    "not homogeneous": jd.pcd,
    "losses": jd.gradnorm,
    "one pass": jd.mean,
    "scalarizer": lambda: jd.scalarizers.group_dro(0.3),
}


@pytest.mark.filterwarnings("ignore:An input tensor was not cuda")
@pytest.mark.parametrize("make", SCALED.values(), ids=SCALED)
def test_a_scaler_skips_steps_that_overflow_and_keeps_the_state(make):
    params, states, scales = scaled_training(make(), overflow=2)
    assert scales == [2.0**8, 2.0**9, 2.0**8, 2.0**8]
    assert_trees_close(states[2], states[1], rtol=0, atol=0)
    assert all(leaf.isfinite().all() for leaf in [*params, *_tree.leaves(states[3])])
    two, three = [scaled_training(make(), overflow=9, n_steps=n) for n in (2, 3)]
    assert_trees_close(params, three[0], rtol=2e-3, atol=2e-3)
    assert not torch.allclose(params[0], two[0][0], atol=1e-4)
    assert_trees_close(states[3], three[1][2], rtol=5e-3, atol=5e-3)


def test_the_rule_sees_unscaled_gradients():
    model, rule = network(), jd.pcd()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses = model_losses(model)
    want = jd.interop.backward_(losses, model, rule, retain_graph=True)
    grads = [param.grad.clone() for param in model.parameters()]
    model.zero_grad()
    state = jd.interop.backward_(losses, model, rule, scaler=scaler)
    assert_trees_close(state, want)
    scaler.unscale_(torch.optim.SGD(model.parameters()))
    assert_trees_close([param.grad for param in model.parameters()], grads)


def test_losses_scaled_by_hand_suit_homogeneous_rules():
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    want = by_hand(model_losses(model), model.parameters(), jd.upgrad())
    jd.interop.backward_(scaler.scale(model_losses(model)), model, jd.upgrad())
    scaler.unscale_(torch.optim.SGD(model.parameters()))
    assert_trees_close([param.grad for param in model.parameters()], want)


@pytest.fixture
def group():
    """Be the one process of a group."""
    dist: Any = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_module_that_torch_wraps_is_refused_with_the_remedy(group):
    from torch.nn.parallel import DistributedDataParallel

    inner = network()
    model = DistributedDataParallel(copy.deepcopy(inner))
    with pytest.raises(ValueError, match=r"DistributedDataParallel.*model\.module"):
        jd.interop.backward_(model_losses(model), model, jd.upgrad())
    rule = jd.distributed.data_parallel(jd.upgrad())
    jd.interop.backward_(model_losses(model.module), model.module, rule)
    want = by_hand(model_losses(inner), inner.parameters(), jd.upgrad())
    assert_trees_close([param.grad for param in model.parameters()], want, rtol=1e-12)


def test_sharded_parameters_are_refused_with_the_remedy(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(network(), mesh=init_device_mesh("cpu", (1,)))
    loss = torch.ones((), requires_grad=True)
    for target in (model, list(model.parameters())):
        with pytest.raises(ValueError, match=r"`target`.* Use jd\.distributed\.sharded"):
            jd.interop.backward_(loss, target, jd.upgrad())


def test_a_model_that_was_compiled_by_itself():
    from torch._functorch import config

    model = network()
    fast: Any = torch.compile(model, backend="aot_eager")
    with config.patch(donated_buffer=False):
        jd.interop.backward_(model_losses(fast), fast, jd.upgrad())
    want = by_hand(model_losses(model), model.parameters(), jd.upgrad())
    assert_trees_close([param.grad for param in model.parameters()], want, rtol=1e-10)
