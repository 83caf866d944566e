"""The elementwise kernels as differentiable functions, alone and in front of a product. Differentiable once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hf_linear.kernels import elementwise


def norm(x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight * silu(gate), shaped as x."""
    options = {"eps": eps, "dtype": dtype}
    functions = partial(elementwise.norm, **options), partial(elementwise.norm_backward, **options)
    return Elementwise.apply(*functions, x, gate, weight)


def add_norm(x: Tensor, added: Tensor | None, weight: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x + added, and its norm; where nothing is added, x itself."""
    return AddNorm.apply(x, added, weight, eps, dtype)


def norm_product(
    matrix: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """norm(x, gate, weight, eps, dtype), its last two dimensions as one, times matrix^T."""
    options = {"eps": eps, "dtype": dtype}
    functions = partial(elementwise.norm, **options), partial(elementwise.norm_backward, **options)
    return BeforeProduct.apply(*functions, matrix, x, gate, weight).view(*x.shape[:-2], -1)


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    return Elementwise.apply(elementwise.swiglu, elementwise.swiglu_backward, a, b)


def swiglu_product(matrix: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(silu(a) b) matrix^T."""
    return BeforeProduct.apply(elementwise.swiglu, elementwise.swiglu_backward, matrix, a, b).view(*a.shape[:-1], -1)


def decay(x: Tensor, n: float) -> Tensor:
    """log(sigmoid(x)) / n in float32."""
    return Decay.apply(x, float(n))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return Rotate.apply(x, cos, sin, interleaved)


class Elementwise(torch.autograd.Function):
    """y = forward(*inputs), which keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, forward: Callable, backward: Callable, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.gradients = backward
        return forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, _ = ctx.gradients(dy, *ctx.saved_tensors, recompute=False)
        return None, None, *gradients


class AddNorm(torch.autograd.Function):
    """The gradient of the sum that arrives by the residual stream joins that of the norm in the norm's kernel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor | None, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        if added is None:
            total, y = x, elementwise.norm(x, None, weight, eps, dtype)
        else:
            total, y = elementwise.add_norm(x, added, weight, eps, dtype)
        ctx.save_for_backward(total, weight)
        ctx.options = {"eps": eps, "dtype": dtype, "recompute": False}
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        dx, _, dweight, _ = elementwise.norm_backward(dy, total, None, weight, d_stream=d_total, **ctx.options)
        return dx, dx if ctx.needs_input_grad[1] else None, dweight, None, None


class BeforeProduct(torch.autograd.Function):
    """z = y matrix^T [rows, out] for y = forward(*inputs), which nobody keeps: dmatrix = dz^T y takes y from the kernel that
    computes the inputs' gradients and holds all of its factors anyway. The matrix may be in a wider dtype than y."""

    @staticmethod
    def forward(ctx: Any, forward: Callable, backward: Callable, matrix: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(matrix, *inputs)
        ctx.gradients = backward
        y = forward(*inputs).view(-1, matrix.shape[1])
        return F.linear(y, matrix.to(y.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        matrix, *inputs = ctx.saved_tensors
        learns = ctx.needs_input_grad[2]
        *gradients, y = ctx.gradients(dz @ matrix.to(dz.dtype), *inputs, recompute=learns)
        return None, None, dz.T @ y.view(-1, matrix.shape[1]) if learns else None, *gradients


class Decay(torch.autograd.Function):
    """Keeps its result, as the recurrence does that takes it: the two share it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: float) -> Tensor:
        g = elementwise.decay(x, n)
        ctx.save_for_backward(g)
        ctx.n, ctx.dtype = n, x.dtype
        return g

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dg: Tensor) -> tuple[Tensor, None]:
        (g,) = ctx.saved_tensors
        return elementwise.decay_backward(dg, g, ctx.n, ctx.dtype), None


class Rotate(torch.autograd.Function):
    """The gradient turns back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return elementwise.rotate(x, cos, sin, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return elementwise.rotate(dy, cos, -sin, ctx.interleaved), None, None, None
