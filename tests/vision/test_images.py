"""Pictures in every form they are given in, and what is refused with the words that mend it."""

import base64
import io
import sys
import tempfile
import tracemalloc

import mlx.core as mx
import numpy as np
import PIL.Image
import PIL.ImageSequence
import pytest
import torch

from mlx_kvret.core.images import open_picture
from mlx_kvret.errors import ConfigError, MissingDependencyError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def encoded(image=None, form="PNG", **options):
    file = io.BytesIO()
    (image or PIL.Image.fromarray(PIXELS)).save(file, form, **options)
    return file.getvalue()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a b%20.png"
    path.write_bytes(encoded())
    return path


def pixels(source, **options):
    found = open_picture(source, **options)
    assert found.mode == "RGB"
    return np.array(found)


def test_every_form_is_the_same_picture(file, monkeypatch):
    url = "data:image/png;base64," + base64.b64encode(encoded()).decode()
    monkeypatch.chdir(file.parent)
    forms = [file, str(file), file.as_uri(), file.name, url, url.replace("image/png", "IMAGE/PNG"), encoded()]
    forms += [PIL.Image.fromarray(PIXELS), PIXELS, torch.from_numpy(PIXELS), mx.array(PIXELS)]
    forms += [PIXELS.transpose(2, 0, 1), PIXELS.astype(np.int64), PIXELS / 255.0, mx.array(PIXELS / 255.0)]
    for form in forms:
        np.testing.assert_array_equal(pixels(form), PIXELS)
    np.testing.assert_array_equal(pixels(file.name, folder=file.parent), PIXELS)


def test_grey_alpha_and_turned_pictures():
    grey = PIXELS[..., 0]
    for form in (grey, grey[..., None], PIL.Image.fromarray(grey)):
        np.testing.assert_array_equal(pixels(form), np.repeat(grey[..., None], 3, 2))
    exif = PIL.Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = encoded(form="PNG", exif=exif)
    np.testing.assert_array_equal(pixels(turned), PIXELS[::-1, ::-1])


def test_what_is_transparent_is_seen_on_white():
    alpha = np.full((5, 7, 1), 255, np.uint8)
    alpha[0], alpha[1] = 0, 51
    expected = np.rint(255 + (PIXELS - 255.0) * alpha / 255)
    given = np.concatenate([PIXELS, alpha], 2)
    premultiplied = PIL.Image.fromarray(given).convert("RGBa")
    for form in (given, given / 255.0, encoded(PIL.Image.fromarray(given)), premultiplied):
        np.testing.assert_allclose(pixels(form), expected, atol=2)
    black = [PIL.Image.new("RGB", (2, 2)), PIL.Image.new("L", (2, 2)), PIL.Image.new("P", (2, 2))]
    for image, colour in zip(black, ((0, 0, 0), 0, 0), strict=True):
        assert pixels(encoded(image, transparency=colour)).min() == 255
    assert pixels(PIL.Image.new("LA", (2, 2), (0, 0))).min() == 255


def test_more_than_8_bits_are_rounded_and_not_cut():
    deep = np.linspace(0, 65535, 35).astype(np.uint16).reshape(5, 7)
    expected = np.repeat(np.rint(deep / 257).astype(np.uint8)[..., None], 3, 2)
    forms = [PIL.Image.fromarray(deep), encoded(PIL.Image.fromarray(deep)), deep.astype(np.int32)]
    forms += [encoded(PIL.Image.fromarray(deep), "TIFF"), (deep / 65535).astype(np.float32)]
    forms += [(deep / 257).astype(np.float32)]
    for form in forms:
        image = PIL.Image.fromarray(form) if isinstance(form, np.ndarray) else form
        np.testing.assert_allclose(pixels(image), expected, atol=1)
    for wrong in (deep.astype(np.int32) - 9, deep.astype(np.float32)):
        with pytest.raises(ConfigError, match="expected bytes of 0 to 255"):
            pixels(PIL.Image.fromarray(wrong))


def test_colours_that_are_not_red_green_and_blue():
    assert pixels(encoded(PIL.Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "JPEG"))[0, 0].tolist() == [
        255,
        0,
        0,
    ]
    assert pixels(encoded(PIL.Image.new("1", (2, 2), 1))).min() == 255
    palette = PIL.Image.fromarray(PIXELS).quantize(256)
    np.testing.assert_array_equal(pixels(encoded(palette)), np.array(palette.convert("RGB")))


def test_arrays_that_numpy_cannot_take_as_they_are():
    expected = np.rint(np.asarray(PIXELS / 255.0) * 255)
    half = [torch.from_numpy(PIXELS / 255.0).bfloat16(), mx.array(PIXELS / 255.0).astype(mx.bfloat16)]
    for form in (*half, torch.from_numpy(PIXELS / 255.0).requires_grad_()):
        np.testing.assert_allclose(pixels(form), expected, atol=1)

    class Far:
        """A tensor on another device."""

        shape, dtype = PIXELS.shape, torch.uint8

        def __array__(self, *_, **__):
            raise TypeError("use Tensor.cpu() to copy the tensor to host memory first")

        detach = lambda self: self  # noqa: E731
        cpu = lambda self: torch.from_numpy(PIXELS)  # noqa: E731

    np.testing.assert_array_equal(pixels(Far()), PIXELS)
    # a picture that was made larger is a rounding error out of 0 to 1
    assert pixels(np.full((2, 2, 3), np.float32(1.0000001))).min() == 255


@pytest.mark.parametrize("kind", ["gradient", "torch", "mlx"])
def test_large_arrays_do_not_become_lists(kind):
    large = np.random.default_rng(1).random((500, 500, 3), np.float32)
    forms = {"torch": lambda: torch.from_numpy(large).bfloat16(), "mlx": lambda: mx.array(large, mx.bfloat16)}
    source = forms.get(kind, lambda: torch.from_numpy(large).requires_grad_())()
    tracemalloc.start()
    try:
        open_picture(source)
        # a list of numbers takes 24 MB, arrays of floats 3 MB each
        assert tracemalloc.get_traced_memory()[1] < 5 * large.nbytes
    finally:
        tracemalloc.stop()


def test_an_open_file_is_read_whole_and_left_where_it_stood(file):
    with file.open("rb") as opened:
        opened.seek(7)
        for form in (opened, io.BytesIO(encoded()), memoryview(encoded())):
            np.testing.assert_array_equal(pixels(form), PIXELS)
        assert opened.tell() == 7
    with pytest.raises(ConfigError, match="a file that cannot be read"):
        pixels(opened)
    with tempfile.NamedTemporaryFile() as named, tempfile.SpooledTemporaryFile() as spooled:
        for form in (named, spooled):
            form.write(encoded())
            np.testing.assert_array_equal(pixels(form), PIXELS)
            assert form.tell() == len(encoded())


def test_a_file_that_is_open_as_text_is_told(file):
    for encoding in ("utf-8", "latin-1"):
        with (
            file.open(encoding=encoding) as opened,
            pytest.raises(ConfigError, match=r"an open file of str; open it"),
        ):
            pixels(opened)


def test_names_of_files_as_people_write_them(tmp_path, monkeypatch):
    path = tmp_path / "ä #1? b.png"
    path.write_bytes(encoded())
    monkeypatch.setenv("HOME", str(tmp_path))
    forms = [
        f"file://{path}",
        f"file:{path}",
        f"file://localhost{path}",
        f"~/{path.name}",
        f"file://~/{path.name}",
    ]
    for form in forms:
        np.testing.assert_array_equal(pixels(form), PIXELS)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("https://example.org/a.png", "nothing is fetched; download it"),
        ("HTTP://example.org/a.png", "nothing is fetched"),
        ("s3://bucket/a.png", "nothing is fetched"),
        ("file://elsewhere/a.png", "on another machine"),
        ("no such file.png", "No such file"),
        ("data:image/png;base64,@@@", "base64 is damaged"),
        ("data:text/html,<b>", "data URL of type"),
        ("data:image/png;base64", "data URL of type"),
        (b"no picture", "no picture that can be read"),
        (encoded()[:60], "no picture that can be read"),
        (None, "is None; give a file"),
        ("  ", "is an empty text"),
        (base64.b64encode(encoded()).decode() * 9, "base64 begins with data:image/png;base64,"),
        (b"no picture", "of no format that Pillow knows"),
        (7, "is 7; give a file"),
        (np.zeros((2, 5, 7, 3), np.uint8), "expected one picture"),
        (np.zeros((0, 7, 3), np.uint8), "expected one picture"),
        (np.full((5, 7, 3), 2.0), "expected bytes of 0 to 255, or floats"),
        (np.full((5, 7, 3), np.nan), "expected bytes of 0 to 255, or floats"),
        (np.full((5, 7, 3), -1), "expected bytes of 0 to 255, or floats"),
        (PIL.Image.new("RGB", (0, 4)), "has 0 x 4 pixels"),
    ],
)
def test_what_is_no_picture_is_refused(source, words):
    with pytest.raises(ConfigError, match=words) as error:
        open_picture(source, "images[3]")
    assert str(error.value).startswith("images[3]")


def test_an_animation_is_not_cut_to_its_first_frame():
    frames = [PIL.Image.fromarray(PIXELS), PIL.Image.fromarray(255 - PIXELS)]
    file = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(ConfigError, match="an animation of 2 frames"):
        open_picture(file)
    # one that is open stands at some frame, and all that walk through it are the same object
    opened = PIL.Image.open(io.BytesIO(file))
    with pytest.raises(ConfigError, match="ImageSequence"):
        open_picture(opened)
    walked = [pixels(frame.copy()) for frame in PIL.ImageSequence.Iterator(opened)]
    assert len(walked) == 2 and (walked[0] != walked[1]).any()


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(ConfigError, match="Is a directory"):
        open_picture(tmp_path)


def test_without_pillow_the_extra_is_named(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mlx-kvret\[pictures\]'"):
        open_picture(file)
