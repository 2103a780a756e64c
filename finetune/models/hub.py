"""The hub, which is only asked when it answers: nobody waits for retries where there is no network."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE_S = 5.0
REMEMBERED_S = 60.0


@contextmanager
def asking_hub(name: str | Path) -> Iterator[bool]:
    """Inside, a hub that does not answer is not asked, and only its local cache is read; whether it answers.

    name: of a model or a data set; for a folder or a file nothing is asked, and the answer is True.
    """
    from huggingface_hub import constants

    if Path(name).exists() or constants.HF_HUB_OFFLINE or _answers(constants.ENDPOINT):
        yield True
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield False
    finally:
        constants.HF_HUB_OFFLINE = False


_known: dict[str, tuple[float, bool]] = {}


def _answers(endpoint: str) -> bool:
    """Whether anything comes back from the hub in a few seconds; remembered for a minute."""
    asked_s, answer = _known.get(endpoint, (-REMEMBERED_S, False))
    if time.monotonic() - asked_s > REMEMBERED_S:
        answers: list[bool] = []
        question = threading.Thread(target=lambda: answers.append(_ask(endpoint)), daemon=True)
        question.start()
        question.join(PATIENCE_S)  # a name server that is silent knows no time limit
        answer = any(answers)
        _known[endpoint] = (time.monotonic(), answer)
    return answer


def _ask(endpoint: str) -> bool:
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=PATIENCE_S)
    except Exception:  # of whichever client the library uses
        return False
    return True
