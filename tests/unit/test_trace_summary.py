"""`mpidl trace summary`: of made-up traces, whose stragglers and critical paths are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

import mpidl
from mpidl.cli.app import app
from mpidl.clock import COMPUTE, DATA, OTHER, REDUCE, UPDATE, WAIT
from mpidl.errors import InvalidArgument
from mpidl.trace import analysis, load, merge, ranges, tracks
from tests.unit.test_trace import check_nesting, made, read, step, summary

HOSTILE = [
    'a "quote"',
    "line\nbreak",
    "\x1b[2J\x00",
    "\udc80",
    "{}[bold]",
    "x" * 10_000,
    "",
    "日本",
    "語" * 150,
]


def slow_rank(folder: Path, slow: int = 2, ranks: int = 3) -> Path:
    """Make a trace of 4 steps, in which rank `slow` loses 0.3 s in a range; in step 2 by data."""
    ends = dict.fromkeys(range(ranks), 0.0)
    recorders = [made(folder, rank, ranks=ranks) for rank in range(ranks)]
    for number in range(4):
        arrivals = {}
        for rank in range(ranks):
            data = 0.1 + (0.5 if rank == slow and number == 2 else 0.0)
            extra = 0.3 if rank == slow and number != 2 else 0.0
            begin = ends[rank]
            recorders[rank].interval(DATA, begin, begin + data)
            recorders[rank].interval(COMPUTE, begin + data, begin + data + 1.0 + extra)
            recorders[rank].span("inner", begin + data + 0.5, begin + data + 0.6 + extra)
            recorders[rank].span("outer", begin + data + 0.25, begin + data + 0.75 + extra)
            arrivals[rank] = begin + data + 1.0 + extra
        last = max(arrivals.values())
        for rank, arrived in arrivals.items():
            if last > arrived:
                recorders[rank].interval(WAIT, arrived, last)
            recorders[rank].interval(COMPUTE, last, last + 1e-6)  # what stands between
            recorders[rank].split(last + 1e-6, last + 0.2, [0, 0, 0, 0.15, 0.05 - 1e-6, 0])
            recorders[rank].step(number, last + 0.2)
            ends[rank] = last + 0.2
    for rec in recorders:
        rec.close(end=9.0)
    path = folder / "t.json"
    assert merge.merge(path) == []
    return path


def test_the_straggler_and_the_critical_path(tmp_path: Path) -> None:
    path = slow_rank(tmp_path)
    check_nesting(read(tmp_path))
    told = json.loads(summary(str(path), "--json", "--steps", "3").stdout)
    assert [one["step"] for one in told["worst"]] == [2, 0, 1]
    for one in told["worst"]:
        by_data = one["step"] == 2
        late = 0.5 if by_data else 0.3
        assert one["last"] == "rank 2 on a" and one["ranks"] == 3
        assert one["because"] == ("data" if by_data else "range inner")
        assert one["late"] == pytest.approx(late, abs=2e-6)
        assert one["seconds_more"] == pytest.approx(late)
        assert one["seconds"] == pytest.approx(1.3 + late)
        assert (one["wait"], one["reduce"], one["update"]) == pytest.approx(
            (0, 0.15, 0.05), abs=2e-6
        )
    totals = told["totals"]
    assert totals["seconds"] == pytest.approx(3 * 1.6 + 1.8)
    path_of = {name: one["seconds"] for name, one in totals["path"].items()}
    assert path_of == pytest.approx(
        {"compute": 4.9, "data": 0.9, "wait": 0, "reduce": 0.6, "update": 0.2, "other": 0}, abs=1e-5
    )
    assert sum(one["share"] for one in totals["path"].values()) == pytest.approx(1)
    assert totals["stragglers"][0] == {
        "rank": "rank 2 on a", "last": 4, "seconds": pytest.approx(1.4, abs=1e-5),
    }  # fmt: skip
    assert totals["causes"] == pytest.approx({"range inner": 0.9, "data": 0.5}, abs=1e-5)
    named = {one["name"]: one for one in totals["ranges"]}
    assert named["outer"]["calls"] == 12 and named["outer"]["most"] == "rank 2 on a"
    assert named["inner"]["seconds"] == pytest.approx(12 * 0.1 + 3 * 0.3)
    text = summary(str(path)).stdout
    assert "rank 2" in text and "range inner" in text
    assert max(map(len, text.splitlines())) <= 80


def test_ranks_and_steps_that_are_missing(tmp_path: Path) -> None:
    rec, other = made(tmp_path), made(tmp_path, 1)
    end = 0.0
    for number in range(3):
        begin, end = end, step(rec, number, end, (COMPUTE, 1.0), (REDUCE, 0.5))
        if number == 1:
            step(other, number, begin, (COMPUTE, 0.5), (WAIT, 0.5), (REDUCE, 0.5))
    step(rec, 1, end, (COMPUTE, 1.0), (REDUCE, 0.5))  # again, after a rank has died
    rec.close(end=end)
    other.close(failed=2.0)
    notes = merge.merge(tmp_path / "t.json.gz".removesuffix(".gz"))
    assert notes == ["rank 1: ended by an error"]
    told = json.loads(summary(str(tmp_path / "t.json"), "--json").stdout)
    assert sorted((one["step"], one["ranks"]) for one in told["worst"]) == [
        (0, 1), (1, 1), (1, 2), (2, 1),
    ]  # fmt: skip
    both = next(one for one in told["worst"] if one["ranks"] == 2)
    assert (both["last"], both["because"]) == ("rank 0 on a", "compute")
    labels = [e["args"]["labels"] for e in read(tmp_path) if e["name"] == "process_labels"]
    assert labels == ["ended by an error"]


def test_one_rank_and_no_steps(tmp_path: Path) -> None:
    rec = made(tmp_path, ranks=1)
    rec.interval(OTHER, 0.0, 1.0)
    rec.close(end=1.0)
    assert merge.merge(tmp_path / "t.json") == []
    found = summary(str(tmp_path / "t.json"))
    assert found.exit_code == 0 and found.stdout.startswith("0 steps on 1 rank"), found.stdout


def test_steps_of_a_script_that_only_averages(tmp_path: Path) -> None:
    rec, other = made(tmp_path), made(tmp_path, 1)
    for i in range(3):
        rec.interval(OTHER, i * 2.0, i * 2.0 + 1.5)
        other.interval(OTHER, i * 2.0, i * 2.0 + 1.0)
        other.interval(WAIT, i * 2.0 + 1.0, i * 2.0 + 1.5)
        for one in (rec, other):
            one.interval(REDUCE, i * 2.0 + 1.5, i * 2.0 + 1.6)
            one.interval(OTHER, i * 2.0 + 1.6, i * 2.0 + 1.6001)
            one.interval(REDUCE, i * 2.0 + 1.6001, i * 2.0 + 2.0)
            one.span(ranges.AVERAGE, i * 2.0 + 1.5, i * 2.0 + 1.99, 8.0)
    rec.close(end=6.0)
    other.close(end=6.0)
    merge.merge(tmp_path / "t.json")
    told = json.loads(summary(str(tmp_path / "t.json"), "--json").stdout)
    assert [one["last"] for one in told["worst"]] == ["rank 0 on a"] * 3
    assert {one["because"] for one in told["worst"]} == {"other"}
    names = [e["name"] for e in read(tmp_path) if e["ph"] == "X" and e["tid"] == merge.STEPS]
    assert names == ["average 0", "average 1", "average 2"] * 2
    assert [e["args"]["bytes"] for e in read(tmp_path) if e.get("cat") == "step"] == [8] * 6


def test_hostile_names(tmp_path: Path) -> None:
    rec = made(tmp_path, host="b\x1b[1m\n'\"")
    rec.resume()
    for name in HOSTILE:
        with mpidl.range(name):
            pass
    rec.interval(COMPUTE, 0.0, 1.0)
    rec.step(0, 1.0)
    rec.close(end=1.0)
    path = tmp_path / "t.json.gz"
    rec.path.rename(rec.path.with_name(rec.path.name.replace("t.json", path.name)))
    merge.merge(path)
    found = [e["name"] for e in read(tmp_path, path.name) if e.get("cat") == "range"]
    wanted = [name.encode(errors="replace").decode()[:200] for name in HOSTILE]
    assert sorted(found) == sorted(wanted)
    shown = summary(str(path))
    assert shown.exit_code == 0
    for line in shown.stdout.splitlines():
        assert line.isprintable() and cell_len(line) <= 80, line
    assert "日本" in shown.stdout


@pytest.mark.parametrize(
    "text", ["", "hello", "[]", "{}", '{"traceEvents": []}', "\x1f\x8bnonsense", "[" * 100_000]
)
def test_what_is_no_trace(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(text.encode("latin-1"))
    found = summary(str(path))
    assert (found.exit_code, found.stdout) == (2, "")
    assert len(found.stderr.splitlines()) == 1 and found.stderr.startswith("mpidl: "), found.stderr


def test_files_that_are_not_there(tmp_path: Path) -> None:
    made(tmp_path).close()
    found = summary(str(tmp_path / "t.json"))
    assert found.exit_code == 2 and "mpidl trace merge" in found.stderr
    assert summary(str(tmp_path)).exit_code == 2
    assert CliRunner().invoke(app, ["trace", "merge", str(tmp_path / "u.json")]).exit_code == 2
    with pytest.raises(InvalidArgument, match="no such file"):
        load.load(tmp_path / "u.json")


def test_update_is_a_phase() -> None:
    assert tracks.LOCAL == (COMPUTE, DATA, OTHER)
    assert not {WAIT, REDUCE, UPDATE} & set(tracks.LOCAL)


def test_the_path_goes_over_to_who_ends_last(tmp_path: Path) -> None:
    """Ranks come after 1, 1.5 and 3 s; the first one needs the longest for the update."""
    for rank, (work, update) in enumerate([(1.0, 0.75), (1.5, 0.25), (3.0, 0.25)]):
        rec = made(tmp_path, rank, ranks=3)
        waits = [(WAIT, 3.0 - work)] if work < 3.0 else []
        end = step(rec, 0, 0.0, (COMPUTE, work), *waits, (REDUCE, 0.5), (UPDATE, update))
        rec.close(end=end)
    merge.merge(tmp_path / "t.json")
    (found,) = analysis.steps_of(load.load(tmp_path / "t.json")[0])
    assert (found.last, found.because) == ("rank 2 on a", "compute")
    assert found.late == pytest.approx(3.0 - 1.25) and found.seconds == pytest.approx(4.25)
    assert found.seconds_more == pytest.approx(3.0 - 1.25)
    assert list(found.phases.values()) == pytest.approx([3.0, 0, 0, 0.5, 0.75, 0])


def test_steps_of_one_number_belong_together_while_they_overlap() -> None:
    """Ranks 0 and 1 make step 5; rank 1 dies, and rank 2 makes it again with rank 0."""

    def steps(*times: tuple[float, float]) -> analysis.Process:
        return analysis.Process("", steps=[tracks.Step(5, *time, 0.0) for time in times])

    processes = {0: steps((0.0, 1.0), (3.0, 4.0)), 1: steps((0.1, 1.1)), 2: steps((3.1, 3.9))}
    assert [sorted(group) for group in analysis.grouped(processes)] == [[0, 1], [0, 2]]
