"""A second implementation of what pyprune computes, from the papers: whole models, plain forward hooks, float64.

It shares no code with the package. Wanda (arXiv 2306.11695), SparseGPT (arXiv 2301.00774) and LIAR (arXiv 2407.13331).
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

EXPERT = re.compile(r"(.*)\[(\d+)\]")


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str, int | None]:
    """Module, parameter name and expert of ``a.b.weight`` or ``a.b.down_proj[3]``."""
    found = EXPERT.fullmatch(name)
    path, expert = (found[1], int(found[2])) if found else (name, None)
    module, _, key = path.rpartition(".")
    return model.get_submodule(module), key, expert


def matrix(model: nn.Module, name: str) -> Tensor:
    """The weight ``[out, in]`` as a view, whatever layout it is stored in."""
    module, key, expert = owner(model, name)
    value = getattr(module, key).data
    if expert is not None:
        return value[expert]
    return value.T if type(module).__name__ == "Conv1D" else value


def linear_weights(blocks: nn.ModuleList, path: str) -> list[str]:
    """Names of the matrices of all linear layers and experts of the blocks, routers left out."""
    names = []
    for name, module in blocks.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            names.append(f"{path}.{name}.weight")
        for key in ("gate_up_proj", "up_proj", "down_proj"):
            value = getattr(module, key, None)
            if isinstance(value, nn.Parameter) and value.ndim == 3:
                names += [f"{path}.{name}.{key}[{e}]" for e in range(len(value))]
    return names


def forward(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(input_ids=ids)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def inputs(model: nn.Module, names: list[str], ids: Tensor) -> dict[str, Tensor]:
    """Float64 inputs ``[tokens, in]`` of each weight when the whole model runs; an expert's are the tokens that the
    router sends it. A module that runs several times in one pass gives all its inputs."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = []
    for name in names:
        module, key, expert = owner(model, name)

        def linear(module, args, name=name):
            seen[name].append(args[0].detach().reshape(-1, args[0].shape[-1]).double())

        def routed(module, args, name=name, key=key, expert=expert):
            hidden, chosen = args[0].detach(), args[1]
            x = hidden.reshape(-1, hidden.shape[-1])[(chosen == expert).any(-1)]
            if key == "down_proj":
                gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
                x = module.act_fn(gate) * up
            seen[name].append(x.detach().double())

        handles.append(module.register_forward_pre_hook(linear if expert is None else routed))
    forward(model, ids)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items() if parts and sum(map(len, parts))}


def wanda(weight: Tensor, x: Tensor, sparsity: float) -> tuple[Tensor, Tensor]:
    """Keep mask of ``|W_ij| ‖X_j‖`` per row, and the rows whose choice is no near-tie (in float32)."""
    score = weight.double().abs() * x.square().sum(0).sqrt()
    dropped = round(sparsity * weight.shape[1])
    ordered = score.sort(dim=1).values
    keep = score > ordered[:, dropped - 1 : dropped]
    clear = ordered[:, dropped] - ordered[:, dropped - 1] > 1e-5 * ordered[:, dropped]
    return keep, clear


def hessian(x: Tensor, damping: float = 0.01) -> Tensor:
    """``H = XᵀX/n + λ·mean(diag)·I``, a dead column's diagonal 1."""
    h = x.T @ x / len(x)
    mean = h.diagonal().mean()
    dead = h.diagonal() == 0
    return h + torch.diag(dead.double() + damping * mean)


def sparsegpt(
    weight: Tensor, x: Tensor, sparsity: float, nm: tuple[int, int] | None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The sweep, column by column, over at most 128 columns: new weights and keep mask, which may be given."""
    w = weight.double().contiguous().clone()
    assert w.shape[1] <= 128
    w[:, x.square().sum(0) == 0] = 0
    r = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian(x)))).T
    keep = torch.ones_like(w, dtype=torch.bool) if mask is None else mask
    if nm is None and mask is None:
        score = (w / r.diagonal()).square().flatten()
        keep.view(-1)[score.argsort(stable=True)[: round(sparsity * score.numel())]] = False
    for j in range(w.shape[1]):
        if nm is not None and mask is None and j % nm[1] == 0:
            score = (w[:, j : j + nm[1]] / r.diagonal()[j : j + nm[1]]).square()
            keep[:, j : j + nm[1]].scatter_(1, score.argsort(dim=1, stable=True)[:, : nm[1] - nm[0]], False)
        error = torch.where(keep[:, j], 0.0, w[:, j] / r[j, j])
        w[:, j:] -= error[:, None] * r[j, j:]
        w[~keep[:, j], j] = 0
    return w, keep


def objective(change: Tensor, h: Tensor) -> float:
    """``tr(ΔW H ΔWᵀ)``."""
    return float(((change.double() @ h) * change.double()).sum())


def neurons(weight: Tensor, x: Tensor, count: int, units: int | None = None) -> tuple[Tensor, bool]:
    """The ``count`` neurons, or runs of columns that make ``units`` heads, of most weighted input variance (FLAP, arXiv
    2312.11983), ascending, and whether the choice is no near-tie."""
    score = (x - x.mean(0)).square().mean(0) * weight.double().square().sum(0)
    score = score.reshape(units or len(score), -1).sum(1)
    ordered = score.sort(descending=True)
    last, first_out = ordered.values[count - 1], ordered.values[count]
    return ordered.indices[:count].sort().values, bool(last - first_out > 1e-4 * last)


def liar(
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    kept: Tensor,
    damping: float,
    regress: bool = True,
    error: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Weight ``[out, K]`` and bias after what is missing from the output, ``W_D x_D`` and an error ``[tokens, out]``
    still to be corrected, is estimated from the kept inputs by ridge regression, about the mean where there is a bias.
    Without ``regress`` it is estimated by its mean."""
    w = weight.double()
    gone = torch.ones(x.shape[1], dtype=torch.bool)
    gone[kept] = False
    missing = x[:, gone] @ w[:, gone].T + (0 if error is None else error)
    mean, mean_missing = x[:, kept].mean(0), missing.mean(0)
    if bias is None:
        mean, mean_missing = torch.zeros_like(mean), torch.zeros_like(mean_missing)
    a, b = x[:, kept] - mean, missing - mean_missing
    ridge = (damping * len(x) * a.square().mean(0).mean()).sqrt() * torch.eye(len(kept), dtype=torch.double)
    change = torch.linalg.lstsq(torch.cat([a, ridge]), torch.cat([b, b.new_zeros(len(kept), b.shape[1])])).solution.T
    change = change if regress else torch.zeros_like(change)
    return w[:, kept] + change, None if bias is None else bias.double() + mean_missing - change @ mean
