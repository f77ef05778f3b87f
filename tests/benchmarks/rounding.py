"""Measure the perplexity of a sparse model whose weights are rounded, either only the kept ones or all of them.

    python -m tests.benchmarks.rounding --model runs/demo/model --text FILE [--bytes 200000]   -> runs/bench/rounding.json

`sparse` rows are compact files (`eval.compact values=`). `dense` rows round every linear weight, zeros too, by the same rule:
with a scale for each row (int8) or for 64 weights (int4), as in a dense 8- or 4-bit file. All start from bfloat16 weights.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from eval.model.perplexity import token_perplexity
from sparsity.compact import compact_folder, expand_folder
from sparsity.compact.rounding import Rounding, restore_values, round_values, segment_sizes
from tests.benchmarks.common import RESULTS, write_rows

INT8, INT4 = Rounding(8), Rounding(4, 64)


def dense_rounded(folder: Path, out: Path, names: set[str], rounding: Rounding) -> float:
    """Round all weights of the tensors `names`; return the bits per weight, including its share of the scales."""
    shutil.copytree(folder, out)
    bits = weights = 0
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for name in names & tensors.keys():
            tensor = tensors[name]
            rows = torch.full((tensor.shape[0],), tensor.shape[1])
            sizes = segment_sizes(tensor.numel(), rounding.group, rows)
            codes, scales = round_values(tensor.reshape(-1), sizes, rounding)
            tensors[name] = restore_values(codes, scales, sizes).view(tensor.shape)
            bits += rounding.bits * tensor.numel() + 8 * scales.nbytes
            weights += tensor.numel()
        save_file(tensors, file, metadata={"format": "pt"})
    return bits / weights


def measure(model: Path, text: Path) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        names: set[str] = set()
        for kind, rounding in (("bf16", None), ("int8", INT8), ("int4", INT4)):
            found = compact_folder(model, base / kind, "bfloat16", rounding=rounding)
            sparse = [tensor for tensor in found.tensors if tensor.bitmask is not None]
            names = {tensor.name for tensor in sparse}
            bits = 8 * sum(t.stored_bytes for t in sparse) / sum(t.numel for t in sparse)
            rows.append(
                {
                    "name": f"sparse {kind}",
                    "bits_a_weight": bits,
                    "perplexity": token_perplexity(str(base / kind), str(text)),
                }
            )
        expand_folder(base / "bf16", base / "plain")
        for kind, rounding in (("int8", INT8), ("int4", INT4)):
            bits = dense_rounded(base / "plain", base / f"dense-{kind}", names, rounding)
            perplexity = token_perplexity(str(base / f"dense-{kind}"), str(text))
            rows.append({"name": f"dense {kind}", "bits_a_weight": bits, "perplexity": perplexity})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a plain sparse folder")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bytes", type=int, default=200_000, help="of the text that are read")
    parser.add_argument("--output", type=Path, default=RESULTS / "rounding.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        text = Path(name) / options.text.name
        text.write_bytes(options.text.read_bytes()[: options.bytes].rsplit(b"\n", 1)[0] + b"\n")
        rows = measure(options.model, text)
    for row in rows:
        print(f"{row['name']:<12} {row['bits_a_weight']:7.3f} bits a weight, token perplexity {row['perplexity']:.3f}")
    write_rows(rows, options.output)


if __name__ == "__main__":
    main()
