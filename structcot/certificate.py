"""Proof that what was exported is what was trained: the files are loaded by plain transformers and PEFT and compared with the live model.

All comparisons run on one held-out prompt's tokens in the run's own dtype. KL divergences are means over positions, in nats. Rounding in
bf16 makes two correct implementations differ, so the bar is set by what the training changed: the reloaded model must be at least 10 times
closer to the live one than the base model is, or closer than FLOOR_NATS, or both equally close to the same files computed in fp32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from structcot.config import Config
from structcot.data.batch import MicroBatch
from structcot.errors import ExportError
from structcot.export_files import ADAPTER_WEIGHTS
from structcot.files import write_json

FLOOR_NATS = 1e-4
MARGIN = 10.0


def certify_adapter(
    tensors: Mapping[str, Tensor], live_MV: Tensor, model_dir: Path, config: Config, adapter_dir: Path, probe: MicroBatch
) -> dict[str, Any]:
    """Reload the adapter in plain PEFT, compare, write certificate.json beside it and return its content.

    `tensors` are the live adapter's by the names of the file, `live_MV` the trained model's fp32 logits of the probe.

    Raises:
        ExportError: if names, shapes or values are not those of the live model, every B is zero, or the logits differ.
    """
    from peft import PeftModel

    certificate = _check_files(tensors, adapter_dir)
    base = load_plain(model_dir, config)
    base_MV = _plain_logits(base, probe)
    with torch.no_grad():
        reloaded = PeftModel.from_pretrained(base, str(adapter_dir))
        reloaded_MV = _plain_logits(reloaded, probe)
        merged = reloaded.merge_and_unload()
        merged_MV = _plain_logits(merged, probe)
    certificate |= {
        "peft_version": metadata.version("peft"),
        "transformers_version": metadata.version("transformers"),
        "kl_base_to_live": kl_nats(base_MV, live_MV),
        "kl_reloaded_to_live": kl_nats(reloaded_MV, live_MV),
        "kl_merged_to_adapter": kl_nats(merged_MV, reloaded_MV),
        "relative_logit_difference": _relative(reloaded_MV, live_MV),
        "probe_tokens": probe.num_tokens,
    }

    def exact_logits() -> Tensor:
        return _plain_logits(PeftModel.from_pretrained(load_plain(model_dir, config, torch.float32), str(adapter_dir)), probe)

    return _judge(certificate, adapter_dir, reloaded_MV, live_MV, exact_logits)


def certify_model(live_MV: Tensor, model_dir: Path, config: Config, export_dir: Path, probe: MicroBatch) -> dict[str, Any]:
    """Reload a whole exported checkpoint in plain transformers, compare, write certificate.json beside it and return its content.

    Raises:
        ExportError: if the logits differ.
    """
    base_MV = _plain_logits(load_plain(model_dir, config), probe)
    exported_MV = _plain_logits(load_plain(export_dir, config), probe)
    certificate = {
        "transformers_version": metadata.version("transformers"),
        "kl_base_to_live": kl_nats(base_MV, live_MV),
        "kl_exported_to_live": kl_nats(exported_MV, live_MV),
        "relative_logit_difference": _relative(exported_MV, live_MV),
        "probe_tokens": probe.num_tokens,
    }

    def exact_logits() -> Tensor:
        return _plain_logits(load_plain(export_dir, config, torch.float32), probe)

    return _judge(certificate, export_dir, exported_MV, live_MV, exact_logits)


def kl_nats(from_MV: Tensor, to_MV: Tensor) -> float:
    """Mean over positions of KL(softmax(from) || softmax(to))."""
    return float(F.kl_div(to_MV.log_softmax(-1), from_MV.log_softmax(-1), log_target=True, reduction="batchmean"))


def _judge(
    certificate: dict[str, Any], directory: Path, reloaded_MV: Tensor, live_MV: Tensor, exact_logits: Callable[[], Tensor]
) -> dict[str, Any]:
    """Pass if the distance is small against what training did, else if it is explained by rounding.

    Two computations of one model in bf16 differ by their roundings, which after few steps may be more than a tenth of what was learned.
    Then the live model may be at most twice as far from the files computed in fp32 as the files in the run's dtype are, plus the floor.
    """
    distance = kl_nats(reloaded_MV, live_MV)
    certificate["passed"] = distance <= max(FLOOR_NATS, certificate["kl_base_to_live"] / MARGIN)
    if not certificate["passed"]:
        exact_MV = exact_logits()
        certificate |= {"kl_exact_to_reloaded": kl_nats(exact_MV, reloaded_MV), "kl_exact_to_live": kl_nats(exact_MV, live_MV)}
        certificate["passed"] = certificate["kl_exact_to_live"] <= 2.0 * certificate["kl_exact_to_reloaded"] + FLOOR_NATS
    write_json(directory / "certificate.json", certificate)
    if not certificate["passed"]:
        raise ExportError(
            f"{directory}: the reloaded model differs from the trained one by {distance:.2e} nats a token, where training moved the base by"
            f" {certificate['kl_base_to_live']:.2e}; do not use these files, and report the versions in certificate.json"
        )
    return certificate


def _check_files(live: Mapping[str, Tensor], adapter_dir: Path) -> dict[str, Any]:
    """Names, shapes and values of the saved adapter against the live one, bit for bit."""
    saved = load_file(adapter_dir / ADAPTER_WEIGHTS)
    differing = [
        name for name in saved.keys() | live.keys() if name not in saved or name not in live or not torch.equal(saved[name], live[name])
    ]
    if differing:
        raise ExportError(
            f"{adapter_dir / ADAPTER_WEIGHTS}: {len(differing)} tensors are not those of the model, first {sorted(differing)[0]}"
        )
    num_zero = sum(not tensor.any() for name, tensor in saved.items() if ".lora_B." in name)
    if num_zero == len(saved) // 2:
        raise ExportError(f"{adapter_dir / ADAPTER_WEIGHTS}: every lora_B is zero, so the adapter does nothing; was a step trained?")
    return {"tensors": len(saved), "zero_lora_B": num_zero, "equal_to_live": True}


def load_plain(model_dir: Path, config: Config, dtype: torch.dtype | None = None):
    """The model of a directory as transformers loads it, in `dtype` or else the run's, without progress bars and notes to developers."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    dtype = dtype or getattr(torch, config.train.dtype)
    return AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=dtype, use_safetensors=True, trust_remote_code=False).eval()


@torch.no_grad()
def _plain_logits(model, probe: MicroBatch) -> Tensor:
    logits_TV = model(input_ids=probe.tokens_T.cpu().unsqueeze(0)).logits.squeeze(0)
    return logits_TV[probe.rows_M.cpu()].float()


def _relative(got_MV: Tensor, wanted_MV: Tensor) -> float:
    return float((got_MV - wanted_MV).norm() / wanted_MV.norm())
