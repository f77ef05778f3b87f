"""The runs of a law are read from folders, patterns and tables; what is wrong or missing in them is named."""

import pytest

from eval.runs.law.points import read_points
from tests.law_runs import TRUE, series, write_csv, write_run


def test_runs_are_read_from_folders_sweeps_patterns_and_csv_and_count_once(tmp_path):
    for job in ("target=0", "target=0.8"):
        write_run(tmp_path / "sweep" / job)
    (tmp_path / "sweep" / "unfinished").mkdir()
    write_run(tmp_path / "one", run_name=None)
    file = write_csv(series(TRUE)[:2], tmp_path / "more.csv")
    names = [str(tmp_path / "sweep"), str(tmp_path / "sweep" / "target=*"), str(tmp_path / "one")]
    points = read_points(names)
    assert [point.name for point in points.points] == ["target=0", "target=0.8", "one"]
    assert points.loss_name == "heldout_loss"
    assert points.points[0].final_linear_params == 2e5
    assert points.points[0].loss == 3.1
    assert len(read_points([str(file), str(file)]).points) == 2
    assert read_points(names, loss="final_train_loss").points[2].loss == 3.0
    assert points.configurations.tolist() == [0, 0, 0]


def test_a_table_as_the_cards_write_it_is_read(tmp_path):
    file = tmp_path / "table.csv"
    file.write_text(
        "model,linear_params,avg_linear_params,nonzero_linear,sparsity,total_tokens,final_train_loss\n"
        "sparsellm-1b-80p,1.14B,0.45B,0.23B,80.00%,200.4B,2.228\n"
    )
    (point,) = read_points([str(file)]).points
    assert point.name == "sparsellm-1b-80p"
    assert (point.avg_linear_params, point.total_tokens, point.sparsity) == pytest.approx((4.5e8, 2.004e11, 0.8))


def test_sparsity_follows_from_the_linear_parameters(tmp_path):
    file = tmp_path / "runs.csv"
    file.write_text("avg_linear_params,final_linear_params,linear_params,total_tokens,loss\n4e5,2e5,1e6,1e7,3\n")
    assert read_points([str(file)]).points[0].sparsity == pytest.approx(0.8)


HEADER = "avg_linear_params,final_linear_params,total_tokens,loss,sparsity,data"


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([HEADER], "holds no finished run"),
        ([HEADER, "abc,2e5,1e7,3,0.8,"], "line 2 has avg_linear_params=abc, which is not a number"),
        ([HEADER, "4e5,2e5,1e7,nan,0.8,"], "loss=nan, which is not a finite number above 0"),
        ([HEADER, "4e5,2e5,0,3,0.8,"], "total_tokens=0"),
        ([HEADER, "4e5,2e5,1e7,3,1.8,"], "sparsity=1.8, outside"),
        ([HEADER, "4e5,2e5,1e7,3,,"], "is sparse, but nothing says how sparse"),
        ([HEADER, "4e5,,1e7,3,0.8,"], "no figure final_linear_params: give a column nonzero_linear_params or"),
        ([HEADER, "4e5,2e5,1e7,,0.8,"], "none of loss, heldout_loss, final_train_loss in common"),
        ([HEADER, "4e5,2e5,1e7,3,0.8,pydocs", "4e5,2e5,1e7,3,0.8,text"], "trained on pydocs and text"),
    ],
)
def test_a_figure_that_is_wrong_or_missing_is_named(lines, sentence, tmp_path):
    file = tmp_path / "runs.csv"
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=sentence):
        read_points([str(file)])


def test_runs_of_two_tokenizers_are_not_compared(tmp_path):
    names = [str(write_run(tmp_path / "a")), str(write_run(tmp_path / "b", heldout_tokens=250))]
    with pytest.raises(ValueError, match="give runs with one tokenizer"):
        read_points(names)


def test_a_place_that_is_not_there_is_named(tmp_path):
    (tmp_path / "note.txt").write_text("")
    for name, sentence in (("missing", "does not exist"), ("note.txt", "is not a run"), (".", "holds no finished run")):
        with pytest.raises(ValueError, match=sentence):
            read_points([str(tmp_path / name)])
