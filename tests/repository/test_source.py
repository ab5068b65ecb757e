"""What the source may not contain, read from its syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.repository.files import PACKAGE, modules

CORE = (
    "types", "randomness", "errors", "divergences", "gates", "policies", "support", "head", "tokens", "objective", "engine",
    "row_pass", "early_rejection", "tiles", "metrics", "reference", "compatibility", "config", "evaluate", "spans", "large",
    "teachers/in_process", "teachers/unreliable", "teachers/shared_prompt", "teachers/placement",
)  # fmt: skip
BANNED_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
BANNED_NAMES = {"eval", "exec", "__import__"}
BANNED_CALLS = {
    "os.system", "os.popen", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "torch.multinomial", "torch.save",
}  # fmt: skip
BANNED_ARGUMENTS = {("shell", True), ("weights_only", False), ("trust_remote_code", True)}
GLOBAL_DRAWS = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli", "multinomial",
    "poisson", "manual_seed", "seed", "exponential_", "uniform_", "normal_", "random_", "bernoulli_", "log_normal_",
    "geometric_", "cauchy_", "dropout",
}  # fmt: skip
#: Submodules that Transformers documents for use.
DOCUMENTED = {"transformers.trainer_utils", "transformers.utils"}
PRIVATE_HOME = PACKAGE / "trl_internals.py"
#: Runs in the box only, where it is what starts a program; nothing imports it to call it.
INSIDE = PACKAGE / "box" / "inside.py"


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imports(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """(module, imported name or None) of every import, also of those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def dangers(tree: ast.AST) -> Iterator[str]:
    for module, _ in imports(tree):
        if module.split(".")[0] in BANNED_MODULES:
            yield f"imports {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in BANNED_NAMES | BANNED_CALLS or name.endswith(".multinomial"):
                yield f"line {node.lineno}: calls {name}"
            for keyword in node.keywords:
                if isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in BANNED_ARGUMENTS:
                    yield f"line {node.lineno}: {keyword.arg}={keyword.value.value}"
            if name == "torch.load" and not any(k.arg == "weights_only" for k in node.keywords):
                yield f"line {node.lineno}: torch.load without weights_only"
        elif isinstance(node, ast.AnnAssign) and dotted(node.target) == "trust_remote_code":
            if not any(isinstance(part, ast.Constant) and part.value is False for part in ast.walk(node)):
                yield f"line {node.lineno}: a default for trust_remote_code"
        elif isinstance(node, ast.arguments):
            defaults = zip(node.args[::-1] + node.kwonlyargs[::-1], node.defaults[::-1] + node.kw_defaults[::-1], strict=False)
            if any(a.arg == "trust_remote_code" and getattr(d, "value", None) is True for a, d in defaults):
                yield "trust_remote_code is true by default"


def private_imports(tree: ast.AST) -> Iterator[str]:
    """Of TRL only the top level is public; of Transformers that and what is documented; nothing with an underscore."""
    for module, name in imports(tree):
        root, _, inside = module.partition(".")
        if root not in ("trl", "transformers", "peft", "accelerate", "datasets"):
            continue
        hidden = any(part.startswith("_") for part in [*module.split("."), name or ""])
        if hidden or (root in ("trl", "transformers") and inside and module not in DOCUMENTED):
            yield f"{module}.{name}" if name else module


def global_draws(tree: ast.AST) -> Iterator[str]:
    for module, _ in imports(tree):
        if module.split(".")[0] in ("random", "numpy"):
            yield f"imports {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in GLOBAL_DRAWS and "." in dotted(node.func):
            yield f"line {node.lineno}: {dotted(node.func)}"


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Public functions and classes of a module without a docstring; a protocol may leave it to its methods."""
    if not ast.get_docstring(tree):
        yield "the module"
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_") or ast.get_docstring(node):
            continue
        methods = [m for m in ast.iter_child_nodes(node) if isinstance(m, ast.FunctionDef)]
        protocol = isinstance(node, ast.ClassDef) and any(dotted(base) == "Protocol" for base in node.bases)
        if not (protocol and methods and all(ast.get_docstring(m) for m in methods)):
            yield node.name


def read(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def named(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", modules(), ids=named)
def test_nothing_dangerous(path: Path) -> None:
    found = list(dangers(read(path)))
    assert not found if path != INSIDE else {what.split(": ")[1] for what in found} == {"calls eval", "calls exec"}


@pytest.mark.parametrize("path", [p for p in modules() if p != PRIVATE_HOME], ids=named)
def test_private_parts_of_libraries_are_imported_in_one_place(path: Path) -> None:
    assert not list(private_imports(read(path)))


@pytest.mark.parametrize("name", CORE)
def test_the_core_has_no_global_randomness(name: str) -> None:
    assert not list(global_draws(read(PACKAGE / f"{name}.py")))


@pytest.mark.parametrize("name", CORE)
def test_the_core_is_documented(name: str) -> None:
    assert not list(undocumented(read(PACKAGE / f"{name}.py")))


@pytest.mark.parametrize(
    ("find", "code"),
    [
        (dangers, "import pickle"),
        (dangers, "def f():\n    from pickle import loads"),
        (dangers, "eval('1')"),
        (dangers, "subprocess.run('ls', shell=True)"),
        (dangers, "torch.load('x', weights_only=False)"),
        (dangers, "torch.load('x')"),
        (dangers, "yaml.load(text)"),
        (dangers, "probs.multinomial(1)"),
        (dangers, "AutoModel.from_pretrained(name, trust_remote_code=True)"),
        (dangers, "def f(name, trust_remote_code=True): ..."),
        (dangers, "class A:\n    trust_remote_code: bool = True"),
        (private_imports, "from trl.trainer.sft_trainer import x"),
        (private_imports, "from transformers import _private"),
        (private_imports, "import transformers.modeling_utils"),
        (global_draws, "torch.rand(3)"),
        (global_draws, "import random"),
        (global_draws, "x.uniform_()"),
        (undocumented, '"""A module."""\ndef f(): ...'),
    ],
)
def test_the_searches_find_what_they_look_for(find, code: str) -> None:
    assert list(find(ast.parse(code)))


@pytest.mark.parametrize(
    ("find", "code"),
    [
        (dangers, "model.eval()"),
        (dangers, "yaml.safe_load(text)"),
        (private_imports, "from trl import SFTTrainer"),
        (private_imports, "from transformers.trainer_utils import get_last_checkpoint"),
        (global_draws, "uniforms(seed, 0, sample, position, 1)"),
    ],
)
def test_the_searches_find_nothing_else(find, code: str) -> None:
    assert not list(find(ast.parse(code)))
