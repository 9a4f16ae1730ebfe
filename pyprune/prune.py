"""The orchestrator: per block observe → score → mask → solve → reconstruct → propagate, then evaluate and write."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import torch
from torch import nn

from pyprune import calibration, checkpoint, distributed, ops
from pyprune.blockwise import Meter
from pyprune.comparison import read as read_report
from pyprune.config import Calibration, ConfigError, Evaluation, PruneConfig, from_dict, override
from pyprune.effects import needs_sequences, reads_sequences, watches
from pyprune.evaluate import pick_device, refuse_text, warnings_for, windows_of
from pyprune.journal import Journal, journaled
from pyprune.masks import gather, prune_block
from pyprune.model import (
    ModelView,
    WeightRef,
    check_apart,
    check_finite,
    check_usable,
    refuse_shared,
    select_weights,
)
from pyprune.origin import Origin
from pyprune.positions import Positions, positions_of
from pyprune.progress import Progress, announce
from pyprune.record import build_report, compared, data_identity, model_identity, settings_of, weights_digest
from pyprune.refine import Refiner, wanted
from pyprune.run import Clock, Probe, PruneResult, Run, StreamedResult, make_probes, seed_all
from pyprune.statistics import Inputs, observe
from pyprune.steps import block_row, commit_block, enter_block, leave_block, restore_block, settled_by, write_block
from pyprune.store import Store
from pyprune.stream import Activations, Executor, Resident
from pyprune.structured import prune_structured
from pyprune.weights import open_model


def make_config(config: PruneConfig | dict | None, fields: dict) -> PruneConfig:
    """Configuration from an object or mapping plus field overrides; ``calibration=`` and ``evaluation=`` also take
    their source directly (a path, texts, token ids)."""
    config, fields = (_sections(given) if isinstance(given, dict) else given for given in (config, dict(fields)))
    return override(from_dict(PruneConfig, config) if isinstance(config, dict) else config, fields)


def _sections(fields: dict) -> dict:
    """Fields whose ``calibration`` and ``evaluation`` are their settings, where their bare source was given."""
    wrapped = dict(fields)
    if wrapped.get("calibration") is not None:
        wrapped["calibration"] = calibration.named(wrapped["calibration"])
    if wrapped.get("evaluation") is not None and not isinstance(wrapped["evaluation"], (Evaluation, dict)):
        wrapped["evaluation"] = {"text": wrapped["evaluation"]}
    return wrapped


def prune(model: str | Path | nn.Module | None = None, config: PruneConfig | dict | None = None, *, tokenizer=None,
          in_place: bool = False, progress: bool = True, resume: bool = False, **fields) -> PruneResult:
    """Prune a model in one shot and say what it cost.

    model: Hub id, local folder, ``.gguf`` file, packaged name, or a live ``nn.Module`` (give its ``tokenizer`` unless
    calibration and evaluation are token ids). A live model is copied and stays untouched unless ``in_place``.
    resume: continue the interrupted run in the output folder after its last finished block, to the same result bit for
    bit; a folder with nothing in it starts from the beginning.
    config and ``**fields``: the fields of :class:`PruneConfig`.
    Returns a :class:`PruneResult`. Raises ConfigError for bad input before any work is done, OutputError if the output
    cannot be written, and :class:`pyprune.journal.Interrupted` when a signal stopped it between two blocks.
    """
    model = str(model) if isinstance(model, Path) else model
    if config is None and isinstance(model, str):
        fields.setdefault("model", model)
    config = make_config(config, fields if not isinstance(model, str) else {**fields, "model": model})
    if resume and config.output is None:
        raise ConfigError("resume=True would do nothing: a run without an output folder leaves nothing to go on with")
    with journaled(config.output, resume) as (world, journal):
        return _prune(model, config, tokenizer, in_place, progress and world.leads, journal, world)


def _prune(model, config: PruneConfig, tokenizer, in_place: bool, progress: bool, journal: Journal,
           world: distributed.World) -> PruneResult:
    clock = Clock()
    world.lead(lambda: journal.check_settings(settings_of(config)))
    seed_all(config.seed)
    weights, origin = Resident(), Origin()
    with clock("load"):
        if isinstance(model, nn.Module):
            check_finite(model.state_dict().items())
            live = model if in_place else copy.deepcopy(model)
            live.eval()
        else:
            if in_place:
                raise ConfigError("in_place=True would do nothing: only a live nn.Module can be pruned where it is")
            if config.model is None:
                raise ConfigError("no model: give a Hub id, a local folder, a .gguf file or a live nn.Module")
            checkpoint.resolve(config.model)  # one that is not there is refused before anything is said
            announce(f"loading {config.model}", progress)
            opened = open_model(config, world.same(journal.header.get("streamed")),
                                pin=pick_device(config.device).type == "cuda")
            live, weights, origin = opened.model, opened.weights, opened.origin
            tokenizer = opened.tokenizer if tokenizer is None else tokenizer
    view = weights.view if weights.streamed else ModelView(live)
    check_usable(view, weights.streamed)
    selected = select_weights(view, config.targets, config.ignore)
    check_weights(view, selected, config)
    check_apart(view)
    refuse_text(config.evaluation, view)
    positions, notes = positions_of(view), []
    with clock("calibration"):
        data = calibration_data(config, view, live, tokenizer, positions)
    with clock("evaluation"):
        texts = windows_of(config.evaluation, tokenizer, view.is_encoder, positions=positions, warn=notes.append)
    where = pick_device(config.device)
    with ops.backend(config.backend), clock("back-ends"):
        backends = world.same(world.lead(lambda: ops.settle(where.type, journal.header.get("backends"))))
    if config.output:
        with clock("load"):
            identity = {"settings": settings_of(config), "data": data_identity(data, texts),
                        "model": model_identity(live, weights.files.fingerprint() if weights.streamed else
                                                weights_digest(live.state_dict().items()))}
            world.lead(lambda: journal.begin(identity, len(view.blocks), streamed=weights.streamed, backends=backends))
            journal.entries, journal.notes = world.same((journal.entries, journal.notes))
            journal.total = len(view.blocks)
    if world.same(journal.complete):
        world.lead(journal.publish)
        return published(config, weights.streamed)
    store = make_store(config.memory_budget_gb, journal.folder, where)
    measured = Meter(texts, config.evaluation, where, store, world)
    with clock("evaluation"):
        dense = world.same(journal.kept("dense"))
        if dense is None:
            announce("measuring the dense model", progress and bool(texts))
            dense = measured(live, weights)
            world.lead(lambda: journal.keep("dense", dense))
    executor = Executor(view, device=where, compute_dtype=pick_dtype(config.compute_dtype),
                        batch_size=config.batch_size, weights=weights, store=store)
    executor.world = world
    run = Run(config, view, executor, selected, data, clock, journal, world)
    executor.warn = run.warn
    for text in [*origin.notes, *data.warnings, *thin_statistics(run), *notes]:
        run.warn(text)
    if config.evaluation.enabled and not texts and not view.is_encoder:
        run.warn("no perplexity: the text that it is measured on by default needs a tokenizer; pass tokenizer=, or "
                 "give token ids as evaluation text")
    models: dict[float, nn.Module] = {}
    if executor.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(executor.device)
    with Progress(len(view.blocks), enabled=progress) as bar, ops.backend(config.backend), \
            ops.pinned(backends), journal.interruptible(follow=world.size > 1):
        if config.is_structured:
            models = prune_structured(run, bar)
            live = list(models.values())[-1]
        else:
            prune_blocks(run, bar)
    if executor.device.type == "cuda":
        run.peak_device = torch.cuda.max_memory_allocated(executor.device)
    with clock("evaluation"):
        announce("measuring the pruned model", progress and bool(texts))
        pruned = measured(live, weights)
        for entry, member in zip((run.structured or {}).get("curve", []), models.values()):
            entry["evaluation"] = compared(dense, pruned if member is live else measured(member))
        curve = {f"pruned (sparsity {entry['sparsity']:g})": [{**row, "perplexity": row["pruned"]} for row in
                                                             entry["evaluation"]]
                 for entry in (run.structured or {}).get("curve", []) if "evaluation" in entry and len(models) > 1}
    for text in [*measured.notes, *(text for whose, rows in {"dense": dense, **(curve or {"pruned": pruned})}.items()
                                    for text in warnings_for(rows, whose))]:
        run.warn(text)
    report = {**build_report(run, live, dense, pruned), "backends": backends}
    if weights.streamed:
        result = StreamedResult(None, tokenizer, config, report, origin=origin)
        result.weights = weights
    else:
        result = PruneResult(live, tokenizer, config, report, models, origin)
    if config.output:
        with clock("write"):
            world.lead(lambda: journal.finish(result.fill))
    return result


def published(config: PruneConfig, streamed: bool) -> PruneResult:
    """The result of a run that had only its checkpoint left to move out."""
    if streamed:
        tokenizer = checkpoint.load_tokenizer(checkpoint.resolve(config.output))
        return StreamedResult(None, tokenizer, config, read_report(config.output))
    many = isinstance(config.sparsity, list)
    folders = {s: f"{config.output}/sparsity-{s:g}" if many else config.output for s in
               (config.sparsity if many else [config.sparsity])}
    loaded = {s: checkpoint.load(folder) for s, folder in folders.items()}
    last = list(loaded)[-1]
    return PruneResult(*loaded[last], config, read_report(folders[last]),
                       {s: found.model for s, found in loaded.items()} if many else {})


def make_store(budget_gb: float | None, folder: Path | None, device: torch.device) -> Store:
    """Activations in host memory within the budget, above it in files in ``folder``."""
    return Store(None if budget_gb is None else int(budget_gb * 1e9), folder, pin=device.type == "cuda")


def pick_dtype(name: str) -> torch.dtype | None:
    return None if name == "auto" else getattr(torch, name)


def check_weights(view: ModelView, selected: list[list[WeightRef]], config: PruneConfig) -> None:
    """Refuse what cannot be done to these blocks, before any work."""
    if config.is_structured:
        refuse_shared(view, config.pattern)
    for i, (block, refs) in enumerate(zip(view.blocks, selected)):
        for ref in refs:
            weight = ref.view(block)
            if config.nm and weight.shape[1] % config.nm[1]:
                raise ConfigError(f"pattern {config.pattern} does not divide the {weight.shape[1]} inputs of "
                                  f"{view.name(i, ref)}; choose another pattern or ignore that weight")


def calibration_data(config: PruneConfig, view: ModelView, model: nn.Module, tokenizer,
                     positions: Positions | None) -> calibration.CalibrationData:
    """The sequences of a run; none where the weights alone decide and nothing could be read to measure errors on."""
    settings, decides = config.calibration, needs_sequences(config)
    if not reads_sequences(config) or (not decides and settings.source is None and tokenizer is None):
        data = calibration.CalibrationData(sequences=[], fingerprint=calibration.fingerprint([]),
                                           description="none: masks come from the weights alone")
        if reads_sequences(config):
            data.warnings.append("block errors were not measured: the text that they are measured on by default needs "
                                 "a tokenizer; pass tokenizer=, or give token ids as calibration")
        return data
    data = calibration.load(settings, tokenizer, encoder=view.is_encoder, model_config=model.config,
                            vocab_size=model.get_input_embeddings().num_embeddings, measures=watches(config))
    if positions:
        positions.check(lengths_of(data, calibration.coerce(settings)), "calibration sequences", "seq_len",
                        data.warnings.append)
    if settings.self_generated:
        add_generated(data, settings, model, tokenizer)
    return data


def thin_statistics(run: Run) -> list[str]:
    """A sentence if there are fewer calibration tokens than a matrix has inputs: their Gram has not full rank."""
    if run.config.is_structured or not needs_sequences(run.config):
        return []  # structured repair weighs tokens against columns itself
    tokens, found = sum(map(len, run.data.sequences)), []
    for i, (block, refs) in enumerate(zip(run.view.blocks, run.selected)):
        widths = {ref.path: (ref.view(block).shape[1], ref) for ref in refs}
        found += [(width, run.view.name(i, ref)) for width, ref in widths.values() if width > tokens]
    if not found:
        return []
    width, name = max(found, key=lambda item: item[0])
    more = f" and of {len(found) - 1} more matrices" if len(found) > 1 else ""
    return [f"{tokens} calibration tokens are fewer than the {width} inputs of {name}{more}: what is chosen there "
            "rests on too little data; give more or longer sequences"]


def lengths_of(data: calibration.CalibrationData, settings: Calibration) -> list[int]:
    """Tokens of all sequences, those still to be generated too."""
    return [len(row) for row in data.sequences + data.held_out] + [settings.tokens] * bool(settings.self_generated)


def add_generated(data: calibration.CalibrationData, settings: Calibration, model: nn.Module, tokenizer) -> None:
    """Sequences sampled from the dense model join the corpus samples, or wait for the reconstruction."""
    from pyprune.generate import generate

    calibration.need_tokenizer(tokenizer, "self-generated calibration")
    settings = calibration.coerce(settings)
    sequences = generate(model, tokenizer, settings.self_generated, seq_len=settings.seq_len, seed=settings.seed,
                         language=settings.language, path=settings.self_generated_path)
    data.description += f"; {len(sequences)} self-generated sequences of {settings.seq_len} tokens"
    if len(calibration.bos_prefix(tokenizer)):
        data.warnings.append(f"the self-generated sequences do not begin with {tokenizer.bos_token!r}, with which the "
                             "tokenizer starts every text: they are drawn from a random first token")
    if settings.self_generated_for == "all":
        data.sequences = data.sequences + sequences
        data.fingerprint = calibration.fingerprint(data.sequences)
    else:
        data.generated = sequences
        data.description += " for the reconstruction"


def prune_blocks(run: Run, bar: Progress) -> None:
    """Unstructured and N:M pruning, block by block, in place on the run's model; finished blocks are journaled, and
    those of an interrupted run only run again, to bring the activations to where it stopped."""
    config, executor, clock, journal = run.config, run.executor, run.clock, run.journal
    with clock("forward"):
        fit = executor.embed(run.data.sequences, shared=True) if needs_sequences(config) else None
        probes = make_probes(run)
        refiner = Refiner(run, fit, probes) if wanted(config) else None
    last = len(run.view.blocks) - 1
    done = len(journal.entries)
    run.warnings += journal.notes
    for index in range(last + 1):
        started = time.perf_counter()
        seed_all(config.seed + index)
        with executor.compute(index) as module, torch.no_grad():
            enter_block(run, index, module, probes)
            if index < done:
                if fit is not None and config.inputs == "dense" and index < last:
                    with clock("forward"):
                        executor.run(index, module, fit, fit)
                if refiner:
                    refiner.dense(index, module, training=False)
                restore_block(run, index, module, refiner)
                bar.update(phase="resume")
            else:
                solve_block(run, bar, index, module, fit, probes, refiner)
            bar.update(phase="propagate")
            with clock("forward"):
                if refiner:
                    refiner.advance(index, module)
                elif fit is not None and config.inputs == "propagated" and index < last:
                    executor.run(index, module, fit, fit)
            with clock("probe"):
                for probe in [] if refiner else probes:
                    executor.run(index, module, probe.student, probe.student)
        if index >= done:
            run.blocks.append({**block_row(index, probes, started), **(refiner.row(index) if refiner else {})})
            commit_block(run, index)
        leave_block(run, bar, index, settled_by(run, index, refiner))
    if refiner:
        refiner.finish()


def solve_block(run: Run, bar: Progress, index: int, module: nn.Module, fit: Activations | None,
                probes: list[Probe], refiner: Refiner | None = None) -> None:
    """Statistics, masks and new weights of one block, and their way to the disk begun."""
    refs, config = run.selected[index], run.config
    inputs = []
    if refs:
        with run.clock("probe"):
            inputs = [observe(run.executor, index, module, refs, probe.student, lambda c, d: Inputs())
                      for probe in probes]
    observer = None
    if fit is not None and (refs or config.inputs == "dense"):
        bar.update(phase="statistics")
        with run.clock("forward"):
            observer = gather(run, index, module, refs, fit, **(refiner.beside(index) if refiner else {}))
    if refiner:
        bar.update(phase="dense targets")
        with run.clock("forward"):
            refiner.dense(index, module, gathered=observer is not None)
        original = {ref: ref.view(run.view.blocks[index]).clone() for ref in refs}
    bar.update(phase="solve")
    with run.clock("solve"):
        masks = prune_block(run, index, module, observer, inputs)
    if refiner:
        bar.update(phase="reconstruct")
        with run.clock("reconstruct"):
            refiner.refine(index, module, original, masks)
    write_block(run, index, refiner)
