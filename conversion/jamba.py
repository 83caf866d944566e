"""Jamba, and the other hybrids of Transformers that we read, written as ours; or ours written as theirs.

    python -m conversion.jamba --checkpoint ai21labs/AI21-Jamba2-Mini --output my-jamba --verify
    python -m conversion.jamba --checkpoint my-jamba --output my-jamba-for-transformers --to jamba --verify

Reading needs no conversion: LinearHybridForCausalLM.from_pretrained opens what Transformers wrote. `--checkpoint` is a folder,
or a name on the Hub.
"""

from pathlib import Path

from huggingface_hub import snapshot_download

from conversion import output
from hf_linear import LinearHybridForCausalLM


def main(argv: list[str] | None = None) -> None:
    parser = output.argument_parser(__doc__)
    theirs = ["jamba", "bamba", "granite_hybrid"]
    parser.add_argument("--to", choices=["ours", *theirs], default="ours", help="the layout to write")
    arguments = parser.parse_args(argv)
    output.check_absent(arguments.output)
    source = arguments.checkpoint if arguments.checkpoint.is_dir() else Path(snapshot_download(str(arguments.checkpoint)))
    model = LinearHybridForCausalLM.from_pretrained(source)
    layout = None if arguments.to == "ours" else arguments.to
    output.write(model, source, arguments.output, arguments.verify, layout)


if __name__ == "__main__":
    main()
