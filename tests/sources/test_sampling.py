import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from speckd.sources.sampling import draw
from speckd.sources.writer import Sampling

EVENLY = (torch.arange(20_000).double() + 0.5) / 20_000  # an inverse CDF turns them into the probabilities themselves


def shares(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """[V], how often each token is drawn."""
    tokens = draw(logits.expand(len(EVENLY), -1), sampling, EVENLY)
    return tokens.bincount(minlength=logits.shape[-1]).double() / len(EVENLY)


def test_what_is_drawn_is_what_generate_of_transformers_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    for temperature, top_k, top_p in [
        (1.0, 0, 1.0),
        (0.5, 0, 1.0),
        (1.7, 5, 1.0),
        (1.0, 0, 0.6),
        (0.8, 12, 0.9),
        (1.0, 3, 0.2),
    ]:
        logits = 2 * torch.randn(300, generator=generator)
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        warpers.extend([TopKLogitsWarper(top_k)] if top_k else [])
        warpers.extend([TopPLogitsWarper(top_p)] if top_p < 1 else [])
        wanted = warpers(None, logits[None])[0].double().softmax(-1)
        found = shares(logits, Sampling(temperature, top_k, top_p))
        assert (found - wanted).abs().max() <= 2 / len(EVENLY)
        assert not found[wanted == 0].any(), "nothing that is cut off is ever drawn"


def test_greedy_ignores_the_uniforms() -> None:
    logits = 30 * torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw(logits, Sampling(0.0), EVENLY[:50]), logits.argmax(-1))
