"""The command line: puts the commands together and turns errors into messages and exit codes.

Commands parse, call one library function and print. Results go to stdout, everything said to a person on the way to stderr.
Exit codes: 0 ok, 1 a finding or a failure, 2 usage. Heavy imports live inside the commands, so that --help is instant.
"""

from __future__ import annotations

import os
from typing import Any

import click

from nestpatch import __version__
from nestpatch.commands import exporting, fleet, inspecting, patching, signing, training
from nestpatch.errors import DataError, FileSystemError, MissingExtraError, NestpatchError


class Group(click.Group):
    """Turns every NestpatchError into its message, its advice and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except NestpatchError as error:
            from nestpatch.views import show_error

            show_error(error, error.advice)
            ctx.exit(2 if isinstance(error, DataError) else 1)
        except OSError as error:
            from nestpatch.views import show_error

            refused = FileSystemError(str(error))
            show_error(refused, refused.advice)
            ctx.exit(1)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("nestpatch"):
                raise
            from nestpatch.views import show_error

            extra = "llama" if (error.name or "").partition(".")[0] == "llama_cpp" else "train"
            missing = MissingExtraError(extra, f"`nestpatch {ctx.invoked_subcommand}` (module {error.name})")
            show_error(missing, missing.advice)
            ctx.exit(1)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nestpatch")
def main() -> None:
    """Safety patches for language models: train, ship, apply, prove, undo."""
    # transformers' own bars would mix with ours; a variable that the user set wins.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


for command in (
    training.train,
    training.evaluate,
    training.demo,
    training.lab,
    patching.apply,
    patching.revert,
    patching.recover,
    exporting.export,
    inspecting.show,
    inspecting.status,
    inspecting.verify,
    inspecting.diff,
    signing.keygen,
    signing.sign,
    signing.verify_signature,
    signing.trust,
    fleet.push,
    fleet.pull,
    fleet.update,
    fleet.withdraw,
    fleet.renew,
):
    main.add_command(command)
