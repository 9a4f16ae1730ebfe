"""Size and speed of a model: prefill and decode."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.config import ConfigError
from pyprune.evaluation.perplexity import check_causal, device_of
from pyprune.execution.activation_store import peak_memory
from pyprune.model.attributes import vocabulary_size
from pyprune.model.blocks import read_on
from pyprune.packed.loading import opened
from pyprune.packed.modules import parameter_count


@torch.no_grad()
def latency(
    model: Any,
    *,
    tokens: int = 512,
    new_tokens: int = 32,
    batch_size: int = 1,
    repeats: int = 3,
    directory: str | Path | None = None,
) -> dict:
    """Size and speed: parameters, bytes on disk, peak memory, tokens per second in prefill and in decode.

    model: a causal model, measured where it is; what :func:`pyprune.load` takes or returns, or the result of a run.
    Prefill is one forward pass over ``[batch_size, tokens]`` random ids;
    decode feeds one token at a time after it, ``new_tokens`` in all, with the cache. Speeds are of the fastest of
    ``repeats`` runs after one that is not counted. directory: folder of the checkpoint, for the bytes of its files.
    Returns a dict of plain numbers; names ending in ``_bytes`` are bytes, in ``_per_second`` tokens per second.
    ``peak_memory_bytes`` is the device's during the runs, on a CPU the process's so far.
    """
    if directory is None and isinstance(model, (str, Path)) and Path(model).is_dir():
        directory = model
    model = opened(model).model
    check_causal(model)
    device = device_of(model)
    ids = torch.randint(vocabulary_size(model), (batch_size, tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    runs = [_timed_run(model, ids, new_tokens) for _ in range(repeats + 1)][1:]
    prefill, decode = (min(column) for column in zip(*runs))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    size = (
        None
        if directory is None
        else sum(f.stat().st_size for f in Path(directory).iterdir() if f.suffix in (".safetensors", ".bin"))
    )
    return {
        "parameters": parameter_count(model),
        "file_bytes": size,
        "peak_memory_bytes": peak,
        "prefill_tokens_per_second": batch_size * tokens / prefill,
        "decode_tokens_per_second": batch_size * new_tokens / decode,
        "tokens": tokens,
        "new_tokens": new_tokens,
        "batch_size": batch_size,
        "dtype": str(next(model.parameters()).dtype)[6:],
        "device": str(device),
    }


def _timed_run(model: nn.Module, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of one prefill and of ``new_tokens`` decode steps after it."""
    start = _now(ids.device)
    logits, cache = read_on(model, ids)
    if cache is None:
        raise ConfigError(f"{type(model).__name__} gives no cache back, so its decoding cannot be timed")
    between = _now(ids.device)
    for _ in range(new_tokens):
        logits, cache = read_on(model, logits[:, -1:].argmax(-1), cache)
    return between - start, _now(ids.device) - between


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
