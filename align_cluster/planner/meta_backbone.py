"""A run's backbone without its weights: the real classes on the meta device, built from their settings alone."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from align_cluster.backbones import BACKBONES
from align_cluster.backbones.attention import shorten_attention
from align_cluster.backbones.base import BackboneSection
from align_cluster.backbones.pipeline import PipelineBackbone

# Hub id -> file with the settings of the pipeline's parts. "--" in the file's name stands for the slash of the hub id.
PUBLISHED = {path.stem.replace("--", "/"): path for path in Path(__file__).with_name("published").glob("*.json")}


def meta_backbone(config: BackboneSection, device: str) -> PipelineBackbone:
    """Build the backbone of `config` in the precision that it has on `device`, cpu or cuda, on the meta device.

    Nothing is downloaded for pipelines in published/. A folder brings its own settings, and those of another hub id are
    read from this machine's cache or from the hub. UserError where they cannot be read.
    """
    half = config.precision == "bf16" and device == "cuda"

    class MetaBackbone(BACKBONES[config.kind]):
        dtype = torch.bfloat16 if half else torch.float32

        @cached_property
        def published(self) -> dict[str, Any] | None:
            path = PUBLISHED.get(self.config.path)
            return json.loads(path.read_text()) if path else None

        def read_config(self, cls: str, part: str | None = None) -> dict[str, Any]:
            return self.published[part or "model_index.json"] if self.published else super().read_config(cls, part)

        def load_denoiser(self) -> torch.nn.Module:
            return self._frozen(self.on_meta(self.network, self.part))

        @cached_property
        def _vae(self) -> torch.nn.Module:
            return self._frozen(self.on_meta(self.vae, "vae"))

        def _frozen(self, model: torch.nn.Module) -> torch.nn.Module:
            if device == "cpu":
                shorten_attention(model)
            return torch.nn.Module.to(model, self.dtype).eval().requires_grad_(False)  # diffusers' own `to` warns

    # Shapes do not depend on whether blocks are compiled, nor on the attention kernel.
    return MetaBackbone(config.model_copy(update={"compile": False, "attention": None}), "cpu")


def text_parameters(backbone: PipelineBackbone) -> dict[str, int]:
    """Return the numbers of parameters of the text encoders that a run loads, by name.

    Those of pipelines in published/ are known. Others are built on the meta device, which imports their classes.
    """
    encoders = [name for name in backbone.texts if name.startswith("text_encoder") and name not in backbone.unread]
    known = (backbone.published or {}).get("parameters", {})
    return {
        name: known.get(name) or built_parameters(backbone, name)
        for name in encoders
        if backbone.index.get(name, (None, None))[0]
    }


def built_parameters(backbone: PipelineBackbone, name: str) -> int:
    """Count the parameters of a text encoder that is built from its settings."""
    import transformers

    model = getattr(transformers, backbone.index[name][1])
    with torch.device("meta"):
        built = model(model.config_class.from_dict(backbone.part_config(backbone.network, name)))
    return sum(parameter.numel() for parameter in built.parameters())
