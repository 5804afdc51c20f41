"""A whole training script: two heads, BatchNorm, dropout, Adam, a schedule, clipping, autocast,
four microbatches for each step, and a checkpoint in the middle of an epoch that is resumed bit by
bit. Once as a function, once as a loop of plain autograd.
"""

import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torchjd_func as jd

N_BATCHES = 3  # in an epoch
DATA = torch.Generator().manual_seed(0)
IMAGES = torch.randn(N_BATCHES * 16, 1, 8, 8, generator=DATA)
KINDS = torch.randint(5, (len(IMAGES),), generator=DATA)
DEPTHS = IMAGES.mean((1, 2, 3)) + 0.1 * torch.randn(len(IMAGES), generator=DATA)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten()
        )
        self.kind, self.depth = nn.Linear(288, 5), nn.Linear(288, 1)

    def forward(self, x):
        features = self.trunk(x)
        return self.kind(features), self.depth(features).squeeze(1)


def losses_of(outputs, kinds, depths):
    kind, depth = outputs
    return {
        "kind": F.cross_entropy(kind.float(), kinds),
        "depth": F.mse_loss(depth.float(), depths),
    }


def batches(epoch):
    """Return the batches of an epoch, in an order of its own."""
    order = torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(epoch))
    return [(IMAGES[part], KINDS[part], DEPTHS[part]) for part in order.chunk(N_BATCHES)]


def by_function(model, rule):
    """Return a step: the direction of the whole batch, taken in four microbatches."""
    apply, params, buffers = jd.functionalize(model)  # they share memory with the model

    def objective(params, buffers, x, kinds, depths):
        with torch.autocast("cpu", torch.bfloat16):
            outputs, buffers = apply(params, buffers, x)
        return losses_of(outputs, kinds, depths), buffers

    parts = jd.accumulate(objective, 4, has_aux=True, carry_aux=1)
    grad = jd.grad_and_value(parts, rule, has_aux=True)

    def step(state, *batch):
        grads, (_, statistics), state = grad(state, params, buffers, *batch)
        jd.interop.assign_grads_(model, grads)
        model.load_state_dict(statistics, strict=False)
        return state

    return step


def by_loop(model, rule):
    """Return a step: the sum of the directions of four microbatches."""

    def step(state, *batch):
        for x, kinds, depths in zip(*(part.chunk(4) for part in batch), strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                outputs = model(x)
            losses = losses_of(outputs, kinds, depths)
            losses = {name: loss / 4 for name, loss in losses.items()}
            state = jd.interop.backward_(losses, model, rule, state)
        return state

    return step


def train(make_step, n_steps, checkpoint=None):
    """Train from a checkpoint, or from the beginning, to a number of steps; return the next."""
    torch.manual_seed(0)
    model = Net()
    rule = jd.smoothed(jd.upgrad())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3 * N_BATCHES)
    step, state, done = make_step(model, rule), None, 0
    if checkpoint is not None:
        saved = torch.load(io.BytesIO(checkpoint))
        for part, name in ((model, "model"), (optimizer, "optimizer"), (schedule, "schedule")):
            part.load_state_dict(saved[name])
        state, done = jd.interop.load_state_dict(rule, saved["rule"]), saved["step"]
        torch.set_rng_state(saved["random"])
    while done < n_steps:
        epoch, i = divmod(done, N_BATCHES)
        state = step(state, *batches(epoch)[i])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        done += 1
    saved = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "rule": jd.interop.state_dict(rule, state),
        "random": torch.get_rng_state(),
        "step": done,
    }
    file = io.BytesIO()
    torch.save(saved, file)
    return file.getvalue()


@pytest.mark.parametrize("make_step", [by_function, by_loop])
def test_it_learns_and_resumes_bit_by_bit(make_step):
    with torch.random.fork_rng():
        whole = torch.load(io.BytesIO(train(make_step, 7)))
        middle = train(make_step, 4)  # the second epoch has just begun
        resumed = torch.load(io.BytesIO(train(make_step, 7, middle)))
    for part in ("model", "rule"):
        assert whole[part].keys() == resumed[part].keys()
        assert all(torch.equal(x, resumed[part][name]) for name, x in whole[part].items())
    assert whole["schedule"] == resumed["schedule"]
    model = Net().eval()
    model.load_state_dict(whole["model"])
    assert model.trunk[1].num_batches_tracked == 7 * 4, "statistics of each microbatch count"
    with torch.no_grad():
        start = losses_of(Net()(IMAGES), KINDS, DEPTHS)
        end = losses_of(model(IMAGES), KINDS, DEPTHS)
    assert all(end[name] < start[name] for name in end)
