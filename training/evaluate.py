"""Perplexity and bits per byte of a saved model on the held-out documents of a recipe.

    python -m training.evaluate RECIPE.yaml [--model FOLDER] [section.key=value ...]

    perplexity    = exp(nll / tokens)                a token is a tokenizer's, so it compares runs of one tokenizer only
    bits_per_byte = nll / (ln 2 * bytes of UTF-8)    compares any two models, and any compressor

nll sums over every token of every document, eos included: what it costs to send the documents one by one.
"""

import json
import math
import tempfile
from collections.abc import Callable

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from training.data import collate, count_bytes, load_documents, pack
from training.recipe import DEFAULTS, load_recipe, recipe_parser


def nll_and_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """[1, 2]: what evaluation keeps of a row instead of its logits [1, T, vocab]."""
    nll = F.cross_entropy(logits[0, :-1].float(), labels[0, 1:], reduction="sum")
    return torch.stack([nll, (labels[0, 1:] != -100).sum()])[None]


def held_out_metrics(n_bytes: int) -> Callable[[EvalPrediction], dict[str, float]]:
    """For Trainer's compute_metrics. Its own eval_loss is a mean over rows; these weigh every token alike."""

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        nll, tokens = prediction.predictions.astype("float64").sum(axis=0)
        return {"perplexity": math.exp(nll / tokens), "bits_per_byte": nll / (math.log(2) * n_bytes)}

    return metrics


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: Dataset, length: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(folder, **DEFAULTS),
            eval_dataset=pack(held_out, tokenizer, length),
            data_collator=collate,
            compute_metrics=held_out_metrics(count_bytes(held_out)),
            preprocess_logits_for_metrics=nll_and_tokens,
        )
        return trainer.evaluate()


def main() -> None:
    parser = recipe_parser(__doc__)
    parser.add_argument("--model", help="a saved folder or a name on the Hub; default: the recipe's output_dir")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.overrides)
    folder = args.model or recipe.output_dir
    _, held_out = load_documents(recipe.data)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    print(json.dumps(evaluate(model, tokenizer, held_out, recipe.data.sequence_length), indent=2))


if __name__ == "__main__":
    main()
