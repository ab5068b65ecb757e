"""A teacher that no device holds alone: its layers are cut over all processes, and each is put together while it computes.

The head stays whole on every process, for the loss needs it at every step; with it, embeddings that are tied to it (FSDP2).
Every process must ask the teacher as often as the others, since each answer is made by all of them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from speckd.errors import CapabilityError

#: How the layers may be cut.
SHARDINGS = ("none", "fsdp2", "zero3")


@dataclass(frozen=True)
class ShardedModel:
    """`engine`: what must live as long as the model does, or None; `whole`, `here`: bytes of all parameters, and of those that
    this process holds."""

    engine: Any
    processes: int
    whole: int
    here: int

    def __str__(self) -> str:
        mib = 2**20
        return (
            f"cut over {self.processes} processes: {self.here / mib:,.1f} of {self.whole / mib:,.1f} MiB on each, head included"
        )


def shard(model: Any, how: str, device: torch.device) -> ShardedModel:
    """Cuts a frozen model's decoder over all processes of the default group, in place; what stays whole goes to the device.

    Args:
        model: a Transformers causal language model, on the CPU or the device.
        how: "fsdp2" or "zero3".
        device: this process's.

    Raises:
        CapabilityError: the model's layers are not to be found, or its weights are not plain tensors.
    """
    parameters = list(model.parameters())
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "hf_device_map", None):
        raise CapabilityError(
            "teacher_sharding: a quantised teacher, or one with a device_map, is not cut over processes", "Use one of them"
        )
    processes, whole = torch.distributed.get_world_size(), sum(map(_bytes, parameters))
    engine = None
    if how == "zero3":
        engine = _by_zero3(model, device)
    else:
        _by_fsdp2(model, device, processes)
    return ShardedModel(engine, processes, whole, sum(map(bytes_here, {id(p): p for p in model.parameters()}.values())))


def size(parameter: Tensor) -> int:
    """How many numbers a parameter has on all processes together."""
    return getattr(parameter, "ds_numel", parameter.numel())


def bytes_here(parameter: Tensor) -> int:
    """Of a parameter, what this process holds."""
    if isinstance(parameter, DTensor):
        return _bytes(parameter.to_local())
    return _bytes(getattr(parameter, "ds_tensor", parameter))  # DeepSpeed's piece


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _by_fsdp2(model: Any, device: torch.device, processes: int) -> None:
    decoder, mesh = model.get_decoder(), init_device_mesh(device.type, (processes,))
    layers = [layer for child in decoder.children() if isinstance(child, torch.nn.ModuleList) for layer in child]
    if not layers:
        raise CapabilityError(
            f"teacher_sharding: no list of layers was found in {type(decoder).__name__}", "Use teacher_device or a device_map"
        )
    head = model.get_output_embeddings().to(device)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(decoder, mesh=mesh, reshard_after_forward=True, ignored_params=set(head.parameters()))


def _by_zero3(model: Any, device: torch.device) -> Any:
    try:
        import deepspeed
    except ImportError:
        raise CapabilityError("teacher_sharding: zero3 needs DeepSpeed", "pip install deepspeed, or use fsdp2") from None
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:  # it would be cut with the embeddings
        head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
    head.to(device)
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # asked for, and of no use where nothing is trained
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": model.dtype == torch.bfloat16},
        "fp16": {"enabled": model.dtype == torch.float16},
    }
    return deepspeed.initialize(model=model.get_decoder(), config=settings)[0]
