"""Write the measured figures as a page: the tables of `docs/measured.md`, from the files that the benchmarks wrote.

    python -m tests.benchmarks.page [runs/bench ...] [--output docs/measured.md]
    python -m tests.benchmarks.page --only around          makes one section anew and leaves the others as they are

Give one folder for each machine, or for each way to call a command. Each file makes a section, with its command, machine,
versions and rows.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.common import PACKAGES, RESULTS

Row = dict[str, Any]
HEAD = """# Measured

Made by `python -m tests.benchmarks.page` from the files of the benchmarks; [findings.md](findings.md) says what they mean. A
ratio is the peer's seconds over ours: above 1 we are faster.
"""
ONE_RUN = ("name", "numel", "dtype", "device", "threads", "ranks")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(value: float, digits: int = 3) -> str:
    """Format a number with at least `digits` significant digits, never as a power of ten."""
    rounded = float(f"{value:.{digits - 1}e}")
    if not rounded:
        return "0"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"


def selection(rows: list[Row]) -> str:
    """Return a table with a line for each measurement and a column for each peer."""
    peers = list(dict.fromkeys(row["baseline"] for row in rows))
    runs: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        runs.setdefault(tuple(row[key] for key in ONE_RUN), []).append(row)
    lines = []
    for (name, numel, dtype, device, threads, ranks), found in runs.items():
        by_peer = {row["baseline"]: f"{figure(row['ratio'])} ({figure(row['baseline_seconds'])} s)" for row in found}
        where = device
        if device == "cpu":
            where += f", {ranks} ranks" if ranks > 1 else f", {threads} thread{'s' * (threads > 1)}"
        share = found[0].get("extra_share")
        memory = "" if share is None else f"{share:.2%}"
        what = name.partition(",")[0]
        cells = [by_peer.get(peer, "") for peer in peers]
        lines.append([what, f"{numel:,}", dtype, where, f"{figure(found[0]['seconds'])} s", memory, *cells])
    return table(["", "weights", "", "on", "ours", "memory beside", *(f"{peer}: ratio" for peer in peers)], lines)


def pairs(*details: str) -> Callable[[list[Row]], str]:
    """Return a function that makes a table with a line for each comparison and some of its details."""

    def made(rows: list[Row]) -> str:
        lines = []
        for row in rows:
            more = [row.get(detail) for detail in details]
            cells = [detail_cell(value) for value in more]
            figures = [figure(row["seconds"]), row["baseline"], figure(row["baseline_seconds"]), figure(row["ratio"])]
            lines.append([row["name"], *figures, *cells])
        shown = [detail.replace("_", " ") for detail in details]
        return table(["", "seconds", "peer", "its seconds", "ratio", *shown], lines)

    return made


def detail_cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else figure(value, 4) if isinstance(value, float) else str(value)


def memory(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        sizes = [f"{row[key] / 2**20:,.0f} MiB" for key in ("measured_bytes", "predicted_bytes")]
        over = f"{row['over_dense']:.3f}" if "over_dense" in row else ""
        lines.append([row["name"], row["device"], *sizes, f"{row['relative_error']:+.1%}", row["peak_in"], over])
    return table(["", "on", "measured", "by the plan", "off by", "peak in", "sparse over dense"], lines)


def throughput(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if row["skipped"]:
            lines.append([row["name"], "", "", "", "", row["skipped"].replace("|", "/")])
            continue
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f} GiB"
        lines.append([row["name"], f"{row['tokens_per_second']:,.0f}", mfu, peak, f"{row['last_loss']:.3f}", ""])
    work = ", ".join(f"{key} {rows[0][key]}" for key in ("hidden", "layers", "heads", "vocabulary", "length", "batch"))
    made = table(["", "tokens a second", "MFU", "peak memory", "last loss", "left out because"], lines)
    return f"A LLaMA of {work}.\n\n{made}"


def scale(rows: list[Row]) -> str:
    from tests.benchmarks import scale

    fields = scale.Row.__dataclass_fields__
    return scale.table([scale.Row(**{key: row[key] for key in fields}) for row in rows])


SECTIONS: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "selection": ("Selection and prune events", selection),
    "event": (
        "A prune event on a GPU",
        pairs("numel", "device", "read_passes", "of_ideal", "of_copy_bandwidth", "extra_share"),
    ),
    "masking": (
        "Masks of bytes and of bits",
        pairs("numel", "dtype", "device", "mask_bytes_per_weight", "peer_bytes_per_weight"),
    ),
    "overhead": ("A sparse step", pairs("overhead", "overhead_error", "pairs", "tokens_per_second", "device", "ranks")),
    "demo": ("The demo beside a plain loop", pairs("pairs", "tokens_per_second")),
    "documents": ("A step by document", pairs("cost", "pairs", "hidden", "layers", "length", "batch")),
    "throughput": ("Training throughput", throughput),
    "memory": ("Peak memory of a step", memory),
    "around": ("Around a step", pairs("per_second", "unit", "processes", "extra_bytes", "model_bytes")),
    "compact": ("The compact format", pairs("megabytes_per_second", "bits_per_weight", "baseline_bits_per_weight")),
    "scale": ("What grows with the ranks", scale),
}


def section(name: str, rows: list[Row]) -> str:
    title, made = SECTIONS[name]
    first = rows[0]
    versions = [f"{package} {first[package]}" for package in ("python", *PACKAGES) if package in first]
    where = f"{first['cores']} cores of {first['machine']}" + (f" with one {first['gpu']}" if "gpu" in first else "")
    return f"## {title}\n\n`{first['command']}` on {where}; {', '.join(versions)}.\n\n{made(rows)}\n"


def page(folders: Sequence[Path]) -> str:
    """Return the whole page; sections whose files are missing are left out."""
    parts = [HEAD]
    for name in SECTIONS:
        files = [folder / f"{name}.json" for folder in folders]
        parts += [section(name, json.loads(file.read_text())) for file in files if file.exists()]
    return "\n".join(parts)


def renewed(text: str, folders: Sequence[Path], name: str) -> str:
    """Return the page `text` with the sections of one file's name made anew; all others keep every character.

    Raises:
        ValueError: No folder has the file, or the page has a section of it for more machines than there are files.
    """
    files = [file for folder in folders if (file := folder / f"{name}.json").exists()]
    if not files:
        raise ValueError(f"{name}.json is in none of {', '.join(map(str, folders))}: run the benchmark first.")
    head, *parts = re.split(r"(?m)^(?=## )", text)
    titles = [part.partition("\n")[0].removeprefix("## ") for part in parts]
    title = SECTIONS[name][0]
    if titles.count(title) > len(files):
        raise ValueError(
            f"The page has {titles.count(title)} sections {title!r} for {len(files)} files: give all folders."
        )
    order = [known for known, _ in SECTIONS.values()]
    before = [part for part, own in zip(parts, titles, strict=True) if order.index(own) < order.index(title)]
    after = [part for part, own in zip(parts, titles, strict=True) if order.index(own) > order.index(title)]
    made = [section(name, json.loads(file.read_text())) for file in files]
    return "\n".join(part.rstrip("\n") + "\n" for part in [head, *before, *made, *after])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", default=[RESULTS])
    parser.add_argument("--output", type=Path, default=Path("docs/measured.md"))
    parser.add_argument("--only", choices=SECTIONS, help="make only this file's section anew in the output")
    options = parser.parse_args()
    if options.only:
        options.output.write_text(renewed(options.output.read_text(), options.folders, options.only))
    else:
        options.output.write_text(page(options.folders))
    print(options.output)


if __name__ == "__main__":
    main()
