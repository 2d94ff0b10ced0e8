"""The Llama of docs/examples computes what transformers' Llama computes, and goes from training to a server."""

import json
import pathlib

import numpy as np
import pytest
from tiny import assert_close

import superserve_jax as ss
from superserve_jax import foreign

EXAMPLE = pathlib.Path(__file__).parents[2] / "docs" / "examples" / "listops_llama.py"
DATA = pathlib.Path(__file__).parents[1] / "data"
LAYERS = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def fixture():
    """What `make_llama_small.py` wrote: the description and the arrays."""
    with np.load(DATA / "llama_small.npz") as arrays:
        return json.loads((DATA / "llama_small.json").read_text()), dict(arrays)


def weights(arrays, blocks):
    """The weights of transformers' Llama under the names of the example."""
    names = {"tokens.embedding": "model.embed_tokens", "norm.scale": "model.norm", "head.kernel": "score"}
    for i in blocks:
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        names |= {f"{ours}.{name}.kernel": f"{theirs}.{their}" for name, their in LAYERS.items()}
        names |= {f"{ours}.norm1.scale": f"{theirs}.input_layernorm"}
        names |= {f"{ours}.norm2.scale": f"{theirs}.post_attention_layernorm"}
    values = {ours: arrays[f"state/{theirs}.weight"].astype(np.float32) for ours, theirs in names.items()}
    return {name: value.T if name.endswith("kernel") else value for name, value in values.items()}


def subnet_of(config, sizes):
    """The subnet with the kept blocks, heads, neurons and width of an entry of the fixture."""
    blocks = sizes["blocks"]
    of_axis = {"attention.out": "group", "attention.value": "kv_heads", "mlp.gate": "hidden"}
    ratios = {"heads": [], "expand": []}
    for axis in config.found.axes:
        for ending, name in of_axis.items():
            if axis.name.endswith(ending):
                ratios[axis.kind].append(sizes[name] / axis.size)
    gates = tuple(int(i in blocks) for i in range(config.depth))
    return config.space().subnet(gates=gates, width=sizes["width"] / config.width, **ratios)


def test_every_subnet_computes_what_transformers_computes_with_a_network_of_its_size(fixture):
    about, arrays = fixture
    whole, *_ = about["subnets"]
    sizes = {name: whole[name] for name in ("width", "kv_heads", "group", "hidden")}
    config = foreign.import_module(str(EXAMPLE)).LlamaConfig(**about["sizes"], **sizes, depth=len(whole["blocks"]))
    net = ss.SuperNet(config, weights(arrays, whole["blocks"]))
    subnets = [subnet_of(config, sizes) for sizes in about["subnets"]]
    assert subnets[0] == net.space.largest()
    for subnet, logits in zip(subnets, arrays["logits"], strict=True):
        assert_close(net(arrays["ids"], subnet), logits)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_it_is_trained_and_served_on_texts(listops_dir, run_program, tmp_path, monkeypatch):
    monkeypatch.setenv("SUPERSERVE_IMPORT", "")
    workdir = tmp_path / "run"
    model = ("--model.width", 8, "--model.depth", 3, "--model.head-dim", 2, "--model.hidden", 8)
    data = ("--data.data-dir", listops_dir, "--data.validation", 50, "--batch-size", 8, "--epochs", 0.2, "--buckets", 1)
    search = ("--eval-every", 0, "--search.candidates", 2, "--search.examples", 50)
    run_program("train/supernet.py", EXAMPLE, *model, *data, *search, "--workdir", workdir, "--import", EXAMPLE)
    served = ss.load(workdir / "export")
    texts = ["[MAX 2 9 [MIN 4 7 ] 0 ]", "[SM 1 2 ]", "[MED " + "3 " * 28 + "]"]
    with ss.Server(served, slo_ms=1000, batch_sizes=(1,), lengths=(16, 32)) as server:
        replies = [server.submit(served.encode(text)).result(timeout=60) for text in texts]
    for text, reply in zip(texts, replies, strict=True):
        assert_close(reply.output[None], served(served.encode([text]), reply.subnet))
        assert reply.label in served.class_names
