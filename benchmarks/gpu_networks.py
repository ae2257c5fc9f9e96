"""Networks of published shapes with random weights, made where they are used: nothing is downloaded, nothing passes
through the CPU. And the work that a sampler and a learner get in gpu.py.

A pipeline is a folder with the settings of its parts and no weights. `random_weights` makes the loading functions of
diffusers and transformers build a part from such settings, so that the product's own classes load it as ever.
"""

import functools
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from align_cluster.backbones.adapters import adapter_parameters
from align_cluster.backbones.pipeline import PipelineBackbone
from align_cluster.config.load import load
from align_cluster.config.run import RunConfig
from align_cluster.embedded import pipeline_path
from align_cluster.learner.batching import StepWork, TrainingChunk, make_micro_batches, rank_work
from align_cluster.learner.worker import Learner
from align_cluster.planner.meta_backbone import PUBLISHED
from align_cluster.prompts.geneval import CLASSES
from align_cluster.rollouts.sampler import DrawRequest, Sampler
from align_cluster.types import Chunk, Condition, Manifest, Prompt, Record, Row
from align_cluster.weights import publish

ROOT = Path(__file__).parents[1]
MODELS = {
    "sd35": "stabilityai/stable-diffusion-3.5-medium",
    "flux": "black-forest-labs/FLUX.1-dev",
}
# What --tiny changes of a network's shape, by model and part.
VAE = {"block_out_channels": [8, 8, 8, 16], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
SMALL = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 40}
TINY = {
    "sd35": {
        "transformer": SMALL
        | {"in_channels": 4, "out_channels": 4, "caption_projection_dim": 32, "pooled_projection_dim": 32}
        | {"pos_embed_max_size": 16, "dual_attention_layers": [0]},
        "vae": VAE,
    },
    "flux": {
        "transformer": SMALL
        | {"in_channels": 16, "num_single_layers": 2, "pooled_projection_dim": 12}
        # FLUX's heads have 128 channels, which its three axes share.
        | {"axes_dims_rope": [4, 6, 6]},
        "vae": VAE,
    },
}
TINY_RUN = ("backbone.height=64", "backbone.width=64", "backbone.lora.rank=4", "rollout.steps=2")
SEED = 0


def write_pipeline(model: str, folder: Path, tiny: bool) -> Path:
    """Write the settings of a published pipeline as diffusers lays them out, without weights."""
    parts = json.loads(PUBLISHED[MODELS[model]].read_text())
    for part, settings in parts.items():
        changes = TINY[model].get(part, {}) if tiny else {}
        if part == "model_index.json":
            path = folder / part
        else:
            path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings | changes))
    return folder


def config_of(file: str, folder: Path, tiny: bool, *overrides: str) -> RunConfig:
    """Return a run file's settings on such a pipeline. Text encoders play no part in these figures."""
    given = [f"backbone.path={folder}", "backbone.text=free", *(TINY_RUN if tiny else ()), *overrides]
    return load(ROOT / "configs" / f"{file}.yaml", given)


@contextmanager
def random_weights(device: str) -> Iterator[None]:
    """Build what is loaded inside from its settings, on the device, with seeded random weights."""
    import diffusers
    import transformers

    def of_diffusers(cls: Any, source: str, *, subfolder: str, dtype: torch.dtype, **_: Any) -> torch.nn.Module:
        settings = cls.load_config(source, subfolder=subfolder)
        return _made(lambda: cls.from_config(settings), device, dtype)

    def of_transformers(cls: Any, source: str, *, dtype: torch.dtype, **options: Any) -> Any:
        settings = cls.config_class.from_pretrained(source)
        model = _made(lambda: cls(settings), device, dtype)
        return (model, {"missing_keys": set()}) if options.get("output_loading_info") else model

    with ExitStack() as stack:
        for base, made in ((diffusers.ModelMixin, of_diffusers), (transformers.PreTrainedModel, of_transformers)):
            stack.enter_context(mock.patch.object(base, "from_pretrained", classmethod(made)))
        yield


def _made(build: Any, device: str, dtype: torch.dtype) -> torch.nn.Module:
    before = torch.get_default_dtype()
    torch.manual_seed(SEED)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return torch.nn.Module.to(build(), dtype)  # diffusers' own `to` warns
    finally:
        torch.set_default_dtype(before)


def discard(module: torch.nn.Module) -> None:
    """Free a network's tensors, whoever still refers to it: DeepSpeed keeps its engines."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.new_empty(0)


def condition(backbone: PipelineBackbone, seed: int) -> Condition:
    """Return a random encoding of the longest prompt's shape."""
    return _encoding(backbone.text_shape, seed)


@functools.lru_cache(maxsize=64)  # made once, since draws are timed
def _encoding(shape: tuple[int, int, int], seed: int) -> Condition:
    tokens, width, pooled = shape
    rng = np.random.default_rng(seed)
    return Condition(str(seed), *(rng.standard_normal(size, dtype=np.float32) for size in ((tokens, width), pooled)))


def make_chunk(rows: int) -> Chunk:
    """Return a chunk of so many images, four of a prompt."""
    return Chunk(0, 0, tuple(Row(Prompt(n // 4, f"a photo of {n // 4} benches"), n // 4, n, n, n) for n in range(rows)))


def conditions(backbone: PipelineBackbone, chunk: Chunk) -> dict[str, Condition]:
    """Return a random encoding of each of a chunk's texts."""
    return {text: condition(backbone, 2 + number) for number, text in enumerate(chunk.texts)}


def draw(sampler: Sampler, config: RunConfig, rows: int, steps: int | None = None) -> tuple[np.ndarray, Record]:
    """Draw `rows` images as a training rollout of `config` does; return the images and the record."""
    steps = steps or config.rollout.steps
    request = DrawRequest(
        sampler.version,
        steps,
        config.step_kind,
        guidance=config.rollout.guidance,
        window=config.window.plan(steps, 0, 0) if config.window else None,
        schedule=config.rollout.schedule,
        distilled_guidance=config.rollout.distilled_guidance,
    )
    null = condition(sampler.backbone, 1) if config.rollout.guidance > 1 else None
    chunk = make_chunk(rows)
    _, images, record = sampler.draw(chunk, conditions(sampler.backbone, chunk), null, request)
    return images, record


def learner_work(learner: Learner, config: RunConfig, records: list[Record]) -> StepWork:
    """Return one update on these records, with advantages of both signs."""
    sizes = [len(record.x0) for record in records]
    micro_batches = make_micro_batches(
        [np.linspace(-1, 1, size, dtype=np.float32) for size in sizes],
        [np.ones(size, bool) for size in sizes],
        bounds=[0, sum(sizes)],
        size=config.learner.micro_batch,
    )
    null = condition(learner.backbone, 1) if config.rollout.guidance > 1 else None
    chunks = [TrainingChunk(record, conditions(learner.backbone, record.chunk)) for record in records]
    return rank_work(0, micro_batches, chunks, null=null)


def made_up_record(learner: Learner, config: RunConfig, rows: int, levels: int) -> Record:
    """Return a record that no sampler drew, with `levels` recorded steps where the algorithm reads any."""
    rng, steps = np.random.default_rng(0), config.rollout.steps
    x0 = rng.standard_normal((rows, *learner.backbone.latent_shape), dtype=np.float32)
    path: dict[str, np.ndarray] = {"indices": np.empty((rows, 0), np.int64)}
    if learner.algorithm.needs_density:
        states = np.repeat(x0[:, None], levels, 1)
        path = {"indices": np.tile(np.arange(levels), (rows, 1)), "before": states, "after": states}
        path["log_probs"] = np.zeros((rows, levels), np.float32)
    return Record(make_chunk(rows), 0, x0, learner.backbone.sigmas(steps), **path)


def random_adapter(sampler: Sampler, version: int) -> tuple[Manifest, np.ndarray]:
    """Publish adapter weights that are far enough from 0 to change images."""
    rng = np.random.default_rng(version)
    shapes = {name: tuple(value.shape) for name, value in adapter_parameters(sampler.denoiser, "default").items()}
    state = {name: 0.1 * rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return publish(state, version)


# Sizes of published CLIPs; a test compares their numbers of weights with those that the planner knows.
CLIP_SIZES = {
    "clip-l": {
        "projection_dim": 768,
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
        | {"num_hidden_layers": 24, "patch_size": 14, "image_size": 224},
    },
    "pickscore": {
        "projection_dim": 1024,
        "text_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
        | {"num_hidden_layers": 24, "hidden_act": "gelu"},
        "vision_config": {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16}
        | {"num_hidden_layers": 32, "patch_size": 14, "image_size": 224, "hidden_act": "gelu"},
    },
}
FEW = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def write_clip(name: str, folder: Path, tiny: bool) -> Path:
    """Write the settings of a CLIPModel of transformers, with the embedded CLIP's tokenizer."""
    settings = json.loads(json.dumps(CLIP_SIZES[name])) | {"model_type": "clip"}
    if tiny:
        settings["text_config"] |= FEW
        settings["vision_config"] |= FEW
    folder.mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pipeline_path() / "clip" / file, folder)
    processor = json.loads((pipeline_path() / "clip" / "preprocessor_config.json").read_text())
    side = settings["vision_config"]["image_size"]
    processor |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def write_mask2former(folder: Path, tiny: bool) -> Path:
    """Write the settings of Mask2Former as facebook/mask2former-swin-small-coco-instance has them."""
    from transformers import Mask2FormerConfig, SwinConfig

    swin = {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
    sizes, edges = {}, {"shortest_edge": 800, "longest_edge": 1333}
    if tiny:
        swin = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
        sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_queries": 8, "encoder_layers": 1}
        sizes |= {"decoder_layers": 2, "num_attention_heads": 2, "encoder_feedforward_dim": 16, "dim_feedforward": 16}
        edges = {"shortest_edge": 64, "longest_edge": 96}
    stages = [f"stage{number}" for number in range(1, 5)]
    labels = dict(enumerate(CLASSES))
    backbone = SwinConfig(**swin, out_features=stages)
    Mask2FormerConfig(backbone_config=backbone, id2label=labels, **sizes).save_pretrained(folder)
    processor = {
        "image_processor_type": "Mask2FormerImageProcessor",
        **{"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, "resample": 2},
        **{"size": edges, "size_divisor": 32, "ignore_index": 255, "reduce_labels": False},
        **{"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@contextmanager
def random_hps(device: str) -> Iterator[None]:
    """Let HPS build its architecture on the device and keep that in place of a checkpoint."""
    import open_clip

    class Random(open_clip.CLIP):
        def __init__(self, **architecture: Any) -> None:
            torch.manual_seed(SEED)
            with torch.device(device):
                super().__init__(**architecture)

        def load_state_dict(self, *_: Any, **__: Any) -> None:
            """Keep the random weights."""

    empty = {"state_dict": {}}
    with mock.patch.object(open_clip, "CLIP", Random), mock.patch.object(torch, "load", lambda *_, **__: empty):
        yield


def hps_settings(folder: Path, tiny: bool) -> dict[str, str]:
    """Return the settings that `random_hps` needs: a file in the checkpoint's place, and the architecture."""
    checkpoint = folder / "random.pt"
    checkpoint.touch()
    if not tiny:
        return {"path": str(checkpoint)}
    small = {"width": 32, "layers": 2}
    architecture = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 28, "head_width": 16, "patch_size": 14, **small},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "heads": 2, **small},
    }
    model = folder / "hps.json"
    model.write_text(json.dumps(architecture))
    return {"path": str(checkpoint), "model": str(model)}
