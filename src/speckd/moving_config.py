"""Settings to movers: which numbers of the method move, and by what."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from speckd.config import MethodConfig, Options, mapping, nearest, require_options
from speckd.errors import ConfigError
from speckd.gates import AnyGate
from speckd.movers import HoldTAR, Schedule, TAIDPace
from speckd.moving import Moved, Mover, MovingObjective
from speckd.objective import Objective
from speckd.own_parts import example_for
from speckd.types import BatchGate

_SCHEDULE: Mapping[str, Any] = {"from": float, "to": float, "steps": int, "shape": str}
_HOLD_TAR: Mapping[str, Any] = {"option": str, "tar_target": float, "min": float, "max": float, "gain": float}
_TAID: Mapping[str, Any] = {"option": str, "to": float, "steps": int, "alpha": float, "beta": float}
#: Of the objective itself.
_OWN_NUMBERS = ("label_loss_weight", "divergence_temperature")


@dataclass
class MovingConfig(MethodConfig):
    """The method's settings and what of them moves as a run goes on.

    A schedule is `{option: {from: 20, to: 5, steps: 500, shape: linear}}`; `from` is the option's own value and `steps` the
    whole run where they are left out. `gate_controller: {option: verify_top_k, tar_target: 0.8}` holds the token acceptance
    rate, `divergence_controller: {option: t}` is TAID's.
    """

    MOVING_KEYS: ClassVar[tuple[str, ...]] = (
        "gate_schedule",
        "rejected_schedule",
        "divergence_schedule",
        "objective_schedule",
        "gate_controller",
        "divergence_controller",
    )

    gate_schedule: Options | None = field(
        default=None, metadata={"help": "options of the gate that move: {verify_top_k: {from: 20, to: 5, steps: 500}}"}
    )
    rejected_schedule: Options | None = field(default=None, metadata={"help": "options of the policy that move, likewise"})
    divergence_schedule: Options | None = field(default=None, metadata={"help": "options of the divergence, likewise"})
    objective_schedule: Options | None = field(
        default=None, metadata={"help": "label_loss_weight or divergence_temperature, likewise"}
    )
    gate_controller: Options | None = field(
        default=None,
        metadata={"help": "hold the acceptance rate: {option: verify_top_k, tar_target: 0.8, min: 1, max: 50, gain: 0.5}"},
    )
    divergence_controller: Options | None = field(
        default=None, metadata={"help": "TAID's adaptive t: {option: t, to: 1, steps: 500, alpha: 5e-4, beta: 0.99}"}
    )

    def moving_objective(self) -> MovingObjective:
        """The objective and what of it moves.

        Raises:
            ConfigError: naming the setting.
        """
        start = self.objective()
        moved = tuple(self._moved(start))
        names = [each.name for each in moved]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"{name} is moved twice", "Remove its schedule or its controller")
        return MovingObjective(start, moved)

    def _moved(self, start: Objective) -> Iterator[Moved]:
        for part in ("gate", "rejected", "divergence", None):
            key = f"{part or 'objective'}_schedule"
            for option, given in mapping(key, getattr(self, key)).items():
                with _named(f"{key}: {option}"):
                    yield _checked(_scheduled(part, option, given, start), start)
        held = mapping("gate_controller", self.gate_controller)
        if held:
            with _named("gate_controller"):
                yield _checked(_holding(held, start), start)
        paced = mapping("divergence_controller", self.divergence_controller)
        if paced:
            with _named("divergence_controller"):
                yield _checked(_paced(paced, start), start)


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Says in which setting it is what a part refuses."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.what}", error.fix) from None


def _checked(moved: Moved, start: Objective) -> Moved:
    for end in moved.mover.ends():
        moved.write(start, end)
    return moved


def _scheduled(part: str | None, option: str, given: Any, start: Objective) -> Moved:
    if part is None and option not in _OWN_NUMBERS:
        raise ConfigError(f"'{option}' cannot be moved", nearest(option, list(_OWN_NUMBERS)))
    if not isinstance(given, dict) or "to" not in given:
        raise ConfigError(f"{given!r} is no schedule", "Write {from: 20, to: 5, steps: 500}")
    require_options("schedule", "a schedule", _SCHEDULE, given)
    first = given.get("from", _now(part, option, start))
    return Moved(part, option, Schedule(first, given["to"], given.get("steps"), given.get("shape", "linear")))


def _now(part: str | None, option: str, start: Objective) -> float:
    """An option's own value; refused where it is none, or no number."""
    probe = Moved(part, option, Schedule(0.0, 0.0))
    now = probe.read(start)
    probe.write(start, now)
    return now


def _option(given: dict[str, Any], kinds: Mapping[str, Any], example: str) -> str:
    require_options("controller", "a controller", kinds, given)
    if "option" not in given:
        raise ConfigError("it names no option to move", f"Write {example}")
    return given["option"]


def _holding(given: dict[str, Any], start: Objective) -> Moved:
    option = _option(given, _HOLD_TAR, "{option: verify_top_k, tar_target: 0.8}")
    if "tar_target" not in given:
        raise ConfigError("it has no tar_target", "Give the acceptance rate that is to be held, such as tar_target: 0.8")
    now = _now("gate", option, start)
    whole = isinstance(now, int)
    lowest, highest = given.get("min", 1 if whole else 1e-3), given.get("max", 32 if whole else 1.0)
    mover = HoldTAR(now, given["tar_target"], lowest, highest, True, given.get("gain", 0.5))
    return Moved("gate", option, _turned(mover, option, start))


def _turned(mover: HoldTAR, option: str, start: Objective) -> Mover:
    """In the direction in which the gate accepts more, as it judges an example."""
    moved = Moved("gate", option, mover)
    low, high = (_example_rate(moved.write(start, end).gate) for end in mover.ends())
    if low == high:
        raise ConfigError(
            f"between {mover.lowest:g} and {mover.highest:g}, '{option}' changes no verdict of an example",
            "Name the option that decides how much is accepted, or set min and max further apart",
        )
    return HoldTAR(mover.start, mover.tar_target, mover.lowest, mover.highest, high > low, mover.gain)


def _example_rate(gate: AnyGate) -> float:
    rows = example_for(gate)
    accepted = gate.select(gate.score(rows), rows.keys) if isinstance(gate, BatchGate) else gate(rows)
    return float(accepted.double().mean())


def _paced(given: dict[str, Any], start: Objective) -> Moved:
    option = _option(given, _TAID, "{option: t, to: 1}")
    names = {"to": "end", "steps": "steps", "alpha": "alpha", "beta": "beta"}
    more = {names[key]: value for key, value in given.items() if key in names}
    return Moved("divergence", option, TAIDPace(_now("divergence", option, start), **more))
