"""The student's text by servers in training, on several processes: one synchronises the weights, all write."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from speckd.errors import SpeckdError, TeacherLostError
from speckd.sources.server_writer import ServerWriter
from speckd.sources.weight_sync import BoundedSync
from speckd.sources.writer import Completion, Draws, Prompt, Sampling


@dataclass(frozen=True)
class State:
    """What the process that synchronises tells the others: the served model, of which step it is, or what went wrong."""

    model: str | None = None
    step: int | None = None
    lost: tuple[type[SpeckdError], str, str] | None = None


class ServedStudent:
    """A `Writer` whose weights are kept by its own `WeightSync`.

    What servers refuse before they have ever written ends the run as a mistake of the settings; whatever fails later as servers
    that are lost, for what was learnt until then is to be kept.

    Args:
        writer: of this process; it is not probed yet.
        weights: those of its servers, on the process that synchronises; None on the others.
        longest: tokens of prompt and completion together.
        tell: what the process that synchronises says -> the same, on all processes, which all call it.
    """

    def __init__(self, writer: ServerWriter, weights: BoundedSync | None, longest: int, tell: Callable[[State], State]) -> None:
        self._writer, self._weights, self._longest, self._tell = writer, weights, longest, tell
        self._state = State()

    @property
    def weights_step(self) -> int | None:
        return self._state.step

    def sync(self, step: int) -> None:
        """As of `WeightSync`; called by all processes together, which fail alike.

        Raises:
            SpeckdError: servers that cannot do what is needed; `TeacherLostError` once they have been synchronised.
        """
        state = self._tell(State() if self._weights is None else self._synchronised(self._weights, step))
        if state.lost is not None:
            kind, what, fix = state.lost
            raise (kind if self._state.step is None else TeacherLostError)(f"student_server_urls: {what}", fix)
        self._state, self._writer.model = state, state.model

    def _synchronised(self, weights: BoundedSync, step: int) -> State:
        try:
            if self._state.step is None:
                self._writer.probe(self._longest)
            weights.sync(step)
        except SpeckdError as error:
            return State(lost=(type(error), error.what, error.fix))
        return State(self._writer.model, weights.weights_step)

    def write(self, prompts: Sequence[Prompt], sampling: Sampling, draws: Draws) -> list[Completion]:
        """As of `ServerWriter`, with the weights of `weights_step`.

        Raises:
            TeacherLostError: no server writes what can be trained on.
        """
        try:
            return self._writer.write(prompts, sampling, draws)
        except SpeckdError as error:
            raise TeacherLostError(f"student_server_urls: {error.what}", error.fix) from error

    def close(self) -> None:
        if self._weights is not None:
            self._weights.close()
        self._writer.close()
