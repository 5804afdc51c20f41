"""A language model with LoRA and several rewards: in a loop of one's own, and in a `Trainer`."""

from typing import Any

import pytest
import torch
from torch import nn

import torchjd_func as jd
from tests.helpers import assert_trees_close
from torchjd_func import _tree

transformers = pytest.importorskip("transformers")

SAMPLES = torch.randint(1, 30, (6, 8), generator=torch.Generator().manual_seed(0))
REWARDS = {  # of each sample; three that do not agree
    "helpful": torch.linspace(-1, 1, 6),
    "brief": torch.linspace(1, -1, 6).square(),
    "polite": torch.tensor([1.0, -1, 1, -1, 1, -1]),
}


class LoRA(nn.Module):
    """A linear layer that is frozen, and a small one of low rank beside it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(0.1 * torch.randn(rank, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.down.mT @ self.up.mT


def language_model() -> Any:
    """Return a small model with random weights."""
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=8,
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)


def with_lora() -> Any:
    """Return the model, frozen, with LoRA in its attention."""
    model = language_model().requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in model.model.layers:
            layer.self_attn.q_proj = LoRA(layer.self_attn.q_proj)
            layer.self_attn.v_proj = LoRA(layer.self_attn.v_proj)
    return model


def log_probability(logits, ids):
    """Return the log-probability of each sample under the model."""
    steps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
    return steps.sum((1, 2))


def losses_of(logits, ids, rewards):
    """Return a policy loss for each reward."""
    logp = log_probability(logits, ids)
    return {name: -((reward - reward.mean()) * logp).mean() for name, reward in rewards.items()}


def test_a_loop_trains_the_adapters_alone():
    model = with_lora()
    before = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    apply, params, buffers = jd.functionalize(model)
    assert {name.rpartition(".")[2] for name in params} == {"down", "up"}

    def objective(params, ids, rewards):
        output, _ = apply(params, buffers, ids, use_cache=False)
        return losses_of(output.logits, ids, rewards)

    rule = jd.upgrad({"helpful": 0.5, "brief": 0.25, "polite": 0.25})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    step, state = jd.grad_and_value(objective, rule), None
    history = []
    for _ in range(8):
        grads, losses, state = step(state, params, SAMPLES, REWARDS)
        jd.interop.assign_grads_(model, grads, optimizer=optimizer)
        optimizer.step()
        history.append(_tree.ravel(losses))
    assert (history[-1] < history[0]).all(), "no reward pays for another"
    moved = [name for name, leaf in model.state_dict().items() if not leaf.equal(before[name])]
    assert {name.rpartition(".")[2] for name in moved} == {"down", "up"}


def test_the_loop_of_backward_is_the_same():
    model, twin = with_lora(), with_lora()
    apply, params, buffers = jd.functionalize(twin)

    def objective(params):
        return losses_of(
            apply(params, buffers, SAMPLES, use_cache=False)[0].logits, SAMPLES, REWARDS
        )

    want, _ = jd.grad(objective, jd.mgda())(None, params)
    losses = losses_of(model(SAMPLES, use_cache=False).logits, SAMPLES, REWARDS)
    jd.interop.backward_(losses, model, jd.mgda())
    got = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_trees_close(got, want, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def rewarded_trainer() -> Any:
    """Return a `Trainer` whose steps take a direction for all rewards."""

    class RewardedTrainer(transformers.Trainer):
        rule, rule_state = jd.monitored(jd.upgrad(), {"weights": jd.measures.weights}), None

        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            inputs = self._prepare_inputs(inputs)
            ids = inputs.pop("input_ids")
            with self.compute_loss_context_manager():
                losses = losses_of(model(ids).logits.float(), ids, inputs)
            self.rule_state = jd.interop.backward_(losses, model, self.rule, self.rule_state)
            return torch.stack(list(losses.values())).mean().detach()

    return RewardedTrainer


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the trainer
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("bf16", [False, True])
def test_a_trainer_with_adapters_of_peft(tmp_path, bf16):
    peft = pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(language_model(), config)
    rows = [
        {"input_ids": ids, **{name: reward[i] for name, reward in REWARDS.items()}}
        for i, ids in enumerate(SAMPLES)
    ]
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=3,
        num_train_epochs=3,
        learning_rate=0.02,
        max_grad_norm=1.0,
        bf16=bf16,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    before = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    trainer = rewarded_trainer()(model=model, args=options, train_dataset=rows)
    trainer.train()
    weights = jd.read_measures(trainer.rule_state, names=sorted(REWARDS))["weights"]
    assert set(weights) == set(REWARDS)
    moved = [name for name, leaf in model.state_dict().items() if not leaf.equal(before[name])]
    assert moved
    assert all("lora" in name for name in moved)
