#!/bin/sh
# Least rights in etcd for each kind of Edgeway process. Runs etcdctl with whatever ETCDCTL_* says (endpoints, TLS,
# ETCDCTL_USER=root:…). Repeating it is safe, also under running processes: what is missing is granted first, what is
# too much taken away last. Users are made without a password: set one with `etcdctl user passwd`, or use client
# certificates whose common name is the user.
#
#   rbac.sh root    USER                                   the plan, admission, blocks
#   rbac.sh cluster USER CLUSTER                           services, addresses and sweeping for one cluster
#   rbac.sh node    USER CLUSTER NODE SUBNET SLICE SERVICE…  one agent: its record, its subnet (172.16.3.64/26), its
#                                                          slice of InstanceIPs (172.30.200: a /24), what it may run
#
# PREFIX is the keyspace's root, /edgeway/v1 by default. A plan other than the default is written before any `node`:
# a node's number among the senders of north-south traffic is that of its subnet in the plan.
set -eu
PREFIX="${PREFIX:-/edgeway/v1}"
export ETCDCTL_API=3

usage() { sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2; }
quiet() { "$@" >/dev/null 2>&1 || true; }
kept=" "
exactly() { etcdctl role grant-permission "$role" "$1" "$PREFIX/$2" >/dev/null; kept="$kept$PREFIX/$2 "; }
below() { etcdctl role grant-permission "$role" "$1" --prefix "$PREFIX/$2" >/dev/null; kept="$kept$PREFIX/$2 "; }

plan() { etcdctl get --print-value-only "$PREFIX/config/network" | tr -d ' \n' | sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p"; }
base() { (IFS=./; set -f; set -- $1; echo $((($1 << 24) + ($2 << 16) + ($3 << 8) + $4))); }
size() { echo $((1 << (32 - ${1#*/}))); }
# The index of a subnet in the plan (src/plan.ts), plus one.
number() {
  platform="$(plan platform)"; services="$(plan services)"
  platform="${platform:-172.16.0.0/12}"; services="${services:-172.30.0.0/16}"
  offset=$(($(base "$1") - $(base "$platform")))
  if [ "$(base "$1")" -gt "$(base "$services")" ]; then offset=$((offset - $(size "$services"))); fi
  echo $((offset / $(size "$1") + 1))
}

[ $# -ge 2 ] || usage
kind="$1"; user="$2"; role="edgeway-$2"; shift 2
case "$kind" in root) [ $# -eq 0 ] || usage;; cluster) [ $# -eq 1 ] || usage;; node) [ $# -ge 4 ] || usage;; *) usage;; esac

quiet etcdctl role add "$role"
below read ""
case "$kind" in
  root)
    exactly readwrite config/network
    below readwrite root/
    below readwrite clusters/
    ;;
  cluster)
    exactly readwrite "clusters/$1"
    exactly readwrite "clusters/$1/leader"
    below readwrite services/
    below readwrite exposed/
    below readwrite ports/
    below readwrite addresses/
    below readwrite instances/
    ;;
  node)
    cluster="$1"; node="$2"; subnet="$3"; slice="$4"; shift 4
    exactly readwrite "nodes/$cluster/$node"
    exactly readwrite "hosts/$node"
    below readwrite calls/
    exactly readwrite "subnets/$subnet"
    exactly readwrite "instances/edgeway.system.ingress.v1/$(number "$subnet")"
    below readwrite "addresses/$slice."
    for service in "$@"; do below readwrite "instances/$service/"; done
    ;;
esac
etcdctl role get "$role" -w fields | awk -F'"' '/^"Key"/ { key = $4 } /^"RangeEnd"/ { print key, $4 }' |
  while read -r key end; do
    case "$kept" in *" $key "*) ;; *) etcdctl role revoke-permission "$role" "$key" $end >/dev/null;; esac
  done
etcdctl user get "$user" >/dev/null 2>&1 || etcdctl user add "$user" --no-password >/dev/null 2>&1 || etcdctl user add "$user:$(head -c 18 /dev/urandom | base64)" >/dev/null
etcdctl user grant-role "$user" "$role" >/dev/null
echo "user $user has role $role"
