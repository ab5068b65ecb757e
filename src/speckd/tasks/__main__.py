"""`python -m speckd.tasks --out DIR`: the task families as JSONL in TRL's prompt-completion shape."""

import argparse
import json
import sys
from itertools import islice
from pathlib import Path

from speckd.errors import DataError, SpeckdError
from speckd.tasks.families import stream


def write(out: Path, sizes: dict[str, int], level: int, seed: int) -> None:
    """One file a split; the folder must be new or empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not an empty folder", "Choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    for split, size in sizes.items():
        with (out / f"{split}.jsonl").open("w") as file:
            for example in islice(stream(split, level, seed), size):  # type: ignore[arg-type]
                row = {"prompt": example.prompt, "completion": f" {example.completion}", "family": example.family}
                file.write(json.dumps(row) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m speckd.tasks", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=3000)
    parser.add_argument("--validation", type=int, default=300)
    parser.add_argument("--test", type=int, default=300)
    parser.add_argument("--level", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        write(args.out, {"train": args.train, "validation": args.validation, "test": args.test}, args.level, args.seed)
    except SpeckdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {args.out}/train.jsonl ({args.train}), validation.jsonl ({args.validation}), test.jsonl ({args.test})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
