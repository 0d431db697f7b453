from tests.faults.kill_soak import soak


def test_run_killed_in_a_save_comes_back_bit_for_bit(tmp_path):
    """A short one; `python tests/faults/kill_soak.py` is the long one."""
    soak(tmp_path, ["save"], seed=1)
