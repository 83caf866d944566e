"""Write the model card of a saved model: `python -m model_cards.generate FOLDER [options]`.

The card is `template.md` filled with the page of the family (`<model_type>.md`), with what the author says (licence, language,
data, figures) and with what the folder says: config.json names the family and its layers, the safetensors headers count the
parameters, and the model itself, built without memory, shows the size of its state. Nothing measurable is typed by hand.

`model.push_to_hub` keeps the card that its repository has, `Trainer.push_to_hub` puts its own there: push this one last,

    card = write_card(folder, name="you/your-model", overwrite=True)
    huggingface_hub.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="you/your-model")
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HERE = Path(__file__).parent
TEMPLATE = HERE / "template.md"
FAMILIES = {page.stem: page for page in sorted(HERE.glob("*.md")) if page != TEMPLATE}

# how the name of a class ends -> the Hub's name of its task, and the Auto class that opens it
TASKS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "Model": ("feature-extraction", "AutoModel"),
}


@dataclass(frozen=True)
class Facts:
    """What a saved model says of itself; a sequence keeps state_bytes + length * state_bytes_per_token between two calls."""

    model_type: str
    architecture: str
    task: str
    auto_class: str
    parameters: int
    dtypes: str
    file_bytes: int
    layers: str
    hidden_size: int
    vocab_size: int
    state_bytes: int
    state_bytes_per_token: int
    sliding_window: int | None
    has_tokenizer: bool


def write_card(
    folder: str | Path,
    *,
    name: str | None = None,
    language: str | Sequence[str] | None = None,
    license: str | None = None,
    base_model: str | None = None,
    datasets: str | Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
    evaluated_on: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write README.md, the model card, into a folder that `save_pretrained` wrote.

    Args:
        folder: holds config.json and the safetensors weights.
        name: what `from_pretrained` will be given, such as "you/your-model"; the folder's name when None.
        language: code or codes of the data, such as "en".
        license: of the weights, such as "apache-2.0"; left out when None, as only their author can choose it.
        base_model: repository of the model that this one was trained from.
        datasets: Hub name or names of the training data.
        metrics: figures of an evaluation, such as {"perplexity": 12.3}; those that a training run left there when None.
        evaluated_on: the data that `metrics` were measured on; the training data when None and there is one data set.
        overwrite: replace the README.md that is there.

    Returns:
        The path of README.md.

    Raises:
        FileExistsError: there is a README.md, and `overwrite` is not set.
        ValueError: the folder holds no model of a known family, or `metrics` come without their data set.
    """
    readme = Path(folder) / "README.md"
    if readme.exists() and not overwrite:
        raise FileExistsError(f"{readme} exists and may be somebody's work; replace it with overwrite=True (--overwrite)")
    datasets = [datasets] if isinstance(datasets, str) else list(datasets)
    if metrics is None:
        metrics, evaluated_on = read_metrics(folder), evaluated_on or "held-out documents"
    if metrics and evaluated_on is None:
        if len(datasets) != 1:
            raise ValueError(
                f"metrics need the data set they were measured on, got evaluated_on=None and datasets={datasets}; "
                "name it with evaluated_on (--evaluated-on)"
            )
        evaluated_on = datasets[0]
    facts = read_facts(folder)
    name = Path(folder).resolve().name if name is None else name
    results = [
        EvalResult(
            task_type=facts.task, dataset_type=evaluated_on, dataset_name=evaluated_on, metric_type=metric, metric_value=value
        )
        for metric, value in metrics.items()
    ]
    card_data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag=facts.task,
        tags=["hf_linear", facts.model_type],
        base_model=base_model,
        datasets=datasets or None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=name,
        facts=facts,
        family=FAMILIES[facts.model_type].read_text().strip(),
        metrics=metrics,
        evaluated_on=evaluated_on,
    )
    card.save(readme)
    return readme


def read_metrics(folder: str | Path) -> dict[str, float]:
    """The held-out figures of eval_results.json, as training/ leaves it."""
    file = Path(folder) / "eval_results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    names = [name for name in ("perplexity", "bits_per_byte", "accuracy") if f"eval_{name}" in results]
    return {name: float(f"{results[f'eval_{name}']:.4g}") for name in names}


def read_facts(folder: str | Path) -> Facts:
    """Read config.json and the headers of the weights, and measure the state of the model that they describe."""
    # here and not above: the training scripts import this module, and torch and the families take seconds to load
    from transformers import AutoConfig

    import hf_linear  # noqa: F401

    folder = Path(folder)
    shards = sorted(folder.glob("model*.safetensors"))
    if not shards or not (folder / "config.json").is_file():
        found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise ValueError(
            f"{folder} must hold config.json and model*.safetensors, got {found}; write them with model.save_pretrained"
        )
    model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type in {folder / 'config.json'} must be one of {list(FAMILIES)}, got {model_type!r}; "
            f"a new family needs its page, model_cards/{model_type}.md"
        )
    config = AutoConfig.from_pretrained(folder)
    architecture = (config.architectures or ["none"])[0]
    ending = next((ending for ending in TASKS if architecture.endswith(ending)), None)
    if ending is None:
        raise ValueError(
            f"architectures in {folder / 'config.json'} must end in one of {list(TASKS)}, got {architecture}; "
            "write the folder with model.save_pretrained"
        )
    parameters, dtypes = 0, set()
    for shard in shards:
        with safe_open(shard, framework="np") as file:
            for key in file.keys():  # noqa: SIM118 (the file is no dictionary)
                tensor = file.get_slice(key)
                parameters += math.prod(tensor.get_shape())
                dtypes.add(tensor.get_dtype())
    state_bytes, state_bytes_per_token = measure_state(config)
    return Facts(
        model_type=model_type,
        architecture=architecture,
        task=TASKS[ending][0],
        auto_class=TASKS[ending][1],
        parameters=parameters,
        dtypes=" and ".join(sorted(dtypes)),
        file_bytes=sum(shard.stat().st_size for shard in shards),
        layers=", ".join(f"{len(list(run))} {mixer}" for mixer, run in groupby(config.mixers)),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        state_bytes=state_bytes,
        state_bytes_per_token=state_bytes_per_token,
        sliding_window=config.sliding_window if "sliding_attention" in config.mixers else None,
        has_tokenizer=(folder / "tokenizer_config.json").is_file(),
    )


def measure_state(config: "PreTrainedConfig") -> tuple[int, int]:
    """Bytes of one sequence's cache that are there at once, and bytes that each token adds."""
    import torch
    from torch._subclasses import FakeTensorMode
    from transformers import AutoModel

    from hf_linear.cache import CACHE_NAME, cache_bytes

    def bytes_after(length: int) -> int:
        return cache_bytes(model(torch.zeros(1, length, dtype=torch.long), use_cache=True)[CACHE_NAME])

    with FakeTensorMode():  # tensors with shapes and without memory, so that the size of the model does not matter
        model = AutoModel.from_config(config).eval()
        one_token, two_tokens = bytes_after(1), bytes_after(2)
    return 2 * one_token - two_tokens, two_tokens - one_token


def figure(text: str) -> tuple[str, float]:
    """perplexity=12.3 -> ("perplexity", 12.3), for argparse."""
    metric, _, value = text.partition("=")
    return metric, float(value)


def main() -> None:
    """The command line: the arguments of `write_card`, as options."""
    parser = argparse.ArgumentParser(prog="python -m model_cards.generate", description=write_card.__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder with config.json and the weights")
    parser.add_argument("--name", help="repository or name shown in the card; the folder's name by default")
    parser.add_argument("--language", nargs="+", help="language codes of the data, such as en")
    parser.add_argument("--license", help="licence of the weights, such as apache-2.0")
    parser.add_argument("--base-model", help="repository of the model that this one was trained from")
    parser.add_argument("--datasets", nargs="+", default=[], help="Hub names of the training data")
    parser.add_argument("--metrics", nargs="+", type=figure, metavar="NAME=VALUE", help="such as perplexity=12.3")
    parser.add_argument("--evaluated-on", help="data set of the figures, where it is not the one training data set")
    parser.add_argument("--overwrite", action="store_true", help="replace the README.md that is there")
    arguments = vars(parser.parse_args())
    if arguments["metrics"]:
        arguments["metrics"] = dict(arguments["metrics"])
    try:
        print(write_card(**arguments))
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
