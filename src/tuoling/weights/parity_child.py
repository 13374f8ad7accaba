"""The process in which two sets of weights are compared: a pickled request on stdin, JSON lines on stdout.

One line for every pass over the weights ({"pass": n}), and a last one with {"measured"} or {"error"}.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tuoling import environment
from tuoling.errors import ModelError, TuolingError
from tuoling.language import tr
from tuoling.weights.parity import GREEDY_TOKENS, PROBE_TOKENS, PROMPT_TOKENS, Request, Weights
from tuoling.weights.parity_sides import (
    STREAMED,
    EngineSide,
    FolderSide,
    Side,
    build,
    can_merge,
    open_side,
    read_config,
)
from tuoling.weights.streamed import CannotStream

if TYPE_CHECKING:
    from tuoling.text.tokenizer import TextTokenizer


class MemoryMeter:
    """The most that this process held above what it held when the meter was made, in GiB."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is forgotten
        self._private = environment.private_memory_bytes()
        self._resident = environment.peak_rss_gib()
        self._most = self._private or 0

    def sample(self) -> None:
        self._most = max(self._most, environment.private_memory_bytes() or 0)

    def peaks(self) -> dict[str, float | None]:
        self.sample()
        private = None if self._private is None else round((self._most - self._private) / 2**30, 3)
        return {
            "peak_gib": private,
            "resident_peak_gib": round(environment.peak_rss_gib() - self._resident, 3),
        }


class Comparison:
    """One request; one side after the other, each in words that both have (0 to `shared`)."""

    def __init__(self, request: Request, say: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
        self._request = request
        self._say = say
        self._passes = 0
        self._columns = dict(zip(("before", "after"), shared_columns(request.vocabulary), strict=True))
        self._of = {"before": request.before, "after": request.after}
        self._tokenizer, self._tokenizer_columns, self._rows = self._tokenise()
        self._import_libraries()
        self._meter = MemoryMeter()

    def measure(self) -> dict[str, Any]:
        """The figures of `Parity`, without the verdict, and what the verdict needs: route, layers, stored_as."""
        self._require_vocabularies()
        words_NT = padded(self._rows)
        prompts_NG = words_NT[:, : min(PROMPT_TOKENS, *map(len, self._rows))]
        found: dict[str, Any] = {}

        side = self._side("before")
        before_NTV = side.logits(words_NT)
        found["perplexity_before"] = self._perplexity(before_NTV, "before")
        shared = self._shared(before_NTV)
        how = {"before": side.how}
        rounded, merge = self._rounded(), self._merges()
        if how["before"] == STREAMED and (rounded or merge):
            side = self._side("before", rounded, merge=merge)
            reference_NTV = side.logits(words_NT)
            loss = self._differences(before_NTV, reference_NTV, shared)
            found["rounding_difference"] = loss["max_logit_difference"]
            before_NTV = reference_NTV
        continued_NC = side.greedy(prompts_NG, GREEDY_TOKENS, shared)

        side = self._side("after")
        after_NTV = side.logits(words_NT)
        self._require_same_words(before_NTV, after_NTV)
        found["perplexity_after"] = self._perplexity(after_NTV, "after")
        found |= self._differences(before_NTV, after_NTV, shared)
        del before_NTV, after_NTV
        found |= self._greedy(side, prompts_NG, continued_NC, shared)
        how["after"] = side.how
        merged = "rounding_difference" in found and merge
        adapted = any(isinstance(of, Weights) and of.adapters for of in self._of.values())
        found |= {
            "columns": shared,
            "streamed": how,
            "layers": self._layers(),
            "stored_as": self._stored_as(),
        }
        streamed = set(how.values()) == {STREAMED}
        found["route"] = "other"
        if streamed and (merged or not adapted):
            found["route"] = "merged" if merged else "same"
        return found | self._meter.peaks()

    def _import_libraries(self) -> None:
        """Build a model without weights once, so that what transformers imports on the way is not measured."""
        for of in self._of.values():
            if isinstance(of, Weights):
                with contextlib.suppress(CannotStream):
                    build(of)

    def _tick(self) -> None:
        self._passes += 1
        self._say({"pass": self._passes})

    def _side(
        self, name: str, rounded: Mapping[str, torch.dtype] | None = None, *, merge: bool = False
    ) -> Side:
        of, columns = self._of[name], self._columns[name]
        if not isinstance(of, Weights):
            return EngineSide(of, columns, tick=self._tick)
        sample = self._meter.sample
        return FolderSide(of, columns, rounded or {}, merge=merge, tick=self._tick, before_drop=sample)

    def _tokenise(self) -> tuple[TextTokenizer | None, torch.Tensor | None, list[list[int]]]:
        """The tokenizer of the side whose words are all shared (if any), its columns, the probes in shared words."""
        from tuoling.models.tokenizers import NoTokenizer, load_tokenizer
        from tuoling.text.render import Segment

        pruned = self._request.vocabulary is not None and min(self._request.vocabulary) >= 0
        order = ("after", "before") if pruned else ("before", "after")
        name, of = next((name, of) for name in order if isinstance(of := self._of[name], Weights))
        words, columns = words_of(of), self._columns[name]
        try:
            tokenizer = load_tokenizer(of.described_by or of.folder, for_training=False)
        except NoTokenizer:  # Meta's folders may come without one; any ids will do to compare
            shared = words if columns is None else len(columns)
            texts = [text[:PROBE_TOKENS] for text in self._request.probes]
            return None, None, [[ord(letter) % shared for letter in text] for text in texts]
        segments = [[Segment("", False, "start"), Segment(text, False)] for text in self._request.probes]
        rows = [ids[:PROBE_TOKENS] for ids, _ in tokenizer.encode_batch(segments)]
        if columns is None:
            rows = [[token for token in ids if token < words] for ids in rows]
        if columns is not None:
            place = {token: word for word, token in enumerate(columns.tolist())}
            rows = [[place[token] for token in ids if token in place] for ids in rows]
        rows = [ids for ids in rows if len(ids) > 1]
        if not rows:
            raise ModelError(
                tr("no probe has two tokens in this vocabulary", "没有一条探针文本在该词表中有两个词元")
            )
        return tokenizer, columns, rows

    def _shared(self, logits_NTV: torch.Tensor) -> int:
        columns = self._columns["before"]
        return logits_NTV.shape[-1] if columns is None else len(columns)

    def _require_vocabularies(self) -> None:
        """Both sides have the words that they are compared on, as far as their configs say."""
        before, after = self._of["before"], self._of["after"]
        vocabulary = self._request.vocabulary
        if isinstance(after, Weights):
            wanted = None if vocabulary is None else len(vocabulary)
            if vocabulary is None and isinstance(before, Weights) and not before.adapters:
                wanted = words_of(before)
            if wanted not in (None, words_of(after)):
                raise _other_words(words_of(after), wanted)

    def _require_same_words(self, before_NTV: torch.Tensor, after_NTV: torch.Tensor) -> None:
        vocabulary = self._request.vocabulary
        wanted = before_NTV.shape[-1] if vocabulary is None else len(vocabulary)
        if after_NTV.shape[-1] != wanted:
            raise _other_words(after_NTV.shape[-1], wanted)

    def _perplexity(self, logits_NTV: torch.Tensor, name: str) -> float:
        """Over every token of the probes but the first, on all words of the side."""
        nats, tokens = 0.0, 0
        for row, logits_TV in zip(self._rows, logits_NTV, strict=True):
            logits_TV = logits_TV[: len(row) - 1]
            if not torch.isfinite(logits_TV).all():
                when = tr(name, {"before": "转换前", "after": "转换后"}[name])
                raise ModelError(
                    tr(
                        f"the weights {when} give logits that are NaN or infinite",
                        f"{when}的权重给出的 logits 含有 NaN 或无穷大",
                    )
                )
            learned = logits_TV.gather(1, torch.tensor(row[1:])[:, None])[:, 0]
            nats += float((logits_TV.logsumexp(-1) - learned).double().sum())
            tokens += len(row) - 1
        return math.exp(min(nats / tokens, 700.0))

    def _differences(self, before_NTV: torch.Tensor, after_NTV: torch.Tensor, shared: int) -> dict[str, Any]:
        largest, spread, agree, positions = 0.0, 0.0, 0, 0
        for row, before_TV, after_TV in zip(self._rows, before_NTV, after_NTV, strict=True):
            before_TK, after_TK = before_TV[: len(row), :shared], after_TV[: len(row), :shared]
            largest = max(largest, float((after_TK - before_TK).abs().max()))
            spread += float(before_TK.std(-1).sum())
            agree += int((before_TK.argmax(-1) == after_TK.argmax(-1)).sum())
            positions += len(row)
        return {
            "max_logit_difference": largest,
            "spread": spread / positions,
            "top1_agreement": agree / positions,
            "positions": positions,
        }

    def _greedy(
        self, side: Side, prompts_NG: torch.Tensor, continued_NC: torch.Tensor, shared: int
    ) -> dict[str, Any]:
        """One pass over the text before tells whether the side would write it too; only if not, it writes its own."""
        given_NT = torch.cat([prompts_NG, continued_NC], dim=1)
        best_NC = side.logits(given_NT)[:, prompts_NG.shape[1] - 1 : -1, :shared].argmax(-1)
        own_NC = continued_NC
        if not torch.equal(best_NC, continued_NC):
            own_NC = side.greedy(prompts_NG, continued_NC.shape[1], shared)
        texts = [[self._text(row) for row in words] for words in (prompts_NG, continued_NC, own_NC)]
        names = ("prompt", "before", "after")
        return {
            "greedy_equal": torch.equal(own_NC, continued_NC),
            "greedy": [dict(zip(names, row, strict=True)) for row in zip(*texts, strict=True)],
        }

    def _text(self, words: torch.Tensor) -> str:
        columns = self._tokenizer_columns
        ids: list[int] = (words if columns is None else columns[words]).tolist()
        return str(ids) if self._tokenizer is None else self._tokenizer.decode(ids)

    def _merges(self) -> bool:
        """Whether adapters before have become part of the weights after."""
        before, after = self._of["before"], self._of["after"]
        if not (self._request.lossless and isinstance(before, Weights) and isinstance(after, Weights)):
            return False
        return not after.adapters and can_merge(before)

    def _rounded(self) -> dict[str, torch.dtype]:
        """For a lossless step into a narrower type: what each tensor before is rounded to."""
        before, after = self._of["before"], self._of["after"]
        if not (self._request.lossless and isinstance(before, Weights) and isinstance(after, Weights)):
            return {}
        usual, kinds = self._stored_as(), open_side(after).infos
        if usual is None or (before.adapters and not self._merges()):
            return {}
        rounded = {}
        for name, info in open_side(before).infos.items():
            to = kinds[name].dtype if name in kinds else getattr(torch, usual)
            if info.dtype.is_floating_point and to.is_floating_point and narrower(to, info.dtype):
                rounded[name] = to
        return rounded

    def _stored_as(self) -> str | None:
        """The type of most of the bytes after; None where an engine holds them."""
        after = self._of["after"]
        if not isinstance(after, Weights):
            return None
        sizes: Counter[torch.dtype] = Counter()
        for info in open_side(after).infos.values():
            sizes[info.dtype] += info.size_bytes
        return str(sizes.most_common(1)[0][0]).removeprefix("torch.")

    def _layers(self) -> int:
        of = next(of for of in self._of.values() if isinstance(of, Weights))
        found: int = read_config(of).get_text_config().num_hidden_layers
        return found


def words_of(weights: Weights) -> int:
    """Rows of the vocabulary, by the config."""
    found: int = read_config(weights).get_text_config().vocab_size
    return found


def _other_words(got: int, wanted: int | None) -> ModelError:
    return ModelError(
        tr(f"{got} words after, {wanted} expected", f"转换后词表有 {got} 个词，应为 {wanted} 个")
    )


def shared_columns(vocabulary: Sequence[int] | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Ids before and after of the words that both sides have, in the order of the ids after."""
    if vocabulary is None:
        return None, None
    before = torch.tensor(vocabulary, dtype=torch.long)
    after = (before >= 0).nonzero()[:, 0]
    return before[after], after


def narrower(to: torch.dtype, than: torch.dtype) -> bool:
    """Whether some number of one type is no number of the other (bf16 and fp16 are narrower than each other)."""
    new, old = torch.finfo(to), torch.finfo(than)
    return new.eps > old.eps or new.max < old.max


def padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows of one length, filled up on the right: what comes later changes nothing before it in a causal model."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])


def main() -> None:
    """Answer the request on stdin. Whatever else is printed goes to stderr."""
    with contextlib.suppress(OSError):  # where memory runs out, this process goes and nothing else
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    environment.quiet_libraries()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    sys.path[:] = pickle.load(sys.stdin.buffer)
    request: Request = pickle.load(sys.stdin.buffer)
    try:
        say({"measured": Comparison(request, say).measure()})
    except TuolingError as error:
        say({"error": {"problem": error.problem, "where": error.where, "remedy": error.remedy}})


if __name__ == "__main__":
    main()
