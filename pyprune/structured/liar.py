"""Reconstruction after structured pruning: LIAR, bias compensation and mask tuning (LIAR, arXiv 2407.13331).

One consumer ``y = W x + b`` keeps the columns K and loses D. With Σ the second moments of x (centred if there is a bias
slot) and, on a pruned prefix, an error ``e`` between the dense target and the layer's present output, everything below
follows from ``t = W_D x_D + e``, what is still missing from the output:

- LIAR (Wang et al., arXiv 2407.13331): ``Q = (Σ_KK + λI)⁻¹ Σ_KD``, ``W' = W_K + W_D Qᵀ``,
  ``b' = b + W_D (μ_D − Qᵀ μ_K)``, plus the same regression of e;
- bias compensation (FLAP, arXiv 2312.11983): ``b' = b + W_D μ_D + mean e``, LIAR with Q = 0;
- mask tuning (Kwon et al., arXiv 2204.09656): one least-squares scale per kept unit, damped towards 1.

Errors on held-out tokens come from their moments alone, without a forward pass; they choose λ and the fall-back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyprune import ops
from pyprune.ops import guards
from pyprune.ops.guards import Verdicts, at_fault
from pyprune.structured.groups import Coupled
from pyprune.structured.moments import About, Split, to_device

GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
"""Candidate λ, relative to the mean diagonal of Σ_KK."""
NOISE = 8.0
"""The search over the grid begins at λ = ``NOISE`` columns per token: what a ridge takes from noise grows so. The λ of
SmolLM2's neurons and heads, from 8,192 and from 32,768 tokens, lie within three places of it."""
NORM_RATIO = 3.0
TOKENS_PER_COLUMN = {"neurons": 5, "heads": 20}


@dataclass(eq=False)
class Problem:
    """One consumer to repair."""

    weight: Tensor
    """float32 ``[out, c]``."""
    bias: Tensor | None
    """float32 ``[out]``; None if the architecture has no slot for one."""
    group: Coupled
    moments: Split

    @property
    def tokens(self) -> int:
        return self.moments.count


@dataclass(eq=False)
class Repair:
    """A repaired consumer and how it came about."""

    weight: Tensor
    """float32 ``[out, K]``."""
    bias: Tensor | None
    method: str
    """What was used in the end: ``liar``, ``bias``, ``mask_tuning`` or ``none``."""
    damping: float | None = None
    error: float | None = None
    """Held-out error of the output, relative to the dense output's power."""
    errors: dict[str, float] = field(default_factory=dict)
    """The same for each reconstruction that was weighed."""
    norm_ratio: float = 1.0
    warnings: list[str] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)
    """Ops whose results failed a guard (:mod:`pyprune.ops.guards`)."""


def repair(
    problem: Problem,
    kept: Tensor,
    method: str = "liar",
    *,
    damping: float | None = None,
    interpolate: str = "both",
    interpolate_weights: bool = False,
    guard: bool = True,
) -> Repair:
    """Reconstruct one consumer for the kept units.

    kept: int64 units, ascending. damping: λ relative to the mean diagonal; None chooses it on held-out tokens.
    interpolate: ``both``, ``weight`` (uncentred, no bias) or ``bias`` (Q = 0). guard: fall back, where the held-out
    error says so, to bias compensation (LIAR) or to no change (mask tuning).
    """
    bias_slot = problem.bias is not None
    if method == "liar" and interpolate == "bias":
        method = "bias"
    if method == "bias" and not bias_slot:
        out = _plain(problem, kept)
        out.warnings.append("has no bias slot, so bias compensation leaves it as it is")
        return out
    if method == "none" or problem.tokens == 0:
        out = _plain(problem, kept)
        if problem.tokens == 0:
            out.warnings.append("saw no calibration token: sliced without reconstruction")
        return out
    centred = bias_slot and (method == "bias" or method == "liar" and interpolate == "both")
    pieces = _Pieces(problem, kept, centred)
    if method == "bias":
        out = Repair(pieces.kept_weight, pieces.bias(pieces.kept_weight), "bias")
        out.errors = _read({"bias": pieces.held_error(None), "none": pieces.unrepaired()})
    elif method == "mask_tuning":
        out = _mask_tuning(problem, kept, pieces, damping, guard)
        out.wrong = at_fault([pieces.verdicts.wrong])
    else:
        out = _liar(pieces, damping, interpolate_weights, guard)
    out.error = out.errors.get(out.method)
    _warn(out, problem, pieces)
    return out


def _read(errors: dict[str, Tensor]) -> dict[str, float]:
    """Numbers by name, read from the device in one go."""
    return dict(zip(errors, torch.stack([*errors.values()]).tolist()))


def _plain(problem: Problem, kept: Tensor) -> Repair:
    columns = to_device(problem.group.columns_of(kept), problem.weight.device)
    return Repair(problem.weight[:, columns].clone(), None if problem.bias is None else problem.bias.clone(), "none")


@dataclass(eq=False)
class _Cut:
    """Products of one part of the tokens, cut by the kept columns K and the dropped ones D."""

    kk: Tensor
    """``[K, K]``."""
    kd: Tensor
    """``[K, D]``."""
    kt: Tensor
    """``E[x_K tᵀ] [K, out]``, t the missing part of the output."""
    ke: Tensor | None = None
    """``E[x_K eᵀ] [K, out]``; None without errors."""
    dd: Tensor | float = 0.0
    tt: Tensor | float = 0.0
    """``E‖t‖²``, and like ``dd`` and ``shared``, which the dense output's power needs, on the measured part only."""
    shared: Tensor | float = 0.0


class _Pieces:
    """Moments of one problem cut by K and D, on the fitted part, the held-out part, and all tokens."""

    def __init__(self, problem: Problem, kept: Tensor, centred: bool):
        weight, group = problem.weight, problem.group
        gone = torch.ones(group.units, dtype=torch.bool)
        gone[kept] = False
        self.keep = to_device(group.columns_of(kept), weight.device)
        self.drop = to_device(group.columns_of(gone.nonzero()[:, 0]), weight.device)
        self.problem, self.centred, self.verdicts = problem, centred, Verdicts()
        self.kept_weight, self.dropped_weight = weight[:, self.keep], weight[:, self.drop]
        self.view = view = problem.moments.view(centred)
        self.held = self._cut(view.held, measured=True)
        self.fit = self.held if view.held is view.fit else self._cut(view.fit)
        at, moved = (weight.double() @ v for v in (view.point, view.offset))
        self.power = (self._output_power() + (at * (at + 2 * moved)).sum()).clamp(min=1e-30)

    def _output_power(self) -> Tensor:
        """Held-out ``tr(W M Wᵀ)`` about the view's point, from the pieces there are."""
        k, held = self.kept_weight, self.held
        return (k @ held.kk * k).sum().double() + held.shared + held.dd

    def _cut(self, about: About, measured: bool = False) -> _Cut:
        """The products of a part; measured: also what errors on it need."""
        k, d, w = self.keep, self.drop, self.dropped_weight
        rows = about.second[k]
        kd = rows[:, d]
        kt = kd @ w.T
        out = _Cut(rows[:, k], kd, kt)
        if measured:
            out.dd = out.tt = (w @ about.second[d][:, d] * w).sum().double()
            out.shared = 2 * (kt.T * self.kept_weight).sum().double()
            out.tt = out.tt + about.square
        if about.cross is not None:
            out.ke = about.cross[k]
            out.kt = kt + out.ke
            if measured:
                out.tt = out.tt + 2 * (about.cross[d].T * w).sum().double()
        return out

    def held_error(self, update: Tensor | None) -> Tensor:
        """Relative held-out error of ``W_K + update``; update float32 ``[out, K]``. A float64 scalar on the device."""
        error = torch.as_tensor(self.held.tt)
        if update is not None:
            error = error + ((update @ self.held.kk * update).sum() - 2 * (update * self.held.kt.T).sum()).double()
        return error.clamp(min=0) / self.power

    def unrepaired(self) -> Tensor:
        """Relative held-out error of plain slicing (no bias either); a float64 scalar on the device."""
        view, w = self.view, self.dropped_weight.double()
        at, moved = w @ view.point[self.drop], w @ view.offset[self.drop]
        if view.point_e is not None and view.offset_e is not None:
            at, moved = at + view.point_e, moved + view.offset_e
        return (self.held.tt + (at * (at + 2 * moved)).sum()).clamp(min=0) / self.power

    def total(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``Σ_KK``, ``Σ_KD`` and the moments of K with e, of all tokens about their own mean (or the origin)."""
        share, shift = self.view.share, self.view.shift.float()
        k, d = shift[self.keep], shift[self.drop]
        kk = (share * self.fit.kk + (1 - share) * self.held.kk).addr(k, k, alpha=-1)
        kd = (share * self.fit.kd + (1 - share) * self.held.kd).addr(k, d, alpha=-1)
        if self.fit.ke is None or self.held.ke is None or self.view.shift_e is None:
            return kk, kd, None
        ke = share * self.fit.ke + (1 - share) * self.held.ke
        return kk, kd, ke.addr(k, self.view.shift_e.float(), alpha=-1)

    def bias(self, weight: Tensor) -> Tensor | None:
        """``b' = b + W_D μ_D + mean e − (W' − W_K) μ_K``: exact mean of the output over all tokens."""
        if self.problem.bias is None or not self.centred:
            return None if self.problem.bias is None else self.problem.bias.clone()
        mean, mean_e = self.problem.moments.mean, self.problem.moments.mean_e
        shift = self.dropped_weight.double() @ mean[self.drop] - (weight - self.kept_weight).double() @ mean[self.keep]
        return (self.problem.bias.double() + shift + (0 if mean_e is None else mean_e)).float()


def solve_damped(a: Tensor, b: Tensor, damping: Tensor, verdicts: Verdicts | None = None) -> tuple[Tensor, Tensor]:
    """``(a + λI)⁻¹ b``: float32 ``[n, n]``, ``[n, k]``, λ a float64 scalar → ``[n, k]``, and whether it is finite,
    a bool scalar on the device. Guarded where there are verdicts to add to."""
    solution, info = ops.cholesky_solve(a[None].contiguous(), b[None].contiguous(), damping=damping.float().reshape(1))
    good = (info[0] == 0) & torch.isfinite(solution).all()
    if verdicts is not None:
        verdicts.add("cholesky_solve", guards.solved(a, b, damping, solution[0], good))
    return solution[0], good


def _scale(matrix: Tensor) -> Tensor:
    """Mean diagonal, the unit of λ; 1 for a matrix of zeros. A float64 scalar."""
    mean = matrix.diagonal().mean().double()
    return torch.where(mean > 0, mean, 1)


def choose_damping(
    a: Tensor,
    b: Tensor,
    damping: float | None,
    error: Callable[[Tensor], Tensor],
    verdicts: Verdicts | None = None,
    others: dict[str, Tensor] | None = None,
    *,
    tokens: int,
) -> tuple[float | None, float, dict[str, float]]:
    """λ (relative) with the least ``error(solution [n, k])`` among the candidates, and that error; None and infinity
    if no λ gives a finite solution. With it ``others``, scalars on the device that are read along. The first solution
    is guarded where there are verdicts to add to.

    The error falls and rises once over λ, so a walk downhill finds it, with three to five factorisations as a rule
    instead of nine; the errors of the first three are read together. tokens: what ``a`` was computed from. A given λ is
    tried alone, and raised tenfold from 1e-6 on where the factorisation fails (a singular Gram matrix).
    """
    scale, start = _scale(a), start_of(tokens, len(a))
    seen: dict[float, float] = {}

    def tried(value: float) -> Tensor:
        solution, good = solve_damped(a, b, value * scale, None if verdicts is None or verdicts.wrong else verdicts)
        return torch.where(good, error(solution), torch.inf)

    def at(value: float) -> float:
        if value not in seen:
            seen[value] = tried(value).item()
        return seen[value]

    first = GRID[start - 1 : start + 2] if damping is None else (damping,)
    told = _read({**{f"{value}": tried(value) for value in first}, **(others or {})})
    seen |= {value: told.pop(f"{value}") for value in first}
    chosen, least = _walk(at, damping, seen, start)
    return chosen, least, told


def start_of(tokens: int, columns: int) -> int:
    """The place in ``GRID``, neither the first nor the last, nearest to ``NOISE`` columns per token."""
    wanted = math.log(NOISE * columns / max(tokens, 1))
    return min(range(1, len(GRID) - 1), key=lambda i: abs(math.log(GRID[i]) - wanted))


def _walk(
    at: Callable[[float], float], damping: float | None, seen: dict[float, float], start: int
) -> tuple[float | None, float]:
    """The λ that ``at`` finds least among the candidates, and its value there; ``seen``: what it knows already."""
    if damping is not None:
        for value in (damping, *(v for v in (1e-6, 1e-5, 1e-4, *GRID) if v > damping)):
            if at(value) < float("inf"):
                return value, seen[value]
        return None, float("inf")
    i = start
    for way in (-1, 1):
        while 0 <= i + way < len(GRID) and at(GRID[i + way]) < at(GRID[i]):
            i += way
    for value in GRID:  # nothing near the start could be factored
        if min(seen.values()) < float("inf"):
            break
        at(value)
    best = min(seen, key=at)
    return (best, seen[best]) if seen[best] < float("inf") else (None, float("inf"))


def _liar(pieces: _Pieces, damping: float | None, interpolate_weights: bool, guard: bool) -> Repair:
    problem, d = pieces.problem, pieces.drop
    others = {"none": pieces.unrepaired()}
    if problem.bias is not None and pieces.centred:
        others["bias"] = pieces.held_error(None)
    chosen, error, beside = choose_damping(
        pieces.fit.kk,
        pieces.fit.kt,
        damping,
        lambda s: pieces.held_error(s.T),
        pieces.verdicts,
        others,
        tokens=problem.tokens,
    )
    errors = {"liar": error, **beside}
    least, instead = min((e, m) for m, e in errors.items() if m != "liar")
    reason = None
    if chosen is None:
        reason = "no λ gave a finite solution"
    elif guard and least < error and held_out(problem):
        reason = f"its held-out error {error:.3g} is above {instead}'s {least:.3g}"
    if chosen is None or reason is not None:
        bias = pieces.bias(pieces.kept_weight) if instead == "bias" else problem.bias
        out = Repair(pieces.kept_weight.clone(), bias, instead, errors=errors)
        out.warnings, out.wrong = [f"LIAR was not used: {reason}"], at_fault([pieces.verdicts.wrong])
        return out
    system, kd, cross = pieces.total()
    direct = len(problem.weight) < len(d) and not interpolate_weights
    if direct:  # fewer outputs than dropped columns: solve for W_D Qᵀ itself
        right = kd @ pieces.dropped_weight.T if cross is None else kd @ pieces.dropped_weight.T + cross
    else:
        right = kd if cross is None else torch.cat([kd, cross], dim=1)
    solution, good = solve_damped(system, right, chosen * _scale(system), pieces.verdicts)
    if direct:
        weight = pieces.kept_weight + solution.T
    else:
        weight = _interpolated(pieces, solution, interpolate_weights)
    ratio = weight.norm() / pieces.kept_weight.norm().clamp(min=1e-30)
    told = [good, ratio, *pieces.verdicts.wrong.values()]
    finite, grown, *wrong = torch.stack([t.double() for t in told]).tolist()
    if (
        not finite and chosen < 1e6
    ):  # the fitted part alone could be factored, all tokens could not: rounding at a tiny λ
        return _liar(pieces, 10 * max(chosen, 1e-7), interpolate_weights, guard)
    out = Repair(weight, pieces.bias(weight), "liar", chosen, errors=errors, norm_ratio=grown)
    out.wrong = {op for op, bad in zip(pieces.verdicts.wrong, wrong) if bad}
    return out


def _interpolated(pieces: _Pieces, solution: Tensor, interpolate_weights: bool) -> Tensor:
    """The kept columns from Q and the correction of the error beside it."""
    weight, k, d = pieces.problem.weight, pieces.keep, pieces.drop
    q, correction = solution[:, : len(d)].contiguous(), solution[:, len(d) :]
    if interpolate_weights:
        # the paper's W_K (I + P Qᵀ), P the least-squares map of the kept weights onto the dropped ones
        p = torch.linalg.pinv(pieces.kept_weight) @ pieces.dropped_weight
        updated = pieces.kept_weight + pieces.kept_weight @ p @ q.T
    else:
        updated, _ = ops.liar_update(weight, k, d, q)
        pieces.verdicts.add("liar_update", guards.interpolated(weight, k, d, q, updated))
    return updated + correction.T if correction.shape[1] else updated


def held_out(problem: Problem) -> bool:
    return problem.moments.held.count > 0


def _mask_tuning(problem: Problem, kept: Tensor, pieces: _Pieces, damping: float | None, guard: bool) -> Repair:
    """``s = 1 + (A_KK + λI)⁻¹ (A_KD 1 + f_K)`` with ``A_uv = E[(W_u x_u)ᵀ(W_v x_v)]``, ``f_u = E[(W_u x_u)ᵀ e]``."""
    group, w = problem.group, problem.weight
    unit = torch.empty(group.columns.numel(), dtype=torch.long)
    unit[group.columns] = torch.arange(group.units)[:, None].expand_as(group.columns)
    unit = unit.to(w.device)
    gone = torch.ones(group.units, dtype=torch.bool, device=w.device)
    gone[kept.to(w.device)] = False

    overlap = w.T @ w

    def cut(about: About) -> tuple[Tensor, Tensor]:
        a = about.second * overlap
        if group.width > 1:
            a = torch.zeros(group.units, len(a), device=a.device).index_add(0, unit, a)
            a = torch.zeros(group.units, group.units, device=a.device).index_add(1, unit, a)
        f = a[:, gone].sum(1)
        if about.cross is not None:
            f = f.index_add(0, unit, (about.cross * w.T).sum(1))
        return a[~gone][:, ~gone], f[~gone]

    a, f = cut(pieces.view.fit)
    held_a, held_f = cut(pieces.view.held) if held_out(problem) else (a, f)

    def error(delta: Tensor) -> Tensor:
        delta = delta[:, 0]
        return (pieces.held.tt + (delta @ held_a @ delta - 2 * delta @ held_f).double()).clamp(min=0) / pieces.power

    others = {"none": pieces.held_error(None)}
    chosen, best, told = choose_damping(a, f[:, None], damping, error, pieces.verdicts, others, tokens=problem.tokens)
    errors = {"mask_tuning": best, **told}
    if chosen is None or (guard and errors["none"] < best and held_out(problem)):
        return Repair(
            pieces.kept_weight.clone(),
            problem.bias,
            "none",
            errors=errors,
            warnings=["mask tuning was not used: its held-out error is above plain slicing's"],
        )
    share = pieces.view.share
    a, f = share * a + (1 - share) * held_a, share * f + (1 - share) * held_f
    delta, _ = solve_damped(a, f[:, None], chosen * _scale(a), pieces.verdicts)
    scales = torch.ones(group.units, device=w.device)
    scales[~gone] += torch.nan_to_num(delta[:, 0])
    return Repair(pieces.kept_weight * scales[unit][pieces.keep], problem.bias, "mask_tuning", chosen, errors=errors)


def _warn(out: Repair, problem: Problem, pieces: _Pieces) -> None:
    columns = len(pieces.keep)
    if out.method == "liar":
        if out.norm_ratio > NORM_RATIO:
            out.warnings.append(
                f"norm grew {out.norm_ratio:.1f}-fold (healthy: 1.0–1.6): an outlier column of its "
                "input was rebuilt from collinear ones; more calibration tokens or damping help"
            )
        wanted = TOKENS_PER_COLUMN[problem.group.kind]
        if problem.tokens < wanted * columns:
            out.warnings.append(
                f"has {problem.tokens} calibration tokens for {columns} kept columns; LIAR wants at least "
                f"{wanted} tokens per column"
            )
