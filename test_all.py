"""Everything that this project claims and a CPU can check: pytest test_all.py

Tests on the real 260 K-parameter model and its data need ../shared and skip where it is absent.
"""

import argparse
import concurrent.futures
import copy
import datetime
import functools
import gzip
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

import distill
import eval as evaluation
import kernels
import linear_attn
import replace
from eval import (
    CHOICE_FILE, GENERATE_FILE, MBPP_SHOTS, TASKS, draw_shots, file_task, gsm8k_bare, gsm8k_judge,
    hellaswag_clean, load_docs, mathqa_choices, rouge_l, run_program, split_docs)
from linear_attn import MIXERS, UserError, attention_modules, swap

ROOT = Path(__file__).parent
SHARED = ROOT.parent / "shared"
STORIES = SHARED / "models" / "stories260K"
needs_shared = pytest.mark.skipif(not STORIES.exists(), reason="../shared is not here")

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, pad_token_id=None, bos_token_id=None,
             eos_token_id=None)
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**SMALL),
    "gemma": lambda: transformers.GemmaConfig(**{**SMALL, "num_key_value_heads": 1}, head_dim=16),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=None,
        eos_token_id=None),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        **{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=64, pad_token_id=1),
    "olmo": lambda: transformers.OlmoConfig(**SMALL, clip_qkv=0.5),
    "phi": lambda: transformers.PhiConfig(**{**SMALL, "num_key_value_heads": 4},
                                          qk_layernorm=True),
    "phi3": lambda: transformers.Phi3Config(**SMALL),
    "cohere": lambda: transformers.CohereConfig(**SMALL, use_qk_norm=True),
    "gpt_bigcode": lambda: transformers.GPTBigCodeConfig(
        vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=None,
        eos_token_id=None),
    "persimmon": lambda: transformers.PersimmonConfig(**SMALL),
}
FALCON = dict(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
              bos_token_id=None, eos_token_id=None)
FALCONS = {         # its three layouts
    "multi_query": lambda: transformers.FalconConfig(**FALCON),
    "grouped": lambda: transformers.FalconConfig(**FALCON, new_decoder_architecture=True,
                                                 num_kv_heads=2),
    "per_head": lambda: transformers.FalconConfig(**FALCON, multi_query=False, bias=True),
}
DECODED = ("llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "gemma")


def random_model(config, scale=1.0):
    """A model with seeded random weights, scaled up so that a wrong layer shows in the logits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(scale * noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.requires_grad_(False)


def shaken_mixers(model, attn, init="inherit"):
    """Mixers for all layers whose new parameters are not neutral, so that each one matters."""
    mixers = {}
    for i, attention in enumerate(attention_modules(model)):
        mixers[i] = MIXERS[attn].from_attention(attention, model.config, i, init).eval()
        generator = torch.Generator().manual_seed(i)
        for parameter in mixers[i].parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.3 * noise * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1
                                             else 1)
        mixers[i].requires_grad_(False)
    return mixers


def relative(ours, reference):
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def tokens(*shape, seed=0):
    return torch.randint(2, 64, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------
# kernels.py: the chunkwise forms against the loops that define them, in fp64

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130)


def op_inputs(op, T, decay, near_keys=False, K=16, V=24, H=2, B=2):
    """Random fp64 inputs of an op, its initial state last."""
    torch.manual_seed(T)
    k = torch.randn(B, T, H, K)
    if near_keys:
        k = k[:, :1] + 1e-3 * k
    k = F.normalize(k, dim=-1)
    strongest = -20.0 if op == "gated_delta_rule" else -5.0
    g = torch.rand(B, T, H, *(() if op == "gated_delta_rule" else (K,)))
    g = {"mild": -0.3 * g, "none": 0 * g, "strong": 0 * g + strongest,
         "range": strongest * (0.25 + 0.75 * g), "mixed": torch.where(g < 0.5, strongest, -0.01),
         "resets": torch.where(g < 0.3, -torch.inf if op == "gated_delta_rule" else -5.0, -0.1)}[decay]
    beta = [torch.ones(B, T, H) if near_keys else torch.rand(B, T, H)]
    return [x.double() for x in (torch.randn(B, T, H, K), k, torch.randn(B, T, H, V), g,
                                 *(beta if op == "gated_delta_rule" else []), torch.randn(B, H, K, V))]


def op_results(function, inputs, out_grads, with_state=True):
    """Outputs, final state and the gradient of every input, as {name: tensor}."""
    names = ["o", "state", "dq", "dk", "dv", "dg", "dbeta"][:2 + len(inputs) - with_state]
    names += ["dstate"] * with_state
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    grads = torch.autograd.grad(outputs, inputs, [x.to(y) for x, y in zip(out_grads, outputs)])
    return dict(zip(names, (*outputs, *grads)))


def assert_near(results, expected, tolerances, context):
    for name, tolerance in tolerances.items():
        x, y = results[name].double(), expected[name].double()
        error = ((x - y).norm() / y.norm()).item() if y.norm() > 0 else x.norm().item()
        assert error <= tolerance, f"{name} is off by {error:.1e} > {tolerance:.0e} for {context}"


def tolerances(dtype, names):
    if dtype == torch.float64:
        return dict.fromkeys(names, 1e-10)
    return {name: 2e-4 if name == "dg" else 1e-5 for name in names}


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=("fp64", "fp32"))
@pytest.mark.parametrize("op", ("gated_delta_rule", "gated_linear_attention"))
def test_chunks_equal_the_loop(op, dtype):
    """The chunkwise forms must compute what the loops define, gradients included."""
    chunks, loop = getattr(kernels, op), getattr(kernels, op + "_recurrent")
    cases = [*itertools.product(LENGTHS, ("mild", "none", "strong", "range", "mixed", "resets"), (False,)),
             *itertools.product((17, 130), ("mild", "none", "strong"), (True,))]
    for T, decay, near_keys in cases:
        inputs = [x.to(dtype) for x in op_inputs(op, T, decay, near_keys)]
        out_grads = torch.randn_like(inputs[2]), torch.randn_like(inputs[-1])
        results = op_results(chunks, inputs, out_grads)
        expected = op_results(loop, [x.double() for x in inputs], out_grads)
        assert_near(results, expected, tolerances(dtype, expected), f"{op} T={T} {decay} near={near_keys}")


@pytest.mark.parametrize("op", ("gated_delta_rule", "gated_linear_attention"))
@pytest.mark.parametrize("K,V", ((8, 8), (64, 40), (40, 136), (256, 32)))
def test_chunks_equal_the_loop_at_other_head_dims(op, K, V):
    """Chunk lengths depend on head dims, and K and V are easily swapped where they are equal."""
    inputs = op_inputs(op, 70, "mixed", K=K, V=V)
    out_grads = torch.randn_like(inputs[2]), torch.randn_like(inputs[-1])
    expected = op_results(getattr(kernels, op + "_recurrent"), inputs, out_grads)
    assert_near(op_results(getattr(kernels, op), inputs, out_grads), expected,
                tolerances(torch.float64, expected), f"{op} K={K} V={V}")


def test_the_delta_rule_is_that_of_transformers():
    """Both forms, gradients included, against the torch forms that transformers has for Qwen3-Next."""
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen
    inputs = [x.float() for x in op_inputs("gated_delta_rule", 130, "mild")]
    out_grads = torch.randn_like(inputs[2]), torch.randn_like(inputs[-1])
    for ours, theirs in ((kernels.gated_delta_rule, qwen.torch_chunk_gated_delta_rule),
                         (kernels.gated_delta_rule_recurrent, qwen.torch_recurrent_gated_delta_rule)):
        expected = op_results(lambda *x: theirs(*x[:-1], initial_state=x[-1], output_final_state=True),
                              inputs, out_grads)
        assert_near(op_results(ours, inputs, out_grads), expected,
                    tolerances(torch.float32, expected), theirs.__name__)


def test_many_chunk_groups(monkeypatch):
    """A delta rule over a long sequence is worked through in groups of chunks: one of each here."""
    groups = kernels._groups
    monkeypatch.setattr(kernels, "_groups", lambda T, C, size: groups(T, C, 2 ** 20))
    test_chunks_equal_the_loop_at_other_head_dims("gated_delta_rule", 16, 24)


@pytest.mark.parametrize("op", ("gated_delta_rule", "gated_linear_attention"))
@pytest.mark.parametrize("split", (1, 3, 16, 40, 65))
def test_a_split_sequence_gives_the_same(op, split):
    """A prefix, then the rest with the state carried over, backwards through both calls."""
    function = getattr(kernels, op)

    def in_two(*inputs):
        *inputs, state = inputs
        first, state = function(*(x[:, :split] for x in inputs), state)
        second, state = function(*(x[:, split:] for x in inputs), state)
        return torch.cat([first, second], 1), state

    inputs = op_inputs(op, 66, "mild")
    out_grads = torch.randn_like(inputs[2]), torch.randn_like(inputs[-1])
    expected = op_results(function, inputs, out_grads)
    assert_near(op_results(in_two, inputs, out_grads), expected, tolerances(torch.float64, expected), split)
    with torch.no_grad():                                                   # decoding
        *inputs, state = inputs
        outputs = []
        for t in range(66):
            o, state = function(*(x[:, t:t + 1] for x in inputs), state)
            outputs.append(o)
    assert_near({"o": torch.cat(outputs, 1), "state": state}, expected, {"o": 1e-10, "state": 1e-10}, "decoding")


def test_dtypes_and_refusals():
    """Outputs in another dtype, changed inputs or broadcast shapes could go unnoticed."""
    for op in ("gated_delta_rule", "gated_linear_attention"):
        *inputs, state = op_inputs(op, 20, "mild")
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            x = [y.to(dtype) for y in inputs]
            with torch.autocast("cpu", dtype=torch.bfloat16):               # must change nothing
                o, S = getattr(kernels, op)(*x)
            o2, S2 = getattr(kernels, op + "_recurrent")(*x)
            assert o.dtype == dtype and S.dtype == (dtype if dtype == torch.float64 else torch.float32)
            assert torch.allclose(S, S2, atol=1e-5) and torch.allclose(o.float(), o2.float(), atol=1e-2)
        before = [x.clone() for x in (*inputs, state)]
        getattr(kernels, op)(*inputs, state)
        assert all(torch.equal(x, y) for x, y in zip(before, (*inputs, state))), "inputs were changed"
        with pytest.raises(ValueError, match="g has shape"):
            getattr(kernels, op)(*inputs[:3], inputs[3][..., :1], *inputs[4:])
        with pytest.raises(ValueError, match="initial_state has shape"):
            getattr(kernels, op)(*inputs, state[:, :1])
        with pytest.raises(ValueError, match="no tokens"):
            getattr(kernels, op)(*(x[:, :0] for x in inputs))
    q, k, v, g = inputs
    for tokens in (20, 1):
        with pytest.raises(ValueError, match="-6 somewhere.*clamp"):
            kernels.gated_linear_attention(*(x[:, :tokens] for x in (q, k, v, g - 6 - g)))


@pytest.mark.parametrize("W", (1, 2, 4))
@pytest.mark.parametrize("per_token", (False, True), ids=("static", "per-token"))
@pytest.mark.parametrize("activation", (None, "silu"))
def test_causal_conv(W, per_token, activation):
    """Against an einsum over a window, and a split against one call, gradients included."""
    torch.manual_seed(0)
    B, T, D = 2, 11, 6
    x, cache = torch.randn(B, T, D).double(), torch.randn(B, W - 1, D).double()
    kernel = torch.randn(*((B, T, W, D) if per_token else (W, D))).double()

    def window(x, kernel, cache):
        x = torch.cat([cache, x], 1)
        y = torch.einsum("btdw,btwd->btd" if per_token else "btdw,wd->btd", x.unfold(1, W, 1), kernel)
        return F.silu(y) if activation else y, x[:, T:]

    def in_two(x, kernel, cache, at=2):
        first, rest = (kernel[:, :at], kernel[:, at:]) if per_token else (kernel, kernel)
        y, cache = kernels.causal_conv(x[:, :at], first, cache, activation)
        z, cache = kernels.causal_conv(x[:, at:], rest, cache, activation)
        return torch.cat([y, z], 1), cache

    def results(function):
        inputs = [y.clone().requires_grad_() for y in (x, kernel, cache)]
        y, new_cache = function(*inputs)
        torch.manual_seed(1)
        torch.autograd.backward((y, new_cache), [torch.randn(z.shape).double() for z in (y, new_cache)])
        return [y, new_cache, *(y.grad for y in inputs)]

    expected = results(window)
    for function in (lambda *xs: kernels.causal_conv(*xs, activation), in_two):
        for a, b in zip(results(function), expected):
            assert torch.allclose(a, b, atol=1e-12)
    y, _ = kernels.causal_conv(x.bfloat16(), kernel.bfloat16(), None, activation)
    assert y.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="kernel has shape"):
        kernels.causal_conv(x, kernel[..., :1], None, activation)


# ------------------------------------------------------------------------------------------------
# kernels.py: the Triton kernels. They run in Triton's interpreter, which has to be chosen before
# kernels.py is imported, so the bodies of these tests run in processes of their own. The
# interpreter gets bf16 wrong without a word: no bf16 here.

def in_interpreter(call):
    run = subprocess.run(
        [sys.executable, "-c", f"import test_all as t; t.torch.set_num_threads(1); t.{call}"],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


def kernel_tolerances(dtype, names, near_keys=False):
    if dtype == torch.float32:
        return {name: 2e-4 if name in ("dg", "dA_log", "ddt_bias") else 1e-5 for name in names}
    if near_keys:
        return {"o": 5e-3}
    return {name: 2e-2 if name in ("dg", "dbeta", "dA_log", "ddt_bias") else 5e-3 for name in names}


def assert_kernels_near(op, dtype, T, decay, near_keys, K, V, H, with_state):
    """On the same rounded inputs: outputs, states and every gradient."""
    inputs = [x.to(dtype if i < 3 else torch.float32) for i, x in enumerate(
        op_inputs(op, T, decay, near_keys, K=K, V=V, H=H, B=1))]
    out_grads = torch.randn_like(inputs[2]), torch.randn_like(inputs[-1])
    inputs = inputs if with_state else inputs[:-1]
    results = op_results(functools.partial(getattr(kernels, op), backend="triton"), inputs,
                         out_grads, with_state)
    expected = op_results(getattr(kernels, op + "_recurrent"), [x.double() for x in inputs],
                          out_grads, with_state)
    assert_near(results, expected, kernel_tolerances(dtype, expected, near_keys),
                f"{op} {dtype} {T=} {decay} {near_keys=} {K=} {V=} {H=} {with_state=}")


def check_kernels(op, dtype):
    # every two of T, decay, K = V or not, one head or three, with a state or without, meet
    sizes = ((16, 16, 1, True), (24, 24, 3, False), (24, 40, 1, False), (40, 24, 3, True))
    cases = [(T, ("strong", "none")[(i + j) % 2], False, *size)
             for (i, T), (j, size) in itertools.product(enumerate(LENGTHS), enumerate(sizes))]
    cases += [(T, decay, False, 8, 8, 1, True) for T in (1, 65) for decay in ("resets", "mixed")]
    cases += [(T, decay, True, 16, 24, 1, True) for T in (17, 130) for decay in ("mild", "none")]
    # K = 96 is padded to 128; in fp32 the products over 96 and 200 channels are taken in parts
    cases += [(70, "mixed", False, 96, 80, 1, True), (70, "range", False, 24, 136, 1, False),
              (20, "range", False, 200, 16, 1, True)]
    for case in cases:
        assert_kernels_near(op, dtype, *case)


@pytest.mark.parametrize("dtype", ("float32", "float16"))
@pytest.mark.parametrize("op", ("gated_delta_rule", "gated_linear_attention"))
def test_kernels_equal_the_loop(op, dtype):
    """A kernel that departs from the definition trains another model on a GPU than on a CPU."""
    in_interpreter(f"check_kernels({op!r}, t.torch.{dtype})")


def check_gates_out_of_domain():
    """On kernels: a NaN in g reaches the outputs, and GLA takes g below -5 for -5."""
    for op in ("gated_delta_rule", "gated_linear_attention"):
        kernel = functools.partial(getattr(kernels, op), backend="triton")
        q, k, v, g, *rest = (x.float() for x in op_inputs(op, 20, "mild"))
        for tokens in (20, 1):                                              # chunks, step
            bad = g[:, :tokens].clone()
            bad[:, 0] = torch.nan
            with torch.no_grad():
                outputs = kernel(*(x[:, :tokens] for x in (q, k, v)), bad,
                                 *(x[:, :tokens] for x in rest[:-1]), rest[-1])
            assert all(x.isnan().all() for x in outputs), f"{op} hides a NaN, {tokens} tokens"
    q, k, v, g, state = (x.float() for x in op_inputs("gated_linear_attention", 20, "strong"))
    for below, at in zip(kernel(q, k, v, 20 * g, state), kernel(q, k, v, g, state)):
        assert torch.equal(below, at)


def test_kernels_outside_the_domain_of_g():
    """A NaN log decay once became the strongest one, so that a diverged model looked sound."""
    in_interpreter("check_gates_out_of_domain()")


def check_decay_parameters():
    """Gradients of A_log and dt_bias under strong decay, where rounding once hid them entirely."""
    for dtype, A in itertools.product((torch.float32, torch.float16), (1.0, 20.0)):
        q, k, v, a, beta, state = (x.to(dtype if i < 3 else torch.float32) for i, x in enumerate(
            op_inputs("gated_delta_rule", 70, "none", H=2, B=1)))
        a = a + torch.randn(a.shape)
        parameters = [torch.tensor([A, 0.5 * A]).log(), torch.tensor([0.1, 0.8])]
        out_grads = torch.randn_like(v), torch.randn_like(state)

        def layer(op, wide, A_log, dt_bias):
            g = -A_log.exp() * F.softplus(a.to(wide) + dt_bias)
            return op(*(x.to(wide) if wide == torch.float64 else x for x in (q, k, v)), g,
                      beta.to(wide), state.to(wide))

        def gradients(op, wide):
            leaves = [x.to(wide).requires_grad_() for x in parameters]
            outputs = layer(op, wide, *leaves)
            grads = torch.autograd.grad(outputs, leaves,
                                        [x.to(y) for x, y in zip(out_grads, outputs)])
            return dict(zip(("dA_log", "ddt_bias"), grads))

        kernel = functools.partial(kernels.gated_delta_rule, backend="triton")
        ours = gradients(kernel, torch.float32)
        expected = gradients(kernels.gated_delta_rule_recurrent, torch.float64)
        assert_near(ours, expected, kernel_tolerances(dtype, expected), f"{dtype} {A=}")


def check_one_output():
    """Gradients where only the outputs, or only the final state, are used."""
    for op, used in itertools.product(("gated_delta_rule", "gated_linear_attention"), (0, 1)):
        inputs = [x.float() for x in op_inputs(op, 70, "mild", B=1)]

        def gradients(function, inputs):
            leaves = [x.detach().requires_grad_() for x in inputs]
            output = function(*leaves)[used]
            grads = torch.autograd.grad(output.square().sum(), leaves, allow_unused=True,
                                        materialize_grads=True)
            return dict(zip(("dq", "dk", "dv", "dg", "dbeta")[:len(inputs) - 1] + ("dstate",), grads))

        ours = gradients(functools.partial(getattr(kernels, op), backend="triton"), inputs)
        expected = gradients(getattr(kernels, op + "_recurrent"), [x.double() for x in inputs])
        assert_near(ours, expected, kernel_tolerances(torch.float32, expected), f"{op} {used=}")


def check_conv_and_step():
    for dtype, W, T, per_token, activation, cached in itertools.product(
            (torch.float32, torch.float16), (1, 2, 4), (1, 2, 33), (False, True), (None, "silu"),
            (False, True)):
        if (W + T + per_token + bool(activation) + cached) % 2:             # every two still meet
            continue
        torch.manual_seed(T)
        inputs = [x.to(dtype) for x in (
            torch.randn(2, T, 70), torch.randn(*((2, T, W, 70) if per_token else (W, 70))),
            torch.randn(2, W - 1, 70))][:3 if cached else 2]
        out_grads = torch.randn(2, T, 70), torch.randn(2, W - 1, 70)

        def results(inputs, backend):
            leaves = [x.detach().requires_grad_() for x in inputs]
            outputs = kernels.causal_conv(*leaves, *[None] * (not cached), activation, backend)
            grads = torch.autograd.grad(outputs, leaves,
                                        [x.to(y) for x, y in zip(out_grads, outputs)])
            return dict(zip(("y", "tail", "dx", "dkernel", "dcache"), (*outputs, *grads)))

        expected = results([x.double() for x in inputs], "torch")
        assert_near(results(inputs, "triton"), expected, kernel_tolerances(dtype, expected),
                    f"causal_conv {dtype} {W=} {T=} {per_token=} {activation} {cached=}")
    for dtype, op, T, K, V in itertools.product(
            (torch.float32, torch.float16), ("gated_delta_rule", "gated_linear_attention"), (1, 3),
            (8, 24), (16, 40)):
        *x, state = (y.to(dtype if i < 3 else torch.float32) for i, y in enumerate(
            op_inputs(op, T, "resets", K=K, V=V)))
        x += [None] * (len(x) < 5)
        expected = dict(zip(("o", "state"), getattr(kernels, op + "_recurrent")(
            *(y.double() for y in (*x, state) if y is not None))))
        for inplace in (False, True):
            before, version = state.clone(), state._version
            o, end = kernels.recurrent_step(*x, state, inplace=inplace, backend="triton")
            assert_near({"o": o, "state": end}, expected, kernel_tolerances(dtype, expected),
                        f"{op} {T=} {inplace=}")
            assert end is state if inplace else torch.equal(state, before), "the state was changed"
            assert (state._version > version) == inplace, "autograd must know what was overwritten"
        with torch.no_grad():                                               # how the ops decode
            o, _ = getattr(kernels, op)(*(y for y in x if y is not None), backend="triton")
        assert o.dtype == dtype


def test_decay_parameters_convolution_and_step_kernels():
    """What the grid above does not run: gates made of parameters, a lone output, other kernels."""
    in_interpreter("check_decay_parameters(); t.check_one_output(); t.check_conv_and_step()")


def check_modules(attn):
    """The same hybrid on the torch forms and on the kernels: outputs, decoding, and training. One
    layer, because the interpreter takes seconds for each."""
    model = random_model(transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 1}))
    mixers = shaken_mixers(model, attn)
    ids, launched = tokens(1, 18), []
    launch = kernels._launch
    kernels._launch = lambda kernel, *args, **kw: (launched.append(kernel),
                                                   launch(kernel, *args, **kw))

    def run(backend):
        kernels.auto_backend = lambda x, *dims: backend
        student, losses = copy.deepcopy(model), []
        for i, mixer in mixers.items():
            swap(student, i, copy.deepcopy(mixer))
        with torch.no_grad():
            prefill = student(ids[:, :12], use_cache=True)
            step = student(ids[:, 12:13], past_key_values=prefill.past_key_values)
        student.requires_grad_(True)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        for _ in range(20):
            loss = student(ids, labels=ids, use_cache=False).loss
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return prefill.logits, step.logits, losses

    *outputs, losses = run("torch")
    assert not launched
    *ours, our_losses = run("triton")
    assert kernels._step in launched and (kernels._gla_gradients if attn == "gla" else
                                          kernels._delta_gradients) in launched
    for x, y in zip(ours, outputs):
        assert relative(x, y) <= 1e-5
    assert losses[-1] < 0.9 * losses[0]
    assert max(abs(x - y) for x, y in zip(our_losses, losses)) <= 1e-4


@pytest.mark.parametrize("attn", MIXERS)
def test_modules_mean_the_same_on_kernels(attn):
    """A mixer that hands its kernel other inputs than the torch form would be another model."""
    in_interpreter(f"check_modules({attn!r})")


def check_backend_refusals():
    *x, state = (y.float() for y in op_inputs("gated_delta_rule", 3, "mild", K=16))
    wide = [y.float() for y in op_inputs("gated_delta_rule", 3, "mild", K=264)]
    for wrong, words in (([y.double() for y in (*x, state)], "not torch.float64"), (wide, "264")):
        with pytest.raises(ValueError, match=words):
            kernels.gated_delta_rule(*wrong, backend="triton")
    with pytest.raises(ValueError, match="inplace needs"):
        kernels.recurrent_step(*x, None, inplace=True)


def test_backends_are_refused_or_left_alone(monkeypatch):
    """On a CPU "auto" never launches a kernel, and "triton" is refused outside the interpreter."""
    monkeypatch.setattr(kernels, "_launch", lambda *args, **kw: pytest.fail("launched a kernel"))
    monkeypatch.setattr(kernels, "_INTERPRETED", False)
    x = op_inputs("gated_delta_rule", 3, "mild")
    conv = torch.randn(1, 5, 8), torch.randn(4, 8), None, "silu"
    gla = op_inputs("gated_linear_attention", 3, "mild")
    for op, args in ((kernels.gated_delta_rule, x), (kernels.recurrent_step, x),
                     (kernels.gated_linear_attention, gla), (kernels.causal_conv, conv)):
        args = [y.float() if isinstance(y, torch.Tensor) else y for y in args]
        op(*args)
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            op(*args, backend="triton")
        with pytest.raises(ValueError, match="expected 'auto', 'torch' or 'triton'"):
            op(*args, backend="cuda")
    in_interpreter("check_backend_refusals()")


def test_torch_compile_breaks_once_per_op():
    """Traced, one op would become many small graphs, each compiled anew for every length."""
    weight = torch.randn(32, 32, requires_grad=True)

    def layer(x):
        q = F.normalize((x @ weight).view(1, 40, 2, 16), dim=-1)
        o, _ = kernels.gated_delta_rule(q, q, q, -q[..., 0].sigmoid(), q[..., 1].sigmoid())
        o, _ = kernels.gated_linear_attention(q, q, o, -q.sigmoid())
        y, _ = kernels.causal_conv(o.flatten(2), torch.ones(4, 32), None, "silu")
        return (y @ weight).sum()

    x = torch.randn(1, 40, 32)
    assert torch._dynamo.explain(layer)(x).graph_break_count == 3
    compiled = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(layer(x), weight),
                               torch.autograd.grad(compiled(x), weight))


def check_without_triton():
    """Everything but the kernels; called where `import triton` fails."""
    assert kernels.triton is None
    for op in ("gated_delta_rule", "gated_linear_attention"):
        test_chunks_equal_the_loop_at_other_head_dims(op, 8, 8)
    test_causal_conv(4, True, "silu")
    with pytest.raises(ValueError, match="triton is not installed"):
        kernels.gated_delta_rule(*op_inputs("gated_delta_rule", 3, "mild"), backend="triton")


def test_all_else_works_without_triton():
    """Where triton has no wheel, as on macOS, the project must still import and run."""
    block = "import sys; sys.modules['triton'] = None; "
    run = subprocess.run(
        [sys.executable, "-c", block + "import test_all; test_all.check_without_triton()"],
        cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    run = subprocess.run([sys.executable, "-c", block + "import runpy; sys.argv = ['kernels.py']; "
                          "runpy.run_path('kernels.py', run_name='__main__')"],
                         cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "pip install triton" in run.stderr


def kernels_script(*flags):
    return subprocess.run([sys.executable, "kernels.py", *flags], cwd=ROOT, capture_output=True,
                          text=True)


def test_kernels_script_checks_itself_on_a_cpu():
    """The one command that a GPU user runs first must not fail before a GPU is paid for."""
    run = kernels_script()
    result = json.loads(run.stdout.splitlines()[-1])
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert result["failures"] == 0 < result["checked"]
    if not torch.cuda.is_available():
        assert 'backend "auto" selects: torch' in run.stdout and "No GPU here" in run.stdout


def test_kernels_script_fails_on_wrong_kernels(tmp_path):
    """A check that cannot fail is worthless: here GLA's products are off by one part in ten, and no
    final state is written. Unwritten memory often holds the right answer of the last call."""
    source = (ROOT / "kernels.py").read_text()
    store = "    _store(end + bh * K * V, state, keys, cols, V, K, V)\n"
    assert source.count("Pc * K ** -0.5") == 1 and source.count(store) == 2     # _scan's, _step's
    source = source.replace("Pc * K ** -0.5", "1.1 * Pc * K ** -0.5").replace(store, "", 1)
    (tmp_path / "kernels.py").write_text(source)
    run = subprocess.run([sys.executable, tmp_path / "kernels.py"], capture_output=True, text=True)
    assert run.returncode == 1 and json.loads(run.stdout.splitlines()[-1])["failures"] > 0
    for op, failed in (("linear_attention", "FAILED o: "),
                       ("linear_attention", "; state: rms error nan"),
                       ("delta_rule", "FAILED state: rms error nan")):
        assert re.search(f"{op}.*{failed}", run.stdout), (op, failed)


def test_hopper_gets_a_ptxas_that_compiles_the_kernels_right():
    """On an H200 the ptxas 12.8 that Triton runs by itself gave wrong gradients without a word."""
    block = ("import kernels, triton; kernels._use_sound_ptxas(); "
             "from triton.backends.nvidia import compiler as c; "
             "print(c.get_ptxas(90).version, c.get_ptxas_version(90))")
    run = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True)
    assert tuple(map(int, run.stdout.split()[0].split("."))) >= (13, 1), run.stderr
    assert f"release {run.stdout.split()[0]}" in run.stdout
    usual = Path(kernels.triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    run = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True,
                         env={**os.environ, "TRITON_PTXAS_PATH": str(usual)})
    assert "RuntimeError: ptxas 12.8 compiles these kernels wrongly for Hopper" in run.stderr


def recorded_launches(arch, monkeypatch):
    """(kernel, arguments, constants) of all launches of the ops, for what _config chooses by:
    dtype, padded K, V of less than a block of columns, one and many, few heads or many. Then K and V that
    differ from their padding, and sizes that nothing divides. The tensors have no data."""
    launches = []
    monkeypatch.setattr(kernels, "_capability", lambda device: arch // 10)
    monkeypatch.setattr(kernels, "_launch", lambda kernel, grid, *args, **constants:
                        launches.append((kernel, args, constants)))
    tensor = lambda *shape, dtype=torch.float32: torch.empty(
        shape, dtype=dtype, device="meta", requires_grad=True)
    fp32, fp16, bf16 = kernels.KERNEL_DTYPES
    sizes = [(bf16, 4096, H, K, V) for H in (16, 512) for K in (16, 64, 128, 256)
             for V in (16, 64, 256)]
    sizes += [(fp32, 4096, 16, K, 64) for K in (16, 32, 64, 128, 256)]
    for dtype, T, H, K, V in (*sizes, (bf16, 4096, 16, 32, 32), (fp16, 4096, 16, 128, 128),
                              (bf16, 4096, 12, 96, 256), (bf16, 4001, 3, 100, 200)):
        q, k, v = (tensor(1, T, H, D, dtype=dtype) for D in (K, K, V))
        g, beta, state = tensor(1, T, H), tensor(1, T, H), tensor(1, H, K, V)
        for gates in ((g, beta), (tensor(1, T, H, K), None)):
            outputs = kernels._run_kernels(q, k, v, *gates, state)
            torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
            kernels._run_step(q[:, :1], k[:, :1], v[:, :1],
                              *(x if x is None else x[:, :1] for x in gates), state, None)
    for dtype in (bf16, fp32):
        x, cache = tensor(2, 4096, 1024, dtype=dtype), tensor(2, 3, 1024, dtype=dtype)
        outputs = [kernels._ConvKernels.apply(x, tensor(*shape, 1024, dtype=dtype), cache, "silu")
                   for shape in ((4,), (2, 4096, 4))]
        x = x.unflatten(2, (8, 128))
        outputs += [kernels._NormKernels.apply(x, weight, gate, 1e-5, 1.0)
                    for weight, gate in ((None, None), (tensor(128), x))]
        torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    return launches


def compile_job(kernel, args, constants, arch):
    """A launch as what triton.compile takes, all of it picklable: the signature, the constants, the
    places of arguments divisible by 16, the options. As in a launch, a 1 counts as a constant."""
    types = dict(zip((*kernels.KERNEL_DTYPES, int, float),
                     ("*fp32", "*fp16", "*bf16", "i32", "fp32")))
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    values = dict(zip(kernel.arg_names, args))
    constants = {name: x for name, x in constants.items() if name not in options}
    constants |= {name: x for name, x in values.items() if x is None or type(x) is int and x == 1}
    signature = {name: "constexpr" if name in constants else
                 types[getattr(values[name], "dtype", type(values[name]))]
                 for name in kernel.arg_names}
    divisible = [i for i, (name, kind) in enumerate(signature.items()) if kind[0] == "*"
                 or kind == "i32" and values[name] % 16 == 0]
    return kernel.__name__, signature, constants, divisible, options, arch


def compiled(job):
    """What the compiler and the assembler say about a kernel; ptxas as by _use_sound_ptxas."""
    name, signature, constants, divisible, options, arch = job
    from triton.backends.compiler import GPUTarget
    tools, triton = kernels.triton.knobs.nvidia, kernels.triton
    source = triton.compiler.ASTSource(getattr(kernels, name), signature, constants,
                                       {(i,): [["tt.divisibility", 16]] for i in divisible})
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptxas = tools.ptxas if arch < 90 else tools.ptxas_blackwell
    said = subprocess.run([ptxas.path, "-v", f"--gpu-name=sm_{arch}" + "a" * (arch >= 90), "-o",
                           os.devnull, "/dev/stdin"], input=kernel.asm["ptx"],
                          capture_output=True, text=True).stderr
    found = lambda words: max(int(x) for x in re.findall(words, said))
    return dict(kernel=name, arch=arch, inputs=next(iter(signature.values())), constants=constants,
                options=options, registers=found(r"Used (\d+)"),
                spilled=found(r"(\d+) bytes spill"), shared_kb=kernel.metadata.shared / 1024,
                matrix=[x for x in ("wgmma", "mma.sync") if x in kernel.asm["ptx"]])


@pytest.mark.parametrize("arch, shared_kb, matrix", ((80, 163, "mma.sync"), (90, 227, "wgmma")))
def test_kernels_compile_without_spills(arch, shared_kb, matrix, monkeypatch):
    """A kernel that outgrows an A100 or H100 would be slow or fail there, which no CPU run shows."""
    jobs = [compile_job(*launch, arch) for launch in recorded_launches(arch, monkeypatch)]
    with concurrent.futures.ProcessPoolExecutor() as pool:
        for row in pool.map(compiled, {str(job): job for job in jobs}.values()):    # each once
            assert row["spilled"] <= 64 and row["shared_kb"] <= shared_kb, row
            products = row["inputs"] != "*fp32" and not row["kernel"].startswith(
                ("_step", "_conv", "_norm"))
            assert row["matrix"][:1] == [matrix] * products, row


def test_kernels_script_refuses_and_teaches():
    """A typing error in a flag would cost a run on a GPU."""
    for flags, words in ((["--fast"], "--fast"), (["--cs", "kernels.csv"], "--cs"),
                         (["--csv", "nowhere/kernels.csv"], "there is no folder")):
        run = kernels_script(*flags)
        assert run.returncode == 2 and run.stderr.count("\n") == 1 and words in run.stderr
    run = kernels_script("--help")
    assert run.returncode == 0 and "python kernels.py --csv" in run.stdout
    for flag in re.findall(r"--([a-z]+)", run.stdout.split("options:")[1]):
        assert flag == "help" or f"args.{flag}" in (ROOT / "kernels.py").read_text(), flag


# ------------------------------------------------------------------------------------------------
# linear_attn.py: inheritance

@pytest.mark.parametrize("family", FAMILIES)
def test_inherited_projections_are_the_teachers_q_k_v(family):
    """q, k and v, key/value heads repeated, equal what the family's own attention computes. At
    position 0 RoPE is the identity, so every token is given position 0."""
    model, seen = random_model(FAMILIES[family]()), {}

    def record(module, query, key, value, *args, **kwargs):
        groups = query.shape[1] // key.shape[1]
        seen[module.layer_idx] = [x.transpose(1, 2).flatten(2) for x in (
            query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))]
        return torch.zeros_like(query).transpose(1, 2), None

    transformers.AttentionInterface.register("record", record)
    inputs = {}
    for i, attn in enumerate(attention_modules(model)):
        attn.register_forward_pre_hook(
            lambda m, a, k, i=i: inputs.__setitem__(i, a[0] if a else k["hidden_states"]),
            with_kwargs=True)
    model.config._attn_implementation = "record"
    model(tokens(2, 7), position_ids=torch.zeros(2, 7, dtype=torch.long), use_cache=False)
    for i, attn in enumerate(attention_modules(model)):
        mixer = MIXERS["gla"].from_attention(attn, model.config, i)
        q, k, v = mixer.project(inputs[i])
        if family == "opt":                         # OPT scales q before its attention function
            q = q * attn.scaling
        for ours, teachers in zip((q, k, v), seen[i]):
            assert relative(ours, teachers) < 1e-5
        wanted = linear_attn.teacher_projections(attn, model.config)[3]
        assert torch.equal(mixer.o_proj.weight, wanted.weight)
        assert (mixer.o_proj.bias is None) == (wanted.bias is None)


@pytest.mark.parametrize("layout", FALCONS)
def test_falcon_is_inherited_in_its_three_layouts(layout):
    """Each fuses q, k and v in an order of its own; Falcon itself says which rows are whose."""
    model = random_model(FALCONS[layout]())
    attn, x = attention_modules(model)[0], torch.randn(2, 7, 32)
    mixer = MIXERS["gla"].from_attention(attn, model.config, 0)
    for ours, theirs in zip(mixer.project(x), attn._split_heads(attn.query_key_value(x))):
        assert relative(ours.unflatten(-1, (4, 8)), theirs.expand(2, 7, 4, 8)) < 1e-5


def test_norms_per_head_are_not_taken_for_layers():
    """StableLM has a list of norms in its attention, as long as the list of layers where it has
    as many heads as layers."""
    config = transformers.StableLmConfig(**{**SMALL, "num_hidden_layers": 4}, qk_layernorm=True)
    model = random_model(config)
    assert linear_attn.decoder_layers(model) is model.model.layers
    assert len(attention_modules(model)) == 4


def test_repeated_heads_follow_repeat_kv():
    from transformers.models.llama.modeling_llama import repeat_kv
    x = torch.randn(2, 5, 3 * 8)                                        # 3 key/value heads of 8
    repeated = repeat_kv(x.view(2, 5, 3, 8).transpose(1, 2), 4)         # [B, 12, T, 8]
    ours = linear_attn.repeat_heads(x.movedim(-1, 0), 12, 8).movedim(0, -1)
    assert torch.equal(ours, repeated.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("attn", MIXERS)
@pytest.mark.parametrize("init", ("inherit", "random"))
def test_every_parameter_learns_and_the_seed_decides(attn, init):
    """No parameter starts with a gradient of zero for ever (two zeroed factors would), and the
    start depends on the seed and the layer alone, not on the global generator."""
    model = random_model(FAMILIES["qwen2"]())
    make = lambda seed, layer: MIXERS[attn].from_attention(
        attention_modules(model)[layer], model.config, layer, init, seed)
    torch.manual_seed(5)
    mixer, again = make(1, 0), make(1, 0)
    other = make(2, 0)
    assert all(torch.equal(a, b) for a, b in zip(mixer.parameters(), again.parameters()))
    differs = any(not torch.equal(a, b) for a, b in zip(mixer.parameters(), other.parameters()))
    assert differs == (init == "random" or attn != "gdn")       # an inherited gdn draws nothing
    optimizer = torch.optim.SGD(mixer.parameters(), lr=0.1)
    x, target = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    ever = {name: False for name, _ in mixer.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(mixer(x)[0], target).backward()
        ever = {n: ever[n] or bool(p.grad.abs().max() > 0) for n, p in mixer.named_parameters()}
        optimizer.step()
    assert all(ever.values()), [n for n, learns in ever.items() if not learns]


def test_layouts_that_are_not_understood_are_refused_for_inherit():
    config = transformers.CodeGenConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    model = random_model(config)
    attn = attention_modules(model)[0]
    with pytest.raises(UserError, match="--init random"):
        MIXERS["gdn"].from_attention(attn, config, 0)
    mixer = MIXERS["gdn"].from_attention(attn, config, 0, init="random")
    swap(model, 0, mixer)
    assert model(tokens(1, 5)).logits.isfinite().all()
    with pytest.raises(UserError, match="init must be"):
        MIXERS["gdn"].from_attention(attn, config, 0, init="warm")


@pytest.mark.parametrize("config", (
    transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    transformers.MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4),
    transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)),
    ids=lambda c: c.model_type)
def test_models_that_do_not_fit_are_named(config):
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=type(model).__name__):
        attention_modules(model)


# ------------------------------------------------------------------------------------------------
# linear_attn.py: cache, padding, generation

def replaced_sets(model):
    return [(1,), (0, 2), tuple(range(len(attention_modules(model))))]


@pytest.mark.parametrize("attn", MIXERS)
@pytest.mark.parametrize("family", DECODED)
def test_decoding_with_cache_and_left_padding(family, attn):
    """Logits of a chunked prefill and of one-token steps equal one call without a cache, and a
    left-padded batch equals its rows one by one; layer 0 replaced or not, all replaced."""
    model = random_model(FAMILIES[family](), scale=3.0)
    mixers = shaken_mixers(model, attn)
    ids, plain = tokens(2, 12), random_model(FAMILIES[family](), scale=3.0)(tokens(2, 12)).logits
    for layers in replaced_sets(model):
        with replace.replaced(model, mixers, layers):
            whole = model(ids, use_cache=False).logits
            assert relative(whole, plain) > 0.05        # else this test could not fail
            cache, parts = None, []
            for piece in ids.split([5, 3, 1, 1, 1, 1], dim=1):
                out = model(piece, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
            assert relative(torch.cat(parts, 1), whole) < 1e-4
            padded, mask = ids.clone(), torch.ones_like(ids)
            padded[1, :4], mask[1, :4] = 0, 0
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            batch = model(padded, attention_mask=mask, position_ids=positions).logits
            alone = model(ids[1:, 4:], use_cache=False).logits
            assert relative(batch[1:, 4:], alone) < 1e-4
            assert relative(batch[:1], whole[:1]) < 1e-4
    assert relative(model(ids).logits, plain) == 0      # taken out again by reference


@pytest.mark.parametrize("attn", MIXERS)
def test_generation_modes(attn):
    """Greedy, beam and padded generation give the tokens of decoding without a cache."""
    model = random_model(FAMILIES["llama"](), scale=3.0)
    mixers, ids = shaken_mixers(model, attn), tokens(2, 9)
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    limits = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for layers in replaced_sets(model):
        with replace.replaced(model, mixers, layers):
            cached = model.generate(ids, use_cache=True, **limits)
            assert torch.equal(cached, model.generate(ids, use_cache=False, **limits))
            beams = model.generate(ids, num_beams=3, use_cache=True, **limits)
            assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **limits))
            row = model.generate(ids[1:, 3:], max_new_tokens=6, do_sample=False, pad_token_id=0)
            assert torch.equal(row[0, 6:], cached[1, 9:])


@pytest.mark.parametrize("attn", MIXERS)
@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
def test_padding_changes_nothing_for_real_tokens(attn, implementation):
    """The module alone, every form of mask, padding left and right, batch of one included."""
    model = random_model(FAMILIES["qwen2"](), scale=2.0)
    mixer = shaken_mixers(model, attn)[1]
    x, garbage = torch.randn(1, 8, 32), 50 * torch.randn(1, 5, 32)
    alone = mixer(x)[0]
    for left in (True, False):
        padded = torch.cat([garbage, x] if left else [x, garbage], 1)
        real = slice(5, None) if left else slice(0, 8)
        mask = torch.zeros(1, 13, dtype=torch.long)
        mask[:, real] = 1
        causal = torch.ones(13, 13).tril().bool() & mask.bool()[:, None, None, :]
        if implementation == "eager":
            causal = torch.zeros(1, 1, 13, 13).masked_fill(~causal, torch.finfo(torch.float).min)
        for form in (mask, mask.bool(), causal):
            assert relative(mixer(padded, attention_mask=form)[0][:, real], alone) < 1e-5
    assert relative(mixer(torch.cat([garbage, x], 1))[0][:, 5:], alone) > 0.01


@pytest.mark.parametrize("attn", MIXERS)
@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
def test_padding_may_stand_anywhere_and_come_in_pieces(attn, implementation):
    """Real tokens read as those of the row alone, padding before, between and behind them (the
    second turn of a batched chat), whole or in pieces of any size: a convolution's taps and tail
    hold real tokens, and a piece of one padded token writes no state."""
    model = random_model(FAMILIES["qwen2"](), scale=3.0)
    model.set_attn_implementation(implementation)
    ids, mask = tokens(4, 14), torch.ones(4, 14, dtype=torch.long)
    mask[0, :5] = mask[1, 4:9] = mask[2, 11:] = mask[3, [0, 2, 3, 5, 6, 7, 13]] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with replace.replaced(model, shaken_mixers(model, attn), (0, 1, 2)):
        for sizes in ([14], [9, 5], [1] * 14, [5, 1, 3, 1, 4]):
            cache, parts, start = transformers.DynamicCache(), [], 0
            for piece, where in zip(ids.split(sizes, 1), positions.split(sizes, 1)):
                start += piece.shape[1]
                out = model(piece, attention_mask=mask[:, :start], position_ids=where,
                            past_key_values=cache, use_cache=len(sizes) > 1)
                parts.append(out.logits)
            for row, logits, real in zip(ids, torch.cat(parts, 1), mask.bool()):
                alone = model(row[real].unsqueeze(0), use_cache=False).logits
                assert relative(logits[real], alone[0]) < 1e-4, sizes


@pytest.mark.parametrize("attn", MIXERS)
def test_padded_prompts_may_be_read_in_chunks(attn):
    model = random_model(FAMILIES["llama"](), scale=3.0)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    limits = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    with replace.replaced(model, shaken_mixers(model, attn), (0, 2)):
        whole = model.generate(ids, **limits)
        for size in (1, 2):
            assert torch.equal(model.generate(ids, prefill_chunk_size=size, **limits), whole)


@pytest.mark.parametrize("attn", MIXERS)
@pytest.mark.parametrize("family", ("llama", "gpt_neox", "gpt2"))
def test_packed_documents_do_not_see_each_other(family, attn):
    """Positions that restart inside a row (SFTTrainer(packing=True)), documents shorter than the
    convolution included: outputs and gradients are those of each document alone."""
    model = random_model(FAMILIES[family](), scale=3.0)
    mixers, lengths = shaken_mixers(model, attn), (5, 1, 2, 7, 3)
    ids = tokens(2, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    mixers[0].requires_grad_(True)
    with replace.replaced(model, mixers, (0, 1, 2)):
        grads = []
        for pieces in ([(ids, positions)], zip(ids.split(lengths, 1), positions.split(lengths, 1))):
            logits = torch.cat([model(i, position_ids=p, use_cache=False).logits
                                for i, p in pieces], 1)
            logits.logsumexp(-1).sum().backward()
            grads.append((logits.detach(), mixers[0].q_proj.weight.grad,
                          mixers[0].v_proj.weight.grad))
            mixers[0].zero_grad()
        assert all(relative(packed, alone) < 1e-4 for packed, alone in zip(*grads))


@pytest.mark.parametrize("attn", MIXERS)
def test_flash_attention_packs_by_positions(attn):
    """It gets no mask for packed documents; a mixer beside it reads the positions."""
    model = random_model(FAMILIES["llama"](), scale=3.0)
    mixer, x = shaken_mixers(model, attn)[0], torch.randn(1, 9, 32)
    mixer.config._attn_implementation = "flash_attention_2"
    packed = mixer(x, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]]))[0]
    assert relative(packed, torch.cat([mixer(part)[0] for part in x.split((4, 2, 3), 1)], 1)) < 1e-5
    assert torch.equal(mixer(x, position_ids=torch.arange(9)[None])[0], mixer(x)[0])


def test_a_cache_is_known_under_every_name():
    """The name differs by family and version; under one not known here it must not be ignored."""
    model = random_model(FAMILIES["llama"]())
    mixer, x = shaken_mixers(model, "gdn")[0], torch.randn(1, 5, 32)
    for name in linear_attn.CACHE_NAMES:
        cache = transformers.DynamicCache()
        mixer(x, **{name: cache})
        assert cache.get_seq_length() == 5
    with pytest.raises(ValueError, match="unknown name 'memory'"):
        mixer(x, memory=cache)


def test_caches_that_cannot_work_are_refused():
    model = random_model(FAMILIES["llama"]())
    mixers, ids = shaken_mixers(model, "gdn"), tokens(1, 6)
    cache = model(ids, use_cache=True).past_key_values
    with replace.replaced(model, mixers, (1,)):
        with pytest.raises(ValueError, match="already holds keys"):
            model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="static cache"):
            model.generate(ids, max_new_tokens=2, cache_implementation="static")
        hybrid_cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(RuntimeError, match="rolled back"):
            hybrid_cache.crop(-1)
    with pytest.raises(RuntimeError, match="make a new cache"):
        model(ids, past_key_values=hybrid_cache)
    config = linear_attn.HybridLlamaConfig(**SMALL, linear_layers=[0])
    hybrid = linear_attn.HybridLlamaForCausalLM(config)
    with pytest.raises(UserError, match="continuous batching"):
        hybrid.generate_batch(ids.tolist(), max_new_tokens=2)
    with pytest.raises(UserError, match="continuous batching"):     # as its pages reach a mixer
        mixers[1](torch.zeros(1, 4, 32), past_key_values=object())


@pytest.mark.parametrize("attn, channels", (("gla", 0), ("gdn", 3 * 32), ("jet", 32)))
def test_bytes_of_a_linear_layers_memory(attn, channels):
    """H D D fp32 numbers and the convolution's tail, W - 1 inputs of its channels, after any number
    of tokens; a softmax layer keeps 2 kv_heads D numbers of every token."""
    model = random_model(FAMILIES["llama"]()).bfloat16()
    swap(model, 1, shaken_mixers(model, attn)[1])
    for length in (8, 24):
        layers = model(tokens(2, length)).past_key_values.layers
        linear = [t for t in (layers[1].recurrent, layers[1].conv) if t is not None]
        softmax = layers[0].keys, layers[0].values
        size = lambda tensors: sum(t.nbytes for t in tensors)
        assert size(linear) == 2 * (4 * 8 * 8 * 4 + (linear_attn.CONV_SIZE - 1) * channels * 2)
        assert size(softmax) == 2 * length * (2 * 2 * 8 * 2)


# ------------------------------------------------------------------------------------------------
# linear_attn.py: a hybrid is an ordinary checkpoint

EXPERTS = dict(num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
               moe_intermediate_size=16, shared_expert_intermediate_size=16, n_group=1,
               topk_group=1)
SAVED = FAMILIES | {f"falcon_{layout}": make for layout, make in FALCONS.items()} | {
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, **EXPERTS),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**SMALL, **EXPERTS),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SMALL, **EXPERTS),
    "olmoe": lambda: transformers.OlmoeConfig(**SMALL, **EXPERTS),
    "granitemoe": lambda: transformers.GraniteMoeConfig(**SMALL, **EXPERTS),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(**SMALL, **EXPERTS),
    "phimoe": lambda: transformers.PhimoeConfig(**SMALL, **EXPERTS),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4}, **EXPERTS, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8),
    "olmo2": lambda: transformers.Olmo2Config(**SMALL),
    "gemma3": lambda: transformers.Gemma3Config(        # text inside a model that also sees
        text_config={**SMALL, "head_dim": 16}, mm_tokens_per_image=1, image_token_index=60,
        boi_token_index=61, eoi_token_index=62, vision_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            image_size=16, patch_size=8)),
}
EVERY_MIXER = (*DECODED, "mixtral")
PAIRS = (("gla", "gdn"), ("jet", "gdn"), ("gla", "jet"))        # of the mixers in layers 0 and 2
SAVED_CASES = [(family, pair) for i, family in enumerate(SAVED)
               for pair in (PAIRS[:2] if family in EVERY_MIXER else PAIRS[i % 3: i % 3 + 1])]

FOREIGN = """
import pathlib, sys, torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
transformers.logging.set_verbosity_error()

def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **kwargs)

def refusal(path, **kwargs):
    try:
        load(path, **kwargs)
    except ValueError as error:
        return str(error)

def outputs(path):
    ids, mask = torch.load(path / "inputs.pt")
    (model, info), other = load(path, output_loading_info=True), load(path)
    assert not any(len(v) for v in info.values()), info
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), "two loads differ"
    model.save_pretrained(path / "again")
    again = load(path / "again")
    return {"logits": model(ids).logits, "padded": model(ids, attention_mask=mask).logits,
            "again": again(ids, attention_mask=mask).logits,
            "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
            "tokens": model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False,
                                     pad_token_id=0)}

def refusals(path):
    file, says = path / "model.safetensors", {}
    whole = load_file(file)
    try:
        AutoModelForCausalLM.from_pretrained(path)
    except ValueError:
        says["code"] = "not run"
    says["tp"] = refusal(path, tp_plan="auto")
    first, *rest = whole
    for kind, tensors in (("missing", {k: whole[k] for k in rest}),
                          ("unexpected", {**whole, "odd": whole[first].clone()})):
        save_file(tensors, file, metadata={"format": "pt"})
        says[kind] = refusal(path)
    save_file(whole, file, metadata={"format": "pt"})
    assert load(path, dtype=torch.bfloat16)(torch.tensor([[1, 2]])).logits.isfinite().all()
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    return says

cases = sorted(pathlib.Path(sys.argv[1]).glob("*/inputs.pt"))
for path in (case.parent for case in cases):
    try:
        found = outputs(path)
    except Exception as error:
        found = {"error": repr(error)}
    torch.save(found, path / "outputs.pt")
torch.save(refusals(cases[0].parent), cases[0].parent.parent / "refusals.pt")
assert "linear_attn" not in sys.modules
"""


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Hybrids of many families, saved, and what a program gets from them that knows nothing of this
    project: (directory, {case: what the hybrid itself gives}). Their bases come from checkpoints,
    as real ones do: it is there that their key names differ. A decoy package named kernels must
    not be used."""
    path, expected = tmp_path_factory.mktemp("saved"), {}
    for family, pair in SAVED_CASES:
        random_model(SAVED[family](), scale=2.0).save_pretrained(path / "base")
        model = transformers.AutoModelForCausalLM.from_pretrained(path / "base").eval()
        init = "random" if family in ("phi", "deepseek_v3") else "inherit"
        for layer, attn in zip((0, 2), pair):
            swap(model, layer, shaken_mixers(model, attn, init)[layer])
        ids, mask = tokens(2, 9).clamp(max=59), torch.ones(2, 9, dtype=torch.long)
        mask[0, :3] = 0
        linear_attn.save_hybrid(model, path / f"{family}-{'-'.join(pair)}")
        torch.save((ids, mask), path / f"{family}-{'-'.join(pair)}" / "inputs.pt")
        with torch.no_grad():
            expected[family, pair] = {
                "logits": model(ids).logits, "padded": model(ids, attention_mask=mask).logits,
                "again": model(ids, attention_mask=mask).logits,
                "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
                "tokens": model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False,
                                         pad_token_id=0)}
    (path / "kernels").mkdir()
    (path / "kernels" / "__init__.py").write_text("causal_conv = gated_delta_rule = None\n")
    run = subprocess.run([sys.executable, "-c", FOREIGN, str(path)], cwd=path, capture_output=True,
                         text=True, stdin=subprocess.DEVNULL,
                         env={**os.environ, "HF_HOME": str(path / "hf"), "PYTHONPATH": ""})
    assert run.returncode == 0, run.stderr[-2000:]
    return path, expected


@pytest.mark.parametrize("family, pair", SAVED_CASES)
def test_saved_hybrid_loads_where_the_project_is_unknown(family, pair, saved):
    """Two loads and a second save give equal bits, and the logits and the cached text of a
    left-padded batch are the hybrid's own. Bases whose files have other key names (GPT-NeoX, most
    mixtures of experts) came back with random weights."""
    path, expected = saved
    found = torch.load(path / f"{family}-{'-'.join(pair)}" / "outputs.pt")
    assert "error" not in found, found
    for name, value in expected[family, pair].items():
        assert found[name] == value if name == "tied" else torch.equal(found[name], value), name


def test_a_hybrid_that_does_not_fit_is_refused_where_the_project_is_unknown(saved):
    """transformers itself would draw missing tensors at random and go on, cut a linear layer into
    ranks, or build a plain model where the code in the checkpoint is not run."""
    says = torch.load(saved[0] / "refusals.pt")
    assert says["code"] == "not run" and "tensor-parallel" in says["tp"]
    assert "(missing lm_head.weight, " in says["missing"]
    assert "(unexpected odd, 1 in all)" in says["unexpected"]


def test_a_damaged_hybrid_is_refused(lab, tmp_path, monkeypatch, capsys):
    """load_hybrid and eval.py name what a checkpoint lacks; a base that lacks a tensor is refused
    as well. A config of one mixer for all layers, as older hybrids have, still loads."""
    model, tokenizer = load_lab_model(lab)
    base, path = tmp_path / "base", tmp_path / "hybrid"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    with replace.replaced(model, shaken_mixers(model, "gdn"), (1, 2)):
        linear_attn.save_hybrid(model, path, tokenizer)
        logits = model(tokens(1, 5)).logits
    config = json.loads((path / "config.json").read_text())
    assert config["linear_attn"] == ["gdn", "gdn"]
    (path / "config.json").write_text(json.dumps(
        {**config, "linear_attn": "gdn", "linear_init": "inherit"}))
    assert torch.equal(linear_attn.load_hybrid(path)(tokens(1, 5)).logits, logits)
    for folder in (base, path):
        whole = load_file(folder / "model.safetensors")
        del whole["model.layers.1.mlp.up_proj.weight"]
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
        code, _, err = call(command("eval.py", model=folder, task=lab / "val.jsonl"), monkeypatch,
                            capsys)
        assert code == 2 and "model.layers.1.mlp.up_proj.weight" in err.splitlines()[-1], err
    with pytest.raises(UserError, match="missing model.layers.1.mlp.up_proj.weight, 1 in all"):
        linear_attn.load_hybrid(path)


@pytest.mark.parametrize("what", ("chat", "tune"))
def test_readme_chats_and_fine_tunes(what, lab, tmp_path):
    """README's lines, run in another process on a small hybrid; the tuned one loads and differs."""
    if not importlib.util.find_spec("peft"):
        pytest.skip("peft is not installed")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    code, = (block for block in blocks if ("peft" in block) == (what == "tune"))
    model, tokenizer = load_lab_model(lab)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with replace.replaced(model, shaken_mixers(model, "jet"), (1, 2)):
        linear_attn.save_hybrid(model, tmp_path / "runs" / "jet-pubmedqa" / "opt", tokenizer)
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                         env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""})
    assert run.returncode == 0, run.stderr[-2000:]
    if what == "chat":
        assert run.stdout.strip()
    else:
        before, after = (linear_attn.load_hybrid(tmp_path / "runs" / name)(tokens(1, 5)).logits
                         for name in ("jet-pubmedqa/opt", "tuned"))
        assert after.isfinite().all() and not torch.equal(before, after)


def test_a_model_without_mixers_is_saved_as_the_base(tmp_path):
    model = random_model(FAMILIES["llama"]())
    linear_attn.save_hybrid(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(loaded(tokens(1, 5)).logits, model(tokens(1, 5)).logits)


# ------------------------------------------------------------------------------------------------
# A small laboratory for the scripts: a random Llama, a corpus, items

@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    path = tmp_path_factory.mktemp("lab")
    model = random_model(transformers.LlamaConfig(
        **{**SMALL, "num_hidden_layers": 4}, max_position_embeddings=64), scale=2.0)
    model.save_pretrained(path / "model")
    evaluation.demo_tokenizer().save_pretrained(path / "model")
    rng = random.Random(0)
    text = lambda n: evaluation.demo_text(rng.randrange(64) for _ in range(n))
    write_rows(path / "corpus.jsonl", [{"text": text(40)} for _ in range(60)])
    for name, n in (("val", 24), ("test", 16)):
        write_rows(path / f"{name}.jsonl", [
            {"context": text(rng.randint(3, 9)), "gold": rng.randrange(3),
             "choices": [text(rng.randint(1, 3)) for _ in range(3)]} for _ in range(n)])
    write_rows(path / "generate.jsonl", [
        {"prompt": text(rng.randint(3, 9)), "answer": text(1), "stop": ["t7"], "max_tokens": 5}
        for _ in range(10)])
    return path


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(script, **flags):
    words = [script]
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def distill_command(lab, out, **flags):
    return command("distill.py", **{
        "model": lab / "model", "data": lab / "corpus.jsonl", "out": out, "tokens": 4096,
        "seq_len": 32, "batch_size": 4, **flags})


def replace_command(lab, blocks, out, **flags):
    return command("replace.py", **{
        "model": lab / "model", "blocks": blocks, "task": lab / "val.jsonl",
        "test": lab / "test.jsonl", "out": out, "batch_size": 8, **flags})


def call(words, monkeypatch, capsys):
    """Run a script in this process -> (exit code, last stdout line as JSON or None, stderr)."""
    module = importlib.import_module(Path(words[0]).stem)
    monkeypatch.setattr(sys, "argv", [str(w) for w in words])
    capsys.readouterr()
    try:
        evaluation.run_script(module.main)
        code = 0
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]) if out.strip() else None, err


def start(words, **kwargs):
    """The same in a process of its own, with one thread."""
    return subprocess.Popen(
        [sys.executable, ROOT / words[0], *map(str, words[1:])], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs)


@pytest.fixture(scope="session")
def runs(lab):
    """A finished distillation of each mixer."""
    for attn in MIXERS:
        process = start(distill_command(lab, lab / attn, attn=attn, init="inherit"))
        assert process.communicate() and process.returncode == 0
    return {attn: lab / attn for attn in MIXERS}


def load_lab_model(lab):
    return evaluation.load_model(str(lab / "model"))


# ------------------------------------------------------------------------------------------------
# distill.py

def test_teacher_forward_stops_early_and_leaves_no_trace(lab):
    """Each hook sees the attention's own input and output; the head and what follows the last
    wanted attention never run; activation graphs do not pile up."""
    model, _ = load_lab_model(lab)
    ids, seen, ran = tokens(2, 9), {}, []
    hidden = model(ids, output_hidden_states=True).hidden_states
    hooks = lambda: [len(m._forward_hooks) for m in attention_modules(model)]
    before = hooks()
    model.lm_head.register_forward_hook(lambda *a: ran.append("head"))
    model.model.layers[2].mlp.register_forward_hook(lambda *a: ran.append("mlp 2"))
    distill.teacher_forward(model, ids, [0, 2], lambda l, h, o: seen.__setitem__(l, (h, o)))
    assert list(seen) == [0, 2] and ran == []
    for layer, (h, o) in seen.items():
        assert torch.equal(h, model.model.layers[layer].input_layernorm(hidden[layer]))
        after = hidden[layer] + o
        assert relative(after + model.model.layers[layer].mlp(
            model.model.layers[layer].post_attention_layernorm(after)), hidden[layer + 1]) < 1e-5
    assert hooks() == before


@pytest.mark.parametrize("attn", MIXERS)
def test_layers_apart_equal_layers_together(lab, runs, attn, tmp_path, monkeypatch, capsys):
    """--layers 1 and --layers 0,2-3 give bit for bit what all four together gave; joined again
    they are usable as one."""
    for layers in ("1", "0,2-3"):
        code, result, err = call(distill_command(lab, tmp_path / layers, attn=attn, layers=layers),
                                 monkeypatch, capsys)
        assert code == 0, err
    for layer in range(4):
        apart = load_file(distill.layer_file(tmp_path / ("1" if layer == 1 else "0,2-3"), layer))
        together = load_file(distill.layer_file(runs[attn], layer))
        assert apart.keys() == together.keys()
        assert all(torch.equal(apart[k], together[k]) for k in apart)
    (tmp_path / "0,2-3").rename(tmp_path / "others")
    model, _ = load_lab_model(lab)
    assert len(distill.load_blocks(f"{tmp_path}/1,{tmp_path}/others", model)) == 4
    with pytest.raises(UserError, match="no module for layer 0"):
        distill.load_blocks(str(tmp_path / "1"), model)


@pytest.mark.parametrize("attn", MIXERS)
def test_distillation_learns_and_its_numbers_are_reproducible(lab, runs, attn):
    """Training lowers every layer's error; the saved tensors give the printed held-out numbers
    when they are computed anew from the definition; the teacher is untouched."""
    record = distill.read_run(runs[attn])
    model, _ = load_lab_model(lab)
    before = copy.deepcopy(model.state_dict())
    held_out = load_file(runs[attn] / "held_out.safetensors")["input_ids"]
    mixers = distill.load_blocks(str(runs[attn]), model)
    inputs, outputs = {}, {}

    def keep(module, args, kwargs, output):
        inputs[module.layer_idx], outputs[module.layer_idx] = kwargs["hidden_states"], output[0]

    for module in attention_modules(model):
        module.register_forward_hook(keep, with_kwargs=True)
    model(held_out)
    for layer in range(4):
        start, end = (record["held_out"][when][str(layer)] for when in ("start", "end"))
        student, target = mixers[layer](inputs[layer])[0], outputs[layer]
        mse = (student - target).pow(2).mean().item()
        assert end["mse"] == pytest.approx(mse, rel=1e-4)
        assert end["relative_mse"] == pytest.approx(mse / target.var(correction=0).item(), rel=1e-4)
        cosine = F.cosine_similarity(student, target, dim=-1).mean().item()
        assert end["cosine"] == pytest.approx(cosine, abs=1e-4)
        assert end["mse"] < start["mse"]
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    events = [json.loads(line) for line in (runs[attn] / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "held-out"] == [0, 32]


def test_a_solved_o_proj_is_the_best(lab):
    """No small change of o_proj lowers the loss on the batches that the regression saw."""
    model, tokenizer = load_lab_model(lab)
    mixers = distill.make_mixers(model, "gdn", [1], "inherit", 0)
    batches = [tokens(8, 32, seed=s) for s in range(4)]
    chunks = torch.cat(batches)
    inherited = distill.held_out_error(model, mixers, chunks, 8)[1]["mse"]
    distill.solve_o_proj(model, mixers, batches)
    solved = distill.held_out_error(model, mixers, chunks, 8)[1]["mse"]
    assert solved < 0.9 * inherited
    for seed in range(5):
        moved = copy.deepcopy(mixers)
        noise = torch.randn(moved[1].o_proj.weight.shape,
                            generator=torch.Generator().manual_seed(seed))
        moved[1].o_proj.weight.data += 0.02 * noise
        assert distill.held_out_error(model, moved, chunks, 8)[1]["mse"] > solved


def test_a_solve_needs_no_fp64_products(lab):
    """GPUs for games multiply in fp64 at 1/64 of their speed: the products are fp32, never rounded
    to TF32 whatever the host program has set, and give what fp64 gives from the definition."""
    model, _ = load_lab_model(lab)
    mixers = distill.make_mixers(model, "gdn", [1], "inherit", 0)
    batches, pairs, seen = [tokens(8, 32, seed=s) for s in range(4)], [], []
    outputs, features = mixers[1].o_proj.weight.shape
    expected = mixers[1].o_proj.weight.detach().double()

    def keep(layer, hidden_states, target):
        pairs.append((mixers[1].head_outputs(hidden_states).flatten(0, 1).double(),
                      target.flatten(0, 1).double()))

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default and out.shape == (features, features + outputs):
                seen.append((out.dtype, torch.get_float32_matmul_precision()))
            return out

    for batch in batches:
        distill.teacher_forward(model, batch, [1], keep)
    torch.set_float32_matmul_precision("high")
    try:
        with Products():
            distill.solve_o_proj(model, mixers, batches)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [(torch.float32, "highest")] * 32                            # one a sequence
    inherited = expected
    halves = [tuple(map(torch.cat, zip(*pairs[i::2]))) for i in (0, 1)]
    for (x, y), (other_x, other_y) in (halves, halves[::-1]):
        gram = x.T @ x + 1e-4 * x.square().sum() / features * torch.eye(features)
        change = torch.linalg.solve(gram, x.T @ (y - x @ inherited.T)).T
        moved, rest = other_x @ change.T, other_y - other_x @ inherited.T
        share = (moved * rest).sum() / moved.square().sum()
        expected = expected + 0.5 * share.clamp(0, 1) * change
    assert relative(mixers[1].o_proj.weight, expected) < 1e-4


def test_a_solve_does_not_fit_noise(lab):
    """Long training leaves little to solve; a regression on few tokens would put their noise in
    its place."""
    model, tokenizer = load_lab_model(lab)
    mixers = distill.make_mixers(model, "gdn", [0, 3], "inherit", 0)
    corpus = distill.FileCorpus(lab / "corpus.jsonl", "text", tokenizer, 32, seed=0)
    optimizers, stream = distill.make_optimizers(mixers), corpus.batches(4, 0)
    for _ in range(40):
        distill.train_step(model, mixers, optimizers, next(stream), 1e-2)
    before = distill.held_out_error(model, mixers, corpus.held_out, 4)
    distill.solve_o_proj(model, mixers, itertools.islice(stream, 2))
    after = distill.held_out_error(model, mixers, corpus.held_out, 4)
    assert all(after[layer]["mse"] < 1.01 * before[layer]["mse"] for layer in before)
    batches = distill.for_a_solve(itertools.count(), mixers, argparse.Namespace(
        batch_size=1, seq_len=32))
    assert len(list(batches)) == 32     # 32 tokens for each of 32 features
    batches = distill.for_a_solve(itertools.count(), mixers, argparse.Namespace(
        batch_size=64, seq_len=32))
    assert len(list(batches)) == 8


@pytest.mark.parametrize("attn", MIXERS)
@pytest.mark.parametrize("steps", (1, 8))
def test_a_short_distillation_does_not_end_worse_than_it_began(
        lab, steps, attn, tmp_path, monkeypatch, capsys):
    """Adam's first steps move every weight by the whole rate: they undid what was solved."""
    code, result, err = call(distill_command(lab, tmp_path / "out", tokens=128 * steps, attn=attn),
                             monkeypatch, capsys)
    assert code == 0, err
    start, end = (result["held_out"][when] for when in ("start", "end"))
    assert all(end[layer]["mse"] < start[layer]["mse"] for layer in end)


def test_schedule_and_clip_are_per_layer(lab):
    """Warm-up, peak and floor as stated; a layer with a huge loss does not touch another's step."""
    assert distill.learning_rate(0, 1000, 1.0) == pytest.approx(1 / 50)
    assert distill.learning_rate(50, 1000, 1.0) == 1.0
    assert distill.learning_rate(1000, 1000, 1.0) == pytest.approx(0.01)
    assert distill.learning_rate(0, 1, 1.0) == pytest.approx(1 / 5)
    assert distill.default_lr(1536) == distill.default_lr(4096) == 1e-3
    model, _ = load_lab_model(lab)
    results = []
    for factor in (1.0, 1e4):
        mixers = distill.make_mixers(model, "gdn", [0, 1], "inherit", 0)
        with torch.no_grad():
            mixers[0].o_proj.weight.mul_(factor)
        losses = distill.train_step(model, mixers, distill.make_optimizers(mixers),
                                    tokens(2, 16), 1e-3)
        results.append((losses, mixers[1].state_dict()))
    assert results[1][0][0] > 1e3 * results[0][0][0]
    assert all(torch.equal(results[0][1][k], results[1][1][k]) for k in results[0][1])


def test_only_one_students_graph_is_alive(lab):
    """Memory held for backward does not grow with the number of layers."""
    model, _ = load_lab_model(lab)

    def peak(layers):
        mixers = distill.make_mixers(model, "gdn", layers, "inherit", 0)
        alive, most = [0], [0]

        class Held:
            def __init__(self, tensor):
                self.tensor, self.size = tensor, tensor.numel()
                alive[0] += self.size
                most[0] = max(most[0], alive[0])

            def __del__(self):
                alive[0] -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            distill.train_step(model, mixers, distill.make_optimizers(mixers), tokens(4, 32), 1e-3)
        return most[0]

    assert peak([0, 1, 2, 3]) <= 1.05 * peak([0])


def killed_at_random(make_command, seed, kills=3):
    """Start a script again and again, kill -9 it after random times, then let it end."""
    rng = random.Random(seed)
    seconds = time.perf_counter()
    assert start(make_command("whole")).wait() == 0
    seconds = time.perf_counter() - seconds
    for _ in range(kills):
        process = start(make_command("killed"))
        time.sleep(seconds * rng.uniform(0.4, 0.9))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = start(make_command("killed"))
    out, err = process.communicate()
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def test_killed_distillation_ends_in_the_same_tensors(lab, tmp_path):
    make = lambda name: distill_command(lab, tmp_path / name, attn="jet", tokens=40000, resume=True)
    result = killed_at_random(make, seed=0)
    for layer in range(4):
        a, b = (load_file(distill.layer_file(tmp_path / n, layer)) for n in ("whole", "killed"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    a, b = (distill.read_run(tmp_path / n) for n in ("whole", "killed"))
    assert a["held_out"] == b["held_out"] == result["held_out"]
    logs = [[json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()]
            for n in ("whole", "killed")]
    assert logs[0] == logs[1]
    assert not list(tmp_path.glob("killed/*checkpoint*"))


def test_every_checkpoint_continues_identically(lab, tmp_path, monkeypatch, capsys):
    """Stopped after each checkpoint, with its log torn, the run ends as if it had not been."""
    flags = dict(attn="gla", tokens=640)                                # 5 steps
    assert call(distill_command(lab, tmp_path / "whole", **flags), monkeypatch, capsys)[0] == 0
    wanted = [load_file(distill.layer_file(tmp_path / "whole", i)) for i in range(4)]
    save, out = distill.save_checkpoint, tmp_path / "stopped"
    for stop_at in range(6):
        def save_and_die(path, step, *rest):
            save(path, step, *rest)
            if step == stop_at:
                (path / f".checkpoint-{step}-0.safetensors.tmp").write_bytes(b"half")
                raise KeyboardInterrupt

        monkeypatch.setattr(distill, "save_checkpoint", save_and_die)
        assert call(distill_command(lab, out, resume=True, **flags), monkeypatch, capsys)[0] == 130
        if stop_at:
            with open(out / "log.jsonl", "a") as file:
                file.write('{"event": "train", "st')
    monkeypatch.setattr(distill, "save_checkpoint", save)
    assert call(distill_command(lab, out, resume=True, **flags), monkeypatch, capsys)[0] == 0
    assert not [path for path in out.iterdir() if "checkpoint" in path.name]
    for layer, tensors in enumerate(wanted):
        again = load_file(distill.layer_file(out, layer))
        assert all(torch.equal(again[k], tensors[k]) for k in tensors)
    code, result, _ = call(distill_command(lab, out, resume=True, **flags), monkeypatch, capsys)
    assert code == 0 and result["held_out"] == distill.read_run(out)["held_out"]


def test_file_corpus_is_packed_held_out_and_repeated(lab):
    _, tokenizer = load_lab_model(lab)
    corpus = distill.FileCorpus(lab / "corpus.jsonl", "text", tokenizer, 16, seed=3)
    texts = [json.loads(line)["text"] for line in (lab / "corpus.jsonl").read_text().splitlines()]
    stream = tokenizer.encode(" ".join(texts))
    chunks = torch.tensor(stream[: len(stream) // 16 * 16]).view(-1, 16)
    assert torch.equal(corpus.held_out, chunks[-32:])
    assert torch.equal(corpus.chunks, chunks[:-32])
    n = len(corpus.chunks)
    batches = corpus.batches(7, 0)
    read = torch.cat([next(batches) for _ in range(2 * n)])             # 14 passes
    as_sets = [sorted(map(tuple, part.tolist())) for part in read[: 3 * n].split(n)]
    assert as_sets[0] == as_sets[1] == as_sets[2] == sorted(map(tuple, corpus.chunks.tolist()))
    assert not torch.equal(read[:n], read[n: 2 * n])
    later = corpus.batches(7, 5)
    assert torch.equal(next(later), read[35:42])


def test_documents_are_delimited(lab):
    class Tokenizer:
        bos_token_id, eos_token_id = 1, 2

        def __init__(self, adds_bos):
            self.adds_bos = adds_bos

        def encode(self, text):
            return [1] * self.adds_bos + [5, 6]

    assert distill.encode_document(Tokenizer(True), "") == [1, 5, 6]
    assert distill.encode_document(Tokenizer(False), "") == [5, 6, 2]


def test_stream_corpus_mixes_by_tokens_and_resumes(lab, tmp_path):
    """Two local datasets in place of Hub ids, through datasets' streaming: proportions by tokens,
    the held-out chunks never come back, a later start sees the same batches."""
    _, tokenizer = load_lab_model(lab)
    rng = random.Random(0)
    for name, low, length in (("a", 0, 50), ("b", 32, 10)):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "train.jsonl", [
            {"body": evaluation.demo_text(rng.randrange(low, low + 32) for _ in range(length))}
            for _ in range(4000)])
    spec = f"{tmp_path}/a@3,{tmp_path}/b@1"
    corpus = distill.StreamCorpus(spec, "body", tokenizer, 16, seed=0)
    batches = corpus.batches(8, 0)
    read = [next(batches) for _ in range(40)]
    share = (torch.cat(read) < 32).double().mean().item()
    assert share == pytest.approx(0.75, abs=0.03)
    held_out = set(map(tuple, corpus.held_out.tolist()))
    assert len(corpus.held_out) == 32
    assert not held_out & set(map(tuple, torch.cat(read).tolist()))
    again = distill.StreamCorpus(spec, "body", tokenizer, 16, seed=0).batches(8, 25)
    assert torch.equal(next(again), read[25])
    with pytest.raises(UserError, match="body"):
        distill.StreamCorpus(spec, "text", tokenizer, 16, seed=0)


def test_rows_of_a_stream_without_text_are_skipped_and_counted(lab, tmp_path, monkeypatch, capsys):
    """One null text would end a distillation, at the same row after every resume; a column that
    starts with nothing else is refused."""
    good = [json.loads(line) for line in (lab / "corpus.jsonl").read_text().splitlines()] * 15
    for name, bad in (("clean", []), ("nulls", [{"text": None}, {"text": ""}])):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "train.jsonl", [*bad, *good[:40], *bad, *good[40:]])
        code, result, err = call(distill_command(lab, tmp_path / f"{name}-out", tokens=64, layers=0,
                                                 seq_len=16, batch_size=1, data=tmp_path / name),
                                 monkeypatch, capsys)
        assert code == 0, err
    rows = distill.read_run(tmp_path / "nulls-out")["skipped_rows"][str(tmp_path / "nulls")]
    assert rows % 4 == 0 and f"corpus: {rows} rows of {tmp_path / 'nulls'} have no text" in err
    clean, nulls = (load_file(distill.layer_file(tmp_path / f"{name}-out", 0))
                    for name in ("clean", "nulls"))
    assert all(torch.equal(clean[key], nulls[key]) for key in clean)
    write_rows(tmp_path / "nulls" / "train.jsonl", [{"text": None}] * 200 + good)
    with pytest.raises(UserError, match="no text in column 'text' of its first 100 rows"):
        distill.StreamCorpus(str(tmp_path / "nulls"), "text", None, 16, seed=0)


def test_a_file_of_any_kind_that_eval_reads_is_a_corpus(lab, tmp_path):
    """Compressed and Parquet files were taken for Hub ids."""
    import datasets
    _, tokenizer = load_lab_model(lab)
    text = (lab / "corpus.jsonl").read_bytes()
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "c").write_bytes(text)
    datasets.Dataset.from_list(list(map(json.loads, text.splitlines()))).to_parquet(
        str(tmp_path / "c.parquet"))
    corpora = [distill.open_corpus(argparse.Namespace(
        data=str(path), text_column="text", seq_len=16, seed=0), tokenizer)
        for path in (lab / "corpus.jsonl", *sorted(tmp_path.iterdir()))]
    assert len(corpora) == 4
    assert all(torch.equal(corpus.chunks, corpora[0].chunks) for corpus in corpora)
    with pytest.raises(UserError, match="no such file"):
        distill.open_corpus(argparse.Namespace(data="none.jsonl.gz"), tokenizer)


# ------------------------------------------------------------------------------------------------
# eval.py

class Letters:
    """A tokenizer of characters, for checks of how a pair is cut."""
    bos_token, bos_token_id, eos_token_id = "<s>", 1, 2

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + [ord(c) for c in text]


def test_pairs_are_cut_as_the_harness_cuts_them():
    tokens_of = lambda text: [ord(c) for c in text]
    cut = evaluation.encode_pair
    assert cut(Letters(), "ab", " c") == ([1] + tokens_of("ab c"), 2)
    assert cut(Letters(), "ab \n", "c") == ([1] + tokens_of("ab \nc"), 3)
    assert cut(Letters(), "", " c") == ([1] + tokens_of(" c"), 2)
    assert cut(Letters(), "<s>a", " c") == (tokens_of("<s>a c"), 2)     # no second BOS
    assert cut(Letters(), "ab", " c", bos=False) == (tokens_of("ab c"), 2)


class Merged(Letters):
    """It ends every text with EOS, has one token for "?" and "\\n" together, and none for a space
    that ends a text."""

    def encode(self, text, add_special_tokens=True):
        letters = [ord(c) for c in text.rstrip(" ").replace("?\n", "\x07")]
        return [1] * add_special_tokens + letters + [2] * add_special_tokens


def test_a_token_may_span_the_contexts_end():
    """As the harness does, the context's own tokens are read, not those of both texts together:
    18 of 33 log-likelihoods of a tokenizer like Qwen2.5's were others."""
    cut = evaluation.encode_pair
    assert cut(Merged(), "a?\n", "b") == ([1, 97, 63, 2, 2], 1)
    assert cut(Merged(), "a", "?\nb") == ([1, 97, 2, 98, 2], 2)
    assert cut(Merged(), "a?\n", "b", bos=False) == ([97, 63, 98], 1)
    assert cut(Merged(), "a?", "\n", bos=False) == ([97, 63], 0)        # no token is left
    assert cut(Merged(), "", "?\n") == ([1, 7], 1)
    assert cut(Merged(), " \n", "b") == ([1, 2, 10, 98, 2], 3)
    assert cut(Letters(), "", "") == ([1], 0)


@needs_shared
@pytest.mark.parametrize("case", ("qwen_like", "gpt2_positions"))
def test_log_likelihoods_equal_the_harness(case):
    """Of models whose tokens span the context's end, and whose position table is short."""
    model, tokenizer = evaluation.load_model(str(SHARED / "cases" / case))
    task, docs = file_task(str(SHARED / "cases" / case / "items.jsonl"))
    wanted = json.loads((SHARED / "cases" / case / "harness_lls.json").read_text())
    for size, whole in itertools.product((1, 3, 64), (False, True)):
        found = evaluation.evaluate(model, evaluation.Prepared(
            task, docs, model, tokenizer, size, whole=whole)).outputs
        assert sum(found, []) == pytest.approx(sum(wanted, []), abs=1e-4)


@pytest.mark.parametrize("item, says", (
    ({"context": "t1", "choices": ["t2", " "], "gold": 0}, "continuation '  '"),
    ({"context": "t1", "choices": ["", "t2"], "gold": 0}, "continuation ' '"),
    ({"context": "", "choices": ["t1", "t2"], "gold": 0}, "context ''"),
    ({"context": " \n", "choices": ["t1", "t2"], "gold": 0}, "context ' \\\\n'"),
    ({"prompt": "", "answer": "t1"}, "prompt ''"), ({"prompt": "\n ", "answer": "t1"}, "prompt")))
def test_texts_without_tokens_are_refused(lab, tmp_path, item, says):
    """A choice without tokens scored 0, more than any other, and won; an empty prompt crashed."""
    model, tokenizer = load_lab_model(lab)
    task, docs = file_task(jsonl(tmp_path / "items.jsonl", [item]))
    with pytest.raises(UserError, match=f"items.jsonl line 1: the {says}.* has no tokens"):
        evaluation.Prepared(task, docs, model, tokenizer, 8)


def test_accuracies_by_hand():
    """acc by sums, acc_norm by characters, ties to the first, an empty choice never wins."""
    score = evaluation.CHOICE_FILE.score
    doc = {"choices": ["aaaa", "b", "cc"], "gold": 0}
    assert score(doc, [-4.0, -3.0, -5.0]) == {"acc": 0.0, "acc_norm": 1.0}
    assert score(dict(doc, gold=1), [-3.0, -3.0, -9.0])["acc"] == 0.0
    assert score({"choices": ["", "b"], "gold": 1}, [-1, -2])["acc_norm"] == 1.0
    score = evaluation.Score("acc", [{"acc": 1.0}] * 3 + [{"acc": 0.0}], [])
    assert (score.mean(), score.n) == (0.75, 4)
    assert score.stderr() == pytest.approx(0.25)


def prepared(lab, name, batch_size=8, model=None, **kwargs):
    model, tokenizer = model or load_lab_model(lab)
    task, docs = evaluation.file_task(lab / f"{name}.jsonl")
    return model, evaluation.Prepared(task, docs, model, tokenizer, batch_size, **kwargs)


@pytest.mark.parametrize("attn", MIXERS)
def test_log_likelihoods_equal_the_definition(lab, runs, attn):
    """Against a plain loop over tokens, one request at a time; a hybrid; any batch size; a shared
    context run once for its choices, or every request run whole."""
    model, split = prepared(lab, "val")
    tokenizer = split.tokenizer
    with replace.replaced(model, distill.load_blocks(str(runs[attn]), model), (0, 2)):
        by_size = [evaluation.evaluate(model, prepared(lab, "val", size, (model, tokenizer),
                                                       whole=whole)[1])
                   for size in (1, 5, 64) for whole in (False, True)]
        for doc, *outputs in zip(split.docs, *(score.outputs for score in by_size)):
            for i, choice in enumerate(doc["choices"]):
                ids = tokenizer.encode(doc["context"] + " " + choice)
                log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
                first = len(tokenizer.encode(doc["context"]))
                wanted = sum(log_probs[t - 1, ids[t]].item() for t in range(first, len(ids)))
                assert all(abs(o[i] - wanted) < 1e-4 for o in outputs)


def test_equal_requests_are_asked_once(lab):
    model, tokenizer = load_lab_model(lab)
    docs = [{"context": "t1 t2", "choices": ["t3", "t4", "t3"], "gold": 0}] * 2
    split = evaluation.Prepared(evaluation.CHOICE_FILE, docs, model, tokenizer, 4)
    assert len(split.requests) == 2
    score = evaluation.evaluate(model, split)
    assert score.outputs[0][0] == score.outputs[0][2] and score.n == 2


@pytest.mark.parametrize("attn", MIXERS)
def test_generation_equals_one_by_one_without_a_cache(lab, runs, attn):
    model, split = prepared(lab, "generate", batch_size=4)
    with replace.replaced(model, distill.load_blocks(str(runs[attn]), model), (0, 1, 3)):
        score = evaluation.evaluate(model, split)
        for doc, (text,) in zip(split.docs, score.outputs):
            ids = split.tokenizer.encode(doc["prompt"])
            new = []
            while len(new) < 5 and "t7" not in split.tokenizer.decode(new):
                new.append(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
            assert text.split("t7")[0] == split.tokenizer.decode(new).split("t7")[0]


def test_eos_written_as_characters_ends_a_text(lab):
    """As in the harness, which adds the EOS token's text to the stop strings."""
    model, split = prepared(lab, "generate", batch_size=4)
    whole = evaluation.evaluate(model, split)
    words = [text.split() for text, in whole.outputs]
    split.tokenizer.eos_token = next(w[1] for w in words if len(w) > 1 and w[1] != w[0])
    cut = evaluation.evaluate(model, split)
    assert cut.outputs != whole.outputs
    for (text,), (short,) in zip(whole.outputs, cut.outputs):
        assert short == text.split(split.tokenizer.eos_token)[0]


def test_the_head_may_lie_on_another_device():
    """With --device auto the hidden states reach the LM head on the last GPU, the ids the first."""
    hidden, scored = torch.randn(2, 2, 32), torch.tensor([[True, False], [True, True]])

    class Spread(torch.nn.Module):
        device = torch.device("meta")

        def __init__(self):
            super().__init__()
            self.lm_head = torch.nn.Linear(32, 64)

        def get_output_embeddings(self):
            return self.lm_head

        def forward(self, ids, **kwargs):
            assert ids.is_meta
            return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(hidden))

    model = Spread()
    found = evaluation.read(model, torch.zeros(2, 2, dtype=torch.long), scored)
    assert torch.equal(found, model.lm_head(hidden[scored]).log_softmax(-1))


def test_repeating_a_cache_sends_nothing_to_the_device():
    """Row numbers that lie on the CPU would be sent for every layer, and the host would wait."""
    class Sent(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            self.count += str(kwargs.get("device")) == "meta"
            return func(*args, **kwargs)

    cache = transformers.DynamicCache()
    for layer in range(3):
        cache.update(*torch.zeros(2, 2, 4, 40, 8, device="meta"), layer)
    rows = torch.tensor([0, 0, 1], device="meta")
    with Sent() as sent:
        copies = evaluation.repeated(cache, rows)
    assert sent.count == 0
    for layers, rows in ((copies.layers, 3), (cache.layers, 2)):
        assert all(layer.keys.shape == (rows, 4, 40, 8) and layer.keys.is_meta for layer in layers)


def test_stop_strings_are_found_in_the_last_tokens():
    """Every step looks at no more than can complete a stop string: the cost of a text grows with
    its length, not with the square of it."""
    class Bytes:                        # 0 is a special token, the others are bytes
        longest = 0

        def batch_decode(self, rows, skip_special_tokens):
            self.longest = max(self.longest, *map(len, rows))
            return [bytes(filter(None, row)).decode(errors="replace") for row in rows]

    tokenizer, stops = Bytes(), [["né", "q"], ["\n\n"], []]
    stop = evaluation.StopOnText(tokenizer, stops, 2)
    texts = [list(("x" * 60 + text).encode()) for text in ("n\0é~", "\n~\n\n", "né~~~~")]
    width = min(map(len, texts))
    ids = torch.tensor([[113, 113] + text[:width] for text in texts])
    for n in range(1, width + 1):
        whole = tokenizer.batch_decode(ids[:, 2: 2 + n].tolist(), True)
        tokenizer.longest = 0
        done = stop(ids[:, : 2 + n], None).tolist()
        assert done == [any(s in text for s in some) for text, some in zip(whole, stops)]
        assert tokenizer.longest <= 11
    assert done == [True, True, False]


def test_scores_that_are_not_finite_stop(lab):
    model, split = prepared(lab, "val")
    mixers = distill.make_mixers(model, "gdn", [2], "inherit", 0)
    mixers[2].o_proj.weight.data.fill_(math.nan)
    with replace.replaced(model, mixers, (2,)):
        with pytest.raises(FloatingPointError, match=r"line \d+.*\[2\]"):
            evaluation.evaluate(model, split)


def test_eval_script(lab, tmp_path, monkeypatch, capsys):
    words = command("eval.py", model=lab / "model", task=f"{lab}/val.jsonl,{lab}/generate.jsonl",
                    limit=9, out=tmp_path)
    code, result, err = call(words, monkeypatch, capsys)
    assert code == 0, err
    for row in result["results"]:
        items = [json.loads(line) for line in Path(row["items"]).read_text().splitlines()]
        assert row["n"] == len(items) == 9
        assert row["value"] == pytest.approx(sum(i[row["metric"]] for i in items) / 9)
    code, norm, _ = call(command("eval.py", model=lab / "model", task=lab / "val.jsonl",
                                 limit=9, metric="acc_norm"), monkeypatch, capsys)
    assert norm["results"][0]["value"] == result["results"][0]["metrics"]["acc_norm"]


def test_results_of_files_of_one_name_are_kept_apart(lab, tmp_path, monkeypatch, capsys):
    """The second file's per-item results replaced the first's."""
    items = [json.loads(line) for line in (lab / "val.jsonl").read_text().splitlines()]
    tasks = [tmp_path / name / "validation.jsonl" for name in "abc"]
    for n, path in enumerate(tasks, 2):
        path.parent.mkdir()
        write_rows(path, items[:n])
    code, result, err = call(command("eval.py", model=lab / "model", out=tmp_path / "o",
                                     task=",".join(map(str, tasks))), monkeypatch, capsys)
    assert code == 0, err
    lines = [Path(row["items"]).read_text().splitlines() for row in result["results"]]
    assert list(map(len, lines)) == [2, 3, 4]
    assert evaluation.distinct_stems(["a/x.jsonl", "x-2.jsonl", "b/x.jsonl"]) == ["x", "x-2", "x-3"]


def test_a_generation_config_may_ask_for_a_dict(lab):
    """generate() then returned something else than tokens, and the run ended in a traceback."""
    model, split = prepared(lab, "generate")
    plain = evaluation.evaluate(model, split).outputs
    model.generation_config.return_dict_in_generate = True
    assert evaluation.evaluate(model, split).outputs == plain


@needs_shared
def test_base_scores_on_the_real_model():
    """The numbers that lm-evaluation-harness 0.4.13 gives for the same items."""
    model, tokenizer = evaluation.load_model(str(STORIES))
    for name, acc, acc_norm in (("recall", 1.0, None), ("cloze", 0.4189, 0.5)):
        task, docs = evaluation.file_task(SHARED / "data" / "stories" / f"{name}-validation.jsonl")
        score = evaluation.evaluate(model, evaluation.Prepared(task, docs, model, tokenizer, 32))
        assert round(score.mean("acc"), 4) == acc
        assert acc_norm is None or round(score.mean("acc_norm"), 4) == acc_norm


# ------------------------------------------------------------------------------------------------
# eval.py: the eighteen tasks

CASES = SHARED / "notes" / "harness_cases.json"
GOLDEN = json.loads(CASES.read_text(encoding="utf-8")) if CASES.exists() else {
    "cases": [], "functions": {}}
HARNESS_NAME = {"swde": "swde_v1"}  # the harness's own swde is version 1 by now


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


def jsonl(path, docs):
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(doc) + "\n" for doc in docs)
    return str(path)


# ------------------------------------------------------------------------------------------------
# eval.py: what the harness itself produced

@pytest.mark.parametrize("case", GOLDEN["cases"],
                         ids=lambda case: f"{case['task']}-{case['doc_index']}")
def test_harness_case(case):
    task, doc = TASKS[HARNESS_NAME.get(case["task"], case["task"])], case["doc"]
    task.check(doc)
    shots = None
    if "fewshot_docs" in case:  # the draws of the documents before this one come first
        drawn = draw_shots(task, [{"question": i} for i in range(case["doc_index"])] + [doc],
                           case["shots"], case["fewshot_docs"])
        shots = drawn[case["doc_index"]]
    for got, want in zip(task.requests(doc, shots), case["requests"], strict=True):
        if "continuation" in want:
            assert got == (want["context"], want["continuation"])
            continue
        prompt, limits = got
        if want["context"] is None:
            head = want["context_head_chars"]
            assert sha(prompt[:head]) == want["context_head_sha256"]
            assert prompt[head:] == want["context_tail"]
        else:
            assert prompt == want["context"]
        assert limits == {"until": want["gen_kwargs"]["until"],
                          "max_gen_toks": want["gen_kwargs"].get("max_gen_toks", 256)}
    if task.choices and not task.contexts:
        assert task.choices(doc) == case["choices"]
    for score in case["scores"]:
        outputs = score.get("lls") or [score["output"]]
        got = task.score(doc, outputs, allow_code=True)
        want = {metric + ("," + score["filter"] if task.name == "gsm8k" else ""): value
                for metric, value in score["metrics"].items()}
        assert {metric: got[metric] for metric in want} == want
        assert set(got) == set(want) or task.name == "gsm8k"


@needs_shared
def test_harness_functions():
    golden = GOLDEN["functions"]
    for text, want in golden["hellaswag_preprocess"]:
        assert hellaswag_clean(text) == want
    for options, want in golden["mathqa_choices"]:
        assert mathqa_choices({"options": options}) == want
    for text, values, want in golden["swde_contains"]:
        assert max(TASKS["swde"].score({"text": "", "value": value}, [text])["contains"]
                   for value in values) == want
    for prediction, reference, want in golden["samsum_rouge_l_f"]:
        assert rouge_l(prediction, reference) == want
    classes = golden["trec_classification_score"]["all_classes"]
    for text, gold, want in golden["trec_classification_score"]["cases"]:
        doc = {"answers": [gold], "all_classes": classes}
        assert TASKS["TREC"].score(doc, [text])["score"] == want
    for text, strict, flexible in golden["gsm8k_filters"]:
        for name, answer in (("strict-match", strict), ("flexible-extract", flexible)):
            for gold, right in ((answer, 1.0), (answer + "0", 0.0)):
                got = gsm8k_judge({"answer": f"#### {gold}"}, text)
                assert got[f"exact_match,{name}"] == right, (text, name)
    for prediction, reference, want in golden["gsm8k_exact_match"]:
        assert (gsm8k_bare(prediction) == gsm8k_bare(reference)) == want
    for lls, lengths, acc, acc_norm in golden["numpy_argmax"]:
        for gold in (0, 1):
            doc = {"choices": ["x" * length for length in lengths], "context": "", "gold": gold}
            assert CHOICE_FILE.score(doc, lls) == {"acc": gold == acc, "acc_norm": gold == acc_norm}
    for text, stop, want in golden["stop_cut"]:
        doc = {"prompt": "", "answer": want, "stop": stop}
        assert GENERATE_FILE.score(doc, [text]) == {"exact_match": 1.0}
    for draws in ("n_train=7473,k=4, first 6 documents",
                  "n_train=12,k=4, 4 documents (matches run gsm8k@4shot)"):
        want = golden["gsm8k_fewshot_indices"][draws]
        pool = [{"i": i} for i in range(int(draws.split(",")[0].split("=")[1]))]
        got = draw_shots(TASKS["gsm8k"], [{}] * len(want), 4, pool)
        assert [[row["i"] for row in shots] for shots in got] == want
    for shot, want in zip((MBPP_SHOTS[0], MBPP_SHOTS[2]), golden["mbpp_fewshot_samples"]):
        assert (sha(shot["text"]), sha(shot["code"])) == (want["text_sha256"], want["code_sha256"])


@needs_shared
def test_real_files():
    task, golden = TASKS["gsm8k"], GOLDEN["gsm8k_real_4shot_hashes"]
    data = SHARED / "data"
    train = load_docs(task, "train", str(data / "gsm8k/train.jsonl"))
    test = load_docs(task, "test", str(data / "gsm8k/test.jsonl"))
    assert (len(train), len(test)) == (golden["n_train"], golden["n_test"])
    contexts = [task.requests(doc, shots)[0][0] for doc, shots in zip(
        test, draw_shots(task, test[:6], 4, train))]
    assert [sha(context) for context in contexts] == golden["context_sha256_utf8"]
    search, report, _ = split_docs(task, str(data / "gsm8k/train.jsonl"),
                                   str(data / "gsm8k/test.jsonl"))
    assert len(search) == 500 and report == test
    for doc, shots in zip(search, draw_shots(task, search, 4, train, searched=True)):
        assert len(shots) == 4 and doc["question"] not in [shot["question"] for shot in shots]
    search, report, notes = split_docs(
        TASKS["pubmedqa"], str(data / "pubmedqa/validation.jsonl"),
        str(data / "pubmedqa/test.jsonl"))
    assert len(search) == len(report) == 500 and len(notes) == 1
    search, report, notes = split_docs(TASKS["HE"], str(data / "humaneval/HumanEval.jsonl.gz"))
    assert (len(search), len(report)) == (82, 82) and "82 documents" in notes[1]
    solutions = [TASKS["HE"].score(doc, [doc["canonical_solution"]], allow_code=True)
                 for doc in report[:8]]
    assert solutions == [{"pass@1": 1.0}] * 8


# ------------------------------------------------------------------------------------------------
# eval.py: the same quirks on documents of our own, which need no files

HELLASWAG = {"activity_label": "Fixing [substeps]", "ctx_a": "A man  stands.",
             "ctx_b": "he Looks at NYC [title] end", "label": "2",
             "endings": ["[step] and sits.", "[x]", "runs   far", "a [title] b"]}


def test_hellaswag():
    requests = TASKS["HS"].requests(HELLASWAG)
    assert requests[0][0] == "Fixing : A man stands. He looks at nyc. end"
    assert [continuation for _, continuation in requests] == ["  and sits.", " ", " runs  far",
                                                              " a. b"]
    assert TASKS["HS"].score(HELLASWAG, [-9.0, -0.1, -8.0, -9.6]) == {"acc": 0.0, "acc_norm": 1.0}


def test_winogrande():
    task = TASKS["WG"]
    doc = {"sentence": "Ann likes Eve because _ is kind_ . ", "option1": "Ann", "option2": "Eve",
           "answer": "2"}
    assert task.requests(doc) == [("Ann likes Eve because Ann", " is kind_ ."),
                                  ("Ann likes Eve because Eve", " is kind_ .")]
    assert task.score(doc, [-1.0, -0.5]) == {"acc": 1.0}
    last = dict(doc, sentence="She met _")
    assert task.requests(last)[0] == ("She met Ann", " ")
    # a shot without a rest has no answer, and the harness then adds no blank line either
    assert task.requests(doc, [last])[1][0] == "She met EveAnn likes Eve because Eve"


def test_mathqa():
    doc = {"Problem": "p", "options": "a ) rs . 1 , 200 , b ) 2 , c ) 3 , d ) 4 , e ) 5 , ",
           "correct": "e"}
    assert [rest for _, rest in TASKS["MathQA"].requests(doc)] == [" rs . 1", " 2", " 3", " 4",
                                                                  " 5"]
    short = dict(doc, options="a ) 1 , b ) 2 , c: 3 , d ) 4 , e ) 5")
    TASKS["MathQA"].check(short)  # four options, the fifth is right: a miss, as in the harness
    assert TASKS["MathQA"].score(short, [0, 0, 0, 9]) == {"acc": 0.0, "acc_norm": 0.0}
    with pytest.raises(UserError, match="cannot be a shot"):
        TASKS["MathQA"].requests(doc, [short])
    with pytest.raises(UserError, match="there are 0 choices"):
        TASKS["MathQA"].check(dict(doc, options="1, 2, 3"))


def test_a_right_choice_may_be_given_as_text():
    """The harness takes a text for the choice that it is, and a shot then shows it."""
    mmlu = {"question": "q", "choices": list("1234"), "answer": "B"}
    boolq = {"passage": "p", "question": "q", "label": "yes"}
    for task, doc in ((TASKS["MK"], mmlu), (TASKS["boolq"], boolq)):
        task.check(doc)
        assert task.score(doc, [-2, -1, -3, -4][:len(task.choices(doc))]) == {"acc": 1.0}
    assert TASKS["MK"].requests(mmlu, [mmlu])[0][0].count("Answer: B\n\n") == 1
    for label in (False, True):                 # as SuperGLUE's own files have it
        TASKS["boolq"].check(dict(boolq, label=label))
        assert TASKS["boolq"].score(dict(boolq, label=label), [-2, -1]) == {"acc": float(label)}


def test_batches_are_even_and_shared_out_evenly():
    for n, size in itertools.product((1, 2, 3, 5, 81, 400), (1, 2, 8, 32, 500)):
        batches = evaluation.even_batches(list(range(n)), size)
        assert sum(batches, []) == list(range(n))
        sizes = [len(batch) for batch in batches]
        assert max(sizes) <= size and max(sizes) - min(sizes) <= 1
        assert len(batches) < 2 * -(-n // size) or len(batches) <= 8
        for ranks in (2, 4, 8):
            if 8 <= len(batches) < n:
                assert len({len(batches[rank::ranks]) for rank in range(ranks)}) == 1


def test_slices_are_the_cheapest_cut():
    """A worse cut reads more padding than it need, or makes more forwards."""
    lengths = [9, 9, 7, 7, 6, 3, 3, 1]
    for size, overhead in itertools.product((1, 2, 3, 8), (0, 1, 4, 48)):
        cuts = [[lengths[i:j] for i, j in itertools.pairwise((0, *inner, len(lengths)))]
                for n in range(len(lengths)) for inner in itertools.combinations(range(1, 8), n)]
        price = lambda cut: sum(len(part) * part[0] + overhead for part in cut)
        cut = evaluation.slices(lengths, size, int, overhead)
        assert sum(cut, []) == lengths and max(map(len, cut)) <= size
        assert price(cut) == min(price(c) for c in cuts if max(map(len, c)) <= size)
    assert list(map(len, evaluation.slices(lengths, 3, int, math.inf))) == [2, 3, 3]
    assert evaluation.slices([], 3, int, 4) == []


def test_other_prompts():
    trec = {"context": "c", "question": "q", "answers": ["", "x"], "all_classes": ["x"]}
    (alone, _), (shown, _) = TASKS["TREC"].requests(trec)[0], TASKS["TREC"].requests(trec, [trec])[0]
    assert shown == alone + "\n\n" + alone
    code = {"prompt": "def f():\n", "test": "def check(f):\n    pass\n", "entry_point": "f"}
    assert TASKS["HumanEval"].requests(code, [code])[0][0] == (
        "def f():\n def check(f):\n    pass\n\ncheck(f)\n\ndef f():\n")
    mmlu = {"question": " q \n", "choices": ["1", " 2", "3 ", "4"], "answer": 3}
    assert TASKS["EC"].requests(mmlu, [mmlu])[3] == (
        "The following are multiple choice questions (with answers) about econometrics.\n\n"
        "q\nA. 1\nB.  2\nC. 3 \nD. 4\nAnswer: D\n\nq\nA. 1\nB.  2\nC. 3 \nD. 4\nAnswer:", " D")
    pubmed = {"CONTEXTS": ["a", "b"], "QUESTION": "q", "final_decision": "maybe"}
    assert TASKS["PM"].requests(pubmed)[2] == ("Abstract: a\nb\nQuestion: q\nAnswer:", " maybe")
    boolq = {"passage": "", "question": "is it?", "label": 0}
    assert TASKS["BoolQ"].requests(boolq)[0] == ("\nQuestion: is it??\nAnswer:", " no")
    obqa = {"question_stem": "42", "choices": {"text": ["x"] * 4, "label": list("ABCD")},
            "answerKey": " B"}
    assert TASKS["OBQA"].requests(obqa)[0] == ("42", " x")
    assert TASKS["OBQA"].score(obqa, [-2, -1, -1, -3]) == {"acc": 1.0, "acc_norm": 1.0}
    gsm8k = {"question": "q", "answer": "<<1+1=2>>2\n#### 2"}
    assert TASKS["gsm8k"].requests(gsm8k, [gsm8k])[0][0] == (
        "Question: q\nAnswer: <<1+1=2>>2\n#### 2\n\nQuestion: q\nAnswer:")
    mbpp = {"text": "t", "code": "c", "test_list": ["a", "b", "c", "d"]}
    assert TASKS["mbpp"].requests(mbpp, [mbpp])[0][0].endswith(
        "a\nb\nc\n[BEGIN]\nc\n[DONE]\n\nYou are an expert Python programmer, and here is your task:"
        " t Your code should pass these tests:\n\na\nb\nc\n[BEGIN]\n")


def test_swde_versions():
    doc = {"text": "City:\n", "value": "Rome "}
    assert TASKS["swde"].requests(doc)[0][0] == "City:\n"
    assert TASKS["swde_v1"].requests(doc)[0][0] == "City:"
    assert TASKS["swde"].score(doc, ["in rome"]) == {"contains": 0}
    assert TASKS["swde_v1"].score(doc, ["in rome"]) == {"contains": 1}


def test_scores_of_texts():
    gsm8k = {"question": "q", "answer": "#### 1,200."}
    assert TASKS["gsm8k"].score(gsm8k, ["so $1,200. Question: 7"]) == {
        "exact_match,strict-match": 0.0, "exact_match,flexible-extract": 1.0}
    assert TASKS["gsm8k"].score(gsm8k, ["#### 1200 or 3"]) == {
        "exact_match,strict-match": 1.0, "exact_match,flexible-extract": 0.0}
    samsum = {"answers": ["Ann and Bob meet. They eat."]}
    assert TASKS["SAMSum"].score(samsum, ["\nAnn and Bob meet."])["rouge_score"] == 0.0
    assert TASKS["SAMSum"].score(samsum, [" They eat. Ann and Bob meet.\nx"])["score"] == \
        0.999999995
    trec = {"answers": ["Number"], "all_classes": ["Num", "N", "Number", "Date"]}
    # `Num` goes, so `N` is skipped and stays beside `Number`
    assert TASKS["TREC"].score(trec, ["Number"])["classification_score"] == 0.5


def test_ties_and_nan():
    doc = {"context": "c", "choices": ["a", "bb"], "gold": 0}
    assert CHOICE_FILE.score(doc, [-1.0, -1.0]) == {"acc": 1.0, "acc_norm": 0.0}
    assert CHOICE_FILE.score(doc, [float("nan"), -1.0]) == {"acc": 1.0, "acc_norm": 1.0}


# ------------------------------------------------------------------------------------------------
# eval.py: documents

def test_names():
    assert len(TASKS) == 19
    for name in "ArcC ArcE BQ CQ HS OBA PIQA WG GSM8K MQ HE MBPP SWDE SAMSum TREC EC MK PM".split():
        assert len(TASKS[name].paper) == 3
    assert TASKS["arcc"] is TASKS["arc_challenge"]
    with pytest.raises(UserError, match="arc_challenge"):
        TASKS["arc"]


ARC_DOC = {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}


@pytest.mark.parametrize("name, doc", [
    ("arc_easy", dict(ARC_DOC, answerKey="C")), ("boolq", {"passage": "", "question": "",
                                                           "label": -1}),
    ("hellaswag", dict(HELLASWAG, label="")), ("pubmedqa", {"CONTEXTS": [], "QUESTION": "",
                                                            "final_decision": "perhaps"}),
    ("gsm8k", {"question": "q", "answer": "five"}),
    ("winogrande", {"sentence": "_", "option1": "a", "option2": "b", "answer": ""}),
    ("humaneval", {"prompt": "", "test": "def check(:", "entry_point": "f"}),
    ("longbench_samsum", {"context": "", "question": "", "answers": []}),
    ("mbpp", {"text": "", "code": "", "test_list": ["assert f()"]})])
def test_bad_gold_names_the_document(tmp_path, name, doc):
    good = {"arc_easy": [ARC_DOC]}.get(name, [])
    path = jsonl(tmp_path / "docs.jsonl", good + [doc])
    with pytest.raises(UserError, match=f"docs.jsonl line {len(good) + 1}: "):
        load_docs(TASKS[name], "test", path)


@pytest.mark.parametrize("line, why", [
    ('{"context": "c", "choices": ["a"], "gold": 0}', "two or more"),
    ('{"context": "c", "choices": ["a", "b"], "gold": 2}', "gold answer is 2"),
    ('{"context": "c", "choices": ["a", "b"], "gold": true}', "gold answer is True"),
    ('{"context": "c", "choices": ["a", 1], "gold": 0}', "not a document"),
    ('{"context": "c", "choices": ["a", "b"]}', "'gold'"), ("[1]", "not a JSON object"),
    ("[" * 100_000, "line 1 is not"), ('{"a":' * 100_000, "line 1 is not"),
    ('{"context": "c\\ud83d", "choices": ["a", "b"], "gold": 0}', "line 1: field 'context'.*half"),
    ('{"context": "c", "choices": ["a", "\\ude00b"], "gold": 0}', "line 1: field 'choices'.*half"),
    ('{"prompt": "\\ud83d", "answer": "5"}', "line 1: field 'prompt'.*half"),
    ("{", "not a JSON object"), ('{"prompt": "p", "answer": 5}', "not a text"),
    ('{"prompt": "p", "answer": "5", "stop": "x"}', "list of texts"),
    ('{"prompt": "p", "answer": "5", "max_tokens": 0}', "positive"), ("", "no documents")])
def test_bad_items(tmp_path, line, why):
    (tmp_path / "items.jsonl").write_text(line)
    with pytest.raises(UserError, match=why):
        file_task(str(tmp_path / "items.jsonl"))


def test_item_files(tmp_path):
    items = [{"context": "c", "choices": ["a", "b"], "gold": 1}]
    task, docs = file_task(jsonl(tmp_path / "choices.jsonl.gz", items))
    assert task is CHOICE_FILE and task.requests(docs[0]) == [("c", " a"), ("c", " b")]
    items = [{"prompt": "p", "answer": " 5", "stop": [";"], "max_tokens": 9}]
    task, docs = file_task(jsonl(tmp_path / "answers.jsonl", items))
    assert task is GENERATE_FILE
    assert task.requests(docs[0]) == [("p", {"until": [";"], "max_gen_toks": 9})]
    assert task.score(docs[0], [" 5 ; 6"]) == {"exact_match": 1.0}
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name in ("binary.jsonl", "none.jsonl", "none.parquet"):
        with pytest.raises(UserError, match="cannot read"):
            file_task(str(tmp_path / name))


def test_parquet(tmp_path):
    import datasets
    path = str(tmp_path / "arc.parquet")
    datasets.Dataset.from_list([ARC_DOC] * 3).to_parquet(path)
    assert load_docs(TASKS["ArcE"], "test", path) == [ARC_DOC] * 3
    for value in (datetime.datetime(2026, 1, 1), b"bytes"):     # replace.py's fingerprint crashed
        datasets.Dataset.from_list([dict(ARC_DOC, more=value)] * 3).to_parquet(path)
        with pytest.raises(UserError, match=f"row 1: field 'more'.*{type(value).__name__}"):
            load_docs(TASKS["ArcE"], "test", path)


def test_named_tasks_come_before_files(tmp_path, monkeypatch):
    """A folder or a file called like a task hid it; other files need no ending."""
    monkeypatch.chdir(tmp_path)
    args = types.SimpleNamespace(docs=None, shot_docs=None, shots=None, allow_code_execution=False)
    (tmp_path / "gsm8k").mkdir()
    for name in ("PM", "items"):
        jsonl(tmp_path / name, [{"context": "c", "choices": ["a", "b"], "gold": 1}])
    assert evaluation.find_task("gsm8k", args) is TASKS["gsm8k"]
    assert evaluation.find_task("PM", args) is TASKS["pubmedqa"]
    assert evaluation.find_task("items", args) is evaluation.find_task("./PM", args) is CHOICE_FILE
    with pytest.raises(UserError, match="no task './gsm8k'"):
        evaluation.find_task("./gsm8k", args)


@needs_shared
def test_pubmedqas_official_split_is_made_again(monkeypatch):
    """The Hub has the labelled rows unsplit: in their original order they give the official test
    set, item by item; in another order that is said, with the flags that work."""
    import datasets
    data = SHARED / "data" / "pubmedqa"
    search, test = ([json.loads(line) for line in open(data / f"{name}.jsonl", encoding="utf-8")]
                    for name in ("validation", "test"))
    rows, draw = [], random.Random(0)
    for label in ("yes", "no", "maybe"):        # the authors' shuffles, undone
        mine = [[doc for doc in docs if doc["final_decision"] == label] for docs in (search, test)]
        places = list(range(len(sum(mine, []))))
        draw.shuffle(places)
        late = dict(zip(places[len(mine[0]):], mine[1]))
        early = iter(mine[0])
        rows += [late.get(i) or next(early) for i in range(len(places))]
    rows = [{"pubid": int(doc["pubmed_id"]), "question": doc["QUESTION"], "long_answer": "",
             "context": {"contexts": doc["CONTEXTS"]}, "final_decision": doc["final_decision"]}
            for doc in rows]
    asked = []
    monkeypatch.setattr(datasets, "load_dataset",
                        lambda *args, split: asked.append((*args, split)) or rows)
    ours, reported, _ = split_docs(TASKS["pubmedqa"])
    of = lambda docs: [TASKS["pubmedqa"].requests(doc) for doc in docs]
    assert asked == [("qiaojin/PubMedQA", "pqa_labeled", "train")] * 2
    assert of(reported) == of(test) and sorted(of(ours)) == sorted(of(search))
    rows.reverse()
    with pytest.raises(UserError, match="official test set.*`--task pubmedqa --docs FILE`"):
        load_docs(TASKS["pubmedqa"], "test")


@pytest.fixture
def hub(monkeypatch):
    """A Hub that makes up GSM8K-, BoolQ- and ARC-like splits; `asked` lists what was loaded."""
    import datasets
    sizes, asked = {"train": 900, "validation": 60, "test": 40, "train+validation": 960}, []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [{"question": f"{split} {i}", "answer": "#### 1", "passage": "", "label": 0,
                 "prompt": f"{i}", "test": "", "entry_point": "f", **{
                     key: ARC_DOC[key] for key in ("choices", "answerKey")}}
                for i in range(sizes[split])]
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_search_is_never_what_is_reported(hub):
    search, report, notes = split_docs(TASKS["boolq"])  # the harness scores validation
    assert {doc["question"].split()[0] for doc in search} == {"train"} and len(search) == 500
    assert len(report) == 60 and report[7]["question"] == "validation 7"
    assert search == split_docs(TASKS["boolq"])[0] != split_docs(TASKS["boolq"], seed=1)[0]
    order = [int(doc["question"].split()[1]) for doc in search]
    assert order == sorted(order)
    assert hub[:2] == [("aps/super_glue", "boolq", "train"),
                       ("aps/super_glue", "boolq", "validation")]
    search, report, notes = split_docs(TASKS["ArcE"])
    assert (len(search), len(report)) == (60, 40) and "1.7 points" in notes[1]
    search, report, notes = split_docs(TASKS["HE"], size=15)
    assert (len(search), len(report)) == (15, 20)
    assert not {doc["prompt"] for doc in search} & {doc["prompt"] for doc in report}
    assert split_docs(TASKS["gsm8k"], size=50)[0][0]["question"].startswith("train")


def test_paper_splits_leak_and_say_so(hub):
    for name, size in (("boolq", 60), ("HE", 40)):
        search, report, notes = split_docs(TASKS[name], paper_splits=True)
        assert search == report and len(report) == size and "leaks" in notes[0]
    for name in ("ArcE", "gsm8k"):  # the paper's reading of these does not leak
        assert split_docs(TASKS[name], paper_splits=True) == split_docs(TASKS[name])


def test_documents_in_both_files(tmp_path):
    docs = [{"passage": "", "question": str(i), "label": 0} for i in range(300)]
    one = jsonl(tmp_path / "one.jsonl", docs[:200])
    two = jsonl(tmp_path / "two.jsonl", docs[150:])
    search, report, notes = split_docs(TASKS["boolq"], one, two)
    assert search == docs[:150] and len(report) == 150 and "50" in notes[1]
    with pytest.raises(UserError, match="also reported"):
        split_docs(TASKS["boolq"], one, one)


def test_shots():
    pool = [{"question": str(i), "answer": "#### 1"} for i in range(6)]
    random_state = random.getstate()
    shots = draw_shots(TASKS["gsm8k"], pool, 4, pool, searched=True)
    assert random.getstate() == random_state
    draw = random.Random(1234)
    for doc, mine in zip(pool, shots):
        assert mine == [row for row in draw.sample(pool, 5) if row != doc][:4]
    twins = pool + [dict(pool[0], source="copy")]
    for mine in draw_shots(TASKS["gsm8k"], [pool[0]] * 20, 5, twins, searched=True):
        assert len(mine) == 5 and "0" not in [row["question"] for row in mine]
    assert draw_shots(TASKS["MK"], pool, 2, pool) == [pool[:2]] * 6
    assert draw_shots(TASKS["mbpp"], [{}], 2, None) == [list(MBPP_SHOTS[:2])]
    for name, k in (("HE", 1), ("mbpp", 4), ("gsm8k", 7)):
        with pytest.raises(UserError, match="shots cannot"):
            draw_shots(TASKS[name], pool, k, None if name == "HE" else pool)


def test_no_hub(monkeypatch):
    import datasets

    def gated(*args, **kwargs):
        raise ConnectionError("Couldn't reach it\nand more")
    monkeypatch.setattr(datasets, "load_dataset", gated)
    with pytest.raises(UserError) as caught:
        load_docs(TASKS["PM"], "test")
    told = str(caught.value)
    assert "\n" not in told
    for word in ("qiaojin/PubMedQA", "--docs", "CONTEXTS, QUESTION, final_decision", "log"):
        assert word in told


# ------------------------------------------------------------------------------------------------
# eval.py: generated programs

HOSTILE = {
    "fork bomb": "import posix\nwhile True:\n    try: posix.fork()\n    except OSError: pass",
    "endless loop": "while True: pass",
    "deaf": "import signal\nfor i in range(1, 65):\n    try: signal.signal(i, signal.SIG_IGN)\n"
            "    except (OSError, ValueError): pass\nwhile True: pass",
    "10 GB": "bytearray(10 * 2**30)",
    "10 GB, bit by bit": "x = []\nwhile True: x.append(bytearray(2**26))",
    "1 GB printed": "for _ in range(1024): print('x' * 2**20)",
    "1 GB to stderr": "import os\nfor _ in range(1024):\n    try: os.write(2, b'x' * 2**20)\n"
                      "    except OSError: pass",
    "1 GB file": "with open('big', 'wb') as file:\n"
                 "    for _ in range(1024): file.write(bytes(2**20))",
    "kill parent": "import os; os.kill(os.getppid(), 9)",
    "kill parent, really": "import posix; posix.kill(posix.getppid(), 9)",
    "kill all": "import os; os.kill(-1, 9)",
    "kill all, really": "import posix; posix.kill(-1, 9)",
    "kill bystander, really": "import posix; posix.kill({bystander}, 9)",
    "rmtree": "import shutil; shutil.rmtree({folder!r})",
    "unlink, really": "import posix; posix.unlink({folder!r} + '/planted')",
    "truncate": "open({folder!r} + '/planted', 'w')",
    "write beside": "open({folder!r} + '/new', 'w')",
    "mount anew": "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.unshare(0x10020000)\n"
                  "for path in ('/', {folder!r}):\n"
                  "    libc.umount2(path.encode(), 2)\n"
                  "    libc.mount(None, path.encode(), None, 0x1020, None)\n"
                  "open({folder!r} + '/planted', 'w')",
    "first process": "import os; os.listdir('/proc/1/root')",
    "become root": "import posix; posix.setuid({other})",
    "secret": "open({home!r} + '/secret').read()",
    "own home": "import os; os.listdir(os.path.expanduser('~'))[0]",
    "stdin": "input()",
    "stdin, really": "import os; os.read(0, 1)",
    "exit": "import sys; sys.exit(0)",
    "exit, really": "import os; os._exit(0)",
    "network": "import socket; socket.create_connection(('127.0.0.1', {port}))",
    "daemon": "import socket; socket.socket(socket.AF_UNIX).connect({home!r} + '/daemon')",
    "environment": "import os; os.environ['PLANTED']",
    "descriptors": "import os; os.fstat({fd})",
}
OPEN_TO_OTHER_USER = ("write beside", "unlink, really", "truncate", "mount anew", "network",
                      "daemon")
linux = pytest.mark.skipif(sys.platform != "linux", reason="the fence needs Linux")


@pytest.fixture(params=[evaluation.NAMESPACES, evaluation.OTHER_USER])
def kind(request, monkeypatch, tmp_path):
    """A kind of fence, where it works: OTHER_USER needs root and a Python that anyone may run."""
    if request.param == evaluation.OTHER_USER:
        if os.getuid():
            pytest.skip("only root can become another user")
        monkeypatch.setattr(sys, "executable", shutil.which("python3", path=os.defpath)
                            or sys.executable)
    for path in (tmp_path, *tmp_path.parents[:3]):
        if path.name.startswith(("test_", "pytest-")):
            path.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    trial = run_program("import typing; assert 1", 30.0, request.param)
    if not trial.passed:
        pytest.skip(f"this system does not allow {request.param}: {trial.reason}")
    return request.param


def fenced_processes(folder):
    """Processes whose temporary directory is in `folder`, once the dying have had a second."""
    for _ in range(20):
        found = subprocess.run(["grep", "-lsa", f"TMPDIR={folder}/", *(
            str(path) for path in Path("/proc").glob("[0-9]*/environ"))],
            capture_output=True, text=True).stdout.split()
        if not found:
            break
        time.sleep(0.05)
    return found


@linux
@pytest.mark.parametrize("kind, name", [
    (kind, name) for kind in (evaluation.NAMESPACES, evaluation.OTHER_USER) for name in HOSTILE
    if kind == evaluation.NAMESPACES or name not in OPEN_TO_OTHER_USER], indirect=["kind"])
def test_hostile_program(tmp_path, monkeypatch, name, kind):
    """Without it a program that a model wrote harms the machine, or counts as a right answer."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "secret").write_text("secret")
    (home / "secret").chmod(0o600 if kind == evaluation.OTHER_USER else 0o644)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PLANTED", "1")
    bystander = subprocess.Popen(["sleep", "60"])
    reader, writer = os.pipe()
    high = os.dup2(writer, 200)
    with (tempfile.TemporaryDirectory(dir=ROOT) as folder,
          socket.create_server(("127.0.0.1", 0)) as server,
          socket.create_server(str(home / "daemon"), family=socket.AF_UNIX)):
        (home / "daemon").chmod(0o777)
        planted = Path(folder, "planted")
        planted.write_text("precious")
        planted.chmod(0o666)
        Path(folder).chmod(0o777)  # nothing but the fence protects the file
        program = HOSTILE[name].format(
            folder=folder, home=str(home), fd=high, bystander=bystander.pid,
            port=server.getsockname()[1], other=0 if os.getuid() == 0 else os.getuid() + 1)
        try:
            endless = name in ("fork bomb", "endless loop", "deaf")
            verdict = run_program(program, 1.0 if endless else 30.0, kind)
            assert not verdict.passed and (verdict.reason == "timed out") == endless, verdict
            assert bystander.poll() is None
            assert os.listdir(folder) == ["planted"] and planted.read_text() == "precious"
            assert not fenced_processes(tmp_path) and os.listdir(tmp_path) == ["home"]
        finally:
            bystander.kill()
            bystander.wait()
            for fd in (reader, writer, high):
                os.close(fd)


@linux
def test_nothing_survives(kind, tmp_path):
    """Without it processes that a program detached run on after its verdict, or delay it."""
    program = ("import os, posix, time\n"
               "for _ in range(3):\n"
               "    if posix.fork() == 0:\n"
               "        try: os.setsid()\n"
               "        except OSError: pass\n"
               "        if posix.fork(): posix._exit(0)\n"
               "        time.sleep(300)\n"
               "time.sleep(0.2)\n")
    assert run_program(program, 60.0, kind).passed
    assert not fenced_processes(tmp_path)


@linux
def test_fence_keeps_what_programs_need(kind):
    """Without it right answers fail, or the same program passes in one run and not in the next."""
    assert run_program("import os\nopen('x', 'w').write('y')\nassert open('x').read() == 'y'\n"
                       "path = os.path.expanduser('~/z')\nopen(path, 'w').write('z')\n"
                       "open(os.devnull, 'w').write('z')\nprint('hello')\n"
                       "assert __name__ == 'builtins'", 30.0, kind).passed
    assert run_program("import decimal, json.tool, multiprocessing", 30.0, kind).passed
    if kind == evaluation.NAMESPACES:
        assert run_program("import numpy; assert numpy.ones(3).sum() == 3", 30.0, kind).passed
    assert run_program("x = '\\ud800'", 30.0, kind).passed
    assert not run_program("x = '\ud800'", 30.0, kind).passed
    drawn = [run_program("raise Exception(hash('a'))", 30.0, kind).reason for _ in range(2)]
    assert drawn[0] == drawn[1] and "Exception: " in drawn[0]
    assert run_program("while True: pass", 1.0, kind).reason == "timed out"


@linux
def test_no_fence_no_programs(kind, tmp_path, monkeypatch):
    """Without it programs run unfenced, or end in a traceback, where the system gives no fence."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "unshare").write_text("#!/bin/sh\necho unshare: Operation not permitted >&2\nexit 1\n")
    (tools / "unshare").chmod(0o755)
    monkeypatch.setattr(os, "defpath", f"{tools}:{os.defpath}")
    if kind == evaluation.OTHER_USER:
        assert evaluation.fence.__wrapped__() == kind
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    with pytest.raises(UserError, match="needs Linux with util-linux: .*not permitted$"):
        evaluation.fence.__wrapped__()
    (tools / "unshare").unlink()
    (tools / "sh").symlink_to(shutil.which("sh"))
    monkeypatch.setattr(os, "defpath", str(tools))
    with pytest.raises(UserError, match="needs Linux with util-linux: .*unshare.*not found$"):
        evaluation.fence.__wrapped__()


def test_code_needs_permission():
    """Without it a model's programs run although nobody allowed that."""
    doc = {"prompt": "def f():\n", "test": "def check(f): assert f() == 1", "entry_point": "f"}
    for task, item in ((TASKS["HE"], doc), (TASKS["mbpp"], MBPP_SHOTS[0])):
        with pytest.raises(UserError, match="--allow-code-execution"):
            task.score(item, ["    return 1"])


@linux
def test_code_scores():
    """Without it the program that is run is not the one that lm-evaluation-harness runs."""
    doc = {"prompt": "def f():\n", "test": "def check(f): assert f() == 1", "entry_point": "f"}
    text = "    return 1\n\nprint(f())"
    assert TASKS["HE"].score(doc, [text], allow_code=True) == {"pass@1": 1.0}
    assert TASKS["HE"].score(doc, ["    return 2"], allow_code=True) == {"pass@1": 0.0}
    shot = MBPP_SHOTS[1]
    assert TASKS["mbpp"].score(shot, [shot["code"] + "\n[DONE] x"], allow_code=True) == {
        "pass_at_1": 1.0}


# ------------------------------------------------------------------------------------------------
# replace.py: Algorithm 1 on tables of scores

def table_search(table, num_layers, **kwargs):
    asked = []

    def score(sets):
        asked.extend(frozenset(s) for s in sets)
        return [table(frozenset(s)) for s in sets]

    return replace.greedy(score, num_layers, **kwargs), asked


def brute_force(table, num_layers, p_min, run_all):
    """Algorithm 1 written again from the paper's page, in exact fractions of 1,000 items."""
    current, best, opt, p_best = [], [], [], table(frozenset())
    order, stopped = [], False
    for _ in range(num_layers):
        p_star, l_star = -1, None
        for layer in range(num_layers):
            if layer not in current and table(frozenset(current + [layer])) > p_star:
                p_star, l_star = table(frozenset(current + [layer])), layer
        current = current + [l_star]
        order.append((l_star, p_star))
        if not stopped:
            if p_star >= p_best:
                best, p_best = list(current), p_star
            if p_star >= p_min:
                opt = list(current)
            else:
                stopped = True
        if stopped and not run_all:
            break
    return order, best, opt


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("run_all", (False, True))
def test_greedy_equals_a_brute_force(seed, run_all):
    """Random integer scores from a small range, so that there are many ties."""
    rng, num_layers = random.Random(seed), random.Random(seed).randint(1, 6)
    values = {}
    table = lambda layers: values.setdefault(layers, rng.randint(10, 20) - len(layers) // 2)
    for size in range(num_layers + 1):
        for layers in itertools.combinations(range(num_layers), size):
            table(frozenset(layers))
    p_min = 0.8 * values[frozenset()]
    search, asked = table_search(table, num_layers, max_drop=0.2, run_all=run_all)
    order, best, opt = brute_force(table, num_layers, p_min, run_all)
    assert [(s.layer, s.score) for s in search.steps] == order
    assert (list(search.best), list(search.opt)) == (best, opt)
    if run_all:
        assert len(asked) == 1 + num_layers * (num_layers + 1) // 2 == len(set(asked))


def test_greedy_on_a_table_with_a_known_answer():
    scores = {(): 0.80, (0,): 0.70, (1,): 0.80, (2,): 0.80, (0, 1): 0.79, (1, 2): 0.78,
              (0, 1, 2): 0.50}
    table = lambda layers: scores[tuple(sorted(layers))]
    search, _ = table_search(table, 3, max_drop=0.05)
    assert [s.layer for s in search.steps] == [1, 0, 2]         # the tie of 1 and 2: lowest index
    assert search.best == (1,)                                  # >= prefers more linear layers
    assert search.opt == (1, 0) and search.p_min == pytest.approx(0.76)
    assert (search.steps[0].runner_up, search.steps[0].runner_up_score) == (2, 0.80)
    scores[0, 1, 2] = 0.85                                      # a step below P_min may be M_best
    search, _ = table_search(table, 3, p_min=0.9)
    assert search.opt == () and search.best == (1,) and len(search.steps) == 1
    search, _ = table_search(table, 3, p_min=0.9, run_all=True)
    assert search.best == (1,) and len(search.steps) == 3       # the curve goes on, M_best does not


def test_equal_counts_compare_as_equal():
    third = {0: 1 / 3, 1: 0.1 + 0.2 + 1 / 30}                   # differ in the last bit
    assert third[0] != third[1]
    search, _ = table_search(lambda s: third.get(next(iter(s), 0)) if len(s) < 2 else 0.0, 2)
    assert search.steps[0].layer == 0 and search.best == (0,)
    search, _ = table_search(lambda s: 0.95 * 0.6 if s else 0.6, 1, max_drop=0.05)
    assert search.opt == (0,)


# ------------------------------------------------------------------------------------------------
# replace.py: the search on a model

def result_of(path):
    result = json.loads((path / "result.json").read_text())
    return {k: v for k, v in result.items() if k != "cost"}, result["cost"]


def naive_accuracy(model, tokenizer, path):
    """Accuracy from scratch: one choice at a time, no batches, no engine."""
    hits = []
    for line in Path(path).read_text().splitlines():
        item, sums = json.loads(line), []
        first = len(tokenizer.encode(item["context"]))
        for choice in item["choices"]:
            ids = tokenizer.encode(item["context"] + " " + choice)
            log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            sums.append(sum(log_probs[t - 1, ids[t]].item() for t in range(first, len(ids))))
        hits.append(sums.index(max(sums)) == item["gold"])
    return sum(hits) / len(hits)


@needs_shared
@pytest.mark.parametrize("name, attn", (("recall", "gdn"), ("cloze", "jet")))
def test_search_on_the_real_model_equals_a_brute_force(name, attn, tmp_path):
    """All rounds on real items, with layers shared and without, bit for bit, and from scratch."""
    model, tokenizer = evaluation.load_model(str(STORIES))
    items = tmp_path / "items.jsonl"
    lines = (SHARED / "data" / "stories" / f"{name}-validation.jsonl").read_text().splitlines()
    items.write_text("\n".join(lines[:12]) + "\n")
    task, docs = evaluation.file_task(items)
    mixers = distill.make_mixers(model, attn, range(5), "inherit", 0)
    chunks = list(distill.pack((tokenizer.encode(doc["context"]) for doc in docs), 64))
    distill.solve_o_proj(model, mixers, torch.stack(chunks).chunk(2))    # even and odd batches
    found = []
    for plain, batch_size in ((False, 8), (True, 8), (False, 1), (False, 32)):
        split, outputs = evaluation.Prepared(task, docs, model, tokenizer, batch_size), {}

        def score(sets):
            scores = evaluation.evaluate_hybrids(model, split, mixers, sets, plain=plain)
            outputs.update(zip(sets, (s.outputs for s in scores)))
            return [s.mean() for s in scores]

        search = replace.greedy(score, 5, p_min=0.0, run_all=True)
        found.append(([(s.layer, s.score) for s in search.steps], list(search.best), outputs))
    assert found[0] == found[1] and found[0][:2] == found[2][:2] == found[3][:2]

    def table(layers):
        with replace.replaced(model, mixers, layers):
            return naive_accuracy(model, tokenizer, items)

    order, best, _ = brute_force(table, 5, 0.0, True)
    assert (order, best) == found[0][:2]


@pytest.mark.parametrize("attn", MIXERS)
def test_search_equals_a_brute_force_from_scratch(lab, runs, attn, tmp_path, monkeypatch, capsys):
    """Order, scores, M_best and M_opt against a search written separately; the checkpoints
    reproduce the scores; the journal holds every evaluation once."""
    code, printed, err = call(replace_command(lab, runs[attn], tmp_path, all=True, max_drop=0.5),
                              monkeypatch, capsys)
    assert code == 0, err
    result, cost = result_of(tmp_path)
    model, tokenizer = load_lab_model(lab)
    mixers = distill.load_blocks(str(runs[attn]), model)

    def table(layers, path=lab / "val.jsonl"):
        with replace.replaced(model, mixers, layers):
            return naive_accuracy(model, tokenizer, path)

    order, best, opt = brute_force(table, 4, 0.5 * result["p_base"], True)
    assert result["order"] == [layer for layer, _ in order]
    assert result["validation"] == pytest.approx([score for _, score in order], abs=1e-12)
    assert result["best"]["layers"] == sorted(best) and result["opt"]["layers"] == sorted(opt)
    assert result["test_base"] == pytest.approx(table((), lab / "test.jsonl"))
    for name in ("best", "opt"):
        hybrid, _ = evaluation.load_model(str(tmp_path / name))
        assert linear_attn.linear_layers(hybrid) == result[name]["layers"]
        for split, path in (("validation", "val.jsonl"), ("test", "test.jsonl")):
            assert naive_accuracy(hybrid, tokenizer, lab / path) == pytest.approx(
                result[name][split])
    rows = (tmp_path / "search.jsonl").read_text().splitlines()
    assert sum('"validation"' in row for row in rows[1:]) == 11 == cost["evaluations"]
    assert (tmp_path / "search.png").read_bytes()[:4] == b"\x89PNG"
    assert {k: printed[k] for k in result} == result and printed["next"].startswith("python eval")


def test_killed_search_gives_the_same_result(lab, runs, tmp_path):
    make = lambda name: replace_command(lab, runs["gdn"], tmp_path / name, all=True)
    killed_at_random(make, seed=1)
    assert result_of(tmp_path / "whole")[0] == result_of(tmp_path / "killed")[0]
    a, b = ([json.loads(x) for x in (tmp_path / n / "search.jsonl").read_text().splitlines()]
            for n in ("whole", "killed"))
    drop = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert drop(a) == drop(b)


def test_journal_cut_at_any_byte_is_taken_up(lab, runs, tmp_path, monkeypatch, capsys):
    words = replace_command(lab, runs["gla"], tmp_path, all=True)
    assert call(words, monkeypatch, capsys)[0] == 0
    wanted, whole = result_of(tmp_path)[0], (tmp_path / "search.jsonl").read_bytes()
    for cut in random.Random(0).sample(range(len(whole)), 4) + [0]:
        (tmp_path / "search.jsonl").write_bytes(whole[:cut])
        assert call(words, monkeypatch, capsys)[0] == 0
        assert result_of(tmp_path)[0] == wanted


@pytest.mark.parametrize("change", (dict(batch_size=4), dict(limit=20), dict(metric="acc_norm"),
                                    dict(dtype="bfloat16")))
def test_a_journal_of_other_settings_is_refused(lab, runs, tmp_path, monkeypatch, capsys, change):
    assert call(replace_command(lab, runs["gdn"], tmp_path), monkeypatch, capsys)[0] == 0
    before = (tmp_path / "search.jsonl").read_bytes()
    code, _, err = call(replace_command(lab, runs["gdn"], tmp_path, **change), monkeypatch, capsys)
    assert code == 2 and "another search" in err
    assert (tmp_path / "search.jsonl").read_bytes() == before


def test_a_given_set_is_scored_and_saved(lab, runs, tmp_path, monkeypatch, capsys):
    code, result, err = call(replace_command(lab, runs["jet"], tmp_path, layers="0,2-3"),
                             monkeypatch, capsys)
    assert code == 0, err
    assert result["opt"]["layers"] == result["best"]["layers"] == [0, 2, 3]
    hybrid, tokenizer = evaluation.load_model(str(tmp_path / "opt"))
    assert result["opt"]["test"] == pytest.approx(
        naive_accuracy(hybrid, tokenizer, lab / "test.jsonl"))
    assert result["cost"]["evaluations"] == 2


def test_a_bf16_base_gives_a_bf16_hybrid_with_a_card(lab, runs, tmp_path, monkeypatch, capsys):
    """A CPU holds bf16 models in fp32, but what it saves is no wider than the base; scores are of
    the rounded weights, so eval.py gives the same. It says nothing of model types, and asks for
    no leave to run code."""
    model, tokenizer = load_lab_model(lab)
    model.bfloat16().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    words = replace_command(lab, runs["jet"], tmp_path / "out", model=tmp_path / "base",
                            layers="1-2")
    code, result, err = call(words, monkeypatch, capsys)
    assert code == 0, err
    warned = []
    monkeypatch.setattr(transformers.configuration_utils.logger, "warning", warned.append)
    opt = tmp_path / "out" / "opt"
    assert {t.dtype for t in load_file(opt / "model.safetensors").values()} == {torch.bfloat16}
    code, scores, err = call(command("eval.py", model=opt, task=lab / "test.jsonl"), monkeypatch,
                             capsys)
    assert scores["results"][0]["value"] == result["opt"]["test"] and not warned
    card = (opt / "README.md").read_text()
    for text in (f"Layers [1, 2] of `{tmp_path / 'base'}`", "(n = 24)", "(n = 16)", "2601.11667",
                 f"| {result['opt']['test']:.4f} +- ", f"{result['test_base']:.4f} +- ",
                 "python distill.py --model", " ".join(map(str, words)), "trust_remote_code=True",
                 transformers.__version__, "corpus.jsonl (4,096 tokens)", "continuous batching"):
        assert text in card, text


def test_a_full_disk_loses_nothing(lab, runs, tmp_path):
    """Files may not grow past a limit: one sentence, exit code 1, and the run goes on later."""
    limited = lambda size: dict(preexec_fn=lambda: importlib.import_module("resource").setrlimit(
        importlib.import_module("resource").RLIMIT_FSIZE, (size, size)))
    words = distill_command(lab, tmp_path / "run", attn="gdn", resume=True)
    process = start(words, **limited(100_000))
    _, err = process.communicate()
    assert process.returncode == 1 and "Traceback" not in err, err
    assert not list((tmp_path / "run").glob("*.tmp")) + list((tmp_path / "run").glob(".*.tmp"))
    assert start(words).wait() == 0
    a, b = (load_file(distill.layer_file(p, 3)) for p in (tmp_path / "run", runs["gdn"]))
    assert all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------
# The cheap search: what candidates share is run once, and nothing changes by a bit

SEARCHED = {
    "llama": lambda: transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 5}),
    "qwen2": lambda: transformers.Qwen2Config(**{**SMALL, "num_hidden_layers": 4}),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=6, n_head=4, n_positions=64, bos_token_id=None,
        eos_token_id=None),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        **{k: v for k, v in SMALL.items() if k != "num_key_value_heads"} | {"num_hidden_layers": 4}),
    "gemma3": lambda: transformers.Gemma3TextConfig(        # two kinds of masks, sliding windows
        **{**SMALL, "num_hidden_layers": 4}, head_dim=16, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 2),
    "falcon": lambda: transformers.FalconConfig(            # layers return tuples
        vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        bos_token_id=None, eos_token_id=None, pad_token_id=None),
}


OWN_LINEAR = {      # families with linear layers of their own, beside or within softmax layers
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **{**SMALL, "num_hidden_layers": 4}, head_dim=8, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    "falcon_h1": lambda: transformers.FalconH1Config(
        **SMALL, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8,
        mamba_chunk_size=8),
}


TABLES = {      # families that have no positions past a limit, or others there
    "gpt2": lambda n: transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=n, eos_token_id=None),
    "opt": lambda n: transformers.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=n),
    "gpt_neo": lambda n: transformers.GPTNeoConfig(         # the keys have a table of their own
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, window_size=8,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=n, eos_token_id=None),
    "gptj": lambda n: transformers.GPTJConfig(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=n,
        eos_token_id=None),
    "codegen": lambda n: transformers.CodeGenConfig(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=n,
        eos_token_id=None),
    "gpt_bigcode": lambda n: transformers.GPTBigCodeConfig(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=n, eos_token_id=None),
    "mpt": lambda n: transformers.MptConfig(
        vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=n),
    "longrope": lambda n: transformers.LlamaConfig(**SMALL, max_position_embeddings=n, rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": n // 2,
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}),
    "dynamic": lambda n: transformers.LlamaConfig(**SMALL, max_position_embeddings=n, rope_parameters={
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}),
}


@pytest.mark.parametrize("family", TABLES)
def test_padding_reaches_no_further_than_the_positions(family):
    """Requests up to the model's limit, of very different length: in batches as one by one. Past a
    table of positions is an IndexError; past longrope's border every position's factors change."""
    limit, rng = 50, random.Random(0)
    model, tokenizer = random_model(TABLES[family](limit), scale=2.0), evaluation.demo_tokenizer()
    text = lambda n: evaluation.demo_text(rng.randrange(2, 64) for _ in range(n))
    sizes = ((limit - 1, 2), (3, limit - 4), (limit - 9, 9), (20, 7), (5, 3), (25, 25))
    docs = [{"context": text(n), "choices": [text(m), text(m - 1), text(1)], "gold": 0}
            for n, m in sizes]
    prompts = [{"prompt": text(n - 1), "answer": "", "max_tokens": m} for n, m in sizes]
    texts = []
    for size in (1, 3, 32):
        assert_as_one_by_one(model, evaluation.Prepared(CHOICE_FILE, docs, model, tokenizer, size),
                             size)
        split = evaluation.Prepared(GENERATE_FILE, prompts, model, tokenizer, size)
        texts.append(evaluation.evaluate(model, split).outputs)
    assert texts[0] == texts[1] == texts[2]


def search_split(model, kind, batch_size):
    """Items whose contexts and choices differ in length."""
    rng = random.Random(1)
    text = lambda n: evaluation.demo_text(rng.randrange(64) for _ in range(n))
    if kind == "generate":
        task, docs = GENERATE_FILE, [{"prompt": text(rng.randint(3, 9)), "answer": "t1",
                                      "max_tokens": 4} for _ in range(7)]
    else:
        longest = 1 if kind == "single" else 4
        task, docs = CHOICE_FILE, [
            {"context": text(rng.randint(3, 9)), "gold": rng.randrange(3),
             "choices": [text(rng.randint(1, longest)) for _ in range(3)]} for _ in range(11)]
    return evaluation.Prepared(task, docs, model, evaluation.demo_tokenizer(), batch_size,
                               whole=kind == "whole")


def search_case(family, attn, kind, batch_size):
    """A random model, its mixers, and a split."""
    model = random_model(SEARCHED[family](), scale=2.0)
    split = search_split(model, kind, batch_size)
    init = "random" if family == "falcon" else "inherit"    # its fused layout is not known
    return model, shaken_mixers(model, attn, init), split


@torch.no_grad()
def assert_as_one_by_one(model, split, batch_size):
    """The engine's log-likelihoods are those of one request after the other without a cache."""
    for batch in split.batches:
        found = evaluation.batch_log_likelihoods(model, split.requests, batch, batch_size)
        assert set(found) == {i for group in batch for i in group.members}
        for i, request in ((i, split.requests[i]) for i in found):
            ids = torch.tensor([request.tokens])
            logits = model(ids[:, :-1], use_cache=False).logits[0]  # the last is scored, not read
            places = torch.arange(len(request.tokens))[-request.scored:]
            wanted = logits.double().log_softmax(-1)[places - 1, ids[0, places]].sum().item()
            assert found[i] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("size", (1, 3, 64))
@pytest.mark.parametrize("family", SEARCHED)
def test_how_requests_are_batched_changes_nothing(family, size):
    """Tails in many forwards or in one, hybrids or not: as one request after the other without a
    cache."""
    model, mixers, split = search_case(family, "jet", "choices", 8)
    for layers in ((), (1,), tuple(mixers)):
        with torch.no_grad(), replace.replaced(model, mixers, layers):
            assert_as_one_by_one(model, split, size)


@pytest.mark.parametrize("family", OWN_LINEAR)
def test_base_models_with_linear_layers_of_their_own(family, lab, tmp_path, monkeypatch, capsys):
    """They are scored, their states forked several times from the same prefixes, which stay as
    they are; but they are not converted."""
    model = random_model(OWN_LINEAR[family]())
    assert_as_one_by_one(model, search_split(model, "choices", 8), 4)
    model.save_pretrained(tmp_path / "model")
    evaluation.demo_tokenizer().save_pretrained(tmp_path / "model")
    code, result, err = call(command("eval.py", model=tmp_path / "model", task=lab / "val.jsonl"),
                             monkeypatch, capsys)
    assert code == 0 and result["linear_layers"] == [], err
    code, _, err = call(distill_command(lab, tmp_path / "out", model=tmp_path / "model"),
                        monkeypatch, capsys)
    assert code == 2 and "cannot be converted" in err and not (tmp_path / "out").exists()


class Calls:
    """Counts the tokens that pass through each attention module, from outside."""

    def __init__(self, model, mixers):
        self.tokens, modules = 0, [*attention_modules(model), *mixers.values()]
        self.handles = [m.register_forward_pre_hook(self.count, with_kwargs=True) for m in modules]

    def count(self, module, args, kwargs):
        hidden_states = args[0] if args else kwargs["hidden_states"]
        self.tokens += hidden_states.shape[0] * hidden_states.shape[1]

    def done(self):
        for handle in self.handles:
            handle.remove()
        return self.tokens


@pytest.mark.parametrize("kind", ("choices", "single", "generate", "whole"))
@pytest.mark.parametrize("family", SEARCHED)
def test_shared_layers_change_nothing(family, kind):
    """Rounds with and without replaced layers, several batch sizes: the same outputs, bit for bit;
    the counted forwards are those that happened."""
    attn = list(MIXERS)[(list(SEARCHED).index(family) + len(kind)) % 3]
    for batch_size, linear in ((1, [(0, 1)]), (4, [(), (1,)]), (32, [(0,)])):
        model, mixers, split = search_case(family, attn, kind, batch_size)
        assert evaluation.layers_can_be_shared(model, split, mixers)
        for current in linear:
            sets = [tuple(sorted((*current, layer))) for layer in mixers if layer not in current]
            results = []
            for plain in (False, True):
                calls, cost = Calls(model, mixers), replace.collections.Counter()
                scores = evaluation.evaluate_hybrids(model, split, mixers, sets, plain=plain,
                                                     cost=cost)
                assert calls.done() == cost["run"]
                results.append(([score.outputs for score in scores], cost))
            (shared, cheap), (whole, dear) = results
            assert shared == whole and cheap["plain"] == dear["plain"] == dear["run"]
            full, num_layers = [l for l in mixers if l not in current], len(mixers)
            layers_run = max(full) + sum(num_layers - l for l in full)
            assert cheap["run"] < cheap["plain"] and (kind == "generate" or cheap["run"] * len(
                full) * num_layers == cheap["plain"] * layers_run)
            assert len({str(outputs) for outputs in whole}) == len(sets) or kind == "generate"
        assert not any("forward" in layer.__dict__ for layer in linear_attn.decoder_layers(model))


def test_a_model_that_cannot_share_is_run_plainly(tmp_path):
    """Layers that hand something past the hidden states to those above are found out."""
    model, mixers, split = search_case("llama", "gdn", "choices", 4)
    layers, passed = linear_attn.decoder_layers(model), {}

    def hand_on(module, args, output):
        passed["up"] = output.mean()

    layers[0].register_forward_hook(hand_on)
    layers[0].self_attn.register_forward_hook(lambda m, a, out: passed.update(inner=out[0].mean()))
    layers[4].register_forward_hook(lambda m, a, out: out + passed.pop("inner", 0.0))
    assert not evaluation.layers_can_be_shared(model, split, mixers)
    model, mixers, split = search_case("llama", "gdn", "choices", 4)
    mixers[4].o_proj.weight.data.fill_(math.nan)        # a fault of its own, reported as such
    assert evaluation.layers_can_be_shared(model, split, mixers)
    with pytest.raises(FloatingPointError, match=r"layers \(4,\)"):
        evaluation.evaluate_hybrids(model, split, mixers, [(0,), (4,)])


def test_layer_tokens_follow_the_arithmetic(lab, runs, tmp_path, monkeypatch, capsys):
    """L + sum over rounds of (max C + sum over C of (L - l)) against L (1 + sum of |C|)."""
    code, result, err = call(replace_command(lab, runs["gdn"], tmp_path, all=True), monkeypatch,
                             capsys)
    assert code == 0, err
    full, run, plain = set(range(4)), 4, 4
    for layer in result["order"]:
        run += max(full) + sum(4 - l for l in full)
        plain += 4 * len(full)
        full.remove(layer)
    cost = result["cost"]
    assert cost["layer_tokens"] / cost["plain_layer_tokens"] == pytest.approx(run / plain, rel=1e-9)
    assert f"{cost['saved']:.1%}" in err


def test_benchmark_of_both_phases(monkeypatch, capsys):
    code, result, errors = call(["replace.py", "--benchmark", "--device", "cpu"], monkeypatch, capsys)
    search, distillation = result["search"], result["distillation"]
    assert code == 0 and "tokens per second" in errors and search["evaluations"] == 11
    assert search["plain_layer_tokens"] == 11 * 4 * 8 * 40 > search["layer_tokens"]
    # the FLOPs by hand: q, k, v, o and MLP; the head for one position of each item
    layer = 2 * (64 * 64 * 3 + 3 * 64 * 128) + 2 * 64 * 64 / (4 * 40)
    assert search["flops_per_second"] * search["seconds"] / search["layer_tokens"] == pytest.approx(
        layer, rel=0.01)
    assert distillation["hours"] == pytest.approx(
        1e8 / distillation["tokens_per_second"] / 3600)
    code, result, errors = call(["replace.py", "--benchmark", "--device", "cpu", "--limit", "2"],
                                monkeypatch, capsys)
    search = result["search"]
    assert search["plain_layer_tokens"] == 11 * 4 * 2 * 40 and search["items"] == 2
    assert search["hours"] == pytest.approx(search["seconds"] * 8 / 2 / 3600)
    assert "on 2 items, in proportion to 8" in errors
    code, _, errors = call(["replace.py", "--benchmark", "--model", "m"], monkeypatch, capsys)
    assert code == 2 and "its own model" in errors


@pytest.mark.parametrize("attn", MIXERS)
@pytest.mark.parametrize("batch_size", (1, 8, 32))
def test_slower_ways_give_the_same(lab, runs, attn, batch_size, tmp_path, monkeypatch, capsys):
    """--plain: result.json but for its cost; --whole: order and accuracies. There are ties."""
    found = {}
    for name, flags in (("shared", {}), ("plain", {"plain": True}), ("whole", {"whole": True})):
        words = replace_command(lab, runs[attn], tmp_path / name, all=True, batch_size=batch_size,
                                limit=9, **flags)
        code, _, err = call(words, monkeypatch, capsys)
        assert code == 0, err
        found[name], _ = result_of(tmp_path / name)
    assert found["shared"] == found["plain"]
    for key in ("order", "validation", "best", "opt", "test_base"):
        assert found["shared"][key] == found["whole"][key], key
    assert sum(step["ties"] for step in found["shared"]["steps"]) > 0


def test_generation_searches_share_the_prompt(lab, runs, tmp_path, monkeypatch, capsys):
    found = []
    for name, flags in (("shared", {}), ("plain", {"plain": True})):
        words = replace_command(lab, runs["jet"], tmp_path / name, all=True, **flags)
        words[words.index("--task") + 1] = words[words.index("--test") + 1] = lab / "generate.jsonl"
        code, _, err = call(words, monkeypatch, capsys)
        assert code == 0, err
        found.append(result_of(tmp_path / name))
    (shared, cheap), (plain, dear) = found
    assert shared == plain and cheap["layer_tokens"] < dear["layer_tokens"]


def test_steps_carry_their_statistics(lab, runs, tmp_path, monkeypatch, capsys):
    """Paired differences by hand from the journal's items."""
    _, result, _ = call(replace_command(lab, runs["gla"], tmp_path, all=True), monkeypatch, capsys)
    rows = [json.loads(x) for x in (tmp_path / "search.jsonl").read_text().splitlines()[1:]]
    items = {tuple(r["layers"]): r["items"] for r in rows if r["split"] == "validation"}
    done = ()
    for step in result["steps"]:
        chosen = tuple(sorted((*done, step["layer"])))
        assert sum(items[chosen]) / 24 == pytest.approx(step["score"])
        if step["runner_up"] is not None:
            other = tuple(sorted((*done, step["runner_up"])))
            gaps = [a - b for a, b in zip(items[chosen], items[other])]
            mean = sum(gaps) / 24
            assert step["difference"] == pytest.approx(mean)
            assert step["difference_stderr"] == pytest.approx(
                (sum((g - mean) ** 2 for g in gaps) / 23 / 24) ** 0.5)
            assert step["flipped"] == sum(g != 0 for g in gaps)
            rivals = [layer for layer in range(4) if layer not in chosen]
            assert step["ties"] == sum(sum(items[tuple(sorted((*done, layer)))])
                                       == sum(items[chosen]) for layer in rivals)
        done = chosen
    for name in ("best", "opt"):
        assert result[name]["gap"] == result[name]["validation"] - result[name]["test"]


# ------------------------------------------------------------------------------------------------
# The other strategies

def test_strategies_on_one_journal(lab, runs, tmp_path, monkeypatch, capsys):
    """Each gives what it says, and nothing is scored twice."""
    def run(**flags):
        code, result, err = call(replace_command(lab, runs["gdn"], tmp_path, all=True, **flags),
                                 monkeypatch, capsys)
        assert code == 0, err
        journal = (tmp_path / "search.jsonl").read_text().splitlines()[1:]
        sets = [(r["split"], tuple(r["layers"])) for r in map(json.loads, journal)]
        assert len(sets) == len(set(sets))
        return result, sum(split == "validation" for split, _ in sets), err

    impact, _, err = run(order="impact")
    assert impact["spearman"] is None and "first run --order greedy" in err
    greedy, _, _ = run()
    scores = {tuple(r["layers"]): r["score"] for r in map(json.loads, (
        tmp_path / "search.jsonl").read_text().splitlines()[1:]) if r["split"] == "validation"}
    local, _, _ = run(order="local")
    assert local["order"] == sorted(range(4), key=lambda layer: (-scores[layer,], layer))
    assert local["cost"]["evaluations"] == 1 + 4 + 3        # sets of one are in both halves
    shuffled, count, _ = run(order="random", seed=3)
    assert shuffled["order"] == random.Random(3).sample(range(4), 4)
    even, _, _ = run(order="uniform")
    assert even["sets"] == [[2], [1, 3], [0, 2, 3], [0, 1, 2, 3]] and even["order"] == []
    again, total, err = run(order="impact")
    ranks = {layer: impact["impact"][str(layer)]["impact"] for layer in range(4)}
    assert again["impact"] == impact["impact"] and again["order"] == impact["order"] == sorted(
        ranks, key=lambda layer: (ranks[layer], layer))
    assert again["spearman"] is None or -1 <= again["spearman"] <= 1
    assert "Spearman" in err
    short, now, _ = run(budget=2)
    assert short["order"] == greedy["order"][:2] and len(short["sets"]) == 2 and now == total


def test_linear_probes():
    """The solver stands at the optimum; a label that the states hold is found; equal modules have
    an impact of 0, and one that lost the label has a large one."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    states = F.one_hot(labels, 3).double() @ torch.randn(3, 8, generator=generator,
                                                         dtype=torch.float64)
    states = states + 0.1 * torch.randn(90, 8, generator=generator, dtype=torch.float64)
    probe = replace.fit_probe(states[:45], labels[:45], 3)
    assert probe(states[45:], labels[45:]) == 1.0
    weight = dict(zip(probe.__code__.co_freevars, probe.__closure__))["logits"].cell_contents
    weight = dict(zip(weight.__code__.co_freevars, weight.__closure__))["weight"].cell_contents
    assert weight.grad.abs().max() < 1e-5
    constant = torch.cat([states, torch.full((90, 2), 0.3, dtype=torch.float64)], 1)
    moved = constant + torch.tensor([0.0] * 8 + [1e-6, 0.0], dtype=torch.float64)
    assert replace.fit_probe(constant[:45], labels[:45], 3)(moved[45:], labels[45:]) == 1.0
    assert replace.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert replace.spearman([1, 2, 2, 4], [4, 3, 2, 1]) == pytest.approx(-0.9486832980505138)
    assert replace.spearman([1, 1], [1, 2]) is None


def test_impact_scores(lab, monkeypatch):
    model, split = prepared(lab, "val", batch_size=5)
    mixers, seen = distill.make_mixers(model, "gdn", [0, 1, 2, 3], "inherit", 0), {}
    pooled = replace.pooled_outputs(model, mixers, split)
    doc, tokenizer = split.docs[7], split.tokenizer
    ids = torch.tensor([tokenizer.encode(doc["context"])])
    distill.teacher_forward(model, ids, [2], lambda layer, hidden_states, full: seen.update(
        full=full.mean(1), linear=mixers[2](hidden_states)[0].mean(1)))
    for both, name in zip(pooled[2], ("full", "linear")):
        assert relative(both[7].float(), seen[name][0].detach()) < 1e-5
    monkeypatch.setattr(replace, "pooled_outputs", lambda *args: {
        layer: (full, full) for layer, (full, _) in pooled.items()})
    assert all(s["impact"] == 0 for s in replace.impact_scores(model, mixers, split, 0).values())
    split.docs = split.docs[:3]
    with pytest.raises(UserError, match="3 are too few"):
        replace.impact_scores(model, mixers, split, 0)


def write_record(path, record):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record))


def hand_made_search(folder, order, **changes):
    """result.json and search.jsonl: three layers, scores 0.8, 0.8, 0.75, 0.4 on 80 documents; of 10
    test documents the base has 8 right, M_best (a layer) 9, M_opt (two) and all three layers 7."""
    sets, scores = [sorted(order[:k]) for k in (1, 2, 3)], [0.8, 0.75, 0.4]
    write_record(folder / "result.json", {
        "model": "hub/Llama-3.2-3B-Instruct", "attn": "jet", "task": "PM", "metric": "acc",
        "strategy": "greedy", "p_base": 0.8, "p_min": 0.76, "order": order, "sets": sets,
        "validation": scores, "best": {"layers": sets[0]}, "opt": {"layers": sets[1]},
        "steps": [{"runner_up": 0, "stderr": 0.05}], "n": {"validation": 80, "test": 10},
        "blocks": str(folder.parent / "blocks"), "cost": {
            "device": "cuda:0", "ranks": 2, "search_seconds": 5400, "evaluations": 7}} | changes)
    write_rows(folder / "search.jsonl", [{}, *(
        {"split": "test", "layers": layers, "n": 10, "items": [1] * right + [0] * (10 - right),
         "score": right / 10, "stderr": 0.1} for layers, right in zip([[], *sets], (8, 9, 7, 7)))])


def report(folder, monkeypatch, capsys):
    """Run --report -> (its tables, the last stdout line, stderr)."""
    code, last, err = call(["replace.py", "--report", folder], monkeypatch, capsys)
    assert code == 0, err
    return json.loads((folder / "report.json").read_text())["tables"], last, err


def test_report_of_known_results(tmp_path, monkeypatch, capsys):
    """Means over seeds, paired errors, hours of all processes, the speed-up at the largest batch:
    without this the report could print numbers that the files do not give."""
    hand_made_search(tmp_path / "a", [2, 0, 1])
    hand_made_search(tmp_path / "b", [0, 2, 1], best={"layers": []}, blocks="elsewhere")
    hand_made_search(tmp_path / "c", [1, 2, 0], attn="gla")
    hand_made_search(tmp_path / "d", [0, 1, 2], strategy="impact", impact={
        str(layer): {"impact": layer} for layer in range(3)})
    write_record(tmp_path / "blocks/distill.json", {"finished": True, "cost": {
        "seconds": 7200, "ranks": 1, "tokens": 5e6}})
    write_record(tmp_path / "t/throughput.json", {
        "model": "hub/Llama-3.2-3B-Instruct", "mixer": "jet", "device": "x", "dtype": "y", "rows": [
            {"context": 2048, "batch": batch, "linear_layers": k, "tokens_per_second": rate}
            for k, batch, rate in ((0, 8, 10), (0, 1, 7), (2, 4, 12), (2, 1, 7))]})
    for mixer, k in ((None, 0), ("jet", 1), ("jet", 2)):
        write_record(tmp_path / f"f{k}/finetune.json", {
            "base_model": "m", "mixer": mixer, "linear_layers": list(range(k)), "task": "PM",
            "seed": 0, "metric": "acc", "split": "test", "before": {"score": 0.5},
            "after": {"score": 0.6 + k / 10, "stderr": 0.1, "n": 10}})
    tables, last, _ = report(tmp_path, monkeypatch, capsys)
    assert tables["Table 1, Llama-3.2-3B-Instruct"]["pubmedqa"]["jet"] == pytest.approx({
        "paper": 73, "ours": 85, "difference": 12, "n": 10, "stderr": 10, "runs": 2, "of": 2,
        "spread": 50 ** 0.5})
    found = {column: entry for name, table in tables.items() for row, columns in table.items()
             if "Table 1" not in name and "jet" in name for column, entry in columns.items()
             if entry["ours"] is not None}
    assert {column: entry["ours"] for column, entry in found.items()} == {
        "base": 80, "M_opt": 70, "drop, %": pytest.approx(12.5), "layers": 2,
        "speed-up at 2,048": 1.2, "device": "cuda:0", "distillation": 2, "M tokens": 5, "search": 3,
        "evaluations": 7, "greedy": 90, "greedy layers": "2; 0", "impact": 90, "impact layers": "0"}
    assert found["drop, %"]["stderr"] == pytest.approx(12.5)    # one document of ten, base 0.8
    drawn = list(replace.figures(replace.read_results(tmp_path)))
    titles, lines = ({figure[0]: figure[i] for figure in drawn} for i in (2, 3))
    assert lines[5]["jet, after"] == [{1: 70, 2: 80}] and lines[5]["base, before"] == [{0: 50}]
    assert lines[6] == {f"{tmp_path}/blocks": [{1: 2, 2: 0, 3: 1}]} and "man -0.50" in titles[6]
    assert lines[4]["greedy"] == 2 * [{0: 80, 1: 80, 2: 75, 3: 40}] and "jet-gla" in titles[3]
    assert "\n| pubmedqa | 10 | 69.8 / 80 ± 10 / +10 | 72.2 / 90 ± 10 / +18 | 7 / 1 / -6 | 72 / not" in (
        tmp_path / "report.md").read_text()
    assert all((tmp_path / path).read_bytes()[1:4] == b"PNG"
               for paths in last["figures"].values() for path in paths)


def test_report_of_missing_results(tmp_path, monkeypatch, capsys):
    """What was not run, not finished or not drawn is said to be so; a torn journal is read."""
    tables, last, _ = report(tmp_path, monkeypatch, capsys)
    assert not any(entry["ours"] for rows in tables.values() for row in rows.values()
                   for entry in row.values())
    assert set(last["figures"].values()) == {"not run"} and not last["unfinished"]
    write_record(tmp_path / "x/distill.json", {"finished": False})
    write_record(tmp_path / "y/search.jsonl", {})
    hand_made_search(tmp_path / "z", [0, 1, 2])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    whole, last, err = report(tmp_path, monkeypatch, capsys)
    assert last["unfinished"] == [str(tmp_path / "x"), str(tmp_path / "y")]
    assert set(last["figures"].values()) == {"not drawn"} and "matplotlib is missing" in err
    with open(tmp_path / "z/search.jsonl", "a") as file:
        file.write('{"split": "te')
    assert report(tmp_path, monkeypatch, capsys)[0] == whole != tables
    for name, text in (("search.jsonl", "{}\n{\n"), ("result.json", "{}"), ("result.json", "[]")):
        hand_made_search(tmp_path / "z", [0, 1, 2])
        (tmp_path / "z" / name).write_text(text)
        code, _, err = call(["replace.py", "--report", tmp_path], monkeypatch, capsys)
        assert code == 2 and f"z/{name} cannot be read" in err and err.count("\n") == 1


@needs_shared
def test_the_papers_numbers():
    """figures/paper_tables.json, which the report calls the paper's, has what the paper prints."""
    printed, tables = json.loads((SHARED / "paper" / "tables.json").read_text()), {}
    def add(table, row, *columns):
        tables.setdefault(table, {}).setdefault(row, {}).update(columns)
    for task, model, attn, base, best, layers in map(dict.values, printed["table1"]):
        add(f"Table 1, {model}", TASKS[task].name, ("base", base), (attn, best),
            (f"{attn} layers", layers))
    for task, *numbers in map(dict.values, printed["table2"]["rows"]):
        add("Table 2, Llama-3.2-3B-Instruct, jet", TASKS[task].name, *zip(
            ("base", "M_opt", "drop, %", "layers", "speed-up at 2,048"), numbers))
    for model, *hours in map(dict.values, printed["table3"]["rows"]):
        add("Table 3, jet", f"{model}, pubmedqa", ("device", "A800"), ("M tokens", 100),
            *zip(("distillation", "search"), hours))
    for task, *orders in map(dict.values, printed["table4"]["rows"]):
        for name, order in zip(("greedy", "impact"), orders):
            add("Table 4, Qwen2.5-1.5B, jet", TASKS[task].name, (name, order["acc"]),
                (f"{name} layers", " ".join(map(str, order["layers"]))))
    assert json.loads(replace.PAPER.read_text())["tables"] == tables


# ------------------------------------------------------------------------------------------------
# Several processes, and one at a time

def start_ranks(count, words, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}",
         ROOT / words[0], *map(str, words[1:])], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs)


def test_ranks_share_a_search(lab, runs, tmp_path, monkeypatch, capsys):
    """Two ranks, one of which dies, then three: order, scores and journal of one."""
    words = lambda name: replace_command(lab, runs["gla"], tmp_path / name, all=True, batch_size=2)
    code, _, err = call(words("one"), monkeypatch, capsys)
    assert code == 0, err
    process, journal = start_ranks(2, words("many")), tmp_path / "many" / "search.jsonl"
    while not journal.exists() or len(journal.read_bytes().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode != 0
    assert "what was saved before is intact" in err
    process = start_ranks(3, words("many"))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert len(out.splitlines()) == 1 and json.loads(out)["cost"]["ranks"] == 3
    assert result_of(tmp_path / "one")[0] == result_of(tmp_path / "many")[0]


@pytest.mark.parametrize("shard", ("batch", "layers"))
def test_ranks_share_a_distillation(lab, shard, tmp_path, monkeypatch, capsys):
    words = lambda name, **flags: distill_command(lab, tmp_path / name, attn="jet", **flags)
    assert call(words("one"), monkeypatch, capsys)[0] == 0
    process = start_ranks(2, words("many", shard=shard))
    out, err = process.communicate()
    assert process.returncode == 0, err
    for layer in range(4):
        a, b = (load_file(distill.layer_file(tmp_path / n, layer)) for n in ("one", "many"))
        assert all(torch.equal(a[k], b[k]) if shard == "layers" else relative(b[k], a[k]) < 1e-3
                   for k in a)
    one, many = (distill.read_run(tmp_path / n)["held_out"]["end"] for n in ("one", "many"))
    for layer in one:
        assert many[layer]["mse"] == pytest.approx(one[layer]["mse"], rel=1e-5)
    log = [[json.loads(x) for x in (tmp_path / n / "log.jsonl").read_text().splitlines()]
           for n in ("one", "many")]
    assert [row.keys() for row in log[0]] == [row.keys() for row in log[1]]
    for a, b in zip(*log):
        if a["event"] == "train":
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


@pytest.mark.parametrize("flags, why", (
    (dict(batch_size=3), "cannot be divided among 2 processes"),
    (dict(layers=1, shard="layers"), "2 processes have only 1 layers to divide")))
def test_work_that_ranks_cannot_divide_is_refused(lab, flags, why, tmp_path, monkeypatch, capsys):
    for module in (distill, evaluation):
        monkeypatch.setattr(module, "world_size", lambda: 2)
    code, _, err = call(distill_command(lab, tmp_path / "run", **flags), monkeypatch, capsys)
    assert code == 2 and why in err and not (tmp_path / "run").exists()


def test_gradients_are_averaged_over_ranks(tmp_path):
    """After one backward, every rank holds the gradient of the whole batch, to 1e-5."""
    (tmp_path / "ranks.py").write_text("""
import sys
import tempfile
sys.path.insert(0, sys.argv[1])
import torch, distill, eval as evaluation, test_all
evaluation.join_ranks("cpu")
model = test_all.random_model(test_all.FAMILIES["llama"]())
mixers = {rows: distill.make_mixers(model, "gdn", [1], "inherit", 0)[1] for rows in ("own", "all")}
batch, rank = test_all.tokens(6, 16), evaluation.rank()
for rows, mixer in mixers.items():
    def visit(layer, hidden_states, target):
        with torch.enable_grad():
            loss = (mixer(hidden_states)[0] - target).square().mean()
            loss.backward()
        if rows == "own":
            distill.average_over_ranks(mixer, loss)
    distill.teacher_forward(model, batch[rank::3] if rows == "own" else batch, [1], visit)
for own, all_ in zip(*(m.parameters() for m in mixers.values())):
    error = (own.grad - all_.grad).norm() / (all_.grad.norm() + 1e-12)
    assert error < 1e-5, error
print("equal", flush=True)
""")
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3",
         tmp_path / "ranks.py", ROOT], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == 0 and process.stdout.count("equal") == 3, process.stderr


def test_one_run_at_a_time(lab, runs, tmp_path, monkeypatch, capsys):
    import fcntl
    for words in (replace_command(lab, runs["gdn"], tmp_path / "a"),
                  distill_command(lab, tmp_path / "b")):
        out = Path(words[words.index("--out") + 1])
        out.mkdir()
        with open(out / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            code, _, err = call(words, monkeypatch, capsys)
            assert code == 2 and "another run is at work" in err
        assert call(words, monkeypatch, capsys)[0] == 0


# ------------------------------------------------------------------------------------------------
# Another device: what would fail or wait on a GPU, seen without one

OTHER_DEVICE = """
import os, runpy, sys, torch, transformers, torch._dynamo
from torch.utils import backend_registration as registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten, waits = torch.ops.aten, 0
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)

class Far(torch.Tensor):            # a CPU tensor that says it is elsewhere
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near):
        far = torch.Tensor._make_wrapper_subclass(
            cls, near.size(), strides=near.stride(), storage_offset=near.storage_offset(),
            dtype=near.dtype, device=torch.device("far", 0))
        far.near = near.detach()
        return far

    def untyped_storage(self):
        return self.near.untyped_storage()

    def data_ptr(self):
        return self.near.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

def run(func, args, kwargs):
    global waits
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    far, near = ([x for x in tensors if isinstance(x, Far) == is_far] for is_far in (True, False))
    device = kwargs.get("device")
    result_far = bool(far) if device is None else torch.device(device).type == "far"
    if func is aten._fused_sdp_choice.default:
        return 0
    if func is aten.copy_.default:
        result_far = isinstance(args[0], Far)
    elif far and near and device is None and func not in INDEXING and not (
            torch.Tag.pointwise in func.tags and all(x.dim() == 0 for x in near)):
        raise RuntimeError(f"{func}: tensors on two devices")
    masks = func in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
    waits += bool(far) and (not result_far or masks or func in (
        aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default))
    if device is not None:
        kwargs = {**kwargs, "device": "cpu"}
    args, kwargs = tree_map(lambda x: x.near if isinstance(x, Far) else x, (args, kwargs))
    out = func(*args, **kwargs)
    same = {id(x.near): x for x in far}         # in-place operations return their operand
    return tree_map(lambda x: same[id(x)] if id(x) in same else Far(x)
                    if result_far and isinstance(x, torch.Tensor) else x, out)

class Everywhere(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

class Backend(registration._DummyBackendModule):
    def __getattr__(self, name):
        return lambda *args, **kwargs: None

registration._setup_privateuseone_for_python_backend("far", backend_module=Backend())
torch._C._set_only_lift_cpu_tensors(True)
torch.__future__.set_overwrite_module_params_on_conversion(True)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
with Everywhere():
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        print("waits:", waits, file=sys.stderr)
"""


def on_another_device(words):
    """Run a script on a device whose tensors refuse to mix with the CPU's -> how often the host
    waited for a value from it."""
    process = subprocess.run(
        [sys.executable, "-c", OTHER_DEVICE, ROOT / words[0], *map(str, words[1:]), "--device",
         "far", "--dtype", "float32"], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr[-3000:]
    return int(re.search(r"waits: (\d+)", process.stderr)[1])


def test_distillation_on_another_device(lab, tmp_path):
    """A number made on the CPU among the device's would end it; a step that asks for its losses
    would wait for the device."""
    waits = [on_another_device(distill_command(lab, tmp_path / str(steps), layers=0,
                                               tokens=128 * steps)) for steps in (2, 3)]
    saved = 3 * len(load_file(distill.layer_file(tmp_path / "3", 0)))       # with Adam's moments
    # a step waits once in transformers; one that is saved, for losses, weights and each tensor
    assert waits[1] - waits[0] == 1 + 2 + saved


# ------------------------------------------------------------------------------------------------
# Bad input: one sentence, exit code 2, before any work

def bad_files(path):
    (path / "empty.jsonl").write_text("")
    (path / "binary.jsonl").write_bytes(bytes(range(256)))
    (path / "broken.jsonl").write_text('{"context": "t1", "choices": ["t2", "t3"], "gold": 0}\n{"')
    item = {"context": "t1", "choices": ["t2", "t3"], "gold": 0}
    for name, change in (("one", {"choices": ["t2"]}), ("range", {"gold": 2}),
                         ("text", {"gold": "0"}), ("long", {"context": "t1 " * 80})):
        write_rows(path / f"{name}.jsonl", [item, {**item, **change}])
    (path / "short.jsonl").write_text('{"text": "t1 t2"}\n')
    (path / "file").write_text("")
    transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32)).save_pretrained(path / "bert")
    random_model(transformers.Gemma3nTextConfig(
        **{**SMALL, "num_hidden_layers": 4}, head_dim=8, vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8, laurel_rank=4, altup_num_inputs=2, num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.0] * 4, layer_types=["full_attention"] * 4)).save_pretrained(
            path / "sharing")
    llama = random_model(transformers.LlamaConfig(**SMALL))
    for name, entry in (("quantised", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
                        ("flash", {"attn_implementation": "flash_attention_2"}),
                        ("flex", {"attn_implementation": "flex_attention"})):
        llama.save_pretrained(path / name)
        config = json.loads((path / name / "config.json").read_text())
        (path / name / "config.json").write_text(json.dumps({**config, **entry}))
    for name in ("bert", "sharing", "quantised", "flash", "flex"):
        evaluation.demo_tokenizer().save_pretrained(path / name)
    (path / "gguf").mkdir()
    (path / "gguf" / "model.gguf").write_bytes(b"GGUF")


BAD = {     # name: (script, flags with {lab}, {tmp}, {run} filled in, what the sentence says)
    "no such model": ("distill", dict(model="{tmp}/nothing"), "no such model"),
    "no such hub model": ("eval", dict(model="no-such/model"), "no such model"),
    "not a causal LM": ("distill", dict(model="{tmp}/bert"), "causal language model"),
    "hybrid to distill": ("distill", dict(model="{run}-search/opt"), "already a hybrid"),
    "hybrid to search": ("replace", dict(model="{run}-search/opt"), "already a hybrid"),
    "quantised": ("distill", dict(model="{tmp}/quantised"), "give the model in bf16"),
    "quantised, to score": ("eval", dict(model="{tmp}/quantised"), "load it unquantised"),
    "GGUF": ("distill", dict(model="{tmp}/gguf"), "gguf_file="),
    "no such attention": ("eval", dict(model="{tmp}/flash"), "config.json"),
    "a mask that is not read": ("distill", dict(model="{tmp}/flex"), "sdpa"),
    "layers share keys": ("distill", dict(model="{tmp}/sharing"), "cannot be replaced one by one"),
    "remote code": ("distill", dict(model="{tmp}/remote"), "--trust-remote-code"),
    "blocks of another model": ("replace", dict(model="{tmp}/other"), "another model"),
    "no blocks": ("replace", dict(blocks="{tmp}"), "distill.json"),
    "two mixers": ("replace", dict(blocks="{run},{lab}/gla"), "different mixers"),
    "missing layer": ("replace", dict(blocks="{tmp}/partial"), "layer 0"),
    "foreign tensors": ("replace", dict(blocks="{tmp}/foreign"), "does not hold a gdn module"),
    "empty task": ("replace", dict(task="{tmp}/empty.jsonl"), "no documents"),
    "binary task": ("replace", dict(task="{tmp}/binary.jsonl"), "cannot read"),
    "broken task": ("replace", dict(task="{tmp}/broken.jsonl"), "line 2"),
    "one choice": ("eval", dict(task="{tmp}/one.jsonl"), "line 2"),
    "gold out of range": ("eval", dict(task="{tmp}/range.jsonl"), "line 2"),
    "gold not a number": ("eval", dict(task="{tmp}/text.jsonl"), "line 2"),
    "item too long": ("eval", dict(task="{tmp}/long.jsonl"), "line 2"),
    "item too long to search": ("replace", dict(task="{tmp}/long.jsonl"), "line 2"),
    "test of another kind": ("replace", dict(test="{lab}/generate.jsonl"), "one kind"),
    "no text column": ("distill", dict(text_column="body"), "columns: text"),
    "no such corpus": ("distill", dict(data="{tmp}/none.jsonl"), "no such file"),
    "no such task file": ("eval", dict(task="{tmp}/none.jsonl"), "cannot read"),
    "code without leave": ("eval", dict(task="humaneval"), "--allow-code-execution"),
    "dataset not at hand": ("eval", dict(task="pubmedqa"), "QUESTION"),
    "shots of a file": ("eval", dict(shots=2), "named task"),
    "shots below zero": ("eval", dict(task="pubmedqa", shots=-1), "no number of examples"),
    "more tokens than fit": ("eval", dict(task="{lab}/generate.jsonl", max_gen_toks=64), "room"),
    "corpus too short": ("distill", dict(data="{tmp}/short.jsonl"), "two"),
    "no such dataset": ("distill", dict(data="no-such/dataset"), "no-such/dataset"),
    "bad weight": ("distill", dict(data="a/b@none"), "weight"),
    "out is a file": ("distill", dict(out="{tmp}/file"), "is a file"),
    "out is a file, search": ("replace", dict(out="{tmp}/file"), "is a file"),
    "out is a run": ("distill", dict(out="{run}"), "--resume"),
    "out is another run": ("distill", dict(out="{run}", resume=True, attn="jet"), "another run"),
    "out is a distillation": ("replace", dict(out="{run}"), "something else"),
    "out is a search": ("distill", dict(out="{run}-search"), "something else"),
    "layers out of range": ("distill", dict(layers="2-7"), "layers 0 to 3"),
    "layers not numbers": ("replace", dict(layers="a,b"), "numbers"),
    "layers backwards": ("distill", dict(layers="3-1"), "out of range"),
    "unknown mixer": ("distill", dict(attn="mamba"), "invalid choice"),
    "unknown task": ("replace", dict(task="nothing"), "no task 'nothing'"),
    "unknown metric": ("eval", dict(metric="f1"), "no metric f1"),
    "negative tokens": ("distill", dict(tokens=-5), "positive"),
    "negative batch": ("eval", dict(batch_size=-1), "positive"),
    "zero lr": ("distill", dict(lr=0), "positive"),
    "max-drop": ("replace", dict(max_drop=1.5), "0 to 1"),
    "p-min": ("replace", dict(p_min=-1), "--p-min"),
    "seq-len": ("distill", dict(seq_len=65), "context of 64"),
    "no such device": ("eval", dict(device="cuda:7"), "--device"),
    "no out": ("distill", dict(out=None), "--out"),
}


@pytest.fixture(scope="session")
def bad(lab, runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    bad_files(path)
    random_model(transformers.LlamaConfig(**SMALL)).save_pretrained(path / "other")
    evaluation.demo_tokenizer().save_pretrained(path / "other")
    (path / "remote").mkdir()
    (path / "remote" / "config.json").write_text(
        '{"model_type": "odd", "auto_map": {"AutoModelForCausalLM": "odd.Odd"}}')
    for name in ("partial", "foreign"):
        (path / name).mkdir()
        record = distill.read_run(runs["gdn"])
        record["layers"] = [1] if name == "partial" else record["layers"]
        (path / name / "distill.json").write_text(json.dumps(record))
        for layer in range(4):
            distill.layer_file(path / name, layer).write_bytes(
                distill.layer_file(runs["jet"], layer).read_bytes())
    process = start(replace_command(lab, runs["gdn"], f"{runs['gdn']}-search", layers="1"))
    assert process.communicate() and process.returncode == 0
    return path


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, bad, lab, runs, tmp_path, monkeypatch, capsys):
    script, flags, says = BAD[name]
    make = {"distill": lambda out=tmp_path / "out", **f: distill_command(lab, out, **f),
            "replace": lambda blocks=runs["gdn"], out=tmp_path / "out", **f: replace_command(
                lab, blocks, out, **f),
            "eval": lambda **f: command("eval.py", **{"model": lab / "model",
                                                      "task": lab / "val.jsonl", **f})}[script]
    filled = {k: v.format(lab=lab, tmp=bad, run=runs["gdn"]) if isinstance(v, str) else v
              for k, v in flags.items()}
    words = make(**filled)
    if None in filled.values():
        where = words.index("None")
        words = words[: where - 1] + words[where + 1:]
    before = sorted(runs["gdn"].iterdir())
    code, result, err = call(words, monkeypatch, capsys)
    sentence = err.strip().splitlines()[-1]
    assert code == 2 and result is None, err
    assert says in sentence and "Traceback" not in err, err
    assert len([line for line in err.splitlines() if line.startswith(f"{script}.py: ")]) == 1, err
    assert sorted(runs["gdn"].iterdir()) == before
    assert not list(tmp_path.glob("out/layer*")) and not list(tmp_path.glob("out/search.jsonl"))


def test_a_demo_task_without_the_demo(lab, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(command("eval.py", model=lab / "model", task="copy"), monkeypatch, capsys)
    assert code == 2 and "`python distill.py` makes the demo" in err


def test_a_loss_that_is_not_finite_stops_with_layer_and_step(lab, tmp_path, monkeypatch, capsys):
    code, _, err = call(distill_command(lab, tmp_path / "out", lr=1e30), monkeypatch, capsys)
    assert code == 1 and re.search(r"layer \d is not finite at step \d", err), err


def test_no_checkpoint_holds_weights_that_are_not_finite(lab, tmp_path, monkeypatch, capsys):
    """A loss can be finite and its gradient not; losses are looked at every few steps only. Either
    way the layer and the step are named, and what was saved before is whole."""
    train_step, tmp_path = distill.train_step, tmp_path / "out"
    for what, message in (("loss", "the loss of layer 2 is not finite at step 7"),
                          ("weights", "the weights of layer 2 are not finite after step 7")):
        calls = itertools.count()

        def broken(model, mixers, optimizers, *args):
            losses = train_step(model, mixers, optimizers, *args)
            if next(calls) == 7:         # a checkpoint follows
                losses[2] = losses[2] * (torch.nan if what == "loss" else 1)
                mixers[2].v_proj.weight.data[0] *= torch.nan
            return losses

        monkeypatch.setattr(distill, "train_step", broken)
        monkeypatch.setattr(distill, "CHECKPOINTS", 4)
        out = tmp_path.with_name(what)
        code, _, err = call(distill_command(lab, out), monkeypatch, capsys)
        assert code == 1 and message in err, err
        saved, = out.glob("checkpoint-*.safetensors")
        assert all(tensor.isfinite().all() for tensor in load_file(saved).values())


def test_a_teacher_with_nan_is_not_solved(lab):
    """A NaN of the teacher once went into the closed-form start, and from there to a checkpoint."""
    model, _ = evaluation.load_model(str(lab / "model"))
    next(p for name, p in model.named_parameters() if "layers.1.self_attn.o_proj" in name)[0, 0] = (
        torch.nan)
    mixers = distill.make_mixers(model, "gdn", [0, 1], "inherit", 0)
    with pytest.raises(FloatingPointError, match="layer 1's attention module .* not finite"):
        distill.solve_o_proj(model, mixers, [tokens(2, 16), tokens(2, 16, seed=1)])


# ------------------------------------------------------------------------------------------------
# The project itself

SCRIPTS = ("kernels", "linear_attn", "eval", "distill", "replace")


def test_imports_run_one_way():
    for place, name in enumerate(SCRIPTS):
        source = (ROOT / f"{name}.py").read_text()
        for later in SCRIPTS[place:]:
            assert not re.search(rf"^\s*(from|import) {later}\b", source, re.M), (name, later)


def test_kernels_is_free_of_side_effects():
    """transformers may import a module named kernels: ours says nothing and has no version."""
    source = (ROOT / "kernels.py").read_text()
    assert not re.search(r"^__version__", source, re.M)
    run = subprocess.run([sys.executable, "-c", "import sys, kernels; "
                          "assert not {'transformers', 'datasets'} & set(sys.modules)"],
                         cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_two_files_work_alone(tmp_path):
    """kernels.py and linear_attn.py copied into another project, as modules and as a package."""
    for folder in (tmp_path, tmp_path / "package"):
        folder.mkdir(exist_ok=True)
        for name in ("kernels.py", "linear_attn.py"):
            (folder / name).write_bytes((ROOT / name).read_bytes())
    for module in ("linear_attn", "package.linear_attn"):
        run = subprocess.run([sys.executable, "-c", f"import {module} as m; print(*m.MIXERS)"],
                             cwd=tmp_path, capture_output=True, text=True)
        assert run.stdout.split() == ["gla", "gdn", "jet"], run.stderr


@pytest.mark.parametrize("script", ("eval", "distill", "replace"))
def test_help_teaches_and_every_flag_is_read(script):
    run = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=ROOT,
                         capture_output=True, text=True)
    assert run.returncode == 0 and f"python {script}.py" in run.stdout
    sources = "".join((ROOT / f"{s}.py").read_text() for s in ("eval", script))
    for flag in re.findall(r"--([a-z][\w-]+)", run.stdout.split("options:")[1]):
        name = flag.removeprefix("no-").replace("-", "_")
        read = re.search(rf"args\.{name}\b", sources) or (
            f'"{name}"' in sources.partition('"settings": {k: getattr(args, k)')[2])
        assert name == "help" or read, flag


def test_readme_commands_parse(monkeypatch):
    """Every `python X.py ...` line of README names a script and flags that exist."""
    readme = (ROOT / "README.md").read_text()
    lines = re.findall(r"python (\w+)\.py([^\n#|&`]*)", readme.replace("\\\n", " "))
    assert len(lines) >= 5
    for script, flags in lines:
        if script == "kernels":
            continue
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
        module.parse_args()
    setup = [line for line in readme.splitlines() if "test_all.py" in line and "venv" in line]
    assert setup and setup[0].strip() in (ROOT / ".ci" / "run").read_text()


def test_the_demo_as_a_user_runs_it(tmp_path):
    """No arguments, an empty folder: teacher, distillation, two searches that end differently."""
    for name in ("kernels", "linear_attn", "eval", "distill", "replace"):
        (tmp_path / f"{name}.py").write_bytes((ROOT / f"{name}.py").read_bytes())
    results = []
    for script in ("distill.py", "replace.py", "eval.py"):
        run = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True,
                             text=True)
        assert run.returncode == 0, run.stderr[-2000:]
        results.append(json.loads(run.stdout.splitlines()[-1]))
        assert f"next: {results[-1]['next']}" in run.stderr
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == sorted(
        ["out", *(f"{n}.py" for n in SCRIPTS)])
    searches = results[1]["results"]
    for name in ("copy", "chain"):
        assert searches[name]["p_base"] >= 0.95 and searches[name]["test_base"] >= 0.95
        assert (tmp_path / "out" / "demo" / name / "search.png").exists()
    assert searches["copy"]["opt"]["layers"] != searches["chain"]["opt"]["layers"]
