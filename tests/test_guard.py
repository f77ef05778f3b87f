"""An update with bad numbers is skipped by the host, or by the optimizer's kernel, and then the host learns it a step later."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerControl, TrainerState

from tests.distributed import run_ranks
from train.distributed import World
from train.faults import guard as guards
from train.faults.guard import StepGuard
from train.faults.preempt import Preemption

NAN, FINE = torch.tensor(float("nan")), torch.tensor(1.0)


def alone() -> World:
    return World(0, 1, torch.device("cpu"))


def train(model: nn.Module, guard: StepGuard, losses: list[torch.Tensor], on_device: bool) -> list[torch.Tensor]:
    """Make an update with each loss, and return weights and moments."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for step, loss in enumerate(losses):
        for param in model.parameters():
            param.grad = torch.full_like(param, 1.0 + step)
        if on_device:
            guard.decide_on_device(optimizer, loss, FINE)
        elif not guard.allows_update(loss, FINE):
            optimizer.zero_grad()
        optimizer.step()
    guard.read_late_flags()
    found = [*model.parameters(), *(t for param in model.parameters() for t in optimizer.state[param].values())]
    return [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in found]


@pytest.mark.parametrize("losses", [[FINE, NAN, FINE], [FINE, FINE, NAN], [FINE, NAN, NAN, FINE]])
def test_a_skip_on_the_device_leaves_what_a_skip_on_the_host_leaves(losses):
    torch.manual_seed(0)
    models = [nn.Linear(4, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    host, device = (StepGuard(alone(), Preemption(), max_skipped=10) for _ in range(2))
    theirs, ours = train(models[0], host, losses, False), train(models[1], device, losses, True)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert device.num_skipped == host.num_skipped == sum(loss is NAN for loss in losses)
    assert device.num_in_row == host.num_in_row


def test_the_host_learns_a_step_late_and_then_stops():
    preemption = Preemption()
    guard = StepGuard(alone(), preemption, max_skipped=0)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], fused=True)
    guard.decide_on_device(optimizer, NAN, None)
    assert (guard.num_skipped, guard.stop) == (0, None)
    guard.decide_on_device(optimizer, FINE, None)
    assert guard.num_skipped == 1
    assert "max_skipped=0" in str(guard.stop)
    preemption.is_requested = True
    guard.decide_on_device(optimizer, FINE, None)
    assert guard.stop is None
    guard.read_late_flags()
    assert "asked to stop" in str(guard.stop)


def test_only_a_fused_optimizer_on_a_gpu_decides_there():
    param = nn.Parameter(torch.ones(2))
    assert not guards.skips_on_device(torch.optim.AdamW([param], fused=True))
    assert not guards.skips_on_device(torch.optim.SGD([param]))


def skip_on_one_rank() -> tuple[int, list[torch.Tensor]]:
    """Train with a bad loss in the second step, only on rank 1."""
    torch.manual_seed(0)
    rank = dist.get_rank()
    guard = StepGuard(World(rank, 2, torch.device("cpu")), Preemption(), max_skipped=10)
    model = nn.Linear(4, 3, bias=False)
    fully_shard(model)
    found = train(model, guard, [FINE, NAN if rank else FINE], True)
    return guard.num_skipped, found


def test_all_ranks_skip_together_under_fsdp2():
    torch.manual_seed(0)
    expected = train(nn.Linear(4, 3, bias=False), StepGuard(alone(), Preemption(), 10), [FINE], False)
    for num_skipped, found in run_ranks(skip_on_one_rank, 2):
        assert num_skipped == 1
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_flags_of_the_last_step_are_read_before_it_ends():
    guard = StepGuard(alone(), Preemption(), max_skipped=0)
    guard.decide_on_device(torch.optim.AdamW([nn.Parameter(torch.ones(2))], fused=True), NAN, None)
    control = TrainerControl()
    guard.on_step_end(None, TrainerState(global_step=4, max_steps=5), control)
    assert not control.should_save
    guard.on_step_end(None, TrainerState(global_step=5, max_steps=5), control)
    assert control.should_save


def test_a_request_behind_the_last_step_is_agreed_on():
    preemption = Preemption()
    guard = StepGuard(alone(), preemption, max_skipped=0)
    assert not guard.is_asked_to_stop()
    preemption.is_requested = True
    assert guard.is_asked_to_stop()
    assert guard.stop is not None
    assert guard.stop.code == 75
