from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Blocks(_message.Message):
    __slots__ = ("hashes", "block_ids", "after_steps", "tenant", "quota_pieces")
    HASHES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    AFTER_STEPS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    QUOTA_PIECES_FIELD_NUMBER: _ClassVar[int]
    hashes: _containers.RepeatedScalarFieldContainer[bytes]
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    after_steps: int
    tenant: bytes
    quota_pieces: int
    def __init__(self, hashes: _Optional[_Iterable[bytes]] = ..., block_ids: _Optional[_Iterable[int]] = ..., after_steps: _Optional[int] = ..., tenant: _Optional[bytes] = ..., quota_pieces: _Optional[int] = ...) -> None: ...

class PublishRequest(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: Blocks
    def __init__(self, blocks: _Optional[_Union[Blocks, _Mapping]] = ...) -> None: ...

class PublishResponse(_message.Message):
    __slots__ = ("committed_pieces",)
    COMMITTED_PIECES_FIELD_NUMBER: _ClassVar[int]
    committed_pieces: int
    def __init__(self, committed_pieces: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("blocks", "limit_s")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LIMIT_S_FIELD_NUMBER: _ClassVar[int]
    blocks: Blocks
    limit_s: float
    def __init__(self, blocks: _Optional[_Union[Blocks, _Mapping]] = ..., limit_s: _Optional[float] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("good_blocks",)
    GOOD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    good_blocks: int
    def __init__(self, good_blocks: _Optional[int] = ...) -> None: ...

class GetWorkRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Work(_message.Message):
    __slots__ = ("stage", "num_steps", "compute_s", "collective_s", "pipeline_s", "collective_bytes", "pipeline_bytes", "fetched_bytes", "published_bytes")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVE_S_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_S_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FETCHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    stage: int
    num_steps: int
    compute_s: float
    collective_s: float
    pipeline_s: float
    collective_bytes: int
    pipeline_bytes: int
    fetched_bytes: int
    published_bytes: int
    def __init__(self, stage: _Optional[int] = ..., num_steps: _Optional[int] = ..., compute_s: _Optional[float] = ..., collective_s: _Optional[float] = ..., pipeline_s: _Optional[float] = ..., collective_bytes: _Optional[int] = ..., pipeline_bytes: _Optional[int] = ..., fetched_bytes: _Optional[int] = ..., published_bytes: _Optional[int] = ...) -> None: ...
