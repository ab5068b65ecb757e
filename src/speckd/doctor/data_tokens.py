"""The data as tokens: lengths, what is cut and dropped, what is supervised, how rows begin and end."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datasets import Dataset

from speckd.collation import Wanted, sequences_in
from speckd.doctor.ends import stop_ids
from speckd.doctor.findings import About, Examination, Finding, note, ok, warning
from speckd.settings import Settings
from speckd.trainer import SpecKDTrainer

#: Rows of the data whose tokens are looked at, spread evenly.
LOOKED_AT = 5_000
#: A share that is cut from which on it is worth a warning.
_MANY = 0.1


@dataclass(frozen=True)
class TokenFacts:
    """Of some sequences. `tokens`, `supervised`: in all; `whole`: sequences of which everything is supervised; `at_limit`: as
    long as max_length; `ended`: whose supervised tokens end with a stop token; `begun`, `begun_twice`: with the begin token
    once, or twice."""

    sequences: int = 0
    tokens: int = 0
    supervised: int = 0
    whole: int = 0
    at_limit: int = 0
    ended: int = 0
    begun: int = 0
    begun_twice: int = 0
    shortest: int = 0


def token_facts(sequences: list[Wanted], stops: set[int], begin: int | None, limit: int | None) -> TokenFacts:
    return TokenFacts(
        sequences=len(sequences),
        tokens=sum(len(one.token_ids) for one in sequences),
        supervised=sum(len(one.positions) for one in sequences),
        whole=sum(len(one.positions) == len(one.token_ids) - 1 for one in sequences),
        at_limit=sum(len(one.token_ids) == limit for one in sequences),
        # A template may write a line break behind the end of a turn.
        ended=sum(bool(stops & {int(i) for i in one.token_ids[one.positions[-3:] + 1]}) for one in sequences),
        begun=sum(int(one.token_ids[0]) == begin for one in sequences),
        begun_twice=sum(one.token_ids[:2].tolist() == [begin, begin] for one in sequences),
        shortest=min((len(one.token_ids) for one in sequences), default=0),
    )


def some_sequences(dataset: Dataset, most: int) -> list[Wanted]:
    """Sequences from all over a prepared data set."""
    step = max(1, len(dataset) // most)
    return list(islice(sequences_in(dataset.select(range(0, len(dataset), step))), most))


def tokens(trainer: SpecKDTrainer, settings: Settings) -> Examination[None]:
    """Lengths, what is cut and dropped, what is supervised, how rows begin and end."""
    tokenizer, limit = trainer.processing_class, settings.training.max_length
    stops = stop_ids(tokenizer, str(settings.model.model_name_or_path), settings.model.model_revision)
    facts = token_facts(some_sequences(trainer.train_dataset, LOOKED_AT), stops, tokenizer.bos_token_id, limit)
    share = facts.supervised / facts.tokens
    yield ok(
        About.DATA,
        f"{facts.shortest:,} to {trainer.longest_row['train']:,} tokens a row; {share:.0%} of the tokens are supervised "
        f"({facts.supervised:,} of {facts.tokens:,}, in {facts.sequences:,} rows looked at)",
    )
    yield from _lost(trainer, facts, limit)
    yield from _supervised(trainer, facts)
    yield from _ends(tokenizer, facts)
    yield from _begins(tokenizer, facts)


def _lost(trainer: SpecKDTrainer, facts: TokenFacts, limit: int | None) -> Iterator[Finding]:
    raise_it = f"Raise max_length (now {limit}), or shorten the rows"
    for name, dropped in trainer.dropped_rows.items():
        if dropped.rows:
            yield warning(About.DATA, f"{name} data: {dropped}; they are left out", raise_it)
    cut = facts.at_limit / facts.sequences
    if cut:
        said = f"{facts.at_limit:,} of {facts.sequences:,} rows are cut at max_length, or just as long"
        yield (warning if cut > _MANY else note)(About.DATA, said, raise_it)


def _supervised(trainer: SpecKDTrainer, facts: TokenFacts) -> Iterator[Finding]:
    if trainer.completion_only_loss and facts.whole:
        what = f"{facts.whole:,} of {facts.sequences:,} rows are supervised as a whole: their prompts are empty"
        yield warning(About.DATA, what, "Put the prompt into its own column (dataset_prompt_column)")


def _ends(tokenizer: Any, facts: TokenFacts) -> Iterator[Finding]:
    said = f"{facts.ended:,} of {facts.sequences:,} rows end with a supervised {tokenizer.eos_token!r}"
    if not facts.ended:
        fix = "Let the data or the template end with it, inside of what is supervised, or set eos_token to what they end with"
        yield warning(About.DATA, f"{said}: the student will not learn to stop", fix)
    else:
        yield ok(About.DATA, said)


def _begins(tokenizer: Any, facts: TokenFacts) -> Iterator[Finding]:
    if facts.begun_twice:
        what = f"{facts.begun_twice:,} of {facts.sequences:,} rows begin with {tokenizer.bos_token!r} twice"
        yield warning(About.DATA, what, "Take it out of the data: the tokenizer adds it")
    elif facts.begun < facts.sequences and tokenizer.bos_token_id in tokenizer.encode("a")[:1]:
        what = f"{facts.sequences - facts.begun:,} of {facts.sequences:,} rows do not begin with {tokenizer.bos_token!r}"
        yield note(About.DATA, f"{what}, which the tokenizer puts before text")
