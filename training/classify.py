"""Train a model to tell classes of documents apart, of DNA for instance: a checkpoint, or fresh weights.

python -m training.classify RECIPE.yaml [section.key=value ...]
torchrun --nproc-per-node 8 -m training.classify RECIPE.yaml
"""

from functools import partial

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from training.baselines import kmer_accuracy, majority_accuracy
from training.data import load_classes
from training.finetune import with_adapters
from training.plot import plot_accuracy
from training.pretrain import new_config
from training.recipe import Recipe, load_recipe, recipe_parser
from training.run import load_tokenizer, train, training_arguments

KMER = 6


def classifier(recipe: Recipe) -> tuple[Trainer, dict[str, Dataset], Dataset]:
    """A Trainer ready to train, the documents of each split as they are, and the rows of the test."""
    args = training_arguments(recipe)
    with args.main_process_first():
        splits, classes = load_classes(recipe.data)
        tokenizer = load_tokenizer(recipe, args, splits["train"])
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "tokenizer: got one without a pad_token; wanted one, to batch documents. Set it and save the tokenizer."
            )
        encode = partial(tokenizer, truncation=True, max_length=recipe.data.sequence_length, return_token_type_ids=False)
        rows = {name: documents.map(encode, input_columns="text", remove_columns="text") for name, documents in splits.items()}
    set_seed(args.seed)  # the weights are drawn here, whatever the data took from the generator
    trainer = Trainer(
        model=make_model(recipe, tokenizer, classes),
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows["held_out"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    return trainer, splits, rows["test"]


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, classes: list[str]) -> PreTrainedModel:
    """The checkpoint with a new head, or with its own where it has one for as many classes; or fresh weights altogether."""
    labels = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    if "checkpoint" not in recipe.model:
        config = new_config(recipe, tokenizer)
        config.update(labels | {"pad_token_id": tokenizer.pad_token_id})
        return with_adapters(AutoModelForSequenceClassification.from_config(config), recipe, "SEQ_CLS")
    options = {"dtype": torch.float32, **recipe.model, **labels, "pad_token_id": tokenizer.pad_token_id}
    model = AutoModelForSequenceClassification.from_pretrained(options.pop("checkpoint"), **options)
    return with_adapters(model, recipe, "SEQ_CLS")


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def baselines(train_documents: Dataset, documents: Dataset) -> dict[str, float]:
    """The accuracy of what looks at no document, and of what looks at its composition alone."""
    return {
        "majority": majority_accuracy(train_documents, documents),
        f"bag of {KMER}-mers": kmer_accuracy(KMER, train_documents, documents),
    }


def train_and_test(recipe: Recipe) -> dict[str, float]:
    """Trains, then measures the model and the baselines on the test split, once."""
    trainer, splits, test_rows = classifier(recipe)
    held_out = baselines(splits["train"], splits["held_out"])
    train(trainer, plot=lambda log, path: plot_accuracy(log, held_out, path))
    metrics = trainer.evaluate(test_rows, metric_key_prefix="test")
    metrics |= {f"test_accuracy of {name}": figure for name, figure in baselines(splits["train"], splits["test"]).items()}
    trainer.log_metrics("test", metrics)
    trainer.save_metrics("test", metrics)
    return metrics


def main() -> None:
    args = recipe_parser(__doc__).parse_args()
    train_and_test(load_recipe(args.recipe, args.overrides))


if __name__ == "__main__":
    main()
