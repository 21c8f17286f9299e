"""What a GGUF file says beside its tensors."""

from __future__ import annotations

from typing import Any

import gguf

from ..errors import CheckpointError


class Fields:
    """The metadata of a GGUF file, as Python values."""

    def __init__(self, reader: gguf.GGUFReader) -> None:
        self._fields = reader.fields

    def get(self, name: str, default: Any = None) -> Any:
        return self._fields[name].contents() if name in self._fields else default

    def __getitem__(self, name: str) -> Any:
        if name not in self._fields:
            raise CheckpointError(
                f"the GGUF file has no field {name}; it is another kind of file than expected"
            )
        return self._fields[name].contents()
