"""Configs and the Auto classes: every way to make a model, what a config keeps, and what importing hf_linear does."""

import dataclasses
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from families import (
    FAMILIES,
    PRESETS,
    ROPE,
    SMALL_HYENA,
    TINY,
    ids,
    logits,
    spread_parameters,
    tiny_config,
    tiny_model,
)
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)

import hf_linear
from hf_linear import GLAConfig, HyenaConfig, LinearAttentionConfig, LinearHybridConfig, RetNetConfig
from hf_linear.models.linear_hybrid import LETTERS

HEADS = {
    "Model": AutoModel,
    "ForCausalLM": AutoModelForCausalLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
}
PACKAGE = str(Path(hf_linear.__file__).parent)
every_family = pytest.mark.parametrize("family", FAMILIES)


def config_class(family: str) -> type[PreTrainedConfig]:
    return getattr(hf_linear, f"{FAMILIES[family]}Config")


# --- Auto classes ----------------------------------------------------------------------------------------------------


@every_family
def test_auto_classes_by_model_type(family):
    options = {**TINY, "pattern": "GA"} if family == "linear_hybrid" else TINY
    config = AutoConfig.for_model(family, **options)
    assert type(config) is config_class(family)
    assert config.model_type == family
    for head, auto in HEADS.items():
        assert type(auto.from_config(config)) is getattr(hf_linear, f"{FAMILIES[family]}{head}")


HYBRIDS = {
    "pattern": {"pattern": "RSHA"},
    "repeated_pattern": {"pattern": "GA"},
    "mixers": {"mixers": ["retention", "sliding_attention", "hyena", "attention"]},
    "layer_types": {"layer_types": ["linear_attention", "sliding_attention", "linear_attention", "full_attention"]},
}
SPELT_OUT = {
    "pattern": HYBRIDS["mixers"]["mixers"],
    "repeated_pattern": ["gla", "attention"] * 2,
    "mixers": HYBRIDS["mixers"]["mixers"],
    "layer_types": ["gla", "sliding_attention", "gla", "attention"],
}
OPTIONS = {"retention": {"expand_v": 1.0, "num_heads": 4}, "hyena": SMALL_HYENA, "gla": {"use_short_conv": True}}


def hybrid(way: str, **options) -> LinearHybridConfig:
    given = {name: OPTIONS[name] for name in OPTIONS if name in SPELT_OUT[way]}
    shape = {**TINY, "num_hidden_layers": 4, "sliding_window": 8, "mixer_options": given}
    return LinearHybridConfig(**{**shape, **HYBRIDS[way], **options})


@pytest.mark.parametrize("way", HYBRIDS)
def test_hybrid(way, tmp_path):
    """By pattern, by mixers or by layer types: the same two lists, and a model that comes back as it went."""
    config = hybrid(way)
    attention = {"attention": "full_attention", "sliding_attention": "sliding_attention"}
    assert config.mixers == SPELT_OUT[way]
    assert config.layer_types == [attention.get(mixer, "linear_attention") for mixer in config.mixers]
    model = spread_parameters(AutoModelForCausalLM.from_config(config)).eval()
    classes = [type(layer.mixer).__name__.lower() for layer in model.model.layers]
    names = [name.replace("gla", "gatedlinearattention").replace("sliding_", "sliding") for name in config.mixers]
    assert classes == names
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    assert torch.equal(logits(again, ids(2, 12)), logits(model, ids(2, 12)))


def test_hybrid_options_reach_their_mixers_alone():
    config = hybrid("pattern")
    retention, hyena = config.for_mixer("retention"), config.for_mixer("hyena")
    assert (retention.num_heads, retention.expand_v, retention.value_dim) == (4, 1.0, 32)
    assert (hyena.num_heads, hyena.filter_order) == (2, 16)
    assert config.for_mixer("attention") is config
    assert config.num_heads == 2


def test_hybrid_of_nothing_given():
    assert LinearHybridConfig().mixers == ["gla", "gla", "gla", "attention"] * 6


@every_family
def test_attention_in_any_family(family):
    """Also a family of one mixer may have layers of attention; its own mixer stands for the recurrent ones."""
    cls = config_class(family)
    config = cls(**{**TINY, "layer_types": ["full_attention", "linear_attention"]})
    assert config.mixers == ["attention", cls.mixer]
    assert config.layer_types == ["full_attention", "linear_attention"]


# --- What a config keeps ---------------------------------------------------------------------------------------------

# A value other than the default for every field.
SHARED = {
    "vocab_size": 64,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 3,
    "head_dim": 10,
    "intermediate_size": 40,
    "hidden_ratio": 3,
    "hidden_act": "relu",
    "max_position_embeddings": 128,
    "norm_eps": 1e-3,
    "initializer_range": 0.1,
    "embedding_multiplier": 4.0,
    "use_embedding_norm": True,
    "attention_bias": True,
    "attention_output_gate": True,
    "use_qk_norm": True,
    "attention_multiplier": 0.5,
    "residual_multiplier": 0.25,
    "logits_scaling": 6,
    "fuse_linear_cross_entropy": True,
    "mlp_layer_types": ["sparse", "dense", "sparse"],
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "norm_topk_prob": False,
    "num_shared_experts": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.01,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    "sliding_window": 7,
    "layer_types": ["linear_attention", "full_attention", "sliding_attention"],
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 3,
    "eos_token_id": [4, 5],
}
GLA = {
    "expand_k": 0.75,
    "expand_v": 1.5,
    "feature_map": "relu",
    "use_short_conv": True,
    "conv_size": 3,
    "use_output_gate": False,
    "elementwise_affine": False,
    "gate_low_rank_dim": 8,
    "gate_logit_normalizer": 4,
    "clamp_min": -2.5,
    "output_gate_bias": True,
    "head_norm": "layer",
    "head_norm_eps": 1e-3,
}
RETNET = {
    "expand_k": 0.5,
    "expand_v": 1.5,
    "feature_map": "relu",
    "use_output_gate": False,
    "elementwise_affine": False,
    "retention_norm": "decay",
    "rope_style": "interleaved",
    "rope_frequencies": "linspace",
}
HYENA = {
    "hyena_order": 3,
    "short_filter_order": 4,
    "filter_order": 16,
    "filter_emb_dim": 5,
    "num_inner_mlps": 1,
    "activation_freq": 10,
    "train_freq": False,
    "train_filter_positions": False,
    "filter_modulate": False,
    "filter_shift": 0.05,
    "filter_normalize": True,
}
OTHER_THAN_DEFAULT = {
    "gla": {**GLA, "mixers": ["gla", "attention", "sliding_attention"], "tie_word_embeddings": True},
    "retnet": {**RETNET, "mixers": ["retention", "attention", "sliding_attention"], "tie_word_embeddings": True},
    "linear_attention": {
        "expand_k": 0.5,
        "expand_v": 1.5,
        "feature_map": "relu",
        "mixers": ["linear_attention", "attention", "sliding_attention"],
        "tie_word_embeddings": True,
    },
    "hyena": {**HYENA, "mixers": ["hyena", "attention", "sliding_attention"], "tie_word_embeddings": False},
    "linear_hybrid": {
        "pattern": "RAS",
        "mlp_pattern": "SDS",
        "adapter_rank": 8,
        "mixers": ["retention", "attention", "sliding_attention"],
        "mixer_options": {"retention": RETNET},
        "tie_word_embeddings": True,
    },
}


@every_family
def test_every_field_is_kept(family, tmp_path):
    cls, given = config_class(family), {**SHARED, **OTHER_THAN_DEFAULT[family]}
    ours = {field.name for field in dataclasses.fields(cls)} - {field.name for field in dataclasses.fields(PreTrainedConfig)}
    assert ours <= set(given), "a field without a value above"
    default = cls()
    assert [name for name, value in given.items() if getattr(default, name) == value] == []
    config = cls(**given)
    config.save_pretrained(tmp_path)
    for kept in (config, AutoConfig.from_pretrained(tmp_path), cls(**config.to_dict()), cls.from_dict(config.to_dict())):
        assert type(kept) is cls
        assert {name: getattr(kept, name) for name in given} == given


@pytest.mark.parametrize("rope", [None, ROPE], ids=["none", "rope"])
@every_family
def test_rope_parameters_are_kept(family, rope, tmp_path):
    """None means no positions; the base class of Transformers would fill in its default rotary ones."""
    options = {"pattern": "GA"} if family == "linear_hybrid" else {}
    config = config_class(family)(**{**TINY, **options, "rope_parameters": rope})
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert config.rope_parameters == again.rope_parameters == rope


def test_rope_theta_alone_is_rope_parameters():
    config = LinearHybridConfig(**{**TINY, "pattern": "GA", "rope_theta": 500.0})
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500.0}


@every_family
def test_names_of_transformers(family):
    """`num_attention_heads` reads, writes and makes what `num_heads` does, and is not saved beside it."""
    cls, shape = config_class(family), {**TINY, **({"pattern": "GA"} if family == "linear_hybrid" else {})}
    del shape["num_heads"]
    config = cls(**shape, num_attention_heads=4, num_key_value_heads=2)
    assert (config.num_heads, config.num_kv_heads) == (4, 2)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    config.num_attention_heads = 8
    assert config.num_heads == 8
    assert not {"num_attention_heads", "num_key_value_heads"} & set(config.to_dict())


def test_configs_of_flash_linear_attention_are_read():
    """Its config.json has fields of its own; those that change no result are kept, null is its word for no feature map."""
    own = {"attn_mode": "chunk", "fuse_norm": True, "fuse_cross_entropy": False, "use_l2warp": False, "attn": None}
    shape = {"hidden_size": 1024, "num_heads": 4, "num_kv_heads": None, "hidden_act": "swish", "intermediate_size": None}
    gla = GLAConfig(**shape, **own, feature_map=None, use_gk=True, use_gv=False)
    assert (gla.feature_map, gla.num_kv_heads, gla.intermediate_size) == ("identity", 4, 2816)
    retnet = RetNetConfig(**shape, **own, feature_map=None, use_short_conv=False, conv_size=4)
    assert (retnet.attn_mode, retnet.value_dim) == ("chunk", 2048)


# --- Presets and defaults --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls, name, millions",
    [(GLAConfig, "340M", 374), (RetNetConfig, "340M", 380), (GLAConfig, "1.3B", 1365), (RetNetConfig, "1.3B", 1352)],
)
def test_preset(cls, name, millions):
    """As large as the published models, with a vocabulary of 32000 and untied embeddings."""
    config = cls.from_preset(name)
    assert config == cls.from_preset(name, vocab_size=32000, tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)
    assert cls.from_preset(name, num_hidden_layers=2).num_hidden_layers == 2


@pytest.mark.parametrize(
    "name, billions",
    # As published, but for zamba: one block, not two, and it is half as wide without the embeddings beside its input.
    [("jamba", 51.6), ("granite-4", 32.2), ("qwen3-next", 80.0), ("minimax", 456.1), ("samba", 0.4216), ("zamba", 2.41)],
)
def test_preset_of_a_hybrid(name, billions):
    """As large as the model that it is named after, and in two of its periods the same layers in turn."""
    config = LinearHybridConfig.from_preset(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=2e-3)
    period = len(config.pattern)
    two = LinearHybridConfig.from_preset(name, num_hidden_layers=2 * period)
    for listed in ("mixers", "layer_types", "mlp_layer_types"):
        assert getattr(two, listed) == getattr(config, listed)[: 2 * period] == 2 * getattr(config, listed)[:period]


def test_plan_of_jamba():
    """Attention in layer 4 of 8, experts in every second layer from 1 on, no positions."""
    config = LinearHybridConfig.from_preset("jamba")
    assert [i for i, mixer in enumerate(config.mixers) if mixer == "attention"] == [4, 12, 20, 28]
    assert [i for i, mlp in enumerate(config.mlp_layer_types) if mlp == "sparse"] == list(range(1, 32, 2))
    assert config.rope_parameters is None and config.for_mixer("mamba").inner_layernorms


@pytest.mark.parametrize("letter", "GRLHMN")
def test_any_mixer_takes_the_linear_slots(letter):
    """Of a preset, its pattern can be another; the options of mixers that are gone go with them."""
    config = tiny_config("jamba", pattern=f"{letter}A", num_hidden_layers=4)
    assert config.mixers == [LETTERS[letter], "attention"] * 2
    assert config.mixer_options == ({"mamba": {"inner_layernorms": True}} if letter == "M" else {})
    assert logits(AutoModelForCausalLM.from_config(config).eval(), ids(1, 9)).isfinite().all()


def test_a_preset_with_its_layers_listed():
    layers = {"mixers": ["mamba2", "attention", "gla"], "mlp_layer_types": ["none", "sparse", "dense"]}
    config = LinearHybridConfig.from_preset("granite-4", num_hidden_layers=3, **layers)
    assert (config.mixers, config.mlp_layer_types) == tuple(layers.values()) and config.pattern is None
    assert config.mixer_options == {"mamba2": {"num_heads": 128}} and config.num_experts == 72


@pytest.mark.parametrize("name", PRESETS)
def test_preset_comes_back(name, tmp_path):
    """Through save_pretrained: every tensor once, those of a shared block too, and the same logits."""
    model = tiny_model(name, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    saved = load_file(tmp_path / "model.safetensors")
    assert sum(x.numel() for x in saved.values()) == sum(p.numel() for p in model.parameters())
    assert torch.equal(logits(again, ids(2, 12)), logits(model, ids(2, 12)))


def test_sites_of_a_shared_block():
    """What the sites share moves all of them, what a site has of its own moves it alone."""
    model, x = tiny_model("hybrid-shared"), ids(1, 9)
    first, second = model.model.layers[1:]
    shared, own = model.model.shared_block.mixer.k_proj.weight, second.mixer.k_proj[1].weight
    assert {name.split(".")[0] for name, _ in first.mixer.named_parameters()} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert sum(p.numel() for p in first.parameters()) < sum(p.numel() for p in model.model.shared_block.parameters())
    outputs = []
    for moved in (None, own, shared):
        if moved is not None:
            moved.data += 1
        outputs.append([h.detach() for h in model(x, output_hidden_states=True, use_cache=False).hidden_states])
    assert [torch.equal(a, b) for a, b in zip(*outputs[:2], strict=True)] == [True, True, True, False]
    assert [torch.equal(a, b) for a, b in zip(*outputs[1:], strict=True)] == [True, True, False, False]


@pytest.mark.parametrize(
    "hidden_size, hidden_ratio, expected", [(1024, 4, 2816), (2048, 4, 5632), (1024, 2, 1536), (2048, 2, 2816), (96, 4, 256)]
)
def test_default_width_of_the_mlp(hidden_size, hidden_ratio, expected):
    """hidden_size * hidden_ratio * 2 / 3, rounded up to a multiple of 256."""
    config = GLAConfig(hidden_size=hidden_size, hidden_ratio=hidden_ratio)
    assert config.intermediate_size == expected
    assert GLAConfig(hidden_size=hidden_size, intermediate_size=100).intermediate_size == 100


@pytest.mark.parametrize(
    "cls, expected",
    [
        (GLAConfig, {"hidden_size": 2048, "num_heads": 4, "head_dim": 512, "key_dim": 1024, "value_dim": 2048}),
        (RetNetConfig, {"hidden_size": 2048, "num_heads": 8, "head_dim": 256, "key_dim": 2048, "value_dim": 4096}),
        (LinearAttentionConfig, {"hidden_size": 2048, "num_heads": 16, "head_dim": 128, "key_dim": 2048, "value_dim": 2048}),
        (HyenaConfig, {"hidden_size": 864, "num_heads": 1, "intermediate_size": 1728, "tie_word_embeddings": True}),
        (LinearHybridConfig, {"hidden_size": 2048, "num_heads": 16, "head_dim": 128, "mixer_options": {}}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_defaults(cls, expected):
    config = cls()
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.num_kv_heads == config.num_heads
    assert config.rope_parameters is None
    assert len(config.mixers) == len(config.layer_types) == config.num_hidden_layers


# --- Importing -------------------------------------------------------------------------------------------------------


def fresh_process(code: str, *paths: Path) -> str:
    """What a new interpreter prints; a warning that the code does not catch is an error."""
    code = "import sys, warnings\n" + "".join(f"sys.path.insert(0, {str(path)!r})\n" for path in paths) + textwrap.dedent(code)
    options = {"capture_output": True, "text": True, "cwd": Path(PACKAGE).parent, "timeout": 300}
    result = subprocess.run([sys.executable, "-c", code], **options)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_importing_touches_nothing(tmp_path):
    """No triton, no CUDA context, no network: whatever a machine has, it is asked for when it is used."""
    (tmp_path / "triton").mkdir()  # there is none on most machines that run this test: one that says who asked for it
    (tmp_path / "triton" / "__init__.py").write_text(
        "import traceback\n"
        f"asked = [f.filename for f in traceback.extract_stack() if f.filename.startswith({PACKAGE!r})]\n"
        "print('\\n'.join(f'triton: {name}' for name in asked))\n"
        "raise ImportError('a triton that says who asked for it')\n"
    )
    printed = fresh_process(
        """
        import socket
        import torch
        import transformers.modeling_utils

        def called(what):
            def report(*args, **kwargs):
                print("called:", what)
                raise RuntimeError(what)
            return report

        torch.cuda._lazy_init = called("CUDA")
        socket.getaddrinfo = socket.socket.connect = called("network")
        before = set(sys.modules)
        import hf_linear
        assert "hf_linear.models.gla" in set(sys.modules) - before
        assert not any(name.split(".")[0] == "triton" for name in set(sys.modules) - before)
        assert not torch.cuda.is_initialized()
        """,
        tmp_path,
    )
    assert printed.strip() == ""


def test_another_library_came_first(tmp_path):
    """Its registration stays, a warning names the remedy, and ours works by name; so do the other families."""
    fresh_process(
        f"""
        from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedConfig

        class Other(PreTrainedConfig):
            model_type = "gla"

        class OtherForCausalLM(LlamaForCausalLM):
            config_class = Other

        AutoConfig.register("gla", Other)
        AutoModelForCausalLM.register(Other, OtherForCausalLM)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import hf_linear
        ours = [w for w in caught if "model_type" in str(w.message)]
        assert len(ours) == 1, [str(w.message) for w in caught]
        assert ours[0].category is UserWarning
        for part in ("'gla' belongs to __main__", "Import hf_linear before it", "hf_linear.GLAConfig"):
            assert part in str(ours[0].message), ours[0].message

        assert type(AutoConfig.for_model("gla")) is Other
        assert AutoModelForCausalLM._model_mapping[Other] is OtherForCausalLM
        assert type(AutoConfig.for_model("retnet")) is hf_linear.RetNetConfig

        model = hf_linear.GLAForCausalLM(hf_linear.GLAConfig(**{TINY}))
        model.save_pretrained({str(tmp_path)!r})
        assert type(hf_linear.GLAForCausalLM.from_pretrained({str(tmp_path)!r})) is hf_linear.GLAForCausalLM
        """
    )


def test_importing_again():
    """Reloaded, or imported anew as notebooks do: the Auto classes follow, without a warning."""
    fresh_process(
        f"""
        import importlib
        from transformers import AutoConfig, AutoModelForCausalLM
        import hf_linear

        first = hf_linear.GLAConfig
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            importlib.reload(hf_linear)
            assert hf_linear.GLAConfig is first
            for name in [name for name in sys.modules if name.split(".")[0] == "hf_linear"]:
                del sys.modules[name]
            import hf_linear
        assert hf_linear.GLAConfig is not first
        config = AutoConfig.for_model("gla", **{TINY})
        assert type(config) is hf_linear.GLAConfig
        assert type(AutoModelForCausalLM.from_config(config)) is hf_linear.GLAForCausalLM
        """
    )
