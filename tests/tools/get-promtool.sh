#!/usr/bin/env bash
# Puts promtool and prometheus where the tests look: on PATH already, or unpacked (not installed)
# from Debian's package `prometheus` into build/promtool.
set -euo pipefail
cd "$(dirname "$0")/../.."
there() {
    command -v "$1" >/dev/null || [ -x "build/promtool/usr/bin/$1" ]
}
if there promtool && there prometheus; then
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "promtool or prometheus not found: install Prometheus so that the tests can use it" >&2
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
