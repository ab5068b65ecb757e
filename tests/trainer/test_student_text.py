"""Runs on text that the student writes, through the command line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from speckd.arguments import SpecKDConfig
from speckd.cli import main
from speckd.errors import ConfigError
from speckd.sources.model_writer import ModelWriter
from speckd.tasks import build_tokenizer
from speckd.trainer import SpecKDTrainer
from tests.tiny import common_flags, log_of, run_cli, task_rows, write_model, write_rows
from tests.trainer.conftest import World
from tests.trainer.served_model import served

BASE = "--recipe ungated --sequence_source student --max_completion_length 10 --max_steps 4".split()
NAMES = ("loss", "grad_norm", "completions/mean_length", "completions/truncated_fraction", "on_policy/fraction")


def train(world: World, output: Path, *more: str, data: Path | None = None) -> list[dict[str, float]]:
    assert run_cli([*common_flags(world.student, world.teacher, data or world.data, output), *BASE, *more]) == 0
    return log_of(output)


def require_same(found: list[dict], wanted: list[dict], tolerance: float = 1e-5) -> None:
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        for name in NAMES:
            assert a.get(name) == pytest.approx(b.get(name), rel=tolerance, abs=1e-7), (a["step"], name)


MODES = {
    "student": [],
    "half": ["--on_policy_fraction", "0.5"],
    "replay": "--sequence_source replay --on_policy_fraction 0.8 --replay_capacity 8".split(),
    "paired": "--sequence_source paired --divergence skewed_forward_kl --student_text_divergence skewed_reverse_kl".split(),
    "mixed": "--recipe minillm --sequence_source mixed --gate top_k --rejected down_weight".split(),
}


@pytest.mark.parametrize("mode", MODES)
def test_how_the_batch_is_cut_changes_nothing(world: World, tmp_path: Path, mode: str) -> None:
    cuts = {"8x1": ("8", "1"), "2x4": ("2", "4")}
    logs = {
        name: train(
            world,
            tmp_path / name,
            *MODES[mode],
            *("--per_device_train_batch_size", size, "--gradient_accumulation_steps", accumulation),
        )
        for name, (size, accumulation) in cuts.items()
    }
    # A policy gradient's terms cancel, so what remains has more of their rounding: seen 1.4e-5 on one kind of processor.
    require_same(logs["2x4"], logs["8x1"], tolerance=5e-5 if mode == "mixed" else 1e-5)
    for entry in logs["8x1"]:
        assert 0 < entry["generation_share"] < 1
        assert entry["on_policy/staleness"] == 0 or mode == "replay"
    fractions = [entry["on_policy/fraction"] for entry in logs["8x1"]]
    if mode == "student":
        assert fractions == [1.0] * 4
    if mode == "paired":
        assert fractions == [0.5] * 4
    if mode == "half":
        assert 0 < sum(fractions) < 4 and len(set(fractions)) > 1
    if mode == "replay":
        assert max(entry["on_policy/staleness"] for entry in logs["8x1"]) > 0


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_is_the_uninterrupted_one(world: World, tmp_path: Path, mode: str) -> None:
    def run(output: Path, *more: str) -> None:
        own = [f for f in common_flags(world.student, world.teacher, world.data, output) if f not in ("--save_strategy", "no")]
        flags = [*own, *BASE, *MODES[mode], "--per_device_train_batch_size", "4", "--save_steps", "2", "--max_steps", "8"]
        assert run_cli([*flags, "--train_sampling_strategy", "random", *more]) == 0

    run(tmp_path / "whole")
    run(tmp_path / "cut")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{step}")
    (tmp_path / "cut" / "model.safetensors").unlink()
    run(tmp_path / "cut", "--resume_from_checkpoint", "true")
    for a, b in zip(log_of(tmp_path / "cut"), log_of(tmp_path / "whole"), strict=True):
        assert [a.get(name) for name in NAMES] == [b.get(name) for name in NAMES]
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(value, right[name]) for name, value in left.items())


def test_two_processes_are_one(world: World, tmp_path: Path) -> None:
    """With all there is: the data's text, the student's, and what the other process wrote before."""
    mode = "replay"
    flags = common_flags(world.student, world.teacher, world.data, tmp_path / "two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "speckd", "train"]
    more = [*BASE, *MODES[mode]]
    done = subprocess.run(
        [*command, *flags, *more, "--per_device_train_batch_size", "4"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    require_same(log_of(tmp_path / "two"), train(world, tmp_path / "one", *MODES[mode], "--per_device_train_batch_size", "8"))


def test_a_share_that_moves_goes_from_one_end_to_the_other(world: World, tmp_path: Path) -> None:
    log = train(world, tmp_path / "out", *"--on_policy_fraction 0 --on_policy_fraction_end 1 --max_steps 6".split())
    fractions = [entry["on_policy/fraction"] for entry in log]
    assert fractions[0] == 0 and fractions[-1] > 0.5


def test_adapters_write_too(world: World, tmp_path: Path) -> None:
    lora = [
        "--use_peft",
        "true",
        "--lora_r",
        "4",
        "--lora_target_modules",
        "q_proj",
        "v_proj",
        "--gradient_checkpointing",
        "true",
    ]
    assert all(entry["on_policy/fraction"] == 1 for entry in train(world, tmp_path / "out", *lora))


def test_a_completion_is_shown_where_it_is_asked_for(world: World, tmp_path: Path, capsys) -> None:
    train(world, tmp_path / "out", "--log_completions", "true")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Step ")]
    assert len(said) == 4 and " → " in said[0]


def test_a_served_teacher_is_asked_about_what_was_written(world: World, tmp_path: Path) -> None:
    narrow = World(world.student, write_model(tmp_path / "teacher", 2, 32, 2), world.data, world.place)
    wanted = train(narrow, tmp_path / "whole", *MODES["half"])
    with served(narrow.teacher) as server:
        flags = [*common_flags(world.student, None, world.data, tmp_path / "out"), *BASE, *MODES["half"]]
        assert run_cli([*flags, "--teacher", "server", "--teacher_server_urls", server.url, "--teacher_top_k", "1000"]) == 0
    require_same(log_of(tmp_path / "out"), wanted)


def test_a_replayed_row_brings_its_own_teacher(world: World, tmp_path: Path, monkeypatch) -> None:
    rows = [{**json.loads(line), "who": "ab"[i % 2]} for i, line in enumerate(world.data.read_text().splitlines())]
    data, teachers = write_rows(tmp_path / "rows.jsonl", rows), {"a": str(world.teacher), "b": str(world.place / "b")}
    write_model(world.place / "b", 9, 16, 1)
    tokenizer = build_tokenizer()
    whose = {tuple(tokenizer(row["prompt"]).input_ids): i for i, row in enumerate(rows)}
    assert len(whose) == len(rows)
    seen: list[tuple[int, int]] = []
    known = SpecKDTrainer.compute_loss

    def spying(self, model, inputs, *args, **kwargs):
        for ids, labels, of in zip(inputs["input_ids"], inputs["labels"], inputs["teacher_numbers"], strict=True):
            seen.append((whose[tuple(ids[: int((labels != -100).long().argmax())].tolist())], int(of[0])))
        return known(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SpecKDTrainer, "compute_loss", spying)
    flags = [*common_flags(world.student, None, data, tmp_path / "out"), *BASE, *MODES["replay"], "--max_steps", "6"]
    assert run_cli([*flags, "--teachers", json.dumps(teachers), "--teacher_route_column", "who"]) == 0
    assert [sample for sample, _ in seen] != [step % 24 for step in range(len(seen))], "some are replayed"
    assert all(teacher == sample % 2 for sample, teacher in seen)


def test_the_adaptive_share_moves_with_the_held_out_loss_and_survives_a_resumption(world: World, tmp_path: Path) -> None:
    def run(output: Path, *more: str) -> list[dict[str, float]]:
        own = [f for f in common_flags(world.student, world.teacher, world.data, output) if f not in ("--save_strategy", "no")]
        flags = [*own, *BASE, *MODES["replay"], *"--on_policy_fraction 0 --adaptive_on_policy true --learning_rate 1".split()]
        flags += [
            "--eval_dataset",
            str(world.data),
            *"--eval_strategy steps --eval_steps 1 --save_steps 4 --max_steps 12".split(),
        ]
        assert run_cli([*flags, "--max_grad_norm", "0", *more]) == 0
        return [entry["on_policy/fraction"] for entry in log_of(output)]

    whole = run(tmp_path / "whole")
    assert whole[0] == 0 and max(whole) > 0
    run(tmp_path / "cut")
    for step in (8, 12):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{step}")
    assert run(tmp_path / "cut", "--resume_from_checkpoint", "true") == whole


def test_half_precision_writes_and_learns(world: World, tmp_path: Path) -> None:
    log = train(world, tmp_path / "out", "--bf16", "true")
    assert all(entry["on_policy/fraction"] == 1 for entry in log)


REFUSED = {
    "teacher: cache": ("--teacher cache --teacher_cache_dir nowhere", "knows nothing of text that is written"),
    "packing": ("--packing true", "packing and padding_free are not supported"),
    "sft": ("--recipe sft", "has no label"),
    "label": ("--recipe label-ratio", "student_text_rejected: residual"),
    "adaptive": ("--adaptive_on_policy true", "eval_strategy: steps"),
    "fraction": ("--on_policy_fraction 1.5", "between 0 and 1"),
    "source": ("--sequence_source students", "Did you mean 'student'"),
    "nothing written": ("--sequence_source dataset --student_text_divergence reverse_kl", "the student writes nothing"),
    "its own label": ("--divergence label_nll --gate top_k --rejected mask", "label_nll: on text that the student writes"),
    "policy gradient on data": ("--divergence sequence_reverse_kl", "the data's text was not drawn from the student"),
    "policy gradient of old text": (
        "--student_text_divergence sequence_reverse_kl --sequence_source replay",
        "must be drawn anew from the student",
    ),
    "policy gradient of cut draws": ("--student_text_divergence sequence_reverse_kl --sampling_top_p 0.9", "sampling_top_p: 1"),
    "teacher_mix": ("--recipe minillm --teacher_mix 1.5", "teacher_mix is 1.5"),
    "two mixes": (
        '--student_text_divergence sequence_reverse_kl --student_text_divergence_options {"teacher_mix":0.1}',
        "Set teacher_mix",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(world: World, tmp_path: Path, capsys, case: str) -> None:
    flags, said = REFUSED[case]
    own = [*common_flags(world.student, world.teacher, world.data, tmp_path / "out"), *BASE, *flags.split()]
    assert run_cli(own) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error
    assert not (tmp_path / "out").exists()


def test_nothing_is_cached_of_text_that_is_not_written_yet(world: World, tmp_path: Path, capsys) -> None:
    flags = [*common_flags(world.student, world.teacher, world.data, tmp_path / "out"), *BASE]
    assert main(["cache", *flags, "--teacher_cache_dir", str(tmp_path / "cache")]) == 2
    assert "no cache can know" in capsys.readouterr().err and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "one two three"}, "row 1 has no prompt"),
        ({"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}, "row 1 has several assistant turns"),
    ],
)
def test_rows_that_cannot_be_continued_are_refused(world: World, tmp_path: Path, capsys, row, said) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [row] * 3)
    assert run_cli([*common_flags(world.student, world.teacher, data, tmp_path / "out"), *BASE]) == 2
    assert said in capsys.readouterr().err


def test_every_row_keeps_its_prompt_and_learns_from_what_was_written(world: World, tmp_path: Path, monkeypatch) -> None:
    """What reaches the loss: prompts of the data, labels on the student's tokens, none on the prompt."""
    seen: list[dict] = []
    known = SpecKDTrainer.compute_loss

    def spying(self, model, inputs, *args, **kwargs):
        seen.append({"inputs": {k: v.clone() for k, v in inputs.items()}, "count": kwargs.get("num_items_in_batch")})
        return known(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SpecKDTrainer, "compute_loss", spying)
    train(world, tmp_path / "out", "--per_device_train_batch_size", "4", "--max_steps", "1")
    tokenizer = build_tokenizer()
    rows = [json.loads(line) for line in world.data.read_text().splitlines()][:4]
    inputs = seen[0]["inputs"]
    supervised = inputs["labels"] != -100
    for i, row in enumerate(rows):
        prompt = tokenizer(row["prompt"]).input_ids
        assert inputs["input_ids"][i, : len(prompt)].tolist() == prompt
        assert not supervised[i, : len(prompt)].any() and supervised[i, len(prompt)]
        written = inputs["input_ids"][i][supervised[i]]
        assert torch.equal(inputs["labels"][i][supervised[i]], written) and len(written) <= 10
        assert inputs["sample_ids"][i, 0] == i
    assert int(seen[0]["count"]) == int(supervised.sum())


@pytest.mark.parametrize("mode", ["paired", "replay"])
def test_no_two_sequences_of_a_batch_are_taken_for_one(world: World, tmp_path: Path, monkeypatch, mode: str) -> None:
    """Of a pair, and where replayed text stands beside its own sample or comes twice: each is ranked by itself."""
    seen: list[list[int]] = []
    known = SpecKDTrainer.compute_loss

    def spying(self, model, inputs, *args, **kwargs):
        seen.append(inputs["sample_ids"][:, 0].tolist())
        return known(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SpecKDTrainer, "compute_loss", spying)
    more = "--per_device_train_batch_size 8 --max_steps 6 --sequence_source".split()
    if mode == "replay":
        train(world, tmp_path / "out", *more, *"replay --on_policy_fraction 0.9 --replay_capacity 8".split())
    else:
        gate = '--gate student_entropy --gate_options {"fraction":0.2}'.split()
        log = train(world, tmp_path / "out", *more, "paired", *gate)
        lengths = [len(json.loads(line)["completion"].split()) for line in world.data.read_text().splitlines()]
        assert min(lengths) > 1 and all(entry["tar"] >= 0.2 for entry in log)  # ⌈ρ·L⌉ of every sequence
    assert len(seen) == 6 and all(len(set(samples)) == len(samples) for samples in seen)
    assert {len(samples) for samples in seen} == {16 if mode == "paired" else 8}


_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} <end> "
    "{% endgeneration %}{% else %}{{ m['content'] }} <end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.mark.parametrize("shape", ["prompt", "messages"])
def test_text_ends_where_the_chat_template_ends_an_answer(tmp_path: Path, monkeypatch, shape: str) -> None:
    """Base models know another end: their tokenizer's and configuration's is not what the template puts behind an answer."""
    models = [write_model(tmp_path / "student", 1, width=256), write_model(tmp_path / "teacher", 2, width=256)]
    for folder in models:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
        tokenizer.chat_template = _TEMPLATE
        tokenizer.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<end>")
    turns = [({"role": "user", "content": f"apple {i}"}, {"role": "assistant", "content": "ok"}) for i in range(8)]
    whole = [
        {"messages": [asked, said]} if shape == "messages" else {"prompt": [asked], "completion": [said]}
        for asked, said in turns
    ]
    stops: set[tuple[int, ...]] = set()
    known = ModelWriter.write
    monkeypatch.setattr(ModelWriter, "write", lambda self, *given: stops.add(self.stop_ids) or known(self, *given))
    data = write_rows(tmp_path / "chat.jsonl", whole)
    more = ["--max_steps", "1", *(["--assistant_only_loss", "true"] if shape == "messages" else [])]
    assert run_cli([*common_flags(*models, data, tmp_path / "out"), *BASE, *more]) == 0
    assert stops == {(tokenizer.eos_token_id, end)}


def test_what_is_written_stays_within_the_references_positions_and_one_loss_moves_the_share(
    world: World, tmp_path: Path
) -> None:
    config = {"vocab_size": len(build_tokenizer()), "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    reference = LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=1, max_position_embeddings=60))
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (world.student, world.teacher)]
    data = Dataset.from_list(task_rows(4))

    def trainer(**more) -> SpecKDTrainer:
        how = {"gate": "excess_label_loss", "rejected": "mask", "sequence_source": "student", "use_cpu": True, **more}
        args = SpecKDConfig(output_dir=str(tmp_path), max_completion_length=64, **how)
        more = {"processing_class": build_tokenizer(), "teacher_processing_class": build_tokenizer()}
        return SpecKDTrainer(*models, args, data, {"a": data, "b": data}, reference_model=reference, **more)

    assert trainer().longest_row["written"] == 60
    with pytest.raises(ConfigError, match="follows one held-out loss"):
        trainer(adaptive_on_policy=True, eval_strategy="epoch")
