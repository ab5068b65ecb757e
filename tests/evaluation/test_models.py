"""Where answers end, what a template is told, and models that are not as the usual ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from speckd.errors import VocabularyError
from speckd.evaluation.answers import Answerer
from speckd.evaluation.drafting import Drafting
from speckd.evaluation.items import prompt_items, turns
from speckd.evaluation.kinds import KINDS
from speckd.evaluation.likelihood import Likelihood
from speckd.evaluation.models import Models
from speckd.evaluation.options import Options, TaskOptions
from speckd.evaluation.rows import Row
from speckd.sources.writer import Completion
from tests.tiny import write_model

#: Ends a turn with a special token that is not the tokenizer's end.
TEMPLATE = (
    "{% for m in messages %}please {{ m['content'] }} <pad> {% endfor %}{% if add_generation_prompt %}please {% endif %}"
    "{% if loud %}please {% endif %}"
)
ASKED = [{"role": "user", "content": "please"}]
CHAT = Row(0, ASKED, None, {})
TEXT = Row(0, "please", None, {})


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("models") / "chatty", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def models(folder: Path, teacher: Path | None = None) -> Models:
    name = None if teacher is None else str(teacher)
    return Models.of(Options(model_name_or_path=str(folder), teacher_model_name_or_path=name, device="cpu"))


def ends_also_with(folder: Path, token: int) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, token]}))


def test_an_answer_to_messages_also_ends_where_the_template_ends_a_turn(chatty: Path) -> None:
    own = models(chatty, chatty)
    end, turn = own.tokenizer.eos_token_id, own.tokenizer.pad_token_id
    for row, wanted in ((CHAT, {end, turn}), (TEXT, {end})):
        task = TaskOptions(max_new_tokens=4)
        answerer, drafting = Answerer(own, task, 0), Drafting("t", task, 0, 1)
        items = prompt_items("t", [row], task, own)
        answerer.answers(items)
        drafting.records(items, own)
        assert [*answerer._writers] == [*drafting._decoders] == [wanted]
        assert set(answerer._writers[frozenset(wanted)].stop_ids) == wanted


def test_a_row_tells_its_template_what_it_tells_it_in_training(chatty: Path) -> None:
    loud = Row(0, ASKED, None, {"chat_template_kwargs": {"loud": True}})
    quiet, found = (prompt_items("t", [row], TaskOptions(), models(chatty))[0].ids for row in (CHAT, loud))
    assert len(found) == len(quiet) + 1


def test_what_has_no_prompt_is_no_turn(chatty: Path) -> None:
    assert turns(Row(0, "", "a text", {}), TaskOptions(apply_chat_template=True)) == ""
    assert turns(TEXT, TaskOptions(apply_chat_template=True)) == [{"role": "user", "content": "please"}]


def test_an_adapter_ends_where_its_base_does(tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base", seed=1), tmp_path / "adapter"
    ends_also_with(base, 7)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(base)}))
    assert models(adapter).rendering.stops == {1, 7}


def test_an_end_that_is_no_special_token_is_no_text(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", seed=1)
    ends_also_with(folder, 7)
    own = models(folder)
    said = [own.text((8,), Completion(torch.tensor(ids), True)).strip() for ids in ([9, 7], [7, 9])]
    assert said == [own.tokenizer.decode([9]), own.tokenizer.decode([7, 9])]


def test_a_head_may_be_narrower_or_wider_than_the_tokenizer(tmp_path: Path) -> None:
    known = len(AutoTokenizer.from_pretrained(write_model(tmp_path / "same", seed=1)))
    for width, padding in ((known - 1, []), (known, []), (known + 3, [known, known + 1, known + 2])):
        own = models(write_model(tmp_path / str(width), seed=1, width=width))
        writer = Answerer(own, TaskOptions(max_new_tokens=4), 0)._writer(frozenset({1}))
        assert writer._suppressed.tolist() == padding


def test_mathematics_ends_where_a_model_asks_itself() -> None:
    made: Any = [KINDS["math"].make("t", TaskOptions(kind="math", stop=stop), Options()) for stop in ((), ("\n\n",))]
    assert [each.options.stop for each in made] == [("Question:",), ("\n\n",)]


def test_other_ends_are_another_evaluation(tmp_path: Path, chatty: Path) -> None:
    from speckd.evaluation.command import _who

    before = models(chatty)
    folder = shutil.copytree(chatty, tmp_path / "model")
    ends_also_with(folder, 7)
    after = models(folder)
    was, now = (_who(each.subject, each.tokenizer) for each in (before, after))
    assert was["weights"] == now["weights"] and (was["stops"], now["stops"]) == ([1], [1, 7])


@pytest.mark.parametrize("make", [Drafting, lambda *a: Likelihood(*a[:3])])
def test_a_token_that_the_teacher_lacks_is_refused_before_anything_is_answered(tmp_path: Path, make: Any) -> None:
    student, teacher = (write_model(tmp_path / name, seed=1) for name in ("student", "teacher"))
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.add_tokens(["quaggy"])
    tokenizer.save_pretrained(student)
    own = models(student, teacher)
    row = Row(3, "add quaggy", " two", {})
    with pytest.raises(VocabularyError, match=r"tasks: t: row 4: token \d+ \('quaggy'\) is unknown to the teacher"):
        make("t", TaskOptions(max_new_tokens=4), 0, 1).items([row], own)
    assert "model" not in own.__dict__  # nothing was loaded for that
    alone = models(student)
    assert Likelihood("t", TaskOptions(), 0).items([row], alone)  # whom nobody else reads
