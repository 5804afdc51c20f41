"""What a process holds in a step with sharded parameters."""

from benchmarks.fsdp_memory import LOSSES, usage
from tests import workers

LAYERS, WORLD = 7, 2
LEAF, SHARD = 1 / LAYERS, 1 / WORLD  # of all parameters; a leaf is at most as large
SLACK = 0.1  # activations


def test_memory_of_a_step():
    for got in workers.run(WORLD, usage, 256, LAYERS):
        plain, mean, one_by_one, upgrad = got.values()
        for row in (mean, one_by_one, upgrad):  # the gradient's part, as in plain training
            assert row.kept <= SHARD + SLACK
            assert row.kept <= plain.kept + SLACK
        for row in (one_by_one, upgrad):  # the parts of rows, and the whole parameters
            assert row.weighing <= 1 + LOSSES * SHARD + SLACK
        assert mean.peak <= 2 + 3 * LEAF + SLACK
        assert upgrad.peak <= 1 + LOSSES * (1 + 3 * LEAF) + SLACK
        assert one_by_one.peak <= 2 + LOSSES * SHARD + 3 * LEAF + SLACK
