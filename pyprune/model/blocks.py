"""The only file that knows Hugging Face architectures: embeddings, blocks, prunable weights.

Structure is discovered, not tabulated: the blocks are the module list that holds most of the parameters, the
prunable weights of a block are the 2-D weights of its linear layers and the slices of its 3-D expert parameters
(:mod:`pyprune.model.routing` tells what routes to them), and whatever the model's own forward hands to a block (masks,
position embeddings, per-layer attention kinds) is recorded by running that forward with every block replaced by a
recorder. The same tells in which order the blocks are applied, and how often.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyprune.config import ConfigError
from pyprune.model.names import matches
from pyprune.model.routing import expert_matrices
from pyprune.model.routing import routers as routing_layers


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
                refs.append(WeightRef(prefix + "weight", transposed=_is_conv1d(module)))
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
                if any(pattern in name for name in names):
                    hint += f" (whole components count; write {f'*{pattern}*'!r} for a part of one)"
                raise ConfigError(f"{field} pattern {pattern!r} selects no prunable weight: {hint}; prunable in each "
                                  f"block: {', '.join(kinds)}")
    for_routers = [p for p in targets if not any(names[name] for name in names if matches(name, [p]))]

    def chosen(name: str) -> bool:
        asked = not targets or matches(name, targets) if names[name] else matches(name, for_routers)
        return asked and not matches(name, ignore)

    return [[ref for ref in block if chosen(view.name(i, ref))] for i, block in enumerate(refs)]


class _Stop(Exception):
    """Ends a forward pass early; carries what was reached."""

    def __init__(self, value=None):
        self.value = value


class _Recorder(nn.Module):
    """Stands in for a block: keeps the arguments it was called with and passes the hidden states through."""

    def __init__(self, block: nn.Module, place: int, calls: list, end: int | None = None, given=None):
        """place: in the list of blocks. calls: of all recorders, to which each call is added. end: the number of calls
        with which the forward pass ends here, or goes on with what is ``given``."""
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule: the model must not see it twice
        self.place, self.calls, self.end, self.given = place, calls, end, given

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
        self.calls.append((self.place, hidden, Arguments(args, kwargs)))
        if len(self.calls) != self.end:
            return hidden
        if self.given is None:
            raise _Stop(hidden)
        return self.given


class _Follower(_Recorder):
    """Hands on new hidden states each time, so that it shows whether they are what the next block gets."""

    def __init__(self, block: nn.Module, place: int, calls: list, outputs: list):
        super().__init__(block, place, calls)
        self.outputs = outputs

    def forward(self, *args, **kwargs):
        self.outputs.append(super().forward(*args, **kwargs).clone())
        return self.outputs[-1]


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
    if isinstance(value, Arguments):
        return value.to(device, dtype, memo)
    return value


def call_block(block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """Output hidden states of a block, whatever it wraps them in."""
    out = block(hidden, *arguments.args, **arguments.kwargs)
    return out[0] if isinstance(out, tuple) else out


class Repeated(nn.Module):
    """Blocks that one forward pass applies more than once, with all that lies between, as one block.

    Its arguments are those of every application; parts have their places in the model's list for names.
    """

    def __init__(self, blocks: nn.ModuleList, places: list[int]):
        super().__init__()
        first = {id(blocks[place]): str(place) for place in reversed(places)}
        self.order = [first[id(blocks[place])] for place in places]
        self.step = 0
        """The application at work."""
        for name in dict.fromkeys(self.order):
            self.add_module(name, blocks[int(name)])

    def forward(self, hidden: Tensor, steps: tuple[Arguments, ...]) -> Tensor:
        for step, (name, arguments) in enumerate(zip(self.order, steps, strict=True)):
            self.step = step
            hidden = call_block(self._modules[name], hidden, arguments)
        return hidden


def _units(blocks: nn.ModuleList, order: list[int]) -> list[list[int]]:
    """The applications cut into the shortest runs such that no parameter is used in two of them."""
    last = {id(p): k for k, place in enumerate(order) for p in blocks[place].parameters()}
    units, end = [[]], 0
    for k, place in enumerate(order):
        units[-1].append(place)
        end = max([end, *(last[id(p)] for p in blocks[place].parameters())])
        if k == end < len(order) - 1:
            units.append([])
            end = k + 1
    return units


class ModelView:
    """A Hugging Face model seen as embeddings, a list of blocks, and the rest."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.path, self.slots = find_blocks(model)
        self.is_encoder = not _is_causal(model)
        self.order = self._applied()
        """Places in the model's own list ``slots`` as one forward pass calls them."""
        units = _units(self.slots, self.order)
        self.shared = self.order != list(range(len(units)))
        """Whether the blocks are not simply those of the list, one by one; then every block is a :class:`Repeated`."""
        self.blocks = nn.ModuleList(Repeated(self.slots, unit) for unit in units) if self.shared else self.slots

    @property
    def distinct(self) -> int:
        """Blocks that are not the same module."""
        return len({id(block) for block in self.slots})

    @torch.no_grad()
    def _applied(self) -> list[int]:
        """The order of the blocks in a forward pass over two tokens, in which recorders stand in for them.

        What cannot be followed so (a model without weights, say) is taken for a plain list; :meth:`record`, which
        calibration cannot do without, refuses what is none. Raises ConfigError if blocks are applied several times, but
        not each to the output of the one before.
        """
        calls: list = []
        outputs: list[Tensor] = []
        plain = list(range(len(self.slots)))
        weight = next(self.model.get_input_embeddings().parameters())
        device = next((b.device for b in self.model.buffers()), None) if weight.is_meta else weight.device
        token = min(1 + (getattr(self.model.config, "pad_token_id", None) or 0), len(weight) - 1)
        ids = torch.full((1, 2), token, device=device)
        with contextlib.suppress(RuntimeError, IndexError, TypeError, ValueError, NotImplementedError, AttributeError):
            self._forward(ids, [_Follower(block, place, calls, outputs) for place, block in enumerate(self.slots)])
        order = [place for place, _, _ in calls]
        if order == plain or set(order) != set(plain):
            return plain
        if any(hidden is not before for (_, hidden, _), before in zip(calls[1:], outputs)):
            raise ConfigError(f"{type(self.model).__name__} applies the blocks of {self.path} {len(order)} times in a "
                              "forward pass, but not each to the output of the one before; such loops cannot be pruned")
        return order

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

    @torch.no_grad()
    def record(self, input_ids: Tensor) -> tuple[Tensor, list[Arguments]]:
        """First-block input ``[batch, tokens, hidden]`` and each block's arguments, for unpadded ids of one length.

        Runs the model's own forward with recorders in place of the blocks, so masks, rotary embeddings and per-layer
        attention kinds are the model's own; costs the embedding only.
        """
        calls: list = []
        with contextlib.suppress(_Stop):
            self._forward(input_ids, [_Recorder(block, place, calls, end=len(self.order))
                                      for place, block in enumerate(self.slots)])
        if [place for place, _, _ in calls] != self.order:
            raise ConfigError(f"{type(self.model).__name__} called {len(calls)} of its {len(self.order)} blocks in "
                              "one forward pass; its block order cannot be followed")
        steps = iter([arguments for _, _, arguments in calls])
        if not self.shared:
            return calls[0][1], list(steps)
        return calls[0][1], [Arguments((tuple(next(steps) for _ in block.order),), {}) for block in self.blocks]

    @torch.no_grad()
    def complete(self, input_ids: Tensor, outputs):
        """The model's output when its last block returns ``outputs``: final norm and head, no block runs."""
        calls: list = []
        return self._forward(input_ids, [_Recorder(block, place, calls, end=len(self.order), given=outputs)
                                         for place, block in enumerate(self.slots)])

    def _forward(self, input_ids: Tensor, stand_ins: list[nn.Module]):
        """The model's own forward with others in place of its blocks."""
        originals = list(self.slots)
        try:
            for i, module in enumerate(stand_ins):
                self.slots[i] = module
            return self.model(input_ids, **({} if self.is_encoder else {"use_cache": False}))
        finally:
            for i, block in enumerate(originals):
                self.slots[i] = block


def _is_causal(model: nn.Module) -> bool:
    """Whether the model generates text (decoder) or encodes it."""
    name = type(model).__name__
    return name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) and not name.startswith(
        ("Bert", "Roberta")) or any(a.endswith(("ForCausalLM", "LMHeadModel")) and not a.startswith(("Bert", "Roberta"))
                                    for a in getattr(model.config, "architectures", None) or [])


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
        raise ConfigError(f"pattern {pattern!r} cannot be pruned in {type(view.model).__name__}: blocks of {view.path} "
                          "are applied several times in a forward pass, or share weights; use an unstructured or N:M "
                          "pattern")
