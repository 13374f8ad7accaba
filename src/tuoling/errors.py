"""Errors a user can act on.

TuolingError                the result or the input is bad (exit code 1)
├── DataError               a row, a file of rows, or a token store
├── TemplateError           a template that is unknown, or does not fit a tokenizer
├── ModelError              a model, tokenizer or adapter that cannot be used as it is
├── OutputError             a place that cannot be written to
├── TrainingError           a run that cannot start or go on
├── EndpointError           a model behind an address that does not answer as it should
├── MissingPackage          an optional package that is not installed
└── UsageError              the call is wrong (exit code 2)
    └── ConfigError         a config file or a key=value
"""

from __future__ import annotations


class TuolingError(Exception):
    """What is wrong, where, and what to do now.

    problem: one sentence, with the offending value in it.
    where:   path, `file:line`, `file:line:field` or config key.
    remedy:  what the user can type or change; may hold several lines.
    """

    exit_code = 1

    def __init__(self, problem: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.problem = problem
        self.where = where
        self.remedy = remedy
        super().__init__(problem)

    def __str__(self) -> str:
        return "\n".join(part for part in (self.problem, self.where, self.remedy) if part)


class DataError(TuolingError):
    """A row, a file of rows, or a token store is bad."""


class TemplateError(TuolingError):
    """A template is unknown, or does not fit the tokenizer."""


class ModelError(TuolingError):
    """A model, tokenizer or adapter cannot be used as it is."""


class OutputError(TuolingError):
    """A file or folder cannot be written."""


class TrainingError(TuolingError):
    """A run cannot start or go on."""


class EndpointError(TuolingError):
    """A model behind an HTTP address does not answer as it should.

    status: of HTTP, None where none came. lasting: asking again, or asking something else, would not help.
    """

    def __init__(
        self,
        problem: str,
        *,
        where: str | None = None,
        remedy: str | None = None,
        status: int | None = None,
        lasting: bool = False,
    ) -> None:
        self.status = status
        self.lasting = lasting
        super().__init__(problem, where=where, remedy=remedy)


class MissingPackage(TuolingError):
    """An optional package is needed and not installed."""

    def __init__(self, package: str, *, extra: str, purpose: str, otherwise: str | None = None) -> None:
        """otherwise: how to go on without it, the remedy's second line."""
        from tuoling.language import tr

        super().__init__(
            tr(f"{purpose} needs the package {package}", f"{purpose} 需要安装 {package}"),
            remedy=f'pip install "tuoling[{extra}]"' + (f"\n{otherwise}" if otherwise else ""),
        )


class UsageError(TuolingError):
    """The call itself is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """A config file or an override is wrong."""
