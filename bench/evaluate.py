"""How fast evaluate.py embeds and probes, beside the released code's way.

    python bench/evaluate.py                       # about four minutes on two quiet cores
    python bench/evaluate.py --print               # write nothing

Leaves results/speed/evaluate.json.

Embedding: windows of 59,049 samples per second, batch 16, each variant in a process of its own, in
turns (A B C A B C), medians over the turns:
  released   the released architecture, eager float32, as its scripts run it
  float32    evaluate.embed on model.fold_batch_norm(encoder): same weights, outputs compared with
             the released form's
  bf16       the same in bfloat16, where the processor has it
The roof is what a large matrix product reaches in the same precision, in a process in the same
turns, over the 3.46 GFLOP of a window: how close to the processor's arithmetic a form comes.

Probe: evaluate.fit_probe on features of MagnaTagATune's size (187,060 + 18,250 windows x 512, 50
tags as frequent as there; synthetic features from which the tags can be told about as well as from
real ones), until it stops by itself.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np
import torch

ROOT = common.ROOT
sys.path.insert(0, str(ROOT))
VARIANTS = ("released", "float32", "bf16")
BATCH = 16


# ------------------------------------------------------------------------------- embedding


def encoder_and_audio(n):
    """Our encoder with batch statistics that are not trivial, and n windows of noise."""
    import model

    torch.manual_seed(0)
    encoder = model.build_encoder("samplecnn")
    x = 0.1 * torch.randn(n, 1, 59049)
    encoder.train()
    with torch.no_grad():
        for _ in range(3):
            encoder(x[:4])
    return encoder.eval(), x


def released_form(encoder):
    """The released network with our encoder's weights."""
    network = common.released_network()
    state = {}
    for key, value in encoder.state_dict().items():
        state[key.removeprefix("blocks.")] = value.squeeze(2) if value.dim() == 4 else value
    network.load_state_dict(state)
    return network.eval()


def one_variant(variant, batches, out):
    """In a process of its own: warm up, time, and leave the outputs of the first batch for
    comparison.
    """
    import evaluate
    import model

    if variant != "released":
        model.tune_allocator()
    encoder, x = encoder_and_audio(BATCH * batches)
    if variant == "released":
        network = released_form(encoder)
    else:
        network = model.fold_batch_norm(encoder)
        network = network.to(torch.bfloat16) if variant == "bf16" else network
    first = evaluate.embed(network, x[:BATCH].split(BATCH))
    began = time.perf_counter()
    evaluate.embed(network, x.split(BATCH))
    seconds = time.perf_counter() - began
    np.save(out, first.numpy())
    return len(x) / seconds


def embedding(turns, batches):
    """Every variant in turn, beside the roof: {variant: its rates and outputs}, and the roof."""
    variants = VARIANTS if common.has_bfloat16() else VARIANTS[:2]
    rates = {variant: [] for variant in variants}
    outputs = {}
    roofs = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(turns):
            roofs.append(common.in_a_process(__file__, "roof"))
            for variant in variants:
                save = Path(folder) / f"{variant}.npy"
                rates[variant].append(common.in_a_process(__file__, variant, batches, save))
                outputs[variant] = np.load(save)
                print(f"{variant:9s} {rates[variant][-1]:6.1f} windows/s", file=sys.stderr)
    roof = {name: round(statistics.median(r[name] for r in roofs)) for name in roofs[0]}
    base = statistics.median(rates["released"])
    wanted = outputs["released"]
    found = {}
    for variant in variants:
        rate = statistics.median(rates[variant])
        precision = "bfloat16" if variant == "bf16" else "float32"
        difference = np.abs(outputs[variant] - wanted).max() / np.abs(wanted).max()
        found[variant] = {
            "windows_per_s": round(rate, 1),
            "turns": [round(r, 1) for r in rates[variant]],
            "times_released": round(rate / base, 2),
            "share_of_roof": round(rate * common.GFLOP_PER_WINDOW / roof[precision], 3),
            "relative_difference": float(difference),
        }
    return found, roof


def table(found):
    """One row a variant."""
    return [
        {
            "form": variant,
            "windows/s": f"{row['windows_per_s']:.0f}",
            "times released": f"{row['times_released']:.1f}",
            "of the roof": f"{100 * row['share_of_roof']:.0f} %",
            "relative difference": f"{row['relative_difference']:.0e}",
        }
        for variant, row in found.items()
    ]


# ------------------------------------------------------------------------------- probe


def probe():
    """Seconds of evaluate.fit_probe on features of MagnaTagATune's size."""
    import evaluate
    import model

    model.tune_allocator()
    rng = torch.Generator().manual_seed(0)
    n = 187060
    clips = np.repeat(np.arange(18706 + 1825), 10)
    # What a clip is about; a window tells of it with noise, and so does a label.
    latent = torch.randn(clips[-1] + 1, 48, generator=rng)
    window = latent[clips] + 0.7 * torch.randn(len(clips), 48, generator=rng)
    h = window @ torch.randn(48, 512, generator=rng) / 7
    h = torch.relu(h + 0.2 * torch.randn(len(clips), 512, generator=rng))
    wanted = latent @ torch.randn(48, 50, generator=rng) / 7
    wanted += 1.5 * torch.randn(len(latent), 50, generator=rng)
    # MagnaTagATune's top 50: 1 % to 19 % of the clips.
    frequency = torch.logspace(-2.0, -0.7, 50).tolist()
    labels = [w > w.quantile(1 - f) for w, f in zip(wanted.T, frequency)]
    y = torch.stack(labels, 1)[clips].byte()
    began = time.perf_counter()
    data = evaluate.Windows(h, y, clips)
    _, info = evaluate.fit_probe(data[:n], data[n:])
    found = {"seconds": time.perf_counter() - began, "windows": n, "tags": 50, **info}
    return {key: round(v, 4) if isinstance(v, float) else v for key, v in found.items()}


# ------------------------------------------------------------------------------- program


def build_parser():
    parser = argparse.ArgumentParser(
        prog="bench/evaluate.py",
        description="Speed of embedding and probing.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--turns", type=int, default=3, help="measurements of each variant")
    parser.add_argument("--batches", type=int, default=6, help="batches of 16 windows each")
    parser.add_argument("--only", choices=["embedding", "probe"], help="one of the two")
    out = ROOT / "results" / "speed" / "evaluate.json"
    parser.add_argument("--out", type=Path, default=out, help="file to write")
    parser.add_argument("--print", action="store_true", help="print it and write nothing")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    result = {
        "command": common.command_line(__file__, argv),
        "machine": common.machine() | {"torch": torch.__version__, "bf16": common.has_bfloat16()},
    }
    caption = ""
    if args.only != "probe":
        result["embedding"], result["roof_gflops"] = embedding(args.turns, args.batches)
        result["table"] = table(result["embedding"])
        caption = (
            f"Embedding on {common.where()}, batch {BATCH}, windows of 59,049 samples, "
            f"medians of {args.turns} turns. {common.roof_in_words(result['roof_gflops'])}"
        )
    if args.only != "embedding":
        result["probe"] = probe()
    result["caption"] = caption
    common.write(result, None if args.print else args.out)
    return 0


def worker(what, *rest):
    """In a process of its own: the roof, or one variant."""
    if what == "roof":
        return common.roof()
    return one_variant(what, int(rest[0]), rest[1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(worker(*sys.argv[2:])))
        sys.exit(0)
    sys.exit(main())
