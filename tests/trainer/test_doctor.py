"""`speckd doctor`: what would go wrong is found, named, with its fix; and where nothing would, nothing is said to."""

import json
import re
import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from speckd.cli import main
from speckd.collation import Wanted
from speckd.doctor.data_tokens import TokenFacts, token_facts
from speckd.doctor.findings import About, Attempts, Level, ok
from speckd.doctor.room import checkpoints
from speckd.quickstart.models import TEACHER
from speckd.settings import load_settings
from speckd.tasks import build_tokenizer, stream
from tests.tiny import log_of, run_cli, task_rows, write_model, write_rows
from tests.trainer.served_model import served

TEMPLATE = "{% for turn in messages %}{{ turn['content'] }} {{ eos_token }} {% endfor %}"
MARKED = (
    "{% for turn in messages %}{% if turn['role'] == 'assistant' %}{% generation %}{{ turn['content'] }} {{ eos_token }}"
    "{% endgeneration %}{% else %}{{ turn['content'] }} {% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Sound:
    """A run in which nothing would go wrong: the quickstart's teacher, on its own tasks."""

    student: Path
    teacher: Path
    data: Path
    held_out: Path

    def flags(self, output: Path, *more: str, **replaced: Path | None) -> list[str]:
        named = {
            "model_name_or_path": self.student,
            "teacher_model_name_or_path": self.teacher,
            "dataset_name": self.data,
            "eval_dataset": self.held_out,
            "output_dir": output,
            **replaced,
        }
        flags = [word for key, value in named.items() if value is not None for word in (f"--{key}", str(value))]
        return [*flags, "--use_cpu", "true", "--max_length", "128", "--disable_tqdm", "true", *more]


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    place = tmp_path_factory.mktemp("sound")
    teacher = place / "teacher"
    AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).save_pretrained(teacher)
    build_tokenizer().save_pretrained(teacher)
    held_out = [{"prompt": e.prompt, "completion": f" {e.completion}"} for e in islice(stream("validation", 2, 5), 8)]
    return Sound(
        write_model(place / "student", seed=1),
        teacher,
        write_rows(place / "data.jsonl", task_rows(24)),
        write_rows(place / "held-out.jsonl", held_out),
    )


@dataclass(frozen=True)
class Told:
    """What was printed as JSON."""

    code: int
    lines: list[dict[str, Any]]

    def of(self, level: Level, about: str | None = None) -> list[dict[str, Any]]:
        return [x for x in self.lines if x.get("level") == level and about in (None, x["about"])]

    @property
    def failures(self) -> list[dict[str, Any]]:
        return self.of(Level.FAILURE)

    @property
    def abouts(self) -> set[str]:
        """The groups that were looked at."""
        return {x["about"] for x in self.lines if "about" in x} | ({"A sample"} if self.sample else set())

    @property
    def sample(self) -> dict[str, Any] | None:
        return next((x["sample"] for x in self.lines if "sample" in x), None)

    def only_failure(self, what: str, fix: str, warnings: int = 0) -> None:
        """Found, named, with its fix; and nothing else."""
        assert self.code == 2 and len(self.failures) == 1, self.failures
        assert what in self.failures[0]["what"] and fix in self.failures[0]["fix"], self.failures[0]
        assert len(self.of(Level.WARNING)) == warnings, self.of(Level.WARNING)
        assert self.lines[-1]["summary"]["failure"] == 1


def told(capsys: pytest.CaptureFixture, flags: list[str]) -> Told:
    capsys.readouterr()
    code = main(["doctor", *flags, "--json"])
    out = capsys.readouterr().out
    return Told(code, [json.loads(line) for line in out.splitlines()])


#: Those of a run whose teacher is loaded in this process.
EVERY_GROUP = {
    *(About.SETTINGS, About.MODELS, About.ENDS, About.MEMORY, About.DISK, About.LOADED, About.DATA),
    *(About.SAMPLE, About.START, About.TIME),
}
WITHOUT_TEACHER = EVERY_GROUP - {About.TIME}


# ---- nothing would go wrong ------------------------------------------------------------------------------------------------


def numbers(findings: list[dict[str, Any]], *names: str) -> list[float]:
    text = " ".join(finding["what"] for finding in findings)
    return [float(re.findall(rf"{name} ?([\d.]+\d)", text)[0]) for name in names]


@pytest.mark.parametrize(
    "how", [["--recipe", "label-ratio"], ["--recipe", "paper-v2-spec"], ["--gradient_accumulation_steps", "2"]]
)
def test_what_is_said_of_the_start_is_what_the_run_logs(how: list[str], sound: Sound, place: Path, capsys) -> None:
    found = told(capsys, sound.flags(place / "out", *how))
    assert found.code == 0 and not found.failures and not found.of(Level.WARNING), found.lines
    assert found.abouts == EVERY_GROUP and found.lines[-1]["summary"]["ok"] > 10
    assert run_cli(sound.flags(place / "out", *how, "--logging_steps", "1", "--max_steps", "1", "--save_strategy", "no")) == 0
    logged = log_of(place / "out")[0]
    start = found.of(Level.OK, About.START)
    tar, micro, divergence = numbers(start, "tokens: TAR", r"tokens: TAR [\d.]+ \(", "divergence")
    assert (tar, micro, divergence) == pytest.approx([logged[k] for k in ("tar", "tar_micro", "divergence")], abs=6e-5)
    measured = json.loads((place / "out" / "results.json").read_text())["start"]
    names = {"student": "nll", "teacher": "teacher_nll", "KL": "kl", "agreement": "agreement", "Top-5 TAR": "tar"}
    assert numbers(start, *names) == pytest.approx([measured[key] for key in names.values()], abs=6e-5)


def test_nothing_is_written_and_the_output_folder_is_not_touched(sound: Sound, place: Path, capsys) -> None:
    (place / "out" / "runs").mkdir(parents=True)
    before = state(place)
    keeping = "--save_strategy steps --save_steps 1 --eval_strategy steps --eval_steps 1 --load_best_model_at_end true"
    found = told(capsys, sound.flags(place / "out", *keeping.split(), "--report_to", "tensorboard"))
    assert found.code == 0 and found.lines[-1]["summary"]["warning"] == 0
    assert state(place) == before


def state(folder: Path) -> dict[Path, int]:
    return {path: 0 if path.name == "temporary" else path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_page_can_be_read_without_colour(sound: Sound, place: Path, capsys) -> None:
    assert main(["doctor", *sound.flags(place / "out")]) == 0
    page = capsys.readouterr().out
    groups = [line for line in page.splitlines() if line in set(About)]
    assert groups == [a for a in About if a in EVERY_GROUP - {About.SAMPLE}] and "\x1b" not in page
    assert page.endswith("\nNothing would go wrong.\n") and "⟦" in page and "\n  place  token" in page
    assert re.search(r"^  \d+ +'<eos>' .*[+−] \d\.\d\d", page, re.MULTILINE), "special tokens are visible, verdicts have a sign"


def test_a_sample_shows_the_gates_verdicts(sound: Sound, place: Path, capsys) -> None:
    found = told(capsys, sound.flags(place / "out", "--recipe", "paper-v1"))
    assert found.sample is not None
    row, tokenizer = task_rows(24)[0], build_tokenizer()
    supervised = [*tokenizer.encode(row["completion"]), tokenizer.eos_token_id]
    assert [t["token"] for t in found.sample["tokens"]] == [tokenizer.decode([i]) for i in supervised]
    assert [text.strip() for text, learnt in found.sample["pieces"] if not learnt] == [row["prompt"].strip()]
    teacher, ids = AutoModelForCausalLM.from_pretrained(sound.teacher), [*tokenizer.encode(row["prompt"]), *supervised]
    with torch.no_grad():
        probs = teacher(torch.tensor([ids])).logits[0].softmax(-1)
    for token in found.sample["tokens"]:
        before = probs[token["position"] - 1]
        proposal = tokenizer.convert_tokens_to_ids(token["proposal"])
        assert token["teacher"] == pytest.approx(float(before[ids[token["position"]]]), abs=1e-4)
        assert token["acceptance"] == float((before > before[proposal]).sum() < 5)


# ---- ten configurations in which something would ---------------------------------------------------------------------------


def copied(folder: Path, to: Path, tokenizer: Any) -> Path:
    shutil.copytree(folder, to)
    tokenizer.save_pretrained(to)
    return to


def tokenizer_of(words: dict[str, int] | None = None, **special: str | None) -> PreTrainedTokenizerFast:
    """The tasks' tokenizer with other ids or other special tokens."""
    rules = json.loads(build_tokenizer().backend_tokenizer.to_str())
    if words is not None:
        rules["model"]["vocab"] = words
    from tokenizers import Tokenizer

    named = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", **special}
    given = {name: token for name, token in named.items() if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules)), **given)


def test_1_wrong_tokenizer(sound: Sound, place: Path, capsys) -> None:
    words = dict(build_tokenizer().get_vocab())
    words["cat"], words["dog"] = words["dog"], words["cat"]
    other = copied(sound.teacher, place / "other", tokenizer_of(words))
    found = told(capsys, sound.flags(place / "out", teacher_model_name_or_path=other))
    found.only_failure("2 tokens have different ids, first 'cat'", "with the same tokenizer")
    assert found.abouts == WITHOUT_TEACHER, "what does not need the teacher is examined all the same"


def padded(sound: Sound, to: Path, junk: bool) -> Path:
    """The teacher with eight more rows in its head: some that are never wanted, or one that it likes."""
    model = AutoModelForCausalLM.from_pretrained(sound.teacher)
    weight = model.get_output_embeddings().weight.detach().clone()
    rows = weight[:1] if not junk else 1.2 * weight[1:2]  # nobody ever wants <pad>; <eos> is often near
    model.config.tie_word_embeddings = False
    model.resize_token_embeddings(256, mean_resizing=False)
    model.lm_head.weight = torch.nn.Parameter(torch.cat([weight, rows.repeat(8, 1)]))
    model.save_pretrained(to)
    build_tokenizer().save_pretrained(to)
    return to


def test_2_padded_vocabulary(sound: Sound, place: Path, capsys) -> None:
    quiet, junk = padded(sound, place / "quiet", junk=False), padded(sound, place / "junk", junk=True)
    found = told(capsys, sound.flags(place / "out", teacher_model_name_or_path=quiet))
    assert found.code == 0 and not found.of(Level.WARNING)
    assert "the teacher's head is padded: 256 rows for 248 tokens" in str(found.of(Level.NOTE, About.MODELS))
    assert "of its probability on ids that are left out" in str(found.of(Level.OK, About.LOADED))
    found = told(capsys, sound.flags(place / "out", teacher_model_name_or_path=junk))
    found.only_failure("of its probability on ids that are left out", "weights and tokenizer belong together")
    assert found.abouts == EVERY_GROUP


def test_2_tokens_that_the_student_lacks(sound: Sound, place: Path, capsys) -> None:
    words = build_tokenizer().get_vocab() | {f"extra{i}": 248 + i for i in range(8)}
    other = padded(sound, place / "junk", junk=True)
    tokenizer_of(words).save_pretrained(other)
    found = told(capsys, sound.flags(place / "out", teacher_model_name_or_path=other))
    found.only_failure("of its probability on tokens that the student does not have", "max_dropped_mass above")
    assert "8 tokens are the teacher's alone ('extra0'" in str(found.of(Level.NOTE)) and found.abouts == WITHOUT_TEACHER


def test_3_missing_end_token(sound: Sound, place: Path, capsys) -> None:
    student = copied(sound.student, place / "student", tokenizer_of(eos_token=None))
    found = told(capsys, sound.flags(place / "out", model_name_or_path=student))
    found.only_failure("the student's tokenizer has no end token", "Set eos_token")
    assert found.abouts == {About.SETTINGS, About.MODELS, About.ENDS, About.MEMORY, About.DISK, About.DATA}
    named = sound.flags(place / "out", "--eos_token", "<eos>", model_name_or_path=student)
    assert told(capsys, named).code == 0 and run_cli([*named, "--max_steps", "1"]) == 0, "the fix works"


def chat(path: Path, rows: int = 24, answers: bool = True) -> Path:
    turns = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"].strip()}][: 1 + answers]
        for row in task_rows(rows)
    ]
    return write_rows(path, [{"messages": turn} for turn in turns])


def chatting(sound: Sound, place: Path, template: str) -> dict[str, Path | None]:
    """Student and teacher with a template, and messages."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    student, teacher = (copied(getattr(sound, who), place / who, tokenizer) for who in ("student", "teacher"))
    data = chat(place / "chat.jsonl")
    return {
        "model_name_or_path": student,
        "teacher_model_name_or_path": teacher,
        "dataset_name": data,
        "eval_dataset": None,
    }


def test_4_template_without_assistant_mask(sound: Sound, place: Path, capsys) -> None:
    run = chatting(sound, place, TEMPLATE)
    found = told(capsys, sound.flags(place / "out", "--assistant_only_loss", "true", **run))
    found.only_failure("the chat template does not mark the assistant's turns", "{% generation %}")
    assert About.DATA in found.abouts and About.START in found.abouts
    marked = place / "marked.jinja"
    marked.write_text(MARKED)
    fixed = told(
        capsys, sound.flags(place / "out", "--assistant_only_loss", "true", "--chat_template_path", str(marked), **run)
    )
    assert not fixed.failures and "only the assistant's turns are learnt" in str(fixed.of(Level.OK, About.ENDS))


def test_5_all_prompts(sound: Sound, place: Path, capsys) -> None:
    run = chatting(sound, place, TEMPLATE)
    found = told(capsys, sound.flags(place / "out", **run))
    assert found.code == 0, found.failures
    warning = next(w for w in found.of(Level.WARNING) if "every turn is learnt, the user's" in w["what"])
    assert "assistant_only_loss: true" in warning["fix"]
    run["dataset_name"] = chat(place / "questions.jsonl", answers=False)
    told(capsys, sound.flags(place / "out", **run)).only_failure("all rows are prompts", "turns of the role 'assistant'")


def test_5_no_completion_is_left(sound: Sound, place: Path, capsys) -> None:
    found = told(capsys, [*sound.flags(place / "out"), "--max_length", "4"])
    found.only_failure("the train data has no supervised token", "Raise max_length (now 4)")
    assert {About.MEMORY, About.DISK, About.DATA} <= found.abouts


def use(*urls: str) -> list[str]:
    return ["--teacher", "server", "--teacher_server_urls", *urls]


def test_6_cap_too_low(sound: Sound, place: Path, capsys) -> None:
    with served(sound.teacher) as server:
        server.cap = 20
        found = told(capsys, sound.flags(place / "out", *use(server.url)))
        found.only_failure("gives fewer than 32 log-probabilities a token", "Start it with --max-logprobs 32")
        assert found.abouts == WITHOUT_TEACHER | {About.ELSEWHERE}
        server.cap = 32
        found = told(capsys, sound.flags(place / "out", *use(server.url), "--gate", "top_k"))
    assert found.code == 0 and found.abouts == EVERY_GROUP | {About.ELSEWHERE, About.PARITY}, found.failures
    assert "verdicts agree to 100.00%" in found.of(Level.OK, About.PARITY)[0]["what"]


def test_6_rows_too_long_for_the_server(sound: Sound, place: Path, capsys) -> None:
    with served(sound.teacher) as server:
        server.longest = 24
        found = told(capsys, sound.flags(place / "out", *use(server.url)))
    found.only_failure("takes 23 tokens, and the longest sequence has", "--max-model-len")


@pytest.fixture(scope="module")
def cache(sound: Sound, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cached") / "cache"
    assert main(["cache", *sound.flags(folder.parent / "unused", "--teacher_cache_dir", str(folder))]) == 0
    return folder


def test_7_stale_cache(sound: Sound, cache: Path, place: Path, capsys) -> None:
    cached = ["--teacher", "cache", "--teacher_cache_dir", str(cache)]
    found = told(capsys, sound.flags(place / "out", *cached))
    assert found.code == 0 and not found.of(Level.WARNING) and found.abouts == EVERY_GROUP | {About.ELSEWHERE, About.PARITY}
    assert "every byte" in str(found.of(Level.OK, About.ELSEWHERE)) and "agree to 100.00%" in str(
        found.of(Level.OK, About.PARITY)
    )
    other = padded(sound, place / "other", junk=False)
    found = told(capsys, sound.flags(place / "out", *cached, teacher_model_name_or_path=other))
    found.only_failure("the cached teacher is not this run's: teacher_weights is", "run `speckd cache`")
    more = write_rows(place / "more.jsonl", task_rows(30, seed=4))
    found = told(capsys, sound.flags(place / "out", *cached, dataset_name=more))
    found.only_failure("sequences are not in the cache", "Run 'speckd cache' with this very configuration")
    assert found.abouts == WITHOUT_TEACHER | {About.ELSEWHERE}


def test_7_cache_that_could_not_be_used(sound: Sound, place: Path, capsys) -> None:
    """Before it is made."""
    wanted = ["--gate", "label_in_top_k", "--teacher_cache_dir", str(place / "cache"), "--teacher_top_k"]
    found = told(capsys, sound.flags(place / "out", *wanted, "4"))
    found.only_failure("verify_top_k is 5, but the teacher gives its top 4 only", "with a larger teacher_top_k")
    found = told(capsys, sound.flags(place / "out", *wanted, "5"))
    assert found.code == 0 and "(top_k of 5, 16 bits) answers what gate and divergence ask" in str(
        found.of(Level.OK, About.ELSEWHERE)
    )


def test_7_damaged_cache(sound: Sound, cache: Path, place: Path, capsys) -> None:
    shutil.copytree(cache, place / "cache")
    shard = next((place / "cache").glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    found = told(capsys, sound.flags(place / "out", "--teacher", "cache", "--teacher_cache_dir", str(place / "cache")))
    assert found.code == 2 and shard.name in found.failures[0]["what"]


def test_checkpoints_chosen_by_what_is_not_measured(sound: Sound, place: Path, capsys) -> None:
    best = "--eval_strategy steps --eval_steps 5 --save_steps 5 --load_best_model_at_end true --metric_for_best_model".split()
    found = told(capsys, sound.flags(place / "out", *best, "kll"))
    found.only_failure("metric_for_best_model: kll is not among what is measured", "Take one of loss")
    assert told(capsys, sound.flags(place / "out", *best, "kl")).code == 0


def test_8_disk_too_small(sound: Sound, place: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    little = shutil._ntuple_diskusage(10**9, 10**9, 5000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: little)
    found = told(capsys, sound.flags(place / "out"))
    found.only_failure("too little room for output_dir", "larger disk")
    assert found.abouts == EVERY_GROUP
    found = told(capsys, sound.flags(place / "out", "--teacher_cache_dir", str(place / "cache")))
    assert [f["what"].split(":")[0] for f in found.failures] == ["too little room for output_dir", "too little room"]
    assert "Lower teacher_top_k" in found.failures[1]["fix"] and "'speckd cache' will write about" in found.failures[1]["what"]


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        ("--save_steps 1 --max_steps 7", 7),
        ("--save_steps 3 --max_steps 7", 3),
        ("--save_steps 0.25 --max_steps 8", 4),
        ("--save_strategy epoch --num_train_epochs 5", 5),
        ("--save_steps 1 --max_steps 7 --save_total_limit 2", 3),  # the oldest goes when the next is there
        ("--save_strategy no", 0),
        ("--save_steps 10 --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --num_train_epochs 2", 3),
    ],
)
def test_8_the_room_is_that_of_all_checkpoints_that_are_kept(how: str, kept: int, sound: Sound, place: Path) -> None:
    settings = load_settings(None, None, sound.flags(place / "out", *how.split()))
    assert checkpoints(settings, train_rows=100) == kept


def test_9_base_student_with_instruct_teacher(sound: Sound, place: Path, capsys) -> None:
    instruct = tokenizer_of(eos_token="####")
    instruct.chat_template = TEMPLATE
    teacher = copied(sound.teacher, place / "instruct", instruct)
    config = json.loads((teacher / "generation_config.json").read_text()) | {"eos_token_id": instruct.eos_token_id}
    (teacher / "generation_config.json").write_text(json.dumps(config))
    found = told(capsys, sound.flags(place / "out", teacher_model_name_or_path=teacher))
    found.only_failure("the student ends with '<eos>', the teacher with '####'", 'Set eos_token: "####"', warnings=1)
    assert "the teacher has a chat template and the student has none" in found.of(Level.WARNING)[0]["what"]
    assert found.abouts == EVERY_GROUP
    data = chat(place / "chat.jsonl")
    found = told(capsys, sound.flags(place / "out", teacher_model_name_or_path=teacher, dataset_name=data, eval_dataset=None))
    assert found.code == 2 and len(found.failures) == 2
    assert f"Set chat_template_path: {teacher}" in found.failures[1]["fix"]


def test_10_server_down(sound: Sound, place: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speckd.doctor.before.READY_S", 0.3)
    with served(sound.teacher) as server:
        url = server.url
    found = told(capsys, sound.flags(place / "out", *use(url)))
    found.only_failure(f"teacher server {url} is not ready", "Start it")
    assert found.abouts == WITHOUT_TEACHER | {About.ELSEWHERE}, "data and memory are examined all the same"


# ---- what else is found ----------------------------------------------------------------------------------------------------


def test_a_server_with_another_model_than_the_one_here(sound: Sound, place: Path, capsys) -> None:
    other = write_model(place / "other", seed=9, hidden=32, layers=2)
    with served(other) as server:
        found = told(capsys, sound.flags(place / "out", *use(server.url)))
    assert [f["about"] for f in found.failures] == [About.PARITY]
    assert "the server is not the teacher that is here" in found.failures[0]["what"]
    assert "less than a blind guess" in str(found.of(Level.WARNING, About.START))


def test_a_gate_that_does_nothing_is_named(sound: Sound, place: Path, capsys) -> None:
    for rate, said in (("0.0", "accepts nothing"), ("1.0", "accepts everything")):
        flags = sound.flags(place / "out", "--gate", "random", "--gate_options", f'{{"rate": {rate}}}')
        assert said in str(told(capsys, flags).of(Level.WARNING, About.START))


def test_rows_that_teach_nothing_and_rows_that_are_held_out_and_trained_on(sound: Sound, place: Path, capsys) -> None:
    rows = [*task_rows(6), *task_rows(2), {"prompt": "sort :", "completion": "  "}]
    data = write_rows(place / "some.jsonl", rows)
    found = told(capsys, sound.flags(place / "out", dataset_name=data, eval_dataset=write_rows(place / "e.jsonl", rows[:3])))
    assert "1 of 9 rows have an empty completion (row 9" in str(found.of(Level.WARNING, About.DATA))
    assert "3 of 3 held-out rows are trained on" in str(found.of(Level.WARNING, About.DATA))
    assert "2 of 9 rows repeat an earlier one" in str(found.of(Level.NOTE, About.DATA))


@pytest.mark.parametrize(
    ("more", "said", "fix"),
    [
        (["--learning_rat", "1"], "'learning_rat' is not a setting", "Did you mean 'learning_rate'?"),
        (["--dataset_name", "none.jsonl"], "none.jsonl: there is no such file", "Check the path"),
        (["--model_name_or_path", "./nowhere"], "model_name_or_path: there is no folder ./nowhere", ""),
        (["--teacher_model_name_or_path", "./nowhere"], "teacher_model_name_or_path: there is no folder", ""),
        (["--eval_dataset", "null", "--eval_strategy", "steps", "--eval_steps", "1"], "nothing is held out", "eval_dataset"),
        (["--gate", "top_k", "--gate_options", '{"verify_top_k": 248}'], "nothing is rejected", "Lower it"),
        (["--lora_r", "4"], "the student gets no adapter", "use_peft"),
        (["--use_peft", "true", "--lora_target_modules", "nope"], "nope", "Correct the setting"),
    ],
)
def test_what_a_run_refuses_is_a_failure_with_the_same_words(
    more: list[str], said: str, fix: str, sound: Sound, place: Path, capsys
) -> None:
    before = set(place.rglob("*"))
    told(capsys, sound.flags(place / "out", *more)).only_failure(said, fix)
    assert set(place.rglob("*")) == before


def test_rows_without_their_end(sound: Sound, place: Path, capsys) -> None:
    ids = [build_tokenizer().encode(row["prompt"] + row["completion"]) for row in task_rows(12)]
    data = write_rows(place / "ids.jsonl", [{"input_ids": one, "labels": one} for one in ids])
    found = told(capsys, sound.flags(place / "out", dataset_name=data, eval_dataset=None))
    assert found.code == 0
    assert "0 of 12 rows end with a supervised '<eos>': the student will not learn" in str(found.of(Level.WARNING, About.DATA))


def test_a_teacher_that_does_not_expect_the_end(sound: Sound, place: Path, capsys) -> None:
    """One vocabulary and one end token, but weights that were never taught to end there."""
    model = AutoModelForCausalLM.from_pretrained(sound.teacher)
    weight = model.lm_head.weight.detach().clone()
    weight[1] = weight[0]  # <eos> as if it were <pad>
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(weight)
    model.save_pretrained(place / "endless")
    build_tokenizer().save_pretrained(place / "endless")
    for teacher, level in ((sound.teacher, Level.OK), (place / "endless", Level.WARNING)):
        found = told(capsys, sound.flags(place / "out", teacher_model_name_or_path=teacher))
        assert "where rows end the teacher gives the end a probability of" in str(found.of(level, About.START))


def test_what_is_counted_of_tokens() -> None:
    def wanted(ids: list[int], learnt: list[int]) -> Wanted:
        return Wanted(torch.tensor(ids), torch.tensor(learnt) - 1, 1)

    looked_at = [
        wanted([7, 4, 5, 2], [1, 2, 3]),  # begins, whole, ends
        wanted([7, 7, 5, 6, 2, 9], [3, 4, 5]),  # begins twice, ends but for a line break
        wanted([4, 2, 5, 6, 8, 8], [3, 4, 5]),  # an end that is not supervised is none
    ]
    assert token_facts(looked_at, stops={2}, begin=7, limit=6) == TokenFacts(
        sequences=3, tokens=16, supervised=9, whole=1, at_limit=2, ended=2, begun=2, begun_twice=1, shortest=4
    )


def test_too_little_memory(sound: Sound, place: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, loads in ((2**20, False), (50 * 2**20, True)):
        monkeypatch.setattr("speckd.memory_report.free_bytes", lambda _, free=free: free)
        found = told(capsys, sound.flags(place / "out"))
        found.only_failure("more is needed than is free: about", "use_peft: true")
        assert found.abouts == (EVERY_GROUP if loads else EVERY_GROUP - {About.LOADED, About.SAMPLE, About.START, About.TIME})


@pytest.mark.parametrize(
    "how", ["--packing true", "--use_peft true --lora_target_modules q_proj --gradient_checkpointing true"]
)
def test_packing_and_an_adapter(how: str, sound: Sound, place: Path, capsys) -> None:
    found = told(capsys, sound.flags(place / "out", *how.split(), eval_dataset=None))
    assert found.code == 0 and found.abouts == EVERY_GROUP and not found.of(Level.WARNING)


def test_sft_and_a_student_that_is_its_own_teacher(sound: Sound, place: Path, capsys) -> None:
    found = told(capsys, sound.flags(place / "out", "--recipe", "sft", teacher_model_name_or_path=None))
    assert found.code == 0 and found.abouts == EVERY_GROUP and not found.of(Level.WARNING)
    found = told(capsys, sound.flags(place / "out", "--recipe", "sft", eval_dataset=None))  # the teacher is not asked
    assert found.code == 0 and not found.of(Level.WARNING)
    own = ["--teacher", "base", "--use_peft", "true", "--lora_target_modules", "q_proj"]
    found = told(capsys, sound.flags(place / "out", *own, teacher_model_name_or_path=None))
    assert found.code == 0 and "the student starts as its teacher" in str(found.of(Level.WARNING, About.LOADED))


def test_several_teachers(sound: Sound, place: Path, capsys) -> None:
    twin = shutil.copytree(sound.teacher, place / "twin")
    rows = [row | {"who": "one" if i % 2 else "two"} for i, row in enumerate(task_rows(12))]
    routed = write_rows(place / "routed.jsonl", rows)
    named = ["--teachers", json.dumps({"one": str(sound.teacher), "two": str(twin)})]
    alone = told(capsys, sound.flags(place / "out", eval_dataset=None, dataset_name=routed))
    for how in (["--teacher_route_column", "who"], ["--teacher_mixture", '{"one": 1, "two": 3}']):
        run = {"teacher_model_name_or_path": None, "eval_dataset": None, "dataset_name": routed}
        found = told(capsys, sound.flags(place / "out", *named, *how, **run))
        assert found.code == 0 and found.abouts == EVERY_GROUP and not found.of(Level.WARNING), found.lines
        assert "student and teacher two cut text alike" in str(found.of(Level.OK, About.MODELS))
        # Twins say what the one says, mixed or each of its own rows.
        starts = [one.of(Level.OK, About.START)[-1:] for one in (found, alone)]
        names = "tokens: TAR", "divergence"
        assert numbers(starts[0], *names) == pytest.approx(numbers(starts[1], *names), abs=2e-4)
        assert found.sample is not None and alone.sample is not None
        for token, same in zip(found.sample["tokens"], alone.sample["tokens"], strict=True):
            assert token["teacher"] == pytest.approx(same["teacher"], abs=1e-4)
    (twin / "tokenizer.json").unlink()
    words = dict(build_tokenizer().get_vocab())
    words["cat"], words["dog"] = words["dog"], words["cat"]
    tokenizer_of(words).save_pretrained(twin)
    found = told(capsys, sound.flags(place / "out", *named, "--teacher_mixture", '{"one": 1, "two": 3}', **run))
    found.only_failure("2 tokens have different ids", "same tokenizer")


def test_one_examination_that_breaks_hides_no_other_and_nothing_is_said_twice() -> None:
    attempts = Attempts()

    def broken() -> Any:
        yield ok(About.DATA, "first")
        raise TypeError("two\nlines")

    found = [*attempts.of(About.DATA, broken()), *attempts.of(About.DATA, broken())]
    assert [one.level for one in found] == [Level.OK, Level.FAILURE, Level.OK]
    assert found[1].what == "this could not be examined: TypeError: two lines" and found[1].fix
