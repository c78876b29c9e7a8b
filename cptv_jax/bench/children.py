"""Processes that measure the runs of a bench, one run each."""

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from cptv_jax.bench.worker import Task


class Children:
    """Child processes that measure tasks.

    Args:
        environment: Environment variables for them; those that are set already win.
    """

    def __init__(self, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        self.environment = {**environment, **os.environ}
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ended = False
        self._lock = threading.Lock()

    def run(self, task: Task, log: Path) -> tuple[int, str]:
        """Measures a task in a separate process.

        Args:
            task: The task.
            log: The file that receives the process's output.

        Returns:
            Its exit code, and the last line of its output if the code is not 0.
        """
        command = [sys.executable, "-m", "cptv_jax.bench.worker"]
        with (
            log.open("w", encoding="utf-8") as said,
            # Unbuffered, so that nothing is left to be written to a child that ended before it read.
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=said, stderr=said, bufsize=0, env=self.environment
            ) as child,
        ):
            assert child.stdin is not None
            with self._lock:
                self._running.add(child)
                if self._ended:
                    child.kill()
            with suppress(BrokenPipeError):  # its exit code says why
                child.stdin.write(f"{task.to_json()}\n".encode())  # and left open: its end would be the child's
            try:
                code = child.wait()
            except BaseException:
                child.kill()
                raise
            finally:
                with self._lock:
                    self._running.discard(child)
        if code == 0:
            return 0, ""
        if code < 0:
            return code, f"ended by signal {-code}; see {log}"
        lines = [line.strip() for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
        return code, f"{lines[-1] if lines else f'exit code {code}'}; see {log}"

    def end(self) -> None:
        """Kills the running processes, and any that starts later."""
        with self._lock:
            self._ended = True
            for child in self._running:
                child.kill()
