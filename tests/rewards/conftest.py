"""Images, a cache of the hub, and tiny random detectors and a tiny CLIP on disk, in the layout of the published ones.

Their weights are larger than fresh ones, which say nearly the same of everything.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from .helpers import open_clip_architecture

# COCO's 80 names as its own annotations have them, and 91 labels with gaps, as DETR's checkpoints have.
COCO = (
    "person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant - stop_sign parking_meter "
    "bench bird cat dog horse sheep cow elephant bear zebra giraffe - backpack umbrella - - handbag tie suitcase "
    "frisbee skis snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle - "
    "wine_glass cup fork knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair "
    "couch potted_plant bed - dining_table - - toilet - tv laptop mouse remote keyboard cell_phone microwave oven "
    "toaster sink refrigerator - book clock vase scissors teddy_bear hair_drier toothbrush"
)
LABELS_91 = ["N/A", *("N/A" if name == "-" else name.replace("_", " ") for name in COCO.split())]
# The same 80 as mmdetection calls them; so do Mask2Former's and RT-DETR's checkpoints.
RENAMED = {
    "motorcycle": "motorbike",
    "airplane": "aeroplane",
    "couch": "sofa",
    "potted plant": "pottedplant",
    "dining table": "diningtable",
    "tv": "tvmonitor",
}
LABELS_80 = [RENAMED.get(name, name) for name in LABELS_91 if name != "N/A"]

SWIN = {
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 4,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
DETR = {
    "use_timm_backbone": False,
    "d_model": 16,
    "num_queries": 10,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}


def shaken(model, head, gain):
    """The model with weights that keep their layers' scale, and with a head whose weights are `gain` times that."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            wide = "quer" in name or "token_embedding" in name
            torch.nn.init.normal_(parameter, std=1 if wide else parameter[0].numel() ** -0.5)
    with torch.no_grad():
        head.weight.mul_(gain)
    return model


def mask2former():
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_queries": 12}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_feedforward_dim": 16, "dim_feedforward": 16}
    labels = dict(enumerate(LABELS_80))
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(**SWIN), num_attention_heads=2, id2label=labels, **sizes, **layers
    )
    model = Mask2FormerForUniversalSegmentation(config)
    return shaken(model, model.class_predictor, 4)


def maskformer():
    from transformers import DetrConfig, MaskFormerConfig, MaskFormerForInstanceSegmentation, ResNetConfig, SwinConfig

    config = MaskFormerConfig(
        backbone_config=SwinConfig(**SWIN),
        decoder_config=DetrConfig(backbone_config=ResNetConfig(**RESNET), **DETR),
        fpn_feature_size=32,
        mask_feature_size=32,
        id2label=dict(enumerate(LABELS_80)),
    )
    model = MaskFormerForInstanceSegmentation(config)
    return shaken(model, model.class_predictor, 4)


def detr(kind, gain):
    import transformers

    backbone = transformers.ResNetConfig(**RESNET, out_features=["stage4"])
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=backbone, id2label=dict(enumerate(LABELS_91)), **DETR
    )
    model = getattr(transformers, f"{kind}ForObjectDetection")(config)
    return shaken(model, model.class_labels_classifier, gain)


def rt_detr():
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    settings = {name: value for name, value in DETR.items() if name != "use_timm_backbone"}
    config = RTDetrConfig(
        backbone_config=RTDetrResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"]),
        encoder_hidden_dim=16,
        encoder_in_channels=[8, 8, 16],
        decoder_in_channels=[16, 16, 16],
        id2label=dict(enumerate(LABELS_80)),
        **settings,
    )
    model = RTDetrForObjectDetection(config)
    return shaken(model, model.model.decoder.class_embed[-1], 2)


@pytest.fixture(scope="session")
def images():
    """Noise, uint8 [3, 48, 64, 3]."""
    return np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def smooth():
    """Soft blots, uint8 [3, 40, 52, 3]."""
    coarse = np.random.default_rng(0).integers(0, 256, (3, 10, 13, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((52, 40), Image.Resampling.BILINEAR)) for c in coarse])


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    """A function that puts files into an otherwise empty cache of the hub, under an id."""
    from huggingface_hub import constants

    cache, commit = tmp_path_factory.mktemp("hub"), "0" * 40
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def put(identity, *files):
        repository = cache / f"models--{identity.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in files:
            (snapshot / file.name).symlink_to(file)

    return put


@pytest.fixture
def published_labels():
    """The labels of checkpoints with 80 classes, and of those with 91 numbers."""
    return LABELS_80, LABELS_91


@pytest.fixture(scope="session")
def detector_folders(tmp_path_factory):
    """Folders by the name of the model's kind; preprocessor_config.json as published, but for sizes."""
    edges, square = {"shortest_edge": 64, "longest_edge": 96}, {"height": 64, "width": 64}
    plain = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "resample": 2}
    imagenet = {"do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    segmentation = {"size": edges, "size_divisor": 32, "ignore_index": 255, "reduce_labels": False, **imagenet}
    detection = {"size": edges, "format": "coco_detection", "do_pad": True, **imagenet}
    kinds = {
        "mask2former": (mask2former, "Mask2Former", segmentation),
        "maskformer": (maskformer, "MaskFormer", segmentation),
        "detr": (lambda: detr("Detr", 2), "Detr", detection),
        "conditional_detr": (lambda: detr("ConditionalDetr", 0.5), "ConditionalDetr", detection),
        "rt_detr": (rt_detr, "RTDetr", {**detection, "size": square, "do_pad": False, "do_normalize": False}),
    }
    folders = {}
    for name, (build, family, settings) in kinds.items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp(name)
        build().save_pretrained(folders[name])
        settings = {"image_processor_type": f"{family}ImageProcessor", **plain, **settings}
        (folders[name] / "preprocessor_config.json").write_text(json.dumps(settings))
    return folders


@pytest.fixture(scope="session")
def color_clip(tmp_path_factory):
    """A folder in open_clip's format: ViT-L-14 in small."""
    open_clip = pytest.importorskip("open_clip", reason="the extra 'rewards' is not installed")

    folder = tmp_path_factory.mktemp("color_clip")
    architecture = open_clip_architecture(28, quick_gelu=True)
    preprocess = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": architecture, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    model = open_clip.CLIP(**architecture)
    shaken(model, model.visual.conv1, 4)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder
