"""`speckd train` in one of several processes, which tells what it holds of its teacher: FOLDER, then the flags of the run."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from speckd.cli import main
from speckd.trainer import SpecKDTrainer


def facts(trainer: SpecKDTrainer) -> dict[str, Any]:
    models = [trainer.teacher] if trainer.teacher is not None else list(trainer.teachers.values())
    decoder, head = models[0].get_decoder(), models[0].get_output_embeddings().weight
    in_layers = list(decoder.layers.parameters())
    return {
        "world": torch.distributed.get_world_size(),
        "dtensors": [isinstance(p, DTensor) for p in in_layers],
        "local": sum(p.to_local().nbytes if isinstance(p, DTensor) else getattr(p, "ds_tensor", p).nbytes for p in in_layers),
        "visible": sum(p.numel() for p in in_layers if not isinstance(p, DTensor)),  # of ZeRO-3's, nothing between forwards
        "whole": sum(4 * (p.numel() if isinstance(p, DTensor) else getattr(p, "ds_numel", p.numel())) for p in in_layers),
        "head": list(head.shape),
        "head_is_embedding": head is models[0].get_input_embeddings().weight,
        "sharing": [source.sharing is not None for source in trainer.model_sources],
        "training": any(module.training for model in models for module in model.modules()),
        "learning": any(p.requires_grad for model in models for p in model.parameters()),
        "ddp": type(trainer.model_wrapped).__name__,
    }


if __name__ == "__main__":
    folder, flags = Path(sys.argv[1]), sys.argv[2:]
    ask = SpecKDTrainer._ask

    def asking(self: SpecKDTrainer, *given: Any) -> Any:
        pending = ask(self, *given)
        if self.is_in_train:
            (folder / f"facts-{os.environ['RANK']}.json").write_text(json.dumps(facts(self)))
        return pending

    SpecKDTrainer._ask = asking  # type: ignore[method-assign]
    sys.exit(main(["train", *flags]))
