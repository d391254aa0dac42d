"""The engine that a config asks for. Each is imported when it is opened, since each needs packages of its own."""

from __future__ import annotations

from structcot.eval.config import EvalConfig
from structcot.eval.engine import Engine
from structcot.eval.subject import Subject


def open_engine(subject: Subject, config: EvalConfig) -> Engine:
    """Load a model, or find its server.

    Raises:
        ConfigError: if the engine is not installed, or cannot take the model or a value.
        ModelError: if the model cannot be used.
    """
    if config.engine == "openai":
        from structcot.eval.remote import open_server

        server = config.server
        return open_server(
            server.url,
            subject.model,
            concurrency=server.concurrency,
            key_variable=server.key,
            timeout_seconds=server.timeout_seconds,
            max_retries=server.max_retries,
        )
    if config.engine == "vllm":
        from structcot.eval.vllm_engine import open_vllm

        return open_vllm(subject.model, adapter=subject.adapter, dtype=config.dtype, **config.vllm.model_dump())
    from structcot.eval.embedded import open_embedded

    return open_embedded(subject.model, revision=config.revision, adapter=subject.adapter, dtype=config.dtype, batch_size=config.batch_size)
