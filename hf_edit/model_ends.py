"""The embeddings and the output head of a model, as transformers' models name them."""

from __future__ import annotations

from typing import Any

from torch import nn

GETTERS = ("get_input_embeddings", "get_output_embeddings")


def ask(model: nn.Module, getter: str, otherwise: Any = None) -> Any:
    """What `model.getter()` returns, None without such a method; `otherwise` if it raises NotImplementedError or
    AttributeError, as models of speech, images or time series do."""
    try:
        return getattr(model, getter, lambda: None)()
    except (NotImplementedError, AttributeError):
        return otherwise
