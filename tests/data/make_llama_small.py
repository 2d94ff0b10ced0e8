"""Makes llama_small.npz and .json: a small Llama of Hugging Face with random weights, and logits of it and of its subnets.

It needs PyTorch and transformers, which the tests do not need. The versions that were used are in llama_small.json:

    pip install torch transformers
    python tests/data/make_llama_small.py

Each subnet is a small Llama with a config of its own. It gets the first entries of the whole network's weights.
"""

import json
import pathlib

import numpy as np
import torch
import transformers

PATH = pathlib.Path(__file__).with_name("llama_small")
SIZES = {"num_classes": 5, "vocab_size": 12, "head_dim": 8, "rotary_base": 50.0, "eps": 1e-3, "max_length": 10}
SUBNETS = [
    {"width": 24, "blocks": [0, 1, 2], "kv_heads": 2, "group": 3, "hidden": 32},
    {"width": 12, "blocks": [0, 2], "kv_heads": 2, "group": 2, "hidden": 24},
    {"width": 18, "blocks": [1], "kv_heads": 1, "group": 1, "hidden": 8},
]
LENGTHS = (10, 6, 3, 1)


def build(width: int, blocks: list[int], kv_heads: int, group: int, hidden: int) -> torch.nn.Module:
    """A classifier of these sizes."""
    config = transformers.LlamaConfig(
        vocab_size=SIZES["vocab_size"],
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=len(blocks),
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=SIZES["head_dim"],
        rms_norm_eps=SIZES["eps"],
        rope_parameters={"rope_type": "default", "rope_theta": SIZES["rotary_base"]},
        pad_token_id=0,
        num_labels=SIZES["num_classes"],
    )
    return transformers.LlamaForSequenceClassification(config).eval()


def cut(state: dict[str, torch.Tensor], subnet: dict) -> dict[str, torch.Tensor]:
    """The state of a smaller network: the first channels, neurons, heads of keys, and heads of queries for each of them."""
    whole, found = SUBNETS[0], {}
    width, hidden, kv_heads, group = (subnet[name] for name in ("width", "hidden", "kv_heads", "group"))
    for name, value in state.items():
        path = name.split(".")
        if "layers" in path:
            number = path.index("layers") + 1
            if int(path[number]) not in subnet["blocks"]:
                continue
            path[number] = str(subnet["blocks"].index(int(path[number])))
        match path[-2]:
            case "q_proj" | "k_proj" | "v_proj":
                groups, kept = (whole["group"], group) if path[-2] == "q_proj" else (1, 1)
                heads = value.reshape(whole["kv_heads"], groups, SIZES["head_dim"], whole["width"])
                value = heads[:kv_heads, :kept, :, :width].reshape(-1, width)
            case "o_proj":
                heads = value.reshape(whole["width"], whole["kv_heads"], whole["group"], SIZES["head_dim"])
                value = heads[:width, :kv_heads, :group].reshape(width, -1)
            case "gate_proj" | "up_proj":
                value = value[:hidden, :width]
            case "down_proj":
                value = value[:width, :hidden]
            case _:  # embeddings, norms and the classifier
                value = value[..., :width]
        found[".".join(path)] = value
    return found


def main() -> None:
    """Writes both files."""
    torch.manual_seed(0)
    network = build(**SUBNETS[0])
    for value in network.parameters():
        value.data.normal_(1.0 if value.dim() == 1 else 0.0, 0.3 if value.dim() == 1 else (2.0 / value.shape[-1]) ** 0.5)
        value.data.copy_(value.data.half().float())
    ids = np.random.default_rng(0).integers(1, SIZES["vocab_size"], (len(LENGTHS), SIZES["max_length"]), dtype=np.int32)
    ids[np.arange(SIZES["max_length"]) >= np.array(LENGTHS)[:, None]] = 0
    ids[0, 4] = ids[1, 0] = 0  # padding may be anywhere
    logits = []
    for subnet in SUBNETS:
        smaller = build(**subnet)
        smaller.load_state_dict(cut(network.state_dict(), subnet))
        with torch.no_grad():
            inputs = torch.tensor(ids, dtype=torch.int64)
            logits.append(smaller(inputs, attention_mask=(inputs != 0).long()).logits.numpy())
    state = {f"state/{name}": value.numpy().astype(np.float16) for name, value in network.state_dict().items()}
    np.savez_compressed(PATH.with_suffix(".npz"), **state, ids=ids, logits=np.stack(logits))
    about = {
        "source": "random weights; logits computed by transformers in float32 on the CPU",
        "versions": {library.__name__: library.__version__ for library in (torch, transformers)},
        "sizes": SIZES,
        "subnets": SUBNETS,
    }
    PATH.with_suffix(".json").write_text(json.dumps(about) + "\n")


if __name__ == "__main__":
    main()
