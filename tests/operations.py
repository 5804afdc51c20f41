"""Public differentiable operations of torch, for comparing pullbacks through them with loops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Operation = Callable[[Tensor], Any]
OPTIONS: dict[str, Any] = {"dtype": torch.float64}


def fixed(*shape: int) -> Tensor:
    """Return constants, the same at each call."""
    count = torch.arange(1.0, 1.0 + torch.Size(shape).numel(), **OPTIONS)
    return torch.sin(count * 7.3).reshape(shape)


def positive(h: Tensor) -> Tensor:
    """Return numbers above one half."""
    return h.square() + 0.5


def inside(h: Tensor) -> Tensor:
    """Return numbers between -0.9 and 0.9."""
    return 0.9 * h.sin()


def square(h: Tensor) -> Tensor:
    """Return the well-conditioned matrices `(..., 3, 3)` of features `(..., 3, 4)`."""
    return h[..., :3] + 3 * torch.eye(3, **OPTIONS)


def definite(h: Tensor) -> Tensor:
    """Return positive definite matrices `(..., 3, 3)`."""
    return h @ h.mT + torch.diag(torch.arange(1.0, 4.0, **OPTIONS))


def triangular(h: Tensor) -> Tensor:
    """Return lower triangular matrices `(..., 3, 3)`."""
    return h[..., :3].tril(-1) + torch.diag_embed(positive(h[..., 0]))


def complex_of(h: Tensor) -> Tensor:
    """Return complex numbers."""
    return torch.complex(h, h.cos())


def image(h: Tensor, *size: int) -> Tensor:
    """Return features `(..., 3, 4)` as images of two channels, `(..., 2, *size)`."""
    grown = torch.cat([h, h.cos(), h.sin(), 0.3 * h], -1).flatten(-2)  # (..., 48)
    return grown[..., : 2 * torch.Size(size).numel()].unflatten(-1, (2, *size))


def each(fn: Callable[[Tensor], Any], dims: int, h: Tensor) -> Any:
    """Apply a function of tensors with one batch dimension to any leading dimensions."""
    front = h.shape[: h.ndim - dims]
    return fn(h.reshape(-1, *h.shape[h.ndim - dims :])).unflatten(0, front or (1,))


def pooled(
    fn: Callable[..., Any], size: tuple[int, ...], /, *args: Any, **kwargs: Any
) -> Operation:
    """Return an operation on images."""
    return lambda h: each(lambda x: fn(x, *args, **kwargs), len(size) + 1, image(h, *size))


TARGET = torch.tensor([2, 0, 1])
UNARY = {
    "torch": "abs neg exp exp2 expm1 sin cos tan sinh cosh tanh asinh atan sigmoid square erf erfc "
    "sinc deg2rad rad2deg positive sign floor frac sgn trunc round ceil nan_to_num clone "
    "flatten ravel conj_physical angle real resolve_conj",
    "positive": "log log1p log2 log10 sqrt rsqrt reciprocal lgamma digamma i0",
    "inside": "asin acos atanh erfinv",
    "functional": "relu relu6 elu selu celu gelu silu mish softplus softsign tanhshrink hardtanh "
    "hardshrink softshrink hardsigmoid hardswish leaky_relu logsigmoid",
    "special": "i0e i1 i1e ndtr log_ndtr entr expit erfcx",
    "reduced": "softmax log_softmax logsumexp cumsum cumprod logcumsumexp cummax cummin sum mean "
    "prod var std amax amin nansum nanmean median sort max min mode",
}


def _after(fn: Operation, first: Operation, h: Tensor) -> Tensor:
    """Apply two functions."""
    return fn(first(h))


def _along_last(fn: Callable[..., Any], h: Tensor) -> Tensor:
    """Apply a function along the last dimension; return the values of what returns indices, too."""
    out = fn(h, dim=-1)
    return out[0] if isinstance(out, tuple) else out


def _unary() -> dict[str, Operation]:
    """Return operations of one tensor."""
    listed: dict[str, Operation] = {}
    for name in UNARY["torch"].split():
        listed[f"torch.{name}"] = getattr(torch, name)
    for name in UNARY["positive"].split():
        listed[f"torch.{name}"] = partial(_after, getattr(torch, name), positive)
    for name in UNARY["inside"].split():
        listed[f"torch.{name}"] = partial(_after, getattr(torch, name), inside)
    for name in UNARY["functional"].split():
        listed[f"F.{name}"] = getattr(F, name)
    for name in UNARY["special"].split():
        listed[f"special.{name}"] = partial(_after, getattr(torch.special, name), positive)
    for name in UNARY["reduced"].split():
        listed[f"torch.{name}"] = partial(_along_last, getattr(torch, name))
    return listed


ARITHMETIC: dict[str, Operation] = {
    "add": lambda h: torch.add(h, h.cos(), alpha=2),
    "rsub": lambda h: torch.rsub(h, 1, alpha=3),
    "mul": lambda h: h * h.cos() * fixed(4),
    "div": lambda h: h / positive(h.cos()),
    "div floor": lambda h: torch.div(h, 0.7, rounding_mode="floor") * h,
    "pow": lambda h: positive(h) ** h.cos(),
    "pow by a number": lambda h: h**3,
    "number to a power": lambda h: 2.0**h,
    "float_power": lambda h: torch.float_power(positive(h), 1.5),
    "atan2": lambda h: torch.atan2(h, h.cos()),
    "hypot": lambda h: torch.hypot(h, h.cos()),
    "logaddexp": lambda h: torch.logaddexp(h, h.cos()),
    "logaddexp2": lambda h: torch.logaddexp2(h, h.cos()),
    "maximum": lambda h: torch.maximum(h, fixed(4)),
    "minimum": lambda h: torch.minimum(h, h.cos()),
    "fmax": lambda h: torch.fmax(h, h.cos()),
    "fmin": lambda h: torch.fmin(h, fixed(4)),
    "fmod": lambda h: torch.fmod(h, 0.7),
    "remainder": lambda h: torch.remainder(h, positive(h.cos())),
    "copysign": lambda h: torch.copysign(h, fixed(4)),
    "xlogy": lambda h: torch.xlogy(h, positive(h)),
    "xlog1py": lambda h: torch.special.xlog1py(h, positive(h)),
    "zeta": lambda h: torch.special.zeta(torch.tensor(2.5, **OPTIONS), positive(h)),
    "polygamma": lambda h: torch.polygamma(1, positive(h)),
    "mvlgamma": lambda h: torch.mvlgamma(positive(h) + 2, 2),
    "logit": lambda h: torch.logit(0.5 + 0.4 * h.sin(), eps=1e-6),
    "lerp": lambda h: torch.lerp(h, h.cos(), h.sin()),
    "addcmul": lambda h: torch.addcmul(h, h.cos(), h.sin(), value=0.3),
    "addcdiv": lambda h: torch.addcdiv(h, h.cos(), positive(h), value=0.3),
    "where": lambda h: torch.where(h > 0, h, h.exp()),
    "clamp": lambda h: h.clamp(-0.5, 0.5),
    "clamp by tensors": lambda h: torch.clamp(h, h.cos() - 1, h.cos()),
    "heaviside": lambda h: torch.heaviside(h.detach(), h.detach()) * h,
    "ldexp": lambda h: torch.ldexp(h, torch.tensor(2)),
    "frexp": lambda h: torch.frexp(h)[0],
    "dist": lambda h: h.flatten(-2).square().sum(-1, keepdim=True).sqrt(),
    "renorm": lambda h: torch.renorm(h.mT.flatten(0, -2), 2, 0, 0.5) if h.ndim == 2 else h.exp(),
    "norm": lambda h: h.norm(dim=-1),
    "norm of order 3": lambda h: torch.norm(h, p=3, dim=-1),
    "cosine of pairs": lambda h: F.cosine_similarity(h.unsqueeze(-2), h.cos().unsqueeze(-3), -1),
    "quantile": lambda h: torch.quantile(h, 0.3, dim=-1),
    "nanquantile": lambda h: torch.nanquantile(h, 0.3, dim=-1),
    "nanmedian": lambda h: torch.nanmedian(h, -1)[0],
    "kthvalue": lambda h: torch.kthvalue(h, 2, -1)[0],
    "topk": lambda h: torch.topk(h, 2, -1)[0],
    "var_mean": lambda h: torch.stack(torch.var_mean(h, -1), -1),
    "std over two": lambda h: torch.std(h, (-2, -1), keepdim=True),
    "trapezoid": lambda h: torch.trapezoid(h, dim=-1),
    "cumulative_trapezoid": lambda h: torch.cumulative_trapezoid(h, dim=-1),
    "diff": lambda h: torch.diff(h, 2, -1),
    "gradient": lambda h: torch.gradient(h, dim=-1)[0],
    "cov": lambda h: torch.cov(h) if h.ndim == 2 else h @ h.mT,
    "corrcoef": lambda h: torch.corrcoef(h) if h.ndim == 2 else h.exp(),
}

SHAPES: dict[str, Operation] = {
    "reshape": lambda h: h.reshape(*h.shape[:-2], 6, 2).exp(),
    "transpose": lambda h: h.transpose(-1, -2).cumsum(-1),
    "expand": lambda h: h.unsqueeze(-1).expand(*h.shape, 2).exp(),
    "repeat": lambda h: h.repeat(*[1] * (h.ndim - 1), 2).cumsum(-1),
    "tile": lambda h: h.tile(2).cumprod(-1),
    "repeat_interleave": lambda h: h.repeat_interleave(2, -1).cumsum(-1),
    "repeat_interleave by counts": lambda h: h.repeat_interleave(
        torch.tensor([1, 0, 2, 1]), -1
    ).cumsum(-1),
    "flip": lambda h: h.flip(-1).cumsum(-1),
    "fliplr": lambda h: h.flip(-1, -2).exp(),
    "roll": lambda h: h.roll((1, 2), (-1, -2)) * h,
    "rot90": lambda h: torch.rot90(h, 1, (-2, -1)).exp(),
    "unfold": lambda h: h.unfold(-1, 2, 1).exp(),
    "diagonal": lambda h: h.diagonal(0, -2, -1).exp(),
    "diag_embed": lambda h: torch.diag_embed(h, 1).exp(),
    "diagonal_scatter": lambda h: torch.diagonal_scatter(h.exp(), h[..., :3].sum(-1), 0, -2, -1),
    "select_scatter": lambda h: torch.select_scatter(h.exp(), h[..., 0].sin(), -1, 1),
    "slice_scatter": lambda h: torch.slice_scatter(h.exp(), h[..., :2].sin(), -1, 1, 3),
    "narrow": lambda h: h.narrow(-1, 1, 2).exp(),
    "tril": lambda h: h.tril().exp(),
    "triu": lambda h: h.triu(1).exp(),
    "cat": lambda h: torch.cat([h, h.cos()], -1).cumsum(-1),
    "stack": lambda h: torch.stack([h, h.cos()], -2).softmax(-2),
    "split": lambda h: h.split([1, 3], -1)[1].exp(),
    "tensor_split": lambda h: h.tensor_split(3, -1)[0].exp(),
    "unbind": lambda h: h.unbind(-1)[2].exp() * h.unbind(-2)[0].sum(-1, keepdim=True),
    "meshgrid": lambda h: h.unsqueeze(-1) * h.cos().unsqueeze(-2),
    "gather": lambda h: h.gather(-1, torch.zeros_like(h, dtype=torch.long)),
    "take_along_dim": lambda h: torch.take_along_dim(h, h.argsort(-1), -1).cumsum(-1),
    "index_select": lambda h: h.index_select(-1, torch.tensor([0, 2, 2])).exp(),
    "index_select by a number": lambda h: h.index_select(-1, torch.tensor(2)).exp(),
    "index_copy by a number": lambda h: h.index_copy(-1, torch.tensor(2), h[..., :1].exp()),
    "index_add by a number": lambda h: h.index_add(
        dim=-1, index=torch.tensor(2), source=h[..., :1].exp()
    ),
    "index_reduce by a number": lambda h: h.index_reduce(
        -1, torch.tensor(2), positive(h[..., :1]), "mean"
    ),
    "index_copy of numbers": lambda h: each(
        lambda x: torch.stack([r.index_copy(0, torch.tensor(2), r[0].exp()) for r in x]), 1, h
    ),
    "flip and roll of numbers": lambda h: (
        (h[0, 0].flip(0) * h[0, 1].roll(1)).reshape(1) if h.ndim == 2 else h.exp()
    ),
    "index": lambda h: h[..., torch.tensor([0, 2, 2])].exp(),
    "index_add": lambda h: h.index_add(-1, torch.tensor([0, 0]), h[..., :2].exp()),
    "index_copy": lambda h: h.index_copy(-1, torch.tensor([2, 0]), h[..., :2].exp()),
    "index_fill": lambda h: h.exp().index_fill(-1, torch.tensor([2, 0]), 0.3),
    "index_put": lambda h: (
        h.mT.flatten(-2)
        .movedim(-1, 0)
        .index_put(
            (torch.tensor([1, 1, 0]),), h.flatten(-2).movedim(-1, 0)[:3].exp(), accumulate=True
        )
        .movedim(0, -1)
    ),
    "index_reduce": lambda h: h.index_reduce(
        -1, torch.tensor([0, 0]), positive(h[..., :2]), "amax"
    ),
    "scatter": lambda h: h.exp().scatter(
        -1, torch.zeros_like(h, dtype=torch.long)[..., :1], h[..., :1].sin()
    ),
    "scatter_add": lambda h: h.scatter_add(-1, (h > 0).long(), h.exp()),
    "scatter_reduce prod": lambda h: positive(h).scatter_reduce(
        -1, (h > 0).long(), positive(h.cos()), "prod"
    ),
    "scatter_reduce amax": lambda h: h.scatter_reduce(-1, (h > 0).long(), h.cos(), "amax"),
    "scatter_reduce mean": lambda h: h.scatter_reduce(-1, (h > 0).long(), h.cos(), "mean"),
    "masked_fill": lambda h: h.exp().masked_fill(h > 0, 0.3),
    "masked_scatter": lambda h: h.masked_scatter(
        torch.tensor([True, False, True, False]), h[..., :2].exp()
    ),
    "msort": lambda h: torch.msort(h.movedim(-1, 0)).movedim(0, -1),
    "aminmax": lambda h: torch.stack(torch.aminmax(h, dim=-1), -1),
    "pad": lambda h: F.pad(h, (1, 2), value=0.3).cumsum(-1),
    "pad reflect": lambda h: F.pad(h, (1, 2), mode="reflect").exp(),
    "pad replicate": lambda h: F.pad(h, (2, 1), mode="replicate").exp(),
    "pad circular": lambda h: F.pad(h, (2, 1), mode="circular").exp(),
    "squeeze": lambda h: h.unsqueeze(0).squeeze(0).exp(),
    "movedim": lambda h: h.movedim(-1, -2).cumsum(-1),
    "swapaxes": lambda h: h.swapaxes(-1, -2).softmax(-1),
    "hstack": lambda h: torch.cat([h[..., :1], h], -1).exp(),
    "block_diag": lambda h: torch.block_diag(h, h.cos()) if h.ndim == 2 else h.exp(),
    "kron": lambda h: torch.kron(h, h[..., :2, :2].cos()) if h.ndim == 2 else h.exp(),
    "tensor from parts": lambda h: torch.stack(
        [row.sum() * h[..., 0, 0] for row in fixed(3, 2)], -1
    ),
    "combinations": lambda h: h[..., [0, 0, 1]] * h[..., [1, 2, 2]],
    "view_as_complex": lambda h: torch.view_as_complex(h.unflatten(-1, (2, 2))).square(),
    "complex": lambda h: complex_of(h).square(),
    "polar": lambda h: torch.polar(positive(h), h),
    "complex abs": lambda h: complex_of(h).abs(),
    "complex angle": lambda h: complex_of(h).angle(),
    "complex sgn": lambda h: complex_of(h).sgn(),
    "complex product": lambda h: complex_of(h) @ complex_of(h).mH,
    "complex exp": lambda h: complex_of(h).exp() / complex_of(h.sin()),
    "complex pow": lambda h: complex_of(h) ** 2.5,
}

PRODUCTS: dict[str, Operation] = {
    "matmul": lambda h: h @ h.mT.cos(),
    "matmul with a constant": lambda h: h @ fixed(4, 3),
    "bmm": lambda h: each(lambda x: torch.bmm(x, x.mT.cos()), 2, h),
    "baddbmm": lambda h: each(lambda x: torch.baddbmm(x, x @ x.mT, x.cos(), beta=0.3), 2, h),
    "addbmm": lambda h: h @ h.mT + h.sum((-1, -2), keepdim=True),
    "addmm": lambda h: torch.addmm(h, h @ h.mT, h, alpha=0.5) if h.ndim == 2 else h.exp(),
    "addmv": lambda h: torch.addmv(h[..., 0], h, h[0]) if h.ndim == 2 else h.exp(),
    "addr": lambda h: torch.addr(h, h[:, 0], h[0]) if h.ndim == 2 else h.exp(),
    "mv": lambda h: torch.mv(h, h[0]) if h.ndim == 2 else h.exp(),
    "dot": lambda h: torch.dot(h[0], h[1]).unsqueeze(0) if h.ndim == 2 else h.exp(),
    "inner": lambda h: torch.inner(h, fixed(2, 4)),
    "outer": lambda h: torch.outer(h[0], h[:, 0]) if h.ndim == 2 else h.exp(),
    "tensordot": lambda h: torch.tensordot(h, fixed(4, 2), dims=1),
    "einsum": lambda h: torch.einsum("...ij,...kj->...ik", h, h.cos()),
    "einsum diagonal": lambda h: torch.einsum("...ii->...i", h[..., :3]).exp(),
    "einsum of three": lambda h: torch.einsum("...ij,jk,...lk->...il", h, fixed(4, 4), h.cos()),
    "chain_matmul": lambda h: (
        torch.linalg.multi_dot([h, h.mT, h.cos()]) if h.ndim == 2 else h.exp()
    ),
    "cross": lambda h: torch.linalg.cross(h[..., :3], h[..., 1:].cos(), dim=-1),
    "vecdot": lambda h: torch.linalg.vecdot(h, h.cos()),
    "cdist": lambda h: torch.cdist(h, h.cos()),
    "cdist to constants": lambda h: torch.cdist(h, fixed(2, 4)),
    "cdist from constants": lambda h: torch.cdist(fixed(2, 4), h),
    "cdist of order 1": lambda h: torch.cdist(h, h.cos(), p=1),
    "cdist of order 3": lambda h: torch.cdist(h, h.cos(), p=3),
    "cdist of infinite order": lambda h: torch.cdist(h, h.cos(), p=float("inf")),
    "cdist by products": lambda h: torch.cdist(h, h.cos(), compute_mode="use_mm_for_euclid_dist"),
    "pdist": lambda h: F.pdist(h) if h.ndim == 2 else h.exp(),
    "pairwise_distance": lambda h: F.pairwise_distance(h, h.cos(), p=3),
    "cosine_similarity": lambda h: F.cosine_similarity(h, h.cos(), -1),
    "linear": lambda h: F.linear(h, fixed(2, 4), fixed(2)),
    "bilinear": lambda h: F.bilinear(h, h.cos(), fixed(2, 4, 4), fixed(2)),
    "attention": lambda h: F.scaled_dot_product_attention(h, h.cos(), h.sin()),
    "attention causal": lambda h: F.scaled_dot_product_attention(
        h.unsqueeze(-3), h.cos().unsqueeze(-3), h.sin().unsqueeze(-3), is_causal=True
    ),
    "attention masked": lambda h: F.scaled_dot_product_attention(
        h, h.cos(), h.sin(), attn_mask=fixed(3, 3)
    ),
    "kl_div": lambda h: F.kl_div(h.log_softmax(-1), fixed(4).softmax(-1), reduction="none"),
}

LINALG: dict[str, Operation] = {
    "det": lambda h: torch.linalg.det(square(h)).unsqueeze(-1),
    "slogdet": lambda h: torch.linalg.slogdet(square(h))[1].unsqueeze(-1),
    "logdet": lambda h: torch.logdet(definite(h)).unsqueeze(-1),
    "inv": lambda h: torch.linalg.inv(square(h)),
    "inv_ex": lambda h: torch.linalg.inv_ex(square(h))[0],
    "pinv": lambda h: torch.linalg.pinv(h),
    "solve": lambda h: torch.linalg.solve(square(h), h),
    "solve_ex": lambda h: torch.linalg.solve_ex(square(h), h)[0],
    "solve from the right": lambda h: torch.linalg.solve(square(h), h.mT, left=False),
    "solve_triangular": lambda h: torch.linalg.solve_triangular(triangular(h), h, upper=False),
    "triangular_solve": lambda h: torch.linalg.solve_triangular(triangular(h).mT, h, upper=True),
    "lstsq": lambda h: torch.linalg.lstsq(h.mT, h.mT.cos()[..., :2])[0],
    "cholesky": lambda h: torch.linalg.cholesky(definite(h)),
    "cholesky_ex": lambda h: torch.linalg.cholesky_ex(definite(h), upper=True)[0],
    "cholesky_solve": lambda h: torch.cholesky_solve(h, triangular(h)),
    "cholesky_inverse": lambda h: torch.cholesky_inverse(triangular(h)),
    "lu": lambda h: torch.linalg.lu(square(h))[2],
    "lu_factor": lambda h: torch.linalg.lu_factor(square(h))[0],
    "lu_solve": lambda h: torch.linalg.lu_solve(*torch.linalg.lu_factor(square(h)), h),
    "qr": lambda h: torch.linalg.qr(h.mT)[1],
    "qr q": lambda h: torch.linalg.qr(h.mT)[0],
    "householder_product": lambda h: torch.linalg.householder_product(
        h.mT, 1 / positive(h[..., 0])
    ),
    "svdvals": lambda h: torch.linalg.svdvals(h),
    "svd": lambda h: torch.linalg.svd(h, full_matrices=False)[1],
    "svd projection": lambda h: (
        (u := torch.linalg.svd(h, full_matrices=False)[0])[..., :1] @ u[..., :1].mT
    ),
    "eigvalsh": lambda h: torch.linalg.eigvalsh(definite(h)),
    "eigh projection": lambda h: (q := torch.linalg.eigh(definite(h))[1])[..., :1] @ q[..., :1].mT,
    "eigvals": lambda h: torch.linalg.eigvals(square(h)).abs(),
    "matrix_exp": lambda h: torch.linalg.matrix_exp(0.3 * square(h)),
    "matrix_power": lambda h: torch.linalg.matrix_power(square(h), 3),
    "matrix_power negative": lambda h: torch.linalg.matrix_power(square(h), -2),
    "matrix_norm": lambda h: torch.linalg.matrix_norm(h).unsqueeze(-1),
    "nuclear norm": lambda h: torch.linalg.matrix_norm(h, "nuc").unsqueeze(-1),
    "spectral norm": lambda h: torch.linalg.matrix_norm(h, 2).unsqueeze(-1),
    "cond": lambda h: torch.linalg.cond(square(h)).unsqueeze(-1),
    "vector_norm": lambda h: torch.linalg.vector_norm(h, 3, -1),
    "vector_norm infinite": lambda h: torch.linalg.vector_norm(h, float("inf"), -1),
    "tensorinv": lambda h: torch.linalg.tensorinv(square(h), 1) if h.ndim == 2 else h.exp(),
    "tensorsolve": lambda h: (
        torch.linalg.tensorsolve(square(h), h[:, 0]) if h.ndim == 2 else h.exp()
    ),
    "vander": lambda h: torch.linalg.vander(h, N=3),
    "trace": lambda h: h.diagonal(0, -2, -1).sum(-1, keepdim=True).exp(),
    "ldl": lambda h: torch.linalg.solve(definite(h), h[..., :1]),
}

FOURIER: dict[str, Operation] = {
    **{
        f"fft.{name}": getattr(torch.fft, name)
        for name in ["fft", "ifft", "rfft", "fft2", "ifft2", "rfft2", "ihfft"]
    },
    "fft.fftn": lambda h: torch.fft.fftn(h, dim=(-2, -1)),
    "fft.rfftn": lambda h: torch.fft.rfftn(h, dim=(-2, -1), norm="ortho"),
    "fft.irfft": lambda h: torch.fft.irfft(complex_of(h)),
    "fft.hfft": lambda h: torch.fft.hfft(complex_of(h)),
    "fft.irfft2": lambda h: torch.fft.irfft2(complex_of(h)),
    "fft.fftshift": lambda h: torch.fft.fftshift(h, -1).cumsum(-1),
    "stft": lambda h: torch.stft(
        h.flatten(-2), 4, 2, window=torch.ones(4, **OPTIONS), return_complex=True
    ),
    "istft": lambda h: torch.istft(
        torch.stft(h.flatten(-2), 4, 2, window=torch.ones(4, **OPTIONS), return_complex=True),
        4,
        2,
        window=torch.ones(4, **OPTIONS),
    ),
}

LAYERS: dict[str, Operation] = {
    "glu": lambda h: F.glu(h, -1),
    "softmin": lambda h: F.softmin(h, -1),
    "gelu tanh": lambda h: F.gelu(h, approximate="tanh"),
    "threshold": lambda h: F.threshold(h, 0.1, -1.0),
    "prelu": lambda h: F.prelu(h, torch.tensor([0.3], **OPTIONS)),
    "normalize": lambda h: F.normalize(h, dim=-1),
    "layer_norm": lambda h: F.layer_norm(h, (4,), fixed(4), fixed(4)),
    "layer_norm over two": lambda h: F.layer_norm(h, (3, 4)),
    "rms_norm": lambda h: F.rms_norm(h, (4,), fixed(4)),
    "group_norm": pooled(F.group_norm, (6,), 2),
    "instance_norm": pooled(F.instance_norm, (6,)),
    "local_response_norm": pooled(F.local_response_norm, (6,), 2),
    "batch_norm": pooled(
        F.batch_norm, (6,), torch.zeros(2, **OPTIONS), torch.ones(2, **OPTIONS), fixed(2)
    ),
    "conv1d": pooled(F.conv1d, (6,), fixed(3, 2, 3), fixed(3), padding=1),
    "conv1d in groups": pooled(F.conv1d, (6,), fixed(4, 1, 2), groups=2, dilation=2),
    "conv2d": pooled(F.conv2d, (4, 4), fixed(3, 2, 2, 3), stride=(2, 1), padding="valid"),
    "conv3d": pooled(F.conv3d, (2, 3, 3), fixed(2, 2, 2, 2, 2)),
    "conv_transpose1d": pooled(F.conv_transpose1d, (6,), fixed(2, 3, 3), stride=2),
    "conv_transpose2d": pooled(F.conv_transpose2d, (3, 3), fixed(2, 2, 2, 2), padding=1),
    "conv_transpose3d": pooled(F.conv_transpose3d, (2, 2, 2), fixed(2, 2, 2, 2, 2)),
    "avg_pool1d": pooled(F.avg_pool1d, (6,), 3, 2),
    "avg_pool2d": pooled(F.avg_pool2d, (4, 4), 2, count_include_pad=False, padding=1),
    "avg_pool3d": pooled(F.avg_pool3d, (2, 2, 4), 2),
    "max_pool1d": pooled(F.max_pool1d, (6,), 3, 2),
    "max_pool2d": pooled(F.max_pool2d, (4, 4), 3, 1, 1),
    "max_pool3d": pooled(F.max_pool3d, (2, 2, 4), 2),
    "lp_pool1d": pooled(lambda x: F.lp_pool1d(positive(x), 3, 2), (6,)),
    "lp_pool2d": pooled(lambda x: F.lp_pool2d(positive(x), 3, 2), (4, 4)),
    "adaptive_avg_pool1d": pooled(F.adaptive_avg_pool1d, (6,), 4),
    "adaptive_avg_pool2d": pooled(F.adaptive_avg_pool2d, (4, 4), (3, 2)),
    "adaptive_avg_pool3d": pooled(F.adaptive_avg_pool3d, (2, 2, 4), (1, 2, 3)),
    "adaptive_max_pool1d": pooled(F.adaptive_max_pool1d, (6,), 4),
    "adaptive_max_pool2d": pooled(F.adaptive_max_pool2d, (4, 4), (3, 2)),
    "adaptive_max_pool3d": pooled(F.adaptive_max_pool3d, (2, 2, 4), (1, 2, 3)),
    "max_unpool2d": pooled(
        lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), (2, 2)), (4, 4)
    ),
    "fractional_max_pool2d": pooled(
        lambda x: F.fractional_max_pool2d(
            x, 2, output_size=2, _random_samples=torch.full((len(x), 2, 2), 0.4, **OPTIONS)
        ),
        (4, 4),
    ),
    "unfold of images": pooled(F.unfold, (4, 4), 2),
    "fold": pooled(lambda x: F.fold(F.unfold(x, 2).square(), (4, 4), 2), (4, 4)),
    "interpolate nearest": pooled(F.interpolate, (6,), scale_factor=2),
    "interpolate nearest-exact": pooled(F.interpolate, (4, 4), size=(3, 5), mode="nearest-exact"),
    "interpolate linear": pooled(F.interpolate, (6,), size=9, mode="linear"),
    "interpolate bilinear": pooled(F.interpolate, (4, 4), scale_factor=1.5, mode="bilinear"),
    "interpolate bilinear antialias": pooled(
        F.interpolate, (4, 4), size=(3, 3), mode="bilinear", antialias=True
    ),
    "interpolate bicubic": pooled(
        F.interpolate, (4, 4), size=(5, 6), mode="bicubic", align_corners=True
    ),
    "interpolate trilinear": pooled(F.interpolate, (2, 2, 4), size=(3, 3, 3), mode="trilinear"),
    "interpolate area": pooled(F.interpolate, (4, 4), size=(3, 3), mode="area"),
    "pixel_shuffle": pooled(lambda x: F.pixel_shuffle(torch.cat([x, x.cos()], 1), 2), (3, 3)),
    "pixel_unshuffle": pooled(F.pixel_unshuffle, (4, 4), 2),
    "channel_shuffle": pooled(
        lambda x: F.channel_shuffle(torch.cat([x, x.cos()], 1), 2).cumsum(1), (3, 3)
    ),
    "pad reflect of images": pooled(F.pad, (4, 4), (1, 1, 2, 0), mode="reflect"),
    "pad replicate of volumes": pooled(F.pad, (2, 2, 4), (1, 1, 2, 0, 1, 1), mode="replicate"),
    "grid_sample": pooled(
        lambda x: F.grid_sample(x, 0.8 * x.mT.flip(1).movedim(1, -1).sin(), align_corners=False),
        (4, 4),
    ),
    "grid_sample bicubic": pooled(
        lambda x: F.grid_sample(
            x,
            0.8 * x.movedim(1, -1).sin(),
            mode="bicubic",
            padding_mode="reflection",
            align_corners=True,
        ),
        (4, 4),
    ),
    "grid_sample of volumes": pooled(
        lambda x: F.grid_sample(
            x, 0.8 * torch.cat([x, x[:, :1].cos()], 1).movedim(1, -1).sin(), align_corners=False
        ),
        (2, 2, 4),
    ),
    "affine_grid": lambda h: each(
        lambda x: F.affine_grid(x[:, :2, :3], [len(x), 1, 2, 3], align_corners=False), 2, h
    ),
    "embedding of weights": lambda h: (
        F.embedding(torch.tensor([[0, 2], [1, 1]]), h)
        if h.ndim == 2
        else h[:, torch.tensor([[0, 2], [1, 1]])]
    ),
    "embedding_bag of weights": lambda h: (
        F.embedding_bag(torch.tensor([[0, 2], [1, 1]]), h) if h.ndim == 2 else h.exp()
    ),
    "embedding_bag max": lambda h: (
        F.embedding_bag(torch.tensor([[0, 2], [1, 1]]), h, mode="max") if h.ndim == 2 else h.exp()
    ),
    "rnn cell": lambda h: each(
        lambda x: torch.rnn_tanh_cell(x, x.cos(), fixed(4, 4), fixed(4, 4)), 1, h
    ),
    "gru cell": lambda h: each(
        lambda x: torch.gru_cell(x, x.cos(), fixed(12, 4), fixed(12, 4), fixed(12), fixed(12)), 1, h
    ),
    "lstm cell": lambda h: each(
        lambda x: torch.lstm_cell(
            x, (x.cos(), x.sin()), fixed(16, 4), fixed(16, 4), fixed(16), fixed(16)
        )[0],
        1,
        h,
    ),
    "gumbel": lambda h: (h - torch.log(-torch.log(0.5 + 0.3 * fixed(4)))).softmax(-1),
}


def _loss(fn: Callable[..., Tensor], h: Tensor) -> Tensor:
    """Apply a loss."""
    return fn(h, fixed(3, 4).expand(h.shape), reduction="none")


LOSSES: dict[str, Operation] = {
    **{
        name: partial(_loss, getattr(F, name))
        for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss")
    },
    "binary_cross_entropy": lambda h: F.binary_cross_entropy(
        h.sigmoid(), fixed(3, 4).sigmoid().expand(h.shape), reduction="none"
    ),
    "binary_cross_entropy_with_logits": lambda h: F.binary_cross_entropy_with_logits(
        h, fixed(3, 4).sigmoid().expand(h.shape), pos_weight=positive(fixed(4)), reduction="none"
    ),
    "cross_entropy": lambda h: each(
        lambda x: F.cross_entropy(
            x,
            TARGET.repeat(len(x) // 3),
            reduction="none",
            weight=positive(fixed(4)),
            label_smoothing=0.1,
        ),
        1,
        h,
    ),
    "cross_entropy by probabilities": lambda h: each(
        lambda x: F.cross_entropy(x, fixed(len(x), 4).softmax(-1), reduction="none"), 1, h
    ),
    "nll_loss": lambda h: each(
        lambda x: F.nll_loss(x.log_softmax(-1), TARGET.repeat(len(x) // 3), reduction="none"), 1, h
    ),
    "nll_loss of images": lambda h: each(
        lambda x: F.nll_loss(
            x.log_softmax(1), torch.ones(len(x), 4, dtype=torch.long), reduction="none"
        ),
        2,
        h,
    ),
    "nll_loss mean": lambda h: each(
        lambda x: F.nll_loss(x.mT, TARGET.expand(len(x), 3), reduction="none"), 2, h
    ),
    "poisson_nll_loss": lambda h: F.poisson_nll_loss(
        h, positive(fixed(4)).expand(h.shape), reduction="none", full=True
    ),
    "gaussian_nll_loss": lambda h: F.gaussian_nll_loss(
        h, fixed(4).expand(h.shape), positive(h.cos()), reduction="none"
    ),
    "hinge_embedding_loss": lambda h: F.hinge_embedding_loss(
        h, torch.tensor([1, -1, 1, -1]).expand(h.shape), reduction="none"
    ),
    "margin_ranking_loss": lambda h: F.margin_ranking_loss(
        h, h.cos(), torch.ones_like(h), reduction="none"
    ),
    "multi_margin_loss": lambda h: each(
        lambda x: F.multi_margin_loss(x, TARGET.repeat(len(x) // 3), reduction="none"), 1, h
    ),
    "multilabel_margin_loss": lambda h: each(
        lambda x: F.multilabel_margin_loss(
            x, torch.tensor([2, 0, -1, 1]).expand(len(x), 4), reduction="none"
        ),
        1,
        h,
    ),
    "multilabel_soft_margin_loss": lambda h: each(
        lambda x: F.multilabel_soft_margin_loss(
            x, fixed(4).sigmoid().expand(x.shape), reduction="none"
        ),
        1,
        h,
    ),
    "triplet_margin_loss": lambda h: each(
        lambda x: F.triplet_margin_loss(x, x.cos(), x.sin(), reduction="none"), 1, h
    ),
    "cosine_embedding_loss": lambda h: each(
        lambda x: F.cosine_embedding_loss(
            x, x.cos(), torch.ones(len(x)), margin=0.1, reduction="none"
        ),
        1,
        h,
    ),
    "ctc_loss": lambda h: each(
        lambda x: F.ctc_loss(
            x.log_softmax(-1).transpose(0, 1),
            torch.tensor([[1, 2]]).expand(len(x), 2),
            torch.full((len(x),), 3),
            torch.full((len(x),), 2),
            reduction="none",
        ),
        2,
        h,
    ),
}


def _recurrent(module: nn.Module, h: Tensor) -> Tensor:
    """Run a recurrent module."""
    return each(lambda x: module(x)[0], 2, h)


RECURRENT = {
    kind.__name__: kind(4, 3, batch_first=True, **OPTIONS) for kind in (nn.RNN, nn.GRU, nn.LSTM)
}
for _module in RECURRENT.values():
    for _parameter in _module.parameters():
        _parameter.requires_grad_(False).copy_(fixed(*_parameter.shape))

DISTRIBUTIONS: dict[str, Operation] = {
    "Normal.log_prob": lambda h: torch.distributions.Normal(h, positive(h)).log_prob(fixed(4)),
    "Gamma.log_prob": lambda h: torch.distributions.Gamma(
        positive(h), positive(h.cos()), validate_args=False
    ).log_prob(positive(fixed(4))),
    "Beta.entropy": lambda h: torch.distributions.Beta(
        positive(h), positive(h.cos()), validate_args=False
    ).entropy(),
    "Categorical.entropy": lambda h: torch.distributions.Categorical(
        logits=h, validate_args=False
    ).entropy(),
    "MultivariateNormal.log_prob": lambda h: (
        torch.distributions.MultivariateNormal(
            h[..., 0], scale_tril=triangular(h), validate_args=False
        )
        .log_prob(fixed(3))
        .unsqueeze(-1)
    ),
    "StudentT.log_prob": lambda h: torch.distributions.StudentT(
        positive(h), h, positive(h.cos()), validate_args=False
    ).log_prob(fixed(4)),
}

OPERATIONS: dict[str, Operation] = {
    **_unary(),
    **ARITHMETIC,
    **SHAPES,
    **PRODUCTS,
    **LINALG,
    **FOURIER,
    **LAYERS,
    **LOSSES,
    **{name: partial(_recurrent, module) for name, module in RECURRENT.items()},
    **DISTRIBUTIONS,
}
