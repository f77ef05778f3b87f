"""The steps that `tests.benchmarks.throughput` measures: transformers' LLaMA in our own loop, with any setting."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from tests.benchmarks.fsdp import shard
from train.data.collate import document_ends
from train.model.attention import attend_within_documents

if TYPE_CHECKING:
    from tests.benchmarks.throughput_variants import Variant, Workload

CHUNK_TOKENS = 4096
DENSITY = 0.2
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
OWN_ATTENTIONS = ("eager", "flash_attention", "flex_attention")
"""The prefixes of the attentions that transformers has in addition to sdpa."""


class Training:
    """A model with its optimizer and masks, trained step by step."""

    def __init__(self, work: Workload, variant: Variant, device: str) -> None:
        torch.manual_seed(0)
        self.variant, self.device = variant, device
        self.by_autocast = variant.precision == "autocast"
        attention = variant.attention if variant.attention.startswith(OWN_ATTENTIONS) else "sdpa"
        with torch.device(device):
            self.model: Any = LlamaForCausalLM._from_config(
                work.config(), dtype=torch.float32, attn_implementation=attention
            )
        self.masters = [param.detach().clone() for param in self.model.parameters()] if self.has_copies else []
        if self.has_copies:
            # Only the parameters change type: the rotary table stays in float32.
            for param in self.model.parameters():
                param.data = param.data.to(torch.bfloat16)
        if variant.attention == "document":
            attend_within_documents(self.model)
        if variant.fp8:
            use_float8(self.model)
        if variant.compiled is True:
            for block in self.model.model.layers:
                block.compile(backend=variant.backend, dynamic=False)
        objective = Objective(self.model, LOSSES[variant.loss](self.model), work, variant, device)
        if variant.precision == "fsdp2":
            # FSDP2 replaces the parameters, and the optimizer must update the new ones.
            in_forward = variant.loss in ("plain", "compiled")
            shard(
                self.model,
                torch.device(device),
                torch.bfloat16,
                root=objective,
                reshard=variant.reshard,
                tail=in_forward,
            )
        self.objective: Any = objective
        if variant.compiled == "model":
            objective.hidden = torch.compile(objective.hidden, backend=variant.backend, dynamic=False)  # type: ignore[method-assign]
        self.updated = [nn.Parameter(master) for master in self.masters] or list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.updated, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=variant.fused_adamw
        )
        self.callback: Any = None
        self.backend = BACKENDS.get(variant.attention)
        if variant.sparse:
            self.prune()

    @property
    def has_copies(self) -> bool:
        return self.variant.precision == "copies"

    def step(self, tokens: Tensor) -> Tensor:
        """Make an update from `accumulation` micro-batches of the same tokens; return the loss of the last one."""
        kernel = sdpa_kernel(self.backend) if self.backend is not None else contextlib.nullcontext()
        number = self.variant.accumulation
        with kernel:
            for index in range(number):
                if number > 1 and self.variant.precision == "fsdp2":
                    self.objective.set_requires_gradient_sync(index == number - 1)
                with torch.autocast(self.device, torch.bfloat16, enabled=self.by_autocast):
                    loss = self.objective(tokens)
                (loss / number).backward()
        if self.has_copies:
            self.take_gradients()
        nn.utils.clip_grad_norm_(self.updated, 1.0, foreach=True)
        self.optimizer.step()
        self.after_update()
        if self.has_copies:
            torch._foreach_copy_([param.data for param in self.model.parameters()], [p.data for p in self.updated])
            self.model.zero_grad()
        self.optimizer.zero_grad()
        return loss.detach()  # type: ignore[no-any-return]

    def take_gradients(self) -> None:
        for param, copy in zip(self.updated, self.model.parameters(), strict=True):
            param.grad = copy.grad.float()
            copy.grad = None

    # --- masks ---

    def prune(self) -> None:
        """Prune to 80 %; after this, gradients, weights and moments are masked as in a run."""
        from sparsity import Geometric, SparsityCallback

        self.callback = SparsityCallback(Geometric(1 - DENSITY, 0, 0, 1), report=False)
        self.callback.bind(self.model)
        self.callback.pruner.prune(DENSITY, self.optimizer)

    def after_update(self) -> None:
        """Do what the callback does after each update."""
        if self.callback is not None:
            self.callback.on_optimizer_step(None, None, None, optimizer=self.optimizer)

    def unmask(self) -> None:
        self.callback.unbind()
        self.callback = None


class Objective(nn.Module):
    """A module that computes the loss from tokens [batch, length], and can be the root of FSDP2.

    It calls the blocks itself, because transformers' model waits for the device in every forward pass to learn whether
    sequences are packed.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        loss_of: Callable[[Tensor, Tensor], Tensor],
        work: Workload,
        variant: Variant,
        device: str,
    ) -> None:
        super().__init__()
        self.model, self.loss_of = model, loss_of
        self.mask: Any = flex_mask(work, device) if variant.attention == "flex_attention" else None
        self.documents = document_batch(work, device) if variant.attention == "document" else {}
        self.by_transformers = variant.attention.startswith(("eager", "flash_attention"))

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the last hidden states [batch, length, hidden]."""
        inner: Any = self.model.model
        if self.by_transformers:
            return inner(input_ids=tokens, use_cache=False).last_hidden_state  # type: ignore[no-any-return]
        values = inner.embed_tokens(tokens)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        positions, ends = self.documents.get("position_ids", positions), self.documents.get("cu_seq_lens_q")
        rotary = inner.rotary_emb(values, position_ids=positions)
        for block in inner.layers:
            values = block(
                values, attention_mask=self.mask, position_ids=positions, position_embeddings=rotary, cu_seq_lens_q=ends
            )
        return inner.norm(values)  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.hidden(tokens)
        # As in runs, the last position of a block has no target.
        targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
        return self.loss_of(hidden.flatten(0, 1), targets.flatten())


def document_batch(work: Workload, device: str) -> dict[str, Tensor]:
    """Return positions and ends of a micro-batch's documents, which have 5 to 2,500 tokens, about 500 on average."""
    lengths = [5, 60, 2500, 150, 700, 20, 400, 300, 90, 1000]
    ends = [sum(lengths[: count + 1]) for count in range(len(lengths))]
    every = work.batch * work.length
    starts = torch.tensor([turn * ends[-1] + end for turn in range(every // ends[-1] + 1) for end in ends])
    flat = torch.arange(every)
    begins = torch.zeros(every, dtype=torch.int64)
    cuts = torch.cat([starts[starts < every], flat[:: work.length]])
    begins[cuts] = cuts
    positions = (flat - begins.cummax(0).values).view(work.batch, work.length)
    return {"position_ids": positions.to(device), "cu_seq_lens_q": document_ends(positions).to(device)}


def flex_mask(work: Workload, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, q, k: q >= k, None, None, work.length, work.length, device=device)


def use_float8(model: nn.Module) -> None:
    """Convert the linear layers except the head to torchao's tensorwise float8."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(
        model,
        config=Float8LinearConfig.from_recipe_name("tensorwise"),
        module_filter_fn=lambda _, name: "lm_head" not in name,
    )


# --- losses: from hidden states [tokens, hidden] and targets [tokens], -100 for no target ---


def widened_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=-100)


def plain_loss(model: LlamaForCausalLM) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda hidden, targets: widened_cross_entropy(model.lm_head(hidden), targets)


def compiled_loss(model: LlamaForCausalLM) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss that runs use: one pass over the logits, which also converts them to float32."""
    compiled = (
        torch.compile(widened_cross_entropy, dynamic=False) if model.device.type == "cuda" else widened_cross_entropy
    )
    return lambda hidden, targets: compiled(model.lm_head(hidden), targets)


def chunked_loss(model: LlamaForCausalLM) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a loss that computes the logits of a few tokens at a time, and again in the backward pass: never all."""

    def summed(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")

    compiled = torch.compile(summed, dynamic=False) if model.device.type == "cuda" else summed

    def part(hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        return compiled(F.linear(hidden, weight), targets)  # type: ignore[no-any-return]

    def loss(hidden: Tensor, targets: Tensor) -> Tensor:
        # The head is not called as a module: under FSDP2 it belongs to the root, whose weights stay gathered for the whole
        # forward pass.
        weight = model.lm_head.weight
        pieces = zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
        sums = [checkpoint(part, some, wanted, weight, use_reentrant=False) for some, wanted in pieces]
        return torch.stack(sums).sum() / (targets != -100).sum()  # type: ignore[arg-type]

    return loss


def liger_loss(model: LlamaForCausalLM) -> Callable[[Tensor, Tensor], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, targets: fused(model.lm_head.weight.to(hidden.dtype), hidden, targets)


LOSSES = {"plain": plain_loss, "compiled": compiled_loss, "chunked": chunked_loss, "liger": liger_loss}


def predicted_bytes(work: Workload, variant: Variant, device: str) -> int | None:
    """Return the peak that `launch.plan` gives for such a step, or None if it cannot be computed here."""
    try:
        from conf.schema import ModelConfig
        from train.plan.memory import Setting, gpu_memory
    except ImportError:
        return None
    model = ModelConfig(
        name="benchmark", vocab_size=work.vocabulary, hidden_size=work.hidden, intermediate_size=4 * work.hidden,
        num_hidden_layers=work.layers, num_attention_heads=work.heads, num_key_value_heads=work.heads,
        max_position_embeddings=work.length,
    )  # fmt: skip
    setting = Setting(
        world_size=1, micro_batch_size=work.batch, sequence_length=work.length, accumulates=variant.accumulation > 1,
        compiled=variant.compiled, reshard_after_forward=variant.reshard,
    )  # fmt: skip
    return gpu_memory(model, work.num_linear() if variant.sparse else 0, setting).peak
