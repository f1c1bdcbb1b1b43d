from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TaskKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_KIND_UNSPECIFIED: _ClassVar[TaskKind]
    TRAIN: _ClassVar[TaskKind]
    EVALUATE: _ClassVar[TaskKind]
TASK_KIND_UNSPECIFIED: TaskKind
TRAIN: TaskKind
EVALUATE: TaskKind

class Envelope(_message.Message):
    __slots__ = ("study", "plan_digest", "site")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    study: str
    plan_digest: bytes
    site: str
    def __init__(self, study: _Optional[str] = ..., plan_digest: _Optional[bytes] = ..., site: _Optional[str] = ...) -> None: ...

class TaskName(_message.Message):
    __slots__ = ("kind", "round", "attempt")
    KIND_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    kind: TaskKind
    round: int
    attempt: int
    def __init__(self, kind: _Optional[_Union[TaskKind, str]] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class Blob(_message.Message):
    __slots__ = ("sha256", "size")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    sha256: bytes
    size: int
    def __init__(self, sha256: _Optional[bytes] = ..., size: _Optional[int] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("name", "broadcast", "scalars")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BROADCAST_FIELD_NUMBER: _ClassVar[int]
    SCALARS_FIELD_NUMBER: _ClassVar[int]
    name: TaskName
    broadcast: Blob
    scalars: bytes
    def __init__(self, name: _Optional[_Union[TaskName, _Mapping]] = ..., broadcast: _Optional[_Union[Blob, _Mapping]] = ..., scalars: _Optional[bytes] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("version", "training_cases", "validation_cases", "process")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TRAINING_CASES_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_CASES_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    version: str
    training_cases: int
    validation_cases: int
    process: bytes
    def __init__(self, version: _Optional[str] = ..., training_cases: _Optional[int] = ..., validation_cases: _Optional[int] = ..., process: _Optional[bytes] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("task", "stage", "batch", "batches")
    TASK_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    task: TaskName
    stage: str
    batch: int
    batches: int
    def __init__(self, task: _Optional[_Union[TaskName, _Mapping]] = ..., stage: _Optional[str] = ..., batch: _Optional[int] = ..., batches: _Optional[int] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("task", "reason")
    TASK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    task: TaskName
    reason: str
    def __init__(self, task: _Optional[_Union[TaskName, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class Leaving(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class SecureStep(_message.Message):
    __slots__ = ("task", "session", "content")
    TASK_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    task: TaskName
    session: bytes
    content: bytes
    def __init__(self, task: _Optional[_Union[TaskName, _Mapping]] = ..., session: _Optional[bytes] = ..., content: _Optional[bytes] = ...) -> None: ...

class SiteMessage(_message.Message):
    __slots__ = ("envelope", "hello", "progress", "failure", "leaving", "secure")
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    SECURE_FIELD_NUMBER: _ClassVar[int]
    envelope: Envelope
    hello: Hello
    progress: Progress
    failure: Failure
    leaving: Leaving
    secure: SecureStep
    def __init__(self, envelope: _Optional[_Union[Envelope, _Mapping]] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., leaving: _Optional[_Union[Leaving, _Mapping]] = ..., secure: _Optional[_Union[SecureStep, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("version", "rounds")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    version: str
    rounds: int
    def __init__(self, version: _Optional[str] = ..., rounds: _Optional[int] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Pausing(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class CoordinatorMessage(_message.Message):
    __slots__ = ("envelope", "welcome", "task", "finished", "pausing", "secure")
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    PAUSING_FIELD_NUMBER: _ClassVar[int]
    SECURE_FIELD_NUMBER: _ClassVar[int]
    envelope: Envelope
    welcome: Welcome
    task: Task
    finished: Finished
    pausing: Pausing
    secure: SecureStep
    def __init__(self, envelope: _Optional[_Union[Envelope, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., task: _Optional[_Union[Task, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., pausing: _Optional[_Union[Pausing, _Mapping]] = ..., secure: _Optional[_Union[SecureStep, _Mapping]] = ...) -> None: ...

class DownloadRequest(_message.Message):
    __slots__ = ("envelope", "task", "sha256", "offset")
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    envelope: Envelope
    task: TaskName
    sha256: bytes
    offset: int
    def __init__(self, envelope: _Optional[_Union[Envelope, _Mapping]] = ..., task: _Optional[_Union[TaskName, _Mapping]] = ..., sha256: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class UploadHeader(_message.Message):
    __slots__ = ("envelope", "task", "blob", "timing", "broadcast_sha256", "privacy")
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    BROADCAST_SHA256_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_FIELD_NUMBER: _ClassVar[int]
    envelope: Envelope
    task: TaskName
    blob: Blob
    timing: Timing
    broadcast_sha256: bytes
    privacy: Privacy
    def __init__(self, envelope: _Optional[_Union[Envelope, _Mapping]] = ..., task: _Optional[_Union[TaskName, _Mapping]] = ..., blob: _Optional[_Union[Blob, _Mapping]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., broadcast_sha256: _Optional[bytes] = ..., privacy: _Optional[_Union[Privacy, _Mapping]] = ...) -> None: ...

class Privacy(_message.Message):
    __slots__ = ("epsilon", "delta")
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    epsilon: float
    delta: float
    def __init__(self, epsilon: _Optional[float] = ..., delta: _Optional[float] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("download", "work", "cases")
    DOWNLOAD_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    CASES_FIELD_NUMBER: _ClassVar[int]
    download: float
    work: float
    cases: int
    def __init__(self, download: _Optional[float] = ..., work: _Optional[float] = ..., cases: _Optional[int] = ...) -> None: ...

class UploadMessage(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: UploadHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[UploadHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadReply(_message.Message):
    __slots__ = ("position", "receipt")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    position: int
    receipt: UploadReceipt
    def __init__(self, position: _Optional[int] = ..., receipt: _Optional[_Union[UploadReceipt, _Mapping]] = ...) -> None: ...

class UploadReceipt(_message.Message):
    __slots__ = ("envelope", "task", "accepted", "reason", "again")
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    envelope: Envelope
    task: TaskName
    accepted: bool
    reason: str
    again: bool
    def __init__(self, envelope: _Optional[_Union[Envelope, _Mapping]] = ..., task: _Optional[_Union[TaskName, _Mapping]] = ..., accepted: bool = ..., reason: _Optional[str] = ..., again: bool = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("envelope", "version")
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    envelope: Envelope
    version: str
    def __init__(self, envelope: _Optional[_Union[Envelope, _Mapping]] = ..., version: _Optional[str] = ...) -> None: ...

class FetchMessage(_message.Message):
    __slots__ = ("version", "data")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    version: PublishedVersion
    data: bytes
    def __init__(self, version: _Optional[_Union[PublishedVersion, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class PublishedVersion(_message.Message):
    __slots__ = ("study", "version", "files")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    study: str
    version: str
    files: _containers.RepeatedCompositeFieldContainer[PublishedFile]
    def __init__(self, study: _Optional[str] = ..., version: _Optional[str] = ..., files: _Optional[_Iterable[_Union[PublishedFile, _Mapping]]] = ...) -> None: ...

class PublishedFile(_message.Message):
    __slots__ = ("name", "blob")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    name: str
    blob: Blob
    def __init__(self, name: _Optional[str] = ..., blob: _Optional[_Union[Blob, _Mapping]] = ...) -> None: ...
