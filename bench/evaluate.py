"""How fast evaluate.py embeds and probes, beside the released code's way; JSON into results/evaluate.json.

    python bench/evaluate.py                       # about four minutes on two quiet cores
    python bench/evaluate.py --out -               # print only

Embedding: windows of 59,049 samples per second, batch 16, each variant in a process of its own, in turns (A B C A B C),
medians over the turns:
  released   the released architecture, eager float32, as its scripts run it (Conv1d, batch norm, glibc's malloc)
  float32    evaluate.embed on model.fold_batch_norm(encoder): same weights, outputs compared with the released form's
  bf16       the same in bfloat16, where the processor has it
The roof is what a large matrix product reaches in the same precision, in a process in the same turns, over the 3.46 GFLOP
of a window: how close to the processor's arithmetic a form comes.
Probe: evaluate.fit_probe on features of MagnaTagATune's size (187,060 + 18,250 windows x 512, 50 tags as frequent as
there; synthetic features from which the tags can be told about as well as from real ones), until it stops by itself.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
VARIANTS = ("released", "float32", "bf16")
GFLOP_PER_WINDOW = 3.46


def released_form():
    """The released SampleCNN, plainly: Conv1d with stride 3, nine blocks with max-pooling, one without."""
    def block(c_in, c_out, *pool, **conv):
        return nn.Sequential(nn.Conv1d(c_in, c_out, 3, **conv), nn.BatchNorm1d(c_out), nn.ReLU(), *pool)
    sizes = (128, 128, 128, 256, 256, 256, 256, 256, 256, 512)
    blocks = [block(1, 128, stride=3)]
    blocks += [block(i, o, nn.MaxPool1d(3, 3), padding=1) for i, o in zip(sizes, sizes[1:])]
    return nn.Sequential(*blocks, block(512, 512, padding=1), nn.Flatten())


def encoder_and_audio(n):
    """Our encoder with batch statistics that are not trivial, and n windows of noise."""
    import model
    torch.manual_seed(0)
    encoder, x = model.build_encoder("samplecnn"), 0.1 * torch.randn(n, 1, 59049)
    encoder.train()
    with torch.no_grad():
        for _ in range(3):
            encoder(x[:4])
    return encoder.eval(), x


def one_variant(variant, batches, out):
    """In a process of its own: warm up, time, and leave the outputs of the first batch for comparison."""
    import evaluate
    import model
    if variant != "released":
        model.tune_allocator()
    encoder, x = encoder_and_audio(16 * batches)
    if variant == "released":
        network, state = released_form(), {}
        for key, value in encoder.state_dict().items():
            state[key.removeprefix("blocks.")] = value.squeeze(2) if value.dim() == 4 else value
        network.load_state_dict(state)
        network.eval()
    else:
        network = model.fold_batch_norm(encoder)
        network = network.to(torch.bfloat16) if variant == "bf16" else network
    first = evaluate.embed(network, x[:16].split(16))
    start = time.perf_counter()
    evaluate.embed(network, x.split(16))
    seconds = time.perf_counter() - start
    np.save(out, first.numpy())
    print(json.dumps({"windows_per_s": len(x) / seconds}))


def has_bf16():
    """Whether the processor multiplies bfloat16; where it does not, torch emulates it, hundreds of times slower."""
    import model
    return model.choose_amp("cpu") == "bf16"


def roof():
    """GFLOP/s of a large matrix product in each precision, median of ten."""
    found = {}
    for name, dtype in (("float32", torch.float32), *([("bf16", torch.bfloat16)] if has_bf16() else [])):
        (a, b, c), times = torch.randn(3, 4096, 4096).to(dtype), []
        for _ in range(11):
            start = time.perf_counter()
            torch.mm(a, b, out=c)
            times.append(time.perf_counter() - start)
        found[name] = 2 * 4096**3 / statistics.median(times[1:]) / 1e9
    print(json.dumps(found))


def probe():
    """Seconds of evaluate.fit_probe on features of MagnaTagATune's size."""
    import evaluate
    import model
    model.tune_allocator()
    rng = torch.Generator().manual_seed(0)
    clips, n = np.repeat(np.arange(18706 + 1825), 10), 187060
    latent = torch.randn(clips[-1] + 1, 48, generator=rng)  # what a clip is about
    window = latent[clips] + 0.7 * torch.randn(len(clips), 48, generator=rng)
    h = torch.relu(window @ torch.randn(48, 512, generator=rng) / 7 + 0.2 * torch.randn(len(clips), 512, generator=rng))
    wanted = latent @ torch.randn(48, 50, generator=rng) / 7 + 1.5 * torch.randn(len(latent), 50, generator=rng)
    frequency = torch.logspace(-2.0, -0.7, 50)  # MagnaTagATune's top 50: 1 % to 19 % of the clips
    y = torch.stack([w > w.quantile(1 - f) for w, f in zip(wanted.T, frequency.tolist())], 1)[clips].byte()
    start = time.perf_counter()
    _, info = evaluate.fit_probe(h[:n], y[:n], h[n:], y[n:], clips[n:])
    return {"seconds": time.perf_counter() - start, "windows": n, "tags": 50, **info}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="bench/evaluate.py", description="Speed of embedding and probing.",
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--turns", type=int, default=3, help="measurements of each variant")
    parser.add_argument("--batches", type=int, default=6, help="batches of 16 windows per measurement")
    parser.add_argument("--only", choices=["embedding", "probe"], help="one of the two")
    parser.add_argument("--out", default=str(ROOT / "results" / "evaluate.json"), help="file to write; - for none")
    parser.add_argument("--variant", choices=[*VARIANTS, "roof"], help=argparse.SUPPRESS)
    parser.add_argument("--save", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.variant == "roof":
        roof()
        return 0
    if args.variant:
        one_variant(args.variant, args.batches, args.save)
        return 0
    result = json.loads(Path(args.out).read_text()) if args.out != "-" and Path(args.out).is_file() else {}
    result.update({"kind": "bench", "argv": ["bench/evaluate.py", *(sys.argv[1:] if argv is None else argv)],
                   "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__,
                               "bf16": has_bf16()}})
    variants = VARIANTS if has_bf16() else VARIANTS[:2]
    if args.only != "probe":
        rates, outputs, roofs = {v: [] for v in variants}, {}, []
        with tempfile.TemporaryDirectory() as folder:
            for turn in range(args.turns):
                done = subprocess.run([sys.executable, __file__, "--variant", "roof"], capture_output=True, check=True)
                roofs.append(json.loads(done.stdout))
                for variant in variants:
                    save = Path(folder) / f"{variant}.npy"
                    flags = ["--variant", variant, "--batches", str(args.batches), "--save", str(save)]
                    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True)
                    if done.returncode:
                        why = done.stderr.strip().splitlines()[-1]
                        print(f"bench/evaluate.py: error: {variant}: {why}", file=sys.stderr)
                        return 1
                    rates[variant].append(json.loads(done.stdout)["windows_per_s"])
                    outputs[variant] = np.load(save)
                    print(f"{variant:9s} {rates[variant][-1]:6.1f} windows/s", file=sys.stderr)
        base, want = statistics.median(rates["released"]), outputs["released"]
        result["roof_gflops"] = {name: round(statistics.median(r[name] for r in roofs)) for name in roofs[0]}
        result["embedding"] = {
            v: {"windows_per_s": round(statistics.median(rates[v]), 1), "turns": [round(r, 1) for r in rates[v]],
                "times_released": round(statistics.median(rates[v]) / base, 2),
                "share_of_roof": round(statistics.median(rates[v]) * GFLOP_PER_WINDOW
                                       / result["roof_gflops"]["bf16" if v == "bf16" else "float32"], 3),
                "relative_difference": float(np.abs(outputs[v] - want).max() / np.abs(want).max())} for v in variants}
    if args.only != "embedding":
        result["probe"] = {k: round(v, 4) if isinstance(v, float) else v for k, v in probe().items()}
        print(result["probe"], file=sys.stderr)
    result["caption"] = (f"Embedding on {os.cpu_count()} cores, batch 16, windows of 59,049 samples, "
                         f"medians of {args.turns} turns.")
    if "roof_gflops" in result:
        roofs = ", ".join(f"{gflops} GFLOP/s in {name}" for name, gflops in result["roof_gflops"].items())
        result["caption"] += f" Roof: {roofs}, by a large matrix product in the same turns."
    result["table"] = [{"form": v, "windows/s": f"{r['windows_per_s']:.0f}",
                        "times released": f"{r['times_released']:.1f}",
                        **({"of the roof": f"{100 * r['share_of_roof']:.0f} %"} if "share_of_roof" in r else {}),
                        "relative difference": f"{r['relative_difference']:.0e}"}
                       for v, r in result.get("embedding", {}).items()]
    text = json.dumps(result, indent=1) + "\n"
    if args.out == "-":
        print(text)
    else:
        Path(args.out).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
