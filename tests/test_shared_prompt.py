"""The shared prompt computed once: the plain forward's states, for every architecture that can, and a refusal for the rest."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from speckd.teachers.shared_prompt import (
    PromptSharing,
    may_pay,
    plain_states,
    plan_sharing,
    shared_states,
    why_not_shared,
)

WIDTH, LONGEST, WINDOW = 61, 48, 8
CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": WIDTH,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL: dict[str, Any] = {"vocab_size": WIDTH, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOWED = {**SHAPE, "sliding_window": WINDOW}
CAN: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3, mixture of experts": lambda: Qwen3MoeConfig(**SHAPE, **EXPERTS),
    "gpt2, learned positions": lambda: GPT2Config(**SMALL, n_embd=32, n_layer=3, n_head=4, n_positions=LONGEST),
    "bloom, positions by slopes": lambda: BloomConfig(**SMALL, hidden_size=32, n_layer=3, n_head=4),
    "mistral, window": lambda: MistralConfig(**WINDOWED),
    "gemma2, window and none in turn": lambda: Gemma2Config(**WINDOWED, query_pre_attn_scalar=8),
    "gemma3, window and two rotations": lambda: Gemma3TextConfig(**WINDOWED, query_pre_attn_scalar=8),
}
STATES = {"vocab_size": WIDTH, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "initializer_range": 0.2}
CANNOT: dict[str, Callable[[], PretrainedConfig]] = {
    "mamba": lambda: MambaConfig(**STATES),
    "mamba2": lambda: Mamba2Config(**STATES, head_dim=8, num_heads=8, n_groups=1),
    "lfm2, convolutions and attention": lambda: Lfm2Config(**SHAPE, layer_types=["conv", "full_attention", "conv"]),
}
_built: dict[str, Any] = {}


def decoder(name: str) -> Any:
    """A random one in eval mode, made once."""
    if name not in _built:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config({**CAN, **CANNOT}[name]())
        _built[name] = model.eval().requires_grad_(False).get_decoder()
    return _built[name]


def padded(rows: list[list[int]], side: str, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Ids and mask; the padding holds a token that also stands in rows."""
    longest = max(width or 0, *map(len, rows))
    gaps = [[5] * (longest - len(row)) for row in rows]
    ids = [row + gap if side == "right" else gap + row for row, gap in zip(rows, gaps, strict=True)]
    ones = [[1] * len(row) for row in rows]
    zeros = [[0] * len(gap) for gap in gaps]
    mask = [own + gap if side == "right" else gap + own for own, gap in zip(ones, zeros, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


tokens = st.integers(0, WIDTH - 1)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Rows that start with one of a few starts, some of which start alike, and end raggedly; also rows within other rows."""
    system = draw(st.lists(tokens, max_size=16))
    starts = [system + draw(st.lists(tokens, max_size=16)) for _ in range(draw(st.integers(1, 3)))]
    rows = [
        draw(st.sampled_from([*starts, system, []])) + draw(st.lists(tokens, min_size=1, max_size=16))
        for _ in range(draw(st.integers(1, 7)))
    ]
    return padded(rows, draw(st.sampled_from(["right", "left"])), draw(st.integers(0, LONGEST)))


def require_equal(found: Tensor, wanted: Tensor, mask: Tensor) -> None:
    """1e-5, relative to each token's own length."""
    seen = mask.bool()
    gap = (found - wanted)[seen].norm(dim=-1) / wanted[seen].norm(dim=-1)
    assert float(gap.max()) < 1e-5


@pytest.mark.parametrize("name", CAN)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(batch=batches())
def test_states_are_those_of_the_plain_forward(name: str, batch: tuple[Tensor, Tensor]) -> None:
    ids, mask = batch
    states = PromptSharing(decoder(name), LONGEST, forward_cost=0).states(ids, mask)
    assert states.hidden.shape[:2] == ids.shape and states.positions <= ids.numel()
    require_equal(states.hidden, plain_states(decoder(name), ids, mask), mask)


@settings(max_examples=200, deadline=None)
@given(batch=batches(), forward_cost=st.integers(0, 40))
def test_a_plan_saves_what_it_says_and_loses_no_token(batch: tuple[Tensor, Tensor], forward_cost: int) -> None:
    ids, mask = batch
    sharing = plan_sharing(ids, mask, forward_cost)
    if sharing is None:
        return
    second = forward_cost if sharing.branch_ids.numel() else 0
    assert sharing.positions + second < ids.numel()
    flat = torch.cat([sharing.trunk_ids.flatten(), sharing.branch_ids.flatten(), torch.tensor([-1])])
    assert torch.equal(flat[sharing.source], ids.masked_fill(mask == 0, -1))
    assert int(sharing.branch_positions.max()) < int(mask.sum(-1).max()) if sharing.branch_ids.numel() else True


class Counted:
    """A decoder that counts the token positions it is given."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.positions, self.calls = inner, 0, 0

    def __call__(self, input_ids: Tensor, **given: Any) -> Any:
        self.positions, self.calls = self.positions + input_ids.numel(), self.calls + 1
        return self.inner(input_ids=input_ids, **given)


def shared_start(rows: int, start: int, ends: list[int]) -> list[list[int]]:
    """Rows of one start whose ends part at once."""
    return [[*range(1, start + 1), 40 + i, *[7] * (ends[i % len(ends)] - 1)] for i in range(rows)]


def test_the_count_is_what_the_decoder_computed() -> None:
    counted = Counted(decoder("llama"))
    ids, mask = padded(shared_start(6, 30, [4, 6]), "right")
    states = PromptSharing(counted, LONGEST, forward_cost=0).states(ids, mask)
    assert states.positions == counted.positions == 30 + 6 * 6 and counted.calls == 2


def test_two_prompts_of_one_system_prompt_are_two_trunks_where_that_is_cheaper() -> None:
    system = list(range(1, 9))
    rows = [[*system, *[20 + prompt] * 20, 40 + way, 3] for prompt in (0, 1) for way in range(3)]
    sharing = plan_sharing(*padded(rows, "right"), forward_cost=0)
    assert sharing is not None and sharing.trunk_ids.shape == (2, 28) and sharing.branch_ids.shape == (6, 2)
    short = [[*range(1, 21), *[40 + prompt] * 2, 50 + way, 3] for prompt in range(3) for way in range(2)]
    sharing = plan_sharing(*padded(short, "right"), forward_cost=0)
    assert sharing is not None and sharing.trunk_ids.shape == (1, 20) and sharing.branch_ids.shape == (6, 4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_equal_rows_are_one_row_and_need_no_cache(side: str) -> None:
    counted = Counted(decoder("mamba"))  # which has none that could be continued
    ids, mask = padded([[3, 1, 4, 1, 5]] * 4, side, 8)
    states = PromptSharing(counted, LONGEST, forward_cost=0).states(ids, mask)
    assert counted.calls == 1 and states.positions == 5
    require_equal(states.hidden, plain_states(decoder("mamba"), *padded([[3, 1, 4, 1, 5]] * 4, "right", 8)).roll(
        3 if side == "left" else 0, 1
    ), mask)  # fmt: skip


@pytest.mark.parametrize(
    "rows",
    [[[1, 2, 3, 4]], [[1, 2, 3, 4], [2, 2, 3, 4]], [[1, 2, 3, 4], [1, 3, 3, 4]], [[1, 2, 3], []]],
    ids=["one row", "nothing shared", "a first token shared, which saves less than it costs", "an empty row"],
)
def test_nothing_to_share_is_the_plain_forward(rows: list[list[int]]) -> None:
    ids, mask = padded(rows, "right")
    assert plan_sharing(ids, mask, forward_cost=1) is None
    counted = Counted(decoder("llama"))
    states = PromptSharing(counted, LONGEST, forward_cost=1).states(ids, mask)
    assert counted.calls == 1 and states.positions == counted.positions == ids.numel()
    plain = decoder("llama")(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert torch.equal(states.hidden, plain)


def test_a_second_forward_must_pay_for_itself() -> None:
    ids, mask = padded(shared_start(3, 30, [5]), "right")  # 105 positions, or 30 + 15
    assert plan_sharing(ids, mask, forward_cost=59) is not None and plan_sharing(ids, mask, forward_cost=60) is None
    assert plan_sharing(ids, mask) is None  # by default
    assert may_pay(9, 33) and not may_pay(8, 33) and not may_pay(1, 10_000) and not may_pay(1000, 4)


def test_masks_with_holes_are_left_alone() -> None:
    ids, mask = padded(shared_start(3, 30, [5]), "right")
    mask[:, 3] = 0
    assert plan_sharing(ids, mask, forward_cost=0) is None


def test_rows_longer_than_the_proof_are_computed_plainly() -> None:
    ids, mask = padded(shared_start(3, 30, [5]), "right", 40)
    for longest, calls in ((35, 2), (34, 1)):
        counted = Counted(decoder("llama"))
        PromptSharing(counted, longest, forward_cost=0).states(ids, mask)
        assert counted.calls == calls


# ---- the proof -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [8, 9, 15, 31, LONGEST])
@pytest.mark.parametrize("name", CAN)
def test_the_proof_accepts_what_is_equal(name: str, longest: int) -> None:
    assert why_not_shared(decoder(name), longest, CPU) is None


@pytest.mark.parametrize("name", CANNOT)
def test_the_proof_refuses_a_cache_that_cannot_be_continued(name: str) -> None:
    assert "its cache cannot be continued" in str(why_not_shared(decoder(name), LONGEST, CPU))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_proof_bears_the_rounding_of_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    deep = LlamaConfig(**{**SHAPE, "num_hidden_layers": 16, "initializer_range": 0.1})
    model = AutoModelForCausalLM.from_config(deep).eval().to(dtype)
    assert why_not_shared(model.get_decoder(), LONGEST, CPU) is None


class Wrong:
    """A decoder that spoils what it is given when it continues a cache."""

    def __init__(self, inner: Any, spoil: Callable[[dict[str, Any]], None]) -> None:
        self.inner, self.spoil = inner, spoil

    def __call__(self, **given: Any) -> Any:
        if given.get("past_key_values") is not None:
            self.spoil(given)
        return self.inner(**given)

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()


def forget_positions(given: dict[str, Any]) -> None:
    del given["position_ids"]


def shift_positions(given: dict[str, Any]) -> None:
    given["position_ids"] = given["position_ids"] - 1


def see_padding(given: dict[str, Any]) -> None:
    given["attention_mask"] = torch.ones_like(given["attention_mask"])


def miss_a_token(given: dict[str, Any]) -> None:
    given["attention_mask"][:, -given["input_ids"].shape[1] - 1] = 0


def mix_rows(given: dict[str, Any]) -> None:
    given["past_key_values"].batch_select_indices(torch.tensor([3, 2, 1, 0]))


def drop_the_trunk(given: dict[str, Any]) -> None:
    width = given["input_ids"].shape[1]
    given["attention_mask"][:, :-width] = 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spoil", [forget_positions, shift_positions, see_padding, miss_a_token, mix_rows, drop_the_trunk])
def test_the_proof_sees_what_goes_wrong(spoil: Callable[[dict[str, Any]], None], dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).eval().to(dtype)
    assert "its hidden states differ" in str(why_not_shared(Wrong(model.get_decoder(), spoil), LONGEST, CPU))


def test_a_window_that_is_off_by_one_is_seen() -> None:
    """The proof's rows are longer than the window, so what a window does to a cache takes part."""

    def narrow(given: dict[str, Any]) -> None:
        for layer in given["past_key_values"].layers:
            layer.keys, layer.values = layer.keys.roll(1, 2), layer.values.roll(1, 2)

    model = Wrong(decoder("mistral, window"), narrow)
    assert "its hidden states differ" in str(why_not_shared(model, LONGEST, CPU))


def test_states_without_gradient_and_zeros_in_the_padding() -> None:
    ids, mask = padded(shared_start(3, 30, [3, 5]), "right", 40)
    sharing = plan_sharing(ids, mask, forward_cost=0)
    assert sharing is not None
    hidden = shared_states(decoder("llama"), sharing, CPU)
    assert not hidden.requires_grad and not hidden[mask == 0].any()
