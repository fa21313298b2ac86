"""Command lines and files as nobody wrote them: lines about mistakes, or work begins; never a traceback, never long.

Everything before training is real; in place of the first compilation, `Reached` is raised.
"""

import contextlib
import json
import random
import re
import sys
import time

import numpy as np
import pytest
from PIL import Image

from autorank_jax.cli import main as cli
from autorank_jax.cli.fields import options_of
from autorank_jax.cli.files import checkpoints_of, write_results, write_run
from autorank_jax.cli.formats import to_csv
from autorank_jax.cli.help import RUN_GROUPS as GROUPS
from autorank_jax.cli.logs import LOGS
from autorank_jax.cli.options import Finetune
from autorank_jax.experiment.config import AGGREGATORS, MODELS, OPTIMIZERS, POLICIES, SAMPLINGS
from autorank_jax.experiment.language_options import DTYPES, LANGUAGE_POLICIES, QUANTIZED, LanguageOptions, as_json
from autorank_jax.experiment.results import client_rows
from autorank_jax.federated.partition import SPLITS
from autorank_jax.ranks.criteria import CRITERIA
from tests.cli.cases import make_results, make_scores

pytestmark = pytest.mark.slow
COMMANDS, FILES = 300, 200
SECONDS = 10 if sys.gettrace() is None else 20  # counting lines takes as long again
NUMBERS = (
    "0", "1", "2", "3", "7", "10", "0.5", "0.1", "1e-9", "1e-300", "1e30", "1e39", "1e300", "1e999", "-1", "-0", "nan",
    "inf", "0x10", "1_000", "٣", "99999", "2147483648", "9" * 30, "9" * 5000, "", " ", "1,", "1,2,3", ",", "½", "1e5",
    "1000000", "-1e-9",
)  # fmt: skip
WORDS = (
    "",
    "x",
    "-",
    "--",
    "a,b",
    "é",
    "\N{BELL}",
    "[/b]",
    ":smile:",
    "../x",
    "{}",
    "\x1b[31m",
    "None",
    "true",
    "a\nb",
)
NAMES = {
    "dataset": ("synthetic", "fashion_mnist_mini", "mnist", "mine"), "split": tuple(SPLITS), "model": tuple(MODELS),
    "optimizer": OPTIMIZERS, "sampling": SAMPLINGS, "rank_policies": tuple(POLICIES), "criteria": tuple(CRITERIA),
    "aggregators": tuple(AGGREGATORS), "log": tuple(LOGS), "policy": LANGUAGE_POLICIES, "dtype": DTYPES,
    "quantize": QUANTIZED,
    "aggregator": tuple(AGGREGATORS), "clients_by": ("category", "kind", ""), "target": ("c", "a", "d"),
}  # fmt: skip
PATHS = (
    "/sys/x", "x" * 300, "/dev/null", "/dev/full", "/proc/self/mem", "~nosuchuser/x", "../table.csv", "../lines.jsonl",
    "..", "/dev/null/x",
)  # fmt: skip
TAKE_PATHS = ("out", "config", "resume", "model", "data", "source")
SAID = re.compile(r"autorank-jax: |\S+: (reading|writing)")
"""Lines on standard error: mistakes, and stages of a conversion."""
FLAGS = ("overwrite", "quiet", "personal", "skip_odd_lines", "clear")
LEFT_OUT = ("distributed", "coordinator", "num_processes", "process_id")  # they wait for others
OPTIONS = {
    "run": [name for group in GROUPS for name in (*group.first, *group.more) if name not in LEFT_OUT],
    "finetune": list(options_of(Finetune)),
    "data fetch": ["source", "target", "overwrite"],
    "cache": ["clear"],
}
TABLE = b"a,b,c\n1,2,x\n2,3,y\n3,4,x\n4,6,y\n"
LINES = 3 * (
    b'{"instruction": "Say 1", "output": "1", "kind": "a"}\n' b'{"prompt": "Say 2", "completion": "2", "kind": "b"}\n'
)  # fmt: skip


class Reached(Exception):  # noqa: N818
    """Training would begin."""


@pytest.fixture
def guard(monkeypatch):
    """Let a name of a module raise `Reached`."""

    def reached(*given, **named):  # noqa: ARG001
        raise Reached

    return lambda name, module="experiment.run": monkeypatch.setattr(f"autorank_jax.{module}.{name}", reached)


def clocks():
    """Read the clock, which runs on while others work, and that of the process, which runs on every core."""
    return time.perf_counter(), time.process_time()


def outcome(arguments, capsys):
    """Run a command: how it ended, and what was wrong with that."""
    begin, wrong = clocks(), []
    try:
        end = cli.main(arguments)
    except Reached:
        end = "reached"
    except SystemExit as stop:
        end = stop.code or 0
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        end = "raised"
        wrong.append(f"{type(error).__name__}: {error}"[:300])
    said = capsys.readouterr().err
    seconds = min(now - then for now, then in zip(clocks(), begin, strict=True))
    if seconds > SECONDS:
        wrong.append(f"took {seconds:.1f} s")
    if end not in (0, 2, 3, "reached", "raised"):
        wrong.append(f"ended with {end}")
    if "Traceback" in said or not all(SAID.match(line) for line in said.splitlines()):
        wrong.append(f"said {said[:300]!r}")
    if end == 2 and not said:
        wrong.append("said nothing")
    return end, wrong


def value_of(name, chance):
    """Return a value for an option: mostly one of its kind."""
    if chance.random() < 0.15:
        return chance.choice((*NUMBERS, *WORDS))
    if name in TAKE_PATHS and (name != "model" or chance.random() < 0.5):  # `run` has models by name
        return chance.choice((*WORDS, *PATHS))
    if name in NAMES:
        chosen = chance.sample(NAMES[name], chance.choice((1, 1, 2)))
        return ",".join(chosen)
    return chance.choice(NUMBERS)


def command_line(chance):
    """Return a command line that may make sense."""
    commands = ("run",) * 9 + ("finetune",) * 4 + ("data fetch",) * 2
    command = chance.choice((*commands, "cache", "ranks", "compare", "data", "completion", ""))
    words = command.split()
    if command == "run" and chance.random() < 0.8:
        words += ["--dataset", "synthetic", "--split", "iid"]
    if command == "data fetch" and chance.random() < 0.9:
        words += [chance.choice(("mine", "mine", "synthetic", "cinic10", "x" * 300, *WORDS))]
    for _ in range(chance.choice((0, 1, 1, 1, 2, 2, 3, 5))):
        name = (
            chance.choice(OPTIONS.get(command, OPTIONS["run"]))
            if chance.random() < 0.9
            else chance.choice((*WORDS, "lr", "seed", "json", "max-rank"))
        )
        option = f"--{name.replace('_', '-')}"
        if name in FLAGS:
            words.append(option)
        elif chance.random() < 0.1:
            words.append(chance.choice((option, f"{option}=", chance.choice(WORDS))))
        else:
            words += [option, value_of(name, chance)]
    return words


def half_written(folder):
    """Return what a failed command has left: anything but whole files of whole runs."""
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.name.endswith(".tmp") or path.name.startswith(".") or path.is_dir()
    ]


def test_generated_command_lines(tmp_path, monkeypatch, guard, capsys):
    guard("training_flops")
    guard("task_from_causal_lm", "experiment.language_setup")
    guard("read_from_tfds", "datasets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "table.csv").write_bytes(TABLE)
    (tmp_path / "lines.jsonl").write_bytes(LINES)
    monkeypatch.setenv("AUTORANK_JAX_DATA", str(tmp_path / "data"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    chance, ends, failures = random.Random(0), {}, []
    for _ in range(COMMANDS):
        words = command_line(chance)
        end, wrong = outcome(words, capsys)
        ends[end] = ends.get(end, 0) + 1
        left = half_written(tmp_path / "here")
        failures += [f"{[word[:60] for word in words]}: {'; '.join([*wrong, *left])}"] if wrong or left else []
        assert not left, failures[-1]
    assert failures == []
    assert ends["reached"] > COMMANDS / 20, "too few of them make sense"
    assert ends[2] > COMMANDS / 4


def damaged(content, chance):
    """Return a file's content with some damage."""
    kind = chance.randrange(7)
    place = chance.randrange(len(content) + 1)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + bytes([chance.randrange(256)]) + content[place + 1 :]
    if kind == 2:
        return content[:place] + chance.randbytes(chance.randrange(1, 20)) + content[place:]
    if kind == 3:
        return b""
    if kind == 4:
        return content.replace(b",", chance.choice((b";", b",,", b"", b",\n")), chance.choice((1, -1)))
    tokens = (b"null", b"NaN", b"1e999", b"-1", b'"x"', b"[]", b"{}", b"true", b"1e30", b"0", b"9" * 5000, b"Infinity")
    start = content.find(b":" if kind == 5 else b",", place)
    ends = [content.find(end, start + 1) for end in (b",", b"\n")]
    stop = min((end for end in ends if end > 0), default=len(content))
    return content[: start + 1] + chance.choice(tokens) + content[stop:]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with one of every file that a command reads."""
    folder = tmp_path_factory.mktemp("sound")
    for name in ("one", "two"):
        write_results(folder / name, make_results())
    (folder / "criteria.csv").write_text("client,size,classes\na,10,1\nb,10,2\nc,40,2\n")
    (folder / "own.csv").write_bytes(to_csv(client_rows(make_scores(0))))
    config = json.loads((folder / "one" / "config.json").read_text()) | {"split": "iid", "rounds": 1, "seeds": 1}
    config |= {
        "hidden": [4],
        "rank_policies": ["full"],
        "aggregators": ["rbla"],
        "criteria": ["size"],
        "rank_levels": 1,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "data").mkdir()
    images, labels = np.arange(320, dtype=np.uint8).reshape(20, 4, 4), np.arange(20, dtype=np.int32) % 5
    np.savez(folder / "data" / "mine.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    (folder / "table.csv").write_bytes(TABLE)
    (folder / "lines.jsonl").write_bytes(LINES)
    options = LanguageOptions(data=folder / "lines.jsonl", clients_by="kind")
    write_run(folder / "lang", {"training": as_json(options)}, checkpoints_of(folder / "lang", every=1, keep=3))
    for part in ("train", "test"):
        for name in "ab":
            (folder / "images" / part / name).mkdir(parents=True)
            Image.fromarray(images[0]).save(folder / "images" / part / name / "0.png")
    with contextlib.redirect_stdout(None):
        run = ["run", "--config", str(folder / "config.json"), "--checkpoint-every", "1", "--devices", "1"]
        assert cli.main([*run, "--local-epochs", "1", "--out", str(folder / "kept"), "--quiet"]) == 0
    return folder


def test_damaged_files(sound, monkeypatch, guard, capsys):
    """Configurations, tables, histories, data sets, instructions, images and checkpoints."""
    monkeypatch.setenv("AUTORANK_JAX_DATA", str(sound / "data"))
    chance, failures, ends = random.Random(0), [], {}
    checkpoints = [p for p in (sound / "kept" / "checkpoints").rglob("*") if p.is_file() and p.stat().st_size]
    run = ["run", "--devices", "1", "--out", str(sound / "out")]
    cases = {
        ("config.json",): [*run, "--config", str(sound / "config.json")],
        ("criteria.csv",): ["ranks", "--criteria", str(sound / "criteria.csv"), "--output", str(sound / "ranks.json")],
        ("own.csv",): ["ranks", "--criteria", str(sound / "own.csv"), "--json"],
        ("one/history.json", "one/config.json", "one/summary.json"): [
            "compare", str(sound / "one"), str(sound / "two"), "--output", str(sound / "picture.png"),
        ],
        ("data/mine.npz",): [*run, "--dataset", "mine", "--split", "iid", "--clients", "2", "--hidden", "4"],
        ("table.csv",): ["data", "fetch", "tabled", "--source", str(sound / "table.csv"), "--overwrite"],
        tuple(f"images/{part}/{name}/0.png" for part in ("train", "test") for name in "ab"): [
            "data", "fetch", "pictures", "--source", str(sound / "images"), "--overwrite",
        ],
        ("lines.jsonl",): [
            "finetune", "--data", str(sound / "lines.jsonl"), "--clients-by", "kind", "--out", str(sound / "out"),
        ],
        ("lang/checkpoints/run.json",): ["finetune", "--resume", str(sound / "lang")],
        tuple(str(p.relative_to(sound)) for p in checkpoints): [
            "run", "--resume", str(sound / "kept"), "--rounds", "2", "--devices", "1",
        ],
    }  # fmt: skip
    guard("make_program")
    guard("task_from_causal_lm", "experiment.language_setup")
    for number in range(FILES):
        names = list(cases)[number % len(cases)]
        path = sound / chance.choice(names)
        content = path.read_bytes()
        path.write_bytes(damaged(content, chance))
        end, wrong = outcome(cases[names], capsys)
        path.write_bytes(content)
        ends[end] = ends.get(end, 0) + 1
        left = [str(p.relative_to(sound)) for p in sound.rglob(".*")] + ["out"] * (sound / "out").exists()
        failures += [f"{path.name} {number}: {'; '.join([*wrong, *left])}"] if wrong or left else []
        for written in ("ranks.json", "picture.png"):
            if (sound / written).exists():
                assert end == 0
                (sound / written).unlink()
    assert failures == []
    assert ends[2] > FILES / 4
