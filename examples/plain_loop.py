"""SpecKD in a training loop of one's own: no trainer, nothing hidden. `speckd train` gives the same numbers.

    python examples/plain_loop.py --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER --dataset_name DATA.jsonl

Each line of DATA.jsonl is {"prompt": ..., "completion": ...}; only completions are learnt from.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from speckd import LMHead, Objective, TokenBatch, distillation_loss, supervised_rows
from speckd.compatibility import SharedVocabulary, shared_vocabulary
from speckd.gates import LabelRatio
from speckd.metrics import AcceptanceTally
from speckd.policies import Label
from speckd.teachers import HiddenTeacher

OBJECTIVE = Objective(gate=LabelRatio(), rejected=Label())  # propose and verify; weigh; diverge (forward KL is the default)


def read_samples(path: Path, tokenizer, max_length: int) -> list[tuple[list[int], list[int]]]:
    """(token ids, labels) of each line: labels are the ids of the completion and of the end token, −100 before."""
    samples = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"]).input_ids
        both = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token).input_ids
        labels = [-100] * len(prompt) + both[len(prompt) :]
        samples.append((both[:max_length], labels[:max_length]))
    return samples


def batches(samples: list, size: int, pad: int, device: torch.device) -> Iterator[tuple[TokenBatch, torch.Tensor]]:
    """Batches in the file's order, for ever, padded on the right; with each, its attention mask [B, L]."""
    start = 0
    while True:
        chosen = [(start + i) % len(samples) for i in range(size)]
        start += size
        length = max(len(samples[i][0]) for i in chosen)
        ids = torch.full((size, length), pad)
        labels, mask = torch.full((size, length), -100), torch.zeros((size, length), dtype=torch.long)
        for row, i in enumerate(chosen):
            n = len(samples[i][0])
            ids[row, :n], labels[row, :n], mask[row, :n] = torch.tensor(samples[i][0]), torch.tensor(samples[i][1]), 1
        who = torch.tensor(chosen)[:, None].expand(size, length)
        where = torch.arange(length).expand(size, length)
        yield TokenBatch(*(t.to(device) for t in (ids, labels, who, where))), mask.to(device)


def loss_of(student, teacher, vocabulary: SharedVocabulary, batch: TokenBatch, mask: torch.Tensor, seed: int, epoch: int):
    """The objective's (sum, count) for one batch."""
    hidden = student.get_decoder()(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    with torch.no_grad():
        seen = teacher.get_decoder()(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    rows = supervised_rows(
        TokenBatch(batch.input_ids, vocabulary.labels(batch.labels), batch.sample_ids, batch.position_ids), seed, epoch
    )
    return distillation_loss(
        OBJECTIVE,
        hidden.flatten(0, 1),
        vocabulary.restrict(LMHead.from_model(student)),
        HiddenTeacher(seen.flatten(0, 1), vocabulary.restrict(LMHead.from_model(teacher))),
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="the student")
    parser.add_argument("--teacher_model_name_or_path", required=True)
    parser.add_argument("--dataset_name", type=Path, required=True, help="JSONL of prompt and completion")
    parser.add_argument("--output_dir", type=Path, help="where the student is saved")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--per_device_train_batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    student = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32).to(device).train()
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher_model_name_or_path, dtype=torch.float32).to(device).eval()
    vocabulary = shared_vocabulary(
        tokenizer,
        AutoTokenizer.from_pretrained(args.teacher_model_name_or_path),
        student.get_output_embeddings().weight.shape[0],
        teacher.get_output_embeddings().weight.shape[0],
    )
    samples = read_samples(args.dataset_name, tokenizer, args.max_length)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    stream = batches(samples, args.per_device_train_batch_size, pad, device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, weight_decay=0.0)
    for step in range(1, args.max_steps + 1):
        batch, mask = next(stream)
        epoch = (step - 1) * args.per_device_train_batch_size // len(samples)
        output = loss_of(student, teacher, vocabulary, batch, mask, args.seed, epoch)
        loss = output.sum / output.count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tally = AcceptanceTally()
        tally.add(output)
        print(json.dumps({"step": step, "loss": loss.item(), "tar": tally.result().get("tar")}))
    if args.output_dir:
        student.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
