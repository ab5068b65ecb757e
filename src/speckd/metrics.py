"""What the gate did, in numbers that can be added up over chunks, steps and processes before they are divided."""

import torch
from torch import Tensor

from speckd.engine import LossOutput

#: Position of the token within its sample's supervised tokens: lower edges.
POSITION_EDGES = (0, 1, 4, 16, 64, 256)
#: The teacher's entropy in nats: lower edges.
ENTROPY_EDGES = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0)

STARVATION_REMEDIES = (
    "start from a student fine-tuned on the data (SFT); let rejected tokens learn from the label (rejected: label); "
    "or verify less strictly (gate: label_ratio, or a larger verify_top_k)"
)


def _range_names(prefix: str, edges: tuple[float, ...]) -> list[str]:
    tops = [f"to_{edge:g}" for edge in edges[1:]] + ["up"]
    return [f"{prefix}/{low:g}_{top}" for low, top in zip(edges, tops, strict=True)]


_POSITIONS = _range_names("tar_by_position", POSITION_EDGES)
_ENTROPIES = _range_names("tar_by_teacher_entropy", ENTROPY_EDGES)
_NAMES = [
    "tar",
    "tar_micro",
    "divergence",
    "divergence_accepted",
    "divergence_rejected",
    "loss_share/accepted",
    "loss_share/rejected",
    "loss_share/label_loss_weight",
    *_POSITIONS,
    *_ENTROPIES,
]


class AcceptanceTally:
    """Sums and counts over any number of batches.

    `tar`: the paper's token acceptance rate, the mean over sequences of the accepted fraction (macro); `tar_micro`: over
    tokens; for soft gates, the mean acceptance. `divergence`: nats per token over the tokens where it was computed (a masked
    token's is not), `_accepted` and `_rejected` weighted by acceptance and its complement. `loss_share/…`: what part of the
    summed loss came from accepted weight, from rejected weight (down-weighted or fallback), from `label_loss_weight`.
    `tar_by_teacher_entropy/…`: over the tokens whose entropy the engine measured, one in 32.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(len(_NAMES), 2, dtype=torch.float64)  # numerator, denominator

    def add(self, output: LossOutput) -> None:
        terms = output.terms
        acceptance = terms.acceptance.double()
        if not len(acceptance) or bool(acceptance.isnan().all()):
            return  # nothing supervised, or no gate (SFT)
        computed = terms.divergence.isfinite()  # infinite where a zero weight silenced it
        divergence = terms.divergence.double().where(computed, 0)
        rejection = (1 - acceptance) * computed
        diagnosed = ~output.teacher_entropy.isnan()
        found = [
            _per_sequence(acceptance, output.rows.keys.sample),
            (acceptance.sum(), acceptance.new_tensor(len(acceptance))),
            (divergence.sum(), computed.sum()),
            ((acceptance * divergence).sum(), (acceptance * computed).sum()),
            ((rejection * divergence).sum(), rejection.sum()),
            *[
                (p.double().sum(), terms.loss.double().sum())
                for p in (terms.accepted_loss, terms.rejected_loss, terms.label_loss)
            ],
            *_by_range(acceptance, _place_in_sequence(output), POSITION_EDGES),
            *_by_range(acceptance[diagnosed], output.teacher_entropy[diagnosed].double(), ENTROPY_EDGES),
        ]
        self.sums += torch.stack([torch.stack([n.double(), d.double()]) for n, d in found]).cpu()

    def merge(self, sums: Tensor) -> None:
        """Adds another tally's `sums`, for instance those of all processes."""
        self.sums += sums

    def result(self) -> dict[str, float]:
        """Every metric that has a denominator."""
        return {name: float(n / d) for name, (n, d) in zip(_NAMES, self.sums, strict=True) if d != 0}


def _per_sequence(values: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over sequences of the mean over their tokens, and the number of sequences."""
    _, place, size = sample.unique(return_inverse=True, return_counts=True)
    sums = values.new_zeros(len(size)).index_add(0, place, values)
    return (sums / size).sum(), size.new_tensor(len(size))


def _place_in_sequence(output: LossOutput) -> Tensor:
    """[N] how many supervised positions of the same sample lie before, from the first one's position."""
    keys = output.rows.keys
    _, place = keys.sample.unique(return_inverse=True)
    first = torch.full((int(place.max()) + 1,), torch.iinfo(torch.int64).max, device=place.device)
    return keys.position - first.scatter_reduce(0, place, keys.position, "amin")[place]


def _by_range(values: Tensor, by: Tensor, edges: tuple[float, ...]) -> list[tuple[Tensor, Tensor]]:
    place = torch.bucketize(by, by.new_tensor(edges), right=True) - 1
    return [(values[place == i].sum(), (place == i).sum()) for i in range(len(edges))]


class StarvationWatch:
    """Says so, once, when the gate has left the student next to nothing to learn from for many steps in a row."""

    def __init__(self, threshold: float = 0.1, patience: int = 50) -> None:
        self.threshold, self.patience, self.low_steps, self.said = threshold, patience, 0, False

    def update(self, acceptance_rate: float, steps: int = 1) -> str | None:
        """Returns the warning, the first time that the rate has stayed below the threshold for `patience` steps."""
        self.low_steps = self.low_steps + steps if acceptance_rate < self.threshold else 0
        if self.said or self.low_steps < self.patience:
            return None
        self.said = True
        return (
            f"STARVATION: the token acceptance rate has been below {self.threshold:.0%} for {self.low_steps} steps, so hardly "
            f"any token teaches. Remedies: {STARVATION_REMEDIES}."
        )
