"""A gate, a policy or a divergence of the user's own: `my_gates.py:MyGate` or `package.module:name`, tried on an example.

A class is made with the options as its arguments; a function, or an object that is made already, is taken as it is.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from speckd.errors import ConfigError, SpeckdError
from speckd.policies import FallbackRows
from speckd.types import BatchDivergence, BatchGate, DenseSignal, Rows, TokenKeys, at_labels, needs_reference


def build(key: str, name: str, options: Mapping[str, Any]) -> Any:
    """The part of that name, tried on an example.

    Args:
        key: the setting that names it, such as gate, rejected, divergence or student_text_divergence.
        name: file or module, a colon, and what stands in it.
        options: its arguments.

    Raises:
        ConfigError: no such file, module or name; options it does not take; not such a part.
    """
    part = _made(key, name, named(key, name), options)
    _TRIALS[key](key, name, part)
    return part


def file_of(key: str, name: str) -> Path | None:
    """Where the part of that name is written down; None of what is no file, such as a module in C.

    Raises:
        ConfigError: no such file or module.
    """
    written = getattr(_module(key, name, name.rpartition(":")[0]), "__file__", None)
    return None if written is None else Path(written)


def named(key: str, name: str) -> Any:
    """What stands in a file or module under that name.

    Raises:
        ConfigError: no such file, module or name.
    """
    where, _, attribute = name.rpartition(":")
    module = _module(key, name, where)
    found = getattr(module, attribute, None)
    if found is None:
        raise ConfigError(f"{key}: there is no '{attribute}' in {where}", f"Define it there, or write {key}: FILE.py:NAME")
    return found


def _module(key: str, name: str, where: str) -> ModuleType:
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        path = Path(where).expanduser().resolve()
        if not path.is_file():
            raise ConfigError(f"{key}: there is no file {where}", "Check the path, which is taken from where speckd is started")
        return _module_of(path)
    except SpeckdError:
        raise
    except Exception as error:  # whatever the user's own code raises
        raise ConfigError(f"{key}: {where} cannot be imported ({said(error)})", f"Correct it, or the name {name}") from error


@cache
def _module_of(path: Path) -> ModuleType:
    """Loaded once, so that the same name is the same class."""
    spec = importlib.util.spec_from_file_location(f"speckd_own_{path.stem}_{abs(hash(path)):x}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _made(key: str, name: str, found: Any, options: Mapping[str, Any]) -> Any:
    if not inspect.isclass(found):
        if options:
            raise ConfigError(f"{key}_options: {name} is no class and takes no options", "Remove them, or make it a dataclass")
        return found
    signature = inspect.signature(found)
    try:
        signature.bind(**options)
    except TypeError as error:
        valid = ", ".join(sorted(signature.parameters))
        fix = f"Valid: {valid}" if valid else f"Remove them: {name} has no options"
        raise ConfigError(f"{key}_options: {name} does not take these: {error}", fix) from None
    try:
        return found(**options)
    except SpeckdError:
        raise
    except Exception as error:
        raise ConfigError(f"{key}: {name} cannot be made ({said(error)})", f"Check {key}_options") from error


_POLICY = "a policy for rejected tokens"

# ---- trials --------------------------------------------------------------------------------------------------------------


def example_rows(count: int = 64, vocabulary: int = 32) -> Rows:
    """Rows of sequences of 8 on which student, teacher and reference agree in part, always the same."""

    def waves(a: float, b: float) -> Tensor:
        place = torch.arange(count * vocabulary, dtype=torch.float64).reshape(count, vocabulary)
        return (3 * torch.sin(a * place * place + b * place)).float()

    teacher, number = waves(0.37, 1.1), torch.arange(count)
    student = 0.6 * teacher + waves(0.53, 2.3)
    reference = DenseSignal(0.8 * teacher + waves(0.71, 0.6))
    return Rows(student, DenseSignal(teacher), teacher.argmax(-1), TokenKeys(number // 8, number), reference)


def example_for(gate: Any) -> Rows:
    """As in training: with a reference only for a gate that needs one."""
    rows = example_rows()
    return rows if needs_reference(gate) else replace(rows, reference=None)


def _try_gate(key: str, name: str, gate: Any) -> None:
    rows = example_for(gate)

    def asked() -> Tensor:
        return gate.select(gate.score(rows), rows.keys) if isinstance(gate, BatchGate) else gate(rows)

    found = _tried(key, "a gate", name, asked, len(rows.labels))
    if not bool(((found >= 0) & (found <= 1)).all()):
        raise ConfigError(
            f"{key}: {name} accepts between {float(found.min()):.3g} and {float(found.max()):.3g}", "Return weights from 0 to 1"
        )


def _try_policy(key: str, name: str, policy: Any) -> None:
    rows = example_rows()
    acceptance = torch.linspace(0, 1, len(rows.labels))
    for place in (0, 1):
        _tried(key, _POLICY, name, lambda place=place: policy.weights(acceptance)[place], len(rows.labels))
    log_q, log_p = rows.student.log_probs, rows.teacher.log_prob(torch.arange(32).expand(64, 32))
    seen = FallbackRows(rows.student_label_log_prob, lambda: (log_q, log_p), 1.0)
    _tried(key, _POLICY, name, lambda: policy.fallback(seen), len(rows.labels))


def _try_divergence(key: str, name: str, divergence: Any) -> None:
    rows = example_rows()
    log_q, log_p = (torch.log_softmax(logits, -1) for logits in (rows.student_logits, -rows.student_logits))

    def asked() -> Tensor:
        settled = divergence
        if isinstance(divergence, BatchDivergence):
            settled = divergence.settle(divergence.score(log_q, log_p, rows.labels))
        return at_labels(settled, rows.labels)(log_q.requires_grad_(), log_p)

    _tried(key, "a divergence", name, asked, len(rows.labels))


_TRIALS = {
    "gate": _try_gate,
    "rejected": _try_policy,
    "divergence": _try_divergence,
    "student_text_rejected": _try_policy,
    "student_text_divergence": _try_divergence,
}


def _tried(key: str, what: str, name: str, asked: Any, rows: int) -> Tensor:
    """What it answers for so many rows; refused where that is not a number for each."""
    fix = "docs/your-own-gate.md shows one that works"
    try:
        found = asked()
    except Exception as error:  # whatever the user's own code raises
        raise ConfigError(f"{key}: {name} is not {what}: asked about {rows} rows, it fails ({said(error)})", fix) from error
    if not isinstance(found, Tensor) or found.shape != (rows,):
        given = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else f"{type(found).__name__}"
        raise ConfigError(f"{key}: {name} is not {what}: asked about {rows} rows, it gives {given}", f"Return [{rows}]: {fix}")
    if bool(found.isnan().any()):
        raise ConfigError(f"{key}: {name} gives NaN for an example", fix)
    return found.detach()


def said(error: BaseException) -> str:
    """An exception of the user's code, in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}".rstrip(". ")
