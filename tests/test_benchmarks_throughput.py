"""The benchmarks of training steps on the smallest models: variants that train alike, and reasons for those left out."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from tests.benchmarks import documents, throughput
from tests.distributed import run_ranks


def test_the_throughput_of_the_1b_counts_the_flops_of_the_plan():
    assert throughput.Workload().flops_per_token() == pytest.approx(7.64e9, rel=1e-3)


def test_a_variant_that_cannot_run_is_a_result_with_the_reason():
    work = throughput.Workload(hidden=16, layers=1, heads=2, vocabulary=32, length=8, batch=2, steps=1)
    missing = throughput.Variant("none", attention="flash_attention_3", compiled=False)
    assert throughput.measure(work, missing, "cpu", 1.0).skipped
    found = throughput.measure(work, throughput.Variant("chunked", loss="chunked", compiled=False), "cpu", 1.0)
    plain = throughput.measure(work, throughput.Variant("plain", compiled=False), "cpu", 1.0)
    by_document = throughput.measure(work, throughput.Variant("", attention="document", compiled=False), "cpu", 1.0)
    assert by_document.skipped is None
    assert (found.skipped, plain.skipped) == (None, None)
    assert found.last_loss == pytest.approx(plain.last_loss, rel=1e-3)
    assert found.tokens_per_second > 0


def losses(precision: str) -> list[float]:
    """Return the losses of ten steps on the same batch."""
    work = throughput.Workload(hidden=16, layers=1, heads=2, vocabulary=32, length=8, batch=2)
    step = throughput.make_step(work, throughput.Variant("", precision=precision, compiled=False), "cpu")
    return [float(step(work.batches("cpu")[0])) for _ in range(10)]


def test_a_variant_under_fsdp2_trains_as_one_by_autocast_does():
    (found,) = run_ranks(losses, 1, "fsdp2")
    assert found == pytest.approx(losses("autocast"), abs=0.003)
    assert found[-1] < found[0] - 0.01


@pytest.mark.skipif(find_spec("torchtitan") is not None, reason="torchtitan is installed")
def test_torchtitan_is_left_out_with_the_reason_where_it_is_not_installed():
    (variant,) = [variant for variant in throughput.VARIANTS if variant.trained_by == "torchtitan"]
    found = throughput.measure(throughput.Workload(), variant, "cpu", 1.0)
    assert found.skipped == "ModuleNotFoundError: No module named 'torchtitan'"


def test_a_trainer_of_the_throughput_is_measured_after_its_warm_up():
    work = throughput.Workload(hidden=16, layers=1, heads=2, vocabulary=32, length=8, batch=2, steps=2)
    (plain,) = [variant for variant in throughput.VARIANTS if variant.name == "plain Trainer, bf16"]
    found = throughput.measure(work, plain, "cpu", 1.0)
    assert found.skipped is None
    assert found.last_loss == pytest.approx(np.log(32), abs=0.3)
    assert found.settings == {"trained_by": "Trainer"}


def test_a_step_by_document_is_compared_with_the_causal_ones_around_it():
    work = throughput.Workload(hidden=16, layers=1, heads=2, vocabulary=32, length=8, batch=2)
    found = documents.compare([2.2, 2.0], [1.0, 3.0, 1.0], work)
    assert found.details["cost"] == pytest.approx(1.05)
    assert (found.name, found.seconds) == ("by document, blocks of 8", pytest.approx(1.05))
    assert found.details["tokens_per_second"] == pytest.approx(16 / 1.05)
    assert documents.measure(work, pairs=2).details["pairs"] == 2
