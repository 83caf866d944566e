"""Bad input is a ValueError that says what was got, what was wanted, and the way out. Nothing is ignored, cut or begun anew.

Those of ops are in test_ops_errors and test_ops_retention_views, what Transformers itself will not generate in test_generation.
"""

import re

import pytest
import torch
from families import (
    HYENA,
    LONGEST,
    ONE_OF_EACH,
    ROPE,
    ids,
    logits,
    new_cache,
    tiny_config,
    tiny_model,
)
from torch import Tensor
from transformers import Cache, DataCollatorWithFlattening, DynamicCache, PreTrainedModel, StaticCache

from hf_linear import GLAConfig, LinearHybridConfig
from hf_linear.ops import retention_chunkwise, retention_parallel, retention_recurrent

one_of_each = pytest.mark.parametrize("name", ONE_OF_EACH)
# Every kind of mask, state and history, for errors that no mixer sees.
KINDS = ["gla", "hyena", "hybrid-rope", "hybrid-nope-attention"]
ATTENTION = {"pattern": "A"}  # attention alone: whatever a recurrent layer would have noticed, nobody does


def model_of(name: str, **overrides) -> PreTrainedModel:
    if name == "hybrid-nope-attention":
        name, overrides = "hybrid-nope", ATTENTION | overrides
    return tiny_model(name, **overrides)


def refuses(*parts: str):
    """A ValueError with all of these in its message, in any order, and the way out behind a colon at its end."""
    way_out = r"(?=.*: [`\"A-Za-z][^:]*$)"
    return pytest.raises(ValueError, match="(?s)" + way_out + "".join(f"(?=.*{re.escape(part)})" for part in parts))


def cases(names: str, **rows: tuple):
    return pytest.mark.parametrize(names, rows.values(), ids=rows)


# --- Configs ---------------------------------------------------------------------------------------------------------

GOT = "got {!r}".format
EITHER = "change either"


@cases(
    "name, options, parts",
    mixer=("gla", {"mixers": ["gla", "mamba"]}, ("'attention', 'gla'", "got ['mamba']", "linear_hybrid")),
    mixer_of_another_family=("gla", {"mixers": ["gla", "hyena"]}, ("'attention', 'gla'", "got ['hyena']", "linear_hybrid")),
    mixer_of_a_hybrid=("hybrid-rope", {"pattern": None, "mixers": ["gla", "rwkv"] * 2}, ("'hyena'", "got ['rwkv']")),
    letter=("hybrid-rope", {"pattern": "GXGA"}, ("'G': 'gla'", "got 'GXGA'", "letters")),
    no_letter=("hybrid-rope", {"pattern": ""}, ("'G': 'gla'", "got ''", "letters")),
    pattern_of_another_length=("hybrid-rope", {"pattern": "GGA"}, ("num_hidden_layers = 4", "got 'GGA'", "write out")),
    pattern_and_mixers=("hybrid-rope", {"mixers": ["attention"] * 4}, ("'GGGA'", "got ['attention', ", "leave one out")),
    pattern_and_layer_types=(
        "hybrid-rope",
        {"layer_types": ["linear_attention"] * 4},
        ("'full_attention'", "got ['linear_attention', ", "leave one out"),
    ),
    mixers_and_layer_types=(
        "gla",
        {"mixers": ["gla", "attention"], "layer_types": ["full_attention", "linear_attention"]},
        ("['linear_attention', 'full_attention']", "got ['full_attention', 'linear_attention']", "leave one out"),
    ),
    layer_type=("gla", {"layer_types": ["linear_attention", "chunked_attention"]}, ("full_", "got ['chunked_attention']")),
    too_few_mixers=("gla", {"mixers": ["gla"]}, ("num_hidden_layers = 2", "got 1", "change")),
    too_many_layer_types=("gla", {"layer_types": ["linear_attention"] * 3}, ("num_hidden_layers = 2", "got 3", "change")),
    heads=("gla", {"num_heads": 3}, ("num_heads", "hidden_size = 32", "got 3", EITHER)),
    no_heads=("gla", {"num_heads": 0}, ("num_heads", "hidden_size = 32", "got 0", EITHER)),
    kv_heads=("gla", {"num_heads": 4, "num_kv_heads": 3}, ("num_kv_heads", "num_heads = 4", "got 3", EITHER)),
    more_kv_heads=("gla", {"num_kv_heads": 4}, ("num_kv_heads", "num_heads = 2", "got 4", EITHER)),
    expand_k=("gla", {"expand_k": 0.3}, ("expand_k = 9", "got 2", EITHER)),
    no_keys=("linear-elu", {"expand_k": 0}, ("expand_k = 0", "got 2", EITHER)),
    expand_v=("linear-elu", {"expand_v": 0.3}, ("expand_v = 9", "got 2", EITHER)),
    odd_keys_cannot_turn=("retnet", {"expand_k": 3 / 16}, ("2 * num_heads", "expand_k = 6", "got 4", EITHER)),
    feature_map=("gla", {"feature_map": "exp"}, ("feature_map", "'elu'", "'identity'", GOT("exp"))),
    feature_map_of_linear_attention=("linear-elu", {"feature_map": "exp"}, ("feature_map", "'elu'", GOT("exp"))),
    retention_norm=("retnet", {"retention_norm": "abs"}, ("retention_norm", "'decay', 'none'", GOT("abs"))),
    rope_style=("retnet", {"rope_style": "gptj"}, ("rope_style", "'half', 'interleaved'", GOT("gptj"))),
    rope_frequencies=("retnet", {"rope_frequencies": "yarn"}, ("rope_freq", "'linspace', 'standard'", GOT("yarn"))),
    hidden_act=("hyena", {"hidden_act": "swosh"}, ("hidden_act", "'silu'", GOT("swosh"))),
    clamp_min=("gla", {"clamp_min": 0.5}, ("clamp_min", "<= 0 or None", "got 0.5")),
    gate_logit_normalizer=("gla", {"gate_logit_normalizer": 0}, ("gate_logit_normalizer", "above 0", "got 0")),
    conv_size=("gla", {"conv_size": 0}, ("conv_size", "1 or more", "got 0")),
    hyena_order=("hyena", {"hyena_order": 1}, ("hyena_order", "2 or more", "got 1")),
    filter_emb_dim=("hyena", {"filter_emb_dim": 4}, ("filter_emb_dim", "odd and 3 or more", "got 4")),
    short_filter_order=("hyena", {"short_filter_order": 0}, ("short_filter_order", "1 or more", "got 0")),
    time_step=(
        "hybrid-mamba",
        {"mixer_options": {"mamba": {"time_step_min": 0.2}}},
        ("time_step_max = 0.1", "got 0.2", "leave"),
    ),
    state_size=("hybrid-mamba", {"mixer_options": {"mamba": {"state_size": 0}}}, ("state_size", "1 or more", "got 0")),
    n_groups=("hybrid-mamba2", {"mixer_options": {"mamba2": {"n_groups": 3}}}, ("num_heads = 2", "got 3", EITHER)),
    time_step_limit=(
        "hybrid-mamba2",
        {"mixer_options": {"mamba2": {"time_step_limit": [1.0, 0.1]}}},
        ("0 <= least <= largest", "got [1.0, 0.1]", "leave"),
    ),
    num_inner_mlps=("hyena", {"num_inner_mlps": -1}, ("num_inner_mlps", "0 or more", "got -1")),
    no_layer=("gla", {"num_hidden_layers": 0}, ("num_hidden_layers", "1 or more", "got 0")),
    no_mlp=("gla", {"intermediate_size": None, "hidden_ratio": 0}, ("intermediate_size", "1 or more", "got 0")),
    rope_type=("hybrid-rope", {"rope_parameters": ROPE | {"rope_type": "yearn"}}, ("'yarn'", "yearn", "None is for")),
    odd_channels_cannot_turn=("hybrid-rope", {"head_dim": 5}, ("even", "got 5", "change head_dim")),
    sliding_window=("hybrid-sliding", {"sliding_window": None}, ("1 or more tokens", "got None", "set it")),
    negative_window=("hybrid-sliding", {"sliding_window": -1}, ("1 or more tokens", "got -1", "set it")),
    options_of_no_mixer=("hybrid-rope", {"mixer_options": {"gal": {}}}, ("['gla']", GOT("gal"), "leave it out")),
    options_of_an_absent_mixer=("hybrid-rope", {"mixer_options": {"hyena": {}}}, ("['gla']", GOT("hyena"), "leave it out")),
    option=("hybrid-rope", {"mixer_options": {"gla": {"expandk": 1}}}, ("'expand_k'", "got ['expandk']")),
    option_of_all_layers=("hybrid-rope", {"mixer_options": {"gla": {"hidden_size": 64}}}, ("got ['hidden_size']", "hybrid")),
    option_value=("hybrid-rope", {"mixer_options": {"gla": {"feature_map": "exp"}}}, ("'elu'", GOT("exp"))),
    options_no_dict=("hybrid-rope", {"mixer_options": {"gla": 1}}, ("a dict of", "got 1")),
    mlp_layer_type=("hybrid-sparse", {"mlp_layer_types": ["moe", "dense"]}, ("'dense', 'sparse'", "got ['moe']", "mixers")),
    mlp_letter=("hybrid-shared", {"mlp_pattern": "-XD"}, ("'D': 'dense'", "got '-XD'", "letters")),
    mlp_pattern_and_list=("hybrid-shared", {"mlp_layer_types": ["dense"] * 3}, ("'-DD'", "got ['dense', ", "leave one out")),
    mlp_of_its_own=("hybrid-shared", {"mlp_pattern": "-D-"}, ("'dense' for shared_attention", "got ['dense', 'none']", "take")),
    adapter_rank=("hybrid-shared", {"adapter_rank": 0}, ("adapter_rank", "1 or more", "got 0")),
    too_few_mlps=("hybrid-sparse", {"mlp_layer_types": ["sparse"]}, ("num_hidden_layers = 2", "got 1", "change")),
    sparse_without_experts=("gla", {"mlp_layer_types": ["sparse"] * 2}, ("num_experts", "1 or more", "got 0", "dense")),
    negative_experts=("gla", {"num_experts": -1}, ("num_experts", "0 or more", "got -1")),
    more_than_all_experts=("hybrid-sparse", {"num_experts_per_tok": 6}, ("from 1 to num_experts = 5", "got 6", EITHER)),
    no_expert_of_a_token=("hybrid-sparse", {"num_experts_per_tok": 0}, ("from 1 to num_experts = 5", "got 0", EITHER)),
    odd_experts=("hybrid-sparse", {"moe_intermediate_size": 20}, ("moe_intermediate_size", "multiple of 8", "got 20", "round")),
    odd_hidden_size=("hybrid-sparse", {"hidden_size": 36}, ("hidden_size", "multiple of 8", "got 36", "round")),
    shared_experts=("hybrid-sparse", {"num_shared_experts": -1}, ("num_shared_experts", "0 or more", "got -1")),
    balance=("hybrid-sparse", {"router_aux_loss_coef": -1}, ("router_aux_loss_coef", "0 or more", "got -1")),
    # flash-linear-attention's own fields, where its models compute something else
    fla_attention=("gla", {"attn": {"layers": [1], "num_heads": 2}}, ("None", "got {'layers'", "`mixers`")),
    fla_no_decay=("gla", {"use_gk": False}, ("use_gk", "True", "got False", "flash-linear-attention")),
    fla_value_decay=("gla", {"use_gv": True}, ("use_gv", "False", "got True", "flash-linear-attention")),
    feature_map_of_retnet=("retnet", {"feature_map": "exp"}, ("feature_map", "'elu'", GOT("exp"))),
    fla_short_conv=("retnet", {"use_short_conv": True}, ("False", "got True", "flash-linear-attention")),
)
def test_config(name, options, parts):
    with refuses(*parts):
        tiny_config(name, **options)


@cases(
    "name, options, parts",
    unknown=("jambo", {}, ("'jamba', 'minimax'", GOT("jambo"), "fields")),
    depth=("jamba", {"num_hidden_layers": 12}, ("num_hidden_layers = 12", "got 'MMMMAMMM' of 8 layers", "change the depth")),
    experts=("jamba", {"num_experts": 1}, ("from 1 to num_experts = 1", "got 2", EITHER)),
)
def test_preset(name, options, parts):
    with refuses(*parts):
        LinearHybridConfig.from_preset(name, **options)


@cases(
    "name, field, meant",
    singular=("gla", "num_head", "num_heads"),
    joined=("gla", "use_shortconv", "use_short_conv"),
    dropped=("hybrid-rope", "patern", "pattern"),
    american=("retnet", "initialiser_range", "initializer_range"),
    answered_name=("gla", "num_attention_head", "num_attention_heads"),
)
def test_misspelt_field(name, field, meant):
    with refuses(f"no field {field!r}", f"did you mean {meant!r}?"):
        tiny_config(name, **{field: 4})


def test_unknown_preset():
    with refuses("gla", "'1.3B', '340M'", "got '7B'"):
        GLAConfig.from_preset("7B")


# --- Inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@cases(
    "inputs, parts",
    both=({"input_ids": ids(1, 7), "inputs_embeds": torch.zeros(1, 7, 32)}, ("exactly one of", "got both")),
    neither=({}, ("exactly one of", "got neither")),
    no_token=({"input_ids": ids(1, 0)}, ("T >= 1", "got embeddings of shape [1, 0, 32]")),
    no_batch=({"input_ids": ids(7)}, ("[B, T]", "shape [7, 32]")),
    narrow=({"inputs_embeds": torch.zeros(1, 7, 31)}, ("hidden_size = 32", "shape [1, 7, 31]")),
    few_positions=({"input_ids": ids(2, 7), "position_ids": torch.arange(6)[None]}, ("[2, 7]", "got [1, 6]", "leave them")),
    one_position=({"input_ids": ids(2, 7), "position_ids": torch.ones(2, 1)}, ("[2, 7]", "got [2, 1]", "leave them")),
    three_rows=({"input_ids": ids(2, 7), "position_ids": torch.ones(3, 7)}, ("[2, 7]", "got [3, 7]", "leave them")),
    short_mask=({"input_ids": ids(2, 7), "attention_mask": torch.ones(2, 6)}, ("[2, 7]", "got [2, 6]", "concatenate")),
    long_mask=({"input_ids": ids(2, 7), "attention_mask": torch.ones(2, 8)}, ("[2, 7]", "got [2, 8]", "concatenate")),
    mask_of_one_row=({"input_ids": ids(2, 7), "attention_mask": torch.ones(1, 7)}, ("[2, 7]", "got [1, 7]", "every row")),
)
def test_inputs(name, inputs, parts):
    with refuses(*parts):
        model_of(name)(**inputs)


@pytest.mark.parametrize("positions", [False, True], ids=["", "position_ids"])
@pytest.mark.parametrize("name", KINDS)
def test_mask_of_the_new_tokens_alone(name, positions):
    """It would leave a cached padding token visible, and count the new ones from zero."""
    model = model_of(name)
    options = {"position_ids": torch.arange(5, 7)[None]} if positions else {}
    with refuses("5 cached and 2 new tokens", "[1, 7]", "got [1, 2]", "concatenate"):
        model(ids(1, 2), attention_mask=torch.ones(1, 2), past_key_values=filled(model), **options)


@pytest.mark.parametrize("shape", [(1, 1, 7, 7), (1, 7, 7)], ids=["4D", "3D"])
@one_of_each
def test_a_recurrent_layer_hides_padding_only(name, shape):
    with refuses("[B, T] with 0 on padding", f"got {list(shape)}", "can hide padding only"):
        tiny_model(name)(ids(1, 7), attention_mask=torch.ones(shape).tril())


@cases(
    "values, got",
    documents=([1, 1, 1, 2, 2], "from 1 to 2"),
    soft=([0.5, 0.5, 1.0, 1.0, 1.0], "from 0.5 to 1.0"),
    additive=([-torch.inf, 0.0, 0.0, 0.0, 0.0], "from -inf to 0.0"),
)
@one_of_each
def test_a_mask_is_of_zeros_and_ones(name, values, got):
    with refuses("1 on tokens and 0 on padding", got, "cu_seq_lens_q"):
        tiny_model(name)(ids(1, 5), attention_mask=torch.tensor([values]))


def test_padding_inside_a_sliding_window():
    model = tiny_model("hybrid-sliding")
    mask = torch.tensor([[1] * 8 + [0] * 2 + [1] * 3])
    with refuses("sliding_window = 8", "got some", "pad the first call on the left"):
        model(ids(1, 3), attention_mask=mask, past_key_values=filled(model, 10))


# --- Longer than a filter of Hyena -----------------------------------------------------------------------------------


CALLS = {
    "forward": lambda model: model(ids(1, LONGEST + 1)),
    "cache": lambda model: model(ids(1, 6), past_key_values=filled(model, LONGEST - 5)),
    "padding": lambda model: model(ids(1, LONGEST + 1), attention_mask=torch.tensor([[0] * 3 + [1] * (LONGEST - 2)])),
    "generate": lambda model: generate(model, LONGEST - 5, 7),
    "generate_without_a_cache": lambda model: generate(model, LONGEST - 5, 7, use_cache=False),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", HYENA)
def test_longer_than_a_filter(name, call):
    with refuses(f"max_position_embeddings = {LONGEST}", f"got {LONGEST + 1} tokens", "shorten it, or train"):
        call(tiny_model(name))


@pytest.mark.parametrize("name", HYENA)
def test_a_packed_document_longer_than_a_filter(name):
    with refuses(f"max_position_embeddings = {LONGEST}", "document", f"got {LONGEST + 1} tokens", "shorten it, or train"):
        tiny_model(name)(ids(1, LONGEST + 9), cu_seq_lens_q=boundaries(LONGEST + 1, 8))


# --- Packed documents ------------------------------------------------------------------------------------------------


def boundaries(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


PACKED = {
    "cu_seq_lens_q": boundaries(4, 3),
    "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]]),
}


@cases(
    "rows, options, parts",
    rows=(2, lambda model: {}, ("one row", "got B = 2", "concatenate the rows")),
    padding=(1, lambda model: {"attention_mask": torch.tensor([[0] + 6 * [1]])}, ("None", "got a mask", "leave their padding")),
    mask=(1, lambda model: {"attention_mask": torch.ones(1, 7)}, ("None", "got a mask", "leave their padding")),
    cache=(1, lambda model: {"past_key_values": filled(model)}, ("None", "got a cache", "one document at a time")),
    new_cache=(1, lambda model: {"past_key_values": new_cache(model)}, ("None", "got a cache", "one document at a time")),
)
@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("name", KINDS)
def test_packed(name, form, rows, options, parts):
    model = model_of(name)
    with refuses(*parts):
        model(ids(rows, 7), **{form: PACKED[form]}, **options(model))


@cases(
    "cu_seqlens, parts",
    not_from_zero=(torch.tensor([1, 4, 7]), ("from 0 to T = 7", "got [1, 4, 7]")),
    short_of_the_end=(torch.tensor([0, 4, 6]), ("from 0 to T = 7", "got [0, 4, 6]")),
    beyond_the_end=(torch.tensor([0, 4, 8]), ("from 0 to T = 7", "got [0, 4, 8]")),
    falling=(torch.tensor([0, 5, 4, 7]), ("without falling", "got [0, 5, 4, 7]")),
    float32=(torch.tensor([0.0, 4.0, 7.0]), ("int32 or int64", "got torch.float32")),
    of_every_row=(torch.tensor([[0, 4, 7]]), ("1-D", "of shape [1, 3]")),
)
@pytest.mark.parametrize("name", KINDS)
def test_boundaries(name, cu_seqlens, parts):
    """Attention alone would take any boundaries, and see through them."""
    with refuses(*parts):
        model_of(name)(ids(1, 7), cu_seq_lens_q=cu_seqlens)


@pytest.mark.parametrize("name", KINDS)
def test_documents_that_only_a_foreign_field_names(name):
    batch = DataCollatorWithFlattening(return_position_ids=False, return_seq_idx=True)([{"input_ids": [1, 2]}] * 2)
    with refuses("need cu_seq_lens_q or position_ids", "got seq_idx alone", "add one"):
        model_of(name)(**batch)


@pytest.mark.parametrize("name", ["hybrid-nope", "hybrid-nope-attention"])
def test_boundaries_hold_whatever_the_positions_are(name):
    """Transformers reads documents from positions: with positions that run on, its mask would join what the others divide."""
    model, x = model_of(name), ids(1, 7)
    found = logits(model, x, cu_seq_lens_q=boundaries(4, 3), position_ids=torch.arange(7)[None])
    alone = torch.cat([logits(model, document) for document in x.split([4, 3], 1)], 1)
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-10)  # float64: see ROUNDING in contract.py


# --- Caches ----------------------------------------------------------------------------------------------------------


def filled(model: PreTrainedModel, tokens: int = 5) -> Cache:
    with torch.no_grad():
        return model(ids(1, tokens), use_cache=True).past_key_values


def generate(model: PreTrainedModel, prompt: int, new: int, **options) -> Tensor:
    return model.generate(ids(1, prompt), do_sample=False, max_new_tokens=new, **options)


ANOTHER = ("another model", "DynamicCache(config=model.config)")
SAME_SHAPE = {"expand_k": 0.5, "expand_v": 1.0}  # a RetNet whose states look like those of GLA


@cases(
    "name, options, other, other_options, parts",
    more_layers=("gla", {}, "gla", {"num_hidden_layers": 3}, ("2 layers", "got 3", ANOTHER[1])),
    fewer_layers=("hyena", {}, "hyena", {"num_hidden_layers": 1}, ("2 layers", "got 1", ANOTHER[1])),
    mixer_of_the_same_shape=("gla", {}, "retnet", SAME_SHAPE, ("fit GatedLinear", "got that of Retention", *ANOTHER)),
    other_mixer=("hyena", {}, "gla", {}, ("fit Hyena", "got that of GatedLinear", *ANOTHER)),
    other_order=("hybrid-rope", {}, "hybrid-rope", {"pattern": "AGGG"}, ("fit GatedLinear", "got that of Dyn", *ANOTHER)),
    state_of_another_width=("gla", {}, "gla", {"expand_v": 2.0}, ("= [1, 2, 8, 16]", "got [1, 2, 8, 32]")),
    state_of_another_head=("gla", {}, "gla", {"num_heads": 4}, ("= [1, 2, 8, 16]", "got [1, 4, 4, 8]")),
    one_state_too_many=("gla", {}, "gla", {"use_short_conv": True}, ("['recurrent']", "got ['conv', 'recurrent']", *ANOTHER)),
    one_state_too_few=("gla", {"use_short_conv": True}, "gla", {}, ("['conv', 'recurrent']", "got ['recurrent']", *ANOTHER)),
    more_taps=("hyena", {}, "hyena", {"short_filter_order": 4}, ("= [1, 2, 96]", "got [1, 3, 96]")),
    more_filters=("hyena", {}, "hyena", {"hyena_order": 3}, ("= [1, 2, 96]", "got [1, 2, 128]")),
    fewer_filters=("hyena", {"hyena_order": 3}, "hyena", {}, ("= [1, 2, 128]", "got [1, 2, 96]")),
    key_heads=("hybrid-nope", ATTENTION, "hybrid-nope", {**ATTENTION, "num_kv_heads": 2}, ("1, 1, 16", "got [1, 2", *ANOTHER)),
    key_width=("hybrid-nope", ATTENTION, "hybrid-nope", {**ATTENTION, "head_dim": 8}, ("1, 1, 16", "got [1, 1, 8", *ANOTHER)),
)
def test_cache_of_another_model(name, options, other, other_options, parts):
    cache = filled(tiny_model(other, **other_options))
    with refuses(*parts):
        tiny_model(name, **options)(ids(1, 3), past_key_values=cache)


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "hybrid-nope-attention"])
def test_cache_of_another_batch_or_dtype(name):
    model = model_of(name)
    with refuses("[2, ", "got [1, "):
        model(ids(2, 3), past_key_values=filled(model))
    with refuses("in torch.float64", "in torch.float32"):
        model(ids(1, 3), past_key_values=filled(model_of(name, dtype=torch.float32)))


@cases(
    "cache, got",
    without_a_config=(DynamicCache, "got 0"),
    legacy=(lambda: ((torch.zeros(1, 2, 5, 16),) * 2,) * 2, "got tuple"),
)
@one_of_each
def test_no_cache_of_any_model(name, cache, got):
    model = tiny_model(name)
    with refuses("past_key_values must", got, "pass DynamicCache(config=model.config)"):
        model(ids(1, 3), past_key_values=cache())


@pytest.mark.parametrize("name", HYENA)
def test_a_static_cache_cannot_hold_a_state_that_grows(name):
    model = tiny_model(name)
    for call in (
        lambda: model(ids(1, 3), past_key_values=StaticCache(config=model.config, max_cache_len=9)),
        lambda: generate(model, 3, 2, cache_implementation="static"),
    ):
        with refuses("DynamicCache for Hyena", "got StaticCache", "or none"):
            call()


# --- Views of retention ----------------------------------------------------------------------------------------------


@cases(
    "changes, parts",
    no_decay=({"g": None}, ("g must be [H]", "got None", "linear_attention")),
    integers=({"g": torch.zeros(3, dtype=torch.int64)}, ("g must be", "got torch.int64", ".float()")),
    q_of_two_axes=({"q": torch.zeros(6, 4)}, ("q must be [B, T, H, K]", "[6, 4]")),
    no_token=({name: torch.zeros(2, 0, 3, 4) for name in "qkv"}, ("T >= 1", "[2, 0, 3, 4]")),
    keys=({"k": torch.zeros(2, 6, 3, 5)}, ("k must be", "[2, 6, 3, 4]", "got [2, 6, 3, 5]")),
    state=({"initial_state": torch.zeros(2, 3, 4, 5)}, ("initial_state must be", "[2, 3, 4, 4]", "got [2, 3, 4, 5]")),
)
@pytest.mark.parametrize("view", [retention_parallel, retention_recurrent, retention_chunkwise])
def test_views_of_retention(view, changes, parts):
    inputs = {name: torch.zeros(2, 6, 3, 4) for name in "qkv"} | {"g": torch.zeros(3)}
    with refuses(*parts):
        view(**(inputs | changes))


def test_a_cache_under_both_its_names():
    model = tiny_model("gla")
    cache = filled(model)
    expected = model(ids(1, 3), past_key_values=filled(model)).logits
    assert torch.equal(model(ids(1, 3), cache=filled(model)).logits, expected)
    with refuses("a cache must be given once", "both past_key_values and cache", "leave one out"):
        model(ids(1, 3), past_key_values=cache, cache=cache)
