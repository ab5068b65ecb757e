"""Where and how the teacher computes changes no result: shared prompts, another device, what travels and when."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from speckd.arguments import SpecKDConfig
from speckd.errors import CapabilityError, ConfigError
from speckd.head import LMHead
from speckd.tasks import build_tokenizer
from speckd.teachers.placement import LaunchedStates, existing_device, head_on
from speckd.trainer import SpecKDTrainer
from tests.tiny import common_flags, log_of, run_cli, task_rows, write_rows
from tests.trainer.conftest import World
from tests.trainer.test_invariance import require_same, require_same_weights

SYSTEM = " ".join(row["prompt"] for row in task_rows(3, seed=9))  # some ninety tokens, within the models' 128 positions


@pytest.fixture(scope="module")
def alike(world: World) -> Path:
    """Rows that start with one system prompt."""
    rows = [{"prompt": f"{SYSTEM} {row['completion'].strip()}", "completion": row["completion"]} for row in task_rows(16)]
    return write_rows(world.place / "alike.jsonl", rows)


def train(world: World, data: Path, output: Path, *more: str) -> list[dict[str, float]]:
    flags = common_flags(world.student, world.teacher, data, output)
    assert run_cli([*flags, "--max_steps", "3", "--per_device_train_batch_size", "8", *more]) == 0
    return log_of(output)


@pytest.mark.parametrize("method", ["label-ratio", "paper-v2-spec"])
def test_a_shared_prompt_changes_the_work_and_not_the_result(world: World, alike: Path, tmp_path: Path, method: str) -> None:
    more = ["--recipe", method, "--eval_dataset", str(alike)]
    shared = train(world, alike, tmp_path / "shared", *more)
    plain = train(world, alike, tmp_path / "plain", *more, "--share_teacher_prompt", "false")
    require_same(shared, plain)
    require_same_weights(tmp_path / "shared", tmp_path / "plain")
    assert all(step["teacher_computed"] < 0.7 for step in shared) and "teacher_computed" not in plain[0]


def test_rows_that_share_nothing_are_computed_whole(world: World, tmp_path: Path) -> None:
    assert [step["teacher_computed"] for step in train(world, world.data, tmp_path / "out")] == [1.0] * 3


@pytest.mark.parametrize("more", [["--padding_free", "true", "--max_length", "null"], ["--packing", "true"]])
def test_packed_rows_are_never_shared(world: World, alike: Path, tmp_path: Path, more: list[str]) -> None:
    assert "teacher_computed" not in train(world, alike, tmp_path / "out", *more)[0]


def trainer_of(world: World, data: Path, output: Path, teacher: Any = None, **more: Any) -> SpecKDTrainer:
    args = SpecKDConfig(
        output_dir=str(output),
        use_cpu=True,
        max_steps=2,
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
        logging_steps=1,
        **more,
    )
    given = teacher or AutoModelForCausalLM.from_pretrained(world.teacher)
    rows, tokenizer = Dataset.from_json(str(data)), build_tokenizer()
    return SpecKDTrainer(
        str(world.student), given, args, rows, rows, processing_class=tokenizer, teacher_processing_class=tokenizer
    )


def test_a_teacher_whose_cache_cannot_be_continued_is_said_and_computes_plainly(
    world: World, alike: Path, tmp_path: Path, caplog
) -> None:
    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=len(build_tokenizer()), hidden_size=16, num_hidden_layers=1, state_size=4))
    with caplog.at_level(logging.WARNING):
        trainer = trainer_of(world, alike, tmp_path / "out", mamba)
    assert "the teacher (MambaForCausalLM) computes every row's prompt anew: its cache cannot be continued" in caplog.text
    assert trainer.train().training_loss > 0
    assert not any("teacher_computed" in entry for entry in trainer.state.log_history)


def losses(trainer: SpecKDTrainer) -> list[float]:
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*found, trainer.evaluate()["eval_loss"], trainer.evaluate()["eval_kl"]]


def test_on_a_device_of_its_own_the_teacher_says_the_same(world: World, tmp_path: Path, monkeypatch) -> None:
    """There may be one device here: what would travel to another is taken that way all the same."""
    beside = losses(trainer_of(world, world.data, tmp_path / "beside"))
    travelled = []

    def travelling(hidden: Tensor, index: Tensor) -> LaunchedStates:
        launched = LaunchedStates.of_supervised(hidden.flatten(0, 1), index)
        assert len(launched.states) == len(index) < hidden.shape[0] * hidden.shape[1]
        travelled.append(len(index))
        return launched

    monkeypatch.setattr(LaunchedStates, "of", travelling)
    apart = losses(trainer_of(world, world.data, tmp_path / "apart", teacher_device="cpu"))
    assert travelled and apart == beside


def test_the_teacher_starts_first_and_its_states_come_after_the_students_forward(
    world: World, alike: Path, tmp_path: Path, monkeypatch
) -> None:
    """So two devices work at the same time: nothing asks for the teacher's states before the student has its work."""
    trainer, events = trainer_of(world, alike, tmp_path / "out"), []
    trainer.teacher.get_decoder().register_forward_pre_hook(lambda *_: events.append("teacher"))
    trainer.student.get_decoder().register_forward_hook(lambda *_: events.append("student"))
    arrived = LaunchedStates.arrived
    monkeypatch.setattr(LaunchedStates, "arrived", lambda self: (events.append("arrived"), arrived(self))[1])
    trainer.train()
    assert events == ["teacher", "teacher", "student", "arrived"] * 2  # trunk and branches


def test_the_head_of_the_teacher_is_made_once(world: World, tmp_path: Path, monkeypatch) -> None:
    import speckd.teachers.model as module

    trainer, heads = trainer_of(world, world.data, tmp_path / "out"), set()
    teachers = module.HiddenTeacher
    monkeypatch.setattr(module, "HiddenTeacher", lambda hidden, head: (heads.add(id(head)), teachers(hidden, head))[1])
    trainer.train()
    assert heads == {id(trainer.source.head)} and not trainer.source.head.weight.requires_grad
    assert trainer.source.head.weight.shape[0] == trainer.vocabulary.size


# ---- devices ---------------------------------------------------------------------------------------------------------------


def test_what_travels_arrives_where_it_belongs() -> None:
    hidden, index = torch.arange(24.0).reshape(2, 4, 3), torch.tensor([6, 1, 2])
    found = LaunchedStates.of_supervised(hidden.flatten(0, 1), index).arrived()
    assert found.shape == (8, 3) and torch.equal(found[index], hidden.flatten(0, 1)[index])
    assert float(found.sum()) == float(found[index].sum())
    assert LaunchedStates.of(hidden, index).arrived().data_ptr() == hidden.data_ptr()  # beside the student nothing is copied


def two_gpus(monkeypatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:1"])
def test_devices_that_are_there(name: str, monkeypatch) -> None:
    two_gpus(monkeypatch)
    assert str(existing_device("teacher_device", name)) == name


@pytest.mark.parametrize("name", ["cuda:2", "mps", "meta", "cuda:-1", "", "cuda:x", "0"])
def test_devices_that_are_not(name: str, monkeypatch) -> None:
    two_gpus(monkeypatch)
    with pytest.raises(ConfigError, match=r"teacher_device: .* Here there is cpu, cuda:0, cuda:1"):
        existing_device("teacher_device", name)


def test_a_head_beside_the_student_is_not_copied_and_one_put_away_is_refused() -> None:
    head = LMHead(torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3)))
    found = head_on(head, torch.device("cpu"))
    assert found.weight.data_ptr() == head.weight.data_ptr() and found.bias is not None and not found.bias.requires_grad
    with pytest.raises(CapabilityError, match="offloads the teacher's head"):
        head_on(LMHead(torch.ones(3, 2, device="meta")), torch.device("cpu"))
