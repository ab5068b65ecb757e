"""A run whose student's own text collapses is stopped, saved and explained, with exit code 5."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import common_flags, log_of, run_cli, write_rows
from tests.trainer.conftest import World

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"
RECIPE = "--gate none --rejected mask --divergence reverse_kl --sequence_source student --max_completion_length 24".split()
#: A step so long that no student survives it.
RUINOUS = "--learning_rate 1.0 --max_grad_norm 0 --max_steps 40".split()
WATCHED = "--collapse_threshold 0.7 --collapse_patience 3".split()


def test_a_student_that_collapses_is_stopped_and_without_the_alarm_is_not(world: World, tmp_path: Path, capsys) -> None:
    flags = [*common_flags(world.student, world.teacher, world.data, tmp_path / "watched"), *RECIPE, *RUINOUS, *WATCHED]
    assert run_cli(flags) == 5
    error = capsys.readouterr().err.strip().splitlines()[-1]
    step = json.loads((next((tmp_path / "watched").glob("checkpoint-*")) / "trainer_state.json").read_text())["global_step"]
    assert error.startswith("error: COLLAPSE: in the last 3 steps ") and "of the completions repeat themselves" in error
    assert f"step {step}, the last before the stop, is saved in" in error and "lower learning rate" in error
    log = log_of(tmp_path / "watched")
    assert log[0]["completions/repeated_fraction"] == 0 and log[-1]["completions/repeated_fraction"] > 0.5
    assert not (tmp_path / "watched" / "results.json").exists() and step < 40

    free = [*common_flags(world.student, world.teacher, world.data, tmp_path / "free"), *RECIPE, *RUINOUS]
    assert run_cli([*free, "--collapse_patience", "0"]) == 0
    assert [e["loss"] for e in log_of(tmp_path / "free")][:step] == [e["loss"] for e in log], "the alarm changes nothing before"
    # Who goes on from there with gentler settings is given the patience again.
    gentler = [*flags, "--resume_from_checkpoint", "true", "--allow_changed_config", "true", "--max_steps", str(step + 2)]
    assert run_cli([*gentler, "--collapse_threshold", "1.0"]) == 0


def shaken(folder: Path) -> Path:
    shutil.copytree(STORIES, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"NOT RUN: {STORIES.name} is not in ../shared/models")
def test_a_storyteller_that_collapses_is_stopped(tmp_path: Path, capsys) -> None:
    """stories260K teaches a copy of itself that has been shaken: stories at first, loops after some ruinous steps."""
    student = shaken(tmp_path / "student")
    starts = ["Once upon a time", "One day, a little girl", "There was a big dog", "Tom and Sam went to the"]
    rows = [{"prompt": start, "completion": " and they were happy."} for start in starts * 4]
    data = write_rows(tmp_path / "stories.jsonl", rows)
    flags = [*common_flags(student, STORIES, data, tmp_path / "out"), *RECIPE, *WATCHED, "--max_completion_length", "48"]
    assert run_cli([*flags, "--learning_rate", "0.1", "--max_grad_norm", "0", "--max_steps", "60"]) == 5
    assert "error: COLLAPSE: in the last 3 steps" in capsys.readouterr().err
    log = log_of(tmp_path / "out")
    assert log[0]["completions/repeated_fraction"] < 0.2 and list((tmp_path / "out").glob("checkpoint-*"))
