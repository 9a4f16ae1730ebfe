"""All settings of one run: its own fields and the sections."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pyprune import effects
from pyprune.config.calibration import Calibration
from pyprune.config.checks import ConfigError, check_at_least, check_choice, check_choices, check_effects, function_name
from pyprune.config.evaluation import Evaluation
from pyprune.config.mappings import from_dict
from pyprune.config.patterns import (
    check_backends,
    check_pattern,
    checked_sparsity,
    member_name,
    parse_backend,
    parse_nm,
    sparsity_text,
)
from pyprune.config.reconstruction import Reconstruction
from pyprune.config.structured import Structured
from pyprune.config.values import (
    MAX_COLUMN_BLOCK,
    STRUCTURED_PATTERNS,
    STRUCTURED_RECONSTRUCTIONS,
    WEIGHT_RECONSTRUCTIONS,
    Criterion,
    Dtype,
    Inputs,
    Method,
    Streaming,
    StructuredReconstruction,
    WeightReconstruction,
)

SECTIONS = {
    "calibration": Calibration,
    "evaluation": Evaluation,
    "reconstruction": Reconstruction,
    "structured": Structured,
}


@dataclass(kw_only=True)
class PruneConfig:
    """All settings of one run of ``pyprune.prune``."""

    model: str | None = None
    """Hub id, local folder, ``.gguf`` file, or the name of a packaged model (``smollm2-135m``)."""
    output: str | None = None
    """Folder to write the pruned model to. In Python, the result stays in memory without one."""
    method: Method = "sparsegpt"
    """Which weights become zero, for unstructured and N:M patterns: the smallest ones (``magnitude``); those with the
    smallest product of weight and input (``wanda``); or those whose removal costs least once the others make up for it
    (``sparsegpt``, slower and best)."""
    pattern: str = "unstructured"
    """Which zeros are allowed: ``unstructured``, ``N:M`` (at most N non-zeros in M weights, for example 2:4), or whole
    ``neurons``, ``heads``, or both (``structured``)."""
    sparsity: float | list[float] | tuple[float, ...] | dict[str, float] | None = None
    """Fraction of the weights that become zero; for structured patterns, of the neurons or heads that are dropped.
    Several values with commas between them give one model each. The default is 0.5, or 1 − N/M. Parts of the
    blocks may have their own: ``mlp=0.6,attention=0.4``, or ``layers.0=0.3,*.down_proj=0.4,*=0.5`` with patterns of
    names, as ``targets`` takes them. Of two that name a weight the first counts; ``*`` is the rest, which stays dense
    if it is not named."""
    criterion: Criterion | Callable[..., Any] = "wifv"
    """How neurons and heads are chosen for structured patterns: by the size of their weights (``magnitude``), of their
    activations (``activation``) or the product of the two (``wifv``, as in FLAP); by gradients (``taylor``,
    ``fisher``); by what their removal costs once the others make up for it (``obs``, or ``obs_greedy``, one after the
    other, slower and best); or at ``random``. In Python also by a function of your own."""
    reconstruct: WeightReconstruction | StructuredReconstruction | None = None
    """How the kept weights make up for the dropped ones. For masks: ``none``; ``layer``, SparseGPT's update (in one
    pass, later columns make up for the error of earlier ones); ``refit``, the least-squares optimum on the same mask;
    ``block`` and ``cross_block``, which also train each block, or windows of two. The default is ``layer`` for
    sparsegpt and ``none`` for the others. For structured patterns: ``none``; ``bias``,
    which makes up for the mean of what is lost; ``mask_tuning``, which rescales what is kept; or ``liar``, the default,
    which estimates what is lost from what is kept."""
    global_propagation: bool = False
    """Reconstruct towards the activations of the dense model itself, not towards what its block makes of the pruned
    model's activations (global propagation, GP, of arXiv 2406.15524)."""
    inputs: Inputs | None = None
    """Which inputs the statistics come from: those that the pruned blocks before leave (``propagated``, two passes per
    block); those of the dense model (``dense``, one pass); or those that the pruned layers before leave, each group of
    layers, heads or neurons being pruned as soon as all tokens have arrived at it (``sequential``, one pass). The
    default is propagated for masks, sequential for heads and neurons, and dense for several sparsities of these."""
    targets: list[str] = field(default_factory=list)
    """Prune only weights that one of these patterns names: whole components (``mlp``, ``layers.1``,
    ``experts.down_proj[3]``), wildcards (``*_proj``), or ``re:`` and a regular expression. By default every matrix of
    every block. Layers that route tokens to experts stay dense unless a pattern matches nothing else."""
    ignore: list[str] = field(default_factory=list)
    """Weights to leave dense, named in the same way as targets. A pattern that matches nothing is an error."""
    damping: float = 0.01
    """What SparseGPT's update adds to the diagonal of the inputs' Gram matrix (XᵀX, its Hessian), as a multiple of the
    mean diagonal. More is safer for few tokens, less fits closer."""
    column_block: int = 128
    """Columns that SparseGPT's update treats together."""
    batch_size: int | None = None
    """Sequences per forward pass. By default as many as make 2,048 tokens on a CPU, or 16,384 tokens on a GPU."""
    dtype: Dtype = "auto"
    """Number type that the weights are loaded in. ``auto`` is the checkpoint's own."""
    compute_dtype: Dtype = "auto"
    """Number type of the forward passes. ``auto`` is the weights' own. bfloat16 is about four times as fast on CPUs
    that multiply it in hardware."""
    device: str = "auto"
    """Where blocks are computed: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, or ``cuda:1``."""
    backend: str = "auto"
    """Implementation that the ops use: ``auto`` (the fastest that passed its checks), ``cuda``, ``triton``, ``cpu`` or
    ``reference``; an op that it does not have takes auto's, and the run says so. By op, for those who measure:
    ``obs_sweep=cuda,gram_update=triton``, or ``cuda,linear=reference``."""
    backends: dict[str, dict[str, str]] | None = None
    """What every op that ``backend`` leaves to ``auto`` takes: type of device, class of the op, back-end, as
    ``report.json`` holds them. ``run.yaml`` records what its run took, so that a repeated run gives the same bytes.
    Where a machine cannot follow, the choice is automatic and the run says so. None leaves all to ``auto``."""
    weights: str | None = None
    """Of a model given in memory, a fingerprint of its weights before the run. ``run.yaml`` records it, and a run that
    repeats it on other weights warns of that."""
    seed: int = 0
    """Seed of every random choice. The same seed gives the same result, bit for bit, on the same machine."""
    probe_samples: int = 2
    """Number of calibration sequences, and of held-out ones, on which the error of each block against the dense model
    is measured."""
    memory_budget_gb: float | None = None
    """Host memory for activations, in GB. What does not fit goes to a memory-mapped file. The default is half of what
    is free."""
    stream: Streaming = "auto"
    """Read the weights block by block from safetensors instead of loading the whole model: ``auto`` (if they would take
    more than half of the free memory), ``always`` or ``never``."""
    packed: bool = False
    """Write the checkpoint without its zeros, as ``pyprune pack`` does: smaller, and faster to decode with
    ``pyprune.load``; stock loaders read it after ``pyprune unpack``."""
    calibration: Calibration = field(default_factory=Calibration)
    evaluation: Evaluation = field(default_factory=Evaluation)
    reconstruction: Reconstruction = field(default_factory=Reconstruction)
    structured: Structured = field(default_factory=Structured)

    def __post_init__(self):
        for name, cls in SECTIONS.items():
            value = getattr(self, name)
            if isinstance(value, dict):
                setattr(self, name, from_dict(cls, value, name))
            elif not isinstance(value, cls):
                raise ConfigError(f"{name} must be a {cls.__name__} or a mapping, got {type(value).__name__}")
        if self.calibration.seed is None:
            self.calibration = dataclasses.replace(self.calibration, seed=self.seed)
        for name in ("targets", "ignore"):
            if isinstance(pattern := getattr(self, name), str):
                setattr(self, name, [pattern])
        parse_backend(self.backend)
        check_backends(self.backends)
        check_at_least(self, "batch_size", "column_block")
        if self.column_block > MAX_COLUMN_BLOCK:
            raise ConfigError(
                f"column_block must be at most {MAX_COLUMN_BLOCK}, what a sweep takes at once, got {self.column_block}"
            )
        check_at_least(self, "probe_samples", "seed", minimum=0)
        if not self.damping > 0:
            raise ConfigError(f"damping must be above 0, got {self.damping!r}")
        self._check_pattern()
        if self.is_structured:
            self.reconstruct = self.reconstruct or "liar"
            check_choice(f"reconstruct for pattern {self.pattern!r}", self.reconstruct, STRUCTURED_RECONSTRUCTIONS)
        else:
            self.reconstruct = self.reconstruct or ("layer" if self.method == "sparsegpt" else "none")
            if self.reconstruct in STRUCTURED_RECONSTRUCTIONS and self.reconstruct not in WEIGHT_RECONSTRUCTIONS:
                raise ConfigError(
                    f"reconstruct={self.reconstruct!r} is for heads and neurons: set pattern='neurons', 'heads' or "
                    f"'structured'; pattern={self.pattern!r} takes {', '.join(WEIGHT_RECONSTRUCTIONS)}"
                )
            check_choice(f"reconstruct for pattern {self.pattern!r}", self.reconstruct, WEIGHT_RECONSTRUCTIONS)
        self.inputs = self.inputs or self.usual_inputs
        check_choices(self)
        if self.global_propagation and self.inputs == "dense":
            raise ConfigError("global_propagation needs inputs='propagated': it corrects the pruned stream")
        self._check_reconstruction()
        self._check_sequential()
        check_effects(self, effects.RUN)

    def _check_reconstruction(self) -> None:
        trains = self.reconstruct in ("block", "cross_block")
        if trains and self.inputs == "dense":
            raise ConfigError(
                f"reconstruct={self.reconstruct!r} needs inputs='propagated': it trains on the pruned stream"
            )
        if self.reconstruction.layerwise_target == "dense" and not self.global_propagation:
            raise ConfigError("layerwise_target='dense' needs global_propagation: it is the dense stream's outputs")
        if (
            self.calibration.self_generated
            and self.calibration.num_samples == 0
            and self.calibration.self_generated_for != "all"
        ):
            raise ConfigError(
                "num_samples is 0: masks and layer-wise statistics have nothing to come from; set "
                "self_generated_for='all' to use the self-generated sequences for them too"
            )
        if self.calibration.self_generated and self.calibration.self_generated_for == "reconstruction" and not trains:
            raise ConfigError(
                f"nothing would use the {self.calibration.self_generated} self-generated sequences: "
                f"reconstruct is {self.reconstruct!r}; set self_generated_for='all', or reconstruct="
                "'block' or 'cross_block'"
            )

    def _check_sequential(self) -> None:
        if self.inputs == "sequential" and self.is_curve:
            shown = ", ".join(f"{s:g}" for s in self.several)
            raise ConfigError(
                f"inputs='sequential' prunes to one sparsity, not to a list ({shown}): behind pruned blocks each "
                "sparsity has inputs of its own, so no pass would be shared; prune to one at a time, or set "
                "inputs='dense', where one pass serves all"
            )

    def _check_pattern(self) -> None:
        check_pattern(self.pattern)
        self.sparsity = checked_sparsity(self.sparsity, self.pattern)
        if isinstance(self.sparsity, dict) and self.is_structured and self.structured.allocation == "global":
            raise ConfigError(
                f"allocation='global' shares out one sparsity over all blocks, got {sparsity_text(self.sparsity)}; "
                "give a number, or allocation='uniform'"
            )

    @property
    def sparsities(self) -> tuple[float | dict[str, float], ...]:
        """Every sparsity asked for, each a number or a mapping; usually one."""
        if isinstance(self.sparsity, (list, tuple)):
            return tuple(self.sparsity)
        return () if self.sparsity is None else (self.sparsity,)

    @property
    def sparsity_by_name(self) -> dict[str, float]:
        """The sparsities that were asked for by name; empty where numbers were."""
        return self.sparsity if isinstance(self.sparsity, dict) else {}

    @property
    def one_sparsity(self) -> float:
        """The sparsity of a run that has a single number; of several the first. ConfigError for a mapping."""
        [first, *_] = self.sparsities
        if isinstance(first, dict):
            raise ConfigError(f"one number is needed here, got {sparsity_text(first)}")
        return first

    @property
    def usual_inputs(self) -> Inputs:
        """``inputs`` where nothing is asked for."""
        if self.is_curve:
            return "dense"
        return "sequential" if self.is_structured and effects.observes(self) else "propagated"

    @property
    def is_curve(self) -> bool:
        """Heads or neurons are pruned to several sparsities in one run; a list was asked for, even if it holds one."""
        return isinstance(self.sparsity, tuple) and self.is_structured

    def single(self, sparsity: float) -> PruneConfig:
        """The configuration of one of several sparsities, whose folder is inside the output."""
        output = None if self.output is None else f"{self.output}/{member_name(sparsity)}"
        return dataclasses.replace(self, sparsity=sparsity, output=output)

    def singles(self) -> list[PruneConfig]:
        """Masks of several sparsities: the configuration of each run; of any other there is none."""
        several = isinstance(self.sparsity, tuple) and not self.is_structured
        return [self.single(sparsity) for sparsity in self.several] if several else []

    @property
    def several(self) -> tuple[float, ...]:
        """The sparsities that were asked for in a list; of a single one there is none."""
        return self.sparsity if isinstance(self.sparsity, tuple) else ()

    @property
    def nm(self) -> tuple[int, int] | None:
        """(N, M) of an N:M pattern, else None."""
        return parse_nm(self.pattern) if isinstance(self.pattern, str) else None

    @property
    def model_name(self) -> str:
        """The model of a run that names one; ConfigError for one that does not."""
        if self.model is None:
            raise ConfigError("no model: give a Hub id, a local folder or a .gguf file")
        return self.model

    @property
    def criterion_name(self) -> str:
        """The criterion's name; of a function its own."""
        return self.criterion if isinstance(self.criterion, str) else function_name(self.criterion)

    @property
    def output_folder(self) -> str:
        """The output folder of a run that has one; ConfigError for one that has not."""
        if self.output is None:
            raise ConfigError("no output folder: name one")
        return self.output

    @property
    def is_structured(self) -> bool:
        return self.pattern in STRUCTURED_PATTERNS
