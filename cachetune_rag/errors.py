"""Errors that a user can act on. Each message names the value, what is allowed and what to do.

* CacheTuneError
  x ConfigError
  x PromptError
    + PromptTooLongError
  x NonFiniteLogitsError
  x ModelChangedError
  x UnsupportedModelError
  x ModelLoadError
  x EngineClosedError (a RuntimeError too)
  x ForkedError (a RuntimeError too)

The store's errors derive from `StoreError`, which is not a `CacheTuneError`; `cachetune_rag` exports them too.

None of these is a `ValueError` or a `TypeError`. Frameworks handle those as the failure of a single answer and carry on: LlamaIndex's
synthesizers turn them into an empty answer, so that a misspelt setting would look like a model with nothing to say.
"""

from __future__ import annotations


class CacheTuneError(Exception):
    """Base of all errors of this package."""


class ConfigError(CacheTuneError):
    """An argument or setting is out of range."""


class PromptError(CacheTuneError):
    """A prompt can't be built from these arguments."""


class PromptTooLongError(PromptError):
    """The prompt has more tokens than the model's context holds."""


class NonFiniteLogitsError(CacheTuneError):
    """The model gave NaN or infinite logits, so no next token can be chosen."""


class ModelChangedError(CacheTuneError):
    """The model's weights are no longer those that stored keys and values were computed with."""


class UnsupportedModelError(CacheTuneError):
    """Reuse can't be exact for this model."""


class ModelLoadError(CacheTuneError):
    """A model or tokenizer could not be loaded."""


class EngineClosedError(CacheTuneError, RuntimeError):
    """The engine was closed."""


class ForkedError(CacheTuneError, RuntimeError):
    """The engine (or a stream, a prompt builder) was made before this process was forked: it belongs to the parent. Or torch
    can't be used in this process, because a model was computing while it was forked."""
