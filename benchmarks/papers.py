"""Do the papers' claims hold on the embedded model? A claim is a row, and an interval decides it.

    python benchmarks/papers.py list                      # what is missing of each claim, and what it will cost
    python benchmarks/papers.py run                       # every run that is missing; stop and go on as you like
    python benchmarks/papers.py run --claims e2po-noises --seeds 0
    python benchmarks/papers.py table                     # writes the tables of benchmarks/README.md and README.md

A claim compares two arms on the same seeds and held-out prompts, so it is about the mean of their differences [S seeds,
P prompts]. Its two-sided 95 % interval is Student's for two crossed random factors: other seeds and other prompts would
move the mean too. A claim is `shown` if all of its interval is above the claim's bound, `refuted` if all of it is
below, and `not shown` otherwise; before all its seeds have run it is `not run`. A run is one line of
results/papers.jsonl, and serves all claims.
"""

import argparse
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from papers_runs import ROOT, ROWS, expected, run
from rows import add, read
from scipy import stats

BASE = "base"  # the arm that is the other arm's model before its training
Metric = Callable[[dict, dict], tuple[np.ndarray, np.ndarray]]  # rows of two arms -> their values [P]


def each(measure: Callable[[dict], list[float]]) -> Metric:
    """Return the metric that measures each arm by itself."""
    return lambda *pair: tuple(np.array(measure(row)) for row in pair)


def final(column: str) -> Metric:
    """Return held-out scores after a run, one a prompt."""
    return each(lambda row: row["held_out"][column][-1])


def late(column: str) -> Metric:
    """Return the mean of a training metric over the last quarter of the steps."""
    return each(lambda row: [np.mean(row["steps"][column][-len(row["steps"][column]) // 4 :])])


def at_equal_preference(*pair: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return accuracies by prompt where both arms have first reached the preference that both of them reach.

    They are linear between evaluations.
    """
    curves = [[np.mean(scores) for scores in row["held_out"]["preference"]] for row in pair]
    reached = min(map(max, curves))
    return tuple(crossing(curve, reached, row) for curve, row in zip(curves, pair, strict=True))


def crossing(curve: list[float], level: float, row: dict) -> np.ndarray:
    """Return a row's accuracies [P] where its preference, which begins below a level, first comes to it."""
    after = next(place for place, value in enumerate(curve) if value >= level and place)
    share = np.clip((level - curve[after - 1]) / (curve[after] - curve[after - 1]), 0, 1)
    before, there = (np.array(row["held_out"]["geneval/accuracy"][place]) for place in (after - 1, after))
    return (1 - share) * before + share * there


METRICS: dict[str, Metric] = {
    "accuracy": final("geneval/accuracy"),
    "preference": final("preference"),
    "minus kB of JPEG": final("jpeg"),
    "distance between images": final("diversity"),
    "accuracy at equal preference": at_equal_preference,
    "flat groups, late": late("group/zero_std_ratio"),
    "reward std in a group, late": late("group/reward_std_mean"),
}


@dataclass(frozen=True)
class Claim:
    """Says that `metric` of the arm `more` exceeds that of the arm `less` by more than `bound`.

    Metrics that are not called late are held-out ones.
    """

    paper: str
    says: str
    metric: str
    more: str
    less: str
    bound: float = 0.0
    seeds: tuple[int, ...] = (0, 1, 2)

    def runs(self, seeds: tuple[int, ...]) -> list[tuple[str, int]]:
        """Return the runs that the claim needs."""
        return [(arm, seed) for seed in seeds for arm in (self.more, self.less) if arm != BASE]


ONE = (0,)
E2PO, SLAS, CRITIC, SRPO = PAPERS = ("E2PO", "SLAS", "Latent actor-critic PPO", "SRPO")
CLAIMS = {
    "e2po-noises": Claim(E2PO, "ends higher than NFT at equal noises", "accuracy", "e2po_2x4", "nft_2"),
    "e2po-flat": Claim(E2PO, "keeps groups from going flat", "flat groups, late", "nft_2", "e2po_2x4"),
    "e2po-images": Claim(E2PO, "is level with NFT at equal images", "accuracy", "e2po_2x4", "nft_8", -0.03),
    "e2po-spread": Claim(
        E2PO, "keeps its spread where NFT's dies", "reward std in a group, late", "collapse_e2po", "collapse_nft"
    ),
    "e2po-collapse": Claim(E2PO, "its groups stay alive there", "flat groups, late", "collapse_nft", "collapse_e2po"),
    "e2po-long": Claim(E2PO, "and it ends higher there", "accuracy", "collapse_e2po", "collapse_nft", 0, ONE),
    "e2po-diversity": Claim(
        E2PO, "and its images differ more", "distance between images", "collapse_e2po", "collapse_nft", 0, ONE
    ),
    "e2po-fading": Claim(E2PO, "needs its schedule", "accuracy", "e2po_2x4", "e2po_static", 0, ONE),
    "e2po-anchor": Claim(E2PO, "needs the original in the group", "accuracy", "e2po_2x4", "e2po_unanchored", 0, ONE),
    "e2po-decoupled": Claim(E2PO, "must update the original alone", "accuracy", "e2po_2x4", "e2po_perturbed", 0, ONE),
    "e2po-encoder": Claim(E2PO, "must perturb one encoder alone", "accuracy", "e2po_2x4", "e2po_both", 0, ONE),
    "e2po-grid": Claim(E2PO, "needs several noises as well", "accuracy", "e2po_2x4", "e2po_1x8", 0, ONE),
    "slas-hacking": Claim(SLAS, "the prompt's std shrinks the files", "minus kB of JPEG", "hack_prompt", BASE),
    "slas-price": Claim(SLAS, "and loses accuracy by it", "accuracy", BASE, "hack_prompt"),
    "slas-prompt": Claim(SLAS, "SLAS ends higher than the prompt's std", "accuracy", "hack_slas", "hack_prompt"),
    "slas-global": Claim(SLAS, "and than the batch's std alone", "accuracy", "hack_slas", "hack_global"),
    "slas-dance": Claim(SLAS, "ends higher than DanceGRPO out of domain", "accuracy", "slas", "dance"),
    "critic-ppo": Claim(CRITIC, "ends higher than Flow-GRPO at equal images", "accuracy", "critic_0.95", "flow_grpo"),
    "critic-half": Claim(CRITIC, "also with lambda .5", "accuracy", "critic_0.5", "flow_grpo"),
    "critic-none": Claim(CRITIC, "also with lambda 0", "accuracy", "critic_0", "flow_grpo"),
    "srpo-control": Claim(SRPO, "(its words in a prompt cost nothing)", "accuracy", "prompted", BASE, -0.03),
    "srpo-moves": Claim(SRPO, "moves its target", "preference", "srpo", BASE),
    "srpo-keeps": Claim(SRPO, "and keeps accuracy", "accuracy", "srpo", BASE, -0.03),
    "srpo-prompted": Claim(
        SRPO, "costs what the words cost in a prompt", "accuracy at equal preference", "srpo", "prompted", -0.03
    ),
    "srpo-paid": Claim(SRPO, "outruns a policy gradient at equal images", "preference", "srpo", "paid"),
    "srpo-words": Claim(SRPO, "its words move it, not the reward alone", "preference", "srpo", "direct_align"),
    "srpo-refl": Claim(SRPO, "and not ReFL either", "preference", "srpo", "refl"),
    "srpo-late": Claim(SRPO, "clean levels hack the reward", "accuracy at equal preference", "srpo", "srpo_late"),
    "srpo-all": Claim(SRPO, "and so do all together", "accuracy at equal preference", "srpo", "srpo_all"),
}


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of differences [S seeds, P prompts] and its two-sided 95 % interval.

    Both factors are random, so the variance of the mean is (MS seeds + MS prompts - MS rest) / (S P), with
    Satterthwaite's degrees of freedom, but no fewer than the smaller factor's own. Where one factor alone gives more,
    that counts. With a single seed the interval is over prompts alone, and with a single value a seed over seeds alone.
    """
    d = np.asarray(differences, dtype=np.float64)
    mean, free = d.mean(), np.array(d.shape) - 1
    by_seed, by_prompt = d.mean(1, keepdims=True) - mean, d.mean(0, keepdims=True) - mean
    sums = (by_seed**2).sum() * d.shape[1], (by_prompt**2).sum() * d.shape[0]
    squares = [(total / degrees, degrees) for total, degrees in zip(sums, free, strict=True) if degrees]
    if not squares:
        return float(mean), -np.inf, np.inf
    if len(squares) == 2:
        rest = ((d - mean - by_seed - by_prompt) ** 2).sum() / free.prod()
        terms = [*squares, (-rest, free.prod())]
        total, spread = sum(square for square, _ in terms), sum(square**2 / degrees for square, degrees in terms)
        squares.append((total, max(total**2 / spread, free.min()) if spread else free.sum()))
    variance, degrees = max(squares)
    half = stats.t.ppf(0.975, degrees) * np.sqrt(variance / d.size)
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


@dataclass(frozen=True)
class Found:
    """Holds what the rows say of a claim: values [S, P] of both arms for the seeds that both have, and the verdict."""

    more: np.ndarray
    less: np.ndarray
    verdict: str
    mean: float = 0.0
    low: float = 0.0
    high: float = 0.0


def judge(claim: Claim, rows: list[dict]) -> Found:
    """Return what the rows say of a claim."""
    arms = [of_arm(rows, claim.more), of_arm(rows, claim.less)]
    for place, name in enumerate((claim.more, claim.less)):
        if name == BASE:
            arms[place] = {seed: untrained(row) for seed, row in arms[1 - place].items()}
    pairs = [METRICS[claim.metric](arms[0][seed], arms[1][seed]) for seed in sorted(arms[0].keys() & arms[1].keys())]
    if not pairs:
        return Found(np.empty((0, 0)), np.empty((0, 0)), "not run")
    more, less = (np.array(side) for side in zip(*pairs, strict=True))
    mean, low, high = interval(more - less)
    done = len(pairs) >= len(claim.seeds)
    return Found(more, less, verdict(low, high, claim.bound) if done else "not run", mean, low, high)


def table(paper: str, rows: list[dict]) -> str:
    """Return the claims of one paper as Markdown."""
    lines = [
        "| claim | what it says | measured | arms | seeds | means | difference, 95 % interval | verdict | images |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, claim in CLAIMS.items():
        if claim.paper != paper:
            continue
        found, wanted = judge(claim, rows), len(claim.seeds)
        runs = [row for row in rows if (row["arm"], row["seed"]) in claim.runs(range(99))]
        cells = [f"0 of {wanted}", "", "", "not run", ""]
        if count := len(found.more):
            cells = [
                str(count) if count >= wanted else f"{count} of {wanted}",
                f"{found.more.mean():.3f}, {found.less.mean():.3f}",
                f"{found.mean:+.3f}" + f" [{found.low:+.3f}, {found.high:+.3f}]" * bool(np.isfinite(found.low)),
                found.verdict + ", of one seed" * (count == wanted == 1),
                f"{sum(row['images'] for row in runs):,}",
            ]
        arms = f"{claim.more}, {claim.less}" + f", above {claim.bound:g}" * bool(claim.bound)
        lines.append(f"| `{name}` | {claim.says} | {claim.metric} | {arms} | {' | '.join(cells)} |")
    return "\n".join(lines)


def short_table(rows: list[dict]) -> str:
    """Return one line a paper: its claims by verdict, and those that are decided."""
    lines = ["| paper | claims | decided |", "|---|---|---|"]
    for paper in PAPERS:
        found = {claim.says: judge(claim, rows) for claim in CLAIMS.values() if claim.paper == paper}
        counts = Counter(one.verdict for one in found.values())
        counted = ", ".join(
            f"{counts[name]} {name}" for name in ("shown", "not shown", "refuted", "not run") if counts[name]
        )
        decided = [f"{says}: {one.verdict}" for says, one in found.items() if one.verdict in ("shown", "refuted")]
        lines.append(f"| {paper} | {counted} | {'; '.join(decided) or '-'} |")
    return "\n".join(lines)


def documents(rows: list[dict]) -> dict[Path, dict[str, str]]:
    """Return the tables of each README, by name."""
    detailed = {f"papers: {paper}": table(paper, rows) for paper in PAPERS}
    return {ROOT / "benchmarks" / "README.md": detailed, ROOT / "README.md": {"papers": short_table(rows)}}


def write(file: Path, tables: dict[str, str]) -> None:
    """Put each table between the markers of its name in a Markdown file."""
    text = file.read_text()
    for name, lines in tables.items():
        text, count = re.subn(
            rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)",
            lambda m, lines=lines: f"{m[1]}{lines}\n{m[2]}",
            text,
            flags=re.S,
        )
        assert count == 1, f"{file} has {count} places for the table {name!r}"
    file.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["list", "run", "table"])
    parser.add_argument("--claims", nargs="+", choices=list(CLAIMS), default=list(CLAIMS))
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of each claim")
    args = parser.parse_args()
    if args.command == "table":
        for file, tables in documents(read(ROWS)).items():
            write(file, tables)
    listed: set[tuple[str, int]] = set()
    for name in args.claims if args.command != "table" else ():
        for arm, seed in CLAIMS[name].runs(tuple(args.seeds or CLAIMS[name].seeds)):
            if seed in of_arm(read(ROWS), arm) or (arm, seed) in listed:
                continue
            if args.command == "run":
                add(ROWS, run(arm, seed))
            else:
                images, minutes = expected(arm)
                print(f"{name}: {arm}, seed {seed}: {images:,} images, about {minutes:.0f} minutes of two quiet cores")
                listed.add((arm, seed))


if __name__ == "__main__":
    main()
