"""The only file that knows Hugging Face architectures: embeddings, blocks, prunable weights.

Structure is discovered, not tabulated: the blocks are the module list that holds most of the parameters, the
prunable weights of a block are the 2-D weights of its linear layers and the slices of its 3-D expert parameters, and
whatever the model's own forward hands to a block (masks, position embeddings, per-layer attention kinds) is recorded
by running that forward with every block replaced by a recorder. A recorder returns what the block would beside its
hidden states (T5's position bias), learnt from a pass over a few tokens.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyprune.config import ConfigError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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
    if not hasattr(model, "config") or token_embedding(model) is None:
        raise ConfigError(f"{type(model).__name__} is no Hugging Face model that reads token ids: pyprune prunes "
                          "decoder-only and encoder-only language models")
    if any(hasattr(module, "_rescale_layers") for module in model.modules()):
        raise ConfigError(f"{type(model).__name__} rescales its own weights during its forward pass, so that what is "
                          "saved would not be what was pruned; pyprune does not prune it")
    # T5's and its kin's encoders alone keep the flag of the whole model
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and any(
            name.rpartition(".")[2] == "decoder" for name, _ in model.named_modules()):
        raise ConfigError(f"{type(model).__name__} is an encoder–decoder; pyprune prunes decoder-only and encoder-only "
                          "models")
    found = [(sum(p.numel() for p in module.parameters()), name, module) for name, module in model.named_modules()
             if isinstance(module, nn.ModuleList) and len(module) and all(map(weights_of, module))]
    if not found:
        if is_quantised(model):
            raise ConfigError(f"{type(model).__name__} is quantised; prune it in float32, bfloat16 or float16, then "
                              "quantise the result")
        raise ConfigError(f"{type(model).__name__} has no list of transformer blocks with linear layers; give a "
                          "Hugging Face decoder or encoder")
    _, name, blocks = max(found, key=lambda item: item[0])
    return name, blocks


def token_embedding(model: nn.Module) -> nn.Module | None:
    """The table of a model's token ids; None for a model that has none (images, sound, modules of one's own)."""
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if hasattr(found, "num_embeddings") else None


def any_token(model: nn.Module) -> int:
    """A token id that is not padding, from which some encoders derive positions."""
    token = 1 + (getattr(model.config, "pad_token_id", None) or 0)
    return min(token, model.get_input_embeddings().num_embeddings - 1)


def is_quantised(model: nn.Module) -> bool:
    """Whether a model's config or the classes of its layers say so."""
    return getattr(model.config, "quantization_config", None) is not None or any(
        "quant" in f"{type(module).__module__}.{type(module).__name__}".lower() for module in model.modules())


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

    def __init__(self, block: nn.Module, calls: list, last: bool = False, give: Callable | None = None):
        """last: end the forward pass here. give: makes what is returned of the arguments; None: the hidden states."""
        super().__init__()
        self.give = give
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
        return hidden if self.give is None else self.give(hidden, Arguments(args, kwargs))


@dataclass
class Arguments:
    """Everything but the hidden states that the model hands to one block."""

    args: tuple
    kwargs: dict

    def to(self, device, dtype, memo: dict) -> Arguments:
        """Floating tensors cast to ``dtype``, all tensors moved, tuples and dicts walked; a tensor that several
        blocks share stays shared through ``memo``."""
        return Arguments(_cast(self.args, device, dtype, memo), _cast(self.kwargs, device, dtype, memo))


def _cast(value, device, dtype, memo):
    if isinstance(value, Tensor):
        if id(value) not in memo:
            cast = value.to(device, dtype if value.is_floating_point() else value.dtype)
            memo[id(value)] = (cast, value)  # the original stays alive, so its id stays its own
        return memo[id(value)][0]
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_cast(v, device, dtype, memo) for v in value)
    if isinstance(value, dict):
        return {k: _cast(v, device, dtype, memo) for k, v in value.items()}
    return value


COMPUTED = object()
"""In a block's form: what only the block itself can say."""


def _form(out, given: Arguments) -> tuple | None:
    """What a block returned beside its hidden states: per entry an argument's place (the block passes it on),
    COMPUTED, or in a one-tuple what is no tensor. None for a block that returns the hidden states alone."""
    if not isinstance(out, (tuple, list)):
        return None
    places = {id(value): place for place, value in (*enumerate(given.args), *given.kwargs.items())
              if isinstance(value, Tensor)}
    return tuple(places.get(id(value), COMPUTED) if isinstance(value, Tensor) else (value,) for value in out[1:])


def _same(one, other) -> bool:
    """Whether two values that hold tensors in tuples, lists and dicts are equal."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return type(one) is type(other) and one.shape == other.shape and torch.allclose(
            one.double(), other.to(one.device).double(), rtol=0, atol=0, equal_nan=True)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, (tuple, list)):
        return isinstance(other, (tuple, list)) and len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other)


def call_block(block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """Output hidden states of a block, whatever it wraps them in."""
    out = block(hidden, *arguments.args, **arguments.kwargs)
    return out[0] if isinstance(out, tuple) else out


class ModelView:
    """A Hugging Face model seen as embeddings, a list of blocks, and the rest."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.path, self.blocks = find_blocks(model)
        self.is_encoder = not _is_causal(model)
        self.hold: Callable = lambda index: contextlib.nullcontext()
        """Makes a block's weights real for the duration, where they come and go."""
        self._forms: list[tuple | None] | None = None

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

    @torch.no_grad()
    def record(self, input_ids: Tensor) -> tuple[Tensor, list[Arguments]]:
        """First-block input ``[batch, tokens, hidden]`` and each block's arguments, for unpadded ids of one length.

        Runs the model's own forward with recorders in place of the blocks, so masks, rotary embeddings and per-layer
        attention kinds are the model's own; costs the embedding only, and the blocks that make arguments of later ones
        (T5's first). Raises ConfigError where a pass block by block would not be the model's own.
        """
        if self._forms is None:
            self._forms = self._learn()
        calls = self._calls(input_ids, self._forms)
        if len(calls) != len(self.blocks):
            raise ConfigError(f"{type(self.model).__name__} called {len(calls)} of its {len(self.blocks)} blocks in "
                              "one forward pass; its block order cannot be followed")
        return calls[0][0], [Arguments(args, kwargs) for _, args, kwargs in calls]

    def _calls(self, input_ids: Tensor, forms: list[tuple | None], disturb: bool = False) -> list[tuple]:
        """Hidden states, args and kwargs of each block's call, where blocks return what their forms say."""
        calls: list = []
        last = len(self.blocks) - 1
        with contextlib.suppress(_Stop):
            self._forward(input_ids, [
                _Recorder(block, calls, last=i == last, give=self._giver(i, block, forms[i], disturb))
                for i, block in enumerate(self.blocks)])
        return calls

    def _giver(self, index: int, block: nn.Module, form: tuple | None, disturb: bool = False) -> Callable | None:
        """Makes what a stand-in for a block returns: the hidden states it was given, and beside them what its form
        says. disturb: the block computes that from other hidden states and without its prunable weights."""
        if form is None:
            return None

        def give(hidden: Tensor, given: Arguments) -> tuple:
            computed = self._run(index, block, hidden, given, disturb)[0] if COMPUTED in form else ()
            beside = (computed[k] if entry is COMPUTED else entry[0] if isinstance(entry, tuple)
                      else given.args[entry] if isinstance(entry, int) else given.kwargs[entry]
                      for k, entry in enumerate(form, 1))
            return (hidden, *beside)
        return give

    def _run(self, index: int, block: nn.Module, hidden: Tensor, given: Arguments, disturb: bool = False):
        """A block's output, and its arguments in its own type."""
        with self.hold(index):
            own = next(p for p in block.parameters() if p.is_floating_point())
            if disturb:
                block = copy.deepcopy(block)
                for ref in weights_of(block):
                    ref.view(block).zero_()
                hidden = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
            given = given.to(own.device, own.dtype, {})
            return block(hidden.to(own.device, own.dtype), *given.args, **given.kwargs), given

    def _learn(self) -> list[tuple | None]:
        """What each block returns beside its hidden states (see :func:`_form`), from the model's own forward pass over
        a few tokens. Nearly always that is nothing that matters, and no block has to run."""
        name, device = type(self.model).__name__, next(self.model.get_input_embeddings().parameters()).device
        ids = any_token(self.model) + torch.arange(10, device=device).view(2, 5)
        ids = ids.clamp(max=self.model.get_input_embeddings().num_embeddings - 1)
        plain = [None] * len(self.blocks)
        with contextlib.suppress(Exception):  # each architecture has its own way to miss what a block returns
            if _passed_on(self._calls(ids, plain), ids) is None:
                return plain
        known: dict[tuple, tuple | None] = {}
        forms = list(plain)

        def learn(index: int, block: nn.Module, hidden: Tensor, given: Arguments):
            key = (type(block), tuple((n, tuple(p.shape)) for n, p in block.named_parameters()))
            if key not in known:
                known[key] = _form(*self._run(index, block, hidden, given))
            forms[index] = known[key]
            give = self._giver(index, block, forms[index])
            return hidden if give is None else give(hidden, given)

        calls: list = []
        try:
            self._forward(ids, [_Recorder(block, calls, last=i == len(self.blocks) - 1,
                                          give=functools.partial(learn, i, block))
                                for i, block in enumerate(self.blocks)])
        except _Stop:
            pass
        except Exception as error:  # as above
            raise ConfigError(f"{name} cannot be run block by block on token ids: "
                              f"{' '.join(str(error).split())[:300]}") from error
        if (reason := _passed_on(calls, ids)) is not None:
            raise ConfigError(f"{name} {reason}: pruning block by block would not follow its forward pass")
        if not any(form and COMPUTED in form for form in forms):
            return forms
        truth = [call[1:] for call in calls]
        hollow = [form and tuple((None,) if entry is COMPUTED else entry for entry in form) for form in forms]
        with contextlib.suppress(Exception):  # as above
            if _same([call[1:] for call in self._calls(ids, hollow)], truth):
                return hollow
        if not _same([call[1:] for call in self._calls(ids, forms, disturb=True)], truth):
            raise ConfigError(f"the blocks of {name} hand each other more than hidden states, computed from them or by "
                              "weights that would be pruned: pruning block by block would not follow its forward pass")
        return forms

    @torch.no_grad()
    def complete(self, input_ids: Tensor, outputs):
        """The model's output when its last block returns ``outputs``: final norm and head, no block runs."""
        last = len(self.blocks) - 1
        forms = self._forms or [None] * len(self.blocks)
        return self._forward(input_ids, [
            _Recorder(block, [], give=(lambda hidden, given: outputs) if i == last else self._giver(i, block, forms[i]))
            for i, block in enumerate(self.blocks)])

    def _forward(self, input_ids: Tensor, stand_ins: list[nn.Module]):
        """The model's own forward with others in place of its blocks."""
        originals = list(self.blocks)
        try:
            for i, module in enumerate(stand_ins):
                self.blocks[i] = module
            return self.model(input_ids, **({} if self.is_encoder else {"use_cache": False}))
        finally:
            for i, block in enumerate(originals):
                self.blocks[i] = block


def _passed_on(calls: list[tuple], input_ids: Tensor) -> str | None:
    """None if every block was called with what the one before it returned, as ``[sequences, tokens, hidden]``; else
    what the model does instead."""
    if not calls:
        return "calls none of its blocks"
    first = calls[0][0]
    if first.shape[:-1] != input_ids.shape:
        return f"hands its blocks states {list(first.shape)} for token ids {list(input_ids.shape)}"
    for i, (hidden, *_) in enumerate(calls[1:], 1):
        if not _same(hidden, first):
            return f"changes the hidden states between its blocks {i - 1} and {i}"
    return None


def _is_causal(model: nn.Module) -> bool:
    """Whether the model generates text (decoder) or encodes it."""
    name = type(model).__name__
    return name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) and not name.startswith(
        ("Bert", "Roberta")) or any(a.endswith(("ForCausalLM", "LMHeadModel")) and not a.startswith(("Bert", "Roberta"))
                                    for a in getattr(model.config, "architectures", None) or [])


def check_usable(view: ModelView, streamed: bool = False) -> None:
    """Refuse weights that are not there or not plain floating-point matrices, with the first one's name.

    streamed: those of the blocks come later.
    """
    for name, parameter in view.model.named_parameters():
        if parameter.is_meta and not (streamed and name.startswith(f"{view.path}.")):
            raise ConfigError(f"{name} is on the meta device: {type(view.model).__name__} has no weights yet; load "
                              "them first, or name the checkpoint instead")
    for index, block in enumerate(view.blocks):
        for ref in weights_of(block):
            weight = ref.parameter(block)
            if weight.dtype == torch.float64:
                raise ConfigError(f"{view.name(index, ref)} is float64; convert the model with model.float(), or load "
                                  "it with dtype='float32'")
            if weight.dtype not in FLOATS or type(weight.data) is not Tensor:
                kind = str(weight.dtype)[6:] if type(weight.data) is Tensor else type(weight.data).__name__
                raise ConfigError(f"{view.name(index, ref)} is {kind}: the model is quantised or packed; prune it in "
                                  "float32, bfloat16 or float16, then quantise the result")


def check_finite(view: ModelView, index: int, refs: list[WeightRef]) -> None:
    """Refuse a weight that holds NaN or infinity, with its place."""
    for ref in refs:
        weight = ref.view(view.blocks[index])
        if not bool(torch.isfinite(weight).all()):
            row, column = (~torch.isfinite(weight)).nonzero()[0].tolist()
            raise ConfigError(f"{view.name(index, ref)} holds {weight[row, column].item()} at [{row}, {column}]; "
                              "the checkpoint is damaged or overflowed in its dtype")
