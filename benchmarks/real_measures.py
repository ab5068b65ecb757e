"""What a model of `real_data.py` or `real_text.py` can do on held-out texts, by the tasks of `speckd evaluate`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from speckd.evaluation.kinds import KINDS
from speckd.evaluation.likelihood import correct_tokens
from speckd.evaluation.models import Models, positions
from speckd.evaluation.options import Options, TaskOptions
from speckd.evaluation.rows import read_rows
from speckd.evaluation.statistics import value
from speckd.evaluation.sums import columns
from speckd.quickstart.evaluation import block_efficiency
from speckd.sources.model_writer import ModelWriter
from speckd.sources.writer import Draws, Prompt, Sampling

BATCH_SIZE = 20
#: τ: prompts of each source, and the tokens of the teacher's greedy text that are drafted for.
DRAFTED_PROMPTS, DRAFTED_TOKENS = 16, 48

#: Prompt and completion's tokens, and how many of the last of them the teacher wrote.
Text = tuple[list[int], int]


@dataclass(frozen=True)
class Answers:
    """How a source's answers are scored: `kind` and `metric` of `speckd evaluate`, tokens of an answer, prompts asked."""

    kind: str
    metric: str
    max_new_tokens: int
    limit: int


ANSWERS = {
    "GSM8K": Answers("math", "strict_match", 100, 20),
    "MAWPS": Answers("math", "strict_match", 32, 40),
    "MBPP": Answers("code", "pass@1", 90, 40),
    "Dolly": Answers("rouge", "rouge_l", 50, 40),
}
OF_TEXT = ("nll", "kl", "agreement", "alpha")


def measure(
    model: Path, teacher: Path, data: Path, texts: Mapping[str, Sequence[Text]], sources: Mapping[str, Answers] = ANSWERS
) -> dict[str, dict[str, float]]:
    """By source: `nll`, `kl`, `agreement`, `alpha` a held-out token; `tau`; `answers`, by the metric in `ANSWERS`, and `asked`,
    how many answers that divides by.

    Args:
        data: folder with SOURCE.jsonl, `prompt` and `completion` a row.
        texts: of `teacher_texts`.
    """
    options = Options(model_name_or_path=str(model), teacher_model_name_or_path=str(teacher), device="cpu")
    models, found = Models.of(options), {}
    for source, how in sources.items():
        # The prompts are those of training, not the ones that the tasks know for such rows.
        common = {"data": str(data / f"{source}.jsonl"), "prompt_template": "{prompt}", "reference_column": "completion"}
        text = TaskOptions(kind="likelihood", **common)
        answers = TaskOptions(kind=how.kind, **common, limit=how.limit, max_new_tokens=how.max_new_tokens)
        own = _task(source, text, options, models, OF_TEXT) | _task(source, answers, options, models, (how.metric,))
        own["answers"] = own.pop(how.metric)
        found[source] = own | {"tau": block_efficiency(correct_tokens(list(texts[source]), models))}
    return found


def _task(name: str, task: TaskOptions, options: Options, models: Models, metrics: Sequence[str]) -> dict[str, float]:
    work = KINDS[task.kind].make(name, task, options)
    items = work.items(read_rows(name, task)[1], models)
    lines = [
        record.line()
        for start in range(0, len(items), BATCH_SIZE)
        for record in work.records(items[start : start + BATCH_SIZE], models)
    ]
    examples = list(columns(lines).values())
    found = {metric.name: value(metric, examples) for metric in work.metrics(lines) if metric.name in metrics}
    some = {name: number for name, number in found.items() if number is not None}
    return some if task.kind == "likelihood" else some | {"asked": float(len(items))}


@cache
def teacher_texts(teacher: Path, data: Path, path: Path, sources: tuple[str, ...] = tuple(ANSWERS)) -> dict[str, list[Text]]:
    """The teacher's greedy continuations of each source's first prompts; kept in `path`."""
    if not path.is_file():
        path.write_text(json.dumps(_written(teacher, data, sources)) + "\n")
    return {source: [(ids, count) for ids, count in texts] for source, texts in json.loads(path.read_text()).items()}


def _written(teacher: Path, data: Path, sources: Sequence[str]) -> dict[str, list[Text]]:
    models = Models.of(Options(model_name_or_path=str(teacher), device="cpu"))
    writer = ModelWriter(models.model, sorted(models.rendering.stops), positions=positions(models.model))
    greedy, found = Sampling(temperature=0.0, max_completion_length=DRAFTED_TOKENS), {}
    for source in sources:
        lines = (data / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()[:DRAFTED_PROMPTS]
        prompts = [models.rendering.prompt_ids({"prompt": json.loads(line)["prompt"]}) for line in lines]
        written = writer.write([Prompt(torch.tensor(ids), place) for place, ids in enumerate(prompts)], greedy, Draws(0, 0))
        found[source] = [
            ([*ids, *one.token_ids.tolist()], len(one.token_ids)) for ids, one in zip(prompts, written, strict=True)
        ]
    return found
