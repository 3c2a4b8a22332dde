"""Plain text by characters: from some of them, the next ones."""

from __future__ import annotations

import codecs
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpidl.array import to_numpy
from mpidl.data.dataset import numbers_of
from mpidl.data.files import reading
from mpidl.data.samples import check_share
from mpidl.errors import DataError, InvalidArgument
from mpidl.refuse import refuses, told, whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpidl.array import Array
    from mpidl.data.files import AnyPath

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Vocabulary:
    """The characters of a text, sorted; the id of each is its place."""

    characters: str

    def __post_init__(self) -> None:
        if not isinstance(self.characters, str):
            raise InvalidArgument(f"Vocabulary({told(self.characters)}): expected characters")

    def __len__(self) -> int:
        return len(self.characters)

    @refuses
    def encode(self, text: str) -> Array:
        """Return the ids (n,) int64 of the n characters of `text`.

        Raises InvalidArgument for a character that is not in the vocabulary.
        """
        known, found = _codes(self.characters), _codes(text)
        ids = np.searchsorted(known, found)
        wrong = np.flatnonzero(~np.isin(found, known))
        if wrong.size:
            at = int(wrong[0])
            raise InvalidArgument(
                f"encode: character {at} is {text[at]!r}: expected one of {self.characters!r}"
            )
        return ids.astype(np.int64)

    @refuses
    def decode(self, ids: Array) -> str:
        """Return the text of the ids (n,). Raises InvalidArgument for one that stands for none."""
        ids = to_numpy(ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise InvalidArgument(
                f"decode: {ids.dtype} of shape {ids.shape}: expected integers (n,)"
            )
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise InvalidArgument(
                f"decode: ids from {ids.min()} to {ids.max()}: expected 0 to {len(self) - 1}"
            )
        return "".join(self.characters[i] for i in ids)


@dataclass(frozen=True)
class TextDataset:
    """Windows of `length` characters, one every `stride` characters; the last may not fit."""

    ids: Array  #: of all characters (n,), in the smallest dtype for the vocabulary
    length: int
    stride: int
    vocabulary: Vocabulary

    def __len__(self) -> int:
        return max(0, (len(self.ids) - 1 - self.length) // self.stride + 1)

    @refuses
    def take(self, indices: Array) -> tuple[Array, Array]:
        """Return ids x (n, length) and those of the characters that follow each, y; both int64."""
        first = numbers_of(indices, len(self)) * self.stride
        places = first[:, None] + np.arange(self.length)
        return self.ids[places].astype(np.int64), self.ids[places + 1].astype(np.int64)


@refuses
def text(
    path: AnyPath, length: int, *, stride: int | None = None, test_share: float = 0.1
) -> tuple[TextDataset, TextDataset]:
    r"""Return a UTF-8 text as (train, test): x (n, length) int64, y the same one character later.

    A window begins every `stride` characters, so that by default, `length`, they do not overlap.
    The test part is the end of the text. Both have the vocabulary of the whole. Every character
    stays as it is, "\r" too, and takes 1 byte of memory (2 where there are more than 256).

    Raises DataError for a file that is missing or not UTF-8, and where a part is shorter than a
    window; InvalidArgument for other values that cannot be.
    """
    length = whole("text: length", length, 1)
    stride = length if stride is None else whole("text: stride", stride, 1)
    check_share("text", test_share)
    path = Path(path)
    seen, n = np.zeros(sys.maxunicode + 1, np.bool_), 0
    for codes in _blocks(path):
        seen[codes] = True
        n += len(codes)
    known = np.flatnonzero(seen)
    ids = np.empty(n, np.min_scalar_type(max(0, len(known) - 1)))
    id_of = np.zeros(len(seen), ids.dtype)
    id_of[known] = np.arange(len(known))
    at = 0
    for codes in _blocks(path):
        ids[at : at + len(codes)] = id_of[codes]
        at += len(codes)
    vocabulary = Vocabulary("".join(map(chr, known)))
    cut = n - round(n * test_share)
    parts = {"train": ids[:cut], "test": ids[cut:]}
    for name, part in parts.items():
        if len(part) <= length:
            raise DataError(
                f"{path}: {len(part)} of {n} characters are for {name}; expected {length + 1} or "
                f"more: length={length} and the one that follows"
            )
    train, test = (TextDataset(part, length, stride, vocabulary) for part in parts.values())
    return train, test


def _blocks(path: Path) -> Iterator[Array]:
    """Yield the code points of a file, uint32, some at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position, block = 0, b"-"
    with reading(path, "a text in UTF-8"), path.open("rb") as file:
        while block:
            block = file.read(BLOCK_BYTES)
            begun = len(decoder.getstate()[0])  # bytes of a character that the block before cut
            try:
                characters = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = position - begun + error.start
                raise DataError(
                    f"{path}: byte {at} is {error.object[error.start]:#04x}, {error.reason}; "
                    "expected UTF-8"
                ) from error
            position += len(block)
            yield _codes(characters)


def _codes(characters: str) -> Array:
    return np.frombuffer(characters.encode("utf-32-le", "surrogatepass"), "<u4")
