"""vLLM's engine: admission, cached blocks that are kept apart, passes, and reports on their way back."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import lru_cache, wraps
from typing import Any

from mnemoscope.interventions import Binding
from mnemoscope.runs.errors import InputError
from mnemoscope.serving.asking import ADMITTED, FIELDS, Asked, admit, key_of_block, parse
from mnemoscope.serving.offered import Offered, binding_of
from mnemoscope.serving.worker import Steerer

ENVIRONMENT = "MNEMOSCOPE_RUN"
# Kinds of models whose blocks return their state, or two parts of which it is the sum. Others keep a residual that is
# added already, leave parts of a sum to later ranks, or skip tokens (`tests/test_vllm.py` tries these).
TRIED = ("gemma2", "gemma3_text", "gpt2", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3")


def wrapped(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace ``owner.name`` by ``around(original, *args, **kwargs)``."""
    original = getattr(owner, name)

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(owner, name, call)


def install() -> None:
    """Put everything in place, once a process."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import RequestState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    wrapped(AsyncLLM, "__init__", _served)
    wrapped(EngineArgs, "create_engine_config", _configured)
    wrapped(InputProcessor, "__init__", _begun)
    wrapped(InputProcessor, "process_inputs", _admitted)
    wrapped(EngineCore, "preprocess_add_request", _checked)
    for module in (kv_cache_utils, block_pool):  # which has it under a name of its own
        wrapped(module, "generate_block_hash_extra_keys", _keyed)
    wrapped(Worker, "load_model", _loaded)
    wrapped(GPUModelRunner, "execute_model", _executed)
    wrapped(GPUModelRunner, "_model_forward", _passed)
    wrapped(GPUModelRunner, "sample_tokens", _reported)
    wrapped(Scheduler, "update_from_output", _sent)
    wrapped(RequestState, "make_request_output", _told)
    made = RequestState.from_new_request.__func__

    @wraps(made)
    def from_new_request(cls: Any, *args: Any, **kwargs: Any) -> Any:
        state = made(cls, *args, **kwargs)
        request = kwargs.get("request") or args[1]
        params = request.sampling_params
        state.mnemoscope_asked = bool(params and (params.extra_args or {}).get(ADMITTED))
        state.mnemoscope = None
        return state

    RequestState.from_new_request = classmethod(from_new_request)


def refusal(error: InputError) -> Exception:
    """vLLM's own kind of error for a wrong request, which is a 400 over HTTP."""
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(str(error), parameter=str(error).partition(":")[0])


def offered_by(config: Any) -> Offered | None:
    """What an engine has, by its configuration, in any of its processes."""
    given = config.additional_config.get(ADMITTED) if isinstance(config.additional_config, dict) else None
    return _opened(given["run"], Binding(**given["binding"])) if isinstance(given, dict) else None


_here: list[Offered | None] = [None]


def offered_here() -> Offered | None:
    """What the engine of this process has, where requests come in."""
    return _here[0]


def refuse_unoffered(given: Mapping[str, Any]) -> None:
    """Raises InputError for a request that asks an engine that has nothing; other plugins may use the other names."""
    for name in ("steer", ADMITTED):
        if name in given:
            raise InputError(f"{name}: this server has no vectors; start it with {ENVIRONMENT}=RUN")


def _served(begin: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """The engine of a server: only there are the routes needed, whose modules take seconds to import."""
    from mnemoscope.serving import http

    http.install()
    return begin(self, *args, **kwargs)


def _begun(begin: Callable[..., Any], self: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
    """The part of an engine where requests come in."""
    _here[0] = offered_by(config)
    return begin(self, config, *args, **kwargs)


@lru_cache(maxsize=4)
def _opened(run: str, binding: Binding) -> Offered:
    return Offered.open(run, binding)


def _configured(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The configuration of an engine, with what it offers; InputError where it would skip hooks."""
    config = make(*args, **kwargs)
    extra = config.additional_config if isinstance(config.additional_config, dict) else {}
    source = extra.get(ADMITTED) or os.environ.get(ENVIRONMENT)
    if source and not isinstance(source, str):
        raise InputError(f"{ADMITTED}: {source!r} is no path of a run (additional_config)")
    if source:
        check_engine(config)
        binding = binding_of(config.model_config.model)
        offered = _opened(str(source), binding)
        parallel = config.parallel_config.tensor_parallel_size
        sites = [*(v.site for v in offered.vectors.values()), *(d.site for d in offered.detectors.values())]
        for site in sites if parallel > 1 else ():
            if site in ("neuron", "head"):
                raise InputError(f"site: {site!r} is split in tensor parallelism; allowed are block, attention, mlp")
        config.additional_config = {**extra, ADMITTED: {"run": str(source), "binding": asdict(binding)}}
    return config


def check_engine(config: Any) -> None:
    """Raises InputError for what would skip or mislead the hooks, or was not tried; the setting is named."""
    parallel, compilation, model = config.parallel_config, config.compilation_config, config.model_config
    kind, cache = model.hf_text_config.model_type, config.cache_config
    backend = getattr(model.model_impl, "value", model.model_impl)
    loading = getattr(config.load_config.load_format, "value", config.load_config.load_format)
    wrong = {
        "model_type": (kind not in TRIED, f"{kind} was not tried; allowed are {', '.join(TRIED)}"),
        "model_impl": (backend not in ("auto", "vllm"), "was not tried; allowed is vllm"),
        "kv_sharing_fast_prefill": (cache.kv_sharing_fast_prefill, "skips tokens in some layers; leave it out"),
        "VLLM_USE_RUST_FRONTEND": (
            os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"),
            "checks no request; leave it out",
        ),
        "load_format": (loading not in ("auto", "safetensors"), "was not tried; allowed are auto, safetensors"),
        "revision": (model.revision is not None, "vectors are bound to a folder's weights; give a folder"),
        "tokenizer": (model.tokenizer != model.model, "vectors are bound to the model's own; leave it out"),
        "hf_overrides": (bool(model.hf_overrides), "changes the model that vectors were fitted on; leave it out"),
        "enforce_eager": (
            not model.enforce_eager,
            "false: compiled passes and CUDA graphs skip hooks; set it",
        ),
        "compilation_config": (int(compilation.mode or 0) != 0, "compiled passes skip hooks; leave it out"),
        "VLLM_USE_V2_MODEL_RUNNER": (config.use_v2_model_runner, "model runner 2 was not tried; set it to 0"),
        "pipeline_parallel_size": (parallel.pipeline_parallel_size > 1, "was not tried; allowed is 1"),
        "data_parallel_size": (parallel.data_parallel_size > 1, "was not tried; allowed is 1"),
        "enable_dbo": (parallel.enable_dbo, "passes in two halves were not tried; leave it out"),
        "speculative_config": (config.speculative_config is not None, "was not tried; leave it out"),
        "kv_transfer_config": (config.kv_transfer_config is not None, "other caches do not keep steered values apart"),
        "quantization": (model.quantization is not None, "was not tried; leave it out"),
        "runner": (model.runner_type != "generate", "allowed is generate"),
    }
    for name, (is_wrong, why) in wrong.items():
        if is_wrong:
            raise InputError(f"{name}: {why} (needed by {ENVIRONMENT})")


def _admitted(process: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """A request for the engine, checked, with its settings filled in; refused as vLLM refuses."""
    request = process(self, *args, **kwargs)
    params = request.sampling_params
    try:
        offered = offered_by(self.vllm_config)
        if offered is None:
            refuse_unoffered((params and params.extra_args) or {})
        asked = parse(params.extra_args) if offered and params else None
        if offered is None or asked is None:
            return request
        field = next(name for name in FIELDS if name in params.extra_args)
        for name, there in (
            ("lora_request", request.lora_request),
            ("multi_modal_data", request.mm_features),
            ("resumable", request.resumable),
        ):
            if there:
                raise InputError(f"{name}: was not tried together with {field}; leave one of them out")
        facts = _facts_of(request, asked, offered)
    except InputError as error:
        raise refusal(error) from None
    params.extra_args = {**params.extra_args, ADMITTED: facts}
    return request


def _checked(preprocess: Callable[..., Any], self: Any, request: Any) -> Any:
    """Refuse a request in the engine that was not admitted as it asks: its front end does not know this plugin."""
    extra = dict((request.sampling_params.extra_args if request.sampling_params else None) or {})
    offered, facts = offered_by(self.vllm_config), extra.pop(ADMITTED, None)
    try:
        asked = parse(extra) if offered else None
        wanted = _facts_of(request, asked, offered) if offered and asked else None
        if facts != wanted:
            field = next((name for name in FIELDS if name in extra), ADMITTED)
            raise InputError(f"{field}: the request was not admitted")
    except InputError as error:
        raise refusal(error) from None
    return preprocess(self, request)


def _facts_of(request: Any, asked: Asked, offered: Offered) -> dict[str, Any]:
    """What a request is admitted with; InputError where it cannot be served as asked."""
    prompt = request.prompt_token_ids if request.prompt_embeds is None else None
    length = len(request.prompt_token_ids if prompt is not None else request.prompt_embeds)
    return admit(asked, offered, prompt, length).facts()


def _keyed(generate: Callable[..., Any], request: Any, start: int, end: int, first: int) -> Any:
    """Extra keys of a cached block, with ours where a shift touched it."""
    keys, after = generate(request, start, end, first)
    params = request.sampling_params
    if params is None or not params.extra_args or ADMITTED not in params.extra_args:
        return keys, after
    ours = key_of_block(params.extra_args, end)
    return ((*(keys or ()), ours) if ours else keys), after


def _loaded(load: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Load a worker's model, and hang the hooks."""
    done = load(self, *args, **kwargs)
    offered = offered_by(self.vllm_config)
    runner = self.model_runner
    runner.mnemoscope = Steerer(offered, runner.get_model(), self.device) if offered else None
    return done


def _executed(execute: Callable[..., Any], self: Any, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
    """A step of a worker, which forgets requests that have ended."""
    if steerer := getattr(self, "mnemoscope", None):
        steerer.forget(scheduled.finished_req_ids)
        self.mnemoscope_counts = scheduled.num_scheduled_tokens
    return execute(self, scheduled, *args, **kwargs)


def _passed(forward: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """The pass of a step, with its rows known to the hooks."""
    steerer = getattr(self, "mnemoscope", None)
    if steerer is None:
        return forward(self, *args, **kwargs)
    batch = self.input_batch
    names, size = list(batch.req_ids), batch.num_reqs
    steerer.begin(
        names,
        lambda name: getattr(self.requests[name].sampling_params, "extra_args", None),
        self.query_start_loc.np[:size].tolist(),
        [self.mnemoscope_counts[name] for name in names],
        batch.num_computed_tokens_cpu[:size].tolist(),
    )
    try:
        output = forward(self, *args, **kwargs)
    except BaseException:
        steerer.now = None
        raise
    steerer.end()
    return output


def _reported(sample: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """The output of a step, with reports on its requests."""
    steerer = getattr(self, "mnemoscope", None)
    is_step = self.execute_model_state is not None
    output = sample(self, *args, **kwargs)
    if steerer and is_step and (reports := steerer.reports()):
        getattr(output, "_model_runner_output", output).mnemoscope = reports
    return output


def _sent(update: Callable[..., Any], self: Any, scheduled: Any, output: Any) -> Any:
    """What a scheduler sends to front ends, with reports on requests in the outputs of these."""
    sent = update(self, scheduled, output)
    reports = getattr(output, "mnemoscope", None) or {}
    for outputs in sent.values() if reports else ():
        for one in outputs.outputs:
            if one.request_id in reports:
                one.kv_transfer_params = {**(one.kv_transfer_params or {}), ADMITTED: reports[one.request_id]}
    return sent


def _told(make: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """The output that a user gets, with the report as ``mnemoscope``.

    Raises RuntimeError where a request that asked is answered without one: no worker knows this plugin.
    """
    given = list(args)
    carried = given[4] if len(given) > 4 else kwargs.get("kv_transfer_params")
    if carried and ADMITTED in carried:
        self.mnemoscope = carried[ADMITTED]
        rest = {name: value for name, value in carried.items() if name != ADMITTED} or None
        if len(given) > 4:
            given[4] = rest
        else:
            kwargs["kv_transfer_params"] = rest
    if self.mnemoscope_asked and self.mnemoscope is None and given and given[0]:
        raise RuntimeError("mnemoscope: a request that asked for steering or reading was answered without it")
    made = make(self, *given, **kwargs)
    if made is not None:
        made.mnemoscope = self.mnemoscope
    return made
