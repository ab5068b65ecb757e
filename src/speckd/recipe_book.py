"""Recipes: methods of a few lines of settings, by name, and joined (`abkd+speckd`): the later one is laid over the earlier."""

from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

import yaml

from speckd.config import nearest
from speckd.errors import ConfigError

DEFAULT_RECIPE = "label-ratio"
#: A part's name, and the settings that speak of the part so named: whoever names another part speaks of these anew.
OF_PART: Mapping[str, tuple[str, ...]] = {
    "gate": ("gate_options", "gate_schedule", "gate_controller"),
    "rejected": ("rejected_options", "rejected_schedule"),
    "divergence": ("divergence_options", "divergence_schedule", "divergence_controller"),
    "student_text_divergence": ("student_text_divergence_options",),
    "label_loss_weight": ("objective_schedule",),
    "sequence_source": (
        "on_policy_fraction",
        "on_policy_fraction_end",
        "adaptive_on_policy",
        "replay_capacity",
        "interleaved_top_k",
        "interleaved_block",
        "teacher_mix",
        "student_text_divergence",
        "student_text_divergence_options",
        "student_text_rejected",
    ),
}


def recipe_names() -> list[str]:
    return sorted(
        path.name.removesuffix(".yaml") for path in files("speckd").joinpath("recipes").iterdir() if path.name.endswith(".yaml")
    )


def recipe_text(name: str) -> str:
    if name not in recipe_names():
        raise ConfigError(f"recipe: there is no recipe '{name}'", nearest(str(name), recipe_names()))
    return files("speckd").joinpath("recipes", f"{name}.yaml").read_text()


def recipe_settings(names: str) -> dict[str, Any]:
    """The settings of a recipe, or of several with `+` between their names.

    Raises:
        ConfigError: a name that is none, or a gate over a method without a teacher.
    """
    found: dict[str, Any] = {}
    parts = str(names).split("+")
    for name in parts:
        found = laid_over(found, yaml.safe_load(recipe_text(name.strip())))
    if len(parts) > 1 and found.get("label_loss_weight") == 1 and found.get("gate") != "none":
        raise ConfigError(
            f"recipe: {names}: cross-entropy on the data asks no teacher, so the gate would do nothing",
            "Take seqkd+speckd, where the gate weighs the cross-entropy, or another method",
        )
    return found


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """What `above` says, and of what `below` says the rest: where above names a part, the part below goes with its options."""
    gone = spoken_of(above)
    return {key: value for key, value in below.items() if key not in gone} | dict(above)


def spoken_of(keys: Iterable[str]) -> set[str]:
    """Some settings, and those that belong to the parts that they name."""
    return {name for key in keys for name in (key, *OF_PART.get(key, ()))}
