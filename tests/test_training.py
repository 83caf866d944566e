"""Recipes, packing, evaluation, resuming and LoRA, on models small enough for seconds."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from families import CONFIGS, PRESETS, ids, logits, one_layer_of_each_kind, tiny_model
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from training import data
from training.data import best_fit, collate, cut, encode, load_documents, train_tokenizer
from training.evaluate import evaluate
from training.finetune import finetuner
from training.pretrain import config_class, new_model, pretrainer
from training.recipe import DataRecipe, Recipe, build, load_recipe
from training.run import train

pytestmark = pytest.mark.usefixtures("data_cache")

RECIPES = sorted((Path(__file__).parents[1] / "training" / "recipes").glob("*.yaml"))
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 48}
FAMILIES = {
    "linear_attention": {},
    "retnet": {},
    "gla": {},
    "hyena": {"max_position_embeddings": 128},
    "linear_hybrid": {"pattern": "GRLHAS", "num_hidden_layers": 6, "sliding_window": 16, "max_position_embeddings": 128},
}
TEXTS = [
    f"Document {i} says " + " ".join(f"{word} {i * n % 7}" for n, word in enumerate(["state", "decay", "key"] * (i % 5 + 1)))
    for i in range(60)
] + ["é ü 漢字 🙂\n\tindented   spaces\n" * 3]


@pytest.fixture
def corpus(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / "corpus" / f"{i:02}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / "corpus" / f"{i:02}.txt").write_text(text, encoding="utf-8")
    return tmp_path / "corpus"


@pytest.fixture
def recipe(tmp_path, corpus):
    """A function that makes a small pretraining recipe, changed as the call says."""

    def make(model=None, trainer=(), data=(), output="out", **rest):
        return build(
            Recipe,
            "recipe",
            {
                "output_dir": str(tmp_path / output),
                "model": model or {"model_type": "gla", **SMALL},
                "data": {"path": "text", "data_files": f"{corpus}/*.txt", "held_out": 0.2, "sequence_length": 64} | dict(data),
                "tokenizer": None if model and "checkpoint" in model else {"vocab_size": 300},
                "trainer": {"max_steps": 8, "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True}
                | dict(trainer),
            }
            | rest,
        )

    return make


@pytest.fixture
def tokenizer():
    return train_tokenizer(Dataset.from_dict({"text": TEXTS}), 300)


def small_model(family, **fields):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **SMALL | FAMILIES[family] | {"vocab_size": 300} | fields)
    )


def losses(trainer):
    return {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}


# Recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_files_are_sound(path):
    recipe = load_recipe(path)
    if "checkpoint" not in recipe.model:
        fields = {key: value for key, value in recipe.model.items() if key != "model_type"}
        config = config_class(recipe)(**fields)
        assert config.num_hidden_layers == recipe.model["num_hidden_layers"]
    bf16_needs_a_gpu = {"bf16": False, "use_cpu": True}
    recipe.trainer |= bf16_needs_a_gpu
    assert recipe.training_arguments().learning_rate > 0


def test_every_section_rejects_a_misspelt_key(recipe):
    cases = {
        "output_dirr": lambda: recipe(output_dirr="x"),
        "hiden_size": lambda: pretrainer(recipe(model={"model_type": "gla", "hiden_size": 32})),
        "sequence_len": lambda: recipe(data={"sequence_len": 64}),
        "vocabsize": lambda: recipe(tokenizer={"vocabsize": 300}),
        "learning_rat": lambda: recipe(trainer={"learning_rat": 1e-3}),
        "lora_alfa": lambda: recipe(lora={"lora_alfa": 8}),
    }
    wanted = ["output_dir", "hidden_size", "sequence_length", "vocab_size", "learning_rate", "lora_alpha"]
    for (key, call), meant in zip(cases.items(), wanted, strict=True):
        with pytest.raises(ValueError, match=f"{key!r}; wanted one of .*{meant}.*Did you mean '{meant}'"):
            call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"model_type": "glaa"}}, "Did you mean 'gla'"),
        ({"model": {"hidden_size": 32}}, "wanted model_type"),
        ({"model": {"model_type": "gla", "vocab_size": 10}}, "wanted at least 300"),
        ({"tokenizer": None}, "tokenizer: got none"),
        ({"tokenizer": {}}, "wanted exactly one"),
        ({"tokenizer": {"vocab_size": 100}}, "wanted at least 258"),
        ({"lora": {"r": 4}}, "Use training.finetune"),
        ({"data": {"held_out": 1.5}}, "between 0 and 1"),
        ({"data": {"held_out": 0}}, "between 0 and 1"),
        ({"data": {"held_out": 0.1, "streaming": True}}, "a stream, whose length nobody knows"),
        ({"data": {"held_out": 1e-9}}, "holds out no document"),
        ({"data": {"held_out": 1000}}, "leaves no document to train on"),
        ({"data": {"sequence_length": 1}}, "tokens >= 2"),
        ({"data": {"column": "txt"}}, "Did you mean 'text'"),
        ({"data": {"data_files": "nowhere/*.txt"}}, "nowhere"),
        ({"data": {"data_files": None}}, "wanted files or globs"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_name_what_was_wanted(recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrainer(recipe(**changes))


def test_an_empty_corpus_is_an_error(recipe, corpus):
    for file in corpus.iterdir():
        file.write_text("")
    with pytest.raises(ValueError, match="got no text"):
        pretrainer(recipe())


def test_overrides_and_numbers(tmp_path):
    demo = next(path for path in RECIPES if path.stem == "demo")
    recipe = load_recipe(
        demo, ["trainer.learning_rate=5e-4", "trainer.max_steps=7", "data.held_out=3", "lora.r=4", "trainer.eval_strategy=no"]
    )
    assert recipe.trainer["learning_rate"] == 5e-4 and recipe.trainer["max_steps"] == 7
    assert recipe.data.held_out == 3 and recipe.lora == {"r": 4} and recipe.trainer["eval_strategy"] == "no"
    assert recipe.trainer["use_cpu"] is True
    with pytest.raises(ValueError, match=r"wanted section\.key=value"):
        load_recipe(demo, ["trainer.max_steps"])
    with pytest.raises(ValueError, match="no file"):
        load_recipe(tmp_path / "none.yaml")


# Documents


@pytest.mark.parametrize("options", [{}, {"streaming": True, "held_out": 5}], ids=["prepared", "streamed"])
def test_sources_give_the_same_documents(corpus, tmp_path, options):
    Dataset.from_dict({"body": TEXTS, "id": range(len(TEXTS))}).to_parquet(tmp_path / "c.parquet")
    Dataset.from_dict({"text": TEXTS}).to_json(tmp_path / "c.jsonl", force_ascii=False)
    sources = {
        "text": {"data_files": f"{corpus}/*.txt"},
        "parquet": {"data_files": str(tmp_path / "c.parquet"), "column": "body"},
        "json": {"data_files": [str(tmp_path / "c.jsonl")]},
    }
    for path, source in sources.items():
        train, held_out = load_documents(DataRecipe(path=path, **{"held_out": 0.2} | source | options))
        assert isinstance(train, IterableDataset) == bool(options)
        train, held_out = [d["text"] for d in train], list(held_out["text"])
        assert sorted(train + held_out) == sorted(TEXTS)
        assert 0 < len(held_out) < len(train)


def test_a_copy_of_a_held_out_document_never_trains(tmp_path):
    Dataset.from_dict({"text": TEXTS * 3}).to_parquet(tmp_path / "c.parquet")
    train, held_out = load_documents(DataRecipe(path="parquet", data_files=str(tmp_path / "c.parquet"), held_out=0.3))
    assert set(train["text"]).isdisjoint(held_out["text"])
    assert len(train) + len(held_out) == 3 * len(TEXTS)


def test_held_out_may_be_a_split_and_empty_documents_are_none(tmp_path):
    for split, texts in {"train": ["a", "", None, "b"], "validation": ["c"]}.items():
        Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "dataset" / f"{split}.parquet")
    train, held_out = load_documents(DataRecipe(path=str(tmp_path / "dataset"), held_out="validation"))
    assert list(train["text"]) == ["a", "b"] and list(held_out["text"]) == ["c"]


def test_the_standard_library_is_a_corpus():
    texts = list(data.read_standard_library())
    assert any("class ArgumentParser" in text for text in texts)
    assert not any("import unittest\n" in text and "class TestArgparse" in text for text in texts)


def test_tokenizer_keeps_every_byte(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for reopened in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in [*TEXTS, "\x00\x7f  \r\n\t ￿ 𐍈"]:
            ids = reopened(text)["input_ids"]
            assert ids[0] == reopened.bos_token_id  # a prompt starts as a document does
            assert reopened.decode(ids, skip_special_tokens=True) == text


def test_the_token_before_a_document_learns_even_if_it_pads_too(recipe, tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    embedding = new_model(recipe(), tokenizer).get_input_embeddings()
    assert embedding.padding_idx != tokenizer.bos_token_id


# Packing


@pytest.mark.parametrize("length", [2, 3, 7, 64])
@pytest.mark.parametrize("n", [2, 3, 7, 8, 64, 65, 200])
def test_every_token_but_the_first_is_a_target_once(n, length):
    pieces = cut(list(range(n)), length)
    assert [token for piece in pieces for token in piece[1:]] == list(range(1, n))
    assert all(2 <= len(piece) <= length for piece in pieces)


def test_rows_are_full_and_lose_nothing():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 65, (500,), generator=generator).tolist()
    pieces = [[i] * n for i, n in enumerate(lengths)]
    rows = best_fit(pieces, 64)
    assert sorted(piece for row in rows for piece in row) == sorted(pieces)
    assert all(sum(map(len, row)) <= 64 for row in rows)
    assert len(rows) <= 1.02 * math.ceil(sum(lengths) / 64)


def test_collated_row_keeps_documents_apart():
    batch = collate([{"input_ids": [[5, 6, 7], [8, 9]]}, {"input_ids": [[1, 2]]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9, -100, 2]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 7]


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_per_byte_is_that_of_each_document_alone(family, tokenizer):
    model = small_model(family).eval()
    nll = tokens = 0.0
    for document in encode(TEXTS, tokenizer):
        for piece in cut(document, 64):
            piece = torch.tensor([piece])
            scores = logits(model, piece)[0, :-1].double()
            nll += nn.functional.cross_entropy(scores, piece[0, 1:], reduction="sum").item()
            tokens += piece.shape[1] - 1
    n_bytes = len("".join(TEXTS).encode())
    figures = evaluate(model, tokenizer, Dataset.from_dict({"text": TEXTS}), 64)
    assert tokens == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)  # every token of the text, and eos for bos
    # float32 sums over some 4,000 tokens, in another order
    assert figures["eval_bits_per_byte"] == pytest.approx(nll / math.log(2) / n_bytes, rel=1e-5)
    assert figures["eval_perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulated_gradient_is_that_of_one_large_batch(family, recipe):
    """Rows with unequal numbers of labels: a mean of means would differ."""
    gradients = {}
    for rows_at_once, accumulated in [(4, 1), (1, 4)]:
        trainer = pretrainer(
            recipe(
                model={"model_type": family, **SMALL, **FAMILIES[family]},
                trainer={
                    "per_device_train_batch_size": rows_at_once,
                    "gradient_accumulation_steps": accumulated,
                    "max_steps": 1,
                    "optim": "sgd",
                    "max_grad_norm": 0.0,
                    "learning_rate": 1.0,
                },
            )
        )
        documents = [row["input_ids"] for row in trainer.train_dataset]
        assert len({len(row) for row in documents}) > 1
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        gradients[rows_at_once] = {name: before[name] - p.detach() for name, p in trainer.model.named_parameters()}
        gradients[rows_at_once]["loss"] = torch.tensor(losses(trainer)[1])
    for name, expected in gradients[4].items():
        # float32 sums over the same tokens, in another order
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# Runs


def test_pretraining_leaves_a_folder_that_the_auto_classes_open(recipe):
    trainer = pretrainer(recipe(trainer={"max_steps": 30, "eval_strategy": "steps", "eval_steps": 15, "eval_on_start": True}))
    metrics = train(trainer)
    folder = Path(trainer.args.output_dir)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    torch.testing.assert_close(model(ids).logits, trainer.model.eval()(ids).logits)
    assert model.config.use_cache and model.generation_config.eos_token_id in (0, [0])
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape[1] == ids.shape[1] + 3

    bits = [log["eval_bits_per_byte"] for log in trainer.state.log_history if "eval_bits_per_byte" in log]
    assert bits[-1] == metrics["eval_bits_per_byte"] < 0.8 * bits[0]
    assert json.loads((folder / "eval_results.json").read_text())["eval_bits_per_byte"] == bits[-1]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = ModelCard.load(folder / "README.md")
    figures = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert card.data.tags == ["hf_linear", "gla"] and figures["bits_per_byte"] == pytest.approx(bits[-1], rel=1e-3)


@pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streamed"])
@pytest.mark.parametrize("family", ["gla", "linear_hybrid"])
def test_a_resumed_run_has_the_losses_of_one_that_never_stopped(family, streaming, recipe):
    def run(output, **trainer):
        trainer = pretrainer(
            recipe(
                model={"model_type": family, **SMALL, **FAMILIES[family]},
                data={"streaming": streaming, "held_out": 5},
                trainer={"max_steps": 20, "save_steps": 8, "gradient_accumulation_steps": 2, **trainer},
                output=output,
            )
        )
        train(trainer)
        return losses(trainer)

    whole = run("whole")
    assert len(whole) == 20
    checkpoint = "checkpoint-8"
    resumed = run("resumed", resume_from_checkpoint=f"{Path(recipe().output_dir).parent}/whole/{checkpoint}")
    assert resumed == whole  # to the last bit: the same rows, weights, optimizer and random numbers


def test_two_processes_have_the_losses_of_one_that_accumulates(corpus, tmp_path):
    """As the README starts them; each takes every other row."""
    values = {
        "model": {"model_type": "linear_hybrid", **SMALL, "pattern": "GA"},
        "data": {"path": "text", "data_files": f"{corpus}/*.txt", "held_out": 0.2, "sequence_length": 64},
        "tokenizer": {"vocab_size": 300},
        "trainer": {"max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))  # JSON is YAML
    command = f"torch.distributed.run --standalone --nproc-per-node 2 -m training.pretrain {tmp_path}/recipe.yaml"
    process = subprocess.run(
        [sys.executable, "-m", *command.split(), f"output_dir={tmp_path}/of-two"],
        cwd=RECIPES[0].parents[2],
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "NO_PROXY": "localhost,127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    overrides = [f"output_dir={tmp_path}/of-one", "trainer.gradient_accumulation_steps=2"]
    train(pretrainer(load_recipe(tmp_path / "recipe.yaml", overrides)))
    runs = []
    for folder in (tmp_path / "of-two", tmp_path / "of-one"):
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        runs.append([entry["loss"] for entry in log if "loss" in entry])
        runs[-1].append(json.loads((folder / "eval_results.json").read_text())["eval_bits_per_byte"])
        assert (folder / "README.md").is_file()
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)  # float32: the same sums, added up in another order
    assert len(set(runs[1])) == 5


def test_resuming_without_a_checkpoint_is_an_error(recipe):
    with pytest.raises((ValueError, OSError)):
        train(pretrainer(recipe(trainer={"resume_from_checkpoint": True})))


def test_checkpointed_activations_change_no_loss_and_bf16_runs(recipe):
    runs = {}
    for name, option in {"plain": {}, "checkpointing": {"gradient_checkpointing": True}, "bf16": {"bf16": True}}.items():
        model = {"model_type": "linear_hybrid", **SMALL, "pattern": "GA"}
        trainer = pretrainer(recipe(model=model, trainer={"max_steps": 4, **option}))
        trainer.train()
        runs[name] = losses(trainer)
    assert runs["checkpointing"] == pytest.approx(runs["plain"], rel=1e-5)
    assert runs["bf16"] == pytest.approx(runs["plain"], rel=2e-2)  # bfloat16 keeps 8 bits
    assert runs["bf16"] != runs["plain"]


@pytest.fixture
def base(tmp_path, tokenizer):
    small_model("gla").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_full_fine_tuning_lowers_the_held_out_loss(recipe, base):
    trainer = finetuner(recipe(model={"checkpoint": str(base)}, trainer={"max_steps": 30, "eval_on_start": True}))
    metrics = train(trainer)
    before = next(log["eval_bits_per_byte"] for log in trainer.state.log_history if "eval_bits_per_byte" in log)
    assert metrics["eval_bits_per_byte"] < 0.8 * before
    with pytest.raises(ValueError, match="wanted checkpoint"):
        finetuner(recipe())


def test_lora_trains_adapters_alone_resumes_and_opens(recipe, base):
    def run(output, **trainer):
        trainer = finetuner(
            recipe(
                model={"checkpoint": str(base)},
                lora={"r": 4, "lora_dropout": 0.1},
                trainer={"max_steps": 10, "save_steps": 4, "gradient_checkpointing": True, **trainer},
                output=output,
            )
        )
        train(trainer)
        return trainer

    trainer = run("whole")
    folder = Path(trainer.args.output_dir)
    assert losses(run("resumed", resume_from_checkpoint=str(folder / "checkpoint-4"))) == losses(trainer)

    frozen = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for name, weight in trainer.model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(weight, frozen[name.replace(".base_layer", "")]), name
    opened, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    torch.testing.assert_close(opened.eval()(ids).logits, trainer.model.eval()(ids).logits)
    assert ModelCard.load(folder / "README.md").data.base_model == str(base)  # peft's


@pytest.mark.parametrize("name", [*CONFIGS, *PRESETS])
def test_an_adapter_on_every_linear_learns_and_acts(name):
    """A layer that reads `.weight` instead of calling its Linear would leave the adapter without gradient or effect."""
    depth = one_layer_of_each_kind(name) if name in PRESETS else {}
    model = tiny_model(name, dtype=torch.float32, **depth)
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=sorted(linears)))
    layers = {path.removeprefix("base_model.model."): m for path, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert layers.keys() == linears and "lm_head" in linears
    for layer in layers.values():  # B is zero at first, which would hide A's gradient and the adapter's effect
        nn.init.normal_(layer.lora_B.default.weight, std=0.1)

    input_ids = ids(1, 40)
    adapted(input_ids=input_ids, labels=input_ids).loss.backward()
    together = logits(adapted, input_ids)
    for path, layer in layers.items():
        for matrix in (layer.lora_A.default, layer.lora_B.default):
            assert matrix.weight.grad is not None and matrix.weight.grad.abs().max() > 0, path
        scale, layer.scaling["default"] = layer.scaling["default"], 0.0
        assert not torch.equal(logits(adapted, input_ids), together), f"{path}: without its adapter the logits are the same"
        layer.scaling["default"] = scale
    assert torch.equal(logits(adapted, input_ids), together)


def test_all_linear_is_every_linear_but_the_head(recipe, base):
    trainer = finetuner(recipe(model={"checkpoint": str(base)}, lora={"r": 2}))
    modules = dict(trainer.model.get_base_model().named_modules())
    adapted = {path for path, module in modules.items() if hasattr(module, "lora_A")}
    plain = {path for path, module in modules.items() if isinstance(module, nn.Linear) and "lora_" not in path}
    assert plain - {f"{path}.base_layer" for path in adapted} == {"lm_head"} and len(adapted) > 10
