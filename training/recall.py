"""Train a model on associative recall from scratch, and measure how many values it finds.

python -m training.recall RECIPE.yaml [section.key=value ...]
"""

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, EvalPrediction, Trainer, set_seed

from training.mqar import associative_recall
from training.plot import plot_accuracy
from training.pretrain import config_class
from training.recipe import Recipe, load_recipe, recipe_parser
from training.run import train, training_arguments


def recaller(recipe: Recipe) -> Trainer:
    """A Trainer ready to train."""
    if recipe.data.path != "mqar" or recipe.data.pairs is None or recipe.tokenizer is not None:
        raise ValueError(
            f"data: got path={recipe.data.path!r}, pairs={recipe.data.pairs} and tokenizer={recipe.tokenizer}; wanted the path "
            "mqar, a number of pairs and no tokenizer. Set data.path and data.pairs, and leave out the tokenizer."
        )
    args = training_arguments(recipe)
    config = config_class(recipe)(**{key: value for key, value in recipe.model.items() if key != "model_type"})
    train_rows, held_out = (
        associative_recall(split, recipe.data.pairs, recipe.data.sequence_length, config.vocab_size)
        for split in (recipe.data.split, recipe.data.held_out)
    )
    set_seed(args.seed)
    return Trainer(
        model=AutoModelForCausalLM.from_config(config),
        args=args,
        train_dataset=train_rows,
        eval_dataset=held_out,
        compute_metrics=recall,
        preprocess_logits_for_metrics=found_and_asked,
    )


def found_and_asked(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, 2]: what evaluation keeps of a row instead of its logits [B, T, vocab]."""
    asked = labels[:, 1:] != -100
    found = (logits[:, :-1].argmax(-1) == labels[:, 1:]) & asked
    return torch.stack([found.sum(1), asked.sum(1)], 1)


def recall(prediction: EvalPrediction) -> dict[str, float]:
    found, asked = np.asarray(prediction.predictions).sum(0)
    return {"accuracy": float(found / asked)}


def main() -> None:
    args = recipe_parser(__doc__).parse_args()
    recipe = load_recipe(args.recipe, args.overrides)
    pairs = recipe.data.pairs
    guess = {"any value not asked for yet": sum(1 / left for left in range(1, pairs + 1)) / pairs}
    train(recaller(recipe), plot=lambda log, path: plot_accuracy(log, guess, path))


if __name__ == "__main__":
    main()
