"""What is to be reached, and what the README shows: the ratios, the memory, and the cases of its table."""

from .cases import BOTH, FORWARD, SMALL, SMALL_PAIRS, STEP, STEPS, Case

# How many times slower than fastvae a peer is; and the peak extra memory, in bytes.
TARGETS: dict[Case, dict[str, float]] = {
    Case("agg_log_prob", (4096, 32), FORWARD): {
        "compiled_gemm": 4,
        "compiled_broadcast": 6,
        "keops": 12,
        "eager_gemm": 18,
    },
    Case("agg_log_prob", (4096, 128), FORWARD): {
        "compiled_gemm": 2,
        "compiled_broadcast": 2,
        "keops": 2,
        "matrix_product": 1 / 1.1,
    },
    Case("agg_log_prob", (256, 10), FORWARD): dict.fromkeys(
        ("compiled_gemm", "compiled_broadcast", "keops", "eager_gemm", "eager_broadcast"), 3.0
    ),
    Case("agg_log_prob", (256, 10), BOTH): dict.fromkeys(
        ("compiled_gemm", "compiled_broadcast", "keops", "eager_gemm", "eager_broadcast"), 4.0
    ),
    Case("agg_log_prob", (2048, 32), BOTH): {"compiled_gemm": 1.6, "compiled_broadcast": 12, "keops": 15},
    Case("agg_log_prob_marginals", (2048, 32), FORWARD): {"compiled_marginals": 3, "eager_broadcast": 25},
    Case("agg_log_prob_marginals", (2048, 32), BOTH): {"compiled_marginals": 7, "eager_broadcast": 50},
    Case("reparameterize", (8192, 64), FORWARD): {"eager": 5},
    Case("reparameterize", (8192, 64), BOTH): {"eager": 3.5},
    Case("kl_gauss", (8192, 64), BOTH): {"eager": 2.5, "compiled": 1.3},
    Case("reparameterize", (64, 10), BOTH): {"eager": 1.2},
    **{Case("reparameterize", size, BOTH): {"eager": 1.3} for size in SMALL[1:]},
    **{Case("kl_gauss", size, BOTH): {"eager": 2, "compiled": 1.5} for size in SMALL},
    **{Case("z_and_kl", size, BOTH): {"eager": 2.2, "compiled": 3} for size in SMALL},
    **{
        Case(name, size, BOTH): dict.fromkeys(peers, least)
        for name, peers, targets in (
            ("agg_log_prob", ("compiled_gemm", "compiled_broadcast"), (2, 2.5)),
            ("agg_entropy", ("compiled_gemm", "compiled_broadcast", "eager_gemm", "eager_broadcast"), (1.5, 2, 2.5)),
            ("kl_decomposition", ("compiled_broadcast", "eager_broadcast"), (1.3, 1.8, 2.5)),
        )
        for size, least in zip(SMALL_PAIRS, targets, strict=False)
    },
    **{
        Case(name, size, STEP): dict.fromkeys(peers, 0.97)
        for name, peers in (
            ("training_step_elbo", ("eager", "compiled")),
            ("training_step", ("eager_broadcast", "compiled_broadcast")),
        )
        for size in STEPS
    },
}
MEMORY_TARGETS: dict[Case, float] = {Case("agg_log_prob_marginals", (16384, 32), BOTH): 64 * 2**20}

# The rows of the README's table.
HEADLINES = (
    Case("agg_log_prob", (256, 10), FORWARD),
    Case("agg_log_prob", (4096, 32), FORWARD),
    Case("agg_log_prob", (2048, 32), BOTH),
    Case("agg_log_prob_marginals", (2048, 32), FORWARD),
    Case("agg_log_prob_marginals", (2048, 32), BOTH),
    Case("cross_log_prob", (1024, 32), BOTH),
    Case("kl_gauss", (128, 32), BOTH),
    Case("kl_gauss", (65536, 128), BOTH),
    Case("reparameterize", (128, 32), BOTH),
    Case("reparameterize", (8192, 64), BOTH),
    Case("sample_gauss", (8192, 64), BOTH),
    Case("training_step", (256, 10), STEP),
    Case("training_step", (2048, 10), STEP),
    Case("full_dataset", (16_000, 10), FORWARD),
    Case("full_dataset", (60_000, 10), FORWARD),
)
