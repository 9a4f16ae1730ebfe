"""A Hugging Face model as pyprune sees it: its blocks, and the prunable weights in them.

Structure is discovered, not tabulated: the blocks are the module list that holds most of the parameters, the
prunable weights of a block are the 2-D weights of its linear layers and the slices of its 3-D expert parameters
(:mod:`pyprune.model.routing` tells what routes to them), and what the model's own forward hands to its blocks, in which
order, is recorded (:mod:`pyprune.model.recording`). What cannot be discovered goes by names, which stand in
:mod:`pyprune.model.attributes` and :mod:`pyprune.model.sizes`.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyprune.config import ConfigError
from pyprune.model.attributes import find_embedding, output_layer, quantisation, text_config
from pyprune.model.names import matches
from pyprune.model.recording import Recorded
from pyprune.model.routing import expert_matrices
from pyprune.model.routing import routers as routing_layers

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's ``Conv1D``: a linear layer whose weight is stored ``[in, out]``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


@dataclass(frozen=True)
class WeightRef:
    """One prunable matrix of a block, found again in any copy of that block by its path."""

    path: str
    """Parameter path inside the block, ``self_attn.q_proj.weight``."""
    transposed: bool = False
    """The parameter, or the expert's slice of it, is stored ``[in, out]`` (Conv1D, Llama 4, GPT-OSS)."""
    expert: int | None = None
    """Slice of a 3-D parameter, the experts first."""

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


def weights_of(block: nn.Module, routers: bool = False) -> list[WeightRef]:
    """Every prunable matrix of a block, in module order: linear layers, and each expert of fused experts.

    routers: also the linear layers that route tokens to experts, which stay dense unless they are asked for by name.
    A matrix that several modules share is there once.
    """
    refs, known = [], set()
    left = set() if routers else routing_layers(block)
    for name, module in block.named_modules():
        prefix = f"{name}." if name else ""
        if is_linear(module):
            if name not in left and id(module.weight) not in known:
                known.add(id(module.weight))
                refs.append(WeightRef(prefix + "weight", transposed=is_conv1d(module)))
            continue
        for key, transposed in expert_matrices(module).items():
            refs += [WeightRef(prefix + key, transposed, expert) for expert in range(module.num_experts)]
    return refs


def _matrices(block: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters of two dimensions or more that are no biases of experts."""
    return [(name, p) for name, p in block.named_parameters() if p.ndim >= 2 and not name.endswith("bias")]


def uncovered(block: nn.Module, refs: Iterable[WeightRef]) -> list[str]:
    """Names of the block's matrix parameters (2-D or more) that no reference covers: routers, convolutions, …"""
    covered = {ref.path for ref in refs}
    return [name for name, _ in _matrices(block) if name not in covered]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and module list of the transformer blocks: the list that holds most parameters.

    Raises ConfigError if the model has no such list, or is an encoder–decoder.
    """
    if not hasattr(model, "config") or find_embedding(model) is None:
        raise ConfigError(
            f"{type(model).__name__} is no Hugging Face model that reads token ids: pyprune prunes "
            "decoder-only and encoder-only language models"
        )
    if any(hasattr(type(module), "packed") for module in model.modules()):
        raise ConfigError(
            f"{type(model).__name__} has packed layers, which hold no weight that could be changed: unpack them with "
            "pyprune.dense(model), or name the packed folder instead of the model"
        )
    if any(hasattr(module, "_rescale_layers") for module in model.modules()):
        raise ConfigError(
            f"{type(model).__name__} rescales its own weights during its forward pass, so that what is "
            "saved would not be what was pruned; pyprune does not prune it"
        )
    # T5's and its kin's encoders alone keep the flag of the whole model
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and any(
        name.rpartition(".")[2] == "decoder" for name, _ in model.named_modules()
    ):
        raise ConfigError(
            f"{type(model).__name__} is an encoder–decoder; pyprune prunes decoder-only and encoder-only models"
        )
    found = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(map(weights_of, module))
    ]
    if not found:
        if is_quantised(model):
            raise ConfigError(
                f"{type(model).__name__} is quantised; prune it in float32, bfloat16 or float16, then "
                "quantise the result"
            )
        raise ConfigError(
            f"{type(model).__name__} has no list of transformer blocks with linear layers; give a "
            "Hugging Face decoder or encoder"
        )
    _, name, blocks = max(found, key=lambda item: item[0])
    return name, blocks


def block_list(model: nn.Module, path: str) -> nn.ModuleList:
    """The blocks of a model whose path (:func:`find_blocks`) is known."""
    found = model.get_submodule(path)
    if not isinstance(found, nn.ModuleList):
        raise TypeError(f"{path} of {type(model).__name__} is a {type(found).__name__}, no list of blocks")
    return found


def is_quantised(model: nn.Module) -> bool:
    """Whether a model's config or the classes of its layers say so."""
    return quantisation(model.config) is not None or any(
        "quant" in f"{type(module).__module__}.{type(module).__name__}".lower() for module in model.modules()
    )


def select_weights(view: ModelView, targets: list[str], ignore: list[str]) -> list[list[WeightRef]]:
    """Per block, the weights to prune. Layers that route to experts are chosen only by a target that matches nothing
    else. A pattern that matches nothing is a ConfigError that lists what exists."""
    refs = [weights_of(block, routers=True) for block in view.blocks]
    plain = [set(weights_of(block)) for block in view.blocks]
    names = {view.name(i, ref): ref in plain[i] for i, block in enumerate(refs) for ref in block}
    for field, patterns in (("targets", targets), ("ignore", ignore)):
        for pattern in patterns:
            if not any(matches(name, [pattern]) for name in names):
                outside = [n for n, _ in view.model.named_parameters(remove_duplicate=False) if matches(n, [pattern])]
                if outside and field == "ignore":
                    continue  # the embedding, the head and norms are dense anyway: asking for that is no mistake
                kinds = sorted({ref.path for block in refs for ref in block})
                hint = f"it names {outside[0]}, which lies outside the blocks" if outside else "it matches nothing"
                parts = sorted({part for name in names for part in name.split(".")})
                if not outside and (near := difflib.get_close_matches(pattern, parts, n=1)):
                    hint += f", did you mean {near[0]!r}?"
                if any(pattern in name for name in names):
                    hint += f" (whole components count; write {f'*{pattern}*'!r} for a part of one)"
                raise ConfigError(
                    f"{field} pattern {pattern!r} selects no prunable weight: {hint}; prunable in each "
                    f"block: {', '.join(kinds)}"
                )
    for_routers = [p for p in targets if not any(names[name] for name in names if matches(name, [p]))]

    def chosen(name: str) -> bool:
        asked = not targets or matches(name, targets) if names[name] else matches(name, for_routers)
        return asked and not matches(name, ignore)

    return [[ref for ref in block if chosen(view.name(i, ref))] for i, block in enumerate(refs)]


class ModelView(Recorded):
    """A Hugging Face model seen as embeddings, a list of blocks, and the rest."""

    def __init__(self, model: nn.Module):
        super().__init__(model, *find_blocks(model), lambda block: [ref.view(block) for ref in weights_of(block)])
        self.is_encoder = not predicts_next_token(model)
        """It reads whole texts: an encoder, but also a classifier, reward or embedding model on a decoder's blocks. Its
        calibration text is not packed into pieces of equal length, and it has no perplexity."""

    @property
    def distinct(self) -> int:
        """Blocks that are not the same module."""
        return len({id(block) for block in self.slots})

    def name(self, index: int, ref: WeightRef) -> str:
        """Full name of a weight in the model, ``model.layers.3.self_attn.q_proj.weight``."""
        return self.full_name(index, ref.name)

    def full_name(self, index: int, name: str) -> str:
        """Name in the model of what is called ``name`` in block ``index``."""
        return f"{self.path}.{name}" if self.shared else f"{self.path}.{index}.{name}"

    def coverage(self, selected: list[list[WeightRef]]) -> dict:
        """Share of the blocks' matrix parameters that is pruned, and the names of what is not."""
        total = pruned = 0
        skipped = []
        for i, (block, refs) in enumerate(zip(self.blocks, selected)):
            total += sum(p.numel() for _, p in _matrices(block))
            pruned += sum(ref.view(block).numel() for ref in refs)
            chosen = set(refs)
            everything = weights_of(block, routers=True)
            skipped += [self.name(i, ref) for ref in everything if ref not in chosen]
            skipped += [self.full_name(i, name) for name in uncovered(block, everything)]
        return {"fraction": pruned / max(total, 1), "pruned": pruned, "total": total, "skipped": skipped}


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
    return is_causal(model) and output_layer(model) is not None


def is_causal(model: nn.Module) -> bool:
    """Whether a token sees only itself and those before it.

    The attention modules say it themselves. Where none does (recurrent models, a few old ones) the configuration or the
    kinds of models made of it do.
    """
    config = getattr(model, "config", None)
    texts = [config, text_config(config)]
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


def check_usable(view: ModelView, streamed: bool = False) -> None:
    """Refuse weights that are not there or not plain floating-point matrices, with the first one's name.

    streamed: those of the blocks come later.
    """
    for name, parameter in view.model.named_parameters():
        if parameter.is_meta and not (streamed and name.startswith(f"{view.path}.")):
            raise ConfigError(
                f"{name} is on the meta device: {type(view.model).__name__} has no weights yet; load "
                "them first, or name the checkpoint instead"
            )
    for index, block in enumerate(view.blocks):
        for ref in weights_of(block):
            weight = ref.parameter(block)
            if weight.dtype == torch.float64:
                raise ConfigError(
                    f"{view.name(index, ref)} is float64; convert the model with model.float(), or load "
                    "it with dtype='float32'"
                )
            if weight.dtype not in FLOATS or type(weight.data) is not Tensor:
                kind = str(weight.dtype)[6:] if type(weight.data) is Tensor else type(weight.data).__name__
                raise ConfigError(
                    f"{view.name(index, ref)} is {kind}: the model is quantised or packed; prune it in "
                    "float32, bfloat16 or float16, then quantise the result"
                )


def check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ConfigError for a tensor that holds NaN or infinity, with its name and place."""
    if (found := not_finite(tensors)) is not None:
        raise ConfigError(f"{found}; the checkpoint is damaged or overflowed in its dtype")


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The first NaN or infinity of named tensors in words, None if all values are finite."""
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
            continue
        least, most = tensor.detach().aminmax()  # pass NaN on; a thirtieth of the time of isfinite
        if not (math.isfinite(least) and math.isfinite(most)):
            place = (~torch.isfinite(tensor)).nonzero()[0].tolist()
            return f"{name} holds {tensor[tuple(place)].item()} at {place}"
    return None


def refuse_shared(view: ModelView, pattern: str) -> None:
    """Refuse structured pruning of blocks that are applied several times."""
    if view.shared:
        raise ConfigError(
            f"pattern {pattern!r} cannot be pruned in {type(view.model).__name__}: blocks of {view.path} "
            "are applied several times in a forward pass, or share weights; use an unstructured or N:M "
            "pattern"
        )
