"""Runs cases in a process of its own and tells of each on standard output; see :mod:`.harness`.

python -m damage.worker FORM FIRST LAST
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from mlx_kvret.core.tensors import CHECKSUM
from mlx_kvret.errors import KVRetError

from .forms import FORMS
from .mutations import Damaged, damage
from .sound import Content, Form, TheirRefusal

# bytes of address space beyond what the libraries take: a size from a file must not decide over more
ROOM = 6 << 30


class Case:
    """One form's sound files in a folder, damaged and mended again."""

    def __init__(self, form: Form, folder: Path) -> None:
        self.form, self.folder = form, folder
        form.make(folder)
        self.sound = {name: (folder / name).read_bytes() for name in form.damaged}
        self.expected = form.load(folder)

    def run(self, seed: str) -> dict[str, Any]:
        rng = random.Random(seed)
        name = rng.choice(self.form.damaged)
        made = damage(name, self.sound[name], rng)
        path = self.folder / name
        path.unlink()
        if made.content is not None:
            path.write_bytes(made.content)
        start = time.process_time()
        try:
            with contextlib.redirect_stdout(sys.stderr):
                outcome = self._judge(self.form.load(self.folder), name, made)
        except KVRetError:
            outcome = "refused"
        except TheirRefusal:
            outcome = "refused"
        except BaseException as error:
            outcome = f"foreign {''.join(traceback.format_exception(error)[-4:])}"
        told = {"outcome": outcome, "how": f"{name}: {made.how}", "seconds": time.process_time() - start}
        path.unlink(missing_ok=True)
        path.write_bytes(self.sound[name])
        return told

    def _judge(self, found: Content, name: str, made: Damaged) -> str:
        if found == self.expected:
            return "same"
        if not self.form.sealed or made.resealed or name.endswith(".json"):
            return "other"
        if name.endswith(".safetensors") and CHECKSUM.encode() not in (made.content or b""):
            # as by another program
            return "other"
        return f"wrong: {made.how} changed what was read"


def main() -> None:
    # what libraries print must not come between the lines
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name, first, last in json.loads(sys.argv[1]):
        with tempfile.TemporaryDirectory() as folder:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            case = Case(FORMS[name], Path(folder))
            resource.setrlimit(resource.RLIMIT_AS, (_used() + ROOM, resource.RLIM_INFINITY))
            for number in range(first, last):
                _tell(out, begin=number, form=name)
                _tell(out, end=number, form=name, **case.run(f"{name} {number}"))


def _used() -> int:
    """Bytes of address space of this process; as much as there can be where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 1 << 60


def _tell(out: TextIO, **what: Any) -> None:
    print(json.dumps(what), file=out, flush=True)


if __name__ == "__main__":
    main()
