"""Transformers' own Mamba layers on the ops of this library: `accelerate` binds the ops to the layers of a model, `restore`
takes them off again.

Nothing is bound but `forward`, on instances. Weights, classes, configs and caches stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.masking_utils import create_causal_mask

from hf_linear.cache import CACHE_NAME
from hf_linear.inputs import check_packed, document_boundaries, padding_mask, positions
from hf_linear.mixers import mamba, mamba2
from hf_linear.modules.short_conv import convolve
from hf_linear.ops.dispatch import compute_dtype

MIX: dict[str, Callable] = {
    "JambaMambaMixer": mamba.mix,
    "MambaMixer": mamba.mix,
    "Mamba2Mixer": mamba2.mix,
    "BambaMixer": mamba2.mix,
    "GraniteMoeHybridMambaLayer": mamba2.mix,
    "Zamba2MambaMixer": mamba2.mix,
}
# Models, and what carries the boundaries of documents to their layers: a mask by layer type, the mask, or a keyword.
CARRIER = {
    "JambaModel": "masks",
    "BambaModel": "masks",
    "GraniteMoeHybridModel": "masks",
    "Zamba2Model": "masks",
    "MambaModel": "mask",
    "MambaForCausalLM": "mask",
    "Mamba2ForCausalLM": "mask",
    "Mamba2Model": "keyword",
}
# How far a layer may be from its original, as a part of the largest output: sums of a few hundred products in another order.
# Some originals compute in float32 whatever their dtype.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}


def accelerate(model: nn.Module) -> nn.Module:
    """Put the Mamba and Mamba-2 layers of a Transformers model on the ops of this library, in place.

    Every layer is first compared with its original on a small random input. From then on the layers are fast without a CUDA
    build; a call with a cache goes on from its state, whatever the call's length; padding leaves the state alone; documents
    packed in one row (`cu_seq_lens_q`, `seq_idx`, or positions that restart) are kept apart, in attention layers too. All
    else works as before: generation, training, saving, the model's caches.

    Args:
        model: Jamba, Mamba, Mamba-2, Bamba, GraniteMoeHybrid or Zamba-2 of Transformers, or a module with one inside.

    Returns:
        the model itself; `restore` gives it its own layers back.

    Raises:
        ValueError: the model has no such layer, or one of them has a forward that is not its class's, an activation other
            than silu, or an output other than its original's. The model is then as it was.
    """
    mixers = {name: module for name, module in model.named_modules() if is_native(module) and type(module).__name__ in MIX}
    if not mixers:
        raise ValueError(
            f"model must have layers of {sorted(MIX)}, got {type(model).__name__} without: "
            "other layers of Transformers have no counterpart here"
        )
    try:
        for name, mixer in mixers.items():
            if held(mixer) is None:
                bind_checked(name, mixer)
        for module in model.modules():
            if is_native(module) and type(module).__name__ in CARRIER:
                bind(module, forward_of_model)
    except BaseException:
        restore(model)
        raise
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`, in place; a model that is not accelerated stays as it is. Returns the model."""
    for module in model.modules():
        if held(module) is not None:
            if slot(module) == "forward":
                del module.forward
            else:
                module._old_forward = type(module).forward.__get__(module)
    return model


# --- Binding ---------------------------------------------------------------------------------------------------------


class Bound(partial):
    """A forward of ours with its module. A partial of a module is copied and pickled with the module."""


def slot(module: nn.Module) -> str:
    """Where an instance keeps its own forward: the accelerate package puts its hook there, and what it wraps beside it."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


def held(module: nn.Module) -> Bound | None:
    forward = vars(module).get(slot(module))
    return forward if isinstance(forward, Bound) else None


def bind(module: nn.Module, forward: Callable) -> None:
    setattr(module, slot(module), update_wrapper(Bound(forward, module), type(module).forward.__get__(module)))


def is_native(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.models.")


@torch.no_grad()
def bind_checked(name: str, mixer: Any) -> None:
    """Bind a mixer whose output stays what it was."""
    own = vars(mixer).get(slot(mixer))
    if own is not None and getattr(own, "__func__", None) is not type(mixer).forward:
        raise ValueError(f"{name} must have the forward of its class, got {own}: take off what was put on it")
    if mixer.activation != "silu":
        raise ValueError(f"{name} must have the activation silu, got {mixer.activation}: others have no fast form")
    w = mixer.conv1d.weight
    device = getattr(getattr(mixer, "_hf_hook", None), "execution_device", None)  # of weights that are elsewhere until used
    device = w.device if device is None else torch.device(device)
    if device.type == "meta":
        raise ValueError(f"{name} must have its weights, got the meta device: load them first")
    x = torch.randn(2, 9, mixer.hidden_size, generator=torch.Generator().manual_seed(0)).to(device, w.dtype)
    original = mixer(x)
    bind(mixer, forward_of_mixer)
    error = ((mixer(x) - original).abs().max() / original.abs().max().clamp(min=torch.finfo(w.dtype).tiny)).item()
    if not error <= TOLERANCE[w.dtype]:
        raise ValueError(
            f"{name} must agree with its original, got a difference of {error:.1e} of the largest output "
            f"where {TOLERANCE[w.dtype]:.0e} is expected in {w.dtype}: nothing was changed, please report it"
        )


# --- What is bound ---------------------------------------------------------------------------------------------------


def forward_of_model(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The model's own, its layers told of packed documents, and Bamba's positions counted on from the cache."""
    ids = args[0] if args else kwargs.get("input_ids")
    x = kwargs.get("inputs_embeds") if ids is None else ids
    if x is None:
        return type(model).forward(model, *args, **kwargs)  # its own error
    mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
    cache = kwargs.get(CACHE_NAME, kwargs.get("past_key_values"))
    cu_seqlens = mask if is_boundaries(mask) else boundaries(x, mask, position_ids, kwargs)
    if cu_seqlens is not None:
        check_packed(x, None if is_boundaries(mask) else mask, None, cu_seqlens)
        kwargs |= carry(model, x, cu_seqlens, cache)
    elif type(model).__name__ == "BambaModel" and cache is not None and position_ids is None:
        kwargs["position_ids"] = positions(x, None, None, cache)
    return type(model).forward(model, *args, **kwargs)


def boundaries(x: Tensor, mask: Any, position_ids: Tensor | None, kwargs: dict) -> Tensor | None:
    """cu_seqlens of a packed row, None for one document a row."""
    seq_idx = kwargs.get("seq_idx")
    if seq_idx is not None and kwargs.get("cu_seq_lens_q") is None:
        T = x.shape[1]
        position_ids = torch.arange(T, device=x.device) + 2 * T * seq_idx  # they jump where a document ends
        kwargs = {}
    return document_boundaries(x, mask, position_ids, kwargs)


def is_boundaries(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 1


def carry(model: Any, x: Tensor, cu_seqlens: Tensor, cache: Cache | None) -> dict[str, Any]:
    """The keywords by which the boundaries reach every layer, as an argument of each: layers are called again, with their
    arguments, by gradient checkpointing."""
    carrier = CARRIER[type(model).__name__]
    if carrier == "mask":
        return {"attention_mask": cu_seqlens}
    if carrier == "keyword":
        return {"attention_mask": None, "cu_seqlens": cu_seqlens}
    causal = create_causal_mask(
        config=model.config,
        inputs_embeds=torch.empty(*x.shape[:2], 1, dtype=model.dtype, device=x.device),
        attention_mask=None,
        position_ids=positions(x, None, cu_seqlens, None),
        **{CACHE_NAME: cache},
    )
    return {"attention_mask": {"full_attention": causal, "linear_attention": cu_seqlens}}


@force_accelerate_hooks("conv1d")
def forward_of_mixer(
    mixer: Any,
    hidden_states: Tensor,
    cache: Cache | None = None,
    attention_mask: Tensor | None = None,
    cache_params: Cache | None = None,  # what Transformers calls the cache before 5.24
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    x, cache = hidden_states, cache_params if cache is None else cache
    if is_boundaries(attention_mask):
        cu_seqlens, attention_mask = attention_mask, None
    states = None if cache is None else NativeStates(cache, mixer, x.shape[0])
    if cu_seqlens is not None and states is not None and states.read("conv") is not None:
        raise ValueError("a cache that holds a sequence must go on with one, got packed documents: continue them one at a time")
    mask = padding_mask(attention_mask, x.shape[1])
    return MIX[type(mixer).__name__](mixer, partial(convolve, mixer.conv1d, "silu"), x, mask, cu_seqlens, states)


class NativeStates:
    """A mixer's states in Transformers' cache, read and written in the layouts of the ops.

    There conv is [B, D, W], one input more than the next token needs, and Mamba-2's recurrent state [B, H, P, N].
    """

    def __init__(self, cache: Cache, mixer: Any, rows: int):
        self.cache, self.mixer, self.rows = cache, mixer, rows
        self.layer = cache.layers[mixer.layer_idx]

    def read(self, name: str) -> Tensor | None:
        if not self.layer.has_previous_state[0]:
            return None
        if name == "conv":
            return self.layer.conv_states[0][..., 1:].mT
        state = self.layer.recurrent_states[0].to(compute_dtype(self.mixer.A_log))
        return state.mT if state.dim() == 4 else state

    def write(self, tokens: int, recurrent: Tensor, conv: Tensor) -> None:
        """Keep the states; of packed documents, those of the last."""
        recurrent, conv, i = recurrent[-self.rows :], conv[-self.rows :], self.mixer.layer_idx
        self.cache.update_conv_state(F.pad(conv.mT, (1, 0)), i, conv_kernel_size=self.mixer.conv_kernel_size)
        self.cache.update_recurrent_state(recurrent.mT if recurrent.dim() == 4 else recurrent, i)
