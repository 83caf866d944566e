"""Training Hyena at a million tokens on one GPU.

    python -m benchmarks.hyena_training [mixer model ...] [--tokens N]

Rows of suite "hyena". `mixer` is one Hyena mixer of width 256, forward and backward in bfloat16, its filter included: the time,
and the peak of allocated memory, its input and the gradient of its output included. `model` is HyenaDNA's largest shape
(8 layers, width 256, vocabulary 16) with gradient checkpointing, a step of AdamW included. `shape` is "B T D" of the mixer,
"B T D layers" of the model.
"""

from __future__ import annotations

import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable

import torch

from benchmarks.table import append
from hf_linear import HyenaConfig, HyenaForCausalLM

TOKENS, D, LAYERS = 1 << 20, 256, 8
WARM_UP, STEPS = 2, 5
DEVICE = "cuda"


def config(tokens: int, layers: int = LAYERS) -> HyenaConfig:
    """HyenaDNA's, the filter as long as the sequence."""
    return HyenaConfig(
        vocab_size=16,
        hidden_size=D,
        num_hidden_layers=layers,
        intermediate_size=4 * D,
        max_position_embeddings=tokens,
        filter_emb_dim=5,
        activation_freq=10,
        filter_shift=0.05,
        train_filter_positions=False,
        fuse_linear_cross_entropy=True,
    )


def measure(call: Callable[[], None]) -> tuple[float, float]:
    """Median seconds of a call, and the GB that are allocated at its peak."""
    seconds = []
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:]), torch.cuda.max_memory_allocated() / 1e9


def mixer(tokens: int) -> None:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        layer = HyenaForCausalLM(config(tokens, layers=1)).to(torch.bfloat16).model.layers[0].mixer.train()
        x = torch.randn(1, tokens, D, dtype=torch.bfloat16, requires_grad=True)
        position_ids, dy = torch.arange(tokens)[None], torch.randn(1, tokens, D, dtype=torch.bfloat16)

    def call() -> None:
        y, _ = layer(x, position_ids=position_ids)
        y.backward(dy)
        x.grad = None
        layer.zero_grad()

    seconds, memory = measure(call)
    shape = "hyena-mixer", f"1 {tokens} {D}", "bfloat16"
    append("hyena", *shape, "fwd+bwd", "ms", 1e3 * seconds)
    append("hyena", *shape, "peak", "GB", memory)


def model(tokens: int) -> None:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = HyenaForCausalLM(config(tokens)).to(torch.bfloat16).train()
        ids = torch.randint(7, 11, (1, tokens))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def call() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds, memory = measure(call)
    shape = "hyenadna-large", f"1 {tokens} {D} {LAYERS}", "bfloat16"
    append("hyena", *shape, "train", "tok/s", tokens / seconds, lower_is_better=False)
    append("hyena", *shape, "peak", "GB", memory)


SUITES = {"mixer": mixer, "model": model}

if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", help=f"of {', '.join(SUITES)}; all of them when none is named")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    args = parser.parse_args()
    for name in args.suites or SUITES:
        SUITES[name](args.tokens)
