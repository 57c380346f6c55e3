"""Outlier statistics as metrics and back, and their pictures."""

import numpy as np

from dsr_jax.reports.outlier_records import (
    draw_noise_maps,
    draw_step_maps,
    extend_history,
    over_noise,
    read_history,
    to_record,
)

TIMES = (0.1, 0.5)


def statistics(step: int) -> list[dict[str, np.ndarray]]:
    return [
        {
            "norm_max": np.array([2.0, 30.0 * step, 4.0]),
            "norm_p50": np.array([2.0, 3.0, 4.0]),
            "outlier_share": np.array([0.0, time, 0.0]),
            "threshold": np.array([np.nan, 7.0, np.nan]),
        }
        for time in TIMES
    ]


def test_records_give_the_statistics_back() -> None:
    records = [{"step": 1, "loss": 0.5}]
    records += [{"step": step, **to_record(TIMES, statistics(step))} for step in (1, 3)]
    history = read_history(records)
    assert history is not None
    assert history.steps == (1, 3) and history.times == TIMES
    np.testing.assert_allclose(history.values["norm_max"][1, 0], [2, 90, 4])
    np.testing.assert_allclose(history.values["norm_ratio"][1, 1], [1, 30, 1])
    np.testing.assert_array_equal(np.isnan(history.values["threshold"][0, 0]), [True, False, True])
    np.testing.assert_allclose(over_noise(history, "outlier_share")[0], [0, 0.5, 0])


def test_a_history_is_extended_record_by_record() -> None:
    records = [{"step": step, **to_record(TIMES, statistics(step))} for step in (1, 3, 5)]
    # As after a change of config.log.outlier_times.
    records.append({"step": 7, **to_record((0.9,), statistics(7)[:1])})
    want, found = read_history(records), None
    for record in records:
        new = read_history([record])
        assert new is not None
        found = extend_history(found, new)
    assert want is not None and found is not None
    assert found.steps == want.steps and found.times == want.times == (0.1, 0.5, 0.9)
    assert list(found.values) == list(want.values)
    for name, values in want.values.items():
        np.testing.assert_array_equal(found.values[name], values)
    again = read_history(records[1:2])
    assert again is not None
    assert extend_history(found, again).steps == (1, 3), "steps that are done again"


def test_a_run_without_statistics_has_no_history() -> None:
    assert read_history([{"step": 1, "loss": 0.5}]) is None


def test_pictures_have_a_panel_per_statistic() -> None:
    history = read_history([{"step": 1, **to_record(TIMES, statistics(1))}])
    assert history is not None
    for picture in (draw_noise_maps(history), draw_step_maps(history)):
        assert picture.dtype == np.uint8 and picture.shape == (260, 2 * 500, 3)
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
