"""The row pass by kernels: gradients are written over the student's logits, then packed by filling the holes between them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from speckd.comparisons import as_dense
from speckd.divergences import HasEntries
from speckd.kernels import programs
from speckd.kernels.statistics import MeasuredSignal
from speckd.row_pass import (
    JudgedRows,
    RowPass,
    RowResults,
    closed_form,
    divergence_slope,
    slope_against_tail,
    token_weights,
)
from speckd.support import teacher_support
from speckd.types import DenseSignal, TopKSignal

BLOCK = 4096  # entries of a row at once
_WARPS = 8


@dataclass(frozen=True)
class KernelPass(RowPass):
    """`RowPass` where `kernels.usable`: the same results, to rounding, with the gradients of all rows packed, in another order.

    `tile`: for rows that the closed form does not bear, which are left to the divergence itself.
    """

    @torch.no_grad()
    def __call__(self, rows: JudgedRows, out: Tensor | None) -> tuple[RowResults, Tensor]:
        on, fallen = token_weights(self.objective, rows.acceptance)
        found = RowResults.of(rows.acceptance)
        order = _Order.of(on != 0, (on != 0) | (fallen != 0) | (self.objective.label_loss_weight > 0))
        first, second = order.taught, order.labelled
        label = self.label_slopes(rows, fallen, found, wanted=out is not None, costs=rows.label_costs(on))
        on = rows.slope_weights(on)
        chunk = _Chunk(self, rows, self._measured(rows.student), label, out is not None)
        if len(second) and out is not None:
            chunk.learn_labels(second)
        if len(first) and isinstance(rows.teacher, TopKSignal) and rows.teacher.token_ids.shape[-1] < chunk.width:
            value = chunk.learn_top_k(rows.teacher, first, on[first][:, None])
            found.divergence[first] = rows.with_following(first, value, found)
        elif len(first):
            assert rows.teacher is not None
            teacher = self._measured(as_dense(rows.teacher))
            chunk.learn_dense(teacher, first, on, found.divergence)
            found.divergence[first] = rows.with_following(first, found.divergence[first], found)
            apart = first[~torch.isfinite(found.divergence[first])]
            if len(apart):
                self._learn_apart(rows, teacher, apart, found, out)
        if out is None:
            return found, torch.cat([first, second])
        move_rows(out, order.movers, order.holes)
        return found, order.packed

    def _measured(self, signal: DenseSignal) -> MeasuredSignal:
        temperature = self.objective.divergence_temperature
        if isinstance(signal, MeasuredSignal) and signal.temperature == temperature:
            return signal
        return MeasuredSignal.of(signal.logits, temperature)

    def _learn_apart(
        self, rows: JudgedRows, teacher: DenseSignal, index: Tensor, found: RowResults, out: Tensor | None
    ) -> None:
        """Rows with probabilities of 0, of which only the divergence itself can say whether they matter; in their places."""
        for some in index.split(self.tile):
            student, reference = DenseSignal(rows.student.logits[some]), DenseSignal(teacher.logits[some].float())
            following = None if rows.following is None else rows.following.rows(some)
            part = JudgedRows(student, reference, rows.labels[some], rows.keys.rows(some), rows.acceptance[some], following)
            own, order = super().__call__(part, None if out is None else student.logits)
            found.divergence[some] = own.divergence
            if out is not None:
                out[some[order]] = student.logits[: len(order)]


@dataclass(frozen=True)
class _Chunk:
    """One call's rows: `student.logits` hold gradients where a kernel has been. `label`: [n], as `RowPass` has it."""

    row_pass: RowPass
    rows: JudgedRows
    student: MeasuredSignal
    label: Tensor | None
    wanted: bool

    @property
    def logits(self) -> Tensor:
        return self.student.logits

    @property
    def width(self) -> int:
        return self.logits.shape[1]

    @property
    def _cap(self) -> tuple[float, bool]:
        softcap = self.row_pass.head.softcap
        return (1.0, False) if softcap is None else (float(softcap), True)

    def learn_labels(self, index: Tensor) -> None:
        """Gradients of rows that learn from the label alone, in their places."""
        softcap, capped = self._cap
        assert self.label is not None
        with torch.cuda.device_of(self.logits):
            programs.label_gradient[(len(index),)](
                self.logits, self.logits.stride(0), index, self.student.statistics.maximum, self.student.statistics.log_mass,
                self.rows.labels, self.label, softcap, self.width, CAPPED=capped, BLOCK=BLOCK, num_warps=_WARPS,
            )  # fmt: skip

    def learn_dense(self, teacher: MeasuredSignal, index: Tensor, on: Tensor, values: Tensor) -> None:
        """Divergences of some rows into `values`, [n], and their gradients into their places, except where it is not finite."""
        objective, (softcap, capped) = self.row_pass.objective, self._cap
        temperature, divergence = objective.divergence_temperature, objective.divergence
        assert isinstance(divergence, HasEntries)
        form, own, other = divergence.entrywise, self.student.statistics, teacher.statistics
        weights = temperature * on  # T² of the divergence, 1/T of the logits
        label = weights if self.label is None else self.label  # not read where there is none
        with torch.cuda.device_of(self.logits):
            programs.divergence_gradient[(len(index),)](
                self.logits, self.logits.stride(0), teacher.logits, teacher.logits.stride(0), index, own.maximum, own.log_mass,
                own.log_mass_at, other.maximum, other.log_mass_at, weights, self.rows.labels, label, values, 1 / temperature,
                softcap, self.width, programs.translated(form.entry), form.a, form.b, WRITE=self.wanted,
                TEMPERED=temperature != 1, LABELLED=self.label is not None, CAPPED=capped, BLOCK=BLOCK, num_warps=_WARPS,
            )  # fmt: skip

    def learn_top_k(self, teacher: TopKSignal, index: Tensor, on: Tensor) -> Tensor:
        """The divergence of some rows, [m], of weight `on`, [m, 1], from a teacher's K tokens and a tail; gradients in place.

        The tail shares its slope in proportion to q, so a row is read twice: to add up q there, and to scale it.
        """
        signal, own, places = teacher.rows(index), self.student.statistics, index[:, None]
        ids, divergence = signal.token_ids, self.row_pass.objective.token_divergence
        log_p = teacher_support(signal, self.width, self.row_pass.objective.divergence_temperature).float()
        inside, label_logits = self.logits[places, ids], self.logits[index, self.rows.labels[index]]
        self.logits[places, ids] = -torch.inf  # struck, so that the tail is the sum of the row
        tail = self._remaining_mass(index)
        log_q = torch.cat([inside - own.maximum[places] - own.log_mass[places], tail.log()], -1)
        q = torch.cat([log_q[:, :-1].exp(), tail], -1)
        value, slope = divergence_slope(divergence, closed_form(divergence), log_q, log_p, q, log_p.exp())
        if not self.wanted:
            return value
        slope = slope_against_tail(slope * on, q[:, :-1], tail)
        total = slope.sum(-1, keepdim=True)
        if self.label is not None:
            total += self.label[places]
        self._scale(index, -total)
        self.logits[places, ids] = self._before_cap(slope - q[:, :-1] * total, inside)
        if self.label is not None:
            self.logits[index, self.rows.labels[index]] += self._before_cap(self.label[index], label_logits)
        return value

    def _remaining_mass(self, index: Tensor) -> Tensor:
        """Σ q of some rows, [m, 1]."""
        known = self.student.statistics
        masses = torch.empty_like(known.maximum)
        with torch.cuda.device_of(self.logits):
            programs.remaining_mass[(len(index),)](
                self.logits, self.logits.stride(0), index, known.maximum, known.log_mass, masses, self.width,
                BLOCK=BLOCK, num_warps=_WARPS,
            )  # fmt: skip
        return masses[index][:, None]

    def _scale(self, index: Tensor, factor: Tensor) -> None:
        """Some rows become factor · q, times the slope of the cap; `factor`: [m, 1]."""
        known, (softcap, capped) = self.student.statistics, self._cap
        factors = torch.empty_like(known.maximum).index_copy_(0, index, factor[:, 0])
        with torch.cuda.device_of(self.logits):
            programs.scaled_probabilities[(len(index),)](
                self.logits, self.logits.stride(0), index, known.maximum, known.log_mass, factors, softcap, self.width,
                CAPPED=capped, BLOCK=BLOCK, num_warps=_WARPS,
            )  # fmt: skip

    def _before_cap(self, gradient: Tensor, logits: Tensor) -> Tensor:
        slope = self.row_pass.head.slope_of_cap(logits)
        return gradient if slope is None else gradient * slope


@dataclass(frozen=True)
class _Order:
    """Rows by what they learn: from the divergence, [t], and from the label alone, [l]; both ascending.

    `packed`: [t + l], which row lies where once those behind the first t + l, the `movers`, are in the `holes` between them.
    """

    taught: Tensor
    labelled: Tensor
    movers: Tensor
    holes: Tensor
    packed: Tensor

    @classmethod
    def of(cls, taught: Tensor, live: Tensor) -> "_Order":
        """[n] bool each; `taught` rows are `live`. The GPU is waited for once, for three numbers."""
        everything = torch.arange(len(live), device=live.device)
        several = live.sum()
        front = everything < several
        numbers = torch.stack([taught.sum(), several, (front & ~live).sum()]).tolist()
        by_kind = (2 - taught.to(torch.int8) - live.to(torch.int8)).argsort(stable=True)
        first, second = by_kind[: numbers[0]], by_kind[numbers[0] : numbers[1]]
        packed, moved = everything[: numbers[1]], everything[: numbers[2]]
        if len(moved):
            #  First of all holes in front, then what is where it may stay, then the movers: each kind ascending.
            places = (1 - (front & ~live).to(torch.int8) + (live & ~front).to(torch.int8)).argsort(stable=True)
            holes, movers = places[: len(moved)], places[len(live) - len(moved) :]
            return cls(first, second, movers, holes, packed.index_copy(0, holes, movers))
        return cls(first, second, moved, moved, packed)


def move_rows(data: Tensor, sources: Tensor, targets: Tensor, swap: bool = False) -> None:
    """Rows of `data`, [n, V], to the places of others, [h] int64 each, or both ways; no row is named twice."""
    if len(sources):
        with torch.cuda.device_of(data):
            programs.move_rows[(len(sources), -(-data.shape[1] // BLOCK))](
                data, data.stride(0), sources, targets, data.shape[1], SWAP=swap, BLOCK=BLOCK, num_warps=_WARPS
            )  # fmt: skip
