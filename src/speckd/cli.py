"""The command line. Nothing heavy is imported before a command needs it; a user's mistake is one line and exit code 2."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from speckd.errors import SpeckdError

app = typer.Typer(
    name="speckd",
    help="Distil a language model where the teacher's word can be trusted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"speckd {version('speckd')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Distil a language model where the teacher's word can be trusted."""


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Every setting is a key of the file and a flag: --learning_rate 1e-4. 'speckd options' lists them all.",
)
def train(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="A flat YAML file of settings, in TRL's names.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A shipped method, or several, a+b: 'speckd recipes'.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", "--dry_run", help="Only show how the method is composed.")] = False,
) -> None:
    """Distil a teacher into a student: --config run.yaml, and any setting as a flag."""
    _say_to_people()
    if dry_run:
        from speckd.composition import composition
        from speckd.settings import load_settings

        typer.echo("\n".join(composition(load_settings(config, recipe, context.args))))
        return
    from speckd.run import train as run

    run(config, recipe, context.args)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def profile(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="A flat YAML file of settings, in TRL's names.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A shipped method, or several, a+b: 'speckd recipes'.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps that are measured, after two to warm up.")] = 5,
) -> None:
    """Where the time of a training step goes: with all that 'speckd train' takes, and nothing is kept."""
    _say_to_people()
    from speckd.profile import profile as run

    run(config, recipe, context.args, steps)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def cache(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="The file of the run that will use the cache.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A shipped method, or several, a+b: 'speckd recipes'.")] = None,
) -> None:
    """Keep the teacher's answers for a run on disk: the run then needs no teacher ('teacher: cache')."""
    _say_to_people()
    from speckd.capture import capture

    capture(config, recipe, context.args)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def write(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="The data set to be written, a .jsonl file.")],
    config: Annotated[Path | None, typer.Option(help="The file of the run whose prompts are answered.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A shipped method: 'speckd recipes' lists them.")] = None,
    samples_per_prompt: Annotated[
        int, typer.Option("--samples_per_prompt", "--samples-per-prompt", help="Completions of each prompt.")
    ] = 1,
    keep_truncated: Annotated[
        bool,
        typer.Option("--keep_truncated", "--keep-truncated", help="Keep completions cut off at max_completion_length."),
    ] = False,
) -> None:
    """Have the teacher answer a run's prompts, once: a data set for 'speckd train' (recipe seqkd)."""
    _say_to_people()
    from speckd.write import Writing
    from speckd.write import write as run

    run(config, recipe, context.args, Writing(output, samples_per_prompt, keep_truncated))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def doctor(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="A flat YAML file of settings, in TRL's names.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A shipped method, or several, a+b: 'speckd recipes'.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    thorough: Annotated[bool, typer.Option("--thorough", help="Read every byte of a cache, however large.")] = False,
) -> None:
    """What would go wrong in a run, before it: nothing is trained or written. Exit code 2 where something would."""
    _say_to_people()
    from speckd.doctor.page import doctor as run

    if not run(config, recipe, context.args, as_json, thorough):
        raise typer.Exit(2)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="One task by flags: --task math --data rows.jsonl. Two evaluations side by side: --compare OUT_A OUT_B. "
    "'speckd options --evaluate' lists every setting.",
)
def evaluate(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="A YAML file of settings and tasks: docs/evaluating.md.")] = None,
) -> None:
    """What a model can do, how near it is to its teacher, and what it is worth as its draft model."""
    _say_to_people()
    if "--compare" in context.args:
        from speckd.evaluation.compare import compare
        from speckd.evaluation.table import show_comparison

        show_comparison(compare(_folders(context.args)))
        return
    from speckd.evaluation.command import evaluate as run

    run(config, context.args)


def _folders(words: list[str]) -> list[Path]:
    if words[0] != "--compare" or any(word.startswith("--") for word in words[1:]):
        raise typer.BadParameter("--compare takes folders, and nothing stands beside it: --compare OUT_A OUT_B")
    return [Path(word) for word in words[1:]]


@app.command()
def quickstart(
    output_dir: Annotated[Path, typer.Option("--output-dir", "--output_dir", help="A new folder for the results.")] = Path(
        "quickstart-results"
    ),
    seeds: Annotated[int, typer.Option(help="How many seeds each method is run with.")] = 3,
    steps: Annotated[int, typer.Option(help="Training steps of each method, after the common start.")] = 300,
) -> None:
    """Every method side by side on small tasks, within five minutes on two cores."""
    _say_to_people()
    from speckd.quickstart.compare import run

    run(output_dir, seeds, steps)


@app.command()
def bench(
    plan: Annotated[Path, typer.Argument(help="A file, or a shipped profile: smoke, cpu, gpu.")],
    output_dir: Annotated[
        Path, typer.Option("--output_dir", "--output-dir", help="Where all is kept; the same command goes on from there.")
    ] = Path("bench-results"),
    workers: Annotated[int, typer.Option(min=1, help="Processes that train at the same time, one thread each.")] = 2,
    show: Annotated[bool, typer.Option("--show", help="Only print the plan.")] = False,
) -> None:
    """Compare methods, teachers, starts and data by seeds, from one file, with paired statistics."""
    _say_to_people()
    from speckd.bench.reading import plan_text

    if show:
        typer.echo(plan_text(plan))
        return
    from speckd.bench.command import bench as run

    run(plan, output_dir, workers)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that train, evaluate or bench wrote.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "--output_dir", help="A new folder, or a report's.")] = Path(
        "report"
    ),
) -> None:
    """Runs, evaluations and benchmarks as one HTML page that opens offline, and PNGs."""
    _say_to_people()
    from speckd.report.build import report as build

    typer.echo(f"The report is in {build(folders, output_dir)}.")


@app.command()
def recipes() -> None:
    """List the shipped methods. Joined by '+', the later is laid over the earlier: --recipe abkd+speckd."""
    from speckd.recipe_book import DEFAULT_RECIPE, recipe_names, recipe_text

    for name in recipe_names():
        mark = " (default)" if name == DEFAULT_RECIPE else ""
        typer.echo(f"{name}{mark}: {recipe_text(name).splitlines()[0].removeprefix('# ')}")
    typer.echo("Joined by '+', the later is laid over the earlier: --recipe abkd+speckd is ABKD with the paper's gate.")


@app.command()
def options(
    text: Annotated[str, typer.Argument(help="Show only settings that contain this.")] = "",
    evaluating: Annotated[bool, typer.Option("--evaluate", help="Those of 'speckd evaluate' instead.")] = False,
) -> None:
    """List every setting of a training run, or of an evaluation."""
    if evaluating:
        from speckd.evaluation.options import described as described_keys
    else:
        from speckd.settings import all_keys as described_keys

    for key, description in sorted(described_keys().items()):
        if text in key:
            typer.echo(f"{key}: {' '.join(description.split())}")


class _BesideBars(logging.Handler):
    """Writes lines of their own on stderr where a progress bar is running."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def _say_to_people() -> None:
    """Our own lines as they are; libraries speak up only for warnings that a user can act upon."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    handler = _BesideBars()
    handler.setFormatter(logging.Formatter("%(message)s"))
    own = logging.getLogger("speckd")
    own.handlers, own.propagate = [handler], False
    own.setLevel(logging.INFO)


#: typer names its usage error only through its child.
_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 1 (our mistake), 2 (the user's), 4 and 5 (see `errors`), 130 (interrupted)."""
    words, debug = _without_debug(sys.argv[1:] if arguments is None else arguments)
    command = typer.main.get_command(app)
    try:
        code = int(command.main(args=words, prog_name="speckd", standalone_mode=False) or 0)
    except _USAGE_ERROR as error:
        print(f"error: {error.format_message().rstrip('.')}. See speckd --help", file=sys.stderr)
        return 2
    except Exception as error:
        if debug:
            raise
        print(_last_words(error), file=sys.stderr)
        return error.exit_code if isinstance(error, SpeckdError) else 1
    except KeyboardInterrupt:
        code = 130
    if code == 130:  # typer turns the interrupt into this
        resumes = ""
        if "train" in words:
            resumes = "; --resume_from_checkpoint true goes on from the last checkpoint, if there is one"
        if {"cache", "write", "bench", "evaluate"} & set(words):
            resumes = "; the same command goes on from there"
        print(f"interrupted{resumes}", file=sys.stderr)
    return code


def _without_debug(words: list[str]) -> tuple[list[str], bool]:
    """`--debug` may stand anywhere; with a value it is the Trainer's own setting of that name, and stays."""
    for place, word in enumerate(words):
        if word == "--debug" and (place == 0 or words[place + 1 : place + 2] == [] or words[place + 1].startswith("--")):
            return words[:place] + words[place + 1 :], True
    return words, False


def _last_words(error: Exception) -> str:
    if isinstance(error, SpeckdError):
        return f"error: {error}"
    reason = (str(error).strip().splitlines() or [""])[0][:300]
    if type(error).__name__ == "OutOfMemoryError":
        lower = "per_device_train_batch_size, max_length or loss_memory_budget (of an evaluation, batch_size)"
        return f"error: out of memory. Lower {lower}"
    return f"internal error: {type(error).__name__}: {reason}. This is not your mistake: --debug shows where, please report it"
