"""Jamba, and the other hybrids of Transformers that we read, as a `linear_hybrid` in our own layout, and back.

    python -m conversion.jamba --checkpoint ai21labs/AI21-Jamba2-Mini --output my-jamba --verify
    python -m conversion.jamba --checkpoint my-jamba --output my-jamba-back --verify --to jamba

Reading needs no conversion: LinearHybridForCausalLM.from_pretrained opens what Transformers wrote.
"""

from conversion import source
from hf_linear import LinearHybridForCausalLM
from hf_linear.checkpoints.bamba import Bamba
from hf_linear.checkpoints.granite import GraniteHybrid
from hf_linear.checkpoints.jamba import Jamba


def main(argv: list[str] | None = None) -> None:
    source.convert(__doc__, argv, LinearHybridForCausalLM, Jamba(), Bamba(), GraniteHybrid())


if __name__ == "__main__":
    main()
