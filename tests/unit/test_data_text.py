"""Text by characters."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from mpidl import data
from mpidl.errors import DataError, InvalidArgument
from tests.unit.test_data_files import check_take

module = sys.modules["mpidl.data.text"]


def random_text(rng: np.random.Generator, n: int, alphabet: str = "ab\r\n é☃\U0001f600") -> str:
    return "".join(rng.choice(list(alphabet), n))


def written(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def windows(text: str, length: int, stride: int, known: list[str]) -> list[np.ndarray]:
    """Return inputs and targets, made one character at a time."""
    starts = range(0, len(text) - length, stride)
    return [
        np.array([[known.index(c) for c in text[s + d : s + d + length]] for s in starts])
        for d in (0, 1)
    ]


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
def test_text(
    block: int, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    for _ in range(5):
        whole = random_text(rng, int(rng.integers(60, 90)))
        length, stride = int(rng.integers(1, 6)), int(rng.integers(1, 8))
        share = rng.uniform(0.2, 0.8)
        parts = data.text(written(tmp_path / "t", whole), length, stride=stride, test_share=share)
        cut = len(whole) - round(len(whole) * share)
        for made, part in zip(parts, (whole[:cut], whole[cut:]), strict=True):
            x, y = windows(part, length, stride, sorted(set(whole)))
            check_take(made, x, y, rng)
            assert "".join(sorted(set(whole))) == made.vocabulary.characters


def test_windows_lie_side_by_side(tmp_path: Path) -> None:
    train, test = data.text(written(tmp_path / "t", "abcdefghijkl"), 3, test_share=0.4)
    decoded = [train.vocabulary.decode(x) for x in train.take(np.arange(len(train)))[0]]
    assert decoded == ["abc", "def"]  # what follows "f" is there, what follows "g" is not
    assert len(test) == 1


@pytest.mark.parametrize("length", [1, 3])
def test_the_last_window_needs_one_character_more(length: int, tmp_path: Path) -> None:
    for windows_ in (1, 2, 3):
        enough = "ab" * (length * windows_) + "a" * 2
        path = written(tmp_path / "t", enough)
        train, _ = data.text(path, length, test_share=0.5)
        assert len(train) == windows_
        path = written(tmp_path / "t", enough + "a" * 2 * (length - 1))
        train, _ = data.text(path, length, test_share=0.5)
        assert len(train) == windows_


@pytest.mark.parametrize(("size", "dtype"), [(2, "u1"), (256, "u1"), (257, "u2"), (66000, "u4")])
def test_ids_take_little_memory(size: int, dtype: str, tmp_path: Path) -> None:
    characters = [chr(c) for c in range(size + 2048) if not 0xD800 <= c < 0xE000][:size]
    train, test = data.text(written(tmp_path / "t", "".join(characters) * 2), 1, test_share=0.5)
    assert len(train.vocabulary) == size
    for part in (train, test):
        assert part.ids.dtype == dtype
        np.testing.assert_array_equal(part.ids, np.arange(size))


def test_encode_and_decode(rng: np.random.Generator) -> None:
    vocabulary = data.Vocabulary("".join(sorted("ab é☃\U0001f600")))
    text = random_text(rng, 50, vocabulary.characters)
    ids = vocabulary.encode(text)
    assert ids.dtype == np.int64
    assert ids.tolist() == [vocabulary.characters.index(c) for c in text]
    assert vocabulary.decode(ids) == text
    assert vocabulary.decode(vocabulary.encode("")) == ""
    assert len(vocabulary) == 6


@pytest.mark.parametrize("unknown", ["c", "Z", "\U0001f601", "\ud800"])
def test_characters_without_an_id(unknown: str) -> None:
    with pytest.raises(InvalidArgument, match=r"encode: character 2 is .*: expected one of 'abd'"):
        data.Vocabulary("abd").encode(f"da{unknown}b{unknown}")


@pytest.mark.parametrize("ids", [[0, 3], [-1, 2]])
def test_ids_without_a_character(ids: list[int]) -> None:
    with pytest.raises(InvalidArgument, match=r"decode: ids from -?\d to \d: expected 0 to 2"):
        data.Vocabulary("abd").decode(np.array(ids))


def test_windows_that_are_not_there(tmp_path: Path) -> None:
    train, _ = data.text(written(tmp_path / "t", "ab" * 10), 3, test_share=0.5)
    with pytest.raises(InvalidArgument, match=f"take: sample {len(train)}: expected 0 to"):
        train.take(np.array([len(train)]))


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_bytes_that_are_not_utf_8(
    block: int, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    before = random_text(rng, int(rng.integers(30))).encode()
    for wrong, byte in ((b"\xffabc", "0xff"), (b"\xc3(", "0xc3"), (b"\xe2\x98", "0xe2")):
        (tmp_path / "t").write_bytes(before + wrong)
        with pytest.raises(
            DataError, match=rf"t: byte {len(before)} is {byte}, .*; expected UTF-8"
        ):
            data.text(tmp_path / "t", 1)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "t: 0 of 0 characters are for train; expected 4 or more: length=3 and the one"),
        ("abc", {}, "t: 3 of 3 characters are for train; expected 4 or more"),
        ("abcabcabc", {}, "t: 1 of 9 characters are for test; expected 4 or more"),
        ("abcabcab", {"test_share": 0.9}, "t: 1 of 8 characters are for train; expected 4"),
        (None, {}, "t: No such file or directory; expected a text in UTF-8"),
    ],
)
def test_texts_that_cannot_be(
    text: str | None, options: dict, message: str, tmp_path: Path
) -> None:
    if text is not None:
        written(tmp_path / "t", text)
    with pytest.raises(DataError, match=message):
        data.text(tmp_path / "t", 3, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "text: length=0: expected a whole number from 1 on"),
        ({"length": 3, "stride": 0}, "text: stride=0: expected a whole number from 1 on"),
        ({"length": 3, "stride": -1}, "text: stride=-1: expected a whole number from 1 on"),
        ({"length": 3, "test_share": 0}, "text: test_share=0: expected more than 0, less than 1"),
        ({"length": 3, "test_share": 1.0}, "text: test_share=1.0: expected more than 0"),
    ],
)
def test_values_that_cannot_be(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=message):
        data.text(written(tmp_path / "t", "ab" * 20), **options)
