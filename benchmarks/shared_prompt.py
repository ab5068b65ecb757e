"""What sharing a prompt saves the teacher: its forward with and without, on the same batches, in turn, one process.

    python benchmarks/shared_prompt.py --rows 8 --prompt 256 --completions 32 64

A random Llama: time does not depend on the weights' values. One line a setting: positions, times and paired ratios (medians of
the rounds), and the largest relative difference of a token's state. `--prompts 1 8` for chosen settings only.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

from speckd.teachers.shared_prompt import PromptSharing, plain_states, why_not_shared


def teacher(args: argparse.Namespace) -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=int(2.75 * args.hidden),
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 256),
        max_position_embeddings=args.prompt + args.completions[1],
        tie_word_embeddings=True,
    )
    set_seed(0)
    dtype = getattr(torch, args.dtype)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(args.device).eval().requires_grad_(False).get_decoder()


def batch(args: argparse.Namespace, prompts: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and mask, padded on the right: rows in turn of one of the prompts, completions of uneven length."""
    starts = torch.randint(args.vocabulary, (prompts, args.prompt), generator=generator)
    low, high = args.completions
    ids = torch.randint(args.vocabulary, (args.rows, args.prompt + high), generator=generator)
    ids[:, : args.prompt] = starts[torch.arange(args.rows) % prompts]
    length = args.prompt + torch.randint(low, high + 1, (args.rows, 1), generator=generator)
    mask = (torch.arange(ids.shape[1]) < length).long()
    width = int(length.max())
    return (ids * mask)[:, :width].to(args.device), mask[:, :width].to(args.device)


def seconds(work: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def measure(args: argparse.Namespace, decoder: torch.nn.Module, prompts: int) -> str:
    sharing, generator = PromptSharing(decoder, args.prompt + args.completions[1]), torch.Generator().manual_seed(prompts)
    plain, shared, gaps, positions, whole = [], [], [], 0, 0
    for number in range(args.rounds + 1):
        ids, mask = batch(args, prompts, generator)
        wanted, states = plain_states(decoder, ids, mask), sharing.states(ids, mask)
        seen = mask.bool()
        gaps.append(float(((states.hidden - wanted)[seen].norm(dim=-1) / wanted[seen].norm(dim=-1)).max()))
        if number == 0:  # warm now
            continue
        plain.append(seconds(lambda ids=ids, mask=mask: plain_states(decoder, ids, mask), args.device))
        shared.append(seconds(lambda ids=ids, mask=mask: sharing.states(ids, mask), args.device))
        positions, whole = positions + states.positions, whole + ids.numel()
    without, by = statistics.median(plain), statistics.median(shared)
    ratio = statistics.median(a / b for a, b in zip(plain, shared, strict=True))
    return f"| {prompts} | {whole / positions:.2f} | {1000 * without:.1f} | {1000 * by:.1f} | {ratio:.2f} | {max(gaps):.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=256, help="tokens that rows share")
    parser.add_argument("--completions", type=int, nargs=2, default=[32, 64], help="tokens of the shortest and the longest")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, nargs="*", help="how many distinct prompts a batch holds, each a line")
    args = parser.parse_args()
    decoder = teacher(args)
    refused = why_not_shared(decoder, args.prompt + args.completions[1], torch.device(args.device))
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, {args.dtype}; {vars(args)}")
    print(f"proof: {refused or 'equal'}")
    print("| prompts in the batch | positions, plain / shared | plain, ms | shared, ms | time, plain / shared | largest gap |")
    print("|---|---|---|---|---|---|")
    for prompts in args.prompts or sorted({1, 2, args.rows // 2, args.rows}):
        print(measure(args, decoder, prompts), flush=True)


if __name__ == "__main__":
    main()
