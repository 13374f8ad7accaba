"""GGUF files of ours in llama.cpp against transformers: logits, tokens, perplexity, and what is refused."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.gguf_files import TEXTS, divergence, llama_logits, transformers_logits, write_gguf_of
from tests.stories260k import build_stories260k
from tests.tiny import TEXT, tiny_model, tiny_tokenizer

from tuoling.demo import base
from tuoling.errors import ModelError, UsageError
from tuoling.models.load import find_model, load_tokenizer

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")

QUESTION = "用户:三加五等于几？Write a response.\n\n助手:"


def changed_model(folder: Path, model_type: str, **config: Any) -> Path:
    """A random model of a Llama-like family with these settings, and the tiny tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    values = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "initializer_range": 0.2,
        "vocab_size": len(tokenizer),
        "bos_token_id": 1,
        "eos_token_id": 2,
        **config,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # zeros and ones would hide a missing one
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = {
    "llama, untied, biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied, long heads": ("llama", {"tie_word_embeddings": True, "head_dim": 32}),
    "llama 3.1 positions": ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 128}),
    "llama, stretched": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0}},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "bloom": ("bloom", {"n_head": 4, "n_layer": 2}),
    "bloom, heads no power of two": ("bloom", {"n_head": 6, "hidden_size": 96, "n_layer": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """The largest difference there is comes from llama.cpp's table for GELU, of float16 (BLOOM only)."""
    pytest.importorskip("llama_cpp", reason="needs the extra gguf")
    kind, config = VARIANTS[name]
    folder = changed_model(tmp_path / "m", kind, **config)
    write_gguf_of(folder, tmp_path / "m.gguf")
    ids = load_tokenizer(find_model(folder), for_training=False).hf.encode(QUESTION)
    assert len(ids) > 24
    ours, theirs = llama_logits(tmp_path / "m.gguf", ids), transformers_logits(folder, ids)
    assert np.abs(ours - theirs).max() < (5e-3 if kind == "bloom" else 2e-4)
    assert divergence(theirs, ours) < (1e-6 if kind == "bloom" else 1e-9)
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()


def test_bfloat16_weights_stay_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra gguf")
    from transformers import AutoModelForCausalLM

    folder = tiny_model(tmp_path / "m", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    report = write_gguf_of(folder, tmp_path / "m.gguf", "bf16")
    assert report.outtype == "bf16"
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(tmp_path / "m.gguf")).tensors}
    weight = model.state_dict()["model.layers.1.mlp.down_proj.weight"]
    bits = np.asarray(tensors["blk.1.ffn_down.weight"].data).view(np.uint16).reshape(weight.shape)
    assert (bits == weight.view(torch.uint16).numpy()).all()
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"


# -- Q8_0 --------------------------------------------------------------------------------------------------------


def q8_0_by_hand(row: list[float]) -> bytes:
    """C's quantize_row_q8_0_ref, number by number."""
    out = b""
    for begin in range(0, len(row), 32):
        block = [np.float32(value) for value in row[begin : begin + 32]]
        scale = np.float32(max(abs(value) for value in block) / np.float32(127))
        inverse = np.float32(1) / scale if scale else np.float32(0)
        out += struct.pack("<e", np.float16(scale))
        for value in block:
            scaled = float(value * inverse)
            out += struct.pack("b", int(math.copysign(math.floor(abs(scaled) + 0.5), scaled)))
    return out


def test_q8_0_is_byte_for_byte_llama_cpps() -> None:
    from tuoling.weights.gguf_file import quantize_q8_0

    generator = torch.Generator().manual_seed(3)
    x_RC = torch.randn(300, 96, generator=generator) * torch.logspace(-6, 3, 300)[:, None]
    x_RC[0] = 0.0
    x_RC[1, :32] = torch.arange(-16, 16) / 2  # halves: the largest is 8, so 127/8 x is exact in few places
    x_RC[2, :32] = torch.tensor([127.0, 0.5, -0.5, 1.5, -1.5, 2.5, 126.5, -126.5] * 4)  # exact halves
    ours = quantize_q8_0(x_RC).numpy()
    assert ours.tobytes() == gguf.quants.quantize(x_RC.numpy(), gguf.GGMLQuantizationType.Q8_0).tobytes()
    for row in (0, 1, 2, 150, 299):
        assert ours[row].tobytes() == q8_0_by_hand(x_RC[row].tolist())


@pytest.mark.slow
def test_q8_0_file_is_the_one_llama_cpp_makes(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra gguf")
    from tuoling.weights.gguf_quantize import quantize_file

    folder = changed_model(tmp_path / "m", "llama", tie_word_embeddings=True)
    write_gguf_of(folder, tmp_path / "f32.gguf", "f32")
    write_gguf_of(folder, tmp_path / "ours.gguf", "q8_0")
    quantize_file(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", "q8_0", threads=1)
    ours, theirs = (gguf.GGUFReader(str(tmp_path / name)).tensors for name in ("ours.gguf", "theirs.gguf"))
    mine = {tensor.name: tensor for tensor in ours}
    assert mine.keys() == {tensor.name for tensor in theirs} and len(mine) > 15
    for tensor in theirs:
        assert mine[tensor.name].tensor_type == tensor.tensor_type, tensor.name
        assert mine[tensor.name].data.tobytes() == tensor.data.tobytes(), tensor.name


# -- stories260K -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder, and its text."""
    folder = build_stories260k(shared_data, tmp_path_factory.mktemp("stories") / "hf")
    return folder, shared_data / "weights" / "stories260K" / "expected_greedy_200.txt"


def test_stories260k_tells_its_story_in_llama_cpp(stories: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra gguf")
    from tuoling.infer.llamacpp import LlamaModel
    from tuoling.infer.llamacpp_tokenizer import GgufTokenizer

    folder, expected = stories
    write_gguf_of(folder, tmp_path / "s.gguf")
    model = LlamaModel(tmp_path / "s.gguf", exact=True)
    model.require_context(201)
    ids = [1]
    for _ in range(200):
        model.append(ids[-1:])
        ids.append(int(model.logits().argmax()))
    text = GgufTokenizer(model).decode(ids[1:])
    assert text == expected.read_text(encoding="utf-8").rstrip("\n")
    model.close()


@pytest.mark.parametrize(
    "outtypes",
    [
        ("f32", "q8_0", "q4_0", "q4_k_m"),
        pytest.param(("f32", "q6_k", "q5_k_m", "q3_k_m", "q2_k"), marks=pytest.mark.long),
    ],
    ids=["usual", "others"],
)
def test_stories260k_in_fewer_bits(
    stories: tuple[Path, Path], tmp_path: Path, outtypes: tuple[str, ...]
) -> None:
    """Perplexity on its own text. Its feed-forward rows of 172 numbers are no multiple of 32 and fall back."""
    pytest.importorskip("llama_cpp", reason="needs the extra gguf")
    folder, expected = stories
    tokenizer = load_tokenizer(find_model(folder), for_training=False)
    ids = [1, *tokenizer.hf.encode(expected.read_text(encoding="utf-8"), add_special_tokens=False)]
    down = {f"blk.{number}.ffn_down.weight" for number in range(5)}
    perplexity = {"transformers": _perplexity(transformers_logits(folder, ids), ids)}
    for outtype in outtypes:
        file = tmp_path / f"{outtype}.gguf"
        report = write_gguf_of(folder, file, outtype)
        perplexity[outtype] = _perplexity(llama_logits(file, ids), ids)
        if outtype in ("q8_0", "q4_0"):
            assert {name for name, kind in report.fell_back.items() if kind == "f16"} == down
            assert any("172" in note or "ffn_down" in note for note in report.notes)
        if outtype == "q4_k_m":  # rows of 64 and 172 are no multiple of 256: all of them fall back
            assert report.fell_back.keys() > down and len(report.fell_back) == 36
    f32 = perplexity.pop("f32")
    assert f32 == pytest.approx(perplexity.pop("transformers"), rel=1e-5)
    allowed = {
        "q8_0": 1.005,
        "q6_k": 1.02,
        "q5_k_m": 1.05,
        "q4_0": 1.3,
        "q4_k_m": 1.3,
        "q3_k_m": 2,
        "q2_k": 10,
    }
    for outtype, value in perplexity.items():
        assert 0.999 * f32 < value < allowed[outtype] * f32, (outtype, value / f32)


def _perplexity(logits_TV: np.ndarray, ids: list[int]) -> float:
    logits_TV = logits_TV.astype(np.float64)
    logits_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    return math.exp(-logits_TV[np.arange(len(ids) - 1), ids[1:]].mean())


@pytest.mark.slow
@pytest.mark.parametrize("outtype", ["q4_0", "q4_k_m"])
def test_fallbacks_are_those_llama_cpp_counts(outtype: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra gguf")
    folder = changed_model(tmp_path / "m", "llama", hidden_size=256, intermediate_size=336)
    report = write_gguf_of(folder, tmp_path / "m.gguf", outtype)
    types = {
        tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(str(tmp_path / "m.gguf")).tensors
    }
    assert report.fell_back == {f"blk.{n}.ffn_down.weight": "f16" for n in range(2)}
    assert types["blk.0.attn_q.weight"] == {"q4_0": "Q4_0", "q4_k_m": "Q4_K"}[outtype]
    assert not list(tmp_path.glob(".*")), "the full file is gone"


# -- tokenizers --------------------------------------------------------------------------------------------------


def vocabulary_file(tokenizer: Any, rows: int, out: Path) -> Any:
    """A GGUF file that holds a vocabulary alone, and the vocabulary."""
    from tuoling.weights.gguf import _write_special
    from tuoling.weights.gguf_file import TensorsInMemory, write_gguf
    from tuoling.weights.gguf_tokenizer import read_vocabulary, write_vocabulary

    vocabulary = read_vocabulary(tokenizer, rows)

    def metadata(writer: Any) -> None:
        write_vocabulary(writer, vocabulary)
        _write_special(writer, tokenizer)

    write_gguf(out, "llama", metadata, [], TensorsInMemory({}))
    return vocabulary


@pytest.mark.parametrize(
    "name",
    [
        "tiny",
        "minimind",
        "openllama",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("neox", "mistral")),
    ],
)
def test_llama_cpp_cuts_text_into_the_same_tokens(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Byte-level BPE (tiny, neox, minimind) and sentencepiece (openllama, mistral).

    openllama's file lacks the merge of ▁ and t, which llama.cpp cannot do without: that is told.
    """
    pytest.importorskip("llama_cpp", reason="needs the extra gguf")
    from tests.real_tokenizers import load

    from tuoling.infer.llamacpp import LlamaModel
    from tuoling.infer.llamacpp_tokenizer import GgufTokenizer

    tokenizer = load(name, request)
    rows = 32000 if name == "openllama" else tokenizer.highest_id + 4
    vocabulary = vocabulary_file(tokenizer, rows, tmp_path / "v.gguf")
    model = LlamaModel(tmp_path / "v.gguf", vocab_only=True)
    other = GgufTokenizer(model)
    texts = list(TEXTS)
    if name != "tiny":
        shared = request.getfixturevalue("shared_data")
        rows_zh = json.loads((shared / "alpaca" / "alpaca_zh_demo.json").read_text(encoding="utf-8"))
        texts += [row[key] for row in rows_zh[:150] for key in ("instruction", "input", "output") if row[key]]
    if name == "openllama":
        assert any("1 pairs absent" in note for note in vocabulary.notes)
        assert any("[PAD]" in note for note in vocabulary.notes), "its padding token has no embedding"
        texts = [text for text in texts if " t" not in text]
    else:
        assert [note for note in vocabulary.notes if "PAD" not in note] == []
    assert other.marks_words == tokenizer.marks_words == (name in ("openllama", "mistral"))
    assert other.marks_after_special == tokenizer.marks_after_special
    assert other.adds_bos == tokenizer.adds_bos
    assert (other.bos_id, other.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer._encode_start(texts) == other._encode_start(texts)
    assert tokenizer._encode_inside(texts) == other._encode_inside(texts)
    for ids in tokenizer._encode_start(texts[:40]):
        assert other.decode(ids) == tokenizer.decode(ids)
    other.close()
    model.close()


@pytest.fixture
def sentencepiece_llama(tmp_path: Path) -> Path:
    """The demo's tokenizer in the form that llama.cpp knows, with its 256 bytes, in front of random weights."""
    trained = base.train_tokenizer(TEXT, "".join(TEXT), vocabulary=200)
    folder, size = tmp_path / "spm", base.Size(hidden=32, layers=1, heads=2)
    base.write_blank_model(folder, base.as_sentencepiece(trained), family="llama", size=size, seed=0)
    return folder


UNKNOWN_TO_IT = "你好龘靐😀"


def test_unknown_characters_become_bytes(sentencepiece_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra gguf")
    from tuoling.infer.llamacpp import LlamaModel
    from tuoling.infer.llamacpp_tokenizer import GgufTokenizer

    report = write_gguf_of(sentencepiece_llama, tmp_path / "m.gguf")
    assert not any("byte" in note for note in report.notes)
    model = LlamaModel(tmp_path / "m.gguf", vocab_only=True)
    theirs, ours = GgufTokenizer(model), load_tokenizer(sentencepiece_llama, for_training=False)
    assert theirs._encode_inside([UNKNOWN_TO_IT]) == ours._encode_inside([UNKNOWN_TO_IT])
    assert theirs.decode(theirs._encode_inside([UNKNOWN_TO_IT])[0]) == UNKNOWN_TO_IT
    theirs.close()
    model.close()


@pytest.mark.parametrize("left", [0, 255])
def test_a_vocabulary_without_bytes_is_refused_with_a_way_past(
    sentencepiece_llama: Path, tmp_path: Path, left: int
) -> None:
    """llama.cpp would end the process at the first character that no token holds."""
    file = sentencepiece_llama / "tokenizer.json"
    state = json.loads(file.read_text(encoding="utf-8"))
    model = state["model"]
    model["byte_fallback"] = left > 0
    for byte in range(left, 256):
        model["vocab"][f"[unused{byte}]"] = model["vocab"].pop(f"<0x{byte:02X}>")
    file.write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(ModelError, match=f"{256 - left} of the 256 byte tokens") as refused:
        write_gguf_of(sentencepiece_llama, tmp_path / "m.gguf")
    assert "--unchecked" in (refused.value.remedy or "") and not list(tmp_path.glob("*.gguf"))
    report = write_gguf_of(sentencepiece_llama, tmp_path / "m.gguf", unchecked=True)
    assert any("byte tokens" in note for note in report.notes)
    fields = gguf.GGUFReader(str(tmp_path / "m.gguf")).fields
    assert json.loads(fields["tuoling.provenance"].contents())["unchecked"] == "no byte tokens"


def test_rows_without_a_token_are_padded_with_names_of_their_own(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(tmp_path / "m", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(352)
    model.save_pretrained(folder)
    report = write_gguf_of(folder, tmp_path / "m.gguf")
    fields = gguf.GGUFReader(str(tmp_path / "m.gguf")).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == len(set(tokens)) == 352 and tokens[-1] == "[PAD351]"
    assert fields["tokenizer.ggml.token_type"].contents()[-32:] == [5] * 32
    assert any("32 rows" in note for note in report.notes)


def test_a_tokenizer_with_words_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", "llama")
    tiny_tokenizer(vocab_size=330).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"330 tokens, the embedding 320 rows"):
        write_gguf_of(folder, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def test_an_unknown_way_of_cutting_words_is_refused_with_a_way_past(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", "llama")
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    split = {"type": "Split", "pattern": {"Regex": "[a-f]+"}, "behavior": "Isolated", "invert": False}
    level = {**state["pre_tokenizer"], "use_regex": False}
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(ModelError, match=r"a-f") as error:
        write_gguf_of(folder, tmp_path / "m.gguf")
    assert "--pre-tokenizer" in (error.value.remedy or "")
    write_gguf_of(folder, tmp_path / "m.gguf", pre_tokenizer="gpt-2")
    field = gguf.GGUFReader(str(tmp_path / "m.gguf")).fields["tokenizer.ggml.pre"]
    assert field.contents() == "gpt-2"


# -- what is refused ---------------------------------------------------------------------------------------------


def damage(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "outtype", "message"),
    [
        (lambda s: s["model.norm.weight"].fill_(math.nan), "f32", r"model\.norm\.weight holds NaN"),
        (
            lambda s: s["model.layers.1.mlp.up_proj.weight"][3, 2].fill_(math.inf),
            "q8_0",
            "holds NaN or infinity",
        ),
        (lambda s: s["model.layers.0.mlp.up_proj.weight"][0, 0].fill_(70000.0), "f16", "more than float16"),
        (
            lambda s: s.pop("model.layers.1.self_attn.k_proj.weight"),
            "f32",
            r"missing: blk\.1\.attn_k\.weight",
        ),
        (lambda s: s.update({"model.extra.weight": torch.ones(2, 2)}), "f32", r"no place for: model\.extra"),
        (
            lambda s: s.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(5, 32)}),
            "f32",
            r"q_proj has 5 rows for 4 heads",
        ),
    ],
)
def test_bad_weights_are_refused_and_leave_nothing(
    change: Any, outtype: str, message: str, tmp_path: Path
) -> None:
    folder = tiny_model(tmp_path / "m", "llama")
    damage(folder, change)
    with pytest.raises(ModelError, match=message):
        write_gguf_of(folder, tmp_path / "m.gguf", outtype)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m"]


def test_unknown_families_and_types_are_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", "llama")
    with pytest.raises(UsageError, match="q9_z"):
        write_gguf_of(folder, tmp_path / "m.gguf", "q9_z")
    config = json.loads((folder / "config.json").read_text())
    for key, value, message in (
        ("model_type", "opt", "opt models cannot be written"),
        ("hidden_act", "gelu", "hidden_act=gelu"),
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "rope_type=dynamic"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ModelError, match=message):
            write_gguf_of(folder, tmp_path / "m.gguf")


def test_the_licence_and_what_it_was_made_of_stand_in_the_file(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", "bloom")
    write_gguf_of(folder, tmp_path / "m.gguf", "f16")
    fields = gguf.GGUFReader(str(tmp_path / "m.gguf")).fields
    assert fields["general.license"].contents() == "bigscience-bloom-rail-1.0"
    assert fields["general.file_type"].contents() == 1
    assert "tuoling" in json.loads(fields["tuoling.provenance"].contents())
    everything = (tmp_path / "m.gguf").read_bytes()
    assert str(tmp_path).encode() not in everything, "no path of this machine"


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    """192 MiB of bfloat16 in one tensor, read from a file: less than half of it is ever private."""
    from tuoling.weights.gguf_file import TensorPlan, write_gguf
    from tuoling.weights.safetensors_writer import SafetensorsWriter
    from tuoling.weights.tensors import TensorInfo, open_weights

    shape = (24576, 4096)
    with SafetensorsWriter(tmp_path / "m", {"w": TensorInfo(torch.bfloat16, shape)}) as writer:
        writer.write("w", torch.zeros(shape, dtype=torch.bfloat16))
    source = open_weights(tmp_path / "m")
    level, peaks = anonymous_bytes(), []
    order = torch.arange(shape[0]).flip(0)
    for kind in ("q8_0", "f32"):
        plan = TensorPlan("w", "w", shape, kind, order)
        step = lambda size: peaks.append(anonymous_bytes() - level)  # noqa: E731
        write_gguf(tmp_path / "w.gguf", "llama", lambda writer: None, [plan], source, step=step)
    assert len(peaks) > 50 and max(peaks) < 96 << 20
