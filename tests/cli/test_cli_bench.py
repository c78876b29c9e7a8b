"""The command line of the benches: what is written there is what a bench is asked, and its table is printed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cptv_jax import QuantizeConfig, SearchConfig
from cptv_jax.bench import methods, precision, search
from cptv_jax.bench.harness import Source
from cptv_jax.bench.methods import Options
from cptv_jax.bench.precision import PrecisionOptions
from cptv_jax.bench.search import SearchOptions
from cptv_jax.cli.main import main

NEEDED = ["--weights", "w", "--images", "i", "--eval", "e", "--out", "o"]
COMMON = ["--arch", "a", "--config", "base.yaml"]
OMSE = QuantizeConfig(method="omse")
LINE = {
    "bits": "W4A8", "method": "x", "search": "guided", "seeds": [0], "seconds": [1.0], "resumed": False,
    "top1": [50.0], "gain": [9.0], "objective": [0.5], "kl": [0.5], "peak_mib": [9.0], "remark": "",
    "evaluations": [1], "gradient_steps": [1],
}  # fmt: skip
POINT = {"bits": 4, "budget": "bytes", "cost": 2.0**20, "uniform": {"top1": 50.0, "objective": 0.5}}


@dataclass(frozen=True)
class Case:
    """plain: what a bench is asked where only what is needed is given; full: with `given` too."""

    module: Any
    given: list[str]
    line: dict[str, Any]
    printed: str
    plain: Any
    full: Any


CASES = {
    "methods": Case(
        methods,
        [
            *("--methods", "omse", "erq", "--bits", "W3A3", "--calibration", "16", "--batch", "8"),
            *("--held-out", "0", "--seeds", "auto", "--search", "none", "--jobs", "3"),
        ],
        LINE,
        "| W4A8 | x |",
        Options("w", "i", "e", Path("o")),
        Options(
            "w", "i", "e", Path("o"), "a", ("omse", "erq"), ("W3A3",), 16, 8, 0, None, SearchConfig(strategy="none"),
            OMSE, 3,
        ),
    ),
    "search": Case(
        search,
        [
            *("--held-out", "7", "--jobs", "2", "--searches", "guided", "--objectives", "kl", "mse@both"),
            *("--bits", "W2A8", "--passes", "3", "--seeds", "4", "5"),
        ],
        LINE,
        "| W4A8 | guided |",
        SearchOptions(Source("w", "i", "e"), Path("o")),
        SearchOptions(
            Source("w", "i", "e", "a", 7, 2), Path("o"), ("guided",), ("W2A8",), (3,), (4, 5), OMSE, ("kl", "mse@both")
        ),
    ),
    "precision": Case(
        precision,
        [
            *("--bits", "2", "5", "--judges", "9", "--generations", "1", "--children", "3"),
            *("--genes", "all", "--budget", "bit-operations"),
        ],
        POINT,
        "| 4 bits | 1.00 | 50.0 |",
        PrecisionOptions(Source("w", "i", "e"), Path("o")),
        PrecisionOptions(Source("w", "i", "e", "a"), Path("o"), (2, 5), 9, 1, 3, OMSE, "all", "bit-operations"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_command_line_says_what_the_options_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    asked: list[Any] = []

    def record(options: Any) -> list[Any]:
        asked.append(options)
        return [case.line]

    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("method: omse\n")
    monkeypatch.setattr(case.module, f"bench_{name}", record)
    for words in ([], [*COMMON, *case.given]):
        with pytest.raises(SystemExit) as ended:
            main(["bench", name, *NEEDED, *words])
        assert ended.value.code == 0 and case.printed in capsys.readouterr().out
    assert asked == [case.plain, case.full]
