"""Recipes joined by `+`, in files and on the command line."""

from pathlib import Path

import pytest

from speckd.cli import main
from speckd.divergences import AlphaBeta, LabelNLL, forward_kl, todi
from speckd.errors import ConfigError
from speckd.gates import NoGate, TopK
from speckd.objective import Objective
from speckd.policies import DownWeight
from speckd.settings import load_settings


def objective_of(place: Path, recipe: str | None, *flags: str, file: str | None = None) -> Objective:
    config = None
    if file is not None:
        config = place / "run.yaml"
        config.write_text(file)
    return load_settings(config, recipe, ["--output_dir", str(place / "out"), "--use_cpu", "true", *flags]).training.objective()


def test_a_gate_is_laid_over_a_baseline(tmp_path: Path) -> None:
    wanted = Objective(TopK(5), DownWeight(0.01), AlphaBeta(0.2, 0.7))
    assert objective_of(tmp_path, "abkd+speckd") == wanted
    assert objective_of(tmp_path, None, "--recipe", "abkd+speckd") == wanted
    assert objective_of(tmp_path, None, file="recipe: abkd+speckd\n") == wanted
    assert objective_of(tmp_path, "seqkd+speckd") == Objective(TopK(5), DownWeight(0.01), LabelNLL())


def test_the_later_name_counts_and_takes_the_earlier_parts_options_away(tmp_path: Path) -> None:
    assert objective_of(tmp_path, "speckd+abkd").gate == NoGate()
    joined = load_settings(None, "taid+kd", ["--output_dir", str(tmp_path)])
    assert joined.training.objective().divergence == forward_kl and joined.training.divergence_controller is None
    assert objective_of(tmp_path, "abkd", "--divergence", "todi").divergence != AlphaBeta()  # and no error about alpha
    other = load_settings(None, "distillm-2", ["--output_dir", str(tmp_path), "--student_text_divergence", "todi"]).training
    assert other.student_text_objective(other.objective()).divergence == todi


def test_a_recipe_among_the_flags_beats_the_file_in_what_it_names(tmp_path: Path) -> None:
    file = "gate: top_k\ndivergence: generalized_jsd\ndivergence_options: {beta: 0.2}\nrejected: mask\n"
    assert objective_of(tmp_path, "abkd+speckd", file=file) == Objective(TopK(5), DownWeight(0.01), AlphaBeta(0.2, 0.7))
    assert objective_of(tmp_path, "paper-v2-top-k", file=file).divergence.beta == 0.2


def test_cross_entropy_everywhere_needs_no_teacher(tmp_path: Path) -> None:
    assert not objective_of(tmp_path, "seqkd").needs_teacher and objective_of(tmp_path, "seqkd+speckd").needs_teacher


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("abkd+specdk", "recipe: there is no recipe 'specdk'. Did you mean 'speckd'?"),
        ("abkd+", "recipe: there is no recipe ''"),
        ("sft+speckd", "recipe: sft+speckd: cross-entropy on the data asks no teacher"),
    ],
)
def test_what_cannot_be_joined(tmp_path: Path, names: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        objective_of(tmp_path, names)
    assert str(caught.value).startswith(said)


def test_the_list_says_how_they_are_joined(capsys) -> None:
    assert main(["recipes"]) == 0
    assert "--recipe abkd+speckd" in capsys.readouterr().out
