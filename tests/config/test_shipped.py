"""Configurations that come with the package are found by name."""

from pathlib import Path

import pytest

from cptv_jax import InputError, load_config
from cptv_jax.cli.main import main
from cptv_jax.config import shipped


def test_every_shipped_configuration_loads_by_name_and_says_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"evol-q_w4a8", "guided_w4a8", "omse"} <= set(shipped.names())
    for name in shipped.names():
        assert load_config(name) == load_config(str(shipped.path_of(name)))
        assert len(shipped.summary_of(name)) > 20
    with pytest.raises(SystemExit) as ended:
        main(["configs"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped.names())


def test_a_file_here_wins_over_a_name_and_a_wrong_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("omse").write_text("seed: 5")
    assert load_config("omse").seed == 5
    with pytest.raises(InputError, match="there is no shipped configuration guided_w4a7; did you mean 'guided_w4a8'"):
        load_config("guided_w4a7")
    for missing in ("omse.yaml", "folder/omse"):
        with pytest.raises(InputError, match=f"there is no configuration file {missing}"):
            load_config(missing)


def test_the_folder_at_the_top_of_the_repository_is_the_package_s() -> None:
    top = Path(__file__).resolve().parents[2] / "configs"
    assert sorted(path.stem for path in top.iterdir()) == list(shipped.names())
    assert top.resolve() == shipped.path_of("omse").parent
