"""Talks with the process that runs a program: gives it the job, reads bounded answers, and never waits for ever."""

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speckd.box.outcomes import Limits, Outcome
from speckd.box.values import decode

_SAID = 4096
_GRACE_S = 2.0


@dataclass(frozen=True)
class Job:
    """What the process inside reads: a program, lines that follow it, and the expressions to evaluate.

    Args:
        rlimits: those that the process sets for itself, where nothing outside does.
    """

    program: str
    setup: str
    calls: Sequence[str]
    rlimits: Mapping[str, list[int]]

    def text(self, most: int) -> bytes:
        """As JSON; `most`: bytes that one answer may have."""
        told = {"program": self.program, "setup": self.setup, "calls": list(self.calls), "limits": dict(self.rlimits)}
        return json.dumps({**told, "most": most}).encode()


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative: a signal), None where it was killed for time; what it wrote."""

    code: int | None
    answers: bytes
    said: str
    flooded: bool


def converse(command: Sequence[str], job: Job, limits: Limits, folder: Path) -> Ended:
    """Starts `command` with an empty environment, hands it the job on standard input and reads until it ends.

    Args:
        limits: of them, `wall_s` and `output_bytes` are kept here, whatever the process does.
        folder: where it starts.
    """
    with tempfile.TemporaryFile() as given:
        given.write(job.text(limits.output_bytes // 2))
        given.seek(0)
        process = subprocess.Popen(
            command, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}, cwd=folder, start_new_session=True
        )
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr:
        answers, said, in_time = _read(process.stdout.fileno(), process.stderr.fileno(), limits)
    # The pipes are closed now, which ends a box whoever still writes in it.
    code = _end(process, in_time)
    flooded = len(answers) > limits.output_bytes
    return Ended(code, answers[: limits.output_bytes], said.decode(errors="replace").strip(), flooded)


def _read(answers_from: int, said_from: int, limits: Limits) -> tuple[bytes, bytes, bool]:
    """Both streams until they end, time is over or there are too many answers; the last: whether it was in time."""
    until = time.monotonic() + limits.wall_s
    texts = {answers_from: b"", said_from: b""}
    with selectors.DefaultSelector() as selector:
        for descriptor in texts:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map() and len(texts[answers_from]) <= limits.output_bytes:
            left = until - time.monotonic()
            if left <= 0:
                return texts[answers_from], texts[said_from], False
            for key, _ in selector.select(left):
                more = os.read(key.fd, 1 << 16)
                if not more:
                    selector.unregister(key.fd)
                elif key.fd == answers_from or len(texts[said_from]) < _SAID:
                    texts[key.fd] += more
    return texts[answers_from], texts[said_from][:_SAID], True


def _end(process: "subprocess.Popen[bytes]", in_time: bool) -> int | None:
    """Exit code of a process that should be at its end, None where it was not; nothing of its group is left."""
    code = None
    if in_time:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(_GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return code


def outcomes(ended: Ended, wanted: int, timed_out: bool, why: str) -> list[Outcome]:
    """One outcome for each of `wanted` calls, from what the process wrote. It may be anything; no answer counts twice.

    Args:
        why: how the process ended, for calls without an answer.
    """
    missing = Outcome("timeout", detail="time was over") if timed_out else Outcome("died", detail=why)
    found: list[Outcome] = []
    for line in ended.answers.split(b"\n")[:-1]:
        told = _parsed(line)
        if not found and isinstance(told.get("program"), str):
            return [Outcome("error", detail=f"the program: {told['program']}")] * wanted
        if told.get("call") != len(found) or len(found) == wanted:
            break
        found.append(_outcome(told))
    return found + [missing] * (wanted - len(found))


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        told = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _outcome(told: dict[str, Any]) -> Outcome:
    if isinstance(told.get("error"), str):
        return Outcome("error", detail=told["error"])
    try:
        return Outcome("value", decode(told["value"]))
    except (KeyError, ValueError) as error:
        return Outcome("error", detail=f"an answer that cannot be read: {error}")
