"""`python -m tests.parity.table`: the worst relative errors against the oracle, by precision, teacher and execution."""

import argparse
from collections import defaultdict
from pathlib import Path

from tests.parity.cases import (
    DIVERGENCES,
    EXECUTIONS,
    GATES,
    TEACHERS,
    by_oracle,
    by_package,
    compositions,
    problem,
    relative_error,
    setting,
)
from tests.parity.test_parity import LIMITS


def worst_cases(seeds: range) -> tuple[str, int]:
    worst: dict[tuple[str, str, str], tuple[float, float, str]] = defaultdict(lambda: (0.0, 0.0, ""))
    by_divergence: dict[tuple[str, str], float] = defaultdict(float)
    count = 0
    for seed in seeds:
        given = problem(seed=seed)
        for gate, rejected, divergence in compositions():
            chosen = setting(given, gate, rejected, divergence)
            for teacher, top in TEACHERS.items():
                wanted = by_oracle(given, chosen, top)
                for dtype in LIMITS:
                    for execution, chunk in EXECUTIONS.items():
                        count += 1
                        loss, gradients = relative_error(by_package(given, chosen, top, chunk, dtype), wanted)
                        precision = str(dtype).removeprefix("torch.")
                        key = (precision, teacher, execution)
                        before = worst[key]
                        name = f"{gate} × {rejected} × {divergence}" if gradients > before[1] else before[2]
                        worst[key] = (max(loss, before[0]), max(gradients, before[1]), name)
                        by_divergence[divergence, precision] = max(by_divergence[divergence, precision], gradients)
    lines = ["| precision | teacher | execution | loss | gradients | where |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {' | '.join(key)} | {loss:.1e} | {gradients:.1e} | {where} |" for key, (loss, gradients, where) in worst.items()
    ]
    lines += ["", "| divergence | gradients, float64 | gradients, float32 |", "|---|---|---|"]
    lines += [f"| {d} | {by_divergence[d, 'float64']:.1e} | {by_divergence[d, 'float32']:.1e} |" for d in DIVERGENCES]
    return "\n".join(lines), count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write it as a page, such as docs/parity.md")
    args = parser.parse_args()
    table, count = worst_cases(range(args.seeds))
    text = f"""# Parity

Worst relative errors of the package against an independent float64 oracle (`tests/parity/oracle.py`: token by token, plain
probabilities), {count:,} runs: {len(GATES)} gates × 4 policies × {len(DIVERGENCES)} divergences × {len(TEACHERS)} teachers ×
{len(EXECUTIONS)} executions × 2 precisions × {args.seeds} batches. Gradients are those of hidden states, head weight and bias
together, relative L2. "whole": `token_terms` on full logits; the rest: the engine. Limits: 1e-9 in float64, 1e-4 in float32.
Made by `python -m tests.parity.table --seeds {args.seeds} --out docs/parity.md`.

{table}
"""
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
