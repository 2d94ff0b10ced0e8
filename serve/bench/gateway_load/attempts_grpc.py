"""Makes attempts (see `malformed_grpc`) on the port of gRPC, and judges what comes back."""

import asyncio
import collections
import contextlib

import grpc

from gateway_load import attempts
from gateway_load.attempts import BrokenRuleError
from gateway_load.malformed import Attempt
from gateway_load.malformed_grpc import Call

BROKEN = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}
"""The statuses that no call may get."""
_PATIENCE_S = 0.05
_READ = 1 << 16
_OWN = "Internal error from Core"  # so grpcio says that it could not send all messages, since the answer came before


def _same(message: bytes) -> bytes:
    return message


def channel(port: int) -> grpc.aio.Channel:
    """A channel for the calls of one event loop."""
    sizes = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=sizes)


async def call(made: grpc.aio.Channel, tried: Call, limit_s: float) -> collections.Counter[str]:
    """Makes one call. Returns the counts of its statuses. Raises BrokenRuleError if the gateway has broken a rule."""
    coders = {"request_serializer": _same, "response_deserializer": _same}
    try:
        async with asyncio.timeout(tried.timeout_s + limit_s):
            if tried.streams:
                stream = made.stream_stream(tried.path, **coders)
                answers = stream(iter(tried.messages), timeout=tried.timeout_s, metadata=tried.metadata)
                async for _ in answers:
                    pass
            else:
                unary = made.unary_unary(tried.path, **coders)
                await unary(tried.messages[0], timeout=tried.timeout_s, metadata=tried.metadata)
    except grpc.aio.AioRpcError as e:
        if e.code() in BROKEN and e.details() != _OWN:
            raise BrokenRuleError(f"status {e.code().name}: {e.details()}") from e
        if e.code() is grpc.StatusCode.DEADLINE_EXCEEDED and tried.timeout_s >= 1:
            raise BrokenRuleError(f"no answer in {tried.timeout_s:g} s") from e
        return collections.Counter({e.code().name: 1})
    except asyncio.CancelledError as e:  # so grpcio says that the other side has cancelled the call
        raise BrokenRuleError("the call was cancelled") from e
    except TimeoutError as e:
        raise BrokenRuleError(f"the call has not ended {limit_s:g} s after its deadline") from e
    return collections.Counter({"OK": 1})


async def attempt(port: int, tried: Attempt, limit_s: float) -> collections.Counter[str]:
    """Sends bytes of HTTP/2. Raises BrokenRuleError if the connection stays open after the client has closed its side."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        cut_off = await attempts.send(writer, tried.steps)
        if tried.leaves is not None:
            if tried.leaves == "closes":
                writer.close()
            return collections.Counter({"left": 1})
        received = await _read(reader, _PATIENCE_S)
        if not cut_off:
            with contextlib.suppress(OSError):
                writer.write_eof()
        if await _read(reader, limit_s) is None:
            raise BrokenRuleError(f"the connection was still open {limit_s:g} s after the client's end of it was closed")
        return collections.Counter({"closed" if received is not None else "waited": 1})
    finally:
        attempts.abort(writer)


async def _read(reader: asyncio.StreamReader, limit_s: float) -> bool | None:
    """Reads until the connection is closed: True. None if the time is over before."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            try:
                while await reader.read(_READ):
                    pass
            except ConnectionError:
                pass
            return True
    return None
