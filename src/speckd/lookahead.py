"""Which batches come next, told to a teacher that has to be asked ahead. It changes no batch, no order and no random state."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any


class Lookahead:
    """Follows the batches of one process, and tells of those that it will see soon.

    Args:
        dataset: prepared rows; `column` holds the ids of a row's samples, of which the first tells rows apart.
        batch_size: rows a batch.
        depth: batches ahead.
        process, processes: batches go round the processes.
        tell: gets the rows of a coming batch; each batch is told once.
        forget: called as an epoch begins: nothing that was told before is still to come.
    """

    def __init__(
        self,
        dataset: Any,
        column: str,
        batch_size: int,
        depth: int,
        process: int,
        processes: int,
        tell: Callable[[list[Any]], None],
        forget: Callable[[], None],
    ) -> None:
        self._dataset, self._column, self._size, self._depth = dataset, column, batch_size, depth
        self._process, self._processes, self._tell, self._forget = process, processes, tell, forget
        self._row_of = {row[column][0]: number for number, row in enumerate(dataset.select_columns([column]))}
        self._order: list[int] = []
        self._place_of: dict[int, int] = {}
        self._told: set[int] = set()

    def begin(self, order: list[int]) -> None:
        """A new epoch's order of the rows."""
        self._forget()
        self._order, self._told = order, set()
        self._place_of = {row: place for place, row in enumerate(order)}

    def collated(self, examples: Sequence[Any]) -> None:
        """A batch of these rows is made: the next ones are told."""
        place = self._place_of.get(self._row_of[examples[0][self._column][0]])
        if place is None:
            return
        own = place // self._size
        if own % self._processes != self._process:
            return  # another process's batch, with which this one's epoch is filled up
        for number in range(own + self._processes, own + (self._depth + 1) * self._processes, self._processes):
            rows = self._order[number * self._size : (number + 1) * self._size]
            if rows and number not in self._told:
                self._told.add(number)
                self._tell([self._dataset[row] for row in rows])


class Announced:
    """A collator that says which rows it has made a batch of."""

    def __init__(self, collate: Callable[[list[Any]], Any], said: Callable[[list[Any]], None]) -> None:
        self._collate, self._said = collate, said

    def __call__(self, examples: list[Any]) -> Any:
        batch = self._collate(examples)
        self._said(examples)
        return batch


class Remembered:
    """A sampler whose order is told at the beginning of each epoch."""

    def __init__(self, sampler: Any, begin: Callable[[list[int]], None]) -> None:
        self.sampler, self.begin = sampler, begin

    def __iter__(self) -> Iterator[int]:
        order = list(self.sampler)
        self.begin(order)
        return iter(order)

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)  # such as set_epoch, which Accelerate asks for
