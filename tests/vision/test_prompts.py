"""Prompts with pictures: marks and pictures agree in number, in any form, or it is said what is wrong."""

from types import SimpleNamespace

import numpy as np
import pytest
from jinja2 import Template

from mlx_kvret.core.picture_prompts import asked, filled, has_pictures, marks, render, tokenizer_of
from mlx_kvret.errors import ConfigError

QWEN = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<v><pad></v>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
RED, BLUE = (np.full((4, 4, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))


class Processor:
    """A processor with a chat template; its tokenizer has none."""

    image_token = "<pad>"

    def __init__(self, template=QWEN, **own):
        self.chat_template, self.tokenizer = template, SimpleNamespace(chat_template=None)
        vars(self).update(own)

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert not tokenize
        return Template(self.chat_template).render(
            messages=messages, add_generation_prompt=add_generation_prompt
        )


def colours(found):
    return [np.array(picture)[0, 0].tolist() for picture in found]


def test_a_text_has_its_pictures_where_it_says_or_first():
    read = lambda text, *images: asked(Processor(), text, list(images))  # noqa: E731
    assert read("What?", RED).text == "<v><pad></v>What?"
    assert read("a <image> b <image>", RED, BLUE).text == "a <v><pad></v> b <v><pad></v>"
    found = read("a <v><pad></v> b <pad>", RED, BLUE)
    assert found.text == "a <v><pad></v> b <v><pad></v>", "a bare mark has around it what templates put there"
    found = read("<v> <pad> </v><pad>", RED, BLUE)
    assert found.text == "<v> <pad> </v><v><pad></v>"
    found = read("<pad><pad>", RED, BLUE)
    assert found.text == "<v><pad></v><v><pad></v>"
    for half in ("a <v><pad> b", "a <pad></v> b", "a <v> <pad> b", "a <pad> </v> b"):
        assert "".join(read(half, RED).text.split()) == "a<v><pad></v>b", "half of it is completed"
    assert colours(found.pictures) == [[255, 0, 0], [0, 0, 255]]
    assert asked(Processor(), "x", RED).text == "<v><pad></v>x", "a single picture needs no list"
    with pytest.raises(ConfigError, match=r"has 1 places for a picture .<pad>., and there are 2 pictures"):
        read("a <pad>", RED, BLUE)
    with pytest.raises(ConfigError, match="has 2 places for a picture"):
        read("<image><image>", RED)


def test_messages_have_them_in_their_parts():
    parts = [{"type": "image", "image": RED}, {"type": "text", "text": "hm"}, {"type": "image"}]
    found = asked(Processor(), [{"role": "user", "content": parts}], [BLUE])
    assert found.text == "[user]<v><pad></v>hm<v><pad></v>[end][assistant]"
    assert colours(found.pictures) == [[255, 0, 0], [0, 0, 255]]
    bare = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    found = asked(Processor(), [*bare, {"role": "user", "content": "c"}], [BLUE])
    assert found.text == "[system]s[end][user]a[end][assistant]b[end][user]<v><pad></v>c[end][assistant]"


@pytest.mark.parametrize("key", ["image", "path", "url", "image_url", "base64", "source"])
def test_parts_name_their_picture_in_many_ways(tmp_path, key):
    import base64

    import PIL.Image

    path = tmp_path / "red.png"
    PIL.Image.fromarray(RED).save(path)
    encoded = base64.b64encode(path.read_bytes()).decode()
    source = {"base64": encoded, "image_url": {"url": f"data:image/png;base64,{encoded}"}}
    source["source"] = {"type": "base64", "media_type": "image/png", "data": encoded}
    source = source.get(key, "red.png")
    part = {"type": "image_url" if key == "image_url" else "image", key: source}
    messages, pictures = filled([{"role": "user", "content": [part]}], folder=tmp_path)
    assert messages == [{"role": "user", "content": [{"type": "image"}]}] and colours(pictures) == [
        [255, 0, 0]
    ]
    if key.startswith("image"):
        assert has_pictures([{"role": "user", "content": [{key: source}]}])
        assert (
            len(filled([{"role": "user", "content": [{key: source}, {"text": "x"}]}], folder=tmp_path)[1])
            == 1
        )


@pytest.mark.parametrize(
    ("messages", "images", "words"),
    [
        ([{"role": "user", "content": [{"type": "image"}]}], [], "1 image parts without a picture"),
        ([{"role": "user", "content": [{"type": "image"}]}], [RED, BLUE], "there are 2 images beside"),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], [], "give its frames"),
        ([{"role": "user", "content": [{"type": "video_url", "video_url": "a"}]}], [], "give its frames"),
        ([{"role": "user", "content": [{"type": "image", "file": "a.png"}]}], [], "an image with 'file'"),
        ([{"role": "user", "content": [{"type": "image", "image": {"a": 1}}]}], [], "give a url"),
        ([{"role": "user", "content": [{"type": "audio"}]}], [], "expected parts of type text or image"),
        ([{"role": "user", "content": [7]}], [], "expected parts of type text or image"),
        ([{"role": "user", "content": 7}], [RED], "expected a text or a list of parts"),
        ([{"content": "x"}], [RED], "mappings with a role"),
        ([{"role": "system", "content": "x"}], [RED], "none of which is the user's"),
    ],
)
def test_what_does_not_fit_is_refused(messages, images, words):
    with pytest.raises(ConfigError, match=words):
        asked(Processor(), messages, images)


def test_ids_beside_pictures_are_refused_and_a_second_turn_is_a_text():
    with pytest.raises(ConfigError, match="give text or messages"):
        asked(Processor(), [1, 2, 3], [RED])
    with pytest.raises(ConfigError, match="the text of the new turn"):
        asked(Processor(), [{"role": "user", "content": "x"}], [RED], first=False)
    assert asked(Processor(), "more", [RED], first=False).text == "<v><pad></v>more"


def test_whether_there_are_pictures():
    assert not has_pictures("text") and not has_pictures("text", []) and not has_pictures([1, 2])
    assert not has_pictures([{"role": "user", "content": "x"}])
    assert has_pictures("text", "a.png") and has_pictures("text", RED) and has_pictures("text", [RED])
    assert has_pictures([{"role": "user", "content": [{"type": "image_url"}]}])


def test_the_mark_is_told_by_the_processor_or_its_template():
    assert marks(Processor()) == ("<pad>", "<v><pad></v>")
    assert marks(
        Processor(QWEN.replace("<v><pad></v>", "<boi>"), boi_token="<boi>", image_token="<soft>")
    ) == ("<boi>", "<boi>")
    assert marks(Processor(QWEN.replace("<v><pad></v>", "<picture>"), image_token=None)) == (
        "<picture>",
        "<picture>",
    )
    assert marks(Processor(None, image_token="<image>")) == ("<image>", "<image>")
    with pytest.raises(ConfigError, match="does not tell what stands for a picture"):
        marks(Processor(None, image_token=None))
    with pytest.raises(ConfigError, match="no chat template"):
        render(Processor(None), [])
    processor = Processor()
    assert (
        tokenizer_of(processor) is processor.tokenizer
        and tokenizer_of(processor.tokenizer) is processor.tokenizer
    )
