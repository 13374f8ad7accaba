"""Settings, stop strings, memory: the parts of chat that need no model."""

from __future__ import annotations

import itertools

import pytest

from tuoling.errors import UsageError
from tuoling.infer.engine import GenerationSettings, PromptTooLong, settings_from_config
from tuoling.infer.memory import fit_conversation, prompt_budget
from tuoling.infer.stops import StopFilter, cut_at_stop
from tuoling.text.conversation import Conversation, Turn

# -- settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 1.5},
        {"num_beams": 0},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"min_new_tokens": 9, "max_new_tokens": 8},
        {"temperature": float("nan")},
    ],
)
def test_values_out_of_range_are_printed(bad: dict[str, float]) -> None:
    name, value = next(iter(bad.items()))
    with pytest.raises(UsageError, match=f"{name}={value}"):
        GenerationSettings(**bad)  # type: ignore[arg-type]


def test_text_is_read_as_numbers_and_none_is_passed_over() -> None:
    settings = GenerationSettings().with_values(
        {"max_new_tokens": "64", "top_p": "0.5", "do_sample": "no", "seed": None, "stop": "完"}
    )
    assert (settings.max_new_tokens, settings.top_p, settings.do_sample, settings.stop) == (
        64,
        0.5,
        False,
        ("完",),
    )
    for bad in ({"max_new_tokens": "1.5"}, {"temperature": "hot"}, {"do_sample": "maybe"}):
        with pytest.raises(UsageError, match=next(iter(bad.values()))):
            GenerationSettings().with_values(bad)
    with pytest.raises(UsageError, match="no setting is called temprature"):
        GenerationSettings().with_values({"temprature": 1})


def test_a_sampling_knob_turns_sampling_on_and_idle_ones_are_named() -> None:
    assert GenerationSettings().with_values({"temperature": 0.5}).samples
    assert not GenerationSettings().with_values({"temperature": 0}).samples
    still = GenerationSettings().with_values({"top_k": 5, "do_sample": False})
    assert not still.samples and still.idle_knobs() == ["top_k"]
    assert GenerationSettings().idle_knobs() == []
    seeded = GenerationSettings().with_values({"seed": 3})
    assert seeded.idle_knobs() == ["seed"] and seeded.with_values({"top_k": 3}).idle_knobs() == []


def test_a_folder_may_say_what_we_do_not_know() -> None:
    settings = settings_from_config(
        {
            "do_sample": True,
            "temperature": 0.6,
            "top_k": None,
            "top_p": 9.0,
            "eos_token_id": [1],
            "cache": "x",
        }
    )
    assert settings == GenerationSettings(do_sample=True, temperature=0.6)


# -- stop strings ----------------------------------------------------------------------------------------------


def test_cut_at_the_earliest_stop() -> None:
    assert cut_at_stop("好的。\n用户:你", ("用户:", "\n用户:")) == "好的。"
    assert cut_at_stop("好的", ("用户:", "")) is None


@pytest.mark.parametrize("text", ["ababac", "xxabacyy", "ab", "aba", "", "abab", "babaabac!"])
def test_a_filter_shows_what_one_cut_would_leave_however_text_arrives(text: str) -> None:
    """Every way to cut the text into pieces shows the same; nothing of a stop is ever shown."""
    stops = ("abac", "yy")
    whole = cut_at_stop(text, stops)
    expected = text if whole is None else whole
    for cuts in itertools.product((True, False), repeat=max(len(text) - 1, 0)):
        pieces, start = [], 0
        for index, cut in enumerate(cuts, 1):
            if cut:
                pieces.append(text[start:index])
                start = index
        gate = StopFilter(stops)
        shown = ""
        for piece in [*pieces, text[start:]]:
            shown += gate.push(piece)
            assert expected.startswith(shown)
        assert shown + gate.flush() == expected
        assert gate.stopped == (whole is not None)


def test_a_filter_holds_back_no_more_than_it_must() -> None:
    gate = StopFilter(("\n用户:",))
    assert gate.push("你好\n") == "你好"
    assert gate.push("用") == "" and gate.push("心") == "\n用心"


# -- memory ----------------------------------------------------------------------------------------------------


def talk(exchanges: int, system: str = "s") -> Conversation:
    turns = [Turn("system", system)] if system else []
    for number in range(exchanges):
        turns += [Turn("user", f"q{number}"), Turn("assistant", f"a{number}")]
    return Conversation((*turns, Turn("user", "new")))


def count(conversation: Conversation) -> int:
    """Ten tokens a turn."""
    return 10 * len(conversation.turns)


def test_whole_exchanges_go_oldest_first_and_system_and_question_stay() -> None:
    kept, dropped, tokens = fit_conversation(talk(4), 60, count)
    assert (dropped, tokens) == (2, 60)
    assert [turn.text for turn in kept.turns] == ["s", "q2", "a2", "q3", "a3", "new"]
    assert fit_conversation(talk(4), 100, count) == (talk(4), 0, 100)
    assert fit_conversation(talk(4), None, count) == (talk(4), 0, 100)
    assert [turn.text for turn in fit_conversation(talk(4), 29, count)[0].turns] == ["s", "new"]
    assert [turn.text for turn in fit_conversation(talk(3, ""), 39, count)[0].turns] == ["q2", "a2", "new"]


def test_a_question_too_long_by_itself_is_an_error_with_the_number() -> None:
    with pytest.raises(PromptTooLong, match="20 tokens, there is room for 19"):
        fit_conversation(talk(4), 19, count)


def test_any_budget_drops_as_little_as_a_walk_would_and_counts_seldom() -> None:
    """Exchanges of unlike length; the oracle drops one after another. Counting is tokenising: it is done rarely."""
    turns = [Turn(("user", "assistant")[place % 2], "x" * (1 + place * 7 % 11)) for place in range(41)]
    conversation = Conversation(tuple(turns))
    calls = 0

    def letters(part: Conversation) -> int:
        nonlocal calls
        calls += 1
        return sum(len(turn.text) for turn in part.turns)

    for budget in range(letters(Conversation((turns[-1],))), letters(conversation) + 2):
        walk = next(n for n in range(21) if sum(len(turn.text) for turn in turns[2 * n :]) <= budget)
        calls = 0
        kept, dropped, tokens = fit_conversation(conversation, budget, letters)
        assert (dropped, kept.turns) == (walk, tuple(turns[2 * walk :])) and calls <= 7
        assert tokens == sum(len(turn.text) for turn in kept.turns)


def test_an_answer_that_is_gone_on_with_keeps_its_question() -> None:
    going_on = talk(3).answered("so far")
    kept, dropped, _ = fit_conversation(going_on, 39, count)
    assert [turn.text for turn in kept.turns] == ["s", "new", "so far"] and dropped == 3
    with pytest.raises(PromptTooLong, match="30 tokens, there is room for 29"):
        fit_conversation(going_on, 29, count)


def test_budgets() -> None:
    """An answer's room first, never more than half; the user's limit cannot exceed the model's."""
    assert prompt_budget(None, 2048, 512) == (1536, 2048)
    assert prompt_budget(None, 100, 512) == (50, 100)
    assert prompt_budget(300, 2048, 100) == (200, 300)
    assert prompt_budget(9000, 2048, 48) == (2000, 2048)
    assert prompt_budget(None, None, 96) == (4000, 4096)
