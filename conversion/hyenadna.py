"""HyenaDNA, `weights.ckpt` with its `config.json` or an -hf repository, as a `hyena` model in our own layout, and back.

    python -m conversion.hyenadna --checkpoint weights.ckpt --output my-hyenadna --verify
    python -m conversion.hyenadna --checkpoint my-hyenadna --output my-hyenadna-back --verify --to hyenadna

Reading an -hf repository needs no conversion: from_pretrained opens it. What is written back is one.
"""

import json
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from conversion import output, source
from conversion.pickles import read_state_dict
from hf_linear import HyenaConfig, HyenaForCausalLM
from hf_linear.checkpoints import hyenadna

LAYOUT = hyenadna.HyenaDNA()


def convert(weights: dict[str, Tensor], fields: dict[str, Any], **defaults: Any) -> PreTrainedModel:
    """Our model of an original's weights and config; `defaults` are fields of ours that their config leaves open."""
    config = HyenaConfig(**hyenadna.original_fields(fields, **defaults))
    embedding, head = (
        next((x for key, x in weights.items() if key.endswith(name)), None)
        for name in (".word_embeddings.weight", "lm_head.weight")
    )
    config.tie_word_embeddings = head is None or embedding is None or torch.equal(head, embedding)
    return source.of_weights(HyenaForCausalLM, weights, config, hyenadna.ORIGINAL.of)


def main(argv: list[str] | None = None) -> None:
    parser = output.argument_parser(__doc__, LAYOUT)
    parser.add_argument(
        "--filter-shift",
        type=float,
        default=0.05,
        help="weights.ckpt does not tell: 0.05 in HyenaDNA's code for inference and its -hf repositories, 0 in training",
    )
    arguments = output.parse(parser, argv)
    if arguments.checkpoint.is_dir():
        model = source.read(arguments, HyenaForCausalLM, LAYOUT)
        model.generation_config = GenerationConfig.from_model_config(model.config)  # their files name no end of a text
    else:
        fields = json.loads(source.config_path(arguments).read_text())
        options = {"filter_shift": arguments.filter_shift, **hyenadna.DNA_TOKENS}
        model = convert(read_state_dict(arguments.checkpoint), fields, **options)
    output.write(model, arguments, hyenadna.dna_tokenizer(model.config.max_position_embeddings))


if __name__ == "__main__":
    main()
