"""Phase 2, greedy layer replacement: Algorithm 1 of the paper (section 3.2).

    python replace.py                                           # the demo: offline, CPU
    python replace.py --model M --blocks runs/gdn --task val.jsonl --test test.jsonl --out runs/s
    python replace.py --model M --blocks runs/gdn --task val.jsonl --layers 4,8,12 --out runs/l

Round by round, every layer that is still softmax attention is tried as its distilled linear module;
the layer whose replacement scores best on the validation split stays replaced. M_opt is the last
model that keeps P_min (by default 95 % of the base model's score), M_best the one with the best
score on the way. Both are scored on the test split, once, and saved as ordinary checkpoints:

    AutoModelForCausalLM.from_pretrained("OUT/opt", trust_remote_code=True)

Every evaluation is on disk (OUT/search.jsonl) before the next begins: run the same command again
after an interruption, and it goes on. The last line on stdout is the result as one JSON object.
"""

import contextlib
import json
import math
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from distill import load_blocks, peak_memory, read_run
from eval import (
    DEMO, DEMO_TASKS, TASKS, ArgumentParser, UserError, add_model_flags, add_task_flags,
    attention_modules, check_metric, digest, evaluate, file_task, find_task, fingerprint, finish,
    load_model, log, make_demo, make_output_dir, parse_layers, positive, prepare, progress,
    run_script, split_docs, versions, write_atomic, write_json)
from linear_attn import check_savable, save_hybrid, swap

SLACK = 1e-9        # scores are fractions of counts: equal counts must compare as equal


# ------------------------------------------------------------------------------------------------
# Algorithm 1

@dataclass
class Step:
    """One round of the search: the layer it replaced, and how close the decision was."""
    layer: int
    score: float
    runner_up: int | None
    runner_up_score: float | None


@dataclass
class Search:
    """What Algorithm 1 returns, and the way it took."""
    p_base: float
    p_min: float
    steps: list = field(default_factory=list)
    best: tuple = ()
    opt: tuple = ()


def greedy(score, num_layers, max_drop=0.05, p_min=None, run_all=False, report=lambda step, n: None):
    """Algorithm 1. score([(layers), ...]) -> [P of the model with those layers linear, ...].

    P_min is `p_min`, or (1 - max_drop) P(base). With `run_all` the rounds go on, for the curve,
    until no full layer is left; what is returned as best and opt stays what Algorithm 1 returns.
    """
    p_base = score([()])[0]                                         # M = M_best = M_opt = M_full
    search = Search(p_base, (1 - max_drop) * p_base if p_min is None else p_min)
    current, p_best, stopped = (), p_base, False
    while len(current) < num_layers:
        full_layers = [layer for layer in range(num_layers) if layer not in current]
        scores = score([current + (layer,) for layer in full_layers])       # P_l for each l
        step = first_maximum(full_layers, scores)                           # P*, l*
        current += (step.layer,)
        search.steps.append(step)
        report(step, len(current))
        if not stopped and step.score >= p_best - SLACK:                    # if P* >= P_best:
            search.best, p_best = current, step.score                       #   M_best = M*
        if not stopped and step.score >= search.p_min - SLACK:              # if P* >= P_min:
            search.opt = current                                            #   M = M_opt = M*
        else:                                                               # else stop
            stopped = True
            if not run_all:
                break
    return search


def first_maximum(layers, scores):
    """The first layer that attains the maximum (strict >, so the lowest index wins ties), and the
    first that comes next."""
    def first(pairs):
        top = pairs[0]
        for pair in pairs:
            top = pair if pair[1] > top[1] + SLACK else top
        return top

    pairs = list(zip(layers, scores))
    layer, score = first(pairs)
    rest = [pair for pair in pairs if pair[0] != layer]
    return Step(layer, score, *(first(rest) if rest else (None, None)))


# ------------------------------------------------------------------------------------------------
# Scores of hybrids: swap in, evaluate, swap out; nothing is evaluated twice

@contextlib.contextmanager
def replaced(model, mixers, layers):
    """Within the block, `layers` of the model are their linear modules."""
    softmax = {layer: swap(model, layer, mixers[layer]) for layer in layers}
    try:
        yield model
    finally:
        for layer, attn in softmax.items():
            swap(model, layer, attn)


class Journal:
    """search.jsonl: the settings' fingerprint, then one line per evaluation, each on disk before
    the next begins. A line cut off by a kill is dropped. Raises UserError for other settings."""

    def __init__(self, path, settings):
        self.path, self.rows = path, {}
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        if lines:
            header, *rows = map(json.loads, lines)
            changed = [k for k in settings if header.get(k) != settings[k]]
            if changed:
                raise UserError(f"{path} was written by another search (other: "
                                f"{', '.join(changed)}); give another --out.")
            self.rows = {(row["split"], tuple(row["layers"])): row for row in rows}
        whole = b"".join(line + b"\n" for line in lines) or _line(settings)
        write_atomic(path, lambda p: p.write_bytes(whole))

    def add(self, row):
        self.rows[row["split"], tuple(row["layers"])] = row
        with open(self.path, "ab") as file:
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())


def _line(row):
    return json.dumps(row).encode() + b"\n"


class Scorer:
    """P of hybrids on the splits of a task, remembered in the journal."""

    def __init__(self, model, mixers, splits, metric, journal, allow_code=False):
        self.model, self.mixers, self.splits = model, mixers, splits
        self.metric, self.journal, self.allow_code = metric, journal, allow_code

    def row(self, split, layers):
        """The journal's row of one layer set on one split; evaluated if it is not there yet."""
        layers = tuple(sorted(layers))
        if (split, layers) not in self.journal.rows:
            began = time.perf_counter()
            with replaced(self.model, self.mixers, layers):
                score = evaluate(self.model, self.splits[split], self.metric, quiet=True,
                                 allow_code=self.allow_code)
            self.journal.add({"split": split, "layers": list(layers), "score": score.mean(),
                              "stderr": score.stderr(), "n": score.n,
                              "seconds": round(time.perf_counter() - began, 4)})
        return self.journal.rows[split, layers]

    def validation(self, layer_sets, bar=None):
        """P on the validation split for each layer set: what Algorithm 1 maximises."""
        scores = []
        for layers in layer_sets:
            scores.append(self.row("validation", layers)["score"])
            if bar is not None:
                bar.update()
        return scores

    def final(self, layers):
        """{"layers", "validation", "test"} of one model, for result.json."""
        return {"layers": sorted(layers),
                "validation": self.row("validation", layers)["score"],
                "test": self.row("test", layers)["score"] if "test" in self.splits else None}


# ------------------------------------------------------------------------------------------------
# What a search leaves behind

def save_checkpoint(model, mixers, layers, tokenizer, path):
    """The hybrid with `layers` linear as a checkpoint at `path`, whole or not at all."""
    building = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    with replaced(model, mixers, layers):
        save_hybrid(model, building, tokenizer)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(building, path)


def plot_search(result, path):
    """search.png: validation score against the number of linear layers."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    scores = [result["p_base"], *result["validation"]]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(len(scores)), scores, "o-", color="tab:blue", label="greedy")
    axes.axhline(result["p_base"], color="gray", linewidth=1, label="base")
    axes.axhline(result["p_min"], color="gray", linewidth=1, linestyle="--", label="P_min")
    for count, layer in enumerate(result["order"], 1):
        axes.annotate(f"+{layer}", (count, scores[count]), xytext=(0, -14), ha="center",
                      textcoords="offset points", fontsize=8)
    for name, marker, size in (("best", "*", 18), ("opt", "s", 11)):
        axes.plot(len(result[name]["layers"]), result[name]["validation"], marker, markersize=size,
                  markerfacecolor="none", color="tab:red", label=f"M_{name}")
    axes.set_xlabel("linear layers (the layer that each step replaced)")
    axes.set_ylabel(f"{result['metric']}, validation (n = {result['n']['validation']})")
    axes.set_title(f"{Path(result['task']).stem}: greedy replacement")
    axes.margins(y=0.15)
    axes.legend()
    write_atomic(path, lambda p: figure.savefig(p, dpi=150, format="png"))
    pyplot.close(figure)


def report_step(step, count):
    margin = "" if step.runner_up is None else (
        f", runner-up layer {step.runner_up} with {step.runner_up_score:.4f}, margin "
        f"{step.score - step.runner_up_score:+.4f}")
    log(f"{count} linear: layer {step.layer}, validation {step.score:.4f}{margin}")


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
    parser.add_argument("--layers", help="no search: score and save just this set, e.g. 4,8,12")
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
        files = [DEMO / f"{args.task}-{split}.jsonl" for split in ("validation", "test")]
    return {name: file_task(path)[1] for name, path in zip(("validation", "test"), files) if path}


def run_search(args, model, tokenizer):
    """Search, or score --layers, for one task; save everything -> the result."""
    began = time.perf_counter()
    out = check_args(args)
    check_savable(model)
    task = find_task(args.task, args)
    metric, num_layers = check_metric(task, args.metric), len(attention_modules(model))
    given = parse_layers(args.layers, num_layers) if args.layers else None
    mixers = load_blocks(args.blocks, model, given)
    splits = {name: prepare(task, docs, model, tokenizer, args, searched=name == "validation")
              for name, docs in search_documents(args, task).items()}
    journal = Journal(out / "search.jsonl", {
        "model": fingerprint(model), "blocks": digest([fingerprint(mixers[l]) for l in mixers]),
        "items": {name: split.fingerprint() for name, split in splits.items()}, "metric": metric,
        "dtype": str(model.dtype), "device": model.device.type, "batch_size": args.batch_size,
        "limit": args.limit, "whole": args.whole, "versions": versions()})
    scorer = Scorer(model, mixers, splits, metric, journal, args.allow_code_execution)
    if given is None:
        with progress(total=num_layers * (num_layers + 1) // 2 + 1, desc="search",
                      unit="eval") as bar:
            search = greedy(lambda sets: scorer.validation(sets, bar), num_layers, args.max_drop,
                            args.p_min, args.all, report_step)
    else:
        p_base, p_given = scorer.validation([(), given])
        p_min = (1 - args.max_drop) * p_base if args.p_min is None else args.p_min
        search = Search(p_base, p_min, [Step(given, p_given, None, None)], given, given)
    result = {
        "task": args.task, "metric": metric, "p_base": search.p_base, "p_min": search.p_min,
        "order": given or [step.layer for step in search.steps],
        "validation": [step.score for step in search.steps],
        "best": scorer.final(search.best), "opt": scorer.final(search.opt),
        "test_base": scorer.final(())["test"],
        "n": {name: split_n(scorer, name) for name in splits},
        "model": args.model, "blocks": args.blocks, "attn": read_run(args.blocks.split(",")[0])["attn"]}
    for name in ("best", "opt"):
        save_checkpoint(model, mixers, result[name]["layers"], tokenizer, out / name)
    spent = [row["seconds"] for (split, _), row in journal.rows.items() if split == "validation"]
    result["cost"] = {"seconds": time.perf_counter() - began, "search_seconds": sum(spent),
                      "evaluations": len(spent), "memory": peak_memory(model.device),
                      "device": str(model.device), "versions": versions()}
    if given is None:
        plot_search(result, out / "search.png")
    write_json(out / "result.json", result)
    report_result(result, scorer, out)
    return result


def split_n(scorer, split):
    return scorer.row(split, ())["n"]


def report_result(result, scorer, out):
    """The closing table: base, M_best and M_opt on both splits, with standard errors."""
    log(f"{result['task']}: {result['metric']}; P_min {result['p_min']:.4f}")
    for name, layers in (("base", []), ("M_best", result["best"]["layers"]),
                         ("M_opt", result["opt"]["layers"])):
        cells = [f"{split} {row['score']:.4f} +- {row['stderr']:.4f} (n = {row['n']})"
                 for split in scorer.splits for row in [scorer.row(split, layers)]]
        log(f"  {name:6s} {', '.join(cells)}; linear layers {layers}")
    log(f"  saved: {out}/best, {out}/opt, {out}/result.json")


def main():
    args = parse_args()
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
