"""A teacher in this process: a Transformers causal language model, on the student's device or on one of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from speckd.compatibility import SharedVocabulary
from speckd.errors import CapabilityError
from speckd.head import LMHead
from speckd.spans import TEACHER_FORWARD, span
from speckd.teachers.in_process import HiddenTeacher
from speckd.teachers.placement import LaunchedStates, head_on, moved
from speckd.teachers.shared_prompt import PromptSharing
from speckd.teachers.source import Question
from speckd.types import Capabilities


class ModelSource:
    """Answers by a forward of the whole model; the head's product is the engine's, chunk by chunk.

    Args:
        model: frozen and in eval mode.
        vocabulary: what it shares with the student.
        device: the student's, where the head's products are made.
        sharing: how a start that several rows share is computed once; None: every row by itself.
    """

    capabilities = Capabilities()

    def __init__(
        self, model: Any, vocabulary: SharedVocabulary, device: torch.device, sharing: PromptSharing | None = None
    ) -> None:
        self.model, self.vocabulary, self.sharing, self._student_device = model, vocabulary, sharing, device
        self.head = head_on(vocabulary.restrict(_plain_head(model)), device)
        self.positions = torch.zeros(2, dtype=torch.int64)  # since somebody set it back: computed, in the batches

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs; of one whose embeddings are offloaded, anywhere."""
        weight = self.model.get_input_embeddings().weight
        return self._student_device if weight.is_meta else weight.device

    def expect(self, question: Question) -> None:
        """Nothing can be begun: the forward is."""

    def settle(self, questions: Sequence[Question]) -> None:
        """It is here."""

    @torch.no_grad()
    def launch(self, question: Question) -> "LaunchedModel":
        """Starts the forward on its device. Not in `inference_mode`: what is made of its states may meet autograd."""
        if self.model.training:
            self.model.eval()
        own = on_device(question.inputs, self.device)
        with span(TEACHER_FORWARD):
            if self.sharing is None or own.keys() != {"input_ids", "attention_mask"}:
                hidden = self.model.get_decoder()(**own, use_cache=False).last_hidden_state
            else:
                states = self.sharing.states(**own)
                hidden = states.hidden
                self.positions += torch.tensor([states.positions, own["input_ids"].numel()])
        return LaunchedModel(LaunchedStates.of(hidden, question.rows.index), self.head)

    def close(self) -> None:
        """Nothing is held but the model."""


def _plain_head(model: Any) -> LMHead:
    head = LMHead.from_model(model)
    if not head.weight.is_floating_point():
        raise CapabilityError(
            "the teacher's head is quantised, which a product with its weight cannot express",
            "Leave it as it is: llm_int8_skip_modules: [lm_head] in its quantization_config",
        )
    return head


class LaunchedModel:
    """A forward that may still be running."""

    def __init__(self, states: LaunchedStates, head: LMHead) -> None:
        self._states, self._head = states, head

    @torch.no_grad()
    def rows(self) -> HiddenTeacher:
        return HiddenTeacher(self._states.arrived(), self._head)


def on_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Tensors on a device, what else there is as it is."""
    return {name: moved(value, device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
