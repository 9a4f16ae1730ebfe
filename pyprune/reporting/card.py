"""README.md of a pruned checkpoint."""

from __future__ import annotations

from pyprune.reporting.summary import by_key_text, gap_text, inputs_text, left_text
from pyprune.reporting.verdict import RULE, verdict
from pyprune.reporting.words import (
    LABELS,
    RECONSTRUCTIONS,
    TASK_METRICS,
    asked_text,
    cell,
    conditions_text,
    criterion_text,
    difference_text,
    distinct,
    gain_text,
    headline,
    perplexity_text,
    ratio_text,
    score_text,
    size_text,
    source_text,
)


def model_card(report: dict, name: str, picture: str | None = None) -> str:
    """README.md of a pruned checkpoint: what it is, what it costs, how to load it.

    picture: file beside it that draws the measured gain (``report["gain"]``, if ``pyprune eval --latency`` ran).
    """
    config, model = report["config"], report["model"]
    encoder = not report.get("evaluation") and not model["architecture"].endswith(("ForCausalLM", "LMHeadModel"))
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'feature-extraction' if encoder else 'text-generation'}",
        *(f"{key}: {value}" for key, value in (model.get("card") or {}).items()),
        "tags: [pyprune, pruning, sparsity]",
        "---",
        "",
        f"# {name}",
        "",
        f"{model['name']} ({model['architecture']}, {model['parameters']:,} parameters, {model['dtype']}) pruned "
        f"in one shot with pyprune: {headline(report)}. "
        + _outcome(report)
        + " Embeddings and the head are as they were.",
        "",
        *_verdict(report),
    ]
    if report.get("evaluation"):
        lines += _perplexities(report)
    lines += _gain(report.get("gain"), picture)
    lines += _tasks(report.get("tasks"))
    lines += _use(report, name, "AutoModel" if encoder else "AutoModelForCausalLM")
    lines += [
        "A plain checkpoint stores zeros like any other number: it is not smaller, and by itself not faster, than the "
        "dense one. `pyprune pack` leaves them out."
        if config["pattern"] not in ("neurons", "heads", "structured")
        else "The matrices themselves are smaller, so every runtime gains by what is gone.",
        *([_files_text(model)] if model.get("file_bytes") else []),
        "",
        "## How it was made",
        "",
        f"- calibration: {report['calibration']['description']} (token ids sha256 "
        f"`{report['calibration']['fingerprint'][:16]}…`)",
    ]
    if (inputs := inputs_text(report)) is not None:
        lines.append(f"- statistics of inputs, {inputs}")
    if config["reconstruct"] in RECONSTRUCTIONS:
        lines.append(
            f"- reconstruction: {RECONSTRUCTIONS[config['reconstruct']]}"
            + ("; the targets are the dense model's own stream" if config.get("global_propagation") else "")
        )
    lines += [f"- warning: {text}" for text in distinct(report.get("warnings") or [])]
    lines += [
        _repeat_text(report),
        "- error of every weight and block, seconds by phase: `report.json`; per weight: `pruning.json`",
        "",
    ]
    return "\n".join(lines)


def _use(report: dict, name: str, auto: str) -> list[str]:
    """How the model is loaded. auto: the class of transformers that loads one with a stock config."""
    own = bool((report.get("structured") or {}).get("layout"))
    lines = ["## Use", "", "```python"]
    if own:
        lines += ["import pyprune", "", f'model, tokenizer = pyprune.load("{name}")']
    else:
        tokenizer = report["model"].get("tokenizer", True)
        lines += [
            f"from transformers import {auto}{', AutoTokenizer' if tokenizer else ''}",
            "",
            f'model = {auto}.from_pretrained("{name}", dtype="auto")',
            *([f'tokenizer = AutoTokenizer.from_pretrained("{name}")'] if tokenizer else []),
        ]
    lines += ["```", ""]
    if own:
        reason = report["structured"]["reason"]
        lines += [f"Only pyprune loads this model, a stock config cannot say its sizes: {reason}.", ""]
    return lines


def _files_text(model: dict) -> str:
    """The bytes of the weight files beside those of the dense model's."""
    own, dense = model["file_bytes"], model.get("file_bytes_dense")
    if not dense:
        return f"The weight files take {size_text(own)}."
    than = "smaller than" if own < 0.99 * dense else "larger than" if own > 1.01 * dense else "as large as"
    return f"The weight files take {size_text(own)}, {than} the dense model's {size_text(dense)}."


def _repeat_text(report: dict) -> str:
    """How the run is repeated, or what has to be named first."""
    config = report["config"]
    memory = [value for value in (config["calibration"].get("source"), config["evaluation"].get("text")) if value]
    what = [] if config.get("model") else ["the model"]
    what += ["texts"] if any("in memory, sha256" in str(value) for value in memory) else []
    if str(config.get("criterion")).startswith("<"):
        name = criterion_text(config)
        beside = f", and {' and '.join(what)}," if what else ""
        return f"- settings: `run.yaml`; it repeats the run from Python with the {name}{beside} given again"
    if what:
        return f"- settings: `run.yaml`; it repeats the run once {' and '.join(what)} given in memory have a name there"
    then = ", then `refine.yaml` the refinement" if report.get("refinement") else ""
    return f"- settings: `run.yaml` repeats the pruning (`pyprune prune --config run.yaml -o DIR`){then}"


def _perplexities(report: dict) -> list[str]:
    """Perplexity of both models, the calibration's kind of text beside others."""
    lines = [
        "| text | kind | windows | dense perplexity | pruned perplexity | pruned / dense |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {source_text(row)} | {row.get('domain') or ''} | {conditions_text(row)} | "
        f"{perplexity_text(row['dense'])} | {perplexity_text(row['pruned'])} | "
        f"{ratio_text(row).removeprefix(', ×') or '–'} |"
        for row in report["evaluation"]
    ]
    lines += [
        "",
        "Each window is seen by itself; where they overlap (a stride is given), only the tokens count that the window "
        "before did not have. The same code measures both columns; ± is one standard error over windows. In-domain "
        "text is of the kind that the model was calibrated on, off-domain text is of another.",
    ]
    if (gap := gap_text(report)) is not None:
        lines.append(f"Generalisation gap {gap}; above {report['generalisation']['warn_above']:g} it is a warning.")
    return [*lines, ""]


def _verdict(report: dict) -> list[str]:
    """What the figures come to, as ``report.html`` says it, and by which rule."""
    first, *others = verdict(report).sentences
    return [" ".join([f"**{first}**", *others]), "", f"*{RULE}*", ""]


def _gain(rows: list[dict] | None, picture: str | None) -> list[str]:
    """Size, memory and speed beside the dense model's, as a table."""
    if not rows:
        return []
    base, own = rows[0], rows[-1]
    lines = ["| | dense | pruned |", "|---|---|---|"]
    lines += [
        f"| {label} | {cell(base, key, base)} | {cell(own, key, base)} |"
        for key, (label, _, _) in LABELS.items()
        if own.get(key)
    ]
    lines += [
        "",
        *gain_text(own),
        f"Measured by `pyprune eval --latency` on {own['device']}, {own['dtype']}, {own['tokens']} tokens, "
        f"batch size {own['batch_size']}, each model in a process of its own.",
        "",
    ]
    return [*lines, *([f"![gain]({picture})", ""] if picture else [])]


def _tasks(rows: list[dict] | None) -> list[str]:
    """Tasks, each metric in a line; beside the dense model's where that was measured, too."""
    if not rows:
        return []
    lines = ["| task | items | metric | dense | pruned | difference | p |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        for metric in TASK_METRICS:
            if metric not in row:
                continue
            dense = difference = p = "–"
            if "dense" in row:
                test = row["paired"][metric]
                dense, difference = score_text(row["dense"], metric), difference_text(test)
                p = "–" if test.get("mcnemar_p") is None else f"{test['mcnemar_p']:.3g}"
            lines.append(
                f"| {row['task']} | {row['items']} | {metric} | {dense} | {score_text(row, metric)} | {difference} "
                f"| {p} |"
            )
    return [
        *lines,
        "",
        "Measured by `pyprune eval --tasks`; ± is one standard error, p is of McNemar's exact test.",
        "",
    ]


def _outcome(report: dict) -> str:
    """What was asked for and what became of it."""
    config = report["config"]
    share = f"{report['coverage']['fraction']:.1%} of the matrix weights of its blocks"
    asked = asked_text(report.get("sparsity_asked", config["sparsity"]))
    if structured := report.get("structured"):
        gone = " and ".join(f"{part:.2%} of the {kind}" for kind, part in structured.get("removed", {}).items())
        gone = gone or format(report["sparsity"], ".2%")
        named = by_key_text(report)
        apart = f" Asked for and achieved: {named}." if named else ""
        return f"Sparsity {asked} was asked for; {gone} are gone, {left_text(report)}.{apart}"
    named = by_key_text(report)
    return (
        f"Sparsity {asked} was asked for; {report['sparsity']:.2%} of the pruned weights are exactly zero, and they "
        f"are {share}." + (f" Asked for and achieved: {named}." if named else "")
    )
