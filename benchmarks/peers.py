"""The peers, each called as its own trainer or its documentation calls it, and given compacted rows where that helps it.

A peer that is not installed, or that cannot run here, is named on the screen and left out. None is re-implemented.
"""

import os
import shutil
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from candidates import CACHED, FORWARD_KL, FROZEN, JSD, Candidate, Loss, full_logits, naive
from problem import Problem

BETA = {"forward_kl": 0.0, "generalized_jsd": 0.5}  # TRL's and Liger's name for the same choice
DENSE = ((FORWARD_KL, "forward_kl"), (JSD, "generalized_jsd"))


def all_peers(device: torch.device) -> Iterator[Candidate]:
    """One library after the other, so that who looks for one candidate does not import them all."""
    yield from naive()
    for peers in (liger, trl_chunked, trl_gkd, trl_sparse, axolotl):
        try:
            found = peers(device)
        except ImportError as reason:
            print(f"\n*** NOT MEASURED: {peers.__name__}: {reason}. {peers.__doc__}\n", flush=True)
        else:
            yield from found


def can_compile(device: torch.device) -> bool:
    if device.type == "cuda" or shutil.which(os.environ.get("CXX", "g++")):
        return True
    print("\n*** NOT MEASURED: compiled peers: torch.compile needs a C++ compiler (g++, or CXX) on a CPU\n", flush=True)
    return False


def trl_chunked(device: torch.device) -> list[Candidate]:
    """`pip install trl` (1.16): the loss of its DistillationTrainer."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def as_called(beta: float) -> Callable[[Problem, int], Tensor]:
        def run(problem: Problem, chunk: int) -> Tensor:
            hidden, mask = (problem.hidden[None], problem.teacher_hidden[None]), problem.supervised[None]
            return _chunked_divergence_loss(*hidden, problem.head, problem.teacher_head, mask, beta)[0]

        return run

    def compacted(beta: float) -> Callable[[Problem, int], Tensor]:
        def run(problem: Problem, chunk: int) -> Tensor:
            student, teacher = problem.hidden[problem.supervised], problem.teacher_hidden[problem.supervised]
            per_row, _ = ChunkedDivergenceFunction.apply(student, problem.head, None, teacher, problem.teacher_head, None, beta)
            return per_row.sum() / len(per_row)

        return run

    found = []
    for family, divergence in (*DENSE, (FROZEN, "forward_kl")):
        beta, loss = BETA[divergence], Loss(divergence)
        found += [Candidate("TRL chunked, as its trainer calls it", family, loss, as_called(beta))]
        found += [Candidate("TRL chunked, rows compacted", family, loss, compacted(beta))]
    return found


def trl_gkd(device: torch.device) -> list[Candidate]:
    """`pip install trl` (1.16): the loss of its GKDTrainer."""
    from trl.experimental.gkd import GKDTrainer

    def on_full_logits(beta: float) -> Callable[[Problem, int], Tensor]:
        def run(problem: Problem, chunk: int) -> Tensor:
            student = full_logits(problem.hidden, problem.head)[None]
            with torch.no_grad():
                teacher = full_logits(problem.teacher_hidden, problem.teacher_head)[None]
            return GKDTrainer.generalized_jsd_loss(student, teacher, problem.labels[None], beta)

        return run

    return [Candidate("TRL GKD, full logits", f, Loss(d), on_full_logits(BETA[d])) for f, d in DENSE]


def trl_sparse(device: torch.device) -> list[Candidate]:
    """`pip install trl` (1.16): the top-K loss of its AsyncDistillationTrainer."""
    from trl.experimental.async_distillation.async_distillation_trainer import _CHUNKED_LM_HEAD_CHUNK_SIZE, _chunked_jsd_loss

    def run(problem: Problem, chunk: int, own_chunk: bool) -> Tensor:
        rows = problem.rows.index
        ids, log_probs = problem.top_ids[rows], problem.top_log_probs[rows]
        loss, *_ = _chunked_jsd_loss(
            hidden_valid=problem.hidden[rows],
            lm_head_weight=problem.head,
            lm_head_bias=None,
            logit_scale=1.0,
            final_logit_softcapping=None,
            target_ids=ids,
            teacher_target_logps=log_probs,
            valid_candidate_mask=torch.ones_like(ids, dtype=torch.bool),
            beta=0.0,
            temperature=1.0,
            add_tail_bucket=True,
            teacher_id_idx=None,
            num_teachers=1,
            chunk_size=_CHUNKED_LM_HEAD_CHUNK_SIZE if own_chunk else chunk,
        )
        return loss / len(rows)

    loss = Loss("forward_kl", teacher="top-K and tail")
    return [
        Candidate("TRL sparse, its own chunk", CACHED, loss, lambda p, c: run(p, c, own_chunk=True)),
        Candidate("TRL sparse, equal chunk", CACHED, loss, lambda p, c: run(p, c, own_chunk=False)),
    ]


def chunk_for_liger(rows: int, chunk: int) -> int:
    """Liger makes `rows // chunk_size` chunks, ours as many as fill them: the number that gives it as many chunks as ours."""
    return max(1, rows // -(-rows // chunk))


def liger(device: torch.device) -> list[Candidate]:
    """`pip install -e '.[bench]'`: LigerFusedLinearJSDLoss; beta 0 is forward KL; a hard loss of weight 0 is not computed."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def build(beta: float, compiled: bool, compacted: bool, equal_chunk: bool) -> Callable[[Problem, int], Tensor]:
        def run(problem: Problem, chunk: int) -> Tensor:
            kept = problem.supervised if compacted else slice(None)
            student, teacher, labels = problem.hidden[kept], problem.teacher_hidden[kept], problem.labels[kept]
            size = chunk_for_liger(len(labels), chunk) if equal_chunk else 1024
            loss = LigerFusedLinearJSDLoss(
                weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled, chunk_size=size
            )
            return loss(student, problem.head, teacher, problem.teacher_head, labels)

        return run

    forms = (
        ("as its users call it", {"compacted": False, "equal_chunk": False}),
        ("rows compacted", {"compacted": True, "equal_chunk": False}),
        ("rows compacted, equal chunk", {"compacted": True, "equal_chunk": True}),
    )
    return [
        Candidate(
            f"Liger {'compiled' if compiled else 'eager'}, {form}",
            family,
            Loss(divergence),
            build(BETA[divergence], compiled, **choices),
            compiled=compiled,
        )
        for family, divergence in (*DENSE, (FROZEN, "forward_kl"))
        for compiled in ((False, True) if can_compile(device) else (False,))
        for form, choices in forms
    ]


def axolotl(device: torch.device) -> list[Candidate]:
    """`pip install --no-deps axolotl addict`: its loss for a cached top-K (its pinned dependencies clash with ours)."""
    from axolotl.integrations.kd.kernels.liger import LigerFusedLinearKLTopKLogprobLoss

    def build(compiled: bool, equal_chunk: bool) -> Callable[[Problem, int], Tensor]:
        def run(problem: Problem, chunk: int) -> Tensor:
            rows = problem.rows.index
            ids, log_probs = problem.top_ids[rows], problem.top_log_probs[rows].log_softmax(-1)  # as its collator gives them
            size = chunk_for_liger(len(rows), chunk) if equal_chunk else 1024
            loss = LigerFusedLinearKLTopKLogprobLoss(
                0.0, 1.0, beta=0.0, compiled=compiled, chunk_size=size, compute_ce_loss=False
            )
            hidden, mask = problem.hidden[rows][None], torch.ones_like(ids)[None]
            total = loss(problem.head, hidden, ids[None], log_probs[None], mask, problem.rows.labels[None])
            return total / len(rows)

        return run

    loss = Loss("forward_kl", teacher="top-K renormalised")
    return [
        Candidate(
            f"axolotl {'compiled' if compiled else 'eager'}, rows compacted{', equal chunk' if equal else ''}",
            CACHED,
            loss,
            build(compiled, equal),
            compiled=compiled,
        )
        for compiled in ((False, True) if can_compile(device) else (False,))
        for equal in (False, True)
    ]
