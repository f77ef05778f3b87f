"""Under bf16, weights are gathered in bfloat16, but gradients are summed over ranks and losses computed in float32."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.distributed import run_ranks


def summed_gradient() -> list[float]:
    """Return the sum of two ranks' gradients, 1 and 2^-9; in bfloat16 it would be 1."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
        "ACCELERATE_MIXED_PRECISION": "bf16",
    }  # fmt: skip
    from accelerate import Accelerator

    from train.distributed import join_world, reduce_in_float32

    world = join_world(60)
    accelerator = Accelerator()
    reduce_in_float32(accelerator)
    model = nn.Linear(1, 2, bias=False)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    scale = 1.0 if world.rank == 0 else 2.0**-9
    model(torch.ones(1, 1)).float().sum().mul(scale).backward()
    return model.weight.grad.full_tensor().view(-1).tolist()


def test_gradients_are_summed_over_ranks_in_float32():
    for gradient in run_ranks(summed_gradient, 2, joined=False):
        assert gradient == [(1.0 + 2.0**-9) / 2] * 2


def test_a_process_alone_has_nothing_to_reduce():
    from accelerate import Accelerator

    from train.distributed import reduce_in_float32

    reduce_in_float32(Accelerator(cpu=True))


def losses_beside_their_own(folder: Path, fsdp: bool) -> dict[str, Any]:
    """Return each micro-batch's loss under bf16, the float32 loss of the same batch and weights, and the logged losses."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": str(fsdp).lower(), "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    }  # fmt: skip
    from torch.distributed.tensor import DTensor

    from tests.small_trainer import small_llama, small_trainer
    from train.distributed import join_world
    from train.scoring import score_stream
    from train.trainer import PretrainingTrainer

    reference = small_llama()
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def whole(module: nn.Module) -> dict[str, torch.Tensor]:
        return {
            name: (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
            for name, param in module.named_parameters()
        }

    class Watched(PretrainingTrainer):
        def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
            reference.load_state_dict(whole(self._module), strict=False)
            loss = super().training_step(model, inputs, *args, **kwargs)
            logits = bf16_logits(inputs["input_ids"]).float()
            own = reference.loss_function(logits, inputs["labels"], vocab_size=logits.shape[-1])
            pairs.append((loss * self.args.gradient_accumulation_steps, own))
            return loss

    @torch.no_grad()
    def bf16_logits(ids: torch.Tensor) -> torch.Tensor:
        """Compute logits as FSDP2 does, with parameters in bfloat16, or without it as autocast does."""
        if fsdp:
            rounded = {name: param.bfloat16() for name, param in reference.named_parameters()}
            return torch.func.functional_call(reference, rounded, (ids,)).logits
        with torch.autocast("cpu", torch.bfloat16):
            return reference(ids).logits

    world = join_world(60)
    trainer = small_trainer(folder, world=world, bf16=True, kind=Watched)
    trainer.train()
    tokens = np.random.default_rng(0).integers(0, 128, 81)
    score = score_stream(trainer.model_wrapped, tokens, window=16, batch_size=3, world=world)
    reference.load_state_dict(whole(trainer._module), strict=False)
    windows = torch.from_numpy(tokens)[:-1].view(5, 16)
    nats = torch.nn.functional.cross_entropy(
        bf16_logits(windows).flatten(0, 1).float(), torch.from_numpy(tokens)[1:], reduction="none"
    )
    return {
        "dtypes": {str(loss.dtype) for loss, _ in pairs},
        "losses": [float(loss) for loss, _ in pairs],
        "own": [float(own) for _, own in pairs],
        "logged": [record["loss"] for record in trainer.state.log_history if "loss" in record],
        "nats": score.nats,
        "own_nats": float(nats.double().sum()),
    }


@pytest.fixture(scope="module", params=[1, 2], ids=["one process, autocast", "FSDP2 on two ranks"])
def ranks(request, tmp_path_factory) -> list[dict[str, Any]]:
    folder, fsdp = tmp_path_factory.mktemp("bf16"), request.param > 1
    return run_ranks(losses_beside_their_own, request.param, folder, fsdp, joined=False)


def test_losses_under_bf16_are_the_float32_losses_of_their_batches(ranks):
    for found in ranks:
        assert found["dtypes"] == {"torch.float32"}
        assert found["losses"] == found["own"]
        assert all(loss != float(torch.tensor(loss).bfloat16()) for loss in found["losses"])
    # A step is two micro-batches on each rank.
    by_step = torch.tensor([found["losses"] for found in ranks], dtype=torch.float64).view(len(ranks), -1, 2)
    assert ranks[0]["logged"] == by_step.mean(dim=(0, 2)).tolist()


def test_held_out_scores_under_bf16_add_up_float32_log_probabilities(ranks):
    for found in ranks:
        assert found["nats"] == pytest.approx(found["own_nats"], rel=1e-9)
