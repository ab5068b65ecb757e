"""What any answer to a sequence fulfils, checked before it is kept: above all, that it is about these tokens and no others."""

import torch
from torch import Tensor

from speckd.errors import StoreError
from speckd.teachers.answers import Answer
from speckd.teachers.layout import Kind, Layout

_LABEL_TOLERANCE = 1e-2  # between two copies of one log-probability, absolute and relative
_MASS_TOLERANCE = 1e-4
_OTHER_TOKEN = "the label's log-probability contradicts the tokens' (an answer about another token, or one place off)"


def require_answer(token_ids: Tensor, answer: Answer, layout: Layout) -> None:
    """What any answer to these tokens fulfils, also that it is not about other tokens than those that follow.

    Raises:
        StoreError: naming what does not hold.
    """
    positions, log_probs, ids = answer.positions, answer.log_probs, answer.token_ids
    shape = (len(positions), layout.width)
    facts = {
        f"log-probabilities are {tuple(log_probs.shape)}, not {shape}": log_probs.shape == shape,
        "token ids are of another shape": (ids is None) == (layout.kind is Kind.FULL) and (ids is None or ids.shape == shape),
        "there is not one label log-probability a position": answer.label_log_probs.shape == shape[:1],
        "log-probabilities are not float32": log_probs.dtype == answer.label_log_probs.dtype == torch.float32,
        f"the tokens' order does not fit a {layout.kind} cache": answer.ranked == (layout.kind is not Kind.SAMPLED),
        "positions do not ascend": bool((positions.diff() > 0).all()),
        f"positions lie outside a sequence of {len(token_ids)} tokens": not len(positions)
        or (int(positions[0]) >= 0 and int(positions[-1]) < len(token_ids) - 1),
    }
    _require(facts)
    labels = answer.label_log_probs
    following = token_ids[positions + 1]
    _require(
        {
            "a log-probability is not a number, or above 0": _at_most_zero(log_probs) and _at_most_zero(labels),
            "log-probabilities sum to more than 1": bool((log_probs.double().exp().sum(-1) <= 1 + _MASS_TOLERANCE).all()),
            "a token of the sequence is outside the vocabulary": not len(token_ids)
            or (int(token_ids.min()) >= 0 and int(token_ids.max()) < layout.vocabulary_size),
        }
    )
    if ids is None:
        known = log_probs.gather(-1, following[:, None])[:, 0]
        return _require({_OTHER_TOKEN: bool(_near(known, labels).all())})
    _require(
        {
            "a token id is outside the vocabulary": not ids.numel()
            or (int(ids.min()) >= 0 and int(ids.max()) < layout.vocabulary_size),
            "a token is named twice at one position": bool((ids.sort(-1).values.diff(dim=-1) > 0).all()),
        }
    )
    if answer.ranked:
        found = ids == following[:, None]
        known = torch.where(found, log_probs, -torch.inf).amax(-1)
        last = log_probs[:, -1]
        inside = found.any(-1)
        _require(
            {
                "the most probable token is not first": bool((log_probs[:, 1:] <= log_probs[:, :-1]).all()),
                _OTHER_TOKEN: bool(torch.where(inside, _near(known, labels), (labels <= last) | _near(labels, last)).all()),
            }
        )


def _require(facts: dict[str, bool]) -> None:
    for wrong, holds in facts.items():
        if not holds:
            raise StoreError(f"the teacher's answer cannot be kept: {wrong}", "Ask the teacher about exactly these tokens")


def _at_most_zero(log_probs: Tensor) -> bool:
    return bool((log_probs <= _MASS_TOLERANCE).all())  # NaN is not


def _near(a: Tensor, b: Tensor) -> Tensor:
    return torch.isclose(a, b, rtol=_LABEL_TOLERANCE, atol=_LABEL_TOLERANCE)
