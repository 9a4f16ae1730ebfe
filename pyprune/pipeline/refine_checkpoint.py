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
from pyprune.config import (
    SECTIONS,
    STREAMING,
    Calibration,
    ConfigError,
    Evaluation,
    Reconstruction,
    Unused,
    check_backends,
    check_dtype,
    dtype_name,
    from_dict,
    read_yaml,
    to_dict,
)
from pyprune.data.texts import check_there
from pyprune.evaluation import domains
from pyprune.evaluation.block_by_block import Meter
from pyprune.evaluation.gain import dense_of
from pyprune.evaluation.perplexity import refuse_text, warnings_for, windows_of
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
from pyprune.pipeline.refine import sequences_for
from pyprune.pipeline.refine_work import RefineWork
from pyprune.pipeline.session import begin, kept, make_store, settle_backends
from pyprune.pipeline.tracking import Track, outcome, tracker
from pyprune.reporting.card import model_card
from pyprune.reporting.comparison import read as read_report
from pyprune.reporting.record import (
    CALIBRATION_PLACES,
    compared,
    data_identity,
    named_calibration,
    named_evaluation,
    yaml_text,
)
from pyprune.reporting.rendering import distinct, perplexity_text, source_text, windows_text
from pyprune.reporting.run_page import write_run_page
from pyprune.sources import in_memory, split

LABEL = "refining"
RECORD = "refinement.json"
"""How a checkpoint was refined, and what it gained."""
RECIPE = "refine.yaml"
"""What repeats the refinement."""
CARRIED = ("pruning.json", "run.yaml")
"""Files of a pyprune checkpoint that stay as they are: how it was pruned, and the sizes its config cannot say."""


@dataclass(kw_only=True)
class Request:
    """All settings of one refinement of a checkpoint. Raises ConfigError for a value that is none of those known."""

    model: str
    """Folder of the pruned model."""
    output: str
    dense: str = ""
    """The model that the checkpoint was pruned from; empty takes what its ``pruning.json`` names."""
    calibration: Calibration = field(default_factory=Calibration)
    evaluation: Evaluation = field(default_factory=Evaluation)
    reconstruction: Reconstruction = field(default_factory=Reconstruction)
    cross_block: bool = False
    global_propagation: bool = True
    dtype: str = "auto"
    compute_dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    packed: bool = False
    """Write the checkpoint without its zeros, as :func:`pyprune.pack` does."""
    stream: str = "auto"
    """Whether the blocks of either model are read from their files one after the other, as in
    :class:`pyprune.PruneConfig`; ``always`` asks for both."""
    memory_budget_gb: float | None = None
    """Host memory for activations, in GB."""
    backends: dict[str, dict[str, str]] | None = None
    """The back-ends that the refinement took which this one repeats, as in :class:`pyprune.PruneConfig`."""

    def __post_init__(self):
        for name in ("dtype", "compute_dtype"):
            setattr(self, name, check_dtype(getattr(self, name), name))
        if self.stream not in STREAMING:
            raise ConfigError(f"stream must be one of {', '.join(STREAMING)}, got {self.stream!r}")
        check_backends(self.backends)
        self.dense = self.dense or dense_of(self.model, "--dense")

    def asked(self) -> dict:
        """What decides the result, as plain data."""
        names = ("cross_block", "global_propagation", "seed", "dtype", "compute_dtype", "packed")
        return {
            **{name: getattr(self, name) for name in names},
            "settings": to_dict(self.reconstruction),
            "calibration": to_dict(named_calibration(self.calibration)),
        }

    def identity(self) -> dict:
        """The same, but for where the data lie: they have fingerprints."""
        asked = self.asked()
        kept = {key: value for key, value in asked["calibration"].items() if key not in CALIBRATION_PLACES}
        return {**asked, "calibration": kept, "evaluation": {"dtype": self.evaluation.dtype}}

    def record(self) -> dict:
        """All fields as plain data; what was given in memory stands there as its kind and a fingerprint."""
        sections = {
            "calibration": named_calibration(self.calibration),
            "evaluation": named_evaluation(self.evaluation),
        }
        return to_dict({**vars(self), **sections})

    @property
    def repeatable(self) -> bool:
        """Whether every text has a name, so that the record alone repeats the refinement."""
        texts = [
            *split(named_calibration(self.calibration).source),
            *split(named_evaluation(self.evaluation).text),
            *split(named_evaluation(self.evaluation).off_domain),
        ]
        return not any(in_memory(text) for text in texts if text is not None)


def requested(config: str | Path | Mapping | None, values: Mapping[str, Any]) -> Request:
    """The request in a ``refine.yaml``, or in a mapping of its fields, with other values put in their places.

    A section of ``values`` is a finished one or a mapping of the fields to override. Raises ConfigError for a field
    that is unknown or would do nothing; one that only the record has, and that does nothing beside ``values``, returns
    to its default.
    """
    base = read_yaml(config) if isinstance(config, (str, Path)) else dict(config or {})
    given = {name: value for name, value in values.items() if value is not None}
    merged = {**base, **given}
    if not merged.get("model"):
        raise ConfigError(f"no pruned model: name its folder, or a {RECIPE} with --config")
    if not merged.get("output"):
        raise ConfigError("no output folder: name one with -o")
    for name in ("dtype", "compute_dtype"):
        merged[name] = dtype_name(merged.get(name, "auto"))
    for name in ("calibration", "evaluation", "reconstruction"):
        if not isinstance(given.get(name, {}), SECTIONS[name]):
            merged[name] = _section(name, base.get(name) or {}, given.get(name, {}))
    return from_dict(Request, merged, RECIPE)


def _section(name: str, base: dict, given: dict):
    """A section of the base with the given fields; of the base, fields that then do nothing return to their default."""
    merged = {**base, **given}
    while True:
        try:
            return from_dict(SECTIONS[name], merged, name)
        except Unused as error:
            field = error.field.rpartition(".")[2]
            if field in given or field not in merged:
                raise
            del merged[field]


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
    for name in (request.model, request.dense):
        checkpoint.resolve(name)
    for source in (request.calibration.source, request.evaluation.text if request.evaluation.enabled else None):
        check_there(source)
    with journaled(request.output, resume) as (world, journal), tracker(track, world.leads) as told:
        world.lead(lambda: journal.check_settings(request.identity()))
        return _refine(request, world, journal, progress and world.leads, told)


def _refine(request: Request, world: World, journal: Journal, progress: bool, track: Track) -> dict:
    """Open both models, measure them, refine one, measure it again, write it."""
    started, found = time.perf_counter(), Findings()
    where, dtype = pick_device(request.device), pick_dtype(request.compute_dtype)
    header, pin = world.same(journal.header), where.type == "cuda"
    with found.clock("load"), Doing(f"loading {request.model} and {request.dense}", progress, LABEL):
        pruned = open_checkpoint(request.model, request.dtype, request.stream, None, header.get("streamed"), pin)
        dense = open_checkpoint(
            request.dense,
            request.dtype,
            request.stream,
            samples_itself(request.calibration),
            header.get("dense_streamed"),
            pin,
        )
    tokenizer = pruned.tokenizer or dense.tokenizer
    with found.clock("calibration"), Doing("making calibration sequences", progress, LABEL, said=False) as doing:
        data = sequences_for(
            pruned.view, dense.view, request.calibration, tokenizer, request.reconstruction, request.seed, doing
        )
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
    with Doing("checking and timing the back-ends of this machine", progress, LABEL, said=False):
        backends = settle_backends(journal, world, where, repeated=request.backends, warn=found.warn)
    identity = {
        "settings": request.identity(),
        "data": data_identity(data, [text.windows for text in texts]),
        "model": pruned.identity(),
        "dense": dense.identity(),
    }
    begin(
        journal,
        world,
        identity,
        len(pruned.view.blocks),
        streamed=pruned.weights.streamed,
        dense_streamed=dense.weights.streamed,
        backends=backends,
        config=request.record(),
    )
    if world.same(journal.complete):
        world.lead(journal.publish)
        return json.loads((Path(request.output).expanduser() / RECORD).read_text())
    found.warnings += [*pruned.origin.notes, *data.warnings]
    store = make_store(request.memory_budget_gb, journal.folder if journal.keeps else None, where)
    meter = Meter(texts, request.evaluation, where, store, world)
    with found.clock("evaluation"):
        measured = kept(
            journal,
            world,
            "measured",
            lambda doing: {
                name: meter(one.model, one.weights, doing) for name, one in (("dense", dense), ("pruned", pruned))
            },
            Doing("measuring the dense and the pruned model", progress and bool(texts), LABEL),
        )
    executors = [
        Executor(
            one.view, device=where, compute_dtype=dtype, weights=one.weights, store=store, world=world, warn=found.warn
        )
        for one in (pruned, dense)
    ]
    with (
        Progress(
            len(pruned.view.blocks),
            label=LABEL,
            enabled=progress,
            afterwards=sum(row["seconds"] for row in measured["pruned"]),
        ) as bar,
        ops.pinned(backends),
        journal.interruptible(follow=world.size > 1),
    ):
        work = RefineWork(
            executors[0],
            executors[1],
            data,
            request.reconstruction,
            cross_block=request.cross_block,
            global_propagation=request.global_propagation,
            seed=request.seed,
            found=found,
            journal=journal,
        )
        run_blocks(Loop(executors[0], journal, found, world, request.seed, request.output, track), work, bar)
    with found.clock("evaluation"), Doing("measuring the refined model", progress and bool(texts), LABEL) as doing:
        measured = {**measured, "refined": meter(pruned.model, pruned.weights, doing)}
    rows = compared(measured["dense"], measured["refined"])
    before = compared(measured["dense"], measured["pruned"])
    gap = domains.generalisation(rows)
    track(len(pruned.view.blocks), outcome(rows))
    result = {
        "model": request.model,
        "dense": request.dense,
        **request.asked(),
        "windows": [row for rows in work.windows for row in rows],
        "evaluation": [
            {**row, "refined": row["pruned"], "pruned": was["pruned"], "ratio_before_refinement": was["ratio"]}
            for row, was in zip(rows, before)
        ],
        "generalisation": gap,
        "backends": backends,
        "seconds": time.perf_counter() - started,
        "warnings": [
            *found.warnings,
            *meter.notes,
            *(text for whose, found_rows in measured.items() for text in warnings_for(found_rows, whose)),
            *domains.gap_warning(gap),
        ],
    }
    world.lead(
        lambda: journal.finish(
            lambda folder: _fill(
                folder, pruned, BlockShards(pruned.view.path, journal.shards()), tokenizer, request, result
            )
        )
    )
    return result


def _fill(folder: Path, opened: Opened, blocks: BlockShards, tokenizer, request: Request, found: dict) -> None:
    """All files: the model, how it was pruned, how it was refined, and a card that says both."""
    source, name = Path(request.model).expanduser(), Path(request.output).name
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


def recipe(request: Request, backends: dict) -> str:
    """``refine.yaml``: repeats the refinement, each op by the back-end that it took."""
    plain = yaml_text({**request.record(), "backends": backends})
    note = "# The refinement took texts from memory. To repeat it, put a path or a name in place of each <…> below.\n"
    return plain if request.repeatable else note + plain


def card_line(found: dict, repeatable: bool) -> str:
    """What the model card adds: that the weights are not those of the pruning alone, and how to get them again."""
    repeat = (
        f"(`pyprune refine --config {RECIPE} -o DIR`)"
        if repeatable
        else "once the texts given in memory have a name there"
    )
    how = (
        ("cross-block" if found["cross_block"] else "block")
        + " reconstruction"
        + (" with global propagation" if found["global_propagation"] else "")
    )
    was = "; ".join(
        f"{perplexity_text(row['pruned'])} → {perplexity_text(row['refined'])} on {row['text']}"
        for row in found["evaluation"]
    )
    return (
        f"- refined after pruning by {how} against `{found['dense']}` (arXiv 2406.15524)"
        + (f", perplexity {was}" if was else "")
        + f": `refinement.json`; `{RECIPE}` repeats it {repeat}\n"
        + "".join(f"- warning: {text}\n" for text in distinct(found["warnings"]))
    )


def print_refinement(found: dict, directory: str | Path, out: TextIO | None = None) -> None:
    """Perplexity before and after, the error of the last window, where everything lies."""
    out = out or sys.stdout
    for row in found["evaluation"]:
        print(
            f"perplexity {perplexity_text(row['dense'])} dense, {perplexity_text(row['pruned'])} pruned → "
            f"{perplexity_text(row['refined'])} refined  ({windows_text(row)}, "
            f"{source_text(row)})",
            file=out,
        )
    last = found["windows"][-1]
    held_out = (
        f", {last['before_held_out']:.4g} → {last['after_held_out']:.4g} on held-out text"
        if "after_held_out" in last
        else ""
    )
    print(
        f"error of the last block {last['before_calibration']:.4g} → {last['after_calibration']:.4g}{held_out} "
        "(relative to dense)",
        file=out,
    )
    for text in found["warnings"]:
        print(f"warning: {text}", file=out)
    print(f"{found['seconds']:.1f} s, written to {directory}", file=out)
    print(f"repeat it with pyprune refine --config {Path(directory) / RECIPE} -o FOLDER", file=out)
