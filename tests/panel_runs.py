"""Small folders with the files of a run, made without a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from conf.compose import composed

LINEAR, BATCH_TOKENS = 30_080, 256
KINDS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def write_run(
    folder: Path, *, sparsity: float = 0.0, linear: int = LINEAR, steps: int = 20, finished: bool = True, **figures: Any
) -> Path:
    """Write a run whose density falls from 1 after half its steps, and whose loss falls with tokens and average size."""
    folder.mkdir(parents=True)
    records, kept = [], 0.0
    for step in range(1, steps + 1):
        density = 1.0 if step <= steps // 2 else 1 - sparsity
        kept += density
        loss = 2.0 + 40 / math.sqrt(linear * kept / step) + 1 / step
        record = {
            "train/global_step": step, "train/tokens": step * BATCH_TOKENS, "train/loss": loss, "train/grad_norm": 1 / step,
            "train/learning_rate": 0.01, "train/tokens_per_second": 1000.0 + step, "perf/mfu": 0.4,
        }  # fmt: skip
        if sparsity:
            record |= {"sparsity/density": density, "sparsity/average_density": kept / step}
        if sparsity and step > steps // 2:
            record["sparsity/threshold"] = 0.02
        if sparsity and step in (1, steps // 2 + 1):
            names = [f"model.layers.{layer}.{kind}" for layer in range(2) for kind in KINDS]
            layers = {f"layer_density/{name}.weight": density for name in names}
            record |= {**layers, "layer_density/lm_head.weight": (1 + density) / 2}
        records.append(record)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    keys = ["model.hidden_size=32", "model.num_attention_heads=2", "model.num_key_value_heads=2", "batch_size=8"]
    config = composed("train", [*keys, "trainer.max_steps=40", f"sparsity.target={sparsity}"])
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    if not finished:
        return folder
    average = linear * kept / steps
    summary = {
        "run_name": folder.name, "data": "text", "total_params": linear + 9_760, "linear_params": linear,
        "nonzero_linear_params": round(linear * (1 - sparsity)), "sparsity": sparsity, "avg_linear_params": average,
        "average_density": kept / steps, "batch_tokens": BATCH_TOKENS, "total_tokens": steps * BATCH_TOKENS, "steps": steps,
        "learning_rate": 0.01, "final_train_loss": loss, "final_train_loss_std": 0.01, "perplexity": math.exp(loss + 0.05),
        "perplexity_window": 32, "heldout_loss": loss + 0.05, "bits_per_byte": (loss + 0.05) / 3,
        "unigram_bits_per_byte": 1.5, "prune_start_step": steps // 2 if sparsity else None,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps({**summary, **figures}))
    (folder / "sample.txt").write_text(f"The {folder.name} says <b>\n")
    return folder


def write_sweep(folder: Path) -> Path:
    """Write two sparse runs, the twin of one, a dense run, and a sparse one that is still running."""
    write_run(folder / "dense")
    write_run(folder / "half", sparsity=0.5)
    write_run(folder / "most", sparsity=0.8)
    write_run(folder / "most-twin", linear=round(0.6 * LINEAR))
    write_run(folder / "going", sparsity=0.8, steps=12, finished=False)
    return folder
