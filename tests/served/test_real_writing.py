"""Against a real vLLM: what its servers write, and whose weights wrote it. See `vllm_cpu.py` for how to have one.

Two servers are started, which takes one to two minutes each. The oracle is Transformers' greedy `generate` in this process.
"""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from speckd.errors import CapabilityError
from speckd.sources.server_writer import ServerWriter
from speckd.sources.weight_sync import Adapters, BoundedSync, Canary, WholeModels
from speckd.sources.writer import Draws, Prompt, Sampling
from speckd.teachers.exchange import Timeouts
from tests.repository.files import ROOT
from tests.served.vllm_cpu import RealServer
from tests.served.widened import widen
from tests.tiny import common_flags, log_of, run_cli, write_rows

PYTHON = os.environ.get("SPECKD_VLLM", "")
SHARED = Path(os.environ.get("SPECKD_SHARED", ROOT.parent / "shared"))
STORIES = SHARED / "models" / "stories260K"
END = 2
TEXTS = ("Once upon a time", "The little dog", "Tom had a big red ball", "Lily went to the", "One day")
GREEDY = Sampling(temperature=0, max_completion_length=24)

pytestmark = [
    pytest.mark.skipif(
        not PYTHON, reason="NO REAL SERVER WAS TESTED: SPECKD_VLLM is not the python of an environment with vLLM (vllm_cpu.py)"
    ),
    pytest.mark.skipif(not STORIES.exists(), reason=f"NO REAL SERVER WAS TESTED: {STORIES} is not there (SPECKD_SHARED)"),
    pytest.mark.timeout(1800),
]


def moved(model: Any, seed: int, scale: float) -> Any:
    """The same model with other weights, as after some training."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "norm" not in name:
                parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


def prompts() -> list[Prompt]:
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    return [Prompt(torch.tensor(tokenizer(text).input_ids), number) for number, text in enumerate(TEXTS)]


def greedy(model: Any) -> list[list[int]]:
    found = []
    for prompt in prompts():
        ids = prompt.token_ids[None]
        made = model.generate(input_ids=ids, do_sample=False, max_new_tokens=GREEDY.max_completion_length, eos_token_id=END)
        found.append(made[0, ids.shape[1] :].tolist())
    return found


def written(writer: ServerWriter, sampling: Sampling = GREEDY, draws: Draws | None = None) -> list[list[int]]:
    return [one.token_ids.tolist() for one in writer.write(prompts(), sampling, draws or Draws(0, 0))]


def canary_of(model: Any) -> Canary:
    ids = prompts()[2].token_ids

    @torch.no_grad()
    def log_probs() -> torch.Tensor:
        return model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]

    return Canary(ids, log_probs, tolerance=1e-3)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its head is its embedding."""
    return widen(STORIES, tmp_path_factory.mktemp("vllm") / "student")


@pytest.fixture(scope="module")
def base(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a head of its own."""
    folder = tmp_path_factory.mktemp("untied") / "student"
    model = AutoModelForCausalLM.from_pretrained(tied)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    model.config.tie_word_embeddings = False
    apart = LlamaForCausalLM(model.config)
    apart.load_state_dict(state)
    apart.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tied / name, folder / name)
    return folder


@contextmanager
def served(model: Path) -> Iterator[str]:
    """By a server that takes new weights, whole or as adapters."""
    with socket.create_server(("127.0.0.1", 0)) as there:
        port = there.getsockname()[1]
    more = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        with RealServer(PYTHON, model, port, model.parent / "log", *more) as started:
            yield started.url


@pytest.fixture(scope="module")
def url(base: Path) -> Iterator[str]:
    with served(base) as found:
        yield found


@pytest.fixture
def writer(url: str) -> Iterator[ServerWriter]:
    one = writer_at(url)
    yield one
    one.close()


def writer_at(url: str) -> ServerWriter:
    one = ServerWriter([url], stops=frozenset([END]), vocabulary=512, model="student", timeouts=Timeouts(read_s=120))
    one.probe(longest=100)
    return one


def test_greedy_text_is_that_of_this_process(writer: ServerWriter, base: Path) -> None:
    assert written(writer) == greedy(AutoModelForCausalLM.from_pretrained(base))


def test_the_stop_token_is_part_of_what_is_written(url: str, base: Path) -> None:
    """A token of the greedy text is made the end."""
    text = greedy(AutoModelForCausalLM.from_pretrained(base))[0]
    stop = text[5]
    one = ServerWriter([url], stops=frozenset([stop]), vocabulary=512, model="student")
    one.probe(longest=100)
    (found,) = one.write(prompts()[:1], GREEDY, Draws(0, 0))
    one.close()
    assert found.finished and found.token_ids.tolist() == text[: text.index(stop) + 1]


def test_seeds_repeat_and_differ(writer: ServerWriter) -> None:
    sampling = Sampling(max_completion_length=24)
    first = written(writer, sampling, Draws(1, 0))
    assert first == written(writer, sampling, Draws(1, 0))
    assert first != written(writer, sampling, Draws(1, 1)) and first != written(writer, sampling, Draws(2, 0))


def test_after_a_synchronisation_greedy_text_is_the_adapted_students(writer: ServerWriter, base: Path, tmp_path: Path) -> None:
    student = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"]),
    )
    sync = BoundedSync(writer, student.save_pretrained, tmp_path, Adapters(), canary_of(student))
    seen = [written(writer)]
    for step in range(3):
        moved(student, step, 0.1)
        sync.sync(step)
        assert sync.weights_step == step and str(writer.model).endswith(f"-step-{step}")
        seen.append(written(writer))
        assert seen[-1] == greedy(student)
    assert len(set(map(str, seen))) == len(seen), "otherwise nothing was shown"


@pytest.fixture(scope="module")
def teacher(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moved") / "teacher"
    moved(AutoModelForCausalLM.from_pretrained(base), 7, 0.03).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder / name)
    return folder


def trained(base: Path, teacher: Path, output: Path, *more: str) -> list[dict[str, float]]:
    """The log of a run on greedy text by the student, which changes much in each step."""
    rows = [{"prompt": text, "completion": " and they were happy."} for text in TEXTS[:4]]
    data = write_rows(output.parent / "rows.jsonl", rows)
    flags = "--recipe ungated --sequence_source student --sampling_temperature 0 --max_completion_length 24 --max_steps 4"
    flags += " --learning_rate 0.003 --per_device_train_batch_size 4 --num_train_epochs 4"
    torch.manual_seed(0)  # an adapter starts as this process's generator stands
    assert run_cli([*common_flags(base, teacher, data, output), *flags.split(), *more]) == 0
    return log_of(output)


def require_same_training(base: Path, teacher: Path, url: str, place: Path, *more: str) -> None:
    here = trained(base, teacher, place / "here", *more)
    there = trained(base, teacher, place / "there", *more, "--student_server_urls", url, "--student_server_model", "student")
    names = ("loss", "grad_norm", "completions/mean_length", "on_policy/fraction", "on_policy/staleness")
    assert len(there) == len(here) == 4
    for a, b in zip(there, here, strict=True):
        assert [a[name] for name in names] == pytest.approx([b[name] for name in names], rel=1e-4)


def test_training_on_a_servers_text_is_training_on_this_processs(url: str, base: Path, teacher: Path, tmp_path: Path) -> None:
    lora = "--use_peft true --lora_r 8 --lora_dropout 0 --lora_target_modules q_proj v_proj up_proj".split()
    require_same_training(base, teacher, url, tmp_path, *lora)


def test_so_it_is_with_whole_models(url: str, base: Path, teacher: Path, tmp_path: Path) -> None:
    require_same_training(base, teacher, url, tmp_path)


def test_after_a_synchronisation_greedy_text_is_the_whole_students(writer: ServerWriter, base: Path, tmp_path: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(base)
    sync = BoundedSync(writer, student.save_pretrained, tmp_path, WholeModels(), canary_of(student), max_staleness=1)
    seen = []
    for step in range(0, 6, 2):
        moved(student, step, 0.02)
        sync.sync(step)
        seen.append(written(writer))
        assert seen[-1] == greedy(student)
        sync.sync(step + 1)
        assert sync.weights_step == step
    assert len(set(map(str, seen))) == len(seen), "otherwise nothing was shown"


def test_weights_that_did_not_arrive_are_noticed(tied: Path, tmp_path: Path) -> None:
    """vLLM 0.32 reloads no head that is tied to its embedding, and answers that all is loaded."""
    student = AutoModelForCausalLM.from_pretrained(tied)
    with served(tied) as url:
        writer = writer_at(url)
        sync = BoundedSync(writer, student.save_pretrained, tmp_path, WholeModels(), canary_of(student))
        moved(student, 0, 0.02)
        with pytest.raises(CapabilityError, match="says that it holds the student's weights, but is"):
            sync.sync(1)
        writer.close()
    assert sync.weights_step is None
