"""Conversion of a model folder to the compact form and back, with its report: the work of `python -m eval.compact`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.cli import overrides_of, user_errors
from conf.compose import composed
from conf.schema import CompactConfig
from sparsity.common.text import bytes_text

if TYPE_CHECKING:
    from sparsity.compact import Folder
    from sparsity.compact.rounding import Rounding

EXAMPLES = """python -m eval.compact model=DIR out=DIR2                  kept weights and one bit a weight, bit for bit
python -m eval.compact model=DIR out=DIR2 dtype=bfloat16   rounded first: what a float32 model is usually run in
python -m eval.compact model=DIR out=DIR2 values=int8      kept values rounded to 8 bits, or values=int4 [group=64]
python -m eval.compact model=DIR2 out=DIR3 expand=true     a plain folder again, for those who load it without sparsellm
    ... text=FILE                                          perplexity before and after, in the figures and the card
    ... format=json                                        the figures for a script
Load DIR2 with transformers after `import sparsity.compact`. The format: docs/format.md. Keys: CompactConfig in
conf/schema/compact.py."""


def convert(config: CompactConfig) -> Folder:
    """Write the folder that `config` describes.

    Raises:
        ValueError: The source cannot be converted, the target exists, or its disk is too full.
    """
    from sparsity.compact import compact_folder, expand_folder

    if config.expand:
        return expand_folder(config.folder, config.out, progress=progress_bar)
    return compact_folder(
        config.folder, config.out, config.dtype, progress_bar, rounding_of(config), row_starts=config.row_starts
    )


def rounding_of(config: CompactConfig) -> Rounding | None:
    """Return the rounding that `config` asks for; None if kept values keep their bits."""
    from sparsity.compact.rounding import BITS_OF_VALUES, GROUP_OF_INT4, Rounding

    if config.values is None:
        return None
    usual = GROUP_OF_INT4 if config.values == "int4" else 0
    group = usual if config.group is None else config.group
    return Rounding(BITS_OF_VALUES[config.values], group, "mse" if config.scale == "mse" else "absmax")


def perplexities(config: CompactConfig) -> dict[str, float]:
    """Return the token perplexity of the model and of its compact form on `config.text`; {} if no text is given."""
    if config.text is None:
        return {}
    from eval.model.perplexity import token_perplexity

    return {
        "perplexity_before": token_perplexity(config.folder, config.text),
        "perplexity_after": token_perplexity(config.out, config.text),
    }


def add_to_card(folder: Path, found: Mapping[str, Any]) -> None:
    """Append a section about the compact weights to the folder's README.md, if it has one."""
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8").rstrip("\n")
        card.write_text(f"{text}\n\n{card_section(found)}\n", encoding="utf-8")


def card_section(found: Mapping[str, Any]) -> str:
    """Return the model card's section about the compact weights."""
    values = f"rounded to {found['values']}" if found["values"] else "kept bit for bit"
    lines = [
        "## Compact weights",
        "",
        f"Stored in sparsellm's compact format: kept values {values}, and a bitmask. Load it with transformers after "
        "`import sparsity.compact`.",
        "",
        f"- Weight files: {bytes_text(found['out_bytes'])}, before {bytes_text(found['model_bytes'])}",
    ]
    if found["bits_per_sparse_weight"] is not None:
        lines.append(
            f"- Sparse weights: {found['sparse_weights']:,}, {100 * found['sparsity']:.2f} % zero, "
            f"{found['bits_per_sparse_weight']:.2f} bits each"
        )
    if "perplexity_after" in found:
        lines.append(
            f"- Token perplexity on `{found['text']}`, disjoint windows: {found['perplexity_after']:.3f}, before "
            f"{found['perplexity_before']:.3f}"
        )
    return "\n".join(lines)


def progress_bar(num_bytes: int) -> Callable[[int], object]:
    """Return a function that advances a bar of `num_bytes` by the bytes it is given."""
    from tqdm import tqdm

    bar = tqdm(total=num_bytes, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty())
    return bar.update


def figures(folder: Folder, config: CompactConfig) -> dict[str, Any]:
    """Return the figures of a conversion: sizes in bytes; sparsity and bits a weight of the tensors that are stored sparse."""
    sparse = [tensor for tensor in folder.tensors if tensor.bitmask is not None]
    num_weights, num_kept = sum(t.numel for t in sparse), sum(t.num_kept for t in sparse)
    return {
        "model": str(folder.source),
        "out": str(folder.out),
        "is_compact": not config.expand,
        "values": config.values,
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
    """Return the sizes before and after as text."""
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
        lines.append(
            f"none of the {dense} tensors is sparse enough for a bitmask to save space: all are stored unchanged"
        )
    if "perplexity_after" in found:
        change = f"{found['perplexity_before']:.3f} before, {found['perplexity_after']:.3f} after"
        lines.append(f"token perplexity on {found['text']}: {change}")
    if found["not_copied"]:
        lines.append(f"not copied: {', '.join(found['not_copied'])}")
    if found["is_compact"]:
        lines.append("load it with transformers after `import sparsity.compact`")
        lines.append(f"plain again: python -m eval.compact model={found['out']} out=DIR expand=true")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Write a compact folder, or with expand=true a plain one."""
    with user_errors():
        overrides = overrides_of(
            "eval.compact",
            "Write a sparse model's folder in fewer bytes.",
            EXAMPLES,
            arguments,
        )
        config: CompactConfig = composed("compact", overrides)
        if config.text is not None and not Path(config.text).is_file():
            raise ValueError(f"text={config.text} is not a file: give a text file, such as WikiText's wiki.test.raw.")
        found = figures(convert(config), config)
        if config.text is not None:
            found |= {"text": Path(config.text).name, **perplexities(config)}
        if not config.expand:
            add_to_card(Path(config.out), found)
        print(json.dumps(found, indent=2) if config.format == "json" else figures_text(found))
