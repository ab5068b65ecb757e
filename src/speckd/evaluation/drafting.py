"""The model as the draft model of its teacher: how many of its tokens stand, in theory, in real decoding, and by the clock."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from speckd.errors import ConfigError
from speckd.evaluation.decoding import Decoders, timed
from speckd.evaluation.items import Item, Record, by_stops, prompt_items, require_known, template_end
from speckd.evaluation.likelihood import Text, correct_tokens, cut, longest, sequence_sums, whole_item
from speckd.evaluation.models import Models
from speckd.evaluation.options import TaskOptions
from speckd.evaluation.rows import Row
from speckd.evaluation.speculative import Tally
from speckd.evaluation.statistics import Metric
from speckd.quickstart.evaluation import block_efficiency
from speckd.sources.writer import Completion, Draws, Prompt, Sampling

_CALLS = "calls of the teacher"
_TESTS = "drafted tokens that were tested"
DECODED = (
    Metric("tau_greedy", ("greedy_tokens", "greedy_calls"), f"{_CALLS}; greedy speculative decoding"),
    Metric("tau_greedy_expected", ("greedy_tokens", "greedy_expected_calls"), f"{_CALLS} that the matches along its text give"),
    Metric("greedy_text_equal", ("greedy_equal", "examples"), "prompts: the text is that of plain greedy decoding"),
    Metric("acceptance_greedy", ("greedy_accepted", "greedy_tests"), _TESTS),
    Metric("tau_sampled", ("sampled_tokens", "sampled_calls"), f"{_CALLS}; speculative sampling at temperature 1"),
    Metric("tau_sampled_expected", ("sampled_expected_tokens", "sampled_calls"), f"{_CALLS}; Σ min(p, q) for each test"),
    Metric("acceptance_sampled", ("sampled_accepted", "sampled_tests"), _TESTS),
    Metric("acceptance_expected", ("sampled_alpha", "sampled_tests"), f"{_TESTS}: Σ min(p, q)"),
    Metric("acceptance_gap", ("sampled_gap", "sampled_tests"), f"{_TESTS}: accepted less Σ min(p, q), 0 expected"),
    Metric("alpha_teacher_text", ("teacher_text_alpha", "teacher_text_tokens"), "tokens that the teacher drew: Σ min(p, q)"),
)
REFERENCE = Metric("alpha_reference", ("reference_alpha", "reference_tokens"), "tokens of the references: Σ min(p, q)")
CLOCK = Metric("speedup", ("speedup",), "prompts timed: the median over them; plain seconds / speculative seconds", "median")

Scores = dict[str, float]


@dataclass
class Drafting:
    """See `Task`. Where rows have a reference, α is also measured along that."""

    name: str
    options: TaskOptions
    seed: int
    batch_size: int
    needs_teacher: bool = True
    _decoders: dict[frozenset[int], Decoders] = field(default_factory=dict)

    def items(self, rows: Sequence[Row], models: Models) -> list[Item]:
        """See `Task`."""
        assert models.teacher is not None
        found = prompt_items(self.name, rows, self.options, models)
        whole = [whole_item(self.name, row, self.options, models) for row in rows if row.reference is not None]
        require_known(self.name, [*found, *whole], models)
        both = _both(models)
        if not both and not all(template_end(item, self.options, models) for item in found):
            raise ConfigError("model and teacher end a text with different tokens", "Use models of one family")
        return found

    def records(self, items: Sequence[Item], models: Models) -> list[Record]:
        """See `Task`."""
        both, found = _both(models), dict[int, Record]()
        for stops, places in by_stops(items, lambda item: both | template_end(item, self.options, models)).items():
            if stops not in self._decoders:
                self._decoders[stops] = Decoders(models, sorted(stops), self.options.draft_length, self.batch_size)
            own = self._records([items[place] for place in places], models, self._decoders[stops])
            found |= dict(zip(places, own, strict=True))
        return [found[place] for place in range(len(items))]

    def _records(self, items: Sequence[Item], models: Models, decoders: Decoders) -> list[Record]:
        assert self.options.max_new_tokens is not None
        greedy, drawn = (Sampling(temperature=heat, max_completion_length=self.options.max_new_tokens) for heat in (0.0, 1.0))
        prompts, draws = [Prompt(torch.tensor(item.ids), item.row.number) for item in items], Draws(self.seed, 0)
        plain = decoders.plain.write(prompts, greedy, draws)
        fast, by_greedy = decoders.speculative.write(prompts, greedy, draws)
        sampled, by_drawing = decoders.speculative.write(prompts, drawn, draws)
        theirs = decoders.plain.write(prompts, drawn, Draws(self.seed, 1))
        own = [_greedy(by_greedy[i.row.number], *pair) for i, *pair in zip(items, plain, fast, strict=True)]
        of_all = zip(
            own,
            (_drawn(by_drawing[item.row.number]) for item in items),
            _matches(items, plain, models, self.options.draft_length),
            _alphas(items, theirs, models, "teacher_text"),
            self._references(items, models),
            self._clock(prompts, plain, greedy, decoders),
            strict=True,
        )
        scores = [{name: number for part in parts for name, number in part.items()} for parts in of_all]
        texts = zip(items, scores, plain, fast, sampled, strict=True)
        return [_record(item, models, own, *written) for item, own, *written in texts]

    def metrics(self, lines: Sequence[Mapping[str, Any]]) -> Sequence[Metric]:
        """See `Task`."""
        having = {name for line in lines for name in line["scores"]}
        return [*DECODED, *(metric for metric in (REFERENCE, CLOCK) if having.issuperset(metric.columns))]

    def counts(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """See `Task`; `timed`: prompts on which the clock was held, each way `timed_repeats` times, in turn."""
        return {
            "prompts": len(lines),
            "tokens": sum(line["tokens"] for line in lines),
            "truncated": sum(line["truncated"] for line in lines),
            "without_room": sum(not line["tokens"] for line in lines),
            "draft_length": self.options.draft_length,
            "timed": sum("speedup" in line["scores"] for line in lines),
            "timed_repeats": self.options.timed_repeats,
        }

    def _references(self, items: Sequence[Item], models: Models) -> list[Scores]:
        found: list[Scores] = [{} for _ in items]
        having = [place for place, item in enumerate(items) if item.row.reference is not None]
        whole = [whole_item(self.name, items[place].row, self.options, models) for place in having]
        most = longest(self.options, models)
        for place, sums in zip(having, sequence_sums([cut(one, most) for one in whole], models) if whole else [], strict=True):
            if sums["supervised"]:
                found[place] = {"reference_alpha": sums["alpha"], "reference_tokens": sums["supervised"]}
        return found

    def _clock(
        self, prompts: Sequence[Prompt], plain: Sequence[Completion], greedy: Sampling, decoders: Decoders
    ) -> list[Scores]:
        found: list[Scores] = []
        for prompt, text in zip(prompts, plain, strict=True):
            held = prompt.sample < self.options.timed_prompts and len(text.token_ids)
            found.append(timed(decoders, prompt, greedy, self.options.timed_repeats) if held else {})
        return found


def _both(models: Models) -> frozenset[int]:
    """The tokens at which both models end a text."""
    assert models.teacher is not None
    return models.rendering.stops & models.teacher.stops(models.teacher.tokenizer)


def _record(item: Item, models: Models, scores: Scores, plain: Completion, fast: Completion, sampled: Completion) -> Record:
    texts = {"plain": plain, "speculative": fast, "sampled": sampled}
    said = {name: models.text(item.ids, written) for name, written in texts.items()}
    return Record(item, said["speculative"], len(fast.token_ids), not fast.finished, scores, {"texts": said})


def _greedy(tally: Tally, plain: Completion, fast: Completion) -> Scores:
    """Nothing where the prompt left no room: two empty texts are no equal ones."""
    if not tally.calls:
        return {}
    return {
        "greedy_tokens": tally.tokens,
        "greedy_calls": tally.calls,
        "greedy_tests": tally.tests,
        "greedy_accepted": tally.accepted,
        "greedy_equal": torch.equal(plain.token_ids, fast.token_ids),
    }


def _drawn(tally: Tally) -> Scores:
    """The sum over tests of (accepted − Σ min(p, q)) is a martingale: its mean is 0, whatever was drawn before each."""
    if not tally.calls:
        return {}
    return {
        "sampled_tokens": tally.tokens,
        "sampled_calls": tally.calls,
        "sampled_tests": tally.tests,
        "sampled_accepted": tally.accepted,
        "sampled_alpha": tally.alpha,
        "sampled_gap": tally.accepted - tally.alpha,
        "sampled_expected_tokens": tally.alpha + tally.own,
    }


def _written(items: Sequence[Item], texts: Sequence[Completion]) -> list[Text]:
    """Prompts with what was written; of one that had no room nothing is asked, nor read: it may exceed all positions."""
    sizes = [len(text.token_ids) for text in texts]
    both = zip(items, texts, sizes, strict=True)
    return [([*item.ids, *text.token_ids.tolist()], n) if n else (item.ids[:1], 0) for item, text, n in both]


def _matches(items: Sequence[Item], plain: Sequence[Completion], models: Models, draft_length: int) -> list[Scores]:
    """Calls that greedy speculative decoding takes for the teacher's greedy text, given where the model would say the same."""
    found: list[Scores] = []
    for match in correct_tokens(_written(items, plain), models):
        calls = len(match) / block_efficiency([match], draft_length) if len(match) else 0.0
        found.append({"greedy_expected_calls": round(calls)})
    return found


def _alphas(items: Sequence[Item], texts: Sequence[Completion], models: Models, name: str) -> list[Scores]:
    sums = sequence_sums(_written(items, texts), models)
    return [{f"{name}_alpha": own["alpha"], f"{name}_tokens": own["supervised"]} if own["supervised"] else {} for own in sums]
