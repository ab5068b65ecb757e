"""Episodes of a training's questions against servers that misbehave, and what each behaviour may lead to."""

import os
from dataclasses import dataclass, replace

import numpy as np
import torch

from speckd.errors import SpeckdError
from speckd.teachers.client import Load, ServerPool
from speckd.teachers.dialect import Dialect
from speckd.teachers.exchange import Timeouts
from speckd.teachers.vllm import VLLM
from tests.teachers import faulty_server as f
from tests.teachers.faulty_server import Fault, FaultyServer
from tests.teachers.toy import VOCABULARY, Toy, same, tokenized

SEEDS = int(os.environ.get("SPECKD_SERVER_SEEDS", "2"))
TOP_K = 4
BATCHES, QUESTIONS = 20, 2
TIMES = Timeouts(connect_s=0.5, read_s=0.3, request_s=0.8, ready_s=5.0, patience_s=1.0, backoff_s=0.005, longest_backoff_s=0.05)
LOAD = Load(concurrency=4, tokens=60, attempts=6)
TEXTS = [("a canary sings", tokenized("a canary sings")), ("x", tokenized("x"))]


@dataclass(frozen=True)
class Behaviour:
    """`share` of the answers, from number `start` on; `ends`: None where the run may either end or not."""

    name: str
    fault: Fault
    share: float = 0.3
    start: int = 3  # the start itself has three
    ends: bool | None = None

    @property
    def times(self) -> Timeouts:
        """Where the run must not end, a busy machine or a bad row of draws must not end it either."""
        return replace(TIMES, patience_s=60) if self.ends is False else TIMES

    @property
    def load(self) -> Load:
        return replace(LOAD, attempts=15) if self.ends is False else LOAD


#: What a fair share of good answers must be enough for.
PASSING = [
    f.latency, f.silence, f.stall_in_headers, f.stall_in_body, f.drip, f.reset_at_a_byte, f.end_at_a_byte, f.half_json,
    f.content_length_too_small, f.content_length_too_large, f.chunked_garbage, f.no_http, f.gzip_bomb, f.endless_body, f.html,
    f.too_many_requests, f.unavailable_with_a_date, f.retry_after_a_day, f.out_of_memory, f.too_large, f.twice, f.replayed,
    f.replayed_under_the_right_name, f.exchanged, f.exchanged_under_the_right_names, f.choices_in_disorder,
    f.choices_renumbered,
        f.choices_exchanged_without_names, f.choice_missing, f.choice_twice, f.tokens_not_repeated, f.other_request,
    f.other_model_name, f.other_tokenizer, f.one_token_short, f.shifted_by_one, f.nothing_somewhere, f.something_first,
    f.one_entry_less, f.ranks_exchanged, f.id_out_of_range, f.id_of_padding, f.id_negative, f.sums_to_more, f.raw_logits,
    f.low_logits, f.wrong_shape, f.nested_deeply, f.other_model, f.other_model_slightly,
]  # fmt: skip
NUMBERS = (float("nan"), float("inf"), 0.5, "x", None)
BEHAVIOURS = [
    *(Behaviour(fault.__name__, fault, share=0.2, ends=False) for fault in PASSING),
    *(Behaviour(f"status_{code}", f.status(code), share=0.2, ends=False) for code in (408, 413, 429, 500, 502, 503, 504)),
    *(Behaviour(f"status_{code}", f.status(code), share=0.1) for code in (400, 401, 403, 404, 405, 422)),
    *(Behaviour(f"number_{value}", f.number(value), share=0.2, ends=False) for value in NUMBERS),
    Behaviour("redirect", f.redirect, share=0.1),
    Behaviour("die_and_return", f.die_and_return, share=0.15, ends=False),
    Behaviour("out_of_memory_always", f.out_of_memory, share=1.0, ends=False),
    Behaviour("too_large_always", f.too_large, share=1.0, ends=False),
    Behaviour("die_for_good", f.die_for_good, share=1.0, start=8, ends=True),
    *(
        Behaviour(f"{fault.__name__}_always", fault, share=1.0, start=8, ends=True)
        for fault in (f.silence, f.other_model, f.html, f.shifted_by_one, f.choices_exchanged_without_names, f.redirect,
                      f.retry_after_a_day, f.reset_at_a_byte, f.low_logits, f.replayed)
    ),
    *(Behaviour(f"status_{code}_always", f.status(code), share=1.0, start=8, ends=True) for code in (400, 401, 413, 429, 500)),
]  # fmt: skip


@dataclass(frozen=True)
class Episode:
    """`answers`: good ones; `wrong`: others; `error`: what it ended with, if with an error; `struck`: faults met."""

    answers: int
    wrong: int
    error: SpeckdError | None
    struck: int
    accounts: tuple[int, int, int]


def questions(seed: int, count: int) -> list[tuple[list[int], list[int]]]:
    """(tokens, positions) of sequences as a run has them: a prompt that is not asked about, then some or all of the rest."""
    draws = np.random.default_rng(1000 + seed)
    found = []
    for _ in range(count):
        tokens = draws.integers(VOCABULARY, size=draws.integers(8, 25)).tolist()
        first = int(draws.integers(len(tokens) - 2))
        found.append((tokens, [p for p in range(first, len(tokens) - 1) if draws.random() < 0.8] or [first]))
    return found


def play(
    behaviour: Behaviour, seed: int, healthy: int = 0, top_k: int | None = TOP_K, dialect: Dialect | None = None
) -> Episode:
    """A batch ahead is asked, as a trainer does; `healthy`: how many other servers share the load."""
    faulty = FaultyServer(fault=behaviour.fault, share=behaviour.share, start=behaviour.start, seed=seed)
    others = [FaultyServer() for _ in range(healthy)]
    good = wrong = 0
    error = None
    asked = questions(seed, BATCHES * QUESTIONS)
    batches = [asked[i : i + QUESTIONS] for i in range(0, len(asked), QUESTIONS)]
    for server in (faulty, *others):
        server.__enter__()
    try:
        with ServerPool(
            [faulty.url, *(server.url for server in others)],
            dialect or VLLM(),
            vocabulary=VOCABULARY,
            top_k=top_k,
            timeouts=behaviour.times,
            load=behaviour.load,
        ) as pool:
            pool.probe(longest=32, texts=TEXTS)

            def ask(batch: list[tuple[list[int], list[int]]]) -> list:
                return [pool.ask(torch.tensor(tokens), torch.tensor(places)) for tokens, places in batch]

            ahead = ask(batches[0])
            for batch, following in zip(batches, [*batches[1:], []], strict=True):
                futures, ahead = ahead, ask(following)
                try:
                    answers = pool.gather(futures)
                except SpeckdError as raised:
                    error = raised
                    break
                right = [same(answer, Toy().answer(*question, top_k)) for answer, question in zip(answers, batch, strict=True)]
                good, wrong = good + sum(right), wrong + right.count(False)
        counts = pool.counters
    finally:
        for server in (faulty, *others):
            server.__exit__()
    return Episode(good, wrong, error, faulty.struck, (counts.asked, counts.answered, counts.failed))
