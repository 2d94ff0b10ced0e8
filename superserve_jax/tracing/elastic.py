"""`ss.elastic`: any Flax NNX module as a SuperNet.

    net = ss.elastic(MyViT(rngs=nnx.Rngs(0)), jax.ShapeDtypeStruct((1, 32, 32, 3), "float32"))
    print(net.found)                                    # what can change, and what cannot and why
    logits = net(images, net.space.smallest())

A family has a name and a config, so it can be trained from configs, exported and loaded in another process:

    @ss.elastic.family("my_vit", axes={"heads": None}, depth={"blocks": (6, 9, 12)})
    @dataclasses.dataclass(frozen=True)
    class MyViTConfig:
        num_classes: int = 10
        def build(self, rngs): return MyViT(self, rngs=rngs)
        def input_spec(self, batch): return jax.ShapeDtypeStruct((batch, 32, 32, 3), "float32")
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx

from superserve_jax import errors
from superserve_jax.subnet import Subnet
from superserve_jax.supernets import registry
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.tracing import agreement
from superserve_jax.tracing.family import ElasticConfig
from superserve_jax.tracing.found import Found
from superserve_jax.tracing.kernels import kernel_select
from superserve_jax.tracing.modules import Call, Source
from superserve_jax.tracing.options import Choices, Follows, Options

C = TypeVar("C", bound=type)


class ElasticNet(SuperNet):
    """A SuperNet that `ss.elastic` made of a module."""

    config: ElasticConfig

    @property
    def found(self) -> Found:
        """What can change in the module, and what cannot and why. `print` shows it as a report."""
        return self.config.found

    def extract(self, subnet: Subnet) -> dict[str, jax.Array | None]:
        """The parameters of a subnet: {the path in the module: array}. None for a parameter that the subnet does not read."""
        sizes = self.config.sizes(self.space.validate(subnet))
        read = self.config.shapes(sizes)
        return {n: self.config.cut(n, self.params, sizes) if n in read else None for n in self.params}


class Elastic:
    """`ss.elastic`, see the docstring of its module."""

    kernel_select = staticmethod(kernel_select)

    def __call__(
        self,
        module: nnx.Module,
        input_spec: jax.ShapeDtypeStruct,
        *,
        name: str | None = None,
        call: Call | None = None,
        axes: Mapping[str, Choices] | None = None,
        depth: Mapping[str, Sequence[int] | None] | None = None,
        rule: str = "first",
        divisor: int = 1,
        method: str = "__call__",
        follows: Follows | None = None,
    ) -> ElasticNet:
        """Makes a SuperNet of a module. The SuperNet has the module's weights, and the module is not changed.

        Args:
          module: a Flax NNX module that returns one array (batch, classes). If it was made by `nnx.eval_shape`, the SuperNet
            can tell what is elastic, but not run.
          input_spec: shape and dtype of the module's input. The first axis is the batch, of any size.
          name: the family's name in runs and exports. The default for a class MLP is "elastic_mlp". Another process calls
            `ss.elastic` with this name before it reads them.
          call: `call(module, inputs)` or `call(module, inputs, train)`, if the module is not called as `module(inputs)`.
          axes: {a kind, or a pattern of axes' names: ratios (floats), sizes (ints), or None for not elastic}. Kinds are
            "heads", "expand", "width", "head_dim" and "kernel". By default, heads and expand have the ratios 0.25, 0.5, 0.75
            and 1, and kernels of `kernel_select` have all of their sizes. In a pattern, "*" stands for any text.
          depth: {a pattern of stages' names: numbers of blocks to keep, or None for all of them}. By default, a stage keeps
            at least half of its blocks.
          rule: which blocks a smaller depth keeps: "first" or "every_other".
          divisor: sizes that come from ratios are multiples of it, except numbers of heads.
          method: the method by which the module calls its blocks.
          follows: {a pattern of axes' names: (the name of another axis, a function)}, such as {"blocks.*.squeeze":
            ("blocks.*.expand", lambda n: n // 4)}. These axes have no choice of their own: their size is the function of the
            other axis's size. Each "*" in the other name stands for what the pattern's "*" matched.

        Raises:
          ConfigError: the module cannot be traced, returns something else, or has nothing that is elastic. Or an entry of
            `axes` names only axes of `follows`.
          UnknownNameError: an entry of `axes`, `depth` or `follows` names nothing.

        >>> class MLP(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.fc1 = nnx.Linear(4, 16, rngs=rngs)
        ...         self.fc2 = nnx.Linear(16, 3, rngs=rngs)
        ...     def __call__(self, x):
        ...         return self.fc2(nnx.relu(self.fc1(x)))
        >>> net = Elastic()(MLP(nnx.Rngs(0)), jax.ShapeDtypeStruct((1, 4), "float32"))
        >>> small = net.space.subnet(expand=0.5)
        >>> net(jax.numpy.ones((2, 4)), small).shape, net.extract(small)["fc1.kernel"].shape
        ((2, 3), (4, 8))
        """
        source = Source(module, call)
        family_name = name or f"elastic_{type(module).__name__.lower()}"
        old = registry.registered(family_name)
        if old is not None and old.__module__ != __name__:
            raise errors.ConfigError(f"family '{family_name}' exists already ({old.__qualname__}); give another name")
        given = _module_config(module, input_spec, call)
        options = Options(axes or {}, depth or {}, rule, divisor, method, follows or {})
        kind = _register(family_name, given, options)
        return ElasticNet(kind(), source.values)

    @staticmethod
    def family(
        name: str,
        *,
        axes: Mapping[str, Choices] | None = None,
        depth: Mapping[str, Sequence[int] | None] | None = None,
        rule: str = "first",
        divisor: int = 1,
        method: str = "__call__",
        follows: Follows | None = None,
    ) -> Callable[[C], C]:
        """A class decorator that makes a family of SuperNets from a frozen dataclass.

        The dataclass has `build(rngs)`, which returns a Flax NNX module, and `input_spec(batch)`. It may have
        `call(module, inputs)` or `call(module, inputs, train)`. The decorator adds everything else.

        Args:
          name: the family's name in runs and exports.
          axes, depth, rule, divisor, method, follows: as in `ss.elastic`.

        Raises ConfigError if the class is no frozen dataclass, or lacks a method.
        """
        options = Options(axes or {}, depth or {}, rule, divisor, method, follows or {})

        def decorate(cls: C) -> C:
            params = getattr(cls, "__dataclass_params__", None)
            if params is None or not params.frozen:
                raise errors.ConfigError(
                    f"{cls!r} must be a frozen dataclass: write @dataclasses.dataclass(frozen=True) below"
                )
            for needed in ("build", "input_spec"):
                if not callable(getattr(cls, needed, None)):
                    raise errors.ConfigError(f"{cls.__name__} needs the method {needed}, see docs/elastic.md")
            return _register(name, cls, options)

        return decorate

    @staticmethod
    def check(net: SuperNet, *, subnets: int = 4) -> int:
        """Runs the module's own code on the parameters of some subnets, and compares the results.

        This finds numbers that the code computes from a size, such as `h.shape[-1] ** 0.5`. A module that stores its sizes,
        such as a number of heads, cannot run with fewer. Such subnets are not compared.

        Args:
          net: a SuperNet of a traced module.
          subnets: how many random subnets to try.

        Returns:
          how many subnets were compared.

        Raises:
          ConfigError: the results differ. The message names numbers that may be the reason.
        """
        return agreement.check(net, subnets)


elastic = Elastic()


def _register(name: str, cls: Any, options: Options) -> Any:
    body = {"family": name, "options": options, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    body["__doc__"] = cls.__doc__
    if "num_classes" in cls.__dataclass_fields__ and not hasattr(cls, "num_classes"):
        body["num_classes"] = None  # else the property of the base class would refuse the field's value
    return registry.register(type(cls.__name__, (cls, ElasticConfig), body))


def _module_config(module: nnx.Module, spec: jax.ShapeDtypeStruct, call_module: Call | None) -> type:
    """A config without fields, whose network is the given module."""
    if not isinstance(spec, jax.ShapeDtypeStruct) or not spec.shape:
        raise errors.ConfigError(
            f"input_spec must be a jax.ShapeDtypeStruct with a batch axis, such as (1, 32, 32, 3); got {spec!r}"
        )
    graphdef, state = nnx.split(module)

    @dataclasses.dataclass(frozen=True)
    class ModuleConfig:
        """The config of a SuperNet that `ss.elastic` made of a module."""

        def build(self, rngs: nnx.Rngs) -> nnx.Module:
            """A copy of the module, with its weights."""
            del rngs
            return nnx.merge(graphdef, state)

        def input_spec(self, batch: int) -> jax.ShapeDtypeStruct:
            """Shape and dtype of a batch of inputs."""
            return jax.ShapeDtypeStruct((batch, *spec.shape[1:]), spec.dtype)

    if call_module is not None:
        ModuleConfig.call = staticmethod(call_module)  # pyright: ignore[reportAttributeAccessIssue]
    return ModuleConfig
