"""Every error that a user can act on: a fact with values, and a hint at what to do about it."""

from collections.abc import Iterable
from difflib import get_close_matches


class DemurError(Exception):
    """Something that a user can act on: a fact, and a hint at what to do about it.

    The two parts stay apart, so that the command line and the report can each show them their own
    way, and the error can cross a process boundary.
    """

    def __init__(self, fact: str, hint: str) -> None:
        super().__init__(fact, hint)
        self.fact, self.hint = fact, hint

    def __str__(self) -> str:
        return f"{self.fact}\nhint: {self.hint}"


class UnknownNameError(DemurError, LookupError):
    """A name in a config file or on the command line that nothing answers to."""

    @classmethod
    def among(cls, known: Iterable[str], *, kind: str, name: str) -> "UnknownNameError":
        """Say which `kind` was asked for, and the nearest name that exists."""
        names = sorted(known)
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(names)}"
        return cls(f"no {kind} is called `{name}`", hint)


class MissingExtraError(DemurError, ImportError):
    """A part that only some users need is not installed."""

    @classmethod
    def needed(cls, *, extra: str, module: str) -> "MissingExtraError":
        """Name the extra that brings `module`."""
        return cls(
            f"`{module}` is not installed", f"install it with `pip install 'demur[{extra}]'`"
        )


class ModelLoadError(DemurError):
    """A model, tokenizer or adapter could not be loaded."""


class FamilyError(DemurError):
    """The model's architecture is unknown, or cannot do what was asked of it."""


class TemplateError(DemurError):
    """The chat template is missing, raises, or does not keep the user's text in one piece."""


class PromptFileError(DemurError, ValueError):
    """A prompt file has lines that cannot be read, or lacks a column; all of them are listed."""


class OverlapError(DemurError, ValueError):
    """Prompts that must be disjoint are not."""


class TooFewPromptsError(DemurError, ValueError):
    """A class or a split has too few prompts for what is to be computed from it."""


class DegenerateVectorError(DemurError, ValueError):
    """A direction of norm zero, or one that holds NaN or infinity."""


class NonFiniteError(DemurError, ArithmeticError):
    """Activations or logits hold NaN or infinity."""


class SilentEditError(DemurError, RuntimeError):
    """The model ran inside `applied`, yet a site was never reached: nothing was edited there."""


class ConfigError(DemurError, ValueError):
    """A setting is unknown or out of range."""


class StoreError(DemurError, OSError):
    """A record could not be written or read back whole."""
