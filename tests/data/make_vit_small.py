"""Makes vit_small.npz and .json: small vision transformers of Hugging Face and timm with random weights, and their logits.

It needs PyTorch, transformers and timm, which the tests do not need. The versions that were used are in vit_small.json:

    pip install torch transformers timm
    python tests/data/make_vit_small.py

Each network runs whole, and as two smaller subnets: blocks are left out, and the weights that read heads or neurons are zero.
"""

import copy
import json
import pathlib
import random
import tempfile

import numpy as np
import timm
import torch
import transformers
from safetensors.numpy import load_file
from timm.models import vision_transformer

PATH = pathlib.Path(__file__).with_name("vit_small")
WIDTH, DEPTH, HEADS, NEURONS, PATCH = 24, 3, 3, 48, 8
CLASSES = ["cat", "dog", "fish", "horse", "owl"]
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
HUGGING_FACE = {  # {name: (class, image size of the weights, image size of the inputs, fields of the config)}
    "hf_vit": ("ViTForImageClassification", 24, 24, {}),
    "hf_deit": ("DeiTForImageClassification", 24, 32, {}),
    "hf_deit_with_teacher": ("DeiTForImageClassificationWithTeacher", 24, 24, {}),
    "hf_dinov2": ("Dinov2ForImageClassification", 40, 24, {}),
    "hf_dinov2_with_registers": ("Dinov2WithRegistersForImageClassification", 40, 24, {"num_register_tokens": 2}),
}
TIMM = {  # {name: (model, image size of the weights, image size of the inputs, arguments)}
    "timm_vit": ("vit_tiny_patch16_224", 24, 24, {}),
    "timm_deit_distilled": ("deit_tiny_distilled_patch16_224", 24, 24, {}),
    "timm_deit3": ("deit3_small_patch16_224", 24, 24, {}),
    "timm_dinov2": ("vit_small_patch14_dinov2", 40, 24, {}),
    "timm_dinov2_registers": ("vit_small_patch14_reg4_dinov2", 24, 32, {}),
    "timm_mean_norm": ("vit_tiny_patch16_224", 24, 24, {"global_pool": "avg", "in_chans": 1}),
    "timm_mean": ("vit_tiny_patch16_224", 24, 24, {"global_pool": "avg", "class_token": False, "fc_norm": False}),
}


def make_random(network: torch.nn.Module) -> None:
    """Gives every weight a random value that float16 can hold, so that the files are small."""
    for name, value in network.named_parameters():
        is_scale = value.dim() == 1 and name.endswith(("weight", "gamma", "lambda1"))
        spread = 0.3 if value.dim() < 2 else 1.0 if value.dim() == 3 else (1.5 / value[0].numel()) ** 0.5
        value.data.normal_(1.0 if is_scale else 0.0, spread)
        value.data.copy_(value.data.half().float())


def subnets() -> list[dict]:
    """The whole network, a small one and a random one: kept blocks, and heads and neurons of all blocks."""
    choices = random.Random(0)
    chosen = [{"blocks": list(range(DEPTH)), "heads": [n] * DEPTH, "mlp": [m] * DEPTH} for n, m in ((HEADS, NEURONS), (1, 12))]
    chosen[1]["blocks"] = [0, 1]
    heads, neurons = choices.choices(range(1, HEADS + 1), k=DEPTH), choices.choices((12, 24, 36, 48), k=DEPTH)
    return [*chosen, {"blocks": [0, 2], "heads": heads, "mlp": neurons}]


def cut(network: torch.nn.Module, path: str, subnet: dict) -> None:
    """Makes a network compute what the subnet computes. `path` is the path of its list of blocks."""
    blocks = network.get_submodule(path)
    for i, block in enumerate(blocks):
        for name, value in block.named_parameters():
            if name in ("attention.o_proj.weight", "attn.proj.weight"):
                value.data[:, subnet["heads"][i] * WIDTH // HEADS :] = 0
            elif name == "mlp.fc2.weight":
                value.data[:, subnet["mlp"][i] :] = 0
    kept = [blocks[i] for i in subnet["blocks"]]
    parent, _, last = path.rpartition(".")
    is_list = isinstance(blocks, torch.nn.ModuleList)
    setattr(network.get_submodule(parent), last, torch.nn.ModuleList(kept) if is_list else torch.nn.Sequential(*kept))


def images_of(side: int, channels: int) -> tuple[np.ndarray, torch.Tensor]:
    """Raw images, and the same as the original libraries take them."""
    images = np.random.default_rng(side).integers(0, 256, (2, side, side, channels), dtype=np.uint8)
    normalised = (images / 255 - np.array(MEAN[:channels])) / np.array(STD[:channels])
    return images, torch.tensor(normalised.transpose(0, 3, 1, 2), dtype=torch.float32)


def run(network: torch.nn.Module, path: str, x: torch.Tensor, **options: bool) -> np.ndarray:
    """Logits of all subnets: (subnets, batch, classes)."""
    found = []
    for subnet in subnets():
        smaller = copy.deepcopy(network).eval()
        cut(smaller, path, subnet)
        with torch.no_grad():
            output = smaller(x, **options)
        found.append((output if isinstance(output, torch.Tensor) else output.logits).numpy())
    return np.stack(found)


def hugging_face(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The description and the arrays of a network of transformers."""
    kind, stored_size, image_size, fields = HUGGING_FACE[name]
    network_class = getattr(transformers, kind)
    config = network_class.config_class(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=NEURONS,
        mlp_ratio=NEURONS // WIDTH,
        image_size=stored_size,
        patch_size=PATCH,
        id2label=dict(enumerate(CLASSES)),
        **fields,
    )
    network = network_class(config)
    make_random(network)
    images, x = images_of(image_size, 3)
    prefix = network.base_model_prefix
    path = f"{prefix}.layers" if hasattr(network.base_model, "layers") else f"{prefix}.encoder.layer"
    resized = {"interpolate_pos_encoding": True} if prefix in ("vit", "deit") and image_size != stored_size else {}
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        sizes = {"size": {"shortest_edge": image_size + 8}, "crop_size": {"height": image_size, "width": image_size}}
        if not prefix.startswith("dinov2"):
            sizes = {"size": {"height": image_size, "width": image_size}}
        processor = transformers.BitImageProcessor if prefix.startswith("dinov2") else transformers.ViTImageProcessor
        processor(image_mean=MEAN, image_std=STD, **sizes).save_pretrained(folder)
        files = {key: pathlib.Path(folder, f"{file}.json") for key, file in FILES.items()}
        about = {key: json.loads(file.read_text()) for key, file in files.items()}
        state = load_file(pathlib.Path(folder, "model.safetensors"))
    in_memory = {key: value.numpy() for key, value in network.state_dict().items()}
    about["names_in_memory"] = {
        key: next(n for n, v in in_memory.items() if np.array_equal(v, value)) for key, value in state.items()
    }
    return about | {"image_size": image_size}, {
        **arrays_of(state),
        "images": images,
        "logits": run(network, path, x, **resized),
    }


FILES = {"config": "config", "processor": "preprocessor_config"}


def of_timm(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The description and the arrays of a network of timm."""
    model, stored_size, image_size, arguments = TIMM[name]
    sizes = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": NEURONS / WIDTH}
    stored, network = (
        timm.create_model(model, img_size=side, num_classes=len(CLASSES), **sizes, **arguments)
        for side in (stored_size, image_size)
    )
    make_random(stored)
    state = stored.state_dict()
    network.load_state_dict(vision_transformer.checkpoint_filter_fn(dict(state), network))  # resizes positions
    images, x = images_of(image_size, arguments.get("in_chans", 3))
    content = arrays_of({key: value.numpy() for key, value in state.items()})
    return {"image_size": image_size}, {**content, "images": images, "logits": run(network, "blocks", x)}


def arrays_of(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict as arrays of the file. All values are exact in float16."""
    halves = {f"state/{name}": value.astype(np.float16) for name, value in state.items()}
    assert all(np.array_equal(halves[f"state/{name}"].astype(np.float32), value) for name, value in state.items())
    return halves


def main() -> None:
    """Writes both files."""
    torch.manual_seed(0)
    networks, arrays = {}, {}
    for name in (*HUGGING_FACE, *TIMM):
        networks[name], content = hugging_face(name) if name in HUGGING_FACE else of_timm(name)
        arrays |= {f"{name}/{key}": value for key, value in content.items()}
    np.savez_compressed(PATH.with_suffix(".npz"), **arrays)
    versions = {library.__name__: library.__version__ for library in (torch, transformers, timm)}
    about = {
        "source": "random weights; logits computed by transformers and timm in float32 on the CPU",
        "versions": versions,
        "num_heads": HEADS,
        "mean": MEAN,
        "std": STD,
        "class_names": CLASSES,
        "subnets": subnets(),
        "networks": networks,
    }
    PATH.with_suffix(".json").write_text(json.dumps(about) + "\n")


if __name__ == "__main__":
    main()
