"""What was written, in numbers that add up; and the alarm when it is no longer text to learn from."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from speckd.errors import CollapseError
from speckd.sources.writer import Completion

#: A completion repeats itself when fewer than this share of its n-grams are distinct; of fewer n-grams than the last nothing is
#: said.
_NGRAM, _DISTINCT, _FEWEST = 4, 0.5, 8
#: A mean length below this share of the run's first is a collapse.
_SHRUNK = 0.1
_NAMES = ("completions", "tokens", "truncated", "empty", "repeated", "replaced")
#: How many numbers `counts` gives.
COUNTS = len(_NAMES)


def repeats(token_ids: Tensor) -> bool:
    """[n] int64: are less than half of the 4-grams distinct? False below 11 tokens, where nothing can be said."""
    if len(token_ids) < _NGRAM + _FEWEST - 1:
        return False
    grams = token_ids.unfold(0, _NGRAM, 1)
    return len(grams.unique(dim=0)) < _DISTINCT * len(grams)


def counts(completions: Sequence[Completion]) -> Tensor:
    """[6] float64: completions, their tokens, and how many are truncated, empty (a stop token at most), repeat themselves; and
    tokens that a verifier replaced."""
    found = torch.zeros(COUNTS, dtype=torch.float64)
    for each in completions:
        length = len(each.token_ids)
        replaced = 0 if each.replaced is None else int(each.replaced.sum())
        empty = length <= int(each.finished)
        found += torch.tensor([1, length, not each.finished, empty, repeats(each.token_ids), replaced], dtype=torch.float64)
    return found


def described(found: Tensor) -> dict[str, float]:
    """The metrics of [6] added-up counts; none where nothing was written."""
    number, tokens, truncated, empty, repeated, replaced = found.tolist()
    if not number:
        return {}
    metrics = {
        "completions/mean_length": tokens / number,
        "completions/truncated_fraction": truncated / number,
        "completions/empty_fraction": empty / number,
        "completions/repeated_fraction": repeated / number,
    }
    return metrics | ({"completions/replaced_fraction": replaced / tokens} if replaced else {})


class CollapseWatch:
    """Looks at the last `patience` steps together, and raises where their completions are no text to learn from any more.

    That is: at least a share of `threshold` repeats itself or is empty; or is truncated, or the mean length is below a tenth,
    where the run's first steps were not so: short limits and short answers are the user's own. With `patience` 0, never.
    """

    def __init__(self, threshold: float = 0.9, patience: int = 50) -> None:
        self.threshold, self.patience = threshold, patience
        self._window: deque[Tensor] = deque(maxlen=patience)
        self._first: Tensor | None = None  # the first whole window, summed

    def judge(self, step: Tensor) -> None:
        """Of a coming step's counts, [6], of all processes; it is not remembered before `remember`.

        Raises:
            CollapseError: the same on every process.
        """
        if not self.patience or len(self._window) + 1 < self.patience:
            return
        window = torch.stack([*list(self._window)[-self.patience + 1 :], step] if self.patience > 1 else [step]).sum(0)
        first = window if self._first is None else self._first
        reason = self._reason(described(window), described(first))
        if reason is not None:
            self._window.clear()  # a run that goes on from here is given its patience again
            raise CollapseError(
                f"COLLAPSE: in the last {self.patience} steps {reason}",
                "Go on from an earlier checkpoint, or anew, with a lower learning rate, a smaller on_policy_fraction, a "
                "student fine-tuned on the data, or a lower sampling_temperature; log_completions: true shows what is written; "
                "collapse_patience: 0 switches this off",
            )

    def remember(self, step: Tensor) -> None:
        """A step that was trained on; one in which nothing was written says nothing."""
        if not self.patience or not step[0]:
            return
        self._window.append(step)
        if self._first is None and len(self._window) == self.patience:
            self._first = torch.stack(list(self._window)).sum(0)

    def _reason(self, now: Mapping[str, float], first: Mapping[str, float]) -> str | None:
        for name, said in (("repeated", "repeat themselves"), ("empty", "are empty")):
            if (share := now.get(f"completions/{name}_fraction", 0.0)) >= self.threshold:
                return f"{share:.0%} of the completions {said}"
        share, before = (found.get("completions/truncated_fraction", 0.0) for found in (now, first))
        if share >= self.threshold > before:
            return f"{share:.0%} of the completions were cut off at their limit, of the first ones {before:.0%}"
        length, before = (found.get("completions/mean_length", 0.0) for found in (now, first))
        if length < _SHRUNK * before:
            return f"the completions have {length:.1f} tokens, of the first ones they had {before:.1f}"
        return None

    def state(self) -> dict[str, Any]:
        first = None if self._first is None else self._first.tolist()
        return {"window": [step.tolist() for step in self._window], "first": first}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._window.clear()
        self._window.extend(torch.tensor(step, dtype=torch.float64) for step in state["window"])
        self._first = None if state["first"] is None else torch.tensor(state["first"], dtype=torch.float64)
