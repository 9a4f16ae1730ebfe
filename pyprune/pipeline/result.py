"""What a run hands back: the pruned model, what was asked, what it cost, and how to write it."""

from __future__ import annotations

import html
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pyprune.config import PruneConfig, member_name
from pyprune.execution.weight_streaming import Streamed
from pyprune.model import assembly, checkpoint
from pyprune.model.assembly import BlockShards
from pyprune.model.origin import Origin
from pyprune.packed.files import pack_here
from pyprune.pipeline.refine_request import RECIPE, RECORD, card_line
from pyprune.reporting.card import model_card
from pyprune.reporting.record import config_for_report, pruning_record, run_yaml
from pyprune.reporting.run_page import write_run_page
from pyprune.reporting.summary import curve_of, print_summary, summary_rows
from pyprune.reporting.words import headline, perplexity_text


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
    models: Mapping[float, nn.Module] = field(default_factory=dict)
    """Of several sparsities, by sparsity; ``model`` is the last one asked for."""
    origin: Origin | None = None
    """What the dense checkpoint holds beside the model."""

    def __repr__(self) -> str:
        rows = self.report.get("evaluation") or []
        moved = ""
        if rows:
            each = [entry["evaluation"][0] for entry in curve_of(self.report) or [self.report]]
            shown = ", ".join(perplexity_text(row["pruned"]) for row in each)
            moved = f", perplexity {perplexity_text(rows[0]['dense'])} → {shown}"
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
        singles = self.singles()
        if not singles:
            with checkpoint.staged(directory) as folder:
                self._write(folder, Path(directory).name)
        for single in singles:
            single.save(f"{directory}/{member_name(single.config.one_sparsity)}")

    def fill(self, folder: Path, blocks: BlockShards | None = None) -> None:
        """Write the same files into a folder that exists; ``blocks``: what the run has written already."""
        singles = self.singles()
        if not singles:
            self._write(folder, Path(self.config.output_folder).name, blocks)
        for single in singles:
            name = member_name(single.config.one_sparsity)
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
                self.config.single(sparsity),
                report_of(self.report, self.config.single(sparsity)),
                origin=self.origin,
            )
            for sparsity, model in self.models.items()
        ]

    def _write(self, folder: Path, name: str, blocks: BlockShards | None = None) -> None:
        assembly.save(self.model, folder, blocks)
        checkpoint.save_extras(self.tokenizer, folder, self.origin)
        write_records(folder, self.report, self.config, name)


class WrittenResult(PruneResult):
    """The result of a run that holds no model: it lies in the output folder and is loaded if asked for."""

    def __init__(self, tokenizer, config: PruneConfig, report: dict, origin: Origin | None = None):
        self.tokenizer, self.config, self.report = tokenizer, config, report
        self.models, self.origin = {}, origin
        self._model: nn.Module | None = None

    @property
    def model(self) -> nn.Module:  # type: ignore[override]  # read on first use; nobody assigns it
        """The pruned model, loaded whole on first use."""
        if self._model is None:
            self._model = checkpoint.load_model(self.config.output_folder).model
        return self._model


class StreamedResult(WrittenResult):
    """The result of a run that never held the whole model."""

    def __init__(self, weights: Streamed, tokenizer, config: PruneConfig, report: dict, origin: Origin | None = None):
        super().__init__(tokenizer, config, report, origin)
        self.weights = weights

    def fill(self, folder: Path, blocks: BlockShards | None = None) -> None:
        """Write the checkpoint from the shards of the finished blocks."""
        self.weights.save(folder)
        checkpoint.save_extras(self.tokenizer, folder, self.origin)
        write_records(folder, self.report, self.config, Path(self.config.output_folder).name)


class SeveralResult(PruneResult):
    """Several sparsities with a result each, in the order asked."""

    def __init__(self, results: Sequence[PruneResult], config: PruneConfig):
        self._results, last = list(results), results[-1]
        self.tokenizer, self.config, self.origin = last.tokenizer, config, last.origin
        self.models = Members({single.config.one_sparsity: single for single in results})
        self.report = several_reported([single.report for single in results], config)

    @property
    def model(self) -> nn.Module:  # type: ignore[override]  # that of its last result
        """The pruned model of the last sparsity."""
        return self._results[-1].model

    def singles(self) -> list[PruneResult]:
        """The result of each sparsity."""
        return self._results


class Members(Mapping[float, nn.Module]):
    """The models of several results by sparsity, each loaded when it is asked for."""

    def __init__(self, results: Mapping[float, PruneResult]):
        self._results = results

    def __getitem__(self, sparsity: float) -> nn.Module:
        return self._results[sparsity].model

    def __iter__(self) -> Iterator[float]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)


def write_records(folder: Path, report: dict, config: PruneConfig, name: str) -> None:
    """Write what was done: records, report, configuration and model card, which calls the model ``name``; then pack
    the weights in the folder, if that was asked for."""
    files = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    report["model"]["file_bytes"] = sum(path.stat().st_size for path in files)
    report["model"]["tokenizer"] = any((folder / file).is_file() for file in checkpoint.TOKENIZER_FILES)
    checkpoint.write_json(folder / "report.json", report)
    checkpoint.write_json(folder / "pruning.json", pruning_record(report))
    (folder / "run.yaml").write_text(run_yaml(report, config))
    card = model_card(report, name)
    if "recipe" in (refined := report.get("refinement") or {}):  # refined in memory, after the run
        (folder / RECIPE).write_text(refined["recipe"])
        checkpoint.write_json(folder / RECORD, refined)
        card += card_line(refined, refined["repeatable"])
    (folder / "README.md").write_text(card)
    write_run_page(folder, report, name)
    if config.packed:
        pack_here(folder, name)


def several_reported(reports: Sequence[dict], config: PruneConfig) -> dict:
    """One report for several sparsities that were pruned one after the other: that of the last, with the seconds of all
    and an entry of each in ``curve``."""
    phases = dict.fromkeys(phase for report in reports for phase in report["seconds"])
    entries = []
    for report, sparsity in zip(reports, config.several):
        last = (report.get("blocks") or [{}])[-1]
        entries.append(
            {
                "sparsity": sparsity,
                "achieved": report["sparsity"],
                "removed": (report.get("structured") or {}).get("removed", {}),
                "parameters": report["model"]["parameters"],
                "evaluation": report["evaluation"],
                "generalisation": report["generalisation"],
                "error": last.get("error"),
                "error_held_out": last.get("error_held_out"),
            }
        )
    return {
        **reports[-1],
        "config": config_for_report(config),
        "sparsity_asked": list(config.several),
        "curve": entries,
        "seconds": {phase: sum(report["seconds"].get(phase, 0.0) for report in reports) for phase in phases},
        "peak_memory_bytes": max(report["peak_memory_bytes"] for report in reports),
        "warnings": _warnings_of(reports, config),
    }


def _warnings_of(reports: Sequence[dict], config: PruneConfig) -> list[str]:
    """The warnings of all, each once; what does not hold for all names its sparsity."""
    found = []
    for report, sparsity in zip(reports, config.several):
        for text in report["warnings"]:
            common = all(text in other["warnings"] for other in reports)
            found.append(text if common else f"at {sparsity:g}: {text}")
    return list(dict.fromkeys(found))


def report_of(report: dict, config: PruneConfig) -> dict:
    """The report of one of several sparsities, as if it had been pruned alone."""
    whole, sparsity = report["structured"], config.one_sparsity
    entry = next(e for e in whole["curve"] if e["sparsity"] == sparsity)
    total = sum(r["shape"][0] * r["shape"][1] for r in entry["layers"])
    dropped = sum(r["sparsity"] * r["shape"][0] * r["shape"][1] for r in entry["layers"])
    return {
        **report,
        "config": {**report["config"], "sparsity": sparsity, "output": config.output},
        "sparsity_asked": sparsity,
        "weights": entry["layers"],
        "model": {**report["model"], "parameters": entry["parameters"]},
        "sparsity": dropped / total,
        "evaluation": entry.get("evaluation", []),
        "generalisation": entry.get("generalisation"),
        "structured": {"notes": whole["notes"], "inputs": whole["inputs"], **entry},
    }
