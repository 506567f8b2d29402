"""Phase 2, greedy layer replacement: Algorithm 1 of the paper (section 3.2).

    python replace.py                                           # the demo: offline, CPU
    python replace.py --model M --blocks runs/gdn --task val.jsonl --test test.jsonl --out runs/s
    python replace.py --model M --blocks runs/gdn --task val.jsonl --layers 4,8,12 --out runs/l
    python replace.py --benchmark               # hours of both phases at the paper's size, on a GPU
    python replace.py --report runs             # the paper's tables and figures, from results

In every round, each layer that is still softmax attention is tried as its distilled linear module,
and the layer with the best score on the validation split stays replaced. M_opt is the last model
whose score reaches P_min (by default 95 % of the base model's), M_best the one with the highest
score. Both are scored on the test split, once, and saved as ordinary checkpoints in OUT/opt and
OUT/best. Every evaluation is on disk (OUT/search.jsonl) before the next begins, so the same command
continues an interrupted search. The last line on stdout is the result as one JSON object.
"""

import collections
import copy
import itertools
import json
import os
import random
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import eval as evaluation
from distill import (
    cost_of, demo_text, demo_tokenizer, distill_flops, fastest_update, make_demo, make_mixers,
    make_optimizers, peak_memory, teacher_forward, train_step)
from eval import (
    DEMO, PAPER, evaluate_hybrids, fingerprint, gather, load_model, log, prepare, progress, rank,
    search_documents, versions, write_json)
from kernels import measured_limits
from linear_attn import KNOWN, UserError, attention_modules, check_savable, replaced, save_hybrid
import transformers     # after eval, whose message helps where transformers cannot be imported

SLACK = 1e-9        # scores are fractions of counts: equal counts must compare as equal


# ------------------------------------------------------------------------------------------------
# Algorithm 1. A model M is represented by the tuple of its linear layers

# One round: the model it chose, its score, the layer that is new (None if a layer of the last round
# is not kept), and {layers: score} of all candidates.
Step = collections.namedtuple("Step", "layers score layer scores")
Search = collections.namedtuple("Search", "p_base p_min steps best opt")


def each_full_layer(num_layers, model):
    """The candidates of Algorithm 1: `model` with one more of its full layers replaced."""
    return [(*model, layer) for layer in range(num_layers) if layer not in model]


def first_maximum(scores):
    """(argmax, max) of {layers: P}. The first of equal scores wins: ties go to the lowest layer."""
    lowest = max(scores.values()) - SLACK
    return next((layers, score) for layers, score in scores.items() if score >= lowest)


def greedy(evaluate, num_layers, max_drop=0.05, p_min=None, run_all=False, budget=None,
           candidates=each_full_layer, on_step=lambda step: None):
    """Algorithm 1. evaluate([layers, ...]) -> [P of the model with those layers linear, ...].

    P_min is `p_min`, or (1 - max_drop) P(full model). With `run_all` the rounds continue after the
    stop, for the curve, and M_best and M_opt stay as they are. The search also ends after `budget`
    layers. Other strategies have other `candidates`. on_step(Step) is called after each round.
    """
    model = best = opt = ()                                 # M = M_best = M_opt = full model
    p_best = p_base = evaluate([model])[0]                  # P_best = P(M)
    p_min = (1 - max_drop) * p_base if p_min is None else p_min
    steps, stopped = [], False
    while len(model) < min(num_layers, budget or num_layers):
        tried = candidates(num_layers, model)               # for each layer still full in M:
        scores = dict(zip(tried, evaluate(tried)))          #     P_l = P(M with it replaced)
        star, p_star = first_maximum(scores)                # (P*, l*) = the first maximum
        steps.append(Step(star, p_star, star[-1] if star[:-1] == model else None, scores))
        on_step(steps[-1])
        model = star
        if not stopped and p_star >= p_best - SLACK:        # if P* >= P_best:
            best, p_best = model, p_star                    #     M_best, P_best = that model, P*
        if not stopped and p_star >= p_min - SLACK:         # if P* >= P_min:
            opt = model                                     #     M = M_opt = that model
        else:                                               # else stop
            stopped = True
            if not run_all:
                break
    return Search(p_base, p_min, steps, best, opt)


# ------------------------------------------------------------------------------------------------
# The other strategies of Figure 4 and Table 4: the same loop with one candidate a round

def in_order(order):
    """Candidates of a strategy that ranks the layers once, before the first round."""
    return lambda num_layers, model: [(*model, order[len(model)])]


def uniform(num_layers, model):
    """Uniform interleaving: K layers evenly spaced. The sets of successive K do not nest."""
    k = len(model) + 1
    return [tuple(int((i + 0.5) * num_layers / k) for i in range(k))]


# ------------------------------------------------------------------------------------------------
# The impact score of section 4.3: do the linear module's states hold the label as the full ones do?

def pooled_outputs(model, mixers, prepared):
    """Mean over each prompt's tokens of every layer's attention output, of the full module and of
    the linear one on the same hidden states: {layer: (full [N, C], linear [N, C])}, fp64."""
    means = {layer: [] for layer in mixers}

    def visit(layer, hidden_states, full):
        linear = mixers[layer](hidden_states)[0]                                # [1, T, C]
        means[layer].append(torch.cat([full, linear]).double().mean(1).cpu())   # [2, C]

    for numbers in progress(prepared.of_doc, desc="states", unit="prompt", leave=False):
        request = prepared.requests[numbers[0]]
        prompt = request.tokens[: len(request.tokens) - request.scored]
        teacher_forward(model, torch.tensor([prompt]), sorted(mixers), visit)
    return {layer: torch.stack(both, 1).unbind() for layer, both in means.items()}


def fit_probe(states, labels, num_classes):
    """Logistic regression with L2 of strength 1, by L-BFGS in fp64, on states [N, C] standardised
    by their mean and spread -> logits(states) [N, num_classes]."""
    mean, spread = states.mean(0), states.std(0, correction=0)
    spread = torch.where(spread > 1e-9 * mean.abs(), spread, 1.0)       # a channel may be constant
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
    return logits


def impact_scores(model, mixers, prepared, seed):
    """{layer: {"A_full", "A_linear", "A_cross", "impact"}}, impact = 1 - (A_linear + A_cross) /
    (2 A_full). Probes are fitted on one seeded half of the documents and scored on the other."""
    task, docs = prepared.task, prepared.docs
    labels = [task.right(doc) if task.choices else None for doc in docs]
    if len(docs) < 4 or not all(isinstance(label, int) for label in labels):
        raise UserError("--order impact needs at least 4 documents, each with a right choice; "
                        f"{task.name} has {len(docs)}, or has documents without one.")
    order = random.Random(seed).sample(range(len(docs)), len(docs))
    fit, rest = sorted(order[: len(order) // 2]), sorted(order[len(order) // 2:])
    labels, num_classes, scores = torch.tensor(labels), max(labels) + 1, {}
    pooled = pooled_outputs(model, mixers, prepared)
    for layer, (full, linear) in progress(pooled.items(), desc="probes", unit="layer", leave=False):
        on_full, on_linear = (fit_probe(x[fit], labels[fit], num_classes) for x in (full, linear))
        a_full, a_linear, a_cross = (
            (logits.argmax(-1) == labels[rest]).double().mean().item()
            for logits in (on_full(full[rest]), on_linear(linear[rest]), on_full(linear[rest])))
        if a_full == 0:
            raise FloatingPointError(f"layer {layer}: the full module's probe is never right, so "
                                     "the impact score has no value; search on more documents")
        scores[layer] = {"A_full": a_full, "A_linear": a_linear, "A_cross": a_cross,
                         "impact": 1 - (a_linear + a_cross) / (2 * a_full)}
    return scores


def spearman(x, y):
    """Rank correlation; equal values share their mean rank. None where one side does not vary."""
    ranks = [[sum(b < a for b in z) + sum(b <= a for b in z) for a in z] for z in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1]) if min(len(set(z)) for z in ranks) > 1 else None


# ------------------------------------------------------------------------------------------------
# Scores of hybrids: none is evaluated twice

def spelled(row):
    """The numbers of a result as one line for people."""
    return ", ".join(f"{key.replace('_', ' ')} {value:,.5g}" for key, value in row.items()
                     if isinstance(value, (int, float)))


def with_errors(found, n):
    """["0.4140 +- 0.0220 (n = 500)", ...] by split, from what Scores.final returns."""
    return [f"{found[split]:.4f} +- {found[f'{split}_stderr']:.4f} (n = {n[split]})" for split in n]


def read_journal(path):
    """(settings, {(split, layers): row}) of search.jsonl, without a last line that a kill cut off;
    (None, {}) if none is left. Raises UserError if another line is damaged."""
    with evaluation.blame(f"{path} is damaged; delete it and search again"):
        settings, *rows = map(json.loads, path.read_text().split("\n")[:-1] or ["null"])
        return settings, {(row["split"], tuple(row["layers"])): row for row in rows}


class Scores:
    """Scores of a model's hybrids by split and linear layers. The journal (search.jsonl) holds the
    settings and then a line per evaluation, on disk before the next evaluation begins."""

    def __init__(self, journal, model, mixers, splits, metric, args):
        """Read the journal of an earlier run. Raises UserError if it had other settings."""
        self.journal, self.model, self.mixers, self.splits = journal, model, mixers, splits
        self.metric, self.allow_code, self.asked = metric, args.allow_code_execution, set()
        settings = {
            "model": fingerprint(model),
            "blocks": fingerprint(torch.nn.ModuleList(mixers.values())),
            "items": {name: split.fingerprint() for name, split in splits.items()},
            "metric": metric, "dtype": str(model.dtype), "device": model.device.type,
            "batch_size": args.batch_size, "limit": args.limit, "whole": args.whole,
            "versions": versions()}
        before, known = read_journal(journal) if journal.exists() else (None, {})
        changed = [key for key in settings if before and before.get(key) != settings[key]]
        if changed:
            raise UserError(f"{journal} was written by another search (other: "
                            f"{', '.join(changed)}); give another --out.")
        if rank() == 0:
            evaluation.write_lines(journal, [settings, *known.values()])
        self.known = gather(known)[0]                   # nodes may not share a disk
        can_share = evaluation.layers_can_be_shared(model, splits["validation"], mixers)
        self.plain = args.plain or not can_share
        if not can_share:
            log(f"{type(model).__name__}: a layer reads more of the lower layers than their hidden "
                "states, so all layers run for every candidate.")

    def rows(self, split, layer_sets):
        """The journal's row of each layer set on one split. Sets that it lacks are evaluated
        together, so that they share their common lower layers."""
        layer_sets = [tuple(sorted(layers)) for layers in layer_sets]
        new = [s for s in dict.fromkeys(layer_sets) if (split, s) not in self.known]
        if new:
            prepared, cost, began = self.splits[split], collections.Counter(), time.perf_counter()
            scores = evaluate_hybrids(self.model, prepared, self.mixers, new, self.metric,
                                      self.allow_code, self.plain, cost)
            seconds = (time.perf_counter() - began) / len(new)
            rows = gather(scores and [
                {"split": split, "layers": list(layers), "score": score.mean(),
                 "stderr": score.stderr(), "n": score.n, "seconds": round(seconds, 4),
                 **{key: value / len(new) for key, value in cost.items()},
                 "items": [item[self.metric] for item in score.items]}
                for layers, score in zip(new, scores)])[0]
            if rank() == 0:
                with open(self.journal, "a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
                    file.flush()
                    os.fsync(file.fileno())
            self.known |= {(split, layers): row for layers, row in zip(new, rows)}
        return [self.known[split, layers] for layers in layer_sets]

    def validation(self, layer_sets):
        """P on the validation split of each layer set: what Algorithm 1 maximises."""
        self.asked.update(tuple(sorted(layers)) for layers in layer_sets)
        return [row["score"] for row in self.rows("validation", layer_sets)]

    def record(self, step):
        """The step for result.json, with the standard errors of its score and of its lead over the
        runner-up. The lead is paired by item; `flipped` counts the items on which the two models
        differ."""
        row, = self.rows("validation", [step.layers])
        found = {"layers": sorted(step.layers), "score": step.score, "layer": step.layer,
                 "runner_up": None, "runner_up_score": None, "ties": 0, "stderr": row["stderr"],
                 "difference": None, "difference_stderr": None, "flipped": None}
        text = (f"{len(step.layers)} linear: layer {step.layer}, validation {step.score:.4f} +- "
                f"{row['stderr']:.4f} (n = {row['n']})")
        rivals = {layers: p for layers, p in step.scores.items() if layers != step.layers}
        if rivals:
            second, p_second = first_maximum(rivals)
            other, = self.rows("validation", [second])
            gaps = np.array(row["items"], float) - np.array(other["items"], float)
            found |= {"runner_up": second[-1], "runner_up_score": p_second,
                      "ties": sum(p >= step.score - SLACK for p in rivals.values()),
                      "difference": float(gaps.mean()), "flipped": int((gaps != 0).sum()),
                      "difference_stderr": float(gaps.std(ddof=len(gaps) > 1) / len(gaps) ** 0.5)}
            text += ("; runner-up layer {runner_up} with {runner_up_score:.4f}, margin "
                     "{difference:.4f} +- {difference_stderr:.4f}, {ties} ties, {flipped} items "
                     "flipped").format_map(found)
        log(text)
        return found

    def final(self, layers):
        """M_best or M_opt for result.json, with the gap from validation to test."""
        found = {"layers": sorted(layers), "test": None, "gap": None}
        for split in self.splits:
            row, = self.rows(split, [layers])
            found[split], found[f"{split}_stderr"] = row["score"], row["stderr"]
        if found["test"] is not None:
            found["gap"] = found["validation"] - found["test"]
        return found

    def cost(self):
        """Cost of the validation scores that this run used, even if an earlier run paid it."""
        rows = [self.known["validation", layers] for layers in self.asked]
        run, plain, flops = (round(sum(row[k] for row in rows))
                             for k in ("layer_tokens", "plain", "flops"))
        return {"search_seconds": sum(row["seconds"] for row in rows), "evaluations": len(rows),
                "tokens": plain // len(attention_modules(self.model)), "flops": flops,
                "layer_tokens": run, "plain_layer_tokens": plain, "saved": 1 - run / plain}


# ------------------------------------------------------------------------------------------------
# The hybrid as a checkpoint with its model card

def save_model(scores, layers, tokenizer, path, dtype, result):
    """Save the hybrid with `layers` linear; a kill never leaves a part of one. Weights are kept in
    `dtype`, except those that transformers keeps in fp32. Nothing is lost: where the model is wider
    than `dtype`, its weights were read from a checkpoint in `dtype`."""
    model = scores.model

    def write(folder):
        save_hybrid(model, folder, tokenizer)
        card = model_card(scores, layers, result)
        (folder / "README.md").write_text(card, encoding="utf-8")

    with replaced(model, scores.mixers, layers):
        kept, before = model._keep_in_fp32_modules_strict or (), model.dtype
        cast = [parameter for name, parameter in model.named_parameters()
                if parameter.dtype == before and not any(part in name for part in kept)]
        for parameter in cast:
            parameter.data = parameter.data.to(dtype)
        evaluation.write_directory(path, write)
        for parameter in cast:
            parameter.data = parameter.data.to(before)


def model_card(scores, layers, result):
    """README.md of the hybrid with `layers` linear, with its scores beside the base model's."""
    base, task = result["model"], result["task"]
    runs = [evaluation.read_run(run) for run in result["blocks"].split(",")]
    data = "; ".join(dict.fromkeys(f"{run['data']} ({run['tokens']:,} tokens)" for run in runs))
    commands = "\n".join([*(run.get("command", "") for run in runs), evaluation.command_line()])

    return f"""---
library_name: transformers
tags: [distill-then-replace, linear-attention]
{"" if Path(base).exists() else f"base_model: {base}"}
---
# {Path(base).name} with linear attention, for {task}

Layers {layers} of `{base}`, which has {len(attention_modules(scores.model))}, are linear attention
({result["attn"]}), made by Distill-then-Replace (arXiv:2601.11667). Each was distilled alone
on {data}; the validation split of `{task}` decided which ones are linear.

| {result["metric"]} +- standard error | {" | ".join(result["n"])} |
|---|{"---|" * len(result["n"])}
| base | {" | ".join(with_errors(scores.final(()), result["n"]))} |
| this model | {" | ".join(with_errors(scores.final(layers), result["n"]))} |

Load it with `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`, and its
tokenizer with `AutoTokenizer` in the same way. It works with transformers {KNOWN} and was made
with {transformers.__version__}. It is not for assisted decoding, prompt lookup, static caches,
continuous batching (`generate_batch`), tensor parallelism or flex attention. How it was made:

```
{commands}
```
"""


# ------------------------------------------------------------------------------------------------
# Hours of both phases at the paper's size. Weights are random, so that nothing is downloaded

PAPER_TOKENS, PAPER_ITEMS = 100_000_000, 500


def time_distillation(model, mixers, batch):
    """Hours for the paper's tokens at the speed of train_step on batch [B, T]."""
    optimizers, update = make_optimizers(mixers), fastest_update(model)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(-3, 20):                              # the first three are a warm-up
        if step == 0:
            began = evaluation.clock(model.device)
        train_step(model, mixers, optimizers, batch, 1e-4, update)
    rate = 20 * batch.numel() / (evaluation.clock(model.device) - began)
    flops = distill_flops(model, mixers, batch.numel(), batch.shape[1]) / batch.numel()
    return {"hours": PAPER_TOKENS / rate / 3600, "tokens_per_second": rate,
            "flops_per_second": flops * rate, "peak_memory": peak_memory(model.device)}


def time_search(model, mixers, prepared, args):
    """Hours for all rounds of Algorithm 1 on the paper's items, in proportion to the items run."""
    evaluate_hybrids(model, prepared, mixers, [(0,)])               # a warm-up
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        scores = Scores(Path(folder) / "search.jsonl", model, mixers, {"validation": prepared},
                        "acc", args)
        greedy(scores.validation, len(mixers), run_all=True)
    items, cost = len(prepared.docs), scores.cost()
    seconds = cost.pop("search_seconds")
    return {"hours": seconds * PAPER_ITEMS / items / 3600, "seconds": seconds, "items": items,
            "of_items": PAPER_ITEMS, **cost, "flops_per_second": cost["flops"] / seconds,
            "peak_memory": peak_memory(model.device)}


def benchmark(args):
    """JetBlock on a model of Qwen2.5-1.5B's shape: distillation on 32 x 512 random tokens a step,
    and the search on 500 items of 400 random tokens and three single-token choices, or with --limit
    on fewer. Without a GPU all of them are tiny, which shows that the code works."""
    if evaluation.world_size() > 1 or args.model or args.blocks or args.task or args.out:
        raise UserError("--benchmark makes its own model and task, in one process, and saves "
                        "nothing: leave torchrun, --model, --blocks, --task and --out out.")
    device = evaluation.find_device(args.device)
    gpu = device.type == "cuda"
    size = dict(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                num_attention_heads=12, num_key_value_heads=2)
    dtype, shape, items, length = torch.bfloat16, (32, 512), PAPER_ITEMS, 400
    if not gpu:
        size = dict(zip(size, (64, 64, 128, 4, 4, 2)))
        dtype, shape, items, length = torch.float32, (4, 64), 8, 40
    torch.manual_seed(args.seed)
    with device:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
            **size, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None))
    model = model.to(dtype).eval().requires_grad_(False)
    mixers = make_mixers(model, "jet", range(size["num_hidden_layers"]), "inherit", args.seed)
    rng, generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    docs = [{"context": demo_text(rng.randrange(64) for _ in range(length)),
             "choices": ["t1", "t2", "t3"], "gold": rng.randrange(3)} for _ in range(items)]
    prepared = prepare(evaluation.CHOICE_FILE, docs, model, demo_tokenizer(), args)
    batch = torch.randint(size["vocab_size"], shape, generator=generator)
    frozen = {layer: copy.deepcopy(mixer).to(dtype).eval().requires_grad_(False)
              for layer, mixer in mixers.items()}
    # distillation comes last because it compiles the layers, which a search does not
    phases = {"search": time_search(model, frozen, prepared, args),
              "distillation": time_distillation(model, mixers, batch)}
    rate = measured_limits()["tflop_s"] * 1e12 if gpu else None
    name = torch.cuda.get_device_name() if gpu else "CPU, a tiny model: the hours mean nothing"
    log(f"{name}; the paper needed 2.5 hours of an A800 for each phase")
    for phase, row in phases.items():
        row["share_of_matrix_rate"] = rate and row["flops_per_second"] / rate
        log(f"  {phase}: {spelled(row)}")
    return {"device": name, "batch_size": args.batch_size, "versions": versions(), **phases}


# ------------------------------------------------------------------------------------------------
# The report: the paper's tables beside ours and its figures, from the files below a directory

# Lines differ in marker and dashes, so that they need no colour; the colours are Okabe and Ito's.
STYLES = {"color": ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00"),
          "marker": tuple("os^Dvx"),
          "linestyle": ("-", "--", "-.", ":", (0, (6, 2, 1, 2)), (0, (1, 3)))}


def read_results(folder):
    """{"result": [records], "distill": ..., "throughput": ..., "finetune": ..., "unfinished":
    [folders]} from the files below `folder` with these names. "model", "attn" and "task" of every
    record are short names, "" where it has none. A search has "scored" {(split, layers): (score in
    percent, standard error, documents)} and its "curve" {linear layers: validation score}; a
    throughput "rates" {context: {linear layers: tokens per second at the largest batch}}."""
    found = {kind: [] for kind in ("result", "distill", "throughput", "finetune")}
    for path in sorted(folder.rglob("*.json")):
        kind = path.stem.partition("-")[0]              # result-greedy.json is a result
        if kind not in found or (path.name == "result.json"
                                 and any(path.parent.glob("result-*.json"))):
            continue
        with evaluation.blame(f"{path} cannot be read; run its command again or delete it"):
            run = json.loads(path.read_text())
            task = run.get("task", "")
            known = evaluation.TASKS.named(task)
            run |= {"folder": path.parent, "attn": run.get("attn") or run.get("mixer") or "",
                    "model": Path(run.get("base_model") or run.get("model", "")).name,
                    "task": known.name if known else Path(task).stem.removesuffix("-validation")}
            if kind == "result":
                if run["strategy"] == "greedy" and run["steps"][0]["runner_up"] is None:
                    continue                                        # scores of --layers, no search
                scores = [run["p_base"], *run["validation"]]
                run["curve"] = {count: 100 * score for count, score in enumerate(scores)}
            if kind == "throughput":
                run["rates"] = collections.defaultdict(dict)
                largest = max((row["asked"] for row in run["rows"]), default=None)
                for row in run["rows"]:         # a run may have been killed before its largest
                    if row["asked"] == largest:
                        at = run["rates"][row["context"]]
                        at[row["linear_layers"]] = row["tokens_per_second"]
        if kind == "result":
            run["scored"] = {place: (100 * row["score"], 100 * row["stderr"], row["n"]) for
                             place, row in read_journal(path.with_name("search.jsonl"))[1].items()}
        found[kind].append(run)
    unfinished = [path.parent for path in folder.rglob("search.jsonl")
                  if not path.with_name("result.json").exists()]
    unfinished += [run["folder"] for run in found["distill"] if not run["finished"]]
    return found | {"unfinished": sorted(map(str, unfinished))}


def our_rows(found):
    """(table, row, {column: entry}) of every run. An entry is (number, standard error, documents),
    text, or None for what was not run."""
    def hours(costs, seconds="seconds", n=None):
        return costs and (sum(c[seconds] * c["ranks"] for c in costs) / 3600, None, n)

    rates = {(run["model"], run["attn"]): run["rates"].get(2048, {}) for run in found["throughput"]}
    for run in found["result"]:
        model, attn, task, order = (run[key] for key in ("model", "attn", "task", "strategy"))
        score = lambda split, layers: run["scored"].get((split, tuple(layers)))
        if order in ("greedy", "impact"):
            known = run.get("impact") or {layer for _, layers in run["scored"] for layer in layers}
            for chosen in (x for x in run["sets"] if len(x) == round(len(known) * 10 / 28)):
                yield f"Table 4, {model}, {attn}", task, {
                    order: score("test", chosen),
                    f"{order} layers": " ".join(map(str, chosen)),
                    f"{order}, validation": score("validation", chosen)}
        if order != "greedy":
            continue
        kept, count = run["best"]["layers"], len(run["opt"]["layers"])
        base, best, opt = (score("test", x) for x in ((), kept, run["opt"]["layers"]))
        yield f"Table 1, {model}", task, {
            "base": base, attn: best, f"{attn} layers": (len(kept), None, None)}
        at = rates.get((model, attn), {})
        if abs(run["p_min"] - 0.95 * run["p_base"]) < SLACK:
            yield f"Table 2, {model}, {attn}", task, {
                "base": base, "M_opt": opt, "layers": (count, None, None),
                "drop, %": base and opt and base[0] and (
                    100 * (1 - opt[0] / base[0]), None, opt[2]),
                "speed-up at 2,048": {0, count} <= set(at) and (at[count] / at[0], None, None)}
        blocks = [Path(name).resolve() for name in run["blocks"].split(",")]
        costs = [record["cost"] for record in found["distill"]
                 if record["finished"] and record["folder"].resolve() in blocks]
        yield f"Table 3, {attn}", f"{model}, {task}", {
            "device": run["cost"]["device"], "distillation": hours(costs),
            "M tokens": costs and (costs[0]["tokens"] / 1e6, None, None),
            "search": hours([run["cost"]], "search_seconds", run["n"]["validation"]),
            "evaluations": (run["cost"]["evaluations"], None, None)}


def cell(paper=None, ours=()):
    """One entry of a table: the paper's number, if it prints one, and the mean of our runs. They
    score the same documents, so the mean has about the standard error of one run; "spread" is the
    standard deviation between them."""
    ours = [value for value in ours if value]
    if not ours or isinstance(ours[0], str):
        return {"paper": paper, "ours": "; ".join(dict.fromkeys(ours)) or None}
    numbers, errors, documents = zip(*ours)
    mean, spread = float(np.mean(numbers)), float(np.std(numbers, ddof=len(ours) > 1))
    return {"paper": paper, "ours": mean, "difference": None if paper is None else mean - paper,
            "n": documents[0], "stderr": None if None in errors else float(np.mean(errors)),
            "runs": len(ours), "spread": round(spread, 9)}


def show(entry):
    """paper / ours ± standard error / difference."""
    text = " / ".join(missing if x is None else x if isinstance(x, str) else f"{x:.3g}"
                      for x, missing in ((entry["paper"], "–"), (entry["ours"], "not run")))
    text += f" ± {entry['stderr']:.2g}" if entry.get("stderr") is not None else ""
    return text + (f" / {entry['difference']:+.2g}" if entry.get("difference") is not None else "")


def markdown(titles, tables, figures, unfinished):
    """The report's lines."""
    yield ("Entries: the paper's number (–: it prints none) / ours ± standard error / "
           "difference. Scores in percent of n documents.")
    for name, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        yield f"\n## {name}: {titles[name[:7]]}\n\n| | n | " + " | ".join(columns) + " |"
        yield "|---" * (len(columns) + 2) + "|"
        for place, row in rows.items():
            counts = dict.fromkeys(str(entry["n"]) for entry in row.values() if entry.get("n"))
            shown = [show(row.get(column) or cell()) for column in columns]
            yield f"| {place} | {', '.join(counts) or '–'} | " + " | ".join(shown) + " |"
    for name, drawn in figures.items():
        yield f"\n## {name}\n"
        yield from [drawn] if isinstance(drawn, str) else [
            f"![{title}]({path})" for path, title in drawn.items()]
    yield from (f"\n{folder}: not finished" for folder in unfinished)


def grouped(records, line, *fields):
    """((values of `fields`), {value of the field `line`: [records]}) of every group of records."""
    groups = {}
    for record in records:
        lines = groups.setdefault(tuple(record[field] for field in fields), {})
        lines.setdefault(record[line], []).append(record)
    return groups.items()


def figures(found, paper):
    """(number, key of the name, title, {line: [{x: y} of every run]}, label of x, label of y) of
    every figure that has data."""
    axes = "linear layers", "score, %"

    def caption(groups):
        run = next(iter(groups.values()))[0]
        error = 100 * max(step["stderr"] for step in run["steps"])
        return (f"{run['model']}, {run['task']}: {run['metric']} on validation, "
                f"n = {run['n']['validation']}, standard error up to {error:.1f}")

    def curves(groups):
        return {line: [run["curve"] for run in runs] for line, runs in groups.items()}

    def correlation(ranks):
        found = spearman(ranks, range(len(ranks)))
        return found and round(found, 2)

    for run in found["throughput"]:
        rates = run["rates"]
        key = run["model"], run["attn"] or "saved hybrid", run["dtype"], run["device"]
        lines = {f"context {context:,}": [at] for context, at in rates.items()}
        printed = paper.get(f"Table 2, {run['model']}, {run['attn']}", {}).values()
        if printed and 0 in rates.get(2048, {}):
            lines["paper's speed-up of our base, context 2,048"] = [{
                row["layers"]: row["speed-up at 2,048"] * rates[2048][0] for row in printed}]
        title = f"{', '.join(key)}: decoding at the largest batch"
        yield 2, key, title, lines, axes[0], "tokens per second"
    searches = [run for run in found["result"] if run["strategy"] == "greedy"]
    for key, mixers in grouped(searches, "attn", "model", "task"):
        printed = paper.get(f"Table 1, {key[0]}", {}).get(key[1])
        lines = {f"paper's M_best on test, {attn}": [{printed[f"{attn} layers"]: printed[attn]}]
                 for attn in mixers if printed}
        yield 3, (*key, "score"), caption(mixers), curves(mixers) | lines, *axes
        orders = {attn: runs[0]["order"] for attn, runs in mixers.items()}
        ranks = [f"{a}-{b} {correlation([y.index(layer) for layer in x if layer in y])}"
                 for (a, x), (b, y) in itertools.combinations(orders.items(), 2)]
        title = f"{caption(mixers)}; Spearman between orders: {', '.join(ranks) or 'one mixer'}"
        lines = {attn: [dict(enumerate(order, 1))] for attn, order in orders.items()}
        yield 3, (*key, "order"), title, lines, "step", "layer replaced (first run)"
    for key, orders in grouped(found["result"], "strategy", "model", "attn", "task"):
        title = f"{key[1]}, {caption(orders)}"
        if len(orders) > 1:
            yield 4, key, title, curves(orders), *axes
        pairs = itertools.product(orders.get("impact", ()), orders.get("greedy", ()))
        for run, first in [(a, b) for a, b in pairs if a["blocks"] == b["blocks"]][:1]:
            impact = [run["impact"][str(layer)]["impact"] for layer in first["order"]]
            lines = {run["blocks"]: [dict(enumerate(impact, 1))]}
            yield (6, key, f"{title}; Spearman {correlation(impact)}", lines,
                   "step of greedy search", "impact score")
    for key, tuned in grouped(found["finetune"], "attn", "model", "task"):
        run, lines = next(iter(tuned.values()))[0], {}
        title = (f"{', '.join(key)}: fine-tuning, {run['metric']} on {run['split']}, n = "
                 f"{run['after']['n']}, standard error {100 * run['after']['stderr']:.1f}")
        for (attn, runs), when in itertools.product(tuned.items(), ("before", "after")):
            lines[f"{attn or 'base'}, {when}"] = [
                {len(run["linear_layers"]): 100 * run[when]["score"] for run in same}
                for same in dict(grouped(runs, "seed"))[()].values()]
        yield 5, key, title, lines, *axes


def draw(path, number, title, lines, xlabel, ylabel):
    """One figure for README's width. A line is the mean over its runs, and a band shows the lowest
    and the highest run, at the x that all runs have."""
    from matplotlib import figure, ticker
    page = figure.Figure(figsize=(8.5, 5), layout="constrained")
    axes = page.subplots()
    axes.set_prop_cycle(**STYLES)
    for label, runs in lines.items():
        xs = sorted(set.intersection(*map(set, runs)))
        ys = np.array([[run[x] for x in xs] for run in runs])                   # [runs, points]
        loose = number == 6 or label.startswith("paper")    # points that do not follow each other
        line, = axes.plot(xs, ys.mean(0), markerfacecolor="none", linestyle="" if loose else None,
                          label=label if len(runs) == 1 else f"{label} ({len(runs)} runs)")
        axes.fill_between(xs, ys.min(0), ys.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_title(title.replace("; ", "\n"), fontsize=11)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if number == 2 else "linear")
    for axis in [axes.xaxis, axes.yaxis][: 2 if ylabel.startswith("layer") else 1]:
        axis.set_major_locator(ticker.MaxNLocator(integer=True))
    page.legend(loc="outside lower center", ncols=3)
    evaluation.write_atomic(path, lambda p: page.savefig(p, dpi=200, format="png"))


def make_report(args):
    """Print the paper's tables beside ours, from the results below DIR, as Markdown, draw its
    figures into DIR/figures, write both to DIR/report.md and DIR/report.json -> where they are."""
    folder = args.report
    if not folder.is_dir():
        raise UserError(f"--report {folder}: there is no such directory.")
    if args.model or args.blocks or args.task or args.out or args.benchmark:
        raise UserError("--report reads files and runs nothing: leave all other flags out.")
    paper, found = evaluation.read_json(PAPER), read_results(folder)
    numbers, ours, tables = {}, collections.defaultdict(list), {}
    for table, rows in paper["tables"].items():
        numbers |= {(table, row, column): x for row in rows for column, x in rows[row].items()}
    for table, row, columns in our_rows(found):
        for column, entry in columns.items():
            ours[table, row, column].append(entry)
    for place in sorted(numbers | ours, key=lambda place: place[0][:7]):
        table, row, column = place
        entry = cell(numbers.get(place), ours[place])
        tables.setdefault(table, {}).setdefault(row, {})[column] = entry
    drawn, absent = {f"Figure {number}": {} for number in range(2, 7)}, "not run"
    try:
        for number, key, title, *data in figures(found, paper["tables"]):
            path = folder / "figures" / f"fig{number}-{'-'.join(key).replace(' ', '-')}.png"
            path.parent.mkdir(exist_ok=True)
            draw(path, number, title, *data)
            drawn[f"Figure {number}"][f"figures/{path.name}"] = title
    except ImportError:
        absent = "not drawn"
        log("figures are not drawn: matplotlib is missing (pip install matplotlib)")
    rest = {"unfinished": found["unfinished"],
            "figures": {name: paths or absent for name, paths in drawn.items()}}
    text = "\n".join(markdown(paper["titles"], tables, **rest))
    print(text)
    evaluation.write_atomic(folder / "report.md", lambda path: path.write_text(
        text + "\n", encoding="utf-8"))
    write_json(folder / "report.json", {"tables": tables, **rest})
    return {"report": str(folder / "report.json"), **rest}


# ------------------------------------------------------------------------------------------------
# A search from flags to result.json

def parse_args():
    parser = evaluation.ArgumentParser(__doc__)
    evaluation.add_model_flags(parser)
    evaluation.add_task_flags(parser)
    add, positive = parser.add_argument, evaluation.positive(int)
    add("--blocks", help="run directory of distill.py, or several, comma-separated")
    add("--task", help="a .jsonl file to search on, or a named task of eval.py")
    add("--test", help=".jsonl file to report on, if --task is a file")
    add("--test-docs", help="local file of the documents that a named task reports")
    add("--search-size", type=positive, default=500,
        help="documents of a named task to search on, at most (paper: 500)")
    add("--paper-splits", action="store_true",
        help="search on what is reported, if that is validation or the only split (it leaks)")
    add("--max-drop", type=float, default=0.05, help="P_min as a relative drop (paper: 0.05)")
    add("--p-min", type=float, help="P_min itself, in place of --max-drop")
    add("--all", action="store_true", help="continue below P_min until every layer is replaced")
    add("--order", choices=("greedy", "local", "uniform", "random", "impact"), default="greedy",
        dest="strategy", help="greedy: Algorithm 1; local: ranked once, each layer alone; uniform: "
        "evenly spaced; random: by --order-seed; impact: by linear probes (section 4.3)")
    add("--order-seed", type=int, default=0, help="of --order random; --seed draws the documents")
    add("--budget", type=positive, help="stop after this many layers")
    add("--plain", action="store_true",
        help="run shared lower layers for every candidate: slower, the same scores")
    add("--layers", help="no search: score and save just this set, e.g. 4,8,12")
    add("--benchmark", action="store_true", help="save nothing: time both phases on a random model "
        "of Qwen2.5-1.5B's shape (a tiny one on a CPU); --limit N searches on N of 500 items")
    add("--report", metavar="DIR", type=Path,
        help="no search: the paper's tables and figures beside ours, from the results below DIR")
    add("--out", help="directory for the journal, the result and the checkpoints")
    add("--dry-run", nargs="?", type=evaluation.positive(float), const=0, metavar="TFLOPS",
        help="print evaluations, FLOPs (at most) and memory, and the hours at a rate of TFLOPS; "
        "reads no weights")
    return parser.parse_args()


def open_search(args):
    """What can be checked before the model is loaded -> (out, task, metric, documents)."""
    for name in ("blocks", "task", "out"):
        if getattr(args, name) is None:
            raise UserError(f"--{name} is missing (see --help).")
    if not (0 <= args.max_drop <= 1 and 0 <= (args.p_min or 0) <= 1):
        raise UserError("--max-drop and --p-min are fractions from 0 to 1.")
    if args.layers and (args.strategy != "greedy" or args.budget):
        raise UserError("--layers names the layers itself; leave --order and --budget out.")
    return (evaluation.claim_dir(args.out, foreign=("distill.json", "config.json")),
            *search_documents(args))


def candidates_of(args, scores, num_layers, given):
    """(candidates for `greedy`, impact scores or None) of the strategy that the flags name."""
    layers = range(num_layers)
    if given:
        return lambda num_layers, model: [given], None
    if args.strategy in ("greedy", "uniform"):
        return uniform if args.strategy == "uniform" else each_full_layer, None
    if args.strategy == "random":
        return in_order(random.Random(args.order_seed).sample(layers, num_layers)), None
    if args.strategy == "local":        # by the score when each layer alone is replaced
        alone = scores.validation([(layer,) for layer in layers])
        return in_order(sorted(layers, key=lambda layer: -round(alone[layer] / SLACK))), None
    impact = gather(rank() == 0 and impact_scores(
        scores.model, scores.mixers, scores.splits["validation"], args.seed))[0]
    for layer, row in impact.items():
        log(f"layer {layer}: {spelled(row)}")
    return in_order(sorted(layers, key=lambda layer: impact[layer]["impact"])), impact


def run_search(args):
    """Search, or score --layers, and save everything -> the result."""
    out, task, metric, documents = open_search(args)
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.trust_remote_code,
                                  base_only=True)
    began = time.perf_counter()
    check_savable(model)
    num_layers = len(attention_modules(model))
    given = tuple(evaluation.parse_layers(args.layers, num_layers)) if args.layers else ()
    mixers = evaluation.load_blocks(args.blocks, model, given or None)
    dtype = evaluation.dtype_to_save(args.model, model, args.dtype)
    for mixer in mixers.values():
        mixer.to(dtype).to(model.dtype)         # the saved numbers are the ones that are scored
    splits = {name: prepare(task, docs, model, tokenizer, args, searched=name == "validation")
              for name, docs in documents.items()}
    scores = Scores(out / "search.jsonl", model, mixers, splits, metric, args)
    candidates, impact = candidates_of(args, scores, num_layers, given)
    steps = []
    found = greedy(scores.validation, num_layers, args.max_drop, args.p_min, args.all,
                   len(given) or args.budget, candidates,
                   on_step=lambda step: steps.append(scores.record(step)))
    best, opt = (given, given) if given else (found.best, found.opt)
    order = [step["layer"] for step in steps]                   # None where sets do not nest
    result = {
        "task": args.task, "metric": metric, "strategy": args.strategy, "p_base": found.p_base,
        "p_min": found.p_min, "order": given or ([] if None in order else order),
        "sets": [step["layers"] for step in steps],
        "validation": [step["score"] for step in steps],
        "best": scores.final(best), "opt": scores.final(opt), "test_base": scores.final(())["test"],
        "steps": steps}
    if impact:
        path = out / "result-greedy.json"
        first = evaluation.read_json(path)["order"] if path.exists() else []
        ranks = [impact[layer]["impact"] for layer in first if len(first) == num_layers]
        result |= {"impact": impact, "spearman": spearman(ranks, range(len(ranks)))}
        log(f"Spearman's correlation of impact score and greedy order: {result['spearman']} (it "
            "needs a search with --order greedy --all and the same --out)")
    result |= {"n": {name: len(split.docs) for name, split in splits.items()},
               "model": args.model, "blocks": args.blocks,
               "attn": evaluation.read_run(args.blocks.split(",")[0])["attn"]}
    cost = scores.cost()
    result["cost"] = {**cost_of(cost["search_seconds"], cost["tokens"], model.device), **cost,
                      "seconds": time.perf_counter() - began, "versions": versions()}
    if rank() == 0:
        for name in ("best", "opt"):
            save_model(scores, result[name]["layers"], tokenizer, out / name, dtype, result)
        write_json(out / "result.json", result)
        if not given:           # --report finds here what each order gave with the same --out
            seed = f"-{args.order_seed}" if args.strategy == "random" else ""
            write_json(out / f"result-{args.strategy}{seed}.json", result)
    log(f"{args.task}: {metric}, P_min {found.p_min:.4f}")
    for name, layers in (("base", ()), ("M_best", best), ("M_opt", opt)):
        cells = zip(result["n"], with_errors(scores.final(layers), result["n"]))
        log(f"  {name:6} {', '.join(map(' '.join, cells))}; linear layers {sorted(layers)}")
    log(f"  {spelled(scores.cost())}")
    return result


def plan(args):
    """--dry-run: an upper bound of what a search runs (gdn if --blocks holds no run yet): the last
    layers go first, since greedy search then shares least. Memory: per token of a batch and channel
    3 numbers for each layer (outputs, caches), and 25 for the one that runs (fitted on a CPU)."""
    if args.model is None or args.task is None:
        raise UserError("--dry-run needs a --model and a --task.")
    task, _, documents = search_documents(args)
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.trust_remote_code,
                                  base_only=True, weights=False)
    prepared = prepare(task, documents["validation"], model, tokenizer, args, searched=True)
    num_layers, known, cost = len(attention_modules(model)), set(), collections.Counter()
    given = tuple(evaluation.parse_layers(args.layers, num_layers)) if args.layers else ()
    run = args.blocks and evaluation.read_run(args.blocks.split(",")[0])
    attn, init = (run["attn"], run["init"]) if run else ("gdn", "inherit")
    mixers = make_mixers(model, attn, range(num_layers), init, args.seed)

    def evaluate(layer_sets):
        new = {tuple(sorted(layers)) for layers in layer_sets} - known
        known.update(new)
        if new:
            cost.update(evaluation.search_cost(model, prepared, mixers, new, args.plain))
        return [sum(layers) for layers in layer_sets]       # so the last layer is the best

    if args.strategy == "impact":
        args.strategy = "random"        # any order costs as much, and this one needs no weights
    candidates, _ = candidates_of(args, SimpleNamespace(validation=evaluate), num_layers, given)
    greedy(evaluate, num_layers, run_all=True, budget=len(given) or args.budget,
           candidates=candidates)
    tokens = args.batch_size * max(len(r.tokens) + r.max_new for r in prepared.requests)
    numbers = (25 + 3 * num_layers) * mixers[0].q_proj.in_features
    evaluation.finish_plan(args, model, mixers, {
        "attn": attn, "evaluations": len(known), "tokens": cost["plain"] // num_layers,
        "flops": cost["flops"]}, model.dtype.itemsize, tokens * numbers * model.dtype.itemsize)


def main():
    args = parse_args()
    if args.report:
        return evaluation.finish(make_report(args))
    if args.dry_run is not None:
        return plan(args)
    evaluation.join_ranks(args.device)
    if args.benchmark:
        return evaluation.finish(benchmark(args))
    if args.model is not None:
        return evaluation.finish(
            run_search(args),
            f"python eval.py --model {args.out}/opt --task {args.test or args.task}")
    log("demo: searches the tiny Llama's two tasks; --model, --blocks, --task search anything else")
    args.model, args.blocks, args.all = str(make_demo()), args.blocks or str(DEMO / "blocks"), True
    results = {}
    for args.task in evaluation.DEMO_TASKS:
        args.out = str(DEMO / args.task)
        result = results[args.task] = run_search(args)
        log(f"{args.task}: layers went in the order {result['order']}; M_opt keeps "
            f"{len(result['order']) - len(result['opt']['layers'])} softmax layers")
    evaluation.finish({"results": results}, f"python eval.py --model {DEMO}/copy/opt --task copy")


if __name__ == "__main__":
    evaluation.run_script(main)
