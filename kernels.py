"""Linear attention with a gated state: three mixers' recurrences, as a definition and as fast forms.

For every op the definition stands first, a loop over time (`*_recurrent`, also used for decoding);
below it the chunkwise form, which gives the same numbers with matrix products. The math of gated
linear attention is arXiv:2312.06635, of the gated delta rule arXiv:2412.06464, of JetBlock's
per-token convolution arXiv:2508.15884; the gradients are written by hand.

Glossary, the same letters everywhere:
    B batch, T time, H heads, K key dim, V value dim, C chunk length, N number of chunks, W taps
    q, k [B,T,H,K], v and o [B,T,H,V]   what attention calls them; neither q nor k is normalised here
    g       log decay <= 0, applied before the update: [B,T,H] delta rule, [B,T,H,K] GLA
    beta    [B,T,H] delta rule: how much of the old value under k_t is replaced by v_t
    S       the state, [B,H,K,V], fp32 (fp64 for fp64 inputs): all that is remembered of the past
    G       cumulative log decay inside a chunk, inclusive: G_t = g_first + ... + g_t

Arithmetic is fp32 for fp32, fp16 and bf16 inputs and fp64 for fp64 inputs. Only differences of G
that decay (row t >= row s) are exponentiated, so nothing overflows however strong the decay; a
decay of -inf, which forgets everything, is allowed.
"""

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


def _to_chunks(x, C, dtype):
    """[B,T,H,...] -> [N,B*H,C,...] contiguous; zeros fill the last chunk. A zero token (k = 0,
    beta = 0, g = 0) leaves the state as it is."""
    B, T, H = x.shape[:3]
    N = -(-T // C)
    if N * C != T:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, N * C - T))
    x = x.reshape(B, N, C, H, *x.shape[3:]).transpose(2, 3).transpose(0, 1)    # [N,B,H,C,...]
    return x.to(dtype).contiguous().view(N, B * H, C, *x.shape[4:])


def _from_chunks(x, shape, dtype):
    """The inverse of _to_chunks: [N,B*H,C,...] -> shape [B,T,H,...]."""
    B, T, H = shape[:3]
    N, _, C = x.shape[:3]
    x = x.view(N, B, H, C, *x.shape[3:]).transpose(0, 1).transpose(2, 3)    # [B,N,C,H,...]
    return x.reshape(B, N * C, H, *x.shape[4:])[:, :T].to(dtype)


def _chunk_length(T, longest):
    """The power of two that covers a short sequence, at most `longest`."""
    return min(longest, 1 << (T - 1).bit_length())


def _from_right(x):
    """Sum over the rows from this one to the last, dim -2."""
    return x.flip(-2).cumsum(-2).flip(-2)


def _before(x):
    """Sum over the rows before this one, dim -2."""
    return F.pad(x, (0, 0, 1, -1)).cumsum(-2)


# -----------------------------------------------------------------------------
# The gated delta rule: forget, then correct what the state holds under the key

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
    def forward(ctx, q, k, v, g, beta, state):
        ctx.like = tuple((x.shape, x.dtype) for x in (q, k, v, g, beta))
        dtype, scale = state.dtype, q.shape[-1] ** -0.5
        C = _chunk_length(q.shape[1], 16 if q.shape[-1] < 32 else 32)
        q, k, v, beta = (_to_chunks(x, C, dtype) for x in (q, k, v, beta.unsqueeze(-1)))
        # G in fp64: its differences stay exact to fp32 even behind a long stretch of strong decay
        G = _to_chunks(g.unsqueeze(-1), C, torch.float64).clamp_(min=_floor(dtype)).cumsum(-2)
        q = q * scale                                                       # [N,B*H,C,K]
        # 1. decays
        future = torch.ones(C, C, dtype=torch.bool, device=q.device).triu_(1)
        D = (G - G.mT).to(dtype).masked_fill_(future, -torch.inf).exp_()    # [N,B*H,C,C]
        from_start = G.to(dtype).exp()                                      # [N,B*H,C,1]
        to_end = (G[..., -1:, :] - G).to(dtype).exp_()                      # [N,B*H,C,1]
        # 2. what does not need the state
        P = (q @ k.mT).mul_(D)                                              # [N,B*H,C,C]
        kk = (k @ k.mT).mul_(D).tril_(-1)                                   # [N,B*H,C,C]
        eye = torch.eye(C, dtype=dtype, device=q.device).expand_as(kk)
        inverse = torch.linalg.solve_triangular(beta * kk, eye, upper=False, unitriangular=True)
        inverse = inverse.contiguous()
        q_in, k_in, k_out = q * from_start, k * (beta * from_start), k * to_end
        # 3. the state, chunk by chunk
        S = q.new_empty(len(q) + 1, *k.shape[1:2], *q.shape[3:], v.shape[-1])   # [N+1,B*H,K,V]
        S[0] = state.flatten(0, 1)
        R, U = v * beta, torch.empty_like(v)                                # [N,B*H,C,V]
        for n in range(len(q)):
            torch.bmm(inverse[n], R[n].baddbmm_(k_in[n], S[n], alpha=-1), out=U[n])
            torch.mul(S[n], from_start[n, :, -1:], out=S[n + 1]).baddbmm_(k_out[n].mT, U[n])
        # 4. outputs
        o = (q_in @ S[:-1]).flatten(0, 1).baddbmm_(P.flatten(0, 1), U.flatten(0, 1)).view_as(v)
        ctx.save_for_backward(q, k, v, beta, from_start, to_end, D, P, kk, inverse,
                              q_in, k_in, k_out, S, U)
        return _from_chunks(o, *ctx.like[2]), S[-1].view(state.shape).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dstate):
        (q, k, v, beta, from_start, to_end, D, P, kk, inverse,
         q_in, k_in, k_out, S, U) = ctx.saved_tensors
        do, decay = _to_chunks(do, q.shape[2], q.dtype), from_start[..., -1:, :]
        # 3. the state, backwards
        dU, dR, dS = P.mT @ do, torch.empty_like(U), torch.empty_like(S)
        dS[-1] = dstate.flatten(0, 1)
        torch.matmul(q_in.mT, do, out=dS[:-1])
        for n in reversed(range(len(q))):
            torch.bmm(inverse[n].mT, dU[n].baddbmm_(k_out[n], dS[n + 1]), out=dR[n])
            dS[n].addcmul_(decay[n], dS[n + 1]).baddbmm_(k_in[n].mT, dR[n], alpha=-1)
        # 2. the products
        dq_in, dk_in, dk_out = do @ S[:-1].mT, (dR @ S[:-1].mT).neg_(), U @ dS[1:].mT
        dP, dA = do @ U.mT, (dR @ U.mT).neg_()                              # [N,B*H,C,C]
        # 1. decays. A pair (t, s) of rows adds to dG_t what it takes from dG_s. Where t = s that is
        # zero, and left out: in fp32 the two large halves would not cancel, and drown what is left
        # under strong decay. For the same reason the way from row s to the end goes straight to
        # the g after s. `cumsum` from the right takes the gradient of G to that of g.
        dkk = dA * kk
        pairs = (dP * P).tril_(-1).addcmul_(beta, dkk)
        in_sum = from_start * (dk_in * k).sum(-1, keepdim=True)             # [N,B*H,C,1]
        out_sum = (dk_out * k_out).sum(-1, keepdim=True)                    # [N,B*H,C,1]
        dG = (dq_in * q_in).sum(-1, keepdim=True).addcmul_(beta, in_sum)
        dG.add_(pairs.sum(-1, keepdim=True)).sub_(pairs.sum(-2).unsqueeze(-1))
        kept = (dS[1:] * S[:-1]).sum((-1, -2), keepdim=True)                # [N,B*H,1,1]
        dG[..., -1:, :].addcmul_(decay, kept)
        dg = _from_right(dG).add_(_before(out_sum)).squeeze(-1)
        dbeta = (dR * v).sum(-1) + dkk.sum(-1) + in_sum.squeeze(-1)
        dP.mul_(D)
        dA.mul_(D).tril_(-1).mul_(beta)
        dq = (dP @ k).addcmul_(dq_in, from_start).mul_(q.shape[-1] ** -0.5)
        dk = (dP.mT @ q).add_((dA + dA.mT) @ k).addcmul_(dk_out, to_end)
        dk.addcmul_(dk_in, beta * from_start)
        grads = zip((dq, dk, dR.mul_(beta), dg, dbeta), ctx.like)
        return *(_from_chunks(x, *like) for x, like in grads), dS[0].view(dstate.shape)


def gated_delta_rule(q, k, v, g, beta, initial_state=None):
    """Gated delta rule, chunkwise: matrix products inside chunks, a short scan between them.

        S <- exp(g_t) S;  S <- S + k_t beta_t (v_t - S^T k_t)^T;  o_t = K^-0.5 S^T q_t

    q, k [B,T,H,K], v [B,T,H,V], g and beta [B,T,H], initial_state [B,H,K,V] or None for zeros.
    Returns o [B,T,H,V] in v's dtype and the final state [B,H,K,V]; gradients flow through both and
    to every input. ValueError if a shape does not fit.
    Equivalent to: gated_delta_rule_recurrent(q, k, v, g, beta, initial_state)
    """
    _check(q, k, v, g, beta, initial_state, q.shape[:3])
    if q.shape[1] <= 2 and not torch.is_grad_enabled():                     # decoding
        return gated_delta_rule_recurrent(q, k, v, g, beta, initial_state)
    return _DeltaRule.apply(q, k, v, g, beta, _start_state(q, v, initial_state))


# -----------------------------------------------------------------------------
# Gated linear attention: forget per key channel, then add

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
    Inside blocks of 16 rows the split is at the middle row and in fp64, whose range holds 8 rows
    of the strongest decay that matters. Blocks are then joined two by two, up to C rows: a later
    half's queries see an earlier half's keys through the border, and both factors are <= 1."""

    BLOCK, FLOOR = 16, -88.0    # exp(-88) is below fp32's normal range, exp(8 * 88) inside fp64's

    @staticmethod
    def forward(ctx, q, k, v, g, state):
        ctx.like = tuple((x.shape, x.dtype) for x in (q, k, v, g))
        dtype, scale = state.dtype, q.shape[-1] ** -0.5
        C = _chunk_length(q.shape[1], 16 if q.shape[-1] < 32 else 64)
        q, k, v = (_to_chunks(x, C, dtype) for x in (q, k, v))              # [N,B*H,C,K or V]
        q = q * scale
        N, BH, _, K = q.shape
        c = min(C, _GLA.BLOCK)
        G = _to_chunks(g, C, torch.float64).clamp_(min=_GLA.FLOOR)
        G = G.view(N * BH, C // c, c, K).cumsum(-2)                         # [N*B*H,C/c,c,K]
        # 1. inside blocks
        split = (G - G[..., (c - 1) // 2, None, :]).exp_()                  # [N*B*H,C/c,c,K]
        qs, ks = q.view_as(G) * split, k.view_as(G) / split
        blocks = (qs @ ks.mT).tril_(-1).to(dtype)                           # [N*B*H,C/c,c,c]
        P = torch.diag_embed((q * k).sum(-1)).flatten(0, 1)                 # [N*B*H,C,C]
        _blocks(P, c).add_(blocks)
        # 2. between blocks; from_start and to_end are log decays from a block's start and to its end
        from_start, to_end, halves = G.to(dtype), (G[..., -1:, :] - G).to(dtype), []
        while c < C:
            J = C // (2 * c)
            from_start, to_end = from_start.view(-1, J, 2, c, K), to_end.view(-1, J, 2, c, K)
            late, early = from_start[:, :, 1].exp(), to_end[:, :, 0].exp()  # [N*B*H,J,c,K]
            halves.append((late, early))
            ql, ke = q.view(-1, J, 2, c, K)[:, :, 1] * late, k.view(-1, J, 2, c, K)[:, :, 0] * early
            _blocks(P, c, below=True).copy_(ql @ ke.mT)
            to_end[:, :, 0] += from_start[:, :, 1, -1:]
            from_start[:, :, 1] += from_start[:, :, 0, -1:]
            c *= 2
        from_start, to_end = from_start.view_as(q).exp(), to_end.view_as(k).exp()
        # 3. the state
        q_in, k_out = q * from_start, k * to_end
        S = q.new_empty(N + 1, BH, K, v.shape[-1])                          # [N+1,B*H,K,V]
        S[0] = state.flatten(0, 1)
        decay = from_start[:, :, -1, :, None]                               # [N,B*H,K,1]
        torch.matmul(k_out.mT, v, out=S[1:])
        for n in range(N):
            S[n + 1].addcmul_(decay[n], S[n])
        # 4. outputs
        o = (q_in @ S[:-1]).flatten(0, 1).baddbmm_(P, v.flatten(0, 1)).view_as(v)
        ctx.save_for_backward(q, k, v, split, P, from_start, to_end, S, *sum(halves, ()))
        return _from_chunks(o, *ctx.like[2]), S[-1].view(state.shape).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dstate):
        q, k, v, split, P, from_start, to_end, S, *halves = ctx.saved_tensors
        N, BH, C, K = q.shape
        do, decay = _to_chunks(do, C, q.dtype), from_start[:, :, -1, :, None]
        # 3. the state, backwards
        dS = torch.empty_like(S)
        dS[-1] = dstate.flatten(0, 1)
        torch.matmul((q * from_start).mT, do, out=dS[:-1])
        for n in reversed(range(N)):
            dS[n].addcmul_(decay[n], dS[n + 1])
        k_out = k * to_end
        dv = (k_out @ dS[1:]).flatten(0, 1).baddbmm_(P.mT, do.flatten(0, 1)).view_as(v)
        dP = (do @ v.mT).flatten(0, 1)                                      # [N*B*H,C,C]
        # 1. inside blocks; the diagonal apart, because it takes no part in dG
        c = split.shape[-2]
        qs, ks = q.view_as(split) * split, k.view_as(split) / split
        blocks = _blocks(dP, c).tril(-1).double()                           # [N*B*H,C/c,c,c]
        dq = (blocks @ ks).mul_(split).to(q.dtype).view_as(q)
        dk = (blocks.mT @ qs).div_(split).to(q.dtype).view_as(k)
        # 2. between blocks
        for late, early in zip(halves[::2], halves[1::2]):
            J = C // (2 * c)
            pair = (N * BH, J, 2, c, K)
            dPb = _blocks(dP, c, below=True).contiguous()                   # [N*B*H,J,c,c]
            dq.view(pair)[:, :, 1].addcmul_(late, dPb @ (k.view(pair)[:, :, 0] * early))
            dk.view(pair)[:, :, 0].addcmul_(early, dPb.mT @ (q.view(pair)[:, :, 1] * late))
            c *= 2
        dq.addcmul_(from_start, do @ S[:-1].mT)
        dk_out = v @ dS[1:].mT
        dG = (q * dq).addcmul_(k, dk, value=-1)                             # [N,B*H,C,K]
        dG[:, :, -1].addcmul_(decay.squeeze(-1), (S[:-1] * dS[1:]).sum(-1))
        dg = _from_right(dG).add_(_before(dk_out * k_out))
        diagonal = dP.diagonal(dim1=-2, dim2=-1).view(N, BH, C, 1)
        dq.addcmul_(diagonal, k).mul_(K ** -0.5)
        dk.addcmul_(to_end, dk_out).addcmul_(diagonal, q)
        grads = zip((dq, dk, dv, dg), ctx.like)
        return *(_from_chunks(x, *like) for x, like in grads), dS[0].view(dstate.shape)


def _blocks(P, c, below=False):
    """The c x c blocks on the diagonal of P [X,C,C], as a view [X,C/c,c,c]; with `below` those
    below it that join blocks two by two, [X,C/2c,c,c]."""
    X, C = P.shape[:2]
    if below:
        P = P.view(X, C // (2 * c), 2, c, C // (2 * c), 2, c)[:, :, 1, :, :, 0]
    else:
        P = P.view(X, C // c, c, C // c, c)
    return P.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def gated_linear_attention(q, k, v, g, initial_state=None):
    """Gated linear attention, chunkwise: matrix products inside chunks, a short scan between them.

        S <- exp(g_t) . S + k_t v_t^T  (row by row);    o_t = K^-0.5 S^T q_t

    q, k, g [B,T,H,K], v [B,T,H,V], initial_state [B,H,K,V] or None for zeros.
    Returns o [B,T,H,V] in v's dtype and the final state [B,H,K,V]; gradients flow through both and
    to every input. ValueError if a shape does not fit.
    Equivalent to: gated_linear_attention_recurrent(q, k, v, g, initial_state)
    """
    _check(q, k, v, g, None, initial_state, q.shape)
    if q.shape[1] <= 2 and not torch.is_grad_enabled():                     # decoding
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
