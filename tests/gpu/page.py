"""Write the results of `python -m tests.gpu` as a page: docs/gpu.md, from the files in docs/gpu/.

    python -m tests.gpu.page [docs/gpu] [--output docs/gpu.md]

Copy the files that `check` and `bench` wrote to $OUT into the folder, then run this. Each section names command, device and
versions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tests.benchmarks.own_steps import predicted_bytes
from tests.benchmarks.page import Row, figure, table
from tests.benchmarks.throughput_variants import Variant, Workload

HEAD = """# On a GPU

Measured on one GPU by `make gpu-check` and `make gpu-bench`; the files are in [gpu/](gpu), and `python -m tests.gpu.page`
makes this page of them. [speed.md](speed.md) says what the figures mean, what failed and what was done about it.
"""
GIB = 2**30
WHERE = ("gpu", "python", "torch", "triton", "transformers", "accelerate", "cuda", "cudnn")


def origin(row: Row) -> str:
    """Return the device and versions of a row, in one line; without a GPU the device is the CPU."""
    known = [f"{key} {row[key]}" if key != "gpu" else f"{row[key]}" for key in WHERE if key in row]
    cpu = [f"{row['cores']} cores of {row['machine']}"] if "gpu" not in row and "cores" in row else []
    return ", ".join([*cpu, *known])


def steps_section(result: dict[str, Any], title: str) -> str:
    """Return a table of all steps of `check` or `bench` with their outcomes."""
    steps = result["steps"]
    found = (step["figures"] for step in steps if step["name"] == "device" and step.get("figures"))
    device = next(found, result.get("device", {}))
    copy, flops = device.get("copy_bytes_per_second"), device.get("bf16_flops")
    ceilings = f" A copy moves {copy / 1e12:.2f} TB/s, a bf16 product makes {flops / 1e12:.0f} TFLOP/s." if copy else ""
    rows = [[step["name"], step["outcome"], f"{step['seconds']:.0f} s", words(step["words"])] for step in steps]
    return "\n".join(
        [
            f"## {title}\n",
            f"`{result['command']}` on {result['started'][:10]}; {origin(device)}.{ceilings}\n",
            table(["step", "", "", ""], rows),
        ]
    )


def words(text: str) -> str:
    """Return the end of the step's output, short enough for a cell."""
    short = " ".join(text.split()).replace("|", "/")
    return short if len(short) <= 110 else short[:107] + "..."


def planned(row: Row) -> str:
    """Return the peak that `launch.plan` now gives for a variant, in GiB; an empty string if it cannot plan it."""
    if not row.get("predicted_bytes"):
        return ""
    work = Workload(**{field.name: row[field.name] for field in fields(Workload)})
    variant = Variant(**row["settings"])
    bytes_ = predicted_bytes(replace(work, batch=work.batch * variant.batch_factor), variant, "cuda")
    return f"{bytes_ / GIB:.1f}" if bytes_ else ""


def throughput_section(rows: list[Row]) -> str:
    """Return tokens per second, MFU and memory by variant, and the operations of the fastest one."""
    ran = [row for row in rows if not row["skipped"] and not row["name"].startswith("profile of")]
    lines = [
        [
            row["name"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['mfu']:.1%}",
            f"{row['peak_bytes'] / GIB:.1f}",
            planned(row),
        ]
        for row in ran
    ]
    parts = [
        "## Tokens a second of the 1B\n",
        f"`{rows[0]['command']}`; {origin(rows[0])}. {rows[0]['steps']} steps after three of warm-up, median; x1 is "
        f"a micro-batch of {rows[0]['batch']} blocks of {rows[0]['length']} tokens. MFU is by the bf16 peak of the data "
        "sheet, fp8 included.\n",
        table(["variant", "tokens/s", "MFU", "peak GiB", "plan GiB"], lines),
    ]
    sparse = [row for row in ran if row.get("dense_seconds")]
    parts += [
        f"\nA sparse step takes {row['seconds'] / row['dense_seconds']:.3f} of a dense one beside it." for row in sparse
    ]
    skipped = [row["name"] for row in rows if row["skipped"]]
    if skipped:
        parts.append(f"\nNot run, for lack of time: {'; '.join(skipped)}.")
    profiled = next((row for row in rows if row["profile"]), None)
    if profiled:
        # The profiler also lists ranges that Python code marks, such as Optimizer.step#AdamW.step.
        found = [kernel for kernel in profiled["profile"] if "#" not in kernel["name"]][:10]
        kernels = [[f"`{kernel['name'][:70]}`", f"{kernel['share']:.1%}", str(kernel["calls"])] for kernel in found]
        parts += [f"\n### The ten kernels that take most: {profiled['name'].removeprefix('profile of: ')}\n"]
        parts += [table(["kernel", "share", "calls"], kernels)]
    return "\n".join(parts)


def comparison_section(title: str) -> Callable[[list[Row]], str]:
    """Return a function that makes a table of name, seconds, baseline and ratio from the rows of event, masking or decode."""

    def section(rows: list[Row]) -> str:
        lines = [
            [
                row["name"],
                f"{figure(1e3 * row['seconds'])} ms",
                row["baseline"],
                f"{figure(1e3 * row['baseline_seconds'])} ms",
                figure(row["ratio"]),
            ]
            for row in rows
            if row.get("seconds") and row.get("baseline_seconds")
        ]
        head = [f"## {title}\n", f"`{rows[0]['command']}`; {origin(rows[0])}.\n"]
        return "\n".join([*head, table(["", "ours", "against", "", "ratio"], lines)])

    return section


SECTIONS: dict[str, Callable[[Any], str]] = {
    "check": lambda found: steps_section(found, "Everything right: `make gpu-check`"),
    "again": lambda found: steps_section(found, "Run again after changes, and new"),
    "throughput": throughput_section,
    "event": comparison_section("A prune event of the 1B"),
    "masking": comparison_section("Masking"),
    "decode": comparison_section("Decoding with compact weights"),
    "decode_variants": comparison_section("Decoding: ways side by side"),
    "bench": lambda found: steps_section(found, "The steps of `make gpu-bench`"),
}


def page(folder: Path) -> str:
    """Return the page of the result files in `folder`; sections of missing files are left out."""
    parts = [
        section(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
        for name, section in SECTIONS.items()
        if (folder / f"{name}.json").is_file()
    ]
    return "\n\n".join([HEAD.rstrip(), *parts]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs/gpu"))
    parser.add_argument("--output", type=Path, default=Path("docs/gpu.md"))
    options = parser.parse_args(arguments)
    options.output.write_text(page(options.folder), encoding="utf-8")
    print(options.output)


if __name__ == "__main__":
    main()
