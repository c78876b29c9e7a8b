"""Programs that one process compiled are not compiled again by the next."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stopped_runs import tiny_model, write_digits
from tiny_vit import TINY

from cptv_jax import InputError, save_model
from cptv_jax.runtime import compilation_cache
from cptv_jax.runtime.compilation_cache import processor_kind, use_compilation_cache

REPOSITORY = Path(__file__).resolve().parents[2]
ASK = """
import json, os, sys
from cptv_jax.runtime.compilation_cache import use_compilation_cache
found = use_compilation_cache(*sys.argv[1:])
light = "jax" not in sys.modules
import jax
names = ("compilation_cache_dir", "enable_compilation_cache", "persistent_cache_min_compile_time_secs",
         "persistent_cache_min_entry_size_bytes")
before = [getattr(jax.config, f"jax_{name}") for name in names]
again = use_compilation_cache(*sys.argv[1:])  # JAX is imported now
after = [getattr(jax.config, f"jax_{name}") for name in names]
print(json.dumps([str(found), light, before, str(again) == str(found) and after == before]))
"""
# The command line with a listener for what JAX compiles and what it reads.
COUNTING = """
import collections, json, sys
from cptv_jax.cli import main
prepare, events = main._prepare, collections.Counter()
def listen(*options):
    prepare(*options)
    import jax.monitoring
    jax.monitoring.register_event_listener(lambda name, **kwargs: events.update([name]))
main._prepare = listen
try:
    main.main(sys.argv[2:])
finally:
    open(sys.argv[1], "w").write(json.dumps(events))
"""


def environment(**changes: str) -> dict[str, str]:
    names = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    return {**names, "PYTHONPATH": str(REPOSITORY), **changes}


def ask(*arguments: str, **changes: str) -> list:
    command = [sys.executable, "-c", ASK, *arguments]
    done = subprocess.run(command, env=environment(**changes), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def test_the_folder_is_in_the_user_s_cache_and_keeps_small_programs(tmp_path: Path) -> None:
    folder = tmp_path / "cptv-jax" / "programs" / processor_kind()
    assert ask(XDG_CACHE_HOME=str(tmp_path)) == [str(folder), True, [str(folder), True, 0.0, -1], True]
    assert folder.is_dir()


def test_a_chosen_folder_and_off_win_over_the_environment(tmp_path: Path) -> None:
    folder = tmp_path / "chosen" / processor_kind()
    found = ask(str(tmp_path / "chosen"), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "other"))
    assert found == [str(folder), True, [str(folder), True, 0.0, -1], True]
    found, light, settings, same = ask("off", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "other"))
    assert (found, light, settings[:2], same) == ("None", True, [None, False], True)


def test_a_cache_that_the_environment_names_is_left_alone(tmp_path: Path) -> None:
    given = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "7"}
    assert ask(**given)[2][0::2] == [str(tmp_path), 7.0]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused_and_the_usual_one_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--compilation-cache .*file cannot be made \(Not a directory\)"):
        use_compilation_cache(str(tmp_path / "file"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    before = dict(os.environ)
    assert use_compilation_cache() is None
    assert dict(os.environ) == before


def test_processors_that_know_other_instructions_are_other_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for text in ("flags\t: avx avx2\ncpu MHz\t: 1", "flags\t: avx avx2\ncpu MHz\t: 2", "flags\t: avx"):
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(compilation_cache, "Path", lambda path: tmp_path / "cpuinfo")
        found.append(processor_kind())
    assert found[0] == found[1] != found[2]


@pytest.mark.slow
def test_a_second_run_of_the_same_shapes_compiles_nothing(tmp_path: Path) -> None:
    save_model(tmp_path / "model", tiny_model(TINY))
    images, _ = write_digits(tmp_path)
    programs = tmp_path / "programs"
    counts = []
    for seed in (0, 1):
        command = ["quantize", str(tmp_path / "model"), "--images", str(images), "--out", str(tmp_path / str(seed))]
        command += ["--compilation-cache", str(programs), f"--seed={seed}", "--search.strategy=generational"]
        command += ["--calibration.images=16", "--calibration.batch=8"]
        command += ["--search.strategy.passes=1", "--search.strategy.rounds=1", "--search.strategy.children=4"]
        log = tmp_path / f"{seed}.json"
        wanted = [sys.executable, "-c", COUNTING, str(log), *command]
        done = subprocess.run(wanted, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        counts.append(json.loads(log.read_text()))
    first, second = counts
    asked = "/jax/compilation_cache/compile_requests_use_cache"
    hits, misses = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"
    assert first[misses] > 10
    assert second.get(misses, 0) == 0
    assert second[hits] == second[asked]  # nothing that a cache cannot keep
    assert "rror" not in done.stderr  # XLA says there if it doubts a program that it reads
