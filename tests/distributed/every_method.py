"""Ten steps of Adam by each method: sharded parameters against one process.

python -m tests.distributed.every_method    # in some minutes; the suite takes fewer
"""

from tests.distributed.test_data_parallel import methods
from tests.distributed.test_sharded import test_every_method_equals_one_process


def main():
    """Compare by rows and by columns on two processes, and with replicas on four."""
    for world, layout in ((2, "rows"), (2, "columns"), (4, "replicas")):
        for name in methods():
            test_every_method_equals_one_process(world, layout, (name,), None, 10)
        print(f"{world} processes, {layout}: {len(methods())} methods agree to 1e-10", flush=True)


if __name__ == "__main__":
    main()
