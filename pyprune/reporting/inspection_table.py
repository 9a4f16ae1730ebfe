"""What a checkpoint holds, as people read it on a terminal."""

from __future__ import annotations

from typing import TextIO

from pyprune.reporting.console import open_console
from pyprune.reporting.words import kind_of_weight


def print_inspection(found: dict, out: TextIO | None = None) -> None:
    """What :func:`pyprune.inspect` found, the matrices of a kind in one line."""
    from rich.table import Table

    for member in found.get("members", ()):
        print_inspection(member, out)
    if "members" in found:
        return
    console = open_console(out)
    console.print(
        f"{found['path']}: {found['parameters']:,} parameters, {found['bytes'] / 2**20:.1f} MiB of {found['format']}"
    )
    if (packed := found.get("packed")) is not None:
        share = f", {packed['bytes'] / packed['dense_bytes']:.3f} of their dense size" if packed["matrices"] else ""
        console.print(f"packed: {packed['matrices']} matrices without their zeros{share}")
    coverage, structure = found["coverage"], _structure_text(found)
    if structure:
        console.print(structure)
    if coverage["pruned"] or not structure:
        console.print(
            f"sparsity {found['sparsity']:.4f} of the blocks' matrices, {found['sparsity_of_model']:.4f} of all "
            f"parameters; {coverage['pruned']} of {coverage['matrices']} matrices are pruned, "
            f"{coverage['fraction']:.1%} of their weights, to {found['sparsity_of_pruned']:.4f}"
        )
    patterns = found["patterns"] if coverage["pruned"] else {}
    for name, row in patterns.items():
        console.print(f"{name}: {row['violations']:,} violations in {row['groups']:,} groups of the pruned matrices")
    if found["non_finite"]:
        console.print(f"{found['non_finite']:,} values are NaN or infinite")
    kinds: dict[str, list[dict]] = {}
    for row in found["weights"]:
        kinds.setdefault(kind_of_weight(row["name"]), []).append(row)
    table = Table("matrices", "number", "shape", "sparsity", *patterns)
    for kind, rows in kinds.items():
        spread = [row["sparsity"] for row in rows]
        broken = [[row["violations"][name] for row in rows] for name in patterns]
        table.add_row(
            kind,
            str(len(rows)),
            " … ".join("×".join(map(str, shape)) for shape in _ends([row["shape"] for row in rows])),
            f"{min(spread):.3f}" if max(spread) - min(spread) < 5e-4 else f"{min(spread):.3f} … {max(spread):.3f}",
            *("–" if None in counts else f"{sum(counts):,}" for counts in broken),
        )
    console.print(table)


def _structure_text(found: dict) -> str | None:
    """What structured pruning removed, from the checkpoint's own record; None where it removed nothing."""
    record = found.get("pruning") or {}
    structured, model = record.get("structured"), record.get("model") or {}
    if not structured:
        return None
    gone = ", ".join(f"{share:.4g} of the {kind}" for kind, share in structured.get("removed", {}).items())
    sizes = ", ".join(f"{name} {value}" for name, value in (structured.get("edits") or {}).items())
    dense = model.get("parameters_dense")
    left = (
        f"; {found['parameters']:,} parameters are left of {dense:,}, {found['parameters'] / dense:.1%}"
        if dense
        else ""
    )
    return (
        f"structured: {gone or 'heads or neurons'} removed{left}"
        + (f"; the config says {sizes}" if sizes else "; no stock config says its sizes, pyprune.load knows them")
        + ". Matrices became smaller, which leaves no zeros to count"
    )


def _ends(shapes: list[list[int]]) -> list[list[int]]:
    """The one shape that all have, or the smallest and the largest."""
    ordered = sorted(shapes)
    return ordered[:1] if ordered[0] == ordered[-1] else [ordered[0], ordered[-1]]
