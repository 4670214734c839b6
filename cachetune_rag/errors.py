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

What the store raises is a `StoreError`, which has no base with these in common; `cachetune_rag` names those too.

None of these is a `ValueError` or a `TypeError`. Frameworks take those for a fault of one answer and go on without it: LlamaIndex's
synthesizers turn them into an empty answer, so a misspelt setting would look like a model with nothing to say.
"""

from __future__ import annotations


class CacheTuneError(Exception):
    """Base of all errors of this package."""


class ConfigError(CacheTuneError):
    """An argument or setting is out of range."""


class PromptError(CacheTuneError):
    """A prompt can't be built from what was given."""


class PromptTooLongError(PromptError):
    """More tokens than the model's context holds."""


class NonFiniteLogitsError(CacheTuneError):
    """The model gave logits that are no numbers, so there is no next token."""


class ModelChangedError(CacheTuneError):
    """The model's weights are no longer those that stored keys and values were computed with."""


class UnsupportedModelError(CacheTuneError):
    """Reuse can't be exact for this model."""


class ModelLoadError(CacheTuneError):
    """A model or tokenizer could not be loaded."""


class EngineClosedError(CacheTuneError, RuntimeError):
    """The engine was closed."""


class ForkedError(CacheTuneError, RuntimeError):
    """The engine (or a stream, a prompt builder) was made before this process was forked: it belongs to the parent. Or torch can't be
    used in this process, for a model was computing at the fork."""
