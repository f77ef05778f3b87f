"""The command eval.scaling_law predicts runs, prints JSON alone, draws a figure and names mistakes."""

import json

import numpy as np
import pytest

from conf.schema import ScalingLawConfig
from conf.values import as_typed
from eval.runs.law.fit import bootstrap, fit_law
from eval.runs.law.law import Law
from eval.runs.law.points import read_points
from eval.runs.law.report import interval
from eval.scaling_law import main
from launch.plan.request import read_request
from tests.commands import run_command
from tests.law_runs import TRUE, json_of, noisy, series, write_csv
from train.plan.run import plan_run
from train.plan.series import table_row


def test_a_planned_run_is_predicted_at_the_plans_average_size_and_tokens(tmp_path, capsys):
    file = write_csv(series(TRUE, noise=0, sizes=(1e8, 1e9, 1e10), tokens=(1e10, 1e11, 1e12)), tmp_path / "runs.csv")
    asked = ["predict.experiment=sparsellm-1b-80p", "predict.overrides=[sparsity.target=0.6]"]
    figures = json_of(capsys, f"runs={file}", "num_bootstrap=20", "target_loss=2.1", *asked)
    (run,) = read_request(["experiment=sparsellm-1b-80p", "sparsity.target=0.6"]).runs
    row = table_row(run, plan_run(run, 1))
    predict = figures["predict"]
    assert predict["avg_linear_params"] == row["avg_linear_params"]
    assert predict["total_tokens"] == row["total_tokens_true"]
    assert predict["loss"] == pytest.approx(
        float(TRUE.loss(row["avg_linear_params"], row["total_tokens_true"])), rel=1e-4
    )
    assert predict["outside_the_runs"] == []
    params, tokens = TRUE.cheapest(2.1)
    cheapest = figures["cheapest"]
    assert (cheapest["avg_linear_params"], cheapest["total_tokens"]) == pytest.approx((params, tokens), rel=1e-2)
    assert cheapest["flops"] == pytest.approx(6 * params * tokens, rel=1e-2)


def test_a_law_without_tokens_predicts_at_its_own_token_count_only(tmp_path, capsys):
    law = Law.of(A=300, alpha=0.34, E=2.0)
    file = write_csv(series(law, sizes=(1e6, 4e6), tokens=(1e7,), noise=0), tmp_path / "runs.csv")
    asked = [f"runs={file}", "form=n", "num_bootstrap=20", "predict.avg_linear_params=9e6"]
    predict = json_of(capsys, *asked, "predict.total_tokens=1e7")["predict"]
    assert predict["loss"] == pytest.approx(float(law.loss(9e6, 1.0)), rel=1e-3)
    assert predict["outside_the_runs"] == ["N"]
    with pytest.raises(SystemExit):
        main([*asked, "predict.total_tokens=2e7", "figure=null"])
    assert "form=n is valid for runs on 10.00M tokens, not on 20.00M" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "runs=[] names nothing"),
        (["runs=x", "form=dn"], "form=dn is not known: choose one of nd, n, power"),
        (["runs=x", "confidence=95"], "confidence=95.0 is outside (0, 1)"),
        (["runs=x", "predict.total_tokens=3"], "needs both predict.avg_linear_params and predict.total_tokens"),
        (["runs=x", "predict.experiment=demo", "predict.total_tokens=3"], "already says size and tokens"),
        (["runs=x", "predict.overrides=[a=1]"], "changes an experiment: name it"),
        (["runs=no-such-folder"], "runs=no-such-folder does not exist"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    ("argument", "quoted"),
    [
        ("runs=runs/a", "runs=[runs/a]"),
        ("runs=a/target=0.8,b*", "runs=['a/target=0.8',b*]"),
        ("runs=[a, b=1]", "runs=[a,'b=1']"),
        ("runs=['a,b']", "runs=['a,b']"),
        ("predict.overrides=[sparsity.target=0.6]", "predict.overrides=['sparsity.target=0.6']"),
        ("form=n", "form=n"),
    ],
)
def test_paths_with_equals_signs_need_no_quotes(argument, quoted):
    assert as_typed(argument, ScalingLawConfig) == quoted


def test_the_command_writes_json_alone_and_a_figure(tmp_path):
    file = write_csv(series(TRUE), tmp_path / "runs.csv")
    run = run_command(["eval.scaling_law", f"runs={file}", "format=json", "num_bootstrap=20"], cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout)
    assert figures["num_runs"] == len(figures["points"]) == 45
    assert set(figures["average"]["intervals"]) == {"E", "A", "alpha", "B", "beta"}
    assert (tmp_path / "scaling_law.png").stat().st_size > 10_000


def test_runs_of_one_trunk_are_drawn_together(tmp_path):

    for number, (size, steps) in enumerate((size, steps) for size in (1e6, 2e6, 4e6, 8e6, 16e6) for steps in (1, 2, 4)):
        summary = {
            "avg_linear_params": size, "nonzero_linear_params": size, "linear_params": size, "total_tokens": 1e8 * steps,
            "heldout_loss": float(TRUE.loss(np.array([size]), np.array([1e8 * steps]))[0]),
            "branch": {"run": "trunk", "step": 1, "trunk": f"/runs/trunk-{size:g}"},
        }  # fmt: skip
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "summary.json").write_text(json.dumps(summary))
    points = read_points([str(tmp_path)])
    trunks = points.trunks
    assert len(set(trunks.tolist())) == 5
    assert all(len(set(trunks[points.column("avg_linear_params") == size].tolist())) == 1 for size in (1e6, 16e6))
    params, tokens = points.column("avg_linear_params"), points.column("total_tokens")
    fit = fit_law(params, tokens, noisy(TRUE, params, tokens, 0.003), "nd")
    together, apart = (interval(bootstrap(fit, 60, 0, groups), lambda law: law.alpha, 0.9) for groups in (trunks, None))
    assert together != apart


def test_a_report_says_what_a_shared_trunk_does_to_its_intervals():
    from eval.runs.law.text import _trunks

    assert _trunks({"num_runs": 6, "num_trunks": 6, "resampled": "points"}) == []
    assert "whole trunks are drawn" in _trunks({"num_runs": 15, "num_trunks": 5, "resampled": "trunks"})[0]
    assert "too narrow" in _trunks({"num_runs": 6, "num_trunks": 1, "resampled": "points"})[0]
