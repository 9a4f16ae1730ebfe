"""The command line: reads options, calls the library, prints. Exit code 2 and one sentence for bad input."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

import pyprune
from pyprune.cli import packing, watching
from pyprune.cli.help import NAMED, Command, Group
from pyprune.cli.options import as_options, option_of, with_fields
from pyprune.cli.studies import study
from pyprune.config import ConfigError, PruneConfig, check_named, from_dict, override
from pyprune.effects import texts_read
from pyprune.execution.progress import Doing
from pyprune.keywords import configuration_fields, refine_fields
from pyprune.reporting import comparison, console, inspection_table, plan_table, summary, words
from pyprune.reporting.console import print_json
from pyprune.sources import absent

app = typer.Typer(
    name="pyprune", cls=Group, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the interrupted run in the folder of -o, which knows its settings.")
]
TrackOption = Annotated[
    str | None,
    typer.Option("--track", metavar="tensorboard:FOLDER", help="Write the errors of each block for TensorBoard, too."),
]
RUN_FIELDS = [path for path in configuration_fields() if path != "model"]
EVALUATION_FIELDS = [
    path
    for path in configuration_fields()
    if path == "stream" or path.startswith("evaluation.") and path != "evaluation.enabled"
]

REFINE_FIELDS = refine_fields()


def _version(asked: bool) -> None:
    if asked:
        print(f"pyprune {pyprune.__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
):
    """One-shot pruning of transformers: what it does, what it costs, on CPU and GPU."""


def libraries(label: str) -> None:
    """Import torch and transformers, which takes seconds from a cold disk, and say so where it lasts."""
    with Doing("importing torch and transformers", not silent(), label, said=False):
        import torch  # noqa: F401
        import transformers  # noqa: F401


def silent() -> bool:
    """Whether this process prints nothing: under torchrun only one does."""
    return int(os.environ.get("RANK", "0")) > 0


@app.command(cls=Command)
@with_fields(RUN_FIELDS)
def prune(
    model: Annotated[str | None, typer.Argument(help=NAMED)] = None,
    config: Annotated[Path | None, typer.Option("--config", help="A run.yaml to repeat. Options override it.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="List every weight, estimate memory, time and disk, and prune nothing.")
    ] = False,
    resume: Resume = False,
    track: TrackOption = None,
    as_json: Json = False,
    *,
    fields: dict[str, Any],
):
    """Prune MODEL, evaluate it, and write a Hugging Face model and a report."""
    base: Any = config
    if resume and model is None and config is None and fields.get("output"):
        from pyprune.execution.journal import remembered

        base = from_dict(PruneConfig, remembered(fields["output"]))
    settings = override(base, {**fields, **({"model": model} if model else {})})
    check_named(settings, fields)
    if plan and resume:
        raise ConfigError("--resume would do nothing: --plan runs nothing")
    if plan and track:
        raise ConfigError("--track would do nothing: --plan runs nothing")
    if settings.output is None and not plan:
        raise ConfigError("no output folder: name one with -o, or ask for the --plan only")
    for text in texts_read(settings):
        if (why := absent(text)) is not None:
            raise ConfigError(why)
    libraries("planning" if plan else "pruning")
    if plan:
        with Doing("counting, and timing two blocks", not as_json, "planning", said=False):
            found = pyprune.plan(settings)
        return print_json(found) if as_json else plan_table.print_plan(found)
    result = pyprune.prune(config=settings, resume=resume, track=track)
    if silent():
        return None
    if as_json:
        return print_json(result.report)
    return summary.print_summary(result.report, settings.output)


@app.command(cls=Command)
@with_fields(
    REFINE_FIELDS,
    said={
        "output": "Folder to write the refined model to.",
        "global_propagation": "Train towards the activations of the dense model itself, not towards what its block "
        "makes of the pruned model's activations. [default: on]",
        "packed": "Write the checkpoint without its zeros, as pyprune pack does. [default: off]",
    },
)
def refine(
    model: Annotated[str | None, typer.Argument(help="Folder of a pruned model, as pyprune prune writes it.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="A refine.yaml to repeat. Options override it.")
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="The model it was pruned from. By default the one that its pruning.json names."
        ),
    ] = None,
    cross_block: Annotated[
        bool | None,
        typer.Option("--cross-block/--no-cross-block", help="Train neighbouring blocks together. [default: off]"),
    ] = None,
    resume: Resume = False,
    track: TrackOption = None,
    as_json: Json = False,
    *,
    fields: dict[str, Any],
):
    """Train a pruned MODEL block by block to give the dense model's outputs (arXiv 2406.15524); zeros stay zeros."""
    libraries("refining")
    from pyprune.pipeline.refine_checkpoint import print_refinement, refine_checkpoint
    from pyprune.pipeline.refine_request import requested

    base: Any = config
    if resume and model is None and config is None and fields.get("output"):
        from pyprune.execution.journal import remembered

        base = remembered(fields["output"])
    request = requested(base, {**fields, "model": model, "dense": dense, "cross_block": cross_block})
    found = refine_checkpoint(**vars(request), resume=resume, track=track)
    if silent():
        return None
    return print_json(found) if as_json else print_refinement(found, request.output)


@app.command(name="eval", cls=Command)
@with_fields(
    EVALUATION_FIELDS,
    common=EVALUATION_FIELDS,
    said={
        "evaluation.text": "Text to measure perplexity on: the id of a Hub data set, a local .txt, .jsonl, .json, .csv "
        "or .parquet file, or token ids in a .npy file; for several, repeat the option. Without one, documentation and "
        "a novel that come with pyprune.",
        "evaluation.off_domain": "Text of another kind, measured beside it: sources as for --text, or none. Without "
        "one, a novel that comes with pyprune if no text is named.",
    },
)
def evaluate(
    model: Annotated[str, typer.Argument(help=NAMED)],
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="Where to run: cpu, cuda or cuda:1; auto takes a GPU if there is one.")
    ] = "auto",
    latency: Annotated[
        bool,
        typer.Option(
            "--latency", help="Measure size, peak memory and tokens per second beside the dense model's instead."
        ),
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Measure tasks instead, with commas between them: .jsonl files or folders (multiple choice, GLUE, "
            "SQuAD), last-word (of passages of a novel), or names of tasks of lm-eval.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The most items per task.", min=1)] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The dense model, for --tasks and --latency. By default --latency takes the one that MODEL was pruned "
            "from; dense means that one for --tasks, too.",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture (.png) of the --latency comparison to write.")] = None,
    as_json: Json = False,
    *,
    fields: dict[str, Any],
):
    """Measure the perplexity of a model on a text, in windows that are seen one by one."""
    asked, stream = fields.get("evaluation", {}), fields.get("stream", "auto")
    if latency:
        idle = [option_of(f"evaluation.{name}", EVALUATION_FIELDS) for name in asked]
        idle += ["--stream"] if "stream" in fields else []
        for option in idle if device == "auto" else [*idle, "--device"]:
            raise ConfigError(f"{option} would do nothing: --latency reads no text and runs where the model is loaded")
        from pyprune.evaluation import gain

        rows = gain.measure_side_by_side([against or gain.dense_of(model), model], progress=True)
        if plot:
            gain.plot(rows, plot)
        written = gain.record(rows, model)
        if as_json:
            return print_json(rows)
        gain.print_side_by_side(rows)
        return print("added to " + ", ".join(map(str, written))) if written else None
    if plot is not None:
        raise ConfigError("--plot would do nothing: only --latency draws a picture")
    if tasks is not None:
        return _evaluate_tasks(model, tasks, limit, against, device, stream, asked, as_json)
    for name, value, used in (
        ("--against", against, "--tasks and --latency compare"),
        ("--limit", limit, "--tasks has items"),
    ):
        if value is not None:
            raise ConfigError(f"{name} would do nothing: only {used}")
    libraries("evaluating")
    from pyprune.data.texts import check_there
    from pyprune.evaluation.single import NotFinite, check_named, ready

    show = print_json if as_json else console.print_evaluation
    try:
        check_there(asked.get("text"))
        check_named(model)
        with Doing(f"loading {model}", label="evaluating"):
            loaded = ready(model, stream=stream)
        with Doing("measuring perplexity", label="evaluating") as doing:
            found = pyprune.evaluate(loaded, device=device, progress=doing, **asked)
        show(found)
    except NotFinite as error:
        show(error.found)
        raise


def _evaluate_tasks(
    model: str,
    names: str,
    limit: int | None,
    against: str | None,
    device: str,
    stream: Any,
    asked: dict,
    as_json: bool,
) -> None:
    for name in asked:
        if name != "batch_size":
            option = option_of(f"evaluation.{name}", EVALUATION_FIELDS)
            raise ConfigError(f"{option} would do nothing: --tasks measures tasks, no text")
    libraries("evaluating")
    from pyprune.evaluation import gain, task_runs

    rows = task_runs.evaluate_tasks(
        model,
        [name.strip() for name in names.split(",") if name.strip()],
        against=gain.dense_of(model) if against == "dense" else against,
        limit=limit,
        batch_size=asked.get("batch_size", 16),
        device=device,
        stream=stream,
        doing=functools.partial(Doing, label="evaluating"),
    )
    written = gain.record(rows, model, "tasks")
    if as_json:
        return print_json(rows)
    task_runs.print_tasks(rows)
    return print("added to " + ", ".join(map(str, written))) if written else None


@app.command(cls=Command)
def inspect(
    directory: Annotated[Path, typer.Argument(help="Folder of a safetensors or .bin checkpoint.")],
    as_json: Json = False,
):
    """Show the true sparsity, N:M violations and coverage of a checkpoint, read from its files."""
    found = pyprune.inspect(directory)
    return print_json(found) if as_json else inspection_table.print_inspection(found)


@app.command(cls=Command)
def compare(
    directories: Annotated[list[Path], typer.Argument(help="Folders that pyprune wrote.")],
    html: Annotated[Path | None, typer.Option(help="Write the comparison as a page, too: one HTML file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Picture (.png) of how each run's errors spread over tokens, to write.")
    ] = None,
    as_json: Json = False,
):
    """Show runs side by side: settings, perplexity, reconstruction error and time."""
    rows = pyprune.compare(directories)
    if plot is not None:
        from pyprune.reporting.quantiles import picture

        picture([(folder.resolve().name, comparison.read(folder)) for folder in directories], plot)
    if html is not None:
        from pyprune.reporting.comparison_page import comparison_page
        from pyprune.reporting.page import write

        write(html, comparison_page(directories))
    if as_json:
        return print_json({"runs": rows, "notes": comparison.differences(rows)})
    return comparison.print_comparison(rows)


app.command(cls=Command)(study)
app.command(cls=Command)(watching.history)
app.command(cls=Command)(watching.check)
app.command(cls=Command)(packing.pack)
app.command(cls=Command)(packing.unpack)


@app.command(cls=Command)
def generate(
    model: Annotated[str, typer.Argument(help=NAMED)],
    output: Annotated[Path, typer.Option("--output", "-o", help="A jsonl file to write, or to extend.")],
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", help="Number of sequences.")] = 64,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Sequences sampled together.")] = 32,
    language: Annotated[
        str | None, typer.Option(metavar="CODE", help="Keep only text in this language (an ISO code).")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="TYPE", help="Number type that the weights are loaded in: auto, float32, bfloat16 or float16."
        ),
    ] = "auto",
):
    """Sample calibration sequences from MODEL itself (arXiv 2406.15524), for --self-generated-path."""
    libraries("generating")
    with Doing(f"loading {model}", label="generating"):
        live, tokenizer = pyprune.load(model, dtype)
    with Doing("sampling sequences", label="generating") as doing:
        rows = pyprune.generate(
            live,
            tokenizer,
            num_samples,
            seq_len=seq_len,
            seed=seed,
            batch_size=batch_size,
            language=language,
            path=output,
            progress=doing,
        )
    print(f"{words.counted(len(rows), 'sequence')} of {seq_len} tokens in {output}")


@app.command(cls=Command)
def env(
    qualify: Annotated[
        bool, typer.Option("--qualify", help="Check and time the back-ends now, even if that was done before.")
    ] = False,
    as_json: Json = False,
):
    """Show versions, devices, the native module, and which back-end each op takes here and why."""
    from pyprune.cli.environment import environment, print_environment

    found = environment(qualify)
    return print_json(found) if as_json else print_environment(found)


_usual_format = warnings.formatwarning


def _one_line(message, category, filename, *place, **more) -> str:
    """Warnings of our own without the line of code that they come from."""
    own = Path(filename).is_relative_to(Path(pyprune.__file__).parent)
    return f"warning: {message}\n" if own else _usual_format(message, category, filename, *place, **more)


def main(arguments: list[str] | None = None, prog: str | None = None) -> None:
    """Entry point of ``pyprune`` and ``python -m pyprune``. prog: what the usage calls it."""
    warnings.formatwarning = _one_line
    try:
        app(args=arguments, prog_name=prog)
    except ConfigError as error:
        print(f"error: {as_options(str(error))}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(1)
