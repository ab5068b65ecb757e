"""The student's own base as its teacher: the same weights without the adapter, so it costs no second model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from speckd.compatibility import SharedVocabulary
from speckd.errors import CapabilityError
from speckd.teachers.model import LaunchedModel, ModelSource
from speckd.teachers.source import Question
from speckd.types import Capabilities


class BaseSource:
    """Answers by a forward of the adapted student with its adapter off.

    Args:
        adapted: the student as PEFT wraps it.
        vocabulary: the student's own tokens.
        device: the student's.
        autocast: what the student's forward runs in, and so what its base must run in to say the same.

    Raises:
        CapabilityError: the adapter trains some of the base's own parameters, so that no base is left.
    """

    capabilities = Capabilities()

    def __init__(
        self,
        adapted: Any,
        vocabulary: SharedVocabulary,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        _require_untouched_base(adapted)
        self.vocabulary, self._adapted, self._autocast = vocabulary, adapted, autocast
        with without_adapter(adapted):
            self._base = ModelSource(adapted.get_base_model(), vocabulary, device)

    def expect(self, question: Question) -> None:
        """Nothing can be begun: the forward is."""

    def settle(self, questions: Sequence[Question]) -> None:
        """It is here."""

    def launch(self, question: Question) -> LaunchedModel:
        with without_adapter(self._adapted), self._autocast():
            return self._base.launch(question)

    def close(self) -> None:
        """Nothing is held but the student."""


def _require_untouched_base(adapted: Any) -> None:
    if not hasattr(adapted, "disable_adapter"):
        raise CapabilityError(
            "teacher: base, but the student has no adapter to switch off", "Pass peft_config (use_peft: true)"
        )
    if any(getattr(config, "bias", "none") != "none" for config in adapted.peft_config.values()):
        raise CapabilityError(
            "teacher: base, but the adapter trains the base model's own biases, so the base does not stay what it was",
            "Set bias to 'none' in the adapter's settings",
        )


@contextmanager
def without_adapter(adapted: Any) -> Iterator[None]:
    """The base alone, in eval mode; every module's mode and every parameter's need of a gradient come back as they were."""
    modes = [(module, module.training) for module in adapted.modules()]
    learning = [(parameter, parameter.requires_grad) for parameter in adapted.parameters()]
    adapted.eval()
    try:
        with adapted.disable_adapter():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, learns in learning:
            parameter.requires_grad_(learns)
