"""From what a model wrote to a program."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

from speckd.box.parsing import parsed

#: What follows is no longer the answer: the model goes on to another turn, to tests, or to a script's own start.
STOPS = ("[DONE]", "\nif __name__", "\nassert ", "<|endoftext|>", "<|im_end|>", "</s>", "\n[BEGIN]")
_FENCE = re.compile(r"^[ \t]*(```|~~~)[`~]*[ \t]*(\w*)[^\n]*$", re.MULTILINE)
_PYTHON = ("python", "python3", "py")
#: Where a program may begin behind prose, and at how many such lines it is looked for.
_BEGIN = re.compile(r"^(?:(?:async def|def|class|import|from)\b|@|\w+ *=)", re.MULTILINE)
_MOST_BEGINS = 50


@dataclass(frozen=True)
class _Block:
    """Between two fences. `at`: where its first fence begins; `closed`: it has a second."""

    at: int
    label: str
    text: str
    closed: bool


def extract_code(completion: str) -> str:
    """The program in a completion, cut at `STOPS`, without a broken end: the fenced block that is Python by its label, or else
    by its statements, or what stands before the first fence; without fences all of it, from where prose ends.

    Text that starts indented goes on where a function's body was left, and ends where a line starts at the margin again
    (`\\nclass`, `\\ndef`, `\\n#`, `\\nprint`, ...). A whole program may hold several classes and functions: no cut there.
    """
    text = completion.replace("\r\n", "\n")
    text = _fenced(text.partition("[BEGIN]")[2] if text.lstrip().startswith("[BEGIN]") else text)
    ends = [at for at in (text.find(stop) for stop in STOPS) if at >= 0]
    return _program(text[: min(ends)] if ends else text)


def _fenced(text: str) -> str:
    blocks = list(_blocks(text))
    if not blocks:
        return text
    before = text[: blocks[0].at]
    python = [block.text for block in blocks if block.label in _PYTHON]
    bare = [block for block in blocks if not block.label]
    code = chain(
        python,
        (block.text for block in bare if block.closed),
        [before],
        (block.text for block in bare if not block.closed),
    )
    found = next(filter(_is_code, code), None)
    if found is not None or python:
        return python[0] if found is None else found
    for block in bare:
        ends_the_prompts = not block.closed and text[: block.at].strip()
        return text[: block.at] if ends_the_prompts else block.text
    return text


def _blocks(text: str) -> Iterator[_Block]:
    """A fence with a label opens a block even where another was left open."""
    opening: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opening is None:
            opening = fence
        elif fence[1] == opening[1]:
            yield _block(text, opening, fence)
            opening = fence if fence[2] else None
    if opening is not None:
        yield _block(text, opening, None)


def _block(text: str, opening: re.Match[str], closing: re.Match[str] | None) -> _Block:
    inner = text[opening.end() : closing.start() if closing else None].removeprefix("\n")
    return _Block(opening.start(), opening[2].lower(), inner, closing is not None)


def _program(text: str) -> str:
    """A body that goes on, or a whole program."""
    lines = text.split("\n")
    while lines and not lines[0].strip():
        del lines[0]
    if lines and lines[0][0] in " \t":
        body = next((n for n, line in enumerate(lines) if line.strip() and line[0] not in " \t"), len(lines))
        return "\n".join(lines[:body]).rstrip()
    return _behind_prose("\n".join(lines).rstrip())


def _behind_prose(text: str) -> str:
    """From the first line at which a program begins, rather one that defines something; all of it where none does."""
    whole = _whole(text)
    if _states(whole):
        return whole
    begun = (_whole(text[found.start() :]) for found in islice(_BEGIN.finditer(text), _MOST_BEGINS))
    programs = list(filter(_states, begun))
    return next(filter(_defines, programs), programs[0] if programs else whole)


def _whole(text: str) -> str:
    """Without the last lines, where a cut left them broken; unchanged where nothing of it is a program."""
    lines = text.split("\n")
    end = len(lines)
    while end > 0:
        kept = "\n".join(lines[:end])
        try:
            return kept if parsed(kept).body else text
        except SyntaxError as error:  # no program goes on beyond the line of the mistake
            end = min(end, error.lineno or end) - 1
        except (ValueError, RecursionError, MemoryError):
            break
    return text


def _is_code(text: str) -> bool:
    program = _program(text)
    return _states(_whole(f"if True:\n{program}") if program[:1] in (" ", "\t") else program)


def _states(program: str) -> bool:
    """Is it Python, with a statement that neither a word of prose nor a call for show is?"""
    try:
        body = parsed(program).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return bool(body) and not _is_words(body[0]) and not all(_is_words(one) or _is_show(one) for one in body)


def _defines(program: str) -> bool:
    return any(isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) for one in parsed(program).body)


def _is_words(statement: ast.stmt) -> bool:
    """`Sure`, `Yes, indeed` and `Input: 1` are Python, too."""
    if isinstance(statement, ast.Expr):
        parts = statement.value.elts if isinstance(statement.value, ast.Tuple) else [statement.value]
        return all(isinstance(part, ast.Name) for part in parts)
    return isinstance(statement, ast.AnnAssign) and statement.value is None


def _is_show(statement: ast.stmt) -> bool:
    """Of a program without more nothing can be asked."""
    shown = isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Yield | ast.YieldFrom)
    return shown or isinstance(statement, ast.Import | ast.ImportFrom)
