from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AdapterVersion(_message.Message):
    __slots__ = ("full_name", "number", "digest", "manifest")
    FULL_NAME_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    full_name: str
    number: int
    digest: str
    manifest: bytes
    def __init__(self, full_name: _Optional[str] = ..., number: _Optional[int] = ..., digest: _Optional[str] = ..., manifest: _Optional[bytes] = ...) -> None: ...

class VersionResponse(_message.Message):
    __slots__ = ("version", "last_seq")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQ_FIELD_NUMBER: _ClassVar[int]
    version: AdapterVersion
    last_seq: int
    def __init__(self, version: _Optional[_Union[AdapterVersion, _Mapping]] = ..., last_seq: _Optional[int] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("namespace", "roles")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ROLES_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    roles: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, namespace: _Optional[str] = ..., roles: _Optional[_Iterable[str]] = ...) -> None: ...

class WhoAmIRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WhoAmIResponse(_message.Message):
    __slots__ = ("subject", "token_id", "grants", "expires", "server_version", "last_seq")
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQ_FIELD_NUMBER: _ClassVar[int]
    subject: str
    token_id: str
    grants: _containers.RepeatedCompositeFieldContainer[Grant]
    expires: float
    server_version: str
    last_seq: int
    def __init__(self, subject: _Optional[str] = ..., token_id: _Optional[str] = ..., grants: _Optional[_Iterable[_Union[Grant, _Mapping]]] = ..., expires: _Optional[float] = ..., server_version: _Optional[str] = ..., last_seq: _Optional[int] = ...) -> None: ...

class ResolveRequest(_message.Message):
    __slots__ = ("ref", "key")
    REF_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    ref: str
    key: str
    def __init__(self, ref: _Optional[str] = ..., key: _Optional[str] = ...) -> None: ...

class GetVersionRequest(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...

class ListVersionsRequest(_message.Message):
    __slots__ = ("pattern",)
    PATTERN_FIELD_NUMBER: _ClassVar[int]
    pattern: str
    def __init__(self, pattern: _Optional[str] = ...) -> None: ...

class SearchRequest(_message.Message):
    __slots__ = ("pattern", "base", "tag", "metrics", "newest", "after_name", "after_number", "limit")
    class MetricTest(_message.Message):
        __slots__ = ("name", "compare", "bound")
        NAME_FIELD_NUMBER: _ClassVar[int]
        COMPARE_FIELD_NUMBER: _ClassVar[int]
        BOUND_FIELD_NUMBER: _ClassVar[int]
        name: str
        compare: str
        bound: float
        def __init__(self, name: _Optional[str] = ..., compare: _Optional[str] = ..., bound: _Optional[float] = ...) -> None: ...
    PATTERN_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    NEWEST_FIELD_NUMBER: _ClassVar[int]
    AFTER_NAME_FIELD_NUMBER: _ClassVar[int]
    AFTER_NUMBER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    pattern: str
    base: str
    tag: str
    metrics: _containers.RepeatedCompositeFieldContainer[SearchRequest.MetricTest]
    newest: bool
    after_name: str
    after_number: int
    limit: int
    def __init__(self, pattern: _Optional[str] = ..., base: _Optional[str] = ..., tag: _Optional[str] = ..., metrics: _Optional[_Iterable[_Union[SearchRequest.MetricTest, _Mapping]]] = ..., newest: _Optional[bool] = ..., after_name: _Optional[str] = ..., after_number: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class VersionsPart(_message.Message):
    __slots__ = ("versions", "more")
    class Found(_message.Message):
        __slots__ = ("version", "aliases")
        VERSION_FIELD_NUMBER: _ClassVar[int]
        ALIASES_FIELD_NUMBER: _ClassVar[int]
        version: AdapterVersion
        aliases: _containers.RepeatedScalarFieldContainer[str]
        def __init__(self, version: _Optional[_Union[AdapterVersion, _Mapping]] = ..., aliases: _Optional[_Iterable[str]] = ...) -> None: ...
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[VersionsPart.Found]
    more: bool
    def __init__(self, versions: _Optional[_Iterable[_Union[VersionsPart.Found, _Mapping]]] = ..., more: _Optional[bool] = ...) -> None: ...

class LineageRequest(_message.Message):
    __slots__ = ("ref",)
    REF_FIELD_NUMBER: _ClassVar[int]
    ref: str
    def __init__(self, ref: _Optional[str] = ...) -> None: ...

class LineagePart(_message.Message):
    __slots__ = ("version", "ancestors", "children", "complete")
    class Ancestor(_message.Message):
        __slots__ = ("digest", "version", "distance", "children")
        DIGEST_FIELD_NUMBER: _ClassVar[int]
        VERSION_FIELD_NUMBER: _ClassVar[int]
        DISTANCE_FIELD_NUMBER: _ClassVar[int]
        CHILDREN_FIELD_NUMBER: _ClassVar[int]
        digest: str
        version: AdapterVersion
        distance: int
        children: _containers.RepeatedScalarFieldContainer[str]
        def __init__(self, digest: _Optional[str] = ..., version: _Optional[_Union[AdapterVersion, _Mapping]] = ..., distance: _Optional[int] = ..., children: _Optional[_Iterable[str]] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ANCESTORS_FIELD_NUMBER: _ClassVar[int]
    CHILDREN_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    version: AdapterVersion
    ancestors: _containers.RepeatedCompositeFieldContainer[LineagePart.Ancestor]
    children: _containers.RepeatedCompositeFieldContainer[AdapterVersion]
    complete: bool
    def __init__(self, version: _Optional[_Union[AdapterVersion, _Mapping]] = ..., ancestors: _Optional[_Iterable[_Union[LineagePart.Ancestor, _Mapping]]] = ..., children: _Optional[_Iterable[_Union[AdapterVersion, _Mapping]]] = ..., complete: _Optional[bool] = ...) -> None: ...

class AliasesRequest(_message.Message):
    __slots__ = ("full_name",)
    FULL_NAME_FIELD_NUMBER: _ClassVar[int]
    full_name: str
    def __init__(self, full_name: _Optional[str] = ...) -> None: ...

class AliasState(_message.Message):
    __slots__ = ("version", "digest", "generation", "targets")
    class Target(_message.Message):
        __slots__ = ("version", "digest", "weight")
        VERSION_FIELD_NUMBER: _ClassVar[int]
        DIGEST_FIELD_NUMBER: _ClassVar[int]
        WEIGHT_FIELD_NUMBER: _ClassVar[int]
        version: int
        digest: str
        weight: int
        def __init__(self, version: _Optional[int] = ..., digest: _Optional[str] = ..., weight: _Optional[int] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    version: int
    digest: str
    generation: int
    targets: _containers.RepeatedCompositeFieldContainer[AliasState.Target]
    def __init__(self, version: _Optional[int] = ..., digest: _Optional[str] = ..., generation: _Optional[int] = ..., targets: _Optional[_Iterable[_Union[AliasState.Target, _Mapping]]] = ...) -> None: ...

class AliasesResponse(_message.Message):
    __slots__ = ("aliases",)
    class AliasesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: AliasState
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[AliasState, _Mapping]] = ...) -> None: ...
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    aliases: _containers.MessageMap[str, AliasState]
    def __init__(self, aliases: _Optional[_Mapping[str, AliasState]] = ...) -> None: ...

class ReadFileRequest(_message.Message):
    __slots__ = ("digest", "filename", "offset")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FILENAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    digest: str
    filename: str
    offset: int
    def __init__(self, digest: _Optional[str] = ..., filename: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class FileChunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class PushedFile(_message.Message):
    __slots__ = ("name", "sha256", "bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: str
    bytes: int
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class BeginPushRequest(_message.Message):
    __slots__ = ("ref", "files")
    REF_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    ref: str
    files: _containers.RepeatedCompositeFieldContainer[PushedFile]
    def __init__(self, ref: _Optional[str] = ..., files: _Optional[_Iterable[_Union[PushedFile, _Mapping]]] = ...) -> None: ...

class BeginPushResponse(_message.Message):
    __slots__ = ("missing",)
    class Missing(_message.Message):
        __slots__ = ("name", "offset")
        NAME_FIELD_NUMBER: _ClassVar[int]
        OFFSET_FIELD_NUMBER: _ClassVar[int]
        name: str
        offset: int
        def __init__(self, name: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...
    MISSING_FIELD_NUMBER: _ClassVar[int]
    missing: _containers.RepeatedCompositeFieldContainer[BeginPushResponse.Missing]
    def __init__(self, missing: _Optional[_Iterable[_Union[BeginPushResponse.Missing, _Mapping]]] = ...) -> None: ...

class UploadRequest(_message.Message):
    __slots__ = ("begin", "data")
    class Begin(_message.Message):
        __slots__ = ("ref", "file", "offset")
        REF_FIELD_NUMBER: _ClassVar[int]
        FILE_FIELD_NUMBER: _ClassVar[int]
        OFFSET_FIELD_NUMBER: _ClassVar[int]
        ref: str
        file: PushedFile
        offset: int
        def __init__(self, ref: _Optional[str] = ..., file: _Optional[_Union[PushedFile, _Mapping]] = ..., offset: _Optional[int] = ...) -> None: ...
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    begin: UploadRequest.Begin
    data: bytes
    def __init__(self, begin: _Optional[_Union[UploadRequest.Begin, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadResponse(_message.Message):
    __slots__ = ("bytes",)
    BYTES_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    def __init__(self, bytes: _Optional[int] = ...) -> None: ...

class BaseIdentity(_message.Message):
    __slots__ = ("name", "revision", "fingerprint", "quantization")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    revision: str
    fingerprint: str
    quantization: str
    def __init__(self, name: _Optional[str] = ..., revision: _Optional[str] = ..., fingerprint: _Optional[str] = ..., quantization: _Optional[str] = ...) -> None: ...

class PublishRequest(_message.Message):
    __slots__ = ("ref", "files", "base", "aliases", "parents", "creator")
    REF_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    CREATOR_FIELD_NUMBER: _ClassVar[int]
    ref: str
    files: _containers.RepeatedCompositeFieldContainer[PushedFile]
    base: BaseIdentity
    aliases: _containers.RepeatedScalarFieldContainer[str]
    parents: _containers.RepeatedScalarFieldContainer[str]
    creator: str
    def __init__(self, ref: _Optional[str] = ..., files: _Optional[_Iterable[_Union[PushedFile, _Mapping]]] = ..., base: _Optional[_Union[BaseIdentity, _Mapping]] = ..., aliases: _Optional[_Iterable[str]] = ..., parents: _Optional[_Iterable[str]] = ..., creator: _Optional[str] = ...) -> None: ...

class PublishResponse(_message.Message):
    __slots__ = ("version", "created", "warnings")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    version: AdapterVersion
    created: bool
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[_Union[AdapterVersion, _Mapping]] = ..., created: _Optional[bool] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class SignRequest(_message.Message):
    __slots__ = ("digest", "signature")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    digest: str
    signature: bytes
    def __init__(self, digest: _Optional[str] = ..., signature: _Optional[bytes] = ...) -> None: ...

class SignResponse(_message.Message):
    __slots__ = ("added",)
    ADDED_FIELD_NUMBER: _ClassVar[int]
    added: bool
    def __init__(self, added: _Optional[bool] = ...) -> None: ...

class SignaturesRequest(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...

class SignaturesResponse(_message.Message):
    __slots__ = ("signatures",)
    SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    signatures: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, signatures: _Optional[_Iterable[bytes]] = ...) -> None: ...

class EvaluationRecord(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: bytes
    def __init__(self, json: _Optional[bytes] = ...) -> None: ...

class AddEvaluationRequest(_message.Message):
    __slots__ = ("digest", "record")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    digest: str
    record: EvaluationRecord
    def __init__(self, digest: _Optional[str] = ..., record: _Optional[_Union[EvaluationRecord, _Mapping]] = ...) -> None: ...

class AddEvaluationResponse(_message.Message):
    __slots__ = ("record",)
    RECORD_FIELD_NUMBER: _ClassVar[int]
    record: EvaluationRecord
    def __init__(self, record: _Optional[_Union[EvaluationRecord, _Mapping]] = ...) -> None: ...

class ListEvaluationsRequest(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...

class EvaluationsPart(_message.Message):
    __slots__ = ("records",)
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[EvaluationRecord]
    def __init__(self, records: _Optional[_Iterable[_Union[EvaluationRecord, _Mapping]]] = ...) -> None: ...

class AdoptRequest(_message.Message):
    __slots__ = ("begin", "arrival")
    class Begin(_message.Message):
        __slots__ = ("renumber", "aliases")
        RENUMBER_FIELD_NUMBER: _ClassVar[int]
        ALIASES_FIELD_NUMBER: _ClassVar[int]
        renumber: bool
        aliases: _containers.RepeatedCompositeFieldContainer[AdoptRequest.Alias]
        def __init__(self, renumber: _Optional[bool] = ..., aliases: _Optional[_Iterable[_Union[AdoptRequest.Alias, _Mapping]]] = ...) -> None: ...
    class Alias(_message.Message):
        __slots__ = ("full_name", "alias", "targets")
        FULL_NAME_FIELD_NUMBER: _ClassVar[int]
        ALIAS_FIELD_NUMBER: _ClassVar[int]
        TARGETS_FIELD_NUMBER: _ClassVar[int]
        full_name: str
        alias: str
        targets: _containers.RepeatedCompositeFieldContainer[AliasState.Target]
        def __init__(self, full_name: _Optional[str] = ..., alias: _Optional[str] = ..., targets: _Optional[_Iterable[_Union[AliasState.Target, _Mapping]]] = ...) -> None: ...
    class Arrival(_message.Message):
        __slots__ = ("number", "manifest", "signatures")
        NUMBER_FIELD_NUMBER: _ClassVar[int]
        MANIFEST_FIELD_NUMBER: _ClassVar[int]
        SIGNATURES_FIELD_NUMBER: _ClassVar[int]
        number: int
        manifest: bytes
        signatures: _containers.RepeatedScalarFieldContainer[bytes]
        def __init__(self, number: _Optional[int] = ..., manifest: _Optional[bytes] = ..., signatures: _Optional[_Iterable[bytes]] = ...) -> None: ...
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_FIELD_NUMBER: _ClassVar[int]
    begin: AdoptRequest.Begin
    arrival: AdoptRequest.Arrival
    def __init__(self, begin: _Optional[_Union[AdoptRequest.Begin, _Mapping]] = ..., arrival: _Optional[_Union[AdoptRequest.Arrival, _Mapping]] = ...) -> None: ...

class AdoptResponse(_message.Message):
    __slots__ = ("adopted",)
    class Adopted(_message.Message):
        __slots__ = ("version", "number", "outcome", "signatures_added")
        VERSION_FIELD_NUMBER: _ClassVar[int]
        NUMBER_FIELD_NUMBER: _ClassVar[int]
        OUTCOME_FIELD_NUMBER: _ClassVar[int]
        SIGNATURES_ADDED_FIELD_NUMBER: _ClassVar[int]
        version: AdapterVersion
        number: int
        outcome: str
        signatures_added: int
        def __init__(self, version: _Optional[_Union[AdapterVersion, _Mapping]] = ..., number: _Optional[int] = ..., outcome: _Optional[str] = ..., signatures_added: _Optional[int] = ...) -> None: ...
    ADOPTED_FIELD_NUMBER: _ClassVar[int]
    adopted: _containers.RepeatedCompositeFieldContainer[AdoptResponse.Adopted]
    def __init__(self, adopted: _Optional[_Iterable[_Union[AdoptResponse.Adopted, _Mapping]]] = ...) -> None: ...

class TagRequest(_message.Message):
    __slots__ = ("targets", "alias", "expect", "split")
    class Target(_message.Message):
        __slots__ = ("ref", "weight")
        REF_FIELD_NUMBER: _ClassVar[int]
        WEIGHT_FIELD_NUMBER: _ClassVar[int]
        ref: str
        weight: int
        def __init__(self, ref: _Optional[str] = ..., weight: _Optional[int] = ...) -> None: ...
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    EXPECT_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    targets: _containers.RepeatedCompositeFieldContainer[TagRequest.Target]
    alias: str
    expect: int
    split: bool
    def __init__(self, targets: _Optional[_Iterable[_Union[TagRequest.Target, _Mapping]]] = ..., alias: _Optional[str] = ..., expect: _Optional[int] = ..., split: _Optional[bool] = ...) -> None: ...

class AliasResponse(_message.Message):
    __slots__ = ("state", "version")
    STATE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    state: AliasState
    version: AdapterVersion
    def __init__(self, state: _Optional[_Union[AliasState, _Mapping]] = ..., version: _Optional[_Union[AdapterVersion, _Mapping]] = ...) -> None: ...

class PromoteRequest(_message.Message):
    __slots__ = ("ref", "alias", "require", "no_lower", "no_higher", "scores")
    class Slack(_message.Message):
        __slots__ = ("metric", "slack")
        METRIC_FIELD_NUMBER: _ClassVar[int]
        SLACK_FIELD_NUMBER: _ClassVar[int]
        metric: str
        slack: float
        def __init__(self, metric: _Optional[str] = ..., slack: _Optional[float] = ...) -> None: ...
    class Scores(_message.Message):
        __slots__ = ("candidate", "current", "current_digest", "source")
        class CandidateEntry(_message.Message):
            __slots__ = ("key", "value")
            KEY_FIELD_NUMBER: _ClassVar[int]
            VALUE_FIELD_NUMBER: _ClassVar[int]
            key: str
            value: float
            def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
        class CurrentEntry(_message.Message):
            __slots__ = ("key", "value")
            KEY_FIELD_NUMBER: _ClassVar[int]
            VALUE_FIELD_NUMBER: _ClassVar[int]
            key: str
            value: float
            def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
        CANDIDATE_FIELD_NUMBER: _ClassVar[int]
        CURRENT_FIELD_NUMBER: _ClassVar[int]
        CURRENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
        SOURCE_FIELD_NUMBER: _ClassVar[int]
        candidate: _containers.ScalarMap[str, float]
        current: _containers.ScalarMap[str, float]
        current_digest: str
        source: str
        def __init__(self, candidate: _Optional[_Mapping[str, float]] = ..., current: _Optional[_Mapping[str, float]] = ..., current_digest: _Optional[str] = ..., source: _Optional[str] = ...) -> None: ...
    REF_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    REQUIRE_FIELD_NUMBER: _ClassVar[int]
    NO_LOWER_FIELD_NUMBER: _ClassVar[int]
    NO_HIGHER_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    ref: str
    alias: str
    require: _containers.RepeatedCompositeFieldContainer[SearchRequest.MetricTest]
    no_lower: _containers.RepeatedCompositeFieldContainer[PromoteRequest.Slack]
    no_higher: _containers.RepeatedCompositeFieldContainer[PromoteRequest.Slack]
    scores: PromoteRequest.Scores
    def __init__(self, ref: _Optional[str] = ..., alias: _Optional[str] = ..., require: _Optional[_Iterable[_Union[SearchRequest.MetricTest, _Mapping]]] = ..., no_lower: _Optional[_Iterable[_Union[PromoteRequest.Slack, _Mapping]]] = ..., no_higher: _Optional[_Iterable[_Union[PromoteRequest.Slack, _Mapping]]] = ..., scores: _Optional[_Union[PromoteRequest.Scores, _Mapping]] = ...) -> None: ...

class PromoteResponse(_message.Message):
    __slots__ = ("version", "before", "passed")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    PASSED_FIELD_NUMBER: _ClassVar[int]
    version: AdapterVersion
    before: AdapterVersion
    passed: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[_Union[AdapterVersion, _Mapping]] = ..., before: _Optional[_Union[AdapterVersion, _Mapping]] = ..., passed: _Optional[_Iterable[str]] = ...) -> None: ...

class AliasRequest(_message.Message):
    __slots__ = ("full_name", "alias", "expect")
    FULL_NAME_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    EXPECT_FIELD_NUMBER: _ClassVar[int]
    full_name: str
    alias: str
    expect: int
    def __init__(self, full_name: _Optional[str] = ..., alias: _Optional[str] = ..., expect: _Optional[int] = ...) -> None: ...

class RefRequest(_message.Message):
    __slots__ = ("ref",)
    REF_FIELD_NUMBER: _ClassVar[int]
    ref: str
    def __init__(self, ref: _Optional[str] = ...) -> None: ...

class SweepRequest(_message.Message):
    __slots__ = ("retention_seconds", "grace_seconds", "dry_run")
    RETENTION_SECONDS_FIELD_NUMBER: _ClassVar[int]
    GRACE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    retention_seconds: float
    grace_seconds: float
    dry_run: bool
    def __init__(self, retention_seconds: _Optional[float] = ..., grace_seconds: _Optional[float] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class SweepResponse(_message.Message):
    __slots__ = ("purged", "blobs", "leftovers", "bytes")
    PURGED_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    LEFTOVERS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    purged: _containers.RepeatedScalarFieldContainer[str]
    blobs: int
    leftovers: int
    bytes: int
    def __init__(self, purged: _Optional[_Iterable[str]] = ..., blobs: _Optional[int] = ..., leftovers: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class LeaseRequest(_message.Message):
    __slots__ = ("ref", "holder", "seconds")
    REF_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    ref: str
    holder: str
    seconds: float
    def __init__(self, ref: _Optional[str] = ..., holder: _Optional[str] = ..., seconds: _Optional[float] = ...) -> None: ...

class LeaseResponse(_message.Message):
    __slots__ = ("full_name", "version", "holder", "expires")
    FULL_NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    full_name: str
    version: int
    holder: str
    expires: float
    def __init__(self, full_name: _Optional[str] = ..., version: _Optional[int] = ..., holder: _Optional[str] = ..., expires: _Optional[float] = ...) -> None: ...

class ReleaseLeaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListLeasesRequest(_message.Message):
    __slots__ = ("full_name",)
    FULL_NAME_FIELD_NUMBER: _ClassVar[int]
    full_name: str
    def __init__(self, full_name: _Optional[str] = ...) -> None: ...

class ListLeasesResponse(_message.Message):
    __slots__ = ("leases",)
    LEASES_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedCompositeFieldContainer[LeaseResponse]
    def __init__(self, leases: _Optional[_Iterable[_Union[LeaseResponse, _Mapping]]] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("seq", "kind", "full_name", "alias", "version", "digest", "time", "actor", "before", "after", "note", "batch")
    class Held(_message.Message):
        __slots__ = ("targets",)
        TARGETS_FIELD_NUMBER: _ClassVar[int]
        targets: _containers.RepeatedCompositeFieldContainer[AliasState.Target]
        def __init__(self, targets: _Optional[_Iterable[_Union[AliasState.Target, _Mapping]]] = ...) -> None: ...
    SEQ_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    FULL_NAME_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    seq: int
    kind: str
    full_name: str
    alias: str
    version: int
    digest: str
    time: str
    actor: str
    before: Event.Held
    after: Event.Held
    note: str
    batch: int
    def __init__(self, seq: _Optional[int] = ..., kind: _Optional[str] = ..., full_name: _Optional[str] = ..., alias: _Optional[str] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., time: _Optional[str] = ..., actor: _Optional[str] = ..., before: _Optional[_Union[Event.Held, _Mapping]] = ..., after: _Optional[_Union[Event.Held, _Mapping]] = ..., note: _Optional[str] = ..., batch: _Optional[int] = ...) -> None: ...

class EventsRequest(_message.Message):
    __slots__ = ("since_seq", "limit", "full_name")
    SINCE_SEQ_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    FULL_NAME_FIELD_NUMBER: _ClassVar[int]
    since_seq: int
    limit: int
    full_name: str
    def __init__(self, since_seq: _Optional[int] = ..., limit: _Optional[int] = ..., full_name: _Optional[str] = ...) -> None: ...

class EventsResponse(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[Event]
    def __init__(self, events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("since_seq",)
    SINCE_SEQ_FIELD_NUMBER: _ClassVar[int]
    since_seq: int
    def __init__(self, since_seq: _Optional[int] = ...) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("event",)
    EVENT_FIELD_NUMBER: _ClassVar[int]
    event: Event
    def __init__(self, event: _Optional[_Union[Event, _Mapping]] = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ("kind", "ref")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[CheckRequest.Kind]
        KIND_VERIFY: _ClassVar[CheckRequest.Kind]
        KIND_FSCK: _ClassVar[CheckRequest.Kind]
    KIND_UNSPECIFIED: CheckRequest.Kind
    KIND_VERIFY: CheckRequest.Kind
    KIND_FSCK: CheckRequest.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    REF_FIELD_NUMBER: _ClassVar[int]
    kind: CheckRequest.Kind
    ref: str
    def __init__(self, kind: _Optional[_Union[CheckRequest.Kind, str]] = ..., ref: _Optional[str] = ...) -> None: ...

class CheckPart(_message.Message):
    __slots__ = ("progress", "problem")
    class Progress(_message.Message):
        __slots__ = ("what", "done", "total")
        WHAT_FIELD_NUMBER: _ClassVar[int]
        DONE_FIELD_NUMBER: _ClassVar[int]
        TOTAL_FIELD_NUMBER: _ClassVar[int]
        what: str
        done: int
        total: int
        def __init__(self, what: _Optional[str] = ..., done: _Optional[int] = ..., total: _Optional[int] = ...) -> None: ...
    class Problem(_message.Message):
        __slots__ = ("version", "file", "reason", "message")
        VERSION_FIELD_NUMBER: _ClassVar[int]
        FILE_FIELD_NUMBER: _ClassVar[int]
        REASON_FIELD_NUMBER: _ClassVar[int]
        MESSAGE_FIELD_NUMBER: _ClassVar[int]
        version: str
        file: str
        reason: str
        message: str
        def __init__(self, version: _Optional[str] = ..., file: _Optional[str] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    progress: CheckPart.Progress
    problem: CheckPart.Problem
    def __init__(self, progress: _Optional[_Union[CheckPart.Progress, _Mapping]] = ..., problem: _Optional[_Union[CheckPart.Problem, _Mapping]] = ...) -> None: ...

class CreateTokenRequest(_message.Message):
    __slots__ = ("subject", "grants", "lifetime_seconds")
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    subject: str
    grants: _containers.RepeatedCompositeFieldContainer[Grant]
    lifetime_seconds: float
    def __init__(self, subject: _Optional[str] = ..., grants: _Optional[_Iterable[_Union[Grant, _Mapping]]] = ..., lifetime_seconds: _Optional[float] = ...) -> None: ...

class TokenInfo(_message.Message):
    __slots__ = ("id", "subject", "grants", "created", "created_by", "expires", "revoked", "revoked_by")
    ID_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    CREATED_BY_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    REVOKED_BY_FIELD_NUMBER: _ClassVar[int]
    id: str
    subject: str
    grants: _containers.RepeatedCompositeFieldContainer[Grant]
    created: float
    created_by: str
    expires: float
    revoked: float
    revoked_by: str
    def __init__(self, id: _Optional[str] = ..., subject: _Optional[str] = ..., grants: _Optional[_Iterable[_Union[Grant, _Mapping]]] = ..., created: _Optional[float] = ..., created_by: _Optional[str] = ..., expires: _Optional[float] = ..., revoked: _Optional[float] = ..., revoked_by: _Optional[str] = ...) -> None: ...

class CreateTokenResponse(_message.Message):
    __slots__ = ("token", "secret")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    token: TokenInfo
    secret: str
    def __init__(self, token: _Optional[_Union[TokenInfo, _Mapping]] = ..., secret: _Optional[str] = ...) -> None: ...

class ListTokensRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTokensResponse(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[TokenInfo]
    def __init__(self, tokens: _Optional[_Iterable[_Union[TokenInfo, _Mapping]]] = ...) -> None: ...

class RevokeTokenRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class RevokeTokenResponse(_message.Message):
    __slots__ = ("token",)
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    token: TokenInfo
    def __init__(self, token: _Optional[_Union[TokenInfo, _Mapping]] = ...) -> None: ...
