"""A count of the kernels that a training run makes Triton compile, on a mocked GPU by bench/gpu/cold_start.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.cold_start import OBJECTIVES, STAGES

pytest.importorskip("triton")
TESTS = Path(__file__).parents[1]
COUNT = """
import json, sys, fastvae
from bench.gpu.cold_start import STAGES, Stage, stages

single = [STAGES[0], Stage("an example alone", 10, (1,))]
with fastvae.use_backend("triton"):
    found = [*stages("cuda", compiles=False), *stages("cuda", ["ELBO", "IWAE, 5 samples"], single, compiles=False)]
    print(json.dumps([[c.objective, c.stage.what, c.stage.D, c.kernels] for c in found]))
"""


@pytest.fixture(scope="module")
def counted() -> list[Any]:
    """[objective, stage, D, {kernel: new binaries}], from a process that sees a GPU and is not in the interpreter."""
    path = os.pathsep.join(
        map(str, (TESTS.parent, TESTS / "support" / "mocked_gpu", TESTS, os.environ.get("PYTHONPATH", "")))
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTVAE_CUDA_LIBRARY")}
    environment |= {"PYTHONPATH": path, "MOCKED_GPU_COMPILES": "1"}
    ran = subprocess.run([sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout)


@pytest.fixture(params=OBJECTIVES)
def stages(counted: list[Any], request: pytest.FixtureRequest) -> dict[tuple[str, int], int]:
    found = {
        (what, D): sum(kernels.values())
        for objective, what, D, kernels in counted
        if objective == request.param and what != "an example alone"
    }
    assert list(found) == [(s.what, s.D) for s in STAGES]
    return found


def test_a_training_run_compiles_few_kernels(stages: dict[tuple[str, int], int]) -> None:
    """A training run compiles few kernels, with its last batch, which is smaller and odd."""
    assert 2 <= sum(n for (_, D), n in stages.items() if D == 10) <= 15


def test_another_batch_size_compiles_none(stages: dict[tuple[str, int], int]) -> None:
    others = [n for (what, _), n in stages.items() if "another model" not in what][1:]
    assert others == [0, 0]


def test_a_last_batch_of_one_compiles_none(counted: list[Any]) -> None:
    """A last batch of one compiles no kernel, for those objectives that can be had from one."""
    found = [(objective, kernels) for objective, what, _, kernels in counted if what == "an example alone"]
    assert found == [("ELBO", {}), ("IWAE, 5 samples", {})]


def test_another_latent_dimension_compiles_few(stages: dict[tuple[str, int], int]) -> None:
    others = [n for (what, _), n in stages.items() if what == "another model"]
    assert len(others) == 3
    assert max(others) <= 4


def test_what_goes_through_pairs_is_compiled_once_for_all_dimensions(counted: list[Any]) -> None:
    of_pairs = {"_pack", "joint_rows", "_joint_columns", "_joint_and_marginals", "_marginal_rows", "_combine_columns"}
    first = {k for _, what, _, kernels in counted if what != "another model" for k in kernels}
    later = {k for _, what, _, kernels in counted if what == "another model" for k in kernels}
    assert of_pairs <= first
    assert not of_pairs & later
