"""Every error that nestpatch raises on purpose, grouped by what is at fault.

NestpatchError
├── PackError                the .nest file
│   ├── PackFormatError          its bytes or its manifest break the format (docs/nest-format.md)
│   ├── PackTooNewError          it uses a newer version of the format
│   └── PackContentError         it parses, but its tensors or facts contradict each other
├── CheckpointError          the model on disk
│   ├── CheckpointFormatError    a broken, truncated or unsupported file
│   ├── BaseMismatchError        a sound model, but not the base of the pack
│   ├── UnsupportedModelError    an architecture without a supported MLP
│   ├── QuantizationError        a quantized type whose rows cannot be written, or would lose the patch
│   ├── ExtractionError          two models whose difference is not a pack
│   ├── RestorationError         models from which no pack that restores one can be made
│   └── ParityError              an exported model that computes something else than its source
├── GuardError               the guard of a fine-tune
│   ├── GuardFormatError         a file that is no guard, or a broken one
│   └── GuardMismatchError       a model that the guard is not for
├── OutputError              the output path
│   ├── InPlaceError             the model's own files cannot be changed in place
│   └── BusyError                another process is writing this model
├── StateError               the state that nestpatch keeps beside a model
│   ├── LedgerError              a broken ledger
│   ├── InterruptedChangeError   an interrupted change left its journal
│   ├── JournalError             a journal that does not fit the model
│   │   └── ForeignJournalError      a journal that neither this machine nor a signed pack confirms
│   └── UndoError                a missing or broken undo record
├── ChainError               versions and packs that do not go together
│   ├── DowngradeError           an older version than the applied one
│   ├── OverlapError             two packs that change the same rows
│   ├── PublisherError           a pack that replaces a pack of another publisher
│   └── RequirementError         a required pack that is missing or would be removed
├── SignatureError           the proof of who made a pack
│   ├── SignatureFormatError     an unreadable signature file
│   ├── BadSignatureError        a signature of other bytes, or by another key than it names
│   ├── UnsignedError            no signature, and the policy requires one
│   ├── UntrustedError           too few trusted keys signed for this model
│   ├── KeyFileError             a missing or broken key file, or a wrong password
│   └── TrustError               a broken trust store or policy file
├── ChannelError             the channel that publishes packs
│   ├── ChannelFormatError       a broken channel, or a newer format
│   ├── ChannelPathError         a path outside of the channel's own folders
│   ├── ChannelKeyError          not signed by the channel's root key, or that key is not trusted
│   ├── ForeignChannelError      a channel of another name
│   ├── RollbackError            older than what was seen before
│   ├── EquivocationError        two different channels with one serial number
│   ├── SerialJumpError          a serial number that is implausibly far ahead
│   ├── ExpiredError             not renewed in time: a newer channel may be withheld
│   ├── ClockError               issued in the future of this machine's clock
│   ├── SwappedFileError         a file other than the one that the channel names
│   ├── YankedError             a version that its publisher withdrew
│   ├── VersionError             an unknown version, or one that is published already
│   └── PublishError             the channel could not be written
├── HubError                 the Hugging Face Hub, a mirror of it, or another server
│   ├── HubNotFoundError         no such repository, revision or file
│   ├── HubAccessError           private or gated, or an insufficient token
│   ├── HubUnavailableError      unreachable or failing
│   └── HubAnswerError           an answer with other content than requested
├── EndpointError            a server that answers prompts
│   ├── EndpointUnavailableError  unreachable, failing or too slow
│   ├── EndpointAccessError      a missing or refused API key
│   └── EndpointAnswerError      it refuses the request, or answers with something else than asked for
├── DataError                what the user passed; exit code 2
│   ├── MissingInputError        an input path that does not exist
│   ├── PromptDataError          a missing, empty or malformed prompt set
│   └── RecipeError              an unknown training setting, or a value outside its range
├── TrainingError            training found nothing to train, or failed
├── EvaluationTaskError      a task of lm-eval failed
├── JudgeError               a judge of answers that cannot be loaded, or gives no verdict
├── MissingExtraError        an optional package is not installed
├── FileSystemError          the operating system refused to read or write
├── OutOfMemoryError         the machine has too little memory
└── UnexpectedError          a bug in nestpatch

`str(error)` is the reason: what, where, expected, found. `error.advice` is the way out, and `error.exit_code` the exit code of
the command line (docs/cli.md).
"""

from __future__ import annotations

import os
from collections.abc import Mapping


class NestpatchError(Exception):
    """Base of every error that nestpatch raises on purpose.

    Args:
        reason: What is wrong, where, what was expected and what was found.
        advice: What to do about it. None means the advice of the class.
    """

    advice = "See the message above."
    exit_code = 1

    def __init__(self, reason: str, *, advice: str | None = None) -> None:
        super().__init__(reason)
        if advice is not None:
            self.advice = advice


class PackError(NestpatchError):
    """The pack is not usable."""

    advice = "Get the pack again from its publisher; do not repair it by hand."


class PackFormatError(PackError):
    """The bytes are not a well-formed .nest file."""


class PackTooNewError(PackError):
    """The pack uses fields or a format version that this version of nestpatch does not know."""

    advice = "Upgrade nestpatch: pip install -U nestpatch"


class PackContentError(PackError):
    """The file is well-formed, but its tensors or facts contradict each other."""


class CheckpointError(NestpatchError):
    """The model on disk is not usable."""

    advice = "Check the path, and that the download of the model is complete."


class CheckpointFormatError(CheckpointError):
    """The model file is broken, truncated or of an unsupported format."""


class BaseMismatchError(CheckpointError):
    """The model is sound, but it is not the base of the pack."""

    advice = "Use the base that `nestpatch show PACK` names. A fine-tuned copy of it needs its own pack: nestpatch train."


class UnsupportedModelError(CheckpointError):
    """The model has no feed-forward layers of a supported kind."""

    advice = (
        "Supported: gate_proj/up_proj, fused gate_up_proj, fc1/fc_in/c_fc/dense_h_to_4h made of Linear layers; stacked experts."
    )


class QuantizationError(CheckpointError):
    """Rows of a quantized type cannot be read or written here, or would lose the patch."""

    advice = "Patch the float model and quantize it again."


class ExtractionError(CheckpointError):
    """Both models are sound, but no pack turns the first into the second."""

    advice = "A pack changes rows of F32, BF16 or F16 matrices and nothing else. Publish the tuned model as a whole."


class RestorationError(CheckpointError):
    """The models are sound, but no pack that restores one of them can be made of them."""

    advice = "Give a base, its aligned version and a fine-tune of either. See docs/restore.md."


class ParityError(CheckpointError):
    """The exported model was run, and its results differ from those of its source."""

    advice = "Nothing was written. This kind of model cannot be exported yet: patch and serve its safetensors files."


class GuardError(NestpatchError):
    """The guard of a fine-tune is not usable."""

    advice = "Make the guard again from the patched model and its pack: nestpatch guard MODEL PACK"


class GuardFormatError(GuardError):
    """The file is not a guard, or a broken one."""


class GuardMismatchError(GuardError):
    """The model is sound, but the guard is not for it."""

    advice = (
        "Fine-tune the patched model that the guard was made from, or make a guard for this one: nestpatch guard MODEL PACK"
    )


class OutputError(NestpatchError):
    """The output cannot be written."""

    advice = "Choose another path with -o; nothing was written."


class InPlaceError(OutputError):
    """The model's files cannot be changed in place: they are links or read-only, or the disk is full."""

    advice = "Write a patched copy instead, with -o OUTPUT. The model is unchanged."


class BusyError(OutputError):
    """Another process is writing this model."""

    advice = "Wait until it has finished, then run the command again."


class StateError(NestpatchError):
    """The state that nestpatch keeps beside a model is not usable."""

    advice = "Get the model again from where it came from. The file that the message names is no longer needed then."


class LedgerError(StateError):
    """The ledger of a model is broken, or was written by a newer version of nestpatch."""


class InterruptedChangeError(StateError):
    """A change was interrupted: the model may hold some new rows and some old ones."""

    advice = "`nestpatch recover MODEL` ends it: it restores the rows, or finds that the change was complete."


class JournalError(StateError):
    """A leftover journal does not fit the model."""


class ForeignJournalError(JournalError):
    """A leftover journal is confirmed neither by this machine's seal nor by a signed pack."""

    advice = (
        "If you know where it comes from (a container that lost its key, a folder that you copied): "
        "nestpatch recover MODEL --foreign roll-back. To drop it and leave the rows as they are: --foreign remove."
    )


class UndoError(StateError):
    """An undo record is missing or broken."""


class ChainError(NestpatchError):
    """The packs or versions do not go together. Nothing was changed."""

    advice = "`nestpatch status MODEL` shows what is applied."


class DowngradeError(ChainError):
    """The pack is older than the applied version."""

    advice = "Pass --allow-downgrade to go back on purpose."


class OverlapError(ChainError):
    """Two packs change the same rows."""

    advice = "Pass --allow-overlap to add both changes up, or revert the other pack first."


class PublisherError(ChainError):
    """The pack replaces, supersedes or shares the name of a pack that another publisher signed."""

    advice = "Revert the other publisher's pack first (nestpatch revert MODEL), or pass --allow-other-publisher."


class RequirementError(ChainError):
    """A required pack is not applied, or would be removed."""

    advice = "Apply the required pack first, or revert the one that needs it."


class SignatureError(NestpatchError):
    """It is not proven who made the pack. Nothing was applied."""

    advice = "Get the pack and its signature again from the publisher."


class SignatureFormatError(SignatureError):
    """The signature file is not an OMS bundle with an ECDSA P-256 key."""


class BadSignatureError(SignatureError):
    """The signature belongs to other bytes or to another key: the pack or the signature was altered."""

    advice = "Do not use this file. Get the pack and its signature again, directly from the publisher."


class UnsignedError(SignatureError):
    """The pack has no signature, and the policy requires one."""

    advice = (
        "Get the signature from the publisher and put it beside the pack, under the pack's name with .sig after it. "
        "Your own pack: nestpatch sign PACK --key KEY. To use it without a signature: --allow-unsigned."
    )


class UntrustedError(SignatureError):
    """The pack is signed, but not by enough trusted keys."""

    advice = "If you know the publisher's key from a safe source: nestpatch trust add KEY.pub --name NAME"


class KeyFileError(SignatureError):
    """The key file cannot be used."""

    advice = "Keys are ECDSA P-256 in PEM files. `nestpatch keygen` makes a pair."


class TrustError(SignatureError):
    """The trust store or a policy file is broken, or names a key that does not exist."""

    advice = "`nestpatch trust list` shows the keys; docs/signing.md describes the file."


class ChannelError(NestpatchError):
    """The channel cannot be used. Nothing was applied."""

    advice = "Ask the publisher, through a safe source. docs/fleet.md describes channels."


class ChannelFormatError(ChannelError):
    """The channel, or the memory of it on this machine, is broken or of a newer format."""


class ChannelPathError(ChannelError):
    """The channel names a file outside of its own folders."""

    advice = "Do not use this channel: nestpatch never writes such paths. Inform the publisher."


class ChannelKeyError(ChannelError):
    """The channel is not signed by its root key, or that key is not trusted for this model."""

    advice = "If you know the publisher's key from a safe source: nestpatch trust add KEY.pub --name NAME"


class ForeignChannelError(ChannelError):
    """A channel of another name is stored at this address."""


class RollbackError(ChannelError):
    """The channel is older than the one that this user has seen."""

    advice = "A mirror lags and serves an old copy, or an attacker withholds a fix. Try again later, or use another mirror."


class EquivocationError(ChannelError):
    """Two different channels have the same serial number."""

    advice = (
        "The publisher, or a holder of the publisher's key, serves different channels to different users. Ask the publisher."
    )


class SerialJumpError(ChannelError):
    """The channel's serial number is further ahead than the publisher's count can be."""

    advice = (
        "A holder of the publisher's key may have published without the publisher. Ask the publisher. "
        "A hand-over to a new key (`nestpatch renew --new-key`) restarts the count, and your machine follows it."
    )


class ExpiredError(ChannelError):
    """The channel was not renewed in time."""

    advice = "Check this machine's clock. If it is right, an old copy is served, or the publisher has to run `nestpatch renew`."


class ClockError(ChannelError):
    """The channel was issued in the future of this machine's clock, so its expiry cannot be checked."""

    advice = (
        "Set this machine's clock and keep it synchronized (timedatectl set-ntp true). "
        "If it is right, the publisher's clock was wrong: ask for `nestpatch renew`."
    )


class SwappedFileError(ChannelError):
    """A file of the channel is not the one that the channel names."""

    advice = "Do not use this file. Try again later, as a mirror may be half copied; otherwise inform the publisher."


class YankedError(ChannelError):
    """The publisher withdrew this version."""

    advice = "Use another version: `nestpatch pull REPO` takes the latest active one."


class VersionError(ChannelError):
    """The channel has no such version, or has it already: published versions never change."""

    advice = "Publish a change under a higher version."


class PublishError(ChannelError):
    """The channel could not be written. What was published before is unchanged."""

    advice = "Run the command again."


class HubError(NestpatchError):
    """The Hugging Face Hub did not return what was requested."""

    advice = "Try again later, or download the model and pass its folder."


class HubNotFoundError(HubError):
    """The repository, revision or file does not exist, or is hidden from this user."""

    advice = "Check the spelling. A private repository needs a token: run `hf auth login`, or set HF_TOKEN."


class HubAccessError(HubError):
    """The repository exists, but this user may not read it."""

    advice = "Log in with `hf auth login`, or set HF_TOKEN to a token that may read the repository."


class HubUnavailableError(HubError):
    """The Hub is unreachable or failing."""

    advice = "Check the connection and HF_ENDPOINT, and try again. HF_HUB_OFFLINE=1 uses what is cached."


class HubAnswerError(HubError):
    """The answer is not what was requested: other bytes, another commit, a login page."""

    advice = "Check HF_ENDPOINT and the proxy in between, or download the model and pass its folder."


class EndpointError(NestpatchError):
    """A server that answers prompts did not do so.

    Attributes:
        answered: Prompt -> answer, of the prompts that were answered before.
    """

    advice = "Check the address and the log of the server."

    def __init__(self, reason: str, *, advice: str | None = None) -> None:
        super().__init__(reason, advice=advice)
        self.answered: Mapping[str, str] = {}


class EndpointUnavailableError(EndpointError):
    """The server is unreachable, fails, or takes too long."""

    advice = "Check that the server runs and has loaded its model. A slow one: raise --timeout, or lower --concurrency."


class EndpointAccessError(EndpointError):
    """The server wants another API key."""

    advice = "Put the key into the environment variable NESTPATCH_API_KEY, or name its variable with --api-key-env."


class EndpointAnswerError(EndpointError):
    """The server refuses the request, or its answer is not that of an OpenAI-compatible server."""


class DataError(NestpatchError):
    """An argument, a prompt set or a setting is not usable."""

    advice = "Correct the input and run the command again."
    exit_code = 2


class MissingInputError(DataError):
    """An input path does not exist."""

    advice = "Check the path."


class PromptDataError(DataError):
    """A prompt set is missing, empty or malformed."""

    advice = 'Give JSONL, CSV or Parquet with a "prompt" column, or a data set id of the Hugging Face Hub.'


class RecipeError(DataError):
    """A training setting is unknown or out of range."""

    advice = "`nestpatch train --help-recipe` lists every setting with its default and range."


class TrainingError(NestpatchError):
    """Training found nothing to train, or failed."""

    advice = "Lower `threshold`, or give more and clearer prompts."


class JudgeError(NestpatchError):
    """A judge of answers cannot be loaded, or gave no verdict that can be read.

    Attributes:
        answered: Prompt -> answer, of what the model that was being judged had answered before.
    """

    advice = "Check the judge with a few prompts (--limit 5), or use the judge keywords."

    def __init__(self, reason: str, *, advice: str | None = None) -> None:
        super().__init__(reason, advice=advice)
        self.answered: Mapping[str, str] = {}


class EvaluationTaskError(NestpatchError):
    """A task of lm-eval failed."""

    advice = "Run `lm_eval` on the same task alone. Without network, a task needs its data set in the cache of the Hub."


class MissingExtraError(NestpatchError):
    """An optional package is not installed.

    Args:
        extra: The extra of nestpatch that installs it.
        what: What needs it.
        instead: What can be done without it; empty where nothing can.
    """

    def __init__(self, extra: str, what: str, *, instead: str = "") -> None:
        advice = f"pip install 'nestpatch[{extra}]'" + (f", or {instead}" if instead else "")
        super().__init__(f"{what} needs packages that are not installed", advice=advice)


class FileSystemError(NestpatchError):
    """The operating system refused to read or write a file."""

    advice = "Check the disk, the path and its permissions. No file is half written."


class OutOfMemoryError(NestpatchError):
    """The operating system has no more memory to give."""

    advice = "Close other programs, or use a machine with more memory. No file is half written."


class UnexpectedError(NestpatchError):
    """A bug in nestpatch. The message says what happened, and in which line of its files."""

    advice = "Please report this message. NESTPATCH_TRACEBACK=1 shows the traceback."


def named(error: Exception) -> NestpatchError:
    """An exception of any kind as one of these classes.

    Args:
        error: The exception.

    Returns:
        The error itself where it is one of these; else FileSystemError, OutOfMemoryError or UnexpectedError.
    """
    if isinstance(error, NestpatchError):
        return error
    if isinstance(error, OSError):
        return FileSystemError(str(error))
    if isinstance(error, MemoryError):
        return OutOfMemoryError("there is not enough memory")
    import traceback

    # The last line of nestpatch's own files that the error passed.
    passed = [f"{entry.filename}:{entry.lineno}" for entry in traceback.extract_tb(error.__traceback__)]
    own = [line for line in passed if f"{os.sep}nestpatch{os.sep}" in line] or passed or ["unknown"]
    where = own[-1].rpartition(f"{os.sep}nestpatch{os.sep}")[2]
    return UnexpectedError(f"{type(error).__name__}: {error} ({where})")
