"""Classes of the protocol's messages, made from the compiled definitions in protos/.

They are in a pool of their own. protobuf's default pool takes each name once in a process, so a program that also imports
`tritonclient.grpc` or `kserve` would fail there.
"""

import importlib.resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_SET = importlib.resources.files("superserve_jax") / "gateway/grpc/protos/descriptors.binpb"


def _pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(_SET.read_bytes()).file:
        pool.AddSerializedFile(file.SerializeToString())
    return pool


POOL = _pool()
"""The descriptors of all messages and services."""


def named(name: str) -> Any:
    """The class of a message.

    >>> named("inference.ServerReadyResponse")(ready=True).SerializeToString()
    b'\\x08\\x01'
    """
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))
