"""Train on handwritten digits with several losses, in one pure, compiled step.

    python -m benchmarks.digits [--steps N] [--methods mean upgrad ...] [--seed S] [--eager]

Two problems on scikit-learn's bundled digits: (a) two digits overlaid in one image, one task each,
a shared trunk and two heads; (b) one digit in an image, one loss for each example of the batch.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optree
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import torchjd_func as jd
from benchmarks import _picture

METHODS = {
    "mean": jd.mean,
    "sum": jd.sum,
    "upgrad": jd.upgrad,
    "dualproj": jd.dualproj,
    "mgda": jd.mgda,
}
RESULTS = pathlib.Path(__file__).parent / "results"
N_TRAIN, N_PAIRS, BATCH, LEARNING_RATE = 1400, 4000, 32, 0.1
CANVAS, OFFSET = 12, 4  # pixels; two 8 x 8 digits overlap in a square of 4 x 4

Batch = tuple[Tensor, Tensor]  # images (b, pixels), labels (b, tasks)
Scores = dict[str, tuple[float, float]]  # task -> (loss, accuracy)


class Problem(NamedTuple):
    """What is trained, on what."""

    objective: Callable[..., Any]  # (params, batch) -> losses
    params: Any
    scores: Callable[[Any, Batch], Scores]
    train: Batch
    test: Batch


class Run(NamedTuple):
    """What one training left behind."""

    losses: list[float]  # mean training loss at each step
    cosines: list[float]  # lowest cosine between the update and the gradient of any objective
    scores: Scores  # on test data
    steps_per_second: float


def make_step(
    objective: Callable[..., Any], rule: jd.Aggregator, learning_rate: float = LEARNING_RATE
) -> Callable[..., Any]:
    """Return the training step `(params, state, batch) -> (params, state, loss, cosine)`."""
    weighting = rule.weighting
    assert weighting is not None

    def step(params: Any, state: Any, batch: Batch) -> tuple[Any, Any, Tensor, Tensor]:
        """Weigh the gradients by their Gramian, and descend."""
        losses, gramian, vjp_fn = jd.gramian_vjp(objective, params, batch)
        weights, state = weighting(gramian, state)
        params = descend(params, vjp_fn(weights), learning_rate)
        return params, state, mean_of(losses), lowest_cosine(gramian, weights)

    return step


def descend(params: Any, grads: Any, learning_rate: float) -> Any:
    """Return the parameters after a step of plain gradient descent."""
    return optree.tree_map(lambda p, g: p - learning_rate * g, params, grads)


def mean_of(losses: Tensor | dict[str, Tensor]) -> Tensor:
    """Return the mean of all losses."""
    values = torch.stack(list(losses.values())) if isinstance(losses, dict) else losses
    return values.mean()


def lowest_cosine(gramian: Tensor, weights: Tensor) -> Tensor:
    """Return the lowest cosine between `J^T weights` and a row of `J`, from the Gramian alone."""
    pushed = gramian @ weights
    lengths = gramian.diagonal().clamp(min=0).sqrt() * (weights @ pushed).clamp(min=0).sqrt()
    return torch.where(lengths > 0, pushed / torch.where(lengths > 0, lengths, 1.0), 0.0).min()


def digits() -> tuple[Batch, Batch]:
    """Return images `(n, 64)` in 0 ... 1 and labels `(n, 1)`, for training and for test."""
    data: Any = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target).unsqueeze(1)
    return (images[:N_TRAIN], labels[:N_TRAIN]), (images[N_TRAIN:], labels[N_TRAIN:])


def overlay(single: Batch, n_pairs: int, key: Tensor) -> Batch:
    """Overlay random pairs of digits, one at the top left, one at the bottom right."""
    images, labels = single
    picks = sample(key, len(images), 2 * n_pairs).reshape(2, n_pairs)
    first, second = (images[pick].reshape(-1, 8, 8) for pick in picks)
    pad = torch.nn.functional.pad
    canvas = torch.maximum(pad(first, (0, OFFSET, 0, OFFSET)), pad(second, (OFFSET, 0, OFFSET, 0)))
    return canvas.reshape(n_pairs, CANVAS**2), torch.cat([labels[p] for p in picks], dim=1)


def sample(key: Tensor, n: int, size: int) -> Tensor:
    """Draw `size` indices below `n`, with replacement."""
    return (jd.random.uniform(key, (size,), dtype=torch.float64) * n).long()


def two_digits(seed: int) -> Problem:
    """Two tasks on one image, with a shared trunk."""
    train, test = digits()
    keys = jd.random.split(jd.random.key(seed))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trunk, shared, _ = jd.functionalize(
            nn.Sequential(nn.Linear(CANVAS**2, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU())
        )
        heads = {name: jd.functionalize(nn.Linear(16, 10)) for name in ("first", "second")}

    def logits(name: str, head_params: Any, features: Tensor) -> Tensor:
        """Return the scores of the ten classes."""
        return heads[name][0](head_params, {}, features)[0]

    def head(index: int, name: str, head_params: Any, features: Tensor, batch: Batch) -> Tensor:
        """Return the loss of one task."""
        return cross_entropy(logits(name, head_params, features), batch[1][:, index])

    def scores(params: Any, batch: Batch) -> Scores:
        """Evaluate both tasks."""
        features = trunk(params[0], {}, batch[0])[0]
        return {
            name: score(logits(name, params[1][name], features), batch[1][:, index])
            for index, name in enumerate(heads)
        }

    tasks = {name: functools.partial(head, index, name) for index, name in enumerate(heads)}
    objective = jd.multitask(lambda shared, batch: trunk(shared, {}, batch[0])[0], tasks)
    params = (shared, {name: head_params for name, (_, head_params, _) in heads.items()})
    pairs = overlay(train, N_PAIRS, keys[0]), overlay(test, N_PAIRS // 4, keys[1])
    return Problem(objective, params, scores, *pairs)


def one_digit(seed: int) -> Problem:
    """One loss for each example."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        apply, params, _ = jd.functionalize(
            nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        )

    def losses(params: Any, batch: Batch) -> Tensor:
        """Return one loss for each example."""
        return cross_entropy(apply(params, {}, batch[0])[0], batch[1][:, 0], reduction="none")

    def scores(params: Any, batch: Batch) -> Scores:
        """Evaluate."""
        return {"digit": score(apply(params, {}, batch[0])[0], batch[1][:, 0])}

    return Problem(jd.instancewise(losses), params, scores, *digits())


def score(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return mean loss and accuracy."""
    return float(cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


PROBLEMS = {"two digits, two tasks": two_digits, "one loss per example": one_digit}


def train(problem: Problem, method: str, steps: int, seed: int, eager: bool, bar: tqdm) -> Run:
    """Train from the start; the first step, which compiles, is not timed."""
    rule = METHODS[method]()
    step = make_step(problem.objective, rule)
    if not eager:
        torch.compiler.reset()
        step = torch.compile(step, fullgraph=True)
    keys = jd.random.split(jd.random.key(seed), steps)
    batches = [pick(problem.train, key) for key in keys]
    params = problem.params
    state = jd.init_state(rule, problem.objective, params, batches[0])
    losses, cosines, start = [], [], 0.0
    for i, batch in enumerate(batches):
        params, state, loss, cosine = step(params, state, batch)
        losses.append(float(loss))
        cosines.append(float(cosine))
        start = time.perf_counter() if i == 0 else start
        bar.update()
        bar.set_postfix_str(f"{method}, loss {losses[-1]:.3f}", refresh=False)
    elapsed = time.perf_counter() - start
    return Run(losses, cosines, problem.scores(params, problem.test), (steps - 1) / elapsed)


def pick(data: Batch, key: Tensor) -> Batch:
    """Draw a batch."""
    indices = sample(key, len(data[0]), BATCH)
    return data[0][indices], data[1][indices]


def table(runs: dict[str, dict[str, Run]]) -> str:
    """Return the results as text."""
    head = f"{'problem':<24}{'method':<10}{'task':<8}{'loss':>8}{'accuracy':>10}"
    lines = [head + f"{'lowest cosine':>16}{'steps/s':>10}"]
    lines.append("-" * len(lines[0]))
    for problem, by_method in runs.items():
        for method, run in by_method.items():
            for i, (task, (loss, accuracy)) in enumerate(run.scores.items()):
                ends = f"{min(run.cosines):>16.3f}{run.steps_per_second:>10.0f}" if i == 0 else ""
                start = f"{problem:<24}{method:<10}" if i == 0 else " " * 34
                lines.append(f"{start}{task:<8}{loss:>8.3f}{accuracy:>10.3f}{ends}")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digits", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=3000, help="steps of each run, at least 2")
    parser.add_argument("--methods", nargs="+", default=["mean", "upgrad"], choices=METHODS)
    parser.add_argument("--seed", type=int, default=0, help="of networks and batches")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "digits.png", help="picture")
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error(f"argument --steps: must be at least 2, got {options.steps}")
    if options.out.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"argument --out: must end in .png, .svg or .pdf, got {options.out}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train every problem with every method; print the table, save the picture."""
    options = parse(arguments)
    torch.set_num_threads(1)
    runs: dict[str, dict[str, Run]] = {}
    with tqdm(total=len(PROBLEMS) * len(options.methods) * options.steps, unit="step") as bar:
        for name, make in PROBLEMS.items():
            bar.set_description(name)
            problem = make(options.seed)
            runs[name] = {
                method: train(problem, method, options.steps, options.seed, options.eager, bar)
                for method in options.methods
            }
    print(table(runs))
    print(f"Picture: {_picture.curves(runs, options.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
