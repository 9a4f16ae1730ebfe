"""BR, GP and CR over the blocks of a run: which streams are kept, what each window is trained on, what it gained.

From arXiv 2406.15524. ``x`` is the input of a block in the pruned stream, ``x̄`` in the dense one:

    BR     f_i(x) → f̄_i(x)                     after the layer-wise step, block by block
    GP     f_i(x) → f̄_i(x̄)                     the target is the dense model's own output
    CR     f_{i+1} f_i(x) → f̄_{i+1} f̄_i(x̄)      windows of two blocks slide by one, every block is visited twice

Under CR the first visit of block i+1 needs a mask, hence inputs, before block i is final: its statistics come from
block i as it then is, and the stream moves on only when the window that ends with block i+1 is done.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyprune.config import LAYERWISE, ConfigError, PruneConfig
from pyprune.execution.error_probes import SELF_GENERATED, ErrorProbe, as_row, stream_errors
from pyprune.execution.executor import Activations, Executor
from pyprune.execution.residency import sent
from pyprune.execution.run import Findings, Run
from pyprune.masks.statistics import ratio
from pyprune.model.arguments import Beside
from pyprune.model.blocks import WeightRef
from pyprune.reconstruction.trained_window import TrainedWindow
from pyprune.reconstruction.training import Pairs, Trace, train, window_error_sums


@dataclass
class Streams:
    """The streams of hidden states of one list of sequences, where the run now stands."""

    name: str
    pruned: Activations
    """Inputs of the block at hand from the pruned prefix."""
    dense: Activations | None = None
    """Dense stream: its inputs, and after :meth:`WindowTrainer.dense` its outputs."""
    behind: Activations | None = None
    """CR: inputs of the block before, all of whose predecessors are final."""
    local: Activations | None = None
    """Without GP: dense outputs on the pruned stream's inputs."""

    @property
    def inputs(self) -> Activations:
        """What a window reads that ends with the block at hand."""
        return self.pruned if self.behind is None else self.behind

    @property
    def target(self) -> Activations:
        """What its outputs should be."""
        found = self.dense if self.local is None else self.local
        if found is None:
            raise RuntimeError(f"no dense pass has made targets for the stream {self.name!r}")
        return found


@dataclass
class ProbeStreams(Streams):
    """Sequences that errors are measured on; both models' streams are always there."""

    dense: Activations


def wanted(config: PruneConfig) -> bool:
    """Whether a run needs a :class:`WindowTrainer`."""
    return config.reconstruct in ("block", "cross_block") or (
        config.reconstruct in LAYERWISE and (config.global_propagation or config.reconstruction.select == "validation")
    )


def streams_beside(config: PruneConfig) -> tuple[str, ...]:
    """What a :class:`WindowTrainer` keeps of the calibration data beside the pruned stream, by its name in
    :class:`Streams`."""
    trains = config.reconstruct in ("block", "cross_block")
    targets = ("dense",) if config.global_propagation else ("local",) if trains else ()
    return (*targets, "behind") if config.reconstruct == "cross_block" else targets


class WindowTrainer:
    """Trains the windows of one run and measures every step on probes."""

    def __init__(self, run: Run, found: Findings, fit: Activations | None, probes: list[ErrorProbe]):
        """fit: the run's calibration stream; probes: its error probes."""
        config = run.config
        self.run, self.found, self.executor, self.settings = run, found, run.executor, config.reconstruction
        self.trains = config.reconstruct not in LAYERWISE
        self.first = "refit" if config.reconstruct == "refit" else "layer"
        self.layerwise = config.global_propagation and (not self.trains or self.settings.layerwise_target == "dense")
        self.cross, self.last = config.reconstruct == "cross_block", len(run.view.blocks) - 1
        fits = [fit] if fit is not None else []
        if run.data.generated and self.trains:
            fits.append(run.executor.embed(run.data.generated, shared=True))
        dense = "dense" in streams_beside(config)
        self.calibration = [Streams(f"fit {k}", a, a.like() if dense else None) for k, a in enumerate(fits)]
        self.probes = [ProbeStreams(p.name, p.pruned, p.dense) for p in probes if p.name != SELF_GENERATED]
        self.watch = next((p for p in self.probes if p.name == "held_out"), None)
        if self.watch is None and (self.settings.select == "validation" or self.settings.early_stop):
            raise ConfigError(
                "select='validation' and early_stop need held-out sequences: set held_out (and "
                "probe_samples) above 0, or give more calibration text"
            )
        self.dtype = training_dtype(run.executor, self.settings.autocast)
        self.masks: dict[int, dict[str, Tensor]] = {}
        self.steps: dict[int, list[dict]] = {}
        self.traces: dict[int, list[Trace]] = {}
        self._dense: dict[int, nn.Module] = {}
        self._probe_targets: dict[str, Activations] = {}

    def trained(self, window: list[int]) -> bool:
        """Whether there is anything to learn: a dense window behind a dense prefix is its own target, but rounding."""
        first = 0 if self.run.config.global_propagation else window[0]
        return self.trains and any(self.run.selected[first : window[-1] + 1])

    def window(self, index: int) -> list[int]:
        """The blocks that train when the masks of block ``index`` are known."""
        return [index - 1, index] if self.cross and index else [index]

    def beside(self, index: int) -> dict[str, Activations]:
        """What the statistics pass over the calibration stream computes along the way, as arguments of
        :func:`pyprune.masks.block.gather`: without GP its outputs, which are the targets of BR; with GP for the
        layer-wise solver the dense stream as well."""
        fit = self.calibration[0]
        if fit.dense is not None:
            return {"dense": fit.dense} if self.layerwise else {}
        if not self.trained(self.window(index)) or len(self.window(index)) > 1:
            return {}
        fit.local = fit.local or fit.pruned.like()
        return {"target": fit.local}

    @torch.no_grad()
    def dense(self, index: int, module: nn.Module, training: bool = True, gathered: bool = False) -> None:
        """Dense outputs of block ``index`` (``module``, not yet pruned) for all sequences, computed once and kept.

        gathered: the statistics pass was run, and computed what :meth:`beside` says.
        """
        if self.cross and not self.run.config.global_propagation:
            self._dense[index] = copy.deepcopy(module)
            self._dense.pop(index - 2, None)
        for streams in self.calibration[1:] if gathered and self.beside(index) else self.calibration:
            if streams.dense is not None:
                self.executor.run(index, module, streams.dense, streams.dense)
            elif training and self.trained(self.window(index)):
                source = streams.pruned
                streams.local = streams.local or source.like()
                if self.cross and index > 0:
                    source = streams.local
                    self.executor.run(index - 1, self._dense[index - 1], streams.inputs, source)
                self.executor.run(index, module, source, streams.local)

    @torch.no_grad()
    def reconstruct(
        self, index: int, module: nn.Module, original: dict[WeightRef, Tensor], masks: dict[WeightRef, Tensor]
    ) -> None:
        """After the layer-wise step of block ``index``: measure it, train the windows that end here, settle.

        module: the block's compute copy, or itself. original: dense weights; masks: keep masks, both ``[out, in]``.
        """
        block, window = self.run.view.blocks[index], self.window(index)
        self.masks[index] = parameter_masks(block, masks)
        self.masks.pop(index - 2, None)
        solved = {ref: ref.view(block).clone() for ref in original}
        self._write(block, module, original, masks)
        masked = self._record(index, "mask", module)
        self._write(block, module, solved)
        best, states = self._record(index, self.first, module), self._states(window)
        if self.trains:
            best = self._improve(window, module, "cross_block 1" if self.cross else "block", best, states)
        if states and not self.cross and self._is_worse(best, masked):
            block.load_state_dict(states[-1])
            self._sync(module, block)
            self._write(block, module, original, masks)
            self.steps[index].append({**masked, "step": "selected: mask"})
        if self.cross:
            self.settle(index)
            if index == self.last:
                for streams in self.calibration:
                    if streams.local is not None and self.trained([index]):
                        self.executor.run(index, self._dense[index], streams.inputs, streams.local)
                self._improve([index], module, "cross_block 2", best, self._states([index]))

    def _states(self, window: list[int]) -> list[dict]:
        """What ``select="validation"`` may go back to; empty without it."""
        if self.settings.select != "validation":
            return []
        return [copy.deepcopy(self.run.view.blocks[i].state_dict()) for i in window]

    def _is_worse(self, row: dict, before: dict) -> bool:
        """Whether held-out error rose, decided once for all processes; what is not finite is worse."""
        return self.run.world.same(not row["held_out"] <= before["held_out"])

    def _improve(self, window: list[int], module: nn.Module, step: str, before: dict, states: list[dict]) -> dict:
        """Train a window and measure what was written, in the model's own type; go back to ``states`` if that is worse
        on held-out sequences than ``before``. Returns the row of what is kept."""
        index = window[-1]
        self._train(window, module)
        row = self._record(index, step, module)
        if states and self._is_worse(row, before):
            for i, state in zip(window, states):
                self.run.view.blocks[i].load_state_dict(state)
            self._sync(module, self.run.view.blocks[index])
            row = {**before, "step": "selected: " + before["step"].removeprefix("selected: ")}
            self.steps[index].append(row)
        return row

    def _train(self, window: list[int], module: nn.Module) -> None:
        """Train a window on its streams; ``module`` is the compute copy of its last block."""
        if not self.trained(window):
            return
        blocks = [self.run.view.blocks[i] for i in window]
        trained = TrainedWindow(self.executor, window, blocks, [self.masks[i] for i in window], self.dtype)
        inputs = [(s.inputs, s.target) for s in self.calibration]
        held_out: Pairs | None = [(self.watch.inputs, self.watch.dense)] if self.watch else None
        trace = train(trained, inputs, self.settings, seed=self.run.config.seed, held_out=held_out)
        trained.commit()
        self._sync(module, blocks[-1])
        self.traces.setdefault(window[-1], []).append(trace)
        if trace.micro_batch_size:  # the next window will not fit either
            self.settings = dataclasses.replace(self.settings, micro_batch_size=trace.micro_batch_size)
        if trace.diverged:
            self.found.warn(
                f"training of blocks {window} met a loss that is not finite and "
                + (f"was undone to epoch {trace.kept}" if trace.kept else "was undone")
                + "; lower lr"
            )

    def _sync(self, module: nn.Module, block: nn.Module) -> None:
        if module is not block:
            state = block.state_dict()
            module.load_state_dict(state | sent(state, self.executor.device))

    def _write(
        self,
        block: nn.Module,
        module: nn.Module,
        weights: dict[WeightRef, Tensor],
        masks: dict[WeightRef, Tensor] | None = None,
    ) -> None:
        """Weights, or what masks leave of them, into a block and its compute copy."""
        there = sent({ref.name: weight for ref, weight in weights.items()}, self.executor.device)
        for ref, weight in weights.items():
            home, weight = ref.view(block), there.get(ref.name, weight)
            keep = None if masks is None else masks[ref].to(weight.device)
            value = (weight if keep is None else weight.masked_fill(~keep, 0)).to(home.dtype)
            self.executor.put(home, value)
            if module is not block:
                ref.view(module).copy_(value)
        if any(ref.view(block).device != self.executor.device for ref in weights):
            self.executor.drain()

    @torch.no_grad()
    def settle(self, index: int) -> None:
        """CR: block ``index − 1`` is final now, so the streams behind move to the inputs of block ``index``."""
        if not self.cross:
            return
        for streams in self.calibration + self.probes:
            if index == 0:
                streams.behind = streams.pruned.like()
            else:
                with self.executor.compute(index - 1) as before:
                    self.executor.run(index - 1, before, streams.inputs, streams.inputs)
        for probe in self.probes if index > 0 else []:
            found = stream_errors(self.executor, probe.inputs, self._probe_targets[probe.name])
            final, quantiles = as_row(found.tolist())
            row = self.found.blocks[index - 1]
            row["error_quantiles"][probe.name] = quantiles
            key = {"calibration": "error", "held_out": "error_held_out"}[probe.name]
            row[key] = final
            if not row["steps"] or row["steps"][-1]["step"] != "cross_block 2":
                row["steps"].append({"step": "cross_block 2"})
            row["steps"][-1][probe.name] = final
        self._probe_targets = {probe.name: probe.dense.like() for probe in self.probes}

    @torch.no_grad()
    def advance(self, index: int, module: nn.Module, passed: bool = False) -> None:
        """Pass the calibration and probe streams through block ``index``. passed: the calibration stream did so while
        the block was pruned."""
        # with dense inputs the statistics pass moved it on
        moves = index < self.last and self.run.config.inputs != "dense" and not passed
        for streams in (self.calibration if moves else []) + self.probes:
            self.executor.run(index, module, streams.inputs, streams.pruned)

    def _record(self, index: int, step: str, module: nn.Module) -> dict:
        """Relative error of the block's output on every probe after a step, behind the pruned prefix as it is: through
        the window where its other block was just trained too."""
        through = step == "cross_block 1" and index > 0
        with self.executor.compute(index - 1) if through else contextlib.nullcontext(module) as before:

            def forward(hidden: Tensor, beside: Beside) -> Tensor:
                if through:
                    hidden = self.executor.forward(index - 1, before, hidden, beside)
                return self.executor.forward(index, module, hidden, beside)

            blocks = [index - 1, index] if through else [index]
            behind = through or step == "cross_block 2"
            sums = [
                window_error_sums(self.executor, blocks, forward, probe.inputs if behind else probe.pruned, probe.dense)
                for probe in self.probes
            ]
        found = torch.stack(sums).tolist() if sums else []
        row = {"step": step, **{probe.name: ratio(*pair) for probe, pair in zip(self.probes, found)}}
        self.steps.setdefault(index, []).append(row)
        return row

    def row(self, index: int) -> dict:
        """What this block adds to the report: error after every step, and how its windows were trained."""
        training = [
            {
                "blocks": t.blocks,
                "steps": t.steps,
                "seconds": t.seconds,
                "loss": t.loss,
                "held_out": t.held_out,
                "kept_epoch": t.kept,
                **({"diverged": True} if t.diverged else {}),
            }
            for t in self.traces.get(index, [])
        ]
        return {"steps": self.steps.get(index, []), "training": training}

    def finish(self) -> None:
        """Warn where calibration error fell while held-out error rose."""
        worse = []
        for row in self.found.blocks:
            steps = [s for s in row.get("steps", []) if "held_out" in s and "calibration" in s]
            base = next((s for s in steps if s["step"] == self.first), steps[0] if steps else None)
            if base and steps[-1]["calibration"] < base["calibration"] and steps[-1]["held_out"] > base["held_out"]:
                worse.append((steps[-1]["held_out"] / base["held_out"], row["block"], base, steps[-1]))
        if worse:
            _, block, base, final = max(worse, key=lambda item: item[0])
            where = f"block {block}" if len(worse) == 1 else f"{len(worse)} of {self.last + 1} blocks, most in {block}"
            self.found.warn(
                f"reconstruction overfits in {where}: calibration error fell from "
                f"{base['calibration']:.4g} to {final['calibration']:.4g} while held-out error rose from "
                f"{base['held_out']:.4g} to {final['held_out']:.4g}; give more or self-generated sequences, "
                "or select='validation'"
            )


def training_dtype(executor: Executor, autocast: str) -> torch.dtype:
    """Type of the products while training; masters are float32 whatever it is."""
    if autocast != "auto":
        return getattr(torch, autocast)
    if executor.device.type == "cuda":
        return torch.bfloat16
    return executor.dtype if executor.dtype == torch.bfloat16 else torch.float32


def parameter_masks(block: nn.Module, masks: dict[WeightRef, Tensor]) -> dict[str, Tensor]:
    """Keep masks by parameter path, in the layout of the parameters (Conv1D turned, experts stacked)."""
    found: dict[str, Tensor] = {}
    for ref, mask in masks.items():
        if ref.path not in found:
            found[ref.path] = torch.ones(ref.parameter(block).shape, dtype=torch.bool, device=mask.device)
        whole = found[ref.path] if ref.expert is None else found[ref.path][ref.expert]
        (whole.T if ref.transposed else whole).copy_(mask)
    return found
