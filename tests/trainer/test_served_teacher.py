"""`teacher: server`: a run with a served teacher is the run with the teacher in process, or ends with a checkpoint."""

import os
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

import tests.teachers.faulty_server as f
from speckd import teacher_sources
from speckd.errors import TeacherLostError
from speckd.teachers.client import ServerPool
from speckd.teachers.served import ServedSource
from speckd.trainer import SpecKDTrainer
from tests.teachers.episodes import BEHAVIOURS, TIMES, Behaviour
from tests.tiny import common_flags, log_of, run_cli, write_model
from tests.trainer.conftest import World
from tests.trainer.served_model import served

TOP_K = ["--gate", "top_k", "--gate_options", '{"verify_top_k": 60}', "--rejected", "mask"]


@pytest.fixture(scope="module")
def narrow(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A teacher whose head is not padded: a server's probabilities are over all its tokens."""
    return World(world.student, write_model(tmp_path_factory.mktemp("narrow") / "teacher", 2, 32, 2), world.data, world.place)


def flags_of(world: World, output: Path, *more: str) -> list[str]:
    return [*common_flags(world.student, None, world.data, output), "--max_steps", "6", *TOP_K, *more]


#: So that a run has some twenty requests, and a fault its chance.
IN_SMALL_REQUESTS = ["--teacher_server_tokens", "100", "--num_train_epochs", "2"]


def without_saving(flags: list[str]) -> list[str]:
    return [flag for flag in flags if flag not in ("--save_strategy", "no")]


def use(*urls: str) -> list[str]:
    return ["--teacher", "server", "--teacher_server_urls", *urls, "--teacher_server_patience_s", "2", "--teacher_top_k", "64"]


def curve(output: Path, name: str = "loss") -> list[float]:
    return [entry[name] for entry in log_of(output)]


def in_process(world: World, output: Path, *more: str) -> list[float]:
    assert run_cli([*flags_of(world, output, *more), "--teacher_model_name_or_path", str(world.teacher)]) == 0
    return curve(output)


@pytest.mark.parametrize("how", ["", "--train_sampling_strategy random --num_train_epochs 2 --gradient_accumulation_steps 2"])
def test_the_same_curve_as_with_the_teacher_in_process(how: str, narrow: World, tmp_path: Path) -> None:
    wanted = in_process(narrow, tmp_path / "whole", *how.split())
    with served(narrow.teacher) as server:
        assert run_cli(flags_of(narrow, tmp_path / "out", *use(server.url), "--teacher_top_k", "1000", *how.split())) == 0
    assert curve(tmp_path / "out") == pytest.approx(wanted, rel=2e-6)
    assert curve(tmp_path / "out", "tar") == pytest.approx(curve(tmp_path / "whole", "tar"), abs=1e-12)


def test_the_teacher_is_asked_ahead_and_each_row_once(narrow: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    ask, launch, ahead = ServerPool.ask, ServedSource.launch, []
    monkeypatch.setattr(ServerPool, "ask", lambda self, ids, places: (asked.append(len(ids)), ask(self, ids, places))[1])
    monkeypatch.setattr(ServedSource, "launch", lambda self, question: (ahead.append(len(asked)), launch(self, question))[1])
    for steps in (3, 0):
        asked.clear()
        ahead.clear()
        with served(narrow.teacher) as server:
            more = ["--num_train_epochs", "2", "--teacher_prefetch", str(steps)]
            assert run_cli(flags_of(narrow, tmp_path / str(steps), *use(server.url), *more)) == 0
        assert len(asked) == 48, "24 rows in each of two epochs"
        assert ahead[0] == (24 if steps else 8), "before the first step"
    assert curve(tmp_path / "3") == curve(tmp_path / "0")


def test_one_server_dies_and_the_other_goes_on(narrow: World, tmp_path: Path) -> None:
    with served(narrow.teacher) as server:
        assert run_cli(flags_of(narrow, tmp_path / "one", *use(server.url))) == 0
    with served(narrow.teacher, f.die_for_good, share=1.0, start=4) as dying, served(narrow.teacher) as living:
        assert run_cli(flags_of(narrow, tmp_path / "two", *use(dying.url, living.url))) == 0
    assert curve(tmp_path / "two") == curve(tmp_path / "one")


def test_all_servers_die_and_the_run_goes_on_later_to_the_same_log(
    narrow: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    more = ["--num_train_epochs", "2"]
    with served(narrow.teacher) as server:
        assert run_cli(flags_of(narrow, tmp_path / "whole", *use(server.url), *more)) == 0
    with served(narrow.teacher, f.die_for_good, share=1.0, start=9) as dying:
        assert run_cli(flags_of(narrow, tmp_path / "out", *use(dying.url), "--teacher_prefetch", "0", *more)) == 4
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and "is saved in" in last and "--resume_from_checkpoint true goes on" in last
    saved = list((tmp_path / "out").glob("checkpoint-*"))
    assert len(saved) == 1 and 0 < len(log_of(tmp_path / "out")) < 6
    with served(narrow.teacher) as server:
        flags = flags_of(narrow, tmp_path / "out", *use(server.url), "--resume_from_checkpoint", "true", *more)
        assert run_cli(flags) == 0
    assert curve(tmp_path / "out") == curve(tmp_path / "whole")


def test_another_teacher_at_the_resume_is_refused(narrow: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = write_model(tmp_path / "other", 9, 32, 2)
    saving = ["--save_strategy", "steps", "--save_steps", "3"]
    with served(narrow.teacher) as server:
        flags = without_saving(flags_of(narrow, tmp_path / "out", *use(server.url)))
        assert run_cli([*flags, *saving]) == 0
    with served(other) as server:
        flags = without_saving(flags_of(narrow, tmp_path / "out", *use(server.url)))
        more = ["--max_steps", "8", "--allow_changed_config", "true", "--resume_from_checkpoint", "true"]
        assert run_cli([*flags, *saving, *more]) == 2
    assert "the model is another one" in capsys.readouterr().err.splitlines()[-1]


#: Every behaviour with so many seeds; by default some of them, once. `tests/teachers` plays them all against the client alone.
SEEDS = int(os.environ.get("SPECKD_TRAINING_EPISODES", "0"))
EPISODES = [(one, seed) for one in (BEHAVIOURS if SEEDS else BEHAVIOURS[::9]) for seed in range(max(1, SEEDS))]


@pytest.fixture(scope="module")
def fault_free(narrow: World, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    output = tmp_path_factory.mktemp("fault-free") / "out"
    with served(narrow.teacher) as server:
        assert run_cli(flags_of(narrow, output, *use(server.url), *IN_SMALL_REQUESTS)) == 0
    return curve(output)


@pytest.mark.parametrize(("behaviour", "seed"), EPISODES, ids=[f"{one.name}-{seed}" for one, seed in EPISODES])
def test_whatever_a_server_does_the_log_is_the_fault_free_one(
    behaviour: Behaviour,
    seed: int,
    narrow: World,
    fault_free: list[float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or the run stops with one line, and resumed against a good server goes on to that log."""
    monkeypatch.setattr(teacher_sources, "Timeouts", lambda **_: replace(TIMES, read_s=0.4, request_s=0.8))
    with served(narrow.teacher, behaviour.fault, behaviour.share, behaviour.start + 6, seed) as server:
        code = run_cli(flags_of(narrow, tmp_path / "out", *use(server.url), *IN_SMALL_REQUESTS))
    if code:
        last = capsys.readouterr().err.splitlines()[-1]
        assert code in (2, 4) and last.startswith("error: ") and server.url in last
        with served(narrow.teacher) as server:
            more = ["--resume_from_checkpoint", "true"] if (tmp_path / "out" / "config.yaml").exists() else []
            assert run_cli(flags_of(narrow, tmp_path / "out", *use(server.url), *IN_SMALL_REQUESTS, *more)) == 0
    assert curve(tmp_path / "out") == fault_free


def test_servers_that_die_before_the_last_measures_cost_no_training(
    narrow: World, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--eval_dataset", str(narrow.data)]
    train = SpecKDTrainer.train
    with served(narrow.teacher) as server:
        pause = TeacherLostError("gone", "")

        def then_lost(trainer: SpecKDTrainer, *given: object, **named: object) -> object:
            done = train(trainer, *given, **named)
            monkeypatch.setattr(trainer.source, "settle", Mock(side_effect=pause))
            return done

        monkeypatch.setattr(SpecKDTrainer, "train", then_lost)
        assert run_cli(flags_of(narrow, tmp_path / "out", *use(server.url), *more)) == 4
        assert "step 6 is saved in" in capsys.readouterr().err.splitlines()[-1]
        monkeypatch.setattr(SpecKDTrainer, "train", train)
        resumed = ["--resume_from_checkpoint", "true"]
        assert run_cli(flags_of(narrow, tmp_path / "out", *use(server.url), *more, *resumed)) == 0
    assert len(log_of(tmp_path / "out")) == 6 and (tmp_path / "out" / "results.json").is_file()


def test_the_folder_of_a_run_that_lost_its_teacher_at_once_can_be_used_again(
    narrow: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(narrow.teacher) as server:
        with monkeypatch.context() as lost:
            lost.setattr(SpecKDTrainer, "train", Mock(side_effect=TeacherLostError("gone", "")))
            assert run_cli(flags_of(narrow, tmp_path / "out", *use(server.url))) == 4
        assert (tmp_path / "out" / "teacher_canary.json").is_file()
        assert run_cli(flags_of(narrow, tmp_path / "out", *use(server.url))) == 0
