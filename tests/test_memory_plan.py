"""The planner's arithmetic: cases added up by hand, and what must grow with what."""

from dataclasses import replace

import pytest
from transformers.training_args import OptimizerNames

from speckd.arguments import SpecKDConfig
from speckd.errors import ConfigError
from speckd.memory_plan import (
    MIB,
    OPTIMIZERS,
    Backward,
    Evaluation,
    Forward,
    Head,
    Holes,
    StepFacts,
    optimizer_bytes,
    plan,
    tiles_bytes,
    update_bytes,
)

#: Two million numbers: 8 MB in float32, so that everything is larger than the engine's least tiles.
HEAD = Head(rows=20_000, width=100, vocabulary=20_000, tied=True)
FACTS = StepFacts(
    student=10_000_000,
    teacher=20_000_000,
    gradients=9_000_000,
    optimizer=18_000_000,
    update=1_000,
    head=HEAD,
    tokens=1_000,
    chunk=1_000,
    student_forward=Forward(peak=5_000_000, kept=4_000_000),
    backward=Backward(peak=12_000_000, gradients=8_500_000, apart=6_000_000),
    teacher_forward=Forward(peak=3_000_000, kept=400_000),
    process=7,
)
#: What is there throughout.
ALWAYS = 10_000_000 + 20_000_000 + 18_000_000 + 7
#: Two buffers of [1000, 20000] in float32, and 16 % of one.
CHUNK = 2 * 80_000_000 + 12_800_000
#: The gradient of the hidden states, [1000, 100], and that of the head, [20000, 100], both in float32.
HIDDEN, HEADS = 400_000, 8_000_000


def totals(facts: StepFacts) -> dict[str, int]:
    return {name.split()[-1]: parts.total for name, parts in plan(facts).moments.items()}


def test_the_moments_of_a_step_added_up_by_hand() -> None:
    assert totals(FACTS) == {
        "forward": ALWAYS + 5_000_000 + 400_000,  # the student's, whose name comes later than the teacher's
        "loss": ALWAYS + 4_000_000 + 400_000 + CHUNK + HIDDEN + HEADS,
        "pass": ALWAYS + 12_000_000 + HEADS,  # the tied head's gradient waits for that of the embedding
        "step": ALWAYS + 9_000_000 + 1_000,
    }
    assert plan(FACTS).moments["the teacher's forward"].total == ALWAYS + 3_000_000
    assert plan(FACTS).moment == "the loss" and plan(FACTS).peak.loss == CHUNK + HIDDEN + HEADS


def test_the_backward_pass_is_as_high_as_its_start_or_its_middle() -> None:
    early = replace(FACTS, backward=Backward(peak=1, gradients=0, apart=1))
    assert totals(early)["pass"] == ALWAYS + 4_000_000 + HIDDEN + HEADS
    padded = replace(early, head=replace(HEAD, rows=20_100))  # the shared rows' gradient becomes that of all rows
    assert totals(padded)["pass"] == ALWAYS + 4_000_000 + HIDDEN + HEADS + 20_100 * 100 * 4
    narrow = replace(early, head=replace(HEAD, number_bytes=2))  # rounded from float32
    assert totals(narrow)["pass"] == ALWAYS + 4_000_000 + HIDDEN + HEADS + 4_000_000


def test_an_untied_heads_gradient_is_its_parameters_at_once() -> None:
    parts = plan(replace(FACTS, head=replace(HEAD, tied=False))).moments["the backward pass"]
    assert (parts.gradients, parts.loss) == (8_500_000 + HEADS, 0)
    assert parts.total == totals(FACTS)["pass"]


def test_several_micro_batches_hold_the_gradients_throughout() -> None:
    one, several = plan(FACTS).moments, plan(replace(FACTS, accumulates=True)).moments
    for name in ("the teacher's forward", "the student's forward", "the loss"):
        assert several[name].total - one[name].total == FACTS.gradients
    assert several["the backward pass"].total == ALWAYS + 9_000_000 + 6_000_000 + HEADS
    assert several["the optimizer's step"] == one["the optimizer's step"]


def test_a_frozen_head_has_no_gradient() -> None:
    frozen = replace(FACTS, head=replace(HEAD, trained=False))
    assert totals(FACTS)["loss"] - totals(frozen)["loss"] == HEADS
    assert plan(frozen).moments["the backward pass"].loss == 0


def test_without_a_teacher_in_the_loss_there_is_one_buffer() -> None:
    assert totals(FACTS)["loss"] - totals(replace(FACTS, distils=False))["loss"] == 80_000_000


def test_a_batch_smaller_than_the_chunk_needs_no_more_than_itself() -> None:
    assert plan(replace(FACTS, chunk=4_000)) == plan(FACTS)
    assert tiles_bytes(10, 10) == 9 * MIB, "a few tiles are always there"


def test_buckets_are_a_second_copy_of_the_gradients_in_every_moment() -> None:
    alone, together = totals(FACTS), totals(replace(FACTS, buckets=FACTS.gradients))
    assert {name: together[name] - alone[name] for name in alone} == dict.fromkeys(alone, FACTS.gradients)


def test_held_out_batches_are_measured_without_gradients() -> None:
    seen = Evaluation(student=Forward(5_000, 1_000), teacher=Forward(6_000, 2_000), tokens=500, chunk=256)
    found = plan(replace(FACTS, evaluation=seen)).moments["the evaluation"]
    assert found.gradients == 0 and found.activations == 1_000 and found.teacher_at_work == 2_000
    assert found.loss == max(8 * 256 * 20_000 * 4, 2 * 500 * 20_000 * 4 + 16 * 500 * 20_000 * 4 // 100)


def test_room_that_stays_is_there_in_every_moment() -> None:
    room = 2 * 80_000_000 + HIDDEN + HEADS
    once, kept = totals(FACTS), totals(replace(FACTS, keeps_room=True))
    assert kept["loss"] == once["loss"]
    assert kept["forward"] == once["forward"] + room
    # A tied head's gradient and the embedding's are added into a third tensor, in no room of the engine's.
    assert kept["pass"] == ALWAYS + room + 9_000_000 + HEADS
    assert kept["step"] == once["step"] + room


def test_an_untied_heads_gradient_stays_in_the_engines_room_and_is_counted_once() -> None:
    untied = replace(FACTS, head=replace(HEAD, tied=False))
    once, kept = plan(untied).moments, plan(replace(untied, keeps_room=True)).moments
    room = 2 * 80_000_000 + HIDDEN
    for name in ("the backward pass", "the optimizer's step"):
        assert kept[name].total == once[name].total + room
    assert kept["the optimizer's step"].gradients == FACTS.gradients - HEADS


def test_a_rounded_gradient_is_not_the_engines() -> None:
    narrow = replace(FACTS, head=replace(HEAD, tied=False, number_bytes=2), keeps_room=True)
    assert plan(narrow).moments["the optimizer's step"].gradients == FACTS.gradients
    assert plan(narrow).moments["the backward pass"].gradients == 8_500_000 + HEADS // 2


def test_larger_held_out_batches_have_a_room_of_their_own() -> None:
    def kept(tokens: int) -> int:
        seen = Evaluation(student=Forward(), teacher=Forward(), tokens=tokens, chunk=1)
        return replace(FACTS, chunk=2_000, evaluation=seen, keeps_room=True).kept

    assert kept(500) == kept(1_000) == kept(1_500) - 2 * 1_500 * 20_000 * 4 == kept(9_000) - 2 * 2_000 * 20_000 * 4


def test_holes_are_a_share_of_what_is_in_use_beside_the_loss_and_larger_where_activations_are_made_anew() -> None:
    holes = Holes(share=0.1, in_recomputing=0.5)
    plain, again = plan(replace(FACTS, holes=holes)), plan(replace(FACTS, holes=holes, recomputes=True))
    assert all(parts.holes == int(0.1 * (parts.in_use - parts.loss)) for parts in plain.moments.values())
    backward = again.moments["the backward pass"]
    assert backward.holes == int(0.5 * (backward.in_use - backward.loss)) > 0
    assert again.moments["the loss"] == plain.moments["the loss"]


def test_optimizers_keep_what_they_are_known_to_keep() -> None:
    kept = {name: optimizer_bytes(name, parameters=1_000, parameter_bytes=4_000) for name in OPTIMIZERS}
    assert (kept["adamw_torch_fused"], kept["sgd"], kept["adagrad"], kept["adafactor"]) == (8_000, 0, 4_000, 0)
    assert (kept["adamw_bnb_8bit"], kept["adamw_torch_4bit"], kept["lion_32bit"]) == (2_000, 1_000, 4_000)
    assert optimizer_bytes("adamw_torch", parameters=1_000, parameter_bytes=2_000) == 4_000  # bfloat16 has states of its own
    assert optimizer_bytes("of tomorrow", 1_000, 4_000) == kept["adamw_torch"]
    assert set(OPTIMIZERS) <= {name.value for name in OptimizerNames}


def test_an_update_needs_room_unless_it_is_fused() -> None:
    assert update_bytes("adamw_torch_fused", 4_000, largest=100, device_type="cpu") == 0
    assert update_bytes("adamw_torch", 4_000, largest=100, device_type="cpu") == 200
    assert update_bytes("adamw_torch", 4_000, largest=100, device_type="cuda") == 4_000


# ---- the budget ------------------------------------------------------------------------------------------------------------


def config(**given) -> SpecKDConfig:
    return SpecKDConfig(output_dir="x", use_cpu=True, **given)


@pytest.mark.parametrize(
    ("budget", "vocabulary", "chunk"),
    [("32MiB", 32_000, 131), ("0.125GiB", 152_064, 110), ("32 MB", 32_000, 125), ("19MiB", 152_064, 16)],
)
def test_the_chunk_is_what_the_budget_holds(budget: str, vocabulary: int, chunk: int) -> None:
    assert config(loss_memory_budget=budget).chunk_size(vocabulary) == chunk


def test_no_more_tokens_are_held_than_speed_asks_for() -> None:
    small, large, larger = (config(loss_memory_budget=budget).chunk_size(32_000) for budget in ("8MiB", "4GiB", "8GiB"))
    assert small < large == larger


def test_the_number_of_tokens_overrides_the_budget() -> None:
    assert config(loss_chunk_size=3, loss_memory_budget="1KiB").chunk_size(152_064) == 3


@pytest.mark.parametrize("budget", ["256", "many", "-1MiB", "infMiB", ""])
def test_a_budget_without_a_unit_or_sense_is_refused(budget: str) -> None:
    with pytest.raises(ConfigError, match="loss_memory_budget is '.*'. Give a number with a unit"):
        config(loss_memory_budget=budget)


def test_a_budget_that_holds_too_little_is_refused_with_the_least_that_will_do() -> None:
    said = r"loss_memory_budget: 1MiB cannot hold the logits of 16 tokens .* 152,064.* Give at least 19MiB"
    with pytest.raises(ConfigError, match=said) as refused:
        config(loss_memory_budget="1MiB").chunk_size(152_064)
    assert "\n" not in str(refused.value)
