"""The recipes that train on the student's own text: a fixed batch's loss by each paper's formula in float64.

p is the teacher, q the student, y the text, T its tokens; every loss is a mean over all supervised tokens of the step.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM

from speckd.settings import load_settings
from speckd.sources.mixture import Mixture, Origin
from speckd.sources.writer import Completion
from speckd.tasks import build_tokenizer
from speckd.trainer import SpecKDTrainer
from tests.tiny import task_rows
from tests.trainer.conftest import World


class Fixed:
    """Writes of each sample the same text, whatever it is asked."""

    def write(self, prompts, sampling, draws) -> list[Completion]:
        return [Completion(torch.tensor([10 + p.sample % 7, 20, 30 + p.sample, 1]), finished=True) for p in prompts]


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    return forward_kl(q, p)


def generalized_jsd(p: Tensor, q: Tensor) -> Tensor:
    """GKD, 2306.13649, eq. 1: D_JSD(β)(P‖Q) = β·KL(P ‖ βP + (1−β)Q) + (1−β)·KL(Q ‖ βP + (1−β)Q), β = 0.5."""
    m = 0.5 * p + 0.5 * q
    return 0.5 * forward_kl(p, m) + 0.5 * forward_kl(q, m)


def skewed_forward_kl(p: Tensor, q: Tensor) -> Tensor:
    """DistiLLM, 2402.03898, section 3.1: D_SKL(α)(p, q) = KL(p ‖ αp + (1−α)q), α = 0.1."""
    return forward_kl(p, 0.1 * p + 0.9 * q)


def skewed_reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    """The same: D_SRKL(α)(p, q) = KL(q ‖ (1−α)p + αq), α = 0.1."""
    return forward_kl(q, 0.9 * p + 0.1 * q)


def minillm(p: Tensor, q: Tensor, y: Tensor) -> Tensor:
    """MiniLLM, 2306.08543, the gradient it ends with (after eq. 6), as that of a loss whose w and R are constants:

        ∇L = −E_{y∼p̃} Σ_t w_t·[∇ Σ_{y'} q(y'|y<t) log(p(y'|y<t)/q(y'|y<t)) + R_{t+1}^Norm·∇q(y_t|y<t)/q(y_t|y<t)]

    w_t = q(y_t|y<t)/p̃(y_t|y<t), p̃ = α·p + (1−α)·q, α = 0.2; R_{t+1}^Norm the mean of log(p/q) over the tokens after t (the
    paper's 1/(T−t−1) would divide by 0). Clipped as in the authors' code, losses.py: max(−A·w, −A·clip(w, 0.8, 1.2)).
    """
    at = torch.arange(len(y))
    own, other = q[at, y], p[at, y]
    rewards, weights = (other / own).log().detach(), (own / (0.2 * other + 0.8 * own)).detach()
    terms = []
    for t in range(len(y)):
        later = [float(r) for r in rewards[t + 1 :]]
        advantage, w = sum(later) / len(later) if later else 0.0, float(weights[t])
        moves = -advantage * w >= -advantage * min(max(w, 0.8), 1.2)  # of the two, the one that has a gradient is the larger
        terms.append(w * (reverse_kl(p[t], q[t]) - (advantage if moves else 0.0) * own[t].log()))
    return torch.stack(terms)


Distance = Callable[[Tensor, Tensor], Tensor]
#: recipe -> (on the data's text, on the student's).
FORMULAS: dict[str, tuple[Distance, Distance]] = {
    # ImitKD, 2009.07253, with the teacher's whole distribution: −Σ_v p(v|y<t) log q(v|y<t) on prefixes of both; KL(p‖q) differs
    # by p's entropy, which has no gradient.
    "imitkd": (forward_kl, forward_kl),
    "gkd": (generalized_jsd, generalized_jsd),
    "distillm": (skewed_reverse_kl, skewed_reverse_kl),
    # SKD, 2410.11325, Algorithm 1: D(M_t ‖ M_s) at every token of the interleaved text.
    "skd": (forward_kl, forward_kl),
    # DistiLLM-2, 2503.07067: D_SKL(α)(x, y_teacher; p‖q) + D_SRKL(α)(x, y_student; p‖q).
    "distillm-2": (skewed_forward_kl, skewed_reverse_kl),
}
#: Those whose formula on the student's text is one of its very tokens.
OF_TOKENS = {"minillm": minillm}
ROWS = 8


def oracle(world: World, recipe: str, rows: list[dict], origins: list[int], axis: int) -> tuple[float, dict[str, Tensor]]:
    """Mean loss and gradients of a step, row by row, each by itself and unpadded."""
    tokenizer = build_tokenizer()
    student = AutoModelForCausalLM.from_pretrained(world.student, dtype=torch.float64)
    teacher = AutoModelForCausalLM.from_pretrained(world.teacher, dtype=torch.float64)
    losses = []
    for number, (row, origin) in enumerate(zip(rows, origins, strict=True)):
        prompt = tokenizer(row["prompt"]).input_ids
        data = [*tokenizer(row["prompt"] + row["completion"]).input_ids[len(prompt) :], tokenizer.eos_token_id]
        own = [10 + number % 7, 20, 30 + number, 1]
        texts = [(data, 0)] if origin == Origin.DATA else [(own, 1)]
        for text, which in [(data, 0), (own, 1)] if recipe == "distillm-2" else texts:
            ids = torch.tensor([prompt + text])
            at = slice(len(prompt) - 1, len(prompt) + len(text) - 1)
            q = student(input_ids=ids).logits[0, at, :axis].softmax(-1)
            with torch.no_grad():
                p = teacher(input_ids=ids).logits[0, at, :axis].softmax(-1)
            if recipe in OF_TOKENS:
                losses.append(OF_TOKENS[recipe](p, q, torch.tensor(text)))
            else:
                losses.append(FORMULAS[recipe][which](p, q))
    loss = torch.cat(losses).mean()
    loss.backward()
    return float(loss), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", [*FORMULAS, *OF_TOKENS])
@pytest.mark.parametrize("cut", [(8, 1), (2, 4)])
def test_the_loss_of_a_step_is_the_papers_formula(world: World, tmp_path: Path, recipe: str, cut) -> None:
    flags = f"--output_dir {tmp_path} --use_cpu true --max_steps 1 --learning_rate 0 --max_grad_norm 0 --save_strategy no"
    flags += f" --per_device_train_batch_size {cut[0]} --gradient_accumulation_steps {cut[1]} --disable_tqdm true"
    flags += " --train_sampling_strategy sequential --gradient_checkpointing false --logging_steps 1 --seed 5"
    args = load_settings(None, recipe, flags.split()).training
    rows = task_rows(ROWS)
    gradients: dict[str, Tensor] = {}

    class Watched(SpecKDTrainer):
        def _get_grad_norm(self, model, grad_norm=None):
            gradients.update({n: p.grad.clone() for n, p in self.student.named_parameters() if p.grad is not None})
            return super()._get_grad_norm(model, grad_norm)

    student = AutoModelForCausalLM.from_pretrained(world.student)
    tokenizer = build_tokenizer()
    teacher = AutoModelForCausalLM.from_pretrained(world.teacher)
    trainer = Watched(student, teacher, args, Dataset.from_list(rows), processing_class=tokenizer, writer=Fixed())
    trainer.train()
    origins = Mixture(5).origins(torch.arange(ROWS), 0, args.on_policy_fraction).tolist()
    assert args.on_policy_fraction == 1 or 0 < sum(o == Origin.STUDENT for o in origins) < ROWS
    loss, wanted = oracle(world, recipe, rows, origins, len(tokenizer))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert wanted.keys() == gradients.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(gradients[name].double(), gradient, rtol=1e-3, atol=1e-6), name
