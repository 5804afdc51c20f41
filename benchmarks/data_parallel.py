"""Train two tasks on several processes, each with a part of every batch.

    torchrun --nproc-per-node 2 -m benchmarks.data_parallel [--steps N] [--seed S] [--eager]

Two handwritten digits overlaid in one image, as in `benchmarks.digits`; the parameters stay the
same on all processes, bit by bit. Prints losses and bytes from the first.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist

import torchjd_func as jd
from benchmarks._traffic import traffic
from benchmarks.digits import BATCH, LEARNING_RATE, Batch, descend, pick, two_digits

EVERY = 50  # steps between two lines


def part(batch: Batch) -> Batch:
    """Return the part of a batch that this process has."""
    world, rank = dist.get_world_size(), dist.get_rank()
    images, labels = (tensor.chunk(world)[rank] for tensor in batch)
    return images, labels


def say(text: str) -> None:
    """Print from one process."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def report(step: int, losses: dict[str, torch.Tensor]) -> None:
    """Print the mean losses over processes."""
    means = jd.distributed.mean(losses)
    tasks = ", ".join(f"{name} {float(loss):.3f}" for name, loss in means.items())
    say(f"step {step:4d}: {tasks}")


def train(steps: int, seed: int, eager: bool) -> Any:
    """Train, and return the parameters."""
    problem = two_digits(seed)
    rule = jd.distributed.data_parallel(jd.upgrad())
    keys = jd.random.split(jd.random.key(seed), steps)
    batches = [part(pick(problem.train, key)) for key in keys]
    params = problem.params
    state = jd.init_state(rule, problem.objective, params, batches[0])
    step = jd.grad_and_value(problem.objective, rule)
    with traffic() as transfers:
        step(state, params, batches[0])
    shared = sum(leaf.numel() for leaf in params[0].values())
    sent = ", ".join(f"{name} {size}" for name, size in transfers)
    say(f"{dist.get_world_size()} processes, batches of {BATCH}, {shared} shared parameters")
    say(f"bytes of a step: {sum(size for _, size in transfers)} ({sent})")
    run = step if eager else torch.compile(step, fullgraph=True)
    for number, batch in enumerate(batches):
        grads, losses, state = run(state, params, batch)
        params = descend(params, grads, LEARNING_RATE)
        if number % EVERY == 0 or number == steps - 1:
            report(number, losses)
    return params


def main() -> None:
    """Read the options, and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train(options.steps, options.seed, options.eager)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
