"""Averages of views against a plain average of whole score maps, and whole predictions with models that are easy to foresee."""

import math
import weakref
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor, nn

from mpformer_hf import MPFormerImageProcessor, mask_resizing, semantic_views
from mpformer_hf.image_tiles import Region
from mpformer_hf.mask_post_processing import ClassScores, semantic_segmentation
from mpformer_hf.semantic_views import (
    SemanticView,
    augmented_semantic_segmentation,
    average_views,
    make_windows,
    sliding_window_semantic_segmentation,
)
from tests import plain_post_processing as plain
from tests.factories import tiny_model

NUM_CLASSES = 4
SIZE = (60, 100)
# Valid size, region, mirrored: two scales of the whole image, mirrored and not, and some windows.
LAYOUT = [
    ((58, 90), Region(0, 0, 60, 100), False),
    ((58, 90), Region(0, 0, 60, 100), True),
    ((31, 50), Region(0, 0, 60, 100), False),
    ((64, 64), Region(0, 5, 40, 45), True),
    ((64, 128), Region(20, 30, 60, 100), False),
]


@pytest.fixture(params=[2**14, 64 * 2**20], ids=["in small blocks", "in one piece"])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mask_resizing.BLOCK_BYTES, "cpu", request.param)


def random_view(valid: tuple[int, int], region: Region, is_flipped: bool) -> SemanticView:
    size = [math.ceil(length / 32) * 8 for length in valid]
    smooth = nn.functional.interpolate(torch.randn(1, 6, 3, 4), size, mode="bicubic")[0]
    return SemanticView(2 * torch.randn(6, NUM_CLASSES + 1), 4 * smooth, valid, region, is_flipped)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("combine_before_resize", [False, True])
def test_scores_of_views_are_averaged_where_they_lie(combine_before_resize: bool) -> None:
    views = [random_view(*entry) for entry in LAYOUT]
    prediction = average_views(views, SIZE, combine_before_resize=combine_before_resize, return_scores=True)

    total, count = torch.zeros(NUM_CLASSES, *SIZE), torch.zeros(SIZE)
    for view in views:
        region = view.region
        scores = plain.semantic_scores(
            view.class_logits, view.mask_logits, view.valid_size, region.size, combine_before_resize
        )
        rows, columns = slice(region.top, region.bottom), slice(region.left, region.right)
        total[:, rows, columns] += scores.flip(-1) if view.is_flipped else scores
        count[rows, columns] += 1
    torch.testing.assert_close(prediction.scores, total / count, atol=1e-5, rtol=0)
    assert torch.equal(prediction.segmentation, prediction.scores.argmax(0))


def test_one_view_of_the_whole_image_is_the_usual_result() -> None:
    view = random_view(*LAYOUT[0])
    prediction = average_views([view], SIZE)
    (usual,) = semantic_segmentation(view.class_logits[None], view.mask_logits[None], [view.valid_size], [SIZE])
    assert torch.equal(prediction.segmentation, usual.segmentation)
    assert prediction.scores is None


def test_logits_with_gradients_are_taken_and_get_none() -> None:
    view = random_view(*LAYOUT[0])
    expected = average_views([view], SIZE, return_scores=True)
    view.class_logits.requires_grad_()
    view.mask_logits.requires_grad_()
    prediction = average_views([view], SIZE, return_scores=True)
    assert torch.equal(prediction.scores, expected.scores)
    assert not prediction.scores.requires_grad


def test_views_are_let_go_when_nothing_below_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref] = []
    most = 0

    class Watched(ClassScores):
        def __init__(self, *arguments) -> None:
            nonlocal most
            super().__init__(*arguments)
            alive.append(weakref.ref(self))
            most = max(most, sum(one() is not None for one in alive))

    monkeypatch.setitem(mask_resizing.BLOCK_BYTES, "cpu", 2**12)
    monkeypatch.setattr(semantic_views, "ClassScores", Watched)
    windows = make_windows((400, 60), (40, 40), overlap=10)
    average_views((random_view((40, 40), window, False) for window in windows), (400, 60))
    in_a_row = sum(window.top == 0 for window in windows)
    assert len(alive) == len(windows) > 10 * in_a_row
    assert most <= 3 * in_a_row + 1


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ([], "at least one"),
        ([LAYOUT[4]], "leave pixels of .* out"),
        ([LAYOUT[0], LAYOUT[4], LAYOUT[3]], "one at 0 follows one at 20"),
        ([((64, 64), Region(0, 0, 61, 100), False)], "reaches beyond the image of 60 x 100"),
        ([((64, 64), Region(0, -1, 60, 100), False)], "reaches beyond the image"),
    ],
    ids=["none", "gap", "order", "too large", "left of it"],
)
def test_views_that_do_not_make_the_image_are_refused(views: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        average_views([random_view(*entry) for entry in views], SIZE)


def test_views_of_different_models_are_refused() -> None:
    first, second = random_view(*LAYOUT[0]), random_view(*LAYOUT[1])
    second = SemanticView(second.class_logits[:, :-1], second.mask_logits, second.valid_size, second.region)
    with pytest.raises(ValueError, match=r"classes of the first, 4, but one has 3"):
        average_views([first, second], SIZE)


# Whole predictions


class ClassesOfPixels(nn.Module):
    """A perfect predictor: the value of a pixel is its class. Keeps the sizes that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> SimpleNamespace:
        self.seen.append(tuple(pixel_values.shape))
        cells = nn.functional.avg_pool2d(pixel_values[:, :1], 4)  # (B, 1, h, w)
        distance = (cells - torch.arange(NUM_CLASSES)[:, None, None]).abs()
        classes = 20 * torch.eye(NUM_CLASSES, NUM_CLASSES + 1).expand(len(pixel_values), -1, -1)
        sizes = torch.stack([pixel_mask[:, :, 0].sum(1), pixel_mask[:, 0].sum(1)], 1)
        return SimpleNamespace(
            class_queries_logits=classes, masks_queries_logits=40 * (0.5 - distance), image_sizes=sizes
        )


class BrighterToTheRight(nn.Module):
    """A model that is not symmetric: masks depend on pixels and on their column."""

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> SimpleNamespace:
        cells = nn.functional.avg_pool2d(pixel_values[:, :2], 4)
        masks = cells + torch.linspace(-2, 2, cells.shape[-1])
        classes = torch.tensor([[2.0, 0.0, -3.0], [0.0, 1.0, -3.0]]).expand(len(cells), -1, -1)
        return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)


@pytest.fixture
def raw() -> MPFormerImageProcessor:
    return MPFormerImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)


def class_map(height: int, width: int) -> np.ndarray:
    """Rectangles of classes, (height, width) uint8."""
    rows, columns = np.indices((height, width))
    return ((rows // 24 + columns // 36) % NUM_CLASSES).astype(np.uint8)


def share_right(segmentation: Tensor, truth: np.ndarray) -> float:
    return float((segmentation == torch.from_numpy(truth.astype(np.int64))).float().mean())


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("kind", ["pil", "numpy", "torch"])
def test_windows_make_the_whole_image(raw: MPFormerImageProcessor, batch_size: int, kind: str) -> None:
    truth = class_map(240, 324)
    image = {"pil": PIL.Image.fromarray, "numpy": np.asarray, "torch": torch.from_numpy}[kind](truth)
    model = ClassesOfPixels().eval()
    prediction = sliding_window_semantic_segmentation(
        model, raw, image, window_size=(96, 128), overlap=32, batch_size=batch_size, progress=False
    )
    assert share_right(prediction.segmentation, truth) > 0.97  # cells of four pixels blur the borders
    assert {size[-2:] for size in model.seen} == {(96, 128)}
    assert max(size[0] for size in model.seen) == min(batch_size, len(make_windows((240, 324), (96, 128), 32)))


def test_an_image_that_fits_into_one_window_gets_the_result_without_windows() -> None:
    torch.manual_seed(0)
    model = tiny_model().eval()
    processor = MPFormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    expected = processor.post_process_semantic_segmentation(outputs, [(50, 70)], return_segmentation_scores=True)[0]
    for prediction in (
        sliding_window_semantic_segmentation(
            model, processor, image, window_size=(64, 80), return_scores=True, progress=False
        ),
        augmented_semantic_segmentation(
            model, processor, image, scales=[1], flip=False, return_scores=True, progress=False
        ),
    ):
        assert torch.equal(prediction.segmentation, expected.segmentation)
        torch.testing.assert_close(prediction.scores, expected.segmentation_scores)


def test_a_mirrored_image_gives_the_mirrored_result(raw: MPFormerImageProcessor) -> None:
    pixels = np.random.default_rng(0).integers(0, 4, (64, 96, 3), dtype=np.uint8)
    scores = [
        augmented_semantic_segmentation(
            BrighterToTheRight().eval(), raw, image, scales=[1.0, 0.5], return_scores=True, progress=False
        ).scores
        for image in (
            pixels,
            pixels[:, ::-1].copy(),
            PIL.Image.fromarray(pixels),
            torch.from_numpy(pixels).permute(2, 0, 1),
        )
    ]
    torch.testing.assert_close(scores[0], scores[1].flip(-1))
    torch.testing.assert_close(scores[0], scores[2])
    torch.testing.assert_close(scores[0], scores[3])


@pytest.mark.parametrize(
    ("fields", "shapes"),
    [
        ({"size": {"shortest_edge": 64, "longest_edge": 96}}, [(32, 64), (64, 96), (96, 160)]),
        ({"size": {"height": 64, "width": 64}}, [(32, 32), (64, 64), (96, 96)]),
        ({"do_resize": False}, [(32, 64), (64, 96), (96, 160)]),
        ({"size": {"shortest_edge": 64}, "pad_size": {"height": 96, "width": 128}}, [(32, 64), (96, 128), (96, 160)]),
    ],
)
def test_scales_are_of_the_size_that_the_processor_makes(fields: dict, shapes: list) -> None:
    model = ClassesOfPixels().eval()
    processor = MPFormerImageProcessor(do_rescale=False, do_normalize=False, **fields)
    augmented_semantic_segmentation(
        model, processor, class_map(60, 90), scales=[0.5, 1.0, 1.5], flip=True, progress=False
    )
    assert [size[-2:] for size in model.seen] == [shape for shape in shapes for _ in range(2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window_size": (96,)}, "two positive integers"),
        ({"window_size": (0, 96)}, "two positive integers"),
        ({"window_size": (64, 96), "overlap": 64}, "below both sides"),
        ({"window_size": (64, 96), "overlap": -1}, "below both sides"),
        ({"window_size": (64, 96), "batch_size": 0}, "`batch_size` must be at least 1"),
        ({"window_size": (64, 96), "scales": ()}, "above 0"),
        ({"window_size": (64, 96), "scales": (1.0, 0.0)}, "above 0"),
    ],
    ids=str,
)
def test_windows_that_cannot_be_are_refused(raw: MPFormerImageProcessor, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sliding_window_semantic_segmentation(
            ClassesOfPixels().eval(), raw, class_map(80, 120), progress=False, **arguments
        )


def test_a_model_in_training_mode_is_refused(raw: MPFormerImageProcessor) -> None:
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        augmented_semantic_segmentation(ClassesOfPixels().train(), raw, class_map(80, 120), progress=False)


def test_other_processors_are_refused_with_the_way_out() -> None:
    with pytest.raises(TypeError, match=r"MPFormerImageProcessor\.from_pretrained"):
        augmented_semantic_segmentation(ClassesOfPixels().eval(), object(), class_map(80, 120), progress=False)
