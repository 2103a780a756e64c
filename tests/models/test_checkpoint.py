import json
import os

import pytest
import torch
from safetensors.torch import save_file

from finetune.errors import ModelError
from finetune.models.checkpoint import Checkpoint, base_fingerprint, find_checkpoint
from finetune.models.tensor_file import TensorFile

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.arange(6).view(2, 3).to(torch.bfloat16),
    "c": torch.tensor(7, dtype=torch.int64),
    "d": torch.zeros(0, 5),
    "e": torch.tensor([True, False, True]),
    "f": torch.arange(4).to(torch.float8_e4m3fn),
}


def write(path, tensors=TENSORS, shards=2):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    names = sorted(tensors)
    weight_map = {name: f"model-{index % shards}.safetensors" for index, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, path / shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_reads_what_safetensors_wrote(tmp_path, shards):
    checkpoint = Checkpoint.open(write(tmp_path / "m", shards=shards))
    assert checkpoint.tensors.keys() == TENSORS.keys()
    assert len(checkpoint.shards) == shards
    for name, value in TENSORS.items():
        found = checkpoint.read(name)
        assert found.dtype == value.dtype
        assert found.shape == value.shape
        assert torch.equal(
            found.view(torch.uint8) if found.ndim else found, value.view(torch.uint8) if value.ndim else value
        )
        assert checkpoint.tensors[name].num_bytes == value.nbytes
    assert torch.equal(checkpoint.read("a", slice(1, 3)), TENSORS["a"][1:3])
    assert torch.equal(checkpoint.read("a", slice(2, 99)), TENSORS["a"][2:])


def test_side_files(tmp_path):
    path = write(tmp_path / "m")
    for name in ("tokenizer.json", "LICENSE", ".gitattributes", "chat_template.jinja"):
        (path / name).write_text("x")
    for name in ("pytorch_model.bin", "a.pt", "extra.safetensors", "b.tmp", "pytorch_model.bin.index.json"):
        (path / name).write_text("x")
    (path / "original").mkdir()
    wanted = ("tokenizer.json", "LICENSE", ".gitattributes", "chat_template.jinja", "config.json")
    assert sorted(Checkpoint.open(path).side_files) == sorted(wanted)


def test_side_file_that_links_out_is_refused(tmp_path):
    path = write(tmp_path / "m")
    (tmp_path / "secret").write_text("x")
    (path / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="leads out"):
        Checkpoint.open(path)


@pytest.mark.parametrize("cut", [0, 5, 30, -1, -20])
def test_truncated_shard_is_named(tmp_path, cut):
    path = write(tmp_path / "m")
    shard = path / "model-0.safetensors"
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(ModelError, match=r"model-0\.safetensors"):
        Checkpoint.open(path)


def test_all_missing_shards_are_named(tmp_path):
    path = write(tmp_path / "m", shards=4)
    (path / "model-1.safetensors").unlink()
    (path / "model-3.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        Checkpoint.open(path)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    "name",
    ["/etc/x.safetensors", "../m/model-0.safetensors", "sub/x.safetensors", "model.bin", "..", "a\\b.safetensors"],
)
def test_index_cannot_lead_out(tmp_path, name):
    path = write(tmp_path / "m")
    (path / "sub").mkdir()
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["a"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"index|leads out"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["weight_map"].pop("a"), "a: is not in the index"),
        (lambda index: index["weight_map"].update(z="model-0.safetensors"), "z: is not in the shard"),
        (lambda index: index["weight_map"].update(a="model-1.safetensors"), "a: is not in the shard"),
        (lambda index: index.update(weight_map=[]), "weight_map"),
        (lambda index: index.update(weight_map={"a": 3}), "weight_map"),
        (lambda index: index.update(metadata=[1]), "metadata"),
    ],
)
def test_index_and_shards_agree(tmp_path, change, message):
    path = write(tmp_path / "m")
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=message):
        Checkpoint.open(path)


def test_tensor_in_two_shards(tmp_path):
    path = write(tmp_path / "m")
    save_file({name: TENSORS[name] for name in "abdf"}, path / "model-1.safetensors")
    with pytest.raises(ModelError, match="two shards"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"t": entry()}, b"1234567", "t: reaches past the end"),
        ({"t": entry()}, b"123456789", "no tensor owns"),
        ({"t": entry(shape=(3,))}, b"12345678", "t: needs 12 bytes"),
        ({"t": entry(dtype="F16")}, b"12345678", "t: needs 4 bytes"),
        ({"t": entry(dtype="F31")}, b"12345678", "t: has an unknown dtype"),
        ({"t": entry(shape=(-2,))}, b"12345678", "t: has a shape"),
        ({"t": entry(shape=(1,) * 17)}, b"12345678", "t: has a shape"),
        ({"t": entry(shape=(True, 2))}, b"12345678", "t: has a shape"),
        ({"t": entry(offsets=(8, 0))}, b"12345678", "t: has no .start, end. offsets"),
        ({"t": entry(offsets=(4, 12))}, b"123456789012", "t: does not start where"),
        ({"t": entry(), "u": entry(offsets=(4, 12))}, b"123456789012", "u: does not start where"),
        ({"t": {"dtype": "F32"}}, b"", "t: the header does not say"),
        ({"t": 3}, b"", "t: the header does not say"),
        ({"t": entry(shape=(2**40, 2**40), offsets=(0, 2**82))}, b"", "t: reaches past"),
        ({"__metadata__": {"a": 1}, "t": entry()}, b"12345678", "__metadata__"),
        (b'{"t": 1, "t": 2}', b"", "key twice, got 't'"),
        (b'{"t": ', b"", "not JSON"),
        (b"[" * 5000, b"", "not JSON"),
        (b"\xff\xfe{}", b"", "not JSON"),
        (b"[]", b"", "not a JSON object"),
    ],
)
def test_hostile_headers(tmp_path, header, data, message):
    with pytest.raises(ModelError, match=message):
        TensorFile.open(raw_file(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize("length", [0, 10**6, 10**9, 2**64 - 1])
def test_header_length_lies(tmp_path, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b'{"t": 1}')
    with pytest.raises(ModelError, match="header"):
        TensorFile.open(path)


def test_file_cut_after_opening(tmp_path):
    path = write(tmp_path / "m", shards=1)
    checkpoint = Checkpoint.open(path)
    os.truncate(path / "model.safetensors", (path / "model.safetensors").stat().st_size - 1)
    last = max(checkpoint.tensors, key=lambda name: checkpoint.tensors[name].offsets)
    with pytest.raises(ModelError, match="ends before"):
        checkpoint.read(last)


def test_what_is_not_a_checkpoint(tmp_path):
    with pytest.raises(ModelError, match="not a folder"):
        Checkpoint.open(tmp_path / "nothing")
    folder = tmp_path / "m"
    folder.mkdir()
    with pytest.raises(ModelError, match=r"config\.json: is missing"):
        Checkpoint.open(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        Checkpoint.open(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="neither"):
        Checkpoint.open(folder)
    (folder / "pytorch_model.bin").write_text("x")
    with pytest.raises(ModelError, match="pickles only"):
        Checkpoint.open(folder)
    write(folder)
    save_file(TENSORS, folder / "model.safetensors")
    with pytest.raises(ModelError, match="both"):
        Checkpoint.open(folder)


def test_find_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert find_checkpoint(tmp_path) == tmp_path
    for name in ("a/b", "/no/such", "./no", "no", "a/b/c"):
        with pytest.raises(ModelError):
            find_checkpoint(name)


def test_find_checkpoint_in_the_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--q--tiny/snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--q--tiny/refs").mkdir()
    (tmp_path / "models--q--tiny/refs/main").write_text("a" * 40)
    assert find_checkpoint("q/tiny") == snapshot


def test_fingerprint_tells_bases_apart(tmp_path):
    base = Checkpoint.open(write(tmp_path / "a"))
    same = Checkpoint.open(write(tmp_path / "b", shards=1))
    assert base_fingerprint(base) == base_fingerprint(same)
    changed = Checkpoint.open(write(tmp_path / "c", {**TENSORS, "a": TENSORS["a"] + 1}))
    renamed = Checkpoint.open(write(tmp_path / "d", {("z" if name == "a" else name): v for name, v in TENSORS.items()}))
    other = write(tmp_path / "e")
    (other / "config.json").write_text('{"model_type": "qwen3_moe", "num_experts_per_tok": 4}')
    prints = {base_fingerprint(item) for item in (base, changed, renamed, Checkpoint.open(other))}
    assert len(prints) == 4
