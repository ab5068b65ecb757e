"""End tokens and the chat template: does the student learn to stop, and only from what it is to say?"""

import json
from collections.abc import Iterator
from typing import Any

from datasets import Dataset

from speckd.checks import require_end_token, require_template, stop_ids
from speckd.data import is_conversational
from speckd.doctor.before import Teacher, first_rows
from speckd.doctor.findings import About, Examination, Finding, failure, note, ok, warning
from speckd.errors import DataError, SpeckdError
from speckd.settings import Settings
from speckd.trl_internals import marks_assistant


def end_tokens(settings: Settings, own: Any, taught_by: tuple[Teacher, ...]) -> Examination[bool]:
    """Will the student learn to stop, and does the teacher expect the end where the student learns it?"""
    require_end_token(own)
    begins = "" if own.bos_token is None else f", begins with {own.bos_token!r}"
    pads = "its end token, which is learnt nevertheless" if own.pad_token == own.eos_token else repr(own.pad_token)
    yield ok(About.ENDS, f"the student ends with {own.eos_token!r} (id {own.eos_token_id}), pads with {pads}{begins}")
    name, revision = str(settings.model.model_name_or_path), settings.model.model_revision
    configured = stop_ids(None, name, revision)
    if configured and own.eos_token_id not in configured:
        yield note(About.ENDS, f"the student's generation_config stops at {sorted(configured)}; training adds its end token")
    for teacher in taught_by:
        yield from _ends_of_both(own, teacher)
    return True


def _ends_of_both(own: Any, teacher: Teacher) -> Iterator[Finding]:
    theirs, name = teacher.tokenizer, teacher.path
    stops = stop_ids(theirs, name, teacher.revision)
    if not stops:
        yield warning(
            About.ENDS, f"the {teacher.called} has no end token: it may never expect an end", "Use a teacher that has one"
        )
    elif own.eos_token_id not in stops:
        there = ", ".join(repr(theirs.convert_ids_to_tokens(i)) for i in sorted(stops))
        shared = theirs.eos_token in own.get_vocab()
        fix = f"Set eos_token: {json.dumps(theirs.eos_token, ensure_ascii=False)}" if shared else "Do not mix them"
        yield failure(
            About.ENDS,
            f"the student ends with {own.eos_token!r}, the {teacher.called} with {there}, as when one is a base and the "
            "other an instruct model: the teacher never expects the end of the data, and the student would not learn to stop",
            f"{fix}, or chat_template_path: {name}, or use a student and a teacher that are both base or both instruct",
        )
    else:
        yield ok(About.ENDS, f"the {teacher.called} ends with the same")


def template(settings: Settings, own: Any, taught_by: tuple[Teacher, ...], train: Dataset) -> Examination[bool]:
    """Does it render the data (else it raises), and does it say what is to be learnt?"""
    conversational = is_conversational(train)
    instruct = next((teacher for teacher in taught_by if teacher.tokenizer.chat_template is not None), None)
    borrowed = "" if instruct is None else f"Set chat_template_path: {instruct.path}"
    try:
        require_template(settings, own, conversational)
    except SpeckdError as error:
        if instruct is not None and own.chat_template is None:
            what = f"{error.what}, and the teacher's has one: a base student with an instruct teacher"
            raise DataError(what, f"{borrowed}, or use a student of the teacher's kind") from None
        raise
    if instruct is not None and own.chat_template != instruct.tokenizer.chat_template:
        has = "has none" if own.chat_template is None else "has another"
        fix = f"{borrowed} and give messages" if not conversational else borrowed
        what = f"the {instruct.called} has a chat template and the student {has}: the teacher may not be used to what it reads"
        yield warning(About.ENDS, what, f"{fix}, or use a teacher of the student's kind")
    if not conversational:
        return True
    _render(own, train)
    return (yield from _assistant_mask(settings, own, train))


def _turns(row: dict[str, Any]) -> list[dict[str, Any]]:
    return row["messages"] if "messages" in row else row["prompt"] + row["completion"]


def _render(own: Any, train: Dataset) -> None:
    try:
        own.apply_chat_template(_turns(train[0]), tokenize=False)
    except Exception as error:  # a template is a program, and may raise anything
        raise DataError(
            f"the chat template cannot render row 1 ({' '.join(str(error).split())[:160]})",
            "Correct the data's turns, or give another template by chat_template_path",
        ) from error


def _assistant_mask(settings: Settings, own: Any, train: Dataset) -> Examination[bool]:
    marks = marks_assistant(own)
    how = "assistant_only_loss: true" if marks else "a template with {% generation %} and assistant_only_loss: true"
    if settings.training.assistant_only_loss and not marks:
        yield failure(
            About.ENDS,
            "assistant_only_loss: the chat template does not mark the assistant's turns, so there is no mask",
            "Put {% generation %} … {% endgeneration %} around them (chat_template_path), or give prompt and completion",
        )
        return False
    some = first_rows(train)
    silent = [row for row, one in enumerate(some, 1) if all(turn["role"] != "assistant" for turn in _turns(one))]
    if len(silent) == len(some):
        what = "all rows are prompts: not one has an assistant's turn, so there is nothing to learn from"
        yield failure(About.ENDS, what, "Add the answers, as turns of the role 'assistant'")
        return False
    if silent:
        what = f"{len(silent):,} of {len(some):,} rows (row {silent[0]}, …) have no assistant's turn"
        yield warning(About.ENDS, what, "Remove these rows, or add their answers")
    if "messages" in train.column_names and not settings.training.assistant_only_loss:
        yield warning(
            About.ENDS, "every turn is learnt, the user's and the system's too", f"Use {how}, or prompt and completion"
        )
    else:
        yield ok(About.ENDS, "the chat template renders the data; only the assistant's turns are learnt")
    return True
