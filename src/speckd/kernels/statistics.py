"""What gates ask of a whole distribution, from one read of the logits."""

import warnings
from dataclasses import dataclass, fields

import torch
import triton
from torch import Tensor

from speckd import tiles
from speckd.kernels import programs
from speckd.types import DenseSignal

_TILES = 16  # at once: 2,048 entries
BLOCK = 2048  # likewise


@dataclass(frozen=True)
class Statistics:
    """Of N rows, float32. `maximum`, `log_mass` (log Σ exp(logits − maximum)), `log_mass_at` (the same, both divided by a
    temperature): [N]; `argmax`: [N] int64, the first; `tile_maxima`: [N, ceil(V / 128)]. A row with NaN has a maximum of NaN.
    """

    maximum: Tensor
    argmax: Tensor
    log_mass: Tensor
    log_mass_at: Tensor
    tile_maxima: Tensor

    @classmethod
    def of(cls, logits: Tensor, temperature: float = 1.0) -> "Statistics":
        """[N, V] in at most 32 bits, rows contiguous."""
        count, width = logits.shape
        tile_count = triton.cdiv(width, tiles.WIDTH)
        found = [torch.empty(count, dtype=torch.float32, device=logits.device) for _ in range(2 if temperature == 1 else 3)]
        maximum, log_mass, log_mass_at = found[0], found[1], found[-1]
        argmax = torch.empty(count, dtype=torch.int64, device=logits.device)
        tile_maxima = torch.empty(count, tile_count, dtype=torch.float32, device=logits.device)
        if count:
            with torch.cuda.device_of(logits):
                programs.row_statistics[(count,)](
                    logits, logits.stride(0), maximum, argmax, log_mass, log_mass_at, tile_maxima,
                    1 / temperature, width, tile_count, TEMPERED=temperature != 1, TILES=_TILES, WIDTH=tiles.WIDTH,
                )  # fmt: skip
        return cls(maximum, argmax, log_mass, log_mass_at, tile_maxima)

    def rows(self, index: Tensor | slice) -> "Statistics":
        return Statistics(*(getattr(self, field.name)[index] for field in fields(self)))


@dataclass(frozen=True)
class MeasuredSignal(DenseSignal):
    """A dense signal whose statistics are known. `logits`: [N, V], also in 16 bits; `temperature`: that of `log_mass_at`."""

    statistics: Statistics
    temperature: float = 1.0

    @classmethod
    def of(cls, logits: Tensor, temperature: float = 1.0) -> "MeasuredSignal":
        """Logits as of `available`."""
        return cls(logits, Statistics.of(logits, temperature), temperature)

    @property
    def tile_maxima(self) -> Tensor:
        return self.statistics.tile_maxima

    @property
    def maximum(self) -> Tensor:
        return self.statistics.maximum[:, None]

    @property
    def log_mass(self) -> Tensor:
        return self.statistics.log_mass[:, None]

    def argmax(self) -> Tensor:
        return self.statistics.argmax

    def label_log_probs(self, index: Tensor, labels: Tensor) -> Tensor:
        own = self.logits[index, labels].float()
        return own - self.statistics.maximum[index] - self.statistics.log_mass[index]

    def in_top_k(self, token_ids: Tensor, k: int) -> Tensor:
        own = self.logits.gather(-1, token_ids[:, None])[:, 0].float()
        return (entries_above(self.logits, self.tile_maxima, own, k) < k) & (own > -torch.inf)

    def entropy(self) -> Tensor:
        return self.entropies(torch.arange(len(self.logits), device=self.logits.device))

    def entropies(self, index: Tensor) -> Tensor:
        """[m] nats of some rows, [m] int64, without a copy of them."""
        found = torch.empty(len(index), dtype=torch.float32, device=index.device)
        if len(index):
            with torch.cuda.device_of(self.logits):
                programs.row_entropies[(len(index),)](
                    self.logits, self.logits.stride(0), index, self.statistics.maximum, self.statistics.log_mass, found,
                    self.logits.shape[1], BLOCK=BLOCK,
                )  # fmt: skip
        return found

    def reordered(self, index: Tensor) -> "MeasuredSignal":
        """The signal after its logits were moved, in place: row i is what row `index[i]` was."""
        return MeasuredSignal(self.logits, self.statistics.rows(index), self.temperature)

    def rows(self, index: Tensor | slice) -> "MeasuredSignal":
        return MeasuredSignal(self.logits[index], self.statistics.rows(index), self.temperature)


def entries_above(logits: Tensor, tile_maxima: Tensor, values: Tensor, most: int) -> Tensor:
    """[N] int32: how many entries of each row are strictly above `values`, [N] float32; exact below `most`."""
    count = torch.empty(len(values), dtype=torch.int32, device=logits.device)
    if len(values):
        tile_maxima = tile_maxima.contiguous()
        with torch.cuda.device_of(logits):
            programs.entries_above[(len(values),)](
                logits, logits.stride(0), tile_maxima, values, count, most, logits.shape[1], tile_maxima.shape[1],
                TILES=_TILES, WIDTH=tiles.WIDTH,
            )  # fmt: skip
    return count


def trial(device: torch.device) -> bool:
    """Does a kernel compile, run and agree with PyTorch here? Says why not, once: a missing C compiler, say, is no secret."""
    logits = torch.linspace(-3, 3, 300, device=device).repeat(2, 1)
    try:
        found = Statistics.of(logits)
        agree = torch.allclose(found.maximum + found.log_mass, logits.logsumexp(-1)) and bool((found.argmax == 299).all())
        problem = None if agree else "its results are wrong"
    except Exception as error:  # whatever a compiler or a driver may raise
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        warnings.warn(f"Triton does not work on {device}, so the PyTorch code is used: {problem}", RuntimeWarning, stacklevel=2)
    return problem is None
