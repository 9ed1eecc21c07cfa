"""
What a network is made of, as a printed table.
"""

import re

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def print_sizes(networks, parts):
    """A line per network of {name: module}: its parameters in millions, all of them and those of each part.

    parts: {title: text in the names of its parameters}; a name counts for the last part that fits"""
    print("parameters in millions\n\n" + "".join(f"{title:>14}" for title in ("", *parts, "other", "all")))
    for name, network in networks.items():
        counts = dict.fromkeys((*parts, "other", "all"), 0)
        for key, weight in network.named_parameters():
            part = [title for title, text in parts.items() if text in key] or ["other"]
            counts[part[-1]] += weight.numel()
            counts["all"] += weight.numel()
        print(f"{name:>14}" + "".join(f"{count / 1e6:14.1f}" for count in counts.values()))


@torch.no_grad()
def print_layers(network, inputs):
    """A line per layer of one call of a U-Net, which may be on the meta device: shape of its output,
    parameters, operations (a multiplication and an addition count as two)."""
    shapes, modules = {}, dict(network.named_modules())

    def watch(name):
        def note(module, _, output):
            shapes[name] = tuple((output[0] if isinstance(output, tuple) else output).shape)

        modules[name].register_forward_hook(note)

    for name in modules:
        if re.fullmatch(r"\w+|.+\.(resnets|attentions|temporal|downsamplers|upsamplers)\.\d+", name):
            watch(name)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(*inputs)
    flops = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    print(f"{'layer':28}{'shape of its output':>24}{'parameters':>14}{'GFLOP':>8}")
    for name, shape in shapes.items():
        count = sum(weight.numel() for weight in modules[name].parameters())
        print(f"{name:28}{str(shape):>24}{count:14,}{flops.get(name, 0) / 1e9:8.1f}")
    count = sum(weight.numel() for weight in network.parameters())
    print(f"{'all':52}{count:14,}{counter.get_total_flops() / 1e9:8.1f}")
