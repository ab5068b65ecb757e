"""Every mistake a user can make: one clear line that names what and where and the fix, exit code 2, nothing written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from speckd.tasks import build_tokenizer
from tests.tiny import common_flags, run_cli, task_rows, write_model, write_rows

Flags = list[str]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %} {% generation %}{{ m['content'] }} <eos>{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


class Place:
    """A folder with a good student, teacher and data, and what a test spoils in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "out"
        self.student, self.teacher = write_model(folder / "student", 1), write_model(folder / "teacher", 2)
        self.data = write_rows(folder / "data.jsonl", task_rows(6))

    def flags(self, *more: str) -> Flags:
        return [*common_flags(self.student, self.teacher, self.data, self.output), "--max_steps", "2", *more]

    def with_data(self, text: str, name: str = "own.jsonl") -> Flags:
        (self.folder / name).write_text(text)
        return self.flags("--dataset_name", str(self.folder / name))

    def with_yaml(self, text: str) -> Flags:
        (self.folder / "run.yaml").write_text(text)
        return self.flags("--config", str(self.folder / "run.yaml"))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def other_tokenizer(place: Place, change: Callable[[dict[str, int]], None]) -> Flags:
    vocabulary = dict(build_tokenizer().get_vocab())
    change(vocabulary)
    path = place.teacher / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = vocabulary
    path.write_text(json.dumps(content))
    return place.flags()


def swap(a: str, b: str) -> Callable[[dict[str, int]], None]:
    def change(vocabulary: dict[str, int]) -> None:
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]

    return change


def rename(old: str, new: str) -> Callable[[dict[str, int]], None]:
    def change(vocabulary: dict[str, int]) -> None:
        vocabulary[new] = vocabulary.pop(old)

    return change


def spoil_weights(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def lowercased(place: Place) -> Flags:
    path = place.teacher / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(content))
    return place.flags()


def added(folder: Path, token: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained(folder)


def unknown_token(place: Place) -> Flags:
    added(place.student, "new")
    rows = task_rows(6)
    rows[3]["completion"] += " new"
    write_rows(place.data, rows)
    write_model_of_width(place.student, 249)
    return place.flags()


def dropped_token(place: Place) -> Flags:
    added(place.teacher, "new")
    write_model_of_width(place.teacher, 249)
    return place.flags()


def write_model_of_width(folder: Path, width: int) -> None:
    """Another model in the folder, with its tokenizer left as it is."""
    kept = {path: path.read_bytes() for path in folder.glob("tokenizer*")}
    write_model(folder, 3, width=width)
    for path, content in kept.items():
        path.write_bytes(content)


def no_eos(place: Place) -> Flags:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer().backend_tokenizer, pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(place.student)
    return place.flags()


def long_prompts() -> str:
    return "".join(json.dumps({"prompt": "now " * 30, "completion": " ok"}) + "\n" for _ in range(3))


def learned_positions(place: Place) -> Flags:
    """A GPT-2 as student, which has no position beyond its last."""
    tokens = len(build_tokenizer())
    GPT2LMHeadModel(GPT2Config(vocab_size=tokens, n_positions=32, n_embd=8, n_layer=1, n_head=1)).save_pretrained(place.student)
    return place.with_data(json.dumps({"prompt": "now " * 32, "completion": " ok"}) + "\n")


def latin(place: Place) -> Flags:
    flags = place.with_data("")
    (place.folder / "own.jsonl").write_bytes('{"prompt": "é", "completion": "a"}\n'.encode("latin-1"))
    return flags


def nonempty_output(place: Place) -> Flags:
    place.output.mkdir()
    (place.output / "precious.txt").write_text("mine")
    return place.flags()


def with_template(place: Place) -> Flags:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for folder in (place.student, place.teacher):
        tokenizer.save_pretrained(folder)
    return ["--assistant_only_loss", "true"]


def nan_model(place: Place, which: str, value: float) -> Flags:
    spoil_weights(place.folder / which, value)
    return place.flags()


def without(place: Place, which: str, pattern: str) -> Flags:
    for path in (place.folder / which).glob(pattern):
        path.unlink()
    return place.flags()


def without_teacher(place: Place, *more: str) -> Flags:
    return [*common_flags(place.student, None, place.data, place.output), "--max_steps", "2", *more]


def teachers(**paths: Path) -> Flags:
    return ["--teachers", json.dumps({name: str(path) for name, path in paths.items()})]


def one_of_another_tokenizer(place: Place) -> Flags:
    other_tokenizer(place, swap("cat", "dog"))
    return [*without_teacher(place), *teachers(a=place.teacher), *mixture(a=1)]


def mixture(**weights: float) -> Flags:
    return ["--teacher_mixture", json.dumps(weights)]


def routed_rows(place: Place, name: str, *whose: str | None) -> Path:
    rows = task_rows(len(whose))
    return write_rows(place.folder / name, [{**row, "who": who} for row, who in zip(rows, whose, strict=True)])


def routes(place: Place, *whose: str | None) -> Flags:
    """Rows of the data with their teachers' names."""
    routed_rows(place, "data.jsonl", *whose)
    return ["--teacher_route_column", "who"]


def cut_short(place: Place, which: str) -> Flags:
    path = place.folder / which / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    return place.flags()


CASES: dict[str, tuple[Callable[[Place], Flags], list[str]]] = {
    "unknown key in file": (lambda p: p.with_yaml("learning_rat: 1\n"), ["run.yaml", "'learning_rat'", "'learning_rate'"]),
    "unknown flag": (lambda p: p.flags("--gaet", "top_k"), ["'gaet'", "'gate'"]),
    "wrong type": (lambda p: p.with_yaml("max_length: many\n"), ["run.yaml", "max_length", "'many'"]),
    "wrong type of a flag": (lambda p: p.flags("--seed", "x"), ["the command line", "seed", "'x'"]),
    "key given twice": (lambda p: p.with_yaml("seed: 1\nseed: 2\n"), ["run.yaml:2", "'seed'", "twice"]),
    "broken yaml": (lambda p: p.with_yaml("seed: [1\n"), ["run.yaml"]),
    "yaml that runs code": (lambda p: p.with_yaml("seed: !!python/object/apply:os.system ['true']\n"), ["run.yaml:1"]),
    "missing config": (lambda p: p.flags("--config", str(p.folder / "no.yaml")), ["no.yaml", "no such file"]),
    "unknown recipe": (lambda p: p.flags("--recipe", "paper-v3"), ["'paper-v3'", "Did you mean 'paper-v"]),
    "unknown gate": (lambda p: p.flags("--gate", "topk"), ["'topk'", "'top_k'"]),
    "unknown gate option": (lambda p: p.flags("--gate", "top_k", "--gate_options", '{"k": 1}'), ["gate_options", "'k'"]),
    "options that are not JSON": (
        lambda p: p.flags("--gate", "top_k", "--gate_options", "{verify_top_k: 3}"),
        ["the command line", "gate_options", "not JSON"],
    ),
    "output is the teacher": (
        lambda p: p.flags("--output_dir", str(p.teacher), "--overwrite_output_dir", "true"),
        ["holds the teacher", "overwritten"],
    ),
    "output holds the student": (
        lambda p: p.flags("--output_dir", str(p.folder), "--overwrite_output_dir", "true"),
        ["holds the student", "overwritten"],
    ),
    "resume where there is something else": (
        lambda p: [*nonempty_output(p), "--resume_from_checkpoint", "true"],
        ["holds no checkpoint, but other files", "--overwrite_output_dir"],
    ),
    "resume from a model": (
        lambda p: p.flags("--resume_from_checkpoint", str(p.teacher)),
        ["is no checkpoint of a run"],
    ),
    "output is the student": (
        lambda p: p.flags("--output_dir", f"{p.student}/.", "--overwrite_output_dir", "true"),
        ["holds the student", "overwritten"],
    ),
    "longer than the student's positions": (
        learned_positions,
        ["the longest row has 34 tokens", "the student was made for 32 positions", "at most 32"],
    ),
    "adapter settings without an adapter": (lambda p: p.flags("--lora_r", "8"), ["lora_r is set", "use_peft: true"]),
    "half precision on a CPU": (lambda p: p.flags("--fp16", "true"), ["fp16 needs a GPU"]),
    "completions of text": (
        lambda p: [*p.with_data('{"text": "now ok"}\n'), "--completion_only_loss", "true"],
        ["own.jsonl has no prompt and completion"],
    ),
    "sharded": (lambda p: p.flags("--fsdp", "full_shard"), ["fsdp", "not supported yet", "torchrun"]),
    "deepspeed": (lambda p: p.with_yaml("deepspeed: zero3.json\n"), ["run.yaml: deepspeed", "not supported yet"]),
    "report to what is not installed": (
        lambda p: p.flags("--report_to", "clearml"),
        ["clearml is not installed", "pip install"],
    ),
    "no epochs": (lambda p: p.flags("--num_train_epochs", "0"), ["num_train_epochs is 0"]),
    "k of zero": (lambda p: p.flags("--gate", "top_k", "--gate_options", '{"verify_top_k": 0}'), ["verify_top_k is 0"]),
    "liger": (lambda p: p.flags("--use_liger_kernel", "true"), ["use_liger_kernel"]),
    "split packing": (lambda p: p.flags("--packing", "true", "--packing_strategy", "bfd_split"), ["bfd_split", "'bfd'"]),
    "adapter that does not load": (lambda p: p.flags("--use_peft", "true", "--use_dora", "true"), ["use_dora"]),
    "adapter on the head": (
        lambda p: p.flags("--use_peft", "true", "--lora_target_modules", "q_proj", "lm_head"),
        ["lm_head", "not supported"],
    ),
    "token that the teacher lacks": (unknown_token, ["the train data: row 4 holds token id 248", "the teacher does not have"]),
    "token that the student lacks": (dropped_token, ["the teacher puts", "max_dropped_mass"]),
    "nothing to predict": (
        lambda p: [*p.with_data('{"text": "<eos>"}\n' * 3), "--max_length", "null", "--eos_token", "<eos>"],
        ["3 of 3 rows"],
    ),
    "wrapped packing": (lambda p: p.flags("--packing", "true", "--packing_strategy", "wrapped"), ["wrapped", "'bfd'"]),
    "output exists": (nonempty_output, ["out exists and is not empty", "--overwrite_output_dir"]),
    "missing student": (lambda p: p.flags("--model_name_or_path", str(p.folder / "studnt")), ["studnt", "student'"]),
    "missing teacher": (
        lambda p: p.flags("--teacher_model_name_or_path", str(p.folder / "x" / "y")),
        ["teacher_model_name_or_path"],
    ),
    "no teacher": (lambda p: common_flags(p.student, None, p.data, p.output), ["there is no teacher", "--recipe sft"]),
    "teacher is the student": (
        lambda p: p.flags("--teacher_model_name_or_path", str(p.student) + "/."),
        ["is the student itself"],
    ),
    "folder without a model": (lambda p: p.flags("--model_name_or_path", str(p.folder)), ["holds no config.json"]),
    "missing data": (
        lambda p: p.flags("--dataset_name", str(p.folder / "dat.jsonl")),
        ["dat.jsonl", "Did you mean", "data.jsonl"],
    ),
    "empty data": (lambda p: p.with_data(""), ["own.jsonl", "empty"]),
    "broken line": (lambda p: p.with_data('{"prompt": "a", "completion": "b"}\n{"prompt": \n'), ["own.jsonl:2", "not JSON"]),
    "not an object": (lambda p: p.with_data("[1]\n"), ["own.jsonl:1", "not a JSON object"]),
    "unknown shape": (
        lambda p: p.with_data('{"question": "a", "answer": "b"}\n'),
        ["answer, question", "dataset_prompt_column"],
    ),
    "missing value": (
        lambda p: p.with_data('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": null}\n'),
        ["own.jsonl: row 2", "completion is missing"],
    ),
    "wrong column name": (lambda p: p.flags("--dataset_prompt_column", "frage"), ["'frage'", "prompt, completion"]),
    "unread file type": (lambda p: p.with_data("a,b\n", "own.csv"), ["own.csv", ".jsonl"]),
    "messages without template": (
        lambda p: p.with_data('{"messages": [{"role": "user", "content": "now"}, {"role": "assistant", "content": "ok"}]}\n'),
        ["no chat template", "chat_template_path"],
    ),
    "all truncated": (lambda p: [*p.with_data(long_prompts()), "--max_length", "8"], ["3 of 3 rows", "max_length (now 8)"]),
    "conflicting vocabularies": (lambda p: other_tokenizer(p, swap("cat", "dog")), ["2 tokens have different ids", "'cat'"]),
    "renamed token": (lambda p: other_tokenizer(p, rename("cat", "lion")), ["1 ids mean different tokens", "'cat'", "'lion'"]),
    "other normalisation": (lowercased, ["cut the same text differently"]),
    "not UTF-8": (latin, ["own.jsonl:1: not UTF-8", "Save the file as UTF-8"]),
    "no end token": (no_eos, ["no end token"]),
    "student of NaN": (lambda p: nan_model(p, "student", torch.nan), ["the student's logits are NaN"]),
    "teacher of infinities": (lambda p: nan_model(p, "teacher", torch.inf), ["the teacher's logits are NaN or infinite"]),
    "no assistant turn": (
        lambda p: [*p.with_data('{"messages": [{"role": "user", "content": "now"}]}\n'), *with_template(p)],
        ["the train data", "no assistant tokens"],
    ),
    "no output folder": (lambda p: p.flags("--output_dir", "null"), ["output_dir is not set"]),
    "output below a file": (lambda p: p.flags("--output_dir", str(p.data / "x")), ["data.jsonl is a file"]),
    "learning rate of NaN": (lambda p: p.flags("--learning_rate", "nan"), ["the command line", "learning_rate is nan"]),
    "negative learning rate": (lambda p: p.flags("--learning_rate", "-1"), ["learning_rate is -1", "at least 0"]),
    "batch of zero": (lambda p: p.flags("--per_device_train_batch_size", "0"), ["per_device_train_batch_size is 0"]),
    "no accumulation": (lambda p: p.flags("--gradient_accumulation_steps", "0"), ["gradient_accumulation_steps is 0"]),
    "no steps": (lambda p: p.flags("--max_steps", "0"), ["max_steps is 0"]),
    "seed beyond reach": (lambda p: p.flags("--seed", "4294967296"), ["seed is 4294967296"]),
    "no rows to evaluate": (lambda p: p.flags("--eval_rows", "0"), ["eval_rows is 0"]),
    "list for a number": (lambda p: p.with_yaml("data_seed: [1, 2]\n"), ["run.yaml", "data_seed", "one value expected"]),
    "key that is a list": (lambda p: p.with_yaml("? [a]\n: 1\n"), ["run.yaml:1", "a key is a list"]),
    "yaml without end": (lambda p: p.with_yaml("gate_options: " + "[" * 3000 + "]" * 3000), ["run.yaml", "nested too deep"]),
    "empty yaml": (lambda p: p.with_yaml(""), ["run.yaml", "empty"]),
    "recipe that is a number": (lambda p: p.with_yaml("recipe: 5\n"), ["no recipe '5'"]),
    "k beyond the vocabulary": (
        lambda p: p.flags("--gate", "top_k", "--gate_options", '{"verify_top_k": 100000}'),
        ["verify_top_k is 100000", "nothing is rejected"],
    ),
    "evaluation of nothing": (lambda p: p.flags("--eval_strategy", "steps", "--eval_steps", "1"), ["nothing is held out"]),
    "student without weights": (
        lambda p: without(p, "student", "model.safetensors"),
        ["model_name_or_path", "student cannot be loaded"],
    ),
    "teacher cut short": (lambda p: cut_short(p, "teacher"), ["teacher_model_name_or_path", "teacher cannot be loaded"]),
    "student without tokenizer": (lambda p: without(p, "student", "tokenizer*"), ["model_name_or_path: no tokenizer"]),
    "teacher setting it does not take": (
        lambda p: p.flags("--teacher_model_init_kwargs", '{"foo": 1}'),
        ["teacher_model_name_or_path", "'foo'"],
    ),
    "budget without a unit": (
        lambda p: p.flags("--loss_memory_budget", "256"),
        ["loss_memory_budget is '256'", "a unit, such as 256MiB"],
    ),
    "budget for nothing": (
        lambda p: p.flags("--loss_memory_budget", "1KiB"),
        ["loss_memory_budget: 1KiB cannot hold the logits of 16 tokens", "Give at least 1MiB"],
    ),
    "no device": (lambda p: p.flags("--teacher_device", "gpu1"), ["teacher_device: 'gpu1' is no device", "Here there is cpu"]),
    "device that is not here": (lambda p: p.flags("--teacher_device", "cuda:77"), ["teacher_device", "no device 'cuda:77'"]),
    "unknown kind of teacher": (lambda p: p.flags("--teacher", "modle"), ["teacher: 'modle'", "Did you mean 'model'?"]),
    "base of no adapter": (
        lambda p: [*without_teacher(p), "--teacher", "base"],
        ["teacher: base needs a student with an adapter", "use_peft: true"],
    ),
    "base and another teacher": (
        lambda p: p.flags("--teacher", "base", "--use_peft", "true"),
        ["teacher_model_name_or_path is set, but with teacher: base", "Remove teacher_model_name_or_path"],
    ),
    "several teachers and nobody to say whose": (
        lambda p: [*without_teacher(p), *teachers(a=p.teacher)],
        ["teachers is set, but nothing says who teaches what", "teacher_route_column, or teacher_mixture"],
    ),
    "several teachers and one": (
        lambda p: p.flags(*teachers(a=p.teacher), "--teacher_route_column", "who"),
        ["teacher_model_name_or_path and teachers are both set"],
    ),
    "several teachers and the base": (
        lambda p: [*without_teacher(p), *teachers(a=p.teacher), "--teacher", "base", "--use_peft", "true"],
        ["teachers is set, but with teacher: base"],
    ),
    "routed and mixed": (
        lambda p: [*without_teacher(p), *teachers(a=p.teacher), "--teacher_route_column", "who", *mixture(a=1)],
        ["both say who teaches what"],
    ),
    "a route without teachers": (
        lambda p: p.flags("--teacher_route_column", "who"),
        ["teacher_route_column is set, but there are no teachers"],
    ),
    "a mixture without teachers": (lambda p: p.flags(*mixture(a=1)), ["teacher_mixture is set, but there are no teachers"]),
    "weight of nobody": (
        lambda p: [*without_teacher(p), *teachers(maths=p.teacher), *mixture(math=1)],
        ["teacher_mixture: 'math' is not among the teachers", "Did you mean 'maths'?"],
    ),
    "teacher without a weight": (
        lambda p: [*without_teacher(p), *teachers(a=p.teacher, b=p.teacher), *mixture(a=1)],
        ["teacher_mixture: b has no weight"],
    ),
    "weight of nothing": (
        lambda p: [*without_teacher(p), *teachers(a=p.teacher, b=p.teacher), *mixture(a=1, b=0)],
        ["the weight of b is 0", "above 0"],
    ),
    "teachers that are a list": (
        lambda p: [*without_teacher(p), "--teachers", "[1]", "--teacher_route_column", "who"],
        ["teachers", "Give a mapping"],
    ),
    "one of several that is not there": (
        lambda p: [*without_teacher(p), *teachers(a=p.teacher, b=p.folder / "teachr"), *mixture(a=1, b=1)],
        ["teachers: b: there is no folder", "Did you mean"],
    ),
    "one of several with another tokenizer": (
        one_of_another_tokenizer,
        ["2 tokens have different ids"],
    ),
    "no column of routes": (
        lambda p: [*without_teacher(p), *teachers(a=p.teacher), "--teacher_route_column", "who"],
        ["data.jsonl: there is no column 'who' (teacher_route_column)", "There is: prompt, completion"],
    ),
    "row of an unknown teacher": (
        lambda p: [*without_teacher(p), *teachers(a=p.teacher, b=p.teacher), *routes(p, "a", "b", "c", "a", "b", "a")],
        ["data.jsonl: row 3: who is 'c', which is no teacher", "Give one of a, b"],
    ),
    "held-out row of no teacher": (
        lambda p: [
            *without_teacher(p, "--eval_dataset", str(routed_rows(p, "dev.jsonl", "a", None))),
            *teachers(a=p.teacher),
            *routes(p, *"aaaaaa"),
        ],
        ["dev.jsonl: row 2: who is 'None', which is no teacher"],
    ),
    "unknown sharding": (
        lambda p: p.flags("--teacher_sharding", "fsdp"),
        ["teacher_sharding: 'fsdp' is unknown", "Did you mean 'fsdp2'?"],
    ),
    "a piece for one process": (
        lambda p: p.flags("--teacher_sharding", "fsdp2"),
        ["teacher_sharding: fsdp2 cuts the teacher over processes, and there is one", "torchrun"],
    ),
    "pieces on a device": (
        lambda p: p.flags("--teacher_sharding", "fsdp2", "--teacher_device", "cpu"),
        ["teacher_sharding and teacher_device", "Remove one"],
    ),
    "pieces of routed teachers": (
        lambda p: [*without_teacher(p), *teachers(a=p.teacher), *routes(p, *"aaaaaa"), "--teacher_sharding", "fsdp2"],
        ["not every process asks every teacher"],
    ),
    "pieces of the base": (
        lambda p: [*without_teacher(p), "--teacher", "base", "--use_peft", "true", "--teacher_sharding", "fsdp2"],
        ["teacher_sharding is set, but teacher is 'base'"],
    ),
    "teacher placed twice": (
        lambda p: p.flags("--teacher_device", "cpu", "--teacher_model_init_kwargs", '{"device_map": "cpu"}'),
        ["teacher_device", "device_map", "Remove one"],
    ),
    "unknown report": (lambda p: p.flags("--report_to", "nowhere"), ["nowhere is not supported"]),
    "unknown attention": (lambda p: p.flags("--attn_implementation", "magic"), ["magic"]),
    "adapter on nothing": (
        lambda p: p.flags("--use_peft", "true", "--lora_target_modules", "nope"),
        ["'nope'", "not found in the base model"],
    ),
    "rank of zero": (lambda p: p.flags("--use_peft", "true", "--lora_r", "0"), ["lora_r is 0"]),
    "missing template": (lambda p: p.flags("--chat_template_path", "no.jinja"), ["no file no.jinja"]),
    "unknown end token": (lambda p: p.flags("--eos_token", "<nope>"), ["<nope>"]),
    "assistant only, without turns": (lambda p: p.flags("--assistant_only_loss", "true"), ["not conversational"]),
    "prompts of messages without template": (
        lambda p: p.with_data(
            '{"prompt": [{"role": "user", "content": "now"}], "completion": [{"role": "assistant", "content": "ok"}]}\n'
        ),
        ["no chat template", "chat_template_path"],
    ),
    "resume from nowhere": (lambda p: p.flags("--resume_from_checkpoint", "nowhere"), ["no folder nowhere"]),
}


#: Found in the logits of the first batch, when the folder exists already.
MEASURED = ("student of NaN", "teacher of infinities")


@pytest.mark.parametrize("case", CASES)
def test_one_line_exit_code_2_and_nothing_written(place: Place, case: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spoil, words = CASES[case]
    flags = spoil(place)
    before = {p: p.stat().st_mtime_ns for p in place.output.rglob("*")}
    assert run_cli(flags) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "Traceback" not in said[0]
    assert all(word in said[0] for word in words), said[0]
    assert {p: p.stat().st_mtime_ns for p in place.output.rglob("*")} == before
    if not before and case not in MEASURED:
        assert not place.output.exists()


def test_rows_that_lose_their_completion_are_counted_and_named(place: Place, capsys) -> None:
    rows = task_rows(6)
    rows[2]["prompt"] = "now " * 60
    write_rows(place.data, rows)
    assert run_cli(place.flags("--max_length", "50")) == 0
    assert "1 of 6 rows (row 3) have no supervised token left" in capsys.readouterr().err
    assert json.loads((place.output / "results.json").read_text())["data"]["rows dropped for length"] == 1


def test_a_padded_head_is_one_line_and_works(place: Place, capsys) -> None:
    write_model(place.teacher, 2, width=384)
    assert run_cli(place.flags()) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Vocabulary:")]
    assert len(said) == 1 and "384" in said[0]


def test_resuming_with_another_learning_rate_is_refused_by_name(place: Place, capsys) -> None:
    own = [f for f in place.flags("--save_steps", "1") if f not in ("--save_strategy", "no")]
    assert run_cli(own) == 0
    again = [*own, "--resume_from_checkpoint", "true", "--learning_rate", "5e-5"]
    assert run_cli(again) == 2
    assert "resume: learning_rate was 0.01 and is 5e-05 now" in capsys.readouterr().err
    assert run_cli([*again, "--allow_changed_config", "true"]) == 0


def test_shapes_columns_and_files_that_users_have(place: Place, tmp_path: Path) -> None:
    """Renamed columns, a folder with splits, Parquet, plain text, a YAML file, null on the command line."""
    rows = task_rows(6)
    asked = write_rows(tmp_path / "qa.jsonl", [{"question": r["prompt"], "answer": r["completion"], "id": 1} for r in rows])
    columns = ["--dataset_prompt_column", "question", "--dataset_completion_column", "answer"]
    runs = {"qa": place.flags("--dataset_name", str(asked), *columns)}
    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "validation.jsonl", rows[:2])
    runs["folder"] = place.flags("--dataset_name", str(folder))
    text = write_rows(tmp_path / "text.jsonl", [{"text": r["prompt"] + r["completion"]} for r in rows])
    runs["text"] = place.flags("--dataset_name", str(text), "--max_length", "null")
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    runs["parquet"] = place.flags("--dataset_name", str(tmp_path / "rows.parquet"))
    (tmp_path / "run.yaml").write_text("gate: top_k\ngate_options: {verify_top_k: 3}\nrejected: residual\nmax_length: null\n")
    runs["yaml"] = place.flags("--config", str(tmp_path / "run.yaml"))
    losses = {}
    for name, flags in runs.items():
        place.output = tmp_path / f"out-{name}"
        flags[flags.index("--output_dir") + 1] = str(place.output)
        assert run_cli(flags) == 0, name
        log = [json.loads(x) for x in (place.output / "training_log.jsonl").read_text().splitlines()]
        losses[name] = [entry["loss"] for entry in log if "loss" in entry]
    assert losses["qa"] == losses["folder"] == losses["parquet"]
    assert losses["text"] != losses["qa"] and losses["yaml"] != losses["qa"]
    assert json.loads((tmp_path / "out-folder" / "results.json").read_text())["end"]["tokens"] > 0


def test_assistant_only_loss_supervises_the_assistant(place: Place, tmp_path: Path) -> None:
    """Messages with a chat template: only what the assistant says is learnt."""
    tokenizer, assistant_only = build_tokenizer(), with_template(place)
    rows = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"].strip()}]}
        for r in task_rows(6)
    ]
    data = write_rows(tmp_path / "chat.jsonl", rows)
    found = {}
    for name, more in {"chat": assistant_only, "all": []}.items():
        flags = [*place.flags("--dataset_name", str(data), "--eval_dataset", str(data)), *more]
        flags[flags.index("--output_dir") + 1] = str(tmp_path / f"out-{name}")
        assert run_cli(flags) == 0
        found[name] = json.loads((tmp_path / f"out-{name}" / "results.json").read_text())["end"]["tokens"]
    wanted = sum(len(tokenizer(r["completion"]).input_ids) + 1 for r in task_rows(6))
    assert found["chat"] == wanted < found["all"]


def test_a_flag_overrides_the_recipe_of_a_file(place: Place, capsys) -> None:
    assert run_cli([*place.with_yaml("recipe: paper-v1\n"), "--recipe", "ungated"]) == 0
    assert "Method: recipe ungated: " in capsys.readouterr().err


def test_a_changed_recipe_is_called_so(place: Place, capsys) -> None:
    assert run_cli(place.flags("--recipe", "ungated", "--gate", "top_k")) == 0
    assert "Method: recipe ungated, changed: gate TopK" in capsys.readouterr().err


def test_overwriting_leaves_nothing_that_a_later_run_would_resume(place: Place) -> None:
    own = [f for f in place.flags() if f not in ("--save_strategy", "no")]
    assert run_cli([*own, "--max_steps", "4", "--save_steps", "2"]) == 0
    assert run_cli([*own, "--max_steps", "3", "--save_steps", "3", "--overwrite_output_dir", "true"]) == 0
    assert {path.name for path in place.output.glob("checkpoint-*")} == {"checkpoint-3"}


def test_overwriting_an_adapter_leaves_no_adapter(place: Place) -> None:
    lora = ["--use_peft", "true", "--lora_target_modules", "q_proj", "v_proj"]
    assert run_cli([*place.flags(), *lora]) == 0
    (place.output / "checkpoint-notes.txt").write_text("mine")
    assert run_cli([*place.flags(), "--overwrite_output_dir", "true"]) == 0
    assert not list(place.output.glob("adapter*")) and (place.output / "checkpoint-notes.txt").exists()
    assert type(AutoModelForCausalLM.from_pretrained(place.output)).__name__ == "LlamaForCausalLM"


def test_a_recipe_among_the_flags_replaces_the_files_method(place: Place, capsys) -> None:
    flags = place.with_yaml("gate: top_k\ngate_options: {verify_top_k: 3}\nrejected: down_weight\ndivergence: reverse_kl\n")
    assert run_cli([*flags, "--recipe", "ungated"]) == 0
    assert "gate NoGate() → rejected tokens Mask() → ReverseKL()" in capsys.readouterr().err


def test_a_log_line_that_a_kill_cut_in_two_does_not_stop_a_resume(place: Place) -> None:
    own = [f for f in place.flags("--save_steps", "1") if f not in ("--save_strategy", "no")]
    assert run_cli(own) == 0
    with (place.output / "training_log.jsonl").open("a") as log:
        log.write('{"step": 3, "lo')
    more = ["--max_steps", "3", "--allow_changed_config", "true", "--resume_from_checkpoint", "true"]
    assert run_cli([*own, *more]) == 0
    entries = [json.loads(line) for line in (place.output / "training_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3]


def test_numbers_on_the_command_line_stay_names_where_names_are_meant(place: Place, monkeypatch) -> None:
    monkeypatch.chdir(place.folder)
    assert run_cli(place.flags("--output_dir", "007")) == 0
    assert (place.folder / "007" / "results.json").exists()


def test_a_run_that_failed_before_its_first_checkpoint_leaves_the_folder_free(place: Place, capsys) -> None:
    assert run_cli(place.flags("--learning_rate", "1e30", "--max_steps", "3")) == 2
    assert "Lower the learning rate" in capsys.readouterr().err and (place.output / "config.yaml").exists()
    assert run_cli(place.flags()) == 0


def test_another_end_token_is_said(place: Place, capsys) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer().backend_tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="####"
    )
    tokenizer.save_pretrained(place.teacher)
    assert run_cli(place.flags()) == 0
    assert "The student ends with '<eos>', the teacher with '####'" in capsys.readouterr().err


def test_rows_that_reach_the_limit_and_other_shapes_of_held_out_data_are_said(place: Place, capsys) -> None:
    rows = [{"text": row["prompt"] + row["completion"]} for row in task_rows(3)]
    held_out = write_rows(place.folder / "dev.jsonl", rows)
    assert run_cli(place.flags("--eval_dataset", str(held_out), "--max_length", "20")) == 0
    said = capsys.readouterr().err
    assert "rows are cut at max_length (20), or just as long" in said and "The held-out data has columns text" in said
    card = (place.output / "README.md").read_text()
    assert "held-out rows | 3" in card
