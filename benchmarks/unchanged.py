"""Short runs of everything that computes, whose numbers a refactoring must leave as they are, bit for bit.

    python -m benchmarks.unchanged record tests/golden/unchanged.json
    python -m benchmarks.unchanged compare tests/golden/unchanged.json [--only NAME...]

Run it from the repository's root. `compare` computes all runs (or those named, as by "guided/*") again and prints a
line for each: equal, or where it differs first. It ends with 0 if all are equal, 1 if some are not, and 2 where they
cannot be compared: bits are only comparable on one kind of processor and with the same versions. Elsewhere check out
the recorded commit and record there. With a warm compilation cache (JAX_COMPILATION_CACHE_DIR) it takes minutes.

What of the package's interface the runs depend on stands in the section "the package" alone.
"""

import argparse
import hashlib
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from cptv_jax import (
    Architecture,
    Evaluator,
    Images,
    Model,
    Objective,
    Quantization,
    QuantizeConfig,
    QuantizedModel,
    forward,
    images_from_arrays,
    quantize,
)
from cptv_jax.config.loading import config_from
from cptv_jax.mixed_precision.allocation import allocate, evolve_genes, sensitivities
from cptv_jax.mixed_precision.widths import Widths, find_product_sites, loss_of_genes
from cptv_jax.models.preprocessing import Preprocessing
from cptv_jax.models.timm_weights import from_timm
from cptv_jax.models.vit import ViTConfig
from cptv_jax.models.vit_family import VIT
from cptv_jax.search.events import to_record
from cptv_jax.storage.run_directory import RunDirectory

Settings = Mapping[str, Any]  # nested, as in a YAML configuration
Record = dict[str, Any]  # plain data, as JSON holds it

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
IMAGES, BATCH, EVALUATED = 24, 8, 16
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "optax", "evosax")
COMPARED = ("processor", "flags", "versions", "devices", "xla_flags")  # of the header
VECTORS = ("avx", "fma", "f16c", "amx", "sse4", "asimd", "sve", "bf16")  # beginnings of flags that decide about code
_MANY_MAPS = 20_000  # pieces of memory, of which Linux allows a process 65,530; programs then take about 4 GiB

# ---- the runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A call of `quantize`.

    distilled: of the model with a distillation token. saves: the process ends, as it were, after so many saved states,
    again and again; null leaves it alone.
    """

    settings: Settings
    distilled: bool = False
    saves: int | None = None


@dataclass(frozen=True)
class Mixed:
    """Mixed precision at the cost of uniform `bits[1]`; genes and budget as of `cptv bench precision`."""

    settings: Settings
    genes: str
    budget: str
    bits: tuple[int, ...] = (2, 4, 8)
    generations: int = 2
    children: int = 3


NONE = {"strategy": "none"}
GENERATIONAL = {"name": "generational", "passes": 2, "rounds": 2, "children": 4, "sigma": 0.05}
GUIDED = {"name": "guided", "passes": 2, "children": 3, "steps": 6, "batch": 4}
EVOSAX = {"name": "evosax", "passes": 2, "rounds": 2, "children": 4, "sigma": 0.05}
EVOL_Q = {"name": "evol-q", "passes": 2, "rounds": 2, "population": 4, "samples": 3, "step": 0.01}
LEARNED = {"steps": 3, "batch": 8}


def base(method: str, preset: str, weight_bits: int, activation_bits: int, **fields: Any) -> Run:
    """A base method alone. fields: the method's options, and `reconstruction`."""
    recipe = {"preset": preset, "weight_bits": weight_bits, "activation_bits": activation_bits}
    reconstruction = fields.pop("reconstruction", {})
    return Run(
        {"method": {"name": method, **fields}, "recipe": recipe, "reconstruction": reconstruction, "search": NONE}
    )


def searched(
    strategy: Settings,
    method: Any = "fq-vit",
    weight_bits: int = 3,
    search: Settings = MappingProxyType({}),
    **fields: Any,
) -> Settings:
    """A base method, by default Evol-Q's at W3A8, with a search. search: its other fields."""
    return {
        "method": method,
        "recipe": {"weight_bits": weight_bits},
        "search": {"strategy": strategy, **search},
        **fields,
    }


def guided(
    judge: Settings = MappingProxyType({}),
    space: Settings = MappingProxyType({}),
    compute: Settings = MappingProxyType({}),
    **strategy: Any,
) -> Run:
    """The guided search with some of its fields set."""
    search = {"judge": dict(judge), "space": dict(space), "compute": dict(compute)}
    return Run(searched({**GUIDED, **strategy}, search=search))


_PTQ4VIT = {"images": 8, "candidates": 6, "rounds": 2}
_AIQVIT = {"images": 16, "search_images": 8, "search_steps": 2, "ranks": [2, 4]}

RUNS: dict[str, Run | Mixed] = {
    # Base methods.
    "fq-vit/evol-q": base("fq-vit", "evol-q", 4, 6),
    "fq-vit/evol-q-omse": base("fq-vit", "evol-q-omse", 4, 6),
    "fq-vit/fq-vit": base("fq-vit", "fq-vit", 4, 6),
    "omse/omse": base("omse", "omse", 4, 5),
    "omse/omse-log2": base("omse", "omse-log2", 4, 5),
    "ptq4vit/ptq4vit": base("ptq4vit", "ptq4vit", 4, 6, **_PTQ4VIT),
    "ptq4vit/base-ptq": base("ptq4vit", "base-ptq", 4, 6, **_PTQ4VIT),
    "repq-vit": base("repq-vit", "repq-vit", 4, 4),
    "repq-vit/round_zero_point": base("repq-vit", "repq-vit", 4, 4, round_zero_point=True),
    "erq/erq": base("erq", "erq", 4, 4),
    "erq/erq-uniform": base("erq", "erq-uniform", 4, 4),
    "erq/round_zero_point": base("erq", "erq", 4, 4, round_zero_point=True),
    "aiqvit": base("aiqvit", "aiqvit", 4, 4, **_AIQVIT, reconstruction={"steps": 2, "batch": 8}),
    # Block reconstruction after them.
    "reconstruction/fq-vit/fisher": base(
        "fq-vit", "evol-q", 4, 6, reconstruction={**LEARNED, "importance": "fisher", "easy_first": 0.5}
    ),
    "reconstruction/fq-vit/none": base("fq-vit", "evol-q", 4, 6, reconstruction={**LEARNED, "importance": "none"}),
    "reconstruction/repq-vit/fisher": base(
        "repq-vit", "repq-vit", 4, 4, reconstruction={**LEARNED, "importance": "fisher", "easy_first": 0.5}
    ),
    "reconstruction/omse/none": base("omse", "omse", 4, 5, reconstruction={**LEARNED, "importance": "none"}),
    # Strategies.
    "search/evol-q": Run(searched(EVOL_Q)),
    "search/generational": Run(searched(GENERATIONAL)),
    "search/generational/race": Run(searched(GENERATIONAL, search={"compute": {"race": True}})),
    "search/guided": guided(),
    "search/evosax/Sep_CMA_ES": Run(searched({**EVOSAX, "algorithm": "Sep_CMA_ES"})),
    "search/evosax/PGPE": Run(searched({**EVOSAX, "algorithm": "PGPE"})),
    # Options of the guided search, one each.
    "guided/offsets": guided(space={"offsets": False, "rounding": False}),
    "guided/rounding": guided(space={"rounding": False}),
    "guided/mixup": guided(mixup=False),
    "guided/mirror": guided(mirror=False),
    "guided/gradient_matching": guided(matching=0),
    "guided/gradient_objective": guided(objective="kl"),
    "guided/objective/mse": guided({"objective": "mse", "on": "features"}),
    "guided/objective/infonce+kl": guided({"objective": "infonce+kl", "on": "both"}),
    "guided/sites": guided(space={"sites": ["*"]}),
    "guided/patience": guided({"patience": 1}, passes=4),
    "guided/race": guided(compute={"race": True}),
    "guided/at_once": guided(compute={"images_at_once": 3, "candidates_at_once": 2}),
    "guided/teacher": guided({"teacher": "published"}),
    "guided/arithmetic/float32": guided(compute={"arithmetic": "float32"}),
    "guided/arithmetic/int8": guided(compute={"arithmetic": "int8"}),
    "guided/arithmetic/bf16-codes": guided(compute={"arithmetic": "bf16-codes"}),
    # The guided search on other bases.
    "guided/erq": Run(
        searched(GUIDED, "erq", recipe={"weight_bits": 4, "activation_bits": 4}, search={"space": {"sites": ["*"]}})
    ),
    "guided/aiqvit": Run(
        searched(
            GUIDED,
            {"name": "aiqvit", **_AIQVIT},
            recipe={"weight_bits": 4, "activation_bits": 4},
            search={"space": {"sites": ["*"]}},
            reconstruction={"steps": 2, "batch": 8},
        )
    ),
    # Mixed precision.
    "mixed/bytes": Mixed({"method": "fq-vit"}, "weights", "bytes"),
    "mixed/bit-operations": Mixed({"method": "fq-vit"}, "all", "bit-operations"),
    # Runs that are killed and continued. 60 steps: the guided one is also killed within a proposal.
    "resumed/generational": Run(searched(GENERATIONAL), saves=2),
    "resumed/guided": Run(searched({**GUIDED, "steps": 60}), saves=2),
    "resumed/reconstruction": Run(
        searched({**GENERATIONAL, "passes": 1}, "omse", weight_bits=4, reconstruction=LEARNED), saves=2
    ),
    # A distillation token.
    "distilled/generational": Run(searched(GENERATIONAL), distilled=True),
}

_UNITS = "reconstruction learns the search's parameters (Free), with a rate in the unit of each"
_LEAVES = "with activations among the sites, the leaves of a block come in another order, and so do random numbers"
# Runs whose numbers the rebuilding of the house was allowed to change, and why. They are shown, and fail nothing.
ALLOWED = {
    "aiqvit": _UNITS,
    "reconstruction/*": _UNITS,
    "resumed/reconstruction": _UNITS,
    "guided/aiqvit": f"{_UNITS}; {_LEAVES}",
    "guided/sites": _LEAVES,
}

# ---- the package ----------------------------------------------------------------------------------------------------


def configuration(settings: Settings) -> QuantizeConfig:
    """The configuration of settings as YAML has them."""
    calibration = {"images": IMAGES, "batch": BATCH}
    return config_from({"seed": 0, "calibration": calibration, **settings}, "settings")


@cache
def float_model(distilled: bool) -> Model:
    """The small trained ViT without its last block, which saves time, or one with a distillation token and random
    weights.
    """
    name = "distilled" if distilled else "model"
    sizes = ViTConfig(image_size=32, patch_size=8, num_classes=10, width=64, depth=2, heads=4)
    if distilled:
        sizes = replace(sizes, width=32, heads=2, distilled=True)
    architecture = Architecture(name, VIT, sizes, Preprocessing(image_size=32))
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    if distilled:
        arrays = {key.removeprefix("weights/"): array for key, array in arrays.items() if key.startswith("weights/")}
    else:
        arrays = {key: array for key, array in arrays.items() if not key.startswith("blocks.2.")}
    return Model(architecture, from_timm(arrays, architecture, name))


def calibration_images() -> Images:
    return images_from_arrays(pixels("calib_images", IMAGES))


def logits(model: Model | QuantizedModel) -> np.ndarray:
    """Of the evaluated images."""
    return np.asarray(forward(model.stages(), pixels("test_images", EVALUATED)).logits, np.float32)


def events(outcome: Quantization) -> list[Record]:
    """The search's log as plain records."""
    return [to_record(event) for event in outcome.log]


def quantized(run: Run, out: Path | None = None) -> Quantization:
    return quantize(float_model(run.distilled), calibration_images(), configuration(run.settings), out=out)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package may catch it."""


@contextmanager
def killed(saves: int) -> Iterator[None]:
    """Runs end with `Killed` once they have saved what they have so often."""
    names = ("save_state", "save_base", "save_reconstruction", "save_final")
    originals = {name: getattr(RunDirectory, name) for name in names}
    counter = itertools.count(1)

    def saved(original: Any, *arguments: Any) -> None:
        original(*arguments)
        if next(counter) == saves:
            raise Killed

    def wrapped(original: Any) -> Any:
        return lambda *arguments: saved(original, *arguments)

    try:
        for name, original in originals.items():
            setattr(RunDirectory, name, wrapped(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(RunDirectory, name, original)


def uniform(run: Mixed, bits: int, activations: Sequence[str] = ()) -> QuantizedModel:
    """The base method's model with weights, and the named activations, of a width."""
    recipe = {"weight_bits": bits, "overrides": {site: {"bits": bits} for site in activations}}
    return quantized(Run({**run.settings, "recipe": recipe, "search": NONE})).model


def mixed(run: Mixed) -> Record:
    """Sensitivities, allocation and evolution of genes, and the model that they stand for."""
    model = float_model(False)
    activations: list[str] = []
    if run.genes == "all":
        recipe = uniform(run, run.bits[0]).recipe
        read = find_product_sites(model, recipe)
        activations = [site for site in read if recipe.places[site].role != "weight"]
    widths = Widths(tuple(uniform(run, bits, activations) for bits in run.bits))
    given = calibration_images()
    batches = [given.normalize(start, start + BATCH) for start in range(0, 2 * BATCH, BATCH)]
    teacher = [forward(model.stages(), batch) for batch in batches]
    judge = Evaluator(widths.stages(), batches, teacher, Objective("kl"), BATCH, 4)
    costs = widths.bytes_of_weights() if run.budget == "bytes" else widths.bit_operations()
    losses = sensitivities(judge, len(run.bits))
    start = widths.uniform(1)
    budget = costs.total(start)
    evolved = evolve_genes(
        partial(loss_of_genes, judge),
        [allocate(losses, costs, budget), start],
        costs,
        budget,
        np.random.default_rng(0),
        run.generations,
        run.children,
    )
    return {
        "budget": budget,
        "sensitivities": {site: found.tolist() for site, found in losses.items()},
        "losses": list(evolved.losses),
        "genes": evolved.genes,
        **described("base", widths.models[-1]),
        **described("final", widths.model(evolved.genes)),
    }


# ---- records --------------------------------------------------------------------------------------------------------


def pixels(name: str, count: int) -> np.ndarray:
    """The first images of a golden array, [count, height, width, channels] in float32."""
    with np.load(GOLDEN / "data.npz") as file:
        return np.ascontiguousarray(file[name][:count].transpose(0, 2, 3, 1), np.float32)


def described(name: str, model: Model | QuantizedModel) -> Record:
    """A model by its logits: a digest of all, and for humans the first four."""
    found = logits(model)
    return {
        f"{name}_first_logits": found.ravel()[:4].tolist(),
        f"{name}_logits": hashlib.sha256(found.tobytes()).hexdigest(),
    }


def outcome_record(outcome: Quantization) -> Record:
    return {
        "log": events(outcome),
        **described("float", outcome.teacher),
        **described("base", outcome.base),
        **described("final", outcome.model),
    }


def resumed(run: Run) -> Record:
    """A run that is killed after every few saves; also whether it ends as one that is not."""
    assert run.saves is not None
    kills, found = 0, None
    with tempfile.TemporaryDirectory() as folder:
        while found is None:
            try:
                with killed(run.saves):
                    found = outcome_record(quantized(run, Path(folder) / "run"))
            except Killed:
                kills += 1
    whole = outcome_record(quantized(run))
    return {"kills": kills, "differs_from_uninterrupted": difference(whole, found), **found}


def record_of(name: str) -> Record:
    """What a run comes to, as JSON gives it back."""
    run = RUNS[name]
    if isinstance(run, Mixed):
        found = mixed(run)
    elif run.saves:
        found = resumed(run)
    else:
        found = outcome_record(quantized(run))
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MANY_MAPS:
        jax.clear_caches()
    return dict(json.loads(json.dumps(found)))


def difference(there: Any, here: Any, name: str = "") -> str | None:
    """Where two records differ first, in words; None where they are equal, floats bit for bit."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [*there, *(key for key in here if key not in there)]
        parts = [(f"{name}.{key}" if name else key, there.get(key), here.get(key)) for key in keys]
    elif isinstance(there, list) and isinstance(here, list):
        pairs = itertools.zip_longest(there, here)
        parts = [(f"{name}[{index}]", *pair) for index, pair in enumerate(pairs)]
    else:
        return None if _exactly(there) == _exactly(here) else f"{name}: {there!r} recorded, {here!r} here"
    return next((found for name, a, b in parts if (found := difference(a, b, name))), None)


def _exactly(value: Any) -> Any:
    return ("float", value.hex()) if isinstance(value, float) else (type(value).__name__, value)


# ---- the file -------------------------------------------------------------------------------------------------------


def header() -> Record:
    """What bits depend on, beside the code: the kind of processor and versions. And the commit."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    names = ("model name", "vendor_id", "cpu family", "model")
    flags = info.get("flags", info.get("Features", "")).split()
    return {
        "commit": commit(),
        "processor": {name: info[name] for name in names if name in info} or platform.processor(),
        "flags": sorted(flag for flag in flags if any(part in flag for part in VECTORS)),
        "versions": {name: _version(name) for name in PACKAGES},
        "devices": len(jax.devices()),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def commit() -> str:
    """The commit of the code that runs, marked where the package has changes beyond it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout

    return git("rev-parse", "HEAD").strip() + (" with changes" if git("status", "--porcelain", "cptv_jax") else "")


def text_of(content: Record) -> str:
    """JSON with a line for each event and each other field, so that differences of two files can be read."""

    def field(name: str, value: Any) -> str:
        if name != "log" or not value:
            return f"   {json.dumps(name)}: {json.dumps(value)}"
        return '   "log": [\n' + ",\n".join(f"    {json.dumps(event)}" for event in value) + "\n   ]"

    runs = (
        f"  {json.dumps(name)}: {{\n" + ",\n".join(field(*item) for item in run.items()) + "\n  }"
        for name, run in content["runs"].items()
    )
    top = json.dumps(content["header"], indent=1).replace("\n", "\n ")
    return f'{{\n "header": {top},\n "runs": {{\n' + ",\n".join(runs) + "\n }\n}\n"


def read(path: Path) -> Record:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def incomparable(recorded: Record, here: Record) -> str | None:
    """How this machine or its packages differ from those that recorded, in words."""
    then, now = ({name: found.get(name) for name in COMPARED} for found in (recorded, here))
    return difference(then, now)


def refuse(path: Path, recorded: Record, reason: str) -> int:
    """Says why nothing is compared, and what to do."""
    print(
        f"{path} was recorded on another kind of processor or with other versions ({reason}); bits are only "
        f"comparable on the same. Check out the recorded commit, {recorded['commit']}, with this script, record there "
        "on this machine into another file, and compare with that. --anyway compares all the same.",
        file=sys.stderr,
    )
    return 2


def record(path: Path, names: Sequence[str], here: Record) -> int:
    runs: Record = {}
    if set(names) != set(RUNS) and path.exists():  # some runs anew, beside the others
        known = read(path)
        reason = incomparable(known["header"], here) or difference(known["header"]["commit"], here["commit"], "commit")
        if reason:
            print(f"{path} was recorded elsewhere ({reason}); record all runs anew", file=sys.stderr)
            return 2
        runs = known["runs"]
    failed = 0
    for name in names:
        start = time.perf_counter()
        runs[name] = record_of(name)
        differs = runs[name].get("differs_from_uninterrupted")
        failed += bool(differs)
        remark = f"; differs from the uninterrupted run at {differs}" if differs else ""
        print(f"{name}: recorded ({time.perf_counter() - start:.1f} s){remark}", flush=True)
    ordered = {name: runs[name] for name in RUNS if name in runs}
    path.write_text(text_of({"header": here, "runs": ordered}), encoding="utf-8")
    return int(failed > 0)


def compare(path: Path, names: Sequence[str], here: Record, anyway: bool) -> int:
    known = read(path)
    reason = incomparable(known["header"], here)
    if reason and not anyway:
        return refuse(path, known["header"], reason)
    different = 0
    for name in names:
        start = time.perf_counter()
        found: str | None = "not recorded"
        if name in known["runs"]:
            try:
                found = difference(known["runs"][name], record_of(name))
            except Exception as error:  # a run that fails is one that differs; the others are of interest still
                traceback.print_exc()
                found = f"raised {type(error).__name__}"
        allowed = next((why for pattern, why in ALLOWED.items() if fnmatchcase(name, pattern)), None)
        different += found is not None and allowed is None
        verdict = f"different, {found}{f'; allowed: {allowed}' if allowed else ''}" if found else "equal"
        print(f"{name}: {verdict} ({time.perf_counter() - start:.1f} s)", flush=True)
    print(
        f"{len(names) - different} of {len(names)} runs as at commit {known['header']['commit']}, or allowed to differ"
    )
    if different and known["header"]["cores"] != here["cores"]:
        print(f"{known['header']['cores']} cores recorded, {here['cores']} here: sums may be divided otherwise")
    return int(different > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=["*"], help="these runs, or patterns of names")
    parser.add_argument("--anyway", action="store_true", help="compare on another machine or with other versions too")
    options = parser.parse_args()
    unknown = [pattern for pattern in options.only if not any(fnmatchcase(name, pattern) for name in RUNS)]
    if unknown:
        parser.error(f"no run is named {', '.join(unknown)}; there are {', '.join(RUNS)}")
    names = [name for name in RUNS if any(fnmatchcase(name, pattern) for pattern in options.only)]
    jax.config.update("jax_platforms", "cpu")
    if len(jax.devices()) != 1:
        print(f"one CPU device is wanted, here are {len(jax.devices())}; take them out of XLA_FLAGS", file=sys.stderr)
        return 2
    if options.command == "record":
        return record(options.file, names, header())
    return compare(options.file, names, header(), options.anyway)


if __name__ == "__main__":
    sys.exit(main())
