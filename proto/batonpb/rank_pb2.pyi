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
