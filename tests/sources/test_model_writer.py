"""What a model writes: the distribution it samples from, and that nothing beside prompt, draws and weights decides it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from speckd.errors import ConfigError
from speckd.sources.model_writer import ModelWriter, stop_ids
from speckd.sources.sampling import draw, truncated, uniforms_at
from speckd.sources.writer import Draws, Prompt, Sampling
from speckd.tasks import build_tokenizer
from tests.tiny import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return AutoModelForCausalLM.from_pretrained(write_model(tmp_path_factory.mktemp("m") / "student", seed=1))


def prompts(count: int, seed: int = 0) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    return [Prompt(torch.randint(2, 60, (n,), generator=generator), 100 + i) for i, n in enumerate(lengths)]


def texts(written) -> list[list[int]]:
    return [each.token_ids.tolist() for each in written]


def by_hand(model, prompt: Prompt, sampling: Sampling, draws: Draws, stops: set[int]) -> list[int]:
    """One prompt, no cache, no padding, no batch: the whole text again for every token."""
    ids = prompt.token_ids
    for _ in range(sampling.max_completion_length):
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[:, -1]
        uniform = uniforms_at(draws, torch.tensor([prompt.sample]), torch.tensor([len(ids)]))
        ids = torch.cat([ids, draw(logits, sampling, uniform)])
        if int(ids[-1]) in stops:
            break
    return ids[len(prompt.token_ids) :].tolist()


SAMPLINGS = [Sampling(1.0, 0, 1.0, 12), Sampling(0.7, 5, 0.9, 12), Sampling(0.0, max_completion_length=12)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["plain", "truncated", "greedy"])
def test_a_batch_writes_what_each_prompt_alone_would_get_without_a_cache(model, sampling: Sampling) -> None:
    model.eval()
    draws, some = Draws(seed=3, turn=7), prompts(12)
    written = ModelWriter(model, [1, 5]).write(some, sampling, draws)
    assert texts(written) == [by_hand(model, prompt, sampling, draws, {1, 5}) for prompt in some]
    for each in written:
        assert each.finished == (int(each.token_ids[-1]) in (1, 5)) and each.token_ids.dtype == torch.int64
    assert {each.finished for each in written} == {True, False} or sampling.temperature == 0


def test_neither_order_nor_company_nor_calls_in_between_matter(model) -> None:
    writer, sampling, some = ModelWriter(model, [1]), SAMPLINGS[0], prompts(9)
    whole = texts(writer.write(some, sampling, Draws(0, 0)))
    assert texts(writer.write(some[::-1], sampling, Draws(0, 0)))[::-1] == whole
    assert [texts(writer.write([one], sampling, Draws(0, 0)))[0] for one in some] == whole
    assert texts(writer.write(some, sampling, Draws(0, 1))) != whole != texts(writer.write(some, sampling, Draws(1, 0)))


def test_the_model_comes_back_as_it_was_and_its_own_penalties_are_not_used(model) -> None:
    writer, some = ModelWriter(model, [1]), prompts(6)
    wanted = texts(writer.write(some, SAMPLINGS[2], Draws(0, 0)))
    settings = model.generation_config
    model.train()
    model.get_decoder().layers[0].mlp.eval()
    model.gradient_checkpointing_enable()
    settings.repetition_penalty, settings.min_new_tokens, settings.suppress_tokens = 5.0, 9, [3]
    try:
        assert texts(writer.write(some, SAMPLINGS[2], Draws(0, 0))) == wanted
        assert model.training and not model.get_decoder().layers[0].mlp.training
        assert model.generation_config is settings and all(p.grad is None for p in model.parameters())
    finally:
        settings.repetition_penalty = settings.min_new_tokens = settings.suppress_tokens = None
        model.gradient_checkpointing_disable()
        model.eval()


def test_tokens_that_are_ruled_out_are_never_written(model) -> None:
    favourite = texts(ModelWriter(model, []).write(prompts(8), SAMPLINGS[0], Draws(0, 0)))
    out = torch.tensor(sorted({token for row in favourite for token in row})[::2])
    written = ModelWriter(model, [], suppressed=out).write(prompts(8), SAMPLINGS[0], Draws(0, 0))
    assert not torch.isin(torch.cat([each.token_ids for each in written]), out).any()


def test_learned_positions_end_a_text(tmp_path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=10, n_embd=8, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=1)
    writer = ModelWriter(GPT2LMHeadModel(config).eval(), [], positions=10)
    some = [Prompt(torch.arange(2, 2 + n), n) for n in (10, 3, 9, 1)]
    written = writer.write(some, Sampling(max_completion_length=8), Draws(0, 0))
    assert [len(each.token_ids) for each in written] == [0, 7, 1, 8] and not any(each.finished for each in written)


def test_all_end_tokens_are_known(model) -> None:
    tokenizer = build_tokenizer()
    model.generation_config.eos_token_id = [7, 9]
    try:
        assert stop_ids(model, tokenizer) == sorted({7, 9, tokenizer.eos_token_id, 1})
    finally:
        model.generation_config.eos_token_id = 1


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.5), Sampling(top_k=3), Sampling(top_p=0.8), Sampling(2.0, 6, 0.7)])
def test_the_drawn_tokens_have_the_distribution_that_was_asked_for(sampling: Sampling) -> None:
    """Chi-square over 100,000 draws against probabilities written out by hand."""
    logits = torch.tensor([2.0, 0.3, -1.0, 1.1, 0.0, 1.7, -3.0])
    probs = (logits.double() / sampling.temperature).softmax(-1)
    kept = sorted(range(7), key=lambda v: -float(probs[v]))[: sampling.top_k or 7]
    wanted, mass = torch.zeros(7, dtype=torch.float64), 0.0
    total = float(sum(probs[v] for v in kept))
    for v in kept:  # the fewest that reach top_p
        wanted[v] = probs[v]
        mass += float(probs[v]) / total
        if mass >= sampling.top_p:
            break
    wanted /= wanted.sum()
    assert torch.allclose(truncated(logits[None], sampling).double().softmax(-1)[0], wanted, atol=1e-6)
    number = 100_000
    uniform = uniforms_at(Draws(5, 2), torch.arange(number), torch.full((number,), 4))
    found = torch.bincount(draw(logits.expand(number, 7), sampling, uniform), minlength=7).double()
    assert not found[wanted == 0].any()
    possible = wanted > 0
    statistic = float(((found - number * wanted)[possible] ** 2 / (number * wanted[possible])).sum())
    limits = {1: 6.63, 2: 9.21, 3: 11.34, 4: 13.28, 5: 15.09, 6: 16.81}  # p = 0.01, by degrees of freedom
    assert statistic < limits[int(possible.sum()) - 1]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_uniforms_draw_tokens_that_can_be(uniform: float) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    assert int(draw(logits, Sampling(), torch.tensor([uniform], dtype=torch.float64))) in (1, 2)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"max_completion_length": 0}])
def test_sampling_that_cannot_be_is_refused(wrong) -> None:
    with pytest.raises(ConfigError):
        Sampling(**wrong)
