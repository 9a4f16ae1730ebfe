"""Configuration: keyword-only dataclasses that validate themselves and round-trip to YAML.

The command line, the Python API and ``run.yaml`` use the same field names. Everything that can be wrong without
looking at a model or at data is refused here, with the value and the way out.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from pyprune import effects
from pyprune.sources import in_memory

Method = Literal["magnitude", "wanda", "sparsegpt"]
StructuredPattern = Literal["neurons", "heads", "structured"]
Criterion = Literal["random", "magnitude", "activation", "wifv", "taylor", "fisher", "obs", "obs_greedy"]
Layerwise = Literal["layer", "refit"]
WeightReconstruction = Literal["none", Layerwise, "block", "cross_block"]
StructuredReconstruction = Literal["none", "bias", "mask_tuning", "liar"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
TokenWeights = Literal["auto", "relative", "balanced", "uniform"]
Inputs = Literal["propagated", "dense", "sequential"]
Streaming = Literal["auto", "always", "never"]
METHODS: tuple[Method, ...] = get_args(Method)
STRUCTURED_PATTERNS: tuple[StructuredPattern, ...] = get_args(StructuredPattern)
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
LAYERWISE: tuple[Layerwise, ...] = get_args(Layerwise)
WEIGHT_RECONSTRUCTIONS: tuple[WeightReconstruction, ...] = get_args(WeightReconstruction)
STRUCTURED_RECONSTRUCTIONS: tuple[StructuredReconstruction, ...] = get_args(StructuredReconstruction)
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
TOKEN_WEIGHTS: tuple[TokenWeights, ...] = get_args(TokenWeights)
STREAMING: tuple[Streaming, ...] = get_args(Streaming)
BACKENDS = ("cuda", "triton", "cpu", "reference")
OPS = (
    "gram_update",
    "cross_gram_update",
    "column_moments",
    "select_mask",
    "nm_mask",
    "compress_24",
    "expand_24",
    "obs_sweep",
    "trailing_update",
    "cholesky",
    "cholesky_solve",
    "liar_update",
    "linear",
    "sparse_linear",
    "rms_norm",
    "rotary",
    "swiglu",
    "attention",
)
"""The functions of :mod:`pyprune.ops`."""
MAX_COLUMN_BLOCK = 1024
"""Columns that :func:`pyprune.ops.obs_sweep` takes, on every back-end."""
SAMPLES, TOKENS, WINDOW = 64, 512, 1024
"""Sequences of calibration text, tokens of each, tokens of an evaluation window, where nothing else is asked."""
SHORT_WINDOWS, SHORT_WINDOW = 8, 512
"""How many windows of how many tokens are measured of a text that nobody named."""
KINDS = ATTENTION, MLP = "attention", "mlp"
"""Parts of every block that a sparsity may be given for."""
REST = ("*", "default")
"""Keys of a mapping of sparsities that stand for what its other keys do not name."""


class ConfigError(ValueError):
    """Bad input: one clear sentence with the value and the way out. The command line exits with code 2 on it."""


class Unused(ConfigError):
    """A field that was set and would do nothing."""

    def __init__(self, field: str, sentence: str):
        super().__init__(sentence)
        self.field = field


def check_effects(settings, rules: dict[str, effects.Rule], section: str = "", named: Collection[str] = ()) -> None:
    """Raise :class:`Unused` for the first field that was set, or ``named``, and would do nothing."""
    if (found := effects.idle(settings, rules, section, named)) is not None:
        raise Unused(*found)


def check_named(config: PruneConfig, values: dict) -> None:
    """Raise :class:`Unused` for a field of a nested mapping that would do nothing, be its value the default or not: on
    a command line whoever writes an option expects something of it."""
    paths = {f"{key}.{name}" for key, value in values.items() if key in SECTIONS for name in value}
    check_effects(config, effects.RUN, "", {*values, *paths})
    for section, rules in (("calibration", effects.CALIBRATION), ("evaluation", effects.EVALUATION)):
        check_effects(getattr(config, section), rules, section, values.get(section, {}))


def _choose(name: str, value, allowed) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}{hint}")


def members(hint) -> tuple:
    """The types of a union, and of anything else itself."""
    return get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def choices(cls: type) -> dict[str, tuple[str, ...]]:
    """Field → its allowed values, for the fields of a section that have a choice of a few."""
    allowed = {
        name: [value for member in members(hint) if typing.get_origin(member) is Literal for value in get_args(member)]
        for name, hint in typing.get_type_hints(cls).items()
    }
    return {name: tuple(dict.fromkeys(values)) for name, values in allowed.items() if values}


ALIASES = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


def dtype_name(value):
    """``float16`` for ``fp16``, ``half``, ``torch.float16`` and itself; anything else as it is."""
    text = str(value).removeprefix("torch.")
    text = ALIASES.get(text, text)
    return text if text in DTYPES else value


def check_dtype(value, name: str = "dtype") -> Dtype:
    """The name of a number type, ``auto`` included. Raises :class:`ConfigError` for one that is none of ``DTYPES``."""
    _choose(name, found := dtype_name(value), DTYPES)
    return found


def _check_choices(owner, section: str = "") -> None:
    for name, allowed in choices(type(owner)).items():
        if "float32" in allowed:
            setattr(owner, name, dtype_name(getattr(owner, name)))
        if name == "criterion" and is_function(owner.criterion):
            continue
        _choose(f"{section} {name}".lstrip(), getattr(owner, name), allowed)


def is_function(criterion) -> bool:
    """Whether a criterion is a function, or in a ``run.yaml`` stands for one that was given in memory."""
    return callable(criterion) or (isinstance(criterion, str) and in_memory(criterion))


def function_name(function: Callable) -> str:
    """The name of a function, of a partial one that of the whole, and of any other callable its class's."""
    whole = getattr(function, "func", function)
    return getattr(whole, "__name__", type(whole).__name__)


def parse_backend(text: str) -> dict[str, str]:
    """Op → back-end of ``auto``, ``cuda``, ``obs_sweep=cuda,nm_mask=triton`` or ``cuda,linear=reference``; under the
    empty name what all other ops take, if that is not ``auto``."""
    named: dict[str, str] = {}
    for part in text.split(","):
        op, equals, name = (piece.strip() for piece in part.partition("="))
        if not equals:
            op, name = "", op
            _choose("backend", name, ("auto", *BACKENDS))
        else:
            _choose(f"op in backend {text!r}", op, OPS)
            _choose(f"backend of {op}", name, ("auto", *BACKENDS))
        if op in named:
            raise ConfigError(f"backend {text!r} names two back-ends for {op or 'every op'}; leave one of them out")
        named[op] = name
    default = named.get("", "auto")
    return {op: name for op, name in named.items() if name != "auto" or (op and default != "auto")}


def check_backends(backends) -> None:
    """Refuse what is no record of back-ends; what is in it is looked at where it is to be followed."""
    for device, taken in backends.items() if isinstance(backends, dict) else [("", backends)] * (backends is not None):
        if not isinstance(taken, dict) or not all(isinstance(text, str) for text in (device, *taken, *taken.values())):
            raise ConfigError(
                "backends must map a type of device to a mapping of ops to back-ends, such as {'cpu': {'linear': "
                f"'reference'}}, got {backends!r}"
            )


def _positive(owner, *names: str, minimum: int = 1) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool) or value < minimum):
            raise ConfigError(f"{name} must be at least {minimum}, got {value!r}")


def member_name(sparsity: float) -> str:
    """Name of the folder of one of several sparsities, in the output folder: ``sparsity-0.3``."""
    return f"sparsity-{sparsity:g}"


def _fraction(name: str, value: typing.Any) -> float:
    """A sparsity; ConfigError for what is none."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < 1:
        hint = f"; did you mean {value / 100:g}?" if number and 5 <= value < 100 else ""
        raise ConfigError(f"{name} must be in [0, 1), the fraction of zeros, got {value!r}{hint}")
    return float(value)


def sparsity_text(sparsity: typing.Any) -> str:
    """A sparsity as the command line takes it: ``0.5``, ``0.3,0.5`` or ``mlp=0.6,attention=0.4``."""
    if isinstance(sparsity, Mapping):
        return ",".join(f"{key}={value:g}" for key, value in sparsity.items())
    return ",".join(f"{value:g}" for value in (sparsity if isinstance(sparsity, (list, tuple)) else [sparsity]))


def parse_nm(pattern: str) -> tuple[int, int] | None:
    """``"2:4"`` → ``(2, 4)``; None for a pattern that is not N:M."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    return (int(match[1]), int(match[2])) if match else None


@dataclass(kw_only=True)
class Calibration:
    """Token sequences that the statistics and the reconstruction are computed from."""

    source: typing.Any = None
    """Text that shows what the model is used for: the id of a Hub data set, a local ``.txt``, ``.jsonl``, ``.json``,
    ``.csv`` or ``.parquet`` file, or token ids in a ``.npy`` file; or several of these, of which equal shares are
    taken. In Python also text or token ids in memory, in any usual form. Without one, a mixture that comes with
    pyprune: Python's documentation and essays (``builtin:documentation``, ``builtin:essays``)."""
    num_samples: int | None = None
    """How many sequences to use. It is an error if there are fewer, never a silent shortfall. The default is 64; of
    token ids all rows are used."""
    seq_len: int | None = None
    """Tokens per sequence; for encoders, the most tokens that a sentence keeps. The default is 512; token ids keep
    whole rows. Rows of token ids may be cut to fewer tokens, but asking for more than they have is an error."""
    seed: int | None = None
    """Seed of the choice of sequences and of sampling them from the model. The default is the run's seed."""
    split: str = "train"
    """Split of the data set."""
    subset: str | None = None
    """Configuration name of a Hub data set, for example ``en`` of ``allenai/c4``."""
    text_column: str | None = None
    """Column that holds the text, or several with commas between them. By default it is found from the data."""
    self_generated: int = 0
    """Number of sequences that the dense model itself samples, which are used beside those of the corpus (arXiv
    2406.15524)."""
    self_generated_path: str | None = None
    """A jsonl file of ``pyprune generate`` whose sequences are reused, and to which missing ones are added. Without
    one, they stay in memory."""
    self_generated_for: Literal["reconstruction", "all"] = "reconstruction"
    """Who uses the self-generated sequences: ``reconstruction`` (only block-wise and cross-block training) or ``all``
    (masks and layer-wise statistics too)."""
    language: str | None = None
    """Keep only generated text that a language detector says is in this language (an ISO code). By default all text is
    kept."""
    held_out: int = 4
    """Number of sequences set aside from the same source to measure generalisation. They are never used to fit
    anything."""

    def __post_init__(self):
        if self.num_samples == 0 and not self.self_generated:
            raise ConfigError("num_samples is 0 and self_generated is 0: there is nothing to calibrate on")
        _positive(self, "num_samples", "self_generated", "held_out", minimum=0)
        _positive(self, "seq_len", minimum=2)
        _check_choices(self)
        check_effects(self, effects.CALIBRATION, "calibration")

    @property
    def samples(self) -> int:
        """Sequences of text."""
        return SAMPLES if self.num_samples is None else self.num_samples

    @property
    def tokens(self) -> int:
        """Tokens of each."""
        return self.seq_len or TOKENS


@dataclass(kw_only=True)
class Evaluation:
    """What the dense and the pruned model are measured on at the end of a run."""

    text: typing.Any = None
    """Text to measure perplexity on, from the same kinds of sources as the calibration text; several are given as a
    list in Python, by repeating the option on a command line. Without one, text of the calibration's own source that it
    does not see."""
    off_domain: typing.Any = None
    """Text of another kind than the calibration text, measured beside it to show how far the result carries: sources as
    for text, or ``none``. Without one, a novel that comes with pyprune (``builtin:novel``); with the default
    calibration every text that is named is of another kind already."""
    window: int | None = None
    """Tokens per window. The default is 1,024 for a text that is named and 512 for others, or
    fewer if the model has fewer positions; token ids keep whole rows. Longer rows of token ids are cut into windows one
    after the other; a window that no row is as long as is an error."""
    stride: int | None = None
    """Tokens from the beginning of a window to the beginning of the next. Where they overlap, only the tokens are
    scored that the window before did not have, each with more context before it. By default windows do not overlap."""
    max_windows: int | None = 24
    """The most windows that are measured per text; of a text that is not named 8, unless another number is set. ``all``
    takes all of them (None in Python, ``null`` in a configuration file)."""
    dtype: Dtype = "auto"
    """Number type of the forward passes of the evaluation. ``auto`` is the model's own type on a GPU, and bfloat16 on a
    CPU that multiplies it in hardware."""
    batch_size: int = 1
    """Windows per forward pass."""
    bos: bool = True
    """Start every window with the tokenizer's BOS token if the tokenizer starts texts with one. The papers do not do
    this; switch it off to compare with them."""
    split: str = "test"
    """Split of the data set."""
    subset: str | None = None
    """Configuration name of a Hub data set, for example ``wikitext-2-raw-v1`` of ``Salesforce/wikitext``."""
    text_column: str | None = None
    """Column that holds the text, or several with commas between them. By default it is found from the data."""
    enabled: bool = True
    """Measure perplexity before and after pruning."""

    def __post_init__(self):
        _positive(self, "window", minimum=2)
        _positive(self, "max_windows", "batch_size", "stride")
        self.check_stride(self.tokens)
        _check_choices(self, "evaluation")
        check_effects(self, effects.EVALUATION, "evaluation")

    @property
    def tokens(self) -> int:
        """Tokens a window of text."""
        return self.window or (WINDOW if self.text is not None else SHORT_WINDOW)

    def check_stride(self, tokens: int) -> None:
        """Raise ConfigError for a stride that is longer than a window of ``tokens``."""
        if self.stride is not None and self.stride > tokens:
            raise ConfigError(
                f"evaluation.stride={self.stride} is longer than the window of {tokens} tokens: the tokens between two "
                "windows would not be measured; give a larger window or a smaller stride"
            )

    @property
    def other_windows(self) -> int | None:
        """The most windows of a text that is not named."""
        return SHORT_WINDOWS if self.max_windows == effects.default(type(self), "max_windows") else self.max_windows


@dataclass(kw_only=True)
class Reconstruction:
    """Settings of block-wise and cross-block reconstruction (arXiv 2406.15524), which train pruned blocks. The defaults
    are the authors', but for fewer epochs."""

    epochs: int = 5
    """Passes over the calibration sequences per block."""
    lr: float = 2e-4
    """Learning rate of AdamW at the start, which falls linearly to zero. 2e-4 is the authors' for 320 steps per block;
    with about 50 steps, 6e-4 is better."""
    betas: tuple[float, float] = (0.9, 0.95)
    """The two decay rates of AdamW's moments."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    batch_size: int = 8
    """Sequences per optimiser step."""
    micro_batch_size: int | None = None
    """Sequences per forward and backward pass. Fewer than per optimiser step accumulate their gradients, which takes
    less memory. By default as many as per step."""
    autocast: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number type of the matrix products in training: ``float32``, ``bfloat16``, or ``auto`` (bfloat16 on a GPU, as
    ``compute_dtype`` on a CPU). The weights that the optimiser changes stay float32."""
    early_stop: bool = False
    """Stop training a block when its held-out error has not fallen for an epoch."""
    select: Literal["last", "validation"] = "last"
    """Which state of a block is kept: ``last``, the one after the last step, or ``validation``, the one with the lowest
    held-out error."""
    layerwise_target: Literal["local", "dense"] = "local"
    """What the layer-wise step before block training fits: ``local``, the dense layer's output on the pruned model's
    inputs; or ``dense``, its output on the dense model's own inputs (with global propagation)."""

    def __post_init__(self):
        if len(self.betas) != 2:
            raise ConfigError(f"betas must be two numbers, got {self.betas!r}")
        self.betas = (self.betas[0], self.betas[1])
        _positive(self, "epochs", minimum=0)
        _positive(self, "batch_size", "micro_batch_size")
        _check_choices(self)
        if not self.lr > 0:
            raise ConfigError(f"lr must be above 0, got {self.lr!r}")


@dataclass(kw_only=True)
class Structured:
    """Settings of structured pruning (LIAR, arXiv 2407.13331)."""

    allocation: Literal["uniform", "global"] = "uniform"
    """How widths are shared out: ``uniform`` keeps the same width in every block, which is a standard checkpoint;
    ``global`` compares scores across blocks as FLAP does, so that every block has a width of its own."""
    damping: float | None = None
    """How strongly LIAR's fit is held back, for few tokens: what is added to the diagonal of its least-squares systems,
    as a multiple of their mean diagonal. By default it is chosen on held-out calibration tokens."""
    interpolate: Literal["both", "weight", "bias"] = "both"
    """Which part of LIAR is used: ``both``, only the ``weight`` update, or only the ``bias``."""
    interpolate_weights: bool = False
    """Write the dropped weights as a linear map of the kept ones (the matrix P of arXiv 2407.13331)."""
    token_weights: TokenWeights = "auto"
    """How much each token counts in LIAR's fit. ``uniform``: all the same, as in the papers. ``relative``: a
    token's error counts by the size of its own output, so that the few tokens on which a neuron is huge do not decide
    the fit. ``balanced``: half relative to the token's residual stream, half uniform. ``auto``: relative where a layer
    norm follows the residual sum at once (BERT), balanced elsewhere, and uniform for experts."""
    head_scope: Literal["groups", "queries"] = "groups"
    """What counts as a head: ``groups`` drops whole groups of heads that share keys and values; ``queries`` drops query
    heads inside the groups, equally many per group."""
    nonstandard: Literal["refuse", "save", "pad"] = "refuse"
    """What to do with sizes that a standard Hugging Face configuration cannot express: ``refuse`` them, ``save`` them
    for ``pyprune.load``, or ``pad`` them with zeros so that standard tools can load the model."""

    def __post_init__(self):
        _check_choices(self)


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
    criterion: Criterion | Callable[..., typing.Any] = "wifv"
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
        parse_backend(self.backend)
        check_backends(self.backends)
        _positive(self, "batch_size", "column_block")
        if self.column_block > MAX_COLUMN_BLOCK:
            raise ConfigError(
                f"column_block must be at most {MAX_COLUMN_BLOCK}, what a sweep takes at once, got {self.column_block}"
            )
        _positive(self, "probe_samples", "seed", minimum=0)
        if not self.damping > 0:
            raise ConfigError(f"damping must be above 0, got {self.damping!r}")
        self._check_pattern()
        if self.is_structured:
            self.reconstruct = self.reconstruct or "liar"
            _choose(f"reconstruct for pattern {self.pattern!r}", self.reconstruct, STRUCTURED_RECONSTRUCTIONS)
        else:
            self.reconstruct = self.reconstruct or ("layer" if self.method == "sparsegpt" else "none")
            _choose(f"reconstruct for pattern {self.pattern!r}", self.reconstruct, WEIGHT_RECONSTRUCTIONS)
        self.inputs = self.inputs or self.usual_inputs
        _check_choices(self)
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
        nm = self.nm
        if nm is None and self.pattern not in ("unstructured", *STRUCTURED_PATTERNS):
            raise ConfigError(
                f"pattern must be unstructured, N:M (2:4, 4:8), {', '.join(STRUCTURED_PATTERNS)}, got {self.pattern!r}"
            )
        if nm is not None:
            n, m = nm
            if not 0 < n < m or m > 16:
                raise ConfigError(
                    f"pattern {self.pattern!r}: N non-zeros in every M weights needs 0 < N < M ≤ 16"
                    + (f"; did you mean '{m}:{n}'?" if 0 < m < n <= 16 else "")
                )
            implied = 1 - n / m
            if self.sparsity is None:
                self.sparsity = implied
            elif isinstance(self.sparsity, Mapping):
                raise ConfigError(
                    f"sparsity {sparsity_text(self.sparsity)} contradicts pattern {self.pattern!r}, which is sparsity "
                    f"{implied:g} wherever it is applied; leave it out and choose weights by targets or ignore"
                )
            elif isinstance(self.sparsity, (list, tuple)) or abs(float(self.sparsity) - implied) > 1e-9:
                raise ConfigError(
                    f"sparsity {self.sparsity} contradicts pattern {self.pattern!r}, which is sparsity "
                    f"{implied:g}; leave sparsity out or choose another pattern"
                )
        if self.sparsity is None:
            self.sparsity = 0.5
        if isinstance(self.sparsity, Mapping):
            self.sparsity = self._named_sparsities(self.sparsity)
            return
        values = self.sparsity if isinstance(self.sparsity, (list, tuple)) else [self.sparsity]
        if not values:
            raise ConfigError("sparsity is an empty list")
        found = tuple(_fraction("sparsity", value) for value in values)
        names = [member_name(value) for value in found]
        if (twice := next((name for name in names if names.count(name) > 1), None)) is not None:
            raise ConfigError(
                f"sparsity has two values for the folder {twice}: {sparsity_text(found)}; leave one of them out"
            )
        many = isinstance(self.sparsity, (list, tuple)) and (self.is_structured or len(found) > 1)
        self.sparsity = found if many else found[0]

    def _named_sparsities(self, asked: Mapping) -> dict[str, float]:
        """A mapping of sparsities, checked as far as it can be without a model."""
        if not asked:
            raise ConfigError("sparsity is an empty mapping: give a number, or name parts, such as {'mlp': 0.6}")
        for key in asked:
            if not isinstance(key, str) or not key.strip():
                raise ConfigError(f"a key of sparsity must be a name or a pattern, got {key!r}")
        found = {key.strip(): _fraction(f"sparsity of {key.strip()}", value) for key, value in asked.items()}
        if all(key in found for key in REST):
            raise ConfigError("sparsity names the rest twice, by * and by default; leave one of them out")
        other = {"heads": MLP, "neurons": ATTENTION}.get(self.pattern)
        if other in found:
            raise ConfigError(
                f"sparsity {other}={found[other]:g} would do nothing: pattern={self.pattern!r} leaves the {other} "
                "alone; pattern='structured' removes both heads (attention) and neurons (mlp)"
            )
        if self.is_structured and self.structured.allocation == "global":
            raise ConfigError(
                f"allocation='global' shares out one sparsity over all blocks, got {sparsity_text(found)}; give a "
                "number, or allocation='uniform'"
            )
        return found

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


SECTIONS = {
    "calibration": Calibration,
    "evaluation": Evaluation,
    "reconstruction": Reconstruction,
    "structured": Structured,
}


def from_dict(cls, values: dict, where: str = "config"):
    """Dataclass from a mapping; an unknown field is a :class:`ConfigError` that names the nearest one."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping of fields, got {type(values).__name__}")
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            raise ConfigError(
                f"unknown field {key!r} in {where}"
                + (f"; did you mean {near[0]!r}?" if near else f"; fields are {', '.join(names)}")
            )
    hints = typing.get_type_hints(cls)
    paths = {key: str(v) for key, v in values.items() if isinstance(v, Path) and str in members(hints[key])}
    values = {**values, **paths}
    for key, value in values.items():
        _check_type(f"{where}.{key}", value, hints[key])
    return cls(**values)


def _check_type(name: str, value, hint) -> None:
    """Refuse a YAML value of another type than the field's (a string where a number belongs, say)."""
    options = members(hint)
    plain = {int: (int,), float: (int, float), str: (str,), bool: (bool,)}
    if any(o not in plain and o is not type(None) for o in options):
        return
    allowed = tuple(t for o in options if o in plain for t in plain[o])
    if value is None and type(None) in options:
        return
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        kinds = " or ".join(o.__name__ for o in options if o in plain)
        raise ConfigError(f"{name} must be {kinds}, got {value!r} ({type(value).__name__})")


def _plain(value):
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise ConfigError(
        f"a {type(value).__name__} cannot be written to YAML; give a path instead, so that the run can "
        "be repeated from its file"
    )


def to_dict(config) -> dict:
    """Plain nested dict of a configuration, ready for YAML or JSON."""
    return _plain(config)


def to_yaml(config: PruneConfig) -> str:
    """YAML text that :func:`from_yaml` turns back into an equal configuration."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False)


def override(base: PruneConfig | str | Path | None, values: dict) -> PruneConfig:
    """A configuration, or the YAML file of one, with the fields of a nested mapping put in their places.

    What the base set and the new fields leave without effect returns to its default; a field of ``values`` that would
    do nothing is a :class:`ConfigError`.
    """
    if base is None:
        return from_dict(PruneConfig, values)
    base = base if isinstance(base, PruneConfig) else from_yaml(base)
    merged = {key: dict(vars(value)) if key in SECTIONS else value for key, value in vars(base).items()}
    if base.inputs == base.usual_inputs:
        merged["inputs"] = None  # the new fields may have other usual ones
    for key, value in values.items():
        merged[key] = {**merged[key], **value} if key in SECTIONS and isinstance(value, dict) else value
    while True:
        try:
            return from_dict(PruneConfig, merged)
        except Unused as error:
            section, _, name = error.field.rpartition(".")
            given = values.get(section, {}) if section else values
            if not isinstance(given, dict) or name in given:
                raise
            del (merged[section] if section else merged)[name]


def from_yaml(text_or_path: str | Path) -> PruneConfig:
    """Configuration from YAML text or the path of a YAML file."""
    return from_dict(PruneConfig, read_yaml(text_or_path))


def read_yaml(text_or_path: str | Path) -> dict:
    """The mapping in YAML text or in a YAML file. Raises ConfigError if there is no such file or no mapping in it."""
    import yaml

    text = str(text_or_path)
    if "\n" not in text:
        path = Path(text)
        if not path.is_file():
            raise ConfigError(f"no such configuration file: {text}")
        text = path.read_text()
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config must be a mapping of fields, got {type(values).__name__}")
    return values
