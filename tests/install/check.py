"""Checks that an installed fastvae is what it should be: check.py native|pure

Prints where it was imported from and what computes. `native`: every instruction set of this CPU agrees with the
reference, with gradients. `pure`: the reference computes, after one warning that says how to get the library.
"""

import sys
import warnings
from pathlib import Path

import torch

import fastvae
from fastvae import backends
from fastvae.backends import native_library


def results() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mu, logvar = (torch.randn(300, 33, generator=generator).requires_grad_() for _ in range(2))
    z = fastvae.reparameterize(mu, logvar, seed=1)
    joint, marginals = fastvae.agg_log_prob_marginals(z, mu, logvar)
    kl = fastvae.kl_gauss(mu, logvar)
    loss = kl + fastvae.agg_log_prob(z, mu, logvar).mean() + joint.mean() + marginals.mean()
    loss = loss + fastvae.cross_log_prob(z, mu, logvar).mean()
    return [kl, joint, marginals, loss, *torch.autograd.grad(loss, (mu, logvar))]


expected_kind = sys.argv[1]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    computed = results()
warned = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
with fastvae.use_backend("reference"):
    expected = results()

if expected_kind == "native":
    assert backends.status("native").available, backends.status("native").detail
    assert not warned, warned
    library = Path(native_library.library()._name)
    assert Path(sys.prefix) in library.parents, f"{library} is not of {sys.prefix}"
    for name in native_library.instruction_sets():
        native_library.use_instruction_set(name)
        for ours, theirs in zip(results(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)
    what = f"{library.name}, {' '.join(native_library.instruction_sets())}"
else:
    assert not backends.status("native").available
    assert len(warned) == 1, warned
    assert "FASTVAE_REQUIRE_NATIVE=1 pip install" in warned[0], warned
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(computed, expected, strict=True))
    what = "the reference computes, and says so once"

package = Path(fastvae.__file__).parent
assert Path(sys.prefix) in package.parents, f"{package} is not of {sys.prefix}"
assert (package / "py.typed").is_file()
print(f"fastvae {fastvae.__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}: {what}")
