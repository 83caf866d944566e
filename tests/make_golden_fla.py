"""Golden files of flash-linear-attention: small random weights, and the logits and tokens that its own models give for them.

    TRITON_INTERPRET=1 python -m tests.make_golden_fla --fla PATH

PATH is a folder with flash-linear-attention 0.6.0, fla-core 0.6.0 and einops, as `pip install --no-deps --target` makes it.
The interpreter needs numpy < 2.4, and fla's generation a Transformers before 5.24, where the cache has a new name by which fla
does not find it: 5.17 made these files. All is fla's own code, its Triton kernels run by the interpreter on a CPU, but for
* Triton's search for the fastest configuration, which asks for a device: the first one is taken;
* flash-attn, which needs CUDA: the attention layers of hybrids call PyTorch's, with the mask that flash-attn documents.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

GOLDEN = Path(__file__).parent / "golden"
IDS = torch.arange(26).reshape(2, 13) * 7 % 32
NEW_TOKENS = 10

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "vocab_size": 32,
    "intermediate_size": 24,
    "bos_token_id": None,
    "eos_token_id": None,
}
ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "rope_theta": 500.0}
CASES: dict[str, dict[str, Any]] = {
    "gla": {},
    "gla-unfused-tied": {"fuse_norm": False, "fuse_swiglu": False, "tie_word_embeddings": True},
    "gla-no-gate": {"use_output_gate": False, "expand_k": 1.0, "expand_v": 0.5},
    "gla-conv-kv": {"use_short_conv": True, "conv_size": 3, "num_heads": 4, "num_kv_heads": 2, "elementwise_affine": False},
    "gla-clamp-phi": {"clamp_min": -0.03, "feature_map": "sqrelu", "norm_eps": 1e-3},
    "gla-hybrid": {"attn": {"layers": [1], **ATTENTION, "window_size": 4}},
    "retnet": {},
    "retnet-unfused-tied": {"fuse_norm": False, "tie_word_embeddings": True, "expand_k": 0.5, "expand_v": 1.5},
    "retnet-no-gate-phi": {"use_output_gate": False, "feature_map": "silu"},
    "retnet-kv": {"num_heads": 4, "num_kv_heads": 2, "elementwise_affine": False},
    "retnet-hybrid": {
        "num_hidden_layers": 3,
        "attn": [{"layers": [0], **ATTENTION}, {"layers": [2], **ATTENTION, "window_size": 4}],
    },
}


def first_configuration(kernel: Any, *args: Any, **kwargs: Any) -> Any:
    return kernel.fn.run(*args, **{**kwargs, **kernel.configs[0].all_kwargs()})


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """flash_attn_func: the last query sees the last key, and `window_size[0]` more to the left of it, -1 for all."""
    assert causal
    last = k.shape[1] - q.shape[1]
    distance = torch.arange(k.shape[1], device=q.device) - torch.arange(q.shape[1], device=q.device)[:, None] - last
    seen = distance <= 0
    if window_size[0] >= 0:
        seen &= distance >= -window_size[0]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any) -> Tensor:
    """flash_attn_varlen_func: the rows of a batch one behind the other, their lengths maybe different."""
    options = {name: options[name] for name in ("causal", "window_size")}
    lengths = (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)
    rows = zip(*(x[None].split(cu.diff().tolist(), 1) for x, cu in zip((q, k, v), lengths, strict=True)), strict=True)
    return torch.cat([attend(*row, **options)[0] for row in rows])


@torch.no_grad()
def draw(model: nn.Module, gain: float = 1.5) -> None:
    """Weights that make every term of the model count; of a dozen seeds, the one by which rounding counts least (8e-6)."""
    torch.manual_seed(2)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight") or "g_norm" in name:
            p.copy_(1 + 0.3 * torch.randn_like(p))
        elif "embeddings" in name:  # the head too, where it is tied
            p.normal_(std=0.3)
        elif p.dim() == 1:
            p.normal_()
        else:
            p.normal_(std=gain * p[0].numel() ** -0.5)


@torch.no_grad()
def make(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name.partition("-")[0], **{**SMALL, **CASES[name]})
    model = AutoModelForCausalLM.from_config(config).eval()
    assert type(model).__module__.startswith("fla."), type(model)
    draw(model)
    logits = model(IDS, use_cache=False).logits
    tokens = model.generate(IDS, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)[:, IDS.shape[1] :]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        written = json.loads((Path(folder) / "config.json").read_text())
        weights = {f"weights.{key}": x for key, x in load_file(Path(folder) / "model.safetensors").items()}
    tensors = {**weights, "ids": IDS, "logits": logits, "tokens": tokens.contiguous()}
    save_file(tensors, GOLDEN / f"fla-{name}.safetensors", metadata={"config": json.dumps(written)})
    print(f"{name}: logits of size {logits.std():.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fla", type=Path, required=True)
    sys.path.insert(0, str(parser.parse_args().fla))
    import fla.layers.attn
    import fla.models
    from triton.runtime.autotuner import Autotuner

    Autotuner.run = first_configuration

    fla.layers.attn.flash_attn_func, fla.layers.attn.flash_attn_varlen_func = attend, attend_packed
    for name in CASES:
        make(name)
