"""Everything that nestpatch refuses, by who is at fault.

NestpatchError
├── PackError               the .nest file
│   ├── PackFormatError         its bytes or manifest break the format (docs/nest-format.md)
│   ├── PackTooNewError         it uses a newer version of the format
│   └── PackContentError        it parses, but its tensors make no sense together
├── CheckpointError         the model on disk
│   ├── CheckpointFormatError   broken or unsupported file
│   ├── BaseMismatchError       a sound model, but not the one that the pack was made for
│   ├── UnsupportedModelError   an architecture without an MLP that we know
│   ├── QuantizationError       a quantized type whose rows cannot be written, or would lose the patch
│   ├── ExtractionError         two models whose difference is no pack
│   └── ParityError             an exported model does not compute what its source does
├── OutputError             the place that was to be written
│   ├── InPlaceError            the model's own files cannot be changed where they are
│   └── BusyError               another process is writing this model
├── StateError              what nestpatch keeps beside a model
│   ├── LedgerError             the ledger is broken
│   ├── InterruptedChangeError  a change was interrupted, and its journal is still there
│   ├── JournalError            a leftover journal does not fit the model
│   │   └── ForeignJournalError     nothing proves that this machine or a publisher answers for it
│   └── UndoError               an undo record is missing or broken
├── ChainError              versions and packs that do not go together
│   ├── DowngradeError          an older version than the applied one
│   ├── OverlapError            two packs change the same rows
│   ├── PublisherError          a pack that speaks for another publisher's pack
│   └── RequirementError        a pack that another one needs
├── SignatureError          who made a pack
│   ├── SignatureFormatError    the signature file is none that nestpatch reads
│   ├── BadSignatureError       it does not belong to this file, or to the key that it names
│   ├── UnsignedError           there is none, and the policy wants one
│   ├── UntrustedError          signed, but not by enough of the keys that are trusted for this model
│   ├── KeyFileError            a key file is missing, broken, of another kind, or its password is wrong
│   └── TrustError              the store of trusted keys, or a policy file, is broken
├── ChannelError            where patches are published
│   ├── ChannelFormatError      a channel is broken, or of a newer format
│   ├── ChannelPathError        it names a file outside of its own folders
│   ├── ChannelKeyError         it is not signed by the key that was handed down, or nobody trusts that key here
│   ├── ForeignChannelError     it is another channel than the one that belongs there
│   ├── RollbackError           it is older than what was seen before
│   ├── EquivocationError       it has the number of what was seen before, and says something else
│   ├── SerialJumpError         its number is further ahead than any publisher's count can be
│   ├── ExpiredError            it was not renewed in time: somebody may be holding back a newer one
│   ├── ClockError              it was issued in the future of this machine's clock
│   ├── SwappedFileError        a file is not the one that it names
│   ├── RevokedError            the version was withdrawn by its publisher
│   ├── VersionError            there is no such version, or it is published already
│   └── PublishError            others publish at the same time, or nobody can publish there
├── HubError                the Hugging Face Hub, a mirror of it, or another server
│   ├── HubNotFoundError        no such repository, revision or file
│   ├── HubAccessError          private, gated, or a token that does not do
│   ├── HubUnavailableError     it cannot be reached, or has troubles of its own
│   └── HubAnswerError          it answers, but not what was asked for
├── FileSystemError         the system refused to read or write
├── OutOfMemoryError        the machine has too little memory
├── UnexpectedError         an error of nestpatch itself
├── DataError               prompt files and recipes
│   ├── PromptDataError         a prompt file is missing, empty or malformed
│   └── RecipeError             an unknown knob, or a value outside its range
├── TrainingError           the method found nothing to train, or the training failed
└── MissingExtraError       an optional package is not installed

Each error carries the reason in its message and the way out in `.advice`.
"""

from __future__ import annotations


class NestpatchError(Exception):
    """Base of everything that nestpatch raises on purpose. `str(e)` is the reason, `e.advice` the way out."""

    advice = "See the message above."

    def __init__(self, reason: str, *, advice: str | None = None) -> None:
        super().__init__(reason)
        if advice is not None:
            self.advice = advice


class PackError(NestpatchError):
    """Something is wrong with a pack."""

    advice = "Get the pack again from its publisher; do not repair it by hand."


class PackFormatError(PackError):
    """The bytes are no well-formed .nest file."""


class PackTooNewError(PackError):
    """The pack uses fields or a format version that this nestpatch does not know."""

    advice = "Upgrade nestpatch: pip install -U nestpatch"


class PackContentError(PackError):
    """A well-formed file whose tensors or facts contradict each other."""


class CheckpointError(NestpatchError):
    """Something is wrong with the model on disk."""

    advice = "Check the path, and that the download of the model is complete."


class CheckpointFormatError(CheckpointError):
    """The model file is broken, truncated or of an unsupported format."""


class BaseMismatchError(CheckpointError):
    """The model is sound, but it is not the base that the pack was made for."""

    advice = "Use the base that `nestpatch show PATCH` names. A fine-tuned copy of it needs its own pack: nestpatch train."


class UnsupportedModelError(CheckpointError):
    """The model has no feed-forward layers of a kind that nestpatch knows."""

    advice = "Supported: gate_proj/up_proj, fused gate_up_proj, and fc1/fc_in/c_fc/dense_h_to_4h made of Linear layers."


class QuantizationError(CheckpointError):
    """Rows of a quantized type cannot be read or written here, or would lose what the patch adds."""

    advice = "Patch the float model and quantize it anew."


class ExtractionError(CheckpointError):
    """Two sound models, but no pack makes the one of the other."""

    advice = "A pack changes rows of F32, BF16 or F16 matrices and nothing else. Publish the tuned model as a whole."


class ParityError(CheckpointError):
    """An exported model was run, and does not compute what the model that it was made from does."""

    advice = "Nothing was written. This kind of model cannot be exported yet: patch and serve its safetensors files."


class OutputError(NestpatchError):
    """The output cannot be written."""

    advice = "Choose another place with -o; nothing was written."


class InPlaceError(OutputError):
    """The model's files cannot be changed where they are: links, read-only, full disk."""

    advice = "Write a patched copy instead, with -o OUTPUT. The model is as it was."


class BusyError(OutputError):
    """Another process is writing this model."""

    advice = "Wait until it has finished, then run the command again."


class StateError(NestpatchError):
    """Something is wrong with what nestpatch keeps beside a model."""

    advice = "Get the model again from where it came from. The file that the message names is no longer needed then."


class LedgerError(StateError):
    """The ledger of a model is broken, or of a newer nestpatch."""


class InterruptedChangeError(StateError):
    """A change was interrupted: the model may hold some of the new rows and some of the old ones."""

    advice = "`nestpatch recover MODEL` ends it: it puts the rows back, or finds that the change was complete."


class JournalError(StateError):
    """A leftover journal does not fit the model."""


class ForeignJournalError(JournalError):
    """A leftover journal that neither this machine wrote nor any signed pack confirms."""

    advice = (
        "If you know where it comes from (a container that lost its key, a folder that you copied): "
        "nestpatch recover MODEL --foreign roll-back. To drop it and leave the rows as they are: --foreign remove."
    )


class UndoError(StateError):
    """An undo record is missing or broken."""


class ChainError(NestpatchError):
    """Packs or versions that do not go together. Nothing was changed."""

    advice = "`nestpatch status MODEL` shows what is applied."


class DowngradeError(ChainError):
    """The pack is older than what is applied."""

    advice = "Pass --allow-downgrade to go back on purpose."


class OverlapError(ChainError):
    """Two packs change the same rows."""

    advice = "Pass --allow-overlap to add both changes up, or revert the other pack first."


class PublisherError(ChainError):
    """The pack replaces, supersedes or falls under the name of a pack that another publisher signed."""

    advice = "Revert the other publisher's pack first (nestpatch revert MODEL), or pass --allow-other-publisher."


class RequirementError(ChainError):
    """A required pack is not applied, or would be taken away."""

    advice = "Apply the required pack first, or revert the one that needs it."


class SignatureError(NestpatchError):
    """It is not proven who made a pack. Nothing was applied."""

    advice = "Get the pack and its signature again from the publisher."


class SignatureFormatError(SignatureError):
    """The signature file is no OMS bundle made with an ECDSA P-256 key."""


class BadSignatureError(SignatureError):
    """The signature was made for other bytes, or with another key than it names: the pack or the signature was altered."""

    advice = "Do not use this file. Get the pack and its signature again, from the publisher's own place."


class UnsignedError(SignatureError):
    """The pack has no signature, and the policy wants one."""

    advice = "Get the signature from the publisher and lay it beside the pack, under the pack's name with .sig after it."


class UntrustedError(SignatureError):
    """The pack is signed, but not by enough trusted keys."""

    advice = "If you know the publisher's key from a safe source: nestpatch trust add KEY.pub --name NAME"


class KeyFileError(SignatureError):
    """A key file cannot be used."""

    advice = "Keys are ECDSA P-256 in PEM files. `nestpatch keygen` makes a pair."


class TrustError(SignatureError):
    """The trust store or a policy file is broken, or names what is not there."""

    advice = "`nestpatch trust list` shows the keys; docs/signing.md describes the file."


class ChannelError(NestpatchError):
    """A channel cannot be used. Nothing was applied."""

    advice = "Ask the publisher, from a safe source. docs/fleet.md describes channels."


class ChannelFormatError(ChannelError):
    """The channel, or what is remembered of it, is broken or of a newer format."""


class ChannelPathError(ChannelError):
    """The channel names a file that would lie outside of its own folders."""

    advice = "Do not use this channel. No publisher's tool writes such paths; tell the publisher."


class ChannelKeyError(ChannelError):
    """The channel is not signed by its root key, or that key is not trusted for this model."""

    advice = "If you know the publisher's key from a safe source: nestpatch trust add KEY.pub --name NAME"


class ForeignChannelError(ChannelError):
    """A channel of another name lies where this one should."""


class RollbackError(ChannelError):
    """The channel is older than what this user has seen of it."""

    advice = "An old copy is served: by a mirror that lags, or by somebody who holds back a fix. Try again later, or elsewhere."


class EquivocationError(ChannelError):
    """Two different channels have the same serial number."""

    advice = (
        "The publisher, or somebody with the publisher's key, tells different things to different people. Ask the publisher."
    )


class SerialJumpError(ChannelError):
    """The channel's serial number is further ahead than a publisher's count can be."""

    advice = (
        "Somebody with the publisher's key may be running ahead of the publisher's count. Ask the publisher. "
        "A hand-over to a new key (`nestpatch renew --new-key`) starts the count again, and your machine follows it."
    )


class ExpiredError(ChannelError):
    """The channel was not renewed in time."""

    advice = "Check this machine's clock. Else an old copy is served, or the publisher has to run `nestpatch renew`."


class ClockError(ChannelError):
    """The channel was issued in the future of this machine's clock, so that its expiry proves nothing here."""

    advice = (
        "Set this machine's clock, and let it be kept right (timedatectl set-ntp true). "
        "If it is right, the publisher's was wrong: ask for `nestpatch renew`."
    )


class SwappedFileError(ChannelError):
    """A file in the channel's place is not the one that the channel names."""

    advice = "Do not use this file. Try again later: a mirror may be half copied; else tell the publisher."


class RevokedError(ChannelError):
    """The version was withdrawn."""

    advice = "Use another version: `nestpatch pull REPO` takes the latest that stands."


class VersionError(ChannelError):
    """The channel has no such version, or has it already and published versions never change."""

    advice = "Publish a change under a higher version."


class PublishError(ChannelError):
    """The channel could not be written. What was published before stands."""

    advice = "Run the command again."


class HubError(NestpatchError):
    """The Hugging Face Hub did not give what was asked for."""

    advice = "Try again later, or download the model and give its folder."


class HubNotFoundError(HubError):
    """There is no such repository, revision or file, or it is hidden from this user."""

    advice = "Check the spelling. A private repository needs a token: run `hf auth login`, or set HF_TOKEN."


class HubAccessError(HubError):
    """The repository is there, but not for this user."""

    advice = "Log in with `hf auth login`, or set HF_TOKEN to a token that may read the repository."


class HubUnavailableError(HubError):
    """The Hub cannot be reached, or is failing."""

    advice = "Check the connection and HF_ENDPOINT, and try again. What is cached is used on purpose with HF_HUB_OFFLINE=1."


class HubAnswerError(HubError):
    """The answer is not what was asked for: other bytes, another commit, a login page."""

    advice = "Check HF_ENDPOINT and the proxy in between, or download the model and give its folder."


class FileSystemError(NestpatchError):
    """The system refused to read or write a file."""

    advice = "Check the disk, the path and its permissions. Nothing is half written."


class OutOfMemoryError(NestpatchError):
    """The system gave no more memory."""

    advice = "Close other programs, or use a machine with more memory. Nothing is half written."


class UnexpectedError(NestpatchError):
    """What nobody foresaw: an error of nestpatch itself. The message says what, and where in its files."""

    advice = "Please report this message. With NESTPATCH_TRACEBACK=1 it comes with a traceback."


class DataError(NestpatchError):
    """Something is wrong with what the user gave: prompts or settings."""

    advice = "Correct the input and run the command again."


class PromptDataError(DataError):
    """A prompt file is missing, empty or malformed."""

    advice = 'Give JSONL, CSV or Parquet with a "prompt" column, or a data set id of the Hugging Face Hub.'


class RecipeError(DataError):
    """A training setting is unknown or out of range."""

    advice = "`nestpatch train --help-recipe` lists every setting with its default and range."


class TrainingError(NestpatchError):
    """The stages of the method cannot go on."""

    advice = "Lower `threshold`, or give more and clearer prompts."


class MissingExtraError(NestpatchError):
    """A package of an optional extra is needed and absent."""

    def __init__(self, extra: str, what: str) -> None:
        super().__init__(f"{what} needs packages that are not installed", advice=f"pip install 'nestpatch[{extra}]'")
