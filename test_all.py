"""Everything that this project claims and a CPU can check: pytest test_all.py

Tests on the real 260 K-parameter model and its data need ../shared and skip where it is absent.
"""

import copy
import importlib
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

import distill
import eval as evaluation
import linear_attn
import replace
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
    config = transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2,
                                       num_attention_heads=4)
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


# ------------------------------------------------------------------------------------------------
# linear_attn.py: a hybrid is an ordinary checkpoint

FRESH = """
import sys, json, torch
from transformers import AutoModelForCausalLM, AutoConfig
path, again = sys.argv[1:3]
try:
    AutoModelForCausalLM.from_pretrained(path)
    sys.exit("loaded without trust_remote_code")
except ValueError:
    pass
model, info = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True,
                                                   output_loading_info=True)
assert not any(len(v) for k, v in info.items() if k != "error_msgs"), info
assert not any("work" == m for m in sys.modules) and "linear_attn" not in sys.modules
model.save_pretrained(again)                                            # and once more
model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
ids = torch.load(f"{path}/ids.pt")
half = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True, dtype=torch.bfloat16)
assert half(ids).logits.isfinite().all()
AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, trust_remote_code=True),
                                 trust_remote_code=True)
tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
torch.save({"logits": model(ids).logits, "tied": tied,
            "tokens": model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)},
           f"{path}/out.pt")
"""


@pytest.mark.parametrize("family, attn", list(zip(
    ("llama", "qwen2", "gpt2", "gpt_neox", "gemma", "qwen3", "opt", "phi"),
    itertools.cycle(MIXERS))))
def test_saved_hybrid_loads_where_the_project_is_unknown(family, attn, tmp_path):
    """Logits bitwise equal in a process elsewhere; a decoy package named kernels is not used."""
    model = random_model(FAMILIES[family](), scale=2.0)
    init = "random" if family == "phi" else "inherit"
    mixers, ids = shaken_mixers(model, attn, init), tokens(2, 9)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("causal_conv = gated_delta_rule = None\n")
    with replace.replaced(model, mixers, (0, 2)):
        linear_attn.save_hybrid(model, tmp_path / "hybrid")
        assert type(model).__name__ == type(random_model(FAMILIES[family]())).__name__
        assert "linear_attn" not in model.config.to_dict()
        torch.save(ids, tmp_path / "hybrid" / "ids.pt")
        logits = model(ids).logits
        generated = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    run = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path / "hybrid"),
                          str(tmp_path / "again")], cwd=tmp_path, capture_output=True, text=True,
                         stdin=subprocess.DEVNULL,
                         env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""})
    assert run.returncode == 0, run.stderr[-2000:]
    out = torch.load(tmp_path / "hybrid" / "out.pt")
    assert torch.equal(out["logits"], logits) and torch.equal(out["tokens"], generated)
    assert out["tied"] == (model.get_output_embeddings().weight
                           is model.get_input_embeddings().weight)


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


def test_closed_form_start_is_the_best_o_proj(lab):
    """No small change of o_proj lowers the loss on the batches that the regression saw."""
    model, tokenizer = load_lab_model(lab)
    mixers = distill.make_mixers(model, "gdn", [1], "inherit", 0)
    batches = [tokens(8, 32, seed=s) for s in range(4)]
    chunks = torch.cat(batches)
    inherited = distill.held_out_error(model, mixers, chunks, 8)[1]["mse"]
    distill.closed_form_start(model, mixers, batches)
    solved = distill.held_out_error(model, mixers, chunks, 8)[1]["mse"]
    assert solved < 0.9 * inherited
    for seed in range(5):
        moved = copy.deepcopy(mixers)
        noise = torch.randn(moved[1].o_proj.weight.shape,
                            generator=torch.Generator().manual_seed(seed))
        moved[1].o_proj.weight.data += 0.02 * noise
        assert distill.held_out_error(model, moved, chunks, 8)[1]["mse"] > solved


def test_schedule_and_clip_are_per_layer(lab):
    """Warm-up, peak and floor as stated; a layer with a huge loss does not touch another's step."""
    assert distill.learning_rate(0, 1000, 1.0) == pytest.approx(1 / 50)
    assert distill.learning_rate(50, 1000, 1.0) == 1.0
    assert distill.learning_rate(1000, 1000, 1.0) == pytest.approx(0.01)
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
                raise KeyboardInterrupt

        monkeypatch.setattr(distill, "save_checkpoint", save_and_die)
        assert call(distill_command(lab, out, resume=True, **flags), monkeypatch, capsys)[0] == 130
        if stop_at:
            with open(out / "log.jsonl", "a") as file:
                file.write('{"event": "train", "st')
    monkeypatch.setattr(distill, "save_checkpoint", save)
    assert call(distill_command(lab, out, resume=True, **flags), monkeypatch, capsys)[0] == 0
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


# ------------------------------------------------------------------------------------------------
# eval.py

class Letters:
    """A tokenizer of characters, for checks of how a pair is cut."""
    bos_token_id, eos_token_id = 1, 2

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + [ord(c) for c in text]


def test_pairs_are_cut_as_the_harness_cuts_them():
    tokens_of = lambda text: [ord(c) for c in text]
    cut = evaluation.encode_pair
    assert cut(Letters(), "ab", " c") == ([1] + tokens_of("ab c"), 2)
    assert cut(Letters(), "ab \n", "c") == ([1] + tokens_of("ab \nc"), 3)
    assert cut(Letters(), "", " c") == ([1] + tokens_of(" c"), 2)


def test_accuracies_by_hand():
    """acc by sums, acc_norm by characters, ties to the first, an empty choice never wins."""
    doc = {"choices": ["aaaa", "b", "cc"], "gold": 0}
    assert evaluation.choice_score(doc, [-4.0, -3.0, -5.0]) == {"acc": 0.0, "acc_norm": 1.0}
    assert evaluation.choice_score(dict(doc, gold=1), [-3.0, -3.0, -9.0])["acc"] == 0.0
    assert evaluation.choice_score({"choices": ["", "b"], "gold": 1}, [-1, -2])["acc_norm"] == 1.0
    score = evaluation.Score("acc", [{"acc": 1.0}] * 3 + [{"acc": 0.0}], [])
    assert (score.mean(), score.n) == (0.75, 4)
    assert score.stderr() == pytest.approx(0.25)


def prepared(lab, name, batch_size=8, model=None):
    model, tokenizer = model or load_lab_model(lab)
    task = evaluation.find_task(str(lab / f"{name}.jsonl"))
    return model, evaluation.Prepared(task, evaluation.read_items(lab / f"{name}.jsonl"), model,
                                      tokenizer, batch_size)


@pytest.mark.parametrize("attn", MIXERS)
def test_log_likelihoods_equal_the_definition(lab, runs, attn):
    """Against a plain loop over tokens, one request at a time; any batch size; a hybrid too."""
    model, split = prepared(lab, "val")
    tokenizer = split.tokenizer
    with replace.replaced(model, distill.load_blocks(str(runs[attn]), model), (0, 2)):
        by_size = [evaluation.evaluate(model, prepared(lab, "val", size, (model, tokenizer))[1])
                   for size in (1, 5, 64)]
        for doc, *outputs in zip(split.docs, *(score.outputs for score in by_size)):
            for i, choice in enumerate(doc["choices"]):
                ids = tokenizer.encode(doc["context"] + " " + choice)
                log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
                first = len(tokenizer.encode(doc["context"]))
                wanted = sum(log_probs[t - 1, ids[t]].item() for t in range(first, len(ids)))
                assert all(abs(o[i] - wanted) < 1e-4 for o in outputs)


def test_equal_requests_are_asked_once(lab):
    model, tokenizer = load_lab_model(lab)
    docs = [{"context": "t1 t2", "choices": ["t3", "t4", "t3"], "gold": 0, "source": "here"}] * 2
    split = evaluation.Prepared(evaluation.choice_task("x", ()), docs, model, tokenizer, 4)
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
            cut = evaluation.cut_at_stops
            assert cut(text, ["t7"]) == cut(split.tokenizer.decode(new), ["t7"])


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


@needs_shared
def test_base_scores_on_the_real_model():
    """The numbers that lm-evaluation-harness 0.4.13 gives for the same items."""
    model, tokenizer = evaluation.load_model(str(STORIES))
    for name, acc, acc_norm in (("recall", 1.0, None), ("cloze", 0.4189, 0.5)):
        path = SHARED / "data" / "stories" / f"{name}-validation.jsonl"
        split = evaluation.Prepared(evaluation.find_task(str(path)), evaluation.read_items(path),
                                    model, tokenizer, 32)
        score = evaluation.evaluate(model, split)
        assert round(score.mean("acc"), 4) == acc
        assert acc_norm is None or round(score.mean("acc_norm"), 4) == acc_norm


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
    evaluation.demo_tokenizer().save_pretrained(path / "bert")


BAD = {     # name: (script, flags with {lab}, {tmp}, {run} filled in, what the sentence says)
    "no such model": ("distill", dict(model="{tmp}/nothing"), "no such model"),
    "no such hub model": ("eval", dict(model="no-such/model"), "no such model"),
    "not a causal LM": ("distill", dict(model="{tmp}/bert"), "causal language model"),
    "hybrid to distill": ("distill", dict(model="{run}-search/opt"), "already a hybrid"),
    "hybrid to search": ("replace", dict(model="{run}-search/opt"), "already a hybrid"),
    "remote code": ("distill", dict(model="{tmp}/remote"), "--trust-remote-code"),
    "blocks of another model": ("replace", dict(model="{tmp}/other"), "another model"),
    "no blocks": ("replace", dict(blocks="{tmp}"), "distill.json"),
    "two mixers": ("replace", dict(blocks="{run},{lab}/gla"), "different mixers"),
    "missing layer": ("replace", dict(blocks="{tmp}/partial"), "layer 0"),
    "foreign tensors": ("replace", dict(blocks="{tmp}/foreign"), "does not hold a gdn module"),
    "empty task": ("replace", dict(task="{tmp}/empty.jsonl"), "empty"),
    "binary task": ("replace", dict(task="{tmp}/binary.jsonl"), "text file"),
    "broken task": ("replace", dict(task="{tmp}/broken.jsonl"), "line 2"),
    "one choice": ("eval", dict(task="{tmp}/one.jsonl"), "line 2"),
    "gold out of range": ("eval", dict(task="{tmp}/range.jsonl"), "line 2"),
    "gold not a number": ("eval", dict(task="{tmp}/text.jsonl"), "line 2"),
    "item too long": ("eval", dict(task="{tmp}/long.jsonl"), "line 2"),
    "item too long to search": ("replace", dict(task="{tmp}/long.jsonl"), "line 2"),
    "test of another kind": ("replace", dict(test="{lab}/generate.jsonl"), "one kind"),
    "no text column": ("distill", dict(text_column="body"), "columns: text"),
    "no such corpus": ("distill", dict(data="{tmp}/none.jsonl"), "no such file"),
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
    "unknown task": ("replace", dict(task="nothing"), "unknown task"),
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


def test_a_loss_that_is_not_finite_stops_with_layer_and_step(lab, tmp_path, monkeypatch, capsys):
    code, _, err = call(distill_command(lab, tmp_path / "out", lr=1e30), monkeypatch, capsys)
    assert code == 1 and re.search(r"layer \d is not finite at step \d", err), err


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
        name = flag.replace("-", "_")
        assert name == "help" or re.search(rf"args\.{name}\b|getattr\(args, name\)", sources), flag


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
