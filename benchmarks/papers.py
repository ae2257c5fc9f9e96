"""Do the papers' claims hold on the embedded model? A claim is a row, and an interval decides it.

    python benchmarks/papers.py list                      # the claims, what is missing of each, and what it will cost
    python benchmarks/papers.py run                       # every run that is missing; stop and go on as you like
    python benchmarks/papers.py run --claims e2po-noises --seeds 0
    python benchmarks/papers.py table                     # writes the tables of benchmarks/README.md and README.md

A claim compares two arms. Both have the same seeds and held-out prompts, so it is about the mean of their differences
d [S seeds, P prompts]. Its two-sided 95 % interval is Student's for two crossed random factors: another seed and other
prompts would move the mean too. The interval decides: `shown` if all of it is beyond the claim's bound, `refuted` if
none of it is, and `not shown` otherwise. A run is one line of results/papers.jsonl and serves all claims.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from papers_runs import ROWS, train
from rows import add, read
from scipy import stats

README = Path(__file__).parent / "README.md"
FRONT = README.parent.parent / "README.md"
LATE = 4  # "late" is the last quarter of a run's steps


def final(column: str) -> Callable[[dict], np.ndarray]:
    """Return a metric [P]: the held-out score of each prompt after the run."""
    return lambda row: np.array(row["held_out"][column][-1])


def late(column: str) -> Callable[[dict], np.ndarray]:
    """Return a metric [1]: the mean of a training metric over the last quarter of the steps."""
    return lambda row: np.array([np.mean(row["steps"][column][-len(row["steps"][column]) // LATE :])])


METRICS = {
    "held-out accuracy": final("geneval/accuracy"),
    "held-out CLIP": final("clip"),
    "held-out JPEG score (- kB)": final("jpeg"),
    "flat groups, late": late("group/zero_std_ratio"),
    "reward std in a group, late": late("group/reward_std_mean"),
}


@dataclass(frozen=True)
class Claim:
    """Says that `metric` of the arm `more` exceeds that of the arm `less` by more than `bound`.

    The arm `base` is the model of the other arm before its training.
    """

    paper: str
    says: str
    metric: str
    more: str
    less: str
    bound: float = 0.0
    seeds: tuple[int, ...] = (0, 1, 2)


CLAIMS = {
    "e2po-noises": Claim(
        "E2PO", "at equal initial noises it ends higher than NFT", "held-out accuracy", "e2po_2x4", "nft_2"
    ),
    "e2po-flat": Claim(
        "E2PO", "at equal initial noises fewer groups go flat", "flat groups, late", "nft_2", "e2po_2x4"
    ),
    "e2po-images": Claim(
        "E2PO", "at equal images it loses no more than .03 to NFT", "held-out accuracy", "e2po_2x4", "nft_8", -0.03
    ),
    "slas-hacking": Claim(
        "SLAS",
        "the prompt's std shrinks files of a hackable reward",
        "held-out JPEG score (- kB)",
        "hack_prompt",
        "base",
    ),
    "slas-price": Claim("SLAS", "and loses accuracy to it", "held-out accuracy", "base", "hack_prompt"),
    "slas-prompt": Claim(
        "SLAS", "SLAS ends higher than the prompt's std", "held-out accuracy", "hack_slas", "hack_prompt"
    ),
    "slas-global": Claim("SLAS", "shaping adds to the batch's std", "held-out accuracy", "hack_slas", "hack_global"),
}


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of differences [S seeds, P prompts] and its two-sided 95 % interval.

    Both factors are random, so the variance of the mean is (MS seeds + MS prompts - MS rest) / (S P), with
    Satterthwaite's degrees of freedom; where that is below what one factor alone gives, the larger one counts. With a
    single seed the interval is over prompts alone, with a single value a seed over seeds alone.
    """
    d = np.asarray(differences, dtype=np.float64)
    size, mean, freedom = np.array(d.shape), d.mean(), np.array(d.shape) - 1
    by_seed, by_prompt = d.mean(1, keepdims=True) - mean, d.mean(0, keepdims=True) - mean
    squares = np.array([(by_seed**2).sum() * size[1], (by_prompt**2).sum() * size[0]])
    found = [(total / free, free) for total, free in zip(squares, freedom, strict=True) if free]
    if not found:
        return float(mean), -np.inf, np.inf
    if len(found) == 2:
        terms = [*found, (-((d - mean - by_seed - by_prompt) ** 2).sum() / freedom.prod(), freedom.prod())]
        total = sum(square for square, _ in terms)
        spread = sum(square**2 / free for square, free in terms)
        found.append((total, total**2 / spread if spread else freedom.sum()))
    variance, free = max(found)
    half = stats.t.ppf(0.975, free) * np.sqrt(variance / d.size)
    return float(mean), float(mean - half), float(mean + half)


def verdict(low: float, high: float, bound: float) -> str:
    """Return what an interval says of the claim that the difference is above `bound`."""
    return "shown" if low > bound else "refuted" if high < bound else "not shown"


def of_arm(rows: list[dict], arm: str) -> dict[int, dict]:
    """Return the rows of an arm by seed."""
    return {row["seed"]: row for row in rows if row["arm"] == arm}


def untrained(row: dict) -> dict:
    """Return what a run's row says of the model before training."""
    return row | {"held_out": {column: scores[:1] for column, scores in row["held_out"].items()}}


def sides(claim: Claim, rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Return the metric [S, P] of the two arms, for the seeds that both have."""
    arms = [of_arm(rows, claim.less if arm == "base" else arm) for arm in (claim.more, claim.less)]
    if claim.less == "base":
        arms[1] = {seed: untrained(row) for seed, row in arms[0].items()}
    if claim.more == "base":
        arms[0] = {seed: untrained(row) for seed, row in arms[1].items()}
    seeds = sorted(arms[0].keys() & arms[1].keys())
    more, less = (np.array([METRICS[claim.metric](arm[seed]) for seed in seeds]) for arm in arms)
    return more, less


def needed(claim: Claim, seeds: tuple[int, ...]) -> list[tuple[str, int]]:
    """Return the runs of a claim."""
    return [(arm, seed) for seed in seeds for arm in (claim.more, claim.less) if arm != "base"]


def table(rows: list[dict]) -> str:
    """Return all claims as Markdown."""
    lines = [
        "| claim | what the paper says | measured | arms | seeds | means | difference, 95 % interval | verdict | cost |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, claim in CLAIMS.items():
        more, less = sides(claim, rows)
        cells = ["-", "-", "-", "not run", "-"]
        if len(more):
            mean, low, high = interval(more - less)
            bound = f" (bound {claim.bound:+.2f})" if claim.bound else ""
            runs = [of_arm(rows, arm)[seed] for arm, seed in needed(claim, claim.seeds) if seed in of_arm(rows, arm)]
            cells = [
                str(len(more)),
                f"{more.mean():.3f}, {less.mean():.3f}",
                f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]{bound}",
                f"**{verdict(low, high, claim.bound)}**",
                f"{sum(run['images'] for run in runs):,} images",
            ]
        arms = f"{claim.more} over {claim.less}"
        lines.append(f"| `{name}` | {claim.paper}: {claim.says} | {claim.metric} | {arms} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["list", "run", "table"])
    parser.add_argument("--claims", nargs="+", choices=list(CLAIMS), default=list(CLAIMS))
    parser.add_argument("--seeds", nargs="+", type=int)
    args = parser.parse_args()
    for name in args.claims:
        for arm, seed in needed(CLAIMS[name], tuple(args.seeds or CLAIMS[name].seeds)):
            if seed in of_arm(read(ROWS), arm):
                continue
            if args.command == "run":
                add(ROWS, train(arm, seed))
            elif args.command == "list":
                print(name, arm, seed)
    if args.command == "table":
        print(table(read(ROWS)))


if __name__ == "__main__":
    main()
