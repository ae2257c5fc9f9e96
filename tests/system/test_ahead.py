"""One step ahead: the samplers draw the next step while the learner trains, and nothing shows of who was quicker."""

import pytest

from ..inprocess import assert_same_run

AHEAD = ("loop.ahead=1", "steps=4", "evaluate.every=3", "evaluate.grid_every=0")
SMALL = ("cluster.samplers=1", "cluster.learners=1")


@pytest.mark.parametrize("kind", ["grpo", "nft"])
def test_a_run_one_step_ahead_is_a_plain_loop_that_draws_with_the_weights_of_one_update_before(
    kind, tiny, train, in_process
):
    config = tiny(kind, *AHEAD, *SMALL)
    here = in_process(config)
    assert [row["staleness"] for row in here.rows] == [0, 1, 1, 1]
    assert_same_run(here, train(config).path)
