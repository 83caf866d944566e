"""Every family against Transformers' own common tests, from the checkout that TRANSFORMERS_CHECKOUT names.

git clone --depth 1 --branch v5.17.0 https://github.com/huggingface/transformers
TRANSFORMERS_CHECKOUT=transformers python -m pytest tests/transformers_suite

The tests are ModelTesterMixin, GenerationTesterMixin and the rest of CausalLMModelTest. What is overridden here is what the
tests of native recurrent models override too, and each says why.
"""

import unittest

import torch
from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester
from transformers import StaticCache
from transformers.models.auto import modeling_auto

from hf_linear.cache import HistoryLayer, StateLayer
from hf_linear.models import FAMILIES

MAPPINGS = (
    "MODEL_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
)
for config, *classes in FAMILIES:
    for mapping, cls in zip(MAPPINGS, classes, strict=True):
        getattr(modeling_auto, mapping)[config.model_type] = cls.__name__  # the mixins choose inputs by these names


class FamilyTester(CausalLMModelTester):
    """Tiny models of a family. `options` are the config fields beyond those that every tester has."""

    options: dict = {}  # noqa: RUF012

    def __init__(self, parent):
        super().__init__(parent, **self.options)


def tiny(model_type: str, **options) -> type[FamilyTester]:
    config, base, causal_lm, sequence, token = next(f for f in FAMILIES if f[0].model_type == model_type)
    attributes = {
        "config_class": config,
        "base_model_class": base,
        "causal_lm_class": causal_lm,
        "sequence_classification_class": sequence,
        "token_classification_class": token,
        "options": options,
    }
    return type(f"{base.__name__}Tester", (FamilyTester,), attributes)


class FamilyTest(CausalLMModelTest):
    """What changes for a recurrent model."""

    def test_moe_parallel_plans_shard_experts(self):
        """The base method wants experts in a plan of tensor or expert parallelism: there is no such plan, for no layer."""
        for model_class in self.all_model_classes:
            self.assertFalse(model_class.config_class.base_model_tp_plan or model_class.config_class.base_model_ep_plan)

    def test_model_weights_reload_no_missing_tied_weights(self):
        """The base method opens a file without a weight of the model, which draws it all with a warning: ours refuse it."""
        with self.assertRaisesRegex(ValueError, "a checkpoint must be in a known layout"):
            super().test_model_weights_reload_no_missing_tied_weights()

    def states(self, config) -> dict[str, tuple[int, ...]]:
        """Shapes of a layer's states without the batch, by name: what the model's cache must hold after a call."""
        raise NotImplementedError

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        """The base method knows Transformers' own layers by their exact type; ours is a subclass of them."""
        self.assertEqual(len(past_key_values), config.num_hidden_layers)
        for layer, kind in zip(past_key_values.layers, config.layer_types, strict=True):
            if kind == "linear_attention":
                self.assertIsInstance(layer, StateLayer)
                shapes = {name: tuple(state.shape[1:]) for name, state in layer.states.items()}
                expected = self.states(config)
                if isinstance(layer, HistoryLayer):  # grows, to at most twice the tokens
                    *rest, length = shapes["recurrent"]
                    self.assertLessEqual(length, 2 * seq_length)
                    shapes["recurrent"] = tuple(rest)
                self.assertEqual(shapes, expected)
                self.assertTrue(all(state.shape[0] == batch_size for state in layer.states.values()))
            else:
                length = seq_length
                if kind == "sliding_attention":  # a dynamic cache keeps what the next token will see besides itself
                    static = isinstance(past_key_values, StaticCache)
                    length = min(seq_length, config.sliding_window if static else config.sliding_window - 1)
                shape = (batch_size, config.num_key_value_heads, length, config.head_dim)
                self.assertEqual(layer.keys.shape, shape)
                self.assertEqual(layer.values.shape, shape)

    def test_attention_outputs(self):
        """As in Jamba's and Qwen3-Next's tests: attention layers alone give attention weights, and they come last."""
        if not self.has_attentions:
            self.skipTest("Model does not output attentions")
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config._attn_implementation = "eager"
        T = self.model_tester.seq_length
        attention_layers = sum(kind != "linear_attention" for kind in config.layer_types)
        for model_class in self.all_model_classes:
            model = model_class._from_config(config, attn_implementation="eager").eval()
            with torch.no_grad():
                short = model(**inputs, output_attentions=True, output_hidden_states=False)
                long = model(**inputs, output_attentions=True, output_hidden_states=True)
                model.config.output_attentions = True
                by_config = model(**inputs)
            for outputs in (short, long, by_config):
                shapes = [tuple(weights.shape[-3:]) for weights in outputs.attentions]
                self.assertEqual(shapes, [(config.num_attention_heads, T, T)] * attention_layers)
                self.assertIs(outputs.to_tuple()[-1], outputs.attentions)
            self.assertEqual(len(long), len(short) + 1)

    def test_custom_4d_attention_mask(self):
        """A recurrent layer passes every token on to all later ones. Native models ignore such a mask there; ours refuse it."""
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        _, _, input_ids, mask, position_ids = self._get_custom_4d_mask_test_data()
        for model_class in self.all_generative_model_classes:
            with self.assertRaisesRegex(ValueError, "attention_mask must be"):
                model_class(config)(input_ids, attention_mask=mask, position_ids=position_ids)


class PureTest(FamilyTest):
    """A family of recurrent layers alone, as Mamba2."""

    has_attentions = False

    def setUp(self):
        if "rope" in self._testMethodName:
            self.skipTest("no layer of attention, so none that reads the config's rotary positions")
        super().setUp()


class GLATest(PureTest, unittest.TestCase):
    model_tester_class = tiny("gla")

    def states(self, config):
        H = config.num_heads
        return {"recurrent": (H, config.key_dim // H, config.value_dim // H)}


class GLAShortConvTest(GLATest):
    model_tester_class = tiny("gla", use_short_conv=True, conv_size=4)

    def states(self, config):
        channels = 2 * config.key_dim + config.value_dim
        return {**super().states(config), "conv": (config.conv_size - 1, channels)}


class RetNetTest(GLATest):
    model_tester_class = tiny("retnet")


class LinearAttentionTest(GLATest):
    model_tester_class = tiny("linear_attention")

    def states(self, config):
        H = config.num_heads
        return {"recurrent": (H, config.key_dim // H, config.value_dim // H + 1)}  # one column for the normaliser


class HyenaTest(PureTest, unittest.TestCase):
    model_tester_class = tiny("hyena")

    def states(self, config):
        D, N = config.hidden_size, config.hyena_order
        return {"recurrent": ((N - 1) * D,), "conv": (config.short_filter_order - 1, (N + 1) * D)}


class LinearHybridTest(FamilyTest, unittest.TestCase):
    model_tester_class = tiny(
        "linear_hybrid",
        num_hidden_layers=4,
        pattern="GGGA",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )

    def states(self, config):
        gla = config.for_mixer("gla")
        return {"recurrent": (gla.num_heads, gla.key_dim // gla.num_heads, gla.value_dim // gla.num_heads)}

    @unittest.skip("GGGA has four layers at least")
    def test_num_layers_is_small(self):
        pass


class LeftPaddedTester(
    tiny(
        "linear_hybrid",
        num_hidden_layers=2,
        pattern="GS",
        sliding_window=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
):
    """As `generate` asks of a decoder; the base class pads on the right, and what is generated then lies behind padding."""

    def prepare_config_and_inputs(self):
        config, input_ids, token_type_ids, mask, *labels = super().prepare_config_and_inputs()
        input_ids[input_ids == config.pad_token_id] += 1  # drawn among the others, it would be padding inside a sequence
        return config, input_ids, token_type_ids, mask.flip(-1), *labels


class SlidingHybridTest(LinearHybridTest):
    model_tester_class = LeftPaddedTester

    def test_recurrent_layers_mask_padding_on_continued_forward(self):
        """A window counts places, those of padding too: native models see fewer tokens then, ours refuse the mask."""
        with self.assertRaisesRegex(ValueError, "attention_mask must not have padding inside"):
            super().test_recurrent_layers_mask_padding_on_continued_forward()

    def _check_attentions_for_generate(
        self, batch_size, attentions, prompt_length, output_length, config, decoder_past_key_values
    ):
        """The base method expects every key of the sequence, and a sliding layer keeps a window of them."""
        self.assertEqual(len(attentions), output_length - prompt_length)
        for step, (weights,) in enumerate(attentions):
            queries = keys = prompt_length + step
            if decoder_past_key_values is not None and step > 0:
                queries, keys = 1, min(keys, config.sliding_window)
            self.assertEqual(weights.shape, (batch_size, config.num_attention_heads, queries, keys))
