"""Tuoling from Python, and what the command line itself calls.

Settings are keyword arguments with transformers' names:

    import tuoling

    run = tuoling.train(model_name_or_path="MODEL", data="rows.json")
    run = tuoling.resume("RUN")                       # after a kill, exactly where it was
    model = tuoling.load("RUN")                       # a run, an adapter, a model folder, a hub id
    model.chat("你好", temperature=0.7)                # one question, or a list of messages
    model.generate("从前有座山，")                      # plain continuation, no template
    model.predict([{"instruction": "…", "output": "…"}])

Errors are children of `tuoling.errors.TuolingError`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack, cast

from tuoling.errors import DataError
from tuoling.language import tr
from tuoling.text.conversation import Conversation, Role, Turn
from tuoling.train.entry import resume, train

if TYPE_CHECKING:
    from tuoling.infer.engine import Engine, GenerationSettings, Reply
    from tuoling.infer.open_engine import EngineOptions
    from tuoling.infer.predict import PredictReport
    from tuoling.infer.session import ChatSession

__all__ = ["Model", "load", "resume", "train"]

Messages = str | Sequence[Mapping[str, str]] | Conversation


def load(path_or_id: str | Path, **options: Unpack[EngineOptions]) -> Model:
    """Load a run, an adapter, a model folder, a GGUF file or a hub id; base, template and stops come from what lies
    there.

    Options are keyword arguments, all of them in `EngineOptions`: template, base, dtype, device, quantization_bit, …
    Raises ModelError, TemplateError or UsageError.
    """
    from tuoling.infer.open_engine import open_engine

    return Model(open_engine(str(path_or_id), **options))


class Model:
    """A loaded model. Generation settings are keyword arguments with transformers' names (`max_new_tokens`,
    `temperature`, `top_p`, `top_k`, `num_beams`, `repetition_penalty`, `seed`, `stop`, …)."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory."""
        self.engine.close()

    def settings(self, **values: Any) -> GenerationSettings:
        """The model's own settings with these changes. Raises UsageError for a bad one."""
        return self.engine.defaults.with_values(values)

    def chat(self, messages: Messages, *, system: str | None = None, **settings: Any) -> str:
        """The answer to a question, or to a list of `{"role", "content"}` that ends with the user's."""
        return self.reply(messages, system=system, **settings).text

    def reply(self, messages: Messages, *, system: str | None = None, **settings: Any) -> Reply:
        """As `chat`, with token counts and why the answer ended."""
        conversation = self._conversation(messages, system)
        return self.engine.generate([conversation], self.settings(**settings))[0]

    def stream(self, messages: Messages, *, system: str | None = None, **settings: Any) -> Iterator[str]:
        """As `chat`, piece by piece, in whole characters."""
        conversation = self._conversation(messages, system)
        for piece in self.engine.stream(conversation, self.settings(**settings)):
            if piece.text:
                yield piece.text

    def generate(self, text: str, **settings: Any) -> str:
        """What comes after a text: no template, as in continued pre-training."""
        plain = Conversation((Turn("text", text),))
        return self.engine.generate([plain], self.settings(**settings))[0].text

    def session(self, *, system: str | None = None, **settings: Any) -> ChatSession:
        """A conversation with memory."""
        from tuoling.infer.session import ChatSession

        return ChatSession(self.engine, self.settings(**settings), system=system)

    def predict(
        self, rows: Iterable[Any], *, batch_size: int = 16, n: int = 1, **settings: Any
    ) -> list[dict[str, Any]]:
        """`input`, `predict` and `target` for rows of any row format, texts, or conversations; greedy by default.

        n: answers a row, all of them in `answers`: drawn with seed, seed + 1, …; or the n best of `num_beams`.
        """
        from tuoling.infer.predict import predict, question_of_record

        questions = [question_of_record(row) for row in rows]
        chosen = self.settings_of_prediction(**settings)
        return predict(self.engine, questions, chosen, batch_size=batch_size, n=n)

    def predict_file(
        self,
        data: Sequence[str],
        out: str | Path,
        *,
        batch_size: int = 16,
        n: int = 1,
        format: str | None = None,
        columns: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> PredictReport:
        """As `predict`, the rows of files into a JSON array; after a kill the same call goes on where it was."""
        from tuoling import console
        from tuoling.data.read import read_rows
        from tuoling.data.sources import resolve_sources
        from tuoling.infer.predict import predict_file

        sources = resolve_sources(list(data), format=format, columns=columns)
        rows = (row for source in sources for row in read_rows(source))
        with console.progress() as bar:
            task = bar.add_task(tr("predicting", "预测"), total=None, detail="")

            def step(done: int, report: PredictReport) -> None:
                bar.update(task, advance=done, detail=f"{report.tokens_per_s:,.0f} tokens/s")

            return predict_file(
                self.engine,
                rows,
                Path(out),
                self.settings_of_prediction(**settings),
                batch_size=batch_size,
                n=n,
                step=step,
                start=lambda total: bar.update(task, total=total),
            )

    def settings_of_prediction(self, **settings: Any) -> GenerationSettings:
        """The model's own, but greedy unless sampling is asked for: two predictions of one row are to be the same."""
        greedy = replace(self.engine.defaults, do_sample=False, temperature=1.0, top_p=1.0, top_k=0)
        return greedy.with_values(settings)

    def _conversation(self, messages: Messages, system: str | None) -> Conversation:
        if isinstance(messages, Conversation):
            return messages
        if isinstance(messages, str):
            turns: list[Turn] = [Turn("user", messages)]
        else:
            turns = [_turn(message) for message in messages]
        system = system if system is not None else self.engine.system
        if system and (not turns or turns[0].role != "system"):
            turns.insert(0, Turn("system", system))
        return Conversation(tuple(turns))


def _turn(message: Mapping[str, str]) -> Turn:
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant") or not isinstance(content, str):
        raise DataError(
            tr(f"not a message: {message!r:.80}", f"不是合法的消息：{message!r:.80}"),
            remedy='{"role": "user", "content": "…"}',
        )
    return Turn(cast(Role, role), content)
