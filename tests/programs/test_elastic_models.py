"""train/bench/elastic_models.py, with checkouts that hold one tiny model each."""

import pytest

PROGRAM = "train/bench/elastic_models.py"
RESNET = """
import dataclasses
import jax
from flax import nnx

@dataclasses.dataclass
class ModelConfig:
    blocks: list
    num_classes: int

    @classmethod
    def resnet50(cls):
        return cls([8], 1000)

class ResNet(nnx.Module):
    def __init__(self, config, rngs):
        self.conv, self.bn = nnx.Conv(3, 8, (1, 1), rngs=rngs), nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.fc = nnx.Linear(8, config.num_classes, rngs=rngs)

    def __call__(self, x):
        return self.fc(nnx.relu(self.bn(self.conv(x))).mean((1, 2)))
"""
RESNET_PARAMETERS = 3 * 8 + 8 + 2 * 8 + 8 * 1000 + 1000
CNN = """
import a_library_that_nobody_has

class CNN(nnx.Module):
    def __init__(self, rngs):
        self.linear1, self.linear2 = nnx.Linear(28 * 28, 8, rngs=rngs), nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x, rngs):
        return self.linear2(nnx.relu(self.linear1(x.reshape(len(x), -1))))
"""


@pytest.fixture
def bonsai(tmp_path):
    folder = tmp_path / "bonsai" / "bonsai" / "models"
    (folder / "resnet").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imports every model')")
    (folder / "resnet" / "modeling.py").write_text(RESNET)
    return tmp_path / "bonsai"


@pytest.fixture
def flax(tmp_path):
    for name in ("gemma", "mnist"):
        (tmp_path / "flax" / "examples" / name).mkdir(parents=True)
    (tmp_path / "flax" / "examples" / "mnist" / "train.py").write_text(CNN)
    return tmp_path / "flax"


def test_a_number_that_differs_from_the_stated_one_ends_the_program_with_status_1(run_program, bonsai):
    done = run_program(PROGRAM, "--bonsai", bonsai, "--models", "ResNet-50", "--subnets", 1, status=1, json_file=True)
    parameters, macs = done.json["problems"]
    assert parameters == f"ResNet-50 has {RESNET_PARAMETERS:,} parameters; torchvision's table of weights states 25,557,032"
    assert "states 4.09 G" in macs
    [found] = done.json["published"]
    assert (found["parameters"], found["axes"]) == (RESNET_PARAMETERS, {"expand": 1})
    assert found["smallest_parameters"] < found["parameters"]
    assert found["smallest_macs"] < found["macs"] == 224 * 224 * 3 * 8 + 8 * 1000
    [small] = done.json["small"]
    assert max(small["masked"], small["own_code"]) < 1e-6 < small["effect"]
    assert (small["subnets"], small["own_code_ran"]) == (2, 3)


def test_of_a_file_that_imports_other_libraries_only_the_model_is_run(run_program, flax):
    done = run_program(PROGRAM, "--flax", flax, "--models", "MNIST CNN", "--subnets", 0, status=1, json_file=True)
    assert done.json["problems"] == ["MNIST CNN has 6,370 parameters; the sum of its layers, by hand, states 824,650"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --bonsai PATH or --flax PATH"),
        (["--bonsai", "."], "--bonsai . has no folder bonsai/models; give the path of a checkout of https://github.com/"),
    ],
)
def test_a_path_that_is_no_checkout_is_refused(run_program, arguments, message):
    assert message in run_program(PROGRAM, *arguments, status=2).stderr
