"""safari's Hyena, such as the 153M model of the Pile (`hyena_small_150b_tok.ckpt`), as a `hyena` model in our own layout.

    python -m conversion.safari --checkpoint hyena_small_150b_tok.ckpt --output my-hyena --verify

The config is JSON or one of safari's YAML files, the Pile model's if left out. So is the tokenizer, GPT-2's; "none" takes none.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from conversion import output
from conversion.hyenadna import convert
from conversion.pickles import read_state_dict

# The model of configs/evals/hyena_small_150b.yaml, by which safari measures the published weights. It has no window on the
# filters, though configs/experiment/pile/hyena.yaml trains with one.
PILE = {
    "d_model": 864,
    "d_inner": 1728,
    "n_layer": 18,
    "vocab_size": 50257,
    "pad_vocab_size_multiple": 8,
    "layer": {"emb_dim": 33, "filter_order": 64, "l_max": 2048, "modulate": False, "w": 14},
}


def read_config(path: Path) -> dict[str, Any]:
    """The model's arguments: all of a JSON file, or the `model_config` or `model` of one of safari's YAML files."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    import yaml

    content = yaml.safe_load(path.read_text())
    return content.get("model_config") or content.get("model") or content


def main(argv: list[str] | None = None) -> None:
    parser = output.argument_parser(__doc__)
    parser.set_defaults(tokenizer="gpt2")
    arguments = output.parse(parser, argv)
    fields = PILE if arguments.config is None else read_config(arguments.config)
    if arguments.tokenizer == "none":
        arguments.tokenizer = None
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer) if arguments.tokenizer else None
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    model = convert(read_state_dict(arguments.checkpoint), fields, filter_shift=0.0, **tokens)
    output.write(model, arguments)


if __name__ == "__main__":
    main()
