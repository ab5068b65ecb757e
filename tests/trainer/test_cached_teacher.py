"""`speckd cache` and `teacher: cache`: a run from the cache is the run with the teacher in process."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from speckd import capture
from speckd.capture import CacheRoom
from speckd.cli import main
from speckd.collation import Wanted
from speckd.teachers.layout import Kind, Layout
from speckd.teachers.store import Store
from tests.repository.files import ROOT
from tests.tiny import common_flags, log_of, run_cli, task_rows, write_model, write_rows
from tests.trainer.conftest import World


def top_k(k: int) -> list[str]:
    return ["--gate", "top_k", "--gate_options", json.dumps({"verify_top_k": k}), "--rejected", "mask"]


TOP_K = top_k(60)
STEPS = ["--max_steps", "6"]


def flags_of(world: World, output: Path, *more: str) -> list[str]:
    return [*common_flags(world.student, world.teacher, world.data, output), "--eval_dataset", str(world.data), *STEPS, *more]


def cache_of(world: World, folder: Path, *more: str) -> list[str]:
    """Fills a cache; the flags of a run that uses it."""
    own = ["--teacher_cache_dir", str(folder), *more]
    assert main(["cache", *flags_of(world, folder.parent / "unused", *own)]) == 0
    assert not (folder.parent / "unused").exists()
    return ["--teacher", "cache", "--teacher_cache_dir", str(folder)]


def curve(output: Path, *names: str) -> list[list[float]]:
    return [[entry[name] for entry in log_of(output)] for name in names]


@pytest.fixture(scope="module")
def in_process(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "in-process"
    assert run_cli(flags_of(world, output, *TOP_K)) == 0
    return output


@pytest.mark.parametrize(
    ("kept", "loss_error"),
    [
        (["--teacher_cache_kind", "full", "--teacher_cache_bits", "32"], 1e-6),
        (["--teacher_top_k", "256", "--teacher_cache_bits", "32"], 1e-6),  # K = V
        (["--teacher_top_k", "256"], 2e-3),  # half precision
        (["--teacher_top_k", "256", "--teacher_cache_compression", "zlib"], 2e-3),
    ],
    ids=["full", "K = V", "K = V, 16 bits", "zlib"],
)
def test_the_same_curve_as_with_the_teacher_in_process(
    kept: list[str], loss_error: float, world: World, in_process: Path, tmp_path: Path
) -> None:
    use = cache_of(world, tmp_path / "cache", *kept)
    assert run_cli(flags_of(world, tmp_path / "out", *TOP_K, *use)) == 0
    found, wanted = (curve(output, "loss", "tar", "grad_norm") for output in (tmp_path / "out", in_process))
    assert found[1] == pytest.approx(wanted[1], abs=1e-12), "the greedy gate's verdicts are exact"
    assert found[0] == pytest.approx(wanted[0], rel=loss_error) and found[2] == pytest.approx(wanted[2], rel=5 * loss_error)


def test_a_whole_vocabulary_at_16_bits_is_exact_up_to_rank_32_and_refused_beyond(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    use = cache_of(world, tmp_path / "cache", "--teacher_cache_kind", "full")
    for name, more in (("cached", use), ("whole", [])):
        assert run_cli(flags_of(world, tmp_path / name, *top_k(32), *more)) == 0
    found, wanted = (curve(tmp_path / name, "loss", "tar") for name in ("cached", "whole"))
    assert found[1] == pytest.approx(wanted[1], abs=1e-12) and found[0] == pytest.approx(wanted[0], rel=2e-3)
    for gate in ("top_k", "two_sided", "label_in_top_k", "inverted"):
        options = {"verify_top_k": 33} | ({"gate": "top_k"} if gate == "inverted" else {})
        capsys.readouterr()
        flags = flags_of(world, tmp_path / "out", "--gate", gate, "--gate_options", json.dumps(options), *use)
        assert run_cli(flags) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "verify_top_k is 33" in error and "the top 32 keep" in error and "teacher_cache_bits: 32" in error
        assert not (tmp_path / "out").exists()


def test_a_truncated_teacher_keeps_the_verdicts_and_bounds_the_loss(world: World, in_process: Path, tmp_path: Path) -> None:
    """One step from one start: KL on the top-K and a tail is never above the whole (data processing)."""
    use = cache_of(world, tmp_path / "cache", "--teacher_top_k", "64")
    assert run_cli(flags_of(world, tmp_path / "out", *TOP_K, *use)) == 0
    (found, tar), (whole, all_tar) = (curve(output, "loss", "tar") for output in (tmp_path / "out", in_process))
    assert tar[0] == pytest.approx(all_tar[0], abs=1e-12) and 0 < found[0] <= whole[0] * (1 + 1e-5)
    end = json.loads((tmp_path / "out" / "results.json").read_text())["end"]
    assert {"kl_at_least", "alpha_at_least", "tar", "agreement", "teacher_nll"} <= end.keys() and not {
        "kl",
        "alpha",
    } & end.keys()


def test_order_epochs_batches_and_packing_do_not_matter(world: World, tmp_path: Path) -> None:
    use = cache_of(world, tmp_path / "cache", "--teacher_cache_kind", "full", "--teacher_cache_bits", "32")
    for name, how in {
        "shuffled": "--train_sampling_strategy random --per_device_train_batch_size 5 --num_train_epochs 2",
        "packed": "--packing true --max_length 128 --per_device_train_batch_size 2",
    }.items():
        for source, more in (("cached", use), ("whole", [])):
            assert run_cli(flags_of(world, tmp_path / f"{name}-{source}", *how.split(), *more)) == 0
        found, wanted = (curve(tmp_path / f"{name}-{source}", "loss") for source in ("cached", "whole"))
        assert found[0] == pytest.approx(wanted[0], rel=2e-6)


def test_the_teacher_need_not_be_there(world: World, tmp_path: Path, in_process: Path) -> None:
    lent = shutil.copytree(world.teacher, tmp_path / "lent")
    own = World(world.student, lent, world.data, world.place)
    use = cache_of(own, tmp_path / "cache", "--teacher_cache_kind", "full", "--teacher_cache_bits", "32")
    shutil.rmtree(lent)
    flags = [*common_flags(world.student, None, world.data, tmp_path / "out"), *STEPS, *TOP_K, *use]
    assert run_cli(flags) == 0
    assert curve(tmp_path / "out", "loss")[0] == pytest.approx(curve(in_process, "loss")[0], rel=1e-6)


def test_drawn_tokens_estimate_the_distribution_without_bias(world: World, tmp_path: Path) -> None:
    """Sparse Logit Sampling: averaged over rows, what was drawn has the mass of the teacher's own distribution."""
    cache_of(world, tmp_path / "whole", "--teacher_cache_kind", "full", "--teacher_cache_bits", "32")
    cache_of(world, tmp_path / "drawn", "--teacher_cache_kind", "sampled", "--teacher_cache_samples", "200")
    whole, drawn = Store.open(tmp_path / "whole"), Store.open(tmp_path / "drawn")
    from speckd.tasks import build_tokenizer

    gaps = []
    for row in task_rows(24):
        ids = torch.tensor([*build_tokenizer().encode(row["prompt"] + row["completion"]), 1])
        if ids not in whole:
            continue
        exact, some = whole.answer(ids), drawn.answer(ids)
        assert torch.equal(exact.label_log_probs, some.label_log_probs) and some.token_ids is not None and not some.ranked
        seen = torch.zeros_like(exact.log_probs).scatter_(-1, some.token_ids, some.log_probs.exp())
        assert torch.allclose(seen.sum(-1), torch.ones(len(seen)), atol=1e-5)
        gaps.append((seen - exact.log_probs.exp()) / (exact.log_probs.exp() / 200).sqrt().clamp(min=1e-3))
    z = torch.cat(gaps)
    assert len(z) > 100 and abs(float(z.mean())) < 0.05 and 0.3 < float(z.std()) < 1.2


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        (["--gate", "top_k", "--gate_options", '{"verify_top_k": 5}'], "verify_top_k is 5, but the teacher gives its top 4"),
        (["--gate", "spec"], "spec needs the teacher's probability of whatever the student draws"),
        (["--gate", "none", "--divergence_temperature", "2"], "divergence_temperature is 2.0"),
        (["--gate", "none", "--scrambled_teacher_fraction", "0.5"], "scrambled_teacher_fraction"),
    ],
    ids=["k above K", "spec", "temperature", "scrambled"],
)
def test_what_a_truncated_teacher_cannot_answer_is_refused_at_once(
    gate: list[str], said: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    use = cache_of(world, tmp_path / "cache", "--teacher_top_k", "4")
    capsys.readouterr()
    assert run_cli(flags_of(world, tmp_path / "out", *gate, *use)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kept", "gate", "said"),
    [
        (["--teacher_top_k", "4"], top_k(5), "verify_top_k is 5, but the teacher gives its top 4 only"),
        (["--teacher_cache_kind", "full"], top_k(33), "verify_top_k is 33"),
        (["--teacher_cache_kind", "sampled"], top_k(5), "drawn at random"),
        ([], ["--gate", "spec"], "spec needs the teacher's probability"),
    ],
    ids=["K", "full at 16 bits", "drawn", "spec"],
)
def test_a_cache_that_its_own_run_could_not_use_is_not_made(
    kept: list[str], gate: list[str], said: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = flags_of(world, tmp_path / "unused", "--teacher_cache_dir", str(tmp_path / "cache"), *kept, *gate)
    assert main(["cache", *flags]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "cache").exists()


def test_without_a_teacher_there_is_nothing_to_cache(world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = common_flags(world.student, None, world.data, tmp_path / "unused")
    assert main(["cache", *flags, "--recipe", "sft", "--teacher_cache_dir", str(tmp_path / "cache")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: teacher_model_name_or_path is not set") and not (tmp_path / "cache").exists()
    flags = common_flags(world.student, world.teacher, world.data, tmp_path / "unused")
    assert main(["cache", *flags, "--recipe", "sft", "--teacher_cache_dir", str(tmp_path / "cache")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error.startswith("error: there is nothing to cache: this method asks no teacher") and not (tmp_path / "cache").exists()
    )


def test_another_mask_is_refused_before_the_first_step_and_a_smaller_one_is_not(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    some = cache_of(world, tmp_path / "some", "--teacher_cache_compression", "zlib")
    whole = cache_of(world, tmp_path / "whole", "--completion_only_loss", "false")
    capsys.readouterr()
    assert run_cli(flags_of(world, tmp_path / "out", "--completion_only_loss", "false", *some)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "does not hold every supervised position, first of that of row 1:" in error and "completion_only_loss" in error
    assert not (tmp_path / "out").exists()
    assert run_cli(flags_of(world, tmp_path / "out", *whole)) == 0


def test_what_is_not_the_runs_own_cache_is_refused(world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    use = cache_of(world, tmp_path / "cache")
    other = write_model(tmp_path / "other", seed=7, hidden=32, layers=2, width=256)
    more_rows = write_rows(tmp_path / "more.jsonl", task_rows(30, seed=4))
    for world_, more, said in (
        (World(world.student, other, world.data, world.place), [], "teacher_weights"),
        (
            World(world.student, world.teacher, more_rows, world.place),
            [],
            "sequences are not in the cache, first that of row 1",
        ),
        (world, ["--max_length", "20"], "sequences are not in the cache"),
        (world, ["--teacher_cache_dir", str(tmp_path / "none")], "no cached teacher"),
    ):
        capsys.readouterr()
        assert run_cli(flags_of(world_, tmp_path / "out", *use, *more)) == 2
        assert said in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "out").exists()


def test_a_capture_that_is_there_already_is_not_made_again(world: World, tmp_path: Path) -> None:
    cache_of(world, tmp_path / "cache")
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "cache").iterdir()}
    cache_of(world, tmp_path / "cache")
    assert before == {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "cache").iterdir()}


def test_a_disk_too_small_is_said_before_the_first_forward(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 2000))  # type: ignore[attr-defined]
    flags = flags_of(world, tmp_path / "unused", "--teacher_cache_dir", str(tmp_path / "cache"))
    assert main(["cache", *flags]) == 2
    assert "the cache takes about" in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "cache").exists()


def apart(*arguments: str, killed_after: int = -1, processes: int = 1) -> int:
    """The exit code of `speckd cache` in processes of its own, in shards of 60 answers."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launcher, "tests.trainer.capture_apart", str(killed_after), *arguments]
    return subprocess.run(command, check=False, capture_output=True, cwd=ROOT, env=environment, timeout=200).returncode


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_or_shared_by_processes_a_capture_ends_with_the_same_bytes(world: World, tmp_path: Path) -> None:
    def capture(folder: Path, **how: int) -> int:
        return apart(*flags_of(world, tmp_path / "unused", "--teacher_cache_dir", str(folder)), **how)

    assert capture(tmp_path / "whole") == 0
    wanted = contents(tmp_path / "whole")
    assert len([name for name in wanted if "shard" in name]) >= 4
    for kills in (0, 2):
        assert capture(tmp_path / "killed", killed_after=kills) == -signal.SIGKILL
        assert "manifest.json" not in contents(tmp_path / "killed")
    assert (
        run_cli(flags_of(world, tmp_path / "out", "--teacher", "cache", "--teacher_cache_dir", str(tmp_path / "killed"))) == 2
    )
    assert capture(tmp_path / "killed") == 0 and contents(tmp_path / "killed") == wanted
    assert capture(tmp_path / "shared", processes=2) == 0 and contents(tmp_path / "shared") == wanted


def test_drawn_tokens_are_no_bound_for_spec(world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    use = cache_of(world, tmp_path / "drawn", "--teacher_cache_kind", "sampled")
    spec = ["--gate", "spec", "--gate_options", '{"allow_lower_bound": true}', "--rejected", "mask"]
    assert run_cli(flags_of(world, tmp_path / "out", *spec, *use)) == 2
    assert "drawn at random" in capsys.readouterr().err.splitlines()[-1]


def test_a_teacher_that_lacks_a_token_in_the_middle(world: World, tmp_path: Path) -> None:
    """Then the shared axis has other numbers than the tokens."""
    teacher = shutil.copytree(world.teacher, tmp_path / "teacher")
    file = teacher / "tokenizer.json"
    values = json.loads(file.read_text())
    del values["model"]["vocab"]["0"]
    file.write_text(json.dumps(values))
    lacking = replace(world, teacher=teacher)
    more = ["--max_dropped_mass", "1"]
    use = cache_of(lacking, tmp_path / "cache", "--teacher_cache_kind", "full", "--teacher_cache_bits", "32", *more)
    assert run_cli(flags_of(lacking, tmp_path / "whole", *TOP_K, *more)) == 0
    assert run_cli(flags_of(lacking, tmp_path / "out", *TOP_K, *more, *use)) == 0
    assert Store.open(tmp_path / "cache").manifest.provenance["vocabulary"]["ids"] is not None
    assert curve(tmp_path / "out", "tar") == curve(tmp_path / "whole", "tar")
    assert curve(tmp_path / "out", "loss")[0] == pytest.approx(curve(tmp_path / "whole", "loss")[0], rel=1e-6)


def test_a_capture_that_goes_on_needs_room_for_what_is_missing_only(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_of(world, tmp_path / "cache")
    monkeypatch.setattr(capture, "free_beside", lambda folder: (folder, 1000))
    cache_of(world, tmp_path / "cache")
    assert main(["cache", *flags_of(world, tmp_path / "unused", "--teacher_cache_dir", str(tmp_path / "other"))]) == 2


def test_room_for_a_cache_counts_what_is_there_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So neither a capture that goes on nor the doctor asks for it twice."""
    wanted, layout = [Wanted(torch.arange(50), torch.arange(49), row=1)], Layout(Kind.TOP_K, 100, 8)
    needed = CacheRoom.of(wanted, layout, tmp_path).needed
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, needed - 1))  # type: ignore[attr-defined]
    assert not CacheRoom.of(wanted, layout, tmp_path).fits
    (tmp_path / "shard-00000.answers").write_bytes(b"x")
    assert CacheRoom.of(wanted, layout, tmp_path).fits


def test_the_card_names_the_teacher_that_was_captured_and_how(world: World, tmp_path: Path) -> None:
    """Also where the file names none, or another."""
    used = cache_of(world, tmp_path / "cache", "--teacher_top_k", "8")
    flags = [*common_flags(world.student, None, world.data, tmp_path / "out"), *used, "--max_steps", "1"]
    assert run_cli([*flags, "--eval_dataset", str(world.data), "--teacher_top_k", "8"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"taught by `{world.teacher}` (revision main; from a cache of its answers: top_k of 8 tokens, 16 bits): gate" in card
    assert "KL(teacher ‖ student) on the teacher's top-K" in card and "the same" not in card
