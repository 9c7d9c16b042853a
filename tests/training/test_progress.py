"""Speeds against a clock that the test holds, and what a terminal and a pipe get to see."""

import io

import pytest
from rich.console import Console

from training.progress import Progress, SpeedMeter, Status, format_duration, format_status


def meter(total: int = 10_000, window: int = 50) -> tuple[SpeedMeter, list[float]]:
    now = [100.0]
    return SpeedMeter(total, flops_per_token=2e6, gflops=10.0, window=window, clock=lambda: now[0]), now


def test_speed_share_and_estimate():
    speeds, now = meter()
    for _ in range(4):
        now[0] += 0.5
        speeds.lap(1000)
    assert speeds.tokens_per_second == pytest.approx(2000)
    assert speeds.gemm_share == pytest.approx(2000 * 2e6 / 10e9)
    assert speeds.seconds_left(4000) == pytest.approx(3.0)


def test_a_pause_is_no_training_but_takes_time():
    speeds, now = meter()
    now[0] += 1.0
    speeds.lap(1000)
    now[0] += 3.0  # a validation
    speeds.pause()
    now[0] += 1.0
    speeds.lap(1000)
    assert speeds.tokens_per_second == pytest.approx(1000) and speeds.mean_tokens_per_second == pytest.approx(1000)
    assert speeds.seconds_left(2000) == pytest.approx(8000 * 5 / 2000)


def test_the_window_forgets_and_the_mean_does_not():
    speeds, now = meter(window=2)
    for seconds in (8.0, 1.0, 1.0):
        now[0] += seconds
        speeds.lap(1000)
    assert speeds.tokens_per_second == pytest.approx(1000) and speeds.mean_tokens_per_second == pytest.approx(300)


def test_before_the_first_step_nothing_is_divided_by_nothing():
    speeds, _ = meter()
    assert speeds.tokens_per_second == 0 and speeds.gemm_share == 0 and speeds.seconds_left(0) is None
    assert (
        format_status(Status(0, 0, float("nan")), speeds) == "step 0 | 0/10.00k tokens (0%) | loss nan | stp - x 0.000"
    )


def test_the_line():
    speeds, now = meter(1_600_000)
    now[0] += 2.0
    speeds.lap(10_000)
    line = format_status(Status(120, 490_000, 4.8123, 0.9981, 0.02, 0.003), speeds)
    assert line == (
        "step 120 | 490.00k/1.60M tokens (31%) | loss 4.812 | stp 0.998 x 0.020 | lr 3.00e-03"
        " | 5,000 tok/s | 100% of matmul | ETA 3:42"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (185, "3:05"), (7384, "2:03:04"), (273_700, "3d 4h")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_a_pipe_gets_plain_lines_and_only_the_asked_for():
    out = io.StringIO()
    speeds, _ = meter()
    with Progress(speeds, Console(file=out, width=40)) as progress:
        progress.update(Status(1, 10, 2.0))
        progress.update(Status(2, 20, 2.0), line=True)
        progress.message("def f(x): return x[0]  # [bold]not markup[/bold]")
    lines = out.getvalue().splitlines()
    assert len(lines) == 2 and lines[0].startswith("step 2 |") and lines[1].endswith("# [bold]not markup[/bold]")
    assert "\x1b" not in out.getvalue()


def test_a_terminal_gets_one_live_line_and_messages_above_it():
    out = io.StringIO()
    speeds, _ = meter()
    console = Console(file=out, force_terminal=True, width=100, highlight=False)
    with Progress(speeds, console) as progress:
        for step in range(100):
            progress.update(Status(step, step, 2.0))
        progress.message("validation 2.5 bits per byte")
        progress.update(Status(100, 100, 2.0), line=True)
    text = out.getvalue()
    assert "validation 2.5 bits per byte" in text and "step 100 |" in text
    assert text.count("step ") < 20, "redrawn at a bounded rate"
