"""`tokens.jsonl`: some samples token by token, as student, teacher and gate see them at the start and at the end of a run.

A report shows them without the models. One JSON object a line is one sample at one step; null is what is not known: a top-K
teacher does not say how probable a token outside its K is. Every probability is that of the full softmax at temperature 1.
"""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from speckd.collation import Wanted, sequences_in
from speckd.divergences import forward_kl
from speckd.engine import LossOutput, distillation_loss
from speckd.errors import SpeckdError
from speckd.looking import Chunk, Looked, look
from speckd.step_lines import TOKENS, TOKENS_FORMAT, write_of_step
from speckd.support import shared_support
from speckd.trainer import SpecKDTrainer
from speckd.types import BatchGate, DenseSignal, TeacherSignal, TopKSignal, notation_of

logger = logging.getLogger(__name__)

#: Of one sample: tokens before the first supervised one, supervised and later ones, and the teacher's favourites of each.
_CONTEXT, _TOKENS, _FAVOURITES = 128, 512, 5
#: Tokens before one that decide which blanks it adds.
_NEAR = 8


class TokenRecord:
    """Keeps the record of a run in its folder.

    All processes call it equally often, for a teacher cut over processes needs them all; the first one writes. It changes
    nothing of the training, and a failure of it ends nothing.

    Args:
        trainer: ready to train.
        folder: the run's.
        samples: how many; 0 keeps none.
    """

    def __init__(self, trainer: SpecKDTrainer, folder: Path, samples: int) -> None:
        self._trainer, self._path = trainer, folder / TOKENS
        self._held_out = trainer.eval_dataset is not None
        self._asked = _spread(_data(trainer), samples) if samples and trainer.source is not None else []

    def keep(self) -> None:
        """Adds the samples as they are at this step of the run."""
        step = self._trainer.state.global_step
        try:
            lines = [self._line(one) for one in self._asked]
        except SpeckdError as error:
            logger.warning("No token record of step %d (for reports): %s", step, error)
            return
        if lines and self._trainer.is_world_process_zero():
            write_of_step(self._path, step, lines)

    @torch.no_grad()
    def _line(self, one: Wanted) -> dict[str, Any]:
        """A sample by itself: what one teacher's server says of it does not depend on the others."""
        trainer = self._trainer
        looked = look(trainer, [one], trainer.source)
        output = _objectives_view(trainer, looked)
        found = [_of_chunk(chunk, looked) for chunk in looked.chunks()]
        columns = {name: [value for part in found for value in part[name]] for name in found[0]}
        columns |= _weights(trainer, output)
        source = trainer.source
        assert source is not None
        gate = trainer.objective.gate
        head = {
            "format": TOKENS_FORMAT,
            "row": one.row,
            "data": "held out" if self._held_out else "training",
            "task": None if trainer.tasks is None else trainer.tasks[one.row - 1],
            "length": len(one.token_ids),
            "gate": notation_of(gate) if trainer.objective.needs_teacher else None,
            "ranked_among": len(looked.rows) if isinstance(gate, BatchGate) and trainer.objective.needs_teacher else None,
            "teacher_top_k": source.capabilities.top_k,
        }
        return {**head, "tokens": list(_tokens(trainer.processing_class, one, columns))}


def _data(trainer: SpecKDTrainer) -> Dataset:
    """The held-out data, the first where there are several; without any, what is trained on."""
    held_out = trainer.eval_dataset
    if isinstance(held_out, dict):
        held_out = next(iter(held_out.values()), None)
    return trainer.train_dataset if held_out is None else held_out


def _spread(data: Dataset, count: int) -> list[Wanted]:
    """Samples at equal distances, for data are often in some order; of a packed line, its first one."""
    count = min(count, len(data))
    lines = [round(number * (len(data) - 1) / max(1, count - 1)) for number in range(count)]
    found = (next(sequences_in(data.select([line])), None) for line in dict.fromkeys(lines))
    return [one for one in found if one is not None]


def _objectives_view(trainer: SpecKDTrainer, looked: Looked) -> LossOutput | None:
    """By the engine itself: acceptance and divergence are what training would compute of these rows alone."""
    if not trainer.objective.needs_teacher:
        return None
    return distillation_loss(
        trainer.objective, looked.hidden, looked.head, looked.answers, looked.rows, None, None, looked.reference
    )


def _weights(trainer: SpecKDTrainer, output: LossOutput | None) -> dict[str, list[Any]]:
    if output is None:  # SFT, whose teacher is but a measure
        return {}
    terms, share = output.terms, 1 - trainer.objective.label_loss_weight
    on, fallback = trainer.objective.rejected.weights(terms.acceptance)
    columns = {
        "acceptance": terms.acceptance,
        "weight": share * on,
        "fallback_weight": share * fallback,
        "divergence": terms.divergence,
    }
    return {name: _numbers(column) for name, column in columns.items()}


def _of_chunk(chunk: Chunk, looked: Looked) -> dict[str, list[Any]]:
    """By name, a value for each row."""
    student, teacher, labels = chunk.student, chunk.teacher, chunk.rows.labels
    assert teacher is not None
    proposals = student.argmax()
    found: dict[str, list[Any]] = {
        "proposal": looked.token_ids(proposals).tolist(),
        "q_label": _probabilities(student.label_log_prob(labels)),
        "q_proposal": _probabilities(student.label_log_prob(proposals)),
        "p_label": _of_label(teacher, labels),
    }
    if isinstance(teacher, TopKSignal) and not teacher.ranked:  # tokens drawn at random: counts, not probabilities
        return found | dict.fromkeys(("p_proposal", "favourites", "entropy", "kl"), [None] * len(labels))
    own, reference = shared_support(student.logits, teacher)
    return found | {
        "p_proposal": _of_proposal(teacher, proposals),
        "favourites": _favourites(teacher, looked),
        "entropy": _numbers(teacher.entropy()),
        "kl": _numbers(forward_kl(own, reference)),
    }


def _of_proposal(teacher: TeacherSignal, proposals: Tensor) -> list[Any]:
    """Of a proposal outside a top K nothing is known."""
    found = _numbers(teacher.log_prob(proposals[:, None])[:, 0].double().exp())
    return [None if value == 0 else value for value in found] if isinstance(teacher, TopKSignal) else found


def _of_label(teacher: TeacherSignal, labels: Tensor) -> list[Any]:
    if isinstance(teacher, TopKSignal) and teacher.label_log_probs is None:
        return [None] * len(labels)
    return _probabilities(teacher.label_log_prob(labels))


def _favourites(teacher: TeacherSignal, looked: Looked) -> list[Any]:
    """Of each row, the teacher's most probable tokens: [id, probability], best first."""
    best, places = teacher.log_probs.topk(min(_FAVOURITES, teacher.log_probs.shape[-1]))
    ids = looked.token_ids(places if isinstance(teacher, DenseSignal) else teacher.token_ids.gather(-1, places))
    probabilities = best.double().exp().tolist()
    return [
        [[token, _rounded(probability)] for token, probability in zip(*row, strict=True)]
        for row in zip(ids.tolist(), probabilities, strict=True)
    ]


def _tokens(tokenizer: Any, one: Wanted, columns: dict[str, list[Any]]) -> Any:
    """A dictionary a token: the context, then what is supervised, as far as there is room."""
    ids, supervised = one.token_ids.tolist(), {position + 1: number for number, position in enumerate(one.positions.tolist())}
    first = min(supervised)
    for position in range(max(0, first - _CONTEXT), min(len(ids), first + _TOKENS)):
        token = {"position": position, "id": ids[position], "text": _in_place(tokenizer, ids, position)}
        number = supervised.get(position)
        if number is not None:
            token |= {name: values[number] for name, values in columns.items()}
            token["token_text"], token["proposal_text"] = (_text(tokenizer, i) for i in (ids[position], token["proposal"]))
            if token["favourites"] is not None:
                token["favourites"] = [[i, _text(tokenizer, i), p] for i, p in token["favourites"]]
        yield {**token, "supervised": number is not None}


def _in_place(tokenizer: Any, ids: list[int], position: int) -> str:
    """What the token adds to the text before it, blanks included."""
    before = ids[max(0, position - _NEAR) : position]
    shorter, longer = (_decoded(tokenizer, some) for some in (before, [*before, ids[position]]))
    added = longer.removeprefix(shorter)
    return added if longer.startswith(shorter) and added and "\ufffd" not in longer else _text(tokenizer, ids[position])


def _text(tokenizer: Any, token_id: int) -> str:
    """By itself; a part of a letter by the tokenizer's own name for it."""
    text = _decoded(tokenizer, [token_id])
    return str(tokenizer.convert_ids_to_tokens(token_id)) if not text or "\ufffd" in text else text


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _probabilities(log_probs: Tensor) -> list[float | None]:
    return _numbers(log_probs.double().exp())


def _numbers(values: Tensor) -> list[float | None]:
    return [_rounded(value) for value in values.double().tolist()]


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
