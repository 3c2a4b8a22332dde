"""Traces: what is recorded, merged, and told of it; times are set by the tests."""

from __future__ import annotations

import gzip
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

import mpidl
from mpidl import clock
from mpidl.cli.app import app
from mpidl.clock import COMPUTE, DATA, OTHER, REDUCE, UPDATE, WAIT
from mpidl.errors import InvalidArgument
from mpidl.trace import analysis, clocks, load, merge, parts, ranges, recorder, tracks
from mpidl.trace.recorder import Recorder
from mpidl.trace.tracks import Interval, Span

RUN = "0123456789abcdef"
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


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert ranges.recorder is None and clock.listener is None


def made(folder: Path, rank: int = 0, *, limit: int = 1000, **about: Any) -> Recorder:
    """Return a recorder of one rank, which the test feeds; it has no thread."""
    path = parts.place(folder / "t.json", RUN, rank, 100 + rank, "a")
    process = {"rank": rank, "ranks": 2, "host": "a", "run": RUN, "reference": "r", "machine": "m",
               "attempt": 0, "unix": 1e9 + rank, "seconds": 0.0}  # fmt: skip
    return Recorder(path, {**process, **about}, limit)


def read(folder: Path, name: str = "t.json") -> list[dict[str, Any]]:
    path = folder / name
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return json.loads(data)["traceEvents"]  # type: ignore[no-any-return]


def step(rec: Recorder, number: int, begin: float, *spent: tuple[int, float]) -> float:
    """Record phases one after the other, and a step's end; return when that is."""
    for phase, seconds in spent:
        rec.interval(phase, begin, begin + seconds)
        begin += seconds
    rec.step(number, begin)
    return begin


def summary(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["trace", "summary", *arguments])


def test_what_is_recorded_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(at=0.0)
    monkeypatch.setattr(recorder, "perf_counter", lambda: now.at)
    monkeypatch.setattr(clock, "moved_bytes", 1000)
    rec = made(tmp_path)
    rec.resume()
    rec.interval(OTHER, -5.0, 1.0)  # from before the start
    rec.interval(DATA, 1.0, 1.5)
    now.at = 1.6
    with mpidl.range("outer"):
        now.at = 1.7
        with mpidl.range("inner"):
            now.at = 1.8
        now.at = 1.9
    rec.interval(COMPUTE, 1.5, 2.0)
    rec.split(2.0, 2.4, [0.0, 0.0, 0.1, 0.2, 0.1, 0.0])
    clock.moved_bytes = 1064
    rec.step(7, 2.4)
    rec.interval(OTHER, 2.4, 9.0)  # an evaluation
    rec.interval(COMPUTE, 9.0, 9.5)
    rec.step(8, 9.5)
    rec.close(end=9.5)
    part = parts.read(rec.path)
    assert part is not None and (part.end, part.failed, part.full) == (9.5, False, None)
    found = tracks.of_part(part, lambda times: times)
    assert found.phases == [
        Interval(0.0, 1.0, OTHER),
        Interval(1.0, 1.5, DATA),
        Interval(1.5, 2.0, COMPUTE),
        Interval(2.0, 2.4, -1, (0.0, 0.0, 0.1, 0.2, 0.1, 0.0)),
        Interval(2.4, 9.0, OTHER),
        Interval(9.0, 9.5, COMPUTE),
    ]
    assert found.steps == [(7, 1.0, 2.4, 64.0), (8, 9.0, 9.5, 0.0)]
    assert found.spans == [(0, "outer", 1.6, 1.9, 0.0), (0, "inner", 1.7, 1.8, 0.0)]
    assert part.tracks == ["main thread"]


def test_memory_and_file_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "HELD", 100)
    rec = made(tmp_path, limit=150)
    for i in range(250):
        rec.interval(COMPUTE, float(i), i + 1.0)
    assert rec.taken == 100
    rec.flush()
    rec.resume()
    for i in range(250, 333):
        rec.interval(COMPUTE, float(i), i + 1.0)
    rec.flush()
    assert clock.listener is None  # it is full
    rec.close(end=400.0)
    part = parts.read(rec.path)
    assert part is not None and part.dropped and part.full is not None and part.end == 400.0
    assert part.events[:, 2].tolist() == [float(i) for i in (*range(150, 250), *range(250, 300))]
    merge.merge(tmp_path / "t.json")
    shown = summary(str(tmp_path / "t.json")).stdout
    assert "MPIDL_TRACE_EVENTS" in shown and "left out" in shown, shown


def test_names_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "NAMES", 3)
    rec = made(tmp_path)
    for i in range(9):
        rec.span(f"step {i}", float(i), i + 0.5)
    rec.close()
    part = parts.read(rec.path)
    assert part is not None
    assert part.names == ["step 0", "step 1", "step 2", recorder.OTHERS]
    assert [s.name for s in tracks.of_part(part, lambda t: t).spans][3:] == [recorder.OTHERS] * 6


def test_a_full_disk_ends_the_recording_alone(capfd: pytest.CaptureFixture[str]) -> None:
    rec = Recorder(Path("/dev/full"), {}, 1000)
    rec.start()
    rec.interval(COMPUTE, 0.0, 1.0)
    rec.flush()
    assert clock.listener is None
    rec.flush()
    rec.close(end=1.0)
    assert capfd.readouterr().err.count("No space left") == 1


def test_ranges_in_threads_and_as_decorators(tmp_path: Path) -> None:
    @mpidl.range("function")
    def function(n: int) -> int:
        """Its own words."""
        return n if n == 0 else function(n - 1)

    shared = mpidl.range("shared")
    assert function(2) == 0 and function.__doc__ == "Its own words."
    rec = made(tmp_path)
    late = mpidl.range("late")
    late.__enter__()  # before the recording: it is left out
    rec.resume()
    late.__exit__(None, None, None)

    def work() -> None:
        for _ in range(20):
            with shared, shared:
                function(1)

    threads = [threading.Thread(target=work, name="worker\n") for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(ZeroDivisionError), mpidl.range("fails"):
        1 / 0  # noqa: B018
    rec.close()
    part = parts.read(rec.path)
    assert part is not None
    names = [span.name for span in tracks.of_part(part, lambda times: times).spans]
    assert {name: names.count(name) for name in set(names)} == {
        "shared": 120, "function": 120, "fails": 1,
    }  # fmt: skip
    merge.merge(tmp_path / "t.json")
    check_nesting(read(tmp_path))


def generator() -> Iterator[int]:
    yield 1


async def coroutine() -> None:
    pass


@pytest.mark.parametrize("function", [generator, coroutine, 3])
def test_what_runs_in_pieces_is_refused(function: Any) -> None:
    with pytest.raises(InvalidArgument, match="runs through"):
        mpidl.range("x")(function)


@pytest.mark.parametrize("name", [None, 3, b"x", ["x"]])
def test_a_name_is_a_text(name: Any) -> None:
    with pytest.raises(InvalidArgument, match="expected a name"):
        mpidl.range(name)


def check_nesting(events: list[dict[str, Any]]) -> None:
    """See that what lies in one track lies beside or in each other, to the nanosecond."""
    by_track: dict[Any, list[tuple[int, int]]] = {}
    for event in events:
        if event["ph"] == "X":
            begin = round(1000 * event["ts"])
            span = begin, -(begin + round(1000 * event["dur"]))
            assert begin >= 0 and -span[1] >= begin
            by_track.setdefault((event["pid"], event["tid"]), []).append(span)
    for spans in by_track.values():
        stack: list[int] = []
        for begin, end in sorted(spans):
            while stack and stack[-1] <= begin:
                stack.pop()
            assert not stack or -end <= stack[-1]
            stack.append(-end)


def test_lanes_of_what_does_not_nest(rng: np.random.Generator) -> None:
    pairs = np.sort(rng.integers(0, 40, (60, 2)), axis=1).astype(float).tolist()
    spans = sorted((Span(0, "x", a, b, 0.0) for a, b in pairs), key=lambda s: (s.begin, -s.end))
    placed = tracks.lanes(spans)
    assert [span for _, span in placed] == spans
    names = {"ph": "X", "pid": 0}
    check_nesting([
        {**names, "tid": lane, "ts": span.begin, "dur": span.end - span.begin}
        for lane, span in placed
    ])  # fmt: skip
    nested = [Span(0, "x", 0.0, 9.0, 0.0), Span(0, "x", 1.0, 3.0, 0.0), Span(0, "x", 3.0, 9.0, 0.0)]
    assert {lane for lane, _ in tracks.lanes(nested)} == {0}


def test_clocks_that_are_ahead_and_drift(tmp_path: Path) -> None:
    """Rank 1's clock is 50 s ahead, and gains 1 ms a second: what both saw stands at one time."""

    def theirs(t: float) -> float:
        return t + 50.0 + 1e-3 * t

    times = [1.0, 2.5, 4.0, 10.0]
    rec = made(tmp_path)
    other = made(tmp_path, 1, machine="n", seconds=theirs(0.5))
    for t in times:
        rec.interval(COMPUTE, t, t + 0.5)
        other.interval(COMPUTE, theirs(t), theirs(t + 0.5))
    for t in (0.5, 10.5):
        other.tell({"clock": (theirs(t), theirs(t) - t, 1e-6)})
    third = made(tmp_path, 2, machine="o", reference="another", seconds=7.0, unix=1e9 + 2.0)
    third.interval(COMPUTE, 7.5, 8.0)
    for one in (rec, other, third):
        one.close(end=99.0)
    assert merge.merge(tmp_path / "t.json") == []
    found = [e for e in read(tmp_path) if e["ph"] == "X" and e["name"] == "compute"]
    mine, others, late = ([e for e in found if e["pid"] == pid] for pid in range(3))
    assert [e["ts"] for e in mine] == pytest.approx([1e6 * t for t in times])
    assert [e["ts"] for e in others] == pytest.approx([e["ts"] for e in mine])
    assert [e["dur"] for e in others] == pytest.approx([5e5] * 4)
    # by the time of day: started 2 s after rank 0, whose clock showed 0 then
    assert [e["ts"] for e in late] == pytest.approx([2.5e6])


def test_one_sample_is_an_offset() -> None:
    assert clocks.ahead([(5.0, 2.0, 0.1)], np.array([0.0, 9.0])).tolist() == [2.0, 2.0]
    assert clocks.ahead([], np.array([1.0])).tolist() == [0.0]


def test_a_part_that_was_cut_off(tmp_path: Path, rng: np.random.Generator) -> None:
    rec = made(tmp_path)
    end = 0.0
    for number in range(200):
        end = step(rec, number, end, (COMPUTE, 0.5), (WAIT, 0.25), (REDUCE, 0.25))
        if number % 50 == 0:
            rec.flush()
    rec.close(end=end)
    whole = rec.path.read_bytes()
    for length in (*rng.integers(200, len(whole), 20).tolist(), 0, 1):
        rec.path.write_bytes(whole[:length])
        part = parts.read(rec.path)
        if length < 2:
            assert part is None
            continue
        assert part is not None and part.end is None
        found = tracks.of_part(part, lambda times: times)
        assert [s.number for s in found.steps] == list(range(len(found.steps)))
        assert len(found.steps) >= (length - 600) // 160 - 1
    with pytest.raises(InvalidArgument, match="empty"):
        merge.merge(tmp_path / "t.json")
    rec.path.write_bytes(whole[:5000])
    assert merge.merge(tmp_path / "t.json") == ["no part of rank 1", "rank 0: without an end"]
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(InvalidArgument, match="no parts"):
        merge.merge(tmp_path / "t.json")


def test_parts_of_another_run_are_not_taken(tmp_path: Path) -> None:
    rec = made(tmp_path)
    rec.close(end=1.0)
    old = rec.path.with_name(rec.path.name.replace(RUN, "f" * 16))
    rec.path.rename(old)
    made(tmp_path).close(end=2.0)
    (tmp_path / "t.json.other.part").write_text("")
    merge.merge(tmp_path / "t.json", RUN)
    assert old.exists()
    with pytest.raises(InvalidArgument, match="newer than its parts"):
        merge.merge(tmp_path / "t.json")


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


def test_what_mpidl_run_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIDL_OUT", str(tmp_path))
    run = ["run", "--dry-run", "-n", "2"]
    for options, path in (
        (["--trace"], tmp_path / "trace.json"),
        (["--trace-file", "a b.json"], Path.cwd() / "a b.json"),
    ):
        found = CliRunner().invoke(app, [*run, *options, "true"])
        assert str(path) in found.stdout, found.output
    found = CliRunner().invoke(app, [*run, "--trace-file", str(tmp_path), "true"])
    assert found.exit_code == 2 and "folder" in found.stderr


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


def test_ranges_that_do_not_nest(tmp_path: Path) -> None:
    rec = made(tmp_path)
    rec.resume()
    first, second = mpidl.range("first"), mpidl.range("second")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    rec.close(end=1.0)
    part = parts.read(rec.path)
    assert part is not None
    one, two = tracks.of_part(part, lambda times: times).spans
    assert (one.name, two.name) == ("first", "second")
    assert one.begin < two.begin < one.end < two.end
    merge.merge(tmp_path / "t.json")
    events = read(tmp_path)
    check_nesting(events)
    names = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert names == ["steps", "phases", "main thread", "main thread, 2"]


def test_the_latest_run_is_merged(tmp_path: Path) -> None:
    for age, run in ((50, "e" * 16), (10, "d" * 16), (90, "f" * 16)):
        rec = made(tmp_path)
        rec.close(end=float(age))
        path = rec.path.rename(rec.path.with_name(rec.path.name.replace(RUN, run)))
        os.utime(path, (1e9 - age, 1e9 - age))
    merge.merge(tmp_path / "t.json")
    assert sorted(p.name[7:10] for p in tmp_path.glob("*.part")) == ["eee", "fff"]
