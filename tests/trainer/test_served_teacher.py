"""`teacher: server`: a run with a served teacher is the run with the teacher in process, or ends with a checkpoint."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM

import tests.teachers.faulty_server as f
from speckd import teacher_sources
from speckd.errors import TeacherLostError
from speckd.tasks import build_tokenizer
from speckd.teachers.client import ServerPool
from speckd.teachers.exchange import Timeouts
from speckd.teachers.served import ServedSource
from speckd.trainer import SpecKDTrainer
from tests.repository.files import ROOT
from tests.teachers.episodes import BEHAVIOURS, TIMES, Behaviour
from tests.tiny import common_flags, log_of, run_cli, task_rows, write_model
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


#: For tests that count a server's requests: no sample is looked at for a report.
UNRECORDED = ("--token_view_samples", "0")


def test_the_teacher_is_asked_ahead_and_each_row_once(narrow: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    ask, launch, ahead = ServerPool.ask, ServedSource.launch, []
    monkeypatch.setattr(ServerPool, "ask", lambda self, ids, places: (asked.append(len(ids)), ask(self, ids, places))[1])
    monkeypatch.setattr(ServedSource, "launch", lambda self, question: (ahead.append(len(asked)), launch(self, question))[1])
    for steps in (3, 0):
        asked.clear()
        ahead.clear()
        with served(narrow.teacher) as server:
            more = ["--num_train_epochs", "2", "--teacher_prefetch", str(steps), *UNRECORDED]
            assert run_cli(flags_of(narrow, tmp_path / str(steps), *use(server.url), *more)) == 0
        assert len(asked) == 4 + 48, "four to see what is dropped, then 24 rows in each of two epochs"
        assert ahead[0] == 4 + (24 if steps else 8), "before the first step"
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
    more = ["--num_train_epochs", "2", *UNRECORDED]
    with served(narrow.teacher) as server:
        assert run_cli(flags_of(narrow, tmp_path / "whole", *use(server.url), *more)) == 0
    with served(narrow.teacher, f.die_for_good, share=1.0, start=13) as dying:
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


WHOLE = ["--teacher_top_k", "1000"]


def test_a_padded_head_counts_as_in_process_where_the_whole_vocabulary_is_asked_for(world: World, tmp_path: Path) -> None:
    """256 rows for 104 tokens: what the padding has is renormalised away."""
    wanted = in_process(world, tmp_path / "whole")
    with served(world.teacher) as server:
        flags = flags_of(world, tmp_path / "out", *use(server.url), *WHOLE, "--max_dropped_mass", "1")
        assert run_cli(flags) == 0
    assert curve(tmp_path / "out") == pytest.approx(wanted, rel=2e-6)
    assert curve(tmp_path / "out", "tar") == pytest.approx(curve(tmp_path / "whole", "tar"), abs=1e-12)


@pytest.mark.parametrize(("top_k", "said"), [("1000", "puts "), ("64", "puts at least ")])
def test_what_a_server_puts_on_other_tokens_is_bounded(
    top_k: str, said: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with served(world.teacher) as server:
        flags = flags_of(world, tmp_path / "out", *use(server.url), "--teacher_top_k", top_k)
        assert run_cli(flags) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"the teacher {said}" in last and "max_dropped_mass above 0." in last
    dropped = float(last.split("above ")[1].rstrip("."))
    exact = float(on_padding(world).mean())
    assert dropped == pytest.approx(exact, rel=0.03) if top_k == "1000" else exact / 2 < dropped < exact
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def on_padding(world: World) -> torch.Tensor:
    """The teacher's probability of ids that name no token, at the first 16 completion tokens of each of the first four rows."""
    tokenizer, model = build_tokenizer(), AutoModelForCausalLM.from_pretrained(world.teacher).eval()
    found = []
    for row in task_rows(4):
        prompt, whole = (tokenizer.encode(row["prompt"] + end) for end in ("", row["completion"]))
        probs = model(torch.tensor([whole])).logits[0].softmax(-1)[len(prompt) - 1 :]
        found.append(probs[:16, len(tokenizer) :].sum(-1))
    return torch.cat(found)


def test_the_users_timeout_also_bounds_silence(narrow: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server computes in silence, for longer than any default where a user says so."""
    monkeypatch.setattr(teacher_sources, "Timeouts", lambda **given: Timeouts(**{"read_s": 1e-3, **given, "ready_s": 5}))
    with served(narrow.teacher, f.latency, share=1.0) as server:
        assert run_cli(flags_of(narrow, tmp_path / "out", *use(server.url), "--teacher_server_timeout_s", "60")) == 0


def nothing_is_left(server: f.FaultyServer) -> bool:
    """No thread of the client, and no connection to the server."""
    for _ in range(100):
        if not server._writers:
            break
        time.sleep(0.02)
    return not server._writers and not any(thread.name == "speckd-teacher" for thread in threading.enumerate())


def test_a_run_lets_go_of_its_servers(narrow: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished, interrupted, lost, refused by the servers, refused by what comes after them."""
    with served(narrow.teacher) as server:
        flags = flags_of(narrow, tmp_path / "out", *use(server.url))
        assert run_cli(flags) == 0
        assert nothing_is_left(server)
        again = [*flags, "--overwrite_output_dir", "true"]
        for place, error in (("train", KeyboardInterrupt), ("train", TeacherLostError("gone", "")), ("_check_data", OSError)):
            with monkeypatch.context() as failing:
                failing.setattr(SpecKDTrainer, place, Mock(side_effect=error))
                assert run_cli(again) in (130, 4, 2)
            assert nothing_is_left(server)
        assert run_cli([*again, "--teacher_server_model", "other"]) == 2
        assert nothing_is_left(server)


@pytest.mark.parametrize(
    ("top_k", "best", "fix"),
    [
        ("64", "kl", "Set metric_for_best_model: kl_at_least"),
        ("64", "eval_alpha", "Set metric_for_best_model: alpha_at_least"),
        ("4", "tar", "Take one of loss, nll, kl_at_least, agreement"),
        ("64", "nil", "Take one of loss, nll, kl_at_least, agreement"),
        ("1000", "kl_at_least", "Take one of loss, nll, kl, agreement"),
    ],
)
def test_checkpoints_are_not_chosen_by_what_is_not_measured(
    top_k: str, best: str, fix: str, narrow: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    more = ["--eval_dataset", str(narrow.data), "--eval_strategy", "steps", "--eval_steps", "2", "--teacher_top_k", top_k]
    more += ["--gate_options", '{"verify_top_k": 3}', "--metric_for_best_model", best]
    with served(narrow.teacher) as server:
        assert run_cli(flags_of(narrow, tmp_path / "out", *use(server.url), *more)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"metric_for_best_model: {best} is not among" in last and fix in last
    assert not (tmp_path / "out").exists()


def test_checkpoints_are_chosen_by_what_is_measured(narrow: World, tmp_path: Path) -> None:
    more = ["--eval_dataset", str(narrow.data), "--eval_strategy", "steps", "--eval_steps", "2", "--max_steps", "2"]
    more += ["--save_strategy", "steps", "--save_steps", "2", "--load_best_model_at_end", "true"]
    with served(narrow.teacher) as server:
        flags = without_saving(flags_of(narrow, tmp_path / "out", *use(server.url)))
        assert run_cli([*flags, *more, "--metric_for_best_model", "kl_at_least"]) == 0


def test_a_run_that_does_not_resume_may_have_another_teacher(narrow: World, tmp_path: Path) -> None:
    """Also where the command line says so: its false is a text."""
    other = write_model(tmp_path / "other", 9, 32, 2)
    with served(narrow.teacher) as server, pytest.MonkeyPatch.context() as lost:
        lost.setattr(SpecKDTrainer, "train", Mock(side_effect=TeacherLostError("gone", "")))
        assert run_cli(flags_of(narrow, tmp_path / "out", *use(server.url))) == 4
    assert (tmp_path / "out" / "teacher_canary.json").is_file()
    with served(other) as server:
        assert run_cli(flags_of(narrow, tmp_path / "out", *use(server.url), "--resume_from_checkpoint", "false")) == 0


SLOW_TO_SAVE = Path(__file__).with_name("slow_to_save.py")


def test_two_processes_lose_their_teacher_with_a_whole_checkpoint(narrow: World, tmp_path: Path) -> None:
    """The launcher kills the other one as soon as one ends. The run goes on in one process, at the same global batch."""
    how = ["--num_train_epochs", "2", "--teacher_prefetch", "0", "--teacher_server_tokens", "1"]  # a request each
    with served(narrow.teacher) as server:
        assert run_cli(flags_of(narrow, tmp_path / "whole", *use(server.url), *how)) == 0
    one, two = ["--per_device_train_batch_size", "8"], ["--per_device_train_batch_size", "4"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SLOW_TO_SAVE)]
    with served(narrow.teacher, f.die_for_good, share=1.0, start=30) as dying:
        flags = flags_of(narrow, tmp_path / "out", *use(dying.url), *how, *two)
        done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    said = [line for line in done.stderr.replace("error: ", "\nerror: ").splitlines() if line.startswith("error: ")]
    assert done.returncode and said and all(dying.url in line and "is saved in" in line for line in said), done.stderr
    (saved,) = (tmp_path / "out").glob("checkpoint-*")
    kept = {path.name for path in saved.iterdir()}
    assert kept >= {"optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"}
    more = ["--resume_from_checkpoint", "true", "--allow_changed_config", "true"]
    with served(narrow.teacher) as server:
        assert run_cli(flags_of(narrow, tmp_path / "out", *use(server.url), *how, *one, *more)) == 0
    assert curve(tmp_path / "out") == pytest.approx(curve(tmp_path / "whole"), rel=1e-5)


def test_the_card_names_the_served_model(narrow: World, tmp_path: Path) -> None:
    with served(narrow.teacher) as server:
        flags = flags_of(narrow, tmp_path / "out", *use(server.url), "--teacher_model_name_or_path", "someone/else")
        assert run_cli([*flags, "--max_steps", "1"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "taught by `toy` (served; its top 64 tokens): " in card
