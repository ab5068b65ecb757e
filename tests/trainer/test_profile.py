"""`speckd profile` tells where a step's time goes, and leaves nothing behind."""

import re
import threading
from itertools import count
from pathlib import Path

import pytest
import torch

from speckd import profile as profiling
from speckd import spans
from speckd.cli import main
from speckd.profile import Lap, StepProfile, Stopwatch
from speckd.spans import BACKWARD, DATA, GATE, HEAD_AND_LOSS, OPTIMIZER, STUDENT_FORWARD, TEACHER_FORWARD, span, timing
from tests.tiny import common_flags
from tests.trainer.conftest import World

CPU = torch.device("cpu")
PARTS = [DATA, TEACHER_FORWARD, STUDENT_FORWARD, HEAD_AND_LOSS, BACKWARD, OPTIMIZER]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def shares(table: str) -> dict[str, float]:
    rows = re.findall(r"^\| (.+?) +\| +[\d.]+ \| +([\d.]+)% \|$", table, re.MULTILINE)
    return {name: float(share) for name, share in rows}


@pytest.mark.parametrize(
    "more", ["", "--gradient_accumulation_steps 2 --use_peft true --lora_target_modules q_proj", "--packing true"]
)
def test_every_part_of_the_step_has_its_line_and_the_shares_are_the_step(world: World, place: Path, capsys, more: str) -> None:
    flags = common_flags(world.student, world.teacher, world.data, place / "out")
    assert main(["profile", *flags, *more.split(), "--max_length", "64", "--steps", "3"]) == 0
    printed = capsys.readouterr().out
    found = shares(printed)
    assert [name for name in found if not name.startswith("·")] == [
        *(part.removeprefix(spans.PREFIX) for part in PARTS), "rest", "**step**",
    ]  # fmt: skip
    assert found.pop("**step**") == 100
    outermost = [share for name, share in found.items() if not name.startswith("·")]
    assert sum(outermost) == pytest.approx(100, abs=0.05 * len(outermost) + 1e-6)
    assert "Median of 3 steps" in printed and "tokens a second" in printed and "MiB" in printed


def test_nothing_is_left_on_disk_and_a_finished_run_is_not_touched(world: World, place: Path) -> None:
    output = place / "out"
    output.mkdir()
    (output / "results.json").write_text("precious")
    before = files(place)
    flags = common_flags(world.student, world.teacher, world.data, output)
    keeping = "--save_strategy steps --save_steps 1 --eval_strategy steps --eval_steps 1 --load_best_model_at_end true"
    keeping += f" --report_to tensorboard --eval_dataset {world.data}"
    assert main(["profile", *flags, *keeping.split(), "--steps", "1"]) == 0
    assert files(place) == before
    assert (output / "results.json").read_text() == "precious"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--learning_rat", "1"], "'learning_rat' is not a setting. Did you mean 'learning_rate'?"),
        (["--gate", "top-k"], "gate"),
        (["--model_name_or_path", "./nowhere"], "model_name_or_path: there is no folder ./nowhere"),
        (["--dataset_name", "none.jsonl"], "none.jsonl: there is no such file"),
        (["--loss_chunk_size", "0"], "loss_chunk_size is 0"),
        (["--lora_r", "0", "--use_peft", "true"], "lora_r is 0"),
        (["--steps", "0"], "--steps"),
        (["--steps", "many"], "--steps"),
        (["--config", "none.yaml"], "none.yaml: there is no such file"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(world: World, place: Path, capsys, wrong: list[str], said: str) -> None:
    before = files(place)
    assert main(["profile", *common_flags(world.student, world.teacher, world.data, place / "out"), *wrong]) == 2
    streams = capsys.readouterr()
    assert not streams.out
    errors = [line for line in streams.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0]
    assert streams.err.rstrip().endswith(errors[0])
    assert files(place) == before


def test_what_goes_wrong_in_a_step_leaves_nothing_either(world: World, place: Path, capsys) -> None:
    before = files(place)
    flags = common_flags(world.student, world.teacher, world.data, place / "out")
    assert main(["profile", *flags, "--learning_rate", "1e30", "--recipe", "ungated"]) == 2
    assert "lower the learning rate" in capsys.readouterr().err.lower()
    assert files(place) == before


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves one second each time somebody looks at it."""
    looks = count()
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: float(next(looks)))


def test_the_stopwatch_adds_up_what_it_saw(ticks: None) -> None:
    stopwatch = Stopwatch(CPU)
    with timing(stopwatch):
        with span(DATA):
            pass  # before the first lap: forgotten
        stopwatch.begin()
        with span(HEAD_AND_LOSS):
            for _ in range(2):
                with span(GATE):
                    pass
        stopwatch.lap()
        with span(DATA):
            pass
        stopwatch.lap()
    with span(DATA):
        pass  # nobody listens any more
    whole, gate, data = (HEAD_AND_LOSS,), (HEAD_AND_LOSS, GATE), (DATA,)
    assert stopwatch.laps() == [Lap(7000.0, {whole: 5000.0, gate: 2000.0}), Lap(3000.0, {data: 1000.0})]


def test_a_span_that_fails_is_closed(ticks: None) -> None:
    stopwatch = Stopwatch(CPU)
    with timing(stopwatch):
        stopwatch.begin()
        with pytest.raises(ZeroDivisionError), span(DATA), span(GATE):
            _ = 1 / 0
        with span(DATA):
            pass
        stopwatch.lap()
    assert stopwatch.laps()[0].spans == {(DATA,): 4000.0, (DATA, GATE): 1000.0}


def test_another_thread_is_not_part_of_the_step(ticks: None) -> None:
    stopwatch = Stopwatch(CPU)

    def beside() -> None:
        with span(TEACHER_FORWARD):
            pass

    with timing(stopwatch):
        stopwatch.begin()
        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()
        stopwatch.lap()
    assert stopwatch.laps() == [Lap(1000.0, {})]


def test_medians_sum_to_the_step_and_a_part_stands_below_what_it_lies_in() -> None:
    late = (BACKWARD,)
    laps = [
        Lap(10.0, {(HEAD_AND_LOSS,): 4.0, late: 1.0}),
        Lap(30.0, {(HEAD_AND_LOSS,): 6.0, late: 3.0, (HEAD_AND_LOSS, GATE): 5.0}),  # first seen after the backward pass
        Lap(20.0, {(HEAD_AND_LOSS,): 5.0, late: 2.0, (HEAD_AND_LOSS, GATE): 1.0}),
    ]
    found = StepProfile(laps, tokens=120, peak_bytes=3 * 2**20, device=CPU)
    assert list(found.parts.items()) == [((HEAD_AND_LOSS,), 5.0), ((HEAD_AND_LOSS, GATE), 1.0), (late, 2.0)]
    assert found.rest == 13.0 and found.step == 20.0
    assert found.tokens_per_second == 2000.0
    assert shares(found.table()) == {
        "heads and loss": 25.0, "· gate": 5.0, "backward": 10.0, "rest": 65.0, "**step**": 100.0,
    }  # fmt: skip
    assert "2,000 tokens a second" in found.table() and "3 MiB" in found.table()


def test_torch_profiler_sees_the_same_names() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace, span(GATE):
        torch.ones(2).sum()
    assert GATE in {event.name for event in trace.events()}
