"""Scores of neurons and heads: higher is kept (LIAR, arXiv 2407.13331).

One function per criterion, from a :class:`Scored` layer to float64 ``[units]``. Any of them goes with any
reconstruction, and so does a function of the user's (``pyprune.prune(…, criterion=function)``), which returns a tensor
``[units]`` of any real dtype and changes nothing of what it reads. It is called once for each group of each block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyprune.config import ConfigError, function_name
from pyprune.structured.groups import Coupled
from pyprune.structured.moments import Split, to_device

POOL = 128
BLOCK = 32
SHRINK = 7 / 8
"""Greedy OBS goes on with smaller matrices whenever less than this share of their columns is left."""
OBS_DAMPING = 1e-2


@dataclass(eq=False)
class Scored:
    """What a criterion may look at: a consumer's weight, its inputs' moments, mask gradients, its producers."""

    group: Coupled
    """``kind`` (``neurons`` or ``heads``), ``name``, ``units``, and ``columns`` int64 ``[units, width]``: each
    unit's columns of the consumer."""
    weight: Tensor
    """float32 ``[out, c]``: of the consumer, the matrix that reads the units (``down_proj``, ``o_proj``)."""
    moments: Split | None = None
    """Of the consumer's inputs: ``mean``, ``variance``, ``mean_square`` ``[c]`` and ``second(centred)`` float64
    ``[c, c]``. A function of the user's always has them."""
    centred: bool = True
    """Whether a bias takes up the mean, so that only the variance is at stake (OBS)."""
    gradients: Tensor | None = None
    """float32 ``[sequences, units]``: derivative of each sequence's loss by each unit's mask. A function of the user's
    has them if it has an attribute ``needs_gradients`` that is true."""
    block: nn.Module | None = None
    """Holds the producers."""
    seed: int = 0

    def known(self) -> Split:
        """The moments of the inputs; ValueError where none were taken."""
        if self.moments is None:
            raise ValueError(f"the inputs of {self.group.name} were not observed, which this criterion scores")
        return self.moments

    def derivatives(self) -> Tensor:
        """The mask gradients; ValueError where none were computed."""
        if self.gradients is None:
            raise ValueError(f"there are no mask gradients of {self.group.name}, which this criterion scores")
        return self.gradients

    def per_unit(self, columns: Tensor) -> Tensor:
        """Sum of a column score ``[c]`` over each unit."""
        return columns.double()[to_device(self.group.columns, columns.device)].sum(1)


def random(layer: Scored) -> Tensor:
    """Uniform numbers from the run's seed."""
    generator = torch.Generator().manual_seed(layer.seed)
    return torch.rand(layer.group.units, generator=generator, dtype=torch.float64)


def magnitude(layer: Scored) -> Tensor:
    """Norm of the unit's rows in its producers and of its columns in the consumer."""
    total = layer.per_unit(layer.weight.square().sum(0))
    if layer.block is None:
        raise ValueError(f"magnitude scores the producers of {layer.group.name}: give the block that holds them")
    for slot in layer.group.slots:
        value = layer.block.get_parameter(slot.path).data
        value = (value if slot.expert is None else value[slot.expert]).float().transpose(0, slot.dim)
        rows = value.square().reshape(len(value), -1).sum(1).double()
        total = total + rows[slot.rows.to(rows.device)].sum(1).to(total.device)
    return total.sqrt()


def activation(layer: Scored) -> Tensor:
    """Column norm times input norm, ``‖W_·j‖ ‖X_j‖`` (Wanda, arXiv 2306.11695, for columns); root sum of squares over a
    head."""
    return layer.per_unit(layer.known().mean_square * layer.weight.double().square().sum(0)).sqrt()


def wifv(layer: Scored) -> Tensor:
    """FLAP's weighted input feature variance ``Σ_jj ‖W_·j‖²`` (arXiv 2312.11983)."""
    return layer.per_unit(layer.known().variance * layer.weight.double().square().sum(0))


def taylor(layer: Scored) -> Tensor:
    """First-order effect of masking the unit, ``|Σ g·w|`` of each sequence, averaged (SNIP; Molchanov et al.)."""
    return layer.derivatives().double().abs().mean(0)


def fisher(layer: Scored) -> Tensor:
    """Mean squared mask gradient (Kwon et al., arXiv 2204.09656)."""
    return layer.derivatives().double().square().mean(0)


def _inverse(layer: Scored) -> Tensor:
    """Damped inverse of the second moments, float64 ``[c, c]``."""
    h = layer.known().second(layer.centred)
    mean = h.diagonal().mean()
    h = h + OBS_DAMPING * torch.where(mean == 0, 1, mean) * torch.eye(len(h), dtype=h.dtype, device=h.device)
    factor, info = torch.linalg.cholesky_ex(h)
    return torch.cholesky_inverse(factor.masked_fill_(info != 0, torch.nan))  # which no score survives


def obs(layer: Scored) -> Tensor:
    """Error that dropping a unit leaves after the others have compensated: ``tr(W_u [(H⁻¹)_uu]⁻¹ W_uᵀ)``."""
    inverse = _inverse(layer)
    if layer.group.width == 1:
        return layer.weight.double().square().sum(0) / inverse.diagonal()
    return _block_scores(layer.weight.double(), inverse, to_device(layer.group.columns, inverse.device))


def _block_scores(weight: Tensor, inverse: Tensor, columns: Tensor) -> Tensor:
    """``tr(W_u [(H⁻¹)_uu]⁻¹ W_uᵀ)`` for units of several columns ``[units, width]``."""
    blocks = inverse[columns[:, :, None], columns[:, None, :]]
    w = weight.T[columns]  # [units, width, out]
    return (w * torch.linalg.solve_ex(blocks, w)[0]).sum((1, 2))


def obs_greedy(layer: Scored) -> Tensor:
    """Joint OBS: drop the least harmful unit, downdate ``H⁻¹`` and W, repeat; the score is the order of removal.

    Neurons go in blocks of ``BLOCK``, chosen one at a time with exact updates inside a pool of the ``POOL`` cheapest,
    then applied to the whole matrix by one product (a refactorisation per removal would cost c⁴).
    """
    inverse = _inverse(layer)
    factored = inverse.diagonal().isfinite().all()
    order, _ = greedy_order(layer.weight.double(), inverse, layer.group)
    score = torch.empty(len(order), dtype=torch.float64, device=order.device)
    score[order] = torch.arange(len(order), dtype=torch.float64, device=order.device)
    return score.where(factored, torch.nan)


def greedy_order(weight: Tensor, inverse: Tensor, group: Coupled) -> tuple[Tensor, Tensor]:
    """Units in order of removal, int64 ``[units]``, and the error each adds, float64. Both inputs are overwritten."""
    if group.width == 1:
        return _greedy_columns(weight, inverse)
    columns = to_device(group.columns, weight.device)
    alive = torch.arange(group.units, device=weight.device)
    order, losses = [], []
    while len(alive):  # nothing is read: what is left is one unit less, whichever it is
        loss, place = _block_scores(weight, inverse, columns[alive]).min(0, keepdim=True)
        best = alive[place]
        order.append(best)
        losses.append(loss)
        rest = torch.arange(len(alive) - 1, device=weight.device)
        alive = alive[rest + (rest >= place)]
        _downdate(weight, inverse, columns[best].flatten())
    return torch.cat(order), torch.cat(losses)


def _downdate(weight: Tensor, inverse: Tensor, gone: Tensor) -> None:
    """Remove columns: ``W −= W_S (H⁻¹_SS)⁻¹ H⁻¹_S·`` and the same for H⁻¹; removed entries become inert."""
    factor, _ = torch.linalg.cholesky_ex(inverse[gone][:, gone])
    half = torch.linalg.solve_triangular(factor, inverse[gone], upper=False)  # [S, c]
    part = torch.linalg.solve_triangular(factor, weight[:, gone].T, upper=False)  # [S, out]
    weight.addmm_(part.T, half, alpha=-1)
    inverse.addmm_(half.T, half, alpha=-1)
    inverse.index_fill_(0, gone, 0).index_fill_(1, gone, 0).diagonal().index_fill_(0, gone, 1)
    weight.index_fill_(1, gone, 0)


def _greedy_columns(weight: Tensor, inverse: Tensor, pool: int = POOL, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    c = len(inverse)
    left = torch.ones(c, dtype=torch.bool, device=weight.device)
    place = torch.arange(c, device=weight.device)
    order: list[int] = []
    losses: list[float] = []
    while len(order) < c:
        if c - len(order) < SHRINK * len(left):  # what is gone costs no more work: 2.6 times fewer operations
            kept = left.nonzero()[:, 0]
            weight, inverse, place = weight[:, kept], inverse[kept][:, kept], place[kept]
            left = torch.ones_like(place, dtype=torch.bool)
        scores = (weight.square().sum(0) / inverse.diagonal()).masked_fill(~left, torch.inf)
        remaining = c - len(order)
        candidates = scores.topk(min(pool, remaining), largest=False).indices
        chosen, cost = _greedy_in_pool(weight[:, candidates], inverse[candidates][:, candidates], min(block, remaining))
        gone = candidates[chosen]
        order += place[gone].tolist()
        losses += cost
        left[gone] = False
        _downdate(weight, inverse, gone)
    told = torch.tensor(order), torch.tensor(losses, dtype=torch.float64)
    return to_device(told[0], weight.device), to_device(told[1], weight.device)


def _greedy_in_pool(weight: Tensor, h_inverse: Tensor, count: int) -> tuple[Tensor, list[float]]:
    """Exact greedy removal of ``count`` columns among the pool's, from ``WᵀW`` and ``H⁻¹`` of the pool alone."""
    gram, inverse = (weight.T @ weight).cpu().numpy(), h_inverse.cpu().numpy().copy()
    import numpy as np

    dead = np.zeros(len(gram), dtype=bool)
    chosen, cost = [], []
    for _ in range(count):
        score = np.where(dead, np.inf, gram.diagonal() / np.where(dead, 1, inverse.diagonal()))
        j = int(score.argmin())
        chosen.append(j)
        cost.append(max(float(score[j]), 0.0))
        dead[j] = True
        u = inverse[j] / inverse[j, j]
        # W_p −= w_j u_p changes WᵀW by rank two
        g = gram[j].copy()
        gram += np.outer(u, u) * g[j] - np.outer(g, u) - np.outer(u, g)
        inverse -= np.outer(inverse[j], u)
    return to_device(torch.tensor(chosen), weight.device), cost


CRITERIA: dict[str, Callable[[Scored], Tensor]] = {
    "random": random,
    "magnitude": magnitude,
    "activation": activation,
    "wifv": wifv,
    "taylor": taylor,
    "fisher": fisher,
    "obs": obs,
    "obs_greedy": obs_greedy,
}
NEEDS_GRADIENTS = ("taylor", "fisher")
NEEDS_MOMENTS = ("activation", "wifv", "obs", "obs_greedy")


def needs_gradients(criterion: str | Callable[[Scored], Tensor]) -> bool:
    """Whether a criterion looks at mask gradients; a function says so by an attribute of this name."""
    return bool(getattr(criterion, "needs_gradients", False)) or criterion in NEEDS_GRADIENTS


def needs_moments(criterion: str | Callable[[Scored], Tensor]) -> bool:
    """Whether a criterion looks at moments of activations; a function may."""
    return callable(criterion) or criterion in NEEDS_MOMENTS


def score(criterion: str | Callable[[Scored], Tensor], layer: Scored, where: str | None = None) -> Tensor:
    """Scores float64 ``[units]`` on the host. Raises ConfigError if they are not finite or, of a function, not
    ``[units]``.

    where: what the sentence calls the group, its name by default.
    """
    where = where or layer.group.name
    if callable(criterion):
        return _own(criterion, layer, where)
    out = CRITERIA[criterion](layer).double().cpu()
    if not bool(torch.isfinite(out).all()):
        raise ConfigError(f"{criterion} scores of {where} are not finite; check the calibration data")
    return out


def _own(criterion: Callable[[Scored], Tensor], layer: Scored, where: str) -> Tensor:
    """Scores by a function of the user's."""
    name, units = function_name(criterion), layer.group.units
    out = criterion(layer)
    got = None
    if not isinstance(out, Tensor):
        got = f"a {type(out).__name__}"
    elif out.shape != (units,):
        got = f"a tensor of shape {list(out.shape)}"
    elif out.is_complex():
        got = f"a tensor of {out.dtype}"
    elif bad := int((~torch.isfinite(out)).sum()):
        got = f"{bad} scores that are not finite"
    if got:
        raise ConfigError(
            f"criterion {name} returned {got} for {where}; it must return a tensor of one finite score per unit, "
            f"shape [{units}], higher is kept"
        )
    return out.detach().double().cpu()
