"""Makes every Python process that has this folder on PYTHONPATH see a GPU, which is mocked; see mocked_gpu.py."""

import importlib.abc
import importlib.util
import sys
from types import ModuleType
from typing import Any

LATER = {  # module: the function of mocked_gpu.py that adapts it, as soon as it has been imported
    "torch": "adapt_torch",
    "triton.runtime.jit": "adapt_triton",
    "fastvae.ops.modes": "adapt_modes",
    "fastvae.backends.cuda": "adapt_backend_cuda",
    "fastvae.backends.triton": "adapt_backend_triton",
}


class Adapter(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in LATER:
            return None
        adapt = LATER.pop(name)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_adapt(module: ModuleType) -> None:
            execute(module)
            import mocked_gpu

            getattr(mocked_gpu, adapt)(module)

        spec.loader.exec_module = execute_and_adapt  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Adapter())
