"""``pyprune refine``: a pruned checkpoint in, the same checkpoint with refined weights out."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TextIO

from torch import nn

from pyprune import checkpoint
from pyprune.config import DTYPES, Calibration, ConfigError, Evaluation, Reconstruction, to_dict
from pyprune.evaluate import measure, windows_of
from pyprune.model import ModelView
from pyprune.progress import Progress, announce
from pyprune.prune import pick_dtype
from pyprune.refine_model import refine
from pyprune.report import model_card, perplexity_text
from pyprune.report import read as read_report
from pyprune.speed import dense_of

CARRIED = ("pruning.json", "run.yaml")
"""Files of a pyprune checkpoint that stay as they are: how it was pruned, and the sizes its config cannot say."""


def refine_checkpoint(directory: str | Path, output: str | Path, *, dense: str | Path | None = None,
                      calibration: Calibration | None = None, evaluation: Evaluation | None = None,
                      settings: Reconstruction | None = None, cross_block: bool = False,
                      global_propagation: bool = True, dtype: str = "auto", compute_dtype: str = "auto",
                      device: str = "auto", seed: int = 0, progress: bool = True) -> dict:
    """Refine a checkpoint by :func:`pyprune.refine` and write it to ``output``, whole or not at all.

    dense: the model it was pruned from; None: what its ``pruning.json`` names.
    Returns what ``refinement.json`` holds: settings, one row a window, perplexity of the dense, the pruned and the
    refined model. Raises ConfigError for bad input before anything is trained.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("refine runs in one process: start it without torchrun")
    for name, value in (("dtype", dtype), ("compute_dtype", compute_dtype)):
        if value not in DTYPES:
            raise ConfigError(f"{name} must be one of {', '.join(DTYPES)}, got {value!r}")
    started, told = time.perf_counter(), []
    calibration, evaluation = calibration or Calibration(), evaluation or Evaluation()
    settings = settings or Reconstruction()
    checkpoint.check_output(output)
    dense = str(dense or dense_of(directory, "--dense"))
    announce(f"loading {directory} and {dense}", progress, "refining")
    model, tokenizer = checkpoint.load(directory, dtype)
    teacher, own = checkpoint.load(dense, dtype)
    tokenizer = tokenizer or own
    view = ModelView(model)
    texts = windows_of(evaluation, tokenizer, view.is_encoder)
    announce("measuring the dense and the pruned model", progress and bool(texts), "refining")
    measured = {"dense": measure(teacher, texts, evaluation), "pruned": measure(model, texts, evaluation)}
    with Progress(len(view.blocks) + cross_block, label="refining", enabled=progress) as bar:
        rows = refine(model, teacher, calibration, tokenizer=tokenizer, cross_block=cross_block, settings=settings,
                      global_propagation=global_propagation, device=device, seed=seed, warn=told.append,
                      compute_dtype=pick_dtype(compute_dtype),
                      progress=lambda done, windows: bar.update(block=done))
    announce("measuring the refined model", progress and bool(texts), "refining")
    measured["refined"] = measure(model, texts, evaluation)
    told += [f"training of blocks {row['blocks']} met a loss that is not finite and was undone; lower lr"
             for row in rows if row["diverged"]]
    found = {"model": str(directory), "dense": dense, "cross_block": cross_block,
             "global_propagation": global_propagation, "seed": seed, "settings": to_dict(settings),
             "calibration": _named(calibration), "windows": rows,
             "evaluation": [{**rest, **{name: values[k]["perplexity"] for name, values in measured.items()}}
                            for k, rest in enumerate(measured["refined"])],
             "seconds": time.perf_counter() - started, "warnings": list(dict.fromkeys(told))}
    with checkpoint.staged(output) as folder:
        _fill(folder, model, tokenizer, Path(directory).expanduser(), found, Path(output).name)
    return found


def _named(calibration: Calibration) -> dict:
    """As plain data; a source in memory is named by its kind."""
    source = calibration.source
    if source is not None and not isinstance(source, (str, Path)):
        calibration = dataclasses.replace(calibration, source=f"<{type(source).__name__} in memory>")
    return to_dict(calibration)


def _fill(folder: Path, model: nn.Module, tokenizer, source: Path, found: dict, name: str) -> None:
    """All files: the model, how it was pruned, how it was refined, and a card that says both."""
    with checkpoint.quiet():
        model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    checkpoint.write_json(folder / "refinement.json", found)
    for file in CARRIED:
        if (source / file).is_file():
            shutil.copyfile(source / file, folder / file)
    if not (source / "report.json").is_file():
        return
    report = {**read_report(source), "refinement": found}
    if found["evaluation"]:
        report["evaluation"] = [{**row, "pruned": row["refined"], "before_refinement": row["pruned"]}
                                for row in found["evaluation"]]
    checkpoint.write_json(folder / "report.json", report)
    (folder / "README.md").write_text(model_card(report, name) + card_line(found))


def card_line(found: dict) -> str:
    """What the model card adds: that the weights are not those of the pruning alone."""
    how = ("cross-block" if found["cross_block"] else "block") + " reconstruction" + (
        " with global propagation" if found["global_propagation"] else "")
    was = "; ".join(f"{perplexity_text(row['pruned'])} → {perplexity_text(row['refined'])} on {row['text']}"
                    for row in found["evaluation"])
    return (f"- refined after pruning by {how} against `{found['dense']}` (arXiv 2406.15524)"
            + (f", perplexity {was}" if was else "") + ": `refinement.json`\n")


def print_refinement(found: dict, directory: str | Path, stream: TextIO | None = None) -> None:
    """Perplexity before and after, the error of the last window, where everything lies."""
    stream = stream or sys.stdout
    for row in found["evaluation"]:
        print(f"perplexity {perplexity_text(row['dense'])} dense, {perplexity_text(row['pruned'])} pruned → "
              f"{perplexity_text(row['refined'])} refined  ({row['windows']} windows of {row['window']} tokens, "
              f"{row['text']})", file=stream)
    last = found["windows"][-1]
    held_out = f", {last['before_held_out']:.4g} → {last['after_held_out']:.4g} on held-out text" \
        if "after_held_out" in last else ""
    print(f"error of the last block {last['before_calibration']:.4g} → {last['after_calibration']:.4g}{held_out} "
          "(relative to dense)", file=stream)
    for text in found["warnings"]:
        print(f"warning: {text}", file=stream)
    print(f"{found['seconds']:.1f} s, written to {directory}", file=stream)
