from batonpb import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class NodeRequest(_message.Message):
    __slots__ = ("request_id", "token_ids", "num_prompt_tokens", "sampling", "salt", "kv_quota_bytes", "priority", "prompt_logprobs")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    KV_QUOTA_BYTES_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_prompt_tokens: int
    sampling: _common_pb2.SamplingParams
    salt: bytes
    kv_quota_bytes: int
    priority: int
    prompt_logprobs: int
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., num_prompt_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., salt: _Optional[bytes] = ..., kv_quota_bytes: _Optional[int] = ..., priority: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: NodeRequest
    def __init__(self, request: _Optional[_Union[NodeRequest, _Mapping]] = ...) -> None: ...

class PrefillResponse(_message.Message):
    __slots__ = ("token", "finish_reason", "local_hit_tokens", "store_hit_tokens", "queue_s", "compute_s", "coming_blocks", "fetch_s", "prompt_logprobs")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    LOCAL_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STORE_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    COMING_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FETCH_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token: _common_pb2.Token
    finish_reason: _common_pb2.FinishReason
    local_hit_tokens: int
    store_hit_tokens: int
    queue_s: float
    compute_s: float
    coming_blocks: int
    fetch_s: float
    prompt_logprobs: _common_pb2.PromptLogprobs
    def __init__(self, token: _Optional[_Union[_common_pb2.Token, _Mapping]] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., local_hit_tokens: _Optional[int] = ..., store_hit_tokens: _Optional[int] = ..., queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., coming_blocks: _Optional[int] = ..., fetch_s: _Optional[float] = ..., prompt_logprobs: _Optional[_Union[_common_pb2.PromptLogprobs, _Mapping]] = ...) -> None: ...

class Admit(_message.Message):
    __slots__ = ("request", "runs_alone")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    RUNS_ALONE_FIELD_NUMBER: _ClassVar[int]
    request: NodeRequest
    runs_alone: bool
    def __init__(self, request: _Optional[_Union[NodeRequest, _Mapping]] = ..., runs_alone: _Optional[bool] = ...) -> None: ...

class Start(_message.Message):
    __slots__ = ("tokens", "coming_blocks")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMING_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[_common_pb2.Token]
    coming_blocks: int
    def __init__(self, tokens: _Optional[_Iterable[_Union[_common_pb2.Token, _Mapping]]] = ..., coming_blocks: _Optional[int] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("admit", "start")
    ADMIT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    admit: Admit
    start: Start
    def __init__(self, admit: _Optional[_Union[Admit, _Mapping]] = ..., start: _Optional[_Union[Start, _Mapping]] = ...) -> None: ...

class Admitted(_message.Message):
    __slots__ = ("free_blocks",)
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    free_blocks: int
    def __init__(self, free_blocks: _Optional[int] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("tokens", "local_hit_tokens", "store_hit_tokens", "compute_s", "queue_s", "fetch_s", "prompt_logprobs", "finish_reason")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STORE_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    FETCH_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[_common_pb2.Token]
    local_hit_tokens: int
    store_hit_tokens: int
    compute_s: float
    queue_s: float
    fetch_s: float
    prompt_logprobs: _common_pb2.PromptLogprobs
    finish_reason: _common_pb2.FinishReason
    def __init__(self, tokens: _Optional[_Iterable[_Union[_common_pb2.Token, _Mapping]]] = ..., local_hit_tokens: _Optional[int] = ..., store_hit_tokens: _Optional[int] = ..., compute_s: _Optional[float] = ..., queue_s: _Optional[float] = ..., fetch_s: _Optional[float] = ..., prompt_logprobs: _Optional[_Union[_common_pb2.PromptLogprobs, _Mapping]] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("finish_reason",)
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    finish_reason: _common_pb2.FinishReason
    def __init__(self, finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("admitted", "tokens", "finished")
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    admitted: Admitted
    tokens: Tokens
    finished: Finished
    def __init__(self, admitted: _Optional[_Union[Admitted, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Load(_message.Message):
    __slots__ = ("node_id", "incarnation", "role", "num_running", "num_waiting", "queued_prefill_tokens", "free_blocks", "total_blocks", "draining", "steps", "fetches")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    FETCHES_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    incarnation: str
    role: str
    num_running: int
    num_waiting: int
    queued_prefill_tokens: int
    free_blocks: int
    total_blocks: int
    draining: bool
    steps: StepTiming
    fetches: Fetches
    def __init__(self, node_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., role: _Optional[str] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., queued_prefill_tokens: _Optional[int] = ..., free_blocks: _Optional[int] = ..., total_blocks: _Optional[int] = ..., draining: _Optional[bool] = ..., steps: _Optional[_Union[StepTiming, _Mapping]] = ..., fetches: _Optional[_Union[Fetches, _Mapping]] = ...) -> None: ...

class Fetches(_message.Message):
    __slots__ = ("local", "remote", "chosen_fetch_blocks", "chosen_compute_blocks", "num_predictions", "predicted_fetch_s", "predicted_compute_s")
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    REMOTE_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FETCH_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_COMPUTE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_FETCH_S_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    local: Traffic
    remote: Traffic
    chosen_fetch_blocks: int
    chosen_compute_blocks: int
    num_predictions: int
    predicted_fetch_s: float
    predicted_compute_s: float
    def __init__(self, local: _Optional[_Union[Traffic, _Mapping]] = ..., remote: _Optional[_Union[Traffic, _Mapping]] = ..., chosen_fetch_blocks: _Optional[int] = ..., chosen_compute_blocks: _Optional[int] = ..., num_predictions: _Optional[int] = ..., predicted_fetch_s: _Optional[float] = ..., predicted_compute_s: _Optional[float] = ...) -> None: ...

class Traffic(_message.Message):
    __slots__ = ("num_blocks", "num_bytes", "seconds")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    num_bytes: int
    seconds: float
    def __init__(self, num_blocks: _Optional[int] = ..., num_bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class StepTiming(_message.Message):
    __slots__ = ("num_steps", "schedule_s", "build_s", "forward_s", "sample_s", "num_prefill_tokens", "num_prefill_context_tokens", "num_decode_tokens", "num_decode_context_tokens")
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_S_FIELD_NUMBER: _ClassVar[int]
    BUILD_S_FIELD_NUMBER: _ClassVar[int]
    FORWARD_S_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_S_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFILL_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODE_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_steps: int
    schedule_s: float
    build_s: float
    forward_s: float
    sample_s: float
    num_prefill_tokens: int
    num_prefill_context_tokens: int
    num_decode_tokens: int
    num_decode_context_tokens: int
    def __init__(self, num_steps: _Optional[int] = ..., schedule_s: _Optional[float] = ..., build_s: _Optional[float] = ..., forward_s: _Optional[float] = ..., sample_s: _Optional[float] = ..., num_prefill_tokens: _Optional[int] = ..., num_prefill_context_tokens: _Optional[int] = ..., num_decode_tokens: _Optional[int] = ..., num_decode_context_tokens: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("undo",)
    UNDO_FIELD_NUMBER: _ClassVar[int]
    undo: bool
    def __init__(self, undo: _Optional[bool] = ...) -> None: ...
