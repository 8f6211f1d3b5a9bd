"""`sluice serve`: vLLM's own OpenAI server, with our worker, our plugin and safe defaults.

Every flag of `vllm serve` is passed through. Set here, unless the user sets it: the worker class,
loopback as the host, expert routing if only this machine can connect, and, without a MODEL, the
demo model with its profile.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import math
import os
import secrets
import signal
from importlib.metadata import entry_points
from pathlib import Path

from sluice.models.engine.workers import (
    CPU_KV_CACHE_BYTES,
    GROUP_BY_DEPTH_ENV,
    GROUPING_SCHEDULER,
    worker_class,
)
from sluice.models.offline.demo import DEMO_MODEL_DIR, DEMO_PROFILE_DIR
from sluice.models.profile.profile import PROFILE_ENV, ProfileError
from sluice.models.routing.presets import PresetsFileError
from sluice.server.admission import CACHE_SECRET_ENV
from sluice.server.cli.ctrl_c import handle_ctrl_c
from sluice.server.cli.extras import require_vllm
from sluice.server.cli.parser import OneLineParser
from sluice.server.cli.serve_checks import (
    check_address,
    check_grouping,
    check_keys,
    check_model,
    check_presets,
    check_profile,
    choose_profile,
    choose_runner,
    refuse_unsupported,
)
from sluice.server.http import body_limit, overload
from sluice.server.http.startup import AS_LONG_AS_FITS

PLUGIN = "sluice"
_ENDPOINT_PLUGINS = "vllm.endpoint_plugins"
DEMO_NAME = "demo"
DEMO_PRESETS = DEMO_MODEL_DIR.parent / "presets.yaml"
DEMO_KV_CACHE_BYTES = 512 * 1024**2
LOG_LEVEL_ENV = "VLLM_LOGGING_LEVEL"
QUIET_LEVEL = "WARNING"
UVICORN_LEVEL = "info"
"""vLLM's own default."""

PROG = "sluice serve"
USAGE = "sluice serve [MODEL] [options]"
DESCRIPTION = (
    "Serve MODEL (default: the demo model). Takes every flag of `vllm serve`; `--help=all` lists "
    "them."
)
VLLM_FLAGS = (
    ("--host", "HOST", "address to listen on (default: 127.0.0.1)"),
    ("--port", "PORT", "port to listen on (default: 8000)"),
    ("--uds", "PATH", "Unix domain socket to listen on instead"),
    ("--api-key", "KEY", "key that clients must send"),
    ("--served-model-name", "NAME", "model id of requests (default: MODEL)"),
    ("--max-model-len", "TOKENS", "longest prompt and answer together"),
    ("--dtype", "TYPE", "data type of the weights"),
    ("--kv-cache-memory-bytes", "BYTES", "size of the K/V cache"),
    ("--tensor-parallel-size", "N", "processes that share each layer"),
    ("--enforce-eager", None, "start sooner, without compiling the model"),
)
"""Flag, name of its value or None, help."""


def main(argv: list[str]) -> None:
    """Serve until interrupted; does not return before that.

    Raises:
        SystemExit: 2 for arguments, files or an address that do not fit, 130 for Ctrl-C before the
            server answers. After that, Ctrl-C makes it return.
    """
    if {"-h", "--help"} & {*argv}:
        print(first_page(), end="")
        return
    require_vllm(PROG)
    handle_ctrl_c()
    allow_plugin()
    chosen = LOG_LEVEL_ENV in os.environ
    if not chosen and "--verbose" not in argv:
        os.environ[LOG_LEVEL_ENV] = QUIET_LEVEL
        # It warns on every CPU, on import, that Triton has no part for CPUs.
        logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)

    # vLLM reads the environment on import.
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args

    parser = build_parser()
    args = parser.parse_args(argv)
    refuse_unsupported(parser, args)
    choose_runner(parser)
    if args.model_tag is None and args.model == parser.get_default("model"):
        apply_demo_defaults(args)
    args.model_tag = args.model_tag or args.model
    check_model(parser, args)
    limit_cpu_cache(parser, args)
    profile = choose_profile(parser, args)
    check_profile(parser, profile, args.model_tag)
    check_presets(parser, args.presets, profile)
    check_keys(parser, args)
    choose_expert_routing(parser, args)
    check_grouping(parser, args)
    check_address(parser, args)
    if args.worker_cls == "auto":
        args.worker_cls = worker_class()
    if args.verbose and not chosen:
        os.environ.pop(LOG_LEVEL_ENV, None)  # `--verbose` stood in a file of `--config`.
    if args.group_by_depth is not None:
        args.scheduler_cls = GROUPING_SCHEDULER
        os.environ[GROUP_BY_DEPTH_ENV] = str(args.group_by_depth)
    args.quiet = not args.verbose and args.uvicorn_log_level is None
    args.uvicorn_log_level = args.uvicorn_log_level or UVICORN_LEVEL
    configure_logging_from_args(args)
    command = ServeSubcommand()
    command.validate(args)
    os.environ.setdefault(CACHE_SECRET_ENV, secrets.token_hex(16))
    try:
        command.cmd(args)
    except (PresetsFileError, ProfileError) as error:  # Only the engine could find it.
        parser.error(str(error))
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if args.uds:
            Path(args.uds).unlink(missing_ok=True)


def first_page() -> str:
    """What `--help` prints: our flags, and how to see vLLM's. vLLM itself takes seconds to load."""
    parser = OneLineParser(
        prog=PROG,
        usage=USAGE,
        description=DESCRIPTION,
        epilog="--help=all lists every flag of vLLM, --help=NAME those that a name matches, for "
        "example --help=kv-cache.",
        add_help=False,
    )
    add_flags(parser)
    group = parser.add_argument_group("often used flags of vLLM")
    for flag, metavar, text in VLLM_FLAGS:
        if metavar is None:
            group.add_argument(flag, action="store_true", help=text)
        else:
            group.add_argument(flag, metavar=metavar, help=text)
    return parser.format_help()


def build_parser() -> argparse.ArgumentParser:
    """vLLM's serve parser with our flags and our defaults."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class ServeParser(FlexibleArgumentParser, OneLineParser):  # type: ignore[misc]
        """vLLM's parser, with errors of one line."""

    parser: argparse.ArgumentParser = ServeParser(prog=PROG, usage=USAGE, description=DESCRIPTION)
    add_flags(parser)
    make_arg_parser(parser)
    parser.set_defaults(host="127.0.0.1", uvicorn_log_level=None)
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add our own flags."""
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
    group.add_argument(
        "--group-by-depth",
        type=seconds,
        default=None,
        metavar="SECONDS",
        help="where more requests wait than fit, let those go first that leave out the same layers "
        "as the running ones; a waiting request is overtaken for so long at most "
        "(see docs/serving.md)",
    )
    group.add_argument(
        "--verbose",
        action="store_true",
        help="print all that vLLM and uvicorn say. Without it, only warnings, errors and the "
        "requests are printed",
    )
    overload.add_arguments(group)
    body_limit.add_arguments(group)


def seconds(text: str) -> float:
    """Read a flag's length of time.

    Raises:
        argparse.ArgumentTypeError: it is not above 0, or has no end.
    """
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return number


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

    If the model's context needs more, vLLM shortens the context, and the line that says that the
    server answers says so.
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
        args.max_model_len = AS_LONG_AS_FITS


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
