"""`sluice serve`: vLLM's own OpenAI server, with our worker, our plugin and safe defaults.

Every flag of `vllm serve` is passed through. Set here, unless the user sets it: the worker class,
loopback as the host, expert routing if only this machine can connect, and, without a MODEL, the
demo model with its profile.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import secrets
import tempfile
from importlib.metadata import entry_points
from pathlib import Path

from sluice.models.engine.workers import CPU_KV_CACHE_BYTES, V2_RUNNER_ENV, worker_class
from sluice.models.offline.demo import DEMO_MODEL_DIR, DEMO_PROFILE_DIR
from sluice.models.profile.fingerprint import FingerprintError
from sluice.models.profile.profile import PROFILE_ENV, Profile, ProfileError
from sluice.models.routing.presets import PresetsFileError, all_presets
from sluice.models.telemetry.counter_file import TELEMETRY_ENV
from sluice.server.access.keys import Keys, KeysFileError
from sluice.server.admission import CACHE_SECRET_ENV
from sluice.server.http import body_limit, overload

PLUGIN = "sluice"
_ENDPOINT_PLUGINS = "vllm.endpoint_plugins"
DEMO_NAME = "demo"
DEMO_PRESETS = DEMO_MODEL_DIR.parent / "presets.yaml"
DEMO_KV_CACHE_BYTES = 512 * 1024**2
_AS_LONG_AS_FITS = -1
"""Of vLLM's `--max-model-len`, which has `auto` for it: the model's context, or what fits."""


def main(argv: list[str]) -> None:
    """Serve until interrupted; does not return before that."""
    allow_plugin()
    os.environ.setdefault(V2_RUNNER_ENV, "0")

    # vLLM reads the environment on import.
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args

    parser = build_parser()
    args = parser.parse_args(argv)
    refuse_unsupported(parser, args)
    if args.model_tag is None and args.model == parser.get_default("model"):
        apply_demo_defaults(args)
    limit_cpu_cache(parser, args)
    profile = choose_profile(parser, args)
    check_model(parser, profile, args.model_tag or args.model)
    check_presets(parser, args.presets, profile)
    check_keys(parser, args)
    choose_expert_routing(parser, args)
    if args.worker_cls == "auto":
        args.worker_cls = worker_class()
    configure_logging_from_args(args)
    command = ServeSubcommand()
    command.validate(args)
    os.environ.setdefault(CACHE_SECRET_ENV, secrets.token_hex(16))
    with tempfile.TemporaryDirectory(prefix="sluice-") as folder:
        os.environ[TELEMETRY_ENV] = folder
        command.cmd(args)


def build_parser() -> argparse.ArgumentParser:
    """vLLM's serve parser with our flags and our defaults."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: argparse.ArgumentParser = FlexibleArgumentParser(
        prog="sluice serve",
        usage="sluice serve [MODEL] [options]",
        description="Serve MODEL (default: the demo model). Takes every flag of `vllm serve`; "
        "`--help=all` lists them.",
    )
    group = parser.add_argument_group("sluice")
    group.add_argument(
        "--presets",
        type=Path,
        default=None,
        metavar="FILE",
        help="YAML or JSON file of named policies (see docs/routing.md)",
    )
    group.add_argument(
        "--profile",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="profile of MODEL, made by `sluice calibrate` (see docs/calibration.md); "
        f"default: the folder in {PROFILE_ENV}, if set",
    )
    group.add_argument(
        "--keys",
        type=Path,
        default=None,
        metavar="FILE",
        help="YAML or JSON file of hashed API keys and what each may ask for (see docs/access.md)",
    )
    group.add_argument(
        "--expert-routing",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether requests and presets may choose experts; default: only if --host is a "
        "loopback address. On any other host it needs --keys",
    )
    group.add_argument(
        "--expert-metrics",
        action="store_true",
        help="export one series per layer and expert on /metrics",
    )
    group.add_argument(
        "--console",
        action="store_true",
        help="serve a page at /console for trying policies and watching layers and experts",
    )
    group.add_argument(
        "--open-metrics",
        action="store_true",
        help="answer /metrics without a key where --keys is given",
    )
    overload.add_arguments(group)
    body_limit.add_arguments(group)
    make_arg_parser(parser)
    parser.set_defaults(host="127.0.0.1")
    return parser


def apply_demo_defaults(args: argparse.Namespace) -> None:
    """Serve the demo model, with what the user has set."""
    args.model_tag = str(DEMO_MODEL_DIR)
    if args.served_model_name is None:
        args.served_model_name = [DEMO_NAME]
    if args.kv_cache_memory_bytes is None:
        args.kv_cache_memory_bytes = DEMO_KV_CACHE_BYTES
    if args.presets is None:
        args.presets = DEMO_PRESETS
    if args.profile is None and not os.environ.get(PROFILE_ENV) and DEMO_PROFILE_DIR.is_dir():
        args.profile = DEMO_PROFILE_DIR


def limit_cpu_cache(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Take 1 GiB of K/V cache on a CPU, unless the user has said how much.

    If the model's context needs more, vLLM shortens the context, and its log says so.
    """
    from vllm.platforms import current_platform

    sized = (
        args.kv_cache_memory_bytes is not None
        or args.gpu_memory_utilization != parser.get_default("gpu_memory_utilization")
        or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    )
    if sized or not current_platform.is_cpu():
        return
    args.kv_cache_memory_bytes = CPU_KV_CACHE_BYTES
    if args.max_model_len is None:
        args.max_model_len = _AS_LONG_AS_FITS


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


def check_model(parser: argparse.ArgumentParser, profile: Profile | None, model: str) -> None:
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


def choose_expert_routing(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Decide about `--expert-routing` if the user has not; refuse it if anybody could use it."""
    local = bool(args.uds) or is_loopback(args.host)
    if args.expert_routing is None:
        args.expert_routing = local
    if args.expert_routing and not local and args.keys is None:
        parser.error(
            f"--expert-routing on host {args.host or '0.0.0.0'} needs --keys: taking experts away "
            "can take a model's refusals away, and anybody could ask for it"
        )


def is_loopback(host: str | None) -> bool:
    """Whether only this machine can connect; False for names other than `localhost`."""
    if not host:
        return False  # vLLM binds every interface.
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_unsupported(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse front ends without our plugin: they would ignore routing."""
    if getattr(args, "grpc", False):
        parser.error("--grpc is not supported: routing is an extension of the OpenAI HTTP API")
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        parser.error("VLLM_USE_RUST_FRONTEND is not supported: it runs no endpoint plugins")


def allow_plugin() -> None:
    """Name our plugin in `VLLM_PLUGINS`, as vLLM wants it for plugins that add routes.

    An unset variable means "all but endpoint plugins". So all of those are named as well, and
    nothing else changes.
    """
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None:
        installed = entry_points()
        names = {
            plugin.name
            for group in installed.groups
            if group.startswith("vllm.") and group != _ENDPOINT_PLUGINS
            for plugin in installed.select(group=group)
        }
    else:
        names = {name for name in allowed.split(",") if name}
    os.environ["VLLM_PLUGINS"] = ",".join(sorted(names | {PLUGIN}))
