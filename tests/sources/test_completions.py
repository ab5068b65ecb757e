"""What is counted of written text, what is kept of it, who is chosen, and when the alarm goes off."""

import pytest
import torch

from speckd.errors import CollapseError
from speckd.sources.completions import CollapseWatch, counts, described, repeats
from speckd.sources.mixture import AdaptiveFraction, Mixture, Origin
from speckd.sources.replay import ReplayBuffer, Written
from speckd.sources.writer import Completion, Prompt


def completion(*ids: int, finished: bool = True) -> Completion:
    return Completion(torch.tensor(ids, dtype=torch.int64), finished)


def test_a_completion_repeats_itself_when_half_of_its_4_grams_are_copies() -> None:
    assert repeats(torch.tensor([5] * 11)) and repeats(torch.tensor([5, 6, 7] * 8))
    assert not repeats(torch.tensor([5] * 10)), "too short to say"
    assert not repeats(torch.arange(40))
    assert not repeats(torch.cat([torch.arange(17), torch.full((14,), 3)])), "17 of 28"
    assert repeats(torch.cat([torch.arange(9), torch.full((17,), 3)]))


def test_the_counts_by_hand() -> None:
    some = [
        completion(4, 5, 1),
        completion(1),  # empty: only its end
        completion(finished=False),  # empty: no room
        completion(*range(5, 25), finished=False),  # cut off
        completion(*[7] * 20, finished=False),  # cut off in a loop
        Completion(torch.arange(5, 11), True, torch.tensor([True, False, False, True, False, True])),
    ]
    assert counts(some).tolist() == [6, 50, 3, 2, 1, 3]
    found = described(counts(some[:3]) + counts(some[3:]))
    assert found == {
        "completions/mean_length": 50 / 6,
        "completions/truncated_fraction": 0.5,
        "completions/empty_fraction": 2 / 6,
        "completions/repeated_fraction": 1 / 6,
        "completions/replaced_fraction": 3 / 50,
    }
    assert described(counts([])) == {}


def step(truncated: int = 0, empty: int = 0, repeated: int = 0, tokens: int = 80) -> torch.Tensor:
    return torch.tensor([8, tokens, truncated, empty, repeated, 0], dtype=torch.float64)


def run(watch: CollapseWatch, steps: list[torch.Tensor]) -> int | None:
    """In which step the alarm goes off."""
    for number, each in enumerate(steps):
        try:
            watch.judge(each)
        except CollapseError:
            return number
        watch.remember(each)
    return None


GOOD, LOOP = step(), step(repeated=8)
ALARMS = {
    "loops from the start": ([LOOP] * 5, 3),
    "loops in the end": ([GOOD] * 5 + [LOOP] * 5, 8),
    "a single bad step": ([GOOD, LOOP, GOOD, LOOP, GOOD, LOOP], None),
    "nine of ten": ([step(repeated=7)] * 9, None),
    "empty": ([GOOD] * 4 + [step(empty=8)] * 4, 7),
    "cut off from the start, as the limit is short": ([step(truncated=8)] * 20, None),
    "cut off since": ([GOOD] * 4 + [step(truncated=8)] * 9, 7),
    "shorter and shorter": ([GOOD] * 4 + [step(tokens=8 * 9)] * 4 + [step(tokens=7)] * 4, 11),
    "nothing written in between": ([LOOP, LOOP, torch.zeros(6, dtype=torch.float64), LOOP, LOOP], 4),
}


@pytest.mark.parametrize("case", ALARMS)
def test_the_alarm_looks_at_four_steps_together(case: str) -> None:
    steps, wanted = ALARMS[case]
    assert run(CollapseWatch(0.9, 4), steps) == wanted
    assert run(CollapseWatch(0.9, 0), steps) is None
    for cut in range(len(steps) if wanted is None else wanted):  # a checkpoint after any step changes nothing
        first, second = CollapseWatch(0.9, 4), CollapseWatch(0.9, 4)
        assert run(first, steps[:cut]) is None
        second.restore(first.state())
        later = run(second, steps[cut:])
        assert later == (None if wanted is None else wanted - cut)


def test_a_run_that_goes_on_after_the_alarm_is_given_its_patience_again() -> None:
    watch = CollapseWatch(0.9, 4)
    assert run(watch, [LOOP] * 9) == 3 and run(watch, [LOOP] * 9) == 3


def test_the_choice_of_a_sample_depends_on_seed_step_and_sample_alone() -> None:
    mixture, samples = Mixture(seed=3), torch.arange(20_000)
    whole = mixture.origins(samples, 5, 0.3)
    order = torch.randperm(20_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mixture.origins(samples[order], 5, 0.3), whole[order])
    assert torch.equal(torch.cat([mixture.origins(s, 5, 0.3) for s in samples.split(77)]), whole)
    assert float((whole == Origin.STUDENT).float().mean()) == pytest.approx(0.3, abs=0.015)
    assert not torch.equal(mixture.origins(samples, 6, 0.3), whole)
    assert not torch.equal(Mixture(seed=4).origins(samples, 5, 0.3), whole)
    assert bool((mixture.origins(samples, 5, 0.0) == Origin.DATA).all())
    assert bool((mixture.origins(samples, 5, 1.0) == Origin.STUDENT).all())


def test_replayed_and_fresh_shares_are_those_of_the_schedule() -> None:
    found = Mixture(seed=0).origins(torch.arange(20_000), 9, fraction=0.6, fresh=0.2)
    shares = [float((found == origin).float().mean()) for origin in Origin]
    assert shares == pytest.approx([0.4, 0.2, 0.4], abs=0.015)


def test_the_share_moves_linearly() -> None:
    mixture = Mixture(0, 0.2, 1.0)
    assert [mixture.fraction_at(step, 8) for step in (0, 4, 8, 9)] == pytest.approx([0.2, 0.6, 1.0, 1.0])
    assert Mixture(0, 0.2).fraction_at(8, 8) == 0.2


def test_the_adaptive_share_grows_when_the_held_out_loss_has_risen() -> None:
    share = AdaptiveFraction(0.0)
    seen = []
    for loss in (2.0, 1.0, 2.05, 2.1, 2.15, 2.25, 9.0):
        share.hear(loss)
        other = AdaptiveFraction(0.5)
        other.restore(share.state())
        assert other.state() == share.state()
        seen.append(round(share.fraction, 2))
    assert seen == [0, 0, 0, 0.1, 0.1, 0.2, 0.3]
    share.fraction = 0.95
    share.hear(99.0)
    assert share.fraction == 1.0


def written(sample: int, step: int = 0) -> Written:
    return Written(Prompt(torch.tensor([sample, 1]), sample), completion(sample, 2), step, teacher=sample % 2)


def test_the_buffer_keeps_the_newest_whoever_wrote_them_first() -> None:
    one, other = ReplayBuffer(5), ReplayBuffer(5)
    for number, some in enumerate(([3, 1, 2], [9, 8, 7])):
        one.add([written(s, number) for s in some])
        other.add([written(s, number) for s in some[::-1]])
    assert one.full and one.state() == other.state()
    assert [each["sample"] for each in one.state()] == [2, 3, 7, 8, 9]
    restored = ReplayBuffer(5)
    restored.restore(one.state())
    samples = torch.arange(3_000)
    drawn = [each.prompt.sample for each in one.drawn(1, 4, samples)]
    assert [each.prompt.sample for each in restored.drawn(1, 4, samples)] == drawn
    shares = [drawn.count(s) / 3_000 for s in (2, 3, 7, 8, 9)]
    assert shares == pytest.approx([0.2] * 5, abs=0.03)
    assert [each.prompt.sample for each in one.drawn(1, 4, samples[100:110])] == drawn[100:110]
