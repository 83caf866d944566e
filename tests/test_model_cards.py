"""The card of a saved model: valid metadata, and facts that are the model's."""

from itertools import chain
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_linear.cache import StateLayer
from model_cards.generate import FAMILIES, main, read_facts, write_card

PAPERS = {
    "gla": ["2312.06635"],
    "retnet": ["2307.08621"],
    "linear_attention": ["2006.16236"],
    "hyena": ["2302.10866", "2306.15794"],
    "linear_hybrid": ["2403.19887"],
}


def small_config(family: str, **fields):
    if family == "linear_hybrid":
        fields["pattern"] = "GA"
    return AutoConfig.for_model(family, hidden_size=64, num_hidden_layers=2, num_heads=2, vocab_size=96, **fields)


@pytest.fixture
def gla(tmp_path):
    """A folder with a saved model, for the tests where any family will do."""
    AutoModelForCausalLM.from_config(small_config("gla")).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("family", PAPERS)
def test_card_of_each_family(family, tmp_path):
    model = AutoModelForCausalLM.from_config(small_config(family)).eval()
    model.save_pretrained(tmp_path)
    card = ModelCard.load(
        write_card(
            tmp_path,
            name="house/small",
            language="en",
            license="apache-2.0",
            base_model="house/large",
            datasets=["house/texts"],
            metrics={"perplexity": 12.5},
        )
    )
    assert card.data.to_dict() == {
        "language": "en",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hf_linear", family],
        "base_model": "house/large",
        "datasets": ["house/texts"],
        "model-index": [
            {
                "name": "house/small",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"type": "house/texts", "name": "house/texts"},
                        "metrics": [{"type": "perplexity", "value": 12.5}],
                    }
                ],
            }
        ],
    }
    assert f"{model.num_parameters():,}" in card.text
    assert card.text.index("pip install hf_linear") < card.text.index("import hf_linear") < card.text.index("from_pretrained")
    assert 'AutoModelForCausalLM.from_pretrained("house/small")' in card.text
    assert all(f"https://arxiv.org/abs/{paper}" in card.text for paper in PAPERS[family])
    assert "| perplexity | 12.5 |" in card.text
    assert "{{" not in card.text and "{%" not in card.text


@pytest.mark.parametrize("length", [1, 70])
@pytest.mark.parametrize("family", PAPERS)
def test_state_is_that_of_a_real_cache(family, length, tmp_path):
    AutoModelForCausalLM.from_config(small_config(family), dtype=torch.bfloat16).save_pretrained(tmp_path)
    facts = read_facts(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    layers = model(torch.zeros(1, length, dtype=torch.long), use_cache=True).past_key_values.layers
    held = [layer.states.values() if isinstance(layer, StateLayer) else (layer.keys, layer.values) for layer in layers]
    assert facts.state_bytes + length * facts.state_bytes_per_token == sum(x.nbytes for x in chain(*held))


def test_state_in_closed_form(gla):
    facts = read_facts(gla)
    layers, heads, K, V, float32 = 2, 2, 16, 32, 4
    assert (facts.state_bytes, facts.state_bytes_per_token) == (layers * heads * K * V * float32, 0)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_over_shards_and_once_when_tied(tied, tmp_path):
    model = AutoModelForCausalLM.from_config(small_config("gla", tie_word_embeddings=tied))
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert read_facts(tmp_path).parameters == model.num_parameters()


def test_a_classifier_is_opened_as_one(tmp_path):
    AutoModelForSequenceClassification.from_config(small_config("gla")).save_pretrained(tmp_path)
    card = ModelCard.load(write_card(tmp_path))
    assert card.data.pipeline_tag == "text-classification"
    assert f'AutoModelForSequenceClassification.from_pretrained("{tmp_path.name}")' in card.text


def test_what_nobody_said_is_left_out(gla):
    metadata = ModelCard.load(write_card(gla)).data.to_dict()
    assert set(metadata) == {"library_name", "pipeline_tag", "tags"}


def test_one_data_set_needs_no_list(gla):
    assert ModelCard.load(write_card(gla, datasets="house/texts")).data.datasets == ["house/texts"]


def test_a_card_is_not_overwritten_unasked(gla):
    readme = gla / "README.md"
    readme.write_text("by hand")
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_card(gla)
    assert readme.read_text() == "by hand"
    write_card(gla, overwrite=True)
    assert "pip install hf_linear" in readme.read_text()


def test_a_folder_without_a_model(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"config\.json.*got \['notes\.txt'\].*save_pretrained"):
        write_card(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        write_card(tmp_path / "missing")


def test_a_family_without_a_page(gla):
    config = (gla / "config.json").read_text()
    (gla / "config.json").write_text(config.replace('"gla"', '"llama"'))
    with pytest.raises(ValueError, match=r"one of \['gla', .*got 'llama'.*model_cards/llama\.md"):
        write_card(gla)


def test_a_class_without_a_task(gla):
    config = (gla / "config.json").read_text()
    (gla / "config.json").write_text(config.replace("GLAForCausalLM", "GLAForSomething"))
    with pytest.raises(ValueError, match=r"end in one of \['ForCausalLM', .*got GLAForSomething"):
        write_card(gla)


def test_figures_without_their_data(gla):
    with pytest.raises(ValueError, match="evaluated_on"):
        write_card(gla, metrics={"perplexity": 12.5}, datasets=["house/texts", "house/more"])
    card = ModelCard.load(write_card(gla, metrics={"perplexity": 12.5}, evaluated_on="house/held-out"))
    assert card.data.eval_results[0].dataset_name == "house/held-out"


def test_figures_of_a_run_are_found(gla):
    (gla / "eval_results.json").write_text('{"eval_loss": 2.0, "eval_perplexity": 12.34567, "eval_bits_per_byte": 1.5}')
    card = ModelCard.load(write_card(gla))
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "perplexity": 12.35,
        "bits_per_byte": 1.5,
    }
    assert "On `held-out documents`:" in card.text
    card = ModelCard.load(write_card(gla, metrics={"accuracy": 0.5}, evaluated_on="house/held-out", overwrite=True))
    assert [result.metric_type for result in card.data.eval_results] == ["accuracy"]


def test_every_family_has_a_page():
    assert set(FAMILIES) == set(PAPERS)


def test_command_line(gla, monkeypatch, capsys):
    options = ["--datasets", "house/texts", "--metrics", "loss=2.5", "accuracy=0.5", "--language", "en", "de"]
    monkeypatch.setattr("sys.argv", ["generate", str(gla), *options])
    main()
    data = ModelCard.load(Path(capsys.readouterr().out.strip())).data
    assert data.datasets == ["house/texts"]
    assert data.language == ["en", "de"]
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {"loss": 2.5, "accuracy": 0.5}
    with pytest.raises(SystemExit):
        main()
    assert "--overwrite" in capsys.readouterr().err
