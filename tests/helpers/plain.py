"""Plain networks of NumPy with the small weights of one subnet, without this library's operators."""

import itertools

import numpy as np
from scipy import special


def whole_space(config):
    """Every subnet with any allowed set of kept layers. The every-other rule offers only some of these sets."""
    space = config.space()
    for gates in itertools.product((0, 1), repeat=config.num_layers):
        if sum(gates) in config.depths:
            options = [itertools.product(config.heads, config.ffn) if g else [(config.heads[0], config.ffn[0])] for g in gates]
            for choice in itertools.product(*options):
                heads, ffn = zip(*choice, strict=True)
                yield space.subnet(gates=gates, heads=heads, ffn=ffn)


def ofa_resnet(config, params, subnet, images, statistics):
    """The subnet as a plain network with small weights, without this library's operators. Its kernels contain the norms."""
    sizes = config.sizes(subnet)
    position = 0

    def conv_norm(x, path, stride, channels, relu=True):
        nonlocal position
        kernel = np.array(params[f"{path}.conv.kernel"])[:, :, : x.shape[-1], :channels]
        mean, var = statistics[:, position : position + channels]
        position += channels
        gain = np.array(params[f"{path}.norm.scale"])[:channels] / np.sqrt(var + 1e-5)
        bias = np.array(params[f"{path}.norm.bias"])[:channels] - mean * gain
        y = plain_convolution(x, kernel * gain, stride) + bias
        return np.maximum(y, 0) if relu else y

    x = (images / 255.0 - np.array(config.mean)) / np.array(config.std)
    x = conv_norm(x, "stem.0", config.stem_stride, sizes["stem.mid"])
    if sizes["stem.gate"]:
        x = x + conv_norm(x, "stem.1", 1, sizes["stem.mid"])
    x = conv_norm(x, "stem.2", 1, sizes["stem.out"])
    if config.stem_pool:
        x = plain_max_pool(x)
    b = 0
    for m, depths in enumerate(config.depths):
        out = sizes[f"stage{m}.out"]
        for i in range(depths[-1]):
            if sizes[f"block{b}.gate"]:
                inner, stride, path = sizes[f"block{b}.mid"], config.strides[m] if i == 0 else 1, f"blocks.{b}"
                if config.block == "bottleneck":
                    y = conv_norm(x, f"{path}.convs.0", 1, inner)
                    y = conv_norm(y, f"{path}.convs.1", stride, inner)
                    y = conv_norm(y, f"{path}.convs.2", 1, out, relu=False)
                else:
                    y = conv_norm(x, f"{path}.convs.0", stride, inner)
                    y = conv_norm(y, f"{path}.convs.1", 1, out, relu=False)
                if f"{path}.shortcut.conv.kernel" in params:
                    x = conv_norm(plain_average_pool(x, stride), f"{path}.shortcut", 1, out, relu=False)
                x = np.maximum(x + y, 0)
            b += 1
    assert position == statistics.shape[1]
    return x.mean((1, 2)) @ np.array(params["classifier.kernel"])[: x.shape[-1]] + np.array(params["classifier.bias"])


def plain_convolution(x, kernel, stride):
    k = kernel.shape[0]
    p = k // 2
    x = np.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
    h, w = ((n - k) // stride + 1 for n in x.shape[1:3])
    y = 0
    for i in range(k):
        for j in range(k):
            y = y + x[:, i : i + stride * h : stride, j : j + stride * w : stride] @ kernel[i, j]
    return y


def plain_max_pool(x):
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    h, w = ((n - 3) // 2 + 1 for n in x.shape[1:3])
    return np.max([x[:, i : i + 2 * h : 2, j : j + 2 * w : 2] for i in range(3) for j in range(3)], 0)


def plain_average_pool(x, window):
    h, w = (-(-n // window) for n in x.shape[1:3])
    cells = [
        [x[:, i * window : (i + 1) * window, j * window : (j + 1) * window].mean((1, 2)) for j in range(w)] for i in range(h)
    ]
    return np.stack([np.stack(line, 1) for line in cells], 1)


def dynabert(config, params, subnet, inputs):
    """The subnet as plain BERT with small weights, without this library's operators. One sequence and head at a time."""
    logits = []
    for ids, types in np.moveaxis(inputs, -1, 1):
        real = ids != config.pad_id
        x = params["embeddings.words"][ids] + params["embeddings.positions"][: len(ids)] + params["embeddings.types"][types]
        x = plain_norm(x, params, "embeddings.norm", config.eps)
        for i in np.flatnonzero(subnet.gates):
            layer, neurons = f"layers.{i}", int(subnet["ffn"][i])
            y = params[f"{layer}.attention_out.bias"]
            for head in range(int(subnet["heads"][i])):
                part = slice(head * config.head_size, (head + 1) * config.head_size)
                q, k, v = (
                    x @ params[f"{layer}.{n}.kernel"][:, part] + params[f"{layer}.{n}.bias"][part]
                    for n in ("query", "key", "value")
                )
                scores = np.exp(q @ k.T / np.sqrt(config.head_size)) * real
                y = y + scores / scores.sum(-1, keepdims=True) @ v @ params[f"{layer}.attention_out.kernel"][part]
            x = plain_norm(x + y, params, f"{layer}.attention_norm", config.eps)
            y = x @ params[f"{layer}.ffn_in.kernel"][:, :neurons] + params[f"{layer}.ffn_in.bias"][:neurons]
            y = y * (1 + special.erf(y / np.sqrt(2))) / 2 @ params[f"{layer}.ffn_out.kernel"][:neurons]
            x = plain_norm(x + y + params[f"{layer}.ffn_out.bias"], params, f"{layer}.ffn_norm", config.eps)
        pooled = np.tanh(x[0] @ params["pooler.kernel"] + params["pooler.bias"])
        logits.append(pooled @ params["classifier.kernel"] + params["classifier.bias"])
    return np.stack(logits)


def plain_norm(x, params, name, eps):
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return y * params[f"{name}.scale"] + params[f"{name}.bias"]
