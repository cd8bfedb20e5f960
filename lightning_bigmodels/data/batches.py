"""Every batch of the package, declared once.

Legend: B rows of a batch, T tokens of a row; C channels, H rows and W columns of a picture, K classes, N boxes.

Pictures are uint8, as they were decoded: the networks scale and normalize them. An evaluation batch may hold examples
that count for nothing, where a process has none left and others have: their index is `FILLER`, their labels `IGNORED`.
"""

from typing import TypedDict

from torch import Tensor
from typing_extensions import NotRequired

IGNORED = -100
"""The label that no loss and no metric counts (`torch.nn.functional.cross_entropy`'s `ignore_index`)."""

FILLER = -1
"""The index of an example that counts for nothing: it fills a batch, or stands for a file that could not be read."""


class TokenBatch(TypedDict):
    """Rows of tokens for next-token prediction.

    Attributes:
        input_ids: (B, T) int64.
        labels: (B, T) int64; `labels[b, t]` is the token that follows `input_ids[b, t]`, or `IGNORED`. They are already
            shifted: compare them with the logits of the same position.
    """

    input_ids: Tensor
    labels: Tensor


class EvaluationTokenBatch(TokenBatch):
    """Rows of tokens of which each token of the text is counted exactly once.

    Attributes:
        num_bytes: (B,) int64; UTF-8 bytes of the text that the row's counted labels spell. Summed over an evaluation
            they are the size of the text: the denominator of bits per byte.
    """

    num_bytes: Tensor


class PromptBatch(TypedDict):
    """Texts to be continued; B is zero where a process has none left and others have.

    Attributes:
        prompts: B strings.
        indices: (B,) int64; place of each prompt in its file, from 0, blank lines not counted.
    """

    prompts: list[str]
    indices: Tensor


class CaptionBatch(TypedDict):
    """Pictures with captions.

    Attributes:
        images: (B, C, H, W) uint8, of one shape in a batch; not there where a network has latents of them already.
        captions: B texts, empty where an example counts for nothing.
        indices: (B,) int64 place in its part, or `FILLER`.
        errors: What was wrong with each file that was left out.
    """

    images: NotRequired[Tensor]
    captions: list[str]
    indices: Tensor
    errors: NotRequired[list[str]]


class ImageBatch(TypedDict):
    """Pictures with their classes.

    Attributes:
        images: (B, C, H, W) uint8; float32 in [0, 1] where pictures were mixed.
        labels: (B,) int64 class, or `IGNORED`; (B, K) float32 where an example has several classes or a mixture of
            them, with rows of `IGNORED` for what does not count.
        indices: (B,) int64 place in its part, or `FILLER`.
        groups: (B,) int64 group of each example, by which a classifier is judged for fairness, or `IGNORED`.
        files: B names, in prediction batches.
        errors: What was wrong with each file that was left out.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    groups: NotRequired[Tensor]
    files: NotRequired[list[str]]
    errors: NotRequired[list[str]]


class GenerationBatch(TypedDict):
    """Pictures to be made from nothing but noise; B is zero where a process has none left and others have.

    Attributes:
        indices: (B,) int64 place among all, from 0, which with a seed fixes the noise.
        classes: B names of what each is to show; not there where the model chooses, each class in turn.
    """

    indices: Tensor
    classes: NotRequired[list[str]]


class Boxes(TypedDict):
    """The objects of one picture, as torchvision's detectors take them.

    Attributes:
        boxes: (N, 4) float32, left, top, right, bottom in pixels of the picture.
        labels: (N,) int64 class from 1; 0 is the background.
        masks: (N, H, W) uint8, 1 where the object is.
        iscrowd: (N,) int64, 1 for a region that COCO's metric neither demands nor punishes.
        area: (N,) float32 in square pixels, by which COCO's metric calls an object small, medium or large.
    """

    boxes: Tensor
    labels: Tensor
    masks: NotRequired[Tensor]
    iscrowd: NotRequired[Tensor]
    area: NotRequired[Tensor]


class DetectionBatch(TypedDict):
    """Pictures of any sizes with the objects in them.

    Attributes:
        images: B pictures (C, H, W) uint8.
        targets: B sets of objects; without any in prediction batches.
        indices: (B,) int64 place in its part, or `FILLER`.
        files: B names, in prediction batches.
        image_ids: What the annotations call each picture, in prediction batches.
        errors: What was wrong with each file that was left out.
    """

    images: list[Tensor]
    targets: list[Boxes]
    indices: Tensor
    files: NotRequired[list[str]]
    image_ids: NotRequired[list[int | str]]
    errors: NotRequired[list[str]]


class SegmentationBatch(TypedDict):
    """Pictures with the class of each pixel.

    Attributes:
        images: (B, C, H, W) uint8.
        masks: (B, H, W) int64 class, or `IGNORED`.
        indices: (B,) int64 place in its part, or `FILLER`.
        sizes: (B, 2) int64 height and width of the file's own picture, in prediction batches.
        regions: (B, 2) int64 height and width of the upper left part of `images` that the picture fills, as `sizes`.
        files: B names, in prediction batches.
        errors: What was wrong with each file that was left out.
    """

    images: Tensor
    masks: Tensor
    indices: Tensor
    sizes: NotRequired[Tensor]
    regions: NotRequired[Tensor]
    files: NotRequired[list[str]]
    errors: NotRequired[list[str]]


class SuperResolutionBatch(TypedDict):
    """Small crops with the large ones they were made from, for training; s is the factor between them.

    Attributes:
        images: (B, C, H, W) uint8.
        targets: (B, C, s H, s W) uint8.
        indices: (B,) int64 place in its part, or `FILLER`.
        errors: What was wrong with each file that was left out.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    errors: NotRequired[list[str]]


class WholePhotoBatch(TypedDict):
    """Small pictures of any sizes, with the photos they were made from where these are known.

    Attributes:
        images: B pictures (C, H, W) uint8.
        targets: B photos (C, s H, s W) uint8; not where pictures are enlarged that have no larger ones.
        indices: (B,) int64 place in its part, or `FILLER`.
        files: B names, in prediction batches.
        errors: What was wrong with each file that was left out.
    """

    images: list[Tensor]
    targets: NotRequired[list[Tensor]]
    indices: Tensor
    files: NotRequired[list[str]]
    errors: NotRequired[list[str]]
