"""Every logged line of a run as JSON, one a line: complete after a kill, continued without doubles on resuming."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; what a kill cut in two is not one."""
    entries = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


class TrainingLog(TrainerCallback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forgets what a killed run had logged after the checkpoint that training goes on from."""
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in read_log(self.path) if entry["step"] <= state.global_step]
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
