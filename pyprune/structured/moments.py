"""Second moments of a consumer's inputs, precise enough to be centred (LIAR, arXiv 2407.13331)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyprune import ops
from pyprune.ops import guards
from pyprune.ops.guards import at_fault

FLUSH_TOKENS = 8192
HELD_OUT_EVERY = 5
FLOOR = 0.01


@dataclass(eq=False)
class Moments:
    """Moments of inputs ``x [tokens, c]`` and, beside them, of an error ``e [tokens, r]`` still to be corrected.

    Products are summed in float32 about a fixed shift, near the mean, and flushed to float64 sums: subtracting the
    mean afterwards cancels nothing that matters. Tokens may carry weights (:func:`token_weights`): then every product,
    sum and mean below is a weighted one, except ``plain_sums`` and ``plain_squares``, for criteria that are defined
    on plain activations.
    """

    columns: int
    outputs: int = 0
    """r; 0 if there is no error term."""
    device: torch.device | str = "cpu"
    precision: str = "float32"
    placed: bool = field(init=False, default=False)
    """Whether the shifts are set: to the first batch's means, or from outside (:meth:`place`)."""
    shift: Tensor = field(init=False)
    """float32 ``[c]``."""
    shift_e: Tensor = field(init=False)
    """float32 ``[r]``."""
    count: int = 0
    weighted: bool = False
    """Whether any tokens came with weights."""
    totals: Tensor = field(init=False)
    """float64 ``[2]``: Σ of the tokens' weights (``count`` if they have none) and ``Σ w ‖e−shift_e‖²``; on the device,
    so that adding tokens waits for nothing."""
    gram: Tensor = field(init=False)
    """float64 ``[c, c]``, ``Σ w (x−shift)(x−shift)ᵀ``."""
    sums: Tensor = field(init=False)
    cross: Tensor = field(init=False)
    """float64 ``[c, r]``, ``Σ w (x−shift)(e−shift_e)ᵀ``."""
    sums_e: Tensor = field(init=False)
    redo: Callable[[str], None] | None = None
    """Set where the tokens do not come again: hears of an op whose first products, at fault, are made again."""
    wrong: dict[str, Tensor] = field(init=False, default_factory=dict)
    """By op, whether its first products failed their guards (:mod:`pyprune.ops.guards`), on the device."""

    def __post_init__(self):
        c, r = self.columns, self.outputs
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device=self.device)
        self.shift, self.shift_e = torch.zeros(c, device=self.device), torch.zeros(r, device=self.device)
        self.totals = zeros(2)
        self.gram, self.sums = zeros(c, c), zeros(c)
        self.plain_sums, self.plain_squares = zeros(c), zeros(c)
        self.cross, self.sums_e = zeros(c, r), zeros(r)
        self._x: list[Tensor] = []
        self._e: list[Tensor] = []
        self._w: list[Tensor] = []
        self._waiting = 0

    def place(self, shift: Tensor, shift_e: Tensor) -> None:
        """Set the shifts, float32 ``[c]`` and ``[r]``."""
        self.shift, self.shift_e, self.placed = shift, shift_e, True

    def update(self, x: Tensor, e: Tensor | None = None, w: Tensor | None = None) -> None:
        """Add tokens ``x [tokens, c]``, their errors ``e [tokens, r]`` (None is zero) and weights ``w [tokens]``."""
        if not len(x):
            return
        x = x.float()
        e = torch.zeros(len(x), self.outputs, device=x.device) if e is None or not self.outputs else e.float()
        if not self.placed:
            self.place(mean_of(x, w), mean_of(e, w))
        self._x.append(x - self.shift)
        if self.outputs:
            self._e.append(e - self.shift_e)
        if w is not None:
            self.weighted = True
            self._w.append(w.float())
        self.count += len(x)
        self.totals[0] += len(x) if w is None else w.sum(dtype=torch.float64)
        self._waiting += len(x)
        if self._waiting >= FLUSH_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Products of the waiting tokens, summed in float32, into the float64 ones."""
        if not self._x:
            return
        x = torch.cat(self._x)
        root = torch.cat(self._w).sqrt() if self._w else None
        if root is not None:
            self.plain_sums += x.sum(0)
            self.plain_squares += torch.linalg.vector_norm(x, dim=0).square()
            x *= root[:, None]
        e = torch.cat(self._e) if self.outputs else None
        if e is not None and root is not None:
            e *= root[:, None]
        gram, sums, cross = self._products(x, e)
        self.gram += gram
        self.sums += sums if root is None else root @ x
        if e is not None and cross is not None:
            self.cross += cross
            self.sums_e += e.sum(0) if root is None else root @ e
            self.totals[1] += e.square().sum(dtype=torch.float64)
        self._x, self._e, self._w, self._waiting = [], [], [], 0

    def _products(self, x: Tensor, e: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """``xᵀx``, ``Σ x`` and ``xᵀe``, float32; the first ones are looked at by their guards."""
        products, wrong = self._multiply(x, e, judge=not self.wrong)
        if not self.wrong:
            self.wrong = wrong
            if self.redo is not None and (ops_at_fault := at_fault([wrong])):
                with ops.backend("reference"):
                    products, again = self._multiply(x, e, judge=True)
                for op in sorted(ops_at_fault - at_fault([again])):
                    self.redo(op)
                self.wrong = {op: torch.zeros_like(bad) for op, bad in wrong.items()}
        return products

    def _multiply(
        self, x: Tensor, e: Tensor | None, judge: bool
    ) -> tuple[tuple[Tensor, Tensor, Tensor | None], dict[str, Tensor]]:
        gram, sums = (torch.zeros(shape, device=x.device) for shape in ((self.columns, self.columns), self.columns))
        ops.gram_update(gram, x, sums=sums, precision=self.precision)
        cross, narrow = None, torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        if e is not None:
            cross = torch.zeros(self.columns, self.outputs, device=x.device)
            ops.cross_gram_update(cross, x.to(narrow), e.to(narrow))
        wrong = {}
        if judge:
            count = torch.full((), len(x), device=x.device)
            wrong["gram_update"] = guards.gram(gram, x, count, self.precision) | guards.summed(sums, x, gram.diagonal())
            if e is not None and cross is not None:
                bad = guards.cross_gram(cross, x.to(narrow), e.to(narrow), gram.diagonal())
                wrong["cross_gram_update"] = bad & ~wrong["gram_update"]  # whose diagonal it is judged by
        return (gram, sums, cross), wrong

    @property
    def mass(self) -> Tensor:
        """Σ of the tokens' weights, a float64 scalar on the device."""
        return self.totals[0]

    @property
    def plain(self) -> tuple[Tensor, Tensor]:
        """Σ and Σ of squares of ``x − shift`` without weights, float64 ``[c]``."""
        self.flush()
        return (self.plain_sums, self.plain_squares) if self.weighted else (self.sums, self.gram.diagonal())

    def mean_about_shift(self) -> tuple[Tensor, Tensor]:
        self.flush()
        n = _divisor(self.mass)
        return self.sums / n, self.sums_e / n

    def about(self, d: Tensor, f: Tensor) -> About:
        """Mean products about ``shift + d`` (and ``shift_e + f``): float64 subtraction, float32 result."""
        u, v = self.mean_about_shift()
        n = _divisor(self.mass)
        second = (self.gram / n).addr_(u, d, alpha=-1).addr_(d, d - u)
        if not self.outputs:
            return About(second.float())
        cross = (self.cross / n).addr_(u, f, alpha=-1).addr_(d, f - v)
        return About(second.float(), cross.float(), self.totals[1] / n - 2 * (v @ f) + f @ f)

    def move(self, shift: Tensor, shift_e: Tensor) -> None:
        """Take the products about other shifts; exact up to float64."""
        self.flush()
        if self.placed:
            d = (shift - self.shift).double()
            if self.outputs:
                f = (shift_e - self.shift_e).double()
                self.cross.addr_(self.sums, f, alpha=-1).addr_(d, self.totals[0] * f - self.sums_e)
                self.totals[1] += self.totals[0] * (f @ f) - 2 * (self.sums_e @ f)
                self.sums_e -= self.totals[0] * f
            self.gram.addr_(self.sums, d, alpha=-1).addr_(d, self.totals[0] * d - self.sums)
            self.sums -= self.totals[0] * d
            if self.weighted:
                self.plain_squares += self.count * d.square() - 2 * d * self.plain_sums
                self.plain_sums -= self.count * d
        self.place(shift, shift_e)

    def finite(self) -> Tensor:
        """bool scalar on the device."""
        self.flush()
        return torch.isfinite(self.gram.diagonal()).all()


def to_device(index: Tensor, device: torch.device) -> Tensor:
    """An index made on the host; a GPU's copy of it is not waited for."""
    return (index.pin_memory() if device.type == "cuda" else index).to(device, non_blocking=True)


def _divisor(mass: Tensor) -> Tensor:
    return torch.where(mass == 0, 1, mass)


@dataclass(eq=False)
class About:
    """Mean products about a point: ``E[xxᵀ]``, ``E[xeᵀ]`` (None without errors), ``E‖e‖²``; float32, but the last,
    which is a float64 scalar."""

    second: Tensor
    cross: Tensor | None = None
    square: Tensor | float = 0.0


@dataclass(eq=False)
class View:
    """A split's moments about one point p: the fitted part's mean, or the origin."""

    point: Tensor
    """float64 ``[c]``."""
    point_e: Tensor | None
    fit: About
    held: About
    """The fitted part's again if nothing is held out."""
    offset: Tensor
    """float64 ``[c]``: mean of the held-out part minus p."""
    offset_e: Tensor | None
    shift: Tensor
    """float64 ``[c]``: mean of all tokens minus p if centred, else zero."""
    shift_e: Tensor | None
    share: Tensor
    """Fitted tokens over all tokens, by weight; a float64 scalar."""


@dataclass(eq=False)
class Split:
    """Moments of a fitted part and of a held-out part of the calibration tokens, on common shifts."""

    fit: Moments
    held: Moments
    _views: dict[bool, View] = field(default_factory=dict)

    @staticmethod
    def make(
        columns: int,
        outputs: int = 0,
        device: torch.device | str = "cpu",
        precision: str = "float32",
        redo: Callable[[str], None] | None = None,
    ) -> Split:
        fit, held = (Moments(columns, outputs, device, precision, redo=redo) for _ in range(2))
        return Split(fit, held)

    def update(self, x: Tensor, held: Tensor, e: Tensor | None = None, w: Tensor | None = None) -> None:
        """Add tokens; ``held`` bool ``[tokens]``, in host memory, marks those set aside, so that a device need not be
        asked how many they are; w: float32 weights ``[tokens]``."""
        self._views.clear()
        if not self.fit.placed and len(x):
            shift_e = torch.zeros(self.fit.outputs, device=x.device)
            if e is not None and self.fit.outputs:
                shift_e = mean_of(e.float(), w)
            for part in (self.fit, self.held):
                part.place(mean_of(x.float(), w), shift_e)
        for part, which in ((self.fit, ~held), (self.held, held)):
            rows = to_device(which.nonzero().flatten(), x.device)
            part.update(
                x.index_select(0, rows),
                None if e is None else e.index_select(0, rows),
                None if w is None else w.index_select(0, rows),
            )

    def sum_over(self, world) -> None:
        """Moments of the tokens of all processes of a :class:`pyprune.execution.distributed.World`, in each of them."""
        if world.size == 1:
            return
        self._views.clear()
        fit, device = self.fit, self.fit.gram.device
        seen = fit.placed
        shift = fit.shift.clone() if seen else torch.zeros(fit.columns, device=device)
        shift_e = fit.shift_e.clone() if seen else torch.zeros(fit.outputs, device=device)
        told = torch.tensor([float(seen), float(fit.weighted or self.held.weighted)], device=device)
        world.sum_(shift, shift_e, told)
        processes, weighted = told.tolist()
        if not processes:  # no process has seen a token
            return
        shift /= processes  # the common shift is the mean of theirs
        shift_e /= processes
        for part in (self.fit, self.held):
            part.weighted = weighted > 0
            part.move(shift, shift_e)
            count = torch.tensor(part.count, device=device)
            world.sum_(
                part.gram, part.sums, part.cross, part.sums_e, part.plain_sums, part.plain_squares, part.totals, count
            )
            part.count = int(count)

    @property
    def count(self) -> int:
        return self.fit.count + self.held.count

    @property
    def mass(self) -> Tensor:
        return self.fit.mass + self.held.mass

    def _combined(self) -> tuple[Tensor, Tensor]:
        """Weighted mean of all tokens about the shift."""
        for part in (self.fit, self.held):
            part.flush()
        n = _divisor(self.mass)
        return (self.fit.sums + self.held.sums) / n, (self.fit.sums_e + self.held.sums_e) / n

    @property
    def mean(self) -> Tensor:
        """float64 ``[c]``, of all tokens, weighted."""
        return self._combined()[0] + self.fit.shift

    @property
    def mean_e(self) -> Tensor | None:
        """float64 ``[r]``; None without an error term."""
        return None if not self.fit.outputs else self._combined()[1] + self.fit.shift_e

    def _plain(self) -> tuple[Tensor, Tensor]:
        """Mean and mean square of all tokens about the shift, each counting once."""
        (sums, squares), (more, other) = self.fit.plain, self.held.plain
        n = max(self.count, 1)
        return (sums + more) / n, (squares + other) / n

    @property
    def variance(self) -> Tensor:
        """float64 ``[c]``, without weights."""
        u, squares = self._plain()
        return (squares - u.square()).clamp(min=0)

    @property
    def mean_square(self) -> Tensor:
        """float64 ``[c]``, about the origin, without weights."""
        u, _ = self._plain()
        return self.variance + (u + self.fit.shift).square()

    def second(self, centred: bool) -> Tensor:
        """Covariance, or uncentred mean products, of all tokens, weighted; float64 ``[c, c]``."""
        u, _ = self._combined()
        out = ((self.fit.gram + self.held.gram) / _divisor(self.mass)).addr_(u, u, alpha=-1)
        return out if centred else out.addr_(self.mean, self.mean)

    def view(self, centred: bool) -> View:
        """Both parts about the fitted part's mean (``centred``) or the origin; kept until tokens are added."""
        if centred not in self._views:
            self._views[centred] = self._view(centred)
        return self._views[centred]

    def _view(self, centred: bool) -> View:
        fit, held = (self.fit, self.held) if self.fit.count else (self.held, self.fit)
        held = held if held.count else fit
        shift = fit.shift.double()
        shift_e = fit.shift_e.double()
        d, f = fit.mean_about_shift() if centred else (-shift, -shift_e)
        u, v = held.mean_about_shift()
        total, total_e = self._combined()
        zero = torch.zeros_like(d)
        with_e = fit.outputs > 0
        first = fit.about(d, f)
        second = first if held is fit else held.about(d, f)
        point_e = offset_e = moved_e = None
        if with_e:
            point_e, offset_e, moved_e = f + shift_e, v - f, total_e - f if centred else torch.zeros_like(f)
        return View(
            d + shift,
            point_e,
            first,
            second,
            u - d,
            offset_e,
            total - d if centred else zero,
            moved_e,
            fit.mass / self.mass,
        )

    def finite(self) -> Tensor:
        """bool scalar on the device."""
        return self.fit.finite() & self.held.finite()

    def verdicts(self) -> list[dict[str, Tensor]]:
        """What the guards of both parts found, all tokens added."""
        for part in (self.fit, self.held):
            part.flush()
        return [self.fit.wrong, self.held.wrong]


def mean_of(x: Tensor, w: Tensor | None) -> Tensor:
    """Mean over tokens of ``x [tokens, c]``, weighted by ``w [tokens]``; float32 ``[c]``."""
    return x.mean(0) if w is None else (w.float() / w.float().sum().clamp(min=1e-30)) @ x


def token_weights(power: Tensor, floor: Tensor) -> Tensor:
    """``1/(‖y‖² + FLOOR·floor)`` of each token, zero where both are: its error then counts by its own output's size.

    Least squares over tokens follows the largest outputs. A transformer has neurons that speak on one token ([CLS], the
    first token) and there a thousand times louder than anything else. Once such a neuron is dropped, 95 to 99 % of the
    squared error lies on that token, the fit spends every kept neuron on rebuilding it and what it gives all other
    tokens is noise. Where a norm follows the residual sum at once (post-norm encoders), the token's size is divided
    away and only its relative error goes on.

    power: ``‖y‖²`` of the consumer's output, ``[tokens]``. floor: ``Σ_j x_j² ‖W_·j‖²``, the power it had if its
    columns did not cancel; it keeps a token with hardly any output from counting without bound. Any common factor of
    the weights is without effect.
    """
    total = power.float() + FLOOR * floor.float()
    return torch.where(total > 0, 1 / total.clamp(min=1e-30), 0)


def balanced_weights(power: Tensor, mean_power: Tensor) -> Tensor:
    """``1/‖s‖² + 1/mean ‖s‖²`` of each token: the error relative to the token's residual stream s, which the next norm
    divides by, and the squared error of all tokens together, in equal parts.

    For pre-norm blocks. There the size of a loud first token stays in the stream, and later blocks read it as an
    attention sink: it must be rebuilt, but not at the price of all other tokens (:func:`token_weights`).

    power: ``‖s‖²``, ``[tokens]``, s being the sum that the consumer's output lands in. mean_power: its mean over
    tokens, a scalar.
    """
    own = torch.where(power > 0, 1 / power.float().clamp(min=1e-30), 0)
    return torch.where(mean_power > 0, own + 1 / mean_power, own)


def held_out_tokens(sequences: int, length: int, start: int, total: int) -> Tensor:
    """bool ``[sequences·length]``: every fifth sequence of a run of ``total``; with fewer than ten sequences, the
    last fifth of each sequence's tokens."""
    if total >= 2 * HELD_OUT_EVERY:
        row = (torch.arange(start, start + sequences) % HELD_OUT_EVERY) == HELD_OUT_EVERY - 1
        return row.repeat_interleave(length)
    last = torch.arange(length) >= length - max(1, length // HELD_OUT_EVERY)
    return last.repeat(sequences)
