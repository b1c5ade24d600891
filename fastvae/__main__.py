"""The command line: python -m fastvae info | demo"""

import argparse
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import __version__, backends
from .backends import installed, native_library
from .backends.settings import setting
from .ops import short


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit code. argparse exits with 2 where the command line is wrong."""
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
    parser.add_argument("--version", action="version", version=f"fastvae {__version__}")
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
        "--seed", type=_seed, default=0, metavar="N", help="of the weights and the noise (default: %(default)s)"
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


def _seed(text: str) -> int:
    """Parse a seed that torch.manual_seed takes."""
    value = int(text)
    if not -(2**63) <= value < 2**64:
        raise ValueError
    return value


_seed.__name__ = "integer of 64 bits"  # argparse puts it in its message


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
    try:
        Path(options.out).mkdir(parents=True, exist_ok=True)  # before a minute is spent on training
    except OSError as error:
        print(f"--out: expected a folder, or a place for one, got {options.out}: {error.strerror}", file=sys.stderr)
        return 1
    demo.run(epochs=options.epochs, seconds=options.seconds, out=options.out, seed=options.seed)
    return 0


def _info(options: argparse.Namespace) -> int:
    used = {device: _said(backends.name_for, torch.device(device)) for device in ("cpu", "cuda")}
    print(f"fastvae {__version__}\n")
    _table(
        ("package", str(installed.PACKAGE)),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("native library", _said(_native_library)),
        ("instruction set", _said(_instruction_sets)),
        ("small calls", _said(_small_calls)),
        ("threads", str(torch.get_num_threads())),
        ("CUDA", _said(_cuda)),
    )
    print("\nWho computes")
    _table(("CPU tensors", used["cpu"]), ("CUDA tensors", used["cuda"]))
    print("\nBackends")
    _table(*((name, _said(_role, name, used)) for name in backends.NAMES))
    wrong = backends.wrong_settings()
    if wrong:
        print("\nWrong environment variables")
        print(*(f"  {reason}" for reason in wrong), sep="\n")
    return 1 if wrong else 0


def _table(*rows: tuple[str, str]) -> None:
    for name, value in rows:
        print(f"  {name:<17}{value}")


def _said(ask: Callable[..., str], *arguments: object) -> str:
    """The answer, or the error instead: people run this command when something is broken, in whatever way."""
    try:
        return ask(*arguments)
    except Exception as error:
        kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
        return f"none: {kind}{' '.join(str(error).split())}"


def _role(name: str, used: dict[str, str]) -> str:
    """What a backend is used for, or why it is not used."""
    available, detail = backends.status(name)[1:]
    if not available:
        return f"not used: {detail}"
    devices = [device.upper() for device, user in used.items() if user == name]
    if devices:
        return f"used for {' and '.join(devices)} tensors: {detail}"
    forced = setting("FASTVAE_BACKEND")
    if forced:
        return f"not used: FASTVAE_BACKEND={forced}"
    return f"not used: {used['cpu']} is preferred" if used["cpu"] in backends.NAMES else "not used"


def _native_library() -> str:
    if not backends.status("native").available:
        return "not loaded"
    library = native_library.library()
    return f"{library.fastvae_version().decode()}, {library._name}"


def _small_calls() -> str:
    calls = short.module()
    return f"by Python: {calls}" if isinstance(calls, str) else f"by C, {calls.__file__}"


def _instruction_sets() -> str:
    """The instruction set in use, and the others that this CPU and library offer."""
    if not backends.status("native").available:
        return "none"
    in_use = native_library.instruction_set()
    others = [name for name in native_library.instruction_sets() if name != in_use]
    return f"{in_use} (also available: {', '.join(others)})" if others else in_use


def _cuda() -> str:
    if torch.cuda.is_available():
        return f"{torch.version.cuda or torch.version.hip}, {torch.cuda.get_device_name()}"
    return "no device" if torch.version.cuda or torch.version.hip else "not in this build of torch"


if __name__ == "__main__":
    try:
        code = main()
        if sys.stdout:  # None where it is closed
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at exit
        code = 1
    sys.exit(code)
