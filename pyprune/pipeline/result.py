"""What a run hands back: the pruned model, what was asked, what it cost, and how to write it."""

from __future__ import annotations

import dataclasses
import html
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pyprune.config import PruneConfig
from pyprune.execution.weight_streaming import Streamed
from pyprune.model import assembly, checkpoint
from pyprune.model.assembly import BlockShards
from pyprune.model.origin import Origin
from pyprune.packed.files import pack_here
from pyprune.reporting.card import model_card
from pyprune.reporting.record import pruning_record, run_yaml
from pyprune.reporting.rendering import headline, perplexity_text, print_summary, summary_rows
from pyprune.reporting.run_page import write_run_page


@dataclass(repr=False)
class PruneResult:
    """A pruned model, what was asked, and what it cost."""

    model: nn.Module
    """The pruned model, on the host."""
    tokenizer: Any
    """Of the model; None if it has none."""
    config: PruneConfig
    """What was asked for."""
    report: dict
    """What it cost: what ``report.json`` holds."""
    models: dict[float, nn.Module] = field(default_factory=dict)
    """Structured pruning: by sparsity; ``model`` is the last one asked for."""
    origin: Origin | None = None
    """What the dense checkpoint holds beside the model."""

    def __repr__(self) -> str:
        rows = self.report.get("evaluation") or []
        moved = (
            f", perplexity {perplexity_text(rows[0]['dense'])} → {perplexity_text(rows[0]['pruned'])}" if rows else ""
        )
        return f"<PruneResult of {self.report['model']['name']}: {headline(self.report)}{moved}>"

    def summary(self) -> str:
        """The table that the command line prints after a run."""
        out = io.StringIO()
        print_summary(self.report, self.config.output, out)
        return out.getvalue()

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        title = f"{self.report['model']['name']}: {headline(self.report)}"
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(label)}</th>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for label, text in summary_rows(self.report)
        )
        return f"<table><caption>{html.escape(title)}</caption>{rows}</table>"

    def save(self, directory: str | Path) -> None:
        """Write a Hugging Face checkpoint with ``pruning.json``, ``report.json``, ``report.html``, ``run.yaml`` and a
        model card; of several sparsities, each in a folder of its own, ``sparsity-0.3``."""
        if len(self.models) < 2:
            with checkpoint.staged(directory) as folder:
                self._write(folder, Path(directory).name)
        for single in self.singles():
            single.save(f"{directory}/sparsity-{single.config.sparsity:g}")

    def fill(self, folder: Path, blocks: BlockShards | None = None) -> None:
        """Write the same files into a folder that exists; ``blocks``: what the run has written already."""
        if len(self.models) < 2:
            self._write(folder, Path(self.config.output_folder).name, blocks)
        for single in self.singles():
            name = f"sparsity-{single.config.sparsity:g}"
            (folder / name).mkdir()
            single._write(folder / name, name)

    def singles(self) -> list[PruneResult]:
        """One result per sparsity, where several were asked for."""
        if len(self.models) < 2:
            return []
        return [
            PruneResult(
                model,
                self.tokenizer,
                dataclasses.replace(self.config, sparsity=sparsity),
                report_of(self.report, sparsity),
                origin=self.origin,
            )
            for sparsity, model in self.models.items()
        ]

    def _write(self, folder: Path, name: str, blocks: BlockShards | None = None) -> None:
        assembly.save(self.model, folder, blocks)
        checkpoint.save_extras(self.tokenizer, folder, self.origin)
        write_records(folder, self.report, self.config, name)


class StreamedResult(PruneResult):
    """The result of a run that never held the whole model: it lies in the output folder and is loaded if asked for."""

    def __init__(self, weights: Streamed, tokenizer, config: PruneConfig, report: dict, origin: Origin | None = None):
        self.weights, self.tokenizer, self.config, self.report = weights, tokenizer, config, report
        self.models, self.origin = {}, origin
        self._model: nn.Module | None = None

    @property
    def model(self) -> nn.Module:  # type: ignore[override]  # read on first use; nobody assigns it
        """The pruned model, loaded whole on first use."""
        if self._model is None:
            self._model = checkpoint.load(self.config.output_folder).model
        return self._model

    def fill(self, folder: Path, blocks: BlockShards | None = None) -> None:
        """Write the checkpoint from the shards of the finished blocks."""
        self.weights.save(folder)
        checkpoint.save_extras(self.tokenizer, folder, self.origin)
        write_records(folder, self.report, self.config, Path(self.config.output_folder).name)


def write_records(folder: Path, report: dict, config: PruneConfig, name: str) -> None:
    """Write what was done: records, report, configuration and model card, which calls the model ``name``; then pack
    the weights in the folder, if that was asked for."""
    files = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    report["model"]["file_bytes"] = sum(path.stat().st_size for path in files)
    checkpoint.write_json(folder / "report.json", report)
    checkpoint.write_json(folder / "pruning.json", pruning_record(report))
    (folder / "run.yaml").write_text(run_yaml(report, config))
    (folder / "README.md").write_text(model_card(report, name))
    write_run_page(folder, report, name)
    if config.packed:
        pack_here(folder, name)


def report_of(report: dict, sparsity: float) -> dict:
    """The report of one of several sparsities, as if it had been pruned alone."""
    whole = report["structured"]
    entry = next(e for e in whole["curve"] if e["sparsity"] == sparsity)
    total = sum(r["shape"][0] * r["shape"][1] for r in entry["layers"])
    dropped = sum(r["sparsity"] * r["shape"][0] * r["shape"][1] for r in entry["layers"])
    return {
        **report,
        "config": {**report["config"], "sparsity": sparsity},
        "sparsity_asked": sparsity,
        "weights": entry["layers"],
        "model": {**report["model"], "parameters": entry["parameters"]},
        "sparsity": dropped / total,
        "evaluation": entry.get("evaluation", []),
        "generalisation": entry.get("generalisation"),
        "structured": {"notes": whole["notes"], "inputs": whole["inputs"], **entry},
    }
