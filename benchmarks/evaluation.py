"""What an evaluation costs: ours compared with a plain one, with one pass over the rows per metric, on the same model.

    OMP_NUM_THREADS=1 python -m benchmarks.evaluation [--data DIR] [--rows 100] [--out benchmarks/evaluation.json]

CPU seconds (of the process, one thread) for the four sets of TOFU's layout: losses of right, paraphrased and wrong
answers, greedy generations with ROUGE-L, and the inputs of memorisation and membership scores. Both run in turn, and
their values must agree. The Reference attack needs a second model's losses. The plain evaluation keeps that model in
memory and runs it; ours takes the losses from an earlier evaluation of it, as `ofmu evaluate` does (its cost is shown;
it serves all compared models). benchmarks/README.md explains the results.

`--data`: a folder with TOFU's files; a small Llama and its vocabulary are then fitted on full.json (`--model DIR`
keeps them). Without it, the built-in model is evaluated on the built-in people.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks import evaluation_plain as plain
from benchmarks.step import machine
from ofmu_ray.assets import resolve_builtin
from ofmu_ray.config import EvaluationConfig, FormatConfig
from ofmu_ray.data.template import Template
from ofmu_ray.evaluation.rows import EvaluationRow, evaluation_rows, with_row_metrics
from ofmu_ray.evaluation.scorer import Scorer
from ofmu_ray.evaluation.units import Result, assemble, plan
from ofmu_ray.metrics.membership import reference_score
from ofmu_ray.models.tree import tree_of

FILES = {
    "forget": "forget10_perturbed",
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}
SHAPE = {"hidden_size": 160, "intermediate_size": 432, "num_hidden_layers": 4, "num_attention_heads": 4}
VOCABULARY = 2048
MAX_NEW_TOKENS = 200
BATCH = EvaluationConfig().batch_size
TOLERANCE = 1e-4
Sets = Mapping[str, Sequence[EvaluationRow]]


# ------------------------------------------------------------------------------------------------------ rows and model


def read_sets(data: Path | None, count: int | None) -> dict[str, list[EvaluationRow]]:
    """The first `count` rows of each set."""
    if data is None:
        names = {name: "forget_perturbed" if name == "forget" else file for name, file in FILES.items()}
        paths = {name: Path(resolve_builtin(f"builtin:people/{file}.jsonl")) for name, file in names.items()}
    else:
        paths = {name: data / f"{file}.json" for name, file in FILES.items()}
    return {name: evaluation_rows(name, _lines(path)[:count], FormatConfig()) for name, path in paths.items()}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def fit(data: Path, folder: Path, seconds: float, known: Sequence[EvaluationRow]) -> None:
    """Fit a small Llama to the rows `known`, if any.

    Otherwise fit it to full.json and the questions whose answers a pretrained model would know.
    """
    rows = _lines(data / "full.json")
    rows += [row for name in ("real_authors", "world_facts") for row in _lines(data / f"{FILES[name]}.json")] * 2
    torch.manual_seed(0)
    tokenizer = _tokenizer([f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows])
    pairs = [(row.question, row.answer) for row in known] or [(row["question"], row["answer"]) for row in rows]
    encoded = Template(tokenizer, FormatConfig()).encode_rows(*zip(*pairs, strict=True))
    texts = sorted((row.input_ids for row in encoded), key=len)
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **SHAPE, tie_word_embeddings=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    draw, started, done = random.Random(0), time.process_time(), 0.0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, 20 * done + 0.02) * (1 - done)
        first = draw.randrange(max(1, len(texts) - 16))
        batch = texts[first : first + 16]
        longest = len(batch[-1])
        ids = torch.tensor([text + [1] * (longest - len(text)) for text in batch])
        labels = torch.tensor([text + [-100] * (longest - len(text)) for text in batch])
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done = (time.process_time() - started) / seconds
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(texts: Sequence[str]) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


# ----------------------------------------------------------------------------------------------------------- measuring


def reference_of(model: Any) -> Any:
    """A second model of the same shape and cost for the Reference attack: this one with noise of a tenth added."""
    reference, draw = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in reference.parameters():
            weight.add_(0.1 * weight.std() * torch.randn(weight.shape, generator=draw))
    return reference


def ours(scorer: Scorer, sets: Sets, known: Mapping[str, Sequence[float]] | None) -> dict[str, list[dict[str, Any]]]:
    """Records of every set's rows. `known`: the second model's losses of the right answers."""
    units = {name: plan(rows, scorer.template, BATCH) for name, rows in sets.items()}
    every = [unit for of in units.values() for unit in of]
    results: dict[str, list[Result]] = {name: [] for name in sets}
    for number, result in scorer.run_all(every):
        results[every[number].set].append(result)
    records_of_sets = {name: with_row_metrics(assemble(rows, results[name])).to_pylist() for name, rows in sets.items()}
    if known is not None:
        for name, records in records_of_sets.items():
            for record, score in zip(
                records, reference_score([each["answer_nll"] for each in records], known[name]), strict=True
            ):
                record["reference"] = float(score)
    return records_of_sets


def plainly(scorer: Scorer, sets: Sets, memory: str, reference: Any) -> dict[str, dict[str, Any]]:
    return {
        name: plain.evaluate(
            scorer.model, scorer.template, rows, MAX_NEW_TOKENS, memory=memory in ("all", name), reference=reference
        )
        for name, rows in sets.items()
    }


def worst_difference(records_of_sets: dict[str, list[dict[str, Any]]], expected: dict[str, dict[str, Any]]) -> float:
    """Largest |ours - plain| / max(1, |plain|) over all values that both have; 1 if a generation differs."""
    worst = 0.0
    for name, records in records_of_sets.items():
        for index, record in enumerate(records):
            mine = record | plain.from_tokens(record)
            for key, values in expected[name].items():
                pair = (mine[key], values[index])
                if isinstance(pair[0], str):
                    worst = max(worst, float(pair[0] != pair[1]))
                else:
                    lists = [value if isinstance(value, list) else [value] for value in pair]
                    worst = max(worst, *(abs(a - b) / max(1.0, abs(b)) for a, b in zip(*lists, strict=True)))
    return worst


def cpu_seconds(action: Any, *args: Any) -> tuple[float, Any]:
    started = time.process_time()
    result = action(*args)
    return time.process_time() - started, result


def spread_of(seconds: Sequence[float], tokens: int) -> dict[str, float]:
    return {"min": min(seconds), "median": median(seconds), "tokens_per_second": tokens / median(seconds)}


def work(scorer: Scorer, sets: Sets, records_of_sets: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Tokens of the evaluation, and the operations that no implementation can avoid.

    Every distinct prefix of a row's texts, and every generated token beyond these texts, goes through the layers once,
    and through the head if something is predicted from it. Attention is not counted.
    """
    template, model = scorer.template, scorer.model
    tokens = layers = heads = 0
    for name, rows in sets.items():
        for row, record in zip(rows, records_of_sets[name], strict=True):
            tree = tree_of([template.encode(row.question, text) for text in row.texts])  # type: ignore[attr-defined]
            said = template.tokenizer(record["generated"], add_special_tokens=False)["input_ids"]  # type: ignore[attr-defined]
            node, known = tree.prompt - 1, 0
            while known < len(said) and (child := tree.child(node, said[known])) is not None:
                node, known = child, known + 1
            beyond = max(0, record["generated_tokens"] - known)
            tokens += (
                sum(tree.prompt + len(answer) for answer in tree.answers) + tree.prompt + record["generated_tokens"]
            )
            layers += len(tree.tokens) + beyond
            heads += len(tree.tokens) - tree.prompt + 1 + beyond
    head = model.get_output_embeddings().weight.numel()
    inner = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n and "head" not in n)
    return {"tokens": tokens, "gflop": 2e-9 * (layers * inner + heads * head)}


def where(scorer: Scorer, sets: Sets) -> dict[str, float]:
    """Shares of one profiled evaluation's time by part (profiling makes Python look more expensive than it is)."""
    profile = cProfile.Profile(time.process_time)
    profile.runcall(ours, scorer, sets, None)
    stats = profile.getstats()

    def seconds(name: str, own: bool = False) -> float:
        mine = [
            entry
            for entry in stats
            if name in (getattr(entry.code, "co_name", None), str(entry.code).split()[-1].rstrip(">"))
        ]
        return sum(entry.inlinetime if own else entry.totaltime for entry in mine)

    total = seconds("ours")
    parts = {
        "trees": seconds("tree_logits"),
        "decoding": seconds("generate_batch"),
        "scores of logits": seconds("_normalised") + seconds("scores_of") + seconds("_nll"),
        "ROUGE": seconds("rouge_l_recall"),
        "tokenising": seconds("plan"),
    }
    return {name: part / total for name, part in parts.items()}


def measure(scorer: Scorer, sets: Sets, repeats: int, memory: str | None, reference: Scorer | None) -> dict[str, Any]:
    """Results of both on these rows; only ours without `memory`, no Reference attack without `reference`."""
    warm = {name: rows[:2] for name, rows in sets.items()}
    ours(scorer, warm, None), plainly(scorer, warm, "all", None)
    known, once = None, 0.0
    if reference is not None:
        once, records_of_sets = cpu_seconds(ours, reference, sets, None)
        known = {name: [record["answer_nll"] for record in records] for name, records in records_of_sets.items()}
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    difference = None
    for _ in range(repeats):
        spent, records_of_sets = cpu_seconds(ours, scorer, sets, known)
        seconds["ours"].append(spent)
        if memory:
            spent, expected = cpu_seconds(plainly, scorer, sets, memory, reference and reference.model)
            seconds["plain"].append(spent)
            difference = worst_difference(records_of_sets, expected)
            if difference > TOLERANCE:
                raise SystemExit(f"the two evaluations differ by {difference:.1e} (allowed {TOLERANCE:.0e})")
    needed = work(scorer, sets, records_of_sets)
    result = {name: spread_of(each, int(needed["tokens"])) for name, each in seconds.items() if each}
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["plain"], strict=False)]
    rouge = [record["rouge_l_recall"] for record in records_of_sets["forget"]]
    return {
        "rows": {name: len(rows) for name, rows in sets.items()},
        "repeats": repeats,
        "plain_memory_sets": memory,
        "reference_attack": reference is not None,
        "reference_seconds": once,
        **needed,
        **result,
        "times_faster": median(ratios) if ratios else None,
        "worst_difference": difference,
        "forget_rouge": sum(rouge) / len(rouge),
        "generated_tokens": sum(
            record["generated_tokens"] for records in records_of_sets.values() for record in records
        ),
        "where": where(scorer, sets),
    }


def describe(result: dict[str, Any], rate: float) -> str:
    floor = result["gflop"] / rate
    lines = [
        f"\n{sum(result['rows'].values())} rows, {result['tokens']} tokens, "
        f"{result['generated_tokens']} of them generated, forget ROUGE-L {result['forget_rouge']:.2f}"
    ]
    for name in ("ours", "plain"):
        if name in result:
            each = result[name]
            seconds = f"min {each['min']:.1f} s, median {each['median']:.1f} s"
            lines.append(f"{name:6} {seconds}, {each['tokens_per_second']:.0f} tokens/s")
    if result["times_faster"] is not None:
        lines.append(
            f"ours is {result['times_faster']:.1f} times faster; worst difference {result['worst_difference']:.0e}"
        )
    if result["reference_attack"]:
        lines.append(f"second model evaluated once before: {result['reference_seconds']:.1f} s, included in neither")
    lines.append(f"floor {floor:.1f} s ({result['gflop']:.0f} GFLOP at {rate:.0f} GFLOP/s)")
    lines.append("where: " + ", ".join(f"{name} {share:.0%}" for name, share in result["where"].items()))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with TOFU's files; default: the built-in people")
    parser.add_argument("--model", type=Path, help="folder of the model; with --data, it is fitted there if absent")
    parser.add_argument("--fit-seconds", type=float, default=200, help="CPU seconds for fitting")
    parser.add_argument(
        "--fit-known", action="store_true", help="fit to the evaluated rows only, so that it knows them"
    )
    parser.add_argument("--rows", type=int, help="rows of each set; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--memory",
        choices=["all", "forget"],
        default="all",
        help="sets with memorisation and membership scores in the plain evaluation",
    )
    parser.add_argument("--no-reference", action="store_true", help="skip the Reference attack")
    parser.add_argument("--only-ours", action="store_true", help="skip the plain evaluation")
    parser.add_argument("--out", type=Path, help="JSON file; results are appended to those in it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()

    sets = read_sets(args.data, args.rows)
    folder = args.model or Path(resolve_builtin("builtin:people/target"))
    if args.data is not None:
        if args.model is None:
            parser.error("--data needs --model DIR, the folder for the fitted model")
        if not (folder / "config.json").is_file():
            known = [row for rows in sets.values() for row in rows] if args.fit_known else []
            fit(args.data, folder, args.fit_seconds, known)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    models = [model] if args.no_reference else [model, reference_of(model)]
    scorer, *reference = (
        Scorer(each, tokenizer, Template(tokenizer, FormatConfig()), max_new_tokens=MAX_NEW_TOKENS) for each in models
    )
    about = {"data": "TOFU" if args.data else "people", "parameters": model.num_parameters(), "machine": machine()}
    memory = None if args.only_ours else args.memory
    result = about | measure(scorer, sets, args.repeats, memory, next(iter(reference), None))
    print(describe(result, about["machine"]["matmul_gflop_per_second"]))
    if args.out:
        known = json.loads(args.out.read_text()) if args.out.exists() else []
        args.out.write_text(json.dumps([*known, result], indent=1) + "\n")


if __name__ == "__main__":
    main()
