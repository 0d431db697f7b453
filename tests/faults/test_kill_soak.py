from tests.faults.kill_soak import soak


def test_killed_runs_come_back_bit_for_bit(tmp_path):
    """A short one; `python tests/faults/kill_soak.py` is the long one."""
    soak(tmp_path, ["step", "save"], seed=1)
