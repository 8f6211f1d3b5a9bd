"""What `sluice serve` checks before an engine starts. Each check ends the command with one line."""

from __future__ import annotations

import argparse
import errno
import os
import socket
from pathlib import Path

from sluice.models.profile.fingerprint import CONFIG_NAME, FingerprintError
from sluice.models.profile.profile import PROFILE_ENV, Profile, ProfileError
from sluice.models.routing.presets import PresetsFileError, all_presets
from sluice.server.access.keys import Keys, KeysFileError

_MISTRAL_CONFIG_NAME = "params.json"
RUNNER_ENV = "VLLM_USE_V2_MODEL_RUNNER"
"""vLLM's: 0 is its V1 model runner, 1 its V2 one. Unset, vLLM chooses."""


def refuse_unsupported(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse front ends without our plugin: they would ignore routing."""
    if getattr(args, "grpc", False):
        parser.error("--grpc is not supported: routing is an extension of the OpenAI HTTP API")
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        parser.error("VLLM_USE_RUST_FRONTEND is not supported: it runs no endpoint plugins")


def choose_runner(parser: argparse.ArgumentParser) -> None:
    """Leave the choice of the model runner to vLLM, but for a CPU without Triton.

    There it takes its V1 runner, and would warn of that in each of its processes.
    """
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON:
        return
    runner = os.environ.setdefault(RUNNER_ENV, "0")
    if runner != "0":
        parser.error(f"{RUNNER_ENV}={runner}: vLLM's V2 runner needs a Triton for this machine")


def check_model(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check that the model is there: a folder or file, or a name on the hub.

    What vLLM alone can find, such as a bucket's address, is left to it.
    """
    model = args.model_tag
    folder = Path(model)
    if folder.is_dir():
        names = (CONFIG_NAME, _MISTRAL_CONFIG_NAME)
        if not args.hf_config_path and not any((folder / name).is_file() for name in names):
            parser.error(f"{model}: no {CONFIG_NAME}: not the folder of a model")
    elif not (folder.exists() or "://" in model or os.environ.get("VLLM_USE_MODELSCOPE")):
        _check_hub(parser, args, model.partition(":")[0])


def _check_hub(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        hf_hub_download(
            name,
            CONFIG_NAME,
            revision=args.revision,
            cache_dir=args.download_dir,
            token=args.hf_token,
        )
    except HFValidationError:
        parser.error(f"{name}: no such folder")
    except LocalEntryNotFoundError:
        parser.error(
            f"{name}: neither a folder nor a model on this machine, and the hub was not reached"
        )
    except EntryNotFoundError:
        return  # It has a configuration of another kind.
    except GatedRepoError:
        parser.error(f"{name}: accept its terms on the hub, and give a token by HF_TOKEN")
    except RepositoryNotFoundError:
        parser.error(f"{name}: neither a folder nor a model on the hub")
    except RevisionNotFoundError:
        parser.error(f"{name}: the hub has no revision {args.revision}")
    except HfHubHTTPError as error:
        parser.error(f"{name}: {error}")


def choose_profile(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Profile | None:
    """Check the profile, if there is one, and name it to every process by `PROFILE_ENV`."""
    folder: Path | None = args.profile
    if folder is None and os.environ.get(PROFILE_ENV):
        folder = Path(os.environ[PROFILE_ENV])
    if folder is None:
        return None
    try:
        profile = Profile.load(folder)
    except ProfileError as error:
        parser.error(str(error))
    os.environ[PROFILE_ENV] = str(folder.resolve())
    return profile


def check_profile(parser: argparse.ArgumentParser, profile: Profile | None, model: str) -> None:
    """Refuse the profile of another model, if this one is a folder.

    A model of the hub may not be downloaded yet; the engine checks it when it loads it.
    """
    if profile is None or not Path(model).is_dir():
        return
    try:
        profile.check_folder(Path(model))
    except (ProfileError, FingerprintError) as error:
        parser.error(str(error))


def check_presets(
    parser: argparse.ArgumentParser, presets: Path | None, profile: Profile | None
) -> None:
    """Check the presets of the file and of the profile, as far as that can be without an engine."""
    try:
        all_presets(presets, profile)
    except (PresetsFileError, ProfileError) as error:
        parser.error(str(error))


def check_keys(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check the keys file, if there is one, and that vLLM's own keys are not used too."""
    if args.keys is None:
        return
    if any(args.api_key or [os.environ.get("VLLM_API_KEY")]):
        parser.error("give either --keys or --api-key (VLLM_API_KEY), not both")
    try:
        Keys.load(args.keys)
    except KeysFileError as error:
        parser.error(str(error))


def check_grouping(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check for `--group-by-depth` that the order of waiting requests is ours to choose."""
    if args.group_by_depth is None:
        return
    if args.scheduler_cls is not None:
        parser.error("give either --group-by-depth or --scheduler-cls, not both")
    policy = args.scheduling_policy
    if policy != "fcfs":
        parser.error(f"--group-by-depth needs --scheduling-policy fcfs, not {policy}")


def check_address(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check that the server can listen where it is to; port 0 becomes a free one.

    vLLM binds the address before the engine starts, but says by a traceback that it cannot.
    """
    if args.headless:
        return
    if args.uds:
        _check_socket_file(parser, Path(args.uds))
        return
    host = args.host or ""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, args.port))
        except (OSError, OverflowError) as error:
            parser.error(f"host {host or '0.0.0.0'}, port {args.port}: {_why(error)}")
        args.port = probe.getsockname()[1]


def _check_socket_file(parser: argparse.ArgumentParser, path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(str(path))
        except OSError as error:
            parser.error(f"--uds {path}: {_why(error)}")
    path.unlink()


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return "in use: another server may run there"
    return getattr(error, "strerror", None) or str(error)
