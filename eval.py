"""Score a causal language model, or a hybrid of it, on a task.

    python eval.py                                              # the demo: offline, CPU
    python eval.py --model out/demo/copy/opt --task copy
    python eval.py --model Qwen/Qwen2.5-1.5B --task arc_challenge,pubmedqa
    python eval.py --model M --task items.jsonl --metric acc_norm

A task is one of the eighteen of the paper, by the names of lm-evaluation-harness (0.4.13) or of
the paper, scored exactly as the harness scores them; or a file with one JSON object per line:

    {"context": "...", "choices": ["...", "..."], "gold": 0}    log-likelihood of each choice
    {"prompt": "...", "answer": "...", "stop": ["\\n"], "max_tokens": 32}     greedy generation

Of choices the continuation is a space and the choice; `acc` takes the largest summed
log-likelihood, `acc_norm` the largest per character. Log-softmax in fp32, sums in fp64. The last
line on stdout is the result as one JSON object.
"""

import argparse
import ast
import collections
import contextlib
import copy
import datetime
import fcntl
import functools
import gzip
import hashlib
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
import warnings
import zlib
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

try:
    import numpy as np
    import torch
    import torch.distributed as dist
    import transformers
    from safetensors import SafetensorError
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer, Cache
    from transformers.utils.import_utils import is_kernels_available

    if is_kernels_available():
        raise ImportError("the pip package 'kernels' is hidden by the kernels.py of this folder, "
                          "which transformers would load in its place; uninstall that package")
    import linear_attn
    from linear_attn import (
        UserError, attention_modules, decoder_layers, linear_layers, replaced)
except ImportError as error:
    sys.exit(f"cannot start: {error}. Set up with: pip install -r requirements.txt")

DEMO = Path("out/demo")
DEMO_TASKS = ("copy", "chain")


# ------------------------------------------------------------------------------------------------
# What the scripts share: messages, files, command lines

def log(message):
    """One line for people, on stderr, without breaking a progress bar; from rank 0 alone."""
    if rank() == 0:
        tqdm.write(message, file=sys.stderr)


def progress(iterable=None, disable=False, **kwargs):
    return tqdm(iterable, file=sys.stderr, dynamic_ncols=True, mininterval=0.5,
                disable=disable or rank() > 0, **kwargs)


def finish(result, following=None):
    """The last stdout line: `result` as JSON, with the command to run next."""
    result["next"] = following
    if following:
        log(f"next: {following}")
    if rank() == 0:
        print(json.dumps(result), flush=True)


class ArgumentParser(argparse.ArgumentParser):
    """Bad flags are answered like all bad input: one sentence on stderr, exit code 2."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def run_script(main):
    """Run main(); a user's mistake ends with one sentence and exit code 2, a failure during work
    (not finite, disk full) with one sentence and exit code 1."""
    name = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_say(
        f"{name}: terminated; what was saved before is intact", 143)))
    # the newest transformers has another name for this argument, but takes the one all know
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
    try:
        main()
    except UserError as error:
        sys.exit(_say(f"{name}: {error}", 2))
    except (FloatingPointError, OSError, SafetensorError, torch.OutOfMemoryError) as error:
        sys.exit(_say(f"{name}: stopped: {error}; what was saved before is intact", 1))
    except KeyboardInterrupt:
        sys.exit(_say(f"{name}: interrupted; what was saved before is intact", 130))
    finally:
        _locks.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def _say(message, code):
    print(" ".join(message.split()), file=sys.stderr)
    return code


def command_line():
    """The command that runs now, for people to run it again."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def positive(kind):
    """An argparse type: a number of type `kind` above zero."""
    def parse(text):
        value = kind(text)
        if not value > 0 or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return value
    parse.__name__ = "positive " + kind.__name__
    return parse


def write_atomic(path, write):
    """Call write(temporary path), fsync, rename: `path` is the old file or the new, never part
    of one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=1) + "\n"))


def digest(*values):
    """A short fingerprint of JSON-able values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def code_version():
    """Fingerprint of every source file that a score depends on."""
    folder = Path(__file__).parent
    return digest([(folder / f).read_text() for f in ("kernels.py", "linear_attn.py", "eval.py")])


def versions():
    return {"torch": torch.__version__, "transformers": transformers.__version__,
            "python": sys.version.split()[0], "code": code_version()}


def make_output_dir(path):
    """Create the run directory, with one sentence where that cannot be."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; --out must be a directory.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the directory {path}: {error.strerror}.")
    return path


def lock_dir(path):
    """Keep other runs out of the directory until run_script or the process ends, however."""
    if rank() == 0:
        lock = open(path / ".lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another run is at work in {path}; wait for it, or give another --out.")
        _locks.append(lock)             # it holds while this file is open


_locks = []


def parse_layers(text, num_layers):
    """"3,7-12" -> [3, 7, ..., 12]. Raises UserError if not numbers of layers of the model."""
    layers = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"--layers takes numbers and ranges such as 3,7-12, not {text!r}.")
        layers |= set(range(int(first), int(last or first) + 1)) or {-1}
    if not all(0 <= layer < num_layers for layer in layers):
        raise UserError(f"--layers {text} is out of range: the model has layers 0 to "
                        f"{num_layers - 1}.")
    return sorted(layers)


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
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                            timeout=datetime.timedelta(days=1))


def gather(value):
    """[the value that each rank brought], on every rank. Raises ConnectionError if one has died."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    with lost_ranks_end_the_run():
        dist.all_gather_object(values, value)
    return values


def add_up(tensor):
    """The sum of every rank's tensor, in place."""
    if world_size() > 1:
        with lost_ranks_end_the_run():
            dist.all_reduce(tensor)
    return tensor


@contextlib.contextmanager
def lost_ranks_end_the_run():
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError("another process of this run has ended; the same command goes on "
                              f"from what is saved ({str(error).splitlines()[0][:100]})") from None


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


def read_config(name, trust_remote_code=False):
    """The raw config of a model (a dict), from a directory or the Hub. Raises UserError."""
    here, there = Path(name).exists(), (Path(name) / "config.json").is_file()
    if not there and (name.lower().endswith("gguf") or list(Path(name).glob("*.gguf"))):
        raise UserError(f"{name} is GGUF: convert it first, with from_pretrained(FOLDER, "
                        "gguf_file=FILE) and save_pretrained(OUT) of AutoModelForCausalLM and of "
                        "AutoTokenizer.")
    if here and not there:
        raise UserError(f"{name} holds no config.json, so it is not a model directory.")
    try:
        config, _ = transformers.PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError):
        config = {}
    if not config:
        raise UserError(f"no such model: {name} is neither a directory here nor, as far as can be "
                        "seen from this machine, a model on the Hub.")
    if "auto_map" in config and not is_hybrid(config) and not trust_remote_code:
        raise UserError(f"{name} brings its own code; add --trust-remote-code to run it.")
    return config


def is_hybrid(config):
    return str(config.get("model_type")).startswith(linear_attn.MODEL_TYPE_PREFIX)


def load_model(name, device="cpu", dtype="auto", trust_remote_code=False, base_only=False):
    """(model, tokenizer): the model in eval mode, without gradients, on `device`.

    A hybrid saved by replace.py is loaded with the classes of linear_attn.py; with `base_only`
    it is refused, and so is a model that cannot be converted. Raises UserError for whatever is
    not a causal language model with a tokenizer, and for a checkpoint that lacks tensors.
    """
    config = read_config(name, trust_remote_code)
    if base_only and is_hybrid(config):
        raise UserError(f"{name} is already a hybrid; give the base model it was made from.")
    quantised = config.get("quantization_config") is not None
    if base_only and quantised:
        raise UserError(f"{name} is quantised, and such layers are neither distilled nor "
                        "replaced: give the model in bf16, or what its dequantize() and then "
                        "save_pretrained() make.")
    kwargs = {"device_map": "auto"} if device == "auto" else {}
    device = find_device(device)
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    kwargs["dtype"] = getattr(torch, dtype)
    load = linear_attn.load_hybrid if is_hybrid(config) else functools.partial(
        AutoModelForCausalLM.from_pretrained, trust_remote_code=trust_remote_code)
    try:
        model, info = load(name, output_loading_info=True, **kwargs)
        if info["missing_keys"]:
            raise ValueError(f"its checkpoint has no {min(info['missing_keys'])}")
        if "device_map" not in kwargs and not quantised:        # those are where they must be
            model = model.to(device)
        model = model.eval().requires_grad_(False)
        if model.config.is_encoder_decoder or not is_causal(model):
            raise ValueError("it is not causal, a token sees those after it")
        tokenizer = AutoTokenizer.from_pretrained(name, config=model.config,
                                                  trust_remote_code=trust_remote_code)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        advice = "; load it unquantised, in bf16" if quantised else (
            "; take what its config.json says of attention out" if "Attention" in reason else "")
        raise UserError(f"{name} does not load as a causal language model with a tokenizer: "
                        f"{reason}{advice}")
    if base_only:
        check_replaceable(model)
    return model, tokenizer


@torch.no_grad()
def check_replaceable(model):
    """Raise UserError if the model does not run with every second layer linear, be it the even or
    the odd ones: some layers hand keys and values on, or get a mask that no linear layer reads."""
    attention = attention_modules(model)
    mixer = functools.cache(lambda device: linear_attn.MIXERS["gla"](
        attention[0], model.config, 0, "random").to(device, model.dtype))
    stand_ins = {i: mixer(next(attn.parameters()).device) for i, attn in enumerate(attention)}
    for first in (0, 1):
        try:
            with replaced(model, stand_ins, range(first, len(attention), 2)):
                model(torch.tensor([[0, 1]], device=model.device), use_cache=False)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{type(model).__name__}: its layers cannot be replaced one by one "
                            f"({type(error).__name__}: {reason}); this model cannot be converted.")


@torch.no_grad()
def is_causal(model):
    """Whether the first prediction stays the same when the second token changes."""
    ids = torch.tensor([[0, 1], [0, 2]], device=model.device)
    first, other = model(ids, use_cache=False).logits[:, 0].float()             # [V] each
    return not (first - other).abs().max() > 1e-4 * first.abs().max()           # NaN is not its task


def dtype_to_save(name, model, asked):
    """The dtype of a hybrid's checkpoint: the model's, but if --dtype was not `asked` for ("auto")
    never wider than the base's own, since a CPU holds all models in fp32."""
    config = read_config(name, trust_remote_code=True)
    own = next((part[key] for part in (config, config.get("text_config") or {})
                for key in ("dtype", "torch_dtype") if part.get(key)), "float32")
    own = getattr(torch, own)
    return own if asked == "auto" and own.itemsize < model.dtype.itemsize else model.dtype


def find_device(name):
    """The device of that name; under torchrun each process has a GPU of its own."""
    if name == "auto":
        if not transformers.utils.is_accelerate_available():
            raise UserError("--device auto spreads a model over several GPUs with accelerate, "
                            "which is not installed: pip install accelerate.")
        if world_size() > 1:
            raise UserError("--device auto gives one process all GPUs; start it without torchrun.")
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device == torch.device("cuda") and world_size() > 1:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"--device {name} cannot be used here: {reason}")


def max_length(model):
    """The longest input in tokens, or None where the config names no limit."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def reach(model):
    """How many positions a forward may have, padding and what a cache holds included: no more than
    a table of positions has, nor, of RoPE whose factors change with the length (longrope), than
    are read with its first factors. A longer request is read whole and unpadded."""
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]
    return min([max_length(model) or math.inf] + [
        kind["original_max_position_embeddings"] for kind in kinds
        if kind.get("rope_type") == "longrope"])


def fingerprint(model):
    """Of the weights, from an even sample of every tensor, in bf16: the same whether the model
    was loaded in fp32 or in bf16."""
    sha = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        sample = tensor.flatten()[:: max(1, tensor.numel() // 1024)].to(torch.bfloat16)
        sha.update(f"{name}{tuple(tensor.shape)}".encode())
        sha.update(sample.cpu().view(torch.int16).numpy().tobytes())
    return sha.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------
# Tasks: what the model is asked, and how its answer becomes a number

# A document is one row of a task's dataset, a dict. A new task is one more entry in the table
# below: where its documents are, the prompt, and either the choices and which is right, or stop
# strings and a function that judges the text. Every quirk is the harness's own, kept so that
# numbers can be compared (EleutherAI/lm-evaluation-harness, release 0.4.13, lm_eval/tasks).

MODELS = ("Qwen2.5-1.5B", "Llama-3.2-3B-Instruct", "Llama-3.1-8B-Instruct")
NEVER = "none of the choices"  # the gold answer of an item that no model can get right


@dataclass(frozen=True)
class Task:
    """One benchmark. The functions take a document; without `choices` the model writes text."""

    name: str
    fields: tuple               # what every document must have
    prompt: Callable            # the text that the model continues
    gold: Callable              # index or text of the right choice, or the reference; may fail
    metric: str                 # the one the paper most likely reports
    metrics: tuple = ()         # all that the harness prints; without any, just that one
    choices: Callable = None
    contexts: Callable = None   # a prompt per choice, each continued by `target`
    stop: tuple = ()
    max_tokens: int = 256       # the harness's number where a task names none
    judge: Callable = None      # document, text -> metrics
    program: Callable = None    # document, text -> program that fails unless the text is right
    description: str = ""
    target: Callable = None     # the answer that a shot shows, if it is not the right choice
    delimiter: str = " "        # between prompt and answer
    shots: int = 0
    shot_split: str = "train"   # None: the task takes no shots
    first_shots: bool = False   # the first k for every document, not a draw for each
    fixed_shots: tuple = ()
    hub: tuple = None           # dataset and configuration
    splits: tuple = None        # the split to search on and the split to report, see split_docs
    resplit: Callable = None    # rows, split -> rows, where the Hub has all in one split, train
    short: str = ""             # the paper's names
    paper: dict = None          # the paper's score of each of MODELS in percent, nothing replaced

    def requests(self, doc, shots=None):
        """What to ask: [(context, continuation)] by choice, or [(prompt, {until, max_gen_toks})].

        `shots` are documents, shown solved before this one; None stands for the fixed ones."""
        shots = self.fixed_shots if shots is None else shots
        head = self.description + "".join(self.shot(shot) for shot in shots)
        if self.contexts:
            rest = self.delimiter + self.target(doc)
            return [(head + context, rest) for context in self.contexts(doc)]
        prompt = head + self.prompt(doc)
        if self.choices:
            return [(prompt, self.delimiter + choice) for choice in self.choices(doc)]
        return [(prompt, self.limits(doc))]

    def shot(self, doc):
        """A solved example, with the first of several answers. Where a target is empty the harness
        leaves out the blank line too."""
        if not self.target and self.right(doc) is NEVER:
            raise UserError(f"{place_of(doc)} cannot be a shot: none of its choices is right")
        answer = self.target(doc) if self.target else self.choices(doc)[self.right(doc)]
        if self.target and not answer:
            return self.prompt(doc)
        answer = answer[0] if isinstance(answer, list) else answer
        return self.prompt(doc) + self.delimiter + answer + "\n\n"

    def right(self, doc):
        """Index of the right choice."""
        gold, choices = self.gold(doc), self.choices(doc)
        return choices.index(gold) if gold in choices else gold

    def limits(self, doc):  # an item of a JSON-lines file may bring its own
        return {"until": list(doc.get("stop", self.stop)),
                "max_gen_toks": doc.get("max_tokens", self.max_tokens)}

    def score(self, doc, outputs, allow_code=False):
        """Metrics from the summed log-likelihoods in request order, or from [the text written]."""
        if self.choices:
            return self.accuracy(doc, np.array(outputs, dtype=np.float64))
        text, = outputs
        for stop in filter(None, self.limits(doc)["until"]):
            text = text.split(stop)[0]
        if self.judge:
            return self.judge(doc, text)
        if not allow_code:
            raise UserError(f"{self.name} runs programs that the model wrote: allow it with "
                            "--allow-code-execution (they run behind a fence, not in a jail)")
        return {self.metric: float(run_program(self.program(doc, text)).passed)}

    def accuracy(self, doc, lls):
        """The first maximum wins. acc_norm is per character; an empty choice counts -inf."""
        choices, gold = self.choices(doc), self.right(doc)
        assert len(lls) == len(choices), f"{len(lls)} scores for {len(choices)} choices"
        with np.errstate(divide="ignore", invalid="ignore"):
            by = {"acc": lls, "acc_norm": lls / np.array([len(choice) for choice in choices])}
        return {m: float(np.argmax(by[m]) == gold) for m in self.metrics or (self.metric,)}

    @property
    def generates(self):
        return not self.choices

    def check(self, doc):
        """Raise UserError, saying why, unless the document can be asked and its gold parses."""
        if not isinstance(doc, dict):
            raise UserError("not a JSON object")
        check_json(doc)
        missing = [field for field in self.fields if doc.get(field) is None]
        if missing:
            raise UserError(f"no field {missing[0]!r}; {self.name} needs {', '.join(self.fields)}")
        try:
            requests = self.requests(doc)
            gold = self.right(doc) if self.choices else self.gold(doc)
        except (LookupError, TypeError, ValueError, AttributeError, SyntaxError) as error:
            reason = error if isinstance(error, ValueError) else repr(error)
            raise UserError(f"not a document of {self.name}: {reason}") from None
        texts = gold if isinstance(gold, list) else [gold]
        if self.choices:
            right = gold is NEVER or type(gold) is int and 0 <= gold < len(requests)
            if not (requests and right):
                raise UserError(f"the gold answer is {gold!r}, there are {len(requests)} choices")
        elif not (texts and all(isinstance(text, str) for text in texts)):
            raise UserError(f"the gold answer {gold!r} is not a text")


def check_json(doc):
    """Raise UserError unless every field can be written as JSON in UTF-8, as fingerprints need."""
    for field, value in doc.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"field {field!r} holds {error.object[error.start]!r}, one half of a "
                            "surrogate pair, which is no character: mend the text") from None
        except (TypeError, RecursionError) as error:
            raise UserError(f"field {field!r} cannot be written as JSON ({error}): drop it, or "
                            "make a text of it") from None


def paper(*scores):
    return dict(zip(MODELS, scores, strict=True))


def lettered(doc, choices, letters):
    """A question and its lettered choices, as CommonsenseQA and MMLU print them."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices[:len(letters)],
                                                             strict=True)]
    return "\n".join([doc["question"].strip(), *lines, "Answer:"])


def hellaswag_clean(text):
    """WikiHow's [tags] go, in one pass; a text that began with a tag keeps the space behind it."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def hellaswag_prompt(doc):
    # capitalize() also lower-cases all the rest; the field `ctx` is not used.
    return hellaswag_clean(f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}")


def winogrande_contexts(doc):
    """The sentence up to the blank, filled in both ways."""
    before = doc["sentence"][:doc["sentence"].index("_")]
    return [before + doc["option1"], before + doc["option2"]]


def winogrande_gold(doc):
    return ["1", "2"].index(doc["answer"])


def mathqa_choices(doc):
    """Five options cut from one string; a comma and a space inside an option end it."""
    found = re.findall(r"[abcd] \) .*?, |e \) .*?$", doc["options"])
    return [option[4:].rstrip(" ,") for option in found]


def mathqa_gold(doc):
    gold = list("abcde").index(doc["correct"])
    return gold if gold < len(mathqa_choices(doc)) else NEVER


def gsm8k_bare(text):
    """What is compared: no commas, no dollars, nothing up to the last '#### ', no full stop."""
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


def humaneval_test(doc):
    return f"{doc['test']}\ncheck({doc['entry_point']})"


def mbpp_tests(doc):
    first, second, third = doc["test_list"][:3]
    return f"{first}\n{second}\n{third}"


def parsed(program):
    """The program, if it is Python."""
    ast.parse(program)
    return program


def swde_judge(value, text):
    return {"contains": int(bool(re.search(re.escape(value), text, re.IGNORECASE)))}


def lcs_words(x, y):
    """The words of a longest common subsequence; between equals the one that `rouge` takes."""
    table = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, word in enumerate(x, 1):
        for j, other in enumerate(y, 1):
            same = table[i - 1][j - 1] + 1
            table[i][j] = same if word == other else max(table[i - 1][j], table[i][j - 1])
    words, i, j = set(), len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            words.add(x[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def rouge_l(prediction, reference):
    """ROUGE-L F of the package `rouge` 1.0.1: sentences end at '.', a word counts once."""
    ours, theirs = ([" ".join(sentence.split()).split(" ") for sentence in text.split(".")
                     if sentence] for text in (prediction, reference))
    if not ours or not theirs:
        return 0.0
    common = len(set().union(*(lcs_words(x, y) for x in theirs for y in ours)))
    precision, recall = common / len(set().union(*ours)), common / len(set().union(*theirs))
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def samsum_judge(doc, text):
    best = max(0.0, *(rouge_l(text.strip(), answer) for answer in doc["answers"]))
    return {"score": best, "rouge_score": best}


def class_score(classes, text, gold):
    """1 / (number of classes that the text names) if the right one is among them."""
    named = [name for name in classes if name in text]
    for name in named:  # LongBench shortens the list it walks, and so skips the next name
        if name in gold and name != gold:
            named.remove(name)
    return 1.0 / len(named) if gold in named else 0.0


def trec_judge(doc, text):
    classes = doc["all_classes"]
    best = max(0.0, *(class_score(classes, text.strip(), gold) for gold in doc["answers"]))
    return {"score": best, "classification_score": best}


MBPP_SHOTS = (  # rows 2, 3 and 4 of the dataset, carriage returns and all
    {"text": "Write a function to find the similar elements from the given two tuple lists.",
     "code": "def similar_elements(test_tup1, test_tup2):\r\n"
             "  res = tuple(set(test_tup1) & set(test_tup2))\r\n  return (res) ",
     "test_list": ["assert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)",
                   "assert similar_elements((1, 2, 3, 4),(5, 4, 3, 7)) == (3, 4)",
                   "assert similar_elements((11, 12, 14, 13),(17, 15, 14, 13)) == (13, 14)"]},
    {"text": "Write a python function to identify non-prime numbers.",
     "code": "import math\r\ndef is_not_prime(n):\r\n    result = False\r\n"
             "    for i in range(2,int(math.sqrt(n)) + 1):\r\n        if n % i == 0:\r\n"
             "            result = True\r\n    return result",
     "test_list": ["assert is_not_prime(2) == False", "assert is_not_prime(10) == True",
                   "assert is_not_prime(35) == True"]},
    {"text": "Write a function to find the largest integers from a given list of numbers using "
             "heap queue algorithm.",
     "code": "import heapq as hq\r\ndef heap_queue_largest(nums,n):\r\n"
             "  largest_nums = hq.nlargest(n, nums)\r\n  return largest_nums",
     "test_list": [f"assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],{n})=={top}"
                   for n, top in ((3, "[85, 75, 65] "), (2, "[85, 75] "),
                                  (5, "[85, 75, 65, 58, 35]"))]})

PUBMEDQA_TEST = "178ce354f19c0b3b"  # digest of the official test items' sorted numbers


def pubmedqa_split(rows, split):
    """Of the 1,000 labelled rows the official test set, or the rest for any other split, with the
    fields of the original files. Made as its authors made it (pubmedqa/pubmedqa on GitHub,
    split_dataset.py). Raises ValueError if these rows, in this order, do not give that set."""
    draw, test = random.Random(0), []
    for label in ("yes", "no", "maybe"):
        labelled = [row["pubid"] for row in rows if row["final_decision"] == label]
        draw.shuffle(labelled)
        test += labelled[math.ceil(len(labelled) / 2):]
    if digest(sorted(map(int, test))) != PUBMEDQA_TEST:
        raise ValueError("the rows in their order there do not give the official test set")
    row_of = {row["pubid"]: {"pubid": row["pubid"], "CONTEXTS": row["context"]["contexts"],
                             "QUESTION": row["question"], "final_decision": row["final_decision"]}
              for row in rows}
    return [row_of[i] for i in (test if split == "test" else [i for i in row_of if i not in test])]


# Settings that several tasks share.
BOTH = dict(metrics=("acc", "acc_norm"))
VALIDATED = dict(splits=("validation", "test"))
HIDDEN = dict(splits=("train", "validation"))  # the test labels are secret: validation is reported

ARC = dict(
    fields=("question", "choices", "answerKey"), metric="acc_norm", **BOTH, **VALIDATED,
    prompt=lambda doc: f"Question: {doc['question']}\nAnswer:",
    choices=lambda doc: doc["choices"]["text"],
    gold=lambda doc: doc["choices"]["label"].index(doc["answerKey"]))

SWDE = dict(
    fields=("text", "value"), hub=("hazyresearch/based-swde-v2", "default"), metric="contains",
    gold=lambda doc: doc["value"], stop=("\n",), max_tokens=48,
    splits=("validation", "validation"), shot_split=None)

LONGBENCH = dict(
    gold=lambda doc: doc["answers"], target=lambda doc: doc["answers"], delimiter="",
    stop=("\n",), metric="score", splits=("test", "test"), shot_split=None)


def mmlu(subject, **rest):
    return Task(
        f"mmlu_{subject}", ("question", "choices", "answer"), hub=("cais/mmlu", subject),
        description="The following are multiple choice questions (with answers) about "
                    f"{subject}.\n\n",
        prompt=lambda doc: lettered(doc, doc["choices"], "ABCD"),
        choices=lambda doc: list("ABCD"), gold=lambda doc: doc["answer"],
        metric="acc", shot_split="dev", first_shots=True, **VALIDATED, **rest)


TASK_LIST = (
    Task("arc_challenge", hub=("allenai/ai2_arc", "ARC-Challenge"), **ARC,
         short="ArcC", paper=paper(45.1, 46.4, 55.0)),
    Task("arc_easy", hub=("allenai/ai2_arc", "ARC-Easy"), **ARC,
         short="ArcE", paper=paper(72.0, 67.9, 79.6)),
    Task("boolq", ("passage", "question", "label"), hub=("aps/super_glue", "boolq"),
         prompt=lambda doc: f"{doc['passage']}\nQuestion: {doc['question']}?\nAnswer:",
         choices=lambda doc: ["no", "yes"],         # SuperGLUE's own files have true and false
         gold=lambda doc: int(doc["label"]) if doc["label"] in (False, True) else doc["label"],
         metric="acc", **HIDDEN, short="BQ BoolQ", paper=paper(73.0, 78.5, 84.2)),
    Task("commonsense_qa", ("question", "choices", "answerKey"), hub=("tau/commonsense_qa", None),
         prompt=lambda doc: "Question: " + lettered(doc, doc["choices"]["text"], "ABCDE"),
         choices=lambda doc: list("ABCDE"), gold=lambda doc: doc["answerKey"],
         metric="acc", **HIDDEN, short="CQ", paper=paper(75.2, 67.7, 77.2)),
    Task("hellaswag", ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
         hub=("Rowan/hellaswag", None), prompt=hellaswag_prompt,
         choices=lambda doc: [hellaswag_clean(ending) for ending in doc["endings"]],
         gold=lambda doc: list("0123").index(str(doc["label"])),
         metric="acc", **BOTH, **HIDDEN, short="HS", paper=paper(50.1, 52.4, 59.2)),
    Task("openbookqa", ("question_stem", "choices", "answerKey"),
         hub=("allenai/openbookqa", "main"), prompt=lambda doc: doc["question_stem"],
         choices=lambda doc: doc["choices"]["text"],
         gold=lambda doc: doc["choices"]["label"].index(doc["answerKey"].lstrip()),
         metric="acc_norm", **BOTH, **VALIDATED, short="OBQA OBA", paper=paper(40.6, 36.0, 43.4)),
    Task("piqa", ("goal", "sol1", "sol2", "label"), hub=("baber/piqa", None),
         prompt=lambda doc: f"Question: {doc['goal']}\nAnswer:",
         choices=lambda doc: [doc["sol1"], doc["sol2"]], gold=lambda doc: doc["label"],
         metric="acc", **BOTH, **HIDDEN, short="PIQA", paper=paper(75.7, 75.5, 80.0)),
    # What is scored is the rest of the sentence behind each option, not the option.
    Task("winogrande", ("sentence", "option1", "option2", "answer"),
         hub=("allenai/winogrande", "winogrande_xl"),
         choices=winogrande_contexts, contexts=winogrande_contexts, gold=winogrande_gold,
         prompt=lambda doc: winogrande_contexts(doc)[winogrande_gold(doc)],
         target=lambda doc: doc["sentence"][doc["sentence"].index("_") + 1:].strip(),
         metric="acc", **HIDDEN, short="WG", paper=paper(63.3, 68.0, 74.0)),
    Task("gsm8k", ("question", "answer"), hub=("openai/gsm8k", "main"), shots=4,
         prompt=lambda doc: f"Question: {doc['question']}\nAnswer:",
         target=lambda doc: doc["answer"], gold=gsm8k_gold, judge=gsm8k_judge,
         stop=("Question:", "</s>", "<|im_end|>"), metric="exact_match,strict-match",
         metrics=("exact_match,strict-match", "exact_match,flexible-extract"),
         splits=("train", "test"), short="GSM8K", paper=paper(61.4, 63.9, 76.0)),
    Task("mathqa", ("Problem", "options", "correct"), hub=("regisss/math_qa", None),
         prompt=lambda doc: f"Question: {doc['Problem']}\nAnswer:",
         choices=mathqa_choices, gold=mathqa_gold,
         metric="acc_norm", **BOTH, **VALIDATED, short="MathQA MQ", paper=paper(35.0, 34.5, 39.4)),
    Task("humaneval", ("prompt", "test", "entry_point"), hub=("openai/openai_humaneval", None),
         prompt=lambda doc: doc["prompt"], gold=lambda doc: parsed(doc["test"]),
         stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"), max_tokens=1024,
         target=humaneval_test,
         program=lambda doc, text: f"{doc['prompt']}{text}\n{humaneval_test(doc)}",
         metric="pass@1", splits=("test", "test"), shot_split=None,
         short="HumanEval HE", paper=paper(47.6, 51.2, 58.5)),
    # The paper says zero-shot, but its numbers need the harness's default of three fixed shots.
    Task("mbpp", ("text", "code", "test_list"), hub=("google-research-datasets/mbpp", "full"),
         prompt=lambda doc: "You are an expert Python programmer, and here is your task: "
                            f"{doc['text']} Your code should pass these tests:\n\n"
                            f"{mbpp_tests(doc)}\n[BEGIN]\n",
         target=lambda doc: doc["code"] + "\n[DONE]", delimiter="",
         gold=lambda doc: parsed(mbpp_tests(doc)),
         program=lambda doc, text: f"{text}\n{mbpp_tests(doc)}", stop=("[DONE]",),
         metric="pass_at_1", shots=3, fixed_shots=MBPP_SHOTS, first_shots=True, **VALIDATED,
         short="MBPP", paper=paper(50.0, 54.8, 59.8)),
    # Version 0, in every release up to 0.4.12 and so in the paper, strips nothing.
    Task("swde", prompt=lambda doc: doc["text"], target=lambda doc: doc["value"],
         judge=lambda doc, text: swde_judge(doc["value"], text), **SWDE,
         short="SWDE", paper=paper(86.4, 85.8, 91.1)),
    Task("swde_v1", prompt=lambda doc: doc["text"].strip(),
         target=lambda doc: doc["value"].strip(),
         judge=lambda doc, text: swde_judge(doc["value"].strip(), text), **SWDE),
    Task("longbench_samsum", ("context", "question", "answers"), judge=samsum_judge,
         hub=("Xnhyacinth/LongBench", "samsum"), max_tokens=128, **LONGBENCH,
         prompt=lambda doc: "Summarize the dialogue into a few short sentences. The following "
                            f"are some examples.\n\n{doc['context']}\n{doc['question']}",
         short="SAMSum", paper=paper(42.5, 42.4, 43.9)),
    Task("longbench_trec", ("context", "question", "answers", "all_classes"), judge=trec_judge,
         hub=("Xnhyacinth/LongBench", "trec"), max_tokens=64, **LONGBENCH,
         prompt=lambda doc: "Please determine the type of the question below. Here are some "
                            f"examples of questions.\n\n{doc['context']}\n{doc['question']}",
         short="TREC", paper=paper(71.0, 72.0, 73.5)),
    mmlu("econometrics", short="EC", paper=paper(46.5, 39.5, 51.8)),
    mmlu("marketing", short="MK", paper=paper(83.3, 86.8, 88.9)),
    # The official 500 test items are reported; the search has the other 500, as in the paper. The
    # harness's copy, bigbio/pubmed_qa, is a loading script, which `datasets` no longer runs.
    Task("pubmedqa", ("CONTEXTS", "QUESTION", "final_decision"),
         hub=("qiaojin/PubMedQA", "pqa_labeled"), resplit=pubmedqa_split,
         prompt=lambda doc: "Abstract: " + "\n".join(doc["CONTEXTS"]) +
                            f"\nQuestion: {doc['QUESTION']}\nAnswer:",
         choices=lambda doc: ["yes", "no", "maybe"],
         gold=lambda doc: doc["final_decision"],
         metric="acc", splits=("train+validation", "test"),
         short="PM PubMedQA", paper=paper(63.8, 69.8, 75.0)),
)


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


TASKS = TaskTable((task.name, task) for task in TASK_LIST)


def choice_gold(doc):
    if not (isinstance(doc["choices"], list) and len(doc["choices"]) > 1):
        raise ValueError("'choices' must be a list of two or more")
    return doc["gold"]


def generate_gold(doc):
    stop, length = doc.get("stop", []), doc.get("max_tokens", 1)
    if not (isinstance(stop, list) and all(isinstance(text, str) for text in stop)):
        raise ValueError("'stop' must be a list of texts")
    if not (type(length) is int and length > 0):
        raise ValueError("'max_tokens' must be a positive number")
    return doc["answer"]


# The two kinds of items that a JSON-lines file may hold: rank the choices, or write an answer.
CHOICE_FILE = Task(
    "choices", ("context", "choices", "gold"), prompt=lambda doc: doc["context"],
    choices=lambda doc: doc["choices"], gold=choice_gold, metric="acc", **BOTH)
GENERATE_FILE = Task(
    "answers", ("prompt", "answer"), prompt=lambda doc: doc["prompt"], gold=generate_gold,
    judge=lambda doc, text: {"exact_match": float(text.strip() == doc["answer"].strip())},
    metric="exact_match")

# ------------------------------------------------------------------------------------------------
# Documents: from the Hub or from files of the same schema

def read_docs(path):
    """The rows of a .jsonl, .jsonl.gz or .parquet file, each with its place in it."""
    try:
        if path.endswith(".parquet"):
            import pyarrow.parquet
            rows = pyarrow.parquet.read_table(path).to_pylist()
            return [(f"{path} row {i}", row) for i, row in enumerate(rows, 1)]
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            lines = [(f"{path} line {i}", line) for i, line in enumerate(file, 1) if line.strip()]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    rows = []
    for place, line in lines:
        try:
            rows.append((place, dict(json.loads(line))))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{place} is not a JSON object: {error}") from None
    return rows


def hub_docs(task, split):
    """The rows of one split of the task's dataset on the Hub, each with its place in it."""
    import datasets
    name, config = task.hub
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would log every retry
    try:
        rows = datasets.load_dataset(name, config, split="train" if task.resplit else split)
        rows = task.resplit(rows, split) if task.resplit else rows
    except Exception as error:  # gated, missing, renamed, no such split, no network, ...
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{task.name}: cannot load {name}, configuration {config}, split {split}, from the Hub "
            f"({type(error).__name__}: {reason}); if it is gated, accept its terms there and log "
            f"in; else get its rows elsewhere and run this with `--task {task.name} --docs FILE` "
            "(--test-docs, --shot-docs), a .jsonl, .jsonl.gz or .parquet with the fields "
            f"{', '.join(task.fields)}") from None
    return [(f"{name} {split} row {i}", row) for i, row in enumerate(rows, 1)]


class Document(dict):
    """One row of a dataset, which knows its place in it, for messages."""
    place = "a document"


def place_of(doc):
    return getattr(doc, "place", Document.place)


def load_docs(task, split, path=None):
    """All documents of a split, or of the local file in its place, each one checked."""
    docs = []
    for place, doc in read_docs(str(path)) if path else hub_docs(task, split):
        try:
            task.check(doc)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        docs.append(Document(doc))
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
    """Documents to search on, documents to report, and sentences about them for the user.

    The search never sees what is reported. It gets up to `size` documents of validation where test
    is reported, and of train where validation is, or where that is all there is; a task with one
    split is cut into seeded halves. The paper's rule, read literally, searches on the reported
    documents in the second and the last case: `paper_splits`.
    """
    searched, reported = task.splits
    if paper_splits and reported in ("validation", searched) and not (docs and test_docs):
        report = load_docs(task, reported, test_docs or docs)
        return report, report, ["--paper-splits: the search sees what is reported, so it leaks"]
    if searched == reported and not test_docs:
        whole = load_docs(task, reported, docs)
        search, report = sample(whole, len(whole) // 2, seed)
    else:
        search, report = load_docs(task, searched, docs), load_docs(task, reported, test_docs)
    seen = {repr(task.requests(doc, ())) for doc in report}
    clean = [doc for doc in search if repr(task.requests(doc, ())) not in seen]
    if not clean:
        raise UserError(f"{task.name}: every document to search on is also reported")
    chosen = sample(clean, size, seed)[0]
    notes = [f"searching on {len(chosen)} of {len(search)} documents, {len(report)} are reported"]
    if len(clean) < len(search):
        notes.append(f"left out of the search: {len(search) - len(clean)} that are reported too")
    if len(chosen) < 100:
        notes.append(f"with {len(chosen)} documents, one is worth {100 / len(chosen):.1f} points: "
                     "layers will tie, and the order found is little more than chance")
    return chosen, report, notes


def draw_shots(task, docs, k, pool, searched=False):
    """The shots of each document: one draw after the other from Random(1234), in their order.

    On a search split, and where the harness scores a validation split, one more is drawn and the
    document itself dropped, so that it is never its own example.
    """
    if k == 0:
        return [[] for _ in docs]
    pool = list(task.fixed_shots or pool or ())
    extra = not task.first_shots and (searched or task.splits[1] == "validation")
    if k + extra > len(pool):
        raise UserError(f"{task.name}: {k} shots cannot be taken from {len(pool)} documents")
    if task.first_shots:
        return [pool[:k] for _ in docs]
    draw, shots = random.Random(1234), []
    for doc in docs:
        def other(row):
            return row != doc and not (searched and task.prompt(row) == task.prompt(doc))
        drawn = draw.sample(pool, k + extra)
        if extra:
            drawn = [row for row in drawn if other(row)][:k]
        if len(drawn) < k:  # copies of the document were drawn with it
            drawn = draw.sample([row for row in pool if other(row)], k)
        shots.append(drawn)
    return shots


def _write_lines(path, rows):
    write_atomic(path, lambda p: p.write_text("".join(json.dumps(row) + "\n" for row in rows)))


def demo_file(name, split):
    """The file of a demo task's items. Raises UserError if it has not been made."""
    path = DEMO / f"{name}-{split}.jsonl"
    if not path.exists():
        raise UserError(f"{path} is not here: `python distill.py` makes the demo and its tasks.")
    return path


# ------------------------------------------------------------------------------------------------
# The engine: requests -> tokens -> fixed batches -> log-likelihoods or texts
#
# Shared contexts: the context that a document's choices share is read once, its cache is repeated
# for each choice, and then the rest of the choices is read.

@dataclass
class Request:
    """One question to the model. `tokens` are context and continuation, the last `scored` of which
    get a log-probability; for generation they are the prompt, and `limits` says when to stop."""
    tokens: list
    scored: int = 0
    limits: dict = field(default_factory=dict)

    def key(self):
        return tuple(self.tokens), self.scored, json.dumps(self.limits)


@dataclass
class Group:
    """Requests (their numbers) that share a prefix, which is read once: a document's choices."""
    prefix: list
    members: list


def encode(tokenizer, text, bos=None):
    """Tokens with the tokenizer's own special tokens, or with BOS forced on or off; a text that
    already begins with BOS does not get another."""
    start = tokenizer.bos_token
    if bos is False or (start and text.startswith(start)):
        return tokenizer.encode(text, add_special_tokens=False)
    tokens = tokenizer.encode(text)
    if bos and tokens[:1] != [tokenizer.bos_token_id]:
        if tokenizer.bos_token_id is None:
            raise UserError("--bos: this tokenizer has no BOS token.")
        tokens = [tokenizer.bos_token_id] + tokens
    return tokens


def encode_pair(tokenizer, context, continuation, bos=None):
    """Tokens of a context and its continuation, and the number of the continuation's tokens.

    As the harness does, this takes the tokens of the context alone, without trailing white space,
    then drops as many from the tokens of both texts together. The result differs from the latter
    where one token spans the border, or where the tokenizer ends every text with EOS. An empty
    context becomes BOS, or EOS where there is no BOS."""
    if context:
        start = encode(tokenizer, context.rstrip(), bos)
        rest = encode(tokenizer, context + continuation, bos)[len(start):]
    else:
        prefix = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        start = [token for token in prefix if token is not None][:1]
        rest = tokenizer.encode(continuation, add_special_tokens=False)
        rest = rest[1:] if start and rest[:1] == start else rest
    return start + rest, len(rest)


class Prepared:
    """A task's documents, tokenised once and cut into fixed batches, to be scored many times.

    Equal requests are asked once. The requests of a document form one group if they share a
    prefix, unless `whole`. `batches` are lists of groups and the same for every model; the longest
    come first, so that a batch too large for the memory fails at once.
    """

    def __init__(self, task, docs, model, tokenizer, batch_size, shots=None, bos=None,
                 whole=False, max_gen_toks=None):
        self.task, self.docs, self.tokenizer, self.bos = task, docs, tokenizer, bos
        self.max_gen_toks, self.reach, self.truncated = max_gen_toks, reach(model), 0
        self.requests, self.of_doc, self.groups, index = [], [], [], {}
        for number, doc in enumerate(docs):
            mine, new = [], []
            for ask in task.requests(doc, shots[number] if shots else None):
                request = self._request(ask, doc, max_length(model))
                if request.key() not in index:
                    index[request.key()] = len(self.requests)
                    new.append(len(self.requests))
                    self.requests.append(request)
                mine.append(index[request.key()])
            self.of_doc.append(mine)
            self.groups += self._grouped(new, whole or task.generates)
        self.groups.sort(key=lambda group: -len(group.prefix))
        self.batch_size, self.batches = batch_size, even_batches(self.groups, batch_size)

    def _request(self, ask, doc, limit):
        """Tokenise. A task file's item that is too long is refused; a named task's is cut on the
        left, as the harness cuts it, and counted."""
        if self.task.generates:
            new = self.max_gen_toks or ask[1]["max_gen_toks"]
            request = Request(encode(self.tokenizer, ask[0], self.bos),
                              limits={**ask[1], "max_gen_toks": new})
            if not request.tokens:
                raise UserError(f"{place_of(doc)}: the prompt {ask[0]!r} has no tokens, so there "
                                "is nothing to go on from.")
            room = limit and limit - new
        else:
            request = Request(*encode_pair(self.tokenizer, *ask, self.bos))
            if not 0 < request.scored < len(request.tokens):
                what = "continuation" if request.scored == 0 else "context"
                text = ask[1] if request.scored == 0 else ask[0]
                raise UserError(f"{place_of(doc)}: the {what} {text[-60:]!r} has no tokens of its "
                                "own in this model's tokenizer, so it has no score.")
            room = limit and limit + 1                  # the last token is scored, not read
        if limit is None or len(request.tokens) <= room:
            return request
        if self.task.hub is None:
            raise UserError(f"{place_of(doc)}: {len(request.tokens)} tokens, but the model's context "
                            f"has room for {room}.")
        if room <= 0:
            raise UserError(f"{self.task.name} generates up to {new} tokens, but the model's "
                            f"context is {limit}: lower it with --max-gen-toks.")
        self.truncated += 1
        request.tokens = request.tokens[-room:]
        request.scored = min(request.scored, room - 1)
        return request

    def _grouped(self, members, alone):
        """One group with the tokens that all members share before their first scored token, or,
        where there are none or `alone`, a group for each member."""
        tokens = [self.requests[i].tokens for i in members]
        alone = alone or any(len(read) - 1 > self.reach for read in tokens)
        shared = 0 if alone or len(members) < 2 else min(
            len(os.path.commonprefix(tokens)),
            *(len(self.requests[i].tokens) - self.requests[i].scored for i in members))
        if shared > 0:
            return [Group(tokens[0][:shared], members)]
        last = None if self.task.generates else -1      # the last token is scored, not read
        return [Group(self.requests[i].tokens[:last], [i]) for i in members]

    def fingerprint(self):
        return digest(self.task.name, self.docs, [request.key() for request in self.requests],
                      [[(group.prefix, group.members) for group in b] for b in self.batches])


def even_batches(rows, size):
    """Cut a list into lists of at most `size` rows, as even as can be, in a number that 2, 4 or 8
    processes can share out evenly."""
    count = math.ceil(len(rows) / size)
    step = min(8, 1 << (count - 1).bit_length())        # 1, 2, 4 or 8
    count = min(math.ceil(count / step) * step, len(rows))
    edges = [len(rows) * i // count for i in range(count + 1)]
    return [rows[first: end] for first, end in zip(edges, edges[1:])]


def slices(rows, size, length, overhead):
    """Cut a list, sorted by `length` from the longest, into lists of at most `size` rows, each to
    be filled up to its first one's length: the cut that has the fewest positions, where every
    list costs `overhead` positions more."""
    lengths = np.array([length(row) for row in rows], dtype=float)
    places = np.arange(len(rows))
    cost, start = np.zeros(len(rows) + 1), [0]      # of the best cut of the first n rows: its cost;
    for end in range(1, len(rows) + 1):             # where its last list begins
        firsts = places[max(end - size, 0): end]
        costs = cost[firsts] + (end - firsts) * lengths[firsts]
        best = costs.argmin()
        cost[end] = costs[best] + overhead
        start.append(int(firsts[best]))
    cut, end = [], len(rows)
    while end > 0:
        cut.append(rows[start[end]: end])
        end = start[end]
    return cut[::-1]


def halve(rows, fits):
    """Cut a list in half until every part fits into one forward or is a single row."""
    if len(rows) < 2 or fits(rows):
        return [rows] if rows else []
    middle = len(rows) // 2
    return halve(rows[:middle], fits) + halve(rows[middle:], fits)


def forward_overhead(model):
    """How many positions cost about as much as what a forward takes besides: launching kernels.
    On 2 CPU cores 10 to 100 were measured for models of 9 M to 0.3 M parameters."""
    return 64 if model.device.type == "cpu" else 4096


def cut(model, rows, size, length, fits):
    """Cut rows into forwards of at most `size` rows of similar length that fit."""
    rows = sorted(rows, key=lambda row: -length(row))
    return [part for rows in slices(rows, size, length, forward_overhead(model))
            for part in halve(rows, fits)]


def send(tensor, device):
    """Copy a CPU tensor to `device` without waiting for the work that a GPU has queued."""
    return tensor.to(device, non_blocking=True)


@contextlib.contextmanager
def head_only_at(model, scored):
    """Within the block the LM head sees only the positions where `scored` (bool [B, T], on the CPU)
    is true; the logits come out flattened, [number of true, vocabulary]."""
    places = scored.flatten().nonzero().squeeze(1)  # on the CPU: a GPU's nonzero makes it wait

    def choose(module, args):           # the head's GPU need not be the model's first
        return args[0].flatten(0, 1).index_select(0, send(places, args[0].device)),
    hook = model.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        yield
    finally:
        hook.remove()


def pad(rows, left=False):
    """Token ids [B, T] and the mask of real ones, padded on one side."""
    width = max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    ids = torch.tensor([f + row if left else row + f for f, row in zip(fill, rows)],
                       dtype=torch.long)
    lengths, place = torch.tensor([len(row) for row in rows]).unsqueeze(1), torch.arange(width)
    return ids, place >= width - lengths if left else place < lengths


def read(model, ids, scored, cache=None, mask=None):
    """One forward of ids [B, T], which continue the sequences in `cache` -> log-probabilities fp32
    [N, V] at the N positions where `scored` [B, T] is true. `mask` [B, P + T] marks the real
    tokens of cache and ids; without it all are real, or padding only follows them."""
    kwargs = {}
    if mask is not None:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]    # [B, T]
        kwargs = {"attention_mask": send(mask.long(), model.device),
                  "position_ids": send(positions, model.device)}
    with head_only_at(model, scored):
        logits = model(send(ids, model.device), past_key_values=cache,
                       use_cache=cache is not None, **kwargs).logits
    return logits.float().log_softmax(-1)


def read_rows(model, requests, rows, cache=None, context=None):
    """One forward of rows (request, tokens) -> for each scored token its request [N] and its
    log-probability [N]. With `cache`, row r continues the cache's sequence r, whose real tokens
    `context` [R, P] marks. The log-probabilities stay on the device, since fetching them waits."""
    tokens, real = pad([tokens for _, tokens in rows])                      # [R, T + 1]
    ids, targets, ends = tokens[:, :-1], tokens[:, 1:], real.sum(1, keepdim=True) - 1
    counts = torch.tensor([[requests[i].scored] for i, _ in rows]).minimum(ends)
    place = torch.arange(ids.shape[1])
    scored = (place >= ends - counts) & (place < ends)                      # [R, T]
    mask = None if cache is None else torch.nn.functional.pad(
        context, (0, ids.shape[1]), value=True)                             # [R, P + T]
    log_probs = read(model, ids, scored, cache, mask)                       # [N, V]
    owners = torch.tensor([i for i, _ in rows]).repeat_interleave(counts.squeeze(1))
    targets = send(targets[scored].unsqueeze(1), log_probs.device)          # [N, 1]
    return owners, log_probs.gather(1, targets).squeeze(1)


def read_shared(model, requests, groups, batch_size):
    """Read the prefixes of `groups` in one forward, then their members' tails, with a copy of the
    prefix's cache for each member -> a list of pairs as read_rows returns them.

    The prefix's last position already predicts the first token of every tail, which is all that
    single-token choices need. Prefixes are padded on the left, so that tails follow directly."""
    tails = [(i, row, requests[i].tokens[len(group.prefix):])
             for row, group in enumerate(groups) for i in group.members]
    longer = [tail for tail in tails if len(tail[2]) > 1]
    ids, real = pad([group.prefix for group in groups], left=bool(longer))
    last = real & (real.cumsum(1) == real.sum(1, keepdim=True))             # [B, P]
    cache = transformers.DynamicCache(config=model.config) if longer else None
    log_probs = read(model, ids, last, cache, real if longer and not real.all() else None)
    first = [(i, row, tokens[0]) for i, row, tokens in tails if len(tokens) == requests[i].scored]
    found = []
    if first:
        owners, *places = torch.tensor(first).unbind(1)
        found.append((owners, log_probs[tuple(send(x, log_probs.device) for x in places)]))
    for part in cut(model, longer, batch_size, lambda tail: len(tail[2]), lambda part: True):
        rows = torch.tensor([row for _, row, _ in part])
        found.append(read_rows(model, requests, [(i, tokens) for i, _, tokens in part],
                               repeated(cache, send(rows, model.device)), real[rows]))
    return found


def repeated(cache, rows):
    """A cache that holds copies of the sequences `rows` of `cache`, which stays as it is."""
    copies = copy.copy(cache)
    copies.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in copies.layers:         # Qwen3-Next and Falcon-H1 keep their states in dicts
        vars(layer).update({k: dict(v) for k, v in vars(layer).items() if isinstance(v, dict)})
    copies.reorder_cache(rows)          # not every layer has batch_select_indices
    return copies


@torch.no_grad()
def batch_log_likelihoods(model, requests, groups, batch_size):
    """{request: summed log-probability of its scored tokens} for a batch of groups. Members of a
    larger group share the reading of their prefix; a request alone in its group is read whole.
    No forward has more positions, padding included, than reach(model), except a single request."""
    def alone_fit(rows):
        return max(len(tokens) for _, tokens in rows) - 1 <= reach(model)

    def shared_fit(groups):
        tails = [len(requests[i].tokens) - len(g.prefix) for g in groups for i in g.members]
        return max(len(g.prefix) for g in groups) + max(tails) - 1 <= reach(model)

    members = [i for group in groups for i in group.members]
    alone = [(i, requests[i].tokens) for g in groups if len(g.members) == 1 for i in g.members]
    shared = [group for group in groups if len(group.members) > 1]
    found = [read_rows(model, requests, rows) for rows in cut(
        model, alone, batch_size, lambda row: len(row[1]), alone_fit)]
    for part in cut(model, shared, batch_size, lambda group: len(group.prefix), shared_fit):
        found += read_shared(model, requests, part, batch_size)
    owners, log_probs = map(torch.cat, zip(*found))
    sums = torch.zeros(len(requests), dtype=torch.float64)
    sums.index_add_(0, owners, log_probs.cpu().double())    # the only wait for the device
    return dict(zip(members, sums[members].tolist()))


class StopOnText(transformers.StoppingCriteria):
    """Ends a row when its new text contains one of its stop strings. A token has at least one byte,
    so a stop string that is complete with the newest token lies within as many last tokens as it
    has bytes, and a few for special tokens, which have none; only these are decoded."""

    def __init__(self, tokenizer, stops, prompt_length):
        self.tokenizer, self.prompt_length = tokenizer, prompt_length
        self.stops = [list(filter(None, row)) for row in stops]
        self.reach = 8 + max(len(stop.encode()) for row in [[""], *self.stops] for stop in row)

    def __call__(self, ids, scores, **kwargs):
        recent = ids[:, max(self.prompt_length, ids.shape[1] - self.reach):].tolist()
        texts = self.tokenizer.batch_decode(recent, skip_special_tokens=True)
        done = [any(stop in text for stop in stops) for text, stops in zip(texts, self.stops)]
        return send(torch.tensor(done), ids.device)


@torch.no_grad()
def batch_generate(model, tokenizer, requests, groups):
    """{request: greedy continuation as text} for a batch: left padding, the model's cache. The
    text may run past a stop string; Task.score cuts it there."""
    def fits(groups):
        steps = [requests[i].limits["max_gen_toks"] for group in groups for i in group.members]
        return max(len(group.prefix) for group in groups) + max(steps) <= reach(model)
    texts = {}
    for part in halve(groups, fits):
        texts |= generate_together(model, tokenizer, requests, part)
    return texts


def generate_together(model, tokenizer, requests, groups):
    """The same for groups that fit into one call of generate(), which runs to the longest limit."""
    asked = [requests[i] for group in groups for i in group.members]
    ids, real = pad([group.prefix for group in groups], left=True)
    steps, width = [request.limits["max_gen_toks"] for request in asked], ids.shape[1]
    eos = [tokenizer.eos_token] if tokenizer.eos_token else []  # ends a text as characters, too
    out = model.generate(
        send(ids, model.device), attention_mask=send(real.long(), model.device), do_sample=False,
        num_beams=1, max_new_tokens=max(steps), pad_token_id=_pad_id(tokenizer),
        temperature=None, top_p=None, top_k=None, return_dict_in_generate=False,
        stopping_criteria=transformers.StoppingCriteriaList(
            [StopOnText(tokenizer, [r.limits["until"] + eos for r in asked], width)]))
    texts = [tokenizer.decode(row[width: width + n], skip_special_tokens=True)
             for row, n in zip(out.tolist(), steps)]
    texts = [text.split(eos[0])[0] if eos else text for text in texts]
    return {i: text for group, text in zip(groups, texts) for i in group.members}


def _pad_id(tokenizer):
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in known if i is not None)


# ------------------------------------------------------------------------------------------------
# Generated code: a fence, not a jail

# `setpriv` takes all rights from a program and `prlimit` bounds it. `unshare` gives it processes,
# mounts, IPC and a network of its own, which end with it. Where root may not unshare, the program
# runs as another user instead, which keeps less from it.
NAMESPACES = "namespaces, read-only files, no network, limits"
OTHER_USER = "another user, limits; the network and files that anyone may change stay open"
Verdict = namedtuple("Verdict", "passed reason")

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
# Scores

@dataclass
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

    def stderr(self, metric=None):
        """Of the mean: sample standard deviation / sqrt(n); 0 for a single item."""
        mean = self.mean(metric)
        squares = math.fsum((item[metric or self.metric] - mean) ** 2 for item in self.items)
        return math.sqrt(squares / max(self.n - 1, 1) / self.n)


def evaluate(model, prepared, metric=None, allow_code=False):
    """Score `model`, whatever is swapped into it, on prepared documents -> Score.
    Raises FloatingPointError for a log-likelihood that is not finite."""
    outputs = {}
    for batch in progress(prepared.batches, desc=prepared.task.name, unit="batch", leave=False):
        outputs |= answer_batch(model, prepared, batch)
    return judge(prepared, outputs, metric, linear_layers(model), allow_code)


def answer_batch(model, prepared, batch):
    """{request: summed log-likelihood, or text} for one batch of groups."""
    if prepared.task.generates:
        return batch_generate(model, prepared.tokenizer, prepared.requests, batch)
    return batch_log_likelihoods(model, prepared.requests, batch, prepared.batch_size)


def evaluate_hybrids(model, prepared, mixers, layer_sets, metric=None, allow_code=False,
                     plain=False, cost=None, bar=None):
    """Score the hybrids of `model` in which each of `layer_sets` (sorted tuples) is replaced by
    mixers[layer] -> their Scores, in that order, on rank 0; None on the others.

    Each batch is read by all hybrids, which share their common lower layers (SharedLayers) unless
    `plain`. Several ranks take turns with the batches. Adds to `cost` the layer-token forwards
    "run", and "plain", those without sharing; padding included.
    """
    spent, outputs = collections.Counter(), {layers: {} for layers in layer_sets}
    for batch in prepared.batches[rank()::world_size()]:
        answers = answer_hybrids(model, prepared, mixers, batch, layer_sets, plain, spent)
        for layers in outputs:
            outputs[layers] |= answers[layers]
        if bar is not None:
            bar.update(len(layer_sets))
    parts = gather((outputs, spent))
    if rank() > 0:
        return None
    for part, spent in parts:
        for layers in outputs:
            outputs[layers] |= part[layers]
        if cost is not None:
            cost.update(spent)
    return [judge(prepared, outputs[layers], metric, layers, allow_code) for layers in layer_sets]


def answer_hybrids(model, prepared, mixers, batch, layer_sets, plain=False, cost=None):
    """{layers: {request: answer}} of one batch for each hybrid.

    In a round of Algorithm 1 two candidates differ first at the lower of the layers that they
    replace. So the candidate with the highest layer runs first, whole, and passes through all
    that any other can replay."""
    cost = collections.Counter() if cost is None else cost
    whole, *others = sorted(set(layer_sets), reverse=True)
    common = {layers: 0 if plain else min(set(layers) ^ set(whole)) for layers in others}
    shared = SharedLayers(model, prepared.task.generates)
    answers = {}
    for layers in (whole, *others):
        share = (shared.replay(common[layers]) if layers in common else
                 shared.record(max(common.values(), default=0)))
        with replaced(model, mixers, layers), positions_read(model) as positions, share:
            answers[layers] = answer_batch(model, prepared, batch)
        total = len(shared.layers) * sum(positions)
        cost["plain"] += total
        cost["run"] += total - common.get(layers, 0) * shared.positions
    return answers


def layers_can_be_shared(model, prepared, mixers):
    """Whether sharing changes nothing, bit for bit, tried on one request. It would where a layer
    takes more from the layers below than their hidden states (keys and values, say)."""
    layers, batch = sorted(mixers), prepared.batches[-1][-1:]
    sets = [(layers[len(layers) // 2],), (layers[-1],)]
    shared, plain = (answer_hybrids(model, prepared, mixers, batch, sets, plain=plain)
                     for plain in (False, True))
    return repr(shared) == repr(plain)      # NaN is the evaluation's to report


@contextlib.contextmanager
def positions_read(model):
    """A list to which every forward within the block adds its number of positions, B * T."""
    positions = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: positions.append(args[0].numel()))
    try:
        yield positions
    finally:
        hook.remove()


class SharedLayers:
    """The lower layers that several hybrids have in common on one batch. The first hybrid records
    these layers' outputs and caches; later hybrids replay them instead of running the layers.

    All hybrids make the same forwards, so a layer's outputs are replayed in their order. The rest
    of the model (embeddings, masks, upper layers, head) runs as its family's own code. Generation
    shares only the forward of the prompt, since the texts of two hybrids differ.
    """

    def __init__(self, model, generates):
        self.layers, self.generates = decoder_layers(model), generates
        self.tapes = [[] for _ in self.layers]  # per layer and forward: (output, cache layer)
        self.positions = 0                      # B * T of all forwards recorded

    def record(self, count):
        """Within the block, the lowest `count` layers are recorded."""
        def recorder(i, forward):
            def record(*args, **kwargs):
                cache = cache_among(args, kwargs)
                starts = cache is not None and cache.layers[i].get_seq_length() == 0
                output = forward(*args, **kwargs)
                if starts or not self.generates:
                    self.tapes[i].append((output, copy.copy(cache.layers[i]) if starts else None))
                    hidden_states = args[0] if args else kwargs["hidden_states"]    # [B, T, C]
                    self.positions += hidden_states.shape[:2].numel() if i == 0 else 0
                return output
            return record
        return self._with_forwards(count, recorder)

    def replay(self, count):
        """Within the block, the lowest `count` layers are replayed."""
        def player(i, forward):
            tape = iter(self.tapes[i])

            def play(*args, **kwargs):
                cache = cache_among(args, kwargs)
                if self.generates and cache.layers[i].get_seq_length() > 0:
                    return forward(*args, **kwargs)
                output, cache_layer = next(tape)
                if cache_layer is not None:
                    cache.layers[i] = copy.copy(cache_layer)
                    if not self.generates:      # it is asked for its length alone
                        cache.layers[i].reorder_cache = lambda rows: None
                return output
            return play
        return self._with_forwards(count, player)

    @contextlib.contextmanager
    def _with_forwards(self, count, make):
        """Within the block, make(i, forward) stands for the forward of each lower layer i."""
        layers = self.layers[:count]
        before = [vars(layer).get("forward") for layer in layers]
        for i, layer in enumerate(layers):
            layer.forward = make(i, layer.forward)
        try:
            yield
        finally:
            for layer, forward in zip(layers, before):
                del layer.forward
                if forward is not None:         # accelerate had put this one there
                    layer.forward = forward


def cache_among(args, kwargs):
    """The transformers Cache among a layer's arguments, whose name differs between families."""
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)


def judge(prepared, outputs, metric, layers, allow_code=False):
    """Turn {request: answer} of all requests into a Score."""
    items, per_doc = [], []
    for doc, numbers in zip(prepared.docs, prepared.of_doc):
        answers = [outputs[i] for i in numbers]
        if not prepared.task.generates and not all(map(math.isfinite, answers)):
            raise FloatingPointError(f"a score of {place_of(doc)} is not finite with linear layers "
                                     f"{layers}")
        items.append(prepared.task.score(doc, answers, allow_code))
        per_doc.append(answers)
    return Score(metric or prepared.task.metric, items, per_doc)


# ------------------------------------------------------------------------------------------------
# The command line

def add_task_flags(parser):
    parser.add_argument("--metric", help="report this metric of the task, not its usual one")
    parser.add_argument("--batch-size", type=positive(int), default=16, help="sequences at a time")
    parser.add_argument("--limit", type=positive(int), help="score only the first N documents")
    parser.add_argument("--docs", help="a named task's documents, as a local .jsonl, .jsonl.gz or "
                        ".parquet file in place of the Hub: those scored, or searched on")
    parser.add_argument("--shot-docs", help="the file that a named task's shots are drawn from")
    parser.add_argument("--shots", type=int, help="examples before each document (default: the "
                        "paper's: 4 for gsm8k, 3 for mbpp, else none)")
    parser.add_argument("--max-gen-toks", type=positive(int),
                        help="generate at most N tokens in place of the task's own number")
    parser.add_argument("--bos", action=argparse.BooleanOptionalAction,
                        help="force a BOS token on or off (default: as the tokenizer does)")
    parser.add_argument("--whole", action="store_true", help="run every context + choice whole, "
                        "as the harness does, in place of a shared context once")
    parser.add_argument("--seed", type=int, default=0, help="of the search split's draw")
    parser.add_argument("--allow-code-execution", action="store_true",
                        help="run the programs that the model writes (humaneval, mbpp), each "
                        "behind a fence of limits; a fence, not a jail")


def find_task(name, args):
    """A named task, or that of a task file. Raises UserError for what cannot be scored at all."""
    is_file = Path(name).is_file() or name.endswith((".jsonl", ".json", ".jsonl.gz", ".parquet"))
    if name in DEMO_TASKS or is_file and not TASKS.named(name):
        given = [f for f in ("docs", "shot_docs", "shots") if getattr(args, f) is not None]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} goes with a named task, not {name}.")
        return file_task(demo_file(name, "validation") if name in DEMO_TASKS else name)[0]
    task = TASKS[name]
    if task.program and not args.allow_code_execution:
        raise UserError(f"{task.name} runs programs that the model wrote, behind a fence of "
                        "limits that is not a jail; allow it with --allow-code-execution.")
    if (args.shots or 0) < 0 or (args.shots and task.shot_split is None):
        raise UserError(f"--shots {args.shots} is no number of examples for {task.name}.")
    return task


def check_metric(task, metric):
    """The metric to report. Raises UserError if the task does not have it."""
    known = task.metrics or (task.metric,)
    if metric and metric not in known:
        raise UserError(f"{task.name} has no metric {metric}; it has {' and '.join(known)}.")
    return metric or task.metric


def scored_docs(name, task, args):
    """The documents that eval.py scores: a file's, or the split that the harness reports."""
    if name in DEMO_TASKS:
        return file_task(demo_file(name, "test"))[1]
    return load_docs(task, task.splits[1], args.docs) if task.hub else file_task(name)[1]


def prepare(task, docs, model, tokenizer, args, searched=False):
    """Documents of one split with their shots, tokenised and in batches."""
    count = task.shots if args.shots is None else args.shots
    docs, shots = docs[: args.limit], None
    if count and not task.fixed_shots:
        pool = load_docs(task, task.shot_split, args.shot_docs)
        shots = draw_shots(task, docs, count, pool, searched)
    elif task.fixed_shots and args.shots is not None:
        shots = draw_shots(task, docs, count, None)
    prepared = Prepared(task, docs, model, tokenizer, args.batch_size, shots, args.bos,
                        args.whole, args.max_gen_toks)
    if prepared.truncated:
        log(f"{task.name}: {prepared.truncated} of {len(prepared.requests)} requests were longer "
            "than the model's context and lost tokens on the left")
    return prepared


def show_requests(prepared, count):
    """Print the first requests exactly as the model will see them: text, and tokens."""
    for number, request in enumerate(prepared.requests[:count]):
        decoded = prepared.tokenizer.decode(request.tokens)
        log(f"--- request {number}: {len(request.tokens)} tokens, the last {request.scored} "
            f"scored {json.dumps(request.limits)}\n{decoded}\n{request.tokens}")


def score_task(name, model, tokenizer, args, stem):
    """Score one task, print its line, write its items to OUT/STEM-items.jsonl -> the result as a
    dict."""
    task = find_task(name, args)
    metric = check_metric(task, args.metric)
    prepared = prepare(task, scored_docs(name, task, args), model, tokenizer, args)
    show_requests(prepared, args.show)
    if task.program:
        log(f"programs run behind a fence: {fence()}")
    score = evaluate(model, prepared, metric, allow_code=args.allow_code_execution)
    paper_value = (task.paper or {}).get(Path(args.model).name)
    result = {"task": name, "split": task.splits[1] if task.hub else name, "n": score.n,
              "metric": metric, "value": score.mean(), "stderr": score.stderr(),
              "metrics": {m: score.mean(m) for m in score.items[0]}, "paper": paper_value,
              "truncated": prepared.truncated}
    log(f"{name}: {metric} {result['value']:.4f} +- {result['stderr']:.4f} (n = {score.n}; paper: "
        f"{'no number' if paper_value is None else paper_value}); "
        + ", ".join(f"{m} {v:.4f}" for m, v in result["metrics"].items()))
    if args.out:
        path = make_output_dir(args.out) / f"{stem}-items.jsonl"
        _write_lines(path, [{"place": place_of(doc), "outputs": outputs, **item} for doc, outputs, item
                            in zip(prepared.docs, score.outputs, score.items)])
        result["items"] = str(path)
    return result


def distinct_stems(names):
    """The tasks' names as those of their results' files; one that is taken gets a number."""
    stems = []
    for name in names:
        stem = Path(name).stem
        numbered = (f"{stem}-{i}" for i in range(2, len(names) + 2))
        stems.append(next(s for s in (stem, *numbered) if s not in stems))
    return stems


def parse_args():
    parser = ArgumentParser(__doc__)
    add_model_flags(parser)
    parser.add_argument("--task", help="comma-separated: .jsonl files, or of "
                        + ", ".join([*DEMO_TASKS, *TASKS]))
    add_task_flags(parser)
    parser.add_argument("--show", type=positive(int), default=0, metavar="N",
                        help="print the first N requests as the model sees them")
    parser.add_argument("--out", help="directory for the per-item results, one .jsonl per task")
    return parser.parse_args()


def main():
    args = parse_args()
    following = None
    if args.model is None:
        log("demo: scores the demo's teacher; --model and --task score anything else")
        demo_file("copy", "test")           # refuses where there is no demo
        args.model, args.out = str(DEMO / "teacher"), args.out or str(DEMO)
        args.task, following = args.task or "copy,chain", "python distill.py"
    if args.task is None:
        raise UserError("--task is missing: a .jsonl file, or of "
                        + ", ".join([*DEMO_TASKS, *TASKS]) + ".")
    names = args.task.split(",")
    for name in names:
        check_metric(find_task(name, args), args.metric)
    if args.out:
        make_output_dir(args.out)
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.trust_remote_code)
    results = [score_task(name, model, tokenizer, args, stem)
               for name, stem in zip(names, distinct_stems(names))]
    finish({"model": args.model, "linear_layers": linear_layers(model), "dtype": str(model.dtype),
            "device": str(model.device), "settings": {k: getattr(args, k) for k in (
                "shots", "limit", "seed", "bos", "batch_size", "whole", "max_gen_toks")},
            "versions": versions(), "results": results}, following)


if __name__ == "__main__":
    run_script(main)
