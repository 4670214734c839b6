"""Errors that a user can act on. Each message names the value, what is allowed and what to do.

What the store raises is a `StoreError`, which has no base with these in common; `cachetune_rag` names those too.
"""

from __future__ import annotations


class CacheTuneError(Exception):
    """Base of all errors of this package."""


class ConfigError(CacheTuneError, ValueError):
    """An argument or setting is out of range."""


class PromptError(CacheTuneError, ValueError):
    """A prompt can't be built from what was given."""


class PromptTooLongError(PromptError):
    """More tokens than the model's context holds."""


class UnsupportedModelError(CacheTuneError):
    """Reuse can't be exact for this model."""


class ModelLoadError(CacheTuneError):
    """A model or tokenizer could not be loaded."""


class EngineClosedError(CacheTuneError, RuntimeError):
    """The engine was closed."""
