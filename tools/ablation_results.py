"""The results of tools.ablation as tables, with the statistics that docs/evidence.md announces.

A difference of two variants is paired: both runs of a pair have one seed, and so the same images in the same order with
the same augmentation.
"""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scipy import special

from tools.ablation_models import DESIGNS, ROOT
from training.errors import UserError

RESULTS = ROOT / "logs" / "ablation"
LEVEL = 0.05  # of Holm's tests together; an interval holds 1 - LEVEL


class Contrast(NamedTuple):
    """What a difference of top-1 between two variants tests. paper: the sign that the paper claims; 0 for none."""

    question: str
    first: str
    second: str
    paper: int = 1


# Holm's correction is over these.
CONTRASTS = (
    Contrast("PEG against learned absolute positions", "g_peg", "g_absolute"),
    Contrast("PEG against no positions", "g_peg", "g_none"),
    Contrast("LSA and GSA against LSA alone", "lg_lg_gg", "ll_ll_gg"),
    Contrast("LSA and GSA against GSA alone", "lg_lg_gg", "g_peg"),
)
# Described without a verdict.
DESCRIBED = (
    Contrast("PEG added to absolute positions", "g_absolute_peg", "g_absolute", 0),
    Contrast("absolute positions added to PEG", "g_absolute_peg", "g_peg", 0),
)


# ---------------------------------------------------------------- statistics


class Summary(NamedTuple):
    mean: float
    low: float
    high: float
    p: float  # two-sided


def summarize(differences: Sequence[float]) -> Summary:
    """Return the mean of paired differences with its t interval and the p of a t test; at least two are needed."""
    mean, freedom = statistics.fmean(differences), len(differences) - 1
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = special.stdtrit(freedom, 1 - LEVEL / 2) * error
    if error == 0:
        return Summary(mean, mean, mean, 0.0 if mean else 1.0)
    return Summary(mean, mean - half, mean + half, 2 * float(special.stdtr(freedom, -abs(mean) / error)))


def holm(values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p of each test, in the given order."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, number in enumerate(sorted(range(len(values)), key=lambda number: values[number])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[number]))
        adjusted[number] = largest
    return adjusted


def verdict(mean: float, p: float, paper: int) -> str:
    if p >= LEVEL:
        return "unresolved"
    return "same sign, resolved" if mean * paper > 0 else "opposite sign, resolved"


# ---------------------------------------------------------------- results


def read(kind: str, folder: Path = RESULTS) -> list[dict]:
    """Return the results of a kind of run, "lr" or "seed", in the order of the variants."""
    found = []
    for path in sorted(folder.glob(f"*-{kind}*.json")):
        try:
            record = json.loads(path.read_text())
            found.append(record | {"file": path.name, "top1": float(record["top1"]), "variant": record["variant"]})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"no result of a run ({path}): restore the recorded file ({error!r:.60})") from error
    order = list(DESIGNS)
    if strange := [record["file"] for record in found if record["variant"] not in order]:
        raise UserError(f"a result of no variant ({folder / strange[0]}): restore the recorded file")
    return sorted(found, key=lambda record: (order.index(record["variant"]), record["seed"], record["lr"]))


def counted(folder: Path = RESULTS) -> dict[str, dict[int, dict]]:
    """Return the counted results by variant and seed; raise UserError if one is from no clean commit, or they differ in
    more than variant, seed and rate.
    """
    found, recipes = {}, {}
    for record in read("seed", folder):
        if not record["commit"] or "+" in record["commit"]:
            raise UserError(f"a result from no clean commit ({folder / record['file']}): remove it, and run it again")
        found.setdefault(record["variant"], {})[record["seed"]] = record
        recipes[json.dumps([record["recipe"], record["data"]])] = record["file"]
        if record["lr"] != next(iter(found[record["variant"]].values()))["lr"]:
            raise UserError(
                f"a variant with two learning rates ({folder / record['file']}): run its seeds again at one"
            )
    if len(recipes) > 1:
        names = " and ".join(list(recipes.values())[:2])
        raise UserError(f"results of more than one recipe or data set ({names}): remove the others, and run them again")
    return found


def rates(folder: Path = RESULTS) -> dict[str, dict[float, dict]]:
    """Return the results of choosing the learning rate, by variant and rate."""
    found = {}
    for record in read("lr", folder):
        found.setdefault(record["variant"], {})[record["lr"]] = record
    return found


def chosen(results: dict[float, dict]) -> float:
    """Return the rate with the best top-1 on the images held out, the smaller of two that are equal."""
    return min(results, key=lambda rate: (-results[rate]["top1"], rate))


def paired(results: dict[str, dict[int, dict]], contrast: Contrast) -> dict[int, float]:
    """Return first - second in points of top-1, by seed, for the seeds that both have."""
    first, second = results.get(contrast.first, {}), results.get(contrast.second, {})
    return {seed: first[seed]["top1"] - second[seed]["top1"] for seed in sorted(first.keys() & second.keys())}


# ---------------------------------------------------------------- tables: a header, and rows of cells


def rate_table(folder: Path = RESULTS) -> tuple[str, list[list[str]]]:
    rows = []
    for variant, results in rates(folder).items():
        scores = ", ".join(f"{rate:g}: {record['top1']:.2f}" for rate, record in sorted(results.items()))
        commits = ", ".join(sorted({record["commit"][:8] for record in results.values()}))
        rows.append([DESIGNS[variant].title, scores, f"{chosen(results):g}", commits])
    return "Variant | Rate: top-1 on 5,000 training images held out | Chosen | Commit", rows


def run_table(folder: Path = RESULTS) -> tuple[str, list[list[str]]]:
    """Every counted run, none left out."""
    results, rows = counted(folder), []
    seeds = sorted({seed for runs in results.values() for seed in runs})
    for variant, runs in results.items():
        scores = [runs[seed]["top1"] for seed in seeds if seed in runs]
        cells = [f"{runs[seed]['top1']:.2f}" if seed in runs else "" for seed in seeds]
        spread = f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        minutes = f"{statistics.median(record['minutes'] for record in runs.values()):.1f}"
        one = next(iter(runs.values()))
        commits = ", ".join(sorted({record["commit"][:8] for record in runs.values()}))
        row = [DESIGNS[variant].title, f"{one['parameters'] / 1e6:.2f}", f"{one['lr']:g}", *cells]
        rows.append([*row, f"{statistics.fmean(scores):.2f}", spread, minutes, commits])
    columns = " | ".join(f"Seed {seed}" for seed in seeds)
    return f"Variant | #params (M) | Rate | {columns} | Mean | sd | Minutes (median) | Commit", rows


def contrast_table(folder: Path = RESULTS) -> tuple[str, list[list[str]]]:
    """The contrasts with two seeds or more; verdicts and Holm's p once all contrasts have as many."""
    results, rows = counted(folder), []
    pairs = {contrast: paired(results, contrast) for contrast in (*CONTRASTS, *DESCRIBED)}
    summaries = {contrast: summarize(list(each.values())) for contrast, each in pairs.items() if len(each) > 1}
    complete = all(contrast in summaries for contrast in CONTRASTS)
    adjusted = dict(zip(CONTRASTS, holm([summaries[contrast].p for contrast in CONTRASTS]))) if complete else {}
    for contrast, summary in summaries.items():
        each = ", ".join(f"{difference:+.2f}" for difference in pairs[contrast].values())
        names = f"{DESIGNS[contrast.first].title} - {DESIGNS[contrast.second].title}"
        p = f"{adjusted[contrast]:.3g}" if contrast in adjusted else ""
        words = verdict(summary.mean, adjusted[contrast], contrast.paper) if contrast in adjusted else ""
        words = words or ("not tested" if contrast in DESCRIBED else "runs are missing")
        interval = f"{summary.low:+.2f} to {summary.high:+.2f}"
        rows.append([contrast.question, names, each, f"{summary.mean:+.2f}", interval, p, words])
    return "Question | Difference | By seed (points) | Mean | 95 % interval | p, Holm | Verdict", rows
