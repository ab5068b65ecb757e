"""What a user says and nothing asks for is refused, before a model is loaded; what a recipe says is not the user's word."""

import pytest

from speckd.errors import ConfigError
from speckd.recipe_book import recipe_names
from speckd.settings import load_settings


def settings(flags: str):
    return load_settings(None, None, [*"--output_dir out --use_cpu true".split(), *flags.split()])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--on_policy_fraction 0.5", "on_policy_fraction is set, but has no effect with sequence_source: dataset"),
        ("--recipe kd --replay_capacity 5", "replay_capacity is set, but has no effect with sequence_source: dataset"),
        ("--recipe gkd --replay_capacity 5", "Set sequence_source: replay, or remove replay_capacity"),
        ("--recipe gkd --interleaved_top_k 5", "has no effect with sequence_source: student"),
        ("--recipe minillm --interleaved_block 2", "has no effect with sequence_source: mixed"),
        ("--recipe skd --teacher_mix 0.1", "Set sequence_source: mixed, or remove teacher_mix"),
        ("--recipe kd --sequence_source speckd.sources.writer:Writer --teacher_mix 0.1", "has no effect with sequence_source"),
        ("--recipe sft --gate top_k", "gate: top_k has no effect: label_loss_weight: 1 (SFT)"),
        ("--label_loss_weight 1 --gate label_ratio", "gate: label_ratio has no effect"),
    ],
)
def test_what_nothing_asks_for_is_refused(flags: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(flags)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flags",
    [
        "--recipe gkd --on_policy_fraction 0.2",
        "--recipe kd --sequence_source speckd.sources.writer:Writer --on_policy_fraction 0.2",
        "--recipe distillm --replay_capacity 5",
        "--recipe skd --interleaved_top_k 5 --interleaved_block 2",
        "--recipe minillm --teacher_mix 0.1",
        "--recipe distillm --sequence_source dataset",  # what the recipe said of its source goes with it
        "--recipe sft --gate none",
        "--recipe seqkd+speckd --gate top_k",
        "--recipe kd --max_completion_length 9 --sampling_top_p 0.9",  # `speckd write` reads these
        *(f"--recipe {name}" for name in recipe_names()),
    ],
)
def test_what_is_asked_for_passes(flags: str) -> None:
    settings(flags)


def test_a_policy_of_the_default_recipe_is_not_taken_for_the_users() -> None:
    with pytest.raises(ConfigError, match="rejected: label comes from the default recipe, label-ratio"):
        settings("--sequence_source student")


@pytest.mark.parametrize("name", ["my_gates.py", "my_gates.NAME", "parts/my_gates"])
def test_a_part_of_ones_own_is_named_with_a_colon(name: str) -> None:
    with pytest.raises(ConfigError, match=r"write gate: FILE\.py:NAME or MODULE:NAME"):
        settings(f"--gate {name}")


@pytest.mark.parametrize(
    ("option", "key"), [("verify_top_k", "gate"), ("rejected_weight", "rejected"), ("head_mass", "divergence")]
)
def test_an_option_of_a_part_is_no_setting_by_itself(option: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"'{option}' is not a setting. Write {key}_options: {{{option}: ...}}"):
        settings(f"--{option} 1")
