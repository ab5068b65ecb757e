"""A method whose numbers move: logged, the same after a resume, and the same on one process and on two."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from speckd.config import GATES
from speckd.moving_config import MovingConfig
from tests.tiny import common_flags, log_of, run_cli
from tests.trainer.conftest import World

HOLD = ["--recipe", "paper-v1", "--gate", "threshold"]
HOLD += ["--gate_options", '{"threshold": 0.02}']
HOLD += ["--gate_controller", '{"option": "threshold", "tar_target": 0.25, "gain": 1.0}']


def run(world: World, output: Path, *more: str) -> list[dict[str, float]]:
    flags = [*common_flags(world.student, world.teacher, world.data, output), "--per_device_train_batch_size", "4", *more]
    assert run_cli(flags) == 0
    return log_of(output)


def test_a_schedule_is_followed_and_logged(world: World, tmp_path: Path) -> None:
    schedules = ["--gate_schedule", '{"verify_top_k": {"from": 9, "to": 3, "steps": 4}}']
    schedules += ["--objective_schedule", '{"label_loss_weight": {"from": 0.5, "to": 0.1, "shape": "cosine"}}']
    log = run(world, tmp_path / "moves", "--recipe", "paper-v1", "--max_steps", "6", *schedules)
    assert [entry["gate/verify_top_k"] for entry in log] == [9, 8, 6, 4, 3, 3]  # 7.5 and 4.5: to even
    assert [round(entry["label_loss_weight"], 3) for entry in log] == [0.5, 0.473, 0.4, 0.3, 0.2, 0.127]
    fixed = ["--gate_options", '{"verify_top_k": 9}', "--label_loss_weight", "0.5"]
    constant = run(world, tmp_path / "stays", "--recipe", "paper-v1", "--max_steps", "2", *fixed)
    assert log[0]["loss"] == constant[0]["loss"] and log[1]["loss"] != constant[1]["loss"]


def test_a_resumed_controller_goes_on_bit_for_bit(world: World, tmp_path: Path) -> None:
    save = ["--save_strategy", "steps", "--save_steps", "3", "--max_steps", "7", "--lr_scheduler_type", "constant"]
    whole = run(world, tmp_path / "whole", *HOLD, *save)
    run(world, tmp_path / "cut", *HOLD, *save[:-4], "--max_steps", "3")
    more = ["--resume_from_checkpoint", "true", "--allow_changed_config", "true"]
    resumed = run(world, tmp_path / "cut", *HOLD, *save, *more)
    for name in ("loss", "tar", "gate/threshold"):
        assert [entry[name] for entry in resumed] == [entry[name] for entry in whole], name
    states = [json.loads((tmp_path / name / "checkpoint-6" / "trainer_state.json").read_text()) for name in ("whole", "cut")]
    kept = [state["stateful_callbacks"]["speckd_moving_objective"] for state in states]
    assert kept[0] == kept[1] and kept[0]["gate/threshold"]["value"] == whole[6]["gate/threshold"]


def test_two_processes_move_as_one(world: World, tmp_path: Path) -> None:
    one = run(world, tmp_path / "one", *HOLD, "--max_steps", "3")
    flags = common_flags(world.student, world.teacher, world.data, tmp_path / "two")
    flags += ["--per_device_train_batch_size", "2", "--max_steps", "3", *HOLD]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "speckd", "train"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("loss", "tar", "gate/threshold"):
        found = [entry[name] for entry in log_of(tmp_path / "two")]
        assert found == pytest.approx([entry[name] for entry in one], rel=1e-5), name


def test_a_controller_finds_its_target(world: World, tmp_path: Path) -> None:
    log = run(world, tmp_path / "held", *HOLD, "--max_steps", "40", "--learning_rate", "0")
    rates = [entry["tar"] for entry in log]
    assert abs(sum(rates[-18:]) / 18 - 0.25) < 0.03 < abs(sum(rates[:6]) / 6 - 0.25)
    assert GATES["threshold"](threshold=log[-1]["gate/threshold"])  # a value that the gate bears


@pytest.mark.parametrize("gate", ["excess_label_loss", "student_entropy"])
def test_the_share_that_a_ranked_gate_keeps_can_be_moved(gate: str) -> None:
    """In the direction in which it accepts more, a reference model or sequences of one token notwithstanding."""
    moving = MovingConfig(gate=gate, gate_controller={"option": "fraction", "tar_target": 0.5}).moving_objective()
    assert moving.moved[0].mover.raises_tar


@pytest.mark.parametrize(
    ("setting", "given", "said"),
    [
        ("gate_controller", '{"option": "k", "tar_target": 0.8}', "gate_controller: 'k' cannot be moved"),
        ("gate_controller", '{"option": "verify_top_k"}', "gate_controller: it has no tar_target"),
        ("gate_controller", '{"option": "verify_top_k", "tar_target": 0.8, "min": 9}', "are not in order"),
        ("gate_schedule", '{"verify_top_k": {"to": 0}}', "gate_schedule: verify_top_k: verify_top_k is 0"),
        ("gate_schedule", '{"verify_top_k": 3}', "gate_schedule: verify_top_k: 3 is no schedule"),
        ("gate_schedule", '{"verify_top_k": {"to": 3, "step": 1}}', "'step' is not an option of a schedule"),
        ("objective_schedule", '{"label_loss_weight": {"to": 1.0}}', "label_loss_weight moves between 1"),
        ("gate_schedule", '{"verify_top_k": {"to": 999}}', "gate_options: verify_top_k is 999"),
    ],
)
def test_what_cannot_move_is_said_in_one_line(world: World, tmp_path: Path, capsys, setting, given, said) -> None:
    flags = common_flags(world.student, world.teacher, world.data, tmp_path / "out")
    assert run_cli([*flags, "--recipe", "paper-v1", f"--{setting}", given]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1 and not (tmp_path / "out").exists()
