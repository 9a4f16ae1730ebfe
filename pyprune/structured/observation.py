"""Moments of the consumers' inputs, gathered over one pass of the calibration stream through a block."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyprune.config import ConfigError
from pyprune.execution.executor import Activations, Batch
from pyprune.execution.run import Clock, Run
from pyprune.structured.groups import Coupled
from pyprune.structured.moments import HELD_OUT_EVERY, Split, balanced_weights, held_out_tokens, token_weights
from pyprune.structured.taps import Taps

SAMPLED = 8
"""At most so many sequences are read for the mean power of a block's residual stream."""


@dataclass(frozen=True, eq=False)
class _Observed:
    """One group under observation: where its moments are summed, and what its tokens count by."""

    place: int
    """Its number among the groups, by which taps know it."""
    split: Split
    weight: Tensor
    """The consumer's ``[out, in]``."""
    dense: Activations | None
    """What the consumer's output should add up to; None: no errors are taken."""
    column_powers: Tensor | None
    """``‖W_·j‖²``, float32 ``[in]``, if tokens count ``relative``."""
    mean_power: Tensor | None
    """Mean over tokens of the residual stream's squared norm, if tokens count ``balanced``."""

    def error(self, batch: Batch, taps: Taps) -> Tensor | None:
        """What the sums that the outputs land in lack of the dense ones, float32 ``[tokens, out]``."""
        if self.dense is None:
            return None
        sums = taps.sums[self.place]
        wanted = self.dense.read(batch)
        wanted = wanted.reshape(-1, wanted.shape[-1]).to(sums.device, non_blocking=True)
        return wanted.float() - sums.float()

    def token_weights(self, x: Tensor, taps: Taps) -> Tensor | None:
        """How much each token counts, float32 ``[tokens]``; None: all the same."""
        if self.mean_power is not None:
            return balanced_weights(taps.sums[self.place].float().square().sum(1), self.mean_power)
        if self.column_powers is None:
            return None
        power = taps.powers.get(self.place)
        if power is None:  # an expert, whose outputs are not seen
            power = (x.float() @ self.weight.to(x.device).float().T).square().sum(1)
        return token_weights(power, x.float().square() @ self.column_powers)


def observe_moments(
    run: Run,
    clock: Clock,
    index: int,
    module: nn.Module,
    groups: list[Coupled],
    stream: Activations,
    *,
    target: Activations | None = None,
    dense: list[Activations | None] | None = None,
) -> list[Split]:
    """Moments of the groups' inputs over a stream; outputs go to ``target``, errors are taken against ``dense``.

    With several processes each passes its own sequences, and all get the moments of all. Raises ConfigError if an
    input is not finite.
    """
    device = run.executor.device
    precision = "bfloat16" if run.executor.dtype == torch.bfloat16 else "float32"
    kinds = [weighting(run.config.structured.token_weights, group) for group in groups]
    means = mean_powers(run, index, module, groups, stream) if "balanced" in kinds else None
    observed = []
    for i, (group, kind) in enumerate(zip(groups, kinds)):
        wanted = None if dense is None else dense[i]
        mean = means[i] if means is not None and kind == "balanced" else None
        weight = group.consumer.view(run.view.blocks[index])
        split = Split.make(weight.shape[1], 0 if wanted is None else weight.shape[0], device, precision)
        powers = weight.float().square().sum(0).to(device) if kind == "relative" else None
        observed.append(_Observed(i, split, weight, wanted, powers, mean))
    taps = Taps(
        module,
        groups,
        sums=means is not None or any(one.dense is not None for one in observed),
        powers="relative" in kinds,
        stop=target is None,
    )
    first, total = run.world.span(len(run.data.sequences))[0], len(run.data.sequences)

    def take(batch: Batch, _) -> None:
        with clock("statistics"):
            held = _held(stream, batch, first, total)
            for one in observed:
                x = taps.inputs.get(one.place)
                if x is None:
                    continue  # an expert that no token of this batch reached
                # an expert sees some of the tokens, and which sequences they are from is not known
                marks = held if len(x) == len(held) else _every_fifth(len(x))
                one.split.update(x, marks, one.error(batch, taps), one.token_weights(x, taps))

    try:
        with clock("forward"):
            run.executor.run(index, module, stream, target, take, taps.run)
    finally:
        taps.close()
    splits = [one.split for one in observed]
    with clock("statistics"):
        for split in splits:
            split.sum_over(run.world)
    for split, group in zip(splits, groups):
        if not split.finite():
            raise ConfigError(
                f"the inputs of {run.view.path}.{index}.{group.name} are not finite on the calibration "
                "data; check the checkpoint, or load it in a wider dtype"
            )
    return splits


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
    wanted = min(SAMPLED, max(1, len(run.data.sequences) // 16))
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


def _single(stream: Activations, wanted: int) -> list[Batch]:
    """Those of the first ``wanted`` sequences that are in the stream, one per batch."""
    found = []
    for length, rows in stream.rows.items():
        found += [Batch(length, place, place + 1) for place, row in enumerate(rows) if row < wanted]
    return found


def _every_fifth(tokens: int) -> Tensor:
    """bool ``[tokens]``: the last of every five tokens."""
    return torch.arange(tokens) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def _held(stream: Activations, batch: Batch, first: int, total: int) -> Tensor:
    """Tokens of a batch that are set aside; ``first``: place of this process's first sequence among all ``total``."""
    if total >= 2 * HELD_OUT_EVERY:
        rows = torch.tensor(stream.rows[batch.length][batch.start : batch.stop]) + first
        return (rows % HELD_OUT_EVERY == HELD_OUT_EVERY - 1).repeat_interleave(batch.length)
    return held_out_tokens(batch.size, batch.length, batch.start, total)
