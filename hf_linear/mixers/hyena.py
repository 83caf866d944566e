"""Hyena: long convolutions with implicit filters, between multiplicative gates."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedConfig

from hf_linear.cache import HistoryLayer
from hf_linear.mixers.base import RecurrentMixer
from hf_linear.modules.fused import is_untouched
from hf_linear.modules.padding import right_align, take, zero_padding
from hf_linear.modules.short_conv import ShortConv
from hf_linear.ops import long_conv, long_conv_ahead, long_conv_step
from hf_linear.ops.dispatch import full_precision


class Hyena(RecurrentMixer):
    """v <- h_n * (x_n v) + skip_n x_n v for n = N-1, ..., 1, then y = out_proj(x_0 v); x_0, ..., x_{N-1}, v project the input.

    State: the inputs of its N - 1 long convolutions and, once tokens come one by one, sums ahead of them (`long_conv_ahead`):
    [B, (N - 1) D, C], t <= C <= 2 t; and the last inputs of the short one.
    Source: arXiv 2302.10866, definition 3.1.
    """

    cache_layer = HistoryLayer
    float32_modules = ("implicit_filter",)

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        D, self.order = config.hidden_size, config.hyena_order
        self.cache_options = {"max_length": config.max_position_embeddings}
        self.in_proj = nn.Linear(D, (self.order + 1) * D)
        self.short_filter = ShortConv((self.order + 1) * D, config.short_filter_order, bias=True)
        self.implicit_filter = HyenaFilter(config)
        self.out_proj = nn.Linear(D, D)

    def forward(
        self,
        x: Tensor,
        *,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        D, cache = x.shape[-1], self.state(past_key_values)
        past = {} if cache is None else {name: cache.read(name) for name in ("conv", "recurrent")}
        short, conv_state = self.short_filter(self.in_proj(x), attention_mask, cu_seqlens, past.get("conv"))
        *gates, v = short.split(D, dim=-1)

        histories = past.get("recurrent")
        seen = 0 if cache is None or histories is None else int(cache.get_seq_length())
        if cache is not None and histories is not None and self.takes_step(x, histories, attention_mask, cu_seqlens):
            v, histories = self.step(v, gates, histories, seen)
            cache.write(1, conv=conv_state, recurrent=histories)
            return self.out_proj(gates[0] * v), None
        if cu_seqlens is None:
            length = seen + x.shape[1]
        else:  # the longest document's; in a graph all of it, for no shape may depend on the documents
            length = self.implicit_filter.length if torch.compiler.is_compiling() else int(cu_seqlens.diff().max())
        h, skip = self.implicit_filter(length)
        kept = []
        for n in range(self.order - 1, 0, -1):
            i = self.order - 1 - n
            history = None if histories is None else histories[:, i * D : (i + 1) * D, :seen]
            post_gate = gates[0] if n == 1 else None
            v, history = self.convolve(v, gates[n], post_gate, h[i], skip[i], history, attention_mask, cu_seqlens)
            if cache is not None:  # as large as v in float32: not to be held for nothing
                kept.append(history)
        if cache is not None:
            cache.write(x.shape[1], conv=conv_state, recurrent=torch.cat(kept, 1))
        return self.out_proj(v), None

    @staticmethod
    def takes_step(x: Tensor, histories: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> bool:
        """One token, no padding that would move the history, and nothing that belongs to a graph."""
        if x.shape[1] != 1 or mask is not None or cu_seqlens is not None or torch.compiler.is_compiling():
            return False
        return not (torch.is_grad_enabled() or histories.requires_grad)

    def step(self, v: Tensor, gates: list[Tensor], histories: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        """All long convolutions for one token, [B, 1, D], and the state that it leads to."""
        D = v.shape[-1]
        h, skip = self.implicit_filter(max(seen + 1, min(2 * seen, self.implicit_filter.length)))
        histories = long_conv_ahead(h.flatten(0, 1), histories, seen)
        v = v[:, 0]
        for i, gate in enumerate(gates[:0:-1]):
            v = long_conv_step(v, h[i], skip[i], gate[:, 0], histories[:, i * D : (i + 1) * D], seen)
        return v[:, None], histories

    @staticmethod
    def convolve(
        v: Tensor,
        pre_gate: Tensor,
        post_gate: Tensor | None,
        h: Tensor,
        skip: Tensor,
        history: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """post_gate * (the long convolution of pre_gate * v), [B, T, D]; padding is taken out of the way first."""
        if mask is None:
            u, before = v.transpose(1, 2), pre_gate.transpose(1, 2)
            behind = None if post_gate is None else post_gate.transpose(1, 2)
            y, history = long_conv(u, h, skip, pre_gate=before, post_gate=behind, initial_state=history, cu_seqlens=cu_seqlens)
            return y.transpose(1, 2), history
        dtype = torch.promote_types(v.dtype, torch.float32)
        (p,) = zero_padding(mask, v.to(dtype) * pre_gate.to(dtype))
        past = p.new_zeros(p.shape[0], 0, p.shape[2]) if history is None else history.transpose(1, 2)
        sequence, place = right_align(mask, past, p)
        y, history = long_conv(sequence.transpose(1, 2), h, skip)
        y = take(y.transpose(1, 2), place)
        return (y if post_gate is None else y * post_gate).to(v.dtype), history


class HyenaFilter(nn.Module):
    """h(t) = mlp(z_t) * (exp(-t |delta_d|) + shift), with sine activations and z_t features of the position t.

    The filter of every channel is a function of the position; its parameters stay in float32 whatever the model's dtype, for
    sin(w x) amplifies their rounding w-fold.
    Source: arXiv 2302.10866, section 3.3 and appendix D.3.
    """

    # The slowest and the fastest channel reach `TARGET` after 1.5 and 0.3 times the filter's length.
    TARGET, SLOW, FAST = 1e-2, 1.5, 0.3
    NUMBERS = 1 << 24  # of the filter, evaluated at a time: enough to fill a GPU, 64 MB an activation

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.length, self.channels = config.max_position_embeddings, config.hidden_size * (config.hyena_order - 1)
        width = config.filter_order
        options: dict[str, Any] = {"dtype": torch.promote_types(torch.get_default_dtype(), torch.float32)}
        positions = torch.empty(self.length, config.filter_emb_dim, **options)
        self.z = nn.Parameter(positions, requires_grad=config.train_filter_positions)
        self.freq = nn.Parameter(torch.empty(width, **options), requires_grad=config.train_freq)
        sizes = [config.filter_emb_dim, *[width] * (config.num_inner_mlps + 1)]
        self.layers = nn.ModuleList(nn.Linear(a, b, **options) for a, b in pairwise(sizes))
        self.out = nn.Linear(width, self.channels, bias=False, **options)
        self.skip = nn.Parameter(torch.empty(self.channels, **options))
        self.evaluated: tuple[list, list[Tensor], Tensor, Tensor] | None = None

    def _apply(self, fn, recurse=True):
        def keep_float32(x: Tensor) -> Tensor:
            moved = fn(x)
            rounded = moved.dtype in (torch.bfloat16, torch.float16)
            return x.to(moved.device, torch.float32) if rounded else moved  # moved.float() would be rounded already

        self.evaluated = None
        return super()._apply(keep_float32, recurse)

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` positions of the filters, [N - 1, D, length], and their skips, [N - 1, D]."""
        if length > self.length:
            raise ValueError(
                f"a sequence or document must not be longer than the Hyena filter, max_position_embeddings = {self.length}, "
                f"got {length} tokens: shorten it, or train a model with a longer filter"
            )
        if not torch.compiler.is_compiling():
            if not torch.is_grad_enabled() and not self.training and self.is_plain():
                return self.remembered(length)
            self.evaluated = None  # where weights learn, not every change of theirs shows: FSDP2 hides those of gathered ones
        return self.by_order(self.evaluate(length))

    def by_order(self, h: Tensor) -> tuple[Tensor, Tensor]:
        per_order = (self.config.hyena_order - 1, -1)
        # A copy of the skips: FSDP2 takes the parameters of a module back when its forward ends.
        return h.unflatten(0, per_order), self.skip.clone().unflatten(0, per_order)

    def is_plain(self) -> bool:
        """Whether the weights alone make the filter; an adapter may be switched off without a change of any."""
        return all(type(layer) is nn.Linear and is_untouched(layer) for layer in (*self.layers, self.out))

    def remembered(self, length: int) -> tuple[Tensor, Tensor]:
        """`forward` without a gradient, anew only for other weights or a greater length."""
        modules = (self, *self.layers, self.out)  # each plain: `parameters()` would search them again for every token
        weights = [weight for module in modules for weight in module._parameters.values() if weight is not None]
        if any(weight.is_inference() for weight in weights):
            return self.by_order(self.evaluate(length))  # such tensors count no versions
        key = [(weight.data_ptr(), weight._version, weight.dtype, weight.device) for weight in weights]
        if self.evaluated is None or self.evaluated[0] != key or self.evaluated[2].shape[-1] < length:
            longer = min(1 << (length - 1).bit_length(), self.length)  # tokens that follow find it long enough
            # Held weights keep their addresses: a new weight at a freed one would pass for the old.
            self.evaluated = key, [weight.detach() for weight in weights], *self.by_order(self.evaluate(longer))
        _, _, h, skip = self.evaluated
        return h[..., :length], skip

    def evaluate(self, length: int) -> Tensor:
        """The filters of all orders, [channels, length].

        Every position is a function of its own, so they are evaluated in blocks, and a gradient evaluates a block again: what
        is kept is the filter, none of the MLP's activations, and the work space is a block's whatever the length.
        """
        size = max(self.NUMBERS // self.channels, 1)
        starts, blocks = range(0, length, size), self.z[:length].split(size)
        if torch.is_grad_enabled():
            # What an adapter draws at random must come out the same the second time.
            again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": not self.is_plain()}
            h = [checkpoint(self.block, z, start, **again) for z, start in zip(blocks, starts, strict=True)]
        else:
            h = [self.block(z, start) for z, start in zip(blocks, starts, strict=True)]
        return torch.cat(h, 1)

    def block(self, z: Tensor, start: int) -> Tensor:
        """The filters at the positions from `start` on, whose features are z [n, emb_dim], [channels, n]."""
        with full_precision(z):
            x = z
            for layer in self.layers:
                x = torch.sin(self.freq * layer(x))
            h = self.out(x)  # [n, channels]
            if self.config.filter_modulate:
                h = h * self.window(start, h)
            if self.config.filter_normalize:
                h = h / h.abs().sum(-1, keepdim=True)
        return h.T

    def window(self, start: int, h: Tensor) -> Tensor:
        """exp(-t |delta|) + shift at the positions of h from `start` on, [n, channels]; t runs from 0 to 1 over the filter."""
        target = math.log(self.TARGET)
        slow, fast = target / self.SLOW, target / self.FAST
        delta = torch.linspace(slow, fast, self.channels, dtype=h.dtype, device=h.device)
        t = torch.arange(start, start + len(h), dtype=h.dtype, device=h.device)[:, None] / max(self.length - 1, 1)
        return torch.exp(-t * delta.abs()) + self.config.filter_shift

    def positions(self) -> Tensor:
        """The initial z, [length, emb_dim]: t, then cos and -sin of its bands, all in float32."""
        bands = (self.config.filter_emb_dim - 1) // 2
        t = torch.linspace(0, 1, self.length)[:, None]
        w = 2 * math.pi * torch.arange(self.length, dtype=torch.float32)[:, None] / self.length
        f = torch.linspace(1e-4, bands - 1, bands)
        return torch.cat([t, torch.cos(f * w), -torch.sin(f * w)], -1)
