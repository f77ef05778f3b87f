"""Windows by compute, dense twins, and the paper's family of models: the steps and widths that a configuration means."""

from itertools import product
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from conf.schema import ModelConfig, WindowConfig
from launch.plan.request import read_request
from train.plan.counts import count_parameters
from train.plan.run import plan_run
from train.plan.twin import dense_twin

CONF = Path(__file__).resolve().parents[1] / "conf"
BY_BUDGET = "sparsity.window={start:0.25,end:0.75,of:compute,budget:10000,every:100}"


def plan(*overrides: str, devices: int = 64):
    return plan_run(read_request(overrides).runs[0], devices)


@pytest.mark.parametrize(
    ("sparsity", "end", "steps"), [(20, 8100, 11200), (40, 8875, 13050), (60, 10100, 16375), (80, 12600, 25050)]
)
def test_a_budget_of_10000_dense_steps_lands_on_the_cards_steps(sparsity, end, steps):
    found = plan(f"experiment=sparsellm-1b-{sparsity}p", BY_BUDGET, "trainer.max_steps=null")
    assert found.schedule.start_step == 2500
    assert abs(found.schedule.end_step - end) <= 100
    assert abs(found.num_steps - steps) <= 100
    assert found.total_tokens == found.num_steps * 8_388_608


@pytest.mark.parametrize(
    ("sparsity", "end", "steps"), [(20, 8100, 11200), (40, 8875, 13050), (60, 10100, 16375), (80, 12600, 25050)]
)
def test_shares_of_a_given_number_of_steps_land_on_the_cards_window(sparsity, end, steps):
    shares = "sparsity.window={start:0.25,end:0.75,of:compute,every:100}"
    found = plan(f"experiment=sparsellm-1b-{sparsity}p", shares)
    assert found.num_steps == steps
    assert found.schedule.start_step == 2500
    assert abs(found.schedule.end_step - end) <= 100


def test_a_dense_run_with_a_budget_takes_as_many_steps():
    found = plan("experiment=paper-162m-10x", "sparsity.target=0")
    assert (found.schedule, found.num_steps) == (None, 26288)


@pytest.mark.parametrize("override", ["trainer.max_steps=40", "sparsity.window.budget=null"])
def test_a_run_has_one_length(override):
    with pytest.raises(ValueError, match=r"both say how long the run is, or neither does"):
        plan("experiment=paper-162m-10x", override)


def test_a_budget_needs_shares_of_compute():
    with pytest.raises(ValueError, match="budget=100 needs a window in shares"):
        WindowConfig(start=10, end=20, budget=100)
    with pytest.raises(ValueError, match="in tokens"):
        WindowConfig(start=0.1, end=0.2, of="tokens", budget=100)


@pytest.mark.parametrize(("size", "multiple"), product(("58m", "162m", "468m"), (10, 20)))
def test_the_papers_family_spends_its_multiple_of_chinchilla_at_every_sparsity(size, multiple):
    for sparsity in (0, 0.2, 0.4, 0.6, 0.8):
        found = plan(f"experiment=paper-{size}-{multiple}x", f"sparsity.target={sparsity}")
        dense_equivalent_tokens = found.average_density * found.total_tokens
        assert dense_equivalent_tokens == pytest.approx(multiple * 20 * found.counts.linear, rel=0.005)


def test_the_grid_is_the_ten_windows_that_end_within_the_run():
    params = yaml.safe_load((CONF / "sweep" / "prune_window.yaml").read_text())["hydra"]["sweeper"]["params"]
    override = OverridesParser.create().parse_override(f"sparsity.window={params['sparsity.window']}")
    windows = {(w["start"], w["end"]) for w in (dict_of(item) for item in override.value().list)}
    grid = product((0, 25, 50, 75), (25, 50, 75, 100))
    assert windows == {(dense / 100, (dense + prune) / 100) for dense, prune in grid if dense + prune <= 100}
    for start, end in windows:
        found = plan("experiment=paper-162m-10x", f"sparsity.window={{start:{start},end:{end}}}")
        spent = found.average_density * found.num_steps
        assert spent == pytest.approx(26288, rel=0.01)
        assert found.schedule.start_step == pytest.approx(start * spent, abs=100)


def dict_of(item):
    return item if isinstance(item, dict) else item.value


@pytest.mark.parametrize(("sparsity", "card_width"), [(20, 1920), (40, 1728), (60, 1536), (80, 1216)])
def test_a_dense_twin_is_the_width_closest_to_the_average(sparsity, card_width):
    sparse = plan(f"experiment=sparsellm-1b-{sparsity}p")
    found = plan(f"experiment=sparsellm-1b-{sparsity}p", "model.match=average")
    target = sparse.average_density * 1_139_277_824
    assert found.twin.target_linear_params == pytest.approx(target)
    assert (found.schedule, found.num_steps, found.average_density) == (None, sparse.num_steps, 1.0)
    by_hand = {width: 16 * (4 * width * width + 3 * width * 4 * width) + 32000 * width for width in range(16, 2049, 16)}
    assert found.model.hidden_size == min(by_hand, key=lambda width: abs(by_hand[width] - target))
    assert abs(found.model.hidden_size - card_width) <= 64
    assert found.counts.linear == found.twin.linear_params == by_hand[found.model.hidden_size]
    assert found.twin.relative_error == pytest.approx(found.counts.linear / target - 1)
    assert (found.model.num_attention_heads, found.model.intermediate_size) == (8, 4 * found.model.hidden_size)
    assert found.run_dir != sparse.run_dir


def test_the_twin_of_a_dense_model_is_itself():
    model = ModelConfig(
        name="m", hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100,
    )  # fmt: skip
    twin = dense_twin(model, 1.0)
    assert (twin.model.hidden_size, twin.relative_error) == (64, 0.0)
    assert count_parameters(twin.model) == count_parameters(model)


@pytest.mark.parametrize("devices", [2, 8, 64, 512, 4096])
def test_the_series_runs_on_2_to_4096_devices(devices):
    found = plan("experiment=sparsellm-1b-80p", devices=devices)
    assert found.micro_batch_size * found.gradient_accumulation_steps * devices == 4096


def test_every_experiment_opens_with_its_purpose_and_its_command():
    for file in sorted((CONF / "experiment").glob("*.yaml")):
        head = [line for line in file.read_text().splitlines() if line.startswith("#")]
        assert head[0] == "# @package _global_"
        assert any(f"experiment={file.stem}" in line for line in head), file.name
        assert not head[1].startswith("#   "), file.name
