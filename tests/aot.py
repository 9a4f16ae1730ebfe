"""Ahead-of-time compilation of every Triton kernel and configuration, without a GPU: registers, stack, shared memory.

``python tests/aot.py`` compiles the full cross product for sm_80, 90, 100 and 120; ``--short`` every configuration for
sm_90 and each kernel's default for the others. ``--shard i/n`` takes every n-th. One JSON object a line. Runs without
``TRITON_INTERPRET``.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ARCHS = (80, 90, 100, 120)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # bytes per program may have
MATRIX_OPCODE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


@dataclass(frozen=True)
class Case:
    """One kernel with one set of flags: pointer types, compile-time values and the configurations to try."""

    name: str
    kernel: object
    pointers: dict
    flags: dict
    configs: tuple
    matrix: bool = False
    """The 16-bit products must become tensor core instructions of the architecture."""
    archs: tuple = ARCHS
    loads: str | None = None
    """Opcode that the loads must become."""


def cases() -> list[Case]:
    def module(name):
        return importlib.import_module(f"pyprune.triton_kernels.{name}")

    from pyprune.triton_kernels.tuning import config

    gram, nm, select, sweep = module("gram"), module("nm"), module("select"), module("sweep")
    persistent = module("gram_persistent")
    cholesky, liar, moments, compress = module("cholesky"), module("liar"), module("moments"), module("compress")
    found = []

    def case(name, kernel, pointers, configs, matrix=False, archs=ARCHS, loads=None, **flags):
        types = dict(item.split(":") for item in pointers.split())
        found.append(Case(name, kernel, types, flags, tuple(configs), matrix, archs, loads))

    # Gram: the flags of the hot path (no mask, sums and count in the pass) and of the masked, split one
    accumulators = "mask:u8 gram:fp32 sums:fp32 count:i64 partial:fp32 partial_sums:fp32"
    hot = dict(HAS_MASK=False, HAS_SUMS=True, HAS_COUNT=True, SPLIT=False, ROUND=False, GROUP=8, stride_xc=1)
    case("gram wide", gram.gram_kernel, f"x:bf16 {accumulators}", gram.WIDE, True, PARTS=1, **hot)
    split = hot | dict(HAS_MASK=True, SPLIT=True, GROUP=1)
    case("gram narrow", gram.gram_kernel, f"x:fp16 {accumulators}", gram.NARROW, True, PARTS=1, **split)
    case("gram float32", gram.gram_kernel, f"x:fp32 {accumulators}", gram.FLOAT32, True, PARTS=2, **hot)
    case(
        "gram reduce",
        gram.gram_reduce_kernel,
        "gram:fp32 sums:fp32 partial:fp32 partial_sums:fp32",
        [config(8, BC=128), config(8, BC=64)],
        HAS_SUMS=True,
    )
    cross = dict(HAS_MASK=False, SPLIT=False, GROUP=8, stride_xc=1, stride_yc=1)
    pointers = "mask:u8 cross:fp32 partial:fp32"
    descriptors = "x_rows:tensordesc<bf16[{BT},{BM}]> x_columns:tensordesc<bf16[{BT},{BN}]>"
    case(
        "gram persistent",
        persistent.gram_persistent_kernel,
        f"x:bf16 partial:fp32 {descriptors}",
        persistent.TMA,
        True,
        (90, 100),
        "UTMALDG",
        USE_TMA=True,
        GROUP=4,
    )
    case(
        "gram persistent pointers",
        persistent.gram_persistent_kernel,
        "x:bf16 partial:fp32 x_rows:bf16 x_columns:bf16",
        persistent.POINTERS,
        True,
        (80, 120),
        "LDGSTS",
        USE_TMA=False,
        GROUP=4,
    )
    case(
        "gram persistent add",
        persistent.gram_persistent_add_kernel,
        "gram:fp32 partial:fp32",
        [persistent.ADD],
        BM=128,
        BN=256,
    )
    case("cross wide", gram.cross_kernel, f"y:bf16 x:bf16 {pointers}", gram.WIDE, True, PARTS=1, **cross)
    case("cross narrow", gram.cross_kernel, f"y:fp16 x:fp16 {pointers}", gram.NARROW_CROSS, True, PARTS=1, **cross)
    case("cross float32", gram.cross_kernel, f"y:fp32 x:fp32 {pointers}", gram.FLOAT32, True, PARTS=2, **cross)
    case("cross reduce", gram.cross_reduce_kernel, "cross:fp32 partial:fp32", [config(4, BLOCK=1024)])

    case(
        "moments",
        moments.moments_kernel,
        "x:bf16 mask:u8 counts:fp32 means:fp32 squares:fp32",
        moments.CONFIGS,
        HAS_MASK=True,
        stride_xc=1,
    )
    case(
        "moments merge",
        moments.moments_merge_kernel,
        "counts:fp32 means:fp32 squares:fp32 count:i64 mean:fp32 m2:fp32",
        [config(4, BC=moments.BC_MERGE)],
    )

    between = module("between")
    norms = [between.norm_config(columns) for columns in (64, 576, 4096, 8192, between.WIDEST)]
    case("rms norm", between.rms_norm_kernel, "x:bf16 weight:bf16 out:bf16", norms, FORM=0)
    case("rms norm offset", between.rms_norm_kernel, "x:bf16 weight:bf16 out:bf16", norms[2:3], FORM=2)
    heads = "x:bf16 cos:bf16 sin:bf16 out:bf16"
    case("rotary", between.rotary_kernel, heads, [between.ROTARY], BH=64)
    case("swiglu", between.swiglu_kernel, "gate:bf16 up:bf16 out:bf16", [between.GATE])

    sparse, packed = module("sparse"), "mask:u8 values:{0} offsets:i64"
    for kind in ("bf16", "fp32"):
        pointers = f"x:{kind} {packed.format(kind)} bias:{kind} out:{kind}"
        case(f"sparse one {kind}", sparse.one_token_kernel, pointers, sparse.ONE, HAS_BIAS=True)
        case(
            f"sparse few {kind}",
            sparse.few_tokens_kernel,
            pointers,
            sparse.FEW,
            HAS_BIAS=True,
            BT=sparse.BT,
        )
    case("sparse expand", sparse.expand_kernel, f"{packed.format('bf16')} out:bf16", [sparse.EXPAND])

    for n, m, padded in ((2, 4, 4), (7, 16, 16), (1, 3, 4)):
        tiles = []
        for each in nm.CONFIGS:
            bc, br = nm.tile(each["TILE"], 4096, padded)
            tiles.append(config(each.warps, BR=br, BC=bc))
        case(
            f"nm {n}:{m}",
            nm.nm_kernel,
            "w:bf16 scale:fp32 keep:u8 fault:i32",
            tiles,
            HAS_SCALE=True,
            APPLY=True,
            N=n,
            M=m,
            MP=padded,
            stride_wc=1,
        )
    case(
        "nm compress",
        compress.compress_kernel,
        "w:bf16 scale:fp32 keep:u8 values:bf16 meta:i16 fault:i32",
        [compress.COMPRESS],
        CHOOSE=True,
        HAS_SCALE=True,
        APPLY=True,
        stride_wc=1,
    )
    case(
        "compress",
        compress.compress_kernel,
        "w:fp16 scale:fp16 keep:i16 values:fp16 meta:i16 fault:i32",
        [compress.COMPRESS],
        CHOOSE=False,
        HAS_SCALE=False,
        APPLY=False,
        stride_wc=1,
    )
    case("expand", compress.expand_kernel, "values:bf16 meta:i16 dense:bf16 fault:i32", [compress.EXPAND], stride_vc=1)

    for block in (256, 4096, select.ROW_LIMIT):
        case(
            f"select row {block}",
            select.row_kernel,
            "w:bf16 scale:fp32 keep:u8 fault:i32",
            [config(select.row_warps(block), BC=block)],
            HAS_SCALE=True,
            APPLY=True,
            stride_wc=1,
        )
    tile = [config(8, BR=1, BC=select.TILE)]
    scores = dict(HAS_SCALE=True, stride_wc=1, PER_ROW=0)
    for shift, bits in select.PASSES[:2]:
        case(
            f"histogram {bits}",
            select.histogram_kernel,
            "w:bf16 scale:fp32 state:i32 histogram:i32 nans:i32 fault:i32",
            tile,
            SHIFT=shift,
            BITS=bits,
            **scores,
        )
        case(f"digit {bits}", select.digit_kernel, "state:i32 histogram:i32", [config(4)], SHIFT=shift, BITS=bits)
    case("ties", select.tie_kernel, "w:bf16 scale:fp32 state:i32 ties:i32", tile, **scores)
    case(
        "select mask",
        select.mask_kernel,
        "w:bf16 scale:fp32 state:i32 before:i32 nans:i32 keep:u8",
        tile,
        APPLY=True,
        **scores,
    )

    pointers = "w:fp32 r:fp32 mask:u8 keep:u8 error:fp32 loss:fp32 fault:i32"
    for group in (0, 4):
        case(f"sweep group {group}", sweep.sweep_kernel, pointers, sweep.CONFIGS, GROUP=group, BB=sweep.BLOCK)

    system = "a:fp32 damping:fp32 factor:fp32 inverse:fp32 info:i32"
    flags = dict(HAS_DAMPING=True, stride_ac=1)
    case("cholesky fused", cholesky.fused_kernel, system, cholesky.FACTOR, **flags)
    case("cholesky column", cholesky.column_kernel, system, cholesky.FACTOR, **flags)
    case("cholesky poison", cholesky.poison_kernel, "factor:fp32 info:i32", [config(4, BR=32, BC=128)])
    case(
        "solve",
        cholesky.solve_kernel,
        "factor:fp32 inverse:fp32 info:i32 b:fp32 x:fp32",
        cholesky.SOLVE,
        NB=cholesky.NB,
        stride_bc=1,
    )
    case("liar shift", liar.shift_kernel, "mean:fp32 keep:i64 drop:i64 q:fp32 shift:fp32", [liar.SHIFT], stride_qd=1)
    case(
        "liar",
        liar.liar_kernel,
        "w:bf16 keep:i64 drop:i64 q:fp32 shift:fp32 bias:fp32 updated:fp32 new_bias:fp32",
        liar.CONFIGS,
        HAS_SHIFT=True,
        HAS_BIAS=True,
        stride_wc=1,
        stride_qd=1,
    )
    return found


def _tool(name: str, *arguments: str) -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return subprocess.run([str(folder / name), *arguments], capture_output=True, text=True, check=True).stdout


def compile_one(case: Case, cfg, arch: int, opcodes: bool = False) -> dict:
    """Compile for one architecture; returns registers, stack and shared memory of the cubin."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = case.flags | dict(cfg.blocks)
    names = case.kernel.arg_names

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name == "eps":
            return "fp32"
        given = case.pointers.get(name, "")
        return given.format(**constants) if given.startswith("tensordesc") else f"*{given}" if given else "i32"

    types = {n: type_of(n) for n in names}
    # what the launcher sees on real shapes: aligned pointers, sizes and strides that are multiples of 16
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if types[n] != "constexpr"
        and not types[n].startswith("tensordesc")
        and n
        not in (
            "tokens",
            "rows",
            "k",
            "n_drop",
            "splits",
            "i_k",
            "b",
            "d",
            "r",
            "units",
            "walked",
            "squares",
            "heads",
            "eps",
        )
    }
    source = ASTSource(case.kernel, types, constexprs=constants, attrs=attributes)
    kernel = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options=dict(num_warps=cfg.warps, num_stages=cfg.stages, enable_fp_fusion=True),
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", file.name))
        row = dict(
            kernel=case.name,
            config=str(cfg),
            arch=arch,
            registers=int(usage[1]),
            stack=int(usage[2]),
            shared=kernel.metadata.shared,
            limit=SHARED_LIMIT[arch],
        )
        if opcodes and case.matrix:
            code = _tool("cuobjdump", "-sass", file.name)
            row["matrix"] = MATRIX_OPCODE[arch] in code
            if case.loads:
                row["loads"] = case.loads in code
    return row


def jobs(short: bool) -> list[tuple[Case, object, int]]:
    from pyprune.triton_kernels.tuning import usable

    listed, seen = [], set()
    for case, arch in itertools.product(cases(), ARCHS):
        if arch not in case.archs:
            continue
        allowed = usable(case.configs, SHARED_LIMIT[arch])
        if short and arch != 90:
            # the first configuration of the first case of a kernel stands for the kernel
            allowed = allowed[:1] if (case.kernel.fn, arch) not in seen else []
        seen.add((case.kernel.fn, arch))
        listed += [(case, cfg, arch) for cfg in allowed]
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    options = parser.parse_args()
    from pyprune.triton_kernels.tuning import usable

    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    index, count = map(int, options.shard.split("/"))
    for case, cfg, arch in jobs(options.short)[index::count]:
        if options.only in case.name:
            # disassembly costs as much as compiling: once per product kernel and architecture
            first = cfg == usable(case.configs, SHARED_LIMIT[arch])[0]
            print(json.dumps(compile_one(case, cfg, arch, opcodes=first)), flush=True)


if __name__ == "__main__":
    main()
