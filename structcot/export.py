"""Export: the weights of a run as files that other tools load, each with a certificate that it does what was trained.

Run as `python -m structcot.export RUN`, or `structcot export RUN`. Needs the run directory and the base model, not the data.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from structcot.certificate import certify_adapter, certify_model
from structcot.checkpoint import complete_checkpoints, load_latest, read_state
from structcot.config import Config, ParallelConfig
from structcot.config_file import load_config
from structcot.data.batch import MicroBatch, pack
from structcot.data.render import load_tokenizer, unmasked_sample
from structcot.device import choose_device, choose_operations
from structcot.distributed import World
from structcot.errors import ExportError
from structcot.export_files import Export, adapter_tensors, export_adapter, export_model, serve_command, served
from structcot.fetch import resolve_model
from structcot.model.decoder import Decoder
from structcot.model.shard import free_unsharded
from structcot.model.weights import build_model, weights_fingerprint
from structcot.optim import make_optimizer
from structcot.rundir import locked

PROBE_TOKENS = 512
"""Tokens of the run's proof sample on which logits are compared."""


def export_run(run_dir: Path, *, merge: bool, to: Path | None) -> list[Export]:
    """Export the newest checkpoint of a run, finished or not, to `run_dir` or to the directory `to`.

    Raises:
        ExportError: if there is no checkpoint, or the files do not reload as what was trained.
        MismatchError: if the base model is not the one that was trained on.
    """
    paths = complete_checkpoints(run_dir / "checkpoints")
    if not paths:
        raise ExportError(f"{run_dir}: holds no complete checkpoint; give the output_dir of a run that has saved one")
    config = load_config(run_dir / "config.toml").model_copy(update={"output_dir": str(run_dir)})
    config = config.model_copy(update={"parallel": ParallelConfig()})  # this process is alone, however many ranks trained
    with locked(run_dir):
        model_dir = resolve_model(config.model_name_or_path, config.revision)
        device = choose_device()
        model = build_model(model_dir, config, device)
        model.attention, _ = choose_operations(config, model.spec, device)
        saved = read_state(paths[0])
        identity = {**saved.identity, **config.identity()}
        wanted = replace(saved, identity=identity, weights_sha256=weights_fingerprint(model_dir))
        load_latest(run_dir / "checkpoints", wanted, model, make_optimizer(model.trained_parameters(), config.train))
        return export_trained(model, model_dir, config, to or run_dir, World(), merge=merge)


def export_trained(model: Decoder, model_dir: Path, config: Config, to: Path, world: World, *, merge: bool = False) -> list[Export]:
    """Write and certify `to`/adapter after LoRA, `to`/model after full fine-tuning or to hold base and adapter merged.

    Every rank gives its part of the weights and runs the model on the probe; the first rank writes and compares.

    Raises:
        ExportError: if the files do not reload as what was trained.
    """
    with world.agreed():
        probe = read_probe(Path(config.output_dir) / "data" / "proof.json", choose_device())
        tokenizer = load_tokenizer(model_dir)
    live_MV = live_logits(model, probe)
    exports = []
    if config.tuning.method == "lora":
        tensors = adapter_tensors(model)
        exports.append(Export(path=to / "adapter", serve_command=serve_command(served(config, model_dir), to / "adapter")))
        with world.agreed():
            if world.is_first:
                export_adapter(tensors, model_dir, tokenizer, config, exports[-1])
                certify_adapter(tensors, live_MV, model_dir, config, exports[-1].path, probe)
    if merge or config.tuning.method == "full":
        exports.append(Export(path=to / "model", serve_command=f"vllm serve {to / 'model'}"))
        export_model(model, model_dir, tokenizer, exports[-1].path, world)
        with world.agreed():
            if world.is_first:
                certify_model(live_MV, model_dir, config, exports[-1].path, probe)
    return exports


def read_probe(path: Path, device: torch.device) -> MicroBatch:
    """The head of the run's proof sample as a micro-batch, every token of it a row, so that logits can be compared everywhere.

    Raises:
        ExportError: if it cannot be read.
    """
    try:
        ids = [piece["id"] for piece in json.loads(path.read_text(encoding="utf-8"))["pieces"]][:PROBE_TOKENS]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path}: cannot be read: {error!r}; run structcot prepare on the run's config to write it again") from error
    return pack([unmasked_sample(np.array(ids), source=str(path))], device)


@torch.no_grad()
def live_logits(model: Decoder, probe: MicroBatch) -> Tensor:
    """What the trained model makes of the probe (M, V), in fp32 on the CPU; all ranks run it, since each holds a part."""
    model.eval()
    logits_MV = model(probe, logits=True)
    free_unsharded(model)
    return logits_MV.cpu()


if __name__ == "__main__":
    from structcot.cli import run_command

    run_command("export")
