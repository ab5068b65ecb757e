"""`sequence_source: my_writer.py:MyWriter`: the documented example trains, and mistakes are one line."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from speckd.errors import ConfigError
from speckd.settings import load_settings
from speckd.sources.model_writer import ModelWriter
from speckd.sources.writer import Completion, Draws
from speckd.tasks import build_tokenizer
from speckd.trainer import SpecKDTrainer
from tests.repository.files import block
from tests.tiny import common_flags, log_of, run_cli, task_rows
from tests.trainer.conftest import World

PAGE = "docs/sources.md"


def test_the_documented_writer_trains(world: World, place: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    """What is trained on is the shortest finished one of the student's own three."""
    Path("my_writer.py").write_text(block("python: writer", PAGE))
    Path("run.yaml").write_text("max_steps: 3\nmax_completion_length: 12\n")
    words = shlex.split(block("command: writer", PAGE))
    assert words[:2] == ["speckd", "train"]
    flags = [*words[2:], *common_flags(world.student, world.teacher, world.data, Path("out"))]
    assert run_cli([*flags, "--dry-run"]) == 0 and "y by my_writer.py:ShortestOfThree" in capsys.readouterr().out
    written = {}
    known = ModelWriter.write

    def spying(self, prompts, sampling, draws: Draws):
        found = known(self, prompts, sampling, draws)
        written.setdefault(draws.turn, []).append(found)
        return found

    monkeypatch.setattr(ModelWriter, "write", spying)
    assert run_cli(flags) == 0
    log = log_of(Path("out"))
    assert [sorted(written), [entry["on_policy/staleness"] for entry in log]] == [list(range(9)), [0, 0, 0]]
    for step, entry in enumerate(log):
        tries = [written[3 * step + n][-1] for n in range(3)]  # the first, of step 0, was the trial
        best = [min(each, key=lambda one: (not one.finished, len(one.token_ids))) for each in zip(*tries, strict=True)]
        assert entry["completions/mean_length"] == pytest.approx(sum(len(one.token_ids) for one in best) / len(best))
        assert entry["grad_norm"] > 0 and entry["on_policy/fraction"] == pytest.approx(len(best) / 8)


HEAD = "import torch\nfrom speckd.sources.writer import Completion\n"
#: A writer that gives for each prompt what is written there.
GIVES = "class W:\n  def __init__(self, context): pass\n  def write(self, prompts, sampling, draws): return "
MISTAKES = {
    "no file": (None, "there is no file"),
    "no name": ("x = 1", "there is no 'W' in"),
    "no class": ("W = 5", "is no class. It is called with what there is to write with"),
    "no argument": ("class W: pass", "cannot be made (TypeError"),
    "no writer": ("class W:\n  def __init__(self, context): pass", "is not a writer: asked to continue a prompt of"),
    "fails": (GIVES + "prompts.nothing", "it fails (AttributeError"),
    "no list": (GIVES + "None", "gives NoneType for 1 prompts"),
    "too few": (GIVES + "[]", "gives 0 completions for 1 prompts"),
    "no completion": (GIVES + "[1 for p in prompts]", "it gives int and no Completion"),
    "a list of ids": (GIVES + "[Completion([5, 1], True) for p in prompts]", "are no tensor [n] of int64"),
    "halves": (GIVES + "[Completion(torch.ones(3), True) for p in prompts]", "are no tensor [n] of int64"),
    "too long": (GIVES + "[Completion(torch.full((11,), 5), False) for p in prompts]", "has 11 tokens, and may have 10"),
    "foreign": (GIVES + "[Completion(torch.tensor([5, 9999, 1]), True) for p in prompts]", "it writes token 9999"),
    "no end": (GIVES + "[Completion(torch.tensor([5, 6]), True) for p in prompts]", "ends with one of the stop_ids"),
    "not said": (GIVES + "[Completion(torch.tensor([5, 1]), False) for p in prompts]", "ends with one of the stop_ids"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_before_the_first_step(
    world: World, place: Path, capsys: pytest.CaptureFixture, case: str
) -> None:
    text, said = MISTAKES[case]
    if text is not None:
        Path("mine.py").write_text(HEAD + text + "\n")
    flags = [*common_flags(world.student, world.teacher, world.data, Path("out")), "--recipe", "ungated"]
    assert run_cli([*flags, *"--sequence_source mine.py:W --max_completion_length 10 --max_steps 2".split()]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: sequence_source: ") and said in error and not Path("out").exists(), json.dumps(error)


def test_what_is_wrong_later_ends_the_run_with_its_reason(world: World, place: Path, capsys: pytest.CaptureFixture) -> None:
    Path("mine.py").write_text(HEAD + GIVES + "[Completion(torch.tensor([5, 1]), True) for p in prompts if draws.turn < 1]\n")
    flags = [*common_flags(world.student, world.teacher, world.data, Path("out")), "--recipe", "ungated"]
    assert run_cli([*flags, *"--sequence_source mine.py:W --max_completion_length 10 --max_steps 2".split()]) == 2
    assert "error: sequence_source: mine.py:W gives 0 completions for 8 prompts" in capsys.readouterr().err
    assert len(log_of(Path("out"))) == 1


class Given:
    """A writer for Python: of what is to be written, one text for all."""

    def __init__(self, ids: list[int], dtype=torch.int64) -> None:
        self.completion = Completion(torch.tensor(ids, dtype=dtype), True)

    def write(self, prompts, sampling, draws: Draws) -> list[Completion]:
        return [self.completion for _ in prompts]


def trainer_with(world: World, writer: Given, *flags: str) -> SpecKDTrainer:
    own = "--use_cpu true --max_steps 1 --save_strategy no --disable_tqdm true --max_completion_length 4 --output_dir out"
    args = load_settings(None, "ungated", [*own.split(), *flags]).training
    student, teacher = (AutoModelForCausalLM.from_pretrained(path) for path in (world.student, world.teacher))
    rows = Dataset.from_list(task_rows(8))
    return SpecKDTrainer(student, teacher, args, rows, processing_class=build_tokenizer(), writer=writer)


@pytest.mark.parametrize(
    ("writer", "said"),
    [
        (Given([5, 6, 7, 8, 1]), "has 5 tokens, and may have 4"),
        (Given([5, 9999, 1]), "it writes token 9999"),
        (Given([5, 1], torch.int32), "are no tensor"),
    ],
)
def test_a_writer_given_in_python_is_looked_at_alike(world: World, place: Path, writer: Given, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^writer: Given: .*{said}"):
        trainer_with(world, writer, "--sequence_source", "student").train()


def test_a_writer_that_nobody_asks_is_refused(world: World, place: Path) -> None:
    with pytest.raises(ConfigError, match="sequence_source: dataset nobody asks it"):
        trainer_with(world, Given([5, 1]))
    trainer_with(world, Given([5, 1]), "--sequence_source", "student").train()
