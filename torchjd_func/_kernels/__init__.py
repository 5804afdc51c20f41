"""What runs on a CUDA device in one or two launches; imported there alone, since it needs Triton.

Each kernel solves many small problems, one program for each, in registers. Nothing waits for the
host, so that CUDA graphs can capture it. Triton comes with every CUDA build of torch.
"""
