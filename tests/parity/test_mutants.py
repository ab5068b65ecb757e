"""Can the parity tests see? Each known bug of this field, put in on purpose, must make them fail."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from speckd import engine, gates, objective, policies, support
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
        patch.setattr(engine, "token_terms", change)
        patch.setattr(cases, "token_terms", change)

    return apply


def own(owner: Any, name: str, function: Any) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(owner, name, function)


def gate_with_gradient(given: Any, rows: Any, acceptance: torch.Tensor) -> Any:
    ratio = (rows.teacher.label_log_prob(rows.labels) - rows.student_label_log_prob).exp().clamp(max=1)
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


def no_tail(student: torch.Tensor, teacher: Any) -> Any:
    return student.gather(-1, teacher.token_ids), teacher.log_probs


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
    "tail dropped": (own(support, "_with_tail", no_tail), "none", "mask", "forward_kl", {}, 6),
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
        lambda patch: patch.setitem(cases.GATES, "expected_spec", gates.ExpectedSpec(1)),
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


@pytest.mark.parametrize("name", MUTANTS)
def test_the_bug_is_seen(name: str, monkeypatch: Patch) -> None:
    bug, gate, rejected, divergence, more, top = MUTANTS[name]
    given = problem(seed=3, tokens=12)
    chosen = setting(given, gate, rejected, divergence, **more)
    require_parity(given, chosen, top)  # right without the bug
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        require_parity(given, chosen, top)
