"""Gates, divergences and policies in a user's own file: the documented example runs, and mistakes are one line."""

import shlex
import sys
from pathlib import Path

import pytest

from speckd.errors import ConfigError
from speckd.own_parts import build
from tests.repository.files import block
from tests.tiny import common_flags, log_of, run_cli
from tests.trainer.conftest import World, world  # noqa: F401  (a fixture)

PAGE = "docs/your-own-gate.md"


SHOWN = {
    "gate": "argmax q_t = argmax p_t, max p_t ≥ 0.3",
    "divergence": "V_t · squared_hellinger",
    "policy": "½(1 − a_t) · (−log q_t(y_t))",
}


@pytest.mark.parametrize(
    ("part", "file"), [("gate", "my_gates.py"), ("divergence", "my_divergences.py"), ("policy", "my_policies.py")]
)
def test_the_documented_example_trains(world: World, tmp_path: Path, monkeypatch, capsys, part: str, file: str) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    Path(file).write_text(block(f"python: {part}", PAGE))
    Path("run.yaml").write_text("max_steps: 2\n")
    words = shlex.split(block(f"command: {part}", PAGE))
    assert words[:2] == ["speckd", "train"]
    flags = [*words[2:], *common_flags(world.student, world.teacher, world.data, Path("out"))]
    assert run_cli([*flags, "--dry-run"]) == 0 and not Path("out").exists()
    assert SHOWN[part] in capsys.readouterr().out
    assert run_cli(flags) == 0
    log = log_of(Path("out"))
    assert len(log) == 2 and all(0 <= entry["tar"] <= 1 and entry["grad_norm"] > 0 for entry in log)


def test_the_example_is_what_it_says(tmp_path: Path) -> None:
    import torch

    from speckd.own_parts import example_rows

    path = tmp_path / "mine.py"
    path.write_text(block("python: gate", PAGE))
    gate, rows = build("gate", f"{path}:SameProposal", {"least": 0.1}), example_rows()
    p, q = rows.teacher.logits.softmax(-1), rows.student_logits.softmax(-1)
    wanted = [float(int(a.argmax()) == int(b.argmax()) and float(a.max()) >= 0.1) for a, b in zip(p, q, strict=True)]
    assert gate(rows).tolist() == wanted and 0 < sum(wanted) < len(wanted)
    assert build("gate", f"{path}:SameProposal", {"least": 0.1}) == gate  # the same class, however often it is named
    assert torch.is_tensor(gate(rows))


def test_a_module_that_can_be_imported_and_what_is_made_already(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "speckd_test_parts.py").write_text("from speckd.policies import Mask\nmine = Mask()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build("rejected", "speckd_test_parts:mine", {}) == build("rejected", "speckd.policies:Mask", {})
    del sys.modules["speckd_test_parts"]


def test_what_a_part_asks_for_is_there_when_it_is_tried(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "class Nearer:\n    needs_reference = True\n\n    def __call__(self, rows):\n"
        "        known = rows.required_reference.label_log_prob(rows.labels)\n"
        "        return (known > rows.student_label_log_prob).float()\n\n\n"
        "def quiet(rows):\n    return rows.reference.label_log_prob(rows.labels).exp()\n\n\n"
        "class Wrong:\n    def at(self, labels):\n        return lambda q, p: -q.gather(-1, labels[:, None])[:, 0]\n\n"
        "    def __call__(self, student, teacher):\n        raise AssertionError\n"
    )
    assert build("gate", f"{tmp_path}/mine.py:Nearer", {}).needs_reference
    assert build("divergence", f"{tmp_path}/mine.py:Wrong", {})
    with pytest.raises(ConfigError, match="it fails"):  # it does not say that it needs one, so training would give it none
        build("gate", f"{tmp_path}/mine.py:quiet", {})


def test_they_may_be_those_of_the_students_own_text(world: World, tmp_path: Path, capsys) -> None:  # noqa: F811
    (tmp_path / "mine.py").write_text(
        "from speckd.policies import Mask\n\n\ndef gap(student, teacher):\n"
        "    return (student.exp() - teacher.exp()).square().sum(-1)\n\n\ndef none(student, teacher):\n    return None\n"
    )
    flags = [*common_flags(world.student, world.teacher, world.data, tmp_path / "out"), "--recipe", "gkd+speckd"]
    flags += ["--max_steps", "1", "--max_completion_length", "8", "--student_text_divergence"]
    assert run_cli([*flags, f"{tmp_path}/mine.py:gap", "--student_text_rejected", f"{tmp_path}/mine.py:Mask"]) == 0
    said = capsys.readouterr()
    assert "Mask() → gap" in said.out + said.err and len(log_of(tmp_path / "out")) == 1
    assert run_cli([*flags, f"{tmp_path}/mine.py:none"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: student_text_divergence: ")


@pytest.mark.parametrize(
    ("key", "text", "name", "options", "said"),
    [
        ("gate", None, "G", {}, "gate: there is no file "),
        ("gate", "x = 1", "G", {}, "gate: there is no 'G' in "),
        ("gate", "def G(", "G", {}, "cannot be imported (SyntaxError"),
        ("gate", "import nothing_like_it", "G", {}, "cannot be imported (ModuleNotFoundError"),
        ("gate", "G = 5", "G", {}, "is not a gate: asked about 64 rows, it fails (TypeError: 'int' object is not callable)"),
        ("gate", "def G(rows): return 1", "G", {}, "it gives int. Return [64]"),
        ("gate", "def G(rows): return rows.student_logits", "G", {}, "it gives a tensor of shape [64, 32]"),
        ("gate", "def G(rows): return 2.0 + 0 * rows.student_logits[:, 0]", "G", {}, "accepts between 2 and 2"),
        ("gate", "def G(rows): return rows.nothing", "G", {}, "it fails (AttributeError"),
        ("gate", "def G(rows): return rows.student_logits[:, 0]", "G", {"k": 1}, "is no class and takes no options"),
        ("gate", "class G:\n  def __call__(self, rows): pass", "G", {"k": 1}, "does not take these"),
        ("gate", "class G:\n  def __init__(self, share, least=1): pass", "G", {"k": 1}, ". Valid: least, share"),
        ("gate", "class G:\n  def __call__(self, rows): pass", "G", {"k": 1}, "has no options"),
        ("divergence", "def G(a, b): return (a - b).sum()", "G", {}, "is not a divergence: asked about 64 rows"),
        ("divergence", "def G(a, b): return (a - a).sum(-1) / 0", "G", {}, "gives NaN for an example"),
        ("rejected", "class G: pass", "G", {}, "is not a policy for rejected tokens"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, key: str, text: str | None, name: str, options: dict, said: str) -> None:
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        build(key, f"{path}:{name}", options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_mistake_ends_the_command_with_2(world: World, tmp_path: Path, capsys) -> None:  # noqa: F811
    flags = common_flags(world.student, world.teacher, world.data, tmp_path / "out")
    assert run_cli([*flags, "--gate", str(tmp_path / "none.py:Gate")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: gate: there is no file") and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_resumed_run_notices_that_a_part_was_written_anew(world: World, tmp_path: Path, monkeypatch, capsys) -> None:  # noqa: F811
    """A module is loaded once in a process; what is compared is the file."""
    monkeypatch.chdir(tmp_path)
    Path("resumed_gate.py").write_text("def G(rows): return 0 * rows.student_logits[:, 0] + 1\n")
    own = common_flags(world.student, world.teacher, world.data, Path("out"))
    flags = [*own, *"--gate resumed_gate.py:G --recipe kd --save_strategy steps --save_steps 1 --max_steps".split()]
    resume = ["--resume_from_checkpoint", "true"]
    assert run_cli([*flags, "2"]) == 0 and run_cli([*flags, "2", *resume]) == 0
    Path("resumed_gate.py").write_text("def G(rows): return 0 * rows.student_logits[:, 0]\n")
    capsys.readouterr()
    assert run_cli([*flags, "2", *resume]) == 2
    assert "error: resume: gate: resumed_gate.py:G: what the file says has changed" in capsys.readouterr().err
    assert run_cli([*flags, "2", *resume, "--allow_changed_config", "true"]) == 0
    assert run_cli([*flags, "2", *resume]) == 0  # the change is known now
