"""Warnings of what costs an instance-wise objective one backward pass for each loss."""

from __future__ import annotations

from collections.abc import Sequence


def unproven(names: Sequence[str], operations: Sequence[str]) -> str:
    """Return the warning that a loss depends on more than its own example, or seems to."""
    pairs = ", ".join(f"{name!r} ({where})" for name, where in zip(names, operations, strict=True))
    return (
        f"The Gramian of an instance-wise objective is not the sum over uses of {pairs}: losses "
        "depend on other examples, or these operations are used in an unknown way. Their rows are "
        "computed by one backward pass for each loss, which is right and slower. "
        "jd.check_instancewise tells which examples are mixed; jd.explain_gramian shows the cost."
    )


def unplanned_graph(reason: str) -> str:
    """Return the warning that a compiled function costs a backward pass for each loss."""
    return (
        f"An instance-wise objective is compiled without a plan that was proven: {reason}. So its "
        "rows cost one backward pass for each loss. Call the function, or jd.init_state, once with "
        "the same objective and shapes before compiling. If that was done, the objective goes "
        "another way where torch.compiler.is_compiling(), as masks of transformers do: leave it no "
        "choice, and pass the mask."
    )


def unordered(operation: str) -> str:
    """Return the warning that the numbers of a batch decide where its examples go."""
    return (
        f"The order of examples depends on data at {operation!r}, as where tokens are sent to "
        "experts. So the rows of an instance-wise objective cost one backward pass for each loss, "
        "which is right and slower. jd.explain_gramian shows the cost."
    )
