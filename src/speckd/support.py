"""Puts student and teacher on one shared support, the last axis of every divergence."""

import torch
from torch import Tensor

from speckd.errors import CapabilityError
from speckd.types import DenseSignal, TeacherSignal, TopKSignal


def shared_support(student_logits: Tensor, teacher: TeacherSignal, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both on one support.

    The shared vocabulary (S = V) where the teacher is dense; the teacher's top-K plus one tail bucket that holds the rest of
    either distribution (S = K + 1) where it is not; no tail where K = V, so that case is exact.

    Args:
        student_logits: [N, V].
        teacher: the signal of the same rows.
        temperature: divides both sides' logits before the softmax.

    Returns:
        student and teacher log-probabilities, both [N, S], each summing to 1.

    Raises:
        CapabilityError: a temperature other than 1 with a truncated teacher, whose tail cannot be re-normalised.
    """
    student = log_softmax(student_logits / temperature)
    if isinstance(teacher, DenseSignal):
        return student, log_softmax(teacher.logits / temperature)
    reference = teacher_support(teacher, student_logits.shape[-1], temperature)
    if reference.shape == teacher.token_ids.shape:
        return student.gather(-1, teacher.token_ids), reference
    return _with_tail(student, teacher), reference


def label_places(teacher: TeacherSignal, labels: Tensor) -> Tensor:
    """[n] token ids -> where they stand on the shared support, [n]; in the tail, if the teacher does not list them."""
    if isinstance(teacher, DenseSignal):
        return labels
    found = teacher.token_ids == labels[:, None]
    return torch.where(found.any(-1), found.long().argmax(-1), teacher.token_ids.shape[-1])


def teacher_support(teacher: TopKSignal, vocabulary_size: int, temperature: float = 1.0) -> Tensor:
    """The truncated teacher's side: [N, K + 1], the tail last; [N, K] where K = V."""
    if teacher.token_ids.shape[-1] == vocabulary_size:
        return torch.log_softmax(teacher.log_probs / temperature, dim=-1)
    if temperature != 1:
        raise CapabilityError(
            f"divergence_temperature is {temperature}, but the teacher gives its top {teacher.token_ids.shape[-1]} only: "
            "its tail at that temperature is unknown",
            "Use divergence_temperature 1, or a teacher that gives the whole vocabulary",
        )
    tail = log1mexp(torch.logsumexp(teacher.log_probs.double(), dim=-1, keepdim=True))  # 1 − Σ loses digits: in float64
    return torch.cat([teacher.log_probs, tail.to(teacher.log_probs.dtype)], -1)


def _with_tail(student: Tensor, teacher: TopKSignal) -> Tensor:
    outside = student.scatter(-1, teacher.token_ids, -torch.inf)
    # Summing what is outside keeps every digit; 1 − Σ inside would cancel where the top-K holds nearly everything.
    nothing = (outside == -torch.inf).all(-1, keepdim=True)  # logsumexp of such a row has a NaN gradient
    tail = torch.logsumexp(outside.masked_fill(nothing, 0), dim=-1, keepdim=True).masked_fill(nothing, -torch.inf)
    return torch.cat([student.gather(-1, teacher.token_ids), tail], -1)


def log_softmax(logits: Tensor) -> Tensor:
    """[N, V] log-probabilities, differentiable. Torch's adds a row up entry by entry: 1e-5 off at V = 150,000 in float32."""
    shifted = logits - logits.detach().amax(-1, keepdim=True)
    return shifted - torch.logsumexp(shifted, -1, keepdim=True)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − exp(x)) for x ≤ 0 without cancellation (Mächler 2012); −inf at 0, and where rounding put x above 0."""
    x = x.clamp(max=0)
    return torch.where(x > -0.6931471805599453, torch.log(-torch.expm1(x)), torch.log1p(-x.exp()))
