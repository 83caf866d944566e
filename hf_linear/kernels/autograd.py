"""Kernels as PyTorch operators: differentiable once, and one node each of a compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Function = Callable[..., Any]


def operator(
    name: str, forward: Function, backward: Function, fakes: tuple[Function, Function], save: Function, differentiate: Function
) -> Function:
    """hf_linear::NAME and hf_linear::NAME_backward, and what calls the former.

    Eager calls go round the dispatcher: on a small shape it takes longer than the kernels.

    Args:
        forward, backward: launch the kernels; their annotations become the operators' schemas.
        fakes: the same with empty tensors for results.
        save: (ctx, inputs, output), of what the gradients need.
        differentiate: (backward, ctx, *gradients of the output), the gradients of the inputs by `backward`, which is the
            function above or the operator.
    """
    for called, function, fake in zip((name, f"{name}_backward"), (forward, backward), fakes, strict=True):
        path = f"hf_linear::{called}"
        torch.library.define(path, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(path, ("cpu", "cuda"))(function)
        torch.library.register_fake(path)(fake)
    node, node_backward = (getattr(torch.ops.hf_linear, called) for called in (name, f"{name}_backward"))

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        save(ctx, inputs, output)
        ctx.set_materialize_grads(False)

    torch.library.register_autograd(f"hf_linear::{name}", partial(differentiate, node_backward), setup_context=setup_context)

    gradients = staticmethod(once_differentiable(partial(differentiate, backward)))

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return output

        backward = gradients

    def call(*inputs: Any) -> Any:
        return node(*inputs) if torch.compiler.is_compiling() else Eager.apply(*inputs)

    return call
