"""Masks of several sparsities: one run each, one after the other, on what is prepared once.

Texts are read, the model is opened, sequences are sampled and the dense model is measured by the first phases alone.
Every run then prunes a copy of the dense model, as it would alone, and has a folder and a journal of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses

from pyprune.config import ConfigError, member_name
from pyprune.execution.journal import Journal, kept_by
from pyprune.execution.progress import announce
from pyprune.execution.run import Findings
from pyprune.pipeline.phases import Material, measure_dense, prepare, register, run_prepared, written
from pyprune.pipeline.result import PruneResult, SeveralResult, WrittenResult
from pyprune.pipeline.session import Session
from pyprune.pipeline.tracking import under


def run_several(session: Session, model, tokenizer, in_place: bool) -> PruneResult:
    """A run for each sparsity that an interrupted one has not finished."""
    if in_place:
        raise ConfigError("in_place=True would do nothing: of several sparsities each has a model of its own")
    material = prepare(session, model, tokenizer, in_place=False)
    singles = session.config.singles()
    names = [member_name(sparsity) for sparsity in session.config.several]
    register(session, material, len(material.opened.view.blocks), members=names)
    done = session.world.same(session.journal.finished())
    left = [number for number, name in enumerate(names) if name not in done]
    if left:
        with contextlib.ExitStack() as held:
            measure_dense(dataclasses.replace(session, held=held), material)
    results: list[PruneResult] = []
    known, found = list(session.found.warnings), session.found
    for number, single in enumerate(singles):
        if number not in left:
            results.append(written(single, material.opened))
            continue
        following = len(left) - left.index(number) - 1
        announce(f"sparsity {single.one_sparsity:g}, {number + 1} of {len(names)}", session.progress)
        opened = material.opened.copy() if following else material.opened
        own = dataclasses.replace(session, config=single, found=found, following=following)
        results.append(run_member(own, dataclasses.replace(material, opened=opened), session.journal))
        found = Findings(warnings=list(known))  # its seconds are those of the first
    session.world.lead(session.journal.dissolve)
    return SeveralResult(results, session.config)


def run_member(session: Session, material: Material, parent: Journal) -> PruneResult:
    """The run of one sparsity, in a folder of its own. session: as it is but for its journal and what it holds."""
    config, world = session.config, session.world
    track = under(member_name(config.one_sparsity), session.track)
    with kept_by(world, config.output, config.output is not None, parent) as journal, contextlib.ExitStack() as held:
        result = run_prepared(dataclasses.replace(session, journal=journal, held=held, track=track), material)
        if world.any(journal.stopping):  # a signal came with the last block
            parent.stop()
            if session.following:
                parent.safe_point()
    if config.output is None:
        return result
    return WrittenResult(result.tokenizer, config, result.report, result.origin)
