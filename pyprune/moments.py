"""Second moments of a consumer's inputs, precise enough to be centred (METHODS section 5)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyprune import ops

FLUSH_TOKENS = 16384
HELD_OUT_EVERY = 5


@dataclass(eq=False)
class Moments:
    """Moments of inputs ``x [tokens, c]`` and, beside them, of an error ``e [tokens, r]`` still to be corrected.

    Products are summed in float32 about a fixed shift, near the mean, and flushed to float64 masters: subtracting the
    mean afterwards cancels nothing that matters.
    """

    columns: int
    outputs: int = 0
    """r; 0 if there is no error term."""
    device: torch.device | str = "cpu"
    precision: str = "float32"
    shift: Tensor | None = None
    """float32 ``[c]``; the first batch's mean unless given."""
    shift_e: Tensor | None = None
    count: int = 0
    gram: Tensor = field(init=False)
    """float64 ``[c, c]``, ``Σ (x−shift)(x−shift)ᵀ``."""
    sums: Tensor = field(init=False)
    cross: Tensor | None = field(init=False, default=None)
    """float64 ``[c, r]``, ``Σ (x−shift)(e−shift_e)ᵀ``."""
    sums_e: Tensor | None = field(init=False, default=None)
    squares_e: float = field(init=False, default=0.0)

    def __post_init__(self):
        c, r, double = self.columns, self.outputs, {"dtype": torch.float64, "device": self.device}
        self.gram, self.sums = torch.zeros(c, c, **double), torch.zeros(c, **double)
        if r:
            self.cross, self.sums_e = torch.zeros(c, r, **double), torch.zeros(r, **double)
        self._pending: list[Tensor] | None = None
        self._since = 0

    def update(self, x: Tensor, e: Tensor | None = None) -> None:
        """Add tokens ``x [tokens, c]`` and their errors ``e [tokens, r]``."""
        if not len(x):
            return
        x = x.float()
        if self.shift is None:
            self.shift = x.mean(0)
        x = x - self.shift
        if self._pending is None:
            self._pending = [torch.zeros(self.columns, self.columns, device=self.device),
                             torch.zeros(self.columns, device=self.device)]
            if self.outputs:
                self._pending.append(torch.zeros(self.columns, self.outputs, device=self.device))
        ops.gram_update(self._pending[0], x, sums=self._pending[1], precision=self.precision)
        if self.outputs:
            e = torch.zeros(len(x), self.outputs, device=x.device) if e is None else e.float()
            if self.shift_e is None:
                self.shift_e = e.mean(0)
            e = e - self.shift_e
            if self.precision == "bfloat16":
                x, e = x.bfloat16(), e.bfloat16()
            ops.cross_gram_update(self._pending[2], x, e)
            self.sums_e += e.double().sum(0)
            self.squares_e += float(e.float().square().sum(dtype=torch.float64))
        self.count += len(x)
        self._since += len(x)
        if self._since >= FLUSH_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Add the float32 sums to the float64 masters."""
        if self._pending is not None:
            for master, part in zip((self.gram, self.sums, self.cross), self._pending):
                master += part
            self._pending, self._since = None, 0

    def plus(self, other: Moments) -> Moments:
        """Moments of both samples; they must share their shifts."""
        for part in (self, other):
            part.flush()
        out = Moments(self.columns, self.outputs, self.device, self.precision, self.shift, self.shift_e)
        out.count = self.count + other.count
        out.gram, out.sums = self.gram + other.gram, self.sums + other.sums
        if self.outputs:
            out.cross, out.sums_e = self.cross + other.cross, self.sums_e + other.sums_e
            out.squares_e = self.squares_e + other.squares_e
        return out

    @property
    def mean(self) -> Tensor:
        """float64 ``[c]``."""
        self.flush()
        return self.sums / max(self.count, 1) + (0 if self.shift is None else self.shift)

    @property
    def mean_e(self) -> Tensor | None:
        """float64 ``[r]``; None without an error term."""
        if not self.outputs:
            return None
        return self.sums_e / max(self.count, 1) + (0 if self.shift_e is None else self.shift_e)

    def about(self, point: Tensor | None = None, point_e: Tensor | None = None) -> About:
        """Mean products of ``x − point`` and ``e − point_e``; None is the origin."""
        self.flush()
        n = max(self.count, 1)
        u = self.sums / n
        shift = torch.zeros_like(u) if self.shift is None else self.shift.double()
        d = (0 if point is None else point) - shift
        second = self.gram / n
        second -= torch.outer(u, d) + torch.outer(d, u) - torch.outer(d, d)
        if not self.outputs:
            return About(second)
        v = self.sums_e / n
        shift_e = torch.zeros_like(v) if self.shift_e is None else self.shift_e.double()
        f = (0 if point_e is None else point_e) - shift_e
        cross = self.cross / n - torch.outer(u, f) - torch.outer(d, v) + torch.outer(d, f)
        return About(second, cross, float(self.squares_e / n - 2 * (v @ f) + f @ f))

    def finite(self) -> bool:
        self.flush()
        return bool(torch.isfinite(self.gram.diagonal()).all())


@dataclass(eq=False)
class About:
    """Mean products about a point: ``E[xxᵀ]``, ``E[xeᵀ]`` (None without errors), ``E‖e‖²``; float64."""

    second: Tensor
    cross: Tensor | None = None
    square: float = 0.0


@dataclass(eq=False)
class Split:
    """Moments of a fitted part and of a held-out part of the calibration tokens, on common shifts."""

    fit: Moments
    held: Moments

    @staticmethod
    def make(columns: int, outputs: int, device, precision: str) -> Split:
        return Split(Moments(columns, outputs, device, precision), Moments(columns, outputs, device, precision))

    def update(self, x: Tensor, held: Tensor, e: Tensor | None = None) -> None:
        """Add tokens; ``held`` bool ``[tokens]`` marks those set aside."""
        if self.fit.shift is None and len(x):
            self.fit.shift = self.held.shift = x.float().mean(0)
            if self.fit.outputs:
                zero = torch.zeros(self.fit.outputs, device=x.device)
                self.fit.shift_e = self.held.shift_e = zero if e is None else e.float().mean(0)
        keep = ~held
        self.fit.update(x[keep], None if e is None else e[keep])
        self.held.update(x[held], None if e is None else e[held])

    @property
    def all(self) -> Moments:
        return self.fit.plus(self.held)


def held_out_tokens(sequences: int, length: int, start: int, total: int) -> Tensor:
    """bool ``[sequences·length]``: every fifth sequence of a run of ``total``; with fewer than ten sequences, the
    last fifth of each sequence's tokens."""
    if total >= 2 * HELD_OUT_EVERY:
        row = (torch.arange(start, start + sequences) % HELD_OUT_EVERY) == HELD_OUT_EVERY - 1
        return row.repeat_interleave(length)
    last = torch.arange(length) >= length - max(1, length // HELD_OUT_EVERY)
    return last.repeat(sequences)
