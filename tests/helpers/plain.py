"""Plain networks of NumPy with the small weights of one subnet, without this library's operators."""

import itertools

import numpy as np
from scipy import special


def whole_space(config):
    """Every subnet. If a subnet may name its kept blocks, with any allowed set of them."""
    space = config.space()
    if space.rule == "first":
        return list(space.enumerate())
    every = itertools.product((0, 1), repeat=space.num_blocks)
    choices = [list(itertools.product(*axis.choices)) for axis in space.axes]
    named = itertools.product([g for g in every if sum(g) in config.depths], *choices)
    names = ["gates", *(axis.name for axis in space.axes)]
    return list(dict.fromkeys(space.subnet(**dict(zip(names, values, strict=True))) for values in named))


def network(config, params, subnet, inputs, statistics):
    """Logits of a subnet of any built-in family."""
    if config.family in ("dynabert", "vit"):  # their norms need no statistics
        return (dynabert if config.family == "dynabert" else vit)(config, params, subnet, inputs)
    return ofa_resnet(config, params, subnet, inputs, statistics)


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
        y = np.einsum("bhwcij,ijcd->bhwd", windows(x, len(kernel), stride), kernel * gain, optimize=True) + bias
        return np.maximum(y, 0) if relu else y

    x = (images / 255.0 - np.array(config.mean)) / np.array(config.std)
    x = conv_norm(x, "stem.0", config.stem_stride, sizes["stem.mid"])
    if sizes["stem.gate"]:
        x = x + conv_norm(x, "stem.1", 1, sizes["stem.mid"])
    x = conv_norm(x, "stem.2", 1, sizes["stem.out"])
    if config.stem_pool:
        x = windows(x, 3, 2, constant_values=-np.inf).max((-2, -1))
    b = 0
    for m, depths in enumerate(config.depths):
        out = sizes[f"stage{m}.out"]
        for i in range(depths[-1]):
            if sizes[f"block{b}.gate"]:
                inner, stride, path = sizes[f"block{b}.mid"], config.strides[m] if i == 0 else 1, f"blocks.{b}"
                first = [(1, inner), (stride, inner)] if config.block == "bottleneck" else [(stride, inner)]
                y = x
                for k, (s, channels) in enumerate(first):
                    y = conv_norm(y, f"{path}.convs.{k}", s, channels)
                y = conv_norm(y, f"{path}.convs.{len(first)}", 1, out, relu=False)
                if f"{path}.shortcut.conv.kernel" in params:
                    x = conv_norm(average_pool(x, stride), f"{path}.shortcut", 1, out, relu=False)
                x = np.maximum(x + y, 0)
            b += 1
    assert position == statistics.shape[1]
    return x.mean((1, 2)) @ np.array(params["classifier.kernel"])[: x.shape[-1]] + np.array(params["classifier.bias"])


def windows(x, size, stride, **padding):
    """All windows of padded images: (B, h, w, C, size, size)."""
    x = np.pad(x, ((0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0)), **padding)
    return np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))[:, ::stride, ::stride]


def average_pool(x, window):
    """Cells at the lower and the right edge average only the pixels inside the image."""
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % window), (0, -x.shape[2] % window), (0, 0)), constant_values=np.nan)
    b, h, w, c = x.shape
    return np.nanmean(x.reshape(b, h // window, window, w // window, window, c), axis=(2, 4))


def dynabert(config, params, subnet, inputs):
    """The subnet as plain BERT with small weights, without this library's operators. One sequence and head at a time."""
    logits = []
    for ids, types in np.moveaxis(inputs, -1, 1):
        real = ids != config.pad_id
        x = params["embeddings.words"][ids] + params["embeddings.positions"][: len(ids)] + params["embeddings.types"][types]
        x = layer_norm(x, params, "embeddings.norm", config.eps)
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
            x = layer_norm(x + y, params, f"{layer}.attention_norm", config.eps)
            y = x @ params[f"{layer}.ffn_in.kernel"][:, :neurons] + params[f"{layer}.ffn_in.bias"][:neurons]
            y = gelu(y) @ params[f"{layer}.ffn_out.kernel"][:neurons]
            x = layer_norm(x + y + params[f"{layer}.ffn_out.bias"], params, f"{layer}.ffn_norm", config.eps)
        pooled = np.tanh(x[0] @ params["pooler.kernel"] + params["pooler.bias"])
        logits.append(pooled @ params["classifier.kernel"] + params["classifier.bias"])
    return np.stack(logits)


def vit(config, params, subnet, images):
    """The subnet as a plain ViT with small weights, without this library's operators. One image and head at a time."""
    axes, whole = dict(subnet.axes), config.widths[-1]
    d, side, logits = round(axes.get("width", (1.0,))[0] * whole), config.image_size // config.patch, []

    def norm(x, name):
        return layer_norm(x, params, name, config.eps)

    def scaled(y, name):
        return y * params[name][:d] if name in params else y

    for image in images:
        pixels = (image / 255.0 - np.array(config.mean)) / np.array(config.std)
        cells = pixels.reshape(side, config.patch, side, config.patch, -1).swapaxes(1, 2).reshape(side**2, -1)
        x = cells @ params["patches.kernel"][..., :d].reshape(-1, d) + params["patches.bias"][:d]
        x = x + params["positions"][0, :, :d]
        x = np.concatenate([params["tokens"][0, :, :d], x]) if config.tokens else x
        for i in np.flatnonzero(subnet.gates):
            block, heads = f"blocks.{i}", round(axes["heads"][i] * config.heads[-1])
            inner, y = norm(x, f"{block}.norm1"), params[f"{block}.attention.out.bias"][:d]
            for h in range(heads):
                q, k, v = (
                    inner @ params[f"{block}.attention.{n}.kernel"][:d, h] + params[f"{block}.attention.{n}.bias"][h]
                    for n in ("query", "key", "value")
                )
                scores = np.exp(q @ k.T / np.sqrt(whole / config.heads[-1]))
                y = y + scores / scores.sum(-1, keepdims=True) @ v @ params[f"{block}.attention.out.kernel"][h, :, :d]
            x = x + scaled(y, f"{block}.scale1")
            neurons = round(axes["expand"][i] * config.mlp[-1])
            y = norm(x, f"{block}.norm2") @ params[f"{block}.fc1.kernel"][:d, :neurons] + params[f"{block}.fc1.bias"][:neurons]
            y = gelu(y) @ params[f"{block}.fc2.kernel"][:neurons, :d] + params[f"{block}.fc2.bias"][:d]
            x = x + scaled(y, f"{block}.scale2")
        if config.pool == "mean_norm":
            x = norm(x[config.tokens :].mean(0), "norm")
        else:
            x = norm(x, "norm")
        logits.append(vit_head(config, params, x))
    return np.stack(logits)


def vit_head(config, params, x):
    """Logits of normalised tokens; of their mean for mean_norm."""
    kernel, bias, d = params["head.kernel"], params["head.bias"], x.shape[-1]
    if config.pool == "mean_norm":
        return x @ kernel[:d] + bias
    mean = x[config.tokens :].mean(0)
    if config.pool == "mean":
        return mean @ kernel[:d] + bias
    first = x[0] @ kernel[:d] + bias
    if config.pool == "token_mean":
        return first + mean @ kernel[config.widths[-1] :][:d]
    return first if config.pool == "token" else (first + x[1] @ params["head2.kernel"][:d] + params["head2.bias"]) / 2


def gelu(x):
    return x * (1 + special.erf(x / np.sqrt(2))) / 2


def layer_norm(x, params, name, eps):
    y, d = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps), x.shape[-1]
    return y * params[f"{name}.scale"][:d] + params[f"{name}.bias"][:d]
