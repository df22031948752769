"""Attention straight from the blocks where queries learn: forward by a kernel, gradients by dense attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

#: Attention of a query ``[batch, num_q_heads, q_len, head_dim]`` with attention sink logits ``[num_q_heads]`` or None.
Attend = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


def learns(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd wants the gradient of one of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


class RecomputedAttention(torch.autograd.Function):
    """What ``kernel`` computes, with the gradients of ``dense``, which computes the same up to rounding and runs only
    where somebody asks for them. What is stored has none.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, sinks: torch.Tensor | None, kernel: Attend, dense: Attend
    ) -> torch.Tensor:
        ctx.save_for_backward(query, sinks)
        ctx.dense = dense
        return kernel(query, sinks)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.enable_grad():
            inputs = [None if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors]
            out = ctx.dense(*inputs)
        found = iter(torch.autograd.grad(out, [x for x in inputs if x is not None], gradient))
        return (*(None if x is None else next(found) for x in inputs), None, None)
