"""The public names of superserve_jax, for type checkers and for `__init__.py`."""

from . import errors as errors
from .engines.base import Engine as Engine
from .errors import (
    AccuracyFloorError as AccuracyFloorError,
    AdmissionError as AdmissionError,
    ConfigError as ConfigError,
    ConversionError as ConversionError,
    DataError as DataError,
    DeadlineError as DeadlineError,
    DeadlineExpiredError as DeadlineExpiredError,
    EngineLostError as EngineLostError,
    ExportError as ExportError,
    InferenceError as InferenceError,
    InputError as InputError,
    NotCalibratedError as NotCalibratedError,
    NotFiniteError as NotFiniteError,
    PolicyError as PolicyError,
    ProfileError as ProfileError,
    QueueFullError as QueueFullError,
    ServerClosedError as ServerClosedError,
    SpaceTooLargeError as SpaceTooLargeError,
    SubnetError as SubnetError,
    SuperServeError as SuperServeError,
    ThreadStartError as ThreadStartError,
    UnknownNameError as UnknownNameError,
    WorkersLostError as WorkersLostError,
    WriteError as WriteError,
)
from .exports.directory import export as export, load as load
from .exports.model import Model as Model, Served as Served
from .profile import Profile as Profile, Row as Row
from .remote.devices import RayDevice as RayDevice, ray_device as ray_device, ray_devices as ray_devices
from .scaling.autoscaler import Autoscaler as Autoscaler
from .scheduling.policies.base import Decision as Decision, State as State
from .serving.futures import Future as Future, Reply as Reply
from .serving.options import ServerOptions as ServerOptions
from .serving.server import Server as Server
from .space import Axis as Axis, SearchSpace as SearchSpace
from .subnet import Subnet as Subnet
from .supernets.family import FamilyConfig as FamilyConfig
from .supernets.supernet import SuperNet as SuperNet
from .tracing.elastic import elastic as elastic
from .training.config import TrainConfig as TrainConfig
from .training.loop import train as train
from .training.runs import Run as Run
from .vocabulary import Vocabulary as Vocabulary

__version__: str

IMPORTED_NS: int
__version__: str
