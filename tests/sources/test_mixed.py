"""Text from a mixture of student and teacher: the paper's distribution, whatever the batch, and its two ends."""

import pytest
import torch

from speckd.compatibility import SharedVocabulary
from speckd.errors import ConfigError
from speckd.sources.mixed import MixedWriter
from speckd.sources.model_writer import ModelWriter
from speckd.sources.writer import Draws, Prompt, Sampling
from tests.sources import naive
from tests.sources.models import random_model

FEW, STOP, LENGTH = 5, 4, 3
VOCABULARY = 23
DRAWS = Draws(seed=4, turn=1)
PROMPTS = [Prompt(torch.arange(n) * 7 % VOCABULARY, sample) for sample, n in enumerate((3, 1, 9, 5, 14))]


def mixed(share: float) -> naive.Rule:
    """MiniLLM, 2306.08543, eq. 4: p̃(y_t|y<t, x) = α·p(y_t|y<t, x) + (1 − α)·q_θ(y_t|y<t, x)."""
    return lambda q, p, k: share * p + (1 - share) * q


@pytest.mark.parametrize("share", [0.2, 0.7, 1.0])
def test_texts_are_distributed_as_the_mixture(share: float) -> None:
    models = [random_model("llama", 2 + i, FEW, hidden=8 + 8 * i, layers=1, spread=0.3) for i in (0, 1)]
    writer = MixedWriter(*models, SharedVocabulary(FEW), [STOP], share, batch_size=20_000)
    prompts = ((0, 1), (3, 2, 0, 1, 1))  # side by side, at unequal lengths
    asked = [Prompt(torch.tensor(prompts[i % 2]), i) for i in range(20_000)]
    found = writer.write(asked, Sampling(max_completion_length=LENGTH), DRAWS)
    assert all(one.replaced is None for one in found)
    for number, prompt in enumerate(prompts):
        texts = [tuple(one.token_ids.tolist()) for one in found[number::2]]
        rest = (*models, prompt, LENGTH, FEW, [STOP])
        assert naive.chi_square(naive.distribution(*rest, rule=mixed(share)), texts) > 0.01
        assert naive.chi_square(naive.distribution(*rest, rule=mixed(0.5)), texts) < 1e-6


@pytest.mark.parametrize(("share", "alone"), [(0.0, 0), (1.0, 1)])
@pytest.mark.parametrize("sampling", [Sampling(max_completion_length=12), Sampling(0.7, 9, 0.9, 12), Sampling(0.0, 0, 1.0, 12)])
def test_at_its_ends_the_text_is_that_of_one_model(share: float, alone: int, sampling: Sampling) -> None:
    models = random_model("llama", 0, VOCABULARY), random_model("gpt2", 1, VOCABULARY)
    found = MixedWriter(*models, SharedVocabulary(VOCABULARY), [5, 6], share, batch_size=3).write(PROMPTS, sampling, DRAWS)
    wanted = ModelWriter(models[alone], [5, 6]).write(PROMPTS, sampling, DRAWS)
    for one, other in zip(found, wanted, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist() and one.finished == other.finished


def test_the_text_depends_on_neither_batch_nor_order() -> None:
    models = random_model("llama", 0, VOCABULARY), random_model("qwen2", 1, VOCABULARY)

    def text(batch_size: int, prompts: list[Prompt]) -> dict[int, list[int]]:
        writer = MixedWriter(*models, SharedVocabulary(VOCABULARY), [5], 0.4, batch_size)
        found = writer.write(prompts, Sampling(max_completion_length=13), DRAWS)
        return {prompt.sample: one.token_ids.tolist() for prompt, one in zip(prompts, found, strict=True)}

    assert text(64, PROMPTS) == text(2, PROMPTS[::-1]) == text(1, PROMPTS)


def test_a_share_beyond_the_whole_is_refused() -> None:
    model = random_model("llama", 0, VOCABULARY)
    with pytest.raises(ConfigError, match="teacher_mix is 1.2"):
        MixedWriter(model, model, SharedVocabulary(VOCABULARY), [5], 1.2)
