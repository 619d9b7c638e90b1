"""What the parts of `EDiTMixin` are written for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer

TrainerToBe: Any = Trainer if TYPE_CHECKING else object  # so that they know what they will be mixed into
