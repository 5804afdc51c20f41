"""Heads on a trunk: actor and critic, labels that are missing; a front of preferences; logs."""

from typing import Any

import matplotlib as mpl
import pytest
import torch
from torch import nn

mpl.use("Agg")
from matplotlib import pyplot

import torchjd_func as jd
from tests.helpers import assert_trees_close
from torchjd_func import _tree


def linear(n_in, n_out, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = n_in**-0.5
    return {
        "weight": scale * torch.randn(n_out, n_in, generator=generator),
        "bias": torch.zeros(n_out),
    }


def apply_linear(params, x):
    return nn.functional.linear(x, params["weight"], params["bias"])


def descend(params, grads, rate):
    return _tree.map(lambda p, g: p - rate * g, params, grads)


class TestActorCritic:
    """Two heads share a trunk; the policy has an entropy bonus that must not drown in the rest."""

    @staticmethod
    def trunk(params, batch):
        return apply_linear(params, batch["state"]).tanh()

    @staticmethod
    def actor(params, features, batch):
        log_policy = apply_linear(params, features).log_softmax(1)
        chosen = log_policy.gather(1, batch["action"][:, None])[:, 0]
        entropy = -(log_policy.exp() * log_policy).sum(1)
        return {"policy": -(chosen * batch["advantage"]).mean(), "entropy": -0.01 * entropy.mean()}

    @staticmethod
    def critic(params, features, batch):
        value = apply_linear(params, features)[:, 0]
        return (value - batch["reward"]).square().mean()

    def batch(self, params, key):
        """Act in a bandit with contexts: the right action is the sign of the first number."""
        state_key, action_key = jd.random.split(key, 2)
        shared, heads = params
        state = jd.random.normal(state_key, (64, 4))
        features = self.trunk(shared, {"state": state})
        policy = apply_linear(heads["actor"], features).softmax(1)
        action = (jd.random.uniform(action_key, (64,)) > policy[:, 0]).long()
        reward = (action == (state[:, 0] > 0)).float()
        value = apply_linear(heads["critic"], features)[:, 0]
        return {"state": state, "action": action, "reward": reward, "advantage": reward - value}

    def test_it_learns_to_act(self):
        objective = jd.multitask(self.trunk, {"actor": self.actor, "critic": self.critic})
        params = (linear(4, 16), {"actor": linear(16, 2, 1), "critic": linear(16, 1, 2)})
        measures = {"conflict": jd.measures.conflict_fraction}
        rule = jd.monitored(jd.upgrad(), measures)
        step, state, losses, rewards = jd.grad_and_value(objective, rule), None, {}, []
        for key in jd.random.split(jd.random.key(0), 100):
            batch = self.batch(params, key)
            grads, losses, state = step(state, params, batch)
            params = descend(params, grads, 0.5)
            rewards.append(float(batch["reward"].mean()))
        assert set(losses["actor"]) == {"policy", "entropy"}
        assert jd.read_measures(state)["conflict"].shape == ()
        assert sum(rewards[-20:]) / 20 > 0.8 > 0.7 > sum(rewards[:5]) / 5


class TestMissingLabels:
    """Some examples lack a label, some batches lack all labels of a task."""

    def heads(self):
        def head(name):
            def loss(params, features, batch):
                known = batch[name].isfinite()
                label = torch.where(known, batch[name], 0)
                error = torch.where(known, apply_linear(params, features)[:, 0] - label, 0)
                return error.square().sum() / known.sum()  # not a number if none is known

            return loss

        return {name: head(name) for name in ("age", "price")}

    @staticmethod
    def trunk(params, batch):
        return apply_linear(params, batch["x"]).relu()

    def data(self):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
        age, price = x.sum(1), x[:, 0].clone()
        age[::2] = torch.nan
        return {"x": x, "age": age, "price": price}

    params = (linear(3, 4), {"age": linear(4, 1, 1), "price": linear(4, 1, 2)})

    def test_a_batch_without_labels_of_a_task(self):
        objective = jd.multitask(self.trunk, self.heads())
        step = jd.grad_and_value(objective, jd.smoothed(jd.upgrad()))
        batch = self.data()
        _, _, state = step(None, self.params, batch)
        batch["age"] = torch.full((8,), torch.nan)
        (shared, heads), losses, after = step(
            state, self.params, batch, present={"age": False, "price": True}
        )
        assert losses["age"].isnan()
        assert set(heads["age"].values()) == {None}, "optimisers skip it"
        alone = jd.multitask(self.trunk, {"price": self.heads()["price"]})
        want, _ = jd.grad(alone, jd.mean())(
            None, (self.params[0], {"price": self.params[1]["price"]}), batch
        )
        assert_trees_close(heads["price"], want[1]["price"])
        assert _tree.ravel((shared, heads["price"])).isfinite().all()
        assert _tree.ravel(after).isfinite().all()

    def test_which_labels_there_are_may_be_read_from_the_batch(self):
        objective = jd.multitask(self.trunk, self.heads())

        def step(params, state, batch):
            present = {name: batch[name].isfinite().any() for name in ("age", "price")}
            grads, _, state = jd.grad_and_value(objective, jd.mgda())(
                state, params, batch, present=present
            )
            return descend(params, grads, 0.1), state

        params, state = self.params, ()
        for missing in ("price", "age", None):
            batch = self.data()
            if missing:
                batch[missing] = torch.full((8,), torch.nan)
            params, state = step(params, state, batch)
        assert _tree.ravel(params).isfinite().all()
        assert (params[1]["age"]["weight"] != self.params[1]["age"]["weight"]).any()


def test_a_front_of_preferences():
    """Nine models, one for each preference, in one program; the plot names their hypervolume."""
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])

    def objective(point):
        near = (point - targets).square().sum(1)
        return {"first": near[0], "second": near[1]}

    share = torch.linspace(0.1, 0.9, 9)
    preferences = torch.stack([share, 1 - share], 1)

    def step(preference, point):
        grads, losses, _ = jd.grad_and_value(objective, jd.constant(preference))(None, point)
        return point - 0.2 * grads, losses

    points, losses = torch.zeros(9, 2), {}
    for _ in range(30):
        points, losses = jd.ensemble.each(step)(preferences, points)
    axis: Any = jd.plot.front(losses, [2.5, 2.5], label="weighted sums")
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("first", "second")
    text = axis.get_legend_handles_labels()[1][0]
    volume = jd.metrics.hypervolume(
        torch.stack([losses["first"], losses["second"]], 1), torch.tensor([2.5, 2.5])
    )
    assert text == f"weighted sums, hypervolume {float(volume):.3g}"
    # All nine lie on the front: first and second are 2 (1 - share)^2 and 2 share^2.
    assert_trees_close(losses["second"], 2 * share.square(), rtol=1e-2, atol=1e-3)
    assert len(axis.collections[0].get_offsets()) == 9
    pyplot.close("all")


def log(writer, losses, state, step):
    """Write losses and measures, one curve for each number, as TensorBoard has them."""
    for name, loss in losses.items():
        writer.add_scalar(f"loss/{name}", loss, step)
    for measure, value in jd.read_measures(state, names=losses).items():
        curves = value if isinstance(value, dict) else {"all": value}
        for name, number in curves.items():
            writer.add_scalar(f"{measure}/{name}", number, step)


def logged(writer, n_steps=3):
    """Train a little, and log each step."""

    def objective(w):
        return {"speed": (w - 1).square().sum(), "safety": (w + 1).square().sum() / 4}

    measures = {"weight": jd.measures.weights, "cosine": jd.measures.min_cosine}
    rule = jd.monitored(jd.mgda(), measures)
    w, state = torch.tensor([0.5, 2.0]), None
    for i in range(n_steps):
        grads, losses, state = jd.grad_and_value(objective, rule)(state, w)
        w = w - 0.1 * grads
        log(writer, losses, state, i)


CURVES = {"loss/speed", "loss/safety", "weight/speed", "weight/safety", "cosine/all"}


def test_measures_are_curves():
    class Writer:
        def __init__(self):
            self.rows = {}

        def add_scalar(self, name, value, step):
            self.rows.setdefault(name, []).append((step, float(value)))

    writer = Writer()
    logged(writer)
    assert set(writer.rows) == CURVES
    pairs = zip(writer.rows["weight/speed"], writer.rows["weight/safety"], strict=True)
    assert [a[1] + b[1] for a, b in pairs] == pytest.approx([1.0] * 3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of protobuf
def test_measures_are_curves_of_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        logged(writer)
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == CURVES
    assert [event.step for event in events.Scalars("loss/speed")] == [0, 1, 2]
