"""Kernels compile for a GPU, without one: types and shapes are checked as the interpreter does not.

The process of the other tests interprets, which is decided when a kernel is defined.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is installed with CUDA builds of torch")

PROGRAM = """
import warnings
warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from torchjd_func._kernels.pivoting import options
from torchjd_func._kernels import cagrad, eigh, orthant, quadratic, surgery, systems, threefry

M, RIDGE = 8, 1e-11
X, F, I, L, B = "*fp64", "fp32", "i32", "*i64", "*i1"  # a Python float is passed in 32 bits
SIZES = dict(M=M)
LIMITS = dict(m=I, LIMIT=I)


def programs():
    for drive in (False, True):
        known = dict(RIDGE=RIDGE, M=M, DRIVE=drive)
        out = dict(G=X, Q=X, Z=X, FREE=B, SOUND=B, PIVOTS=L, DEPENDENT=B)
        yield quadratic._solve, out | LIMITS | dict(per=I, tol=F), known
        yield orthant._hull, dict(G=X, DISTANCE=X, STATE="*i32") | LIMITS, dict(M=M, DRIVE=drive)
        out = dict(G=X, SHARES=X, PUSHED=X, RADIUS=X, OUT=X, STATE="*i32", STEPS=I)
        yield cagrad._search, out | LIMITS | dict(shortest=F, length_tol=F, tol=F), known
    out = dict(G=X, POWER=X, SHARES=X, DISTANCE=X, W=X, SOUND=B, STEPS=L, m=I, max_iter=I, tol=F)
    yield orthant._root, out, SIZES
    yield eigh._eigh, dict(A_POINTER=X, VALUES=X, VECTORS=X, m=I), SIZES | dict(SWEEPS=16)
    yield surgery._project, dict(G=X, ORDERS=L, OUT=X, m=I), SIZES
    yield surgery._raise, dict(G=X, TARGETS=X, ORDERS=L, OUT=X, SEEN=X, m=I, tol=F), SIZES
    out = dict(KEYS=L, WORDS=L, n=I, per=I, stream=I, n_bits=I)
    yield threefry._encrypt, out, dict(WIDE=True, BLOCK=256)
    yield systems._column, dict(A=X, X=X, m=I), SIZES


for fn, arguments, known in programs():
    kinds = arguments | dict.fromkeys(known, "constexpr")
    source = ASTSource(fn=fn, signature={key: kinds[key] for key in fn.arg_names}, constexprs=known)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options(1))
    print(fn.__name__)
"""


def test_for_compute_capability_9(tmp_path):
    settings = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split()) == 12
