"""vLLM's engine: admission, cached blocks that are kept apart, passes, and reports on their way back."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, lru_cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import numpy as np

from mnemoscope.interventions import Binding, Toward
from mnemoscope.models import load_model
from mnemoscope.runs.errors import InputError
from mnemoscope.serving import http, metrics
from mnemoscope.serving.admission import (
    ADMITTED,
    COPIES,
    ENVIRONMENT,
    FIELDS,
    QUANTIZATION,
    TOKENS,
    Admitted,
    Offered,
    admit,
    key_of_block,
    parse,
    refuse_unoffered,
)
from mnemoscope.serving.http import wrapped
from mnemoscope.serving.worker import OPERATOR, Steerer

CARRIER = 3  # place of ``kv_transfer_params``, behind the new tokens, among the arguments of ``make_request_output``
# Kinds of models whose blocks return their state, or two parts of which it is the sum. Others keep a residual that is
# added already, leave parts of a sum to later ranks, or skip tokens (`tests/test_vllm.py` tries these).
TRIED = ("gemma2", "gemma3_text", "gpt2", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3")


@cache
def install() -> None:
    """Put everything in place, once a process."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    wrapped(EngineArgs, "create_engine_config", _configured)
    wrapped(AsyncLLM, "__init__", _served)
    wrapped(InputProcessor, "process_inputs", _admitted)
    wrapped(OutputProcessor, "add_request", _awaited)
    for module in (kv_cache_utils, block_pool):  # which has it under a name of its own
        wrapped(module, "generate_block_hash_extra_keys", _keyed)
    wrapped(Worker, "load_model", _loaded)
    wrapped(GPUModelRunner, "sample_tokens", _reported)
    wrapped(Scheduler, "update_from_output", _sent)
    wrapped(RequestState, "make_request_output", _told)


def offered_by(config: Any) -> Offered | None:
    """What an engine has, by its configuration, in any of its processes."""
    given = config.additional_config.get(ADMITTED) if isinstance(config.additional_config, dict) else None
    if not isinstance(given, dict):
        return None
    run, digest, quantization = (given[name] for name in ("run", "digest", "quantization"))
    return _opened(run, Binding(**given["binding"]), config.lora_config is not None, digest, quantization)


@lru_cache(maxsize=4)
def _opened(run: str, binding: Binding, adapters: bool, digest: str, quantization: str | None) -> Offered:
    offered = replace(Offered.open(run, binding, adapters), quantization=quantization)
    if offered.digest != digest:
        raise InputError(f"{ENVIRONMENT}: {run} has changed since the server began to start")
    return offered


@cache
def _copies() -> Path:
    """A folder of this process for copies of adapters, as long as it runs."""
    folder = Path(mkdtemp(prefix="mnemoscope-"))
    atexit.register(rmtree, folder, ignore_errors=True)
    return folder


def adapter_of(offered: Offered, admitted: Admitted) -> Any:
    """The engine's own request for an adapter of a strength, loaded from a copy; its name keys cached blocks."""
    from vllm.lora.request import LoRARequest

    toward, alpha = Toward.of(admitted.steer), admitted.alpha
    name = f"{ADMITTED}-{offered.digest[:16]}-{toward.direction}-{alpha:g}"
    if not (folder := _copies() / name).exists():
        offered.levers[toward]["adapter"].scaled(alpha).save(folder)
    # Numbers that no adapter of a server's own has, the same in each of its processes.
    return LoRARequest(name, 2**20 + len(COPIES) * list(Toward).index(toward) + COPIES.index(alpha), str(folder))


def _served(begin: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    """The engine of a server: only there are the routes needed, whose modules take seconds to import."""
    begin(self, *args, **kwargs)
    http.install(offered_by(self.vllm_config))


def _configured(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The configuration of an engine, with what it offers; InputError where it would skip hooks."""
    config = make(*args, **kwargs)
    extra = config.additional_config if isinstance(config.additional_config, dict) else {}
    source = extra.get(ADMITTED) or os.environ.get(ENVIRONMENT)
    if source and not isinstance(source, str):
        raise InputError(f"{ADMITTED}: {source!r} is no path of a run (additional_config)")
    if source:
        check_engine(config)
        binding = Binding.of(*load_model(config.model_config.model, dtype="auto"))  # opened once, as it was saved
        offered = Offered.open(source, binding, config.lora_config is not None)
        sites = {getattr(one, "site", "") for one in offered.artefacts.values()}
        for site in sites & {"neuron", "head"} if config.parallel_config.tensor_parallel_size > 1 else ():
            raise InputError(f"site: {site!r} is split in tensor parallelism; allowed are block, attention, mlp")
        check_adapters(config, [named["adapter"] for named in offered.levers.values() if "adapter" in named])
        between_graphs(config.compilation_config)
        how = (config.model_config.hf_overrides or {}).get(QUANTIZATION)
        told = {"run": source, "binding": asdict(binding), "digest": offered.digest, "quantization": how}
        config.additional_config = {**extra, ADMITTED: told}
    return config


def check_adapters(config: Any, adapters: list[Any]) -> None:
    """Raises InputError where the engine cannot hold adapters that steer."""
    rank = max((len(down_KI) for one in adapters for down_KI, _ in one.parts.values()), default=0)
    if adapters and rank > config.lora_config.max_lora_rank:
        raise InputError(f"max_lora_rank: {config.lora_config.max_lora_rank}; allowed is {rank} or more")
    # On CPUs vLLM 0.32 adds the adapter of the last place to requests without any, unless that place is empty.
    places = len(adapters) * len(COPIES) + 1
    if adapters and config.device_config.device_type == "cpu" and config.lora_config.max_loras < places:
        why = f"adapters of {len(COPIES)} strengths, and a place that stays empty, as requests without one get the last"
        raise InputError(f"max_loras: {config.lora_config.max_loras}; allowed on a CPU is {places} or more: {why}")


def between_graphs(compiling: Any) -> None:
    """Let a compiler that cuts a model into graphs cut it at our operator, as at attention: what it does is looked up
    when it runs, which a replayed graph would not do. A graph of a whole pass becomes several.
    """
    if compiling.splitting_ops:
        compiling.splitting_ops = [*compiling.splitting_ops, OPERATOR]
    if compiling.cudagraph_mode:
        pieces = compiling.splitting_ops and not compiling.cudagraph_mode.has_full_cudagraphs()
        compiling.cudagraph_mode = type(compiling.cudagraph_mode)["PIECEWISE" if compiling.splitting_ops else "NONE"]
        kept = "" if pieces else f"; CUDA graphs are {compiling.cudagraph_mode.name}"
        logging.getLogger("vllm.mnemoscope").warning("compiled passes with CUDA graphs were never run%s", kept)


def check_engine(config: Any) -> None:
    """Raises InputError for what skips hooks, misleads them, or was not tried."""
    parallel, model = config.parallel_config, config.model_config
    backend, loading = (getattr(one, "value", one) for one in (model.model_impl, config.load_config.load_format))
    # Several ranks would quantize a part of the weights each; those of GPT-2 are no linear layers in transformers.
    alike = parallel.tensor_parallel_size == 1 and model.hf_text_config.model_type != "gpt2"
    given = model.hf_overrides if isinstance(model.hf_overrides, dict) else {}
    online = alike and model.quantization == "torchao" and set(given) == {QUANTIZATION}
    for name, found, *allowed in (
        ("model_type", model.hf_text_config.model_type, *TRIED),
        ("model_impl", backend, "auto", "vllm"),
        ("kv_sharing_fast_prefill", config.cache_config.kv_sharing_fast_prefill, False),
        ("VLLM_USE_RUST_FRONTEND", os.environ.get("VLLM_USE_RUST_FRONTEND") or "0", "0"),
        ("load_format", loading, "auto", "safetensors"),
        # Vectors are bound to the weights and the tokenizer of a folder.
        ("revision", model.revision, None),
        ("tokenizer", model.tokenizer, model.model),
        ("quantization", None if online else model.quantization, None, f"torchao by {QUANTIZATION} on one rank"),
        ("hf_overrides", (not online and model.hf_overrides) or None, None),
        ("use_inductor_graph_partition", config.compilation_config.use_inductor_graph_partition, False),
        ("VLLM_USE_V2_MODEL_RUNNER", int(config.use_v2_model_runner), 0),
        ("pipeline_parallel_size", parallel.pipeline_parallel_size, 1),
        ("data_parallel_size", parallel.data_parallel_size, 1),
        ("enable_dbo", parallel.enable_dbo, False),
        ("speculative_config", config.speculative_config, None),
        ("kv_transfer_config", config.kv_transfer_config, None),
        ("runner", model.runner_type, "generate"),
    ):
        if found not in allowed:
            only = f"allowed with {ENVIRONMENT} are {', '.join(map(str, allowed))}"
            raise InputError(f"{name}: {found} skips or misleads steering, or was not tried with it; {only}")


def _admitted(process: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """A request for the engine, checked, with its settings filled in; refused as vLLM refuses."""
    request = process(self, *args, **kwargs)
    params, offered = request.sampling_params, offered_by(self.vllm_config)
    given = (params and params.extra_args) or {}
    try:
        if offered is None:
            refuse_unoffered(given)
        elif asked := parse(given):
            for name in ("lora_request", "mm_features", "resumable"):
                if getattr(request, name):
                    fields = ", ".join(field for field in FIELDS if field in given)
                    raise InputError(f"{name}: was not tried together with {fields}; leave one of them out")
            prompt = request.prompt_token_ids if request.prompt_embeds is None else None
            length = len(request.prompt_embeds if prompt is None else prompt)
            if asked.read == TOKENS and params.n > 1:
                raise InputError(f"n: {params.n}; with read: {TOKENS} allowed is 1")
            words = self.tokenizer.decode(prompt) if asked.document and prompt else None
            admitted = admit(asked, offered, prompt, length, words, http.deciding.get())
            params.extra_args = {**given, ADMITTED: asdict(admitted)}
            if admitted.adapted:
                request.lora_request = adapter_of(offered, admitted)
    except InputError as error:
        metrics.count_refused()
        raise http.refusal(error) from None
    return request


def _keyed(generate: Callable[..., Any], request: Any, start: int, end: int, first: int) -> Any:
    """Extra keys of a cached block, with ours where a shift touched it."""
    keys, after = generate(request, start, end, first)
    params = request.sampling_params
    ours = key_of_block(params.extra_args if params else None, end)
    return ((*(keys or ()), ours) if ours else keys), after


def _awaited(add: Callable[..., Any], self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
    """The state of a request where its answer is awaited, which knows whether a report must come with it."""
    add(self, request, *args, **kwargs)
    params = request.sampling_params
    if state := self.request_states.get(request.request_id):  # not of inputs that have ended
        state.mnemoscope_asked = bool(params and ADMITTED in (params.extra_args or {}))


def _loaded(load: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Load a worker's model, and hang the hooks."""
    done = load(self, *args, **kwargs)
    if offered := offered_by(self.vllm_config):
        runner = self.model_runner
        runner.mnemoscope = Steerer(offered, runner.get_model(), self.device, lambda: _pass_of(runner))
    return done


def _pass_of(runner: Any) -> tuple[Any, ...]:
    """What the next pass holds, as ``Steerer.begin`` takes it."""
    batch, size = runner.input_batch, runner.input_batch.num_reqs
    counts = np.diff(runner.query_start_loc.np[: size + 1])
    return list(batch.req_ids), runner.requests, counts, batch.num_computed_tokens_cpu[:size], runner.input_ids.gpu


def _reported(sample: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """The output of a step, with reports on its requests."""
    steerer, step = getattr(self, ADMITTED, None), self.execute_model_state
    if step is not None and steerer and steerer.writing:
        steerer.writing.see(step.logits)
    output = sample(self, *args, **kwargs)
    followed = steerer.followed.items() if steerer and step is not None else ()
    reports = {name: told for name, one in followed if (told := one.told())}
    if reports:
        getattr(output, "_model_runner_output", output).mnemoscope = reports
    return output


def _sent(update: Callable[..., Any], self: Any, scheduled: Any, output: Any) -> Any:
    """What a scheduler sends to front ends, with reports on requests in the outputs of these."""
    sent, reports = update(self, scheduled, output), getattr(output, ADMITTED, None) or {}
    for one in (one for outputs in sent.values() for one in outputs.outputs if one.request_id in reports):
        one.kv_transfer_params = {**(one.kv_transfer_params or {}), ADMITTED: reports[one.request_id]}
    return sent


def _told(make: Callable[..., Any], self: Any, new_token_ids: Any, *args: Any, **kwargs: Any) -> Any:
    """The output that a user gets, with the report as ``mnemoscope``.

    Raises RuntimeError where a request that asked is answered without one: no worker knows this plugin.
    """
    if len(args) > CARRIER and args[CARRIER] and ADMITTED in args[CARRIER]:
        before, self.mnemoscope = getattr(self, ADMITTED, None) or {}, args[CARRIER][ADMITTED]
        if TOKENS in self.mnemoscope:  # what was read since
            before.setdefault(TOKENS, []).extend(self.mnemoscope[TOKENS])
            self.mnemoscope = self.mnemoscope | {TOKENS: before[TOKENS]}
        rest = {name: value for name, value in args[CARRIER].items() if name != ADMITTED}
        args = (*args[:CARRIER], rest or None, *args[CARRIER + 1 :])
    report = getattr(self, ADMITTED, None)
    if self.mnemoscope_asked and report is None and new_token_ids:
        raise RuntimeError("mnemoscope: a request that asked for steering or reading was answered without it")
    made = make(self, new_token_ids, *args, **kwargs)
    if made is not None:
        made.mnemoscope = report
    return made
