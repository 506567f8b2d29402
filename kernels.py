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

import functools

import torch
import torch.nn.functional as F


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
def gated_delta_rule(q, k, v, g, beta, initial_state=None):
    """Gated delta rule, chunkwise: matrix products inside chunks, a short scan between them.

        S <- exp(g_t) S;  S <- S + k_t beta_t (v_t - S^T k_t)^T;  o_t = K^-0.5 S^T q_t

    q, k [B,T,H,K], v [B,T,H,V], g and beta [B,T,H], initial_state [B,H,K,V] or None for zeros.
    Returns o [B,T,H,V] in v's dtype and the final state [B,H,K,V]; gradients flow through both and
    to every input. ValueError if a shape does not fit.
    Equivalent to: gated_delta_rule_recurrent(q, k, v, g, beta, initial_state)
    """
    _check(q, k, v, g, beta, initial_state, q.shape[:3])
    if q.shape[1] <= 4 and not torch.is_grad_enabled():                     # decoding
        return gated_delta_rule_recurrent(q, k, v, g, beta, initial_state)
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
def gated_linear_attention(q, k, v, g, initial_state=None):
    """Gated linear attention, chunkwise: matrix products inside chunks, a short scan between them.

        S <- exp(g_t) . S + k_t v_t^T  (row by row);    o_t = K^-0.5 S^T q_t

    q, k, g [B,T,H,K], v [B,T,H,V], initial_state [B,H,K,V] or None for zeros.
    Returns o [B,T,H,V] in v's dtype and the final state [B,H,K,V]; gradients flow through both and
    to every input. ValueError if a shape does not fit.
    Equivalent to: gated_linear_attention_recurrent(q, k, v, g, initial_state)
    """
    _check(q, k, v, g, None, initial_state, q.shape)
    if q.shape[1] <= 4 and not torch.is_grad_enabled():                     # decoding
        return gated_linear_attention_recurrent(q, k, v, g, initial_state)
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


def causal_conv(x, kernel, cache=None, activation=None):
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
    if cache is None:
        cache = x.new_zeros(B, W - 1, D)
    x = torch.cat([cache.to(x.dtype), x], 1)                                # [B,W-1+T,D]
    return _CausalConv.apply(x, kernel, activation), x[:, T:]
