"""Whatever a server does: every answer is the fault-free one to the last bit, or the run ends with one clear line."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from speckd.errors import TeacherLostError
from tests.teachers.episodes import BATCHES, BEHAVIOURS, QUESTIONS, SEEDS, Behaviour, Episode, play


def holds(episode: Episode) -> None:
    asked, answered, failed = episode.accounts
    assert episode.wrong == 0
    assert asked == answered + failed
    if episode.error is None:
        assert episode.answers == asked == answered == BATCHES * QUESTIONS
    else:
        assert isinstance(episode.error, TeacherLostError) and episode.error.exit_code == 4
        assert "\n" not in str(episode.error) and "http://127.0.0.1:" in str(episode.error)
        assert failed > 0


def named(behaviour: Behaviour) -> str:
    return behaviour.name


def episodes(behaviour: Behaviour, seeds: int, healthy: int = 0) -> list[Episode]:
    """Side by side, since most of their time is waiting."""
    with ThreadPoolExecutor(max_workers=5) as threads:
        return list(threads.map(lambda seed: play(behaviour, seed, healthy), range(seeds)))


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=named)
def test_one_server(behaviour: Behaviour, counted) -> None:
    found = episodes(behaviour, SEEDS)
    for episode in found:
        holds(episode)
        if behaviour.ends is not None:
            assert (episode.error is not None) == behaviour.ends, episode.error
        counted()
    assert any(episode.struck for episode in found)


@pytest.mark.parametrize("behaviour", [b for b in BEHAVIOURS if b.ends is not False], ids=named)
def test_another_server_takes_over(behaviour: Behaviour, counted) -> None:
    """What ends a run with one server does not with two, of which one is well."""
    for episode in episodes(behaviour, max(1, SEEDS // 2), healthy=1):
        holds(episode)
        assert episode.error is None
        counted()


def test_there_are_at_least_the_behaviours_of_the_programme() -> None:
    assert len({behaviour.fault for behaviour in BEHAVIOURS}) >= 50
