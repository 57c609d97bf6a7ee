"""The step of two processes that experiments.scaling times."""

import pytest

from experiments.scaling import parallel


def test_rows_are_of_the_same_number_of_images():
    one, two, apart, gradients = parallel.rows_of(parallel.Step(rows=512), parallel.Seconds(0.02, 0.021, 0.025, 0.003))
    assert (one.what, one.value, one.seconds) == ("training step of 1,024 images", 1, 0.04)
    assert (two.what, two.value, two.seconds) == (one.what, 2, 0.025)
    assert two.note == "efficiency 0.80; 3.0 ms are communication"
    assert (apart.seconds, gradients.seconds) == (0.021, 0.003)


@pytest.mark.slow
def test_every_kind_of_step_is_timed():
    seconds = parallel.seconds_of(parallel.Step(16, 8, 2, rows=4, steps=6, turns=1, compiler="none"))
    assert all(each > 0 for each in seconds)
    assert seconds.sum_of_gradients < seconds.together
