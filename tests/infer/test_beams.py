"""Beams as a stream: every frame is transformers' own search, the last one is `generate`, settled text stays."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny_model, tiny_tokenizer

from tuoling.infer.beams import BeamText, Frame, alike
from tuoling.infer.engine import GenerationSettings, Piece, Reply, append_only
from tuoling.infer.torch_engine import TorchEngine
from tuoling.models.load import find_model, load_model, load_tokenizer
from tuoling.text.conversation import Conversation, Turn
from tuoling.text.templates import get_template
from tuoling.text.tokenizer import TextTokenizer


def ask(text: str) -> Conversation:
    return Conversation((Turn("user", text),))


@pytest.fixture(scope="module", params=["bloom", "llama"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    source = find_model(tiny_model(tmp_path_factory.mktemp("beams") / "m", request.param))
    model = load_model(source, dtype="fp32", device="cpu")
    return TorchEngine(model, load_tokenizer(source), get_template("domain_bloom"))


def replay(pieces: list[Piece]) -> tuple[list[str], Reply]:
    """What is shown after each piece; settled text never changes, and no half character is ever shown."""
    shown, frames, certain = "", [], ""
    for piece in pieces:
        shown = shown[: len(shown) - piece.back] + piece.text
        frames.append(shown)
        assert shown.startswith(certain)
        certain = shown[: piece.settled]
    reply = pieces[-1].reply
    assert reply is not None and all(piece.reply is None for piece in pieces[:-1])
    return frames, reply


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"num_beams": 2},
        {"num_beams": 4, "no_repeat_ngram_size": 2},
        {"num_beams": 3, "stop": ("e", "三")},
        {"num_beams": 3, "temperature": 1.2, "seed": 3},
        {"num_beams": 4, "temperature": 0.7, "top_k": 12, "top_p": 0.9, "seed": 1, "min_new_tokens": 12},
    ],
)
def test_the_last_frame_is_generate(engine: TorchEngine, values: dict[str, Any]) -> None:
    settings = GenerationSettings(max_new_tokens=12).with_values(values)
    many = engine.generate([ask("你好"), ask("三加五等于多少")], settings)
    for text, expected in zip(("你好", "三加五等于多少"), many, strict=True):
        pieces = list(engine.stream(ask(text), settings))
        frames, reply = replay(pieces)
        assert (frames[-1], reply) == (expected.text, expected)
        assert len(reply.beams) == settings.num_beams and reply.beams[0] == reply.text
        assert all(len(piece.beams) == settings.num_beams for piece in pieces)
        assert all(frame == piece.beams[0] for frame, piece in zip(frames, pieces, strict=True))
        appended = list(append_only(pieces))
        assert "".join(piece.text for piece in appended) == expected.text
        assert all(piece.back == 0 for piece in appended) and appended[-1].reply == expected


def test_frames_are_transformers_own_running_beams(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is the search itself: what it keeps after each step, taken where it chooses it."""
    kept: list[torch.Tensor] = []
    original = type(engine.model)._get_running_beams_for_next_iteration

    def choose(self: Any, **kwargs: Any) -> Any:
        chosen = original(self, **kwargs)
        kept.append(chosen[0].clone())
        return chosen

    monkeypatch.setattr(type(engine.model), "_get_running_beams_for_next_iteration", choose)
    frames: list[Frame] = []
    show = BeamText.show
    monkeypatch.setattr(BeamText, "show", lambda self, frame: frames.append(frame) or show(self, frame))
    settings = GenerationSettings(max_new_tokens=10, num_beams=3)
    list(engine.stream(ask("你好"), settings))
    start = len(engine.prompt_ids(ask("你好")))
    assert len(frames) == 9, "the tenth step ends the search"
    for step, (frame, sequences) in enumerate(zip(frames, kept, strict=False), 1):
        assert frame.running == sequences[0, :, start : start + step].tolist()
        assert frame.common <= alike(frame.running)


def test_an_answer_that_ended_early_keeps_the_rest_unsettled(engine: TorchEngine) -> None:
    """An ended beam may be chosen in the end, so nothing behind its end is certain; nor is it where beams part."""
    kept = set(engine.end_ids)
    try:
        first = engine.generate([ask("你好")], GenerationSettings(max_new_tokens=6, num_beams=3))[0]
        engine.end_ids = {first.token_ids[1]}
        frames, _ = replay(
            list(engine.stream(ask("你好"), GenerationSettings(max_new_tokens=12, num_beams=3)))
        )
        assert len(frames) > 1
    finally:
        engine.end_ids = kept


def test_beam_text_by_hand() -> None:
    """Bytes of 好 (e5 a5 bd) come one by one; two beams part behind it; the stop string is never shown."""
    tokenizer = TextTokenizer(tiny_tokenizer(["ab"], vocab_size=260))
    ids = {text: tokenizer.hf.encode(text, add_special_tokens=False) for text in ("好", "a", "b", "#")}
    (a,), (b,), (stop,) = ids["a"], ids["b"], ids["#"]
    good = ids["好"]
    assert len(good) == 3
    text = BeamText(tokenizer, ("#x",))
    shown = [
        text.show(Frame(running, common))
        for running, common in (
            ([[a], [b]], 0),
            ([[b, *good[:2]], [b, a, a]], 1),
            ([[b, *good], [b, *good[:2], a]], 3),
            ([[b, *good, stop], [b, *good, a]], 3),
            ([[b, *good, a, a], [b, *good, a, b]], 5),
        )
    ]
    assert [(piece.back, piece.text, piece.settled) for piece in shown] == [
        (0, "a", 0),
        (1, "b", 1),
        (0, "好", 1),
        (0, "", 1),
        (0, "aa", 3),
    ]
    assert shown[3].beams == ("b好", "b好a"), "# may become a stop string"
    last = text.last(Reply("b好ab", (), "length", 1, 6, ("b好ab", "b好aa")))
    assert (last.back, last.text, last.settled) == (1, "b", None)


@pytest.mark.slow
def test_cancelled_beams_end_within_a_token_and_leave_no_tensors(engine: TorchEngine) -> None:
    settings = GenerationSettings(max_new_tokens=400, num_beams=3)
    list(engine.stream(ask("你好"), GenerationSettings(max_new_tokens=3, num_beams=3)))
    kept, engine.end_ids = engine.end_ids, set()
    try:
        gc.collect()
        before = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
        cancel, forwards = threading.Event(), []

        def count(*call: Any) -> None:
            forwards.append(1)
            if len(forwards) == 5:
                cancel.set()

        hook = engine.model.register_forward_hook(count)
        *_, last = engine.stream(ask("你好"), settings, cancel=cancel)
        hook.remove()
        assert last.reply is not None and len(forwards) == 5
        assert (last.reply.finish_reason, last.reply.completion_tokens) == ("cancelled", 5)
        stream: Any = engine.stream(ask("你好"), settings)
        next(stream)
        stream.close()
        assert not any(thread.name == "tuoling-generate" for thread in threading.enumerate())
        gc.collect()
        after = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
        assert after == before, "caches and sequences are gone"
    finally:
        engine.end_ids = kept


def test_alike() -> None:
    assert [
        alike(case) for case in (["ab", "ac"], ["ab", "ab"], ["ab", "abc"], ["", "a"], [[1, 2], [3]])
    ] == [
        1,
        2,
        2,
        0,
        0,
    ]


def test_greedy_pieces_pass_through_append_only() -> None:
    reply = Reply("好的", (), "stop", 1, 2)
    pieces = [Piece("好"), Piece(""), Piece("的"), Piece("", reply)]
    assert list(append_only(pieces)) == [Piece("好"), Piece("的"), Piece("", reply)]


@pytest.mark.slow
def test_the_folder_of_a_beam_model_needs_nothing_new(tmp_path: Path) -> None:
    """num_beams of a folder's generation_config.json is used as a setting like any other."""
    from tuoling.api import load

    folder = tiny_model(tmp_path / "m", "llama")
    (folder / "generation_config.json").write_text('{"num_beams": 2, "max_new_tokens": 4}')
    with load(folder, device="cpu", dtype="fp32") as model:
        assert len(model.reply("你好").beams) == 2
