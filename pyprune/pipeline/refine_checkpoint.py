"""``pyprune refine``: a pruned checkpoint in, the same checkpoint with refined weights out."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from pyprune import ops
from pyprune.data.calibration import CalibrationData
from pyprune.data.texts import check_there
from pyprune.evaluation import domains
from pyprune.evaluation.block_by_block import Meter
from pyprune.evaluation.perplexity import warnings_for
from pyprune.evaluation.windows import Text, refuse_text, windows_of
from pyprune.execution.activation_store import Store
from pyprune.execution.device import pick_device, pick_dtype
from pyprune.execution.distributed import World
from pyprune.execution.executor import Executor
from pyprune.execution.journal import Journal, journaled
from pyprune.execution.progress import Doing, Progress
from pyprune.execution.run import Findings
from pyprune.execution.weight_streaming import Opened, Streamed, open_checkpoint
from pyprune.model import assembly, checkpoint
from pyprune.model.assembly import BlockShards
from pyprune.model.attributes import vocabulary_size
from pyprune.model.positions import positions_of
from pyprune.packed.files import pack_here
from pyprune.pipeline.block_loop import Loop, run_blocks
from pyprune.pipeline.opening import samples_itself
from pyprune.pipeline.refine_request import RECIPE, RECORD, Request, card_line, recipe, requested
from pyprune.pipeline.refine_work import RefineWork
from pyprune.pipeline.sequences import sequences_of_pair
from pyprune.pipeline.session import begin, kept, make_store, settle_backends
from pyprune.pipeline.tracking import Track, outcome, tracker
from pyprune.reporting.card import model_card
from pyprune.reporting.comparison import read as read_report
from pyprune.reporting.record import compared, data_identity
from pyprune.reporting.run_page import write_run_page
from pyprune.reporting.words import perplexity_text, source_text, windows_text

LABEL = "refining"
CARRIED = ("pruning.json", "run.yaml")
"""Files of a pyprune checkpoint that stay as they are: how it was pruned, and the sizes its config cannot say."""


def refine_checkpoint(
    model: str | Path | None = None,
    output: str | Path | None = None,
    *,
    dense: str | Path | None = None,
    config: str | Path | Mapping | None = None,
    resume: bool = False,
    progress: bool = True,
    track: Track | str | None = None,
    **fields,
) -> dict:
    """Refine a checkpoint by :func:`pyprune.refine` and write it to ``output``, whole or not at all.

    dense: the model it was pruned from; None: what its ``pruning.json`` names.
    config: a ``refine.yaml`` to repeat, or a mapping of its fields; all other arguments override it.
    resume: go on with the interrupted run in ``output``, to the same result bit for bit. track: as for
    :func:`pyprune.prune`. ``**fields``: those of :class:`Request`.
    Returns what ``refinement.json`` holds: settings, one row per window, perplexity of the dense, the pruned and the
    refined model. Raises ConfigError for bad input before anything is trained, and
    :class:`pyprune.execution.journal.Interrupted` when a signal stopped it between two blocks.
    """
    request = requested(config, {"model": model, "output": output, "dense": dense, **fields})
    for name in (request.pruned, request.original):
        checkpoint.resolve(name)
    for source in (request.calibration.source, request.evaluation.text if request.evaluation.enabled else None):
        check_there(source)
    with journaled(request.output, resume) as (world, journal), tracker(track, world.leads) as told:
        world.lead(lambda: journal.check_settings(request.identity()))
        return _refine(Session(request, world, journal, progress and world.leads, told))


@dataclass(frozen=True, eq=False)
class Session:
    """One refinement while it lasts: what is asked, where it is journaled, who computes, and what it has found."""

    request: Request
    world: World
    journal: Journal
    progress: bool
    """Whether this process shows how far it is."""
    track: Track
    found: Findings = field(default_factory=Findings)

    def doing(self, text: str, enabled: bool = True, said: bool = True) -> Doing:
        return Doing(text, self.progress and enabled, LABEL, said=said)


@dataclass(frozen=True, eq=False)
class Material:
    """What a refinement begins with."""

    pruned: Opened
    dense: Opened
    tokenizer: Any
    data: CalibrationData
    texts: list[Text]
    """Of the evaluation."""
    backends: dict
    """What each op takes."""


def _refine(session: Session) -> dict:
    """Open both models, measure them, refine one, measure it again, write it."""
    started, request, world, journal = time.perf_counter(), session.request, session.world, session.journal
    material = _prepare(session)
    _register(session, material)
    if world.same(journal.complete):
        world.lead(journal.publish)
        return json.loads((Path(request.output).expanduser() / RECORD).read_text())
    found, pruned = session.found, material.pruned
    found.warnings += [*pruned.origin.notes, *material.data.warnings]
    where = pick_device(request.device)
    store = make_store(request.memory_budget_gb, journal.folder if journal.keeps else None, where)
    meter = Meter(material.texts, request.evaluation, where, store, world)
    measured = _measure_both(session, material, meter)
    work = _train(session, material, store, afterwards=sum(row["seconds"] for row in measured["pruned"]))
    with found.clock("evaluation"), session.doing("measuring the refined model", bool(material.texts)) as doing:
        measured["refined"] = meter(pruned.model, pruned.weights, doing)
    result = _result(session, material, work, measured, meter.notes)
    result["seconds"] = time.perf_counter() - started
    blocks = BlockShards(pruned.view.path, journal.shards())
    world.lead(
        lambda: journal.finish(lambda folder: _fill(folder, pruned, blocks, material.tokenizer, request, result))
    )
    return result


def _prepare(session: Session) -> Material:
    """Open both models, read the texts, choose the back-ends."""
    request, found = session.request, session.found
    header, pin = session.world.same(session.journal.header), pick_device(request.device).type == "cuda"
    with found.clock("load"), session.doing(f"loading {request.pruned} and {request.original}"):
        pruned = open_checkpoint(request.pruned, request.dtype, request.stream, None, header.get("streamed"), pin)
        dense = open_checkpoint(
            request.original,
            request.dtype,
            request.stream,
            samples_itself(request.calibration),
            header.get("dense_streamed"),
            pin,
        )
    tokenizer = pruned.tokenizer or dense.tokenizer
    with found.clock("calibration"), session.doing("making calibration sequences", said=False) as doing:
        data = sequences_of_pair(pruned.view, dense.view, request, tokenizer, doing)
        refuse_text(request.evaluation, pruned.view)
        texts = windows_of(
            domains.of_run(request.evaluation, request.calibration),
            request.evaluation,
            tokenizer,
            pruned.view.is_encoder,
            unseen=data.unseen,
            vocab_size=vocabulary_size(pruned.view.model),
            positions=positions_of(pruned.view),
            warn=found.warn,
        )
    with session.doing("checking and timing the back-ends of this machine", said=False):
        backends = settle_backends(
            session.journal, session.world, pick_device(request.device), repeated=request.backends, warn=found.warn
        )
    return Material(pruned, dense, tokenizer, data, texts, backends)


def _register(session: Session, material: Material) -> None:
    """Record in the journal what this refinement is, or compare it with the interrupted one."""
    pruned, dense = material.pruned, material.dense
    identity = {
        "settings": session.request.identity(),
        "data": data_identity(material.data, [text.windows for text in material.texts]),
        "model": pruned.identity(),
        "dense": dense.identity(),
    }
    begin(
        session.journal,
        session.world,
        identity,
        len(pruned.view.blocks),
        streamed=pruned.weights.streamed,
        dense_streamed=dense.weights.streamed,
        backends=material.backends,
        config=session.request.record(),
    )


def _measure_both(session: Session, material: Material, meter: Meter) -> dict[str, list[dict]]:
    """Perplexity of the dense and of the pruned model, one row per text."""
    models = {"dense": material.dense, "pruned": material.pruned}
    with session.found.clock("evaluation"):
        return kept(
            session.journal,
            session.world,
            "measured",
            lambda doing: {name: meter(one.model, one.weights, doing) for name, one in models.items()},
            session.doing("measuring the dense and the pruned model", bool(material.texts)),
        )


def _train(session: Session, material: Material, store: Store, afterwards: float) -> RefineWork:
    """The loop over the blocks. afterwards: seconds of what follows it."""
    request, world, journal, found = session.request, session.world, session.journal, session.found
    pruned, dense = (
        Executor(
            one.view,
            device=pick_device(request.device),
            compute_dtype=pick_dtype(request.compute_dtype),
            weights=one.weights,
            store=store,
            world=world,
            warn=found.warn,
        )
        for one in (material.pruned, material.dense)
    )
    bar = Progress(len(pruned.view.blocks), label=LABEL, enabled=session.progress, afterwards=afterwards)
    with bar, ops.pinned(material.backends), journal.interruptible(follow=world.size > 1):
        work = RefineWork(pruned, dense, material.data, request, found, journal)
        run_blocks(Loop(pruned, journal, found, world, request.seed, request.output, session.track), work, bar)
    return work


def _result(
    session: Session, material: Material, work: RefineWork, measured: dict[str, list[dict]], notes: list[str]
) -> dict:
    """What ``refinement.json`` holds, but for the seconds.

    measured: rows of the dense, the pruned and the refined model. notes: of their evaluation.
    """
    request = session.request
    rows = compared(measured["dense"], measured["refined"])
    before = compared(measured["dense"], measured["pruned"])
    gap = domains.generalisation(rows)
    session.track(len(material.pruned.view.blocks), outcome(rows))
    return {
        "model": request.pruned,
        "dense": request.original,
        **request.asked(),
        "fingerprint": material.data.fingerprint,
        "windows": [row for rows in work.windows for row in rows],
        "blocks": work.errors,
        "evaluation": [
            {**row, "refined": row["pruned"], "pruned": was["pruned"], "ratio_before_refinement": was["ratio"]}
            for row, was in zip(rows, before)
        ],
        "generalisation": gap,
        "backends": material.backends,
        "warnings": [
            *session.found.warnings,
            *notes,
            *(text for whose, found_rows in measured.items() for text in warnings_for(found_rows, whose)),
            *domains.gap_warning(gap),
        ],
    }


def _fill(folder: Path, opened: Opened, blocks: BlockShards, tokenizer, request: Request, found: dict) -> None:
    """All files: the model, how it was pruned, how it was refined, and a card that says both."""
    source, name = Path(request.pruned).expanduser(), Path(request.output).name
    if isinstance(opened.weights, Streamed):
        opened.weights.save(folder)
    else:
        assembly.save(opened.model, folder, blocks)
    checkpoint.save_extras(tokenizer, folder, opened.origin)
    checkpoint.write_json(folder / RECORD, found)
    (folder / RECIPE).write_text(recipe(request, found["backends"]))
    for file in CARRIED:
        if (source / file).is_file():
            shutil.copyfile(source / file, folder / file)
    if (source / "report.json").is_file():
        report = {**read_report(source), "refinement": found}
        if found["evaluation"]:
            report["evaluation"] = [
                {**row, "pruned": row["refined"], "before_refinement": row["pruned"]} for row in found["evaluation"]
            ]
            report["generalisation"] = found["generalisation"]
        checkpoint.write_json(folder / "report.json", report)
        (folder / "README.md").write_text(model_card(report, name) + card_line(found, request.repeatable))
        write_run_page(folder, report, name)
    if found["packed"]:
        pack_here(folder, name)


def print_refinement(found: dict, directory: str | Path, out: TextIO | None = None) -> None:
    """Perplexity and the error behind the last block, before and after, and where everything lies."""
    out = out or sys.stdout
    for row in found["evaluation"]:
        print(
            f"perplexity {perplexity_text(row['dense'])} dense, {perplexity_text(row['pruned'])} pruned → "
            f"{perplexity_text(row['refined'])} refined  ({windows_text(row)}, "
            f"{source_text(row)})",
            file=out,
        )
    before, after = (found["blocks"][-1][when] for when in ("before", "after"))
    held_out = (
        ""
        if after["error_held_out"] is None
        else f", {before['error_held_out']:.4g} → {after['error_held_out']:.4g} on held-out text"
    )
    print(
        f"error of the last block {before['error']:.4g} → {after['error']:.4g}{held_out} (relative to dense)",
        file=out,
    )
    for text in found["warnings"]:
        print(f"warning: {text}", file=out)
    print(f"{found['seconds']:.1f} s, written to {directory}", file=out)
    print(f"repeat it with pyprune refine --config {Path(directory) / RECIPE} -o FOLDER", file=out)
