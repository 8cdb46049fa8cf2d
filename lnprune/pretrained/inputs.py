"""Inputs that a config implies: what a model of it can be called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_EXAMPLES, _TOKENS = 2, 12


def example_inputs(model: Any) -> dict[str, Tensor]:
    """Keywords for a call: token ids or pixels, the same in every call.

    Args:
        model: a model of transformers.

    Raises:
        ValueError: the model reads something else.
    """
    config = model.config
    generator = torch.Generator().manual_seed(0)
    name = model.main_input_name
    if name == "input_ids":
        longest = getattr(config, "max_position_embeddings", None) or _TOKENS
        # A padding token would be left out by some models, and would move the positions of others.
        size = _EXAMPLES, min(_TOKENS, longest - 4 if longest > 8 else longest)
        ids = torch.randint(0, config.vocab_size - 1, size, generator=generator)
        padding = getattr(config, "pad_token_id", None)
        ids += (ids >= padding).long() if padding is not None and 0 <= padding < config.vocab_size else 0
        found = {"input_ids": ids}
        if config.is_encoder_decoder:
            found["decoder_input_ids"] = ids.flip(1)
        return found
    if name == "pixel_values":
        sides = config.image_size
        height, width = sides if isinstance(sides, list | tuple) else (sides, sides)
        shape = _EXAMPLES, config.num_channels, height, width
        return {name: torch.randn(shape, generator=generator)}
    raise ValueError(
        f"{type(model).__name__} reads {name}: expected a model that reads input_ids or pixel_values; "
        "couple(model, example_inputs) and Plan.compact() take any"
    )
