"""The calls of the extension model_repository: the index, loads and unloads."""

from collections.abc import Callable
from typing import Any

from superserve_jax.gateway.failures import RequestError
from superserve_jax.gateway.grpc import messages, methods
from superserve_jax.gateway.grpc.calls import Call
from superserve_jax.gateway.repository import Repository

CHANGES = ("RepositoryModelLoad", "RepositoryModelUnload")
"""The calls that may take long."""

_IndexRequest, _IndexResponse = (messages.named(f"inference.RepositoryIndex{kind}") for kind in ("Request", "Response"))
_LoadRequest, _UnloadRequest = (messages.named(f"inference.{name}Request") for name in CHANGES)


def answers(models: Repository) -> dict[str, Callable[[Call], Any]]:
    """The functions of the calls by name, as `methods.of_service` takes them."""

    async def index(call: Call) -> bytes:
        message = methods.parsed(_IndexRequest, await call.read_small())
        return _IndexResponse(models=await models.index(ready_only=message.ready)).SerializeToString()

    async def load(call: Call) -> bytes:
        await models.load(*await _change(call, _LoadRequest))
        return b""

    async def unload(call: Call) -> bytes:
        await models.unload(*await _change(call, _UnloadRequest))
        return b""

    return {"RepositoryIndex": index, **dict(zip(CHANGES, (load, unload), strict=True))}


async def _change(call: Call, kind: Any) -> tuple[str, dict[str, Any]]:
    """The name of the model to load or to unload, and the parameters."""
    message = methods.parsed(kind, await call.read_small())
    if message.repository_name:
        raise RequestError(f"repository_name is {message.repository_name[:100]!r}; the repository has no name, leave it out")
    chosen = {name: value.WhichOneof("parameter_choice") for name, value in message.parameters.items()}
    return message.model_name, {name: field and getattr(message.parameters[name], field) for name, field in chosen.items()}
