"""A cache that is taken back row by row gives the states of the text read at once."""

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from speckd.errors import CapabilityError
from speckd.sources.rewinding import RewindingReader, check_rewinding, in_eval_mode
from tests.sources.models import random_model

CPU = torch.device("cpu")
VOCABULARY = 23
ARCHITECTURES = ("llama", "gpt2", "qwen2", "mistral", "gemma2")


@pytest.mark.parametrize(
    ("kind", "attention"),
    [(kind, attention) for kind in ARCHITECTURES for attention in ("sdpa", "eager") if (kind, attention) != ("gemma2", "sdpa")],
)
def test_states_are_those_of_the_plain_forward(kind: str, attention: str) -> None:
    decoder = random_model(kind, 0, VOCABULARY, attn_implementation=attention).get_decoder()
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(VOCABULARY, (n,), generator=generator) for n in (0, 7, 1, 12)]
    reader, rows = RewindingReader(decoder, texts, 40, CPU), torch.arange(4)
    texts = [text.tolist() for text in texts]
    for _ in range(6):
        offered, count = (
            torch.randint(VOCABULARY, (len(rows), 4), generator=generator),
            int(torch.randint(1, 4, (), generator=generator)),
        )
        reader.read(offered[:, :count])
        reader.read(offered[:, count:])
        rows = torch.randperm(len(rows), generator=generator)[: max(2, len(rows) - 1)]
        kept = torch.randint(0, 5, rows.shape, generator=generator)
        reader.keep(rows, kept)
        texts = [texts[row] + offered[row, :n].tolist() for row, n in zip(rows.tolist(), kept.tolist(), strict=True)]
        rows = torch.arange(len(texts))
        last = torch.randint(VOCABULARY, (len(texts), 2), generator=generator)
        found = reader.read(last)
        for state, text, end in zip(found, texts, last.tolist(), strict=True):
            with torch.no_grad():
                wanted = decoder(input_ids=torch.tensor([text + end]), use_cache=False).last_hidden_state[0, -2:]
            torch.testing.assert_close(state, wanted, rtol=1e-4, atol=1e-4)
        reader.keep(rows, torch.zeros_like(rows))


def test_what_is_read_beyond_the_longest_text_does_no_harm() -> None:
    model = random_model("gpt2", 0, VOCABULARY)  # 64 learned positions, and no 65th
    reader = RewindingReader(model.get_decoder(), [torch.ones(62, dtype=torch.long)], 64, CPU)
    assert reader.read(torch.ones(1, 5, dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_lets_attention_pass(kind: str, dtype: torch.dtype) -> None:
    check_rewinding(random_model(kind, 0, 5).to(dtype).get_decoder(), "student", CPU)


def test_the_check_refuses_a_recurrent_state() -> None:
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1)
    with pytest.raises(CapabilityError, match="the teacher's cache cannot be rewound") as refused:
        check_rewinding(MambaForCausalLM(config).eval().get_decoder(), "teacher", CPU)
    assert "\n" not in str(refused.value) and "recurrent" in refused.value.fix


def test_the_check_sees_states_that_differ() -> None:
    class Forgetful(torch.nn.Module):
        """Ignores the positions it is given, as a model does that counts the cache's slots."""

        def __init__(self, decoder: torch.nn.Module) -> None:
            super().__init__()
            self.decoder, self.get_input_embeddings = decoder, decoder.get_input_embeddings

        def forward(self, position_ids: torch.Tensor | None = None, **inputs: object) -> object:
            return self.decoder(**inputs)

    with pytest.raises(CapabilityError, match="the student's hidden states differ by .* after its cache was rewound"):
        check_rewinding(Forgetful(random_model("gpt2", 0, VOCABULARY).get_decoder()), "student", CPU)


def test_modes_come_back_module_by_module() -> None:
    model = random_model("gpt2", 0, VOCABULARY).train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    with in_eval_mode(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == before and torch.is_grad_enabled()
