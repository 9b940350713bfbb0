"""What every command does with bad input: one line about the error, and the exit status 2."""

import pytest


def expect_one_error_line(capsys, run, message):
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("error: ")
    assert message in line
