"""The classification tasks of GLUE (arXiv 1804.07461) from files, each by its own metric.

A model with a classification head answers by it. For any other encoder a linear head is fitted on frozen vectors of the
train split: of one sentence its mean-pooled vector u; of two, u and v, (u, v, |u − v|, u·v) (arXiv 1705.02364).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.config import ConfigError
from pyprune.evaluation import choices, tasks
from pyprune.model.architecture import classes_of_head

FIELDS = (
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence1", "sentence2"),
    ("sentence",),
)
"""Keys of the texts: MNLI; QQP; QNLI; MRPC and RTE; SST-2 and CoLA."""
RENAMED = {
    "#1 String": "sentence1",
    "#2 String": "sentence2",
    "Quality": "label",
    "is_duplicate": "label",
    "gold_label": "label",
}
"""Columns of GLUE's .tsv files that have names of their own."""
COLA_COLUMNS = ("source", "label", "mark", "sentence")
"""CoLA's .tsv files have no header."""
LABELS = {"entailment": 0, "not_entailment": 1, "neutral": 1, "contradiction": 2}
"""GLUE's number of a label that a file or a model gives as a word."""
METRICS = {"cola": ("mcc",), "mrpc": ("acc", "f1"), "qqp": ("acc", "f1")}
"""By the name of the task; accuracy for all others."""
PARTS = ("test", "dev", "validation", "dev_matched", "validation_matched")
"""Names of a split to measure on, best first."""


@dataclass(frozen=True)
class Examples:
    """Texts, one list or two of equal length, and their labels, int64 ``[examples]``."""

    texts: tuple[list[str], ...]
    labels: Tensor


def read_rows(path: Path) -> list[dict]:
    """Rows of a .jsonl or .tsv file under the names of :data:`FIELDS` and ``label``."""
    rows = _read_tsv(path) if path.suffix == ".tsv" else choices.read_rows(path)
    return [{RENAMED.get(key, key): value for key, value in row.items()} for row in rows]


def _read_tsv(path: Path) -> list[dict]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} is not a .tsv file: {error}") from error
    bare = bool(lines) and len(lines[0]) == len(COLA_COLUMNS) and lines[0][1] in ("0", "1")
    names, found = (COLA_COLUMNS, lines) if bare else (tuple(lines[0] if lines else ()), lines[1:])
    if not found:
        raise ConfigError(f"{path} holds no rows")
    return [dict(zip(names, line)) for line in found]


def fields_of(row: dict) -> tuple[str, ...] | None:
    """The keys of a row's texts if it is one of these tasks."""
    return next((keys for keys in FIELDS if "label" in row and all(key in row for key in keys)), None)


def held_out_file(folder: Path) -> Path | None:
    """The labelled split that a folder with a train split measures on; None for any other folder."""
    suffix = next((s for s in (".jsonl", ".tsv") if (folder / f"train{s}").is_file()), None)
    if suffix is None:
        return None
    found = [file for part in PARTS if (file := folder / f"{part}{suffix}").is_file()]
    if not found:
        raise ConfigError(f"{folder} has train{suffix}, but none of {', '.join(part + suffix for part in PARTS)}")
    return next((file for file in found if _labelled(read_rows(file)[0])), found[0])


def _labelled(row: dict) -> bool:
    return "score" in row or row.get("label", -1) not in (-1, "-1")


def read_examples(path: Path, limit: int | None = None) -> Examples:
    """The first ``limit`` labelled sentences or pairs of a file. Raises :class:`ConfigError` with the row otherwise."""
    rows = read_rows(path)[:limit]
    keys = fields_of(rows[0])
    if keys is None:
        known = "; ".join(" and ".join(keys) for keys in FIELDS)
        raise ConfigError(f"{path} has the keys {', '.join(rows[0])}; give label, and one of: {known}")
    labels = []
    for number, row in enumerate(rows, 1):
        try:
            label = LABELS[row["label"]] if row["label"] in LABELS else int(row["label"])
            for key in keys:
                row[key] + ""
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigError(f"row {number} of {path} lacks its texts or its label: {error!r}") from error
        if label < 0:
            raise ConfigError(f"row {number} of {path} has label {label}: measure on a split that has labels")
        labels.append(label)
    return Examples(tuple([row[key] for row in rows] for key in keys), torch.tensor(labels))


def metrics_of(path: Path, keys: Sequence[str]) -> tuple[str, ...]:
    """The metrics of the task that a file or its folder is named after; its keys tell QQP by themselves."""
    words = re.findall("[a-z0-9]+", f"{path.parent.name} {path.stem}".lower())
    named = next((METRICS[word] for word in words if word in METRICS), None)
    return named or (METRICS["qqp"] if keys[0] == "question1" else ("acc",))


def planned(model: nn.Module, file: Path, limit: int | None, progress: Any = None) -> Callable[[Any, Any], dict]:
    """What measures a model like ``model`` on a file; all files are read and checked now."""
    held = read_examples(file, limit)
    keys = fields_of(read_rows(file)[0])
    assert keys is not None
    metrics = metrics_of(file, keys)
    classes = int(held.labels.max()) + 1
    own = classes_of_head(model)
    if max(classes, len(own)) > 2 and metrics != ("acc",):
        what = f"{file} has" if classes > 2 else f"the head of {type(model).__name__} has"
        raise ConfigError(f"{what} {max(classes, len(own))} classes; {' and '.join(metrics)} need two, 0 and 1")
    if own:
        if classes > len(own):
            raise ConfigError(f"{file} has {classes} classes, the head of {type(model).__name__} has {len(own)}")
        return lambda live, tokenizer: scored(by_own_head(live, tokenizer, held, progress), held, metrics, "own")
    train_file = file.with_name(f"train{file.suffix}")
    if not train_file.is_file() or train_file == file:
        raise ConfigError(
            f"{file} has labelled sentences, and {type(model).__name__} has no classification head; put "
            f"{train_file.name} beside it, to fit a linear head on"
        )
    train = read_examples(train_file, limit)
    if len(train.texts) != len(held.texts) or not set(held.labels.tolist()) <= set(train.labels.tolist()):
        raise ConfigError(f"{file} has texts or labels of another kind than {train_file}")
    if len(train.labels.unique()) < 2:
        raise ConfigError(f"the first {len(train.labels)} rows of {train_file} have one label: nothing to tell apart")
    return lambda live, tokenizer: scored(
        by_linear_head(live, tokenizer, train, held, progress), held, metrics, "linear"
    )


def by_own_head(model: nn.Module, tokenizer, examples: Examples, progress: Any = None) -> Tensor:
    """Classes by the model's classification head, int64 ``[examples]``; GLUE's numbers where the model names GLUE's
    labels, since some checkpoints count them in another order."""
    inputs = tasks.paired_inputs(model, tokenizer, *examples.texts)
    logits = torch.stack(tasks.unpadded(model, inputs, lambda out: out.logits.float(), progress=progress))
    names = [name.lower() for name in classes_of_head(model)]
    order = [LABELS[name] for name in names] if all(name in LABELS for name in names) else range(len(names))
    return torch.tensor(list(order))[logits.argmax(1)]


def by_linear_head(model: nn.Module, tokenizer, train: Examples, held: Examples, progress: Any = None) -> Tensor:
    """Classes by a linear head on frozen vectors, int64 ``[examples]``."""
    parts = [_vectors(model, tokenizer, part.texts, progress) for part in (train, held)]
    head = tasks.fit_head(parts[0], train.labels)
    return tasks.predicted_classes(parts[1], head)


def _vectors(model: nn.Module, tokenizer, texts: tuple[list[str], ...], progress: Any) -> Tensor:
    ids = tasks.token_ids(tokenizer, [text for column in texts for text in column])
    found = tasks.encode(model, ids, progress=progress).split(len(texts[0]))
    if len(found) == 1:
        return found[0]
    u, v = found
    return torch.cat([u, v, (u - v).abs(), u * v], dim=1)


def scored(predicted: Tensor, examples: Examples, metrics: Sequence[str], head: str) -> dict:
    """The metrics of predicted classes with their standard errors: accuracy per item, the others by bootstrap."""
    labels = examples.labels
    row: dict[str, Any] = {"items": len(labels), "head": head, "per_item": {}, "statistics": {}}
    for name in metrics:
        if name == "acc":
            right = (predicted == labels).double().tolist()
            row["acc"], row["acc_standard_error"] = choices.mean_and_error(right)
            row["per_item"]["acc"] = right
            continue

        def statistic(rows: Tensor, of: Callable = STATISTICS[name]) -> float:
            return of(predicted[rows], labels[rows])

        spread = tasks.paired_bootstrap(statistic, len(labels), samples=500)
        row[name], row[f"{name}_standard_error"] = spread["difference"], spread["standard_error"]
        row["statistics"][name] = statistic
    return row


def f1(predicted: Tensor, labels: Tensor) -> float:
    """2 TP / (2 TP + FP + FN) of class 1; 0 where nothing is or should be of it."""
    hit, false, missed, _ = _counts(predicted, labels)
    return 2 * hit / max(1, 2 * hit + false + missed)


def matthews(predicted: Tensor, labels: Tensor) -> float:
    """(TP · TN − FP · FN) / √((TP + FP)(TP + FN)(TN + FP)(TN + FN)); 0 where one factor is 0."""
    hit, false, missed, rejected = _counts(predicted, labels)
    product = (hit + false) * (hit + missed) * (rejected + false) * (rejected + missed)
    return (hit * rejected - false * missed) / product**0.5 if product else 0.0


def _counts(predicted: Tensor, labels: Tensor) -> list[int]:
    """True positives, false positives, false negatives, true negatives."""
    cells = torch.bincount(2 * labels + predicted, minlength=4).tolist()
    return [cells[3], cells[1], cells[2], cells[0]]


STATISTICS = {"f1": f1, "mcc": matthews}
