"""`transformers.Trainer` for packed blocks: the series' recipe, a sampler without a list, and every step's loss kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from train.data.sampler import PermutationSampler
from train.distributed import World, check_fsdp2


class PretrainingTrainer(Trainer):
    """A Trainer that decays every parameter and keeps each step's loss on the device until it is asked for.

    Blocks all have the same length, so the mean of the micro-batches' losses is the loss of the step.
    """

    def __init__(self, *, world: World, evaluator: Callable[[nn.Module], dict[str, float]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_fsdp2(self.accelerator)
        self.world = world
        self.evaluator = evaluator
        self.model_accepts_loss_kwargs = False
        self._losses = torch.zeros(self.args.max_steps, device=self.args.device)

    def step_losses(self) -> Tensor:
        """The training loss of each step run so far, over all ranks [num_steps]. Collective."""
        return self.world.mean(self._losses[: self.state.global_step].clone())

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters()]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses[self.state.global_step] += loss
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        blocks: Any = self.train_dataset if train_dataset is None else train_dataset
        return PermutationSampler(len(blocks), seed=seed)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Held-out figures by the same function that `python -m eval` uses. Collective."""
        figures = {f"{metric_key_prefix}_{name}": value for name, value in self.evaluator(self.model_wrapped).items()}
        self.log(dict(figures))
        return figures

    def store_flos(self) -> None:
        """Nothing: the plan knows the run's FLOPs, and counting them here would gather at every log."""
