"""What pretraining and fine-tuning share: documents, tokenizer, Trainer, held-out figures, loss curve, saved folder."""

from collections.abc import Callable
from pathlib import Path

from datasets import Dataset, IterableDataset
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_linear.checkpoints.hyenadna import dna_tokenizer
from hf_linear.decoder import LinearPreTrainedModel
from model_cards.generate import write_card
from training.data import SHUFFLE_BUFFER, collate, count_bytes, load_documents, pack, train_tokenizer
from training.evaluate import held_out_metrics, nll_and_tokens
from training.plot import plot_losses
from training.recipe import Recipe


def prepare(recipe: Recipe, make_model: Callable[[Recipe, PreTrainedTokenizerBase], PreTrainedModel]) -> Trainer:
    """A Trainer over the recipe's packed rows, ready to train."""
    args = training_arguments(recipe)
    with args.main_process_first():
        documents, held_out = load_documents(recipe.data)
        tokenizer = load_tokenizer(recipe, args, documents)
        rows, held_out_rows = (pack(d, tokenizer, recipe.data.sequence_length) for d in (documents, held_out))
    if isinstance(rows, IterableDataset):
        rows = rows.shuffle(seed=args.seed, buffer_size=SHUFFLE_BUFFER)
    elif len(rows) == 0:
        raise ValueError(f"data.held_out: got {recipe.data.held_out!r}, which leaves no document to train on. Hold out fewer.")
    set_seed(args.seed)  # the weights are drawn here, whatever the data took from the generator
    return Trainer(
        model=make_model(recipe, tokenizer),
        args=args,
        train_dataset=rows,
        eval_dataset=held_out_rows,
        data_collator=collate,
        processing_class=tokenizer,
        compute_metrics=held_out_metrics(count_bytes(held_out)),
        preprocess_logits_for_metrics=nll_and_tokens,
    )


def training_arguments(recipe: Recipe) -> TrainingArguments:
    args = recipe.training_arguments()
    if args.n_gpu > 1:
        raise ValueError(
            f"got {args.n_gpu} GPUs in one process, which cannot share a packed row; wanted a process for each GPU. Start with "
            "torchrun --nproc-per-node, or set CUDA_VISIBLE_DEVICES."
        )
    return args


def load_tokenizer(recipe: Recipe, args: TrainingArguments, documents: Dataset | IterableDataset):
    """The checkpoint's, HyenaDNA's, or one trained here; a resumed run takes the one it was started with."""
    if recipe.tokenizer is not None and recipe.tokenizer.alphabet is not None:
        return dna_tokenizer(recipe.data.sequence_length)
    checkpoint = recipe.tokenizer.checkpoint if recipe.tokenizer else recipe.model.get("checkpoint")
    resumed = args.resume_from_checkpoint
    folder = checkpoint or (resumed if isinstance(resumed, str) else args.output_dir)
    if not (checkpoint or resumed) and args.local_process_index == 0:
        train_tokenizer(documents, recipe.tokenizer.vocab_size).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def train(trainer: Trainer, plot: Callable[[list[dict], Path], None] = plot_losses) -> dict[str, float]:
    """Trains, evaluates, and leaves in output_dir what the Auto classes open, its card, and loss.png, which `plot` draws.

    `trainer.resume_from_checkpoint` (true for the last checkpoint, or its folder) goes on where a run stopped, with the
    losses of a run that never stopped.
    """
    args = trainer.args
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    trainer.model.config.use_cache = True  # Trainer turned it off; whoever opens the folder wants to generate
    trainer.save_model()
    if trainer.is_world_process_zero():
        plot(trainer.state.log_history, Path(args.output_dir) / "loss.png")
        if isinstance(trainer.accelerator.unwrap_model(trainer.model), LinearPreTrainedModel):
            write_card(args.output_dir, overwrite=True)  # peft writes that of an adapter
    return metrics
