"""`student_server_urls`: the student's text in training by vLLM's servers, which are given its weights as it learns."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from speckd.arguments import SpecKDConfig
from speckd.errors import ConfigError
from speckd.sources.rewinding import in_eval_mode
from speckd.sources.served_student import ServedStudent, State
from speckd.sources.server_writer import ServerWriter
from speckd.sources.weight_sync import Adapters, BoundedSync, Canary, WholeModels
from speckd.sources.writer import WriterContext
from speckd.teachers.client import Load
from speckd.teachers.exchange import Timeouts

#: In a run's folder: the weights on their way to the servers. A folder of that kind of name is not pushed to the hub.
WEIGHTS = "_student_weights"
#: Tokens of the text by which the servers' weights are known.
_CANARY_TOKENS = 64


def served_student(
    args: SpecKDConfig, context: WriterContext, accelerator: Accelerator, model: Any, text: list[int], longest_prompt: int
) -> ServedStudent:
    """
    Args:
        args: of the run; its folder must be one that the servers can read, too.
        context: what there is to write with.
        accelerator: of all processes, of which the first synchronises.
        model: the student as it is trained, with its adapter.
        text: token ids of a text by which the servers' weights are known.
        longest_prompt: tokens.

    Raises:
        ConfigError: servers cannot write for this student.
    """
    adapted = accelerator.unwrap_model(model)
    loading, save = _loading(adapted)
    longest = longest_prompt + args.max_completion_length
    if context.positions is not None and longest > context.positions:
        raise ConfigError(
            f"max_completion_length: the longest prompt has {longest_prompt} tokens, the models {context.positions} positions, "
            "and servers write as much as they are asked for",
            f"Set max_completion_length to at most {context.positions - longest_prompt}",
        )
    wait, patience = args.teacher_server_timeout_s, args.teacher_server_patience_s
    writer = ServerWriter(
        args.student_server_urls or (),
        stops=frozenset(context.stop_ids),
        vocabulary=context.student.get_output_embeddings().weight.shape[0],
        model=args.student_server_model,
        timeouts=Timeouts(read_s=wait, request_s=wait, ready_s=min(Timeouts.ready_s, patience), patience_s=patience),
        load=Load(concurrency=args.student_server_concurrency),
        suppressed=context.suppressed,
    )
    weights = None
    if accelerator.is_main_process:
        canary = Canary(torch.tensor(text[:_CANARY_TOKENS]), _log_probs(context, torch.tensor(text[:_CANARY_TOKENS])))
        folder = Path(str(args.output_dir)) / WEIGHTS
        weights = BoundedSync(writer, save, folder, loading, canary, args.student_server_max_staleness)

    def tell(state: State) -> State:
        found: list[State] = broadcast_object_list([state])
        return found[0]

    return ServedStudent(writer, weights, longest, tell)


def _loading(model: Any) -> tuple[Adapters | WholeModels, Callable[[Path], None]]:
    """How the student's weights get into the servers, and how they are written for that."""
    if hasattr(model, "peft_config"):
        (config,) = model.peft_config.values()
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind != "LORA" or config.use_dora or config.modules_to_save:
            what = "modules_to_save" if kind == "LORA" and config.modules_to_save else "another adapter than plain LoRA"
            raise ConfigError(
                f"student_server_urls: the student trains {what}, which vLLM does not serve",
                "Use plain LoRA, or remove student_server_urls",
            )
        return Adapters(), lambda folder: model.save_pretrained(folder, save_embedding_layers=False)
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        raise ConfigError(
            "student_server_urls: the student's head is tied to its embedding, and vLLM does not reload a tied head",
            "Add use_peft: true (an adapter is loaded apart), or untie the head, or remove student_server_urls",
        )
    return WholeModels(), model.save_pretrained


def _log_probs(context: WriterContext, ids: Tensor) -> Callable[[], Tensor]:
    """What the student says now of each token of a text, [T], after the first: [T − 1]."""
    student = context.student

    @torch.no_grad()
    def said() -> Tensor:
        own = ids.to(student.get_input_embeddings().weight.device)
        with in_eval_mode(student), context.autocast():
            logits = student(input_ids=own[None], use_cache=False).logits[0, :-1]
        return logits.float().log_softmax(-1).gather(1, own[1:, None])[:, 0]

    return said
