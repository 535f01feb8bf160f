"""Fields that clients send and that change nothing here: taken, so that the clients work, or refused by name. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic.config import JsonDict

from router.errors import InvalidRequest

# Fields that OpenAI has and that make no difference here, whatever they hold.
IGNORED = frozenset(
    "user store metadata service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "spaces_between_special_tokens".split()
)
# Fields that are taken with the values that mean what is done anyhow; null is always one.
IDLE: Mapping[str, tuple[object, ...]] = {
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "functions": (),
    "function_call": (),
    "reasoning_effort": (),
    "verbosity": (),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": (),
    "mm_processor_kwargs": (),
    "prompt_embeds": (),
    "truncate_prompt_tokens": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "return_token_strs": (False,),
    "guided_grammar": (),
    "guided_whitespace_pattern": (),
    "guided_decoding_backend": (),
    "logits_processors": ([],),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
    "cache_salt": (),
    "thinking_token_budget": (),
    "truncation_side": (),
    "logprob_token_ids": (),
    "return_token_offsets": (False,),
    "return_mm_kwargs": (True,),
    "media_io_kwargs": (),
    "stream_interval": (),
    "repetition_detection": (),
    "routed_experts_prompt_start": (0,),
    "ec_transfer_params": (),
    "watermarking": (),
    # There is no parser of reasoning here, so it is text like any other, as it is in servers that run without one.
    "include_reasoning": (True, False),
    "separate_reasoning": (True, False),
    "stream_reasoning": (True, False),
    # SGLang's, which its clients and its router send with each request.
    "session_params": ({},),
    "return_hidden_states": (False,),
    "return_cached_tokens_details": (False,),
    "lora_path": (),
    "ebnf": (),
    "stop_regex": ([],),
    "sampling_seed": (),
    "custom_logit_processor": (),
    "custom_params": ({},),
    "extra_key": (),
    "bootstrap_host": (),
    "bootstrap_port": (),
    "bootstrap_room": (),
    "data_parallel_rank": (),
    "use_audio_in_video": (False,),
}


def is_idle(name: str, value: object) -> bool:
    """Whether a field that no model has makes no difference. Raises `InvalidRequest` for one that would."""
    if name in IGNORED:
        return True
    if name not in IDLE:
        raise InvalidRequest(name[:64], "is no argument that is known here")
    if value is not None and value not in IDLE[name]:
        only = f"; only {', '.join(map(str, IDLE[name]))}" if IDLE[name] else ""
        raise InvalidRequest(name, f"is not supported{only}")
    return True


def show_idle(schema: JsonDict) -> None:
    """Adds them to the schema of a request."""
    properties = schema["properties"]
    assert isinstance(properties, dict)
    for name in sorted(IGNORED):
        properties[name] = {"description": "Taken and ignored."}
    for name, values in sorted(IDLE.items()):
        properties.setdefault(name, {"enum": [None, *values]})  # type: ignore[list-item]
