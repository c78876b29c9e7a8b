"""An interrupt waits while a library that cannot be unwound is at work."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from cptv_jax.storage.interrupts import defer_interrupts
from cptv_jax.storage.trees import restore_tree, save_tree


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Tests in the background of a script ignore SIGINT; here it acts as on a terminal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_comes_when_the_block_has_ended() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt), defer_interrupts():
        interrupt()
        steps.append("after the signal")
    assert steps == ["after the signal"]
    with pytest.raises(KeyboardInterrupt):  # as before the block
        interrupt()
        steps.append("not reached")
    assert steps == ["after the signal"]


def test_without_an_interrupt_the_block_s_own_error_comes_out() -> None:
    with pytest.raises(ValueError, match="own"), defer_interrupts():
        raise ValueError("own")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ignored_interrupts_stay_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with defer_interrupts():
        interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_another_thread_may_enter() -> None:
    entered = []

    def enter() -> None:
        with defer_interrupts():
            entered.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [signal.default_int_handler]


@pytest.mark.parametrize("method", ["save", "restore"])
def test_orbax_is_never_unwound_halfway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    tree = {"a": np.arange(3)}
    save_tree(tmp_path / "there", tree, {})
    original, finished = getattr(ocp.PyTreeCheckpointer, method), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        interrupt()
        result = original(*args, **kwargs)
        finished.append(method)
        return result

    monkeypatch.setattr(ocp.PyTreeCheckpointer, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_tree(tmp_path / "new", tree, {}) if method == "save" else restore_tree(tmp_path / "there")
    assert finished == [method]
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    save_tree(tmp_path / "new", tree, {})
    np.testing.assert_array_equal(restore_tree(tmp_path / "new")[0]["a"], tree["a"])
