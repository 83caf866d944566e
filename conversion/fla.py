"""GLA and RetNet of flash-linear-attention (fla) written as ours, or ours written as fla's.

    python -m conversion.fla --checkpoint fla-hub/gla-1.3B-100B --output gla-1.3b --verify
    python -m conversion.fla --checkpoint my-gla --output my-gla-for-fla --to fla --verify

Reading needs no conversion: from_pretrained opens what fla wrote. `--checkpoint` is a folder, or a name on the Hub.
"""

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_linear  # noqa: F401  (registers the families)
from conversion import output


@torch.no_grad()
def beside_fla(folder: Path, model: PreTrainedModel) -> str:
    """The largest difference of logits between fla's own model of a folder in its layout, and ours; both go to float32."""
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
    parser = output.argument_parser(__doc__)
    parser.add_argument("--to", choices=["ours", "fla"], default="ours", help="the layout to write")
    arguments = parser.parse_args(argv)
    output.check_absent(arguments.output)
    source = arguments.checkpoint if arguments.checkpoint.is_dir() else Path(snapshot_download(str(arguments.checkpoint)))
    model = AutoModelForCausalLM.from_pretrained(source)

    def compare(written: Path) -> str:
        return beside_fla(source if arguments.to == "ours" else written, model)

    layout = None if arguments.to == "ours" else arguments.to
    output.write(model, source, arguments.output, arguments.verify, layout, compare)


if __name__ == "__main__":
    main()
