"""Four public data sets as prompts and completions, and a small tokenizer of their words: what `real_data.py` trains on.

GSM8K: the question, and the worked answer ending in `#### n`. MAWPS: the question with its numbers, and its equation, then
`#### n`. MBPP: the task and its first test, and the program. Dolly: an instruction without a context, and its response.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from speckd.evaluation.options import TaskOptions
from speckd.evaluation.rows import Row, read_rows

END, PAD = "<|end|>", "<|pad|>"


@dataclass(frozen=True)
class Source:
    """`train`, `held_out`: files below the data's folder; `pair`: a row as prompt and completion, None where it has a context;
    `template`: the prompt, where it is not the one that `speckd evaluate` knows; `most`: rows to train on."""

    train: tuple[str, ...]
    held_out: str
    pair: Callable[[Row], tuple[str, str] | None]
    template: str | None = None
    most: int | None = None


def _gsm8k(row: Row) -> tuple[str, str]:
    return str(row.prompt), row.completion


def _mawps(row: Row) -> tuple[str, str]:
    return str(row.prompt), f" {infix(row.fields)} = {row.reference}\n#### {row.reference}"


def _mbpp(row: Row) -> tuple[str, str]:
    code = re.sub(r"[ \t]+\n", "\n", str(row.fields["code"]).replace("\r\n", "\n").replace("\t", "    ")).strip()
    return f"{row.fields['text']}\n{row.fields['test_list'][0]}\n", code


def _dolly(row: Row) -> tuple[str, str] | None:
    return None if row.fields.get("input") else (str(row.prompt), f" {str(row.reference).strip()}")


SOURCES = {
    "GSM8K": Source(("gsm8k/train.jsonl",), "gsm8k/dev.jsonl", _gsm8k, most=2500),
    "MAWPS": Source(("mawps/cv_fold0_train.csv",), "mawps/cv_fold0_dev.csv", _mawps),
    "MBPP": Source(("mbpp/train.jsonl", "mbpp/fewshot.jsonl"), "mbpp/dev.jsonl", _mbpp),
    "Dolly": Source(("dolly/train.jsonl",), "dolly/dev.jsonl", _dolly, "Instruction: {instruction}\nResponse:", 1500),
}


def infix(fields: Mapping[str, Any]) -> str:
    """MAWPS's equation, operators first and numbers by their place, as one writes it: `- number0 number1` is `8 - 2`."""
    numbers = [number.removesuffix(".0") for number in str(fields["Numbers"]).split()]
    words: Iterator[str] = iter(str(fields["Equation"]).split())

    def expression(inner: bool) -> str:
        word = next(words)
        if word not in ("+", "-", "*", "/"):
            place = re.fullmatch(r"number(\d+)", word)
            return numbers[int(place[1])] if place else word.removesuffix(".0")
        text = f"{expression(True)} {word} {expression(True)}"
        return f"({text})" if inner else text

    return expression(False)


def read(data: Path, source: Source, held_out: bool) -> list[dict[str, Any]]:
    """Its rows with `prompt` and `completion`; of MBPP also what its tests need."""
    found = []
    for name in (source.held_out,) if held_out else source.train:
        for row in read_rows(name, TaskOptions(kind="likelihood", data=str(data / name), prompt_template=source.template))[1]:
            pair = source.pair(row)
            if pair is not None:
                tests = {key: row.fields[key] for key in ("task_id", "test_list", "test_setup_code") if key in row.fields}
                found.append({"prompt": pair[0], "completion": pair[1], **tests})
    return found


def train_tokenizer(texts: Sequence[str], entries: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, with every digit a token of its own."""
    bpe = Tokenizer(BPE())
    digits, in_bytes = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence([digits, in_bytes]), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=entries, special_tokens=[END, PAD], initial_alphabet=sorted(alphabet), show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD)


def write(data: Path, out: Path, entries: int, longest: int, held_out: int) -> dict[str, dict[str, int]]:
    """`tokenizer/`, `train.jsonl` and `SOURCE.jsonl` (held out) of texts up to so many tokens, the end among them, in `out`;
    returns how many rows of each source were used, of how many."""
    rows = {name: (read(data, source, False), read(data, source, True)) for name, source in SOURCES.items()}
    tokenizer = train_tokenizer([one["prompt"] + one["completion"] for own, _ in rows.values() for one in own], entries)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out / "tokenizer")

    def short(some: Sequence[Mapping[str, Any]], most: int | None) -> list[Mapping[str, Any]]:
        return [one for one in some if len(tokenizer(one["prompt"] + one["completion"]).input_ids) < longest][:most]

    trained: list[Mapping[str, Any]] = []
    counts = {}
    for name, (train, other) in rows.items():
        own, kept = short(train, SOURCES[name].most), short(other, held_out)
        trained += [{"prompt": one["prompt"], "completion": one["completion"]} for one in own]
        _lines(out / f"{name}.jsonl", kept)
        counts[name] = {"train": len(own), "of": len(train), "held_out": len(kept), "held_out_of": len(other)}
    _lines(out / "train.jsonl", trained)
    return counts


def _lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
