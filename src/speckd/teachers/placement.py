"""A teacher on a device of its own: which devices there are, and how its answers come to the student's."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from speckd.errors import CapabilityError, ConfigError
from speckd.head import LMHead


def existing_device(key: str, name: str) -> torch.device:
    """The device of that name ("cpu", "cuda", "cuda:1").

    Raises:
        ConfigError: under `key`, that it is no device's name, or that this machine has no such device.
    """
    there = _devices()
    fix = f"Here there is {', '.join(there)}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"{key}: '{name}' is no device", fix) from None
    if str(device) not in there and (device.index is not None or f"{device.type}:0" not in there):
        raise ConfigError(f"{key}: there is no device '{name}'", fix)
    return device


def _devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    return ["cpu", *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, without waiting for it; but a copy to the CPU that nobody waits for could be read too early."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def head_on(head: LMHead, device: torch.device) -> LMHead:
    """The head without gradient on a device: the same tensors where they are there, else a copy to be kept.

    Raises:
        CapabilityError: a device_map has put the head away, to a CPU's memory or a disk.
    """
    if head.weight.is_meta:
        raise CapabilityError(
            "teacher_model_init_kwargs: the device_map offloads the teacher's head, which is needed at every step",
            "Name a device for the head in the device_map",
        )
    head = head.detached()
    return replace(head, weight=head.weight.to(device), bias=None if head.bias is None else head.bias.to(device))


@dataclass(frozen=True)
class LaunchedStates:
    """A batch's hidden states that the teacher's device may still be computing; nothing has waited for them.

    `states`: [B·L, H], or [N, H] of the supervised positions alone, on the teacher's device; `index`: [N], these positions, on
    the student's device; `positions`: B·L.
    """

    states: Tensor
    index: Tensor
    positions: int

    @classmethod
    def of(cls, hidden: Tensor, index: Tensor) -> "LaunchedStates":
        """`hidden`: [B, L, H], on the teacher's device; `index`: [N] supervised positions, on the student's."""
        states = hidden.flatten(0, 1)
        return cls(states, index, len(states)) if states.device == index.device else cls.of_supervised(states, index)

    @classmethod
    def of_supervised(cls, states: Tensor, index: Tensor) -> "LaunchedStates":
        """Of [B·L, H] only what will be asked for, so that no more travels."""
        return cls(states[moved(index, states.device)], index, len(states))

    def arrived(self) -> Tensor:
        """[B·L, H] on the student's device; zeros at positions that are not supervised, where only the others travelled."""
        if len(self.states) == self.positions:
            return self.states
        own = moved(self.states, self.index.device)
        return own.new_zeros(self.positions, own.shape[-1]).index_copy(0, self.index, own)
