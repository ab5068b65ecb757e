"""Speculative decoding: the text is the teacher's, and as many drafted tokens stand as Σ min(p, q) says."""

import os
from functools import cache
from typing import Any

import pytest
import torch

from speckd.compatibility import SharedVocabulary
from speckd.evaluation.speculative import SpeculativeDecoder, Tally
from speckd.quickstart.evaluation import block_efficiency
from speckd.sources.model_writer import ModelWriter
from speckd.sources.writer import Completion, Draws, Prompt, Sampling
from tests.sources import naive
from tests.sources.models import random_model

TEXTS = int(os.environ.get("SPECKD_SPECULATIVE_TEXTS", "10000"))
FEW, STOP, LENGTH = 5, 4, 3
VOCABULARY = 23
DRAWS = Draws(seed=5, turn=0)
PROMPTS = [Prompt(torch.arange(n) * 7 % VOCABULARY, sample) for sample, n in enumerate((3, 1, 9, 1, 5, 14, 2))]


@cache
def few(number: int) -> Any:
    return random_model("llama", 2 + number, FEW, hidden=8 + 8 * number, layers=1, spread=0.3)


@cache
def written(draft_length: int) -> tuple[list[Completion], dict[int, Tally]]:
    decoder = SpeculativeDecoder(few(0), few(1), SharedVocabulary(FEW), [STOP], draft_length, batch_size=20_000)
    prompts = [Prompt(torch.tensor((0, 1)), sample) for sample in range(TEXTS)]
    return decoder.write(prompts, Sampling(max_completion_length=LENGTH), DRAWS)


@pytest.mark.parametrize("draft_length", [1, 2, 5])
def test_drawn_texts_are_distributed_as_the_teachers(draft_length: int) -> None:
    found = [tuple(one.token_ids.tolist()) for one in written(draft_length)[0]]
    models = (few(0), few(1))
    wanted = naive.distribution(*models, (0, 1), LENGTH, 0, [STOP], naive.speculative)
    assert naive.chi_square(wanted, found) > 0.01
    students = naive.distribution(*models, (0, 1), LENGTH, FEW, [STOP])  # all is accepted: the student's own
    assert naive.chi_square(students, found) < 1e-6  # so the test can tell them apart


@pytest.mark.parametrize("draft_length", [1, 2, 5])
def test_the_accepted_are_as_many_as_their_chances_say(draft_length: int) -> None:
    """Σ (accepted − Σ min(p, q)) over a text is a martingale, so its mean over texts is normal about 0."""
    tallies = list(written(draft_length)[1].values())
    gaps = torch.tensor([each.accepted - each.alpha for each in tallies], dtype=torch.float64)
    assert len(gaps) == TEXTS and abs(gaps.mean() / (gaps.std() / TEXTS**0.5)) < 2.58
    doubled = torch.tensor([each.accepted - 0.95 * each.alpha for each in tallies], dtype=torch.float64)
    assert abs(doubled.mean() / (doubled.std() / TEXTS**0.5)) > 2.58  # five per cent amiss would show


def test_the_first_token_is_accepted_as_often_as_the_distributions_overlap() -> None:
    """Against the oracle's forwards, not the decoder's own."""
    q, p = (naive.sampled_from(naive.next_logits(few(n), (0, 1), range(FEW)), Sampling()) for n in (0, 1))
    chance = float(torch.minimum(torch.tensor(q), torch.tensor(p)).sum())
    decoder = SpeculativeDecoder(few(0), few(1), SharedVocabulary(FEW), [STOP], 5, batch_size=20_000)
    prompts = [Prompt(torch.tensor((0, 1)), sample) for sample in range(TEXTS)]
    _, tallies = decoder.write(prompts, Sampling(max_completion_length=1), Draws(6, 0))
    accepted = sum(each.accepted for each in tallies.values())
    assert all((each.tests, each.calls, each.tokens) == (1, 1, 1) for each in tallies.values())
    assert all(each.alpha == pytest.approx(chance, abs=1e-5) for each in tallies.values())
    assert abs(accepted / TEXTS - chance) < 2.58 * (chance * (1 - chance) / TEXTS) ** 0.5


def greedy(kind: str, draft_length: int, batch_size: int) -> tuple[Any, Any, list[Completion], dict[int, Tally]]:
    student = random_model(kind, 0, VOCABULARY, hidden=8)
    teacher = random_model(kind, 1, VOCABULARY, hidden=16, spread=0.3)
    decoder = SpeculativeDecoder(student, teacher, SharedVocabulary(VOCABULARY), [STOP], draft_length, batch_size)
    return student, teacher, *decoder.write(PROMPTS, Sampling(temperature=0, max_completion_length=20), DRAWS)


@pytest.mark.parametrize(
    ("kind", "draft_length", "batch_size"),
    [("llama", 1, 7), ("llama", 5, 1), ("llama", 30, 3), ("gpt2", 5, 7), ("mistral", 5, 7), ("qwen2", 5, 7)],
)
def test_greedy_text_is_the_teachers_greedy_text(kind: str, draft_length: int, batch_size: int) -> None:
    student, teacher, found, tallies = greedy(kind, draft_length, batch_size)
    wanted = ModelWriter(teacher, [STOP]).write(PROMPTS, Sampling(temperature=0, max_completion_length=20), DRAWS)
    assert [one.token_ids.tolist() for one in found] == [one.token_ids.tolist() for one in wanted]
    assert [one.finished for one in found] == [one.finished for one in wanted]
    for prompt, text in zip(PROMPTS, found, strict=True):
        assert tallies[prompt.sample].calls == calls(student, prompt, text, draft_length)
        assert tallies[prompt.sample].tokens == len(text.token_ids)


def calls(student: Any, prompt: Prompt, text: Completion, draft_length: int) -> int:
    """By the run of matches along the teacher's text, from one forward of the whole."""
    whole = torch.cat([prompt.token_ids, text.token_ids])
    with torch.no_grad():
        said = student(input_ids=whole[None], use_cache=False).logits[0].argmax(-1)
    match = said[len(prompt.token_ids) - 1 : -1] == text.token_ids
    return round(len(match) / block_efficiency([match], draft_length))


@pytest.mark.parametrize(("draft_length", "tokens"), [(1, 2), (5, 6)])
def test_the_teacher_as_its_own_draft_writes_whole_blocks(draft_length: int, tokens: int) -> None:
    model = random_model("llama", 1, VOCABULARY)
    decoder = SpeculativeDecoder(model, model, SharedVocabulary(VOCABULARY), [], draft_length, 7)
    for temperature in (0.0, 1.0):
        _, tallies = decoder.write(PROMPTS, Sampling(temperature=temperature, max_completion_length=30), DRAWS)
        for tally in tallies.values():
            assert tally.tokens == 30 and tally.calls == -(-30 // tokens)
            assert tally.accepted == tally.tests and tally.alpha == pytest.approx(tally.tests, abs=1e-4)


def test_neither_the_batch_nor_its_order_decides() -> None:
    student, teacher = (random_model("llama", seed, VOCABULARY) for seed in (0, 1))
    sampling, found = Sampling(max_completion_length=12), []
    for batch_size, prompts in ((7, PROMPTS), (1, PROMPTS), (3, PROMPTS[::-1])):
        decoder = SpeculativeDecoder(student, teacher, SharedVocabulary(VOCABULARY), [STOP], 4, batch_size)
        texts, tallies = decoder.write(prompts, sampling, DRAWS)
        by_sample = {prompt.sample: text.token_ids.tolist() for prompt, text in zip(prompts, texts, strict=True)}
        found.append([(by_sample[n], tallies[n].calls, tallies[n].accepted) for n in range(len(PROMPTS))])
    assert found[0] == found[1] == found[2]
