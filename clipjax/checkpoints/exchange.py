"""Agreement of the processes of a run about what it keeps, over the key-value store; alone, no store is needed.

Nothing here uses Orbax's barriers: in one of those all processes would wait for one whose disk has failed.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax

from clipjax.runtime import processes

_LOOK_SECONDS = 60.0
_questions = itertools.count()


def publish(key: str, make: Callable[[], Any]) -> Any:
    """Return what `make` gives on process 0, a JSON value, on all processes."""
    if jax.process_count() == 1:
        return make()
    if processes.is_first():
        value = make()
        processes.kv_set(key, json.dumps(value))
        return value
    return json.loads(_receive(key))


def gather(key: str, value: Any) -> list[Any]:
    """Return the JSON values of all processes by rank on process 0; an empty list on the others."""
    if jax.process_count() == 1:
        return [value]
    processes.kv_set(f"{key}/{jax.process_index()}", json.dumps(value))
    if not processes.is_first():
        return []
    return [json.loads(_receive(f"{key}/{rank}")) for rank in range(jax.process_count())]


def forget(folder: str) -> None:
    """Delete keys that all processes have read; process 0 calls this."""
    if jax.process_count() > 1:
        processes.kv_delete(folder)


def ask(key: str, question: Any) -> Any:
    """Return process 0's answer to a question, both JSON values; a thread of it calls `answer` now and then."""
    number = f"{jax.process_index()}-{next(_questions)}"
    processes.kv_set(f"{key}/asked/{number}", json.dumps(question))
    return json.loads(_receive(f"{key}/answered/{number}"))


def answer(key: str, reply: Callable[[list[tuple[int, Any]]], Any]) -> bool:
    """Answer what the other processes have asked by now; process 0 calls this.

    Args:
        key: of the questions.
        reply: gives the answer to all the questions together, each with the number of its process.

    Returns:
        Whether there was a question.
    """
    asked = processes.kv_list(f"{key}/asked")
    if not asked:
        return False
    try:
        value = reply([(int(number.partition("-")[0]), json.loads(question)) for number, question in asked.items()])
    except Exception as error:  # who asks would wait for ever
        value = repr(error)
    for number in asked:
        processes.kv_set(f"{key}/answered/{number}", json.dumps(value), overwrite=True)
        processes.kv_delete(f"{key}/asked/{number}")
    return True


def _receive(key: str) -> str:
    """Return a text, however slow its sender is; JAX ends this process if the sender dies."""
    while True:
        try:
            return processes.kv_get(key, timeout_seconds=_LOOK_SECONDS)
        except TimeoutError:
            continue
