"""Who a teacher, a tokenizer and a vocabulary are, in a few hexadecimal digits: what is stored is compared by these."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_BLOCK = 2**24


def of_bytes(parts: Iterable[bytes]) -> str:
    """BLAKE2b-128, of each part and its length."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def of_model_folder(folder: Path) -> str:
    """Of configuration and weights, read through once: about a second a gigabyte. Names of the files count, places do not."""
    found = sorted({path for pattern in ("config.json", "adapter_config.json", *_WEIGHTS) for path in folder.glob(pattern)})
    digest = hashlib.blake2b(digest_size=16)
    for path in found:
        digest.update(f"{path.name}:{path.stat().st_size};".encode())
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def of_tokenizer(tokenizer: Any) -> str:
    """How it cuts text: vocabulary, merges, normalisation, added and special tokens; not how it pads and truncates."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    rules = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}
    whole = [rules, sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.all_special_ids))]
    return of_bytes([json.dumps(whole, sort_keys=True).encode()])


def of_text(text: str | None) -> str | None:
    return None if text is None else of_bytes([text.encode()])
