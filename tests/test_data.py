"""`load_data` on files alone: what is read, renamed, held out; no model is needed to refuse bad data."""

import json
from pathlib import Path
from typing import Any

import pytest

from speckd.data import is_conversational, load_data
from speckd.errors import DataError
from speckd.settings import RunArguments
from tests.tiny import write_rows

ROWS: list[dict[str, Any]] = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(5)]


def load(path: Path, **options: Any) -> tuple[Any, Any]:
    return load_data(RunArguments(dataset_name=str(path), **options), "text")


def test_other_columns_are_left_out(tmp_path: Path) -> None:
    train, held_out = load(write_rows(tmp_path / "a.jsonl", [{**row, "id": 1} for row in ROWS]))
    assert train.column_names == ["prompt", "completion"] and train.to_list() == ROWS and held_out is None


def test_columns_are_renamed_and_may_change_places(tmp_path: Path) -> None:
    renamed = write_rows(tmp_path / "a.jsonl", [{"question": r["prompt"], "answer": r["completion"]} for r in ROWS])
    train, _ = load(renamed, dataset_prompt_column="question", dataset_completion_column="answer")
    assert train.to_list() == ROWS
    swapped = write_rows(tmp_path / "b.jsonl", [{"prompt": r["completion"], "completion": r["prompt"]} for r in ROWS])
    train, _ = load(swapped, dataset_prompt_column="completion", dataset_completion_column="prompt")
    assert train.to_list() == ROWS


def test_a_named_column_replaces_the_one_of_that_name(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{**row, "better": "b"} for row in ROWS])
    train, _ = load(path, dataset_completion_column="better")
    assert [row["completion"] for row in train] == ["b"] * 5 and [row["prompt"] for row in train] == [
        "p0",
        "p1",
        "p2",
        "p3",
        "p4",
    ]


@pytest.mark.parametrize("name", ["validation", "dev", "eval", "test"])
def test_a_folder_brings_its_held_out_file(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / "train.jsonl", ROWS)
    write_rows(tmp_path / f"{name}.jsonl", ROWS[:3])
    train, held_out = load(tmp_path, eval_rows=2)
    assert len(train) == 5 and held_out.to_list() == ROWS[:2]


def test_json_arrays_blank_lines_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "b.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, ROWS)) + "\n\n")
    assert load(tmp_path / "a.json")[0].to_list() == load(tmp_path / "b.jsonl")[0].to_list() == ROWS


def test_messages_are_known_in_both_of_their_shapes(tmp_path: Path) -> None:
    asked, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    whole = load(write_rows(tmp_path / "a.jsonl", [{"messages": [asked, said]}]))[0]
    split = load(write_rows(tmp_path / "b.jsonl", [{"prompt": [asked], "completion": [said]}]))[0]
    plain = load(write_rows(tmp_path / "c.jsonl", ROWS))[0]
    assert is_conversational(whole) and is_conversational(split) and not is_conversational(plain)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\n \n", ["only blank lines"]),
        ("{}\n", [":1", "object is empty"]),
        ('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}\n", [":1", "not JSON"]),
        ('{"prompt": "a"}\n', ["columns prompt", "prompt and completion; messages; text"]),
        ('{"prompt": ["a"], "completion": ["b"]}\n', ["row 1", "prompt is ['a']"]),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": 5, "completion": "b"}\n', ["row 2", "prompt is 5"]),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "answer": "b"}\n', ["row 2", "completion is missing"]),
        ('{"messages": [{"role": "user"}]}\n', ["row 1", "messages is"]),
        ('{"messages": [{"content": "a"}]}\n', ["row 1", "messages is"]),
        ('{"messages": []}\n', ["row 1", "messages is []"]),
        ('{"text": "a"}\n{"text": null}\n', ["row 2", "text is missing"]),
        ('{"input_ids": ["a"]}\n', ["row 1", "input_ids is ['a']"]),
        ('{"input_ids": [1, -5]}\n', ["row 1", "input_ids is [1, -5]"]),
        ('{"input_ids": [1, 2], "labels": [1]}\n', ["row 1", "1 labels for 2 input_ids"]),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(text)
    with pytest.raises(DataError) as raised:
        load(path)
    assert all(word in str(raised.value) for word in ["own.jsonl", *words]), str(raised.value)
    assert "\n" not in str(raised.value)


def test_one_column_cannot_be_both(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="both name 'prompt'"):
        load(write_rows(tmp_path / "a.jsonl", ROWS), dataset_prompt_column="prompt", dataset_completion_column="prompt")
