"""Prune by your own score: |w| times the size of the weight's recent gradients.

`python -m examples.own_score` trains a model of two layers for two seconds and prints the share of weights that is kept. To
use the score in a run: `python -m launch experiment=demo sparsity.score=examples.own_score:Momentum`.
"""

import torch
from transformers import Trainer, TrainingArguments

from sparsity import Geometric, Score, SparsityCallback


class Momentum(Score):
    """|w| times the square root of Adam's second moment: weights that are small and hardly move go first."""

    label = "lowest |w| times the size of its gradients first"
    needs = ("state",)
    is_zero_first = True

    def values(self, shard, part):
        """Return |w| sqrt(v) of a slice of the weights."""
        return shard.values[part].abs() * shard.state["exp_avg_sq"][part].sqrt()


class Model(torch.nn.Module):
    """A model of two layers that learns the sum of its inputs."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 32), torch.nn.Linear(32, 1)

    def forward(self, inputs, labels):
        """Return the loss as transformers' models do, in a dictionary."""
        return {"loss": (self.down(self.up(inputs).relu()) - labels).square().mean()}


def main(output_dir: str = "runs/own_score") -> dict[str, float]:
    """Train, prune 80 % of the weights and return each layer's share of kept weights."""
    rows = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    data = [{"inputs": row, "labels": row.sum(0, keepdim=True)} for row in rows]
    callback = SparsityCallback(Geometric(sparsity=0.8, start_step=10, end_step=40, every_steps=10), score=Momentum())
    arguments = TrainingArguments(output_dir, max_steps=60, learning_rate=1e-2, report_to="none", save_strategy="no")
    torch.manual_seed(0)
    trainer = Trainer(model=Model(), args=arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    kept = callback.pruner.layer_densities()
    print(f"kept: {kept}, average density {callback.average_density:.3f}")
    return kept


if __name__ == "__main__":
    main()
