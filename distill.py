"""Phase 1, blockwise local distillation: one linear module per attention layer (section 3.1).

    python distill.py                                           # the demo: offline, CPU
    python distill.py --model Qwen/Qwen2.5-1.5B --attn jet --out runs/jet       # the paper's mix
    python distill.py --model M --data corpus.jsonl --attn gdn --tokens 1000000 --out runs/gdn
    python distill.py --finetune pubmedqa --model runs/s/opt --out runs/tuned   # Figure 5
    torchrun --nproc-per-node 8 distill.py --model M --out runs/gdn     # 8 processes share a batch

At every layer l the linear module gets the hidden states that the teacher's attention module gets,
and learns to give that module's output:  L_l = MSE(O_full, O_linear).  No gradient crosses a layer,
so one teacher forward serves all layers, and layers that are distilled apart (--layers 0-9, then
--layers 10-27, with two --out) give exactly the same modules.

--out, which replace.py takes as --blocks, gets layer_NNN.safetensors (the modules), distill.json
(settings, errors, cost), log.jsonl (losses) and held_out.safetensors (text that is never trained
on). After a kill, --resume continues from the last checkpoint and ends in the same tensors.

--finetune trains a hybrid of replace.py, or its base model, on a task's training split, and scores
it before and after: --out gets finetune.json, log.jsonl and the model, an ordinary checkpoint.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import random
import re
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

from eval import (
    DEMO, DEMO_TASKS, NEVER, ArgumentParser, Row, UserError, add_model_flags, add_task_flags,
    add_up, attention_modules, blame, claim_dir, command_line, cut, decoder_layers, digest,
    evaluate_hybrids, fingerprint, finish, finish_plan, forward_flops, gather, join_ranks,
    layer_file, load_model, log, max_length, parse_layers, positive, prepare, progress, rank, read,
    read_docs, read_run, run_script, search_documents, versions, world_size, write_atomic,
    write_directory, write_json, write_lines)
from linear_attn import MIXERS, linear_layers
import transformers     # after eval, which says plainly what is wrong where it cannot be imported

PAPER_MIX = ("nvidia/Nemotron-CC-v2:High-Quality@0.5,zjsd/RedStone-QA-mcq@0.25,"
             "zjsd/RedStone-QA-oq@0.25")

BETAS, FINAL_LR, WARMUP, CLIP = (0.9, 0.95), 0.01, (5, 50), 1.0
LR, TUNING_LR = 1e-3, 2e-5              # at a width of 1,536 or more, see peak_rate
SOLVE_BATCHES, SOLVE_TOKENS = 8, 32     # o_proj is solved on 8 batches, or 32 tokens per feature
HELD_OUT, STREAM_BLOCK = 32, 1024       # chunks; a stream is shuffled block by block
CHECKPOINTS, LOG_EVERY = 20, 10         # per run; steps
ROWS = 8                                # sequences that fine-tuning reads at a time
RECORDS, MODEL = ("finetune.json", "distill.json"), "model"


# ------------------------------------------------------------------------------------------------
# The method: the teacher's forward, one step of every layer

class LastAttentionReached(Exception):
    """Ends the teacher's forward after the last wanted attention."""


def teacher_forward(model, input_ids, layers, visit):
    """Run the teacher without gradients on input_ids [B, T] and call, at each layer l of `layers`,
    visit(l, hidden_states, attention_output) with the input and the output of its attention module,
    both [B, T, C]."""
    # A hook divides a compiled layer into two graphs, which may change its rounding: all layers get
    # one, so that they compute the same whichever `layers` are wanted.
    @torch.compiler.disable
    def hook(layer, module, args, kwargs, output):
        if layer in layers:
            visit(layer, args[0] if args else kwargs["hidden_states"], output[0])
        if layer == last:
            raise LastAttentionReached

    last = max(layers)
    handles = [attn.register_forward_hook(functools.partial(hook, layer), with_kwargs=True)
               for layer, attn in enumerate(attention_modules(model)[: last + 1])]
    try:
        with contextlib.suppress(LastAttentionReached), torch.no_grad():
            model.get_decoder()(input_ids.to(model.device, non_blocking=True), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def student_precision(model):
    """Beside a teacher in half precision the students multiply in bf16; their weights stay fp32.
    Open a new context each time: autocast keeps bf16 weights, which an update makes stale."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype.itemsize < 4)


def update_student(model, mixer, optimizer, hidden_states, target, lr):
    """One update of one layer on the input and the output of its attention, both [B, T, C] -> the
    loss, a scalar on its device."""
    with torch.enable_grad():
        with student_precision(model):
            output = mixer(hidden_states)[0]                                        # [B, T, C]
        loss = F.mse_loss(output.float(), target.float())           # L_l = MSE(O_full, O_linear)
        loss.backward()
    loss = loss.detach().clone()    # mse_loss's own storage keeps all B * T * C squared errors
    if world_size() > 1:            # means over the processes, of all tensors in one exchange
        means = [*(parameter.grad for parameter in mixer.parameters()), loss]
        vector_to_parameters(add_up(parameters_to_vector(means)).div_(world_size()), means)
    clip_grad_norm_(mixer.parameters(), CLIP)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return loss


class CapturedUpdate:
    """update_student, recorded as a CUDA graph for each mixer and then replayed. An update launches
    150 kernels, and a fast GPU finishes them sooner than the host can launch them one by one. The
    first two updates of a mixer run as usual, because a capture can neither compile kernels nor
    make Adam's moments. Only one graph runs at a time, so all share their inputs and memory."""

    def __init__(self, device):
        self.graphs, self.inputs, self.calls = {}, None, collections.Counter()
        self.lr, self.pool = torch.zeros((), device=device), torch.cuda.graph_pool_handle()

    def __call__(self, model, mixer, optimizer, hidden_states, target, lr):
        self.lr.fill_(lr)
        self.calls[mixer] += 1
        if self.calls[mixer] <= 2:
            return update_student(model, mixer, optimizer, hidden_states, target, self.lr)
        self.inputs = self.inputs or (hidden_states.clone(), target.clone())
        for static, tensor in zip(self.inputs, (hidden_states, target)):
            static.copy_(tensor)
        if mixer not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            optimizer.param_groups[0]["capturable"] = True      # Adam refuses a capture without it
            with torch.cuda.graph(graph, self.pool):
                loss = update_student(model, mixer, optimizer, *self.inputs, self.lr)
            self.graphs[mixer] = graph, loss
        graph, loss = self.graphs[mixer]
        graph.replay()
        return loss


def fastest_update(model):
    """The update for train_step. With a model in half precision on one GPU, this also compiles the
    teacher's layers, and updates are captured unless several processes share a batch. Nothing else
    was tried (fp32 runs no kernels of ours; --device auto may spread the model over several GPUs).
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or model.device.type != "cuda" or model.dtype.itemsize == 4:
        return update_student
    for layer in decoder_layers(model):
        layer.compile(dynamic=False)
    return CapturedUpdate(model.device) if world_size() == 1 else update_student


def train_step(model, mixers, optimizers, batch, lr, update=update_student):
    """One update of every layer on one batch [B, T] -> {layer: loss, a scalar on its device}. Each
    student learns inside the teacher's forward, so that the activations of only one student are in
    memory. Under torchrun `batch` is this process's part of the batch."""
    losses = {}

    def distill_layer(layer, hidden_states, target):
        losses[layer] = update(model, mixers[layer], optimizers[layer], hidden_states, target, lr)

    teacher_forward(model, batch, list(mixers), distill_layer)
    return losses


def peak_rate(model, rate):
    """A narrower model learns best at a higher rate: at width 64, distillation did at 1e-2."""
    width = model.config.get_text_config(decoder=True).hidden_size
    return rate * max(1.0, 1536 / width) ** 0.75


def learning_rate(step, steps, peak):
    """Linear warm-up over a tenth of the steps, but 5 to 50, since Adam's first steps move every
    weight by the full rate; then a cosine from `peak` to FINAL_LR * peak."""
    warmup = min(WARMUP[1], max(WARMUP[0], steps // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    fraction = (step - warmup) / max(steps - warmup, 1)
    return peak * (FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * fraction)))


# ------------------------------------------------------------------------------------------------
# Before and after training: the modules, the closed form of o_proj, the held-out error

def make_mixers(model, attn, layers, init, seed):
    """{layer: linear module made from that layer's attention}, fp32, ready for training."""
    attention = attention_modules(model)
    return {layer: MIXERS[attn].from_attention(attention[layer], model.config, layer, init, seed)
            .float().requires_grad_(True) for layer in layers}


def make_optimizers(modules):
    return {name: torch.optim.AdamW(module.parameters(), lr=0.0, betas=BETAS, weight_decay=0,
                                    fused=True) for name, module in modules.items()}


@torch.no_grad()
def solve_o_proj(model, mixers, batches):
    """Solve every module's o_proj in closed form, because its output is linear in o_proj: a ridge
    regression of the remaining error, O_full - O_linear, on the module's head outputs. A change is
    fitted on the even batches, another on the odd ones, and each is scaled, by 0 to 1, to fit the
    other half best. One that fits only noise shrinks to nothing, so a late solve does no harm."""
    normal = {layer: [0, 0] for layer in mixers}    # [X^T X | X^T R] of even and of odd batches
    tokens_needed = SOLVE_TOKENS * max(mixer.o_proj.in_features for mixer in mixers.values())

    def visit(layer, hidden_states, target):
        o_proj = mixers[layer].o_proj
        with student_precision(model):
            features = mixers[layer].head_outputs(hidden_states)
        features = features.float()                                                 # [B, T, F]
        rest = target.float() - o_proj(features)                                    # [B, T, C]
        if o_proj.bias is not None:
            features = F.pad(features, (0, 1), value=1.0)
        # Many GPUs have hardly any fp64. Sums over one sequence are short enough for fp32, and
        # they are the same on any number of processes.
        for x, xr in zip(features, torch.cat([features, rest], dim=-1)):
            normal[layer][half] = normal[layer][half] + (x.T @ xr).double()

    for number, batch in enumerate(batches, 1):
        half = 1 - number % 2
        teacher_forward(model, batch, list(mixers), visit)
        if number >= SOLVE_BATCHES and number * batch.numel() * world_size() >= tokens_needed:
            break
    for layer, halves in normal.items():
        halves = [add_up(half).tensor_split([len(half)], dim=1) for half in halves]
        o_proj = mixers[layer].o_proj
        for (gram, moment), (test_gram, test_moment) in (halves, halves[::-1]):
            ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
            change = torch.linalg.solve(gram + ridge, moment)                   # [F (+ 1), C]
            best = (change * test_moment).sum() / (change * (test_gram @ change)).sum()
            share = best.clamp(0, 1).nan_to_num()           # 0 / 0 where nothing is left to solve
            change = (share / 2 * change).T.float()         # the mean of the two halves' changes
            o_proj.weight += change[:, : o_proj.in_features]
            if o_proj.bias is not None:
                o_proj.bias += change[:, -1]


@torch.no_grad()
def held_out_error(model, mixers, chunks, batch_size):
    """{layer: {"mse", "relative_mse" (over the target's variance), "cosine" (mean over tokens)}} on
    held-out chunks [N, T]. Raises FloatingPointError for an MSE that is not finite."""
    sums = {layer: mixer.o_proj.weight.new_zeros(4, dtype=torch.float64)
            for layer, mixer in mixers.items()}

    def visit(layer, hidden_states, target):
        with student_precision(model):
            output = mixers[layer](hidden_states)[0]
        output, target = output.double(), target.double()                           # [B, T, C]
        cosine = F.cosine_similarity(output, target, dim=-1)                        # [B, T]
        sums[layer] += torch.stack([(output - target).square().sum(), target.sum(),
                                    target.square().sum(), cosine.sum()])

    for batch in chunks.split(batch_size)[rank()::world_size()]:
        teacher_forward(model, batch, list(mixers), visit)
    sums = torch.stack([layer_sums.cpu() for layer_sums in sums.values()])          # [L, 4]
    squares, total, total_squares, cosine = add_up(sums).T                          # [L] each
    tokens = chunks.numel()
    count = tokens * model.config.get_text_config(decoder=True).hidden_size
    mse, variance = squares / count, total_squares / count - (total / count) ** 2
    columns = torch.stack([mse, mse / variance, cosine / tokens], dim=1)            # [L, 3]
    for layer, finite in zip(mixers, mse.isfinite()):
        if not finite:
            raise FloatingPointError(f"the held-out error of layer {layer} is not finite: look for "
                                     "NaN in the model's weights, or try a smaller --lr")
    return {layer: dict(zip(("mse", "relative_mse", "cosine"), row))
            for layer, row in zip(mixers, columns.tolist())}


def finite_losses(losses, modules, step):
    """{name: loss} as numbers. Raises FloatingPointError where a loss or a weight is not finite,
    since a finite loss can have a gradient that is not."""
    for name, loss in losses.items():
        if not torch.stack([t.isfinite().all() for t in (loss, *modules[name].parameters())]).all():
            what = "the model" if name == MODEL else f"layer {name}"
            raise FloatingPointError(f"the loss or the weights of {what} are not finite after step "
                                     f"{step}; try a smaller --lr")
    return {name: loss.item() for name, loss in losses.items()}


# ------------------------------------------------------------------------------------------------
# The corpus: documents -> chunks of --seq-len tokens -> shuffled batches

# held_out: [N, T]. chunks(): the training chunks [T] from the first one on, without end, of which
# `block` are shuffled together. skipped: {dataset: rows without text}.
Corpus = collections.namedtuple("Corpus", "held_out chunks block skipped")


def open_corpus(args, tokenizer):
    """The corpus that --data names: of a local file the last chunks are held out, of streamed Hub
    datasets the first."""
    path, column, skipped = Path(args.data), args.text_column, collections.Counter()
    if not path.is_file() and path.suffix not in (".jsonl", ".gz", ".parquet", ".txt"):
        sources = open_streams(args.data, column.split(","))
        read = lambda: pack(documents(sources, tokenizer, skipped), args.seq_len)
        held_out = torch.stack(list(itertools.islice(read(), HELD_OUT)))
        chunks = lambda: itertools.islice(read(), HELD_OUT, None)
        return Corpus(held_out, chunks, STREAM_BLOCK, skipped)
    rows = [{column: path.read_text(encoding="utf-8")}] if path.suffix == ".txt" else [
        row for _, row in read_docs(args.data)]
    texts = documents([(args.data, rows, column, 1.0)], tokenizer, skipped, once=True)
    chunks = list(pack(progress(texts, desc="tokenise", unit="doc", leave=False), args.seq_len))
    if len(chunks) < 2:
        raise UserError(f"{path} fills {len(chunks)} chunks of {args.seq_len} tokens, and at least "
                        "two are needed: take more text or a smaller --seq-len.")
    chunks, held_out = torch.stack(chunks).split(len(chunks) - min(HELD_OUT, len(chunks) // 2))
    if args.tokens > chunks.numel():
        log(f"corpus: {chunks.numel():,} training tokens, read {args.tokens / chunks.numel():.1f} "
            "times, each time in a new seeded order")
    return Corpus(held_out, lambda: itertools.cycle(chunks), len(chunks), skipped)


def open_streams(data, columns):
    """Streams of Hub datasets `id:config@weight,...`: [(name, rows, text column, weight)]."""
    import datasets
    sources, parts = [], data.split(",")
    if len(columns) not in (1, len(parts)):
        raise UserError("--text-column takes one name, or one for each dataset of --data.")
    for part, column in zip(parts, itertools.cycle(columns)):
        match = re.fullmatch(r"([^:@]+)(?::([^@]+))?(?:@(\d*\.?\d+))?", part.strip())
        if not match or float(match[3] or 1) == 0:
            raise UserError(f"--data {part!r} is not id:config@weight with a positive weight.")
        with blame(f"the dataset {part} cannot be opened (a gated one needs a login on the Hub, a "
                   "local .jsonl works offline)"):
            rows = datasets.load_dataset(match[1], match[2], split="train", streaming=True)
        sources.append((match[1], rows, column, float(match[3] or 1)))
    return sources


def documents(sources, tokenizer, skipped, once=False):
    """The tokens of each document. The next one always comes from the source that is furthest
    behind its share of the tokens. A source that has ended is read again, unless `once`."""
    iterators, taken = [iter(rows) for _, rows, *_ in sources], [0] * len(sources)
    skipped.clear()
    while True:
        i = min(range(len(sources)), key=lambda j: taken[j] / sources[j][-1])
        name, rows, column, _ = sources[i]
        row = next(iterators[i], None)
        if row is None and once:
            return
        if row is None:
            log(f"corpus: {name} has ended and is read again")
            iterators[i] = iter(rows)
        elif isinstance(row.get(column), str) and row[column]:
            tokens = tokenizer.encode(row[column])
            # Documents end with EOS, unless the tokenizer marks their beginning with BOS.
            if tokenizer.eos_token_id is not None and tokens[:1] != [tokenizer.bos_token_id]:
                tokens.append(tokenizer.eos_token_id)
            taken[i] += len(tokens)
            yield tokens
        else:
            skipped[name] += 1
            if column not in row or (skipped[name] == 100 and not taken[i]):
                raise UserError(f"{name} has no text in column {column!r}; columns: "
                                f"{', '.join(row)} (see --text-column).")


def pack(token_lists, seq_len):
    """Cut the concatenated documents into chunks [seq_len]; an incomplete last one is dropped."""
    tokens = itertools.chain.from_iterable(token_lists)
    while len(chunk := list(itertools.islice(tokens, seq_len))) == seq_len:
        yield torch.tensor(chunk)


def shuffled(chunks, block, seed):
    """Chunks in a seeded order: reads `block` chunks, yields them shuffled, reads the next."""
    for number in itertools.count():
        rows = list(itertools.islice(chunks, block))
        generator = torch.Generator().manual_seed(1_000_003 * seed + number)
        for i in torch.randperm(block, generator=generator):
            yield rows[i]


def batches(corpus, args, first=0):
    """Token ids [B, T], from step `first` on, without end; under torchrun this process's rows of
    each batch. A resume draws the earlier chunks again, so that the later ones are the same."""
    chunks = shuffled(corpus.chunks(), corpus.block, args.seed)
    for _ in progress(range(first * args.batch_size), desc="skip what was seen", unit="chunk",
                      leave=False, disable=not first):
        next(chunks)
    while True:
        batch = torch.stack(list(itertools.islice(chunks, args.batch_size)))
        yield batch[rank()::world_size()]


# ------------------------------------------------------------------------------------------------
# The run directory

def save_tensors(path, tensors, metadata=None):
    """Write a safetensors file, all of it or nothing; `metadata` is {name: string}."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, lambda p: save_file(tensors, p, metadata))


def save_checkpoint(out, state, modules, optimizers):
    """Write everything that a resume needs into one file: weights, Adam's moments, `state` and the
    length of log.jsonl."""
    if rank() > 0:      # all processes hold equal weights
        return
    tensors = {}
    for module_name, module in modules.items():
        for name, parameter in module.named_parameters():
            adam = optimizers[module_name].state[parameter]     # empty before the first step
            for key, tensor in {"weight": parameter, **adam}.items():
                tensors[f"{module_name} {name} {key}"] = tensor
    state = {**state, "log_bytes": (out / "log.jsonl").stat().st_size}
    save_tensors(out / "checkpoint.safetensors", tensors, {"state": json.dumps(state)})


@torch.no_grad()
def load_checkpoint(out, modules, optimizers):
    """Restore weights and Adam's moments -> the saved `state`, or None without a checkpoint."""
    if not (out / "checkpoint.safetensors").exists():
        return None
    with safe_open(out / "checkpoint.safetensors", "pt") as file:
        state = json.loads(file.metadata()["state"])
        for module_name, name, key in map(str.split, file.keys()):
            tensor = file.get_tensor(f"{module_name} {name} {key}")
            module_name = int(module_name) if module_name.isdigit() else module_name
            parameter = modules[module_name].get_parameter(name)
            if key == "weight":
                parameter.copy_(tensor)
            else:
                optimizers[module_name].state[parameter][key] = tensor.to(parameter.device)
    if rank() == 0:
        os.truncate(out / "log.jsonl", state["log_bytes"])      # the later steps run again
    return state


def write_log(out, event, step, **values):
    """Append one JSON object to log.jsonl, on disk when this returns. Step 0 begins a new file."""
    if rank() == 0:
        with open(out / "log.jsonl", "a" if step else "w") as file:
            print(json.dumps({"event": event, "step": step, **values}), file=file, flush=True)
            os.fsync(file.fileno())


def remove_checkpoints(out):
    if rank() == 0:
        for path in Path(out).glob("*checkpoint*"):     # a kill may have left half of one
            path.unlink()


def open_run(args, settings):
    """Make or reopen the run directory -> (path, its record). Raises UserError for another run."""
    mine, other = RECORDS if args.finetune else RECORDS[::-1]
    out = claim_dir(args.out, foreign=("config.json", "result.json", "search.jsonl", other))
    record, settings = read_run(out, mine), json.loads(json.dumps(settings))
    if record is None:
        record = {"finished": False, "command": command_line(), **settings}
        write_json(out / mine, record)
    for key, value in settings.items():
        if key != "versions" and record.get(key) != value:
            raise UserError(f"{out} belongs to another run: its {key} is {record.get(key)}.")
    return out, record


# ------------------------------------------------------------------------------------------------
# The demo: a tiny Llama that copies (needs its context) and follows a chain (does not)

DEMO_VOCAB, DEMO_LENGTH, DEMO_PERIODS, DEMO_STEPS = 64, 48, (12, 20), 500
DEMO_CHAIN = random.Random(0).sample(range(DEMO_VOCAB), DEMO_VOCAB)     # a cycle through all tokens


def demo_rows(task, n, rng):
    """n rows of tokens. copy: random tokens that repeat with a period drawn from DEMO_PERIODS.
    chain: parts of one fixed cycle, where each token alone determines the next."""
    rows = []
    for _ in range(n):
        if task == "copy":
            cycle, start = rng.sample(range(DEMO_VOCAB), rng.randint(*DEMO_PERIODS)), 0
        else:
            cycle, start = DEMO_CHAIN, DEMO_CHAIN.index(rng.randrange(DEMO_VOCAB))
        rows.append((cycle * DEMO_LENGTH)[start: start + DEMO_LENGTH])
    return rows


def demo_text(tokens):
    return " ".join(f"t{token}" for token in tokens)


def demo_items(task, n, rng, answer=4):
    """n items: which of four choices comes next? The wrong ones occur earlier in the same row, so
    only their place, or the rule of the chain, tells them apart."""
    items = []
    for row in demo_rows(task, n, rng):
        context, right = row[:-answer], row[-answer:]
        others = [context[i: i + answer] for i in range(len(context) - answer)]
        wrong = rng.sample([other for other in others if other != right], 3)
        choices = rng.sample([right, *wrong], 4)
        items.append({"context": demo_text(context), "choices": [demo_text(c) for c in choices],
                      "gold": choices.index(right)})
    return items


def make_demo():
    """Write the teacher (trained once, about 45 s), its corpus and the tasks' items -> its path."""
    if not (DEMO / "teacher" / "config.json").exists():
        log("demo: training a tiny Llama to copy and to follow a chain (once)")
        parts = train_demo_teacher(), demo_tokenizer()
        write_directory(DEMO / "teacher", lambda p: [part.save_pretrained(p) for part in parts])
    rng = random.Random(1)
    corpus = demo_rows("copy", 6000, rng) + demo_rows("chain", 2000, rng)
    rng.shuffle(corpus)
    files = {"train": [{"text": demo_text(row)} for row in corpus]}
    for task, split in itertools.product(DEMO_TASKS, ("validation", "test")):
        files[f"{task}-{split}"] = demo_items(task, 200, rng)
    for name, lines in files.items():
        write_lines(DEMO / f"{name}.jsonl", lines)
    return DEMO / "teacher"


def train_demo_teacher():
    """A 4-layer Llama; the learning rate falls to zero over the last third."""
    config = transformers.LlamaConfig(
        vocab_size=DEMO_VOCAB, hidden_size=64, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with torch.random.fork_rng():               # transformers draws from the global generator
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=0, fused=True)
    rng = random.Random(0)
    for step in progress(range(DEMO_STEPS), desc="demo teacher", unit="step"):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, 3 * (1 - step / DEMO_STEPS))
        ids = torch.tensor(demo_rows("copy", 48, rng) + demo_rows("chain", 16, rng))    # [64, 48]
        model(ids, labels=ids, use_cache=False).loss.backward()
        clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return model


def demo_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = {demo_text([token]): token for token in range(DEMO_VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


# ------------------------------------------------------------------------------------------------
# All of phase 1

def train(out, state, modules, optimizers, args, steps, stream, update):
    """Run the steps that `state` has not seen: update(batch, lr) -> {name of a module: loss}.
    Logs the losses, and saves checkpoints; state["seconds"] is the time of all steps."""
    first, began = state["step"], time.perf_counter() - state["seconds"]
    every = max(1, steps // CHECKPOINTS)
    bar = progress(range(first, steps), initial=first, total=steps, unit="step",
                   desc="fine-tune" if args.finetune else "distill")
    for step, batch in zip(bar, stream):
        lr = learning_rate(step, steps, args.lr)
        losses, step = update(batch, lr), step + 1
        report, save = (step % n == 0 or step == steps for n in (LOG_EVERY, every))
        if report or save:      # only here does the host wait for the GPU
            losses = finite_losses(losses, modules, step)
        if report:
            bar.set_postfix(loss=f"{sum(losses.values()) / len(losses):.3e}")
            write_log(out, "train", step, lr=lr, loss=losses)
        if save:
            state |= {"step": step, "seconds": time.perf_counter() - began}
            save_checkpoint(out, state, modules, optimizers)


def distill(model, mixers, corpus, args, out, record):
    """Solve, train, solve, measure and save the modules, from the checkpoint in `out` if there is
    one; `record` gets the errors and the cost."""
    steps = max(1, args.tokens // (args.batch_size * args.seq_len))
    optimizers = make_optimizers(mixers)
    state = load_checkpoint(out, mixers, optimizers)
    if state is None:
        if args.init == "inherit":
            solve_o_proj(model, mixers, batches(corpus, args))
        start = held_out_error(model, mixers, corpus.held_out, args.batch_size)
        state = {"step": 0, "seconds": 0.0, "start": start}
        write_log(out, "held-out", 0, errors=start)
        save_checkpoint(out, state, mixers, optimizers)
    stream, update = batches(corpus, args, state["step"]), fastest_update(model)
    train(out, state, mixers, optimizers, args, steps, stream,
          lambda batch, lr: train_step(model, mixers, optimizers, batch, lr, update))
    optimizers.clear()              # they are on disk, and the solve needs their memory
    del update                      # and that of captured graphs
    if args.init == "inherit":      # Adam's steps are coarse for o_proj: fit it to the new features
        solve_o_proj(model, mixers, stream)
    end = held_out_error(model, mixers, corpus.held_out, args.batch_size)
    write_log(out, "held-out", steps, errors=end)
    for name, rows in corpus.skipped.items():
        log(f"corpus: {rows:,} rows of {name} have no text and were skipped")
    if rank() > 0:
        return
    save_tensors(out / "held_out.safetensors", {"input_ids": corpus.held_out})
    for layer, mixer in mixers.items():
        save_tensors(layer_file(out, layer), mixer.state_dict())
    tokens = steps * args.batch_size * args.seq_len
    write_json(out / "distill.json", {
        **record, "held_out": {"start": state["start"], "end": end},
        "cost": {**cost_of(state["seconds"], tokens, model.device),
                 "flops": distill_flops(model, mixers, tokens, args.seq_len)},
        "skipped_rows": corpus.skipped, "finished": True})


def cost_of(seconds, tokens, device):
    """What every record has; the hours of all processes are added up."""
    hours, gpu = seconds * world_size() / 3600, device.type == "cuda"
    return {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds,
            "hours": hours, "gpu_hours": hours if gpu else None, "ranks": world_size(),
            "device": torch.cuda.get_device_name(device) if gpu else str(device),
            "peak_memory": peak_memory(device)}


def peak_memory(device):
    """In bytes: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def distill_flops(model, mixers, tokens, seq_len):
    """FLOPs of all training steps: the teacher's forward to the last wanted attention, and three
    times the students' forward. Neither the closed form nor the held-out error is counted."""
    flops = lambda module: forward_flops(module, model.config, tokens, tokens * seq_len)
    teacher = [*decoder_layers(model)[: max(mixers)], attention_modules(model)[max(mixers)]]
    return sum(map(flops, teacher)) + 3 * sum(map(flops, mixers.values()))


def plan(model, mixers, args):
    """--dry-run. Memory: students and Adam's moments in fp32, the gradients of one student, and for
    each token of a step 80 fp32 numbers per channel (measured on a CPU: 53 to 77)."""
    step, width = args.batch_size * args.seq_len, mixers[min(mixers)].q_proj.in_features
    steps = max(1, args.tokens // step)
    flops = distill_flops(model, mixers, steps * step, args.seq_len)
    finish_plan(args, model, mixers, {"steps": steps, "tokens": steps * step, "flops": flops},
                12 + 4 / len(mixers), 4 * 80 * width * step // world_size())


# ------------------------------------------------------------------------------------------------
# Fine-tuning on a task (Figure 5). Its loss is computed by the function that scores

def solved_requests(task, docs, model, tokenizer, args):
    """The Request of each document with its right answer, tokenised as it is scored. Where the task
    has no choices, the answer is what a shot would show, followed by the end-of-text token."""
    def answer(doc):
        text = task.target(doc) if task.target else task.gold(doc)
        return (text[0] if isinstance(text, list) else text) + (tokenizer.eos_token or "")

    solved = task if task.choices else dataclasses.replace(
        task, target=None, choices=lambda doc: [answer(doc)], gold=lambda doc: 0)
    prepared = prepare(solved, docs, model, tokenizer, args)
    right = map(solved.right, prepared.docs)
    return [prepared.requests[numbers[choice]]
            for numbers, choice in zip(prepared.of_doc, right) if choice is not NEVER]


def tuning_step(model, trained, optimizer, requests, lr, half):
    """One update on `requests` -> {MODEL: mean loss over the tokens of their answers}. To save
    memory, gradients are summed over forwards of a few rows, which torchrun's processes share."""
    loss, total = torch.zeros((), device=model.device), sum(r.scored for r in requests)
    mine = requests[rank()::world_size()]
    rows = [Row(0, len(request.tokens) - 1, [i]) for i, request in enumerate(mine)]
    for part in cut(model, rows, ROWS):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
            part_loss = -read(model, mine, part)[1].sum() / total
        part_loss.backward()
        loss += part_loss.detach()
    if world_size() > 1:
        sums = [*(parameter.grad for parameter in trained), loss]
        vector_to_parameters(add_up(parameters_to_vector(sums)), sums)
    clip_grad_norm_(trained, CLIP)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)      # zeros, not None: add_up needs all gradients
    return {MODEL: loss}


def tuning_batches(requests, args, first=0):
    """Lists of --batch-size requests, from step `first` on, without end, shuffled in each epoch."""
    order = shuffled(itertools.cycle(requests), len(requests), args.seed)
    order = itertools.islice(order, first * args.batch_size, None)
    while True:
        yield list(itertools.islice(order, args.batch_size))


def tune(model, module, requests, score, args, out):
    """Train `module`, the model or its linear layers, from the checkpoint in `out` if there is one
    -> what score() gives before and after, and the cost."""
    steps, half = math.ceil(args.epochs * len(requests) / args.batch_size), model.dtype.itemsize < 4
    state = None
    if not (out / "checkpoint.safetensors").exists():
        state = {"step": 0, "seconds": 0.0, "before": score()}
        write_log(out, "before", 0, score=state["before"])
    trained = list(module.requires_grad_(True).parameters())
    dtypes = [parameter.dtype for parameter in trained]
    for parameter in trained:           # bf16 would lose small updates
        parameter.data = parameter.data.float()
        parameter.grad = torch.zeros_like(parameter)
    modules, optimizers = {MODEL: module}, make_optimizers({MODEL: module})
    state = load_checkpoint(out, modules, optimizers) or state
    train(out, state, modules, optimizers, args, steps,
          tuning_batches(requests, args, state["step"]), lambda batch, lr:
          tuning_step(model, trained, optimizers[MODEL], batch, lr, half))
    optimizers.clear()
    for parameter, dtype in zip(trained, dtypes):       # the saved numbers are the ones scored
        parameter.grad, parameter.data = None, parameter.data.to(dtype)
    module.requires_grad_(False)
    after = score()
    write_log(out, "after", steps, score=after)
    seen = itertools.islice(tuning_batches(requests, args), steps)
    tokens = sum(len(request.tokens) - 1 for batch in seen for request in batch)
    return {"before": state["before"], "after": after,
            "cost": cost_of(state["seconds"], tokens, model.device)}


def finetune(args):
    """All of --finetune, from flags to files -> the run's record."""
    task, metric, docs = search_documents(args, train=True)
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.trust_remote_code)
    linear = linear_layers(model)
    if args.train == "linear" and not linear:
        raise UserError(f"--train linear: {args.model} has no linear layers.")
    requests = solved_requests(task, docs["validation"], model, tokenizer, args)
    reported = prepare(task, docs["test"], model, tokenizer, args) if "test" in docs else None
    args.lr = args.lr or peak_rate(model, TUNING_LR)
    settings = {
        "model": args.model, "model_fingerprint": fingerprint(model), "linear_layers": linear,
        "base_model": getattr(model.config, "base_model", None) or args.model,
        "mixer": ",".join(sorted(set(model.config.linear_attn))) if linear else None,
        "task": args.finetune, "metric": metric,
        "split": task.splits[1] if task.hub else args.test or ("test" if reported else None),
        "train": args.train, "seed": args.seed, "documents": len(requests),
        "data_fingerprint": digest(requests, reported and reported.fingerprint()),
        "recipe": {"lr": args.lr, "final_lr": FINAL_LR, "warmup": WARMUP, "betas": BETAS,
                   "clip": CLIP, "epochs": args.epochs, "batch_size": args.batch_size,
                   "dtype": str(model.dtype)},
        "versions": versions()}

    def score():
        if reported is None:        # a file without --test
            return None
        scores = evaluate_hybrids(model, reported, {}, [()], metric, args.allow_code_execution)
        return scores and {"score": scores[0].mean(), "stderr": scores[0].stderr(),
                           "n": scores[0].n}

    out, record = gather(open_run(args, settings) if rank() == 0 else None)[0]
    if not record["finished"]:
        module = model
        if args.train == "linear":
            module = torch.nn.ModuleList(attention_modules(model)[layer] for layer in linear)
        result = tune(model, module, requests, score, args, out)
        if rank() == 0:
            write_directory(out / MODEL, lambda path: (model.save_pretrained(path),
                                                       tokenizer.save_pretrained(path)))
            write_json(out / RECORDS[0], {**record, **result, "finished": True})
    return gather(read_run(out, RECORDS[0]))[0]


def parse_args():
    parser = ArgumentParser(__doc__)
    add_model_flags(parser)
    add = parser.add_argument
    add("--attn", choices=MIXERS, default="gdn", help="the linear module")
    add("--init", choices=("inherit", "random"), default="inherit",
        help="start from the teacher's projections, or (ablation) from nothing")
    add("--layers", help="distill only these, e.g. 3,7-12 (default: all)")
    add("--data", help="a .jsonl, .jsonl.gz, .parquet or .txt file, or Hub datasets "
        f"id:config@weight,... (default with a Hub model: the paper's mix, {PAPER_MIX})")
    add("--text-column", default="text", help="one for all datasets, or one each")
    add("--tokens", type=positive(int), default=100_000_000, help="paper: 100 M")
    add("--seq-len", type=positive(int), default=512, help="tokens per chunk")
    add("--lr", type=positive(float), help="peak learning rate (default: 1e-3, for --finetune "
        "2e-5; multiplied by (1536 / width)^0.75 if the width is below 1,536)")
    add("--out", help="the run directory")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--dry-run", nargs="?", type=positive(float), const=0, metavar="TFLOPS",
        help="print steps, FLOPs and memory, and the hours at a rate of TFLOPS; reads no weights")
    add("--finetune", metavar="TASK", help="no distillation: train --model on the training split "
        "of a named task, or on a .jsonl file, and score it before and after")
    add = parser.add_argument_group("fine-tuning and its scores").add_argument
    add("--train", choices=("all", "linear"), default="all", help="all weights, or linear layers")
    add("--epochs", type=positive(float), default=3.0)
    add("--test", help=".jsonl file to score, if --finetune is a file")
    add("--test-docs", help="local file of the documents that a named task scores")
    add_task_flags(parser)
    parser.set_defaults(batch_size=32, search_size=sys.maxsize, paper_splits=False)
    return parser.parse_args()


def main():
    args = parse_args()
    torch.set_float32_matmul_precision("highest")       # TF32 is too coarse for the closed form
    join_ranks(args.device)
    demo = args.model is None and not args.finetune
    args.task = args.finetune
    if demo:
        log("demo: distills a tiny Llama; --model, --data and --out distill anything else")
        args.model, args.data = str(make_demo()), str(DEMO / "train.jsonl")
        args.out, args.resume = args.out or str(DEMO / "blocks"), True
        args.tokens, args.seq_len, args.batch_size = 300_000, 48, 64    # a minute on a CPU
    if args.out is None:
        raise UserError("--out is missing: the directory that this run is to be saved in.")
    if any(read_run(args.out, name) for name in RECORDS) and not args.resume:
        raise UserError(f"{args.out} holds a run: add --resume to continue it.")
    if args.finetune:
        if args.model is None or args.data or args.layers or args.dry_run is not None:
            raise UserError("--finetune needs a --model, and takes no --data, --layers, --dry-run.")
        record = finetune(args)
        remove_checkpoints(args.out)
        for when in ("before", "after") if record["after"] else ():
            log(f"{record['metric']} on {record['split']} {when} fine-tuning: " + "{score:.4f} +- "
                "{stderr:.4f} (n = {n})".format_map(record[when]))
        return finish({"out": args.out, **record}, f"python eval.py --model {args.out}/{MODEL} "
                      f"--task {args.test or args.finetune}")
    if args.data is None and Path(args.model).exists():
        raise UserError("--data is missing: a local file with text, or Hub datasets.")
    if args.docs or args.test or args.test_docs:
        raise UserError("--docs, --test and --test-docs go with --finetune.")
    if args.batch_size % world_size():
        raise UserError(f"--batch-size is not a multiple of the {world_size()} processes.")
    args.data = args.data or PAPER_MIX
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.trust_remote_code,
                                  base_only=True, weights=args.dry_run is None)
    count = len(attention_modules(model))
    layers = parse_layers(args.layers, count) if args.layers else list(range(count))
    if args.seq_len > (max_length(model) or math.inf):
        raise UserError(f"--seq-len is beyond the model's context of {max_length(model)} tokens.")
    args.lr = args.lr or peak_rate(model, LR)
    mixers = make_mixers(model, args.attn, layers, args.init, args.seed)
    if args.dry_run is not None:
        return plan(model, mixers, args)
    corpus = open_corpus(args, tokenizer)
    settings = {
        "teacher": args.model, "teacher_fingerprint": fingerprint(model), "attn": args.attn,
        "init": args.init, "layers": layers, "data": args.data, "tokens": args.tokens,
        "data_fingerprint": digest(corpus.held_out.tolist()), "seed": args.seed,
        "recipe": {"lr": args.lr, "final_lr": FINAL_LR, "warmup": WARMUP, "betas": BETAS,
                   "clip": CLIP, "solve": (SOLVE_BATCHES, SOLVE_TOKENS), "seq_len": args.seq_len,
                   "batch_size": args.batch_size, "dtype": str(model.dtype)},
        "versions": versions()}
    out, record = gather(open_run(args, settings) if rank() == 0 else None)[0]
    if not record["finished"]:
        distill(model, mixers, corpus, args, out, record)
        record = gather(read_run(out))[0]       # rank 0 brings it when everything is saved
    remove_checkpoints(out)
    start, end, cost = record["held_out"]["start"], record["held_out"]["end"], record["cost"]
    log("layer |     MSE at start -> end      | relative MSE start -> end | cosine start -> end")
    for layer, a in start.items():
        b = end[layer]
        log(f"{layer:>5} | {a['mse']:.4e} -> {b['mse']:.4e}    | {a['relative_mse']:9.4f} -> "
            f"{b['relative_mse']:.4f}       | {a['cosine']:.4f} -> {b['cosine']:.4f}")
    means = (sum(e["relative_mse"] for e in errors.values()) / len(end) for errors in (start, end))
    log("mean relative MSE on held-out chunks, start -> end: {:.4f} -> {:.4f}".format(*means))
    log(f"{cost['tokens']:,} tokens in {cost['seconds']:.1f} s: {cost['tokens_per_second']:,.0f} "
        f"tokens per second; peak memory {cost['peak_memory'] / 2**20:,.0f} MiB")
    following = "python replace.py" if demo else (
        f"python replace.py --model {args.model} --blocks {args.out} --task TASK --out DIR")
    finish({"out": str(out), **{k: record[k] for k in ("teacher", "attn", "layers", "held_out",
                                                       "cost")}}, following)


if __name__ == "__main__":
    run_script(main)
