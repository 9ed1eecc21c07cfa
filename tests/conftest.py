"""One thread, as the toy runs in processes of their own have: bit for bit is promised for equal thread counts."""

import torch

torch.set_num_threads(1)

LONG = ["test_full.py", "test_train.py", "test_faults.py", "test_evaluate.py"]  # minutes each


def pytest_collection_modifyitems(items):
    """The longest files first: otherwise one process ends alone with one of them."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
