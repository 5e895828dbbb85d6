"""evaluate.py: metrics against scikit-learn, windows and fractions at their edges, probes, the commands as a user runs them."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn

import evaluate
import model
import prepare
from conftest import ROOT

torch.set_num_threads(1)
FEW = ["--min-steps", "5", "--epochs", "8", "--bootstrap", "60"]  # a probe need not be good to be tested
WIDTH = 1 / 16  # an encoder that is fast, and whose numbers mean nothing


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_data):
    torch.manual_seed(99)  # not the control's seed
    path = tmp_path_factory.mktemp("run") / "encoder.pt"
    clips = prepare.Clips(tiny_data)
    model.save_encoder(path, model.build_encoder("samplecnn", width=WIDTH), sample_rate=22050, method="clmr", step=7,
                       data=str(tiny_data), fingerprint=clips.fingerprint)
    (path.parent / "log.jsonl").touch()  # a run's folder
    return path


@pytest.fixture(scope="module")
def evaluated(run, checkpoint):
    """One evaluation as a user runs it: the checkpoint beside the untrained control, two fractions, two seeds."""
    done = run(["evaluate.py", "--ckpt", checkpoint, "--random", "--fraction", "0.5", "1", "--seeds", "2", *FEW])
    assert done.returncode == 0, done.stderr
    out = next(checkpoint.parent.glob("evaluate-*.json"))
    return json.loads(out.read_text()), done, out


# ------------------------------------------------------------------------------------------------------------- metrics

def oracle(scores, labels):
    keep = [k for k in range(labels.shape[1]) if 0 < labels[:, k].sum() < len(labels)]
    return (np.mean([roc_auc_score(labels[:, k], scores[:, k]) for k in keep]),
            np.mean([average_precision_score(labels[:, k], scores[:, k]) for k in keep]), labels.shape[1] - len(keep))


@pytest.mark.parametrize("levels", [2, 7, 10**6])  # nearly all tied, many ties, none
def test_metrics_equal_scikit_learn(levels):
    rng = np.random.default_rng(levels)
    scores, labels = rng.integers(0, levels, (400, 20)) / levels, (rng.random((400, 20)) < rng.random(20) ** 3).astype(np.uint8)
    labels[:, 3], labels[:, 5] = 0, 1  # no positive, no negative
    got = evaluate.score(scores, labels)
    roc, pr, left_out = oracle(scores, labels)
    assert got["roc_auc"] == pytest.approx(roc, abs=1e-12) and got["pr_auc"] == pytest.approx(pr, abs=1e-12)
    assert got["tags_left_out"] == left_out >= 2 and np.isnan(got["tag"][[3, 5]]).all()
    labels[7], labels[9] = 0, 1
    got = evaluate.score(scores, labels)
    roc, pr, left_out = oracle(scores.T, labels.T)
    assert got["clip_roc_auc"] == pytest.approx(roc, abs=1e-12) and got["clip_pr_auc"] == pytest.approx(pr, abs=1e-12)
    assert got["clips_left_out"] == left_out >= 2


def test_weighted_metrics_equal_scikit_learn():
    rng = np.random.default_rng(0)
    scores, labels, weights = rng.integers(0, 9, 60) / 9, rng.integers(0, 2, 60), rng.integers(0, 3, (5, 60))
    roc, pr = evaluate.rank_metrics(scores[None], labels[None], weights)
    for b in range(5):
        assert roc[b] == pytest.approx(roc_auc_score(labels, scores, sample_weight=weights[b]), abs=1e-12)
        assert pr[b] == pytest.approx(average_precision_score(labels, scores, sample_weight=weights[b]), abs=1e-12)


def test_metrics_large_and_independent_of_order():
    rng = np.random.default_rng(1)
    scores, labels = rng.random((100_000, 50)).astype(np.float32), rng.random((100_000, 50)) < 0.02
    got, order = evaluate.score(scores, labels), rng.permutation(100_000)
    for k in (0, 49):
        assert got["tag_roc_auc"][k] == pytest.approx(roc_auc_score(labels[:, k], scores[:, k]), abs=1e-12)
        assert got["tag"][k] == pytest.approx(average_precision_score(labels[:, k], scores[:, k]), abs=1e-12)
    again = evaluate.score(scores[order], labels[order])
    assert again["roc_auc"] == pytest.approx(got["roc_auc"], abs=1e-12) and again["clip_pr_auc"] == pytest.approx(got["clip_pr_auc"], abs=1e-12)


def test_metrics_at_the_edges():
    one = evaluate.score([[0.9, 0.1, 0.4]], [[1, 0, 0]])  # one clip: no tag has both, the clip does
    assert np.isnan(one["roc_auc"]) and one["tags_left_out"] == 3 and one["clip_roc_auc"] == 1.0
    assert evaluate.score(np.zeros((4, 1)), [[1], [0], [1], [0]])["roc_auc"] == 0.5
    only = evaluate.score(np.ones((3, 1)), np.ones((3, 1), int), "singlelabel")  # one class
    assert only["accuracy"] == 1.0 and only["confusion"].tolist() == [[3]]
    with pytest.raises(ValueError, match="1 of 3 clips have NaN scores"):
        evaluate.score([[0.1, 0.2], [np.nan, 0.3], [0.4, 0.5]], np.eye(3)[:, :2])
    with pytest.raises(ValueError, match="one shape"):
        evaluate.score(np.zeros((3, 2)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="one shape"):
        evaluate.score(np.zeros((0, 2)), np.zeros((0, 2)))


def test_single_label_score():
    labels = np.eye(3, dtype=int)[[0, 0, 1, 1]]
    got = evaluate.score(np.eye(3)[[0, 1, 1, 2]], labels, "singlelabel")
    assert got["accuracy"] == 0.5 and got["confusion"].tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert got["tag"][:2].tolist() == [0.5, 0.5] and np.isnan(got["tag"][2])


def test_bootstrap_keeps_songs_together_and_covers():
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 4)) < 0.4).astype(np.uint8)
    scores = labels + rng.normal(0, 1, (60, 4))
    draws = evaluate.bootstrap([scores, scores], labels, np.arange(60), n=300)
    point = evaluate.score(scores, labels)
    for name in ("roc_auc", "pr_auc", "clip_roc_auc", "clip_pr_auc"):
        low, high = evaluate.interval(draws[name], point[name])
        assert low < point[name] < high and high - low < 0.4
    # every clip doubled: as many songs, so the same interval; taken for songs of their own, a narrower one
    twice = [np.repeat(a, 2, 0) for a in (scores, labels, np.arange(60))]
    same = evaluate.bootstrap(twice[:1], *twice[1:], n=300)["roc_auc"]
    assert same == pytest.approx(draws["roc_auc"], abs=1e-12)
    assert evaluate.bootstrap(twice[:1], twice[1], np.arange(120), n=300)["roc_auc"].std() < 0.85 * same.std()
    single = evaluate.bootstrap([np.eye(4)[[0, 1, 2, 3]]], np.eye(4, dtype=int), np.arange(4), "singlelabel", n=10)
    assert (single["accuracy"] == 1).all()


# -------------------------------------------------------------------------------------------------- windows, fractions

@pytest.mark.parametrize("length,hop,starts", [
    (9, None, [0, 3, 6]), (8, None, [0, 3]), (2, None, []), (3, None, [0]), (0, None, []), (7, 2, [0, 2, 4]), (6, 2, [0, 2])])
def test_windows_at_the_edges(length, hop, starts):
    assert evaluate.windows([length], 3, hop)[1].tolist() == starts


def test_embed_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    encoder, x = model.build_encoder("samplecnn", width=WIDTH), torch.randn(7, 1, 59049)
    one, seven = evaluate.embed(encoder.train(), x.split(1)), evaluate.embed(encoder, x.split(7))
    assert torch.allclose(one, seven, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares with a GPU; there is none here")
def test_metrics_do_not_depend_on_the_device():
    torch.manual_seed(0)
    encoder, x = model.build_encoder("samplecnn", width=WIDTH), torch.randn(6, 1, 59049)
    head, labels, clip = nn.Linear(encoder.out_dim, 3), torch.eye(3).repeat(2, 1)[:4], torch.tensor([0, 0, 1, 2, 3, 3])
    cpu = evaluate.clip_scores(head(evaluate.embed(encoder, x.split(2))), clip, 4)
    device = model.choose_device("cuda")  # float32, not TF32
    logits = head.to(device)(evaluate.embed(encoder.to(device), x.split(3)).to(device))
    gpu = evaluate.clip_scores(logits, clip.cuda(), 4)
    assert gpu == pytest.approx(cpu, abs=1e-4)
    on_cpu, on_gpu = evaluate.score(cpu, labels), evaluate.score(torch.from_numpy(cpu).cuda(), labels.cuda())
    assert {k: np.asarray(v).tolist() for k, v in on_gpu.items()} == {k: np.asarray(v).tolist() for k, v in on_cpu.items()}


def test_fractions_are_nested_balanced_and_seeded():
    rng = np.random.default_rng(0)
    labels = (rng.random((2000, 30)) < np.geomspace(0.004, 0.3, 30)).astype(np.uint8)
    subsets = [evaluate.take_fraction(labels, f, seed=3) for f in (0.02, 0.1, 0.5, 1)]
    assert [len(s) for s in subsets] == [40, 200, 1000, 2000]
    for small, large in zip(subsets, subsets[1:]):
        assert set(small) < set(large)
    assert (labels[subsets[0]].sum(0) > 0).all()  # every tag keeps a positive in 2 % of the clips
    assert (abs(labels[subsets[2]].sum(0) - labels.sum(0) / 2) <= np.maximum(5, 0.05 * labels.sum(0))).all()
    assert abs(labels[subsets[2]].sum(1).mean() - labels.sum(1).mean()) < 0.05  # not more tags per clip than all have
    none = ~labels.any(1)
    assert abs(none[subsets[2]].sum() / none.sum() - 0.5) < 0.1
    assert set(evaluate.take_fraction(labels, 0.1, seed=4)) != set(subsets[1])
    for bad in (0, 1.1, -1):
        with pytest.raises(ValueError, match="label fraction"):
            evaluate.take_fraction(labels, bad)


def test_five_clips_serve_as_many_tags_as_they_can():
    labels = np.zeros((500, 20), np.uint8)
    for i in range(500):
        labels[i, [i % 20, (i + 5) % 20, (i + 10) % 20, (i + 15) % 20]] = 1
    assert (labels[evaluate.take_fraction(labels, 0.01)].sum(0) == 1).all()  # five clips of four tags: all twenty


def test_fraction_v1_is_the_label_powerset_rule():
    labels = np.repeat(np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), [1000, 250, 99, 1], 0)
    kept = labels[evaluate.take_fraction(labels, 0.01, mode="v1")]
    assert [int((kept == row).all(1).sum()) for row in ([0, 0], [0, 1], [1, 0], [1, 1])] == [10, 2, 1, 1]


# -------------------------------------------------------------------------------------------------------------- probes

@pytest.fixture(scope="module")
def problem():
    """Features of 3 tags: 600 training and 200 validation windows, two per clip."""
    rng = torch.Generator().manual_seed(0)
    truth = torch.randn(16, 3, generator=rng)
    x = torch.randn(800, 16, generator=rng) * torch.logspace(-1, 1, 16) + 3
    y = (((x - 3) / torch.logspace(-1, 1, 16)) @ truth + torch.randn(800, 3, generator=rng) > 1).byte()
    return x[:600], y[:600], x[600:], y[600:], np.arange(200) // 2


def test_lbfgs_probe_is_scikit_learns_optimum(problem):
    x, y, valid_x, valid_y, clip = problem
    probe, _ = evaluate.fit_lbfgs(*problem, strengths=(0.1,))
    z = ((x - x.mean(0)) / x.std(0)).numpy()
    for k in range(3):
        want = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000).fit(z, y[:, k]).decision_function(((valid_x - x.mean(0)) / x.std(0)).numpy())
        assert probe(valid_x)[:, k].detach().numpy() == pytest.approx(want, abs=2e-3)
    one = torch.nn.functional.one_hot(y[:, 0].long() + y[:, 1].long(), 4)  # a class that never occurs is no obstacle
    probe, _ = evaluate.fit_lbfgs(x, one, x, one, np.arange(600), "singlelabel", strengths=(1.0,))
    want = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000).fit(z, one.argmax(1))
    assert (probe(x).argmax(1).numpy() == want.predict(z)).mean() > 0.99


def test_adam_probe_learns_keeps_the_best_and_repeats(problem):
    lbfgs = evaluate.fit_lbfgs(*problem)[1]["valid"]
    probe, info = evaluate.fit_probe(*problem, lr=1e-2, min_steps=20, seed=1)
    again, _ = evaluate.fit_probe(*problem, lr=1e-2, min_steps=20, seed=1)
    other, _ = evaluate.fit_probe(*problem, lr=1e-2, min_steps=20, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(probe.parameters(), again.parameters()))
    assert not torch.equal(probe[0].weight, other[0].weight)
    assert info["epochs"] == info["best_epoch"] + 5 and abs(info["valid"] - lbfgs) < 0.05
    value = evaluate.validation(probe(problem[2]), problem[3].float(), problem[4], "multilabel")
    assert value[0] == pytest.approx(info["valid"], abs=1e-9) and -value[1] == pytest.approx(info["valid_loss"], abs=1e-9)


def test_hidden_probe_and_end_of_epochs(problem):
    probe, info = evaluate.fit_probe(*problem, hidden=8, epochs=2, min_steps=1)
    assert [type(layer) for layer in probe] == [nn.Linear, nn.ReLU, nn.Linear] and probe[0].out_features == 8
    assert info["epochs"] == 2
    with pytest.raises(ValueError, match="smaller --lr"):
        evaluate.fit_probe(problem[0] * 1e30, *problem[1:], lr=1e30)


def test_clip_scores_are_means_of_windows():
    logits, clip = torch.tensor([[0.0, 2.0], [4.0, 2.0], [-1.0, 1.0]]), [1, 1, 0]
    p = torch.sigmoid(logits).double()
    got = evaluate.clip_scores(logits, clip, 3)
    assert got[1] == pytest.approx(p[:2].mean(0).numpy(), abs=1e-7) and got[0] == pytest.approx(p[2].numpy(), abs=1e-7) and np.isnan(got[2]).all()
    assert evaluate.clip_scores(logits, clip, 2, clip_score="logit")[1] == pytest.approx(torch.sigmoid(torch.tensor([2.0, 2.0])).numpy(), abs=1e-7)
    assert evaluate.clip_scores(logits, clip, 2, "singlelabel").sum(1) == pytest.approx([1, 1])
    order = torch.tensor([2, 0, 1])
    assert evaluate.clip_scores(logits[order], torch.tensor(clip)[order], 2) == pytest.approx(got[:2], abs=1e-12)
    asked = evaluate.score(logits[:2].requires_grad_(), torch.eye(2))  # tensors, with or without a graph, do as well as arrays
    assert asked["roc_auc"] == evaluate.score(logits[:2].detach().numpy(), np.eye(2))["roc_auc"]


# ------------------------------------------------------------------------------------------------------------ commands

def test_result_explains_itself(evaluated, tiny_data, checkpoint):
    result, done, _ = evaluated
    clips = prepare.Clips(tiny_data)
    assert result["data"]["fingerprint"] == clips.fingerprint and result["data"]["split"] == clips.meta["split_name"]
    assert [result["data"]["counts"][s]["clips"] for s in ("train", "valid", "test")] == [12, 6, 6]
    assert result["data"]["counts"]["train"]["windows"] == int((clips.length[clips.split == 0] // 59049).sum())
    assert result["argv"][0] == "evaluate.py" and result["versions"]["torch"] == torch.__version__
    assert result["encoder"]["unchanged"] and result["encoder"]["sha256"][0] == model.weights_sha256(model.load_encoder(checkpoint)[0])
    assert [(r["model"], r["fraction"]) for r in result["results"]] == [
        ("clmr, 7 steps", 0.5), ("clmr, 7 steps", 1), ("untrained", 0.5), ("untrained", 1)]
    half, full, control, _ = result["results"]
    assert [run["seed"] for run in full["runs"]] == [0, 1] and [run["clips"] for run in half["runs"]] == [6, 6]
    assert full["mean"]["pr_auc"] == pytest.approx(np.mean([run["pr_auc"] for run in full["runs"]]), abs=2e-6)
    assert full["std"]["pr_auc"] == pytest.approx(np.std([run["pr_auc"] for run in full["runs"]], ddof=1), abs=2e-6)
    assert list(full["per_tag"]) == clips.tags and full["interval"]["roc_auc"][0] < full["interval"]["roc_auc"][1]
    assert half["over_untrained"]["roc_auc"]["mean"] == pytest.approx(half["mean"]["roc_auc"] - control["mean"]["roc_auc"], abs=2e-6)
    assert "Traceback" not in done.stderr and "| clmr, 7 steps | linear | 50 % (6 clips) |" in done.stdout


def test_metrics_do_not_depend_on_the_cache(evaluated, checkpoint, tiny_data, tmp_path):
    cached = list((tiny_data / "features").glob("*.npz"))
    assert len(cached) >= 2  # the encoder, the control, and whatever else was evaluated on these data
    for file in cached:
        file.write_bytes(b"no features")
    for _ in range(2):  # computed again, then read
        assert evaluate.main(["--ckpt", str(checkpoint), "--seeds", "2", *FEW, "--out", str(tmp_path / "again.json"),
                              "--export", str(tmp_path)]) == 0
        again = json.loads((tmp_path / "again.json").read_text())["results"][0]
        assert again["mean"] == evaluated[0]["results"][1]["mean"] and again["interval"] == evaluated[0]["results"][1]["interval"]


def test_exports_work_without_this_repository(evaluated, checkpoint, tiny_data, run, tmp_path):
    clips = prepare.Clips(tiny_data)
    script = ("import sys, torch; m = torch.jit.load(sys.argv[1]); x = torch.load(sys.argv[2]); "
              "torch.save((m(x), m.frames(x, 59049)), sys.argv[3]); print(m.sample_rate, m.input_samples, list(getattr(m, 'tags', [])))")
    i = int(clips.length.argmax())
    torch.save(clips.waveform(i)[None, None], tmp_path / "x.pt")
    for name in ("encoder.ts", "tagger.ts"):
        done = run(["-c", script, checkpoint.parent / name, tmp_path / "x.pt", tmp_path / "y.pt"], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        got, frames = torch.load(tmp_path / "y.pt")
        x = clips.crops([i] * frames.shape[1], np.arange(frames.shape[1]) * 59049, 59049)
        h = evaluate.embed(model.load_encoder(checkpoint)[0], x.split(4))
        if name == "encoder.ts":
            assert torch.allclose(got[0], h.mean(0), rtol=1e-4, atol=1e-5)
        else:
            assert got.shape == (1, 4) and 0 < got.min() and got.max() < 1 and str(clips.tags) in done.stdout
        assert json.loads((checkpoint.parent / f"{name}.json").read_text())["data"] == clips.name
    assert (checkpoint.parent / "encoder.pt2").is_file()


def test_single_label_hidden_and_lbfgs(checkpoint, tiny_single, tmp_path):
    for flags, probe in ((["--hidden", "16"], "hidden 16"), (["--probe", "lbfgs", "--clip-score", "logit"], "lbfgs")):
        assert evaluate.main(["--ckpt", str(checkpoint), "--data", str(tiny_single), "--seeds", "1", *FEW, *flags,
                              "--out", str(tmp_path / "single.json"), "--export", str(tmp_path)]) == 0
        result = json.loads((tmp_path / "single.json").read_text())["results"][0]
        assert result["probe"] == probe and np.sum(result["runs"][0]["confusion"]) == 6 and result["std"]["accuracy"] is None
        assert result["mean"]["accuracy"] == pytest.approx(np.trace(result["runs"][0]["confusion"]) / 6, abs=1e-6)


def test_a_second_evaluation_leaves_what_the_first_left(checkpoint, evaluated):
    folder, kept = checkpoint.parent, evaluated[2].read_bytes()
    tagger = (folder / "tagger.ts").read_bytes()
    assert evaluate.main(["--ckpt", str(checkpoint), "--probe", "lbfgs", "--fraction", "0.5", "--seeds", "2", "--bootstrap", "20"]) == 0
    assert (folder / "tagger.ts").read_bytes() == tagger and evaluated[2].read_bytes() == kept
    name = f"evaluate-{evaluated[0]['data']['name']}-lbfgs-f0.5"
    second = json.loads((folder / f"{name}.json").read_text())
    assert second["results"][0]["std"]["pr_auc"] is not None  # of two halves
    assert evaluate.main(["--ckpt", str(checkpoint), "--probe", "lbfgs", "--fraction", "0.5", "--clip-score", "logit", "--fraction-mode", "v1",
                          "--seeds", "1", "--bootstrap", "20"]) == 0
    assert json.loads((folder / f"{name}.json").read_text()) == second
    assert json.loads((folder / f"{name}-fraction-mode-v1-clip-score-logit.json").read_text())["protocol"]["clip_score"] == "logit"


def test_by_default_the_data_that_the_encoder_was_trained_on():
    folders = {"/disk/a": SimpleNamespace(fingerprint="1"), "a": SimpleNamespace(fingerprint="2"), "b": SimpleNamespace(fingerprint="3")}

    def load(name):
        if name not in folders:
            raise FileNotFoundError(f"{name}: not prepared")
        return folders[name]
    for info, name, want in (
            ({"data": "a", "data_folder": "/disk/a", "fingerprint": "1"}, None, "/disk/a"),
            ({"data": "a", "data_folder": "/gone/a", "fingerprint": "2"}, None, "a"),
            ({"data": "b", "data_folder": "/disk/a", "fingerprint": "3"}, None, "b"),  # another set stands there now
            ({"data": "a", "data_folder": "/disk/a", "fingerprint": "0"}, None, "/disk/a"),
            ({"data": "a", "fingerprint": "2"}, "b", "b")):
        assert evaluate.trained_on(info, load, name) is folders[want]
    with pytest.raises(FileNotFoundError, match="gone: not prepared"):
        evaluate.trained_on({"data": "gone"}, load)


def test_the_optimum_has_no_deviation_over_seeds(checkpoint, tmp_path):
    assert evaluate.main(["--ckpt", str(checkpoint), "--probe", "lbfgs", "--seeds", "2", "--bootstrap", "20", "--out", str(tmp_path / "e.json"),
                          "--export", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["results"][0]["std"]["pr_auc"] is None


@pytest.mark.parametrize("prefix,wrap,hidden", [("", False, 0), ("model.", True, 6), ("module.model.", True, 0)])
def test_probes_of_the_authors(prefix, wrap, hidden, problem, tmp_path):
    torch.manual_seed(0)
    probe = nn.Sequential(*([nn.Linear(16, 6), nn.ReLU()] if hidden else []), nn.Linear(hidden or 16, 3))
    state = {prefix + key: value for key, value in probe.state_dict().items()}
    torch.save({"state_dict": {"encoder.fc.weight": torch.zeros(3, 3), **state}, "epoch": 3} if wrap else state, tmp_path / "p.pt")
    got, info = evaluate.load_probe(tmp_path / "p.pt")(*problem, "multilabel", seed=0)
    assert torch.equal(got(problem[2]), probe(problem[2])) and 0 < info["valid"] < 1
    with pytest.raises(ValueError, match="is no probe from 8 features to 3 tags"):
        evaluate.load_probe(tmp_path / "p.pt")(problem[0][:, :8], *problem[1:], "multilabel", seed=0)
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match="is no probe"):
        evaluate.load_probe(tmp_path / "none.pt")(*problem, "multilabel", seed=0)


def test_a_trained_head_is_used_as_it_is(checkpoint, tiny_data, tmp_path, capsys):
    probe = nn.Sequential(nn.Linear(32, 4))
    torch.save(probe.state_dict(), tmp_path / "head.pt")
    assert evaluate.main(["--ckpt", str(checkpoint), "--head", str(tmp_path / "head.pt"), "--seeds", "1", "--bootstrap", "20",
                          "--out", str(tmp_path / "h.json"), "--export", str(tmp_path)]) == 0
    clips = prepare.Clips(tiny_data)
    clip, start = evaluate.windows(clips.length, 59049)
    h = evaluate.embed(model.load_encoder(checkpoint)[0], clips.crops(clip, start, 59049).split(8))
    test = clips.split == 2
    want = evaluate.score(evaluate.clip_scores(probe(h), clip, len(clips))[test], clips.labels[test])
    assert json.loads((tmp_path / "h.json").read_text())["results"][0]["mean"]["pr_auc"] == pytest.approx(want["pr_auc"], abs=2e-6)

    torch.save({"state_dict": probe.state_dict(), "callbacks": {SimpleNamespace: SimpleNamespace(best=1)}}, tmp_path / "lightning.pt")
    read = evaluate.load_probe(tmp_path / "lightning.pt", model.read_checkpoint)(h, torch.rand(len(h), 4), h, torch.eye(4)[clip % 4], clip, "multilabel")
    assert torch.equal(read[0](h), probe(h))  # with classes of its own beside the weights
    for content in (b"no probe", b""):
        (tmp_path / "bad.pt").write_bytes(content)
        assert evaluate.main(["--ckpt", str(checkpoint), "--head", str(tmp_path / "bad.pt"), "--out", str(tmp_path / "h.json")]) == 1
        assert "cannot be read as a checkpoint" in capsys.readouterr().err


def test_supervised_and_finetuned(run, checkpoint, tiny_data, tmp_path):
    done = run(["evaluate.py", "--ckpt", checkpoint, "--supervised", "--finetune", "--fraction", "0.5", "--seeds", "1", *FEW, "--epochs", "2",
                "--batch-size", "4", "--out", tmp_path / "e.json", "--export", tmp_path])
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "e.json").read_text())
    assert [(r["model"], r["probe"]) for r in result["results"]] == [
        ("clmr, 7 steps", "linear"), ("supervised", "end to end"), ("fine-tuned", "end to end")]
    assert all(r["runs"][0]["epochs"] <= 2 and 0 <= r["mean"]["roc_auc"] <= 1 for r in result["results"])
    assert result["encoder"]["unchanged"]  # fine-tuning works on a copy


def test_network_learns_what_can_be_heard(tiny_data):
    clips = prepare.Clips(tiny_data)
    rows, _ = evaluate.usable(clips, 59049)

    def build(seed):
        torch.manual_seed(seed)
        return model.build_encoder("samplecnn", width=WIDTH)
    fit = evaluate.network_on(build, clips, rows, batch_size=6, lr=3e-3, epochs=12, patience=12)
    clip, _ = evaluate.windows(clips.length, 59049)
    _, info, logits = fit(rows["train"], 0)
    assert logits.shape == (len(rows["test"]), 4) and info["valid"] > 0.6


def test_what_is_not_for_a_file_is_never_turned_into_text():
    class Large:
        def tolist(self):
            pytest.fail("gigabytes of features became text")
    result = {"_features": [Large()], "a": [{"_draws": Large(), "b": np.array([1 / 3, np.nan])}], "c": (np.float64(2), Path("d"))}
    assert json.loads(evaluate.to_json(result)) == {"a": [{"b": [0.333333, None]}], "c": [2.0, "d"]}


# rate, channels, seconds, format; the last has more blocks than are kept from the first pass
@pytest.mark.parametrize("name,rate,channels,seconds,options", [
    ("a.wav", 44100, 2, 50, {"subtype": "FLOAT"}), ("a.mp3", 44100, 2, 50, {}), ("a.flac", 48000, 1, 50, {}), ("a.wav", 22050, 1, 100, {}),
    ("a.wav", 8000, 2, 3, {}), ("a.wav", 44099, 1, 50, {}), ("a.wav", 44100, 1, 0.0002, {}), ("a.wav", 192000, 1, 95, {"subtype": "PCM_U8"})])
def test_a_file_in_pieces_is_the_file(name, rate, channels, seconds, options, tmp_path):
    rng, n = np.random.default_rng(0), round(rate * seconds)
    x = rng.normal(0, 0.3, (n, channels)) if n < 1 << 23 else np.tile(rng.normal(0, 0.3, (rate, 1)), (round(seconds), 1))
    soundfile.write(tmp_path / name, x if name == "a.wav" else x.clip(-1, 1), rate, **options)  # some overshoot full scale
    whole, pieces = prepare.decode(tmp_path / name, 22050), list(prepare.stream(tmp_path / name, 22050))
    got = torch.cat(pieces)
    assert abs(len(got) - len(whole)) <= (64 if rate == 44099 else 0) and len(pieces) > n >> 20
    assert torch.allclose(got[: len(whole)], whole[: len(got)], atol=1e-6) and got.abs().max() <= 1


def test_a_broken_file_gives_no_piece(tmp_path):
    x = np.zeros(1 << 22, np.float32)
    x[-1] = np.nan
    soundfile.write(tmp_path / "nan.wav", x, 44100, subtype="FLOAT")
    with pytest.raises(ValueError, match="1 of 4194304 samples are NaN"):
        next(prepare.stream(tmp_path / "nan.wav"))


@pytest.mark.parametrize("hop", [None, 0.5, 2, 6.1])
def test_windows_of_pieces_are_windows_of_the_whole(hop):
    torch.manual_seed(0)
    net, x = model.Exported(model.build_encoder("samplecnn", width=WIDTH).eval(), 22050), torch.randn(500_000)
    step = 59049 if hop is None else round(hop * 22050)
    with torch.no_grad():
        want = net.frames(x[None, None], step)[0].numpy()
    for size in (30_000, 100_001, 500_000):
        rows, starts, short = evaluate.frames(net, x.split(size), hop)
        assert np.allclose(rows, want, rtol=1e-5, atol=1e-6) and not short
        assert starts.tolist() == (np.arange(len(want)) * step / 22050).tolist()
    rows, starts, short = evaluate.frames(net, x[:50_000].split(7_000), hop)
    assert rows.shape == (1, 32) and starts.tolist() == [0] and short


def test_memory_does_not_grow_with_the_length_of_a_file(run, checkpoint, tmp_path):
    script = ("import resource, sys, evaluate; assert evaluate.main(sys.argv[1:]) == 0; "
              "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)")
    minute, peak = np.random.default_rng(0).normal(0, 0.1, (60 * 44100, 2)).astype(np.float32), {}
    for minutes in (1, 20):
        with soundfile.SoundFile(tmp_path / f"{minutes}.wav", "w", 44100, 2, subtype="PCM_U8") as file:
            for _ in range(minutes):
                file.write(minute)
        done = run(["-c", script, "--ckpt", checkpoint, "--embed", tmp_path / f"{minutes}.wav", "--out", tmp_path, "--device", "cpu"])
        assert done.returncode == 0, done.stderr
        peak[minutes] = int(done.stdout.splitlines()[-1])
    assert peak[20] < peak[1] + 100, peak  # MiB; 20 minutes are 200 MiB of mono samples, decoded
    assert np.load(tmp_path / "20.wav.npz")["embedding"].shape == (20 * 60 * 22050 // 59049, 32)


def test_embed_files(run, checkpoint, evaluated, tiny_audio, tmp_path, capsys):
    sounds = tmp_path / "my songs"
    (sounds / "sub").mkdir(parents=True)
    shutil.copy(tiny_audio / "song 00.flac", sounds / "sub" / "söng.flac")
    rng = np.random.default_rng(0)
    soundfile.write(sounds / "stereo.wav", rng.normal(0, 0.1, (44100 * 9, 2)), 44100)
    soundfile.write(sounds / "short.wav", rng.normal(0, 0.1, 8000), 8000)
    command = ["evaluate.py", "--ckpt", checkpoint, "--embed", sounds, tiny_audio / "song 01.flac", "--out", tmp_path / "e", "--hop", "1"]
    done = run(command)
    assert done.returncode == 0 and "short.wav.npz (1, 32), shorter than a window, padded" in done.stdout, done.stdout + done.stderr
    got = np.load(tmp_path / "e" / "stereo.wav.npz")
    n = (9 * 22050 - 59049) // 22050 + 1
    assert got["embedding"].shape == (n, 32) and got["embedding"].dtype == np.float32 and got["timestamps"].tolist() == list(range(n))
    waveform = prepare.decode(sounds / "stereo.wav", 22050)
    want = evaluate.embed(model.load_encoder(checkpoint)[0], waveform.unfold(0, 59049, 22050)[:, None].split(2))
    assert np.allclose(got["embedding"], want, rtol=1e-4, atol=1e-5)
    assert np.load(tmp_path / "e" / "short.wav.npz")["embedding"].shape == (1, 32)
    assert (tmp_path / "e" / "sub" / "söng.flac.npz").is_file() and (tmp_path / "e" / "song 01.flac.npz").is_file()

    (sounds / "broken.mp3").write_bytes(b"no audio")
    before = (tmp_path / "e" / "stereo.wav.npz").stat().st_mtime_ns
    command = [str(part) for part in command[1:]]
    assert evaluate.main(command) == 1
    assert "4 of 5 files embedded, 4 of them before\nfailed: " in (said := capsys.readouterr().out) and "broken.mp3" in said
    assert (tmp_path / "e" / "stereo.wav.npz").stat().st_mtime_ns == before
    assert evaluate.main([*command[:-1], "2"]) == 1  # what is there is not what is asked for: neither kept nor replaced in silence
    assert "0 of 5 files embedded" in (said := capsys.readouterr().out) and "of another recording, encoder, --hop or --pool" in said
    assert (tmp_path / "e" / "stereo.wav.npz").stat().st_mtime_ns == before
    for damaged in (b"PK cut off", b""):
        (tmp_path / "e" / "short.wav.npz").write_bytes(damaged)
        assert evaluate.main(command) == 1 and "3 of 5 files embedded" in (said := capsys.readouterr().out)
        assert "short.wav.npz is damaged, or of another recording" in said
    assert evaluate.main([*command, "--overwrite"]) == 1
    assert (tmp_path / "e" / "stereo.wav.npz").stat().st_mtime_ns != before
    wav = str(sounds / "stereo.wav")
    assert evaluate.main(["--ckpt", str(checkpoint.parent / "encoder.ts"), "--embed", wav, "--out", str(tmp_path / "ts"), "--hop", "1"]) == 0
    assert np.allclose(np.load(tmp_path / "ts" / "stereo.wav.npz")["embedding"], got["embedding"], rtol=1e-4, atol=1e-5)
    soundfile.write(wav, rng.normal(0, 0.1, (44100 * 9, 2)), 44100)  # another recording of as many bytes
    assert evaluate.main(command) == 1 and "stereo.wav.npz is damaged, or of another recording" in capsys.readouterr().out
    other = str(shutil.copytree(sounds, tmp_path / "b") / "stereo.wav")
    assert evaluate.main(["--ckpt", str(checkpoint), "--embed", wav, other, "--out", str(tmp_path / "c")]) == 1
    assert "would both become" in capsys.readouterr().err


def test_another_pooling_does_not_pass_for_the_first(tiny_audio, tmp_path, capsys):
    model.save_encoder(tmp_path / "cpc.pt", model.build_encoder("cpc", width=1 / 64), sample_rate=22050, method="cpc", step=1)
    command = ["--ckpt", str(tmp_path / "cpc.pt"), "--embed", str(tiny_audio / "song 01.flac"), "--out", str(tmp_path)]
    assert evaluate.main(command) == 0 and evaluate.main([*command, "--pool", "mean+last"]) == 1
    assert "of another recording, encoder, --hop or --pool" in capsys.readouterr().out
    assert evaluate.main([*command, "--pool", "mean+last", "--overwrite"]) == 0
    assert np.load(tmp_path / "song 01.flac.npz")["embedding"].shape[1] == 16


def test_tag_a_file(run, checkpoint, evaluated, tiny_audio, tiny_data, tmp_path):
    done = run(["evaluate.py", "--ckpt", checkpoint.parent / "tagger.ts", "--tag", tiny_audio / "song 02.flac", "--plot", "--out", tmp_path])
    assert done.returncode == 0, done.stderr
    assert all(tag in done.stdout for tag in prepare.Clips(tiny_data).tags) and (tmp_path / "song 02.flac.png").stat().st_size > 5000
    done = run(["evaluate.py", "--ckpt", checkpoint, "--tag", tiny_audio / "song 02.flac"])
    assert done.returncode == 1 and "knows no tags" in done.stderr


@pytest.mark.parametrize("flags,code,says", [
    (["--ckpt", "nowhere/encoder.pt"], 2, "nowhere/encoder.pt: no such file"),
    ([], 2, "type --ckpt"),
    (["--random"], 2, "--data NAME"),
    (["--random", "--data", "never-prepared"], 2, "prepare.py"),
    (["--random", "--data", "x", "--fraction", "0"], 2, "--fraction is in (0, 1]"),
    (["--random", "--data", "x", "--finetune"], 2, "need --ckpt"),
    (["--random", "--data", "x", "--hidden", "8", "--probe", "lbfgs"], 2, "linear probe"),
    (["--random", "--data", "x", "--seeds", "0"], 2, "at least 1"),
    (["--random", "--data", "x", "--min-steps", "0"], 2, "at least 1"),
    (["--random", "--data", "x", "--encoder", "resnet"], 2, "samplecnn-large"),
    (["--random", "--data", "x", "--overwrite"], 2, "--embed"),
    (["--ckpt", __file__, "--embed", __file__, "--hop", "0"], 2, "--hop"),
    (["--ckpt", __file__, "--embed", __file__, "--hop", "inf"], 2, "--hop"),
    (["--ckpt", __file__, "--data", "x", "--width", "0.5"], 2, "--width"),
    (["--ckpt", str(ROOT / "demo" / "encoder.pt"), "--embed", __file__, "--pool", "mean+last"], 1, "--pool"),
    (["--ckpt", str(ROOT / "demo" / "tagger.ts"), "--embed", __file__], 1, "not embeddings"),
    (["--ckpt", str(ROOT / "demo" / "tagger.ts"), "--tag", __file__, __file__, "--plot"], 1, "one name"),
    (["--ckpt", __file__, "--data", "x"], 1, "cannot be read as a checkpoint"),
    (["--ckpt", __file__, "--embed", __file__], 1, "cannot be read as a checkpoint")])
def test_bad_commands_get_one_line(flags, code, says, capsys):
    try:
        got = evaluate.main(flags)
    except SystemExit as stop:
        got = stop.code
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("usage:")]
    assert got == code and len(lines) == 1 and says in lines[0], lines


def test_data_that_does_not_fit(run, checkpoint, tiny_audio, tiny_data, tmp_path, capsys):
    done = run(["prepare.py", "--data", "folder", "--root", tiny_audio, "--out", tmp_path / "plain"])
    assert done.returncode == 0, done.stderr
    assert evaluate.main(["--ckpt", str(checkpoint), "--data", str(tmp_path / "plain")]) == 1
    assert "has no labels" in capsys.readouterr().err
    other = tmp_path / "44k.pt"
    model.save_encoder(other, model.build_encoder("samplecnn", width=WIDTH), sample_rate=44100, method="clmr", step=1)
    assert evaluate.main(["--ckpt", str(other), "--data", str(tiny_data)]) == 1
    assert "works at 44100 Hz" in capsys.readouterr().err
