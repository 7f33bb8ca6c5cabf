#!/bin/sh
# Least rights in etcd for each kind of Edgeway process. Runs etcdctl with whatever ETCDCTL_* says (endpoints, TLS,
# ETCDCTL_USER=root:…). Repeating it is safe. Users are made without a password: set one with `etcdctl user passwd`,
# or use client certificates whose common name is the user.
#
#   rbac.sh root    USER                                   the plan, admission, blocks
#   rbac.sh cluster USER CLUSTER                           services, addresses and sweeping for one cluster
#   rbac.sh node    USER CLUSTER NODE SUBNET SLICE SERVICE…  one agent: its record, its subnet (172.16.3.64/26), its
#                                                          slice of InstanceIPs (172.30.200: a /24), what it may run
#
# PREFIX is the keyspace's root, /edgeway/v1 by default.
set -eu
PREFIX="${PREFIX:-/edgeway/v1}"
export ETCDCTL_API=3

usage() { sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2; }
quiet() { "$@" >/dev/null 2>&1 || true; }
below() { etcdctl role grant-permission "$role" "$1" --prefix "$PREFIX/$2" >/dev/null; }
exactly() { etcdctl role grant-permission "$role" "$1" "$PREFIX/$2" >/dev/null; }

[ $# -ge 2 ] || usage
kind="$1"; user="$2"; role="edgeway-$2"; shift 2
case "$kind" in root) [ $# -eq 0 ] || usage;; cluster) [ $# -eq 1 ] || usage;; node) [ $# -ge 4 ] || usage;; *) usage;; esac

quiet etcdctl role delete "$role"
etcdctl role add "$role" >/dev/null
below read ""
case "$kind" in
  root)
    below readwrite config/
    below readwrite root/
    below readwrite clusters/
    ;;
  cluster)
    exactly readwrite "clusters/$1"
    exactly readwrite "clusters/$1/leader"
    below readwrite services/
    below readwrite exposed/
    below readwrite addresses/
    below readwrite instances/
    ;;
  node)
    cluster="$1"; node="$2"; subnet="$3"; slice="$4"; shift 4
    exactly readwrite "nodes/$cluster/$node"
    exactly readwrite "hosts/$node"
    exactly readwrite "subnets/$subnet"
    below readwrite "addresses/$slice."
    for service in "$@"; do below readwrite "instances/$service/"; done
    ;;
esac
etcdctl user get "$user" >/dev/null 2>&1 || etcdctl user add "$user" --no-password >/dev/null 2>&1 || etcdctl user add "$user:$(head -c 18 /dev/urandom | base64)" >/dev/null
etcdctl user grant-role "$user" "$role" >/dev/null
echo "user $user has role $role"
