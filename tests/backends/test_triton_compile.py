"""The Triton kernels compiled for GPUs that are not there, and their machine code, by ahead_of_time.py."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ahead_of_time
from support.ahead_of_time import CASES, READ, TARGETS, Report

from fastvae.backends.contract import COMPOSITIONS, OPS

pytest.importorskip("triton")
PARTS = 2  # processes
# Triton 3.6 spreads a tile that is loaded or stored whole over threads the other way round, which takes more shared
# memory, and spills a little on targets other than the one whose machine code is read.
OLDER = tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) < (3, 7)
SPILL = ("_cross_columns", "_joint_columns", "joint_rows")
NVIDIA = [target for target, (maker, *_) in TARGETS.items() if maker == "cuda"]


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    """The reports of all cases, from processes that are not in Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTVAE_AUTOTUNE")}
    running = [
        subprocess.Popen(
            [sys.executable, str(Path(ahead_of_time.__file__)), str(part), str(PARTS)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in range(PARTS)
    ]
    found = []
    for process in running:
        output, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-4000:]
        found += [Report(**report) for report in json.loads(output)]
    return found


def of_case(reports: list[Report], name: str) -> list[Report]:
    return [r for r in reports if r.case == name]


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_compiles_for_every_target(reports: list[Report], name: str) -> None:
    """Every case compiles into the same kernels for all targets, except those of NVIDIA's tensor cores."""
    targets = [t for t, (maker, *_) in TARGETS.items() if maker == "cuda" or not CASES[name].tensor_cores]
    kernels = {target: [r.kernel for r in of_case(reports, name) if r.target == target] for target in targets}
    assert CASES[name].kernel in kernels[READ]
    assert all(k == kernels[READ] for k in kernels.values())


def test_registers_and_shared_memory(reports: list[Report], name: str) -> None:
    for report in of_case(reports, name):
        elsewhere = OLDER and report.target != READ and report.kernel in SPILL
        assert report.stack <= (48 if elsewhere else 0), f"{report.kernel} spills {report.stack} bytes: {report.target}"
        shared = 64 * 1024 if OLDER and report.kernel == "_cross_log_prob" else CASES[name].shared
        assert report.shared <= shared, report
        assert report.registers <= (512 if report.target.startswith("gfx") else CASES[name].registers), report


def test_instructions(reports: list[Report], name: str) -> None:
    """The instructions of the case's own kernel: how many for each element, what share in the innermost loop, how wide
    the accesses."""
    case = CASES[name]
    report = next(r for r in of_case(reports, name) if (r.target, r.kernel) == (READ, case.kernel))
    assert sum(report.instructions.values()) > 50
    assert not {"LDL", "STL"} & set(report.instructions), "local memory"
    assert not {"ATOM", "ATOMG", "RED"} & set(report.instructions), "atomics"
    if report.elements:
        assert sum(report.instructions.values()) / report.elements <= case.instructions
    if case.wide:  # but for the odd number: a seed, a gradient, a sum
        narrow = sum(n for width, n in report.accesses.items() if width != "128")
        assert report.accesses["128"] >= report.elements / 8
        assert narrow <= 4, report.accesses
    loops = ({"FFMA": 0.16, "FMUL": 0.16},) if OLDER and report.kernel == "_cross_rows" else case.loops
    for least in loops:
        shares = [{opcode: loop.get(opcode, 0) / sum(loop.values()) for opcode in least} for loop in report.loops]
        assert any(all(share[opcode] >= least[opcode] for opcode in least) for share in shares), shares
    if case.shares:
        loop = max(report.loops, key=lambda loop: sum(loop.values()))
        for opcode, share_at_least in case.shares.items():
            share = loop.get(opcode, 0) / sum(loop.values())
            assert share >= share_at_least, f"{opcode}: {share:.3f} of {loop}"


def test_tensor_cores_compute_where_they_are_asked_to(reports: list[Report], name: str) -> None:
    """Tensor cores compute where they are asked to and nowhere else: tf32 is never the default."""
    for report in of_case(reports, name):
        if report.instructions:
            assert bool(report.tensor_cores) == CASES[name].tensor_cores, report
            if report.target != "sm_100":  # whose instruction does not say
                assert all(".TF32" in opcode for opcode in report.tensor_cores), report
    read = {report.target for report in of_case(reports, name) if report.instructions}
    assert read == ({"sm_80", "sm_90", "sm_100"} if CASES[name].tensor_cores else {READ})


def test_no_integer_is_specialized(reports: list[Report], name: str) -> None:
    """No integer but 1 is specialized: `launch` finds a binary by nothing else of an integer's value."""
    assert {r.kernel: r.specialized for r in of_case(reports, name) if r.specialized} == {}


def test_sums_in_memory_are_each_one_threads_own(reports: list[Report], name: str) -> None:
    """Sums in memory are cleared, read and written without a barrier."""
    for report in of_case(reports, name):
        assert all(len(layouts) == 1 for layouts in report.layouts.values()), report
        if report.kernel in ("_joint_columns", "_cross_rows", "_cross_columns") and report.target in NVIDIA:
            assert report.layouts, report


def test_layouts_that_differ_are_found() -> None:
    """One layout that differs is found, of four accesses of sums; none of other tensors."""
    wide, narrow = "#ttg.blocked<{order = [3, 2, 1, 0]}>", "#ttg.blocked<{order = [0, 1, 2, 3]}>"
    ttgir = f"""#blocked = {wide}
#blocked1 = {narrow}
      tt.store %a, %zero, %mask : tensor<2x1x64x4x!tt.ptr<f32>, #blocked> loc(#loc1)
      %x = tt.load %a, %mask, %other : tensor<2x1x64x4x!tt.ptr<f32>, #blocked> loc(#loc2)
      tt.store %a, %x, %mask : tensor<2x1x64x4x!tt.ptr<f32>, #blocked1> loc(#loc3)
      tt.store %a, %x, %mask : tensor<2x1x64x4x!tt.ptr<f64>, #blocked1> loc(#loc3)
      %z = tt.load %b : tensor<2x1x64x1x!tt.ptr<f32>, #blocked> loc(#loc4)
      %r = tt.load %c : tensor<2x16x64x4x!tt.ptr<f32>, #blocked1> loc(#loc5)
      %w = tt.load %d : tensor<128x!tt.ptr<f32>, #blocked> loc(#loc6)
"""
    found = ahead_of_time.layouts_of_sums(ttgir)
    assert found == {"2x1x64x4xf32": sorted([wide, narrow]), "2x1x64x4xf64": [narrow]}


def test_every_op_has_cases() -> None:
    ops = {case.split()[0] for case in CASES}
    assert ops == {f"{op}{direction}" for op in (*OPS, *COMPOSITIONS) for direction in ("", "_backward")}


def test_innermost_loops_are_found() -> None:
    listing = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   FADD R0, R0, R1 ;
.L_x_1:
        /*0020*/                   FFMA R0, R0, R1, R2 ;
        /*0030*/              @!P0 MUFU.EX2 R3, R0 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/               @P2 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2);
"""
    loops = [ahead_of_time.opcodes(loop) for loop in ahead_of_time.innermost_loops(listing)]
    assert loops == [["FFMA", "MUFU.EX2", "BRA"]]
