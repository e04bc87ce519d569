"""Whether this machine can run the kernels: GPU, driver, torch and Triton, answered in one message with a fix.

docs/gpu.md has the same table of versions for people.
"""

from __future__ import annotations

import torch

from amfm.kernels.runtime.backend import REQUIREMENTS, refuse_triton, triton_version


def find_obstacle(device: str) -> str | None:
    """What keeps kernels from running on a CUDA device: versions found, versions that work, what pip can install.

    None if nothing does.
    """
    version = triton_version()
    found = f"found torch {torch.__version__}, Triton {'.'.join(map(str, version)) if version else 'none'}"
    if torch.version.cuda is None:
        return f"this torch is built without CUDA ({found}): `pip install 'torch>=2.15'` brings one with it. {REQUIREMENTS}"
    try:
        torch.cuda.init()
        gpu = torch.device(device)
        properties = torch.cuda.get_device_properties(gpu)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return (
            f"there is no CUDA GPU that answers ({reason}; {found}, CUDA {torch.version.cuda}): see whether nvidia-smi lists "
            f"one; a driver too old for this CUDA wants a newer driver, or a torch of an older CUDA (`pip install torch "
            f"--index-url https://download.pytorch.org/whl/cu126`). {REQUIREMENTS}"
        )
    refusal = refuse_triton(gpu)
    return f"{properties.name}: {refusal}" if refusal else None
