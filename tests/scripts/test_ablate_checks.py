"""What a grid file may not ask for, although each of its runs would be valid alone: found before anything starts."""

import pytest
import yaml
from tiny_run import make_place

from errors import InputError
from scripts.ablate.grid import load_grid

GRID = {"base": "tiny.yaml", "arms": {"none": {"stp.weight": 0}, "stp": {}}, "seeds": [0]}


@pytest.fixture
def load(tmp_path, monkeypatch):
    """load(changes of GRID) -> the grid."""
    make_place(tmp_path, monkeypatch)

    def load(**changes):
        (tmp_path / "g.yaml").write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False))
        return load_grid("g.yaml")

    return load


def test_an_arm_keeps_what_it_says_of_itself(load):
    """The baseline would train with STP on, in a folder that says "none"."""
    arms = {"stp": {"stp.form": "consecutive"}, "none": {"stp.weight": 0}}
    with pytest.raises(InputError, match=r"g.yaml: arm none: stp.weight is an axis; an arm cannot set it"):
        load(arms=arms, axes={"stp.weight": [0.02, 0.08]})


def test_an_axis_beside_an_arms_key_is_no_clash(load):
    arms = {"none": {"stp.weight": 0}, "stp": {"stp.gate.start_tokens": 0}}
    grid = load(arms=arms, axes={"stp.gate.ramp_tokens": [0, 9]})
    assert [cell.config.stp.weight for cell in grid.cells] == [0, 0.1, 0, 0.1]
