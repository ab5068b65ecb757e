"""docs/evaluating.md, held against what is there."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from speckd.evaluation import drafting, instructions, likelihood, mathematics, rouge
from speckd.evaluation.kinds import KINDS
from speckd.evaluation.options import Options, TaskOptions, load_options
from speckd.evaluation.statistics import STATISTICS
from tests.repository.files import ROOT, block

PAGE = (ROOT / "docs" / "evaluating.md").read_text()


@pytest.mark.parametrize("options", [Options, TaskOptions])
def test_the_page_has_every_option(options: type) -> None:
    assert [f.name for f in dataclasses.fields(options) if f"`{f.name}" not in PAGE] == []


def test_the_page_has_every_kind_and_metric() -> None:
    metrics = [
        *rouge.METRICS, *mathematics.METRICS, *instructions.METRICS, *likelihood.OWN, *likelihood.WITH_TEACHER,
        *drafting.DECODED, drafting.REFERENCE, drafting.CLOCK,
    ]  # fmt: skip
    assert [name for name in [*KINDS, *(metric.name for metric in metrics)] if f"`{name}`" not in PAGE] == []
    assert {metric.statistic for metric in metrics} == STATISTICS.keys()


def test_the_file_on_the_page_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "eval.yaml"
    path.write_text(block("yaml: evaluation", "docs/evaluating.md"))
    options = load_options(path, [], {name: kind.options for name, kind in KINDS.items()})
    assert {task.kind for _, task in options.tasks} == KINDS.keys()


def test_the_task_for_lm_eval_has_our_patterns_and_its_file() -> None:
    folder = ROOT / "examples" / "lm_eval"
    task = yaml.safe_load((folder / "gsm8k_local.yaml").read_text())
    patterns = [each["filter"][0]["regex_pattern"] for each in task["filter_list"]]
    assert patterns == [mathematics._STRICT.pattern, mathematics._FLEXIBLE.pattern]
    assert tuple(task["metric_list"][0]["regexes_to_ignore"]) == mathematics._IGNORED
    rows = [json.loads(line) for line in (ROOT / task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()]
    assert rows and all(mathematics.strict_answer(row["answer"]) for row in rows)
