"""The loop: what it saves before it stops."""

from unittest import mock

import jax
import pytest

from clipjax.config import Config
from clipjax.data.training_stream import NoUsableSample, TooManyBadSamples
from clipjax.training.loop import _train
from clipjax.training.resume import Position


@pytest.mark.parametrize(
    ("error", "processes", "step", "saved"),
    [
        (TooManyBadSamples("above the limit"), 1, 3, [2]),
        (TooManyBadSamples("above the limit"), 4, 3, [2]),  # all of them find so
        (NoUsableSample("100 in a row"), 1, 3, [2]),
        (NoUsableSample("100 in a row"), 4, 3, []),  # the others are in the step, and would not join in a save
        (NoUsableSample("100 in a row"), 1, 1, []),  # a corrected config is not refused for a step 0
    ],
)
def test_the_state_before_unusable_data_is_saved_where_all_can(monkeypatch, error, processes, step, saved):
    def next_batch(number: int) -> dict:
        if number == step:
            raise error
        return {}

    run = mock.MagicMock(config=Config(), start=Position(), next_batch=next_batch)
    run.train_step.return_value = ("state", {})
    run.signal.due.return_value = False
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with pytest.raises(type(error), match=str(error)):
        _train(run)
    assert [call.args[1] for call in run.save.call_args_list] == saved
    assert not run.wait_for_saves.called
