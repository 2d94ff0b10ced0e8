"""Starts actors of Ray, which is imported late."""

from collections.abc import Mapping
from typing import Any

from superserve_jax import errors


def namespace(kind: type) -> str:
    """Ray's namespace of the actors of a class. So a router and a device may have the same name.

    >>> from superserve_jax.remote.host import Host
    >>> namespace(Host)
    'superserve_jax.Host'
    """
    return f"superserve_jax.{kind.__name__}"


def find(kind: type, name: str) -> Any:
    """Ray's handle of the actor of this class that has this name now, or None."""
    import ray

    try:
        return ray.get_actor(name, namespace=namespace(kind))
    except ValueError:
        return None


def start(kind: type, *arguments: Any, options: Mapping[str, Any], name: str, at_once: int) -> Any:
    """Starts an actor, and returns Ray's handle of it. With a name that an actor of its class has already, returns that one.

    Args:
      kind: the class of the actor.
      arguments: of the class.
      options: options in Ray's own terms.
      name: with a name, the actor outlives this process.
      at_once: how many calls may run at the same time: in threads, or as tasks if the methods of the class are coroutines.

    Raises ConfigError if Ray is not installed, if this process has not joined a cluster, or if Ray refuses
    an option.
    """
    try:
        import ray
    except ImportError as error:
        raise errors.ConfigError("devices in other processes need Ray: pip install 'superserve-jax[ray]'") from error

    if not ray.is_initialized():
        raise errors.ConfigError(
            'this process has not joined a cluster of Ray yet; call ray.init("auto") for the cluster of this host, or '
            'ray.init(address="local") to start one on this machine alone'
        )
    # Ray must not make a call again: only the caller knows whether its queries still want an answer.
    ours: dict[str, Any] = {"max_restarts": -1, "max_task_retries": 0, "max_concurrency": at_once}
    if name:
        ours |= {"name": name, "namespace": namespace(kind), "lifetime": "detached", "get_if_exists": True}
    with errors.refusing(errors.ConfigError, f"Ray does not take the options {dict(options)}"):
        return ray.remote(kind).options(**ours, **options).remote(*arguments)
