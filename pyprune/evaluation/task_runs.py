"""``pyprune eval --tasks``: tasks from files of your own, and those of lm-eval by their names; two models side by side.

Files are told by the keys of their rows: multiple choice (:mod:`pyprune.evaluation.choices`) for models that predict
the next token; pairs of sentences with a score (STS-B) and labelled sentences (SST-2, on frozen vectors, with the train
split beside it) for encoders.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from pyprune.config import ConfigError
from pyprune.evaluation import choices, tasks
from pyprune.execution.device import pick_device
from pyprune.model.blocks import predicts_next_token
from pyprune.packed.loading import opened

Measure = Callable[[Any, Any], dict]


def evaluate_tasks(
    model: Any,
    names: Sequence[str],
    *,
    against: Any = None,
    tokenizer=None,
    limit: int | None = None,
    batch_size: int = 16,
    device: str | None = None,
    progress: Any = None,
) -> list[dict]:
    """Measure a model on tasks, beside the dense model if it is given.

    model, against: live models with their ``tokenizer``, or what :func:`pyprune.load` takes. names: paths of jsonl
    files or folders, or names of lm-eval's tasks. limit: items per task at most.
    Returns one row per task: ``{"task", "items", metric, metric_standard_error}``, and with ``against`` the same of the
    dense model under ``"dense"`` and per metric a paired test under ``"paired"``. Raises :class:`ConfigError` for a
    file that does not exist or does not suit the model, before anything is measured.
    """
    if not names:
        raise ConfigError("no tasks: name files, folders, or tasks of lm-eval")
    live = opened(model, tokenizer)
    own = _measured(live.model, live.tokenizer, names, limit, batch_size, device, progress)
    if against is None:
        return [_public(row) for row in own]
    other = opened(against, live.tokenizer if isinstance(against, torch.nn.Module) else None)
    dense = _measured(other.model, other.tokenizer, names, limit, batch_size, device, progress)
    return [
        {
            **_public(row),
            "dense": {key: value for key, value in _public(base).items() if key not in ("task", "items")},
            "paired": {name: choices.paired(base["per_item"][name], values) for name, values in row["per_item"].items()}
            | ({"spearman": _bootstrap(base, row)} if "similarities" in row else {}),
        }
        for row, base in zip(own, dense)
    ]


def _measured(model, tokenizer, names, limit, batch_size, device, progress) -> list[dict]:
    if tokenizer is None:
        raise ConfigError("tasks need a tokenizer: pass tokenizer=, or a folder that has one")
    planned = [(name, measure_of(name, model, limit, batch_size, progress)) for name in names]
    if device is not None:
        model.to(pick_device(device))
    return [{"task": name, **measure(model, tokenizer)} for name, measure in planned]


def _public(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("per_item", "similarities", "scores")}


def measure_of(name: str, model, limit: int | None, batch_size: int, progress: Any) -> Measure:
    """What measures a task; the file is read and checked now."""
    path = Path(name).expanduser()
    if not (path.exists() or path.suffix == ".jsonl" or "/" in name):
        return lambda live, tokenizer: through_lm_eval(live, tokenizer, name, limit, batch_size)
    if path.is_dir() and (path / "train.jsonl").is_file():
        held = next((path / f"{part}.jsonl" for part in ("test", "dev") if (path / f"{part}.jsonl").is_file()), None)
        if held is None:
            raise ConfigError(f"{path} has train.jsonl, but neither test.jsonl nor dev.jsonl")
        file = held
    else:
        file = choices.file_of(path)
    keys = set(choices.read_rows(file)[0])
    if {"sentence1", "sentence2", "score"} <= keys:
        first, second, scores = tasks.read_pairs(file)
        pairs = first[:limit], second[:limit], scores[:limit]
        return lambda live, tokenizer: sentence_pairs(live, tokenizer, pairs)
    if {"sentence", "label"} <= keys:
        train = file.with_name("train.jsonl")
        if not train.is_file() or train == file:
            raise ConfigError(f"{file} has labelled sentences; put train.jsonl beside it, to fit the linear head on")
        return lambda live, tokenizer: labelled(live, tokenizer, train, file, limit)
    items = choices.read_items(file)[:limit]
    if not predicts_next_token(model):
        raise ConfigError(
            f"{name} is a multiple-choice task, and {type(model).__name__} does not predict the next token; give it "
            "sentence pairs with scores, or labelled sentences"
        )
    return lambda live, tokenizer: choices.score(live, tokenizer, items, batch_size=batch_size, progress=progress)


def sentence_pairs(model, tokenizer, pairs: tuple) -> dict:
    """STS-B: Spearman of the cosine of mean-pooled vectors against human scores, its standard error by bootstrap."""
    found = tasks.sts_spearman(model, tokenizer, pairs)
    similarities, scores = found["similarities"], pairs[2]
    spread = tasks.paired_bootstrap(
        lambda rows: tasks.spearman(similarities[rows], scores[rows]), len(scores), samples=500
    )
    return {
        "items": len(scores),
        "spearman": found["spearman"],
        "spearman_standard_error": spread["standard_error"],
        "per_item": {},
        "similarities": similarities,
        "scores": scores,
    }


def _bootstrap(dense: dict, pruned: dict) -> dict:
    """Difference of two models' Spearman on pairs drawn together, with its standard error and 95 % interval."""

    def difference(rows: torch.Tensor) -> float:
        own, base = (tasks.spearman(row["similarities"][rows], row["scores"][rows]) for row in (pruned, dense))
        return own - base

    return tasks.paired_bootstrap(difference, len(dense["scores"]), samples=500)


def labelled(model, tokenizer, train: Path, held: Path, limit: int | None) -> dict:
    """Two classes of sentences: a logistic regression on frozen mean-pooled vectors, fitted on the train split; the
    accuracy on the other."""
    parts = [choices.read_rows(file)[:limit] for file in (train, held)]
    labels = [torch.tensor([int(row["label"]) for row in rows]) for rows in parts]
    if not set(labels[0].tolist()) | set(labels[1].tolist()) <= {0, 1}:
        raise ConfigError(f"{train} and {held} must have the labels 0 and 1")
    vectors = [tasks.encode(model, tasks.token_ids(tokenizer, [row["sentence"] for row in rows])) for rows in parts]
    head = tasks.fit_head(vectors[0], labels[0])
    right = ((tasks.predict(vectors[1], head) > 0).long() == labels[1]).double().tolist()
    mean, error = choices.mean_and_error(right)
    return {"items": len(right), "acc": mean, "acc_standard_error": error, "per_item": {"acc": right}}


def through_lm_eval(model, tokenizer, name: Any, limit: int | None, batch_size: int, manager: Any = None) -> dict:
    """A task of lm-eval on a live model. name: of a task, or a task object. Its data come from the Hub or its cache."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ConfigError(
            f"task {name!r} is no file here, and lm-eval, which may know it, is not installed: "
            "pip install 'pyprune[eval]', or give the path of a .jsonl file"
        ) from error
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

    from pyprune.reporting.rendering import TASK_METRICS, difference_text, open_console, score_text

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
