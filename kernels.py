"""Linear attention with a gated state: the recurrences of three mixers, defined and made fast.

Each op starts with its definition, a loop over time (`*_recurrent`). The chunkwise form gives the
same numbers with matrix products, and the Triton kernels below compute that form. Sources: gated
linear attention (GLA) arXiv:2312.06635, the gated delta rule arXiv:2412.06464, JetBlock's
convolution with a kernel per token arXiv:2508.15884.

    B batch, T time, H heads, K key dim, V value dim, C chunk length, N number of chunks, W taps
    q, k [B,T,H,K], v and o [B,T,H,V]   as in attention; neither q nor k is normalised here
    g       log decay <= 0, applied before the update: [B,T,H] delta rule, [B,T,H,K] GLA, >= -5
    beta    [B,T,H] delta rule: the part of the old value under k_t that v_t replaces
    S       the state, [B,H,K,V], fp32 (fp64 for fp64 inputs): everything remembered of the past
    G       cumulative log decay inside a chunk, inclusive: G_t = g_first + ... + g_t

Arithmetic is fp64 for fp64 inputs, else fp32. The delta rule takes exp only of differences of G
that are <= 0, so nothing overflows and g may be -inf, which forgets everything. GLA has to split
such a difference into two factors; g >= -5 keeps them below exp(40), which fp32 holds.

    python kernels.py    check the kernels, then, on a GPU, time them (--help)

To copy: this file alone; it needs torch and, for the kernels, triton.
"""

from __future__ import annotations

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

def _check(q, k, v, g, beta, state):
    """Refuse shapes that broadcasting would accept and silently get wrong; no beta means GLA."""
    (B, T, H, K), V = q.shape, v.shape[-1]
    for name, x, shape in (("k", k, q.shape), ("v", v, (B, T, H, V)), ("beta", beta, (B, T, H)),
                           ("g", g, q.shape if beta is None else (B, T, H)),
                           ("initial_state", state, (B, H, K, V))):
        if x is not None and tuple(x.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(shape)} "
                             f"for q of shape {tuple(q.shape)}")
    if T == 0:
        raise ValueError("the sequence has no tokens")


def _compute_dtype(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _start_state(q, v, state):
    """The state before the first token, [B,H,K,V], in the arithmetic's dtype."""
    (B, _, H, K), dtype = q.shape, _compute_dtype(q)
    return q.new_zeros(B, H, K, v.shape[-1], dtype=dtype) if state is None else state.to(dtype)


def _to_chunks(x, tokens, C, dtype):
    """The given tokens of x [B,T,H,D] -> [n,B*H,C,D] contiguous. Zeros fill the last chunk, since a
    token with k, beta and g of 0 does not change the state."""
    x = x[:, tokens]
    B, T, H, D = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, -T % C)) if T % C else x
    x = x.reshape(B, -1, C, H, D).permute(1, 0, 3, 2, 4)                    # [n,B,H,C,D]
    return x.to(dtype).contiguous().flatten(1, 2)


def _from_chunks(x, B, T):
    """The inverse of _to_chunks: the first T tokens of x [n,B*H,C,D], as [B,T,H,D]."""
    x = x.unflatten(1, (B, -1)).permute(1, 0, 3, 2, 4)                      # [B,n,C,H,D]
    return x.flatten(1, 2)[:, :T]


def _groups(T, C, size):
    """Slices of the tokens, a few chunks each, so short that a tensor of `size` numbers per token
    stays in a CPU's cache. Larger temporaries cost more in memory traffic than in arithmetic."""
    step = C * max(1, 2 ** 18 // (size * C))
    return [slice(t, min(t + step, T)) for t in range(0, T, step)]


def _full_precision(function):
    """Disables torch.autocast inside the function, because it would round every product."""
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        device = next(x.device.type for x in (*args, *kwargs.values()) if torch.is_tensor(x))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)
    return wrapped


# -----------------------------------------------------------------------------
# The gated delta rule: forget, then correct what the state holds under the key

@_full_precision
def gated_delta_rule_recurrent(q, k, v, g, beta, initial_state=None):
    """The definition, token by token. Shapes and results as `gated_delta_rule`."""
    _check(q, k, v, g, beta, initial_state)
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
        # G in fp64: its differences stay exact to fp32 even behind a long stretch of strong decay.
        # g is clamped at a floor whose exp is 0, because -inf - -inf would be NaN.
        floor = -800.0 if dtype == torch.float64 else -128.0
        G = _to_chunks(g.unsqueeze(-1), tokens, C, torch.float64)
        G = G.clamp(min=floor).cumsum(-2)                                   # [n,B*H,C,1]
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
            o[:, tokens] = _from_chunks((q_in @ S[N:N + n]).add_(P @ U), B, o[:, tokens].shape[1])
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
            dk = (dP.mT @ qc).add_((dA + dA.mT) @ kc).addcmul_(dk_out, to_end)
            dk.addcmul_(dk_in, b * from_start)
            for x, out in zip((dq, dk, dR.mul_(b), dg.unsqueeze(-1), dbeta.unsqueeze(-1)), grads):
                out = out.view(B, T, H, -1)[:, tokens]
                out.copy_(_from_chunks(x, B, out.shape[1]))
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
    _check(q, k, v, g, beta, initial_state)
    if q.shape[1] <= 4 and not torch.is_grad_enabled():                     # decoding
        return recurrent_step(q, k, v, g, beta, initial_state, backend=backend)
    if _use_triton(backend, q, q.shape[-1], v.shape[-1], chunks=True):
        return _Kernels.apply(_chunk_kernels, q, k, v, g, beta, initial_state)
    return _DeltaRule.apply(q, k, v, g, beta, _start_state(q, v, initial_state))


# -----------------------------------------------------------------------------
# Gated linear attention: forget per key channel, then add

@_full_precision
def gated_linear_attention_recurrent(q, k, v, g, initial_state=None):
    """The definition, token by token. Shapes and results as `gated_linear_attention`."""
    _check(q, k, v, g, None, initial_state)
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
    return _from_chunks(o, B, T), S[-1].view(B, H, K, V)


@torch.compiler.disable
@_full_precision
def gated_linear_attention(q, k, v, g, initial_state=None, backend="auto"):
    """Gated linear attention, chunkwise: matrix products inside chunks, a short scan between them.

        S <- exp(g_t) . S + k_t v_t^T  (row by row);    o_t = K^-0.5 S^T q_t

    q, k, g [B,T,H,K], v [B,T,H,V], initial_state [B,H,K,V] or None for zeros. g >= -5 per token,
    as the kernels need: below it they clamp, because looking would make the host wait for the GPU;
    on a CPU a smaller g is a ValueError. Results and gradients as of gated_delta_rule.
    Equivalent to: gated_linear_attention_recurrent(q, k, v, g, initial_state)
    """
    _check(q, k, v, g, None, initial_state)
    use_triton = _use_triton(backend, q, q.shape[-1], v.shape[-1], chunks=True)
    if not use_triton and g.device.type == "cpu" and (g < -5).any():
        raise ValueError(f"g is {g.min().item():.3g} somewhere, below gated linear attention's "
                         "least log decay per token, -5: use g.clamp(min=-5)")
    if q.shape[1] <= 4 and not torch.is_grad_enabled():                     # decoding
        return recurrent_step(q, k, v, g, None, initial_state, backend=backend)
    if use_triton:
        return _Kernels.apply(_chunk_kernels, q, k, v, g, None, initial_state)
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
        y = _Kernels.apply(_conv_kernels, x.contiguous(), kernel.contiguous(), cache, activation)
        if T < W - 1:                                                       # some of the old tail
            x = F.pad(x, (0, 0, W - 1, 0)) if cache is None else torch.cat([cache, x], 1)
        return y, x[:, x.shape[1] - (W - 1):]
    cache = x.new_zeros(B, W - 1, D) if cache is None else cache.to(x.dtype)
    x = torch.cat([cache, x], 1)                                            # [B,W-1+T,D]
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
        return _Kernels.apply(_norm_kernels, x, weight, gate, eps, scale)
    dtype = _compute_dtype(x)
    wide = x.to(dtype)
    y = wide * (scale * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps))
    y = y if weight is None else y * weight.to(dtype)
    return (y if gate is None else y * F.silu(gate.to(dtype))).to(x.dtype)


# -----------------------------------------------------------------------------
# Triton: the same chunkwise forms on a GPU, two launches forwards and two backwards
#
#   chunk           a program per chunk and head computes everything that needs no state: P, the
#                   decays, (1 + A)^-1 for the delta rule, decayed q and k for GLA
#   scan            a program per head and BV value columns goes from chunk to chunk, with the state
#                   in registers, and writes o; backwards the same for dS, from the last chunk
#   gradients       a program per chunk (for GLA, and BK key channels) adds up the rest
#
# Letters besides the glossary: t, s row and column of a C x C matrix; bh = b * H + h; KP is K
# padded to a power of two, at least 16 for tl.dot; BK and BV are tiles of K and V. Padded rows and
# columns are loaded as zeros. Products take operands in the inputs' dtype and add up in fp32, but
# those that make the inverse, and GLA's P, take fp32 operands (multiplied as tf32): 16 bits are too
# few. GLA's gradients take bf16 operands for bf16 inputs, else fp32: fp16 could not hold exp(40).
# Offsets are int64, since they can exceed 2^31.

_jit = (lambda function: function) if triton is None else triton.jit
C = 64 if triton is None else tl.constexpr(64)      # rows of one wgmma of a Hopper warp group


@_jit
def _inside(rows, cols, num_rows, num_cols, first=None):
    inside = (rows[:, None] < num_rows) & (cols[None, :] < num_cols)
    return inside if first is None else inside & (rows[:, None] >= first)


@_jit
def _load(x, rows, cols, stride, num_rows, num_cols, first=None):
    """A tile of the matrix at x, whose rows lie `stride` apart; zeros outside the matrix. Rows can
    be negative if `first`, the least valid one, is given."""
    inside = _inside(rows, cols, num_rows, num_cols, first)
    return tl.load(x + rows[:, None] * stride + cols[None, :], mask=inside, other=0)


@_jit
def _store(x, tile, rows, cols, stride, num_rows, num_cols, first=None):
    inside, tile = _inside(rows, cols, num_rows, num_cols, first), tile.to(x.dtype.element_ty)
    tl.store(x + rows[:, None] * stride + cols[None, :], tile, mask=inside)


@_jit
def _vector(x, places, count, stride=1):
    """Numbers `stride` apart, zeros from the count-th on, in fp32."""
    return tl.load(x + places * stride, mask=places < count, other=0).to(tl.float32)


@_jit
def _chunk(index, T, H):
    """For chunk `index` of the B * H * N, ordered by head: the index as int64, the number of rows
    from its first to the end of the sequence, and the place of that row among the B * T * H."""
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
def _at_least(g, least):
    """A log decay of NaN must stay NaN: it must not become the strongest decay."""
    return tl.maximum(g.to(tl.float32), least, propagate_nan=tl.PropagateNan.ALL)


@_jit
def _at(x, index, rows):
    """The entry of a vector at one row."""
    return tl.sum(tl.where(rows == index, x, 0.0), 0)


@_jit
def _delta_decay(g, rows):
    """G as (whole, part), and D_ts = exp(G_t - G_s) for s <= t, else 0. The parts are exact or
    small, so that a difference of two rows keeps the weak decays behind a strong one, which a
    single fp32 sum would round away. Below -120 exp is 0, and unlike -inf, -120 - -120 is 0. D is
    masked before exp: above the diagonal it would overflow, and inf * 0 is NaN."""
    g = _at_least(g, -120.0)
    whole = tl.floor(g + 0.5)
    whole, part = tl.cumsum(whole, 0), tl.cumsum(g - whole, 0)
    difference = whole[:, None] - whole[None, :] + (part[:, None] - part[None, :])
    D = tl.exp(tl.where(rows[:, None] >= rows[None, :], difference, float("-inf")))
    return whole, part, D


@_jit
def _joined(rows, level):
    """Where row t and column s, s < t, sit in neighbouring blocks of 2^level rows that the next
    level joins into one. Every pair s < t is joined at exactly one level."""
    block = rows >> level
    return block[:, None] == tl.where(block & 1 == 0, block + 1, -1)[None, :]


@_jit
def _unit_inverse(A, rows):
    """(1 + A)^-1 for strictly lower A, by joining blocks: [[X, 0], [A, Y]]^-1 =
    [[X^-1, 0], [-Y^-1 A X^-1, Y^-1]]. Unlike in a Neumann series nothing large has to cancel."""
    inverse = tl.where(rows[:, None] == rows[None, :], 1.0, tl.where(_joined(rows, 0), -A, 0.0))
    for level in range(1, 6):                                               # 2^6 = C
        below = tl.dot(inverse, tl.where(_joined(rows, level), A, 0.0))
        inverse -= tl.dot(below, inverse)
    return inverse


@_jit
def _key_products(q, k, rows, left, H, K: tl.constexpr, BK: tl.constexpr):
    """Q K^T and K K^T of a chunk, [C,C], BK channels at a time."""
    qk = tl.zeros([C, C], tl.float32)
    kk = qk
    for start in range(0, K, BK):
        cols = start + tl.arange(0, BK)
        qc = _load(q, rows, cols, H * K, left, K)                           # [C,BK]
        kc = _load(k, rows, cols, H * K, left, K)
        qk = tl.dot(qc, tl.trans(kc), qk)
        kk = tl.dot(kc, tl.trans(kc), kk)
    return qk, kk


@_jit
def _delta_chunk(q, k, g, beta, P, inverse, decays, T, H, K: tl.constexpr, BK: tl.constexpr):
    """P = K^-0.5 Q K^T . D and (1 + A)^-1 with A = strictly lower (beta K K^T . D). Also three rows
    of decays, which the scan then only has to load: exp of G, of G - G_1 (the scan backwards
    multiplies by exp(G_1) last, because exp(G) may be too small for fp16), and of G_C - G."""
    chunk, left, token = _chunk(tl.program_id(0), T, H)
    rows = tl.arange(0, C)
    qk, kk = _key_products(q + token * K, k + token * K, rows, left, H, K, BK)
    whole, part, D = _delta_decay(_vector(g + token, rows, left, H), rows)
    b = _vector(beta + token, rows, left, H)
    decays += chunk * 3 * C + rows
    tl.store(decays, tl.exp(whole + part))
    tl.store(decays + C, tl.exp(whole - _at(whole, 0, rows) + (part - _at(part, 0, rows))))
    tl.store(decays + 2 * C,
             tl.exp(_at(whole, C - 1, rows) - whole + (_at(part, C - 1, rows) - part)))
    A = tl.where(rows[:, None] > rows[None, :], b[:, None] * kk * D, 0.0)
    _store(P + chunk * C * C, qk * D * K ** -0.5, rows, rows, C, C, C)
    _store(inverse + chunk * C * C, _unit_inverse(A, rows), rows, rows, C, C, C)


@_jit
def _halves_first():
    """GLA's order of a chunk's rows: the first 8 of every block of 16 rows, then the last 8. A tile
    of BK = 32 channels then gives each of four warps a block, and sums over it stay in the warp."""
    i = tl.arange(0, C)
    return i // 8 % (C // 16) * 16 + i // (C // 2) * 8 + i % 8


@_jit
def _channel_decay(g):
    """GLA: log2 of three decays, for rows in the order of _halves_first: from a block's middle to a
    row [C,BK], from the block's start to its middle, and from its middle to its end, both
    [C/16,BK]. With 8 rows on either side of the middle and g >= -5, no factor exceeds exp(40)."""
    g = _at_least(g, -5.0) * 1.4426950408889634                             # log2(e)
    halves = tl.reshape(g, [2, C // 16, 8, g.shape[1]])
    first = tl.arange(0, 2)[:, None, None] == 0
    sums = tl.sum(halves, 2)                                                # [2,C/16,BK]
    to_middle = tl.where(first, sums, 0.0)
    G = tl.cumsum(halves, 2) - to_middle[:, :, None, :]
    return tl.reshape(G, g.shape), tl.sum(to_middle, 0), tl.sum(tl.where(first, 0.0, sums), 0)


@_jit
def _scaled(x, factor):
    """x [C,BK] times the row of factor [C/16,BK] that belongs to its block."""
    y = tl.reshape(x, [2, C // 16, 8, x.shape[1]]) * factor[None, :, None, :]
    return tl.reshape(y, x.shape)


@_jit
def _join(total):
    """Joins neighbouring blocks two by two. `total` [n,BK] is log2 of each block's decay. Returns,
    for each block of 16 rows, what queries of a later block gain, the decay of the earlier one, and
    keys of an earlier block, that of the later one, both [C/16,BK]; and log2 of each pair's decay,
    [n/2,BK]."""
    pairs: tl.constexpr = total.shape[0] // 2
    BK: tl.constexpr = total.shape[1]
    pair = tl.reshape(total, [pairs, 2, BK])
    both = tl.sum(pair, 1)
    other = tl.exp2(both[:, None, :] - pair)
    late = tl.arange(0, 2)[None, :, None] == 1
    for_q, for_k = tl.where(late, other, 1.0), tl.where(late, 1.0, other)
    shape: tl.constexpr = [pairs, 2, C // (32 * pairs), BK]
    for_q = tl.reshape(tl.broadcast_to(for_q[:, :, None, :], shape), [C // 16, BK])
    for_k = tl.reshape(tl.broadcast_to(for_k[:, :, None, :], shape), [C // 16, BK])
    return for_q, for_k, both


@_jit
def _gla_chunk(q, k, g, P, q_in, k_out, decays, T, H, K: tl.constexpr, BK: tl.constexpr):
    """What the scan needs: q_in = K^-0.5 exp(G) . Q, k_out = exp(G_C - G) . K, exp(G_C), and P_ts =
    K^-0.5 sum_d q_td k_sd exp(G_td - G_sd). The decay in P differs by channel, so it has to be
    split into a factor for q and one for k: inside blocks of 16 rows at the middle row, and
    between blocks, joined two by two, at the border, where both factors are <= 1."""
    chunk, left, token = _chunk(tl.program_id(0), T, H)
    rows, stride, token = _halves_first(), H * K, token * K
    P16 = tl.zeros([C, C], tl.float32)
    P32, P64 = P16, P16
    for start in range(0, K, BK):
        cols = start + tl.arange(0, BK)
        G, middle, total = _channel_decay(_load(g + token, rows, cols, stride, left, K))
        qc = _load(q + token, rows, cols, stride, left, K).to(tl.float32) * tl.exp2(G)  # [C,BK]
        kc = _load(k + token, rows, cols, stride, left, K).to(tl.float32) * tl.exp2(-G)
        P16 = tl.dot(qc, tl.trans(kc), P16)
        qc, kc, total = _scaled(qc, tl.exp2(middle)), _scaled(kc, tl.exp2(total)), middle + total
        P32 = tl.dot(qc, tl.trans(kc), P32)
        for_q, for_k, total = _join(total)
        qc, kc = _scaled(qc, for_q), _scaled(kc, for_k)
        P64 = tl.dot(qc, tl.trans(kc), P64)
        for_q, for_k, total = _join(total)
        qc, kc = _scaled(qc, for_q), _scaled(kc, for_k)
        _store(q_in + token, qc * K ** -0.5, rows, cols, stride, left, K)
        _store(k_out + token, kc, rows, cols, stride, left, K)
        tl.store(decays + chunk * K + cols, tl.exp2(tl.sum(total, 0)), mask=cols < K)
    t, s = rows[:, None], rows[None, :]
    Pc = tl.where((t >> 4 == s >> 4) & (t >= s), P16, tl.where(_joined(rows, 4), P32, 0.0))
    Pc = tl.where(_joined(rows, 5), P64, Pc)
    _store(P + chunk * C * C, Pc * K ** -0.5, rows, rows, C, C, C)


@_jit
def _scan(q, k, v, decays, beta, P, inverse, start, o, U, S, end, T, H, K: tl.constexpr,
          V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr):
    """The state and its outputs; for the backward pass also S at the chunks' starts, and U. For GLA
    q and k are q_in and k_out of _gla_chunk, and V stands for U. A program owns BV
    columns of the state and all its K rows: columns do not depend on each other."""
    bh, cols = _columns(V, BV)
    rows, keys, num_chunks = tl.arange(0, C), tl.arange(0, KP), tl.cdiv(T, C)
    state = tl.zeros([KP, BV], tl.float32) if start is None else _load(
        start + bh * K * V, keys, cols, V, K, V)
    chunk, left, token = _chunk(bh * num_chunks, T, H)
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
            b = _vector(beta + token, rows, left, H)
            R = b[:, None] * (vc.to(tl.float32) - from_start[:, None] * tl.dot(kc, S0))
            X = _load(inverse + chunk * C * C, rows, rows, C, C, C)
            u = tl.dot(X, R.to(X.dtype))
            if U is not None:
                _store(U + token * V, u, rows, cols, H * V, left, V)
            out = (from_start * K ** -0.5)[:, None] * tl.dot(qc, S0)
            vc, u_out = u.to(vc.dtype), (to_end[:, None] * u).to(vc.dtype)
            state = tl.dot(tl.trans(kc), u_out, decay * state)
        else:
            decay = _vector(decays + chunk * K, keys, K)
            out = tl.dot(qc, S0)
            state = tl.dot(tl.trans(kc), vc, decay[:, None] * state)
        out = tl.dot(_load(P + chunk * C * C, rows, rows, C, C, C), vc, out)
        _store(o + token * V, out, rows, cols, H * V, left, V)
        chunk, left, token = chunk + 1, left - C, token + C * H
    _store(end + bh * K * V, state, keys, cols, V, K, V)


@_jit
def _scan_backward(q, k, decays, beta, P, inverse, do, dend, dU, dS, dstart, T, H, K: tl.constexpr,
                   V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr):
    """The gradient of the state, from the last chunk to the first; dS of a chunk belongs to the
    state after it. Also dU: the gradient of R for the delta rule, of V for GLA. q and k are as in
    _scan."""
    bh, cols = _columns(V, BV)
    rows, keys, num_chunks = tl.arange(0, C), tl.arange(0, KP), tl.cdiv(T, C)
    dstate = tl.zeros([KP, BV], tl.float32) if dend is None else _load(
        dend + bh * K * V, keys, cols, V, K, V)
    chunk, left, token = _chunk((bh + 1) * num_chunks - 1, T, H)
    for _ in range(num_chunks):
        qc = _load(q + token * K, rows, keys, H * K, left, K)               # [C,KP]
        kc = _load(k + token * K, rows, keys, H * K, left, K)
        doc = _load(do + token * V, rows, cols, H * V, left, V)             # [C,BV]
        _store(dS + chunk * K * V, dstate, keys, cols, V, K, V)
        dS1 = dstate.to(q.dtype.element_ty)
        du = tl.dot(tl.trans(_load(P + chunk * C * C, rows, rows, C, C, C)), doc)
        if DELTA:
            row_decays = decays + chunk * 3 * C
            from_first, to_end = tl.load(row_decays + C + rows), tl.load(row_decays + 2 * C + rows)
            first, last = tl.load(row_decays), tl.load(row_decays + 2 * C - 1)
            b = _vector(beta + token, rows, left, H)
            du += to_end[:, None] * tl.dot(kc, dS1)
            X = _load(inverse + chunk * C * C, rows, rows, C, C, C)
            du = tl.dot(tl.trans(X), du.to(X.dtype))                        # from here on, dR
            do_in = (doc.to(tl.float32) * (from_first * K ** -0.5)[:, None]).to(doc.dtype)
            du_in = (du * -(b * from_first)[:, None]).to(doc.dtype)
            dstate = tl.dot(tl.trans(qc), do_in, last * dstate)
            dstate = first * tl.dot(tl.trans(kc), du_in, dstate)
        else:
            decay = _vector(decays + chunk * K, keys, K)
            du += tl.dot(kc, dS1)
            dstate = tl.dot(tl.trans(qc), doc, decay[:, None] * dstate)
        _store(dU + token * V, du, rows, cols, H * V, left, V)
        chunk, left, token = chunk - 1, left + C, token - C * H
    if dstart is not None:
        _store(dstart + bh * K * V, dstate, keys, cols, V, K, V)


@_jit
def _delta_gradients(q, k, v, g, beta, decays, do, U, dR, S, dS, dq, dk, dv, dg, dbeta, T, H,
                     K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Gradients of a chunk's inputs, by the formulas of _DeltaRule.backward, which also explains
    why the sums for dg skip the diagonal."""
    chunk, left, token = _chunk(tl.program_id(0), T, H)
    q, k, dq, dk = q + token * K, k + token * K, dq + token * K, dk + token * K
    v, do, U, dR, dv = v + token * V, do + token * V, U + token * V, dR + token * V, dv + token * V
    S, dS, decays = S + chunk * K * V, dS + chunk * K * V, decays + chunk * 3 * C
    rows = tl.arange(0, C)
    from_start, to_end = tl.load(decays + rows), tl.load(decays + 2 * C + rows)
    b = _vector(beta + token, rows, left, H)
    # pairs of rows; P and A are computed anew in fp32, because rounded they would spoil dG
    dP, dA = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    db = tl.zeros([C], tl.float32)
    for start in range(0, V, BV):
        cols = start + tl.arange(0, BV)
        uc = _load(U, rows, cols, H * V, left, V)                           # [C,BV]
        dRc = _load(dR, rows, cols, H * V, left, V)
        dP = tl.dot(_load(do, rows, cols, H * V, left, V), tl.trans(uc), dP)
        dA = tl.dot(dRc, tl.trans(uc), dA)                                  # of -A
        dRc = dRc.to(tl.float32)
        db += tl.sum(dRc * _load(v, rows, cols, H * V, left, V).to(tl.float32), 1)
        _store(dv, b[:, None] * dRc, rows, cols, H * V, left, V)
    qk, kk = _key_products(q, k, rows, left, H, K, BK)
    _, _, D = _delta_decay(_vector(g + token, rows, left, H), rows)
    below = rows[:, None] > rows[None, :]
    dP = dP * D * K ** -0.5
    dA = tl.where(below, -dA * D, 0.0)
    db += tl.sum(dA * kk, 1)
    dA *= b[:, None]
    pairs = tl.where(below, dP * qk + dA * kk, 0.0)
    dG = tl.sum(pairs, 1) - tl.sum(tl.trans(pairs), 1)
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
            dqc = tl.dot(doc, tl.trans(S0), dqc)
            dRc = _load(dR, rows, cols, H * V, left, V)
            dk_in = tl.dot(dRc, tl.trans(S0), dk_in)                        # of -k_in
            uc = _load(U, rows, cols, H * V, left, V)
            dk_out = tl.dot(uc, tl.trans(dS1), dk_out)
        qc = _load(q, rows, keys, H * K, left, K)                           # [C,BK]
        kc = _load(k, rows, keys, H * K, left, K)
        dqc *= (from_start * K ** -0.5)[:, None]
        dG += tl.sum(dqc * qc.to(tl.float32), 1)
        in_sum -= tl.sum(dk_in * kc.to(tl.float32), 1)
        out_sum += tl.sum(dk_out * kc.to(tl.float32), 1)
        dqc = tl.dot(dP, kc, dqc)
        dkc = dk_out * to_end[:, None] - dk_in * (b * from_start)[:, None]
        dkc = tl.dot(tl.trans(dP), qc, dkc)
        dkc = tl.dot(dA, kc, dkc)
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
                   V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Gradients of a chunk's q, k and g for BK channels. dq and dk come from three levels of pairs
    of rows, as P does, and from the state. dG = q . dq - k . dk sums to dg from each row on."""
    blocks, rows, stride = tl.cdiv(K, BK), _halves_first(), H * K
    chunk, left, token = _chunk(tl.program_id(0) // blocks, T, H)
    keys = tl.program_id(0) % blocks * BK + tl.arange(0, BK)
    t, s = rows[:, None], rows[None, :]
    v, do, S, dS = v + token * V, do + token * V, S + chunk * K * V, dS + chunk * K * V
    operand = tl.bfloat16 if q.dtype.element_ty == tl.bfloat16 else tl.float32
    dP = tl.zeros([C, C], tl.float32)
    for start in range(0, V, BV):
        cols = start + tl.arange(0, BV)
        doc = _load(do, rows, cols, H * V, left, V)                         # [C,BV]
        dP = tl.dot(doc, tl.trans(_load(v, rows, cols, H * V, left, V)), dP)
    dP = (dP * K ** -0.5).to(operand)
    qc = _load(q + token * K, rows, keys, stride, left, K)                  # [C,BK]
    kc = _load(k + token * K, rows, keys, stride, left, K)
    G, middle, total = _channel_decay(_load(g + token * K, rows, keys, stride, left, K))
    from_middle, to_middle = tl.exp2(G), tl.exp2(-G)
    qs, ks = qc.to(tl.float32) * from_middle, kc.to(tl.float32) * to_middle
    pairs = tl.where((t >> 4 == s >> 4) & (t > s), dP, 0.0)
    dqc = tl.dot(pairs, ks.to(operand))
    dkc = tl.dot(tl.trans(pairs), qs.to(operand))
    for_q, for_k, total = tl.exp2(middle), tl.exp2(total), middle + total
    from_start, to_end = for_q, for_k
    for level in tl.static_range(4, 6):
        qs, ks = _scaled(qs, for_q), _scaled(ks, for_k)
        pairs = tl.where(_joined(rows, level), dP, 0.0)
        dqc += _scaled(tl.dot(pairs, ks.to(operand)), from_start)
        dkc += _scaled(tl.dot(tl.trans(pairs), qs.to(operand)), to_end)
        for_q, for_k, total = _join(total)
        from_start, to_end = from_start * for_q, to_end * for_k
    # the state
    kept = tl.zeros([BK], tl.float32)                                       # <dS, S> per channel
    dq_in, dk_out = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    for start in range(0, V, BV):
        cols = start + tl.arange(0, BV)
        S0 = _load(S, keys, cols, V, K, V)                                  # [BK,BV]
        dS1 = _load(dS, keys, cols, V, K, V)
        kept += tl.sum(S0.to(tl.float32) * dS1.to(tl.float32), 1)
        dq_in = tl.dot(_load(do, rows, cols, H * V, left, V), tl.trans(S0), dq_in)
        dk_out = tl.dot(_load(v, rows, cols, H * V, left, V), tl.trans(dS1), dk_out)
    dqc += _scaled(dq_in, from_start * K ** -0.5)
    dk_out = _scaled(dk_out, to_end)
    # dg skips the diagonal; the decay from a row to the chunk's end adds to the g of later rows
    dqc, dkc, dk_out = dqc * from_middle, dkc * to_middle, dk_out * to_middle
    dG, out_sum = (qc * dqc - kc * dkc).to(operand), (kc * dk_out).to(operand)
    dgc = tl.dot(tl.where(t <= s, 1.0, 0.0).to(operand), dG)
    dgc = tl.dot(tl.where(t > s, 1.0, 0.0).to(operand), out_sum, dgc)
    dgc += (_vector(decays + chunk * K, keys, K) * kept)[None, :]
    diagonal = tl.where(t == s, dP, 0.0)
    dqc = tl.dot(diagonal, kc.to(operand), dqc)
    dkc = tl.dot(diagonal, qc.to(operand), dkc + dk_out)
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
    state = tl.zeros([KP, BV], tl.float32) if start is None else _load(
        start + bh * K * V, keys, cols, V, K, V)
    for _ in range(T):
        qt, kt = _vector(q + token * K, keys, K), _vector(k + token * K, keys, K)   # [KP]
        vt = _vector(v + token * V, cols, V)                                # [BV]
        if DELTA:
            state *= tl.exp(tl.load(g + token).to(tl.float32))
            b = tl.load(beta + token).to(tl.float32)
            vt = b * (vt - tl.sum(kt[:, None] * state, 0))
        else:
            state *= tl.exp(_at_least(_vector(g + token * K, keys, K), -5.0))[:, None]
        state += kt[:, None] * vt[None, :]
        ot = tl.sum(qt[:, None] * state, 0) * K ** -0.5
        tl.store(o + token * V + cols, ot.to(o.dtype.element_ty), mask=cols < V)
        token += H
    _store(end + bh * K * V, state, keys, cols, V, K, V)


@_jit
def _conv_input(x, cache, rows, cols, T, D, W: tl.constexpr):
    """Rows of the convolution's input, fp32: x, and before it the cache or zeros."""
    tile = _load(x, rows, cols, D, T, D, first=0).to(tl.float32)
    if cache is not None:
        tile += _load(cache + (W - 1) * D, rows, cols, D, 0, D, first=1 - W).to(tl.float32)
    return tile


@_jit
def _conv_tap(kernel, w, rows, cols, T, D, W: tl.constexpr, PER_TOKEN: tl.constexpr):
    """kernel_w of the given rows [BT,BD], or of all rows [1,BD]."""
    if PER_TOKEN:
        return _load(kernel + w * D, rows, cols, W * D, T, D, first=0).to(tl.float32)
    else:
        return _vector(kernel + w * D, cols, D)[None, :]


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
    """A program owns BT tokens of BD channels. Neighbouring taps read overlapping rows, which then
    come from the L1 cache."""
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
    """A program owns BT rows of the input; the first W - 1 of all are the cache's. A row's gradient
    needs dz of the W outputs that saw it. Computing z anew, W times in all, costs reads from L1 and
    spares a second launch and a tensor. The gradient of a static kernel is summed over BT rows
    here and over programs by the caller."""
    b, block = tl.program_id(2).to(tl.int64), tl.program_id(0).to(tl.int64)
    rows = block * BT - (W - 1) + tl.arange(0, BT)
    cols = tl.program_id(1) * BD + tl.arange(0, BD)
    x, dy, dx = x + b * T * D, dy + b * T * D, dx + b * T * D
    if PER_TOKEN:
        kernel, dkernel = kernel + b * T * W * D, dkernel + b * T * W * D
    if cache is not None:
        cache, dcache = cache + b * (W - 1) * D, dcache + b * (W - 1) * D
    dxc = tl.zeros([BT, BD], tl.float32)
    dz = dxc
    for w in tl.static_range(W):                        # for the last tap, t and rows are the same
        t = rows + (W - 1) - w
        dz = _load(dy, t, cols, D, T, D, first=0).to(tl.float32)
        if SILU:
            z = _conv_rows(x, kernel, cache, t, cols, T, D, W, PER_TOKEN)
            gate = tl.sigmoid(z)
            dz *= gate * (1 + z * (1 - gate))
        dxc += dz * _conv_tap(kernel, w, t, cols, T, D, W, PER_TOKEN)
    _store(dx, dxc, rows, cols, D, T, D, first=0)
    if cache is not None:
        _store(dcache + (W - 1) * D, dxc, rows, cols, D, 0, D)
    for w in tl.static_range(W):
        dtap = dz * _conv_input(x, cache, rows - (W - 1) + w, cols, T, D, W)
        if PER_TOKEN:
            _store(dkernel + w * D, dtap, rows, cols, W * D, T, D, first=0)
        else:
            partial = (b * tl.num_programs(0) + block) * W + w
            tl.store(dkernel + partial * D + cols, tl.sum(dtap, 0), mask=cols < D)


@_jit
def _norm_rows(x, rows, cols, stride, H, N, D):
    """Rows (b, t, h) of x [B,T,H,D], whose tokens lie `stride` apart. fp32."""
    place, inside = rows // H * stride + rows % H * D, _inside(rows, cols, N, D)
    return tl.load(x + place[:, None] + cols[None, :], mask=inside, other=0).to(tl.float32)


@_jit
def _norm(x, weight, gate, y, x_stride, gate_stride, H, N, scale, eps, D: tl.constexpr,
          BD: tl.constexpr, BN: tl.constexpr):
    """A program owns BN of the N = B * T * H rows."""
    rows, cols = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN), tl.arange(0, BD)
    xc = _norm_rows(x, rows, cols, x_stride, H, N, D)                       # [BN,BD]
    z = xc * (scale * tl.rsqrt(tl.sum(xc * xc, 1) / D + eps))[:, None]
    if weight is not None:
        z *= _vector(weight, cols, D)[None, :]
    if gate is not None:
        gc = _norm_rows(gate, rows, cols, gate_stride, H, N, D)
        z *= gc * tl.sigmoid(gc)
    _store(y, z, rows, cols, D, N, D)


@_jit
def _norm_backward(x, weight, gate, dy, dx, dweight, dgate, x_stride, gate_stride, H, N, scale, eps,
                   D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    """Gradients for BN rows; the caller sums the gradient of the weight over programs."""
    rows, cols = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN), tl.arange(0, BD)
    xc = _norm_rows(x, rows, cols, x_stride, H, N, D)                       # [BN,BD]
    dz = _load(dy, rows, cols, D, N, D).to(tl.float32) * scale
    inverse = tl.rsqrt(tl.sum(xc * xc, 1) / D + eps)[:, None]
    normed, w = xc * inverse, 1.0
    if weight is not None:
        w = _vector(weight, cols, D)[None, :]
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

KERNEL_DTYPES = torch.float32, torch.float16, torch.bfloat16


@functools.cache
def _capability(device):
    """8 is Ampere, 9 is Hopper, 0 a CPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _use_triton(backend, x, *dims, chunks=False):
    """Whether to launch kernels for x with these head dims, decided here only. "auto" does so on
    NVIDIA GPUs from Ampere on, if a kernel takes x. "triton" raises ValueError if none does. The
    kernels of chunkwise ops multiply on tensor cores, so fp32 on a GPU uses the torch form."""
    dtypes = KERNEL_DTYPES[1:] if chunks and x.is_cuda else KERNEL_DTYPES
    refusal = ("triton is not installed: pip install triton" if triton is None else
               "the inputs are not on a GPU; to run the kernels on a CPU, slowly, set "
               "TRITON_INTERPRET=1 before this file is imported"
               if not (x.is_cuda or _INTERPRETED) else
               f"the kernels take {', '.join(map(str, dtypes))}, not {x.dtype}"
               if x.dtype not in dtypes else
               f"the kernels take head dims up to 256, not {max(dims)}"
               if max(dims, default=0) > 256 else None)
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend is {backend!r}, expected 'auto', 'torch' or 'triton'")
    if backend == "triton" and refusal:
        raise ValueError(f"backend is 'triton', but {refusal}")
    nvidia = x.is_cuda and torch.version.hip is None and _capability(x.device) >= 8
    return backend == "triton" or backend == "auto" and nvidia and not refusal


@functools.cache
def _use_sound_ptxas():
    """Makes Triton assemble for Hopper with the ptxas 13.1 that its package has for Blackwell. With
    its usual one, 12.8, gradients of the delta rule were wrong or read foreign memory on an H200
    (bf16, head dims 24 and 40); with 13.1 every check passes. RuntimeError if there is none."""
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
    return max(16, triton.next_power_of_2(dim))


def _config(q, V, delta):
    """{kernel: tile sizes and launch options}, the fastest of those timed on an H200 for Hopper
    (figures/h200_launches.csv), a guess for others. A test shows without a GPU that nothing spills
    and that shared memory fits. There is no autotuner, so no run waits for one."""
    (B, _, H, K), bf16 = q.shape, q.dtype == torch.bfloat16
    KP, VP = _padded(K), _padded(V)
    if _capability(q.device) == 9:
        # The scan mostly waits for memory, so it has as many stages as fit 227 KB. GLA needs fewer
        # registers and takes 64 columns where that leaves a program per processor.
        wide = not delta and 64 < KP <= 128 and B * H * triton.cdiv(V, 64) >= 128
        scan, stages = (64 if wide else 32, 8 if KP > 128 else 4), 2 if KP > 128 else 3
        # GLA's warps own a block of 16 rows each; 4 of them run fewer instructions than 8. In fp16
        # the operands are tf32, twice the registers, so 8 warps; but not for narrow keys, because
        # products 8 columns wide per warp group (m64n8k8) are suspected to fault.
        gradients = (32, 64, 8 if V % 64 else 4) if delta else (
            32, 32, 4 if bf16 or KP == 16 else 8)
    else:
        # mma.sync keeps its operands in registers, so tiles are smaller, and K = 256 leaves none
        # for a second stage. Everything fits the 99 KB of consumer cards, too.
        scan, stages = (16 if KP > 128 else 32, 4 if KP <= 64 else 8), 1 if KP > 128 else 2
        gradients = (32 if delta or bf16 and VP > 32 else 16, 32, 8)
    scan = dict(K=K, V=V, KP=KP, BV=min(scan[0], VP), DELTA=delta, num_warps=scan[1])
    return {"chunk": dict(K=K, BK=min(64 if delta else 32, KP), num_warps=4, num_stages=2),
            "scan": scan | dict(num_stages=stages),
            "scan_backward": scan | dict(num_stages=min(stages, 2 if delta and KP > 64 else 3)),
            "gradients": dict(K=K, V=V, BK=min(gradients[0], KP), BV=min(gradients[1], VP),
                              num_warps=gradients[2], num_stages=2)}


class _Kernels(torch.autograd.Function):
    """launches(*inputs) returns the outputs, the tensors that the backward pass needs, and a
    function of those tensors and of the outputs' gradients that returns the inputs' gradients."""

    @staticmethod
    def forward(ctx, launches, *inputs):
        outputs, saved, ctx.gradients = launches(*inputs)
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)            # the gradient of an unused final state is None
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        return None, *ctx.gradients(ctx.saved_tensors, *grads)


def _chunk_kernels(q, k, v, g, beta, state):
    """The launches of both chunkwise forms; beta is None for GLA. If an input needs a gradient,
    stores what the backward pass needs, one state per chunk included."""
    (B, T, H, K), V, delta, rows, dtype = q.shape, v.shape[-1], beta is not None, C.value, v.dtype
    save = any(x is not None and x.requires_grad for x in (q, k, v, g, beta, state))
    q, k, v, g, beta, state = (x if x is None else x.contiguous() for x in (
        q, k.to(q.dtype), v.to(q.dtype), g, beta, state if state is None else state.float()))
    config = _config(q, V, delta)
    fp32 = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    N, programs = B * H * triton.cdiv(T, rows), B * H * triton.cdiv(V, config["scan"]["BV"])
    P, inverse, qs, ks = q.new_empty(N, rows, rows), None, q, k
    if delta:
        inverse, decays = torch.empty_like(P), fp32(N, 3, rows)
        _launch(_delta_chunk, (N,), q, k, g, beta, P, inverse, decays, T, H, **config["chunk"])
    else:
        qs, ks, decays = torch.empty_like(q), torch.empty_like(k), fp32(N, K)
        _launch(_gla_chunk, (N,), q, k, g, P, qs, ks, decays, T, H, **config["chunk"])
    o, end, has_state = torch.empty_like(v), fp32(B, H, K, V), state is not None
    S, U = q.new_empty(N, K, V) if save else None, torch.empty_like(v) if save and delta else None
    _launch(_scan, (programs,), qs, ks, v, decays, beta, P, inverse, state, o, U, S, end, T, H,
            **config["scan"])

    def gradients(saved, do, dend):
        q, k, v, g, beta, qs, ks, decays, P, inverse, S, U = saved
        do = torch.zeros_like(v) if do is None else do.to(v.dtype).contiguous()
        dend = None if dend is None else dend.contiguous()
        dstart = fp32(B, H, K, V) if has_state else None
        dU, dS = torch.empty_like(v), torch.empty_like(S)
        _launch(_scan_backward, (programs,), qs, ks, decays, beta, P, inverse, do, dend, dU, dS,
                dstart, T, H, **config["scan_backward"])
        dq, dk, dg = (torch.empty_like(x) for x in (q, k, g))
        if delta:
            dv, dbeta = torch.empty_like(v), torch.empty_like(beta)
            _launch(_delta_gradients, (N,), q, k, v, g, beta, decays, do, U, dU, S, dS,
                    dq, dk, dv, dg, dbeta, T, H, **config["gradients"])
        else:
            dv, dbeta, blocks = dU, None, triton.cdiv(K, config["gradients"]["BK"])
            _launch(_gla_gradients, (N * blocks,), q, k, v, g, decays, do, S, dS, dq, dk, dg, T, H,
                    **config["gradients"])
        return dq, dk, dv, dg, dbeta, dstart

    saved = (q, k, v, g, beta, qs, ks, decays, P, inverse, S, U) if save else ()
    return (o.to(dtype), end), saved, gradients


def _conv_kernels(x, kernel, cache, activation):
    """The launches of causal_conv, all contiguous. Tiles are 32 tokens of 128 bytes. Backwards only
    one program fits a multiprocessor's registers, so it has 16 warps to hide memory's latency."""
    (B, T, D), W, per_token, y = x.shape, kernel.shape[-2], kernel.dim() == 4, torch.empty_like(x)
    constants = dict(W=W, PER_TOKEN=per_token, SILU=activation is not None, BT=32,
                     BD=128 // x.element_size())
    tiles = triton.cdiv(D, constants["BD"]), B
    _launch(_conv, (triton.cdiv(T, 32), *tiles), x, kernel, cache, y, T, D, **constants,
            num_warps=4)

    def gradients(saved, dy):
        x, kernel, cache = saved
        blocks, dx = triton.cdiv(T + W - 1, 32), torch.empty_like(x)
        dcache = None if cache is None else torch.empty_like(cache)
        dkernel = (torch.empty_like(kernel) if per_token else
                   x.new_empty(B * blocks, W, D, dtype=torch.float32))
        _launch(_conv_backward, (blocks, *tiles), x, kernel, cache, dy.contiguous(), dx, dkernel,
                dcache, T, D, **constants, num_warps=16)
        return dx, dkernel if per_token else dkernel.sum(0).to(kernel.dtype), dcache, None

    return y, (x, kernel, cache), gradients


def _head_rows(x):
    """x [B,T,H,D] and the distance between its tokens; a copy unless heads are side by side and
    tokens evenly spaced, as in a slice of a projection. (None, 0) for None."""
    if x is None:
        return None, 0
    B, T, H, D = x.shape
    if x.stride()[2:] != (D, 1) or B > 1 and x.stride(0) != T * x.stride(1):
        x = x.contiguous()
    return x, x.stride(1) if T > 1 else x.stride(0)


def _norm_kernels(x, weight, gate, eps, scale):
    """The launches of gated_rms_norm."""
    (x, x_stride), (gate, gate_stride) = _head_rows(x), _head_rows(gate)
    (B, T, H, D), y, BD = x.shape, x.new_empty(x.shape), _padded(x.shape[-1])
    numbers = x_stride, gate_stride, H, B * T * H, scale, eps
    constants = dict(D=D, BD=BD, BN=max(1, 4096 // BD), num_warps=4)
    programs = triton.cdiv(B * T * H, constants["BN"])
    _launch(_norm, (programs,), x, weight, gate, y, *numbers, **constants)

    def gradients(saved, dy):
        x, weight, gate = saved
        dx, dgate = x.new_empty(x.shape), None if gate is None else gate.new_empty(gate.shape)
        dweight = None if weight is None else x.new_empty(programs, D, dtype=torch.float32)
        _launch(_norm_backward, (programs,), x, weight, gate, dy.contiguous(), dx, dweight, dgate,
                *numbers, **constants)
        return dx, None if weight is None else dweight.sum(0).to(weight.dtype), dgate, None, None

    return y, (x, weight, gate), gradients


@torch.compiler.disable
def recurrent_step(q, k, v, g, beta=None, initial_state=None, inplace=False, backend="auto"):
    """A few tokens of decoding, without gradients: the delta rule, or GLA where beta is None.

    Shapes and results as `gated_delta_rule` and `gated_linear_attention`. With `inplace` the final
    state overwrites initial_state and is returned; otherwise initial_state does not change, so it
    can be forked. ValueError if a shape does not fit, or if inplace cannot be done. Can be
    captured in a CUDA graph: one launch, and nothing waits for the GPU.
    Equivalent to: gated_delta_rule_recurrent(q, k, v, g, beta, initial_state)
    """
    delta = beta is not None
    _check(q, k, v, g, beta, initial_state)
    if inplace and (initial_state is None or initial_state.dtype != _compute_dtype(q)
                    or not initial_state.is_contiguous()):
        raise ValueError(f"inplace needs a contiguous initial_state of {_compute_dtype(q)}")
    (B, T, H, K), V = q.shape, v.shape[-1]
    with torch.no_grad():
        if not _use_triton(backend, q, K, V):
            recurrent = gated_delta_rule_recurrent if delta else gated_linear_attention_recurrent
            o, S = recurrent(q, k, v, g, *[beta] * delta, initial_state)
            return o, initial_state.copy_(S) if inplace else S
        state = initial_state if initial_state is None else initial_state.float()
        q, k, v, g, beta, state = (x if x is None else x.contiguous()
                                   for x in (q, k, v, g, beta, state))
        o, end = torch.empty_like(v), state
        if inplace:
            torch.autograd.graph.increment_version(state)                   # as copy_ above does
        else:
            end = q.new_empty(B, H, K, V, dtype=torch.float32)
        # Reading and writing the state takes all the time. Small batches need many narrow programs
        # to keep the memory busy (8 columns are one 32-byte sector); large ones gain by 128-byte
        # rows.
        BV, warps = (8, 1) if B * H * V < 8192 else (32, 4)
        _launch(_step, (B * H * triton.cdiv(V, BV),), q, k, v, g, beta, state, o, end, T, H,
                K=K, V=V, KP=_padded(K), BV=BV, DELTA=delta, num_warps=warps)
        return o, end


# -----------------------------------------------------------------------------
# python kernels.py: the check

OPS = ("gated_delta_rule", "gated_linear_attention")
# relative RMS error against the fp64 loop on the same, rounded inputs: default, exceptions
TOLERANCES = {
    torch.float64: (1e-10, {}),
    torch.float32: (1e-5, {"dg": 2e-4}),
    torch.float16: (5e-3, {"dg": 2e-2, "dbeta": 2e-2}),
    torch.bfloat16: (5e-3, {"dg": 2e-2, "dbeta": 2e-2} | dict.fromkeys(
        ("dq", "dk", "dv", "dstate", "dx", "dkernel", "dcache", "dgate"), 8e-3))}


def random_inputs(op, shape, kind, dtype, device="cpu"):
    """{name: tensor} of an op's inputs. shape is (B, T, H, K, V), of which a convolution has H * K
    channels and V taps. Gates, beta, weight and state are fp32 beside 16-bit inputs."""
    (B, T, H, K, V), delta = shape, op == OPS[0]
    torch.manual_seed(T)
    normal, uniform = (functools.partial(f, device=device) for f in (torch.randn, torch.rand))
    if op == "causal_conv":
        kernel = normal(B, T, V, H * K) if kind == "per token" else normal(V, H * K)
        inputs = dict(x=normal(B, T, H * K), kernel=kernel, cache=normal(B, V - 1, H * K))
    elif op == "gated_rms_norm":
        x, gate = normal(B, T, 2, H, K).to(dtype).unbind(2)                 # not contiguous
        inputs = dict(x=x, weight=normal(K), gate=gate)
    else:
        k, u = normal(B, T, H, K), uniform(B, T, H, *[K] * (not delta))
        k = k[:, :1] + 1e-3 * k if kind == "near keys" else k
        most, reset = (-20.0, -torch.inf) if delta else (-5.0, -5.0)
        g = {"strong": most * u, "strongest": 0 * u + most, "none": 0 * u, "near keys": 0 * u,
             "mixed": torch.where(u < 0.5, most, -0.01),
             "resets": torch.where(u < 0.3, reset, -0.1)}.get(kind, most / 100 * u)
        inputs = dict(q=normal(B, T, H, K), k=F.normalize(k, dim=-1), v=normal(B, T, H, V), g=g)
        if delta:
            inputs["beta"] = torch.ones_like(u) if kind == "near keys" else uniform(B, T, H)
        inputs["state"] = normal(B, H, K, V)
    left_out = {"no state": ["state"], "bare": ["cache"], "plain": ["weight", "gate"]}.get(kind, ())
    fp32 = torch.float64 if dtype == torch.float64 else torch.float32
    return {name: x.to(fp32 if name in ("g", "beta", "weight", "state") else dtype)
            for name, x in inputs.items() if name not in left_out}


def _functions(op, kind, backend):
    """An op and its definition, which take random_inputs(op, shape, kind, ...)."""
    ours, exact, options = globals()[op], globals().get(op + "_recurrent", globals()[op]), {}
    if op == "causal_conv":
        options["activation"] = None if kind == "bare" else "silu"
    if kind == "step":
        ours = recurrent_step if op == OPS[0] else (
            lambda q, k, v, g, state, **options: recurrent_step(q, k, v, g, None, state, **options))
    return functools.partial(ours, backend=backend, **options), functools.partial(exact, **options)


def _outputs_and_grads(function, inputs, out_grads=None):
    """{"o", "state", "dq", ...} of function(*inputs) and the outputs' gradients, random if None."""
    leaves = [x.detach().requires_grad_() for x in inputs.values()]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    out_grads = out_grads or [torch.randn_like(x) for x in outputs]
    results = dict(zip(("o", "state"), outputs))
    if outputs[0].requires_grad:                                            # the step has none
        grads = torch.autograd.grad(outputs, leaves, [x.to(y) for x, y in zip(out_grads, outputs)],
                                    allow_unused=True, materialize_grads=True)
        results |= {"d" + name: x for name, x in zip(inputs, grads)}
    return results, out_grads


def compare(ours, exact, inputs):
    """{tensor: (relative RMS error, relative maximum error)} of the outputs and gradients of
    ours(*inputs), against exact(*inputs) in fp64."""
    torch.use_deterministic_algorithms(True, warn_only=True)    # new tensors hold NaN, so that
    results, out_grads = _outputs_and_grads(ours, inputs)       # places left unwritten are seen
    torch.use_deterministic_algorithms(False)
    inputs, errors = {name: x.double() for name, x in inputs.items()}, {}
    expected, _ = _outputs_and_grads(exact, inputs, out_grads)
    for name, y in expected.items():
        if name in results and y.numel():
            difference, least = results[name].double() - y, 1e-30 if y.any() else 1.0
            errors[name] = ((difference.norm() / y.norm().clamp(min=least)).item(),
                            (difference.abs().max() / y.abs().max().clamp(min=least)).item())
    return errors


def check_cases(on_gpu):
    """(op, dtype, shape, kind) of all cases; of each op and dtype the narrowest heads come last."""
    shapes = [(1, 65, 1, 24, 40), (1, 17, 3, 16, 16)]
    if on_gpu:
        shapes = [(2, 130, 3, 64, 64), (2, 515, 4, 96, 256), (1, 1000, 2, 128, 128),
                  (1, 140, 160, 128, 128), (1, 130, 2, 256, 256), (1, 130, 160, 64, 64), *shapes]
    kinds = dict.fromkeys(OPS, ("strong", "mild", "none", "step")) | {
        "causal_conv": ("static", "per token"), "gated_rms_norm": ("gated", "plain")}
    return [(op, dtype, (*shape[:4], 4) if op == "causal_conv" else shape, kind)
            for dtype in KERNEL_DTYPES[:2 + on_gpu] for op in kinds for shape in shapes
            for kind in kinds[op]]


def check(cases, device="cpu", backend="triton"):
    """Compares ops with their definitions. Prints the name of a case before it runs, so that a
    crash names it, and then the tensor nearest its tolerance. Returns how many tensors were checked
    and how many failed (NaN fails)."""
    checked = failures = 0
    for op, dtype, shape, kind in cases:
        print(f"{op:24}{str(dtype)[6:]:10}{str(list(shape)):22}{kind:10}", end="", flush=True)
        default, special = TOLERANCES[dtype]
        errors = compare(*_functions(op, kind, backend),
                         random_inputs(op, shape, kind, dtype, device))
        shares = {name: rms / special.get(name, default) for name, (rms, _) in errors.items()}
        failed = [name for name, share in shares.items() if not share <= 1]
        print("FAILED " * bool(failed) + "; ".join(
            f"{name}: rms error {errors[name][0]:.1e}, {shares[name]:.1g} of its tolerance, max "
            f"error {errors[name][1]:.1e}" for name in failed or [max(shares, key=shares.get)]),
            flush=True)
        checked, failures = checked + len(errors), failures + len(failed)
    return checked, failures


# -----------------------------------------------------------------------------
# python kernels.py on a GPU: the benchmark

def cost(op, B, T, H, K, V, backward):
    """(bytes, FLOPs) of a call in bf16 with fp32 gates. Bytes: inputs read and outputs written
    once, the least there can be. FLOPs: the matrix products that the kernels do."""
    delta, C, gates = op == OPS[0], 64, 8 if op == OPS[0] else 4 * K
    chunk = 4 * C * K + 20 * C * C if delta else 6 * C * K      # 20CC the inverse; GLA's 3 levels
    scan = 6 * K * V + 4 * C * V if delta else 4 * K * V + 2 * C * V        # the same backwards
    gradients = scan + 10 * C * K if delta else 4 * K * V + C * K * V / 16 + 20 * C * K
    memory = 4 * (K + V) + gates + backward * (8 * K + 6 * V + 2 * gates)
    return B * T * H * memory, B * T * H * (chunk + scan + backward * (scan + gradients))


def measured_limits():
    """What this card reaches: GB/s of a large copy, read and write, and TFLOP/s of a large product
    in bf16."""
    from triton.testing import do_bench
    x = torch.empty(2 ** 30, dtype=torch.uint8, device="cuda")
    y, a = torch.empty_like(x), torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    copy = do_bench(lambda: y.copy_(x), return_mode="median")
    product = do_bench(lambda: a @ a, return_mode="median")
    return dict(gb_s=2 * x.numel() / copy / 1e6, tflop_s=2 * 8192 ** 3 / product / 1e9)


def _fla(delta):
    """fla's chunkwise op and its step, called like ours; (None, None) if fla is not installed."""
    try:
        from fla.ops import gated_delta_rule as rule, gla
    except ImportError:
        return None, None
    chunks, one = ((rule.chunk_gated_delta_rule, rule.fused_recurrent_gated_delta_rule) if delta
                   else (gla.chunk_gla, gla.fused_recurrent_gla))

    def step(q, k, v, g, beta, state):
        gates = dict(g=g, beta=beta) if delta else dict(gk=g)
        return one(q, k, v, **gates, initial_state=state, output_final_state=True)
    return functools.partial(chunks, output_final_state=True), step


def _calls(op, direction, B, T, H, K, V):
    """{provider: call}: ours, fla's op if installed, the torch form, and the softmax attention that
    a mixer replaces. In a step, attention has a cache of T tokens, and the others take turns
    with eight states, more than the L2 cache holds, as the layers of a model do."""
    step, backward, bf16 = direction == "step", "backward" in direction, torch.bfloat16
    kind, delta = "per token" if op == "causal_conv" else "no state", op == OPS[0]
    inputs = random_inputs(op, (B, 1 if step else T, H, K, V), kind, bf16, "cuda")
    x, (fla, fla_step) = [y.requires_grad_(backward) for y in inputs.values()], _fla(delta)
    if step:
        states = itertools.cycle(torch.randn(8, B, H, K, V, device="cuda"))
        query, (*x, beta) = x[0].transpose(1, 2), x if delta else [*x, None]
        keys, values = torch.randn(2, B, H, T, K, device="cuda", dtype=bf16)
        calls = {"ours": lambda: recurrent_step(*x, beta, next(states), True, backend="triton"),
                 "sdpa": lambda: F.scaled_dot_product_attention(query, keys, values)}
        return calls | ({"fla": lambda: fla_step(*x, beta, next(states))} if fla else {})

    def attention(q, k, v, *gates):
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))                    # [B,H,T,K or V]
        return [F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)]

    def call(function):
        o = function(*x)[0]
        return torch.autograd.grad(o, x, do, allow_unused=True) if backward else o

    functions = {name: _functions(op, kind, backend)[0]
                 for name, backend in (("ours", "triton"), ("torch", "torch"))}
    if op in OPS:
        functions |= {"sdpa": attention} | ({"fla": fla} if fla else {})
    do = torch.randn_like(inputs["v" if op in OPS else "x"])
    return {name: functools.partial(call, function) for name, function in functions.items()}


def _time(name, call, timer):
    """[median, p20, p80] in ms; infinite if memory runs out, or if another's code fails, which must
    not end a long run."""
    try:
        return timer(call, quantiles=(0.5, 0.2, 0.8))
    except Exception as error:
        if name == "ours" and not isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        torch.cuda.empty_cache()
        return [float("inf")] * 3


def bench(cases, limits):
    """Times cases (op, direction, (B, T, H, K, V)). Returns a row per provider, and prints it.
    Providers take turns, three times, so that a card that warms up treats all alike. Our rows have
    the time over fla's and the shares of `limits`, the card's copy and matrix rates. A step is
    replayed from a CUDA graph, since its launch from Python takes longer than the kernel."""
    from triton import testing
    rows = []
    for op, direction, shape in cases:
        step, calls, (B, T, H, K, V) = direction == "step", _calls(op, direction, *shape), shape
        timer = testing.do_bench_cudagraph if step else testing.do_bench
        rounds = [{name: _time(name, calls[name], timer) for name in calls} for _ in range(3)]
        times = {name: sorted(turn[name] for turn in rounds)[1] for name in calls}
        size, flops = (8 * B * H * K * V, 0) if step else cost(op, *shape, "backward" in direction)
        for name, (ms, p20, p80) in times.items():
            row = dict(op=op, direction=direction, provider=name, **dict(zip("BTHKV", shape)),
                       ms=ms, p20=p20, p80=p80)
            if ms < float("inf") and not step:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                calls[name]()
                row["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 2 ** 20
            if name == "ours" and op in OPS:
                row |= dict(of_copy=size / ms / 1e6 / limits["gb_s"],
                            of_matrix=flops / ms / 1e9 / limits["tflop_s"],
                            of_fla=ms / times["fla"][0] if "fla" in times else None)
            print("  ".join(f"{x:.3g}" if isinstance(x, float) else f"{x}" for x in row.values()),
                  flush=True)
            rows.append(row)
    return rows


def bench_cases():
    """The goals' shapes, decoding, JetBlock's two ops in Jet-Nemotron-2B, then a sweep over T."""
    goals = [(4, 2048, 16, 128), (8, 1024, 8, 64), (2, 16384, 16, 128), (1, 8192, 96, 128)]
    sweep = [(max(1, 2 ** 14 >> i), 2 ** i, 16, D) for D in (64, 128) for i in range(9, 17)]
    both = "forward", "forward+backward"
    goals, sweep = ([(op, direction, (*shape, shape[-1])) for op in OPS for shape in shapes
                     for direction in both] for shapes in (goals, sweep))
    steps = [(op, "step", (8, T, 16, 128, 128)) for op in OPS for T in (512, 4096, 32768, 65536)]
    return [*goals, *steps, (OPS[0], both[1], (4, 2048, 12, 96, 256)),
            ("causal_conv", both[1], (4, 2048, 12, 256, 4)), *sweep]


def header(gpu):
    """What makes a number comparable: chip, driver, versions, commit."""
    from subprocess import getoutput
    folder = os.path.dirname(os.path.abspath(__file__))
    commit = getoutput(f"git -C '{folder}' rev-parse --short HEAD 2>&-") or "unknown"
    info = dict(device="CPU, in Triton's interpreter", torch=torch.__version__,
                triton=triton.__version__, commit=commit)
    if gpu:
        from triton.backends.nvidia.compiler import get_ptxas
        chip = _capability(torch.device("cuda"))
        if chip == 9:
            _use_sound_ptxas()
        driver = getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
        info |= dict(device=torch.cuda.get_device_name(), driver=driver,
                     ptxas=get_ptxas(10 * chip).version)
    return info


def main():
    import argparse
    import csv
    import json
    parser = argparse.ArgumentParser(
        allow_abbrev=False, usage=argparse.SUPPRESS, epilog="python kernels.py --csv kernels.csv",
        description="Check every op, forwards and backwards, against its definition in fp64; then, "
        "on a GPU, time them. Exit code 1 if a check fails, before anything is timed. The last "
        "line is one JSON object.")
    parser.add_argument("--csv", help="also write the benchmark's rows to this file")
    args, gpu = parser.parse_args(), torch.cuda.is_available()
    if triton is None:
        parser.error("triton is not installed, so there are no kernels to run: pip install triton")
    if args.csv and not os.path.isdir(os.path.dirname(args.csv) or "."):
        parser.error(f"there is no folder for {args.csv}")
    device, backend = ("cuda", "auto") if gpu else ("cpu", "triton")
    bf16 = torch.empty(1, device=device, dtype=torch.bfloat16)
    result = header(gpu) | {"auto": "triton" if _use_triton("auto", bf16) else "torch"}
    print(", ".join(f"{name} {x}" for name, x in result.items()))
    print(f'backend "auto" selects: {result["auto"]} for bf16 tensors on this {device.upper()}')
    result["checked"], result["failures"] = check(check_cases(gpu), device, backend)
    if not gpu:
        print("No GPU here: the kernels are checked, nothing is timed.")
    elif not result["failures"]:
        result["limits"] = measured_limits()
        print(f"{result['limits']}\nop, direction, provider, B, T, H, K, V, ms (median, p20, p80), "
              "peak MB; of ours also: share of copy, share of matmul, time over fla's")
        rows = bench(bench_cases(), result["limits"])
        result["of_fla"] = {f"{row['op']} {row['direction']} {[row[x] for x in 'BTHKV']}":
                            row["of_fla"] for row in rows
                            if 0 < (row.get("of_fla") or 0) < float("inf")}
        if args.csv:
            with open(args.csv, "w", newline="") as file:
                writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
                writer.writeheader()
                writer.writerows(rows)
    print(json.dumps(result))
    sys.exit(result["failures"] > 0)


if __name__ == "__main__":
    main()
