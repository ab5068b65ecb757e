"""Against a real vLLM: the teacher served is the teacher in this process. See `vllm_cpu.py` for how to have one.

Starting a server takes one to two minutes, and there are four starts.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from speckd.errors import CapabilityError, VocabularyError
from speckd.tasks.families import stream
from speckd.teachers.answers import Answer
from speckd.teachers.client import Load, ServerPool
from speckd.teachers.exchange import Timeouts
from speckd.teachers.vllm import VLLM
from tests.repository.files import PACKAGE, ROOT
from tests.served.vllm_cpu import RealServer

PYTHON = os.environ.get("SPECKD_VLLM", "")
SHARED = Path(os.environ.get("SPECKD_SHARED", ROOT.parent / "shared"))
STORIES, QUICKSTART = SHARED / "models" / "stories260K", PACKAGE / "quickstart" / "teacher"
BOUND = 1e-4
CLIENTS, REQUESTS = 64, 50
TIMES = Timeouts(ready_s=300, read_s=120, request_s=300, patience_s=600, backoff_s=0.2, longest_backoff_s=5)

pytestmark = [
    pytest.mark.skipif(
        not PYTHON, reason="NO REAL SERVER WAS TESTED: SPECKD_VLLM is not the python of an environment with vLLM (vllm_cpu.py)"
    ),
    pytest.mark.timeout(1800),
]


class Local:
    """A model in this process: the oracle. Sequences are texts that it knows, of several lengths."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.vocabulary = self.model.config.vocab_size
        self.longest = self.model.config.max_position_embeddings - 1

    def texts(self) -> list[tuple[str, list[int]]]:
        if self.vocabulary == 512:
            found = ["Once upon a time, there was a girl named Lily.", 'Tom had a big red ball! He said, "Let\'s play."']
        else:
            found = [example.prompt for example in islice(stream("train"), 6)]
        return [(text, self.tokenizer(text, add_special_tokens=False).input_ids) for text in found]

    @torch.no_grad()
    def sequences(self, count: int, longest: int) -> list[torch.Tensor]:
        """Drawn from the model itself, after a text's start."""
        generator = torch.Generator().manual_seed(0)
        width = min(longest, self.longest)
        starts = torch.tensor([(ids * width)[:4] for _, ids in self.texts()])
        ids = starts[torch.arange(count) % len(starts)]
        while ids.shape[1] < width:
            logits = self.model(ids).logits[:, -1]
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
        lengths = torch.randint(6, width + 1, (count,), generator=generator)
        return [row[:length] for row, length in zip(ids, lengths, strict=True)]

    @torch.no_grad()
    def log_probs(self, ids: torch.Tensor) -> torch.Tensor:
        """[T, V]"""
        return self.model(ids[None]).logits[0].double().log_softmax(-1)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as there:
        return there.getsockname()[1]


@pytest.fixture(scope="module", params=[STORIES, QUICKSTART], ids=["stories260K", "quickstart"])
def local(request) -> Local:
    if not request.param.exists():
        pytest.skip(f"NO REAL SERVER WAS TESTED: {request.param} is not there; SPECKD_SHARED says where models are")
    return Local(request.param)


@pytest.fixture(scope="module")
def server(local: Local, tmp_path_factory) -> Iterator[RealServer]:
    log = tmp_path_factory.mktemp("vllm") / "log"
    with RealServer(PYTHON, Path(local.model.name_or_path), free_port(), log, "--max-logprobs", "-1") as started:
        yield started


def pool_of(server: RealServer, local: Local, top_k: int | None, load: Load | None = None) -> ServerPool:
    return ServerPool([server.url], VLLM(), vocabulary=local.vocabulary, top_k=top_k, timeouts=TIMES, load=load)


def positions_of(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(ids) // 3, len(ids) - 1)


def ask_all(pool: ServerPool, sequences: list[torch.Tensor]) -> list[Answer]:
    return pool.gather([pool.ask(ids, positions_of(ids)) for ids in sequences])


def distance(answer: Answer, ids: torch.Tensor, local: Local) -> float:
    """The largest in log-probability, of the label, of each token listed, and of the one of that rank."""
    expected = local.log_probs(ids)[answer.positions]
    label = (expected.gather(1, ids[answer.positions + 1][:, None])[:, 0] - answer.label_log_probs).abs().max()
    if answer.token_ids is None:
        return float(torch.maximum(label, (expected - answer.log_probs).abs().max()))
    own = (expected.gather(1, answer.token_ids) - answer.log_probs).abs().max()
    ranked = (expected.topk(answer.token_ids.shape[1]).values - answer.log_probs).abs().max()
    return float(torch.stack([label, own, ranked]).max())


@pytest.mark.parametrize("top_k", [32, None], ids=["32", "whole"])
def test_it_is_the_model_in_this_process(server: RealServer, local: Local, top_k: int | None) -> None:
    sequences = local.sequences(24, 100)
    with pool_of(server, local, top_k) as pool:
        (facts,) = pool.probe(longest=local.longest, texts=local.texts())
        assert facts.repeats_tokens and facts.repeats_request and facts.tokenizer_checked
        answers = ask_all(pool, sequences)
        counts = pool.counters
    worst = max(distance(answer, ids, local) for answer, ids in zip(answers, sequences, strict=True))
    print(f"\nlargest distance {worst:.2e}, noise {facts.noise:.2e}, {counts}")
    assert worst < BOUND
    assert counts.invalid == counts.retries == counts.failed == counts.outside == 0


def test_another_tokenizer_is_refused(server: RealServer, local: Local) -> None:
    with pool_of(server, local, 4) as pool, pytest.raises(VocabularyError, match="wrong tokenizer"):
        pool.probe(longest=20, texts=[(text, ids[::-1]) for text, ids in local.texts()])


def test_a_sequence_too_long_is_refused_with_the_flag(server: RealServer, local: Local) -> None:
    flag = f"--max-model-len {local.longest + 2}"
    with pool_of(server, local, 4) as pool, pytest.raises(CapabilityError, match=flag):
        pool.probe(longest=local.longest + 1, texts=local.texts())


def test_a_load_of_many_clients(server: RealServer, local: Local) -> None:
    """64 × 50 requests at once: each answer is its solo answer, none is lost."""
    if local.vocabulary != 512:
        pytest.skip("one model is enough for the load")
    sequences = local.sequences(200, 48)
    answers: list[list[Answer]] = []
    with pool_of(server, local, 8, Load(concurrency=1, tokens=1)) as alone:
        alone.probe(longest=local.longest, texts=local.texts())
        solo = [alone.gather([alone.ask(ids, positions_of(ids))])[0] for ids in sequences]
    with pool_of(server, local, 8, Load(concurrency=8, tokens=2048)) as pool:
        pool.probe(longest=local.longest, texts=local.texts())

        def client(number: int) -> None:
            answers.append(ask_all(pool, [sequences[(number * 7 + i) % 200] for i in range(REQUESTS)]))
            numbers.append(number)

        numbers: list[int] = []
        start = time.monotonic()
        threads = [threading.Thread(target=client, args=[number]) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts, seconds = pool.counters, time.monotonic() - start
    assert sorted(numbers) == list(range(CLIENTS))
    worst = 0.0
    for number, own in zip(numbers, answers, strict=True):
        for i, answer in enumerate(own):
            expected = solo[(number * 7 + i) % 200]
            assert torch.equal(answer.positions, expected.positions)
            worst = max(worst, float((answer.label_log_probs - expected.label_log_probs).abs().max()))
            worst = max(worst, float((answer.log_probs - expected.log_probs).abs().max()))
    print(f"\n{CLIENTS * REQUESTS} answers in {seconds:.0f} s, largest distance from the solo ones {worst:.2e}, {counts}")
    assert worst < BOUND
    assert counts.asked == counts.answered == CLIENTS * REQUESTS and counts.failed == counts.invalid == 0


def test_killed_and_started_again(server: RealServer, local: Local) -> None:
    """In the middle of a run: nothing is lost, and what comes after is as before."""
    if local.vocabulary != 512:
        pytest.skip("one model is enough for the kill")
    sequences = local.sequences(300, 64)
    with pool_of(server, local, 32, Load(concurrency=2, tokens=256)) as pool:
        pool.probe(longest=local.longest, texts=local.texts())
        futures = [pool.ask(ids, positions_of(ids)) for ids in sequences]
        while pool.counters.answered < 30:
            time.sleep(0.01)
        server.kill()
        before = pool.counters.answered
        server.start()
        server.wait()
        answers = pool.gather(futures)
        counts = pool.counters
    assert before < 300
    worst = max(distance(answer, ids, local) for answer, ids in zip(answers, sequences, strict=True))
    print(f"\nkilled after {before} of 300, largest distance {worst:.2e}, {counts}")
    assert worst < BOUND
    assert counts.asked == counts.answered == 300 and counts.retries > 0 and counts.failed == counts.invalid == 0


def test_a_cap_too_low_is_refused_with_the_flag(tmp_path: Path) -> None:
    local = Local(QUICKSTART)
    with RealServer(PYTHON, QUICKSTART, free_port(), tmp_path / "log", "--max-logprobs", "20") as server:
        with pool_of(server, local, 32) as pool, pytest.raises(CapabilityError) as error:
            pool.probe(longest=64, texts=local.texts())
        with pool_of(server, local, None) as pool, pytest.raises(CapabilityError, match="--max-logprobs -1"):
            pool.probe(longest=64, texts=local.texts())
        with pool_of(server, local, 20) as pool:
            pool.probe(longest=64, texts=local.texts())
    print(f"\n{error.value}")
    assert "--max-logprobs 32" in str(error.value) and server.url in str(error.value)
