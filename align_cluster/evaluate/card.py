"""The model card of an exported result: README.md as the Hugging Face hub reads it, with its pictures beside it."""

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from align_cluster.backbones.pipeline import PipelineBackbone
from align_cluster.config.load import dump
from align_cluster.config.run import RunConfig
from align_cluster.errors import UserError
from align_cluster.evaluate.result import Result
from align_cluster.files import write_text
from align_cluster.observe.charts import STAGES, Series, line_chart, smoothing
from align_cluster.observe.rundata import RunData
from align_cluster.observe.table import compare, short, within_noise
from align_cluster.plain import yaml_value
from align_cluster.settings import HUB_ID

ADAPTERS = ("lora", "peft")  # the forms that are added to the base
TEMPLATE = Path(__file__).with_name("card.md.j2")
# What the code of a card was tried with. torch and torchvision belong together: torchvision has compiled operators.
NEEDS = ("torch==2.13.0", "torchvision==0.28.0", "diffusers==0.42.1", "peft==0.21.2", "transformers==5.24.0")


def code(text: object) -> str:
    """Return foreign text as one line of Markdown code, in which neither Markdown nor HTML means anything."""
    line = " ".join("".join(char if char.isprintable() else " " for char in str(text)).split()).replace("|", "/")
    mark = fence(line, 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{mark}{pad}{line}{pad}{mark}" if line else "–"


def fence(text: str, least: int = 3) -> str:
    """Return a mark of backticks, `least` or more, that the text does not hold."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def literal(value: object) -> str:
    """Return Python for a value: text in double quotes, and in ASCII where it holds characters that do not show."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) and value.isprintable() else ascii(value)


FILTERS = {
    "number": lambda value: "–" if value is None else f"{value:.3f}",
    "change": lambda cell: (
        "–" if cell["change"] is None else f"{cell['change']:+.3f}{' within the noise' * bool(within_noise(cell))}"
    ),
    "literal": literal,
    "code": code,
    "fence": fence,
}


def write_card(result: Result, folder: Path, *, form: str, title: str, licence: dict[str, str]) -> None:
    """Write README.md about the `form` of a result in `folder`, which will be called `title` in the end.

    before.png, after.png and reward.svg stand beside it where the run has what they show. The code in it draws one
    image in stock diffusers with the settings of the run's evaluation.
    """
    run, config, backbone = result.run, result.config, result.backbone
    steps = config.evaluate.steps or config.rollout.steps
    parts = ["folder" if form == "diffusers" else "base"]
    parts += [f"{name}=None" for name in backbone.unread]
    classes = ["DDIMScheduler"] * (not backbone.flow) + ["DiffusionPipeline"]
    if form == "merged":
        classes.append(backbone.network)
        parts.append(f"{backbone.part}={backbone.part}")
    # The card is Markdown, in which HTML's escapes would be wrong.
    environment = Environment(trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined, autoescape=False)
    environment.filters |= FILTERS
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        run=run,
        config=config,
        backbone=backbone,
        form=form,
        first=_merged_first(config) if form in ADAPTERS else None,
        title=title,
        front=yaml.safe_dump(front_matter(form, config, licence), sort_keys=False),
        comfyui=comfyui_name(run.name),
        what=_what(result, form),
        grids=_copy_grids(folder, run),
        scores=_scores(run),
        classes=sorted(classes),
        parts=parts,
        arguments={"num_inference_steps": steps} | backbone.call(config.evaluate.guidance),
        curves=_curves(folder / "reward.svg", run, config.trained),
        training=_training(result),
        settings=dump(config).strip(),
        licence=licence,
        needs=" ".join(NEEDS),
    )
    write_text(folder / "README.md", text)


def comfyui_name(run: str) -> str:
    """Return the name of ComfyUI's file. A run's name comes out of a file, and may be no part of a path."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', run)}_comfyui.safetensors"


def front_matter(form: str, config: RunConfig, licence: dict[str, str]) -> dict[str, Any]:
    """Return the hub's metadata. A base that is a local folder is left out, because the hub knows ids alone."""
    base = config.backbone.path if re.fullmatch(HUB_ID, config.backbone.path) else None
    relation = "adapter" if form in ADAPTERS else "finetune"
    return {
        **({"base_model": base, "base_model_relation": relation} if base else {}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        **licence,
        "tags": ["text-to-image", "diffusers", *["lora"] * (form in ADAPTERS), "align-cluster", config.algorithm.kind],
    }


def licence_of(backbone: PipelineBackbone, given: str | None = None) -> dict[str, str]:
    """Return the hub's metadata of a licence: the `given` one, else the base's as its own card names it, or `other`."""
    other = {"license": "other", "license_name": "as-the-base-model"}
    if given:
        return other if given == "other" else {"license": given}
    if backbone.config.path == "embedded":
        return {"license": "apache-2.0"}
    card = Path(backbone.source) / "README.md"
    front = re.match(r"---\n(.*?)\n---\n", card.read_text("utf-8", "replace"), re.DOTALL) if card.is_file() else None
    known: Any = {}
    with suppress(UserError):  # a card that nobody can read names no licence
        known = yaml_value(front[1], str(card)) if front else {}
    named = {key: str(known[key]) for key in ("license", "license_name", "license_link") if key in (known or {})}
    return named if "license" in named else other


def _what(result: Result, form: str) -> str:
    """Say in a few words what was exported."""
    config, lora = result.config.backbone, result.lora
    base, size = code(config.path), f"rank {lora.rank}, trained with alpha {config.lora.alpha:g}"
    first = _merged_first(result.config)
    if form in ADAPTERS:
        return f"A LoRA ({size}) for {base}" + (f" with {code(first)} merged in" if first else "")
    kind = result.backbone.network if form == "merged" else result.backbone.index["_class_name"]
    return f"A {code(kind)}: {base} with {f'{code(first)} and ' if first else ''}a LoRA ({size}) merged in"


def _merged_first(config: RunConfig) -> str | None:
    """Return the path of the LoRA that was merged into the base before training, if there was one."""
    return config.backbone.lora.path if config.backbone.lora.merges else None


def _copy_grids(folder: Path, run: RunData) -> bool:
    """Copy the first and the last grid of the run as before.png and after.png; return whether there are two."""
    if len(run.grids) < 2:
        return False
    for (_, grid), name in ((run.grids[0], "before.png"), (run.grids[-1], "after.png")):
        shutil.copy(grid, folder / name)
    return True


def _scores(run: RunData) -> dict[str, dict[str, Any]]:
    """Return the held-out scores before and after: each column overall, and the headline by task."""
    if not run.headline:
        return {}
    cells = compare(run.before, run.after)
    tasks = {task: row[run.headline] for task, row in cells["tasks"].items() if run.headline in row}
    return {short(column): cell for column, cell in cells["overall"].items()} | {
        f"{short(run.headline)}, {task}": cell for task, cell in tasks.items() if len(tasks) > 1
    }


def _training(result: Result) -> dict[str, str]:
    """Return facts about the training by what they are called; those that are empty do not apply."""
    run, config = result.run, result.config
    return {
        "rewards trained on": ", ".join(map(code, config.trained)),
        "only monitored": ", ".join(code(name) for name in config.rewards if name not in config.trained),
        "steps": f"{result.steps} of {config.prompts_per_step} prompts x {config.group_members} images",
        "seed": str(config.seed),
        "config hash": code(run.summary["config_hash"]),
        "versions": ", ".join(code(f"{name} {text}") for name, text in run.summary.get("versions", {}).items()),
    }


def _curves(path: Path, run: RunData, rewards: list[str]) -> bool:
    """Draw the mean rewards of the training images over the steps; whether there are any."""
    points = {name: run.points(f"reward/{name}/mean") for name in rewards}
    if not any(y is not None for one in points.values() for _, y in one):
        return False
    colours = ["accent", *(f"stage-{index % STAGES}" for index in range(1, len(points)))]
    series = [Series(name, one, colour) for (name, one), colour in zip(points.items(), colours, strict=True)]
    write_text(path, line_chart(series, (760, 260), smoothing(len(run.rows)), y_label="reward"))
    return True
