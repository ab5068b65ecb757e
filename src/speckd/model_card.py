"""The README.md of a distilled student: what it is, how it was made, how it measures. Everything needed to make it again."""

import platform
from dataclasses import dataclass
from typing import Any

import torch
import transformers
import trl
import yaml

import speckd

_MEASURES = {
    "nll": "NLL, nats a token",
    "kl": "KL(teacher ‖ student), nats a token",
    "kl_at_least": "KL(teacher ‖ student) on the teacher's top-K and a tail: at most the whole, nats a token",
    "agreement": "agreement of the most probable token",
    "alpha": "expected acceptance Σ min(p, q)",
    "alpha_at_least": "expected acceptance over the teacher's top-K: at most the whole",
    "tar": "token acceptance rate (Top-5 rule, mean over sequences)",
    "teacher_nll": "the teacher's own NLL",
    "tokens": "held-out tokens",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of.

    `answers`: how the teacher's came, where it was elsewhere; `given`: settings that were said, `everything`: all with their
    resolved values; `start`, `end`: held-out measures before and after; `data`: name to how much; `folder`: the student's;
    `warnings`: said in training.
    """

    student: str
    teacher: str | None
    answers: str | None
    method: str
    given: dict[str, Any]
    everything: dict[str, Any]
    start: dict[str, float]
    end: dict[str, float]
    data: dict[str, Any]
    seed: int
    steps: int
    adapter: bool
    distilled: bool
    folder: str
    warnings: list[str]


_ADAPTER = "\nThese are the weights of an adapter: `peft` must be installed, and its base model must still be where it was.\n"


def versions() -> dict[str, str]:
    return {
        "speckd": speckd.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "python": platform.python_version(),
    }


def model_card(facts: CardFacts) -> str:
    """Markdown with YAML front matter, for the hub and for people."""
    front = {"library_name": "peft" if facts.adapter else "transformers", "tags": ["speckd", "distillation", "trl"]}
    front["base_model"] = facts.student
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    teacher = f" by `{_code(facts.teacher)}`" if facts.teacher else ""
    teacher += f" ({_cell(facts.answers)})" if facts.answers else ""
    how = f"taught{teacher}" if facts.distilled else f"fine-tuned, and measured{teacher}" if teacher else "fine-tuned"
    warnings = "".join(f"\n> {_cell(warning)}\n" for warning in facts.warnings)
    return f"""---
{yaml.safe_dump(front, sort_keys=True)}---

# A student distilled with speckd

`{_code(facts.student)}` {how}: {facts.method}.
{facts.steps} optimizer steps, seed {facts.seed}.
{warnings}
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({facts.folder!r})
```
{_ADAPTER if facts.adapter else ""}
## Held-out results

{_results(facts)}

## Data

{_table(("what", "value"), [(name, value) for name, value in facts.data.items()])}

## Settings

`speckd train --config config.yaml --output_dir ANOTHER`, from the folder that the paths in it are relative to, with:

```yaml
{_fenced(facts.given)}```

<details><summary>Every setting, with defaults</summary>

```yaml
{_fenced(facts.everything)}```

</details>

{packages}
"""


def _results(facts: CardFacts) -> str:
    if not facts.end:
        return "No held-out data was given."
    rows = [
        (text, *(_number(measures.get(name)) for measures in (facts.start, facts.end)))
        for name, text in _MEASURES.items()
        if name in facts.end
    ]
    return _table(("measure", "before", "after"), rows)


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _fenced(values: dict[str, Any]) -> str:
    """YAML that cannot close its own code block."""
    return yaml.safe_dump(values, sort_keys=True, allow_unicode=True).replace("```", "'''")


def _cell(value: Any) -> str:
    """A user's string must not break out of its cell, nor become HTML."""
    return str(value).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _code(value: Any) -> str:
    return str(value).replace("`", "'").replace("\n", " ")
