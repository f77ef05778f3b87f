"""Train a 2:4 sparse model, which sparse tensor cores can use: 2 of every 4 consecutive inputs of a neuron are kept.

    python examples/two_four.py

Expect exactly two zeros in each group of four. On an NVIDIA GPU the last lines pass a layer to torch's 2:4 kernels.
"""

from __future__ import annotations

import torch
from small import Bytes, arguments, print_history, small_llama
from transformers import Trainer

from sparsity import Geometric, SparsityCallback

schedule = Geometric(sparsity=0.5, start_step=40, end_step=120, every_steps=10)
trainer = Trainer(
    model=small_llama(),
    args=arguments("runs/example-two-four", max_steps=160, learning_rate=5e-3),
    train_dataset=Bytes(),
    callbacks=[SparsityCallback(schedule, pattern="2:4")],
)
trainer.train()

print_history(trainer)
weight = trainer.model.model.layers[0].mlp.up_proj.weight.detach()
zeros_of_group = (weight.reshape(-1, 4) == 0).sum(dim=1)
print(f"zeros in each group of four: {zeros_of_group.min().item()} to {zeros_of_group.max().item()}")

if weight.is_cuda:
    half = weight.half()
    inputs = torch.randn(128, half.shape[1], device=half.device, dtype=torch.half)
    sparse = torch.sparse.to_sparse_semi_structured(half)
    linear = torch.nn.functional.linear
    print(
        "largest difference to the dense product:", (linear(inputs, half) - linear(inputs, sparse)).abs().max().item()
    )
