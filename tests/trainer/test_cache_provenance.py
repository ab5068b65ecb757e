"""A cache says where its answers come from, and a run that knows better is refused by the field, with both values."""

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from speckd import fingerprints, provenance
from speckd.cli import main
from speckd.tasks import build_tokenizer
from speckd.teachers.store import Store
from tests.tiny import common_flags, run_cli, write_model
from tests.trainer.conftest import World

MAIN, MOVED = "a" * 40, "b" * 40


def cached(world: World, folder: Path, teacher: str | Path, *more: str) -> dict[str, Any]:
    """Captures; what the manifest says."""
    flags = common_flags(world.student, Path(teacher), world.data, folder.parent / "unused")
    assert main(["cache", *flags, "--teacher_cache_dir", str(folder), *more]) == 0
    return dict(Store.open(folder).manifest.provenance)


@pytest.fixture
def use(world: World, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Runs from `cache` with more flags; the last line of what was said in error, None where it ran."""

    def run(*more: str, cache: Path = tmp_path / "cache") -> str | None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        capsys.readouterr()
        flags = [*common_flags(world.student, None, world.data, tmp_path / "out"), "--max_steps", "1", "--teacher", "cache"]
        code = run_cli([*flags, "--teacher_cache_dir", str(cache), *more])
        if code == 0:
            return None
        assert code == 2 and not (tmp_path / "out").exists()
        return capsys.readouterr().err.splitlines()[-1]

    return run


@pytest.fixture(scope="module")
def cache(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("provenance") / "cache"
    cached(world, folder, world.teacher)
    return folder


def test_the_manifest_names_the_teacher_and_how_it_was_loaded(cache: Path, world: World) -> None:
    manifest = Store.open(cache).manifest
    said = manifest.provenance
    assert said["teacher"] == str(world.teacher) and said["teacher_weights"] == fingerprints.of_model_folder(world.teacher)
    assert (said["teacher_revision"], said["teacher_commit"], said["teacher_dtype"]) == ("main", None, "torch.float32")
    assert said["teacher_quantization"] is said["teacher_base"] is None and said["teacher_options"] == {}
    assert manifest.libraries == provenance.libraries() and manifest.libraries["torch"] == torch.__version__
    assert manifest.libraries.keys() == {"speckd", "torch", "transformers"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--teacher_model_name_or_path org/another", '"org/another" now'),
        ("--teacher_model_revision v2", 'teacher_revision is "main" there and "v2" now'),
        ('--teacher_model_init_kwargs {"dtype":"half"}', 'teacher_dtype is "torch.float32" there and "torch.float16" now'),
        (
            '--teacher_model_init_kwargs {"quantization_config":{"quant_method":"gptq"}}',
            'teacher_quantization is null there and {"quant_method": "gptq"} now',
        ),
        (
            '--teacher_model_init_kwargs {"num_hidden_layers":1}',
            "teacher_options.num_hidden_layers is absent there and 1 now",
        ),
        ("--teacher_top_k 16", "teacher_top_k is 32 there and 16 now"),
        ("--teacher_top_k 33", "teacher_top_k is 32 there and 33 now"),
        ("--teacher_cache_kind full", 'teacher_cache_kind is "top_k" there and "full" now'),
        ("--teacher_cache_bits 32", "teacher_cache_bits is 16 there and 32 now"),
    ],
)
def test_what_a_run_sets_otherwise_is_refused_by_its_name(more: str, said: str, use: Any, cache: Path) -> None:
    error = use(*more.split(), cache=cache)
    assert error is not None and "the cached teacher is not this run's" in error and said in error


def test_what_a_run_sets_alike_or_not_at_all_is_not_refused(use: Any, cache: Path, world: World, tmp_path: Path) -> None:
    assert use(cache=cache) is None
    elsewhere = shutil.copytree(world.teacher, tmp_path / "elsewhere")  # the same weights under another name
    kwargs = '{"torch_dtype": "float32", "attn_implementation": "eager", "device_map": "cpu"}'
    same = ["--teacher_top_k", "32", "--teacher_cache_kind", "top_k", "--teacher_cache_bits", "16"]
    same += ["--teacher_cache_samples", "7", "--teacher_model_init_kwargs", kwargs]
    assert use("--teacher_model_name_or_path", str(elsewhere), *same, cache=cache) is None


def test_how_the_teacher_was_changed_is_kept_and_compared(use: Any, world: World, tmp_path: Path) -> None:
    kwargs = '{"num_hidden_layers": 1, "dtype": "bfloat16"}'
    said = cached(world, tmp_path / "cache", world.teacher, "--teacher_model_init_kwargs", kwargs, "--teacher_top_k", "999")
    assert said["teacher_options"] == {"num_hidden_layers": 1} and said["teacher_dtype"] == "torch.bfloat16"
    assert use() is None and use("--teacher_model_init_kwargs", kwargs) is None
    assert use("--teacher_top_k", "999") is None, "as much as the vocabulary has"
    error = use("--teacher_model_init_kwargs", '{"num_hidden_layers": 2}')
    assert error is not None and "teacher_options.num_hidden_layers is 1 there and 2 now" in error


def test_the_base_of_an_adapter_is_compared(use: Any, world: World, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(world.teacher, base)
    get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=2)).save_pretrained(adapter)
    build_tokenizer().save_pretrained(adapter)
    said = cached(world, tmp_path / "cache", adapter)
    assert said["teacher_base"] == str(base) and said["teacher_base_weights"] == fingerprints.of_model_folder(base)
    assert use("--teacher_model_name_or_path", str(adapter)) is None
    write_model(base, seed=9, hidden=32, layers=2, width=256)
    error = use("--teacher_model_name_or_path", str(adapter))
    assert error is not None and f'teacher_base_weights is "{said["teacher_base_weights"]}" there and' in error
    shutil.rmtree(base)
    assert use("--teacher_model_name_or_path", str(adapter)) is None, "what is not here cannot be compared"


@pytest.fixture
def hub(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What was fetched from the hub of a model 'org/teacher'."""
    repository = tmp_path / "hub" / "models--org--teacher"
    shutil.copytree(world.teacher, repository / "snapshots" / MAIN)
    write_model(repository / "snapshots" / MOVED, seed=9, hidden=32, layers=2, width=256)
    (repository / "refs").mkdir()
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(MAIN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository


def test_a_teacher_from_the_hub_is_known_by_its_commit(use: Any, hub: Path, world: World, tmp_path: Path) -> None:
    said = cached(world, tmp_path / "cache", "org/teacher")
    assert (said["teacher"], said["teacher_revision"], said["teacher_commit"]) == ("org/teacher", "main", MAIN)
    assert said["teacher_weights"] == fingerprints.of_model_folder(world.teacher)
    named = "--teacher_model_name_or_path org/teacher --teacher_model_revision".split()
    for revision in ("main", "v1", MAIN):
        assert use(*named, revision) is None
    assert use("--teacher_model_name_or_path", str(world.teacher)) is None, "the same weights, in a folder"
    (hub / "refs" / "main").write_text(MOVED)
    for wrong in (named[:2], [*named, "main"], [*named, MOVED], [named[2], MOVED]):
        error = use(*wrong)
        assert error is not None and f'teacher_commit is "{MAIN}" there and "{MOVED}" now' in error
    assert use(*named, MAIN) is None
    shutil.rmtree(hub)
    assert use(*named, "main") is None, "where it is not here, the name of its revision is all that is known"
    error = use(*named, "v2")
    assert error is not None and 'teacher_revision is "main" there and "v2" now' in error


def test_other_libraries_are_said_and_not_refused(
    use: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    made_with = provenance.libraries()
    assert use(cache=cache) is None and "was made with" not in capsys.readouterr().err
    monkeypatch.setattr(provenance, "versions", lambda: made_with | {"torch": "99"})
    assert use(cache=cache) is None
    assert f"The cache was made with torch {made_with['torch']} (now 99)." in capsys.readouterr().err
