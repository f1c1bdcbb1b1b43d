from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class AuthorityRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AuthorityReply(_message.Message):
    __slots__ = ("authority",)
    AUTHORITY_FIELD_NUMBER: _ClassVar[int]
    authority: bytes
    def __init__(self, authority: _Optional[bytes] = ...) -> None: ...

class EnrolRequest(_message.Message):
    __slots__ = ("study", "invitation", "secret", "tls_request", "signing_request")
    STUDY_FIELD_NUMBER: _ClassVar[int]
    INVITATION_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    TLS_REQUEST_FIELD_NUMBER: _ClassVar[int]
    SIGNING_REQUEST_FIELD_NUMBER: _ClassVar[int]
    study: str
    invitation: bytes
    secret: bytes
    tls_request: bytes
    signing_request: bytes
    def __init__(self, study: _Optional[str] = ..., invitation: _Optional[bytes] = ..., secret: _Optional[bytes] = ..., tls_request: _Optional[bytes] = ..., signing_request: _Optional[bytes] = ...) -> None: ...

class Certificates(_message.Message):
    __slots__ = ("authority", "tls", "signing", "renewals_port")
    AUTHORITY_FIELD_NUMBER: _ClassVar[int]
    TLS_FIELD_NUMBER: _ClassVar[int]
    SIGNING_FIELD_NUMBER: _ClassVar[int]
    RENEWALS_PORT_FIELD_NUMBER: _ClassVar[int]
    authority: bytes
    tls: bytes
    signing: bytes
    renewals_port: int
    def __init__(self, authority: _Optional[bytes] = ..., tls: _Optional[bytes] = ..., signing: _Optional[bytes] = ..., renewals_port: _Optional[int] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("tls_request", "signing_request")
    TLS_REQUEST_FIELD_NUMBER: _ClassVar[int]
    SIGNING_REQUEST_FIELD_NUMBER: _ClassVar[int]
    tls_request: bytes
    signing_request: bytes
    def __init__(self, tls_request: _Optional[bytes] = ..., signing_request: _Optional[bytes] = ...) -> None: ...

class ConfirmRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ConfirmReply(_message.Message):
    __slots__ = ("not_after",)
    NOT_AFTER_FIELD_NUMBER: _ClassVar[int]
    not_after: str
    def __init__(self, not_after: _Optional[str] = ...) -> None: ...
