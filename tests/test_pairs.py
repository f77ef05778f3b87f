"""Sparse runs are compared with their twins, seed by seed, and with the dense curve at exactly their size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from conf.compose import composed
from eval.runs.pairs.comparison import compare, curve_loss
from eval.runs.pairs.text import cells, markdown, usual_settings
from eval.runs.trials import read_trials
from tests.commands import run_command


def write_run(folder: Path, loss: float, average: float, *overrides: str, sparse: bool = True) -> None:
    """Write the config and summary of a finished run, as training does."""
    config = composed("train", ["experiment=journey", f"run_name={folder.name}", *overrides])
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
    summary = {
        "run_name": folder.name, "data": "pydocs", "avg_linear_params": average, "nonzero_linear_params": average / 2,
        "total_tokens": 1000, "heldout_loss": loss, "bits_per_byte": loss / 2, "heldout_tokens": 100,
        "heldout_bytes": 300, "prune_start_step": 5 if sparse else None,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def sweep(tmp_path):
    """Write pairs at 80 % with three seeds and at 40 % with one, and a dense run with another learning rate."""
    for seed, (sparse, twin) in enumerate(((3.10, 3.00), (3.16, 3.02), (3.11, 3.04))):
        write_run(tmp_path / f"s80-{seed}", sparse, 100.0, "sparsity.target=0.8", f"trainer.seed={seed}")
        write_run(
            tmp_path / f"t80-{seed}", twin, 110.0, "sparsity.target=0.8", "model.match=average",
            f"trainer.seed={seed}", sparse=False,
        )  # fmt: skip
    write_run(tmp_path / "s40", 2.9, 400.0, "sparsity.target=0.4")
    write_run(tmp_path / "t40", 2.8, 420.0, "sparsity.target=0.4", "model.match=average", sparse=False)
    write_run(tmp_path / "t20", 2.7, 600.0, "sparsity.target=0.2", "model.match=average", sparse=False)
    write_run(
        tmp_path / "other-lr", 2.0, 300.0, "sparsity.target=0.4", "model.match=average", "optim.learning_rate=1",
        sparse=False,
    )  # fmt: skip
    return tmp_path


def test_gap_to_the_twin_is_the_mean_of_each_seeds_difference(sweep):
    most = compare(read_trials([str(sweep)]))[-1]
    assert most.settings == {"sparsity.target": 0.8}
    assert most.twin_gap is not None
    assert most.twin_gap.num == 3
    assert most.twin_gap.mean == pytest.approx((0.10 + 0.14 + 0.07) / 3)
    assert most.twin_gap.std == pytest.approx(0.0351188, abs=1e-6)
    assert most.loss.mean == pytest.approx((3.10 + 3.16 + 3.11) / 3)


def test_a_twin_fits_all_sparse_runs_that_have_its_average_whatever_ranks_their_weights(sweep):
    write_run(sweep / "random", 3.5, 100.0, "sparsity.target=0.8", "sparsity.score=random", "eval.every=10")
    found = {comparison.settings["sparsity.score"]: comparison for comparison in compare(read_trials([str(sweep)]))}
    assert found["random"].twin_gap is not None
    assert found["random"].twin_gap.mean == pytest.approx(0.5)


def test_a_single_seed_has_no_spread(sweep):
    least = compare(read_trials([str(sweep)]))[0]
    assert least.settings == {"sparsity.target": 0.4}
    assert least.twin_gap is not None
    assert (least.twin_gap.num, least.twin_gap.std) == (1, None)
    assert cells(least, {})[8] == "+0.1000"


def test_a_name_leaves_out_what_is_as_usual_but_never_the_first_key(sweep):
    write_run(sweep / "late", 3.3, 110.0, "sparsity.target=0.8", "sparsity.window={start:0.5,end:1}")
    comparisons = compare(read_trials([str(sweep)]))
    usual = usual_settings(comparisons)
    assert usual == {"sparsity.window.start": 0.25, "sparsity.window.end": 0.75}
    names = [cells(comparison, usual)[0] for comparison in comparisons]
    assert sorted(names) == ["target=0.4", "target=0.8", "target=0.8, window.start=0.5, window.end=1.0"]
    assert "says otherwise: window.start=0.25, window.end=0.75." in markdown(comparisons)


def test_dense_curve_is_read_at_n_bar_and_leaves_out_other_recipes(sweep):
    least, most = compare(read_trials([str(sweep)]))
    share = math.log(400 / 110) / math.log(420 / 110)
    expected = math.exp((1 - share) * math.log(3.02) + share * math.log(2.8))
    assert least.curve_loss == pytest.approx(expected)
    assert least.curve_gap == pytest.approx(2.9 - expected)
    assert most.curve_loss is None, "100 parameters lie below every dense run"


def test_curve_goes_through_the_dense_runs(sweep):
    dense = [
        run for run in read_trials([str(sweep)]) if not run.is_sparse and run.settings["trainer.learning_rate"] < 1
    ]
    assert curve_loss(dense, 420.0) == pytest.approx(2.8)
    assert curve_loss(dense, 601.0) is None


def test_command_prints_a_table_and_draws_it(sweep):
    done = run_command(["eval.pairs", f"runs={sweep}", f"figure={sweep}/pairs.png"])
    assert done.returncode == 0, done.stderr
    assert "| target=0.8 | 3     |" in done.stdout
    assert "+0.1033 ± 0.0351" in done.stdout
    assert (sweep / "pairs.png").stat().st_size > 10_000
    figures = json.loads(run_command(["eval.pairs", f"runs={sweep}", "figure=null", "format=json"]).stdout)
    assert [row["settings"] for row in figures] == [{"sparsity.target": 0.4}, {"sparsity.target": 0.8}]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["s40"], "all sparse"),
        (["t40", "t20"], "all dense"),
        (["nothing"], "does not exist"),
    ],
)
def test_what_cannot_be_compared_is_refused(sweep, names, words):
    with pytest.raises(ValueError, match=words):
        compare(read_trials([str(sweep / name) for name in names]))


def test_a_run_without_its_config_is_refused(sweep):
    (sweep / "s40" / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"no config\.yaml beside it"):
        read_trials([str(sweep)])


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"heldout_loss": None}, r"s80-1/summary\.json has no figure heldout_loss: leave this run out"),
        ({"heldout_loss": math.nan}, "has heldout_loss=nan, which is not a finite number above 0"),
        ({"bits_per_byte": "many"}, "has bits_per_byte=many, which is not a number"),
        ({"avg_linear_params": 0}, "has avg_linear_params=0, which is not a finite number above 0"),
    ],
)
def test_a_run_without_its_figures_is_refused_by_name(sweep, figures, words):
    file = sweep / "s80-1" / "summary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **figures}))
    with pytest.raises(ValueError, match=words):
        read_trials([str(sweep)])


@pytest.mark.parametrize(
    "text", ["a: [", "another: version\n", "- 1\n- 2\n", "words", "", "trainer: {seed: 1}\n", "\x00"]
)
def test_a_config_that_is_garbled_or_of_another_version_is_refused_by_name(sweep, text):
    (sweep / "s40" / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"s40/config\.yaml is garbled or from another version: leave this run out"):
        read_trials([str(sweep)])
