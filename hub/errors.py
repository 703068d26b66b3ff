"""The hub's error tree: one class a cause, each with a stable `reason` that callers may match on.

Messages name what the caller gave and what is wrong with it. They never show a path inside the store; a path that
the user typed may be repeated.
"""

from __future__ import annotations


class HubError(Exception):
    """Base of everything the hub raises on purpose."""

    reason = "HUB_ERROR"


class RefInvalid(HubError):
    """A reference or digest is not written as the grammar says (see `hub.refs`)."""

    reason = "REF_INVALID"


class NotFound(HubError):
    """What was named is not in the hub."""

    reason = "NOT_FOUND"


class AdapterNotFound(NotFound):
    """No adapter of this name, or no version with this digest."""

    reason = "ADAPTER_NOT_FOUND"


class VersionNotFound(AdapterNotFound):
    """The adapter exists, this version of it does not."""

    reason = "VERSION_NOT_FOUND"


class AliasNotFound(AdapterNotFound):
    """The adapter exists, this alias of it does not."""

    reason = "ALIAS_NOT_FOUND"


class FileNotInVersion(NotFound):
    """The version has no file of this name."""

    reason = "FILE_NOT_IN_VERSION"


class BlobNotFound(NotFound):
    """The store has no bytes with this digest."""

    reason = "BLOB_NOT_FOUND"


class AliasMoved(HubError):
    """A compare-and-swap was lost: the alias does not hold the version the caller expected."""

    reason = "ALIAS_MOVED"


class BlobCorrupt(HubError):
    """Stored bytes are missing or do not have the digest they are stored under."""

    reason = "BLOB_CORRUPT"


class SignatureMissing(HubError):
    """A version that has to be signed has no signature."""

    reason = "SIGNATURE_MISSING"


class SignatureUntrusted(HubError):
    """A version is signed, but by none of the keys that are trusted."""

    reason = "SIGNATURE_UNTRUSTED"


class SignatureInvalid(HubError):
    """A signature is malformed, is of another version, or does not fit the key it names."""

    reason = "SIGNATURE_INVALID"


class KeyUnusable(HubError):
    """A key file cannot be read, is of another kind than P-256, P-384 or P-521, or needs a passphrase."""

    reason = "KEY_UNUSABLE"


class BundleRefused(HubError):
    """A bundle is damaged, cut short, or not as docs/FORMAT.md says; nothing of it was taken."""

    reason = "BUNDLE_REFUSED"


class VersionClash(HubError):
    """What is to be imported cannot keep its number or its identity: other content is there under it."""

    reason = "VERSION_CLASH"


class HubUnavailable(HubError):
    """The hub cannot be opened, read or written just now: the message says which, and what to do."""

    reason = "HUB_UNAVAILABLE"

    def __init__(self, message: str = "", detail: str | None = None) -> None:
        """`detail` is what a database or gRPC said: its words may name hosts and users, so a server keeps them."""
        super().__init__(message if detail is None else f"{message}: {detail}")
        self.public, self.detail = message, detail


class HubNotFound(HubUnavailable):
    """There is no hub where one is to be read; a push makes it."""

    reason = "HUB_NOT_FOUND"


class HubTooNew(HubUnavailable):
    """A newer release made or migrated the hub: nothing of this one may touch it."""

    reason = "HUB_TOO_NEW"


class NotCached(HubUnavailable):
    """What was asked for is not among the verified copies on this machine; the message names it."""

    reason = "NOT_CACHED"


class HubReadOnly(HubUnavailable):
    """The hub can be read here and not written."""

    reason = "HUB_READ_ONLY"


class StorageUnreachable(HubUnavailable):
    """The service that keeps the hub's files does not answer; what is cached can still be read."""

    reason = "STORAGE_UNREACHABLE"


class StorageRefused(HubUnavailable):
    """The service that keeps the hub's files does not accept the credentials, or not for this."""

    reason = "STORAGE_REFUSED"


class BucketNotFound(HubUnavailable):
    """The S3 bucket that is to keep the hub's files is not there."""

    reason = "BUCKET_NOT_FOUND"


class BlobsSwept(HubError):
    """A sweep took bytes of a push before it was published; the push is made again."""

    reason = "BLOBS_SWEPT"


class VersionHeld(HubError):
    """A version cannot be removed: an alias, a pin or a lease holds it."""

    reason = "VERSION_HELD"


class NotRestorable(HubError):
    """The version is not removed, or it was removed so long ago that its bytes are gone."""

    reason = "NOT_RESTORABLE"


class NothingToRollBack(HubError):
    """The alias held nothing before what it holds now."""

    reason = "NOTHING_TO_ROLL_BACK"


class GateRefused(HubError):
    """A version does not meet what a promotion's gate asks of its metrics."""

    reason = "GATE_REFUSED"


class GateMalformed(HubError):
    """A gate is not written as `hub.gate` says."""

    reason = "GATE_MALFORMED"


class QueryInvalid(HubError):
    """A search condition is not written as `hub.search` says, or weights are not whole numbers in range."""

    reason = "QUERY_INVALID"


class TargetNotEmpty(HubError):
    """`pull` was given a directory that already holds something."""

    reason = "TARGET_NOT_EMPTY"


class SourceError(HubError):
    """Base of what can be wrong with a Hugging Face repository that is read or written."""

    reason = "SOURCE_ERROR"


class SourceInvalid(SourceError):
    """An hf:// address is not written hf://user/repo or hf://user/repo@revision."""

    reason = "SOURCE_INVALID"


class SourceNotFound(SourceError):
    """There is no such repository or revision, or it is not for these credentials."""

    reason = "SOURCE_NOT_FOUND"


class SourceRefused(SourceError):
    """Hugging Face does not accept the credentials, or not for this."""

    reason = "SOURCE_REFUSED"


class SourceUnreachable(SourceError):
    """Hugging Face does not answer."""

    reason = "SOURCE_UNREACHABLE"


class BaseError(HubError):
    """Base of what can be wrong with a base model."""

    reason = "BASE_ERROR"


class BaseNotFound(BaseError):
    """The base model is no built-in name, no directory and no model that can be downloaded."""

    reason = "BASE_NOT_FOUND"


class BaseMalformed(BaseError):
    """The base model's directory lacks its config or its weights, or they cannot be read."""

    reason = "BASE_MALFORMED"


class AdapterRejected(HubError):
    """Base of the reasons for which a directory is not taken as an adapter."""

    reason = "ADAPTER_REJECTED"


class AdapterFileMissing(AdapterRejected):
    """The directory is not there, or lacks adapter_config.json or adapter_model.safetensors."""

    reason = "ADAPTER_FILE_MISSING"


class UnexpectedFile(AdapterRejected):
    """The directory holds something that is no part of an adapter: another file, a folder, a link, an archive."""

    reason = "UNEXPECTED_FILE"


class PickleRefused(AdapterRejected):
    """The directory holds a pickle (.bin, .pt, …), which runs code when loaded."""

    reason = "PICKLE_REFUSED"


class AdapterTooLarge(AdapterRejected):
    """A file is above the hub's size limit for it."""

    reason = "ADAPTER_TOO_LARGE"


class AdapterChanged(AdapterRejected):
    """A file changed between being checked and being stored."""

    reason = "ADAPTER_CHANGED"


class SafetensorsMalformed(AdapterRejected):
    """The weights file breaks a rule of the safetensors format."""

    reason = "SAFETENSORS_MALFORMED"


class DtypeUnsupported(AdapterRejected):
    """A tensor's element type is none of F64, F32, F16, BF16."""

    reason = "DTYPE_UNSUPPORTED"


class ConfigMalformed(AdapterRejected):
    """adapter_config.json is no JSON object, or a value in it has the wrong type or range."""

    reason = "CONFIG_MALFORMED"


class ConfigKeyRefused(AdapterRejected):
    """adapter_config.json has a key that is unknown, runs code, or asks for a method the hub does not take."""

    reason = "CONFIG_KEY_REFUSED"


class PeftTypeUnsupported(AdapterRejected):
    """The adapter is of a PEFT method other than LoRA."""

    reason = "PEFT_TYPE_UNSUPPORTED"


class BaseChangedInit(AdapterRejected):
    """The adapter's initialization changed the base weights, so it does not belong to the base it names."""

    reason = "BASE_CHANGED_INIT"


class RankInvalid(AdapterRejected):
    """A rank is outside 1…4096, in the config, in a pattern or in a tensor."""

    reason = "RANK_INVALID"


class TensorUnknown(AdapterRejected):
    """A tensor has a name that PEFT does not write, or binds to no module of the base."""

    reason = "TENSOR_UNKNOWN"


class TensorMissing(AdapterRejected):
    """A tensor that the config or its partner calls for is not in the file."""

    reason = "TENSOR_MISSING"


class ShapeMismatch(AdapterRejected):
    """A tensor's shape fits neither its partner, the config's rank, nor the base."""

    reason = "SHAPE_MISMATCH"


class NonFinite(AdapterRejected):
    """A tensor holds NaN or an infinity."""

    reason = "NON_FINITE"


class NormAbsurd(AdapterRejected):
    """A tensor's values are so large that only damage or malice explains them."""

    reason = "NORM_ABSURD"


class FactsMalformed(AdapterRejected):
    """loraplex.json is not as docs/FORMAT.md says."""

    reason = "FACTS_MALFORMED"


class ProfileRefused(AdapterRejected):
    """The adapter is sound, but not what this hub's servers take (see `hub.profile`); the message names all of it."""

    reason = "PROFILE_REFUSED"


class BaseMismatch(AdapterRejected):
    """The adapter's own record names another base than the one it is pushed for."""

    reason = "BASE_MISMATCH"


class NotAnAdapter(AdapterRejected):
    """The version is a whole model where an adapter is needed; `hub serve --base` takes it."""

    reason = "NOT_AN_ADAPTER"


class ProfileMalformed(HubError):
    """The hub's own profile.toml is not as `hub.profile` says: nothing is pushed until it is mended."""

    reason = "PROFILE_MALFORMED"


class EvaluationsUnsupported(HubError):
    """The hub keeps no evaluations: its server is of an older release, or it was opened offline."""

    reason = "EVALUATIONS_UNSUPPORTED"


class EvaluationRefused(HubError):
    """What should be kept as an evaluation is no sound record, is of another version, or is one too many."""

    reason = "EVALUATION_REFUSED"


class Unauthenticated(HubError):
    """The shared server does not know the caller: no token, or one that is wrong, expired or revoked."""

    reason = "UNAUTHENTICATED"


class Forbidden(HubError):
    """The caller's token does not grant what was asked, in this namespace; the message names the role it lacks."""

    reason = "FORBIDDEN"


class GrantInvalid(HubError):
    """A grant, a subject or a lifetime is not written as `hub.registry.grants` says."""

    reason = "GRANT_INVALID"


class TokenNotFound(NotFound):
    """There is no token with this id."""

    reason = "TOKEN_NOT_FOUND"


class UploadRefused(HubError):
    """An upload is not what it said it would be: another digest, more bytes than announced, no known file name."""

    reason = "UPLOAD_REFUSED"


class UploadLost(HubError):
    """The server no longer has some bytes of a push that was announced; the client sends them again."""

    reason = "UPLOAD_LOST"


class ServerBusy(HubError):
    """The shared server holds as many watches, uploads or staged bytes as it may; try again later."""

    reason = "SERVER_BUSY"


class CredentialsUnsafe(HubError):
    """A token would be sent unencrypted, or the file it is kept in is open to others; the message says what to do."""

    reason = "CREDENTIALS_UNSAFE"
