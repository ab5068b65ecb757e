"""`speckd train --dry-run`: the composition in the paper's notation, and nothing else happens."""

from pathlib import Path

import pytest

from speckd import config
from speckd.cli import main
from speckd.recipe_book import recipe_names
from speckd.run import describe_method
from speckd.settings import load_settings
from speckd.types import HasNotation


def shown(place: Path, capsys, *flags: str) -> str:
    assert main(["train", "--dry-run", "--output_dir", str(place / "out"), "--use_cpu", "true", *flags]) == 0
    return capsys.readouterr().out


def test_the_papers_method_in_its_notation(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = shown(tmp_path, capsys, "--recipe", "paper-v2-top-k", "--dataset_name", "data.jsonl")
    assert "L = 1/N Σ_t V_t · KL(p_t ‖ q_t)\n" in said
    assert "V_t = 0.01 + 0.99·1[argmax q_t ∈ Top-5(p_t)]\n" in said
    assert "(x, y) ~ data.jsonl" in said and "N = the supervised tokens" in said
    assert not list(tmp_path.iterdir())  # no output folder, no data asked for, no model loaded


def test_what_moves_what_is_mixed_and_what_the_rejected_get(tmp_path: Path, capsys) -> None:
    flags = ["--recipe", "top-k-label", "--label_loss_weight", "0.25", "--divergence_temperature", "2"]
    flags += ["--gate_schedule", '{"verify_top_k": {"from": 20, "to": 3, "steps": 500}}', "--normalizer", "weight"]
    said = shown(tmp_path, capsys, *flags)
    assert "0.75·[V_t · 2²·KL(p_t ‖ q_t) + (1 − a_t)·(−log q_t(y_t))] + 0.25·(−log q_t(y_t))" in said
    assert "a_t = 1[argmax q_t ∈ Top-20(p_t)]" in said  # as the run begins
    assert "gate/verify_top_k: 20 → 3 over 500 steps, linear" in said and "N = the sum of all weights" in said


def test_sums_are_bracketed_and_letters_explained(tmp_path: Path, capsys) -> None:
    said = shown(tmp_path, capsys, "--recipe", "lk-hybrid+speckd")
    assert "V_t · [λ·KL(p_t ‖ q_t) + (1 − λ)·TV(p_t, q_t)]\n" in said and " λ = exp(−3·mean_t" in said
    said = shown(tmp_path, capsys, "--recipe", "kd+speckd", "--gate", "inverted", "--gate_options", '{"gate": "top_k"}')
    assert "V_t = 0.01 + 0.99·[1 − 1[argmax q_t ∈ Top-5(p_t)]]" in said
    assert shown(tmp_path, capsys, "--recipe", "sft").count("−log q_t(y_t)") == 1


def test_whose_text_it_is(tmp_path: Path, capsys) -> None:
    said = shown(tmp_path, capsys, "--recipe", "skd", "--dataset_name", "data.jsonl")
    assert "(x, y) ~ data.jsonl; text by student and teacher" in said and "y_t ∉ Top-25(p_t)" in said
    said = shown(tmp_path, capsys, "--recipe", "minillm+speckd", "--teacher_mix", "0.3")
    assert "(y_t ~ 0.3·p_t + 0.7·q_t)" in said and "V_t · w_t·[KL(q_t ‖ p_t) − R_t·log q_t(y_t)]" in said
    assert "w_t = q_t(y_t)/(0.3·p_t(y_t) + 0.7·q_t(y_t))" in said
    said = shown(tmp_path, capsys, "--recipe", "distillm-2+speckd")
    own = next(line for line in said.splitlines() if line.startswith("on written"))
    assert "KL(q_t" in own and "KL(p_t" in next(line for line in said.splitlines() if line.startswith("loss"))


OWN = """
from dataclasses import dataclass

@dataclass(frozen=True)
class HalfLabel:
    share: float = 0.5
    def weights(self, acceptance): return acceptance, self.share * (1 - acceptance)
    def fallback(self, rows): return -rows.label_log_prob

class Plain:
    def __call__(self, rows): return 0 * rows.student_logits[:, 0] + 1

class Lost(HalfLabel):
    def weights(self, acceptance): return acceptance, 0 * acceptance
"""


def test_parts_of_ones_own_that_state_no_formula_stand_by_their_names(tmp_path: Path, capsys) -> None:
    own = tmp_path / "own_policies.py"
    own.write_text(OWN)
    said = shown(tmp_path, capsys, "--gate", "top_k", "--rejected", f"{own}:HalfLabel", "--divergence", "reverse_kl")
    assert "L = 1/N Σ_t [V_t · KL(q_t ‖ p_t) + fallback of HalfLabel(share=0.5)]\n" in said
    assert "V_t = HalfLabel(share=0.5)\n" in said and "a_t = 1[argmax q_t ∈ Top-5(p_t)]\n" in said
    said = shown(tmp_path, capsys, "--gate", f"{own}:Plain", "--rejected", f"{own}:Lost")
    assert "fallback" not in said and "V_t = Lost(share=0.5)\n" in said and "a_t = Plain\n" in said
    assert " at 0x" not in said


def test_no_line_shows_where_something_lies_in_memory(tmp_path: Path) -> None:
    own = tmp_path / "own_plain.py"
    own.write_text(OWN)
    flags = ["--output_dir", "out", "--use_cpu", "true", "--gate", f"{own}:Plain", "--divergence", "token_temperature"]
    line = describe_method(load_settings(None, None, flags))
    assert "gate Plain → rejected tokens Label() → TokenTemperature(" in line and "divergence=ForwardKL()" in line
    assert " at 0x" not in line


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_shipped_recipe_states_its_formula(recipe: str) -> None:
    import yaml

    from speckd.recipe_book import recipe_text

    given = yaml.safe_load(recipe_text(recipe))
    method = config.MethodConfig(
        gate=given.get("gate", "none"), rejected=given.get("rejected", "mask"), divergence=given.get("divergence", "forward_kl")
    )
    objective = method.objective()
    assert all(isinstance(part, HasNotation) for part in (objective.gate, objective.rejected, objective.divergence))
