"""examples/pytorch: each on 1 and 2 ranks; docs/frameworks.md: its code runs on 2 ranks."""

from __future__ import annotations

import ast
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests import examples_page, job
from tests.conftest import SEED

pytest.importorskip("torch", reason="needs PyTorch: pip install 'mpidl[torch]'")

FOLDER = job.ROOT / "examples/pytorch"
PAGE = (job.ROOT / "docs/frameworks.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
LINE = "import mpidl.torch as hvd"
WORDS, COUNT = 16, 2400  # of four letters: 0.8 bits for each character of the text

# Runs scripts one after the other, in one job: to start one takes the longest. Horovod's users have
# `horovod.torch`; here that is mpidl's.
ALL = """
import runpy, shutil, sys, types, warnings
import mpidl, mpidl.torch, torch

sys.modules["horovod"] = types.ModuleType("horovod")
sys.modules["horovod.torch"] = sys.modules["horovod"].torch = mpidl.torch
world = mpidl.init()
for label, file, *options in RUNS:
    if world.rank == 0:
        print("==", label, flush=True)
    sys.argv = [file, *options]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = runpy.run_path(file, run_name="__main__")
    world.barrier()  # what it saved is there
    if world.rank == 0 and label == "stop":
        shutil.copytree("stopped", "kept")
    if world.rank == 0 and label == "synthetic":
        model = names["network"](64)
        print(f"width 64       {sum(p.numel() for p in model.parameters())} parameters")
        print(f"features       {tuple(model[:-3](torch.zeros(1, 3, 32, 32)).shape)}")
if world.rank == 0:
    print("== end")
"""

# Runs blocks of the page, each by itself.
ONE_BY_ONE = """
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "__array__ implementation")  # Keras 3.15 with NumPy 2.4
for number, block in BLOCKS.items():
    print("block", number, flush=True)
    exec(compile(block, f"block {number}", "exec"), {"__name__": "__main__"})
"""
KINDS = {"tensorflow": "tensorflow", "jax": "jax|keras", "torch": ""}  # what a process can import


def blocks(kind: str) -> dict[int, str]:
    """Return the blocks of the page, by number, whose imports are the first to fit a kind."""
    found = {}
    for i, block in enumerate(CODE):
        imports = " ".join(re.findall(r"^(?:import|from) (.*)", block, re.MULTILINE))
        if next(kind for kind, pattern in KINDS.items() if re.search(pattern, imports)) == kind:
            found[i] = block
    return found


class Jobs:
    """What each script printed, on 1 and on 2 ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.told = folder, dict[int, dict[str, str]]()
        rng = np.random.default_rng([SEED, 7])
        words = ["".join(rng.choice(list("abcdefghijklm"), 4)) for _ in range(WORDS)]
        self.text = folder / "text"
        self.text.write_text(" ".join(rng.choice(words, COUNT)))
        text = (FOLDER / "digits.py").read_text()
        self.changed = folder / "horovod_digits.py"
        self.changed.write_text(text.replace(f"\n{LINE}\n", "\nimport horovod.torch as hvd\n"))
        for ranks in (2, 1):  # the second goes on from a checkpoint of the first
            self.told[ranks] = self.run(ranks)

    def run(self, ranks: int) -> dict[str, str]:
        both = [
            ("digits", "digits.py", f"--batch-size={64 // ranks} --lr={0.1 / ranks} --epochs=10"),
            ("gan", "gan.py", f"--batch-size=96 --epochs={1 if ranks == 1 else 12}"),
            ("synthetic", "synthetic.py", self.small()),
            ("transformer", "transformer.py", self.writer()),
            ("go on", "transformer.py", self.writer("--checkpoint=stopped")),
        ]
        alone = [("at once", "transformer.py", self.writer("--accumulate=1 --stop-after=1"))]
        together = [
            ("stop", "transformer.py", self.writer("--checkpoint=stopped --stop-after=1")),
            ("digits fp16", "digits.py", "--lr=0.05 --epochs=2 --fp16-allreduce"),
            ("horovod", str(self.changed), "--lr=0.05 --epochs=2"),
            ("adasum", "synthetic.py", self.small("--use-adasum")),
            ("fp16", "synthetic.py", self.small("--fp16-allreduce")),
        ]
        runs = [*alone, *both] if ranks == 1 else [*together, *both]
        if ranks == 2:
            for i, block in blocks("torch").items():
                (self.folder / f"block {i}.py").write_text(block)
                runs.append((f"block {i}", str(self.folder / f"block {i}.py"), ""))
        lines = [(label, str(FOLDER / name), *line.split()) for label, name, line in runs]
        path = job.script(self.folder, f"RUNS = {lines}\n{ALL}")
        if ranks == 1:
            shutil.rmtree(self.folder / "stopped")
            (self.folder / "kept").rename(self.folder / "stopped")
        result = job.run("openmpi", ranks, path, cwd=self.folder, timeout=120, OMP_NUM_THREADS="1")
        assert result.status == 0, result
        parts = re.split(r"^== (.*)\n", result.output, flags=re.MULTILINE)
        assert parts[0] == "" and parts[-2] == "end" and parts[-1] == "", result
        return dict(zip(parts[1::2], parts[2::2], strict=True))

    @staticmethod
    def small(option: str = "") -> str:
        return (
            "--width=4 --batch-size=4 --num-warmup-batches=1 --num-batches-per-iter=2 "
            f"--num-iters=3 {option}"
        )

    def writer(self, option: str = "") -> str:
        return f"--text={self.text} --width=32 --epochs=3 --batch-size=24 {option}"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("jobs"))


def number(told: str, label: str) -> float:
    """Return the number that follows a label; of a percentage, the share."""
    found = re.search(rf"^{label} +([\d.,]+)(%?)", told, re.MULTILINE)
    assert found, (label, told)
    return float(found[1].replace(",", "")) / (100 if found[2] else 1)


def losses(told: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^epoch .*loss ([\d.]+)$", told, re.MULTILINE)]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["digits", "gan", "synthetic", "transformer"])
def test_each_ends_as_the_page_says(name: str, ranks: int, jobs: Jobs) -> None:
    told = jobs.told[ranks][name].split("width 64 ")[0]  # of `ALL`
    examples_page.check(f"pytorch/{name}.py", told)


@pytest.mark.parametrize("ranks", [1, 2])
def test_digits(ranks: int, jobs: Jobs) -> None:
    told = jobs.told[ranks]["digits"]
    assert number(told, "test accuracy") >= 0.95
    assert told.endswith("% on 359 digits never trained on\n")
    assert len(losses(told)) == 10 and losses(told)[-1] < 0.1 * losses(told)[0]
    # Two parts of 32 are a batch of 64. Momentum makes rounding grow: measured, 2e-7 of the loss
    # after 4 epochs, 4e-2 after 8; with float64 nothing is seen.
    assert losses(told)[:3] == pytest.approx(losses(jobs.told[1]["digits"])[:3], rel=1e-4)


def test_digits_in_16_bits(jobs: Jobs) -> None:
    rounded, exact = (losses(jobs.told[2][name])[:2] for name in ("digits fp16", "digits"))
    assert rounded == pytest.approx(exact, rel=1e-2)
    assert rounded != exact


def test_only_one_line_of_digits_is_not_horovods(jobs: Jobs) -> None:
    ours, theirs = (file.read_text() for file in (FOLDER / "digits.py", jobs.changed))
    pairs = zip(ours.splitlines(), theirs.splitlines(), strict=True)
    assert [(a, b) for a, b in pairs if a != b] == [(LINE, "import horovod.torch as hvd")]
    for file in (FOLDER / "digits.py", FOLDER / "synthetic.py"):
        text = file.read_text()
        code = ast.unparse(ast.parse(text).body[1:])  # without the docstring
        assert code.count("mpidl") == code.count(LINE) == 1 and LINE in ast.get_docstring(
            ast.parse(text)
        )
    assert losses(jobs.told[2]["horovod"]) == losses(jobs.told[2]["digits"])[:2]


@pytest.mark.parametrize(
    ("ranks", "name"), [(1, "synthetic"), (2, "synthetic"), (2, "adasum"), (2, "fp16")]
)
def test_synthetic(ranks: int, name: str, jobs: Jobs) -> None:
    told = jobs.told[ranks][name]
    rates = [
        float(r) for r in re.findall(r"^iter \d +([\d.]+) img/s per rank$", told, re.MULTILINE)
    ]
    assert len(rates) == 3
    mean, spread = np.mean(rates), 1.96 * np.std(rates)
    for label, times in (("per rank", 1), ("total", ranks)):
        found = re.search(rf"^{label} +([\d.]+) \+- ([\d.]+) img/s$", told, re.MULTILINE)
        assert found, told
        assert float(found[1]) == pytest.approx(times * mean, abs=0.2)
        assert float(found[2]) == pytest.approx(times * spread, abs=0.5)
    assert number(told, "ranks") == ranks
    if name == "synthetic":  # 9 x 9 = 81 - 32 fewer weights in front than for large pictures
        assert number(told, "width 64") == 11_689_512 - 3 * 64 * (7 * 7 - 3 * 3)
        assert "features       (1, 512, 4, 4)" in told


@pytest.mark.parametrize("ranks", [1, 2])
def test_gan(ranks: int, jobs: Jobs) -> None:
    told = jobs.told[ranks]["gan"]
    if ranks == 2:
        assert number(told, "drawn digits") >= 0.1  # of pictures of nothing: 0
    assert number(told, "real digits") >= 0.85
    found = re.findall(r"^epoch 1 +critic ([\d.]+) generator ([\d.]+)$", told, re.MULTILINE)
    alone = re.findall(r"^epoch 1 +critic ([\d.]+) generator", jobs.told[1]["gan"], re.MULTILINE)
    assert float(found[0][0]) == pytest.approx(float(alone[0]), rel=1e-3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_transformer(ranks: int, jobs: Jobs) -> None:
    told = jobs.told[ranks]["transformer"]
    whole = losses(told)
    assert len(whole) == 3 and whole[-1] < 0.9 * whole[0]
    assert number(told, "test loss") == pytest.approx(whole[-1] / np.log(2), rel=0.2)
    # the same on any number of ranks, and however a batch is cut
    assert whole == pytest.approx(losses(jobs.told[1]["transformer"]), rel=1e-4)
    assert whole[:1] == pytest.approx(losses(jobs.told[1]["at once"]), rel=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_transformer_goes_on(ranks: int, jobs: Jobs) -> None:
    whole = jobs.told[2]["transformer"]
    assert losses(jobs.told[2]["stop"]) == pytest.approx(losses(whole)[:1], rel=1e-4)
    again = jobs.told[ranks]["go on"]  # from what 2 ranks saved
    assert losses(again) == pytest.approx(losses(whole)[1:], rel=1e-4)
    assert number(again, "test loss") == pytest.approx(number(whole, "test loss"), rel=1e-3)


def test_every_example_is_told_of() -> None:
    assert {file.name for file in FOLDER.glob("*.py")} == {
        "digits.py", "gan.py", "synthetic.py", "transformer.py"
    }  # fmt: skip
    links = re.findall(r"\]\((?!http)([^)#]+)\)", PAGE)
    assert links
    assert [link for link in links if not (job.ROOT / "docs" / link).exists()] == []
    assert all(f"examples/pytorch/{file.name}" in PAGE for file in FOLDER.glob("*.py"))


@pytest.mark.parametrize("number", blocks("torch"))
def test_code_of_the_page_runs(number: int, jobs: Jobs) -> None:
    assert jobs.told[2][f"block {number}"] == ""


@pytest.mark.parametrize("kind", ["jax", "tensorflow"])
def test_code_of_the_page_runs_in(kind: str, tmp_path: Path) -> None:
    found = blocks(kind)
    assert found
    for block in found.values():
        compile(block, "page", "exec")
    missing = [name for name in {"jax": "jax keras"}.get(kind, kind).split() if not find_spec(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed")
    settings = {"KERAS_BACKEND": "jax", "KERAS_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    settings |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    script = job.script(tmp_path, f"BLOCKS = {found}\n{ONE_BY_ONE}")
    result = job.run("openmpi", 2, script, cwd=tmp_path, timeout=60, **settings)
    assert result.status == 0, result
    expected = [f"block {i}" for i in found]
    assert sorted(result.output.splitlines()) == sorted(2 * expected), result
