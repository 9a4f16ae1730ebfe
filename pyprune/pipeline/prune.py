"""One run of :func:`prune`: open the model, measure it, prune it block by block, measure it again, report and write."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from pyprune import ops
from pyprune.config import Calibration, ConfigError, Evaluation, PruneConfig, is_function, override
from pyprune.data import calibration, texts
from pyprune.data.self_generated import generate
from pyprune.effects import needs_sequences, reads_sequences, watches
from pyprune.evaluation import domains
from pyprune.evaluation.block_by_block import Meter
from pyprune.evaluation.perplexity import refuse_text, warnings_for, windows_of
from pyprune.execution import distributed
from pyprune.execution.activation_store import Store
from pyprune.execution.device import pick_device, pick_dtype
from pyprune.execution.executor import Executor, Resident
from pyprune.execution.journal import Journal, journaled
from pyprune.execution.progress import Doing, Progress
from pyprune.execution.residency import resident
from pyprune.execution.run import Findings, Run, seed_all
from pyprune.execution.unopened import Unopened
from pyprune.execution.weight_streaming import Opened, Streamed
from pyprune.keywords import nested
from pyprune.model import checkpoint
from pyprune.model.assembly import BlockShards
from pyprune.model.attributes import begin_text, positions_named, token_embedding, vocabulary_size
from pyprune.model.blocks import (
    ModelView,
    WeightRef,
    check_apart,
    check_finite,
    check_usable,
    refuse_shared,
    select_weights,
)
from pyprune.model.origin import Origin
from pyprune.model.positions import Positions, positions_of
from pyprune.packed.loading import opened
from pyprune.pipeline.block_loop import Loop, run_blocks
from pyprune.pipeline.mask_work import MaskWork
from pyprune.pipeline.opening import open_model
from pyprune.pipeline.result import PruneResult, StreamedResult
from pyprune.pipeline.shared import Shared
from pyprune.pipeline.sparsities import Rules, by_name, check_patterns, check_removes, kinds_for
from pyprune.pipeline.structured_work import StructuredWork
from pyprune.pipeline.tracking import Track, nobody, outcome, tracker
from pyprune.reporting.comparison import read as read_report
from pyprune.reporting.record import build_report, compared, config_for_report, data_identity, settings_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from pyprune.keywords import Fields

T = TypeVar("T")


def make_config(config: PruneConfig | dict | str | Path | None, fields: Mapping[str, Any]) -> PruneConfig:
    """Configuration from an object, a mapping or the path of a ``run.yaml``, plus settings by their keywords.

    ``calibration=`` and ``evaluation=`` also take their source directly (a path, texts, token ids), and ``evaluation=``
    takes False.
    """
    base = override(None, given_sections(config)) if isinstance(config, Mapping) else config
    if base is not None and not isinstance(base, (PruneConfig, str, Path)):
        raise ConfigError(
            f"config must be a PruneConfig, a mapping or the path of a run.yaml, got {type(base).__name__}"
        )
    found = override(base, given_sections(fields))
    if isinstance(found.criterion, str) and is_function(found.criterion):
        raise ConfigError(
            f"the criterion {found.criterion} was a function in memory when this configuration was written; pass it "
            "again, as the criterion of pyprune.prune in Python"
        )
    found.calibration = calibration.settled(found.calibration)
    return found


def given_sections(fields: Mapping[str, Any], paths: Iterable[str] | None = None) -> dict[str, Any]:
    """Settings by keyword, in the sections they belong to. paths: of the fields that are taken; None: all of a run."""
    whole = {
        "calibration": calibration.named,
        "evaluation": _evaluation_of,
        "reconstruction": lambda value: value,
        "structured": lambda value: value,
    }
    return nested(fields, paths, whole=whole)


def _evaluation_of(given: Any) -> Evaluation | dict:
    """What callers pass for an evaluation, as an :class:`Evaluation` or a mapping of its fields."""
    if isinstance(given, (Evaluation, dict)):
        return given
    return {"enabled": given} if isinstance(given, bool) else {"text": given}


def prune(
    model: str | Path | nn.Module | PruneResult | checkpoint.Loaded | None = None,
    config: PruneConfig | dict | str | Path | None = None,
    *,
    tokenizer: Any = None,
    in_place: bool = False,
    progress: bool = True,
    track: Track | str | None = None,
    resume: bool = False,
    **fields: Unpack[Fields],
) -> PruneResult:
    """Prune a model in one shot and say what it cost.

    model: Hub id, local folder, ``.gguf`` file, packaged name, or a live ``nn.Module`` (give its ``tokenizer`` unless
    calibration and evaluation are token ids). A live model is copied and stays untouched unless ``in_place``. What
    :func:`pyprune.load` or an earlier run returned is taken as the live model in it.
    resume: continue the interrupted run in the output folder after its last finished block, to the same result bit for
    bit; a folder with nothing in it starts from the beginning.
    track: called with (block, scalars by name) after each block, and at the end with the perplexities; or
    ``"tensorboard:FOLDER"``.
    config: a :class:`PruneConfig`, a mapping of its fields, or the path of a ``run.yaml``. ``**fields``: any setting
    of a run by the name of its option (``num_samples=``, ``epochs=``, ``text=``), those of ``config`` overridden.
    ``calibration`` and ``evaluation`` take their settings or just the text, in any form: a path, a Hub data set, a
    string, texts, token ids, a tokenizer's output, a ``datasets.Dataset``, a ``DataLoader``; ``evaluation=False``
    measures nothing. ``criterion`` also takes a function from a :class:`~pyprune.structured.criteria.Scored` to scores
    ``[units]``, higher is kept.
    Returns a :class:`PruneResult`. Raises ConfigError for bad input before any work is done, OutputError if the output
    cannot be written, and :class:`pyprune.execution.journal.Interrupted` when a signal stopped it between two blocks.
    """
    if not isinstance(model, (str, Path, nn.Module, type(None))):
        model, tokenizer = opened(model, tokenizer)
    model = str(model) if isinstance(model, Path) else model
    config = make_config(config, {**fields, "model": model} if isinstance(model, str) else fields)
    if resume and config.output is None:
        raise ConfigError("resume=True would do nothing: a run without an output folder leaves nothing to go on with")
    with (
        journaled(config.output, resume) as (world, journal),
        contextlib.ExitStack() as held,
        tracker(track, world.leads) as told,
    ):
        shown = progress and world.leads
        return _prune(model, config, tokenizer, in_place, shown, journal, world, Shared(), held, told)


def prune_copy(opened: Opened, config: PruneConfig, shared: Shared, progress: bool = True) -> PruneResult:
    """:func:`prune` of a copy of a model that several runs start from, the result in memory; what they have in common
    is worked out once. The model must be whole."""
    with journaled(None, False) as (world, journal), contextlib.ExitStack() as held:
        return _prune(opened, config, opened.tokenizer, False, progress and world.leads, journal, world, shared, held)


def _prune(
    model,
    config: PruneConfig,
    tokenizer,
    in_place: bool,
    progress: bool,
    journal: Journal,
    world: distributed.World,
    shared: Shared,
    held: contextlib.ExitStack,
    track: Track = nobody,
) -> PruneResult:
    """The run; what it enters ``held`` with lasts until the result is written."""
    found, device = Findings(), pick_device(config.device)
    world.lead(lambda: journal.check_settings(settings_of(config)))
    if (absent := ops.check_backend(config.backend, device.type)) is not None:
        found.warn(absent)
    seed_all(config.seed)
    texts.check_there(config.calibration.source if reads_sequences(config) else None)
    texts.check_there(config.evaluation.text if config.evaluation.enabled else None)
    data = windows = None
    if not isinstance(model, (nn.Module, Opened)):
        with found.clock("load"), Doing(f"reading the configuration of {config.model}", progress, said=False):
            outline, early = outlined(config, tokenizer)
        if outline is not None:
            data, windows = sequences_of(config, outline, early, named_positions(outline), found, progress, shared)
    with found.clock("load"):
        opened = _open(model, config, tokenizer, in_place, progress, world.same(journal.header.get("streamed")), device)
    view, tokenizer = opened.view, opened.tokenizer
    check_usable(view, opened.weights.streamed)
    selected = select_weights(view, config.targets, config.ignore)
    check_apart(view)
    selected, rules = by_name(view, selected, config, kinds_for(view, config, opened.weights))
    check_weights(view, selected, config, rules)
    refuse_text(config.evaluation, view)
    positions = positions_of(view)
    if data is None or windows is None:
        data, windows = sequences_of(config, view, tokenizer, positions, found, progress, shared)
    check_lengths(config, data, windows, positions, found.warn)
    if config.calibration.self_generated and needs_sequences(config):
        own = config.calibration.self_generated
        with found.clock("calibration"), Doing(f"sampling {own} sequences from the model", progress) as doing:
            shared.once(
                f"generated for {shared.sequences(config)}",
                functools.partial(add_generated, data, config.calibration, view.model, tokenizer, doing),
            )
    with found.clock("back-ends"), Doing("checking and timing the back-ends of this machine", progress, said=False):
        backends = settle_backends(journal, world, device, config.backend, config.backends, found.warn)
    if config.output:
        with found.clock("load"):
            identity = {
                "settings": settings_of(config),
                "data": data_identity(data, [text.windows for text in windows]),
                "model": opened.identity(),
            }
            begin(
                journal,
                world,
                identity,
                len(view.blocks),
                streamed=opened.weights.streamed,
                backends=backends,
                config=config_for_report(config),
            )
    if world.same(journal.complete):
        world.lead(journal.publish)
        return published(config, opened.weights)
    home = next(view.model.parameters()).device
    if not opened.weights.streamed:
        with found.clock("load"):
            held.enter_context(resident(view.model, device, models_held(config)))
    held.enter_context(ops.pinned(backends))
    found.clock.follow(device)
    store = make_store(config.memory_budget_gb, journal.folder if journal.keeps else None, device)
    measured = Meter(windows, config.evaluation, device, store, world)
    with found.clock("evaluation"):
        dense = kept(
            journal,
            world,
            "dense",
            lambda doing: shared.once(
                shared.dense(config, windows), lambda: measured(view.model, opened.weights, doing)
            ),
            "measuring the dense model",
            progress and bool(windows),
        )
    executor = Executor(
        view,
        device=device,
        compute_dtype=pick_dtype(config.compute_dtype),
        batch_size=config.batch_size,
        weights=opened.weights,
        store=store,
        world=world,
        warn=found.warn,
    )
    run = Run(config, view, executor, selected, data, world, rules)
    for text in [*opened.origin.notes, *data.warnings, *thin_statistics(run), *unmeasured(config, view, windows)]:
        found.warn(text)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with (
        Progress(len(view.blocks), enabled=progress, afterwards=again(dense, config)) as bar,
        journal.interruptible(follow=world.size > 1),
    ):
        bar.update(phase="preparing")
        work = kind_of(config)(run, found, journal)
        run_blocks(Loop(executor, journal, found, world, config.seed, config.output, track), work, bar)
    peak_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    models, structured = work.models(), work.entry()
    live = list(models.values())[-1]
    with found.clock("evaluation"):
        pruned = {}
        for sparsity, member in models.items():
            which = "the pruned model" + (f", sparsity {sparsity:g}" if len(models) > 1 else "")
            with Doing(f"measuring {which}", progress and bool(windows)) as doing:
                pruned[sparsity] = measured(member, opened.weights, doing)
    for entry in (structured or {}).get("curve", []):
        entry["evaluation"] = compared(dense, pruned[entry["sparsity"]])
        entry["generalisation"] = domains.generalisation(entry["evaluation"])
    rows = {
        "dense": dense,
        **{
            "pruned" if len(models) == 1 else f"pruned (sparsity {sparsity:g})": found_rows
            for sparsity, found_rows in pruned.items()
        },
    }
    evaluation = compared(dense, list(pruned.values())[-1])
    gap = domains.generalisation(evaluation)
    for text in [
        *measured.notes,
        *(text for whose, row in rows.items() for text in warnings_for(row, whose)),
        *domains.gap_warning(gap),
    ]:
        found.warn(text)
    track(len(view.blocks), outcome(evaluation))
    report = build_report(run, found, live, evaluation, gap, work.coverage(), structured, peak_device, backends)
    report["model"] |= known_of_dense(config.model, opened.origin)
    if isinstance(opened.weights, Streamed):
        result: PruneResult = StreamedResult(opened.weights, tokenizer, config, report, opened.origin)
    else:
        result = PruneResult(live, tokenizer, config, report, models if structured else {}, opened.origin)
    if config.output:
        with found.clock("write"), Doing(f"writing {config.output}", progress, said=False):
            world.lead(
                lambda: journal.finish(lambda folder: result.fill(folder, BlockShards(view.path, journal.shards())))
            )
    for member in models.values() if len(models) > 1 else ():  # they were made beside the model, where it was
        held.callback(member.to, home)
    return result


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


def _open(
    model, config: PruneConfig, tokenizer, in_place: bool, progress: bool, streamed: bool | None, device: torch.device
) -> Opened:
    """The model of a run: the live one or a copy of it, a copy of one that is open already, or the one that the
    configuration names."""
    if isinstance(model, Opened):
        own = copy.deepcopy(model.model)
        return dataclasses.replace(model, model=own, view=ModelView(own))
    if isinstance(model, nn.Module):
        check_finite(model.state_dict().items())
        live = (model if in_place else copy.deepcopy(model)).eval()
        return Opened(live, tokenizer, Resident(), ModelView(live))
    if in_place:
        raise ConfigError("in_place=True would do nothing: only a live nn.Module can be pruned where it is")
    with Doing(f"loading {config.model}", progress):
        opened = open_model(config, streamed, pin=device.type == "cuda")
    return opened if tokenizer is None else dataclasses.replace(opened, tokenizer=tokenizer)


def settle_backends(
    journal: Journal,
    world: distributed.World,
    device: torch.device,
    asked: str = "auto",
    repeated: dict | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> dict:
    """The back-end that each op takes in this run, the same in all processes: :func:`pyprune.ops.settle`."""

    def settled() -> dict:
        return ops.settle(device.type, journal.header.get("backends"), asked, repeated, warn)

    return world.same(world.lead(settled) or {})


def begin(journal: Journal, world: distributed.World, identity: dict, blocks: int, **header) -> None:
    """Record in the journal what this run is, or compare it with the interrupted one; all processes know its steps."""
    world.lead(lambda: journal.begin(identity, blocks, **header))
    journal.entries, journal.notes = world.same((journal.entries, journal.notes))
    journal.total = blocks


def kept(
    journal: Journal,
    world: distributed.World,
    name: str,
    work: Callable[[Doing], T],
    doing: str,
    progress: bool,
    label: str = "pruning",
) -> T:
    """What an interrupted run worked out under this name, else ``work()``, kept for the next."""
    value = world.same(journal.kept(name))
    if value is None:
        with Doing(doing, progress, label) as said:
            value = work(said)
        world.lead(lambda: journal.keep(name, value))
    return value


def outlined(config: PruneConfig, tokenizer: Any) -> tuple[ModelView | None, Any]:
    """A named model without its weights, checked as far as it can be, and its tokenizer; None where they take about as
    long to read as the weights do.

    Raises ConfigError before any weight is read.
    """
    if config.model is None:
        raise ConfigError("no model: give a Hub id, a local folder, a .gguf file or a live nn.Module")
    source = checkpoint.resolve(config.model)
    if checkpoint.structured_sizes(source):
        return None, None
    view = Unopened(config.model, config.dtype).view
    selected = select_weights(view, config.targets, config.ignore)
    check_patterns(view, selected, config)
    check_weights(view, selected, config)
    refuse_text(config.evaluation, view)
    if source.gguf_file:
        if reads_sequences(config):
            calibration.check_size(config.calibration)
        return None, None
    with checkpoint.loading(config.model):
        return view, tokenizer or checkpoint.load_tokenizer(source)


def named_positions(view: ModelView) -> Positions | None:
    """Positions of a model without weights, as its configuration names them."""
    count = positions_named(view.model.config)
    if count is None:
        return None
    words = token_embedding(view.model).weight
    outside = [
        p for name, p in view.model.named_parameters() if not name.startswith(f"{view.path}.") and p is not words
    ]
    table = any(p.ndim == 2 and count <= p.shape[0] <= count + 2 for p in outside)
    return Positions(type(view.model).__name__, count, table)


def sequences_of(
    config: PruneConfig,
    view: ModelView,
    tokenizer: Any,
    positions: Positions | None,
    found: Findings,
    progress: bool,
    shared: Shared,
) -> tuple[calibration.CalibrationData, list]:
    """Calibration sequences of a run, those still to be generated apart, and its evaluation windows."""
    with found.clock("calibration"), Doing("reading calibration text", progress, said=False):
        data = shared.once(shared.sequences(config), lambda: calibration_data(config, view, tokenizer))
    with found.clock("evaluation"), Doing("reading evaluation text", progress, said=False):
        windows = windows_of(
            domains.of_run(config.evaluation, config.calibration),
            config.evaluation,
            tokenizer,
            view.is_encoder,
            unseen=data.unseen,
            vocab_size=vocabulary_size(view.model),
            positions=positions,
            warn=found.warn,
        )
    check_lengths(config, data, windows, positions)
    return data, windows


def check_lengths(
    config: PruneConfig,
    data: calibration.CalibrationData,
    windows: list,
    positions: Positions | None,
    warn: Callable[[str], None] = lambda message: None,
) -> None:
    """Refuse sequences and windows that a model's table of positions does not hold, warn of what exceeds others."""
    if not positions:
        return
    if data.sequences:
        lengths = lengths_of(data, calibration.coerce(config.calibration))
        positions.check(lengths, "calibration sequences", "seq_len", warn)
    positions.check({len(row) for text in windows for row in text.windows}, "evaluation windows", "window", warn)


def again(dense: list[dict], config: PruneConfig) -> float:
    """Seconds that measuring the pruned models will take, if they are as fast as the dense one."""
    return sum(row.get("seconds", 0.0) for row in dense) * len(config.sparsities)


def unmeasured(config: PruneConfig, view: ModelView, texts: list) -> list[str]:
    """A sentence if perplexity was to be measured and cannot be."""
    if not config.evaluation.enabled or texts or view.is_encoder:
        return []
    return [
        "no perplexity: the text that it is measured on by default needs a tokenizer; pass tokenizer=, or give "
        "token ids as evaluation text"
    ]


def published(config: PruneConfig, weights: Resident) -> PruneResult:
    """The result of a run that had only its checkpoint left to move out."""
    if isinstance(weights, Streamed):
        tokenizer = checkpoint.load_tokenizer(checkpoint.resolve(config.output_folder))
        return StreamedResult(weights, tokenizer, config, read_report(config.output_folder))
    output = config.output_folder
    if not isinstance(config.sparsity, tuple):
        return PruneResult(*checkpoint.load(output), config, read_report(output))
    folders = {s: f"{output}/sparsity-{s:g}" for s in config.sparsity}
    loaded = {s: checkpoint.load(folder) for s, folder in folders.items()}
    last = list(loaded)[-1]
    models = {s: found.model for s, found in loaded.items()}
    return PruneResult(*loaded[last], config, read_report(folders[last]), models)


def make_store(budget_gb: float | None, folder: Path | None, device: torch.device) -> Store:
    """Activations in host memory within the budget, above it in files in ``folder``."""
    return Store(None if budget_gb is None else int(budget_gb * 1e9), folder, pin=device.type == "cuda")


def check_weights(
    view: ModelView, selected: list[list[WeightRef]], config: PruneConfig, rules: Rules | None = None
) -> None:
    """Refuse what cannot be done to these blocks, before any work. rules: where there are sparsities by name, the key
    of each weight; None if they are not resolved yet."""
    if config.is_structured:
        refuse_shared(view, config.pattern)
    elif config.nm is None and (rules or not config.sparsity_by_name):
        check_removes(view, selected, config, rules)
    if config.nm is None:
        return
    group = config.nm[1]
    for i, (block, refs) in enumerate(zip(view.blocks, selected)):
        known: set[str] = set()
        for ref in refs:
            if ref.path in known:
                continue  # experts of one tensor are alike
            known.add(ref.path)
            columns = ref.view(block).shape[1]
            if columns % group:
                raise ConfigError(
                    f"pattern {config.pattern} does not divide the {columns} inputs of "
                    f"{view.name(i, ref)}; choose another pattern or ignore that weight"
                )


def calibration_data(
    config: PruneConfig,
    view: ModelView,
    tokenizer,
) -> calibration.CalibrationData:
    """The sequences of a run; none where the weights alone decide and nothing could be read to measure errors on."""
    settings, decides, model = config.calibration, needs_sequences(config), view.model
    if not reads_sequences(config) or (not decides and settings.source is None and tokenizer is None):
        data = calibration.CalibrationData(
            sequences=[], fingerprint=calibration.fingerprint([]), description="none: masks come from the weights alone"
        )
        if reads_sequences(config):
            data.warnings.append(
                "block errors were not measured: the text that they are measured on by default needs "
                "a tokenizer; pass tokenizer=, or give token ids as calibration"
            )
        return data
    return calibration.load(
        settings,
        tokenizer,
        encoder=view.is_encoder,
        model_config=model.config,
        vocab_size=vocabulary_size(model),
        measures=watches(config),
    )


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
    return [
        f"{tokens} calibration tokens are fewer than the {width} inputs of {name}{more}: what is chosen there "
        "rests on too little data; give more or longer sequences"
    ]


def lengths_of(data: calibration.CalibrationData, settings: Calibration) -> list[int]:
    """Tokens of all sequences, those still to be generated too."""
    return [len(row) for row in data.sequences + data.held_out] + [settings.tokens] * bool(settings.self_generated)


def add_generated(
    data: calibration.CalibrationData,
    settings: Calibration,
    model: nn.Module,
    tokenizer,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Sequences sampled from the dense model join the corpus samples, or wait for the reconstruction."""
    calibration.need_tokenizer(tokenizer, "self-generated calibration")
    settings = calibration.coerce(settings)
    sequences = generate(
        model,
        tokenizer,
        settings.self_generated,
        seq_len=settings.tokens,
        seed=settings.seed or 0,
        language=settings.language,
        path=settings.self_generated_path,
        progress=progress,
    )
    data.description += f"; {len(sequences)} self-generated sequences of {settings.seq_len} tokens"
    if len(calibration.bos_prefix(tokenizer)):
        data.warnings.append(
            f"the self-generated sequences do not begin with {begin_text(tokenizer)!r}, with which "
            "the tokenizer starts every text: they are drawn from a random first token"
        )
    data.sampled = sequences
    if settings.self_generated_for == "all":
        data.sequences = data.sequences + sequences
        data.fingerprint = calibration.fingerprint(data.sequences)
    else:
        data.generated = sequences
        data.description += " for the reconstruction"
