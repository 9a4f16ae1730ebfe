"""Mixtures of experts by their structure: how experts are stored, and which layers choose or weigh them.

Experts are slices of 3-D parameters, or modules of a list beside something with one row per expert. What routes to them
decides for whole tokens with few weights, so pruning leaves it alone unless it is asked for by name.
"""

from __future__ import annotations

from torch import Tensor, nn

ROUTER = "router"
"""Name of a module that routes, for routers of several layers and for experts that are counted in no other way."""


def expert_matrices(module: nn.Module) -> dict[str, bool]:
    """Names of a module's own 3-D expert parameters, and whether they are stored ``[experts, in, out]``.

    transformers marks most modules that do so. Otherwise one parameter feeds another: gate and up projections in one
    give twice as many outputs as the down projection takes, whose outputs are as many as their inputs.
    """
    found = {key: p for key, p in module.named_parameters(recurse=False) if _is_stack(module, key, p)}
    turned = getattr(module, "is_transposed", None)
    if turned is None:
        shapes = [tuple(p.shape[1:]) for p in found.values()]
        turned = any(first == (second[1], 2 * second[0]) for first in shapes for second in shapes)
    return dict.fromkeys(found, bool(turned))


def _is_stack(module: nn.Module, key: str, parameter: Tensor) -> bool:
    return parameter.ndim == 3 and "bias" not in key and parameter.shape[0] == getattr(module, "num_experts", None)


def expert_lists(block: nn.Module) -> dict[str, int]:
    """Path and length of each list of expert modules: alike, with linear layers, beside a matrix of one row each."""
    modules = dict(block.named_modules())
    found = {}
    for path, module in modules.items():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) > 1:
            members = list(module.children())
            alike = len({type(m) for m in members}) == 1 and any(isinstance(m, nn.Linear) for m in members[0].modules())
            beside = [
                p
                for name, p in modules[_parent(path)].named_parameters()
                if not f"{_parent(path)}.{name}".lstrip(".").startswith(f"{path}.")
            ]
            if alike and any(p.ndim == 2 and p.shape[0] == len(module) for p in beside):
                found[path] = len(module)
    return found


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _inside(path: str, holder: str) -> bool:
    return not holder or path == holder or path.startswith(f"{holder}.")


def routers(block: nn.Module) -> set[str]:
    """Paths of the linear layers that route: of one output beside or in experts, of one output per expert, or in a
    module named ``router``.

    One output per expert counts only if all linear layers of its branch are so narrow: keys may be as many as experts.
    """
    linear = {path: m.out_features for path, m in block.named_modules() if isinstance(m, nn.Linear)}
    lists = expert_lists(block)
    counts: dict[str, set[int]] = {}
    for path, count in lists.items():
        counts.setdefault(_parent(path), set()).add(count)
    for path, module in block.named_modules():
        if expert_matrices(module):
            for holder in (path, _parent(path)):
                counts.setdefault(holder, set()).add(module.num_experts)
    found = {path for path in linear if ROUTER in path.split(".")}
    for holder, numbers in counts.items():
        branches: dict[str, list[str]] = {}
        for path in linear:
            if _inside(path, holder):
                first = path[len(holder) :].lstrip(".").partition(".")[0]
                branches.setdefault(f"{holder}.{first}".lstrip("."), []).append(path)
        for branch, paths in branches.items():
            narrow = branch not in lists and all(linear[path] in numbers | {1} for path in paths)
            found |= {path for path in paths if narrow or linear[path] == 1}
    return found
