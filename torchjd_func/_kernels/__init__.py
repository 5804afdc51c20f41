"""What runs on a CUDA device in one or two launches; imported there alone, since it needs Triton.

Each kernel solves many small problems, one program for each, in registers. Nothing waits for the
host, so that CUDA graphs can capture it. Triton comes with every CUDA build of torch.

No program reads what it, or another of its launch, writes: the warps of a program do not wait for
each other's stores. The one exception is a flag of its own that an earlier launch left; a program
branches on it before all else.
"""
