"""The same numbers each time: tests of resuming compare bit for bit, here and in processes of their own."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a GPU is first used

import torch  # noqa: E402

import support.machine  # noqa: E402, F401  allows TF32, which is taken back here


def be_repeatable():
    """One thread; on a GPU, single precision and kernels that sum in a fixed order, where there are any."""
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.enable_mem_efficient_sdp(False)
