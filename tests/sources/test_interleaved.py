"""Text that student and teacher write in turn: the paper's rule, whatever the blocks, the batch and the caches."""

import os
from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from speckd.compatibility import SharedVocabulary
from speckd.errors import ConfigError, DataError, VocabularyError
from speckd.sources.interleaved import InterleavedWriter
from speckd.sources.model_writer import ModelWriter
from speckd.sources.writer import Completion, Draws, Prompt, Sampling
from speckd.teachers.base import without_adapter
from tests.sources import naive
from tests.sources.models import random_model

#: Of the tests against a distribution, but for the main one, which always has 100,000.
TEXTS = int(os.environ.get("SPECKD_INTERLEAVED_TEXTS", "10000"))
FEW, STOP, LENGTH = 5, 4, 3  # tokens, the one that ends a text, and the longest text
VOCABULARY = 23
DRAWS = Draws(seed=4, turn=1)  # one seed in a hundred has a p below 0.01; over 1,100,000 texts it was 0.22
PROMPTS = [Prompt(torch.arange(n) * 7 % VOCABULARY, sample) for sample, n in enumerate((3, 1, 9, 1, 5, 14, 2))]


@cache
def few(number: int) -> Any:
    """The student, 0, or the teacher, 1, of five tokens."""
    return random_model("llama", 2 + number, FEW, hidden=8 + 8 * number, layers=1, spread=0.3)


def replaced_share(completions: list[Completion]) -> float:
    return float(torch.cat([one.replaced for one in completions]).double().mean())


def plain(completions: list[Completion]) -> list[tuple[list[int], list[bool], bool]]:
    return [(one.token_ids.tolist(), one.replaced.tolist(), one.finished) for one in completions]


def written(k: int, count: int, block: int = 3, prompts: tuple[tuple[int, ...], ...] = ((0, 1),)) -> list[Completion]:
    """By the models of few tokens; sample i continues prompt i mod n."""
    writer = InterleavedWriter(few(0), few(1), SharedVocabulary(FEW), [STOP], k, block, batch_size=20_000)
    asked = [Prompt(torch.tensor(prompts[i % len(prompts)]), i) for i in range(count)]
    return writer.write(asked, Sampling(max_completion_length=LENGTH), DRAWS)


# ---- the distribution ------------------------------------------------------------------------------------------------------


def test_a_hundred_thousand_texts_are_distributed_as_the_rule_says() -> None:
    prompts = ((0, 1), (3, 2, 0, 1, 1))  # side by side in a batch, at unequal lengths
    found = written(2, 100_000, prompts=prompts)
    texts = [tuple(one.token_ids.tolist()) for one in found]
    models = (few(0), few(1))
    for number, prompt in enumerate(prompts):
        some, rest = texts[number :: len(prompts)], (prompt, LENGTH, 2, [STOP])
        assert naive.chi_square(naive.distribution(*models, *rest), some) > 0.01
        for other in (naive.only_from_top_k, naive.speculative):  # so few texts are enough to tell rules apart
            assert naive.chi_square(naive.distribution(*models, *rest, rule=other), some) < 1e-9
        replaced = torch.tensor([float(one.replaced.sum()) for one in found[number :: len(prompts)]])
        wanted, error = naive.expected_replacements(*models, *rest), replaced.std() / len(some) ** 0.5
        assert 0.2 < wanted < 2 and abs(replaced.mean() - wanted) < 4 * error


@pytest.mark.parametrize("block", [1, 5])
def test_other_blocks_have_the_same_distribution(block: int) -> None:
    texts = [tuple(one.token_ids.tolist()) for one in written(2, TEXTS, block)]
    assert naive.chi_square(naive.distribution(few(0), few(1), (0, 1), LENGTH, 2, [STOP]), texts) > 0.01


@pytest.mark.parametrize(("k", "alone"), [(FEW, 0), (FEW + 20, 0), (0, 1)])
def test_at_its_ends_one_model_writes_alone(k: int, alone: int) -> None:
    found = written(k, TEXTS)
    assert replaced_share(found) == (0 if k else 1)
    exact = naive.distribution(few(alone), few(alone), (0, 1), LENGTH, FEW, [STOP])
    other = naive.distribution(few(1 - alone), few(1 - alone), (0, 1), LENGTH, FEW, [STOP])
    texts = [tuple(one.token_ids.tolist()) for one in found]
    assert naive.chi_square(exact, texts) > 0.01 and naive.chi_square(other, texts) < 1e-9


# ---- the very text ---------------------------------------------------------------------------------------------------------

SAMPLINGS = {
    "plain": (Sampling(max_completion_length=12), Sampling()),
    "cut": (Sampling(0.7, 9, 0.9, 12), Sampling(0.5, 0, 0.8)),
    "greedy teacher": (Sampling(1.5, 0, 1.0, 12), Sampling(0.0)),
    "greedy": (Sampling(0.0, max_completion_length=12), Sampling(0.0)),
}


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(
    ("student", "teacher"), [("llama", "llama"), ("gpt2", "llama"), ("qwen2", "gpt2"), ("mistral", "gemma2")]
)
def test_the_text_is_that_of_the_rule_without_caches(student: str, teacher: str, sampling: str) -> None:
    own, other = random_model(student, 0, VOCABULARY), random_model(teacher, 1, VOCABULARY, hidden=24)
    of_student, of_teacher = SAMPLINGS[sampling]
    writer = InterleavedWriter(own, other, SharedVocabulary(VOCABULARY), [5, 6], 6, 4, of_teacher, batch_size=5)
    found = plain(writer.write(PROMPTS, of_student, DRAWS))
    for prompt, one in zip(PROMPTS, found, strict=True):
        told = (prompt.token_ids.tolist(), prompt.sample, of_student, DRAWS, 6, (5, 6), of_teacher)
        assert one == naive.write(own, other, *told)
    assert sampling == "greedy" or sum(sum(replaced) for _, replaced, _ in found) > 0


def test_the_text_depends_on_neither_block_nor_batch_nor_order() -> None:
    models = random_model("llama", 0, VOCABULARY), random_model("qwen2", 1, VOCABULARY)

    def text(block: int, batch_size: int, prompts: list[Prompt]) -> dict[int, tuple[list[int], list[bool], bool]]:
        writer = InterleavedWriter(*models, SharedVocabulary(VOCABULARY), [5], 6, block, batch_size=batch_size)
        completions = writer.write(prompts, Sampling(max_completion_length=13), DRAWS)
        return {prompt.sample: one for prompt, one in zip(prompts, plain(completions), strict=True)}

    wanted = text(1, 64, PROMPTS)
    assert any(done for _, _, done in wanted.values()) and not all(done for _, _, done in wanted.values())
    for block in (3, 5, 30):
        assert text(block, 3, PROMPTS[::-1]) == wanted
    for prompt in PROMPTS:
        assert text(5, 64, [prompt]) == {prompt.sample: wanted[prompt.sample]}


def test_the_text_depends_on_seed_turn_and_sample() -> None:
    models = random_model("llama", 0, VOCABULARY), random_model("llama", 1, VOCABULARY)
    writer = InterleavedWriter(*models, SharedVocabulary(VOCABULARY), [], 6)
    asked = [
        (Draws(seed, turn), Prompt(torch.tensor([1, 2]), sample)) for seed in (0, 1) for turn in (0, 1) for sample in (0, 1)
    ]
    texts = [tuple(plain(writer.write([prompt], Sampling(max_completion_length=9), draws))[0][0]) for draws, prompt in asked]
    assert len(set(texts)) == len(asked)


@pytest.mark.parametrize("k", [0, VOCABULARY])
def test_greedy_at_an_end_is_generate_of_transformers(k: int) -> None:
    models = random_model("llama", 0, VOCABULARY), random_model("llama", 1, VOCABULARY)
    writer = InterleavedWriter(*models, SharedVocabulary(VOCABULARY), [5], k, teacher_sampling=Sampling(0.0))
    for prompt, one in zip(PROMPTS, writer.write(PROMPTS, Sampling(0.0, max_completion_length=10), DRAWS), strict=True):
        ids = prompt.token_ids[None]
        given = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": 10,
            "do_sample": False,
            "eos_token_id": 5,
            "pad_token_id": 0,
        }
        wanted = models[0 if k else 1].generate(ids, **given)[0, len(ids[0]) :]
        assert torch.equal(one.token_ids, wanted)
        assert one.finished == (wanted[-1] == 5)


def test_where_nothing_is_rejected_the_text_is_model_writers() -> None:
    own, other = random_model("llama", 0, VOCABULARY), random_model("llama", 1, VOCABULARY)
    sampling = Sampling(0.8, 9, 0.9, 12)
    found = InterleavedWriter(own, other, SharedVocabulary(VOCABULARY), [5], VOCABULARY).write(PROMPTS, sampling, DRAWS)
    wanted = ModelWriter(own, [5]).write(PROMPTS, sampling, DRAWS)
    assert [one.token_ids.tolist() for one in found] == [one.token_ids.tolist() for one in wanted]
    assert [one.finished for one in found] == [one.finished for one in wanted]


# ---- vocabularies, adapters, precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [None, [0, 1, 3, 4, 5, 7, 8, 9, 13, 14, 15, 19, 20, 21, 22]])
def test_only_shared_tokens_are_written(ids: list[int] | None) -> None:
    own, other = random_model("llama", 0, 32), random_model("llama", 1, 40)  # heads of different padded widths
    shared = list(range(VOCABULARY)) if ids is None else ids
    axis = SharedVocabulary(len(shared), None if ids is None else torch.tensor(ids))
    prompts = [Prompt(torch.tensor([shared[sample], 4]), sample) for sample in range(12)]
    found = plain(InterleavedWriter(own, other, axis, [5, 39], 6).write(prompts, Sampling(max_completion_length=9), DRAWS))
    for prompt, one in zip(prompts, found, strict=True):
        told = (prompt.token_ids.tolist(), prompt.sample, Sampling(max_completion_length=9), DRAWS, 6, (5,))
        assert one == naive.write(own, other, *told, ids=shared)


def adapted(model: Any) -> Any:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
    torch.manual_seed(4)
    return get_peft_model(model, config).train()


def test_an_adapted_student_writes_with_its_adapter_and_without_dropout() -> None:
    base, other = random_model("llama", 0, VOCABULARY), random_model("llama", 1, VOCABULARY)
    told = (Sampling(max_completion_length=9), DRAWS)
    without = plain(InterleavedWriter(base, other, SharedVocabulary(VOCABULARY), [5], 6).write(PROMPTS, *told))
    student = adapted(base)
    found = plain(InterleavedWriter(student, other, SharedVocabulary(VOCABULARY), [5], 6).write(PROMPTS, *told))
    assert student.training and found != without
    student.eval()
    for prompt, one in zip(PROMPTS, found, strict=True):
        assert one == naive.write(student.get_base_model(), other, prompt.token_ids.tolist(), prompt.sample, *told, 6, (5,))


def test_an_adapted_students_base_can_be_the_teacher() -> None:
    base, told = random_model("llama", 0, VOCABULARY), (Sampling(max_completion_length=9), DRAWS)
    apart = random_model("llama", 0, VOCABULARY)
    student = adapted(base)
    teacher_context = lambda: without_adapter(student)  # noqa: E731
    writer = InterleavedWriter(
        student, student.get_base_model(), SharedVocabulary(VOCABULARY), [5], 6, teacher_context=teacher_context
    )
    found = plain(writer.write(PROMPTS, *told))
    assert found == plain(InterleavedWriter(student, apart, SharedVocabulary(VOCABULARY), [5], 6).write(PROMPTS, *told))
    assert any(any(replaced) for _, replaced, _ in found)


def test_weights_are_read_anew_at_each_call() -> None:
    own, other = random_model("llama", 0, VOCABULARY), random_model("llama", 1, VOCABULARY)
    writer = InterleavedWriter(own, other, SharedVocabulary(VOCABULARY), [5], 6)
    told = (PROMPTS, Sampling(max_completion_length=9), DRAWS)
    before = plain(writer.write(*told))
    assert plain(writer.write(*told)) == before
    own.load_state_dict(random_model("llama", 2, VOCABULARY).state_dict())
    after = plain(writer.write(*told))
    assert after != before
    assert after == plain(InterleavedWriter(own, other, SharedVocabulary(VOCABULARY), [5], 6).write(*told))


def test_in_half_precision_every_token_kept_is_in_the_top_k() -> None:
    """Batches round differently there, so the very text may differ; what the rule asks of it may not, but for near ties."""
    own, other = (random_model("llama", seed, VOCABULARY, spread=0.3).to(torch.bfloat16) for seed in (0, 1))
    k, sampling = 6, Sampling(max_completion_length=30)
    prompts = [Prompt(torch.tensor([sample % VOCABULARY, 4]), sample) for sample in range(40)]
    found = InterleavedWriter(own, other, SharedVocabulary(VOCABULARY), [], k).write(prompts, sampling, DRAWS)
    kept, outside = 0, 0
    for prompt, one in zip(prompts, found, strict=True):
        with torch.no_grad():
            text = torch.cat([prompt.token_ids, one.token_ids])
            logits = other(input_ids=text[None, :-1]).logits[0, len(prompt.token_ids) - 1 :].float()
        own_logit = logits.gather(-1, one.token_ids[:, None])
        ranks = (logits > own_logit + 0.05 * logits.abs().amax()).sum(-1)
        kept += int((~one.replaced).sum())
        outside += int((ranks[~one.replaced] >= k).sum())
    assert kept > 200 and outside == 0
    assert 0.1 < replaced_share(found) < 0.9


# ---- ends and refusals -----------------------------------------------------------------------------------------------------


def test_a_text_ends_with_its_first_stop_token_or_at_its_limit() -> None:
    found = written(2, 3000, block=5)
    assert {one.finished for one in found} == {True, False}
    for one in found:
        tokens = one.token_ids.tolist()
        assert STOP not in tokens[:-1] and one.finished == (tokens[-1] == STOP)
        assert one.finished or len(tokens) == LENGTH
        assert one.replaced.shape == one.token_ids.shape
    stopped = [one for one in found if one.finished]
    assert {bool(one.replaced[-1]) for one in stopped} == {True, False}, "both may end a text"


def test_a_text_ends_where_the_positions_do() -> None:
    models = random_model("llama", 0, VOCABULARY), random_model("gpt2", 1, VOCABULARY)  # 64 positions each
    prompts = [Prompt(torch.arange(n) % VOCABULARY, n) for n in (3, 60, 63, 64, 70)]
    writer = InterleavedWriter(*models, SharedVocabulary(VOCABULARY), [], 6)
    found = writer.write(prompts, Sampling(max_completion_length=9), DRAWS)
    assert [len(one.token_ids) for one in found] == [9, 4, 1, 0, 0]
    for limit in (9, 4):
        assert plain(writer.write(prompts[1:2], Sampling(max_completion_length=limit), DRAWS)) == plain(found[1:2])


def test_nothing_is_written_for_nobody() -> None:
    writer = InterleavedWriter(few(0), few(1), SharedVocabulary(FEW), [], 2)
    assert writer.write([], Sampling(), DRAWS) == []


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"verify_top_k": -1}, ConfigError, "verify_top_k is -1"),
        ({"block": 0}, ConfigError, "block is 0"),
        ({"batch_size": 0}, ConfigError, "batch_size is 0"),
        ({"stop_token_ids": [31]}, VocabularyError, r"share none of the stop tokens \[31\]"),
    ],
)
def test_what_cannot_work_is_refused(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        InterleavedWriter(
            **{"student": few(0), "teacher": few(1), "vocabulary": SharedVocabulary(FEW), "stop_token_ids": []} | changed
        )


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([], DataError, "the prompt of sample 8 is empty"),
        ([1, 7], VocabularyError, "the prompt of sample 8 holds token id 7, which the two models do not share"),
    ],
)
def test_prompts_that_cannot_be_continued_are_named(tokens: list[int], error: type[Exception], message: str) -> None:
    writer = InterleavedWriter(few(0), few(1), SharedVocabulary(FEW), [], 2)
    prompt = Prompt(torch.tensor(tokens, dtype=torch.long), 8)
    with pytest.raises(error, match=message) as refused:
        writer.write([prompt], Sampling(max_completion_length=LENGTH), DRAWS)
    assert "\n" not in str(refused.value)
