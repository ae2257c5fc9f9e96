"""A run's backbone without its weights: the real classes, built from their settings alone."""

from functools import cached_property
from typing import Any

import torch

from align_cluster.backbones import BACKBONES
from align_cluster.backbones.base import BackboneSection
from align_cluster.backbones.pipeline import PipelineBackbone
from align_cluster.planner.published import PIPELINES


def shell(config: BackboneSection, device: str) -> PipelineBackbone:
    """The backbone of `config` as it is on `device`, cpu or cuda, with parts on the meta device.

    Nothing is downloaded for pipelines in published.py; a folder's own settings are read, and those of another hub id
    where this machine has or reaches them. UserError where there are none.
    """
    half = config.precision == "bf16" and device == "cuda"

    class Shell(BACKBONES[config.kind]):
        dtype = torch.bfloat16 if half else torch.float32

        def read_config(self, cls: str, part: str | None = None) -> dict[str, Any]:
            known = PIPELINES.get(self.config.path)
            return known[part or "model_index.json"] if known else super().read_config(cls, part)

        def load_denoiser(self) -> torch.nn.Module:
            return self._frozen(self.hollow(self.network, self.part))

        @cached_property
        def _vae(self) -> torch.nn.Module:
            return self._frozen(self.hollow(self.vae, "vae"))

        def _frozen(self, model: torch.nn.Module) -> torch.nn.Module:
            return torch.nn.Module.to(model, self.dtype).eval().requires_grad_(False)  # diffusers' own `to` warns

    # Whether blocks are compiled, and by which kernel they attend, changes no shape.
    return Shell(config.model_copy(update={"compile": False, "attention": None}), "cpu")


def text_encoders(backbone: PipelineBackbone) -> dict[str, torch.nn.Module]:
    """The text encoders that a run loads, by name, on the meta device."""
    import transformers

    encoders = {}
    left_out = {name for name, part in backbone.text_parts().items() if part is None}
    for name in backbone.texts:
        library, cls = backbone.index.get(name) or (None, None)
        if not name.startswith("text_encoder") or name in left_out or library is None:
            continue
        model = getattr(transformers, cls)
        with torch.device("meta"):
            encoders[name] = model(model.config_class.from_dict(backbone.part_config(backbone.network, name)))
    return encoders
