"""Training whole models on a GPU, beside flash-linear-attention's and Transformers' Llama of the same size, in one run.

    python -m benchmarks.models [gla-374m retnet-380m ...]

Weights and gradients in bfloat16, fused AdamW, eager; ours once more under torch.compile. Median tokens a second after a
warm-up, and the peak of allocated memory. Ours computes its loss without all logits at once (`fuse_linear_cross_entropy`);
fla runs with its defaults and with its field of that name. What benchmarks.kernels says of its tuning holds here too.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_linear
from benchmarks.table import append

try:
    import fla.models as fla
except ImportError:
    fla = None

B, T = 16, 2048
WARM_UP, STEPS = 4, 12
SIZE = {"hidden_size": 1024, "num_hidden_layers": 24, "vocab_size": 32000, "max_position_embeddings": T}
FAMILIES = {"gla-374m": "GLA", "retnet-380m": "RetNet"}
WITHOUT_LOGITS = {"fuse_linear_cross_entropy": True}


def build(library, name: str, **options) -> PreTrainedModel:
    config = getattr(library, f"{name}Config")(num_heads=4, **SIZE, **options)
    with torch.device("cuda"):
        return getattr(library, f"{name}ForCausalLM")(config).to(torch.bfloat16)


def llama() -> PreTrainedModel:
    with torch.device("cuda"):
        return LlamaForCausalLM(LlamaConfig(num_attention_heads=16, intermediate_size=2816, **SIZE)).to(torch.bfloat16)


def train(model: PreTrainedModel, compiled: bool = False) -> tuple[float, float]:
    """Tokens a second and peak GB of training steps on one batch."""
    gc.collect()  # what is left of the model before
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    ids = torch.randint(SIZE["vocab_size"], (B, T), device="cuda")
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True)
    call = torch.compile(model) if compiled else model
    seconds = []
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return B * T / statistics.median(seconds[WARM_UP:]), torch.cuda.max_memory_allocated() / 1e9


def measure(model: PreTrainedModel, name: str, compiled: bool = False) -> tuple[float, float]:
    speed, memory = train(model, compiled)
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {speed:,.0f} tok/s, {memory:.1f} GB", flush=True)
    return speed, memory


def peers(family: str) -> Iterator[tuple[str, tuple[float, float]]]:
    if fla is not None:
        name = f"fla {version('flash-linear-attention')}"
        yield name, measure(build(fla, family), name)
        name += " fused linear loss"
        yield name, measure(build(fla, family, fuse_cross_entropy=False, **WITHOUT_LOGITS), name)


def main() -> None:
    name = f"transformers {transformers.__version__} Llama"
    llama_row = name, measure(llama(), name)
    for case in sys.argv[1:] or FAMILIES:
        family = FAMILIES[case]
        eager = measure(build(hf_linear, family, **WITHOUT_LOGITS), case)
        for peer, (speed, memory) in [*peers(family), llama_row]:
            shape = case, f"{B} {T}", "bfloat16"
            append("model", *shape, "train", "tok/s", eager[0], peer, speed, lower_is_better=False)
            append("model", *shape, "peak", "GB", eager[1], peer, memory)
        speed, memory = measure(build(hf_linear, family, **WITHOUT_LOGITS), f"{case} compiled", compiled=True)
        append("model", *shape, "train compiled", "tok/s", speed, "eager", eager[0], lower_is_better=False)
        append("model", *shape, "peak compiled", "GB", memory, "eager", eager[1])


if __name__ == "__main__":
    main()
