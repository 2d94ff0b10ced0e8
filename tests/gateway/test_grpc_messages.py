"""The messages of gRPC: the compiled definitions are those of the .proto files, and they disturb no other pool."""

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from superserve_jax.gateway.grpc import messages

PROTOS = Path(messages.__file__).parent / "protos"


def test_the_compiled_definitions_are_those_of_the_files(tmp_path):
    pytest.importorskip("grpc_tools")
    files = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto") if path.stem != "model_config")
    made = tmp_path / "descriptors.binpb"
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        "-I",
        ".",
        "--include_imports",
        f"--descriptor_set_out={made}",
        *files,
    ]
    subprocess.run(command, cwd=PROTOS, check=True)
    expected, found = (descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()) for path in (made, PROTOS / made.name))
    assert {file.name: file for file in found.file} == {file.name: file for file in expected.file}
    assert len(found.file) == 5


def test_the_default_pool_has_none_of_them():
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("inference.ModelInferRequest")
    assert messages.named("inference.ModelInferRequest").DESCRIPTOR.full_name == "inference.ModelInferRequest"
