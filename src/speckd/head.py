"""LMHead: hidden states to logits. The only place that knows vocabularies' paddings, biases, scales and soft caps."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from speckd.errors import CapabilityError, NonFiniteError

_SLAB_BYTES = 3 * 2**19  # of weights, to stay in a core's cache
_SLAB_BYTES_ELSEWHERE = 2**28  # a GPU is rather called once

#: Fewer rows are added up entry by entry over the whole vocabulary, at 1e-5 of error in float32; by slabs they are not.
_ENOUGH_ROWS = 16


@dataclass(frozen=True)
class LMHead:
    """`softcap·tanh(scale·(hidden Wᵀ + bias)/softcap)`, or without the cap where it is None.

    `weight`: [V, H]; `bias`: [V] or None. The product is in float32 (float64 stays) whatever the inputs' dtype, also under
    autocast: logits rounded to bfloat16 would drown the gradient p − q of a student that is near its teacher.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V], differentiable."""
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, self.weight.dtype), torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = torch.nn.functional.linear(hidden.to(dtype), self.weight.to(dtype), bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @torch.no_grad()
    def write(self, hidden: Tensor, out: Tensor) -> None:
        """The same without gradient, into `out`, [n, V] in float32 or float64.

        By slabs of the vocabulary: on a CPU, weights that fit the cache are 5 to 20 % faster than one product, and 16-bit
        weights are widened where they are used. On a GPU 16-bit products are accumulated and written in float32.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            for slab in self._slabs(hidden):
                a, b = _factors(hidden, self.weight[slab], out.dtype)
                if a.dtype == out.dtype:
                    torch.mm(a, b.T, out=out[:, slab])
                else:
                    torch.mm(a, b.T, out_dtype=out.dtype, out=out[:, slab])
            if self.bias is not None:
                out += self.bias.to(out.dtype)
        if self.scale != 1.0:
            out *= self.scale
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)

    @torch.no_grad()
    def back(self, gradients: Tensor, dtype: torch.dtype) -> Tensor:
        """[n, V] gradients for the product -> [n, H] gradients for the hidden states, accumulated in `dtype`."""
        if gradients.dtype == self.weight.dtype == dtype and len(gradients) >= _ENOUGH_ROWS:
            return torch.mm(gradients, self.weight).mul_(self.scale)
        found = torch.zeros(len(gradients), self.weight.shape[1], dtype=dtype, device=gradients.device)
        for slab in self._slabs(gradients):
            a, b = _factors(gradients[:, slab], self.weight[slab], dtype)
            found += torch.mm(a, b) if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype)
        return found.mul_(self.scale)

    def _slabs(self, other: Tensor) -> Iterator[slice]:
        """Of the vocabulary, for products with `other`."""
        rows, width = self.weight.shape
        if other.device.type == "cpu":
            step = min(4096, max(256, _SLAB_BYTES // (width * max(4, self.weight.element_size()))))
        else:
            step = rows if other.dtype == self.weight.dtype else max(256, 64 * _SLAB_BYTES // (4 * width))
        return (slice(start, min(rows, start + step)) for start in range(0, rows, step))

    @torch.no_grad()
    def at(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """[n, H], [n, C] token ids -> [n, C]: the logits of a few tokens of each row, in at least float32."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        slab = _SLAB_BYTES if hidden.device.type == "cpu" else _SLAB_BYTES_ELSEWHERE
        rows = max(1, slab // max(1, token_ids.shape[-1] * self.weight.shape[1] * self.weight.element_size()))
        parts = [
            _dot(self.weight.index_select(0, ids.flatten()).view(*ids.shape, -1), some, dtype)
            for some, ids in zip(hidden.split(rows), token_ids.split(rows), strict=True)
        ]
        logits = torch.cat(parts) if parts else hidden.new_zeros(token_ids.shape, dtype=dtype)
        if self.bias is not None:
            logits += self.bias[token_ids].to(dtype)
        logits *= self.scale
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope_of_cap(self, logits: Tensor) -> Tensor | None:
        """d logits / d(scaled product), [n, V], from the logits; None where there is no cap and it is 1."""
        return None if self.softcap is None else 1 - (logits / self.softcap).square_()

    def restricted(self, token_ids: Tensor | int) -> "LMHead":
        """Only the first n tokens (a view), or only the given ids (a copy), of the vocabulary."""
        if isinstance(token_ids, int) and token_ids == self.weight.shape[0]:
            return self
        keep = slice(token_ids) if isinstance(token_ids, int) else token_ids.to(self.weight.device)
        return replace(self, weight=self.weight[keep], bias=None if self.bias is None else self.bias[keep])

    def detached(self) -> "LMHead":
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias)

    @classmethod
    def from_model(cls, model: Any) -> "LMHead":
        """Reads the head of a Transformers causal language model, LoRA on the head included.

        Gradients flow to the model's own parameters. Call `check_head` once after loading: it proves the reading.
        """
        config = model.config.get_text_config()
        weight, bias = _weight_and_bias(model.get_output_embeddings())
        scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
        return cls(weight, bias, scale, getattr(config, "final_logit_softcapping", None))  # Gemma


def _factors(a: Tensor, b: Tensor, wanted: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two factors in one precision: as they are where a GPU multiplies both in 16 bits, else in `wanted`."""
    if a.device.type == "cuda" and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16):
        return a, b
    return a.to(wanted), b.to(wanted)


def _dot(rows: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, C, H] · [n, H] -> [n, C]; `rows` may be used up."""
    if rows.device.type == "cuda" and rows.dtype == hidden.dtype != dtype:
        return torch.bmm(rows, hidden[..., None], out_dtype=dtype)[..., 0]
    return rows.to(dtype).mul_(hidden.to(dtype)[:, None]).sum(-1)


def add_product(total: Tensor, a: Tensor, b: Tensor, factor: float, overwrite: bool = False) -> None:
    """total += factor · a b, or = where `overwrite`; 16-bit factors are accumulated in the total's precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=0 if overwrite else 1, alpha=factor)
    else:
        torch.addmm(total, a, b, beta=0 if overwrite else 1, alpha=factor, out_dtype=total.dtype, out=total)


def _weight_and_bias(layer: Any) -> tuple[Tensor, Tensor | None]:
    """A linear layer's parameters, through PEFT's wrappers: a trained copy, or a base weight plus its low-rank update."""
    if hasattr(layer, "modules_to_save"):
        layer = layer.original_module if layer.disable_adapters else layer.modules_to_save[layer.active_adapters[0]]
    if not hasattr(layer, "get_base_layer"):
        return layer.weight, layer.bias
    base = layer.get_base_layer()
    weight = base.weight
    for adapter in () if layer.disable_adapters else layer.active_adapters:
        if layer.lora_magnitude_vector or layer.lora_dropout[adapter].__class__ is not torch.nn.Identity:
            raise CapabilityError(
                f"the adapter '{adapter}' on the head has DoRA or dropout, which a product with one weight cannot express",
                "Leave the head out of the adapter's target modules, or train it without either",
            )
        weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
    return weight, base.bias


@torch.no_grad()
def check_head(model: Any, name: str) -> None:
    """Refuses a model whose logits are not what `LMHead` computes, or that are not finite. One forward of three tokens.

    Args:
        model: a Transformers causal language model, eval or train mode (restored).
        name: what to call it in the error ("student", "teacher").
    """
    was_training = model.training
    model.eval()
    ids = torch.arange(1, 4, device=model.get_output_embeddings().weight.device)[None]
    expected = model(input_ids=ids, use_cache=False).logits[0].float()
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    found = LMHead.from_model(model)(hidden)
    model.train(was_training)
    if not torch.isfinite(expected).all():
        raise NonFiniteError(
            f"the {name}'s logits are NaN or infinite on a plain three-token input",
            f"Check the {name}'s weights, or load it in float32 or bfloat16 instead of float16",
        )
    tolerance = 1e-2 if hidden.dtype in (torch.bfloat16, torch.float16) else 1e-4
    if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
        raise CapabilityError(
            f"the {name} ({type(model).__name__}) turns hidden states into logits in a way that speckd does not know",
            "Please report the model's name: head.py is the one place to teach it",
        )
