"""`python -m tests.parity.large`: gradients at a real vocabulary, for every gate × policy × divergence × teacher kind.

The truth is `token_terms` in float64 on whole logits of the same numbers, which the parity tests hold against their own oracle.
float32: relative error of the gradients, all together. bfloat16: the error over that of rounding the true gradients once.
"""

import argparse
import itertools
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speckd import LMHead, Objective, distillation_loss
from speckd.objective import token_terms
from speckd.teachers import HiddenTeacher, TopKTeacher
from speckd.tokens import SupervisedRows
from speckd.types import BatchGate, Rows, TokenKeys
from tests.parity.cases import DIVERGENCES, GATES, POLICIES, compositions

KINDS = ("dense", "top-32")
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2.0}


@dataclass(frozen=True)
class LargeProblem:
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    rows: SupervisedRows


def problem(vocabulary: int, tokens: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> LargeProblem:
    """A teacher that agrees with the student at about half of the tokens; numbers that `dtype` holds exactly."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, weight, other = 0.6 * normal(tokens, 16), normal(vocabulary, 16), 0.6 * normal(tokens, 16)
    agrees = (torch.arange(tokens) % 2 == 0)[:, None]
    follows = torch.where(agrees, hidden + 0.05 * normal(tokens, 16), 0.5 * hidden + other)
    teacher_hidden = torch.cat([follows, normal(tokens, 8)], -1)
    teacher_weight = torch.cat([weight, 0.1 * normal(vocabulary, 8)], -1)
    parts = (hidden, weight, teacher_hidden, teacher_weight)
    hidden, weight, teacher_hidden, teacher_weight = (t.to(device, dtype) for t in parts)
    index = torch.arange(tokens, device=device)
    likeliest = (teacher_hidden.double() @ teacher_weight.double().T).argmax(-1)
    labels = torch.where(agrees[:, 0].to(device), likeliest, 7 * index)
    rows = SupervisedRows(index, labels, TokenKeys(index // 4, index % 4))
    return LargeProblem(hidden, weight, teacher_hidden, teacher_weight, rows)


def teacher(given: LargeProblem, kind: str, dtype: torch.dtype) -> Any:
    if kind == "dense":
        return HiddenTeacher(given.teacher_hidden.to(dtype), LMHead(given.teacher_weight.to(dtype)))
    log_probs = (given.teacher_hidden.double() @ given.teacher_weight.double().T).log_softmax(-1)
    best = log_probs.topk(32)
    own = log_probs.gather(-1, given.rows.labels[:, None])[:, 0]
    wide = torch.promote_types(dtype, torch.float32)
    return TopKTeacher(best.indices, best.values.to(wide), own.to(wide))


def truth(given: LargeProblem, objective: Objective, answers: Any) -> tuple[Tensor, list[Tensor]]:
    """The verdicts, and float64 gradients of hidden states and weight."""
    hidden, weight = given.hidden.double(), given.weight.double()
    leaf = (hidden @ weight.T).requires_grad_()
    signal = answers.signal(given.rows.index)
    seen = Rows(leaf.detach(), signal, given.rows.labels, given.rows.keys)
    gate = objective.gate
    with torch.no_grad():
        accepted = gate.select(gate.score(seen), given.rows.keys) if isinstance(gate, BatchGate) else gate(seen)
    loss = token_terms(objective, Rows(leaf, signal, given.rows.labels, given.rows.keys), accepted).loss.sum()
    slope = torch.autograd.grad(loss, leaf)[0] if loss.requires_grad else torch.zeros_like(leaf)
    return accepted, [slope @ weight, slope.T @ hidden]


def measured(given: LargeProblem, objective: Objective, kind: str, dtype: torch.dtype, chunk: int | None = None) -> float:
    """The engine's error at one composition, in the unit of `LIMITS`; NaN where float rounding turned a verdict."""
    accepted, wanted = truth(given, objective, teacher(given, kind, torch.float64))
    hidden, weight = given.hidden.clone().requires_grad_(), given.weight.clone().requires_grad_()
    output = distillation_loss(objective, hidden, LMHead(weight), teacher(given, kind, dtype), given.rows, chunk)
    if not torch.allclose(output.terms.acceptance.double(), accepted, atol=1e-3):
        return float("nan")
    output.sum.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    found = [hidden.grad, weight.grad]
    error = sum(float((f.double() - w).square().sum()) for f, w in zip(found, wanted, strict=True)) ** 0.5
    if dtype == torch.bfloat16:
        unit = sum(float((w.to(dtype).double() - w).square().sum()) for w in wanted) ** 0.5
    else:
        unit = sum(float(w.square().sum()) for w in wanted) ** 0.5
    return error / unit if unit else error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--device", default="cpu", help="such as cuda, where the kernels take part")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    start, lines = time.monotonic(), []
    for dtype, limit in LIMITS.items():
        given = problem(args.vocabulary, args.tokens, dtype, args.device)
        worst: dict[tuple[str, str], tuple[float, str]] = defaultdict(lambda: (0.0, ""))
        count = turned = 0
        for (gate, policy, divergence), kind in itertools.product(compositions(), KINDS):
            error = measured(given, Objective(GATES[gate], POLICIES[policy], DIVERGENCES[divergence]), kind, dtype)
            count += 1
            turned += math.isnan(error)
            if error > worst[divergence, kind][0]:
                worst[divergence, kind] = (error, f"{gate} × {policy}")
        lines.append(
            f"\n{dtype}, V {args.vocabulary:,}, {args.tokens} tokens, {count} compositions, {turned} with a turned verdict:\n"
        )
        lines.append("| divergence | teacher | worst | limit | at |\n|---|---|---|---|---|")
        lines += [f"| {d} | {k} | {e:.1e} | {limit:.0e} | {at} |" for (d, k), (e, at) in worst.items()]
    lines.append(f"\n{time.monotonic() - start:.0f} s")
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
