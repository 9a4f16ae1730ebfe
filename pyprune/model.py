"""The only file that knows Hugging Face architectures: embeddings, blocks, prunable weights.

Structure is discovered, not tabulated: the blocks are the module list that holds most of the parameters, the
prunable weights of a block are the 2-D weights of its linear layers and the slices of its 3-D expert parameters, and
whatever the model's own forward hands to a block (masks, position embeddings, per-layer attention kinds) is recorded
by running that forward with every block replaced by a recorder.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyprune.arguments import Arguments, Tokenwise, find_tokenwise, probe_batches, tidy
from pyprune.config import ConfigError


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's ``Conv1D``: a linear layer whose weight is stored ``[in, out]``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


@dataclass(frozen=True)
class WeightRef:
    """One prunable matrix of a block, found again in any copy of that block by its path."""

    path: str
    """Parameter path inside the block, ``self_attn.q_proj.weight``."""
    transposed: bool = False
    """The parameter is stored ``[in, out]`` (Conv1D)."""
    expert: int | None = None
    """Slice of a 3-D parameter ``[experts, out, in]``."""

    @property
    def name(self) -> str:
        return self.path if self.expert is None else f"{self.path}[{self.expert}]"

    @property
    def module_path(self) -> str:
        return self.path.rpartition(".")[0]

    def parameter(self, block: nn.Module) -> nn.Parameter:
        return block.get_parameter(self.path)

    def view(self, block: nn.Module) -> Tensor:
        """The matrix ``[out, in]`` as a view of the block's parameter: writing to it writes the parameter."""
        weight = self.parameter(block).data
        weight = weight if self.expert is None else weight[self.expert]
        return weight.T if self.transposed else weight


def weights_of(block: nn.Module) -> list[WeightRef]:
    """Every prunable matrix of a block, in module order: linear layers, and each expert of fused experts."""
    refs = []
    for name, module in block.named_modules():
        prefix = f"{name}." if name else ""
        if is_linear(module):
            refs.append(WeightRef(prefix + "weight", transposed=_is_conv1d(module)))
        else:
            for key, parameter in module.named_parameters(recurse=False):
                if _is_expert_matrix(module, key, parameter):
                    refs += [WeightRef(prefix + key, expert=e) for e in range(parameter.shape[0])]
    return refs


def _is_expert_matrix(module: nn.Module, key: str, parameter: Tensor) -> bool:
    """3-D ``[experts, out, in]`` weights that the module multiplies by ``F.linear`` one expert at a time."""
    return parameter.ndim == 3 and hasattr(module, "num_experts") and not getattr(module, "is_transposed", False) \
        and parameter.shape[0] == module.num_experts and "bias" not in key


def uncovered(block: nn.Module, refs: Iterable[WeightRef]) -> list[str]:
    """Names of the block's matrix parameters (2-D or more) that no reference covers: routers, convolutions, …"""
    covered = {ref.path for ref in refs}
    return [name for name, p in block.named_parameters() if p.ndim >= 2 and name not in covered]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and module list of the transformer blocks: the list that holds most parameters.

    Raises ConfigError if the model has no such list, or is an encoder–decoder.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ConfigError(f"{type(model).__name__} is an encoder–decoder; pyprune prunes decoder-only and encoder-only "
                          "models")
    found = [(sum(p.numel() for p in module.parameters()), name, module) for name, module in model.named_modules()
             if isinstance(module, nn.ModuleList) and len(module) and all(map(weights_of, module))]
    if not found:
        raise ConfigError(f"{type(model).__name__} has no list of transformer blocks with linear layers; give a "
                          "Hugging Face decoder or encoder")
    _, name, blocks = max(found, key=lambda item: item[0])
    return name, blocks


def matches(name: str, patterns: Iterable[str]) -> bool:
    """True if a pattern is part of the name or fnmatch-es it."""
    return any(p in name or fnmatch.fnmatch(name, p) for p in patterns)


def select_weights(view: ModelView, targets: list[str], ignore: list[str]) -> list[list[WeightRef]]:
    """Per block, the weights to prune. A pattern that matches nothing is a ConfigError that lists what exists."""
    refs = [weights_of(block) for block in view.blocks]
    names = [view.name(i, ref) for i, block in enumerate(refs) for ref in block]
    for field, patterns in (("targets", targets), ("ignore", ignore)):
        for pattern in patterns:
            if not any(matches(name, [pattern]) for name in names):
                outside = [n for n, _ in view.model.named_parameters(remove_duplicate=False) if matches(n, [pattern])]
                if outside and field == "ignore":
                    continue  # the embedding, the head and norms are dense anyway: asking for that is no mistake
                kinds = sorted({ref.path for block in refs for ref in block})
                hint = f"it names {outside[0]}, which lies outside the blocks" if outside else "it matches nothing"
                raise ConfigError(f"{field} pattern {pattern!r} selects no prunable weight: {hint}; prunable in each "
                                  f"block: {', '.join(kinds)}")
    return [[ref for ref in block if (not targets or matches(view.name(i, ref), targets))
             and not matches(view.name(i, ref), ignore)] for i, block in enumerate(refs)]


class _Stop(Exception):
    """Ends a forward pass early; carries what was reached."""

    def __init__(self, value=None):
        self.value = value


class _Recorder(nn.Module):
    """Stands in for a block: keeps the arguments it was called with and passes the hidden states through."""

    def __init__(self, block: nn.Module, calls: list, last: bool = False, given=None, disturbed: bool = False):
        """last: end the forward pass here. given: returned in place of the hidden states. disturbed: return other
        states than came in."""
        super().__init__()
        self.given, self.disturbed = given, disturbed
        object.__setattr__(self, "_block", block)  # not a submodule: the model must not see it twice
        self.calls, self.last = calls, last

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block, name)  # models read attributes such as ``attention_type`` off their blocks

    def forward(self, *args, **kwargs):
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        self.calls.append((hidden, args, kwargs))
        if self.last:
            raise _Stop(hidden)
        if self.disturbed:
            return 2 * hidden.flip(-1) + 1
        return hidden if self.given is None else self.given


def call_block(block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """Output hidden states of a block, whatever it wraps them in."""
    out = block(hidden, *arguments.args, **arguments.kwargs)
    return out[0] if isinstance(out, tuple) else out


class ModelView:
    """A Hugging Face model seen as embeddings, a list of blocks, and the rest."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.path, self.blocks = find_blocks(model)
        self.is_encoder = not predicts_next_token(model)
        """It reads whole texts: an encoder, but also a classifier, reward or embedding model on a decoder's blocks. Its
        calibration text is not packed into pieces of equal length, and it has no perplexity."""

    def name(self, index: int, ref: WeightRef) -> str:
        """Full name of a weight in the model, ``model.layers.3.self_attn.q_proj.weight``."""
        return f"{self.path}.{index}.{ref.name}"

    def coverage(self, selected: list[list[WeightRef]]) -> dict:
        """Share of the blocks' matrix parameters that is pruned, and the names of what is not."""
        total = pruned = 0
        skipped = []
        for i, (block, refs) in enumerate(zip(self.blocks, selected)):
            total += sum(p.numel() for p in block.parameters() if p.ndim >= 2)
            pruned += sum(ref.view(block).numel() for ref in refs)
            chosen = set(refs)
            skipped += [self.name(i, ref) for ref in weights_of(block) if ref not in chosen]
            skipped += [f"{self.path}.{i}.{name}" for name in uncovered(block, weights_of(block))]
        return {"fraction": pruned / max(total, 1), "pruned": pruned, "total": total, "skipped": skipped}

    @functools.cached_property
    def tokenwise(self) -> Tokenwise:
        """Which arguments of the blocks depend on the tokens, found by recording different ones; costs three small
        embeddings. Raises ConfigError for a model whose blocks cannot be run apart from it."""
        embedding = self.model.get_input_embeddings()
        device = next(embedding.parameters()).device
        batches = probe_batches(self.model.config, embedding.num_embeddings)
        return find_tokenwise(type(self.model).__name__, self.record, tuple(ids.to(device) for ids in batches))

    @torch.no_grad()
    def record(self, input_ids: Tensor, disturbed: bool = False) -> tuple[Tensor, list[Arguments]]:
        """First-block input ``[batch, tokens, hidden]`` and each block's arguments, for unpadded ids of one length.

        Runs the model's own forward with recorders in place of the blocks, so masks, rotary embeddings and per-layer
        attention kinds are the model's own; costs the embedding only. disturbed: the stand-ins change the states, so
        that arguments computed from earlier blocks show.
        """
        calls: list = []
        last, name = len(self.blocks) - 1, type(self.model).__name__
        with contextlib.suppress(_Stop):
            self._forward(input_ids, [_Recorder(block, calls, last=i == last, disturbed=disturbed)
                                      for i, block in enumerate(self.blocks)])
        if len(calls) != len(self.blocks):
            raise ConfigError(f"{name} called {len(calls)} of its {len(self.blocks)} blocks in one forward pass; its "
                              "block order cannot be followed")
        return calls[0][0], [tidy(name, i, Arguments(args, kwargs)) for i, (_, args, kwargs) in enumerate(calls)]

    @torch.no_grad()
    def complete(self, input_ids: Tensor, outputs):
        """The model's output when its last block returns ``outputs``: final norm and head, no block runs."""
        last = len(self.blocks) - 1
        return self._forward(input_ids, [_Recorder(block, [], given=outputs if i == last else None)
                                         for i, block in enumerate(self.blocks)])

    def _forward(self, input_ids: Tensor, stand_ins: list[nn.Module]):
        """The model's own forward with others in place of its blocks."""
        originals = list(self.blocks)
        try:
            for i, module in enumerate(stand_ins):
                self.blocks[i] = module
            with uncached(self.model) as options:
                return self.model(input_ids, **options)
        finally:
            for i, block in enumerate(originals):
                self.blocks[i] = block


@contextlib.contextmanager
def uncached(model: nn.Module) -> Iterator[dict]:
    """The model makes no cache for the duration, whatever its head: its configurations say so, and so do the options
    yielded, to be passed to its forward where that has the parameter."""
    configs = {id(m.config): m.config for m in model.modules()
               if getattr(getattr(m, "config", None), "use_cache", False)}
    try:
        for config in configs.values():
            config.use_cache = False
        yield {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    finally:
        for config in configs.values():
            config.use_cache = True


def read_on(model: nn.Module, tokens: Tensor, cache=None) -> tuple[Tensor, object]:
    """Logits ``[batch, tokens, vocabulary]`` of tokens that follow those in ``cache`` (None: there are none), and the
    cache with them in it; None of a model that gives no cache back."""
    parameters = inspect.signature(model.forward).parameters
    name = next((n for n in ("cache", "past_key_values", "cache_params") if n in parameters), None)
    out = model(tokens, use_cache=True, **({name: cache} if name else {}))
    return out.logits, getattr(out, name or "cache", None)


def predicts_next_token(model: nn.Module) -> bool:
    """Whether the model is a causal language model: its tokens see none after them, and its head gives logits over the
    vocabulary. Calibration text, perplexity, generation and gradients go by this."""
    return is_causal(model) and getattr(model, "get_output_embeddings", lambda: None)() is not None


def is_causal(model: nn.Module) -> bool:
    """Whether a token sees only itself and those before it.

    The attention modules say it themselves. Where none does (recurrent models, a few old ones) the configuration or the
    kinds of models made of it do.
    """
    config = getattr(model, "config", None)
    texts = [config, getattr(config, "get_text_config", lambda: None)()]
    if getattr(config, "is_encoder_decoder", False) or any(getattr(c, "is_causal", None) is False for c in texts):
        return False
    said = [module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    if said:
        return any(said)
    import transformers

    if getattr(config, "is_decoder", False):
        return True
    if type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING:
        return False
    return type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or type(model).__name__.endswith("ForCausalLM")


def check_apart(*views: ModelView) -> None:
    """Refuse models whose blocks cannot be run apart from them (:attr:`ModelView.tokenwise`)."""
    for view in views:
        view.tokenwise.numbers([])


def check_finite(view: ModelView, index: int, refs: list[WeightRef]) -> None:
    """Refuse a weight that holds NaN or infinity, with its place."""
    for ref in refs:
        weight = ref.view(view.blocks[index])
        if not bool(torch.isfinite(weight).all()):
            row, column = (~torch.isfinite(weight)).nonzero()[0].tolist()
            raise ConfigError(f"{view.name(index, ref)} holds {weight[row, column].item()} at [{row}, {column}]; "
                              "the checkpoint is damaged or overflowed in its dtype")
