"""Compile every kernel for compute capability 9.0; this needs Triton but no device.

python -m tests.compiled_kernels        prints a line of JSON per variant: registers, spills, loads and stores in its PTX
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsity import kernels, launches, zero_kernels
from sparsity.compact import spmv
from sparsity.tables import Shape

TARGET = GPUTarget("cuda", 90, 32)
TABLE = {"rows": "*i64", "owners": "*i32"}
READ = {"float32": tl.int32, "bfloat16": tl.int16, "float16": tl.float16}
WRITTEN = {"32 bits": tl.int32, "16 bits": tl.int16}


def variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], Shape]]:
    """Yield name, kernel, argument types, constants and launch shape of each kernel that an event or a hook launches."""
    readers = {
        kernels.collect: (
            {
                "lo": "i32", "last": "i32", "num_segments": "i32", "room": "i32", "keys": "*i32", "shards": "*i16",
                "cursors": "*i32", "below": "*i32",
            },
            launches.COLLECT,
        ),
        kernels.count_bins: (
            {
                "lo": "i32", "last": "i32", "shift": "i32", "counts": "*i32", "num_bins": "i32", "num_copies": "i32",
                "below": "*i32",
            },
            launches.COUNT_BINS,
        ),
        kernels.sample: ({"stride": "i32", "keys": "*i32"}, launches.SAMPLE),
        kernels.keep_above: ({"bounds": "*i32"}, launches.KEEP),
        kernels.count_ties: ({"key": "i32", "ties": "*i32"}, launches.KEEP_TIES),
        kernels.keep_after_ties: ({"key": "i32", "ties_before": "*i32", "num_dropped": "i32"}, launches.KEEP_TIES),
    }  # fmt: skip
    for (kernel, (types, shape)), name, aligned in itertools.product(readers.items(), READ, (True, False)):
        constants = {"WIDTH": 5, "DTYPE": READ[name], "ALIGNED": aligned, "BLOCK": shape.block}
        if kernel is kernels.collect:
            constants["PIECE"] = launches.PIECE * shape.num_warps
        yield _name(kernel, name, aligned), kernel, TABLE | types, constants, shape
    shape = launches.COUNT_DIGITS
    digits = {
        "keys": "*i32", "numel": "i32", "lo": "i32", "last": "i32", "shift": "i32", "num_bits": "i32", "prefixes": "*i64",
        "counts": "*i32", "num_copies": "i32",
    }  # fmt: skip
    for num in (1, 2):
        yield f"count_digits, {num}", kernels.count_digits, digits, {"NUM": num, "BLOCK": shape.block}, shape
    shape = launches.COUNT_KEPT
    for aligned in (True, False):
        constants = {"WIDTH": 4, "ALIGNED": aligned, "BLOCK": shape.block}
        yield (
            _name(kernels.count_kept, "masks", aligned),
            kernels.count_kept,
            TABLE | {"counts": "*i32"},
            constants,
            shape,
        )
        constants = constants | {"BLOCK": launches.HASH.block}
        types = TABLE | {"factors": "*i64", "digests": "*i64"}
        yield _name(kernels.hash_masks, "masks", aligned), kernels.hash_masks, types, constants, launches.HASH
    for mode, aligned, name in (
        (launches.ZERO_MODE, False, "32 bits"), (launches.ZERO_MODE, False, "16 bits"),
        ("rewrite", True, "32 bits"), ("rewrite", False, "16 bits"), ("store", False, "32 bits"),
    ):  # fmt: skip
        constants = {"DTYPE": WRITTEN[name], "ALIGNED": aligned, "BLOCK": launches.ZERO.block, "MODE": mode}
        yield (
            _name(zero_kernels.zero, f"{name} {mode}", aligned),
            zero_kernels.zero,
            TABLE,
            constants | {"WIDTH": 7},
            launches.ZERO,
        )
        own = {"tensor": "*i32" if name == "32 bits" else "*i16", "mask": "*i8", "numel": "i32"}
        del constants["DTYPE"]
        yield (
            _name(zero_kernels.zero_one, f"{name} {mode}", aligned),
            zero_kernels.zero_one,
            own,
            constants,
            launches.ZERO_GRADIENT,
        )


def products() -> Iterator[tuple[str, dict[str, str], dict[str, Any], int]]:
    """Yield name, types, constants and warps of the sparse product: for rows of 2 and 7 chunks, and without bases."""
    for value, (num_chunks, has_bases) in itertools.product(
        ("bf16", "fp16", "fp32", "i8"), ((2, True), (7, True), (7, False))
    ):
        shape = spmv.shape_for(32_000, num_chunks)
        vector = "bf16" if value == "i8" else value
        types = {
            "values": f"*{value}", "offsets": "*u8" if has_bases else "*i16", "bases": "*u8", "starts": "*i32",
            "scales": "*fp32", "x": f"*{vector}", "bias": f"*{vector}", "y": f"*{vector}",
            "num_vectors": "i32", "num_rows": "i32", "num_chunks": "i32",
        }  # fmt: skip
        constants = {
            "HAS_BASES": has_bases, "SHIFT": 5, "HAS_SCALES": value == "i8", "HAS_BIAS": False, "VECTORS": 1,
            "ROWS": shape.rows, "CHUNKS": shape.chunks, "STEPS": triton.cdiv(num_chunks, shape.chunks), "EARLY": False,
        }  # fmt: skip
        of = f"multiply, {value}, {num_chunks} chunks, {'bytes' if has_bases else 'columns'}"
        yield of, types, constants, shape.num_warps


def _name(kernel: Any, of: str, aligned: bool) -> str:
    return f"{kernel.__name__}, {of}, {'aligned' if aligned else 'unaligned'}"


def compiled(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    attributes: dict[Any, Any] | None = None,
) -> dict[str, Any]:
    """Compile one variant, and return the loads and stores of its code, its registers and its spills."""
    signature = types | dict.fromkeys(constants, "constexpr")
    ordered = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(
        kernel, ordered, {(kernel.arg_names.index(name),): value for name, value in constants.items()}, attributes
    )
    binary = triton.compile(source, target=TARGET, options={"num_warps": num_warps})
    ptx = binary.asm["ptx"]
    accesses = Counter(re.findall(r"\b((?:ld|st|atom|red)\.global[.\w:]*)", ptx))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [_cuobjdump(), "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    return {"accesses": dict(accesses), "usage": " ".join(re.findall(r"(?:REG|STACK|SHARED|LOCAL):\d+", usage))}


def _cuobjdump() -> str:
    return str(triton.knobs.nvidia.cuobjdump.path)


def main() -> None:
    for name, kernel, types, constants, shape in variants():
        print(json.dumps({"kernel": name, **compiled(kernel, types, constants, shape.num_warps)}), flush=True)
    aligned = {
        (spmv.multiply.arg_names.index(name),): [["tt.divisibility", 16]] for name in ("values", "offsets", "bases")
    }
    for name, types, constants, num_warps in products():
        found = compiled(spmv.multiply, types, constants, num_warps, aligned)
        print(json.dumps({"kernel": name, **found}), flush=True)


if __name__ == "__main__":
    main()
