"""THE METHOD, unfused, on one screen: propose → verify → weigh → diverge (arXiv 2510.24021). The oracle of the tests.

The rest of the package computes this without holding [tokens, vocabulary] and with more choices at every step; where the two
differ, this file is right.
"""

import torch
from torch import Tensor

from speckd.divergences import forward_kl
from speckd.types import Divergence


def speckd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    supervised: Tensor,
    k: int = 5,
    rejected_weight: float = 0.01,
    divergence: Divergence = forward_kl,
    uniforms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """L = (1/|y|) Σ_t V_t · D(p_t ‖ q_t) and the token acceptance rate.

    Args:
        student_logits, teacher_logits: [B, L, V], aligned: position t of both predicts the same token.
        supervised: [B, L] bool, at least one in every sequence.
        k: top-k (greedy) or the number of candidates (Spec-k).
        rejected_weight: β, the weight of a rejected token; 0 masks it.
        divergence: D, of log-probabilities.
        uniforms: [B, L, k, 2] for Spec-k; None verifies the greedy proposal.

    Returns:
        the loss, and TAR (macro: the mean over sequences of the accepted fraction), both scalars.
    """
    log_q, log_p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    with torch.no_grad():
        if uniforms is None:
            proposal = log_q.argmax(-1, keepdim=True)  # propose
            accepted = (log_p.topk(k).indices == proposal).any(-1)  # verify
        else:
            cdf = log_q.exp().double().cumsum(-1)
            candidates = torch.searchsorted(cdf, uniforms[..., 0] * cdf[..., -1:], right=True)  # propose
            ratio = (log_p - log_q).gather(-1, candidates).exp()
            accepted = (uniforms[..., 1] < ratio.clamp(max=1)).any(-1)  # verify
        weight = rejected_weight + (1 - rejected_weight) * accepted.to(log_q.dtype)  # weigh
        length = supervised.sum(-1)
        acceptance_rate = ((accepted & supervised).sum(-1) / length).mean()
    per_token = divergence(log_q, log_p)  # diverge
    return (weight * per_token * supervised).sum() / supervised.sum(), acceptance_rate
