"""One sequence's answers as bytes: what is read is what was written."""

import struct
import zlib
from dataclasses import replace
from hashlib import blake2b

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speckd.errors import StoreError
from speckd.teachers.answers import Answer
from speckd.teachers.draws import answer_of_draws
from speckd.teachers.layout import Compression, Kind, Layout
from speckd.teachers.record import HEADER, body_size, decode, encode, sequence_key
from speckd.types import DenseSignal, TopKSignal
from tests.teachers.made import answered, entries, layouts, same, teacher_log_probs

LAYOUTS = list(layouts())


@st.composite
def kept(draw) -> tuple[Layout, torch.Tensor, Answer]:
    """A layout, a sequence, and an answer: any number of tokens and positions, ties, zeros, K = 1 and K = V."""
    vocabulary = draw(st.sampled_from([1, 2, 3, 40, 257]))
    kind = draw(st.sampled_from(Kind))
    width = vocabulary if kind is Kind.FULL else draw(st.integers(1, vocabulary))
    draws = draw(st.sampled_from([1, 3, 255, 256])) if kind is Kind.SAMPLED else 0
    layout = Layout(kind, vocabulary, width, draw(st.sampled_from([16, 32])), draw(st.sampled_from(Compression)), draws)
    length, share = draw(st.integers(0, 20)), draw(st.sampled_from([0.0, 0.5, 1.0]))
    seed, ties, holes = draw(st.integers(0, 2**31)), draw(st.booleans()), draw(st.booleans())
    return layout, *entries(layout, [length], seed, ties, holes, share)[0]


@given(drawn=kept())
def test_what_is_read_is_what_was_written(counted, drawn) -> None:
    counted()
    layout, token_ids, answer = drawn
    record = encode(token_ids, answer, layout)
    read = decode(record.data, token_ids, layout)
    if layout.precision == 32 or layout.kind is Kind.SAMPLED:
        assert same(read, answer)
    assert same(replace(read, log_probs=answer.log_probs), answer)  # ids, positions and labels are exact in any case
    assert read.log_probs.dtype == read.label_log_probs.dtype == torch.float32
    finite = answer.log_probs > -torch.inf
    assert torch.equal(finite, read.log_probs > -torch.inf)
    errors = (answer.log_probs - read.log_probs).double().abs()[finite]
    if errors.numel():
        assert float(errors.max()) <= record.rounding.max_log_prob + 1e-6
        assert layout.precision == 32 or layout.kind is Kind.SAMPLED or record.rounding.entries == errors.numel()
    assert encode(token_ids, answer, layout).data == record.data
    size = body_size(layout, len(token_ids), len(answer.positions), *HEADER.unpack_from(record.data)[3:5])
    if layout.compression is Compression.NONE:
        assert len(record.data) == HEADER.size + size
    if len(read.positions):
        some = read.positions[::2].contiguous()
        assert same(decode(record.data, token_ids, layout, some), read.at(some))


@given(seed=st.integers(0, 2**31), k=st.integers(1, 16), ties=st.booleans(), scale=st.sampled_from([1e-4, 0.1, 1.0, 20.0]))
def test_the_greedy_verdicts_are_those_of_the_teacher_itself(counted, seed, k, ties, scale) -> None:
    counted()
    generator = torch.Generator().manual_seed(seed)
    token_ids, positions = torch.randint(60, (12,), generator=generator), torch.arange(11)
    log_probs = teacher_log_probs(11, 60, generator, scale, ties)
    for kind, width, compression in ((Kind.TOP_K, 16, Compression.ZLIB), (Kind.FULL, 60, Compression.NONE)):
        layout = Layout(kind, 60, width, 16, compression)
        answer = answered(layout, token_ids, positions, log_probs, generator)
        read = decode(encode(token_ids, answer, layout).data, token_ids, layout)
        signal = DenseSignal(read.log_probs) if read.token_ids is None else TopKSignal(read.token_ids, read.log_probs)
        # A tie of the K-th beyond the K that are kept is unknown to any top-K; k below K leaves the last tie whole.
        sure = (log_probs >= log_probs.topk(width).values[:, -1:]).sum(-1) == width
        for token in range(0, 60, 7):
            ids = torch.full((11,), token)
            mine, theirs = signal.in_top_k(ids, k), DenseSignal(log_probs).in_top_k(ids, k)
            assert torch.equal(mine[sure], theirs[sure]) and bool((mine <= theirs).all())


@pytest.mark.parametrize("vocabulary", [65_536, 65_537, 131_072, 131_073, 151_936])
def test_ids_at_the_borders_of_widths_are_exact(vocabulary) -> None:
    ids = torch.tensor([i for i in (0, 65_535, 65_536, 131_071, 131_072) if i < vocabulary] + [vocabulary - 1]).unique()
    layout = Layout(Kind.TOP_K, vocabulary, len(ids))
    log_probs = torch.linspace(-2, -9, len(ids))[None]
    for order in (ids, ids.flip(0)):
        for label in ids.tolist():
            token_ids = torch.tensor([vocabulary - 1, label])
            answer = Answer(torch.tensor([0]), order[None], log_probs, log_probs[0, order == label])
            assert torch.equal(decode(encode(token_ids, answer, layout).data, token_ids, layout).token_ids, order[None])


def test_a_key_is_of_all_tokens_in_their_order() -> None:
    sequences = [[], [0], [0, 0], [1, 2], [2, 1], [1, 2, 0], [65_536], [0, 1]]
    assert len({sequence_key(torch.tensor(ids, dtype=torch.int64)) for ids in sequences}) == len(sequences)
    assert sequence_key(torch.tensor([1, 2**16])) == blake2b(bytes([1, 0, 0, 0, 0, 0, 1, 0]), digest_size=16).digest()


def test_drawn_tokens_are_counted_and_padded_with_others() -> None:
    layout = Layout(Kind.SAMPLED, 6, 4, draws=4)
    draws = torch.tensor([[1, 1, 5, 1], [2, 2, 2, 2], [0, 1, 2, 3]])
    labels = torch.zeros(3)
    answer = answer_of_draws(torch.arange(3), draws, labels, layout)
    assert answer.token_ids is not None and not answer.ranked
    assert answer.token_ids.tolist() == [[1, 5, 0, 2], [2, 0, 1, 3], [0, 1, 2, 3]]
    assert torch.allclose(answer.log_probs.exp(), torch.tensor([[0.75, 0.25, 0, 0], [1, 0, 0, 0], [0.25] * 4]))
    with pytest.raises(StoreError, match="3 distinct tokens were drawn.*holds 2.*width to 4"):
        answer_of_draws(torch.arange(1), draws[:1] * 0 + torch.tensor([0, 1, 2, 2]), labels, replace(layout, width=2))
    with pytest.raises(StoreError, match="were drawn where 3 × 5 were to be"):
        answer_of_draws(torch.arange(3), draws, labels, replace(layout, draws=5))
    tokens = torch.tensor([0, 1, 2, 3])
    with pytest.raises(StoreError, match="not those of counts out of 4 draws"):
        encode(tokens, replace(answer, log_probs=answer.log_probs - 0.1), layout)


def _is_outside(token_ids: torch.Tensor, answer: Answer) -> torch.Tensor:
    assert answer.token_ids is not None
    return (answer.token_ids != token_ids[answer.positions + 1][:, None]).all(-1)


def _broken(token_ids: torch.Tensor, answer: Answer) -> dict[str, Answer]:
    ids, labels = answer.token_ids, answer.label_log_probs
    assert ids is not None and bool(_is_outside(token_ids, answer).any())
    twice, outside = ids.clone(), ids.clone()
    twice[0, 1], outside[0, 0] = twice[0, 0], 50
    outside_top = torch.full_like(answer.label_log_probs, -0.1)
    nan = answer.log_probs.clone()
    nan[0, -1] = torch.nan
    return {
        "contradicts the tokens'": replace(answer, label_log_probs=answer.label_log_probs.roll(1) - 3),
        "one place off": replace(answer, label_log_probs=torch.where(_is_outside(token_ids, answer), outside_top, labels)),
        "positions do not ascend": replace(answer, positions=answer.positions.flip(0)),
        "positions lie outside": replace(answer, positions=answer.positions + 1),
        "named twice": replace(answer, token_ids=twice),
        "outside the vocabulary": replace(answer, token_ids=outside),
        "not a number, or above 0": replace(answer, log_probs=nan),
        "sum to more than 1": replace(answer, log_probs=answer.log_probs * 0.01),
        "most probable token is not first": replace(answer, log_probs=answer.log_probs.flip(-1), token_ids=ids.flip(-1)),
        "log-probabilities are \\(9, 7\\), not \\(9, 8\\)": replace(answer, log_probs=answer.log_probs[:, :7]),
        "ids are of another shape": replace(answer, token_ids=None),
        "not float32": replace(answer, log_probs=answer.log_probs.double()),
        "does not fit a top_k cache": replace(answer, ranked=False),
        "not one label log-probability": replace(answer, label_log_probs=answer.label_log_probs[1:]),
    }


def test_an_answer_that_cannot_be_one_to_its_tokens_is_refused() -> None:
    layout = Layout(Kind.TOP_K, 50, 8)
    token_ids, answer = entries(layout, [10], share=1.0)[0]
    encode(token_ids, answer, layout)
    for message, broken in _broken(token_ids, answer).items():
        with pytest.raises(StoreError, match=message):
            encode(token_ids, broken, layout)
    full = Layout(Kind.FULL, 50, 50)
    token_ids, answer = entries(full, [10], share=1.0)[0]
    with pytest.raises(StoreError, match="contradicts the tokens'"):  # one place off
        encode(token_ids.roll(1), answer, full)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_other_tokens_get_no_answer(layout) -> None:
    (token_ids, answer), (other, _) = entries(layout, [9, 9])
    data = encode(token_ids, answer, layout).data
    for wrong in (other, token_ids[:-1], torch.cat([token_ids, token_ids[:1]]), token_ids.flip(0)):
        with pytest.raises(StoreError, match="of another sequence"):
            decode(data, wrong, layout)
    with pytest.raises(StoreError, match="not at all the positions"):
        decode(data, token_ids, layout, torch.arange(9))


def test_decompression_ends_where_the_header_says() -> None:
    """A record that would grow without bound: 64 MiB of zeros in 64 KiB."""
    layout = Layout(Kind.TOP_K, 50, 8, compression=Compression.ZLIB)
    token_ids, answer = entries(layout, [10], share=1.0)[0]
    honest = HEADER.unpack_from(encode(token_ids, answer, layout).data)
    bomb = zlib.compress(bytes(2**26))
    with pytest.raises(StoreError, match="decompresses to another size"):
        decode(HEADER.pack(*honest[:5], len(bomb)) + bomb, token_ids, layout)
    for garbage in (b"", b"\x00" * 9, bomb[:20]):
        with pytest.raises(StoreError, match="damaged"):
            decode(HEADER.pack(*honest[:5], len(garbage)) + garbage, token_ids, layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_record_that_was_forged_crashes_nothing(layout) -> None:
    """Without the digest, which the shard checks before: any single change gives an answer of the right shape or an error."""
    token_ids, answer = entries(layout, [7], share=1.0)[0]
    data = encode(token_ids, answer, layout).data
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 0xFF
        try:
            read = decode(bytes(changed), token_ids, layout)
        except StoreError:
            continue
        assert read.log_probs.shape == (len(read.positions), layout.width)
        assert read.token_ids is None or int(read.token_ids.max()) < layout.vocabulary_size
    with pytest.raises(StoreError, match="cut short"):
        decode(data[: HEADER.size - 1], token_ids, layout)


def test_layouts_that_make_no_sense_are_refused() -> None:
    for message, arguments in {
        "hold 9 tokens of a vocabulary of 8": (Kind.TOP_K, 8, 9),
        "hold 0 tokens": (Kind.TOP_K, 8, 0),
        "holds the whole vocabulary": (Kind.FULL, 8, 4),
        "precision is 8 bits": (Kind.TOP_K, 8, 4, 8),
        "sampled cache with 0 draws": (Kind.SAMPLED, 8, 4),
        "top_k cache with 3 draws": (Kind.TOP_K, 8, 4, 16, Compression.NONE, 3),
        "vocabulary_size is 0": (Kind.TOP_K, 0, 1),
    }.items():
        with pytest.raises(StoreError, match=message):
            Layout(*arguments)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.compression is Compression.NONE], ids=str)
def test_the_estimate_is_the_size(layout) -> None:
    made = entries(layout, [1, 5, 16, 40])
    records = [encode(*entry, layout) for entry in made]
    size = sum(len(record.data) + struct.calcsize("<16sQ16s") for record in records)
    tokens, answers = sum(record.tokens for record in records), sum(record.answers for record in records)
    estimate = layout.estimated_bytes(len(made), tokens, answers)
    assert size <= estimate + len(made) * (4 + layout.id_bits)  # bit planes begin a byte of their own; the crowded cost a bit
    assert layout.kind is Kind.SAMPLED or estimate <= size + 1
