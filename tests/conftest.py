"""One thread, as the toy runs in processes of their own have: bit for bit is promised for equal thread counts."""

import torch

torch.set_num_threads(1)
