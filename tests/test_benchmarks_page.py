"""The page of measured figures, made from the files of the benchmarks."""

import json
from pathlib import Path

import pytest

from tests.benchmarks.page import SECTIONS, figure, page, renewed

WHERE = {
    "command": "python -m tests.benchmarks.x",
    "machine": "a processor",
    "cores": 2,
    "python": "3.11",
    "torch": "2",
}
RUN = {"name": "selection, one process", "numel": 1000, "dtype": "float32", "device": "cpu", "threads": 1, "ranks": 1}


def write(folder, name, rows):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps([{**row, **WHERE} for row in rows]))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0832, "0.0832"), (14.861, "14.9"), (179.4, "179"), (7.3e6, "7,300,000"), (1.0061, "1.01"), (0, "0"),
        (9.996, "10.0"), (0.9999, "1.00"), (0.00044, "0.000440"), (-3.21, "-3.21"),
    ],
)  # fmt: skip
def test_figures_have_three_digits_and_no_power_of_ten(value, text):
    assert figure(value) == text


def test_a_selection_is_a_line_and_each_peer_a_column(tmp_path):
    run = {**RUN, "seconds": 0.1, "extra_share": 0.0052}
    rows = [
        {**run, "baseline": "sort", "baseline_seconds": 7.7, "ratio": 77.0},
        {**run, "baseline": "one read pass", "baseline_seconds": 0.01, "ratio": 0.1},
        {**run, "ranks": 2, "baseline": "gather + sort", "baseline_seconds": 11.0, "ratio": 110.0, "extra_share": None},
    ]
    write(tmp_path, "selection", rows)
    lines = page([tmp_path]).splitlines()
    assert lines[-4].endswith("| sort: ratio | one read pass: ratio | gather + sort: ratio |")
    one, two = lines[-2:]
    assert one == (
        "| selection | 1,000 | float32 | cpu, 1 thread | 0.100 s | 0.52% | 77.0 (7.70 s) | 0.100 (0.0100 s) |  |"
    )
    assert two == "| selection | 1,000 | float32 | cpu, 2 ranks | 0.100 s |  |  |  | 110 (11.0 s) |"


def test_a_section_names_command_machine_and_versions_once_for_each_folder(tmp_path):
    row = {"name": "step", "seconds": 2.0, "baseline": "loop", "baseline_seconds": 1.0, "ratio": 0.5, "pairs": 30}
    write(tmp_path / "here", "demo", [row])
    write(tmp_path / "there", "demo", [{**row, "gpu": "a GPU"}])
    text = page([tmp_path / "here", tmp_path / "there"])
    assert "`python -m tests.benchmarks.x` on 2 cores of a processor; python 3.11, torch 2." in text
    assert "`python -m tests.benchmarks.x` on 2 cores of a processor with one a GPU; python 3.11, torch 2." in text
    assert text.count("| step | 2.00 | loop | 1.00 | 0.500 | 30 |  |") == 2


def test_a_variant_that_did_not_run_says_why(tmp_path):
    ran = {"name": "a", "skipped": None, "mfu": 0.551, "peak_bytes": 2**31, "tokens_per_second": 70_000, "last_loss": 2}
    work = {"hidden": 8, "layers": 1, "heads": 2, "vocabulary": 32, "length": 16, "batch": 4}
    write(tmp_path, "throughput", [{**ran, **work}, {"name": "b", "skipped": "ImportError: a | b", **work}])
    assert "A LLaMA of hidden 8, layers 1, heads 2, vocabulary 32, length 16, batch 4." in page([tmp_path])
    assert page([tmp_path]).endswith(
        "| a | 70,000 | 55.1% | 2.0 GiB | 2.000 |  |\n| b |  |  |  |  | ImportError: a / b |\n"
    )


def test_every_file_that_the_benchmarks_write_has_a_section():
    from tests.benchmarks.__main__ import LONG, ON_GPU, QUICK

    assert {benchmark.name for benchmark in (*QUICK, *LONG, *ON_GPU)} == SECTIONS.keys()


MEASURED = Path(__file__).resolve().parents[1] / "docs" / "measured.md"


def test_one_section_is_made_anew_and_the_others_keep_every_character(tmp_path):
    row = {
        "name": "start to the first step",
        "seconds": 9.1,
        "baseline": "torchrun",
        "baseline_seconds": 8.4,
        "ratio": 0.923,
    }
    write(tmp_path, "around", [row])
    before = MEASURED.read_text()
    after = renewed(before, [tmp_path], "around")
    start, end = before.index("## Around a step"), before.index("## The compact format")
    assert after.startswith(before[:start])
    assert after.endswith(before[end:])
    assert after[start : len(after) - len(before[end:])].endswith(
        "| start to the first step | 9.10 | torchrun | 8.40 | 0.923 |  |  |  |  |  |\n\n"
    )
    assert renewed(after, [tmp_path], "around") == after


def test_a_new_section_takes_its_place_and_one_of_two_machines_is_not_lost(tmp_path):
    row = {"name": "a", "seconds": 2.0, "baseline": "b", "baseline_seconds": 1.0, "ratio": 0.5}
    write(tmp_path, "around", [row])
    write(tmp_path, "masking", [row])
    write(tmp_path, "demo", [row])
    without = page([tmp_path]).replace("## The demo beside a plain loop", "## Around a step")
    assert renewed(page([tmp_path]), [tmp_path], "demo") == page([tmp_path])
    with pytest.raises(ValueError, match="has 2 sections 'Around a step' for 1 files: give all folders"):
        renewed(without, [tmp_path], "around")
    with pytest.raises(ValueError, match=r"scale\.json is in none of .*: run the benchmark first"):
        renewed(without, [tmp_path], "scale")
    (tmp_path / "demo.json").unlink()
    short = page([tmp_path])
    write(tmp_path, "demo", [row])
    assert renewed(short, [tmp_path], "demo") == page([tmp_path])
