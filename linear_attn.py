"""Linear attention that takes the place of a softmax-attention module in a Hugging Face decoder.

Three mixers, the ones the paper converts to (Distill-then-Replace, arXiv 2601.11667, section 3):

    gla  GatedLinearAttention   S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T
    gdn  GatedDeltaNet          S   = e^{g_t} S_{t-1};  S_t = S + beta_t k_t (v_t - S^T k_t)^T
    jet  JetBlock               GatedDeltaNet whose convolution on v has a kernel made per token

each followed by o_t = K^-1/2 S_t^T q_t, a gated RMSNorm per head and the output projection. None
uses positions. A mixer is made from the attention module it replaces, and by default inherits its
q, k, v and o projections, so that distillation starts near the teacher:

    mixer = MIXERS["gdn"].from_attention(attn, model.config, layer_idx)
    attn = swap(model, layer_idx, mixer)         # put it in; the module that was there comes back
    swap(model, layer_idx, attn)                 # take it out again
    save_hybrid(model, "hybrid", tokenizer)      # an ordinary checkpoint, with this file inside:
    AutoModelForCausalLM.from_pretrained("hybrid", trust_remote_code=True)

Letters: B batch, T time (tokens), H heads, D head_dim, W convolution width, C hidden_size.
To copy: this file and kernels.py, side by side.
"""

import contextlib
import copy
import json
import math
import os
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import nn

KNOWN = "5.5.4 to 5.24.0"      # the versions of transformers that were tried

try:
    from transformers.cache_utils import (
        Cache, CacheLayerMixin, DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin,
        StaticLayer)
except ImportError as error:
    raise ImportError(f"linear attention needs a cache that holds states: transformers {KNOWN} "
                      f"are known to work, this is {transformers.__version__}.") from error
from transformers.generation import GenerationMixin
from transformers.pytorch_utils import Conv1D

try:  # inside a saved checkpoint, kernels.py is a sibling in a package; here, a plain module
    from .kernels import causal_conv, gated_delta_rule, gated_linear_attention, gated_rms_norm
except ImportError:
    from kernels import causal_conv, gated_delta_rule, gated_linear_attention, gated_rms_norm

CONV_SIZE = 4           # taps of the short causal convolutions (GDN and JetBlock)
NORM_EPS = 1e-5         # of the output norm
LOW_RANK = 16           # GLA: width of the decay's bottleneck
GATE_NORMALIZER = 16    # GLA: log decay = logsigmoid(x) / 16
MIN_LOG_DECAY = -5.0    # GLA: the kernels are exact down to this log decay per step
GAP = 21                # padded tokens between documents: exp(-5 * 21) is 0 in fp32
START_LOG_DECAY = (0.01, 0.03)  # inherited start: -log decay per step, spread over the heads


class UserError(ValueError):
    """A mistake that the user can mend: the scripts print its one sentence and exit with code 2."""


# ------------------------------------------------------------------------------------------------
# The teacher's attention: where it sits, and its q, k, v, o projections

ATTENTION_NAMES = ("self_attn", "attention", "self_attention", "attn")


def decoder_layers(model):
    """The decoder's list of layers (nn.ModuleList). Raises UserError if the model has not one."""
    name, decoder = type(model).__name__, model.get_decoder()
    n = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [m for path, m in decoder.named_modules()       # lists inside a layer have a number
             if isinstance(m, nn.ModuleList) and len(m) == n    # in their path: experts, norms
             and not any(part.isdigit() for part in path.split("."))]
    if len(lists) != 1:
        raise UserError(f"{name}: looked for one list of {n} layers in its decoder, "
                        f"found {len(lists)}; this model cannot be converted.")
    return lists[0]


def attention_slots(model):
    """Where the token mixer of every decoder layer sits: [(layer, name of its attention)], in
    order. Raises UserError if the model's layers are not of the usual form."""
    if model.config.model_type in ("bloom", "mpt"):  # residual added inside; mask inverted
        raise UserError(f"{type(model).__name__}: its attention takes more than hidden states and "
                        "a mask in the usual form, so no linear module can stand in for it.")
    if any(isinstance(layer, LinearAttentionCacheLayerMixin)
           for layer in DynamicCache(config=model.config).layers):
        raise UserError(f"{type(model).__name__}: it has linear layers, or states beside its "
                        "attention, of its own; this model cannot be converted.")
    slots = []
    for layer_idx, layer in enumerate(decoder_layers(model)):
        names = [name for name, _ in layer.named_children() if name in ATTENTION_NAMES]
        if len(names) != 1:
            raise UserError(f"{type(model).__name__}: looked in layer {layer_idx} for one child "
                            f"named {', '.join(ATTENTION_NAMES)}, found {len(names)}; this model "
                            "cannot be converted.")
        slots.append((layer, names[0]))
    return slots


def attention_modules(model):
    """The token mixer of every decoder layer, softmax or linear, in order."""
    return [getattr(layer, name) for layer, name in attention_slots(model)]


def swap(model, layer_idx, module):
    """Put `module` in the place of layer `layer_idx`'s attention, by reference, in O(1).
    Returns the module that was there; swapping that back in restores the model."""
    layer, name = attention_slots(model)[layer_idx]
    previous = getattr(layer, name)
    setattr(layer, name, module)
    return previous


@contextlib.contextmanager
def replaced(model, mixers, layers):
    """Within the block, `layers` of the model are their linear modules, mixers[layer]."""
    slots = attention_slots(model)
    softmax = {layer: getattr(*slots[layer]) for layer in layers}
    try:
        for layer in softmax:
            setattr(*slots[layer], mixers[layer])
        yield model
    finally:
        for layer, attn in softmax.items():
            setattr(*slots[layer], attn)


class Projection(NamedTuple):
    weight: torch.Tensor            # [out, in]
    bias: torch.Tensor | None       # [out]


def _projection(linear):
    weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
    return Projection(weight, linear.bias)


# Where q, k and v share one projection: its name, and whether its rows go [q ... q k v] for each
# key/value head in turn, or all of q, all of k, all of v.
FUSED = {"GPT2Attention": ("c_attn", False), "Phi3Attention": ("qkv_proj", False),
         "GPTNeoXAttention": ("query_key_value", True),
         "FalconAttention": ("query_key_value", True),
         "PersimmonAttention": ("query_key_value", True),
         "GPTBigCodeAttention": ("c_attn", True)}


def _unfused(attn, num_heads, head_dim):
    """q, k and v out of a fused projection of (H + 2 kv_heads) * D rows."""
    name, by_group = FUSED[type(attn).__name__]
    fused = _projection(getattr(attn, name))
    kv_heads = (len(fused.weight) // head_dim - num_heads) // 2

    def split(rows):
        if not by_group:
            return rows.split([n * head_dim for n in (num_heads, kv_heads, kv_heads)])
        groups = rows.unflatten(0, (kv_heads, -1, head_dim))        # [kv_heads, H/kv_heads + 2, D]
        return [part.flatten(0, 2) for part in groups.split([num_heads // kv_heads, 1, 1], dim=1)]

    biases = (None,) * 3 if fused.bias is None else split(fused.bias)
    return [Projection(w, b) for w, b in zip(split(fused.weight), biases)]


def teacher_projections(attn, config):
    """(q, k, v, o) of a softmax-attention module, each a Projection, heads in order, before
    norms and RoPE; key and value may have fewer heads. Raises UserError for an unknown layout."""
    attn = getattr(attn, "attention", attn)     # GPT-Neo wraps its attention once more
    out = next((getattr(attn, name) for name in ("o_proj", "out_proj", "dense", "c_proj")
                if isinstance(getattr(attn, name, None), (nn.Linear, Conv1D))), None)
    separate = [getattr(attn, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    dim, layout = head_dim_of(attn, config), None
    if all(isinstance(linear, nn.Linear) for linear in separate):
        layout = [_projection(linear) for linear in separate]
    elif type(attn).__name__ in FUSED:
        layout = _unfused(attn, config.num_attention_heads, dim)
    if layout is not None and out is not None:
        q, k, v, o = *layout, _projection(out)
        if (q.weight.shape[0] == o.weight.shape[1] and k.weight.shape[0] == v.weight.shape[0]
                and q.weight.shape[0] % k.weight.shape[0] == 0 == k.weight.shape[0] % dim):
            return q, k, v, o
    raise UserError(f"{type(attn).__name__}: the layout of its q, k, v projections is not known "
                    "here, so they cannot be inherited; use --init random.")


def head_dim_of(attn, config):
    """The width of one head: the module's own word for it, else hidden_size / heads."""
    known = (getattr(attn, name, None) for name in ("head_dim", "head_size"))
    return next((d for d in known if d), config.hidden_size // config.num_attention_heads)


def repeat_heads(rows, num_heads, head_dim):
    """Rows of kv_heads heads, [kv_heads * D, ...] -> [H * D, ...], each head repeated in place as
    transformers' repeat_kv does: query head h reads key/value head h // (H / kv_heads)."""
    heads = rows.unflatten(0, (-1, head_dim))                               # [kv_heads, D, ...]
    return heads.repeat_interleave(num_heads // len(heads), dim=0).flatten(0, 1)


def _teacher_norm(attn, names, num_heads, head_dim):
    """A copy of the teacher's norm of q or k, widened to all heads if it spans them; or None."""
    norm = next((getattr(attn, n) for n in names if getattr(attn, n, None) is not None), None)
    if norm is None:
        return None
    weight = getattr(norm, "weight", None)
    if weight is None or weight.dim() > 2:
        raise UserError(f"{type(norm).__name__}: this norm of q or k has a layout that is not "
                        "known here, so it cannot be inherited; use --init random.")
    norm = copy.deepcopy(norm)
    if weight.numel() != head_dim:  # over the whole projection (OLMo 2), or [heads, D] (Cohere)
        for name, parameter in norm.named_parameters():
            rows = repeat_heads(parameter.detach().flatten(), num_heads, head_dim)
            setattr(norm, name, nn.Parameter(rows.view(-1, *parameter.shape[1:])))
    return norm


# ------------------------------------------------------------------------------------------------
# Padding and the cache

def padding_mask(attention_mask, length):
    """Which of the last `length` tokens are real: bool [B, length].

    attention_mask is what transformers hands to an attention module: [B, K], or [B, 1, Q, K]
    (bool, or float with the lowest number where masked), whose last keys are the queries' own. In
    the last form a token is real if and only if it may attend to itself.
    """
    if attention_mask.dim() == 2:
        return attention_mask[:, -length:].bool()
    queries, keys = attention_mask.shape[-2:]
    return _visible(attention_mask[:, 0].diagonal(keys - queries, -2, -1))          # [B, Q]


def _visible(mask):
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


class Rows(NamedTuple):
    """A call's tokens [B, T] laid out for a mixer, where some are padding or a row holds several
    documents (packing): in each of the B rows, of R >= T places, the real tokens in order, the
    padded ones behind them. Before another document stands a gap, in which all is forgotten."""
    order: torch.Tensor             # [B, R] which token of the call stands here
    place: torch.Tensor             # [B, T] its inverse: where each token of the call stands
    real: torch.Tensor              # [B, R] bool: neither padding nor a gap
    gap: torch.Tensor | None        # [B, R] bool; None where no row holds several documents

    @classmethod
    def of(cls, attention_mask, length, begins):
        """From a mask as `padding_mask` takes it. If the call begins its texts, its rows may hold
        several: in the mask's second form they show as a token that may not attend to the real one
        before it."""
        real = padding_mask(attention_mask, length)
        if length == 1:
            only = torch.zeros_like(real, dtype=torch.long)
            return cls(only, only, real, None)
        order = real.logical_not().byte().argsort(dim=1, stable=True)
        real, rows = real.gather(1, order), cls(order, order.argsort(1), real.gather(1, order), None)
        if attention_mask.dim() == 2 or not begins:
            return rows
        queries, keys = attention_mask.shape[-2:]
        before = order[:, 1:] * keys + order[:, :-1] + keys - queries               # [B, T-1]
        seen = _visible(attention_mask[:, 0].flatten(1).gather(1, before))
        return rows.with_gaps(F.pad(real[:, 1:] & ~seen, (1, 0)))

    @classmethod
    def of_positions(cls, position_ids):
        """From positions [B, T] without padding, which restart where a document begins."""
        order = torch.arange(position_ids.shape[1], device=position_ids.device)
        order = order.expand_as(position_ids)
        rows = cls(order, order, torch.ones_like(order, dtype=torch.bool), None)
        return rows.with_gaps(F.pad(position_ids.diff(dim=1) <= 0, (1, 0)))

    def with_gaps(self, first):
        """With a gap before each `first` token of another document, [B, T] bool. Their number
        decides R, so a host waits here for its GPU."""
        most = int(first.sum(1).max())
        if most == 0:
            return self
        T = first.shape[1]
        slot = torch.arange(T, device=first.device) + GAP * first.cumsum(1)         # [B, T]
        rows = slot.new_zeros(len(first), T + GAP * most)                           # [B, R]
        gap = torch.arange(rows.shape[1], device=first.device) < slot[:, -1:]
        return Rows(rows.scatter(1, slot, self.order), slot.gather(1, self.place),
                    rows.bool().scatter(1, slot, self.real), gap.scatter(1, slot, False))

    def gather(self, x):
        """x [B, T, C] laid out, [B, R, C]."""
        return x.take_along_dim(self.order.unsqueeze(-1), 1)

    def scatter(self, o):
        """o [B, R, H, D] as the call has its tokens, [B, T, H, D]."""
        return o.take_along_dim(self.place[:, :, None, None], 1)

    def written(self, x):
        """k, beta or a convolution's input, [B, R, channels]: only a real token writes."""
        return x.masked_fill(~self.real.unsqueeze(-1), 0)

    def decays(self, g):
        """Log decays [B, R, channels]: padding forgets nothing, a gap everything."""
        g = g.masked_fill(~self.real.unsqueeze(-1), 0)
        return g if self.gap is None else g.masked_fill(self.gap.unsqueeze(-1), MIN_LOG_DECAY)


def short_conv(x, kernel, rows, cache):
    """SiLU(causal_conv(x, kernel)) and the new cache, as kernels.py has them, of x [B, R, D] as
    `rows` (a Rows, or None) laid it out: the cache holds what lies before the last real token."""
    if rows is None:
        return causal_conv(x, kernel, cache, activation="silu")
    x, W = rows.written(x), kernel.shape[-2]
    before = x.new_zeros(len(x), W - 1, x.shape[-1]) if cache is None else cache.to(x.dtype)
    number = torch.arange(1, x.shape[1] + W, device=x.device)
    last = (rows.real * number[:x.shape[1]]).amax(1, keepdim=True)      # [B, 1], counted from 1
    tail = torch.cat([before, x], 1).take_along_dim(
        (last + number[:W - 1] - 1).unsqueeze(-1), 1)                   # [B, W-1, D]
    return causal_conv(x, kernel, cache, activation="silu")[0], tail


# What attention modules have called the cache: 5.24's name, the one before it, some families' own
CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")


class LinearCacheLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """One linear layer's memory inside a transformers Cache: the recurrent state
    [B, H, D, D] (fp32), the convolution's tail [B, W-1, channels], and the tokens seen.

    It has both base classes, so that masks are sized from a softmax layer where there is one and
    from the tokens seen here where there is none. Tensors are replaced, never written in place.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = False

    def __init__(self):
        LinearAttentionCacheLayerMixin.__init__(self)
        CacheLayerMixin.__init__(self)
        self.reset()

    def reset(self):
        self.recurrent = self.conv = None
        self.seen = 0

    def store(self, recurrent, conv, new_tokens):
        self.recurrent, self.conv, self.seen = recurrent, conv, self.seen + new_tokens

    def get_seq_length(self):
        return self.seen

    def get_mask_sizes(self, query_length):
        return self.seen + query_length, 0

    def get_max_cache_shape(self):      # asked for by transformers before 5.13
        return -1

    def _each_tensor(self, function):
        self.recurrent = None if self.recurrent is None else function(self.recurrent)
        self.conv = None if self.conv is None else function(self.conv)

    def reorder_cache(self, beam_idx):
        self._each_tensor(lambda t: t.index_select(0, beam_idx.to(t.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats):
        self._each_tensor(lambda t: t.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove):
        raise RuntimeError("a linear layer's state cannot be rolled back: decoding that crops the "
                           "cache (assisted, prompt lookup) does not work with a hybrid.")

    def activate_past_recording(self):
        self.crop(0)

    def update(self, *args, **kwargs):
        raise RuntimeError("this cache already holds a linear layer's state here, but a softmax "
                           "layer wants to use it: make a new cache after swapping layers.")

    lazy_initialization = update_conv_state = update_recurrent_state = update

    def offload(self):
        """Nothing to do: the state is small and stays on its device."""

    prefetch = offload


def cache_layer(cache, layer_idx):
    """The LinearCacheLayer at `layer_idx` of a transformers Cache, put there at first use."""
    if cache is None:
        return None
    if not isinstance(cache, Cache):
        raise UserError(NO_CONTINUOUS_BATCHING)
    while len(cache.layers) <= layer_idx:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[layer_idx]
    if isinstance(layer, LinearCacheLayer):
        return layer
    if isinstance(layer, StaticLayer):
        raise ValueError("a hybrid cannot use a static cache; leave cache_implementation unset.")
    if layer.get_seq_length() > 0:
        raise ValueError(f"layer {layer_idx} of this cache already holds keys and values of a "
                         "softmax layer: make a new cache after swapping layers.")
    cache.layers[layer_idx] = LinearCacheLayer()
    return cache.layers[layer_idx]


# ------------------------------------------------------------------------------------------------
# The three mixers

class GatedRMSNorm(nn.Module):
    """o * rsqrt(mean(o^2) + eps) * weight * silu(gate), per head, in fp32."""

    def __init__(self, head_dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, o, gate):                                     # both [B, T, H, D]
        return gated_rms_norm(o.to(gate.dtype), self.weight, gate, NORM_EPS)


def l2_normalize(x, eps=1e-6):
    """x / |x| over the last dimension, in fp32 (fp64 for fp64), back in x's dtype."""
    D = x.shape[-1]
    return gated_rms_norm(x, eps=eps / D, scale=D ** -0.5)


def inverse_softplus(x):
    return x + torch.log(-torch.expm1(-x))


class LinearAttention(nn.Module):
    """What the three mixers share: projections, output gate, norm, padding, cache, making.

    forward(hidden_states [B, T, C], attention_mask=None, position_ids=None, cache=None) ->
    ([B, T, C], None), the calling convention of attention modules in transformers (the cache has
    several names, CACHE_NAMES; what else they pass is not needed here). ValueError for a mask or
    a cache that a linear layer cannot use. A subclass adds its parameters in
    `add_parameters`, its neutral start in `start_neutral`, and its recurrence in `mix`.
    """

    def __init__(self, attn, config, layer_idx, init="inherit"):
        """The structure, as `attn` asks for it: biases and norms of q and k where `init` is
        "inherit", none of either where it is "random". Values come from `from_attention`, or
        from a checkpoint."""
        super().__init__()
        if init not in ("inherit", "random"):
            raise UserError(f"init must be 'inherit' or 'random', not {init!r}.")
        self.layer_idx, self.init = layer_idx, init
        config = self.config = config.get_text_config(decoder=True)
        self.hidden_size, self.head_dim = config.hidden_size, head_dim_of(attn, config)
        self.num_heads, biases, norms = config.num_attention_heads, [False] * 4, (None, None)
        self.clip_qkv = None
        if init == "inherit":
            teacher = teacher_projections(attn, config)
            biases = [projection.bias is not None for projection in teacher]
            self.num_heads = len(teacher[0].weight) // self.head_dim
            norms = [_teacher_norm(attn, names, self.num_heads, self.head_dim)
                     for names in (("q_norm", "q_layernorm"), ("k_norm", "k_layernorm"))]
            self.clip_qkv = getattr(config, "clip_qkv", None)           # OLMo
        width = self.num_heads * self.head_dim
        self.q_proj = nn.Linear(self.hidden_size, width, bias=biases[0])
        self.k_proj = nn.Linear(self.hidden_size, width, bias=biases[1])
        self.v_proj = nn.Linear(self.hidden_size, width, bias=biases[2])
        self.o_proj = nn.Linear(width, self.hidden_size, bias=biases[3])
        self.q_norm, self.k_norm = norms
        # A bias keeps the gate open at the start: silu(0) = 0 would mute the output.
        self.g_proj = nn.Linear(self.hidden_size, width)
        self.o_norm = GatedRMSNorm(self.head_dim)
        self.add_parameters()

    @classmethod
    def from_attention(cls, attn, config, layer_idx, init="inherit", seed=0):
        """A mixer for the place of `attn` (a softmax-attention module), on its device and in its
        dtype. "inherit": the teacher's q, k, v, o (heads of k and v repeated, biases and norms
        of q and k included), new parameters neutral. "random": nothing of the teacher but its
        sizes. `seed` and the layer's number fix what is drawn. Raises UserError."""
        like = next(attn.parameters())
        config = config.get_text_config(decoder=True)
        with torch.device(like.device), torch.no_grad():
            mixer = cls(attn, config, layer_idx, init)
            draw = torch.Generator().manual_seed(1_000_003 * seed + layer_idx)
            mixer.start_random(draw)
            if init == "inherit":
                mixer.inherit(teacher_projections(attn, config))
                mixer.start_neutral()
        return mixer.to(like.dtype)

    def inherit(self, teacher):
        """Take the teacher's q, k, v, o; repeat key and value heads as repeat_kv does."""
        own = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        for linear, (weight, bias), is_out in zip(own, teacher, (False, False, False, True)):
            rows = (lambda t: t) if is_out else (
                lambda t: repeat_heads(t, self.num_heads, self.head_dim))
            linear.weight.copy_(rows(weight))
            if bias is not None:
                linear.bias.copy_(rows(bias))

    def start_random(self, draw):
        """Every matrix from N(0, 1 / fan_in); also the part of the inherited start that must not
        be zero. `draw` is a torch.Generator on the CPU."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                drawn = torch.randn(module.weight.shape, generator=draw, device="cpu")
                module.weight.copy_(drawn * module.in_features ** -0.5)
                if module.bias is not None:
                    module.bias.zero_()

    def start_neutral(self):
        """New parameters of an inherited module: the gate is constant, silu(bias) = 1."""
        self.g_proj.weight.zero_()
        self.g_proj.bias.fill_(1.2784645)

    def project(self, hidden_states):
        """q, k, v as the teacher makes them before RoPE, key/value heads repeated: three
        [B, T, H * D]."""
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.clip_qkv is not None:
            q, k, v = (x.clamp(-self.clip_qkv, self.clip_qkv) for x in (q, k, v))
        return self._normed(q, self.q_norm), self._normed(k, self.k_norm), v

    def _normed(self, x, norm):
        if norm is None:
            return x
        if norm.weight.shape[-1] == self.head_dim:
            return norm(self.heads(x)).flatten(-2)
        return norm(x)

    def heads(self, x):
        return x.unflatten(-1, (self.num_heads, self.head_dim))     # [B, T, H * D] -> [B, T, H, D]

    def rows(self, hidden_states, attention_mask, position_ids, begins):
        """How hidden_states [B, T, C] are laid out: a Rows, or None where each row is one document
        without padding. Packed documents show in the mask, but flash attention gets none: it knows
        them, in a batch of one, by their positions. Both are looked at only where the call begins
        its texts."""
        B, T, _ = hidden_states.shape
        if isinstance(attention_mask, torch.Tensor):
            return Rows.of(attention_mask.expand(B, *attention_mask.shape[1:]), T, begins)
        if attention_mask is not None:
            raise ValueError(f"a linear layer cannot read a mask of type "
                             f"{type(attention_mask).__name__}; use attn_implementation='sdpa'.")
        flash = "flash" in str(self.config._attn_implementation)
        if flash and begins and B == 1 < T and position_ids is not None and position_ids.dim() == 2:
            return Rows.of_positions(position_ids)
        return None

    def head_outputs(self, hidden_states, attention_mask=None, cache=None, position_ids=None):
        """The input of o_proj, [B, T, H * D]: the module's output is linear in o_proj, so these
        are the features of the closed-form start (distill.py)."""
        past = cache_layer(cache, self.layer_idx)
        begins = past is None or past.seen == 0
        rows = self.rows(hidden_states, attention_mask, position_ids, begins)
        o, recurrent, conv = self.mix(
            hidden_states if rows is None else rows.gather(hidden_states), rows,
            past and past.recurrent, past and past.conv)
        if past is not None:
            past.store(recurrent, conv, hidden_states.shape[1])
        o = o if rows is None else rows.scatter(o)
        return self.o_norm(o, self.heads(self.g_proj(hidden_states))).flatten(-2)

    def forward(self, hidden_states, attention_mask=None, position_ids=None, **kwargs):
        caches = [kwargs.pop(name) for name in CACHE_NAMES if kwargs.get(name) is not None]
        for name, value in kwargs.items():
            if isinstance(value, Cache):
                raise ValueError(f"a linear layer got a cache under the unknown name {name!r}: "
                                 f"transformers {KNOWN} are known to work, this is "
                                 f"{transformers.__version__}.")
        cache = caches[0] if caches else None
        return self.o_proj(self.head_outputs(hidden_states, attention_mask, cache, position_ids)), None


class GatedLinearAttention(LinearAttention):
    """GLA (Yang et al. 2023): a decay per key channel, from a low-rank projection."""

    def add_parameters(self):
        width = self.num_heads * self.head_dim
        self.decay_down = nn.Linear(self.hidden_size, LOW_RANK, bias=False)
        self.decay_up = nn.Linear(LOW_RANK, width)

    def start_neutral(self):
        super().start_neutral()
        # One log decay per head, from long memory to short; logsigmoid(bias) / 16 is that decay.
        # Only decay_up is zeroed: with both at zero neither would ever learn.
        self.decay_up.weight.zero_()
        log_sigmoid = -GATE_NORMALIZER * start_decays(self.num_heads)
        bias = log_sigmoid - torch.log(-torch.expm1(log_sigmoid))
        self.decay_up.bias.copy_(bias.repeat_interleave(self.head_dim))

    def mix(self, hidden_states, rows, recurrent, conv):
        q, k, v = self.project(hidden_states)
        g = F.logsigmoid(self.decay_up(self.decay_down(hidden_states)).float()) / GATE_NORMALIZER
        g = g.clamp(min=MIN_LOG_DECAY)
        if rows is not None:
            k, g = rows.written(k), rows.decays(g)
        o, recurrent = gated_linear_attention(
            self.heads(q), self.heads(k), self.heads(v), self.heads(g), recurrent)
        return o, recurrent, None


class GatedDeltaNet(LinearAttention):
    """Gated DeltaNet (Yang et al. 2024): the delta rule with one decay per head; short causal
    convolutions and SiLU on q, k and v; q and k of unit length."""

    def add_parameters(self):
        width = self.num_heads * self.head_dim
        self.b_proj = nn.Linear(self.hidden_size, self.num_heads, bias=False)   # beta
        self.a_proj = nn.Linear(self.hidden_size, self.num_heads, bias=False)   # decay
        self.A_log = nn.Parameter(torch.zeros(self.num_heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.num_heads))
        self.add_conv(width)

    def add_conv(self, width):
        self.conv_kernel = nn.Parameter(identity_kernel(3 * width))     # [W, q | k | v channels]

    def start_random(self, draw):
        """As the published layer: A from U(0, 16), time steps log-uniform in [0.001, 0.1]."""
        super().start_random(draw)
        uniform = torch.rand(2, self.num_heads, generator=draw, device="cpu")
        self.A_log.copy_((16 * uniform[0]).clamp(min=1e-4).log())
        low, high = math.log(1e-3), math.log(1e-1)
        self.dt_bias.copy_(inverse_softplus((low + (high - low) * uniform[1]).exp()))
        self.start_random_conv(draw)

    def start_random_conv(self, draw):
        drawn = torch.rand(self.conv_kernel.shape, generator=draw, device="cpu")
        self.conv_kernel.copy_((2 * drawn - 1) * CONV_SIZE ** -0.5)

    def start_neutral(self):
        super().start_neutral()
        self.b_proj.weight.zero_()                                      # beta = 1/2
        self.a_proj.weight.zero_()
        self.A_log.zero_()                                              # A = 1
        self.dt_bias.copy_(inverse_softplus(start_decays(self.num_heads)))
        self.start_neutral_conv()

    def start_neutral_conv(self):
        self.conv_kernel.copy_(identity_kernel(self.conv_kernel.shape[1]))

    def convolve(self, hidden_states, rows, cache):
        """SiLU(conv) of q, k and v, each [B, T, H * D], and the convolution's new tail."""
        qkv = torch.cat(self.project(hidden_states), dim=-1)            # [B, T, 3 * H * D]
        qkv, cache = short_conv(qkv, self.conv_kernel, rows, cache)
        return *qkv.chunk(3, dim=-1), cache

    def mix(self, hidden_states, rows, recurrent, conv):
        q, k, v, conv = self.convolve(hidden_states, rows, conv)
        q, k = l2_normalize(self.heads(q)), l2_normalize(self.heads(k))
        beta = self.b_proj(hidden_states).float().sigmoid()             # [B, T, H]
        step = F.softplus(self.a_proj(hidden_states).float() + self.dt_bias.float())
        g = -self.A_log.float().exp() * step                            # [B, T, H]
        if rows is not None:
            beta, g = rows.written(beta), rows.decays(g)
        o, recurrent = gated_delta_rule(q, k, self.heads(v), g, beta, recurrent)
        return o, recurrent, conv


class JetBlock(GatedDeltaNet):
    """JetBlock (Jet-Nemotron, Gu et al. 2025): Gated DeltaNet without convolutions on q and k;
    the one on v has a kernel that a small generator makes for every token from the layer's
    input. At the start the kernel is the identity on the current token."""

    def add_conv(self, width):
        self.kernel_down = nn.Linear(self.hidden_size, max(width // 8, 1), bias=False)
        self.kernel_up = nn.Linear(max(width // 8, 1), CONV_SIZE * width)   # [tap, channel]

    def start_random_conv(self, draw):
        self.start_neutral_conv()

    def start_neutral_conv(self):
        # kernel_down keeps its random start: were both zero, the generator would never learn.
        self.kernel_up.weight.zero_()
        self.kernel_up.bias.copy_(identity_kernel(self.num_heads * self.head_dim).flatten())

    def convolve(self, hidden_states, rows, cache):
        q, k, v = self.project(hidden_states)
        kernel = self.kernel_up(F.silu(self.kernel_down(hidden_states)))
        kernel = kernel.unflatten(-1, (CONV_SIZE, -1))                  # [B, T, W, H * D]
        v, cache = short_conv(v, kernel, rows, cache)
        return F.silu(q), F.silu(k), v, cache


MIXERS = {"gla": GatedLinearAttention, "gdn": GatedDeltaNet, "jet": JetBlock}


def start_decays(num_heads):
    """-log decay per step of each head at the inherited start, evenly spaced in its logarithm."""
    low, high = (math.log(x) for x in START_LOG_DECAY)
    return torch.linspace(low, high, num_heads).exp()


def identity_kernel(channels):
    """A convolution kernel [W, channels] that returns the current token."""
    kernel = torch.zeros(CONV_SIZE, channels)
    kernel[-1] = 1
    return kernel


# ------------------------------------------------------------------------------------------------
# A hybrid as an ordinary checkpoint
#
# For every architecture a subclass is made on demand: HybridLlamaForCausalLM and
# HybridLlamaConfig from transformers' own classes, with a model_type of their own, so that loading
# without trust_remote_code is an error rather than a plain Llama with random attention.

MODEL_TYPE_PREFIX = "dtr_"


NO_CONTINUOUS_BATCHING = ("a hybrid's states do not fit into the pages of continuous batching "
                          "(generate_batch): use generate() on a padded batch.")


class HybridMixin:
    """Builds the base model, then swaps in the mixers that the config lists."""

    _is_stateful = True         # generate() then refuses the modes that would roll the cache back

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        n, attention = len(config.linear_layers), attention_modules(self)
        kinds, inits = ([value] * n if isinstance(value, str) else value    # one for all, or a list
                        for value in (config.linear_attn, config.linear_init))
        for layer_idx, kind, init in zip(config.linear_layers, kinds, inits, strict=True):
            swap(self, layer_idx, MIXERS[kind](attention[layer_idx], config, layer_idx, init))
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """As in transformers, but a checkpoint that does not fit is refused: transformers would
        draw what is missing at random, and go on."""
        shards = kwargs.get("distributed_config")
        if any(kwargs.get(name) or getattr(shards, name, None) for name in ("tp_plan", "tp_size")):
            raise UserError("a hybrid does not run tensor-parallel, since its linear layers have "
                            "no plan for that; load it on one device, or with device_map='auto'.")
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = [f"{kind} {min(keys)}, {len(keys)} in all" for kind in ("missing", "unexpected")
                 if (keys := info[f"{kind}_keys"])]
        if wrong:
            raise UserError(f"this checkpoint is damaged or not of this model ({'; '.join(wrong)})"
                            ": save the hybrid again, or download it again.")
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers, under the parameters' own names: the names of the base's checkpoint
        would be turned back by model type at loading, and a hybrid has a type of its own."""
        super().save_pretrained(save_directory, *args, **{**kwargs, "save_original_format": False})

    def init_continuous_batching(self, *args, **kwargs):
        """Refused here: an error in the middle of generate_batch would only be logged."""
        raise UserError(NO_CONTINUOUS_BATCHING)


def __getattr__(name):
    """HybridXxxConfig and HybridXxx for any class Xxx of transformers (PEP 562)."""
    if not name.startswith("Hybrid") or not hasattr(transformers, name[len("Hybrid"):]):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = getattr(transformers, name[len("Hybrid"):])
    if name.endswith("Config"):
        fields = {"linear_attn": "gdn", "linear_layers": (), "linear_init": "inherit"}
        made = type(name, (base,), {
            "model_type": MODEL_TYPE_PREFIX + base.model_type, "_auto_class": "AutoConfig",
            "__module__": __name__, **fields,
            "__annotations__": {"linear_attn": str | list, "linear_layers": list,
                                "linear_init": str | list}})
    else:
        made = type(name, (HybridMixin, base, GenerationMixin), {
            "config_class": getattr(_this_module(), f"Hybrid{base.config_class.__name__}"),
            "_auto_class": "AutoModelForCausalLM", "__module__": __name__})
    globals()[name] = made
    return made


def _this_module():
    return sys.modules[__name__]


def is_hybrid_config(config):
    return config.model_type.startswith(MODEL_TYPE_PREFIX)


@contextlib.contextmanager
def _as_hybrid(model):
    """Within the block, `model` is of its Hybrid class; the weights are not copied."""
    model_class, config_class = type(model), type(model.config)
    hybrid = getattr(_this_module(), "Hybrid" + model_class.__name__)
    layers, attention = linear_layers(model), attention_modules(model)
    names = {mixer: name for name, mixer in MIXERS.items()}
    fields = {"linear_layers": layers, "linear_init": [attention[i].init for i in layers],
              "linear_attn": [names[type(attention[i])] for i in layers]}
    model.config.__class__, model.__class__ = hybrid.config_class, hybrid
    for name, value in fields.items():
        setattr(model.config, name, value)
    try:
        yield model
    finally:
        model.config.__class__, model.__class__ = config_class, model_class
        for name in [*fields, "auto_map"]:
            model.config.__dict__.pop(name, None)


def linear_layers(model):
    """The numbers of the layers whose attention is a linear mixer."""
    return sorted(m.layer_idx for m in model.modules() if isinstance(m, LinearAttention))


def check_savable(model):
    """Raise UserError if `model`'s class is not one of transformers' own."""
    if getattr(transformers, type(model).__name__, None) is not type(model):
        raise UserError(f"{type(model).__name__} is not one of transformers' own classes, so a "
                        "hybrid of it cannot be saved as an ordinary checkpoint.")


def save_hybrid(model, directory, tokenizer=None):
    """Save `model` with whatever mixers are swapped in, as an ordinary checkpoint (safetensors,
    config, this file and kernels.py). Without any mixer, the base model is saved."""
    if not linear_layers(model):
        model.save_pretrained(directory)
    else:
        check_savable(model)
        with _as_hybrid(model):
            model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def load_hybrid(directory, **kwargs):
    """Load a saved hybrid with the classes of this file (no remote code runs). Other arguments
    go to from_pretrained."""
    with open(os.path.join(directory, "config.json")) as file:
        architecture = json.load(file)["architectures"][0]
    return getattr(_this_module(), architecture).from_pretrained(directory, **kwargs)
