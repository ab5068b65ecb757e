"""What of a text may be shown: no secret, and nothing that is invisible or changes how the rest is read.

Escaping is the template's work; this comes before it, and goes for pictures, too.
"""

import math
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

#: Stands where a secret was.
HIDDEN = "[hidden]"
_SECRET_WORDS = re.compile(
    r"secret|passw(or)?d|passphrase|credential|authorization|cookie|bearer|"
    r"api_?key|access_?key|private_?key|auth_?key|signing_?key|_pat$",
    re.IGNORECASE,
)
_TOKEN_KEY = re.compile(r"(?:^|_)token$", re.IGNORECASE)
#: Tokens of a vocabulary, not of a door.
_SPECIAL_TOKENS = re.compile(
    r"(?:^|_)(bos|eos|cls|sep|pad|unk|mask|image|video|audio|boi|eoi|start|end|stop|special|decoder_start|per|each|a|the)_token$",
    re.IGNORECASE,
)
#: As their issuers write them.
_SECRET_SHAPES = (
    re.compile(r"\bhf_[A-Za-z0-9]{8,}"),
    re.compile(r"\b(?:sk|pk|rk)-[A-Za-z0-9_-]{12,}"),
    re.compile(r"\bgh[pousr]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w-]{12,}"),
    re.compile(r"\bxox[abprs]-[\w-]{10,}"),
    re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"(?<=\bBearer )[^\s\"',;]+|(?<=\bBasic )[A-Za-z0-9+/=]{8,}", re.IGNORECASE),
)
_USERINFO = re.compile(r"(?<=://)[^\s/?#@\"'<>]+@")
_QUERY = re.compile(r"(?<=[?&;])([\w.-]*(?:token|key|secret|password|signature|sig|auth)[\w.-]*=)[^\s&#\"'<>]+", re.IGNORECASE)
_ASSIGNED = re.compile(
    r"(\b[\w-]*(?:secret|password|passwd|api[_-]?key|access[_-]?key|private[_-]?key|_token)\"?'?\s*[=:]\s*[\"']?)([^\s\"',;&]{6,})",
    re.IGNORECASE,
)
_SHORTEST = 8


def is_secret_key(key: str) -> bool:
    """Does a setting of this name hold a secret? `hub_token` does, `eos_token` and `use_cls_token` do not."""
    name = re.sub(r"[-.\s]", "_", key)
    if _SECRET_WORDS.search(name):
        return True
    return bool(_TOKEN_KEY.search(name)) and not _SPECIAL_TOKENS.search(name)


def secrets_of(values: Any) -> set[str]:
    """The texts that stand in nested settings under a secret's name, long enough to be looked for elsewhere."""
    found: set[str] = set()
    if isinstance(values, Mapping):
        for key, value in values.items():
            found |= _texts(value) if is_secret_key(str(key)) else secrets_of(value)
    elif isinstance(values, (list, tuple)):
        found |= {text for value in values for text in secrets_of(value)}
    return {text for text in found if len(text) >= _SHORTEST}


def secrets_of_environment() -> set[str]:
    return {value for key, value in os.environ.items() if is_secret_key(key) and len(value) >= _SHORTEST}


def _texts(value: Any) -> set[str]:
    if isinstance(value, Mapping):
        return {text for one in value.values() for text in _texts(one)}
    if isinstance(value, (list, tuple)):
        return {text for one in value for text in _texts(one)}
    return {value} if isinstance(value, str) else set()


def without_secrets(values: Any) -> Any:
    """Nested settings, texts under a secret's name hidden: null, truth values and numbers reveal nothing and stay."""
    if isinstance(values, Mapping):
        return {
            key: HIDDEN if is_secret_key(str(key)) and _texts(value) - {""} else without_secrets(value)
            for key, value in values.items()
        }
    return [without_secrets(value) for value in values] if isinstance(values, (list, tuple)) else values


class Shown:
    """Cleans texts for one report.

    Args:
        secrets: literally to be hidden wherever they stand.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets = sorted(secrets, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        for shape in _SECRET_SHAPES:
            text = shape.sub(HIDDEN, text)
        text = _QUERY.sub(rf"\1{HIDDEN}", _USERINFO.sub(f"{HIDDEN}@", text))
        return visible(_ASSIGNED.sub(rf"\1{HIDDEN}", text))


def visible(text: str) -> str:
    """With a name in the place of what has no shape of its own: controls, marks of direction, halves of letters."""
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(letter: str) -> str:
    if letter in "\n\t " or (letter.isprintable() and letter != "\ufeff"):
        return letter
    if letter in "\u200c\u200d":  # joiners that scripts and emoji need
        return letter
    kind = unicodedata.category(letter)
    return letter if kind == "Zs" else f"‹{ord(letter):04X}›"


def number(value: float | None, digits: int = 4) -> str:
    """For people; a dash for what is not known or not finite."""
    if value is None or not math.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}".replace("-", "−")
    if abs(value) >= 10_000:
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:.{digits}g}".replace("-", "−")
