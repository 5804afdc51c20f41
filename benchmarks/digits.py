"""Train on handwritten digits with several losses, in one pure, compiled step.

    python -m benchmarks.digits [--steps N] [--methods mean upgrad ...] [--seed S] [--eager]

Two problems on scikit-learn's bundled digits: (a) two digits overlaid in one image, one task each,
a shared trunk and two heads; (b) one digit in an image, one loss for each example of the batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import optree
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import torchjd_func as jd
from benchmarks import _picture
from benchmarks._form import Benchmark, Cell, Row, main, table

METHODS = {
    "mean": jd.mean,
    "sum": jd.sum,
    "upgrad": jd.upgrad,
    "dualproj": jd.dualproj,
    "mgda": jd.mgda,
}
N_TRAIN, N_PAIRS, BATCH, LEARNING_RATE = 1400, 4000, 32, 0.1
POINTS = 60  # of each curve
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

    tasks = {name: partial(head, index, name) for index, name in enumerate(heads)}
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


def train(problem: str, method: str, steps: int, seed: int, eager: bool) -> Iterator[Row]:
    """Train from the start; the first step, which compiles, is not timed."""
    given, rule = PROBLEMS[problem](seed), METHODS[method]()
    step = make_step(given.objective, rule)
    if not eager:
        torch.compiler.reset()
        step = torch.compile(step, fullgraph=True)
    keys = jd.random.split(jd.random.key(seed), steps)
    batches = [pick(given.train, key) for key in keys]
    params = given.params
    state = jd.init_state(rule, given.objective, params, batches[0])
    losses, cosines, start = [], [], 0.0
    with tqdm(batches, unit="step", leave=False) as bar:
        for i, batch in enumerate(bar):
            params, state, loss, cosine = step(params, state, batch)
            losses.append(float(loss))
            cosines.append(float(cosine))
            start = time.perf_counter() if i == 0 else start
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
    speed = (steps - 1) / (time.perf_counter() - start)
    yield {
        "problem": problem,
        "method": method,
        "scores": given.scores(params, given.test),
        "lowest_cosine": min(cosines),
        "steps_per_second": speed,
        "steps": steps,
        "losses": means(losses),
        "cosines": means(cosines),
    }


def means(values: list[float]) -> list[float]:
    """Return the means of up to `POINTS` parts of equal length, with four digits."""
    length = max(1, len(values) // POINTS)
    parts = torch.tensor(values).unfold(0, length, length).mean(1)
    return [float(f"{value:.4g}") for value in parts.tolist()]


def pick(data: Batch, key: Tensor) -> Batch:
    """Draw a batch."""
    indices = sample(key, len(data[0]), BATCH)
    return data[0][indices], data[1][indices]


def report(rows: list[Row]) -> str:
    """Return the scores on test data as Markdown."""
    lines = []
    for row in rows:
        ends = [f"{row['lowest_cosine']:.3f}", f"{row['steps_per_second']:.0f}"]
        for task, (loss, accuracy) in row["scores"].items():
            cells = [row["problem"], row["method"], task, f"{loss:.3f}", f"{accuracy:.3f}"]
            lines.append(cells + ends)
    head = ["problem", "method", "task", "loss", "accuracy", "lowest cosine", "steps/s"]
    return table(head, lines)


def cells(methods: Sequence[str], steps: int, seed: int, eager: bool) -> list[Cell]:
    """Return every problem with every method."""
    return [
        (f"{problem}, {method}", partial(train, problem, method, steps, seed, eager))
        for problem in PROBLEMS
        for method in methods
    ]


BENCHMARK = Benchmark(
    name="digits",
    about=__doc__,
    cells=cells,
    report=report,
    full={"methods": ("mean", "upgrad"), "steps": 3000, "seed": 0, "eager": False},
    quick={"steps": 300, "eager": True},
    choices={"methods": METHODS},
    draw=_picture.curves,
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
