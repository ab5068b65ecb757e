"""`speckd write`: what is trained on is what the teacher wrote, however often the writing was killed, whoever shared it."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from speckd import write
from speckd.cli import main
from speckd.errors import StoreError
from speckd.parts import Parts, manifest_of
from speckd.round_trip import Rendering
from speckd.run import prepared_trainer
from speckd.settings import load_settings
from speckd.sources.model_writer import ModelWriter
from speckd.sources.server_writer import seed_of
from speckd.sources.writer import Completion, Draws, Prompt
from speckd.teachers.files import Files
from tests.repository.files import PACKAGE, ROOT
from tests.sources.writing_server import END, WritingServer, broken, continued, slow, status
from tests.tiny import task_rows, write_model, write_rows
from tests.trainer.conftest import World

QUICKSTART = PACKAGE / "quickstart" / "teacher"
#: Answers end with <eos>, as the tokenizer's own end is called; `please` stands for the marks of turns.
TEMPLATE = "{% for m in messages %}please {{ m['content'] }} <eos> {% endfor %}{% if add_generation_prompt %}please {% endif %}"


def flags(student: Path, teacher: Path, data: Path, output: Path) -> list[str]:
    given = f"--model_name_or_path {student} --teacher_model_name_or_path {teacher} --dataset_name {data} --output {output}"
    return [*given.split(), *"--max_completion_length 12 --use_cpu true --disable_tqdm true".split()]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def counts(path: Path) -> dict[str, int]:
    return json.loads(manifest_of(path).read_text())["counts"]


def supervised(student: Path, output: Path, folder: Path) -> list[tuple[list[int], list[int]]]:
    """(what comes before, what is learnt) of each row, as `speckd train` prepares the written file."""
    given = f"--model_name_or_path {student} --dataset_name {output} --output_dir {folder} --use_cpu true"
    settings = load_settings(None, "seqkd", [*given.split(), "--disable_tqdm", "true", "--report_to", "none"])
    found = []
    for row in prepared_trainer(settings, folder).train_dataset:
        first = next(i for i, label in enumerate(row["labels"]) if label != -100)
        assert row["labels"][first:] == row["input_ids"][first:]
        found.append((row["input_ids"][:first], row["labels"][first:]))
    return found


def test_training_supervises_what_the_teacher_wrote_its_end_included(world: World, tmp_path: Path) -> None:
    """The oracle is Transformers' own greedy `generate`."""
    data = write_rows(tmp_path / "data.jsonl", task_rows(8))
    output = tmp_path / "text.jsonl"
    assert main(["write", *flags(world.student, QUICKSTART, data, output), "--sampling_temperature", "0"]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(QUICKSTART), AutoTokenizer.from_pretrained(QUICKSTART)
    expected = []
    for row in task_rows(8):
        ids = tokenizer(row["prompt"]).input_ids
        made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0, len(ids) :].tolist()
        if made[-1] == tokenizer.eos_token_id:
            expected.append((ids, made))
    assert expected and supervised(world.student, output, tmp_path / "run") == expected
    assert counts(output)["changed"] == 0 and counts(output)["rows"] == len(expected)
    assert counts(output)["truncated"] == 8 - len(expected)


def test_conversations_stay_conversations(tmp_path: Path) -> None:
    student = write_model(tmp_path / "student", seed=0)
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(student)
    asked = [[{"role": "user", "content": row["prompt"]}] for row in task_rows(6)]
    whole = [{"messages": [*turns, {"role": "assistant", "content": "ok"}]} for turns in asked]
    output, data = tmp_path / "text.jsonl", write_rows(tmp_path / "data.jsonl", whole)
    more = ["--samples_per_prompt", "2"]
    assert main(["write", *flags(student, QUICKSTART, data, output), *more]) == 0
    rows = lines(output)
    assert rows and all(row["prompt"] in asked and row["completion"][0]["role"] == "assistant" for row in rows)
    assert counts(output)["changed"] == 0
    for (before, learnt), row in zip(supervised(student, output, tmp_path / "run"), rows, strict=True):
        assert before == tokenizer(f"please {row['prompt'][0]['content']} <eos> please").input_ids
        assert learnt == [*tokenizer(row["completion"][0]["content"]).input_ids, tokenizer.eos_token_id]


def apart(killed_after: int, *given: str, launcher: Sequence[str] = ("-m",)) -> int:
    command = [sys.executable, *launcher, "tests.trainer.write_apart", str(killed_after), *given]
    path = os.pathsep.join([str(ROOT), str(PACKAGE.parent)])
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, timeout=120, check=False).returncode


def test_killed_or_shared_it_is_the_same_to_the_byte(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_rows(tmp_path / "data.jsonl", task_rows(9))
    more = ["--samples_per_prompt", "2", "--keep_truncated"]

    def given(name: str) -> list[str]:
        return [*flags(world.student, world.teacher, data, tmp_path / name), *more]

    def made(name: str) -> tuple[bytes, bytes]:
        output = tmp_path / name
        assert not (tmp_path / f"{name}.parts").exists()
        return output.read_bytes(), manifest_of(output).read_bytes()

    monkeypatch.setattr(write, "PART_COMPLETIONS", 4)
    assert main(["write", *given("whole.jsonl")]) == 0
    assert len(lines(tmp_path / "whole.jsonl")) == 18
    assert apart(2, *given("killed.jsonl")) == -9
    assert not (tmp_path / "killed.jsonl").exists() and len(list((tmp_path / "killed.jsonl.parts").glob("part-*.json"))) == 2
    assert main(["write", *given("killed.jsonl")]) == 0
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2 -m".split()
    assert apart(-1, *given("shared.jsonl"), launcher=launcher) == 0
    assert made("whole.jsonl") == made("killed.jsonl") == made("shared.jsonl")
    before = (tmp_path / "whole.jsonl").stat().st_mtime_ns
    assert main(["write", *given("whole.jsonl")]) == 0 and (tmp_path / "whole.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--seed 7", "seed is 42 there and 7 now"),
        ("--sampling_temperature 0.5", "sampling_temperature is 1.0 there and 0.5 now"),
        ("--sampling_top_k 3", "sampling_top_k is 0 there and 3 now"),
        ("--max_completion_length 5", "max_completion_length is 12 there and 5 now"),
        ("--samples_per_prompt 2", "samples_per_prompt is 1 there and 2 now"),
        ("--teacher_model_name_or_path {student2}", 'teacher_weights is "'),
        ("--dataset_name {other}", 'prompts is "'),
    ],
)
def test_what_was_begun_otherwise_is_refused_by_the_field(
    more: str, said: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = write_rows(tmp_path / "data.jsonl", task_rows(3))
    names = {
        "other": write_rows(tmp_path / "other.jsonl", task_rows(3, seed=1)),
        "student2": write_model(tmp_path / "student2", seed=5),
    }
    given = [*flags(world.student, world.teacher, data, tmp_path / "text.jsonl"), "--keep_truncated"]
    assert main(["write", *given]) == 0
    before = (tmp_path / "text.jsonl").read_bytes()
    capsys.readouterr()
    assert main(["write", *given, *more.format(**names).split()]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "text.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--output text.txt", "does not end in .jsonl"),
        ("--output nowhere/text.jsonl", "there is no folder nowhere"),
        ("--samples_per_prompt 0", "samples_per_prompt is 0"),
        ("--sampling_temperature -1", "sampling_temperature is -1"),
        ("--sampling_top_p 0", "sampling_top_p is 0"),
        ("--max_completion_length 1000", "max_completion_length: the longest prompt has"),
        ("--teacher base", "with teacher: base the student's own base teaches"),
        ("--teacher cache --teacher_cache_dir x", "teacher: cache cannot write text"),
        ("--teacher_model_name_or_path null", "nobody writes"),
        ("--dataset_name {text}", "hold no prompts"),
        ("--dataset_name {blank}", "row 2: the prompt is empty"),
        ("--output {data}", "was not begun by speckd write"),
        ("--max_completion_length 1", "all 3 completions were cut off"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    more: str, said: str, world: World, place: Path, capsys: pytest.CaptureFixture
) -> None:
    data = write_rows(place / "data.jsonl", task_rows(3))
    text = write_rows(place / "text-only.jsonl", [{"text": "a"}])
    blank = write_rows(place / "blank.jsonl", [{"prompt": "please"}, {"prompt": ""}])
    words = more.format(data=data, text=text, blank=blank).split()
    assert main(["write", *flags(world.student, world.teacher, data, place / "text.jsonl"), *words]) == 2
    said_last = capsys.readouterr().err.splitlines()[-1]
    assert said in said_last and said_last.startswith("error: ")
    assert not (place / "text.jsonl").exists()
    if (place / "text.jsonl.parts").exists():  # begun, but nothing is written: put right, it runs
        assert main(["write", *flags(world.student, world.teacher, data, place / "text.jsonl"), "--keep_truncated"]) == 0


def test_what_goes_wrong_in_writing_is_counted(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    end, loop = 1, [5, 6] * 8
    scripted = [[7, 8, end], [end], [*loop, end], [9] * 12, [7, 8, end]]

    def write_scripted(self: Any, prompts: Sequence[Prompt], sampling: Any, draws: Any) -> list[Completion]:
        ids = [scripted[draws.turn] for _ in prompts]
        return [Completion(torch.tensor(one), one[-1] == end) for one in ids]

    monkeypatch.setattr(ModelWriter, "write", write_scripted)
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "please"}, {"prompt": "now"}])
    given = [*flags(world.student, world.teacher, data, tmp_path / "text.jsonl"), "--samples_per_prompt", "5"]
    assert main(["write", *given]) == 0
    expected = {"completions": 10, "rows": 8, "truncated": 2, "empty": 2, "repeating": 4, "repeated": 2, "changed": 0}
    found = counts(tmp_path / "text.jsonl")
    assert {name: found[name] for name in expected} == expected and found["tokens"] == 2 * sum(map(len, scripted))
    err = capsys.readouterr().err
    assert "2 of 10 completions: cut off at max_completion_length (left out)" in err and "say the same over and over" in err


def test_servers_write_too(world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = task_rows(6)
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": row["prompt"]} for row in rows])
    tokenizer, output = AutoTokenizer.from_pretrained(world.student), tmp_path / "text.jsonl"
    given = f"--model_name_or_path {world.student} --dataset_name {data} --output {output} --teacher server --keep_truncated"
    common = [*given.split(), *"--max_completion_length 4 --samples_per_prompt 3 --disable_tqdm true --use_cpu true".split()]
    with WritingServer() as one, WritingServer(faults=[broken, status(503), None, slow]) as two:
        urls = ["--teacher_server_urls", one.url, two.url, "--teacher_server_timeout_s", "1"]
        assert main(["write", *common, *urls]) == 0
        asked = [*one.asked, *two.asked]
    assert {body["max_tokens"] for body in asked} == {4} and {tuple(body["stop_token_ids"]) for body in asked} == {(END,)}
    seeds = {seed_of(Prompt(torch.tensor([1]), row), Draws(42, turn)) for row in range(6) for turn in range(3)}
    assert {body["seed"] for body in asked} == seeds
    for number, row in enumerate(lines(output)):
        prompt = tokenizer(row["prompt"]).input_ids
        seed = seed_of(Prompt(torch.tensor(prompt), number // 3), Draws(42, number % 3))
        ids = continued(prompt, seed, "first", 4)
        assert row["prompt"] == rows[number // 3]["prompt"]
        assert tokenizer(row["completion"]).input_ids == (ids[:-1] if ids[-1:] == [END] else ids)
    assert json.loads(manifest_of(output).read_text())["provenance"]["teacher"] == "toy"
    (tmp_path / "text.jsonl.manifest.json").unlink()
    output.unlink()
    capsys.readouterr()
    lost = ["--teacher_server_urls", one.url, "--teacher_server_patience_s", "1"]
    assert main(["write", *common, *lost]) == 4
    assert "is not ready" in capsys.readouterr().err.splitlines()[-1] and not output.exists()


def test_text_that_reads_back_as_other_tokens_is_noticed() -> None:
    """Byte-pair merges: `a` and `b` written one by one read back as `ab`."""
    inner = Tokenizer(BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3}, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    rendering = Rendering(tokenizer, frozenset([3]))
    asked = {"prompt": "b"}
    prompt = rendering.prompt_ids(asked)

    def survives(ids: list[int], finished: bool = True) -> bool:
        written = Completion(torch.tensor(ids), finished)
        return rendering.survives(rendering.row(asked, prompt, written), prompt, written)

    assert survives([2, 1, 3]) and survives([3]) and survives([0, 0, 3]) and survives([2, 1], finished=False)
    assert not survives([0, 1, 3]) and not survives([0, 1], finished=False)
    assert rendering.trained_ids({"prompt": "b", "completion": "ab"}) == [1, 2, 3]


class FullAt(Files):
    """No space left, from the so-manieth operation that writes."""

    def __init__(self, at: int) -> None:
        self.left = at

    def write(self, descriptor: int, data: memoryview) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(28, "No space left on device")
        return super().write(descriptor, data)


def test_a_full_disk_is_named_and_what_was_published_stays(tmp_path: Path) -> None:
    def make(output: Path, files: Files) -> None:
        parts = Parts.open(output, {"seed": 1}, {"torch": "2"}, 3, files)
        for number in parts.missing(range(3)):
            parts.write(number, [{"row": {"n": number}}])
        parts.publish([record["row"] for record in parts.records()], {"rows": 3})

    make(tmp_path / "whole.jsonl", Files())
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for at in range(6 + 2):  # the plan, three parts, three lines, the manifest
        output = tmp_path / f"{at}.jsonl"
        with pytest.raises(StoreError, match=r"No space left on device\. Free some space, then run the same command again"):
            make(output, FullAt(at))
        assert not list(tmp_path.rglob("*.partial"))
        assert not output.exists() or output.read_bytes() == whole
        make(output, Files())
        assert output.read_bytes() == whole
