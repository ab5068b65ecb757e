"""From what a model wrote to a program."""

import re
from itertools import zip_longest

from speckd.box.parsing import parsed

#: What follows is no longer the answer: the model goes on to another turn, to tests, or to a script's own start.
STOPS = ("[DONE]", "\nif __name__", "\nassert ", "<|endoftext|>", "<|im_end|>", "</s>", "\n[BEGIN]")
_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*$", re.MULTILINE)
_CODE = ("python", "python3", "py", "")


def extract_code(completion: str) -> str:
    """The program in a completion: the first fenced block of Python, or all of it; cut at `STOPS`, without a broken end.

    Text that starts indented goes on where a function's body was left, and ends where a line starts at the margin again
    (`\\nclass`, `\\ndef`, `\\n#`, `\\nprint`, ...). A whole program may hold several classes and functions: no cut there.
    """
    text = completion.replace("\r\n", "\n")
    text = _fenced(text.partition("[BEGIN]")[2] if text.lstrip().startswith("[BEGIN]") else text)
    ends = [at for at in (text.find(stop) for stop in STOPS) if at >= 0]
    text = text[: min(ends)] if ends else text
    lines = text.split("\n")
    while lines and not lines[0].strip():
        del lines[0]
    if lines and lines[0][0] in " \t":
        body = next((n for n, line in enumerate(lines) if line.strip() and line[0] not in " \t"), len(lines))
        return "\n".join(lines[:body]).rstrip()
    return _whole("\n".join(lines).rstrip())


def _fenced(text: str) -> str:
    fences = list(_FENCE.finditer(text))
    for opening, closing in zip_longest(fences[::2], fences[1::2]):
        alone = closing is None and not opening[1] and text[: opening.start()].strip()
        if alone:  # the end of a block that the prompt opened
            return text[: opening.start()]
        if opening[1].lower() in _CODE:
            return text[opening.end() : closing.start() if closing else None].removeprefix("\n")
    return text


def _whole(text: str) -> str:
    """Without the last lines, where a cut left them broken; unchanged where nothing of it is a program."""
    lines = text.split("\n")
    for end in range(len(lines), 0, -1):
        kept = "\n".join(lines[:end])
        try:
            if parsed(kept).body:
                return kept
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return text
