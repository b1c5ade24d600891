"""Where the package's files are that are not Python: the shared libraries."""

from importlib.metadata import distributions
from importlib.resources import files
from pathlib import Path

PACKAGE = Path(__file__).parents[1]  # that was imported


def find(name: str) -> Path | None:
    """A file of the package, or of an installed distribution of it.

    In the root of a checkout Python imports the tree, which has no library, even where `pip install .` has put one
    among the installed packages. Whether what is found is of this tree's interface is for the caller to see.
    """
    beside = Path(str(files("fastvae") / name))  # an editable installation has it elsewhere than its Python
    elsewhere = (Path(str(d.locate_file("fastvae"))) / name for d in distributions(name="fastvae"))
    return next((path for path in (beside, *elsewhere) if path.is_file()), None)
