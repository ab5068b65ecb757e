"""A model that reads several texts at once, each at its own length, and forgets row by row what it should not have read.

The texts stand right-aligned in one key-value cache, so that a row's tokens are side by side in every mask, as sliding windows
need. To forget is to take, row by row, the slots up to the last token that counts; this copies the cache once, which is what
Transformers' growing cache does at every token anyway.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from speckd.errors import CapabilityError
from speckd.teachers.placement import moved
from speckd.teachers.shared_prompt import relative_error, rounding_tolerance


class RewindingReader:
    """B texts in one model's cache.

    Args:
        decoder: a Transformers decoder (`model.get_decoder()`) in eval mode that `check_rewinding` found nothing against.
        texts: [T] int64 each, T ≥ 0, on the CPU: read at once.
        longest: tokens that no text will exceed. What is read beyond is nobody's, and gets the last position.
        device: where the decoder takes its inputs.
    """

    def __init__(self, decoder: Any, texts: Sequence[Tensor], longest: int, device: torch.device) -> None:
        # No configuration is given to the cache: it keeps every layer whole, also one that attends to a window only.
        self._decoder, self._cache, self._device, self._last = decoder, DynamicCache(), device, max(longest - 1, 0)
        self._length = torch.tensor([len(text) for text in texts])  # [B], without what is still to be kept or forgotten
        self._mask = _right_aligned(self._length, 0)
        self._fresh = 0
        ids = pad_sequence(list(texts), batch_first=True, padding_side="left")
        if ids.shape[1]:
            mask = _right_aligned(self._length, ids.shape[1])
            self._forward(ids.to(device), mask, mask.cumsum(-1) - 1)
            self._mask = mask

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """One to several more tokens of every text, [B, n] -> their last hidden states, [B, n, H], on the decoder's device."""
        count = tokens.shape[1]
        positions = (self._length + self._fresh)[:, None] + torch.arange(count)
        mask = torch.cat([self._mask, self._mask.new_ones(tokens.shape)], -1)
        hidden = self._forward(moved(tokens, self._device), mask, positions)
        self._mask, self._fresh = mask, self._fresh + count
        return hidden

    def keep(self, rows: Tensor, kept: Tensor) -> None:
        """Goes on with some texts, and forgets of what was read since the last call.

        Args:
            rows: [B'] int64 on the CPU, which texts go on, in their new order.
            kept: [B'] int64 on the CPU, how many of their tokens read since then stay.
        """
        before = self._mask.shape[1] - self._fresh
        self._length, self._fresh = self._length[rows] + kept, 0
        width = int(self._length.max()) if len(rows) else 0
        slots = (before + kept - width)[:, None] + torch.arange(width)
        self._mask = _right_aligned(self._length, width)
        self._take(moved(rows, self._device), moved(slots.clamp(min=0), self._device))  # clamped ones are masked

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        out = self._decoder(
            input_ids=ids,
            attention_mask=moved(mask, self._device),
            position_ids=moved(positions.clamp(0, self._last), self._device),
            past_key_values=self._cache,
            use_cache=True,
        )
        return out.last_hidden_state

    def _take(self, rows: Tensor, slots: Tensor) -> None:
        for layer in self._cache.layers:
            if layer.is_initialized:  # layers that share another's cache hold none
                layer.keys, layer.values = (_taken(held, rows, slots) for held in (layer.keys, layer.values))


def _taken(held: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """[B, heads, W, d], [B'] rows and [B', W'] slots of each -> [B', heads, W', d]."""
    rows, slots = rows.to(held.device), slots.to(held.device)
    return held[rows[:, None], :, slots].transpose(1, 2)


def _right_aligned(length: Tensor, width: int) -> Tensor:
    """[B] lengths -> [B, width] int64, 1 where a text stands."""
    return (torch.arange(width) >= width - length[:, None]).long()


@contextmanager
def in_eval_mode(model: Any) -> Iterator[None]:
    """No dropout and no gradient inside; every module's mode comes back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def input_device(model: Any, otherwise: torch.device) -> torch.device:
    """Where a model takes its inputs; of one whose embeddings are offloaded, anywhere."""
    weight = model.get_input_embeddings().weight
    return otherwise if weight.is_meta else weight.device


@torch.no_grad()
def check_rewinding(decoder: Any, name: str, device: torch.device) -> None:
    """Refuses a model whose cache cannot be taken back row by row. Four forwards of at most three short rows; none is trusted
    for its name.

    Args:
        decoder: in eval mode.
        name: what to call it in the error ("student", "teacher").
        device: of its inputs.

    Raises:
        CapabilityError: it has no such cache, or what it says afterwards is not what it says of the text read at once.
    """
    fix = "Write with a model whose layers all attend to the whole text (no recurrent or chunked layers)"
    try:
        gap, tolerance = _gap(decoder, device)
    except Exception as error:  # no cache, a recurrent state, one spread over devices: all look different
        reason = " ".join(str(error).split())[:160].rstrip(". ")
        raise CapabilityError(f"the {name}'s cache cannot be rewound ({type(error).__name__}: {reason})", fix) from error
    if not gap <= tolerance:
        raise CapabilityError(f"the {name}'s hidden states differ by {gap:.1g} after its cache was rewound", fix)


def _gap(decoder: Any, device: torch.device) -> tuple[float, float]:
    """How far the states after forgetting are from those of the plain forward, and how far rounding may bring them."""
    vocabulary = decoder.get_input_embeddings().weight.shape[0]
    texts = (torch.arange(8) ** 2 * 31 + 7 * torch.arange(3)[:, None]) % vocabulary
    start, right = torch.tensor([4, 0, 2]), torch.tensor([1, 3, 2])
    wrong = torch.arange(4) >= right[:, None]
    offered = (texts.gather(1, start[:, None] + torch.arange(4)) + wrong) % vocabulary
    reader = RewindingReader(decoder, [text[:n] for text, n in zip(texts, start.tolist(), strict=True)], 8, device)
    reader.read(offered[:, :1])
    reader.read(offered[:, 1:])
    rows = torch.tensor([2, 1])  # one is left out, the others change places
    reader.keep(rows, right[rows])
    end = (start + right)[rows]
    found = reader.read(texts[rows].gather(1, end[:, None]))[:, 0]
    whole = [texts[row, : last + 1][None].to(device) for row, last in zip(rows.tolist(), end.tolist(), strict=True)]
    wanted = [decoder(input_ids=ids, use_cache=False).last_hidden_state[0, -1] for ids in whole]
    return max(map(relative_error, found, wanted)), rounding_tolerance(found.dtype)
