"""Jamba's checkpoints as `linear_hybrid` models, and back: which way, the config.json of what is read says.

    python -m conversion.jamba --checkpoint AI21-Jamba2-Mini --output my-jamba --verify
    python -m conversion.jamba --checkpoint my-jamba --output my-jamba-in-their-layout --verify

To use a Jamba nothing need be converted: LinearHybridForCausalLM.from_pretrained opens it as it is.
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig

from conversion import output
from hf_linear import LinearHybridForCausalLM


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a folder or a repository of the Hub, Jamba's or ours")
    parser.add_argument("--output", type=Path, required=True, help="a folder to be made")
    parser.add_argument("--verify", action="store_true", help="open the output and compare it with what was read")
    arguments = parser.parse_args(argv)
    if arguments.output.exists():
        raise FileExistsError(f"--output must not exist yet, got {arguments.output}: take another name, or remove it")
    fields, _ = PreTrainedConfig.get_config_dict(arguments.checkpoint)
    layout = None if fields.get("model_type") == "jamba" else "jamba"
    model = LinearHybridForCausalLM.from_pretrained(arguments.checkpoint, dtype="auto")
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    except (OSError, ValueError) as error:
        print(f"no tokenizer is written: {error}")
        tokenizer = None
    output.write(model, tokenizer, arguments.output, arguments.verify, layout)


if __name__ == "__main__":
    main()
