"""Calibration sequences: text or token ids → the very sequences to fit on, and others set aside.

Models that predict the next token get pieces of equal length, cut from the concatenated text and chosen by seed. Others
(encoders; classifiers, reward and embedding models on any blocks) get one text a sequence, with special tokens and at
its own length: there is no padding anywhere, so none can be counted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyprune.config import SHORT_WINDOWS, Calibration, ConfigError, from_dict
from pyprune.data import builtin, given, texts, thin
from pyprune.model.attributes import begin_token
from pyprune.sources import is_name, kind

POOL = 8
"""Tokens to choose from for each token asked; a larger source is read no further."""


@dataclass(kw_only=True)
class CalibrationData:
    """What :func:`load` returns; every sequence is a 1-D int64 tensor on the host."""

    sequences: list[Tensor]
    """To fit on."""
    held_out: list[Tensor] = field(default_factory=list)
    """From the same source where it has enough, disjoint from ``sequences``: to measure generalisation only."""
    unseen: list[Tensor] = field(default_factory=list)
    """A few more of the same, neither fitted nor held out: to measure perplexity on where no other text is named."""
    generated: list[Tensor] = field(default_factory=list)
    """Sampled from the model itself, for the reconstruction alone (``self_generated_for="reconstruction"``)."""
    sampled: list[Tensor] = field(default_factory=list)
    """All that were sampled from the model itself, whoever uses them."""
    fingerprint: str
    """SHA-256 of the token ids of ``sequences``, lengths and order included."""
    description: str
    """Source, counts and anything a reader of the report should know about them."""
    warnings: list[str] = field(default_factory=list)
    """Where the data are too thin, or not what they seem."""


def fingerprint(sequences: Iterable[Tensor]) -> str:
    """SHA-256 of token ids: equal if and only if the sequences, their lengths and their order are."""
    digest = hashlib.sha256()
    for row in sequences:
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(row.long().contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def named(source: Any) -> dict | Calibration:
    """What callers pass for a calibration, as a :class:`Calibration` or a mapping of its fields: either of them
    already, or a bare source."""
    fields = isinstance(source, dict) and "input_ids" not in source
    return source if isinstance(source, Calibration) or fields else {"source": source}


def settled(calibration: Calibration) -> Calibration:
    """A calibration whose source can be read more than once: a ``DataLoader`` is read here."""
    asked = None if calibration.num_samples is None else calibration.num_samples + calibration.held_out
    source = given.settled(calibration.source, asked)
    return calibration if source is calibration.source else dataclasses.replace(calibration, source=source)


def within(calibration: Calibration, positions: int | None) -> Calibration:
    """A calibration whose sequences of text, unless a length was asked for, are no longer than a model has positions
    (None: it has no limit, or does not say)."""
    if calibration.seq_len is not None or positions is None or positions >= calibration.tokens:
        return calibration
    if calibration.num_samples != 0 and given.token_rows(calibration.source) is not None:
        return calibration
    return dataclasses.replace(calibration, seq_len=positions)


def coerce(source: Any) -> Calibration:
    """A :class:`Calibration` whose number and length of sequences are known, from what callers pass for one.

    Unless they were asked for, token ids are taken whole, all rows and all tokens. Raises ConfigError where
    token ids cannot meet what was asked for.
    """
    calibration, rows = _resolve(source)
    if rows is not None:
        _check_rows(rows, calibration)
    return calibration


def _resolve(source: Any) -> tuple[Calibration, list[Tensor] | None]:
    calibration = named(source)
    if isinstance(calibration, dict):
        calibration = from_dict(Calibration, calibration, "calibration")
    calibration = settled(calibration)
    rows = None if calibration.num_samples == 0 else given.token_rows(calibration.source)
    count, length = calibration.samples, calibration.tokens
    if rows is not None:
        count = len(rows) if calibration.num_samples is None else count
        length = calibration.seq_len or max(2, *map(len, rows))
    return dataclasses.replace(calibration, num_samples=count, seq_len=length), rows


def _check_rows(rows: list[Tensor], calibration: Calibration, vocab_size: int | None = None) -> None:
    """Refuse token ids that are fewer, shorter or others than asked for."""
    name, asked = texts.describe(calibration.source), calibration.samples
    if len(rows) < asked:
        raise ConfigError(
            f"{asked} calibration samples were asked for, but {name} has {len(rows)} rows; give more, or "
            f"set num_samples={len(rows)}"
        )
    texts.check_rows(rows[: asked + calibration.held_out], name, "a sequence")
    texts.check_vocabulary(rows[: asked + calibration.held_out], vocab_size)
    texts.check_length(rows, name, "seq_len", calibration.tokens)


def load(
    calibration: Calibration,
    tokenizer=None,
    *,
    encoder: bool = False,
    vocab_size: int | None = None,
    model_config: Any = None,
    measures: bool = True,
) -> CalibrationData:
    """Sequences to fit on and held-out sequences.

    model_config: names the padding id where the tokenizer does not. measures: whether anything is measured on held-out
    sequences, so that their absence is worth a word.
    Raises :class:`ConfigError` if there are fewer than asked, if the text is shorter than one sequence, if an id lies
    outside the vocabulary, or if text is given without a tokenizer.
    """
    calibration, rows = _resolve(calibration)
    if calibration.num_samples == 0:
        return CalibrationData(sequences=[], fingerprint=fingerprint([]), description="no corpus text: 0 sequences")
    if rows is not None:
        data = _from_rows(rows, calibration, tokenizer, encoder, vocab_size)
        data.warnings += thin.padding(
            data.sequences, texts.describe(calibration.source), calibration.source, tokenizer, model_config
        )
    else:
        data = _from_text(calibration, tokenizer, encoder, vocab_size)
    data.warnings += thin.repetition(data.sequences, data.held_out)
    if measures and calibration.held_out and not data.held_out:
        data.warnings.append(
            f"there is no held-out measure: {texts.describe(calibration.source)} has no sequence that "
            "is not fitted on; give more, or a smaller num_samples"
        )
    return data


def _from_text(calibration: Calibration, tokenizer, encoder: bool, vocab_size: int | None) -> CalibrationData:
    """Sequences of one source, or of several in equal shares while each has some left."""
    need_tokenizer(tokenizer, "calibration text")
    asked, name = calibration.samples, texts.describe(calibration.source)
    pools = [
        _pool(source, calibration, tokenizer, encoder, asked + calibration.held_out)
        for source in sources_of(calibration)
    ]
    _check_count(sum(map(len, pools)), calibration, encoder)
    for pool in pools:
        texts.check_vocabulary(pool, vocab_size)
    chosen = [
        piece for row in itertools.zip_longest(*(_shuffled(pool, calibration.seed) for pool in pools)) for piece in row
    ]
    chosen = [piece for piece in chosen if piece is not None]
    fit = chosen[:asked]
    rest = thin.others(chosen[asked:], fit, calibration.held_out + SHORT_WINDOWS)
    held_out, unseen = rest[: calibration.held_out], rest[calibration.held_out :]
    missing = len(held_out) < calibration.held_out
    return _assemble(
        fit,
        held_out,
        name,
        f"; {len(held_out)} of the {calibration.held_out} held-out sequences asked for, as it has no more"
        if missing
        else "",
        unseen,
    )


def sources_of(calibration: Calibration) -> list:
    """The sources that sequences are taken from."""
    return list(builtin.CALIBRATION) if calibration.source is None else texts.mixture(calibration.source)


def _pool(source: Any, calibration: Calibration, tokenizer, encoder: bool, wanted: int) -> list[Tensor]:
    """The sequences of one source to choose from."""
    rows = given.token_rows(source)
    if rows is not None:
        texts.check_rows(rows, texts.describe(source), "a sequence")
        return [row[: calibration.tokens] for row in rows]
    return _pieces(_documents(source, calibration, encoder), tokenizer, calibration.tokens, wanted, encoder)


def _shuffled(pool: list[Tensor], seed: int | None) -> list[Tensor]:
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed or 0)).tolist()
    return [pool[i] for i in order]


def _from_rows(
    rows: list[Tensor], calibration: Calibration, tokenizer, encoder: bool, vocab_size: int | None
) -> CalibrationData:
    _check_rows(rows, calibration, vocab_size)
    name, asked, longest = texts.describe(calibration.source), calibration.samples, max(map(len, rows))
    how = (
        "rows as given"
        if calibration.tokens >= longest
        else f"the first {calibration.seq_len} of their {longest} tokens"
    )
    rows = [row[: calibration.seq_len] for row in rows]
    fit = rows[:asked]
    rest = thin.others(rows[asked:], fit, calibration.held_out + SHORT_WINDOWS)
    held_out, unseen = rest[: calibration.held_out], rest[calibration.held_out :]
    texts.check_vocabulary(rest, vocab_size)
    data = _assemble(fit, held_out, f"{name}, {how}", unseen=unseen)
    missing = calibration.held_out - len(held_out)
    if missing and tokenizer is not None:
        documents = builtin.paragraphs(builtin.DOCUMENTATION)
        pieces = _pieces(documents, tokenizer, max(map(len, fit)), missing, encoder)[:missing]
        texts.check_vocabulary(pieces, vocab_size)
        data.held_out += pieces
        data.description += (
            f"; {len(pieces)} of the held-out sequences are from {texts.describe(builtin.DOCUMENTATION)}"
        )
    elif missing:
        data.description += f"; held-out sequences: {len(data.held_out) or 'none'}, all other rows are fitted on"
    return data


def _assemble(
    fit: list[Tensor], held_out: list[Tensor], source: str, rest: str = "", unseen: list[Tensor] | None = None
) -> CalibrationData:
    lengths = sorted({len(row) for row in fit})
    width = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    return CalibrationData(
        sequences=fit,
        held_out=held_out,
        unseen=unseen or [],
        fingerprint=fingerprint(fit),
        description=f"{source}: {len(fit)} sequence{'' if len(fit) == 1 else 's'} of {width} tokens{rest}",
    )


def need_tokenizer(tokenizer, what: str) -> None:
    """Raise ConfigError if there is none."""
    if tokenizer is None:
        raise ConfigError(
            f"{what} needs a tokenizer, and there is none beside the model: give token ids instead of text, or add the "
            "tokenizer's files (in Python: tokenizer=)"
        )


def _documents(source: Any, calibration: Calibration, encoder: bool = False) -> Iterable[str]:
    """Texts of a source; for an encoder a plain text file is one text per line."""
    found = texts.read(source, split=calibration.split, subset=calibration.subset, text_column=calibration.text_column)
    if encoder and str(source).endswith(".txt"):
        return (line for text in found for line in text.splitlines())
    return found


def check_size(calibration: Calibration) -> None:
    """Raise ConfigError where a text has fewer bytes than one sequence has tokens, without a tokenizer."""
    for source in sources_of(calibration) if calibration.num_samples != 0 else ():
        if kind(source) == "builtin":
            size = sum(len(text.encode()) for text in builtin.paragraphs(str(source)))
        elif is_name(source) and kind(source) in ("prose", "table"):
            size = Path(source).stat().st_size
        else:
            continue
        if size < calibration.tokens:
            raise ConfigError(
                f"calibration text from {texts.describe(source)} has {size} bytes, too few for one sequence of "
                f"{calibration.tokens} tokens; give more text or a smaller seq_len"
            )


def _pieces(documents: Iterable[str], tokenizer, length: int, wanted: int, encoder: bool) -> list[Tensor]:
    if encoder:
        return list(itertools.islice(_sentences(documents, tokenizer, length), POOL * wanted))
    prefix = bos_prefix(tokenizer)
    content = length - len(prefix)
    ids = tokenize(documents, tokenizer, POOL * wanted * content)
    return [torch.cat([prefix, ids[i : i + content]]) for i in range(0, len(ids) - content + 1, content)]


def _sentences(documents: Iterable[str], tokenizer, longest: int) -> Iterator[Tensor]:
    """One sequence per text, truncated, special tokens included; a text seen before is left out."""
    empty, seen = len(tokenizer("")["input_ids"]), set()
    for text in documents:
        ids = tuple(tokenizer(" ".join(text.split()), truncation=True, max_length=longest)["input_ids"])
        if len(ids) > empty and ids not in seen:
            seen.add(ids)
            yield torch.tensor(ids)


def bos_prefix(tokenizer) -> Tensor:
    """The BOS token if the tokenizer itself starts a text with one, else nothing; as a 1-D tensor."""
    bos = begin_token(tokenizer)
    ids = tokenizer("a")["input_ids"] if bos is not None else []
    return torch.tensor(ids[:1] if ids[:1] == [bos] else [], dtype=torch.long)


def tokenize(documents: Iterable[str], tokenizer, enough: int | None = None) -> Tensor:
    """Ids of the documents joined by blank lines, without special tokens; reads on until there are ``enough``.

    The last tokens before a cut may differ from those of the whole text, so a few more are made than are kept.
    """
    rest, length, exhausted = iter(documents), 0, False
    parts: list[str] = []
    budget = sys.maxsize if enough is None else 4 * enough + 4096
    while True:
        while length <= budget and not exhausted:
            text = next(rest, None)
            exhausted = text is None
            if text is not None:
                parts.append(text)
                length += len(text) + 2
        whole = "\n\n".join(parts)
        cut = whole if enough is None else whole[:budget]
        ids = tokenizer(cut, add_special_tokens=False, verbose=False)["input_ids"]
        if (exhausted and len(cut) == len(whole)) or (enough is not None and len(ids) >= enough + 64):
            return torch.tensor(ids[:enough], dtype=torch.long)
        budget *= 2


def _check_count(found: int, calibration: Calibration, encoder: bool) -> None:
    if found >= calibration.samples:
        return
    name = texts.describe(calibration.source)
    if found == 0:
        raise ConfigError(
            f"calibration text from {name} is "
            + (
                "empty"
                if encoder
                else f"shorter than one sequence of {calibration.seq_len} tokens; give more text or a smaller seq_len"
            )
        )
    raise ConfigError(
        f"{calibration.num_samples} calibration samples of {calibration.seq_len} tokens were asked for, "
        f"but {name} has only {found}; give more text, or set num_samples={found} or a smaller seq_len"
    )
