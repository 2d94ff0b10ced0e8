"""A small convolutional network, as in a tutorial: BatchNorm, pooling, Dropout, and a flatten with hard-coded sizes."""

import dataclasses

from flax import nnx

from models.case import Case


@dataclasses.dataclass(frozen=True)
class Sizes:
    conv1: int = 16
    conv2: int = 24
    hidden: int = 32


class CNN(nnx.Module):
    def __init__(self, conv1, conv2, hidden, num_classes, rngs):
        self.conv1 = nnx.Conv(3, conv1, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(conv1, rngs=rngs)
        self.conv2 = nnx.Conv(conv1, conv2, kernel_size=(3, 3), padding="VALID", use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(conv2, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.linear1 = nnx.Linear(2 * 2 * conv2, hidden, rngs=rngs)
        self.linear2 = nnx.Linear(hidden, num_classes, rngs=rngs)
        self.features = conv2

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="SAME")
        x = nnx.relu(self.norm2(self.conv2(x)))
        x = x.reshape(-1, 2 * 2 * self.features)
        x = nnx.relu(self.linear1(self.drop(x)))
        return self.linear2(x)


CASE = Case(
    name="cnn",
    build=lambda sizes, rngs: CNN(sizes.conv1, sizes.conv2, sizes.hidden, num_classes=4, rngs=rngs),
    sizes=Sizes(),
    shrink=lambda shapes: Sizes(shapes["conv1.kernel"][-1], shapes["conv2.kernel"][-1], shapes["linear1.kernel"][-1]),
    shape=(8, 8, 3),
)
