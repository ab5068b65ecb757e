"""What a plan asks for, and what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from speckd.bench.plan import Plan, Run, Teacher, World
from speckd.bench.reading import plan_of, plan_text, profiles, read_plan
from speckd.bench.worker import objective_of
from speckd.errors import ConfigError


def small() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(plan_text(Path("smoke")))
    return content


@pytest.mark.parametrize("name", profiles())
def test_every_shipped_profile_is_a_plan_whose_methods_exist(name: str) -> None:
    plan = read_plan(Path(name))
    assert list(plan.cells())
    for method in plan.methods.values():
        objective_of(method)


def test_who_asks_no_teacher_is_run_once_and_an_oracle_only_where_something_is_scrambled() -> None:
    cells = [cell for _, cell in plan_of(small()).cells() if cell.block == "headline"]
    assert [cell.teacher for cell in cells if cell.method == "SFT"] == ["clean"]
    assert {cell.teacher for cell in cells if cell.method == "oracle mask"} == {"scrambled 25 %", "scrambled 50 %"}
    assert sum(cell.method == "ungated" for cell in cells) == 3


def test_equal_compute_gives_the_steps_that_the_teachers_forward_would_have_cost() -> None:
    plan = plan_of(small())
    block = next(b for b in plan.blocks if b.budget == "compute")
    student, teacher = 12 * 1 * 16**2, 12 * 4 * 144**2
    assert plan.steps_of(block, plan.methods["SFT"]) == round(3 * (6 * student + 2 * teacher) / (6 * student))
    assert plan.steps_of(block, plan.methods["ungated"]) == 3


def test_a_run_is_known_by_everything_that_decides_it() -> None:
    run = Run(World(), 0, 0)
    others = [
        dataclasses.replace(run, seed=1),
        dataclasses.replace(run, teacher=Teacher(scrambled=0.1)),
        dataclasses.replace(run, world=World(train=5)),
        dataclasses.replace(run, learning_rate=0.1),
        dataclasses.replace(run, split="validation"),
    ]
    assert len({r.key for r in [run, *others]}) == 6 and run.key == Run(World(), 0, 0).key


def broken(path: str, value: Any) -> dict[str, Any]:
    content = small()
    place: Any = content
    *above, last = path.split("/")
    for step in above:
        place = place[int(step) if step.isdigit() else step]
    place[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("wurld", {}, "the plan: 'wurld' is not a key of it. Did you mean 'world'?"),
        ("world/levl", 2, "world: 'levl' is not a key"),
        ("world/level", 9, "level 9 does not exist"),
        ("world/teacher", {"hidden": 8, "layers": 1, "heads": 1}, "teacher and teacher_trained go together"),
        ("teachers/clean", {"scrambled": 2}, "teachers: clean: scrambled is 2"),
        ("teachers/clean", {"bits": 1}, "bits is 1"),
        (
            "teachers/clean",
            {"trained": {"steps": 3, "families": ["maths"]}},
            "'maths' is not a family of tasks. Did you mean 'math'?",
        ),
        ("teachers/clean", {"shape": {"hidden": 8, "layers": 1, "heads": 1}}, "a shape without trained"),
        ("teachers/clean", {"shape": {"hidden": 8}, "trained": {"steps": 3}}, "missing 2 required"),
        ("methods/SFT", {"aim": "speed"}, "aim is 'speed'"),
        ("blocks/0/methods", ["ungated", "trsut"], "blocks: headline: methods: 'trsut' is not there. Did you mean 'trust'?"),
        ("blocks/0/teachers", ["nobody"], "'nobody' is not there"),
        ("blocks/0/data", ["tape"], "data: 'tape' is not there"),
        ("blocks/0/seeds", 0, "blocks[0]: seeds is 0"),
        ("blocks/0/seeds", "two", "blocks[0]: seeds is 'two'"),
        ("blocks/0/steps", 2.5, "blocks[0]: steps is 2.5"),
        ("blocks/0/name", 5, "blocks[0]: name is 5"),
        ("blocks/0/learning_rate", 0, "blocks[0]: learning_rate is 0"),
        ("blocks/0/methods", "trust", "blocks[0]: methods is 'trust'"),
        ("blocks/0/teachers", [], "blocks[0]: teachers is []"),
        (
            "blocks",
            [{"name": "o", "starts": ["warm"], "teachers": ["clean"], "methods": ["oracle mask"], "seeds": 1, "steps": 1}],
            "blocks: o: it asks for no run",
        ),
        ("blocks", None, "blocks is None"),
        ("blocks", [], "blocks is []"),
        ("starts/warm", "4", "starts: warm is '4'"),
        ("starts/warm", -1, "starts: warm is -1"),
        ("learning_rates", 0.001, "learning_rates is 0.001"),
        ("learning_rates", [], "learning_rates is []"),
        ("learning_rates", ["fast"], "learning_rates is 'fast'"),
        ("learning_rates", [0.0], "learning_rates is 0.0"),
        ("tuning_seeds", 5, "tuning_seeds is 5"),
        ("tuning_seeds", [], "tuning_seeds is []"),
        ("references", "ungated", "references is 'ungated'"),
        ("world/train", 0, "world: train is 0"),
        ("world/test", 2, "world: test is 2"),
        ("world/batch_size", "6", "world: batch_size is '6'"),
        ("world/student", {"hidden": 16, "layers": 1, "heads": 3}, "world: student: 3 heads of hidden 16"),
        ("teachers/clean", {"top_k": 0}, "teachers: clean: top_k is 0"),
        ("teachers/clean", {"prefix": 3}, "teachers: clean: prefix is 3"),
        ("teachers/clean", {"trained": {"steps": 3, "label_noise": 2}}, "label_noise is 2"),
        ("teachers/clean", {"trained": {"steps": 3, "families": "math"}}, "families is 'math'"),
        ("methods/SFT", {"oracle": "yes"}, "oracle is 'yes'"),
        ("methods/SFT", {"untrained": 1}, "untrained is 1"),
        ("methods/SFT", {"untrained": True, "gate": "none"}, "methods: SFT: it is untrained and has settings"),
        ("methods", {1: {"gate": "none"}}, "methods: 1 is no name"),
        ("starts", {True: 4}, "starts: True is no name"),
        ("tuned_with", {"clean": ["x"]}, "tuned_with: ['x'] is no name"),
        ("references", [["SFT"]], "references: ['SFT'] is no name"),
        ("blocks/0/starts", [["warm"]], "blocks[0]: starts: ['warm'] is no name"),
        ("learning_rates", [1e-3, 1e-3], "learning_rates: one stands there twice"),
        ("tuning_seeds", [1], "tuning_seeds: 1 is also a seed of the comparison"),
        ("blocks/1/name", "headline!", "two have the same name"),
        ("rates_beyond", -1, "rates_beyond is -1"),
        ("rates_beyond", "many", "rates_beyond is 'many'"),
        ("tuned_with", ["clean"], "tuned_with is ['clean']"),
        ("blocks/0/budget", "money", "budget is 'money'"),
        ("blocks/1/name", "headline", "two have the same name"),
        ("tuned_with", {"clean": "nobody"}, "'nobody' is not a teacher"),
        ("references", ["nobody"], "'nobody' is not a method"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_line(path: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(broken(path, value))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("starts: {warm: 4}\nteachers: {clean: {}}\nstarts: {warm: 5}\n")
    with pytest.raises(ConfigError, match=r"plan.yaml:3: key 'starts' is given twice"):
        read_plan(path)


def test_rates_beyond_go_on_in_the_steps_of_either_end() -> None:
    plan = plan_of(broken("learning_rates", [4e-3, 1e-3, 2e-3]) | {"rates_beyond": 2})
    assert plan.ladder == pytest.approx((2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2))
    with pytest.raises(ConfigError, match="rates_beyond: one learning rate"):
        plan_of(broken("learning_rates", [1e-3]) | {"rates_beyond": 1})


def test_who_is_not_trained_is_run_once_a_start_and_tuned_nowhere() -> None:
    plan = plan_of(broken("methods/start", {"untrained": True}) | {"blocks": [{**small()["blocks"][0], "methods": ["start"]}]})
    ((block, cell),) = plan.cells()
    assert plan.run(block, cell, 0, 0.0).steps == 0 and not plan.tuned(block, cell)


def test_numbers_may_be_written_as_yaml_reads_them_as_text() -> None:
    """`1e-3`, without a point, is text to YAML 1.1."""
    content = yaml.safe_load("learning_rates: [1e-3, 2.0e-3]")
    assert content["learning_rates"][0] == "1e-3"
    plan = plan_of({**broken("blocks/0/learning_rate", "2e-3"), **content})
    assert plan.learning_rates == (1e-3, 2e-3) and plan.blocks[0].learning_rate == 2e-3


def test_a_wrong_method_is_refused_before_anything_is_trained() -> None:
    for spec, said in (
        ({"gaet": "none"}, "gaet"),
        ({"gate": "tap_k"}, "'tap_k' is not a gate"),
        ({"gate": "excess_divergence"}, "a benchmark has none"),
    ):
        plan = plan_of(broken("methods/ungated", spec))
        with pytest.raises(ConfigError, match=said):
            objective_of(plan.methods["ungated"])


def test_a_plan_that_is_nowhere() -> None:
    with pytest.raises(ConfigError, match="there is no plan nowhere"):
        read_plan(Path("nowhere"))


def test_plans_are_frozen() -> None:
    assert isinstance(plan_of(small()), Plan)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan_of(small()).world.level = 1  # type: ignore[misc]
