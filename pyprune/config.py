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
from dataclasses import dataclass, field
from pathlib import Path

from pyprune import effects

METHODS = ("magnitude", "wanda", "sparsegpt")
STRUCTURED_PATTERNS = ("neurons", "heads", "structured")
CRITERIA = ("random", "magnitude", "activation", "wifv", "taylor", "fisher", "obs", "obs_greedy")
LAYERWISE = ("layer", "refit")
WEIGHT_RECONSTRUCTIONS = ("none", *LAYERWISE, "block", "cross_block")
STRUCTURED_RECONSTRUCTIONS = ("none", "bias", "mask_tuning", "liar")
DTYPES = ("auto", "float32", "bfloat16", "float16")
TOKEN_WEIGHTS = ("auto", "relative", "balanced", "uniform")
BACKENDS = ("cuda", "triton", "cpu", "reference")
OPS = ("gram_update", "cross_gram_update", "column_moments", "select_mask", "nm_mask", "compress_24", "expand_24",
       "obs_sweep", "trailing_update", "cholesky", "cholesky_solve", "liar_update", "linear")
"""The functions of :mod:`pyprune.ops`."""
MAX_COLUMN_BLOCK = 1024
"""Columns that :func:`pyprune.ops.obs_sweep` takes, on every back-end."""
WINDOW = 1024
"""Tokens of an evaluation window where none were asked for."""
STREAMING = ("auto", "always", "never")
SAMPLES, TOKENS, WINDOW = 64, 512, 1024
"""Sequences of calibration text, tokens of each, tokens of an evaluation window, where nothing else is asked."""


class ConfigError(ValueError):
    """Bad input: one clear sentence with the value and the way out. The command line exits with code 2 on it."""


class Unused(ConfigError):
    """A field that was set and would do nothing."""

    def __init__(self, field: str, sentence: str):
        super().__init__(sentence)
        self.field = field


def check_effects(settings, rules: dict[str, effects.Rule], section: str = "") -> None:
    """Raise :class:`Unused` for the first field that was set and would do nothing."""
    if (found := effects.idle(settings, rules, section)) is not None:
        raise Unused(*found)


def _choose(name: str, value, allowed) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}{hint}")


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


def _positive(owner, *names: str, minimum: int = 1) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool) or value < minimum):
            raise ConfigError(f"{name} must be at least {minimum}, got {value!r}")


def parse_nm(pattern: str) -> tuple[int, int] | None:
    """``"2:4"`` → ``(2, 4)``; None for a pattern that is not N:M."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    return (int(match[1]), int(match[2])) if match else None


@dataclass(kw_only=True)
class Calibration:
    """Token sequences that the statistics and the reconstruction are computed from."""

    source: typing.Any = None
    """Hub data set id, local ``.txt``/``.jsonl``/``.json``/``.csv``/``.parquet``/``.npy`` path, list of texts, or int
    tensor of token ids ``[samples, tokens]``; None: the Python documentation on this machine (no network)."""
    num_samples: int | None = None
    """Sequences asked for; fewer available is an error, never a silent shortfall. None: 64, of token ids all rows."""
    seq_len: int | None = None
    """Tokens a sequence (encoders: the most tokens a sentence keeps). None: 512, of token ids whole rows; rows are cut
    to fewer, and more than they have is an error."""
    seed: int | None = None
    """Seed of the choice of sequences and of self-generation; None: the run's seed."""
    split: str = "train"
    """Split of a data set."""
    subset: str | None = None
    """Configuration name of a Hub data set."""
    text_column: str | None = None
    """Column that holds the text (several: comma-separated); None finds it."""
    self_generated: int = 0
    """Sequences sampled from the dense model itself and added to the corpus samples (paper R)."""
    self_generated_path: str | None = None
    """jsonl of ``pyprune generate`` to reuse or to write; None keeps them in memory."""
    self_generated_for: str = "reconstruction"
    """``reconstruction``: only BR/CR see them; ``all``: masks and layer-wise statistics too."""
    language: str | None = None
    """Keep only generated text that a detector says is this language (ISO code); None keeps all."""
    held_out: int = 4
    """Sequences set aside from the same source to measure generalisation; never used to fit anything."""

    def __post_init__(self):
        if self.num_samples == 0 and not self.self_generated:
            raise ConfigError("num_samples is 0 and self_generated is 0: there is nothing to calibrate on")
        _positive(self, "num_samples", "self_generated", "held_out", minimum=0)
        _positive(self, "seq_len", minimum=2)
        _choose("self_generated_for", self.self_generated_for, ("reconstruction", "all"))
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
    """One source or a list of sources, as ``Calibration.source``; None: the held-out part of the Python docs."""
    window: int | None = None
    """Tokens a window; windows do not overlap. None: 1,024, or as many as the model has positions; of token ids whole
    rows. Rows are cut to fewer, and more than they have is an error."""
    max_windows: int | None = 24
    """At most this many windows a text; None takes all."""
    dtype: str = "auto"
    """Type of the forward passes; ``auto`` is the model's own on a GPU, bfloat16 on a CPU that has it."""
    batch_size: int = 1
    """Windows a forward pass."""
    bos: bool = True
    """Start every window with the tokenizer's BOS if it starts texts with one; False is the papers' convention."""
    split: str = "test"
    """Split of a data set."""
    subset: str | None = None
    """Configuration name of a Hub data set."""
    text_column: str | None = None
    """Column that holds the text (several: comma-separated); None finds it."""
    enabled: bool = True
    """Measure perplexity before and after."""

    def __post_init__(self):
        _positive(self, "window", minimum=2)
        _positive(self, "max_windows", "batch_size")
        _choose("evaluation dtype", self.dtype, DTYPES)
        check_effects(self, effects.EVALUATION, "evaluation")

    @property
    def tokens(self) -> int:
        """Tokens a window of text."""
        return self.window or WINDOW


@dataclass(kw_only=True)
class Reconstruction:
    """Settings of BR, GP and CR (paper R, arXiv 2406.15524); the defaults are the authors', smaller in epochs."""

    epochs: int = 5
    """Passes over the calibration sequences, a block."""
    lr: float = 2e-4
    """AdamW's learning rate, falling to zero: the authors' for 320 steps a block; for about 50, 6e-4 is better."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    batch_size: int = 8
    """Sequences an optimiser step."""
    micro_batch_size: int | None = None
    """Sequences a forward-backward; smaller than ``batch_size`` accumulates gradients. None: batch_size."""
    autocast: str = "auto"
    """Type of the products while training: ``auto`` (bfloat16 on a GPU, ``compute_dtype`` elsewhere), ``float32``,
    ``bfloat16``. Masters stay float32."""
    early_stop: bool = False
    """Stop a block when its held-out error has not fallen for an epoch."""
    select: str = "last"
    """``last`` keeps the last step; ``validation`` keeps, per block, the step whose held-out error is lowest."""
    layerwise_target: str = "local"
    """What the layer-wise step ahead of block training fits: ``local``, a layer's dense output on pruned inputs;
    ``dense``, its output in the dense stream (cross Gram, GP)."""

    def __post_init__(self):
        self.betas = tuple(self.betas)
        _positive(self, "epochs", minimum=0)
        _positive(self, "batch_size", "micro_batch_size")
        _choose("autocast", self.autocast, ("auto", "float32", "bfloat16"))
        _choose("select", self.select, ("last", "validation"))
        _choose("layerwise_target", self.layerwise_target, ("local", "dense"))
        if not self.lr > 0:
            raise ConfigError(f"lr must be above 0, got {self.lr!r}")


@dataclass(kw_only=True)
class Structured:
    """Settings of structured pruning (LIAR, arXiv 2407.13331)."""

    allocation: str = "uniform"
    """``uniform``: same width in every block, a standard checkpoint; ``global``: FLAP's, per-block sizes."""
    damping: float | None = None
    """λ relative to the mean diagonal; None chooses it on held-out calibration tokens."""
    interpolate: str = "both"
    """LIAR's ablation: ``both``, ``weight`` or ``bias``."""
    interpolate_weights: bool = False
    """Write the dropped weights as a linear map of the kept ones (the paper's P)."""
    token_weights: str = "auto"
    """``uniform``: the papers' least squares; ``relative``: a token's error counts by the size of its own output, so
    that the few tokens on which a neuron is huge do not decide the fit; ``balanced``: half relative to the token's
    residual stream, half uniform; ``auto``: relative where a layer norm follows the residual sum at once (BERT),
    balanced elsewhere, uniform for experts."""
    head_scope: str = "groups"
    """``groups``: whole key/value groups; ``queries``: query heads inside groups, equally many per group."""
    nonstandard: str = "refuse"
    """What a stock config cannot say: ``refuse``, ``save`` (for ``pyprune.load``) or ``pad`` (zeros, stock tools)."""

    def __post_init__(self):
        _choose("allocation", self.allocation, ("uniform", "global"))
        _choose("interpolate", self.interpolate, ("both", "weight", "bias"))
        _choose("token_weights", self.token_weights, TOKEN_WEIGHTS)
        _choose("head_scope", self.head_scope, ("groups", "queries"))
        _choose("nonstandard", self.nonstandard, ("refuse", "save", "pad"))


@dataclass(kw_only=True)
class PruneConfig:
    """One run of ``pyprune.prune``, whole."""

    model: str | None = None
    """Hub id, local folder, ``.gguf`` file, or the name of a packaged model (``smollm2-135m``)."""
    output: str | None = None
    """Folder to write; None keeps the result in memory."""
    method: str = "sparsegpt"
    """How weights are chosen: magnitude, wanda, sparsegpt (unstructured and N:M)."""
    pattern: str = "unstructured"
    """``unstructured``, ``N:M``, or structured: ``neurons``, ``heads``, ``structured`` (both)."""
    sparsity: float | typing.Sequence[float] | None = None
    """Fraction of zeros (structured: of the groups dropped; a list gives the curve). None: 0.5, or 1 − N/M."""
    criterion: str = "wifv"
    """Structured: how neurons and heads are chosen."""
    reconstruct: str | None = None
    """Masks: none; layer, a one-sided OBS sweep (a column's error is made up for by later columns only); refit, the
    least-squares weights on the mask; block and cross_block, which sweep and then train (None: layer for sparsegpt,
    else none). Structured: none, bias, mask_tuning, liar."""
    global_propagation: bool = False
    """Reconstruct against the dense model's own stream (paper R's GP)."""
    inputs: str = "propagated"
    """Statistics from the ``propagated`` pruned prefix (two passes a block) or the ``dense`` stream (one)."""
    targets: list[str] = field(default_factory=list)
    """Only weights that one of these names: whole components (``mlp``, ``layers.1``, ``experts.down_proj[3]``),
    wildcards (``*_proj``) or ``re:`` and a regular expression; empty: every matrix of every block. Layers that route
    tokens to experts stay dense unless a pattern matches nothing else."""
    ignore: list[str] = field(default_factory=list)
    """Weights to leave dense, named the same way. A pattern that matches nothing is an error."""
    damping: float = 0.01
    """λ of the OBS sweep relative to the mean diagonal of H."""
    column_block: int = 128
    """Columns a block of the sweep."""
    batch_size: int | None = None
    """Sequences a forward pass; None: about 8,192 tokens."""
    dtype: str = "auto"
    """Type the weights are loaded in; auto: the checkpoint's own."""
    compute_dtype: str = "auto"
    """Type of the forward passes; auto: the weights' own. bfloat16 is about four times as fast on CPUs that have it."""
    device: str = "auto"
    """Where blocks are computed: auto (a GPU if there is one), cpu, cuda, cuda:1."""
    backend: str = "auto"
    """Back-end of every op: auto, cuda, triton, cpu, reference; an op that it does not have takes auto's, and the run
    says so. By op, for those who measure: ``obs_sweep=cuda,gram_update=triton``, or ``cuda,linear=reference``."""
    seed: int = 0
    """Seed of every random choice; the same seed gives the same result, bit for bit, on the same machine."""
    probe_samples: int = 2
    """Calibration sequences (and as many held-out) whose block error against the dense stream is measured."""
    memory_budget_gb: float | None = None
    """Host memory for activations; above it they go to a memory-mapped file. None: half of what is free."""
    stream: str = "auto"
    """Read weights block by block from safetensors instead of loading the model: auto, always, never."""
    calibration: Calibration = field(default_factory=Calibration)
    evaluation: Evaluation = field(default_factory=Evaluation)
    reconstruction: Reconstruction = field(default_factory=Reconstruction)
    structured: Structured = field(default_factory=Structured)

    def __post_init__(self):
        for name, cls in _SECTIONS.items():
            value = getattr(self, name)
            if isinstance(value, dict):
                setattr(self, name, from_dict(cls, value, name))
            elif not isinstance(value, cls):
                raise ConfigError(f"{name} must be a {cls.__name__} or a mapping, got {type(value).__name__}")
        if self.calibration.seed is None:
            self.calibration = dataclasses.replace(self.calibration, seed=self.seed)
        _choose("inputs", self.inputs, ("propagated", "dense"))
        _choose("dtype", self.dtype, DTYPES)
        _choose("compute_dtype", self.compute_dtype, DTYPES)
        parse_backend(self.backend)
        _choose("stream", self.stream, STREAMING)
        _positive(self, "batch_size", "column_block")
        if self.column_block > MAX_COLUMN_BLOCK:
            raise ConfigError(f"column_block must be at most {MAX_COLUMN_BLOCK}, what a sweep takes at once, got "
                              f"{self.column_block}")
        _positive(self, "probe_samples", "seed", minimum=0)
        if not self.damping > 0:
            raise ConfigError(f"damping must be above 0, got {self.damping!r}")
        self._check_pattern()
        if self.is_structured:
            self.reconstruct = self.reconstruct or "liar"
            _choose("criterion", self.criterion, CRITERIA)
            _choose(f"reconstruct for pattern {self.pattern!r}", self.reconstruct, STRUCTURED_RECONSTRUCTIONS)
        else:
            _choose("method", self.method, METHODS)
            self.reconstruct = self.reconstruct or ("layer" if self.method == "sparsegpt" else "none")
            _choose(f"reconstruct for pattern {self.pattern!r}", self.reconstruct, WEIGHT_RECONSTRUCTIONS)
        if self.global_propagation and self.inputs == "dense":
            raise ConfigError("global_propagation needs inputs='propagated': it corrects the pruned stream")
        self._check_reconstruction()
        check_effects(self, effects.RUN)

    def _check_reconstruction(self) -> None:
        trains = self.reconstruct in ("block", "cross_block")
        if trains and self.inputs == "dense":
            raise ConfigError(f"reconstruct={self.reconstruct!r} needs inputs='propagated': it trains on the pruned "
                              "stream")
        if self.reconstruction.layerwise_target == "dense" and not self.global_propagation:
            raise ConfigError("layerwise_target='dense' needs global_propagation: it is the dense stream's outputs")
        if self.calibration.self_generated and self.calibration.num_samples == 0 \
                and self.calibration.self_generated_for != "all":
            raise ConfigError("num_samples is 0: masks and layer-wise statistics have nothing to come from; set "
                              "self_generated_for='all' to use the self-generated sequences for them too")
        if self.calibration.self_generated and self.calibration.self_generated_for == "reconstruction" \
                and not trains:
            raise ConfigError(f"nothing would use the {self.calibration.self_generated} self-generated sequences: "
                              f"reconstruct is {self.reconstruct!r}; set self_generated_for='all', or reconstruct="
                              "'block' or 'cross_block'")

    def _check_pattern(self) -> None:
        nm = self.nm
        if nm is None and self.pattern not in ("unstructured", *STRUCTURED_PATTERNS):
            raise ConfigError(f"pattern must be unstructured, N:M (2:4, 4:8), {', '.join(STRUCTURED_PATTERNS)}, "
                              f"got {self.pattern!r}")
        if nm is not None:
            n, m = nm
            if not 0 < n < m or m > 16:
                raise ConfigError(f"pattern {self.pattern!r}: N non-zeros in every M weights needs 0 < N < M ≤ 16"
                                  + (f"; did you mean '{m}:{n}'?" if 0 < m < n <= 16 else ""))
            implied = 1 - n / m
            if self.sparsity is None:
                self.sparsity = implied
            elif isinstance(self.sparsity, (list, tuple)) or abs(float(self.sparsity) - implied) > 1e-9:
                raise ConfigError(f"sparsity {self.sparsity} contradicts pattern {self.pattern!r}, which is sparsity "
                                  f"{implied:g}; leave sparsity out or choose another pattern")
        if self.sparsity is None:
            self.sparsity = 0.5
        values = self.sparsity if isinstance(self.sparsity, (list, tuple)) else [self.sparsity]
        if isinstance(self.sparsity, (list, tuple)) and not self.is_structured:
            raise ConfigError("a list of sparsities is for structured patterns; run the others one by one")
        if not values:
            raise ConfigError("sparsity is an empty list")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ConfigError(f"sparsity must be in [0, 1), the fraction of zeros, got {value!r}"
                                  + (f"; did you mean {value / 100:g}?" if isinstance(value, (int, float))
                                     and 5 <= value < 100 else ""))
        many = isinstance(self.sparsity, (list, tuple))
        self.sparsity = tuple(float(v) for v in values) if many else float(self.sparsity)

    @property
    def sparsities(self) -> tuple[float, ...]:
        """Every sparsity asked for; usually one."""
        return self.sparsity if self.is_curve else (self.sparsity,)

    @property
    def is_curve(self) -> bool:
        """Several sparsities were asked for, in a list, even if it holds one."""
        return isinstance(self.sparsity, tuple)

    @property
    def nm(self) -> tuple[int, int] | None:
        """(N, M) of an N:M pattern, else None."""
        return parse_nm(self.pattern) if isinstance(self.pattern, str) else None

    @property
    def is_structured(self) -> bool:
        return self.pattern in STRUCTURED_PATTERNS


_SECTIONS = {"calibration": Calibration, "evaluation": Evaluation, "reconstruction": Reconstruction,
             "structured": Structured}


def from_dict(cls, values: dict, where: str = "config"):
    """Dataclass from a mapping; an unknown field is a :class:`ConfigError` that names the nearest one."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping of fields, got {type(values).__name__}")
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            raise ConfigError(f"unknown field {key!r} in {where}" + (f"; did you mean {near[0]!r}?" if near else
                                                                     f"; fields are {', '.join(names)}"))
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        _check_type(f"{where}.{key}", value, hints[key])
    return cls(**values)


def _check_type(name: str, value, hint) -> None:
    """Refuse a YAML value of another type than the field's (a string where a number belongs, say)."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
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
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise ConfigError(f"a {type(value).__name__} cannot be written to YAML; give a path instead, so that the run can "
                      "be repeated from its file")


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
    merged = {key: dict(vars(value)) if key in _SECTIONS else value for key, value in vars(base).items()}
    for key, value in values.items():
        merged[key] = {**merged[key], **value} if key in _SECTIONS and isinstance(value, dict) else value
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
    return from_dict(PruneConfig, values)
