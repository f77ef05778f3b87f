"""Fine-tune a model that is already sparse: its zeros stay zeros.

    python examples/prune_in_trainer.py                        makes a sparse model
    python examples/finetune_with_fixed_masks.py [FOLDER]      fine-tunes it; the default folder is runs/example-sparse

Without the callback the first optimizer step would make the model dense again. Expect the same zeros before and after,
and a loss that starts where the first training ended.
"""

from __future__ import annotations

import sys

import torch
from small import Bytes, arguments, print_history
from transformers import AutoModelForCausalLM, Trainer

from sparsity import Fixed, SparsityCallback

folder = sys.argv[1] if len(sys.argv) > 1 else "runs/example-sparse"


def zeros(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a mask of the zeros in each linear layer's weight."""
    return {name: weight == 0 for name, weight in model.named_parameters() if name.endswith("proj.weight")}


model = AutoModelForCausalLM.from_pretrained(folder)
before = zeros(model)
trainer = Trainer(
    model=model,
    args=arguments("runs/example-finetuned", max_steps=50, learning_rate=1e-3),
    train_dataset=Bytes(),
    callbacks=[SparsityCallback(Fixed())],
)
trainer.train()

after = zeros(trainer.model.cpu())
num_zeros = sum(int(mask.sum()) for mask in before.values())
is_same = all(torch.equal(before[name], after[name]) for name in before)
print_history(trainer)
print(f"{num_zeros:,} zeros before; the same after: {is_same}")
trainer.save_model("runs/example-finetuned")
