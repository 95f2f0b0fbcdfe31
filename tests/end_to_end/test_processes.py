"""Several processes do what one does: they fail together, and no number depends on how many there are."""

import pytest
import torch

from tests import two_processes


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """The scenes of one pair of processes."""
    return two_processes.play(tmp_path_factory.mktemp("scenes"), "helpers")


# ---- working and failing together ---


def test_processes_know_one_another(played):
    first, second = played["helpers"]
    assert first["world"] == (0, 2, True) and second["world"] == (1, 2, False)


def test_what_the_first_process_does_all_get(played):
    first, second = played["helpers"]
    assert first["by_main"] == second["by_main"] == {"by": 0}
    assert first["by_main fails"] == second["by_main fails"] == ("ConfigError", "only rank 0 was asked", 0)
    assert first["by_main cannot travel"] == second["by_main cannot travel"] == 0


def test_the_error_of_one_is_raised_by_all(played):
    first, second = played["helpers"]
    assert first["one fails"] == second["one fails"] == ("ConfigError", "rank 1 fails", 1)
    assert first["both fail"] == second["both fail"] == ("ConfigError", "rank 0 fails", 0)
    assert first["nested"] == second["nested"] == ("ConfigError", "rank 0 fails", 0)
    assert second["stubborn"] == ("Stubborn", "1 is not 2", 1)
    assert first["stubborn"] == ("RuntimeError", "Stubborn: 1 is not 2", 1)


def test_work_is_shared_and_seen_in_order_by_the_first_process(played):
    first, second = played["helpers"]
    assert first["in order"] == [[(k, k % 2) for k in range(n)] for n in range(6)]
    assert second["in order"] == [[]] * 6
    assert first["taking"] == [k * k for k in range(7)] and second["taking"] == []


def test_work_that_fails_on_one_process_fails_on_all(played):
    first, second = played["helpers"]
    assert first["work fails"] == second["work fails"] == ("ConfigError", "item 5 is bad", 1)
    assert first["taking fails"] == second["taking fails"] == [("ConfigError", "process 0 does not like 4", 0)] * 3


def test_tensors_become_those_of_the_first_process_bit_for_bit(played):
    first, second = (outcome["tensors"] for outcome in played["helpers"])
    for mine, other in zip(first, second, strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine, other)
    assert first[0][0, 0] == torch.tensor(0.1) and torch.equal(first[4], torch.arange(6.0).reshape(2, 3).T)
