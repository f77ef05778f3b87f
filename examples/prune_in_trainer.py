"""Prune in a plain transformers.Trainer; only the callback is added.

    python examples/prune_in_trainer.py [FOLDER]

The script trains a small LLaMA on the bytes of Python's help texts and prunes it to 80 % between steps 50 and 150 of 200.
Expect a loss that falls from 5.5 to about 2.5 nats per byte, and a folder, runs/example-sparse, that transformers can load.
"""

from __future__ import annotations

import sys

from small import Bytes, arguments, print_history, small_llama
from transformers import Trainer

from sparsity import Geometric, SparsityCallback

folder = sys.argv[1] if len(sys.argv) > 1 else "runs/example-sparse"

schedule = Geometric(sparsity=0.8, start_step=50, end_step=150, every_steps=10)
trainer = Trainer(
    model=small_llama(),
    args=arguments(folder, max_steps=200, learning_rate=5e-3),
    train_dataset=Bytes(),
    callbacks=[SparsityCallback(schedule)],
)
trainer.train()
trainer.save_model(folder)

print_history(trainer)
weights = trainer.model.model.layers[0].mlp.up_proj.weight
print(f"zeros in the first up projection: {(weights == 0).float().mean():.1%}")
print(f"wrote {folder}")
