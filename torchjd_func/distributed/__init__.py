r"""Rules over several processes, in the groups of `torch.distributed`: gloo on CPU, nccl on GPU.

    torchrun --nproc-per-node 2 train.py        # with, in train.py,
    dist.init_process_group()
    rule = jd.distributed.data_parallel(jd.upgrad())
    state = jd.init_state(rule, objective, params, part)  # on all, before the loop
    grads, losses, state = jd.grad_and_value(objective, rule)(state, params, part)

Each process runs the same program on its part of the batch; parameters, states and keys are the
same on all, and nothing but `rule` differs from one process. The step compiles with
`fullgraph=True`. No pickles are exchanged.

**Bytes.** With `m` objectives and `n` parameters, a method on Gramians hands `(m + 1) n + m^2 + m`
numbers to collectives: a reduce-scatter of the Jacobian, all-reduces of a Gramian and of the
losses, an all-gather of the direction. By ring algorithms, a process sends `(W - 1) / W` of what it
hands to a reduce-scatter, an all-gather or an all-to-all, and twice that of an all-reduce. For
`m = 4` and `n = 1,000,000` in float32:

| processes | handed over | sent by each | all-reducing the Jacobian | or one gradient |
|---|---|---|---|---|
| 1 | 20,000,080 | 0 | 0 | 0 |
| 2 | 20,000,080 | 10,000,080 | 16,000,000 | 4,000,000 |
| 4 | 20,000,080 | 15,000,120 | 24,000,000 | 6,000,000 |

**More GPUs, on paper.** Nothing below is measured. Assumed: `m = 4`, `n` = 100 million in float32,
50 GB/s out of each GPU at once, 5 microseconds for a hop, rings for what is long and trees for what
is short, no overlap with the backward pass. Then a step communicates, in milliseconds, for

| GPUs | on Gramians | all-reducing the Jacobian | or one gradient |
|---|---|---|---|
| 2 | 20 | 32 | 8 |
| 8 | 35 | 56 | 14 |
| 64 | 40 | 64 | 16 |
| 1,000 | 50 | 74 | 26 |

of which 10 are the hops of 1,000 GPUs. Work on Gramians, `m^2 n`, is divided by the processes; the
solve, of `m` alone, is done by each.
"""

from torchjd_func.distributed._across_workers import across_workers
from torchjd_func.distributed._data_parallel import data_parallel
from torchjd_func.distributed._gathered import gathered
from torchjd_func.distributed._handshake import check_same
from torchjd_func.distributed._mean import mean
from torchjd_func.distributed._sharded import sharded

__all__ = ["across_workers", "check_same", "data_parallel", "gathered", "mean", "sharded"]
