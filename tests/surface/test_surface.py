"""What users type and scripts read does not change by accident."""

import dataclasses
from pathlib import Path

import pytest
from trl import SFTConfig

from speckd.arguments import SpecKDConfig
from speckd.checks import resumes
from speckd.cli import main
from speckd.config import DIVERGENCES, GATES, REJECTED
from speckd.errors import SpeckdError
from speckd.metrics import AcceptanceTally, StarvationWatch
from speckd.recipe_book import recipe_names
from speckd.settings import RunArguments, load_settings

ROOT = Path(__file__).parents[2]


def test_names_are_frozen() -> None:
    assert recipe_names() == (
        "abkd akl distillm distillm-2 distillspec draft gkd imitkd jsd kd label-ratio lk-alpha lk-hybrid minillm paper-v1 "
        "paper-v2-spec paper-v2-top-k reverse-kl seqkd sft skd speckd taid todi top-k-label total-variation trust "
        "ungated".split()
    )
    assert sorted(GATES) == (
        "entropy_gap entropy_weight excess_divergence excess_label_loss expected_spec hellinger inverted label_in_top_k "
        "label_ratio label_uncertainty matched_random none random spec student_entropy teachability teacher_entropy threshold "
        "tip top_k total_variation trust two_sided".split()
    )
    assert sorted(REJECTED) == ["down_weight", "label", "mask", "residual"]
    assert sorted(DIVERGENCES) == (
        "adaptive_kl adaptive_teaching alpha_beta forward_kl generalized_jsd label_nll lk_alpha lk_hybrid reverse_kl "
        "sequence_reverse_kl skewed_forward_kl skewed_reverse_kl taid todi token_temperature total_variation".split()
    )
    own = {f.name for f in dataclasses.fields(SpecKDConfig)} - {f.name for f in dataclasses.fields(SFTConfig)}
    assert own == set(
        "gate gate_options rejected rejected_options divergence divergence_options divergence_temperature normalizer "
        "label_loss_weight gate_schedule rejected_schedule divergence_schedule objective_schedule gate_controller "
        "divergence_controller teacher_model_name_or_path teacher_model_revision teacher_model_init_kwargs "
        "teacher teachers teacher_route_column teacher_mixture teacher_sharding reference_model_name_or_path "
        "teacher_top_k teacher_cache_dir teacher_cache_kind teacher_cache_samples teacher_cache_bits teacher_cache_compression "
        "teacher_server_urls teacher_server_api teacher_server_model teacher_server_concurrency teacher_server_tokens "
        "teacher_server_timeout_s teacher_server_patience_s teacher_prefetch "
        "teacher_device share_teacher_prompt early_rejection loss_memory_budget "
        "scrambled_teacher_fraction max_dropped_mass loss_chunk_size gate_seed starvation_threshold starvation_patience "
        "sequence_source on_policy_fraction on_policy_fraction_end adaptive_on_policy replay_capacity interleaved_top_k "
        "interleaved_block teacher_mix sampling_temperature "
        "sampling_top_k sampling_top_p max_completion_length student_text_divergence student_text_divergence_options "
        "student_text_rejected collapse_threshold collapse_patience log_completions "
        "student_server_urls student_server_model student_server_max_staleness student_server_concurrency".split()
    )
    assert {f.name for f in dataclasses.fields(RunArguments)} == set(
        "dataset_name dataset_config dataset_train_split dataset_test_split dataset_prompt_column dataset_completion_column "
        "task_column token_view_samples eval_dataset eval_rows overwrite_output_dir allow_changed_config".split()
    )


def test_recipes_are_what_they_say(tmp_path) -> None:
    found = {}
    for name in recipe_names():
        given = load_settings(None, name, ["--output_dir", str(tmp_path)]).training
        found[name] = (given.gate, given.rejected, given.divergence, given.normalizer, given.label_loss_weight)
    assert found == {
        "distillm": ("none", "mask", "skewed_reverse_kl", "valid", 0.0),
        "distillm-2": ("none", "mask", "skewed_forward_kl", "valid", 0.0),
        "gkd": ("none", "mask", "generalized_jsd", "valid", 0.0),
        "imitkd": ("none", "mask", "forward_kl", "valid", 0.0),
        "minillm": ("none", "mask", "reverse_kl", "valid", 0.0),
        "label-ratio": ("label_ratio", "label", "forward_kl", "valid", 0.0),
        "paper-v1": ("top_k", "mask", "forward_kl", "valid", 0.0),
        "paper-v2-spec": ("spec", "down_weight", "forward_kl", "valid", 0.0),
        "paper-v2-top-k": ("top_k", "down_weight", "forward_kl", "valid", 0.0),
        "sft": ("none", "mask", "forward_kl", "valid", 1.0),
        "skd": ("none", "mask", "forward_kl", "valid", 0.0),
        "trust": ("trust", "label", "forward_kl", "valid", 0.0),
        "draft": ("trust", "label", "lk_hybrid", "valid", 0.0),
        "top-k-label": ("top_k", "label", "forward_kl", "valid", 0.0),
        "ungated": ("none", "mask", "forward_kl", "valid", 0.0),
        "abkd": ("none", "mask", "alpha_beta", "valid", 0.0),
        "akl": ("none", "mask", "adaptive_kl", "valid", 0.0),
        "distillspec": ("none", "mask", "total_variation", "valid", 0.0),
        "jsd": ("none", "mask", "generalized_jsd", "valid", 0.0),
        "kd": ("none", "mask", "forward_kl", "valid", 0.0),
        "lk-alpha": ("none", "mask", "lk_alpha", "valid", 0.0),
        "lk-hybrid": ("none", "mask", "lk_hybrid", "valid", 0.0),
        "reverse-kl": ("none", "mask", "reverse_kl", "valid", 0.0),
        "seqkd": ("none", "mask", "label_nll", "valid", 0.0),
        "taid": ("none", "mask", "taid", "valid", 0.0),
        "todi": ("none", "mask", "todi", "valid", 0.0),
        "total-variation": ("none", "mask", "total_variation", "valid", 0.0),
        "speckd": ("top_k", "down_weight", "forward_kl", "valid", 0.0),
    }
    assert load_settings(None, None, ["--output_dir", str(tmp_path)]).recipe == "label-ratio"
    assert load_settings(None, None, ["--output_dir", str(tmp_path), "--gate", "spec"]).recipe is None


def test_the_papers_defaults() -> None:
    objective = SpecKDConfig(output_dir="x", gate="top_k", rejected="down_weight", use_cpu=True).objective()
    assert objective.gate.verify_top_k == 5 and objective.rejected.rejected_weight == 0.01
    assert SpecKDConfig(output_dir="x", gate="spec", use_cpu=True).objective().gate.candidates == 5


def test_words_become_what_they_stand_for(tmp_path) -> None:
    (tmp_path / "run.yaml").write_text("save_strategy: no\nmax_length: null\nlearning_rate: 1e-4\nreport_to: none\n")
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--seed", "7", "--eval_strategy=no", "--lora_target_modules", "a", "b"]
    flags += ["--use_peft"]
    found = load_settings(tmp_path / "run.yaml", None, flags)
    training = found.training
    assert (training.save_strategy, training.eval_strategy, training.max_length) == ("no", "no", None)
    assert (training.learning_rate, training.seed, training.use_cpu) == (1e-4, 7, True)
    assert found.model.lora_target_modules == ["a", "b"] and found.given["seed"] == 7


def test_help_recipes_and_options_answer(capsys) -> None:
    assert main(["recipes"]) == 0 and "label-ratio (default)" in capsys.readouterr().out
    assert main(["options", "gate"]) == 0 and "gate_options" in capsys.readouterr().out
    assert main(["--version"]) == 0 and main(["trian"]) == 2


def failing(error: BaseException):
    def run(*_: object) -> None:
        raise error

    return run


def test_our_own_mistakes_and_interrupts_have_their_codes(capsys, monkeypatch) -> None:
    monkeypatch.setattr("speckd.run.train", failing(TypeError("first\nsecond")))
    assert main(["train"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "internal error: TypeError: first." in said and "--debug" in said
    monkeypatch.setattr("speckd.run.train", failing(KeyboardInterrupt()))
    assert main(["train"]) == 130
    assert "--resume_from_checkpoint true" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--debug", "train"], ["train", "--debug"], ["train", "--debug", "--seed", "1"]])
def test_debug_shows_the_traceback_wherever_it_stands(words: list[str], monkeypatch) -> None:
    monkeypatch.setattr("speckd.run.train", failing(SpeckdError("what", "fix")))
    with pytest.raises(SpeckdError):
        main(words)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_example_files_are_valid_settings(path: Path) -> None:
    found = load_settings(path, None, [])
    assert found.training.teacher_model_name_or_path and found.run.dataset_name and found.given["output_dir"]


def test_not_resuming_can_be_said(tmp_path) -> None:
    flags = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", "false"]
    assert not resumes(load_settings(None, None, flags).training)


def test_the_starvation_watch_waits_says_it_once_and_forgets() -> None:
    watch = StarvationWatch(threshold=0.1, patience=3)
    assert [watch.update(r) is not None for r in (0.05, 0.05, 0.2, 0.05, 0.05, 0.05, 0.05)] == [False] * 5 + [True, False]


def test_tallies_add_up_in_any_split() -> None:
    import torch

    from speckd import LMHead, Objective, distillation_loss
    from speckd.gates import TopK
    from speckd.policies import DownWeight
    from speckd.teachers import DenseTeacher
    from tests.parity.cases import problem

    given = problem(seed=4, tokens=12)
    objective = Objective(TopK(3), DownWeight(0.5), label_loss_weight=0.25)
    head, teacher = LMHead(given.weight, given.bias), DenseTeacher(given.teacher)

    def tally(*pieces: torch.Tensor) -> dict[str, float]:
        found = AcceptanceTally()
        for index in pieces:
            rows = type(given.rows)(index, given.rows.labels[index], given.rows.keys.rows(index))
            own = AcceptanceTally()
            own.add(distillation_loss(objective, given.hidden, head, teacher, rows))
            found.merge(own.sums)
        return found.result()

    whole, parts = tally(torch.arange(12)), tally(torch.arange(8), torch.arange(8, 12))  # samples are 4 tokens long
    assert whole.keys() == parts.keys() and all(abs(whole[k] - parts[k]) < 1e-9 for k in whole)
    accepted = objective.gate(_rows(given))
    assert abs(whole["tar_micro"] - float(accepted.mean())) < 1e-12
    assert abs(whole["tar"] - float(accepted.reshape(3, 4).mean(1).mean())) < 1e-12
    shares = [whole[f"loss_share/{name}"] for name in ("accepted", "rejected", "label_loss_weight")]
    assert abs(sum(shares) - 1) < 1e-9 and all(share > 0 for share in shares)


def _rows(given):
    from speckd.types import DenseSignal, Rows

    return Rows(given.hidden @ given.weight.T + given.bias, DenseSignal(given.teacher), given.rows.labels, given.rows.keys)
