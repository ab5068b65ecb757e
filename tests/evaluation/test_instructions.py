"""Every checkable instruction with what follows it and what does not, by hand."""

import importlib.util
from typing import Any

import pytest

from speckd.errors import DataError
from speckd.evaluation.instructions import CHECKS, follows, relaxed, require, score
from speckd.evaluation.rows import Row

#: Instruction, its kwargs, texts that follow it, texts that do not.
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["sun", "moon"]}, ["Sun, then MOON."], ["only sun", "moo n sun"]),
    (
        "keywords:frequency",
        {"keyword": "cat", "frequency": 2, "relation": "at least"},
        ["cat Cat", "a cat, a cat, a cat"],
        ["one cat"],
    ),
    ("keywords:frequency", {"keyword": "c.t", "frequency": 1, "relation": "less than"}, ["cat"], ["c.t"]),
    ("keywords:forbidden_words", {"forbidden_words": ["bad", "worse"]}, ["badly said"], ["a BAD day", "worse."]),
    ("keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": "less than"}, ["Q"], ["qQ"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["one two three"], ["one two"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["a b"], ["a, b - c"]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        ["One. Two!", "One\n\nTwo", 'He said "Stop." Then he left.'],
        ["One, two", "3.14 is a number."],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na\n***\nb\n***"],
        ["a\n\nb", "a *** *** b", "a"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        ["First this.\n\nThen, that.", 'a\n\n"Then" b'],
        ["Then.\n\nthis", "a\n\nthen\n\nb", "then"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name], [place]"], ["[name]", "(a) (b)"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye.\nP.S. I lied.", "p. s. yes"], ["PS no"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S see", "p. p. s see"], ["P.S. see"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "- a\n  - b"],
        ["* a", "* a\n* b\n* c", "**a**\n**b**"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "Well: My answer is maybe."],
        ["Yes.", "My answer is"],
    ),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* and *b*", "**a** x *b*"], ["*a*", "* * *"]),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["SECTION 1\na", "Section 1\nSection 2", "SECTION A SECTION B"],
    ),
    ("detectable_format:json_format", {}, ['{"a": [1]}', '```json\n{"a": 1}\n```', "```\n[1]\n```"], ["{a: 1}", "Sure: {}"]),
    ("detectable_format:title", {}, ["<<A day>>\nIt was."], ["<A day>", "<< >>", "<<a\nb>>"]),
    (
        "combination:two_responses",
        {},
        ["a\n******\nb", "******a******b"],
        ["a", "a******a", "a****** ******b", "a******b******c"],
    ),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, ["say HI. Hi!"], ["Sure. Say hi.", "hi"]),
    ("startend:end_checker", {"end_phrase": "That is all."}, ['So. That is all."', "THAT IS ALL. "], ["That is all. Bye"]),
    ("startend:quotation", {}, ['"a"', ' "a b" '], ['"a', '"', "'a'"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["NASA and ESA"],
        ["NASA", "Nasa Esa", "WELL-KNOWN"],
    ),
    ("change_case:english_capital", {}, ["ALL OF IT, 3."], ["ALL of IT", "123"]),
    ("change_case:english_lowercase", {}, ["all of it, 3."], ["All of it", "123"]),
    ("punctuation:no_comma", {}, ["no comma; none."], ["one, here"]),
]


def test_every_instruction_has_a_case() -> None:
    assert {name for name, *_ in CASES} == CHECKS.keys() and len(CHECKS) == 24


@pytest.mark.parametrize(("name", "options", "right", "wrong"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_what_follows_an_instruction(name: str, options: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    require("t", row([name], [options]))
    assert [text for text in right if not follows(name, options, text)] == []
    assert [text for text in [*wrong, "", " \n"] if follows(name, options, text)] == []


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lm_eval", "langdetect", "nltk", "immutabledict")),
    reason="lm-eval with its ifeval extra is not installed: equality with IFEval's checkers NOT tested",
)
@pytest.mark.parametrize(("name", "options", "right", "wrong"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_ifevals_own_checkers_say_the_same(name: str, options: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    if name in ("length_constraints:number_sentences", "change_case:capital_word_frequency") or name.startswith(
        "change_case:e"
    ):
        pytest.skip(f"{name} needs a download, or guesses a language: NOT compared")
    if options.get("keyword") == "c.t":
        pytest.skip("theirs takes a keyword for a pattern: NOT compared")
    own = INSTRUCTION_DICT[name](name)
    own.build_description(**options)
    for text in [*right, *wrong]:
        assert bool(own.check_following(text)) == follows(name, options, text), text


def test_loosely_a_first_line_a_last_line_and_asterisks_are_forgiven() -> None:
    comma = ("punctuation:no_comma", {})
    text = "Sure, here it is:\nno comma\nHope, that helps"
    assert not follows(*comma, text) and any(follows(*comma, each) for each in relaxed(text))
    assert "no comma" in relaxed(text) and len(relaxed(text)) == 8
    scores, more = score(row([comma[0], "startend:quotation"], [{}, {}]), text)
    assert scores == {
        "prompt_strict": False,
        "prompt_loose": False,
        "instruction_strict": 0,
        "instruction_loose": 1,
        "instructions": 2,
    }
    assert more == {"followed": {"strict": [False, False], "loose": [True, False]}}


def row(ids: Any, options: Any) -> Row:
    return Row(6, "Do it.", None, {"instruction_id_list": ids, "kwargs": options})


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [
        (["language:response_language"], [{}], "row 7: 'language:response_language' cannot be checked here"),
        (["keywords:existance"], [{}], "Did you mean 'keywords:existence'?"),
        (["keywords:existence"], [{"keywords": None}], "keywords:existence has no keywords"),
        (["keywords:existence"], [None], "keywords:existence has no keywords"),
        (["punctuation:no_comma"], [], "no instruction_id_list and kwargs of one length"),
        ([], [], "no instruction_id_list"),
        (None, None, "no instruction_id_list"),
        (["length_constraints:number_words"], [{"num_words": 3, "relation": "about"}], "relation is 'about'"),
    ],
)
def test_what_cannot_be_checked_is_refused_by_name(ids: Any, options: Any, words: str) -> None:
    with pytest.raises(DataError, match="tasks: t") as error:
        require("t", row(ids, options))
    assert words in str(error.value)
