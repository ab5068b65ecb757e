"""The student's text by servers in training: the same as by this process, of weights as old as allowed; and servers lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from speckd.cli import main
from speckd.student_servers import WEIGHTS
from tests.tiny import common_flags, log_of, run_cli
from tests.trainer.conftest import World
from tests.trainer.served_student import StudentServer
from tests.trainer.test_student_text import BASE, MODES, NAMES

GREEDY = [*BASE, *"--sampling_temperature 0 --learning_rate 0.03 --per_device_train_batch_size 4".split()]
LORA = "--use_peft true --lora_r 4 --lora_dropout 0 --lora_target_modules q_proj v_proj up_proj".split()
PATIENCE = ["--teacher_server_patience_s", "2", "--teacher_server_timeout_s", "60"]


@pytest.fixture(scope="module")
def untied(world: World) -> World:
    """Its student has a head of its own."""
    model = AutoModelForCausalLM.from_pretrained(world.student)
    head = model.lm_head.weight.detach().clone()
    model.config.tie_word_embeddings = False
    apart = type(model)(model.config)
    apart.load_state_dict(model.state_dict() | {"lm_head.weight": head + 0.01})
    folder = world.place / "untied"
    apart.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((world.student / name).read_bytes())
    return World(folder, world.teacher, world.data, world.place)


def flags_of(world: World, output: Path, *more: str) -> list[str]:
    torch.manual_seed(0)  # an adapter starts as this process's generator stands
    return [*common_flags(world.student, world.teacher, world.data, output), *GREEDY, *more]


def require_same_steps(found: Path, wanted: Path) -> None:
    steps = [[{name: entry[name] for name in NAMES if name in entry} for entry in log_of(each)] for each in (found, wanted)]
    assert len(steps[0]) == len(steps[1]) == 4
    for a, b in zip(*steps, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize(("how", "mode"), [("adapter", "half"), ("adapter", "paired"), ("whole", "replay")])
def test_the_same_log_as_with_the_student_in_process(
    world: World, untied: World, tmp_path: Path, capsys: pytest.CaptureFixture, how: str, mode: str
) -> None:
    own, more = (world, LORA) if how == "adapter" else (untied, [])
    assert run_cli(flags_of(own, tmp_path / "here", *MODES[mode], *more)) == 0
    with StudentServer(own.student) as server:
        server.adapters["left-by-a-killed-run"] = "nowhere"
        assert run_cli(flags_of(own, tmp_path / "there", *MODES[mode], *more, "--student_server_urls", server.url)) == 0
        assert len(server.asked) > 4 and [*server.adapters] == ["left-by-a-killed-run"], "nothing of this run is left"
    require_same_steps(tmp_path / "there", tmp_path / "here")
    staleness = [[entry.get("on_policy/staleness") for entry in log_of(tmp_path / name)] for name in ("there", "here")]
    assert staleness[0] == staleness[1] and not (tmp_path / "there" / WEIGHTS).exists()
    said = [line for line in capsys.readouterr().err.splitlines() if "weights of step" in line]
    assert len(said) == 4, "at the start, which is the first step, and after each of three steps"


def test_weights_are_as_old_as_is_logged_and_allowed(world: World, tmp_path: Path) -> None:
    with StudentServer(world.student) as server:
        more = [*LORA, "--student_server_urls", server.url, "--student_server_max_staleness", "2", "--max_steps", "6"]
        assert run_cli(flags_of(world, tmp_path / "out", *more)) == 0
        loaded = [body["lora_name"].rsplit("-", 1)[1] for path, body in server.posted if path == "/v1/load_lora_adapter"]
    assert [entry["on_policy/staleness"] for entry in log_of(tmp_path / "out")] == [0, 1, 2, 0, 1, 2]
    assert loaded == ["0", "3"]


def test_two_processes_are_one(world: World, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "speckd", "train"]
    assert run_cli(flags_of(world, tmp_path / "one", *LORA, "--per_device_train_batch_size", "8")) == 0
    with StudentServer(world.student) as server:
        flags = flags_of(world, tmp_path / "two", *LORA, "--student_server_urls", server.url)
        done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-5000:]
        assert len({body["lora_name"] for path, body in server.posted if path == "/v1/load_lora_adapter"}) == 4
    require_same_steps(tmp_path / "two", tmp_path / "one")


def test_servers_that_are_lost_end_the_run_after_a_checkpoint_and_it_goes_on(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run_cli(flags_of(world, tmp_path / "whole", *LORA)) == 0
    with StudentServer(world.student, lives=12) as dying:  # three looks at the weights, two steps of 4 rows, and one row more
        assert run_cli(flags_of(world, tmp_path / "out", *LORA, *PATIENCE, "--student_server_urls", dying.url)) == 4
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: student_server_urls: ") and "step 2 is saved in" in last
    assert "--resume_from_checkpoint true goes on from there" in last and not (tmp_path / "out" / WEIGHTS).exists()
    with StudentServer(world.student) as server:
        more = ["--student_server_urls", server.url, "--resume_from_checkpoint", "true"]
        assert run_cli(flags_of(world, tmp_path / "out", *LORA, *PATIENCE, *more)) == 0
    require_same_steps(tmp_path / "out", tmp_path / "whole")


REFUSED = {
    "tied": ("", "the student's head is tied to its embedding"),
    "interleaved": ("--sequence_source interleaved", "with sequence_source: interleaved servers write nothing"),
    "dataset": ("--sequence_source dataset", "with sequence_source: dataset servers write nothing"),
    "staleness": ("--student_server_max_staleness -1", "student_server_max_staleness is -1"),
    "concurrency": ("--student_server_concurrency 0", "student_server_concurrency is 0"),
    "long": ("LORA --max_completion_length 500", "max_completion_length: the longest prompt has"),
    "trained beside": ("LORA --lora_modules_to_save lm_head", "the student trains modules_to_save"),
    "another model": ("LORA --student_server_model other", "offers student; wanted: other"),
    "weights that do not arrive": ("LORA deaf", "says that it holds the student's weights, but is"),
    "nobody there": ("LORA nobody", "is not ready after 2 s"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_servers_cannot_do_is_refused_before_the_first_step(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture, case: str
) -> None:
    words, said = REFUSED[case]
    flags = [flag for word in words.split() for flag in (LORA if word == "LORA" else [word]) if flag not in ("deaf", "nobody")]
    base = world.teacher if "deaf" in words else world.student
    with StudentServer(base, deaf=True) as server:
        url = "http://127.0.0.1:9" if "nobody" in words else server.url
        code = run_cli(flags_of(world, tmp_path / "out", *PATIENCE, "--student_server_urls", url, *flags))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == (4 if "nobody" in words else 2) and error.startswith("error: ") and said in error, json.dumps(error)
    assert not (tmp_path / "out").exists()


def test_the_doctor_tries_the_servers_and_leaves_nothing_there(
    world: World, place: Path, capsys: pytest.CaptureFixture
) -> None:
    for deaf in (False, True):
        with StudentServer(world.teacher if deaf else world.student, deaf=deaf) as server:
            code = main(["doctor", *flags_of(world, place / "out", *LORA, "--student_server_urls", server.url)])
            said = capsys.readouterr().out
            assert ("says that it holds the student's weights, but is" in said) == deaf
            assert code == 2 and ("first step" in said) != deaf, "a random teacher's padding is a failure, too"
            assert not server.adapters and len(server.posted) >= 2
    assert not (place / "out").exists()
