"""Decoding on a GPU: a token of a whole model, and the one launch that moves a layer's state.

    python -m benchmarks.decode [step models hyena ...]

Rows of suite "decode". Models of about 340M parameters in bfloat16 after a prompt of 512 tokens, eager with a dynamic cache and
compiled with a static one, beside flash-linear-attention's (eager: they do not compile in one graph) where it is installed and
Transformers' Llama. `shape` is "B prompt" of a model and "B H K V" of a step.

`hyena` is safari's 153M, eager, up to the end of its 2048 positions, beside a GLA of its depth, width and size: the median
token, and the worst one, the doubling of the states and their tiles included (docs/hyena.md).
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache
from triton.testing import do_bench

from benchmarks.kernels import GLA, MILLISECONDS, PEER, RETENTION, ceilings
from benchmarks.table import append
from hf_linear import GLAConfig, GLAForCausalLM, HyenaConfig, HyenaForCausalLM, RetNetConfig, RetNetForCausalLM
from hf_linear.cache import CACHE_NAME, StateLayer
from hf_linear.ops import recurrent_step, retention_decay

try:
    from fla import models as fla_models
    from fla.ops.gla import fused_recurrent_gla
    from fla.ops.simple_gla import fused_recurrent_simple_gla
except ImportError:
    fla_models = None

DEVICE = "cuda"
PROMPT, WARMUP, TIMED = 512, 16, 64  # tokens
BATCHES = (1, 32)
STEPS = [((B, *sizes), name) for B in BATCHES for sizes, name in (((4, 128, 256), GLA), ((4, 256, 512), RETENTION))]
OURS = {"gla-340m": (GLAForCausalLM, GLAConfig), "retnet-340m": (RetNetForCausalLM, RetNetConfig)}
LLAMA = f"transformers {version('transformers')} llama"


def step() -> None:
    """The op alone; its floor is the state once in and once out."""
    copy, _ = ceilings()
    for (B, H, K, V), name in STEPS:
        new = {"device": DEVICE, "dtype": torch.bfloat16}
        q, k, v = torch.randn(B, 1, H, K, **new), torch.randn(B, 1, H, K, **new), torch.randn(B, 1, H, V, **new)
        state = torch.zeros(B, H, K, V, device=DEVICE)
        g = F.logsigmoid(torch.randn(B, 1, H, K, device=DEVICE)).div(16) if name == GLA else retention_decay(H, q.device)

        def ours(inputs: tuple[Tensor, ...] = (q, k, v, g, state)) -> None:
            recurrent_step(*inputs, backend="triton")

        def peer(q: Tensor = q, k: Tensor = k, v: Tensor = v, g: Tensor = g, state: Tensor = state, name: str = name) -> None:
            kept = {"initial_state": state, "output_final_state": True}
            if name == GLA:
                fused_recurrent_gla(q, k, v, g, **kept)
            else:
                fused_recurrent_simple_gla(q, k, v, g_gamma=g, **kept)

        with torch.no_grad():
            theirs = None if fla_models is None else do_bench(peer, **MILLISECONDS)
            mine = do_bench(ours, **MILLISECONDS)
        floor = 1e3 * 2 * state.nbytes / copy
        append("decode", name, f"{B} {H} {K} {V}", "bfloat16", "step", "ms", mine, PEER, theirs, floor / mine)


def models() -> None:
    copy, _ = ceilings()
    for B in BATCHES:
        llama = milliseconds(new_llama, B, compiled=False)[0], milliseconds(new_llama, B, compiled=True)[0]
        for name, (model_class, config_class) in OURS.items():

            def new(model_class: type = model_class, config_class: type = config_class) -> PreTrainedModel:
                return model_class(config_class.from_preset("340M", vocab_size=32000))

            def new_peer(name: str = model_class.__name__, config_class: type = config_class) -> PreTrainedModel:
                config = config_class.from_preset("340M", vocab_size=32000).to_dict()
                fields = ("hidden_size", "num_hidden_layers", "num_heads", "expand_k", "expand_v", "intermediate_size")
                peer_config = getattr(fla_models, config_class.__name__)
                return getattr(fla_models, name)(peer_config(vocab_size=32000, **{field: config[field] for field in fields}))

            peer = None if fla_models is None else milliseconds(new_peer, B, compiled=False)[0]
            for compiled in (False, True):
                ours, least = milliseconds(new, B, compiled)
                case, floor = name + ("-compiled" if compiled else ""), 1e3 * least / copy
                shape = f"{B} {PROMPT}"
                append("decode", case, shape, "bfloat16", "step", "ms", ours, PEER, peer, floor / ours)
                append("decode", case, shape, "bfloat16", "step", "ms", ours, LLAMA, llama[compiled], floor / ours)


def hyena() -> None:
    def new_hyena() -> PreTrainedModel:
        return HyenaForCausalLM(HyenaConfig())

    def new_gla() -> PreTrainedModel:
        size = {"hidden_size": 864, "num_hidden_layers": 18, "intermediate_size": 1152, "vocab_size": 50264}
        return GLAForCausalLM(GLAConfig(num_heads=4, tie_word_embeddings=True, **size))

    prompt = HyenaConfig().max_position_embeddings - WARMUP - TIMED
    mine, peers = every_token(new_hyena, prompt), every_token(new_gla, prompt)
    for metric, reduce in (("step", statistics.median), ("worst", max)):
        append("decode", "hyena-153m", f"1 {prompt}", "bfloat16", metric, "ms", reduce(mine), "ours gla-153m", reduce(peers))


@torch.no_grad()
def every_token(new: Callable[[], PreTrainedModel], prompt: int) -> list[float]:
    """The time of each token of a batch of one from the prompt on, the second time over: whatever is made once is made."""
    torch.manual_seed(0)
    model = new().to(DEVICE, torch.bfloat16).eval()
    print(f"{type(model).__name__}: {model.num_parameters():,} parameters")
    ids = torch.randint(model.config.vocab_size, (1, prompt), device=DEVICE)
    for _ in range(2):
        cache, times = DynamicCache(config=model.config), []
        token = model(ids, use_cache=True, **{CACHE_NAME: cache}).logits[:, -1:].argmax(-1)
        for _ in range(WARMUP + TIMED):
            torch.cuda.synchronize()
            start = time.perf_counter()
            token = model(token, use_cache=True, **{CACHE_NAME: cache}).logits[:, -1:].argmax(-1)
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
    return times


def new_llama() -> PreTrainedModel:
    shape = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 2816}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32000, **shape))


@torch.no_grad()
def milliseconds(new: Callable[[], PreTrainedModel], B: int, compiled: bool) -> tuple[float, int]:
    """The median time of a token, from one choice of the likeliest to the next, and the bytes that a token moves at least:
    every weight but the embedding's once, every state in and out."""
    torch.manual_seed(0)
    model = new().to(DEVICE, torch.bfloat16).eval()
    if type(model).__module__.startswith("fla."):
        keyword, cache = "past_key_values", None  # it makes its own
    elif compiled:
        keyword, cache = CACHE_NAME, StaticCache(config=model.config, max_cache_len=PROMPT + WARMUP + TIMED)
    else:
        keyword, cache = CACHE_NAME, DynamicCache(config=model.config)
    output = model(torch.randint(32000, (B, PROMPT), device=DEVICE), use_cache=True, **{keyword: cache})
    token, cache = output.logits[:, -1:].argmax(-1), output[keyword]
    call = torch.compile(model, mode="reduce-overhead", fullgraph=True) if compiled else model
    times = []
    for _ in range(WARMUP + TIMED):
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.compiler.cudagraph_mark_step_begin()
        token = call(token, use_cache=True, **{keyword: cache}).logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    states = sum(x.nbytes for layer in cache.layers if isinstance(layer, StateLayer) for x in layer.states.values())
    del model, call, cache, output
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return statistics.median(times[WARMUP:]), weights + 2 * states


SUITES = {"step": step, "models": models, "hyena": hyena}

if __name__ == "__main__":
    for suite in sys.argv[1:] or SUITES:
        SUITES[suite]()
