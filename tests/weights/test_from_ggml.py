"""GGUF and old ggml files into Hugging Face folders, against readers and decoders written anew, number by number."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.stories260k import build_stories260k, read_llama2c
from tests.tiny import tiny_model

from tuoling.errors import ModelError
from tuoling.files import read_json
from tuoling.models.load import load_tokenizer
from tuoling.text.render import Segment
from tuoling.weights.convert import ConvertOptions, convert
from tuoling.weights.gguf_reading import GgufFile

UNVERIFIED = ConvertOptions(verify=False)
TEXTS = (
    "Once upon a time, there was a little girl.",
    "  two  spaces 你好，世界 ",
    'She said, "I\'m sorry."\n\nx1y2',
)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def ids_of(folder: Path, text: str) -> list[int]:
    segments = [Segment("", False, "start"), Segment(text, False)]
    return load_tokenizer(folder, for_training=False).encode_segments(segments)[0]


# -- GGUF 1: a real file ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_1(shared_data: Path) -> Path:
    return shared_data / "weights/stories260K/tinyllamas-stories-260k-f32.gguf"


@pytest.fixture(scope="module")
def stories(gguf_1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stories") / "hf"
    convert(gguf_1, out, options=UNVERIFIED)
    return out


@pytest.mark.slow
def test_gguf_1_holds_the_weights_of_llama2c_file(stories: Path, shared_data: Path) -> None:
    _, expected = read_llama2c(shared_data / "weights/stories260K/stories260K.bin")
    found = read_tensors(stories)
    head = found.pop("lm_head.weight", None)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(found[name].numpy(), tensor), name
    assert head is None or np.array_equal(head.numpy(), expected["model.embed_tokens.weight"])
    config = read_json(stories / "config.json")
    assert config["rms_norm_eps"] == 1e-5 and config["intermediate_size"] == 172
    assert read_json(stories / "parity.json") == {"verified": False, "why": "--no-verify"}


@pytest.mark.slow
def test_gguf_1_writes_the_200_greedy_tokens(stories: Path, shared_data: Path) -> None:
    from tuoling.api import load
    from tuoling.text.conversation import Conversation, Turn

    model = load(stories, dtype="fp32", device="cpu")
    begin = Conversation((Turn("text", ""),))
    reply = model.engine.generate([begin], model.settings(max_new_tokens=200, do_sample=False))[0]
    expected = (shared_data / "weights/stories260K/expected_greedy_200.txt").read_text(encoding="utf-8")
    assert (reply.prompt_tokens, reply.completion_tokens) == (1, 200)
    assert reply.text == expected


def test_gguf_1_cuts_text_as_the_model_was_trained(stories: Path, shared_data: Path, tmp_path: Path) -> None:
    built = build_stories260k(shared_data, tmp_path / "built")
    for text in TEXTS:
        assert ids_of(stories, text) == ids_of(built, text)


@pytest.mark.slow
@pytest.mark.usefixtures("gate_here")
def test_the_gate_proves_what_was_written(gguf_1: Path, tmp_path: Path) -> None:
    report = convert(gguf_1, tmp_path / "half", options=ConvertOptions(outtype="f16"))
    assert report.parity.passed and report.parity.max_logit_difference == 0.0
    assert report.parity.rounding_difference > 0
    record = read_json(tmp_path / "half" / "parity.json")
    assert record["passed"] and "little girl" in record["greedy"][4]["after"] + record["greedy"][4]["prompt"]
    assert set(record["streamed"].values()) == {"streamed"}


# -- GGUF 2 and 3: what our own writer and the gguf package write --------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "bloom"])
def test_a_gguf_file_of_ours_comes_back_whole(family: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = tiny_model(tmp_path / "model", family)
    options = ConvertOptions(verify=False, outtype="f32")
    convert(model, tmp_path / "x.gguf", options=options)
    convert(tmp_path / "x.gguf", tmp_path / "back", options=options)
    before, after = read_tensors(model), read_tensors(tmp_path / "back")
    assert before.keys() - {"lm_head.weight"} <= after.keys() <= before.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name
    for text in TEXTS:
        assert ids_of(tmp_path / "back", text) == ids_of(model, text)

    from transformers import AutoModelForCausalLM

    ids_NT = torch.arange(4, 24)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids_NT).logits
        for folder in (model, tmp_path / "back")
    ]
    assert torch.equal(*logits)  # sizes, epsilon, rotary base: all of config.json that counts


def write_gguf(path: Path, kind: str, tensors: dict[str, np.ndarray], version: int = 3) -> Path:
    """A LLaMA by the gguf package: `tensors` in its names, in one type."""
    import gguf

    type_ = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-6)
    for name, tensor in tensors.items():
        plain = tensor.ndim == 1 or kind == "F32"
        data = tensor if plain else gguf.quants.quantize(tensor, type_)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.F32 if plain else type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if version == 2:
        data = bytearray(path.read_bytes())
        data[4:8] = struct.pack("<I", 2)
        path.write_bytes(data)
    return path


def tensors_of_a_layer(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)

    def matrix(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    return {
        "token_embd.weight": matrix(40, 256),
        "output_norm.weight": matrix(256),
        "output.weight": matrix(40, 256),
        "blk.0.attn_norm.weight": matrix(256),
        "blk.0.attn_q.weight": matrix(256, 256),
        "blk.0.attn_k.weight": matrix(128, 256),
        "blk.0.attn_v.weight": matrix(128, 256),
        "blk.0.attn_output.weight": matrix(256, 256),
        "blk.0.ffn_norm.weight": matrix(256),
        "blk.0.ffn_gate.weight": matrix(256, 256),
        "blk.0.ffn_up.weight": matrix(256, 256),
        "blk.0.ffn_down.weight": matrix(256, 256),
    }


def rows_in_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: even rows of a head first."""
    size = len(rows) // heads
    order = [head * size + row for head in range(heads) for row in (*range(0, size, 2), *range(1, size, 2))]
    return rows[order]


def decode_q8_0(raw: bytes) -> list[float]:
    numbers: list[float] = []
    for start in range(0, len(raw), 34):
        scale = struct.unpack("<e", raw[start : start + 2])[0]
        numbers += [scale * value for value in struct.unpack("<32b", raw[start + 2 : start + 34])]
    return numbers


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_number_types_of_gguf(kind: str, version: int, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    tensors = tensors_of_a_layer()
    path = write_gguf(tmp_path / "x.gguf", kind, tensors, version)
    report = convert(path, tmp_path / "hf", options=ConvertOptions(verify=False, outtype="f32"))
    found = read_tensors(tmp_path / "hf")
    assert report.tensors == len(tensors)
    assert any("tokenizer" in note for note in report.notes)  # the file has none

    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    expected = {
        "F32": lambda tensor: tensor,
        "F16": lambda tensor: tensor.astype(np.float16).astype(np.float32),
        "BF16": lambda tensor: torch.from_numpy(tensor).bfloat16().float().numpy(),
    }
    for theirs, ours, heads in (
        ("attn_q", "self_attn.q_proj", 4),
        ("attn_k", "self_attn.k_proj", 2),
        ("ffn_down", "mlp.down_proj", None),
    ):
        if kind == "Q8_0":
            stored = raw[f"blk.0.{theirs}.weight"].data
            numbers = decode_q8_0(stored.tobytes())
            wanted = np.array(numbers, np.float32).reshape(tensors[f"blk.0.{theirs}.weight"].shape)
        else:
            wanted = expected[kind](tensors[f"blk.0.{theirs}.weight"])
        wanted = wanted if heads is None else rows_in_halves(wanted, heads)
        assert np.array_equal(found[f"model.layers.0.{ours}.weight"].numpy(), wanted), theirs


def test_blocks_become_half_precision_unless_asked(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = write_gguf(tmp_path / "x.gguf", "Q4_0", tensors_of_a_layer())
    convert(path, tmp_path / "hf", options=UNVERIFIED)
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "hf").values()} == {torch.float16}
    assert read_json(tmp_path / "hf/config.json")["dtype"] == "float16"


# -- old ggml --------------------------------------------------------------------------------------------------------

DIM, HEADS, LAYERS, WORDS = 64, 4, 2, 300


def old_vocabulary() -> list[bytes]:
    pieces = [
        b" t",
        b"he",
        b" a",
        b"  ",
        "你".encode(),
        "好".encode(),
        b" the",
        b"e",
        b"h",
        b"t",
        b" ",
    ]
    filler = [f"w{number}".encode() for number in range(WORDS - 259 - len(pieces))]
    return [" ⁇ ".encode(), b"", b"", *(bytes([byte]) for byte in range(256)), *pieces, *filler]


def old_tensors(multiple_of: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Meta's names, with the rows of wq and wk in Meta's order."""
    wide = -(-(2 * 4 * DIM // 3) // multiple_of) * multiple_of
    random = np.random.default_rng(seed)

    def matrix(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    found = {"tok_embeddings.weight": matrix(WORDS, DIM), "norm.weight": matrix(DIM)}
    found["output.weight"] = matrix(WORDS, DIM)
    for layer in range(LAYERS):
        stem = f"layers.{layer}"
        found |= {f"{stem}.attention.w{letter}.weight": matrix(DIM, DIM) for letter in "qkvo"}
        found[f"{stem}.feed_forward.w1.weight"] = matrix(wide, DIM)
        found[f"{stem}.feed_forward.w2.weight"] = matrix(DIM, wide)
        found[f"{stem}.feed_forward.w3.weight"] = matrix(wide, DIM)
        found[f"{stem}.attention_norm.weight"] = matrix(DIM)
        found[f"{stem}.ffn_norm.weight"] = matrix(DIM)
    return found


def encode_q4_0(row: np.ndarray) -> tuple[bytes, list[float]]:
    """One row as the format says, and what it decodes to, number by number."""
    raw, numbers = b"", []
    for start in range(0, len(row), 32):
        block = row[start : start + 32]
        scale = np.float32(np.abs(block).max() / 7)
        values = [round(float(x / scale)) + 8 for x in block]
        raw += struct.pack("<f", scale)
        raw += bytes(values[2 * k] | values[2 * k + 1] << 4 for k in range(16))
        numbers += [np.float32(value - 8) * scale for value in values]
    return raw, numbers


def encode_q4_1(row: np.ndarray) -> tuple[bytes, list[float]]:
    least, scales, halves, numbers = b"", b"", b"", []
    for start in range(0, len(row), 32):
        block = row[start : start + 32]
        low = np.float32(block.min())
        scale = np.float32((block.max() - low) / 15)
        values = [round(float((x - low) / scale)) for x in block]
        least, scales = least + struct.pack("<f", low), scales + struct.pack("<f", scale)
        halves += bytes(values[2 * k] | values[2 * k + 1] << 4 for k in range(16))
        numbers += [np.float32(value) * scale + low for value in values]
    return least + scales + halves, numbers


def write_old_ggml(
    path: Path, tensors: dict[str, np.ndarray], kind: int, multiple_of: int
) -> dict[str, np.ndarray]:
    """Write the file and return what its tensors decode to."""
    decoded = {}
    with path.open("wb") as file:
        file.write(struct.pack("<8i", 0x67676D6C, WORDS, DIM, multiple_of, HEADS, LAYERS, DIM // HEADS, kind))
        for word in old_vocabulary():
            file.write(struct.pack("<i", len(word)) + word)
        for name, tensor in tensors.items():
            type_ = kind if tensor.ndim == 2 else 0
            file.write(struct.pack("<3i", tensor.ndim, len(name), type_))
            file.write(struct.pack(f"<{tensor.ndim}i", *tensor.shape[::-1]) + name.encode())
            if type_ < 2:
                numbers = tensor.astype(np.float16 if type_ else np.float32)
                file.write(numbers.tobytes())
                decoded[name] = numbers.astype(np.float32)
            else:
                rows = [(encode_q4_0 if type_ == 2 else encode_q4_1)(row) for row in tensor]
                file.write(b"".join(raw for raw, _ in rows))
                decoded[name] = np.array([numbers for _, numbers in rows], np.float32)
    return decoded


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "multiple_of"), [(0, 4), (1, 4), (2, 64), (3, 64)])
def test_old_ggml(kind: int, multiple_of: int, tmp_path: Path) -> None:
    """With multiples of 4 the feed-forward rows are 172 long, no multiple of a block."""
    tensors = old_tensors(multiple_of)
    decoded = write_old_ggml(tmp_path / "model.bin", tensors, kind, multiple_of)
    out = tmp_path / "hf"
    convert(tmp_path / "model.bin", out, options=ConvertOptions(verify=False, outtype="f32"))
    found = read_tensors(out)
    assert len(found) == len(tensors)
    for theirs, ours in (
        ("tok_embeddings", "model.embed_tokens"),
        ("output", "lm_head"),
        ("norm", "model.norm"),
        ("layers.1.feed_forward.w2", "model.layers.1.mlp.down_proj"),
        ("layers.0.ffn_norm", "model.layers.0.post_attention_layernorm"),
        ("layers.1.attention.wv", "model.layers.1.self_attn.v_proj"),
    ):
        np.testing.assert_allclose(
            found[f"{ours}.weight"].numpy(), decoded[f"{theirs}.weight"], rtol=1e-6, atol=1e-7
        )
    for letter in "qk":
        wanted = rows_in_halves(decoded[f"layers.1.attention.w{letter}.weight"], HEADS)
        name = f"model.layers.1.self_attn.{letter}_proj.weight"
        np.testing.assert_allclose(found[name].numpy(), wanted, rtol=1e-6, atol=1e-7)
    config = read_json(out / "config.json")
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (
        LAYERS,
        172 if multiple_of == 4 else 192,
    )
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


def test_words_of_old_ggml(tmp_path: Path) -> None:
    write_old_ggml(tmp_path / "model.bin", old_tensors(4), 0, 4)
    report = convert(tmp_path / "model.bin", tmp_path / "hf", options=UNVERIFIED)
    assert any("scores" in note for note in report.notes)
    tokenizer = load_tokenizer(tmp_path / "hf", for_training=False)
    words = old_vocabulary()
    ids = ids_of(tmp_path / "hf", "the 你 好\u00e9")
    assert ids[0] == 1
    place = {word: 259 + index for index, word in enumerate(words[259:])}
    expected = [place[b" the"], place[b" "], place["你".encode()], place[b" "], place["好".encode()]]
    assert ids[1:] == [*expected, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(ids) == "the 你 好\u00e9"


def split(tensors: dict[str, np.ndarray], part: int) -> dict[str, np.ndarray]:
    """What Meta's second-size models have in each of two files."""
    found = {}
    for name, tensor in tensors.items():
        columns = ("tok_embeddings.weight", "attention.wo.weight", "feed_forward.w2.weight")
        axis = 1 if name.endswith(columns) else 0
        found[name] = tensor if tensor.ndim == 1 else np.split(tensor, 2, axis=axis)[part]
    return found


@pytest.mark.slow
def test_old_ggml_in_two_parts(tmp_path: Path) -> None:
    tensors = old_tensors(4)
    write_old_ggml(tmp_path / "whole.bin", tensors, 1, 4)
    write_old_ggml(tmp_path / "model.bin", split(tensors, 0), 1, 4)
    write_old_ggml(tmp_path / "model.bin.1", split(tensors, 1), 1, 4)
    for name in ("whole", "model"):
        convert(tmp_path / f"{name}.bin", tmp_path / name, options=UNVERIFIED)
    whole, joined = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "model")
    assert whole.keys() == joined.keys() and all(torch.equal(whole[name], joined[name]) for name in whole)
    assert {tensor.dtype for tensor in whole.values()} == {torch.float16}
    (tmp_path / "model.bin.1").unlink()
    with pytest.raises(ModelError, match="are all parts"):
        convert(tmp_path / "model.bin", tmp_path / "lacking", options=UNVERIFIED)


# -- bad files -------------------------------------------------------------------------------------------------------


def _cut(data: bytearray) -> bytes:
    return bytes(data[:-1000])


def _cut_in_the_words(data: bytearray) -> bytes:
    return bytes(data[:900])


def _only_magic(data: bytearray) -> bytes:
    return bytes(data[:4])


def _at(place: int, form: str, *values: int) -> Callable[[bytearray], bytes]:
    def change(data: bytearray) -> bytes:
        struct.pack_into(f"<{form}", data, place, *values)
        return bytes(data)

    return change


BAD_OLD = {
    "cut": (_cut, "cut short"),
    "cut in the words": (_cut_in_the_words, "words cannot lie"),
    "magic alone": (_only_magic, "cut short"),
    "ggmf": (_at(0, "I", 0x67676D66), "a ggmf file"),
    "ggjt": (_at(0, "I", 0x67676A74), "a ggjt file"),
    "ggla": (_at(0, "I", 0x67676C61), "a ggla file"),
    "words": (_at(4, "i", 2**31 - 1), "words cannot lie"),
    "no words": (_at(4, "i", 0), "make no model"),
    "negative": (_at(8, "i", -64), "make no model"),
    "heads": (_at(16, "i", 7), "make no model"),
    "layers": (_at(20, "i", 3), "missing"),
    "type": (_at(28, "i", 9), "make no model"),
    "width": (_at(12, "i", 256), "shape"),
    "word length": (_at(32, "i", -5), "cut short, or damaged"),
    "NaN": (lambda data: bytes(data[:-4] + struct.pack("<f", float("nan"))), "NaN"),
}


@pytest.mark.parametrize("how", BAD_OLD)
def test_bad_old_ggml_is_refused_and_nothing_is_left(how: str, tmp_path: Path) -> None:
    change, told = BAD_OLD[how]
    write_old_ggml(tmp_path / "good.bin", old_tensors(4), 0, 4)
    bad = tmp_path / "bad" / "model.bin"
    bad.parent.mkdir()
    bad.write_bytes(change(bytearray((tmp_path / "good.bin").read_bytes())))
    with pytest.raises(ModelError, match=told) as caught:
        convert(bad, bad.parent / "out", options=UNVERIFIED)
    assert (caught.value.where and str(bad) in caught.value.where) or how == "width"
    assert [path.name for path in bad.parent.iterdir()] == ["model.bin"]


def _after(marker: bytes, form: str, *values: int) -> Callable[[bytearray], bytes]:
    """Overwrite what follows a name."""

    def change(data: bytearray) -> bytes:
        return _at(data.index(marker) + len(marker), form, *values)(data)

    return change


BAD_GGUF = {
    "cut": (_cut, "cut short"),
    "cut in the words": (_cut_in_the_words, "values of tokenizer.ggml.tokens cannot lie"),
    "magic alone": (_only_magic, "cut short"),
    "version": (_at(4, "I", 9), "version 9"),
    "big-endian": (_at(4, ">I"[1:], 0x03000000), "big-endian"),
    "tensors": (_at(8, "I", 2**31), "tensors cannot lie"),
    "keys": (_at(12, "I", 2**31), "keys cannot lie"),
    "key length": (_at(16, "I", 2**31), "cut short, or damaged"),
    "value type": (_after(b"general.architecture", "I", 77), "unknown type 77"),
    "array": (_after(b"tokenizer.ggml.scores", "3I", 9, 6, 2**31), "cannot lie"),
    "blocks": (_after(b"llama.block_count", "2I", 4, 6), "missing"),
    "many blocks": (_after(b"llama.block_count", "2I", 4, 2**30), "make no model"),
    "no heads": (_after(b"llama.attention.head_count", "2I", 4, 0), "make no model"),
    "other heads": (_after(b"llama.attention.head_count_kv", "2I", 4, 8), "shape"),
    "dimensions": (_after(b"blk.0.attn_q.weight", "I", 9), "9 dimensions"),
    "shape": (_after(b"blk.0.attn_q.weight", "3I", 2, 0, 64), "shape"),
    "large shape": (_after(b"blk.0.attn_q.weight", "3I", 2, 2**30, 2**30), "cut short"),
    "tensor type": (_after(b"blk.0.attn_q.weight", "4I", 2, 64, 64, 999), "type 999"),
    "architecture": (
        lambda data: bytes(data).replace(b"\x05\x00\x00\x00llama\x0c", b"\x05\x00\x00\x00mamba\x0c"),
        "mamba",
    ),
    "NaN": (lambda data: bytes(data[:-64] + struct.pack("<f", float("nan")) * 16), "NaN"),
}


@pytest.mark.parametrize("how", BAD_GGUF)
def test_bad_gguf_is_refused_and_nothing_is_left(how: str, gguf_1: Path, tmp_path: Path) -> None:
    if how == "tensor type":
        pytest.importorskip("gguf")
    change, told = BAD_GGUF[how]
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(change(bytearray(gguf_1.read_bytes())))
    with pytest.raises(ModelError, match=told):
        convert(bad, tmp_path / "out", options=UNVERIFIED)
    assert [path.name for path in tmp_path.iterdir() if path.name != "tuoling-cache"] == ["bad.gguf"]


def test_a_reader_of_gguf_maps_its_file(gguf_1: Path) -> None:
    file = GgufFile(gguf_1)
    first, second = file.read("token_embd.weight"), file.read("token_embd.weight")
    assert first.data_ptr() == second.data_ptr()
    assert file.version == 1 and file.metadata["llama.context_length"] == 512
