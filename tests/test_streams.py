import hashlib

import numpy as np
import torch

from align_cluster.prompts.groups import member_seed
from align_cluster.rollouts.denoise import path_generators, starting_noise
from align_cluster.streams import hashed, stream


def words(generator: torch.Generator, count: int) -> list[int]:
    """The next words of the twister, their lowest 27 bits, which torch draws from one word each."""
    return torch.empty(count, dtype=torch.int64).random_(0, 2**27, generator=generator).tolist()


def test_a_stream_is_the_twister_whose_state_is_the_hash_of_the_seed():
    for seed in (0, 5, 2**32, 2**63 - 1, 2**64 - 1):
        state = hashlib.shake_128(seed.to_bytes(8, "little")).digest(4 * 624)
        twister = np.random.MT19937()
        twister.state = twister.state | {"state": {"key": np.frombuffer(state, np.uint32), "pos": 624}}
        assert words(stream(seed), 2000) == (twister.random_raw(2000) % 2**27).tolist()


def test_a_stream_is_pinned():
    assert words(stream(member_seed(7, 123, 4, 11)), 3) == [27666657, 120236173, 28616347]
    assert stream(11).initial_seed() == 11


def test_every_bit_of_a_seed_changes_the_stream():
    seed = member_seed(0, 0, 0, 0)
    drawn = {tuple(words(stream(seed ^ (1 << bit)), 2)) for bit in range(64)} | {tuple(words(stream(seed), 2))}
    assert len(drawn) == 65


def test_seeds_whose_lower_halves_are_equal_begin_with_other_noise():
    """Two images of one run whose seeds share 32 bits, as 10 of 288,000 do, once were drawn from one noise."""
    seeds = [3, 3 + 2**32, 3 + 2**62]
    noise = starting_noise(seeds, (2, 4, 4))
    later = torch.stack([torch.randn(2, 4, 4, generator=generator) for generator in path_generators(seeds)])
    every = torch.cat([noise, later]).flatten(1)
    assert (
        torch.corrcoef(every).fill_diagonal_(0).abs().max() < 0.6 and len({tuple(row.tolist()) for row in every}) == 6
    )


def test_noise_is_normal_and_images_of_a_run_share_none_of_it():
    seeds = [member_seed(0, step, group, member) for step in range(5) for group in range(4) for member in range(25)]
    noise = starting_noise(seeds, (4, 8, 8)).flatten(1)
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5 and abs(noise.std() - 1) < 0.01
    between = torch.corrcoef(noise).fill_diagonal_(0)
    assert between.abs().max() < 6 / noise.shape[1] ** 0.5


def test_a_name_has_the_same_hash_everywhere():
    assert hashed("0/0/0/0") == 2 * member_seed(0, 0, 0, 0) + hashed("0/0/0/0") % 2 == 11708687640548437744
