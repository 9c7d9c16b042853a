"""python -m scripts.plan: tables that say what they rest on, the same as JSON, and bad input as one line."""

import json
import sys
from pathlib import Path

import pytest

from errors import InputError
from scripts.plan import __main__ as plan

SCALE = Path(__file__).parents[2] / "configs/scale"


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setattr(sys, "argv", ["plan", str(SCALE / "hybrid_150m.yaml"), "train.batch_rows=4", *arguments])
        code = plan.main()
        return code, capsys.readouterr().out

    return run


def test_the_tables_say_what_is_needed_and_what_is_unmeasured(command):
    code, out = command("--gpu", "rtx4090-24gb")
    assert code == 0
    for words in ("149.4 M parameters", "settings on 1 x rtx4090-24gb", "a rank's peak (step)", "the run", "to set"):
        assert words in out, words
    assert out.count("UNMEASURED") == 4 and "assumed" in out


def test_json_holds_the_same_and_nothing_else(command):
    code, out = command("--gpus", "4", "--json", "--mfu", "0.5")
    found = json.loads(out)
    assert code == 0 and found["parameters"] == 149_363_416
    assert {estimate["setting"]["kind"] for estimate in found["estimates"]} == {"ddp", "fsdp"}
    chosen = found["chosen"]
    parts = [size for name, size in chosen["memory"].items() if isinstance(size, int) and name != "total"]
    assert sum(parts) == chosen["memory"]["total"] and chosen in found["estimates"]
    assert found["assumptions"]["mfu"] == 0.5 and found["notes"]


def test_a_setting_can_be_asked_for(command):
    _, out = command("--gpus", "2", "--data", "ddp", "--recompute", "full", "--json")
    setting = json.loads(out)["chosen"]["setting"]
    assert (setting["kind"], setting["recompute"]) == ("ddp", "full")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--gpu", "h10-80gb"), "h100-80gb"),
        (("--gpus", "3"), "train.batch_rows"),
        (("--data", "fspd", "--gpus", "2"), "fsdp"),
        (("--recompute", "some"), "selective"),
        (("--mfu", "2"), "--mfu"),
        (("stp.wieght=1",), "stp.weight"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(command, arguments, words):
    with pytest.raises(InputError, match=words) as error:
        command(*arguments)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_nothing_fits_is_said(command):
    code, out = command("--gpu", "l4-24gb", "model.d_model=12288", "model.attention.n_heads=96")
    assert code == 0 and "nothing fits" in out and "does not fit" in out
