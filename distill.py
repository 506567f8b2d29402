"""Phase 1, blockwise local distillation: one linear module per attention layer (paper, section 3.1).

    python distill.py                                           # the demo: offline, CPU
    python distill.py --model Qwen/Qwen2.5-1.5B --attn jet --out runs/jet       # the paper's mix
    python distill.py --model M --data corpus.jsonl --attn gdn --tokens 1000000 --out runs/gdn

For every layer l the linear module is fed the hidden states that the teacher's attention module
gets, and learns to reproduce that module's output:  L_l = MSE(O_full, O_linear).  The teacher is
frozen and no gradient crosses a layer, so the layers are independent problems that share one
no-grad teacher forward; training some of them gives exactly what training all of them gives.

--out is the run directory: layer_NNN.safetensors, distill.json, log.jsonl and the held-out chunks.
The last line on stdout is the result as one JSON object.
"""

import contextlib
import itertools
import json
import math
import random
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from eval import (
    DEMO, ArgumentParser, UserError, add_model_flags, add_up, attention_modules, command_line,
    digest, fingerprint, finish, gather, join_ranks, load_model, lock_dir, log, make_demo,
    make_output_dir, max_length, parse_layers, positive, progress, rank, read_docs, run_script,
    versions, world_size, write_atomic, write_json)
from linear_attn import MIXERS

PAPER_MIX = "nvidia/Nemotron-CC-v2:High-Quality@0.5,zjsd/RedStone-QA-mcq@0.25,zjsd/RedStone-QA-oq@0.25"
OPEN_STAND_IN = "HuggingFaceFW/fineweb-edu:sample-10BT"

BETAS, FINAL_LR, WARMUP, CLIP = (0.9, 0.95), 0.01, (5, 50), 1.0
SOLVE_BATCHES, SOLVE_TOKENS = 8, 32     # a regression reads 8 batches, and 32 tokens a feature
HELD_OUT = 32               # chunks
FIRST_ROWS = 100            # of a stream: one of them must have text
SHUFFLE_BUFFER = 1024       # chunks of a stream that are mixed with each other
CHECKPOINTS = 20            # per run
LOG_EVERY = 10              # steps


# ------------------------------------------------------------------------------------------------
# The corpus: documents -> one stream of tokens -> chunks of --seq-len

def encode_document(tokenizer, text):
    """Tokens of one document with what marks its border: BOS where the tokenizer adds it,
    otherwise EOS at the end where there is one."""
    tokens = tokenizer.encode(text)
    if tokenizer.eos_token_id is not None and tokens[:1] != [tokenizer.bos_token_id]:
        tokens.append(tokenizer.eos_token_id)
    return tokens


def pack(token_lists, seq_len):
    """Cut the concatenated documents into chunks [seq_len]; an incomplete last one is dropped."""
    buffer = []
    for tokens in token_lists:
        buffer.extend(tokens)
        start = 0
        while len(buffer) - start >= seq_len:
            yield torch.tensor(buffer[start: start + seq_len])
            start += seq_len
        del buffer[:start]


class FileCorpus:
    """A .jsonl, .jsonl.gz or .parquet file (one document per row, in `column`) or a .txt file (one
    document), in memory. The last chunks are held out; every pass over the rest has its own
    seeded order."""
    skipped = {}

    def __init__(self, path, column, tokenizer, seq_len, seed):
        documents = progress(read_documents(path, column), desc="tokenise", unit="doc",
                             leave=False)
        chunks = list(pack((encode_document(tokenizer, d) for d in documents), seq_len))
        if len(chunks) < 2:
            raise UserError(f"{path} fills {len(chunks)} chunks of {seq_len} tokens, and at least "
                            "two are needed (one is held out): take more text or a smaller "
                            "--seq-len.")
        held_out = min(HELD_OUT, len(chunks) // 2)
        self.chunks, self.held_out = torch.stack(chunks).split(len(chunks) - held_out)
        self.seed = seed

    def describe(self, tokens):
        size = self.chunks.numel()
        if tokens > size:
            log(f"corpus: {size:,} training tokens, read {tokens / size:.1f} times, each time in "
                "a new seeded order")

    def batches(self, batch_size, first_step):
        """Token ids [batch_size, seq_len], from step `first_step` on, without end."""
        n, position = len(self.chunks), first_step * batch_size
        order, current = None, None
        while True:
            rows = []
            for i in range(position, position + batch_size):
                if i // n != current:
                    current = i // n
                    generator = torch.Generator().manual_seed(1_000_003 * self.seed + current)
                    order = torch.randperm(n, generator=generator)
                rows.append(self.chunks[order[i % n]])
            yield torch.stack(rows)
            position += batch_size


def read_documents(path, column):
    """The texts of a local corpus. Raises UserError naming the line that has none."""
    path = Path(path)
    if path.suffix == ".txt":
        try:
            return [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError:
            raise UserError(f"{path} is not a UTF-8 text file.")
    documents = []
    for place, row in read_docs(str(path)):
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            names = ", ".join(row) if isinstance(row, dict) else "none"
            raise UserError(f"{place}: no text column {column!r} (columns: {names}); name it with "
                            "--text-column.")
        documents.append(row[column])
    return documents


class StreamCorpus:
    """Hub datasets, streamed and mixed by tokens in the proportions of their weights. The first
    chunks are held out; the rest passes through a seeded shuffle buffer. A dataset that ends is
    begun again. `skipped`: {dataset: rows without text, which are passed over}."""

    def __init__(self, spec, columns, tokenizer, seq_len, seed):
        self.sources = parse_sources(spec)
        columns = columns.split(",")
        if len(columns) not in (1, len(self.sources)):
            raise UserError("--text-column takes one name, or one for each dataset of --data.")
        self.columns = columns * (len(self.sources) // len(columns))
        self.tokenizer, self.seq_len, self.seed = tokenizer, seq_len, seed
        self.streams = [open_stream(*source[:2]) for source in self.sources]
        for stream, (name, _, _), column in zip(self.streams, self.sources, self.columns):
            check_column(stream, name, column)
        chunks = pack(self._documents(), seq_len)
        self.held_out = torch.stack([next(chunks) for _ in range(HELD_OUT)])

    def describe(self, tokens):
        log("corpus: streamed " + ", ".join(f"{name} ({weight:g})" for name, _, weight
                                            in self.sources))

    def _documents(self):
        """Tokenised documents, the next always from the dataset furthest behind its share."""
        iterators = [iter(stream) for stream in self.streams]
        taken, self.skipped = [0] * len(iterators), {}
        while True:
            i = min(range(len(taken)), key=lambda j: taken[j] / self.sources[j][2])
            try:
                row = next(iterators[i])
            except StopIteration:
                log(f"corpus: {self.sources[i][0]} has ended and is read again")
                iterators[i] = iter(self.streams[i])
                row = next(iterators[i])
            if not has_text(row, self.columns[i]):
                name = self.sources[i][0]
                self.skipped[name] = self.skipped.get(name, 0) + 1
                continue
            tokens = encode_document(self.tokenizer, row[self.columns[i]])
            taken[i] += len(tokens)
            yield tokens

    def _shuffled(self):
        chunks = pack(self._documents(), self.seq_len)
        for _ in range(HELD_OUT):
            next(chunks)
        rng = random.Random(self.seed)
        buffer = [next(chunks) for _ in range(SHUFFLE_BUFFER)]
        while True:
            i = rng.randrange(SHUFFLE_BUFFER)
            yield buffer[i]
            buffer[i] = next(chunks)

    def batches(self, batch_size, first_step):
        """Token ids [batch_size, seq_len], from step `first_step` on, without end. A resume
        reads the stream again from its beginning, so that it sees the same batches."""
        chunks = self._shuffled()
        for _ in progress(range(first_step * batch_size), desc="skip what was seen",
                          unit="chunk", leave=False, disable=not first_step):
            next(chunks)
        while True:
            yield torch.stack([next(chunks) for _ in range(batch_size)])


def parse_sources(spec):
    """"id:config@weight,..." -> [(id, config or None, weight)]."""
    sources = []
    for part in spec.split(","):
        name, _, weight = part.strip().partition("@")
        name, _, config = name.partition(":")
        try:
            weight = float(weight or 1)
        except ValueError:
            weight = 0
        if not name or not 0 < weight < math.inf:
            raise UserError(f"--data {part!r} is not of the form id, id:config or "
                            "id:config@weight with a positive weight.")
        sources.append((name, config or None, weight))
    return sources


def open_stream(name, config):
    """A streamed Hub dataset (split train). Raises UserError with the names that exist."""
    import datasets
    try:
        return datasets.load_dataset(name, config, split="train", streaming=True)
    except Exception as error:      # whatever the Hub, the network or the dataset answers
        reason = str(error).strip().split("\n")[0][:200]
    try:
        known = "; its configs: " + ", ".join(datasets.get_dataset_config_names(name))
    except Exception:
        known = ""
    raise UserError(f"the dataset {name}{':' + config if config else ''} cannot be opened "
                    f"({reason}){known}. If it is gated, accept its terms on the Hub and log in; "
                    f"{OPEN_STAND_IN} is open; a local .jsonl or .txt file works offline.")


def has_text(row, column):
    return isinstance(row.get(column), str) and row[column] != ""


def check_column(stream, name, column):
    first = list(itertools.islice(stream, FIRST_ROWS))
    if not any(has_text(row, column) for row in first):
        columns = ", ".join(first[0] if first else {})
        raise UserError(f"{name} has no text in column {column!r} of its first {len(first)} rows; "
                        f"its columns: {columns}. Name one with --text-column.")


def open_corpus(args, tokenizer):
    """The corpus that --data names: a local file, else Hub datasets."""
    if Path(args.data).is_file() or args.data.endswith((".jsonl", ".gz", ".parquet", ".txt")):
        if not Path(args.data).is_file():
            raise UserError(f"{args.data}: no such file.")
        return FileCorpus(args.data, args.text_column, tokenizer, args.seq_len, args.seed)
    return StreamCorpus(args.data, args.text_column, tokenizer, args.seq_len, args.seed)


# ------------------------------------------------------------------------------------------------
# The teacher's forward, seen layer by layer

class LastAttentionReached(Exception):
    """Ends the teacher's forward: nothing after the last wanted attention is needed."""


def teacher_forward(model, input_ids, layers, visit):
    """Run the teacher without gradients on input_ids [B, T] and call, at each layer l of
    `layers`, visit(l, hidden_states, attention_output) with what its attention module takes and
    gives, both [B, T, C]. Whatever visit builds is freed before the next layer runs."""
    def hook_for(layer):
        def hook(module, args, kwargs, output):
            visit(layer, args[0] if args else kwargs["hidden_states"], output[0])
            if layer == max(layers):
                raise LastAttentionReached
        return hook

    attention = attention_modules(model)
    handles = [attention[layer].register_forward_hook(hook_for(layer), with_kwargs=True)
               for layer in layers]
    try:
        with torch.no_grad():
            ids = input_ids.to(model.device, non_blocking=True)
            model.get_decoder()(ids, use_cache=False)
    except LastAttentionReached:
        pass
    finally:
        for handle in handles:
            handle.remove()


def to_host(tensors):
    """Tensors of one shape, of whatever devices, as one on the CPU: the host waits once."""
    first, *rest = tensors
    return torch.stack([first, *(tensor.to(first.device) for tensor in rest)]).cpu()


def student_precision(model):
    """Linear modules keep fp32 weights; beside a teacher in half precision their matrix products
    run in bf16. A fresh context per use: autocast keeps cast weights as long as it lives."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype.itemsize < 4)


# ------------------------------------------------------------------------------------------------
# Distillation

def make_mixers(model, attn, layers, init, seed):
    """{layer: linear module made from that layer's attention}, fp32, ready for training."""
    attention = attention_modules(model)
    return {layer: MIXERS[attn].from_attention(attention[layer], model.config, layer, init, seed)
            .float().requires_grad_(True) for layer in layers}


@contextlib.contextmanager
def unrounded_products():
    """fp32 matrix products in fp32: TF32 would keep 10 of 23 bits, fewer than the ridge needs."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def solve_o_proj(model, mixers, batches, share_batch=False):
    """Solve every module's o_proj, a ridge regression of the teacher's attention outputs on the
    module's own head outputs: its output is linear in o_proj, so this is the best for its present
    features. Even and odd batches each propose a change, and so much of it is made as the others
    confirm: a change that fits mere noise shrinks to nothing, so a solve does not harm a trained
    o_proj. With `share_batch` every rank has a part of the batches."""
    normal = {layer: [0, 0] for layer in mixers}    # [X^T X | X^T R] of even and of odd batches

    def visit(layer, hidden_states, target):
        o_proj = mixers[layer].o_proj
        with student_precision(model):
            features = mixers[layer].head_outputs(hidden_states).float()            # [B, T, F]
        with unrounded_products():
            rest = target.float() - o_proj(features)                                # [B, T, C]
            if o_proj.bias is not None:
                features = F.pad(features, (0, 1), value=1.0)
            # Many GPUs have hardly any fp64. Sums of one sequence are short enough for fp32, and
            # they are the same on any number of ranks.
            for x, xr in zip(features, torch.cat([features, rest], dim=-1)):
                normal[layer][half] = normal[layer][half] + (x.T @ xr).double()

    for i, batch in enumerate(batches):
        half = i % 2
        teacher_forward(model, batch, list(mixers), visit)
    for layer, halves in normal.items():
        if share_batch:
            halves = [add_up(half) for half in halves]
        if not all(half.isfinite().all() for half in halves):
            raise FloatingPointError(f"what layer {layer}'s attention module takes or gives is not "
                                     "finite: look for NaN in the model's weights")
        halves = [half.tensor_split([len(half)], dim=1) for half in halves]
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


def for_a_solve(stream, mixers, args):
    """So many of a stream's batches that a regression cannot fit their noise."""
    tokens = SOLVE_TOKENS * max(mixer.o_proj.in_features for mixer in mixers.values())
    needed = math.ceil(tokens / (args.batch_size * args.seq_len))
    return itertools.islice(stream, max(SOLVE_BATCHES, needed))


@torch.no_grad()
def held_out_error(model, mixers, chunks, batch_size, share_batch=False):
    """{layer: {"mse", "relative_mse", "cosine"}} on held-out chunks [N, T]. Relative: over the
    variance of the target over all elements. Cosine: mean over tokens. With `share_batch` the
    ranks take turns with the batches."""
    sums = {layer: torch.zeros(4, dtype=torch.float64, device=mixer.o_proj.weight.device)
            for layer, mixer in mixers.items()}

    def visit(layer, hidden_states, target):
        with student_precision(model):
            output = mixers[layer](hidden_states)[0]
        output, target = output.double(), target.double()
        cosine = F.cosine_similarity(output, target, dim=-1)
        sums[layer] += torch.stack([(output - target).square().sum(), target.sum(),
                                    target.square().sum(), cosine.sum()])

    for batch in chunks.split(batch_size)[rank() if share_batch else 0::
                                          world_size() if share_batch else 1]:
        teacher_forward(model, batch, list(mixers), visit)
    sums = to_host(sums.values())                                                       # [L, 4]
    squares, total, total_squares, cosine = (add_up(sums) if share_batch else sums).T   # [L] each
    tokens = chunks.numel()
    count = tokens * model.config.get_text_config(decoder=True).hidden_size
    mse, variance = squares / count, total_squares / count - (total / count) ** 2
    columns = {"mse": mse, "relative_mse": mse / variance, "cosine": cosine / tokens}
    return {layer: {name: column[i].item() for name, column in columns.items()}
            for i, layer in enumerate(mixers)}


def learning_rate(step, steps, peak):
    """Linear warm-up over a tenth of the steps, but 5 to 50, since Adam's first steps move every
    weight by the whole rate; then a cosine from `peak` to FINAL_LR * peak."""
    least, most = WARMUP
    warmup = min(most, max(least, steps // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    fraction = (step - warmup) / max(steps - warmup, 1)
    return peak * (FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * fraction)))


def default_lr(hidden_size):
    """1e-3 from width 1,536 on, the value of the field for 100 M tokens; narrower models want
    more: at width 64 about 1e-2 was best, so it falls as width^-0.75."""
    return 1e-3 * max(1.0, 1536 / hidden_size) ** 0.75


def make_optimizers(mixers):
    return {layer: torch.optim.AdamW(mixer.parameters(), lr=0.0, betas=BETAS, weight_decay=0,
                                     fused=True) for layer, mixer in mixers.items()}


def average_over_ranks(mixer, loss):
    """The mean over all ranks of a layer's gradients and of its loss, in one exchange."""
    gradients = [parameter.grad for parameter in mixer.parameters()]
    flat = torch.cat([loss.detach().view(1), *(g.flatten() for g in gradients)])
    loss, *means = add_up(flat).div_(world_size()).split([1, *(g.numel() for g in gradients)])
    for gradient, mean in zip(gradients, means):
        gradient.copy_(mean.view_as(gradient))
    return loss[0]


def train_step(model, mixers, optimizers, batch, lr, share_batch=False):
    """One step of every layer on one batch [B, T] -> {layer: loss}. At each attention module its
    student runs forward, backward and updates before the teacher goes on. With `share_batch`,
    `batch` is this rank's part of the step's."""
    losses = {}

    def distill_layer(layer, hidden_states, target):
        mixer, optimizer = mixers[layer], optimizers[layer]
        with torch.enable_grad():
            with student_precision(model):
                output = mixer(hidden_states)[0]
            loss = F.mse_loss(output.float(), target.float())       # L_l = MSE(O_full, O_linear)
            loss.backward()
        if share_batch:
            loss = average_over_ranks(mixer, loss)
        torch.nn.utils.clip_grad_norm_(mixer.parameters(), CLIP)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        losses[layer] = loss.detach()

    teacher_forward(model, batch, list(mixers), distill_layer)
    return losses


def check_finite(losses, last):
    """The losses [{layer: loss}, ...] of successive steps up to `last` -> those of that step, as
    numbers. Raises FloatingPointError naming the first layer and step without a finite one."""
    values = to_host(loss for step in losses for loss in step.values()).view(len(losses), -1)
    if not values.isfinite().all():
        step, layer = (~values.isfinite()).nonzero()[0].tolist()
        raise FloatingPointError(f"the loss of layer {list(losses[0])[layer]} is not finite at "
                                 f"step {last - len(losses) + 1 + step}; try a smaller --lr")
    return dict(zip(losses[0], values[-1].tolist()))


def check_weights(mixers, step):
    """A finite loss can have a gradient that is not: no such weights are saved."""
    for layer, mixer in mixers.items():
        if not to_host(p.isfinite().all() for p in mixer.parameters()).all():
            raise FloatingPointError(f"the weights of layer {layer} are not finite after step "
                                     f"{step}; try a smaller --lr")


# ------------------------------------------------------------------------------------------------
# The run directory

def layer_file(out, layer):
    return Path(out) / f"layer_{layer:03d}.safetensors"


def save_tensors(path, tensors):
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_atomic(path, lambda p: save_file(tensors, p))


def load_tensors(path, prefixes=""):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)}


def save_checkpoint(out, step, mixers, optimizers, progress_so_far):
    """Weights and both Adam moments of the layers that this rank keeps (`mixers`), then, when every
    rank's are on disk, the step in checkpoint.json, which makes them count. The stream of batches
    follows from the step."""
    name, tensors = f"checkpoint-{step}-{rank()}.safetensors", {}
    for layer, mixer in mixers.items():
        state = optimizers[layer].state
        for key, parameter in mixer.named_parameters():
            tensors[f"{layer}.{key}"] = parameter
            for moment in ("exp_avg", "exp_avg_sq"):
                if parameter in state:
                    tensors[f"{layer}.{key}.{moment}"] = state[parameter][moment]
    if tensors:
        save_tensors(out / name, tensors)
    files = [file for file in gather(name if tensors else None) if file]
    if rank() == 0:
        write_json(out / "checkpoint.json",
                   {"step": step, "progress": progress_so_far, "files": files})
        remove_checkpoints(out, files)
    gather("the step counts")           # only now may a rank begin the next checkpoint


def remove_checkpoints(out, but=()):
    """All checkpoints but the named files, and what a kill left half written."""
    for path in [*out.glob("checkpoint-*.safetensors"), *out.glob(".checkpoint-*.tmp")]:
        if path.name not in but:
            path.unlink()


@torch.no_grad()
def load_checkpoint(out, mixers, optimizers):
    """Restore what save_checkpoint saved -> (step, progress), or None where nothing was."""
    if not (out / "checkpoint.json").exists():
        return None
    saved = json.loads((out / "checkpoint.json").read_text())
    tensors = {}
    for file in saved["files"]:
        tensors |= load_tensors(out / file, tuple(f"{layer}." for layer in mixers))
    for layer, mixer in mixers.items():
        for name, parameter in mixer.named_parameters():
            parameter.copy_(tensors[f"{layer}.{name}"])
            if saved["step"]:
                optimizers[layer].state[parameter] = {
                    "step": torch.tensor(float(saved["step"]), device=parameter.device),
                    **{m: tensors[f"{layer}.{name}.{m}"].to(parameter.device)
                       for m in ("exp_avg", "exp_avg_sq")}}
    return saved["step"], saved["progress"]


def read_run(out):
    """distill.json of a run directory, or None where there is none."""
    path = Path(out) / "distill.json"
    return json.loads(path.read_text()) if path.is_file() else None


def open_run(args, settings):
    """Make or reopen the run directory -> (path, its record). Raises UserError where it holds
    another run, or this one without --resume."""
    out = make_output_dir(args.out)
    lock_dir(out)
    record = read_run(out)
    if record is None:
        if any((out / name).exists() for name in ("config.json", "result.json", "search.jsonl")):
            raise UserError(f"{out} already holds something else; give another --out.")
        record = {"finished": False, "command": command_line(), **settings}
        write_json(out / "distill.json", record)
        return out, record
    if not args.resume:
        raise UserError(f"{out} already holds a run; add --resume to go on with it, or give "
                        "another --out.")
    for key, value in json.loads(json.dumps(settings)).items():
        if key != "versions" and record.get(key) != value:
            raise UserError(f"{out} belongs to another run: its {key} is {record.get(key)}, not "
                            f"{value}.")
    return out, record


def load_blocks(runs, model, layers=None):
    """The modules that one or more finished runs distilled, {layer: mixer}, in the model's dtype
    and on its device. `runs`: directories, comma-separated, for layers distilled apart. Raises
    UserError for a run that is unfinished or of another model or mixer, and for missing layers."""
    records = {run: _usable_record(run, model) for run in runs.split(",")}
    if len({(record["attn"], record["init"]) for record in records.values()}) > 1:
        raise UserError(f"the runs {runs} hold different mixers or starts; a hybrid takes one.")
    attention, mixers = attention_modules(model), {}
    for layer in range(len(attention)) if layers is None else layers:
        run = next((run for run, record in records.items() if layer in record["layers"]), None)
        if run is None or not layer_file(run, layer).is_file():
            raise UserError(f"{runs} has no module for layer {layer}: distill it with --layers "
                            f"{layer}.")
        record = records[run]
        mixer = MIXERS[record["attn"]].from_attention(
            attention[layer], model.config, layer, record["init"], seed=None)
        try:
            mixer.load_state_dict(load_tensors(layer_file(run, layer)))
        except (RuntimeError, SafetensorError):
            raise UserError(f"{layer_file(run, layer)} does not hold a {record['attn']} module "
                            f"for layer {layer} of this model.")
        device = next(attention[layer].parameters()).device
        mixers[layer] = mixer.to(device, model.dtype).eval().requires_grad_(False)
    return mixers


def _usable_record(run, model):
    record = read_run(run)
    if record is None:
        raise UserError(f"{run} holds no distill.json, so it is not a run of distill.py.")
    if not record["finished"]:
        raise UserError(f"the distillation in {run} is not finished; go on with --resume.")
    if record["teacher_fingerprint"] != fingerprint(model):
        raise UserError(f"the modules in {run} were distilled from another model "
                        f"({record['teacher']}).")
    return record


class Log:
    """log.jsonl: one JSON object per event, on disk when the call returns."""

    def __init__(self, path, keep_until_step):
        self.path = path
        rows = []
        if path.exists():           # after a resume, what came after the checkpoint is run again
            for line in path.read_text().splitlines():
                with_step = json.loads(line) if line.endswith("}") else {"step": math.inf}
                if with_step["step"] <= keep_until_step:
                    rows.append(line + "\n")
        if rank() == 0:
            write_atomic(path, lambda p: p.write_text("".join(rows)))

    def write(self, **row):
        if rank() > 0:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()


def print_errors(start, end):
    log("layer |     MSE at start -> end      | relative MSE start -> end | cosine start -> end")
    for layer in end:
        a, b = start[layer], end[layer]
        log(f"{layer:5d} | {a['mse']:.4e} -> {b['mse']:.4e}    | {a['relative_mse']:9.4f} -> "
            f"{b['relative_mse']:.4f}       | {a['cosine']:.4f} -> {b['cosine']:.4f}")
    for name, errors in (("start", start), ("end", end)):
        mean = sum(e["relative_mse"] for e in errors.values()) / len(errors)
        log(f"mean relative MSE on held-out chunks at {name}: {mean:.4f}")


def peak_memory(device):
    """In bytes: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ------------------------------------------------------------------------------------------------
# The whole of phase 1

def merged(by_layer):
    """{layer: value} of all ranks' layers."""
    parts = gather(by_layer)
    return {layer: part[layer] for layer in sorted(set().union(*parts))
            for part in [next(p for p in parts if layer in p)]}


def batches_of_rank(corpus, args, first_step, share_batch):
    """The batches from a step on; with `share_batch` this rank's part of each."""
    for batch in corpus.batches(args.batch_size, first_step):
        yield batch[rank()::world_size()] if share_batch else batch


def distill(model, corpus, args, out, layers):
    """Train the modules of `layers`, with checkpoints -> (mixers of this rank, what to record)."""
    steps = max(1, args.tokens // (args.batch_size * args.seq_len))
    share_batch = args.shard == "batch" and world_size() > 1
    own = layers if args.shard == "batch" else layers[rank()::world_size()]
    mixers = make_mixers(model, args.attn, own, args.init, args.seed)
    optimizers = make_optimizers(mixers)
    kept = {} if share_batch and rank() > 0 else mixers     # what this rank saves
    resumed = load_checkpoint(out, mixers, optimizers)
    if resumed:
        first, so_far = resumed
        log(f"resumed at step {first} of {steps}")
    else:
        if args.init == "inherit":
            stream = batches_of_rank(corpus, args, 0, share_batch)
            solve_o_proj(model, mixers, for_a_solve(stream, mixers, args), share_batch)
        errors = merged(held_out_error(model, mixers, corpus.held_out, args.batch_size,
                                       share_batch))
        first, so_far = 0, {"seconds": 0.0, "start": errors}
        save_checkpoint(out, 0, kept, optimizers, so_far)
    journal = Log(out / "log.jsonl", first)
    if first == 0:
        journal.write(event="held-out", step=0, errors=so_far["start"])
    stream = batches_of_rank(corpus, args, first, share_batch)
    every, began = max(1, steps // CHECKPOINTS), time.perf_counter() - so_far["seconds"]
    unseen = []         # losses that are still on the device
    bar = progress(range(first, steps), initial=first, total=steps, desc="distill", unit="step")
    for step in bar:
        lr = learning_rate(step, steps, args.lr)
        unseen.append(train_step(model, mixers, optimizers, next(stream), lr, share_batch))
        report, save = ((step + 1) % n == 0 or step + 1 == steps for n in (LOG_EVERY, every))
        if report or save:      # the host waits for the GPU here alone
            losses, unseen = check_finite(unseen, step), []
        if report:
            losses = merged(losses)
            bar.set_postfix(loss=f"{sum(losses.values()) / len(losses):.3e}")
            journal.write(event="train", step=step + 1, lr=lr, loss=losses)
        if save:
            check_weights(kept, step)
            so_far["seconds"] = time.perf_counter() - began
            save_checkpoint(out, step + 1, kept, optimizers, so_far)
    optimizers.clear()              # they are on disk, and the solve needs their memory
    if args.init == "inherit":      # Adam's steps are coarse for o_proj: solved again, it is at its
        # best for what the features have become, so a short run, too, ends better than it began
        solve_o_proj(model, mixers, for_a_solve(stream, mixers, args), share_batch)
        check_weights(kept, steps)
    end = merged(held_out_error(model, mixers, corpus.held_out, args.batch_size, share_batch))
    journal.write(event="held-out", step=steps, errors=end)
    tokens = steps * args.batch_size * args.seq_len
    return kept, {
        "held_out": {"start": so_far["start"], "end": {str(k): v for k, v in end.items()}},
        "cost": {"seconds": so_far["seconds"], "tokens": tokens,
                 "tokens_per_second": tokens / so_far["seconds"], "ranks": world_size(),
                 "peak_memory": peak_memory(model.device), "device": str(model.device)}}


def parse_args():
    parser = ArgumentParser(__doc__)
    add_model_flags(parser)
    parser.add_argument("--attn", choices=MIXERS, default="gdn", help="the linear module")
    parser.add_argument("--init", choices=("inherit", "random"), default="inherit",
                        help="start from the teacher's projections, or (ablation) from nothing")
    parser.add_argument("--layers", help="distill only these, e.g. 3,7-12 (default: all)")
    parser.add_argument("--data", help="a .jsonl, .jsonl.gz, .parquet or .txt file, or Hub "
                        "datasets id:config@weight,... "
                        f"(default with a Hub model: the paper's mix, {PAPER_MIX})")
    parser.add_argument("--text-column", default="text",
                        help="column with the text; one for all datasets, or one each")
    parser.add_argument("--tokens", type=positive(int), default=100_000_000,
                        help="to train on (paper: 100 M)")
    parser.add_argument("--seq-len", type=positive(int), default=512, help="tokens per chunk")
    parser.add_argument("--batch-size", type=positive(int), default=32, help="chunks per step")
    parser.add_argument("--lr", type=positive(float), help="peak learning rate (default: 1e-3, "
                        "for models narrower than 1,536 times (1536 / width)^0.75)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard", choices=("batch", "layers"), default="batch", help="what several "
                        "processes (torchrun) divide among them: each batch, or the layers")
    parser.add_argument("--out", help="the run directory")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    return parser.parse_args()


def demo_args(args):
    """The embedded default: the demo's teacher and corpus, sized for a minute on a CPU."""
    log("demo: distills a tiny Llama; --model, --data and --out distill anything else")
    args.model, args.data = str(make_demo()), str(DEMO / "train.jsonl")
    args.out, args.resume = args.out or str(DEMO / "blocks"), True
    args.tokens, args.seq_len, args.batch_size = 300_000, 48, 64


def check_args(args):
    if args.out is None:
        raise UserError("--out is missing: the directory that this run is to be saved in.")
    if args.data is None and Path(args.model).exists():
        raise UserError("--data is missing: a .jsonl, .jsonl.gz, .parquet or .txt file, or "
                        "Hub datasets.")
    args.data = args.data or PAPER_MIX
    if args.shard == "batch" and args.batch_size % world_size():
        raise UserError(f"--batch-size {args.batch_size} cannot be divided among {world_size()} "
                        "processes; choose a multiple, or --shard layers.")


def main():
    args = parse_args()
    join_ranks(args.device)
    demo = args.model is None
    if demo:
        demo_args(args)
    check_args(args)
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.trust_remote_code,
                                  base_only=True)
    num_layers = len(attention_modules(model))
    layers = parse_layers(args.layers, num_layers) if args.layers else list(range(num_layers))
    if args.shard == "layers" and len(layers) < world_size():
        raise UserError(f"--shard layers: {world_size()} processes have only {len(layers)} layers "
                        "to divide; start fewer.")
    if args.seq_len > (max_length(model) or math.inf):
        raise UserError(f"--seq-len {args.seq_len} is beyond the model's context of "
                        f"{max_length(model)} tokens.")
    args.lr = args.lr or default_lr(model.config.get_text_config(decoder=True).hidden_size)
    make_mixers(model, args.attn, layers[:1], args.init, args.seed)     # refuses before any work
    corpus = open_corpus(args, tokenizer)
    corpus.describe(args.tokens)
    recipe = {"lr": args.lr, "final_lr": FINAL_LR, "warmup": WARMUP, "betas": BETAS, "clip": CLIP,
              "solve": (SOLVE_BATCHES, SOLVE_TOKENS), "seq_len": args.seq_len,
              "batch_size": args.batch_size, "dtype": str(model.dtype)}
    settings = {
        "teacher": args.model, "teacher_fingerprint": fingerprint(model), "attn": args.attn,
        "init": args.init, "layers": layers, "data": args.data, "tokens": args.tokens,
        "data_fingerprint": digest(corpus.held_out.tolist()), "seed": args.seed,
        "recipe": recipe, "versions": versions()}
    out, record = gather(open_run(args, settings) if rank() == 0 else None)[0]
    if not record["finished"]:
        if rank() == 0:
            save_tensors(out / "held_out.safetensors", {"input_ids": corpus.held_out})
        mixers, outcome = distill(model, corpus, args, out, layers)
        for layer, mixer in mixers.items():
            save_tensors(layer_file(out, layer), mixer.state_dict())
        for name, rows in corpus.skipped.items():
            log(f"corpus: {rows:,} rows of {name} have no text and were skipped")
        record = {**record, **outcome, "skipped_rows": corpus.skipped, "finished": True}
        gather("all layers are saved")
        if rank() == 0:
            write_json(out / "distill.json", record)
    if rank() == 0:
        (out / "checkpoint.json").unlink(missing_ok=True)
        remove_checkpoints(out)
    start, end = ({int(k): v for k, v in record["held_out"][when].items()}
                  for when in ("start", "end"))
    print_errors(start, end)
    cost = record["cost"]
    log(f"{cost['tokens']:,} tokens in {cost['seconds']:.1f} s: {cost['tokens_per_second']:,.0f} "
        f"tokens per second; peak memory {cost['peak_memory'] / 2**20:,.0f} MiB; saved in {out}")
    following = "python replace.py" if demo else (
        f"python replace.py --model {args.model} --blocks {args.out} --task TASK --out DIR")
    finish({"out": str(out), **{k: record[k] for k in ("teacher", "attn", "layers", "held_out",
                                                       "cost")}}, following)


if __name__ == "__main__":
    run_script(main)
