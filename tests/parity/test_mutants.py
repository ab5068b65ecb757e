"""Can the parity tests see? Each known bug of this field, put in on purpose, must make them fail."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from speckd import divergences, engine, gates, head, objective, policies, row_pass, support, tiles
from speckd.divergences import AdaptiveKL, AlphaBeta, GeneralizedJSD, SkewedForwardKL, forward_kl, reverse_kl, total_variation
from tests.parity import cases
from tests.parity.cases import problem, setting
from tests.parity.test_parity import require_parity

Patch = pytest.MonkeyPatch
TERMS = objective.token_terms


def put(name: str, divergence: Any) -> Callable[[Patch], None]:
    return lambda patch: patch.setitem(cases.DIVERGENCES, name, divergence)


def terms(change: Callable[..., Any]) -> Callable[[Patch], None]:
    """Replaces `token_terms` everywhere by a changed one: change(objective, rows, acceptance)."""

    def apply(patch: Patch) -> None:
        patch.setattr(row_pass, "token_terms", change)
        patch.setattr(cases, "token_terms", change)

    return apply


def own(owner: Any, name: str, function: Any) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(owner, name, function)


def gate_with_gradient(given: Any, rows: Any, acceptance: torch.Tensor) -> Any:
    own = rows.student_logits.log_softmax(-1).gather(-1, rows.labels[:, None])[:, 0]
    ratio = (rows.teacher.label_log_prob(rows.labels) - own).exp().clamp(max=1)
    found = TERMS(given, rows, acceptance)
    return replace(found, loss=found.loss + (ratio - ratio.detach()) * found.divergence.nan_to_num())


def mean_not_sum(given: Any, rows: Any, acceptance: torch.Tensor) -> Any:
    found = TERMS(given, rows, acceptance)
    return replace(found, loss=found.loss / len(found.loss))


def no_square(given: Any, rows: Any, acceptance: torch.Tensor) -> Any:
    found = TERMS(given, rows, acceptance)
    return replace(found, loss=found.loss / given.divergence_temperature**2)


def hot_student_only(logits: torch.Tensor, teacher: Any, temperature: float = 1.0) -> Any:
    return support.shared_support(logits / temperature, teacher)


def no_tail(student_logits: torch.Tensor, teacher: Any, temperature: float = 1.0) -> Any:
    return student_logits.log_softmax(-1).gather(-1, teacher.token_ids), teacher.log_probs


def unnormalised_residual(self: Any, rows: Any) -> torch.Tensor:
    student, teacher = rows.support()
    return forward_kl(student, (teacher.exp() - student.exp()).clamp(min=0).detach().log())


def residual_with_gradient(self: Any, rows: Any) -> torch.Tensor:
    student, teacher = rows.support()
    excess = (teacher.exp() - student.exp()).clamp(min=1e-30)
    return forward_kl(student, (excess / excess.sum(-1, keepdim=True)).log())


class TailFirst(AdaptiveKL):
    def __call__(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return forward_kl(student, teacher) + reverse_kl(student, teacher) - super().__call__(student, teacher)


def spec_needs_all(self: Any, rows: Any) -> torch.Tensor:
    draws = gates.uniforms(rows.keys.seed, rows.keys.epoch, rows.keys.sample, rows.keys.position, self.candidates)
    candidates = gates.propose_candidates(rows, draws[..., 0])
    return gates.verify_speculative(rows, candidates, draws[..., 1]).all(-1).double()


def ratio_upside_down(rows: Any, candidates: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    student, teacher = rows.student.log_probs.gather(-1, candidates).exp(), rows.teacher.log_prob(candidates).exp()
    return draws * teacher < student


#: name -> (the bug, gate, policy, divergence, more settings, teacher's K)
MUTANTS: dict[str, tuple[Callable[[Patch], None], str, str, str, dict[str, Any], int | None]] = {
    "KL the other way": (put("forward_kl", reverse_kl), "none", "mask", "forward_kl", {}, None),
    "reverse KL the other way": (put("reverse_kl", forward_kl), "none", "mask", "reverse_kl", {}, None),
    "JSD's beta swapped": (put("generalized_jsd", GeneralizedJSD(0.7)), "none", "mask", "generalized_jsd", {}, None),
    "skew swapped": (put("skewed_forward_kl", SkewedForwardKL(0.9)), "none", "mask", "skewed_forward_kl", {}, None),
    "alpha and beta swapped": (put("alpha_beta", AlphaBeta(0.7, 0.2)), "none", "mask", "alpha_beta", {}, None),
    "total variation not halved": (
        put("total_variation", lambda q, p: 2 * total_variation(q, p)),
        *("none", "mask", "total_variation", {}, None),
    ),
    "AKL's head and tail swapped": (put("adaptive_kl", TailFirst()), "none", "mask", "adaptive_kl", {}, None),
    "T² forgotten": (terms(no_square), "none", "mask", "forward_kl", {"temperature": 2.0}, None),
    "temperature on the student only": (
        own(objective, "shared_support", hot_student_only),
        *("none", "mask", "forward_kl", {"temperature": 2.0}, None),
    ),
    "tail dropped": (own(objective, "shared_support", no_tail), "none", "mask", "forward_kl", {}, 6),
    "gradient through the gate": (terms(gate_with_gradient), "label_ratio", "mask", "forward_kl", {}, None),
    "mean of a chunk": (terms(mean_not_sum), "top_k", "mask", "forward_kl", {}, None),
    "divided by what was accepted": (
        lambda patch: patch.setattr(
            objective.Objective, "normalizer", property(lambda s: "weight", lambda s, v: None), raising=False
        ),
        *("top_k", "mask", "forward_kl", {}, None),
    ),
    "proposal is the label": (own(gates, "propose_greedy", lambda rows: rows.labels), "top_k", "mask", "forward_kl", {}, None),
    "one more than k": (
        own(gates, "verify_in_top_k", lambda rows, ids, k: rows.teacher.in_top_k(ids, k + 3)),
        *("top_k", "mask", "forward_kl", {}, None),
    ),
    "Spec-k needs every candidate": (own(gates.Spec, "__call__", spec_needs_all), "spec", "mask", "forward_kl", {}, None),
    "acceptance upside down": (own(gates, "verify_speculative", ratio_upside_down), "spec", "mask", "forward_kl", {}, None),
    "expected Spec-k without the power": (
        lambda patch: patch.setitem(cases.GATES, "expected_spec", gates.ExpectedSpec(1, allow_lower_bound=True)),
        *("expected_spec", "mask", "forward_kl", {}, None),
    ),
    "β ignored": (
        own(policies.DownWeight, "weights", lambda self, a: (a, torch.zeros_like(a))),
        *("top_k", "down_weight", "forward_kl", {}, None),
    ),
    "label for everyone": (
        own(policies.Label, "weights", lambda self, a: (a, torch.ones_like(a))),
        *("top_k", "label", "forward_kl", {}, None),
    ),
    "residual not normalised": (
        own(policies.Residual, "fallback", unnormalised_residual),
        "top_k",
        "residual",
        "forward_kl",
        {},
        None,
    ),
    "residual with gradient": (
        own(policies.Residual, "fallback", residual_with_gradient),
        "top_k",
        "residual",
        "forward_kl",
        {},
        None,
    ),
    "gate inverted": (
        lambda patch: patch.setitem(cases.GATES, "top_k", gates.Inverted(gates.TopK(cases.K))),
        *("top_k", "mask", "forward_kl", {}, None),
    ),
}


PASS = row_pass.RowPass


def entry(name: str, change: Callable[..., Any]) -> Callable[[Patch], None]:
    """A closed form whose (value, slope) is changed."""
    right = getattr(divergences, name)
    return lambda patch: patch.setattr(divergences, name, lambda *given: change(*right(*given)))


def slopes_times(factor: float) -> Callable[..., Any]:
    right = PASS.label_slopes

    def changed(self: Any, *given: Any, **named: Any) -> Any:
        found = right(self, *given, **named)
        return None if found is None else factor * found

    return changed


def cold(logits: torch.Tensor, maximum: torch.Tensor, temperature: float) -> Any:
    return NORMALISED(logits, maximum, 1.0)


NORMALISED = row_pass._normalised
GATE_ORDER = tiles.fewer_above_than

#: The same for the fast path alone, which the definition knows nothing of.
FAST_MUTANTS: dict[str, tuple[Callable[[Patch], None], str, str, str, dict[str, Any], int | None]] = {
    "slope with the wrong sign": (entry("_forward_kl_entry", lambda f, s: (f, -s)), "top_k", "mask", "forward_kl", {}, None),
    "slope doubled": (entry("_reverse_kl_entry", lambda f, s: (f, 2 * s)), "none", "mask", "reverse_kl", {}, None),
    "value halved": (entry("_generalized_jsd_entry", lambda f, s: (f / 2, s)), "none", "mask", "generalized_jsd", {}, None),
    "label's slope forgotten": (own(PASS, "label_slopes", slopes_times(0.0)), "top_k", "label", "forward_kl", {}, None),
    "label's slope of a truncated teacher": (own(PASS, "label_slopes", slopes_times(2.0)), "top_k", "label", "todi", {}, 6),
    "temperature forgotten": (own(row_pass, "_normalised", cold), "none", "mask", "forward_kl", {"temperature": 2.0}, None),
    "gradients packed in another order": (
        own(row_pass, "_span", lambda index: slice(0, len(index))),
        *("top_k", "mask", "forward_kl", {}, None),
    ),
    "rank off by one": (
        own(tiles, "fewer_above_than", lambda logits, maxima, values, k: GATE_ORDER(logits, maxima, values, k + 1)),
        *("top_k", "mask", "forward_kl", {}, None),
    ),
    "weights of a truncated teacher ignored": (
        own(row_pass, "teacher_support", lambda teacher, *_: torch.cat([teacher.log_probs, teacher.log_probs[:, :1]], -1)),
        *("none", "mask", "forward_kl", {}, 6),
    ),
    "bias without gradient": (
        own(engine._Gradients, "wanted", classmethod(lambda cls, h, head: replace(WANTED(h, head), bias=None))),
        *("none", "mask", "forward_kl", {}, None),
    ),
    "weight's gradient not accumulated": (
        own(engine, "add_product", lambda total, a, b, f, overwrite: head.add_product(total, a, b, f, True)),
        *("none", "mask", "forward_kl", {}, None),
    ),
}
WANTED = engine._Gradients.wanted


@pytest.mark.parametrize("name", FAST_MUTANTS)
def test_the_bug_of_the_fast_path_is_seen(name: str, monkeypatch: Patch) -> None:
    bug, gate, rejected, divergence, more, top = FAST_MUTANTS[name]
    given = problem(seed=3, tokens=12)
    chosen = setting(given, gate, rejected, divergence, **more)
    require_parity(given, chosen, top)
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        require_parity(given, chosen, top)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_bug_is_seen(name: str, monkeypatch: Patch) -> None:
    bug, gate, rejected, divergence, more, top = MUTANTS[name]
    given = problem(seed=3, tokens=12)
    chosen = setting(given, gate, rejected, divergence, **more)
    require_parity(given, chosen, top)  # right without the bug
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        require_parity(given, chosen, top)
