"""Other schedules, scopes, groups and patterns in the plan: windows by compute, counts and averages in closed form."""

from __future__ import annotations

import math
import re

import pytest
from transformers import GPT2Config

from launch.plan.request import read_request
from sparsity.mixed import Mixed
from sparsity.schedule import SCHEDULES, Constant, Geometric, OneShot
from sparsity.scope import Group, make_pools, seen_together
from sparsity.window import compute_window, schedule_of_window
from train.plan.disk import checkpoint_bytes
from train.plan.forecast import forecast
from train.plan.gathering import run_setting
from train.plan.memory import gpu_memory
from train.plan.run import plan_run
from train.plan.text import run_text

CURVES = {
    "geometric": lambda s, x: (1 - s) ** x,
    "cubic": lambda s, x: 1 - s + s * (1 - x) ** 3,
    "linear": lambda s, x: 1 - s * x,
}
GROUPS = "sparsity.groups=[{include:['*mlp*'],target:0.9},{include:['*attn*'],target:0.5}]"


def plan(*overrides: str):
    overrides = ("experiment=demo", "model=llama_tiny", "batch_size=16", "trainer.max_steps=320", *overrides)
    return plan_run(read_request(overrides).runs[0], 2)


@pytest.mark.parametrize("kind", CURVES)
@pytest.mark.parametrize(
    ("sparsity", "start", "end", "every", "steps"), [(0.8, 3, 23, 5, 40), (0.5, 0, 6, 2, 7), (0.9, 4, 4, 3, 9)]
)
def test_a_gradual_schedule_equals_a_walk_through_the_steps(kind, sparsity, start, end, every, steps):
    schedule = SCHEDULES[kind](sparsity, start, end, every)
    events = list(range(start, end + 1, every))
    by_hand = []
    for step in range(steps):
        done = sum(event <= step for event in events)
        by_hand.append(CURVES[kind](sparsity, done / len(events)))
    assert [schedule.density(step) for step in range(steps)] == pytest.approx(by_hand, rel=1e-12)
    assert schedule.average_density(steps) == pytest.approx(math.fsum(by_hand) / steps, rel=1e-12)
    assert schedule.density(end) == 1 - sparsity


def test_one_shot_prunes_once_and_constant_before_the_first_step():
    assert list(OneShot(0.8, 7).events()) == [7]
    assert [OneShot(0.8, 2).density(step) for step in range(4)] == pytest.approx([1, 1, 0.2, 0.2])
    assert list(Constant(0.8).events()) == [0]
    assert Constant(0.8).average_density(10) == pytest.approx(0.2)


@pytest.mark.parametrize("steps", [200, 3000])
@pytest.mark.parametrize("kind", ["geometric", "cubic", "linear", "one_shot"])
@pytest.mark.parametrize("shares", [None, ((0.5, 0.9), (0.3, 0.5), (0.2, 0.0))], ids=["one target", "groups"])
def test_compute_shares_hold_for_every_schedule(kind, shares, steps):
    start, end = (0.25, 0.75) if kind != "one_shot" else (0.4, 0.4)
    base, _ = compute_window(0.8, start, end, num_steps=steps, kind=SCHEDULES[kind], shares=shares)
    schedule = Mixed(base, shares) if shares else base
    total = schedule.dense_equivalent_steps(steps)
    assert abs(schedule.start_step - start * total) <= schedule.every_steps
    assert abs(schedule.dense_equivalent_steps(schedule.end_step) - end * total) <= 2 * schedule.every_steps
    same, num_steps = compute_window(0.8, start, end, budget=total, kind=SCHEDULES[kind], shares=shares)
    assert abs(num_steps - steps) <= 5 * base.every_steps
    assert abs(same.start_step - base.start_step) <= base.every_steps


def test_a_budget_of_a_constant_schedule_is_its_density_times_its_steps():
    assert compute_window(0.8, 0, 0, budget=100, kind=Constant) == (Constant(0.8), 500)
    assert plan("sparsity=constant", "trainer.max_steps=null", "sparsity.window.budget=50").num_steps == 250


@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_schedule_is_one_word_in_a_run(kind):
    found = plan("sparsity=acdc" if kind == "alternating" else f"sparsity={kind}")
    assert type(found.schedule) is SCHEDULES[kind]
    assert found.schedule.density(319) == pytest.approx(0.2)
    walk = math.fsum(found.schedule.density(step) for step in range(320)) / 320
    assert found.average_density == pytest.approx(walk, rel=1e-12)


def test_one_shot_follows_its_start():
    assert plan("sparsity=one_shot", "sparsity.window.start=40").schedule == OneShot(0.8, 40)
    assert schedule_of_window(
        0.8, 40, 40, of="steps", every_steps=None, num_steps=90, batch_tokens=1, kind=OneShot
    ) == OneShot(0.8, 40)


def test_groups_are_counted_and_averaged_by_their_sizes():
    found, model = plan(GROUPS), plan().model
    hidden, mlp = model.hidden_size, model.intermediate_size
    num_mlp, num_attn = (model.num_hidden_layers * n for n in (3 * hidden * mlp, 4 * hidden * hidden))
    rest = model.vocab_size * hidden
    targets = [(num_mlp, 0.9), (num_attn, 0.5), (rest, 0.8)]
    assert found.num_prunable == num_mlp + num_attn + rest
    assert found.num_pruned == sum(round(target * numel) for numel, target in targets)
    base = found.schedule.base
    expected = sum(
        numel * Geometric(target, base.start_step, base.end_step, base.every_steps).average_density(320)
        for numel, target in targets
    )
    assert found.average_density == pytest.approx(expected / found.num_prunable, rel=1e-12)


def test_uniform_layers_round_on_their_own():
    found = plan("sparsity.scope=uniform", "sparsity.target=0.333")
    assert len(found.pools) == 7 * found.model.num_hidden_layers + 1
    assert found.num_pruned == sum(round(0.333 * pool.numel) for pool in found.pools)
    assert found.average_density == plan("sparsity.target=0.333").average_density


def test_a_group_alone_can_be_pruned():
    found = plan("sparsity.target=0", "sparsity.groups=[{include:['*mlp*'],target:0.9}]")
    assert found.schedule is not None
    assert found.schedule.sparsity == pytest.approx(found.num_pruned / found.num_prunable, abs=1e-6)
    assert plan("sparsity.target=0").schedule is None


def test_a_twin_matches_the_average_of_all_linear_weights():
    found = plan("sparsity.requires_dense=[lm_head*]", "model.match=average")
    sparse = plan("sparsity.requires_dense=[lm_head*]")
    pruned_on_average = (1 - sparse.average_density) * sparse.num_prunable
    assert found.twin.target_linear_params == pytest.approx(sparse.counts.linear - pruned_on_average)


def test_the_plan_shows_the_method():
    request = read_request(["experiment=demo", GROUPS, "sparsity=cubic", "sparsity.scope=uniform"])
    shown = run_text(forecast(request.runs[0], plan_run(request.runs[0], 2), request.plan))
    assert "(cubic)" in shown
    assert "unstructured, by magnitude, uniform: 29 thresholds" in shown
    assert "*mlp* to 0.9" in shown


MISTAKES = [
    (["sparsity.schedule=cubical"], "sparsity.schedule=cubical is not known"),
    (["sparsity.scope=layer"], "sparsity.scope=layer is not known"),
    (["sparsity.schedule=one_shot"], "the window goes from 0.25 to 0.75: use sparsity=one_shot"),
    (["sparsity.schedule=constant"], "use sparsity=constant"),
    (["sparsity=one_shot", "sparsity.window.every=5"], "window.every=5 has no effect with sparsity.schedule=one_shot"),
    (["sparsity.groups=[{include:['*mlpp*'],target:0.5}]"], "'*mlpp*' in groups matches no prunable parameter"),
    (["sparsity.groups=[{include:['*mlp*'],target:0.5},{include:['*up*'],target:0.1}]"], "is in two groups, *mlp* and *up*"),
    (["sparsity.groups=[{target:0.5}]"], "needs patterns in each group"),
    (["sparsity.groups=[{include:['*mlp*'],target:1}]"], "the target 1.0, outside [0, 1)"),
    (["sparsity.pattern=2:4"], "pattern=2:4 ends at a sparsity of 0.5, not 0.8"),
    (["sparsity.pattern=124"], "in yaml it needs quotes"),
    (["sparsity=two_four", "sparsity.pattern=3:7", f"sparsity.target={1 - 3 / 7!r}"], "multiple of 7 inputs"),
    (["sparsity=two_four", "sparsity.scope=erk"], "pattern=2:4 takes the same share of every layer"),
    (["sparsity=blocks", "sparsity.scope=row"], "pattern=4x1 compares weights by block"),
    (["sparsity=set", "sparsity.scope=row"], "update=set grows weights in any row"),
    (["sparsity=constant", "sparsity.score=saliency"], "the first event is before step 0"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), MISTAKES)
def test_a_mistake_is_one_sentence(overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(*overrides)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sparsity.scope=row", "scope=row compares along the inputs"),
        ("sparsity.score=wanda", "score=wanda needs the inputs of each layer"),
        ("sparsity=blocks", "pattern=4x1 runs along the inputs"),
    ],
)
def test_a_method_that_does_not_fit_a_models_layers_is_refused_before_it_runs(tmp_path, override, words):
    GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=2, n_positions=32).save_pretrained(tmp_path)
    own = ("experiment=demo", "model=hf", f"model.path={tmp_path}", "data.sequence_length=32")
    with pytest.raises(ValueError, match=re.escape(words)):
        plan_run(read_request((*own, override)).runs[0], 2)


def test_pools_hold_each_parameter_once():
    sizes = {"a.mlp": (10,), "a.attn": (20,), "b.mlp": (30,), "head": (5,)}
    groups = [Group(("*.mlp",), 0.9)]
    assert [pool.names for pool in make_pools(sizes)] == [tuple(sizes)]
    assert [pool.names for pool in make_pools(sizes, "uniform", groups)] == [
        ("a.mlp",),
        ("b.mlp",),
        ("a.attn",),
        ("head",),
    ]
    pools = make_pools(sizes, "global", groups)
    assert [(pool.names, pool.numel, pool.sparsity) for pool in pools] == [
        (("a.mlp", "b.mlp"), 40, 0.9),
        (("a.attn", "head"), 25, None),
    ]
    assert seen_together(Geometric(0.9, 0, 4, 1), pools) == Geometric(0.9, 0, 4, 1)
    assert seen_together(Geometric(0.5, 0, 4, 1), pools).shares == ((40 / 65, 0.9), (25 / 65, 0.5))


@pytest.mark.parametrize(
    ("choice", "update", "extra"),
    [
        ("geometric", "shrink", 0.0),
        ("set", "set", 0.0),
        # Masks move every 20 steps before 0.75 of the 320 steps, with 0.8 of the weights pruned: at steps 20 to 220.
        ("rigl", "rigl", 11 * 0.8 / 3),
        ("acdc", "acdc", 0.0),
    ],
)
def test_an_update_is_one_word_and_its_dense_gradients_are_counted(choice, update, extra):
    moves = ["sparsity.moves.every=20"] if choice in ("set", "rigl") else []
    found = plan(f"sparsity={choice}", *moves)
    assert found.update.name == update
    assert found.schedule.density(319) == pytest.approx(0.2)
    assert found.extra_linear * 320 == pytest.approx(extra * found.num_prunable)


def test_straight_through_counts_the_gradient_of_every_pruned_weight():
    found = plan("sparsity=ste")
    assert found.extra_linear == pytest.approx((1 - found.average_density) / 3 * found.num_prunable)


@pytest.mark.parametrize("of", ["compute", "tokens"])
def test_alternating_phases_begin_and_end_sparse(of):
    window = {"compute": (0.1, 0.75), "tokens": (40_960, 819_200)}[of]
    schedule = plan(
        "sparsity=acdc", f"sparsity.window.of={of}", f"sparsity.window={{start:{window[0]},end:{window[1]}}}"
    ).schedule
    densities = [schedule.density(step) for step in schedule.events()]
    assert len(densities) % 2 == 1
    assert densities == pytest.approx([0.2, 1.0] * (len(densities) // 2) + [0.2])
    assert schedule.average_density(320) == pytest.approx(
        math.fsum(schedule.density(step) for step in range(320)) / 320
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sparsity=rigl", "sparsity.pattern='2:4'", "sparsity.target=0.5"], "update=rigl grows weights anywhere"),
        (["sparsity.update=acdc"], "update=acdc needs dense phases"),
        (["sparsity.schedule=alternating"], "take update=acdc"),
        (["sparsity.update=rigl", "sparsity.moves.share=1.5"], r"moves.share=1.5 is outside \(0, 1\)"),
        (["sparsity.moves.every=7"], "moves.every=7 has no effect with sparsity.update=shrink"),
        (["sparsity.update=regrow"], "sparsity.update=regrow is not known: choose one of shrink, set, rigl, ste, acdc"),
        (["sparsity.score=nowhere:Score"], "sparsity.score=nowhere:Score cannot be loaded"),
        (["sparsity.score=sparsity.schedule:Cubic"], "is no Score: extend"),
        (["sparsity.normalize=l1"], "normalize=l1 is not known"),
        (["sparsity=rigl", "init_from=somewhere"], "init_from=somewhere keeps the zeros of its model"),
        (["sparsity.normalize=l2", "sparsity.scope=erk"], "normalize=l2 has no effect with scope=erk"),
    ],
)
def test_what_a_plan_cannot_do_is_said_with_the_remedy(overrides, words):
    with pytest.raises(ValueError, match=words):
        plan(*overrides)


def test_the_memory_and_the_checkpoint_of_masked_values_and_moves_are_planned():
    names = ("cubic", "ste", "granet")
    configs = {name: read_request(["experiment=demo", f"sparsity={name}"]).runs[0] for name in names}
    found = {name: plan_run(config, 2) for name, config in configs.items()}
    memory = {
        name: gpu_memory(one.model, one.num_prunable, run_setting(configs[name], one, None, 0.1))
        for name, one in found.items()
    }
    share, move = found["cubic"].num_prunable // 2, "a move of the masks"
    assert memory["ste"].masks == 5 * memory["cubic"].masks == 5 * share
    assert memory["granet"].transients[move] - memory["cubic"].transients["a prune event"] == 9 * share
    bytes_of = {
        name: checkpoint_bytes(one.model, one.num_prunable, one.update.state_bytes) for name, one in found.items()
    }
    assert bytes_of["ste"] - bytes_of["cubic"] == 4 * found["cubic"].num_prunable
