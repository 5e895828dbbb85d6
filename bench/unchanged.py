"""Did a change of the code change a number? Fingerprints of what must stay the same.

    python bench/unchanged.py --out before.json        # a minute or two; then change the code
    python bench/unchanged.py --against before.json    # one line per difference; exit code 1 if any

What is written down: the fingerprint and samples of the prepared demo; the chain's output on fixed
draws; the encoder after 10 steps on the demo (CLMR and CPC, width 0.125, float32 and bfloat16, one
process and two); an evaluation of the encoder that is named by --ckpt, if any. Bits are the same
only on the same machine and versions of the libraries, with one thread each.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import torch

ROOT = common.ROOT
sys.path.insert(0, str(ROOT))
STEPS = ["--width", 0.125, "--batch-size", 16, "--max-steps", 10, "--device", "cpu", "--seed", 3]


def call(*command, processes=1):
    """Run a script of this repository as a user does, with one thread for each process."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    program = [sys.executable, *(torchrun if processes > 1 else []), *map(str, command)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(program)}\n{done.stderr[-2000:]}")


def digest(tensors):
    """sha256 over tensors, in order."""
    sha256 = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha256.update(flat.view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def chain_output(data):
    """The chain on 24 crops of the prepared demo and fixed draws."""
    import augment
    import prepare

    torch.set_num_threads(1)
    clips = prepare.Clips(data)
    x = clips.crops(list(range(24)), [1000 * i for i in range(24)], 59049)
    chain = augment.Chain(clips.sample_rate, probability={"noise": 0.5})
    return digest([chain(x, chain.draw(24, torch.Generator().manual_seed(5)))])


def fingerprints(folder, ckpt):
    """{what: its fingerprint}, made in an empty folder."""
    data = folder / "demo"
    call("prepare.py", "--data", "demo", "--out", data)
    found = {"prepared demo": json.loads((data / "meta.json").read_text())["fingerprint"]}
    found["samples"] = hashlib.sha256((data / "audio.npy").read_bytes()).hexdigest()
    found["chain"] = chain_output(data)
    for method in ("clmr", "cpc"):
        for amp in ("off", "bf16"):
            for processes in (1, 2):
                out = folder / f"{method}-{amp}-{processes}"
                flags = ["--data", data, "--method", method, "--amp", amp, "--out", out, *STEPS]
                call("pretrain.py", *flags, processes=processes)
                state = torch.load(out / "encoder.pt", weights_only=True)["state"]
                found[f"{method}, {amp}, {processes} processes"] = digest(state.values())
    if ckpt:
        result = folder / "result.json"
        flags = ["--seeds", 1, "--device", "cpu", "--out", result, "--export", folder]
        call("evaluate.py", "--ckpt", ckpt, "--data", data, *flags)
        found["evaluation"] = json.loads(result.read_text())["results"][0]["mean"]
    return found


def build_parser():
    parser = argparse.ArgumentParser(
        prog="bench/unchanged.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--ckpt", type=Path, help="an encoder to evaluate")
    parser.add_argument("--out", type=Path, help="write them down")
    parser.add_argument("--against", type=Path, help="compare with those of an earlier run")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = fingerprints(Path(folder), args.ckpt and args.ckpt.resolve())
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    if args.against:
        before = json.loads(args.against.read_text())
        changed = [name for name in {**before, **found} if before.get(name) != found.get(name)]
        for name in changed:
            print(f"{name}: {before.get(name)} before, {found.get(name)} now")
        print(f"{len(found) - len(changed)} of {len(found)} unchanged")
        return int(bool(changed))
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
