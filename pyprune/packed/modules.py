"""A linear layer that holds its weight packed, to stand in a stock model in place of ``nn.Linear``."""

from __future__ import annotations

from torch import Tensor, nn

from pyprune import ops
from pyprune.ops.packed import DamagedWeight, Packed, unpack_bitmask


class SparseLinear(nn.Module):
    """``x Wᵀ + bias`` with W ``[out_features, in_features]`` stored as mask, values and offsets.

    ``values`` is a parameter, so that ``.to``, ``dtype`` and what goes through a model's parameters see the weight's
    type and bytes; it asks for no gradient. ``mask`` and ``offsets`` are buffers. Where x asks for a gradient the
    reference computes it. The weight itself is trained dense: :func:`pyprune.dense`, :func:`pyprune.keep_sparse`.
    """

    mask: Tensor
    offsets: Tensor

    def __init__(self, packed: Packed, bias: Tensor | None = None, transposed: bool = False):
        """transposed: the layer that it stands for stores its weight ``[in, out]`` (GPT-2's ``Conv1D``)."""
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.transposed = transposed
        self.register_buffer("mask", packed.mask)
        self.register_buffer("offsets", packed.offsets)
        self.values = nn.Parameter(packed.values, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._packed: Packed | None = None

    @property
    def packed(self) -> Packed:
        """The weight as the ops take it, checked once for as long as its tensors stay the same."""
        known, buffers = self._packed, self._buffers  # by their dictionaries: this runs for every layer and token
        if (
            known is None
            or known.values is not self._parameters["values"]
            or known.mask is not buffers["mask"]
            or known.offsets is not buffers["offsets"]
        ):
            known = self._packed = Packed(self.mask, self.values, self.offsets, self.in_features)
        return known

    @property
    def weight(self) -> Tensor:
        """The dense weight ``[out, in]``, unpacked at every access: for code that looks at type, device or values."""
        return unpack_bitmask(self.packed).detach()

    @property
    def density(self) -> float:
        """Stored values of all weights."""
        return self.packed.density

    def forward(self, x: Tensor) -> Tensor:
        return ops.sparse_linear(x, self.packed, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"density={self.density:.3f}, {str(self.values.dtype)[6:]}"
        )

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        """Take a weight of another number of values too; one that contradicts itself is refused before it is taken."""
        found = {name: state_dict.get(prefix + name) for name in ("mask", "values", "offsets")}
        if all(isinstance(value, Tensor) for value in found.values()):
            own = self.values
            values = found["values"].detach().to(own.device, own.dtype).clone()
            new = Packed(
                found["mask"].to(own.device).clone(), values, found["offsets"].to(own.device).clone(), self.in_features
            )
            if new.shape != (self.out_features, self.in_features):
                raise DamagedWeight(f"{prefix}mask has {new.shape[0]} rows, the layer {self.out_features} outputs")
            new.check()
            self.mask, self.offsets = new.mask, new.offsets
            self.values = nn.Parameter(values, requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_packed": None}


def parameter_count(model: nn.Module) -> int:
    """Parameters of a model, zeros that are not stored counted too."""
    left_out = sum(
        m.in_features * m.out_features - m.values.numel() for m in model.modules() if isinstance(m, SparseLinear)
    )
    return left_out + sum(p.numel() for p in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters as they lie in memory, masks and offsets of packed ones too."""
    beside = sum(m.mask.nbytes + m.offsets.nbytes for m in model.modules() if isinstance(m, SparseLinear))
    return beside + sum(p.nbytes for p in model.parameters())
