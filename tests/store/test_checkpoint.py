"""Checkpoints from strangers: each damaged file loads as it was saved or raises CheckpointError, nothing else."""

import json
import os
import pickle
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitween
from bitween import CheckpointError, Scheme
from bitween.store.checkpoint import TensorFiles, read_json
from tests import tiny_models
from tests.quantized_models import MIXED, SYMMETRIC, llama

IDS = tiny_models.tokens(1, 5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{format: (directory, logits)} of two saved models."""
    result = {}
    for name, schemes, embedding in (("compressed-tensors", SYMMETRIC, None), ("native", MIXED, Scheme(6, 16))):
        model = llama(schemes, tied=True, embedding=embedding, config={"num_hidden_layers": 1})
        directory = tmp_path_factory.mktemp(name) / "model"
        assert bitween.save_model(model, None, directory).format == name
        result[name] = directory, tiny_models.logits(model, IDS)
    return result


@pytest.fixture
def native(saved, tmp_path):
    """A copy of the native model without checksums, so that the checks behind them show."""
    shutil.copytree(saved["native"][0], tmp_path / "copy")
    (tmp_path / "copy" / "bitween.json").unlink()
    return tmp_path / "copy"


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD_HEADERS = {
    "empty": (b"", "not a whole"),
    "not JSON": (b"xxxx", "not valid JSON"),
    "an array": (b"[]", "expected a JSON object"),
    "not UTF-8": (b'{"\xff": 1}', "not valid JSON"),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "twice": (b'{"a":{},"a":{}}', "appears twice"),
    "NaN": (b'{"a": NaN}', "not a JSON number"),
    "name with ..": ({"a/../b": entry()}, "unusable tensor name"),
    "name with NUL": ({"a\0": entry()}, "unusable tensor name"),
    "unknown dtype": ({"a": entry("Q4")}, "dtype"),
    "dtype a list": ({"a": entry(["U8"])}, "dtype"),
    "negative shape": ({"a": entry(shape=(-4,))}, "shape"),
    "float shape": ({"a": entry(shape=(4.0,))}, "shape"),
    "huge shape": ({"a": entry(shape=(0, 2**64 - 1), offsets=(0, 0))}, "shape"),
    "wrong bytes": ({"a": entry(shape=(5,))}, "data_offsets"),
    "end before begin": ({"a": entry(offsets=(4, 0))}, "data_offsets"),
    "beyond the file": ({"a": entry(shape=(8,), offsets=(0, 8))}, "data_offsets"),
    "overlap": ({"a": entry(), "b": entry()}, "begin"),
    "hole": ({"a": entry(shape=(2,), offsets=(2, 4))}, "begin"),
    "left over": ({"a": entry(shape=(2,), offsets=(0, 2))}, "bytes"),
    "extra field": ({"a": {**entry(), "x": 1}}, "expected dtype"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_row_25_bad_headers_are_refused(name, tmp_path):
    header, message = BAD_HEADERS[name]
    write_raw(tmp_path / "model.safetensors", header, b"abcd")
    with pytest.raises(CheckpointError, match=message) as caught:
        TensorFiles(tmp_path)
    assert caught.value.file.endswith("model.safetensors")
    assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason


@pytest.mark.parametrize("n", [0, 7, 8, 9])
def test_row_25_short_files_are_refused(n, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x40" + bytes(n - 1) if n else b"")
    with pytest.raises(CheckpointError, match="not a whole"):
        TensorFiles(tmp_path)


def test_every_dtype_is_read_as_safetensors_reads_it(tmp_path):
    dtypes = ["bool", "uint8", "int8", "int16", "float16", "bfloat16", "int32", "float32", "int64", "float64"]
    tensors = {d: torch.arange(12).reshape(3, 4).to(getattr(torch, d)) for d in dtypes}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    for name, want in load_file(tmp_path / "model.safetensors").items():
        found = files.read(name)
        assert found.dtype == want.dtype
        assert torch.equal(found, want)


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        ((2**32, 2**32), (0, 0)),  # wraps to exactly 0 in 64 bits
        ((2**31, 2**33), (0, 4)),
        ((2**63,), (0, 4)),
        ((2**64 + 4,), (0, 4)),  # wraps to 4
        ((4,), (2**64, 2**64 + 4)),
        ((1,) * 65 + (4,), (0, 4)),
        ((True, 4), (0, 4)),
        (("4",), (0, 4)),
        ((4,), ("0", 4)),
    ],
    ids=str,
)
def test_row_26_numbers_from_files_are_checked(shape, offsets, tmp_path):
    write_raw(tmp_path / "model.safetensors", {"a": entry(shape=shape, offsets=offsets)}, bytes(4))
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*(shape|data_offsets)"):
        TensorFiles(tmp_path)


def test_row_30_a_file_that_shrinks_is_noticed(tmp_path):
    save_file({"a": torch.zeros(100), "b": torch.ones(100)}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    os.truncate(tmp_path / "model.safetensors", os.path.getsize(tmp_path / "model.safetensors") - 40)
    assert files.read("a").sum() == 0
    with pytest.raises(CheckpointError, match="became shorter while it was read") as raised:
        files.read("b")
    assert raised.value.tensor == "b"


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "..", "a\0.safetensors", "b/a.safetensors", 3])
def test_row_28_shards_must_lie_in_the_directory(name, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="expected the name of a"):
        TensorFiles(tmp_path)


def test_index_and_shards_must_agree(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for weight_map, message in [
        ({"a": "one.safetensors", "b": "one.safetensors"}, "it is not"),
        ({"a": "one.safetensors", "c": "two.safetensors"}, "it is not"),
        ({"a": "one.safetensors", "b": "three.safetensors"}, "No such file"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            TensorFiles(tmp_path)
    save_file({"a": torch.zeros(2), "b": torch.ones(2)}, tmp_path / "two.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(CheckpointError, match="also in one"):
        TensorFiles(tmp_path)


def test_pickles_and_empty_directories_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither is here"):
        bitween.load_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="convert to safetensors"):
        bitween.load_model(tmp_path)
    with pytest.raises(CheckpointError, match="expected a directory"):
        bitween.load_model(tmp_path / "none")


def change(directory, name, edit):
    """Rewrite one tensor of a saved model; None drops it."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    new = edit(tensors.pop(name).clone() if name in tensors else None)
    save_file(tensors if new is None else {**tensors, name: new}, path)


Q = "model.layers.0.self_attn.q_proj"
TERNARY = "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(
    ("tensor", "edit", "message"),
    [
        (f"{Q}.codes", lambda t: None, "missing"),
        (f"{Q}.zeros", lambda t: None, "missing"),
        ("model.norm.weight", lambda t: None, "missing"),
        ("extra", lambda t: torch.zeros(2), "not a tensor of this model"),
        (f"{Q}.codes", lambda t: t[:, :-4].clone(), "expected"),
        (f"{Q}.codes", lambda t: t.view(torch.int8), "expected torch.uint8"),
        (f"{Q}.scales", lambda t: t.float(), "expected torch.float16"),
        (f"{Q}.scales", lambda t: t.fill_(0), "above 0"),
        (f"{Q}.scales", lambda t: t.neg(), "above 0"),
        (f"{Q}.scales", lambda t: t.fill_(float("nan")), "above 0"),
        (f"{Q}.scales", lambda t: t.fill_(float("inf")), "above 0"),
        (f"{TERNARY}.codes", lambda t: t.fill_(243), "242"),
        ("model.layers.0.mlp.gate_proj.zeros", lambda t: t.fill_(3), "at most 2"),
        ("model.norm.weight", lambda t: t.fill_(float("inf")), "NaN or infinity"),
        ("model.norm.weight", lambda t: t[:-1].clone(), "expected"),
    ],
)
def test_wrong_tensors_are_refused(tensor, edit, message, native):
    assert bitween.load_model(native)[0].get_submodule("model.layers.0.mlp.gate_proj").scheme == MIXED[4]
    change(native, tensor, edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        bitween.load_model(native)
    assert caught.value.tensor == tensor


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["quantization_config"].update(schema_version=2), "upgrade it"),
        (lambda c: c["quantization_config"].update(schema_version=True), "positive integer"),
        (lambda c: c["quantization_config"].update(quant_method="hqq"), "expected one of bitween"),
        (lambda c: c["quantization_config"].update(plan={}), "names no layer"),
        (lambda c: c["quantization_config"]["plan"].update({Q: "9b g64 sym"}), "bits"),
        (lambda c: c["quantization_config"]["plan"].update({Q: 4}), "expected a scheme"),
        (lambda c: c["quantization_config"]["plan"].update({Q: "8b g32 asym"}), "expected"),
        (lambda c: c["quantization_config"]["plan"].update({"model.norm": "4b g64 sym"}), "expected a linear layer"),
        (lambda c: c["quantization_config"]["plan"].update({"nothing": "4b g64 sym"}), "no such layer"),
        (lambda c: c.pop("quantization_config"), "quantization_config"),
        (lambda c: c.update(num_hidden_layers=10**9), "num_hidden_layers"),
        (lambda c: c.update(hidden_size=1 << 40), "expected|config"),
        (lambda c: c.update(model_type="nothing"), "nothing"),
        (lambda c: c.update(auto_map={"AutoConfig": "evil.Config"}, model_type="evil"), "config.json"),
    ],
)
def test_wrong_configs_are_refused(edit, message, native):
    config = json.loads((native / "config.json").read_text())
    edit(config)
    (native / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        bitween.load_model(native)


def test_checksums_and_newer_manifests(saved, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(saved["native"][0], directory)
    manifest = read_json(directory / "bitween.json")
    assert set(manifest["sha256"]) >= {"config.json", "model.safetensors"}
    change(directory, "model.norm.weight", lambda t: t + 1)
    with pytest.raises(CheckpointError, match="checksum"):
        bitween.load_model(directory)
    (directory / "bitween.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(CheckpointError, match="schema_version"):
        bitween.load_model(directory)


def mutate(data, rng):
    """One random damage to a file's bytes."""
    data = bytearray(data)
    kind, at = rng.randrange(5), rng.randrange(len(data))
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at] = rng.randbytes(rng.randrange(1, 9))
    elif kind == 3:
        del data[at : at + rng.randrange(1, 9)]
    else:
        head = min(len(data), 2000)
        at = rng.randrange(head)
        data[at] = rng.choice(b'0123456789-{}[],:."eN\\\x00\xff')
    return bytes(data)


def fuzz(saved, tmp_path, seed, n):
    """Counts of mutated models that loaded and that were refused."""
    rng, loaded, refused = random.Random(seed), 0, 0
    for i in range(n):
        source, want = saved[rng.choice(sorted(saved))]
        directory = tmp_path / "fuzz"
        shutil.copytree(source, directory)
        checksums = i % 2 == 0
        if not checksums:
            (directory / "bitween.json").unlink()
        files = ["model.safetensors", "config.json", *(["bitween.json"] if checksums else [])]
        path = directory / rng.choice(files)
        path.write_bytes(mutate(path.read_bytes(), rng))
        try:
            model, _ = bitween.load_model(directory)
        except CheckpointError:
            refused += 1
        else:
            loaded += 1
            if checksums:
                assert torch.equal(tiny_models.logits(model, IDS), want)
        shutil.rmtree(directory)
    return loaded, refused


def test_mutated_models_load_equal_or_are_refused(saved, tmp_path):
    loaded, refused = fuzz(saved, tmp_path, seed=0, n=300)
    assert loaded > 10
    assert refused > 100


@pytest.mark.slow
def test_ten_thousand_mutated_models(saved, tmp_path):
    loaded, refused = fuzz(saved, tmp_path, seed=1, n=10_000)
    assert loaded + refused == 10_000
    assert min(loaded, refused) > 500
