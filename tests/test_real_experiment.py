"""The real model's experiment without the real model: its texts, records and page."""

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mlx_kvret.demo import MODEL
from mlx_kvret.errors import ConfigError
from mlx_kvret.evaluation import Cell
from mlx_kvret.evaluation.runner import FULL

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "train_real"))
import real_page
import records
import texts

WORDS = ["remember", "Ada", "amber", "and", "Ivan", "copper", "recall", "the", "lamp", "of", "Stella"]


def tar(**files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:xz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"./share/{name}.txt")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return out.getvalue()


def deb(*members):
    """An ar archive, as Debian's packages are."""
    out = b"!<arch>\n"
    for name, data in members:
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode()
        out += head + data + b"\n" * (len(data) % 2)
    return out


def test_files_of_a_package(tmp_path):
    data = deb(("debian-binary", b"2.0"), ("control.tar.xz", b"odd"), ("data.tar.xz", tar(one="1", two="22")))
    assert texts._files(data, r".*/two\.txt") == {"./share/two.txt": b"22"}
    assert len(texts._files(tar(one="1"), r".*")) == 1
    with pytest.raises(ConfigError, match="without data"):
        texts._files(deb(("debian-binary", b"2.0")), r".*")


def test_a_file_is_what_it_must_be(tmp_path):
    (tmp_path / "a.tgz").write_bytes(b"text")
    right = hashlib.sha256(b"text").hexdigest()
    assert texts.Archive("https://nowhere.invalid/a.tgz", right).fetch(tmp_path) == b"text"
    with pytest.raises(ConfigError, match="remove it and try again"):
        texts.Archive("https://nowhere.invalid/a.tgz", "0" * 64).fetch(tmp_path)
    with pytest.raises(ConfigError, match="put the file into"):
        texts.Archive("https://nowhere.invalid/b.tgz", right).fetch(tmp_path)


def test_markup_is_taken_off():
    rst = ".. index:: x\n\nThe :class:`~a.B` and :func:`see <c>` of ``d``."
    assert texts._without_markup(rst).strip() == "The a.B and see of `d`."
    assert texts._without_pod("=head1 NAME\n\nB<bold>, C<< code >> E<gt>") == "NAME\n\nbold, code >"
    assert texts._joined_lines("a\nb\n\n\nc") == "a b\n\nc"


def test_records_fit_and_are_repeatable(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    paragraph = " ".join(WORDS * 6) + ". " + " ".join(reversed(WORDS)) + ". " + " ".join(WORDS[::2]) + "."
    made = {"python": ["\n\n".join([paragraph] * 600)]}
    counts = [records.write_records(made, tokenizer, tmp_path / f"{i}.jsonl") for i in range(2)]
    one, other = ((tmp_path / f"{i}.jsonl").read_text() for i in range(2))
    assert one == other
    found = [json.loads(line) for line in one.splitlines()]
    assert len(found) == counts[0] > 20
    assert {"text", "messages"} == {name for record in found for name in record}
    for record in found:
        text = record.get("text") or tokenizer.apply_chat_template(record["messages"], tokenize=False)
        assert len(tokenizer(text)["input_ids"]) <= records.CHAT


def cell(method, budget, scores, gates=""):
    return Cell("text", 1024, budget, method, gates, "reference", "nll", tuple(scores), 1.0, 1.0)


def test_page(tmp_path):
    full = [3.0, 3.2, 3.4]
    cells = [
        cell("full", FULL, full),
        cell("learned-global", "1/4", [x + 0.01 for x in full], "smollm2/0"),
        cell("learned-global", "1/4", [x + 0.03 for x in full], "smollm2/1"),
        cell("h2o", "1/4", [x + 0.05 for x in full]),
        cell("recent", "1/4", [x + 0.005 for x in full]),
    ]
    real_page.write_page(cells, tmp_path / "out" / "page.md")
    text = (tmp_path / "out" / "page.md").read_text()
    assert "3 pieces, 2 sets of gates; full cache 3.2000 nats per token." in text
    assert "| **learned, global** | +0.0200 ± 0.0100 |" in text
    assert "| H2O (sees attention) | +0.0500 ± 0.0000 |" in text
    assert "| dialogue | +0.0200 / +0.0500 |" in text
    assert "1,024 tokens, 1/4: sinks + window is 0.0150 ± 0.0100 nats ahead" in text
    assert "1,024 tokens, 1/4: the full cache is 0.0200 ± 0.0100 nats ahead" in text
    assert "H2O (sees attention) is" not in text
