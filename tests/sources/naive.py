"""Interleaved sampling as its paper states it, token by token, without caches, blocks, batches; and its exact distribution.

Speculative Knowledge Distillation, Xu et al., arXiv 2410.11325, Algorithm 1: "y_i ~ M_s(.|y_<i, x_j)  [sample y_i from
student M_s]; if y_i not in top_K(M_t(.|y_<i, x_j))  [if y_i is not within top K token of teacher M_t]: y_i ~ M_t(.|y_<i, x_j)
[we replace student token to teacher's resampled token]".
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from speckd.sources.sampling import uniform_pairs_at
from speckd.sources.writer import Draws, Sampling

Rule = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


@torch.no_grad()
def next_logits(model: Any, text: Sequence[int], ids: Sequence[int]) -> np.ndarray:
    """[V] float64 over the shared tokens, from one forward of the whole text."""
    return model(input_ids=torch.tensor([list(text)]), use_cache=False).logits[0, -1].double().numpy()[list(ids)]


def sampled_from(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """[V] probabilities: temperature, then top-k, then top-p."""
    if sampling.temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    scaled = logits / sampling.temperature
    probs = np.exp(scaled - scaled.max())
    order = np.argsort(-probs, kind="stable")
    if sampling.top_k:
        probs[order[sampling.top_k :]] = 0
    probs /= probs.sum()
    taken = 0.0
    for token in order:
        if taken >= sampling.top_p:
            probs[token] = 0
        taken += probs[token]
    return probs / probs.sum()


def in_top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """[V] bool."""
    return (logits[:, None] < logits[None, :]).sum(-1) < k


def drawn(probs: np.ndarray, chance: float) -> int:
    return int(np.searchsorted(np.cumsum(probs) / probs.sum(), chance, side="right"))


def write(
    student: Any,
    teacher: Any,
    prompt: Sequence[int],
    sample: int,
    sampling: Sampling,
    draws: Draws,
    k: int,
    stops: Sequence[int] = (),
    teacher_sampling: Sampling | None = None,
    ids: Sequence[int] | None = None,
) -> tuple[list[int], list[bool], bool]:
    """Tokens, which of them were replaced, and whether a stop token ended them. `ids`: the shared tokens."""
    ids = range(student.config.vocab_size) if ids is None else ids
    written, replaced = [], []
    while len(written) < sampling.max_completion_length:
        text = [*prompt, *written]
        propose, replace = uniform_pairs_at(draws, torch.tensor([sample]), torch.tensor([len(text)]))[0].tolist()
        token = drawn(sampled_from(next_logits(student, text, ids), sampling), propose)
        known = next_logits(teacher, text, ids)
        rejected = not in_top_k(known, k)[token]
        if rejected:
            token = drawn(sampled_from(known, teacher_sampling or Sampling()), replace)
        written.append(ids[token])
        replaced.append(rejected)
        if ids[token] in stops:
            return written, replaced, True
    return written, replaced, False


def the_rule(q: np.ndarray, p: np.ndarray, k: int) -> np.ndarray:
    """[V]: a token is the student's where it is in the teacher's top-K; the rest of the student goes to all of the teacher."""
    inside = in_top_k(p, k)
    return q * inside + p * q[~inside].sum()


def only_from_top_k(q: np.ndarray, p: np.ndarray, k: int) -> np.ndarray:
    """Another rule: a replacement comes from the teacher's top-K."""
    inside = in_top_k(p, k)
    return q * inside + p * inside / p[inside].sum() * q[~inside].sum()


def speculative(q: np.ndarray, p: np.ndarray, k: int) -> np.ndarray:
    """Another rule: speculative decoding, whose text is the teacher's."""
    return p


def distribution(
    student: Any, teacher: Any, prompt: Sequence[int], length: int, k: int, stops: Sequence[int], rule: Rule = the_rule
) -> dict[tuple[int, ...], float]:
    """Every text that can be written, with its probability."""
    ids = range(student.config.vocab_size)
    found, open_texts = {}, {(): 1.0}
    for _ in range(length):
        longer = {}
        for text, mass in open_texts.items():
            q, p = (sampled_from(next_logits(model, [*prompt, *text], ids), Sampling()) for model in (student, teacher))
            longer.update({(*text, token): mass * chance for token, chance in enumerate(rule(q, p, k))})
        found.update({text: mass for text, mass in longer.items() if text[-1] in stops})
        open_texts = {text: mass for text, mass in longer.items() if text[-1] not in stops}
    return found | open_texts


def expected_replacements(
    student: Any, teacher: Any, prompt: Sequence[int], length: int, k: int, stops: Sequence[int]
) -> float:
    """Replaced tokens in a text, on average."""
    ids, total = range(student.config.vocab_size), 0.0
    for written in range(length):
        for text, mass in distribution(student, teacher, prompt, written, k, stops).items():
            if not text or text[-1] not in stops:
                q, p = (sampled_from(next_logits(model, [*prompt, *text], ids), Sampling()) for model in (student, teacher))
                total += mass * q[~in_top_k(p, k)].sum()
    return total


def chi_square(expected: dict[tuple[int, ...], float], texts: Sequence[tuple[int, ...]]) -> float:
    """The chance of a chi-square at least so large. Cells with fewer than 5 expected are one."""
    counts = dict.fromkeys(expected, 0)
    for text in texts:
        counts[text] += 1  # a text that cannot be raises
    wanted = np.array([mass * len(texts) for mass in expected.values()])
    seen = np.array(list(counts.values()), dtype=float)
    rare = wanted < 5
    wanted, seen = (np.append(cells[~rare], cells[rare].sum()) for cells in (wanted, seen))
    if wanted[-1] == 0:  # such texts cannot be
        if seen[-1]:
            return 0.0
        wanted, seen = wanted[:-1], seen[:-1]
    freedom = len(wanted) - 1
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(statistic / 2).double()))
