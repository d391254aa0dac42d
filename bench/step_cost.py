"""What one training step of Qwen2.5-32B with adapters asks of an H100, counted without one: ours, transformers + PEFT, and the ideal.

Run as `python -m bench.step_cost [--tokens 16384] [--document 4096] [--rank 64] [--recompute block] [--json FILE]`. Seconds are the
roofline: a kernel takes as long as its arithmetic or its traffic, whichever is longer, one kernel after the other. One and two layers
are counted (bench.step_sides) and the line through them is read at 64, since every layer costs the same. What is assumed is printed
below the figures. Nothing here was timed.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.step_sides import BYTES_PER_SECOND, FLOPS_PER_SECOND, KINDS, QWEN2_5_32B, Setting, StepCost, Work, count_ours, count_peer

FEWER_LAYERS, MORE_LAYERS = 1, 2
OURS, PEER, IDEAL = "structcot", "transformers+peft", "ideal"
ASSUMPTIONS = (
    "left out on all sides: the optimizer, communication, and the time between kernels",
    "adapters on all seven projections, no dropout; every token has a label (ours skips a document's last, which has no next token)",
    "attention is causal inside each document and one formula on all sides: 2 T L H d operations a layer forward, 2.5 times that backward",
    "an operation outside of matrix products and of our kernels reads each operand and writes each result once",
    "transformers + PEFT: eager, each layer checkpointed without reentry, adapters in bf16 (its default is fp32; ours have fp32 masters),"
    " documents as rows of a batch without padding, logits of all tokens, and the loss that the model computes itself",
    "ideal: 4 operations a token for each frozen weight and 6 for each weight of an adapter, and attention; nothing replayed, no traffic",
    "saved: what autograd holds between forward and backward, parameters left out, all layers on one GPU",
)

Side = Callable[[Setting, int], StepCost]
"""Counts a step of one side with so many layers."""


def main() -> None:
    """Count, print, and write the JSON if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of the step")
    parser.add_argument("--document", type=int, default=4096, help="tokens of each document")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument(
        "--recompute", choices=("none", "block", "full"), default="block", help="what our blocks make again in the backward"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if min(options.tokens, options.document, options.rank) < 1 or options.tokens % options.document:
        parser.error(f"--tokens {options.tokens} --document {options.document} --rank {options.rank}: give whole documents, all from 1 on")
    facts = facts_of(Setting(tokens=options.tokens, document=options.document, rank=options.rank, recompute=options.recompute))
    print(table_of(facts))
    if options.json:
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def facts_of(setting: Setting) -> dict[str, Any]:
    """Everything that the command says, as the JSON has it. The other side checkpoints, whatever ours does."""
    counted = {OURS: step_cost(count_ours, setting), PEER: step_cost(count_peer, replace(setting, recompute="full"))}
    seconds = {name: cost.total.seconds for name, cost in counted.items()}
    seconds[IDEAL] = ideal_flops(setting) / FLOPS_PER_SECOND
    sides: dict[str, Any] = {
        name: {
            **cost.total._asdict(),
            "saved_bytes": cost.saved_bytes,
            "kinds": {kind: work._asdict() for kind, work in cost.kinds.items()},
        }
        for name, cost in counted.items()
    }
    return {
        "model": "Qwen2.5-32B",
        **asdict(setting),
        "flops_per_second": FLOPS_PER_SECOND,
        "bytes_per_second": BYTES_PER_SECOND,
        "assumptions": ASSUMPTIONS,
        "sides": {**sides, IDEAL: {"flops": ideal_flops(setting), "seconds": seconds[IDEAL]}},
        "seconds_over": {base: {name: seconds[name] / seconds[base] for name in seconds} for base in (PEER, IDEAL)},
        "lora_bytes": {name: lora_bytes(side, setting) for name, side in ((OURS, count_ours), (PEER, count_peer))},
    }


def step_cost(side: Side, setting: Setting, num_layers: int = QWEN2_5_32B.num_layers) -> StepCost:
    """The cost at `num_layers`, on the line through two counts."""
    fewer, more = side(setting, FEWER_LAYERS), side(setting, MORE_LAYERS)
    share = (num_layers - FEWER_LAYERS) / (MORE_LAYERS - FEWER_LAYERS)

    def line(low: float, high: float) -> float:
        return low + (high - low) * share

    kinds = {kind: Work(*map(line, fewer.kinds[kind], more.kinds[kind])) for kind in KINDS}
    return StepCost(kinds=kinds, saved_bytes=line(fewer.saved_bytes, more.saved_bytes))


def ideal_flops(setting: Setting) -> float:
    """What the mathematics asks for, attention's backward making its scores again as every library's does."""
    spec = QWEN2_5_32B
    frozen = spec.body_matmul_parameters + spec.head_matmul_parameters
    adapters = setting.rank * spec.num_layers * sum(outputs + inputs for outputs, inputs in spec.projection_shapes.values())
    attention = 3.5 * 2.0 * setting.document * spec.num_heads * spec.head_dim * spec.num_layers
    return setting.tokens * (4.0 * frozen + 6.0 * adapters + attention)


def lora_bytes(side: Side, setting: Setting) -> dict[str, float]:
    """Bytes that adapters add to a layer's forward and backward, and their time as a share of that of the frozen products.

    The step is compared with the same one without adapters; both keep everything and are differentiated to their input.
    """
    adapted, bare = (layer_bytes(side, replace(setting, rank=rank, recompute="none")) for rank in (setting.rank, 0))
    frozen_seconds = 4.0 * setting.tokens * QWEN2_5_32B.body_matmul_parameters / QWEN2_5_32B.num_layers / FLOPS_PER_SECOND
    return {
        "bytes_per_token_and_layer": (adapted - bare) / setting.tokens,
        "share_of_frozen_products": (adapted - bare) / BYTES_PER_SECOND / frozen_seconds,
    }


def layer_bytes(side: Side, setting: Setting) -> float:
    """Bytes that one more layer moves."""
    return (side(setting, MORE_LAYERS).total.bytes - side(setting, FEWER_LAYERS).total.bytes) / (MORE_LAYERS - FEWER_LAYERS)


def table_of(facts: dict[str, Any]) -> str:
    """The facts for people."""
    sides, over = facts["sides"], facts["seconds_over"]
    lines = [
        f"{facts['model']}: one step of {facts['tokens']:,} tokens in documents of {facts['document']:,}, adapters of rank {facts['rank']},"
        f" recompute {facts['recompute']}",
        f"Roofline of {FLOPS_PER_SECOND / 1e12:.0f} TFLOP/s and {BYTES_PER_SECOND / 1e12:.1f} TB/s (H100); nothing here was timed",
        "",
        f"{'':18}{'TFLOP':>9}{'TB':>8}{'saved GB':>10}{'seconds':>9}{'/ peft':>8}{'/ ideal':>9}",
    ]
    for name, side in sides.items():
        moved = "-" if name == IDEAL else f"{side['bytes'] / 1e12:.2f}"
        saved = "-" if name == IDEAL else f"{side['saved_bytes'] / 1e9:.1f}"
        ratios = f"{over[PEER][name]:8.3f}{over[IDEAL][name]:9.3f}"
        lines.append(f"{name:18}{side['flops'] / 1e12:9.0f}{moved:>8}{saved:>10}{side['seconds']:9.3f}{ratios}")
    lines += ["", f"{'milliseconds':18}{OURS:>12}{PEER:>20}"]
    for kind in KINDS:
        ours, theirs = (1e3 * sides[name]["kinds"][kind]["seconds"] for name in (OURS, PEER))
        lines.append(f"{kind:18}{ours:12.1f}{theirs:20.1f}")
    lines += ["", "Bytes that adapters add to a layer, forward and backward, everything saved; their time over that of the frozen products"]
    for name, added in facts["lora_bytes"].items():
        lines.append(f"{name:18}{added['bytes_per_token_and_layer'] / 1e3:9.1f} kB a token{100 * added['share_of_frozen_products']:8.1f} %")
    notes = [textwrap.fill(f"- {assumption}", width=120, subsequent_indent="  ") for assumption in facts["assumptions"]]
    return "\n".join([*lines, "", *notes])


if __name__ == "__main__":
    main()
