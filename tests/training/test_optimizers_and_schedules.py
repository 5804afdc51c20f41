"""Optimisers and schedules of torch.optim, and functional ones of torchopt."""

from typing import Any

import pytest
import torch
from torch import nn

import torchjd_func as jd
from tests.helpers import assert_trees_close

GENERATOR = torch.Generator().manual_seed(0)
X, Y = (torch.randn(12, n, dtype=torch.float64, generator=GENERATOR) for n in (4, 2))
N_STEPS = 6


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def objective_of(model):
    """Return two losses as a function of parameters, and these."""
    apply, params, buffers = jd.functionalize(model)
    return lambda params: (apply(params, buffers, X)[0] - Y).square().mean(0), params


SCHEDULES: dict[str, Any] = {
    "cosine": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, N_STEPS),
    "one cycle": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, N_STEPS),
    "warm-up": lambda opt: torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=3),
    "on a plateau": lambda opt: torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0),
}


def train(model, make_schedule, by_loop):
    """Train by `.grad`, and a schedule that may look at the losses."""
    objective, params = objective_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, amsgrad=True)
    schedule, state, rates = make_schedule(optimizer), None, []
    step = jd.grad_and_value(objective, jd.upgrad())
    for _ in range(N_STEPS):
        if by_loop:
            losses = (model(X) - Y).square().mean(0)
            optimizer.zero_grad()
            state = jd.interop.backward_(losses, model, jd.upgrad(), state)
        else:
            grads, losses, state = step(state, params)
            jd.interop.assign_grads_(model, grads, optimizer=optimizer)
        optimizer.step()
        watched = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
        schedule.step(*([losses.mean().item()] if watched else []))
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("make_schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules_of_torch_optim(make_schedule):
    model, twin = network(), network()
    first = objective_of(network())[0](dict(network().named_parameters()))
    rates = train(model, make_schedule, False)
    assert rates == train(twin, make_schedule, True)
    assert_trees_close(model.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-12)
    last = objective_of(model)[0](dict(model.named_parameters()))
    assert (last < first).all()


def test_a_second_parameter_group_and_weight_decay():
    """A rule sees all gradients at once, an optimiser steps its groups at different rates."""
    model = network()
    objective, params = objective_of(model)
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.01)
    before = {name: leaf.clone() for name, leaf in params.items()}
    grads, _ = jd.grad(objective, jd.mgda())(None, params)
    jd.interop.assign_grads_(model, grads, optimizer=optimizer)
    optimizer.step()
    assert_trees_close(params["0.weight"], before["0.weight"], rtol=0, atol=0)
    moved = before["2.weight"] - 0.1 * (grads["2.weight"] + 0.01 * before["2.weight"])
    assert_trees_close(params["2.weight"], moved, rtol=1e-12)


def test_functional_optimisers_of_torchopt():
    torchopt = pytest.importorskip("torchopt")
    model = network()
    objective, params = objective_of(model)
    params = {name: leaf.clone() for name, leaf in params.items()}
    rate = torchopt.schedule.polynomial_schedule(0.05, 0.01, 1.0, N_STEPS)
    optimizer = torchopt.chain(torchopt.clip.clip_grad_norm(1.0), torchopt.adam(rate))
    optimizer_state, state = optimizer.init(params), None
    other = torch.optim.Adam(model.parameters(), lr=1.0)
    step = jd.grad(objective, jd.upgrad())
    for i in range(N_STEPS):
        grads, _ = step(None, dict(objective_of(model)[1]))
        jd.interop.assign_grads_(model, grads)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        other.param_groups[0]["lr"] = 0.05 + (0.01 - 0.05) * i / N_STEPS
        other.step()
        grads, state = step(state, params)
        updates, optimizer_state = optimizer.update(
            grads, optimizer_state, params=params, inplace=False
        )
        params = torchopt.apply_updates(params, updates, inplace=False)
    assert_trees_close(params, dict(model.named_parameters()), rtol=1e-3, atol=1e-5)
