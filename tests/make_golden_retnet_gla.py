"""Golden files of RetNet and GLA: small random weights in two layouts, and what the originals' own code makes of them.

    python -m tests.make_golden_retnet_gla --syncdoth PATH --gla PATH --fla PATH

The paths are checkouts of syncdoth/RetNet (2634bbf), berlino/gated_linear_attention (9d83fa0), and of
fla-org/flash-linear-attention as it was when the second imported it (c67b383a, January 2024). Both models were written for
Transformers 4: take 4.37. The second needs einops. Of other imports only names are used, for which empty modules stand in.

    retnet-syncdoth         the published shape in small: SwiGLU, embeddings scaled and normalised
    retnet-syncdoth-plain   GELU, neither, the head tied
    gla-original            the GLA of the paper

GLA's layer calls a Triton kernel, `fused_recurrent_gla`: flash-linear-attention's own plain form of it, `naive_recurrent_gla`,
stands in its place. "recurrent" logits are of the form that generates, "parallel" ones of the form that trains.
"""

import argparse
import importlib.util
import json
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.make_golden_hyena import GOLDEN, stand_ins

IDS = torch.arange(2 * 21).reshape(2, 21) ** 2 % 30 + 1

SYNCDOTH = {
    "architectures": ["RetNetForCausalLM"],
    "model_type": "retnet",
    "vocab_size": 31,
    "decoder_embed_dim": 16,
    "decoder_value_embed_dim": 28,
    "decoder_layers": 2,
    "decoder_retention_heads": 2,
    "decoder_ffn_embed_dim": 20,
    "initializer_range": 0.02,
    "layernorm_eps": 1.0e-6,
    "activation_fn": "swish",
    "dropout": 0.0,
    "activation_dropout": 0.0,
    "drop_path_rate": 0.0,
    "decoder_normalize_before": True,
    "layernorm_embedding": True,
    "no_scale_embedding": False,
    "recurrent_chunk_size": 512,
    "use_lm_decay": False,
    "use_glu": True,
    "z_loss_coeff": 0.0,
    "deepnorm": False,
    "subln": True,
    "use_ffn_rms_norm": False,
    "output_retentions": False,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "forward_impl": "parallel",
    "tie_word_embeddings": False,
    "is_decoder": True,
    "torch_dtype": "float32",
    "transformers_version": "4.37.2",
    "use_cache": True,
}
PLAIN = {
    **SYNCDOTH,
    "activation_fn": "gelu",
    "layernorm_embedding": False,
    "no_scale_embedding": True,
    "tie_word_embeddings": True,
}
GLA = {
    "architectures": ["GLAForCausalLM"],
    "model_type": "gla",
    "d_model": 16,
    "n_head": 2,
    "n_layer": 2,
    "vocab_size": 31,
    "context_length": 64,
    "use_gk": True,
    "use_gv": False,
    "load_from_llama": False,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.37.2",
    "use_cache": True,
}


@torch.no_grad()
def draw(model: nn.Module) -> nn.Module:
    """Weights with a spread that trained models have."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        is_norm = p.dim() == 1 and name.endswith("weight")
        p.copy_(noise / 4 + 1 if is_norm else noise * (0.5 if p.dim() == 1 else 0.7 * p.shape[-1] ** -0.5))
    return model.eval()


@torch.no_grad()
def write(name: str, config: dict[str, Any], model: nn.Module, **results: Tensor) -> None:
    """Weights under the names that save_pretrained writes, one of a tied pair, and what the model made of IDS."""
    seen: set[int] = set()
    kept = {key: x for key, x in model.state_dict().items() if not (x.data_ptr() in seen or seen.add(x.data_ptr()))}
    tensors = {f"weights.{key}": x.clone().contiguous() for key, x in kept.items()} | {"ids": IDS, **results}
    save_file(tensors, GOLDEN / f"{name}.safetensors", metadata={"config": json.dumps(config)})


def load(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def make_syncdoth(path: Path, name: str, fields: dict[str, Any]) -> None:
    with stand_ins(path, timm={}, timm__models={}, timm__models__layers={"drop_path": None}):
        from retnet.configuration_retnet import RetNetConfig
        from retnet.modeling_retnet import RetNetForCausalLM

    model = RetNetForCausalLM(RetNetConfig.from_dict(fields))
    model.tie_weights()
    draw(model)
    steps, past = [], None
    for t in range(IDS.shape[1]):
        out = model(IDS[:, : t + 1], forward_impl="recurrent", past_key_values=past, use_cache=True)
        past = out.past_key_values
        steps.append(out.logits[:, -1])
    parallel = model(IDS, forward_impl="parallel").logits
    tokens = model.custom_generate(IDS[:, :5], max_new_tokens=16, early_stopping=False)
    write(name, fields, model, parallel=parallel, recurrent=torch.stack(steps, 1), generated=tokens)


@torch.no_grad()
def make_gla(path: Path, fla: Path) -> None:
    parts = {"fla": {}, "fla__ops": {}, "fla__ops__gla": {}, "fla__ops__gla__recurrent_fuse": {"fused_recurrent_gla": None}}
    with stand_ins(fla, **parts):
        naive = load("naive_gla", fla / "fla/ops/gla/naive.py").naive_recurrent_gla
    operators = {"fused_recurrent_gla": naive, "fused_chunk_gla": None, "chunk_gla": None}
    with stand_ins(path, fla={}, fla__ops={}, fla__ops__gla=operators):
        from gla_model import GLAConfig, GLAForCausalLM
    model = draw(GLAForCausalLM(GLAConfig(**GLA)))
    write("gla-original", GLA, model, recurrent=model(IDS).logits)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("syncdoth", "gla", "fla"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    paths = parser.parse_args()
    make_syncdoth(paths.syncdoth, "retnet-syncdoth", SYNCDOTH)
    make_syncdoth(paths.syncdoth, "retnet-syncdoth-plain", PLAIN)
    make_gla(paths.gla, paths.fla)
