"""The live page: its files, its stream of events, and the demo's control.

The page loads nothing from elsewhere. Its headers forbid that, and also that another page shows it in a frame.
"""

import pathlib
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from superserve_jax import errors
from superserve_jax.gateway import bodies, tensors
from superserve_jax.gateway.events import Events
from superserve_jax.gateway.failures import RequestError
from superserve_jax.gateway.messages import Answer, Request
from superserve_jax.gateway.model import ServedModel, find
from superserve_jax.gateway.sampling import Sampler

FOLDER = pathlib.Path(__file__).parent / "page"
_KINDS = {".html": b"text/html; charset=utf-8", ".js": b"text/javascript", ".css": b"text/css", ".svg": b"image/svg+xml"}
_SAFE = (
    (b"content-security-policy", b"default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
_VENDORED = "uplot-"
_DEMO_BYTES = 4096

_Rate = Annotated[float, msgspec.Meta(ge=0.0)]


class _Asked(msgspec.Struct):
    """The body of a request to /demo."""

    model: str
    steady_qps: _Rate | None = None
    burst_qps: _Rate | None = None


class LivePage:
    """The page at `/`.

    Args:
      models: the models by name. They are read once a second, so they may come and go.
      demo: whether the page has controls that send traffic to the models that are there now.

    Attributes:
      paths: the paths that it answers, and their methods.
      public: the targets of its files. They need no token: they have no figures, and the page asks for the token.
    """

    def __init__(self, models: Mapping[str, ServedModel], *, demo: bool = False):
        self._models, self._demos = models, dict[str, Any]()
        self._events = Events(Sampler(models, demo=self._demo_states if demo else None))
        self._files = {"/": _read(FOLDER / "index.html")}
        for path in FOLDER.rglob("*"):
            if path.suffix in _KINDS and path.suffix != ".html":
                self._files[f"/static/{path.relative_to(FOLDER).as_posix()}"] = _read(path)
        self.public = frozenset(path.encode() for path in self._files)
        self.paths: dict[str, tuple[str, ...]] = {**dict.fromkeys(self._files, ("GET", "HEAD")), "/events": ("GET",)}
        if demo:
            from superserve_jax.gateway.demo import Demo  # here, since importing the load generator takes long

            self._make_demo = lambda model: Demo(model, lambda: self._events.open > 0)
            self.paths["/demo"] = ("POST",)

    def start(self) -> None:
        """Starts the samples, and with them the demo's traffic. Called in the event loop."""
        self._events.start()

    def close(self) -> None:
        """Ends the demo's traffic, and takes no new streams. Any thread may call it, also twice."""
        self._events.closed = True
        for demo in [*self._demos.values()]:
            demo.close()

    def answer(self, request: Request) -> Answer:
        """Answers a request to one of `paths`, with one of its methods. Raises RequestError or ClosingError."""
        path = request.path
        if path == "/events":
            return self._events.answer()
        return self._control(request) if path == "/demo" else self._files[path]

    def _control(self, request: Request) -> Answer:
        """Changes the demo's traffic. Answers its new state."""
        body = bodies.read(request, _DEMO_BYTES)
        try:
            asked = msgspec.json.decode(body, type=_Asked)
        except tensors.MALFORMED as e:
            raise RequestError(
                f'the body is not a request for traffic: {errors.one_line(e)[:300]}; send {{"model": "a", "burst_qps": 1000}}'
            ) from e
        demo = find(self._demos, asked.model)
        demo.set(steady_qps=asked.steady_qps, burst_qps=asked.burst_qps)
        return Answer(msgspec.json.encode(demo.state()))

    def _demo_states(self) -> dict[str, Any]:
        """The state of each demo. Called once a second: first starts and ends demos, as models have come and gone."""
        models, before = dict(self._models.items()), self._demos
        self._demos = {name: demo for name, demo in before.items() if models.get(name) is demo.model}
        for name in before.keys() - self._demos.keys():
            before[name].stop()
        for name in [] if self._events.closed else models.keys() - self._demos.keys():
            self._demos[name] = self._make_demo(models[name])
            self._demos[name].start()
        return {name: demo.state() for name, demo in self._demos.items()}


def _read(path: pathlib.Path) -> Answer:
    """A file of the page. A vendored one has its version in its path, so a browser may keep it."""
    cache = b"max-age=31536000, immutable" if path.parent.name.startswith(_VENDORED) else b"no-cache"
    return Answer(path.read_bytes(), 200, ((b"content-type", _KINDS[path.suffix]), (b"cache-control", cache), *_SAFE))
