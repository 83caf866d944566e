"""Golden files of Hyena: small random weights in each layout, and the logits that the originals' own code gives for them.

    python -m tests.make_golden_hyena --hyena-dna PATH --safari PATH --hf PATH

The paths are checkouts of HazyResearch/hyena-dna (d553021) and HazyResearch/safari (02220c6), and a folder with
modeling_hyena.py and configuration_hyena.py, the remote code of an -hf repository (from shubhamtkr/checkpoint-62500, 18ec652).
The originals need einops. What they import beyond that and do not use here is stood in for by empty modules.

    hf          the -hf model with a head for language, as save_pretrained writes it: one name of `freq`, z as a parameter
    hf-buffer   the same with z as a buffer, which is what the file of the checkout has
    hf-score    the -hf model for sequence classification
    lightning   HyenaDNA's standalone model under Lightning's prefix, z as a buffer, all three names of `freq`
    infix       the same, trained with gradient checkpointing: mixer.layer, mlp.layer
    safari      safari's operator in that model, z trained, modulate False, as the Pile checkpoint is evaluated
    safari-modulate   the same with modulate True and no shift

safari's own language model needs flash-attn, which needs CUDA: its operator stands in HyenaDNA's standalone block, which is the
same block. The standalone model has no head for language: logits are its hidden states times its embedding, tied as theirs.
"""

import argparse
import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedTokenizer

GOLDEN = Path(__file__).parent / "golden"
IDS = torch.arange(26).reshape(2, 13) * 5 % 12
IDS_WITHOUT_PADDING = torch.where(IDS == 4, 7, IDS)

SMALL = {"d_model": 8, "n_layer": 2, "d_inner": 16, "vocab_size": 12, "pad_vocab_size_multiple": 8}
HF = {
    **SMALL,
    "model_type": "hyenadna",
    "architectures": ["HyenaDNAForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_hyena.HyenaConfig", "AutoModelForCausalLM": "modeling_hyena.HyenaDNAForCausalLM"},
    "activation_freq": 10,
    "emb_dim": 5,
    "embed_dropout": 0.1,
    "filter_order": 8,
    "hyena_dropout": 0.0,
    "hyena_filter_dropout": 0.0,
    "hyena_order": 2,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "max_seq_len": 18,
    "num_inner_mlps": 2,
    "pad_token_id": 4,
    "short_filter_order": 3,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "train_freq": True,
    "transformers_version": "4.35.0.dev0",
    "use_bias": True,
}
LAYER = {"_name_": "hyena", "emb_dim": 5, "filter_order": 8, "short_filter_order": 3, "l_max": 18, "w": 10}
ORIGINAL = {
    **SMALL,
    "resid_dropout": 0.0,
    "embed_dropout": 0.1,
    "fused_mlp": False,
    "fused_dropout_add_ln": True,
    "residual_in_fp32": True,
    "layer": {**LAYER, "modulate": True, "lr": 6e-4, "wd": 0.0, "lr_pos_emb": 0.0},
}
SAFARI = {
    **SMALL,
    "_name_": "lm",
    "embed_dropout": 0.0,
    "fused_mlp": True,
    "fused_dropout_add_ln": True,
    "residual_in_fp32": True,
    "layer": {"_name_": "hyena", "emb_dim": 9, "filter_order": 8, "local_order": 3, "l_max": 18, "modulate": False, "w": 14},
}


@contextmanager
def stand_ins(path: Path, **names: dict[str, Any]) -> Iterator[None]:
    """Modules with these names alone, and `path` first in line."""
    for name, content in names.items():
        module = sys.modules[name.replace("__", ".")] = types.ModuleType(name.replace("__", "."))
        module.__dict__.update(content, __path__=[])
    sys.path.insert(0, str(path))
    try:
        yield
    finally:
        sys.path.remove(str(path))
        for name in names:
            del sys.modules[name.replace("__", ".")]


def original(path: Path, name: str) -> types.ModuleType:
    """A module of HyenaDNA: its standalone model, or the tokenizer of its training code."""
    depth = {"StochasticDepth": lambda p, mode: nn.Identity()}  # of probability 0 everywhere
    tokens = {"AddedToken": AddedToken, "PreTrainedTokenizer": PreTrainedTokenizer}
    with stand_ins(path, torchvision={}, torchvision__ops=depth, transformers__tokenization_utils=tokens):
        return importlib.import_module(name)


def safari_operator(path: Path, optim_module: type[nn.Module]) -> type[nn.Module]:
    """safari's HyenaOperator; its registry and its helpers are one line each here."""
    modules: dict[str, type] = {}

    def assign(self: nn.Module, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    config = {"instantiate": lambda registry, name, partial: modules[name], "auto_assign_attrs": assign}
    parts = {
        "src": {},
        "src__utils": {},
        "src__utils__registry": {"layer": {}},
        "src__utils__train": {"OptimModule": optim_module},
        "src__utils__config": config,
        "src__models": {},
        "src__models__nn": {"Activation": lambda name: nn.Identity()},
    }
    with stand_ins(path, **parts):
        # A stand-in is found in sys.modules alone; an import would also have made it its package's attribute.
        sys.modules["src"].utils = sys.modules["src.utils"]  # type: ignore[attr-defined]
        sys.modules["src.utils"].registry = sys.modules["src.utils.registry"]  # type: ignore[attr-defined]
        spec = importlib.util.spec_from_file_location("safari_hyena", path / "src/models/sequence/hyena.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    modules["hyena-filter"] = module.HyenaFilter
    return module.HyenaOperator


def remote_code(path: Path) -> types.ModuleType:
    """The modeling file of an -hf repository, as a package of its own."""
    package = types.ModuleType("hyena_remote")
    package.__path__ = [str(path)]
    sys.modules["hyena_remote"] = package
    return importlib.import_module("hyena_remote.modeling_hyena")


@torch.no_grad()
def draw(model: nn.Module) -> nn.Module:
    """Weights with a spread that trained models have, z apart from its formula where it is a parameter."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "norm" in name or "ln_f" in name:
            p.copy_(noise / 4 + name.endswith("weight"))
        elif name.endswith((".z", ".freq")):
            p.add_(noise / 20)
        elif "implicit_filter" in name:
            p.copy_(noise / 16)  # sines of w times that, layer after layer: more, and rounding alone makes 1e-5
        else:
            p.copy_(noise * (1.0 if p.dim() == 1 else p[0].numel() ** -0.5))
    return model.eval()


def write(name: str, config: dict[str, Any], weights: dict[str, Tensor], logits: Tensor, ids: Tensor = IDS) -> None:
    tensors = {f"weights.{key}": x.detach().clone().contiguous() for key, x in weights.items()}
    tensors |= {"ids": ids, "logits": logits.detach()}
    save_file(tensors, GOLDEN / f"hyena-{name}.safetensors", metadata={"config": json.dumps(config)})


def without_aliases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What safetensors keeps of tensors with several names: the first."""
    seen: set[int] = set()
    return {key: x for key, x in weights.items() if not (x.data_ptr() in seen or seen.add(x.data_ptr()))}


def make_hf(path: Path) -> None:
    code = remote_code(path)
    config = code.HyenaConfig(**HF)
    buffer = draw(code.HyenaDNAForCausalLM(config))
    write("hf-buffer", HF, without_aliases(buffer.state_dict()), buffer(IDS).logits)

    for module in buffer.modules():
        if "z" in module._buffers:
            module.z = nn.Parameter(module._buffers.pop("z"))
    parameter = draw(buffer)
    write("hf", HF, without_aliases(parameter.state_dict()), parameter(IDS).logits)

    config.num_labels = 3
    score = draw(code.HyenaDNAForSequenceClassification(config))
    (*rows,) = (score(row[None]).logits for row in IDS_WITHOUT_PADDING)  # they pool the last token then
    labels = {"id2label": {str(i): name for i, name in enumerate(("promoter", "enhancer", "junk"))}}
    fields = {**HF, **labels, "architectures": ["HyenaDNAForSequenceClassification"]}
    write("hf-score", fields, without_aliases(score.state_dict()), torch.cat(rows), IDS_WITHOUT_PADDING)


def make_original(name: str, code: types.ModuleType, config: dict[str, Any], prefix: str, infix: bool = False) -> None:
    model = draw(code.HyenaDNAModel(**{**config, "layer": dict(config["layer"])}))
    embedding = model.backbone.embeddings.word_embeddings.weight
    weights = {f"{prefix}{key}": x for key, x in model.state_dict().items()} | {f"{prefix}lm_head.weight": embedding}
    if infix:
        weights = {key.replace(".mixer.", ".mixer.layer.").replace(".mlp.", ".mlp.layer."): x for key, x in weights.items()}
    write(name, config, weights, model(IDS) @ embedding.T)


def make_tokens(code: types.ModuleType) -> None:
    """The ids of HyenaDNA's tokenizer in training; that of the standalone file puts a [CLS] in front."""

    class Tokenizer(code.CharacterTokenizer):
        """Transformers 5 asks for the vocabulary before the original has made it."""

        def get_vocab(self) -> dict[str, int]:
            special = ["[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]"]
            return self.__dict__.get("_vocab_str_to_int", {token: i for i, token in enumerate(special)})

    tokenizer = Tokenizer(characters=list("ACGTN"), model_max_length=18)
    texts = ["ACGTN", "", "acgt", "AC GT\n\nN", "NNNNACGTACGTX", "A[MASK]C", "[PAD]AC[SEP]G"]
    ids = {text: tokenizer(text)["input_ids"] for text in texts}
    (GOLDEN / "dna_tokens.json").write_text(json.dumps(ids, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("hyena-dna", "safari", "hf"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    paths = parser.parse_args()
    GOLDEN.mkdir(exist_ok=True)
    make_hf(paths.hf)
    code = original(paths.hyena_dna, "standalone_hyenadna")
    make_original("lightning", code, ORIGINAL, "model.")
    make_original("infix", code, {**ORIGINAL, "checkpoint_mixer": True, "checkpoint_mlp": True}, "model.", infix=True)
    code.HyenaOperator = safari_operator(paths.safari, code.OptimModule)
    make_original("safari", code, SAFARI, "")
    make_original("safari-modulate", code, {**SAFARI, "layer": {**SAFARI["layer"], "modulate": True}}, "")
    make_tokens(original(paths.hyena_dna / "src/dataloaders/datasets", "hg38_char_tokenizer"))
