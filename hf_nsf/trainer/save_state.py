# SPDX-License-Identifier: Apache-2.0
"""SaveState: writes a run's log where an environment variable asks for it, as hf_nsf.compare does."""

from __future__ import annotations

import json
import os
from typing import Any

from transformers import TrainerCallback

SAVE_STATE = "HF_NSF_SAVE_STATE"


class SaveState(TrainerCallback):
    """Writes the Trainer's log history as JSON to the path in `HF_NSF_SAVE_STATE`, whole or not at all."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the log; not that of a Trainer that made no update and only evaluates."""
        path = os.environ.get(SAVE_STATE)
        if path and state.is_world_process_zero and state.global_step:
            with open(path + ".part", "w", encoding="utf-8") as file:
                json.dump({"log_history": state.log_history}, file, default=float)  # numpy's numbers
            os.replace(path + ".part", path)

    on_evaluate = on_train_end = on_log
