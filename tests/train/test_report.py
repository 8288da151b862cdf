"""What a person sees of a run: one line of a terminal, lines of a file, a plot, TensorBoard."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest

from colrow.train.bar import Bar
from colrow.train.report import Reporter, StepRecord, plot_loss, read_log
from colrow.train.step import StepResult

HUGE = StepRecord(
    step=10**6,
    loss=12.3456,
    learning_rate=3e-4,
    grad_norm=None,
    tokens_per_second=1.2e7,
    step_seconds=123.4,
    communication_share=1.0,
    mfu=0.5,
    memory_bytes=10**12,
)


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_no_line_is_wider_than_80_columns() -> None:
    assert HUGE.line(10**7) == (
        "step 1000000/10000000  skipped: overflow  loss 12.3456  lr 3.0e-04  1000.00 GB"
    )
    usual = StepRecord(20, 2.5, 3e-4, 1.0, 12345.6, 0.1, 0.12, None, 10**9)
    assert usual.line(100) == (
        "step 20/100  loss 2.5000  lr 3.0e-04  12,346 tokens/s  1.00 GB  12% in comms"
    )


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_has_one_line_that_fits(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    bar = Bar(1000, terminal)
    for step in range(1, 251):
        bar.advance(step, loss=2.5, rate=3e-4, tokens=100, seconds=0.5, memory=10**9)
    line = terminal.getvalue().rpartition("\x1b[K")[2]
    assert line.startswith("step 250/1000 ━")
    assert line.endswith(" loss 2.5000 lr 3.0e-04 200 tok/s 1.00 GB ETA 0:06:15")
    width = line.count("━") + line.count("─")
    assert line.count("━") == width // 4 and len(line) < columns
    bar.say("held-out")
    bar.close()
    assert terminal.getvalue().endswith(f"\x1b[Kheld-out\n{line}\r\x1b[K{line}\n")
    assert terminal.getvalue().count("\n") == 2
    bar.advance(10**6, loss=1e9, rate=1e-300, tokens=1, seconds=1e9, memory=10**15)
    assert len(terminal.getvalue().rpartition("\x1b[K")[2]) < columns


def test_a_file_has_no_bar() -> None:
    stream = io.StringIO()
    bar = Bar(10, stream)
    bar.advance(1, loss=2.5, rate=3e-4, tokens=100, seconds=0.5, memory=10**9)
    bar.say("a line")
    bar.close()
    assert stream.getvalue() == "a line\n"


def test_the_parts_of_a_run_are_one_log_one_plot_and_one_curve_of_tensorboard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps and a checkpoint of the second, from which a second part goes on."""
    now = time.time()
    for first, last in ((0, 3), (2, 5)):
        # TensorBoard reads its files in the order of the seconds in their names.
        monkeypatch.setattr(time, "time", lambda first=first: now + 10 * first)
        reporter = Reporter(tmp_path, 5, first_step=first, active=True)
        if first == 0:
            reporter.begin(6.0)
        for step in range(first + 1, last + 1):
            loss, held_out = 5.0 - step - first / 10, 4.0 if step == last else None
            reporter.advance(step, StepResult(loss, 10, 1.0, False), 1e-3, 0.1, 10**9)
            reporter.add(StepRecord(step, loss, 1e-3, 1.0, 10, 0.1, 0, None, 10**9, held_out))
        reporter.close()
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["held-out loss before training 6.0000", said[1]]
    assert said[-1] == "step 5/5  held-out loss 4.0000" and len(said) == 1 + 6 + 2
    losses = [(1, 4.0), (2, 3.0), (3, 1.8), (4, 0.8), (5, -0.2)]
    records = read_log(tmp_path)
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4, 5]
    assert [r["loss"] for r in records[1:]] == pytest.approx([loss for _, loss in losses])
    assert (tmp_path / "loss.png").stat().st_size > 1000

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    logged = [(event.step, event.value) for event in board.Scalars("loss")]
    assert [step for step, _ in logged] == [1, 2, 3, 4, 5]
    assert [loss for _, loss in logged] == pytest.approx([loss for _, loss in losses])
    assert [event.step for event in board.Scalars("eval_loss")] == [0, 5]

    drawn = []
    from matplotlib.axes import Axes

    monkeypatch.setattr(Axes, "plot", lambda self, x, y, *args, **kw: drawn.append((x, y)))
    monkeypatch.setattr(Axes, "legend", lambda self: None)
    plot_loss(records, tmp_path / "again.png")
    assert drawn[0][0] == [1, 2, 3, 4, 5] and drawn[1] == ([0, 5], [6.0, 4.0])
