"""Train a model from scratch.

python -m training.pretrain RECIPE.yaml [section.key=value ...]
torchrun --nproc-per-node 8 -m training.pretrain RECIPE.yaml
"""

from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

from training.recipe import Recipe, check_keys, did_you_mean, field_names, load_recipe, recipe_parser
from training.run import prepare, train


def pretrainer(recipe: Recipe) -> Trainer:
    config_class(recipe)  # a misspelt field is found now, not after hours of tokenizing
    if recipe.tokenizer is None:
        raise ValueError("tokenizer: got none; wanted `checkpoint` to use one or `vocab_size` to train one. Add the section.")
    if recipe.lora is not None:
        raise ValueError("lora: got it in a pretraining recipe, which has no base to adapt. Use training.finetune.")
    return prepare(recipe, new_model)


def config_class(recipe: Recipe) -> type[PreTrainedConfig]:
    model_type = recipe.model.get("model_type")
    if model_type is None:
        raise ValueError(
            f"model: got {sorted(recipe.model)}; wanted model_type, such as gla. To go on from a checkpoint, "
            "use training.finetune."
        )
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"model.model_type: got {model_type!r}; wanted a type that AutoConfig knows, such as gla."
            f"{did_you_mean(model_type, CONFIG_MAPPING.keys())}"
        )
    cls = CONFIG_MAPPING[model_type]
    check_keys(f"model ({model_type})", recipe.model, {"model_type", *field_names(cls), *cls.attribute_map})
    return cls


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model with fresh weights."""
    return AutoModelForCausalLM.from_config(new_config(recipe, tokenizer))


def new_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """What the recipe says; the vocabulary is the tokenizer's unless it asks for a larger one."""
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    special = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    if pad in (bos, eos):
        special["pad_token_id"] = None  # nn.Embedding never trains its padding row
    fields = {"vocab_size": len(tokenizer), **special, **recipe.model}
    del fields["model_type"]
    if fields["vocab_size"] < len(tokenizer):
        raise ValueError(
            f"model.vocab_size: got {fields['vocab_size']}; wanted at least {len(tokenizer)}, the tokenizer's. Leave it out."
        )
    return config_class(recipe)(**fields)


def main() -> None:
    args = recipe_parser(__doc__).parse_args()
    train(pretrainer(load_recipe(args.recipe, args.overrides)))


if __name__ == "__main__":
    main()
