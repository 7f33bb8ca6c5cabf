# Sourced by scripts/run, scripts/demo and scripts/test: makes a fresh machine ready. Sets NODE and DENO to runtimes
# that are new enough. Says what it does; does nothing twice. The caller stays in its directory: the paths that it
# was given are relative to that.
set -eu
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# Where `su` without `-` does not look.
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
export PATH

# shellcheck shell=bash disable=SC2034
# program:package pairs. What a laboratory with agents, etcd and a container needs …
LAB_PACKAGES=(ip:iproute2 sysctl:procps ps:procps nsenter:util-linux nft:nftables iptables:iptables etcd:etcd-server etcdctl:etcd-client
  busybox:busybox-static curl:curl dockerd:docker.io tcpdump:tcpdump)
# … and the real clients that the tests ask.
TEST_PACKAGES=(dig:bind9-dnsutils openssl:openssl avahi-daemon:avahi-daemon avahi-resolve:avahi-utils dbus-daemon:dbus iperf3:iperf3
  dnsmasq:dnsmasq-base musl-gcc:musl-tools chromium-headless-shell:chromium-headless-shell
  /usr/lib/python3/dist-packages/grpc:python3-grpcio /usr/lib/python3/dist-packages/grpc_tools:python3-grpc-tools)
# … and what the benchmarks run.
BENCH_PACKAGES=(iperf3:iperf3 ethtool:ethtool dnsperf:dnsperf dnsmasq:dnsmasq-base)

say() { printf '%s\n' "$*" >&2; }

# need_packages PROGRAM:PACKAGE ... installs the Debian packages whose program is missing.
need_packages() {
  local missing=()
  local pair
  for pair in "$@"; do
    # A path stands for a package without a program.
    command -v "${pair%%:*}" >/dev/null 2>&1 || [ -e "${pair%%:*}" ] || missing+=("${pair#*:}")
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  if [ "$(id -u)" -ne 0 ]; then
    say "missing: ${missing[*]}. Install them (apt-get install ${missing[*]}), or run this as root."
    exit 1
  fi
  say "installing Debian packages: ${missing[*]}"
  install_packages "${missing[@]}"
}

# Their programs are wanted, not their services: Debian asks policy-rc.d before it starts one. A subshell, so that its
# traps take everything away again, also after Ctrl-C.
install_packages() (
  policy=/usr/sbin/policy-rc.d
  mark="made by edgeway's scripts/setup.sh while it installs packages"
  log="$(mktemp)"
  undo() {
    rm -f "$log"
    ! grep -qs "$mark" "$policy" || rm -f "$policy"
  }
  trap undo EXIT
  trap 'exit 130' INT TERM HUP
  [ -e "$policy" ] || { printf '#!/bin/sh\n# %s\nexit 101\n' "$mark" >"$policy" && chmod 755 "$policy"; }
  if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } >"$log" 2>&1; then
    cat "$log" >&2
    exit 1
  fi
  [ ! -d /run/systemd/system ] ||
    say "their services were not started; at the next boot they are, unless you disable them: systemctl disable NAME"
)

need_root() {
  [ "$(id -u)" -eq 0 ] || { say "this needs root: it makes network namespaces and TUN devices"; exit 1; }
}

# npm packages exactly as locked; install scripts never run.
need_modules() {
  local made="$root/node_modules/.package-lock.json"
  if [ ! -f "$made" ] || [ "$root/package-lock.json" -nt "$made" ]; then
    command -v npm >/dev/null 2>&1 || need_packages npm:npm
    say "installing npm packages"
    (cd "$root" && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error) >&2
    touch "$made"
  fi
}

# Node >= 22.18: type stripping without a flag. The host's own where it is new enough, else the npm package.
find_runtimes() {
  NODE=""
  local candidate
  for candidate in "$(command -v node || true)" "$root"/node_modules/node-linux-*/bin/node; do
    [ -n "$candidate" ] && [ -x "$candidate" ] || continue
    if "$candidate" -e 'const [a,b]=process.versions.node.split(".").map(Number);process.exit(a>22||(a===22&&b>=18)?0:1)' 2>/dev/null; then
      NODE="$candidate"
      break
    fi
  done
  [ -n "$NODE" ] || { say "no Node >= 22.18 found, and the npm package node-linux-* is not installed"; exit 1; }
  DENO="$(ls "$root"/node_modules/@deno/*/deno 2>/dev/null | head -n 1 || true)"
  export NODE DENO
}

need_modules
find_runtimes
