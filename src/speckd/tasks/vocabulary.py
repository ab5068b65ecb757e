"""The one word-level vocabulary of all three families, and its tokenizer."""

from typing import Any

NOUNS = (
    "apple", "bird", "cat", "dog", "egg", "fish", "goat", "hat", "ink", "jar", "kite", "lamp", "moon", "nut", "owl", "pen",
)  # fmt: skip
NAMES = ("ann", "ben", "eva", "max", "tom", "zoe")
ITEMS = ("apples", "coins", "cards", "books", "pens")
NUMBERS = tuple(str(n) for n in range(100))
NEWLINE, INDENT = "NL", "TAB"

_INSTRUCTION = (
    "please now task ok here result : , reverse sort uppercase drop swap first and last give word count words replace with "
    "then the list"
)
_MATH = (
    "has . buys finds more gives loses away doubles triples how many does have ? + - * = #### so we get start "
    "plus minus times is that makes"
)
_CODE = (
    "write python def f ( xs ) return [ ] for in if out r acc x y n item append % > < == "
    "+= to from each keep only even odd above below add subtract multiply by sum items of sorted reversed len"
)
PAD, END, UNKNOWN = "<pad>", "<eos>", "<unk>"


def words() -> list[str]:
    """Every token, special ones first, in the order of their ids."""
    plain = [*_INSTRUCTION.split(), *_MATH.split(), *_CODE.split(), NEWLINE, INDENT]
    everything = [PAD, END, UNKNOWN, *NUMBERS, *NOUNS, *(n.upper() for n in NOUNS), *NAMES, *ITEMS, *plain]
    return list(dict.fromkeys(everything))


def build_tokenizer() -> Any:
    """A Transformers tokenizer over `words()`: splits at spaces, adds nothing, ends with `<eos>`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words())}, unk_token=UNKNOWN))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)
