"""Phase 2, greedy layer replacement: Algorithm 1 of the paper (section 3.2).

    python replace.py                                           # the demo: offline, CPU
    python replace.py --model M --blocks runs/gdn --task val.jsonl --test test.jsonl --out runs/s
    python replace.py --model M --blocks runs/gdn --task val.jsonl --layers 4,8,12 --out runs/l
    python replace.py --benchmark               # hours of both phases at the paper's size, on a GPU

Round by round, every layer that is still softmax attention is tried as its distilled linear module;
the layer whose replacement scores best on the validation split stays replaced. M_opt is the last
model that keeps P_min (by default 95 % of the base model's score), M_best the one with the best
score on the way. Both are scored on the test split, once, and saved as ordinary checkpoints:

    AutoModelForCausalLM.from_pretrained("OUT/opt", trust_remote_code=True)

Every evaluation is on disk (OUT/search.jsonl) before the next begins: run the same command again
after an interruption, and it goes on. The last line on stdout is the result as one JSON object.
"""

import collections
import contextlib
import functools
import itertools
import json
import math
import os
import random
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import eval as evaluation
from distill import (
    load_blocks, make_mixers, make_optimizers, peak_memory, read_run, teacher_forward, train_step)
from eval import (
    CHOICE_FILE, DEMO, DEMO_TASKS, TASKS, ArgumentParser, Prepared, UserError, add_model_flags,
    add_task_flags, answer_hybrids, attention_modules, check_metric, command_line, demo_file,
    demo_text, demo_tokenizer, digest, dtype_to_save, evaluate_hybrids, even_batches, file_task,
    find_device, find_task, fingerprint, finish, gather, join_ranks, layers_can_be_shared,
    load_model, lock_dir, log, make_demo, make_output_dir, pad, parse_layers, positive, prepare,
    progress, rank, run_script, split_docs, versions, world_size, write_atomic, write_json)
from kernels import measured_limits
from linear_attn import KNOWN, check_savable, replaced, save_hybrid
import transformers     # after eval, which says plainly what is wrong where it cannot be imported

SLACK = 1e-9        # scores are fractions of counts: equal counts must compare as equal


# ------------------------------------------------------------------------------------------------
# Algorithm 1

@dataclass
class Step:
    """One round of the search: what it replaced, and how close the decision was."""
    layers: tuple                       # all linear layers after this step
    score: float
    layer: int | None                   # the one layer that is new; None if the sets do not nest
    runner_up: int | None = None
    runner_up_score: float | None = None
    runner_up_layers: tuple | None = None
    ties: int = 0                       # other candidates with the same score


@dataclass
class Search:
    """What Algorithm 1 returns, and the way it took."""
    p_base: float
    p_min: float
    steps: list = field(default_factory=list)
    best: tuple = ()
    opt: tuple = ()


def every_full_layer(num_layers, current):
    """The candidates of a round of Algorithm 1: each layer still full, replaced."""
    return [current + (layer,) for layer in range(num_layers) if layer not in current]


def greedy(score, num_layers, max_drop=0.05, p_min=None, run_all=False,
           report=lambda step: None, candidates=every_full_layer, budget=None):
    """Algorithm 1. score([(layers), ...]) -> [P of the model with those layers linear, ...].

    P_min is `p_min`, or (1 - max_drop) P(base). With `run_all` the rounds go on, for the curve,
    until no full layer is left; what is returned as best and opt stays what Algorithm 1 returns.
    `budget` ends the search after so many layers. Other strategies have other `candidates`.
    """
    p_base = score([()])[0]                                         # M = M_best = M_opt = M_full
    search = Search(p_base, (1 - max_drop) * p_base if p_min is None else p_min)
    current, p_best, stopped = (), p_base, False
    while len(current) < min(num_layers, budget or num_layers):
        tried = candidates(num_layers, current)
        step = first_maximum(current, tried, score(tried))                  # P*, l*
        current = step.layers
        search.steps.append(step)
        report(step)
        if not stopped and step.score >= p_best - SLACK:                    # if P* >= P_best:
            search.best, p_best = current, step.score                       #   M_best = M*
        if not stopped and step.score >= search.p_min - SLACK:              # if P* >= P_min:
            search.opt = current                                            #   M = M_opt = M*
        else:                                                               # else stop
            stopped = True
            if not run_all:
                break
    return search


def first_maximum(current, tried, scores):
    """The Step to the first candidate that attains the maximum (strict >, so the lowest layer wins
    ties), with the first that comes next."""
    def first(indices):
        top = indices[0]
        for i in indices:
            top = i if scores[i] > scores[top] + SLACK else top
        return top

    def new_layer(layers):
        new = set(layers) - set(current)
        return new.pop() if len(new) == 1 and len(layers) == len(current) + 1 else None

    top = first(range(len(tried)))
    step = Step(tried[top], scores[top], new_layer(tried[top]))
    rest = [i for i in range(len(tried)) if i != top]
    if rest:
        second = first(rest)
        step.runner_up, step.runner_up_layers = new_layer(tried[second]), tried[second]
        step.runner_up_score = scores[second]
        step.ties = sum(scores[i] >= step.score - SLACK for i in rest)
    return step


# ------------------------------------------------------------------------------------------------
# The other strategies of Figure 4 and Table 4: the same search with one candidate a round

def in_order(order):
    """Candidates of a strategy that fixes its order beforehand."""
    return lambda num_layers, current: [current + (order[len(current)],)]


def uniform(num_layers, current):
    """Uniform interleaving: K layers evenly spaced. The sets of successive K do not nest."""
    k = len(current) + 1
    return [tuple(int((i + 0.5) * num_layers / k) for i in range(k))]


def local_order(score, num_layers):
    """Local importance: rank once, by the drop when a layer alone is replaced in the base model."""
    scores = score([(layer,) for layer in range(num_layers)])
    return sorted(range(num_layers), key=lambda layer: (-round(scores[layer] / SLACK), layer))


def random_order(num_layers, seed):
    return random.Random(seed).sample(range(num_layers), num_layers)


# ------------------------------------------------------------------------------------------------
# The impact score of section 4.3: do the linear module's states carry the label as the full ones do?

@torch.no_grad()
def pooled_outputs(model, mixers, prepared):
    """Mean over the prompt's tokens of every layer's attention output, of the full module and of
    the linear one on the same hidden states: {layer: (full [N, C], linear [N, C])}, fp64."""
    prompts = []
    for numbers in prepared.of_doc:
        request = prepared.requests[numbers[0]]
        prompts.append(request.tokens[: len(request.tokens) - request.scored])
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    pooled = {layer: ([None] * len(prompts), [None] * len(prompts)) for layer in mixers}
    batches = even_batches(order, prepared.batch_size)
    for rows in progress(batches, desc="states", unit="batch", leave=False):
        ids, real = pad([prompts[i] for i in rows], left=False)

        def visit(layer, hidden_states, full):
            states = full, mixers[layer](hidden_states)[0]                  # [B, T, C] each
            for into, state in zip(pooled[layer], states):
                weight = real.to(state.device, torch.float64, non_blocking=True)
                weight = weight.unsqueeze(-1)                                   # [B, T, 1]
                means = (state.double() * weight).sum(1) / weight.sum(1)        # [B, C]
                for i, mean in zip(rows, means):
                    into[i] = mean
        teacher_forward(model, ids, sorted(mixers), visit)
    return {layer: tuple(torch.stack(states).cpu() for states in both)
            for layer, both in pooled.items()}


def fit_probe(states, labels, num_classes):
    """A linear probe: multinomial logistic regression, L2 of strength 1, by L-BFGS in fp64, on
    states [N, C] standardised by their own mean and spread -> accuracy(states, labels)."""
    mean, spread = states.mean(0), states.std(0, correction=0)
    spread = torch.where(spread > 1e-9 * mean.abs(), spread, 1.0)       # a channel that is constant
    weight = torch.zeros(states.shape[1] + 1, num_classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12,
                               line_search_fn="strong_wolfe")

    def logits(x):
        return (x - mean) / spread @ weight[:-1] + weight[-1]

    def closure():
        solver.zero_grad()
        loss = F.cross_entropy(logits(states), labels, reduction="sum")
        loss = loss + 0.5 * weight[:-1].square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return lambda x, y: (logits(x).argmax(-1) == y).double().mean().item()


def impact_scores(model, mixers, prepared, seed):
    """{layer: {"A_full", "A_linear", "A_cross", "impact"}}, impact = 1 - (A_linear + A_cross) /
    (2 A_full). Probes are fitted on one seeded half of the documents and scored on the other."""
    task = prepared.task
    labels = [task.right(doc) if task.choices else None for doc in prepared.docs]
    if not all(isinstance(label, int) for label in labels):
        raise UserError(f"--order impact needs a right choice in every document; {task.name} has "
                        "some without.")
    if len(labels) < 4:
        raise UserError(f"--order impact cuts the documents into two halves, and {len(labels)} are "
                        "too few: search on more.")
    order = random.Random(seed).sample(range(len(labels)), len(labels))
    fit, rest = (sorted(half) for half in (order[: len(order) // 2], order[len(order) // 2:]))
    labels, num_classes, scores = torch.tensor(labels), max(labels) + 1, {}
    pooled = pooled_outputs(model, mixers, prepared)
    for layer, (full, linear) in progress(pooled.items(), desc="probes", unit="layer", leave=False):
        on_full = fit_probe(full[fit], labels[fit], num_classes)
        on_linear = fit_probe(linear[fit], labels[fit], num_classes)
        a_full, a_linear, a_cross = (probe(states[rest], labels[rest]) for probe, states in (
            (on_full, full), (on_linear, linear), (on_full, linear)))
        if a_full == 0:
            raise FloatingPointError(f"layer {layer}: the full module's probe is never right, so "
                                     "the impact score has no value; search on more documents")
        scores[layer] = {"A_full": a_full, "A_linear": a_linear, "A_cross": a_cross,
                         "impact": 1 - (a_linear + a_cross) / (2 * a_full)}
    return scores


def spearman(x, y):
    """Rank correlation; equal values share their mean rank. None where one side does not vary."""
    ranks = [np.array([(sum(b < a for b in z) + sum(b <= a for b in z)) / 2 for a in z])
             for z in (x, y)]
    if any(r.std() == 0 for r in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


# ------------------------------------------------------------------------------------------------
# Scores of hybrids: nothing is evaluated twice

class Journal:
    """search.jsonl: the settings' fingerprint, then one line per evaluation, on disk before the
    next round begins. A line cut off by a kill is dropped. Raises UserError for other settings."""

    def __init__(self, path, settings):
        self.path, self.rows = path, {}
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        if lines:
            header, *rows = map(json.loads, lines)
            changed = [k for k in settings if header.get(k) != settings[k]]
            if changed:
                raise UserError(f"{path} was written by another search (other: "
                                f"{', '.join(changed)}); give another --out.")
            self._remember(rows)
        if rank() == 0:
            whole = b"".join(line + b"\n" for line in lines) or _line(settings)
            write_atomic(path, lambda p: p.write_bytes(whole))
        self._remember(gather(list(self.rows.values()))[0])     # nodes may not share their disks

    def _remember(self, rows):
        self.rows |= {(row["split"], tuple(row["layers"])): row for row in rows}

    def add(self, rows):
        if rank() == 0:
            with open(self.path, "ab") as file:
                file.write(b"".join(map(_line, rows)))
                file.flush()
                os.fsync(file.fileno())
        self._remember(rows)


def _line(row):
    return json.dumps(row).encode() + b"\n"


class Scorer:
    """P of hybrids on the splits of a task, remembered in the journal."""

    def __init__(self, model, mixers, splits, metric, journal, allow_code=False, plain=False):
        self.model, self.mixers, self.splits = model, mixers, splits
        self.metric, self.journal, self.allow_code = metric, journal, allow_code
        self.asked = set()              # of the validation split
        self.plain = plain
        if not plain and not layers_can_be_shared(model, splits["validation"], mixers):
            log(f"{type(model).__name__}: its layers take more from those below than hidden states, "
                "so every candidate is run whole (--plain).")
            self.plain = True

    def rows(self, split, layer_sets, bar=None):
        """The journal's rows of some layer sets on one split; those that are not there yet are
        evaluated together."""
        layer_sets = [tuple(sorted(layers)) for layers in layer_sets]
        new = [s for s in dict.fromkeys(layer_sets) if (split, s) not in self.journal.rows]
        if new:
            began, cost = time.perf_counter(), collections.Counter()
            scores = evaluate_hybrids(
                self.model, self.splits[split], self.mixers, new, self.metric, self.allow_code,
                self.plain, cost, bar)
            seconds = (time.perf_counter() - began) / len(new)
            self.journal.add(gather(scores and [
                {"split": split, "layers": list(layers), "score": score.mean(),
                 "stderr": score.stderr(), "n": score.n, "seconds": round(seconds, 4),
                 "layer_tokens": cost["run"] / len(new), "plain": cost["plain"] / len(new),
                 "items": [item[self.metric] for item in score.items]}
                for layers, score in zip(new, scores)])[0])
        return [self.journal.rows[split, layers] for layers in layer_sets]

    def validation(self, layer_sets, bar=None):
        """P on the validation split for each layer set: what Algorithm 1 maximises."""
        self.asked.update(tuple(sorted(layers)) for layers in layer_sets)
        return [row["score"] for row in self.rows("validation", layer_sets, bar)]

    def remembered(self, layer_sets):
        """The same from the journal alone; KeyError if it has not all of them."""
        return [self.journal.rows["validation", tuple(sorted(layers))]["score"]
                for layers in layer_sets]

    def statistics(self, step):
        """A step of the search with standard errors: of its score, and of the paired difference to
        the runner-up, item by item; `flipped` counts the items that the two judge differently."""
        row, = self.rows("validation", [step.layers])
        record = {**asdict(step), "layers": sorted(step.layers), "stderr": row["stderr"],
                  "difference": None, "difference_stderr": None, "flipped": None}
        record.pop("runner_up_layers")
        if step.runner_up_layers is not None:
            other, = self.rows("validation", [step.runner_up_layers])
            gaps = np.array(row["items"], float) - np.array(other["items"], float)
            record |= {"difference": float(gaps.mean()), "flipped": int((gaps != 0).sum()),
                       "difference_stderr": float(gaps.std(ddof=len(gaps) > 1) / len(gaps) ** 0.5)}
        return record

    def final(self, layers):
        """{"layers", "validation", "test"} of one model, for result.json, with standard errors and
        the gap from validation to test."""
        result = {"layers": sorted(layers), "test": None, "gap": None}
        for split in self.splits:
            row, = self.rows(split, [layers])
            result[split], result[f"{split}_stderr"] = row["score"], row["stderr"]
        if result["test"] is not None:
            result["gap"] = result["validation"] - result["test"]
        return result

    def cost(self):
        """What the validation scores that were asked for have cost, in this run or before."""
        rows = [self.journal.rows["validation", layers] for layers in self.asked]
        run, plain = (round(sum(row[k] for row in rows)) for k in ("layer_tokens", "plain"))
        return {"search_seconds": sum(row["seconds"] for row in rows), "evaluations": len(rows),
                "layer_tokens": run, "plain_layer_tokens": plain, "saved": 1 - run / plain}


# ------------------------------------------------------------------------------------------------
# What a search leaves behind

@contextlib.contextmanager
def held_in(model, dtype):
    """Within the block the model's parameters are rounded to `dtype`, but for those that
    transformers keeps in fp32. Lossless where they are wider copies of such numbers."""
    kept, before = model._keep_in_fp32_modules_strict or (), model.dtype
    rounded = [parameter for name, parameter in model.named_parameters()
               if parameter.dtype == before and not any(part in name for part in kept)]
    for parameter in rounded:
        parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter in rounded:
            parameter.data = parameter.data.to(before)


def save_checkpoint(model, mixers, layers, tokenizer, path, dtype, card):
    """The hybrid with `layers` linear as a checkpoint in `dtype` at `path`, with its model card,
    whole or not at all."""
    building = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    with replaced(model, mixers, layers), held_in(model, dtype):
        save_hybrid(model, building, tokenizer)
    (building / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(path, ignore_errors=True)
    os.replace(building, path)


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [distill-then-replace, linear-attention]
{base_model}---
# {name}: {replaced} of {total} attention layers linear, for {task}

Layers {layers} of `{model}` are linear attention ({attn}) in place of softmax attention; all else
is the base model's. Made by Distill-then-Replace: each linear layer was distilled alone to give
what the attention layer gives, on {data}; which layers are linear was decided on the validation split of
`{task}`, by replace.py below. It is meant for that task; on others it is not tested.

| {metric} +- standard error | {splits} |
|---|{rule}
{rows}

## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("THIS FOLDER", trust_remote_code=True)
```

Known to load with transformers {known}; made with {made}. Batches, left padding, beams, sampling,
the cache and fine-tuning work as with the base. It is not for: assisted decoding and prompt lookup
(they roll the cache back), static caches, continuous batching (`generate_batch`), tensor
parallelism, flex attention.

## How it was made

```
{commands}
```

```bibtex
@misc{{distill-then-replace, title={{Distill-then-Replace}}, eprint={{2601.11667}},
      archivePrefix={{arXiv}}, year={{2026}}, url={{https://arxiv.org/abs/2601.11667}}}}
```
"""


def model_card(result, name, scorer):
    """README.md of the checkpoint result[name], with its scores beside the base model's."""
    layers, runs = result[name]["layers"], [read_run(run) for run in result["blocks"].split(",")]

    def row(title, layers):
        found = [scorer.rows(split, [layers])[0] for split in scorer.splits]
        return f"| {title} | " + " | ".join(
            f"{r['score']:.4f} +- {r['stderr']:.4f} (n = {r['n']})" for r in found) + " |"
    hub = not Path(result["model"]).exists()
    return CARD.format(
        **{key: result[key] for key in ("model", "task", "metric", "attn")}, layers=layers,
        base_model=f"base_model: {result['model']}\n" if hub else "", replaced=len(layers),
        name=Path(result["model"]).name, total=len(attention_modules(scorer.model)),
        data="; ".join(dict.fromkeys(f"{run['data']} ({run['tokens']:,} tokens)" for run in runs)),
        splits=" | ".join(scorer.splits), rule="---|" * len(scorer.splits),
        rows=row("base", ()) + "\n" + row("this model", layers), known=KNOWN,
        made=transformers.__version__,
        commands="\n".join([run.get("command", "(not recorded)") for run in runs] + [command_line()]))


def plot_search(result, path):
    """search.png: validation score against the number of linear layers."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    scores = [result["p_base"], *result["validation"]]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(len(scores)), scores, "o-", color="tab:blue", label=result["strategy"])
    axes.axhline(result["p_base"], color="gray", linewidth=1, label="base")
    axes.axhline(result["p_min"], color="gray", linewidth=1, linestyle="--", label="P_min")
    for count, step in enumerate(result["steps"], 1):
        text = f"{count} of {count}" if step["layer"] is None else f"+{step['layer']}"
        axes.annotate(text, (count, scores[count]), xytext=(0, -14), ha="center",
                      textcoords="offset points", fontsize=8)
    for name, marker, size in (("best", "*", 18), ("opt", "s", 11)):
        axes.plot(len(result[name]["layers"]), result[name]["validation"], marker, markersize=size,
                  markerfacecolor="none", color="tab:red", label=f"M_{name}")
    axes.set_xlabel("linear layers (the layer that each step replaced)")
    axes.set_ylabel(f"{result['metric']}, validation (n = {result['n']['validation']})")
    axes.set_title(f"{Path(result['task']).stem}: {result['strategy']} replacement")
    axes.margins(y=0.15)
    axes.legend()
    write_atomic(path, lambda p: figure.savefig(p, dpi=150, format="png"))
    pyplot.close(figure)


def report_step(scorer, step):
    """One line: what was replaced, its score, and how close the decision was."""
    record = scorer.statistics(step)
    name = f"layer {step.layer}" if step.layer is not None else f"layers {list(step.layers)}"
    line = f"{len(step.layers)} linear: {name}, validation {step.score:.4f} +- {record['stderr']:.4f}"
    if step.runner_up_layers is not None:
        line += (f", runner-up layer {step.runner_up} with {step.runner_up_score:.4f}, margin "
                 f"{record['difference']:+.4f} +- {record['difference_stderr']:.4f}, "
                 f"{step.ties} ties, {record['flipped']} items flipped")
    log(line)


# ------------------------------------------------------------------------------------------------
# What both phases cost at the paper's size. Random weights: no download, and no meaning in a score

QWEN_1_5B = dict(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                 num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True)
TINY = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
PAPER_TOKENS, PAPER_HOURS = 100_000_000, 2.5        # of an A800, for each of the two phases


def random_model(size, device, dtype, seed):
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(**size, bos_token_id=None, eos_token_id=None)
    with device:
        model = transformers.Qwen2ForCausalLM(config)
    return model.to(dtype).eval().requires_grad_(False)


def linear_flops(module):
    """FLOPs per token of a module's linear maps, forwards: of attention and recurrences none."""
    return sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))


def time_distillation(model, mixers, batch, steps):
    """Hours for the paper's tokens at the speed of train_step on batch [B, T], after a warm-up.
    FLOPs: the teacher's forward, the students' forward and twice as much backwards."""
    optimizers = make_optimizers(mixers)
    flops = linear_flops(model.get_decoder()) + 3 * sum(map(linear_flops, mixers.values()))
    for _ in range(2):
        train_step(model, mixers, optimizers, batch, 1e-4)
    began = clock(model.device)
    for _ in progress(range(steps), desc="distill", unit="step", leave=False):
        train_step(model, mixers, optimizers, batch, 1e-4)
    per_second = steps / (clock(model.device) - began)
    return {"hours": PAPER_TOKENS / (batch.numel() * per_second) / 3600,
            "tokens_per_second": batch.numel() * per_second,
            "flops_per_second": flops * batch.numel() * per_second,
            "peak_memory": peak_memory(model.device)}


def time_search(model, mixers, prepared, whole):
    """Hours for all rounds of Algorithm 1 on `whole` items, in proportion to the items run, and
    what those cost in layer-token forwards."""
    num_layers = len(mixers)
    answer_hybrids(model, prepared, mixers, prepared.batches[0], [()])          # a warm-up
    flops_each = linear_flops(model.get_decoder()) / num_layers
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began, cost = clock(model.device), collections.Counter()
    evaluations = num_layers * (num_layers + 1) // 2 + 1
    with progress(total=evaluations * len(prepared.batches), desc="search", unit="batch",
                  leave=False) as bar:
        greedy(lambda sets: [score.mean() for score in evaluate_hybrids(
            model, prepared, mixers, sets, cost=cost, bar=bar)], num_layers, run_all=True)
    seconds = clock(model.device) - began
    items = len(prepared.docs)
    return {"hours": seconds * whole / items / 3600, "seconds": seconds, "items": items,
            "of_items": whole, "evaluations": evaluations,
            "layer_tokens": cost["run"], "plain_layer_tokens": cost["plain"],
            "flops_per_second": flops_each * cost["run"] / seconds,
            "peak_memory": peak_memory(model.device)}


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def benchmark(args):
    """JetBlock on a model of Qwen2.5-1.5B's shape: distillation on 32 x 512 random tokens a step,
    and the search over all 28 layers on 500 items of 400 random tokens and three single-token
    choices; with --limit on fewer. On a CPU the same on a tiny model, to see that it runs."""
    if world_size() > 1:
        raise UserError("--benchmark measures one process; start it without torchrun.")
    if args.model or args.blocks or args.task or args.out:
        raise UserError("--benchmark makes its own model and task and saves nothing: leave --model, "
                        "--blocks, --task and --out out.")
    device = find_device(args.device)
    gpu = device.type == "cuda"
    size, dtype, shape, steps, items, length = (
        (QWEN_1_5B, torch.bfloat16, (32, 512), 20, 500, 400) if gpu else
        (TINY, torch.float32, (4, 64), 3, 8, 40))
    model = random_model(size, device, dtype, args.seed)
    mixers = make_mixers(model, "jet", range(size["num_hidden_layers"]), "inherit", args.seed)
    rng = random.Random(args.seed)
    docs = [{"context": demo_text(rng.randrange(64) for _ in range(length)),
             "choices": ["t1", "t2", "t3"], "gold": rng.randrange(3)}
            for _ in range(min(items, args.limit or items))]
    prepared = Prepared(CHOICE_FILE, docs, model, demo_tokenizer(), args.batch_size)
    draw = torch.Generator().manual_seed(args.seed)
    batch = torch.randint(size["vocab_size"], shape, generator=draw)
    phases = {"distillation": time_distillation(model, mixers, batch, steps)}
    for mixer in mixers.values():
        mixer.to(dtype).eval().requires_grad_(False)
    phases["search"] = time_search(model, mixers, prepared, items)
    limit = measured_limits()["tflop_s"] * 1e12 if gpu else None
    name = torch.cuda.get_device_name() if gpu else "CPU, a tiny model: the hours mean nothing"
    log(f"{name}: {len(docs)} items of {length} tokens, {len(mixers)} layers, jet")
    for phase, row in phases.items():
        row["share_of_matrix_rate"] = limit and row["flops_per_second"] / limit
        share = "not measured" if limit is None else f"{row['share_of_matrix_rate']:.1%}"
        log(f"  {phase}: {row['hours']:.3g} hours (paper: {PAPER_HOURS} of an A800), peak memory "
            f"{row['peak_memory'] / 2**20:,.0f} MiB, share of the measured matrix rate: {share}")
    log(f"  distillation: {steps} steps of {batch.numel():,} tokens, at "
        f"{phases['distillation']['tokens_per_second']:,.0f} tokens per second, in proportion to "
        f"{PAPER_TOKENS:,}")
    log(f"  search: {phases['search']['evaluations']} evaluations in "
        f"{phases['search']['seconds']:.1f} s on {len(docs)} items, in proportion to {items}")
    return {"device": name, "batch_size": args.batch_size, "versions": versions(), **phases}


# ------------------------------------------------------------------------------------------------
# The report: the paper's tables beside ours and its figures, from the files below a directory

PAPER = Path(__file__).with_name("figures") / "paper_tables.json"       # every number it prints
TITLES = {"Table 1": "test score of M_best, and its number of linear layers",
          "Table 2": "test score of M_opt, which keeps 95 % of the validation score",
          "Table 3": "hours of one device", "Table 4": "10 of every 28 layers linear, by order"}
# Lines differ in marker and dashes, so that they need no colour; the colours are Okabe and Ito's.
STYLES = [dict(color=color, marker=marker, linestyle=dashes, markersize=size, markerfacecolor="none")
          for color, marker, dashes, size in zip(
              ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00"), "os^Dvx",
              ("-", "--", "-.", ":", (0, (6, 2, 1, 2)), (0, (1, 3))), (11, 9, 8, 6, 6, 5))]


def read_results(folder):
    """{"result": [records], "distill": ..., "unfinished": [folders], "paper": tables}: the result
    files below `folder` by their names. Every record gets a "key", (model, mixer, task), with ""
    for what it lacks; a search gets "rows" from all journals that have its settings and modules."""
    found, journals = {n: [] for n in ("result", "distill", "eval", "throughput", "finetune")}, {}
    try:
        path = PAPER
        paper = json.loads(path.read_text())["tables"]
        for path in sorted(path for path in folder.rglob("*.json") if path.stem in found):
            run = json.loads(path.read_text()) | {"path": path}
            run["key"] = (Path(run.get("base_model") or run.get("model", "")).name,
                          run.get("attn") or run.get("mixer") or "",
                          task_name(run.get("task", "")))
            found[path.stem].append(run)
            if path.stem == "result":
                blocks, path = run["blocks"], path.with_name("search.jsonl")
                lines = path.read_text().split("\n")[:-1]           # a kill cuts the last one off
                settings, *rows = map(json.loads, lines)
                # the modules by their directory, because their digest depends on --layers
                same = str((run["key"], settings | {"blocks": blocks}))
                run["rows"] = journals.setdefault(same, {})
                run["rows"] |= {(row["split"], tuple(row["layers"])): row for row in rows}
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}); run its command "
                        "again or delete it.")
    unfinished = [path.parent for path in folder.rglob("search.jsonl")
                  if not path.with_name("result.json").exists()]
    unfinished += [run["path"].parent for run in found["distill"] if not run["finished"]]
    found["result"] = [run for run in found["result"] if run["strategy"] != "greedy"
                       or run["steps"][0]["runner_up"] is not None]     # --layers has none
    return found | {"paper": paper, "unfinished": sorted(map(str, unfinished))}


def task_name(task):
    """The harness's name of a task, or the stem of a file's name."""
    known = evaluation.TASKS.named(task)
    return known.name if known else Path(task).stem.removesuffix("-validation")


def scored(run, split, layers):
    """(score in percent, standard error, documents), None where no journal has it."""
    row = run["rows"].get((split, tuple(sorted(layers))))
    return row and (100 * row["score"], 100 * row["stderr"], row["n"])


def drop(run):
    """The drop from the base to M_opt on test, as `scored` but in percent of the base's score; the
    standard error is of the differences between paired documents."""
    base, opt = (run["rows"].get(("test", tuple(layers))) for layers in ((), run["opt"]["layers"]))
    if base and opt and base["score"]:
        gaps = np.array(base["items"], float) - np.array(opt["items"], float)
        gaps *= 100 / base["score"]
        return gaps.mean(), gaps.std(ddof=len(gaps) > 1) / len(gaps) ** 0.5, len(gaps)


def speeds(record):
    """{context: {linear layers: decoded tokens per second at the largest batch}}."""
    table = {}
    for row in sorted(record["rows"], key=lambda row: (row["linear_layers"], row["batch"])):
        table.setdefault(row["context"], {})[row["linear_layers"]] = row["tokens_per_second"]
    return table


def our_rows(found):
    """(table, row, {column: entry}) of every run. An entry is (number, standard error, documents),
    text, or None for what was not run."""
    def hours(costs, seconds="seconds", n=None):
        return costs and (sum(c[seconds] * c["ranks"] for c in costs) / 3600, None, n)

    for record in found["eval"]:
        for row in () if record["linear_layers"] else record["results"]:
            yield f"Table 1, {record['key'][0]}", task_name(row["task"]), {
                "base": (100 * row["value"], 100 * row["stderr"], row["n"])}
    rates = {record["key"][:2]: speeds(record).get(2048, {}) for record in found["throughput"]}
    for run in found["result"]:
        (model, attn, task), order = run["key"], run["strategy"]
        if order in ("greedy", "impact"):
            known = run.get("impact") or {layer for _, layers in run["rows"] for layer in layers}
            for chosen in (x for x in run["sets"] if len(x) == round(len(known) * 10 / 28)):
                yield f"Table 4, {model}, {attn}", task, {
                    order: scored(run, "test", chosen),
                    f"{order} layers": " ".join(map(str, chosen)),
                    f"{order}, validation": scored(run, "validation", chosen)}
        if order != "greedy":
            continue
        base, best, opt = (scored(run, "test", layers) for layers in (
            (), run["best"]["layers"], run["opt"]["layers"]))
        yield f"Table 1, {model}", task, {
            "base": base, attn: best, f"{attn} layers": (len(run["best"]["layers"]), None, None)}
        count, at = len(run["opt"]["layers"]), rates.get((model, attn), {})
        if abs(run["p_min"] - 0.95 * run["p_base"]) < SLACK:
            yield f"Table 2, {model}, {attn}", task, {
                "base": base, "M_opt": opt, "drop, %": drop(run), "layers": (count, None, None),
                "speed-up at 2,048": {0, count} <= set(at) and (at[count] / at[0], None, None)}
        blocks = [Path(name).resolve() for name in run["blocks"].split(",")]
        costs = [record["cost"] for record in found["distill"] if record["finished"]
                 and record["path"].parent.resolve() in blocks]
        yield f"Table 3, {attn}", f"{model}, {task}", {
            "device": run["cost"]["device"], "distillation": hours(costs),
            "M tokens": costs and (costs[0]["tokens"] / 1e6, None, None),
            "search": hours([run["cost"]], "search_seconds", run["n"]["validation"]),
            "evaluations": (run["cost"]["evaluations"], None, None)}


def cell(paper=None, ours=()):
    """One entry of a table: the paper's number, if it prints one, and the mean of ours. The seeds'
    runs score the same documents, so the mean has about the standard error of one; "spread" is the
    standard deviation between the "runs" that have the number, out of "of"."""
    entry = {"paper": paper, "ours": None, "of": len(ours)}
    ours = [value for value in ours if value]
    if not ours or isinstance(ours[0], str):
        return entry | {"ours": "; ".join(dict.fromkeys(ours)) or None}
    numbers, errors, documents = zip(*ours)
    mean, spread = float(np.mean(numbers)), float(np.std(numbers, ddof=len(ours) > 1))
    return entry | {
        "ours": mean, "difference": None if paper is None else mean - paper, "n": documents[0],
        "stderr": None if None in errors else float(np.mean(errors)), "runs": len(ours),
        "spread": round(spread, 9)}


def show(entry):
    """paper / ours ± standard error / difference (runs that have it, their spread)."""
    text = " / ".join(missing if x is None else x if isinstance(x, str) else f"{x:.3g}"
                      for x, missing in ((entry["paper"], "–"), (entry["ours"], "not run")))
    text += f" ± {entry['stderr']:.2g}" if entry.get("stderr") is not None else ""
    text += f" / {entry['difference']:+.2g}" if entry.get("difference") is not None else ""
    if entry.get("spread") or entry.get("runs", entry["of"]) < entry["of"]:
        text += f" ({entry['runs']} of {entry['of']}, sd {entry['spread']:.2g})"
    return text


def markdown(tables, figures, unfinished):
    """The report's lines."""
    yield ("Entries: the paper's number / ours ± standard error / difference; –: the paper has none; "
           "(2 of 3, sd): two of three runs have it, with this standard deviation. Scores in "
           "percent of n documents.")
    for name, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        yield f"\n## {name}: {TITLES[name[:7]]}\n\n| | n | " + " | ".join(columns) + " |"
        yield "|---" * (len(columns) + 2) + "|"
        for name, row in rows.items():
            counts = dict.fromkeys(str(entry["n"]) for entry in row.values() if entry.get("n"))
            shown = [show(row.get(column) or cell()) for column in columns]
            yield f"| {name} | {', '.join(counts) or '–'} | " + " | ".join(shown) + " |"
    for name, drawn in figures.items():
        yield f"\n## {name}\n"
        yield from [drawn] if isinstance(drawn, str) else [
            f"![{title}]({path})" for path, title in drawn.items()]
    yield from (f"\n{folder}: not finished" for folder in unfinished)


def grouped(records, group, line):
    """(group, {line: [records]}) of all groups; both are functions of a record."""
    groups = {}
    for record in records:
        groups.setdefault(group(record), {}).setdefault(line(record), []).append(record)
    return groups.items()


def curves(groups):
    """{line: [{linear layers: validation score in percent} of every run]}."""
    return {line: [dict(enumerate(100 * p for p in [run["p_base"], *run["validation"]]))
                   for run in runs] for line, runs in groups.items()}


def agreement(runs, others):
    """Spearman's correlation between the steps at which two searches replaced the layers that both
    replaced, the mean over pairs of one run and another."""
    steps = [[(run["order"].index(layer), other["order"].index(layer))
              for layer in run["order"] if layer in other["order"]]
             for run, other in itertools.product(runs, others)]
    return np.mean([spearman(*zip(*pairs)) if len(pairs) > 1 else np.nan for pairs in steps])


def figures(found):
    """(number, name, title, {line: [{x: y} of every run]}, label of x, label of y) of every figure
    that has data."""
    layers, score = "linear layers", "score, %"

    def caption(groups):
        run = next(iter(groups.values()))[0]
        error = 100 * max(step["stderr"] for step in run["steps"])
        return (f"{run['key'][0]}, {run['key'][2]}: {run['metric']} on validation, "
                f"n = {run['n']['validation']}, standard error up to {error:.1f}")

    for record in found["throughput"]:
        (model, mixer, _), rates = record["key"], speeds(record)
        name = [model, mixer or "saved hybrid", record["dtype"], record["device"]]
        lines = {f"context {context:,}": [at] for context, at in rates.items()}
        printed = found["paper"].get(f"Table 2, {model}, {mixer}", {}).values()
        if printed and 0 in rates.get(2048, {}):
            lines["paper's speed-up of our base, context 2,048"] = [{
                row["layers"]: row["speed-up at 2,048"] * rates[2048][0] for row in printed}]
        yield 2, "-".join(name).replace(" ", "-"), (
            f"{', '.join(name)}: decoding at the largest batch"), lines, layers, "tokens per second"
    searches = [run for run in found["result"] if run["strategy"] == "greedy"]
    for (model, task), mixers in grouped(searches, lambda run: run["key"][::2],
                                         lambda run: run["attn"]):
        printed = found["paper"].get(f"Table 1, {model}", {}).get(task, {})
        lines = curves(mixers) | {
            f"paper's M_best on test, {attn}": [{printed[f"{attn} layers"]: printed[attn]}]
            for attn in mixers if printed}
        yield 3, f"{model}-{task}-score", caption(mixers), lines, layers, score
        ranks = [f"{a}-{b} {agreement(mixers[a], mixers[b]):.2f}"
                 for a, b in itertools.combinations(mixers, 2)]
        title = f"{caption(mixers)}; Spearman between orders: {', '.join(ranks) or 'one mixer'}"
        lines = {attn: [dict(enumerate(runs[0]["order"], 1))] for attn, runs in mixers.items()}
        yield 3, f"{model}-{task}-order", title, lines, "step", "layer replaced (first run)"
    for key, orders in grouped(found["result"], lambda run: run["key"],
                               lambda run: run["strategy"]):
        title, lines, ranks = f"{key[1]}, {caption(orders)}", {}, []
        if len(orders) > 1:
            yield 4, "-".join(key), title, curves(orders), layers, score
        for run, first in itertools.product(orders.get("impact", ()), orders.get("greedy", ())):
            if run["blocks"] == first["blocks"]:
                points = {step: run["impact"][str(layer)]["impact"]
                          for step, layer in enumerate(first["order"], 1)}
                lines[run["blocks"]] = [points]
                ranks.append(spearman(list(points), list(points.values())))
        if lines:
            title += f"; Spearman {', '.join('undefined' if r is None else f'{r:.2f}' for r in ranks)}"
            yield 6, "-".join(key), title, lines, "step of greedy search", "impact score"
    for key, tuned in grouped(found["finetune"], lambda run: run["key"][::2],
                              lambda run: (run["mixer"] or "base", run["seed"])):
        run, lines = next(iter(tuned.values()))[0], {}
        title = (f"{', '.join(key)}: fine-tuning, {run['metric']} on {run['split']}, n = "
                 f"{run['after']['n']}, standard error {100 * run['after']['stderr']:.1f}")
        for ((mixer, _), runs), when in itertools.product(tuned.items(), ("before", "after")):
            points = {len(run["linear_layers"]): 100 * run[when]["score"] for run in runs}
            lines.setdefault(f"{mixer}, {when}", []).append(points)
        yield 5, "-".join(key), title, lines, layers, score


def draw(path, number, title, lines, xlabel, ylabel):
    """One figure for README's width. Several runs are their mean, in a band from the lowest to the
    highest, where all of them have a point."""
    from matplotlib import pyplot, ticker
    figure, axes = pyplot.subplots(figsize=(8.5, 5), layout="constrained")
    for (label, runs), style in zip(lines.items(), itertools.cycle(STYLES)):
        xs = sorted(set.intersection(*map(set, runs)))
        ys = np.array([[run[x] for x in xs] for run in runs])                   # [runs, points]
        if number == 6 or label.startswith("paper"):        # points that do not follow each other
            style = style | {"linestyle": ""}
        axes.plot(xs, ys.mean(0), label=label if len(runs) == 1 else f"{label} ({len(runs)} runs)",
                  **style)
        axes.fill_between(xs, ys.min(0), ys.max(0), color=style["color"], alpha=0.15, linewidth=0)
    axes.set_title(title.replace("; ", "\n"), fontsize=11)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if number == 2 else "linear")
    for axis in [axes.xaxis, axes.yaxis][: 2 if ylabel.startswith("layer") else 1]:
        axis.set_major_locator(ticker.MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=3)
    evaluation.write_atomic(path, lambda p: figure.savefig(p, dpi=200, format="png"))
    pyplot.close(figure)


def make_report(args):
    """Print the paper's tables beside ours, from the results below DIR, as Markdown, draw its
    figures into DIR/figures, write both to DIR/report.md and DIR/report.json -> where they are."""
    folder = args.report
    if not folder.is_dir():
        raise UserError(f"--report {folder}: there is no such directory.")
    if args.model or args.blocks or args.task or args.out or args.benchmark:
        raise UserError("--report reads files and runs nothing: leave all other flags out.")
    found, ours = read_results(folder), collections.defaultdict(list)
    places = {(table, row, column): number for table, rows in found["paper"].items()
              for row, columns in rows.items() for column, number in columns.items()}
    for table, row, columns in our_rows(found):
        for column, number in columns.items():
            ours[table, row, column].append(number)
    tables = {}
    for table, row, column in sorted(places | ours, key=lambda place: place[0][:7]):
        entry = cell(places.get((table, row, column)), ours[table, row, column])
        tables.setdefault(table, {}).setdefault(row, {})[column] = entry
    try:
        import matplotlib
        matplotlib.use("Agg")
    except ImportError:
        matplotlib = log("figures are not drawn: matplotlib is missing (pip install matplotlib)")
    drawn = {f"Figure {number}": {} for number in range(2, 7)}
    for number, name, title, *rest in figures(found) if matplotlib else ():
        path = evaluation.make_output_dir(folder / "figures") / f"fig{number}-{name}.png"
        draw(path, number, title, *rest)
        drawn[f"Figure {number}"][f"figures/{path.name}"] = title
    rest = {"unfinished": found["unfinished"], "figures": {
        name: paths or ("not run" if matplotlib else "not drawn") for name, paths in drawn.items()}}
    text = "\n".join(markdown(tables, **rest))
    print(text)
    evaluation.write_atomic(folder / "report.md", lambda path: path.write_text(
        text + "\n", encoding="utf-8"))
    write_json(folder / "report.json", {"tables": tables, **rest})
    return {"report": str(folder / "report.json"), **rest}


# ------------------------------------------------------------------------------------------------
# The command line

def parse_args():
    parser = ArgumentParser(__doc__)
    add_model_flags(parser)
    parser.add_argument("--blocks", help="run directory of distill.py; several, comma-separated, for "
                        "layers that were distilled apart")
    parser.add_argument("--task", help="a .jsonl file to search on, or one of "
                        + ", ".join([*DEMO_TASKS, *TASKS]))
    parser.add_argument("--test", help=".jsonl file to report on, if --task is a file")
    add_task_flags(parser)
    parser.add_argument("--test-docs", help="local file of the documents that a named task reports")
    parser.add_argument("--search-size", type=positive(int), default=500,
                        help="documents to search on, at most, for a named task (paper: 500)")
    parser.add_argument("--paper-splits", action="store_true", help="the paper's literal reading: "
                        "search on what is reported where the task has no other split (it leaks)")
    parser.add_argument("--max-drop", type=float, default=0.05,
                        help="P_min as a relative drop from the base's score (paper: 0.05)")
    parser.add_argument("--p-min", type=float, help="P_min itself, in place of --max-drop")
    parser.add_argument("--all", action="store_true",
                        help="go on below P_min until every layer is replaced, for the curve")
    parser.add_argument("--order", default="greedy", dest="strategy",
                        choices=("greedy", "local", "uniform", "random", "impact"),
                        help="greedy: Algorithm 1; local: ranked once, each layer alone; uniform: "
                        "evenly spaced; random: by --seed; impact: by linear probes (section 4.3)")
    parser.add_argument("--budget", type=positive(int), help="stop after this many layers")
    parser.add_argument("--plain", action="store_true", help="run all layers anew for every "
                        "candidate, in place of those below it once: slower, the same scores")
    parser.add_argument("--layers", help="no search: score and save just this set, e.g. 4,8,12")
    parser.add_argument("--benchmark", action="store_true", help="no search: time both phases on a "
                        "random model of Qwen2.5-1.5B's shape (a tiny one on a CPU); --limit N "
                        "searches on N of 500 items")
    parser.add_argument("--report", metavar="DIR", type=Path, help="no search: the paper's tables "
                        "and figures beside ours, from the result files below DIR")
    parser.add_argument("--out", help="directory for the journal, the result and the checkpoints")
    return parser.parse_args()


def check_args(args):
    for name in ("blocks", "task", "out"):
        if getattr(args, name) is None:
            raise UserError(f"--{name} is missing (see --help).")
    if not 0 <= args.max_drop <= 1:
        raise UserError(f"--max-drop is a fraction from 0 to 1, not {args.max_drop:g}.")
    if args.p_min is not None and not 0 <= args.p_min <= math.inf:
        raise UserError(f"--p-min is a score, not {args.p_min:g}.")
    task = find_task(args.task, args)
    check_metric(task, args.metric)
    if args.test and (task.hub or args.task in DEMO_TASKS):
        raise UserError("--test goes with a --task that is a file; a named task has its own.")
    if args.test and file_task(args.test)[0] is not task:
        raise UserError(f"{args.test} and {args.task} are not items of one kind.")
    out = make_output_dir(args.out)
    if any((out / name).exists() for name in ("distill.json", "config.json")):
        raise UserError(f"{out} already holds something else; give another --out.")
    if args.layers and (args.strategy != "greedy" or args.budget):
        raise UserError("--layers names the layers itself; leave --order and --budget out.")
    return out


def search_documents(args, task):
    """{"validation": documents to search on, "test": documents to report on, if there are any}."""
    if task.hub:
        search, report, notes = split_docs(task, args.docs, args.test_docs, args.seed,
                                           args.search_size, args.paper_splits)
        for note in notes:
            log(f"{task.name}: {note}")
        return {"validation": search, "test": report}
    files = [args.task, args.test]
    if args.task in DEMO_TASKS:
        files = [demo_file(args.task, split) for split in ("validation", "test")]
    return {name: file_task(path)[1] for name, path in zip(("validation", "test"), files) if path}


def candidates_of(args, scorer, num_layers, bar):
    """(candidates for `greedy`, impact scores or None) of the strategy that --order names."""
    if args.strategy == "greedy":
        return every_full_layer, None
    if args.strategy == "uniform":
        return uniform, None
    if args.strategy == "random":
        return in_order(random_order(num_layers, args.seed)), None
    if args.strategy == "local":
        return in_order(local_order(lambda sets: scorer.validation(sets, bar), num_layers)), None
    impact = gather(rank() == 0 and impact_scores(
        scorer.model, scorer.mixers, scorer.splits["validation"], args.seed))[0]
    for layer, scores in impact.items():
        log(f"layer {layer}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items()))
    return in_order(sorted(impact, key=lambda layer: (impact[layer]["impact"], layer))), impact


def correlation_with_greedy(impact, scorer, num_layers):
    """Spearman's correlation of the impact scores with the order of a greedy search that this
    journal holds; None, with a sentence, where it holds none."""
    try:
        steps = greedy(scorer.remembered, num_layers, run_all=True).steps
    except KeyError:
        log("for Spearman's correlation with the greedy order, first run --order greedy --all with "
            "the same --out")
        return None
    place = {step.layer: i for i, step in enumerate(steps)}
    found = spearman([impact[layer]["impact"] for layer in place], list(place.values()))
    log("Spearman's correlation of impact score and greedy order: "
        + ("undefined, all scores are equal" if found is None else f"{found:+.3f}"))
    return found


def search(args, scorer, num_layers, given):
    """Run the strategy, or score the given layers -> (Search, what else it found)."""
    if given:
        p_base, p_given = scorer.validation([(), tuple(given)])
        p_min = (1 - args.max_drop) * p_base if args.p_min is None else args.p_min
        return Search(p_base, p_min, [Step(tuple(given), p_given, None)], given, given), {}
    most = min(num_layers, args.budget or num_layers)
    evaluations = {"greedy": sum(num_layers - i for i in range(most)),
                   "local": num_layers + most}.get(args.strategy, most) + 1
    batches = len(scorer.splits["validation"].batches[rank()::world_size()])
    with progress(total=evaluations * batches, desc="search", unit="batch") as bar:
        candidates, impact = candidates_of(args, scorer, num_layers, bar)
        found = greedy(lambda sets: scorer.validation(sets, bar), num_layers, args.max_drop,
                       args.p_min, args.all, functools.partial(report_step, scorer), candidates,
                       args.budget)
    if impact is None:
        return found, {}
    return found, {"impact": impact,
                   "spearman": correlation_with_greedy(impact, scorer, num_layers)}


def run_search(args, model, tokenizer):
    """Search, or score --layers, for one task; save everything -> the result."""
    began = time.perf_counter()
    out = check_args(args)
    lock_dir(out)
    check_savable(model)
    task = find_task(args.task, args)
    metric, num_layers = check_metric(task, args.metric), len(attention_modules(model))
    given = parse_layers(args.layers, num_layers) if args.layers else None
    mixers = load_blocks(args.blocks, model, given)
    dtype = dtype_to_save(args.model, model, args.dtype)
    for mixer in mixers.values():
        mixer.to(dtype).to(model.dtype)         # what is scored is what will be saved
    splits = {name: prepare(task, docs, model, tokenizer, args, searched=name == "validation")
              for name, docs in search_documents(args, task).items()}
    journal = Journal(out / "search.jsonl", {
        "model": fingerprint(model), "blocks": digest([fingerprint(mixers[l]) for l in mixers]),
        "items": {name: split.fingerprint() for name, split in splits.items()}, "metric": metric,
        "dtype": str(model.dtype), "device": model.device.type, "batch_size": args.batch_size,
        "limit": args.limit, "whole": args.whole, "versions": versions()})
    scorer = Scorer(model, mixers, splits, metric, journal, args.allow_code_execution, args.plain)
    found, more = search(args, scorer, num_layers, given)
    layers = [step.layer for step in found.steps]               # None where sets do not nest
    result = {
        "task": args.task, "metric": metric, "strategy": args.strategy, "p_base": found.p_base,
        "p_min": found.p_min,
        "order": given or ([] if None in layers else layers),
        "sets": [sorted(step.layers) for step in found.steps],
        "validation": [step.score for step in found.steps],
        "best": scorer.final(found.best), "opt": scorer.final(found.opt),
        "test_base": scorer.final(())["test"],
        "steps": [scorer.statistics(step) for step in found.steps], **more,
        "n": {name: scorer.rows(name, [()])[0]["n"] for name in splits},
        "model": args.model, "blocks": args.blocks,
        "attn": read_run(args.blocks.split(",")[0])["attn"]}
    result["cost"] = {"seconds": time.perf_counter() - began, **scorer.cost(),
                      "memory": peak_memory(model.device), "device": str(model.device),
                      "ranks": world_size(), "versions": versions()}
    if rank() == 0:
        for name in ("best", "opt"):
            save_checkpoint(model, mixers, result[name]["layers"], tokenizer, out / name, dtype,
                            model_card(result, name, scorer))
        if given is None:
            plot_search(result, out / "search.png")
        write_json(out / "result.json", result)
    report_result(result, scorer, out)
    return result


def report_result(result, scorer, out):
    """The closing table: base, M_best and M_opt on both splits, with standard errors; the cost."""
    log(f"{result['task']}: {result['metric']}; P_min {result['p_min']:.4f}")
    for name, layers in (("base", []), ("M_best", result["best"]["layers"]),
                         ("M_opt", result["opt"]["layers"])):
        cells = [f"{split} {row['score']:.4f} +- {row['stderr']:.4f} (n = {row['n']})"
                 for split in scorer.splits for row in scorer.rows(split, [layers])]
        log(f"  {name:6s} {', '.join(cells)}; linear layers {layers}")
    cost = result["cost"]
    log(f"  {cost['evaluations']} evaluations in {cost['search_seconds']:.1f} s; layer-token "
        f"forwards: {cost['layer_tokens']:,}, {cost['saved']:.1%} fewer than the "
        f"{cost['plain_layer_tokens']:,} of a plain search")
    log(f"  saved: {out}/best, {out}/opt, {out}/result.json")


def main():
    args = parse_args()
    if args.report:
        return finish(make_report(args))
    join_ranks(args.device)
    if args.benchmark:
        finish(benchmark(args))
        return
    if args.model is not None:
        check_args(args)
        model, tokenizer = load_model(args.model, args.device, args.dtype,
                                      args.trust_remote_code, base_only=True)
        result = run_search(args, model, tokenizer)
        finish(result, f"python eval.py --model {args.out}/opt --task {args.test or args.task}")
        return
    log("demo: searches the tiny Llama's two tasks; --model, --blocks, --task search anything else")
    args.model, args.blocks = str(make_demo()), args.blocks or str(DEMO / "blocks")
    model, tokenizer = load_model(args.model, args.device, args.dtype, base_only=True)
    results, args.all = {}, True
    for name in ("copy", "chain"):
        args.task, args.out = name, str(DEMO / name)
        results[name] = run_search(args, model, tokenizer)
    for name, result in results.items():
        log(f"{name}: layers went in the order {result['order']}; M_opt keeps "
            f"{len(result['order']) - len(result['opt']['layers'])} softmax layers")
    finish({"results": results}, f"python eval.py --model {DEMO}/copy/opt --task copy")


if __name__ == "__main__":
    run_script(main)
