"""Bad input to the command line: exit code 2 and one sentence with the remedy; nothing left behind, nothing lost."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from spoiled_inputs import SMALL, Inputs, World, exit_code
from tiny_vit import TINY

from cptv_jax import InputError, Model, QuantizeConfig, demo, images_from_arrays, quantize

QUANTIZE = "quantize {tiny} --images {photos} --out {out}"
SEARCH = QUANTIZE + " --calibration.images 4 --calibration.batch 2"
FROM = "quantize {%s} --images {photos} --out {out}"

# id: command line with the names of inputs (see Inputs) in braces, and what the sentence must hold: the name of the
# file, key or option that is wrong, and the remedy.
CASES: dict[str, tuple[str, str, str]] = {
    # The model
    "model missing": (FROM % "absent", "absent.safetensors does not exist", "give the path of a file of weights"),
    "model of unknown extension": (FROM % "onnx", "w.onnx has an unknown extension", "weights are read from .safetens"),
    "model empty": (FROM % "zero_bytes", "w.safetensors is empty", "download or export it again"),
    "model truncated": (FROM % "truncated", "w.safetensors is not a readable", "download or export it again"),
    "model is a text file": (FROM % "text", "w.safetensors is not a readable", "download or export it again"),
    "model is a pickle": (FROM % "pickled", "w.npz is not a readable .npz archive", "download or export it again"),
    "model holds objects": (FROM % "objects", "array 'bomb'", "save it again as a plain float array"),
    "weight is NaN": (FROM % "nan", "tensor 'head.bias' holds 1 values that are NaN", "export the weights again"),
    "weight missing": (FROM % "lacking", "deit_tiny_patch16_224.safetensors lacks 'norm.bias'", "see --arch"),
    "weight unknown": (FROM % "extra", "has 'head_dist.bias', which deit_tiny_patch16_224 does not", "see --arch"),
    "weight of wrong shape": (FROM % "misshapen", "'head.bias' has shape (10,), but", "(1000,)"),
    "weights of another model": (
        FROM % "deit" + " --arch deit_tiny_distilled_patch16_224",
        "deit_tiny_patch16_224.safetensors lacks 'dist_token'",
        "see --arch",
    ),
    "architecture unguessable": (FROM % "nameless", "cannot tell the architecture of", "name it with --arch"),
    "architecture unknown": (
        FROM % "deit" + " --arch deit_tinny_patch16_224",
        "'deit_tinny_patch16_224'",
        "did you mean 'deit_tiny_patch16_224'?",
    ),
    "checkpoint of another architecture": (
        "evaluate {tiny} --images {photos} --arch deit_tiny_patch16_224",
        "holds a tiny_vit, not a deit_tiny_patch16_224",
        "leave out --arch",
    ),
    "checkpoint is another folder": (FROM % "photos", "no metadata.json", "give a checkpoint, a run or a file"),
    "checkpoint without arrays": (
        FROM % "arrayless",
        "arrays/_CHECKPOINT_METADATA is missing",
        "import or quantize ag",
    ),
    "checkpoint with a damaged array": (FROM % "flipped", "is damaged", "import or quantize again"),
    "checkpoint description garbage": (FROM % "garbage", "metadata.json is damaged", "import or quantize again"),
    "checkpoint description of something else": (
        FROM % "foreign",
        "metadata.json does not describe",
        "import or quant",
    ),
    "checkpoint without a list of arrays": (FROM % "treeless", "metadata.json does not describe its arrays", "import"),
    "checkpoint of a newer cptv": (FROM % "newer", "has checkpoint version 2", "use the cptv that wrote it"),
    "checkpoint of unknown sizes": (FROM % "odd_sizes", "metadata.json describes no architecture", "use the cptv that"),
    "checkpoint of an unknown quantizer": (
        FROM % "odd_quantizer",
        "the quantizer of head.fc is of class 'Ternary', which is not registered here",
        "import the code that registers it",
    ),
    "checkpoint of other sizes": (FROM % "other_sizes", "holds the weights of another model", "import again"),
    "model quantized already": (FROM % "run", "is quantized already", "give the float model"),
    "hub id malformed": ("import hub:name --out {out}", "hub:name is not a hub id", "write hub:org/name"),
    "unfinished run evaluated": (
        "evaluate {unfinished} --images {photos}",
        "has not finished",
        "run its command again",
    ),
    "unfinished run reported": ("report {unfinished}", "has not finished", "run its command again"),
    # Images
    "images missing": (
        "quantize {tiny} --images {absent} --out {out}",
        "absent.safetensors does not ex",
        "check the p",
    ),
    "images empty": ("quantize {tiny} --images {empty} --out {out}", "empty holds no images", "check the path"),
    "images are a file": ("quantize {tiny} --images {text} --out {out}", "w.safetensors is a file", "give the folder"),
    "images unnamed": ("quantize {tiny} --images '' --out {out}", "source of images is empty", "give a directory"),
    "images mixed": ("quantize {tiny} --images {mixed} --out {out}", "mixes kinds of entries", "keep only"),
    "image corrupt": (
        "quantize {tiny} --images {corrupt} --out {out} " + SMALL,
        "2.jpg is not a readable image",
        "replace or remove it",
    ),
    "images too few": (QUANTIZE, "holds 8 images but 1000 are needed", "ask for fewer"),
    "batch larger than images": (
        QUANTIZE + " --calibration.images 4 --calibration.batch 5",
        "4 calibration images make no batch of 5",
        "set --calibration.batch to 4",
    ),
    "tfds not prepared": (
        "quantize {tiny} --images tfds:mnist:train:{empty} --out {out}",
        "tfds data set 'mnist'",
        "prepare it with `tfds build",
    ),
    "tfds malformed": ("quantize {tiny} --images tfds:mnist --out {out}", "'tfds:mnist' is malformed", "tfds:name:spl"),
    "digits split unknown": ("quantize {tiny} --images digits:tset --out {out}", "'tset'", "choose one of train, cal"),
    "digits for a larger model": (
        "quantize {deit} --images digits:train --out {out} " + SMALL,
        "digits:train are 32 x 32 pixels",
        "give a folder",
    ),
    "evaluation unlabelled": (
        SEARCH + " --eval {photos}",
        "photos is a flat folder",
        "put each image in a folder named",
    ),
    "evaluation missing": (SEARCH + " --eval {absent}", "absent.safetensors does not exist", "check the path"),
    "evaluation labels beyond the classes": (SEARCH + " --eval {beyond}", "label 10", "knows classes 0 to 9"),
    "evaluation images among the calibration images": (
        "quantize {tiny} --images digits:test --eval digits:test --out {out} " + SMALL,
        "of the 297 evaluation images are calibration images too (the first is digit 15",
        "evaluate on others",
    ),
    "evaluate on unlabelled images": ("evaluate {tiny} --images {photos}", "photos is a flat folder", "put each image"),
    "evaluate on labels beyond the classes": ("evaluate {tiny} --images {beyond}", "label 10", "give the images that"),
    "evaluate on no image": ("evaluate {tiny} --images digits:test --limit 0", "limit is 0", "at least 1 image"),
    "evaluate on x images": (
        "evaluate {tiny} --images {photos} --limit x",
        "argument --limit",
        "see cptv evaluate --h",
    ),
    # The configuration
    "config missing": (QUANTIZE + " --config {absent}", "no configuration file", "check --config"),
    "config is a folder": (QUANTIZE + " --config {photos}", "photos cannot be read", "Is a directory"),
    "config invalid YAML": (QUANTIZE + " --config {bad_yaml}", "c.yaml is not valid YAML", "line 1"),
    "config not a mapping": (QUANTIZE + " --config {list_yaml}", "c.yaml: the configuration", "must be a mapping of f"),
    "config section empty": (QUANTIZE + " --config {null_yaml}", "c.yaml: search", "must be a mapping of fields"),
    "config field unknown": (
        QUANTIZE + " --config {typo_yaml}",
        "c.yaml: unknown field 'search.judge.holdot'",
        "did you mean 'holdout'?",
    ),
    "config value of wrong type": (
        QUANTIZE + " --config {type_yaml}",
        "c.yaml: search.strategy.passes is 'ten'",
        "whole number",
    ),
    "option value of wrong type": (QUANTIZE + " --seed 1.5", "seed is 1.5", "it must be a whole number"),
    "option value true for a number": (
        QUANTIZE + " --search.strategy.passes true",
        "--search.strategy.passes is True",
        "a whole",
    ),
    "bits 1": (SEARCH + " --recipe.weight_bits 1", "--recipe.weight_bits is 1", "it must be at least 2"),
    "bits 9": (SEARCH + " --recipe.activation_bits 9", "--recipe.activation_bits is 9", "it must be at most 8"),
    "preset unknown": (SEARCH + " --recipe.preset evolq", "preset 'evolq'", "did you mean 'evol-q'?"),
    "observer unknown": (
        SEARCH + " --recipe.weight_observer min-max",
        "--recipe.weight_observer is 'min-max'",
        "did you mean 'minmax'?",
    ),
    "observer unfit": (SEARCH + " --recipe.weight_observer percentile", "weight: observer 'percentile'", "per_channel"),
    "objective unknown": (
        SEARCH + " --search.judge.objective info",
        "--search.judge.objective is 'info'",
        "did you mean 'infonce'?",
    ),
    "strategy unknown": (SEARCH + " --search.strategy evolve", "--search.strategy is 'evolve'", "'evol-q'"),
    "method unknown": (SEARCH + " --method fq_vit", "--method is 'fq_vit'", "did you mean 'fq-vit'?"),
    "override of no site": (
        SEARCH + " --recipe.overrides '{{blocks.0.norm9: {{bits: 4}}}}'",
        "no site matches 'blocks.0.norm9'",
        "did you mean 'blocks.0.norm",
    ),
    "override of an unknown field": (
        SEARCH + " --recipe.overrides '{{blocks.0.norm1: {{bit: 4}}}}'",
        "recipe.overrides.blocks.0.norm1: unknown field 'bit'",
        "did you mean 'bits'?",
    ),
    "override not a mapping": (
        SEARCH + " --recipe.overrides '{{head.fc: 4}}'",
        "recipe.overrides.head.fc",
        "{bits: 4}",
    ),
    "override by a number": (
        SEARCH + " --recipe.overrides '{{3: null}}'",
        "--recipe.overrides has the key 3",
        "be text",
    ),
    "override of the wrong type": (
        SEARCH + " --recipe.overrides '{{head.fc: {{per_channel: yeah}}}}'",
        "recipe.overrides.head.fc: per_channel is 'yeah'",
        "it must be true or false",
    ),
    "contrast within a batch of one": (
        SEARCH + " --calibration.batch 1",
        "--calibration.batch is 1, but --search.judge.objective infonce contrasts",
        "set --calibration.batch to at least 2",
    ),
    "temperature 0": (SEARCH + " --search.judge.temperature 0", "--search.judge.temperature is 0", "greater than 0"),
    "temperature nan": (SEARCH + " --search.judge.temperature .nan", "--search.judge.temperature is nan", "a finite"),
    "memory infinite": (
        SEARCH + " --search.compute.memory_gib .inf",
        "--search.compute.memory_gib is inf",
        "must be a finite number",
    ),
    "groups of devices too many": (
        SEARCH + " --search.compute.population_devices 999",
        "--search.compute.population_devices is 999",
        "set --search.compute.population_devices to at most",
    ),
    "sigma infinite": (
        SEARCH + " --search.strategy guided --search.strategy.sigma .inf",
        "--search.strategy.sigma is inf",
        "must be a finite number",
    ),
    "holdout 1": (SEARCH + " --search.judge.holdout 1", "--search.judge.holdout is 1", "it must be below 1"),
    "passes 0": (SEARCH + " --search.strategy.passes 0", "--search.strategy.passes is 0", "it must be at least 1"),
    "seed negative": (SEARCH + " --seed -1", "--seed is -1", "it must be at least 0"),
    "seed too large": (SEARCH + " --seed 4294967296", "--seed is 4294967296", "it must be below 4294967296"),
    "search images too many": (
        SEARCH + " --search.judge.images 6",
        "--search.judge.images is 6",
        "it must lie between 2",
    ),
    "search images that make no whole batches": (
        SEARCH + " --search.judge.holdout 0 --search.judge.images 3",
        "--search.judge.images is 3, which are no whole batches of 2",
        "set it to 2",
    ),
    "searched sites match nothing": (
        SEARCH + " --search.space.sites blocks.*.wieght",
        "--search.space.sites",
        "did you mean",
    ),
    "one searched pattern matches nothing": (
        SEARCH + " --search.space.sites '[blocks.*.attn.qkv.weight, blocks.*.atn.proj.weight]'",
        "no quantized site matches 'blocks.*.atn.proj.weight'",
        "did you mean",
    ),
    "patience without held-out images": (
        SEARCH + " --search.judge.holdout 0 --search.judge.patience 2",
        "--search.judge.patience is 2",
        "raise --search.judge.holdout",
    ),
    "published teacher of rewritten weights": (
        SEARCH + " --method erq --search.judge.teacher published",
        "--search.judge.teacher is published",
        "set --search.judge.teacher to float",
    ),
    "searched sites have no scale": (
        SEARCH + " --recipe.preset fq-vit --search.space.sites *.softmax",
        "blocks.0.attn.softmax",
        "--search.space.sites",
    ),
    "ptq4vit without room to search": (
        SEARCH + " --method ptq4vit --method.alpha 1.5",
        "--method.alpha is 1.5 and --method.beta 1.2",
        "give 0 < alpha < beta",
    ),
    "ptq4vit with unsigned codes": (
        SEARCH + " --method ptq4vit --recipe.weight_signed false",
        "signed and symmetric",
        "set signed: true",
    ),
    "aiqvit with a rank of 0": (
        SEARCH + " --method aiqvit --method.ranks '[0, 4]'",
        "--method.ranks.0 is 0",
        "it must be at least 1",
    ),
    "evosax with half a pair": (
        SEARCH + " --search.strategy evosax --search.strategy.algorithm PGPE --search.strategy.children 3",
        "--search.strategy.children is 3",
        "set an even number",
    ),
    # Where results go
    "out is a file": ("quantize {tiny} --images {photos} --out {text} " + SMALL, "is a file", "choose a directory"),
    "out below a file": (
        "quantize {tiny} --images {photos} --out {text}/x " + SMALL,
        "Not a directory",
        "check the pa",
    ),
    "out not empty": (
        "quantize {tiny} --images {photos} --out {photos} " + SMALL,
        "photos is not empty",
        "choose anoth",
    ),
    "out holds other settings": (
        "quantize {tiny} --images {photos} --out {run} --seed 7 " + SMALL,
        "run with other settings (seed: 0 there, 7 here)",
        "choose another --out",
    ),
    "out holds other images": (
        "quantize {tiny} --images digits:train --out {run} " + SMALL,
        "run with other settings (images:",
        "choose another --out",
    ),
    "out damaged": (
        "quantize {tiny} --images {photos} --out {run_damaged} " + SMALL,
        "run.json is damaged",
        "choose another --out",
    ),
    "out with damaged results": (
        "quantize {tiny} --images {photos} --out {results_damaged} " + SMALL,
        "results.json is damaged",
        "remove it",
    ),
    "demo out not empty": ("demo --out {photos}", "photos is not empty and not a run", "choose another directory"),
    "demo out is a file": ("demo --out {text}", "w.safetensors is a file", "choose a directory"),
    "demo out below a file": ("demo --out {text}/x", "w.safetensors", "check the path"),
    "demo out is a run of another model": (
        "demo --out {run}",
        "run-model, the demo's model, is absent",
        "choose anoth",
    ),
    "import onto something": ("import {deit} --out {photos}", "photos exists already", "choose another name"),
    "import below a file": ("import {deit} --out {text}/x", "w.safetensors", "check the path"),
    # The command line itself
    "no command": ("", "COMMAND", "see cptv --help"),
    "command unknown": ("quantise", "'quantise'", "'quantize'"),
    "option unknown": (
        SEARCH + " --serch.judge.holdout 3",
        "unknown option --serch.judge.holdout",
        "did you mean '--search.judge.holdout'?",
    ),
    "option unknown, before the model": (
        "quantize --seeed 3 {tiny}",
        "unknown option --seeed",
        "did you mean '--seed'?",
    ),
    "option abbreviated": ("evaluate {tiny} --image {photos}", "unknown option --image", "did you mean '--images'?"),
    "option of an older cptv": (
        SEARCH + " --search.gradient_steps 3",
        "unknown option --search.gradient_steps, which is of an older cptv",
        "it is --search.strategy.steps now",
    ),
    "option of another strategy": (
        SEARCH + " --search.strategy.steps 3",
        "unknown option --search.strategy.steps, which is an option of guided, not of evol-q",
        "give --search.strategy NAME",
    ),
    "config of an older cptv": (
        QUANTIZE + " --config {older_yaml}",
        "c.yaml: search.gradient_steps is of an older cptv",
        "write search.strategy.steps",
    ),
    "config with a field twice": (QUANTIZE + " --config {twice_yaml}", "c.yaml is not valid YAML", "given twice"),
    "option without value": (QUANTIZE + " --seed", "argument --seed", "expected one argument"),
    "option missing": ("quantize {tiny} --images {photos}", "--out", "see cptv quantize --help"),
    "argument too many": ("report {run} {run}", "unrecognized arguments", "see cptv report --help"),
    "report of another folder": ("report {photos}", "photos is not a run directory", "give the --out of a cptv quant"),
    "report of nothing": ("report {absent}", "is not a run directory", "give the --out of a cptv quantize"),
}


def contents(*folders: Path) -> dict[str, object]:
    """Every file and folder, with the content; of large files the time of the last change stands for it."""

    def content(path: Path) -> object:
        if not path.is_file():
            return "folder"
        status = path.stat()
        return path.read_bytes() if status.st_size < 2**20 else (status.st_size, status.st_mtime_ns)

    return {str(path): content(path) for folder in folders for path in sorted(folder.rglob("*"))}


def sentence(stderr: str) -> str:
    """The one sentence on stderr after progress bars."""
    lines = [line for line in stderr.split("\n") if line.strip()]
    assert all("%|" in line for line in lines[:-1]), stderr  # bars
    assert "Traceback" not in stderr
    last = lines[-1].split("\r")[-1]
    assert last.startswith("cptv: "), stderr
    assert len(last) < 500
    return last


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with the demo's directory is said before it trains."""

    def train(*args: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(demo, "train", train)


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_sentence(
    case: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, what, remedy = CASES[case]
    argv = shlex.split(command.format_map(Inputs(world, tmp_path)))
    before = contents(tmp_path, world.folder)
    capsys.readouterr()
    assert exit_code(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    said = sentence(captured.err)
    assert what in said
    assert remedy in said
    assert contents(tmp_path, world.folder) == before


@pytest.mark.parametrize("case", ["image corrupt", "checkpoint with a damaged array", "out below a file"])
def test_a_process_ends_with_the_same_sentence(case: str, world: World, tmp_path: Path) -> None:
    command, what, remedy = CASES[case]
    argv = shlex.split(command.format_map(Inputs(world, tmp_path)))
    before = contents(tmp_path, world.folder)
    repository = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    run = subprocess.run(
        [sys.executable, "-m", "cptv_jax.cli.main", *argv], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert run.stdout == ""
    said = sentence(run.stderr)
    assert what in said
    assert remedy in said
    assert contents(tmp_path, world.folder) == before


def test_there_are_many_distinct_cases() -> None:
    assert len({command for command, _, _ in CASES.values()}) == len(CASES) >= 30


# What only a program can give


def test_pixels_that_are_nan_are_refused() -> None:
    pixels = np.zeros((4, 32, 32, 3), np.float32)
    pixels[2, 5, 5, 1] = np.nan
    with pytest.raises(InputError, match=r"image 2 holds NaN or infinite values; remove or repair it"):
        images_from_arrays(pixels)


def test_too_few_arrays_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    images = images_from_arrays(np.zeros((4, 32, 32, 3), np.float32))
    with pytest.raises(InputError, match=r"4 calibration images given, 1000 wanted; give more, or set"):
        quantize(Model(TINY, {}), images, QuantizeConfig(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
