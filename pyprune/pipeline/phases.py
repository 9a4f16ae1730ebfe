"""The phases of one run of :func:`pyprune.prune`, in their order: functions of its :class:`Session`.

``prepare``         check, read the texts, open the model, sample from it, choose the back-ends
``register``        say in the journal what the run is, or compare it with the interrupted one
``measure_dense``   the dense model's perplexity
``carry_out``       prune block by block, measure what came out, report it and write it
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyprune import ops
from pyprune.config import ConfigError, PruneConfig
from pyprune.data import texts
from pyprune.data.calibration import CalibrationData, within
from pyprune.effects import needs_sequences, texts_read, trains
from pyprune.evaluation import domains
from pyprune.evaluation.block_by_block import Meter
from pyprune.evaluation.perplexity import warnings_for
from pyprune.evaluation.windows import Text, refuse_text
from pyprune.execution.activation_store import Store
from pyprune.execution.device import pick_dtype
from pyprune.execution.executor import Executor, Resident
from pyprune.execution.progress import Progress
from pyprune.execution.residency import resident
from pyprune.execution.run import Run, seed_all
from pyprune.execution.weight_streaming import Opened, Streamed, weights_digest
from pyprune.model.assembly import BlockShards
from pyprune.model.blocks import ModelView, check_apart, check_finite, check_usable, select_weights
from pyprune.model.origin import Origin
from pyprune.model.positions import Positions, positions_of
from pyprune.pipeline.block_loop import Loop, run_blocks
from pyprune.pipeline.checks import check_weights, named_positions, outlined, thin_statistics, unmeasured
from pyprune.pipeline.mask_work import MaskWork
from pyprune.pipeline.opening import open_model
from pyprune.pipeline.result import PruneResult, SeveralResult, StreamedResult, WrittenResult
from pyprune.pipeline.sequences import add_generated, check_lengths, sequences_of
from pyprune.pipeline.session import Session, begin, kept, make_store, settle_backends
from pyprune.pipeline.sparsities import Rules, Selected, kinds_for, weights_and_keys
from pyprune.pipeline.structured_work import StructuredWork
from pyprune.pipeline.tracking import outcome
from pyprune.reporting.comparison import read as read_report
from pyprune.reporting.record import build_report, compared, config_for_report, data_identity, settings_of
from pyprune.structured.units import Units, find_units


@dataclass(frozen=True, eq=False)
class Material:
    """What a run begins with."""

    opened: Opened
    """The dense model."""
    selected: Selected
    """Per block, the weights to prune."""
    rules: Rules | None
    """Per block, the key of each weight's sparsity, where these are given by name."""
    units: Units | None
    """What structured pruning chooses from; None for masks."""
    data: CalibrationData
    windows: list[Text]
    """Of the evaluation."""
    backends: dict
    """What each op takes."""
    weights: str | None
    """A fingerprint of the weights, where the model has no name."""
    home: torch.device
    """Where the weights lay when they were opened."""


@dataclass(frozen=True, eq=False)
class Dense:
    """What was measured of the dense model, and by what."""

    rows: list[dict]
    """One per text."""
    meter: Meter
    store: Store


def run_once(session: Session, model, tokenizer, in_place: bool) -> PruneResult:
    """All phases, each once."""
    return run_prepared(session, prepare(session, model, tokenizer, in_place))


def run_prepared(session: Session, material: Material) -> PruneResult:
    """The phases after the first; those that an interrupted run did, it does not do again."""
    register(session, material, len(material.opened.view.blocks))
    if session.world.same(session.journal.complete):
        session.world.lead(session.journal.publish)
        return published(session.config, material.opened)
    return carry_out(session, material, measure_dense(session, material))


def prepare(session: Session, model, tokenizer, in_place: bool) -> Material:
    """Check what can be checked without weights, read the texts, open the model, sample from it, choose the back-ends.

    model: a live one, one that is :class:`Opened` and is copied, or None for the one that the configuration names.
    Raises ConfigError for what cannot be done.
    """
    config, found = session.config, session.found
    session.world.lead(lambda: session.journal.check_settings(settings_of(config)))
    if (absent := ops.check_backend(config.backend, session.device.type)) is not None:
        found.warn(absent)
    seed_all(config.seed)
    for text in texts_read(config):
        texts.check_there(text)
    read = None if isinstance(model, (nn.Module, Opened)) else read_ahead(session, tokenizer)
    with found.clock("load"):
        opened = open_for(session, model, tokenizer, in_place)
    view = opened.view
    check_usable(view, opened.weights.streamed)
    check_apart(view)
    selected = select_weights(view, config.targets, config.ignore)
    selected, rules = weights_and_keys(view, selected, config, kinds_for(view, config, opened.weights))
    check_weights(view, selected, config, rules)
    units = None
    if config.is_structured:
        with found.clock("groups"):
            units = find_units(view, selected, config, opened.weights)
    refuse_text(config.evaluation, view)
    positions = positions_of(view)
    data, windows = read or sequences_of(session, view, opened.tokenizer, positions)
    check_lengths(config, data, windows, positions, found.warn)
    sample(session, data, opened, positions)
    with found.clock("back-ends"), session.doing("checking and timing the back-ends of this machine", said=False):
        backends = settle_backends(
            session.journal, session.world, session.device, config.backend, config.backends, found.warn
        )
    weights = fingerprint_of(session, opened)
    home = next(view.model.parameters()).device
    session.tell()
    return Material(opened, selected, rules, units, data, windows, backends, weights, home)


def fingerprint_of(session: Session, opened: Opened) -> str | None:
    """A fingerprint of a model that has no name; warns where the run is to repeat one on other weights."""
    config = session.config
    if config.model is not None:
        return None
    found = weights_digest(opened.model.state_dict().items())
    if config.weights not in (None, found):
        session.found.warn(
            f"the model's weights (fingerprint {found[:12]}…) are not those of the run that is repeated "
            f"({config.weights[:12]}…): the result will be another one"
        )
    return found


def read_ahead(session: Session, tokenizer) -> tuple[CalibrationData, list[Text]] | None:
    """The texts of a run whose model has a name, before its weights are read; None where these take no longer."""
    with (
        session.found.clock("load"),
        session.doing(f"reading the configuration of {session.config.model}", said=False),
    ):
        outline, early = outlined(session.config, tokenizer)
    return None if outline is None else sequences_of(session, outline, early, named_positions(outline))


def open_for(session: Session, model, tokenizer, in_place: bool) -> Opened:
    """The model of a run: the live one or a copy of it, a copy of one that is open already, or the one that the
    configuration names."""
    if isinstance(model, Opened):
        return model.copy()
    if isinstance(model, nn.Module):
        check_finite(model.state_dict().items())
        live = (model if in_place else copy.deepcopy(model)).eval()
        return Opened(live, tokenizer, Resident(), ModelView(live))
    if in_place:
        raise ConfigError("in_place=True would do nothing: only a live nn.Module can be pruned where it is")
    streamed = session.world.same(session.journal.header.get("streamed"))
    with session.doing(f"loading {session.config.model}"):
        opened = open_model(session.config, streamed, pin=session.device.type == "cuda")
    return opened if tokenizer is None else dataclasses.replace(opened, tokenizer=tokenizer)


def sample(session: Session, data: CalibrationData, opened: Opened, positions: Positions | None) -> None:
    """Add self-generated sequences to the calibration data, if the run asks for them."""
    config, shared = session.config, session.shared
    settings = within(config.calibration, positions.count if positions else None)
    own = settings.self_generated
    if not own or not needs_sequences(config):
        return
    with session.found.clock("calibration"), session.doing(f"sampling {own} sequences from the model") as doing:
        shared.once(
            f"generated for {shared.sequences(config)}",
            functools.partial(add_generated, data, settings, opened.model, opened.tokenizer, doing),
        )


def register(session: Session, material: Material, blocks: int, **header) -> None:
    """Record in the journal what this run is, or compare it with the interrupted one, if it has an output folder."""
    if not session.config.output:
        return
    with session.found.clock("load"):
        identity = {
            "settings": settings_of(session.config),
            "data": data_identity(material.data, [text.windows for text in material.windows]),
            "model": material.opened.identity(),
        }
        begin(
            session.journal,
            session.world,
            identity,
            blocks,
            streamed=material.opened.weights.streamed,
            backends=material.backends,
            config=config_for_report(session.config),
            **header,
        )


def measure_dense(session: Session, material: Material) -> Dense:
    """Perplexity of the dense model, which from here on is where it is computed."""
    config, journal, opened, device = session.config, session.journal, material.opened, session.device
    place(session, material)
    store = make_store(config.memory_budget_gb, journal.folder if journal.keeps else None, device)
    meter = Meter(material.windows, config.evaluation, device, store, session.world)
    with session.found.clock("evaluation"):
        rows = session.shared.once(
            session.shared.dense(config, material.windows),
            lambda: kept(
                journal,
                session.world,
                "dense",
                lambda doing: meter(opened.model, opened.weights, doing),
                session.doing("measuring the dense model", bool(material.windows)),
            ),
        )
    return Dense(rows, meter, store)


def place(session: Session, material: Material) -> None:
    """Until the result is written: the model where it is computed, if there is room, and each op by its back-end."""
    opened, device = material.opened, session.device
    if not opened.weights.streamed:
        with session.found.clock("load"):
            session.held.enter_context(resident(opened.view.model, device, models_held(session.config)))
    session.held.enter_context(ops.pinned(material.backends))
    session.found.clock.follow(device)


def carry_out(session: Session, material: Material, dense: Dense) -> PruneResult:
    """Prune the model block by block, measure it again, report and write."""
    config, found, device = session.config, session.found, session.device
    opened, view = material.opened, material.opened.view
    executor = Executor(
        view,
        device=device,
        compute_dtype=pick_dtype(config.compute_dtype),
        batch_size=config.batch_size,
        weights=opened.weights,
        store=dense.store,
        world=session.world,
        warn=found.warn,
    )
    run = Run(config, view, executor, material.selected, material.data, session.world, material.rules)
    notes = [*opened.origin.notes, *material.data.warnings]
    if trains(config) and not config.reconstruction.epochs:
        notes.append("epochs=0 trains nothing: the weights are those before the training")
    for text in [*notes, *thin_statistics(run), *unmeasured(config, view, material.windows)]:
        found.warn(text)
    session.tell()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    work = prune_blocks(session, run, material.units, again(dense.rows, config))
    peak_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    models = work.models()
    report = reported(session, material, dense, run, work, models, peak_device)
    result = result_of(session, opened, report, models)
    if config.output:
        write(session, view, result)
    for member in models.values() if len(models) > 1 else ():  # they were made beside the model, where it was
        session.held.callback(member.to, material.home)
    return result


def prune_blocks(session: Session, run: Run, units: Units | None, afterwards: float) -> MaskWork | StructuredWork:
    """The loop over the blocks. afterwards: seconds of what follows it."""
    config, journal, world = session.config, session.journal, session.world
    work: MaskWork | StructuredWork
    bar = Progress(len(run.view.blocks), enabled=session.progress, afterwards=afterwards, following=session.following)
    with (
        bar,
        journal.interruptible(follow=world.size > 1),
    ):
        bar.update(phase="preparing")
        if units is None:
            work = MaskWork(run, session.found, journal)
        else:
            work = StructuredWork(run, session.found, journal, units)
        loop = Loop(run.executor, journal, session.found, world, config.seed, config.output, session.track)
        run_blocks(loop, work, bar)
    return work


def measure_pruned(session: Session, opened: Opened, dense: Dense, models: dict[float, nn.Module]) -> dict:
    """Perplexity of each pruned model, one row per text."""
    found = {}
    for sparsity, member in models.items():
        which = "the pruned model" + (f", sparsity {sparsity:g}" if len(models) > 1 else "")
        with session.doing(f"measuring {which}", bool(dense.meter.texts)) as doing:
            found[sparsity] = dense.meter(member, opened.weights, doing)
    return found


def reported(
    session: Session,
    material: Material,
    dense: Dense,
    run: Run,
    work: MaskWork | StructuredWork,
    models: dict[float, nn.Module],
    peak_device: int | None,
) -> dict:
    """Measure what came out, and report it all. peak_device: bytes that the loop had allocated on a GPU at most."""
    found, structured = session.found, work.entry()
    with found.clock("evaluation"):
        pruned = measure_pruned(session, material.opened, dense, models)
    for entry in (structured or {}).get("curve", []):
        entry["evaluation"] = compared(dense.rows, pruned[entry["sparsity"]])
        entry["generalisation"] = domains.generalisation(entry["evaluation"])
    rows = {"dense": dense.rows}
    for sparsity, own in pruned.items():
        rows["pruned" if len(models) == 1 else f"pruned (sparsity {sparsity:g})"] = own
    evaluation = compared(dense.rows, list(pruned.values())[-1])
    gap = domains.generalisation(evaluation)
    warnings = [text for whose, row in rows.items() for text in warnings_for(row, whose)]
    for text in [*dense.meter.notes, *warnings, *domains.gap_warning(gap)]:
        found.warn(text)
    session.track(len(run.view.blocks), outcome(evaluation))
    live = list(models.values())[-1]
    report = build_report(
        run, found, live, evaluation, gap, work.coverage(), structured, peak_device, material.backends
    )
    report["model"] |= known_of_dense(session.config.model, material.opened.origin)
    if material.weights is not None:
        report["model"]["weights"] = material.weights
    return report


def result_of(session: Session, opened: Opened, report: dict, models: dict[float, nn.Module]) -> PruneResult:
    """What the run hands back; a streamed model stays on the disk."""
    if isinstance(opened.weights, Streamed):
        return StreamedResult(opened.weights, opened.tokenizer, session.config, report, opened.origin)
    several = models if session.config.is_structured else {}
    return PruneResult(list(models.values())[-1], opened.tokenizer, session.config, report, several, opened.origin)


def write(session: Session, view: ModelView, result: PruneResult) -> None:
    """Assemble the checkpoint from the blocks in the journal and move it out."""
    journal = session.journal
    with session.found.clock("write"), session.doing(f"writing {session.config.output}", said=False):
        session.world.lead(
            lambda: journal.finish(lambda folder: result.fill(folder, BlockShards(view.path, journal.shards())))
        )


def published(config: PruneConfig, dense: Opened) -> PruneResult:
    """The result of a run that had only its checkpoint left to move out."""
    if len(config.several) > 1:
        return SeveralResult([written(config.single(s), dense) for s in config.several], config)
    return written(config, dense)


def written(config: PruneConfig, dense: Opened) -> WrittenResult:
    """The result of a run that is in its output folder."""
    return WrittenResult(dense.tokenizer, config, read_report(config.output_folder), dense.origin)


def again(dense: list[dict], config: PruneConfig) -> float:
    """Seconds that measuring the pruned models will take, if they are as fast as the dense one."""
    return sum(row.get("seconds", 0.0) for row in dense) * len(config.sparsities)


def known_of_dense(name: str | None, origin: Origin) -> dict:
    """What a model card says of the dense model: the bytes of its weight files, and ``card``, entries of its header."""
    found: dict[str, Any] = {}
    card: dict[str, str] = {}
    if name is not None and not Path(name).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        card["base_model"] = name
    if origin.folder is not None:
        files = [path for path in origin.folder.iterdir() if path.suffix in (".safetensors", ".bin")]
        found["file_bytes_dense"] = sum(path.stat().st_size for path in files)
        readme = origin.folder / "README.md"
        header = readme.read_text(errors="replace").split("---")[1:2] if readme.is_file() else []
        licence = re.search(r"^license:\s*([\w.-]+)\s*$", header[0], flags=re.M) if header else None
        card |= {"license": licence[1]} if licence else {}
    return {**found, **({"card": card} if card else {})}


def kind_of(config: PruneConfig) -> type[MaskWork | StructuredWork]:
    """The work that a configuration asks for."""
    return StructuredWork if config.is_structured else MaskWork


def models_held(config: PruneConfig) -> int:
    """Models that a run has at once: the one it prunes, and where there are several sparsities one of each."""
    return 1 + len(config.sparsities) if config.is_curve else 1
