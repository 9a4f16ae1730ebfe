"""Calibration sequences: text or token ids → the very sequences to fit on, and others set aside.

Models that predict the next token get pieces of equal length, cut from the concatenated text and chosen by seed. Others
(encoders; classifiers, reward and embedding models on any blocks) get one text a sequence, with special tokens and at
its own length: there is no padding anywhere, so none can be counted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyprune import texts
from pyprune.config import Calibration, ConfigError

POOL = 8
"""Tokens to choose from for each token asked; a larger source is read no further."""


@dataclass(kw_only=True)
class CalibrationData:
    """What :func:`load` returns; every sequence is a 1-D int64 tensor on the host."""

    sequences: list[Tensor]
    """To fit on."""
    held_out: list[Tensor] = field(default_factory=list)
    """From the same source where it has enough, disjoint from ``sequences``: to measure generalisation only."""
    generated: list[Tensor] = field(default_factory=list)
    """Sampled from the model itself, for the reconstruction alone (``self_generated_for="reconstruction"``)."""
    fingerprint: str
    """SHA-256 of the token ids of ``sequences``, lengths and order included."""
    description: str
    """Source, counts and anything a reader of the report should know about them."""


def fingerprint(sequences: Iterable[Tensor]) -> str:
    """SHA-256 of token ids: equal if and only if the sequences, their lengths and their order are."""
    digest = hashlib.sha256()
    for row in sequences:
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(row.long().contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def coerce(source: Any) -> Calibration:
    """A :class:`Calibration` from what callers pass for it: one already, or a bare source.

    A bare tensor of ids is taken whole; a list of texts or a path follows the defaults.
    """
    if isinstance(source, Calibration):
        return source
    if source is None:
        return Calibration()
    if isinstance(source, dict) and "input_ids" not in source:
        from pyprune.config import from_dict

        return from_dict(Calibration, source, "calibration")
    rows = None if isinstance(source, str) else texts.token_rows(source)
    if rows is None:
        return Calibration(source=source)
    return Calibration(source=source, num_samples=len(rows), seq_len=max(2, *map(len, rows)))


def load(calibration: Calibration, tokenizer=None, *, encoder: bool = False,
         vocab_size: int | None = None) -> CalibrationData:
    """Sequences to fit on and held-out sequences.

    Raises :class:`ConfigError` if there are fewer than asked, if the text is shorter than one sequence, if an id lies
    outside the vocabulary, or if text is given without a tokenizer.
    """
    if calibration.num_samples == 0:
        return _assemble([], calibration, "no corpus text")
    rows = texts.token_rows(calibration.source)
    if rows is not None:
        return _from_rows(rows, calibration, tokenizer, encoder, vocab_size)
    need_tokenizer(tokenizer, "calibration text")
    wanted = calibration.num_samples + calibration.held_out
    pieces = _pieces(_documents(calibration, encoder), tokenizer, calibration, wanted, encoder)
    _check_count(len(pieces), calibration, encoder)
    texts.check_vocabulary(pieces, vocab_size)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(calibration.seed or 0)).tolist()
    chosen = [pieces[i] for i in order[:wanted]]
    return _assemble(chosen, calibration, texts.describe(calibration.source))


def _from_rows(rows: list[Tensor], calibration: Calibration, tokenizer, encoder: bool,
               vocab_size: int | None) -> CalibrationData:
    name, asked = texts.describe(calibration.source), calibration.num_samples
    if len(rows) < asked:
        raise ConfigError(f"{asked} calibration samples were asked for, but {name} has {len(rows)} rows; give more, or "
                          f"set num_samples={len(rows)}")
    rows = rows[:asked + calibration.held_out]
    if (short := next((i for i, row in enumerate(rows) if len(row) < 2), None)) is not None:
        raise ConfigError(f"row {short} of {name} has {len(rows[short])} tokens; a sequence needs at least 2")
    texts.check_vocabulary(rows, vocab_size)
    data = _assemble(rows, calibration, f"{name}, rows as given")
    missing = calibration.held_out - len(data.held_out)
    if missing and tokenizer is not None:
        builtin = dataclasses.replace(calibration, source=None, seq_len=max(map(len, rows)), num_samples=1,
                                      held_out=max(0, missing - 1))
        pieces = _pieces(texts.builtin("calibration"), tokenizer, builtin, missing, encoder)[:missing]
        texts.check_vocabulary(pieces, vocab_size)
        data.held_out += pieces
        data.description += f"; {len(pieces)} of the held-out sequences are from {texts.BUILTIN}"
    elif missing:
        data.description += f"; {len(data.held_out)} held-out sequences, as all rows but those are fitted on"
    return data


def _assemble(chosen: list[Tensor], calibration: Calibration, source: str) -> CalibrationData:
    fit, held_out = chosen[:calibration.num_samples], chosen[calibration.num_samples:]
    lengths = sorted({len(row) for row in fit}) or [0]
    width = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    text = f"{source}: {len(fit)} sequences of {width} tokens"
    if len(held_out) < calibration.held_out and calibration.num_samples and not source.endswith("rows as given"):
        text += f"; {len(held_out)} of the {calibration.held_out} held-out sequences asked for, as it has no more"
    return CalibrationData(sequences=fit, held_out=held_out, fingerprint=fingerprint(fit), description=text)


def need_tokenizer(tokenizer, what: str) -> None:
    """Raise ConfigError if there is none."""
    if tokenizer is None:
        raise ConfigError(f"{what} needs a tokenizer: pass tokenizer=, or give token ids instead of text")


def _documents(calibration: Calibration, encoder: bool = False) -> Iterable[str]:
    """Texts of the source; for an encoder a plain text file is one text a line."""
    if calibration.source is None:
        return texts.builtin("calibration")
    found = texts.read(calibration.source, split=calibration.split, subset=calibration.subset,
                       text_column=calibration.text_column)
    if encoder and str(calibration.source).endswith(".txt"):
        return (line for text in found for line in text.splitlines())
    return found


def _pieces(documents: Iterable[str], tokenizer, calibration: Calibration, wanted: int, encoder: bool) -> list[Tensor]:
    if encoder:
        return list(itertools.islice(_sentences(documents, tokenizer, calibration.seq_len), POOL * wanted))
    prefix = bos_prefix(tokenizer)
    content = calibration.seq_len - len(prefix)
    ids = tokenize(documents, tokenizer, POOL * wanted * content)
    return [torch.cat([prefix, ids[i:i + content]]) for i in range(0, len(ids) - content + 1, content)]


def _sentences(documents: Iterable[str], tokenizer, longest: int) -> Iterator[Tensor]:
    """One sequence a text, truncated, special tokens included; a text seen before is left out."""
    empty, seen = len(tokenizer("")["input_ids"]), set()
    for text in documents:
        ids = tuple(tokenizer(" ".join(text.split()), truncation=True, max_length=longest)["input_ids"])
        if len(ids) > empty and ids not in seen:
            seen.add(ids)
            yield torch.tensor(ids)


def bos_prefix(tokenizer) -> Tensor:
    """The BOS token if the tokenizer itself starts a text with one, else nothing; as a 1-D tensor."""
    bos = getattr(tokenizer, "bos_token_id", None)
    ids = tokenizer("a")["input_ids"] if bos is not None else []
    return torch.tensor(ids[:1] if ids[:1] == [bos] else [], dtype=torch.long)


def tokenize(documents: Iterable[str], tokenizer, enough: int | None = None) -> Tensor:
    """Ids of the documents joined by blank lines, without special tokens; reads on until there are ``enough``.

    The last tokens before a cut may differ from those of the whole text, so a few more are made than are kept.
    """
    documents, parts, length, exhausted = iter(documents), [], 0, False
    budget = math.inf if enough is None else 4 * enough + 4096
    while True:
        while length <= budget and not exhausted:
            text = next(documents, None)
            exhausted = text is None
            if not exhausted:
                parts.append(text)
                length += len(text) + 2
        whole = "\n\n".join(parts)
        cut = whole if enough is None else whole[:budget]
        ids = tokenizer(cut, add_special_tokens=False, verbose=False)["input_ids"]
        if (exhausted and len(cut) == len(whole)) or (enough is not None and len(ids) >= enough + 64):
            return torch.tensor(ids[:enough], dtype=torch.long)
        budget *= 2


def _check_count(found: int, calibration: Calibration, encoder: bool) -> None:
    if found >= calibration.num_samples:
        return
    name = texts.describe(calibration.source)
    if found == 0:
        raise ConfigError(f"calibration text from {name} is " + ("empty" if encoder else "shorter than one sequence of "
                          f"{calibration.seq_len} tokens; give more text or a smaller seq_len"))
    raise ConfigError(f"{calibration.num_samples} calibration samples of {calibration.seq_len} tokens were asked for, "
                      f"but {name} has only {found}; give more text, or set num_samples={found} or a smaller seq_len")
