"""What the documents say, held against what is there."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import speckd
from speckd.config import DIVERGENCES, GATES, REJECTED
from tests.repository.files import PACKAGE, ROOT, block, committed, first_column, modules, texts

#: Folders where people keep their files: such a path in a committed file is somebody's machine. It does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.~:/$}\]-])/(?:home|root|work|Users|opt|private)/[\w.-]+")
RUNNER = """
import sys
import torch
torch.set_num_threads(1)
from transformers import LlamaConfig, LlamaForCausalLM
{snippet}
tiny = dict(vocab_size=11, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16)
torch.manual_seed(0)
student = LlamaForCausalLM(LlamaConfig(hidden_size=8, **tiny))
teacher = LlamaForCausalLM(LlamaConfig(hidden_size=12, **tiny)).eval()
ids = torch.randint(1, 11, (2, 6))
labels = ids.clone()
labels[:, :2] = -100
value = loss(student, teacher, ids, labels, torch.ones_like(ids))
value.backward()
assert value.item() > 0 and all(p.grad is not None for p in student.parameters()), value
assert all(p.grad is None for p in teacher.parameters())
from speckd.reference import speckd_loss
seen = [model(input_ids=ids).logits[:, :-1] for model in (student, teacher)]
wanted, _ = speckd_loss(*seen, labels[:, 1:] != -100)
assert torch.allclose(value, wanted, rtol=1e-4), (value, wanted)
print("ran")
"""


def test_the_tree_in_the_readme_is_the_tree() -> None:
    lines = block("tree").splitlines()
    files = [p for p in modules() if p.parent == PACKAGE]
    packages = {p.relative_to(PACKAGE).parts[0] + "/" for p in modules() if p.parent != PACKAGE}
    assert sorted(line.split()[0] for line in lines) == sorted([*(p.name for p in files), *packages])
    assert all(len(line.split()) > 1 for line in lines), "every file and every package has its line of explanation"


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_file_says_in_its_first_line_what_it_is(path: Path) -> None:
    said = ast.get_docstring(ast.parse(path.read_text()))
    assert said and len(said.split()) > 2


def test_the_python_in_the_readme_runs_and_is_the_method() -> None:
    code = RUNNER.format(snippet=block("python: loop"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.strip() == "ran", done.stderr[-2000:]


def test_every_python_block_of_the_readme_is_one_that_runs() -> None:
    assert (ROOT / "README.md").read_text().count("```python") == 1


def test_the_yaml_in_the_readme_is_understood(tmp_path: Path) -> None:
    from speckd.settings import load_settings  # TRL is imported here and not before

    config = tmp_path / "run.yaml"
    config.write_text(block("yaml: run"))
    settings = load_settings(config, None, [])
    assert settings.recipe is None
    assert settings.training.objective().gate == GATES["top_k"](verify_top_k=5)
    assert settings.training.objective().rejected == REJECTED["down_weight"](rejected_weight=0.01)


def test_the_recipes_in_the_readme_are_those_shipped() -> None:
    from speckd.recipe_book import DEFAULT_RECIPE

    shipped = {p.stem for p in (PACKAGE / "recipes").glob("*.yaml")}
    assert set(first_column("README.md", "recipe")) == shipped
    assert f"| `{DEFAULT_RECIPE}` (default) |" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", ["tests", "quickstart"])
def test_the_commands_start_from_nothing(name: str) -> None:
    command = block(f"command: {name}")
    assert command.startswith("python3 -m venv .venv && . .venv/bin/activate && pip install torch==2.13.0 && pip install -e ")
    assert command.count("\n") == 1, "one line to copy"


@pytest.mark.parametrize(("heading", "known"), [("`gate`", GATES), ("`rejected`", REJECTED), ("`divergence`", DIVERGENCES)])
def test_the_method_page_has_every_choice(heading: str, known: dict) -> None:
    assert sorted(first_column("docs/method.md", heading)) == sorted(known)


def test_the_method_page_says_of_every_gate_what_a_truncated_teacher_does() -> None:
    section = (ROOT / "docs/method.md").read_text().split("## 6.")[1].split("## 7.")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")][1:]  # the first is the heading
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(GATES)


def test_links_between_documents_lead_somewhere() -> None:
    for path, text in texts():
        if path.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in target:
                assert (ROOT / path.parent / target).exists(), f"{path}: {target}"


def test_the_version_is_one() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert speckd.__version__ == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_no_path_of_somebodys_machine() -> None:
    found = [(str(path), match) for path, text in texts() for match in MACHINE_PATH.findall(text)]
    assert not found


@pytest.mark.parametrize(("text", "found"), [("see /" + "home/ann/x", True), ("a/work/b", False), ("../shared/data", False)])
def test_the_search_for_paths_finds_them(text: str, found: bool) -> None:
    assert bool(MACHINE_PATH.search(text)) is found


def test_nothing_large_is_committed() -> None:
    assert not [str(p) for p in committed() if p.stat().st_size > 4_000_000]


def test_layers_on_the_design_page_are_those_enforced() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["type"] == "layers")
    assert "\n".join(layers) in (ROOT / "docs/design.md").read_text()
