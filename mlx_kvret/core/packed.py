"""The kept entries of a saved cache where they are in fewer bits: packed words, checked when read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, UnsupportedFeatureError
from .bits import KVBits, Packing, packings
from .reading import exactly, parse_json
from .tensors import Tensor

NAMES = ("packed_keys", "packed_values")


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows of words (P, words) U32 of keys and of values, as of :class:`~.bits.Packing`, and how they are.

    The ``newest`` tokens, which every head holds, are not packed: they are the recent window.
    """

    keys: Tensor
    values: Tensor
    newest: int
    forms: tuple[Packing, Packing]

    @classmethod
    def of(
        cls, keys: Tensor, values: Tensor, newest: int, kv_bits: KVBits, widths: tuple[int, int]
    ) -> Packed:
        """With the forms that bits and head sizes decide.

        Raises:
            CheckpointError: there are none.
        """
        try:
            forms = packings(kv_bits, *widths)
        except UnsupportedFeatureError as error:
            raise CheckpointError(str(error)) from error
        if forms is None:
            raise CheckpointError("there are packed entries, and kv_bits does not say how")
        return cls(keys, values, newest, forms)

    def check(self, entries: int, dtype: str) -> None:
        """Refuse what cannot be ``entries`` rows with scales of a float type.

        Raises:
            CheckpointError: says what is wrong.
        """
        itemsize = 4 if dtype == "F32" else 2
        for name, rows, form in zip(NAMES, (self.keys, self.values), self.forms, strict=True):
            expected = entries, form.words(itemsize)
            if rows.dtype != "U32" or rows.shape != expected:
                raise CheckpointError(
                    f"{name} is {rows.dtype} of shape {rows.shape}, expected U32 of {expected}"
                )
            if not form.scales(rows.bits, dtype).finite:
                raise CheckpointError(f"{name} holds NaN or infinity")

    def cast(self, dtype: str, to: str) -> Packed:
        """The same with scales of another float type."""
        pairs = zip((self.keys, self.values), self.forms, strict=True)
        keys, values = (Tensor("U32", form.cast(rows.bits, dtype, to)) for rows, form in pairs)
        return Packed(keys, values, self.newest, self.forms)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return dict(zip(NAMES, (self.keys, self.values), strict=True))

    @property
    def header(self) -> str:
        """The text that stands in a file's header."""
        forms = zip(("keys", "values"), self.forms, strict=True)
        said: dict[str, Any] = {name: {"bits": form.bits, "group": form.group} for name, form in forms}
        return json.dumps(said | {"window": self.newest})


def read_packed(
    tensors: dict[str, Tensor], header: str | None, kv_bits: KVBits, widths: tuple[int, int]
) -> Packed | None:
    """The packed entries of a file, None where none are to be expected.

    Raises:
        KeyError: names what is missing.
        CheckpointError: the parts contradict each other.
    """
    if kv_bits is None and header is None and not tensors.keys() & set(NAMES):
        return None
    if header is None:
        raise KeyError("packing")
    said = parse_json(header)
    newest = said.get("window") if isinstance(said, dict) else None
    if type(newest) is not int or not 0 <= newest < 2**31:
        raise CheckpointError(f"its packing is {header:.80}, without the tokens of its window")
    found = Packed.of(tensors[NAMES[0]], tensors[NAMES[1]], newest, kv_bits, widths)
    if not exactly(said, parse_json(found.header)):
        raise CheckpointError(f"its packing is {header:.80}, expected {found.header}")
    return found
