"""Physically smaller blocks: slicing parameters, and the module attributes that go with them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pyprune.config import ConfigError
from pyprune.model.arguments import Arguments
from pyprune.model.blocks import is_linear
from pyprune.model.recording import call_block
from pyprune.model.sizes import Heads, apply_attributes, head_attributes, neuron_attributes, set_parameter
from pyprune.structured.groups import Coupled


@dataclass
class Pick:
    """Units of one coupled group that stay, and what becomes of the consumer."""

    group: Coupled
    kept: Tensor
    """int64, ascending."""
    weight: Tensor | None = None
    """float32 ``[out, kept columns]``; None keeps the dense columns."""
    bias: Tensor | None = None
    """float32 ``[out]``; None leaves the bias alone."""
    padded_to: int | None = None
    """Units the sliced block has room for; those beyond ``kept`` are exact zeros."""
    attributes: dict = field(default_factory=dict)


def mask_units(block: nn.Module, group: Coupled, kept: Tensor) -> None:
    """Zero the consumer's columns of all other units, in place: what slicing must equal."""
    weight = group.consumer.view(block)
    weight[:, group.columns[_others(group, kept)].flatten().to(weight.device)] = 0


@torch.no_grad()
def slice_block(block: nn.Module, picks: list[Pick]) -> dict[str, dict]:
    """Slice a block in place to the picked units; returns the attributes that changed, by module path."""
    changes: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for pick in picks:
        group, room = pick.group, _room(pick)
        for slot in group.slots:
            value = block.get_parameter(slot.path).data
            value = value if slot.expert is None else value[slot.expert]
            stays = torch.ones(value.shape[slot.dim], dtype=torch.bool)
            stays[slot.rows[_others(group, room)].flatten()] = False  # rows of no unit (shared keys) stay
            if pick.padded_to is not None:
                gone = slot.rows[_others(group, pick.kept)].flatten().to(value.device)
                value = value.index_fill(slot.dim, gone, 0)
            value = value.index_select(slot.dim, stays.nonzero()[:, 0].to(value.device))
            _collect(changes, stacks, slot.path, slot.expert, value)
        _collect(changes, stacks, group.consumer.path, group.consumer.expert, _consumer(block, pick, room))
    for path, values in stacks.items():
        changes[path] = torch.stack([values[e] for e in sorted(values)])
    for path, value in changes.items():
        set_parameter(block, path, value)
    for pick in picks:
        if pick.bias is not None:
            module = block.get_submodule(pick.group.consumer.module_path)
            weight = pick.group.consumer.parameter(block)
            module.bias = nn.Parameter(pick.bias.to(weight.device, weight.dtype), requires_grad=False)
    attributes: dict[str, dict] = {}
    for pick in picks:
        _set_attributes(block, pick.group, len(_room(pick)), attributes)
    return attributes


def _others(group: Coupled, units: Tensor) -> Tensor:
    """bool ``[units]``: every unit but those."""
    others = torch.ones(group.units, dtype=torch.bool)
    others[units] = False
    return others


def _room(pick: Pick) -> Tensor:
    """Units the sliced block has rows for: the kept ones, and zeroed ones up to the padded size, per pool."""
    if pick.padded_to is None or pick.padded_to == len(pick.kept):
        return pick.kept
    pools = pick.group.pools
    each = pick.padded_to // len(pools.unique())
    room = []
    for pool in pools.unique():
        members = (pools == pool).nonzero()[:, 0]
        stays = torch.isin(members, pick.kept)
        room.append(torch.cat([members[stays], members[~stays]])[:each])
    return torch.cat(room).sort().values


def kept_columns(block: nn.Module, pick: Pick) -> Tensor:
    """The consumer's new ``[out, kept columns]`` as the sliced block, which is still dense here, will hold it."""
    dense = pick.group.consumer.view(block)
    if pick.weight is None:
        return dense[:, pick.group.columns_of(pick.kept).to(dense.device)]
    return pick.weight.to(dense.device, dense.dtype)


def _consumer(block: nn.Module, pick: Pick, room: Tensor) -> Tensor:
    """The consumer's parameter (stored orientation) over the columns there is room for."""
    group = pick.group
    dense, columns, kept = group.consumer.view(block), group.columns_of(pick.kept), kept_columns(block, pick)
    place = group.columns_of(room)
    value = torch.zeros(dense.shape[0], len(place), dtype=dense.dtype, device=dense.device)
    value[:, torch.searchsorted(place, columns).to(dense.device)] = kept
    return (value.T if group.consumer.transposed else value).contiguous()


def _collect(changes: dict, stacks: dict, path: str, expert: int | None, value: Tensor) -> None:
    if expert is None:
        changes[path] = value
    else:
        stacks.setdefault(path, {})[expert] = value


def _set_attributes(block: nn.Module, group: Coupled, units: int, changed: dict[str, dict]) -> None:
    """Sizes that the modules around the sliced parameters keep for their forward pass."""
    owners = {slot.path.rpartition(".")[0] for slot in group.slots} | {group.consumer.module_path}
    paths = {owner.rpartition(".")[0] if is_linear(block.get_submodule(owner)) else owner for owner in owners}
    for path in sorted(paths):
        values = _new_sizes(block.get_submodule(path), group, units)
        if values:
            changed.setdefault(path, {}).update(values)
            apply_attributes(block.get_submodule(path), values)


def _new_sizes(module: nn.Module, group: Coupled, units: int) -> dict:
    if group.kind == "neurons":
        return neuron_attributes(module, group.units, units)
    return head_attributes(module, Heads(group.heads, group.groups, group.head_size), heads_of(group, units))


def heads_of(group: Coupled, units: int) -> Heads:
    """The heads of an attention of which so many units are left."""
    return Heads(*group.heads_left(units), group.head_size)


def stored_pick(tensors: dict[str, Tensor], group: Coupled, kept: Tensor, padded_to: int | None) -> Pick:
    """What a sliced block's state says of a group of which these units are left, int64, ascending."""
    ref = group.consumer
    value = tensors[ref.path] if ref.expert is None else tensors[ref.path][ref.expert]
    pick = Pick(group, kept, padded_to=padded_to)
    places = torch.searchsorted(group.columns_of(_room(pick)), group.columns_of(kept))
    pick.weight = (value.T if ref.transposed else value)[:, places]
    if ref.expert is None:
        pick.bias = tensors.get(f"{ref.module_path}.bias")
    return pick


@torch.no_grad()
def set_block(block: nn.Module, tensors: dict[str, Tensor], attributes: dict[str, dict]) -> None:
    """Make a dense block the sliced one whose state and attributes (:func:`slice_block`) these are."""
    for name, value in tensors.items():
        owner, _, key = name.rpartition(".")
        module = block.get_submodule(owner)
        if key in module._buffers:
            module.get_buffer(key).copy_(value)
        elif getattr(module, key) is None:
            setattr(module, key, nn.Parameter(value, requires_grad=False))
        else:
            set_parameter(block, name, value.to(getattr(module, key).device))
    for path, values in attributes.items():
        apply_attributes(block.get_submodule(path), values)


@torch.no_grad()
def verify(block: nn.Module, groups: list[Coupled], hidden: Tensor, arguments: Arguments, name: str) -> None:
    """Raise ConfigError unless dropping half the units by slicing equals masking them, on this very block."""
    picks = []
    for group in groups:
        pools = [(group.pools == p).nonzero()[:, 0] for p in group.pools.unique()]
        picks.append(Pick(group, torch.cat([p[1 - len(p) % 2 :: 2] if len(p) > 1 else p for p in pools]).sort().values))
    dense, masked, sliced = (copy.deepcopy(block).float() for _ in range(3))
    for pick in picks:
        mask_units(masked, pick.group, pick.kept)
    slice_block(sliced, picks)
    hidden, arguments = hidden.float(), arguments.to(hidden.device, torch.float32, {})
    want = call_block(masked, hidden, arguments)
    if not bool(torch.isfinite(want).all()):
        raise ConfigError(f"the output of {name} is not finite on a few plain tokens; check the checkpoint")
    try:
        got = call_block(sliced, hidden, arguments)
    except RuntimeError as error:
        hint = (
            "; where position biases are handed to the blocks for all heads (T5, ALiBi), pattern='neurons' is what "
            "can be pruned"
            if any(group.kind == "heads" for group in groups)
            else ""
        )
        raise ConfigError(f"{name} cannot be made smaller: its forward fails at other sizes ({error}){hint}") from error
    wrong, size = float((got - want).norm()), float(want.norm().clamp(min=1e-30))
    off, effect = wrong / size, float((call_block(dense, hidden, arguments) - want).norm())
    if not off < 1e-4 or (off > 1e-6 and wrong > 0.1 * effect):  # heads may do little beside the residual stream
        raise ConfigError(
            f"{name}: the sliced block differs from the masked one by {off:.2g}; something in it "
            "couples heads or neurons in a way pyprune does not know"
        )
