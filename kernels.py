"""Linear attention with a gated state: the recurrences of three mixers, defined and then made fast.

For every op the definition stands first, a loop over time (`*_recurrent`, also used for decoding);
below it the chunkwise form, which gives the same numbers with matrix products. The math of gated
linear attention is arXiv:2312.06635, of the gated delta rule arXiv:2412.06464, of JetBlock's
per-token convolution arXiv:2508.15884; the gradients are written by hand.

Glossary, the same letters everywhere:
    B batch, T time, H heads, K key dim, V value dim, C chunk length, N number of chunks, W taps
    q, k [B,T,H,K], v and o [B,T,H,V]   as in attention; neither q nor k is normalised here
    g       log decay <= 0, applied before the update: [B,T,H] delta rule, [B,T,H,K] GLA
    beta    [B,T,H] delta rule: how much of the old value under k_t is replaced by v_t
    S       the state, [B,H,K,V], fp32 (fp64 for fp64 inputs): all that is remembered of the past
    G       cumulative log decay inside a chunk, inclusive: G_t = g_first + ... + g_t

Arithmetic is fp32 for fp32, fp16 and bf16 inputs and fp64 for fp64 inputs. Only differences of G
that decay (row t >= row s) are exponentiated, so nothing overflows however strong the decay; a
decay of -inf, which forgets everything, is allowed.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:                     # no kernels then; all else works
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


def _chunk_length(T, longest):
    """The power of two that covers a short sequence, at most `longest`."""
    return min(longest, 1 << (T - 1).bit_length())


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
        C = ctx.C = _chunk_length(T, 16 if max(K, V) < 32 else 32 if max(K, V) < 128 else 64)
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
            # Decays. A pair (t, s) of rows adds to dG_t what it takes from dG_s. Where t = s that
            # is zero, and left out: in fp32 the two large halves would not cancel, and drown what
            # is left under strong decay. For the same reason the way from row s to the chunk's
            # end goes straight to the g after s.
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


class _GLA(torch.autograd.Function):
    """Chunkwise form. P_ts = sum_d q_td k_sd exp(G_td - G_sd) for s <= t, else 0:
        O = (exp(G) . Q) S0 + P V,    S1 = exp(G_C) . S0 + (exp(G_C - G) . K)^T V
    The decay in P differs by channel, so it has to be split into a factor for q and one for k.
    Inside blocks of 16 rows the split is at a middle row and in fp64, whose range holds 8 rows of
    the strongest decay that matters. Blocks are then joined two by two, up to C rows: the queries
    of a later block see the keys of the earlier one through the border, both factors <= 1."""

    BLOCK, FLOOR = 16, -88.0    # exp(-88) is below fp32's normal range, exp(8 * 88) inside fp64's

    @staticmethod
    def chunks(tokens, C, dtype, q, k, v, g):
        """Lays out a few chunks, and computes the factors that carry their decays."""
        scale, c = q.shape[-1] ** -0.5, min(C, _GLA.BLOCK)
        q, k, v = (_to_chunks(x, tokens, C, dtype) for x in (q, k, v))      # [n,B*H,C,K or V]
        G = _to_chunks(g, tokens, C, torch.float64).clamp(min=_GLA.FLOOR)   # [n,B*H,C,K]
        G = G.unflatten(2, (C // c, c)).cumsum(-2)                          # [n,B*H,C/c,c,K]
        split = (G - G[..., (c - 1) // 2, None, :]).exp_()                  # [n,B*H,C/c,c,K]
        # log decays from the block's start and to its end, while blocks grow
        from_start, to_end, factors = G.to(dtype), (G[..., -1:, :] - G).to(dtype), []
        while c < C:
            from_start, to_end = (_pairs(x.view_as(k), c) for x in (from_start, to_end))
            factors += [(from_start[..., 1, :, :].exp(), to_end[..., 0, :, :].exp())]
            to_end[..., 0, :, :] += from_start[..., 1, -1:, :]
            from_start[..., 1, :, :] += from_start[..., 0, -1:, :]
            c *= 2
        from_start, to_end = (x.exp().view_as(k) for x in (from_start, to_end))
        return q * scale, k, v, split, factors, from_start, to_end

    @staticmethod
    def forward(ctx, q, k, v, g, state):
        (B, T, H, K), V = q.shape, v.shape[-1]
        C = ctx.C = _chunk_length(T, 16 if max(K, V) < 32 else 64)
        S = state.new_empty(-(-T // C) + 1, B * H, K, V)                    # at the chunks' borders
        S[0] = state.flatten(0, 1)
        o, saved, N = torch.empty_like(v), [], 0
        for tokens in _groups(T, C, B * H * max(K, V)):
            qc, kc, vc, split, factors, from_start, to_end = _GLA.chunks(
                tokens, C, S.dtype, q, k, v, g)
            c, n = split.shape[-2], len(qc)
            P = kc.new_zeros(n, B * H, C, C)
            blocks = (qc.view_as(split) * split) @ (kc.view_as(split) / split).mT
            _blocks(P, c).copy_(blocks.tril_())                             # [n,B*H,C/c,c,c]
            for late, early in factors:
                q_late = _pairs(qc, c)[..., 1, :, :] * late                 # [n,B*H,C/2c,c,K]
                k_early = _pairs(kc, c)[..., 0, :, :] * early
                _blocks(P, c, below=True).copy_(q_late @ k_early.mT)        # [n,B*H,C/2c,c,c]
                c *= 2
            torch.matmul((kc * to_end).mT, vc, out=S[N + 1:N + n + 1])
            for i in range(N, N + n):
                S[i + 1].addcmul_(from_start[i - N, :, -1, :, None], S[i])
            _from_chunks(_add_product((qc * from_start) @ S[N:N + n], P, vc), o, tokens)
            N += n
            saved.append(P)
        ctx.save_for_backward(q, k, v, g, S, *saved)
        return o, S[-1].view(state.shape).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    @_full_precision
    def backward(ctx, do, dstate):
        q, k, v, g, S, *saved = ctx.saved_tensors
        (B, T, H, K), V, C = q.shape, v.shape[-1], ctx.C
        N, dS1 = len(S) - 1, dstate.flatten(0, 1)
        grads = tuple(torch.empty_like(x) for x in (q, k, v, g))
        later = torch.ones(C, C, dtype=S.dtype, device=S.device).triu_()    # [t,r] = 1 for r >= t
        for tokens in reversed(_groups(T, C, B * H * max(K, V))):
            P, doc = saved.pop(), _to_chunks(do, tokens, C, S.dtype)
            qc, kc, vc, split, factors, from_start, to_end = _GLA.chunks(
                tokens, C, S.dtype, q, k, v, g)
            c, n, decay = split.shape[-2], len(qc), from_start[:, :, -1]
            N -= n
            # the state, backwards; dS of a chunk is the gradient of the state behind it
            dS, S0 = torch.empty_like(S[:n + 1]), S[N:N + n]
            dS[n] = dS1
            torch.matmul((qc * from_start).mT, doc, out=dS[:n])
            for i in reversed(range(n)):
                dS[i].addcmul_(decay[i].unsqueeze(-1), dS[i + 1])
            dS1, k_out = dS[0], kc * to_end
            dv = _add_product(k_out @ dS[1:], P.mT, doc)                    # [n,B*H,C,V]
            dP = doc @ vc.mT                                                # [n,B*H,C,C]
            # inside blocks; the diagonal later, because it takes no part in dG
            blocks = _blocks(dP, c).tril(-1).double()                       # [n,B*H,C/c,c,c]
            dq = (blocks @ (kc.view_as(split) / split)).mul_(split).to(S.dtype).view_as(kc)
            dk = (blocks.mT @ (qc.view_as(split) * split)).div_(split).to(S.dtype).view_as(kc)
            for late, early in factors:
                below = _blocks(dP, c, below=True).contiguous()             # [n,B*H,C/2c,c,c]
                q_late = _pairs(qc, c)[..., 1, :, :] * late                 # [n,B*H,C/2c,c,K]
                k_early = _pairs(kc, c)[..., 0, :, :] * early
                _pairs(dq, c)[..., 1, :, :].addcmul_(late, below @ k_early)
                _pairs(dk, c)[..., 0, :, :].addcmul_(early, below.mT @ q_late)
                c *= 2
            dq.addcmul_(from_start, doc @ S0.mT)
            dk_out = vc @ dS[1:].mT                                         # [n,B*H,C,K]
            dG = (qc * dq).addcmul_(kc, dk, value=-1)                       # [n,B*H,C,K]
            dG[:, :, -1].addcmul_(decay, (S0 * dS[1:]).sum(-1))
            # the way from row s to the chunk's end goes straight to the g after s
            dg = _add_product(later @ dG, (1 - later).expand_as(P), k_out.mul_(dk_out))
            diagonal = dP.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)          # [n,B*H,C,1]
            dq.addcmul_(diagonal, kc).mul_(K ** -0.5)
            dk.addcmul_(to_end, dk_out).addcmul_(diagonal, qc)
            for x, out in zip((dq, dk, dv, dg), grads):
                _from_chunks(x, out, tokens)
        return *grads, dS1.view(dstate.shape)


def _pairs(x, c):
    """View rows as pairs of an earlier and a later block: [n,B*H,C,K] -> [n,B*H,C/2c,2,c,K]."""
    return x.unflatten(2, (x.shape[2] // (2 * c), 2, c))


def _blocks(P, c, below=False):
    """The c x c blocks on the diagonal of P [n,B*H,C,C], as a view [n,B*H,C/c,c,c]; with `below`
    those beneath it that join blocks two by two, [n,B*H,C/2c,c,c]."""
    n, BH, C, _ = P.shape
    if below:
        P = P.view(n, BH, C // (2 * c), 2, c, C // (2 * c), 2, c)[:, :, :, 1, :, :, 0]
    else:
        P = P.view(n, BH, C // c, c, C // c, c)
    return P.diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3)


@_full_precision
def gated_linear_attention(q, k, v, g, initial_state=None, backend="auto"):
    """Gated linear attention, chunkwise: matrix products inside chunks, a short scan between them.

        S <- exp(g_t) . S + k_t v_t^T  (row by row);    o_t = K^-0.5 S^T q_t

    q, k, g [B,T,H,K], v [B,T,H,V], initial_state [B,H,K,V] or None for zeros.
    Returns o [B,T,H,V] in v's dtype and the final state [B,H,K,V]; gradients flow through both and
    to every input. ValueError if a shape does not fit.
    Equivalent to: gated_linear_attention_recurrent(q, k, v, g, initial_state)
    """
    _check(q, k, v, g, None, initial_state, q.shape)
    if q.shape[1] <= 4 and not torch.is_grad_enabled():                     # decoding
        return recurrent_step(q, k, v, g, None, initial_state, backend=backend)
    if _use_triton(backend, q, q.shape[-1], v.shape[-1]):
        return _run_kernels(q, k, v, g, None, initial_state)
    return _GLA.apply(q, k, v, g, _start_state(q, v, initial_state))


# -----------------------------------------------------------------------------
# Causal convolution over time, with one kernel for all tokens or one per token (JetBlock)

class _CausalConv(torch.autograd.Function):
    """z_t = sum_w kernel_w x_{t-W+1+w}, y = z or silu(z); x comes with W-1 tokens in front."""

    @staticmethod
    def forward(ctx, x, kernel, activation):
        taps = kernel.to(_compute_dtype(x)).unbind(-2)                      # W times [D] or [B,T,D]
        T = x.shape[1] - len(taps) + 1
        z = taps[0] * x[:, :T]                                              # [B,T,D]
        for w in range(1, len(taps)):
            z.addcmul_(taps[w], x[:, w:w + T].to(z.dtype))
        ctx.save_for_backward(x, kernel, z if activation else None)
        return (F.silu(z) if activation else z).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, kernel, z = ctx.saved_tensors
        taps = kernel.to(_compute_dtype(x)).unbind(-2)
        dz, T = dy.to(taps[0].dtype), dy.shape[1]
        if z is not None:
            gate = z.sigmoid()
            dz = dz * gate * (1 + z * (1 - gate))
        dx, dtaps = dz.new_zeros(x.shape), []
        for w, tap in enumerate(taps):
            dx[:, w:w + T].addcmul_(dz, tap)
            dtap = dz * x[:, w:w + T]
            dtaps.append(dtap if tap.dim() == 3 else dtap.sum((0, 1)))
        return dx.to(x.dtype), torch.stack(dtaps, -2).to(kernel.dtype), None


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
        cache = None if cache is None or W == 1 else cache.to(x.dtype).contiguous()
        y = _ConvKernels.apply(x.contiguous(), kernel.contiguous(), cache, activation)
        if T < W - 1:                                                       # some of the old tail
            before = x.new_zeros(B, W - 1, D) if cache is None else cache
            x = torch.cat([before, x], 1)
        return y, x[:, x.shape[1] - (W - 1):]
    if cache is None:
        cache = x.new_zeros(B, W - 1, D)
    x = torch.cat([cache.to(x.dtype), x], 1)                                # [B,W-1+T,D]
    return _CausalConv.apply(x, kernel, activation), x[:, T:]


# -----------------------------------------------------------------------------
# Triton: the same chunkwise forms on a GPU, two launches forwards and two backwards
#
#   chunk   one program per chunk and head: what needs no state (P, and (1 + A)^-1 or G)
#   scan    one program per head and BV value columns, chunk after chunk: the state stays in
#           registers from the first token to the last, and o is written on the way
#   scan, backwards            the same for dS, from the last chunk to the first
#   gradients                  one program per chunk (and BK key channels for GLA): all the rest
#
# Letters besides the glossary: t, s row and column of a C x C matrix; bh = b * H + h; KP is K padded
# to a power of two, at least 16 (what tl.dot takes), BK and BV tiles of K and V. Padded rows and
# columns are loaded as zeros: a token with k, beta and g of 0 leaves the state as it is.
# Products take their operands in the inputs' dtype and add up in fp32 on tensor cores; what is
# delicate (the inverse, GLA's decayed q and k) is fp32, that is PREC: tf32 for 16-bit inputs,
# three tf32 products, as good as fp32, for fp32 inputs. int64 where b and T meet: long inputs have
# more than 2^31 elements.

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
def _cumulative_decay(x):
    """G = sum of the log decays up to a row, along axis 0, as (whole, part). Each is exact or
    small, so that a difference of two rows keeps the weak decays behind a strong one, which a
    single fp32 sum would round away. Below -120 exp is 0, and unlike -inf, -120 - -120 is 0."""
    x = tl.maximum(x.to(tl.float32), -120.0)
    whole = tl.floor(x + 0.5)
    return tl.cumsum(whole, 0), tl.cumsum(x - whole, 0)


@_jit
def _at(x, index, rows):
    """The entry of a vector at one row."""
    return tl.sum(tl.where(rows == index, x, 0.0), 0)


@_jit
def _row_decays(g, rows, H, left, C: tl.constexpr):
    """Delta rule, for the C rows of a chunk: G as (whole, part); exp of G_1, of G - G_1 (whose
    product exp(G) may be too small for fp16), of G_C - G, of G_C - G_1."""
    x = tl.load(g + rows * H, mask=rows < left, other=0)
    whole, part = _cumulative_decay(x)
    from_first = tl.exp(whole - _at(whole, 0, rows) + (part - _at(part, 0, rows)))
    to_end = tl.exp(_at(whole, C - 1, rows) - whole + (_at(part, C - 1, rows) - part))
    first = tl.exp(_at(whole, 0, rows) + _at(part, 0, rows))
    return whole, part, first, from_first, to_end, _at(from_first, C - 1, rows)


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
    t, s = rows[:, None], rows[None, :]
    return (((t >> level) ^ (s >> level)) == 1) & (t > s)


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
def _delta_chunk(q, k, g, beta, P, inverse, T, H, K: tl.constexpr, BK: tl.constexpr,
                 C: tl.constexpr, LEVELS: tl.constexpr, PREC: tl.constexpr):
    """P = K^-0.5 Q K^T . D and (1 + A)^-1 with A = strictly lower (beta K K^T . D)."""
    bh, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, left = tl.arange(0, C), T - n * C
    token = (bh // H * T + n * C) * H + bh % H                              # of row 0, in [B,T,H]
    qk, kk = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for start in range(0, K, BK):
        cols = start + tl.arange(0, BK)
        qc = _load(q + token * K, rows, cols, H * K, left, K)               # [C,BK]
        kc = _load(k + token * K, rows, cols, H * K, left, K)
        qk = tl.dot(qc, tl.trans(kc), qk, input_precision=PREC)
        kk = tl.dot(kc, tl.trans(kc), kk, input_precision=PREC)
    whole, part = _cumulative_decay(tl.load(g + token + rows * H, mask=rows < left, other=0))
    D = _pair_decay(whole, part, rows)
    b = tl.load(beta + token + rows * H, mask=rows < left, other=0).to(tl.float32)
    A = tl.where(rows[:, None] > rows[None, :], b[:, None] * kk * D, 0.0)
    square = (bh * tl.num_programs(1) + n) * C * C
    _store(P + square, qk * D * K ** -0.5, rows, rows, C, C, C)
    _store(inverse + square, _unit_inverse(A, rows, LEVELS, PREC), rows, rows, C, C, C)


@_jit
def _exp_fixed(G):
    return tl.exp(G.to(tl.float32) * 2.0 ** -18)


@_jit
def _level_decay(G, G_rows, rows, cols, level, stride, num_rows, num_cols):
    """GLA, at one level: exp of the log decay between each row and the border at which its block
    is joined, for rows behind the border from it, for rows before it to it. Both are <= 1, and
    their product is the decay between the two rows, however strong."""
    border = (rows >> (level + 1) << (level + 1)) + (1 << level) - 1
    return _exp_fixed(-tl.abs(G_rows - _load(G, border, cols, stride, num_rows, num_cols)))


@_jit
def _gla_chunk(q, k, g, P, G, q_in, k_out, decay, T, H, K: tl.constexpr, BK: tl.constexpr,
               C: tl.constexpr, LEVELS: tl.constexpr, PREC: tl.constexpr):
    """What the scan needs: q_in = K^-0.5 exp(G) . Q, k_out = exp(G_C - G) . K, exp(G_C), and P_ts = K^-0.5 sum_d q_td k_sd exp(G_td - G_sd). The decay differs by channel, so it
    has to be split into a factor for q and one for k. One product per level does that for all
    pairs joined there; the diagonal has no decay.
    G is stored in units of 2^-18, in int32: fp32 would lose weak decays behind strong ones."""
    bh, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, left, stride = tl.arange(0, C), T - n * C, H * K
    token = ((bh // H * T + n * C) * H + bh % H) * K
    Pc, diagonal = tl.zeros([C, C], tl.float32), tl.zeros([C], tl.float32)
    for start in range(0, K, BK):
        cols = start + tl.arange(0, BK)
        whole, part = _cumulative_decay(_load(g + token, rows, cols, stride, left, K))
        Gc = (whole * 2.0 ** 18).to(tl.int32) + tl.floor(part * 2.0 ** 18 + 0.5).to(tl.int32)
        _store(G + token, Gc, rows, cols, stride, left, K)
        tl.debug_barrier()                              # other threads read these rows of G below
        qc = _load(q + token, rows, cols, stride, left, K).to(tl.float32)   # [C,BK]
        kc = _load(k + token, rows, cols, stride, left, K).to(tl.float32)
        G_end = tl.load(G + token + (tl.minimum(C, left) - 1) * stride + cols, mask=cols < K,
                        other=0)
        _store(q_in + token, qc * _exp_fixed(Gc) * K ** -0.5, rows, cols, stride, left, K)
        _store(k_out + token, kc * _exp_fixed(G_end[None, :] - Gc), rows, cols, stride, left, K)
        tl.store(decay + (bh * tl.num_programs(1) + n) * K + cols, _exp_fixed(G_end), mask=cols < K)
        diagonal += tl.sum(qc * kc, 1)
        for level in range(LEVELS):
            decay = _level_decay(G + token, Gc, rows, cols, level, stride, left, K)
            pairs = tl.dot(qc * decay, tl.trans(kc * decay), input_precision=PREC)
            Pc += tl.where(_joined(rows, level), pairs, 0.0)
    Pc = tl.where(rows[:, None] == rows[None, :], diagonal[:, None], Pc)
    square = (bh * tl.num_programs(1) + n) * C * C
    _store(P + square, Pc * K ** -0.5, rows, rows, C, C, C)


@_jit
def _scan(q, k, v, g, beta, P, inverse, start, o, U, S, end, T, H, K: tl.constexpr,
          V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
          DELTA: tl.constexpr, PREC: tl.constexpr):
    """The state, its outputs, and for the backward pass S at the chunks' starts and U. For GLA q, k
    and g are q_in, k_out and exp(G_C) of _gla_chunk, and U is V. A program owns BV columns of the
    state, all K rows: columns do not depend on each other."""
    blocks, num_chunks = tl.cdiv(V, BV), tl.cdiv(T, C)
    bh, rows, keys = (tl.program_id(0) // blocks).to(tl.int64), tl.arange(0, C), tl.arange(0, KP)
    cols = tl.program_id(0) % blocks * BV + tl.arange(0, BV)
    token = bh // H * T * H + bh % H
    state = tl.zeros([KP, BV], tl.float32)
    if start is not None:
        state = _load(start + bh * K * V, keys, cols, V, K, V)
    for n in range(num_chunks):
        left, square = T - n * C, (bh * num_chunks + n) * C * C
        qc = _load(q + token * K, rows, keys, H * K, left, K)               # [C,KP]
        kc = _load(k + token * K, rows, keys, H * K, left, K)
        vc = _load(v + token * V, rows, cols, H * V, left, V)               # [C,BV]
        if S is not None:
            _store(S + (bh * num_chunks + n) * K * V, state, keys, cols, V, K, V)
        S0 = state.to(q.dtype.element_ty)
        if DELTA:
            _, _, first, from_first, to_end, last = _row_decays(g + token, rows, H, left, C)
            from_start, decay = first * from_first, first * last
            b = tl.load(beta + token + rows * H, mask=rows < left, other=0).to(tl.float32)
            old = from_start[:, None] * tl.dot(kc, S0, input_precision=PREC)
            R = b[:, None] * (vc.to(tl.float32) - old)
            X = _load(inverse + square, rows, rows, C, C, C)
            u = tl.dot(X, R.to(X.dtype), input_precision=PREC)
            if U is not None:
                _store(U + token * V, u, rows, cols, H * V, left, V)
            out = (from_start * K ** -0.5)[:, None] * tl.dot(qc, S0, input_precision=PREC)
            vc, u_out = u.to(vc.dtype), (to_end[:, None] * u).to(vc.dtype)
            state = tl.dot(tl.trans(kc), u_out, decay * state, input_precision=PREC)
        else:
            decay = tl.load(g + (bh * num_chunks + n) * K + keys, mask=keys < K, other=0)
            out = tl.dot(qc, S0, input_precision=PREC)
            state = tl.dot(tl.trans(kc), vc, decay[:, None] * state, input_precision=PREC)
        out = tl.dot(_load(P + square, rows, rows, C, C, C), vc, out, input_precision=PREC)
        _store(o + token * V, out, rows, cols, H * V, left, V)
        token += C * H
    _store(end + bh * K * V, state, keys, cols, V, K, V)


@_jit
def _scan_backward(q, k, g, beta, P, inverse, do, dend, dU, dS, dstart, T, H, K: tl.constexpr,
                   V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                   DELTA: tl.constexpr, PREC: tl.constexpr):
    """The gradient of the state, from the last chunk to the first; dS of a chunk is that of the
    state behind it. Also dU: the gradient of R for the delta rule, of V for GLA. q, k and g are
    as in _scan."""
    blocks, num_chunks = tl.cdiv(V, BV), tl.cdiv(T, C)
    bh, rows, keys = (tl.program_id(0) // blocks).to(tl.int64), tl.arange(0, C), tl.arange(0, KP)
    cols = tl.program_id(0) % blocks * BV + tl.arange(0, BV)
    token = (bh // H * T + (num_chunks - 1) * C) * H + bh % H
    dstate = tl.zeros([KP, BV], tl.float32)
    if dend is not None:
        dstate = _load(dend + bh * K * V, keys, cols, V, K, V)
    for i in range(num_chunks):
        n = num_chunks - 1 - i
        left, square = T - n * C, (bh * num_chunks + n) * C * C
        qc = _load(q + token * K, rows, keys, H * K, left, K)               # [C,KP]
        kc = _load(k + token * K, rows, keys, H * K, left, K)
        doc = _load(do + token * V, rows, cols, H * V, left, V)             # [C,BV]
        _store(dS + (bh * num_chunks + n) * K * V, dstate, keys, cols, V, K, V)
        dS1 = dstate.to(q.dtype.element_ty)
        Pc = _load(P + square, rows, rows, C, C, C)
        du = tl.dot(tl.trans(Pc), doc, input_precision=PREC)
        if DELTA:
            _, _, first, from_first, to_end, last = _row_decays(g + token, rows, H, left, C)
            b = tl.load(beta + token + rows * H, mask=rows < left, other=0).to(tl.float32)
            du += to_end[:, None] * tl.dot(kc, dS1, input_precision=PREC)
            X = _load(inverse + square, rows, rows, C, C, C)
            du = tl.dot(tl.trans(X), du.to(X.dtype), input_precision=PREC)  # of R from here on
            do_in = (doc.to(tl.float32) * (from_first * K ** -0.5)[:, None]).to(doc.dtype)
            du_in = (du * -(b * from_first)[:, None]).to(doc.dtype)
            dstate = tl.dot(tl.trans(qc), do_in, last * dstate, input_precision=PREC)
            dstate = first * tl.dot(tl.trans(kc), du_in, dstate, input_precision=PREC)
        else:
            decay = tl.load(g + (bh * num_chunks + n) * K + keys, mask=keys < K, other=0)
            du = tl.dot(kc, dS1, du, input_precision=PREC)
            dstate = tl.dot(tl.trans(qc), doc, decay[:, None] * dstate, input_precision=PREC)
        _store(dU + token * V, du, rows, cols, H * V, left, V)
        token -= C * H
    if dstart is not None:
        _store(dstart + bh * K * V, dstate, keys, cols, V, K, V)


@_jit
def _delta_gradients(q, k, v, g, beta, do, U, dR, S, dS, dq, dk, dv, dg, dbeta, T, H,
                     K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                     C: tl.constexpr, PREC: tl.constexpr):
    """Gradients of a chunk's inputs, as _DeltaRule.backward has them; what is left out of the sums
    for dg is explained there. P and A are computed anew in fp32: rounded, they would spoil dg."""
    bh, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows, left = tl.arange(0, C), T - n * C
    t, s = rows[:, None], rows[None, :]
    token = (bh // H * T + n * C) * H + bh % H
    border = (bh * tl.num_programs(1) + n) * K * V
    whole, part, first, from_first, to_end, last = _row_decays(g + token, rows, H, left, C)
    from_start, decay = first * from_first, first * last
    b = tl.load(beta + token + rows * H, mask=rows < left, other=0).to(tl.float32)
    # pairs of rows
    dP, dA = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    db = tl.zeros([C], tl.float32)
    for start in range(0, V, BV):
        cols = start + tl.arange(0, BV)
        uc = _load(U + token * V, rows, cols, H * V, left, V)               # [C,BV]
        dRc = _load(dR + token * V, rows, cols, H * V, left, V)
        doc = _load(do + token * V, rows, cols, H * V, left, V)
        dP = tl.dot(doc, tl.trans(uc), dP, input_precision=PREC)
        dA = tl.dot(dRc, tl.trans(uc), dA, input_precision=PREC)            # of -A
        vc = _load(v + token * V, rows, cols, H * V, left, V).to(tl.float32)
        db += tl.sum(dRc.to(tl.float32) * vc, 1)
        _store(dv + token * V, b[:, None] * dRc.to(tl.float32), rows, cols, H * V, left, V)
    qk, kk = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for start in range(0, K, BK):
        cols = start + tl.arange(0, BK)
        qc = _load(q + token * K, rows, cols, H * K, left, K)               # [C,BK]
        kc = _load(k + token * K, rows, cols, H * K, left, K)
        qk = tl.dot(qc, tl.trans(kc), qk, input_precision=PREC)
        kk = tl.dot(kc, tl.trans(kc), kk, input_precision=PREC)
    D = _pair_decay(whole, part, rows)
    dP = dP * D * K ** -0.5
    dA = tl.where(t > s, -dA * D, 0.0)
    db += tl.sum(dA * kk, 1)
    dA *= b[:, None]
    pairs = tl.where(t > s, dP * qk + dA * kk, 0.0)
    dG = tl.sum(pairs, 1) - tl.sum(tl.trans(pairs), 1)
    dP, dA = dP.to(q.dtype.element_ty), (dA + tl.trans(dA)).to(q.dtype.element_ty)
    # each row and the state
    in_sum, out_sum = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    kept = tl.zeros([BK], tl.float32)                                       # <dS, S>
    for start in range(0, K, BK):
        keys = start + tl.arange(0, BK)
        dqc, dk_in, dk_out = (tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32),
                              tl.zeros([C, BK], tl.float32))
        for start_v in range(0, V, BV):
            cols = start_v + tl.arange(0, BV)
            S0 = _load(S + border, keys, cols, V, K, V)                     # [BK,BV]
            dS1 = _load(dS + border, keys, cols, V, K, V)
            kept += tl.sum(S0.to(tl.float32) * dS1.to(tl.float32), 1)
            doc = _load(do + token * V, rows, cols, H * V, left, V)         # [C,BV]
            dqc = tl.dot(doc, tl.trans(S0), dqc, input_precision=PREC)
            dRc = _load(dR + token * V, rows, cols, H * V, left, V)
            dk_in = tl.dot(dRc, tl.trans(S0), dk_in, input_precision=PREC)  # of -k_in
            uc = _load(U + token * V, rows, cols, H * V, left, V)
            dk_out = tl.dot(uc, tl.trans(dS1), dk_out, input_precision=PREC)
        qc = _load(q + token * K, rows, keys, H * K, left, K)               # [C,BK]
        kc = _load(k + token * K, rows, keys, H * K, left, K)
        dqc *= (from_start * K ** -0.5)[:, None]
        dG += tl.sum(dqc * qc.to(tl.float32), 1)
        in_sum -= tl.sum(dk_in * kc.to(tl.float32), 1)
        out_sum += tl.sum(dk_out * kc.to(tl.float32), 1)
        dqc = tl.dot(dP, kc, dqc, input_precision=PREC)
        dkc = dk_out * to_end[:, None] - dk_in * (b * from_start)[:, None]
        dkc = tl.dot(tl.trans(dP), qc, dkc, input_precision=PREC)
        dkc = tl.dot(dA, kc, dkc, input_precision=PREC)
        _store(dq + token * K, dqc, rows, keys, H * K, left, K)
        _store(dk + token * K, dkc, rows, keys, H * K, left, K)
    in_sum *= from_start
    dG += b * in_sum
    # dG goes to the g of its row and all before it; the way to the chunk's end, to those after it
    later = tl.where(t <= s, dG[None, :], tl.where(t > s, (out_sum * to_end)[None, :], 0.0))
    dgc = tl.sum(later, 1) + decay * tl.sum(kept, 0)
    tl.store(dg + token + rows * H, dgc.to(dg.dtype.element_ty), mask=rows < left)
    tl.store(dbeta + token + rows * H, (db + in_sum).to(dbeta.dtype.element_ty), mask=rows < left)


@_jit
def _gla_gradients(q, k, v, G, do, S, dS, dq, dk, dg, T, H, K: tl.constexpr, V: tl.constexpr,
                   BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
                   PREC: tl.constexpr):
    """Gradients of a chunk's q, k and g, as _GLA.backward has them, for BK channels."""
    blocks, n = tl.cdiv(K, BK), tl.program_id(1)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    rows, left, stride = tl.arange(0, C), T - n * C, H * K
    keys = tl.program_id(0) % blocks * BK + tl.arange(0, BK)
    t, s = rows[:, None], rows[None, :]
    token = (bh // H * T + n * C) * H + bh % H
    border = (bh * tl.num_programs(1) + n) * K * V
    dP, kept = tl.zeros([C, C], tl.float32), tl.zeros([BK], tl.float32)
    dqc, dk_out = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    for start in range(0, V, BV):
        cols = start + tl.arange(0, BV)
        S0 = _load(S + border, keys, cols, V, K, V)                         # [BK,BV]
        dS1 = _load(dS + border, keys, cols, V, K, V)
        kept += tl.sum(S0.to(tl.float32) * dS1.to(tl.float32), 1)           # <dS, S> per channel
        doc = _load(do + token * V, rows, cols, H * V, left, V)             # [C,BV]
        vc = _load(v + token * V, rows, cols, H * V, left, V)
        dP = tl.dot(doc, tl.trans(vc), dP, input_precision=PREC)
        dqc = tl.dot(doc, tl.trans(S0), dqc, input_precision=PREC)
        dk_out = tl.dot(vc, tl.trans(dS1), dk_out, input_precision=PREC)
    qc = _load(q + token * K, rows, keys, stride, left, K).to(tl.float32)   # [C,BK]
    kc = _load(k + token * K, rows, keys, stride, left, K).to(tl.float32)
    Gc = _load(G + token * K, rows, keys, stride, left, K)
    G_end = tl.load(G + token * K + (tl.minimum(C, left) - 1) * stride + keys,
                    mask=keys < K, other=0)
    dP *= K ** -0.5
    dqc *= _exp_fixed(Gc) * K ** -0.5
    dk_out *= _exp_fixed(G_end[None, :] - Gc)
    dkc = tl.zeros([C, BK], tl.float32)
    for level in range(LEVELS):
        factor = _level_decay(G + token * K, Gc, rows, keys, level, stride, left, K)
        pairs = tl.where(_joined(rows, level), dP, 0.0)
        dqc += factor * tl.dot(pairs, kc * factor, input_precision=PREC)
        dkc += factor * tl.dot(tl.trans(pairs), qc * factor, input_precision=PREC)
    # the diagonal takes no part in dg; the way to the chunk's end goes to the g of the rows after
    dG, to_end = qc * dqc - kc * dkc, kc * dk_out
    later = tl.cumsum(dG, 0, reverse=True)
    later = tl.dot(tl.where(t > s, 1.0, 0.0), to_end, later, input_precision=PREC)
    later += (_exp_fixed(G_end) * kept)[None, :]
    diagonal = tl.sum(tl.where(t == s, dP, 0.0), 1)[:, None]
    _store(dg + token * K, later, rows, keys, stride, left, K)
    _store(dq + token * K, dqc + diagonal * kc, rows, keys, stride, left, K)
    _store(dk + token * K, dkc + dk_out + diagonal * qc, rows, keys, stride, left, K)


@_jit
def _step(q, k, v, g, beta, start, o, end, T, H, K: tl.constexpr, V: tl.constexpr,
          KP: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr):
    """The recurrence itself, for a few tokens. A program owns BV columns of the state, and reads
    and writes them once; end may be start."""
    blocks = tl.cdiv(V, BV)
    bh, keys = (tl.program_id(0) // blocks).to(tl.int64), tl.arange(0, KP)
    cols = tl.program_id(0) % blocks * BV + tl.arange(0, BV)
    token = bh // H * T * H + bh % H
    state = tl.zeros([KP, BV], tl.float32)
    if start is not None:
        state = _load(start + bh * K * V, keys, cols, V, K, V)
    for _ in range(T):
        qt = tl.load(q + token * K + keys, mask=keys < K, other=0).to(tl.float32)   # [KP]
        kt = tl.load(k + token * K + keys, mask=keys < K, other=0).to(tl.float32)
        vt = tl.load(v + token * V + cols, mask=cols < V, other=0).to(tl.float32)   # [BV]
        if DELTA:
            state *= tl.exp(tl.load(g + token).to(tl.float32))
            b = tl.load(beta + token).to(tl.float32)
            vt = b * (vt - tl.sum(kt[:, None] * state, 0))
        else:
            gt = tl.load(g + token * K + keys, mask=keys < K, other=0).to(tl.float32)
            state *= tl.exp(gt)[:, None]
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
    rows = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    cols = tl.program_id(0) * BD + tl.arange(0, BD)
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
    b, block = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows = block * BT - (W - 1) + tl.arange(0, BT)
    cols = tl.program_id(0) * BD + tl.arange(0, BD)
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
            partial = (b * tl.num_programs(1) + block) * W + w
            tl.store(dkernel + partial * D + cols, tl.sum(dtap, 0), mask=cols < D)


# -----------------------------------------------------------------------------
# Which form runs, and how the kernels are launched

def auto_backend(x, *dims):
    """What backend="auto" means for x and its head dims: "triton" or "torch". Decided here only."""
    supported = x.dtype in (torch.float32, torch.float16, torch.bfloat16) and max(dims, default=0) <= 256
    return "triton" if triton is not None and x.is_cuda and supported else "torch"


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
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"the kernels take fp32, fp16 and bf16, not {x.dtype}: use the torch form")
    if max(dims, default=0) > 256:
        raise ValueError(f"the kernels take head dims up to 256, not {max(dims)}: use the torch form")
    return True


def _launch(kernel, grid, *args, **constants):
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **constants)


def _padded(dim):
    """Head dim -> the width of a tile that holds it: a power of two that tl.dot takes."""
    return max(16, 1 << (dim - 1).bit_length())


def _config(q, V, delta):
    """Tile sizes and launch options of the kernels of one call."""
    K, wide = q.shape[-1], q.dtype == torch.float32
    BK, BV, C = min(64, _padded(K)), min(64, _padded(V)), 64
    common = dict(C=C, K=K, PREC="tf32x3" if wide else "tf32", num_warps=8, num_stages=2)
    scan = common | dict(V=V, KP=_padded(K), BV=BV, DELTA=delta)
    levels = dict(LEVELS=C.bit_length() - 1)
    return {"chunk": common | levels | dict(BK=BK),
            "scan": scan, "scan_backward": scan,
            "gradients": common | dict(V=V, BK=BK, BV=BV) | ({} if delta else levels)}


class _Kernels(torch.autograd.Function):
    """The launches of both chunkwise forms; beta is None for GLA. q, k, v of one dtype, all
    contiguous, state fp32 or None. With `save`, what the backward pass needs is kept, one state
    per chunk included, rather than computed twice."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, state, save):
        (B, T, H, K), V, delta = q.shape, v.shape[-1], beta is not None
        config = _config(q, V, delta)
        C = config["chunk"]["C"]
        N, G, inverse = triton.cdiv(T, C), None, None
        P, scanned = q.new_empty(B * H, N, C, C), (q, k, g)
        if delta:
            inverse = torch.empty_like(P)
            _launch(_delta_chunk, (B * H, N), q, k, g, beta, P, inverse, T, H, **config["chunk"])
        else:
            G = torch.empty_like(g, dtype=torch.int32)
            scanned = torch.empty_like(q), torch.empty_like(k), g.new_empty(B * H, N, K, dtype=torch.float32)
            _launch(_gla_chunk, (B * H, N), q, k, g, P, G, *scanned, T, H, **config["chunk"])
        o, end = torch.empty_like(v), q.new_empty(B, H, K, V, dtype=torch.float32)
        S = q.new_empty(B * H, N, K, V) if save else None
        U = torch.empty_like(v) if save and delta else None
        programs = B * H * triton.cdiv(V, config["scan"]["BV"])
        qs, ks, gs = scanned
        _launch(_scan, (programs,), qs, ks, v, gs, beta, P, inverse, state, o, U, S, end, T, H,
                **config["scan"])
        if save:
            ctx.config, ctx.programs, ctx.g_dtype = config, programs, g.dtype
            ctx.has_state = state is not None
            ctx.save_for_backward(q, k, v, G, beta, *scanned, P, inverse, S, U)
        return o, end

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dend):
        q, k, v, G, beta, qs, ks, gs, P, inverse, S, U = ctx.saved_tensors
        (_, T, H, K), (BH, N), config = q.shape, P.shape[:2], ctx.config
        do, dend = do.contiguous(), dend.contiguous()
        dU, dS = torch.empty_like(v), torch.empty_like(S)
        dstart = torch.empty_like(dend) if ctx.has_state else None
        _launch(_scan_backward, (ctx.programs,), qs, ks, gs, beta, P, inverse, do, dend,
                dU, dS, dstart, T, H, **config["scan_backward"])
        dq, dk = torch.empty_like(q), torch.empty_like(k)
        if beta is not None:
            dv, dg, dbeta = torch.empty_like(v), torch.empty_like(gs), torch.empty_like(beta)
            _launch(_delta_gradients, (BH, N), q, k, v, gs, beta, do, U, dU, S, dS,
                    dq, dk, dv, dg, dbeta, T, H, **config["gradients"])
        else:
            dv, dg, dbeta = dU, torch.empty_like(G, dtype=ctx.g_dtype), None
            blocks = triton.cdiv(K, config["gradients"]["BK"])
            _launch(_gla_gradients, (BH * blocks, N), q, k, v, G, do, S, dS, dq, dk, dg, T, H,
                    **config["gradients"])
        return dq, dk, dv, dg, dbeta, dstart, None


def _run_kernels(q, k, v, g, beta, state):
    """What the ops do to their inputs before and after the launches."""
    inputs = [x if x is None else x.contiguous() for x in (
        q, k.to(q.dtype), v.to(q.dtype), g, beta, state if state is None else state.float())]
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, end = _Kernels.apply(*inputs, save)
    return o.to(v.dtype), end


class _ConvKernels(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, kernel, cache, activation):
        (B, T, D), y = x.shape, torch.empty_like(x)
        ctx.save_for_backward(x, kernel, cache)
        ctx.constants = dict(W=kernel.shape[-2], PER_TOKEN=kernel.dim() == 4,
                             SILU=activation is not None, BT=32, BD=64, num_warps=4)
        _launch(_conv, (triton.cdiv(D, 64), triton.cdiv(T, 32), B), x, kernel, cache, y, T, D,
                **ctx.constants)
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
        _launch(_conv_backward, (triton.cdiv(D, 64), blocks, B), x, kernel, cache, dy.contiguous(),
                dx, dkernel, dcache, T, D, **ctx.constants)
        if not per_token:
            dkernel = dkernel.sum(0).to(kernel.dtype)
        return dx, dkernel, dcache, None


def recurrent_step(q, k, v, g, beta=None, initial_state=None, inplace=False, backend="auto"):
    """A few tokens of decoding, without gradients: the delta rule, or GLA where beta is None.

    Shapes and results as `gated_delta_rule` and `gated_linear_attention`. With `inplace` the new
    state is written over initial_state and returned; otherwise initial_state is left as it is.
    """
    delta, dims = beta is not None, (q.shape[-1], v.shape[-1])
    _check(q, k, v, g, beta, initial_state, q.shape[:3] if delta else q.shape)
    if inplace and (initial_state is None or initial_state.dtype != _compute_dtype(q)):
        raise ValueError(f"inplace needs an initial_state of {_compute_dtype(q)}")
    if not _use_triton(backend, q, *dims):
        with torch.no_grad():
            if delta:
                o, S = gated_delta_rule_recurrent(q, k, v, g, beta, initial_state)
            else:
                o, S = gated_linear_attention_recurrent(q, k, v, g, initial_state)
        return o, initial_state.copy_(S) if inplace else S
    (B, T, H, K), V = q.shape, v.shape[-1]
    state = None if initial_state is None else initial_state.float()
    if inplace and not state.is_contiguous():
        raise ValueError("inplace needs a contiguous initial_state")
    q, k, v, g, beta, state = (x if x is None else x.detach().contiguous()
                               for x in (q, k, v, g, beta, state))
    o = torch.empty_like(v)
    end = state if inplace else q.new_empty(B, H, K, V, dtype=torch.float32)
    BV = 8
    _launch(_step, (B * H * triton.cdiv(V, BV),), q, k, v, g, beta, state, o, end, T, H, K=K, V=V,
            KP=_padded(K), BV=BV, DELTA=delta, num_warps=1)
    return o, initial_state if inplace else end
