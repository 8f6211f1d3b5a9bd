#!/usr/bin/env bash
# Puts promtool where the tests look: on PATH already, or unpacked (not installed) from Debian's
# package `prometheus` into build/promtool.
set -euo pipefail
cd "$(dirname "$0")/../.."
if command -v promtool >/dev/null || [ -x build/promtool/usr/bin/promtool ]; then
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "promtool not found: install Prometheus so that the tests can check /metrics" >&2
    exit 1
fi
mkdir -p build/promtool
cd build/promtool
apt-get download --quiet prometheus 2>/dev/null || {
    apt-get update --quiet --quiet
    apt-get download --quiet prometheus
}
dpkg --extract prometheus_*.deb .
rm prometheus_*.deb
