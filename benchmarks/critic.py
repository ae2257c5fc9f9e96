"""Does a critic on noisy latents help? Latent actor-critic PPO beside Flow-GRPO at equal drawn images, one reward
beside two, steering beside plain sampling, and what the critic costs; on the embedded model.

    python benchmarks/critic.py run                       # every row that is missing; stop and go on as you like
    python benchmarks/critic.py run --arms geneval --seeds 0
    python benchmarks/critic.py learn --data FOLDER       # what critics explain of stored rollouts, by number of images
    python benchmarks/critic.py cost                      # values on learners and on samplers; bytes of SD3.5-M
    python benchmarks/critic.py table                     # what there is, as Markdown
    python benchmarks/critic.py plot                      # results/critic_*.png; needs the extra benchmarks

An arm names the rewards that are trained: the strict 0/1 GenEval rule, the embedded CLIP's preference, or both.
Prompts, images, updates, learning rate and seeds are those of the rows of Flow-GRPO in results/learning.jsonl, up to
the 24th of their 48 steps. The critics of the runs on GenEval then steer held-out prompts. A row of
results/critic.jsonl is one run, and one of results/critic_explains.jsonl one critic that learned from stored rollouts.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import rows
from learning import COLUMNS, DOMAINS, GROUP, PROMPTS, RESULTS, train
from learning import ROWS as LEARNING

ROWS, COST, EXPLAINS = (RESULTS / name for name in ("critic.jsonl", "critic_cost.json", "critic_explains.jsonl"))
STEPS, EVERY, PROMPTS_STEERED, IMAGES_STEERED = 24, 12, 60, 2
ARMS = {"geneval": ("geneval",), "both": DOMAINS, "clip": ("clip",)}
STEERING_ARM = "geneval"
# name: (mode, its settings, denoising steps). Beside 10 steps of plain sampling, whose passes are the unit.
STEERED = {
    "plain": (None, [], 10),
    "plain, 40 steps": (None, [], 40),
    "best of 4 by reward": ("best_of_n", ["steer.n=4"], 10),
    "best of 4 by value, pruned at step 5": ("best_of_n", ["steer.n=4", "steer.prune_at=5"], 10),
    "best of 4 by value, pruned at step 9": ("best_of_n", ["steer.n=4", "steer.prune_at=9"], 10),
    "smc of 4": ("smc", ["steer.n=4", "steer.strength=4"], 10),
    "guidance": ("guidance", [], 10),
    "guided best of 4": ("guided_best_of_n", ["steer.n=4"], 10),
}


def overrides(arm: str, seed: int) -> list[str]:
    roles = [f"rewards.{name}.role={'train' if name in ARMS[arm] else 'monitor'}" for name in DOMAINS]
    return [
        *(f"steps={STEPS}", f"seed={seed}", f"prompts_per_step={PROMPTS}", f"rollout.group_size={GROUP}"),
        *("rewards.geneval.score=strict", *roles, "optimizer.lr=6e-4", "optimizer.schedule=constant"),
        *("algorithm.warm_up.updates=96", f"evaluate.every={EVERY}", "evaluate.grid_every=0"),
    ]


def run(arm: str, seed: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        found = train("embedded_critic", overrides(arm, seed), Path(folder))
        found["values"] = [
            {name: value for name, value in step.items() if name.startswith(("value/", "advantage/step"))}
            for step in rows.read(Path(folder) / "row" / "metrics.jsonl")
        ]
        if arm == STEERING_ARM:
            found["steered"] = {name: steer(Path(folder) / "row", name, seed) for name in STEERED}
    return {"arm": arm, "seed": seed, **found}


def steer(run_dir: Path, name: str, seed: int) -> dict:
    """Held-out prompts drawn with a run's LoRA and one mode: mean scores, and passes an image that is kept."""
    from align_cluster.backbones.lora_file import read_lora
    from align_cluster.config.load import load
    from align_cluster.evaluate.sample import SampleRequest, sample
    from align_cluster.evaluate.steer import SavedCritic, read_settings
    from align_cluster.prompts import PROMPTS as SOURCES
    from align_cluster.prompts.groups import spread

    config = load(run_dir / "config.yaml", ["cluster.threads=1"])
    prompts = spread(SOURCES["embedded"](config.evaluate.prompts).load(), PROMPTS_STEERED)
    mode, settings, steps = STEERED[name]
    steering = read_settings(mode, settings) if mode else None
    critic = SavedCritic.read(run_dir, config) if mode else None
    request = SampleRequest(
        prompts=prompts, count=IMAGES_STEERED, seed=seed, steps=steps, steer=steering, critic=critic
    )
    lora = read_lora(run_dir / "lora" / "pytorch_lora_weights.safetensors")
    found = sample(config, lora, request, run_dir / f"steered {name}")
    images = IMAGES_STEERED * len(prompts)
    spent = found["steer"]["compute"] if mode else {"actor": steps * images, "images": images}
    return {
        "means": found["means"]["steered" if mode else "aligned"],
        "spent": {kind: count / images for kind, count in spent.items()},
    }


def beside() -> list[dict]:
    """Rows of Flow-GRPO on the same data, as far as the runs here go."""
    return [row for row in rows.read(LEARNING) if row["method"] == "flow_grpo"]


def learned(row: dict, column: str) -> tuple[float, float]:
    """Held-out score before, and after STEPS steps."""
    scores = row["held_out"][column]
    return scores[0], scores[row["images"].index(STEPS * PROMPTS * GROUP)]


def table(kept: list[dict]) -> str:
    """Means over seeds; +- is half their range."""
    lines = ["| method | trained on | seeds | accuracy before -> after | clip before -> after | s/step |"]
    lines.append("|---|---|---|---|---|---|")
    arms = [("Flow-GRPO", domain, [row for row in beside() if row["domain"] == domain]) for domain in DOMAINS]
    arms += [("critic PPO", arm, [row for row in kept if row["arm"] == arm]) for arm in ARMS]
    for method, arm, group in arms:
        if not group:
            continue
        cells = []
        for column in ("accuracy", "clip"):
            before, after = np.array([learned(row, column) for row in group]).T
            cells.append(f"{before.mean():.3f} -> {after.mean():.3f} +- {np.ptp(after) / 2:.3f}")
        seconds = np.mean([row["steps"]["time/step"][:STEPS] for row in group])
        lines.append(f"| {method} | {arm} | {len(group)} | {' | '.join(cells)} | {seconds:.1f} |")
    return "\n".join(lines)


def steering_table(kept: list[dict]) -> str:
    """Means over the seeds' critics, and the passes for each image that is kept."""
    lines = ["| sampling | seeds | accuracy | clip | actor passes | critic passes (backward) | images decoded |"]
    lines.append("|---|---|---|---|---|---|---|")
    group = [row["steered"] for row in kept if row["arm"] == STEERING_ARM]
    for name in STEERED if group else ():
        means = {
            column: np.array([row[name]["means"][COLUMNS[column].removeprefix("reward/")] for row in group])
            for column in ("accuracy", "clip")
        }
        cells = [f"{found.mean():.3f} +- {np.ptp(found) / 2:.3f}" for found in means.values()]
        spent = group[0][name]["spent"]
        critic = f"{spent.get('critic', 0):.0f} ({spent.get('critic_backward', 0):.0f})"
        passes = f"{spent['actor']:.0f} | {critic} | {spent['images']:.0f}"
        lines.append(f"| {name} | {len(group)} | {' | '.join(cells)} | {passes} |")
    return "\n".join(lines)


def plot(kept: list[dict]) -> None:
    """Held-out scores against images, and what the critic explains by noise level."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = dict(zip(("Flow-GRPO", *ARMS), plt.cm.tab10.colors, strict=False))
    figure, axes = plt.subplots(1, 4, figsize=(19, 4.2), constrained_layout=True)
    for axis, domain, column in zip(axes, DOMAINS, ("accuracy", "clip"), strict=False):
        curves = [("Flow-GRPO", [row for row in beside() if row["domain"] == domain])]
        curves += [(arm, [row for row in kept if row["arm"] == arm]) for arm in (domain, "both")]
        for name, group in curves:
            if group:
                images = [n for n in group[0]["images"] if n <= STEPS * PROMPTS * GROUP]
                found = np.array([row["held_out"][column][: len(images)] for row in group])
                label = name if name == "Flow-GRPO" else f"critic PPO, {name}"
                axis.plot(images, found.mean(0), color=colors[name], label=f"{label} ({len(group)} seeds)")
                axis.fill_between(images, found.min(0), found.max(0), color=colors[name], alpha=0.15, lw=0)
        axis.set(title=f"held-out {column}, trained on {domain}", xlabel="images drawn")
        axis.legend(fontsize=8)
    for axis, reward in zip(axes[2:], DOMAINS, strict=True):
        group = [row for row in kept if row["arm"] == reward]
        prefix = f"value/{reward}/explained_variance/"
        for shade, bucket in enumerate(sorted({name for row in group for name in row["values"][-1] if prefix in name})):
            found = np.array([[step.get(bucket, np.nan) for step in row["values"]] for row in group], dtype=float)
            axis.plot(np.nanmean(found, 0), color=plt.cm.viridis(shade / 4), label=bucket.removeprefix(prefix))
        axis.set(title=f"explained variance of {reward}, by noise", xlabel="step", ylim=(-0.6, 1))
        axis.legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(RESULTS / "critic.png", dpi=110)
    plt.close(figure)


def study(folder: Path, jobs: list[str]) -> None:
    """Let the critics of `jobs` learn that have no row yet, each in turn, from images that are drawn where they are
    missing. The last row is what a state decides."""
    from critic_data import draw
    from critic_study import JOBS, decided, learn

    for name in jobs or JOBS:
        arm, images = name.rsplit(":", 1)
        if not any((row["arm"], row["images"]) == (arm, int(images)) for row in rows.read(EXPLAINS)):
            for line in draw(folder, int(images)):
                print(line, flush=True)
            rows.add(EXPLAINS, decided(folder) if arm == "decided" else learn(folder, arm, int(images)))


def explained_table(kept: list[dict]) -> str:
    """Explained variance of held-out prompts' rewards by noise level, after the last update of each critic."""
    if not kept:
        return ""
    heads = ["critic", "images", "updates", "below .5", *(f"{level:.2f}" for level in kept[0]["sigmas"])]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    arms = list(dict.fromkeys(row["arm"] for row in kept))
    for row in sorted(kept, key=lambda row: (arms.index(row["arm"]), row["images"])):
        last = row["curve"][-1]
        said = " | ".join(f"{share:.2f}" for share in (last["low"], *last["levels"]))
        lines.append(f"| {row['arm']} | {row['images']} | {row['updates']} | {said} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "learn", "cost", "table", "plot"])
    parser.add_argument("--data", type=Path, default=Path("runs/critic_rollouts"))
    parser.add_argument("--jobs", nargs="+", default=[], metavar="ARM:IMAGES")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    if args.command == "run":
        for seed in args.seeds:
            for arm in args.arms:
                if not any((row["arm"], row["seed"]) == (arm, seed) for row in rows.read(ROWS)):
                    rows.add(ROWS, run(arm, seed))
    elif args.command == "learn":
        study(args.data, args.jobs)
    elif args.command == "cost":
        from critic_cost import cost, cost_table

        COST.write_text(json.dumps(cost(), indent=1) + "\n")
        print(cost_table(json.loads(COST.read_text())))
        return
    elif args.command == "plot":
        plot(rows.read(ROWS))
    found = table(rows.read(ROWS)), steering_table(rows.read(ROWS)), explained_table(rows.read(EXPLAINS))
    print(*found, sep="\n\n")


if __name__ == "__main__":
    main()
