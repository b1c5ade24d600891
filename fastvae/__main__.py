"""python -m fastvae info | demo"""

import argparse
import os
import platform
import sys
from collections.abc import Callable, Sequence

import torch

from . import __version__, backends
from .backends import native_library


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. argparse leaves with 2 where the command line is wrong."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.run is None:
        parser.print_help()
        return 0
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastvae", description="fastvae: fused kernels for variational autoencoders."
    )
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train a VAE on real digits and draw what it learned, in about a minute",
        description="Trains a VAE on scikit-learn's 1,797 handwritten digits, prints a line of held-out terms"
        " per epoch, and draws reconstructions, samples, the terms over training and the aggregate posterior."
        " Nothing is downloaded. Needs the extra: pip install 'fastvae[demo]'.",
    )
    demo.add_argument(
        "--epochs", type=_positive(int), default=40, metavar="N", help="how long to train (default: %(default)s)"
    )
    demo.add_argument(
        "--seconds",
        type=_positive(float),
        default=60.0,
        metavar="S",
        help="train no longer than this; the learning rate comes down in time (default: %(default)g)",
    )
    demo.add_argument("--out", default="demo-out", metavar="DIR", help="where the pictures go (default: %(default)s)")
    demo.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the weights and the noise (default: %(default)s)"
    )
    demo.set_defaults(run=_demo)

    info = commands.add_parser(
        "info",
        help="say what computes here, and why not something faster",
        description="Prints versions, the backends found, which of them computes for CPU and for CUDA tensors,"
        " the instruction set and the threads in use, and for each backend not used the reason.",
    )
    info.set_defaults(run=_info)
    return parser


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    parse.__name__ = f"positive {'number' if kind is float else 'integer'}"  # argparse puts it in its message
    return parse


def _demo(options: argparse.Namespace) -> int:
    try:
        from . import demo
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("sklearn", "matplotlib", "tqdm"):
            raise
        print(f"The demo needs {error.name}, which is not installed: pip install 'fastvae[demo]'", file=sys.stderr)
        return 1
    demo.run(epochs=options.epochs, seconds=options.seconds, out=options.out, seed=options.seed)
    return 0


def _info(options: argparse.Namespace) -> int:
    used = {device: _used(device) for device in ("cpu", "cuda")}
    print(f"fastvae {__version__}\n")
    _table(
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("native library", _native_version()),
        ("instruction set", _instruction_sets()),
        ("threads", str(torch.get_num_threads())),
        ("CUDA", _cuda()),
    )
    print("\nWho computes")
    _table(("CPU tensors", used["cpu"]), ("CUDA tensors", used["cuda"]))
    print("\nBackends")
    _table(*((name, _role(name, used)) for name in backends.NAMES))
    return 0


def _table(*rows: tuple[str, str]) -> None:
    for name, value in rows:
        print(f"  {name:<17}{value}")


def _used(device: str) -> str:
    """The name of the backend that computes on a device, or the error that a call would raise."""
    try:
        return backends.backend_for(torch.device(device)).__name__.rpartition(".")[2]
    except (RuntimeError, ValueError) as error:
        return f"none: {error}"


def _role(name: str, used: dict[str, str]) -> str:
    """What a backend is used for, or why it is not used."""
    available, detail = backends.status(name)[1:]
    if not available:
        return f"not used: {detail}"
    devices = [device.upper() for device, user in used.items() if user == name]
    if devices:
        return f"used for {' and '.join(devices)} tensors: {detail}"
    forced = os.environ.get("FASTVAE_BACKEND")
    return f"not used: FASTVAE_BACKEND={forced}" if forced else f"not used: {used['cpu']} is preferred"


def _native_version() -> str:
    available = backends.status("native").available
    return native_library.library().fastvae_version().decode() if available else "not loaded"


def _instruction_sets() -> str:
    """The one in use and the others that this CPU and library offer."""
    if not backends.status("native").available:
        return "none: there is no native library"
    available = native_library.instruction_sets()
    in_use = os.environ.get("FASTVAE_CPU_ISA") or available[0]
    others = [name for name in available if name != in_use]
    return f"{in_use} (also available: {', '.join(others)})" if others else in_use


def _cuda() -> str:
    if torch.cuda.is_available():
        return f"{torch.version.cuda or torch.version.hip}, {torch.cuda.get_device_name()}"
    return "no device" if torch.version.cuda or torch.version.hip else "not in this build of torch"


if __name__ == "__main__":
    sys.exit(main())
