"""The embeddings and the output head of a model, as transformers' models name them."""

from __future__ import annotations

from typing import Any

from torch import nn

GETTERS = ("get_input_embeddings", "get_output_embeddings")


def ask(model: nn.Module, getter: str, otherwise: Any = None) -> Any:
    """What `model.getter()` returns, None without such a method; `otherwise` if it raises NotImplementedError, as
    transformers' models of speech, images or time series do. Any other error is the model's own, and gets through."""
    try:
        return getattr(model, getter, lambda: None)()
    except NotImplementedError:
        return otherwise
