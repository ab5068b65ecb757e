"""A benchmark end to end on the smallest plan: killed and gone on with, honest tables, and each condition what it says."""

import dataclasses
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from rich.console import Console

from speckd.bench import makers, runner, worker
from speckd.bench.oracle import Oracle
from speckd.bench.pictures import draw_all
from speckd.bench.plan import Method, Run, Shape, Teacher, TrainedOn, World
from speckd.bench.reading import plan_of, read_plan
from speckd.bench.runner import Found, Outcome, _made_first, _Pool, next_rates, run_all
from speckd.bench.tables import MEASURES, Results, markdown
from speckd.cli import main
from speckd.errors import ConfigError, SpeckdError
from speckd.quickstart.data import collate
from speckd.teachers import ScrambledTeacher

WORLD: dict[str, Any] = {
    "train": 24,
    "validation": 6,
    "test": 9,
    "batch_size": 4,
    "max_new_tokens": 8,
    "student": {"hidden": 8, "layers": 1, "heads": 1},
}
PLAN: dict[str, Any] = {
    "world": WORLD,
    "starts": {"warm": 2},
    "teachers": {"clean": {}, "half": {"scrambled": 0.5}},
    "methods": {"SFT": {"label_loss_weight": 1}, "ungated": {"gate": "none"}, "trust": {"gate": "trust", "rejected": "label"}},
    "blocks": [
        {
            "name": "b",
            "starts": ["warm"],
            "teachers": ["clean", "half"],
            "methods": ["SFT", "ungated", "trust"],
            "seeds": 2,
            "steps": 2,
        }
    ],
}
SMALL = World(train=24, validation=6, test=9, batch_size=4, max_new_tokens=8, student=Shape(8, 1, 1), refresh=2)


def outcomes(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def running_still(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_a_killed_benchmark_goes_on_to_the_same_results(tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    plan.write_text(yaml.safe_dump(PLAN))
    command = [sys.executable, "-m", "speckd", "bench", str(plan), "--output_dir", str(out), "--workers", "1"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 200
    while len(list((out / "runs").glob("[0-9a-f]*.json"))) < 3 and running.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    workers = psutil.Process(running.pid).children(recursive=True)
    running.kill()
    running.wait()
    until = time.monotonic() + 60
    while running_still(workers) and time.monotonic() < until:
        time.sleep(0.1)
    assert workers
    assert not running_still(workers)  # they end with their parent
    kept = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("[0-9a-f]*.json")}
    assert 3 <= len(kept) < 10 and not (out / "results.jsonl").exists()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    found = outcomes(out)
    assert len(found) == 10
    run = Run(
        SMALL.__class__(**{**WORLD, "student": Shape(8, 1, 1)}),
        1,
        2,
        Method({"gate": "trust", "rejected": "label"}),
        Teacher(scrambled=0.5),
        "dataset",
        2,
        2e-3,
    )
    alone = worker.train_and_measure(run, tmp_path / "made")
    same = next(o for o in found if (o["seed"], o["cell"]["teacher"], o["cell"]["method"]) == (1, "half", "trust"))
    assert same["measures"] == alone["measures"] and same["right"] == alone["right"]
    assert (out / "dose-b.png").exists() is False and (out / "front-b.png").exists()  # two doses are no curve
    assert "### warm, half, dataset" in (out / "tables.md").read_text()


def test_the_tables_say_what_the_runs_say() -> None:
    plan = plan_of(PLAN)
    found = [
        Found(
            cell,
            seed,
            2e-3,
            2,
            outcome(0.5 + 0.1 * (cell.method == "trust") + 0.01 * seed, "11000" if cell.method == "trust" else "10000"),
        )
        for _, cell in plan.cells()
        for seed in range(2)
    ]
    results = Results(plan, found)
    (_, first), (_, second) = results.groups()
    assert [c.method for c in first] == [c.method for c in second] == ["SFT", "ungated", "trust"]
    gap = results.against(first, "ungated", "nll")["trust"]
    assert gap.mean == pytest.approx(0.1) and gap.verdict(False) == "worse" and gap.verdict(True) == "better"
    text = markdown(plan, Outcome(found, []))
    assert "| trust | 4 / 0 / 2 | 4 / 0 / 2 | 0 / 0 / 4 | 0 / 0 / 4 |" in text  # NLL and ECE worse, accuracy better; two cells
    assert "**+0.100** [+0.100, +0.100]*" in text


def test_the_tables_say_where_a_rate_comes_from_and_claim_nothing_of_one_seed() -> None:
    block = {**PLAN["blocks"][0], "seeds": 1}
    blocks = [block, {**block, "name": "fixed", "learning_rate": 3e-3}]
    plan = plan_of({**PLAN, "blocks": blocks, "learning_rates": [1e-3, 1.5e-3, 4e-3], "tuned_with": {"half": "clean"}})
    rates = {"SFT": 1e-3, "ungated": 1.5e-3, "trust": 4e-3}
    found = [
        Found(cell, 0, block.learning_rate or rates[cell.method], 2, outcome(0.5 + (cell.method == "trust"), "1"))
        for block, cell in plan.cells()
    ]
    tuned, fixed = markdown(plan, Outcome(found, [])).split("## fixed")
    assert "| SFT | 0.001 (lowest) |" in tuned and "| ungated | 0.0015 |" in tuned and "| trust | 0.004 (highest) |" in tuned
    assert "half, dataset\n\nLearning rates are those for the teacher clean." in tuned
    assert "Learning rate 0.003 for all, not tuned." in fixed and "| trust | 0.003 |" in fixed and "those for" not in fixed
    assert "| trust | – | – | – | – |" in tuned  # one seed has no interval: that is not "alike"


def test_doses_on_different_texts_are_curves_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    shown: list[Any] = []
    monkeypatch.setattr(plt, "close", shown.append)
    block = {**PLAN["blocks"][0], "teachers": ["clean", "quarter", "half"], "data": ["dataset", "teacher text"]}
    plan = plan_of({**PLAN, "teachers": {**PLAN["teachers"], "quarter": {"scrambled": 0.25}}, "blocks": [block]})
    found = [Found(cell, seed, 2e-3, 2, outcome(0.5, "1")) for _, cell in plan.cells() for seed in range(2)]
    draw_all(plan, found, tmp_path)
    curves = [list(curve[0].get_xdata()) for axis in shown[0].axes for curve in axis.containers]
    assert len(curves) == 2 * 5 * 2  # two texts, five measures, and what is left when one of three methods is subtracted
    assert all(x == pytest.approx([0, 25, 50], abs=2) for x in curves)  # side by side at each dose


def test_a_best_rate_at_an_edge_is_gone_beyond_of() -> None:
    ladder = (1.0, 2.0, 4.0, 8.0, 16.0)
    assert next_rates(ladder, [4.0, 2.0], 2.0) == [1.0] and next_rates(ladder, [2.0, 4.0], 4.0) == [8.0]
    assert next_rates(ladder, [2.0, 4.0, 8.0], 4.0) == [] and next_rates(ladder, [1.0, 2.0], 1.0) == []
    assert next_rates(ladder, [4.0, 8.0, 16.0], 16.0) == []


def test_tuning_goes_on_while_the_outermost_rate_is_the_best_and_the_start_is_measured_as_it_is(tmp_path: Path) -> None:
    methods = {"SFT": {"label_loss_weight": 1}, "not trained": {"untrained": True}}
    block = {**PLAN["blocks"][0], "methods": list(methods), "teachers": ["clean"], "seeds": 1}
    content = {**PLAN, "methods": methods, "references": ["SFT"], "learning_rates": [1e-5, 2e-5], "rates_beyond": 2}
    plan = plan_of({**content, "blocks": [block]})
    outcome_of = run_all(plan, tmp_path, 1, Console(quiet=True))
    trained, start = outcome_of.found
    assert trained.learning_rate == plan.ladder[-1] == 8e-5  # two steps of so little: the more the better
    tried = [json.loads(p.read_text()) for p in (tmp_path / "runs").glob("[0-9a-f]*.json")]
    assert sum("right" not in one for one in tried) == 4  # 1e-5 to 8e-5, and not those below
    world = World(**{**WORLD, "student": Shape(8, 1, 1)})
    student = makers.starting_student(Run(world, 0, 2), tmp_path / "made")
    assert worker.measure(student, Run(world, 0, 2), tmp_path / "made")["measures"] == start.outcome["measures"]
    assert start.steps == 0 and "| not trained | – | – |" in markdown(plan, outcome_of)


def test_a_rate_whose_runs_fail_is_the_worst_and_no_rate_at_all_is_said() -> None:
    plan = plan_of({**PLAN, "learning_rates": [1e-3, 2e-3, 4e-3], "rates_beyond": 1})
    tuning = {runner._tuned(plan, cell): block for block, cell in plan.cells()}

    class Pool:
        def __init__(self, failing: set[float]) -> None:
            self.failing, self.asked = failing, list[float]()

        def some(self, stage: str, runs: Any, made: Path) -> Any:
            self.asked += [run.learning_rate for run in runs]
            nll = {run.key: outcome(1 / run.learning_rate, "") for run in runs if run.learning_rate not in self.failing}
            return nll, ["NonFiniteError: the student's logits"] if len(nll) < len(runs) else []

    pool: Any = Pool({4e-3})
    assert set(runner._tune(plan, tuning, pool, Path()).values()) == {2e-3} and max(pool.asked) == 4e-3
    pool = Pool(set())
    assert set(runner._tune(plan, tuning, pool, Path()).values()) == {8e-3} and min(pool.asked) == 1e-3
    with pytest.raises(SpeckdError, match="no learning rate of SFT could be tried: NonFiniteError"):
        runner._tune(plan, tuning, Pool({1e-3, 2e-3, 4e-3}), Path())  # type: ignore[arg-type]


def test_a_comparison_that_stands_in_several_tables_counts_once(tmp_path: Path) -> None:
    methods = {"SFT": {"label_loss_weight": 1}, "not trained": {"untrained": True}, "ungated": {"gate": "none"}}
    plan = plan_of({**PLAN, "methods": methods, "blocks": [{**PLAN["blocks"][0], "methods": list(methods)}]})
    found = [Found(c, s, 2e-3, 2, outcome(0.5 + (c.method != "SFT"), "1")) for _, c in plan.cells() for s in range(2)]
    text = markdown(plan, Outcome(found, []))
    assert "| not trained | 0 / 6 / 0 | 2 / 0 / 1 | 0 / 4 / 0 | 0 / 0 / 2 |" in text  # two teachers, one SFT
    assert "| ungated | – | 4 / 0 / 2 |" in text
    assert "bootstrap over seeds and problems:" not in text.split("## b")[1]  # of two seeds


def test_names_are_drawn_as_they_are_and_no_reference_is_needed(tmp_path: Path) -> None:
    methods = {"_a $\\frac$": {"gate": "none"}, "oracle": {"gate": "none", "rejected": "mask", "oracle": True}}
    plan = plan_of({**PLAN, "methods": methods, "references": [], "blocks": [{**PLAN["blocks"][0], "methods": list(methods)}]})
    found = [Found(c, s, 2e-3, 2, outcome(0.5, "1")) for _, c in plan.cells() for s in range(2)]
    draw_all(plan, found, tmp_path)
    assert "| _a $\\frac$ | 0.002 |" in markdown(plan, Outcome(found, [])) and (tmp_path / "front-b.png").is_file()


def test_a_picture_has_numbers_on_its_axes_and_names_what_is_too_far_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib.pyplot as plt

    shown: list[Any] = []
    monkeypatch.setattr(plt, "close", shown.append)
    value = {"SFT": 0.5, "a": 0.51, "b": 0.52, "$x$": 9.0}
    methods = {name: {"label_loss_weight": 1} if name == "SFT" else {"gate": "none"} for name in value}
    block = {**PLAN["blocks"][0], "methods": list(value), "teachers": ["clean", "quarter", "half"]}
    teachers = {**PLAN["teachers"], "quarter": {"scrambled": 0.25}}
    plan = plan_of({**PLAN, "methods": methods, "references": ["SFT"], "teachers": teachers, "blocks": [block]})
    found = [Found(c, s, 2e-3, 2, outcome(value[c.method] + 0.001 * s, "1")) for _, c in plan.cells() for s in range(2)]
    draw_all(plan, found, tmp_path)
    doses, front = shown
    doses.canvas.draw()
    ticks = doses.axes[0].get_yticklabels()
    assert any("10^" in tick.get_text() for tick in ticks) and all(tick.get_parse_math() for tick in ticks)
    assert front.axes[0].get_title().splitlines()[1] == r"not in the picture: \$x\$"
    assert front.axes[0].get_xlim()[1] < 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for equal in (0.5, 0.0):
            draw_all(plan, [with_alpha(one, equal) for one in found], tmp_path)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.unfinished").write_text("")
    with pytest.raises(ConfigError, match="is not empty, and holds no benchmark"), _Pool(tmp_path, 1, Console(quiet=True)):
        pass
    assert (tmp_path / "notes" / "mine.unfinished").is_file()


def test_progress_is_also_seen_in_a_file(tmp_path: Path) -> None:
    with (tmp_path / "log.txt").open("w") as file, _Pool(tmp_path / "out", 1, Console(file=file, width=200)) as pool:
        for done in range(11, 101):
            pool._say("runs", done, 100, 10, time.monotonic() - 60 * (done - 10))
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == 18 and lines[0] == "runs: 15 of 100, about 85 min left"
    assert lines[-1] == "runs: 100 of 100, about 0 min left"


def test_a_run_that_fails_is_missed_aloud_and_blocks_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from speckd.bench.command import bench

    calls: list[str] = []

    def some(pool: _Pool, stage: str, runs: Any, made: Path) -> Any:
        calls.append(stage)
        done = {run.key: outcome(0.5, "1") for run in runs if not (run.seed == 1 and "gate" in run.method.settings)}
        return done, ["ungated, seed 1: RuntimeError: no"] if stage == "runs" else []

    monkeypatch.setattr(_Pool, "some", some)
    monkeypatch.setattr(runner, "_starts", lambda runs: [])
    monkeypatch.setattr(runner, "_made_first", lambda plan, cells: [])
    monkeypatch.setattr(_Pool, "all", lambda pool, stage, runs, made: {})
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(PLAN))
    with pytest.raises(SpeckdError, match=r"1 runs failed and are missing there, first ungated, seed 1"):
        bench(plan, tmp_path / "out", 1)
    text = (tmp_path / "out" / "tables.md").read_text()
    assert "**Incomplete**: 1 runs failed and are missing: ungated, seed 1: RuntimeError: no." in text
    assert len(outcomes(tmp_path / "out")) == 6 and calls == ["runs"]  # SFT twice, the others' seed 0 with two teachers


def test_a_method_may_have_a_bar_in_its_name_and_a_small_difference_of_alpha_is_seen() -> None:
    methods = {"SFT": {"label_loss_weight": 1}, "a | b": {"gate": "none"}}
    plan = plan_of(
        {
            **PLAN,
            "methods": methods,
            "references": ["SFT"],
            "blocks": [{**PLAN["blocks"][0], "methods": list(methods), "teachers": ["clean"]}],
        }
    )
    found = [Found(c, s, 2e-3, 2, outcome(0.5 + 0.0002 * (c.method != "SFT"), "1")) for _, c in plan.cells() for s in range(2)]
    text = markdown(plan, Outcome(found, []))
    rows = [line for line in text.splitlines() if line.startswith("| a ")]
    assert len(rows) == 3 and all(row.startswith("| a \\| b |") for row in rows)
    assert "**+0.0002** [+0.0002, +0.0002]*" in text


def test_a_share_of_the_oracles_gain() -> None:
    plan = plan_of({**PLAN, "methods": {**PLAN["methods"], "oracle": {"gate": "none", "rejected": "mask", "oracle": True}},
                    "blocks": [{**PLAN["blocks"][0], "methods": ["SFT", "ungated", "trust", "oracle"]}]})  # fmt: skip
    value = {"ungated": 1.0, "oracle": 0.6, "trust": 0.7, "SFT": 1.1}
    found = []
    for _, c in plan.cells():
        for seed in range(2):
            nll = value[c.method] - (0.1 * seed if c.method == "trust" else 0)
            found.append(Found(c, seed, 2e-3, 2, outcome(nll, "1")))
    text = markdown(plan, Outcome(found, []))
    assert "trust: NLL 88 % (75 to 100)" in text and "SFT: NLL -25 % (-25 to -25)" in text
    assert text.count("Share of the oracle") == 1  # where the teacher is scrambled


def with_alpha(one: Found, value: float) -> Found:
    measures = one.outcome["measures"] | {"alpha": value}
    return dataclasses.replace(one, outcome=one.outcome | {"measures": measures})


def outcome(value: float, right: str) -> dict[str, Any]:
    return {"measures": dict.fromkeys(MEASURES, value), "right": right, "training": {"tar_micro": 1.0}, "seconds": 1.0}


def test_the_oracle_knows_where_the_teacher_is_scrambled(tmp_path: Path) -> None:
    run = Run(SMALL, 3, 0, Method({"gate": "none", "rejected": "mask"}, oracle=True), Teacher(scrambled=0.5), steps=1)
    batch, _, teacher, rows = next(worker._batches(None, run, tmp_path))
    assert isinstance(teacher, ScrambledTeacher)
    wrong = teacher.scrambled(rows.index)
    gate = worker.objective_of(run.method, run).gate  # type: ignore[arg-type]
    assert isinstance(gate, Oracle) and 0.2 < float(wrong.double().mean()) < 0.8
    from speckd.types import Rows

    signal_of = teacher.signal(rows.index)
    seen = Rows.of(signal_of, signal_of, rows.labels, rows.keys)
    assert torch.equal(gate(seen) == 0, wrong)
    assert batch.input_ids.shape[0] == 4


@pytest.mark.parametrize(
    "teacher",
    [
        Teacher(),
        Teacher(top_k=5),
        Teacher(bits=3),
        Teacher(prefix="result : buys"),
        Teacher(trained=TrainedOn(2, label_noise=0.5)),
        Teacher(shape=Shape(8, 1, 1), trained=TrainedOn(2, families=("math",))),
    ],
)
def test_a_stored_teacher_answers_as_the_model_does(tmp_path: Path, teacher: Teacher) -> None:
    """Each supervised token's logits, looked up through batches, are those of the model on the text as the teacher sees it."""
    run = Run(SMALL, 0, 0, Method({"gate": "none"}), teacher, steps=2)
    model = makers.teacher_model(SMALL, teacher.base, tmp_path)
    plain = makers.teacher_model(SMALL, Teacher(), tmp_path)
    tasks = {e.sample: e for e in makers.training_tasks(SMALL)}
    for batch, _, answers, rows in worker._batches(None, run, tmp_path):
        signal_of = answers.signal(rows.index)
        for line in range(len(batch.input_ids)):
            task = makers.shown(tasks[int(batch.sample_ids[line, 0])], teacher.prefix)
            own = (rows.index // batch.input_ids.shape[1] == line).nonzero()[:, 0]
            ids, mask = collate([task], 0)
            with torch.no_grad():
                wanted = model(ids.input_ids, attention_mask=mask).logits[0, task.prompt_length - 1 : -1].log_softmax(-1)
            labels = rows.labels[own]
            assert torch.allclose(
                signal_of.label_log_prob(rows.labels)[own], wanted.gather(-1, labels[:, None])[:, 0], atol=1e-4
            )
    changed = any(not torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=False))
    assert changed == (teacher.base.trained is not None or teacher.bits is not None)


@pytest.mark.parametrize("data", ["teacher text", "student text"])
def test_written_text_is_trained_on_with_its_writers_words_as_labels(tmp_path: Path, data: str) -> None:
    run = Run(SMALL, 0, 2, Method({"gate": "none"}), Teacher(), data, steps=4, learning_rate=1e-3)
    student = makers.starting_student(run, tmp_path)
    for batch, _, answers, rows in worker._batches(student, run, tmp_path):
        assert torch.equal(batch.labels[batch.labels >= 0], batch.input_ids[batch.labels >= 0])
        assert bool(torch.isfinite(answers.signal(rows.index).label_log_prob(rows.labels)).all())
    again = [b[0].input_ids for b in worker._batches(student, run, tmp_path)]
    assert all(torch.equal(a, b[0].input_ids) for a, b in zip(again, worker._batches(student, run, tmp_path), strict=True))


def test_rounding_to_few_bits_leaves_few_values(tmp_path: Path) -> None:
    model = makers.teacher_model(SMALL, Teacher(bits=3), tmp_path)
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert len(weight[0, :32].unique()) <= 2**3 - 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"blocks": [{**PLAN["blocks"][0], "data": ["student text"], "methods": ["trust"]}]},
            "on student text, trust would take",
        ),
        ({"blocks": [{**PLAN["blocks"][0], "data": ["student text"], "methods": ["SFT"]}]}, "on student text, SFT would take"),
        ({"world": {**WORLD, "device": "gpu"}}, "device 'gpu' is not there"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_made(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run_all(plan_of({**PLAN, **change}), tmp_path / "out", 1, Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_one_benchmark_at_a_time_in_a_folder_which_sweeps_what_a_killed_one_left(tmp_path: Path) -> None:
    for name in ("runs", "made"):
        (tmp_path / name).mkdir()
    (tmp_path / "runs" / "a.json.7.unfinished").write_text("{")
    (tmp_path / "made" / "teacher-a.7.unfinished").mkdir()
    with _Pool(tmp_path, 1, Console(quiet=True)):
        assert not list(tmp_path.glob("*/*"))
        with pytest.raises(ConfigError, match="another benchmark is at work"), _Pool(tmp_path, 1, Console(quiet=True)):
            pass
    with _Pool(tmp_path, 1, Console(quiet=True)):
        pass


def test_no_teacher_is_made_by_two_processes_and_a_template_makes_no_other_model(tmp_path: Path) -> None:
    plan = read_plan(Path("cpu"))
    made = _made_first(plan, list(plan.cells()))
    assert len({(run.teacher, run.data) for run in made}) == len(made) and (Teacher(), "dataset") not in [
        (run.teacher, run.data) for run in made
    ]
    world = dataclasses.replace(SMALL, teacher=Shape(8, 1, 1), teacher_trained=TrainedOn(1))
    for prefix in ("", "result : buys"):
        makers.teacher_model(world, Teacher(prefix=prefix), tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_plan_with_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        yaml.safe_dump({**PLAN, "methods": {"SFT": {"label_loss_weight": 1}, "ungated": {"gate": "nothing"}, "trust": {}}})
    )
    assert main(["bench", str(plan), "--output_dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "'nothing' is not a gate" in said and not (tmp_path / "out").exists()


def test_a_plan_may_have_a_clean_teacher_of_its_own(tmp_path: Path) -> None:
    """As the profile for a GPU does: trained once, and what all measures are against."""
    world = dataclasses.replace(SMALL, teacher=Shape(16, 1, 1), teacher_trained=TrainedOn(2), level=3)
    clean = makers.clean_teacher(world, tmp_path)
    assert clean.config.hidden_size == 16 and clean.config.num_hidden_layers == 1
    made = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    outcome_of = worker.train_and_measure(Run(world, 0, 0, Method({"gate": "none"}), Teacher(), "dataset", 2, 1e-3), tmp_path)
    assert outcome_of["measures"]["teacher_nll"] > 3  # one of two steps knows nothing
    assert all(path.stat().st_mtime_ns == before for path, before in made.items())
