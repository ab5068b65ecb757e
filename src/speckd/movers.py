"""What moves a number of the objective: a schedule, a controller that holds the acceptance rate, TAID's own pace."""

import math
from dataclasses import dataclass

from speckd.errors import ConfigError
from speckd.moving import Clock, Memory, Seen

SHAPES = ("linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """From `start` to `end` in `steps` optimizer steps (None: the whole run), then constant.

    `shape`: linear, or cosine: half a wave, which leaves and arrives slowly.
    """

    start: float
    end: float
    steps: int | None = None
    shape: str = "linear"

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps is {self.steps}", "Give at least 1, or leave it out for the whole run")
        if self.shape not in SHAPES:
            raise ConfigError(f"shape is '{self.shape}'", f"Use {' or '.join(SHAPES)}")

    def value(self, clock: Clock, memory: Memory) -> float:
        steps = self.steps or clock.total
        done = min(1.0, clock.step / steps) if steps else 0.0
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done

    def remember(self, clock: Clock, memory: Memory, seen: Seen) -> Memory:
        return {}

    def ends(self) -> tuple[float, float]:
        return self.start, self.end

    @property
    def notation(self) -> str:
        return f"{self.start:g} → {self.end:g} over {self.steps or 'all'} steps, {self.shape}"


@dataclass(frozen=True)
class HoldTAR:
    """Integral control of TAR on a logarithmic scale: x ← clip(x·exp(±gain·(tar_target − TAR)), lowest, highest) a step. Ours.

    `raises_tar`: whether a larger value accepts more. The real number is remembered where a whole one is used, so that k
    alternates between two neighbours where neither meets the target.
    """

    start: float
    tar_target: float
    lowest: float
    highest: float
    raises_tar: bool
    gain: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.tar_target < 1:
            raise ConfigError(f"tar_target is {self.tar_target}", "Give an acceptance rate between 0 and 1, such as 0.8")
        if not self.gain > 0:
            raise ConfigError(f"gain is {self.gain}", "Give a gain above 0, such as 0.5")
        if not 0 < self.lowest <= self.start <= self.highest:
            raise ConfigError(
                f"min {self.lowest:g}, the start {self.start:g} and max {self.highest:g} are not in order",
                "Give 0 < min ≤ the option's own value ≤ max",
            )

    def value(self, clock: Clock, memory: Memory) -> float:
        return memory.get("value", self.start)

    def remember(self, clock: Clock, memory: Memory, seen: Seen) -> Memory:
        now = self.value(clock, memory)
        if seen.tar is None:
            return {"value": now}
        push = self.gain * (self.tar_target - seen.tar)
        return {"value": min(self.highest, max(self.lowest, now * math.exp(push if self.raises_tar else -push)))}

    def ends(self) -> tuple[float, float]:
        return self.lowest, self.highest

    @property
    def notation(self) -> str:
        return f"from {self.start:g}, between {self.lowest:g} and {self.highest:g}, so that TAR is {self.tar_target:g}"


@dataclass(frozen=True)
class TAIDPace:
    """TAID's adaptive t (2501.16937): never behind a linear schedule, and ahead of it where the loss falls.

        δ = (L' − L)/(L' + ε),  m ← βm + (1 − β)δ,  t ← min(end, max(linear, t + α·σ(m)·(1 − t)))

    L' is the loss before. As public re-implementations, which agree, have it; the paper's own text was not available to us.
    """

    start: float
    end: float = 1.0
    steps: int | None = None
    alpha: float = 5e-4
    beta: float = 0.99

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", f"Use {name} between 0 and 1")
        if not self.start <= self.end:
            raise ConfigError(f"t starts at {self.start:g} and is to go to {self.end:g}", "Give an end above the start")

    def value(self, clock: Clock, memory: Memory) -> float:
        linear = Schedule(self.start, self.end, self.steps).value(clock, {})
        return min(self.end, max(linear, memory.get("value", self.start)))

    def remember(self, clock: Clock, memory: Memory, seen: Seen) -> Memory:
        now, before = self.value(clock, memory), memory.get("loss")
        if before is None:
            return {"value": now, "momentum": 0.0, "loss": seen.loss}
        momentum = self.beta * memory["momentum"] + (1 - self.beta) * (before - seen.loss) / (before + 1e-15)
        ahead = now + self.alpha / (1 + math.exp(-min(max(momentum, -700.0), 700.0))) * (1 - now)
        return {"value": min(self.end, ahead), "momentum": momentum, "loss": seen.loss}

    def ends(self) -> tuple[float, float]:
        return self.start, self.end

    @property
    def notation(self) -> str:
        return f"{self.start:g} → {self.end:g} over {self.steps or 'all'} steps or faster, at TAID's pace"
