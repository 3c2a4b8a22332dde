"""Files of checkpoints: who writes what, and what becomes of damaged and of hostile ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import mpidl
from mpidl import nn
from mpidl.checkpoint import Checkpoints, disk, folder, manifest, reader
from mpidl.checkpoint.pieces import Held, Sheet, shares
from mpidl.errors import CheckpointError, InvalidArgument
from tests.checkpoint_kills import SIZES, State, values, world_of

Rng = np.random.Generator
ROOT = Path(__file__).parents[2]


def save(path: Path, *steps: int, **options: Any) -> Path:
    state = State(world_of(0, 1, None))
    checkpoints = Checkpoints(state, path, **options)
    for state.step in steps:
        checkpoints.save(state.step, extra={"name": "\N{SNOWMAN}"}, position={"batch": 3})
        checkpoints.finish()
    checkpoints.close()
    assert checkpoints.last is not None
    return checkpoints.last


def load(path: Path) -> dict[str, Any]:
    """Read all of a checkpoint."""
    stored, found = reader.look(path), {}
    for t in stored.manifest.tensors:
        for copy in range(t.copies):
            n = int(np.prod(t.shape, dtype=object))
            if n > 10**7:
                raise CheckpointError(f"{path}: as a model would find")
            array = np.empty(n, t.dtype)
            reader.fill(stored, [Held(t.kind, t.name, copy, 0, array)])
            found[f"{t.kind} {t.name} {copy}"] = array
    return found


def outcome(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Return what `load` returns, or what it says is wrong; nothing else may be raised."""
    try:
        return load(path), ""
    except CheckpointError as error:
        return None, str(error)


def assert_same(found: dict[str, Any], step: int) -> None:
    for kind in ("param", "state.first"):
        for name, n in SIZES.items():
            tensor = manifest.Tensor(kind, name, (n,), "float32")
            np.testing.assert_array_equal(found[f"{kind} {name} 0"], values(tensor, step))


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path / "new" / "run", 3, 4)
    assert path.name == "step-00000004"
    assert_same(load(path), 4)
    assert_same(load(path.with_name("step-00000003")), 3)
    made = manifest.read(path)
    assert (made.step, made.ranks, made.extra) == (4, 1, {"name": "\N{SNOWMAN}"})


def test_other_programs_read_the_files(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    found = load_file(save(tmp_path, 7) / "rank-00000.safetensors")
    tensor = manifest.Tensor("param", "weight", (SIZES["weight"],), "float32")
    np.testing.assert_array_equal(found["param:0:0:weight"], values(tensor, 7))


def damage(file: Path, rng: Rng) -> str:
    """Harm a file, so that some of it is no more what was written."""
    content = bytearray(file.read_bytes())
    place = int(rng.integers(len(content)))
    how = str(rng.choice(["flip", "cut", "lengthen", "lose", "folder", "pipe", "link", "zeros"]))
    if how == "flip":
        content[place] ^= 1 << int(rng.integers(8))
    elif how == "cut":
        del content[place:]
    elif how == "lengthen":
        content += b"x"
    elif how == "zeros":
        content[place : place + 4096] = bytes(len(content[place : place + 4096]))
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how == "pipe":
        os.mkfifo(file)
    elif how == "link":
        file.symlink_to("/proc/self/mem")
    elif how != "lose":
        file.write_bytes(content)
    return f"{how} at {place} of {file.name}"


def test_damaged_files_are_told_by_name(rng: Rng, tmp_path: Path) -> None:
    good = save(tmp_path / "run", 5)
    text = {file.name: file.read_bytes() for file in good.iterdir()}
    for _ in range(60):
        path = tmp_path / "step-00000005"
        shutil.copytree(good, path)
        file = path / str(rng.choice(sorted(text)))
        what = damage(file, rng)
        found, problem = outcome(path)
        assert found is not None or str(path) in problem, what
        if found is not None:  # white space in the manifest, or zeros that were there
            assert file.name == "manifest.json" or file.read_bytes() == text[file.name], what
            assert_same(found, 5)
        shutil.rmtree(path)


JUNK: list[Any] = [
    *(None, True, -1, 0, 1, 2**70, 1e308, float("nan"), "", "\0", "../../etc/passwd", "float16"),
    *([], {}, [[]], [2**40, 2**40], {"a": 1}, "rank-00000.safetensors", "x" * 999, [-1], [1.5]),
]


def changed(value: Any, rng: Rng) -> Any:
    """Return `value`, plain JSON, with something in it replaced, left out or added."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = str(rng.choice(sorted(value)))
        kind = rng.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != name}
        if kind < 0.2:
            return {**value, str(rng.choice(["../x", "/etc/passwd", "rank-1"])): value[name]}
        return {**value, name: changed(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = int(rng.integers(len(value)))
        return [*value[:place], changed(value[place], rng), *value[place + 1 :]]
    return JUNK[int(rng.integers(len(JUNK)))]


def write_manifest(path: Path, content: Any) -> None:
    """Write a manifest whose checksum is right."""
    if isinstance(content, dict):
        content.pop("checksum", None)
        content["checksum"] = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    (path / "manifest.json").write_text(json.dumps(content))


def test_hostile_manifests_are_refused(rng: Rng, tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    good = json.loads((path / "manifest.json").read_text())
    refused = 0
    for _ in range(150):
        write_manifest(path, changed(good, rng))
        found, problem = outcome(path)
        refused += found is None
        assert found is not None or str(path) in problem
    assert refused > 50


@pytest.mark.parametrize("text", ["", "[" * 100_000, "\xff", "null", '{"format": 1}', "9" * 5000])
def test_what_is_no_manifest(text: str, tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    (path / "manifest.json").write_text(text, "latin-1")
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        load(path)


def test_hostile_headers_are_refused(rng: Rng, tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    file, content = (
        path / "rank-00000.safetensors",
        json.loads((path / "manifest.json").read_text()),
    )
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    refused = 0
    for _ in range(60):
        text = json.dumps(changed(header, rng)).encode()
        size = len(text) if rng.random() < 0.8 else int(rng.integers(2**63))
        file.write_bytes(size.to_bytes(8, "little") + text + data)
        sums = [zlib.crc32(block) for block in disk.blocks_of(file.read_bytes())]
        entry = {"bytes": file.stat().st_size, "block": disk.BLOCK_BYTES, "crc32": sums}
        write_manifest(path, {**content, "files": {file.name: entry}})
        found, problem = outcome(path)
        refused += found is None
        if found is None:
            assert str(path) in problem
        else:
            assert_same(found, 5)
    assert refused > 20


def test_names_that_lead_elsewhere(tmp_path: Path) -> None:
    path = save(tmp_path / "run", 5)
    content = json.loads((path / "manifest.json").read_text())
    (entry,) = content["files"].values()
    shutil.copy(path / "rank-00000.safetensors", tmp_path)
    for name in ("../../rank-00000.safetensors", str(tmp_path / "rank-00000.safetensors"), ".."):
        write_manifest(path, {**content, "files": {name: entry}})
        with pytest.raises(CheckpointError, match="a file is named"):
            load(path)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_each_element_is_written_once(ranks: int, rng: Rng) -> None:
    """Of random tensors, held by random ranks in random parts."""
    held: list[list[Held]] = [[] for _ in range(ranks)]
    arrays = {}
    for number in range(int(rng.integers(1, 12))):
        dtype = rng.choice(["float32", "float64", "uint8"])
        array = arrays[str(number)] = rng.integers(1, 250, int(rng.integers(0, 500))).astype(dtype)
        cuts = sorted([0, array.size, *rng.integers(0, array.size + 1, ranks - 1).tolist()])
        for rank in range(ranks):  # each has its part, and maybe all
            low, high = (0, array.size) if rng.random() < 0.4 else (cuts[rank], cuts[rank + 1])
            held[rank].append(Held("param", str(number), 0, low, array[low:high]))
    every = [
        [(h.key, h.start, h.start + h.array.size, h.array.itemsize) for h in hs] for hs in held
    ]
    seen = {name: np.zeros(array.size, int) for name, array in arrays.items()}
    nbytes = []
    for rank in range(ranks):
        world: Any = SimpleNamespace(rank=rank, gather=lambda _: every)
        found = shares(world, held[rank])
        sheet = Sheet(held[rank], found)
        sheet.copy(held[rank])
        nbytes.append(sheet.data.size)
        header = json.loads(sheet.header[8:])
        for label, entry in header.items():
            _, _, start, name = label.split(":")
            first, last = entry["data_offsets"]
            part = slice(int(start), int(start) + entry["shape"][0])
            value = sheet.data[first:last].view(arrays[name].dtype)
            np.testing.assert_array_equal(value, arrays[name][part])
            seen[name][part] += 1
    assert all((count == 1).all() for count in seen.values())
    assert sum(nbytes) == sum(array.nbytes for array in arrays.values())


def test_blocks(rng: Rng) -> None:
    sizes = rng.integers(0, 3 * disk.BLOCK_BYTES, 3)
    parts = [rng.bytes(int(n)) for n in sizes]
    blocks = list(disk.blocks_of(*parts))
    assert b"".join(blocks) == b"".join(parts)
    assert {len(block) for block in blocks[:-1]} <= {disk.BLOCK_BYTES}


def test_the_last_are_kept_and_the_newest_come_first(tmp_path: Path) -> None:
    save(tmp_path, 3, 9, 9, 10, keep=3)
    names = ["step-00000010", "step-00000009.1", "step-00000009"]
    assert [path.name for path in folder.complete(tmp_path)] == names
    (tmp_path / "step-00000011").mkdir()  # without a manifest it is none
    (tmp_path / "notes").mkdir()
    assert [path.name for path in folder.complete(tmp_path)] == names
    save(tmp_path, 1, keep=1)  # this run's own is what counts now
    assert [path.name for path in folder.complete(tmp_path)] == ["step-00000001"]


def test_what_others_left_is_removed_unless_they_live(tmp_path: Path) -> None:
    left = tmp_path / ".step-00000007.tmp-0123456789ab"
    left.mkdir()
    living = folder.Claim(tmp_path)
    assert living.had and not left.exists()
    left.mkdir()
    save(tmp_path, 8)  # another run, or so it seems
    assert left.exists()
    living.close()
    save(tmp_path, 9)
    assert not left.exists()


def test_weights_for_inference(tmp_path: Path) -> None:
    state = State(world_of(0, 1, None))
    checkpoints = Checkpoints(state, tmp_path)
    state.tensors = lambda: [manifest.Tensor("param", "weight", (3, 2), "float32")]  # type: ignore[method-assign]
    state.held = lambda: [Held("param", "weight", 0, 0, np.arange(6, dtype=np.float32))]  # type: ignore[method-assign]
    checkpoints._tensors = tuple(state.tensors())
    checkpoints.save(2)
    path = checkpoints.finish()
    assert path is not None
    for source in (tmp_path, path):
        model = mpidl.load(source, nn.Linear(2, 3, bias=False))
        np.testing.assert_array_equal(model.weight.numpy(), np.arange(6).reshape(3, 2))
    with pytest.raises(InvalidArgument, match="shape"):
        mpidl.load(path, nn.Linear(3, 3, bias=False))
    with pytest.raises(CheckpointError, match="no checkpoint is complete"):
        mpidl.load(path.parent.parent / "..", nn.Linear(2, 3))
    checkpoints.close()


@pytest.mark.parametrize(
    "options", [{"folder": ""}, {"folder": "a\0b"}, {"keep": 1.5}, {"best": 3}, {"best": ("a",)}]
)
def test_values_that_cannot_be(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument):
        Checkpoints(State(world_of(0, 1, None)), **{"folder": tmp_path, **options})


def test_extra_is_what_json_has(tmp_path: Path) -> None:
    checkpoints = Checkpoints(State(world_of(0, 1, None)), tmp_path)
    with pytest.raises(InvalidArgument, match="extra: expected a dict of what JSON has"):
        checkpoints.save(1, extra={"model": object()})
    for metrics in ({"loss": "low"}, [1], {(1, 2): 3}, 7):
        with pytest.raises(InvalidArgument, match="metrics: "):
            checkpoints.save(1, metrics=metrics)  # type: ignore[arg-type]
    checkpoints.save(1, metrics={"loss": float("nan"), "right": np.float32(0.5)})
    path = checkpoints.finish()
    assert path is not None and manifest.read(path).metrics == {"right": 0.5}
    checkpoints.close()


def test_random_numbers_go_on() -> None:
    nn.seed(3)
    nn.random.weights().random(5)
    nn.random.generator().random(7)
    state = json.loads(json.dumps(nn.random.get_state()))
    expected = nn.random.weights().random(3), nn.random.generator().random(3)
    nn.seed(9)
    nn.random.set_state(state)
    np.testing.assert_array_equal(nn.random.weights().random(3), expected[0])
    np.testing.assert_array_equal(nn.random.generator().random(3), expected[1])


def test_the_random_bits_of_int8_go_on(rng: Rng) -> None:
    first, second = mpidl.strategies.codecs.Int8(), mpidl.strategies.codecs.Int8()  # type: ignore[attr-defined]
    x = rng.standard_normal(1000).astype(np.float32)
    messages = [np.empty(first.nbytes(1000), np.uint8) for _ in range(3)]
    first.encode(x, messages[0])
    second.set_stream(first.stream())
    for codec, message in zip((first, second), messages[1:], strict=True):
        codec.encode(x, message)
    np.testing.assert_array_equal(messages[1], messages[2])
    assert not np.array_equal(messages[0], messages[1])


def test_kills() -> None:
    line = (sys.executable, "-m", "tests.checkpoint_kills", "--trials", "15", "--json")
    result = subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result
    told = json.loads(result.stdout)
    assert told["loads"] == told["trials"] == 15 and told["failures"] == []
