"""Everything that this project claims and a CPU can check: pytest test_all.py

Tests on the real 260 K-parameter model and its data need ../shared and skip where it is absent.
`-m "not slow"` leaves out those that take more than a few seconds.
"""

import argparse
import contextlib
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
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import distill
import eval as evaluation
import kernels
import linear_attn
import replace
from eval import (
    CHOICE_FILE, GENERATE_FILE, TASKS, draw_shots, file_task, gsm8k_bare, gsm8k_judge,
    hellaswag_clean, load_docs, mathqa_choices, rouge_l, run_program, split_docs)
from linear_attn import MIXERS, UserError, attention_modules, swap

warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)  # of `slow`
os.environ["OMP_NUM_THREADS"] = "1"     # for other processes, too: all is too small to be shared
torch.set_num_threads(1)
ROOT = Path(__file__).parent
SHARED = ROOT.parent / "shared"
STORIES = SHARED / "models" / "stories260K"
needs_shared = pytest.mark.skipif(not STORIES.exists(), reason="../shared is not here")

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, pad_token_id=None, bos_token_id=None,
             eos_token_id=None, max_position_embeddings=64)
EXPERTS = dict(num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
               moe_intermediate_size=16, shared_expert_intermediate_size=16, n_group=1,
               topk_group=1)
OPT = dict(num_key_value_heads=4, ffn_dim=64, word_embed_proj_dim=32)
FALCON = dict(num_key_value_heads=4)
FAMILIES = {        # what differs from SMALL
    "Llama": {}, "Qwen2": {}, "Qwen3": dict(head_dim=16), "Mistral": {},
    "Gemma": dict(num_key_value_heads=1, head_dim=16), "GPT2": dict(num_key_value_heads=4),
    "GPTNeoX": dict(num_key_value_heads=4), "OPT": OPT | dict(pad_token_id=1),
    "Olmo": dict(clip_qkv=0.5), "Phi": dict(num_key_value_heads=4, qk_layernorm=True), "Phi3": {},
    "Cohere": dict(use_qk_norm=True), "GPTBigCode": dict(num_key_value_heads=4), "Persimmon": {}}
FALCONS = {         # its three layouts
    "Falcon": FALCON, "Falcon, grouped": FALCON | dict(
        new_decoder_architecture=True, num_kv_heads=2),
    "Falcon, per head": FALCON | dict(multi_query=False, bias=True)}
MIXTURES = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "GraniteMoe", "Glm4Moe", "Phimoe")
SAVED = FAMILIES | FALCONS | dict.fromkeys(MIXTURES, EXPERTS) | {
    "DeepseekV3": EXPERTS | dict(num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8,
                                 qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8),
    "Olmo2": {},
    "Gemma3": dict(                                     # text inside a model that also sees
        text_config={**SMALL, "head_dim": 16}, mm_tokens_per_image=1, image_token_index=60,
        boi_token_index=61, eoi_token_index=62, vision_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            image_size=16, patch_size=8))}
DECODED = ("Llama", "Qwen2", "Qwen3", "GPT2", "GPTNeoX", "Gemma")


def small(family, **changes):
    """The config of a small model of a family."""
    changes = {**SMALL, **SAVED.get(family, {}), **changes}
    return getattr(transformers, family.split(",")[0] + "Config")(**changes)


def fast(families, *few):
    """Parameters of which all but `few` are slow."""
    return [pytest.param(family, marks=[] if family in few else pytest.mark.slow)
            for family in families]


def random_model(config, scale=1.0):
    """A model with seeded random weights, scaled up so that a wrong layer shows in the logits."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(scale * noise * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.1 * noise)
    return model


def shaken_mixers(model, attn, init="inherit"):
    """Mixers for all layers whose new parameters are not neutral, so that each one matters."""
    mixers = {}
    for i, attention in enumerate(attention_modules(model)):
        mixers[i] = MIXERS[attn].from_attention(attention, model.config, i, init).eval()
        generator = torch.Generator().manual_seed(i)
        for parameter in mixers[i].requires_grad_(False).parameters():
            size = 0.3 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return mixers


def relative(ours, reference):
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def tokens(*shape, seed=0):
    return torch.randint(2, 64, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def log_likelihood(model, ids, first):
    """Of ids[first:], without batches, cache or engine. The last token is scored, not read."""
    logits = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0]
    log_probs = logits.double().log_softmax(-1)
    return sum(log_probs[t - 1, ids[t]].item() for t in range(first, len(ids)))


# ------------------------------------------------------------------------------------------------
# kernels.py: the chunkwise forms against the loops that define them, in fp64

def worst(ours, exact, inputs):
    """The largest relative RMS error of all outputs and gradients."""
    return max(rms for rms, _ in kernels.compare(ours, exact, inputs).values())


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=("fp64", "fp32"))
@pytest.mark.parametrize("op", kernels.OPS)
def test_chunks_equal_the_loop(op, dtype):
    """A chunkwise form that departs from its loop trains another model than it decodes."""
    kinds = ("mild", "none", "strong", "strongest", "mixed", "resets", "no state")
    cases = [(op, dtype, (2, T, 2, 16, 24), kind) for kind in kinds
             for T in (1, 2, 15, 16, 17, 63, 64, 65, 130)]
    cases += [(op, dtype, (2, T, 2, 16, 24), "near keys") for T in (17, 130)]
    cases += [(op, dtype, (2, 70, 2, K, V), "mixed") for K, V in ((8, 8), (64, 40), (40, 136))]
    cases += [(op, dtype, (1, 130, 32, 256, 32), "mixed")]          # several groups of chunks
    cases = cases if dtype == torch.float64 else cases[::3]
    assert kernels.check(cases, backend="torch")[1] == 0


def test_the_delta_rule_is_that_of_transformers():
    """Hybrids would not be comparable if our delta rule were another than Qwen3-Next's."""
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen
    inputs = kernels.random_inputs("gated_delta_rule", (2, 130, 2, 16, 24), "mild", torch.float32)
    for ours, theirs in (
            (kernels.gated_delta_rule, qwen.torch_chunk_gated_delta_rule),
            (kernels.gated_delta_rule_recurrent, qwen.torch_recurrent_gated_delta_rule)):
        exact = lambda *x: theirs(*x[:-1], initial_state=x[-1], output_final_state=True)
        assert worst(ours, exact, inputs) <= 1e-5


@pytest.mark.parametrize("op", kernels.OPS)
def test_dtypes_and_refusals(op):
    """Outputs in another dtype, changed inputs or broadcast shapes could go unnoticed."""
    function = getattr(kernels, op)
    *inputs, state = kernels.random_inputs(op, (2, 20, 2, 16, 24), "mild", torch.float64).values()
    before = copy.deepcopy((*inputs, state))
    for dtype in (*kernels.KERNEL_DTYPES, torch.float64):
        x = [y.to(dtype) for y in inputs]
        with torch.autocast("cpu", dtype=torch.bfloat16):                   # must change nothing
            o, S = function(*x)
        assert o.dtype == dtype and S.dtype == max(dtype, torch.float32, key=lambda d: d.itemsize)
        for ours, loops in zip((o, S), getattr(kernels, op + "_recurrent")(*x)):
            assert torch.allclose(ours.float(), loops.float(), atol=1e-2)
    function(*inputs, state)
    assert all(map(torch.equal, before, (*inputs, state))), "inputs were changed"
    q, k, v, g, *rest = inputs
    refused = [((q, k, v, g[..., :1], *rest), "g has shape"),
               ((*inputs, state[:, :1]), "initial_state has shape"),
               ([x[:, :0] for x in inputs], "no tokens")]
    if op == "gated_linear_attention":
        refused += [([x[:, :T] for x in (q, k, v, g - 6 - g)], "-6 somewhere.*clamp")
                    for T in (20, 1)]
    for wrong, words in refused:
        with pytest.raises(ValueError, match=words):
            function(*wrong)


@pytest.mark.parametrize("W", (1, 2, 4))
@pytest.mark.parametrize("kind", ("static", "per token"))
@pytest.mark.parametrize("activation", (None, "silu"))
def test_causal_conv(W, kind, activation):
    """A shifted tap, or a cache that misses a token, would change every JetBlock."""
    conv = functools.partial(kernels.causal_conv, activation=activation)
    inputs = kernels.random_inputs("causal_conv", (2, 11, 1, 6, W), kind, torch.float64)

    def window(x, kernel, cache):
        x = torch.cat([cache, x], 1)
        y = (x.unfold(1, W, 1) * kernel.mT).sum(-1)                         # [B,T,D]
        return F.silu(y) if activation else y, x[:, 11:]

    def in_two(x, kernel, cache, at=2):
        first, rest = (kernel[:, :at], kernel[:, at:]) if kernel.dim() == 4 else (kernel, kernel)
        y, cache = conv(x[:, :at], first, cache)
        z, cache = conv(x[:, at:], rest, cache)
        return torch.cat([y, z], 1), cache

    assert worst(conv, window, inputs) <= 1e-12 and worst(in_two, window, inputs) <= 1e-12
    x, kernel = (inputs[name].bfloat16() for name in ("x", "kernel"))
    assert conv(x, kernel)[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="kernel has shape"):
        conv(x, kernel[..., :1])


# ------------------------------------------------------------------------------------------------
# kernels.py: the Triton kernels. They run in Triton's interpreter, which has to be chosen before
# kernels.py is imported, so the bodies of these tests run in processes of their own. The
# interpreter gets bf16 wrong without a word: no bf16 here.

def python(*words, code=0, cwd=ROOT, **env):
    """Runs python("-c", program) or python("script.py", ...) in a process, to an exit code."""
    run = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True,
                         text=True, stdin=subprocess.DEVNULL, env={**os.environ, **env})
    assert run.returncode == code, run.stdout[-5000:] + run.stderr[-3000:]
    return run


@pytest.mark.slow
@pytest.mark.parametrize("op", (*kernels.OPS, "causal_conv", "gated_rms_norm"))
def test_kernels_equal_the_loop(op):
    """A kernel that departs from the definition trains another model on a GPU than on a CPU."""
    if op == "causal_conv":
        cases = [((2, T, 1, 70, W), kind) for T, W in ((1, 4), (2, 1), (2, 2), (33, 4))
                 for kind in ("static", "per token", "bare")]
    elif op == "gated_rms_norm":
        cases = [((2, 5, 3, D, 0), kind) for D in (8, 40, 200) for kind in ("gated", "plain")]
    else:
        # Every two of T, decay, K = V or not, one head or three, with a state or without, meet.
        # But one token of one head without a state: its dq is one product, which may cancel.
        sizes = ((1, 16, 16), (3, 24, 24), (1, 24, 40), (3, 40, 24))
        cases = [((1, T, *size), ("strongest", "none", "no state")[(i + 2 * j) % 3])
                 for (i, T), (j, size) in itertools.product(
                     enumerate((1, 16, 63, 65, 130)), enumerate(sizes))]
        cases += [((1, T, 1, 8, 8), kind) for T in (1, 65) for kind in ("resets", "mixed")]
        cases += [((2, T, 1, K, 40), "step") for T in (1, 3) for K in (8, 24)]
        cases += [((1, 70, 1, 96, 80), "mixed"), ((1, 70, 1, 24, 136), "strong"),
                  ((1, 20, 1, 200, 16), "strong")]                          # padded to 128, 256
        cases += [((1, T, 1, 16, 24), "near keys") for T in (17, 130)]
    cases = [(op, torch.float32, *case) for case in cases] + [
        (op, torch.float16, *case) for case in cases[::5]]                  # of every kind
    python("-c", f"import kernels, torch; assert kernels.check({cases})[1] == 0",
           TRITON_INTERPRET="1")


def check_gates(op):
    """NaN in g shows; GLA clamps g at -5; A_log's gradient survives; one output is enough."""
    ours = functools.partial(getattr(kernels, op), backend="triton")
    loop = getattr(kernels, op + "_recurrent")
    inputs = kernels.random_inputs(op, (1, 70, 2, 16, 24), "strongest", torch.float32)
    q, k, v, g, *beta, state = inputs.values()
    spoiled = g.index_fill(1, torch.tensor(0), torch.nan)
    for T in (20, 1):                                                       # chunks, step
        with torch.no_grad():
            outputs = ours(*(x[:, :T] for x in (q, k, v, spoiled, *beta)), state)
        assert all(x.isnan().all() for x in outputs), f"{op} hides a NaN, {T} tokens"
    for used in (0, 1):
        assert worst(*(lambda *x, f=f: f(*x)[used] for f in (ours, loop)), inputs) <= 1e-5
    if op == "gated_linear_attention":
        assert all(map(torch.equal, ours(q, k, v, 20 * g, state), ours(q, k, v, g, state)))
        return

    def layer(op, q, k, v, a, beta, A_log, dt_bias):
        return op(q, k, v, -A_log.exp() * F.softplus(a + dt_bias), beta)

    for (dtype, most), A in itertools.product(
            ((torch.float32, 2e-4), (torch.float16, 2e-2)), (1.0, 20.0)):
        x = dict(q=q.to(dtype), k=k.to(dtype), v=v.to(dtype), a=torch.randn_like(g), beta=beta[0],
                 A_log=torch.tensor([A, 0.5 * A]).log(), dt_bias=torch.tensor([0.1, 0.8]))
        errors = kernels.compare(*(functools.partial(layer, f) for f in (ours, loop)), x)
        assert max(errors[name][0] for name in ("dA_log", "ddt_bias")) <= most, (dtype, A)


def check_states(op):
    """A state is overwritten only where that is asked for."""
    for backend, inplace, dtype in itertools.product(
            ("torch", "triton"), (False, True), (torch.float32, torch.float16)):
        *x, state = kernels.random_inputs(op, (2, 3, 2, 8, 24), "mild", dtype).values()
        x, before, version = x if len(x) == 5 else [*x, None], state.clone(), state._version
        o, end = kernels.recurrent_step(*x, state, inplace=inplace, backend=backend)
        assert o.dtype == dtype and not torch.equal(end, before)
        assert end is state if inplace else torch.equal(state, before), "the state was changed"
        assert (state._version > version) == inplace, "autograd must know what was overwritten"
    with pytest.raises(ValueError, match="inplace needs"):
        kernels.recurrent_step(*x, None, inplace=True)
    for D, dtype, words in ((16, torch.float64, "not torch.float64"), (264, torch.float32, "264")):
        wrong = kernels.random_inputs(op, (1, 3, 1, D, 8), "mild", dtype).values()
        with pytest.raises(ValueError, match=words):
            getattr(kernels, op)(*wrong, backend="triton")


def check_modules(attn):
    """One layer on torch forms and on kernels: outputs, decoding, gradients."""
    model, ids, launched = random_model(small("Llama", num_hidden_layers=1)), tokens(1, 18), set()
    mixer, launch, use_triton = shaken_mixers(model, attn)[0], kernels._launch, kernels._use_triton

    def run(backend):
        with pytest.MonkeyPatch.context() as patch, replace.replaced(model, {0: mixer}, (0,)):
            patch.setattr(kernels, "_launch", lambda kernel, *args, **kw: (
                launched.add(kernel.__name__), launch(kernel, *args, **kw)))
            patch.setattr(kernels, "_use_triton",
                          lambda _, *args, **kw: use_triton(backend, *args, **kw))
            with torch.no_grad():
                prefill = model(ids[:, :12], use_cache=True)
                step = model(ids[:, 12:13], past_key_values=prefill.past_key_values)
            loss = model(ids, labels=ids, use_cache=False).loss
            gradients = torch.autograd.grad(loss, tuple(mixer.parameters()))
            return prefill.logits, step.logits, *gradients

    mixer.requires_grad_()
    wanted = run("torch")
    assert not launched
    found = run("triton")
    assert {"_step", "_gla_gradients" if attn == "gla" else "_delta_gradients"} <= launched
    assert all(relative(x, y) <= 1e-4 for x, y in zip(found, wanted, strict=True))


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    """A kernel would hide a NaN gate, overwrite a forked state, or read other inputs than torch."""
    python("-c", "import test_all as t; [f(x) for f in (t.check_gates, t.check_states) "
           "for x in t.kernels.OPS] + [t.check_modules(x) for x in t.MIXERS]", TRITON_INTERPRET="1")


def test_backends_are_refused_or_left_alone(monkeypatch):
    """On a CPU "auto" never launches a kernel, and "triton" is refused outside the interpreter."""
    monkeypatch.setattr(kernels, "_launch", lambda *args, **kw: pytest.fail("launched a kernel"))
    monkeypatch.setattr(kernels, "_INTERPRETED", False)
    for op in (*kernels.OPS, "causal_conv", "gated_rms_norm", "recurrent_step"):
        rule = "gated_delta_rule" if op == "recurrent_step" else op
        args = kernels.random_inputs(rule, (1, 5, 2, 8, 4), "mild", torch.float32).values()
        getattr(kernels, op)(*args)
        for backend, words in (("triton", "TRITON_INTERPRET=1"),
                               ("cuda", "expected 'auto', 'torch' or 'triton'")):
            with pytest.raises(ValueError, match=words):
                getattr(kernels, op)(*args, backend=backend)


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


@pytest.mark.slow
def test_all_else_works_without_triton():
    """Where triton has no wheel, as on macOS, the project must still import and run."""
    run = python("-c", "import sys; sys.modules['triton'] = None; import kernels, torch\n"
                 "cases = [case for case in kernels.check_cases(False) "
                 "if case[1] == torch.float32 and case[3] != 'step']\n"
                 "assert kernels.check(cases, backend='torch')[1] == 0\n"
                 "x = torch.ones(1, 1, 1, 8)\n"
                 "try: kernels.gated_rms_norm(x, backend='triton')\n"
                 "except ValueError as error: print(error)\n"
                 "sys.argv = ['kernels.py']; kernels.main()", code=2)
    assert run.stdout.endswith("but triton is not installed: pip install triton\n"), run.stderr
    assert run.stderr.count("\n") == 1 and "pip install" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("wrong", (False, True))
def test_kernels_script_checks_itself(wrong):
    """A GPU user's first command must work, and a check that cannot fail is worthless."""
    code = """
chunks = kernels._chunk_kernels
def spoiled(*inputs):
    (o, state), *rest = chunks(*inputs)
    return (1.1 * o, state * float("nan")), *rest
kernels._chunk_kernels, cases = spoiled, kernels.check_cases(False)[::4]
kernels.check_cases = lambda on_gpu: cases
""" * wrong
    run = python("-c", f"import kernels, sys; sys.argv = ['kernels.py']\n{code}kernels.main()",
                 TRITON_INTERPRET="1", code=wrong)
    assert wrong == (json.loads(run.stdout.splitlines()[-1])["failures"] > 0)
    for line in ("linear_attention.*FAILED o: ", "delta_rule.*; state: rms error nan"):
        assert bool(re.search(line, run.stdout)) == wrong, line
    if not torch.cuda.is_available():
        assert 'backend "auto" selects: torch' in run.stdout and "No GPU here" in run.stdout


@pytest.mark.slow
def test_hopper_gets_a_ptxas_that_compiles_the_kernels_right():
    """On an H200 the ptxas 12.8 that Triton runs by itself gave wrong gradients without a word."""
    code = ("import kernels, triton; kernels._use_sound_ptxas(); "
            "from triton.backends.nvidia import compiler as c; "
            "print(c.get_ptxas(90).version, c.get_ptxas_version(90))")
    said = python("-c", code).stdout
    assert tuple(map(int, said.split()[0].split("."))) >= (13, 1)
    assert f"release {said.split()[0]}" in said
    usual = Path(kernels.triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    said = python("-c", code, TRITON_PTXAS_PATH=str(usual), code=1).stderr
    assert "RuntimeError: ptxas 12.8 compiles these kernels wrongly for Hopper" in said


@pytest.mark.slow
@pytest.mark.parametrize("arch, memory, matrix", ((80, 163, "mma.sync"), (90, 227, "wgmma")))
def test_kernels_compile_without_spills(arch, memory, matrix, monkeypatch, tmp_path, capsys):
    """A kernel that outgrows an A100 or H100 would be slow or fail there; no CPU run shows it.
    Sizes: all that _config tells apart, K and V that differ from their padding, and odd ones."""
    from triton.backends.compiler import GPUTarget
    fp32, fp16, bf16 = kernels.KERNEL_DTYPES
    triton = kernels.triton

    def compile_only(kernel, grid, *args, **constants):
        compiled, case = kernel.warmup(*args, grid=grid, **constants), (kernel.__name__, constants)
        spilled = re.findall(r"(\d+) bytes spill", capsys.readouterr().out)
        assert max(map(int, spilled), default=0) <= 192, case       # none if it is compiled already
        assert compiled.metadata.shared <= 1024 * memory, case
        found = [x for x in ("wgmma", "mma.sync") if x in compiled.asm["ptx"]][:1]
        assert found == [matrix] * (not case[0].startswith(("_step", "_conv", "_norm"))), case

    monkeypatch.setattr(triton.runtime.driver, "_active", Mock(
        get_current_target=lambda: GPUTarget("cuda", arch, 32), get_current_device=lambda: arch))
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
    monkeypatch.setattr(kernels, "_capability", lambda device: arch // 10)
    monkeypatch.setattr(kernels, "_use_triton", lambda *args, **kw: True)
    monkeypatch.setattr(kernels, "_launch", compile_only)
    if arch == 90:
        kernels._use_sound_ptxas()
    tensor = functools.partial(torch.empty, dtype=fp32, device="meta", requires_grad=True)
    sizes = [(16, 16), (64, 64), (256, 256)]
    sizes += [(16, 256), (128, 64), (256, 16), (96, 256)] * (arch == 90)
    for dtype, T, H, K, V in (*((bf16, 4096, 16, *size) for size in sizes),
                              (bf16, 4096, 512, 128, 128), (fp16, 4096, 16, 128, 128),
                              (bf16, 4001, 3, 100, 200)):
        q, k, v = (tensor(1, T, H, D, dtype=dtype) for D in (K, K, V))
        g, beta, state = tensor(1, T, H), tensor(1, T, H), tensor(1, H, K, V)
        for gates in ((g, beta), (tensor(1, T, H, K), None)):
            outputs = kernels._Kernels.apply(kernels._chunk_kernels, q, k, v, *gates, state)
            torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
            kernels.recurrent_step(q, k, v, *gates, state)
    for dtype in (bf16, fp32):
        x, cache = tensor(2, 4096, 1024, dtype=dtype), tensor(2, 3, 1024, dtype=dtype)
        outputs = [kernels.causal_conv(x, tensor(*shape, 1024, dtype=dtype), cache, "silu")[0]
                   for shape in ((4,), (2, 4096, 4))]
        x = x.unflatten(2, (8, 128))
        outputs += [kernels.gated_rms_norm(x), kernels.gated_rms_norm(x, tensor(128), x)]
        torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])


# ------------------------------------------------------------------------------------------------
# linear_attn.py: mixers from sizes, and from a teacher's attention

def run_elsewhere(code, path):
    """What `code` prints in the folder `path`, in a process that cannot see the project."""
    return python("-c", code, cwd=path, HF_HOME=str(path / "hf"), PYTHONPATH="").stdout


@pytest.mark.parametrize("family", FAMILIES)
def test_inherited_projections_are_the_teachers_q_k_v(family):
    """A start from other rows than the family's attention uses would be far from the teacher."""
    model, seen = random_model(small(family)), []

    def record(attn, query, key, value, *args, **kwargs):
        groups = query.shape[1] // key.shape[1]
        seen.append([x.transpose(1, 2).flatten(2) for x in (
            query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))])
        return torch.zeros_like(query).transpose(1, 2), None

    def compare(attn, args, kwargs, output):
        # RoPE is the identity at position 0, which every token has here
        mixer = MIXERS["gla"].from_attention(attn, model.config, len(seen) - 1)
        q, k, v = mixer.project(args[0] if args else kwargs["hidden_states"])
        q = q * attn.scaling if family == "OPT" else q      # scaled before the attention function
        assert all(relative(*pair) < 1e-5 for pair in zip((q, k, v), seen[-1]))
        out = linear_attn.teacher_projections(attn, model.config)[3]
        assert out.keys() == mixer.o_proj.state_dict().keys()
        assert all(torch.equal(p, out[name]) for name, p in mixer.o_proj.named_parameters())

    transformers.AttentionInterface.register("record", record)
    model.config._attn_implementation = "record"
    for attn in attention_modules(model):
        attn.register_forward_hook(compare, with_kwargs=True)
    model(tokens(2, 7), position_ids=torch.zeros(2, 7, dtype=torch.long), use_cache=False)
    assert len(seen) == 3


@pytest.mark.parametrize("layout", FALCONS)
def test_falcon_is_inherited_in_its_three_layouts(layout):
    """Each fuses q, k and v in another order; Falcon itself says which rows are whose."""
    model = random_model(small(layout))
    attn, x = attention_modules(model)[0], torch.randn(2, 7, 32)
    mixer = MIXERS["gla"].from_attention(attn, model.config, 0)
    for ours, theirs in zip(mixer.project(x), attn._split_heads(attn.query_key_value(x))):
        assert relative(ours.unflatten(-1, (4, 8)), theirs.expand(2, 7, 4, 8)) < 1e-5


@pytest.mark.parametrize("attn", MIXERS)
@pytest.mark.parametrize("init", ("inherit", "random"))
def test_every_parameter_learns_and_the_seed_decides(attn, init):
    """A parameter between two zeroed factors never trains; a global generator is not repeatable."""
    model = random_model(small("Qwen2"))
    make = lambda seed: MIXERS[attn].from_attention(
        attention_modules(model)[0], model.config, 0, init, seed)
    mixer, start = make(1), make(1).state_dict()
    equal = lambda other: all(map(torch.equal, start.values(), other.state_dict().values()))
    assert equal(mixer) and equal(make(2)) == (init == "inherit" and attn == "gdn")  # draws nothing
    assert init == "inherit" or equal(MIXERS[attn](32, 4, 8, seed=1))
    optimizer, learns = torch.optim.SGD(mixer.parameters(), lr=0.1), set()
    x, target = torch.randn(2, 2, 9, 32)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(mixer(x)[0], target).backward()
        learns |= {name for name, p in mixer.named_parameters() if p.grad.any()}
        optimizer.step()
    assert learns == {name for name, _ in mixer.named_parameters()}


@pytest.mark.parametrize("config, message", (
    (small("Bloom"), "BloomFor"), (small("Mpt"), "MptFor"), (small("Mamba"), "MambaFor"),
    (small("CodeGen", rotary_dim=4), "CodeGenAttention.*--init random"),
    (small("StableLm", num_hidden_layers=4, qk_layernorm=True),
     "StableLmLayerNormPerHead.*--init random")), ids=lambda x: getattr(x, "model_type", ""))
def test_models_that_do_not_fit_are_named(config, message):
    """A linear module there, or a guess at the layout, would compute wrong numbers silently."""
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=message):
        MIXERS["gdn"].from_attention(attention_modules(model)[0], config, 0)


# ------------------------------------------------------------------------------------------------
# linear_attn.py: cache, padding, generation

LAYER_SETS = ((1,), (0, 2), (0, 1, 2))


@pytest.mark.parametrize("attn", MIXERS)
@pytest.mark.parametrize("family", fast((*DECODED, "eager"), "Llama", "GPT2"))
def test_padding_may_stand_anywhere_and_come_in_pieces(family, attn):
    """Padding would stand in a convolution's taps and tail, or write to a state."""
    model = random_model(small("Qwen2" if family == "eager" else family), scale=3.0)
    model.set_attn_implementation("eager" if family == "eager" else "sdpa")
    ids, mask = tokens(4, 14), torch.ones(4, 14, dtype=torch.long)
    mask[0, :5] = mask[1, 4:9] = mask[2, 11:] = mask[3, [0, 2, 3, 5, 6, 7, 13]] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    mixers, plain = shaken_mixers(model, attn), model(ids, use_cache=False).logits
    for layers in LAYER_SETS:
        with replace.replaced(model, mixers, layers):
            assert relative(model(ids, use_cache=False).logits, plain) > 0.05
            alone = [model(row[real][None], use_cache=False).logits[0]
                     for row, real in zip(ids, mask.bool())]
            for sizes in ([14], [9, 5], [1] * 14, [5, 1, 3, 1, 4]):
                cache, parts, ends = transformers.DynamicCache(), [], itertools.accumulate(sizes)
                for piece, where, end in zip(ids.split(sizes, 1), positions.split(sizes, 1), ends):
                    parts.append(model(piece, attention_mask=mask[:, :end], position_ids=where,
                                       past_key_values=cache, use_cache=len(sizes) > 1).logits)
                for logits, real, wanted in zip(torch.cat(parts, 1), mask.bool(), alone):
                    assert relative(logits[real], wanted) < 1e-4, sizes
    assert torch.equal(model(ids, use_cache=False).logits, plain)   # taken out again by reference


@pytest.mark.parametrize("attn", MIXERS)
def test_generation_modes(attn):
    """A state that is lost, or kept for another row, changes what a cache generates."""
    model = random_model(small("Llama"), scale=3.0)
    mixers, ids, mask = shaken_mixers(model, attn), tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    ids[1, :3] = mask[1, :3] = 0
    generate = functools.partial(model.generate, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for layers in LAYER_SETS:
        with replace.replaced(model, mixers, layers):
            plain = generate(ids, attention_mask=mask, use_cache=False)
            for mode in ({}, {"prefill_chunk_size": 1}, {"prefill_chunk_size": 2}):
                assert torch.equal(generate(ids, attention_mask=mask, **mode), plain), mode
            assert torch.equal(generate(ids[1:, 3:])[0, 6:], plain[1, 9:])
            assert torch.equal(*(generate(ids, attention_mask=mask, num_beams=3, use_cache=cached)
                                 for cached in (True, False)))


@pytest.mark.parametrize("attn", MIXERS)
@pytest.mark.parametrize("family", fast(("Llama", "GPTNeoX", "GPT2"), "Llama"))
def test_packed_documents_do_not_see_each_other(family, attn):
    """Rows packed by SFTTrainer would give outputs and gradients of documents run together."""
    model = random_model(small(family), scale=3.0)
    mixers, lengths = shaken_mixers(model, attn), (5, 1, 2, 7, 3)
    ids, positions = tokens(2, sum(lengths)), torch.cat([torch.arange(n) for n in lengths])
    mixers[0].requires_grad_(True)
    with replace.replaced(model, mixers, (0, 1, 2)):
        found = []
        for sizes in (18, lengths):                                 # packed, and each alone
            logits = torch.cat([model(i, position_ids=p.expand(2, -1), use_cache=False).logits
                                for i, p in zip(ids.split(sizes, 1), positions.split(sizes))], 1)
            weights = mixers[0].q_proj.weight, mixers[0].v_proj.weight
            found.append((logits, *torch.autograd.grad(logits.logsumexp(-1).sum(), weights)))
    assert all(relative(packed, alone) < 1e-4 for packed, alone in zip(*found))


@pytest.mark.parametrize("attn", MIXERS)
def test_flash_attention_gives_a_flat_mask_or_positions(attn):
    """A mixer that ignores [B, K] masks or positions would read padding or another document."""
    model = random_model(small("Llama"), scale=3.0)
    mixer, x, places = shaken_mixers(model, attn)[0], torch.randn(1, 9, 32), torch.arange(9)[None]
    for mask in (places > 2, places < 6):
        alone = mixer(x[mask][None])[0][0]
        for given in (mask, mask.long()):
            assert relative(mixer(x, attention_mask=given)[0][mask], alone) < 1e-5
    assert relative(mixer(x)[0][:, 3:], mixer(x[:, 3:])[0]) > 0.01
    mixer.config._attn_implementation = "flash_attention_2"
    packed = mixer(x, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]]))[0]
    assert relative(packed, torch.cat([mixer(part)[0] for part in x.split((4, 2, 3), 1)], 1)) < 1e-5
    assert torch.equal(mixer(x, position_ids=places)[0], mixer(x)[0])


def test_caches_are_known_by_every_name_or_refused():
    """A cache that is ignored, or that cannot hold a state, would give wrong text silently."""
    model = random_model(small("Llama"))
    mixers, ids, x = shaken_mixers(model, "gdn"), tokens(1, 6), torch.randn(1, 5, 32)
    for name in linear_attn.CACHE_NAMES:            # it differs by family and version
        cache = transformers.DynamicCache()
        mixers[0](x, **{name: cache})
        assert cache.get_seq_length() == 5
    cache.batch_repeat_interleave(3)
    assert [len(t) for t in cache.layers[0].state] == [3, 3]
    keys = model(ids, use_cache=True).past_key_values
    with replace.replaced(model, mixers, (1,)):
        states = model(ids, use_cache=True).past_key_values
        for error, words, call in (
                (ValueError, "already holds keys", lambda: model(ids, past_key_values=keys)),
                (ValueError, "static cache", lambda: model.generate(
                    ids, max_new_tokens=2, cache_implementation="static")),
                (RuntimeError, "rolled back", lambda: states.crop(-1)),
                (ValueError, "unknown name 'memory'", lambda: mixers[0](x, memory=cache)),
                # continuous batching, as its pages reach a mixer
                (UserError, "continuous batching", lambda: mixers[1](x, past_key_values=object()))):
            with pytest.raises(error, match=words):
                call()
    with pytest.raises(RuntimeError, match="make a new cache"):
        model(ids, past_key_values=states)
    hybrid = linear_attn.HybridLlamaForCausalLM(
        linear_attn.HybridLlamaConfig(**SMALL, linear_layers=[0]))
    with pytest.raises(UserError, match="continuous batching"):
        hybrid.generate_batch(ids.tolist(), max_new_tokens=2)


# ------------------------------------------------------------------------------------------------
# linear_attn.py: a hybrid is an ordinary checkpoint

SAVED_CASES = list(zip(SAVED, itertools.cycle(("gla-gdn", "jet-gdn", "gla-jet"))))  # layers 0 and 2

OUTPUTS = """
def outputs(model, ids, mask):
    return [model(ids, attention_mask=mask).logits, model.generate(
        ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0), torch.tensor(
        model.get_output_embeddings().weight is model.get_input_embeddings().weight)]
"""
FOREIGN = OUTPUTS + """
import functools, pathlib, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
load = functools.partial(AutoModelForCausalLM.from_pretrained, trust_remote_code=True)

for path in (file.parent for file in pathlib.Path().glob("*/inputs.pt")):
    inputs = torch.load(path / "inputs.pt")
    model, info = load(path, output_loading_info=True)
    model.save_pretrained(path / "again")
    found = [outputs(m, *inputs) for m in (model, load(path), load(path / "again"))]
    torch.save((found, sum(map(len, info.values()))), path / "outputs.pt")
assert load(path, dtype=torch.bfloat16)(inputs[0]).logits.isfinite().all()
config = AutoConfig.from_pretrained(path, trust_remote_code=True)
AutoModelForCausalLM.from_config(config, trust_remote_code=True)
assert "linear_attn" not in sys.modules
"""


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Hybrids of many families, saved, and loaded by a program that knows nothing of this project:
    (directory, {case: the outputs of the hybrid itself}). Their bases come from checkpoints, as
    real ones do: there the key names differ. A decoy package named kernels must not be used."""
    path, expected, names = tmp_path_factory.mktemp("saved"), {}, {"torch": torch}
    exec(OUTPUTS, names)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    for family, pair in SAVED_CASES:
        random_model(small(family), scale=2.0).save_pretrained(path / "base")
        model = transformers.AutoModelForCausalLM.from_pretrained(path / "base").eval()
        init = "random" if family in ("Phi", "DeepseekV3") else "inherit"
        for layer, attn in zip((0, 2), pair.split("-")):
            swap(model, layer, shaken_mixers(model, attn, init)[layer])
        inputs = tokens(2, 9).clamp(max=59), mask
        linear_attn.save_hybrid(model, path / f"{family}-{pair}")
        torch.save(inputs, path / f"{family}-{pair}" / "inputs.pt")
        with torch.no_grad():
            expected[family, pair] = names["outputs"](model, *inputs)
    (path / "kernels").mkdir()
    (path / "kernels" / "__init__.py").write_text("causal_conv = gated_delta_rule = None\n")
    run_elsewhere(FOREIGN, path)
    return path, expected


@pytest.mark.slow
@pytest.mark.parametrize("family, pair", SAVED_CASES)
def test_saved_hybrid_loads_where_the_project_is_unknown(family, pair, saved):
    """Bases whose files have other key names, such as GPT-NeoX, came back with random weights."""
    found, misfits = torch.load(saved[0] / f"{family}-{pair}" / "outputs.pt")
    assert misfits == 0
    assert all(all(map(torch.equal, outputs, saved[1][family, pair])) for outputs in found)


def test_a_hybrid_that_does_not_fit_is_refused(lab, tmp_path, script):
    """transformers would draw missing tensors at random, or cut linear layers into ranks."""
    (model, tokenizer), base, path = load_lab_model(lab), tmp_path / "base", tmp_path / "hybrid"
    linear_attn.save_hybrid(model, base, tokenizer)
    auto = transformers.AutoModelForCausalLM
    assert torch.equal(auto.from_pretrained(base)(tokens(1, 5)).logits, model(tokens(1, 5)).logits)
    with replace.replaced(model, shaken_mixers(model, "gdn"), (1, 2)):
        linear_attn.save_hybrid(model, path, tokenizer)
        logits = model(tokens(1, 5)).logits
    config = json.loads((path / "config.json").read_text())
    assert config["linear_attn"] == ["gdn", "gdn"]
    write_record(path / "config.json", {**config, "linear_attn": "gdn", "linear_init": "inherit"})
    assert torch.equal(linear_attn.load_hybrid(path)(tokens(1, 5)).logits, logits)
    with pytest.raises(ValueError, match="trust_remote_code"):
        auto.from_pretrained(path, trust_remote_code=False)
    with pytest.raises(UserError, match="tensor-parallel"):
        linear_attn.load_hybrid(path, tp_plan="auto")
    for folder in (base, path):
        tensors = load_file(folder / "model.safetensors")
        tensors["odd"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        script(command("eval.py", model=folder, task=lab / "val.jsonl"), 2,
               "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(UserError, match="missing model.*, 1 in all; unexpected odd, 1 in all"):
        linear_attn.load_hybrid(path)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="peft is not installed")
def test_readme_chats_and_fine_tunes(lab, tmp_path):
    """README's lines would not run, or not train, on a saved hybrid in another process."""
    code, = (block for block in readme_blocks() if "peft" in block)
    model, tokenizer = load_lab_model(lab)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with replace.replaced(model, shaken_mixers(model, "jet"), (1, 2)):
        linear_attn.save_hybrid(model, tmp_path / "runs" / "jet-pubmedqa" / "opt", tokenizer)
        before = model(tokens(1, 5)).logits
    assert run_elsewhere(code, tmp_path).strip()
    after = linear_attn.load_hybrid(tmp_path / "runs" / "tuned")(tokens(1, 5)).logits
    assert after.isfinite().all() and not torch.equal(before, after)


# ------------------------------------------------------------------------------------------------
# A small laboratory for the scripts: a random Llama, a corpus, items

@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("lab"), random.Random(0)
    random_model(small("Llama", num_hidden_layers=4), scale=2.0).save_pretrained(path / "model")
    distill.demo_tokenizer().save_pretrained(path / "model")
    text = lambda *n: distill.demo_text(rng.randrange(64) for _ in range(rng.randint(*n)))
    write_rows(path / "corpus.jsonl", [{"text": text(40, 40)} for _ in range(60)])
    for name, n in (("val", 24), ("test", 16)):
        write_rows(path / f"{name}.jsonl", [
            {"context": text(3, 9), "gold": rng.randrange(3),
             "choices": [text(1, 3) for _ in range(3)]} for _ in range(n)])
    write_rows(path / "generate.jsonl", [
        {"prompt": text(3, 9), "answer": text(1, 1), "stop": ["t7"], "max_tokens": 5}
        for _ in range(10)])
    return path


def write_rows(path, rows):
    opener = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def command(script, **flags):
    words = [script]
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}"] * (value is not None)
        words += [str(value)] * (value is not None and value is not True)
    return words


def distill_command(lab, out, **flags):
    return command("distill.py", **{
        "model": lab / "model", "data": lab / "corpus.jsonl", "out": out, "tokens": 4096,
        "seq_len": 32, "batch_size": 4, **flags})


def replace_command(lab, blocks, out, **flags):
    return command("replace.py", **{
        "model": lab / "model", "blocks": blocks, "task": lab / "val.jsonl",
        "test": lab / "test.jsonl", "out": out, "batch_size": 8, **flags})


def run_main(words):
    """Runs a script in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(word) for word in words])
        evaluation.run_script(importlib.import_module(Path(words[0]).stem).main)


@pytest.fixture
def script(capsys):
    """Runs a script in this process to an exit code; the last line of stderr has the text `says`
    -> (last line of stdout as JSON, or None; stderr)."""
    def script(words, code=0, says=""):
        capsys.readouterr()
        try:
            found = run_main(words) or 0
        except SystemExit as stop:
            found = stop.code
        out, err = capsys.readouterr()
        assert found == code and says in (err.strip().splitlines() or [""])[-1], err
        return json.loads(out.splitlines()[-1]) if out.strip() else None, err
    return script


def start(words, ranks=0, **kwargs):
    """Starts a script in a process of its own, or in several under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.Popen(
        [sys.executable, *(torchrun if ranks else ()), ROOT / words[0], *map(str, words[1:])],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def finished(words, **kwargs):
    """Runs a script in a process of its own to its end -> its last stdout line as JSON."""
    process = start(words, **kwargs)
    out, err = process.communicate()
    assert process.returncode == 0 and len(out.splitlines()) == 1, err
    return json.loads(out)


@pytest.fixture(scope="session")
def runs(lab):
    """A finished distillation of each mixer."""
    for attn in MIXERS:
        run_main(distill_command(lab, lab / attn, attn=attn))
    return {attn: lab / attn for attn in MIXERS}


def load_lab_model(lab):
    return evaluation.load_model(str(lab / "model"))


def assert_same(*files):
    """Two files hold the same tensors."""
    a, b = map(load_file, files)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), files


def assert_same_layers(one, other, layers=range(4)):
    for layer in layers:
        assert_same(*(distill.layer_file(run, layer) for run in (one, other)))


def log_rows(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------
# distill.py

def test_teacher_forward_stops_early_and_leaves_no_trace(lab):
    """Layers would learn from other inputs, the head would run for nothing, hooks would pile up."""
    model, _ = load_lab_model(lab)
    ids, seen, ran, layers = tokens(2, 9), {}, [], model.model.layers
    hidden = model(ids, output_hidden_states=True).hidden_states
    hooks = lambda: [len(m._forward_hooks) for m in attention_modules(model)]
    before = hooks()
    model.lm_head.register_forward_hook(lambda *a: ran.append("head"))
    layers[2].mlp.register_forward_hook(lambda *a: ran.append("mlp 2"))
    distill.teacher_forward(model, ids, [0, 2], lambda l, h, o: seen.__setitem__(l, (h, o)))
    assert list(seen) == [0, 2] and ran == [] and hooks() == before
    for i, (h, o) in seen.items():
        assert torch.equal(h, layers[i].input_layernorm(hidden[i]))
        after = hidden[i] + o
        after = after + layers[i].mlp(layers[i].post_attention_layernorm(after))
        assert relative(after, hidden[i + 1]) < 1e-5


def test_layers_apart_equal_layers_together(lab, runs, tmp_path, script):
    """Layers could not be distilled on several machines and joined."""
    model, _ = load_lab_model(lab)
    for name, layers, numbers in (("a", "1", [1]), ("b", "0,2-3", [0, 2, 3])):
        script(distill_command(lab, tmp_path / name, attn="jet", layers=layers))
        assert_same_layers(tmp_path / name, runs["jet"], numbers)
    assert len(evaluation.load_blocks(f"{tmp_path}/a,{tmp_path}/b", model)) == 4
    with pytest.raises(UserError, match="no module for layer 0"):
        evaluation.load_blocks(str(tmp_path / "a"), model)


@pytest.mark.parametrize("attn", MIXERS)
def test_distillation_learns_and_its_numbers_are_reproducible(lab, runs, attn):
    """Printed errors would not be the saved tensors', or training would change the teacher."""
    record, (model, _), pairs = distill.read_run(runs[attn]), load_lab_model(lab), {}
    before = copy.deepcopy(model.state_dict())
    mixers = evaluation.load_blocks(str(runs[attn]), model)

    def keep(module, args, kwargs, output):
        layer = module.layer_idx
        pairs[layer] = mixers[layer](kwargs["hidden_states"])[0], output[0]

    for module in attention_modules(model):
        module.register_forward_hook(keep, with_kwargs=True)
    model(load_file(runs[attn] / "held_out.safetensors")["input_ids"])
    for layer, (student, target) in pairs.items():
        start, end = (record["held_out"][when][str(layer)] for when in ("start", "end"))
        mse = (student - target).pow(2).mean().item()
        assert end["mse"] == pytest.approx(mse, rel=1e-4) and mse < start["mse"]
        assert end["relative_mse"] == pytest.approx(mse / target.var(correction=0).item(), rel=1e-4)
        cosine = F.cosine_similarity(student, target, dim=-1).mean().item()
        assert end["cosine"] == pytest.approx(cosine, abs=1e-4)
    after = model.state_dict()
    assert len(pairs) == 4 and all(torch.equal(before[k], after[k]) for k in before)
    assert [row["step"] for row in log_rows(runs[attn])] == [0, 10, 20, 30, 32, 32]
    assert record["recipe"]["lr"] == pytest.approx(1e-3 * (1536 / 32) ** 0.75)


def test_a_solve_is_the_ridge_regression(lab):
    """o_proj would not be the solution that fp64 gives from the definition."""
    model, _ = load_lab_model(lab)
    mixers = distill.make_mixers(model, "gdn", [1], "inherit", 0)
    data, pairs = [tokens(8, 32, seed=s) for s in range(4)], []
    features = mixers[1].o_proj.in_features
    inherited = expected = mixers[1].o_proj.weight.detach().double()

    def keep(layer, hidden_states, target):
        pairs.append([x.flatten(0, 1).double()
                      for x in (mixers[1].head_outputs(hidden_states), target)])

    for batch in data:
        distill.teacher_forward(model, batch, [1], keep)
    error = lambda: distill.held_out_error(model, mixers, torch.cat(data), 8)[1]["mse"]
    before = error()
    distill.solve_o_proj(model, mixers, data)
    assert error() < 0.9 * before
    halves = [tuple(map(torch.cat, zip(*pairs[i::2]))) for i in (0, 1)]
    for (x, y), (other_x, other_y) in (halves, halves[::-1]):
        gram = x.T @ x + 1e-4 * x.square().sum() / features * torch.eye(features)
        change = torch.linalg.solve(gram, x.T @ (y - x @ inherited.T)).T
        moved, rest = other_x @ change.T, other_y - other_x @ inherited.T
        share = (moved * rest).sum() / moved.square().sum()
        expected = expected + 0.5 * share.clamp(0, 1) * change
    assert relative(mixers[1].o_proj.weight, expected) < 1e-4


def test_a_solve_does_not_fit_noise(lab):
    """A regression on few tokens would put their noise in the place of what training learned."""
    model, tokenizer = load_lab_model(lab)
    mixers = distill.make_mixers(model, "gdn", [0, 3], "inherit", 0)
    corpus, args = lab_corpus(lab, tokenizer, seq_len=32)
    optimizers, stream = distill.make_optimizers(mixers), distill.batches(corpus, args)
    for batch in itertools.islice(stream, 40):
        distill.train_step(model, mixers, optimizers, batch, 1e-2)
    before = distill.held_out_error(model, mixers, corpus.held_out, 4)
    distill.solve_o_proj(model, mixers, itertools.islice(stream, 2))
    after = distill.held_out_error(model, mixers, corpus.held_out, 4)
    assert all(after[layer]["mse"] < 1.01 * before[layer]["mse"] for layer in before)
    for batch, count in ((tokens(1, 32), 32), (tokens(32, 32), 8)):
        endless = itertools.count()
        distill.solve_o_proj(model, mixers, (batch for _ in endless))
        assert next(endless) == count


@pytest.mark.parametrize("attn, steps", (("gdn", 1), ("gdn", 8), ("jet", 1), ("gla", 8)))
def test_a_short_distillation_does_not_end_worse_than_it_began(
        lab, steps, attn, tmp_path, script):
    """Adam's first steps undid what was solved; TF32, which some containers set, is too coarse."""
    torch.set_float32_matmul_precision("high")
    result, _ = script(distill_command(lab, tmp_path / "out", tokens=128 * steps, attn=attn))
    assert torch.get_float32_matmul_precision() == "highest"
    start, end = (result["held_out"][when] for when in ("start", "end"))
    assert all(end[layer]["mse"] < start[layer]["mse"] for layer in end)


def test_captured_updates_equal_plain_ones(lab, monkeypatch):
    """On a GPU, an update that a graph replays would train on an old batch, at an old rate, or
    another layer. Here the graphs are stand-ins, which run again what was captured."""
    class Graph:
        def replay(self):
            self.loss.copy_(self.run())

    @contextlib.contextmanager
    def capture(graph, pool):
        def record(*args):          # a capture runs nothing
            graph.run, graph.loss = functools.partial(update, *args), torch.zeros(())
            return graph.loss
        with monkeypatch.context() as patch:
            patch.setattr(distill, "update_student", record)
            yield

    model, _ = load_lab_model(lab)
    update, weights = distill.update_student, []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    for way in (update, distill.CapturedUpdate("cpu")):
        mixers = distill.make_mixers(model, "gdn", [0, 1], "inherit", 0)
        optimizers, losses = distill.make_optimizers(mixers), []
        for step in range(6):
            found = distill.train_step(model, mixers, optimizers, tokens(2, 16, seed=step),
                                       2 ** -(8 + step % 2), way)
            losses.append([loss.item() for loss in found.values()])
        weights.append((losses, [p for m in mixers.values() for p in m.parameters()]))
    assert weights[0][0] == weights[1][0] and all(map(torch.equal, weights[0][1], weights[1][1]))


def test_schedule_and_clip_are_per_layer(lab):
    """Warm-up, peak and floor as stated; a layer with a huge loss does not touch another's step,
    and only one student's graph is alive at a time, or memory would grow with the layers."""
    for step, steps, rate in ((0, 1000, 1 / 50), (50, 1000, 1), (1000, 1000, 0.01), (0, 1, 1 / 5)):
        assert distill.learning_rate(step, steps, 1.0) == pytest.approx(rate)
    model, _ = load_lab_model(lab)
    results, events = [], []
    for factor in (1.0, 1e4):
        mixers = distill.make_mixers(model, "gdn", [0, 1], "inherit", 0)
        mixers[0].o_proj.weight.data.mul_(factor)
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x: events.append("kept") or x, lambda x: events.append("used") or x):
            losses = distill.train_step(model, mixers, distill.make_optimizers(mixers),
                                        tokens(2, 16), 1e-3)
        results.append((losses, mixers[1].state_dict()))
    assert results[1][0][0] > 1e3 * results[0][0][0]
    assert all(torch.equal(results[0][1][k], results[1][1][k]) for k in results[0][1])
    assert [event for event, _ in itertools.groupby(events)] == ["kept", "used"] * 4


def test_every_checkpoint_continues_identically(lab, tmp_path, monkeypatch, script):
    """A stop between two steps, a torn log or half a checkpoint would change the result."""
    words = lambda name: distill_command(lab, tmp_path / name, attn="gla", tokens=640, resume=True)
    script(words("whole"))                                                      # 5 steps
    save, out = distill.save_checkpoint, tmp_path / "stopped"
    for stop_at in range(6):
        def save_and_die(path, state, *rest):
            save(path, state, *rest)
            if state["step"] == stop_at:
                (path / ".checkpoint.safetensors.tmp").write_bytes(b"half")
                with open(path / "log.jsonl", "a") as file:
                    file.write('{"event": "train", "st')
                raise KeyboardInterrupt

        monkeypatch.setattr(distill, "save_checkpoint", save_and_die)
        script(words("stopped"), 130)
    monkeypatch.setattr(distill, "save_checkpoint", save)
    for _ in range(2):
        result, _ = script(words("stopped"))
        assert result["held_out"] == distill.read_run(out)["held_out"]
    assert not list(out.glob("*checkpoint*"))
    assert_same_layers(tmp_path / "whole", out)
    assert log_rows(tmp_path / "whole") == log_rows(out)


def lab_corpus(lab, tokenizer, data=None, **flags):
    args = argparse.Namespace(**{"data": str(data or lab / "corpus.jsonl"), "text_column": "text",
                                 "seq_len": 16, "seed": 0, "batch_size": 4, "tokens": 64, **flags})
    return distill.open_corpus(args, tokenizer), args


def test_a_file_is_packed_held_out_and_repeated(lab, tmp_path):
    """Tokens would be lost, trained on twice in a pass, or both held out and trained on."""
    import datasets
    _, tokenizer = load_lab_model(lab)
    text = (lab / "corpus.jsonl").read_bytes()
    rows = list(map(json.loads, text.splitlines()))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "c").write_bytes(text)
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "c.parquet"))
    (tmp_path / "c.txt").write_text(" ".join(row["text"] for row in rows))
    stream = tokenizer.encode((tmp_path / "c.txt").read_text())
    chunks = torch.tensor(stream[: len(stream) // 16 * 16]).view(-1, 16)
    n = len(chunks) - 32
    for path in (lab / "corpus.jsonl", *tmp_path.iterdir()):
        corpus, args = lab_corpus(lab, tokenizer, path, seed=3, batch_size=7)
        assert torch.equal(corpus.held_out, chunks[-32:])
        read = torch.cat(list(itertools.islice(distill.batches(corpus, args), n)))  # 7 passes
        for part in read.split(n):
            assert sorted(part.tolist()) == sorted(chunks[:-32].tolist())
        assert not torch.equal(read[:n], read[n: 2 * n])
        assert torch.equal(next(distill.batches(corpus, args, 5)), read[35:42])


def test_documents_are_delimited():
    """Without a mark at their border a model would be trained to go on from one to the next."""
    for begin, tokens_of_one in (([1], [1, 5, 6]), ([], [5, 6, 2])):
        tokenizer = types.SimpleNamespace(bos_token_id=1, eos_token_id=2,
                                          encode=lambda text: [*begin, 5, 6])
        source = ("name", [{"text": "a"}] * 2, "text", 1.0)
        assert list(distill.documents([source], tokenizer, {}, once=True)) == [tokens_of_one] * 2


def test_streams_are_mixed_by_tokens_and_resume(lab, tmp_path):
    """Mixed streams would miss their proportions, leak held-out chunks or resume elsewhere."""
    _, tokenizer = load_lab_model(lab)
    rng = random.Random(0)
    for name, low, length in (("a", 0, 50), ("b", 32, 10)):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "train.jsonl", [
            {"body": distill.demo_text(rng.randrange(low, low + 32) for _ in range(length))}
            for _ in range(4000)])
    flags = dict(data=f"{tmp_path}/a@3,{tmp_path}/b@1", text_column="body", batch_size=8)
    corpus, args = lab_corpus(lab, tokenizer, **flags)
    read = list(itertools.islice(distill.batches(corpus, args), 40))
    assert (torch.cat(read) < 32).double().mean().item() == pytest.approx(0.75, abs=0.03)
    held_out = set(map(tuple, corpus.held_out.tolist()))
    assert len(corpus.held_out) == 32
    assert not held_out & set(map(tuple, torch.cat(read).tolist()))
    assert torch.equal(next(distill.batches(*lab_corpus(lab, tokenizer, **flags), 25)), read[25])
    with pytest.raises(UserError, match="'text'; columns: body"):
        lab_corpus(lab, tokenizer, **{**flags, "text_column": "text"})


def test_rows_without_text_are_skipped_and_counted(lab, tmp_path, script):
    """One null text would end a distillation, at the same row after every resume."""
    good = [json.loads(line) for line in (lab / "corpus.jsonl").read_text().splitlines()] * 15
    for name, bad in (("clean", []), ("nulls", [{"text": None}, {"text": ""}])):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "train.jsonl", [*bad, *good[:40], *bad, *good[40:]])
        _, err = script(distill_command(lab, tmp_path / f"{name}-out", tokens=64, layers=0,
                                        seq_len=16, batch_size=1, data=tmp_path / name))
    rows = distill.read_run(tmp_path / "nulls-out")["skipped_rows"][str(tmp_path / "nulls")]
    assert rows % 4 == 0 and f"corpus: {rows} rows of {tmp_path / 'nulls'} have no text" in err
    assert_same_layers(tmp_path / "clean-out", tmp_path / "nulls-out", [0])
    write_rows(tmp_path / "nulls" / "train.jsonl", [{"text": None}] * 200 + good)
    with pytest.raises(UserError, match="no text in column 'text'"):
        lab_corpus(lab, None, tmp_path / "nulls")


# ------------------------------------------------------------------------------------------------
# eval.py

class Letters:
    """A tokenizer of characters. One that `merges` ends every text with EOS, and has one token for
    "?" and "\\n" together and none for a space that ends a text."""
    bos_token, bos_token_id, eos_token_id = "<s>", 1, 2

    def __init__(self, merges=False):
        self.merges = merges

    def encode(self, text, add_special_tokens=True):
        letters = text.rstrip(" ").replace("?\n", "\x07") if self.merges else text
        begin, end = [1] * add_special_tokens, [2] * (add_special_tokens and self.merges)
        return [*begin, *map(ord, letters), *end]


@pytest.mark.parametrize("merges, context, continuation, bos, tokens", (
    (False, "ab", " c", None, "\1ab| c"), (False, "ab \n", "c", None, "\1ab| \nc"),
    (False, "", " c", None, "\1| c"), (False, "<s>a", " c", None, "<s>a| c"),   # no second BOS
    (False, "ab", " c", False, "ab| c"), (False, "", "", None, "\1|"),
    (True, "a?\n", "b", None, "\1a?\2|\2"), (True, "a", "?\nb", None, "\1a\2|b\2"),
    (True, "a?\n", "b", False, "a?|b"), (True, "a?", "\n", False, "a?|"),       # no token is left
    (True, "", "?\n", None, "\1|\7"), (True, " \n", "b", None, "\1\2|\nb\2")))
def test_pairs_are_cut_as_the_harness_cuts_them(merges, context, continuation, bos, tokens):
    """18 of 33 log-likelihoods under a tokenizer like Qwen2.5's would differ from the harness's."""
    start, rest = tokens.split("|")
    assert evaluation.encode_pair(Letters(merges), context, continuation, bos) == (
        list(map(ord, start + rest)), len(rest))


@needs_shared
@pytest.mark.parametrize("case", ("qwen_like", "gpt2_positions"))
def test_log_likelihoods_equal_the_harness(case):
    """Of models whose tokens span the context's end, and whose position table is short."""
    folder = SHARED / "cases" / case
    model, tokenizer = evaluation.load_model(str(folder))
    task, docs = file_task(folder / "items.jsonl")
    wanted = json.loads((folder / "harness_lls.json").read_text())
    for size, whole in itertools.product((1, 3, 64), (False, True)):
        found = evaluation.evaluate(model, evaluation.Prepared(
            task, docs, model, tokenizer, size, whole=whole)).outputs
        assert sum(found, []) == pytest.approx(sum(wanted, []), abs=1e-4)


@pytest.mark.parametrize("item, says", (
    ({"context": "t1", "choices": ["t2", " "], "gold": 0}, "continuation '  '"),
    ({"context": "t1", "choices": ["", "t2"], "gold": 0}, "continuation ' '"),
    ({"context": "", "choices": ["t1", "t2"], "gold": 0}, "context ''"),
    ({"prompt": "\n ", "answer": "t1"}, "prompt")))
def test_texts_without_tokens_are_refused(lab, tmp_path, item, says):
    """A choice without tokens scored 0, more than any other, and won; an empty prompt crashed."""
    model, tokenizer = load_lab_model(lab)
    task, docs = file_task(write_rows(tmp_path / "items.jsonl", [item]))
    with pytest.raises(UserError, match=f"items.jsonl line 1: the {says}.* has no tokens"):
        evaluation.Prepared(task, docs, model, tokenizer, 8)


def prepared(lab, name, batch_size=8, model=None, **kwargs):
    model, tokenizer = model or load_lab_model(lab)
    task, docs = evaluation.file_task(lab / f"{name}.jsonl")
    return model, evaluation.Prepared(task, docs, model, tokenizer, batch_size, **kwargs)


def test_equal_requests_are_asked_once(lab):
    """Otherwise equal choices cost twice, and may differ by rounding."""
    model, tokenizer = load_lab_model(lab)
    docs = [{"context": "t1 t2", "choices": ["t3", "t4", "t3"], "gold": 0}] * 2
    split = evaluation.Prepared(evaluation.CHOICE_FILE, docs, model, tokenizer, 4)
    assert len(split.requests) == 2
    score = evaluation.evaluate(model, split)
    assert score.outputs[0][0] == score.outputs[0][2] and score.n == 2


def test_generation_ends_at_eos_and_takes_any_generation_config(lab):
    """EOS written as characters would not end a text; a config that asks for a dict crashed."""
    model, split = prepared(lab, "generate", batch_size=4)
    model.generation_config.return_dict_in_generate = True
    texts = [text for text, in evaluation.evaluate(model, split).outputs]
    words = map(str.split, texts)
    eos = split.tokenizer.eos_token = next(w[1] for w in words if len(w) > 1 and w[1] != w[0])
    short = [text for text, in evaluation.evaluate(model, split).outputs]
    assert short != texts and short == [text.split(eos)[0] for text in texts]


def test_the_head_may_lie_on_another_device():
    """With --device auto the hidden states reach the LM head on the last GPU, the ids the first."""
    hidden, head = torch.randn(2, 2, 32), torch.nn.Linear(32, 64)

    def forward(ids, **kwargs):
        assert ids.is_meta
        return transformers.modeling_outputs.CausalLMOutput(logits=head(hidden))

    model = Mock(device=torch.device("meta"), get_output_embeddings=lambda: head,
                 side_effect=forward)
    requests = [evaluation.Request((1, 5), 1), evaluation.Request((1, 2, 3), 2)]
    rows = [evaluation.Row(0, 1, [0]), evaluation.Row(0, 2, [1])]
    owners, log_probs = evaluation.read(model, requests, rows)
    wanted = head(hidden).log_softmax(-1)[[0, 1, 1], [0, 0, 1], [5, 2, 3]]
    assert owners.tolist() == [0, 1, 1] and torch.allclose(log_probs, wanted)


def test_repeating_a_cache_sends_nothing_to_the_device():
    """Row numbers that lie on the CPU would be sent for every layer, and the host would wait."""
    class Sent(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += str((kwargs or {}).get("device")) == "meta"
            return func(*args, **(kwargs or {}))

    cache = transformers.DynamicCache()
    for layer in range(3):
        cache.update(*torch.zeros(2, 2, 4, 40, 8, device="meta"), layer)
    places = torch.tensor([0, 0, 1], device="meta")
    with Sent() as sent:
        copies = evaluation.repeated(cache, places)
    assert sent.count == 0
    for layers, rows in ((copies.layers, 3), (cache.layers, 2)):
        assert all(layer.keys.shape == (rows, 4, 40, 8) and layer.keys.is_meta for layer in layers)


def test_stop_strings_are_found_in_the_last_tokens():
    """Otherwise a text's cost grows with the square of its length, or a stop string is missed."""
    class Bytes:                        # 0 is a special token, the others are bytes
        def batch_decode(self, rows, skip_special_tokens):
            self.longest = max(map(len, rows))
            return [bytes(filter(None, row)).decode(errors="replace") for row in rows]

    tokenizer, stops = Bytes(), [["né", "q"], ["\n\n"], []]
    ended = evaluation.stop_on_text(tokenizer, stops, 2)
    ids = torch.tensor([[113, 113, *("x" * 60 + text).encode()[:64]]
                        for text in ("n\0é~", "\n~\n\n", "né~~")])
    for n in range(3, 67):
        texts = tokenizer.batch_decode(ids[:, 2:n].tolist(), True)
        done = ended(ids[:, :n], None).tolist()
        assert done == [any(s in text for s in row) for text, row in zip(texts, stops)]
        assert tokenizer.longest <= 11
    assert done == [True, True, False]


def test_eval_script(lab, tmp_path, script):
    """The items on disk would not be those of the printed score, or of another file."""
    (tmp_path / "val.jsonl").write_text("".join((lab / "val.jsonl").open().readlines()[:7]))
    tasks = [lab / "val.jsonl", lab / "generate.jsonl", tmp_path / "val.jsonl"]
    words = functools.partial(command, "eval.py", model=lab / "model", limit=9)
    result, _ = script(words(task=",".join(map(str, tasks)), out=tmp_path))
    for row, n in zip(result["results"], (9, 9, 7), strict=True):
        items = [json.loads(line) for line in Path(row["items"]).read_text().splitlines()]
        assert row["n"] == len(items) == n
        assert row["value"] == pytest.approx(sum(i[row["metric"]] for i in items) / n)
    norm, _ = script(words(task=tasks[0], metric="acc_norm"))
    assert norm["results"][0]["value"] == result["results"][0]["metrics"]["acc_norm"]


def time_command(lab, out, **flags):
    return command("eval.py", throughput=True, **{"model": lab / "model", "out": out, **flags})


@pytest.mark.parametrize("attn", MIXERS)
def test_throughput_times_the_hybrids_of_a_search(attn, lab, runs, tmp_path, monkeypatch, script):
    """Other hybrids would be timed, or with a cache that grows, or finished rows a second time."""
    (tmp_path / "result.json").write_text(json.dumps(
        {"steps": [{"layers": [2]}, {"layers": [0, 2]}, {"layers": [0, 2, 3]}]}))
    monkeypatch.setattr(evaluation, "STEPS", 1)
    flags = dict(blocks=runs[attn], layers_from=tmp_path / "result.json", counts="0,2,3")
    words = [time_command(lab, tmp_path, contexts=c, **flags) for c in ("8", "8,24")]
    (first, _), (result, err) = map(script, words)
    assert "context 24" in err and "context 8," not in err
    assert (result.pop("next"), result["mixer"], result["decoding"][:6]) == (None, attn, "eager:")
    assert result == json.loads((tmp_path / "throughput.json").read_text())
    assert result["rows"][:6] == first["rows"]
    state = 4 * 8 * 8 * 4 + 3 * {"gla": 0, "gdn": 3, "jet": 1}[attn] * 32 * 4
    for row, (context, layers, batch) in zip(result["rows"], itertools.product(
            (8, 24), ([], [0, 2], [0, 2, 3]), (1, 8)), strict=True):
        assert (row["context"], row["layers"], row["batch"]) == (context, layers, batch)
        wanted = len(layers) * state + (4 - len(layers)) * 2 * 2 * 8 * 4 * (context + 1)
        assert row["cache_bytes"] == row["cache_bytes_formula"] == batch * wanted


@pytest.mark.parametrize("family", ("Llama", "GPT2", "Mistral"))
def test_a_timed_step_is_the_step_after_the_context(family, monkeypatch):
    """The speed would be that of another computation: of a wrong place, state or length, or of SDPA
    with the mask that transformers makes while a graph is captured."""
    monkeypatch.setattr(evaluation, "CHUNK", 7)
    config, ids = small(family), tokens(1, 20)
    if family == "Mistral":
        config.sliding_window = 8
    model = random_model(config)
    with torch.no_grad(), replace.replaced(model, shaken_mixers(model, "gdn"), (0, 2)):
        cache = evaluation.repeated(evaluation.prefill(model, ids), torch.tensor([0, 0]))
        for layer in cache.layers:
            evaluation.hold(layer)
        masks = []
        attention_modules(model)[1].register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
        for token in (5, 9):            # both in the same place
            whole = model(torch.cat([ids, torch.tensor([[token]])], 1)).logits[:, -1]
            masks.clear()
            with evaluation.without_masks(), monkeypatch.context() as patch:
                patch.setattr(transformers.masking_utils, "is_tracing", lambda *args: True)
                step = model(torch.tensor([[token]] * 2), past_key_values=cache).logits[:, -1]
            assert masks == [None] and relative(step, whole.expand(2, -1)) < 1e-5


def test_throughput_halves_a_batch_that_does_not_fit(monkeypatch):
    """The largest batch would not be found where memory runs out inside a capture."""
    def decode(model, cache, batch, in_graph):
        if batch > 2:
            try:
                raise torch.OutOfMemoryError
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")
        return batch
    monkeypatch.setattr(evaluation, "time_decoding", decode)
    assert evaluation.time_batch_that_fits(None, None, 16, True) == 2


@pytest.mark.parametrize("flags, says", (
    ({}, "--blocks or --attn"), (dict(attn="gla", task="copy"), "and no --task"),
    (dict(attn="gla", counts="9"), "--counts"), (dict(attn="gla", contexts="0"), "--contexts"),
    (dict(attn="gla", layers_from="nothing"), "cannot read nothing"),
    (dict(blocks="nothing"), "--blocks")))
def test_throughput_bad_input(flags, says, lab, tmp_path, script):
    """A flag that does not fit would end in a traceback, or after the timings."""
    script(time_command(lab, tmp_path, **flags), 2, says)


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
# eval.py: the eighteen tasks, as lm-evaluation-harness asks and scores them

CASES = SHARED / "notes" / "harness_cases.json"
GOLDEN = json.loads(CASES.read_text(encoding="utf-8")) if CASES.exists() else {
    "cases": [], "functions": {}}
HARNESS_NAME = {"swde": "swde_v1"}  # the harness's own swde is version 1 by now


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("case", GOLDEN["cases"],
                         ids=lambda case: f"{case['task']}-{case['doc_index']}")
def test_harness_case(case):
    """A prompt, a stop string or a score that differs makes numbers that cannot be compared."""
    task, doc = TASKS[HARNESS_NAME.get(case["task"], case["task"])], case["doc"]
    task.check(doc)
    shots = ()
    if case["task"] == "mbpp":
        prompts = load_docs(task, "prompt", SHARED / "data/mbpp/prompt.jsonl")
        (shots,) = draw_shots(task, [doc], 3, prompts)
    if "fewshot_docs" in case:  # the draws of the documents before this one come first
        before = [{"question": i} for i in range(case["doc_index"])]
        shots = draw_shots(task, [*before, doc], case["shots"], case["fewshot_docs"])[-1]
    for (context, rest), want in zip(task.requests(doc, shots), case["requests"], strict=True):
        if want["context"] is None:
            head = want["context_head_chars"]
            assert sha(context[:head]) == want["context_head_sha256"]
            assert context[head:] == want["context_tail"]
        else:
            assert context == want["context"]
        limits = want.get("gen_kwargs") and {"until": want["gen_kwargs"]["until"], "max_gen_toks":
                                             want["gen_kwargs"].get("max_gen_toks", 256)}
        assert rest == want.get("continuation", limits)
    if task.choices and not task.target:
        assert task.choices(doc) == case["choices"]
    for score in case["scores"]:
        got = task.score(doc, score.get("lls") or [score["output"]], allow_code=True)
        want = {metric + ("," + score["filter"] if task.name == "gsm8k" else ""): value
                for metric, value in score["metrics"].items()}
        assert {metric: got[metric] for metric in want} == want
        assert set(got) == set(want) or task.name == "gsm8k"


@needs_shared
def test_harness_functions():
    """The harness's own functions on texts that are meant to mislead ours."""
    golden = GOLDEN["functions"]
    classes = golden["trec_classification_score"]["all_classes"]
    swde = lambda text, values: max(
        TASKS["swde"].score({"text": "", "value": value}, [text])["contains"] for value in values)
    trec = lambda text, gold: TASKS["TREC"].score(
        {"answers": [gold], "all_classes": classes}, [text])["score"]
    for ours, cases in (
            (hellaswag_clean, golden["hellaswag_preprocess"]), (swde, golden["swde_contains"]),
            (lambda options: mathqa_choices({"options": options}), golden["mathqa_choices"]),
            (rouge_l, golden["samsum_rouge_l_f"]),
            (trec, golden["trec_classification_score"]["cases"]),
            (lambda a, b: gsm8k_bare(a) == gsm8k_bare(b), golden["gsm8k_exact_match"])):
        for *arguments, want in cases:
            assert ours(*arguments) == want, arguments
    for lls, lengths, acc, acc_norm in golden["numpy_argmax"]:
        for gold in (0, 1):
            doc = {"choices": ["x" * length for length in lengths], "context": "", "gold": gold}
            assert CHOICE_FILE.score(doc, lls) == {"acc": gold == acc, "acc_norm": gold == acc_norm}
    for text, stop, want in golden["stop_cut"]:
        doc = {"prompt": "", "answer": want, "stop": stop}
        assert GENERATE_FILE.score(doc, [text]) == {"exact_match": 1.0}
    for text, strict, flexible in golden["gsm8k_filters"]:
        for name, answer in (("strict-match", strict), ("flexible-extract", flexible)):
            for gold, right in ((answer, 1.0), (answer + "0", 0.0)):
                got = gsm8k_judge({"answer": f"#### {gold}"}, text)
                assert got[f"exact_match,{name}"] == right, (text, name)
    for n, draws in ((7473, "n_train=7473,k=4, first 6 documents"),
                     (12, "n_train=12,k=4, 4 documents (matches run gsm8k@4shot)")):
        want = golden["gsm8k_fewshot_indices"][draws]
        got = draw_shots(TASKS["gsm8k"], [{}] * len(want), 4, [{"i": i} for i in range(n)])
        assert [[row["i"] for row in shots] for shots in got] == want


@needs_shared
def test_real_files():
    """A real document that fails a check, or is both searched and reported, would spoil a score."""
    task, golden, data = TASKS["gsm8k"], GOLDEN["gsm8k_real_4shot_hashes"], SHARED / "data"
    files = data / "gsm8k/train.jsonl", data / "gsm8k/test.jsonl"
    train, test = load_docs(task, "train", files[0]), load_docs(task, "test", files[1])
    assert (len(train), len(test)) == (golden["n_train"], golden["n_test"])
    contexts = [task.requests(doc, shots)[0][0] for doc, shots in zip(
        test, draw_shots(task, test[:6], 4, train))]
    assert [sha(context) for context in contexts] == golden["context_sha256_utf8"]
    search, report, _ = split_docs(task, *files)
    assert len(search) == 500 and report == test
    for doc, shots in zip(search, draw_shots(task, search, 4, train, searched=True)):
        assert len(shots) == 4 and doc["question"] not in [shot["question"] for shot in shots]
    search, report, notes = split_docs(TASKS["pubmedqa"], data / "pubmedqa/validation.jsonl",
                                       data / "pubmedqa/test.jsonl")
    assert len(search) == len(report) == 500 and len(notes) == 1
    search, report, notes = split_docs(TASKS["HE"], data / "humaneval/HumanEval.jsonl.gz")
    assert (len(search), len(report)) == (82, 82) and "82 documents" in notes[1]
    solutions = [TASKS["HE"].score(doc, [doc["canonical_solution"]], allow_code=True)
                 for doc in report[:4]]
    assert solutions == [{"pass@1": 1.0}] * 4


WINOGRANDE = {"sentence": "Ann likes Eve because _ is kind_ . ", "option1": "Ann",
              "option2": "Eve", "answer": "2"}
MATHQA = {"Problem": "p", "options": "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5", "correct": "e"}
ARC = {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
OBQA = {"question_stem": "42", "choices": ARC["choices"], "answerKey": " 2"}
MMLU = {"question": " q \n", "choices": ["1", " 2", "3 ", "4"], "answer": 3}
BOOLQ = {"passage": "", "question": "is it?", "label": 0}
PUBMED = {"CONTEXTS": ["a", "b"], "QUESTION": "q", "final_decision": "maybe"}
GSM8K = {"question": "q", "answer": "<<1+1=2>>2\n#### 2"}
CODE = {"prompt": "def f():\n", "test": "def check(f):\n    pass\n", "entry_point": "f"}
MBPP = {"text": "t", "code": "c", "test_list": ["a", "b", "c", "d"]}
TREC = {"context": "c", "question": "q", "answers": ["", "x"], "all_classes": ["x"]}
SWDE = {"text": "City:\n", "value": "Rome "}


def test_shots_by_hand():
    """What the harness shows as a solved example, in the cases that its files above have not."""
    def asked(name, doc, *shots):
        return TASKS[name].requests(doc, shots)
    assert asked("WG", WINOGRANDE) == [(f"Ann likes Eve because {name}", " is kind_ .")
                                       for name in ("Ann", "Eve")]
    # a shot without a rest has no answer, and the harness then adds no blank line either
    last = dict(WINOGRANDE, sentence="She met _")
    assert asked("WG", WINOGRANDE, last)[1][0] == "She met EveAnn likes Eve because Eve"
    (alone, _), (shown, _) = asked("TREC", TREC)[0], asked("TREC", TREC, TREC)[0]
    assert shown == alone + "\n\n" + alone
    assert asked("HE", CODE, CODE)[0][0] == (
        "def f():\n def check(f):\n    pass\n\ncheck(f)\n\ndef f():\n")
    question = "q\nA. 1\nB.  2\nC. 3 \nD. 4\nAnswer:"
    assert asked("EC", MMLU, dict(MMLU, answer="D"))[3] == (
        "The following are multiple choice questions (with answers) about econometrics.\n\n"
        f"{question} D\n\n{question}", " D")
    assert [asked(name, SWDE)[0][0] for name in ("swde", "swde_v1")] == ["City:\n", "City:"]


@pytest.mark.parametrize("name, doc, outputs, metrics", (
    ("OBQA", OBQA, [-2, -1], {"acc": 1, "acc_norm": 1}),
    # four options, the fifth is right: no model can get it, as in the harness
    ("MQ", dict(MATHQA, options="a ) 1 , b ) 2 , c: 3 , d ) 4 , e ) 5"), [0, 0, 0, 9],
     {"acc": 0, "acc_norm": 0}),
    ("MK", dict(MMLU, answer="B"), [-2, -1, -3, -4], {"acc": 1}),   # the right choice as a text
    ("BQ", dict(BOOLQ, label=True), [-2, -1], {"acc": 1}),          # as SuperGLUE's own files
    ("BQ", dict(BOOLQ, label=False), [-2, -1], {"acc": 0}),
    ("swde", SWDE, ["in rome"], {"contains": 0}), ("swde_v1", SWDE, ["in rome"], {"contains": 1}),
    *((None, {"context": "c", "choices": choices, "gold": 0}, lls, {"acc": acc, "acc_norm": norm})
      for choices, lls, acc, norm in (
          (["aaaa", "b", "cc"], [-4.0, -3.0, -5.0], 0, 1), (["a", "bb"], [-1, -1], 1, 0),
          (["", "b"], [-1, -2], 1, 0), (["a", "bb"], [math.nan, -1.0], 1, 1)))))
def test_scores_by_hand(name, doc, outputs, metrics):
    """Documents that are spelled as some copies of a dataset are, ties, NaN, empty choices and
    lengths would be counted otherwise than the harness does."""
    task = TASKS[name] if name else CHOICE_FILE
    task.check(doc)
    assert task.score(doc, outputs) == metrics
    score = evaluation.Score("acc", [{"acc": 1.0}] * 3 + [{"acc": 0.0}], [])
    assert (score.mean(), score.n, score.stderr()) == (0.75, 4, pytest.approx(0.25))


def test_batches_are_even_and_cut_where_padding_costs_more():
    """Ranks would wait for one with a batch more; uneven rows would read mostly padding."""
    for n, size in itertools.product((1, 2, 3, 5, 81, 400), (1, 2, 8, 32, 500)):
        batches = evaluation.even_batches(list(range(n)), size)
        sizes = [len(batch) for batch in batches]
        assert sum(batches, []) == list(range(n))
        assert max(sizes) <= size and max(sizes) - min(sizes) <= 1
        assert len(batches) < 2 * -(-n // size) or len(batches) <= 8
        assert not 8 <= len(batches) < n or all(
            len({len(batches[rank::ranks]) for rank in range(ranks)}) == 1 for ranks in (2, 4, 8))
    model, lengths = Mock(device=torch.device("cpu")), [300, 299, 299, 100, 100, 20, 3]
    rows = [evaluation.Row(0, length, [0]) for length in random.Random(0).sample(lengths, 7)]
    for size, wanted in ((8, [3, 3, 1]), (2, [2, 1, 2, 2]), (1, [1] * 7)):
        forwards = evaluation.cut(model, rows, size)
        assert [row.length for forward in forwards for row in forward] == lengths
        assert list(map(len, forwards)) == wanted
    assert evaluation.cut(model, [], 3) == []


# ------------------------------------------------------------------------------------------------
# eval.py: documents

@pytest.mark.parametrize("name, content, why", [
    ("arc_easy", dict(ARC, answerKey="C"), "'C' is not in list"),
    ("boolq", dict(BOOLQ, label=-1), "-1 is not one of 2"),
    ("pubmedqa", dict(PUBMED, final_decision="perhaps"), "'perhaps' is not one of 3"),
    ("gsm8k", dict(GSM8K, answer="five"), "no number"),
    ("winogrande", dict(WINOGRANDE, sentence=""), "substring not found"),
    ("mathqa", dict(MATHQA, options="1, 2, 3"), "not one of 0 choices"),
    ("humaneval", dict(CODE, test="def check(:"), "SyntaxError"),
    ("longbench_samsum", dict(TREC, answers=[]), "is not a text"),
    ("mbpp", dict(MBPP, test_list=["assert f()"]), "IndexError"),
    ("choices", {"context": "c", "choices": ["a"], "gold": 0}, "two or more"),
    ("choices", {"context": "c", "choices": ["a", "b"], "gold": True}, "gold answer True"),
    ("choices", {"context": "c", "choices": ["a", 1], "gold": 0}, "TypeError"),
    ("choices", {"context": "c", "choices": ["a", "b"]}, "no gold"),
    ("choices", {"context": "c", "choices": ["a", "\ude00b"], "gold": 0}, "surrogates"),
    ("answers", {"prompt": "p", "answer": 5}, "not a text"),
    ("answers", {"prompt": "p", "answer": "5", "stop": "x"}, "list of texts"),
    ("answers", {"prompt": "p", "answer": "5", "max_tokens": 0}, "positive"),
    ("items.jsonl", "[1]", "line 1 is not a JSON object"),
    ("items.jsonl", "\n{", "line 2 is not a JSON object"),
    ("items.jsonl", "[" * 100_000, "line 1 is not"),
    ("items.jsonl", '{"a":' * 100_000, "line 1 is not"), ("items.jsonl", "", "no documents"),
    ("items.jsonl", b"\xff\xfe\x00", "cannot read"), ("items.jsonl", None, "cannot read"),
    ("items.parquet", None, "cannot read")], ids=lambda x: str(x)[:30])
def test_bad_documents_are_named(tmp_path, name, content, why):
    """A document that cannot be asked or scored would end a run late, or count as wrong; files
    that are torn, deep, of another kind or no text gave tracebacks."""
    if isinstance(content, dict):
        path = write_rows(tmp_path / "docs.jsonl", [content])
        says = f"docs.jsonl line 1: not a document of {name} .*{why}"
    else:
        path, says = tmp_path / name, f"{name}.*{why}|{why}.*{name}"
        if content is not None:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=says):
        load_docs(TASKS[name], "test", path) if name in TASKS else file_task(path)


def test_item_files(tmp_path):
    """The two kinds of items, and that rows are the same from every kind of file."""
    import datasets
    items = [{"context": "c", "choices": ["a", "b"], "gold": 1}]
    task, docs = file_task(write_rows(tmp_path / "choices.jsonl.gz", items))
    assert task is CHOICE_FILE and task.requests(docs[0]) == [("c", " a"), ("c", " b")]
    items = [{"prompt": "p", "answer": " 5", "stop": [";"], "max_tokens": 9}]
    task, docs = file_task(write_rows(tmp_path / "answers.jsonl", items))
    assert task is GENERATE_FILE
    assert task.requests(docs[0]) == [("p", {"until": [";"], "max_gen_toks": 9})]
    assert task.score(docs[0], [" 5 ; 6"]) == {"exact_match": 1.0}
    path = str(tmp_path / "arc.parquet")
    datasets.Dataset.from_list([ARC] * 3).to_parquet(path)
    assert load_docs(TASKS["ArcE"], "test", path) == [ARC] * 3
    for value in (datetime.datetime(2026, 1, 1), b"bytes"):     # replace.py's fingerprint crashed
        datasets.Dataset.from_list([dict(ARC, more=value)] * 3).to_parquet(path)
        with pytest.raises(UserError, match=f"row 1: .*{type(value).__name__} is not JSON"):
            load_docs(TASKS["ArcE"], "test", path)


def test_named_tasks_come_before_files(tmp_path, monkeypatch):
    """A folder or a file called like a task hid it; the paper's short names are known too."""
    assert len(TASKS) == 19 and TASKS["arcc"] is TASKS["arc_challenge"]
    for name in "ArcC ArcE BQ CQ HS OBA PIQA WG GSM8K MQ HE MBPP SWDE SAMSum TREC EC MK PM".split():
        assert TASKS[name].name in replace.PAPER.read_text()
    with pytest.raises(UserError, match="arc_challenge"):
        TASKS["arc"]
    monkeypatch.chdir(tmp_path)
    args = types.SimpleNamespace(docs=None, shot_docs=None, shots=None, metric=None,
                                 allow_code_execution=False)
    (tmp_path / "gsm8k").mkdir()
    for name in ("PM", "items"):
        write_rows(tmp_path / name, [{"context": "c", "choices": ["a", "b"], "gold": 1}])
    for name, task in (("gsm8k", TASKS["gsm8k"]), ("PM", TASKS["pubmedqa"]),
                       ("items", CHOICE_FILE), ("./PM", CHOICE_FILE)):
        assert evaluation.find_task(name, args) is task
    with pytest.raises(UserError, match="no task './gsm8k'"):
        evaluation.find_task("./gsm8k", args)


@needs_shared
def test_pubmedqas_official_split_is_made_again(monkeypatch):
    """The Hub's unsplit rows would give another test set than the official one, silently."""
    import datasets
    search, test = (load_docs(TASKS["PM"], "", SHARED / f"data/pubmedqa/{name}.jsonl")
                    for name in ("validation", "test"))
    rows, draw = [], random.Random(0)
    for label in ("yes", "no", "maybe"):        # the authors' shuffles, undone
        mine = [[doc for doc in docs if doc["final_decision"] == label] for docs in (search, test)]
        places = list(range(len(sum(mine, []))))
        draw.shuffle(places)
        late, early = dict(zip(places[len(mine[0]):], mine[1])), iter(mine[0])
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
    with pytest.raises(UserError, match="pubmedqa.*give --docs.*official test set"):
        load_docs(TASKS["pubmedqa"], "test")


def test_search_is_never_what_is_reported(tmp_path, monkeypatch):
    """A search that sees the reported documents reports more than it found."""
    import datasets
    sizes, asked = {"train": 900, "validation": 60, "test": 40, "train+validation": 960}, []
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, split: asked.append(
        (*name, split)) or [{**ARC, **BOOLQ, **CODE, "question": f"{split} {i}", "prompt": f"{i}",
                             "answer": "#### 1"} for i in range(sizes[split])])
    search, report, notes = split_docs(TASKS["boolq"])  # the harness scores validation
    assert {doc["question"].split()[0] for doc in search} == {"train"} and len(search) == 500
    assert len(report) == 60 and report[7]["question"] == "validation 7"
    assert asked == [("aps/super_glue", "boolq", split) for split in ("train", "validation")]
    assert search == split_docs(TASKS["boolq"])[0] != split_docs(TASKS["boolq"], seed=1)[0]
    order = [int(doc["question"].split()[1]) for doc in search]
    assert order == sorted(order)
    search, report, notes = split_docs(TASKS["ArcE"])
    assert (len(search), len(report)) == (60, 40) and "1.7 points" in notes[1]
    search, report, notes = split_docs(TASKS["HE"], size=15)
    assert (len(search), len(report)) == (15, 20)
    assert not {doc["prompt"] for doc in search} & {doc["prompt"] for doc in report}
    docs = [dict(BOOLQ, question=str(i)) for i in range(300)]       # 50 are in both files
    one = write_rows(tmp_path / "1.jsonl", docs[:200])
    two = write_rows(tmp_path / "2.jsonl", docs[150:])
    search, report, notes = split_docs(TASKS["boolq"], one, two)
    assert search == docs[:150] and len(report) == 150 and "50" in notes[1]
    with pytest.raises(UserError, match="also reported"):
        split_docs(TASKS["boolq"], one, one)
    for name, size in (("boolq", 60), ("HE", 40)):      # as the paper may be read, for comparison
        search, report, notes = split_docs(TASKS[name], paper_splits=True)
        assert search == report and len(report) == size and "leaks" in notes[0]
    for name in ("ArcE", "gsm8k"):                      # the paper's reading of these has no leak
        assert split_docs(TASKS[name], paper_splits=True) == split_docs(TASKS[name])


def test_shots():
    """The harness's draws from their own generator; no document is its own example."""
    pool = [dict(GSM8K, question=str(i)) for i in range(6)]
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
    assert draw_shots(TASKS["mbpp"], [{}], 2, pool) == [pool[1:3]]
    for name, k in (("HE", 1), ("mbpp", 6), ("gsm8k", 7)):
        with pytest.raises(UserError, match="shots cannot"):
            draw_shots(TASKS[name], pool, k, [] if name == "HE" else pool)
    unsolved = dict(MATHQA, options="a ) 1 , b ) 2 ")       # the fifth option is right
    with pytest.raises(UserError, match="cannot be a shot"):
        TASKS["MathQA"].requests(MATHQA, [unsolved])


# ------------------------------------------------------------------------------------------------
# eval.py: generated programs

HOSTILE = {
    "fork bomb": "import posix\nwhile True:\n    try: posix.fork()\n    except OSError: pass",
    "deaf": "import signal\nfor i in range(1, 65):\n    try: signal.signal(i, signal.SIG_IGN)\n"
            "    except (OSError, ValueError): pass\nwhile True: pass",
    "10 GB, bit by bit": "x = []\nwhile True: x.append(bytearray(2**26))",
    "1 GB printed": "for _ in range(1024): print('x' * 2**20)",
    "1 GB file": "with open('big', 'wb') as file:\n"
                 "    for _ in range(1024): file.write(bytes(2**20))",
    "kill parent": "import os; os.kill(os.getppid(), 9)",
    "kill parent, really": "import posix; posix.kill(posix.getppid(), 9)",
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
    pytest.param(kind, *case.values, marks=case.marks)
    for case in fast(HOSTILE, "kill all, really", "exit, really")
    for kind in (evaluation.NAMESPACES, evaluation.OTHER_USER)
    if kind == evaluation.NAMESPACES or case.values[0] not in OPEN_TO_OTHER_USER],
    indirect=["kind"])
def test_hostile_program(tmp_path, monkeypatch, name, kind):
    """Without it a program that a model wrote harms the machine, or counts as a right answer."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "secret").write_text("secret")
    (home / "secret").chmod(0o600 if kind == evaluation.OTHER_USER else 0o644)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PLANTED", "1")
    bystander, (reader, writer) = subprocess.Popen(["sleep", "60"]), os.pipe()
    high = os.dup2(writer, 200)
    with (tempfile.TemporaryDirectory(dir=ROOT) as folder,
          socket.create_server(("127.0.0.1", 0)) as server,
          socket.create_server(str(home / "daemon"), family=socket.AF_UNIX)):
        planted = Path(folder, "planted")
        planted.write_text("precious")
        for path, mode in ((home / "daemon", 0o777), (planted, 0o666), (Path(folder), 0o777)):
            path.chmod(mode)            # nothing but the fence protects them
        program = HOSTILE[name].format(
            folder=folder, home=str(home), fd=high, bystander=bystander.pid,
            port=server.getsockname()[1], other=0 if os.getuid() == 0 else os.getuid() + 1)
        try:
            endless = name in ("fork bomb", "deaf")
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
def test_fence_keeps_what_programs_need(kind, tmp_path):
    """Right answers would fail, verdicts change from run to run, detached processes run on."""
    program = """
import decimal, json.tool, multiprocessing, os, posix, time
for path in ("x", os.path.expanduser("~/z"), os.devnull): open(path, "w").write("y")
assert open("x").read() == "y" and __name__ == "builtins"
print("hello")
x = '\\ud800'
for _ in range(3):
    if posix.fork() == 0:
        try: os.setsid()
        except OSError: pass
        if posix.fork(): posix._exit(0)
        time.sleep(300)
time.sleep(0.2)
"""
    assert run_program(program, 60.0, kind).passed and not fenced_processes(tmp_path)
    assert not run_program("x = '\ud800'", 30.0, kind).passed
    if kind == evaluation.NAMESPACES:
        assert run_program("import numpy; assert numpy.ones(3).sum() == 3", 30.0, kind).passed
    drawn = [run_program("raise Exception(hash('a'))", 30.0, kind).reason for _ in range(2)]
    assert drawn[0] == drawn[1] and "Exception: " in drawn[0]


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


@linux
def test_code_scores():
    """A model's programs would run without leave, or other programs than the harness runs."""
    doc = {"prompt": "def f():\n", "test": "def check(f): assert f() == 1", "entry_point": "f"}
    humaneval, mbpp, shot = TASKS["HE"], TASKS["mbpp"], dict(
        text="Return 2.", code="def g():\n    return 2", test_list=["assert g() == 2"] * 3)
    for task, item in ((humaneval, doc), (mbpp, shot)):
        with pytest.raises(UserError, match="--allow-code-execution"):
            task.score(item, ["    return 1"])
    text = "    return 1\n\nprint(f())"
    assert humaneval.score(doc, [text], allow_code=True) == {"pass@1": 1.0}
    assert humaneval.score(doc, ["    return 2"], allow_code=True) == {"pass@1": 0.0}
    text = shot["code"] + "\n[DONE] x"
    assert mbpp.score(shot, [text], allow_code=True) == {"pass_at_1": 1.0}


# ------------------------------------------------------------------------------------------------
# replace.py: Algorithm 1 on tables of scores

def table_search(table, num_layers, **kwargs):
    """Algorithm 1 on table(sorted layers) -> P."""
    return replace.greedy(lambda sets: [table(tuple(sorted(layers))) for layers in sets],
                          num_layers, **kwargs)


def brute_force(table, num_layers, p_min, run_all=True):
    """Algorithm 1 written again from the paper's page, for exact scores."""
    model, best, opt, p_best, order = [], [], [], table(()), []
    while len(model) < num_layers:
        p_star, l_star = -1, None
        for layer in range(num_layers):
            if layer not in model and table(tuple(sorted(model + [layer]))) > p_star:
                p_star, l_star = table(tuple(sorted(model + [layer]))), layer
        stopped, model = opt != model, model + [l_star]
        order.append((l_star, p_star))
        if not stopped and p_star >= p_best:
            best, p_best = model, p_star
        if not stopped and p_star >= p_min:
            opt = model
        elif not run_all:
            break
    return order, best, opt


def test_greedy_equals_a_brute_force():
    """Without it, a tie, a stop or M_best could be wrong: small integer scores tie often. Brute
    force and search could share a misreading, or compare 0.95 * 0.6 by its last bits."""
    for seed, run_all in itertools.product(range(60), (False, True)):
        rng = random.Random(seed)
        num_layers = rng.randint(1, 6)
        table = {layers: rng.randint(10, 20) - size // 2 for size in range(num_layers + 1)
                 for layers in itertools.combinations(range(num_layers), size)}.get
        search = table_search(table, num_layers, max_drop=0.2, run_all=run_all)
        assert brute_force(table, num_layers, 0.8 * table(()), run_all) == (
            [(step.layer, step.score) for step in search.steps], list(search.best),
            list(search.opt))
    scores = {(): 0.80, (0,): 0.70, (1,): 0.80, (2,): 0.80, (0, 1): 0.79, (1, 2): 0.78,
              (0, 1, 2): 0.50}
    search = table_search(scores.get, 3, max_drop=0.05)
    assert [step.layer for step in search.steps] == [1, 0, 2]   # the tie of 1 and 2: lowest index
    assert search.best == (1,)                                  # >= prefers more linear layers
    assert search.opt == (1, 0) and search.p_min == pytest.approx(0.76)
    scores[0, 1, 2] = 0.85                                      # a step below P_min may be M_best
    for run_all, steps in ((False, 1), (True, 3)):
        search = table_search(scores.get, 3, p_min=0.9, run_all=run_all)
        assert search.opt == () and search.best == (1,) and len(search.steps) == steps
    third = {(): 1 / 3, (0,): 1 / 3, (1,): 0.1 + 0.2 + 1 / 30, (0, 1): 0.0}
    assert third[0,] != third[1,] and table_search(third.get, 2).best == (0,)
    assert table_search({(): 0.6, (0,): 0.95 * 0.6}.get, 1, max_drop=0.05).opt == (0,)


# ------------------------------------------------------------------------------------------------
# replace.py: the search on a model

def result_of(path):
    """(result.json without its cost, the cost)."""
    result = json.loads((path / "result.json").read_text())
    return {k: v for k, v in result.items() if k != "cost"}, result["cost"]


def journal_of(path):
    """The journal's evaluations, without their seconds."""
    rows = [json.loads(line) for line in (path / "search.jsonl").read_text().splitlines()[1:]]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def naive_accuracy(model, tokenizer, path):
    """Accuracy from scratch."""
    hits = []
    for item in map(json.loads, Path(path).read_text().splitlines()):
        first = len(tokenizer.encode(item["context"]))
        scores = [log_likelihood(model, tokenizer.encode(item["context"] + " " + choice), first)
                  for choice in item["choices"]]
        hits.append(scores.index(max(scores)) == item["gold"])
    return sum(hits) / len(hits)


@pytest.fixture(scope="session")
def searched(lab, runs):
    """A finished search through all layers."""
    run_main(replace_command(lab, runs["gdn"], lab / "searched", all=True))
    return lab / "searched"


def test_search_equals_a_brute_force_from_scratch(lab, runs, searched):
    """result.json, the margins to the runner-up or the saved models could differ from what
    Algorithm 1 finds."""
    (result, cost), rows = result_of(searched), journal_of(searched)
    model, tokenizer = load_lab_model(lab)
    mixers = evaluation.load_blocks(str(runs["gdn"]), model)

    @functools.cache
    def table(layers):
        with replace.replaced(model, mixers, layers):
            return naive_accuracy(model, tokenizer, lab / "val.jsonl")

    order, best, opt = brute_force(table, 4, 0.95 * result["p_base"] - 1e-9)
    assert list(zip(result["order"], result["validation"])) == order
    assert result["best"]["layers"] == sorted(best) and result["opt"]["layers"] == sorted(opt)
    for name in ("best", "opt"):
        hybrid, _ = evaluation.load_model(str(searched / name))
        assert linear_attn.linear_layers(hybrid) == result[name]["layers"]
        scores = [naive_accuracy(hybrid, tokenizer, lab / f"{file}.jsonl")
                  for file in ("val", "test")]
        assert scores == [result[name]["validation"], result[name]["test"]]
        assert result[name]["gap"] == scores[0] - scores[1]
    assert len({(row["split"], *row["layers"]) for row in rows}) == len(rows)
    items = {tuple(row["layers"]): torch.tensor(row["items"]) for row in rows
             if row["split"] == "validation"}
    assert len(items) == 11 == cost["evaluations"]
    for k, step in enumerate(result["steps"]):
        rivals = {layer: items[tuple(sorted((*result["order"][:k], layer)))]
                  for layer in result["order"][k:]}
        chosen = rivals.pop(step["layer"])
        assert step["ties"] == sum(rival.sum() == chosen.sum() for rival in rivals.values())
        if rivals:
            runner_up = rivals[step["runner_up"]]
            assert runner_up.sum() == max(rival.sum() for rival in rivals.values())
            gaps, found = chosen - runner_up, (step["difference"], step["difference_stderr"])
            assert found == pytest.approx((gaps.mean().item(), gaps.std().item() / 24 ** 0.5))
            assert step["flipped"] == gaps.count_nonzero()


@pytest.mark.slow
@pytest.mark.parametrize("phase", (1, 2, "fine-tuning"))
def test_kill_9_changes_nothing(phase, lab, runs, tmp_path):
    """Work would be lost, or the result be another one, after kills in the middle of the work."""
    words = {1: lambda out: distill_command(lab, out, attn="jet", tokens=12800, resume=True),
             2: lambda out: replace_command(lab, runs["gdn"], out, all=True),
             "fine-tuning": lambda out: finetune_command(lab, lab / "model", out, epochs=30)}[phase]
    whole, killed, codes = tmp_path / "whole", tmp_path / "killed", []
    run_main(words(whole))
    done = lambda path: sum(file.stat().st_size for file in path.glob("*.jsonl"))
    for share in (0.3, 0.7):
        process = start(words(killed))
        while done(killed) < share * done(whole):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        codes.append(process.wait())
    assert -signal.SIGKILL in codes
    run_main(words(killed))
    if phase == 2:
        assert result_of(whole)[0] == result_of(killed)[0]
        assert journal_of(whole) == journal_of(killed)
        return
    assert log_rows(whole) == log_rows(killed) and not list(killed.glob("*checkpoint*"))
    if phase == 1:
        assert distill.read_run(whole)["held_out"] == distill.read_run(killed)["held_out"]
        assert_same_layers(whole, killed)
    else:
        assert_same(*(out / "model" / "model.safetensors" for out in (whole, killed)))


def test_journal_cut_at_any_byte_is_taken_up(lab, runs, searched, tmp_path, script):
    """Without it, a line that a kill cut off could end every later run."""
    journal = (searched / "search.jsonl").read_bytes()
    for cut in (0, *random.Random(0).sample(range(len(journal)), 3)):
        (tmp_path / "search.jsonl").write_bytes(journal[:cut])
        script(replace_command(lab, runs["gdn"], tmp_path, all=True))
        assert result_of(tmp_path)[0] == result_of(searched)[0]


def test_a_given_set_is_scored_and_saved(lab, runs, tmp_path, script):
    """Without it, --layers could search, or stop at P_min, or refuse the journal of a search."""
    script(replace_command(lab, runs["jet"], tmp_path, budget=1))
    result, _ = script(replace_command(lab, runs["jet"], tmp_path, layers="0,2-3", p_min=1))
    assert result["opt"]["layers"] == result["best"]["layers"] == result["order"] == [0, 2, 3]
    hybrid, tokenizer = evaluation.load_model(str(tmp_path / "opt"))
    assert result["opt"]["test"] == pytest.approx(
        naive_accuracy(hybrid, tokenizer, lab / "test.jsonl"))
    assert result["cost"]["evaluations"] == 2 and result["next"].startswith("python eval.py")


def test_a_bf16_base_gives_a_bf16_hybrid_with_a_card(lab, runs, tmp_path, monkeypatch, script):
    """A CPU would save fp32 numbers that were never scored; the card would lack what users need."""
    base, opt, warned = tmp_path / "base", tmp_path / "out" / "opt", []
    model, tokenizer = load_lab_model(lab)
    model.bfloat16().save_pretrained(base)
    tokenizer.save_pretrained(base)
    words = replace_command(lab, runs["jet"], tmp_path / "out", model=base, layers="1-2")
    result, _ = script(words)
    monkeypatch.setattr(transformers.configuration_utils.logger, "warning", warned.append)
    assert {t.dtype for t in load_file(opt / "model.safetensors").values()} == {torch.bfloat16}
    scores, _ = script(command("eval.py", model=opt, task=lab / "test.jsonl"))
    assert scores["results"][0]["value"] == result["opt"]["test"] and not warned
    card = (opt / "README.md").read_text()
    for text in (f"Layers [1, 2] of `{base}`", "(n = 24)", "(n = 16)", "2601.11667",
                 f"| {result['opt']['test']:.4f} +- ", f"{result['test_base']:.4f} +- ",
                 "python distill.py --model", " ".join(map(str, words)), "trust_remote_code=True",
                 transformers.__version__, "corpus.jsonl (4,096 tokens)", "continuous batching"):
        assert text in card, text


@pytest.mark.slow
def test_a_full_disk_loses_nothing(lab, runs, tmp_path, script):
    """Without it, files that may not grow past a limit would end in a traceback or half a file."""
    resource = importlib.import_module("resource")
    words = distill_command(lab, tmp_path / "run", attn="gdn", resume=True)
    process = start(words, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (100_000, 100_000)))
    _, err = process.communicate()
    assert process.returncode == 1 and "Traceback" not in err, err
    assert not [path for path in (tmp_path / "run").iterdir() if path.suffix == ".tmp"]
    script(words)
    assert_same_layers(tmp_path / "run", runs["gdn"])


# ------------------------------------------------------------------------------------------------
# The cheap search: what candidates share is run once, and nothing changes by a bit

SEARCHED = {        # what differs; Gemma 3 has two kinds of masks, Falcon's layers return tuples
    "Llama": dict(num_hidden_layers=5), "Qwen2": {}, "GPT2": dict(num_hidden_layers=6),
    "GPTNeoX": {}, "Gemma3Text": dict(
        head_dim=16, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2),
    "Falcon": {}}


OWN_LINEAR = {      # families with linear layers of their own, beside or within softmax layers
    "Qwen3Next": dict(EXPERTS, num_hidden_layers=4, head_dim=8, linear_num_value_heads=4,
                      linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8),
    "FalconH1": dict(head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8,
                     mamba_chunk_size=8)}


LONGROPE = dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=25,
                short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 3.0, 4.0, 5.0])
TABLES = {      # families that have no positions past 50, or others there
    "GPT2": {}, "OPT": {}, "GPTNeo": dict(                  # the keys have a table of their own
        num_hidden_layers=2, window_size=8, attention_types=[[["global", "local"], 1]]),
    "GPTJ": dict(rotary_dim=4), "CodeGen": dict(rotary_dim=4), "GPTBigCode": {}, "Mpt": {},
    "Llama, longrope": dict(rope_parameters=LONGROPE), "Llama, dynamic": dict(
        rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0))}


def demo_words(rng, n):
    return " ".join(f"t{rng.randrange(2, 64)}" for _ in range(n))


def search_split(model, kind, batch_size):
    """Items whose contexts and choices differ in length."""
    rng = random.Random(1)
    if kind == "generate":
        task, docs = GENERATE_FILE, [{"prompt": demo_words(rng, rng.randint(3, 9)), "answer": "t1",
                                      "stop": ["t7"], "max_tokens": 4} for _ in range(7)]
    else:
        longest = 1 if kind == "single" else 4
        task, docs = CHOICE_FILE, [
            {"context": demo_words(rng, rng.randint(3, 9)), "gold": rng.randrange(3),
             "choices": [demo_words(rng, rng.randint(1, longest)) for _ in range(3)]}
            for _ in range(11)]
    return evaluation.Prepared(task, docs, model, distill.demo_tokenizer(), batch_size,
                               whole=kind == "whole")


@torch.no_grad()
def assert_as_one_by_one(outputs, model, split):
    """`outputs` are those of one request after the other, without batches or a cache."""
    for found, numbers in zip(outputs, split.of_doc):
        for output, request in zip(found, map(split.requests.__getitem__, numbers)):
            ids, first = list(request.tokens), len(request.tokens) - request.scored
            if request.scored:
                assert output == pytest.approx(log_likelihood(model, ids, first), abs=1e-4)
                continue
            for _ in range(request.max_new):
                logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
                ids.append(logits.argmax().item())
            wanted = split.tokenizer.decode(ids[first:])
            assert output.split("t7")[0] == wanted.split("t7")[0]


@pytest.mark.parametrize("family", fast(TABLES, "GPT2", "Llama, longrope"))
def test_padding_reaches_no_further_than_the_positions(family):
    """Padding past a table of positions crashes; past longrope's border it changes every score."""
    limit, rng, tokenizer = 50, random.Random(0), distill.demo_tokenizer()
    model = random_model(small(family, max_position_embeddings=limit, **TABLES[family]), scale=2.0)
    sizes = ((limit - 1, 2), (3, limit - 4), (limit - 9, 9), (20, 7), (5, 3), (25, 25))
    docs = [{"context": demo_words(rng, n), "gold": 0,
             "choices": [demo_words(rng, m) for m in (m, m - 1, 1)]} for n, m in sizes]
    prompts = [{"prompt": demo_words(rng, n - 1), "answer": "", "max_tokens": m} for n, m in sizes]
    texts = []
    for size in (1, 3, 32):
        split = evaluation.Prepared(CHOICE_FILE, docs, model, tokenizer, size)
        assert_as_one_by_one(evaluation.evaluate(model, split).outputs, model, split)
        split = evaluation.Prepared(GENERATE_FILE, prompts, model, tokenizer, size)
        texts.append(evaluation.evaluate(model, split).outputs)
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("family", OWN_LINEAR)
def test_base_models_with_linear_layers_of_their_own(family, lab, tmp_path, script):
    """Their states would be forked wrongly in scoring, or their layers converted."""
    model = random_model(small(family, **OWN_LINEAR[family]))
    split = search_split(model, "choices", 4)
    assert_as_one_by_one(evaluation.evaluate(model, split).outputs, model, split)
    model.save_pretrained(tmp_path / "model")
    split.tokenizer.save_pretrained(tmp_path / "model")
    result, _ = script(command("eval.py", model=tmp_path / "model", task=lab / "val.jsonl"))
    assert result["linear_layers"] == []
    script(distill_command(lab, tmp_path / "out", model=tmp_path / "model"), 2,
           "cannot be converted")
    assert not (tmp_path / "out").exists()


def search_case(family, attn, kind, batch_size):
    """A random model, its mixers, and a split."""
    config = small(family, **{"num_hidden_layers": 4, **SEARCHED[family]})
    model = random_model(config, scale=2.0)
    init = "random" if family == "Falcon" else "inherit"    # its fused layout is not known
    return model, shaken_mixers(model, attn, init), search_split(model, kind, batch_size)


def tokens_through(modules, function):
    """(what function() returns, the number of tokens that passed through `modules` meanwhile)."""
    def count(module, args, kwargs):
        counts.append((args[0] if args else kwargs["hidden_states"]).shape[:2].numel())
    counts, hooks = [], [m.register_forward_pre_hook(count, with_kwargs=True) for m in modules]
    result = function()
    for hook in hooks:
        hook.remove()
    return result, sum(counts)


@pytest.mark.parametrize("kind", ("choices", "single", "generate", "whole"))
@pytest.mark.parametrize("family", fast(SEARCHED, "Llama"))
def test_every_way_gives_the_same(family, kind):
    """A score would depend on batches, shared layers or contexts; or its cost would be wrong."""
    attn = list(MIXERS)[(list(SEARCHED).index(family) + len(kind)) % 3]
    model, mixers, _ = search_case(family, attn, kind, 1)
    modules, num_layers = (*attention_modules(model), *mixers.values()), len(mixers)
    for batch_size, linear in ((1, (0, 1)), (4, ()), (32, (0,))):
        split = search_split(model, kind, batch_size)
        assert evaluation.layers_can_be_shared(model, split, mixers)
        full = [layer for layer in mixers if layer not in linear]
        sets, found = [tuple(sorted((*linear, layer))) for layer in full], []
        for plain in (False, True):
            cost = replace.collections.Counter()
            scores, counted = tokens_through(modules, lambda: evaluation.evaluate_hybrids(
                model, split, mixers, sets, plain=plain, cost=cost))
            found.append(([score.outputs for score in scores], counted, cost))
        (shared, few, cheap), (plain, many, dear) = found
        assert shared == plain and cheap["plain"] == dear["plain"] == dear["layer_tokens"]
        assert dear["layer_tokens"] > cheap["layer_tokens"]
        layers_run = max(full) + sum(num_layers - layer for layer in full)
        assert few < many if kind == "generate" else (
            few * dear["layer_tokens"] == many * cheap["layer_tokens"]
            and cheap["layer_tokens"] * len(full) * num_layers == cheap["plain"] * layers_run)
        with replace.replaced(model, mixers, sets[0]):
            assert_as_one_by_one(shared[0], model, split)
        assert len({str(outputs) for outputs in shared}) == len(sets) or kind == "generate"
        assert not any("forward" in layer.__dict__ for layer in linear_attn.decoder_layers(model))


def test_a_model_that_cannot_share_is_run_plainly():
    """Layers that hand something past the hidden states to those above are found out."""
    model, mixers, split = search_case("Llama", "gdn", "choices", 4)
    layers, passed = linear_attn.decoder_layers(model), {}
    mixers[4].o_proj.weight.data.fill_(math.nan)        # a fault of its own, reported as such
    assert evaluation.layers_can_be_shared(model, split, mixers)
    with pytest.raises(FloatingPointError, match=r"layers \[4\]"):
        evaluation.evaluate_hybrids(model, split, mixers, [(0,), (4,)])
    mixers[4].o_proj.weight.data.fill_(0.1)
    layers[0].self_attn.register_forward_hook(lambda m, a, out: passed.update(inner=out[0].mean()))
    layers[4].register_forward_hook(lambda m, a, out: out + passed.pop("inner", 0.0))
    assert not evaluation.layers_can_be_shared(model, split, mixers)


def test_benchmark_of_both_phases(script):
    """Without it, the hours on a GPU could be out of proportion, or the FLOPs miscounted."""
    result, errors = script(["replace.py", "--benchmark", "--device", "cpu", "--limit", "2"])
    search, distillation = result["search"], result["distillation"]
    assert "tokens per second" in errors
    assert search["evaluations"] == 11 and search["items"] == 2
    assert search["plain_layer_tokens"] == 11 * 4 * 2 * 40 > search["layer_tokens"]
    # the FLOPs of a token by hand, in chunks of 64: q, k, v, o and the scores; MLP; a student
    attention, mlp = 2 * 3 * 64 * 64 + 2 * 64 * 64, 2 * 3 * 64 * 128
    student = 2 * (5 * 64 * 64 + 2 * 4 * 64 + 8 * 64 + 4 * 64 * 8) + 7 * 4 * 16 * 16
    assert distillation["flops_per_second"] / distillation["tokens_per_second"] == pytest.approx(
        4 * attention + 3 * mlp + 3 * 4 * student)
    assert search["flops_per_second"] == search["flops"] / search["seconds"]
    assert search["hours"] == pytest.approx(search["seconds"] * 500 / 2 / 3600)
    assert distillation["hours"] == pytest.approx(1e8 / distillation["tokens_per_second"] / 3600)
    script(["replace.py", "--benchmark", "--model", "m"], 2, "its own model")


@pytest.mark.parametrize("family", ("Llama", "GPT2", "Qwen3"))
def test_flops_are_those_that_torch_counts(family):
    """The formula could miss a matrix: torch counts whole squares of scores, and linear layers."""
    model, (B, T) = random_model(small(family, attn_implementation="eager")), (2, 32)
    flops = functools.partial(evaluation.forward_flops, config=model.config, tokens=B * T)
    with FlopCounterMode(display=False) as counter:
        model.get_decoder()(tokens(B, T), use_cache=False)
    layers = linear_attn.decoder_layers(model)
    assert counter.get_total_flops() == sum(
        flops(layer, squares=2 * B * T * T) for layer in layers)
    for attn, per_state in (("gla", 5), ("gdn", 7), ("jet", 7)):
        mixer = shaken_mixers(model, attn)[0]
        with FlopCounterMode(display=False) as counter:
            mixer(torch.randn(B, T, 32))
        counts = counter.get_flop_counts()["Global"]        # the projections alone: bmm is chunks'
        matrices = counts[torch.ops.aten.mm] + counts[torch.ops.aten.addmm]
        taps = 2 * mixer.conv_kernel.numel() if attn == "gdn" else 0
        assert flops(mixer, squares=0) == matrices + B * T * (
            taps + per_state * mixer.num_heads * mixer.head_dim ** 2)


def test_a_dry_run_says_what_a_run_records(lab, runs, searched, tmp_path, script):
    """A plan could promise other costs than a run has, need the weights, or write something."""
    model = shutil.copytree(lab / "model", tmp_path / "model",
                            ignore=lambda *_: ["model.safetensors"])
    for attn in MIXERS:
        plan, _ = script(distill_command(lab, tmp_path / "d", model=model, attn=attn, dry_run=True))
        cost = distill.read_run(runs[attn])["cost"]
        assert [plan[key] for key in ("tokens", "flops", "hours")] == [
            cost["tokens"], cost["flops"], None]
        assert (plan["steps"], cost["device"], cost["gpu_hours"]) == (32, "cpu", None)
    for number, flags in enumerate((dict(order="uniform"), dict(order="local", budget=2),
                                    dict(plain=True), dict(layers="1,2"))):
        words = replace_command(lab, runs["jet"], tmp_path / str(number), all=True, **flags)
        plan, _ = script([*words, "--dry-run", "--model", model])
        cost = script(words)[0]["cost"]
        for key in ("evaluations", "tokens", "flops"):
            assert plan[key] == cost[key], (flags, key)
    plan, _ = script(replace_command(lab, tmp_path, tmp_path / "r", model=model, dry_run=True))
    cost = result_of(searched)[1]        # with shared layers the plan is a bound
    assert plan["evaluations"] == cost["evaluations"] and plan["flops"] >= cost["flops"]
    assert not (tmp_path / "d").exists() and not (tmp_path / "r").exists()


def test_a_dry_run_says_what_does_not_fit(lab, runs, tmp_path, script):
    """A run that needs more memory than there is would be found out only when it runs."""
    for rate in (2, 200):
        plan, err = script(distill_command(lab, tmp_path / "d", dry_run=rate, tokens=10**12,
                                           batch_size=10**10))
        assert plan["hours"] == pytest.approx(plan["flops"] / rate / 3.6e15)
        assert not plan["fits"] and "this will not fit: it needs" in err
    weights, student = (sum(t.numel() for t in load_file(path).values()) for path in (
        lab / "model/model.safetensors", distill.layer_file(runs["gdn"], 0)))
    assert plan["bytes"]["model"] == 4 * weights
    assert plan["bytes"]["mixers"] == 4 * student * 12 + student * 4    # gradients of one
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{")
    for flags in (dict(model=tmp_path / "model"), dict(model=tmp_path / "none")):
        for words in (distill_command(lab, tmp_path / "d", dry_run=True, **flags),
                      replace_command(lab, tmp_path, tmp_path / "r", dry_run=True, **flags)):
            script(words, 2, "no such model")
    script(["replace.py", "--dry-run"], 2, "--dry-run needs a --model and a --task")


@pytest.mark.slow
def test_slower_ways_find_the_same(lab, runs, tmp_path, script):
    """--plain or --whole would give another result.json than the fast way."""
    found = []
    for way in (dict(whole=True), dict(plain=True), {}):
        out = tmp_path / str(len(found))
        script(replace_command(lab, runs["gla"], out, all=True, limit=9, **way))
        found.append(result_of(out))
    (whole, _), (plain, dear), (shared, cost) = found
    assert shared == plain and cost["layer_tokens"] < dear["layer_tokens"]
    assert cost["saved"] == pytest.approx(1 - cost["layer_tokens"] / dear["layer_tokens"])
    for key in ("order", "validation", "best", "opt", "test_base"):
        assert shared[key] == whole[key], key


# ------------------------------------------------------------------------------------------------
# The other strategies

def test_strategies_on_one_journal(lab, runs, tmp_path, script):
    """Without it, a strategy could take another order than its own, or score a set again."""
    def run(**flags):
        result, err = script(replace_command(lab, runs["gdn"], tmp_path, all=True, **flags))
        scores = {(row["split"], *row["layers"]): row["score"] for row in journal_of(tmp_path)}
        assert len(scores) == len(journal_of(tmp_path))
        return result, scores, err

    impact, _, err = run(order="impact")
    assert impact["spearman"] is None and "it needs a search with --order greedy" in err
    greedy, scores, _ = run()
    alone = [scores["validation", layer] for layer in range(4)]
    local, _, _ = run(order="local")
    assert local["order"] == sorted(range(4), key=lambda layer: (-alone[layer], layer))
    assert local["cost"]["evaluations"] == 1 + 4 + 3        # one set of one layer serves twice
    assert run(order="random", order_seed=3)[0]["order"] == random.Random(3).sample(range(4), 4)
    even, scores, _ = run(order="uniform")
    assert even["sets"] == [[2], [1, 3], [0, 2, 3], [0, 1, 2, 3]] and even["order"] == []
    again, _, err = run(order="impact")
    ranks = {layer: impact["impact"][str(layer)]["impact"] for layer in range(4)}
    assert again["impact"] == impact["impact"] and again["order"] == impact["order"] == sorted(
        ranks, key=lambda layer: (ranks[layer], layer))
    assert again["spearman"] == replace.spearman([ranks[layer] for layer in greedy["order"]],
                                                 range(4)) and "Spearman" in err
    short, now, _ = run(budget=2)
    assert short["order"] == greedy["order"][:2] and len(now) <= len(scores) + 3    # test scores


def test_linear_probes():
    """Without it, the solver could stop early, or a constant channel could drown the others."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0),
                             dtype=torch.float64)
    labels, fit, rest = torch.arange(90) % 3, slice(45), slice(45, 90)
    states = F.one_hot(labels, 3).double() @ draw(3, 8) + 0.1 * draw(90, 8)
    probe = replace.fit_probe(states[fit], labels[fit], 3)
    assert torch.equal(probe(states[rest]).argmax(-1), labels[rest])
    mean, spread = states[fit].mean(0), states[fit].std(0, correction=0)
    weight = probe(mean + spread.diag()) - probe(mean)                          # [8, 3]
    errors = probe(states[fit]).softmax(-1) - F.one_hot(labels[fit], 3)
    gradient = ((states[fit] - mean) / spread).T @ errors + weight              # of loss and L2
    assert gradient.abs().max() < 1e-5 and errors.sum(0).abs().max() < 1e-5
    constant = torch.cat([states, torch.full((90, 2), 0.3, dtype=torch.float64)], 1)
    probe = replace.fit_probe(constant[fit], labels[fit], 3)
    constant[:, 8] += 1e-6
    assert torch.equal(probe(constant[rest]).argmax(-1), labels[rest])
    assert replace.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert replace.spearman([1, 2, 2, 4], [4, 3, 2, 1]) == pytest.approx(-0.9486832980505138)
    assert replace.spearman([1, 1], [1, 2]) is None


def test_impact_scores(lab, monkeypatch):
    """The probes could read other states than a prompt's mean attention output."""
    model, split = prepared(lab, "val", batch_size=5)
    mixers, seen = distill.make_mixers(model, "gdn", [0, 1, 2, 3], "inherit", 0), []
    pooled = replace.pooled_outputs(model, mixers, split)
    ids = torch.tensor([split.tokenizer.encode(split.docs[7]["context"])])
    distill.teacher_forward(model, ids, [2], lambda layer, hidden_states, full: seen.extend(
        (full.mean(1), mixers[2](hidden_states)[0].mean(1))))
    for states, expected in zip(pooled[2], seen):
        assert relative(states[7].float(), expected[0].detach()) < 1e-5
    monkeypatch.setattr(replace, "pooled_outputs", lambda *args: {
        layer: (full, full) for layer, (full, _) in pooled.items()})
    assert all(s["impact"] == 0 for s in replace.impact_scores(model, mixers, split, 0).values())
    split.docs = split.docs[:3]
    with pytest.raises(UserError, match="at least 4 documents"):
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


def report(folder, script):
    """Run --report -> (its tables, the last stdout line, stderr)."""
    last, err = script(["replace.py", "--report", folder])
    return json.loads((folder / "report.json").read_text())["tables"], last, err


def test_report_of_known_results(tmp_path, script):
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
            {"context": 2048, "asked": asked, "linear_layers": k, "tokens_per_second": rate}
            for k, asked, rate in ((0, 8, 10), (0, 1, 7), (2, 8, 12), (2, 1, 7), (3, 1, 7))]})
    for mixer, k in ((None, 0), ("jet", 1), ("jet", 2)):
        write_record(tmp_path / f"f{k}/finetune.json", {
            "base_model": "m", "mixer": mixer, "linear_layers": list(range(k)), "task": "PM",
            "seed": 0, "metric": "acc", "split": "test", "before": {"score": 0.5},
            "after": {"score": 0.6 + k / 10, "stderr": 0.1, "n": 10}})
    tables, last, _ = report(tmp_path, script)
    assert tables["Table 1, Llama-3.2-3B-Instruct"]["pubmedqa"]["jet"] == pytest.approx({
        "paper": 73, "ours": 85, "difference": 12, "n": 10, "stderr": 10, "runs": 2,
        "spread": 50 ** 0.5})
    found = {column: entry for name, table in tables.items() for row, columns in table.items()
             if "Table 1" not in name and "jet" in name for column, entry in columns.items()
             if entry["ours"] is not None}
    assert {column: entry["ours"] for column, entry in found.items()} == {
        "base": 80, "M_opt": 70, "drop, %": pytest.approx(12.5), "layers": 2,
        "speed-up at 2,048": 1.2, "device": "cuda:0", "distillation": 2, "M tokens": 5, "search": 3,
        "evaluations": 7, "greedy": 90, "greedy layers": "2; 0", "impact": 90, "impact layers": "0"}
    paper = json.loads(replace.PAPER.read_text())["tables"]
    drawn = list(replace.figures(replace.read_results(tmp_path), paper))
    titles, lines = ({figure[0]: figure[i] for figure in drawn} for i in (2, 3))
    assert lines[5]["jet, after"] == [{1: 70, 2: 80}] and lines[5]["base, before"] == [{0: 50}]
    assert lines[6] == {f"{tmp_path}/blocks": [{1: 2, 2: 0, 3: 1}]} and "man -0.5" in titles[6]
    assert lines[4]["greedy"] == 2 * [{0: 80, 1: 80, 2: 75, 3: 40}] and "jet-gla" in titles[3]
    row = "\n| pubmedqa | 10 | 69.8 / 80 ± 10 / +10 | 72.2 / 90 ± 10 / +18 | 7 / 1 / -6 | 72 / not"
    assert row in (tmp_path / "report.md").read_text()
    assert all((tmp_path / path).read_bytes()[1:4] == b"PNG"
               for paths in last["figures"].values() for path in paths)


def test_report_of_missing_results(tmp_path, monkeypatch, script):
    """What was not run, not finished or not drawn is said to be so; a torn journal is read."""
    tables, last, _ = report(tmp_path, script)
    assert not any(entry["ours"] for rows in tables.values() for row in rows.values()
                   for entry in row.values())
    assert set(last["figures"].values()) == {"not run"} and not last["unfinished"]
    write_record(tmp_path / "x/distill.json", {"finished": False})
    write_record(tmp_path / "y/search.jsonl", {})
    hand_made_search(tmp_path / "z", [0, 1, 2])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    whole, last, err = report(tmp_path, script)
    assert last["unfinished"] == [str(tmp_path / "x"), str(tmp_path / "y")]
    assert set(last["figures"].values()) == {"not drawn"} and "matplotlib is missing" in err
    with open(tmp_path / "z/search.jsonl", "a") as file:
        file.write('{"split": "te')
    assert report(tmp_path, script)[0] == whole != tables
    for name, text, fault in (("search.jsonl", "{}\n{\n", "is damaged"),
                              ("result.json", "{}", "cannot be read"),
                              ("result.json", "[]", "cannot be read")):
        hand_made_search(tmp_path / "z", [0, 1, 2])
        (tmp_path / "z" / name).write_text(text)
        _, err = script(["replace.py", "--report", tmp_path], 2, f"z/{name} {fault}")
        assert err.count("\n") == 1


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

@pytest.mark.slow
def test_ranks_share_a_search(lab, runs, tmp_path, script):
    """Two ranks, one of which dies, then three: order, scores and journal of one."""
    words = lambda name: replace_command(lab, runs["gla"], tmp_path / name, all=True, batch_size=2)
    script(words("one"))
    process, journal = start(words("many"), ranks=2), tmp_path / "many" / "search.jsonl"
    while not journal.exists() or len(journal.read_bytes().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode != 0
    assert "what was saved before is intact" in err
    assert finished(words("many"), ranks=3)["cost"]["ranks"] == 3
    assert result_of(tmp_path / "one")[0] == result_of(tmp_path / "many")[0]


@pytest.mark.slow
def test_ranks_share_a_distillation(lab, runs, tmp_path, monkeypatch, script):
    """Two ranks that share each batch give one rank's losses, errors and, nearly, tensors."""
    one, many = runs["jet"], tmp_path / "many"
    finished(distill_command(lab, many, attn="jet"), ranks=2)
    for layer in range(4):
        a, b = (load_file(distill.layer_file(run, layer)) for run in (one, many))
        assert all(relative(b[k], a[k]) < 1e-3 for k in a)
    for a, b in zip(log_rows(one), log_rows(many), strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        numbers = lambda row: row.get("loss") or {k: e["mse"] for k, e in row["errors"].items()}
        assert numbers(b) == pytest.approx(numbers(a), rel=1e-5)
    monkeypatch.setattr(distill, "world_size", lambda: 2)
    script(distill_command(lab, tmp_path / "odd", batch_size=3), 2,
           "not a multiple of the 2 processes")
    assert not (tmp_path / "odd").exists()


def test_one_run_at_a_time(lab, runs, tmp_path, script):
    """Two runs that write to one folder would mix up their files."""
    import fcntl
    for words in (replace_command(lab, runs["gdn"], tmp_path / "a", layers="1"),
                  distill_command(lab, tmp_path / "b", layers="1", tokens=128)):
        out = Path(words[words.index("--out") + 1])
        out.mkdir()
        with open(out / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            script(words, 2, "another run is at work")
        script(words)


# ------------------------------------------------------------------------------------------------
# Another device: what would fail or wait on a GPU, seen without one

@pytest.mark.skipif(not (SHARED / "tools" / "pretend_gpu.py").exists(),
                    reason="../shared/tools/pretend_gpu.py is not here")
@pytest.mark.slow
def test_distillation_on_another_device(lab, tmp_path):
    """A tensor left on the CPU would end it; a step that asks for its losses would wait."""
    waits = []
    for steps in (2, 3):
        words = distill_command(lab, tmp_path / str(steps), layers=0, tokens=128 * steps,
                                device="gpu", dtype="float32")
        run = python(SHARED / "tools" / "pretend_gpu.py", *words)
        assert run.returncode == 0, run.stderr[-3000:]
        counts = run.stderr.split("brought back to the host:")[1]
        waits.append(sum(map(int, re.findall(r"^ *(\d+)  ", counts, re.M))))
    saved = 4 * len(load_file(distill.layer_file(tmp_path / "3", 0)))       # with Adam's state
    # a step waits once in transformers; one that is saved, for losses, weights and each tensor
    assert waits[1] - waits[0] == 1 + 2 + saved


# ------------------------------------------------------------------------------------------------
# Bad input: one sentence, exit code 2, before any work

@pytest.fixture(scope="session")
def bad(lab, runs, tmp_path_factory):
    """Files, models and runs that BAD gives to the scripts."""
    path = tmp_path_factory.mktemp("bad")
    _, tokenizer = load_lab_model(lab)
    item = {"context": "t1", "choices": ["t2", "t3"], "gold": 0}
    write_rows(path / "long.jsonl", [item, {**item, "context": "t1 " * 80}])
    (path / "broken.jsonl").write_text(json.dumps(item) + '\n{"')
    (path / "short.jsonl").write_text('{"text": "t1 t2"}\n')
    (path / "file").write_text("")
    llama = small("Llama")
    for name, config, entries in (
            ("other", llama, {}), ("remote", llama, {"auto_map": {"AutoModelForCausalLM": "o.O"}}),
            ("quantised", llama, {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
            ("flash", llama, {"attn_implementation": "flash_attention_2"}),
            ("flex", llama, {"attn_implementation": "flex_attention"}),
            ("bert", small("Bert"), {}),
            ("sharing", small(
                "Gemma3nText", num_hidden_layers=4, head_dim=8, vocab_size_per_layer_input=64,
                hidden_size_per_layer_input=8, laurel_rank=4, altup_num_inputs=2,
                num_kv_shared_layers=2, activation_sparsity_pattern=[0.0] * 4,
                layer_types=["full_attention"] * 4), {})):
        random_model(config).save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
        saved = json.loads((path / name / "config.json").read_text())
        (path / name / "config.json").write_text(json.dumps({**saved, **entries}))
    (path / "gguf").mkdir()
    (path / "gguf" / "model.gguf").write_bytes(b"GGUF")
    for name, file in (("torn", "distill.json"), ("journal", "search.jsonl")):
        (path / name).mkdir()
        (path / name / file).write_text('{"a":\n')
    for name in ("partial", "foreign"):
        (path / name).mkdir()
        record = distill.read_run(runs["gdn"])
        record["layers"] = [1] if name == "partial" else record["layers"]
        (path / name / "distill.json").write_text(json.dumps(record))
        for layer in range(4):
            distill.layer_file(path / name, layer).write_bytes(
                distill.layer_file(runs["jet"], layer).read_bytes())
    run_main(replace_command(lab, runs["gdn"], f"{runs['gdn']}-search", layers="1"))
    return path


BAD = {     # name: (script, flags with {lab}, {tmp}, {run} filled in, words of the sentence)
    "no such model": ("distill", dict(model="{tmp}/nothing"), "no such model"),
    "no such hub model": ("eval", dict(model="no-such/model"), "no such model"),
    "not a causal LM": ("distill", dict(model="{tmp}/bert"), "causal language model"),
    "hybrid to distill": ("distill", dict(model="{run}-search/opt"), "already a hybrid"),
    "quantised": ("distill", dict(model="{tmp}/quantised"), "give the model in bf16"),
    "quantised, to score": ("eval", dict(model="{tmp}/quantised"), "load it unquantised"),
    "GGUF": ("distill", dict(model="{tmp}/gguf"), "gguf_file="),
    "no such attention": ("eval", dict(model="{tmp}/flash"), "flash"),
    "a mask that is not read": ("distill", dict(model="{tmp}/flex"), "sdpa"),
    "layers share keys": ("distill", dict(model="{tmp}/sharing"), "cannot be replaced one by one"),
    "remote code": ("distill", dict(model="{tmp}/remote"), "--trust-remote-code"),
    "blocks of another model": ("replace", dict(model="{tmp}/other"), "another model"),
    "no blocks": ("replace", dict(blocks="{tmp}"), "distill.json"),
    "torn record": ("replace", dict(blocks="{tmp}/torn"), "torn/distill.json"),
    "damaged journal": ("replace", dict(out="{tmp}/journal"), "search.jsonl is damaged"),
    "two mixers": ("replace", dict(blocks="{run},{lab}/gla"), "different mixers"),
    "missing layer": ("replace", dict(blocks="{tmp}/partial"), "layer 0"),
    "foreign tensors": ("replace", dict(blocks="{tmp}/foreign"), "does not hold a gdn module"),
    "broken task": ("replace", dict(task="{tmp}/broken.jsonl"), "line 2"),
    "item too long": ("eval", dict(task="{tmp}/long.jsonl"), "line 2"),
    "test of another kind": ("replace", dict(test="{lab}/generate.jsonl"), "one kind"),
    "no text column": ("distill", dict(text_column="body"), "columns: text"),
    "no such corpus": ("distill", dict(data="{tmp}/none.jsonl"), "none.jsonl"),
    "code without leave": ("eval", dict(task="humaneval"), "--allow-code-execution"),
    "dataset not at hand": ("eval", dict(task="pubmedqa"), "CONTEXTS, QUESTION, final_decision"),
    "shots of a file": ("eval", dict(shots=2), "named task"),
    "shots below zero": ("eval", dict(task="pubmedqa", shots=-1), "no number of examples"),
    "more tokens than fit": ("eval", dict(task="{lab}/generate.jsonl", max_gen_toks=64), "room"),
    "corpus too short": ("distill", dict(data="{tmp}/short.jsonl"), "two"),
    "no such dataset": ("distill", dict(data="no-such/dataset"), "no-such/dataset"),
    "bad weight": ("distill", dict(data="a/b@none"), "weight"),
    "out is a file": ("distill", dict(out="{tmp}/file"), "--out"),
    "out is a run": ("distill", dict(out="{run}"), "--resume"),
    "out is another run": ("distill", dict(out="{run}", resume=True, attn="jet"), "another run"),
    "out is a distillation": ("replace", dict(out="{run}"), "something else"),
    "out is a search": ("distill", dict(out="{run}-search"), "something else"),
    "unknown mixer": ("distill", dict(attn="mamba"), "invalid choice"),
    "unknown task": ("replace", dict(task="nothing"), "no task 'nothing'"),
    "unknown metric": ("eval", dict(metric="f1"), "no metric f1"),
    "zero lr": ("distill", dict(lr=0), "positive"),
    "max-drop": ("replace", dict(max_drop=1.5), "0 to 1"),
    "p-min": ("replace", dict(p_min=-1), "--p-min"),
    "seq-len": ("distill", dict(seq_len=65), "context of 64"),
    "other batches": ("replace", dict(out="{run}-search", layers="1", batch_size=4), "batch_size)"),
    "other documents": ("replace", dict(out="{run}-search", layers="1", limit=20), "limit)"),
    "other metric": ("replace", dict(out="{run}-search", layers="1", metric="acc_norm"), "metric)"),
    "other dtype": ("replace", dict(out="{run}-search", layers="1", dtype="bfloat16"), "dtype)"),
    "no demo": ("eval", dict(model=None, task=None), "`python distill.py` makes the demo"),
    "no demo task": ("eval", dict(task="copy"), "`python distill.py` makes the demo"),
    "no such device": ("eval", dict(device="cuda:7"), "--device"),
    "no out": ("distill", dict(out=None), "--out"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, bad, lab, runs, tmp_path, monkeypatch, script):
    """One sentence that names the file or the flag, exit code 2, and nothing is written."""
    which, flags, says = BAD[name]
    flags = {key: value.format(lab=lab, tmp=bad, run=runs["gdn"]) if isinstance(value, str) else
             value for key, value in flags.items()}
    monkeypatch.chdir(tmp_path)
    for library in ("huggingface_hub.constants", "datasets.config"):     # they would retry, 24 s
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", True)
    if which == "eval":
        words = command("eval.py", **{"model": lab / "model", "task": lab / "val.jsonl", **flags})
    elif which == "distill":
        words = distill_command(lab, **{"out": tmp_path / "out", **flags})
    else:
        words = replace_command(lab, **{"blocks": runs["gdn"], "out": tmp_path / "out", **flags})
    files = lambda: {path: path.read_bytes() for path in lab.glob("gdn*/*.*")}
    before = files()
    result, err = script(words, 2, says)
    assert result is None and "Traceback" not in err, err
    assert [line for line in err.splitlines() if line.startswith(f"{which}.py: ")] == [
        err.strip().splitlines()[-1]], err
    assert files() == before
    assert not list(tmp_path.glob("out/layer*")) and not list(tmp_path.glob("out/search.jsonl"))


def test_layers_are_numbers_and_ranges():
    """A layer that the model has not, or none at all, would end a run late."""
    assert evaluation.parse_layers("3, 7-9,8", 10) == [3, 7, 8, 9]
    for text in ("", "a,b", "3-1", "-1", "1-", "9-10", "1,,2"):
        with pytest.raises(UserError, match="from 0 to 9"):
            evaluation.parse_layers(text, 10)


@pytest.mark.parametrize("error, written, code, says", (
    (FileNotFoundError(2, "No such file", "a"), False, 2, "No such file: 'a'"),
    (KeyError("n"), False, 2, "KeyError: 'n'"), (ValueError("bad\nflag"), False, 2, "bad flag"),
    (UserError("mend it"), True, 2, "mend it"), (OSError("disk full"), True, 1, "disk full; what"),
    (FloatingPointError("NaN"), False, 1, "stopped: NaN"),
    (KeyboardInterrupt(), True, 130, "intact"),
    (KeyError("n"), True, KeyError, ""), (TypeError("n"), False, TypeError, "")))
def test_exit_codes(tmp_path, monkeypatch, capsys, error, written, code, says):
    """A user's mistake would end in a traceback, or a fault of this program in one sentence."""
    def main():
        if written:
            evaluation.write_json(tmp_path / "file", 1)
        raise error
    with pytest.raises(SystemExit if isinstance(code, int) else code) as caught:
        evaluation.run_script(main)
    if isinstance(code, int):
        assert caught.value.code == code and says in capsys.readouterr().err


@pytest.mark.parametrize("what, says", (
    ("loss", "weights of layer 2 are not finite after step 8"),
    ("weights", "weights of layer 2 are not finite after step 8"),
    ("teacher", "error of layer 1 is not finite: look for NaN")))
def test_no_checkpoint_holds_what_is_not_finite(lab, what, says, tmp_path, monkeypatch, script):
    """NaN of a teacher, a loss or a gradient would spoil the last good checkpoint."""
    load_model, train_step, calls = distill.load_model, distill.train_step, itertools.count()

    def load(*args, **kwargs):
        model, tokenizer = load_model(*args, **kwargs)
        if what == "teacher":
            attention_modules(model)[1].o_proj.weight.data[0, 0] = torch.nan
        return model, tokenizer

    def train(model, mixers, *args):
        losses = train_step(model, mixers, *args)
        if next(calls) == 7:         # a checkpoint follows
            (losses[2] if what == "loss" else mixers[2].v_proj.weight.data[0]).mul_(torch.nan)
        return losses

    monkeypatch.setattr(distill, "load_model", load)
    monkeypatch.setattr(distill, "train_step", train)
    monkeypatch.setattr(distill, "CHECKPOINTS", 4)
    script(distill_command(lab, tmp_path), 1, says)
    saved = [load_file(path) for path in tmp_path.glob("checkpoint.safetensors")]
    assert len(saved) == (what != "teacher")
    assert all(tensor.isfinite().all() for file in saved for tensor in file.values())


# ------------------------------------------------------------------------------------------------
# Fine-tuning

def finetune_command(lab, model, out, **flags):
    return command("distill.py", **{
        "finetune": lab / "val.jsonl", "test": lab / "val.jsonl", "model": model, "out": out,
        "batch_size": 8, "epochs": 20, "lr": 5e-3, "resume": True, **flags})


@pytest.fixture(scope="session")
def all_linear(lab, runs):
    """A saved hybrid of which every layer is linear."""
    run_main(replace_command(lab, runs["gdn"], lab / "linear", layers="0-3"))
    return lab / "linear" / "opt"


def requests_to_tune_on(task, docs, model, tokenizer):
    args = argparse.Namespace(shots=0, limit=None, shot_docs=None, bos=None, whole=False,
                              batch_size=4, max_gen_toks=None)
    return distill.solved_requests(task, docs, model, tokenizer, args)


@pytest.mark.parametrize("task, example", (
    ("gsm8k", "Question: {question}\nAnswer: {answer}</s>"),
    ("arc_easy", "Question: {question}\nAnswer: {right}"), ("winogrande", "{right} {rest}")))
@needs_shared
def test_fine_tuning_reads_what_is_scored(task, example):
    """The model would learn another prompt, another answer, or not to end its text."""
    file = next((SHARED / "data" / task).glob("test*" if task == "arc_easy" else "train*"))
    task, (model, tokenizer) = TASKS[task], evaluation.load_model(str(STORIES))
    docs = load_docs(task, None, file)[:3]
    for doc, request in zip(docs, requests_to_tune_on(task, docs, model, tokenizer)):
        fields = dict(doc)
        if task.choices:
            fields["right"] = task.choices(doc)[task.right(doc)]
            fields["rest"] = task.target and task.target(doc)
        text = example.format_map(fields)
        assert tokenizer.decode(request.tokens).removeprefix("<s>").strip() == text
        answer = tokenizer.decode(request.tokens[-request.scored:]).strip()
        assert answer == text.split("Answer: ")[-1] or answer == fields["rest"]


def test_fine_tuning_learns_the_answers_alone(lab):
    """The loss would count the prompt's tokens, or depend on how many rows are read at a time."""
    model, tokenizer = load_lab_model(lab)
    requests = requests_to_tune_on(*file_task(lab / "val.jsonl"), model, tokenizer)
    total = sum(log_likelihood(model, request.tokens, len(request.tokens) - request.scored)
                for request in requests)
    trained = list(model.requires_grad_(True).parameters())
    loss = distill.tuning_step(model, trained, torch.optim.SGD(trained), requests, 0.0, half=False)
    assert loss["model"].item() == pytest.approx(
        -total / sum(request.scored for request in requests))


@pytest.mark.parametrize("train", ("all", "linear"))
def test_fine_tuning_raises_the_score(lab, all_linear, train, tmp_path, script):
    """Figure 5 would show noise: training documents are learnt by heart, by the base model too;
    --train linear leaves the other weights as they are; eval.py finds the score that was saved."""
    for model in (lab / "model", all_linear)[train == "linear":]:
        out = tmp_path / model.name
        record, _ = script(finetune_command(lab, model, out, train=train))
        assert record["after"]["score"] > record["before"]["score"] + 0.2
        found, _ = script(command("eval.py", model=out / "model", task=lab / "val.jsonl",
                                  batch_size=8))
        assert found["results"][0]["value"] == record["after"]["score"]
        assert found["linear_layers"] == record["linear_layers"]
        assert record["base_model"] == str(lab / "model")
        old, new = (load_file(path / "model.safetensors") for path in (model, out / "model"))
        same = {name.split(".")[3] for name in old if torch.equal(old[name], new[name])
                and ".layers." in name}
        assert same == ({"mlp", "input_layernorm", "post_attention_layernorm"}
                        if train == "linear" else set())


# ------------------------------------------------------------------------------------------------
# The project itself

SCRIPTS = ("kernels", "linear_attn", "eval", "distill", "replace")
README = (ROOT / "README.md").read_text()


def readme_blocks():
    return re.findall(r"```python\n(.*?)```", README, re.S)


def copy_scripts(path, count=5):
    """Puts the first `count` of the five files, and nothing else, into a folder."""
    path.mkdir(exist_ok=True)
    for name in SCRIPTS[:count]:
        shutil.copy(ROOT / f"{name}.py", path)


@pytest.mark.slow
def test_imports_run_one_way_and_say_nothing():
    """A cycle would end copying; transformers may import a module named kernels by itself."""
    run = python("-c", f"""
import importlib, sys
for place, name in enumerate({SCRIPTS}):
    module = importlib.import_module(name)
    assert not set({SCRIPTS}[place + 1:]) & set(sys.modules), name
    assert place or not {{"transformers", "datasets"}} & set(sys.modules)
    assert place or not hasattr(module, "__version__")
""")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.slow
def test_readmes_copy_examples_run(tmp_path):
    """Whoever copies a file would find out that it needs more files than README says."""
    count = 0
    for block in readme_blocks():
        used = re.findall(r"^(?:from|import) (kernels|linear_attn|replace)\b", block, re.M)
        if used and "runs/" not in block:
            folder, count = tmp_path / str(count), count + 1
            copy_scripts(folder, max(map(SCRIPTS.index, used)) + 1)
            run_elsewhere(block, folder)
    assert count >= 3, "README has a block for a kernel, one for a mixer, one for the greedy loop"
    copy_scripts(tmp_path / "package", 2)
    assert run_elsewhere("import package.linear_attn as m; print(*m.MIXERS)", tmp_path) == (
        "gla gdn jet\n")


def test_readmes_commands_parse_and_help_teaches(monkeypatch, capsys):
    """A `python X.py ...` line of README could name a script or a flag that does not exist; a
    typing error in a flag of kernels.py would cost a run on a GPU."""
    def said(script, *flags):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
        with pytest.raises(SystemExit) as end:
            importlib.import_module(script).main()
        out, err = capsys.readouterr()
        assert end.value.code == (2 if err else 0) and err.count("\n") == bool(err)
        return out + err

    lines = re.findall(r"python (\w+)\.py([^\n#|&;`]*)", README.replace("\\\n", " "))
    assert len(lines) >= 5
    for script, flags in lines:
        if script != "kernels":
            monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
            importlib.import_module(script).parse_args()
    for script in ("kernels", *SCRIPTS[2:]):
        assert f"python {script}.py" in said(script, "--help")
    assert "--fast" in said("kernels", "--fast") and "--cs" in said("kernels", "--cs", "x.csv")
    assert "there is no folder" in said("kernels", "--csv", "nowhere/kernels.csv")
    setup, = (line for line in README.splitlines() if "test_all.py" in line and "venv" in line)
    assert setup.split(" && .venv/bin/python")[0].strip() in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_the_demo_as_a_user_runs_it(tmp_path):
    """The paper's claim would not show: two tasks, two searches that end differently."""
    copy_scripts(tmp_path)
    results = []
    for script in ("distill.py", "replace.py", "eval.py"):
        run = python(script, cwd=tmp_path)
        assert run.returncode == 0, run.stderr[-2000:]
        results.append(json.loads(run.stdout.splitlines()[-1]))
        assert f"next: {results[-1]['next']}" in run.stderr
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == {
        "out", *(f"{name}.py" for name in SCRIPTS)}
    searches = results[1]["results"]
    for name in ("copy", "chain"):
        assert searches[name]["p_base"] >= 0.95 and searches[name]["test_base"] >= 0.95
    assert searches["copy"]["opt"]["layers"] != searches["chain"]["opt"]["layers"]
