"""Go on training a checkpoint: every weight, or with a `lora` section adapters only.

python -m training.finetune RECIPE.yaml [section.key=value ...]
torchrun --nproc-per-node 8 -m training.finetune RECIPE.yaml
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from training.recipe import Recipe, load_recipe, recipe_parser
from training.run import prepare, train


def finetuner(recipe: Recipe) -> Trainer:
    if "checkpoint" not in recipe.model:
        raise ValueError(
            f"model: got {sorted(recipe.model)}; wanted checkpoint, a folder or a name on the Hub. For fresh weights use "
            "training.pretrain."
        )
    return prepare(recipe, open_model)


def open_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The checkpoint, with adapters on every Linear if the recipe has a `lora` section that does not say otherwise."""
    # float32, for a fine-tuning step is lost in the rounding of bfloat16 weights; trainer.bf16 still computes in bfloat16
    options = {"dtype": torch.float32, **recipe.model}
    model = AutoModelForCausalLM.from_pretrained(options.pop("checkpoint"), **options)
    return with_adapters(model, recipe, "CAUSAL_LM")


def with_adapters(model: PreTrainedModel, recipe: Recipe, task: str) -> PreTrainedModel:
    if recipe.lora is None:
        return model
    return get_peft_model(model, LoraConfig(**{"task_type": task, "target_modules": "all-linear"} | recipe.lora))


def main() -> None:
    args = recipe_parser(__doc__).parse_args()
    train(finetuner(load_recipe(args.recipe, args.overrides)))


if __name__ == "__main__":
    main()
