"""LoRA files and evaluation without Ray, on the embedded pipeline."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from align_cluster.backbones.lora_file import read_lora
from align_cluster.backbones.sd3 import SD3
from align_cluster.config.load import load
from align_cluster.errors import UserError
from align_cluster.evaluate.local import LocalModel, evaluate
from align_cluster.evaluate.lora import find_lora
from align_cluster.observe.table import rows
from align_cluster.types import Prompt, Scores

from ..drawing import chunk_of

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def test_a_lora_file_is_read_with_its_rank_and_scale_whatever_the_config_says(lora):
    file, state = lora
    read = read_lora(file)
    assert (read.rank, read.alpha) == (4, 4)
    scaled = {name: value * (8 / 4 if ".lora_B." in name else 1) for name, value in state.items()}
    assert read.state.keys() == state.keys() and all(np.array_equal(read.state[k], scaled[k]) for k in state)
    model = LocalModel(load(QUICKSTART), read_lora(file))
    model.bind()
    assert model.sampler.backbone.config.lora.rank == 4 and model.sampler.version == 1


def test_a_run_folder_a_lora_folder_and_a_file_mean_the_same(lora):
    file, _ = lora
    assert find_lora(file) == find_lora(file.parent) == find_lora(file.parent.parent) == file


def test_what_is_no_lora_is_refused(tmp_path, lora):
    with pytest.raises(UserError, match="holds no LoRA"):
        find_lora(tmp_path)
    (tmp_path / "text.safetensors").write_text("hello, this is no tensor file")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        read_lora(tmp_path / "text.safetensors")
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no LoRA of a denoiser"):
        read_lora(tmp_path / "model.safetensors")
    halves = {f"transformer.x.lora_{half}.weight": torch.zeros(3, 2) for half in "AB"}  # of ranks 3 and 2
    save_file(halves, tmp_path / "mixed.safetensors")
    with pytest.raises(UserError, match="no pair of matrices"):
        read_lora(tmp_path / "mixed.safetensors")


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_a_lora_is_read_in_any_type_of_float(tmp_path, lora, dtype):
    held = {name: value.to(dtype) for name, value in load_file(lora[0]).items()}
    save_file(held, tmp_path / "other.safetensors")
    read = read_lora(tmp_path / "other.safetensors")
    assert (read.rank, read.alpha) == (4, 4)
    for name, value in held.items():
        found = read.state[name.removeprefix("transformer.")]
        assert found.dtype == np.float32 and np.array_equal(found, value.float().numpy())


def about(**told) -> dict[str, str]:
    """Metadata as diffusers writes it."""
    return {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in told.items()})}


def filled(value, dtype=torch.float32):
    """Tensors of one layer of rank 2."""
    shapes = {"A": (2, 3), "B": (3, 2)}
    full = {half: torch.full(shape, value, dtype=dtype) for half, shape in shapes.items()}
    return {f"transformer.x.lora_{half}.weight": tensor for half, tensor in full.items()}


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        (filled(float("nan")), {}, "holds NaN or infinity"),
        (filled(1.0) | {"transformer.x.lora_B.weight": torch.full((3, 2), float("-inf"))}, {}, "holds NaN or infinity"),
        (filled(1e300, torch.float64), {}, "holds NaN or infinity"),
        (filled(1, torch.int8), {}, "is I8, and a LoRA's weights are floats"),
        (filled(1, torch.uint8), {}, "is U8, and a LoRA's weights are floats"),
        (filled(True, torch.bool), {}, "is BOOL, and a LoRA's weights are floats"),
        ({"transformer.x.lora_A.weight": torch.zeros(0, 3)}, {}, "no pair of matrices"),
        ({"transformer.x.lora_A.weight": torch.zeros(3)}, {}, "no pair of matrices"),
        ({"transformer.x.lora_A.weight": torch.tensor(1.0)}, {}, "no pair of matrices"),
        (filled(1.0), {"lora_adapter_metadata": "{"}, "lora_adapter_metadata is no JSON"),
        (filled(1.0), {"lora_adapter_metadata": "[" * 100_000}, "lora_adapter_metadata is no JSON"),
        (filled(1.0), {"lora_adapter_metadata": '{"a":' * 500 + "1" + "}" * 500}, "nested more than"),
        (filled(1.0), {"lora_adapter_metadata": "[]"}, "no number for lora_alpha"),
        *((filled(1.0), about(lora_alpha=alpha), "no number for lora_alpha") for alpha in ("8", None, [8], {}, True)),
        *((filled(1.0), about(lora_alpha=alpha), "lora_alpha is") for alpha in (0, -1, 1e300)),
        (filled(1.0), about(lora_alpha=10**400), "more than a whole number of 64 bits"),
        (filled(1.0), about(lora_alpha=float("nan")), "lora_adapter_metadata is no JSON"),
        (filled(1.0), about(alpha_pattern={"x": 3}), "has a scale for each layer"),
        (filled(1.0), about(use_dora=True), "has a scale for each layer"),
    ],
)
def test_a_lora_that_would_draw_nonsense_is_refused_in_one_sentence(tmp_path, tensors, metadata, said):
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(UserError, match=said) as caught:
        read_lora(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


def test_a_rank_stabilised_lora_has_the_scale_that_peft_gives_it(tmp_path):
    save_file(filled(1.0), tmp_path / "x.safetensors", about(lora_alpha=6, use_rslora=True))
    read = read_lora(tmp_path / "x.safetensors")
    layer = peft.tuners.lora.Linear(
        torch.nn.Linear(3, 3), "x", r=2, lora_alpha=6, config=peft.LoraConfig(use_rslora=True)
    )
    assert read.alpha / read.rank == pytest.approx(layer.scaling["x"]) == pytest.approx(6 / 2**0.5)


def rewritten(path, file, change):
    """A copy at `path` of a LoRA file whose tensors went through `change`."""
    save_file(change(load_file(file)), path)
    return path


def test_a_lora_of_another_base_is_refused_before_weights_are_read(tmp_path, lora, monkeypatch):
    monkeypatch.setattr(SD3, "load_denoiser", None)
    changes = {
        "it has nothing for": lambda held: {name: held[name] for name in held if ".attn.to_q." not in name},
        "its x.lora_A.weight belongs": lambda held: held | filled(1.0),
        "it is one of a unet": lambda held: {name.replace("transformer.", "unet.", 1): held[name] for name in held},
        "its transformer_blocks.0.attn.to_q.lora_A.weight is 4 x 96, and that base's is 4 x 128": lambda held: (
            held
            | {name: value[:, :96].contiguous() for name, value in held.items() if name.endswith("to_q.lora_A.weight")}
        ),
    }
    for words, change in changes.items():
        file = rewritten(tmp_path / "other.safetensors", lora[0], change)
        with pytest.raises(UserError, match="does not fit embedded") as caught:
            LocalModel(load(QUICKSTART), read_lora(file))
        assert words in str(caught.value) and str(caught.value).count("\n") == 0


def test_evaluation_scores_every_task_and_repeats_exactly(lora):
    small = ["evaluate.count=6", "evaluate.images_per_prompt=2", "evaluate.steps=2", "evaluate.grid_prompts=1"]
    config = load(QUICKSTART, small)
    scores = evaluate(config)
    assert scores["count"] == 12 and scores["prompts"] == 6 and scores["failures"] == {}
    assert set(scores["tasks"]) == set(config.evaluate.prompts.tasks)
    assert {"reward/geneval", "reward/geneval/accuracy", "reward/clip"} <= set(scores["overall"])
    assert evaluate(config) == scores
    assert evaluate(config, read_lora(lora[0]))["overall"]["reward/clip"] != scores["overall"]["reward/clip"]
    apart = evaluate(load(QUICKSTART, [*small, "rollout.chunk=2"]))  # images of one prompt at once, not of six
    for column, value in scores["overall"].items():
        assert apart["overall"][column] == pytest.approx(value, abs=0.01), column


def test_an_image_that_is_not_finite_has_no_score_and_says_so():
    model = LocalModel(load(QUICKSTART), steps=2)
    chunk = chunk_of(Prompt(0, "a photo of a red circle"), (1, 2))
    (spoilt,) = model.sampler.encode([chunk.texts[0]])
    model.conditions[chunk.texts[0]] = replace(spoilt, pooled=np.full_like(spoilt.pooled, np.nan))
    (drawn,) = model.draw([chunk], "drawing")
    assert not drawn.images.any() and drawn.facts == [{"seed": seed, "non_finite": True} for seed in (1, 2)]
    assert all(value is None for row in drawn.rows for name, value in row.items() if "/" in name)


def test_rows_leave_out_what_failed():
    values = {"a": np.array([0.5, 0.25]), "b": np.array([1.0, np.nan])}
    valid = {"a": np.array([True, False]), "b": np.array([True, True])}
    scores = Scores(values, valid, details={"a/part": np.array([np.nan, 2.0])})
    first, second = rows([Prompt(7, "x", {"tag": "colors"}), Prompt(8, "y", {"tag": "ocr"})], scores)
    assert first == {"task": "colors", "prompt_id": 7, "reward/a": 0.5, "reward/b": 1.0, "reward/a/part": None}
    assert second == {"task": "ocr", "prompt_id": 8, "reward/a": None, "reward/b": None, "reward/a/part": 2.0}
