"""Build the compiled deformable attention, or find out what runs here and why: `python -m mpformer_hf.ops --help`."""

import argparse
import json
import logging
import sys
import time

import torch

from . import build
from .doctor import examine, format_report

DOCTOR_HELP = """\
Shows every backend of the deformable attention: whether it can be used here or why not, its largest error against float64, its
times, and which one models use (marked with *).

MPFORMER_MSDA_BACKEND=<name of a backend> forces one; MPFORMER_BUILD=0 stops the CPU library from being built at first use."""

BUILD_HELP = """\
Compiles the deformable attention into your cache (XDG_CACHE_HOME, else ~/.cache), where every environment with this version of the
package finds it. For CPUs this also happens at installation, or at first use; for NVIDIA GPUs only here. It needs no torch
headers and takes about 10 seconds (CPU) or a minute (GPU). CC, CUDACXX and CUDA_HOME choose the compiler."""


def main() -> int:
    """Run; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse_arguments()
    if arguments.command == "build":
        return run_build("cuda" if arguments.cuda else "cpu", force=arguments.force)
    return run_doctor(arguments.device, as_json=arguments.json)


def parse_arguments() -> argparse.Namespace:
    """What the user wants."""
    parser = argparse.ArgumentParser(prog="python -m mpformer_hf.ops", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    as_written = argparse.RawDescriptionHelpFormatter
    doctor = commands.add_parser(
        "doctor", help="what runs here, and why not the others", description=DOCTOR_HELP, formatter_class=as_written
    )
    doctor.add_argument("--device", help="cpu, cuda or cuda:1...; default: cuda if there is one")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    builder = commands.add_parser("build", help="compile now", description=BUILD_HELP, formatter_class=as_written)
    builder.add_argument("--cuda", action="store_true", help="for NVIDIA GPUs, with nvcc, instead of for CPUs")
    builder.add_argument("--force", action="store_true", help="compile again even if the library is there")
    return parser.parse_args()


def run_build(kind: str, *, force: bool) -> int:
    """Compile one kind of library."""
    found = build.find_library(kind)
    if found is not None and not force:
        print(f"It is there already: {found}\nAdd --force to compile it again.")
        return 0
    print(f"Compiling the deformable attention for {'NVIDIA GPUs' if kind == 'cuda' else 'CPUs'}...", flush=True)
    start = time.monotonic()
    try:
        path = build.build_library(kind, force=force)
    except build.BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"Done in {time.monotonic() - start:.0f} s: {path}")
    return 0


def run_doctor(device_name: str | None, *, as_json: bool) -> int:
    """Examine the backends."""
    try:
        device = torch.device(device_name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        report = examine(device)
    except (RuntimeError, AssertionError) as error:  # torch's ways to say that there is no such device
        first_line = str(error).splitlines()[0]
        print(f"The device {device_name!r} cannot be used: {first_line} Try --device cpu.", file=sys.stderr)
        return 1
    print(json.dumps(report.to_dict(), indent=2) if as_json else format_report(report, device))
    return 0 if report.chosen else 1


if __name__ == "__main__":
    sys.exit(main())
