"""Compiled programs are kept where nobody else can write, and nowhere else."""

import subprocess
import sys

import jax
import pytest

from autorank_jax.cli import cache
from autorank_jax.cli import main as cli


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    names = (
        "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache",
    )  # fmt: skip
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_folder_is_the_users_alone(home):
    assert cache.use_cache() is None
    folder = home / "autorank_jax" / "programs"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_dir == str(folder)


@pytest.mark.parametrize("mode", [0o770, 0o707])
@pytest.mark.parametrize("part", ["autorank_jax/programs", "autorank_jax"])
def test_a_folder_that_others_can_change_is_refused(home, part, mode):
    (home / "autorank_jax" / "programs").mkdir(parents=True)
    (home / part).chmod(mode)
    assert f"expected {home / part} as a folder that only its owner can write" in cache.use_cache()
    assert jax.config.jax_compilation_cache_dir != str(home / "autorank_jax" / "programs")


def test_a_link_is_refused(home):
    (home / "elsewhere").mkdir(mode=0o700)
    (home / "autorank_jax").mkdir()
    (home / "autorank_jax" / "programs").symlink_to(home / "elsewhere")
    assert "others can change" in cache.use_cache()


def test_what_is_not_in_use_is_said(home, monkeypatch, capsys):
    folder = home / "autorank_jax" / "programs"
    assert cli.main(["cache"]) == 0
    assert capsys.readouterr().err == ""
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert cli.main(["cache"]) == 0
    said = capsys.readouterr().err
    assert f"{folder} is not in use: expected {folder} as a folder that only its owner can write" in said
    assert f"chmod go-w {folder}" in said
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/mine")
    assert cli.main(["cache"]) == 0
    assert "is not in use: JAX_COMPILATION_CACHE_DIR names /mine" in capsys.readouterr().err


def test_no_cache_is_no_cache_at_all(home):
    jax.config.update("jax_compilation_cache_dir", str(home / "mine"))
    assert jax.config.jax_enable_compilation_cache
    cache.keep_programs(wanted=False)
    assert not jax.config.jax_enable_compilation_cache


def test_jax_own_setting_goes_first(home):
    jax.config.update("jax_compilation_cache_dir", str(home / "mine"))
    assert cache.use_cache() is None
    assert not (home / "autorank_jax").exists()


def test_the_command_counts_and_empties(home, capsys):
    folder = home / "autorank_jax" / "programs"
    folder.mkdir(parents=True)
    for name in ("jit_f-1-cache", "jit_f-1-atime"):
        (folder / name).write_bytes(bytes(1_500_000))
    assert cli.main(["cache"]) == 0
    assert f"1 compiled program, 3.0 MB, in {folder}" in capsys.readouterr().out
    assert cli.main(["cache", "--clear"]) == 0
    assert list(folder.iterdir()) == []


def test_the_library_leaves_jax_as_it_is(home):
    code = "import autorank_jax, autorank_jax.cli.running, jax; print(jax.config.jax_compilation_cache_dir)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
    assert not (home / "autorank_jax").exists()
