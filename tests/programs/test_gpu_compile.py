"""What XLA compiles for GPUs that this machine does not have. `make test-gpu-compile` runs these tests.

They need jax's CUDA libraries (4.5 GB), so they have their own environment and the marker `gpu_aot`. They are skipped without
the libraries, and in runs without `-m gpu_aot`.
"""

import importlib.util

import gpu_compile
import pytest
from gpu_compile import GPUS

CONFIGS = "configs/ofa_resnet50.py", "configs/dynabert_sst2.py"
HAS_LIBRARIES = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
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


def limits(largest, smallest, dynabert_16, dynabert_1):
    """The most launches of OFA-ResNet50's largest and smallest subnet, and of DynaBERT's largest at batch 16 and 1."""
    return {
        ("ofa_resnet50", "largest", 1): largest,
        ("ofa_resnet50", "largest", 16): largest,
        ("ofa_resnet50", "smallest", 1): smallest,
        ("ofa_resnet50", "smallest", 16): smallest,
        ("dynabert_sst2", "largest", 16): dynabert_16,
        ("dynabert_sst2", "largest", 1): dynabert_1,
    }


LIMITS = {
    ("h100", "float32"): limits(75, 50, 165, 180),
    ("h100", "bfloat16"): limits(75, 50, 180, 180),
    ("a100", "float32"): limits(75, 50, 165, 180),
}


@pytest.fixture(scope="module")
def compiler(request):
    """Skips a test that compiles for a GPU, unless the option -m names its marker and jax's CUDA libraries are there."""
    if "gpu_aot" not in request.config.option.markexpr or not HAS_LIBRARIES:
        pytest.skip("needs -m gpu_aot and jax's CUDA libraries: make test-gpu-compile")


@pytest.fixture(scope="module", params=LIMITS, ids="-".join)
def counts(request, compiler, run_program):
    """The GPU and dtype, and the counts by config, program and batch size. Prints them."""
    gpu, dtype = request.param
    options = ("--gpus", gpu, "--dtype", dtype, "--slicing", "kept")
    found = run_program("serve/bench/gpu_compile.py", *CONFIGS, *options, json_file=True, fresh=True)
    print(found.stdout)
    return request.param, {(c["config"], c["program"], c["batch"]): gpu_compile.Counts(**c) for c in found.json}


@pytest.mark.gpu_aot
@pytest.mark.slow
@pytest.mark.parametrize(("config", "program", "batch"), limits(0, 0, 0, 0))
def test_a_subnet_with_its_own_executable_is_one_command_buffer_of_few_launches(counts, config, program, batch):
    target, found = counts[0], counts[1][config, program, batch]
    assert found.launches <= LIMITS[target][config, program, batch]
    assert found.transposes == 0
    assert found.fused == found.convolutions == {"largest": 61, "smallest": 36}[program] * (config == "ofa_resnet50")
    assert (found.conditionals, found.buffers, found.separate_launches) == (0, 1, 0)


@pytest.mark.gpu_aot
@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("config", ["ofa_resnet50", "dynabert_sst2"])
def test_a_bucket_is_one_command_buffer_without_a_host_wait(counts, config, batch):
    found = counts[1][config, "bucket", batch]
    assert found.conditionals > 0
    assert (found.buffers, found.separate_launches) == (1, 0)
    if config == "ofa_resnet50":  # an activation of DynaBERT has the shape of a weight at batch 1
        assert found.transposes == 0


@pytest.mark.gpu_aot
@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("config", "plain"), [("ofa_resnet50", "plain_ofa_resnet"), ("dynabert_sst2", "plain_dynabert")])
def test_a_subnet_of_a_plain_module_has_the_kernels_of_the_hand_written_family(config, plain, run_program):
    arguments = (f"configs/{config}.py", f"docs/examples/{plain}.py", "--gpus", "h100", "--slicing", "kept")
    found = run_program("serve/bench/gpu_compile.py", *arguments, json_file=True, fresh=True)
    print(found.stdout)
    same = ("launches", "transposes", "convolutions", "fused", "conditionals", "buffers", "separate_launches")
    kernels = {(c["config"], c["program"], c["batch"]): [c[name] for name in same] for c in found.json}
    own = [key for key in kernels if key[0] == config and not key[1].startswith("bucket")]
    assert len(own) >= 4
    for _, program, batch in own:
        assert kernels[plain, program, batch] == kernels[config, program, batch], (program, batch)


@pytest.mark.gpu_aot
@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_the_programs_of_every_gpu_and_both_ways_to_slice_are_counted(run_program):
    arguments = ("configs/digits_resnet.py", "--gpus", *GPUS, "--batch-sizes", 1)
    found = run_program("serve/bench/gpu_compile.py", *arguments, json_file=True, fresh=True)
    assert {(c["gpu"], c["slicing"]) for c in found.json} == {(gpu, way) for gpu in GPUS for way in ("kept", "in_call")}
    assert "nothing was executed" in found.stdout
