"""Moments of the consumers' inputs, gathered over one pass of the calibration stream through a block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyprune.config import ConfigError
from pyprune.execution.executor import Activations, Batch
from pyprune.execution.run import Findings, Run
from pyprune.execution.trust import by_reference, distrust
from pyprune.structured.groups import Coupled
from pyprune.structured.moments import HELD_OUT_EVERY, Split, balanced_weights, held_out_tokens, token_weights
from pyprune.structured.taps import Taps

SAMPLED = 8
"""At most so many sequences are read for the mean power of a block's residual stream."""
SIGNS = 32
"""Inputs of a token by whose signs an expert's tokens are told apart."""


@dataclass(frozen=True, eq=False)
class Observed:
    """One group under observation: where its moments are summed, and what its tokens count by."""

    split: Split
    weight: Tensor
    """The consumer's ``[out, in]``."""
    dense: Activations | None
    """What the consumer's output should add up to; None: no errors are taken."""
    column_powers: Tensor | None
    """``‖W_·j‖²``, float32 ``[in]``, if tokens count ``relative``."""
    seen_whole: bool
    """Whether it gets every token of a batch; an expert gets some, of which the sequences are not known."""
    mean_power: Tensor | None
    """Mean over tokens of the residual stream's squared norm, if tokens count ``balanced``."""

    @staticmethod
    def make(
        run: Run,
        index: int,
        group: Coupled,
        dense: Activations | None = None,
        mean_power: Tensor | None = None,
        redo: Callable[[str], None] | None = None,
    ) -> Observed:
        """mean_power: used if the group's tokens count ``balanced``. redo: of :class:`Moments`."""
        kind, device = weighting(run.config.structured.token_weights, group), run.executor.device
        precision = "bfloat16" if run.executor.dtype == torch.bfloat16 else "float32"
        weight = group.consumer.view(run.view.blocks[index])
        return Observed(
            Split.make(weight.shape[1], 0 if dense is None else weight.shape[0], device, precision, redo),
            weight,
            dense,
            weight.float().square().sum(0).to(device) if kind == "relative" else None,
            group.consumer.expert is None,
            mean_power if kind == "balanced" else None,
        )

    def add(self, batch: Batch, x: Tensor, held: Tensor, sums: Tensor | None, power: Tensor | None) -> None:
        """Take in a batch's inputs ``x [tokens, in]``; held: which of the batch's tokens are set aside.

        sums: what the dense consumer's output adds up to, ``[tokens, out]``; None where that is not seen. power: the
        squared norm of that output alone, ``[tokens]``; None: computed here if it is needed.
        """
        marks = held if self.seen_whole and len(x) == len(held) else by_content(x)
        error = None
        if self.dense is not None and sums is not None:
            wanted = self.dense.read(batch)
            wanted = wanted.reshape(-1, wanted.shape[-1]).to(sums.device, non_blocking=True)
            error = wanted.float() - sums.float()
        self.split.update(x, marks, error, self._token_weights(x, sums, power))

    def _token_weights(self, x: Tensor, sums: Tensor | None, power: Tensor | None) -> Tensor | None:
        """How much each token counts, float32 ``[tokens]``; None: all the same."""
        if self.mean_power is not None and sums is not None:
            return balanced_weights(sums.float().square().sum(1), self.mean_power)
        if self.column_powers is None:
            return None
        if power is None:  # an expert, whose outputs are not seen
            power = (x.float() @ self.weight.to(x.device).float().T).square().sum(1)
        return token_weights(power, x.float().square() @ self.column_powers)


def observe_moments(
    run: Run,
    found: Findings,
    index: int,
    module: nn.Module,
    groups: list[Coupled],
    stream: Activations,
    *,
    target: Activations | None = None,
    dense: list[Activations | None] | None = None,
) -> list[Split]:
    """Moments of the groups' inputs over a stream; outputs go to ``target``, errors are taken against ``dense``.

    With several processes each passes its own sequences, and all get the moments of all. A pass whose products fail
    their guards is made again by the reference. Raises ConfigError if an input is not finite.
    """
    kinds = [weighting(run.config.structured.token_weights, group) for group in groups]
    means = mean_powers(run, index, module, groups, stream) if "balanced" in kinds else None
    # a pass that takes the place of its own inputs cannot be made again
    redo = None if target is None else functools.partial(distrust, found.warn, run.executor.device, index)

    def observe() -> list[Observed]:
        observed = [
            Observed.make(
                run, index, group, None if dense is None else dense[i], None if means is None else means[i], redo
            )
            for i, group in enumerate(groups)
        ]
        taps = Taps(
            module,
            groups,
            sums=means is not None or any(one.dense is not None for one in observed),
            powers="relative" in kinds,
            stop=target is None,
        )

        def take(batch: Batch, _) -> None:
            with found.clock("statistics"):
                held = held_of(run, stream, batch)
                for i, one in enumerate(observed):
                    x = taps.inputs.get(i)  # None for an expert that no token of this batch reached
                    if x is not None:
                        one.add(batch, x, held, taps.sums.get(i), taps.powers.get(i))

        try:
            with found.clock("forward"):
                run.executor.run(index, module, stream, target, take, taps.run)
        finally:
            taps.close()
        return observed

    return settled_moments(run, found, index, groups, lambda: [one.split for one in observe()], again=target is None)


def settled_moments(
    run: Run, found: Findings, index: int, groups: Sequence[Coupled], gather: Callable[[], list[Split]], again: bool
) -> list[Split]:
    """The moments that ``gather()`` takes of each group's inputs, of all processes. Where guards fail they are taken
    again by the reference, if they can be (``again``). Raises ConfigError if they are not finite. One reading of the
    device."""
    splits = gather()
    wrong, finite = _looked_at(splits)
    if again and wrong:
        with by_reference(wrong):
            splits = gather()
            still, finite = _looked_at(splits)
        for op in sorted(wrong - still):
            distrust(found.warn, run.executor.device, index, op)
    if run.world.size > 1:
        with found.clock("statistics"):
            for split in splits:
                split.sum_over(run.world)
        _, finite = _looked_at(splits)
    for group, right in zip(groups, finite):
        if not right:
            raise ConfigError(
                f"the inputs of {run.view.path}.{index}.{group.name} are not finite on the calibration "
                "data; check the checkpoint, or load it in a wider dtype"
            )
    return splits


def _looked_at(splits: Sequence[Split]) -> tuple[set[str], list[bool]]:
    """Ops whose results failed their guards, and of each split whether it is finite; read in one go."""
    told = [(op, bad) for split in splits for wrong in split.verdicts() for op, bad in wrong.items()]
    flat = [*(bad for _, bad in told), *(split.finite() for split in splits)]
    values = torch.stack(flat).tolist() if flat else []
    return {op for (op, _), bad in zip(told, values) if bad}, values[len(told) :]


def weighting(asked: str, group: Coupled) -> str:
    """How tokens count for a group: ``relative`` (:func:`pyprune.structured.moments.token_weights`), ``balanced``
    (:func:`pyprune.structured.moments.balanced_weights`) or ``uniform``.

    What experts add to the residual stream is not seen token by token, so they are never balanced.
    """
    kind = asked
    if asked == "auto":
        kind = "relative" if group.normed else "balanced"
    if kind == "balanced" and group.consumer.expert is not None:
        return "uniform"
    return kind


def mean_powers(run: Run, index: int, module: nn.Module, groups: list[Coupled], stream: Activations) -> Tensor:
    """Mean over tokens of ``‖s‖²``, s being the sum that each group's output lands in, on the first sequences; float32
    ``[groups]``, zero for experts. Only its order of magnitude matters; which sequences these are depends on neither
    batches nor processes."""
    wanted = sampled(run)
    sums = torch.zeros(2, len(groups), device=run.executor.device)
    if run.world.leads:  # it has the first sequences
        taps = Taps(module, groups, stop=True)
        try:
            for batch in _single(stream, wanted):
                beside = run.executor.beside([index], stream, batch)
                taps.run(functools.partial(run.executor.forward, index, module, stream.read(batch), beside))
                for i, total in taps.sums.items():
                    sums[0, i] += total.float().square().sum()
                    sums[1, i] += len(total)
        finally:
            taps.close()
    run.world.send_(sums, 0)
    return sums[0] / sums[1].clamp(min=1)


def sampled(run: Run) -> int:
    """How many of the first sequences tell the mean power of a block's residual stream."""
    return min(SAMPLED, max(1, len(run.data.sequences) // 16))


def _single(stream: Activations, wanted: int) -> list[Batch]:
    """Those of the first ``wanted`` sequences that are in the stream, one per batch."""
    found = []
    for length, rows in stream.rows.items():
        found += [Batch(length, place, place + 1) for place, row in enumerate(rows) if row < wanted]
    return found


def by_content(x: Tensor) -> Tensor:
    """bool ``[tokens]``, on the host: about one token in five, told by the signs of its own inputs, so that neither
    batches nor processes nor rounding decide which."""
    bits = (x[:, :: max(1, x.shape[1] // SIGNS)][:, :SIGNS] > 0).long()
    number = (bits << torch.arange(bits.shape[1], device=x.device)).sum(1)
    mixed = (number * 0x9E3779B1 + 0x7F4A7C15) ^ (number >> 17)
    return ((mixed * 0x85EBCA6B) >> 16).remainder(HELD_OUT_EVERY).eq(HELD_OUT_EVERY - 1).cpu()


def held_of(run: Run, stream: Activations, batch: Batch) -> Tensor:
    """Tokens of a batch of the calibration stream that are set aside, bool ``[tokens]``."""
    first, total = run.world.span(len(run.data.sequences))[0], len(run.data.sequences)
    if total >= 2 * HELD_OUT_EVERY:
        rows = torch.tensor(stream.rows[batch.length][batch.start : batch.stop]) + first
        return (rows % HELD_OUT_EVERY == HELD_OUT_EVERY - 1).repeat_interleave(batch.length)
    return held_out_tokens(batch.size, batch.length, batch.start, total)
