"""A sparse model's folder in few bytes: `python -m eval.compact model=DIR out=DIR2 [dtype=bfloat16] [expand=true]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from conf.cli import overrides_of, user_errors
from conf.compose import composed
from conf.schema import CompactConfig
from sparsity.common.text import bytes_text

if TYPE_CHECKING:
    from sparsity.compact import Folder

EXAMPLES = """python -m eval.compact model=DIR out=DIR2                  kept weights and one bit a weight, bit for bit
python -m eval.compact model=DIR out=DIR2 dtype=bfloat16   rounded first: what a float32 model is usually run in
python -m eval.compact model=DIR2 out=DIR3 expand=true     a plain folder again, for those who load it without sparsellm
    ... format=json                                        the figures for a script
Load DIR2 with transformers after `import sparsity.compact`. The format: docs/compact.md. Keys: CompactConfig in
conf/schema/compact.py."""


def convert(config: CompactConfig) -> Folder:
    """Write the folder that `config` asks for; a ValueError in one sentence where it cannot be."""
    from sparsity.compact import compact_folder, expand_folder

    if config.expand:
        return expand_folder(config.folder, config.out, progress=progress_bar)
    return compact_folder(config.folder, config.out, config.dtype, progress=progress_bar)


def progress_bar(num_bytes: int) -> Callable[[int], object]:
    from tqdm import tqdm

    bar = tqdm(total=num_bytes, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty())
    return bar.update


def figures(folder: Folder, is_compact: bool) -> dict[str, Any]:
    """What was written; sizes in bytes, the share and bits over the tensors that are stored sparse."""
    sparse = [tensor for tensor in folder.tensors if tensor.bitmask is not None]
    num_weights, num_kept = sum(t.numel for t in sparse), sum(t.values.numel for t in sparse)
    return {
        "model": str(folder.source),
        "out": str(folder.out),
        "is_compact": is_compact,
        "model_bytes": folder.source_bytes,
        "out_bytes": folder.out_bytes,
        "num_tensors": len(folder.tensors),
        "num_sparse_tensors": len(sparse),
        "sparse_weights": num_weights,
        "kept_weights": num_kept,
        "sparsity": 1 - num_kept / num_weights if num_weights else 0.0,
        "bits_per_sparse_weight": 8 * sum(t.stored_bytes for t in sparse) / num_weights if num_weights else None,
        "dtypes": sorted({tensor.dtype for tensor in folder.tensors}),
        "not_copied": folder.not_copied,
    }


def figures_text(found: dict[str, Any]) -> str:
    before, after = found["model_bytes"], found["out_bytes"]
    change = f"{before / after:.2f} times smaller" if after < before else f"{after / before:.2f} times as large"
    lines = [f"{found['model']} ({bytes_text(before)}) -> {found['out']} ({bytes_text(after)}): {change}"]
    dense = found["num_tensors"] - found["num_sparse_tensors"]
    if found["num_sparse_tensors"]:
        lines.append(
            f"{found['num_sparse_tensors']} sparse tensors of {found['sparse_weights']:,} weights, "
            f"{100 * found['sparsity']:.2f} % zero: {found['bits_per_sparse_weight']:.3f} bits a weight; {dense} dense ones"
        )
    else:
        lines.append(f"no tensor of {dense} is sparse enough for a bitmask to be worth it: all are stored as they are")
    if found["not_copied"]:
        lines.append(f"not copied: {', '.join(found['not_copied'])}")
    if found["is_compact"]:
        lines.append("load it with transformers after `import sparsity.compact`")
        lines.append(f"plain again: python -m eval.compact model={found['out']} out=DIR expand=true")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    with user_errors():
        overrides = overrides_of(
            "eval.compact",
            "Write a sparse model's folder in fewer bytes.",
            EXAMPLES,
            arguments,
        )
        config: CompactConfig = composed("compact", overrides)
        found = figures(convert(config), not config.expand)
        print(json.dumps(found, indent=2) if config.format == "json" else figures_text(found))
