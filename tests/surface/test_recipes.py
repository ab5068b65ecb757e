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


FILE = """sequence_source: paired
on_policy_fraction: 0.3
on_policy_fraction_end: 0.6
student_text_divergence: skewed_reverse_kl
student_text_divergence_options: {alpha: 0.2}
max_completion_length: 17
"""


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        ("gkd", ("student", 0.5, None, None, 17)),
        ("skd", ("interleaved", 1.0, None, None, 17)),
        ("sft", ("dataset", 1.0, None, None, 17)),
        ("seqkd", ("dataset", 1.0, None, None, 17)),
        ("distillm-2", ("paired", 1.0, None, "skewed_reverse_kl", 17)),
        ("kd", ("paired", 0.3, 0.6, "skewed_reverse_kl", 17)),  # names no source, and goes with any
    ],
)
def test_a_recipe_among_the_flags_that_names_a_source_replaces_the_files(tmp_path: Path, recipe: str, wanted: tuple) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(FILE)
    for given in ((recipe, []), (None, ["--recipe", recipe])):
        found = load_settings(
            config, given[0], ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true", *given[1]]
        ).training
        whose = (found.sequence_source, found.on_policy_fraction, found.on_policy_fraction_end, found.student_text_divergence)
        assert (*whose, found.max_completion_length) == wanted


def test_whoever_names_a_source_speaks_of_its_share_and_divergence_anew(tmp_path: Path) -> None:
    flags = ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    found = load_settings(None, "distillm-2", [*flags, "--sequence_source", "dataset"]).training
    assert found.student_text_divergence is None and not found.writes
    assert load_settings(None, "gkd", [*flags, "--on_policy_fraction", "0.2"]).training.sequence_source == "student"
    assert load_settings(None, "distillm-2+skd", flags).training.student_text_divergence is None


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
