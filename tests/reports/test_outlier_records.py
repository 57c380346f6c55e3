"""Outlier statistics as metrics and back, and their pictures."""

import numpy as np

from dsr_jax.reports.outlier_records import (
    draw_noise_maps,
    draw_step_maps,
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


def test_a_run_without_statistics_has_no_history() -> None:
    assert read_history([{"step": 1, "loss": 0.5}]) is None


def test_pictures_have_a_panel_per_statistic() -> None:
    history = read_history([{"step": 1, **to_record(TIMES, statistics(1))}])
    assert history is not None
    for picture in (draw_noise_maps(history), draw_step_maps(history)):
        assert picture.dtype == np.uint8 and picture.shape == (260, 2 * 500, 3)
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
