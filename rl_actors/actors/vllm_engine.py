"""One vLLM engine behind an async door: many requests in flight, one thread that steps it.

Training rollouts and the Serve deployment both use this class, so that nothing differs between the two. Callers await
`generate` from any event loop; `call` runs a function on the engine thread between steps (weight updates, probes).
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from rl_actors.contracts import AttestationError, Completion, EngineError, Routes, SamplingParams

Shapes = Mapping[str, tuple[int, ...]]
_MAX_NAMED = 3
_ENGINE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # on CPU the first call would compile for 20 s
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in-process: weights arrive by reference from the object store
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
_RECORDING_ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "1"}  # the only runner that records routes; it needs a GPU


def checkpoint_shapes(directory: str | Path) -> Shapes:
    """Return name -> shape of all tensors of a safetensors checkpoint, from its headers; nothing for other formats."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def require_complete(weights: Mapping[str, torch.Tensor], shapes: Shapes) -> None:
    """Refuse a publish that would leave a tensor at its old value, before anything is touched.

    Raises:
        AttestationError: A tensor of the checkpoint is missing, or has another shape.
    """
    if missing := sorted(shapes.keys() - weights.keys()):
        rest = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
        names = ", ".join(missing[:_MAX_NAMED]) + rest
        raise AttestationError(f"{len(missing)} tensors were not published and would stay old: {names}")
    for name, shape in sorted(shapes.items()):
        found = tuple(weights[name].shape)
        if found != shape:
            raise AttestationError(f"{name} was published with shape {found}, the engine was loaded with {shape}")


@dataclass(frozen=True, slots=True)
class _Command:
    """A call for the engine's thread, and the future of its caller: it is run or failed, never forgotten."""

    run: Callable[[], None]
    done: Future[Any]


class VllmEngine:
    """A vLLM engine on its own thread.

    Raises:
        EngineError: From any call after the engine thread died; the message holds the first cause.
    """

    def __init__(
        self,
        model_path: str,
        *,
        max_model_len: int,
        max_num_seqs: int = 64,
        transfer_backend: str | None = None,
        record_routes: bool = False,
    ) -> None:
        """Load the model and start the thread; returns when the engine can generate.

        With `record_routes` every completion carries the experts its tokens visited. vLLM records them on a GPU only.
        """
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._waiting: dict[str, Future[Completion]] = {}
        self._num_requests = 0
        self._failure: BaseException | None = None
        self._has_ended, self._ending = False, threading.Lock()
        self.weights_version = 0
        self._shapes = checkpoint_shapes(model_path)
        self._llm: Any = None
        loaded: Future[Any] = Future()
        num_threads = torch.get_num_threads()
        load = partial(_load, model_path, max_model_len, max_num_seqs, transfer_backend, record_routes, num_threads)
        # Loaded on the thread that steps it: vLLM's CPU attention dies when two threads differ in OpenMP threads.
        self._thread = threading.Thread(target=self._run, args=(load, loaded), name="vllm-engine", daemon=True)
        self._thread.start()
        self._llm = loaded.result()

    async def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """Sample one completion; failed requests never come back as data, cancelled ones leave the engine."""
        done: Future[Completion] = Future()
        self._submit(_Command(lambda: self._add_request(tuple(prompt_token_ids), sampling, done), done))
        try:
            return await asyncio.wrap_future(done)
        except asyncio.CancelledError:
            # An engine that has ended has nothing left to abort.
            with suppress(EngineError):
                self._submit(_Command(lambda: self._abort_request(done), Future()))
            raise

    def call(self, function: Callable[[], Any], timeout_s: float = 120.0) -> Any:
        """Run `function` on the engine thread between two steps and return its result."""
        done: Future[Any] = Future()
        self._submit(_Command(lambda: _settle(done, function), done))
        try:
            return done.result(timeout_s)
        except TimeoutError:
            raise EngineError(f"the vLLM engine did not answer within {timeout_s:.0f} s") from None

    def publish(self, weights: Mapping[str, torch.Tensor], weights_version: int) -> None:
        """Load new weights and drop the prefix cache. Call only with no request in flight.

        Raises:
            AttestationError: A tensor is missing or has another shape; the engine goes on with the weights it has.
            EngineError: Requests are in flight; or loading broke half-way, and the engine has ended.
        """
        self.call(lambda: self._publish(weights, weights_version))

    def probe_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return log p(token t | tokens before it) for t = 1.. of each sequence, as this engine computes it.

        Raises:
            EngineError: Requests are in flight: the probe would take their output for its own.
        """
        return self.call(lambda: self._probe(sequences))

    def close(self) -> None:
        """Stop the thread and fail what still waits; idempotent."""
        self._commands.put(None)
        # Bounded: an engine that hangs in a kernel must not hold up the exit of its process.
        self._thread.join(timeout=10.0)

    def _submit(self, command: _Command) -> None:
        with self._ending:
            if self._has_ended:
                raise EngineError(f"the vLLM engine is dead: {self._failure!r}")
            self._commands.put(command)

    def _run(self, load: Callable[[], Any], loaded: Future[Any]) -> None:
        """Load the engine, hand it over, and step while there is work, until closed or broken; then fail what waits."""
        _settle(loaded, load)
        self._failure = loaded.exception()
        try:
            if self._failure is None:
                self._llm = loaded.result()
            # Looked at twice: a publish that broke half-way ends the engine before its next step.
            while self._failure is None and self._take_commands():
                if self._waiting and self._failure is None:
                    self._step()
        except BaseException as error:  # noqa: BLE001 - the thread's last word must reach every waiter
            self._failure = error
        self._end(self._failure or EngineError("the vLLM engine was closed"))

    def _take_commands(self) -> bool:
        """Run every queued command; block when idle. Returns False when asked to stop."""
        block = not self._waiting
        while True:
            try:
                command = self._commands.get(block=block)
            except queue.Empty:
                return True
            if command is None:
                return False
            command.run()
            block = False

    def _end(self, error: BaseException) -> None:
        """Refuse what comes later, and fail what waits: in the engine, and in the queue behind the closing mark."""
        # Under the lock: a command is either refused or in the queue when it is emptied below.
        with self._ending:
            self._has_ended = True
        waiting, self._waiting = list(self._waiting.values()), {}
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None and command.done.set_running_or_notify_cancel():
                waiting.append(command.done)
        for done in waiting:
            done.set_exception(EngineError(f"the vLLM engine stopped: {error!r}"))

    def _add_request(self, prompt: tuple[int, ...], sampling: SamplingParams, done: Future[Completion]) -> None:
        if not done.set_running_or_notify_cancel():
            return  # given up before its turn; from here on it can no longer be cancelled, only aborted
        self._num_requests += 1
        request_id = str(self._num_requests)
        try:
            self._llm.llm_engine.add_request(request_id, {"prompt_token_ids": list(prompt)}, _vllm_params(sampling))
        except Exception as error:  # noqa: BLE001 - vLLM refuses this one request; whoever waits must hear of it
            done.set_exception(EngineError(f"request refused: {error}"))
            return
        self._waiting[request_id] = done

    def _abort_request(self, done: Future[Completion]) -> None:
        """Take a request nobody waits for out of the engine: its slot belongs to others."""
        for request_id in [name for name, future in self._waiting.items() if future is done]:
            self._llm.llm_engine.abort_request([request_id])
            del self._waiting[request_id]

    def _step(self) -> None:
        for output in self._llm.llm_engine.step():
            if output.finished and output.request_id in self._waiting:
                completion = self._completion(output)  # should it raise, its caller is still among those to be told
                self._waiting.pop(output.request_id).set_result(completion)

    def _completion(self, output: Any) -> Completion:
        sampled = output.outputs[0]
        return Completion(
            token_ids=tuple(sampled.token_ids),
            logprobs=tuple(_chosen_logprobs(sampled.token_ids, sampled.logprobs)),
            weights_version=self.weights_version,
            finished=sampled.finish_reason == "stop",
            cached_tokens=output.num_cached_tokens or 0,
            routes=_routes(output),
        )

    def _publish(self, weights: Mapping[str, torch.Tensor], weights_version: int) -> None:
        self._require_idle("publish weights")
        require_complete(weights, self._shapes)
        try:
            self._llm.start_weight_update()
            self._llm.update_weights({"update_info": {"named_tensors": weights}})
            self._llm.finish_weight_update(weight_version=str(weights_version))
            self._llm.llm_engine.reset_prefix_cache()
        except Exception as error:
            self._failure = error  # half old, half new: nothing this engine says can be believed any more
            raise EngineError(f"weights version {weights_version} broke the engine half-way: {error!r}") from error
        self.weights_version = weights_version

    def _probe(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        from vllm import SamplingParams as VllmSamplingParams

        self._require_idle("probe")
        params = VllmSamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        prompts = [{"prompt_token_ids": list(sequence)} for sequence in sequences]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        # The first token has nothing before it, and so no probability.
        return [_chosen_logprobs(output.prompt_token_ids[1:], output.prompt_logprobs[1:]) for output in outputs]

    def _require_idle(self, what: str) -> None:
        if self._waiting:
            raise EngineError(f"{len(self._waiting)} requests in flight: {what} between rollouts only")


def _settle(done: Future[Any], function: Callable[[], Any]) -> None:
    """Run a command; what it raises belongs to its caller, not to the engine thread."""
    if not done.set_running_or_notify_cancel():
        return
    try:
        done.set_result(function())
    except Exception as error:  # noqa: BLE001 - re-raised in the caller's thread
        done.set_exception(error)


def _load(
    model_path: str,
    max_model_len: int,
    max_num_seqs: int,
    transfer_backend: str | None,
    record_routes: bool,
    num_threads: int,
) -> Any:
    """Import vLLM under the right environment and load the model."""
    # A thread begins with the process's OpenMP default, not with what its maker has set for itself.
    torch.set_num_threads(num_threads)
    for key, value in (_ENGINE_ENVIRONMENT | (_RECORDING_ENVIRONMENT if record_routes else {})).items():
        os.environ.setdefault(key, value)
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    from rl_actors.actors.weight_sync import BACKEND, register_transfer_engine

    register_transfer_engine()
    return LLM(
        model_path,
        dtype="float32" if not torch.cuda.is_available() else "auto",
        enforce_eager=not torch.cuda.is_available(),
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        enable_prefix_caching=True,
        # A seeded request whose prefill is split kills the engine on CPU: vLLM rewinds a CUDA generator's offset.
        enable_chunked_prefill=False,
        max_num_batched_tokens=max(8192, max_model_len),
        disable_log_stats=True,
        logprobs_mode="processed_logprobs",  # of the distribution that was sampled from, temperature included
        seed=0,
        weight_transfer_config=WeightTransferConfig(backend=transfer_backend or BACKEND),
        enable_return_routed_experts=record_routes,
    )


def _vllm_params(sampling: SamplingParams) -> Any:
    """Translate to vLLM's own parameters; sampled logprobs are always asked for."""
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.sampling_params import RequestOutputKind

    return VllmSamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        seed=sampling.seed,
        logprobs=0,
        stop_token_ids=list(sampling.stop_token_ids),
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _routes(output: Any) -> Routes:
    """Return what the engine recorded: one row for each token it read, [tokens, layers, experts]; empty without it.

    Raises:
        EngineError: A row is missing: the routes of the rest would belong to other tokens.
    """
    found = output.outputs[0].routed_experts
    if found is None:
        return Routes()
    num_read = len(output.prompt_token_ids) + len(output.outputs[0].token_ids) - 1
    if len(found) != num_read:
        raise EngineError(f"the engine recorded routes of {len(found)} tokens and read {num_read}")
    return Routes(num_layers=found.shape[1], top_k=found.shape[2], experts=tuple(found.ravel().tolist()))


def _chosen_logprobs(token_ids: Sequence[int], entries: Sequence[Any]) -> list[float]:
    """Return the log-probability of each token out of the engine's candidates at its place."""
    return [entry[token].logprob for token, entry in zip(token_ids, entries, strict=True)]
