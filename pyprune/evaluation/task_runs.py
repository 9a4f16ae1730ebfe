"""``pyprune eval --tasks``: tasks from files of your own, and those of lm-eval by their names; two models side by side.

Files are told by the keys of their rows: multiple choice (:mod:`pyprune.evaluation.choices`) and last words of
passages (:mod:`pyprune.evaluation.last_word`) for models that predict the next token; for encoders pairs of sentences
with a score (STS-B), labelled sentences and pairs (:mod:`pyprune.evaluation.glue`), and questions about texts
(:mod:`pyprune.evaluation.squad`).
"""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from pyprune.config import ConfigError, Streaming
from pyprune.evaluation import choices, glue, last_word, squad, tasks
from pyprune.evaluation.block_by_block import Blockwise
from pyprune.evaluation.single import placed_on, ready, to_stream
from pyprune.execution.progress import Doing
from pyprune.execution.weight_streaming import Opened
from pyprune.model.architecture import answers_with_spans
from pyprune.model.blocks import predicts_next_token
from pyprune.model.checkpoint import Loaded

Measure = Callable[[Any, Any], dict]
silently = functools.partial(Doing, enabled=False)


def evaluate_tasks(
    model: Any,
    names: Sequence[str],
    *,
    against: Any = None,
    tokenizer=None,
    limit: int | None = None,
    batch_size: int = 16,
    device: str | None = None,
    stream: Streaming = "auto",
    doing: Callable[[str], Doing] = silently,
) -> list[dict]:
    """Measure a model on tasks, beside the dense model if it is given.

    model, against: live models with their ``tokenizer``, or what :func:`pyprune.load` takes. names: paths of files
    or folders, or names of lm-eval's tasks. limit: items per task at most.
    stream: as of :func:`pyprune.evaluate`; a model whose weights are streamed reads them once per task. doing: shows
    what is being done, loading or measuring, and how far it is.
    Returns one row per task: ``{"task", "items", metric, metric_standard_error}``, and with ``against`` the same of the
    dense model under ``"dense"`` and per metric a paired test under ``"paired"``. Raises :class:`ConfigError` for a
    file that does not exist or does not suit the model, before anything is measured.
    """
    if not names:
        raise ConfigError("no tasks: name files, folders, or tasks of lm-eval")
    for name in names:
        if of_files(name) and not Path(name).expanduser().exists():
            raise ConfigError(f"no such file: {name}")
    check_known([name for name in names if not of_files(name) and name != last_word.NAME])
    if against is not None:
        to_stream(against, stream)  # what cannot be streamed is refused before the first model is measured
    conditions = (names, limit, batch_size, device)
    with doing(f"loading {_name(model)}"):
        subject = ready(model, tokenizer, stream)
    with doing("measuring tasks") as progress:
        own, words = _measured(subject, *conditions, progress), subject.tokenizer
    del subject
    if against is None:
        return [_public(row) for row in own]
    with doing(f"loading {_name(against)}"):
        subject = ready(against, words if isinstance(against, torch.nn.Module) else None, stream)
    with doing("measuring tasks of the dense model") as progress:
        dense = _measured(subject, *conditions, progress)
    return [
        {
            **_public(row),
            "dense": {key: value for key, value in _public(base).items() if key not in ("task", "items")},
            "paired": {name: choices.paired(base["per_item"][name], values) for name, values in row["per_item"].items()}
            | {name: _bootstrap(base, row, name) for name in row.get("statistics", ())},
        }
        for row, base in zip(own, dense)
    ]


def task_manager(name: Any) -> Any:
    """lm-eval's index of its tasks, which takes seconds to read. Raises ConfigError, which names a task, without
    lm-eval."""
    try:
        return _index()
    except ImportError as error:
        raise ConfigError(
            f"task {name!r} is no file here, and lm-eval, which may know it, is not installed: install pyprune's "
            "extra 'eval', or give the path of a .jsonl file"
        ) from error


@functools.cache
def _index() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def check_known(names: list[str]) -> None:
    """Raise ConfigError for a task that is no file and that lm-eval does not know, before a model is loaded."""
    for name in names:
        manager = task_manager(name)
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{name!r} is neither a file or folder here nor a task of lm-eval{hint}")


def _name(model: Any) -> str:
    return str(model) if isinstance(model, (str, Path)) else "the model"


def _measured(subject: Loaded | Opened, names, limit, batch_size, device, progress) -> list[dict]:
    if subject.tokenizer is None:
        raise ConfigError("tasks need a tokenizer: give a folder that has one (in Python: or tokenizer=)")
    planned = [(name, measure_of(name, subject.model, limit, batch_size, progress)) for name in names]
    forwards = placed_on(subject, device)
    return [{"task": name, **measure(forwards, subject.tokenizer)} for name, measure in planned]


def _public(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("per_item", "statistics")}


def of_files(name: str) -> bool:
    """Whether a task is named by a file or folder; else lm-eval has to know it."""
    path = Path(name).expanduser()
    return path.exists() or path.suffix in (".jsonl", ".json", ".tsv", ".txt") or "/" in name


def measure_of(name: str, model, limit: int | None, batch_size: int, progress: Any) -> Measure:
    """What measures a task; the file is read and checked now."""
    path = Path(name).expanduser()
    if path.suffix == ".txt" or name == last_word.NAME and not path.exists():
        return _last_words(name, model, last_word.of_file(path)[:limit], batch_size, progress)
    if not of_files(name):
        return lambda live, tokenizer: through_lm_eval(live, tokenizer, name, limit, batch_size, progress=progress)
    file = (glue.held_out_file(path) if path.is_dir() else None) or choices.file_of(path)
    first_row = {} if file.suffix == ".json" else glue.read_rows(file)[0]
    if file.suffix == ".json" or squad.is_row(first_row):
        asked = squad.read_items(file)[:limit]
        if not answers_with_spans(model):
            raise ConfigError(f"{name} is SQuAD, and {type(model).__name__} has no question-answering head")
        return lambda live, tokenizer: squad.measure(live, tokenizer, asked, progress=progress)
    if {"sentence1", "sentence2", "score"} <= set(first_row):
        first, second, scores = tasks.read_pairs(file)
        pairs = first[:limit], second[:limit], scores[:limit]
        return lambda live, tokenizer: sentence_pairs(live, tokenizer, pairs)
    if glue.fields_of(first_row):
        return glue.planned(model, file, limit, progress)
    if "text" in first_row and choices.kind_of(first_row) is None:
        return _last_words(name, model, last_word.of_rows(choices.read_rows(file), name)[:limit], batch_size, progress)
    items = choices.read_items(file)[:limit]
    if not predicts_next_token(model):
        raise ConfigError(
            f"{name} is a multiple-choice task, and {type(model).__name__} does not predict the next token; give it "
            "sentence pairs with scores, or labelled sentences"
        )
    return lambda live, tokenizer: choices.score(live, tokenizer, items, batch_size=batch_size, progress=progress)


def _last_words(name: str, model, passages: list, batch_size: int, progress: Any) -> Measure:
    if not predicts_next_token(model):
        raise ConfigError(f"{name} asks for last words, and {type(model).__name__} does not predict the next token")
    return lambda live, tokenizer: last_word.score(live, tokenizer, passages, batch_size=batch_size, progress=progress)


def sentence_pairs(model, tokenizer, pairs: tuple) -> dict:
    """STS-B: Spearman of the cosine of mean-pooled vectors against human scores, its standard error by bootstrap."""
    found = tasks.sts_spearman(model, tokenizer, pairs)
    similarities, scores = found["similarities"], pairs[2]

    def statistic(rows: torch.Tensor) -> float:
        return tasks.spearman(similarities[rows], scores[rows])

    return {
        "items": len(scores),
        "spearman": found["spearman"],
        "spearman_standard_error": tasks.paired_bootstrap(statistic, len(scores), samples=500)["standard_error"],
        "per_item": {},
        "statistics": {"spearman": statistic},
    }


def _bootstrap(dense: dict, pruned: dict, metric: str) -> dict:
    """Difference of two models' metric on items drawn together, with its standard error and 95 % interval."""
    own, base = (row["statistics"][metric] for row in (pruned, dense))
    return tasks.paired_bootstrap(lambda rows: own(rows) - base(rows), dense["items"], samples=500)


def through_lm_eval(
    model, tokenizer, name: Any, limit: int | None, batch_size: int, manager: Any = None, progress: Any = None
) -> dict:
    """A task of lm-eval on a live or a streamed model. name: of a task, or a task object. Its data come from the Hub or
    its cache. progress: told of a streamed model's blocks."""
    manager = manager or task_manager(name)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    if isinstance(model, Blockwise):
        from pyprune.evaluation.lm_eval_model import StreamedModel

        wrapped: Any = StreamedModel(model, tokenizer, batch_size, progress)
    else:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = lm_eval.simple_evaluate(
            wrapped, tasks=[name], limit=limit, log_samples=True, bootstrap_iters=0, task_manager=manager
        )
    except (KeyError, ValueError, OSError, ConnectionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"lm-eval cannot run task {name!r}: {reason}") from error
    samples = next(iter(found["samples"].values()))
    metrics = [m for m in ("acc", "acc_norm") if samples and m in samples[0]]
    if not metrics:
        raise ConfigError(f"task {name!r} has neither acc nor acc_norm: run lm-eval itself for it")
    row: dict[str, Any] = {"items": len(samples), "per_item": {}}
    for metric in metrics:
        values = [float(sample[metric]) for sample in samples]
        row[metric], row[f"{metric}_standard_error"] = choices.mean_and_error(values)
        row["per_item"][metric] = values
    return row


def print_tasks(rows: list[dict], out: TextIO | None = None) -> None:
    """One line per task and metric; with a dense model its value, the difference and the test beside it."""
    from rich.table import Table

    from pyprune.reporting.console import open_console
    from pyprune.reporting.words import TASK_METRICS, difference_text, score_text

    compared = any("dense" in row for row in rows)
    table = Table(
        "task", "items", "metric", *(["dense"] if compared else []), "model", *(["difference", "p"] if compared else [])
    )
    for row in rows:
        for metric in TASK_METRICS:
            if metric not in row:
                continue
            cells = [str(row["task"]), str(row["items"]), metric]
            if compared:
                test = row["paired"][metric]
                p = test.get("mcnemar_p")
                cells.append(score_text(row["dense"], metric))
                cells += [
                    score_text(row, metric),
                    difference_text(test),
                    "–" if p is None else f"{p:.3g}",
                ]
            else:
                cells.append(score_text(row, metric))
            table.add_row(*cells)
    open_console(out or sys.stdout).print(table)
