"""GLA, RetNet and their hybrids of flash-linear-attention (fla) in our own layout, and back.

    python -m conversion.fla --checkpoint fla-hub/gla-1.3B-100B --output my-gla --verify
    python -m conversion.fla --checkpoint my-gla --output my-gla-back --verify --to fla

Reading needs no conversion: from_pretrained opens what fla wrote.
"""

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from conversion import output, source
from hf_linear.checkpoints.fla import LAYOUTS


@torch.no_grad()
def beside_fla(folder: Path, model: PreTrainedModel) -> str:
    """The largest difference of logits between fla's own model of a folder in its layout, and ours; both go to float32."""
    if not folder.is_dir():
        return "not compared with fla's own model: it opens folders alone"
    if not torch.cuda.is_available():
        return "not compared with fla's own model: it runs on a GPU alone, and there is none"
    try:
        from fla import models
    except ImportError:
        return "not compared with fla's own model: flash-linear-attention is not installed"
    family = {"gla": models.GLAForCausalLM, "retnet": models.RetNetForCausalLM}
    cls = family[json.loads((folder / "config.json").read_text())["model_type"]]
    ids = output.some_tokens(model).cuda()
    theirs = cls.from_pretrained(folder, dtype=torch.float32).cuda().eval()(ids, use_cache=False).logits
    ours = model.float().cuda()(ids, use_cache=False).logits
    difference, size = (theirs - ours).abs().max().item(), theirs.abs().max().item()
    return f"fla's own logits of {ids.shape[1]} random tokens, up to {size:.1f} in size, differ by {difference:.1e} in float32"


def main(argv: list[str] | None = None) -> None:
    arguments = output.parse(output.argument_parser(__doc__, *LAYOUTS), argv)
    model = source.read(arguments, None, *LAYOUTS)

    def compare(written: Path) -> str:
        return beside_fla(arguments.checkpoint if arguments.to == "ours" else written, model)

    output.write(model, arguments, compare=compare)


if __name__ == "__main__":
    main()
