"""From words to a command, its help, and a line for every mistake, all of them at once."""

import dataclasses
import os
import re
import subprocess

import pytest

import autorank_jax
from autorank_jax.cli import main as cli
from autorank_jax.cli.completion import SHELLS, completion
from autorank_jax.cli.fields import options_of
from autorank_jax.cli.files import write_run
from autorank_jax.cli.help import GROUPS, NEARBY
from autorank_jax.cli.options import COMMANDS
from autorank_jax.cli.parsing import parse
from autorank_jax.experiment import config as configuration
from autorank_jax.experiment.checkpoints import Checkpoints
from tests.cli.cases import fails

SEE = "(see autorank-jax {} --help)"


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (
            ["run", "--rounds", "ten", "--split", "stairs", "--lr", "0.1", "--quiet", "yes", "--hidden", "8", "8"],
            [
                "rounds: expected a whole number, got 'ten'",
                f"run: expected an option, got --lr, probably --learning-rate {SEE.format('run')}",
                "quiet: expected no value, got 'yes', probably --quiet alone",
                "hidden: expected whole numbers with commas between them, got spaces, probably '8,8'",
                "split: expected one of iid, dirichlet, shards, quantity, staircase, dirichlet_lognormal, got 'stairs'"
                ", probably 'staircase'",
            ],
        ),
        (["run", "--rounds", "--quiet"], ["rounds: expected a whole number, got none"]),
        (["run", "--rounds", "1e5"], ["rounds: expected a whole number, got '1e5', probably 100000"]),
        (["run", "--rounds", "1_0"], ["rounds: expected a whole number, got '1_0', probably 10"]),
        (["run", "--alpha", "２"], ["alpha: expected a number, got '２', probably 2"]),
        (["run", "--alpha=0,1"], ["alpha: expected a number, got '0,1', probably 0.1"]),
        (["run", "--participation", "50%"], ["participation: expected a number, got '50%', probably 0.5"]),
        (
            ["run", "--dp-epsilon", "0"],
            ["dp-epsilon: expected a number above 0, got 0: leave it out for a run without privacy"],
        ),
        (["run", "--dp-clip", "0.3"], ["dp-clip: expected only with --dp-epsilon, got it without, probably forgotten"]),
        (["run", "--lanes", "x"], ["lanes: expected a whole number or auto, got 'x'"]),
        (["run", "--out", ""], ["out: expected a path, got '', probably a shell variable that is empty"]),
        (["run", "--hidden", "8,x"], ["hidden: expected whole numbers with commas between them, got '8,x'"]),
        (["run", "--quiet=true"], ["quiet: expected no value, got 'true', probably --quiet alone"]),
        (
            ["run", "--clients", "x", "--ratios", "1", "--rank-policies", "manual"],  # how many ratios is not known
            ["clients: expected a whole number, got 'x'"],
        ),
        (
            ["finetune", "--rounds", "x", "--max-rank", "0", "--max-ranks", "3"],
            [
                "rounds: expected a whole number, got 'x'",
                f"finetune: expected an option, got --max-ranks, probably --max-rank {SEE.format('finetune')}",
                "max-rank: expected a whole number of at least 1, got 0",
            ],
        ),
        (["ranks", "clients.csv"], ["criteria: expected --criteria PATH, got 'clients.csv' alone, probably without the "
                                    "option before it"]),
        (
            ["ranks", "--rounds", "3"],
            [
                f"ranks: expected an option, got --rounds, which belongs to run and finetune {SEE.format('ranks')}",
                f"criteria: expected --criteria PATH, got none {SEE.format('ranks')}",
            ],
        ),
        (
            ["run", "--data", "a"],
            [f"run: expected an option, got --data, probably --dataset, or finetune, which has it {SEE.format('run')}"],
        ),
        (["compare", "a", "--out", "x"], [f"compare: expected an option, got --out, probably --output "
                                          f"{SEE.format('compare')}"]),
        (["data", "lst"], [f"expected one of list, fetch, got 'lst', probably list {SEE.format('data')}"]),
        (["data", "fetch"], [f"name: expected NAME, got none {SEE.format('data fetch')}"]),
        (["data", "fetch", "a", "b"], [f"data fetch: expected an option, got 'b' {SEE.format('data fetch')}"]),
        (["cache", "-x"], [f"cache: expected an option, got -x {SEE.format('cache')}"]),
        (["rnu"], ["expected one of run, finetune, compare, ranks, data, cache, completion, got 'rnu', probably run "
                   "(see autorank-jax --help)"]),
    ],
)  # fmt: skip
def test_mistakes(words, lines, capsys):
    assert fails(capsys, *words).splitlines() == [f"autorank-jax: {line}" for line in lines]


def test_commands_are_what_their_words_say():
    words = "--hidden 8,4 --learning_rate=-1e-3 --rank-levels 2 --personal --no-cache --devices 3"
    run = parse(["run", *words.split()])
    options = run.experiment
    assert (options.hidden, options.learning_rate, options.rank_levels, options.lanes) == ((8, 4), -1e-3, 2, "auto")
    assert (options.personal, run.no_cache, run.launch.devices, run.quiet) == (True, True, 3, False)
    assert [path.name for path in parse(["compare", "a,b", "--output", "x.png", "c"]).runs] == ["a,b", "c"]
    assert parse(["ranks", "--criteria", "-", "--cost", "a, b,"]).cost == ("a", "b")
    assert parse(["data", "list"]) == parse(["data"])
    assert parse(["data", "fetch", "--overwrite", "mnist"]).name == "mnist"


def test_a_file_of_options_goes_before_the_others(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text('{"rounds": 7, "personal": true, "seeds": 2}')
    read = parse(["run", "--seeds", "5", "--config", str(path), "--no-personal"]).experiment
    assert (read.rounds, read.seeds, read.personal) == (7, 5, False)
    path.write_text('{"roundz": 7, "nothing_like_it": 1, "seeds": "x"}')
    assert fails(capsys, "run", "--config", path).splitlines() == [
        "autorank-jax: config: expected one of 48 names, got 'roundz', probably 'rounds'",
        "autorank-jax: config: expected one of 48 names, got 'nothing_like_it' (run --help-all)",
        "autorank-jax: seeds: expected a number, got 'x'",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "config: expected JSON in {}, got an empty file"),
        (b'{"rounds": 3,\n x', "config: expected JSON in {}, got none from line 2 on"),
        (b"\x89PNG", "config: expected JSON in {}, got bytes that are no text"),
        (b'{"a": 1, "b": 1, "c": 1, "d": 1}', "config: expected options of a run, got a, b, c and 1 more, probably "
         "another file"),
    ],
)  # fmt: skip
def test_files_that_hold_no_options(content, message, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    for given in (path, tmp_path):  # the folder of a run stands for its file
        assert fails(capsys, "run", "--config", given) == f"autorank-jax: {message.format(path)}\n"


def test_a_run_that_is_taken_up_stays_as_it_is(tmp_path, capsys):
    options = dataclasses.asdict(configuration.Experiment(rank_policies=("full",)))
    write_run(tmp_path, {"experiment": options}, Checkpoints(tmp_path / "checkpoints", 5, 3))
    read = parse(["run", "--resume", str(tmp_path), "--rounds", "99", "--rank-policies", "full", "--quiet"])
    assert (read.experiment.rounds, read.checkpoint_every, read.quiet) == (99, 5, True)
    changed = ["--learning-rate", "0.5", "--rank-policies", "full,uniform"]
    assert [line.partition("; ")[0] for line in fails(capsys, "run", "--resume", tmp_path, *changed).splitlines()] == [
        "autorank-jax: learning-rate: expected 0.01 beside --resume, as that run has it, got 0.5",
        "autorank-jax: rank-policies: expected full beside --resume, as that run has it, got full,uniform",
    ]


def printed(capsys, *words):
    """Return what is printed at once."""
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("asked", ["--help", "-h"])
def test_help_fits_its_screens(command, asked, capsys):
    lines = printed(capsys, *command.split(), *(["--rounds", "x"] if command == "run" else []), asked).splitlines()
    assert lines[0].startswith(f"usage: {' '.join(['autorank-jax', *command.split()])}")
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 66
    assert any(re.match(r"(example: | +)autorank-jax ", line) for line in lines[-4:])
    if command:
        options = options_of(COMMANDS[command])
        text = "\n".join(lines)
        shown = [option for option in options.values() if re.search(f"^  {option.flag}( |$)", text, re.MULTILINE)]
        assert len(shown) == len(options) or command == "run"
        assert not any(default in text for default in ("None", "False", "MISSING", "[]"))


def test_help_on_run_is_in_groups(capsys):
    lines = printed(capsys, "run", "--help").splitlines()
    assert len(lines) <= 60
    titles = [line for line in lines if line.isalpha()]
    assert titles == ["data", "model", "federation", "ranks", "training", "output", "devices"]
    assert any(line.startswith("  --learning-rate X ") and line.endswith(" [0.01]") for line in lines)
    assert "--clip-norm" not in "".join(lines)


def test_help_explains_every_option(capsys):
    text = printed(capsys, "run", "--help-all")
    for option in options_of(COMMANDS["run"]).values():
        assert re.search(f"^  {option.flag} .*[a-z]", text, re.M)
    assert "[autorank,by_size,uniform,full]" in "".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    for words in (configuration.POLICIES, configuration.AGGREGATORS):
        for name in words:
            assert re.search(rf"^  {name} +\w", text, re.MULTILINE), f"{name} is explained"


def test_groups_and_near_words_name_options_that_exist():
    for command, groups in GROUPS.items():
        named = [name for group in groups for name in (*group.first, *group.more)]
        assert sorted(named) == sorted(options_of(COMMANDS[command]))
    known = {option.name.replace("_", "-") for kind in COMMANDS.values() for option in options_of(kind).values()}
    assert {word for words in NEARBY.values() for word in words} <= known


def test_version(capsys):
    assert re.match(rf"autorank-jax {re.escape(autorank_jax.__version__)}, jax \d", printed(capsys, "--version"))


def test_completion(capsys):
    assert printed(capsys, "completion", "bash") == completion("bash") + "\n"
    for shell in SHELLS:
        assert all(word in completion(shell) for word in ("autorank-jax", "learning-rate", "clients-by", "finetune"))
    ask = "\n".join(
        [
            completion("bash"),
            "COMP_WORDS=(autorank-jax run --round); COMP_CWORD=2; _autorank_jax; echo ${COMPREPLY[@]}",
            "COMP_WORDS=(autorank-jax data fetch --s); COMP_CWORD=3; _autorank_jax; echo ${COMPREPLY[@]}",
            "COMP_WORDS=(autorank-jax r); COMP_CWORD=1; _autorank_jax; echo ${COMPREPLY[@]}",
        ]
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.splitlines() == ["--rounds", "--source", "run ranks"]
