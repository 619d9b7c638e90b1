"""Run by every rank of a launch: scenarios of tests/launch/scripts on GPUs, on one that all ranks share if need be.

Arguments: the backend of device tensors, the folder for results, the script's name, the scenarios' names. Without a GPU
it runs them on the CPU.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def main() -> None:
    backend, folder, script, *scenarios = sys.argv[1:]
    has_gpu = torch.cuda.is_available()
    os.environ["ACCELERATE_USE_CPU"] = str(not has_gpu).lower()
    if has_gpu:
        if int(os.environ["WORLD_SIZE"]) > torch.cuda.device_count():
            os.environ["LOCAL_RANK"] = "0"  # of the GPU; the launcher would give each rank one of its own
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # torch asks for it where runs are to agree bit for bit
        if backend == "gloo" and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            os.environ["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT"  # to gather a whole model kills gloo on CUDA
        os.environ["DEVICE_BACKEND"] = backend
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.use_deterministic_algorithms(True, warn_only=True)
        for fused in (
            torch.backends.cuda.enable_cudnn_sdp,
            torch.backends.cuda.enable_flash_sdp,
            torch.backends.cuda.enable_mem_efficient_sdp,
        ):
            fused(False)  # with warn_only their backward pass stays the fast one, which is not deterministic
        dist.init_process_group(f"cpu:gloo,cuda:{backend}")
    from tests.launch.scripts import serve  # not before it is known where to train

    serve.run(script, scenarios, str(Path(folder)))


if __name__ == "__main__":
    main()
