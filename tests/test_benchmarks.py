"""The benchmarks on the smallest inputs: the contents of their files, and when a goal is missed. Times are not tested."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest

from tests.benchmarks import __main__ as everything
from tests.benchmarks import (
    around,
    compact,
    demo,
    event,
    masking,
    overhead,
    peers,
    scale,
    selection,
)
from tests.benchmarks.common import EXACT_MEMORY, Comparison, can_compile, in_process, peak_beyond, publish

CONTRACT = {"name", "seconds", "baseline", "baseline_seconds", "ratio"}


@pytest.fixture
def in_this_process(monkeypatch) -> None:
    """Measure in this process instead of separate ones, which make figures exact: here nobody reads the figures."""

    def call(module: str, function: str, *arguments: object, **environment: str) -> Any:
        return json.loads(json.dumps(getattr(import_module(module), function)(*json.loads(json.dumps(arguments)))))

    for benchmark in (selection, masking, compact):
        monkeypatch.setattr(benchmark, "in_process", call)


@pytest.mark.usefixtures("in_this_process")
def test_the_selection_benchmark_writes_what_the_contract_names(tmp_path, capsys):
    publish(selection.measure([20_000], sparsity=0.8, rounds=1), tmp_path / "selection.json", ["extra_bytes"])
    rows = json.loads((tmp_path / "selection.json").read_text())
    alone = ["global_unstructured", "topk", "kthvalue", "sort"]
    ranks = ["global_unstructured, one process", "gather + kthvalue", "gather + sort", "one read pass"]
    baselines = [*alone, *["compiled passes"] * can_compile("cpu"), "one read pass", *alone, "one read pass"]
    baselines += ["one read pass", *["one read pass", *ranks] * 2]
    assert [row["baseline"] for row in rows if row["device"] == "cpu"] == baselines
    for row in rows:
        assert row.keys() >= CONTRACT | {"numel", "threads", "ranks", "machine", "torch"}
        assert row["ratio"] == row["baseline_seconds"] / row["seconds"] > 0
    assert "gather + kthvalue" in capsys.readouterr().out


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_masking_benchmark_compares_bytes_with_bits_and_torchs_ways(tmp_path, dtype):
    publish(masking.compare(20_003, rounds=1, device="cpu", dtype=dtype), tmp_path / "masking.json")
    rows = json.loads((tmp_path / "masking.json").read_text())
    assert [row["baseline"] for row in rows] == ["bits", "where", "masked_fill", "multiply", "one read pass"]
    assert [row["peer_bytes_per_weight"] for row in rows] == [0.125, 1, 2, 1, None]
    assert all(row.keys() >= CONTRACT and row["mask_bytes_per_weight"] == 1 for row in rows)


@pytest.mark.timeout(900)
def test_the_event_benchmark_rehearses_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "tests.benchmarks.event", "--rehearse", "--output", str(tmp_path / "event.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "event.json").read_text())
    names = {row["name"] for row in rows}
    assert {"event to a density of 0.20", "selection at 0.20", "event", "selection"} <= names
    assert {"name", "seconds", "baseline", "baseline_seconds", "ratio"} <= rows[0].keys()
    assert ("collect at 0.20" in names) == ("masking gradients of a step (ours)" in names) == bool(find_spec("triton"))


def test_the_event_benchmark_misses_its_goals_past_their_limits():
    rows = [
        Comparison("an event", 1.0, "ideal", 1.0, {"of_ideal": 1.31, "extra_share": 0.009}),
        Comparison("selection", 1.0, "one read pass", 1.0, {"read_passes": 2.9}),
        Comparison("masking gradients of a step (ours)", 0.0024, "a copy", 1.0),
        Comparison("masking gradients of a step", 1.0, "a copy", 1.0),
    ]
    assert event.missed_goals(rows) == [
        "an event: of_ideal is 1.31, the goal is 1.3.",
        "masking gradients of a step (ours): 2.40 ms, the goal is 2.30 ms.",
    ]


def test_a_way_of_masking_that_leaves_other_gradients_is_found_out(monkeypatch):
    monkeypatch.setattr(masking, "by_bits", lambda gradient, bits: None)
    with pytest.raises(AssertionError, match="bits leaves other gradients"):
        masking.time_masking(20_003, 1, "cpu", "float32")


def peak_after_as_much_was_freed() -> int | None:
    """Measure 20 MB of small pieces, after as many were freed below one that stays; a separate process runs this."""
    pieces = [bytearray(20_000) for _ in range(1_001)]
    del pieces[:-1]
    return peak_beyond(lambda: [bytearray(20_000) for _ in range(1_000)])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is asked to give memory back")
def test_memory_that_malloc_kept_hides_nothing():
    found = in_process("tests.test_benchmarks", "peak_after_as_much_was_freed", **EXACT_MEMORY)
    if found is None:
        pytest.skip("this system does not let a process forget its peak")
    assert found > 18_000_000


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_a_selection_takes_less_than_a_hundredth_of_the_weights_memory(dtype, itemsize):
    numel = 100_000_000
    extra = in_process("tests.benchmarks.selection_times", "extra_bytes", numel, 0.8, "cpu", dtype, [], **EXACT_MEMORY)
    if extra["prune_smallest_"] is None:
        pytest.skip("this system does not let a process forget its peak")
    assert 0 < extra["prune_smallest_"] < numel * itemsize / 100


@pytest.mark.slow
def test_the_overhead_benchmark_writes_what_the_contract_names(tmp_path):
    small = ["model.hidden_size=32", "model.num_hidden_layers=1", "model.max_position_embeddings=16"]
    publish(overhead.measure(2, [*small, "trainer.per_device_train_batch_size=2"]), tmp_path / "overhead.json")
    step, event = json.loads((tmp_path / "overhead.json").read_text())
    assert (step["name"], step["baseline"], step["pairs"]) == ("sparse step", "dense step", 2)
    assert (event["name"], event["events"]) == ("prune event", 4)
    for row in (step, event):
        assert row.keys() >= CONTRACT
        assert row["ratio"] == row["baseline_seconds"] / row["seconds"] > 0
    assert step["overhead"] > 0


def test_a_sparse_step_is_compared_with_the_dense_ones_around_it():
    step, event = overhead.compare(
        dense=[1.0, 3.0, 1.0], sparse=[2.2, 2.0, 9.0], events=[9.0, 0.5], details={"batch_tokens": 210}
    )
    assert step.details["overhead"] == pytest.approx(1.05)
    assert step.details["tokens_per_second"] == pytest.approx(200)
    assert (event.seconds, event.baseline_seconds) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("name", "device", "baseline", "seconds", "is_missed"),
    [
        ("selection", "cpu", "global_unstructured", 0.20, False),
        ("selection", "cpu", "global_unstructured", 0.21, True),
        ("selection", "cuda", "one read pass", 30.0, False),
        ("selection", "cuda", "one read pass", 31.0, True),
        ("prune event", "cuda", "one read pass", 0.010, False),
        ("prune event", "cuda", "one read pass", 0.011, True),
    ],
)
def test_selection_misses_its_goals_past_their_limits(name, device, baseline, seconds, is_missed):
    details = {"device": device, "numel": 50_000_000, "dtype": "float32"}
    assert bool(selection.missed_goals([Comparison(name, seconds, baseline, 10.0, details)])) == is_missed


@pytest.mark.parametrize(("share", "num_missed"), [(0.01, 0), (0.011, 1), (None, 0)])
def test_selection_misses_its_goal_of_memory_above_one_percent(share, num_missed):
    details = {"device": "cpu", "numel": 50_000_000, "dtype": "float32", "extra_share": share}
    assert len(selection.missed_goals([Comparison("selection", 1.0, "one read pass", 0.1, details)])) == num_missed


@pytest.mark.parametrize(("ratio", "num_missed"), [(1.01, 0), (1.011, 1)])
def test_overhead_misses_its_goal_above_one_percent(ratio, num_missed):
    assert (
        len(overhead.missed_goals([Comparison("sparse step", 1.0, "dense step", 1.0, {"overhead": ratio})]))
        == num_missed
    )


@pytest.mark.parametrize("numel", [999, 200_000, 2_000_000])
def test_the_weights_are_as_many_as_asked_for(numel):
    assert sum(weight.numel() for weight in peers.make_weights(numel)) == numel


@pytest.mark.usefixtures("in_this_process")
def test_the_compact_benchmark_writes_what_the_contract_names(tmp_path):
    publish(compact.measure(numel=80_000, sparsity=0.8, rounds=1), tmp_path / "compact.json")
    rows = json.loads((tmp_path / "compact.json").read_text())
    assert {row["name"] for row in rows} == {
        f"{action}, {dtype}" for action in ("compact", "expand", "check") for dtype in ("bfloat16", "float32")
    }
    for row in rows:
        assert row.keys() >= CONTRACT | {"megabytes_per_second", "bits_per_weight", "extra_bytes", "machine"}
        assert row["ratio"] == row["baseline_seconds"] / row["seconds"] > 0


@pytest.mark.parametrize(
    ("rate", "bits", "extra_bytes", "num_missed"), [(300, 4.25, 99, 0), (299, 4.25, None, 1), (299, 4.26, 101, 3)]
)
def test_compact_misses_its_goals_below_300_megabytes_a_second_above_4_25_bits_or_a_tensor(
    rate, bits, extra_bytes, num_missed
):
    details = {"megabytes_per_second": rate, "bits_per_weight": bits, "dtype": "bfloat16"}
    row = Comparison("compact", 1.0, "copy", 1.0, {**details, "extra_bytes": extra_bytes, "tensor_bytes": 100})
    assert len(compact.missed_goals([row])) == num_missed


def test_the_demo_is_compared_with_the_loop_s_steps_around_it():
    found = demo.compare(run=[2.2, 2.0, 9.0], loop=[1.0, 3.0, 1.0], details={"batch_tokens": 100})
    assert found.ratio == pytest.approx(1 / 1.05)
    assert found.details["tokens_per_second"] == pytest.approx(100 / 1.05)


@pytest.mark.parametrize(("seconds", "num_missed"), [(1.05, 0), (1.06, 1)])
def test_the_demo_misses_its_goal_below_95_percent_of_the_loop(seconds, num_missed):
    assert len(demo.missed_goals([Comparison("step", seconds, "loop", 1.0)])) == num_missed


@pytest.mark.parametrize(("seconds", "num_missed"), [(0.6, 0), (0.61, 1)])
def test_the_launcher_misses_its_goal_above_six_tenths_of_a_second(seconds, num_missed):
    assert len(around.missed_goals([Comparison("import", seconds, "python", 0.1)])) == num_missed


def test_scoring_is_compared_on_tokens_that_the_model_has():
    row = around.scoring(scale=0.01, rounds=1).row()
    assert (row["unit"], row["baseline"]) == ("tokens", "forward and cross entropy")
    assert row["ratio"] > 0


@pytest.mark.parametrize("shard_ranks", [64, 16])
def test_a_rank_of_a_fake_world_holds_its_share_of_its_copy(shard_ranks):
    tiny = {
        "name": "tiny", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 128,
    }  # fmt: skip
    found = in_process(scale.MODULE, "shard_in_fake_world", tiny, 64, shard_ranks)
    assert (found["num_shards"], found["local_weights"]) == (15, (2 * 16 * 64 * 64 + 128 * 64) // shard_ranks)


def test_scale_shows_copies_where_a_world_holds_several(tmp_path):
    constants = scale.Constants(per_weight=1e-9, per_shard=1e-5, per_block=1e-6)
    found = {"local_weights": 1000, "num_shards": 7, "sharding_seconds": 0.5, "bookkeeping_seconds": 0.1}
    rows = [
        scale.row("tiny", 10_000, world_size, constants, found, hsdp, (1e-5, 25e9))
        for world_size, hsdp in ((64, None), (512, 0.25))
    ]
    lines = [line.strip("| ").split(" | ") for line in scale.table(rows).splitlines()]
    column = lines[0].index("sharding, copies of 64 ranks")
    assert [line[column - 1 : column + 1] for line in lines[2:]] == [["0.50 s", ""], ["0.50 s", "0.25 s"]]
    assert len({len(line) for line in (lines[0], *lines[2:])}) == 1
    scale.draw(rows, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 10_000


def test_an_event_s_traffic_grows_by_one_count_a_rank():
    assert scale.event_traffic(113, 4096)[1] - scale.event_traffic(113, 2)[1] == 8 * 4094
    assert scale.event_traffic(113, 4096)[0] == scale.event_traffic(113, 2)[0]


def test_a_peer_that_memory_is_not_enough_for_is_named_and_left_out(capsys):
    assert selection.that_fit({"small": 1e-9, "large": 1e9}, 10**6, "cpu") == ["small"]
    assert (
        "large of 1,000,000 weights on cpu is left out: it takes 1000000000 bytes a weight." in capsys.readouterr().out
    )


def test_what_a_peer_took_counts_the_weights_and_masks_as_well():
    row = Comparison("", 1.0, "sort", 1.0, {"numel": 100, "dtype": "bfloat16", "baseline_extra_bytes": 400})
    assert selection.bytes_per_weight([row]) == {"sort": 4 + 2 + 1}


def test_each_benchmark_runs_once_in_its_longest_form():
    arguments = {benchmark.name: benchmark.arguments for benchmark in everything.chosen(True, False, True)}
    assert arguments["selection"] == ("--large",)
    assert arguments.keys() == {
        benchmark.name for benchmark in (*everything.QUICK, *everything.LONG, *everything.ON_GPU)
    }
    assert "throughput" not in {benchmark.name for benchmark in everything.chosen(True, False, False)}
    assert everything.chosen(False, True, True) == list(everything.ON_GPU)


def test_a_benchmark_is_left_out_or_reported_and_never_ends_the_others():
    assert everything.run(everything.Benchmark("x", needs=("no_such",))) == "left out: no_such not installed"
    assert everything.run(everything.Benchmark("no_such_benchmark")).startswith("FAILED OR MISSED A GOAL in ")
