"""How likely held-out text is to the model, how near its distributions are to the teacher's, and whether it knows what it
knows: the measures of `speckd.evaluate`, sequence by sequence."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from speckd.compatibility import SharedVocabulary
from speckd.errors import DataError
from speckd.evaluate import TokenMeasures, token_measures
from speckd.evaluation.items import Item, Record, asked, require_known, said_to_template
from speckd.evaluation.models import Models, positions, width
from speckd.evaluation.options import TaskOptions
from speckd.evaluation.rows import Row
from speckd.evaluation.statistics import Metric
from speckd.head import LMHead
from speckd.teachers import HiddenTeacher
from speckd.tokens import SupervisedRows, TokenBatch, supervised_rows
from speckd.trl_internals import common_prefix_length
from speckd.types import IGNORED_LABEL, Capabilities

#: Token ids, and how many of the last of them are asked about.
Text: TypeAlias = tuple[Sequence[int], int]

BINS = 15
_TOKENS = "supervised tokens"
_BIN_COLUMNS = tuple(f"{name}.{place}" for name in ("bin_confidence", "bin_correct") for place in range(BINS))
OWN = (
    Metric("nll", ("nll", "supervised"), f"{_TOKENS}; nats"),
    Metric("top_1", ("correct", "supervised"), f"{_TOKENS}: the most probable token is the text's"),
    Metric("brier", ("brier", "supervised"), f"{_TOKENS}: Σ over the vocabulary of squared errors, 0 to 2"),
    Metric(
        "ece", ("supervised", *_BIN_COLUMNS), f"{_TOKENS}: top-1 probability against top-1 accuracy, {BINS} equal-width bins",
        "calibration_error",
    ),
)  # fmt: skip
WITH_TEACHER = (
    Metric("teacher_nll", ("teacher_nll", "supervised"), f"{_TOKENS}; nats"),
    Metric("kl", ("kl", "supervised"), f"{_TOKENS}; KL(teacher ‖ model), nats"),
    Metric("agreement", ("agreement", "supervised"), f"{_TOKENS}: both have the same most probable token"),
    Metric("alpha", ("alpha", "supervised"), f"{_TOKENS}: Σ min(p, q)"),
    Metric("tar", ("tar", "examples"), "sequences: the share of their tokens that the Top-5 rule accepts"),
    Metric("tar_micro", ("accepted", "supervised"), f"{_TOKENS}: accepted by the Top-5 rule"),
)


@dataclass
class Likelihood:
    """See `Task`. Rows are prompt and completion (the completion is asked about), messages (the last answer), or text (all)."""

    name: str
    options: TaskOptions
    seed: int
    needs_teacher: bool = False

    def items(self, rows: Sequence[Row], models: Models) -> list[Item]:
        """See `Task`."""
        found = [whole_item(self.name, row, self.options, models) for row in rows]
        require_known(self.name, found, models)
        return found

    def records(self, items: Sequence[Item], models: Models) -> list[Record]:
        """See `Task`."""
        most = longest(self.options, models)
        sums = sequence_sums([cut(item, most) for item in items], models)
        return [
            Record(item, "", len(item.ids[:most]), len(item.ids) > most, own) for item, own in zip(items, sums, strict=True)
        ]

    def metrics(self, lines: Sequence[Mapping[str, Any]]) -> Sequence[Metric]:
        """See `Task`."""
        return OWN + (WITH_TEACHER if any("kl" in line["scores"] for line in lines) else ())

    def counts(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """See `Task`; `truncated`: texts cut off at max_length or at the models' positions."""
        return {
            "sequences": len(lines),
            "tokens": sum(line["tokens"] for line in lines),
            "supervised": int(sum(line["scores"]["supervised"] for line in lines)),
            "truncated": sum(line["truncated"] for line in lines),
        }


def whole_item(name: str, row: Row, task: TaskOptions, models: Models) -> Item:
    """Prompt and reference as training reads them, the end token included.

    Raises:
        DataError: nothing in the row is asked about.
    """
    where = f"tasks: {name}: row {row.number + 1}"
    if row.reference is None:
        raise DataError(f"{where}: there is no text to be asked about", "Name its column with reference_column")
    prompt = asked(name, row, task, models)
    more = said_to_template(row)
    before = models.rendering.prompt_ids({"prompt": prompt, **more}) if prompt else []
    completion: Any = row.completion if isinstance(prompt, str) else [{"role": "assistant", "content": row.reference}]
    ids = models.rendering.trained_ids({"prompt": prompt, "completion": completion, **more})
    supervised = min(len(ids) - common_prefix_length(before, ids), len(ids) - 1)
    if supervised < 1:
        raise DataError(f"{where}: no token of it is asked about", "Give a completion, or text of two tokens or more")
    return Item(row, 0, tuple(ids), supervised)


def cut(item: Item, most: int) -> Text:
    """What is read of a text, of which so many tokens are."""
    return item.ids[:most], max(0, item.supervised - len(item.ids[most:]))


def longest(task: TaskOptions, models: Models) -> int:
    """Tokens that are read of a text at most."""
    own = [models.model] + ([models.teacher_model] if models.teacher is not None else [])
    return min([task.max_length or 2**31, *(positions(model) or 2**31 for model in own)])


def sequence_sums(texts: Sequence[Text], models: Models) -> list[dict[str, Any]]:
    """By text, the sums over what is asked about, in the columns of the metrics."""
    rows, found = _measured(texts, models)
    return _summed(found, rows, len(texts))


def correct_tokens(texts: Sequence[Text], models: Models) -> list[Tensor]:
    """By text, [n] bool: is the model's most probable shared token the one that follows?"""
    rows, found = _measured(texts, models)
    some = [measures.correct for _, measures in found if measures.correct is not None]
    verdicts = torch.cat([torch.zeros(0, device=models.device), *some]) > 0
    sizes = torch.bincount(rows.keys.sample.cpu(), minlength=len(texts))
    return list(verdicts.cpu().split(sizes.tolist()))


@torch.no_grad()
def _measured(texts: Sequence[Text], models: Models) -> tuple[SupervisedRows, Iterator[tuple[Tensor, TokenMeasures]]]:
    batch, mask = _padded(texts, models.device)
    model, answers = models.model, None
    shared = SharedVocabulary(width(model)) if models.teacher is None else models.vocabulary
    labels = shared.labels(batch.labels)
    rows = supervised_rows(TokenBatch(batch.input_ids, labels, batch.sample_ids, batch.position_ids))
    if models.teacher is not None:
        head = shared.restrict(LMHead.from_model(models.teacher_model))
        answers = HiddenTeacher(_hidden(models.teacher_model, batch, mask), head)
    head = shared.restrict(LMHead.from_model(model))
    return rows, token_measures(_hidden(model, batch, mask), head, answers, rows, Capabilities(), calibration=True)


def _hidden(model: Any, batch: TokenBatch, mask: Tensor) -> Tensor:
    out = model.get_decoder()(input_ids=batch.input_ids, attention_mask=mask, use_cache=False)
    return out.last_hidden_state.flatten(0, 1)


def _padded(texts: Sequence[Text], device: torch.device) -> tuple[TokenBatch, Tensor]:
    length = max(len(ids) for ids, _ in texts)
    ids, mask = torch.zeros(2, len(texts), length, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED_LABEL)
    for row, (text, supervised) in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
        start = len(text) - max(0, supervised)
        labels[row, start : len(text)] = ids[row, start : len(text)]
    samples = torch.arange(len(texts))[:, None].expand_as(ids)
    places = torch.arange(length).expand_as(ids)
    return TokenBatch(*(each.to(device) for each in (ids, labels, samples, places))), mask.to(device)


def _summed(found: Any, rows: SupervisedRows, count: int) -> list[dict[str, Any]]:
    sums: dict[str, Tensor] = {"supervised": torch.bincount(rows.keys.sample.cpu(), minlength=count).double()}
    for chunk, measures in found:
        sample = rows.keys.sample[chunk].cpu()
        for name, values in _named(measures):
            shape = (count, *values.shape[1:])
            own = sums.setdefault(name, torch.zeros(shape, dtype=torch.float64))
            own.index_add_(0, sample, values.cpu())
    if "accepted" in sums:
        sums["tar"] = sums["accepted"] / sums["supervised"]
    some = [{name: values[row].tolist() for name, values in sums.items()} for row in range(count)]
    return [own if own["supervised"] else {"supervised": 0.0} for own in some]  # one whose prompt fills all that is read


def _named(measures: TokenMeasures) -> list[tuple[str, Tensor]]:
    names = ("nll", "teacher_nll", "kl", "agreement", "alpha", "accepted", "correct", "brier")
    found = [(name, values) for name in names if (values := getattr(measures, name)) is not None]
    assert measures.confidence is not None
    assert measures.correct is not None
    place = (measures.confidence * BINS).long().clamp(max=BINS - 1)
    for name, values in (("bin_confidence", measures.confidence), ("bin_correct", measures.correct)):
        spread = torch.zeros(len(place), BINS, dtype=torch.float64, device=place.device)
        found.append((name, spread.scatter_(1, place[:, None], values[:, None])))
    return found
