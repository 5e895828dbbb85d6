"""MelCNN: its spectrogram against an independent one, its rows, its files and exports."""

import pytest
import torch

import model

SAMPLE_RATE = 22050


@pytest.fixture(scope="module")
def encoder():
    """A small one whose batch norms have seen something."""
    torch.manual_seed(0)
    made = model.MelCNN(width=0.5).train()
    with torch.no_grad():
        for _ in range(20):
            made(audio(4))
    return made.eval()


def audio(batch, seed=0):
    """Noise and a tone, (batch, 1, 59049), each of another level."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, 1, 3**10, generator=generator)
    tone = torch.sin(torch.arange(3**10) * (2 * torch.pi * 440 / SAMPLE_RATE))
    return (noise * 0.1 + tone) * torch.logspace(-3, -0.5, batch)[:, None, None]


def difference(got, want):
    """The largest, relative to the scale of what is wanted."""
    return ((got - want).abs().max() / want.abs().max()).item()


def test_it_stands_beside_the_papers_encoders_and_is_chosen_by_name():
    encoder = model.build_encoder("melcnn")
    assert isinstance(encoder, model.MelCNN) and encoder.input_samples == 3**10
    assert encoder.eval()(audio(2)).shape == (2, encoder.out_dim) == (2, 768)
    assert sum(p.numel() for p in encoder.parameters()) < 2_000_000  # in float32 below 8 MB


def test_the_filters_are_those_of_torchaudio():
    functional = pytest.importorskip("torchaudio").functional
    want = functional.melscale_fbanks(
        513, 30.0, SAMPLE_RATE / 2, 96, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
    )
    assert difference(model.mel_filters(96, 1024, SAMPLE_RATE / 2), want) < 1e-5


def test_the_spectrogram_is_that_of_torch_stft_and_torchaudio_in_float64():
    functional = pytest.importorskip("torchaudio").functional
    x = audio(3).double()
    window = torch.hann_window(1024, dtype=torch.float64)
    bins = torch.stft(x[:, 0], 1024, 384, window=window, center=False, return_complex=True)
    filters = functional.melscale_fbanks(
        513, 30.0, SAMPLE_RATE / 2, 96, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
    )
    want = torch.log(1 + 1e4 * (filters.T.double() @ bins.abs().square()))  # (B, bands, frames)
    got = model.MelCNN().spectrogram(x.float())
    assert got.shape == want.shape == (3, 96, 152)
    assert difference(got.double(), want) < 1e-5


def test_a_tone_is_in_the_bands_round_its_frequency():
    tone = torch.sin(torch.arange(3**10) * (2 * torch.pi * 1000 / SAMPLE_RATE))[None, None]
    loudest = model.MelCNN().spectrogram(tone)[0].mean(1).argmax()
    filter_of_loudest = model.mel_filters(96, 1024, SAMPLE_RATE / 2)[:, loudest]
    assert abs(filter_of_loudest.argmax().item() * SAMPLE_RATE / 1024 - 1000) < 50


def test_in_eval_mode_a_row_depends_on_no_other(encoder):
    x = audio(5)
    with torch.no_grad():
        together = encoder(x)
        for i in range(5):
            assert difference(encoder(x[i : i + 1]), together[i : i + 1]) < 1e-5
        swapped = encoder(torch.cat([x[:1], audio(4, seed=1)]))
    assert torch.equal(swapped[0], together[0])


def test_silence_and_full_scale_give_finite_features_and_gradients():
    encoder = model.MelCNN(width=0.5).train()
    x = torch.stack([torch.zeros(1, 3**10), torch.ones(1, 3**10), -torch.ones(1, 3**10)])
    x.requires_grad_()
    encoder(x).square().sum().backward()
    gradients = [x.grad, *(p.grad for p in encoder.parameters())]
    assert all(g.isfinite().all() for g in gradients)


def test_under_autocast_the_spectrogram_stays_in_full_precision(encoder):
    x = audio(2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        front = encoder.front(x)
    assert front.dtype == torch.float32
    assert torch.equal(front, encoder.front(x).detach())


def test_the_network_is_the_same_in_float64(encoder):
    x = audio(2)
    double = model.MelCNN(width=0.5).double().eval()
    double.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        assert difference(encoder(x).double(), double(x.double())) < 1e-4


def test_the_wrong_length_is_refused(encoder):
    with pytest.raises(ValueError, match="59049"):
        encoder(torch.zeros(1, 1, 59048))


def test_the_file_gives_back_the_same_encoder(encoder, tmp_path):
    path = tmp_path / "encoder.pt"
    model.save_encoder(path, encoder, sample_rate=SAMPLE_RATE, method="clmr", step=1)
    loaded, info = model.load_encoder(path)
    assert info["encoder"] == "melcnn" and info["sizes"] == encoder.sizes
    assert torch.equal(loaded(audio(2)), encoder(audio(2)))


def test_folding_its_batch_norms_changes_nothing(encoder):
    folded = model.fold_batch_norm(encoder)
    assert not any(isinstance(block, model.Block) for block in folded.blocks)
    assert difference(folded(audio(3)), encoder(audio(3))) < 1e-5


@pytest.mark.parametrize("export", ["torchscript", "program"])
def test_scripted_and_exported_it_gives_the_same_numbers(encoder, tmp_path, export):
    path = tmp_path / "encoder"
    sidecar = getattr(model, f"export_{export}")(encoder, path, SAMPLE_RATE)
    assert sidecar["max_difference"] < 1e-5 and sidecar["encoder"] == "melcnn"


def test_two_branches_give_what_two_networks_give_side_by_side(encoder):
    torch.manual_seed(1)
    other = model.MelCNN(width=0.5).eval()
    joined = model.MelCNN(width=0.5, branches=2).eval()
    states = [e.state_dict() for e in (encoder, other)]
    both = {key: [state[key] for state in states] for key in states[0]}
    joined.load_state_dict({k: torch.cat(v) if v[0].dim() else v[0] for k, v in both.items()})
    with torch.no_grad():
        got = joined(audio(5)).unflatten(1, (2, 2, -1))  # mean and maximum, branch, channels
        for branch, network in enumerate((encoder, other)):
            want = network(audio(5)).unflatten(1, (2, -1))
            assert difference(got[:, :, branch], want) < 1e-5


def test_a_few_rows_at_a_time_the_spectrogram_has_the_same_bits():
    x = audio(9)
    encoder = model.MelCNN()
    one_by_one = torch.cat([encoder.spectrogram(row) for row in x.split(1)])
    assert torch.equal(encoder.spectrogram(x), one_by_one)


@pytest.mark.parametrize("export", ["torchscript", "program"])
def test_branches_are_exported(tmp_path, export):
    encoder = model.MelCNN(width=0.25, branches=2).eval()
    sidecar = getattr(model, f"export_{export}")(encoder, tmp_path / "encoder", SAMPLE_RATE)
    assert sidecar["max_difference"] < 1e-5 and sidecar["sizes"]["branches"] == 2
