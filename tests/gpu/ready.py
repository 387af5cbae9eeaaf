"""Whether `make gpu` can run: exit code 0 where it can, 3 where torch sees no GPU, 1 where something that it needs is missing."""

from __future__ import annotations

import importlib.util
import sys

NEEDED = ("torch", "torchvision", "numpy", "scipy", "pandas", "pyarrow", "sklearn", "filelock", "PIL", "pytest", "tqdm")
"""What training, its tests and the benchmark import; neither Ray nor Optuna, nor any plugin of pytest."""
WOULD = "where there is one, `pytest -m gpu tests/gpu` and benchmarks/gpu.py run"


def main() -> int:
    """Say in a line what is missing, and return the exit code."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if "torch" not in missing:
        import torch

        if not torch.cuda.is_available():
            print(f"make gpu: torch {torch.__version__} sees no CUDA device; {WOULD}.")
            return 3
    if missing:
        print(f"make gpu: {sys.executable} lacks {', '.join(missing)}, and `make gpu` installs nothing.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
