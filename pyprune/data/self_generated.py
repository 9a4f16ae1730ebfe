"""Self-generated calibration: token sequences sampled from the dense model itself.

As in arXiv 2406.15524, after LLM-QAT (arXiv 2305.17888): draw one random vocabulary token, extend it greedily to
five tokens, keep it if the text is in the wanted language, then sample at temperature 1 to the full length.

Candidate i draws from its own generator, seeded by (seed, i), so sequence i does not depend on how many are asked
for or how they are batched (up to the last bits of a batched product). A file of sequences is therefore extended, not
rewritten, when more are asked for, and an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyprune.config import ConfigError
from pyprune.model.attributes import output_layer, positions_named, vocabulary_size
from pyprune.model.blocks import predicts_next_token, read_on
from pyprune.model.recording import uncached
from pyprune.packed.loading import opened

KIND = "pyprune self-generated calibration"
GREEDY_TOKENS = 5
MAX_REJECTION = 100
"""Candidates tried for each sequence asked for, before a language filter is called hopeless."""


def generate(
    model: Any,
    tokenizer: Any = None,
    num_samples: int = 64,
    *,
    seq_len: int = 512,
    seed: int = 0,
    batch_size: int = 32,
    language: str | None = None,
    path: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    detect: Callable[[str], str] | None = None,
) -> list[Tensor]:
    """``num_samples`` sequences of ``seq_len`` tokens sampled from ``model``, as a list of int64 tensors ``[seq_len]``.

    ``model``: a live causal model with its ``tokenizer``, what :func:`pyprune.load` takes or returns, or a result.
    Special tokens (end of text, padding, …) are never drawn, so every sequence has its full length. ``language``: ISO
    code; candidates whose first five tokens read otherwise are dropped, by ``detect`` (text → code) or py3langid.
    ``path``: jsonl, settings in the first line; its sequences are reused if the settings match, missing ones are
    added as they are made. ``progress(done, num_samples)`` after every batch.
    Raises ConfigError for an encoder, a length the model cannot hold, a file of other settings, or a language that
    hardly any candidate is in.
    """
    model, tokenizer = opened(model, tokenizer)
    n = num_samples
    _check(model, n, seq_len, batch_size)
    settings = {
        "kind": KIND,
        "model": model_digest(model),
        "seq_len": seq_len,
        "seed": seed,
        "language": language,
        "greedy_tokens": GREEDY_TOKENS,
        "temperature": 1.0,
    }
    rows = _open(path, settings) if path is not None else []
    if language is not None and len(rows) < n:
        detect = detect or _detector()
    vocabulary = _vocabulary(model, tokenizer)
    candidate = rows[-1]["candidate"] + 1 if rows else 0
    limit = candidate + MAX_REJECTION * n
    waiting: list[tuple[int, Tensor]] = []
    was_training = model.training
    model.eval()
    try:
        while len(rows) < n:
            while len(waiting) < min(batch_size, n - len(rows)):
                if candidate >= limit:
                    raise ConfigError(
                        f"only {len(rows)} of {n} sequences after {candidate} candidates are in language "
                        f"{language!r} by their first {GREEDY_TOKENS} tokens; choose another or none"
                    )
                indices = range(candidate, candidate + min(batch_size, n - len(rows)))
                starts = _greedy(model, vocabulary, seed, indices, min(GREEDY_TOKENS, seq_len))
                waiting += [
                    (i, start)
                    for i, start in zip(indices, starts)
                    if language is None or detect is None or detect(tokenizer.decode(start)) == language
                ]
                candidate = indices.stop
            batch, waiting = waiting[:batch_size], waiting[batch_size:]
            places = [i for i, _ in batch]
            tokens = _sample(model, vocabulary, seed, places, torch.stack([s for _, s in batch]), seq_len)
            new = [{"candidate": i, "tokens": t.tolist()} for i, t in zip(places, tokens)][: n - len(rows)]
            if path is not None:
                _append(path, new, tokenizer)
            rows += new
            if progress:
                progress(len(rows), n)
    finally:
        model.train(was_training)
    return [torch.tensor(row["tokens"], dtype=torch.int64) for row in rows[:n]]


def model_digest(model) -> str:
    """Short hash of the model's parameter names, shapes and first values: is it the model that wrote this file?"""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        head = p.detach().reshape(-1)[:16].float().cpu().numpy()
        digest.update(f"{name}{tuple(p.shape)}".encode() + head.tobytes())
    return digest.hexdigest()[:16]


def _check(model, n: int, seq_len: int, batch_size: int) -> None:
    for name, value, least in (("n", n, 1), ("seq_len", seq_len, 2), ("batch_size", batch_size, 1)):
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
    if not predicts_next_token(model):
        raise ConfigError(
            f"{type(model).__name__} does not predict the next token (as encoders, classifiers and "
            "embedding models do not), so it cannot generate text; calibrate it on a corpus"
        )
    longest = positions_named(model.config)
    if longest and seq_len > longest:
        raise ConfigError(f"seq_len {seq_len} is above the model's {longest} positions")


def _vocabulary(model, tokenizer) -> Tensor:
    """Boolean ``[vocabulary]`` on the model's device: True for tokens that may be drawn."""
    head = output_layer(model)
    size = vocabulary_size(model) if head is None else head.weight.shape[0]
    allowed = torch.zeros(size, dtype=torch.bool)
    allowed[: len(tokenizer)] = True  # models pad their vocabulary; the padding was never trained
    special = [i for i in tokenizer.all_special_ids if i < size]
    allowed[special] = False
    return allowed.to(model.device)


def _stream(seed: int, candidate: int) -> np.random.Generator:
    return np.random.default_rng([seed, candidate])


@torch.no_grad()
def _greedy(model, vocabulary: Tensor, seed: int, candidates: range, length: int) -> Tensor:
    """One random token per candidate, extended greedily: ``[candidates, length]``."""
    ids = vocabulary.nonzero()[:, 0]
    first = [int(_stream(seed, i).integers(len(ids))) for i in candidates]
    tokens = ids[torch.tensor(first, device=ids.device)][:, None]
    cache = None
    for _ in range(length - 1):
        logits, cache = _read(model, tokens, cache)
        best = logits.masked_fill(~vocabulary, -torch.inf).argmax(-1)
        tokens = torch.cat([tokens, best[:, None]], 1)
    return tokens


@torch.no_grad()
def _sample(model, vocabulary: Tensor, seed: int, candidates: list[int], starts: Tensor, seq_len: int) -> Tensor:
    """Continue ``starts [batch, g]`` at temperature 1 to ``[batch, seq_len]``: inverse CDF of each row's own draws."""
    own = []
    for i in candidates:
        rng = _stream(seed, i)
        rng.integers(2)  # the first token's draw
        own.append(rng.random(seq_len))
    draws = torch.tensor(np.stack(own), device=starts.device)
    tokens = torch.empty(len(starts), seq_len, dtype=torch.int64, device=starts.device)
    tokens[:, : starts.shape[1]] = starts
    cache = None
    for t in range(starts.shape[1], seq_len):
        logits, cache = _read(model, tokens[:, :t], cache)
        logits = logits.float().masked_fill(~vocabulary, -torch.inf)
        cdf = logits.softmax(-1).double().cumsum(-1)
        u = draws[:, t : t + 1] * cdf[:, -1:]
        tokens[:, t : t + 1] = torch.searchsorted(cdf, u, right=True).clamp_(max=cdf.shape[1] - 1)
    return tokens


def _read(model, tokens: Tensor, cache) -> tuple[Tensor, object]:
    """Logits after ``tokens [batch, t]``, ``[batch, vocabulary]``, and the cache that holds them. cache: of all but the
    last; None: of none. A model that gives no cache back reads all its tokens every time."""
    logits, cache = read_on(model, tokens if cache is None else tokens[:, -1:], cache)
    if cache is None:  # it may keep a state of its own, which must not come from another batch
        with uncached(model) as options:
            logits = model(tokens, **options).logits
    return logits[:, -1], cache


def _detector() -> Callable[[str], str]:
    try:
        import py3langid
    except ImportError as error:
        raise ConfigError(
            "a language filter needs py3langid: pip install 'pyprune[language]', or leave language out"
        ) from error
    return lambda text: py3langid.classify(text)[0]


def _open(path: str | Path, settings: dict) -> list[dict]:
    """Rows of an existing file of the same settings (a line cut by a crash is removed), or a new file."""
    path = Path(path)
    if not path.exists() or path.stat().st_size == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings) + "\n")
        return []
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    found, rows = read(path, whole)
    for key, value in settings.items():
        if found.get(key) != value:
            raise ConfigError(
                f"{path} was generated with {key}={found.get(key)!r}, not {value!r}; give another path "
                "or delete the file"
            )
    if len(whole) < len(raw):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    return rows


def read(path: str | Path, raw: bytes | None = None) -> tuple[dict, list[dict]]:
    """Settings and rows ``{candidate, tokens, text}`` of a file written by :func:`generate`."""
    lines = (Path(path).read_bytes() if raw is None else raw).splitlines()
    try:
        settings, *rows = map(json.loads, lines)
        if settings.get("kind") != KIND or any("tokens" not in row for row in rows):
            raise ValueError("not such a file")
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path} is not a file written by pyprune generate; give another path") from error
    return settings, rows


def _append(path: str | Path, rows: list[dict], tokenizer) -> None:
    with open(path, "a") as file:
        for row in rows:
            file.write(json.dumps({**row, "text": tokenizer.decode(row["tokens"])}) + "\n")
        file.flush()
        os.fsync(file.fileno())
