"""Packed weights, which ``sparse_linear`` multiplies with: one bit per weight, and those that are not zero.

Layout of a weight ``[out, in]``, in memory and in files (docs/formats.md):

``mask``     uint8 ``[out, ceil(in / 8)]``: bit k of byte j (k = 0 the lowest) is column 8j + k, 1 where the weight is
             stored; the bits behind column in − 1 are 0
``values``   ``[nnz]`` in the weight's own type, row by row, by column within a row
``offsets``  int64 ``[out + 1]``: where each row's values begin; ``offsets[out]`` is nnz. Files have int32 where it does

At 50 % zeros a 16-bit weight takes 9 bits, at 70 % 5.8, and 64 bits per row. A stored value may be zero: −0.0 is one,
so that packing is lossless to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyprune.ops.arguments import FLOATS, check_matrix

CHUNK = 2**24
"""Weights that are unpacked to bits at a time."""


class DamagedWeight(ValueError):
    """A packed weight that contradicts itself; says where."""


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight ``[out, columns]`` as in the module's docstring. Its tensors are contiguous, on one device, and stay
    unchanged as long as it is used.

    Shapes and types are checked when it is made (:class:`DamagedWeight`, a ``ValueError``), the data before their first
    use (:meth:`check`). So keep the object instead of making it anew for every product.
    """

    mask: Tensor
    values: Tensor
    offsets: Tensor
    columns: int
    _checked: tuple | None = field(default=None, init=False, repr=False)
    _semi_structured: bool | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, tensor, dtypes, ndim in (
            ("mask", self.mask, (torch.uint8,), 2),
            ("values", self.values, FLOATS, 1),
            ("offsets", self.offsets, (torch.int64,), 1),
        ):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} of a packed weight must be a torch.Tensor, got {type(tensor).__name__}")
            if tensor.dtype not in dtypes or tensor.ndim != ndim:
                raise DamagedWeight(
                    f"{name} of a packed weight must be {' or '.join(str(d)[6:] for d in dtypes)} with {ndim} "
                    f"dimension{'s' * (ndim > 1)}, got {str(tensor.dtype)[6:]} {tuple(tensor.shape)}"
                )
            if not tensor.is_contiguous():
                raise DamagedWeight(f"{name} of a packed weight must be contiguous, got strides {tensor.stride()}")
            if tensor.device != self.mask.device:
                raise DamagedWeight(f"mask of a packed weight is on {self.mask.device}, {name} on {tensor.device}")
        rows, width = self.mask.shape
        if self.columns < 0 or width != (self.columns + 7) // 8:
            raise DamagedWeight(
                f"a mask {tuple(self.mask.shape)} has 8 columns in each byte, it cannot be that of "
                f"{self.columns} columns"
            )
        if len(self.offsets) != rows + 1:
            raise DamagedWeight(f"a packed weight of {rows} rows has {rows + 1} offsets, got {len(self.offsets)}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.mask.shape[0], self.columns

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.mask.device

    @property
    def nbytes(self) -> int:
        return self.mask.nbytes + self.values.nbytes + self.offsets.nbytes

    @property
    def density(self) -> float:
        """Stored values of all weights."""
        return len(self.values) / max(1, self.mask.shape[0] * self.columns)

    @property
    def semi_structured(self) -> bool:
        """Whether exactly two of every four columns are stored, in a type and a shape that sparse tensor cores take.
        Looks at the data once, and again after :meth:`check` did."""
        if self._semi_structured is None:
            object.__setattr__(self, "_semi_structured", _is_semi_structured(self))
        return bool(self._semi_structured)

    def to(self, device: torch.device | str) -> Packed:
        return Packed(self.mask.to(device), self.values.to(device), self.offsets.to(device), self.columns)

    def check(self) -> None:
        """Raise :class:`DamagedWeight`, with the row and the numbers, unless mask, offsets and values agree: no kernel
        can then read beside them. Looks at the data once, and again when a tensor was changed in place."""
        state = tuple(_state(t) for t in (self.mask, self.values, self.offsets))
        if self._checked == state:
            return
        if (complaint := _complaint(self)) is not None:
            raise DamagedWeight(f"a packed weight {list(self.shape)} is damaged: {complaint}")
        object.__setattr__(self, "_checked", state)
        object.__setattr__(self, "_semi_structured", None)


def _state(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), 0 if x.is_inference() else x._version


def _complaint(packed: Packed) -> str | None:
    rows, columns = packed.shape
    counts, offsets = row_counts(packed.mask), packed.offsets
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(packed.values):
        return (
            f"its offsets go from {int(offsets[0])} to {int(offsets[-1])}, those of {len(packed.values)} values go "
            f"from 0 to {len(packed.values)}"
        )
    wrong = torch.nonzero(offsets.diff() != counts)
    if len(wrong):
        row = int(wrong[0])
        return (
            f"the mask of row {row} has {int(counts[row])} bits, its offsets {int(offsets[row])} and "
            f"{int(offsets[row + 1])} say {int(offsets[row + 1]) - int(offsets[row])} values"
        )
    if columns % 8 and rows and (beyond := packed.mask[:, -1] >> columns % 8).any():
        return f"the mask of row {int(torch.nonzero(beyond)[0])} has a bit behind column {columns - 1}"
    return None


def _is_semi_structured(packed: Packed) -> bool:
    rows, columns = packed.shape
    if packed.dtype == torch.float32 or rows % 32 or columns % 64 or 2 * len(packed.values) != rows * columns:
        return False
    return all(bool((_nibble_counts(part) == 0x22).all()) for part in _parts(packed.mask))


def _parts(mask: Tensor) -> tuple[Tensor, ...]:
    return mask.split(max(1, CHUNK // max(1, mask.shape[1])))


def _nibble_counts(mask: Tensor) -> Tensor:
    """Bits that are set in the lower and the higher half of each byte, in these halves."""
    twos = mask - (mask >> 1 & 0x55)
    return (twos & 0x33) + (twos >> 2 & 0x33)


def row_counts(mask: Tensor) -> Tensor:
    """Bits that are set in each row of a uint8 matrix, int64."""
    counts = []
    for part in _parts(mask):
        fours = _nibble_counts(part)
        counts.append(((fours + (fours >> 4)) & 0x0F).sum(1, dtype=torch.int64))
    return torch.cat(counts) if counts else mask.new_zeros(0, dtype=torch.int64)


def pack_bitmask(weight: Tensor) -> Packed:
    """``weight [out, in]`` (float32, bfloat16 or float16; any strides) packed as in the module's docstring."""
    check_matrix("weight", weight)
    weight = weight.detach()
    rows, columns = weight.shape
    width = (columns + 7) // 8
    mask = torch.empty((rows, width), dtype=torch.uint8, device=weight.device)
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=weight.device)
    values, step = [weight.new_empty(0)], max(1, CHUNK // max(1, columns))
    integers = torch.int32 if weight.dtype == torch.float32 else torch.int16
    for start in range(0, rows, step):
        part = weight[start : start + step]
        stored = part.view(integers) != 0  # the bits, not the number: −0.0 is stored
        values.append(part[stored])
        bits = torch.nn.functional.pad(stored.view(torch.uint8), (0, 8 * width - columns))
        mask[start : start + step] = (bits.view(len(part), width, 8) * powers).sum(2, dtype=torch.uint8)
    offsets = torch.zeros(rows + 1, dtype=torch.int64, device=weight.device)
    torch.cumsum(row_counts(mask), 0, out=offsets[1:])
    return Packed(mask, torch.cat(values), offsets, columns)


def unpack_bitmask(packed: Packed) -> Tensor:
    """The dense ``[out, in]``, to the bit what was packed. Raises :class:`DamagedWeight`, before reading, if it is."""
    packed.check()
    rows, columns = packed.shape
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stored = (packed.mask.unsqueeze(2) >> shifts & 1).view(rows, 8 * packed.mask.shape[1])[:, :columns].bool()
    return packed.values.new_zeros(rows, columns).masked_scatter(stored, packed.values)
