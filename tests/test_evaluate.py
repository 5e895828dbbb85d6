"""evaluate.py as a library: metrics against scikit-learn, windows and fractions at their edges, and
probes."""

import functools

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn

import evaluate
import model
from evaluate import Protocol, Windows
from evaluation import intervals, neighbours

torch.set_num_threads(1)
WIDTH = 1 / 16  # an encoder that is fast, and whose numbers mean nothing


# -------------------------------------------------------------------------------------- metrics

def mean_over_tags(metric, scores, labels):
    both = [k for k in range(labels.shape[1]) if 0 < labels[:, k].sum() < len(labels)]
    return np.mean([metric(labels[:, k], scores[:, k]) for k in both]), labels.shape[1] - len(both)


@pytest.fixture(params=[2, 7, 10**6], ids=["nearly all tied", "many ties", "no ties"])
def scored(request):
    """Scores and labels of 400 clips and 20 tags, one without positives, one without negatives."""
    rng = np.random.default_rng(request.param)
    scores = rng.integers(0, request.param, (400, 20)) / request.param
    labels = (rng.random((400, 20)) < rng.random(20) ** 3).astype(np.uint8)
    labels[:, 3] = 0
    labels[:, 5] = 1
    return scores, labels


def test_metrics_over_tags_equal_scikit_learn(scored):
    got = evaluate.score(*scored)
    roc, left_out = mean_over_tags(roc_auc_score, *scored)
    pr, _ = mean_over_tags(average_precision_score, *scored)
    assert got["roc_auc"] == pytest.approx(roc, abs=1e-12)
    assert got["pr_auc"] == pytest.approx(pr, abs=1e-12)
    assert got["tags_left_out"] == left_out >= 2
    assert np.isnan(got["tag"][[3, 5]]).all()


def test_metrics_over_clips_equal_scikit_learn(scored):
    scores, labels = scored
    labels[7] = 0
    labels[9] = 1
    got = evaluate.score(scores, labels)
    roc, left_out = mean_over_tags(roc_auc_score, scores.T, labels.T)
    pr, _ = mean_over_tags(average_precision_score, scores.T, labels.T)
    assert got["clip_roc_auc"] == pytest.approx(roc, abs=1e-12)
    assert got["clip_pr_auc"] == pytest.approx(pr, abs=1e-12)
    assert got["clips_left_out"] == left_out >= 2


def test_metrics_in_resamples_equal_scikit_learn_with_weights():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 9, 60) / 9
    labels = rng.integers(0, 2, 60)
    counts = rng.integers(0, 3, (5, 60))
    roc, pr = intervals.Ranking(scores, labels)(torch.from_numpy(counts.T.astype(np.float64)))
    for b, weights in enumerate(counts):
        wanted = roc_auc_score(labels, scores, sample_weight=weights)
        assert roc[b] == pytest.approx(wanted, abs=1e-12)
        wanted = average_precision_score(labels, scores, sample_weight=weights)
        assert pr[b] == pytest.approx(wanted, abs=1e-12)


@pytest.fixture(scope="module")
def large():
    rng = np.random.default_rng(1)
    scores = rng.random((20_000, 50)).astype(np.float32)
    labels = rng.random((20_000, 50)) < 0.02
    return scores, labels, evaluate.score(scores, labels)


@pytest.mark.parametrize("k", [0, 49])
def test_metrics_of_many_clips_equal_scikit_learn(large, k):
    scores, labels, got = large
    wanted = roc_auc_score(labels[:, k], scores[:, k])
    assert got["tag_roc_auc"][k] == pytest.approx(wanted, abs=1e-12)
    wanted = average_precision_score(labels[:, k], scores[:, k])
    assert got["tag"][k] == pytest.approx(wanted, abs=1e-12)


def test_metrics_do_not_depend_on_the_order_of_the_clips(large):
    scores, labels, got = large
    order = np.random.default_rng(2).permutation(len(scores))
    again = evaluate.score(scores[order], labels[order])
    assert again["roc_auc"] == pytest.approx(got["roc_auc"], abs=1e-12)
    assert again["clip_pr_auc"] == pytest.approx(got["clip_pr_auc"], abs=1e-12)


def test_one_clip_has_metrics_over_its_tags_alone():
    got = evaluate.score([[0.9, 0.1, 0.4]], [[1, 0, 0]])
    assert np.isnan(got["roc_auc"])
    assert got["tags_left_out"] == 3
    assert got["clip_roc_auc"] == 1.0


def test_equal_scores_are_half_right():
    assert evaluate.score(np.zeros((4, 1)), [[1], [0], [1], [0]])["roc_auc"] == 0.5


def test_one_class_is_always_right():
    only = evaluate.score(np.ones((3, 1)), np.ones((3, 1), int), "singlelabel")
    assert only["accuracy"] == 1.0
    assert only["confusion"].tolist() == [[3]]


@pytest.mark.parametrize("scores, labels, says", [
    ([[0.1, 0.2], [np.nan, 0.3], [0.4, 0.5]], np.eye(3)[:, :2], "1 of 3 clips have NaN scores"),
    (np.zeros((3, 2)), np.zeros((2, 2)), "one shape"),
    (np.zeros((0, 2)), np.zeros((0, 2)), "one shape"),
])
def test_what_cannot_be_scored_is_refused(scores, labels, says):
    with pytest.raises(ValueError, match=says):
        evaluate.score(scores, labels)


def test_accuracy_recall_and_confusion_of_single_labels():
    labels = np.eye(3, dtype=int)[[0, 0, 1, 1]]
    got = evaluate.score(np.eye(3)[[0, 1, 1, 2]], labels, "singlelabel")
    assert got["accuracy"] == 0.5
    assert got["confusion"].tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert got["tag"][:2].tolist() == [0.5, 0.5]
    assert np.isnan(got["tag"][2])


def test_tensors_with_a_graph_are_scored_as_arrays_are():
    logits = torch.tensor([[0.0, 2.0], [4.0, 2.0]], requires_grad=True)
    asked = evaluate.score(logits, torch.eye(2))
    assert asked["roc_auc"] == evaluate.score(logits.detach().numpy(), np.eye(2))["roc_auc"]


# ------------------------------------------------------------------------------------ bootstrap

def bootstrap(scores, labels, songs, task="multilabel", n=1000):
    functions = (evaluate.rank_metrics, evaluate.score)
    return intervals.bootstrap(scores, labels, songs, task, *functions, n)


@pytest.fixture(scope="module")
def noisy():
    """Scores and labels of 60 clips and 4 tags, and two seeds' draws, each clip a song."""
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 4)) < 0.4).astype(np.uint8)
    scores = labels + rng.normal(0, 1, (60, 4))
    return scores, labels, bootstrap([scores, scores], labels, np.arange(60), n=300)


@pytest.mark.parametrize("name", ["roc_auc", "pr_auc", "clip_roc_auc", "clip_pr_auc"])
def test_an_interval_holds_its_value(noisy, name):
    scores, labels, draws = noisy
    value = evaluate.score(scores, labels)[name]
    low, high = intervals.interval(draws[name], value)
    assert low < value < high
    assert high - low < 0.4


def test_clips_of_a_song_stay_together(noisy):
    scores, labels, draws = noisy
    scores, labels = np.repeat(scores, 2, 0), np.repeat(labels, 2, 0)
    songs = np.repeat(np.arange(60), 2)
    same = bootstrap([scores], labels, songs, n=300)["roc_auc"]
    assert same == pytest.approx(draws["roc_auc"], abs=1e-12)  # as many songs as before
    apart = bootstrap([scores], labels, np.arange(120), n=300)["roc_auc"]
    assert apart.std() < 0.85 * same.std()


def test_what_is_always_right_is_right_in_every_resample():
    labels = np.eye(4, dtype=int)
    draws = bootstrap([np.eye(4)], labels, np.arange(4), "singlelabel", n=10)
    assert (draws["accuracy"] == 1).all()


@pytest.mark.parametrize("levels", [3, 10**6], ids=["ties", "no ties"])
@pytest.mark.parametrize("task", ["multilabel", "singlelabel"])
def test_metrics_in_resamples_are_those_of_their_clips(task, levels):
    rng = np.random.default_rng(levels)
    labels = (rng.random((50, 5)) < [0.02, 0.1, 0.3, 0.5, 0]).astype(np.uint8)
    labels = np.eye(5, dtype=int)[rng.integers(0, 3, 50)] if task == "singlelabel" else labels
    scores = rng.integers(0, levels, (2, 50, 5)) / levels
    songs = np.arange(50) // 2
    fast = bootstrap(scores, labels, songs, task, n=100)
    for b, counts in enumerate(np.concatenate(list(intervals.resamples(songs, 100)))):
        rows = np.repeat(np.arange(50), counts)
        runs = [evaluate.score(of_seed[rows], labels[rows], task) for of_seed in scores]
        for name in fast:
            plain = np.mean([run[name] for run in runs], 0)
            assert np.allclose(fast[name][b], plain, rtol=0, atol=1e-12, equal_nan=True), name


def test_a_metric_of_ones_own_has_draws(noisy):
    """One function, its key in `score` and in METRICS: that is all that a new metric takes."""
    scores, labels, _ = noisy

    def score(scores, labels, task):
        return {**evaluate.score(scores, labels, task), "largest": scores.max()}

    songs = np.arange(60)
    functions = (evaluate.rank_metrics, score)
    draws = intervals.bootstrap([scores], labels, songs, "multilabel", *functions, 9)
    assert set(draws) == {"roc_auc", "pr_auc", "tag", "clip_roc_auc", "clip_pr_auc", "largest"}
    first = next(intervals.resamples(songs, 9))[0]
    assert draws["largest"][0] == scores[first > 0].max()


# ------------------------------------------------------------------------- windows and fractions

@pytest.mark.parametrize("length, hop, starts", [
    (9, None, [0, 3, 6]), (8, None, [0, 3]), (2, None, []), (3, None, [0]), (0, None, []),
    (7, 2, [0, 2, 4]), (6, 2, [0, 2])])
def test_windows_at_the_edges(length, hop, starts):
    assert evaluate.windows([length], 3, hop)[1].tolist() == starts


def test_embed_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    encoder = model.build_encoder("samplecnn", width=WIDTH)
    x = torch.randn(7, 1, 59049)
    one = evaluate.embed(encoder.train(), x.split(1))
    seven = evaluate.embed(encoder, x.split(7), 7)
    assert torch.allclose(one, seven, rtol=1e-5, atol=1e-6)


def test_the_features_of_a_clip_are_the_mean_of_its_windows():
    data = Windows(torch.tensor([[1.0], [2.0], [6.0]]), torch.eye(3), np.array([4, 2, 4]))
    got = evaluate.by_clip(data)
    assert got.clip.tolist() == [2, 4]
    assert got.x.tolist() == [[2.0], [3.5]]
    assert got.y.tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares with a GPU; there is none here")
def test_metrics_do_not_depend_on_the_device():
    torch.manual_seed(0)
    encoder = model.build_encoder("samplecnn", width=WIDTH)
    x = torch.randn(6, 1, 59049)
    head = nn.Linear(encoder.out_dim, 3)
    labels = torch.eye(3).repeat(2, 1)[:4]
    clip = torch.tensor([0, 0, 1, 2, 3, 3])
    cpu = evaluate.clip_scores(head(evaluate.embed(encoder, x.split(2))), clip, 4)
    device = model.choose_device("cuda")  # float32, not TF32
    logits = head.to(device)(evaluate.embed(encoder.to(device), x.split(3)).to(device))
    gpu = evaluate.clip_scores(logits, clip.cuda(), 4)
    assert gpu == pytest.approx(cpu, abs=1e-4)
    on_cpu = evaluate.score(cpu, labels)
    on_gpu = evaluate.score(torch.from_numpy(cpu).cuda(), labels.cuda())
    assert {name: np.asarray(value).tolist() for name, value in on_gpu.items()} == {
        name: np.asarray(value).tolist() for name, value in on_cpu.items()}


@pytest.fixture(scope="module")
def tagged():
    """Labels (2000, 30), from a tag of 0.4 % to one of 30 %, and subsets of 2, 10, 50 and 100 %."""
    rng = np.random.default_rng(0)
    labels = (rng.random((2000, 30)) < np.geomspace(0.004, 0.3, 30)).astype(np.uint8)
    return labels, [evaluate.take_fraction(labels, f, seed=3) for f in (0.02, 0.1, 0.5, 1)]


def test_fractions_are_of_all_examples(tagged):
    assert [len(subset) for subset in tagged[1]] == [40, 200, 1000, 2000]


def test_fractions_of_a_seed_are_nested(tagged):
    for small, large in zip(tagged[1], tagged[1][1:]):
        assert set(small) < set(large)


def test_every_tag_keeps_a_positive_in_a_small_fraction(tagged):
    labels, subsets = tagged
    assert (labels[subsets[0]].sum(0) > 0).all()


def test_every_tag_keeps_its_share(tagged):
    labels, subsets = tagged
    off = abs(labels[subsets[2]].sum(0) - labels.sum(0) / 2)
    assert (off <= np.maximum(5, 0.05 * labels.sum(0))).all()


def test_a_fraction_has_as_many_tags_a_clip_as_all(tagged):
    labels, subsets = tagged
    assert abs(labels[subsets[2]].sum(1).mean() - labels.sum(1).mean()) < 0.05


def test_examples_without_a_tag_keep_their_share(tagged):
    labels, subsets = tagged
    none = ~labels.any(1)
    assert abs(none[subsets[2]].sum() / none.sum() - 0.5) < 0.1


def test_another_seed_takes_other_examples(tagged):
    labels, subsets = tagged
    assert set(evaluate.take_fraction(labels, 0.1, seed=4)) != set(subsets[1])


@pytest.mark.parametrize("bad", [0, 1.1, -1])
def test_a_fraction_outside_0_to_1_is_refused(bad):
    with pytest.raises(ValueError, match="label fraction"):
        evaluate.take_fraction(np.eye(4), bad)


def test_five_clips_serve_as_many_tags_as_they_can():
    labels = np.zeros((500, 20), np.uint8)
    for i in range(500):
        labels[i, [i % 20, (i + 5) % 20, (i + 10) % 20, (i + 15) % 20]] = 1
    # five clips of four tags: all twenty
    assert (labels[evaluate.take_fraction(labels, 0.01)].sum(0) == 1).all()


def test_fraction_v1_is_the_label_powerset_rule():
    combinations = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    labels = np.repeat(combinations, [1000, 250, 99, 1], 0)
    taken = labels[evaluate.take_fraction(labels, 0.01, mode="v1")]
    assert [int((taken == row).all(1).sum()) for row in combinations] == [10, 2, 1, 1]


# --------------------------------------------------------------------------------------- probes

@pytest.fixture(scope="module")
def problem():
    """Features of 3 tags: 600 windows to train on, 200 to validate on, two of each clip."""
    rng = torch.Generator().manual_seed(0)
    truth = torch.randn(16, 3, generator=rng)
    scale = torch.logspace(-1, 1, 16)
    x = torch.randn(800, 16, generator=rng) * scale + 3
    y = (((x - 3) / scale) @ truth + torch.randn(800, 3, generator=rng) > 1).byte()
    return (Windows(x[:600], y[:600], np.arange(600) // 2),
            Windows(x[600:], y[600:], np.arange(200) // 2))


def standardised(x, training):
    return ((x - training.x.mean(0)) / training.x.std(0)).numpy()


@pytest.mark.parametrize("k", range(3))
def test_lbfgs_probe_is_scikit_learns_optimum(problem, k):
    training, valid = problem
    probe, _ = evaluate.fit_lbfgs(training, valid, strengths=(0.1,))
    theirs = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000)
    theirs.fit(standardised(training.x, training), training.y[:, k])
    wanted = theirs.decision_function(standardised(valid.x, training))
    assert probe(valid.x)[:, k].detach().numpy() == pytest.approx(wanted, abs=2e-3)


def test_a_class_that_never_occurs_is_no_obstacle_to_the_lbfgs_probe(problem):
    training, _ = problem
    one = nn.functional.one_hot(training.y[:, 0].long() + training.y[:, 1].long(), 4)
    data = Windows(training.x, one, np.arange(600))
    probe, _ = evaluate.fit_lbfgs(data, data, "singlelabel", strengths=(1.0,))
    z = standardised(training.x, training)
    theirs = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000).fit(z, one.argmax(1))
    assert (probe(training.x).argmax(1).numpy() == theirs.predict(z)).mean() > 0.99


@pytest.fixture(scope="module")
def adam(problem):
    @functools.cache
    def fit(seed, again=False):
        return evaluate.fit_probe(*problem, protocol=Protocol(lr=1e-2, min_steps=20), seed=seed)
    return fit


def test_a_seed_gives_the_same_probe_again(adam):
    probe, again, other = adam(1)[0], adam(1, again=True)[0], adam(2)[0]
    assert all(torch.equal(a, b) for a, b in zip(probe.parameters(), again.parameters()))
    assert not torch.equal(probe[0].weight, other[0].weight)


def test_adam_comes_near_the_optimum(adam, problem):
    assert abs(adam(1)[1]["valid"] - evaluate.fit_lbfgs(*problem)[1]["valid"]) < 0.05


def test_training_stops_five_epochs_after_the_best(adam):
    _, info = adam(1)
    assert info["epochs"] == info["best_epoch"] + 5


def test_the_best_state_is_kept(adam, problem):
    probe, info = adam(1)
    valid = problem[1]
    value = evaluate.validation(probe(valid.x), valid.y, valid.clip, "multilabel")
    assert value[0] == pytest.approx(info["valid"], abs=1e-9)
    assert -value[1] == pytest.approx(info["valid_loss"], abs=1e-9)


def test_a_probe_with_a_hidden_layer(problem):
    protocol = Protocol(hidden=8, epochs=2, min_steps=1)
    probe, info = evaluate.fit_probe(*problem, protocol=protocol)
    assert [type(layer) for layer in probe] == [nn.Linear, nn.ReLU, nn.Linear]
    assert probe[0].out_features == 8
    assert info["epochs"] == 2


def test_a_loss_that_grows_without_bound_says_what_to_do(problem):
    training, valid = problem
    training = Windows(training.x * 1e30, training.y, training.clip)
    with pytest.raises(ValueError, match="smaller --lr"):
        evaluate.fit_probe(training, valid, protocol=Protocol(lr=1e30))


@pytest.fixture
def three_windows():
    """Logits of three windows and two tags, and the clip each window is of."""
    return torch.tensor([[0.0, 2.0], [4.0, 2.0], [-1.0, 1.0]]), torch.tensor([1, 1, 0])


def test_clip_scores_are_means_of_windows(three_windows):
    logits, clip = three_windows
    p = torch.sigmoid(logits).double()
    got = evaluate.clip_scores(logits, clip, 3)
    assert got[1] == pytest.approx(p[:2].mean(0).numpy(), abs=1e-7)
    assert got[0] == pytest.approx(p[2].numpy(), abs=1e-7)
    assert np.isnan(got[2]).all()  # it has no window


def test_clip_scores_of_single_labels_add_up_to_one(three_windows):
    assert evaluate.clip_scores(*three_windows, 2, "singlelabel").sum(1) == pytest.approx([1, 1])


def test_clip_scores_do_not_depend_on_the_order_of_windows(three_windows):
    logits, clip = three_windows
    order = torch.tensor([2, 0, 1])
    got = evaluate.clip_scores(logits[order], clip[order], 2)
    assert got == pytest.approx(evaluate.clip_scores(logits, clip, 2), abs=1e-12)


# ----------------------------------------------------------------------------------- neighbours

@pytest.fixture
def circle():
    """Eight clips in pairs, at four angles of a circle: features, labels, songs, artists. Artist a
    made both pairs to the right and above, b the others; the last clip's artist is not known."""
    angle = torch.tensor([0.0, 0.1, 1.5, 1.6, 3.1, 3.2, 4.7, 4.8])
    x = torch.stack([angle.cos(), angle.sin()], 1)
    labels = np.array([[1, 0], [1, 0], [1, 1], [0, 1], [1, 0], [1, 0], [0, 1], [0, 1]])
    return x, labels, np.arange(8), np.array(["a"] * 4 + ["b"] * 3 + [""])


def plain_neighbours(x, labels, song, artist, k):
    """The same by loops, one clip after another."""
    z = (x - x.mean(0)) / x.std(0)
    z = z / z.norm(dim=1, keepdim=True)
    shared, found = [], []
    for i in range(len(z)):
        near = (z @ z[i]).argsort(descending=True).tolist()
        same = [j for j in near if j != i and artist[j] == artist[i] != ""]
        others = [j for j in near if j != i and j not in same][:k]
        both = [(labels[i] & labels[j]).sum() for j in others]
        either = [max(1, (labels[i] | labels[j]).sum()) for j in others]
        shared.append(np.mean(np.divide(both, either)))
        nearest = [j for j in near if song[j] != song[i]][:k]
        found.append(np.mean([j in nearest for j in same]) if same else np.nan)
    return {"labels": shared, "artist": found}


@pytest.mark.parametrize("k", [1, 3, 20])
def test_neighbours_equal_those_of_a_loop(circle, k):
    got = neighbours.neighbours(*circle, k)
    for name, wanted in plain_neighbours(*circle, k).items():
        assert np.allclose(got[name], wanted, atol=1e-6, equal_nan=True), name


def test_neighbours_of_single_labels_are_of_the_same_class_or_not(circle):
    x, _, song, _ = circle
    classes = np.eye(2, dtype=int)[[0, 0, 0, 0, 1, 1, 1, 1]]
    got = neighbours.neighbours(x, classes, song, np.full(8, ""), 1)
    assert set(got["labels"]) <= {0.0, 1.0}
    assert np.isnan(got["artist"]).all()


def test_clips_of_a_song_are_not_each_others_neighbours(circle):
    x, labels, _, _ = circle
    got = neighbours.neighbours(x, labels, np.arange(8) // 2, np.full(8, ""), 1)
    alone = neighbours.neighbours(x, labels, np.arange(8), np.full(8, ""), 1)
    assert alone["labels"][0] == 1.0  # the other of its pair
    assert got["labels"][0] != alone["labels"][0]
