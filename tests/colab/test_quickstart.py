"""The Colab notebook runs from its first cell to its last."""

import os
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from cptv_jax.data import load_digits

ROOT = Path(__file__).parents[2]


def small_settings(folder: Path) -> str:
    return f"""
PACKAGE = "--no-deps --target {folder / "site"} {ROOT}"  # installs for real, but into a folder of its own
MODEL = "runs/demo-model"
IMAGES = "{folder / "images"}"
EVALUATION = None
DEMO_EPOCHS = 2
CALIBRATION_IMAGES = 20
BATCH = 10
PASSES = 1
WEIGHT_BITS = 4
"""


@pytest.mark.slow
def test_the_quickstart_notebook_runs_headless_with_small_settings(tmp_path: Path) -> None:
    digits = load_digits("calibration")
    (tmp_path / "images").mkdir()
    for i, image in enumerate(digits.normalize(0, 20)):
        pixels = np.round((image * 0.5 + 0.5) * 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i:02d}.png")
    notebook = nbformat.read(ROOT / "colab" / "quickstart.ipynb", as_version=4)
    parameters = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1
    defined = {line.split(" = ")[0] for line in parameters[0].source.splitlines() if " = " in line}
    replaced = {line.split(" = ")[0] for line in small_settings(tmp_path).splitlines() if " = " in line}
    assert defined == replaced, "the test must set every setting of the notebook"
    parameters[0].source = small_settings(tmp_path)

    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute(env=environment)

    assert (tmp_path / "site" / "cptv_jax" / "cli" / "main.py").exists()
    report = notebook.cells[-2].outputs[0]["data"]["text/markdown"]
    assert "`blocks.0.attn.qkv.weight` | uniform unsigned asymmetric | 4 |" in report
    curve = next(cell for cell in notebook.cells if "loss.png" in cell.source)
    assert "image/png" in curve.outputs[0]["data"]
    assert (tmp_path / "runs" / "model" / "model" / "metadata.json").exists()
