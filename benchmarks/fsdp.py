"""Train a transformer on two rewards, with parameters sharded by FSDP2.

    torchrun --nproc-per-node 2 -m benchmarks.fsdp --steps 20 --folder checkpoint
    torchrun --nproc-per-node 1 -m benchmarks.fsdp --steps 40 --folder checkpoint --resume

Sequences are drawn at random and given two rewards that conflict; the losses are the advantages by
each, times the log-probability that the model gives the sequence. UPGrad weighs them. Batches are
of 15 sequences, which 2 processes share unevenly; the numbers printed do not depend on how many
processes there are, nor on a stop in between, but for rounding.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call

import torchjd_func as jd

VOCABULARY, LENGTH, WIDTH, BATCH = 11, 8, 16, 15
LEARNING_RATE = 1e-2
RULE = jd.smoothed(jd.upgrad())


class Policy(nn.Module):
    """A small causal transformer."""

    def __init__(self) -> None:
        """Make embeddings, two layers and a head."""
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        layers = [
            nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
            for _ in range(2)
        ]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logarithm of the probability of each token but the first."""
        h = self.embedding(tokens[:, :-1]) + self.position[: tokens.shape[1] - 1]
        mask = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).triu(1)
        for layer in self.layers:
            h = layer(h, src_mask=mask)
        scores = self.head(h).log_softmax(-1)
        return scores.gather(2, tokens[:, 1:].unsqueeze(2)).squeeze(2)


def drawn(step: int) -> Tensor:
    """Return the sequences of a step, the same in all processes."""
    key = jd.random.fold_in(jd.random.key(0), step)
    return (jd.random.uniform(key, (BATCH, LENGTH)) * VOCABULARY).long()


def advantages(tokens: Tensor) -> Tensor:
    """Return two rewards of each sequence, less those of a random one, `(b, 2)`."""
    large = tokens.double().mean(1) / (VOCABULARY - 1) - 0.5
    falling = (tokens[:, 1:] <= tokens[:, :-1]).double().mean(1) - (1 + 1 / VOCABULARY) / 2
    return torch.stack([large, falling], 1).float()


def sharded(skeleton: nn.Module) -> Any:
    """Return the objective of whole parameters that are sharded."""

    def losses(params: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
        """Return a loss for each reward."""
        scores = functional_call(skeleton, params, (tokens,)).mean(1)
        first, second = (-(advantages(tokens) * scores.unsqueeze(1)).mean(0)).unbind()
        return {"large": first, "falling": second}

    return jd.distributed.sharded(losses)


def save(folder: str, model: nn.Module, optimizer: Any, state: Any, step: int) -> None:
    """Write all that training needs to go on, in shards."""
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    rule = jd.interop.state_dict(RULE, state)
    saved = {**parts, "rule": rule, "step": torch.tensor(step)}
    state_dict_saver.save(saved, checkpoint_id=folder)


def load(folder: str, model: nn.Module, optimizer: Any, state: Any) -> tuple[Any, int]:
    """Read a checkpoint of any number of processes; return the state of the rule and the step."""
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    read = {**parts, "rule": jd.interop.state_dict(RULE, state), "step": torch.tensor(0)}
    state_dict_loader.load(read, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=read["model"],
        optim_state_dict=read["optimizer"],
    )
    return jd.interop.load_state_dict(RULE, read["rule"]), int(read["step"])


def train(steps: int, folder: str | None, after: int | None, resume: bool) -> None:
    """Train, print losses, and save after some steps, by default all."""
    torch.manual_seed(0)
    model = Policy()
    skeleton = copy.deepcopy(model).to("meta")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    objective, first = sharded(skeleton), 0
    step = jd.grad_and_value(objective, RULE)
    state = jd.init_state(RULE, objective, dict(model.named_parameters()), drawn(0))
    if resume:
        assert folder is not None
        state, first = load(folder, model, optimizer, state)
    for number in range(first, steps):
        part = drawn(number).tensor_split(dist.get_world_size())[dist.get_rank()]
        params = dict(model.named_parameters())
        grads, losses, state = step(state, params, part, size=len(part))
        jd.interop.assign_grads_(model, grads, optimizer=optimizer)
        optimizer.step()
        if dist.get_rank() == 0:
            said = ", ".join(f"{name} {float(loss):.4f}" for name, loss in losses.items())
            print(f"step {number:3d}: {said}", flush=True)
        if folder is not None and number + 1 == (after or steps):
            save(folder, model, optimizer, state, number + 1)


def main() -> None:
    """Read the options, and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", help="of a checkpoint")
    parser.add_argument("--save-after", type=int, help="steps; by default all")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train(options.steps, options.folder, options.save_after, options.resume)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
