"""How far one distribution over the next token is from another."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Rows whose distributions are formed at once: 64 of 262,144 words are 64 MiB.
_ROWS = 64


@dataclass
class Divergence:
    """Per position: KL divergence in nats, whether the likeliest token is the same, and both losses.

    Args:
        kld: float64 ``[positions]``, of the unquantized distribution against the quantized one.
        same_top: bool ``[positions]``.
        nll, nll_dense: float64 ``[positions]`` negative log likelihood of the text's next token.
    """

    kld: torch.Tensor
    same_top: torch.Tensor
    nll: torch.Tensor
    nll_dense: torch.Tensor


def divergence(logits: torch.Tensor, dense: torch.Tensor, targets: torch.Tensor) -> Divergence:
    """Compare logits ``[positions, vocabulary]`` with those of the unquantized model; targets ``[positions]``."""
    parts = []
    for q, p, target in zip(logits.split(_ROWS), dense.split(_ROWS), targets.split(_ROWS)):
        log_q, log_p = q.float().log_softmax(-1), p.float().log_softmax(-1)
        kld = (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64)
        nll, nll_dense = (-x.gather(1, target[:, None])[:, 0].double() for x in (log_q, log_p))
        # float32 rounding can take a divergence of zero below it.
        parts.append((kld.clamp(min=0), q.argmax(-1) == p.argmax(-1), nll, nll_dense))
    return Divergence(*(torch.cat(column) for column in zip(*parts)))
