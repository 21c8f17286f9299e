"""Pictures in every form they are given in, and what is refused with the words that mend it."""

import base64
import io
import sys

import mlx.core as mx
import numpy as np
import PIL.Image
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
    clear = np.concatenate([PIXELS, np.zeros((5, 7, 1), np.uint8)], 2)
    np.testing.assert_array_equal(pixels(clear), PIXELS)
    exif = PIL.Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = encoded(form="PNG", exif=exif)
    np.testing.assert_array_equal(pixels(turned), PIXELS[::-1, ::-1])


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


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(ConfigError, match="Is a directory"):
        open_picture(tmp_path)


def test_without_pillow_the_extra_is_named(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mlx-kvret\[pictures\]'"):
        open_picture(file)
