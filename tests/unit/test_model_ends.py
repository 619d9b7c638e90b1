"""What a model says of its input embeddings and its head."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from hf_edit.model_ends import GETTERS, ask


def model_whose_getters(do: Any) -> nn.Module:
    return type("Model", (nn.Module,), dict.fromkeys(GETTERS, do))()


@pytest.mark.parametrize("getter", GETTERS)
def test_a_model_has_an_end_or_says_that_it_has_none(getter: str) -> None:
    end = nn.Identity()

    def has_none(model: nn.Module) -> nn.Module:
        raise NotImplementedError

    assert ask(model_whose_getters(lambda model: end), getter) is end
    assert ask(model_whose_getters(has_none), getter) is None
    assert ask(model_whose_getters(has_none), getter, "otherwise") == "otherwise"
    assert ask(nn.Linear(1, 1), getter, "otherwise") is None


@pytest.mark.parametrize("getter", GETTERS)
def test_a_models_own_error_gets_through(getter: str) -> None:
    model = model_whose_getters(lambda model: model.encoder.embeddings)
    with pytest.raises(AttributeError, match="no attribute 'encoder'"):
        ask(model, getter, "otherwise")
