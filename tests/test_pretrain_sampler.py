"""pretrain.py's sampler, and the thread that works ahead of the steps."""

import numpy as np
import pytest

import pretrain
from training.ahead import Prefetch


@pytest.fixture
def songs():
    """Lengths of 200 clips, and the songs that they belong to."""
    rng = np.random.default_rng(0)
    return rng.integers(5, 60, 200), rng.integers(0, 40, 200)


@pytest.fixture
def make(songs):
    return lambda seed=1, **more: pretrain.Pairs(*songs, 10, 7, seed, **more)


def drawn(pairs, steps):
    return [pairs.draw(step) for step in range(steps)]


def test_pairs_counts_what_is_left_out_and_dropped(songs, make):
    length, group = songs
    assert make().left_out == int((length < 10).sum())
    usable = len(set(group[length >= 10]))
    assert (make().steps_per_epoch, make().dropped) == divmod(usable, 7)


def test_crops_lie_inside_their_clip(songs, make):
    for clip, start in drawn(make(), 20):
        assert (start >= 0).all()
        assert (start + 10 <= songs[0][clip]).all()


def test_both_crops_are_of_one_song_and_no_batch_holds_a_song_twice(songs, make):
    for clip, _ in drawn(make(), 20):
        song = songs[1][clip]
        assert (song[:, 0] == song[:, 1]).all()
        assert len(set(song[:, 0])) == 7


def test_pairs_are_a_function_of_seed_and_step(make):
    for step, (clip, start) in enumerate(drawn(make(), 20)):
        again = make().draw(step)
        assert (again[0] == clip).all()
        assert (again[1] == start).all()
    assert not (make(2).draw(0)[1] == make(1).draw(0)[1]).all()


def test_an_epoch_holds_no_song_twice_and_each_has_an_order_of_its_own(songs, make):
    steps = make().steps_per_epoch
    order = [songs[1][clip[:, 0]] for clip, _ in drawn(make(), 3 * steps)]
    epochs = np.array(order).reshape(3, -1)
    assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
    assert not (epochs[0] == epochs[1]).all()


def test_positives_of_a_clip_share_it(make):
    for clip, _ in drawn(make(positives="clip"), 20):
        assert (clip[:, 0] == clip[:, 1]).all()


@pytest.mark.parametrize("batch_size", [7, 1])
def test_one_song_is_too_few(batch_size):
    with pytest.raises(ValueError, match="at least 2 songs with at least 10 samples, found 1"):
        pretrain.Pairs([50, 50], [3, 3], 10, batch_size, 0)


def test_every_start_of_a_song_is_equally_likely():
    # Song 0 has 5 + 1 + 10 possible starts.
    pairs = pretrain.Pairs([14, 10, 19, 30], [0, 0, 0, 1], 10, 2, 0)
    counts = np.zeros((3, 10))
    for clip, start in drawn(pairs, 4000):
        first = clip < 3
        np.add.at(counts, (clip[first], start[first]), 1)
    possible = np.array([[1] * 5 + [0] * 5, [1] + [0] * 9, [1] * 10])
    expected = 8000 / possible.sum()
    assert (counts[possible == 0] == 0).all()
    chi2 = ((counts[possible == 1] - expected) ** 2 / expected).sum()
    assert chi2 < 37.7  # 99.9 % of chi-squared with 15 degrees of freedom


@pytest.fixture
def ahead():
    """ahead(make) -> a Prefetch of the steps 3 .. 19, closed at the end."""
    made = []
    yield lambda make: made.append(Prefetch(make, 3, 20)) or made[0]
    for prefetch in made:
        prefetch.close()


def test_prefetch_keeps_the_order(ahead):
    prefetch = ahead(lambda step: step * step)
    assert [prefetch.get(step) for step in range(3, 20)] == [s * s for s in range(3, 20)]


def test_prefetch_names_the_step_whose_audio_cannot_be_read(ahead):
    def fail(step):
        raise ValueError("clip 7 is gone")
    with pytest.raises(OSError, match="step 3 .*clip 7"):
        ahead(fail).get(3)


def test_prefetch_hands_other_errors_over_as_they_are(ahead):
    def fail(step):
        raise RuntimeError("out of resource")
    with pytest.raises(RuntimeError, match="^out of resource"):  # not the audio's fault
        ahead(fail).get(3)
