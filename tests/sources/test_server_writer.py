"""Text by servers: every prompt once, as asked, whatever a server does; and weights that are never older than allowed."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from speckd.errors import CapabilityError, ConfigError, TeacherLostError, VocabularyError
from speckd.sources import weight_sync
from speckd.sources.server_writer import ServerWriter, seed_of
from speckd.sources.weight_sync import Adapters, BoundedSync, Canary, WholeModels
from speckd.sources.writer import Completion, Draws, Prompt, Sampling
from speckd.teachers.client import Load
from speckd.teachers.exchange import Timeouts
from tests.sources.writing_server import END, SAID, Fault, WritingServer, broken, changed, continued, slow, status

TIMES = Timeouts(connect_s=1, read_s=0.5, request_s=1, ready_s=5, patience_s=1, backoff_s=0.01, longest_backoff_s=0.05)
#: Where no server is silent, nor late: however busy the machine, no request is given up.
UNHURRIED = replace(TIMES, read_s=30, request_s=60, ready_s=60, patience_s=60)
SAMPLING, DRAWS = Sampling(max_completion_length=5), Draws(seed=3, turn=2)
PROMPTS = [Prompt(torch.tensor([2 + n, 3, 4]), n) for n in range(20)]


def writer_of(*servers: WritingServer, attempts: int = 6, probed: bool = True, times: Timeouts = TIMES) -> ServerWriter:
    load = Load(concurrency=3, attempts=attempts)
    writer = ServerWriter([s.url for s in servers], stops=frozenset([END]), vocabulary=64, timeouts=times, load=load)
    if probed:
        writer.probe(longest=10)
    return writer


def expected(prompts: Sequence[Prompt], weights: str = "first") -> list[tuple[list[int], bool]]:
    found = [continued(p.token_ids.tolist(), seed_of(p, DRAWS), weights, SAMPLING.max_completion_length) for p in prompts]
    return [(ids, ids[-1:] == [END]) for ids in found]


def plain(written: list[Completion]) -> list[tuple[list[int], bool]]:
    return [(one.token_ids.tolist(), one.finished) for one in written]


def test_every_prompt_is_continued_once_and_in_its_place() -> None:
    with WritingServer() as one, WritingServer() as two:
        writer = writer_of(one, two)
        found = plain(writer.write(PROMPTS, SAMPLING, DRAWS))
        assert found == expected(PROMPTS) and writer.write([], SAMPLING, DRAWS) == []
        writer.close()
        assert one.asked and two.asked and len(one.asked) + len(two.asked) == len(PROMPTS), "shared, and nothing asked twice"
        asked = one.asked[0]
    assert any(not finished for _, finished in found) and any(ids == [END] for ids, _ in found), "cut off, and empty"
    assert (asked["temperature"], asked["top_k"], asked["top_p"], asked["max_tokens"]) == (1.0, 0, 1.0, 5)
    assert asked["stop_token_ids"] == [END] and asked["return_token_ids"] and not asked["add_special_tokens"]


def test_seeds_are_a_function_of_who_asks() -> None:
    prompts = [Prompt(torch.tensor([1]), n) for n in range(50)]
    seeds = {seed_of(p, Draws(s, t)) for p in prompts for s in range(3) for t in range(3)}
    assert len(seeds) == 450 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(prompts[7], Draws(1, 2)) == seed_of(Prompt(torch.tensor([9, 9]), 7), Draws(1, 2))


FAULTS = {
    "busy": status(503),
    "broken inside": status(500),
    "cut": broken,
    "slow": slow,
    "other tokens": changed(prompt_token_ids=[9]),
    "other model": changed(model="another"),
    "other request": changed(id="cmpl-1"),
    "too long": changed(token_ids=[2] * 6),
    "no token": changed(token_ids=[2, "x"]),
    "negative": changed(token_ids=[-1]),
    "short": changed(token_ids=[2], finish_reason="length"),
    "aborted": changed(token_ids=[2], finish_reason="abort"),
    "no choice": changed(choices=[]),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_cannot_be_believed_is_asked_again(fault: Fault) -> None:
    with WritingServer(faults=[None, fault, fault, None, fault]) as one:
        writer = writer_of(one)
        assert plain(writer.write(PROMPTS, SAMPLING, DRAWS)) == expected(PROMPTS)
        assert len(one.asked) > len(PROMPTS)
        writer.close()


def test_one_that_dies_is_survived() -> None:
    with WritingServer() as one:
        two = WritingServer().__enter__()
        writer = writer_of(one, two)
        two.die()
        assert plain(writer.write(PROMPTS, SAMPLING, DRAWS)) == expected(PROMPTS)
        writer.close()


def test_one_that_refuses_is_not_asked_the_same_again() -> None:
    with WritingServer(faults=[status(400)] * 99) as one, WritingServer() as two:
        writer = writer_of(one, two)
        assert plain(writer.write(PROMPTS, SAMPLING, DRAWS)) == expected(PROMPTS)
        writer.close()


def test_all_lost_ends_with_the_cause_within_patience() -> None:
    one = WritingServer().__enter__()
    writer = writer_of(one)
    one.die()
    start = time.monotonic()
    with pytest.raises(TeacherLostError, match=r"no server that writes has answered for 1 s \(http://127.*no connection"):
        writer.write(PROMPTS, SAMPLING, DRAWS)
    assert time.monotonic() - start < 5
    writer.close()


@pytest.mark.parametrize(
    ("fault", "said"),
    [(status(400), "HTTP 400: told so"), (changed(model="another"), "the last of 3: a wrong answer: it is by the model")],
)
def test_what_fails_everywhere_ends_the_writing(fault: Fault, said: str) -> None:
    with WritingServer(faults=[fault] * 99) as one:
        writer = writer_of(one, attempts=3)
        with pytest.raises(TeacherLostError, match=said):
            writer.write(PROMPTS[:2], SAMPLING, DRAWS)
        writer.close()


def test_tokens_that_the_student_lacks_are_refused() -> None:
    with WritingServer(faults=[changed(token_ids=[64, END], finish_reason="stop")]) as one:
        writer = writer_of(one)
        with pytest.raises(VocabularyError, match="wrote token 64, outside of the shared vocabulary of 64"):
            writer.write(PROMPTS[:1], SAMPLING, DRAWS)
        writer.close()


def test_a_server_that_cannot_is_refused_before_anything_is_asked() -> None:
    with WritingServer(longest=9) as one:
        with pytest.raises(CapabilityError, match=r"takes 9 tokens with their completion.*--max-model-len 10"):
            writer_of(one)
        writer = ServerWriter([one.url], stops=frozenset([1]), vocabulary=64, model="other", timeouts=TIMES)
        with pytest.raises(ConfigError, match="offers toy; wanted: other"):
            writer.probe(longest=5)
        writer.close()
    with pytest.raises(ConfigError, match="named twice"):
        ServerWriter(["http://a", "http://a/v1"], stops=frozenset(), vocabulary=1)


# ---- weights ---------------------------------------------------------------------------------------------------------------


#: Of every token the scripted server says the same.
CANARY = Canary(torch.tensor([2, 3, 4]), lambda: torch.full((2,), SAID))


def test_weights_that_are_not_the_students_are_noticed(tmp_path: Path) -> None:
    """A server that says it has loaded them, and has not."""
    other = Canary(torch.tensor([2, 3, 4]), lambda: torch.tensor([SAID, SAID - 0.3]))
    with WritingServer() as one:
        writer = writer_of(one)
        sync = BoundedSync(writer, lambda folder: folder.mkdir(), tmp_path, WholeModels(), other)
        with pytest.raises(CapabilityError, match=r"says that it holds the student's weights, but is 0\.15 nat off"):
            sync.sync(0)
        assert sync.weights_step is None
        writer.close()


@pytest.mark.parametrize("loading", [Adapters, WholeModels])
def test_weights_are_never_older_than_allowed(loading: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []  # whatever a command run before has done to the logger's handlers
    monkeypatch.setattr(weight_sync.logger, "info", lambda text, *values: said.append(text % values))
    with WritingServer(lost_answers=(1, 4, 6)) as one, WritingServer() as two:
        writer = writer_of(one, two, times=UNHURRIED)
        sync = BoundedSync(writer, lambda folder: folder.mkdir(), tmp_path, loading(), CANARY, max_staleness=2)
        assert sync.weights_step is None
        for step in range(8):
            sync.sync(step)
            assert sync.weights_step == step - step % 3 and sync.staleness(step) == step % 3
            held = str(tmp_path / f"step-{sync.weights_step}")
            assert plain(writer.write(PROMPTS[:4], SAMPLING, DRAWS)) == expected(PROMPTS[:4], held)
            assert [path.name for path in tmp_path.iterdir()] == [f"step-{sync.weights_step}"]
        assert all(len(server.adapters) == (loading is Adapters) for server in (one, two))
        writer.close()
    assert len(said) == 3 and "step 6 (renewed after 3 steps)" in said[-1]


def test_an_adapter_that_comes_back_late_is_removed(tmp_path: Path) -> None:
    """A request to load it was given up, asked again, and done once more after the adapter had been removed."""
    with WritingServer() as one:
        writer = writer_of(one, times=UNHURRIED)
        sync = BoundedSync(writer, lambda folder: folder.mkdir(parents=True), tmp_path / "weights", Adapters(), CANARY)
        sync.sync(0)
        late = dict(one.adapters)
        sync.sync(1)
        one.adapters |= late
        sync.sync(2)
        assert [*one.adapters] == [writer.model] and str(writer.model).endswith("step-2")
        sync.close()
        assert not one.adapters and not (tmp_path / "weights").exists() and sync.weights_step is None
        writer.close()


def test_a_server_that_cannot_take_weights_is_named(tmp_path: Path) -> None:
    with WritingServer() as one:
        writer = writer_of(one)
        one.administer = lambda path, body: (404, {"detail": "Not Found"})  # type: ignore[method-assign]
        sync = BoundedSync(writer, lambda folder: folder.mkdir(), tmp_path, Adapters(), CANARY)
        with pytest.raises(ConfigError, match="HTTP 404"):
            sync.sync(0)
        assert sync.weights_step is None
        writer.close()
    with pytest.raises(ConfigError, match="max_staleness is -1"):
        BoundedSync(writer, lambda folder: None, tmp_path, Adapters(), CANARY, max_staleness=-1)
