"""The GPU kernels, `fastvae.kernels.triton`. An installed package has them here, and a tree of sources in kernels/."""

from pathlib import Path

_of_the_tree = Path(__file__).parents[2] / "kernels"
if not any((Path(folder) / "triton").is_dir() for folder in __path__) and _of_the_tree.is_dir():
    __path__.append(str(_of_the_tree))
