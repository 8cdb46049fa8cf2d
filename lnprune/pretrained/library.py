"""The library transformers, imported where it is used, and kept from printing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


def library() -> Any:
    """The module transformers.

    Raises:
        ImportError: it is not installed; it says which extra brings it.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            'folders of transformers need transformers, which the extra "transformers" brings: '
            'pip install "lnprune[transformers]"'
        ) from error
    return transformers


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers prints neither bars nor reports: what matters of them is raised."""
    logging = library().utils.logging
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
