"""Compiles the Triton kernels for GPUs that are not there, as they are launched, and reads the machine code.

    python tests/support/ahead_of_time.py [PART PARTS]   # prints a JSON list of `Report`s; without TRITON_INTERPRET

A case calls a launcher with meta tensors. Every kernel launched in it is compiled, by Triton's own path from arguments
to binary, for each of `TARGETS`. test_triton_compile.py runs this in processes of their own and checks the reports.
"""

import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastvae
from fastvae.backends import triton as triton_backend
from fastvae.backends.contract import TERMS, LogWeights, Pairs, kl_shape

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
READ = "sm_90"  # the target whose machine code is read


class Case(NamedTuple):
    """A launch, and what its compiled kernels are held to; the machine code is that of `kernel`."""

    launch: Callable[[], object]
    kernel: str
    registers: int = 168  # per thread, at most, on NVIDIA: 168 let 384 threads run on a multiprocessor
    shared: int = 48 * 1024  # bytes, at most
    instructions: float = math.inf  # per element of a program's tile, at most
    wide: bool = False  # whether all loads and stores of rows are of 16 bytes
    shares: Mapping[str, float] = MappingProxyType({})  # of the longest innermost loop, at least: {"FFMA": 0.6}
    loops: tuple[Mapping[str, float], ...] = ()  # for each, an innermost loop that has at least these shares
    tensor_cores: bool = False  # whether its machine code is read on every NVIDIA target, for theirs


class Report(NamedTuple):
    """One kernel on one target. The machine code is read only for the case's own kernel on `READ`, or where tensor
    cores are looked for; elsewhere the fields made from it are empty."""

    case: str
    target: str
    kernel: str
    registers: int
    stack: int  # bytes of spilled registers
    shared: int
    elements: int  # of a program's tile, for each thread
    instructions: dict[str, int]  # how many of each opcode
    loops: list[dict[str, int]]  # the same of each innermost loop
    accesses: dict[str, int]  # global loads and stores by their width in bits
    tensor_cores: list[str]  # their instructions, with modifiers
    specialized: list[str]  # integer parameters for whose values there are binaries, but for 1
    layouts: dict[str, list[str]]  # of a program's own sums in memory: how their accesses are spread over its threads


def op(name: str, *arguments: Any) -> object:
    """Launches what the backend launches, whatever device the tensors are on."""
    return triton_backend.on_current_device(name)(*arguments)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def kl(B: int, D: int, reduction: str, dtype: torch.dtype = torch.float32, prior: int = 0) -> Callable[[], object]:
    x = meta(B, D, dtype=dtype)
    p = meta(prior, D, dtype=dtype) if prior else None
    return lambda: op("kl_gauss", x, x, p, p, reduction)


def kl_backward(B: int, D: int, dtype: torch.dtype = torch.float32, prior: int = 0) -> Callable[[], object]:
    x = meta(B, D, dtype=dtype)
    p = meta(prior, D, dtype=dtype) if prior else None
    return lambda: op("kl_gauss_backward", meta(), x, x, p, p, "batchmean", [True, True, bool(prior), bool(prior)])


def sample(
    L: int, B: int, D: int, outputs: str, dtype: torch.dtype = torch.float32, reduction: str = "sample"
) -> Callable[[], object]:
    x = meta(B, D, dtype=dtype)
    return lambda: op("sample_gauss", x, x, meta(dtype=torch.int64), L, [o in outputs for o in "zqpke"], reduction)


def sample_backward(
    L: int, B: int, D: int, outputs: str, dtype: torch.dtype = torch.float32, reduction: str = "sample"
) -> Callable[[], object]:
    x = meta(B, D, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    shapes = {"z": (L, B, D), "q": (L, B), "p": (L, B), "k": kl_shape(reduction, B, D)}
    upstream = [meta(*s, dtype=dtype if o == "z" else wide) if o in outputs else None for o, s in shapes.items()]
    noise = (None, meta(L, B, D, dtype=wide)) if "e" in outputs else (meta(dtype=torch.int64), None)
    return lambda: op("sample_gauss_backward", upstream, x, x, *noise, L, reduction, [True, True])


class Problem(NamedTuple):
    """A problem for the cross-evaluated kernels, with weights for own columns and the next where `own`."""

    S: int
    N: int
    D: int
    own: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def pairs(self) -> Pairs:
        weights = LogWeights(None, -1.0)
        if self.own:
            weights = LogWeights(meta(self.N, dtype=self.dtype), None, meta(self.S, dtype=torch.int64), -0.5, 0.5)
        z, mu, logvar = (meta(n, self.D, dtype=self.dtype) for n in (self.S, self.N, self.N))
        return Pairs(z, mu, logvar, weights)

    def result(self, *shape: int) -> Tensor:
        return meta(*shape, dtype=torch.promote_types(self.dtype, torch.float32))


def pairs(
    name: str, *problem: Any, want_z: bool = True, precision: str = "exact", early: bool = False
) -> Callable[[], object]:
    """A cross-evaluated op, or its backward for all gradients, or for all but that of z; with early exit or without."""
    p = Problem(*problem)
    joint, marginals, matrix = p.result(p.S), p.result(p.S, p.D), p.result(p.S, p.N)
    wanted = [want_z, True, True, p.own]
    terms = [p.result(p.D) if term == "dim_kl" else p.result() for term in TERMS[:-1]]
    of_backward: dict[str, tuple[Any, ...]] = {
        "cross_log_prob_backward": (matrix, p.pairs, wanted[:3]),
        "agg_log_prob_backward": (joint, joint, p.pairs, wanted),
        "agg_log_prob_marginals_backward": ((joint, marginals), joint, marginals, p.pairs, wanted),
        "agg_entropy_backward": (p.result(), p.pairs, wanted),
        "kl_decomposition_backward": (terms, joint, marginals, p.pairs, wanted),
    }

    def launch() -> object:
        with fastvae.use(precision=precision, exact_skip=early):
            return op(name, *of_backward.get(name, (p.pairs,)))

    return launch


MANY = 1 << 20
HALF, DOUBLE = torch.bfloat16, torch.float64
PACK = 224  # registers of the kernel that packs, which takes no time; those that go through pairs have 128
FORWARD = ({"FFMA": 0.825},)  # a tile of 8 x 8 pairs
UNROLLED = ({"FFMA": 0.77},)  # 8 x 4, two dimensions at a time
LOOKING = ({"FFMA": 0.75},)  # the same, and a look at the end of it
HALF_TILE = ({"FFMA": 0.70},)  # 8 x 4
SQUARES = {"FFMA": 0.72}  # 2 x 16, two dimensions at a time
ONE_AT_A_TIME = {"FFMA": 0.67}  # 2 x 16, where a tile may stop early, or own columns have weights
PULLS = {"FFMA": 0.52, "FMUL": 0.19}
CASES = {
    "kl_gauss sum": Case(kl(MANY, 128, "batchmean"), "_kl_gauss", 64, instructions=46, wide=True),
    "kl_gauss sample": Case(kl(MANY, 128, "sample"), "_kl_gauss", 64, instructions=46, wide=True),
    "kl_gauss none bfloat16": Case(kl(MANY, 128, "none", HALF), "_kl_gauss", 64, instructions=50, wide=True),
    "kl_gauss dim prior": Case(kl(MANY, 128, "dim", prior=1), "_kl_gauss", instructions=67, wide=True),
    "kl_gauss awkward float64": Case(kl(507, 33, "dim", DOUBLE), "_kl_gauss"),
    "kl_gauss small": Case(kl(256, 32, "batchmean"), "_kl_gauss"),
    "kl_gauss_backward": Case(kl_backward(MANY, 128), "_kl_gauss_backward", 64, instructions=44, wide=True),
    "kl_gauss_backward prior": Case(kl_backward(MANY, 128, prior=1), "_kl_gauss_backward", instructions=92, wide=True),
    "kl_gauss_backward float16": Case(kl_backward(97, 129, torch.float16, 97), "_kl_gauss_backward"),
    "sample_gauss z": Case(sample(1, MANY, 128, "z"), "_sample_gauss", 64, instructions=66, wide=True),
    "sample_gauss all": Case(sample(1, MANY, 128, "zqpk"), "_sample_gauss", 96, instructions=112, wide=True),
    "sample_gauss z and a KL": Case(
        sample(1, MANY, 128, "zk", reduction="batchmean"), "_sample_gauss", 80, instructions=102, wide=True
    ),
    "sample_gauss L bfloat16": Case(sample(8, MANY, 128, "z", HALF), "_sample_gauss", 64, instructions=72, wide=True),
    "sample_gauss D 10": Case(sample(5, MANY, 10, "zqp"), "_sample_gauss", instructions=240),
    "sample_gauss z and its noise": Case(sample(1, MANY, 128, "ze"), "_sample_gauss", 64, wide=True),
    "sample_gauss float64": Case(sample(1, 8192, 64, "zqpk", DOUBLE), "_sample_gauss"),
    "sample_gauss_backward z": Case(
        sample_backward(1, MANY, 128, "z"), "_sample_gauss_backward", 64, instructions=71, wide=True
    ),
    "sample_gauss_backward z and a KL": Case(
        *(sample_backward(1, MANY, 128, "zk", reduction="batchmean"), "_sample_gauss_backward", 104),
        instructions=110,
    ),
    "sample_gauss_backward z, noise read": Case(
        sample_backward(1, MANY, 128, "ze"), "_sample_gauss_backward", 64, wide=True
    ),
    "sample_gauss_backward all": Case(sample_backward(8, MANY, 33, "zqpk"), "_sample_gauss_backward"),
    "sample_gauss_backward parts": Case(sample_backward(8, 507, 33, "zqpk"), "_add_parts"),
    "sample_gauss_backward parts float64": Case(sample_backward(2, 97, 64, "zqpk", DOUBLE), "_add_parts"),
    "sample_gauss_backward float64": Case(sample_backward(2, 65536, 64, "zqpk", DOUBLE), "_sample_gauss_backward"),
    "cross_log_prob": Case(pairs("cross_log_prob", 8192, 8192, 64), "_cross_log_prob", PACK, loops=FORWARD),
    "cross_log_prob D 512": Case(pairs("cross_log_prob", 8192, 8192, 512), "_cross_log_prob", PACK, loops=HALF_TILE),
    "cross_log_prob float64": Case(pairs("cross_log_prob", 512, 512, 10, False, DOUBLE), "_cross_log_prob", PACK),
    "cross_log_prob_backward": Case(
        pairs("cross_log_prob_backward", 8192, 8192, 64), "_cross_rows", PACK, loops=({"FFMA": 0.37, "FMUL": 0.23},)
    ),
    "cross_log_prob_backward D 512 float64": Case(
        pairs("cross_log_prob_backward", 4096, 4096, 512, False, DOUBLE), "_cross_columns", PACK
    ),
    "agg_log_prob": Case(pairs("agg_log_prob", 16384, 16384, 64), "joint_rows", PACK, loops=FORWARD),
    "agg_log_prob own": Case(pairs("agg_log_prob", 16384, 16384, 64, True), "joint_rows", PACK, loops=UNROLLED),
    "agg_log_prob D 512 own": Case(
        pairs("agg_log_prob", 64, 10**6, 512, True), "joint_rows", PACK, loops=({"FFMA": 0.64},)
    ),
    "agg_log_prob D 512 many own": Case(
        pairs("agg_log_prob", 16384, 16384, 512, True), "joint_rows", PACK, loops=HALF_TILE
    ),
    "agg_log_prob small bfloat16": Case(pairs("agg_log_prob", 256, 256, 33, False, HALF), "joint_rows", PACK),
    "agg_log_prob small own": Case(pairs("agg_log_prob", 256, 256, 33, True), "joint_rows", PACK),
    "agg_log_prob float64 own": Case(pairs("agg_log_prob", 4096, 4096, 10, True, DOUBLE), "joint_rows", PACK),
    "agg_log_prob early": Case(pairs("agg_log_prob", 16384, 16384, 128, early=True), "joint_rows", PACK, loops=LOOKING),
    "agg_log_prob early own": Case(
        pairs("agg_log_prob", 16384, 16384, 64, True, early=True), "joint_rows", PACK, loops=LOOKING
    ),
    "agg_log_prob early D 512 own": Case(
        pairs("agg_log_prob", 16384, 16384, 512, True, early=True), "joint_rows", PACK
    ),
    "agg_log_prob early float64": Case(
        pairs("agg_log_prob", 4096, 4096, 64, False, DOUBLE, early=True), "joint_rows", PACK
    ),
    "agg_log_prob tf32x3": Case(
        pairs("agg_log_prob", 16384, 16384, 64, True, precision="tf32x3"), "_joint_rows_tf32x3", 255, tensor_cores=True
    ),
    "agg_log_prob_backward": Case(
        pairs("agg_log_prob_backward", 16384, 16384, 64), "_joint_columns", PACK, loops=(SQUARES, PULLS)
    ),
    "agg_log_prob_backward rows": Case(
        pairs("agg_log_prob_backward", 16384, 16384, 64),
        "joint_rows",
        PACK,
        loops=(SQUARES, {"FFMA": 0.45, "FMUL": 0.25}),
    ),
    "agg_log_prob_backward own bfloat16": Case(
        *(pairs("agg_log_prob_backward", 16384, 16384, 64, True, HALF), "_joint_columns", PACK),
        loops=(ONE_AT_A_TIME, PULLS),
    ),
    "agg_log_prob_backward D 512 own": Case(
        pairs("agg_log_prob_backward", 4096, 4096, 512, True), "_joint_columns", PACK, loops=({"FFMA": 0.67},)
    ),
    "agg_log_prob_backward early": Case(
        pairs("agg_log_prob_backward", 16384, 16384, 64, early=True),
        "_joint_columns",
        PACK,
        loops=(ONE_AT_A_TIME, PULLS),
    ),
    "agg_log_prob_backward early own": Case(
        pairs("agg_log_prob_backward", 16384, 16384, 64, True, early=True), "joint_rows", PACK, loops=({"FFMA": 0.65},)
    ),
    "agg_log_prob_backward early D 512 float64": Case(
        pairs("agg_log_prob_backward", 4096, 4096, 512, False, DOUBLE, early=True), "_joint_columns", PACK
    ),
    "agg_log_prob_backward small own": Case(pairs("agg_log_prob_backward", 256, 256, 33, True), "_joint_columns", PACK),
    "agg_log_prob_backward few columns float64": Case(
        pairs("agg_log_prob_backward", 10**5, 10, 10, False, DOUBLE), "_joint_columns", PACK
    ),
    "agg_log_prob_backward float64": Case(
        pairs("agg_log_prob_backward", 4096, 4096, 10, True, DOUBLE), "joint_rows", PACK, loops=({"DFMA": 0.45},)
    ),
    "agg_log_prob_marginals": Case(
        pairs("agg_log_prob_marginals", 8192, 8192, 32), "_joint_and_marginals", PACK, loops=(*FORWARD, {"MUFU": 0.08})
    ),
    "agg_log_prob_marginals own": Case(
        pairs("agg_log_prob_marginals", 8192, 8192, 10, True),
        "_joint_and_marginals",
        PACK,
        loops=(*UNROLLED, {"MUFU": 0.05}),
    ),
    "agg_log_prob_marginals D 512 own float64": Case(
        pairs("agg_log_prob_marginals", 4096, 4096, 512, True, DOUBLE), "_joint_and_marginals", PACK
    ),
    "agg_log_prob_marginals_backward": Case(
        pairs("agg_log_prob_marginals_backward", 8192, 8192, 32), "_marginal_columns", PACK, loops=({"MUFU": 0.05},)
    ),
    "agg_log_prob_marginals_backward own": Case(
        pairs("agg_log_prob_marginals_backward", 8192, 8192, 10, True),
        "_marginal_columns",
        PACK,
        loops=({"MUFU": 0.02},),
    ),
    "agg_log_prob_marginals_backward small own": Case(
        pairs("agg_log_prob_marginals_backward", 256, 256, 10, True), "_marginal_columns", PACK
    ),
    "agg_log_prob_marginals_backward own float64": Case(
        pairs("agg_log_prob_marginals_backward", 4096, 4096, 10, True, DOUBLE), "_marginal_columns", PACK
    ),
    "agg_entropy": Case(pairs("agg_entropy", 256, 256, 33, True), "_add_up", PACK),
    "agg_entropy tf32x3": Case(
        pairs("agg_entropy", 16384, 16384, 64, True, precision="tf32x3"), "_joint_rows_tf32x3", 255, tensor_cores=True
    ),
    "agg_entropy_backward": Case(pairs("agg_entropy_backward", 256, 256, 33, True), "_combine_rows_backward", PACK),
    "agg_entropy_backward early": Case(
        pairs("agg_entropy_backward", 16384, 16384, 64, early=True), "_subtract_least", PACK
    ),
    "kl_decomposition": Case(pairs("kl_decomposition", 256, 256, 10, True), "_sum_terms", PACK),
    "kl_decomposition bfloat16": Case(pairs("kl_decomposition", 256, 256, 10, True, HALF), "_mean_terms", PACK),
    "kl_decomposition float64": Case(pairs("kl_decomposition", 4096, 4096, 10, True, DOUBLE), "_sum_terms", PACK),
    "kl_decomposition_backward": Case(pairs("kl_decomposition_backward", 256, 256, 10, True), "_add_own", PACK),
    "kl_decomposition_backward numbers": Case(
        pairs("kl_decomposition_backward", 256, 256, 10, True), "_upstreams", PACK
    ),
    "kl_decomposition_backward bfloat16": Case(
        pairs("kl_decomposition_backward", 256, 256, 10, True, HALF), "_add_own", PACK
    ),
    "kl_decomposition_backward float64": Case(
        pairs("kl_decomposition_backward", 4096, 4096, 10, True, DOUBLE), "_add_own", PACK
    ),
}


# Compiling.


class Absent:
    """A driver for a GPU that is not there, with what a launch asks of it before it has a binary."""

    def __init__(self, number: int, target: Any):
        self.number, self.target = number, target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.number  # kernels keep their binaries by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(case: Case) -> list[tuple[str, int, list[str], Any]]:
    """The kernels that a case launches on the active driver: each one's name, the elements of its tile for each thread,
    its specialized integers and its binary."""
    from triton.runtime.jit import JITFunction

    found: list[tuple[str, int, list[str], Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """Compiles and launches nothing; returns nothing that `launch` could use another time."""
        binary = run(self, *arguments, grid=grid, warmup=True, **options)
        blocks = [v for k, v in options.items() if k in ("BLOCK_B", "BLOCK_D")]
        threads = 32 * binary.metadata.num_warps
        free = [p.do_not_specialize or p.do_not_specialize_on_alignment for p in self.params]
        specialized = [p.name for p, a, f in zip(self.params, arguments, free) if type(a) is int and not f]  # noqa: B905
        elements = blocks[0] * blocks[1] // threads if len(blocks) == 2 else 0
        found.append((self.__name__, elements, specialized, binary))

    JITFunction.run = compile_only
    try:
        case.launch()
    finally:
        JITFunction.run = run
    return found


# Reading machine code.


def tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def opcodes(lines: list[str]) -> list[str]:
    """The opcodes with their modifiers: FFMA, LDG.E.128 and so on."""
    found = (re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", line) for line in lines)
    return [f[1] for f in found if f and f[1] != "NOP"]


def innermost_loops(listing: str) -> list[list[str]]:
    """The lines of each loop that holds no other: from a label to a branch back to it."""
    lines = listing.splitlines()
    labels = {m[1]: n for n, line in enumerate(lines) if (m := re.match(r"(\.L_x_\d+):", line))}
    loops = []
    for end, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if branch and any(
            opcodes([line]) for line in lines[labels[branch[1]] : end]
        ):  # unlike the branch to itself that ends a kernel
            loops.append((labels[branch[1]], end + 1))
    return [lines[a:b] for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]


def by_name(names: list[str]) -> dict[str, int]:
    return dict(Counter(n.partition(".")[0] for n in names))


def read(binary: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        listing = tool("nvdisasm", "-c", file.name)
    names = opcodes(listing.splitlines())
    widths = [re.search(r"\.(64|128|U16|S16|U8)\b", n) for n in names if n.startswith(("LDG", "STG"))]
    return {
        "instructions": by_name(names),
        "loops": [by_name(opcodes(loop)) for loop in innermost_loops(listing)],
        "accesses": dict(Counter(w[1] if w else "32" for w in widths)),
        "tensor_cores": sorted({n for n in names if n.partition(".")[0].endswith("MMA")}),
    }


def layouts_of_sums(ttgir: str) -> dict[str, list[str]]:
    """The layouts of all loads and stores of sums of a tile's owned samples or columns, [RO, 1, TO, TP], by type.

    No barrier is between them: where each sum is accessed by the same thread, none is needed (pair_gradients.py)."""
    named = dict(re.findall(r"^(#\w+) = (#ttg\.[^\n]*)$", ttgir, re.M))
    found: dict[str, set[str]] = {}
    for sizes, dtype, layout in re.findall(
        r"tt\.(?:load|store) [^\n]*? : tensor<((?:\d+x)+)!tt\.ptr<(\w+)>, (#\w+)>", ttgir
    ):
        _, passing, *lanes = map(int, sizes.strip("x").split("x")) if sizes.count("x") == 4 else (0, 0)
        if passing == 1 and min(lanes) > 1:
            found.setdefault(sizes + dtype, set()).add(named[layout])
    return {kind: sorted(layouts) for kind, layouts in found.items()}


UNREAD: dict[str, Any] = {"instructions": {}, "loops": [], "accesses": {}, "tensor_cores": []}


def resources(binary: Any) -> dict[str, int]:
    """Registers and stack of a thread."""
    if "cubin" not in binary.asm:
        count = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count): +(\d+)", binary.asm["amdgcn"])}
        return {"registers": count["vgpr_count"], "stack": 4 * count["vgpr_spill_count"]}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]) + int(found["LOCAL"])}


def main(part: int = 0, parts: int = 1) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    reports = []
    for name, case in list(CASES.items())[part::parts]:
        for number, (target, description) in enumerate(TARGETS.items()):
            driver.set_active(Absent(number, GPUTarget(*description)))
            for kernel, elements, specialized, binary in compiled(case):
                is_read = target == READ or (case.tensor_cores and description[0] == "cuda")
                code = read(binary) if is_read and kernel == case.kernel else UNREAD
                used = resources(binary) | {"shared": binary.metadata.shared}
                sums = layouts_of_sums(binary.asm["ttgir"])
                about: dict[str, Any] = {"elements": elements, "specialized": specialized, "layouts": sums}
                reports.append(Report(name, target, kernel, **about, **used, **code)._asdict())
    json.dump(reports, sys.stdout)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
