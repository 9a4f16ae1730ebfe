"""What makes calibration data thin: repeated and constant sequences, padding, held-out text that is fitted too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyprune.model.attributes import begin_token, end_tokens, pad_token

SPAN = 16
"""Tokens in a row that two texts do not share by chance."""


def others(candidates: Iterable[Tensor], fitted: list[Tensor], wanted: int) -> list[Tensor]:
    """The first ``wanted`` candidates that are no fitted sequence and unlike each other."""
    seen = {_key(row) for row in fitted}
    found: list[Tensor] = []
    for row in candidates:
        if len(found) == wanted:
            break
        if (key := _key(row)) not in seen:
            seen.add(key)
            found.append(row)
    return found


def repetition(fitted: list[Tensor], held_out: list[Tensor]) -> list[str]:
    """A sentence for each kind of repetition among the sequences."""
    found, count = [], len(fitted)
    constant = sum(bool((row == row[0]).all()) for row in fitted)
    if constant:
        found.append(
            f"{constant} of {count} calibration sequences {_verb(constant, 'repeat')} one token throughout: "
            "such input says next to nothing about the weights"
        )
    repeated = count - len({_key(row) for row in fitted})
    if repeated:
        found.append(
            f"{repeated} of {count} calibration sequences {_verb(repeated, 'repeat')} another one: they add "
            "no information"
        )
    shared = _shared(fitted, held_out)
    if shared:
        found.append(
            f"{shared} of {len(held_out)} held-out sequences {_verb(shared, 'share')} most of their text with "
            "fitted ones: the held-out error does not measure generalisation"
        )
    return found


def padding(rows: list[Tensor], name: str, source: Any, tokenizer, model_config) -> list[str]:
    """A sentence if rows of token ids begin or end with padding and came without an attention mask.

    Many tokenizers pad with the token that ends texts: of one that also has a place there, a single one is none.
    """
    masked = source.get("attention_mask") is not None if isinstance(source, Mapping) else isinstance(source, tuple)
    owners = (tokenizer, model_config)
    pad = next((p for p in map(pad_token, owners) if isinstance(p, int)), None)
    if masked or pad is None:
        return []
    ends = [token_of(owner) for owner in owners for token_of in (begin_token, end_tokens)]
    least = 2 if any(pad == e or isinstance(e, list) and pad in e for e in ends) else 1
    padded = sum(bool((row[:least] == pad).all() or (row[-least:] == pad).all()) for row in rows)
    if not padded:
        return []
    return [
        f"{padded} of {len(rows)} rows of {name} begin or end with the padding id {pad} and came without an attention "
        "mask: padding counts as text; give input_ids and attention_mask, or rows without it"
    ]


def _verb(count: int, verb: str) -> str:
    return verb + ("s" if count == 1 else "")


def _key(row: Tensor) -> bytes:
    return row.numpy().tobytes()


def _shared(fitted: list[Tensor], held_out: list[Tensor]) -> int:
    """Held-out sequences of whose spans more than half occur in the fitted ones."""
    spans: dict[int, Tensor] = {}
    count = 0
    for row in held_out:
        size = min(SPAN, max(2, len(row) // 2))
        if size not in spans:
            spans[size] = torch.cat([_spans(other, size) for other in fitted])
        count += bool(torch.isin(_spans(row, size), spans[size]).float().mean() > 0.5)
    return count


def _spans(row: Tensor, size: int) -> Tensor:
    """A hash of every ``size`` tokens in a row."""
    if len(row) < size:
        return row[:0]
    powers = torch.full((size,), 6364136223846793005).cumprod(0)  # int64 wraps, as a hash may
    return (row.unfold(0, size, 1) * powers).sum(-1)
