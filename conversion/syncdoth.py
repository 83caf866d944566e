"""The RetNet of syncdoth, a folder as its save_pretrained writes it, as a `retnet` model in our own layout, and back.

    python -m conversion.syncdoth --checkpoint FOLDER --output my-retnet --verify
    python -m conversion.syncdoth --checkpoint my-retnet --output my-retnet-back --verify --to syncdoth

Reading needs no conversion: from_pretrained opens such a folder as it is. Its own code needs Transformers 4, and is not run
beside ours.
"""

from conversion import source
from hf_linear import RetNetForCausalLM
from hf_linear.checkpoints.torchscale import Syncdoth


def main(argv: list[str] | None = None) -> None:
    source.convert(__doc__, argv, RetNetForCausalLM, Syncdoth())


if __name__ == "__main__":
    main()
