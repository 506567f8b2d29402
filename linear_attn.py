"""Linear attention that takes the place of a softmax-attention module in a Hugging Face decoder.

Three mixers, the ones the paper converts to (Distill-then-Replace, arXiv 2601.11667, section 3):

    gla  GatedLinearAttention   S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T
    gdn  GatedDeltaNet          S   = e^{g_t} S_{t-1};  S_t = S + beta_t k_t (v_t - S^T k_t)^T
    jet  JetBlock               GatedDeltaNet whose convolution on v has a kernel made per token

each followed by o_t = K^-1/2 S_t^T q_t, a gated RMSNorm per head and the output projection. None
uses positions. A mixer is made from sizes, or from the attention module that it replaces:

    mixer = GatedDeltaNet(hidden_size=256, num_heads=4, head_dim=64)
    output, _ = mixer(torch.randn(2, 100, 256))                             # [B, T, C] both
    mixer = MIXERS["gdn"].from_attention(attn, model.config, layer_idx)
    attn = swap(model, layer_idx, mixer)         # put it in; returns the module that was there
    save_hybrid(model, "hybrid", tokenizer)      # an ordinary checkpoint, with this file inside:
    AutoModelForCausalLM.from_pretrained("hybrid", trust_remote_code=True)

Letters: B batch, T time (tokens), H heads, D head_dim, W convolution width, C hidden_size.
To copy: this file and kernels.py, side by side. If you make mixers from sizes only, the section
"The mixers" and the import of kernels.py are enough; they then use nothing of transformers.
"""

import contextlib
import copy
import functools
import math

import torch
import torch.nn.functional as F
import transformers
from torch import nn

KNOWN = "5.5.4 to 5.24.0"      # the versions of transformers that were tried
VERSIONS = f"transformers {KNOWN} are known to work, this is {transformers.__version__}"

try:
    from transformers.cache_utils import (
        Cache, DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin, StaticLayer)
except ImportError as error:
    raise ImportError(f"linear attention needs a cache that holds states: {VERSIONS}.") from error
from transformers.generation import GenerationMixin
from transformers.pytorch_utils import Conv1D

try:  # inside a saved checkpoint, kernels.py is a sibling in a package; here, a plain module
    from .kernels import causal_conv, gated_delta_rule, gated_linear_attention, gated_rms_norm
except ImportError:
    from kernels import causal_conv, gated_delta_rule, gated_linear_attention, gated_rms_norm


# ------------------------------------------------------------------------------------------------
# The mixers

CONV_SIZE = 4           # taps of the short causal convolutions (GDN and JetBlock)
LOW_RANK = 16           # GLA: width of the decay's bottleneck
GATE_NORMALIZER = 16    # GLA: log decay = logsigmoid(x) / 16
MIN_LOG_DECAY = -5.0    # GLA: the kernels are exact down to this log decay per step
START_LOG_DECAY = (0.01, 0.03)  # inherited start: -log decay per step, spread over the heads


class GatedRMSNorm(nn.RMSNorm):
    """o * rsqrt(mean(o^2) + eps) * weight * silu(gate), per head, in fp32."""

    def forward(self, o, gate):                                     # both [B, T, H, D]
        return gated_rms_norm(o.to(gate.dtype), self.weight, gate, self.eps)


def inverse_softplus(x):
    return x + torch.log(-torch.expm1(-x))


def start_decays(num_heads):
    """-log decay per step of each head at the inherited start, evenly spaced in its logarithm."""
    return torch.linspace(*map(math.log, START_LOG_DECAY), num_heads).exp()


def identity_kernel(channels):
    """A convolution kernel [W, channels] that returns the current token."""
    return F.pad(torch.ones(1, channels), (0, 0, CONV_SIZE - 1, 0))


class LinearAttention(nn.Module):
    """The base of the mixers: projections, output norm and gate.

    forward(hidden_states [B, T, C]) -> ([B, T, C], None), like attention modules of transformers.
    Of their other arguments it reads attention_mask, position_ids and the cache (see read_call).

    A subclass defines add_parameters, start_neutral and its recurrence, mix(hidden_states, rows,
    state) -> (o [B, T, H, D], new state). `state`: the recurrent state [B, H, D, D] (fp32) and the
    convolution's tail [B, W-1, channels], each None where a text begins. `rows`: a Rows, or None
    if there is no padding and each row is one text."""

    def __init__(self, hidden_size, num_heads, head_dim, biases=(False,) * 4, layer_idx=0, seed=0):
        """A mixer at its random start, which `seed` and `layer_idx` fix; seed None leaves the
        values to load_state_dict. `biases`: which of the q, k, v and o projections have one."""
        super().__init__()
        self.num_heads, self.head_dim, self.layer_idx = num_heads, head_dim, layer_idx
        self.config, self.init, self.clip_qkv = None, "random", None    # from_attention sets them
        width = num_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=biases[0])
        self.k_proj = nn.Linear(hidden_size, width, bias=biases[1])
        self.v_proj = nn.Linear(hidden_size, width, bias=biases[2])
        self.o_proj = nn.Linear(width, hidden_size, bias=biases[3])
        self.register_module("q_norm", None)            # the place of the teacher's norms, if any
        self.register_module("k_norm", None)
        self.g_proj = nn.Linear(hidden_size, width)     # its bias opens the gate: silu(0) = 0
        self.o_norm = GatedRMSNorm(head_dim, eps=1e-5)
        self.add_parameters(hidden_size, width)
        if seed is not None:
            with torch.no_grad():
                self.start_random(torch.Generator().manual_seed(1_000_003 * seed + layer_idx))

    @classmethod
    @torch.no_grad()
    def from_attention(cls, attn, config, layer_idx, init="inherit", seed=0):
        """A mixer for the place of `attn` (a softmax-attention module of a model with `config`),
        on its device and in its dtype. "inherit" takes the teacher's q, k, v and o (heads of k
        and v repeated, biases and norms of q and k included) and starts new parameters neutral;
        "random" takes only the teacher's sizes. `seed` as in __init__. Raises UserError."""
        if init not in ("inherit", "random"):
            raise UserError(f"init must be 'inherit' or 'random', not {init!r}.")
        config, like = config.get_text_config(decoder=True), next(attn.parameters())
        heads, dim, biases = config.num_attention_heads, head_dim_of(attn, config), [False] * 4
        if init == "inherit":
            teacher = teacher_projections(attn, config)
            heads = len(teacher[0]["weight"]) // dim
            biases = ["bias" in projection for projection in teacher]
        with torch.device(like.device):
            mixer = cls(config.hidden_size, heads, dim, biases, layer_idx,
                        None if like.is_meta else seed)
            mixer.config, mixer.init = config, init
            if init == "inherit":
                for name, projection in zip("qkvo", teacher):
                    getattr(mixer, f"{name}_proj").load_state_dict(projection)
                mixer.q_norm, mixer.k_norm = (_teacher_norm(attn, x, heads, dim) for x in "qk")
                mixer.clip_qkv = getattr(config, "clip_qkv", None)      # OLMo
                mixer.start_neutral()
        return mixer.to(like.dtype)

    def start_random(self, draw):
        """Every matrix from N(0, 1 / fan_in), drawn on the CPU by the torch.Generator `draw`."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                drawn = torch.randn(module.weight.shape, generator=draw, device="cpu")
                module.weight.copy_(drawn * module.in_features ** -0.5)
                if module.bias is not None:
                    module.bias.zero_()

    def start_neutral(self):
        """New parameters of an inherited mixer: the gate is constant, silu(bias) = 1."""
        self.g_proj.weight.zero_()
        self.g_proj.bias.fill_(1.2784645)

    def project(self, hidden_states):
        """q, k, v as the teacher makes them before RoPE, heads repeated: three [B, T, H * D]."""
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.clip_qkv is not None:
            q, k, v = (x.clamp(-self.clip_qkv, self.clip_qkv) for x in (q, k, v))
        return self._normed(q, self.q_norm), self._normed(k, self.k_norm), v

    def _normed(self, x, norm):
        if norm is not None and norm.weight.shape[-1] == self.head_dim:
            return norm(self.heads(x)).flatten(-2)
        return x if norm is None else norm(x)

    def heads(self, x):
        return x.unflatten(-1, (self.num_heads, self.head_dim))     # [B, T, H * D] -> [B, T, H, D]

    def head_outputs(self, hidden_states, rows=None, past=None):
        """The input of o_proj, [B, T, H * D]. `past`, if given, is an object whose `state` and
        `seen` (tokens so far) are read and renewed."""
        x = hidden_states
        if rows is not None:
            x = x.take_along_dim(rows.order, 1)                                     # [B, R, C]
        o, state = self.mix(x, rows, (None, None) if past is None else past.state)
        if past is not None:
            past.state, past.seen = state, past.seen + hidden_states.shape[1]
        o = o if rows is None else o.take_along_dim(rows.place, 1)                  # [B, T, H, D]
        return self.o_norm(o, self.heads(self.g_proj(hidden_states))).flatten(-2)

    def forward(self, hidden_states, *args, **kwargs):
        called = args or kwargs         # by transformers, with a mask or a cache to be read
        rows, past = read_call(self, hidden_states, *args, **kwargs) if called else (None, None)
        return self.o_proj(self.head_outputs(hidden_states, rows, past)), None


class GatedLinearAttention(LinearAttention):
    """GLA (Yang et al. 2023): a decay per key channel, from a low-rank projection."""

    def add_parameters(self, hidden_size, width):
        self.decay_down = nn.Linear(hidden_size, LOW_RANK, bias=False)
        self.decay_up = nn.Linear(LOW_RANK, width)

    def start_neutral(self):
        """One decay per head, from long memory to short: logsigmoid(bias) / 16 is its logarithm.
        Only decay_up is zeroed, since neither factor would ever learn if both were zero."""
        super().start_neutral()
        self.decay_up.weight.zero_()
        bias = -inverse_softplus(GATE_NORMALIZER * start_decays(self.num_heads))
        self.decay_up.bias.copy_(bias.repeat_interleave(self.head_dim))

    def mix(self, hidden_states, rows=None, state=(None, None)):
        q, k, v = self.project(hidden_states)
        g = F.logsigmoid(self.decay_up(self.decay_down(hidden_states)).float()) / GATE_NORMALIZER
        g = g.clamp(min=MIN_LOG_DECAY)                                      # [B, T, H * D]
        if rows is not None:
            k, g = torch.where(rows.real, k, 0), torch.where(rows.real, g, rows.forget)
        o, recurrent = gated_linear_attention(*map(self.heads, (q, k, v, g)), state[0])
        return o, (recurrent, None)


class GatedDeltaNet(LinearAttention):
    """Gated DeltaNet (Yang et al. 2024): the delta rule with one decay per head; short causal
    convolutions and SiLU on q, k and v; q and k of unit length."""

    def add_parameters(self, hidden_size, width):
        self.b_proj = nn.Linear(hidden_size, self.num_heads, bias=False)    # beta
        self.a_proj = nn.Linear(hidden_size, self.num_heads, bias=False)    # decay
        self.A_log = nn.Parameter(torch.zeros(self.num_heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.num_heads))
        self.add_conv(hidden_size, width)

    def add_conv(self, hidden_size, width):
        self.conv_kernel = nn.Parameter(identity_kernel(3 * width))     # [W, q | k | v channels]

    def start_random(self, draw):
        """As the published layer: A from U(0, 16), time steps log-uniform in [0.001, 0.1]."""
        super().start_random(draw)
        uniform = torch.rand(2, self.num_heads, generator=draw, device="cpu")
        self.A_log.copy_((16 * uniform[0]).clamp(min=1e-4).log())
        low, high = math.log(1e-3), math.log(1e-1)
        self.dt_bias.copy_(inverse_softplus((low + (high - low) * uniform[1]).exp()))
        self.start_conv(draw)

    def start_neutral(self):
        super().start_neutral()
        self.b_proj.weight.zero_()                                      # beta = 1/2
        self.a_proj.weight.zero_()
        self.A_log.zero_()                                              # A = 1
        self.dt_bias.copy_(inverse_softplus(start_decays(self.num_heads)))
        self.start_conv()

    def start_conv(self, draw=None):
        """The convolution returns the current token, or is drawn from U(-1, 1) / sqrt(W)."""
        kernel = identity_kernel(self.conv_kernel.shape[1])
        if draw is not None:
            drawn = torch.rand(kernel.shape, generator=draw, device="cpu")
            kernel = (2 * drawn - 1) * CONV_SIZE ** -0.5
        self.conv_kernel.copy_(kernel)

    def convolve(self, hidden_states, conv, tail):
        """SiLU(conv) of q, k and v, each [B, T, H * D], and the new tail; `conv` as causal_conv."""
        qkv = torch.cat(self.project(hidden_states), dim=-1)            # [B, T, 3 * H * D]
        qkv, tail = conv(qkv, self.conv_kernel, tail, "silu")
        return *qkv.chunk(3, dim=-1), tail

    def mix(self, hidden_states, rows=None, state=(None, None)):
        conv = causal_conv if rows is None else rows.causal_conv
        q, k, v, tail = self.convolve(hidden_states, conv, state[1])
        q, k = (gated_rms_norm(self.heads(x), eps=1e-6 / self.head_dim, scale=self.head_dim ** -0.5)
                for x in (q, k))                                        # [B, T, H, D], |x| = 1
        beta = self.b_proj(hidden_states).float().sigmoid()             # [B, T, H]
        step = F.softplus(self.a_proj(hidden_states).float() + self.dt_bias.float())
        g = -self.A_log.float().exp() * step                            # [B, T, H]
        if rows is not None:
            beta, g = torch.where(rows.real, beta, 0), torch.where(rows.real, g, rows.forget)
        o, recurrent = gated_delta_rule(q, k, self.heads(v), g, beta, state[0])
        return o, (recurrent, tail)


class JetBlock(GatedDeltaNet):
    """JetBlock (Jet-Nemotron, Gu et al. 2025): Gated DeltaNet without convolutions on q and k. From
    the layer's input a small generator makes each token's kernel for the convolution on v."""

    def add_conv(self, hidden_size, width):
        self.kernel_down = nn.Linear(hidden_size, max(width // 8, 1), bias=False)
        self.kernel_up = nn.Linear(max(width // 8, 1), CONV_SIZE * width)   # [tap, channel]

    def start_conv(self, draw=None):
        # kernel_down keeps its random start: were both zero, the generator would never learn.
        self.kernel_up.weight.zero_()
        self.kernel_up.bias.copy_(identity_kernel(self.num_heads * self.head_dim).flatten())

    def convolve(self, hidden_states, conv, tail):
        q, k, v = self.project(hidden_states)
        kernel = self.kernel_up(F.silu(self.kernel_down(hidden_states)))
        kernel = kernel.unflatten(-1, (CONV_SIZE, -1))                  # [B, T, W, H * D]
        v, tail = conv(v, kernel, tail, "silu")
        return F.silu(q), F.silu(k), v, tail


MIXERS = {"gla": GatedLinearAttention, "gdn": GatedDeltaNet, "jet": JetBlock}


# ------------------------------------------------------------------------------------------------
# The softmax attention of a transformers model: where it sits, and what a mixer inherits from it

ATTENTION_NAMES = ("self_attn", "attention", "self_attention", "attn")


class UserError(ValueError):
    """A mistake that the user can mend: the scripts print its one sentence and exit with code 2."""


def decoder_layers(model):
    """The decoder's list of layers (nn.ModuleList). Raises UserError if the model has not one."""
    name, decoder = type(model).__name__, model.get_decoder()
    n = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [m for path, m in decoder.named_modules() if isinstance(m, nn.ModuleList)
             and len(m) == n and not any(map(str.isdigit, path.split(".")))]    # not in a layer
    if len(lists) != 1:
        raise UserError(f"{name} cannot be converted: its decoder has {len(lists)} lists of {n} "
                        "layers, not one.")
    return lists[0]


def attention_slots(model):
    """Where each decoder layer's attention sits: [(layer, name of its child)]. Raises UserError."""
    name, slots = type(model).__name__, []
    if model.config.model_type in ("bloom", "mpt"):
        raise UserError(f"{name} cannot be converted: its attention adds the residual itself or "
                        "takes an inverted mask.")
    if any(isinstance(layer, LinearAttentionCacheLayerMixin)
           for layer in DynamicCache(config=model.config).layers):
        raise UserError(f"{name} cannot be converted: it already has linear layers, or states "
                        "beside its attention.")
    for i, layer in enumerate(decoder_layers(model)):
        found = [child for child, _ in layer.named_children() if child in ATTENTION_NAMES]
        if len(found) != 1:
            raise UserError(f"{name} cannot be converted: its layer {i} has {len(found)} children "
                            f"named {' or '.join(ATTENTION_NAMES)}, not one.")
        slots.append((layer, found[0]))
    return slots


def attention_modules(model):
    """The attention module of every decoder layer, softmax or linear, in order."""
    return [getattr(*slot) for slot in attention_slots(model)]


def swap(model, layer_idx, module):
    """Put `module` in the place of a layer's attention; returns the module that was there."""
    slot = attention_slots(model)[layer_idx]
    previous = getattr(*slot)
    setattr(*slot, module)
    return previous


@contextlib.contextmanager
def replaced(model, mixers, layers):
    """Within the block, the attention of each of `layers` is mixers[layer]."""
    slots = attention_slots(model)
    with contextlib.ExitStack() as undo:
        for layer in layers:
            undo.callback(setattr, *slots[layer], getattr(*slots[layer]))
            setattr(*slots[layer], mixers[layer])
        yield model


# Modules in which q, k and v share one projection, whose rows go [q ... q k v] for each key/value
# head in turn, or else all of q, all of k, all of v.
FUSED_BY_HEAD = ("GPTNeoXAttention", "FalconAttention", "PersimmonAttention", "GPTBigCodeAttention")
FUSED_IN_BLOCKS = ("GPT2Attention", "Phi3Attention")


def head_dim_of(attn, config):
    """The width of one head: the module's attribute if it has one, else hidden_size / heads."""
    return getattr(attn, "head_dim", None) or getattr(attn, "head_size", None) or (
        config.hidden_size // config.num_attention_heads)


def repeat_heads(rows, num_heads, head_dim):
    """[kv_heads * D, ...] -> [H * D, ...]: query head h reads key/value head h // (H / kv_heads),
    as in transformers' repeat_kv."""
    heads = rows.unflatten(0, (-1, head_dim))                               # [kv_heads, D, ...]
    return heads.repeat_interleave(num_heads // len(heads), dim=0).flatten(0, 1)


def teacher_projections(attn, config):
    """The q, k, v and o projections of a softmax-attention module, each {"weight": [out, in]} and,
    if it has one, {"bias": [out]}; k and v with repeated heads. Raises UserError."""
    attn = getattr(attn, "attention", attn)     # GPT-Neo wraps its attention once more
    linear = {name: {key: p.t() if isinstance(m, Conv1D) else p for key, p in m.named_parameters()}
              for name, m in attn.named_children() if isinstance(m, (nn.Linear, Conv1D))}
    first = lambda *names: next((linear[name] for name in names if name in linear), None)
    kind, dim = type(attn).__name__, head_dim_of(attn, config)
    out, qkv = first("o_proj", "out_proj", "dense", "c_proj"), [first(f"{x}_proj") for x in "qkv"]
    if kind in FUSED_BY_HEAD + FUSED_IN_BLOCKS:
        fused, heads = first("c_attn", "qkv_proj", "query_key_value"), config.num_attention_heads
        kv_heads = (len(fused["weight"]) // dim - heads) // 2
        groups = kv_heads if kind in FUSED_BY_HEAD else 1
        sizes = [heads // groups, kv_heads // groups, kv_heads // groups]
        parts = {key: rows.unflatten(0, (groups, -1, dim)).split(sizes, dim=1)
                 for key, rows in fused.items()}                    # [groups, size, D, ...] each
        qkv = [{key: parts[key][i].flatten(0, 2) for key in fused} for i in range(3)]
    if out and all(qkv):
        q, k, v = (len(projection["weight"]) for projection in qkv)
        if q == out["weight"].shape[1] and k == v and q % k == 0 == k % dim:
            return [{key: repeat_heads(rows, q // dim, dim) for key, rows in projection.items()}
                    for projection in qkv] + [out]
    raise UserError(f"{kind}: the layout of its q, k, v projections is not known here, so they "
                    "cannot be inherited; use --init random.")


def _teacher_norm(attn, name, num_heads, head_dim):
    """A copy of the teacher's norm of q or k, widened to all heads if it spans them; or None."""
    norm = getattr(attn, f"{name}_norm", None) or getattr(attn, f"{name}_layernorm", None)
    if norm is None:
        return None
    weight = getattr(norm, "weight", None)
    if weight is None or weight.dim() > 2:
        raise UserError(f"{type(norm).__name__}: this norm of q or k has a layout that is not "
                        "known here, so it cannot be inherited; use --init random.")
    norm = copy.deepcopy(norm)
    if weight.numel() != head_dim:  # over the whole projection (OLMo 2), or [heads, D] (Cohere)
        for key, parameter in norm.named_parameters():
            rows = repeat_heads(parameter.detach().flatten(), num_heads, head_dim)
            setattr(norm, key, nn.Parameter(rows.view(-1, *parameter.shape[1:])))
    return norm


# ------------------------------------------------------------------------------------------------
# Padding, packing and the cache

GAP = 21                # padded tokens between documents: exp(-5 * 21) is 0 in fp32


def read_mask(attention_mask, T, packs):
    """(real, first), bool [B, T] each: the tokens of a call that are not padding, and the real ones
    that begin another document of their row; `first` is None where the mask cannot show it.

    attention_mask is [B, K], or [B, 1, T, K] (bool, or float with the lowest number where masked);
    its last T keys are the tokens of the call. In the second form a real token may attend to
    itself, and to the real token before it unless it begins a document."""
    if attention_mask.dim() == 2:
        return attention_mask[:, -T:].bool(), None
    mask = attention_mask[:, 0, :, -T:]                                             # [B, T, T]
    visible = lambda x: x if x.dtype == torch.bool else x > torch.finfo(x.dtype).min / 2
    real = visible(mask.diagonal(dim1=1, dim2=2))
    if not packs:
        return real, None
    token = torch.where(real, torch.arange(T, device=mask.device), -1)
    before = F.pad(token.cummax(1).values[:, :-1], (1, 0), value=-1)    # the last real one, or -1
    seen = visible(mask.take_along_dim(before.clamp(min=0).unsqueeze(-1), 2)).squeeze(-1)
    return real, real & (before >= 0) & ~seen


class Rows:
    """The tokens [B, T] of a call laid out for a mixer, where some are padding or a row holds
    several documents: each row gets R >= T places, first its real tokens in order, then its
    padding. Between two documents lie GAP empty places, whose strong decay erases the state.

        place   [B, T, 1, 1]    the place of each token
        order   [B, R, 1]       its inverse: the token at each place
        real    [B, R, 1] bool  the places of real tokens; k, beta, conv inputs are 0 elsewhere
        forget  [B, R, 1]       the log decay at the other places: 0, in gaps MIN_LOG_DECAY"""

    def __init__(self, real, first):
        B, T = real.shape
        place = torch.where(real, real.cumsum(1), real.sum(1, keepdim=True) + (~real).cumsum(1)) - 1
        shift = GAP * (torch.zeros_like(place) if first is None else first.cumsum(1))
        place = place + torch.where(real, shift, shift[:, -1:])                     # [B, T]
        R = T if first is None else T + int(shift.max())            # int() waits for the GPU
        blank, number = place.new_zeros(B, R), torch.arange(R, device=place.device)
        beyond = number > place.amax(1, keepdim=True)
        kept = beyond.scatter(1, place, True)                       # [B, R], the rest are gaps
        self.place = place[:, :, None, None]
        self.order = blank.scatter(1, place, number[:T].expand(B, T)).unsqueeze(-1)
        self.real = blank.bool().scatter(1, place, real).unsqueeze(-1)
        self.forget = torch.where(kept, 0.0, MIN_LOG_DECAY).unsqueeze(-1)

    def causal_conv(self, x, kernel, cache, activation):
        """kernels.causal_conv of x [B, R, D]; the new cache ends with the last real token."""
        (B, R, D), W = x.shape, kernel.shape[-2]
        x = torch.where(self.real, x, 0)
        before = x.new_zeros(B, W - 1, D) if cache is None else cache.to(x.dtype)
        number = torch.arange(R + W, device=x.device).unsqueeze(-1)
        end = (self.real * number[1:R + 1]).amax(1, keepdim=True)       # [B, 1, 1], real tokens
        tail = torch.cat([before, x], 1).take_along_dim(end + number[:W - 1], 1)    # [B, W-1, D]
        return causal_conv(x, kernel, cache, activation)[0], tail


# The names under which attention modules get the cache: 5.24's, the one before, some families'
CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
NO_CONTINUOUS_BATCHING = ("a hybrid's states do not fit into the pages of continuous batching "
                          "(generate_batch): use generate() on a padded batch.")


class LinearCacheLayer(DynamicLayer):
    """One linear layer's memory inside a transformers Cache: `state`, as in LinearAttention, and
    the number of tokens `seen`. Tensors are replaced, never written in place."""

    is_croppable = supports_early_init = False
    state, seen = (None, None), 0

    def reset(self):
        self.state, self.seen = (None, None), 0

    def get_seq_length(self):
        return self.seen

    def reorder_cache(self, beam_idx):
        self.state = tuple(None if t is None else t[beam_idx.to(t.device)] for t in self.state)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats):
        self.state = tuple(None if t is None else t.repeat_interleave(repeats, dim=0)
                           for t in self.state)

    def crop(self, *args):
        raise RuntimeError("a linear layer's state cannot be rolled back: decoding that crops the "
                           "cache (assisted, prompt lookup) does not work with a hybrid.")

    activate_past_recording = crop

    def update(self, *args, **kwargs):
        raise RuntimeError("a softmax layer got a cache that already holds a linear layer's state: "
                           "make a new cache after swapping layers.")


def cache_layer(cache, layer_idx):
    """The LinearCacheLayer at `layer_idx` of a transformers Cache, put there at first use."""
    if not isinstance(cache, Cache):
        raise UserError(NO_CONTINUOUS_BATCHING)
    while len(cache.layers) <= layer_idx:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[layer_idx]
    if isinstance(layer, StaticLayer):
        raise ValueError("a hybrid cannot use a static cache; leave cache_implementation unset.")
    if not isinstance(layer, LinearCacheLayer):
        if layer.get_seq_length() > 0:
            raise ValueError(f"layer {layer_idx} of this cache already holds keys and values of a "
                             "softmax layer: make a new cache after swapping layers.")
        layer = cache.layers[layer_idx] = LinearCacheLayer()
    return layer


def read_call(mixer, hidden_states, attention_mask=None, position_ids=None, **kwargs):
    """The arguments of an attention module as a mixer needs them: (Rows or None, LinearCacheLayer
    or None). Packed documents are found in the mask. Flash attention gets none, so there they are
    found in position_ids, for a batch of one. ValueError for a mask or cache that cannot be used.
    """
    caches = [kwargs.pop(name) for name in CACHE_NAMES if kwargs.get(name) is not None]
    unknown = [name for name, value in kwargs.items() if isinstance(value, Cache)]
    if unknown:
        raise ValueError(f"a linear layer got a cache under the unknown name {unknown[0]!r}: "
                         f"{VERSIONS}.")
    past = cache_layer(caches[0], mixer.layer_idx) if caches else None
    (B, T, _), begins = hidden_states.shape, past is None or past.seen == 0
    real, flash = None, "flash" in str(getattr(mixer.config, "_attn_implementation", None))
    if isinstance(attention_mask, torch.Tensor):
        mask = attention_mask.expand(B, *attention_mask.shape[1:])
        real, first = read_mask(mask, T, packs=begins)
    elif attention_mask is not None:
        raise ValueError(f"a linear layer cannot read a mask of type "
                         f"{type(attention_mask).__name__}; use attn_implementation='sdpa'.")
    elif flash and begins and B == 1 and position_ids is not None and position_ids.dim() == 2:
        first = F.pad(position_ids.diff(dim=1) <= 0, (1, 0))
        real = torch.ones_like(first)
    return None if real is None else Rows(real, first), past


# ------------------------------------------------------------------------------------------------
# A hybrid as an ordinary checkpoint
#
# Subclasses are made on demand, HybridLlamaForCausalLM and HybridLlamaConfig for Llama. Their new
# model_type makes loading without trust_remote_code an error, not a Llama with random attention.

MODEL_TYPE_PREFIX = "dtr_"


class HybridMixin:
    """Builds the base model, then swaps in the mixers that the config lists."""

    _is_stateful = True         # generate() then refuses the modes that would roll the cache back

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        n, attention = len(config.linear_layers), attention_modules(self)
        kinds, inits = ([value] * n if isinstance(value, str) else value    # one for all, or a list
                        for value in (config.linear_attn, config.linear_init))
        config.linear_attn, config.linear_init = kinds, inits
        for i, kind, init in zip(config.linear_layers, kinds, inits, strict=True):
            swap(self, i, MIXERS[kind].from_attention(attention[i], config, i, init, seed=None))
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """As in transformers, which would draw missing tensors at random: here that is an error."""
        shards = kwargs.get("distributed_config")
        if any(kwargs.get(name) or getattr(shards, name, None) for name in ("tp_plan", "tp_size")):
            raise UserError("a hybrid does not run tensor-parallel: load it on one device, or with "
                            "device_map='auto'.")
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = [f"{kind} {min(keys)}, {len(keys)} in all" for kind in ("missing", "unexpected")
                 if (keys := info[f"{kind}_keys"])]
        if wrong:
            raise UserError(f"this checkpoint is damaged or not of this model ({'; '.join(wrong)})"
                            ": save the hybrid again, or download it again.")
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save under the names that the parameters have in the model. transformers would rename
        them by model type, but it does not know a hybrid's type."""
        super().save_pretrained(save_directory, *args, **{**kwargs, "save_original_format": False})

    def init_continuous_batching(self, *args, **kwargs):    # else generate_batch only logs an error
        raise UserError(NO_CONTINUOUS_BATCHING)


@functools.cache
def hybrid_class(base):
    """HybridXxx for a class Xxx of transformers, a config or a model."""
    name, members = f"Hybrid{base.__name__}", {"__module__": __name__}
    if name.endswith("Config"):
        types = {"linear_attn": str | list, "linear_layers": list, "linear_init": str | list,
                 "base_model": str | None}
        return type(name, (base,), members | {
            "model_type": MODEL_TYPE_PREFIX + base.model_type, "_auto_class": "AutoConfig",
            "linear_attn": "gdn", "linear_layers": (), "linear_init": "inherit", "base_model": None,
            "__annotations__": types})
    return type(name, (HybridMixin, base, GenerationMixin), members | {
        "config_class": hybrid_class(base.config_class), "_auto_class": "AutoModelForCausalLM"})


def __getattr__(name):
    """The hybrid classes, under the names that checkpoints give them."""
    base = getattr(transformers, name.removeprefix("Hybrid"), None)
    if base is None or not name.startswith("Hybrid"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return hybrid_class(base)


def linear_layers(model):
    """The numbers of the layers whose attention is a linear mixer."""
    return sorted(m.layer_idx for m in model.modules() if isinstance(m, LinearAttention))


def check_savable(model):
    """Raise UserError if `model`'s class is not one of transformers' own."""
    if getattr(transformers, type(model).__name__, None) is not type(model):
        raise UserError(f"{type(model).__name__} is not one of transformers' own classes, so a "
                        "hybrid of it cannot be saved as an ordinary checkpoint.")


def save_hybrid(model, directory, tokenizer=None):
    """Save `model`, with the mixers that are swapped in, as an ordinary checkpoint (safetensors,
    config, this file and kernels.py)."""
    layers, fields, classes = linear_layers(model), {}, (type(model), type(model.config))
    if layers:
        check_savable(model)
        mixers = [attention_modules(model)[i] for i in layers]
        names = {mixer: name for name, mixer in MIXERS.items()}
        fields = {"base_model": model.config._name_or_path, "linear_layers": layers,
                  "linear_init": [mixer.init for mixer in mixers],
                  "linear_attn": [names[type(mixer)] for mixer in mixers]}
        model.__class__ = hybrid_class(classes[0])      # the weights are not copied
        model.config.__class__ = model.config_class
    try:
        vars(model.config).update(fields)
        model.save_pretrained(directory)
    finally:
        model.__class__, model.config.__class__ = classes
        for name in [*fields, "auto_map"] if layers else ():
            vars(model.config).pop(name, None)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def load_hybrid(directory, **kwargs):
    """A saved hybrid, loaded as from_pretrained does but without running its remote code."""
    config, _ = transformers.PreTrainedConfig.get_config_dict(directory)
    return __getattr__(config["architectures"][0]).from_pretrained(directory, **kwargs)
