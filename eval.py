"""Score a causal language model, or a hybrid of it, on a task.

    python eval.py                                              # the demo: offline, CPU
    python eval.py --model out/demo/copy/opt --task copy
    python eval.py --model Qwen/Qwen2.5-0.5B --task items.jsonl --metric acc_norm

A task is the name of one in TASKS, or a file with one JSON object per line:

    {"context": "...", "choices": ["...", "..."], "gold": 0}    log-likelihood of each choice
    {"prompt": "...", "answer": "...", "stop": ["\\n"], "max_tokens": 32}     greedy generation

Choices are scored as lm-evaluation-harness scores them: the continuation is a space and the
choice, `acc` takes the largest summed log-likelihood, `acc_norm` the largest per character.
Log-softmax in fp32, sums in fp64. The last line on stdout is the result as one JSON object.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

try:
    import torch
    import transformers
    from safetensors import SafetensorError
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.import_utils import is_kernels_available

    if is_kernels_available():
        raise ImportError("the pip package 'kernels' is hidden by the kernels.py of this folder, "
                          "which transformers would load in its place; uninstall that package")
    import linear_attn
    from linear_attn import UserError, attention_modules, linear_layers
except ImportError as error:
    sys.exit(f"cannot start: {error}. Set up with: pip install -r requirements.txt")

DEMO = Path("out/demo")


# ------------------------------------------------------------------------------------------------
# What the scripts share: messages, files, command lines

def log(message):
    """One line for people, on stderr, without breaking a progress bar."""
    tqdm.write(message, file=sys.stderr)


def progress(iterable=None, **kwargs):
    return tqdm(iterable, file=sys.stderr, dynamic_ncols=True, mininterval=0.5, **kwargs)


def finish(result, following=None):
    """The last stdout line: `result` as JSON, with the command to run next."""
    result["next"] = following
    if following:
        log(f"next: {following}")
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
    try:
        main()
    except UserError as error:
        sys.exit(_say(f"{name}: {error}", 2))
    except (FloatingPointError, OSError, SafetensorError, torch.OutOfMemoryError) as error:
        sys.exit(_say(f"{name}: stopped: {error}; what was saved before is intact", 1))
    except KeyboardInterrupt:
        sys.exit(_say(f"{name}: interrupted; what was saved before is intact", 130))


def _say(message, code):
    print(" ".join(message.split()), file=sys.stderr)
    return code


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
# Models

def add_model_flags(parser):
    parser.add_argument("--model", help="directory or Hub id of a causal language model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"),
                        default="auto", help="of the model; auto: bfloat16 on a GPU, else float32")
    parser.add_argument("--trust-remote-code", action="store_true",
                        help="run code that the base model's repository brings along")


def read_config(name, trust_remote_code=False):
    """The raw config of a model (a dict), from a directory or the Hub. Raises UserError."""
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
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
    it is refused. Raises UserError for whatever is not a causal language model with a tokenizer.
    """
    config = read_config(name, trust_remote_code)
    if base_only and is_hybrid(config):
        raise UserError(f"{name} is already a hybrid; give the base model it was made from.")
    device = _device(device)
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    kwargs = {"dtype": getattr(torch, dtype)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        if is_hybrid(config):
            model = linear_attn.load_hybrid(name, **kwargs)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                name, trust_remote_code=trust_remote_code, **kwargs)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{name} does not load as a causal language model with a tokenizer: "
                        f"{reason}")
    model = model.to(device).eval().requires_grad_(False)
    if model.config.is_encoder_decoder or not is_causal(model):
        raise UserError(f"{name} is not a causal language model.")
    attention_modules(model)                            # refuses what cannot be converted
    return model, tokenizer


@torch.no_grad()
def is_causal(model):
    """Whether the first prediction stays the same when the second token changes."""
    ids = torch.tensor([[0, 1], [0, 2]], device=model.device)
    first, other = model(ids, use_cache=False).logits[:, 0].float()             # [V] each
    return not (first - other).abs().max() > 1e-4 * first.abs().max()           # NaN is not its task


def _device(name):
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"--device {name} cannot be used here: {reason}")


def max_length(model):
    """The longest input in tokens, or None where the config names no limit."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


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
# Tasks

@dataclass(frozen=True)
class Task:
    """What is asked for a document, and how answers are scored.

    requests(doc) -> [(context, continuation), ...] for log-likelihood tasks,
                     [(prompt, {"until": [...], "max_gen_toks": n})] for generation tasks.
    score(doc, outputs) -> {metric: value}; outputs are the summed log-likelihoods in the order
                     of the requests, or the one generated text.
    metric           the one that is reported and searched on.
    splits           (search split, report split): names, or paths of files.
    """
    name: str
    requests: Callable
    score: Callable
    metric: str
    metrics: tuple
    splits: tuple = ()
    generates: bool = False


def choice_requests(doc):
    return [(doc["context"], " " + choice) for choice in doc["choices"]]


def choice_score(doc, sums):
    """acc: largest sum; acc_norm: largest sum per character of the choice. Ties: the first."""
    per_char = [s / len(c) if c else -math.inf for s, c in zip(sums, doc["choices"])]
    return {"acc": float(sums.index(max(sums)) == doc["gold"]),
            "acc_norm": float(per_char.index(max(per_char)) == doc["gold"])}


def generation_requests(doc):
    return [(doc["prompt"], {"until": doc.get("stop", []),
                             "max_gen_toks": doc.get("max_tokens", 256)})]


def generation_score(doc, texts):
    text = cut_at_stops(texts[0], doc.get("stop", []))
    return {"exact_match": float(text.strip() == doc["answer"].strip())}


def cut_at_stops(text, stops):
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text


def choice_task(name, splits):
    return Task(name, choice_requests, choice_score, "acc", ("acc", "acc_norm"), splits)


def generation_task(name, splits):
    return Task(name, generation_requests, generation_score, "exact_match", ("exact_match",),
                splits, generates=True)


TASKS = {name: choice_task(name, (DEMO / f"{name}-validation.jsonl", DEMO / f"{name}-test.jsonl"))
         for name in ("copy", "chain")}


def read_jsonl(path):
    """[(line number, object)] of a JSON-lines file. Raises UserError naming the line."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append((number, json.loads(line)))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a UTF-8 text file.")
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: not valid JSON ({error.msg}).")
    if not rows:
        raise UserError(f"{path} is empty.")
    return rows


def read_items(path):
    """The items of a task file, checked. Raises UserError naming the first bad line."""
    rows = read_jsonl(path)
    for number, doc in rows:
        problem = _item_problem(doc)
        if problem is None and ("choices" in doc) != ("choices" in rows[0][1]):
            problem = "items with choices and items with an answer do not mix in one file"
        if problem:
            raise UserError(f"{path}, line {number}: {problem}.")
    return [dict(doc, source=f"{path}, line {number}") for number, doc in rows]


def _item_problem(doc):
    """What is wrong with one item of a task file, or None."""
    def is_strings(value):
        return isinstance(value, list) and all(isinstance(x, str) for x in value)

    if not isinstance(doc, dict):
        return "not a JSON object"
    if "choices" in doc:
        if not isinstance(doc.get("context"), str) or not is_strings(doc["choices"]):
            return '"context" must be a string and "choices" a list of strings'
        if len(doc["choices"]) < 2:
            return "an item needs at least two choices"
        gold = doc.get("gold")
        if type(gold) is not int:
            return '"gold" must be the number of the right choice'
        if not 0 <= gold < len(doc["choices"]):
            return f'"gold" is {gold}, but there are {len(doc["choices"])} choices, counted from 0'
        return None
    if not isinstance(doc.get("prompt"), str) or not isinstance(doc.get("answer"), str):
        return 'needs "context", "choices" and "gold", or "prompt" and "answer"'
    if not is_strings(doc.get("stop", [])):
        return '"stop" must be a list of strings'
    count = doc.get("max_tokens", 1)
    if type(count) is not int or count < 1:
        return '"max_tokens" must be a positive whole number'
    return None


def find_task(name, test=None):
    """A named task, or the one that the files `name` (searched or scored) and `test` hold."""
    if name in TASKS:
        return TASKS[name]
    if not name.endswith((".jsonl", ".json")) and not Path(name).exists():
        raise UserError(f"unknown task {name}: give one of {', '.join(TASKS)}, or the path of a "
                        ".jsonl file.")
    make = choice_task if "choices" in read_items(name)[0] else generation_task
    task = make(name, (Path(name), Path(test) if test else None))
    if test and ("choices" in read_items(test)[0]) == task.generates:
        raise UserError(f"{test} and {name} are not items of one kind.")
    return task


def check_metric(task, metric):
    """The metric to report. Raises UserError if the task does not have it."""
    if metric and metric not in task.metrics:
        raise UserError(f"{task.name} has no metric {metric}; it has {', '.join(task.metrics)}.")
    return metric or task.metric


# ------------------------------------------------------------------------------------------------
# The demo: a tiny Llama that copies (needs its context) and follows a chain (does not)

DEMO_VOCAB, DEMO_LENGTH, DEMO_PERIODS, DEMO_STEPS = 64, 48, (12, 20), 700


def copy_sequences(n, rng):
    """n strings of random tokens that repeat with a period drawn from DEMO_PERIODS."""
    rows = []
    for _ in range(n):
        string = rng.sample(range(DEMO_VOCAB), rng.randint(*DEMO_PERIODS))
        rows.append((string * DEMO_LENGTH)[:DEMO_LENGTH])
    return rows


def demo_chain():
    """The fixed chain: token -> its successor, one cycle through the vocabulary."""
    cycle = random.Random(0).sample(range(DEMO_VOCAB), DEMO_VOCAB)
    return dict(zip(cycle, cycle[1:] + cycle[:1]))


def chain_sequences(n, rng):
    rows, successor = [], demo_chain()
    for _ in range(n):
        row = [rng.randrange(DEMO_VOCAB)]
        while len(row) < DEMO_LENGTH:
            row.append(successor[row[-1]])
        rows.append(row)
    return rows


def demo_text(tokens):
    return " ".join(f"t{token}" for token in tokens)


def demo_items(sequences, n, rng, answer=4):
    """Four-choice items: which tokens come next. The wrong choices are runs that occur elsewhere
    in the same kind of sequence, so only the place, or the chain's rule, tells them apart."""
    items = []
    for row in sequences(n, rng):
        cut = DEMO_LENGTH - answer
        right = row[cut:]
        starts = [s for s in range(cut - answer) if row[s: s + answer] != right]
        wrong = [row[s: s + answer] for s in rng.sample(starts, 3)]
        choices = rng.sample([right, *wrong], 4)
        items.append({"context": demo_text(row[:cut]), "choices": [demo_text(c) for c in choices],
                      "gold": choices.index(right)})
    return items


def make_demo():
    """Write out/demo: the teacher (trained once, some 70 s), its corpus and both tasks' items."""
    rng = random.Random(1)
    if not (DEMO / "teacher" / "config.json").exists():
        log("demo: training a tiny Llama to copy and to follow a chain (once)")
        make_output_dir(DEMO)
        train_demo_teacher(DEMO / "teacher")
    rows = copy_sequences(6000, rng) + chain_sequences(2000, rng)
    rng.shuffle(rows)
    _write_lines(DEMO / "train.jsonl", [{"text": demo_text(row)} for row in rows])
    for name, sequences in (("copy", copy_sequences), ("chain", chain_sequences)):
        for split in ("validation", "test"):
            _write_lines(DEMO / f"{name}-{split}.jsonl", demo_items(sequences, 200, rng))
    return DEMO / "teacher"


def _write_lines(path, rows):
    write_atomic(path, lambda p: p.write_text("".join(json.dumps(row) + "\n" for row in rows)))


def train_demo_teacher(path):
    """A 4-layer Llama of width 64, next-token loss, AdamW; the learning rate falls to zero over
    the last third. Saved with a word-level tokenizer as an ordinary checkpoint."""
    config = transformers.LlamaConfig(
        vocab_size=DEMO_VOCAB, hidden_size=64, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with torch.random.fork_rng():               # transformers draws from the global generator
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0,
                                  fused=True)
    rng = random.Random(0)
    for step in progress(range(DEMO_STEPS), desc="demo teacher", unit="step"):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, 3 * (1 - step / DEMO_STEPS))
        ids = torch.tensor(copy_sequences(48, rng) + chain_sequences(16, rng))
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    building = path.with_name("teacher.building")
    model.save_pretrained(building)
    demo_tokenizer().save_pretrained(building)
    os.replace(building, path)


def demo_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = {f"t{i}": i for i in range(DEMO_VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


# ------------------------------------------------------------------------------------------------
# The engine: log-likelihoods and greedy generation in fixed batches

@dataclass
class Request:
    """One thing the model is asked: the tokens it reads, and how many of the last are scored;
    or, for generation, the tokens to go on from and the limits."""
    tokens: list
    scored: int = 0
    limits: dict = field(default_factory=dict)


def encode_pair(tokenizer, context, continuation):
    """Tokens of context + continuation, and how many belong to the continuation: the harness's
    way. Trailing white space of the context moves to the continuation; the two are encoded
    together; the continuation's tokens are what is left after the context's own."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if not context:
        prefix = tokenizer.bos_token_id
        prefix = tokenizer.eos_token_id if prefix is None else prefix
        if prefix is None:
            raise UserError("an empty context needs a tokenizer with a BOS or EOS token.")
        tokens = tokenizer.encode(continuation, add_special_tokens=False)
        return [prefix] + tokens, len(tokens)
    whole = tokenizer.encode(context + continuation)
    scored = len(whole) - len(tokenizer.encode(context))
    return whole, max(scored, 0)


class Prepared:
    """A task's documents, tokenised once and cut into fixed batches, to be scored many times.

    Equal requests are asked once. Batches are cut from the requests sorted by length, longest
    first, so that what does not fit into memory fails at once, and the same for every model.
    """

    def __init__(self, task, docs, model, tokenizer, batch_size):
        self.task, self.docs, self.tokenizer = task, docs, tokenizer
        self.requests, self.of_doc, index = [], [], {}
        for doc in docs:
            mine = [self._request(ask, doc, model) for ask in task.requests(doc)]
            for request in mine:
                key = (tuple(request.tokens), request.scored, json.dumps(request.limits))
                if key not in index:
                    index[key] = len(self.requests)
                    self.requests.append(request)
            self.of_doc.append([index[tuple(r.tokens), r.scored, json.dumps(r.limits)]
                                for r in mine])
        order = sorted(range(len(self.requests)), key=lambda i: -len(self.requests[i].tokens))
        self.batches = [order[i: i + batch_size] for i in range(0, len(order), batch_size)]

    def _request(self, ask, doc, model):
        limit = max_length(model) or math.inf
        if self.task.generates:
            tokens = self.tokenizer.encode(ask[0])
            request, needed = Request(tokens, limits=ask[1]), len(tokens) + ask[1]["max_gen_toks"]
        else:
            tokens, scored = encode_pair(self.tokenizer, *ask)
            request, needed = Request(tokens, scored), len(tokens) - 1
        if needed > limit:
            raise UserError(f"{doc['source']}: {needed} tokens, but the model's context has only "
                            f"{limit}.")
        return request

    def fingerprint(self):
        return digest(self.docs, [(r.tokens, r.scored, r.limits) for r in self.requests],
                      self.batches, self.task.name)


@contextlib.contextmanager
def head_only_at(model, scored):
    """Within the block the LM head sees only the positions where `scored` (bool [B, T]) is true;
    the logits come out flattened, [number of true, vocabulary]."""
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: (args[0][scored],))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def batch_log_likelihoods(model, requests):
    """Summed log-probability of the scored tokens of each request, fp64 [len(requests)]. Padding
    is on the right, where a causal model cannot see it, so no mask is needed."""
    width = max(len(r.tokens) for r in requests) - 1
    ids = torch.zeros(len(requests), width, dtype=torch.long)
    scored = torch.zeros(len(requests), width, dtype=torch.bool)
    for row, request in enumerate(requests):
        end = len(request.tokens) - 1
        ids[row, :end] = torch.tensor(request.tokens[:-1])
        scored[row, end - request.scored: end] = True
    targets = torch.tensor([t for r in requests for t in r.tokens[len(r.tokens) - r.scored:]])
    owner = scored.nonzero()[:, 0]                                  # which request each target is of
    sums = torch.zeros(len(requests), dtype=torch.float64)
    if len(targets):
        with head_only_at(model, scored.to(model.device)):
            logits = model(ids.to(model.device), use_cache=False).logits        # [N, V]
        log_probs = logits.float().log_softmax(-1)
        picked = log_probs.gather(-1, targets.to(model.device)[:, None])[:, 0]  # [N]
        sums.index_add_(0, owner, picked.double().cpu())
    return sums


class StopOnText(transformers.StoppingCriteria):
    """A row is done when its new text contains one of its stop strings."""

    def __init__(self, tokenizer, stops, prompt_length):
        self.tokenizer, self.stops, self.prompt_length = tokenizer, stops, prompt_length

    def __call__(self, ids, scores, **kwargs):
        texts = self.tokenizer.batch_decode(ids[:, self.prompt_length:], skip_special_tokens=True)
        done = [any(s and s in text for s in stops) for text, stops in zip(texts, self.stops)]
        return torch.tensor(done, device=ids.device)


@torch.no_grad()
def batch_generate(model, tokenizer, requests):
    """Greedy continuation of each request, as text: left padding, the model's cache."""
    width = max(len(r.tokens) for r in requests)
    ids = torch.zeros(len(requests), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, width - len(request.tokens):] = torch.tensor(request.tokens)
        mask[row, width - len(request.tokens):] = 1
    steps = [r.limits["max_gen_toks"] for r in requests]
    out = model.generate(
        ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False, num_beams=1,
        max_new_tokens=max(steps), max_length=None, pad_token_id=_pad_id(tokenizer),
        temperature=None, top_p=None, top_k=None,
        stopping_criteria=transformers.StoppingCriteriaList(
            [StopOnText(tokenizer, [r.limits["until"] for r in requests], width)]))
    return [tokenizer.decode(row[width: width + n], skip_special_tokens=True)
            for row, n in zip(out, steps)]


def _pad_id(tokenizer):
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in known if i is not None)


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


def evaluate(model, prepared, metric=None, quiet=False):
    """Score `model`, whatever is swapped into it, on prepared documents -> Score.
    Raises FloatingPointError for a log-likelihood that is not finite."""
    task, outputs = prepared.task, [None] * len(prepared.requests)
    for batch in progress(prepared.batches, desc=task.name, unit="batch", leave=False,
                          disable=quiet):
        requests = [prepared.requests[i] for i in batch]
        if task.generates:
            answers = batch_generate(model, prepared.tokenizer, requests)
        else:
            answers = batch_log_likelihoods(model, requests).tolist()
        for i, answer in zip(batch, answers):
            outputs[i] = answer
    items, per_doc = [], []
    for doc, indices in zip(prepared.docs, prepared.of_doc):
        answers = [outputs[i] for i in indices]
        if not task.generates and not all(map(math.isfinite, answers)):
            raise FloatingPointError(f"a score of {doc['source']} is not finite with linear "
                                     f"layers {linear_layers(model)}")
        items.append(task.score(doc, answers))
        per_doc.append(answers)
    return Score(metric or task.metric, items, per_doc)


# ------------------------------------------------------------------------------------------------
# The command line

def add_task_flags(parser):
    parser.add_argument("--metric", help="report this metric of the task, not its usual one")
    parser.add_argument("--batch-size", type=positive(int), default=16, help="sequences at a time")
    parser.add_argument("--limit", type=positive(int), help="score only the first N items")


def parse_args():
    parser = ArgumentParser(__doc__)
    add_model_flags(parser)
    parser.add_argument("--task", help=f"one of {', '.join(TASKS)}, or a .jsonl file")
    add_task_flags(parser)
    parser.add_argument("--out", help="directory for the per-item results, one .jsonl per task")
    return parser.parse_args()


def prepare(path, task, model, tokenizer, args):
    """Documents of one split of a task, ready to be scored."""
    return Prepared(task, read_items(path)[: args.limit], model, tokenizer, args.batch_size)


def score_task(name, model, tokenizer, args):
    """Score one task, print its line, write its items -> the result as a dict."""
    task = find_task(name)
    metric = check_metric(task, args.metric)
    split = task.splits[1] or task.splits[0]
    score = evaluate(model, prepare(split, task, model, tokenizer, args), metric)
    result = {"task": name, "split": str(split), "n": score.n, "metric": metric,
              "value": score.mean(), "stderr": score.stderr(),
              "metrics": {m: score.mean(m) for m in task.metrics}}
    log(f"{name}: {metric} {result['value']:.4f} +- {result['stderr']:.4f} (n = {score.n}, "
        f"{split}); " + ", ".join(f"{m} {v:.4f}" for m, v in result["metrics"].items()))
    if args.out:
        rows = [{"source": doc["source"], "outputs": outputs, **item} for doc, outputs, item in
                zip(prepare_docs(split, args), score.outputs, score.items)]
        path = make_output_dir(args.out) / f"{Path(name).stem}-items.jsonl"
        _write_lines(path, rows)
        result["items"] = str(path)
    return result


def prepare_docs(path, args):
    return read_items(path)[: args.limit]


def main():
    args = parse_args()
    following = None
    if args.model is None:
        log("demo: scores the demo's teacher; --model and --task score anything else")
        args.model, args.out = str(make_demo()), args.out or str(DEMO)
        args.task = args.task or "copy,chain"
        following = "python distill.py"
    if args.task is None:
        raise UserError(f"--task is missing: one of {', '.join(TASKS)}, or a .jsonl file.")
    for name in args.task.split(","):
        check_metric(find_task(name), args.metric)
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.trust_remote_code)
    results = [score_task(name, model, tokenizer, args) for name in args.task.split(",")]
    finish({"model": args.model, "linear_layers": linear_layers(model), "dtype": str(model.dtype),
            "device": str(model.device), "versions": versions(), "results": results}, following)


if __name__ == "__main__":
    run_script(main)
