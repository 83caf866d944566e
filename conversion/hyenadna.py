"""HyenaDNA's original weights, `weights.ckpt` with its `config.json`, as a `hyena` model with a fast tokenizer.

    python -m conversion.hyenadna --checkpoint weights.ckpt --config config.json --output my-hyenadna --verify

The -hf repositories need no conversion: from_pretrained opens them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from conversion import output
from conversion.pickles import read_state_dict
from hf_linear import HyenaConfig, HyenaForCausalLM
from hf_linear.checkpoints import hyenadna


def convert(theirs: dict[str, Tensor], fields: dict[str, Any], **defaults: Any) -> HyenaForCausalLM:
    """Our model of their weights and config; `defaults` are fields of ours that their config leaves open."""
    config = HyenaConfig(**hyenadna.config_fields(fields, **defaults))
    with torch.device("meta"):
        wanted = HyenaForCausalLM(config).state_dict()
    ours = hyenadna.convert_weights(theirs, config, wanted)
    embedding = ours["model.embed_tokens.weight"]
    config.tie_word_embeddings = torch.equal(ours.get("lm_head.weight", embedding), embedding)
    return HyenaForCausalLM.from_pretrained(None, config=config, state_dict=ours, dtype=embedding.dtype)


def run(
    arguments: argparse.Namespace, fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None, **defaults: Any
) -> None:
    output.check_absent(arguments.output)
    model = convert(read_state_dict(arguments.checkpoint), fields, **defaults)
    output.write(model, tokenizer, arguments.output, arguments.verify)


def main(argv: list[str] | None = None) -> None:
    parser = output.argument_parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the config.json beside the weights")
    parser.add_argument(
        "--filter-shift",
        type=float,
        default=0.05,
        help="the config does not tell: 0.05 in HyenaDNA's code for inference and its -hf repositories, 0 in training",
    )
    arguments = parser.parse_args(argv)
    fields = json.loads(arguments.config.read_text())
    tokenizer = hyenadna.dna_tokenizer(hyenadna.config_fields(fields)["max_position_embeddings"])
    run(arguments, fields, tokenizer, filter_shift=arguments.filter_shift, **hyenadna.DNA_TOKENS)


if __name__ == "__main__":
    main()
