"""The GLA of its paper's repository, a folder such as bailin28/gla-1B-100B, as a `gla` model in our own layout, and back.

    python -m conversion.gla_original --checkpoint FOLDER --output my-gla --verify
    python -m conversion.gla_original --checkpoint my-gla --output my-gla-back --to gla-original

from_pretrained opens such a folder as it is. Its own code needs CUDA, Transformers 4 and flash-linear-attention as it was early
in 2024, and is not run beside ours.
"""

from conversion import folder
from hf_linear import GLAForCausalLM
from hf_linear.checkpoints.gla_original import OriginalGLA


def main(argv: list[str] | None = None) -> None:
    folder.convert(OriginalGLA(), GLAForCausalLM, __doc__, argv)


if __name__ == "__main__":
    main()
