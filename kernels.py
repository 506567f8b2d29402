"""Linear attention with a gated state: the recurrences of three mixers, defined and then made fast.

For every op the definition stands first, a loop over time (`*_recurrent`, also used for decoding);
below it the chunkwise form, which gives the same numbers with matrix products. The math of gated
linear attention is arXiv:2312.06635, of the gated delta rule arXiv:2412.06464, of JetBlock's
per-token convolution arXiv:2508.15884.

Glossary, the same letters everywhere:
    B batch, T time, H heads, K key dim, V value dim, C chunk length, N number of chunks, W taps
    q, k [B,T,H,K], v and o [B,T,H,V]   as in attention; neither q nor k is normalised here
    g       log decay <= 0, applied before the update: [B,T,H] delta rule, [B,T,H,K] GLA, >= -5
    beta    [B,T,H] delta rule: how much of the old value under k_t is replaced by v_t
    S       the state, [B,H,K,V], fp32 (fp64 for fp64 inputs): all that is remembered of the past
    G       cumulative log decay inside a chunk, inclusive: G_t = g_first + ... + g_t

Arithmetic is fp32 for fp32, fp16 and bf16 inputs and fp64 for fp64 inputs. The delta rule
exponentiates only differences of G that decay (row t >= row s), so that nothing overflows however
strong the decay; -inf, which forgets everything, is allowed. GLA has to split its differences into
two factors. With g >= -5 no factor exceeds exp(40), which fp32 holds.

On an NVIDIA GPU all of this runs as Triton kernels, below the torch forms (backend="auto"):

    python kernels.py    check the kernels, then, on a GPU, time them

To copy: this file alone; it needs torch and, for the kernels, triton.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys

import torch
import torch.nn.functional as F

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"        # read when the kernels are decorated, below
try:
    import triton
    import triton.language as tl
except ImportError:                             # no kernels then; all else works
    triton = None
_INTERPRETED = triton is not None and triton.knobs.runtime.interpret        # TRITON_INTERPRET=1


# -----------------------------------------------------------------------------
# What the ops share

def _check(q, k, v, g, beta, state, gate_shape):
    """Refuse shapes that broadcasting would accept and silently get wrong."""
    B, T, H, K = q.shape
    V = v.shape[-1]
    expected = {"k": (k, (B, T, H, K)), "v": (v, (B, T, H, V)), "g": (g, gate_shape),
                "beta": (beta, (B, T, H)), "initial_state": (state, (B, H, K, V))}
    for name, (x, shape) in expected.items():
        if x is not None and tuple(x.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(shape)} "
                             f"for q of shape {tuple(q.shape)}")
    if T == 0:
        raise ValueError("the sequence has no tokens")


def _compute_dtype(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _floor(dtype):
    """A log decay below which exp is exactly 0: clamping there changes no result, and unlike -inf
    the floor can be subtracted from itself."""
    return -800.0 if dtype == torch.float64 else -128.0


def _start_state(q, v, state):
    """The state before the first token, [B,H,K,V], in the arithmetic's dtype."""
    dtype = _compute_dtype(q)
    if state is None:
        return torch.zeros(q.shape[0], *q.shape[2:], v.shape[-1], dtype=dtype, device=q.device)
    return state.to(dtype)


def _to_chunks(x, tokens, C, dtype):
    """The given tokens of x [B,T,H,D] -> [n,B*H,C,D] contiguous. Zeros fill the last chunk: a token
    with k, beta and g of 0 leaves the state as it is."""
    x = x[:, tokens]
    B, T, H, D = x.shape
    n = -(-T // C)
    if n * C != T:
        x = F.pad(x, (0, 0, 0, 0, 0, n * C - T))
    x = x.reshape(B, n, C, H, D).permute(1, 0, 3, 2, 4)                     # [n,B,H,C,D]
    return x.to(dtype).contiguous().view(n, B * H, C, D)


def _from_chunks(x, out, tokens):
    """The inverse of _to_chunks: writes x [n,B*H,C,D] to the given tokens of out [B,T,H,D]."""
    out = out[:, tokens]
    B, T, H, D = out.shape
    n, _, C, _ = x.shape
    x = x.view(n, B, H, C, D).permute(1, 0, 3, 2, 4)                        # [B,n,C,H,D]
    if n * C == T:
        out.unflatten(1, (n, C)).copy_(x)
    else:
        out.copy_(x.reshape(B, n * C, H, D)[:, :T])


def _groups(T, C, size):
    """Slices of the tokens, a few chunks each: as many as keep a tensor of `size` numbers per token
    in a CPU's cache. Larger temporaries would cost more in memory traffic than in arithmetic."""
    step = C * max(1, 2 ** 18 // (size * C))
    return [slice(t, min(t + step, T)) for t in range(0, T, step)]


def _full_precision(function):
    """Mixed precision (torch.autocast) must not reach inside: it would round every product."""
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        device = next(x.device.type for x in (*args, *kwargs.values()) if torch.is_tensor(x))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)
    return wrapped


def _add_product(out, a, b):
    """out += a @ b, all [N,B*H,...], in place."""
    out.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
    return out


# -----------------------------------------------------------------------------
# The gated delta rule: forget, then correct what the state holds under the key

@_full_precision
def gated_delta_rule_recurrent(q, k, v, g, beta, initial_state=None):
    """The definition, token by token. Shapes and results as `gated_delta_rule`."""
    _check(q, k, v, g, beta, initial_state, q.shape[:3])
    dtype, out_dtype, scale = _compute_dtype(q), v.dtype, q.shape[-1] ** -0.5
    S = _start_state(q, v, initial_state)
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    decay, outputs = g.exp()[..., None, None], []                           # [B,T,H,1,1]
    for t in range(q.shape[1]):
        S = decay[:, t] * S
        error = v[:, t, :, None] - k[:, t, :, None] @ S                     # [B,H,1,V]
        S = S + k[:, t, :, :, None] * (beta[:, t, :, None, None] * error)   # [B,H,K,V]
        outputs.append(scale * (q[:, t, :, None] @ S))                      # [B,H,1,V]
    return torch.cat(outputs, 2).transpose(1, 2).to(out_dtype), S           # [B,T,H,V]


class _DeltaRule(torch.autograd.Function):
    """Chunkwise form. Inside a chunk, with D_ts = exp(G_t - G_s) for s <= t, else 0:
        A = strictly lower (beta K K^T . D),  R = beta V - beta exp(G) K S0,  U = (1 + A)^-1 R
        O = exp(G) Q S0 + (Q K^T . D) U,      S1 = exp(G_C) S0 + (exp(G_C - G) K)^T U
    Row t of U is the correction that the loop would write at step t; the triangular system solves
    for all C of them at once. Backwards, (1 + A)^-T takes the gradient of U to that of R."""

    @staticmethod
    def chunks(tokens, C, dtype, q, k, v, g, beta):
        """Lays out a few chunks, and computes their decays and what does not need the state."""
        scale = q.shape[-1] ** -0.5
        q, k, v = (_to_chunks(x, tokens, C, dtype) for x in (q, k, v))      # [n,B*H,C,K or V]
        beta = _to_chunks(beta.unsqueeze(-1), tokens, C, dtype)             # [n,B*H,C,1]
        # G in fp64: its differences stay exact to fp32 even behind a long stretch of strong decay
        G = _to_chunks(g.unsqueeze(-1), tokens, C, torch.float64)
        G = G.clamp(min=_floor(dtype)).cumsum(-2)                       # [n,B*H,C,1]
        future = torch.full((C, C), -torch.inf, dtype=dtype, device=q.device).triu_(1)
        D = (G - G.mT).to(dtype).add_(future).exp_()                        # [n,B*H,C,C]
        from_start = G.to(dtype).exp()                                      # [n,B*H,C,1]
        to_end = (G[..., -1:, :] - G).to(dtype).exp_()                      # [n,B*H,C,1]
        q = q * scale
        P = (q @ k.mT).mul_(D)                                              # [n,B*H,C,C]
        kk = (k @ k.mT).mul_(D).tril_(-1)                                   # [n,B*H,C,C]
        q_in, k_in, k_out = q * from_start, k * (beta * from_start), k * to_end
        return q, k, v, beta, from_start, to_end, D, P, kk, q_in, k_in, k_out

    @staticmethod
    def forward(ctx, q, k, v, g, beta, state):
        (B, T, H, K), V = q.shape, v.shape[-1]
        longest = 16 if max(K, V) < 32 else 32 if max(K, V) < 128 else 64
        C = ctx.C = min(longest, 1 << (T - 1).bit_length())                 # less if T is short
        S = state.new_empty(-(-T // C) + 1, B * H, K, V)                    # at the chunks' borders
        S[0] = state.flatten(0, 1)
        o, saved, N = torch.empty_like(v), [], 0
        for tokens in _groups(T, C, B * H * max(K, V)):
            (_, _, vc, b, from_start, _, _, P, kk, q_in, k_in, k_out) = _DeltaRule.chunks(
                tokens, C, S.dtype, q, k, v, g, beta)
            eye = torch.eye(C, dtype=S.dtype, device=S.device).expand_as(kk)
            inverse = torch.linalg.solve_triangular(b * kk, eye, upper=False, unitriangular=True)
            R, U, n = vc * b, torch.empty_like(vc), len(vc)                 # [n,B*H,C,V]
            for i in range(n):
                torch.bmm(inverse[i], R[i].baddbmm_(k_in[i], S[N + i], alpha=-1), out=U[i])
                torch.mul(S[N + i], from_start[i, :, -1:], out=S[N + i + 1])
                S[N + i + 1].baddbmm_(k_out[i].mT, U[i])
            _from_chunks(_add_product(q_in @ S[N:N + n], P, U), o, tokens)
            N += n
            saved += [inverse, U]
        ctx.save_for_backward(q, k, v, g, beta, S, *saved)
        return o, S[-1].view(state.shape).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    @_full_precision
    def backward(ctx, do, dstate):
        q, k, v, g, beta, S, *saved = ctx.saved_tensors
        (B, T, H, K), V, C = q.shape, v.shape[-1], ctx.C
        N, dS1 = len(S) - 1, dstate.flatten(0, 1)
        grads = tuple(torch.empty_like(x) for x in (q, k, v, g, beta))
        later = torch.ones(C, C, dtype=S.dtype, device=S.device).tril_()    # [r,t] = 1 for r >= t
        for tokens in reversed(_groups(T, C, B * H * max(K, V))):
            U, inverse = saved.pop(), saved.pop()
            qc, kc, vc, b, from_start, to_end, D, P, kk, q_in, k_in, k_out = _DeltaRule.chunks(
                tokens, C, S.dtype, q, k, v, g, beta)
            n, decay, doc = len(U), from_start[..., -1:, :], _to_chunks(do, tokens, C, S.dtype)
            N -= n
            # the state, backwards; dS of a chunk is the gradient of the state behind it
            dU, dR, dS = P.mT @ doc, torch.empty_like(U), torch.empty_like(S[:n + 1])
            dS[n] = dS1
            torch.matmul(q_in.mT, doc, out=dS[:n])
            for i in reversed(range(n)):
                torch.bmm(inverse[i].mT, dU[i].baddbmm_(k_out[i], dS[i + 1]), out=dR[i])
                dS[i].addcmul_(decay[i], dS[i + 1]).baddbmm_(k_in[i].mT, dR[i], alpha=-1)
            dS1, S0 = dS[0], S[N:N + n]
            dq_in, dk_in, dk_out = doc @ S0.mT, (dR @ S0.mT).neg_(), U @ dS[1:].mT
            dP, dA = doc @ U.mT, (dR @ U.mT).neg_()                         # [n,B*H,C,C]
            # Pair (t, s) adds x to dG_t and -x to dG_s. The diagonal is skipped: its two terms
            # cancel, but in fp32 they leave noise larger than the gradient under strong decay. For
            # the same reason the decay from row s to the chunk's end adds to the g after s, not to
            # dG of the last row and of s.
            dkk = dA * kk
            pairs = (dP * P).tril_(-1).addcmul_(b, dkk)
            in_sum = from_start * (dk_in * kc).sum(-1, keepdim=True)        # [n,B*H,C,1]
            dG = (dq_in * q_in).sum(-1) + (b * in_sum).squeeze(-1) + pairs.sum(-1) - pairs.sum(-2)
            kept = dS[1:].flatten(2).unsqueeze(-2) @ S0.flatten(2).unsqueeze(-1)    # <dS, S0>
            dG[..., -1:].addcmul_(decay.squeeze(-1), kept.squeeze(-1))      # [n,B*H,C]
            dg = dG @ later + (dk_out * k_out).sum(-1) @ (1 - later)
            dbeta = (dR * vc).sum(-1) + dkk.sum(-1) + in_sum.squeeze(-1)
            dP.mul_(D)
            dA.mul_(D).tril_(-1).mul_(b)
            dq = (dP @ kc).addcmul_(dq_in, from_start).mul_(K ** -0.5)
            dk = _add_product(dP.mT @ qc, dA + dA.mT, kc).addcmul_(dk_out, to_end)
            dk.addcmul_(dk_in, b * from_start)
            for x, out in zip((dq, dk, dR.mul_(b)), grads):
                _from_chunks(x, out, tokens)
            for x, out in zip((dg, dbeta), grads[3:]):
                _from_chunks(x.unsqueeze(-1), out.unsqueeze(-1), tokens)
        return *grads, dS1.view(dstate.shape)

@torch.compiler.disable       # torch.compile would break it into many small graphs
@_full_precision
def gated_delta_rule(q, k, v, g, beta, initial_state=None, backend="auto"):
    """Gated delta rule, chunkwise: matrix products inside chunks, a short scan between them.

        S <- exp(g_t) S;  S <- S + k_t beta_t (v_t - S^T k_t)^T;  o_t = K^-0.5 S^T q_t

    q, k [B,T,H,K], v [B,T,H,V], g and beta [B,T,H], initial_state [B,H,K,V] or None for zeros.
    Returns o [B,T,H,V] in v's dtype and the final state [B,H,K,V]; gradients flow through both and
    to every input. ValueError if a shape does not fit.
    Equivalent to: gated_delta_rule_recurrent(q, k, v, g, beta, initial_state)
    """
    _check(q, k, v, g, beta, initial_state, q.shape[:3])
    if q.shape[1] <= 4 and not torch.is_grad_enabled():                     # decoding
        return recurrent_step(q, k, v, g, beta, initial_state, backend=backend)
    if _use_triton(backend, q, q.shape[-1], v.shape[-1]):
        return _run_kernels(q, k, v, g, beta, initial_state)
    return _DeltaRule.apply(q, k, v, g, beta, _start_state(q, v, initial_state))


# -----------------------------------------------------------------------------
# Gated linear attention: forget per key channel, then add

@_full_precision
def gated_linear_attention_recurrent(q, k, v, g, initial_state=None):
    """The definition, token by token. Shapes and results as `gated_linear_attention`."""
    _check(q, k, v, g, None, initial_state, q.shape)
    dtype, out_dtype, scale = _compute_dtype(q), v.dtype, q.shape[-1] ** -0.5
    S = _start_state(q, v, initial_state)
    q, k, v, g = (x.to(dtype) for x in (q, k, v, g))
    decay, outputs = g.exp().unsqueeze(-1), []                              # [B,T,H,K,1]
    for t in range(q.shape[1]):
        S = decay[:, t] * S + k[:, t, :, :, None] * v[:, t, :, None]        # [B,H,K,V]
        outputs.append(scale * (q[:, t, :, None] @ S))                      # [B,H,1,V]
    return torch.cat(outputs, 2).transpose(1, 2).to(out_dtype), S           # [B,T,H,V]


def _gla_chunks(q, k, v, g, state):
    """The chunkwise form, for automatic differentiation. In a chunk of C = 16 rows, with M the G of
    its middle row:
        P_ts = sum_d q_td exp(G_td - M_d) . k_sd exp(M_d - G_sd) for s <= t, else 0
        O = (exp(G) . Q) S0 + P V,    S1 = exp(G_C) . S0 + (exp(G_C - G) . K)^T V
    The decay in P differs by channel, so it has to be split into a factor for q and one for k. At
    most 8 rows of -5 lie between the middle and any row: no factor exceeds exp(40)."""
    (B, T, H, K), V, scale, C = q.shape, v.shape[-1], q.shape[-1] ** -0.5, 16
    q, k, v, g = (_to_chunks(x, slice(None), C, state.dtype) for x in (q, k, v, g))
    q, G = q * scale, g.clamp(min=-5).cumsum(-2)                            # [N,B*H,C,K]
    middle, end = G[..., 7:8, :], G[..., -1:, :]                            # [N,B*H,1,K]
    pairs = (q * (G - middle).exp()) @ (k * (middle - G).exp()).mT          # [N,B*H,C,C]
    update = (k * (end - G).exp()).mT @ v                                   # [N,B*H,K,V]
    decay, S = end.exp().mT, [state.flatten(0, 1)]                          # [N,B*H,K,1]
    for decay_n, update_n in zip(decay.unbind(), update.unbind()):
        S.append(torch.addcmul(update_n, decay_n, S[-1]))                   # [B*H,K,V]
    o = pairs.tril() @ v + (q * G.exp()) @ torch.stack(S[:-1])              # [N,B*H,C,V]
    o = o.unflatten(1, (B, H)).permute(1, 0, 3, 2, 4).reshape(B, -1, H, V)  # [B,N*C,H,V]
    return o[:, :T], S[-1].view(B, H, K, V)


@torch.compiler.disable
@_full_precision
def gated_linear_attention(q, k, v, g, initial_state=None, backend="auto"):
    """Gated linear attention, chunkwise: matrix products inside chunks, a short scan between them.

        S <- exp(g_t) . S + k_t v_t^T  (row by row);    o_t = K^-0.5 S^T q_t

    q, k, g [B,T,H,K], v [B,T,H,V], initial_state [B,H,K,V] or None for zeros. g >= -5 per token,
    as the kernels need: below it they clamp, because looking would make the host wait for the GPU;
    on a CPU a smaller g is a ValueError.
    Returns o [B,T,H,V] in v's dtype and the final state [B,H,K,V]; gradients flow through both and
    to every input. ValueError if a shape does not fit.
    Equivalent to: gated_linear_attention_recurrent(q, k, v, g, initial_state)
    """
    _check(q, k, v, g, None, initial_state, q.shape)
    use_triton = _use_triton(backend, q, q.shape[-1], v.shape[-1])
    if not use_triton and g.device.type == "cpu" and (g < -5).any():
        raise ValueError(f"g is {g.min().item():.3g} somewhere, below gated linear attention's "
                         "least log decay per token, -5: use g.clamp(min=-5)")
    if q.shape[1] <= 4 and not torch.is_grad_enabled():                     # decoding
        return recurrent_step(q, k, v, g, None, initial_state, backend=backend)
    if use_triton:
        return _run_kernels(q, k, v, g, None, initial_state)
    o, state = _gla_chunks(q, k, v, g, _start_state(q, v, initial_state))
    return o.to(v.dtype), state


# -----------------------------------------------------------------------------
# Causal convolution over time, with one kernel for all tokens or one per token (JetBlock)

@torch.compiler.disable
def causal_conv(x, kernel, cache=None, activation=None, backend="auto"):
    """Depthwise convolution over time that sees the present and the W-1 tokens before it.

        y_t = act(sum_w kernel_w . x_{t-W+1+w}), the last tap on the current token

    x [B,T,D]; kernel [W,D], or [B,T,W,D] for one kernel per token; cache [B,W-1,D] holds the
    inputs before x, None for zeros; activation None or "silu", applied in fp32.
    Returns y [B,T,D] and the new cache [B,W-1,D], both in x's dtype, both with gradients.
    ValueError if a shape or the activation does not fit.
    Equivalent to: F.silu(F.conv1d(torch.cat([cache, x], 1).mT, kernel.T[:, None], groups=D)).mT
    """
    (B, T, D), W = x.shape, kernel.shape[-2]
    if tuple(kernel.shape) not in ((W, D), (B, T, W, D)):
        raise ValueError(f"kernel has shape {tuple(kernel.shape)}, expected [W, {D}] or "
                         f"[{B}, {T}, W, {D}]")
    if cache is not None and tuple(cache.shape) != (B, W - 1, D):
        raise ValueError(f"cache has shape {tuple(cache.shape)}, expected {(B, W - 1, D)}")
    if activation not in (None, "silu"):
        raise ValueError(f"activation is {activation!r}, expected None or 'silu'")
    if _use_triton(backend, x):
        cache = None if cache is None else cache.to(x.dtype).contiguous()
        y = _ConvKernels.apply(x.contiguous(), kernel.contiguous(), cache, activation)
        if T < W - 1:                                                       # some of the old tail
            before = x.new_zeros(B, W - 1, D) if cache is None else cache
            x = torch.cat([before, x], 1)
        return y, x[:, x.shape[1] - (W - 1):]
    if cache is None:
        cache = x.new_zeros(B, W - 1, D)
    x = torch.cat([cache.to(x.dtype), x], 1)                                # [B,W-1+T,D]
    taps = kernel.to(_compute_dtype(x)).unbind(-2)                          # W times [D] or [B,T,D]
    wide = x.to(taps[0].dtype)
    z = sum(tap * wide[:, w:w + T] for w, tap in enumerate(taps))           # [B,T,D]
    return (F.silu(z) if activation else z).to(x.dtype), x[:, T:]


# -----------------------------------------------------------------------------
# RMS norm of every head, with an output gate; with a scale it is the L2 norm of q and k

@torch.compiler.disable
def gated_rms_norm(x, weight=None, gate=None, eps=1e-5, scale=1.0, backend="auto"):
    """y = scale . x / sqrt(mean(x^2) + eps) . weight . silu(gate), over the last dimension.

    x and gate [B,T,H,D], weight [D]; a factor that is None is left out. All of it in fp32, rounded
    once to x's dtype, with gradients to x, weight and gate. |y| = 1 for scale D^-0.5.
    """
    D = x.shape[-1]
    if weight is not None and tuple(weight.shape) != (D,) or gate is not None and (
            gate.shape != x.shape):
        raise ValueError(f"x has shape {tuple(x.shape)}: weight takes [{D}], gate the same as x")
    if _use_triton(backend, x):
        return _NormKernels.apply(x, weight, gate, eps, scale)
    dtype = _compute_dtype(x)
    wide = x.to(dtype)
    y = wide * (scale * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps))
    y = y if weight is None else y * weight.to(dtype)
    return (y if gate is None else y * F.silu(gate.to(dtype))).to(x.dtype)


# -----------------------------------------------------------------------------
# Triton: the same chunkwise forms on a GPU, two launches forwards and two backwards
#
#   chunk   one program per chunk and head: what needs no state (P, the decays, and (1 + A)^-1
#           for the delta rule, decayed q and k for GLA)
#   scan    one program per head and BV value columns, chunk after chunk: the state stays in
#           registers from the first token to the last, and the scan also writes o
#   scan, backwards            the same for dS, from the last chunk to the first
#   gradients                  one program per chunk (and BK key channels for GLA): the other sums
#
# Letters besides the glossary: t, s row and column of a C x C matrix; bh = b * H + h; KP is K
# padded to a power of two, at least 16 (what tl.dot takes), BK and BV tiles of K and V. Padded
# rows and columns are loaded as zeros: a token with k, beta and g of 0 leaves the state as it is.
# Products take their operands in the inputs' dtype and add up in fp32 on tensor cores. The inverse
# and GLA's decayed q and k would lose too much in 16 bits: they stay fp32, and PREC says how they
# are multiplied: as tf32 for 16-bit inputs, in full for fp32 inputs. GLA's gradients of bf16 inputs
# have bf16 operands; fp16 would not hold their decays, up to exp(40). int64 where b and T meet:
# long inputs have more than 2^31 elements.

_jit = (lambda function: function) if triton is None else triton.jit


@_jit
def _load(x, rows, cols, stride, num_rows, num_cols):
    """A tile of the matrix at x whose rows lie `stride` apart, with zeros where it ends."""
    inside = (rows[:, None] < num_rows) & (cols[None, :] < num_cols)
    return tl.load(x + rows[:, None] * stride + cols[None, :], mask=inside, other=0)


@_jit
def _store(x, tile, rows, cols, stride, num_rows, num_cols):
    inside = (rows[:, None] < num_rows) & (cols[None, :] < num_cols)
    tl.store(x + rows[:, None] * stride + cols[None, :], tile.to(x.dtype.element_ty), mask=inside)


@_jit
def _per_token(x, rows, H, left):
    """One number per token from x [B,T,H]: those of a chunk's rows, zeros behind the last."""
    return tl.load(x + rows * H, mask=rows < left, other=0).to(tl.float32)


@_jit
def _chunk(index, T, H, C: tl.constexpr):
    """Of chunk `index` of the B * H * N, head by head: the index as int64, the rows from its first
    to the end of the sequence, and the first row's place among the B * T * H."""
    N = tl.cdiv(T, C)
    bh, n = (index // N).to(tl.int64), index % N
    return bh * N + n, T - n * C, (bh // H * T + n * C) * H + bh % H


@_jit
def _columns(V, BV: tl.constexpr):
    """The head bh and the BV columns of the state that a program owns."""
    blocks = tl.cdiv(V, BV)
    index = tl.program_id(0)
    return (index // blocks).to(tl.int64), index % blocks * BV + tl.arange(0, BV)


@_jit
def _load_state(x, bh, keys, cols, K: tl.constexpr, V: tl.constexpr):
    """Columns of a head's state, or of its gradient, [B,H,K,V]; zeros for None."""
    if x is None:
        return tl.zeros([keys.shape[0], cols.shape[0]], tl.float32)
    else:
        return _load(x + bh * K * V, keys, cols, V, K, V)


@_jit
def _cumulative_decay(x):
    """G = sum of the log decays up to a row, along axis 0, as (whole, part). Each is exact or
    small, so that a difference of two rows keeps the weak decays behind a strong one, which a
    single fp32 sum would round away. Below -120 exp is 0, and unlike -inf, -120 - -120 is 0. A NaN
    must stay one, and not become the strongest decay."""
    x = tl.maximum(x.to(tl.float32), -120.0, propagate_nan=tl.PropagateNan.ALL)
    whole = tl.floor(x + 0.5)
    return tl.cumsum(whole, 0), tl.cumsum(x - whole, 0)


@_jit
def _at(x, index, rows):
    """The entry of a vector at one row."""
    return tl.sum(tl.where(rows == index, x, 0.0), 0)


@_jit
def _pair_decay(whole, part, rows):
    """D_ts = exp(G_t - G_s) for s <= t, else 0. Masked before exp: above the diagonal it would
    overflow, and inf * 0 is NaN."""
    difference = whole[:, None] - whole[None, :] + (part[:, None] - part[None, :])
    return tl.exp(tl.where(rows[:, None] >= rows[None, :], difference, float("-inf")))


@_jit
def _joined(rows, level):
    """Where row t and column s, s < t, sit in neighbouring blocks of 2^level rows that the next
    level joins into one. Every pair s < t is joined at exactly one level."""
    block = rows >> level
    return block[:, None] == tl.where(block & 1 == 0, block + 1, -1)[None, :]


@_jit
def _unit_inverse(A, rows, LEVELS: tl.constexpr, PREC: tl.constexpr):
    """(1 + A)^-1 for strictly lower A, by joining blocks: [[X, 0], [A, Y]]^-1 =
    [[X^-1, 0], [-Y^-1 A X^-1, Y^-1]]. Unlike a Neumann series nothing large has to cancel."""
    inverse = tl.where(rows[:, None] == rows[None, :], 1.0, tl.where(_joined(rows, 0), -A, 0.0))
    for level in range(1, LEVELS):
        below = tl.where(_joined(rows, level), A, 0.0)
        below = tl.dot(inverse, below, input_precision=PREC)
        inverse -= tl.dot(below, inverse, input_precision=PREC)
    return inverse


@_jit
def _key_products(q, k, rows, left, H, K: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr):
    """Q K^T and K K^T of a chunk, [C,C], BK channels at a time."""
    qk = tl.zeros([rows.shape[0], rows.shape[0]], tl.float32)
    kk = qk
    for start in range(0, K, BK):
        cols = start + tl.arange(0, BK)
        qc = _load(q, rows, cols, H * K, left, K)                           # [C,BK]
        kc = _load(k, rows, cols, H * K, left, K)
        qk = tl.dot(qc, tl.trans(kc), qk, input_precision=PREC)
        kk = tl.dot(kc, tl.trans(kc), kk, input_precision=PREC)
    return qk, kk


@_jit
def _delta_chunk(q, k, g, beta, P, inverse, decays, T, H, K: tl.constexpr, BK: tl.constexpr,
                 C: tl.constexpr, LEVELS: tl.constexpr, PREC: tl.constexpr):
    """P = K^-0.5 Q K^T . D and (1 + A)^-1 with A = strictly lower (beta K K^T . D). Also three rows
    of decays, so that the scan, which nothing overlaps, only has to load them: exp of G, of G - G_1
    (the scan backwards multiplies by exp(G_1) last: exp(G) may be too small for fp16), of G_C - G.
    """
    chunk, left, token = _chunk(tl.program_id(0), T, H, C)
    rows = tl.arange(0, C)
    qk, kk = _key_products(q + token * K, k + token * K, rows, left, H, K, BK, PREC)
    whole, part = _cumulative_decay(_per_token(g + token, rows, H, left))
    decays += chunk * 3 * C + rows
    tl.store(decays, tl.exp(whole + part))
    tl.store(decays + C, tl.exp(whole - _at(whole, 0, rows) + (part - _at(part, 0, rows))))
    tl.store(decays + 2 * C,
             tl.exp(_at(whole, C - 1, rows) - whole + (_at(part, C - 1, rows) - part)))
    D, b = _pair_decay(whole, part, rows), _per_token(beta + token, rows, H, left)
    A = tl.where(rows[:, None] > rows[None, :], b[:, None] * kk * D, 0.0)
    _store(P + chunk * C * C, qk * D * K ** -0.5, rows, rows, C, C, C)
    _store(inverse + chunk * C * C, _unit_inverse(A, rows, LEVELS, PREC), rows, rows, C, C, C)


@_jit
def _clamped(g):
    """GLA's log decays, not below -5. A NaN must stay one, and not become a decay of -5."""
    return tl.maximum(g.to(tl.float32), -5.0, propagate_nan=tl.PropagateNan.ALL)


@_jit
def _halves_first(C: tl.constexpr):
    """GLA's order of a chunk's rows: the first 8 of every block of 16 rows, then the last 8. A tile
    of BK = 32 channels then gives each of four warps a block, and sums over it stay in the warp."""
    i = tl.arange(0, C)
    return i // 8 % (C // 16) * 16 + i // (C // 2) * 8 + i % 8


@_jit
def _channel_decay(g):
    """GLA: log2 of the decay, rows as _halves_first has them, from a block's middle to a row
    [C,BK], from the block's start to its middle and from there to its end, both [C/16,BK]. 8 rows
    of -5 lie on either side of the middle, so that exp(40) is the largest factor there is."""
    g = _clamped(g) * 1.4426950408889634                                    # log2(e)
    blocks: tl.constexpr = g.shape[0] // 16
    halves = tl.reshape(g, [2, blocks, 8, g.shape[1]])
    first = tl.arange(0, 2)[:, None, None] == 0
    sums = tl.sum(halves, 2)                                                # [2,C/16,BK]
    to_middle = tl.where(first, sums, 0.0)
    G = tl.cumsum(halves, 2) - to_middle[:, :, None, :]
    return tl.reshape(G, g.shape), tl.sum(to_middle, 0), tl.sum(tl.where(first, 0.0, sums), 0)


@_jit
def _scaled(x, factor):
    """x [C,BK] times the row of factor [C/16,BK] that belongs to its block."""
    y = tl.reshape(x, [2, factor.shape[0], 8, x.shape[1]]) * factor[None, :, None, :]
    return tl.reshape(y, x.shape)


@_jit
def _join(total, BLOCKS: tl.constexpr):
    """Joins neighbours two by two: from log2 of the decay over each of them, [n,BK], the decay that
    later queries and earlier keys gain, for each block of 16 rows [C/16,BK], and log2 of the decay
    over pairs, [n/2,BK]."""
    pairs: tl.constexpr = total.shape[0] // 2
    BK: tl.constexpr = total.shape[1]
    pair = tl.reshape(total, [pairs, 2, BK])
    both = tl.sum(pair, 1)
    other = tl.exp2(both[:, None, :] - pair)
    late = tl.arange(0, 2)[None, :, None] == 1
    for_q, for_k = tl.where(late, other, 1.0), tl.where(late, 1.0, other)
    shape: tl.constexpr = [pairs, 2, BLOCKS // (2 * pairs), BK]
    for_q = tl.reshape(tl.broadcast_to(for_q[:, :, None, :], shape), [BLOCKS, BK])
    for_k = tl.reshape(tl.broadcast_to(for_k[:, :, None, :], shape), [BLOCKS, BK])
    return for_q, for_k, both


@_jit
def _gla_chunk(q, k, g, P, q_in, k_out, decays, T, H, K: tl.constexpr, BK: tl.constexpr,
               C: tl.constexpr, PREC: tl.constexpr):
    """What the scan needs: q_in = K^-0.5 exp(G) . Q, k_out = exp(G_C - G) . K, exp(G_C), and P_ts =
    K^-0.5 sum_d q_td k_sd exp(G_td - G_sd). The decay in P differs by channel, so it has to be
    split into a factor for q and one for k: inside blocks of 16 rows at the middle row, and
    between blocks, joined two by two, at the border, where both factors are <= 1."""
    chunk, left, token = _chunk(tl.program_id(0), T, H, C)
    rows, stride, token = _halves_first(C), H * K, token * K
    P16 = tl.zeros([C, C], tl.float32)
    P32, P64 = P16, P16
    for start in range(0, K, BK):
        cols = start + tl.arange(0, BK)
        G, middle, total = _channel_decay(_load(g + token, rows, cols, stride, left, K))
        qc = _load(q + token, rows, cols, stride, left, K).to(tl.float32)   # [C,BK]
        kc = _load(k + token, rows, cols, stride, left, K).to(tl.float32)
        qc, kc = qc * tl.exp2(G), kc * tl.exp2(-G)
        P16 = tl.dot(qc, tl.trans(kc), P16, input_precision=PREC)
        qc, kc, total = _scaled(qc, tl.exp2(middle)), _scaled(kc, tl.exp2(total)), middle + total
        if C > 16:
            P32 = tl.dot(qc, tl.trans(kc), P32, input_precision=PREC)
            for_q, for_k, total = _join(total, C // 16)
            qc, kc = _scaled(qc, for_q), _scaled(kc, for_k)
        if C > 32:
            P64 = tl.dot(qc, tl.trans(kc), P64, input_precision=PREC)
            for_q, for_k, total = _join(total, C // 16)
            qc, kc = _scaled(qc, for_q), _scaled(kc, for_k)
        _store(q_in + token, qc * K ** -0.5, rows, cols, stride, left, K)
        _store(k_out + token, kc, rows, cols, stride, left, K)
        tl.store(decays + chunk * K + cols, tl.exp2(tl.sum(total, 0)), mask=cols < K)
    t, s = rows[:, None], rows[None, :]
    Pc = tl.where((t >> 4 == s >> 4) & (t >= s), P16, tl.where(_joined(rows, 4), P32, 0.0))
    Pc = tl.where(_joined(rows, 5), P64, Pc)
    _store(P + chunk * C * C, Pc * K ** -0.5, rows, rows, C, C, C)


@_jit
def _rows_times_state(x, S, PREC: tl.constexpr):
    """x S, [C,KP] @ [KP,BV]. Without tensor cores a thread holds whole rows of x and columns of S:
    at wide keys more than it has registers, so the sum is taken in parts of 64."""
    PARTS: tl.constexpr = x.shape[1] // 64 if PREC == "ieee" else 1
    if PARTS > 1:
        x = tl.permute(tl.reshape(x, [x.shape[0], PARTS, 64]), (1, 0, 2))
        S = tl.reshape(S, [PARTS, 64, S.shape[1]])
        return tl.sum(tl.dot(x, S, input_precision=PREC), 0)
    else:
        return tl.dot(x, S, input_precision=PREC)


@_jit
def _scan(q, k, v, decays, beta, P, inverse, start, o, U, S, end, T, H, K: tl.constexpr,
          V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
          DELTA: tl.constexpr, PREC: tl.constexpr):
    """The state, its outputs, and for the backward pass S at the chunks' starts and U. For GLA q
    and k are q_in and k_out of _gla_chunk, and U is V. A program owns BV columns of the state, all
    K rows: columns do not depend on each other."""
    bh, cols = _columns(V, BV)
    rows, keys, num_chunks = tl.arange(0, C), tl.arange(0, KP), tl.cdiv(T, C)
    state = _load_state(start, bh, keys, cols, K, V)
    chunk, left, token = _chunk(bh * num_chunks, T, H, C)
    for _ in range(num_chunks):
        qc = _load(q + token * K, rows, keys, H * K, left, K)               # [C,KP]
        kc = _load(k + token * K, rows, keys, H * K, left, K)
        vc = _load(v + token * V, rows, cols, H * V, left, V)               # [C,BV]
        if S is not None:
            _store(S + chunk * K * V, state, keys, cols, V, K, V)
        S0 = state.to(q.dtype.element_ty)
        if DELTA:
            row_decays = decays + chunk * 3 * C
            from_start, to_end = tl.load(row_decays + rows), tl.load(row_decays + 2 * C + rows)
            decay = tl.load(row_decays + C - 1)
            b = _per_token(beta + token, rows, H, left)
            old = from_start[:, None] * _rows_times_state(kc, S0, PREC)
            R = b[:, None] * (vc.to(tl.float32) - old)
            X = _load(inverse + chunk * C * C, rows, rows, C, C, C)
            u = tl.dot(X, R.to(X.dtype), input_precision=PREC)
            if U is not None:
                _store(U + token * V, u, rows, cols, H * V, left, V)
            out = (from_start * K ** -0.5)[:, None] * _rows_times_state(qc, S0, PREC)
            vc, u_out = u.to(vc.dtype), (to_end[:, None] * u).to(vc.dtype)
            state = tl.dot(tl.trans(kc), u_out, decay * state, input_precision=PREC)
        else:
            decay = tl.load(decays + chunk * K + keys, mask=keys < K, other=0)
            out = _rows_times_state(qc, S0, PREC)
            state = tl.dot(tl.trans(kc), vc, decay[:, None] * state, input_precision=PREC)
        out = tl.dot(_load(P + chunk * C * C, rows, rows, C, C, C), vc, out, input_precision=PREC)
        _store(o + token * V, out, rows, cols, H * V, left, V)
        chunk, left, token = chunk + 1, left - C, token + C * H
    _store(end + bh * K * V, state, keys, cols, V, K, V)


@_jit
def _scan_backward(q, k, decays, beta, P, inverse, do, dend, dU, dS, dstart, T, H, K: tl.constexpr,
                   V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                   DELTA: tl.constexpr, PREC: tl.constexpr):
    """The gradient of the state, from the last chunk to the first; dS of a chunk is that of the
    state behind it. Also dU: the gradient of R for the delta rule, of V for GLA. q and k are as in
    _scan."""
    bh, cols = _columns(V, BV)
    rows, keys, num_chunks = tl.arange(0, C), tl.arange(0, KP), tl.cdiv(T, C)
    dstate = _load_state(dend, bh, keys, cols, K, V)
    chunk, left, token = _chunk((bh + 1) * num_chunks - 1, T, H, C)
    for _ in range(num_chunks):
        qc = _load(q + token * K, rows, keys, H * K, left, K)               # [C,KP]
        kc = _load(k + token * K, rows, keys, H * K, left, K)
        doc = _load(do + token * V, rows, cols, H * V, left, V)             # [C,BV]
        _store(dS + chunk * K * V, dstate, keys, cols, V, K, V)
        dS1 = dstate.to(q.dtype.element_ty)
        Pc = _load(P + chunk * C * C, rows, rows, C, C, C)
        du = tl.dot(tl.trans(Pc), doc, input_precision=PREC)
        if DELTA:
            row_decays = decays + chunk * 3 * C
            from_first, to_end = tl.load(row_decays + C + rows), tl.load(row_decays + 2 * C + rows)
            first, last = tl.load(row_decays), tl.load(row_decays + 2 * C - 1)
            b = _per_token(beta + token, rows, H, left)
            du += to_end[:, None] * _rows_times_state(kc, dS1, PREC)
            X = _load(inverse + chunk * C * C, rows, rows, C, C, C)
            du = tl.dot(tl.trans(X), du.to(X.dtype), input_precision=PREC)  # of R from here on
            do_in = (doc.to(tl.float32) * (from_first * K ** -0.5)[:, None]).to(doc.dtype)
            du_in = (du * -(b * from_first)[:, None]).to(doc.dtype)
            dstate = tl.dot(tl.trans(qc), do_in, last * dstate, input_precision=PREC)
            dstate = first * tl.dot(tl.trans(kc), du_in, dstate, input_precision=PREC)
        else:
            decay = tl.load(decays + chunk * K + keys, mask=keys < K, other=0)
            du += _rows_times_state(kc, dS1, PREC)
            dstate = tl.dot(tl.trans(qc), doc, decay[:, None] * dstate, input_precision=PREC)
        _store(dU + token * V, du, rows, cols, H * V, left, V)
        chunk, left, token = chunk - 1, left + C, token - C * H
    if dstart is not None:
        _store(dstart + bh * K * V, dstate, keys, cols, V, K, V)


@_jit
def _delta_pairs(q, k, v, U, dR, do, dv, whole, part, b, rows, left, H, K: tl.constexpr,
                 V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                 PREC: tl.constexpr):
    """Gradients by way of pairs of rows: dP . D, dA . D and what they add to dG and dbeta. P and A
    are computed anew in fp32: rounded, they would spoil dG. Also writes dv."""
    dP, dA = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    db = tl.zeros([C], tl.float32)
    for start in range(0, V, BV):
        cols = start + tl.arange(0, BV)
        uc = _load(U, rows, cols, H * V, left, V)                           # [C,BV]
        dRc = _load(dR, rows, cols, H * V, left, V)
        dP = tl.dot(_load(do, rows, cols, H * V, left, V), tl.trans(uc), dP, input_precision=PREC)
        dA = tl.dot(dRc, tl.trans(uc), dA, input_precision=PREC)            # of -A
        dRc = dRc.to(tl.float32)
        db += tl.sum(dRc * _load(v, rows, cols, H * V, left, V).to(tl.float32), 1)
        _store(dv, b[:, None] * dRc, rows, cols, H * V, left, V)
    qk, kk = _key_products(q, k, rows, left, H, K, BK, PREC)
    D, below = _pair_decay(whole, part, rows), rows[:, None] > rows[None, :]
    dP = dP * D * K ** -0.5
    dA = tl.where(below, -dA * D, 0.0)
    db += tl.sum(dA * kk, 1)
    dA *= b[:, None]
    pairs = tl.where(below, dP * qk + dA * kk, 0.0)
    return dP, dA, tl.sum(pairs, 1) - tl.sum(tl.trans(pairs), 1), db


@_jit
def _delta_gradients(q, k, v, g, beta, decays, do, U, dR, S, dS, dq, dk, dv, dg, dbeta, T, H,
                     K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                     C: tl.constexpr, PREC: tl.constexpr):
    """Gradients of a chunk's inputs, by the formulas of _DeltaRule.backward, which also explains
    why the sums for dg skip the diagonal."""
    chunk, left, token = _chunk(tl.program_id(0), T, H, C)
    q, k, dq, dk = q + token * K, k + token * K, dq + token * K, dk + token * K
    v, do, U, dR, dv = v + token * V, do + token * V, U + token * V, dR + token * V, dv + token * V
    S, dS = S + chunk * K * V, dS + chunk * K * V
    rows = tl.arange(0, C)
    whole, part = _cumulative_decay(_per_token(g + token, rows, H, left))
    decays += chunk * 3 * C
    from_start, to_end = tl.load(decays + rows), tl.load(decays + 2 * C + rows)
    b = _per_token(beta + token, rows, H, left)
    dP, dA, dG, db = _delta_pairs(q, k, v, U, dR, do, dv, whole, part, b, rows, left, H, K, V,
                                  BK, BV, C, PREC)
    dP, dA = dP.to(q.dtype.element_ty), (dA + tl.trans(dA)).to(q.dtype.element_ty)
    # each row and the state
    in_sum, out_sum = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    kept = tl.zeros([BK], tl.float32)                                       # <dS, S>
    for start in range(0, K, BK):
        keys = start + tl.arange(0, BK)
        dqc, dk_in = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        dk_out = tl.zeros([C, BK], tl.float32)
        for start_v in range(0, V, BV):
            cols = start_v + tl.arange(0, BV)
            S0 = _load(S, keys, cols, V, K, V)                              # [BK,BV]
            dS1 = _load(dS, keys, cols, V, K, V)
            kept += tl.sum(S0.to(tl.float32) * dS1.to(tl.float32), 1)
            doc = _load(do, rows, cols, H * V, left, V)                     # [C,BV]
            dqc = tl.dot(doc, tl.trans(S0), dqc, input_precision=PREC)
            dRc = _load(dR, rows, cols, H * V, left, V)
            dk_in = tl.dot(dRc, tl.trans(S0), dk_in, input_precision=PREC)  # of -k_in
            uc = _load(U, rows, cols, H * V, left, V)
            dk_out = tl.dot(uc, tl.trans(dS1), dk_out, input_precision=PREC)
        qc = _load(q, rows, keys, H * K, left, K)                           # [C,BK]
        kc = _load(k, rows, keys, H * K, left, K)
        dqc *= (from_start * K ** -0.5)[:, None]
        dG += tl.sum(dqc * qc.to(tl.float32), 1)
        in_sum -= tl.sum(dk_in * kc.to(tl.float32), 1)
        out_sum += tl.sum(dk_out * kc.to(tl.float32), 1)
        dqc = tl.dot(dP, kc, dqc, input_precision=PREC)
        dkc = dk_out * to_end[:, None] - dk_in * (b * from_start)[:, None]
        dkc = tl.dot(tl.trans(dP), qc, dkc, input_precision=PREC)
        dkc = tl.dot(dA, kc, dkc, input_precision=PREC)
        _store(dq, dqc, rows, keys, H * K, left, K)
        _store(dk, dkc, rows, keys, H * K, left, K)
    in_sum *= from_start
    dG += b * in_sum
    # dG adds to g of its row and of earlier rows, the decay to the chunk's end to g of later rows
    later = tl.where(rows[:, None] <= rows[None, :], dG[None, :], (out_sum * to_end)[None, :])
    dgc = tl.sum(later, 1) + tl.load(decays + C - 1) * tl.sum(kept, 0)
    tl.store(dg + token + rows * H, dgc.to(dg.dtype.element_ty), mask=rows < left)
    tl.store(dbeta + token + rows * H, (db + in_sum).to(dbeta.dtype.element_ty), mask=rows < left)


@_jit
def _gla_gradients(q, k, v, g, decays, do, S, dS, dq, dk, dg, T, H, K: tl.constexpr,
                   V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                   PREC: tl.constexpr):
    """Gradients of a chunk's q, k and g for BK channels. dq and dk come from three levels of pairs
    of rows, as P does, and from the state. dG = q . dq - k . dk sums to dg from each row on."""
    blocks, rows, stride = tl.cdiv(K, BK), _halves_first(C), H * K
    chunk, left, token = _chunk(tl.program_id(0) // blocks, T, H, C)
    keys = tl.program_id(0) % blocks * BK + tl.arange(0, BK)
    t, s = rows[:, None], rows[None, :]
    v, do, S, dS = v + token * V, do + token * V, S + chunk * K * V, dS + chunk * K * V
    operand = tl.bfloat16 if q.dtype.element_ty == tl.bfloat16 else tl.float32
    dP = tl.zeros([C, C], tl.float32)
    for start in range(0, V, BV):
        cols = start + tl.arange(0, BV)
        doc = _load(do, rows, cols, H * V, left, V)                         # [C,BV]
        vc = _load(v, rows, cols, H * V, left, V)
        dP = tl.dot(doc, tl.trans(vc), dP, input_precision=PREC)
    dP = (dP * K ** -0.5).to(operand)
    qc = _load(q + token * K, rows, keys, stride, left, K)                  # [C,BK]
    kc = _load(k + token * K, rows, keys, stride, left, K)
    G, middle, total = _channel_decay(_load(g + token * K, rows, keys, stride, left, K))
    from_middle, to_middle = tl.exp2(G), tl.exp2(-G)
    from_start, to_end, total = tl.exp2(middle), tl.exp2(total), middle + total
    qs, ks = qc.to(tl.float32) * from_middle, kc.to(tl.float32) * to_middle
    pairs = tl.where((t >> 4 == s >> 4) & (t > s), dP, 0.0)
    dqc = tl.dot(pairs, ks.to(operand), input_precision=PREC)
    dkc = tl.dot(tl.trans(pairs), qs.to(operand), input_precision=PREC)
    if C > 16:
        qs, ks = _scaled(qs, from_start), _scaled(ks, to_end)
        pairs = tl.where(_joined(rows, 4), dP, 0.0)
        dqc += _scaled(tl.dot(pairs, ks.to(operand), input_precision=PREC), from_start)
        dkc += _scaled(tl.dot(tl.trans(pairs), qs.to(operand), input_precision=PREC), to_end)
        for_q, for_k, total = _join(total, C // 16)
        from_start, to_end = from_start * for_q, to_end * for_k
        if C > 32:
            qs, ks = _scaled(qs, for_q), _scaled(ks, for_k)
            pairs = tl.where(_joined(rows, 5), dP, 0.0)
            dqc += _scaled(tl.dot(pairs, ks.to(operand), input_precision=PREC), from_start)
            dkc += _scaled(tl.dot(tl.trans(pairs), qs.to(operand), input_precision=PREC), to_end)
            for_q, for_k, total = _join(total, C // 16)
            from_start, to_end = from_start * for_q, to_end * for_k
    # the state
    kept = tl.zeros([BK], tl.float32)                                       # <dS, S> per channel
    dq_in, dk_out = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    for start in range(0, V, BV):
        cols = start + tl.arange(0, BV)
        S0 = _load(S, keys, cols, V, K, V)                                  # [BK,BV]
        dS1 = _load(dS, keys, cols, V, K, V)
        kept += tl.sum(S0.to(tl.float32) * dS1.to(tl.float32), 1)
        doc = _load(do, rows, cols, H * V, left, V)                         # [C,BV]
        vc = _load(v, rows, cols, H * V, left, V)
        dq_in = tl.dot(doc, tl.trans(S0), dq_in, input_precision=PREC)
        dk_out = tl.dot(vc, tl.trans(dS1), dk_out, input_precision=PREC)
    dqc += _scaled(dq_in, from_start * K ** -0.5)
    dk_out = _scaled(dk_out, to_end)
    # dg skips the diagonal; the decay from a row to the chunk's end adds to g of the later rows
    dqc, dkc, dk_out = dqc * from_middle, dkc * to_middle, dk_out * to_middle
    dG, out_sum = (qc * dqc - kc * dkc).to(operand), (kc * dk_out).to(operand)
    dgc = tl.dot(tl.where(t <= s, 1.0, 0.0).to(operand), dG, input_precision=PREC)
    dgc = tl.dot(tl.where(t > s, 1.0, 0.0).to(operand), out_sum, dgc, input_precision=PREC)
    dgc += (tl.load(decays + chunk * K + keys, mask=keys < K, other=0) * kept)[None, :]
    diagonal = tl.where(t == s, dP, 0.0)
    dqc = tl.dot(diagonal, kc.to(operand), dqc, input_precision=PREC)
    dkc = tl.dot(diagonal, qc.to(operand), dkc + dk_out, input_precision=PREC)
    _store(dg + token * K, dgc, rows, keys, stride, left, K)
    _store(dq + token * K, dqc, rows, keys, stride, left, K)
    _store(dk + token * K, dkc, rows, keys, stride, left, K)


@_jit
def _step(q, k, v, g, beta, start, o, end, T, H, K: tl.constexpr, V: tl.constexpr,
          KP: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr):
    """The recurrence itself, for a few tokens. A program owns BV columns of the state, and reads
    and writes them once; end may be start."""
    bh, cols = _columns(V, BV)
    keys = tl.arange(0, KP)
    token = bh // H * T * H + bh % H
    state = _load_state(start, bh, keys, cols, K, V)
    for _ in range(T):
        qt = tl.load(q + token * K + keys, mask=keys < K, other=0).to(tl.float32)   # [KP]
        kt = tl.load(k + token * K + keys, mask=keys < K, other=0).to(tl.float32)
        vt = tl.load(v + token * V + cols, mask=cols < V, other=0).to(tl.float32)   # [BV]
        if DELTA:
            state *= tl.exp(tl.load(g + token).to(tl.float32))
            b = tl.load(beta + token).to(tl.float32)
            vt = b * (vt - tl.sum(kt[:, None] * state, 0))
        else:
            gt = tl.load(g + token * K + keys, mask=keys < K, other=0)
            state *= tl.exp(_clamped(gt))[:, None]
        state += kt[:, None] * vt[None, :]
        ot = tl.sum(qt[:, None] * state, 0) * K ** -0.5
        tl.store(o + token * V + cols, ot.to(o.dtype.element_ty), mask=cols < V)
        token += H
    _store(end + bh * K * V, state, keys, cols, V, K, V)


@_jit
def _conv_input(x, cache, rows, cols, T, D, W: tl.constexpr):
    """Rows of the convolution's input: x, before it the cache or zeros. fp32."""
    inside = (rows[:, None] < T) & (cols[None, :] < D)
    tile = tl.load(x + rows[:, None] * D + cols[None, :], mask=inside & (rows[:, None] >= 0),
                   other=0).to(tl.float32)
    if cache is not None:
        inside = (rows[:, None] < 0) & (rows[:, None] > -W) & (cols[None, :] < D)
        tile += tl.load(cache + (rows[:, None] + W - 1) * D + cols[None, :], mask=inside,
                        other=0).to(tl.float32)
    return tile


@_jit
def _conv_tap(kernel, w, rows, cols, T, D, W: tl.constexpr, PER_TOKEN: tl.constexpr):
    if PER_TOKEN:
        inside = (rows[:, None] >= 0) & (rows[:, None] < T) & (cols[None, :] < D)
        tap = tl.load(kernel + (rows[:, None] * W + w) * D + cols[None, :], mask=inside, other=0)
    else:
        tap = tl.load(kernel + w * D + cols, mask=cols < D, other=0)[None, :]
    return tap.to(tl.float32)


@_jit
def _conv_rows(x, kernel, cache, rows, cols, T, D, W: tl.constexpr, PER_TOKEN: tl.constexpr):
    """z_t = sum_w kernel_w x_{t-W+1+w} of the given rows t."""
    z = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
    for w in tl.static_range(W):
        tap = _conv_tap(kernel, w, rows, cols, T, D, W, PER_TOKEN)
        z += tap * _conv_input(x, cache, rows - (W - 1) + w, cols, T, D, W)
    return z


@_jit
def _conv(x, kernel, cache, y, T, D, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
          PER_TOKEN: tl.constexpr, SILU: tl.constexpr):
    """A program owns BT tokens of BD channels. Neighbouring taps read rows that overlap; those come
    from the L1 cache."""
    b = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    cols = tl.program_id(1) * BD + tl.arange(0, BD)
    if PER_TOKEN:
        kernel += b * T * W * D
    if cache is not None:
        cache += b * (W - 1) * D
    z = _conv_rows(x + b * T * D, kernel, cache, rows, cols, T, D, W, PER_TOKEN)
    if SILU:
        z *= tl.sigmoid(z)
    _store(y + b * T * D, z, rows, cols, D, T, D)


@_jit
def _conv_backward(x, kernel, cache, dy, dx, dkernel, dcache, T, D, W: tl.constexpr,
                   BT: tl.constexpr, BD: tl.constexpr, PER_TOKEN: tl.constexpr,
                   SILU: tl.constexpr):
    """A program owns BT rows of the input, of which the first W - 1 are the cache's. A row's
    gradient needs dz of the W outputs that saw it; computing z anew, W times in all, costs reads
    from L1 and spares a second launch and a tensor. The gradient of a static kernel is summed over
    the BT rows here and over programs by the caller."""
    b, block = tl.program_id(2).to(tl.int64), tl.program_id(0).to(tl.int64)
    rows = block * BT - (W - 1) + tl.arange(0, BT)
    cols = tl.program_id(1) * BD + tl.arange(0, BD)
    x, dy, dx = x + b * T * D, dy + b * T * D, dx + b * T * D
    if PER_TOKEN:
        kernel, dkernel = kernel + b * T * W * D, dkernel + b * T * W * D
    if cache is not None:
        cache, dcache = cache + b * (W - 1) * D, dcache + b * (W - 1) * D
    sum_x = tl.zeros([BT, BD], tl.float32)
    dz = sum_x
    for w in tl.static_range(W):                        # the last tap's dz is that of rows itself
        t = rows + (W - 1) - w
        inside = (t[:, None] >= 0) & (t[:, None] < T) & (cols[None, :] < D)
        dz = tl.load(dy + t[:, None] * D + cols[None, :], mask=inside, other=0).to(tl.float32)
        if SILU:
            z = _conv_rows(x, kernel, cache, t, cols, T, D, W, PER_TOKEN)
            gate = tl.sigmoid(z)
            dz *= gate * (1 + z * (1 - gate))
        sum_x += dz * _conv_tap(kernel, w, t, cols, T, D, W, PER_TOKEN)
    inside = (rows[:, None] < T) & (cols[None, :] < D)
    tl.store(dx + rows[:, None] * D + cols[None, :], sum_x.to(dx.dtype.element_ty),
             mask=inside & (rows[:, None] >= 0))
    if cache is not None:
        tl.store(dcache + (rows[:, None] + W - 1) * D + cols[None, :],
                 sum_x.to(dcache.dtype.element_ty), mask=inside & (rows[:, None] < 0))
    for w in tl.static_range(W):
        dtap = dz * _conv_input(x, cache, rows - (W - 1) + w, cols, T, D, W)
        if PER_TOKEN:
            tl.store(dkernel + (rows[:, None] * W + w) * D + cols[None, :],
                     dtap.to(dkernel.dtype.element_ty), mask=inside & (rows[:, None] >= 0))
        else:
            partial = (b * tl.num_programs(0) + block) * W + w
            tl.store(dkernel + partial * D + cols, tl.sum(dtap, 0), mask=cols < D)


@_jit
def _norm_rows(x, rows, cols, stride, H, N, D):
    """Rows (b, t, h) of x [B,T,H,D], whose tokens lie `stride` apart. fp32."""
    inside = (rows[:, None] < N) & (cols[None, :] < D)
    place = rows // H * stride + rows % H * D
    return tl.load(x + place[:, None] + cols[None, :], mask=inside, other=0).to(tl.float32)


@_jit
def _norm(x, weight, gate, y, x_stride, gate_stride, H, N, scale, eps, D: tl.constexpr,
          BD: tl.constexpr, BN: tl.constexpr):
    """A program owns BN of the N = B * T * H rows."""
    rows, cols = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN), tl.arange(0, BD)
    xc = _norm_rows(x, rows, cols, x_stride, H, N, D)                       # [BN,BD]
    z = xc * (scale * tl.rsqrt(tl.sum(xc * xc, 1) / D + eps))[:, None]
    if weight is not None:
        z *= tl.load(weight + cols, mask=cols < D, other=0).to(tl.float32)[None, :]
    if gate is not None:
        gc = _norm_rows(gate, rows, cols, gate_stride, H, N, D)
        z *= gc * tl.sigmoid(gc)
    _store(y, z, rows, cols, D, N, D)


@_jit
def _norm_backward(x, weight, gate, dy, dx, dweight, dgate, x_stride, gate_stride, H, N, scale, eps,
                   D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    """Gradients for BN rows; that of the weight is summed over programs by the caller."""
    rows, cols = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN), tl.arange(0, BD)
    xc = _norm_rows(x, rows, cols, x_stride, H, N, D)                       # [BN,BD]
    dz = _load(dy, rows, cols, D, N, D).to(tl.float32) * scale
    inverse = tl.rsqrt(tl.sum(xc * xc, 1) / D + eps)[:, None]
    normed = xc * inverse
    if weight is not None:
        w = tl.load(weight + cols, mask=cols < D, other=0).to(tl.float32)[None, :]
    else:
        w = 1.0
    if gate is not None:
        gc = _norm_rows(gate, rows, cols, gate_stride, H, N, D)
        sigmoid = tl.sigmoid(gc)
        _store(dgate, dz * normed * w * sigmoid * (1 + gc * (1 - sigmoid)), rows, cols, D, N, D)
        dz *= gc * sigmoid
    if weight is not None:
        tl.store(dweight + tl.program_id(0) * D + cols, tl.sum(dz * normed, 0), mask=cols < D)
    dz *= w
    dxc = inverse * (dz - normed * (tl.sum(dz * normed, 1) / D)[:, None])
    _store(dx, dxc, rows, cols, D, N, D)


# -----------------------------------------------------------------------------
# Which form runs, and how the kernels are launched

KERNEL_DTYPES, MAX_DIM = (torch.float32, torch.float16, torch.bfloat16), 256


def auto_backend(x, *dims):
    """What backend="auto" means for x and its head dims: "triton", from Ampere on, or "torch".
    Decided here only."""
    supported = x.dtype in KERNEL_DTYPES and max(dims, default=0) <= MAX_DIM
    nvidia = triton is not None and x.is_cuda and torch.version.hip is None
    return "triton" if supported and nvidia and _capability(x.device) >= 8 else "torch"


def _use_triton(backend, x, *dims):
    """Whether to launch kernels. ValueError if they are asked for and cannot run."""
    if backend == "auto":
        backend = auto_backend(x, *dims)
    if backend not in ("torch", "triton"):
        raise ValueError(f"backend is {backend!r}, expected 'auto', 'torch' or 'triton'")
    if backend == "torch":
        return False
    if triton is None:
        raise ValueError("backend is 'triton', but triton is not installed: pip install triton")
    if not x.is_cuda and not _INTERPRETED:
        raise ValueError("backend is 'triton', but the inputs are not on a GPU; to run the kernels "
                         "on a CPU, slowly, set TRITON_INTERPRET=1 before this file is imported")
    if x.dtype not in KERNEL_DTYPES:
        raise ValueError(f"the kernels take fp32, fp16 and bf16, not {x.dtype}: use the torch form")
    if max(dims, default=0) > MAX_DIM:
        raise ValueError(f"the kernels take head dims up to {MAX_DIM}, not {max(dims)}: use the "
                         "torch form")
    return True


@functools.cache
def _use_sound_ptxas():
    """Has Triton assemble for Hopper with the ptxas 13.1 that its package brings for Blackwell.
    With its usual one, 12.8, gradients of the delta rule were wrong or read foreign memory on an
    H200 (bf16, head dims 24 and 40); with 13.1 every check passes. RuntimeError without one."""
    from triton.backends.nvidia import compiler
    tools = triton.knobs.nvidia
    sound = lambda tool: tuple(map(int, tool.version.split("."))) >= (13, 1)
    if sound(tools.ptxas):
        return
    if "TRITON_PTXAS_PATH" in os.environ or not sound(tools.ptxas_blackwell):
        raise RuntimeError(
            f"ptxas {tools.ptxas.version} compiles these kernels wrongly for Hopper: set "
            "TRITON_PTXAS_PATH to one of CUDA 13.1 or later, or pass backend='torch'")
    tools.ptxas = tools.ptxas_blackwell.path
    compiler.get_ptxas_version.cache_clear()        # the version is part of the disk cache's keys


def _launch(kernel, grid, *args, **constants):
    if _capability(args[0].device) == 9:
        _use_sound_ptxas()
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **constants)


def _padded(dim):
    """Head dim -> the width of a tile that holds it: a power of two that tl.dot takes."""
    return max(16, 1 << (dim - 1).bit_length())


@functools.cache
def _capability(device):
    """8 is Ampere, 9 is Hopper, 0 a CPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _config(q, V, delta):
    """Tile sizes and launch options of the four kernels of a call. On Hopper the fastest of those
    timed on an H200, elsewhere a guess; nothing spills and shared memory fits, as a test shows
    without a GPU. No autotuner, so that no run waits for one. Chunks are 64 rows, one tensor-core
    instruction of a Hopper warp group."""
    (B, _, H, K), hopper = q.shape, _capability(q.device) == 9
    KP, VP, C, precision, stages, scan_stages = _padded(K), _padded(V), 64, "tf32", 2, 2
    if q.dtype == torch.float32:
        # full products without tensor cores, for exactness; their operands fill the registers
        C, precision, stages, scan_stages = 32 if delta and KP <= 64 else 16, "ieee", 1, 1
        chunk, scan, gradients = (32, 8), (16, 8), (32, 16, 8)              # BK, BV, then warps
    elif hopper:
        # The scan waits for memory most of its time, so it has as many stages as fit 227 KB. GLA,
        # which needs fewer registers, takes 64 columns where that leaves a program per processor.
        wide = not delta and 64 < KP <= 128 and B * H * triton.cdiv(V, 64) >= 128
        chunk = (64, 4) if delta else (32, 4)
        scan, scan_stages = (64 if wide else 32, 8 if KP > 128 else 4), 2 if KP > 128 else 3
        # GLA's warps each own a block of 16 rows; half as many are fewer instructions in all. In
        # fp16 the operands are tf32 and need twice the registers, but products 8 columns wide per
        # warp group (m64n8k8, suspected to fault) must not come up, so narrow keys stay with 4.
        few = q.dtype == torch.bfloat16 or KP == 16
        gradients = (32, 64, 8 if V % 64 else 4) if delta else (32, 32, 4 if few else 8)
    else:
        # mma.sync keeps its operands in registers, so tiles are smaller, and K = 256 has none left
        # for a second stage; everything fits the 99 KB of consumer cards too
        chunk = (64, 4) if delta else (32, 4)
        scan, scan_stages = (16 if KP > 128 else 32, 4 if KP <= 64 else 8), 1 if KP > 128 else 2
        gradients = (32 if delta or q.dtype == torch.bfloat16 and VP > 32 else 16, 32, 8)
    common = dict(C=C, K=K, PREC=precision)
    chunk = common | dict(BK=min(chunk[0], KP), num_warps=chunk[1], num_stages=stages)
    if delta:
        chunk["LEVELS"] = C.bit_length() - 1
    scan = common | dict(V=V, KP=KP, BV=min(scan[0], VP), DELTA=delta, num_warps=scan[1],
                         num_stages=scan_stages)
    backward = scan | dict(num_stages=min(scan_stages, 2 if delta and KP > 64 else 3))
    gradients = common | dict(V=V, BK=min(gradients[0], KP), BV=min(gradients[1], VP),
                              num_warps=gradients[2], num_stages=stages)
    return {"chunk": chunk, "scan": scan, "scan_backward": backward, "gradients": gradients}


class _Kernels(torch.autograd.Function):
    """The launches of both chunkwise forms; beta is None for GLA. q, k, v of one dtype, all
    contiguous, state fp32 or None. With `save`, what the backward pass needs is kept, one state
    per chunk included, rather than computed twice."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, state, save):
        (B, T, H, K), V, config = q.shape, v.shape[-1], _config(q, v.shape[-1], beta is not None)
        C, fp32 = config["scan"]["C"], torch.float32
        N = B * H * triton.cdiv(T, C)                                       # chunks of all heads
        P, inverse, qs, ks = q.new_empty(N, C, C), None, q, k
        if beta is not None:
            inverse, decays = torch.empty_like(P), g.new_empty(N, 3, C, dtype=fp32)
            _launch(_delta_chunk, (N,), q, k, g, beta, P, inverse, decays, T, H, **config["chunk"])
        else:
            qs, ks, decays = torch.empty_like(q), torch.empty_like(k), g.new_empty(N, K, dtype=fp32)
            _launch(_gla_chunk, (N,), q, k, g, P, qs, ks, decays, T, H, **config["chunk"])
        o, end = torch.empty_like(v), q.new_empty(B, H, K, V, dtype=fp32)
        S = q.new_empty(N, K, V) if save else None
        U = torch.empty_like(v) if save and beta is not None else None
        ctx.programs = B * H * triton.cdiv(V, config["scan"]["BV"])
        _launch(_scan, (ctx.programs,), qs, ks, v, decays, beta, P, inverse, state, o, U, S, end,
                T, H, **config["scan"])
        if save:
            ctx.config, ctx.has_state = config, state is not None
            ctx.set_materialize_grads(False)        # the gradient of an unused final state is None
            ctx.save_for_backward(q, k, v, g, beta, qs, ks, decays, P, inverse, S, U)
        return o, end

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dend):
        q, k, v, g, beta, qs, ks, decays, P, inverse, S, U = ctx.saved_tensors
        (B, T, H, K), V, N, config = q.shape, v.shape[-1], len(P), ctx.config
        do = torch.zeros_like(v) if do is None else do.contiguous()
        dend = None if dend is None else dend.contiguous()
        dstart = q.new_empty(B, H, K, V, dtype=torch.float32) if ctx.has_state else None
        dU, dS = torch.empty_like(v), torch.empty_like(S)
        _launch(_scan_backward, (ctx.programs,), qs, ks, decays, beta, P, inverse, do, dend,
                dU, dS, dstart, T, H, **config["scan_backward"])
        dq, dk, dg = (torch.empty_like(x) for x in (q, k, g))
        if beta is not None:
            dv, dbeta = torch.empty_like(v), torch.empty_like(beta)
            _launch(_delta_gradients, (N,), q, k, v, g, beta, decays, do, U, dU, S, dS,
                    dq, dk, dv, dg, dbeta, T, H, **config["gradients"])
        else:
            dv, dbeta, blocks = dU, None, triton.cdiv(K, config["gradients"]["BK"])
            _launch(_gla_gradients, (N * blocks,), q, k, v, g, decays, do, S, dS,
                    dq, dk, dg, T, H, **config["gradients"])
        return dq, dk, dv, dg, dbeta, dstart, None


def _run_kernels(q, k, v, g, beta, state):
    """What the ops do to their inputs before and after the launches."""
    inputs = [x if x is None else x.contiguous() for x in (
        q, k.to(q.dtype), v.to(q.dtype), g, beta, state if state is None else state.float())]
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, end = _Kernels.apply(*inputs, save)
    return o.to(v.dtype), end


class _ConvKernels(torch.autograd.Function):
    """The launches of causal_conv, all contiguous. Tiles are 32 tokens of 128 bytes. Backwards the
    registers hold one program per processor, so that it has 16 warps to hide memory's latency."""

    @staticmethod
    def forward(ctx, x, kernel, cache, activation):
        (B, T, D), W, y = x.shape, kernel.shape[-2], torch.empty_like(x)
        ctx.save_for_backward(x, kernel, cache)
        ctx.constants = dict(W=W, PER_TOKEN=kernel.dim() == 4, SILU=activation is not None, BT=32,
                             BD=128 // x.element_size())
        ctx.tiles = triton.cdiv(D, ctx.constants["BD"]), B
        _launch(_conv, (triton.cdiv(T, 32), *ctx.tiles), x, kernel, cache, y, T, D,
                **ctx.constants, num_warps=4)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, kernel, cache = ctx.saved_tensors
        (B, T, D), W, per_token = x.shape, kernel.shape[-2], ctx.constants["PER_TOKEN"]
        blocks = triton.cdiv(T + W - 1, 32)
        dx, dcache = torch.empty_like(x), None if cache is None else torch.empty_like(cache)
        dkernel = (torch.empty_like(kernel) if per_token else
                   x.new_empty(B * blocks, W, D, dtype=torch.float32))
        _launch(_conv_backward, (blocks, *ctx.tiles), x, kernel, cache, dy.contiguous(),
                dx, dkernel, dcache, T, D, **ctx.constants, num_warps=16)
        if not per_token:
            dkernel = dkernel.sum(0).to(kernel.dtype)
        return dx, dkernel, dcache, None


def _head_rows(x):
    """x [B,T,H,D] with heads side by side and tokens evenly spaced, as in a slice of a projection:
    itself where it is so, and how far its tokens lie apart."""
    B, T, H, D = x.shape
    if x.stride()[2:] != (D, 1) or B > 1 and x.stride(0) != T * x.stride(1):
        x = x.contiguous()
    return x, x.stride(1) if T > 1 else x.stride(0)


class _NormKernels(torch.autograd.Function):
    """The launches of gated_rms_norm."""

    @staticmethod
    def forward(ctx, x, weight, gate, eps, scale):
        x, x_stride = _head_rows(x)
        gate, gate_stride = (None, 0) if gate is None else _head_rows(gate)
        (B, T, H, D), y = x.shape, x.new_empty(x.shape)
        BD = _padded(D)
        ctx.numbers = x_stride, gate_stride, H, B * T * H, scale, eps
        ctx.constants = dict(D=D, BD=BD, BN=max(1, 4096 // BD), num_warps=4)
        _launch(_norm, (triton.cdiv(B * T * H, ctx.constants["BN"]),), x, weight, gate, y,
                *ctx.numbers, **ctx.constants)
        ctx.save_for_backward(x, weight, gate)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, gate = ctx.saved_tensors
        programs = triton.cdiv(x.numel() // x.shape[-1], ctx.constants["BN"])
        dx = x.new_empty(x.shape)
        dgate = None if gate is None else gate.new_empty(gate.shape)
        dweight = None if weight is None else weight.new_empty(
            programs, x.shape[-1], dtype=torch.float32)
        _launch(_norm_backward, (programs,), x, weight, gate, dy.contiguous(), dx, dweight, dgate,
                *ctx.numbers, **ctx.constants)
        return dx, None if weight is None else dweight.sum(0).to(weight.dtype), dgate, None, None


def _run_step(q, k, v, g, beta, state, end):
    """Launch the recurrence; the final state goes to `end`, a new tensor if None."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    q, k, v, g, beta, state = (x if x is None else x.detach().contiguous()
                               for x in (q, k, v, g, beta, state))
    o = torch.empty_like(v)
    if end is None:
        end = q.new_empty(B, H, K, V, dtype=torch.float32)
    # Reading and writing the state takes all the time. Small batches need many narrow programs to
    # keep the memory busy (8 columns are one 32-byte sector); large ones gain by 128-byte rows.
    BV, warps = (8, 1) if B * H * V < 8192 else (32, 4)
    _launch(_step, (B * H * triton.cdiv(V, BV),), q, k, v, g, beta, state, o, end, T, H, K=K, V=V,
            KP=_padded(K), BV=BV, DELTA=beta is not None, num_warps=warps)
    return o, end


@torch.compiler.disable
def recurrent_step(q, k, v, g, beta=None, initial_state=None, inplace=False, backend="auto"):
    """A few tokens of decoding, without gradients: the delta rule, or GLA where beta is None.

    Shapes and results as `gated_delta_rule` and `gated_linear_attention`. With `inplace` the final
    state is written over initial_state, which then is what comes back; otherwise initial_state
    stays as it is, so that it can be forked. ValueError if a shape does not fit, or if inplace
    cannot be done. In a CUDA graph as it is: one launch, nothing waits for the GPU.
    Equivalent to: gated_delta_rule_recurrent(q, k, v, g, beta, initial_state)
    """
    delta = beta is not None
    _check(q, k, v, g, beta, initial_state, q.shape[:3] if delta else q.shape)
    if inplace and (initial_state is None or initial_state.dtype != _compute_dtype(q)
                    or not initial_state.is_contiguous()):
        raise ValueError(f"inplace needs a contiguous initial_state of {_compute_dtype(q)}")
    with torch.no_grad():
        if _use_triton(backend, q, q.shape[-1], v.shape[-1]):
            state = initial_state if initial_state is None else initial_state.float()
            if inplace:
                torch.autograd.graph.increment_version(state)               # as copy_ below does
            return _run_step(q, k, v, g, beta, state, state if inplace else None)
        if delta:
            o, S = gated_delta_rule_recurrent(q, k, v, g, beta, initial_state)
        else:
            o, S = gated_linear_attention_recurrent(q, k, v, g, initial_state)
        return o, initial_state.copy_(S) if inplace else S


# -----------------------------------------------------------------------------
# python kernels.py: the check

OPS = ("gated_delta_rule", "gated_linear_attention")
# relative RMS error against the fp64 loop on the same, rounded inputs
TOLERANCES = {
    torch.float32: (1e-5, {"dg": 2e-4}),
    torch.float16: (5e-3, {"dg": 2e-2, "dbeta": 2e-2}),
    torch.bfloat16: (5e-3, {"dg": 2e-2, "dbeta": 2e-2} | dict.fromkeys(
        ("dq", "dk", "dv", "dstate", "dx", "dkernel", "dcache", "dgate"), 8e-3))}


def _random_inputs(op, B, T, H, K, V, decay, dtype, device):
    """{name: tensor} of an op's inputs. q, k, v or x in `dtype`; gates, beta and states in fp32."""
    draw = torch.Generator(device).manual_seed(T)
    normal = lambda *shape: torch.randn(shape, generator=draw, device=device)
    uniform = lambda *shape: torch.rand(shape, generator=draw, device=device)
    if op == "causal_conv":
        inputs = dict(x=normal(B, T, K), kernel=normal(*((4, K) if decay == "static" else
                                                        (B, T, 4, K))), cache=normal(B, 3, K))
        return {name: x.to(dtype) for name, x in inputs.items()}
    if op == "gated_rms_norm":
        both = normal(B, T, 2 * H * K).to(dtype).chunk(2, -1)               # not contiguous
        x, gate = (half.unflatten(-1, (H, K)) for half in both)
        inputs = dict(x=x, weight=normal(K), gate=gate) if decay == "gated" else dict(x=x)
        return {name: x.to(dtype) if name != "weight" else x for name, x in inputs.items()}
    delta = op == "gated_delta_rule"
    g = -(20.0 if delta else 5.0) * uniform(B, T, H, *(() if delta else (K,)))
    g = {"strong": g, "mild": g / 100, "none": g * 0}[decay]
    inputs = dict(q=normal(B, T, H, K), k=F.normalize(normal(B, T, H, K), dim=-1),
                  v=normal(B, T, H, V), g=g)
    if delta:
        inputs["beta"] = uniform(B, T, H)
    inputs["state"] = normal(B, H, K, V)
    return {name: x.to(dtype) if name in "qkv" else x for name, x in inputs.items()}


def _outputs_and_grads(function, inputs, out_grads):
    """{"o", "state", "dq", ...} of function(*inputs)."""
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    outputs = function(*leaves)
    grads = torch.autograd.grad(outputs, leaves, [x.to(y) for x, y in zip(out_grads, outputs)])
    return dict(zip(("o", "state"), outputs)) | {"d" + name: x for name, x in zip(inputs, grads)}


@contextlib.contextmanager
def _poisoned():
    """New tensors hold NaN until they are written, so that a place no kernel writes is seen."""
    fill, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory, True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _check_case(op, shape, decay, dtype, device):
    """{tensor: (relative RMS error, relative maximum error)} of the kernels: outputs, gradients,
    and the results of the step."""
    inputs = _random_inputs(op, *shape, decay, dtype, device)
    exact = {name: x.double() for name, x in inputs.items()}
    if op in OPS:
        ours = functools.partial(globals()[op], backend="triton")
        loop = globals()[op + "_recurrent"]
    elif op == "causal_conv":
        ours, loop = (functools.partial(causal_conv, activation="silu", backend=backend)
                      for backend in ("triton", "torch"))
    else:
        ours, loop = (lambda *x, backend=backend: (gated_rms_norm(*x, backend=backend),)
                      for backend in ("triton", "torch"))
    # rounded once, to what the kernels return, so that both ways get the same gradients
    out_grads = [torch.randn_like(x, dtype=dtype if x.dtype == torch.float64 else x.dtype)
                 for x in ours(*inputs.values())]
    expected = _outputs_and_grads(loop, exact, out_grads)
    with _poisoned():
        results = _outputs_and_grads(ours, inputs, out_grads)
        if op in OPS:
            x = dict(inputs) if "beta" in inputs else {**inputs, "beta": None}
            o, state = recurrent_step(*(x[name] for name in ("q", "k", "v", "g", "beta", "state")),
                                      backend="triton")
            results |= {"step o": o, "step state": state}
            expected |= {"step o": expected["o"], "step state": expected["state"]}
    errors = {}
    for name, y in expected.items():
        difference = (results[name].double() - y).abs()
        errors[name] = ((difference.norm() / y.norm().clamp(min=1e-30)).item(),
                        (difference.max() / y.abs().max().clamp(min=1e-30)).item())
    return errors


def _check_cases(device):
    """(op, dtype, shape, decay) of all cases: the smaller head dims last."""
    on_gpu = device == "cuda"
    shapes = [(1, 65, 1, 24, 40), (1, 17, 3, 16, 16)]
    if on_gpu:
        shapes = [(2, 130, 3, 64, 64), (2, 515, 4, 96, 256), (1, 1000, 2, 128, 128),
                  (1, 140, 160, 128, 128), (1, 130, 2, 256, 256), (1, 130, 160, 64, 64), *shapes]
    for dtype in KERNEL_DTYPES if on_gpu else (torch.float32, torch.float16):
        for op in (*OPS, "causal_conv", "gated_rms_norm"):
            kinds = {"causal_conv": ("static", "per token"), "gated_rms_norm": ("gated", "plain")}
            for shape in shapes:
                for kind in kinds.get(op, ("strong", "mild", "none") if on_gpu else
                                      ("strong", "mild")):
                    yield op, dtype, shape, kind


def check(device):
    """Every op against its loop in fp64: a line per case, its name before it runs, so that a crash
    names it, and then the tensor nearest its tolerance. Returns how many tensors were checked and
    how many failed (NaN fails)."""
    checked = failures = 0
    for op, dtype, shape, decay in _check_cases(device):
        print(f"{op:24}{str(dtype)[6:]:10}{str(list(shape)):22}{decay:10}", end="", flush=True)
        default, special = TOLERANCES[dtype]
        rows = []
        for name, (rms, largest) in _check_case(op, shape, decay, dtype, device).items():
            tolerance = special.get(name, default)
            share = rms / tolerance if rms == rms else float("inf")
            rows.append((share, f"{name}: rms error {rms:.1e} of {tolerance:.0e}, "
                                f"max error {largest:.1e}"))
        failed = [line for share, line in rows if share > 1]
        print("FAILED " + "; ".join(failed) if failed else max(rows)[1], flush=True)
        checked, failures = checked + len(rows), failures + len(failed)
    return checked, failures


# -----------------------------------------------------------------------------
# python kernels.py on a GPU: the benchmark

GOALS = ((4, 2048, 16, 128), (8, 1024, 8, 64), (2, 16384, 16, 128), (1, 8192, 96, 128))  # B T H K=V


def cost(op, B, T, H, K, V, backward=False):
    """(bytes, FLOPs) of a call in bf16 with fp32 gates. Bytes: inputs read and outputs written
    once, the least there can be. FLOPs: the matrix products that the kernels do, with C = 64:
        delta, forwards   chunk 4CK + 20CC (the inverse)      scan 6KV + 4CV          per token
        GLA, forwards     chunk 6CK (3 levels)                scan 4KV + 2CV
        delta, backwards  scan 6KV + 4CV                      gradients 6KV + 4CV + 10CK
        GLA, backwards    scan 4KV + 2CV                      gradients 4KV + 2CV K/32 + 20CK
    JetBlock's convolution is left out: it counts as its delta rule."""
    delta, C, tokens = op != "gated_linear_attention", 64, B * T * H
    gates = 8 if delta else 4 * K
    memory, flops = 2 * (2 * K + 2 * V) + gates, (
        4 * C * K + 20 * C * C + 6 * K * V + 4 * C * V if delta else
        6 * C * K + 4 * K * V + 2 * C * V)
    if backward:
        memory += 2 * (4 * K + 3 * V) + 2 * gates
        flops += (12 * K * V + 8 * C * V + 10 * C * K if delta else
                  8 * K * V + 2 * C * V * (1 + K / 32) + 20 * C * K)
    return tokens * memory, tokens * flops


def measured_limits():
    """What this card reaches: GB/s of a large copy, read and write, and TFLOP/s of a large product
    in bf16."""
    from triton.testing import do_bench
    x = torch.empty(2 ** 30, dtype=torch.uint8, device="cuda")
    y, a = torch.empty_like(x), torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    copy = do_bench(lambda: y.copy_(x), return_mode="median")
    product = do_bench(lambda: a @ a, return_mode="median")
    return dict(gb_s=2 * x.numel() / copy / 1e6, tflop_s=2 * 8192 ** 3 / product / 1e9)


def _fla(op):
    """fla's chunkwise op and its step, which take what ours take; (None, None) without fla."""
    try:
        from fla.ops import gated_delta_rule, gla
    except ImportError:
        return None, None
    if op == OPS[0]:
        chunk, step, gate = (gated_delta_rule.chunk_gated_delta_rule,
                             gated_delta_rule.fused_recurrent_gated_delta_rule, "g")
    else:
        chunk, step, gate = gla.chunk_gla, gla.fused_recurrent_gla, "gk"

    def one_token(q, k, v, g, beta, state):
        gates = {gate: g} if beta is None else {gate: g, "beta": beta}
        return step(q, k, v, **gates, initial_state=state, output_final_state=True)
    return lambda *x: chunk(*x, output_final_state=True)[0], one_token


def _sequence_calls(op, B, T, H, K, V, backward):
    """{provider: call} of an op: ours, fla's if it is installed, the torch form, and the softmax
    attention that the op stands in for. "jet" is JetBlock's convolution and delta rule; fla has no
    convolution with a kernel per token, so its rule gets ours, and SiLU as an op of its own."""
    jet, bf16 = op == "jet", torch.bfloat16
    inputs = _random_inputs(OPS[0] if jet else op, B, T, H, K, V, "mild", bf16, "cuda")
    leaves = [inputs[name] for name in inputs if name != "state"]
    if jet:
        leaves.append(torch.randn(B, T, 4, H * V, device="cuda", dtype=bf16))
    rule, (fla, _) = globals()[OPS[0] if jet else op], _fla(OPS[0] if jet else op)
    ours = lambda *x: rule(*x, backend="triton")[0]

    def attention(q, k, v, *gates):
        return F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)

    def convolved(rule, activation):
        def run(q, k, v, g, beta, kernel):
            v, _ = causal_conv(v.flatten(2), kernel, None, activation, backend="triton")
            v = v if activation else F.silu(v)                              # [B,T,H*V]
            return rule(q, k, v.unflatten(2, (H, V)), g, beta)
        return run

    functions = {"ours": ours, "fla": fla, "sdpa": attention,
                 "torch": lambda *x: rule(*x, backend="torch")[0]}
    if jet:
        functions = {"ours": convolved(ours, "silu"), "fla": fla and convolved(fla, None)}
    functions = {name: function for name, function in functions.items() if function}
    if not backward:
        return {name: functools.partial(function, *leaves) for name, function in functions.items()}
    leaves, do = [x.requires_grad_() for x in leaves], torch.randn_like(leaves[2])
    both_ways = lambda function: torch.autograd.grad(function(*leaves), leaves, do,
                                                     allow_unused=True)     # attention's gates
    return {name: functools.partial(both_ways, function) for name, function in functions.items()}


def _decode_calls(op, B, T, H, K, V):
    """{provider: call} of one token: our step, fla's, and attention with a cache of T tokens. The
    steps take turns with eight states, more than fits the L2 cache, as the layers of a model do."""
    inputs = _random_inputs(op, B, 1, H, K, V, "mild", torch.bfloat16, "cuda")
    x, (_, fla) = [inputs.get(name) for name in ("q", "k", "v", "g", "beta")], _fla(op)
    states = itertools.cycle(torch.randn(8, B, H, K, V, device="cuda"))
    query = x[0].transpose(1, 2)
    keys, values = torch.randn(2, B, H, T, K, device="cuda", dtype=torch.bfloat16)
    calls = {"ours": lambda: recurrent_step(*x, next(states), inplace=True, backend="triton"),
             "sdpa": lambda: F.scaled_dot_product_attention(query, keys, values)}
    return calls | ({"fla": lambda: fla(*x, next(states))} if fla else {})


def _times(calls, timer):
    """{provider: [median, p20, p80] in ms}. The calls take turns, three times, so that a card that
    warms up treats all alike. NaN for what runs out of memory, or is not ours and fails."""
    rounds = {name: [] for name in calls}
    for _ in range(3):
        for name, call in calls.items():
            try:
                times = timer(call, quantiles=(0.5, 0.2, 0.8))
            except Exception as error:              # another's failure must not end a long run
                if name == "ours" and not isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
                torch.cuda.empty_cache()
                times = [float("nan")] * 3
            rounds[name].append(times)
    return {name: [sorted(column)[1] for column in zip(*x)] for name, x in rounds.items()}


def bench(section, op, direction, shape, limits):
    """A row per provider, {"section", ..., "ms", ...}, printed as they are measured. Ours also has
    its time over fla's and its shares of the card's copy and matrix rates. A decoded token is
    replayed from a CUDA graph: its launch from Python takes longer than the kernel."""
    from triton import testing
    decode, backward, (B, T, H, K, V) = direction == "step", "backward" in direction, shape
    calls = _decode_calls(op, *shape) if decode else _sequence_calls(op, *shape, backward)
    times = _times(calls, testing.do_bench_cudagraph if decode else testing.do_bench)
    size, flops = (8 * B * H * K * V, 0) if decode else cost(op, *shape, backward)
    rows = []
    for name, (ms, p20, p80) in times.items():
        row = dict(section=section, op=op, direction=direction, provider=name,
                   **dict(zip("BTHKV", shape)), ms=ms, p20=p20, p80=p80)
        if ms == ms and not decode:                                         # not NaN
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            calls[name]()
            row["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 2 ** 20
        if name == "ours":
            row |= dict(of_copy=size / ms / 1e6 / limits["gb_s"],
                        of_matrix=flops / ms / 1e9 / limits["tflop_s"],
                        of_fla=ms / times["fla"][0] if "fla" in times else None)
        print("  ".join(f"{x:.3g}" if isinstance(x, float) else f"{x}" for x in row.values()),
              flush=True)
        rows.append(row)
    return rows


def benchmark():
    """Measures the card, then times all sections. Returns the card's limits and the rows."""
    limits, both = measured_limits(), ("forward", "forward+backward")
    print(f"this card copies {limits['gb_s']:.0f} GB/s and multiplies {limits['tflop_s']:.0f} "
          "TFLOP/s in bf16\nsection, op, direction, provider, B, T, H, K, V, ms (median, p20, p80),"
          " peak MB; of ours also: share of copy, share of matmul, time over fla's")
    cases = [("goal", op, direction, (*shape, shape[-1]))
             for op in OPS for shape in GOALS for direction in both]
    cases += [("decode", op, "step", (8, T, 16, 128, 128))
              for op in OPS for T in (512, 4096, 32768, 65536)]
    cases += [("jet", "jet", "forward+backward", (4, 2048, 12, 96, 256))]   # Jet-Nemotron-2B's
    cases += [("sweep", op, direction, (max(1, 16384 // T), T, 16, D, D)) for op in OPS
              for D in (64, 128) for T in (2 ** i for i in range(9, 17)) for direction in both]
    return limits, [row for case in cases for row in bench(*case, limits)]


# -----------------------------------------------------------------------------
# The command line

def header(device):
    """Prints and returns what makes a number comparable: chip, driver, versions, commit."""
    import subprocess

    def said(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True,
                                  cwd=os.path.dirname(os.path.abspath(__file__))).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    info = dict(device="CPU, in Triton's interpreter", torch=torch.__version__,
                triton=triton.__version__, commit=said("git", "rev-parse", "--short", "HEAD"))
    if device == "cuda":
        from triton.backends.nvidia.compiler import get_ptxas
        chip = _capability(torch.device("cuda"))
        if chip == 9:
            _use_sound_ptxas()
        driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        info |= dict(device=torch.cuda.get_device_name(), driver=driver,
                     ptxas=get_ptxas(10 * chip).version)
    print(", ".join(f"{name} {x}" for name, x in info.items()))
    return info


def parse_args():
    import argparse
    parser = argparse.ArgumentParser(
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""Check the Triton kernels, then time them.

    python kernels.py                     on a GPU: check every op, forwards and backwards, against
                                          its loop in fp64, then the benchmark; on a CPU: the check
                                          alone, in Triton's interpreter
    python kernels.py --csv kernels.csv

Exit code 1 if a check fails, before anything is timed. The last line is one JSON object.""")
    parser.add_argument("--csv", help="also write the benchmark's rows to this file")
    parser.error = lambda message: parser.exit(2, f"kernels.py: {message} (see --help)\n")
    args = parser.parse_args()
    if triton is None:
        parser.error("triton is not installed, so there are no kernels to run: pip install triton")
    if args.csv and not os.path.isdir(os.path.dirname(args.csv) or "."):
        parser.error(f"there is no folder for {args.csv}")
    return args


def main():
    import csv
    import json
    args = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = header(device)
    result["auto"] = auto_backend(torch.empty(1, device=device), 64)
    print(f'backend "auto" selects: {result["auto"]} for tensors on this {device.upper()}')
    result["checked"], result["failures"] = check(device)
    if device == "cpu":
        print("No GPU here: the kernels are checked, nothing is timed.")
    elif not result["failures"]:
        result["limits"], rows = benchmark()
        result["of_fla"] = {f"{row['op']} {row['direction']} {[row[x] for x in 'BTHKV']}":
                            row["of_fla"] for row in rows if row.get("of_fla") is not None}
        if args.csv:
            with open(args.csv, "w", newline="") as file:
                names = dict.fromkeys(name for row in rows for name in row)
                writer = csv.DictWriter(file, list(names))
                writer.writeheader()
                writer.writerows(rows)
    print(json.dumps(result))
    sys.exit(result["failures"] > 0)


if __name__ == "__main__":
    main()
