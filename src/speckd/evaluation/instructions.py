"""Instructions that a program can check, in IFEval's data format (Zhou et al. 2023, arXiv 2311.07911).

IFEval's own checkers come with lm-eval, and need language detection and a download of sentence models; these are written anew
from the paper's descriptions and the data's fields, need nothing, and differ where `docs/evaluating.md` says so.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from speckd.config import nearest
from speckd.errors import DataError
from speckd.evaluation.rows import Row
from speckd.evaluation.statistics import Metric

METRICS = (
    Metric("prompt_strict", ("prompt_strict", "completions"), "completions: all of a prompt's instructions are followed"),
    Metric("prompt_loose", ("prompt_loose", "completions"), "completions: all of a prompt's instructions are followed"),
    Metric("instruction_strict", ("instruction_strict", "instructions"), "instructions"),
    Metric("instruction_loose", ("instruction_loose", "instructions"), "instructions"),
)

Options = Mapping[str, Any]
Check = Callable[[str, Options], bool]


def _compared(found: int, options: Options, relation: str, number: str) -> bool:
    """`less than` the number, or `at least` so many."""
    return found < options[number] if options[relation] == "less than" else found >= options[number]


def _times(word: str, text: str) -> int:
    return len(re.findall(re.escape(word), text, flags=re.IGNORECASE))


def _keywords(text: str, options: Options) -> bool:
    return all(_times(word, text) for word in options["keywords"])


def _keyword_frequency(text: str, options: Options) -> bool:
    return _compared(_times(options["keyword"], text), options, "relation", "frequency")


def _forbidden_words(text: str, options: Options) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in options["forbidden_words"])


def _letter_frequency(text: str, options: Options) -> bool:
    return _compared(text.lower().count(options["letter"].lower()), options, "let_relation", "let_frequency")


def _words(text: str, options: Options) -> bool:
    return _compared(len(re.findall(r"\w+", text)), options, "relation", "num_words")


def sentences(text: str) -> int:
    """Pieces that end in . ! or ? before a space or the end, or at an empty line."""
    pieces = re.split(r"(?<=[.!?])[\"')\]]*\s+|\n\s*\n", text.strip())
    return sum(bool(re.search(r"\w", piece)) for piece in pieces)


def _sentences(text: str, options: Options) -> bool:
    return _compared(sentences(text), options, "relation", "num_sentences")


def _paragraphs(text: str, options: Options) -> bool:
    """Divided by ***; empty ones count for nothing at the ends, and are wrong between."""
    pieces = [piece.strip() for piece in re.split(r"\s?\*\*\*\s?", text)]
    inner = pieces[1 - bool(pieces[0]) : len(pieces) - (not pieces[-1])]
    return all(inner) and len(inner) == options["num_paragraphs"]


def _first_word(text: str, options: Options) -> bool:
    """So many paragraphs divided by empty lines, and the nth begins with that word."""
    pieces = text.split("\n\n")
    place, real = options["nth_paragraph"] - 1, [piece for piece in pieces if piece.strip()]
    if len(real) != options["num_paragraphs"] or not 0 <= place < len(pieces) or not pieces[place].strip():
        return False
    word = re.split(r"[.,?!'\"]", pieces[place].split()[0].lstrip("'\""))[0]
    return word.lower() == options["first_word"].lower()


def _placeholders(text: str, options: Options) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= options["num_placeholders"]


def _postscript(text: str, options: Options) -> bool:
    marker = options["postscript_marker"]
    pattern = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(marker, re.escape(marker.lower()))
    return re.search(pattern, text.lower()) is not None


def _bullets(text: str, options: Options) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", text, flags=re.MULTILINE)
    return len(stars) + len(re.findall(r"^\s*-.*$", text, flags=re.MULTILINE)) == options["num_bullets"]


def _constrained(text: str, options: Options) -> bool:
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


def _highlights(text: str, options: Options) -> bool:
    once = [found for found in re.findall(r"\*[^\n\*]*\*", text) if found.strip("*").strip()]
    twice = [found for found in re.findall(r"\*\*[^\n\*]*\*\*", text) if found[2:-2].strip()]
    return len(once) + len(twice) >= options["num_highlights"]


def _sections(text: str, options: Options) -> bool:
    mark = re.escape(options["section_spliter"].strip())
    return len(re.findall(rf"\s?{mark}\s?\d+\s?", text)) >= options["num_sections"]


def _json(text: str, options: Options) -> bool:
    inner = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(inner.strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, options: Options) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


def _two_responses(text: str, options: Options) -> bool:
    pieces = [piece.strip() for piece in text.split("******")]
    inner = pieces[1 - bool(pieces[0]) : len(pieces) - (not pieces[-1])]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


def _repeats_prompt(text: str, options: Options) -> bool:
    return text.strip().lower().startswith(options["prompt_to_repeat"].strip().lower())


def _ends(text: str, options: Options) -> bool:
    return text.strip().strip('"').lower().endswith(options["end_phrase"].strip().lower())


def _capital_words(text: str, options: Options) -> bool:
    """Hyphenated words are one."""
    found = [word for word in re.findall(r"\w+(?:[-'’]\w+)*", text) if word.isupper()]
    return _compared(len(found), options, "capital_relation", "capital_frequency")


def _quoted(text: str, options: Options) -> bool:
    inner = text.strip()
    return len(inner) > 1 and inner[0] == inner[-1] == '"'


#: By IFEval's id: the check, and which fields of `kwargs` it needs.
CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {
    "keywords:existence": (_keywords, ("keywords",)),
    "keywords:frequency": (_keyword_frequency, ("keyword", "frequency", "relation")),
    "keywords:forbidden_words": (_forbidden_words, ("forbidden_words",)),
    "keywords:letter_frequency": (_letter_frequency, ("letter", "let_frequency", "let_relation")),
    "length_constraints:number_words": (_words, ("num_words", "relation")),
    "length_constraints:number_sentences": (_sentences, ("num_sentences", "relation")),
    "length_constraints:number_paragraphs": (_paragraphs, ("num_paragraphs",)),
    "length_constraints:nth_paragraph_first_word": (_first_word, ("num_paragraphs", "nth_paragraph", "first_word")),
    "detectable_content:number_placeholders": (_placeholders, ("num_placeholders",)),
    "detectable_content:postscript": (_postscript, ("postscript_marker",)),
    "detectable_format:number_bullet_lists": (_bullets, ("num_bullets",)),
    "detectable_format:constrained_response": (_constrained, ()),
    "detectable_format:number_highlighted_sections": (_highlights, ("num_highlights",)),
    "detectable_format:multiple_sections": (_sections, ("section_spliter", "num_sections")),
    "detectable_format:json_format": (_json, ()),
    "detectable_format:title": (_title, ()),
    "combination:two_responses": (_two_responses, ()),
    "combination:repeat_prompt": (_repeats_prompt, ("prompt_to_repeat",)),
    "startend:end_checker": (_ends, ("end_phrase",)),
    "startend:quotation": (_quoted, ()),
    "change_case:capital_word_frequency": (_capital_words, ("capital_frequency", "capital_relation")),
    "change_case:english_capital": (lambda text, _: text.isupper(), ()),
    "change_case:english_lowercase": (lambda text, _: text.islower(), ()),
    "punctuation:no_comma": (lambda text, _: "," not in text, ()),
}
_RELATIONS = ("less than", "at least")


def follows(instruction: str, options: Options, text: str) -> bool:
    """Strictly: the text as it is; one that says nothing follows nothing."""
    return bool(text.strip()) and CHECKS[instruction][0](text, options)


def relaxed(text: str) -> list[str]:
    """What IFEval's loose score also looks at: without the first line, the last, both, and each of these without asterisks."""
    lines = text.split("\n")
    cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(each.replace("*", "") for each in cut)]


def require(name: str, row: Row) -> None:
    """Refuses an instruction that is not known, or not wholly given, before anything is generated.

    Raises:
        DataError: naming the row and the instruction.
    """
    where = f"tasks: {name}: row {row.number + 1}"
    ids, given = row.fields.get("instruction_id_list"), row.fields.get("kwargs")
    if not isinstance(ids, list) or not ids or not isinstance(given, list) or len(ids) != len(given):
        raise DataError(f"{where}: no instruction_id_list and kwargs of one length", "Give both, as IFEval's rows have them")
    for instruction, options in zip(ids, given, strict=True):
        if instruction not in CHECKS:
            raise DataError(f"{where}: '{instruction}' cannot be checked here", nearest(str(instruction), list(CHECKS)))
        for field in CHECKS[instruction][1]:
            if (options or {}).get(field) is None:
                raise DataError(f"{where}: {instruction} has no {field}", "Give it in kwargs, as IFEval's rows do")
            if field.endswith("relation") and options[field] not in _RELATIONS:
                raise DataError(f"{where}: {instruction}: {field} is {options[field]!r}", f"Give {' or '.join(_RELATIONS)}")


def score(row: Row, completion: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """As of `Generated`; which instructions were followed stands beside it."""
    asked: Sequence[tuple[str, Options]] = list(zip(row.fields["instruction_id_list"], row.fields["kwargs"], strict=True))
    strict = [follows(name, options or {}, completion) for name, options in asked]
    loose = [any(follows(name, options or {}, text) for text in relaxed(completion)) for name, options in asked]
    scores = {
        "prompt_strict": all(strict),
        "prompt_loose": all(loose),
        "instruction_strict": sum(strict),
        "instruction_loose": sum(loose),
        "instructions": len(asked),
    }
    return scores, {"followed": {"strict": strict, "loose": loose}}
