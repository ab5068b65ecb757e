"""What is found out before the first batch, what may be asked, and what a run sees of the servers besides answers."""

import asyncio
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from speckd.errors import CapabilityError, ConfigError, DataError, SpeckdError, TeacherLostError, VocabularyError
from speckd.teachers.client import Load, ServerPool
from speckd.teachers.exchange import KEY_VARIABLE, Timeouts, is_loopback, server_url
from speckd.teachers.sglang import SGLang
from speckd.teachers.vllm import VLLM
from tests.teachers import faulty_server as f
from tests.teachers.episodes import LOAD, TEXTS, TIMES, questions
from tests.teachers.faulty_server import FaultyServer
from tests.teachers.toy import VOCABULARY, Toy, same, tokenized

QUICK = Timeouts(connect_s=0.3, read_s=0.3, request_s=0.5, ready_s=0.5, patience_s=0.5, backoff_s=0.01, longest_backoff_s=0.1)
PATIENT = Timeouts(backoff_s=0.005, longest_backoff_s=0.02)
CLIENTS = 64
TOY = Toy()


@pytest.fixture
def enter() -> Iterator:
    with ExitStack() as stack:
        yield stack.enter_context


def pool_of(*urls: str, top_k: int | None = 4, **changed) -> ServerPool:
    settings = {"vocabulary": VOCABULARY, "timeouts": QUICK, "load": LOAD, **changed}
    return ServerPool(urls, settings.pop("dialect", VLLM()), top_k=top_k, **settings)


def all_right(pool: ServerPool, top_k: int | None, toy: Toy = TOY, count: int = 12) -> bool:
    asked = questions(3, count)
    answers = pool.gather([pool.ask(torch.tensor(tokens), torch.tensor(places)) for tokens, places in asked])
    return all(same(answer, toy.answer(*question, top_k)) for answer, question in zip(answers, asked, strict=True))


@pytest.mark.parametrize("dialect", [VLLM(), SGLang()], ids=["vllm", "sglang"])
@pytest.mark.parametrize("top_k", [1, 4, VOCABULARY, 500])
def test_top_k(enter, dialect, top_k: int) -> None:
    pool = enter(pool_of(enter(FaultyServer()).url, top_k=top_k, dialect=dialect))
    (facts,) = pool.probe(longest=24, texts=TEXTS)
    assert facts.model == "toy" and facts.noise == 0 and facts.repeats_tokens and facts.repeats_request
    assert facts.tokenizer_checked
    assert all_right(pool, min(top_k, VOCABULARY))


def test_the_whole_vocabulary(enter) -> None:
    pool = enter(pool_of(enter(FaultyServer()).url, top_k=None))
    pool.probe(longest=24, texts=TEXTS)
    assert all_right(pool, None)


@pytest.mark.parametrize("top_k", [4, 32])
def test_tokens_of_the_teacher_alone_are_left_out_and_counted(enter, top_k: int) -> None:
    """K tokens of the shared vocabulary all the same, and nothing else changed: what they had is the tail's."""
    larger = Toy(size=VOCABULARY + 40)
    pool = enter(pool_of(enter(FaultyServer(larger)).url, top_k=top_k))
    pool.probe(longest=24, texts=TEXTS)
    assert all_right(pool, top_k, larger)
    assert pool.counters.outside > 0


def test_several_servers_share_the_load(enter) -> None:
    servers = [enter(FaultyServer()) for _ in range(3)]
    pool = enter(pool_of(*(server.url for server in servers)))
    pool.probe(longest=24)
    assert all_right(pool, 4, count=60)
    assert all(server.answered > 5 for server in servers)


def test_requests_hold_no_more_tokens_than_allowed(enter) -> None:
    server = enter(FaultyServer())
    pool = enter(pool_of(server.url, load=Load(concurrency=1, tokens=100)))
    pool.probe(longest=24)
    assert all_right(pool, 4, count=100)
    requests, canary = server.seen_tokens[3:], 16
    assert max(requests) <= 100 + canary and len(requests) < 40


def test_a_load_of_many_clients(enter) -> None:
    """64 × 50 requests: each answer is the solo one, none is lost."""
    server = enter(FaultyServer())
    pool = enter(pool_of(server.url, timeouts=PATIENT, load=Load(concurrency=8, tokens=400)))
    pool.probe(longest=24)
    wrong: list[int] = []

    def client(number: int) -> None:
        asked = questions(number % 8, 50)
        answers = pool.gather([pool.ask(torch.tensor(tokens), torch.tensor(places)) for tokens, places in asked])
        wrong.extend(number for q, a in zip(asked, answers, strict=True) if not same(a, Toy().answer(*q, 4)))

    threads = [threading.Thread(target=client, args=[number]) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    counts = pool.counters
    assert counts.asked == counts.answered == CLIENTS * 50 and counts.failed == counts.invalid == counts.retries == 0


def test_readiness_is_awaited(enter) -> None:
    server = enter(FaultyServer())
    asyncio.run_coroutine_threadsafe(server.die(back_after_s=0.3), server._loop).result()
    pool = enter(pool_of(server.url, timeouts=TIMES))
    pool.probe(longest=24)
    assert all_right(pool, 4)


REFUSALS = {
    "not there": ({}, {}, TeacherLostError, "not ready after 0.5 s", "Start it"),
    "crashes": ({"fault": f.fail_and_die, "share": 1}, {}, TeacherLostError, "before that: HTTP 500: EngineCore", "Start it"),
    "the server's cap": ({"cap": 3}, {}, CapabilityError, "fewer than 4 log-probabilities", "--max-logprobs 4,"),
    "too short": ({"longest": 24}, {}, CapabilityError, "takes 23 tokens, and the longest", "--max-model-len 25,"),
    "another model": ({}, {"model": "other"}, ConfigError, "offers toy; wanted: other", "Name one of these"),
    "another tokenizer": ({"tokenize": lambda text: [1]}, {}, VocabularyError, "wrong tokenizer: 'a canary", "Serve a"),
    "raw logits": ({"fault": f.raw_logits, "share": 1}, {}, CapabilityError, "--logprobs-mode raw_logprobs", "newer"),
    "low logits": ({"fault": f.low_logits, "share": 1}, {}, CapabilityError, "--logprobs-mode raw_logprobs", "newer"),
    "no echo": ({"repeats": False}, {}, CapabilityError, "mixed up unseen", "vLLM 0.10.2"),
    "a web page": ({"fault": f.html, "share": 1}, {}, CapabilityError, "it is no JSON: b'<html>", "Check the address"),
    "no key": ({"fault": f.status(401), "share": 1}, {}, ConfigError, "HTTP 401: a 401 of this server", KEY_VARIABLE),
    "a moody one": ({"fault": f.other_model, "share": 1, "start": 2}, {}, CapabilityError, "gives one question two", "prefix"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_serve_is_refused_with_the_fix(enter, name: str) -> None:
    server_is, pool_is, kind, what, fix = REFUSALS[name]
    server = enter(FaultyServer(**server_is))
    if name == "not there":
        asyncio.run_coroutine_threadsafe(server.die(back_after_s=60), server._loop).result()
    pool = enter(pool_of(server.url, **pool_is))
    with pytest.raises(kind) as error:
        pool.probe(longest=24, texts=TEXTS)
    assert type(error.value) is kind
    assert server.url in error.value.what and what in error.value.what and fix in error.value.fix
    assert "\n" not in str(error.value)


def test_a_mute_server_is_not_waited_for_longer_than_said(enter) -> None:
    """It takes the connection, and one request may take an hour."""
    server = enter(FaultyServer(fault=f.silence, share=1))
    pool = enter(pool_of(server.url, timeouts=replace(QUICK, read_s=3600, request_s=3600)))
    with pytest.raises(TeacherLostError, match=f"{server.url} is not ready after 0.5 s: it gave no answer. See its own log"):
        pool.probe(longest=24)


def test_servers_of_two_models_are_refused(enter) -> None:
    pool = enter(pool_of(enter(FaultyServer()).url, (other := enter(FaultyServer(Toy(seed=1)))).url))
    with pytest.raises(CapabilityError, match=f"{other.url} .* the model is another one"):
        pool.probe(longest=24)


def test_a_resumed_run_knows_its_teacher(enter) -> None:
    first = enter(pool_of(enter(FaultyServer()).url))
    first.probe(longest=24, texts=TEXTS)
    enter(pool_of(enter(FaultyServer()).url)).probe(longest=24, texts=TEXTS, remembered=first.canary)
    other = enter(pool_of(enter(FaultyServer(Toy(seed=1))).url))
    with pytest.raises(CapabilityError, match="the model is another one"):
        other.probe(longest=24, texts=TEXTS, remembered=first.canary)


def test_the_key_comes_from_the_environment_and_is_never_shown(enter, monkeypatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "s3cret-k3y")
    server = enter(FaultyServer())
    pool = enter(pool_of(server.url))
    pool.probe(longest=24)
    assert all(headers["authorization"] == "Bearer s3cret-k3y" for headers in server.seen_headers)
    refusing = enter(FaultyServer(fault=f.status(403), share=1))
    with pytest.raises(ConfigError) as error:
        enter(pool_of(refusing.url)).probe(longest=24)
    assert "s3cret" not in str(error.value)
    monkeypatch.setenv(KEY_VARIABLE, "two words")
    with pytest.raises(ConfigError, match="something other than a key"):
        pool_of(server.url)


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(enter, monkeypatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    pool = enter(pool_of(enter(FaultyServer()).url))
    pool.probe(longest=24)
    assert all_right(pool, 4)


def test_https_to_a_server_without_is_no_answer(enter) -> None:
    server = enter(FaultyServer())
    with pytest.raises(TeacherLostError, match="is not ready"):
        enter(pool_of(server.url.replace("http", "https"))).probe(longest=24)


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("ftp://host", "is no teacher server's address"),
        ("host:8000", "is no teacher server's address"),
        ("http://", "is no teacher server's address"),
        ("http://host?x=1", "'http://host' with a query or fragment is no teacher server's address"),
        ("http://host/path?api_key=pass@", "is no teacher server's address"),
        ("http://host/?api_key=s3cret", "'http://host/' with a query or fragment is no"),
        ("http://host/#s3cret", "'http://host/' with a query or fragment is no"),
        ("me:pass@host:8000", "what holds an '@' is no teacher server's address"),
        ("http://host?token=s3cret&me:pass@x", "what holds an '@' is no"),
        ("ftp://me:pass@host", "the address of the teacher server host holds a password"),
        ("http://me:pass@host", "the address of the teacher server host holds a password"),
        ("http://[::1", "cannot be read"),
    ],
)
def test_addresses_that_are_refused(url: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as error:
        server_url(url)
    assert not {"pass", "s3cret"} & set(re.split(r"\W", str(error.value)))


def test_addresses() -> None:
    assert server_url("http://host:8000/v1/") == server_url("http://host:8000") == "http://host:8000"
    assert server_url("https://host/behind/a/proxy") == "https://host/behind/a/proxy"
    local = ["http://localhost:1", "http://127.3.2.1", "http://[::1]:8000"]
    assert all(map(is_loopback, local)) and not any(
        map(is_loopback, ["http://host", "http://192.0.2.1", "http://localhost.com"])
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: Timeouts(read_s=0),
        lambda: Timeouts(patience_s=float("inf")),
        lambda: Load(concurrency=0),
        pool_of,
        lambda: pool_of("http://a", "http://a/v1"),
        lambda: pool_of("http://a", top_k=0),
    ],
)
def test_settings_that_are_refused(make) -> None:
    with pytest.raises(ConfigError):
        make()


def test_what_cannot_be_asked(enter) -> None:
    pool = enter(pool_of(enter(FaultyServer(longest=30)).url))
    one = torch.tensor([1, 2, 3])
    with pytest.raises(RuntimeError, match="not probed"):
        pool.ask(one, one[:1])
    pool.probe(longest=24)
    for wrong in (torch.tensor([1, VOCABULARY, 3]), torch.tensor([1, -1, 3])):
        with pytest.raises(VocabularyError, match="at position 1 lies outside"):
            pool.ask(wrong, one[:1])
    for places in ([2], [1, 0], [0, 0], [-1]):
        with pytest.raises(ValueError, match="ascend"):
            pool.ask(one, torch.tensor(places))
    with pytest.raises(DataError, match=r"of 40 tokens is too long .* \(29\)\. Start it with --max-model-len 41"):
        pool.ask(torch.ones(40, dtype=torch.int64), torch.tensor([38]))
    nothing = pool.ask(one, torch.tensor([], dtype=torch.int64)).result()
    assert nothing.log_probs.shape == (0, 4) and nothing.token_ids is not None and nothing.token_ids.shape == (0, 4)
    assert pool.counters.asked == 0


def test_no_more_is_sent_of_a_sequence_than_is_needed(enter) -> None:
    server = enter(FaultyServer())
    pool = enter(pool_of(server.url))
    pool.probe(longest=24)
    pool.ask(torch.arange(20), torch.tensor([0, 2])).result()
    assert server.seen_tokens[-1] == 4 + 16


def test_closing_ends_what_is_open(enter) -> None:
    server = enter(FaultyServer(fault=f.silence, share=1, start=3))
    pool = pool_of(server.url, timeouts=Timeouts())
    pool.probe(longest=24)
    waiting = [pool.ask(torch.arange(8), torch.tensor([2])) for _ in range(30)]
    pool.close()
    assert all(isinstance(future.exception(timeout=1), TeacherLostError) for future in waiting)
    counts = pool.counters
    assert counts.asked == counts.failed == 30
    with pytest.raises(TeacherLostError):
        pool.ask(torch.arange(8), torch.tensor([2]))
    assert not any(thread.name == "speckd-teacher" for thread in threading.enumerate())


def test_a_lost_teacher_may_come_back(enter) -> None:
    """A caller that goes on after the error gets answers again, once there are some."""
    server = enter(FaultyServer())
    pool = enter(pool_of(server.url))
    pool.probe(longest=24)
    asyncio.run_coroutine_threadsafe(server.die(back_after_s=1.0), server._loop).result()
    with pytest.raises(TeacherLostError, match=f"for 0.5 s .*{server.url}: request speckd-.*: no connection"):
        pool.gather([pool.ask(torch.arange(8), torch.tensor([2]))])
    for _ in range(100):
        try:
            assert all_right(pool, 4)
            break
        except SpeckdError:
            continue
    else:
        pytest.fail("it never came back")


@pytest.mark.parametrize("top_k", [4, None])
def test_sglang_answers_that_are_not_the_asked_for_ones(enter, top_k: int | None) -> None:
    async def disorder(call) -> None:
        await call.send_json(call.good[::-1])

    async def other_names(call) -> None:
        for answer in call.good:
            answer["meta_info"]["id"] = "x-0"
        await call.send_json(call.good)

    async def short(call) -> None:
        call.good[0]["meta_info"]["input_top_logprobs"].pop()
        await call.send_json(call.good)

    for fault in (disorder, other_names, short):
        server = enter(FaultyServer(fault=fault, share=0.3, start=3))
        pool = enter(pool_of(server.url, dialect=SGLang(), timeouts=PATIENT, top_k=top_k))
        pool.probe(longest=24, texts=TEXTS)
        assert all_right(pool, top_k, count=60)
        assert pool.counters.invalid == server.struck > 0


def test_texts_and_canary() -> None:
    assert len(tokenized(TEXTS[0][0])) > 3
