"""The GLA of its paper's repository as a `gla` model in our own layout, and back.

    python -m conversion.gla_original --checkpoint bailin28/gla-1B-100B --output my-gla --verify
    python -m conversion.gla_original --checkpoint my-gla --output my-gla-back --verify --to gla_original

Reading needs no conversion: from_pretrained opens such a folder as it is. Its own code needs CUDA, Transformers 4 and
flash-linear-attention as it was early in 2024, and is not run beside ours.
"""

from conversion import source
from hf_linear import GLAForCausalLM
from hf_linear.checkpoints.gla_original import OriginalGLA


def main(argv: list[str] | None = None) -> None:
    source.convert(__doc__, argv, GLAForCausalLM, OriginalGLA())


if __name__ == "__main__":
    main()
