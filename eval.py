"""Score a causal language model, or a hybrid of it, on a task.

    python eval.py                                              # the demo: offline, CPU
    python eval.py --model out/demo/copy/opt --task copy
    python eval.py --model Qwen/Qwen2.5-1.5B --task arc_challenge,pubmedqa
    python eval.py --model M --task items.jsonl --metric acc_norm
    python eval.py --throughput --model M --blocks runs/jet --layers-from runs/s/result.json

A task is one of the eighteen of the paper, by the names of lm-evaluation-harness (0.4.13) or of
the paper, scored exactly as the harness scores them; or a file with one JSON object per line:

    {"context": "...", "choices": ["...", "..."], "gold": 0}    log-likelihood of each choice
    {"prompt": "...", "answer": "...", "stop": ["\\n"], "max_tokens": 32}     greedy generation

A choice is scored as the continuation " " + choice. `acc` takes the choice with the largest summed
log-likelihood, `acc_norm` the largest per character. The last line on stdout is the result as JSON.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import datetime
import fcntl
import functools
import gc
import gzip
import hashlib
import itertools
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import timeit
import warnings
from operator import itemgetter
from pathlib import Path
from typing import Callable, NamedTuple
from unittest import mock

try:
    import numpy as np
    import safetensors.torch
    import torch
    import torch.distributed as dist
    import transformers
    from safetensors import SafetensorError
    from torch.nn.utils.rnn import pad_sequence
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer, Cache
    from transformers.utils.import_utils import is_kernels_available

    if is_kernels_available():
        raise ImportError("the pip package 'kernels' is hidden by the kernels.py of this folder, "
                          "which transformers would load in its place; uninstall that package")
    import linear_attn
    from linear_attn import UserError, attention_modules, decoder_layers, linear_layers, replaced
except ImportError as error:
    sys.exit(f"cannot start: {error}. Set up with: pip install -r requirements.txt")

DEMO = Path("out/demo")
DEMO_TASKS = ("copy", "chain")


# ------------------------------------------------------------------------------------------------
# What the scripts share: messages, errors, files, command lines

def log(message):
    """One line for people, on stderr, without breaking a progress bar; from rank 0 alone."""
    if rank() == 0:
        tqdm.write(message, file=sys.stderr)


def progress(iterable, disable=False, **kwargs):
    return tqdm(iterable, file=sys.stderr, dynamic_ncols=True, mininterval=0.5,
                disable=disable or rank() > 0, **kwargs)


def finish(result, following=None):
    """Print the last stdout line: `result` as JSON, with the command to run next."""
    if following:
        log(f"next: {following}")
    if rank() == 0:
        print(json.dumps({**result, "next": following}), flush=True)


_locks, _written = [], []       # the open files that lock a directory; the paths of written files


def run_script(main):
    """Run main(). Bad input (a UserError, or a library's error before any file is written) ends it
    with one sentence and exit code 2. Running out of memory, losing a process or the network, a
    number that is not finite, or a later error of a file ends it with one sentence and exit code 1.
    Any other error is a bug and shows its traceback."""
    def end(code, message):
        print(" ".join(f"{Path(sys.argv[0]).name}: {message}".split()), file=sys.stderr)
        sys.exit(code)

    intact = "what was saved before is intact"
    signal.signal(signal.SIGTERM, lambda *_: end(143, f"terminated; {intact}"))
    # the newest transformers has another name for this argument, but takes the one all know
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
    _written.clear()
    try:
        main()
    except KeyboardInterrupt:
        end(130, f"interrupted; {intact}")
    except (FloatingPointError, ConnectionError, torch.OutOfMemoryError) as error:
        end(1, f"stopped: {error}; {intact}")
    except (OSError, ValueError, LookupError, SafetensorError) as error:
        if isinstance(error, UserError) or not _written:
            end(2, sentence(error))
        if isinstance(error, (OSError, SafetensorError)):
            end(1, f"stopped: {error}; {intact}")
        raise
    finally:
        _locks.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def sentence(error):
    """An error's message in one line; a library's is shortened to 300 characters."""
    if isinstance(error, UserError):
        return str(error)
    text = " ".join(str(error).split())[:300]
    clear = isinstance(error, ValueError) or getattr(error, "strerror", None)
    return text if clear else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def blame(what):
    """Errors within the block become UserErrors: `what`, then the error's message. Only running out
    of GPU memory stays as it is, since the input is not at fault."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {sentence(error)}") from None


class ArgumentParser(argparse.ArgumentParser):
    """Bad flags are answered like all bad input: one sentence on stderr, exit code 2."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def command_line():
    """The command that runs now, for people to run it again."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def positive(kind):
    """An argparse type: a number of type `kind` above zero."""
    def parse(text):
        if not 0 < kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return kind(text)
    parse.__name__ = "positive " + kind.__name__
    return parse


def parse_layers(text, num_layers):
    """"3,7-12" -> [3, 7, ..., 12]. Raises UserError if these are not layers of the model."""
    parts = [re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part) for part in text.split(",")]
    ranges = [range(int(part[1]), int(part[2] or part[1]) + 1) for part in parts if part]
    layers = sorted(set().union(*ranges))
    if not all(parts) or not all(ranges) or layers[-1] >= num_layers:
        raise UserError(f"--layers {text}: give layers as in 3,7-12, from 0 to {num_layers - 1}.")
    return layers


def write_atomic(path, write):
    """Call write(temporary path), fsync, rename: `path` never holds a part of a file."""
    _written.append(path)
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=1) + "\n"))


def read_json(path):
    """The value in a JSON file. Raises UserError if it cannot be read."""
    with blame(f"cannot read {path}"):
        return json.loads(Path(path).read_text())


def write_lines(path, rows):
    """A JSON-lines file, written like write_json."""
    write_atomic(path, lambda p: p.write_text("".join(json.dumps(row) + "\n" for row in rows)))


def digest(*values):
    """A short fingerprint of JSON-able values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def versions():
    """The libraries' versions, and a fingerprint of every source file that a score depends on."""
    code = [Path(__file__).with_name(f"{name}.py").read_text()
            for name in ("kernels", "linear_attn", "eval")]
    return {"torch": torch.__version__, "transformers": transformers.__version__,
            "python": sys.version.split()[0], "code": digest(code)}


def write_directory(path, write):
    """Like write_atomic, for a directory, but a kill between the two renames leaves none."""
    temporary, old = (path.with_name(f".{path.name}.{end}") for end in ("tmp", "old"))
    for folder in (temporary, old):
        shutil.rmtree(folder, ignore_errors=True)
    write(temporary)
    if path.exists():
        os.replace(path, old)
    os.replace(temporary, path)
    shutil.rmtree(old, ignore_errors=True)


def claim_dir(path, foreign=()):
    """Make the output directory and keep other runs out of it until the script ends. Raises
    UserError where one is at work, and where one of the files `foreign` shows another use."""
    path = Path(path)
    with blame("--out must be a directory that can be made"):
        path.mkdir(parents=True, exist_ok=True)
    if any((path / name).exists() for name in foreign):
        raise UserError(f"{path} already holds something else; give another --out.")
    if rank() == 0:
        _locks.append(open(path / ".lock", "w"))        # the lock holds while this file is open
        try:
            fcntl.flock(_locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is at work in {path}; wait, or give another --out.")
    return path


# ------------------------------------------------------------------------------------------------
# Several processes: torchrun --nproc-per-node N replace.py ...

def rank():
    """The number of this process, 0 to world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def join_ranks(device):
    """Under torchrun, meet the other processes: gloo on CPUs, nccl on GPUs, one GPU each."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    with blame(f"--device {device} cannot be used by several processes"):
        on_gpu = torch.device(device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                            timeout=datetime.timedelta(days=1))


def together(collective, *args):
    """Call a function of torch.distributed. Raises ConnectionError if another process has ended."""
    try:
        if world_size() > 1:
            collective(*args)
    except RuntimeError as error:
        raise ConnectionError("another process of this run has ended; the same command goes on "
                              f"from what is saved ({sentence(error)[:100]})") from None


def gather(value):
    """[the value of each rank, in their order], on every rank."""
    values = [value] * world_size()
    together(dist.all_gather_object, values, value)
    return values


def add_up(tensor):
    """The sum of every rank's tensor, in place."""
    together(dist.all_reduce, tensor)
    return tensor


# ------------------------------------------------------------------------------------------------
# Models

def add_model_flags(parser):
    parser.add_argument("--model", help="directory or Hub id of a causal language model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda, cuda:N; auto: spread one model over all GPUs (accelerate)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"),
                        default="auto", help="of the model; auto: bfloat16 on a GPU, else float32")
    parser.add_argument("--trust-remote-code", action="store_true",
                        help="run code that the base model's repository brings along")


def load_model(name, device="cpu", dtype="auto", trust_remote_code=False, base_only=False,
               weights=True):
    """(model, tokenizer), ready to score on `device`. Raises UserError for anything but a complete
    causal language model with a tokenizer; with `base_only` also if it cannot be converted.
    Without `weights` (--dry-run) the model is only its shapes, on the device "meta"."""
    if not Path(name, "config.json").is_file() and (
            name.lower().endswith("gguf") or any(Path(name).glob("*.gguf"))):
        raise UserError(f"{name} is GGUF: convert it first, with from_pretrained(FOLDER, "
                        "gguf_file=FILE) and save_pretrained(OUT) of model and tokenizer.")
    with blame(f"no such model: {name} is no model's directory here, nor loads from the Hub"):
        config, _ = transformers.PreTrainedConfig.get_config_dict(name)
    hybrid = str(config.get("model_type")).startswith(linear_attn.MODEL_TYPE_PREFIX)
    quantised = config.get("quantization_config") is not None
    if base_only and hybrid:
        raise UserError(f"{name} is already a hybrid; give the base model it was made from.")
    if base_only and quantised:
        raise UserError(f"{name} is quantised: give the model in bf16 (see its dequantize()).")
    if "auto_map" in config and not hybrid and not trust_remote_code:
        raise UserError(f"{name} brings its own code; add --trust-remote-code to run it.")
    device_map, device = "auto" if device == "auto" else None, find_device(device)
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    load = linear_attn.load_hybrid if hybrid else functools.partial(
        AutoModelForCausalLM.from_pretrained if weights else shapes_only,
        trust_remote_code=trust_remote_code)
    with blame(f"{name} does not load as a causal language model with a tokenizer"
               + (" (load it unquantised, in bf16)" if quantised else "")):
        model, info = load(name, output_loading_info=True, device_map=device_map,
                           dtype=getattr(torch, dtype))
        if info["missing_keys"]:
            raise ValueError(f"its checkpoint has no {min(info['missing_keys'])}")
        if weights and not (device_map or quantised):   # loading has placed those
            model = model.to(device)
        model = model.eval().requires_grad_(False)
        if model.config.is_encoder_decoder or weights and not is_causal(model):
            raise ValueError("a token's prediction depends on later tokens")
        tokenizer = AutoTokenizer.from_pretrained(name, config=model.config,
                                                  trust_remote_code=trust_remote_code)
    if base_only and weights:
        check_replaceable(model)
    return model, tokenizer


def shapes_only(name, dtype, trust_remote_code, **unused):
    """What from_pretrained returns, on the device "meta"."""
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code), {"missing_keys": ()}


@torch.no_grad()
def check_replaceable(model):
    """Raise UserError unless the model runs with its even layers linear, and with its odd ones.
    Some families' layers pass keys and values on, or get a mask that no linear layer reads."""
    attention = attention_modules(model)
    mixer = functools.cache(lambda device: linear_attn.MIXERS["gla"].from_attention(
        attention[0], model.config, 0, "random").to(device, model.dtype))
    stand_ins = {i: mixer(next(attn.parameters()).device) for i, attn in enumerate(attention)}
    with blame(f"{type(model).__name__}: its layers cannot be replaced one by one"):
        for first in (0, 1):
            with replaced(model, stand_ins, range(first, len(attention), 2)):
                model(torch.tensor([[0, 1]], device=model.device), use_cache=False)


@torch.no_grad()
def is_causal(model):
    """Whether the first prediction stays the same when the second token changes."""
    ids = torch.tensor([[0, 1], [0, 2]], device=model.device)
    first, other = model(ids, use_cache=False).logits[:, 0].float()             # [V] each
    return not (first - other).abs().max() > 1e-4 * first.abs().max()   # with NaN: true, too


def dtype_to_save(name, model, asked):
    """The dtype of a hybrid's checkpoint: the model's or, where --dtype is auto and a CPU holds the
    base in fp32, the narrower one that the base was saved in."""
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=True)
    own = config.dtype or config.get_text_config(decoder=True).dtype or torch.float32
    return own if asked == "auto" and own.itemsize < model.dtype.itemsize else model.dtype


def find_device(name):
    """The device of that name; under torchrun "cuda" is this process's GPU. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with blame(f"--device {name} cannot be used here"):
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)       # where graphs are captured and memory is counted
        return device


def max_length(model):
    """The longest input in tokens, or None where the config names no limit."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def reach(model):
    """How many positions a forward with padding or a cache may have: the size of the table of
    positions, or the length up to which RoPE's factors stay the same (longrope)."""
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]
    return min([kind["original_max_position_embeddings"] for kind in kinds
                if kind.get("rope_type") == "longrope"] + [max_length(model) or math.inf])


def fingerprint(model):
    """A fingerprint of the weights, from samples of every tensor, the same in fp32 and in bf16."""
    sha = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        sample = tensor.flatten()[:: max(1, tensor.numel() // 1024)].to(torch.bfloat16)
        sha.update(f"{name}{tuple(tensor.shape)}".encode())
        sha.update(sample.cpu().view(torch.int16).numpy().tobytes())
    return sha.hexdigest()[:16]


# The modules that distill.py saves in a run directory

def layer_file(out, layer):
    return Path(out) / f"layer_{layer:03d}.safetensors"


def read_run(out, name="distill.json"):
    """The record of a run directory, or None where there is none. Raises UserError."""
    path = Path(out) / name
    return read_json(path) if path.is_file() else None


def load_blocks(runs, model, layers=None):
    """{layer: mixer} of all layers in finished runs (directories, comma-separated), in the model's
    dtype and on its device. Raises UserError for a run that does not fit the model, and if one of
    `layers`, by default all of the model's, is missing."""
    records = {run: read_run(run) for run in runs.split(",")}
    for run, record in records.items():
        if record is None or not record["finished"]:
            raise UserError(f"{run} holds no finished run of distill.py: see its distill.json.")
        if record["teacher_fingerprint"] != fingerprint(model):
            raise UserError(f"{run} was distilled from another model, {record['teacher']}.")
    kinds = {(record["attn"], record["init"]) for record in records.values()}
    if len(kinds) > 1:
        raise UserError(f"the runs {runs} hold different mixers or starts; a hybrid takes one.")
    (attn, init), = kinds
    attention, mixers = attention_modules(model), {}
    run_of = {layer: run for run, record in records.items() for layer in record["layers"]}
    for layer in range(len(attention)) if layers is None else layers:
        if layer not in run_of:
            raise UserError(f"{runs} has no module for layer {layer}: see distill.py --layers.")
    for layer, run in sorted(run_of.items()):
        mixer = linear_attn.MIXERS[attn].from_attention(
            attention[layer], model.config, layer, init, seed=None)
        with blame(f"{layer_file(run, layer)} does not hold a {attn} module of this size"):
            mixer.load_state_dict(safetensors.torch.load_file(layer_file(run, layer)))
        mixers[layer] = mixer.eval().requires_grad_(False)
    return mixers


# What a run costs, by formula

def forward_flops(module, config, tokens, squares):
    """FLOPs of a forward through a decoder layer, an attention module or a mixer. For each token:
    2 per weight of a matrix (of experts [E, out, in], only the chosen ones); in softmax attention
    4 heads D per token it attends to; in linear attention per number of the states 5 (GLA: 1 to
    decay, 2 to write, 2 to read) or 7 (delta rule: 2 more for S^T k). The tokens from `start` to
    `end` of a text attend to (end^2 - start^2) / 2, and `squares` is the sum of end^2 - start^2.
    Norms, activations and the limits of sliding windows are not counted."""
    config = config.get_text_config(decoder=True)
    chosen = getattr(config, "num_experts_per_tok", None)
    flops = 2 * tokens * sum(p.numel() if p.dim() < 3 else p[0].numel() * (chosen or len(p))
                             for p in module.parameters() if p.dim() > 1)
    for mixer in module.modules():
        if isinstance(mixer, linear_attn.LinearAttention):
            rate = 5 if isinstance(mixer, linear_attn.GatedLinearAttention) else 7
            return flops + rate * tokens * mixer.num_heads * mixer.head_dim ** 2
    head_dim = linear_attn.head_dim_of(config, config)
    return flops + 2 * squares * config.num_attention_heads * head_dim


def finish_plan(args, model, mixers, plan, weight_bytes, activations):
    """End a --dry-run: print the `plan`, its hours, and whether one process has the memory for the
    model, the mixers at `weight_bytes` per weight, and `activations` (bytes)."""
    device, rate = find_device(args.device), args.dry_run * 1e12 * world_size()
    available = (torch.cuda.get_device_properties(device).total_memory if device.type == "cuda"
                 else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    weights = sum(p.numel() for mixer in mixers.values() for p in mixer.parameters())
    memory = {"model": model.num_parameters() * model.dtype.itemsize,
              "mixers": round(weight_bytes * weights), "activations": activations}
    needed = sum(memory.values())
    plan |= {"hours": plan["flops"] / rate / 3600 if rate else None, "bytes": memory,
             "needed": needed, "available": available, "fits": needed <= available}
    log("\n".join(f"{key}: {value:,}" if type(value) in (int, float) else f"{key}: {value}"
                  for key, value in plan.items()))
    log(f"this will {'' if plan['fits'] else 'not '}fit: it needs {needed / 2**30:.2f} GiB, and "
        f"{args.device} has {available / 2**30:.2f} GiB")
    finish(plan)


# ------------------------------------------------------------------------------------------------
# Tasks: what the model is asked, and how its answer becomes a number

# A document is one row of a dataset, a dict. A new task is one more entry in TASKS. Every quirk is
# that of EleutherAI/lm-evaluation-harness 0.4.13, lm_eval/tasks, so that numbers can be compared.

PAPER = Path(__file__).with_name("figures") / "paper_tables.json"       # every number it prints
NEVER = "none of the choices"  # the gold answer of an item that no model can get right


@dataclasses.dataclass(frozen=True)
class Task:
    """One benchmark. The functions take a document; without `choices` the model writes text."""

    name: str
    fields: tuple               # what every document must have
    prompt: Callable            # the text that the model continues
    gold: Callable              # index or text of the right choice, or the reference; may fail
    metrics: tuple = ("acc",)   # the harness's; the paper most likely reports the first
    choices: Callable = None    # texts; with a `target` they are prompts, which it continues
    stop: tuple = ()
    max_tokens: int = 256       # the harness's number where a task names none
    judge: Callable = None      # document, text -> metrics
    program: str = None         # a template: fails unless the text, {answer}, is right
    description: str = ""
    target: Callable = None     # the answer that a shot shows, if it is not the right choice
    delimiter: str = " "        # between prompt and answer
    shots: int = 0
    shot_split: str = "train"   # None: the task takes no shots
    first_shot: int = None      # all documents get the shots from this one on, not a draw for each
    hub: tuple = None           # dataset and configuration
    splits: tuple = ("validation", "test")      # to search on and to report, see split_docs
    resplit: Callable = None    # rows, split -> rows, if the Hub has all rows in the split train
    short: str = ""             # the paper's names

    def requests(self, doc, shots=()):
        """What to ask: [(context, continuation)] by choice, or [(prompt, {until, max_gen_toks})].
        `shots` are documents, shown solved before this one."""
        head = self.description + "".join(map(self.shot, shots))
        if self.choices and self.target:
            rest = self.delimiter + self.target(doc)
            return [(head + choice, rest) for choice in self.choices(doc)]
        prompt = head + self.prompt(doc)
        if self.choices:
            return [(prompt, self.delimiter + choice) for choice in self.choices(doc)]
        # an item of a JSON-lines file may bring its limits along
        return [(prompt, {"until": list(doc.get("stop", self.stop)),
                          "max_gen_toks": doc.get("max_tokens", self.max_tokens)})]

    def shot(self, doc):
        """A solved example, with the first of several answers."""
        if not self.target and self.right(doc) is NEVER:
            raise UserError(f"{place_of(doc)} cannot be a shot: none of its choices is right")
        answer = self.target(doc) if self.target else self.choices(doc)[self.right(doc)]
        if self.target and not answer:          # the harness leaves out the blank line, too
            return self.prompt(doc)
        answer = answer[0] if isinstance(answer, list) else answer
        return self.prompt(doc) + self.delimiter + answer + "\n\n"

    def right(self, doc):
        """Index of the right choice, or NEVER."""
        gold, choices = self.gold(doc), self.choices(doc)
        return choices.index(gold) if gold in choices else gold

    def score(self, doc, outputs, allow_code=False):
        """Metrics from the summed log-likelihoods in request order, where the first maximum wins
        and acc_norm is per character; or from [the text written]."""
        if self.choices:
            lls, lengths = np.array(outputs, float), list(map(len, self.choices(doc)))
            with np.errstate(divide="ignore", invalid="ignore"):    # an empty choice gets -inf
                by = {"acc": lls, "acc_norm": lls / lengths}
            return {m: float(by[m].argmax() == self.right(doc)) for m in sorted(self.metrics)}
        text, = outputs
        for stop in filter(None, doc.get("stop", self.stop)):
            text = text.split(stop)[0]
        if self.judge:
            return self.judge(doc, text)
        self.check_leave(allow_code)
        program = self.program.format_map({**doc, "answer": text})
        return {self.metrics[0]: float(run_program(program).passed)}

    def check_leave(self, allow_code):
        """Raise UserError if programs that the model wrote would run without the user's leave."""
        if self.program and not allow_code:
            raise UserError(f"{self.name} runs programs that the model wrote, behind a fence that "
                            "is not a jail; allow it with --allow-code-execution.")

    def check(self, doc):
        """Raise UserError, saying why, unless the document can be asked, its gold answer parses,
        and fingerprints can be made of it: they need JSON in UTF-8."""
        with blame(f"not a document of {self.name} ({', '.join(self.fields)})"):
            json.dumps(doc, ensure_ascii=False).encode()
            if missing := [field for field in self.fields if doc.get(field) is None]:
                raise ValueError(f"it has no {' and no '.join(missing)}")
            count = len(self.requests(doc))
            gold = self.right(doc) if self.choices else self.gold(doc)
            texts = gold if isinstance(gold, list) else [gold]
            if self.choices and not (gold in range(count) and type(gold) is int
                                     or gold is NEVER and count):
                raise ValueError(f"the gold answer {gold!r} is not one of {count} choices")
            if not self.choices and not (texts and all(isinstance(text, str) for text in texts)):
                raise ValueError(f"the gold answer {gold!r} is not a text")
            if self.program:
                compile(gold, self.name, "exec")


def lettered(doc, choices, letters):
    """A question and its lettered choices, as CommonsenseQA and MMLU print them."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices[:len(letters)],
                                                             strict=True)]
    return "\n".join([doc["question"].strip(), *lines, "Answer:"])


def labelled(doc):
    return doc["choices"]["label"].index(doc["answerKey"].lstrip())


def hellaswag_clean(text):
    """WikiHow's [tags] go, in one pass; a text that began with a tag keeps the space behind it."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def winogrande_choices(doc):
    """The sentence up to the blank, filled in both ways."""
    before = doc["sentence"].partition("_")[0]
    return [before + doc["option1"], before + doc["option2"]]


def mathqa_choices(doc):
    """Five options cut from one string; a comma and a space inside an option end it."""
    found = re.findall(r"[abcd] \) .*?, |e \) .*?$", doc["options"])
    return [option[4:].rstrip(" ,") for option in found]


def mathqa_gold(doc):
    gold = list("abcde").index(doc["correct"])
    return gold if gold < len(mathqa_choices(doc)) else NEVER


def gsm8k_bare(text):
    """The part that is compared: behind the last '#### ', without commas, dollars, full stop."""
    for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()


def gsm8k_gold(doc):
    if not re.search(r"#### [-$]*[0-9.,]*[0-9]", doc["answer"]):
        raise ValueError("no number behind '#### ' in the answer")
    return gsm8k_bare(doc["answer"])


def gsm8k_judge(doc, text):
    """strict-match takes the first number behind '#### ', flexible-extract the last of all."""
    found = {"strict-match": re.findall(r"#### (-?[0-9.,]+)", text)[:1],
             "flexible-extract": re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)[-1:]}
    right = gsm8k_bare(doc["answer"])
    return {f"exact_match,{name}": float(gsm8k_bare("".join(answer) or "[invalid]") == right)
            for name, answer in found.items()}


def lcs_words(x, y):
    """The words of a longest common subsequence; of several, the one that `rouge` takes."""
    above = [()] * (len(y) + 1)         # of x's words so far with y's first j words
    for word in x:
        row = [()]
        for j, other in enumerate(y):
            row.append(above[j] + (word,) if word == other else max(row[j], above[j + 1], key=len))
        above = row
    return set(above[-1])


def rouge_l(prediction, reference):
    """ROUGE-L F of the package `rouge` 1.0.1: sentences end at '.', a word counts once."""
    ours, theirs = ([" ".join(sentence.split()).split(" ") for sentence in text.split(".")
                     if sentence] for text in (prediction, reference))
    if not ours or not theirs:
        return 0.0
    common = len(set().union(*(lcs_words(x, y) for x in theirs for y in ours)))
    precision, recall = common / len(set().union(*ours)), common / len(set().union(*theirs))
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def class_score(classes, text, gold):
    """1 / (number of classes that the text names) if the right one is among them."""
    named = [name for name in classes if name in text]
    for name in named:  # LongBench shortens the list it walks, and so skips the next name
        if name in gold and name != gold:
            named.remove(name)
    return 1.0 / len(named) if gold in named else 0.0


HUMANEVAL_TEST = "{test}\ncheck({entry_point})"
MBPP_TESTS = "{test_list[0]}\n{test_list[1]}\n{test_list[2]}"


def pubmedqa_split(rows, split):
    """The official test set of the 1,000 labelled rows, or the other rows for any other split, with
    the fields of the original files. It is drawn as its authors drew it (pubmedqa/pubmedqa on
    GitHub, split_dataset.py). Raises ValueError if rows in another order give another set."""
    draw, test = random.Random(0), []
    for label in ("yes", "no", "maybe"):
        ids = [row["pubid"] for row in rows if row["final_decision"] == label]
        draw.shuffle(ids)
        test += ids[math.ceil(len(ids) / 2):]
    if digest(sorted(map(int, test))) != "178ce354f19c0b3b":    # of the official test items
        raise ValueError("the rows in their order there do not give the official test set")
    row_of = {row["pubid"]: dict(row, CONTEXTS=row["context"]["contexts"],
                                 QUESTION=row["question"]) for row in rows}
    return [row_of[i] for i in (test if split == "test" else [i for i in row_of if i not in test])]


BOTH, NORM = ("acc", "acc_norm"), ("acc_norm", "acc")
HIDDEN = ("train", "validation")        # the test labels are secret: validation is reported


def swde(name, clean, **rest):
    """Version 0, in every release up to 0.4.12 and so in the paper, strips nothing."""
    def judge(doc, text):
        found = re.search(re.escape(clean(doc["value"])), text, re.IGNORECASE)
        return {"contains": int(bool(found))}
    return Task(name, ("text", "value"), hub=("hazyresearch/based-swde-v2", "default"),
                prompt=lambda doc: clean(doc["text"]), target=lambda doc: clean(doc["value"]),
                gold=itemgetter("value"), judge=judge, metrics=("contains",), stop=("\n",),
                max_tokens=48, splits=("validation", "validation"), shot_split=None, **rest)


def longbench(name, instruction, metric, judge, more=(), **rest):
    """`judge`(text, one of the answers, document) -> score; the best of all answers counts."""
    def best(doc, text):
        score = max(0.0, *(judge(text.strip(), answer, doc) for answer in doc["answers"]))
        return {"score": score, metric: score}
    return Task(f"longbench_{name}", ("context", "question", "answers", *more),
                prompt=(instruction + "\n\n{context}\n{question}").format_map,
                gold=itemgetter("answers"), target=itemgetter("answers"), judge=best, delimiter="",
                hub=("Xnhyacinth/LongBench", name), metrics=("score",), stop=("\n",),
                splits=("test", "test"), shot_split=None, **rest)


class TaskTable(dict):
    """Tasks by the harness's names; the paper's short names (ArcC, ...) are understood too."""

    def named(self, name):
        """The task of that name, or None."""
        return next((task for task in self.values()
                     if name.lower() in (task.name, *task.short.lower().split())), None)

    def __missing__(self, name):
        if task := self.named(name):
            return task
        raise UserError(f"no task {name!r}: there are {', '.join(self)} and JSON-lines files")


TASKS = TaskTable((task.name, task) for task in (
    *(Task(f"arc_{level.lower()}", ("question", "choices", "answerKey"), metrics=NORM, short=short,
           hub=("allenai/ai2_arc", f"ARC-{level}"), gold=labelled,
           prompt="Question: {question}\nAnswer:".format_map,
           choices=lambda doc: doc["choices"]["text"])
      for level, short in (("Challenge", "ArcC"), ("Easy", "ArcE"))),
    Task("boolq", ("passage", "question", "label"), hub=("aps/super_glue", "boolq"), splits=HIDDEN,
         prompt="{passage}\nQuestion: {question}?\nAnswer:".format_map, short="BQ BoolQ",
         choices=lambda doc: ["no", "yes"],
         # SuperGLUE's own files have true and false
         gold=lambda doc: int(doc["label"]) if doc["label"] in (False, True) else doc["label"]),
    Task("commonsense_qa", ("question", "choices", "answerKey"), hub=("tau/commonsense_qa", None),
         prompt=lambda doc: "Question: " + lettered(doc, doc["choices"]["text"], "ABCDE"),
         choices=lambda doc: list("ABCDE"), gold=itemgetter("answerKey"), splits=HIDDEN,
         short="CQ"),
    Task("hellaswag", ("activity_label", "ctx_a", "ctx_b", "endings", "label"), metrics=BOTH,
         hub=("Rowan/hellaswag", None), splits=HIDDEN, short="HS",
         prompt=lambda doc: hellaswag_clean("{activity_label}: {ctx_a} ".format_map(doc)
                                            + doc["ctx_b"].capitalize()),  # lower-cases the rest
         choices=lambda doc: list(map(hellaswag_clean, doc["endings"])),
         gold=lambda doc: list("0123").index(str(doc["label"]))),
    Task("openbookqa", ("question_stem", "choices", "answerKey"), metrics=NORM, short="OBQA OBA",
         hub=("allenai/openbookqa", "main"), prompt=itemgetter("question_stem"), gold=labelled,
         choices=lambda doc: doc["choices"]["text"]),
    Task("piqa", ("goal", "sol1", "sol2", "label"), hub=("baber/piqa", None), metrics=BOTH,
         prompt="Question: {goal}\nAnswer:".format_map, gold=itemgetter("label"), splits=HIDDEN,
         choices=lambda doc: [doc["sol1"], doc["sol2"]], short="PIQA"),
    # The choices are prompts: the score is that of the rest of the sentence.
    Task("winogrande", ("sentence", "option1", "option2", "answer"), splits=HIDDEN, short="WG",
         hub=("allenai/winogrande", "winogrande_xl"), choices=winogrande_choices,
         gold=lambda doc: int(doc["answer"]) - 1,
         prompt=lambda doc: winogrande_choices(doc)[int(doc["answer"]) - 1],
         target=lambda doc: doc["sentence"][doc["sentence"].index("_") + 1:].strip()),
    Task("gsm8k", ("question", "answer"), hub=("openai/gsm8k", "main"), shots=4, short="GSM8K",
         prompt="Question: {question}\nAnswer:".format_map, target=itemgetter("answer"),
         gold=gsm8k_gold, judge=gsm8k_judge, stop=("Question:", "</s>", "<|im_end|>"),
         metrics=("exact_match,strict-match", "exact_match,flexible-extract"),
         splits=("train", "test")),
    Task("mathqa", ("Problem", "options", "correct"), hub=("regisss/math_qa", None), metrics=NORM,
         prompt="Question: {Problem}\nAnswer:".format_map, choices=mathqa_choices,
         gold=mathqa_gold, short="MathQA MQ"),
    Task("humaneval", ("prompt", "test", "entry_point"), hub=("openai/openai_humaneval", None),
         prompt=itemgetter("prompt"), target=HUMANEVAL_TEST.format_map, gold=itemgetter("test"),
         program="{prompt}{answer}\n" + HUMANEVAL_TEST, metrics=("pass@1",), max_tokens=1024,
         stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"), splits=("test", "test"),
         shot_split=None, short="HumanEval HE"),
    # The paper says zero-shot, but its numbers need the harness's default of three fixed shots,
    # which are the rows 2, 3 and 4 of the dataset.
    Task("mbpp", ("text", "code", "test_list"), hub=("google-research-datasets/mbpp", "full"),
         prompt=("You are an expert Python programmer, and here is your task: {text} Your code "
                 "should pass these tests:\n\n" + MBPP_TESTS + "\n[BEGIN]\n").format_map,
         target="{code}\n[DONE]".format_map, delimiter="", gold=MBPP_TESTS.format_map,
         program="{answer}\n" + MBPP_TESTS, stop=("[DONE]",), metrics=("pass_at_1",), shots=3,
         shot_split="prompt", first_shot=1, short="MBPP"),
    swde("swde", str, short="SWDE"),
    swde("swde_v1", str.strip),
    longbench("samsum", "Summarize the dialogue into a few short sentences. The following are some "
              "examples.", "rouge_score", lambda text, answer, doc: rouge_l(text, answer),
              max_tokens=128, short="SAMSum"),
    longbench("trec", "Please determine the type of the question below. Here are some examples of "
              "questions.", "classification_score", more=("all_classes",), max_tokens=64,
              judge=lambda text, answer, doc: class_score(doc["all_classes"], text, answer),
              short="TREC"),
    *(Task(f"mmlu_{subject}", ("question", "choices", "answer"), hub=("cais/mmlu", subject),
           description="The following are multiple choice questions (with answers) about "
                       f"{subject}.\n\n",
           prompt=lambda doc: lettered(doc, doc["choices"], "ABCD"), short=short,
           choices=lambda doc: list("ABCD"), gold=itemgetter("answer"),
           shot_split="dev", first_shot=0)
      for subject, short in (("econometrics", "EC"), ("marketing", "MK"))),
    # The official 500 test items are reported; the search has the other 500, as in the paper. The
    # harness's copy, bigbio/pubmed_qa, is a loading script, which `datasets` no longer runs.
    Task("pubmedqa", ("CONTEXTS", "QUESTION", "final_decision"),
         hub=("qiaojin/PubMedQA", "pqa_labeled"), resplit=pubmedqa_split,
         prompt=lambda doc: "Abstract: " + "\n".join(doc["CONTEXTS"]) +
                            f"\nQuestion: {doc['QUESTION']}\nAnswer:",
         choices=lambda doc: ["yes", "no", "maybe"], gold=itemgetter("final_decision"),
         splits=("train+validation", "test"), short="PM PubMedQA"),
))


def choice_gold(doc):
    if not (isinstance(doc["choices"], list) and len(doc["choices"]) > 1):
        raise ValueError("'choices' must be a list of two or more")
    return doc["gold"]


def generate_gold(doc):
    stop, length = doc.get("stop", []), doc.get("max_tokens", 1)
    if not (isinstance(stop, list) and all(isinstance(text, str) for text in stop)):
        raise ValueError("'stop' must be a list of texts")
    if type(length) is not int or length < 1:
        raise ValueError("'max_tokens' must be a positive number")
    return doc["answer"]


# The two kinds of items in JSON-lines files: choices to rank, or an answer to write.
CHOICE_FILE = Task("choices", ("context", "choices", "gold"), itemgetter("context"), choice_gold,
                   metrics=BOTH, choices=itemgetter("choices"))
GENERATE_FILE = Task(
    "answers", ("prompt", "answer"), itemgetter("prompt"), generate_gold, ("exact_match",),
    judge=lambda doc, text: {"exact_match": float(text.strip() == doc["answer"].strip())})

# ------------------------------------------------------------------------------------------------
# Documents: from the Hub or from files of the same schema

def read_docs(path):
    """[(place in the file, row)] of a .jsonl, .jsonl.gz or .parquet file. Raises UserError."""
    with blame(f"cannot read {path}"):
        if path.endswith(".parquet"):
            import pyarrow.parquet
            rows = pyarrow.parquet.read_table(path).to_pylist()
            return [(f"{path} row {i}", row) for i, row in enumerate(rows, 1)]
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            lines = [(f"{path} line {i}", line) for i, line in enumerate(file, 1) if line.strip()]
    rows = []
    for place, line in lines:
        with blame(f"{place} is not a JSON object"):
            rows.append((place, dict(json.loads(line))))
    return rows


def hub_docs(task, split):
    """[(place in the dataset, row)] of one split on the Hub. Raises UserError."""
    import datasets
    name, config = task.hub
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would log every retry
    with blame(f"{task.name}: {name}, configuration {config}, split {split}, does not load from "
               "the Hub; accept its terms there and log in, or give --docs (--test-docs, "
               f"--shot-docs), files of rows with the fields {', '.join(task.fields)}; the reason"):
        rows = datasets.load_dataset(name, config, split="train" if task.resplit else split)
        rows = task.resplit(rows, split) if task.resplit else rows
    return [(f"{name} {split} row {i}", row) for i, row in enumerate(rows, 1)]


class Document(dict):
    """One row of a dataset; `place` says where it is, for messages."""


def place_of(doc):
    return getattr(doc, "place", "a document")


def load_docs(task, split, path=None):
    """All documents of a split, or of the local file in its place, each one checked."""
    docs = []
    for place, row in read_docs(str(path)) if path else hub_docs(task, split):
        with blame(place):
            task.check(row)
        docs.append(Document(row))
        docs[-1].place = place
    if not docs:
        raise UserError(f"{path or task.hub[0]} holds no documents")
    return docs


def file_task(path):
    """A JSON-lines file as a task of its own, with its documents."""
    rows = read_docs(str(path))
    task = GENERATE_FILE if rows and "answer" in rows[0][1] else CHOICE_FILE
    return task, load_docs(task, None, path)


def sample(docs, size, seed):
    """A seeded subset and the rest, both in the order of the documents."""
    chosen = set(random.Random(seed).sample(range(len(docs)), min(size, len(docs))))
    return ([doc for i, doc in enumerate(docs) if i in chosen],
            [doc for i, doc in enumerate(docs) if i not in chosen])


def split_docs(task, docs=None, test_docs=None, seed=0, size=500, paper_splits=False):
    """Documents to search on, documents to report, and sentences about them for the user. The
    search gets up to `size` documents that are never reported; a task with one split is cut into
    seeded halves. With `paper_splits`, the paper's rule read literally, the search gets the
    reported documents where there is one split, or validation is reported."""
    searched, reported = task.splits
    if paper_splits and reported in ("validation", searched) and not (docs and test_docs):
        report = load_docs(task, reported, test_docs or docs)
        return report, report, ["--paper-splits: the search sees what is reported, so it leaks"]
    if searched == reported and not test_docs:
        both = load_docs(task, reported, docs)
        search, report = sample(both, len(both) // 2, seed)
    else:
        search, report = load_docs(task, searched, docs), load_docs(task, reported, test_docs)
    seen = {repr(task.requests(doc)) for doc in report}
    clean = [doc for doc in search if repr(task.requests(doc)) not in seen]
    if not clean:
        raise UserError(f"{task.name}: every document to search on is also reported")
    chosen = sample(clean, size, seed)[0]
    notes = [f"{len(chosen)} of {len(search)} documents are used, {len(report)} are reported"]
    if len(clean) < len(search):
        notes.append(f"left out: {len(search) - len(clean)} that are reported too")
    if len(chosen) < 100:
        notes.append(f"with {len(chosen)} documents, one is worth {100 / len(chosen):.1f} points: "
                     "layers will tie, and their order is little more than chance")
    return chosen, report, notes


def draw_shots(task, docs, k, pool, searched=False):
    """The shots of each document: one draw after the other from Random(1234), in their order. On a
    search split, and where the harness scores a validation split, one more is drawn and the
    document itself dropped, so that it is never its own example."""
    pool, shots, draw = pool[task.first_shot:], [], random.Random(1234)
    extra = k > 0 and task.first_shot is None and (searched or task.splits[1] == "validation")
    if k + extra > len(pool):
        raise UserError(f"{task.name}: {k} shots cannot be taken from {len(pool)} documents")

    def others(doc, rows):
        return [row for row in rows if row != doc and not (
            searched and task.prompt(row) == task.prompt(doc))]

    for doc in docs:
        drawn = draw.sample(pool, k + extra) if task.first_shot is None else pool[:k]
        if extra:
            drawn = others(doc, drawn)[:k]
            if len(drawn) < k:          # copies of the document were drawn with it
                drawn = draw.sample(others(doc, pool), k)
        shots.append(drawn)
    return shots


def item_file(name, split):
    """The JSON-lines file of that name, or of the demo task of that name. Raises UserError."""
    path = DEMO / f"{name}-{split}.jsonl"
    if name not in DEMO_TASKS:
        return name
    if not path.exists():
        raise UserError(f"{path} is not here: `python distill.py` makes the demo and its tasks.")
    return path


# ------------------------------------------------------------------------------------------------
# The engine: requests -> tokens -> fixed batches -> log-likelihoods or texts
#
# Shared contexts: the tokens with which all choices of a document begin are read once, their cache
# is repeated for each choice, and then the rest of each choice, its tail, is read.

class Request(NamedTuple):
    """One question to the model: how likely the last `scored` of `tokens` are after the others; or
    for generation at most `max_new` tokens after all of `tokens`, up to a string in `until`."""
    tokens: tuple
    scored: int = 0
    until: tuple = ()
    max_new: int = 0


class Row(NamedTuple):
    """A row of a forward: the tokens `start` to `end`, equal in its members (request numbers)."""
    start: int
    end: int
    members: list

    @property
    def length(self):
        return self.end - self.start


def encode(tokenizer, text, bos=None):
    """Tokens with the tokenizer's special tokens, or with BOS forced on or off, but never twice."""
    start = tokenizer.bos_token
    if bos and start is None:
        raise UserError("--bos: this tokenizer has no BOS token.")
    if bos is False or (start and text.startswith(start)):
        return tokenizer.encode(text, add_special_tokens=False)
    tokens, first = tokenizer.encode(text), [tokenizer.bos_token_id]
    return first + tokens if bos and tokens[:1] != first else tokens


def encode_pair(tokenizer, context, continuation, bos=None):
    """Tokens of a context and its continuation, and the number of the continuation's. As the
    harness does, this encodes the context without trailing white space (n tokens), then both
    together; what follows the first n tokens is scored, even where a token spans the border. An
    empty context is BOS."""
    if context:
        start = encode(tokenizer, context.rstrip(), bos)
        rest = encode(tokenizer, context + continuation, bos)[len(start):]
    else:
        start = [t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None][:1]
        rest = tokenizer.encode(continuation, add_special_tokens=False)
        rest = rest[1:] if start and rest[:1] == start else rest
    return start + rest, len(rest)


class Prepared:
    """A task's documents, tokenised once and cut into fixed batches, to be scored many times. Equal
    requests are asked once. `batches` are lists of Rows that start at token 0, the same for every
    model; the longest come first, so that a batch too large for the memory fails at once."""

    def __init__(self, task, docs, model, tokenizer, batch_size, shots=None, bos=None,
                 whole=False, max_gen_toks=None):
        self.task, self.docs, self.tokenizer, self.bos = task, docs, tokenizer, bos
        self.batch_size, self.max_gen_toks, self.truncated = batch_size, max_gen_toks, 0
        self.of_doc, numbers, new = [], {}, []          # numbers: {request: its number}
        for i, doc in enumerate(docs):
            asked = [self._request(ask, doc, max_length(model) or math.inf)
                     for ask in task.requests(doc, shots[i] if shots else ())]
            known = len(numbers)
            self.of_doc.append([numbers.setdefault(request, len(numbers)) for request in asked])
            new.append(range(known, len(numbers)))
        self.requests = list(numbers)
        longest = reach(model) if task.choices and not whole else 0
        rows = [row for members in new for row in self._rows(members, longest)]
        self.batches = even_batches(sorted(rows, key=lambda row: -row.end), batch_size)

    def _request(self, ask, doc, limit):
        """Tokenise. If too long, a file's item is refused, a named task's is cut on the left."""
        if self.task.choices:
            tokens, scored = encode_pair(self.tokenizer, *ask, self.bos)
            request = Request(tuple(tokens), scored)
            parts = {"context": len(tokens) - scored, "continuation": scored}
        else:
            request = Request(tuple(encode(self.tokenizer, ask[0], self.bos)),
                              until=tuple(ask[1]["until"]),
                              max_new=self.max_gen_toks or ask[1]["max_gen_toks"])
            parts = {"prompt": len(request.tokens)}
        for text, (part, length) in zip(ask, parts.items()):
            if length == 0:
                raise UserError(f"{place_of(doc)}: the {part} {text[-60:]!r} has no tokens.")
        room = limit - request.max_new + (request.scored > 0)   # the last scored token is not read
        if len(request.tokens) <= room:
            return request
        if self.task.hub is None or room <= 0:
            raise UserError(f"{place_of(doc)}: {len(request.tokens)} tokens and {request.max_new} "
                            f"to generate (see --max-gen-toks), but the model's room is {limit}.")
        self.truncated += 1
        return request._replace(tokens=request.tokens[-room:], scored=min(request.scored, room - 1))

    def _rows(self, members, longest):
        """One Row of the tokens that a document's requests share before their first scored token;
        or a Row for each, if they share none or read more than `longest` tokens."""
        asked = [self.requests[i] for i in members]
        shared = os.path.commonprefix([r.tokens[:len(r.tokens) - r.scored] for r in asked])
        if len(asked) > 1 and shared and max(len(r.tokens) for r in asked) - 1 <= longest:
            return [Row(0, len(shared), list(members))]
        return [Row(0, len(request.tokens) - (request.scored > 0), [i])
                for i, request in zip(members, asked)]

    def tails(self, row):
        """What is read after a Row: a Row for each member, empty where there is nothing left."""
        return [Row(row.end, len(self.requests[i].tokens) + self.requests[i].max_new - 1, [i])
                for i in row.members]

    def fingerprint(self):
        return digest(self.task.name, self.docs, self.requests, self.batches)


def even_batches(rows, size):
    """Cut a list into even lists of at most `size` rows, in a number that 2, 4 or 8 ranks share."""
    count = math.ceil(len(rows) / size)
    step = min(8, 1 << (count - 1).bit_length())        # 1, 2, 4 or 8
    count = min(math.ceil(count / step) * step, len(rows))
    edges = [len(rows) * i // count for i in range(count + 1)]
    return [rows[first: end] for first, end in zip(edges, edges[1:])]


def cut(model, rows, size):
    """Cut Rows into forwards of at most `size` rows, each padded to its longest row. A forward ends
    where more padding would take longer than another forward, which costs a CPU as much as some 100
    positions (measured on models of 0.3 M to 9 M parameters), a GPU as much as some thousands."""
    worth = 128 if model.device.type == "cpu" else 8192
    forwards, longest, padding = [], math.inf, 0
    for row in sorted(rows, key=lambda row: -row.length):
        padding += longest - row.length                 # infinite for the first row
        if padding > worth or len(forwards[-1]) == size:
            forwards.append([])
            longest, padding = row.length, 0
        forwards[-1].append(row)
    return forwards


# send(tensor, device) copies a CPU tensor without waiting for the work that a GPU has queued
send = functools.partial(torch.Tensor.to, non_blocking=True)


def pad(rows, left=False):
    """Token ids [B, T] and the mask of real ones, padded on one side."""
    side, rows = "left" if left else "right", [torch.tensor(row) for row in rows]
    return (pad_sequence(rows, True, 0, side),
            pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], True, 0, side))


def read(model, requests, rows, cache=None, past=0):
    """Run one forward of Rows. For each scored token whose predecessor is read, return its request
    and its fp32 log-probability, [N] each. These stay on the device: fetching them means waiting.
    Rows that start at token 0 fill `cache`, if there is one, padded on the left, so that tails
    follow directly. Later ones continue its sequences, one each, of `past` positions. Without a
    cache, and in tails, rows are padded on the right, where no mask is needed."""
    left = cache is not None and past == 0
    ids, real = pad([requests[row.members[0]].tokens[row.start: row.end] for row in rows], left)
    T, kwargs = ids.shape[1], {}
    asked = [(i, b * T + (T if left else row.length) + j - row.end - 1, requests[i].tokens[j])
             for b, row in enumerate(rows) for i in row.members
             for j in range(max(len(requests[i].tokens) - requests[i].scored, row.start + 1),
                            row.end + 1)]
    owners, places, targets = torch.tensor(asked, dtype=torch.long).view(-1, 3).unbind(1)   # [N]
    context = torch.arange(past) >= past - torch.tensor([[row.start] for row in rows])  # [B, past]
    mask = torch.cat([context, real | (past > 0)], 1)                               # [B, past + T]
    if cache is not None and not mask.all():
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]                     # [B, T]
        kwargs = {"attention_mask": send(mask.long(), model.device),
                  "position_ids": send(positions, model.device)}

    def scored_states(head, args):      # its device need not be the model's first
        return args[0].flatten(0, 1).index_select(0, send(places, args[0].device))

    with model.get_output_embeddings().register_forward_pre_hook(scored_states):
        logits = model(send(ids, model.device), past_key_values=cache,
                       use_cache=cache is not None, **kwargs).logits                # [N, V]
    targets = send(targets.unsqueeze(1), logits.device)                             # [N, 1]
    return owners, logits.float().log_softmax(-1).gather(1, targets).squeeze(1)


def repeated(cache, places):
    """A cache that holds copies of the sequences `places` of `cache`, which stays as it is."""
    copies = copy.copy(cache)
    copies.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in copies.layers:         # Qwen3-Next and Falcon-H1 keep their states in dicts
        vars(layer).update({k: dict(v) for k, v in vars(layer).items() if isinstance(v, dict)})
    copies.reorder_cache(places)        # not every layer has batch_select_indices
    return copies


@torch.no_grad()
def answer_batch(model, prepared, batch):
    """{request: summed log-probability of its scored tokens, or greedy continuation as text} for a
    batch of Rows; each Row alone where with padding they would be longer than reach(model)."""
    answer = answer_choices if prepared.task.choices else answer_prompts
    rest = max(tail.length for row in batch for tail in prepared.tails(row))
    alone = max(row.end for row in batch) + rest > reach(model)
    answers = {}
    for part in [[row] for row in batch] if alone else [batch]:
        answers |= answer(model, prepared, part)
    return answers


def answer_choices(model, prepared, batch):
    """Reads the Rows, then the tails of their members, each after a copy of its Row's cache."""
    requests, size, found = prepared.requests, prepared.batch_size, []
    for rows in cut(model, batch, size):
        place = {i: b for b, row in enumerate(rows) for i in row.members}
        tails = [tail for row in rows for tail in prepared.tails(row) if tail.length]
        cache = transformers.DynamicCache(config=model.config) if tails else None
        found.append(read(model, requests, rows, cache))
        for part in cut(model, tails, size):
            places = send(torch.tensor([place[tail.members[0]] for tail in part]), model.device)
            found.append(read(model, requests, part, repeated(cache, places), rows[0].end))
    owners, log_probs = map(torch.cat, zip(*found))
    sums = torch.zeros(len(requests), dtype=torch.float64)
    sums.index_add_(0, owners, log_probs.cpu().double())    # the only wait for the device
    return {i: sums[i].item() for row in batch for i in row.members}


def stop_on_text(tokenizer, stops, prompt_length):
    """A criterion for generate() that ends row b when its new text contains a string of stops[b].
    It decodes only the last tokens: as many as the longest has bytes, and 8 for special tokens."""
    stops = [list(filter(None, row)) for row in stops]
    last = 8 + max((len(stop.encode()) for row in stops for stop in row), default=0)

    def ended(ids, scores, **kwargs):
        recent = ids[:, max(prompt_length, ids.shape[1] - last):].tolist()
        texts = tokenizer.batch_decode(recent, skip_special_tokens=True)
        done = [any(stop in text for stop in row) for text, row in zip(texts, stops)]
        return send(torch.tensor(done), ids.device)
    return ended


def answer_prompts(model, prepared, batch):
    """All prompts go on until the last has ended; Task.score cuts a text at its stop string."""
    tokenizer, numbers = prepared.tokenizer, [row.members[0] for row in batch]
    asked = [prepared.requests[i] for i in numbers]
    ids, real = pad([request.tokens for request in asked], left=True)               # [B, T]
    eos = [tokenizer.eos_token] if tokenizer.eos_token else []  # ends a text as characters, too
    stop = stop_on_text(tokenizer, [[*request.until, *eos] for request in asked], ids.shape[1])
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    new = model.generate(
        send(ids, model.device), attention_mask=send(real.long(), model.device), do_sample=False,
        num_beams=1, max_new_tokens=max(request.max_new for request in asked), pad_token_id=pad_id,
        temperature=None, top_p=None, top_k=None, return_dict_in_generate=False,
        stopping_criteria=transformers.StoppingCriteriaList([stop]))[:, ids.shape[1]:].tolist()
    texts = [tokenizer.decode(row[: request.max_new], skip_special_tokens=True)
             for row, request in zip(new, asked)]
    return {i: text.split(eos[0])[0] if eos else text for i, text in zip(numbers, texts)}


# ------------------------------------------------------------------------------------------------
# Generated code: a fence, not a jail

# `setpriv` takes all rights from a program, `prlimit` bounds it, and `unshare` gives it processes,
# mounts, IPC and a network that no other has. Where root may not unshare, the program runs as
# another user, which keeps less from it.
NAMESPACES = "namespaces, read-only files, no network, limits"
OTHER_USER = "another user, limits; the network and files that anyone may change stay open"
Verdict = collections.namedtuple("Verdict", "passed reason")

# What the interpreter runs. Output goes to memory, limited like a file. The programs that fail in
# code_eval fail here: it takes the names in `gone` away, once the three modules are imported.
INSIDE = """
import builtins, contextlib, json, os, shutil, signal, subprocess, sys
program, verdict, output = json.load(sys.stdin), os.dup(1), os.memfd_create("output")
os.dup2(output, 1), os.dup2(output, 2), os.close(0)
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # ends a program that prints too much
with contextlib.suppress(ImportError):
    [__import__(name) for name in ("multiprocessing", "numpy", "pandas") if name in program]
gone = {builtins: "exit quit help", shutil: "rmtree move chown", subprocess: "Popen",
        os: "kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename "
            "renames truncate replace unlink fchmod fchown chmod chown chroot lchflags lchmod "
            "lchown getcwd chdir"}
for module, name in ((module, name) for module in gone for name in gone[module].split()):
    setattr(module, name, None)
sys.modules.update(dict.fromkeys(("ipdb", "joblib", "resource", "psutil", "tkinter")))
try:
    exec(program, {})  # as in code_eval: no __name__, and SystemExit is a failure
    said = "passed"
except BaseException as error:
    said = f"{type(error).__name__}: {error}"
os.write(verdict, said.encode(errors="replace")[:300])
os._exit(0)
"""


def run_program(program, seconds=3.0, kind=None):
    """Whether `program` ends without an exception in `seconds`, behind the best fence there is."""
    kind, root, uid = kind or fence(), os.getuid() == 0, 61000 + os.getpid() % 4000
    user = f"setpriv --reuid={uid} --regid={uid} --clear-groups" if root else "setpriv"
    command = (f"{user} --no-new-privs --bounding-set=-all --inh-caps=-all timeout --signal=KILL "
               f"{seconds} prlimit --as=2147483648 --fsize=16777216 --nofile=64 --nproc=16 --core=0"
               f" --cpu={int(seconds) + 1} {shlex.join([sys.executable, '-sP', '-c', INSIDE])}")
    with (tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home,
          tempfile.TemporaryFile() as verdict):
        os.chown(home, uid if root else -1, -1)
        if kind == NAMESPACES:  # the first shell is the first process: all others end with it
            apart = "unshare --mount --net --ipc --pid --fork --kill-child sh -c".split()
            apart[1:1] = [] if root else ["--map-root-user"]
            command = shlex.join([*apart, f"{walls(os.path.realpath(home))}{command}; exit $?"])
        environment = {"HOME": home, "TMPDIR": home, "PATH": os.defpath, "LANG": "C.UTF-8",
                       "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        start = time.monotonic()
        try:
            code = subprocess.run(["sh", "-c", f"exec {command}"], cwd=home, env=environment,
                                  input=json.dumps(program).encode(), stdout=verdict,
                                  stderr=verdict, start_new_session=True).returncode
        finally:
            if kind == OTHER_USER:  # one call reaches all its processes: no fork bomb outruns it
                subprocess.run([*user.split(), "sh", "-c", "kill -KILL -1 2>/dev/null"])
        said = os.pread(verdict.fileno(), 300, 0).decode(errors="replace").strip()
    if code:
        said = "timed out" if time.monotonic() - start >= seconds else f"exit code {code}: {said}"
    return Verdict(said == "passed", said or "no verdict")


def walls(home):
    """Shell lines for root of new namespaces: all mounts become read-only; homes, sockets and
    temporary files are covered by a tree in memory, where only Python and an empty `home` are."""
    hidden = [*"/home /root /run /tmp /var/tmp /dev/shm".split(), os.path.expanduser("~"),
              tempfile.gettempdir()]
    hidden = {os.path.realpath(path) for path in hidden if os.path.isdir(path)} - {"/"}
    python = {real(p) for p in (sys.prefix, sys.base_prefix) for real in (str, os.path.realpath)}
    python, hidden, home = (shlex.join(sorted(paths)) for paths in (python, hidden, [home]))
    return f"""set -e; umask 022; echo 1000 >/proc/self/oom_score_adj  # ends first without memory
while read -r _ _ _ _ path options _; do
    case "$options $path/" in ro* | *\\ /proc/* | *\\ /sys/*) continue; esac
    path=$(printf %b "$path")  # a blank in it reads \\\\040
    [ ! -e "$path" ] || mount -o "remount,bind,$options,ro" "$path"
done </proc/self/mountinfo
mount -t tmpfs none /sys
for path in {python} {hidden} {home}; do mkdir -p "/sys$path"; done
for path in {python}; do mount --rbind "$path" "/sys$path"; done
for path in {hidden}; do mount --rbind "/sys$path" "$path"; done
mount -o remount,ro none /sys  # without `none` it would add options that only root may set
mount -t tmpfs -o size=64m none {home}; cd {home}
mount -t proc proc /proc 2>/dev/null || mount -t tmpfs none /proc
"""


@functools.cache
def fence():
    """NAMESPACES, or OTHER_USER if only that works on this system; UserError if neither does."""
    for kind in (NAMESPACES, OTHER_USER)[: 1 if os.getuid() else 2]:
        if (trial := run_program("import collections, math, re, typing", 30.0, kind)).passed:
            return kind
    raise UserError("programs that the model wrote cannot run here, because the fence around them "
                    f"needs Linux with util-linux: {' '.join(trial.reason.split())}")


# ------------------------------------------------------------------------------------------------
# Scores, of a model or of several hybrids that share their lower layers

@dataclasses.dataclass
class Score:
    """A model's score on a task: the mean of `metric` over n items, and every item's values."""
    metric: str
    items: list                         # per document {metric: value}
    outputs: list                       # per document: summed log-likelihoods, or the text

    @property
    def n(self):
        return len(self.items)

    def mean(self, metric=None):
        return math.fsum(item[metric or self.metric] for item in self.items) / self.n

    def stderr(self):
        """Of the mean: sample standard deviation / sqrt(n); 0 for a single item."""
        mean = self.mean()
        squares = math.fsum((item[self.metric] - mean) ** 2 for item in self.items)
        return math.sqrt(squares / max(self.n - 1, 1) / self.n)


def evaluate(model, prepared, metric=None, allow_code=False):
    """Score `model`, with the layers that it has now, on prepared documents -> Score."""
    return evaluate_hybrids(model, prepared, {}, [()], metric, allow_code)[0]


def evaluate_hybrids(model, prepared, mixers, layer_sets, metric=None, allow_code=False,
                     plain=False, cost=None):
    """Score the hybrids of `model` in which each of `layer_sets` (sorted tuples) is replaced by
    mixers[layer] -> their Scores, in that order, on rank 0; None on the others. The hybrids share
    their lower layers on each batch, unless `plain`, and several ranks take turns with the batches.
    Adds search_cost to the Counter `cost`. Raises FloatingPointError for an infinite score."""
    task, scores = prepared.task, []
    batches = progress(prepared.batches[rank()::world_size()], unit="batch", leave=False,
                       desc=f"{task.name} x {len(layer_sets)}")
    done = sum(gather([answer_hybrids(model, prepared, mixers, batch, layer_sets, plain)
                       for batch in batches]), [])
    if rank() > 0:
        return None
    if cost is not None:
        cost.update(search_cost(model, prepared, mixers, layer_sets, plain))
    for layers in layer_sets:
        outputs = {i: answer for answers in done for i, answer in answers[layers].items()}
        per_doc = [[outputs[i] for i in numbers] for numbers in prepared.of_doc]
        for doc, answers in zip(prepared.docs, per_doc):
            if task.choices and not all(map(math.isfinite, answers)):
                raise FloatingPointError(f"{place_of(doc)}: no finite score; linear layers "
                                         f"{list(layers or linear_layers(model))}")
        items = [task.score(*item, allow_code) for item in zip(prepared.docs, per_doc)]
        scores.append(Score(metric or task.metrics[0], items, per_doc))
    return scores


def common_layers(layer_sets, plain):
    """{layer set: how many of its lowest layers are shared}, in the order in which they run. Two
    candidates of a round of Algorithm 1 differ first at the lower of the layers that they replace,
    so the first to run, whose layers are recorded, is the one that replaces the highest layer."""
    first, *others = sorted(set(layer_sets), reverse=True)
    common = {layers: 0 if plain else min(set(layers) ^ set(first)) for layers in others}
    return {first: max(common.values(), default=0), **common}


def search_cost(model, prepared, mixers, layer_sets, plain):
    """A Counter of what evaluate_hybrids runs: layers times tokens ("layer_tokens"), the same
    without sharing ("plain"), and "flops", with the head's where logits are read. Padding is not
    counted, and a generated text counts with its largest length."""
    common = common_layers(layer_sets, plain)
    rows, cost = [row for batch in prepared.batches for row in batch], collections.Counter()
    tails = [tail for row in rows for tail in prepared.tails(row)]
    full, rest = ((sum(row.length for row in part), sum(row.end**2 - row.start**2 for row in part))
                  for part in (rows + tails, () if prepared.task.choices else tails))
    logits = sum(request.scored + request.max_new for request in prepared.requests)
    common[next(iter(common))] = 0                      # the first shares with none before it
    for linear, shared in common.items():
        cost["flops"] += 2 * logits * model.get_output_embeddings().weight.numel()
        with replaced(model, mixers, linear):
            for i, layer in enumerate(decoder_layers(model)):
                run = rest if i < shared else full          # (tokens, squares)
                cost.update(layer_tokens=run[0], plain=full[0],
                            flops=forward_flops(layer, model.config, *run))
    return cost


def answer_hybrids(model, prepared, mixers, batch, layer_sets, plain=False):
    """{layers: {request: answer}} of one batch for each hybrid."""
    if layer_sets == [()]:                      # not every model has layers to replace
        return {(): answer_batch(model, prepared, batch)}
    lower, answers, generates = decoder_layers(model), {}, not prepared.task.choices
    tapes = [collections.deque() for _ in lower]        # (output, cache layer) of each forward
    for layers, count in common_layers(layer_sets, plain).items():
        with replaced(model, mixers, layers), shared_layers(
                lower[:count], tapes, not answers, generates):
            answers[layers] = answer_batch(model, prepared, batch)
    return answers


def layers_can_be_shared(model, prepared, mixers):
    """Whether sharing changes nothing, bit for bit, tried on one request. It would where a layer
    takes more from the layers below than their hidden states (keys and values, say)."""
    layers, batch = sorted(mixers), prepared.batches[-1][-1:]
    sets = [(layers[len(layers) // 2],), (layers[-1],)]
    shared, plain = (answer_hybrids(model, prepared, mixers, batch, sets, plain)
                     for plain in (False, True))
    return repr(shared) == repr(plain)      # NaN is the evaluation's to report


@contextlib.contextmanager
def shared_layers(layers, tapes, record, generates):
    """Within the block the lowest layers, which several hybrids have in common on one batch, record
    on `tapes` what they do, or replay it. All hybrids make the same forwards, so they are replayed
    in the order in which they were recorded; the rest of the model runs as always. Generation
    shares only the forward of the prompt, since the texts of two hybrids differ."""
    def forward(i, original, *args, **kwargs):
        # a layer's argument for the cache has several names
        cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)
        fills = cache is not None and cache.layers[i].get_seq_length() == 0
        if generates and not fills:
            return original(*args, **kwargs)
        if record:
            output = original(*args, **kwargs)
            tapes[i].append((output, copy.copy(cache.layers[i]) if fills else None))
            return output
        output, cache_layer = tapes[i][0]
        tapes[i].rotate(-1)                     # the next hybrid replays the same forwards
        if cache_layer is not None:
            cache.layers[i] = copy.copy(cache_layer)
            if not generates:                   # later forwards ask only for its length
                cache.layers[i].reorder_cache = lambda places: None
        return output

    with contextlib.ExitStack() as stack:
        for i, layer in enumerate(layers):
            stack.enter_context(mock.patch.object(
                layer, "forward", functools.partial(forward, i, layer.forward)))
        yield


# ------------------------------------------------------------------------------------------------
# Decoding speed against the number of linear layers (Figure 2, Table 2's speed-up)
#
# As in Jet-Nemotron: a chunked prefill of random tokens, then decoding of one row and of as many
# copies of it as fit, since the tokens do not change the speed. Every step decodes the token right
# after the context, so that a CUDA graph can replay it. Peak memory includes the modules that
# are swapped out.

CHUNK = 2048                    # tokens of one forward of the prefill
STEPS, REPEATS = 4, 5           # steps timed together; timings, of which the median counts
ON_GPU = [512, 2048, 16384, 65536], [1, 4096]       # contexts; batches, halved until they fit
ON_CPU = [128, 512, 2048], [1, 8]


def prefill(model, ids):
    """A cache that has read ids [1, context]."""
    cache = transformers.DynamicCache(config=model.config)
    for chunk in ids.split(CHUNK, dim=1):
        model.get_decoder()(chunk, past_key_values=cache, use_cache=True)
    return cache


def hold(layer):
    """Let a layer of a cache stay at its length: every new token's keys and values go to the same
    place behind the others, and a linear layer's new state is dropped."""
    if isinstance(layer, linear_attn.LinearCacheLayer):
        layer.__class__ = type("Held", (type(layer),), {"__setattr__": lambda *args: None})
        return
    length, pad_one = layer.get_seq_length(), torch.nn.ZeroPad2d((0, 0, 0, 1))
    all_keys, all_values = layer.keys, layer.values = pad_one(layer.keys), pad_one(layer.values)

    def update(keys, values, *args, **kwargs):                      # [B, kv_heads, 1, D]
        all_keys[:, :, -1:], all_values[:, :, -1:] = keys, values
        return all_keys, all_values                                 # [B, kv_heads, length + 1, D]
    layer.update, layer.get_seq_length = update, lambda: length


def bytes_by_formula(model, context):
    """Of one row's cache. Softmax layer: 2 kv_heads D numbers for every token that it sees; linear
    layer: H D D fp32 numbers, and the last W - 1 inputs of its convolutions."""
    config, total, size = model.config.get_text_config(decoder=True), 0, model.dtype.itemsize
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    convolutions = {"GatedDeltaNet": 3, "JetBlock": 1}          # of H D channels each
    layers = transformers.DynamicCache(config=config).layers
    for attn, layer in zip(attention_modules(model), layers):
        D, seen = linear_attn.head_dim_of(attn, config), context + 1
        if isinstance(attn, linear_attn.LinearAttention):
            tail = (linear_attn.CONV_SIZE - 1) * convolutions.get(type(attn).__name__, 0)
            total += attn.num_heads * D * (4 * D + tail * size)
        else:
            total += 2 * kv_heads * D * min(seen, getattr(layer, "sliding_window", seen)) * size
    return total


def clock(device):
    """Seconds, read when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median_seconds(device, function, calls, repeats):
    """Of one call of `function`: the median of `repeats` timings, after one that warms up."""
    timings = timeit.repeat(function, "pass", lambda: clock(device), repeats + 1, calls)
    return np.median(timings[1:]).item() / calls


@contextlib.contextmanager
def without_masks():
    """Leave out SDPA's masks. A decoded token sees all tokens before it, so it needs none. During a
    capture transformers makes one all the same, since it cannot ask the GPU whether it is needed:
    with it, the base decodes 13 times slower, and linear layers look for padding."""
    masks = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    masks["sdpa"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del masks["sdpa"]           # the one of transformers is seen again


@without_masks()
def time_decoding(model, cache, batch, in_graph):
    """Decode after `batch` copies of the row in `cache` -> what a result's row says of it."""
    if on_gpu := model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ids = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    past = repeated(cache, ids[:, 0])
    for layer in past.layers:
        hold(layer)

    def step():
        logits = model(ids, past_key_values=past, use_cache=True).logits        # [B, 1, V]
        ids.copy_(logits[:, -1:].argmax(-1))

    run = step
    if in_graph:
        for _ in range(3):                      # compiles the kernels, which a capture cannot
            step()
        graph = torch.cuda.CUDAGraph()
        # the outer block goes back to its stream, which a capture that fails does not
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            step()
        run = graph.replay
    seconds = median_seconds(model.device, run, STEPS, REPEATS)
    tensors = [x for layer in past.layers
               for x in getattr(layer, "state", None) or (layer.keys, layer.values)]
    return {"batch": batch, "tokens_per_second": batch / seconds, "step_ms": 1000 * seconds,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
            "cache_bytes": sum(x.nbytes for x in tensors if x is not None)}


def time_batch_that_fits(model, cache, batch, in_graph):
    """The same with `batch` rows or, where memory runs out, with a half, a quarter and so on."""
    try:
        return time_decoding(model, cache, batch, in_graph)
    except RuntimeError as error:               # a capture may end with another error after it
        if batch == 1 or torch.OutOfMemoryError not in (type(error), type(error.__context__)):
            raise
    gc.collect()
    torch.cuda.empty_cache()
    return time_batch_that_fits(model, cache, batch // 2, in_graph)


def way_to_decode(model, mixers):
    """"CUDA graph", where one can capture both base and hybrid, else "eager" and the reason."""
    if model.device.type != "cuda":
        return "eager: CUDA graphs need a GPU"
    for layers in ((), mixers):
        try:
            with replaced(model, mixers, layers):
                ids = torch.zeros(1, 8, dtype=torch.long, device=model.device)
                time_decoding(model, prefill(model, ids), 1, True)
        except RuntimeError as error:
            return f"eager: with {len(layers)} linear layers, {str(error).splitlines()[0]}"
    return "CUDA graph"


def hybrids_to_time(args, model):
    """({number of linear layers: which}, {layer: linear module}, the modules' kind)."""
    if saved := linear_layers(model):
        kinds = [n for n, kind in linear_attn.MIXERS.items() if kind in map(type, model.modules())]
        return {len(saved): ()}, {}, "+".join(kinds)
    attention = attention_modules(model)
    sets = {count: list(range(count)) for count in range(len(attention) + 1)}
    if args.layers_from:
        steps = read_json(args.layers_from)["steps"]
        sets = {0: [], **{len(step["layers"]): step["layers"] for step in steps}}
    counts = args.counts or sorted({0, max(sets) // 2, max(sets)})
    sets = {count: sets[count] for count in counts}
    layers = sorted(set().union(*sets.values()))
    if args.blocks:
        run = read_run(args.blocks.split(",")[0])
        mixers = load_blocks(args.blocks, model, layers)
        return sets, {layer: mixers[layer] for layer in layers}, run["attn"]
    return sets, {layer: linear_attn.MIXERS[args.attn].from_attention(
        attention[layer], model.config, layer, "random").eval() for layer in layers}, args.attn


@torch.no_grad()
def throughput(args):
    """Time every context, hybrid and batch -> the result. OUT/throughput.json is written after
    every row, and the rows that it has already are not timed again."""
    if args.model is None or args.task:
        raise UserError("--throughput takes a --model, and no --task.")
    path = claim_dir(args.out or "out/throughput") / "throughput.json"
    model, _ = load_model(args.model, args.device, args.dtype, args.trust_remote_code)
    if sum(map(bool, (args.blocks, args.attn, linear_layers(model)))) != 1:
        raise UserError("--throughput takes --blocks or --attn, or a saved hybrid as its --model.")
    device, vocabulary = model.device, model.get_input_embeddings()
    on_gpu = device.type == "cuda"
    contexts, batches = ON_GPU if on_gpu else ON_CPU
    contexts = args.contexts or contexts
    tables = {m for m in model.modules() if isinstance(m, torch.nn.Embedding)} - {vocabulary}
    limit = tables and max_length(model) or math.inf
    if not 0 < min(contexts) <= max(contexts) < limit:
        raise UserError(f"--contexts must lie above 0, and below {limit} (the model's positions, "
                        "where they are a table).")
    with blame(f"--blocks, --layers-from and --counts do not go with {args.model}"):
        sets, mixers, kind = hybrids_to_time(args, model)
    decoding = way_to_decode(model, mixers)
    result = {"model": args.model, "fingerprint": fingerprint(model), "mixer": kind,
              "modules": args.blocks or ("random" if args.attn else "saved"),
              "order": args.layers_from or "by number", "dtype": str(model.dtype),
              "device": torch.cuda.get_device_name() if on_gpu else str(device),
              "versions": versions(), "decoding": decoding, "prefill_chunk": CHUNK}
    before = read_json(path) if path.exists() else {**result, "rows": []}
    rows = before.pop("rows")
    if before != result:
        raise UserError(f"{path} has other settings or versions; give another --out.")
    done = {(row["context"], row["linear_layers"], row["asked"]) for row in rows}
    for context, count in itertools.product(contexts, sets):
        to_do = [batch for batch in batches if (context, count, batch) not in done]
        if not to_do:
            continue
        ids = torch.randint(vocabulary.num_embeddings, (1, context),
                            generator=torch.Generator().manual_seed(args.seed)).to(device)
        with replaced(model, mixers, sets[count]):
            seconds = median_seconds(device, lambda: prefill(model, ids), 1, 3)
            cache, layers = prefill(model, ids), linear_layers(model)
            row_bytes = bytes_by_formula(model, context)
            for batch in to_do:
                timed = time_batch_that_fits(model, cache, batch, decoding == "CUDA graph")
                rows.append({"context": context, "linear_layers": count, "asked": batch, **timed,
                             "layers": layers, "prefill_tokens_per_second": context / seconds,
                             "cache_bytes_formula": timed["batch"] * row_bytes})
                write_json(path, {**result, "rows": rows})
                log(f"context {context}, batch {timed['batch']}, {count} linear layers: "
                    f"{timed['tokens_per_second']:,.1f} tokens per second")
    return {**result, "rows": rows}


# ------------------------------------------------------------------------------------------------
# The command line

def add_task_flags(parser):
    add = parser.add_argument
    add("--metric", help="use this metric of the task, not its usual one")
    add("--batch-size", type=positive(int), default=16,
        help="sequences in a forward; in training, sequences in a step")
    add("--limit", type=positive(int), help="use only the first N documents")
    add("--docs", help="local file of a named task's documents to score, search or train on "
        "(.jsonl, .jsonl.gz, .parquet)")
    add("--shot-docs", help="the file that a named task's shots are drawn from")
    add("--shots", type=int, help="examples before each document (default: as the paper's)")
    add("--max-gen-toks", type=positive(int), help="tokens to write (default: the task's number)")
    add("--bos", action=argparse.BooleanOptionalAction, help="force a BOS token on or off")
    add("--whole", action="store_true",
        help="read the context again for each choice, as the harness does")
    add("--seed", type=int, default=0, help="seed of all random draws")
    add("--allow-code-execution", action="store_true", help="run programs that the model writes, "
        "behind a fence of limits, which is not a jail")


def find_task(name, args):
    """A named task, or the task of a file. Raises UserError for what cannot be scored at all."""
    is_file = Path(name).is_file() or name.endswith((".jsonl", ".json", ".jsonl.gz", ".parquet"))
    if name in DEMO_TASKS or is_file and not TASKS.named(name):
        if (args.docs, args.shot_docs, args.shots) != (None, None, None):
            raise UserError(f"--docs, --shot-docs, --shots go with a named task, not with {name}.")
        task, _ = file_task(item_file(name, "validation"))
    else:
        task = TASKS[name]
        task.check_leave(args.allow_code_execution)
        if (args.shots or 0) < 0 or (args.shots and task.shot_split is None):
            raise UserError(f"--shots {args.shots} is no number of examples for {task.name}.")
    if args.metric not in (None, *task.metrics):
        raise UserError(f"{task.name} has no metric {args.metric}; it has "
                        f"{' and '.join(task.metrics)}.")
    return task


def search_documents(args, train=False):
    """(task, metric, {"validation": documents to search on or, with `train`, to train on, "test":
    documents to report, unless a task file came without --test}). Raises UserError."""
    task, files = find_task(args.task, args), {"validation": args.task, "test": args.test}
    if args.test and (task.hub or args.task in DEMO_TASKS):
        raise UserError("--test goes with a --task that is a file; a named task has its own.")
    if task.hub:
        if train and task.splits[0] == task.splits[1]:
            raise UserError(f"{task.name} has one split, so there is nothing to train on.")
        if train:
            task = dataclasses.replace(task, splits=("train", task.splits[1]))
        searched, reported, notes = split_docs(task, args.docs, args.test_docs, args.seed,
                                               args.search_size, args.paper_splits)
        for note in notes:
            log(f"{task.name}: {note}")
        docs = {"validation": searched, "test": reported}
    else:
        if args.task in DEMO_TASKS:
            files["test"] = args.task
        found = {split: file_task(item_file(name, split)) for split, name in files.items() if name}
        if any(other is not task for other, _ in found.values()):
            raise UserError(f"{args.test} and {args.task} are not items of one kind.")
        docs = {split: docs for split, (_, docs) in found.items()}
    return task, args.metric or task.metrics[0], docs


def prepare(task, docs, model, tokenizer, args, searched=False):
    """Documents of one split with their shots, tokenised and in batches."""
    count = task.shots if args.shots is None else args.shots
    docs = docs[: args.limit]
    pool = load_docs(task, task.shot_split, args.shot_docs) if count else []
    shots = draw_shots(task, docs, count, pool, searched)
    prepared = Prepared(task, docs, model, tokenizer, args.batch_size, shots, args.bos,
                        args.whole, args.max_gen_toks)
    if prepared.truncated:
        log(f"{task.name}: {prepared.truncated} of {len(prepared.requests)} requests were longer "
            "than the model's context and lost tokens on the left")
    return prepared


def score_task(name, task, model, tokenizer, args, path):
    """Score one task, print its line, write its items to `path`, if given -> the result, a dict."""
    split = task.splits[1] if task.hub else name
    tables = read_json(PAPER)["tables"] if PAPER.exists() else {}      # eval.py may be a copy
    paper = tables.get(f"Table 1, {Path(args.model).name}", {}).get(task.name, {}).get("base")
    docs = (load_docs(task, split, args.docs) if task.hub
            else file_task(item_file(name, "test"))[1])
    prepared = prepare(task, docs, model, tokenizer, args)
    for number, request in enumerate(prepared.requests[: args.show]):
        log(f"--- request {number}\n{tokenizer.decode(request.tokens)}\n{request}")
    if task.program:
        log(f"programs run behind a fence: {fence()}")
    score = evaluate(model, prepared, args.metric, args.allow_code_execution)
    result = {"task": name, "split": split, "n": score.n, "metric": score.metric,
              "value": score.mean(), "stderr": score.stderr(), "truncated": prepared.truncated,
              "metrics": {m: score.mean(m) for m in score.items[0]}, "paper": paper}
    log(f"{name}: {score.metric} {result['value']:.4f} +- {result['stderr']:.4f} (n = {score.n}; "
        f"paper: {paper or 'no number'}); "
        + ", ".join(f"{m} {v:.4f}" for m, v in result["metrics"].items()))
    if path:
        rows = [{"place": place_of(doc), "outputs": outputs, **item}
                for doc, outputs, item in zip(prepared.docs, score.outputs, score.items)]
        write_lines(path, rows)
        result["items"] = str(path)
    return result


def parse_args():
    def numbers(text):
        return [int(part) for part in text.split(",")]

    parser = ArgumentParser(__doc__)
    add_model_flags(parser)
    add_task_flags(parser)
    parser.add_argument("--task", help="comma-separated: .jsonl files, or of "
                        + ", ".join([*DEMO_TASKS, *TASKS]))
    parser.add_argument("--show", type=positive(int), default=0, metavar="N",
                        help="print the first N requests as the model sees them")
    parser.add_argument("--out", help="directory for the per-item results, one .jsonl per task")
    add = parser.add_argument_group("decoding speed").add_argument
    add("--throughput", action="store_true", help="measure it at several numbers of linear layers")
    add("--blocks", help="a run of distill.py, whose modules are timed")
    add("--attn", choices=list(linear_attn.MIXERS), help="random modules, without --blocks")
    add("--layers-from", help="a result.json of replace.py, for the order of the layers")
    add("--contexts", type=numbers, help=f"default {ON_GPU[0]}, on a CPU {ON_CPU[0]} tokens")
    add("--counts", type=numbers, help="numbers of linear layers (default: none, half, all)")
    return parser.parse_args()


def main():
    args, following = parse_args(), None
    if args.throughput:
        return finish(throughput(args))
    if args.blocks or args.layers_from or args.attn or args.contexts or args.counts:
        raise UserError("--blocks, --layers-from, --attn, --contexts, --counts need --throughput.")
    if args.model is None:
        item_file("copy", "test")               # refuses where there is no demo
        args.model, args.out = str(DEMO / "teacher"), args.out or str(DEMO)
        args.task, following = args.task or ",".join(DEMO_TASKS), "python replace.py"
    if args.task is None:
        raise UserError("--task is missing (see --help).")
    names = args.task.split(",")
    tasks = [find_task(name, args) for name in names]
    stems = [Path(name).stem for name in names]
    if len(set(stems)) < len(stems):            # files of one name in several folders
        stems = [f"{number}-{stem}" for number, stem in enumerate(stems, 1)]
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.trust_remote_code)
    results = [score_task(name, task, model, tokenizer, args,
                          args.out and Path(args.out, f"{stem}-items.jsonl"))
               for name, task, stem in zip(names, tasks, stems)]
    settings = ("shots", "limit", "seed", "bos", "batch_size", "whole", "max_gen_toks")
    finish({"model": args.model, "linear_layers": linear_layers(model), "dtype": str(model.dtype),
            "device": str(model.device), "settings": {k: getattr(args, k) for k in settings},
            "versions": versions(), "results": results}, following)


if __name__ == "__main__":
    run_script(main)
