"""Images that are damaged, tiny, of rare types or in the wrong range: the right pixels, or an error that says what to do."""

import base64
import logging
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from mpformer_hf.image_processing_mpformer import MPFormerImageProcessor

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

HEIGHT, WIDTH = 6, 10


def image(height: int = HEIGHT, width: int = WIDTH, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, channels), dtype=np.uint8)


def pixels_of(one, **fields) -> Tensor:
    """What the model sees of one image, as numbers from 0 to 255 without padding: (channels, height, width)."""
    fields = {"do_resize": False, "do_rescale": False, "do_normalize": False, "do_pad": False, **fields}
    return MPFormerImageProcessor(**fields)(one, return_tensors="pt").pixel_values[0]


def rgb(values: np.ndarray) -> Tensor:
    """(height, width, 3) or (height, width) as (3, height, width), by hand."""
    values = values if values.ndim == 3 else np.stack([values] * 3, axis=-1)
    return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)


def refuses(message: str, images, **arguments) -> None:
    with pytest.raises(ValueError, match=message):
        MPFormerImageProcessor(do_resize=False)(images, return_tensors="pt", **arguments)


def third(one) -> list:
    """A batch of which only the third is bad."""
    return [image(), image(), one]


def name_of(value: object) -> str:
    """The name of a parameter; not its address or numbers."""
    return value if isinstance(value, str) and len(value) < 60 else type(value).__name__


# No image at all


@pytest.mark.parametrize(
    "images", [[], (), [[]], [[], []], np.zeros((0, 3, 8, 8), dtype=np.uint8), torch.zeros(0, 3, 8, 8)]
)
def test_an_empty_batch_is_refused(images) -> None:
    refuses("Expected an image or several, got none", images)


@pytest.mark.parametrize(
    ("one", "kind"),
    [(None, "NoneType"), (5, "int"), ({"path": "a.png"}, "dict"), (b"\x89PNG", "bytes"), ([[1, 2], [3, 4]], "int")],
    ids=["None", "number", "dict", "bytes", "nested numbers"],
)
def test_what_is_no_image_is_refused_and_named(one, kind: str) -> None:
    refuses(
        f"Image 2: expected a PIL image, a numpy array, a torch tensor, or the path of a file, got {kind}", third(one)
    )
    refuses(f"Image 0: expected a PIL image, .*got {kind}", one)


@pytest.mark.parametrize(
    "one",
    [
        PIL.Image.new("RGB", (8, 0)),
        PIL.Image.new("L", (0, 8)),
        np.zeros((0, 8, 3), dtype=np.uint8),
        np.zeros((8, 0, 3), dtype=np.uint8),
        np.zeros((0, 8)),
        torch.zeros(3, 0, 8),
        torch.zeros(3, 8, 0, dtype=torch.bool),
    ],
    ids=["PIL height", "PIL width", "array height", "array width", "gray", "tensor height", "tensor width"],
)
def test_an_image_without_pixels_is_refused_and_named(one) -> None:
    refuses("Image 2: it is empty: its shape is .* Leave it out of the batch", third(one))


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (np.zeros(5, dtype=np.uint8), r"expected an image of 2 or 3 axes, got the shape \(5,\)"),
        (np.zeros((1, 1, 3, 8, 8), dtype=np.uint8), r"2 or 3 axes, got the shape \(1, 1, 3, 8, 8\). Pass several"),
        (np.zeros((7, 8, 2), dtype=np.uint8), r"neither the first nor the last axis of its shape \(7, 8, 2\)"),
        (np.zeros((2, 6, 10), dtype=np.uint8), "Pass several gray images as a list"),
        (np.zeros((8, 8, 3), dtype=complex), "expected an array of numbers, got the type complex128"),
        (torch.zeros(3, 8, 8, dtype=torch.complex64), "expected real numbers, got the type torch.complex64"),
        (np.full((8, 8, 3), "a"), "expected an array of numbers, got the type <U1"),
        (np.full((8, 8, 3), None), "expected an array of numbers, got the type object"),
        (np.full((8, 8, 3), 300), "an image of type int64 must hold 0 to 255, got 300 to 300. Convert it to uint8"),
        (np.full((8, 8, 3), -1, dtype=np.int16), "an image of type int16 must hold 0 to 255, got -1 to -1"),
        (torch.full((3, 8, 8), 300, dtype=torch.int32), "an image of type int32 must hold 0 to 255"),
    ],
    ids=name_of,
)
def test_arrays_that_are_no_images_are_refused_and_named(one, message: str) -> None:
    refuses(f"Image 2: .*{message}", third(one))


# Files


def as_file(pixels: np.ndarray, name: str, folder: Path) -> Path:
    PIL.Image.fromarray(pixels).save(folder / name)
    return folder / name


def test_a_file_is_read_from_its_path_as_pillow_reads_it(tmp_path: Path) -> None:
    path = as_file(image(), "image.png", tmp_path)
    for one in (path, str(path), PIL.Image.open(path)):
        assert torch.equal(pixels_of(one), rgb(image()))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a folder that a server on this machine offers."""
    monkeypatch.setenv("no_proxy", "*")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            file = tmp_path / self.path.lstrip("/")
            self.send_response(200 if file.is_file() else 404)
            self.end_headers()
            if file.is_file():
                self.wfile.write(file.read_bytes())

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_urls_and_base64_are_read_as_transformers_allows(tmp_path: Path, server: str) -> None:
    path = as_file(image(), "image.png", tmp_path)
    text = base64.b64encode(path.read_bytes()).decode()
    for one in (f"{server}/image.png", text, f"data:image/png;base64,{text}"):
        assert torch.equal(pixels_of(one), rgb(image()))
    refuses("Image 2: '.*missing.png' cannot be read .*404", third(f"{server}/missing.png"))


@pytest.mark.parametrize(
    "one", ["/nowhere/image.png", Path("/nowhere/image.png"), "", "abcd", "data:image/png;base64,!"]
)
def test_a_file_that_is_not_there_is_named(one) -> None:
    refuses("Image 2: '.*' is neither a file, nor the URL or base64 of an image. Check the path", third(one))


def test_a_long_text_is_cut_in_the_message() -> None:
    with pytest.raises(ValueError, match=r"Image 0: 'A{200}'\.\.\. is neither a file") as caught:
        pixels_of("A" * 100_000)
    assert len(str(caught.value)) < 400


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    refuses("Image 0: .* is neither a file", str(tmp_path))


def test_a_text_file_named_png_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no image")
    refuses("Image 2: '.*notes.png' is no image that Pillow can read. Check", third(tmp_path / "notes.png"))


def truncated(name: str, share: float, folder: Path) -> Path:
    path = as_file(image(64, 64), name, folder)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


@pytest.mark.parametrize("name", ["image.jpg", "image.png", "image.gif", "image.tiff", "image.webp", "image.bmp"])
@pytest.mark.parametrize("share", [0, 0.01, 0.1, 0.5, 0.9])
def test_a_truncated_file_is_named(name: str, share: float, tmp_path: Path) -> None:
    path = truncated(name, share, tmp_path)
    refuses(rf"Image 2: '.*{name}' (cannot be read \(.*Fetch the file again|is no image that Pillow can)", third(path))


@pytest.mark.parametrize("name", ["image.jpg", "image.png"])
def test_a_truncated_file_that_pillow_opened_is_named_when_its_pixels_are_read(name: str, tmp_path: Path) -> None:
    path = truncated(name, 0.5, tmp_path)
    for do_convert_rgb in (True, False):
        with PIL.Image.open(path) as opened:
            refuses(
                r"Image 2: its file cannot be decoded \(OSError: image file is truncated.*leave it out",
                third(opened),
                do_convert_rgb=do_convert_rgb,
            )


def test_a_png_with_a_damaged_body_is_named(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b"no compressed data"), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    refuses("Image 2: '.*image.png' cannot be read", third(tmp_path / "image.png"))
    with PIL.Image.open(tmp_path / "image.png") as opened:
        refuses("Image 2: its file cannot be decoded", third(opened))


def test_an_image_whose_file_was_closed_before_it_was_read_is_named(tmp_path: Path) -> None:
    with PIL.Image.open(as_file(image(), "image.png", tmp_path)) as closed:
        pass
    refuses("Image 2: its file cannot be decoded .*call `image.load.*` before closing it", third(closed))


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_exif_rotation_is_documented_and_not_applied(orientation: int, tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    stored = PIL.Image.fromarray(np.repeat(np.repeat(image(2, 4), 8, 0), 8, 1))
    stored.save(tmp_path / "image.jpg", exif=exif, quality=95)
    with PIL.Image.open(tmp_path / "image.jpg") as opened:
        values = rgb(np.array(opened))
    text = base64.b64encode((tmp_path / "image.jpg").read_bytes()).decode()
    for one in (tmp_path / "image.jpg", text, PIL.Image.open(tmp_path / "image.jpg")):
        assert pixels_of(one).shape == (3, 16, 32)
        assert torch.equal(pixels_of(one), values)
        # Labels belong to the pixels as they are stored.
        inputs = MPFormerImageProcessor(do_resize=False)(one, np.ones((16, 32)), return_tensors="pt")
        assert inputs.mask_labels[0].sum() == 16 * 32
    assert "EXIF rotation is not applied" in " ".join(MPFormerImageProcessor.__doc__.split())


# Tiny and narrow images


def tiny_forms(pixels: np.ndarray) -> dict[str, object]:
    """The same image (height, width, 3) in forms that say which axis is which."""
    return {
        "PIL": PIL.Image.fromarray(pixels),
        "channels last": (pixels, "channels_last"),
        "channels first": (pixels.transpose(2, 0, 1).copy(), "channels_first"),
        "tensor": (torch.from_numpy(pixels).permute(2, 0, 1), "channels_first"),
    }


@pytest.mark.parametrize("form", tiny_forms(image(1, 1)))
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (1, 3), (3, 1), (1, 4), (4, 1), (2, 1)], ids=str)
def test_images_of_one_pixel_or_one_row_or_column_are_read(size: tuple[int, int], form: str) -> None:
    pixels = image(*size)
    one = tiny_forms(pixels)[form]
    one, data_format = one if isinstance(one, tuple) else (one, None)
    assert torch.equal(pixels_of(one, input_data_format=data_format), rgb(pixels))
    inputs = MPFormerImageProcessor(size=32, input_data_format=data_format)(one, np.full(size, 4), return_tensors="pt")
    expected = (32, 32) if size[0] == size[1] else tuple(length * 32 for length in size)
    assert (int(inputs.pixel_mask[0].any(1).sum()), int(inputs.pixel_mask[0].any(0).sum())) == expected
    assert inputs.mask_labels[0].sum() == expected[0] * expected[1]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (5, 3)], ids=str)
def test_the_shape_alone_is_enough_where_it_leaves_no_doubt(size: tuple[int, int], caplog) -> None:
    pixels = image(*size)
    with caplog.at_level(logging.WARNING):
        for one in (pixels[..., 0], torch.from_numpy(pixels[..., 0])):
            assert torch.equal(pixels_of(one), rgb(pixels[..., 0]))  # gray (height, width)
        if 1 not in size:
            assert torch.equal(pixels_of(pixels), rgb(pixels))
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("shape", "assumed", "size"),
    [
        ((3, 5, 3), "channels_first", (5, 3)),
        ((4, 5, 3), "channels_first", (5, 3)),
        ((1, 5, 3), "channels_last", (1, 5)),
        ((3, 5, 1), "channels_first", (5, 1)),
        ((1, 5, 1), "channels_first", (5, 1)),
    ],
)
def test_a_shape_that_leaves_doubt_is_warned_of_and_the_argument_decides(
    shape: tuple[int, ...], assumed: str, size: tuple[int, int], caplog
) -> None:
    pixels = np.zeros(shape, dtype=np.uint8)
    with caplog.at_level(logging.WARNING):
        assert tuple(pixels_of(pixels).shape) == (3, *size)
    assert f"`{assumed}` is assumed. Pass `input_data_format`" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert tuple(pixels_of(pixels, input_data_format="channels_last").shape) == (3, *shape[:2])
    assert caplog.text == ""


def test_a_gray_array_is_height_and_width_whatever_the_format_of_channels() -> None:
    gray = image(7, 3)[..., 0]
    for data_format in ("channels_first", "channels_last"):
        assert torch.equal(pixels_of(gray, input_data_format=data_format), rgb(gray))


def test_an_extremely_narrow_image_keeps_a_pixel_of_height() -> None:
    inputs = MPFormerImageProcessor()(image(1, 10_000), return_tensors="pt")
    assert inputs.pixel_values.shape == (1, 3, 32, 1344)
    assert inputs.pixel_mask.sum() == 1333


def test_an_image_that_would_be_enlarged_beyond_memory_is_refused() -> None:
    message = r"Image 1: it is 1 x 10000 and would be enlarged to 800 x 8000000 by `size` .* Add `longest_edge`"
    with pytest.raises(ValueError, match=message):
        MPFormerImageProcessor(size={"shortest_edge": 800})([image(), image(1, 10_000)], return_tensors="pt")


def test_a_small_image_may_be_enlarged_a_lot() -> None:
    inputs = MPFormerImageProcessor(size={"height": 512, "width": 512})(
        np.full((1, 1, 3), 255, np.uint8), input_data_format="channels_last", return_tensors="pt"
    )
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    expected = white[None, :, None, None].expand(1, 3, 512, 512)
    torch.testing.assert_close(inputs.pixel_values, expected, atol=1e-5, rtol=0)


# Modes of PIL images


def opacity_over_white(colours: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """What one sees of transparent colours on white paper."""
    share = opacity[..., None] / 255
    return colours * share + 255 * (1 - share)


def palette_image(transparent: object = None) -> tuple[PIL.Image.Image, np.ndarray, np.ndarray]:
    """A palette image, its indices and its colours (entries, 3)."""
    indices = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH) % 5
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30], [200, 100, 50]], dtype=np.uint8)
    one = PIL.Image.new("P", (WIDTH, HEIGHT))
    one.putpalette(colours.flatten().tolist())
    one.putdata(indices.flatten().tolist())
    if transparent is not None:
        one.info["transparency"] = transparent
    return one, indices, colours


def modes() -> dict[str, Callable[[], tuple[object, np.ndarray]]]:
    """An image of each mode, and its colours by hand."""
    colours, gray, opacity = image(), image()[..., 0], image(WIDTH, HEIGHT)[..., 0].T.copy()
    half = np.where(np.arange(WIDTH) < WIDTH // 2, 0, 255).astype(np.uint8)[None].repeat(HEIGHT, 0)

    def palette(transparent: object = None) -> tuple[object, np.ndarray]:
        one, indices, entries = palette_image(transparent)
        seen = entries[indices].astype(float)
        if transparent is not None:
            alphas = np.full(5, 255)
            alphas[: len(transparent)] = list(transparent)
            seen = opacity_over_white(seen, alphas[indices])
        return one, seen

    def merged(mode: str, *bands: np.ndarray) -> PIL.Image.Image:
        return PIL.Image.merge(mode, [PIL.Image.fromarray(band) for band in bands])

    cyan_black = merged("CMYK", np.full_like(gray, 255), np.zeros_like(gray), np.zeros_like(gray), half)
    return {
        "L": lambda: (PIL.Image.fromarray(gray), gray),
        "1": lambda: (PIL.Image.fromarray(half).convert("1"), half),
        "LA": lambda: (merged("LA", gray, half), np.where(half == 0, 255, gray)),
        "La": lambda: (merged("LA", gray, half).convert("La"), np.where(half == 0, 255, gray)),
        "RGBA": lambda: (
            PIL.Image.fromarray(np.dstack([colours, opacity])),
            opacity_over_white(colours, opacity),
        ),
        "RGBa": lambda: (
            PIL.Image.fromarray(np.dstack([colours, half])).convert("RGBa"),
            np.where(half[..., None] == 0, 255, colours),
        ),
        "P": palette,
        "P, transparent": lambda: palette(bytes([255, 0, 128])),
        "L, one transparent gray": lambda: (gray_with_transparency(half), np.full_like(half, 255)),
        "CMYK": lambda: (cyan_black, np.stack([np.zeros_like(half), 255 - half, 255 - half], axis=-1)),
        "I;16": lambda: (PIL.Image.fromarray(gray.astype(np.uint16) * 257), gray),
        "I;16B": lambda: (
            PIL.Image.frombytes("I;16B", (WIDTH, HEIGHT), (gray * np.uint16(257)).astype(">u2").tobytes()),
            gray,
        ),
        "YCbCr": lambda: (merged("YCbCr", gray, np.full_like(gray, 128), np.full_like(gray, 128)), gray),
        "HSV": lambda: (merged("HSV", np.zeros_like(gray), np.zeros_like(gray), gray), gray),
    }


def gray_with_transparency(half: np.ndarray) -> PIL.Image.Image:
    one = PIL.Image.fromarray(half)
    one.info["transparency"] = 0
    return one


@pytest.mark.parametrize("mode", modes())
def test_images_of_every_mode_become_the_colours_that_one_sees(mode: str) -> None:
    one, expected = modes()[mode]()
    assert one.mode == mode.split(",", maxsplit=1)[0]
    torch.testing.assert_close(pixels_of(one), rgb(expected), atol=1, rtol=0)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_range_are_refused_with_the_way_out(mode: str) -> None:
    refuses(
        f"Image 2: a PIL image of mode '{mode}' has no defined range. Pass an array", third(PIL.Image.new(mode, (8, 8)))
    )
    values = image()[..., 0].astype(np.uint16) * 257
    stored = PIL.Image.fromarray(values.astype(np.int32))
    assert stored.mode == "I"
    assert torch.equal(pixels_of(np.array(stored).astype("uint16")), rgb(image()[..., 0]))


@pytest.mark.parametrize("name", ["image.png", "image.tiff"])
def test_files_of_16_bits_keep_their_range(name: str, tmp_path: Path) -> None:
    path = as_file(image()[..., 0].astype(np.uint16) * 257, name, tmp_path)
    torch.testing.assert_close(pixels_of(path), rgb(image()[..., 0]), atol=1e-3, rtol=0)


def test_without_conversion_channels_stay_and_palettes_are_refused() -> None:
    two = PIL.Image.merge("LA", [PIL.Image.fromarray(image()[..., index]) for index in range(2)])
    expected = torch.from_numpy(image()[..., :2].astype(np.float32)).permute(2, 0, 1)
    assert torch.equal(pixels_of(two, do_convert_rgb=False), expected)
    bits = PIL.Image.fromarray(image()[..., 0]).convert("1")
    assert set(pixels_of(bits, do_convert_rgb=False).unique().tolist()) == {0, 255}
    with pytest.raises(ValueError, match="Image 0: a PIL image of mode 'P' holds indices of a palette"):
        pixels_of(palette_image()[0], do_convert_rgb=False)


def test_channels_that_the_mean_does_not_have_are_refused() -> None:
    refuses(
        "Image 2: it has 1 channels, but `image_mean` has 3 values. Set `do_convert_rgb=True`",
        third(image()[..., 0]),
        do_convert_rgb=False,
    )
    with pytest.raises(ValueError, match=r"Images of \[1, 3\] channels make no batch. Set `do_convert_rgb=True`"):
        pixels_of([image(), image()[..., 0]], do_convert_rgb=False)


# Types and ranges of arrays


def arrays(values: np.ndarray) -> dict[str, object]:
    """Integers from 0 to 255 in types that hold them."""
    types = ("int16", "int32", "int64", "uint32", "uint64", "float16", "float32", "float64", ">f4", ">i2")
    return {
        **{f"{name} array": values.astype(name) for name in types},
        "16 bit array": values.astype(np.uint16) * 257,
        "16 bit array of the other byte order": (values.astype(np.uint16) * 257).astype(">u2"),
        "16 bit tensor": torch.from_numpy(values.astype(np.uint16) * 257),
        "bfloat16 tensor": torch.from_numpy(values).to(torch.bfloat16),
        "int32 tensor": torch.from_numpy(values).to(torch.int32),
        "flipped array": np.ascontiguousarray(values[:, ::-1])[:, ::-1],
        "every second column": np.repeat(values, 2, axis=1)[:, ::2],
        "read-only array": np.broadcast_to(values, values.shape),
    }


@pytest.mark.parametrize("form", arrays(image()))
def test_numbers_of_every_type_and_layout_are_read(form: str) -> None:
    torch.testing.assert_close(pixels_of(arrays(image())[form], do_convert_rgb=True), rgb(image()), atol=1e-3, rtol=0)
    scaled = pixels_of(arrays(image())[form], do_rescale=True)
    torch.testing.assert_close(scaled, rgb(image()) / 255, atol=1e-5, rtol=0)


def test_a_bool_array_is_black_and_white() -> None:
    bits = image()[..., 0] > 127
    assert torch.equal(pixels_of(bits), rgb(bits * 255))


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (HEIGHT, WIDTH, 1), (1, HEIGHT, WIDTH)])
@pytest.mark.parametrize("make", [np.array, torch.from_numpy])
def test_gray_arrays_are_read_with_and_without_an_axis_of_channels(shape: tuple[int, ...], make) -> None:
    gray = image()[..., 0].copy()
    assert torch.equal(pixels_of(make(gray.reshape(shape))), rgb(gray))


@pytest.mark.parametrize("scale", [1, 255], ids=["floats up to 1", "bytes"])
@pytest.mark.parametrize("opacity", [0, 64, 255])
def test_transparent_arrays_are_seen_on_white_in_their_own_range(scale: int, opacity: int) -> None:
    colours = image()
    expected = rgb(opacity_over_white(colours, np.full((HEIGHT, WIDTH), opacity)))
    whole = np.dstack([colours, np.full((HEIGHT, WIDTH), opacity, dtype=np.uint8)])
    if scale == 255:
        torch.testing.assert_close(pixels_of(whole), expected, atol=0.51, rtol=0)
        torch.testing.assert_close(
            pixels_of(whole.astype(np.float32), do_rescale=True) * 255, expected, atol=1e-3, rtol=0
        )
        torch.testing.assert_close(pixels_of(whole.astype(np.uint16) * 257), expected, atol=1e-3, rtol=0)
    else:
        torch.testing.assert_close(pixels_of(whole / 255) * 255, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, np.float32])
def test_an_image_that_is_transparent_and_black_everywhere_is_white(dtype: type) -> None:
    nothing = np.zeros((HEIGHT, WIDTH, 4), dtype=dtype)
    assert torch.equal(pixels_of(nothing, do_rescale=True), torch.ones(3, HEIGHT, WIDTH))


# What rescaling and normalisation would make of an image


@pytest.mark.parametrize(
    "values",
    [
        image() / 255,
        (image() / 255).astype(np.float32),
        torch.from_numpy(image() / 255).permute(2, 0, 1),
        torch.from_numpy(image() / 255).permute(2, 0, 1).half(),
        torch.ones(3, HEIGHT, WIDTH),
        (image() / 255 - 0.45) / 0.225,  # normalised
        image() / 127.5 - 1,
        np.linspace(-0.1, 1.2, 180).reshape(HEIGHT, WIDTH, 3),  # a bicubic resize overshoots
    ],
    ids=["float64", "float32", "tensor", "half", "white", "normalised", "from -1 to 1", "overshoot"],
)
def test_floats_that_are_scaled_already_are_refused_instead_of_becoming_black(values) -> None:
    refuses("Image 2: it holds floats from .* seem to be scaled already.* Set `do_rescale=False`", third(values))


def test_scaled_floats_are_taken_without_rescaling() -> None:
    scaled = image() / 255
    expected = MPFormerImageProcessor(do_resize=False)(image(), return_tensors="pt").pixel_values
    ours = MPFormerImageProcessor(do_resize=False, do_rescale=False)(scaled, return_tensors="pt").pixel_values
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    other_factor = MPFormerImageProcessor(do_resize=False, rescale_factor=1.0)(scaled, return_tensors="pt").pixel_values
    torch.testing.assert_close(other_factor, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.uint16, np.int64, bool])
def test_a_black_image_is_no_mistake(dtype: type) -> None:
    assert torch.equal(pixels_of(np.zeros((HEIGHT, WIDTH, 3), dtype), do_rescale=True), torch.zeros(3, HEIGHT, WIDTH))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_dark_bytes_are_no_mistake(dtype: type) -> None:
    dark = np.ones((HEIGHT, WIDTH, 3), dtype)
    torch.testing.assert_close(pixels_of(dark, do_rescale=True), torch.full((3, HEIGHT, WIDTH), 1 / 255))


@pytest.mark.parametrize("values", [image(), image().astype(np.float32), image().astype(np.uint16) * 257])
def test_numbers_up_to_255_are_refused_where_the_mean_is_one_of_scaled_images(values: np.ndarray) -> None:
    refuses(
        r"Image 2: it holds values up to 2.*, but with `do_rescale=False` and this `image_mean` they should be in \[0, 1\]",
        [np.zeros((HEIGHT, WIDTH, 3))] * 2 + [values],
        do_rescale=False,
    )


def test_means_of_unscaled_images_are_taken_without_rescaling() -> None:
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # 255 times ImageNet's
    ours = MPFormerImageProcessor(do_resize=False, do_rescale=False, image_mean=mean, image_std=std)
    expected = MPFormerImageProcessor(do_resize=False)(image(), return_tensors="pt").pixel_values
    torch.testing.assert_close(ours(image(), return_tensors="pt").pixel_values, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", [8, 10])
def test_16_bit_types_with_fewer_bits_are_refused_instead_of_becoming_black(bits: int) -> None:
    values = (np.linspace(0, 2**bits - 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)).astype(np.uint16)
    for one in (values, torch.from_numpy(values), PIL.Image.fromarray(values)):
        refuses(f"Image 2: its type is uint16, .* but its largest value is {2**bits - 1}, next to black", third(one))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("do_rescale", [True, False])
def test_a_pixel_that_is_not_finite_is_refused(value: float, do_rescale: bool) -> None:
    values = image().astype(np.float32) if do_rescale else (image() / 255).astype(np.float32)
    bad = values.copy()
    bad[3, 4, 1] = value
    refuses("Image 2: it has values that are not finite", [values, values, bad], do_rescale=do_rescale)


# Label maps in forms of images


def classes_of(segmentation_map, size: tuple[int, int] = (HEIGHT, WIDTH)) -> list[int]:
    inputs = MPFormerImageProcessor(do_resize=False)(image(*size), segmentation_map, return_tensors="pt")
    return inputs.class_labels[0].tolist()


@pytest.mark.parametrize("transparent", [None, bytes([0, 255])])
def test_a_label_map_with_a_palette_means_its_indices_and_not_its_colours(transparent, tmp_path: Path) -> None:
    one, indices, _ = palette_image(transparent)
    one.save(tmp_path / "labels.png")
    for form in (
        one,
        tmp_path / "labels.png",
        [str(tmp_path / "labels.png")],
        [PIL.Image.open(tmp_path / "labels.png")],
    ):
        inputs = MPFormerImageProcessor(do_resize=False)(image(), form, return_tensors="pt")
        assert inputs.class_labels[0].tolist() == [0, 1, 2, 3, 4]
        for label, mask in enumerate(inputs.mask_labels[0]):
            assert torch.equal(mask[:HEIGHT, :WIDTH], torch.from_numpy(indices == label))


@pytest.mark.parametrize("name", ["labels.png", "labels.tiff"])
def test_a_label_map_of_16_bits_keeps_its_values(name: str, tmp_path: Path) -> None:
    values = np.repeat(np.array([0, 255, 256, 65535], dtype=np.uint16), 15).reshape(HEIGHT, WIDTH)
    assert classes_of(as_file(values, name, tmp_path)) == [0, 255, 256, 65535]
    big_endian = PIL.Image.frombytes("I;16B", (WIDTH, HEIGHT), values.astype(">u2").tobytes())
    assert classes_of(big_endian) == [0, 255, 256, 65535]
    assert classes_of(values.astype(">u2")) == [0, 255, 256, 65535]
    assert classes_of(PIL.Image.fromarray(values.astype(np.int32))) == [0, 255, 256, 65535]


def test_bool_maps_and_float_maps_of_whole_numbers_are_read() -> None:
    values = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 2
    assert classes_of(values.astype(bool)) == [0, 1]
    assert classes_of(PIL.Image.fromarray((values * 255).astype(np.uint8)).convert("1")) == [0, 1]
    assert classes_of(PIL.Image.fromarray(values.astype(np.float32))) == [0, 1]
    assert classes_of(values.astype(np.float16)) == [0, 1]


def test_a_map_with_axes_of_length_one_is_read_at_every_size() -> None:
    for size in ((HEIGHT, WIDTH), (1, 7), (7, 1), (1, 1)):
        values = np.full(size, 3)
        for shape in (size, (1, *size), (*size, 1), (1, 1, *size)):
            inputs = MPFormerImageProcessor(do_resize=False, input_data_format="channels_last")(
                image(*size), values.reshape(shape), return_tensors="pt"
            )
            assert inputs.class_labels[0].tolist() == [3]
            assert inputs.mask_labels[0].sum() == size[0] * size[1]


def test_maps_of_a_batch_may_come_as_one_array() -> None:
    maps = np.stack([np.full((HEIGHT, WIDTH), label) for label in (5, 6)])
    for form in (maps, torch.from_numpy(maps), maps[:, None], maps[..., None], list(maps), [list(maps)]):
        inputs = MPFormerImageProcessor(do_resize=False)([image(), image()], form, return_tensors="pt")
        assert [labels.tolist() for labels in inputs.class_labels] == [[5], [6]]


GOOD_MAP = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "its segmentation map must be a PIL image, .* or the path of a file, got NoneType"),
        (5, "its segmentation map must be .*, got int"),
        (image(), r"its segmentation map must have the shape \(height, width\), got \(6, 10, 3\)"),
        (
            PIL.Image.fromarray(image()),
            r"its segmentation map must have .*, got \(6, 10, 3\). Colours of a panoptic PNG go to",
        ),
        (GOOD_MAP.T, "its segmentation map is 10 x 6, but the image is 6 x 10"),
        (GOOD_MAP + 0.5, "its segmentation map must hold integers, got fractions"),
        (
            np.full((HEIGHT, WIDTH), np.nan),
            "its segmentation map must hold integers, got fractions, or values that are not finite",
        ),
        (
            np.full((HEIGHT, WIDTH), np.inf),
            "its segmentation map must hold integers, got fractions, or values that are not finite",
        ),
        (np.full((HEIGHT, WIDTH), None), "expected an array of numbers, got the type object"),
        (GOOD_MAP.astype(complex), "expected an array of numbers, got the type complex128"),
        ("/nowhere/labels.png", "'/nowhere/labels.png' is neither a file"),
    ],
    ids=name_of,
)
def test_a_bad_map_of_the_third_image_is_named(bad, message: str) -> None:
    refuses(f"Image 2: {message}", [image()] * 3, segmentation_maps=[GOOD_MAP, GOOD_MAP, bad])


def test_a_damaged_map_of_the_third_image_is_named(tmp_path: Path) -> None:
    path = truncated("labels.png", 0.5, tmp_path)
    refuses(
        "Image 2: '.*labels.png' cannot be read",
        [image(64, 64)] * 3,
        segmentation_maps=[np.zeros((64, 64)), np.zeros((64, 64)), path],
    )
    with PIL.Image.open(path) as opened:
        maps = [np.zeros((64, 64)), np.zeros((64, 64)), opened]
        refuses("Image 2: its file cannot be decoded", [image(64, 64)] * 3, segmentation_maps=maps)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"segmentation_maps": 5}, "`segmentation_maps` must have one entry for each of the 3 images, got 1"),
        ({"segmentation_maps": GOOD_MAP}, "`segmentation_maps` must have one entry for each of the 3 images, got 1"),
        ({"segmentation_maps": [GOOD_MAP] * 2}, "`segmentation_maps` must have one entry .* 3 images, got 2"),
        ({"segmentation_maps": []}, "`segmentation_maps` must have one entry .* 3 images, got 0"),
        ({"mask_labels": 5, "class_labels": [[0]] * 3}, "`mask_labels` must be a list of one entry .*, got int"),
        ({"mask_labels": [GOOD_MAP[None]] * 3, "class_labels": 5}, "`class_labels` must be a list .*, got int"),
        ({"mask_labels": [GOOD_MAP[None]] * 2, "class_labels": [[0]] * 2}, "`mask_labels` must have one .*, got 2"),
        ({"annotations": 5}, "`annotations` must be a list of one entry for each of the 3 images, got int"),
        ({"annotations": "instances.json"}, "`annotations` must be a list .*, got str"),
        ({"annotations": [[]] * 4}, "`annotations` must have one entry for each of the 3 images, got 4"),
    ],
    ids=name_of,
)
def test_counts_of_labels_that_do_not_match_the_batch_are_refused(labels: dict, message: str) -> None:
    refuses(message, [image()] * 3, **labels)


SQUARE = [[0, 0, 5, 0, 5, 5, 0, 5]]


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (None, "its annotations must be a list of dicts, got NoneType"),
        ("instances.json", "its annotations must be a list of dicts, got str. A file of annotations must be read"),
        ([None], r"its annotations\[0\] must be a dict, got NoneType"),
        ({"image_id": 3}, "its annotation needs `annotations`"),
        ([{"category_id": 1}], r"its annotation 0 lacks \['segmentation'\]"),
        ([{"segmentation": SQUARE}], r"its annotation 0 lacks \['category_id'\]"),
        ([{"category_id": 1, "segmentation": []}], "its annotation 0: `segmentation` is empty"),
        (
            [{"category_id": 1, "segmentation": {"size": [10, 6], "counts": [60]}}],
            "its annotation 0: its run lengths belong to an image of 10 x 6, but the image has 6 x 10",
        ),
        ([{"category_id": 1, "segmentation": {"size": [6, 10], "counts": [59]}}], "its annotation 0: .*add up to 60"),
        ([{"category_id": -1, "segmentation": SQUARE}], None),
        ({"segments_info": [{"id": 1, "category_id": 1}]}, "its panoptic annotation needs `png`"),
        ({"segments_info": [{"id": 1, "category_id": 1}], "png": 5}, "its panoptic map must be a PIL image, .*got int"),
        ({"segments_info": [{"id": 1, "category_id": 1}], "png": "/nowhere.png"}, "'/nowhere.png' is neither a file"),
        ({"segments_info": [{"id": 1, "category_id": 1}], "png": GOOD_MAP.T}, "its panoptic map is 10 x 6, but"),
        ({"segments_info": 5, "png": GOOD_MAP}, "its segments_info must be a list of dicts, got int"),
    ],
    ids=name_of,
)
def test_a_bad_annotation_of_the_third_image_is_named(annotation, message: str | None) -> None:
    good = [{"category_id": 1, "segmentation": SQUARE}]
    expected = r"Image 2 has the class labels \[-1\]" if message is None else f"Image 2: {message}"
    refuses(expected, [image()] * 3, annotations=[good, good, annotation])


def test_a_damaged_panoptic_png_of_the_third_image_is_named(tmp_path: Path) -> None:
    path = truncated("panoptic.png", 0.5, tmp_path)
    good = {"segments_info": [], "png": np.zeros((64, 64))}
    bad = {"segments_info": [{"id": 1, "category_id": 1}], "file_name": path}
    refuses("Image 2: '.*panoptic.png' cannot be read", [image(64, 64)] * 3, annotations=[good, good, bad])


def test_a_panoptic_png_with_a_palette_means_its_colours() -> None:
    one, indices, colours = palette_image()
    segments = [
        {"id": int(red + 256 * green + 65536 * blue), "category_id": 7} for red, green, blue in colours.tolist()
    ]
    inputs = MPFormerImageProcessor(do_resize=False)(
        image(), annotations={"segments_info": segments[3:], "png": one}, return_tensors="pt"
    )
    masks = inputs.mask_labels[0][:, :HEIGHT, :WIDTH]
    assert torch.equal(masks, torch.from_numpy(np.stack([indices == 3, indices == 4])))
