"""What is foreseen, held against models that are there: weights, activations, the engine; and when it is said."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, GPT2Config, Qwen3Config

from speckd import LMHead, distillation_loss, memory_report
from speckd.config import DIVERGENCES, REJECTED, MethodConfig
from speckd.data import longest_row_of
from speckd.dry_run import BatchShape, LiveBytes, ModelShape, RunShape, step_facts, student_step
from speckd.engine import default_chunk_size
from speckd.evaluate import HeldOutSums, measure
from speckd.memory_plan import MIB, StepFacts, measure_bytes, plan, tiles_bytes
from speckd.memory_report import Foreseen
from speckd.settings import load_settings
from speckd.tasks import build_tokenizer
from speckd.teachers import HiddenTeacher
from speckd.tokens import supervised_rows, token_batch
from tests.tiny import common_flags, run_cli
from tests.trainer.conftest import World

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
CONFIGS = {
    "qwen3": Qwen3Config(**SMALL),
    "gemma2": Gemma2Config(**SMALL),
    "gpt2": GPT2Config(vocab_size=500, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
}


def shape(config: Any, dtype: torch.dtype = torch.float32) -> ModelShape:
    return ModelShape(config, {"dtype": dtype})


def run_of(config: Any, batch: BatchShape | None = None, **more: Any) -> RunShape:
    return RunShape(shape(config), shape(config), batch or BatchShape(2, 32), CPU, chunk=16, vocabulary=500, **more)


def weights(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


# ---- the dry run -----------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_the_loaded_models(world: World) -> None:
    def own(folder: Path, dtype: torch.dtype) -> ModelShape:
        return shape(AutoConfig.from_pretrained(folder), dtype)

    facts = step_facts(
        RunShape(own(world.student, torch.float32), own(world.teacher, torch.bfloat16), BatchShape(2, 8), CPU, 16, 100)
    )
    student = AutoModelForCausalLM.from_pretrained(world.student, dtype=torch.float32)
    assert facts.student == weights(student)
    assert facts.teacher == weights(AutoModelForCausalLM.from_pretrained(world.teacher, dtype=torch.bfloat16))
    assert facts.gradients == sum(parameter.nbytes for parameter in student.parameters())
    assert facts.optimizer == 2 * facts.gradients and facts.update == 0
    assert (facts.head.rows, facts.head.width) == student.get_output_embeddings().weight.shape and facts.head.tied


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("more", [{}, {"checkpointing": {}}, {"autocast": torch.bfloat16}], ids=str)
def test_a_step_without_numbers_allocates_what_a_real_one_does(name: str, more: dict[str, Any]) -> None:
    for flat in (True, False):
        run = run_of(CONFIGS[name], BatchShape(2, 32, flat), **more)
        model = AutoModelForCausalLM.from_config(run.student.config, dtype=torch.float32).train()
        if "checkpointing" in more:
            model.gradient_checkpointing_enable()
        forward, backward = student_step(model, run)
        facts = step_facts(run)
        assert facts.student == weights(model)
        if flat:
            assert (facts.student_forward, facts.backward) == (forward, backward)
        else:  # a batch whose rows are all of one length needs no mask, but most batches do
            assert forward.kept <= facts.student_forward.kept <= 1.2 * forward.kept
            assert backward.peak <= facts.backward.peak <= 1.2 * backward.peak


def test_an_adapter_trains_itself_alone() -> None:
    config = CONFIGS["qwen3"]
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    facts, whole = step_facts(run_of(config, adapter=adapter, checkpointing={})), step_facts(run_of(config))
    model = get_peft_model(AutoModelForCausalLM.from_config(config), adapter)
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert facts.gradients == trained and facts.optimizer == 2 * trained
    assert facts.student == weights(model) and facts.student - whole.student == trained
    assert not facts.head.trained and facts.head.summed == facts.head.gradient == 0
    assert plan(replace(facts, keeps_room=False)).moments["the backward pass"].loss == 0 and facts.student_forward.kept > 0
    assert adapter.target_modules == {"q_proj", "v_proj"}, "the settings are left as they were"


def test_a_copy_of_the_head_that_an_adapter_trains_has_a_gradient() -> None:
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    config = Qwen3Config(**SMALL, tie_word_embeddings=False)
    facts = step_facts(run_of(config, adapter=adapter))
    assert facts.head.trained and not facts.head.tied and facts.head.gradient == 500 * 64 * 4


def peak(run: RunShape) -> int:
    return plan(step_facts(run)).peak.total


def test_the_peak_grows_with_rows_tokens_words_and_layers() -> None:
    base = run_of(CONFIGS["qwen3"])
    for more in (BatchShape(3, 32), BatchShape(2, 40)):
        assert peak(replace(base, batch=more)) > peak(base)
    for key in ("vocab_size", "num_hidden_layers", "hidden_size"):
        larger = run_of(Qwen3Config(**{**SMALL, key: 2 * SMALL[key]}))
        assert peak(replace(larger, vocabulary=larger.student.config.vocab_size)) > peak(base)


def test_what_saves_memory_is_seen_to() -> None:
    base = run_of(CONFIGS["qwen3"], BatchShape(4, 64))
    facts = step_facts(base)
    again = step_facts(replace(base, checkpointing={}))
    assert again.student_forward.kept < facts.student_forward.kept / 2 and again.recomputes
    away = step_facts(replace(base, teacher_elsewhere=True))
    assert away.teacher == 500 * 64 * 4, "a copy of its head"
    assert away.teacher_forward.peak == away.teacher_forward.kept == facts.teacher_forward.kept
    assert step_facts(replace(base, teacher=None, distils=False)).teacher == 0
    assert step_facts(replace(base, distributed=True)).buckets == facts.gradients
    assert step_facts(replace(base, evaluation=BatchShape(8, 64))).evaluation is not None


@pytest.mark.parametrize("checkpointing", [None, {}])
def test_a_dry_run_draws_nothing(checkpointing: dict | None) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    adapter = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1, target_modules=["q_proj"])
    step_facts(run_of(Qwen3Config(**SMALL, attention_dropout=0.1), adapter=adapter, checkpointing=checkpointing))
    assert torch.equal(before, torch.get_rng_state())
    assert type(torch.zeros(2)) is torch.Tensor


# ---- the engine ------------------------------------------------------------------------------------------------------------


def test_the_engine_and_the_measures_keep_to_what_is_planned_for_a_chunk() -> None:
    """Small enough for buffers that are counted (under 4 MiB each), large enough for nine tiles to be the lesser part."""
    words, width, tokens, chunk = 4_000, 8, 300, 256
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, words, (1, tokens + 1), generator=draw)
    rows = supervised_rows(token_batch(ids, ids))
    hidden = torch.randn(tokens + 1, width, generator=draw, requires_grad=True)
    weight = torch.randn(words, width, generator=draw, requires_grad=True)
    teacher = HiddenTeacher(torch.randn(tokens + 1, width, generator=draw), LMHead(torch.randn(words, width, generator=draw)))
    given = [hidden, weight, teacher.hidden, teacher.head.weight, ids]
    gradients, buffers = weight.nbytes + hidden.nbytes, 2 * chunk * words * 4
    for gate, rejected, name in itertools.product(("label_ratio", "top_k", "spec"), sorted(REJECTED), sorted(DIVERGENCES)):
        objective = MethodConfig(gate=gate, rejected=rejected, divergence=name).objective()
        with LiveBytes(given) as live:
            distillation_loss(objective, hidden, LMHead(weight), teacher, rows, chunk)
        assert buffers < live.peak <= buffers + tiles_bytes(chunk, words) + gradients, (gate, rejected, name)
    with LiveBytes(given) as live:
        measure(HeldOutSums(), hidden.detach(), LMHead(weight.detach()), teacher, rows)
    planned = measure_bytes(min(default_chunk_size(words), tokens), words)
    assert 0.8 * planned < live.peak <= 1.1 * planned


# ---- the run ---------------------------------------------------------------------------------------------------------------


def flags(world: World, tmp_path: Path, *more: str) -> list[str]:
    return [*common_flags(world.student, world.teacher, world.data, tmp_path / "out"), "--max_steps", "1", *more]


def test_the_plan_is_said_before_anything_is_loaded(world: World, tmp_path: Path, capsys, monkeypatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("loading")

    monkeypatch.setattr("speckd.run.AutoModelForCausalLM.from_pretrained", refuse)
    assert run_cli(flags(world, tmp_path, "--per_device_train_batch_size", "3", "--loss_chunk_size", "20")) == 2
    said = capsys.readouterr().err.splitlines()
    line = next(line for line in said if line.startswith("Memory: about "))
    assert "MiB at the peak (in the " in line and ": loss 9" in line and "GiB are free." in line
    assert "with 3 rows of up to " in line and "the loss in chunks of 20" in line
    assert said.index(line) < next(i for i, text in enumerate(said) if "loading" in text)


def test_the_budget_decides_what_the_loss_holds_at_once(world: World, tmp_path: Path, monkeypatch) -> None:
    seen = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(args[5])
        return distillation_loss(*args, **kwargs)

    monkeypatch.setattr("speckd.trainer.distillation_loss", watched)
    words = len(build_tokenizer())
    assert run_cli(flags(world, tmp_path, "--loss_memory_budget", f"{8 * words * 40 / 1024}KiB")) == 0
    assert set(seen) == {40}


def test_a_run_that_will_not_fit_is_warned_of_with_a_cure(world: World, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("speckd.memory_report.free_bytes", lambda device: MIB)
    assert run_cli(flags(world, tmp_path)) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "more than is free" in line]
    assert len(warnings) == 1 and "use_peft: true" in warnings[0]


def test_what_cannot_be_foreseen_stops_nothing(world: World, tmp_path: Path, capsys, monkeypatch) -> None:
    def refuse(run: RunShape) -> StepFacts:
        raise RuntimeError("depends on\nnumbers")

    monkeypatch.setattr("speckd.memory_report.step_facts", refuse)
    assert run_cli(flags(world, tmp_path)) == 0
    assert "Memory: not foreseen (depends on numbers)." in capsys.readouterr().err


def foreseen(free: float, rows: int = 8, **more: Any) -> Foreseen:
    run = run_of(CONFIGS["qwen3"], BatchShape(rows, 64), **more)
    facts = step_facts(run)
    found = plan(facts)
    return Foreseen(found, run, int(free * found.peak.total), facts)


def test_the_cure_fits_the_ailment() -> None:
    assert foreseen(1.0).remedy() is None
    tight = foreseen(0.99).remedy()
    assert tight is not None and "per_device_train_batch_size to " in tight and "gradient_checkpointing: true" in tight
    assert "gradient_checkpointing" not in str(foreseen(0.99, checkpointing={}).remedy())
    assert foreseen(0.99, rows=1).remedy() == "lower max_length"
    assert "use_peft" in str(foreseen(0.1).remedy())
    adapted = foreseen(0.1, adapter=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert "smaller models" in str(adapted.remedy()) and "use_peft" not in str(adapted.remedy())


@pytest.mark.parametrize(
    ("rows", "tokens"),
    [
        ([{"text": "a"}, {"text": "add 2 and 3 ."}], "add 2 and 3 ."),
        ([{"prompt": "add 2", "completion": " and 3"}, {"prompt": "a", "completion": "b"}], "add 2 and 3"),
        ([{"messages": [{"role": "user", "content": "add 2"}]}], "\nuser\nadd 2\n"),
    ],
)
def test_the_longest_row_is_found_in_every_shape(rows: list[dict], tokens: str) -> None:
    tokenizer = build_tokenizer()
    assert longest_row_of(Dataset.from_list(rows), tokenizer, "text") == len(tokenizer.encode(tokens)) + 1


def test_the_longest_row_of_token_ids_is_their_number() -> None:
    assert longest_row_of(Dataset.from_list([{"input_ids": [1, 2, 3]}, {"input_ids": [1]}]), build_tokenizer(), "text") == 3


@pytest.mark.parametrize(("source", "shape"), [("dataset", (4, 8)), ("student", (4, 16)), ("paired", (8, 16))])
def test_written_text_is_reckoned_with_where_it_is_trained_on_alone(
    world: World, tmp_path: Path, monkeypatch, source: str, shape: tuple[int, int]
) -> None:
    rows = Dataset.from_list([{"prompt": "add 2", "completion": " and 3 and 4 ."}] * 8)
    flags = [*common_flags(world.student, world.teacher, world.data, tmp_path / "out"), "--sequence_source", source]
    flags += "--per_device_train_batch_size 4 --per_device_eval_batch_size 2 --max_completion_length 8".split()
    seen: list[RunShape] = []
    monkeypatch.setattr(memory_report, "step_facts", lambda run: seen.append(run) or step_facts(run))
    settings = load_settings(None, "kd", flags)
    memory_report.foresee_memory(settings, None, (rows, rows), (build_tokenizer(), build_tokenizer()))
    assert (seen[0].batch.rows, seen[0].batch.tokens) == shape and seen[0].evaluation == BatchShape(2, 8)
