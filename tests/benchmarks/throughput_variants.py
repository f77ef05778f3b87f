"""The workload and the ways to train it that `tests.benchmarks.throughput` measures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaConfig

BEST = "best"
"""The name that stands for the attention of the fastest variant so far."""


@dataclass(frozen=True)
class Workload:
    """The model, batch and steps, which are the same for every variant."""

    hidden: int = 2048
    layers: int = 16
    heads: int = 8
    vocabulary: int = 32000
    length: int = 2048
    batch: int = 8
    steps: int = 20

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=4 * self.hidden,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.heads,
            max_position_embeddings=self.length, tie_word_embeddings=False, use_cache=False,
        )  # fmt: skip

    def num_linear(self) -> int:
        return 16 * self.hidden**2 * self.layers + self.vocabulary * self.hidden

    def flops_per_token(self) -> int:
        return 6 * self.num_linear() + 12 * self.layers * self.hidden * self.length

    def batches(self, device: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.length)
        return [torch.randint(self.vocabulary, shape, generator=generator).to(device) for _ in range(4)]


@dataclass(frozen=True)
class Variant:
    """A way to train, given by these settings:

    `attention`: eager, sdpa (torch chooses), a backend of `own_steps.BACKENDS`, flash_attention_2 or _3, flex_attention,
    document (as in runs with data.attention=document, over documents of mixed lengths) or `best`; `loss`: a name in
    `own_steps.LOSSES`; `precision`: autocast, fsdp2 (casts each unit's weights, as runs do),
    or copies (a bf16 model in addition to float32 weights); `compiled`: nothing, each block, or the model as a whole;
    `batch_factor`: sequences in a micro-batch over those of the workload; `accumulation`: micro-batches of an update;
    `trained_by`: the loop of this benchmark, or other code, in which most of these settings have no effect.
    """

    name: str
    attention: str = "sdpa"
    loss: str = "plain"
    precision: str = "autocast"
    compiled: bool | Literal["model"] = True
    backend: str = "inductor"
    fused_adamw: bool = True
    sparse: bool = False
    reshard: bool = True
    fp8: bool = False
    batch_factor: int = 1
    accumulation: int = 1
    inductor: tuple[tuple[str, Any], ...] = ()
    """Values for torch._inductor.config."""
    trained_by: Literal["loop", "Trainer", "torchtitan"] = "loop"


BASE = Variant("compiled blocks, sdpa")
AS_RUNS = Variant("as runs: FSDP2, compiled blocks and loss, sdpa", precision="fsdp2", loss="compiled")
LARGE = replace(AS_RUNS, reshard=False, batch_factor=2)
TUNED = replace(LARGE, attention=BEST)
PLAIN_TRAINER = Variant("plain Trainer, bf16", compiled=False, trained_by="Trainer")
TORCHTITAN = Variant("torchtitan", trained_by="torchtitan")
TELLING = (
    replace(LARGE, name="FSDP2, batch x2, sdpa"),
    replace(LARGE, name="FSDP2, batch x2, cudnn", attention="cudnn"),
    replace(LARGE, name="FSDP2, batch x2, flash", attention="flash"),
    replace(TUNED, name="FSDP2, batch x2, best, 80 % sparse", sparse=True),
    replace(TUNED, name="FSDP2, batch x2, best, fp8", fp8=True),
    replace(LARGE, name="FSDP2, batch x2, by document", attention="document"),
    replace(TUNED, name="FSDP2, batch x1, best", batch_factor=1),
    AS_RUNS,
    replace(TUNED, name="bf16 copies, batch x2, best", precision="copies"),
    replace(TUNED, name="FSDP2, batch x1, best, 4 micro-batches", batch_factor=1, accumulation=4),
    replace(TUNED, name="FSDP2, batch x2, best, resharded", reshard=True),
    replace(TUNED, name="FSDP2, batch x2, best, chunked loss", loss="chunked"),
    replace(TUNED, name="FSDP2, batch x2, best, plain loss", loss="plain"),
    PLAIN_TRAINER,
    TORCHTITAN,
    Variant("Trainer, bf16, compiled by blocks", trained_by="Trainer"),
    replace(TUNED, name="FSDP2, batch x4, best, chunked loss", loss="chunked", batch_factor=4),
    replace(
        TUNED, name="FSDP2, batch x2, best, coordinate descent", inductor=(("coordinate_descent_tuning", True),)
    ),
    replace(LARGE, name="FSDP2, batch x2, efficient", attention="efficient"),
    replace(LARGE, name="FSDP2, batch x2, flex", attention="flex_attention"),
    replace(TUNED, name="bf16 copies, batch x2, best, one graph", precision="copies", compiled="model"),
)  # fmt: skip
"""The variants to measure if there are only minutes, the most important ones first."""
VARIANTS = (
    *TELLING,
    replace(TUNED, name="FSDP2, batch x2, best, 80 % sparse, fp8", fp8=True, sparse=True),
    Variant("eager blocks, sdpa", compiled=False),
    BASE,
    *(
        replace(BASE, name=f"compiled blocks, {name}", attention=name)
        for name in ("cudnn", "flash", "efficient", "flash_attention_2", "flash_attention_3")
    ),
    replace(BASE, name="compiled blocks, chunked loss", loss="chunked"),
    replace(BASE, name="compiled blocks, liger loss", loss="liger"),
    replace(BASE, name="compiled blocks, AdamW not fused", fused_adamw=False),
    replace(BASE, name="compiled blocks, sdpa, 80 % sparse", sparse=True),
)
