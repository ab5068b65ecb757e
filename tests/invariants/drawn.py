"""What hypothesis draws: batches of every awkward shape."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from speckd.tokens import SupervisedRows
from speckd.types import TokenKeys


@dataclass(frozen=True)
class Drawn:
    """`student`, `teacher`: [N, V] logits in float64; `labels`: [N]; `rows`: all of them supervised."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    rows: SupervisedRows


@st.composite
def batches(
    draw, max_tokens: int = 17, sizes: tuple[int, ...] = (2, 3, 7, 64), max_scale: float = 30.0, equal: bool = True
) -> Drawn:
    tokens, width = draw(st.integers(1, max_tokens)), draw(st.sampled_from(sizes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1e-3, 0.3, 1.0, 5.0, max_scale]))
    student, teacher = (scale * torch.randn(tokens, width, generator=generator, dtype=torch.float64) for _ in range(2))
    if equal and draw(st.booleans()):
        teacher[::2] = student[::2]  # equal rows
    if draw(st.booleans()):
        teacher[:, -1] = teacher[:, 0]  # ties
    labels = torch.randint(width, (tokens,), generator=generator)
    index = torch.arange(tokens)
    keys = TokenKeys(index // 5, index % 5, seed=draw(st.integers(0, 2**40)), epoch=draw(st.integers(0, 5)))
    return Drawn(student, teacher, labels, SupervisedRows(index, labels, keys))
