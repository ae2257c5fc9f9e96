"""Object detectors with one contract: images in; named objects with boxes, and masks if the model has them, out.

Names are those of the prompts: the embedded world's shapes, or the 80 COCO classes as GenEval calls them. ADD A
DETECTOR HERE: write a class like Boxes, and add one line to DETECTORS.
"""

import inspect
import os
from abc import ABC, abstractmethod
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from align_cluster.embedded.detector import Detection, detect
from align_cluster.embedded.scene import SHAPES
from align_cluster.prompts.geneval import CLASSES
from align_cluster.rewards.base import ModelSize
from align_cluster.rewards.loading import MODEL, extra, loading, model_size
from align_cluster.settings import ModelSource, Section

# Counted as the sizes in clip.py, on square images: 800 x 800 pixels for Mask2Former and 640 x 640 for RT-DETR.
PUBLISHED = {
    "facebook/mask2former-swin-small-coco-instance": ModelSize(68.7e6, 448.7e9),
    "PekingU/rtdetr_r50vd_coco_o365": ModelSize(42.7e6, 137.4e9),
}
DETECTOR = ModelSource("a folder with a detector of transformers for COCO's labels, or a hub id", MODEL)
BATCH = 8  # images in one forward pass, whatever the size of a chunk

# Labels that GenEval words differently: COCO's own, and mmdetection's, which most checkpoints with 80 labels have.
ALIASES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


def geneval_name(label: str) -> str:
    """Return GenEval's name for a checkpoint's label."""
    return ALIASES.get(label.lower(), label.lower())


class Detector(ABC):
    """Finds objects of `classes`. The constructor is cheap; `load` loads the model.

    threshold            confidence that an object must exceed to count, by default
    counting_threshold   the same for prompts that ask for a number; None: `threshold` applies
    tells_colors         whether detections include their colour
    remedy               what to do where prompts ask for objects that the detector does not know
    """

    Config: type[Section]
    classes: ClassVar[tuple[str, ...]]
    threshold: ClassVar[float]
    counting_threshold: ClassVar[float | None]
    tells_colors: ClassVar[bool]
    remedy: ClassVar[str] = "use clip_score for these prompts"

    def __init__(self, config: Section) -> None:
        self.config = config

    @abstractmethod
    def load(self, device: str) -> None:
        """Load the model to `device`. Raises UserError that says what is missing."""

    @abstractmethod
    def detect(self, images: np.ndarray, above: float) -> list[list[Detection]]:
        """Return the objects in each of B images, uint8 [B, H, W, 3], the most confident first.

        Objects with a confidence of at most `above` may be missing.
        """

    def model_sizes(self) -> list[ModelSize | None]:
        """Return the sizes of the models that `load` loads, as `Reward.model_sizes` does."""
        return [None]


class Embedded(Detector):
    """Finds shapes of the embedded world by rules. It needs no weights, and tells colours by hue."""

    class Config(Section):
        """The embedded detector has no settings."""

        kind: Literal["embedded"] = "embedded"

    classes = SHAPES
    threshold = 0.80
    counting_threshold = None
    tells_colors = True
    remedy = "use the detector mask2former, or clip_score, for these prompts"

    def load(self, device: str) -> None:
        """There is nothing to load."""
        pass

    def detect(self, images: np.ndarray, above: float) -> list[list[Detection]]:
        """Apply the rules; all found objects are returned, whatever `above` is."""
        return detect(images)

    def model_sizes(self) -> list[ModelSize | None]:
        """Return nothing, because no model is loaded."""
        return []


class Photographs(Detector):
    """Finds objects in photographs with a model of transformers. The thresholds are GenEval's, for Mask2Former."""

    classes = CLASSES
    threshold = 0.3
    counting_threshold = 0.9
    tells_colors = False
    auto: ClassVar[str]  # transformers' class that loads such models

    def model_sizes(self) -> list[ModelSize | None]:
        """Return the size of the detector."""
        return [model_size(self.config.path, PUBLISHED)]

    def load(self, device: str) -> None:
        """Load the processor and the model. Raises UserError if weights or COCO labels are missing."""
        import transformers

        who, path = f"the detector {self.config.kind}", os.path.expanduser(self.config.path)
        remedy = (
            f"give a hub id that this machine can reach, or a folder of an {self.auto} with its "
            "preprocessor_config.json and COCO's labels"
        )
        with extra(who), loading(who, repr(self.config.path), remedy):
            # The PIL backend resizes as the published scores were made, and needs no torchvision.
            self.processor = transformers.AutoImageProcessor.from_pretrained(path, backend="pil")
            model, report = getattr(transformers, self.auto).from_pretrained(
                path, dtype=torch.float32, output_loading_info=True
            )
            self._check(model, report["missing_keys"])
        self.names = {index: geneval_name(label) for index, label in model.config.id2label.items()}
        self.model, self.device = model.to(device).eval().requires_grad_(False), torch.device(device)

    def _check(self, model: torch.nn.Module, missing: set[str]) -> None:
        """Raise ValueError if parameters would stay random, or if a class that prompts may ask for has no label."""
        random = sorted(set(missing) & {name for name, _ in model.named_parameters()})
        if random:
            raise ValueError(f"the checkpoint has no {random[0]}")
        unknown = sorted(set(CLASSES) - {geneval_name(label) for label in model.config.id2label.values()})
        if unknown:
            raise ValueError(f"its labels have no {unknown[0]!r}")

    @torch.no_grad()
    def detect(self, images: np.ndarray, above: float) -> list[list[Detection]]:
        """Run the model on BATCH images at a time, and keep objects of the 80 classes."""
        found = []
        for start in range(0, len(images), BATCH):
            part = images[start : start + BATCH]
            inputs = self.processor(images=list(part), return_tensors="pt").to(self.device)
            with torch.autocast(self.device.type, enabled=False):
                outputs = self.model(**inputs)
            found += self._read(outputs, part.shape[1:3], above)
        return [sorted((d for d in objects if d.label in CLASSES), key=lambda d: -d.score) for objects in found]

    @abstractmethod
    def _read(self, outputs: Any, size: tuple[int, int], above: float) -> list[list[Detection]]:
        """Return the objects of the images, height and width `size`, from the model's outputs."""


class Masks(Photographs):
    """Segments instances with Mask2Former (Cheng et al. 2022, arXiv 2112.01527), as GenEval, or MaskFormer.

    A box surrounds its mask. A score is the class's probability times the mean of the mask's probability inside it, as
    in mmdetection.
    """

    class Config(Section):
        """Configures the detector of masks, which is GenEval's kind."""

        reads = {"path": DETECTOR}
        kind: Literal["mask2former"] = "mask2former"
        path: str = "facebook/mask2former-swin-small-coco-instance"
        """A hub id or a folder of a Mask2Former or MaskFormer with COCO's 80 labels. The default is GenEval's
        architecture, a Mask2Former on Swin-S, with other weights than mmdetection's, which published tables use."""

    auto = "AutoModelForUniversalSegmentation"

    def _check(self, model: torch.nn.Module, missing: set[str]) -> None:
        super()._check(model, missing)
        post_process = getattr(self.processor, "post_process_instance_segmentation", None)
        if post_process is None or "return_binary_maps" not in inspect.signature(post_process).parameters:
            raise ValueError(f"{type(self.processor).__name__} does not tell overlapping instances apart")

    def _read(self, outputs: Any, size: tuple[int, int], above: float) -> list[list[Detection]]:
        pairs = zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True)
        return [self._instances(logits, masks, size, above) for logits, masks in pairs]

    def _instances(
        self, logits: torch.Tensor, masks: torch.Tensor, size: tuple[int, int], above: float
    ) -> list[Detection]:
        """Return the objects of one image from class logits [Q, C + 1] and mask logits [Q, h, w] of its queries."""
        # The processor scales the mask of every query on the CPU, so it gets only queries that can matter. A score is
        # at most its class's probability, so a query without a class above the threshold cannot. The processor keeps
        # one (query, class) pair for each query, so `count`, the number of pairs above the threshold, is enough.
        probabilities = logits.softmax(-1)[:, :-1]
        count = min(int((probabilities > above).sum()), len(logits))
        if count == 0:
            return []
        likely = probabilities.amax(1).topk(count).indices
        kept = SimpleNamespace(
            class_queries_logits=logits[likely][None].cpu(), masks_queries_logits=masks[likely][None].cpu()
        )
        (result,) = self.processor.post_process_instance_segmentation(
            kept, threshold=above, target_sizes=[tuple(size)], return_binary_maps=True
        )
        segments = result["segments_info"]
        maps = result["segmentation"].numpy() > 0.5 if segments else ()
        return [
            Detection(self.names[segment["label_id"]], segment["score"], mask_box(mask), mask)
            for segment, mask in zip(segments, maps, strict=True)
        ]


class Boxes(Photographs):
    """Detects objects without masks: DETR, conditional and deformable DETR, RT-DETR and similar models."""

    class Config(Section):
        """Configures the detector of boxes."""

        reads = {"path": DETECTOR}
        kind: Literal["detr"] = "detr"
        path: str = "PekingU/rtdetr_r50vd_coco_o365"
        """A hub id or a folder of a DETR, conditional or deformable DETR, RT-DETR or similar model with COCO's 80
        labels. GenEval's thresholds do not suit it, so set `threshold` and `counting_threshold` of the reward too."""

    auto = "AutoModelForObjectDetection"

    def _read(self, outputs: Any, size: tuple[int, int], above: float) -> list[list[Detection]]:
        height, width = size
        results = self.processor.post_process_object_detection(
            SimpleNamespace(logits=outputs.logits.cpu(), pred_boxes=outputs.pred_boxes.cpu()),
            threshold=above,
            target_sizes=[(height, width)] * len(outputs.logits),
        )
        found = []
        for result in results:
            boxes = result["boxes"].clamp(min=0).minimum(torch.tensor([width, height] * 2))
            rows = zip(result["labels"].tolist(), result["scores"].tolist(), boxes.tolist(), strict=True)
            found.append([Detection(self.names[label], score, tuple(box), None) for label, score, box in rows])
        return found


def mask_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Return the box x0, y0, x1, y1 around a non-empty mask bool [H, W]; the far edges are exclusive."""
    (y, x) = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return float(x[0]), float(y[0]), float(x[-1] + 1), float(y[-1] + 1)


DETECTORS = {"embedded": Embedded, "mask2former": Masks, "detr": Boxes}
