"""Names to objects, at one border: flat settings as a user types them -> a frozen `Objective`. Nothing else reads names."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any

from speckd import (
    adaptive_teaching,
    divergences,
    entropy_gates,
    gates,
    lk_losses,
    own_parts,
    policies,
    ranked_gates,
    sequence_kl,
    taid,
    token_temperature,
    trust_gates,
)
from speckd.errors import ConfigError
from speckd.objective import Normalizer, Objective
from speckd.types import BatchDivergence, SequenceDivergence

#: What a user may write -> what builds it. Adding one: write it in its module, name it here.
GATES: Mapping[str, Callable[..., Any]] = {
    "none": gates.NoGate,
    "top_k": gates.TopK,
    "spec": gates.Spec,
    "expected_spec": gates.ExpectedSpec,
    "two_sided": gates.TwoSided,
    "threshold": gates.Threshold,
    "label_in_top_k": gates.LabelInTopK,
    "label_ratio": gates.LabelRatio,
    "random": gates.Random,
    "inverted": gates.Inverted,
    "matched_random": gates.MatchedRandom,
    "student_entropy": ranked_gates.StudentEntropy,
    "teacher_entropy": ranked_gates.TeacherEntropy,
    "total_variation": ranked_gates.TotalVariation,
    "hellinger": ranked_gates.HellingerDistance,
    "label_uncertainty": ranked_gates.LabelUncertainty,
    "tip": ranked_gates.EntropyOrDivergence,
    "teachability": ranked_gates.Teachability,
    "excess_divergence": ranked_gates.ExcessDivergence,
    "excess_label_loss": ranked_gates.ExcessLabelLoss,
    "entropy_weight": entropy_gates.EntropyWeight,
    "entropy_gap": entropy_gates.EntropyGap,
    "trust": trust_gates.Trust,
}
REJECTED: Mapping[str, Callable[..., Any]] = {
    "mask": policies.Mask,
    "down_weight": policies.DownWeight,
    "label": policies.Label,
    "residual": policies.Residual,
}
DIVERGENCES: Mapping[str, Callable[..., Any]] = {
    "forward_kl": lambda: divergences.forward_kl,
    "reverse_kl": lambda: divergences.reverse_kl,
    "generalized_jsd": divergences.GeneralizedJSD,
    "skewed_forward_kl": divergences.SkewedForwardKL,
    "skewed_reverse_kl": divergences.SkewedReverseKL,
    "total_variation": lambda: divergences.total_variation,
    "alpha_beta": divergences.AlphaBeta,
    "adaptive_kl": divergences.AdaptiveKL,
    "todi": lambda: divergences.todi,
    "taid": taid.TAID,
    "lk_alpha": lk_losses.LKAlpha,
    "lk_hybrid": lk_losses.LKHybrid,
    "label_nll": divergences.LabelNLL,
    "adaptive_teaching": adaptive_teaching.AdaptiveTeaching,
    "token_temperature": token_temperature.TokenTemperature,
    "sequence_reverse_kl": sequence_kl.SequenceReverseKL,
}

#: What the fields of gates, policies and divergences may be, in words and for isinstance.
_KINDS: Mapping[Any, tuple[str, tuple[type, ...]]] = {
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    bool: ("true or false", (bool,)),
    str: ("a name", (str,)),
}

Options = dict[str, Any] | str


@dataclass
class MethodConfig:
    """The method's settings, flat, as they stand in a YAML file. `objective()` builds the composition and checks it.

    `gate_options`, `rejected_options` and `divergence_options` hold the parameters of the chosen piece (a mapping, or JSON on
    the command line), such as `gate_options: {verify_top_k: 5}`; `inverted` and `matched_random` take another gate there:
    `gate_options: {gate: top_k, verify_top_k: 5}`. Each of the three may also be the user's own: `my_gates.py:MyGate`.
    """

    gate: str = field(default="label_ratio", metadata={"help": "which tokens are accepted"})
    gate_options: Options | None = field(default=None, metadata={"help": "the gate's parameters, a mapping or JSON"})
    rejected: str = field(default="label", metadata={"help": "what a rejected token gets"})
    rejected_options: Options | None = field(default=None, metadata={"help": "the policy's parameters, a mapping or JSON"})
    divergence: str = field(default="forward_kl", metadata={"help": "how far the student is from the teacher, per token"})
    divergence_options: Options | None = field(default=None, metadata={"help": "its parameters, a mapping or JSON"})
    divergence_temperature: float = field(default=1.0, metadata={"help": "T of the divergence, multiplied by T²"})
    normalizer: Normalizer = field(default="valid", metadata={"help": "valid (supervised tokens) or weight"})
    label_loss_weight: float = field(default=0.0, metadata={"help": "share of plain cross-entropy; 1 is SFT"})

    def objective(self) -> Objective:
        found = Objective(
            gate=_gate(self.gate, mapping("gate_options", self.gate_options)),
            rejected=build("rejected", REJECTED, self.rejected, "rejected_options", self.rejected_options),
            divergence=named_divergence("divergence", self.divergence, self.divergence_options),
            normalizer=self.normalizer,
            label_loss_weight=self.label_loss_weight,
            divergence_temperature=self.divergence_temperature,
        )
        if found.learns_labels and isinstance(found.gate, gates.NoGate):
            return replace(found, label_loss_weight=1.0)  # cross-entropy everywhere, for which nobody asks a teacher
        return found


def nearest(name: str, known: list[str]) -> str:
    """The fix for a mistyped name: the nearest valid one if there is one, and else all of them."""
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else f"Valid: {', '.join(sorted(known))}"


def _gate(name: str, options: dict[str, Any]) -> Any:
    if name in ("inverted", "matched_random") and isinstance(options.get("gate"), str):
        inner = _gate(options["gate"], {key: value for key, value in options.items() if key != "gate"})
        return GATES[name](inner)
    return build("gate", GATES, name, "gate_options", options)


def named_divergence(key: str, name: str, options: Options | None) -> Any:
    """A divergence by its name, or around another; `key`: where it stands, for messages."""
    options_key, given = f"{key}_options", mapping(f"{key}_options", options)
    if name == "token_temperature" and isinstance(given.get("divergence"), str):
        inner = named_divergence(key, given["divergence"], {})
        if isinstance(inner, (BatchDivergence, SequenceDivergence, divergences.LabelNLL)):
            raise ConfigError(
                f"{options_key}: {given['divergence']} is no divergence of tokens one by one", "Name forward_kl or such"
            )
        rest = {option: value for option, value in given.items() if option != "divergence"}
        return replace(build(key, DIVERGENCES, name, options_key, rest), divergence=inner)
    return build(key, DIVERGENCES, name, options_key, given)


def build(key: str, known: Mapping[str, Callable[..., Any]], name: str, options_key: str, options: Options | None) -> Any:
    """The piece of a name with its options; `key` and `options_key` are where they stand, for messages."""
    if ":" in str(name):
        return own_parts.build(key, name, mapping(options_key, options))
    if name not in known:
        # What looks like a file or a module is meant as a part of the user's own.
        own = "." in str(name) or "/" in str(name)
        fix = f"For one of your own, write {key}: FILE.py:NAME or MODULE:NAME" if own else nearest(str(name), list(known))
        raise ConfigError(f"{key}: '{name}' is not a {key}", fix)
    build, given = known[name], mapping(options_key, options)
    valid = {f.name: f.type for f in fields(build)} if is_dataclass(build) else {}
    require_options(options_key, name, valid, given)
    missing = [f for f in ("gate",) if f in valid and f not in given]
    if missing:
        raise ConfigError(f"{options_key}: {name} needs another gate", f"Write {options_key}: {{gate: top_k}}")
    return build(**given)


def options_key_of(option: str) -> str | None:
    """Under which setting an option of some gate, policy or divergence stands; None of what is none."""
    for key, known in (("gate_options", GATES), ("rejected_options", REJECTED), ("divergence_options", DIVERGENCES)):
        if any(option in {field.name for field in fields(part)} for part in known.values() if is_dataclass(part)):
            return key
    return None


def require_options(key: str, name: str, valid: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuses options that `name` does not have, and values of another kind; `valid`: each option's type."""
    for option, value in given.items():
        if option not in valid:
            fix = nearest(option, list(valid)) if valid else f"Remove it: {name} has no options"
            raise ConfigError(f"{key}: '{option}' is not an option of {name}", fix)
        wanted, kinds = _KINDS.get(valid[option], ("another gate's name", ()))
        if not isinstance(value, kinds) or (isinstance(value, bool) and valid[option] is not bool):
            raise ConfigError(f"{key}: {option} is {value!r}", f"Give {wanted}")


def mapping(key: str, options: Options | None) -> dict[str, Any]:
    """A setting that is a mapping, or JSON on the command line."""
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{key} is not JSON: {error}", f"Write for example --{key} '{{\"verify_top_k\": 5}}'") from None
    if options is not None and not isinstance(options, dict):
        raise ConfigError(f"{key} is {options!r}", "Give a mapping of option to number")
    return dict(options or {})
