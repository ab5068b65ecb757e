"""speckd: distil a language model where the teacher's word can be trusted. Imports torch, and nothing heavier."""

from speckd.engine import LossOutput, distillation_loss
from speckd.errors import SpeckdError
from speckd.head import LMHead
from speckd.objective import Objective
from speckd.tokens import TokenBatch, supervised_rows, token_batch

__version__ = "0.1.0"
__all__ = [
    "LMHead",
    "LossOutput",
    "Objective",
    "SpeckdError",
    "TokenBatch",
    "distillation_loss",
    "supervised_rows",
    "token_batch",
]
