"""Tokens a second and MFU of training one model on one device, setting by setting: attention, loss, compilation.

    python -m tests.benchmarks.throughput [--profile]     -> runs/bench/throughput.json
    python -m tests.benchmarks.throughput --hidden 128 --layers 2 --heads 4 --vocabulary 512 --length 64 --batch 2 --steps 3

By default the 1B model of the series on a GPU; on a CPU give a small one, as in the second line. Random tokens, no
network, and nothing but torch and transformers. Every variant trains in a process of its own from the same seed, one after
the other, with a loss that stays on the device until its last step; a variant that this machine cannot run is written
down with the reason. MFU counts 6 FLOPs a linear weight and 12 x layers x hidden x length a token, against --peak TFLOP/s.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks import titan
from tests.benchmarks.common import in_process, write_rows
from tests.benchmarks.fsdp import shard

MODULE = "tests.benchmarks.throughput"
OUTPUT = Path("runs/bench/throughput.json")
PEAK_TFLOPS = 989.5
"""Dense bf16 of an H100 SXM and an H200."""
WARM_UP = 3
CHUNK_TOKENS = 2048
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Workload:
    """What is trained, the same for every variant."""

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

    def flops_per_token(self) -> int:
        linear = 16 * self.hidden**2 * self.layers + self.vocabulary * self.hidden
        return 6 * linear + 12 * self.layers * self.hidden * self.length

    def batches(self, device: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.length)
        return [torch.randint(self.vocabulary, shape, generator=generator).to(device) for _ in range(4)]


@dataclass(frozen=True)
class Variant:
    """`attention`: eager, sdpa (torch chooses), one of BACKENDS, flash_attention_2 or _3; `loss`: plain, chunked, liger;
    `precision`: autocast, or fsdp2, which casts each unit's weights as runs do; `trained_by`: the loop of this file, or the
    code of somebody else, for which the other settings say nothing."""

    name: str
    attention: str = "sdpa"
    loss: str = "plain"
    precision: str = "autocast"
    compiled: bool = True
    fused_adamw: bool = True
    sparse: bool = False
    trained_by: Literal["loop", "Trainer", "torchtitan"] = "loop"


BASE = Variant("compiled blocks, sdpa")
VARIANTS = (
    Variant("plain Trainer, bf16", compiled=False, trained_by="Trainer"),
    Variant("Trainer, bf16, compiled by blocks", trained_by="Trainer"),
    Variant("eager blocks, sdpa", compiled=False),
    BASE,
    *(
        replace(BASE, name=f"compiled blocks, {backend}", attention=backend)
        for backend in BACKENDS
        if backend != "math"
    ),
    replace(BASE, name="compiled blocks, flash_attention_2", attention="flash_attention_2"),
    replace(BASE, name="compiled blocks, flash_attention_3", attention="flash_attention_3"),
    replace(BASE, name="compiled blocks, chunked loss", loss="chunked"),
    replace(BASE, name="compiled blocks, liger loss", loss="liger"),
    replace(BASE, name="compiled blocks, cudnn, chunked loss", attention="cudnn", loss="chunked"),
    replace(BASE, name="compiled blocks, AdamW not fused", fused_adamw=False),
    replace(BASE, name="compiled blocks, sdpa, FSDP2", precision="fsdp2"),
    replace(BASE, name="compiled blocks, sdpa, 80 % sparse", sparse=True),
    Variant("torchtitan", trained_by="torchtitan"),
)


@dataclass
class Result:
    name: str
    seconds: float = 0.0
    """Median of a step."""
    tokens_per_second: float = 0.0
    mfu: float | None = None
    peak_bytes: int | None = None
    last_loss: float | None = None
    skipped: str | None = None
    """Why the variant did not run."""
    settings: dict[str, Any] = field(default_factory=dict)
    profile: list[dict[str, Any]] = field(default_factory=list)


def measured(work: dict[str, int], name: str, device: str, peak_tflops: float, profile: bool) -> dict[str, Any]:
    """The body of a process: one variant alone on the device, as plain data."""
    torch.set_float32_matmul_precision("high")
    (variant,) = (variant for variant in VARIANTS if variant.name == name)
    return asdict(measure(Workload(**work), variant, device, peak_tflops, profile))


def measure(work: Workload, variant: Variant, device: str, peak_tflops: float, profile: bool = False) -> Result:
    """Train one variant; what fails is a result with the reason."""
    settings = asdict(variant) if variant.trained_by == "loop" else {"trained_by": variant.trained_by}
    result = Result(variant.name, settings=settings)
    try:
        if variant.trained_by == "Trainer":
            seconds, loss = run_trainer(work, device, variant.compiled)
        else:
            own = variant.trained_by == "loop"
            step = make_step(work, variant, device) if own else titan.make_step(work, device)
            seconds, loss = run_steps(step, work, device)
            result.profile = profiled(step, work, device) if profile else []
    except Exception as error:
        # One variant's missing library or kernel must not cost the figures of the others.
        result.skipped = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return result
    return with_figures(result, seconds, loss, work, device, peak_tflops)


def with_figures(
    result: Result, seconds: list[float], loss: float, work: Workload, device: str, peak_tflops: float
) -> Result:
    result.seconds = statistics.median(seconds)
    result.tokens_per_second = work.batch * work.length / result.seconds
    result.last_loss = loss
    if device == "cuda":
        result.mfu = result.tokens_per_second * work.flops_per_token() / (peak_tflops * 1e12)
        result.peak_bytes = torch.cuda.max_memory_allocated()
    return result


def make_step(work: Workload, variant: Variant, device: str) -> Callable[[Tensor], Tensor]:
    """A function from tokens [batch, length] to the loss on the device, with the update made."""
    torch.manual_seed(0)
    attention = variant.attention if variant.attention.startswith(("eager", "flash_attention")) else "sdpa"
    with torch.device(device):
        model = LlamaForCausalLM._from_config(work.config(), dtype=torch.float32, attn_implementation=attention)
    if variant.compiled:
        for block in model.model.layers:
            block.compile()
    objective = Objective(model, LOSSES[variant.loss](model))
    by_autocast = variant.precision == "autocast"
    if not by_autocast:
        shard(model, torch.device(device), torch.bfloat16, root=objective)
    # FSDP2 makes parameters of its own, which are the ones to update.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=variant.fused_adamw
    )
    after_step = make_sparse(model, optimizer) if variant.sparse else lambda: None
    backend = BACKENDS.get(variant.attention)

    def step(tokens: Tensor) -> Tensor:
        kernel = sdpa_kernel(backend) if backend is not None else contextlib.nullcontext()
        with kernel:
            with torch.autocast(device, torch.bfloat16, enabled=by_autocast):
                loss = objective(tokens)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        after_step()
        optimizer.zero_grad()
        return loss.detach()

    return step


class Objective(nn.Module):
    """From tokens [batch, length] to the loss: one module, which FSDP2 can have as its root."""

    def __init__(self, model: LlamaForCausalLM, loss_of: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
        return self.loss_of(hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def make_sparse(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Prune to 80 %; what the callback does after each update."""
    from sparsity import Geometric, SparsityCallback

    callback = SparsityCallback(Geometric(0.8, 0, 0, 1), report=False)
    callback.bind(model)
    callback.prune(0.2, optimizer)
    return lambda: callback.on_optimizer_step(None, None, None, optimizer=optimizer)  # type: ignore[arg-type]


def plain_loss(model: LlamaForCausalLM) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda hidden, targets: F.cross_entropy(model.lm_head(hidden).float(), targets)


def chunked_loss(model: LlamaForCausalLM) -> Callable[[Tensor, Tensor], Tensor]:
    """Logits of a few tokens at a time, computed again on the way back: they are never there as a whole."""

    def part(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(hidden).float(), targets, reduction="sum")

    compiled = torch.compile(part) if model.device.type == "cuda" else part

    def loss(hidden: Tensor, targets: Tensor) -> Tensor:
        parts = zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
        sums = [checkpoint(compiled, some, wanted, use_reentrant=False) for some, wanted in parts]
        return torch.stack(sums).sum() / len(targets)  # type: ignore[arg-type]

    return loss


def liger_loss(model: LlamaForCausalLM) -> Callable[[Tensor, Tensor], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, targets: fused(model.lm_head.weight.to(hidden.dtype), hidden, targets)


LOSSES = {"plain": plain_loss, "chunked": chunked_loss, "liger": liger_loss}


def run_steps(step: Callable[[Tensor], Tensor], work: Workload, device: str) -> tuple[list[float], float]:
    """Seconds of each step after the warm-up and the last loss; the host waits for the device once a step, behind it."""
    batches, seconds = work.batches(device), []
    loss = torch.zeros(())
    for index in range(WARM_UP + work.steps):
        if index == WARM_UP and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        loss = step(batches[index % len(batches)])
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[WARM_UP:], float(loss)


def profiled(step: Callable[[Tensor], Tensor], work: Workload, device: str, rows: int = 25) -> list[dict[str, Any]]:
    """Where the time of three steps goes: the operations that take most of it, in microseconds of the device."""
    batches = work.batches(device)
    with torch.profiler.profile() as found:
        for index in range(3):
            step(batches[index])
        if device == "cuda":
            torch.cuda.synchronize()

    def own_time(event: Any) -> float:
        return float(event.self_device_time_total if device == "cuda" else event.self_cpu_time_total)

    events = sorted(found.key_averages(), key=own_time, reverse=True)
    total = sum(own_time(event) for event in events) or 1.0
    return [
        {"name": event.key, "microseconds": own_time(event), "share": own_time(event) / total, "calls": event.count}
        for event in events[:rows]
    ]


def run_trainer(work: Workload, device: str, compiled: bool) -> tuple[list[float], float]:
    """Seconds of each step after the warm-up and the last loss of `transformers.Trainer` as it comes, with bf16 alone: what
    a user would write first; or compiled as runs are."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from train.compiled import compile_by_blocks

    laps: list[float] = []

    class Lap(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
                if len(laps) == WARM_UP:
                    torch.cuda.reset_peak_memory_stats()
            laps.append(time.perf_counter())

    class KeepsLoss(Trainer):
        last = torch.zeros(())

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(*args, **kwargs)
            self.last = found.detach()
            return found

    tokens = torch.cat(work.batches("cpu"))
    blocks = [{"input_ids": row, "labels": row} for row in tokens] * (-(-(WARM_UP + work.steps + 1) // 4))
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=WARM_UP + work.steps + 1, per_device_train_batch_size=work.batch, bf16=True,
            use_cpu=device == "cpu", report_to="none", save_strategy="no", disable_tqdm=True, torch_compile=compiled,
        )  # fmt: skip
        with torch.device(device):
            model = LlamaForCausalLM(work.config())
        compile_by_blocks(model, arguments)
        trainer = KeepsLoss(model, arguments, train_dataset=blocks, callbacks=[Lap()])  # type: ignore[arg-type]
        trainer.train()
    return [after - before for before, after in pairwise(laps)][WARM_UP:], float(trainer.last)


def measure_all(work: Workload, device: str, peak_tflops: float, names: str, profile: bool) -> Iterator[dict[str, Any]]:
    """Each variant in a process of its own, so that none finds the memory of another."""
    for variant in VARIANTS:
        if names in variant.name:
            try:
                yield in_process(MODULE, "measured", asdict(work), variant.name, device, peak_tflops, profile)
            except subprocess.CalledProcessError as error:
                yield asdict(Result(variant.name, skipped=f"its process ended with {error.returncode}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Workload()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--peak", type=float, default=PEAK_TFLOPS, help="TFLOP/s of the device, for MFU")
    parser.add_argument("--profile", action="store_true", help="write where each variant's time goes")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    work = Workload(**{name: getattr(options, name) for name in asdict(Workload())})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and work == Workload():
        sys.exit("error: the 1B model needs a GPU: on a CPU give a small one, see --help.")
    rows = []
    for row in measure_all(work, device, options.peak, options.only, options.profile):
        rows.append({**row, **asdict(work)})
        mfu = "" if row["mfu"] is None else f"  MFU {row['mfu']:.1%}"
        memory = "" if row["peak_bytes"] is None else f"  {row['peak_bytes'] / 2**30:.1f} GiB"
        figures = f"{row['tokens_per_second']:12,.0f} tokens/s{mfu}{memory}  loss {row['last_loss']}"
        print(f"{row['name']:<40} {'skipped: ' + row['skipped'] if row['skipped'] else figures}", flush=True)
        write_rows(rows, options.output)
    print(options.output)


if __name__ == "__main__":
    main()
