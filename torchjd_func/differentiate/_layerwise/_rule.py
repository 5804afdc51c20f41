"""What a rule for an operation is, and which arguments it is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from torchjd_func.differentiate._layerwise._convolutions import per_dim
from torchjd_func.differentiate._layerwise._forms import Arguments, FormOf
from torchjd_func.differentiate._layerwise._sources import Place, Source

Shapes = dict[str, tuple[int, ...]]  # of the tensors among the arguments, by name
# (shapes, axis of the examples if any, names of parameters) -> whether the forms are for these
Accepts = Callable[[Shapes, int | None, list[str]], bool]


class Rule(NamedTuple):
    """The gradient of one operation by each of its parameters."""

    arguments: tuple[str, ...]  # all arguments, in order
    batched: tuple[str, ...]  # those that carry examples
    expanded: tuple[str, ...]  # those that `expand` may have repeated for each example
    forms: dict[str, FormOf]  # parameter -> (arguments, cotangent, shape) -> rows
    accepts: Accepts


def rule(
    arguments: str, batched: str, forms: dict[str, FormOf], accepts: Accepts, expanded: str = ""
) -> Rule:
    """Return a rule; names are separated by spaces."""
    names = [tuple(part.split()) for part in (arguments, batched, expanded)]
    return Rule(names[0], names[1], names[2], forms, accepts)


def bind(rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Return the arguments by name."""
    return dict(zip(rule.arguments, args, strict=False)) | kwargs


def fits(
    rule: Rule,
    given: Arguments,
    arrays: Sequence[Tensor],
    axes: Sequence[int | None],
    axis: int | None,
    shapes: Shapes,
) -> bool:
    """Say whether an operation is used as its rule expects.

    Args:
        rule: The rule.
        given: The arguments, with sources for parameters and places for `arrays`.
        arrays: Tensors that are not made of parameters.
        axes: Where the examples of each lie, `None` for what all share.
        axis: Where those of the output lie; `None` where no examples are visible.
        shapes: The shapes of the parameters, by name.

    Returns:
        Whether the forms of the rule are the gradients of its parameters.
    """
    sources = [name for name, part in given.items() if isinstance(part, Source)]
    if any(name not in rule.forms for name in sources):
        return False
    if any(given[name].expanded and name not in rule.expanded for name in sources):
        return False
    if any(name not in rule.arguments for name in given) or not _options(given):
        return False
    places = {name: part.number for name, part in given.items() if isinstance(part, Place)}
    for name, number in places.items():
        if axes[number] != (axis if name in rule.batched else None):
            return False
    shapes = shapes | {name: tuple(arrays[number].shape) for name, number in places.items()}
    return any(name in places for name in rule.batched) and rule.accepts(shapes, axis, sources)


def _options(given: Arguments) -> bool:
    """Say whether the options of an operation are those that its rule knows."""
    options = ("sparse", "scale_grad_by_freq", "max_norm", "offsets", "per_sample_weights")
    if any(given.get(name) not in (None, False) for name in options) or given.get("mode") == "max":
        return False
    if any(given.get(name, 1) != 1 for name in ("alpha", "beta")):
        return False
    extra, stride = given.get("output_padding", 0), given.get("stride", 1)
    return max(per_dim(extra, 1)) < min(per_dim(stride, 1)) or max(per_dim(extra, 1)) == 0


# Which shapes of arguments, and which axes of examples, the forms are for


def first(shapes: Shapes, axis: int | None, sources: list[str]) -> bool:
    return axis in (0, None)


def anywhere(shapes: Shapes, axis: int | None, sources: list[str]) -> bool:
    return True


def before_last(shapes: Shapes, axis: int | None, sources: list[str]) -> bool:
    inputs = [shape for name, shape in shapes.items() if name.startswith("input")]
    return axis is None or all(axis < len(shape) - 1 for shape in inputs)


def matrix(shapes: Shapes, axis: int | None, sources: list[str]) -> bool:
    return len(shapes["weight"]) == 2 and before_last(shapes, axis, sources)


def before_weight(shapes: Shapes, axis: int | None, sources: list[str]) -> bool:
    trailing = max(len(shapes[name]) for name in sources)
    return axis is None or axis < len(shapes["input"]) - trailing


def images_first(dims: int, shapes: Shapes, axis: int | None, sources: list[str]) -> bool:
    return axis is None or (axis == 0 and len(shapes["input"]) == dims + 2)


def matrix_plus_row(shapes: Shapes, axis: int | None, sources: list[str]) -> bool:
    row = shapes.get("input") == shapes["mat2"][1:] or "input" not in sources
    return row and axis in (0, None)


def batches(shapes: Shapes, axis: int | None, sources: list[str]) -> bool:
    """Examples are batches, or the rows of those that have matrices of their own."""
    return len(sources) == 1 and axis != 2


def batches_plus(shapes: Shapes, axis: int | None, sources: list[str]) -> bool:
    return axis == 0 or (axis != 2 and "input" not in sources)


def bags(shapes: Shapes, axis: int | None, sources: list[str]) -> bool:
    return len(shapes["input"]) == 2 and axis in (0, None)


def vector_or_matrix(shapes: Shapes, axis: int | None, sources: list[str]) -> bool:
    """Examples are not on the axis that is summed over."""
    weight, other = shapes[sources[0]], shapes["other" if sources[0] == "input" else "input"]
    summed = len(other) - (2 if sources[0] == "input" and len(other) > 1 else 1)
    if len(sources) == 1 and len(weight) == len(other) == 3:
        return axis != 2 and weight[:1] in ((1,), other[:1])
    if len(sources) > 1 or len(weight) not in (1, 2):
        return False
    return axis is None or (axis != summed and (axis < summed or len(weight) == 2))
