"""What XLA compiles for GPUs that this machine does not have. `make test-gpu-compile` runs these tests.

They need jax's CUDA libraries (4.5 GB), so they have their own environment and the marker `gpu_aot`. Without the libraries
they are skipped.
"""

import importlib.util

import gpu_compile
import pytest
from gpu_compile import GPUS

CONFIGS = "configs/ofa_resnet50.py", "configs/dynabert_sst2.py"
HAS_LIBRARIES = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
needs_libraries = pytest.mark.skipif(not HAS_LIBRARIES, reason="needs jax's CUDA libraries: make test-gpu-compile")
PROGRAM = """
%moved (p: f32[1,1,8,16]) -> f32[16,8] {
  %t.1 = f32[16,1,1,8]{3,2,1,0} transpose(%p), dimensions={3,0,1,2}
}
%gemm (a: f32[8,16]) -> f32[16,8] {
  %t.2 = f32[16,8]{1,0} transpose(%a), dimensions={1,0}
}
ENTRY %main (w: f32[1,1,8,16], x: f32[9,9]) -> f32[] {
  %f = f32[16,1,1,8]{3,2,1,0} fusion(%w), kind=kInput, calls=%moved
  %g = f32[16,8]{1,0} fusion(%w), kind=kCustom, calls=%gemm
  %c = f32[8,16]{0,1} copy(%b)
  %y = f32[9,9]{0,1} copy(%x)
}
"""


def test_only_kernels_that_move_weights_count_as_transposes():
    assert gpu_compile.transposes(PROGRAM, {(8, 16)}) == 2
    assert gpu_compile.transposes(PROGRAM, {(8, 17)}) == 0


@pytest.mark.skipif(HAS_LIBRARIES, reason="has the libraries")
def test_without_libraries_the_program_says_what_to_install(run_program):
    assert "pip install -e '.[gpu-aot]'" in run_program("serve/bench/gpu_compile.py", "debug", status=2).stderr


@pytest.fixture(scope="module")
def counts(run_program):
    """The counts for an H100 by config, program, way and batch size."""
    found = run_program("serve/bench/gpu_compile.py", *CONFIGS, "--ways", "kept", json_file=True, fresh=True).json
    return {(c["config"], c["program"], c["way"], c["batch"]): gpu_compile.Counts(**c) for c in found}


@pytest.mark.gpu_aot
@needs_libraries
@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "program", "batch", "launches"),
    [
        ("ofa_resnet50", "largest", 1, 75),
        ("ofa_resnet50", "largest", 16, 75),
        ("ofa_resnet50", "smallest", 1, 50),
        ("ofa_resnet50", "smallest", 16, 50),
        ("dynabert_sst2", "largest", 1, 180),
        ("dynabert_sst2", "largest", 16, 165),
    ],
)
def test_a_subnet_with_its_own_executable_is_one_command_buffer_of_few_launches(counts, config, program, batch, launches):
    found = counts[config, program, "kept", batch]
    assert found.launches <= launches
    assert found.transposes == 0
    assert found.fused == found.convolutions == {"largest": 61, "smallest": 36}[program] * (config == "ofa_resnet50")
    assert (found.conditionals, found.buffers, found.singles) == (0, 1, 0)


@pytest.mark.gpu_aot
@needs_libraries
@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("config", ["ofa_resnet50", "dynabert_sst2"])
def test_a_bucket_is_one_command_buffer_without_a_host_wait(counts, config, batch):
    found = counts[config, "bucket", "kept", batch]
    assert found.conditionals > 0
    assert (found.buffers, found.singles) == (1, 0)
    if config == "ofa_resnet50":  # an activation of DynaBERT has the shape of a weight at batch 1
        assert found.transposes == 0


@pytest.mark.gpu_aot
@needs_libraries
@pytest.mark.slow
def test_a_program_of_every_gpu_compiles(run_program):
    arguments = ("configs/digits_resnet.py", "--gpus", *GPUS, "--batch-sizes", 1)
    found = run_program("serve/bench/gpu_compile.py", *arguments, json_file=True, fresh=True)
    assert {c["gpu"] for c in found.json} == set(GPUS)
    assert "nothing was executed" in found.stdout
