# SPDX-License-Identifier: Apache-2.0
"""What PhaseCallback warns of."""

import pytest


@pytest.fixture
def warned(monkeypatch):
    """Texts of warnings, each once."""
    texts = []
    monkeypatch.setattr("hf_nsf.trainer.callback.logger.warning_once", lambda text: text in texts or texts.append(text))
    return texts
