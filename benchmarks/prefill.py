"""Prefilling a long prompt in chunks: what a hybrid keeps, and what it needs besides.

    python -m benchmarks.prefill [--tokens N] [--chunk N]

Rows of suite "prefill": a Jamba of 3B parameters (28 layers, 2 of attention with one key-value head, dense MLPs; random
weights), one sequence, bfloat16. `beside` is the peak of allocated memory less the weights and the keys and values, which grow
by design: at the second chunk and at the last it must be the same. `state` is what the cache holds at the end; the peer's is
that of a Transformer with eight key-value heads of the same width, by arithmetic.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser

import torch
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicCache

from benchmarks.table import append
from hf_linear import LinearHybridConfig, LinearHybridForCausalLM
from hf_linear.cache import CACHE_NAME, StateLayer, cache_bytes

TOKENS, CHUNK = 1 << 18, 1 << 13
SHAPE = {
    "vocab_size": 65536,
    "hidden_size": 2560,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_heads": 20,
    "num_kv_heads": 1,
    "max_position_embeddings": TOKENS,
}
PATTERN = "MMMMMMMAMMMMMM"
PEER_KV_HEADS = 8


def key_value_bytes(cache: Cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if not isinstance(layer, StateLayer))


@torch.no_grad()
def prefill(tokens: int, chunk: int) -> None:
    config = LinearHybridConfig(pattern=PATTERN, mixer_options={"mamba": {"inner_layernorms": True}}, **SHAPE)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LinearHybridForCausalLM(config).to(torch.bfloat16).eval()
        ids = torch.randint(config.vocab_size, (1, tokens))
    weights = torch.cuda.memory_allocated()
    cache, beside, seconds = DynamicCache(config=config), [], []
    for part in tqdm(ids.split(chunk, 1), desc="prefill", unit="chunk"):
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        cache = model(part, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)[CACHE_NAME]
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        beside.append(torch.cuda.max_memory_allocated() - weights - key_value_bytes(cache))
    case = "jamba-3b", f"1 {tokens} by {chunk}", "bfloat16"
    append("prefill", *case, "prefill", "tok/s", tokens / sum(seconds), lower_is_better=False)
    append("prefill", *case, "beside, 2nd chunk", "GB", beside[1] / 1e9)
    append("prefill", *case, "beside, last chunk", "GB", beside[-1] / 1e9)
    transformer = 2 * config.num_hidden_layers * PEER_KV_HEADS * config.head_dim * tokens * torch.bfloat16.itemsize
    append("prefill", *case, "state", "GB", cache_bytes(cache) / 1e9, "Transformer", transformer / 1e9)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--chunk", type=int, default=CHUNK)
    args = parser.parse_args()
    prefill(args.tokens, args.chunk)
