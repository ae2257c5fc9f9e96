"""The model card of an exported result: README.md as the Hugging Face hub reads it, with its pictures beside it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from align_cluster.backbones.pipeline import PipelineBackbone
from align_cluster.config.load import dump
from align_cluster.config.run import RunConfig
from align_cluster.evaluate.result import Result
from align_cluster.files import write_text
from align_cluster.observe.charts import STAGES, Series, line_chart, smoothing
from align_cluster.observe.rundata import RunData
from align_cluster.observe.table import compare, short

CARD = """---
{front}---

# {name}

{intro}

{samples}
{scores}
## Use

```python
{code}
```
{note}
## Training

{training}

<details><summary>Every setting</summary>

```yaml
{config}
```

</details>

## Licence

{licence}
"""
COMFYUI = """
In ComfyUI, put `{name}_comfyui.safetensors` into `models/loras` and load it with strength 1: its weights hold the
LoRA's scale already.
"""


def write_card(folder: Path, title: str, form: str, result: "Result") -> None:
    """Write README.md about what `folder` holds, with before.png, after.png and reward.svg where the run has them.

    `title` is what the folder will be called.
    """
    run, config, backbone = result.run, result.config, result.backbone
    licence = base_licence(backbone)
    text = CARD.format(
        front=yaml.safe_dump(front_matter(form, config, licence), sort_keys=False),
        name=run.name,
        intro=f"{_what(form, result)}, aligned with `{config.algorithm.kind}` by align-cluster.",
        samples=_samples(folder, run),
        scores=_scores(run),
        code=code(form, title, result),
        note=COMFYUI.format(name=run.name) if form == "lora" else "",
        training=_training(folder, run, config),
        config=dump(config).strip(),
        licence=_licence_note(config, licence),
    )
    write_text(folder / "README.md", text)


def hub_id(path: str) -> str | None:
    """A backbone's path where it names a model of the hub, None for a folder."""
    return path if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists() else None


def front_matter(form: str, config: RunConfig, licence: dict[str, str]) -> dict[str, Any]:
    """The hub's metadata. A base that is a local folder is not named there: the hub knows ids alone."""
    base = hub_id(config.backbone.path)
    relation = "adapter" if form == "lora" else "finetune"
    return {
        **({"base_model": base, "base_model_relation": relation} if base else {}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        **licence,
        "tags": ["text-to-image", "diffusers", *["lora"] * (form == "lora"), "align-cluster", config.algorithm.kind],
    }


def base_licence(backbone: PipelineBackbone) -> dict[str, str]:
    """The base model's licence as its own card names it, else `other`."""
    if backbone.config.path == "embedded":
        return {"license": "apache-2.0"}
    card = Path(backbone.source) / "README.md"
    front = re.match(r"---\n(.*?)\n---\n", card.read_text("utf-8", "replace"), re.DOTALL) if card.is_file() else None
    try:
        known = yaml.safe_load(front[1]) if front else {}
    except yaml.YAMLError:
        known = {}
    named = {key: str(known[key]) for key in ("license", "license_name", "license_link") if key in known}
    return named if "license" in named else {"license": "other", "license_name": "as-the-base-model"}


def _licence_note(config: RunConfig, licence: dict[str, str]) -> str:
    base = f"`{config.backbone.path}`"
    if licence["license"] == "other" and "license_link" not in licence:
        return f"These weights derive from {base}, whose licence holds for them too; name it above first."
    return f"These weights derive from {base} and are under its licence: {', '.join(licence.values())}."


def _what(form: str, result: "Result") -> str:
    base, lora = f"`{result.config.backbone.path}`", result.lora
    size = f"rank {lora.rank}, alpha {lora.alpha:g}"
    if form == "lora":
        return f"A LoRA ({size}) for {base}"
    kind = result.backbone.network if form == "merged" else result.backbone.index["_class_name"]
    return f"A `{kind}`: {base} with a LoRA ({size}) merged in"


def code(form: str, title: str, result: "Result") -> str:
    """Python that draws one image in stock diffusers with the settings of the run's evaluation."""
    config, backbone = result.config, result.backbone
    steps = config.evaluate.steps or config.rollout.steps
    arguments = {"num_inference_steps": steps} | backbone.call(config.evaluate.guidance)
    classes = ["DiffusionPipeline", *["DDIMScheduler"] * (not backbone.flow), *[backbone.network] * (form == "merged")]
    given = [_literal(backbone.source) if form != "diffusers" else "folder"]
    given += [f"{name}=None" for name in backbone.texts if name in backbone.text_parts()]
    lines = [
        "import torch",
        f"from diffusers import {', '.join(sorted(classes))}",
        "",
        f"folder = {_literal(title)}  # this one, or its id on the hub",
    ]
    if form == "merged":
        lines.append(f"{backbone.part} = {backbone.network}.from_pretrained(folder, dtype=torch.bfloat16)")
        given.append(f"{backbone.part}={backbone.part}")
    lines.append(f"pipe = DiffusionPipeline.from_pretrained({', '.join(given)}, dtype=torch.bfloat16)")
    if form == "lora":
        lines.append("pipe.load_lora_weights(folder)")
    if not backbone.flow:
        lines.append("pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)")
    lines += [
        'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
        "image = pipe(",
        f"    {_literal((result.run.grid_prompts or ['a photo of a red circle'])[0])},",
        *(f"    {name}={_literal(value)}," for name, value in arguments.items()),
        "    generator=torch.Generator().manual_seed(0),",
        ").images[0]",
    ]
    return "\n".join(lines)


def _literal(value: str | float) -> str:
    """A text or number as Python, with double quotes."""
    return json.dumps(value, ensure_ascii=False)


def _samples(folder: Path, run: RunData) -> str:
    """The first and the last grid of the run, side by side."""
    if len(run.grids) < 2:
        return ""
    for (_, grid), name in ((run.grids[0], "before.png"), (run.grids[-1], "after.png")):
        shutil.copy(grid, folder / name)
    prompts = "\n".join(f"- {' '.join(prompt.split())}" for prompt in run.grid_prompts)
    return (
        "| base model | aligned |\n|---|---|\n| ![before](before.png) | ![after](after.png) |\n\n"
        f"Same prompts, same noise, row by row:\n\n{prompts}\n"
    )


def _scores(run: RunData) -> str:
    """Held-out scores before and after: each column overall, and the headline by task."""
    if not run.headline:
        return ""
    cells = compare(run.before, run.after)
    lines = [_row(short(column), cell) for column, cell in cells["overall"].items()]
    tasks = {task: row[run.headline] for task, row in cells["tasks"].items() if run.headline in row}
    lines += [_row(f"{short(run.headline)}, {task}", cell) for task, cell in tasks.items() if len(tasks) > 1]
    count, prompts = (run.before.get(key, "?") for key in ("count", "prompts"))
    return (
        f"## Scores\n\nHeld-out: {count} images of {prompts} prompts a side, the same noise for both; a score without "
        "a task is the mean of its task means.\n\n| score | base model | aligned | change |\n|---|---:|---:|---:|\n"
        + "\n".join(lines)
        + "\n"
    )


def _row(name: str, cell: dict[str, float | None]) -> str:
    before, after = ("–" if cell[side] is None else f"{cell[side]:.3f}" for side in ("before", "after"))
    change = "–" if cell["change"] is None else f"{cell['change']:+.3f}"
    return f"| {name.replace('|', '/')} | {before} | {after} | {change} |"


def _training(folder: Path, run: RunData, config: RunConfig) -> str:
    trained = config.trained
    monitored = [name for name in config.rewards if name not in trained]
    facts = {
        "rewards trained on": ", ".join(trained),
        "only monitored": ", ".join(monitored),
        "steps": f"{config.steps} of {config.prompts_per_step} prompts x {config.group_members} images",
        "seed": str(config.seed),
        "config hash": f"`{run.summary['config_hash']}`",
        "versions": ", ".join(f"{name} {text}" for name, text in run.summary.get("versions", {}).items()),
    }
    listed = "\n".join(f"- {name}: {text}" for name, text in facts.items() if text)
    picture = "![Reward over the steps](reward.svg)\n\n" if _curves(folder / "reward.svg", run, trained) else ""
    return picture + listed


def _curves(path: Path, run: RunData, rewards: list[str]) -> bool:
    """Draw the mean rewards of the training images over the steps; whether there are any."""
    points = {name: run.points(f"reward/{name}/mean") for name in rewards}
    if not any(y is not None for one in points.values() for _, y in one):
        return False
    colours = ["accent", *(f"stage-{index % STAGES}" for index in range(1, len(points)))]
    series = [Series(name, one, colour) for (name, one), colour in zip(points.items(), colours, strict=True)]
    write_text(path, line_chart(series, (760, 260), smoothing(len(run.rows)), y_label="reward"))
    return True
