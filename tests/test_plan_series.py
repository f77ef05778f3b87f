"""The lines of the series' table, computed from the experiments of its eight models, equal the published ones."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.plan.request import read_request
from sparsity.common.text import count_text, half_up, power_text
from train.plan.run import plan_run
from train.plan.series import COLUMNS, card_batch_tokens, card_cells, table_row
from train.record.read import measured_loss

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference" / "table.csv"
MEASURED = ("final_train_loss", "final_train_loss_std", "perplexity")
CARD_TABLE = """\
sparsellm-1b-20p,1.20B,1.14B,1.02B,0.91B,20.00%,8M,3e-4,89.6B
sparsellm-1b-40p,1.20B,1.14B,0.87B,0.68B,40.00%,8M,3e-4,104.4B
sparsellm-1b-60p,1.20B,1.14B,0.69B,0.46B,60.00%,8M,3e-4,131.0B
sparsellm-1b-80p,1.20B,1.14B,0.45B,0.23B,80.00%,8M,3e-4,200.4B
sparsellm-1b-20p-small-dense,1.07B,1.01B,1.01B,1.01B,0.00%,8M,3e-4,89.6B
sparsellm-1b-40p-small-dense,0.88B,0.82B,0.82B,0.82B,0.00%,8M,3e-4,104.4B
sparsellm-1b-60p-small-dense,0.70B,0.65B,0.65B,0.65B,0.00%,8M,3e-4,131.0B
sparsellm-1b-80p-small-dense,0.46B,0.42B,0.42B,0.42B,0.00%,8M,3e-4,200.4B
"""


@pytest.fixture(scope="module")
def rows():
    request = read_request(["runs_dir=no-such-folder"])
    return {row["model"]: row for row in (table_row(config, plan_run(config, 64)) for config in request.runs)}


def test_every_computed_cell_equals_the_cards(rows):
    cells = [",".join(list(card_cells(row).values())[:9]) for row in rows.values()]
    assert cells == CARD_TABLE.splitlines()


def test_every_computed_cell_equals_the_reference_table(rows):
    if not REFERENCE.exists():
        pytest.skip("the shared folder with the reference table is not beside this checkout")
    with REFERENCE.open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS
    assert [line["model"] for line in lines] == list(rows)
    for line in lines:
        cells = card_cells(rows[line["model"]])
        assert {key: cells[key] for key in COLUMNS if key not in MEASURED} == {
            key: line[key] for key in COLUMNS if key not in MEASURED
        }


@pytest.mark.parametrize(
    ("name", "steps", "mean", "by_the_card", "dense_steps"),
    [
        ("sparsellm-1b-20p", 11200, "0.8928", "0.8919", "9998.8"),
        ("sparsellm-1b-40p", 13050, "0.7660", "0.7650", "9995.7"),
        ("sparsellm-1b-60p", 16375, "0.6096", "0.6083", "9982.1"),
        ("sparsellm-1b-80p", 25050, "0.3992", "0.3984", "10000.2"),
    ],
)
def test_average_density_is_the_mean_over_steps_and_beside_it_the_cards(
    rows, name, steps, mean, by_the_card, dense_steps
):
    row = rows[name]
    assert half_up(row["average_density"], 4) == mean
    assert half_up(row["average_density_card"], 4) == by_the_card
    assert half_up(row["dense_equivalent_steps"], 1) == dense_steps
    assert row["total_tokens"] == steps * 8_000_000
    assert row["total_tokens_true"] == steps * 8_388_608


def test_json_rows_hold_exact_numbers(rows):
    row = rows["sparsellm-1b-80p"]
    assert (row["total_params"], row["linear_params"]) == (1_204_881_408, 1_139_277_824)
    assert row["nonzero_linear"] == 1_139_277_824 - round(0.8 * 1_139_277_824)
    assert row["avg_linear_params"] == pytest.approx(row["average_density"] * 1_139_277_824, rel=1e-12)
    assert (row["sparsity"], row["lr"], row["batch_tokens"], row["batch_tokens_true"]) == (
        0.8,
        3e-4,
        8_000_000,
        8_388_608,
    )
    assert [row[key] for key in MEASURED] == [None, None, None]


def test_dense_rows_keep_every_weight(rows):
    for width, linear in ((20, 1_005_158_400), (40, 819_707_904), (60, 653_131_776), (80, 417_447_936)):
        row = rows[f"sparsellm-1b-{width}p-small-dense"]
        assert row["linear_params"] == row["avg_linear_params"] == row["nonzero_linear"] == linear
        assert row["average_density"] == row["average_density_card"] == 1.0


def test_loss_is_filled_in_only_from_the_very_run(tmp_path):
    config = read_request(["experiment=demo", f"runs_dir={tmp_path}"]).runs[0]
    plan = plan_run(config, 2)
    plan.run_dir.mkdir()
    summary = {"steps": plan.num_steps, "total_tokens": plan.total_tokens, "linear_params": plan.counts.linear}
    summary |= {"final_train_loss": 3.5, "final_train_loss_std": 0.1, "perplexity": 20.0}
    (plan.run_dir / "summary.json").write_text(json.dumps(summary))
    assert measured_loss(plan) == {"final_train_loss": 3.5, "final_train_loss_std": 0.1}
    (plan.run_dir / "summary.json").write_text(json.dumps({**summary, "steps": 5}))
    assert measured_loss(plan) == {"final_train_loss": None, "final_train_loss_std": None}


@pytest.mark.parametrize(("value", "text"), [(0.125, "0.13"), (0.375, "0.38"), (20.0, "20.00"), (0.124, "0.12")])
def test_halves_are_rounded_up(value, text):
    assert half_up(value, 2) == text


def test_numbers_are_shortened_as_on_the_cards():
    assert [count_text(n) for n in (875_060_928, 57_940_480, 626_688)] == ["0.88B", "57.94M", "626.69K"]
    assert [power_text(x) for x in (3e-4, 6.4e-3, 1.0)] == ["3e-4", "6.4e-3", "1e0"]
    assert [card_batch_tokens(n) for n in (8_388_608, 1_048_576, 524_288)] == [8_000_000, 1_000_000, 524_288]


def run_plan(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).resolve().parents[1])
    code = f"import sys; sys.path.insert(0, {root!r}); from launch.plan.__main__ import main; main(sys.argv[1:]);"
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def test_json_is_alone_on_stdout_and_nothing_is_written(tmp_path):
    done = run_plan("format=json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [tuple(row)[: len(COLUMNS)] for row in rows] == [COLUMNS] * 8
    assert list(tmp_path.iterdir()) == []


def test_text_fits_into_100_columns(tmp_path):
    for arguments in ([], ["experiment=sparsellm-1b-80p", "devices=64", "figure=null"]):
        done = run_plan(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert max(len(line) for line in done.stdout.splitlines()) <= 100


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("experiment=nope", "experiment=nope is not known"),
        ("trainer.max_stps=3", "did you mean trainer.max_steps?"),
        ("seed=1", "did you mean trainer.seed?"),
        ("trainer.max_steps=x", "max_steps"),
        ("devcies=3", "did you mean devices?"),
        ("devices=0", "devices=0"),
        ("device_memory=12parsecs", "12parsecs"),
        ("device=MI300X", "device=MI300X is not in the table of GPUs: choose one of H100 PCIE, H100 NVL, H100, "),
        ("batch_size=25", "batch_size=25"),
        ("nonsense", "nonsense"),
    ],
)
def test_what_a_user_got_wrong_is_one_line(tmp_path, capsys, monkeypatch, argument, named):
    from conf.cli import USER_ERROR_CODE
    from launch.plan.__main__ import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["experiment=demo", argument] if not argument.startswith("experiment") else [argument])
    shown = capsys.readouterr()
    assert stop.value.code == USER_ERROR_CODE
    assert shown.out == ""
    assert named in shown.err
    assert len(shown.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
